"""Forecasting libraries take a compressed checkpoint where they take a Chronos; each is tested where it is installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from chronos import BaseChronosPipeline, ChronosPipeline
from chronos_models import dense_chronos2
from test_examples_short import run, run_script

from hf_lowrank import (
    LowRankChronos2Model,
    LowRankChronos2Pipeline,
    LowRankChronosBoltModelForForecasting,
    LowRankT5ForConditionalGeneration,
    compress_pretrained,
)

HORIZON = 7
MODELS = {
    "t5": LowRankT5ForConditionalGeneration,
    "bolt": LowRankChronosBoltModelForForecasting,
    "chronos2": LowRankChronos2Model,
}

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A compressed checkpoint of every family."""
    folder = tmp_path_factory.mktemp("compressed")
    dense = {"t5": "reference", "bolt": "reference-bolt", "chronos2": dense_chronos2()}
    for family, model in dense.items():
        compress_pretrained(model, uniform=6, calibration=None).save_pretrained(folder / family)
    return {family: folder / family for family in dense}


# sktime

OPTIONS = {"config": {"torch_dtype": torch.float32}, "seed": 3}
# sktime's own copy of chronos, and chronos itself.
SOURCES = {"copy": {}, "chronos": {"use_source_package": True}}


@pytest.fixture(scope="module")
def sktime() -> ModuleType:
    return pytest.importorskip("sktime", reason="pip install sktime")


@pytest.fixture(scope="module")
def months() -> pd.Series:
    values = 10 + np.sin(np.arange(60) / 2) + 0.1 * np.arange(60)
    return pd.Series(values, pd.period_range("2018-01", periods=60, freq="M"), name="sales")


@pytest.mark.parametrize("source", SOURCES)
def test_sktime_forecasts_with_a_compressed_t5(
    sktime: ModuleType, checkpoints: dict[str, Path], months: pd.Series, source: str
) -> None:
    from sktime.forecasting.chronos import ChronosForecaster

    forecaster = ChronosForecaster(str(checkpoints["t5"]), **SOURCES[source], **OPTIONS)
    forecast = forecaster.fit(months).predict(fh=range(1, HORIZON + 1))
    assert type(forecaster.model_pipeline.model.model) is MODELS["t5"]

    pipeline = ChronosPipeline.from_pretrained(checkpoints["t5"], dtype=torch.float32)
    transformers.set_seed(3)
    samples = pipeline.predict(torch.tensor(months.to_numpy(np.float32)), HORIZON)  # (1, 20, 7)
    np.testing.assert_allclose(forecast.to_numpy(), np.median(samples[0], axis=0), rtol=1e-5)
    assert list(forecast.index) == list(pd.period_range("2023-01", periods=HORIZON, freq="M"))


def test_sktime_forecasts_with_a_compressed_chronos2(
    sktime: ModuleType, checkpoints: dict[str, Path], months: pd.Series
) -> None:
    from sktime.forecasting.chronos2 import Chronos2Forecaster

    forecaster = Chronos2Forecaster(str(checkpoints["chronos2"]), **OPTIONS)
    forecast = forecaster.fit(months).predict(fh=range(1, HORIZON + 1))
    assert type(forecaster.model_pipeline.model) is MODELS["chronos2"]

    pipeline = LowRankChronos2Pipeline.from_pretrained(checkpoints["chronos2"])
    history = torch.tensor(months.to_numpy(np.float32))[None, None]  # (series, variates, time)
    quantiles, _ = pipeline.predict_quantiles(history, HORIZON, [0.5])
    np.testing.assert_allclose(forecast.to_numpy(), quantiles[0][0, :, 0], rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "chronos2"])
def test_the_sktime_example_prints_a_forecast_beside_what_happened(
    sktime: ModuleType, checkpoints: dict[str, Path], family: str
) -> None:
    printed = run("with_sktime", checkpoints[family], "--horizon", 3)
    heading, *rows = (line.split() for line in printed.splitlines() if line.startswith((" ", "1960-")))
    assert heading == ["passengers", "forecast"]
    # The last months of the famous series, and a number for each.
    assert [(row[0], float(row[1])) for row in rows] == [("1960-10", 461.0), ("1960-11", 390.0), ("1960-12", 432.0)]
    assert all(np.isfinite(float(row[2])) for row in rows)


# AutoGluon-TimeSeries

# Not the levels that Chronos-Bolt was trained for.
LEVELS = [0.1, 0.25, 0.8]
COLUMNS = ["mean", *map(str, LEVELS)]


