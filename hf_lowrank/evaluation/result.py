"""What an evaluation says: the scores by task, their means, and both as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..files import without_nan, write_json, write_text
from ..text_tables import Table, in_notebook
from .naive import SEASONAL_NAIVE
from .scores import METRICS

__all__ = ["EvaluationResult", "EvaluationRow", "mean_table", "score_table"]

BASELINE = "Seasonal Naive"  # for people


@dataclass(frozen=True)
class EvaluationRow:
    """The scores of one model on one task: fev's metrics, each the mean over the task's windows.

    WQL, MASE and SQL take quantiles 0.1, ..., 0.9 and the median; RMSSE takes the mean forecast (Chronos-Bolt
    and Chronos-2 forecast quantiles only, and give their median for it). A metric is NaN where it is undefined: series with a
    constant past have no scale and are left out of MASE, SQL and RMSSE, whose scale is the error of a forecast that repeats the last
    `seasonality` steps. `seconds` is the time of the forecasts.
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


@dataclass(frozen=True)
class EvaluationResult:
    """The rows, and for each model `{"relative_to_seasonal_naive" | "relative_to_dense": {metric: {...}}}`.

    A relative score is the geometric mean over tasks of the model's score divided by the baseline's, as in the
    Chronos paper; `low` and `high` bound its 95 % bootstrap interval over tasks, and are NaN where there is but one. Tasks on which
    either score is zero or undefined do not count; `num_tasks` says how many did.
    """

    results: tuple[EvaluationRow, ...]
    aggregate: Mapping[str, Any]
    settings: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One row for each task and model."""
        return pd.DataFrame([asdict(row) for row in self.results])

    def to_dict(self) -> dict[str, Any]:
        """The `results`, the `aggregate` and the `settings`; an undefined number is None."""
        content = {
            "results": [asdict(row) for row in self.results],
            "aggregate": self.aggregate,
            "settings": self.settings,
        }
        return without_nan(content)

    def save(self, path: str | Path) -> None:
        """Write a .json or .csv file (the rows alone); it appears whole or not at all."""
        path = Path(path)
        if path.suffix not in (".json", ".csv"):
            raise ValueError(f"path must end in .json or .csv, found {path.name!r}.")
        if path.suffix == ".json":
            write_json(path, self.to_dict())
        else:
            write_text(path, self.to_frame().to_csv(index=False))

    def _repr_html_(self) -> str:
        """Both tables, in a notebook."""
        return in_notebook(score_table(self), mean_table(self))


def score_table(result: EvaluationResult, metric: str = "WQL") -> Table:
    """One metric of all models by task, behind each score that score relative to Seasonal Naive's; the best of a task is marked.

    Raises:
        ValueError: There is no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, found {metric!r}.")
    by_task: dict[str, dict[str, float]] = {}
    seasons: dict[str, int] = {}
    for row in result.results:
        by_task.setdefault(row.task, {})[row.model] = getattr(row, metric)
        seasons[row.task] = row.seasonality
    models = list(dict.fromkeys(row.model for row in result.results))
    rows, best = [], set()
    for i, (task, scores) in enumerate(by_task.items()):
        naive = scores[SEASONAL_NAIVE]
        rows.append([task, str(seasons[task]), *(_score(scores[model], naive, model) for model in models)])
        least = min((score for score in scores.values() if not np.isnan(score)), default=np.nan)
        best |= {(i, 2 + j) for j, model in enumerate(models) if scores[model] == least}
    title = f"{metric} by task, and relative to {BASELINE}; lower is better"
    return Table(
        title,
        ["task", "season", *(BASELINE if model == SEASONAL_NAIVE else model for model in models)],
        rows,
        frozenset(best),
    )


def _score(score: float, naive: float, model: str) -> str:
    if np.isnan(score):
        return "-"
    is_relative = model != SEASONAL_NAIVE and naive > 0
    return f"{score:.4f} ({score / naive:.2f})" if is_relative else f"{score:.4f}"


def mean_table(result: EvaluationResult) -> Table:
    """The geometric means over tasks of the models' relative scores, with their intervals: a row for each metric and baseline."""
    baselines = {"relative_to_seasonal_naive": BASELINE, "relative_to_dense": result.settings["against"]}
    means = {model: found for model, found in result.aggregate.items() if model != SEASONAL_NAIVE}
    rows = [
        [
            f"{metric}, of {baseline}",
            *("" if model == baseline else _mean(found[title][metric]) for model, found in means.items()),
        ]
        for title, baseline in baselines.items()
        if baseline is not None
        for metric in METRICS
    ]
    num_tasks = len({row.task for row in result.results})
    title = f"Geometric means over {num_tasks} tasks (95 % interval); below 1 is better than the baseline"
    if num_tasks == 1:
        title = "Relative scores; below 1 is better than the baseline. Of a single task there is no interval"
    return Table(title, ["metric", *means], rows)


def _mean(mean: dict[str, float]) -> str:
    if mean["num_tasks"] == 0:
        return "-"
    interval = f" ({mean['low']:.3f} to {mean['high']:.3f})" if mean["num_tasks"] > 1 else ""
    return f"{mean['geometric_mean']:.3f}{interval}"
