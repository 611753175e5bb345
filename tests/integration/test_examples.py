"""The examples and the README's code run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lowrank.checkpoints.loading import checkpoint_path

ROOT = Path(__file__).parents[2]


def run_script(*arguments: object, folder: Path) -> str:
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"## Ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code + "print(tuple(quantiles.shape), tuple(mean.shape))\n")
    assert run_script(script, folder=tmp_path).strip() == "(1, 24, 9) (1, 24)"


def test_the_references_are_trained_and_measured(tmp_path: Path) -> None:
    script = ROOT / "examples" / "pretrain_reference.py"
    run_script(script, "train", "bolt", "--family", "bolt", "--steps", 1, folder=tmp_path)
    added = json.loads(run_script(script, "measure", "bolt", "--batches", 1, folder=tmp_path))
    assert set(added["added_when_silenced"]) == {"encoder_self", "decoder_self", "cross"}
    assert all(loss > 0 for loss in added["added_when_silenced"].values())


def test_studies_compare_models_of_equal_size(tmp_path: Path) -> None:
    pytest.importorskip("fev")
    script = ROOT / "examples" / "studies.py"
    run_script(script, "schedule", "--steps", 1, "--seeds", 1, folder=tmp_path)
    runs = tmp_path / "runs" / "studies"
    rows = json.loads((runs / "schedule.json").read_text())
    assert len({row["attention"] for row in rows.values()}) == 1  # equal parameters
    assert len(rows) == 3


@pytest.mark.slow
def test_text_and_time_series_are_compared(tmp_path: Path) -> None:
    run_script(ROOT / "examples" / "studies.py", "text", "--steps", 1, "--ratios", 0.5, folder=tmp_path)
    rows = json.loads((tmp_path / "runs" / "studies" / "text.json").read_text())
    assert all(0 <= row["added at 0.5"] < row["attention silenced"] for row in rows.values())


def test_alternatives_are_compared(tmp_path: Path, chronos_t5) -> None:
    chronos_t5.save_pretrained(tmp_path / "dense")
    script = ROOT / "examples" / "compare_alternatives.py"
    options = ["--ratios", 0.5, "--feed-forward-ratios", 0.5, "--num-batches", 2, "--json", "figures.json"]
    table = run_script(script, "dense", *options, folder=tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(0 <= row["0.5"] < 10 for rows in figures.values() for row in rows.values())
    assert figures["attention"]["the default"]["0.5"] < figures["attention"]["single matrices, whitened"]["0.5"]
    assert "fewer neurons, refitted" in table


@pytest.mark.slow
def test_the_reference_uses_all_its_attention(tmp_path: Path) -> None:
    script = ROOT / "examples" / "pretrain_reference.py"
    added = json.loads(run_script(script, "measure", checkpoint_path("reference"), folder=tmp_path))[
        "added_when_silenced"
    ]
    assert added["encoder_self"] >= 0.1
    assert added["cross"] >= 0.5
