"""Ctrl-C and SIGTERM end the work in order, and the one who waits learns how to go on."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_lowrank import PretrainingSettings, compress_pretrained, forecast_file, pretrain, recover
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.cli.app import app
from hf_lowrank.forecasting import forecast
from hf_lowrank.interrupts import Interrupted, Raise, explained, handled, interruption_of, postponed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent")
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """Also where the tests are a job in the background, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@BOTH
def test_a_signal_raises_at_once_or_the_second_time(number):
    before = signal.getsignal(number)
    with handled(Raise()), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.number == number
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt), postponed(lambda: told.append(1)) as signals:  # noqa: PT012
        os.kill(os.getpid(), number)
        assert (signals.received, told) == (number, [1])
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored_and_other_threads_set_no_handlers():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled(Raise()):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen: list[Any] = []

    def elsewhere() -> None:
        with handled(Raise()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


def test_what_a_library_makes_of_an_interruption_is_one():
    error = ImportError("numpy._core.multiarray failed to import")
    assert interruption_of(error) is None
    assert interruption_of(KeyboardInterrupt()).number == signal.SIGINT
    with handled(handler := Raise()):
        with pytest.raises(Interrupted):
            handler(signal.SIGTERM)
        assert interruption_of(error).number == signal.SIGTERM
    with pytest.raises(Interrupted, match="from there"), explained(lambda: "from there"):
        raise Interrupted(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, explained(lambda: None):
        raise KeyboardInterrupt
    assert type(caught.value) is KeyboardInterrupt


class _Signal(TrainerCallback):
    """Sends a signal to all processes in the middle of a step, as a terminal does, or what runs jobs."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no accumulation here")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
            subprocess.run(["kill", f"-{int(self.number)}", *map(str, processes)], check=True)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 0), (signal.SIGTERM, 1)])
def test_an_interrupted_pretraining_goes_on_to_the_same_weights(chronos_t5, tmp_path, number, workers):
    chronos_t5.save_pretrained(tmp_path / "start")
    settings = PretrainingSettings(
        start=str(tmp_path / "start"), steps=6, save_steps=4, batch_tokens=200, evaluation_batches=1, workers=workers, bf16=False
    )  # fmt: skip
    calm = pretrain(tmp_path / "calm", settings).state_dict()
    with pytest.raises(Interrupted, match="run the same command again to go on from step 3") as caught:
        pretrain(tmp_path / "cut", settings, callbacks=[_Signal(3, number)])
    assert caught.value.number == number
    assert not (tmp_path / "cut").exists()
    weights = pretrain(tmp_path / "cut", settings).state_dict()
    assert all(torch.equal(weights[name], calm[name]) for name in calm)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "cut", "start"]


def test_an_interrupted_recovery_goes_on_to_the_same_weights(chronos_t5, tmp_path, monkeypatch):
    student = compress_pretrained(chronos_t5, uniform=4, calibration=None)
    arguments: dict[str, Any] = {"steps": 5, "batch_tokens": 200, "evaluation_batches": 1}
    calm = recover(student, chronos_t5, tmp_path / "calm", **arguments).state_dict()
    trainer = sys.modules["hf_lowrank.training.distillation"]._DistillationTrainer
    usual, calls = trainer.training_step, []

    def signalled(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", signalled)
    with pytest.raises(Interrupted, match="go on from step 2"):
        recover(student, chronos_t5, tmp_path / "cut", **arguments)
    weights = recover(student, chronos_t5, tmp_path / "cut", **arguments).state_dict()
    assert len(calls) == 5
    assert all(torch.equal(weights[name], calm[name]) for name in calm)


def test_an_interrupted_forecast_says_from_where_it_goes_on(chronos_t5, tmp_path, monkeypatch):
    data = tmp_path / "data.csv"
    rows = [f"{item},2024-01-{day:02d},{day}\n" for item in "abc" for day in range(1, 31)]
    data.write_text("item_id,timestamp,target\n" + "".join(rows))
    pipeline, usual, calls = as_pipeline(chronos_t5), forecast.forecast_series, []

    def signalled(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(forecast, "forecast_series", signalled)
    with pytest.raises(Interrupted, match="run the same command again to go on from part 2"):
        forecast_file(pipeline, data, tmp_path / "out.csv", horizon=4, chunk_rows=30, num_samples=2)
    summary = forecast_file(pipeline, data, tmp_path / "out.csv", horizon=4, chunk_rows=30, num_samples=2)
    assert summary.num_resumed == 1


@BOTH
def test_a_command_says_one_line_and_its_exit_status(monkeypatch, number):
    def fail(*_: object, **__: object) -> None:
        raise Interrupted(number)

    monkeypatch.setattr("hf_lowrank.compression.compress.compress_pretrained", fail)
    result = CliRunner().invoke(app, ["compress", "reference", "nowhere", "--ratio", "0.5"])
    assert result.exit_code == 128 + number
    assert result.stderr == "interrupted: nothing is half-written; run the same command again.\n"


def interrupted_after(seconds: float, number: int, folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit status and what a command says that gets a signal so many seconds after it listens; it has nothing but that to say."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_lowrank", *arguments], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )  # fmt: skip
    listens = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if caught and int(caught[1], 16) & listens:
            break
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(number)
    return process.wait(), process.communicate()[1]


@pytest.mark.fuzz
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_an_interruption_at_any_time_is_one_line(tmp_path):
    """In the imports too: 20 times."""
    drawn = random.Random(0)
    for _ in range(20):
        seconds, number = drawn.uniform(0, 5), drawn.choice([signal.SIGINT, signal.SIGTERM])
        status, said = interrupted_after(seconds, number, tmp_path, "compress", "reference", "out", "--ratio", "0.5")
        assert status == 128 + number, (seconds, said)
        assert said.strip().splitlines()[-1].startswith("interrupted: "), (seconds, said)
        assert "Traceback" not in said
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