@pytest.fixture(scope="module")
def autogluon() -> ModuleType:
    return pytest.importorskip("autogluon.timeseries", reason="pip install autogluon.timeseries")


@pytest.fixture(scope="module")
def shops(autogluon: ModuleType) -> Any:
    """A `TimeSeriesDataFrame` of the monthly sales of three shops and their promotions; one shop is younger."""
    tables = []
    for i, length in enumerate([60, 60, 45]):
        time = np.arange(60 - length, 60)
        months = pd.date_range("2018-01-01", periods=60, freq="MS")[time]
        promotion = (time % (5 + i) == 0).astype(float)
        sales = 10 + i + np.sin(time / 2 + i) + promotion
        tables.append(
            pd.DataFrame({"item_id": f"shop {i}", "timestamp": months, "target": sales, "promotion": promotion})
        )
    return autogluon.TimeSeriesDataFrame.from_data_frame(pd.concat(tables))


def fitted(autogluon: ModuleType, folders: dict[str, Path], shops: Any, path: Path, **settings: Any) -> Any:
    """A `TimeSeriesPredictor` in which every checkpoint is a model, with AutoGluon's settings of the model."""
    predictor = autogluon.TimeSeriesPredictor(
        prediction_length=HORIZON,
        known_covariates_names=["promotion"],
        quantile_levels=LEVELS,
        path=path,
        verbosity=0,
    )
    models: dict[str, list[dict[str, Any]]] = {"Chronos": [], "Chronos2": []}
    for family, folder in folders.items():
        if family == "chronos2":
            models["Chronos2"].append({"model_path": str(folder), **settings})
        else:
            models["Chronos"].append({"model_path": str(folder), "torch_dtype": "float32", **settings})
    return predictor.fit(shops, hyperparameters=models, enable_ensemble=False)


