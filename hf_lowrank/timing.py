"""What is timed: a forecast of some size; and the time of one action on any device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Case", "seconds_of"]


@dataclass(frozen=True)
class Case:
    """What is forecast.

    Attributes:
        batch_size: How many series are forecast at once.
        context_length, prediction_length: Time steps of past and of future.
        num_samples: Sample paths a series; None for models of quantiles.
    """

    batch_size: int
    context_length: int
    prediction_length: int
    num_samples: int | None

    def __str__(self) -> str:
        text = f"batch {self.batch_size}, context {self.context_length}, horizon {self.prediction_length}"
        return text if self.num_samples is None else f"{text}, {self.num_samples} samples"


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """The seconds that an action takes, until a GPU has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
