"""The ways in by which a checkpoint reaches this package, and what each makes of it: a forecast that can be compared."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints import Kind
from chronos import BaseChronosPipeline
from hub_server import Hub, serve
from numpy.typing import NDArray
from outcomes import BEFORE, CLEAR, EXCEPTION, HANG, NAN, UNCHANGED, WRONG
from transformers import PreTrainedModel
from typer.testing import CliRunner

import hf_lowrank
from hf_lowrank import compress_pretrained, load_pipeline
from hf_lowrank.checkpoints.pipelines import as_pipeline, predict_quantiles
from hf_lowrank.cli.app import app

__all__ = ["WAYS_IN", "Outcome", "Workshop", "outcome_of"]

PACKAGE = Path(hf_lowrank.__file__).parent
HORIZON = 5
LIMIT = 30.0  # seconds
MEMORY = 4 * 2**30  # bytes that a case may take beyond what the process has


class Refused(Exception):
    """A command ended in an error of one line, in words for its user."""


class Broken(Exception):
    """A command, or a call, ended in something else."""


class TimeUp(BaseException):
    """A case took longer than it may; nothing catches it but what waits for it."""


@dataclass
class Workshop:
    """What the ways in need beside a checkpoint: whole checkpoints, series in a file, a Hub, a folder for outputs."""

    folders: dict[Kind, Path]
    root: Path
    hub: Hub
    count: int = 0

    @property
    def series(self) -> Path:
        return self.root / "series.csv"

    def output(self) -> Path:
        """A path that nothing is at."""
        self.count += 1
        return self.root / f"output-{self.count}"

    @classmethod
    @contextmanager
    def opened(cls, folders: dict[Kind, Path], root: Path) -> Iterator[Workshop]:
        with serve({"hf_ann": "ann"}) as hub, pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
            patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            patch.setenv("HF_TOKEN", "hf_ann")
            workshop = cls(folders, root, hub)
            stamps = pd.date_range("2024-01-01", periods=60, freq="D")
            values = [np.sin(np.arange(60) / (i + 1)) + i for i in range(3)]
            parts = [
                pd.DataFrame({"item_id": f"s{i}", "timestamp": stamps, "target": v}) for i, v in enumerate(values)
            ]
            pd.concat(parts).to_csv(workshop.series, index=False)
            (root / "settings.yaml").write_text(
                "steps: 1\nworkers: 0\nbatch_tokens: 100\nevaluation_batches: 1\nbf16: false\n"
            )
            yield workshop


def command(*arguments: object) -> None:
    """Run a command line in this process; any other end than success is an exception."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, TimeUp):
        raise result.exception
    if result.exit_code == 0:
        return
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise Broken(f"{type(result.exception).__name__}: {result.exception}") from result.exception
    # A Trainer's progress has lines of its own, and warnings come before or after the error.
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    if len(errors) != 1 or result.exit_code != 1 or "Traceback" in result.output or "--debug" in errors[0]:
        raise Broken(result.stderr[-2000:])
    raise Refused(errors[0])


def predictions(pipeline: BaseChronosPipeline) -> NDArray[np.floating]:
    """What a pipeline says of two series: (2, H, 3)."""
    contexts = [torch.arange(30.0).sin() + 3, torch.arange(45.0).cos() * 5]
    options = {"seeds": [1, 2], "num_samples": 3} if "seeds" in pipeline.predict.__code__.co_varnames else {}
    torch.manual_seed(0)
    return predict_quantiles(pipeline, contexts, HORIZON, [0.1, 0.5, 0.9], **options)[0]


def forecasts_of(made: PreTrainedModel | Path) -> NDArray[np.floating]:
    """What a model, or a folder that a command has written, forecasts: an output that does not is a wrong one."""
    try:
        return predictions(
            load_pipeline(made, device="cpu", dtype="float32") if isinstance(made, Path) else as_pipeline(made.float())
        )
    except Exception as error:
        if isinstance(made, PreTrainedModel) and isinstance(error, ValueError):
            raise
        return np.array([f"{type(error).__name__}: {error}"], dtype=object)


# ---- The ways in -----------------------------------------------------------------------------------------------------


def through_chronos(folder: Path, kind: Kind, workshop: Workshop) -> NDArray[np.floating]:
    pipeline = BaseChronosPipeline.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    return predictions(pipeline)


