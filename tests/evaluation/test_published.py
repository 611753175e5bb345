"""Published scores are those that their authors report, and evaluated models stand among them by the same arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_lowrank.cli.app import app
from hf_lowrank.evaluation.aggregate import aggregate_scores
from hf_lowrank.evaluation.known_tasks import list_tasks
from hf_lowrank.evaluation.published import BENCHMARKS, published_figures, published_scores, standings
from hf_lowrank.evaluation.result import EvaluationResult
from hf_lowrank.evaluation.row import EvaluationRow

pytest.importorskip("fev")

# As the leaderboards of fev and GIFT-Eval show them; there chronos-t5-mini's 0.66451 is cut to 0.664.
ZEROSHOT_WQL = {
    "chronos-t5-tiny": 0.703,
    "chronos-t5-mini": 0.665,
    "chronos-t5-small": 0.654,
    "chronos-t5-base": 0.643,
    "chronos-t5-large": 0.656,
    "chronos-bolt-tiny": 0.668,
    "chronos-bolt-mini": 0.644,
    "chronos-bolt-small": 0.636,
    "chronos-bolt-base": 0.624,
}
FEV_BENCH_SKILL = {"chronos-2": 47.3, "chronos-bolt-base": 38.9}
GIFT_EVAL_CRPS = {"chronos-2": 0.485, "chronos-bolt-base": 0.574}


def published_rows(benchmark: str, model: str, name: str, tasks: list[str] | None = None) -> list[EvaluationRow]:
    """Of an evaluation that gave what is published of a model, and of Seasonal Naive."""
    metrics = {metric: published_scores(benchmark, metric) for metric in BENCHMARKS[benchmark]}
    return [
        EvaluationRow(
            task,
            shown,
            *(
                metrics[metric].at[task, key] if metric in metrics else np.nan
                for metric in ("WQL", "MASE", "SQL", "RMSSE")
            ),
            num_series=1,
            num_windows=1,
            horizon=1,
            seasonality=1,
            seconds=1.0,
        )
        for shown, key in (("seasonal_naive", "seasonal_naive"), (name, model))
        for task in tasks or published_figures()[benchmark]["tasks"]
    ]


def test_the_zeroshot_means_are_those_that_are_known() -> None:
    (standing,) = standings(published_rows("chronos_zeroshot", "chronos-bolt-base", "ours"))
    found = standing.frame["WQL"].round(3)
    assert {model: found[model] for model in ZEROSHOT_WQL} == ZEROSHOT_WQL
    assert standing.num_tasks == len(list_tasks()["chronos_zeroshot"])
    assert {task.name for task in list_tasks()["chronos_zeroshot"]} == set(
        published_figures()["chronos_zeroshot"]["tasks"]
    )


def test_the_skill_scores_and_gift_eval_are_those_that_are_known() -> None:
    (standing,) = standings(published_rows("fev_bench", "chronos-2", "ours"))
    found = (100 * standing.frame["skill_score"]).round(1)
    assert {model: found[model] for model in FEV_BENCH_SKILL} == FEV_BENCH_SKILL
    crps = standing.frame["gift_eval"].round(3)
    assert {model: crps[model] for model in GIFT_EVAL_CRPS} == GIFT_EVAL_CRPS


@pytest.mark.parametrize(("benchmark", "model"), [("chronos_zeroshot", "tirex"), ("fev_bench", "chronos-2")])
@pytest.mark.parametrize("name", ["mine/ours", None])
def test_a_model_with_the_published_scores_stands_where_it_was_published(
    benchmark: str, model: str, name: str | None
) -> None:
    """Over some of the tasks too, and under the same name."""
    tasks = published_figures()[benchmark]["tasks"][3:15]
    (standing,) = standings(published_rows(benchmark, model, name or model, tasks))
    assert (standing.num_tasks, standing.other_data) == (12, ())
    ours = standing.frame.loc[name or model]
    theirs = standing.frame.loc[model if name else f"{model} (published)"]
    aggregated = [column for column in standing.frame.columns if column in ("WQL", "MASE", "skill_score", "win_rate")]
    assert len(aggregated) == 2
    np.testing.assert_array_equal(ours[aggregated].to_list(), theirs[aggregated].to_list())
    assert (ours["is_published"], theirs["is_published"]) == (False, True)
    table = standing.table()
    assert [row[0] for i, row in enumerate(table.rows) if (i, 0) in table.best] == [name or model]
    assert published_figures()[benchmark]["date"] in table.note


def test_tasks_of_fev_bench_have_its_leaderboard() -> None:
    rows = published_rows("fev_bench", "chronos-2", "ours", published_figures()["fev_bench"]["tasks"][:8])
    rows = [EvaluationRow(**{**vars(row), "WQL": row.SQL, "MASE": row.SQL, "RMSSE": row.SQL}) for row in rows]
    result = EvaluationResult(tuple(rows), aggregate_scores(rows, None, num_bootstrap=10, seed=0), {"against": None})
    *_, table = result.tables()
    board = result.leaderboard()
    assert table.headings == ["model", "skill score, %", "win rate, %"]
    assert table.rows[0] == ["ours", *(f"{100 * value:.1f}" for value in board.loc["ours"])]


def test_other_data_is_said() -> None:
    rows = published_rows("chronos_zeroshot", "chronos-bolt-base", "ours", ["m5", "nn5"])
    changed = EvaluationRow(**{**vars(rows[0]), "WQL": rows[0].WQL * 1.01})
    (standing,) = standings([changed, *rows[1:]])
    assert standing.other_data == (changed.task,)
    note = standing.table().note
    assert "has the published scores: 1. Tasks on which it has not" in note
    assert note.endswith(f"{changed.task}.")


def test_the_seasonal_naive_of_fev_bench_is_another_one() -> None:
    rows = published_rows("fev_bench", "chronos-2", "ours", ["ETT_1D", "ETT_1H"])
    changed = [
        EvaluationRow(**{**vars(row), "SQL": row.SQL * 1.1}) if row.model == "seasonal_naive" else row for row in rows
    ]
    (standing,), (same,) = standings(changed), standings(rows)
    assert standing.other_data == ()
    assert standing.frame.equals(same.frame)  # scores are relative to the published one


def test_the_same_fingerprint_proves_the_same_data() -> None:
    content = published_figures()["fev_bench"]
    fingerprint = content["fingerprints"][content["tasks"].index("ETT_1D")][-1]
    rows = published_rows("fev_bench", "chronos-2", "ours", ["ETT_1D", "ETT_1H"])
    (standing,) = standings([EvaluationRow(**{**vars(row), "dataset_fingerprint": fingerprint}) for row in rows])
    assert (standing.same_data, standing.other_data) == (("ETT_1D",), ())
    assert standing.table().note.endswith("by their fingerprints: 1.")
    assert standing._repr_html_().count("<table>") == 1


def test_a_task_has_one_benchmark() -> None:
    first, second = (set(published_figures()[benchmark]["tasks"]) for benchmark in BENCHMARKS)
    assert not first & second
    for benchmark, metrics in BENCHMARKS.items():
        for metric in metrics:
            assert (published_scores(benchmark, metric) > 0).all(axis=None)


def test_the_command_shows_where_a_model_stands(tmp_path: Path) -> None:
    pytest.importorskip("aeon")
    report = tmp_path / "result.json"
    command = ["evaluate", "reference-bolt", "--beside", "published"]
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "--tasks", "m1_yearly", "--json", str(report)])
    assert shown.exit_code == 0, shown.output
    assert "over 1 of the 27 tasks of chronos_zeroshot" in " ".join(shown.stdout.split())
    assert "Seasonal Naive's scores are not" not in " ".join(
        shown.stdout.split()
    )  # our m1_yearly is the published one
    (standing,) = json.loads(report.read_text())["beside_published"]
    assert {"reference-bolt", "chronos-bolt-base", "tirex"} <= {model["model"] for model in standing["models"]}
    assert "github.com/autogluon/fev/tree/" in standing["source"]
    shown = CliRunner().invoke(app, [*command, "--tasks", "nile"])
    assert shown.exit_code == 1
    assert "must have published scores" in shown.stderr
