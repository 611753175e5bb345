"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

__all__ = ["STANDARD_OUTPUT", "check_file", "integers", "json_option", "numbers"]

STANDARD_OUTPUT = Path("-")


def json_option(content: str) -> Any:
    """`--json FILE`, the same in every command; `content` is what it writes."""
    return typer.Option("--json", metavar="FILE", help=f"Write {content} as JSON to this file; - is standard output.")


def check_file(option: str, path: Path, suffix: str, *, otherwise: str = "") -> None:
    """Raise ValueError where a file of this suffix cannot be written; for a check before long work.

    Args:
        option: What the message calls the file, such as `--csv`.
        otherwise: What else the option may be, for the message.
    """
    if path.suffix != suffix or path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{option} must be a {suffix} file in a folder that exists{otherwise}, found {str(path)!r}.")


def numbers(option: str, text: str, example: str) -> list[float]:
    """The numbers of an option that takes "0.5,0.25"; ValueError, with an example of what is right, where it has others."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers such as {example}, found {text!r}.") from None


def integers(name: str, values: Iterable[str]) -> list[int]:
    """The numbers of a command-line option that takes "1,8" and may be repeated."""
    items = [item for value in values for item in value.split(",")]
    try:
        return [int(item) for item in items]
    except ValueError:
        raise ValueError(f"{name} must be integers separated by commas, found {','.join(items)!r}.") from None
