"""Scores as people read them: a row for each task, a column for each model, in a terminal, in Markdown, HTML or CSV."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .evaluate import EvaluationResult
from .naive import SEASONAL_NAIVE
from .scores import METRICS

__all__ = ["WRITERS", "Table", "mean_table", "score_table"]

BASELINE = "Seasonal Naive"  # for people


@dataclass(frozen=True)
class Table:
    """Cells of text; `best` are the (row, column) of those that are marked."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


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


def _marked(table: Table, escape: Callable[[str], str], before: str, after: str) -> list[list[str]]:
    """The rows as another language has them, the best cells between two marks."""
    return [
        [f"{before}{escape(cell)}{after}" if (i, j) in table.best else escape(cell) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]


def _markdown(table: Table) -> str:
    def escape(cell: str) -> str:
        return cell.replace("|", "\\|")

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = "|---" + "|---:" * (len(table.headings) - 1) + "|"
    rows = map(line, _marked(table, escape, "**", "**"))
    return "\n".join([f"{table.title}:", "", line(map(escape, table.headings)), rule, *rows, ""])


def _html(table: Table) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    lines = [
        "<table>",
        f"<caption>{html.escape(table.title)}</caption>",
        f"<thead>{line(map(html.escape, table.headings), 'th')}</thead>",
        "<tbody>",
        *(line(row, "td") for row in _marked(table, html.escape, "<b>", "</b>")),
        "</tbody>",
        "</table>",
    ]
    return "\n".join([*lines, ""])


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.headings)
    writer.writerows(table.rows)
    return text.getvalue()


WRITERS = {"markdown": _markdown, "html": _html, "csv": _csv}
