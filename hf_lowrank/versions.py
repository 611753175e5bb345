"""Which versions ran: the same record in models, forecasts, scores and timings."""

from __future__ import annotations

import platform
from importlib.metadata import version

__all__ = ["versions"]

PACKAGES = ("hf-lowrank", "torch", "transformers", "chronos-forecasting")


def versions(*more: str) -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on, and of those in `more`, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in (*PACKAGES, *more)}
