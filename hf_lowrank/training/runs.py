"""A training run that may be cut off: its folder, and its last checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import check_output, tidy
from ..interrupts import explained
from ..unfinished import UnfinishedRun

__all__ = [
    "HELD_OUT_SEED",
    "Hopeless",
    "checkpoint_file",
    "earlier_run",
    "end",
    "is_main_process",
    "last_checkpoint",
    "working_folder",
]

HELD_OUT_SEED = 1_000_003  # of synthetic series; never a training seed


class Hopeless(ValueError):
    """The run must not be gone on with: its checkpoints are removed."""


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher has started.

    It is asked before there is a process group, when accelerate's own state calls every process the first.
    """
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def working_folder(output: str | os.PathLike, kind: str, settings: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """The folder `<output>.<kind>` of a run's checkpoints: new, or that of the same run, unfinished.

    It stays where the block fails after a checkpoint, and is removed otherwise. Of several processes the main one makes and
    removes it.

    Raises:
        FileExistsError: The folder is something else.
        ValueError: The unfinished run has other settings.
    """
    run = _run(output, kind)
    state = PartialState()
    with run.alone() if state.is_main_process else nullcontext():
        yield from _opened(run, settings, state, resume=resume)


def _opened(run: UnfinishedRun, settings: dict[str, Any], state: PartialState, *, resume: bool) -> Iterator[Path]:
    with state.main_process_first():
        if run.recorded(settings, resume=resume or not state.is_main_process) is None:
            run.begin(settings)
    is_over = False
    try:
        with explained(lambda: _how_to_go_on(run.folder)):
            yield run.folder
        is_over = True
        state.wait_for_everyone()
    except Hopeless:
        is_over = True
        raise
    finally:
        if state.is_main_process and (is_over or last_checkpoint(run.folder) is None):
            run.remove()


def _how_to_go_on(folder: Path) -> str | None:
    checkpoint = last_checkpoint(folder)
    return checkpoint and f"run the same command again to go on from step {_step(checkpoint)}."


def _run(output: str | os.PathLike, kind: str) -> UnfinishedRun:
    return UnfinishedRun.beside(output, kind, f"{kind}.json")


def earlier_run(output: str | os.PathLike, kind: str) -> UnfinishedRun:
    """The run of an output that may be unfinished; what a killed one has left half done is put right first."""
    run = _run(output, kind)
    if is_main_process():
        tidy(output)
        tidy(run.folder)
    return run


def end(output: str | os.PathLike, kind: str, *, overwrite: bool) -> None:
    """Say that what is done next is to move the output to its place, where nothing must be in the way.

    Raises:
        FileExistsError: Something is, and `overwrite` is false.
    """
    check_output(output, overwrite=overwrite)
    _run(output, kind).end()


def last_checkpoint(folder: Path) -> str | None:
    """The path of the last whole checkpoint of a Trainer in its folder; None where there is none."""
    whole = [str(file.parent) for file in folder.glob("checkpoint-*/trainer_state.json") if _is_whole(file)]
    return max(whole, key=_step) if whole else None


def checkpoint_file(args: Any, state: Any, name: str) -> Path:
    """The file of a callback's own in the checkpoint that a Trainer of these arguments writes, or has read, at its step."""
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", name)


def _is_whole(last_file: Path) -> bool:
    """Whether a checkpoint is: Trainer writes this file last, and all at once but for a run that is killed just then."""
    try:
        json.loads(last_file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _step(checkpoint: str) -> int:
    return int(checkpoint.split("-")[-1])
