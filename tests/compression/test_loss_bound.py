"""`max_loss`: the smallest model within a bound on the loss, measured on series that are held out."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speeds import invented
from torch.testing import assert_close

from hf_lowrank import Calibration, CompressionSettings, calibrate, compress_pretrained, loss_curve, plan_compression
from hf_lowrank.checkpoints.dense import load_dense
from hf_lowrank.checkpoints.objectives import _crps_excess, objective_of
from hf_lowrank.checkpoints.rank_table import RankTable
from hf_lowrank.compression import latency_bench, loss_bound, rounding
from hf_lowrank.compression.loss_bound import CLOSE, HeldOut, MeasuredLoss, smallest_within
from hf_lowrank.data.series import parted
from hf_lowrank.timing import Case


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Enough for models as small as these."""
    monkeypatch.setattr("hf_lowrank.compression.sensitivity.TOKENS", (256, 1024))


@pytest.fixture
def measured(dense):
    return calibrate(dense, num_batches=2, num_held_out_batches=3)


# --- the search --------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1.2), st.floats(0.005, 0.6))
def test_the_search_finds_the_smallest_budget_that_keeps_the_bound(threshold, least):
    """Of models that are within the bound from a budget of `threshold` on."""
    found = smallest_within(
        0.01,
        (least, 1.0),
        lambda ratio: ratio,
        lambda model, ratio: MeasuredLoss(ratio, 0, 0.0 if ratio >= threshold else 1, 9),
    )
    assert all(least <= one.total_ratio <= 1 for one in found.tried)
    assert len({one.total_ratio for one in found.tried}) == len(found.tried) <= 14
    assert [one.total_ratio for one in found.tried] == sorted(one.total_ratio for one in found.tried)
    if threshold > 1:
        assert found.model is found.measured is None
        assert found.tried[-1].total_ratio == 1
        return
    assert found.measured.bound == 0
    assert found.model == found.measured.total_ratio >= threshold
    assert found.model <= max(least, threshold * CLOSE) * (1 + 1e-9)


# --- what is measured --------------------------------------------------------------------------------------------


def test_the_excess_of_a_token_forecast_is_that_of_its_crps():
    """By the definition: the mean over values of CRPS(G, y) - CRPS(F, y), values and forecasts even within a bin."""
    generator = torch.Generator().manual_seed(0)
    reference, predicted = torch.rand(2, 5, 6, generator=generator).softmax(-1).mul(4).softmax(-1)
    added, own = _crps_excess(reference, predicted)
    fine = 200
    grid = (torch.arange(6 * fine) + 0.5) / fine

    def distribution(shares: torch.Tensor) -> torch.Tensor:
        return shares.repeat_interleave(fine).div(fine).cumsum(0).double()

    for row, (p, q) in enumerate(zip(reference, predicted)):
        below, found = distribution(p), distribution(q)
        scores = []
        for forecast in (found, below):
            steps = (grid[None, :] >= grid[:, None]).double()
            crps = (forecast[None] - steps).square().sum(-1) / fine
            scores.append(float((crps * p.repeat_interleave(fine).double() / fine).sum()))
        assert scores[1] == pytest.approx(float(own[row]), rel=0.01)
        assert scores[0] - scores[1] == pytest.approx(float(added[row]), rel=0.01)


def test_the_dense_model_adds_nothing_and_less_rank_more(dense, measured):
    checkpoint = load_dense(dense)
    held_out = HeldOut(checkpoint, checkpoint.float_model(), measured.held_out, seed=0)
    losses = [
        held_out.measured(compress_pretrained(dense, total_ratio=ratio, calibration=measured), ratio)
        for ratio in (1.0, 0.6, 0.3)
    ]
    assert losses[0].loss == pytest.approx(0, abs=1e-6)
    assert losses[0].loss <= losses[1].loss < losses[2].loss
    assert all(one.loss <= one.bound for one in losses)
    assert losses[0].series == losses[2].series > 10


def test_the_bound_is_above_the_mean_of_all_series_nineteen_times_in_twenty():
    """Of skewed losses, whose means of samples are often too low."""
    rng = np.random.default_rng(0)
    hits = [loss_bound._bound(rng.lognormal(0, 1, 200), seed) > np.exp(0.5) for seed in range(200)]
    assert 0.88 < np.mean(hits) < 0.99


def test_what_is_held_out_is_in_no_other_batch(dense):
    series = list(np.random.default_rng(0).normal(size=(20, 400)))
    for data in ("synthetic", series, series[:2]):
        found = calibrate(dense, data, num_batches=3, num_held_out_batches=3)
        assert len(found.held_out) == 3
        name = "input_ids" if "input_ids" in found.batches[0] else "context"
        rows = [
            {tuple(row.nan_to_num(-1).tolist()) for one in of for row in one[name] if len(row.unique()) > 5}
            for of in (found.batches, found.held_out)
        ]
        assert min(map(len, rows)) > 0
        assert not rows[0] & rows[1]


