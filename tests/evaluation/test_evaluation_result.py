"""Scores as tables and as a picture: every number is the result's own, and no name breaks the text around it."""

from __future__ import annotations

import html
import math
from pathlib import Path

import matplotlib.image
import pytest
from typer.testing import CliRunner

from hf_lowrank.cli.app import app
from hf_lowrank.cli.evaluation import plot_result
from hf_lowrank.evaluation.result import EvaluationResult, EvaluationRow, mean_table, score_table

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
    table = score_table(result, "MASE")
    assert table.headings == ["task", "season", "Seasonal Naive", ODD, "dense"]
    assert table.rows == [
        ["m1", "12", "0.4000", "0.2000 (0.50)", "0.6000 (1.50)"],
        ["nile", "12", "0.8000", "1.2000 (1.50)", "0.2000 (0.25)"],
        ["flat", "12", "0.0000", "0.4000", "-"],  # relative to nothing, and undefined
    ]
    assert table.best == {(0, 3), (1, 4), (2, 2)}
    means = mean_table(result)
    assert [row[0] for row in means.rows] == [
        f"{metric}, of {baseline}"
        for baseline in ("Seasonal Naive", "dense")
        for metric in ("WQL", "MASE", "SQL", "RMSSE")
    ]
    assert means.headings == ["metric", ODD, "dense"]
    assert means.rows[4] == ["WQL, of dense", "0.500 (0.250 to 1.000)", ""]
    assert "3 tasks" in means.title


def test_a_notebook_shows_both_tables(result):
    shown = result._repr_html_()
    assert shown.count("<table>") == 2
    assert ODD not in shown
    assert html.escape(ODD) in shown


def test_an_unknown_metric_is_an_error(result):
    with pytest.raises(ValueError, match="metric must be one of WQL, MASE, SQL, RMSSE, found 'CRPS'"):
        score_table(result, "CRPS")


def test_the_picture_bears_what_is_undefined(result, tmp_path):
    plot_result(tmp_path / "scores.png", result, "WQL")
    assert matplotlib.image.imread(tmp_path / "scores.png").std() > 0.01
    nothing = EvaluationResult(
        result.results[:1], {"seasonal_naive": result.aggregate["seasonal_naive"]}, result.settings
    )
    plot_result(tmp_path / "nothing.png", nothing, "WQL")
    assert (tmp_path / "nothing.png").stat().st_size > 0


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("fev")
    pytest.importorskip("statsmodels")
    command = ["evaluate", "reference-bolt", "--tasks", "nile", "--plot", str(tmp_path / "nile.svg")]
    shown = CliRunner().invoke(app, [*command, "--format", "markdown", "--metric", "MASE"])
    assert shown.exit_code == 0, shown.output
    assert "| task | season | Seasonal Naive | reference-bolt |" in shown.stdout
    assert "| MASE, of Seasonal Naive | 0." in shown.stdout
    assert (tmp_path / "nile.svg").read_text().count("nile") >= 1
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, command)
    assert any(line.strip().startswith("nile ") and "(" in line for line in shown.stdout.splitlines())
    shown = CliRunner().invoke(app, [*command[:4], "--plot", str(tmp_path / "nile.doc")])
    assert shown.exit_code == 1
    assert "--plot must be a picture" in shown.output
