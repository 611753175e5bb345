"""The examples and the README's code run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_lowrank.checkpoint import REFERENCE

ROOT = Path(__file__).parents[1]


def run_script(*arguments: object, folder: Path) -> str:
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"## Ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code + "print(tuple(quantiles.shape), tuple(mean.shape))\n")
    assert run_script(script, folder=tmp_path).strip() == "(1, 24, 9) (1, 24)"


def test_pretraining_resumes_to_the_same_weights(tmp_path: Path) -> None:
    script = ROOT / "examples" / "pretrain_reference.py"
    small = ["--steps", 4, "--d-model", 16, "--num-heads", 2, "--d-kv", 8, "--num-layers", 1]
    options = [*small, "--max-tokens", 300, "--workers", 0, "--save-steps", 2]
    run_script(script, "train", "whole", *options, folder=tmp_path)
    run_script(script, "train", "cut", *options, folder=tmp_path)
    for name in ("checkpoint-4", "final"):  # as if it had been cut off after two steps
        for file in sorted((tmp_path / "cut" / name).iterdir()):
            file.unlink()
        (tmp_path / "cut" / name).rmdir()
    run_script(script, "train", "cut", *options, folder=tmp_path)
    whole, cut = (
        T5ForConditionalGeneration.from_pretrained(tmp_path / run / "final").state_dict() for run in ("whole", "cut")
    )
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=0, atol=0)


def test_a_bolt_is_trained_and_measured(tmp_path: Path) -> None:
    script = ROOT / "examples" / "pretrain_reference.py"
    small = ["--steps", 2, "--d-model", 16, "--num-heads", 2, "--d-kv", 8, "--num-layers", 1]
    run_script(
        script, "train", "bolt", "--family", "bolt", *small, "--max-tokens", 300, "--workers", 0, folder=tmp_path
    )
    added = json.loads(run_script(script, "measure", "bolt/final", "--batches", 1, folder=tmp_path))
    assert set(added["added_when_silenced"]) == {"encoder_self", "decoder_self", "cross"}
    assert all(loss > 0 for loss in added["added_when_silenced"].values())


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
    added = json.loads(run_script(script, "measure", REFERENCE, folder=tmp_path))["added_when_silenced"]
    assert added["encoder_self"] >= 0.1
    assert added["cross"] >= 0.5
