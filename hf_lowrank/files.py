"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

try:
    import fcntl
except ImportError:  # on Windows, where nothing is tidied
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "alone",
    "as_json",
    "check_output",
    "check_place",
    "holds_model",
    "locked",
    "new_file",
    "new_folder",
    "remove_folder",
    "temporary_folder",
    "tidy",
    "without_folders",
    "without_nan",
    "write_json",
    "write_text",
]

# In a temporary folder: the one that is to be the output, and the one that the output was before, while the new one takes its place.
NEW, REPLACED = "new", "replaced"

PATIENCE = 2.0  # seconds; another run that only looks for what was left behind does not stop this one


def holds_model(folder: Path) -> bool:
    """Whether a folder is a checkpoint: it has a configuration and weights."""
    return (folder / "config.json").is_file() and any(
        True for kind in ("*.safetensors", "*.bin", "*.index.json") for _ in folder.glob(kind)
    )


@contextmanager
def new_folder(
    output: str | os.PathLike, *, overwrite: bool = False, is_replaceable: Callable[[Path], bool] = holds_model
) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` when the block ends without an error.

    What a run that was killed has left of its own temporary folders is removed, and an output that it was about to replace is put
    back first.

    Args:
        output: The folder to make.
        overwrite: Whether to replace one that is there.
        is_replaceable: Which folders may be replaced; by default those that hold a model.

    Raises:
        FileExistsError: `output` is a file, or a folder that is not empty and is not to be replaced.
        OSError: Another run is writing to `output`.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output, patience=PATIENCE):
        _tidy(output)
        check_output(output, overwrite=overwrite, is_replaceable=is_replaceable)
        with _workplace(output) as workplace:
            folder = workplace / NEW
            folder.mkdir()  # not mkdtemp's own, which nobody else may read whatever the umask says
            yield folder
            _share((path for path in folder.rglob("*") if path.is_file()), workplace)
            if output.exists():
                os.replace(output, workplace / REPLACED)
            try:
                os.replace(folder, output)
            except OSError:
                if (workplace / REPLACED).exists():
                    os.replace(workplace / REPLACED, output)
                raise


@contextmanager
def new_file(output: str | os.PathLike) -> Iterator[Path]:
    """A path beside `output` for a file that becomes `output` when the block ends without an error, in place of one that is there.

    Its folder is made where it is missing, and what a killed run has left of its own temporary files is removed.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    _tidy(output)
    with _workplace(output) as workplace:
        yield workplace / output.name
        _share([workplace / output.name], workplace)
        os.replace(workplace / output.name, output)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for as long as the block runs, among the system's temporary files, where killed runs leave nothing of theirs for long."""
    place = Path(tempfile.gettempdir()) / "hf_lowrank"
    _tidy(place)
    with _workplace(place) as folder:
        yield folder


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, removed at the end; until then nobody takes it for left behind."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        handle = _hold(folder, wait=True)
        if folder.exists():
            break
        if handle is not None:  # `_tidy` of another process has come between the two
            os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _share(files: Iterable[Path], workplace: Path) -> None:
    """Give new files the permissions that the umask says: safetensors makes its own for their owner alone."""
    probe = workplace / "probe"  # the umask itself can only be read by setting it, for all threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    for file in files:
        file.chmod(mode)


def _hold(folder: Path, *, wait: bool = False) -> int | None:
    """A handle that holds the folder for as long as this process lives; None where somebody holds it, or the system cannot tell.

    The system lets go of it whatever ends the process, on all machines that share the folder.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # another user's, or gone meanwhile
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _prefix(output: Path) -> str:
    return f".{output.name}-unfinished-"


def _tidy(output: Path) -> None:
    """Undo what a killed run has left half done; what a living one is at work in stays."""
    for folder in output.parent.iterdir():
        if folder.name.startswith(_prefix(output)) and (handle := _hold(folder)) is not None:
            if (folder / REPLACED).exists() and not output.exists():
                os.replace(folder / REPLACED, output)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def tidy(output: str | os.PathLike) -> None:
    """Remove what a killed run has left beside this output, and put back what it was about to replace.

    Raises:
        OSError: Another run is writing to `output`.
    """
    output = Path(os.path.abspath(output))
    if output.parent.is_dir():
        with locked(output, patience=PATIENCE):
            _tidy(output)


def remove_folder(folder: Path) -> None:
    """Remove a folder, where it is there: at one moment it is whole, at the next it is gone."""
    if folder.exists():
        with _workplace(folder) as doomed:
            os.replace(folder, doomed / "removed")


def _lock_folder() -> Path:
    """Where this user's locks are: in the cache, or where that may only be read among the temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    for folder in (Path(HF_HOME) / "hf_lowrank" / "locks", Path(tempfile.gettempdir()) / f"hf_lowrank-locks-{user}"):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise OSError("output: neither HF_HOME nor the folder of temporary files can be written to.")


@contextmanager
def alone(output: str | os.PathLike) -> Iterator[None]:
    """The block is all that works towards this output: no other run's result is thrown away at its end, or this one's.

    Inside it the output can be written by `new_folder`, `new_file` and the like.

    Raises:
        OSError: Another run of this user on this machine is in such a block.
    """
    output = Path(os.path.abspath(output))
    with locked(output.with_name(f"{output.name}.run"), output):
        yield


@contextmanager
def locked(
    output: str | os.PathLike, shown: str | os.PathLike | None = None, *, patience: float = 0.0
) -> Iterator[None]:
    """No other run of this user on this machine is in such a block for the same output at the same time.

    Args:
        output: What is written to.
        shown: What the message calls it, if not by its path.
        patience: Seconds to wait for another one.

    Raises:
        OSError: One is.
    """
    path = Path(os.path.realpath(Path(output).parent)) / Path(output).name
    name = hashlib.blake2b(os.path.normcase(path).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    lock = FileLock(_lock_folder() / f"{name}.lock", timeout=patience)
    try:
        lock.acquire()
    except Timeout:
        raise OSError(
            f"output: another run is writing to {shown or output}; wait for it, or give another output."
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_output(
    output: str | os.PathLike, *, overwrite: bool = False, is_replaceable: Callable[[Path], bool] = holds_model
) -> None:
    """Raise OSError where `new_folder` would; for a check before long work."""
    output = Path(output)
    check_place(output, "output")
    if output.is_file():
        raise FileExistsError(f"output: {output} is a file; give a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"output: {output} is a folder that is not empty; give a new folder, or overwrite=True (--overwrite)."
        )
    if not is_replaceable(output):
        raise FileExistsError(
            f"output: {output} is a folder of other things than a model, and is never replaced; give another folder."
        )


def check_place(path: str | os.PathLike, what: str) -> None:
    """Raise OSError, which calls it `what`, where nothing can be written under this name; for a check before long work."""
    above = next(folder for folder in Path(os.path.abspath(path)).parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{what}: {path} cannot be written, for {above} is a file and no folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{what}: {path} cannot be written; you may not write to the folder {above}.")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file that appears whole or not at all; its folder is made where it is missing."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def as_json(content: Any) -> str:
    """The content as JSON for people and programs; what is no number is null, which JSON has, and not NaN, which it has not."""
    return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `as_json` to a file that appears whole or not at all; its folder is made where it is missing."""
    write_text(path, as_json(content))


def without_folders(value: Any) -> Any:
    """The same structure with the last part alone of what is a path of this machine: absolute, or of something that is there."""
    if isinstance(value, Mapping):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(entry) for entry in value]
    if isinstance(value, os.PathLike) or (isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))):
        return Path(value).name
    return value


def without_nan(value: Any) -> Any:
    """The same structure with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
