"""The demo's series and scores, and the whole of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_lowrank.cli.app import app
from hf_lowrank.experiments.demo import (
    NUM_WINDOWS,
    QUANTILE_LEVELS,
    SEASON_AND_HORIZON,
    demo,
    naive_quantiles,
    packaged_series,
    rolling_windows,
    score,
)
from hf_lowrank.experiments.sweep import DEFAULT_METHODS

pytest.importorskip("fev")
pytest.importorskip("matplotlib")


def test_packaged_series_are_regular_and_complete() -> None:
    series = packaged_series()
    assert set(series["item_id"]) == set(SEASON_AND_HORIZON)
    assert series["target"].notna().all()
    for _, group in series.groupby("item_id"):
        assert group["timestamp"].is_monotonic_increasing
        assert group["timestamp"].is_unique
        months = group["timestamp"].dt.year * 12 + group["timestamp"].dt.month
        assert months.diff().dropna().nunique() == 1


def test_windows_roll_without_overlap_and_never_see_their_target() -> None:
    series = packaged_series().set_index("item_id")["target"]
    for windows in rolling_windows(packaged_series(), context_length=60):
        values = series[windows.name].to_numpy()
        horizon = SEASON_AND_HORIZON[windows.name][1]
        np.testing.assert_array_equal(windows.targets.ravel(), values[-NUM_WINDOWS * horizon :])
        for i, context in enumerate(windows.contexts):
            end = len(values) - (NUM_WINDOWS - i) * horizon
            np.testing.assert_array_equal(context, values[max(0, end - 60) : end])


def test_scores_agree_with_their_definitions() -> None:
    windows = rolling_windows(packaged_series(), context_length=512)[0]
    quantiles = naive_quantiles(windows)
    found = score(windows, quantiles)
    # WQL: twice the pinball losses' sum over the sum of absolute targets, averaged over the levels.
    error = windows.targets[:, :, None] - quantiles
    levels = np.array(QUANTILE_LEVELS)
    pinball = np.maximum(levels * error, (levels - 1) * error)
    assert found["WQL"] == pytest.approx((2 * pinball.sum(axis=(0, 1)) / np.abs(windows.targets).sum()).mean())
    scales = [np.abs(context[windows.season :] - context[: -windows.season]).mean() for context in windows.contexts]
    assert found["MASE"] == pytest.approx((np.abs(error[:, :, 4]).mean(axis=1) / scales).mean())


@pytest.fixture
def dense_folder(chronos_t5, tmp_path: Path) -> Path:
    chronos_t5.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_demo_compares_all_methods_and_draws(dense_folder: Path, tmp_path: Path) -> None:
    options = ["--ratios", "0.5,0.3", "--plot", str(tmp_path / "a.png"), "--json", "-"]
    result = CliRunner().invoke(app, ["demo", "--source", str(dense_folder), *options])
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["results"]}
    assert list(rows) == ["dense"] + [f"{name} {ratio}" for ratio in ("0.5", "0.3") for name in DEFAULT_METHODS]
    dense = rows["dense"]
    weights = (dense_folder / "model.safetensors").stat().st_size
    assert 0 <= weights - dense["bytes"] < 20_000  # what is on the disk, but for the header
    assert dense["dtype"] == "bfloat16"
    for name, row in rows.items():
        if name.startswith(("default", "weights")):
            assert row["attention_ratio"] <= float(name.split()[-1])
            assert row["cache_bytes"] < dense["cache_bytes"]
        if name.startswith("paper"):
            assert row["parameters"] == dense["parameters"]
            assert row["kept_rank_ratio"] <= float(name.split()[-1])
        assert row["seconds"][1] <= row["seconds"][0] <= row["seconds"][2]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_full_rank_scores_exactly_as_dense(dense_folder: Path) -> None:
    dense, *compressed = demo(str(dense_folder), ratios=[1.0])
    whole = next(row for row in compressed if row.name.startswith("default"))
    assert (whole.wql, whole.mase) == (dense.wql, dense.mase)
    assert (whole.parameters, whole.cache_bytes) == (dense.parameters, dense.cache_bytes)


def test_another_t5_is_refused(dense_t5, tmp_path: Path) -> None:
    dense_t5().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="is a T5ForConditionalGeneration without a chronos_config"):
        demo(str(tmp_path / "text"))
