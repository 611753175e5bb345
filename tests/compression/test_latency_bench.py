"""What is timed of a Chronos-Bolt and a Chronos-2: layers called as the pipeline calls them, and whole forecasts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from chronos_models import BOLT, BOLT_RANKS, CHRONOS2, CHRONOS2_RANKS, shape

from hf_lowrank import LowRankChronos2Config, LowRankChronosBoltConfig, compress_pretrained
from hf_lowrank.checkpoints.rank_table import LatentRanks, RankTable
from hf_lowrank.compression import latency_bench
from hf_lowrank.compression.latency import measure_forecasts, measure_speed
from hf_lowrank.compression.latency_bench import bench_of, default_workload
from hf_lowrank.timing import Case

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

WORKLOAD = Case(batch_size=3, context_length=20, prediction_length=5, num_samples=None)
CONFIGS = {
    "bolt": LowRankChronosBoltConfig(**shape(BOLT)),
    "bolt of one layer": LowRankChronosBoltConfig(**shape(BOLT, num_layers=1, num_decoder_layers=1)),
    "chronos2": LowRankChronos2Config(**shape(CHRONOS2)),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(latency_bench, "SECONDS", 0.0)
    monkeypatch.setattr(latency_bench, "LEAST_ROUNDS", 1)


@configs
def test_fewer_ranks_never_cost_more(config):
    speed = measure_speed(bench_of(config, WORKLOAD))
    full = RankTable.full(config)
    assert set(speed.coefficients) == {name.kind for name in full}
    for name, dense in full.items():
        least = {"width": dense.width} if name.is_feed_forward else {"qk": 2, "vo": 2}
        ways = [type(dense)(**(vars(dense) | least | dict.fromkeys(dense.parts, rank))) for rank in (2, 4, 6)]
        seconds = [speed.seconds(name.kind, ranks) for ranks in ways]
        assert 0 < seconds[0] <= seconds[1] <= seconds[2]
    assert speed.fixed >= 0
    assert speed.forecast(full) == pytest.approx(speed.fixed + sum(speed.seconds(n.kind, r) for n, r in full.items()))


@configs
def test_layers_are_called_as_a_forecast_calls_them(config):
    """What goes into the last sublayers comes out as the model has it, and nothing is left behind in the model."""
    bench = bench_of(config, replace(WORKLOAD, batch_size=100))
    table, seen = RankTable.of(bench.model.config), {}
    for kind, calls in bench.calls.items():
        assert len(calls) >= 1
        entry = next(ranks for name, ranks in table.items() if name.kind == kind).to_dict()
        own, sublayer = bench.layer(kind, entry), bench.model.get_submodule(bench.place(kind))
        own.load_state_dict(sublayer.state_dict())
        with torch.inference_mode():
            for args, kwargs in calls:
                found, wanted = (layer(*args, **kwargs) for layer in (own.eval(), sublayer))
                torch.testing.assert_close(found, wanted)
        seen[kind] = sum(args[0].shape[0] for args, _ in calls)
    assert set(seen.values()) == {100}  # every series once, in whatever parts
    assert not any(module._forward_pre_hooks for module in bench.model.modules())


@configs
def test_every_timed_layer_is_one_that_a_model_can_have(config):
    bench = bench_of(config, WORKLOAD)
    full = RankTable.full(config)
    for kind in bench.kinds:
        timed = bench.timed_ranks(kind)
        assert next(ranks for name, ranks in full.items() if name.kind == kind) in timed
        assert not any(isinstance(ranks, LatentRanks) for ranks in timed if kind == "time")
        for ranks in timed:
            bench.random_model({name: ranks for name in full if name.kind == kind})  # or raises
            [(_, times)] = bench.work(kind, ranks)
            assert 0 < times <= 1


@pytest.mark.parametrize(
    ("config", "ranks"),
    [(CONFIGS["bolt"], BOLT_RANKS), (CONFIGS["chronos2"], CHRONOS2_RANKS)],
    ids=["bolt", "chronos2"],
)
def test_whole_forecasts_are_of_the_ranks_that_are_given(config, ranks, monkeypatch):
    table = RankTable.from_dicts(**ranks)
    bench = bench_of(config, WORKLOAD)
    made, random_model = [], bench.random_model
    monkeypatch.setattr(bench, "random_model", lambda table: made.append(random_model(table)) or made[-1])
    before = torch.get_rng_state()
    achieved = measure_forecasts(bench, table)
    assert torch.equal(torch.get_rng_state(), before)
    assert [RankTable.of(model.config) for model in made] == [RankTable.full(config), table]
    assert achieved.speedup == achieved.seconds_dense / achieved.seconds > 0


def test_the_default_workload_is_a_realistic_one():
    assert default_workload(CONFIGS["bolt"]) == Case(32, 40, 6, None)
    assert default_workload(CONFIGS["chronos2"]) == Case(32, 40, 15, None)
    large = {"context_length": 8192, "max_output_patches": 64}
    assert default_workload(LowRankChronos2Config(**shape(CHRONOS2, large))) == Case(32, 512, 64, None)


@pytest.mark.parametrize("name", ["bolt", "chronos2"])
def test_what_was_measured_is_recorded(request, tmp_path, name):
    """A target of 0.1 is reached on every machine: nothing is cut."""
    model = compress_pretrained(request.getfixturevalue(name), target_speedup=0.1, calibration=None)
    record = model.config.compression["speed"]
    assert record["workload"] == {
        "batch_size": 32,
        "context_length": 48,
        "prediction_length": {"bolt": 16, "chronos2": 32}[name],
        "num_samples": None,
    }
    assert record["seconds_predicted"] == pytest.approx(record["seconds_dense"])
    assert record["speedup_measured"] == record["seconds_measured_dense"] / record["seconds_measured"] > 0.1
    assert RankTable.of(model.config) == RankTable.full(model.config)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.compression["speed"] == record


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference-bolt", "reference-2"])
def test_a_forecast_is_about_as_fast_as_predicted(name, monkeypatch):
    """Within a factor that a busy machine keeps."""
    monkeypatch.undo()
    record = compress_pretrained(name, target_speedup=1.3, calibration=None).config.compression["speed"]
    predicted = record["seconds_dense"] / record["seconds_predicted"]
    assert predicted >= 1.3 * (1 - 1e-9)
    assert record["speedup_measured"] == pytest.approx(predicted, rel=0.5)
    assert np.log(record["seconds_dense"] / record["seconds_measured_dense"]) == pytest.approx(0, abs=np.log(3))
