"""What is timed of an export: layers of every rank as graphs of their own, and whole forecasts in the engine. No quick test depends on speed."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from chronos_models import BOLT, CHRONOS2, shape
from speeds import invented

from hf_lowrank import (
    LowRankChronos2Config,
    LowRankChronosBoltConfig,
    compress_pretrained,
    plan_compression,
    render_card,
)
from hf_lowrank.checkpoints.rank_table import FeedForwardRanks, PerHeadRanks, RankTable
from hf_lowrank.compression import latency_bench
from hf_lowrank.compression.export_bench import ExportBench, export_bench_of
from hf_lowrank.compression.latency import Achieved, measure_forecasts, measure_speed
from hf_lowrank.compression.settings import BACKENDS
from hf_lowrank.exporting.graphs import AttentionToOne
from hf_lowrank.runtime.pipelines import ExportedModel
from hf_lowrank.timing import Case

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)
pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

WORKLOAD = Case(batch_size=7, context_length=37, prediction_length=6, num_samples=None)
CONFIGS = {
    "bolt": LowRankChronosBoltConfig(**shape(BOLT, num_layers=1, num_decoder_layers=1)),
    "chronos2": LowRankChronos2Config(**shape(CHRONOS2, num_layers=1)),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EXPORTS = [backend for backend, export in BACKENDS.items() if export is not None]


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(latency_bench, "SECONDS", 0.0)
    monkeypatch.setattr(latency_bench, "LEAST_ROUNDS", 1)


@configs
@torch.inference_mode()
def test_there_is_a_layer_of_each_timed_rank_and_its_inputs_are_those_of_the_workload(config) -> None:
    bench = export_bench_of(config, "onnx", WORKLOAD)
    assert set(bench.inputs) == set(bench.kinds) == {name.kind for name in RankTable.full(config)}
    for kind, (here, there) in bench.inputs.items():
        layers = bench.graph.sublayers(kind)[: len(bench.timed_ranks(kind))]
        assert (len(here[0]), len(there[0])) == (WORKLOAD.batch_size, 3)
        for ranks, layer in zip(bench.timed_ranks(kind), layers, strict=True):
            assert layer(*here).shape == here[0].shape
            if not isinstance(layer, AttentionToOne):  # which has no queries and keys, and may be one matrix
                weights = {name: one.numel() for name, one in layer.named_parameters() if "turned" not in name}
                assert sum(weights.values()) == ranks.parameters(config)
    assert not any(module._forward_pre_hooks for module in bench.graph.modules())


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_layer_alone_computes_what_it_does_in_the_graph(backend, monkeypatch) -> None:
    bench = export_bench_of(CONFIGS["chronos2"], backend, WORKLOAD)
    two = [PerHeadRanks(8, 8), PerHeadRanks(2, 1)]
    monkeypatch.setattr(bench, "timed_ranks", lambda _: two)
    bench.kinds = ["time"]
    computed, medians = [], bench.medians
    monkeypatch.setattr(
        bench, "medians", lambda actions: computed.extend(action() for action in actions) or medians(actions)
    )
    assert [ranks for ranks, seconds in bench.seconds_alone("time") if seconds > 0] == two
    inputs, _ = bench.inputs["time"]
    for layer, found in zip(bench.graph.sublayers("time"), computed, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), layer(*inputs), rtol=1e-4, atol=1e-5)


def test_layers_make_the_difference_between_whole_forecasts() -> None:
    bench = export_bench_of(LowRankChronosBoltConfig(**shape(BOLT)), "onnx", WORKLOAD)
    alone = {
        kind: [(ranks, float(ranks.parameters(bench.config))) for ranks in bench.timed_ranks(kind)]
        for kind in bench.kinds
    }
    full, small = RankTable.full(bench.config), {kind: bench.small_ranks(kind) for kind in bench.kinds}
    apart = sum(dict(alone[name.kind])[full[name]] - dict(alone[name.kind])[small[name.kind]] for name in full)
    bench.alone = alone
    for share, scale in ((0.8, 0.8), (-1.0, 0.5), (10.0, 2.0)):  # where the machine was busy: within a factor of two
        vars(bench).pop("scale", None)
        bench.whole_seconds = (100.0, 100.0 + share * apart)
        assert bench.scale == pytest.approx(scale)
        for (_, seconds), (_, in_graph) in zip(alone["cross"], bench.layer_seconds("cross"), strict=True):
            assert in_graph == pytest.approx(scale * seconds)


@pytest.mark.parametrize("backend", EXPORTS)
def test_the_record_names_the_backend(backend, bolt, monkeypatch) -> None:
    benches = []
    monkeypatch.setattr(
        "hf_lowrank.compression.search.measure_speed",
        lambda bench: benches.append(bench) or invented(backend=bench.backend),
    )
    monkeypatch.setattr("hf_lowrank.compression.search.measure_forecasts", lambda bench, _: Achieved(3.0, 2.0))
    model = compress_pretrained(bolt, target_speedup=1.5, backend=backend, calibration=None)
    assert model.config.compression["speed"]["backend"] == backend
    assert [type(bench) for bench in benches] == [ExportBench]
    assert f"backend='{backend}'" in str(render_card(model, "me/model"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx-int8", "openvino-bfloat16"])
def test_what_was_measured_is_recorded(backend, tmp_path, monkeypatch) -> None:
    """Whole forecasts are of exports. A target of 0.1 is reached on every machine: nothing is cut."""
    pipelines, pipeline = [], ExportBench.pipeline
    monkeypatch.setattr(ExportBench, "pipeline", lambda *args: pipelines.append(pipeline(*args)) or pipelines[-1])
    dense = latency_bench.bench_of(CONFIGS["bolt"]).random_model({})
    model = compress_pretrained(dense, target_speedup=0.1, backend=backend, calibration=None)
    speed = model.config.compression["speed"]
    assert speed["backend"] == backend
    assert speed["speedup_measured"] == speed["seconds_measured_dense"] / speed["seconds_measured"] > 0.1
    assert len(pipelines) == (0 if backend == "torch" else 3)  # of small, dense and chosen ranks
    for one in pipelines:
        assert isinstance(one.inner_model, ExportedModel)
        record = one.inner_model.forecaster.record
        assert (record.format, record.quantize) == BACKENDS[backend]
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.compression["speed"] == speed


def test_what_cannot_be_exported_is_said_before_the_work(chronos_t5, bolt, monkeypatch) -> None:
    for call in (compress_pretrained, plan_compression):
        with pytest.raises(ValueError, match=r"model must be a Chronos-Bolt or a Chronos-2, .* found a T5For"):
            call(chronos_t5, target_speedup=2, backend="onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"needs the package openvino: pip install 'hf-lowrank\[export\]'"):
        compress_pretrained(bolt, max_loss=0.1, target_speedup="max", backend="openvino")


@pytest.mark.slow
@pytest.mark.parametrize("backend", EXPORTS)
def test_a_forecast_is_about_as_fast_as_predicted(backend) -> None:
    """Within a factor that a busy machine keeps."""
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    config = LowRankChronosBoltConfig(**shape(BOLT, {"context_length": 160}, **sizes))
    bench = export_bench_of(config, backend, replace(WORKLOAD, batch_size=64, context_length=160))
    speed = measure_speed(bench)
    full = RankTable.full(config)
    table = RankTable(
        {
            name: FeedForwardRanks(1024, 48, 48) if name.is_feed_forward else PerHeadRanks(32, 16 + 16 * name.index)
            for name in full
        }
    )
    achieved = measure_forecasts(bench, table)
    predicted = speed.forecast(full) / speed.forecast(table)
    assert predicted > 1
    assert achieved.speedup == pytest.approx(predicted, rel=0.5)
    assert np.log(speed.forecast(full) / achieved.seconds_dense) == pytest.approx(0, abs=np.log(3))
