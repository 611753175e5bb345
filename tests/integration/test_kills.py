"""Killed at any file operation, and started again: every command comes to the end of an undisturbed run, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf_lowrank import (
    PretrainingSettings,
    compress_pretrained,
    forecast_file,
    pretrain,
    recover,
    save_compressed,
)
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.files import alone, locked

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore"),
]
# What changes the file system, as Python audits it.
OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "tempfile.mkdtemp"}


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a fork that is killed before its file operation of this number; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in OPERATIONS or is_write:
                count += 1
                if count > number:
                    os.kill(os.getpid(), signal.SIGKILL)

        torch.set_num_threads(1)
        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def content(folder: Path) -> dict[str, str]:
    """The files of a folder, hidden ones too, by their digests."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check(
    tmp_path: Path, work: Callable[[Path], object], count: int, *, first: Callable[[Path], object] | None = None
):
    """Kill the work at so many places, and see it end as if nothing had been."""
    torch.set_num_threads(1)
    prepare = first or Path.mkdir
    calm = tmp_path / "calm"
    prepare(calm)
    before = content(calm)
    work(calm)
    wanted, places = content(calm), set()
    for number in random.Random(0).sample(range(200), 200):
        if len(places) == count:
            break
        folder = tmp_path / f"killed-{number}"
        prepare(folder)
        if killed_at(number, lambda folder=folder: work(folder)):
            places.add(number)
            if "model/config.json" in before:  # what was there before is there, or what will be
                assert (folder / "model" / "config.json").exists() or any(folder.glob(".model-unfinished-*/replaced"))
        work(folder)
        assert content(folder) == wanted, f"killed at {number}"
    assert len(places) == count or len(places) > 3


def table(path: Path) -> Path:
    stamps = pd.date_range("2024-01-01", periods=30, freq="D")
    parts = [
        pd.DataFrame({"item_id": f"s{i}", "timestamp": stamps, "target": np.sin(np.arange(30) + i)}) for i in range(6)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(parts).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_forecasts_go_on_to_the_same_bytes(tmp_path, chronos_t5, suffix, count):
    pipeline, data = as_pipeline(chronos_t5), table(tmp_path / "data.csv")

    def work(folder: Path) -> None:
        with suppress(FileExistsError):  # it was complete
            forecast_file(pipeline, data, folder / f"out.{suffix}", horizon=4, chunk_rows=60, num_samples=2)

    check(tmp_path, work, count)


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_model_that_replaces_another_one_loses_neither(tmp_path, chronos_t5, count):
    old, new = (compress_pretrained(chronos_t5, uniform=rank, calibration=None) for rank in (2, 3))
    check(
        tmp_path,
        lambda folder: save_compressed(new, folder / "model", overwrite=True),
        count,
        first=lambda folder: save_compressed(old, folder / "model"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "recover"])
def test_training_goes_on_to_the_same_bytes(tmp_path, chronos_t5, kind):
    student = compress_pretrained(chronos_t5, uniform=4, calibration=None)
    chronos_t5.save_pretrained(tmp_path / "start")
    settings = PretrainingSettings(
        start=str(tmp_path / "start"),
        steps=4,
        save_steps=2,
        batch_tokens=200,
        evaluation_batches=1,
        workers=0,
        bf16=False,
        # Trainer's mean since the last log begins anew with a run that goes on.
        trainer={"logging_steps": 1},
    )

    def work(folder: Path) -> None:
        with suppress(FileExistsError):  # it was complete
            if kind == "pretrain":
                pretrain(folder / "model", settings)
            else:
                recover(student, chronos_t5, folder / "model", steps=4, batch_tokens=200, evaluation_batches=1)

    check(tmp_path, work, 20)


def test_two_runs_to_one_output_do_not_mix(tmp_path, chronos_t5):
    pipeline, data = as_pipeline(chronos_t5), table(tmp_path / "data.csv")
    arguments = {"horizon": 4, "chunk_rows": 60, "num_samples": 2}
    forecast_file(pipeline, data, tmp_path / "alone.csv", **arguments)
    with (
        alone(tmp_path / "out.csv"),
        pytest.raises(OSError, match="another run is writing to"),
    ):
        forecast_file(pipeline, data, tmp_path / "out.csv", **arguments)
    forecast_file(pipeline, data, tmp_path / "out.csv", **arguments)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    with locked(tmp_path / "model"), pytest.raises(OSError, match="another run is writing to"):
        save_compressed(compress_pretrained(chronos_t5, uniform=2, calibration=None), tmp_path / "model")
