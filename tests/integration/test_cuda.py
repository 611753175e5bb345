"""On a GPU: what every model answers, how it is compressed, loaded, forecast with, trained and timed, beside the CPU's answers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline

from hf_lowrank import PretrainingSettings, benchmark, compress_pretrained, forecast_frame, load_pipeline, pretrain
from hf_lowrank.checkpoints.dense import as_full_rank, load_chronos
from hf_lowrank.checkpoints.objectives import objective_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

REFERENCES = ["reference", "reference-bolt", "reference-2"]


def predictions(model, batch):
    objective = objective_of(model.config, type(model))
    with torch.no_grad():
        return objective.predict(model, batch).float().cpu()


@pytest.mark.parametrize("reference", REFERENCES)
def test_full_rank_and_compressed_models_answer_as_on_the_cpu(reference):
    dense = load_chronos(reference)
    objective = objective_of(dense.config, type(dense))
    (batch,), _ = objective.batches("synthetic", 1, 3)
    batch = objective.cut(batch, 8, short=True)
    full = as_full_rank(dense)
    small = compress_pretrained(dense, total_ratio=0.5, calibration=None)
    for model in (full, small):
        on_cpu = predictions(model, batch)
        torch.testing.assert_close(predictions(model.cuda(), batch), on_cpu, rtol=1e-3, atol=1e-3)
        model.cpu()


@pytest.mark.parametrize("reference", REFERENCES)
def test_compression_on_the_gpu_loses_what_it_loses_on_the_cpu(reference):
    dense = load_chronos(reference)
    objective = objective_of(dense.config, type(dense))
    (batch,), _ = objective.batches("synthetic", 1, 3)
    wanted = predictions(dense, batch)
    losses = {}
    for device in ("cuda", "cpu"):
        small = compress_pretrained(reference, total_ratio=0.5, device=device, dtype="float32")
        assert small.device.type == device
        losses[device] = objective.divergence(wanted, predictions(small, batch)) / len(wanted)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.25)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compressed_checkpoints_forecast_in_chronos_pipelines(reference, dtype, tmp_path):
    compress_pretrained(reference, uniform=8, calibration=None).save_pretrained(tmp_path)
    context = torch.sin(torch.arange(200) * 2 * torch.pi / 24) + 2
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path, device_map="cuda", dtype=dtype)
    quantiles, mean = pipeline.predict_quantiles([context], prediction_length=24, quantile_levels=[0.1, 0.5, 0.9])
    assert next(pipeline.inner_model.parameters()).is_cuda
    assert torch.isfinite(torch.as_tensor(np.asarray([*mean]))).all()
    assert np.isfinite(np.asarray([*quantiles], dtype=float)).all()


@pytest.mark.parametrize("family", ["t5", "bolt", "chronos2"])
def test_a_model_is_trained_within_budgets(family, tmp_path):
    settings = PretrainingSettings(
        family=family,
        steps=30,
        batch_tokens=1024,
        budgets=[0.5, 0.25],
        budget_steps=20,
        evaluation_batches=2,
        workers=0,
    )
    model = pretrain(tmp_path / "out", settings)
    assert all(weight.isfinite().all() for weight in model.parameters())
    record = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert record["history"][0]["loss"] > record["held_out_loss"]
    assert set(record["held_out_loss_within"]) == {"0.5", "0.25"}


def test_forecasts_are_those_of_the_cpu(tmp_path):
    compress_pretrained("reference-bolt", uniform=8, calibration=None).save_pretrained(tmp_path)
    times = pd.date_range("2024-01-01", periods=300, freq="h")
    frame = pd.DataFrame({"item_id": "a", "timestamp": times, "target": np.arange(300.0) % 24})
    answers = [
        forecast_frame(load_pipeline(tmp_path, device=device), frame, horizon=24).select_dtypes("number").to_numpy()
        for device in ("cuda", "cpu")
    ]
    np.testing.assert_allclose(*answers, rtol=0.02, atol=0.05)


def test_bench_measures_it(tmp_path):
    compress_pretrained("reference", uniform=8, calibration=None).save_pretrained(tmp_path)
    case = {"batch_size": [2], "context_length": [64], "prediction_length": [8], "num_samples": [2]}
    result = benchmark(str(tmp_path), "reference", device="cuda", repeats=2, **case)
    assert all(seconds > 0 for comparison in result.comparisons for seconds in comparison.model.seconds)
