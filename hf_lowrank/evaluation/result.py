"""What an evaluation says: the scores by task, and their means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import without_nan, write_json, write_text
from ..text_tables import Table, in_notebook
from .leaderboard import leaderboard
from .naive import SEASONAL_NAIVE
from .published import Standing, published_name, standings
from .row import EvaluationRow
from .scores import METRICS
from .series_scores import BySeries
from .tables import layouts, leaderboard_table, mean_table, score_table, tables_that_fit

__all__ = ["EvaluationResult", "EvaluationRow"]


@dataclass(frozen=True)
class EvaluationResult:
    """The rows, and for each model `{"relative_to_seasonal_naive" | "relative_to_dense": {metric: {...}}}`.

    A relative score is the geometric mean over tasks of the model's score divided by the baseline's, as in the
    Chronos paper; `low` and `high` bound its 95 % interval, by a paired bootstrap over tasks and their series (see `relative_score`), over
    the series alone where there is but one task. They are NaN where there is but one series. Tasks on which either score is zero or
    undefined do not count; `num_tasks` says how many did.
    """

    results: tuple[EvaluationRow, ...]
    aggregate: Mapping[str, Any]
    settings: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One row for each task and model; its means alone."""
        columns = [column.name for column in fields(EvaluationRow) if column.name != "by_series"]
        return pd.DataFrame([[getattr(row, column) for column in columns] for row in self.results], columns=columns)

    def scores(self, metric: str) -> pd.DataFrame:
        """One metric: a row for each task and a column for each model, in the order of the results.

        Raises:
            ValueError: There is no such metric.
        """
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, found {metric!r}.")
        frame = self.to_frame()
        table = frame.pivot(index="task", columns="model", values=metric)
        return table.loc[frame["task"].unique(), frame["model"].unique()]

    def relative_scores(self, metric: str) -> pd.DataFrame:
        """As `scores`, divided by those of Seasonal Naive; NaN where these are zero or undefined."""
        scores = self.scores(metric)
        naive = scores[SEASONAL_NAIVE]
        return scores.div(naive.where(naive > 0), axis=0)

    def leaderboard(self, metric: str = "SQL") -> pd.DataFrame:
        """fev-bench's skill score and win rate of the models (see `leaderboard`), and the share of tasks won over the dense one."""
        return leaderboard(self.scores(metric), against=self.settings["against"])

    def beside_published(self) -> list[Standing]:
        """Where the models stand among published ones, for each benchmark that has some of the tasks.

        Raises:
            ValueError: None has.
        """
        return standings(self.results)

    def tables(self, metric: str = "WQL", fits: Callable[[Table], bool] = lambda _: True) -> list[Table]:
        """One metric by task, the means of all metrics, and for tasks of fev-bench its leaderboard.

        Args:
            metric: That of the tasks.
            fits: Whether a table can be shown whole. One that cannot calls models by the last parts of their names or by letters,
                leaves out relative scores, and is divided at last.

        Raises:
            ValueError: There is no such metric.
        """
        scores, relative = self.scores(metric), self.relative_scores(metric)
        seasons = {row.task: row.seasonality for row in self.results}
        by_task = partial(score_table, scores, relative, seasons, metric)
        means = partial(mean_table, self.aggregate, self.settings["against"], len(scores))
        models = list(scores)
        boards = (
            tables_that_fit(partial(leaderboard_table, self.leaderboard()), models, layouts(models), fits)
            if all(published_name(task)[0] == "fev_bench" for task in scores.index)
            else []
        )
        compared = [model for model in models if model != SEASONAL_NAIVE]
        return [
            *tables_that_fit(by_task, models, layouts(models), fits),
            *(tables_that_fit(means, compared, layouts(models), fits) if compared else []),
            *boards,
        ]

    def to_dict(self) -> dict[str, Any]:
        """The `results`, the `aggregate` and the `settings`; an undefined number is None.

        In `by_series` the numbers of a window are one text, with blanks between them: all digits, and a line of a file.
        """
        content = {
            "results": [asdict(row) | {"by_series": _as_text(row.by_series)} for row in self.results],
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
        return in_notebook(*self.tables())


def _as_text(by_series: BySeries | None) -> dict[str, list[str]] | None:
    if by_series is None:
        return None
    return {
        name: [" ".join(f"{value:.17g}" for value in window) for window in part] for name, part in by_series.items()
    }
