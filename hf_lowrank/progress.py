"""Progress of long work on the standard error stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, track

__all__ = ["progress", "progress_display"]


def progress(items: Iterable[Any], description: str, show: bool) -> Iterable[Any]:
    """The items, with a progress bar on standard error where it is wanted."""
    return track(list(items), description=description, disable=not show, console=Console(stderr=True))


def progress_display(*more: ProgressColumn, show: bool) -> Progress:
    """A display for steps of several kinds, with description, bar, count and time, that goes away when it is done.

    `more` are further columns; a text of them may name fields that every step has.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *more, transient=True, disable=not show, console=Console(stderr=True))
