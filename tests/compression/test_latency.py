"""The speed of a forecast: a sum over layers that grows with every rank, and a budget. No test depends on how fast the machine is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speeds import ATTENTION, FEATURES, FEED_FORWARD, WORKLOAD, invented
from transformers import T5EncoderModel, T5Model

from hf_lowrank import LowRankT5Config, compress_pretrained, summarize
from hf_lowrank.checkpoints.rank_table import FeedForwardRanks, LatentRanks, PerHeadRanks, RankTable
from hf_lowrank.compression import latency_bench as timed
from hf_lowrank.compression.latency import (
    Speed,
    features,
    measure_speed,
    non_negative_fit,
    timed_form,
)
from hf_lowrank.compression.latency_bench import bench_of, default_workload
from hf_lowrank.timing import Case

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

D_MODEL, D_KV, D_FF = 16, 8, 24

numbers = st.integers(1, D_KV)
ranks = st.integers(1, D_MODEL)
maybe = st.none() | ranks
entries = st.one_of(
    st.builds(PerHeadRanks, numbers, numbers),
    st.builds(LatentRanks, ranks, maybe, maybe),
    st.builds(FeedForwardRanks, st.integers(1, D_FF), maybe, maybe),
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(timed, "SECONDS", 0.0)
    monkeypatch.setattr(timed, "LEAST_ROUNDS", 1)


@pytest.fixture(scope="module")
def measured(tiny_config) -> Speed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed, "SECONDS", 0.0)
        patch.setattr(timed, "LEAST_ROUNDS", 1)
        return measure_speed(bench_of(tiny_config(), WORKLOAD))


# What is measured


def test_every_kind_and_form_has_coefficients(measured):
    assert set(measured.coefficients) == {*ATTENTION, *FEED_FORWARD}
    for kind, forms in measured.coefficients.items():
        assert set(forms) == ({"feed_forward"} if kind in FEED_FORWARD else {"even", "uneven", "latent"})
        for form, coefficients in forms.items():
            assert len(coefficients) == FEATURES[form]
            assert all(np.isfinite(c) and c >= 0 for c in coefficients)
            assert any(c > 0 for c in coefficients)
    assert measured.fixed >= 0
    assert (measured.workload, measured.device, measured.dtype) == (WORKLOAD, "cpu", "float32")
    assert measured.threads == torch.get_num_threads()


@given(entry=entries, more=st.integers(1, 4), kind=st.sampled_from(ATTENTION + FEED_FORWARD))
def test_the_prediction_grows_with_every_rank(measured, entry, more, kind):
    if (kind in FEED_FORWARD) != isinstance(entry, FeedForwardRanks):
        return
    seconds = measured.seconds(kind, entry)
    assert seconds > 0
    for name, rank in entry.to_dict().items():
        # Heads with qk = vo are computed in a way of their own.
        if rank is not None and timed_form(replace(entry, **{name: rank + more})) == timed_form(entry):
            assert measured.seconds(kind, replace(entry, **{name: rank + more})) >= seconds


def test_a_forecast_is_the_sum_of_its_layers(measured, tiny_config, mixed_ranks):
    table = RankTable.of(tiny_config(**mixed_ranks))
    total = measured.fixed + sum(measured.seconds(name.kind, entry) for name, entry in table.items())
    assert measured.forecast(table) == pytest.approx(total)
    assert measured.forecast(RankTable({})) == measured.fixed


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu"}, {"num_heads": 5, "d_ff": 6}])
def test_the_entries_that_are_timed_are_valid(tiny_config, changes):
    config = tiny_config(**changes)
    bench = bench_of(config, WORKLOAD)
    for kind in bench.kinds:
        found = bench.timed_ranks(kind)
        dense = FeedForwardRanks(config.d_ff, None, None) if kind in FEED_FORWARD else PerHeadRanks(D_KV, D_KV)
        assert dense in found
        for entry in found:
            column = {kind: [entry.to_dict()] * bench.depth(kind)}
            stack = {kind.removesuffix("_feed_forward"): column[kind]}
            tiny_config(
                **changes, **({"feed_forward_ranks": stack} if kind in FEED_FORWARD else {"attention_ranks": column})
            )
    assert all(seconds > 0 for kind in bench.kinds for _, seconds in bench.layer_seconds(kind))
    assert bench.forecast_seconds() > 0


def test_each_timed_layer_does_the_work_of_a_forecast(tiny_config):
    """How often a decoder layer's passes count: once a step, whatever part of the paths is timed."""
    bench = bench_of(tiny_config(), WORKLOAD)
    expected = {"encoder_self": [1 / 2], "encoder_feed_forward": [1 / 2], "decoder_self": [3 / 3], "cross": [3 / 3, 1]}
    for kind, times in expected.items():  # two encoder layers and three decoder layers in a pass; three steps
        assert [found for _, found in bench.work(kind, bench.small_ranks(kind))] == pytest.approx(times)


