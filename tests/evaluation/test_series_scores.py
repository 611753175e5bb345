"""The parts of series add up to fev's metrics, and resampling them is resampling series."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hf_lowrank.evaluation.scores import METRICS, score_forecasts
from hf_lowrank.evaluation.series_scores import MAX_GROUPS, num_groups, resampled_scores, series_parts

pytest.importorskip("fev")


def window(num_series: int, *, missing: float = 0.0, same_length: bool = False, seed: int = 0) -> dict[str, Any]:
    """Forecasts of series with gaps, of which some have no scale and one was never observed in the future."""
    rng = np.random.default_rng(seed)
    lengths = np.full(num_series, 9) if same_length else rng.integers(1, 40, num_series)
    contexts = [rng.normal(0, 10 ** rng.uniform(-3, 3), length) for length in lengths]
    targets = rng.normal(size=(num_series, 6))
    for values in (*contexts, targets):
        values[rng.random(values.shape) < missing] = np.nan
    contexts[0][:] = 5.0
    targets[-1] = np.nan if missing else 0.0
    quantiles = np.sort(rng.normal(size=(num_series, 6, 9)))
    return {
        "targets": targets,
        "contexts": contexts,
        "quantiles": quantiles,
        "mean": quantiles.mean(-1),
        "seasonality": 4,
    }


@pytest.mark.parametrize("num_series", [3, 1000])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("same_length", [True, False])
def test_the_parts_add_up_to_fevs_metrics(num_series: int, missing: float, same_length: bool) -> None:
    data = [window(num_series, missing=missing, same_length=same_length, seed=seed) for seed in (1, 2)]
    parts = [series_parts(**one) for one in data]
    by_series = {name: [part[name] for part in parts] for name in parts[0]}
    assert num_groups(by_series) == min(num_series, MAX_GROUPS)
    scores = resampled_scores(by_series, num_bootstrap=1, seed=0)
    for metric in METRICS:
        wanted = np.mean([score_forecasts(**one)[metric] for one in data])
        np.testing.assert_allclose(scores[metric][0], wanted, rtol=1e-12)


def test_a_resample_is_the_score_of_the_series_drawn() -> None:
    data = window(5, missing=0.1, seed=3)
    parts = series_parts(**data)
    by_series = {name: [part] for name, part in parts.items()}
    scores = resampled_scores(by_series, num_bootstrap=20, seed=4)
    draws = np.random.default_rng(4).multinomial(5, np.full(5, 1 / 5), size=20)
    for number, counts in enumerate(draws, start=1):
        drawn = np.repeat(np.arange(5), counts)
        again = {name: data[name][drawn] for name in ("targets", "quantiles", "mean")}
        wanted = score_forecasts(**again, contexts=[data["contexts"][i] for i in drawn], seasonality=4)
        for metric in METRICS:
            np.testing.assert_allclose(scores[metric][number], wanted[metric], rtol=1e-12)
