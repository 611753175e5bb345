"""Groups in an evaluation: what chronos' own `predict_fev` and fev's own scores say of them, and who reads covariates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chronos_models
import numpy as np
import pandas as pd
import pytest
import torch
from chronos import Chronos2Pipeline
from typer.testing import CliRunner

fev = pytest.importorskip("fev")

from hf_lowrank import evaluate, file_task  # noqa: E402
from hf_lowrank.checkpoints.pipelines import as_pipeline  # noqa: E402
from hf_lowrank.cli.app import app  # noqa: E402
from hf_lowrank.evaluation.scores import METRICS  # noqa: E402
from hf_lowrank.evaluation.tasks import EvaluationTask  # noqa: E402

pytestmark = pytest.mark.usefixtures("evaluation_caches")

COLUMNS: dict[str, Any] = {
    "target": ["units", "returns"],
    "past_covariates": ["visitors"],
    "known_covariates": ["price", "holiday"],
    "id_column": "shop",
    "timestamp_column": "day",
}


def shops(lengths: dict[str, int]) -> pd.DataFrame:
    """Shops of unequal lengths, with missing values, one target that is never observed, a category and rows of the future alone."""
    rng = np.random.default_rng(0)
    frames = []
    for shop, length in lengths.items():
        days = np.arange(length + 3)
        frame = pd.DataFrame(
            {
                "shop": shop,
                "day": pd.date_range("2024-01-01", periods=len(days), freq="D"),
                "units": 20 + 5 * np.sin(days) + rng.normal(size=len(days)),
                "returns": rng.gamma(2.0, size=len(days)),
                "visitors": rng.poisson(30, len(days)),
                "price": rng.uniform(1, 2, len(days)),
                "holiday": np.where(days % 7 == 0, "sunday", np.where(days % 5 == 0, "fair", None)),
            }
        )
        frame.loc[[4, 9], "units"] = np.nan
        frame.loc[length:, ["units", "returns", "visitors"]] = np.nan  # the future, of which nothing can be scored
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    # "10" comes before "9" in fev's order of items, and after it in the file.
    shops({"9": 45, "10": 60, "a": 38}).to_csv(tmp_path / "sales.csv", index=False)
    return tmp_path / "sales.csv"


@pytest.fixture
def pipeline() -> Chronos2Pipeline:
    torch.manual_seed(0)
    return as_pipeline(chronos_models.dense_chronos2())


def by_target(task: EvaluationTask, path: Path, **arguments: Any) -> list[EvaluationTask]:
    """The same task of each target alone, without covariates."""
    return [
        file_task(path, horizon=task.horizon, num_windows=task.num_windows, **arguments | {"target": target})
        for target in task.targets
    ]


@pytest.mark.parametrize("num_targets", [1, 2])  # chronos encodes categories in two ways
def test_chronos2_has_the_scores_of_chronos_and_fev(path: Path, pipeline: Chronos2Pipeline, num_targets: int) -> None:
    columns = COLUMNS | {"target": COLUMNS["target"][:num_targets]}
    task = file_task(path, horizon=4, num_windows=2, **columns)
    naive, found = evaluate({"found": pipeline}, task, batch_size=2).results
    assert (naive.num_series, naive.num_windows) == (3 * num_targets, 2)
    theirs = task.to_fev()
    predictions, _ = pipeline.predict_fev(theirs, batch_size=100)
    summary = theirs.evaluation_summary(predictions, model_name="found")
    for metric in ("WQL", "MASE", "SQL"):
        assert getattr(found, metric) == pytest.approx(summary[metric], rel=2e-5)
    assert np.isfinite([getattr(naive, metric) for metric in METRICS]).all()
    # The compressed one reads groups as well; at full rank it is the same model.
    lowrank = as_pipeline(chronos_models.full_rank(pipeline.model))
    (_, same) = evaluate({"same": lowrank}, task).results
    assert pytest.approx(found.WQL, rel=1e-4) == same.WQL
    # Covariates and the other targets are read.
    targets = by_target(task, path, id_column="shop", timestamp_column="day")
    alone = [evaluate({"alone": pipeline}, one).results[1].WQL for one in targets]
    assert np.mean(alone) != pytest.approx(found.WQL, rel=1e-3)


def test_other_models_forecast_each_target_by_itself(path: Path) -> None:
    torch.manual_seed(0)
    bolt = as_pipeline(chronos_models.dense_bolt())
    task = file_task(path, horizon=4, num_windows=2, **COLUMNS)
    together = evaluate({"bolt": bolt}, task, batch_size=1).results
    alone = [
        row
        for one in by_target(task, path, id_column="shop", timestamp_column="day")
        for row in evaluate({"bolt": bolt}, one).results
    ]
    for row in together:
        for metric in METRICS:
            mean = np.mean([getattr(one, metric) for one in alone if one.model == row.model])
            assert getattr(row, metric) == pytest.approx(mean, rel=1e-5), (row.model, metric)
        assert np.shape(row.by_series["WQL"]) == (4, 3)  # a row for each window and target


def test_a_known_covariate_that_tells_the_target_is_used(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    stamps = pd.date_range("2024-01-01", periods=300, freq="h")
    frames = []
    for item in range(8):
        told = rng.normal(size=300)
        noise = rng.normal(scale=0.1, size=300)
        frames.append(
            pd.DataFrame({"item_id": item, "timestamp": stamps, "target": 10 + 2 * told + noise, "told": told})
        )
    pd.concat(frames).to_csv(tmp_path / "told.csv", index=False)
    arguments = {"horizon": 24, "seasonality": 1}
    with_it, without = (
        evaluate("reference-2", file_task(tmp_path / "told.csv", **arguments, **more)).results[1].WQL
        for more in ({"known_covariates": "told"}, {"id_column": "item_id"})
    )
    assert with_it < 0.5 * without


def test_the_command_takes_the_columns(path: Path, tmp_path: Path, pipeline: Chronos2Pipeline) -> None:
    pipeline.model.config.chronos_pipeline_class = "Chronos2Pipeline"
    pipeline.model.save_pretrained(tmp_path / "model")
    options = [
        "--target",
        "units",
        "--target",
        "returns",
        "--past-covariates",
        "visitors",
        "--known-covariates",
        "price",
    ]
    options += ["--known-covariates", "holiday", "--id-column", "shop", "--timestamp-column", "day"]
    command = ["evaluate", str(tmp_path / "model"), *options]
    result = CliRunner().invoke(
        app, [*command, "--file", str(path), "--horizon", "4", "--csv", str(tmp_path / "s.csv")]
    )
    assert result.exit_code == 0, result.output
    (_, found) = evaluate({"found": pipeline}, file_task(path, horizon=4, **COLUMNS)).results
    assert pd.read_csv(tmp_path / "s.csv").WQL[1] == pytest.approx(found.WQL, rel=1e-6)
    result = CliRunner().invoke(app, [*command, "--tasks", "m1_yearly"])
    assert result.exit_code != 0
    assert "those of --file, which is missing" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"target": "profit"}, "profit"),
        ({"target": []}, "target must name at least one column"),
        ({"known_covariates": "units"}, "must name different columns, found units twice"),
        ({"past_covariates": "day2"}, "must be numbers or categories"),
        ({"target": 3}, "target must be the name of a column or a list of names, found 3"),
    ],
)
def test_columns_that_cannot_be_are_said(path: Path, columns: dict[str, Any], message: str) -> None:
    frame = pd.read_csv(path, parse_dates=["day"])
    frame.assign(day2=frame["day"]).to_parquet(path.with_suffix(".parquet"))
    with pytest.raises(ValueError, match=message):
        file_task(path.with_suffix(".parquet"), horizon=4, **COLUMNS | {"target": "units"} | columns)
