"""Scores as tables and as a picture: every number is the result's own, and no name breaks the text around it."""

from __future__ import annotations

import html
import io
import math
import re
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_lowrank.cli.app import app
from hf_lowrank.cli.output import fits, in_terminal
from hf_lowrank.evaluation.plots import plot_scores
from hf_lowrank.evaluation.result import EvaluationResult
from hf_lowrank.evaluation.row import EvaluationRow

ODD = "a|b<c>&[red]"
SCORES = {"m1": (0.2, 0.1, 0.3), "nile": (0.4, 0.6, 0.1), "flat": (0.0, 0.2, math.nan)}
MEAN = {"geometric_mean": 0.5, "low": 0.25, "high": 1.0, "num_tasks": 2}


@pytest.fixture
def result() -> EvaluationResult:
    models = ("seasonal_naive", ODD, "dense")
    rows = tuple(
        EvaluationRow(task, model, score, 2 * score, 3 * score, 4 * score, 1, 1, 6, 12, 0.1)
        for task, scores in SCORES.items()
        for model, score in zip(models, scores)
    )
    means = dict.fromkeys(("WQL", "MASE", "SQL", "RMSSE"), MEAN)
    return EvaluationResult(
        rows,
        {model: {"relative_to_seasonal_naive": means, "relative_to_dense": means} for model in models},
        {"against": "dense"},
    )


def test_a_row_is_a_task_and_a_column_a_model(result):
    table, means = result.tables("MASE")
    assert table.headings == ["task", "season", "Seasonal Naive", ODD, "dense"]
    assert table.rows == [
        ["m1", "12", "0.4000", "0.2000 (0.50)", "0.6000 (1.50)"],
        ["nile", "12", "0.8000", "1.2000 (1.50)", "0.2000 (0.25)"],
        ["flat", "12", "0.0000", "0.4000", "-"],  # relative to nothing, and undefined
    ]
    assert table.best == {(0, 3), (1, 4), (2, 2)}
    assert means.headings == ["metric", "model", "of Seasonal Naive", "of dense"]
    mean = "0.500 (0.250 to 1.000)"
    assert means.rows == [
        row
        for metric in ("WQL", "MASE", "SQL", "RMSSE")
        for row in ([metric, ODD, mean, mean], [metric, "dense", mean, ""])
    ]
    assert "3 tasks" in means.title


def test_relative_scores_are_those_of_every_table_and_picture(result):
    relative = result.relative_scores("MASE")
    assert list(relative.index) == list(SCORES)
    np.testing.assert_allclose(relative[ODD], [0.5, 1.5, np.nan])
    assert relative["seasonal_naive"].tolist()[:2] == [1, 1]


NAMES = [
    "amazon/chronos-bolt-base",
    "me/chronos-bolt-base",
    "/home/ann/models/chronos-bolt-base-a-quarter",
    "reference",
]


@pytest.mark.parametrize("width", [200, 140, 100, 80, 60])
def test_no_word_is_broken_in_a_terminal_of_any_width(width):
    """Every cell is on one line, every model is in a table, and what a letter stands for is said."""
    models = ("seasonal_naive", *NAMES)
    rows = tuple(
        EvaluationRow(task, model, *[0.1 + 0.01 * i] * 4, 1, 1, 6, 12, 0.1)
        for task in ("vic_electricity_demand", "nile")
        for i, model in enumerate(models)
    )
    means = dict.fromkeys(("WQL", "MASE", "SQL", "RMSSE"), MEAN)
    aggregate = {model: {"relative_to_seasonal_naive": means, "relative_to_dense": means} for model in models}
    console = Console(width=width, file=io.StringIO())
    tables = EvaluationResult(rows, aggregate, {"against": NAMES[0]}).tables("WQL", partial(fits, console))
    for table in tables:
        console.print(in_terminal(table))
    lines = console.file.getvalue().splitlines()
    by_task = [table for table in tables if table.headings[0] == "task"]
    assert [heading for table in by_task for heading in table.headings[2:]] == (
        ["Seasonal Naive", *NAMES]
        if width == 200
        else ["Seasonal Naive", "amazon/chronos-bolt-base", "me/chronos-bolt-base", NAMES[2].split("/")[-1], NAMES[3]]
        if width == 140
        else list("ABCDE")
    )
    for table in tables if width >= 80 else by_task:
        for row in table.rows:
            cells = [cell for cell in row if cell]
            assert any(re.fullmatch(r"\s*" + r"\s+".join(map(re.escape, cells)) + r"\s*", line) for line in lines), row
        if width < 100:
            assert "A: Seasonal Naive, B: amazon/chronos-bolt-base" in table.note
    assert all("(" in row[3] for row in by_task[0].rows) == (width >= 100)
    assert len(by_task) == (1 if width > 60 else 2)


def test_a_notebook_shows_both_tables(result):
    shown = result._repr_html_()
    assert shown.count("<table>") == 2
    assert ODD not in shown
    assert html.escape(ODD) in shown


def test_an_unknown_metric_is_an_error(result):
    with pytest.raises(ValueError, match="metric must be one of WQL, MASE, SQL, RMSSE, found 'CRPS'"):
        result.tables("CRPS")


def test_the_picture_bears_what_is_undefined(result, tmp_path):
    plot_scores(result, tmp_path / "scores.png")
    assert matplotlib.image.imread(tmp_path / "scores.png").std() > 0.01
    nothing = EvaluationResult(
        result.results[:1], {"seasonal_naive": result.aggregate["seasonal_naive"]}, result.settings
    )
    plot_scores(nothing, tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").stat().st_size > 0


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("fev")
    pytest.importorskip("statsmodels")
    command = ["evaluate", "reference-bolt", "--tasks", "nile", "--plot", str(tmp_path / "nile.svg")]
    tables = ["--tables", str(tmp_path / "nile.md")]
    shown = CliRunner().invoke(app, [*command, "--format", "markdown", "--metric", "MASE", *tables])
    assert shown.exit_code == 0, shown.output
    assert "| task | season | Seasonal Naive | reference-bolt |" in shown.stdout
    assert "| MASE | reference-bolt | 0." in shown.stdout
    assert (tmp_path / "nile.md").read_text() == shown.stdout
    assert (tmp_path / "nile.svg").read_text().count("nile") >= 1
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, command)
    assert any(line.strip().startswith("nile ") and "(" in line for line in shown.stdout.splitlines())
    shown = CliRunner().invoke(app, [*command[:4], "--plot", str(tmp_path / "nile.doc")])
    assert shown.exit_code == 1
    assert "--plot must be a picture" in shown.output
