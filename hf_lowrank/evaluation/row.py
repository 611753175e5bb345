"""One cell of an evaluation: a model on a task."""

from __future__ import annotations

from dataclasses import dataclass, field

from .series_scores import BySeries

__all__ = ["EvaluationRow"]


@dataclass(frozen=True)
class EvaluationRow:
    """The scores of one model on one task: fev's metrics, each the mean over the task's windows.

    WQL, MASE and SQL take quantiles 0.1, ..., 0.9 and the median; RMSSE takes the mean forecast (Chronos-Bolt
    and Chronos-2 forecast quantiles only, and give their median for it). A metric is NaN where it is undefined: series with a
    constant past have no scale and are left out of MASE, SQL and RMSSE, whose scale is the error of a forecast that repeats the last
    `seasonality` steps. `seconds` is the time of the forecasts.
    `dataset_fingerprint` is fev's, of the data set's first and last rows, its columns and its size.
    `by_series` holds what each series adds to each metric (see `series_scores`), from which differences get their intervals.
    """

    task: str
    model: str
    WQL: float
    MASE: float
    SQL: float
    RMSSE: float
    num_series: int
    num_windows: int
    horizon: int
    seasonality: int
    seconds: float
    dataset_fingerprint: str | None = None
    by_series: BySeries | None = field(default=None, repr=False)
