"""Devices and dtypes by their names, checked before anything is loaded to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

__all__ = ["has_fast_bfloat16", "known_device", "known_dtype", "quick_products"]

LARGE = 3e7  # weights from which on the time of a product counts more than its last digits
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def known_device(device: str | None) -> str:
    """The device, or by default the GPU if there is one.

    Raises:
        ValueError: It is none, or this machine has none.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda', found {device!r}: {error}") from None
    if kind == "meta":
        raise ValueError(f"device must be one that computes, such as 'cpu' or 'cuda', found {device!r}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that this machine has, found {device!r}: {reason}") from None
    return device


def known_dtype(dtype: torch.dtype | str, *, has_auto: bool = True) -> torch.dtype | str:
    """The dtype that a name stands for, or one of `torch`'s itself.

    Args:
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`.
        has_auto: Whether it may be `"auto"`, that of the file, which stays a word.

    Raises:
        ValueError: It is another.
    """
    if dtype in DTYPES.values() or (has_auto and dtype == "auto"):
        return dtype
    if dtype not in DTYPES:
        names = [*(["auto"] if has_auto else []), *DTYPES]
        raise ValueError(f"dtype must be one of {', '.join(names)}, found {str(dtype)!r}.")
    return DTYPES[str(dtype)]


def has_fast_bfloat16() -> bool:
    """Whether products are faster in bfloat16 here; a CPU that emulates them is several times slower than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16", False))


@contextmanager
def quick_products(model: PreTrainedModel) -> Iterator[None]:
    """Products of float32 matrices with bfloat16 factors and float32 sums while the block runs, of a large model on a CPU that has them.

    Rounding a factor changes it by up to 0.4 %, without a bias: sums over thousands of tokens, as of a calibration, hardly notice.
    """
    before = torch.get_float32_matmul_precision()
    is_quick = model.device.type == "cpu" and model.num_parameters() >= LARGE and has_fast_bfloat16()
    try:
        if is_quick:
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
