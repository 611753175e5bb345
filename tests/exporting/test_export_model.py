"""Exported models: they forecast as the model does, in every format, in chronos' pipelines and without PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline
from chronos_models import BOLT_RANKS, CHRONOS2_RANKS, bolt, chronos2, dense_bolt
from hub_server import serve_this_process
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from hf_lowrank import benchmark, benchmark_shape, calibrate, compress_pretrained, export_model, load_pipeline
from hf_lowrank.checkpoints.pipelines import as_pipeline, fingerprint
from hf_lowrank.cli.app import app
from hf_lowrank.runtime.folder import RECORD, read_export
from hf_lowrank.runtime.forecaster import Forecaster
from hf_lowrank.runtime.pipelines import ExportedBoltPipeline, ExportedChronos2Pipeline

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)

SERIES = [torch.randn(length, generator=torch.Generator().manual_seed(length)).cumsum(0) for length in (3, 17, 60)]


# One layer of each kind: test_graphs has all forms, and the exporters take seconds a layer.
BOLT = {
    "num_layers": 1,
    "num_decoder_layers": 1,
    "attention_ranks": {kind: layers[:1] for kind, layers in BOLT_RANKS["attention_ranks"].items()},
    "feed_forward_ranks": {stack: layers[:1] for stack, layers in BOLT_RANKS["feed_forward_ranks"].items()},
}
CHRONOS2 = {
    "num_layers": 1,
    "attention_ranks": {kind: layers[:1] for kind, layers in CHRONOS2_RANKS["attention_ranks"].items()},
    "feed_forward_ranks": {"encoder": CHRONOS2_RANKS["feed_forward_ranks"]["encoder"][:1]},
}


@pytest.fixture(scope="module")
def bolt_model():
    torch.manual_seed(0)
    return bolt(**BOLT)


@pytest.fixture(scope="module")
def chronos2_model():
    torch.manual_seed(1)
    return chronos2(**CHRONOS2)


@pytest.fixture(scope="module")
def exported_bolt(tmp_path_factory, bolt_model) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "bolt"
    export_model(bolt_model, folder, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def exported_chronos2(tmp_path_factory, chronos2_model) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "chronos2"
    export_model(chronos2_model, folder, show_progress=False)
    return folder


def far(found: Any, wanted: Any) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted))


@pytest.mark.parametrize("horizon", [1, 6, 20])
def test_a_bolt_in_chronos_pipeline(exported_bolt, bolt_model, horizon) -> None:
    pipeline = load_pipeline(exported_bolt)
    assert type(pipeline) is ExportedBoltPipeline is type(BaseChronosPipeline.from_pretrained(exported_bolt))
    wanted = as_pipeline(bolt_model)
    for levels in ([0.1, 0.5], [0.25, 0.85]):
        assert far(*(one.predict_quantiles(SERIES, horizon, levels)[0] for one in (pipeline, wanted))) < 1e-4
    assert pipeline.model_context_length == 40
    assert pipeline.model_prediction_length == 6
    assert pipeline.quantiles == wanted.quantiles


@pytest.mark.parametrize("horizon", [1, 15, 40])
def test_a_chronos2_in_chronos_pipeline(exported_chronos2, chronos2_model, horizon) -> None:
    pipeline = load_pipeline(exported_chronos2)
    assert type(pipeline) is ExportedChronos2Pipeline is type(BaseChronosPipeline.from_pretrained(exported_chronos2))
    group = {
        "target": torch.stack([SERIES[2], SERIES[2].flip(0)]).numpy(),
        "past_covariates": {"known": np.arange(60.0), "past": np.arange(60.0) ** 0.5},
        "future_covariates": {"known": np.arange(60.0, 60.0 + horizon)},
    }
    wanted = as_pipeline(chronos2_model)
    assert far(pipeline.predict([group], horizon), wanted.predict([group], horizon)) < 1e-4
    assert far(pipeline.predict(SERIES, horizon), wanted.predict(SERIES, horizon)) < 1e-4
    joint = {"prediction_length": horizon, "cross_learning": True}
    assert far(pipeline.predict(SERIES, **joint), wanted.predict(SERIES, **joint)) < 1e-4


def test_data_frames(exported_chronos2, chronos2_model) -> None:
    times = pd.date_range("2024-01-01", periods=30, freq="h")
    frame = pd.concat(
        pd.DataFrame({"item_id": name, "timestamp": times, "target": np.arange(30.0) % period})
        for name, period in (("a", 5), ("b", 7))
    )
    found, wanted = (
        pipeline.predict_df(frame, prediction_length=8, quantile_levels=[0.1, 0.5, 0.9])
        for pipeline in (load_pipeline(exported_chronos2), as_pipeline(chronos2_model))
    )
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_an_export_says_of_itself(exported_bolt, exported_chronos2, bolt_model) -> None:
    record = read_export(exported_bolt)
    assert record.parity["relative_difference"] < 1e-4
    assert abs(record.parity["added_loss"]) < 1e-6
    assert record.made["parameters"] == bolt_model.num_parameters()
    assert {"torch", "onnx", "onnxruntime"} < set(record.made)
    assert record.settings == bolt_model.config.chronos_config
    assert record.graphs == {"forecast": "forecast.onnx"}
    sizes = {name: one["bytes"] for name, one in record.files.items()}
    assert sizes == {name: (exported_bolt / name).stat().st_size for name in ("forecast.onnx", "weights.bin")}
    pipeline = load_pipeline(exported_bolt)
    assert fingerprint(pipeline) == record.fingerprint
    assert fingerprint(load_pipeline(exported_chronos2)) != record.fingerprint
    with pytest.raises(NotImplementedError, match="embed needs the checkpoint"):
        pipeline.embed(SERIES[0])
    with pytest.raises(NotImplementedError, match="fit needs the checkpoint"):
        load_pipeline(exported_chronos2).fit([])


def test_both_graphs_share_their_weights(exported_chronos2, chronos2_model) -> None:
    sizes = {name: one["bytes"] for name, one in read_export(exported_chronos2).files.items()}
    assert set(sizes) == {"alone.onnx", "grouped.onnx", "weights.bin"}
    large = sum(4 * one.numel() for one in chronos2_model.parameters() if 4 * one.numel() >= 1024)
    assert sizes["weights.bin"] < 1.6 * large  # two of everything would be 2; alignment is much here


@pytest.mark.parametrize(
    "format", ["openvino", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("torch", "inductor"))]
)
def test_other_formats(tmp_path, format) -> None:
    bolt_model = bolt(**BOLT)
    for name, weight in bolt_model.named_parameters():
        if "layer_norm" in name:  # as fresh models have them: OpenVINO's converter trips over it
            torch.nn.init.ones_(weight)
    record = export_model(bolt_model, tmp_path / "out", format=format, show_progress=False)
    assert record.format == format
    assert record.parity["relative_difference"] < 1e-4
    found, wanted = (one.predict(SERIES, 12) for one in (load_pipeline(tmp_path / "out"), as_pipeline(bolt_model)))
    assert far([found], [wanted]) < 1e-4
    one = SERIES[1][None]
    assert far([load_pipeline(tmp_path / "out").predict(one, 6)], [as_pipeline(bolt_model).predict(one, 6)]) < 1e-4


@pytest.mark.parametrize(
    "format", ["onnx", *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("openvino", "inductor"))]
)
def test_int8(tmp_path, bolt_model, format) -> None:
    options = {"format": format, "quantize": "int8", "tolerance": 1e-3}
    record = export_model(bolt_model, tmp_path / "int8", **options, show_progress=False)
    graph = record.made["int8"]["forecast"]
    losses = {one["name"]: one["loss"] for one in graph["losses"]}
    assert "encoder.0.first" in losses
    assert sum(loss for name, loss in losses.items() if name not in graph["in_float"]) <= 1e-3
    assert record.parity["relative_difference"] > 0
    found, wanted = (one.predict(SERIES, 6) for one in (load_pipeline(tmp_path / "int8"), as_pipeline(bolt_model)))
    assert 1e-5 < far([found], [wanted]) < 0.2
    if format == "inductor":
        path = tmp_path / "int8" / RECORD
        content = json.loads(path.read_text())
        content["made"]["compiled_for"]["instructions"] = "AVX1024"
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"forecast.pt2 was compiled for .*AVX1024.*, and this is"):
            load_pipeline(tmp_path / "int8").predict(SERIES, 6)


@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("bolt", "openvino"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("bolt", "torch"),
                ("chronos2", "torch"),
                ("chronos2", "openvino"),
                ("bolt", "inductor"),
                ("chronos2", "inductor"),
            )
        ),
    ],
)
def test_bfloat16(tmp_path, request, format, family) -> None:
    model = request.getfixturevalue(f"{family}_model")
    # Random models forecast quantiles that lie close together, where a small error costs much.
    options = {"format": format, "quantize": "bfloat16", "tolerance": 0.01}
    record = export_model(model, tmp_path / "half", **options, show_progress=False)
    assert record.quantize == "bfloat16"
    assert read_export(tmp_path / "half") == record
    wanted = as_pipeline(model)
    assert far(load_pipeline(tmp_path / "half").predict(SERIES, 5), wanted.predict(SERIES, 5)) < 0.05
    if format == "openvino":  # which computes in float32 where the processor has no bfloat16
        return
    assert far(load_pipeline(tmp_path / "half").predict(SERIES, 5), wanted.predict(SERIES, 5)) > 1e-4
    if format == "torch":
        whole = export_model(model, tmp_path / "whole", format=format, show_progress=False)
        sizes = [sum(one["bytes"] for one in of.files.values()) for of in (record, whole)]
        assert sizes[0] < sizes[1]
        for horizon in (1, 12):  # a single patch ahead, and several
            exact = load_pipeline(tmp_path / "whole").predict(SERIES, horizon)
            assert far(exact, wanted.predict(SERIES, horizon)) < 1e-4


def test_integers_are_exported_as_what_they_stand_for(tmp_path, bolt_model) -> None:
    dense = dense_bolt(num_layers=1, num_decoder_layers=1)
    small = compress_pretrained(dense, total_ratio=0.9, quantize="int8", calibration=calibrate(dense, num_batches=1))
    bits = dict(small.config.weight_bits)
    record = export_model(small, tmp_path / "out", format="torch", show_progress=False)
    assert record.parity["relative_difference"] < 1e-4
    assert small.config.weight_bits == bits  # what was given is as it was
    found, wanted = (one.predict(SERIES, 6) for one in (load_pipeline(tmp_path / "out"), as_pipeline(small)))
    assert far([found], [wanted]) < 1e-4


def test_int8_that_costs_more_than_it_may_is_not_written(tmp_path, bolt_model, monkeypatch) -> None:
    monkeypatch.setattr("hf_lowrank.exporting.export.LARGEST_EXCESS", 0.0)
    with pytest.raises(RuntimeError, match=r"in int8 adds .* of the expected loss where 0.001 was expected at most"):
        export_model(bolt_model, tmp_path / "out", quantize="int8", tolerance=1e-3, show_progress=False)
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_nothing_is_compiled(tmp_path, bolt_model, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler"):
        export_model(bolt_model, tmp_path / "out", format="inductor", show_progress=False)


@pytest.mark.slow
def test_a_given_model_stays_as_it_is(tmp_path) -> None:
    for model in (bolt(**BOLT), dense_bolt(num_layers=1, num_decoder_layers=1)):
        model.to(torch.bfloat16).train()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        export_model(model, tmp_path / type(model).__name__, format="torch", show_progress=False)
        assert model.training
        assert all(weight.requires_grad for weight in model.parameters())
        after = model.state_dict()
        assert all(
            after[name].dtype == weight.dtype and torch.equal(after[name], weight) for name, weight in before.items()
        )


@pytest.mark.slow
def test_int8_of_a_trained_model_costs_what_was_measured(tmp_path) -> None:
    small = compress_pretrained("reference-bolt", total_ratio=0.25)
    record = export_model(small, tmp_path / "int8", quantize="int8", tolerance=1e-3, show_progress=False)
    whole = export_model(small, tmp_path / "float", show_progress=False)
    losses = {one["name"]: one["loss"] for one in record.made["int8"]["forecast"]["losses"]}
    spared = record.made["int8"]["forecast"]["in_float"]
    expected = sum(loss for name, loss in losses.items() if name not in spared)
    assert expected <= 1e-3
    # On other series than those that it was expected from.
    assert expected / 3 < record.parity["added_loss"] < 3 * expected
    sizes = [sum(one["bytes"] for one in of.files.values()) for of in (record, whole)]
    assert sizes[0] < 0.5 * sizes[1]


def test_forecasts_without_torch(exported_bolt, exported_chronos2, bolt_model, chronos2_model, tmp_path) -> None:
    code = f"""
