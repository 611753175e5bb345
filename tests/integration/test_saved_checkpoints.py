"""What earlier versions saved loads bit for bit and answers the same, with the package and with the code beside the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import saved_checkpoints
import torch
from safetensors.torch import load_file

FIRST = Path(__file__).parent / "checkpoints"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", saved_checkpoints.NAMES)
def test_the_first_checkpoints_load_and_answer_as_they_did(name, implementation):
    model = saved_checkpoints.load(FIRST / name, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    saved_checkpoints.check(FIRST / name, model)


def test_the_code_beside_the_weights_does_the_same(tmp_path):
    for name in saved_checkpoints.NAMES:
        saved_checkpoints.save_again(FIRST / name, tmp_path / name)
        again, first = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, FIRST))
        assert again.keys() == first.keys()
        assert all(torch.equal(again[key], first[key]) for key in first)
    command = [sys.executable, saved_checkpoints.__file__, "check", tmp_path, "--remote"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


def test_a_changed_weight_is_noticed(tmp_path):
    saved_checkpoints.save(tmp_path)
    for name in saved_checkpoints.NAMES:
        model = saved_checkpoints.load(tmp_path / name)
        saved_checkpoints.check(tmp_path / name, model)
        with torch.no_grad():
            next(model.encoder.block[1].layer[0].parameters()).mul_(1 + 1e-6)
        with pytest.raises(AssertionError, match="differs"):
            saved_checkpoints.check(tmp_path / name, model)