def test_what_is_too_large_to_time_is_scaled(tiny_config, monkeypatch):
    monkeypatch.setattr(timed, "TIMED_ARITHMETIC", 1)
    bench = bench_of(tiny_config(), WORKLOAD)
    (_, times), (_, projections) = bench.work("cross", bench.small_ranks("cross"))
    assert times == pytest.approx(2 * 3 / 3)  # one series of two, with all its paths
    assert projections == pytest.approx(2)
    [(_, times)] = bench.work("decoder_self", bench.small_ranks("decoder_self"))
    assert times == pytest.approx(4 * 3 / 3)  # one path of four


@torch.inference_mode()
@pytest.mark.parametrize("encoder_only", [False, True])
def test_what_is_timed_is_the_loop_or_the_model(tiny_config, encoder_only, monkeypatch):
    """The encoder of a forecaster runs in the loop; an encoder alone is called as a model."""
    called = []
    monkeypatch.setattr(timed, "self_attention", lambda *_: called.append("loop"))
    bench = bench_of(tiny_config(), WORKLOAD, encoder_only=encoder_only)
    [(action, _)] = bench.work("encoder_self", bench.small_ranks("encoder_self"))
    action()
    assert called == ([] if encoder_only else ["loop"] * 2)


@torch.inference_mode()
def test_a_step_can_be_repeated(tiny_config):
    bench = bench_of(tiny_config(), replace(WORKLOAD, prediction_length=6))
    for entry in bench.timed_ranks("decoder_self"):
        [(step, _)] = bench.work("decoder_self", entry)
        first, *_, last = [step() for _ in range(3)]
        torch.testing.assert_close(first, last)


def test_measuring_leaves_the_random_state_alone(tiny_config):
    before = torch.get_rng_state()
    measure_speed(bench_of(tiny_config(), WORKLOAD))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_alone_is_measured_alone(tiny_config):
    found = measure_speed(bench_of(tiny_config(), Case(2, 10, 0, None), encoder_only=True))
    assert set(found.coefficients) == {"encoder_self", "encoder_feed_forward"}


def test_the_default_workload_is_the_checkpoints_own(tiny_config, tiny_chronos_config):
    chronos = tiny_config(chronos_config=vars(tiny_chronos_config).copy())
    assert default_workload(chronos) == Case(4, 40, 8, 4)
    assert default_workload(tiny_config()) == Case(4, 512, 64, 1)
    assert default_workload(tiny_config(), encoder_only=True) == Case(4, 512, 0, None)


# The fit


@given(
    coefficients=st.lists(st.floats(0, 5), min_size=3, max_size=3).filter(lambda found: max(found) > 0.1),
    seed=st.integers(0, 99),
)
def test_the_fit_finds_the_coefficients(coefficients, seed):
    inputs = np.random.default_rng(seed).uniform(1, 1e6, (8, 3))
    inputs[:, 0] = 1
    assert inputs @ non_negative_fit(inputs, inputs @ coefficients) == pytest.approx(inputs @ coefficients)


def test_the_fit_bears_features_that_are_equal():
    rank = np.array([64.0, 48, 32, 16, 8])  # as of heads with qk = vo
    inputs = np.stack([np.ones(5), rank, rank], axis=1)
    values = inputs @ [2e-4, 3e-6, 4e-6]
    coefficients = non_negative_fit(inputs, values)
    assert min(coefficients) >= 0
    assert inputs @ coefficients == pytest.approx(values)


