"""What chronos promises of its pipelines, kept by those of compressed checkpoints: dtypes, shapes, gaps, horizons, quantile levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline
from chronos_models import BOLT_RANKS, CHRONOS2_RANKS, DECILES, bolt, chronos2
from conftest import randomise
from torch.testing import assert_close

from hf_lowrank import LowRankT5ForConditionalGeneration

FAMILIES = ["t5", "bolt", "chronos2"]
TRAINED = {"bolt": DECILES, "chronos2": [0.01, *DECILES, 0.99]}
HORIZON = {"t5": 8, "bolt": 6, "chronos2": 15}  # the longest in one pass
D_MODEL = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")


@pytest.fixture
def load(tmp_path, tiny_config, mixed_ranks, tiny_chronos_config) -> Callable[..., BaseChronosPipeline]:
    """A function that saves the compressed model of a family and loads its pipeline, with any argument of `from_pretrained`."""

    def load(family: str, **arguments: Any) -> BaseChronosPipeline:
        if family == "t5":
            config = tiny_config(**mixed_ranks, chronos_config=vars(tiny_chronos_config).copy(), eos_token_id=1)
            model = randomise(LowRankT5ForConditionalGeneration(config))
        else:
            model = bolt(**BOLT_RANKS) if family == "bolt" else chronos2(**CHRONOS2_RANKS)
        model.save_pretrained(tmp_path)
        return BaseChronosPipeline.from_pretrained(tmp_path, **arguments)

    return load


def predict(pipeline: BaseChronosPipeline, inputs: Any, **options: Any) -> list[torch.Tensor]:
    """Of each series samples or quantiles, from one random state."""
    torch.manual_seed(4)
    return list(pipeline.predict(inputs, **options))


def the_likeliest(family: str) -> dict[str, Any]:
    """Options with which a forecast depends on the logits alone."""
    return {"top_k": 1, "num_samples": 1} if family == "t5" else {}


def for_family(family: str, batch: torch.Tensor) -> torch.Tensor:
    """(B, T), as the pipeline takes several univariate series."""
    return batch.unsqueeze(1) if family == "chronos2" else batch


def waves(count: int = 3, length: int = 24) -> torch.Tensor:
    """(count, length), each with a period and a level of its own, whole numbers that all dtypes hold."""
    time = torch.arange(length)
    return torch.stack([(20 * torch.sin(time / (2.0 + i))).round() + 10 * i for i in range(count)])


# ---- dtypes and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
def test_forecasts_are_float32_on_the_cpu_from_inputs_of_any_dtype(load, family, model_dtype):
    pipeline = load(family, dtype=model_dtype, device_map="cpu")
    assert pipeline.inner_model.dtype == model_dtype
    inputs = for_family(family, waves())
    expected = predict(pipeline, inputs, prediction_length=5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32):
        for forecast, other in zip(predict(pipeline, inputs.to(dtype), prediction_length=5), expected):
            assert forecast.dtype == torch.float32
            assert forecast.device.type == "cpu"
            assert forecast.shape == other.shape
            assert forecast.isfinite().all()
            # A T5's tokenizer works in the dtype of its inputs, and may round to another token.
            assert family == "t5" or torch.equal(forecast, other)
    for part in pipeline.predict_quantiles(inputs.to(torch.int64), prediction_length=5):
        assert all(one.dtype == torch.float32 and one.device.type == "cpu" for one in part)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
def test_embeddings_have_the_models_dtype(load, family, model_dtype):
    pipeline = load(family, dtype=model_dtype)
    tokens = {"t5": 25, "bolt": 6, "chronos2": 7}[
        family
    ]  # with EOS; patches and REG; and the one that is to be forecast
    embeddings, scales = pipeline.embed(for_family(family, waves()))
    for one in embeddings:
        assert one.shape[-2:] == (tokens, D_MODEL)
        assert one.device.type == "cpu"
        assert one.isfinite().all()
    # chronos-2's own pipeline gives embeddings as the model computes them, too
    assert embeddings[0].dtype == model_dtype
    scales = [scales] if family == "t5" else list(scales)
    assert all(part.dtype == torch.float32 for each in scales for part in each)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_a_list_and_one_series_are_the_same_inputs(load, family):
    pipeline = load(family)
    options = {"prediction_length": 5, **the_likeliest(family)}
    expected = predict(pipeline, for_family(family, waves()), **options)
    assert len(expected) == 3
    ways = [list(waves())] + [[wave[None] for wave in waves()]] * (family == "chronos2")
    for inputs in ways:
        for one, other in zip(predict(pipeline, inputs, **options), expected, strict=True):
            assert torch.equal(one, other)
    alone = waves()[0] if family != "chronos2" else waves()[:1, None]
    (found,) = predict(pipeline, alone, **options)
    assert_close(found, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "shape"), [("t5", (2, 3, 20)), ("bolt", (2, 3, 20)), ("chronos2", (3, 20)), ("chronos2", (20,))]
)
def test_inputs_of_another_shape_are_refused(load, family, shape):
    pipeline = load(family)
    with pytest.raises((ValueError, AssertionError)):
        pipeline.predict(torch.zeros(shape))


# ---- Gaps, padding, the other series of a batch ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_short_series_are_padded_on_the_left_with_nan(load, family):
    pipeline = load(family)
    long, short = waves(2)
    short = short[13:]
    padded = torch.stack([long, torch.cat([torch.full((13,), torch.nan), short])])
    options = {"prediction_length": 5}
    for one, other in zip(
        predict(pipeline, [long, short], **options), predict(pipeline, for_family(family, padded), **options)
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_gaps_change_the_forecast_and_leave_it_finite(load, family):
    pipeline = load(family)
    options = {"prediction_length": 5, **the_likeliest(family)}
    gaps = waves(1, 40).repeat(4, 1)
    gaps[1, torch.arange(40) % 3 == 0] = torch.nan
    gaps[2, 20:] = torch.nan
    gaps[3] = torch.nan
    whole, *others = predict(pipeline, for_family(family, gaps), **options)
    for other in others:
        assert other.isfinite().all()
        assert not torch.equal(other, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_series_of_a_batch_know_nothing_of_each_other(load, family):
    pipeline = load(family)
    options = {"prediction_length": 5, **the_likeliest(family)}
    series = [waves()[0], waves()[1, 9:], 1e6 * waves()[2, 17:], torch.full((24,), torch.nan)]
    together = predict(pipeline, series, **options)
    for one, found in zip(series[:3], together):
        (alone,) = predict(pipeline, [one], **options)
        assert_close(found, alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_of_a_long_context_counts(load, family):
    pipeline = load(family)
    options = {"prediction_length": 5, **the_likeliest(family)}
    long = waves(2, 90)
    found = predict(pipeline, for_family(family, long), **options)
    for one, other in zip(found, predict(pipeline, for_family(family, long[:, -40:]), **options)):
        assert torch.equal(one, other)


# ---- Horizons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_long_horizons_are_forecast_in_passes_or_forbidden(load, family):
    pipeline = load(family)
    longest = HORIZON[family]
    options = {} if family == "chronos2" else {"limit_prediction_length": False}
    for length in (1, longest, longest + 1, 2 * longest + 3):
        for forecast in predict(pipeline, for_family(family, waves()), prediction_length=length, **options):
            assert forecast.shape[-1] == length
            assert forecast.isfinite().all()
        quantiles, mean = pipeline.predict_quantiles(
            for_family(family, waves()), prediction_length=length, quantile_levels=[0.1, 0.5]
        )
        assert all(one.shape[-2:] == (length, 2) for one in quantiles)
        assert all(one.shape[-1] == length for one in mean)
    with pytest.raises(ValueError, match="limit_prediction_length=False"):
        pipeline.predict(for_family(family, waves()), prediction_length=longest + 1, limit_prediction_length=True)


def test_a_t5_goes_on_from_the_median_of_its_samples(load):
    pipeline = load("t5")
    options = {"top_k": 1, "num_samples": 3}
    long = predict(pipeline, waves(), prediction_length=11, **options)
    first = torch.stack(predict(pipeline, waves(), prediction_length=8, **options))
    then = predict(pipeline, torch.cat([waves(), first.median(dim=1).values], dim=1), prediction_length=3, **options)
    for one, start, end in zip(long, first, then):
        assert torch.equal(one, torch.cat([start, end], dim=-1))


# ---- Quantile levels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bolt", "chronos2"])
def test_levels_beyond_the_trained_ones_are_the_outermost_and_warned_of(load, caplog, family):
    pipeline = load(family)
    trained = TRAINED[family]
    assert pipeline.quantiles == trained
    inputs = for_family(family, waves())
    inside, mean = pipeline.predict_quantiles(
        inputs, prediction_length=5, quantile_levels=[trained[0], 0.5, trained[-1]]
    )
    between, _ = pipeline.predict_quantiles(inputs, prediction_length=5, quantile_levels=[0.35])
    assert not caplog.records
    found, _ = pipeline.predict_quantiles(inputs, prediction_length=5, quantile_levels=[0.001, 0.5, 0.999])
    assert "not within the range of quantiles" in caplog.text
    forecasts = predict(pipeline, inputs, prediction_length=5)
    for i in range(3):
        samples = forecasts[i].reshape(-1, 5)  # (quantiles, horizon)
        assert torch.equal(inside[i].reshape(5, 3), samples[[0, trained.index(0.5), -1]].T)
        assert torch.equal(mean[i].flatten(), samples[trained.index(0.5)])
        # Random weights: the quantiles cross, and the outermost levels are those of the sorted ones or of the trained ones.
        assert (found[i] >= forecasts[i].min() - 1e-4).all()
        assert (found[i] <= forecasts[i].max() + 1e-4).all()
        assert between[i].isfinite().all()


@pytest.mark.parametrize("levels", [[0.1, 0.5, 0.9], [0.001, 0.37, 0.999], DECILES])
def test_a_t5s_quantiles_are_those_of_its_samples(load, caplog, levels):
    pipeline = load("t5")
    samples = torch.stack(predict(pipeline, waves(), prediction_length=4, num_samples=30))
    torch.manual_seed(4)
    quantiles, mean = pipeline.predict_quantiles(waves(), prediction_length=4, quantile_levels=levels, num_samples=30)
    expected = np.quantile(samples.double().numpy(), levels, axis=1).transpose(1, 2, 0)
    assert_close(quantiles.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert_close(mean, samples.mean(dim=1))
    assert not caplog.records


# ---- Data frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frequency", ["min", "W", "QE"])
def test_data_frames_hold_the_forecasts_of_their_series(load, family, frequency):
    pipeline = load(family)
    lengths = {"b": 24, "a": 17}  # not in the order of the alphabet
    parts = []
    for (item, length), wave in zip(lengths.items(), waves(2)):
        stamps = pd.date_range("2001-01-01", periods=length, freq=frequency)
        parts.append(pd.DataFrame({"series": item, "when": stamps, "sales": wave[-length:].numpy()}))
    columns = {"id_column": "series", "timestamp_column": "when", "target": "sales"}
    levels = [0.1, 0.5, 0.9]
    torch.manual_seed(4)
    frame = pipeline.predict_df(pd.concat(parts), prediction_length=3, quantile_levels=levels, **columns)
    torch.manual_seed(4)
    inputs = [torch.tensor(part["sales"].to_numpy()) for part in parts]
    quantiles, mean = pipeline.predict_quantiles(inputs, prediction_length=3, quantile_levels=levels)
    for i, part in enumerate(parts):
        item = part["series"].iloc[0]
        rows = frame[frame["series"] == item]
        assert list(rows["when"]) == list(pd.date_range(part["when"].iloc[-1], periods=4, freq=frequency)[1:])
        assert_close(torch.tensor(rows["predictions"].to_numpy(np.float32)), mean[i].flatten())
        found = torch.tensor(rows[["0.1", "0.5", "0.9"]].to_numpy(np.float32))
        assert_close(found, quantiles[i].reshape(3, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_data_frames_with_gaps_in_time_are_refused(load, family):
    pipeline = load(family)
    stamps = pd.date_range("2001-01-01", periods=10, freq="D").delete(4)
    frame = pd.DataFrame({"item_id": "a", "timestamp": stamps, "target": np.arange(9.0)})
    with pytest.raises(ValueError, match="not infer frequency"):
        pipeline.predict_df(frame, prediction_length=3)