import sys, numpy
from hf_lowrank.runtime.forecaster import Forecaster
series = [numpy.load({str(tmp_path)!r} + f"/{{i}}.npy") for i in range(3)]
for name, folder in (("bolt", {str(exported_bolt)!r}), ("chronos2", {str(exported_chronos2)!r})):
    found = Forecaster(folder, threads=1).predict_quantiles(series, 6, [0.1, 0.25, 0.9], batch_size=2)
    numpy.save({str(tmp_path)!r} + f"/{{name}}.npy", found)
print(*{{"torch", "transformers", "chronos", "pandas", "scipy"}} & set(sys.modules))
"""
    for i, series in enumerate(SERIES):
        np.save(tmp_path / f"{i}.npy", series.numpy())
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not printed.strip()
    for name, model in (("bolt", bolt_model), ("chronos2", chronos2_model)):
        wanted, _ = as_pipeline(model).predict_quantiles(SERIES, 6, [0.1, 0.25, 0.9])
        wanted = torch.cat(wanted) if isinstance(wanted, list) else wanted
        assert far([torch.from_numpy(np.load(tmp_path / f"{name}.npy"))], [wanted]) < 1e-4


def test_the_forecaster_says_what_it_cannot(exported_bolt) -> None:
    forecaster = Forecaster(exported_bolt)
    assert forecaster.predict_quantiles([], 3).shape == (0, 3, 9)
    assert forecaster.predict_quantiles([[1.0, np.nan, 2.0]]).shape == (1, 6, 9)
    for arguments, said in [
        (([[1.0]], 7), r"prediction_length must be in \[1, 6\], found 7"),
        (([[1.0]], 0), r"prediction_length must be in \[1, 6\], found 0"),
        (([[1.0]], 3, [0.05]), r"quantile_levels must be in \[0.1, 0.9\], found \[0.05\]"),
        (([[1.0], []], 3), r"series\[1\] must be 1-D and hold a value, found shape \(0,\)"),
        (([[[1.0]]], 3), r"series\[0\] must be 1-D and hold a value, found shape \(1, 1\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            forecaster.predict_quantiles(*arguments)


def test_from_the_hub(tmp_path, exported_bolt, monkeypatch) -> None:
    with serve_this_process({}, tmp_path, monkeypatch) as hub:
        hub.publish("ann/exported", exported_bolt)
        for load in (load_pipeline, BaseChronosPipeline.from_pretrained, ExportedBoltPipeline.from_pretrained):
            found = load("ann/exported").predict(SERIES, 6)
            assert torch.equal(found, load_pipeline(exported_bolt).predict(SERIES, 6))


def _damaged(folder: Path, change: Any) -> Path:
    record = json.loads((folder / RECORD).read_text())
    change(record, folder)
    (folder / RECORD).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record, _: record.update(version=2), "is of version 2, and this hf_lowrank reads 1"),
        (lambda record, _: record.update(family="t5"), "must hold the record of an export"),
        (lambda record, _: record.pop("parity"), "must hold the record of an export"),
        (lambda record, _: record["graphs"].clear(), "names no file of the graph 'forecast'"),
        (lambda _, folder: os.truncate(folder / "weights.bin", 100), r"weights.bin must have \d+ bytes, and has 100"),
        (lambda _, folder: os.remove(folder / "forecast.onnx"), r"forecast.onnx must have \d+ bytes, and is missing"),
    ],
)
def test_damaged_folders(exported_bolt, tmp_path, change, said) -> None:
    folder = _damaged(Path(shutil.copytree(exported_bolt, tmp_path / "copy")), change)
    for load in (read_export, load_pipeline, Forecaster):
        with pytest.raises(ValueError, match=said):
            load(folder)
    (folder / RECORD).write_text("{")
    with pytest.raises(ValueError, match="must hold JSON"):
        load_pipeline(folder)
    with pytest.raises(OSError, match=f"must be a folder with a {RECORD}"):
        read_export(tmp_path)


def test_an_export_is_no_checkpoint(exported_bolt) -> None:
    with pytest.raises(ValueError, match="is an exported model, which only forecasts; it must be a dense checkpoint"):
        compress_pretrained(exported_bolt, total_ratio=0.5)
    with pytest.raises(ValueError, match="must be an export of family 'chronos2', found 'bolt'"):
        ExportedChronos2Pipeline.from_pretrained(exported_bolt)


def test_bad_arguments_write_nothing(tmp_path, bolt_model, exported_bolt) -> None:
    output = tmp_path / "out"
    tiny = dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"), 4)
    t5 = T5ForConditionalGeneration(T5Config(**tiny, decoder_start_token_id=0))
    for model, options, said in [
        (bolt_model, {"format": "onxx"}, "format must be one of onnx, openvino, torch, inductor, found 'onxx'"),
        (bolt_model, {"quantize": "int4"}, "quantize must be None, 'int8' or 'bfloat16', found 'int4'"),
        (
            bolt_model,
            {"quantize": "bfloat16"},
            "quantize='bfloat16' is for format='openvino' or 'torch' or 'inductor', found format='onnx'",
        ),
        (
            bolt_model,
            {"quantize": "int8", "format": "torch"},
            "quantize='int8' is for format='onnx' or 'openvino' or 'inductor', found format='torch'",
        ),
        (bolt_model, {"tolerance": 0.0}, "tolerance must be above 0, found 0.0"),
        (
            t5,
            {},
            "model must be a Chronos-Bolt or a Chronos-2, dense or compressed, found a T5ForConditionalGeneration",
        ),
        (exported_bolt, {}, "model must be a Chronos-Bolt or a Chronos-2, dense or compressed, found a ExportedModel"),
    ]:
        with pytest.raises(ValueError, match=said):
            export_model(model, output, show_progress=False, **options)
    assert not output.exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        export_model(bolt_model, tmp_path / "there", overwrite=True, show_progress=False)
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_a_missing_package_is_named(tmp_path, bolt_model, exported_bolt, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ImportError, match=r"An export to onnx needs the package onnxscript: pip install 'hf-lowrank\[export\]'"
    ):
        export_model(bolt_model, tmp_path / "out", show_progress=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="This export needs the package onnxruntime"):
        load_pipeline(exported_bolt).predict(SERIES[0][None], 3)


def test_the_command(tmp_path, exported_bolt) -> None:
    runner, out = CliRunner(), tmp_path / "out"
    bolt().save_pretrained(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(out), "--format", "torch"]
    result = runner.invoke(app, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"] == read_export(out).parity
    again = runner.invoke(app, arguments)
    assert again.exit_code == 1
    assert "is a folder that is not empty" in again.stderr
    lone = runner.invoke(app, [*arguments, "--tolerance", "0.1"])
    assert "--tolerance goes with --int8" in lone.stderr
    both = runner.invoke(app, [*arguments, "--int8", "--bfloat16"])
    assert "--int8 and --bfloat16 say two things about the numbers" in both.stderr
    csv = tmp_path / "series.csv"
    times = pd.date_range("2024-01-01", periods=20, freq="h")
    pd.DataFrame({"item_id": "a", "timestamp": times, "target": np.arange(20.0) % 5}).to_csv(csv, index=False)
    forecast = runner.invoke(
        app, ["forecast", str(exported_bolt), str(csv), str(tmp_path / "f.csv"), "--horizon", "4"]
    )
    assert forecast.exit_code == 0, forecast.output


SIZES: dict[str, Any] = {
    "batch_size": [2],
    "context_length": [30],
    "prediction_length": [4],
    "repeats": 1,
    "threads": 1,
}


@pytest.mark.slow
def test_bench_measures_an_export(tmp_path, exported_bolt, bolt_model) -> None:
    bolt_model.save_pretrained(tmp_path)
    result = benchmark(str(exported_bolt), str(tmp_path), show_progress=False, **SIZES)
    side = result.comparisons[0].model
    assert side.pipeline == "ExportedBoltPipeline"
    assert side.parameters == result.comparisons[0].against.parameters
    assert side.bytes_on_disk > 4 * side.parameters
    assert side.floor_seconds is None
    assert side.floor_ratio == []
    assert json.loads(json.dumps(result.to_dict()))
    assert result.tables()
    assert isinstance(result.remarks(), list)


def test_what_a_bench_of_a_shape_refuses() -> None:
    with pytest.raises(ValueError, match="quantize is of an export: give format='onnx' too"):
        benchmark_shape("bolt-tiny", quantize="int8")
    with pytest.raises(ValueError, match="total_ratio says all that ratio, feed_forward_ratio and form say"):
        benchmark_shape("bolt-tiny", total_ratio=0.1, ratio=0.2)


@pytest.mark.slow
def test_bench_exports_a_shape() -> None:
    result = benchmark_shape("bolt-tiny", total_ratio=0.1, format="torch", show_progress=False, **SIZES)
    side = result.comparisons[0].model
    assert side.name == "bolt-tiny 0.1, torch"
    assert side.parameters < 0.5 * result.comparisons[0].against.parameters
