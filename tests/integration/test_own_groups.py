"""A Chronos-2 that is calibrated on groups whose covariate tells the target still reads it, at a seventh of the size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from chronos.chronos2 import Chronos2Pipeline

from hf_lowrank import GroupedSeries, LowRankChronos2Pipeline, compress_pretrained, load_pipeline

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
HORIZON = 64


def told_by_a_covariate(num_items: int, length: int, *, seed: int) -> pd.DataFrame:
    """Items whose target is twice a covariate that nothing foretells, a level, and a little noise."""
    rng = np.random.default_rng(seed)
    parts = []
    for item in range(num_items):
        covariate = rng.normal(size=length)
        target = 2 * covariate + rng.uniform(5, 20) + 0.1 * rng.normal(size=length)
        times = pd.date_range("2024-01-01", periods=length, freq="h")
        parts.append(pd.DataFrame({"item_id": item, "timestamp": times, "target": target, "covariate": covariate}))
    return pd.concat(parts, ignore_index=True)


def weighted_quantile_loss(pipeline: Chronos2Pipeline, frame: pd.DataFrame, *, is_known: bool = True) -> float:
    """Of the last horizon of every item."""
    is_future = frame.groupby("item_id").cumcount(ascending=False) < HORIZON
    past, future = frame[~is_future], frame[is_future]
    known = future.drop(columns="target") if is_known else None
    past = past if is_known else past.drop(columns="covariate")
    forecast = pipeline.predict_df(past, known, prediction_length=HORIZON, quantile_levels=LEVELS)
    target = future["target"].to_numpy()[:, None]
    error = target - forecast[list(map(str, LEVELS))].to_numpy()
    loss = np.maximum(np.array(LEVELS) * error, (np.array(LEVELS) - 1) * error)
    return float(2 * loss.mean(axis=1).sum() / np.abs(target).sum())


@pytest.mark.slow
def test_what_a_covariate_tells_is_kept() -> None:
    train, test = (told_by_a_covariate(60, 600, seed=seed) for seed in (1, 2))
    model = compress_pretrained(
        "reference-2", total_ratio=0.15, calibration=GroupedSeries(train, known_covariates="covariate")
    )
    dense = load_pipeline("reference-2")
    loss = weighted_quantile_loss(dense, test)
    assert loss < 0.25 * weighted_quantile_loss(dense, test, is_known=False)
    assert weighted_quantile_loss(LowRankChronos2Pipeline(model), test) < 1.02 * loss
