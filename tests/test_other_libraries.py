"""Forecasting libraries take a compressed checkpoint where they take a Chronos; each is tested where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from chronos import ChronosPipeline
from chronos_models import CHRONOS2_RANKS, chronos2
from test_examples_short import run

from hf_lowrank import (
    LowRankChronos2Model,
    LowRankChronos2Pipeline,
    LowRankT5ForConditionalGeneration,
    compress_pretrained,
)

pytest.importorskip("sktime", reason="pip install sktime")

HORIZON = 7
OPTIONS = {"config": {"torch_dtype": torch.float32}, "seed": 3}
# sktime's own copy of chronos, and chronos itself.
SOURCES = {"copy": {}, "chronos": {"use_source_package": True}}


@pytest.fixture(scope="module")
def compressed_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    compress_pretrained("reference", uniform=6, calibration=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compressed_chronos2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chronos2")
    chronos2(**CHRONOS2_RANKS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def months() -> pd.Series:
    values = 10 + np.sin(np.arange(60) / 2) + 0.1 * np.arange(60)
    return pd.Series(values, pd.period_range("2018-01", periods=60, freq="M"), name="sales")


@pytest.mark.parametrize("source", SOURCES)
def test_sktime_forecasts_with_a_compressed_t5(compressed_t5: Path, months: pd.Series, source: str) -> None:
    from sktime.forecasting.chronos import ChronosForecaster

    forecaster = ChronosForecaster(str(compressed_t5), **SOURCES[source], **OPTIONS)
    forecast = forecaster.fit(months).predict(fh=range(1, HORIZON + 1))
    assert type(forecaster.model_pipeline.model.model) is LowRankT5ForConditionalGeneration

    pipeline = ChronosPipeline.from_pretrained(compressed_t5, dtype=torch.float32)
    transformers.set_seed(3)
    samples = pipeline.predict(torch.tensor(months.to_numpy(np.float32)), HORIZON)  # (1, 20, 7)
    np.testing.assert_allclose(forecast.to_numpy(), np.median(samples[0], axis=0), rtol=1e-5)
    assert list(forecast.index) == list(pd.period_range("2023-01", periods=HORIZON, freq="M"))


def test_sktime_forecasts_with_a_compressed_chronos2(compressed_chronos2: Path, months: pd.Series) -> None:
    from sktime.forecasting.chronos2 import Chronos2Forecaster

    forecaster = Chronos2Forecaster(str(compressed_chronos2), **OPTIONS)
    forecast = forecaster.fit(months).predict(fh=range(1, HORIZON + 1))
    assert type(forecaster.model_pipeline.model) is LowRankChronos2Model

    pipeline = LowRankChronos2Pipeline.from_pretrained(compressed_chronos2)
    history = torch.tensor(months.to_numpy(np.float32))[None, None]  # (series, variates, time)
    quantiles, _ = pipeline.predict_quantiles(history, HORIZON, [0.5])
    np.testing.assert_allclose(forecast.to_numpy(), quantiles[0][0, :, 0], rtol=1e-5)


@pytest.mark.parametrize("checkpoint", ["compressed_t5", "compressed_chronos2"])
def test_the_example_prints_a_forecast_beside_what_happened(checkpoint: str, request: pytest.FixtureRequest) -> None:
    printed = run("with_sktime", request.getfixturevalue(checkpoint), "--horizon", 3)
    heading, *rows = (line.split() for line in printed.splitlines() if line.startswith((" ", "1960-")))
    assert heading == ["passengers", "forecast"]
    # The last months of the famous series, and a number for each.
    assert [(row[0], float(row[1])) for row in rows] == [("1960-10", 461.0), ("1960-11", 390.0), ("1960-12", 432.0)]
    assert all(np.isfinite(float(row[2])) for row in rows)
