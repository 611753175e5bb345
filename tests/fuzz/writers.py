"""The commands that write, each as a user calls it, on tiny models; and processes that run them, to be killed or set on each other."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained, export_stock_t5, recover, save_compressed
from hf_lowrank.cli.app import app

# What changes the file system, as Python audits it.
OPERATIONS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "tempfile.mkdtemp"}
# What a run is told whose output is complete already; and one that another run is in the way of.
COMPLETE = ("exists; give another", "is a folder that is not empty")
BUSY = (*COMPLETE, "another run is writing to")

Work = Callable[[Path], None]


class Refused(Exception):
    """A command ended with an error, in one line."""


@dataclass(frozen=True)
class Writer:
    """Something that writes into a folder.

    Attributes:
        work: Writes.
        prepare: Makes the folder before it.
        other: Does the same with other arguments.
    """

    work: Work
    prepare: Work = field(default=lambda folder: folder.mkdir(parents=True))
    other: Work | None = None


def command(*arguments: object) -> Work:
    """A command of `hf-lowrank`, in the folder."""

    def work(folder: Path) -> None:
        earlier = os.getcwd()
        os.chdir(folder)  # summaries name the output
        try:
            result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        finally:
            os.chdir(earlier)
        if result.exit_code:
            lines = result.stderr.strip().splitlines()
            if len(lines) != 1 or result.exit_code != 1:
                raise AssertionError(result.output) from result.exception
            raise Refused(lines[0])

    return work


def table(path: Path) -> Path:
    stamps = pd.date_range("2024-01-01", periods=30, freq="D")
    parts = [
        pd.DataFrame({"item_id": f"s{i}", "timestamp": stamps, "target": np.sin(np.arange(30) + i)}) for i in range(6)
    ]
    pd.concat(parts).to_csv(path, index=False)
    return path


def writers(place: Path, dense: PreTrainedModel) -> dict[str, Writer]:
    """All of them by name, with what they read in this folder; `dense` is a tiny Chronos-T5."""
    model, data, settings = place / "dense", table(place / "data.csv"), place / "settings.json"
    dense.save_pretrained(model)
    old, student = (compress_pretrained(dense, uniform=rank, calibration=None) for rank in (2, 4))
    sizes = {"steps": 4, "save_steps": 2, "batch_tokens": 200, "evaluation_batches": 1, "workers": 0, "bf16": False}
    # Trainer's mean since the last log begins anew with a run that goes on.
    settings.write_text(json.dumps({"start": str(model), **sizes, "trainer": {"logging_steps": 1}}))
    compress = ("compress", model, "model", "--calibration", "none", "--uniform")
    replace = (*compress, 3, "--overwrite", "--json", "summary.json")
    train = ("pretrain", "model", "--config", settings)

    def forecast(suffix: str) -> Writer:
        arguments = ("forecast", model, data, f"out.{suffix}", "--horizon", 4, "--chunk-rows", 60)
        return Writer(command(*arguments, "--num-samples", 2), other=command(*arguments, "--num-samples", 3))

    def recovering(steps: int) -> Work:
        def work(folder: Path) -> None:
            try:
                recover(student, dense, folder / "model", steps=steps, batch_tokens=200, evaluation_batches=1)
            except OSError as error:
                raise Refused(str(error)) from None

        return work

    def exporting(folder: Path) -> None:
        export_stock_t5(old, folder / "model", overwrite=True)

    return {
        "forecast csv": forecast("csv"),
        "forecast parquet": forecast("parquet"),
        "compress": Writer(command(*compress, 3), other=command(*compress, 4)),
        "compress --overwrite --json": Writer(
            command(*replace), prepare=lambda folder: save_compressed(old, folder / "model")
        ),
        "compress --save-calibration": Writer(
            command(*compress[:3], "--calibration", data, "--uniform", 3, "--save-calibration", "c.safetensors")
        ),
        "recover": Writer(recovering(4), other=recovering(6)),
        "pretrain": Writer(command(*train), other=command(*train, "--steps", 6)),
        "export over a model": Writer(exporting, prepare=lambda folder: save_compressed(old, folder / "model")),
        "analyze --plots --json": Writer(
            command("analyze", model, "--data", "none", "--plots", "plots", "--json", "a.json"),
        ),
    }


def content(folder: Path) -> dict[str, str]:
    """The files of a folder, hidden ones too, by their digests, and its empty folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def is_write(event: str, arguments: tuple) -> bool:
    """Whether an audited event changes the file system."""
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return event in OPERATIONS