def test_the_fit_has_no_negative_coefficient():
    inputs = np.array([[1.0, 1], [1, 2], [1, 3]])
    constant, slope = non_negative_fit(inputs, np.array([3.0, 2, 1]))  # falling
    assert slope == 0
    assert constant == pytest.approx((1 / 3 + 1 / 2 + 1) / (1 / 9 + 1 / 4 + 1))  # of relative errors


def test_features_are_those_of_the_formula():
    config = LowRankT5Config(d_model=16, num_heads=2)
    gated = LowRankT5Config(d_model=16, num_heads=2, feed_forward_proj="gated-gelu")
    assert features("cross", PerHeadRanks(3, 5), config) == (1, 6, 10)
    assert features("cross", LatentRanks(4, 3, None), config) == (1, 4, 3 * (16 + 8), 2 * 4 * 16, 1)
    assert features("encoder_feed_forward", FeedForwardRanks(24, 2, None), config) == (1, 2 * 40 + 16 * 24, 1)
    assert features("encoder_feed_forward", FeedForwardRanks(24, 2, 3), gated) == (1, 2 * 2 * 40 + 3 * 40, 3)
    assert timed_form(FeedForwardRanks(24, 2, None)) == "feed_forward"
    # Of a series that is a group of its own no query and no key is made, and values and outputs may be one matrix.
    assert features("group", PerHeadRanks(3, 2), config) == (1, 4, 8)
    assert features("group", PerHeadRanks(1, 5), config) == (1, 10, 16)
    assert features("group", LatentRanks(4, 3, None), config) == (1, 4, 2 * 4 * 16, False)


# compress_pretrained


@pytest.fixture
def by_invented_speed(monkeypatch):
    """`compress_pretrained` by weights alone, on a machine with coefficients of one."""
    monkeypatch.setattr("hf_lowrank.compression.search.measure_speed", lambda _: invented())
    monkeypatch.setattr("hf_lowrank.compression.search.CORRECTIONS", 0)  # for this machine has others
    monkeypatch.setattr(timed, "default_workload", lambda *_, **__: WORKLOAD)
    return lambda dense, **arguments: compress_pretrained(dense, calibration=None, **arguments)


@pytest.mark.parametrize("target", [1.0, 1.5, 2.5])
@pytest.mark.parametrize("form", ["auto", "per_head", "latent"])
def test_the_predicted_seconds_keep_the_budget(dense_t5, by_invented_speed, target, form):
    model = by_invented_speed(dense_t5(), target_speedup=target, form=form)
    record = model.config.compression["speed"]
    assert record["seconds_dense"] >= target * record["seconds_predicted"] * (1 - 1e-9)
    assert record["seconds_predicted"] == pytest.approx(invented().forecast(RankTable.of(model.config)))
    assert record["seconds_dense"] == pytest.approx(invented().forecast(RankTable.full(model.config)))
    if target > 1:  # what is saved is not more than was asked for
        assert record["seconds_predicted"] > 0.8 * record["seconds_dense"] / target


def test_a_larger_speedup_loses_more(dense_t5, by_invented_speed):
    losses = []
    for target in (1.2, 1.8, 2.5):
        model = by_invented_speed(dense_t5(), target_speedup=target)
        losses.append(sum(model.config.compression["predicted_loss"].values()))
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_kinds_that_cost_more_are_cut_more(dense_t5, by_invented_speed, monkeypatch):
    costly = invented()
    coefficients = {
        kind: {form: (1e-6,) * len(c) for form, c in forms.items()} for kind, forms in costly.coefficients.items()
    }
    slow = replace(costly, fixed=0.0, coefficients=coefficients | {"cross": costly.coefficients["cross"]})
    monkeypatch.setattr("hf_lowrank.compression.search.measure_speed", lambda _: slow)
    config = by_invented_speed(dense_t5(), target_speedup=2).config
    full = config.full_ranks()
    assert config.attention_ranks["cross"] != full["attention_ranks"]["cross"]
    assert config.feed_forward_ranks == full["feed_forward_ranks"]


