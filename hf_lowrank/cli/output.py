"""What a command says: results on standard output or in a file; errors, warnings and progress on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from .. import files
from ..files import as_json
from .options import STANDARD_OUTPUT, check_file

__all__ = ["messages", "plain_messages", "warn", "write_json"]

messages = Console(stderr=True)


@contextmanager
def plain_messages(json_file: Path | None) -> Iterator[Console]:
    """Errors and warnings as one line for people, and no chatter of the libraries below.

    Yields the console for tables and sentences, which is silent where `--json -` has standard output for itself. That a file of
    `--json` can be written is checked first.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            if json_file is not None and json_file != STANDARD_OUTPUT:
                check_file("--json", json_file, ".json", otherwise=", or - for standard output")
            yield Console(quiet=json_file == STANDARD_OUTPUT)
        except (ValueError, OSError, ImportError) as error:
            messages.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error
        finally:
            for warning in caught:
                if issubclass(warning.category, UserWarning):
                    warn(str(warning.message))


def warn(text: str) -> None:
    """Print a warning for people, on the standard error stream."""
    messages.print(f"[bold yellow]warning:[/] {text}", soft_wrap=True, highlight=False)


def write_json(json_file: Path | None, content: Any) -> None:
    """Write what `--json` asks for, if it does; a file appears whole or not at all."""
    if json_file is None:
        return
    if json_file == STANDARD_OUTPUT:
        sys.stdout.write(as_json(content))
    else:
        files.write_json(json_file, content)
