"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["as_json", "check_output", "new_folder", "without_nan", "write_json", "write_text"]


@contextmanager
def new_folder(output: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` when the block ends without an error.

    Raises:
        FileExistsError: `output` is a file, or a folder that is not empty, and `overwrite` is false.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are private
        if output.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
            os.replace(output, replaced / "old")
            os.replace(temporary, output)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise FileExistsError where `new_folder` would; for a check before long work."""
    output = Path(output)
    if output.is_file():
        raise FileExistsError(f"output: {output} is a file; give a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"output: {output} is a folder that is not empty; give a new folder, or overwrite=True (--overwrite)."
        )


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file that appears whole or not at all; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        part = Path(folder) / path.name
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def as_json(content: Any) -> str:
    """The content as JSON for people and programs; what is no number is null, which JSON has, and not NaN, which it has not."""
    return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `as_json` to a file that appears whole or not at all; its folder is made where it is missing."""
    write_text(path, as_json(content))


def without_nan(value: Any) -> Any:
    """The same structure with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
