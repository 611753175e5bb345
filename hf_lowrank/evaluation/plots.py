"""Scores as a picture, in the style of `plots.py`."""

from __future__ import annotations

from pathlib import Path

from ..files import new_file
from ..plots import Dots, plot_dots
from .aggregate import Comparison
from .naive import SEASONAL_NAIVE
from .result import EvaluationResult

__all__ = ["plot_scores"]


def plot_scores(
    result: EvaluationResult, output: str | Path, metric: str = "WQL", *, num_bootstrap: int = 2000
) -> None:
    """Draw the scores by task relative to Seasonal Naive's, with intervals over the series, and their means.

    The picture appears whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no such metric.
    """
    relative = result.relative_scores(metric)
    comparison = Comparison(result.results, num_bootstrap=num_bootstrap, seed=0)
    dots = []
    for model, of_model in result.aggregate.items():
        if model != SEASONAL_NAIVE:
            by_task = [comparison.relative(model, SEASONAL_NAIVE, metric, [task]) for task in comparison.tasks]
            lows, highs = ([interval[end] for interval in by_task] for end in ("low", "high"))
            mean = of_model["relative_to_seasonal_naive"][metric]
            dots.append(
                Dots(model, relative[model].to_list(), lows, highs, mean["geometric_mean"], mean["low"], mean["high"])
            )
    with new_file(output) as part:
        plot_dots(list(relative.index), dots, part, label=f"{metric} relative to Seasonal Naive (lower is better)")
