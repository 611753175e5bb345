"""Scores as tables: all of them on a wide page, and what fits on a narrow one without breaking a word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import PurePosixPath
from string import ascii_uppercase
from typing import Any

import numpy as np
import pandas as pd

from ..text_tables import Table
from .aggregate import baselines_of
from .naive import SEASONAL_NAIVE
from .scores import METRICS, MIN_TASKS

__all__ = [
    "BASELINE",
    "WIDEST",
    "Layout",
    "layouts",
    "leaderboard_table",
    "mean_table",
    "score_table",
    "tables_that_fit",
]

BASELINE = "Seasonal Naive"  # for people


@dataclass(frozen=True)
class Layout:
    """What models are called in a table, and how much a cell says.

    Attributes:
        names: By model, where it is called otherwise.
        legend: What the names stand for, if they need it.
        relative: Whether relative scores stand behind the absolute ones.
    """

    names: Mapping[str, str]
    legend: str = ""
    relative: bool = True

    def name(self, model: str) -> str:
        """What a model is called."""
        return self.names.get(model, model)


WIDEST = Layout({SEASONAL_NAIVE: BASELINE})


def layouts(models: Sequence[str]) -> Iterator[Layout]:
    """From wide to narrow: whole names, their last parts, letters, and letters without relative scores."""
    yield WIDEST
    short = {model: WIDEST.name(name) for model, name in _short_names(models).items()}
    yield Layout(short)
    letters = dict(zip(models, _letters()))
    legend = ", ".join(f"{letter}: {WIDEST.name(model)}" for model, letter in letters.items())
    yield Layout(letters, legend)
    yield Layout(letters, legend, relative=False)


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """The last parts of paths and Hub ids, as many as tell them apart."""

    def last(model: str, parts: int) -> str:
        return "/".join(PurePosixPath(model).parts[-parts:])

    def short(model: str) -> str:
        for parts in range(1, len(PurePosixPath(model).parts)):
            if all(last(model, parts) != last(other, parts) for other in models if other != model):
                return last(model, parts)
        return model

    return {model: short(model) for model in models}


def _letters() -> Iterator[str]:
    """A, B, ..., Z, A2, B2, ..."""
    for turn in count(1):
        yield from (letter if turn == 1 else f"{letter}{turn}" for letter in ascii_uppercase)


def score_table(
    scores: pd.DataFrame,
    relative: pd.DataFrame,
    seasons: Mapping[str, int],
    metric: str,
    models: Sequence[str],
    layout: Layout = WIDEST,
) -> Table:
    """A row for each task and a column for each model; the best of all models at a task is marked.

    Args:
        scores, relative: A row a task, a column a model: absolute, and relative to Seasonal Naive, NaN where undefined.
        seasons: Steps in a season, by task.
        metric: What the scores are called.
        models: Those to show.
        layout: Names, and whether relative scores are shown.
    """
    rows = [
        [
            str(task),
            str(seasons[str(task)]),
            *(
                _score(scores.at[task, model], relative.at[task, model] if _shows(layout, model) else np.nan)
                for model in models
            ),
        ]
        for task in scores.index
    ]
    is_best = scores.eq(scores.min(axis=1), axis=0)[list(models)].to_numpy()
    best = frozenset((int(row), 2 + int(column)) for row, column in np.argwhere(is_best))
    beside = f", and relative to {BASELINE}" if layout.relative else ""
    title = f"{metric} by task{beside}; lower is better"
    return Table(title, ["task", "season", *map(layout.name, models)], rows, best, note=layout.legend)


def _shows(layout: Layout, model: str) -> bool:
    return layout.relative and model != SEASONAL_NAIVE


def _score(score: float, relative: float) -> str:
    if np.isnan(score):
        return "-"
    return f"{score:.4f}" if np.isnan(relative) else f"{score:.4f} ({relative:.2f})"


def mean_table(
    aggregate: Mapping[str, Any], dense: str | None, num_tasks: int, models: Sequence[str], layout: Layout = WIDEST
) -> Table:
    """The geometric means over tasks of the models' relative scores, with their intervals: a row for each metric and model."""
    baselines = baselines_of(dense)
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for metric in METRICS:
        first = len(rows)
        rows += [
            [
                metric,
                layout.name(model),
                *(
                    "" if model == baseline else _mean(aggregate[model][key][metric])
                    for key, baseline in baselines.items()
                ),
            ]
            for model in models
        ]
        for column, key in enumerate(baselines, start=2):
            means = np.array([aggregate[model][key][metric]["geometric_mean"] for model in models])
            best |= {
                (first + int(i), column)
                for i in np.flatnonzero(means == np.min(means[~np.isnan(means)], initial=np.inf))
            }
    title = f"Geometric means over {num_tasks} tasks (95 % interval); below 1 is better than the baseline"
    if num_tasks == 1:
        over = " (95 % interval over the series of the task)" if _has_intervals(aggregate) else ""
        none = "" if over else ". Of a single series there is no interval"
        title = f"Relative scores{over}; below 1 is better than the baseline{none}"
    notes = [layout.legend and f"{layout.legend}.", _too_few(num_tasks) if num_tasks < MIN_TASKS else ""]
    headings = [
        "metric",
        "model",
        *(
            f"of {WIDEST.name(model) if model == SEASONAL_NAIVE else layout.name(model)}"
            for model in baselines.values()
        ),
    ]
    return Table(
        title,
        headings,
        rows,
        frozenset(best) if len(models) > 1 else frozenset(),
        2,
        note=" ".join(filter(None, notes)),
    )