def fork(work: Callable[[], None], *, die_at: int | None = None, report: Path | None = None) -> int:
    """Start the work in a process, which ends with status 0, or 1 where it is refused.

    Args:
        work: What to do.
        die_at: It is killed before its file operation of this number.
        report: Gets the error, or the number of its file operations.
    """
    process = os.fork()
    if process:
        return process
    status, operations = 1, 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal operations
        if is_write(event, arguments):
            if operations == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            operations += 1

    try:
        torch.set_num_threads(1)
        sys.addaudithook(hook)
        work()
        status, said = 0, str(operations)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    try:
        if report is not None:
            report.write_text(said)
    finally:
        os._exit(status)


def tries_of_kills(writer: Writer, place: Path, count: int, seed: int) -> list[str]:
    """Kill the work so many times, and start it again: what did not end as if nothing had been.

    Every other kill is before a file operation, the others are at any time.
    """
    drawn = random.Random(seed)
    temporary = place / "temporary"
    temporary.mkdir()
    earlier, tempfile.tempdir = tempfile.tempdir, str(temporary)
    try:
        seconds, operations, wanted = undisturbed(writer, place)
        wrong = []
        for number in range(count):
            folder = place / f"killed-{number}"
            writer.prepare(folder)
            before = content(folder)
            if number % 2 == 0:
                operation = drawn.randrange(operations)
                name = f"killed before operation {operation} of {operations}"
                process = fork(lambda: writer.work(folder), die_at=operation)  # noqa: B023
            else:
                after = drawn.uniform(0, seconds)
                name = f"killed after {after:.3f} s of {seconds:.3f}"
                process = fork(lambda: writer.work(folder))  # noqa: B023
                time.sleep(after)
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            wrong += [f"{name}: {what}" for what in not_right(writer, folder, before, wanted)]
            if left := [path.name for path in temporary.iterdir()]:
                wrong.append(f"{name}: {left} is left among the temporary files")
        return wrong
    finally:
        tempfile.tempdir = earlier


def undisturbed(writer: Writer, place: Path) -> tuple[float, int, dict[str, str]]:
    """The seconds and file operations that the work takes, and what it writes. It imports what the work needs."""
    first, second = place / "first", place / "second"
    for folder in (first, second):
        writer.prepare(folder)
    writer.work(first)
    start = time.monotonic()
    os.waitpid(fork(lambda: writer.work(second), report=place / "operations"), 0)
    seconds = time.monotonic() - start
    assert content(first) == content(second)
    return seconds, int((place / "operations").read_text()), content(first)


def not_right(writer: Writer, folder: Path, before: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What is wrong after a kill: with what was there before it, and with the same command again."""
    wrong, report = [], folder.with_name("report")
    model = "model/config.json"
    is_there = (folder / model).exists() or any(folder.glob(".model-unfinished-*/replaced/config.json"))
    if model in before and not is_there:
        wrong.append("the old model is lost")
    status = os.waitpid(fork(lambda: writer.work(folder), report=report), 0)[1]
    said = report.read_text()
    if status and not any(text in said for text in COMPLETE):
        wrong.append(f"the same command again says {said!r}")
    if (found := content(folder)) != wanted:
        wrong.append(f"it differs in {sorted({path for path, _ in found.items() ^ wanted.items()})}")
    return wrong
