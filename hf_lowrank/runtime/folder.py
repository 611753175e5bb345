"""The folder of an exported model: what it holds, and whether all of it is there. Needs no package but Python's own."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["FORMATS", "RECORD", "ExportRecord", "is_export", "read_export"]

RECORD = "hf_lowrank_export.json"
VERSION = 1  # of what the record says; a newer one is not guessed at
FORMATS = ("onnx", "openvino", "torch", "inductor")
GRAPHS = {"bolt": ("forecast",), "chronos2": ("alone", "grouped")}


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What an exported folder says of itself.

    Attributes:
        family: `"bolt"` or `"chronos2"`.
        format: One of `FORMATS`.
        quantize: None, `"int8"` or `"bfloat16"`.
        graphs: The file of each graph: Bolt has `forecast`; Chronos-2 `alone`, of series that are groups of their own, and `grouped`.
        files: The size in bytes and the SHA-256 of every file that is read in a forecast.
        settings: The model's `chronos_config`: lengths, patches, quantile levels.
        parity: How far its forecasts were from PyTorch's when it was made.
        made: Of what, how, and with which versions.
    """

    family: str
    format: str
    quantize: str | None
    graphs: dict[str, str]
    files: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    parity: dict[str, float]
    made: dict[str, Any]
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """What tells this export from any other: the hashes of its files."""
        return "-".join(sorted(one["sha256"][:16] for one in self.files.values()))

    @property
    def quantiles(self) -> list[float]:
        """The levels that the model forecasts."""
        return list(self.settings["quantiles"])

    @property
    def patch_size(self) -> int:
        """Values of a patch of the context."""
        return int(self.settings["input_patch_size"])

    @property
    def output_patch_size(self) -> int:
        """Values that the horizon of one pass is a multiple of: of Bolt, the whole of it."""
        return int(self.settings.get("output_patch_size") or self.settings["prediction_length"])

    @property
    def context_length(self) -> int:
        """Values of the past that are read at most."""
        return int(self.settings["context_length"])

    @property
    def longest_horizon(self) -> int:
        """Values of the future that one pass forecasts at most."""
        return self.output_patch_size * int(self.settings.get("max_output_patches", 1))


def is_export(folder: str | os.PathLike) -> bool:
    """Whether this is the folder of an exported model."""
    return os.path.isfile(os.path.join(folder, RECORD))


def read_export(folder: str | os.PathLike) -> ExportRecord:
    """The record of an exported folder, all of whose files are there in their right sizes.

    Raises:
        OSError: There is no such folder, or it is none of an exported model.
        ValueError: Its record is damaged or newer, or one of its files is missing or cut off.
    """
    path = Path(folder, RECORD)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(
            f"{folder} must be a folder with a {RECORD}, as `hf-lowrank export` writes it ({error})."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON ({error}); export the model again.") from error
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"{path} is of version {version}, and this hf_lowrank reads {VERSION}: pip install -U hf-lowrank."
        )
    names = {one.name for one in fields(ExportRecord)}
    if version != VERSION or set(found) != names or found["family"] not in GRAPHS or found["format"] not in FORMATS:
        raise ValueError(
            f"{path} must hold the record of an export ({', '.join(sorted(names))}); export the model again."
        )
    record = ExportRecord(**found)
    missing = [name for name in GRAPHS[record.family] if record.graphs.get(name) not in record.files]
    if missing:
        raise ValueError(f"{path} names no file of the graph {missing[0]!r}; export the model again.")
    for name, expected in record.files.items():
        file = Path(folder, name)
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            was = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{file} must have {expected['bytes']} bytes, and {was}; copy or export the model again.")
    return record