def test_too_little_to_hold_some_out():
    with pytest.raises(ValueError, match="1 series with 3 pieces that have values are too few to hold some out"):
        parted([np.arange(3.0)])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_every_fifth_series_or_piece_is_held_out(lengths):
    start = itertools.accumulate([0, *lengths])
    series = [np.arange(first, first + length, dtype=float) for first, length in zip(start, lengths)]
    total = sum(lengths)
    if len(series) < 10 and total < 10:
        return
    kept, held_out = parted(series)
    values = np.concatenate([*kept, *held_out])
    assert len(values) == total == len(set(values))
    if len(series) >= 10:
        assert len(held_out) == len(series) // 5


def test_a_calibration_is_saved_with_what_is_held_out(bolt, tmp_path):
    found = calibrate(bolt, num_batches=1, num_held_out_batches=2)
    found.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert len(again.held_out) == 2
    assert len(again.batches) == len(found.batches)
    for one, other in zip(found.held_out, again.held_out):
        assert_close(one["context"], other["context"], equal_nan=True)


# --- the whole road ----------------------------------------------------------------------------------------------


def test_the_smallest_model_within_the_bound(dense, measured):
    smaller = compress_pretrained(dense, max_loss=0.3, calibration=measured)
    bound = smaller.config.compression["measured_loss"]["bound"] / 3
    model = compress_pretrained(dense, max_loss=bound, calibration=measured)
    record = model.config.compression
    assert record["policy"] == "max_loss"
    assert record["arguments"] == {"max_loss": bound}
    chosen, tried = record["measured_loss"], record["tried"]
    assert chosen in tried
    assert chosen["bound"] <= bound
    assert all(one["bound"] > bound for one in tried if one["total_ratio"] < chosen["total_ratio"])
    checkpoint = load_dense(dense)
    again = HeldOut(checkpoint, checkpoint.float_model(), measured.held_out, seed=0)
    assert again.measured(model, chosen["total_ratio"]).to_dict() == pytest.approx(chosen)
    assert smaller.num_parameters() < model.num_parameters()


def test_the_curve_is_what_the_search_sees(bolt):
    measured = calibrate(bolt, num_batches=2, num_held_out_batches=2)
    ratios = [1.0, 0.5, 0.25]
    losses = loss_curve(bolt, ratios, calibration=measured)
    assert [one.total_ratio for one in losses] == ratios
    assert losses[0].loss == pytest.approx(0, abs=1e-6)
    assert losses[0].loss < losses[1].loss < losses[2].loss
    first = next(iter(compress_pretrained(bolt, max_loss=1e9, calibration=measured).config.compression["tried"][::-1]))
    assert first == pytest.approx(losses[2].to_dict())
    for arguments, message in [
        ({"ratio": 0.5}, "loss_curve tries budgets of its own: leave out ratio"),
        ({"max_loss": 0.05}, "loss_curve tries budgets of its own: leave out max_loss"),
        ({"total_ratios": [0.5, 1.5]}, "total_ratio must be in"),
        ({"total_ratios": [1e-4]}, "total_ratios: 0.0001 is too small: the smallest ranks keep 0."),
    ]:
        with pytest.raises(ValueError, match=message):
            loss_curve(bolt, **({"calibration": measured} | arguments))


@pytest.fixture
def counted(monkeypatch):
    """Speeds that a test can count."""
    monkeypatch.setattr("hf_lowrank.compression.search.measure_speed", lambda _: invented())
    monkeypatch.setattr("hf_lowrank.compression.search.CORRECTIONS", 0)  # for this machine has others
    monkeypatch.setattr(latency_bench, "default_workload", lambda *_, **__: Case(2, 40, 6, None))
    monkeypatch.setattr(latency_bench, "SECONDS", 0.0)


