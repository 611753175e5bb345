"""Scores of one model relative to another's, over tasks and over the series of a task, with intervals of the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .naive import SEASONAL_NAIVE
from .row import EvaluationRow
from .scores import METRICS, relative_score
from .series_scores import num_groups, resampled_scores

__all__ = ["Comparison", "aggregate_scores", "baselines_of"]


class Comparison:
    """The scores of models on tasks, with resamples of the series that are the same for every model.

    Args:
        rows: One for each task and model.
        num_bootstrap: Resamples.
        seed: Of the resampling.
    """

    def __init__(self, rows: Sequence[EvaluationRow], *, num_bootstrap: int, seed: int):
        self.tasks = list(dict.fromkeys(row.task for row in rows))
        self.models = list(dict.fromkeys(row.model for row in rows))
        self._row = {(row.model, row.task): row for row in rows}
        self._num_bootstrap, self._seed = num_bootstrap, seed
        self._resampled = {
            (row.model, row.task): resampled_scores(
                row.by_series, num_bootstrap=num_bootstrap, seed=seed + 1 + self.tasks.index(row.task)
            )
            for row in rows
            if row.by_series
        }

    def relative(self, model: str, baseline: str, metric: str, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """The `relative_score` of a model, over all tasks or some of them."""
        tasks = self.tasks if tasks is None else tasks
        scores, baseline_scores = (
            [getattr(self._row[name, task], metric) for task in tasks] for name in (model, baseline)
        )
        return relative_score(
            scores,
            baseline_scores,
            deviations=[self._deviations(model, baseline, metric, task) for task in tasks],
            num_series=[num_groups(self._row[model, task].by_series) for task in tasks],
            num_bootstrap=self._num_bootstrap,
            seed=self._seed,
        )

    def _deviations(self, model: str, baseline: str, metric: str, task: str) -> NDArray[np.floating]:
        """What resampling the series of a task adds to log(score / baseline's score); nothing where that is undefined."""
        ours, theirs = (self._resampled.get((name, task), {}).get(metric) for name in (model, baseline))
        if ours is None or theirs is None:
            return np.zeros(self._num_bootstrap)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(ours / theirs)
            deviations = logs[1:] - logs[0]
        return np.where(np.isfinite(deviations), deviations, 0)


def baselines_of(dense: str | None) -> dict[str, str]:
    """What the relative scores of an aggregate are called, and the model that they are relative to."""
    return {"relative_to_seasonal_naive": SEASONAL_NAIVE} | ({"relative_to_dense": dense} if dense else {})


def aggregate_scores(
    rows: Sequence[EvaluationRow], dense: str | None, *, num_bootstrap: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Of each model: the seconds of all tasks, and its relative scores by baseline and metric."""
    comparison = Comparison(rows, num_bootstrap=num_bootstrap, seed=seed)
    return {
        model: {
            "seconds": sum(row.seconds for row in rows if row.model == model),
            **{
                title: {metric: comparison.relative(model, baseline, metric) for metric in METRICS}
                for title, baseline in baselines_of(dense).items()
            },
        }
        for model in comparison.models
    }
