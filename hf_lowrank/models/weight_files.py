"""What is in the weight files of a checkpoint by their headers alone: names, shapes and dtypes, without reading a weight."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

# In the order in which transformers looks for them; an index names the files of a checkpoint that is in several.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file: its shape, and its dtype as the file writes it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers that models compute with; those of eight bits are none."""
        return self.dtype in FLOATS


def stored_tensors(source: str, *, use_safetensors: bool | None = None, **where: Any) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name.

    Args:
        source: A folder, or a Hub id, whose files are then in the cache.
        use_safetensors: False for the files of torch alone, as for transformers.
        where: Further arguments of `cached_file`, such as `revision`.

    Raises:
        FileNotFoundError: There are no weight files.
        OSError: One of them is missing, truncated, damaged, or no weight file at all.
    """
    tensors: dict[str, StoredTensor] = {}
    names = NAMES[2:] if use_safetensors is False else NAMES
    for file in _files(source, names, where):
        try:
            tensors |= dict(_tensors(file))
        # torch raises a RuntimeError and whatever unpickling does.
        except Exception as error:
            if _begins_with(file, LFS_POINTER):
                raise OSError(f"{file.name} is a Git LFS pointer, and not the file that it points to") from error
            raise OSError(f"{file.name}: {_first_line(error)}") from error
    return tensors


def _first_line(error: Exception) -> str:
    # torch explains at length how to load what is not to be trusted.
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _begins_with(path: Path, start: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _files(source: str, names: tuple[str, ...], where: dict[str, Any]) -> list[Path]:
    reason: OSError | None = None
    for name in names:
        try:
            path = Path(cached_file(source, name, **where) or "")
        except OSError as error:  # there is none of that name, or no way to look
            reason = reason or error
            continue
        if path.suffix != ".json":
            return [path]
        return [Path(cached_file(source, part, **where) or "") for part in _parts(path)]
    raise FileNotFoundError(f"there is none of {', '.join(names)}: {reason}") from reason


def _parts(index: Path) -> list[str]:
    """The files that an index names, which are beside it."""
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        suffix = ".safetensors" if index.name.startswith("model.safetensors") else ".bin"
        if strange := [part for part in parts if not part.endswith(suffix) or Path(part).name != part]:
            raise ValueError(f"{strange[0]!r} is no {suffix} file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{index.name} is no index of weight files ({error})") from error
    if not parts:
        raise OSError(f"{index.name} is no index of weight files (it names none)")
    return parts


def _tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield name, StoredTensor(tuple(part.get_shape()), part.get_dtype())
        return
    # What torch wrote before 1.6 is no zip archive, and cannot be mapped.
    content = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"a {type(content).__name__} in the place of weights by name")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise pickle.UnpicklingError(f"{name} is a {type(tensor).__name__} and no tensor")
        yield name, StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
