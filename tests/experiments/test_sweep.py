"""The sweep over sizes and methods, on a tiny model and a small file of series."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

pytest.importorskip("fev")

from hf_lowrank.cli.app import app
from hf_lowrank.evaluation.tasks import file_task
from hf_lowrank.experiments.sweep import sweep
from hf_lowrank.published_figures import EPSILONS, TRUNCATED_RATIOS


@pytest.fixture
def dense_folder(chronos_t5, tmp_path: Path) -> str:
    chronos_t5.save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


@pytest.fixture
def task(tmp_path: Path):
    rng = np.random.default_rng(0)
    frames = [
        pd.DataFrame(
            {
                "item_id": name,
                "timestamp": pd.date_range("2020-01-01", periods=40, freq="D"),
                "target": 5 + np.sin(np.arange(40)) + rng.normal(size=40),
            }
        )
        for name in "abc"
    ]
    pd.concat(frames).to_csv(tmp_path / "series.csv", index=False)
    return file_task(tmp_path / "series.csv", horizon=4)


def test_full_size_scores_one_and_smaller_sizes_are_smaller(dense_folder: str, task) -> None:
    result = sweep(dense_folder, ratios=[1.0, 0.4], methods=["per_head", "paper"], tasks=[task])
    points = {(point.method, point.value): point for point in result.points}
    for method in ("per_head", "paper"):
        assert points[method, 1.0].wql[0] == pytest.approx(1, abs=1e-6)
        assert points[method, 0.4].kept <= 0.4
    assert points["per_head", 0.4].parameters < points["per_head", 1.0].parameters
    assert points["paper", 0.4].parameters == points["per_head", 1.0].parameters


def test_epsilons_are_the_papers_rule(dense_folder: str, task) -> None:
    result = sweep(dense_folder, epsilons=[0.0, 0.9], methods=["paper"], tasks=[task])
    everything, little = result.points
    assert everything.kept == 1
    assert little.kept < 0.5


def test_the_papers_settings_pair_up() -> None:
    assert len(EPSILONS) == len(TRUNCATED_RATIOS) == 4
    assert sorted(TRUNCATED_RATIOS, reverse=True) == list(TRUNCATED_RATIOS)
    assert sorted(EPSILONS) == list(EPSILONS)


def test_bad_arguments(dense_folder: str, task) -> None:
    with pytest.raises(ValueError, match="either ratios or epsilons"):
        sweep(dense_folder, ratios=[0.5], epsilons=[0.1], tasks=[task])
    with pytest.raises(ValueError, match=r"methods must be of default, per_head, .*; found svd"):
        sweep(dense_folder, methods=["svd"], tasks=[task])


@pytest.mark.slow
def test_command_writes_points_and_picture(dense_folder: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["sweep", dense_folder, "--ratios", "0.5,0.4", "--tasks", "m1_yearly", "--num-samples", "2"]
    files = ["--plot", str(tmp_path / "pareto.png"), "--json", str(tmp_path / "sweep.json")]
    result = CliRunner().invoke(app, arguments + files)
    assert result.exit_code == 0, result.stderr
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert {point["method"] for point in content["points"]} == {"default", "weights", "paper"}
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
