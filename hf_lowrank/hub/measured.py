"""What was measured of a model, for its card: results and their files, looked at entry by entry before anything is shown of them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..evaluation.naive import SEASONAL_NAIVE
from ..timing import Case

__all__ = ["Scores", "read_scores", "read_speed"]

SHOWN_METRICS = ("WQL", "MASE")
COMMANDS = {"evaluation": "evaluate", "benchmark": "bench"}


# ---- What a file must hold -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of value: what messages call it, and the test of it."""

    name: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


TEXT = Kind("text", lambda value: isinstance(value, str))
TABLE = Kind("a table", lambda value: isinstance(value, dict))
COUNT = Kind("an integer of at least 0", _is_count)
COUNT_OR_NULL = Kind("an integer of at least 0, or null", lambda value: value is None or _is_count(value))
NUMBER = Kind("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
NUMBER_OR_NULL = Kind(
    "a finite number of at least 0, or null", lambda value: value is None or (_is_number(value) and value >= 0)
)

# A dictionary asks for these entries, a list of one for a list of such. What may be missing or null is in a tuple.
ROW = {"task": TEXT, "model": TEXT, "num_series": COUNT, "horizon": COUNT} | dict.fromkeys(
    SHOWN_METRICS, NUMBER_OR_NULL
)
EVALUATION = {
    "results": [ROW],
    "aggregate": TABLE,
    "settings": {"versions": TABLE, "against": (TEXT,)},
}
MEAN = dict.fromkeys(("geometric_mean", "low", "high"), NUMBER_OR_NULL) | {"num_tasks": COUNT}
SPREAD = dict.fromkeys(("median", "min", "max"), NUMBER)
SIDE = {"seconds": [NUMBER], "memory": [{"peak": COUNT_OR_NULL}]}
CASE = dict.fromkeys(("batch_size", "context_length", "prediction_length"), COUNT) | {"num_samples": COUNT_OR_NULL}
MEASURED_CASE = {
    "case": CASE,
    "model": SIDE,
    "against": SIDE,
    "against_lean": (SIDE,),
    "time_ratio": SPREAD,
    "memory_ratio": (SPREAD,),
    "lean_time_ratio": (SPREAD,),
}
BENCHMARK = {
    "results": [MEASURED_CASE],
    "machine": {"processor": TEXT, "threads": COUNT, "device": TEXT, "dtype": TEXT},
}


def _check(value: Any, wanted: Any, what: str, place: str = "") -> None:
    """Raise ValueError where a value is not what is wanted, with its place in the file; `what` begins the message."""
    if isinstance(wanted, tuple):
        if value is not None:
            _check(value, wanted[0], what, place)
    elif isinstance(wanted, Kind):
        if not wanted.fits(value):
            raise ValueError(f"{what}: {place} must be {wanted.name}, found {_short(value)}.")
    elif isinstance(wanted, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{what}: {place} must be a list that is not empty, found {_short(value)}.")
        for number, entry in enumerate(value):
            _check(entry, wanted[0], what, f"{place}[{number}]")
    else:
        _check(value, TABLE, what, place or "the content")
        for name, kind in wanted.items():
            inner = f"{place}.{name}" if place else name
            if name not in value and not isinstance(kind, tuple):
                raise ValueError(f"{what}: it lacks {inner}.")
            _check(value.get(name), kind, what, inner)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _content(given: Any, argument: str, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What a result or its file holds, checked, and what messages about it begin with."""
    if hasattr(given, "to_dict"):
        content, what = json.loads(json.dumps(given.to_dict())), argument
    elif isinstance(given, (str, os.PathLike)):
        what = f"{argument}: {given} must be a file of `hf-lowrank {COMMANDS[argument]} --json`"
        try:
            content = json.loads(Path(given).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what}: it is no JSON ({error}).") from error
    else:
        raise ValueError(f"{argument} must be a result or its .json file, found a {type(given).__name__}.")
    _check(content, wanted, what)
    return content, what


# ---- Accuracy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """The scores of one model: a row a task, and the means relative to the baselines."""

    # task, num_series, horizon; WQL and MASE of "ours", "naive" and, where it is known, "dense"
    rows: tuple[dict[str, Any], ...]
    means: tuple[dict[str, Any], ...]
    settings: dict[str, Any]  # also the versions, flat
    has_dense: bool

    def results(self) -> list[EvalResult]:
        """For `model-index`; an undefined score (a constant series has no MASE) is left out."""
        return [
            EvalResult(
                task_type="time-series-forecasting",
                task_name="Time series forecasting",
                dataset_type=row["task"],
                dataset_name=row["task"],
                metric_type=metric.lower(),
                metric_name=metric,
                metric_value=row["ours"][metric],
            )
            for row in self.rows
            for metric in SHOWN_METRICS
            if row["ours"][metric] is not None
        ]


def read_scores(evaluation: Any) -> Scores:
    """Those of the one model that is neither Seasonal Naive nor the dense one.

    Raises:
        ValueError: It is no evaluation, one of several models, or an entry is missing or of another kind.
        OSError: The file cannot be read.
    """
    content, what = _content(evaluation, "evaluation", EVALUATION)
    by_cell = {(row["model"], row["task"]): row for row in content["results"]}
    if len(by_cell) < len(content["results"]):
        raise ValueError(f"{what}: results must have one row for each task and model.")
    against = content["settings"].get("against")
    ours = sorted({model for model, _ in by_cell} - {SEASONAL_NAIVE, against})
    if len(ours) != 1:
        raise ValueError(
            "evaluation must be of this model alone beside Seasonal Naive and the `against` model; found "
            f"{', '.join(ours) or 'none'}."
        )
    names = {"ours": ours[0], "naive": SEASONAL_NAIVE, "dense": against}
    rows = []
    for (model, task), row in by_cell.items():
        if model == ours[0]:
            cells = {side: by_cell.get((name, task), {}) for side, name in names.items()}
            scores = {side: {metric: cell.get(metric) for metric in SHOWN_METRICS} for side, cell in cells.items()}
            rows.append({"task": task, "num_series": row["num_series"], "horizon": row["horizon"]} | scores)
    settings = {name: value for name, value in content["settings"].items() if name not in ("against", "versions")}
    settings |= content["settings"]["versions"]
    means = tuple(_means(content["aggregate"].get(ours[0]), what))
    return Scores(tuple(rows), means, settings, against is not None)


def _means(aggregate: Any, what: str) -> list[dict[str, Any]]:
    titles = {"relative_to_dense": "the dense model", "relative_to_seasonal_naive": "Seasonal Naive"}
    place = "aggregate of the model"
    _check(aggregate, dict.fromkeys(titles, (dict.fromkeys(SHOWN_METRICS, MEAN),)), what, place)
    return [{"baseline": title} | aggregate[key] for key, title in titles.items() if aggregate.get(key) is not None]


# ---- Speed -----------------------------------------------------------------------------------------------------------


def read_speed(benchmark: Any) -> dict[str, Any]:
    """A row a case, and the machine.

    Raises:
        ValueError: It is no benchmark, or an entry is missing or of another kind.
        OSError: The file cannot be read.
    """
    content, _ = _content(benchmark, "benchmark", BENCHMARK)
    rows = []
    for result in content["results"]:
        sides = {"ours": result["model"], "dense": result["against"], "lean": result.get("against_lean")}
        measured = {name: side for name, side in sides.items() if side}
        rows.append(
            {
                "case": str(Case(**{name: result["case"][name] for name in CASE})),
                "seconds": {name: statistics.median(side["seconds"]) for name, side in measured.items()},
                "mebibytes": {name: _peak(side["memory"]) for name, side in measured.items()},
                "time_ratio": result["time_ratio"],
                "memory_ratio": result.get("memory_ratio"),
                "lean_time_ratio": result.get("lean_time_ratio"),
            }
        )
    return {"rows": rows, "machine": content["machine"], "has_lean": any(row["lean_time_ratio"] for row in rows)}


def _peak(memory: Sequence[Mapping[str, Any]]) -> float | None:
    """The median peak of the repeats in MiB; None where none was measured."""
    peaks = [repeat["peak"] for repeat in memory if repeat["peak"] is not None]
    return statistics.median(peaks) / 2**20 if peaks else None