@pytest.mark.parametrize(("name", "share"), [("ratio", 0.6), ("total_ratio", 0.7), ("max_cache_ratio", 0.5)])
def test_together_with_another_budget(dense_t5, by_invented_speed, name, share):
    config = by_invented_speed(dense_t5(), target_speedup=1.3, **{name: share}).config
    assert config.compression["policy"] == "budgets"
    assert config.compression["arguments"] == {"target_speedup": 1.3, name: share}
    record, summary = config.compression["speed"], summarize(config)
    assert record["seconds_dense"] >= 1.3 * record["seconds_predicted"] * (1 - 1e-9)
    kinds = ATTENTION if name == "ratio" else ATTENTION + FEED_FORWARD
    kept = {
        "ratio": summary.attention_ratio,
        "total_ratio": summary.total("parameters", *kinds) / summary.total("dense_parameters", *kinds),
        "max_cache_ratio": summary.cache_ratio,
    }
    assert kept[name] <= share


def test_what_was_measured_is_recorded(tmp_path, chronos_t5):
    """With a real measurement. A target of 0.1 is reached on every machine: nothing is cut."""
    model = compress_pretrained(chronos_t5, target_speedup=0.1, calibration=None)
    record = model.config.compression["speed"]
    assert record["workload"] == {"batch_size": 4, "context_length": 40, "prediction_length": 8, "num_samples": 4}
    assert record["device"] == "cpu"
    assert record["dtype"] == "float32"
    assert record["threads"] == torch.get_num_threads()
    assert 0 < record["seconds_predicted"] == pytest.approx(record["seconds_dense"])
    achieved = record["seconds_measured_dense"] / record["seconds_measured"]
    assert 0 < record["speedup_measured"] == pytest.approx(achieved)
    assert 0 <= record["seconds_fixed"] < record["seconds_dense"]
    assert model.config.attention_ranks == model.config.full_ranks()["attention_ranks"]
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.compression["speed"] == record


def test_models_without_a_head_are_measured_too(dense_t5):
    for model_class in (T5Model, T5EncoderModel):
        with pytest.MonkeyPatch.context() as patch:
            workload = replace(WORKLOAD, prediction_length=0) if model_class is T5EncoderModel else WORKLOAD
            patch.setattr(timed, "default_workload", lambda *_, workload=workload, **__: workload)
            model = compress_pretrained(dense_t5(model_class), target_speedup=0.1, calibration=None)
        assert model.config.compression["speed"]["seconds_dense"] > 0


def test_errors(dense_t5, by_invented_speed):
    dense = dense_t5()
    with pytest.raises(
        ValueError, match=r"target_speedup must be a positive number, or 'max' beside max_loss, found 0"
    ):
        by_invented_speed(dense, target_speedup=0)
    too_large = r"target_speedup=1000 is too large: the smallest ranks are predicted to reach \d+\.\d+ on this machine"
    with pytest.raises(ValueError, match=too_large):
        by_invented_speed(dense, target_speedup=1000)
    with pytest.raises(ValueError, match="target_speedup chooses the feed-forward ranks"):
        by_invented_speed(dense, target_speedup=2, feed_forward_ratio=0.5)
    with pytest.raises(ValueError, match="Give one rule for the ranks, found epsilon and target_speedup"):
        by_invented_speed(dense, target_speedup=2, epsilon=0.1)
    with pytest.raises(ValueError, match="method='paper' takes"):
        by_invented_speed(dense, target_speedup=2, method="paper")


def test_the_largest_reachable_speedup_is_the_one_of_the_error(dense_t5, by_invented_speed):
    dense = dense_t5()
    with pytest.raises(ValueError, match="target_speedup") as error:
        by_invented_speed(dense, target_speedup=1000)
    reachable = float(str(error.value).split("reach ")[1].split(" ")[0])
    model = by_invented_speed(dense, target_speedup=reachable * 0.999)
    record = model.config.compression["speed"]
    assert record["seconds_dense"] / record["seconds_predicted"] == pytest.approx(reachable, rel=2e-3)