def _has_intervals(aggregate: Mapping[str, Any]) -> bool:
    return any(
        np.isfinite(of_model["relative_to_seasonal_naive"][metric]["low"])
        for of_model in aggregate.values()
        for metric in METRICS
    )


def _too_few(num_tasks: int) -> str:
    if num_tasks == 1:
        return "A single task says nothing of others."
    return (
        f"{num_tasks} tasks are too few to say which model is better on others: one that is better on all of them may be so by chance "
        f"(sign test, p = {2.0 ** (1 - num_tasks):.2g}); it takes {MIN_TASKS}."
    )


def _mean(mean: Mapping[str, float]) -> str:
    if mean["num_tasks"] == 0:
        return "-"
    interval = "" if np.isnan(mean["low"]) else f" ({mean['low']:.3f} to {mean['high']:.3f})"
    return f"{mean['geometric_mean']:.3f}{interval}"


def leaderboard_table(board: pd.DataFrame, models: Sequence[str], layout: Layout = WIDEST) -> Table:
    """The columns of a leaderboard as percentages, a row for each of its models that is shown, the best first."""
    shown = [str(model) for model in board.index if model in models]
    rows = [[layout.name(model), *(f"{100 * value:.1f}" for value in board.loc[model])] for model in shown]
    headings = ["model", *(f"{heading.replace('_', ' ')}, %" for heading in board.columns)]
    title = "By fev-bench: skill score (1 - the geometric mean of errors relative to Seasonal Naive's), share of comparisons won"
    note = (
        "fev-bench's Seasonal Naive has quantiles around its forecast, the one here has not and is easier to beat: with published models "
        "compare by --beside published."
    )
    return Table(title, headings, rows, note=" ".join(filter(None, [layout.legend, note])))


def tables_that_fit(
    make: Callable[[Sequence[str], Layout], Table],
    models: Sequence[str],
    named: Iterable[Layout],
    fits: Callable[[Table], bool],
) -> list[Table]:
    """The widest table that fits; where none does, several of the narrowest, each of as many models as fit.

    Args:
        make: The table of these models in a layout.
        models: All that are to be shown.
        named: The layouts, from wide to narrow.
        fits: Whether a table can be shown whole.
    """
    for layout in named:
        table = make(models, layout)
        if fits(table):
            return [table]
    for size in range(len(models) - 1, 0, -1):
        parts = [make(models[first : first + size], layout) for first in range(0, len(models), size)]
        if all(map(fits, parts)):
            return parts
    return [table]
