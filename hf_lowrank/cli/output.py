"""What a command says: results on standard output or in a file; errors, warnings and progress on standard error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .. import files
from ..files import as_json
from ..interrupts import interruption_of
from .options import STANDARD_OUTPUT, check_file

if TYPE_CHECKING:
    from .. import text_tables

__all__ = [
    "DEBUG",
    "explanation",
    "fits",
    "in_terminal",
    "interruptions",
    "messages",
    "plain_messages",
    "warn",
    "write_json",
]

# Names of series, files and models are shown as they are written: no "[red]" in them is markup, no ":smile:" a picture.
PLAIN: dict[str, Any] = {"markup": False, "emoji": False}
messages = Console(stderr=True, **PLAIN)
WIDE = 1000  # columns, more than any table has
DEBUG = "HF_LOWRANK_DEBUG"  # the environment variable that `--debug` sets


@contextmanager
def interruptions() -> Iterator[None]:
    """Ctrl-C and SIGTERM as one line for people, from the first process of a launch, and exit status 130 or 143."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except BaseException as error:
        interruption = interruption_of(error)
        if interruption is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            _say("interrupted:", "bold red", interruption.how)
        raise typer.Exit(128 + interruption.number) from error


@contextmanager
def plain_messages(json_file: Path | None) -> Iterator[Console]:
    """Errors and warnings as one line for people, and no chatter of the libraries below.

    Yields the console for tables and sentences, which is silent where `--json -` has standard output for itself. That a file of
    `--json` can be written is checked first. Whatever goes wrong ends in exit status 1; with `--debug` the traceback is shown.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            if json_file is not None and json_file != STANDARD_OUTPUT:
                check_file("--json", json_file, ".json", otherwise=", or - for standard output")
            yield _console(json_file == STANDARD_OUTPUT)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # what a damaged file makes a library raise has no end
            if os.environ.get(DEBUG) or interruption_of(error) is not None:
                raise
            _say("error:", "bold red", explanation(error))
            raise typer.Exit(1) from error
        finally:
            texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
            for text in dict.fromkeys(texts):  # each once
                warn(text)


def _console(is_quiet: bool) -> Console:
    """That of the standard output; what goes into a file or a pipe has all the room that it needs, for names are copied from it."""
    console = Console(quiet=is_quiet, **PLAIN)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def warn(text: str) -> None:
    """Print a warning for people, on the standard error stream."""
    _say("warning:", "bold yellow", text)


def _say(kind: str, style: str, text: str) -> None:
    messages.print(Text.assemble((kind, style), " ", text), soft_wrap=True, highlight=False)


def explanation(error: Exception) -> str:
    """An error as one line: the message alone where it is ours or the system's, and the kind of error before any other."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (`hf-lowrank --debug ...` shows where)"


def in_terminal(content: text_tables.Table) -> RenderableType:
    """A table of text as a terminal shows it, the best cells bold; the name at the start of a row is whole, so that it can be copied.

    The note below it may be wider than the table.
    """
    table = _table(content)
    return Group(table, Text(f" {content.note}\n")) if content.note else table


def fits(console: Console, content: text_tables.Table) -> bool:
    """Whether a table is shown whole, no cell broken into lines."""
    room = console.options.update_width(WIDE)  # otherwise what a table wants is never more than there is
    return console.measure(_table(replace(content, title="")), options=room).maximum <= console.width


def _table(content: text_tables.Table) -> Table:
    table = Table(
        title=content.title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, heading in enumerate(content.headings):
        side: Any = "left" if i < content.num_texts else "right"
        table.add_column(heading, justify=side, overflow="fold", no_wrap=i == 0)
    for i, row in enumerate(content.rows):
        table.add_row(*(Text(cell, style="bold" if (i, j) in content.best else "") for j, cell in enumerate(row)))
    return table


def write_json(json_file: Path | None, content: Any) -> None:
    """Write what `--json` asks for, if it does; a file appears whole or not at all."""
    if json_file is None:
        return
    if json_file == STANDARD_OUTPUT:
        sys.stdout.write(as_json(content))
    else:
        files.write_json(json_file, content)
