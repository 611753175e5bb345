"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_output", "new_folder", "write_text"]


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
