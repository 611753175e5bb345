"""The arithmetic of scores: fev's metrics of forecasts, and scores relative to a baseline's over many tasks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from ..checkpoints.pipelines import QUANTILE_LEVELS

__all__ = ["METRICS", "MIN_TASKS", "log_ratios", "relative_score", "score_forecasts"]

METRICS = ("WQL", "MASE", "SQL", "RMSSE")
# Two models cannot be told apart by fewer tasks: even where one of them is better on all, the sign test of both sides has
# p = 2 / 2**5 = 0.06 on five, and 0.03 on six.
MIN_TASKS = 6
OF_THE_MEAN = ("RMSSE",)  # the others score the quantiles or their median


def score_forecasts(
    *,
    targets: NDArray[np.floating],
    contexts: Sequence[NDArray[np.floating]],
    quantiles: NDArray[np.floating],
    mean: NDArray[np.floating] | None = None,
    seasonality: int,
    names: Sequence[object] | None = None,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, float]:
    """fev's `METRICS` of the forecasts of N series, H steps ahead, at the Q `QUANTILE_LEVELS`.

    Args:
        targets: What came, (N, H); NaN does not count.
        contexts: What came before, N series of any length: the scales of MASE, SQL and RMSSE.
        quantiles: (N, H, Q).
        mean: (N, H), which RMSSE is of; without it that is left out.
        seasonality: Steps in a season, for the scales.
        names: What errors call the series; by default their positions.
        options: fev's configurations of metrics, by their names, that are not its default.

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
            metric: get_metric(options.get(metric, metric)).compute(
                **arrays,
                y_pred=point[:, :, None],
                seasonality=seasonality,
                quantile_levels=QUANTILE_LEVELS,
            )
            for metric, point in points.items()
        }


def log_ratios(scores: Sequence[float], baseline_scores: Sequence[float]) -> NDArray[np.floating]:
    """log(score / baseline's score) of the tasks on which both are defined and positive, in their order."""
    pairs = np.array([scores, baseline_scores])[:, _comparable(scores, baseline_scores)]
    return np.log(pairs[0] / pairs[1])


def _comparable(scores: Sequence[float], baseline_scores: Sequence[float]) -> NDArray[np.bool_]:
    pairs = np.array([scores, baseline_scores])
    return (np.isfinite(pairs) & (pairs > 0)).all(axis=0)


def relative_score(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    *,
    deviations: ArrayLike | None = None,
    num_series: Sequence[int] = (),
    num_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """exp(mean(log(score / baseline's score))) over tasks, with a 95 % interval of it on other tasks and series such as these.

    The interval is a paired bootstrap of tasks and, inside of each, of series. The logarithm of a task is m + (what tasks differ by) +
    (what its series differ by), of variance a + b, so that the mean over T tasks has (a + b) / T. Resampling tasks gives
    (a + b)(1 - 1/T) / T, for the difference of two tasks has that of their series in it; resampling the series of the tasks
    drawn would add b / T, too much (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). Their
    deviations count by 1 / sqrt(T): in all (a (1 - 1/T) + b) / T. As in Student's interval the deviations from the mean are
    widened by t(0.975; T - 1) / z(0.975).

    Args:
        scores, baseline_scores: One a task.
        deviations: (T, K): what resampling its series adds to the logarithm of a task; by default nothing.
        num_series: Of each task; needed for the interval of a single task, which is over its series, widened likewise.
        num_bootstrap: Resamples.
        seed: Of the resampling.

    Returns:
        `{"geometric_mean", "low", "high", "num_tasks"}`: tasks on which either score is zero or undefined do not count. A single series
        of a single task has no interval, and `low` and `high` are NaN; where no task is left all three numbers are.
    """
    # fev's `leaderboard` is not used: it clips ratios to [0.01, 100], so that a baseline's score of zero counts as a ratio of 100, and drops
    # a task for all models where one has no score, or takes it for a ratio of 1.
    counts = _comparable(scores, baseline_scores)
    logs = log_ratios(scores, baseline_scores)
    num_tasks = len(logs)
    if num_tasks == 0:
        return {"geometric_mean": math.nan, "low": math.nan, "high": math.nan, "num_tasks": 0}
    inner = np.zeros((num_tasks, 1)) if deviations is None else np.asarray(deviations)[counts]
    mean, low, high = logs.mean(), math.nan, math.nan
    if num_tasks > 1:
        rng = np.random.default_rng(seed)
        tasks = rng.integers(num_tasks, size=(num_bootstrap, num_tasks))
        draws = rng.integers(inner.shape[1], size=tasks.shape)
        spread = (logs[tasks] - mean + inner[tasks, draws] / math.sqrt(num_tasks)).mean(axis=1)
        low, high = mean + np.quantile(spread, [0.025, 0.975]) * _widened(num_tasks)
    elif len(num_series) and (size := np.asarray(num_series)[counts].item()) > 1:
        low, high = mean + np.quantile(inner[0], [0.025, 0.975]) * _widened(size) * math.sqrt(size / (size - 1))
    return {
        "geometric_mean": math.exp(mean),
        "low": math.exp(low),
        "high": math.exp(high),
        "num_tasks": num_tasks,
    }


def _widened(size: int) -> float:
    """Student's quantile over the normal one, for a mean of so many."""
    return float(scipy.stats.t.ppf(0.975, size - 1) / scipy.stats.norm.ppf(0.975))
