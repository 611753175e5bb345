"""The time of one action on any device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["seconds_of"]


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """The seconds that an action takes, until a GPU has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
