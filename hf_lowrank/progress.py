"""Progress of long work on the standard error stream or in a notebook: where it is wanted, or, if nothing is said, where somebody watches."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

__all__ = ["progress", "progress_display"]

NOTEBOOK_SECONDS = 0.2  # between two pictures that a notebook is sent
LOG_SECONDS = 30.0  # between two lines of a log


class NotebookProgress(Progress):
    """A display that a notebook updates in place and that goes away when it is done; rich's own needs ipywidgets there."""

    def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
        self._shown: Any = None
        self._next = 0.0
        console = Console(file=io.StringIO(), force_jupyter=False, force_terminal=False, width=100)
        super().__init__(*columns, console=console, transient=True, auto_refresh=False, **options)

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self.refresh()

    def advance(self, *args: Any, **kwargs: Any) -> None:
        super().advance(*args, **kwargs)
        self.refresh()

    def refresh(self) -> None:
        now = time.monotonic()
        if self.disable or not self.live.is_started or now < self._next:
            return
        self._next = now + NOTEBOOK_SECONDS
        with self.console.capture() as capture:
            self.console.print(self.get_renderable())
        self._show(capture.get())

    def stop(self) -> None:
        super().stop()
        if self._shown is not None:
            self._show("")

    def _show(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>" if text else ""}
        if self._shown is None:
            self._shown = display(content, raw=True, display_id=True)
        else:
            self._shown.update(content, raw=True)


class LogProgress(Progress):
    """A line now and then, where no terminal could draw a bar: what is done, of how much, and about how long the rest takes."""

    def start(self) -> None:
        self._next = time.monotonic() + LOG_SECONDS

    def stop(self) -> None:
        """Nothing is left to take away."""

    def update(self, task_id: TaskID, **kwargs: Any) -> None:  # type: ignore[override]
        super().update(task_id, **kwargs)
        self._log(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if self.disable or now < self._next:
            return
        self._next = now + LOG_SECONDS
        task = next(task for task in self.tasks if task.id == task_id)
        of = "" if task.total is None else f" of {task.total:g}"
        left = "" if task.time_remaining is None else f", about {timedelta(seconds=int(task.time_remaining))} left"
        since = timedelta(seconds=int(task.elapsed or 0))
        line = f"{task.description or 'Working'}: {task.completed:g}{of} after {since}{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress(items: Iterable[Any], description: str, show: bool | None) -> Iterable[Any]:
    """The items, with a progress bar on standard error or in a notebook; without `show` in a terminal or a notebook alone.

    Where standard error is a file or a pipe, long work says there how far it is every half a minute.
    """
    console = Console(stderr=True)
    if console.is_terminal and not console.is_jupyter:
        return track(list(items), description=description, console=console, disable=not _is_shown(console, show))
    return _tracked(list(items), description, show)


def _tracked(items: list[Any], description: str, show: bool | None) -> Iterable[Any]:
    with progress_display(show=show) as display:
        yield from display.track(items, description=description)


def progress_display(*more: ProgressColumn, show: bool | None) -> Progress:
    """A display for steps of several kinds, with description, bar, count, time and what is left of it, that goes away when it is done.

    Without `show` it is there in a terminal or a notebook alone. `more` are further columns; a text of them may name fields that
    every step has.
    """
    # A description may hold the name of a file or of a model, which is no markup.
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), *more)
    console = Console(stderr=True)
    disable = not _is_shown(console, show)
    if console.is_jupyter:
        return NotebookProgress(*columns, disable=disable)
    if not console.is_terminal:
        return LogProgress(*columns, console=console, disable=disable, auto_refresh=False)
    return Progress(*columns, transient=True, console=console, disable=disable)


def _is_shown(console: Console, show: bool | None) -> bool:
    return console.is_terminal or console.is_jupyter if show is None else show
