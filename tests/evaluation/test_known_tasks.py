"""fev-bench as fev defines it, run on small datasets that have the columns of official ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

fev = pytest.importorskip("fev")

import chronos_models  # noqa: E402

from hf_lowrank import LowRankChronos2Pipeline  # noqa: E402
from hf_lowrank.cli.app import app  # noqa: E402
from hf_lowrank.evaluation.evaluate import evaluate  # noqa: E402
from hf_lowrank.evaluation.known_tasks import FEV_BENCH, find_tasks, list_tasks  # noqa: E402
from hf_lowrank.evaluation.result import EvaluationResult  # noqa: E402

pytestmark = pytest.mark.usefixtures("evaluation_caches")

DEFINITIONS = {
    definition.get("task_name", definition["dataset_config"]): definition
    for definition in yaml.safe_load(FEV_BENCH.read_text())["tasks"]
}
TIMES = {
    "ETT_1W": pd.date_range("2016-07-03", periods=110, freq="W"),
    "rohlik_orders_1D": pd.date_range("2022-09-01", periods=600, freq="D"),  # its first cutoff is in May 2023
    "rossmann_1W": pd.date_range("2013-01-06", periods=134, freq="W"),
}


def store(mirror: Path, name: str) -> None:
    """Write two items with the columns of an official task: random, near zero, some values missing, one of the covariates text."""
    definition, rng = DEFINITIONS[name], np.random.default_rng(0)
    target = definition.get("target", "target")
    items = []
    for item in range(2):
        times = TIMES[name][item:]
        columns: dict[str, Any] = {"id": f"item {item}", "timestamp": times.to_numpy()}
        for column in [target] if isinstance(target, str) else target:
            values = 0.1 * rng.normal(size=len(times)).cumsum()
            columns[column] = np.where(rng.random(len(times)) < 0.02, np.nan, values)
        for column in definition.get("past_dynamic_columns", ()):
            columns[column] = rng.normal(size=len(times))
        for column in definition.get("known_dynamic_columns", ()):
            is_text = column in ("holiday", "StateHoliday")
            columns[column] = rng.choice(["none", "easter"], len(times)) if is_text else rng.normal(size=len(times))
        items.append(columns | {column: f"a {column}" for column in definition.get("static_columns", ())})
    folder = mirror / definition["dataset_config"]
    folder.mkdir(parents=True)
    pd.DataFrame(items).to_parquet(folder / "part-0.parquet")


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEV_DATASETS_PREFIX", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


def test_every_task_of_fev_bench_is_that_of_fev(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = list_tasks()
    assert (len(groups["fev_bench"]), len(groups["fev_bench_mini"])) == (100, 20)
    assert {task.main_metric for task in groups["fev_bench"]} == {"SQL"}
    assert set(groups["fev_bench_mini"]) <= set(groups["fev_bench"])
    monkeypatch.delenv("FEV_DATASETS_PREFIX", raising=False)
    monkeypatch.setattr(fev.Task, "load_full_dataset", lambda task, **options: None)  # the definitions alone
    for task in groups["fev_bench"]:
        assert task.to_fev().to_dict() == fev.Task(**DEFINITIONS[task.name]).to_dict()


@pytest.mark.parametrize("name", list(TIMES))
def test_official_tasks_have_the_scores_that_fev_gives(mirror: Path, name: str) -> None:
    store(mirror, name)
    tiny = LowRankChronos2Pipeline(chronos_models.chronos2(chronos={"max_output_patches": 16}))
    naive, found = evaluate({"tiny": tiny}, name).results
    task = fev.Task(**DEFINITIONS[name])
    expected = task.evaluation_summary(tiny.predict_fev(task)[0], model_name="tiny")
    assert expected["test_error"] == expected["SQL"]
    for metric in ("SQL", "MASE", "WQL"):  # of values near zero, which WQL divides by at least 1 here
        assert getattr(found, metric) == pytest.approx(expected[metric], rel=1e-5)
    assert found.num_windows == task.num_windows
    assert found.num_series * found.num_windows == expected["num_forecasts"]
    assert np.isfinite(naive.SQL)


def test_a_benchmark_goes_on_where_a_dataset_was_missing(mirror: Path, tmp_path: Path) -> None:
    names, cache = ["ETT_1W", "rohlik_orders_1D"], tmp_path / "cache"
    store(mirror, names[0])

    def run() -> EvaluationResult:
        return evaluate([], names, cache=cache)

    with pytest.raises(FileNotFoundError, match=r"task 'rohlik_orders_1D': FEV_DATASETS_PREFIX is .*rohlik_orders_1D"):
        run()
    (finished,) = cache.iterdir()
    seconds = json.loads(finished.read_text())["seconds"]
    store(mirror, names[1])
    assert run().results[0].seconds == seconds
    assert len(list(cache.iterdir())) == 2


def test_a_dataset_without_the_columns_is_named(mirror: Path) -> None:
    store(mirror, "ETT_1W")
    (path,) = mirror.rglob("*.parquet")
    pd.read_parquet(path).drop(columns=["HUFL"]).to_parquet(path)
    with pytest.raises(ValueError, match=r"task 'ETT_1W': the dataset autogluon/fev_datasets .*HUFL"):
        evaluate([], "ETT_1W")


def test_the_groups_are_listed_with_their_main_metrics(tmp_path: Path) -> None:
    listed = tmp_path / "tasks.json"
    shown = CliRunner().invoke(app, ["evaluate", "--list", "--json", str(listed)])
    assert shown.exit_code == 0, shown.output
    groups = json.loads(listed.read_text())
    assert {group: tasks[0]["main_metric"] for group, tasks in groups.items()} == {
        **dict.fromkeys(("m1_yearly", "packaged", "chronos_zeroshot", "chronos_in_domain"), "MASE"),
        **dict.fromkeys(("fev_bench", "fev_bench_mini"), "SQL"),
    }
    assert [task.name for task in find_tasks(["fev_bench_mini"])] == [
        task["name"] for task in groups["fev_bench_mini"]
    ]
