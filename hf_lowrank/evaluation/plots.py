"""Scores as a picture, in the style of `plots.py`."""

from __future__ import annotations

from pathlib import Path

from ..files import new_file
from ..plots import Dots, plot_dots
from .naive import SEASONAL_NAIVE
from .result import EvaluationResult

__all__ = ["plot_scores"]


def plot_scores(result: EvaluationResult, output: str | Path, metric: str = "WQL") -> None:
    """Draw the scores by task relative to Seasonal Naive's, and their means; the picture appears whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no such metric.
    """
    relative = result.relative_scores(metric)
    means = {model: of_model["relative_to_seasonal_naive"][metric] for model, of_model in result.aggregate.items()}
    dots = [
        Dots(model, relative[model].to_list(), *(mean[name] for name in ("geometric_mean", "low", "high")))
        for model, mean in means.items()
        if model != SEASONAL_NAIVE
    ]
    with new_file(output) as part:
        plot_dots(list(relative.index), dots, part, label=f"{metric} relative to Seasonal Naive (lower is better)")
