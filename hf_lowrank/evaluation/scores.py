"""The arithmetic of scores: fev's metrics of forecasts, and scores relative to a baseline's over many tasks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.pipelines import QUANTILE_LEVELS

__all__ = ["METRICS", "log_ratios", "relative_score", "score_forecasts"]

METRICS = ("WQL", "MASE", "SQL", "RMSSE")
OF_THE_MEAN = ("RMSSE",)  # the others score the quantiles or their median


def score_forecasts(
    *,
    targets: NDArray[np.floating],
    contexts: Sequence[NDArray[np.floating]],
    quantiles: NDArray[np.floating],
    mean: NDArray[np.floating] | None = None,
    seasonality: int,
    names: Sequence[object] | None = None,
) -> dict[str, float]:
    """fev's `METRICS` of the forecasts of N series, H steps ahead, at the Q `QUANTILE_LEVELS`.

    Args:
        targets: What came, (N, H); NaN does not count.
        contexts: What came before, N series of any length: the scales of MASE, SQL and RMSSE.
        quantiles: (N, H, Q).
        mean: (N, H), which RMSSE is of; without it that is left out.
        seasonality: Steps in a season, for the scales.
        names: What errors call the series; by default their positions.

    Returns:
        A number for each metric; NaN where it is undefined.

    Raises:
        ValueError: A forecast is NaN or infinite.
    """
    from fev.metrics import get_metric

    points = {metric: quantiles[:, :, QUANTILE_LEVELS.index(0.5)] for metric in METRICS if metric not in OF_THE_MEAN}
    if mean is not None:
        points |= dict.fromkeys(OF_THE_MEAN, mean)
    for forecasts in (quantiles, *points.values()):
        if not np.isfinite(forecasts).all():
            item = np.argwhere(~np.isfinite(forecasts))[0, 0]
            largest = np.nanmax(np.abs(contexts[item]), initial=0.0)
            raise ValueError(
                f"the forecast of series {str(item if names is None else names[item])!r} is not finite: the model cannot bear its values, "
                f"which are up to {largest:.3g}."
            )
    arrays = {  # in fev's axes: series, steps, target dimensions (one), levels
        "y_true": targets[:, :, None],
        "y_past": np.concatenate(contexts)[:, None],
        "y_past_lengths": np.array([len(context) for context in contexts]),
        "q_pred": quantiles[:, :, None, :],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where nothing is defined numpy warns, and the score says so
        return {
            metric: get_metric(metric).compute(
                **arrays,
                y_pred=point[:, :, None],
                seasonality=seasonality,
                quantile_levels=QUANTILE_LEVELS,
            )
            for metric, point in points.items()
        }


def log_ratios(scores: Sequence[float], baseline_scores: Sequence[float]) -> NDArray[np.floating]:
    """log(score / baseline's score) of the tasks on which both are defined and positive, in their order."""
    pairs = np.array([scores, baseline_scores])
    pairs = pairs[:, (np.isfinite(pairs) & (pairs > 0)).all(axis=0)]
    return np.log(pairs[0] / pairs[1])


def relative_score(
    scores: Sequence[float], baseline_scores: Sequence[float], *, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """exp(mean(log(score / baseline's score))) over tasks, with its 95 % bootstrap interval over the tasks.

    Returns:
        `{"geometric_mean", "low", "high", "num_tasks"}`: tasks on which either score is zero or undefined do not count. Where one is
        left it has no interval, and `low` and `high` are NaN; where none is left all three numbers are.
    """
    # The resampling is fev's. Its `leaderboard` is not used for the rest: it clips ratios to [0.01, 100], so that a baseline's score
    # of zero counts as a ratio of 100, and drops a task for all models where one has no score, or takes it for a ratio of 1.
    # Means and quantiles are those of the logarithms: quantiles of the ratios would lie elsewhere between two resamples.
    from fev.analysis import bootstrap

    logs = log_ratios(scores, baseline_scores)
    if len(logs) == 0:
        return {"geometric_mean": math.nan, "low": math.nan, "high": math.nan, "num_tasks": 0}
    if len(logs) == 1:
        return {"geometric_mean": math.exp(logs[0]), "low": math.nan, "high": math.nan, "num_tasks": 1}
    estimate = bootstrap(
        logs[:, None], statistic=lambda resampled: resampled.mean(axis=0), n_resamples=num_bootstrap, seed=seed
    )
    geometric_mean, low, high = (math.exp(bound.item()) for bound in estimate)
    return {"geometric_mean": geometric_mean, "low": low, "high": high, "num_tasks": len(logs)}