@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_the_fastest_model_within_the_bound(bolt, counted, quantize):
    measured = calibrate(bolt, num_batches=1, num_held_out_batches=1)
    model = compress_pretrained(bolt, max_loss=0.1, target_speedup="max", quantize=quantize, calibration=measured)
    record = model.config.compression
    assert (record["policy"], record["arguments"]) == ("max_loss", {"max_loss": 0.1, "target_speedup": "max"})
    chosen, tried, speed = record["measured_loss"], record["tried"], record["speed"]
    assert chosen in tried
    assert chosen["bound"] <= 0.1
    assert all(one["bound"] > 0.1 for one in tried if one["speedup"] > chosen["speedup"])
    speedups = [one["speedup"] for one in tried]
    assert speedups == sorted(speedups, reverse=True)
    assert speed["seconds_dense"] / speed["seconds_predicted"] >= chosen["speedup"] * (1 - 1e-9) > 1
    assert speed["speedup_measured"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:target_speedup")  # this machine has other speeds
def test_as_fast_as_is_asked_for_within_the_bound_or_an_error_that_says_what_can_be(bolt, counted):
    measured = calibrate(bolt, num_batches=1, num_held_out_batches=1)
    model = compress_pretrained(bolt, max_loss=10, target_speedup=2, calibration=measured)
    record = model.config.compression
    assert record["arguments"] == {"max_loss": 10, "target_speedup": 2}
    assert [record["measured_loss"]] == record["tried"]
    assert record["measured_loss"]["speedup"] == 2
    alone = compress_pretrained(bolt, target_speedup=2, calibration=measured)
    assert RankTable.of(model.config) == RankTable.of(alone.config)
    bound = record["measured_loss"]["bound"] / 3
    message = rf"max_loss={bound} and target_speedup=2: a model of that speed loses .* the fastest within .* is predicted to be 1(\.\d+)? times"
    with pytest.raises(ValueError, match=message):
        compress_pretrained(bolt, max_loss=bound, target_speedup=2, calibration=measured)
    with pytest.raises(
        ValueError, match=r"target_speedup=1000 is too large: the smallest ranks are predicted to reach"
    ):
        compress_pretrained(bolt, max_loss=1, target_speedup=1000, calibration=measured)


def test_with_integers(bolt):
    measured = calibrate(bolt, num_batches=2, num_held_out_batches=3)
    model = compress_pretrained(bolt, max_loss=0.1, quantize="int8", calibration=measured)
    assert model.config.weight_bits
    assert model.config.compression["measured_loss"]["bound"] <= 0.1


def test_what_cannot_be_is_said_with_what_can(bolt, monkeypatch):
    measured = calibrate(bolt, num_batches=1, num_held_out_batches=1)
    monkeypatch.setattr(rounding, "TOLERANCE", 1e9)
    with pytest.raises(ValueError, match=r"max_loss=1e-09: not below .* even with all ranks kept and quantize='int4'"):
        compress_pretrained(bolt, max_loss=1e-9, quantize="int4", calibration=measured)


def test_it_is_what_is_done_when_nothing_is_said(bolt):
    assert CompressionSettings().max_loss == 0.01
    assert CompressionSettings(quantize="int8").policy_arguments == {"max_loss": 0.01}
    assert CompressionSettings(ratio=0.5).max_loss is None
    assert str(plan_compression(bolt)).count("known after the work alone") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_loss": 0.0}, "max_loss must be a positive number, such as 0.01 for 1 %, found 0.0"),
        ({"max_loss": "1%"}, "max_loss must be a positive number"),
        ({"max_loss": 0.1, "total_ratio": 0.5}, "max_loss finds how small a model can be: leave out total_ratio"),
        ({"max_loss": 0.1, "target_speedup": 2, "ratio": 0.5}, "leave out ratio"),
        ({"target_speedup": "max"}, "target_speedup='max' is as fast as max_loss allows: give it too"),
        (
            {"target_speedup": "fast"},
            "target_speedup must be a positive number, or 'max' beside max_loss, found 'fast'",
        ),
        ({"max_loss": 0.1, "feed_forward_ratio": 0.5}, "feed_forward_ratio is part of what max_loss finds"),
        ({"max_loss": 0.1, "calibration": None}, "max_loss is measured on the calibration data"),
        ({"calibration": None}, "Say how much to keep"),
        ({"method": "paper"}, "Say how much to keep"),
    ],
)
def test_settings_that_contradict_each_other(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompressionSettings(**arguments)


def test_a_calibration_without_held_out_series_is_refused(bolt):
    with pytest.raises(
        ValueError, match="max_loss needs series that are held out, and the calibration given has none"
    ):
        compress_pretrained(bolt, max_loss=0.01, calibration=calibrate(bolt, num_batches=1))


def test_a_text_t5_is_refused(dense_t5):
    model = dense_t5()
    with (
        pytest.warns(UserWarning, match="no Chronos checkpoint"),
        pytest.raises(ValueError, match="there are no data for"),
    ):
        compress_pretrained(model)
    objective = objective_of(model.config, type(model))
    with pytest.raises(ValueError, match="without a chronos_config forecasts no values"):
        objective.excess(torch.zeros(1, 64), torch.zeros(1, 64), {})


@pytest.mark.parametrize("count", [-1, 1.5, "3"])
def test_a_wrong_number_of_held_out_batches(bolt, count):
    with pytest.raises(ValueError, match="num_held_out_batches must be an integer of at least 0"):
        calibrate(bolt, num_batches=1, num_held_out_batches=count)


def test_a_frame_of_the_users(bolt):
    times = pd.date_range("2024-01-01", periods=60, freq="h")
    frame = pd.concat(
        pd.DataFrame({"item_id": f"s{i}", "timestamp": times, "target": 5 + np.sin(np.arange(60) / (2 + i))})
        for i in range(12)
    )
    measured = calibrate(bolt, frame, num_batches=2, num_held_out_batches=1)
    assert measured.record["data"] == "12 series"
    assert compress_pretrained(bolt, max_loss=0.2, calibration=measured).config.compression["tried"]
