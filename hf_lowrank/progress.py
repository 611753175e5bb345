"""Progress of long work on the standard error stream or in a notebook: where it is wanted, or, if nothing is said, where somebody watches."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, track

__all__ = ["progress", "progress_display"]

NOTEBOOK_SECONDS = 0.2  # between two pictures that a notebook is sent


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


def progress(items: Iterable[Any], description: str, show: bool | None) -> Iterable[Any]:
    """The items, with a progress bar on standard error or in a notebook; without `show` in a terminal or a notebook alone."""
    console = Console(stderr=True)
    if console.is_jupyter:
        return _in_notebook(list(items), description, show)
    return track(list(items), description=description, console=console, disable=not _is_shown(console, show))


def _in_notebook(items: list[Any], description: str, show: bool | None) -> Iterable[Any]:
    with progress_display(show=show) as display:
        yield from display.track(items, description=description)


def progress_display(*more: ProgressColumn, show: bool | None) -> Progress:
    """A display for steps of several kinds, with description, bar, count and time, that goes away when it is done.

    Without `show` it is there in a terminal or a notebook alone. `more` are further columns; a text of them may name fields that
    every step has.
    """
    # A description may hold the name of a file or of a model, which is no markup.
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *more)
    console = Console(stderr=True)
    disable = not _is_shown(console, show)
    if console.is_jupyter:
        return NotebookProgress(*columns, disable=disable)
    return Progress(*columns, transient=True, console=console, disable=disable)


def _is_shown(console: Console, show: bool | None) -> bool:
    return console.is_terminal or console.is_jupyter if show is None else show
