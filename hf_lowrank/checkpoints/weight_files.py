"""What is in the weight files of a checkpoint by their headers alone: names, shapes and dtypes, without reading a weight."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

__all__ = ["StoredTensor", "stored_tensors"]

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


def stored_tensors(source: str) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by name.

    Args:
        source: A folder, or a Hub id, whose files are then in the cache.

    Raises:
        OSError: There are no weight files, or one is missing, truncated, damaged, or no weight file at all.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _files(source):
        try:
            tensors |= dict(_tensors(file))
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            if _begins_with(file, LFS_POINTER):
                raise OSError(f"{file.name} is a Git LFS pointer, and not the file that it points to") from error
            raise OSError(f"{file.name}: {error}") from error
    return tensors


def _begins_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _files(source: str) -> list[Path]:
    reason: OSError | None = None
    for name in NAMES:
        try:
            path = Path(cached_file(source, name) or "")
        except OSError as error:  # there is none of that name, or no way to look
            reason = reason or error
            continue
        if path.suffix != ".json":
            return [path]
        try:
            parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{name} is no index of weight files ({error})") from error
        return [Path(cached_file(source, str(part)) or "") for part in parts]
    raise OSError(f"there is none of {', '.join(NAMES)}: {reason}") from reason


def _tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield name, StoredTensor(tuple(part.get_shape()), part.get_dtype())
        return
    # What torch wrote before 1.6 is no zip archive, and cannot be mapped.
    content = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    for name, tensor in content.items():
        yield name, StoredTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
