"""Killed at any file operation or at any time, and started again: every command that writes comes to the end of an undisturbed run."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest
import torch
from writers import fork, tries_of_kills, writers

from hf_lowrank.files import temporary_folder

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore"),
]
NAMES = [
    "forecast csv",
    "forecast parquet",
    "compress",
    "compress --overwrite --json",
    "compress --save-calibration",
    "recover",
    "pretrain",
    "export over a model",
    "analyze --plots --json",
]


@pytest.mark.fuzz
@pytest.mark.parametrize("name", NAMES)
def test_all_kills(tmp_path, chronos_t5, name):
    """Twenty-four of each command, 216 in all."""
    torch.set_num_threads(1)
    assert tries_of_kills(writers(tmp_path, chronos_t5)[name], tmp_path, 24, seed=0) == []


@pytest.mark.parametrize("name", ["forecast csv", "compress --overwrite --json"])
def test_some_kills(tmp_path, chronos_t5, name):
    torch.set_num_threads(1)
    assert tries_of_kills(writers(tmp_path, chronos_t5)[name], tmp_path, 2, seed=1) == []


def test_push_leaves_no_weights_among_the_temporary_files(tmp_path, monkeypatch):
    """It saves the model there first; what a killed one has left goes with the next, and that of a living one stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def die() -> None:
        with temporary_folder() as folder:
            (folder / "model.safetensors").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(die), 0)
    assert len(list(tmp_path.iterdir())) == 1
    with temporary_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder]
        with temporary_folder() as other:
            assert set(tmp_path.iterdir()) == {folder, other}
    assert not list(tmp_path.iterdir())
