"""Progress of long work on the standard error stream: where it is wanted, or, if nothing is said, where somebody watches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, track

__all__ = ["progress", "progress_display"]


def _console_and_use(show: bool | None) -> dict[str, Any]:
    console = Console(stderr=True)
    return {"console": console, "disable": not (console.is_terminal or console.is_jupyter if show is None else show)}


def progress(items: Iterable[Any], description: str, show: bool | None) -> Iterable[Any]:
    """The items, with a progress bar on standard error; without `show` in a terminal or a notebook alone."""
    return track(list(items), description=description, **_console_and_use(show))


def progress_display(*more: ProgressColumn, show: bool | None) -> Progress:
    """A display for steps of several kinds, with description, bar, count and time, that goes away when it is done.

    Without `show` it is there in a terminal or a notebook alone. `more` are further columns; a text of them may name fields that
    every step has.
    """
    # A description may hold the name of a file or of a model, which is no markup.
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *more, transient=True, **_console_and_use(show))