def through_forecast(folder: Path, kind: Kind, workshop: Workshop) -> NDArray[np.floating]:
    output = workshop.output().with_suffix(".csv")
    command("forecast", folder, workshop.series, output, "--horizon", HORIZON, "--device", "cpu")
    return pd.read_csv(output).select_dtypes("number").to_numpy()


def through_compress(folder: Path, kind: Kind, workshop: Workshop) -> NDArray[np.floating]:
    return forecasts_of(compress_pretrained(str(folder), uniform=4, calibration=None))


def through_push(folder: Path, kind: Kind, workshop: Workshop) -> NDArray[np.floating]:
    output = workshop.output()
    name = f"ann/{output.name}"
    command("push", folder, name)
    output.mkdir()
    for path, content in workshop.hub.repositories.pop(name).files.items():
        (output / path).write_bytes(content)
    return forecasts_of(output)


def through_pretrain(folder: Path, kind: Kind, workshop: Workshop) -> NDArray[np.floating]:
    output = workshop.output()
    settings = workshop.root / "settings.yaml"
    command("pretrain", output, "--start", folder, "--config", settings, "--data", workshop.series)
    loss = json.loads((output / "pretraining.json").read_text())["held_out_loss"]
    forecasts = forecasts_of(output)
    return forecasts if forecasts.dtype == object else np.append(forecasts.ravel(), loss)


def through_recover(folder: Path, kind: Kind, workshop: Workshop) -> NDArray[np.floating]:
    output = workshop.output()
    student, teacher = (workshop.folders[Kind("t5", is_dense)] for is_dense in (False, True))
    student, teacher = (student, folder) if kind.is_dense else (folder, teacher)
    command("recover", student, output, "--teacher", teacher, "--steps", 1, "--data", workshop.series)
    return forecasts_of(output)


def always(kind: Kind) -> bool:
    return True


# What chronos' own classes do with a damaged dense checkpoint is not this package's to mend: `BaseChronosPipeline` is for low-rank ones.
WAYS_IN: dict[str, tuple[Callable[[Path, Kind, Workshop], NDArray[np.floating]], Callable[[Kind], bool]]] = {
    "`BaseChronosPipeline`, low-rank": (through_chronos, lambda kind: not kind.is_dense),
    "`hf-lowrank forecast`": (through_forecast, always),
    "`compress_pretrained`": (through_compress, lambda kind: kind.is_dense),
    "`push`": (through_push, lambda kind: not kind.is_dense),
    "`pretrain --start`": (through_pretrain, lambda kind: kind.family != "chronos2"),
    "`recover`": (through_recover, lambda kind: kind.family == "t5"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint: one of the kinds in `outcomes`, and what was said."""

    kind: str
    said: str = ""


def outcome_of(way: str, folder: Path, kind: Kind, workshop: Workshop, wanted: NDArray[np.floating]) -> Outcome:
    """Take a damaged checkpoint by a way in, and compare what comes out with what comes of the whole one."""
    run, _ = WAYS_IN[way]
    start = time.perf_counter()
    try:
        with time_limit(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = run(folder, kind, workshop)
    except TimeUp:
        return Outcome(HANG)
    except Refused as error:
        outcome = Outcome(CLEAR, str(error))
    except Exception as error:
        is_clear = isinstance(error, (ValueError, OSError)) and "\n" not in str(error).strip()
        other = EXCEPTION if is_ours(error) else BEFORE
        outcome = Outcome(CLEAR if is_clear else other, f"{type(error).__name__}: {error}")
    else:
        outcome = compared(found, wanted)
    return Outcome(HANG, outcome.said) if time.perf_counter() - start > LIMIT else outcome


def is_ours(error: Exception) -> bool:
    """Whether code of this package was on the way to an error, or has made one of it."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, Broken) or any(str(PACKAGE) in file for file in files)


def compared(found: NDArray, wanted: NDArray[np.floating]) -> Outcome:
    if found.dtype == object:
        return Outcome(WRONG, found[0])
    if not np.isfinite(found).all():
        return Outcome(NAN)
    is_same = found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    return Outcome(UNCHANGED if is_same else WRONG)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in the block after so long."""

    def stop(*_: object) -> None:
        raise TimeUp

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit() -> Iterator[None]:
    """Let the process have no more than `MEMORY` beyond what it has: what asks for more gets an error at once."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def clean(workshop: Workshop) -> None:
    """Remove what the ways in have written."""
    for path in workshop.root.iterdir():
        if re.match(r"\.?output-", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
