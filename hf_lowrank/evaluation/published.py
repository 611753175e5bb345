"""Scores that others have published of their models, beside which evaluated models are set.

The figures and where they come from are in `assets/published_scores.json`; `tests/collect_published_scores.py` collects them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from ..text_tables import Table, in_notebook
from .leaderboard import leaderboard
from .naive import SEASONAL_NAIVE
from .row import EvaluationRow
from .scores import log_ratios

__all__ = ["BENCHMARKS", "Standing", "check_published", "published_name", "published_scores", "standings"]

# The metrics that a benchmark is aggregated by, the first of which orders the models.
BENCHMARKS = {"chronos_zeroshot": ("WQL", "MASE"), "fev_bench": ("SQL",)}
AGGREGATIONS = {
    "chronos_zeroshot": ("geometric means relative to Seasonal Naive", ""),
    "fev_bench": ("skill score and win rate by fev", ", where chronos-bolt-base stands in for it"),
}
COLUMNS = {  # of a `Standing`: heading, digits, factor
    "WQL": ("WQL", 3, 1),
    "MASE": ("MASE", 3, 1),
    "skill_score": ("SQL skill %", 1, 100),
    "win_rate": ("win rate %", 1, 100),
    "million_parameters": ("M params", 0, 1),
    "seconds": ("seconds", 2, 1),
    "trained_on": ("seen", 0, 1),
    "gift_eval": ("GIFT CRPS", 3, 1),
}
SAME_DATA = {"m1_yearly": "monash_m1_yearly"}  # tasks of ours that have another name in a benchmark
IMPUTED_BY = "chronos-bolt-base"  # fev-bench's rule: it stands in for a model on the tasks that this was trained on
# Where Seasonal Naive is the same here: that of fev-bench has quantiles around its forecast, ours the forecast at all levels.
COMPARABLE_NAIVE = ("chronos_zeroshot",)
TOLERANCE = 1e-3  # to which Seasonal Naive's scores agree where data and definition of a task do


@cache
def published_figures() -> dict[str, Any]:
    """What is in the file: sizes of models, and by benchmark its `source`, `date`, `licence`, and scores."""
    return json.loads((resources.files("hf_lowrank") / "assets" / "published_scores.json").read_text(encoding="utf-8"))


def published_name(task: str) -> tuple[str, str] | tuple[None, None]:
    """The benchmark that has scores of this task, and what it is called there; nothing where none has."""
    name = SAME_DATA.get(task, task)
    return next(((bench, name) for bench in BENCHMARKS if name in published_figures()[bench]["tasks"]), (None, None))


def published_scores(benchmark: str, metric: str) -> pd.DataFrame:
    """One of the `BENCHMARKS`: a row for each task and a column for each model, `SEASONAL_NAIVE` first; also of the metric "seconds"."""
    content = published_figures()[benchmark]
    columns = {model: scores[metric] for model, scores in content["scores"].items()}
    return pd.DataFrame(columns, index=content["tasks"], dtype=float)


@dataclass(frozen=True)
class Standing:
    """Models beside published ones, in the aggregation of one benchmark over the tasks that were evaluated.

    Attributes:
        benchmark: One of `BENCHMARKS`.
        frame: A row for each model, the best first. `chronos_zeroshot`: geometric means of WQL and MASE relative to Seasonal Naive's;
            `fev_bench`: `skill_score` and `win_rate` by SQL. Then `million_parameters`, `seconds` (of all forecasts, on the machine of whoever
            evaluated), `trained_on` (how many of the tasks are known to be in the training data), `gift_eval` (the published CRPS
            there, relative to Seasonal Naive's) and `is_published`. NaN is unknown.
        num_tasks: How many of the benchmark's tasks were evaluated.
        same_data: Tasks whose data have a published fingerprint. Others may have the same data all the same: fingerprints depend on versions
            of libraries and on columns that are not read.
        other_data: Tasks on which Seasonal Naive's scores are not those that are published: other data, or another definition. None of
            fev-bench, whose Seasonal Naive is another one.
    """

    benchmark: str
    frame: pd.DataFrame
    num_tasks: int
    same_data: tuple[str, ...]
    other_data: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For programs: the models as a list of records, and where the published figures come from."""
        origin = {key: published_figures()[self.benchmark][key] for key in ("source", "date", "licence")}
        records = self.frame.reset_index().to_dict("records")
        return {
            "benchmark": self.benchmark,
            "num_tasks": self.num_tasks,
            "same_data": self.same_data,
            "other_data": self.other_data,
            **origin,
            "models": records,
        }

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        return in_notebook(self.table())

    def table(self) -> Table:
        """For people: the evaluated models are marked."""
        content = published_figures()[self.benchmark]
        columns = [name for name in COLUMNS if name in self.frame]
        rows = [
            [str(model), *(_cell(self.frame.at[model, name], name) for name in columns)] for model in self.frame.index
        ]
        marked = frozenset(
            (int(i), j) for i in np.flatnonzero(~self.frame["is_published"]) for j in range(1 + len(columns))
        )
        by, seen = AGGREGATIONS[self.benchmark]
        repository, place = content["source"].split("/tree/")
        notes = [
            f"seen: tasks that a model was trained on{seen}; seconds: of all forecasts, each on its own machine; GIFT CRPS: of GIFT-Eval, "
            f"relative to Seasonal Naive. Published figures: {repository} at {place[:8]} ({content['date']}, {content['licence']})."
        ]
        if self.same_data:
            notes.append(f"Tasks whose data are the published ones, by their fingerprints: {len(self.same_data)}.")
        if self.benchmark in COMPARABLE_NAIVE:
            notes.append(
                f"Tasks on which Seasonal Naive has the published scores: {self.num_tasks - len(self.other_data)}."
            )
        if self.other_data:
            notes.append(
                "Tasks on which it has not, so that the data or the definition differ from the published ones: "
                f"{', '.join(self.other_data)}."
            )
        num_tasks = f"{self.num_tasks} of the {len(content['tasks'])} tasks of {self.benchmark}"
        title = f"Beside published models, over {num_tasks}: {by}; yours are marked"
        return Table(title, ["model", *(COLUMNS[name][0] for name in columns)], rows, marked, note=" ".join(notes))


def _cell(value: float, column: str) -> str:
    _, digits, factor = COLUMNS[column]
    return "" if np.isnan(value) else f"{factor * value:.{digits}f}"


def check_published(tasks: Iterable[str]) -> None:
    """Raise ValueError where no benchmark has scores of any of these tasks; for a check before long work."""
    names = list(dict.fromkeys(tasks))
    if all(published_name(name)[0] is None for name in names):
        known = ", ".join([*BENCHMARKS, *SAME_DATA])
        raise ValueError(f"tasks must have published scores (those of {known} have), found {', '.join(names)}.")


def standings(rows: Sequence[EvaluationRow]) -> list[Standing]:
    """Where the models of these rows stand, for each benchmark that has some of their tasks.

    Raises:
        ValueError: None has.
    """
    by_benchmark: dict[str, list[EvaluationRow]] = {}
    for row in rows:
        benchmark, _ = published_name(row.task)
        if benchmark is not None:
            by_benchmark.setdefault(benchmark, []).append(row)
    check_published(row.task for row in rows)
    return [_standing(benchmark, cells) for benchmark, cells in by_benchmark.items()]


def _standing(benchmark: str, rows: Sequence[EvaluationRow]) -> Standing:
    tasks = list(dict.fromkeys(SAME_DATA.get(row.task, row.task) for row in rows))
    content = published_figures()[benchmark]
    theirs = [model for model in content["scores"] if model != SEASONAL_NAIVE]
    ours = [model for model in dict.fromkeys(row.model for row in rows) if model != SEASONAL_NAIVE]
    known_as = {model: f"{model} (published)" if model in ours else model for model in theirs}
    scores = {
        metric: pd.concat(
            [published_scores(benchmark, metric).loc[tasks].rename(columns=known_as), _scores(rows, metric)[ours]],
            axis=1,
        )
        for metric in (*BENCHMARKS[benchmark], "seconds")
    }
    trained_on = {
        known_as[model]: {content["tasks"][i] for i in content["scores"][model]["trained_on"]} for model in theirs
    }
    if benchmark == "fev_bench":
        frame = leaderboard(scores["SQL"], trained_on=trained_on, imputed_by=known_as[IMPUTED_BY])
    else:
        frame = pd.DataFrame({metric: _geometric_means(scores[metric]) for metric in BENCHMARKS[benchmark]})
        frame = frame.sort_values(BENCHMARKS[benchmark][0], kind="stable")
    name_of = {shown: model for model, shown in known_as.items()}
    sizes = published_figures()["million_parameters"]
    gift_eval = published_figures()["gift_eval"]["relative_to_seasonal_naive"]
    frame["million_parameters"] = [sizes.get(name_of.get(model), np.nan) for model in frame.index]
    frame["seconds"] = scores["seconds"].sum(min_count=len(tasks))
    frame["trained_on"] = [
        len(trained_on[model] & set(tasks)) if model in trained_on else np.nan for model in frame.index
    ]
    frame["gift_eval"] = [gift_eval.get(name_of.get(model), {}).get("CRPS", np.nan) for model in frame.index]
    frame["is_published"] = [model not in ours for model in frame.index]
    known = dict(zip(content["tasks"], content["fingerprints"]))
    same_data = dict.fromkeys(
        row.task for row in rows if row.dataset_fingerprint in known[SAME_DATA.get(row.task, row.task)]
    )
    return Standing(benchmark, frame.rename_axis("model"), len(tasks), tuple(same_data), _other_data(benchmark, rows))


def _scores(rows: Sequence[EvaluationRow], metric: str) -> pd.DataFrame:
    cells = {(SAME_DATA.get(row.task, row.task), row.model): getattr(row, metric) for row in rows}
    return pd.Series(cells).unstack(sort=False)


def _geometric_means(scores: pd.DataFrame) -> pd.Series:
    """Relative to Seasonal Naive's scores, over the tasks on which both are defined and positive."""
    naive = scores[SEASONAL_NAIVE].to_list()
    return scores.apply(lambda column: np.exp(np.mean(log_ratios(column.to_list(), naive))))


def _other_data(benchmark: str, rows: Sequence[EvaluationRow]) -> tuple[str, ...]:
    if benchmark not in COMPARABLE_NAIVE:
        return ()
    naive = [row for row in rows if row.model == SEASONAL_NAIVE]
    published = {metric: published_scores(benchmark, metric)[SEASONAL_NAIVE] for metric in BENCHMARKS[benchmark]}
    return tuple(
        row.task
        for row in naive
        if any(
            not np.isclose(getattr(row, metric), scores[SAME_DATA.get(row.task, row.task)], rtol=TOLERANCE)
            for metric, scores in published.items()
        )
    )