@pytest.fixture(scope="module")
def predictor(
    autogluon: ModuleType, checkpoints: dict[str, Path], shops: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    return fitted(autogluon, checkpoints, shops, tmp_path_factory.mktemp("autogluon") / "predictor")


@pytest.fixture(scope="module")
def future(predictor: Any, shops: Any) -> pd.DataFrame:
    """The promotions of the months to forecast."""
    future = predictor.make_future_data_frame(shops)
    return future.assign(promotion=(np.arange(len(future)) % 3 == 0).astype(float))


def name_of(predictor: Any, family: str) -> str:
    """AutoGluon's name of a model: `Chronos[.../t5]`, `Chronos[.../bolt]`, `Chronos2`."""
    (name,) = (name for name in predictor.model_names() if re.search(rf"{family}\]?$", name, re.IGNORECASE))
    return name


def pipeline_in(predictor: Any, name: str) -> BaseChronosPipeline:
    """The pipeline that a model of AutoGluon forecasts with."""
    predictor.persist([name])
    return predictor._trainer.models[name].most_recent_model._model_pipeline


def forecast_directly(folder: Path, shops: Any, future: pd.DataFrame) -> pd.DataFrame:
    """What the pipeline itself forecasts for the same series, in AutoGluon's columns."""
    pipeline = BaseChronosPipeline.from_pretrained(folder, dtype=torch.float32)
    options: dict[str, Any] = {}
    if isinstance(pipeline, LowRankChronos2Pipeline):
        # AutoGluon's defaults: the series of a batch are one group.
        options = {"future_df": future, "cross_learning": True}
    transformers.set_seed(3)
    iter(torch.utils.data.DataLoader([0]))  # draws a random number, and AutoGluon reads its series through one
    forecast = pipeline.predict_df(
        shops.reset_index().to_data_frame(), prediction_length=HORIZON, quantile_levels=LEVELS, **options
    )
    return forecast.rename(columns={"predictions": "mean"})


@pytest.mark.parametrize("family", MODELS)
def test_autogluon_forecasts_as_the_pipeline_does(
    family: str, predictor: Any, checkpoints: dict[str, Path], shops: Any, future: pd.DataFrame
) -> None:
    name = name_of(predictor, family)
    assert type(pipeline_in(predictor, name).inner_model) is MODELS[family]
    forecast = predictor.predict(shops, future, model=name, random_seed=3)
    expected = forecast_directly(checkpoints[family], shops, future)
    assert list(forecast.columns) == COLUMNS
    np.testing.assert_allclose(forecast.to_numpy(), expected[COLUMNS].to_numpy(), rtol=1e-5)  # T5: the same samples
    pd.testing.assert_frame_equal(forecast.reset_index()[["item_id", "timestamp"]], expected[["item_id", "timestamp"]])


@pytest.mark.parametrize("family", MODELS)
def test_autogluon_gives_known_covariates_to_chronos2_alone(
    family: str, predictor: Any, shops: Any, future: pd.DataFrame
) -> None:
    otherwise = future.assign(promotion=1 - future["promotion"])
    one, other = (
        predictor.predict(shops, promotions, model=name_of(predictor, family)).to_numpy()
        for promotions in (future, otherwise)
    )
    assert np.allclose(one, other) != (family == "chronos2")


# A saved predictor where nothing has imported hf_lowrank: before it is imported no model forecasts, afterwards all do.
ELSEWHERE = """
import sys

import pandas as pd
from autogluon.timeseries import TimeSeriesPredictor

predictor = TimeSeriesPredictor.load(sys.argv[1])
shops, future = map(pd.read_pickle, sys.argv[2:4])


def forecast(name):
    return predictor.predict(shops, future, model=name, random_seed=3)


for name in predictor.model_names():
    try:
        forecast(name)
    except RuntimeError:
        continue
    raise AssertionError(f"{name} needs no import")

import hf_lowrank

pd.to_pickle({name: forecast(name).to_numpy() for name in predictor.model_names()}, sys.argv[4])
"""


def test_a_saved_autogluon_predictor_forecasts_the_same_in_a_new_process(
    tmp_path: Path, predictor: Any, shops: Any, future: pd.DataFrame
) -> None:
    shops.to_pickle(tmp_path / "shops")
    future.to_pickle(tmp_path / "future")
    arguments = (predictor.path, tmp_path / "shops", tmp_path / "future", tmp_path / "forecasts")
    run_script(sys.executable, "-c", ELSEWHERE, *arguments, OMP_NUM_THREADS=str(torch.get_num_threads()))
    forecasts = pd.read_pickle(tmp_path / "forecasts")
    assert len(forecasts) == len(MODELS)
    for name, forecast in forecasts.items():
        expected = predictor.predict(shops, future, model=name, random_seed=3, use_cache=False)
        np.testing.assert_allclose(forecast, expected.to_numpy(), rtol=1e-5)


@pytest.mark.parametrize("family", ["t5", "bolt"])
def test_autogluon_fine_tunes_a_compressed_model(
    tmp_path: Path, family: str, autogluon: ModuleType, checkpoints: dict[str, Path], shops: Any, future: pd.DataFrame
) -> None:
    settings = {"fine_tune_steps": 2, "fine_tune_batch_size": 4, "fine_tune_lr": 1e-3}
    settings |= {"fine_tune_shuffle_buffer_size": 8}  # it is filled before the first step
    folders = {family: checkpoints[family]}
    tuned = fitted(autogluon, folders, shops, tmp_path / "predictor", fine_tune=True, **settings)
    tuned.export_model(tmp_path / "exported", model=name_of(tuned, family))
    before, after = (
        BaseChronosPipeline.from_pretrained(folder, dtype=torch.float32).inner_model
        for folder in (checkpoints[family], tmp_path / "exported")
    )
    assert type(after) is type(pipeline_in(tuned, name_of(tuned, family)).inner_model) is MODELS[family]
    assert after.config.attention_ranks == before.config.attention_ranks
    states = before.encoder.state_dict(), after.encoder.state_dict()
    assert states[0].keys() == states[1].keys()
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    forecast = tuned.predict(shops, future, random_seed=3)
    expected = forecast_directly(tmp_path / "exported", shops, future)
    np.testing.assert_allclose(forecast.to_numpy(), expected[COLUMNS].to_numpy(), rtol=1e-5)


def test_the_autogluon_example_prints_a_leaderboard_and_a_forecast(tmp_path: Path, autogluon: ModuleType) -> None:
    printed = run("with_autogluon", tmp_path / "climate", "--horizon", 3)
    assert re.findall(r"Chronos\[\S+?(reference\S*)\] +-\d", printed)
    rows = re.findall(r"(\S+_monthly )? *(\d{4}-\d\d-\d\d) +(\S+) +(\S+) +(\S+)", printed)
    assert [row[1] for row in rows] == [f"{year}-{month}-01" for year in (2002, 2011) for month in ("01", "02", "03")]
    assert all(float(low) < float(median) < float(high) for *_, low, median, high in rows)
