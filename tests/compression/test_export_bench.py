"""target_speedup where a model is exported: said in the record, near what is predicted, and refused where there is no export."""

from __future__ import annotations

import json

import chronos_models
import pytest
from typer.testing import CliRunner

from hf_lowrank import CompressionSettings, compress_pretrained
from hf_lowrank.checkpoints.rank_table import RankTable
from hf_lowrank.cli.app import app
from hf_lowrank.hub.model_card import render_card

for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_speedup": 2, "backend": "tensorrt"}, "backend must be one of torch, onnx, .*, found 'tensorrt'"),
        ({"total_ratio": 0.5, "backend": "onnx"}, "backend='onnx' is where target_speedup is timed: give it too"),
    ],
)
def test_a_backend_that_cannot_be_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompressionSettings(**arguments)


def test_a_t5_has_no_export(dense_t5, tiny_chronos_config):
    model = dense_t5(num_layers=1, num_decoder_layers=1)
    model.config.chronos_config = vars(tiny_chronos_config)
    with pytest.raises(ValueError, match=r"must be a Chronos-Bolt or a Chronos-2.*found a T5ForConditionalGeneration"):
        compress_pretrained(model, target_speedup=2, backend="onnx", calibration=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dense", "backend"),
    [
        (chronos_models.dense_bolt, "onnx-int8"),
        (chronos_models.dense_bolt, "openvino-bfloat16"),
        (chronos_models.dense_chronos2, "openvino"),
    ],
)
def test_the_record_and_the_card_say_where_it_was_timed(dense, backend):
    """A target of 0.1 is reached on every machine: nothing is cut."""
    model = compress_pretrained(dense(), target_speedup=0.1, backend=backend, calibration=None)
    record = model.config.compression["speed"]
    assert record["backend"] == backend
    assert record["speedup_measured"] == record["seconds_measured_dense"] / record["seconds_measured"] > 0.1
    assert RankTable.of(model.config) == RankTable.full(model.config)
    assert f"backend='{backend}'" in str(render_card(model, "me/model"))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "backend"), [("reference-bolt", "onnx"), ("reference-2", "openvino")])
def test_an_export_is_about_as_fast_as_predicted(source, backend, tmp_path):
    """Within a factor that a busy machine keeps; by the command, which says where it was timed."""
    command = ["compress", source, str(tmp_path / "small"), "--target-speedup", "1.3", "--backend", backend]
    result = CliRunner().invoke(app, [*command, "--calibration", "none", "--json", str(tmp_path / "said.json")])
    assert result.exit_code == 0, result.output
    assert f"A forecast in {backend} (batch 32" in " ".join(result.output.split())
    record = json.loads((tmp_path / "said.json").read_text())["compression"]["speed"]
    predicted = record["seconds_dense"] / record["seconds_predicted"]
    assert predicted >= 1.3 * (1 - 1e-9)
    assert record["speedup_measured"] == pytest.approx(predicted, rel=0.5)
