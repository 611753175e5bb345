"""compress_pretrained: exact at full rank, as small as it says, and the same model to whoever loads it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline, ChronosPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)

from hf_lowrank import (
    LowRankT5Config,
    LowRankT5EncoderModel,
    LowRankT5ForConditionalGeneration,
    LowRankT5Model,
    compress_pretrained,
    plan_compression,
    summarize,
)
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.compression.calibration import Calibration, calibrate
from hf_lowrank.models.modeling_lowrank_layers import LatentAttention, PerHeadAttention
from hf_lowrank.models.pipeline_lowrank_t5 import LowRankChronosPipeline

# Random weights have flat spectra, and the user is told so; the tests of the warnings turn them on again.
pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

D_MODEL, D_KV = 16, 8
KINDS = ("encoder_self", "decoder_self", "cross")
# Changes to the tiny shape of conftest.
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"num_heads": 1},
    "many heads, inner size above d_model": {"num_heads": 5},
    "gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "deep encoder": {"num_layers": 3, "num_decoder_layers": 1},
}
CLASSES = {
    T5ForConditionalGeneration: (LowRankT5ForConditionalGeneration, AutoModelForSeq2SeqLM),
    T5Model: (LowRankT5Model, AutoModel),
    T5EncoderModel: (LowRankT5EncoderModel, AutoModelForTextEncoding),
}
shapes = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
classes = pytest.mark.parametrize("model_class", CLASSES, ids=lambda cls: cls.__name__)


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.randint(2, 64, (2, 9))}
    inputs["attention_mask"] = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(2, 64, (2, 5))
    return inputs


@torch.no_grad()
def assert_same_output(found: torch.nn.Module, wanted: torch.nn.Module, tolerance: float = 1e-4) -> None:
    inputs = inputs_of(wanted)
    output, expected = found(**inputs)[0], wanted(**inputs)[0]
    if found.config._attn_implementation != wanted.config._attn_implementation:  # stock before transformers 5.15
        tolerance = max(tolerance, 1e-4)
    # Of the largest logit: rounding in float32 grows with it, and T5 v1.1, which does not scale its output, has them at 15.
    assert_close(output, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))
    assert expected.std() > 0.01  # not a comparison of zeros


def by_weights(model: Any, **arguments: Any) -> torch.nn.Module:
    """Compressed without a look at data; without the word that this is meant, a text T5 is warned of."""
    return compress_pretrained(model, calibration=None, **arguments)


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """("cross.3", module) of every attention layer."""
    for i, block in enumerate(model.encoder.block):
        yield f"encoder_self.{i}", block.layer[0].SelfAttention
    if model.config.is_encoder_decoder:
        for i, block in enumerate(model.decoder.block):
            yield f"decoder_self.{i}", block.layer[0].SelfAttention
            yield f"cross.{i}", block.layer[1].EncDecAttention


@torch.no_grad()
def with_low_rank(model: torch.nn.Module, rank: int, *, shared: bool = False) -> torch.nn.Module:
    """The model with the products of every head of that rank; `shared`: all heads read the same `rank` directions."""
    for _, layer in attention_layers(model):
        heads, inner = layer.n_heads, layer.q.out_features // layer.n_heads
        basis = torch.randn(rank, D_MODEL)
        for part in (layer.q, layer.k, layer.v):
            read = basis if shared else torch.randn(heads, rank, D_MODEL)
            part.weight.copy_((torch.randn(heads, inner, rank) @ read).flatten(0, 1) / (rank * inner) ** 0.5)
    return model


def every_layer(config: Any, entry: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    depths = (config.num_layers, config.num_decoder_layers, config.num_decoder_layers)
    return {kind: [dict(entry) for _ in range(depth)] for kind, depth in zip(KINDS, depths)}


def unique_parameters(folder: Path) -> int:
    """The numbers in all safetensors files, by the headers alone."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            sizes |= {name: int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
    return sum(sizes.values())


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Exact at full rank


@shapes
@classes
def test_full_rank_is_the_dense_model(dense_t5, model_class, changes):
    dense = dense_t5(model_class, **changes)
    model = by_weights(dense, uniform=D_KV)
    assert type(model) is CLASSES[model_class][0]
    assert not model.training
    assert_same_output(model, dense, tolerance=0)


@shapes
@classes
def test_latent_at_d_model_is_the_dense_model(dense_t5, model_class, changes):
    dense = dense_t5(model_class, **changes)
    full = every_layer(dense.config, {"latent": D_MODEL, "query": D_MODEL, "output": D_MODEL})
    without_sketches = every_layer(dense.config, {"latent": D_MODEL, "query": None, "output": None})
    for arguments in ({"ranks": full}, {"ranks": without_sketches}, {"uniform": D_MODEL, "form": "latent"}):
        model = by_weights(dense, **arguments)
        assert all(isinstance(layer, LatentAttention) for _, layer in attention_layers(model))
        assert_same_output(model, dense)


@shapes
@classes
def test_heads_of_low_rank_are_compressed_exactly(dense_t5, model_class, changes):
    """The truncation itself at full rank: what is dropped is zero."""
    dense = with_low_rank(dense_t5(model_class, **changes), 5)
    model = by_weights(dense, uniform=5)
    assert all(isinstance(layer, PerHeadAttention) for _, layer in attention_layers(model))
    assert all(layer.q.out_features == 5 * layer.n_heads for _, layer in attention_layers(model))
    assert_same_output(model, dense)
    assert max(model.config.compression["predicted_loss"].values()) < 1e-12


@shapes
def test_inputs_of_low_rank_are_compressed_exactly(dense_t5, changes):
    dense = with_low_rank(dense_t5(**changes), 4, shared=True)
    table = every_layer(dense.config, {"latent": 4, "query": 4, "output": None})
    model = by_weights(dense, ranks=table)
    assert_same_output(model, dense)
    assert max(model.config.compression["predicted_loss"].values()) < 1e-12


def test_a_t5_v1_1_with_a_head_of_its_own(tmp_path, dense_t5):
    """shared.weight and lm_head.weight saved with different values: loaded untied, compressed untied, saved untied."""
    dense_t5(feed_forward_proj="gated-gelu").save_pretrained(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(64, D_MODEL)
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config |= {"tie_word_embeddings": False}
    del config["scale_decoder_outputs"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))

    dense = T5ForConditionalGeneration.from_pretrained(tmp_path / "dense")
    for source in (tmp_path / "dense", dense):
        model = by_weights(source, uniform=D_KV)
        assert model.config.scale_decoder_outputs is False
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
        assert torch.equal(model.encoder.embed_tokens.weight, weights["shared.weight"])
        assert_same_output(model, dense, tolerance=0)
        model.save_pretrained(tmp_path / "compressed")
        assert_same_output(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "compressed"), dense, tolerance=0)
    assert unique_parameters(tmp_path / "compressed") == dense.num_parameters()


# As small as it says


def parameters_of_the_formula(config: LowRankT5Config) -> tuple[int, int]:
    """Of a low-rank model and of the dense one of its shape: the layers of the summary, and what no rank changes."""
    depths = [config.num_layers, config.num_decoder_layers if config.is_encoder_decoder else 0]
    stacks = 2 if config.is_encoder_decoder else 1
    norms = (2 * depths[0] + 3 * depths[1] + stacks) * D_MODEL
    biases = stacks * config.relative_attention_num_buckets * config.num_heads
    rest = config.vocab_size * D_MODEL + norms + biases
    summary = summarize(config)
    return summary.total("parameters") + rest, summary.total("dense_parameters") + rest


def assert_within_budgets(config: LowRankT5Config, arguments: dict[str, Any]) -> None:
    """By the summary, which counts in whole numbers what the budgets are shares of."""
    summary = summarize(config)
    feed_forward = {row.kind for row in summary.rows} - set(KINDS)
    shares = {
        "ratio": summary.attention_ratio,
        "max_cache_ratio": summary.cache_ratio,
        "total_ratio": summary.total("parameters") / summary.total("dense_parameters"),
        "feed_forward_ratio": summary.total("parameters", *feed_forward)
        / summary.total("dense_parameters", *feed_forward),
    }
    assert {"ratio", "max_cache_ratio", "total_ratio", "feed_forward_ratio"} >= arguments.keys()
    for name, budget in arguments.items():
        assert shares[name] <= budget * (1 + 1e-9)


@shapes
@classes
@pytest.mark.parametrize(
    "arguments",
    [{"uniform": 3, "feed_forward_ratio": 0.5}, {"ratio": 0.4}, {"energy": 0.1, "form": {"cross": "latent"}}],
    ids=["uniform", "ratio", "mixed"],
)
def test_the_saved_parameters_are_those_of_the_formula(tmp_path, dense_t5, model_class, changes, arguments):
    dense = dense_t5(model_class, **changes)
    model = by_weights(dense, **arguments)
    model.save_pretrained(tmp_path)
    config = LowRankT5Config.from_pretrained(tmp_path)
    compressed, full = parameters_of_the_formula(config)
    assert unique_parameters(tmp_path) == model.num_parameters() == compressed
    assert dense.num_parameters() == full
    if "ratio" in arguments:
        assert_within_budgets(config, arguments)
        summary = summarize(config)
        heads = 2 * D_MODEL * config.num_heads  # nothing that would save is left out: one more rank does not fit
        assert summary.total("parameters", *KINDS) + heads > 0.4 * summary.total("dense_parameters", *KINDS)


shares_kept = st.floats(0.25, 1)
BUDGETS = st.fixed_dictionaries(
    {}, optional={"ratio": shares_kept, "max_cache_ratio": shares_kept, "feed_forward_ratio": st.floats(0.3, 1)}
) | st.fixed_dictionaries({"total_ratio": shares_kept}, optional={"max_cache_ratio": shares_kept})


@given(budgets=BUDGETS.filter(lambda found: set(found) - {"feed_forward_ratio"}), multiple_of=st.sampled_from([1, 2]))
@settings(max_examples=12)
def test_all_budgets_are_kept_together(dense_t5, budgets, multiple_of):
    dense = dense_t5(num_layers=1, num_decoder_layers=1)
    model = by_weights(dense, multiple_of=multiple_of, **budgets)
    assert_within_budgets(model.config, budgets)
    assert (model.num_parameters(), dense.num_parameters()) == parameters_of_the_formula(model.config)
    for entries in model.config.attention_ranks.values():
        assert all(rank is None or rank % multiple_of == 0 for rank in entries[0].values())


def test_an_encoder_has_no_cache_to_limit(dense_t5):
    with pytest.raises(ValueError, match="max_cache_ratio"):
        by_weights(dense_t5(T5EncoderModel), ratio=0.5, max_cache_ratio=0.5)


@given(ratios=st.tuples(st.floats(0.13, 1), st.floats(0.13, 1)))
@settings(max_examples=8)
def test_a_larger_ratio_loses_less_and_keeps_more(dense_t5, ratios):
    dense = dense_t5(T5EncoderModel)
    small, large = (by_weights(dense, ratio=ratio).config for ratio in sorted(ratios))
    assert summarize(small).attention_ratio <= min(ratios)
    assert summarize(small).attention_ratio <= summarize(large).attention_ratio
    loss = [sum(config.compression["predicted_loss"].values()) for config in (small, large)]
    assert loss[1] <= loss[0] + 1e-12


@torch.no_grad()
def test_the_recorded_loss_is_measured_on_the_models_own_weights(dense_t5):
    """Heads summed: 1 - ||truncated product||^2 / ||product||^2, from the two models' weights."""
    dense = dense_t5(num_heads=5)
    model = by_weights(dense, ratio=0.5)
    for (layer, before), (_, after) in zip(attention_layers(dense), attention_layers(model)):

        def energy(module: torch.nn.Module, left: str, right: str) -> float:
            def by_head(name: str) -> torch.Tensor:
                weight = getattr(module, name).weight.double()
                return (weight.T if name == "o" else weight).unflatten(0, (5, -1))

            return float((by_head(left).mT @ by_head(right)).square().sum())

        for part, pair in {"qk": ("q", "k"), "vo": ("o", "v")}.items():
            predicted = model.config.compression["predicted_loss"][f"{layer}.{part}"]
            assert 1 - energy(after, *pair) / energy(before, *pair) == pytest.approx(predicted, abs=1e-5)


def test_the_loss_of_a_latent_table_counts_its_sketches(dense_t5):
    dense = dense_t5()

    for truncated in (None, "latent", "query", "output"):
        entry = {"latent": D_MODEL, "query": None, "output": None} | ({truncated: 1} if truncated else {})
        model = by_weights(dense, ranks=every_layer(dense.config, entry))
        for name, loss in model.config.compression["predicted_loss"].items():
            assert (loss > 0.1) == (name.split(".")[2] == truncated)
            assert loss > 0.1 or loss == 0


# The input is left alone


@pytest.mark.parametrize(
    "arguments",
    [
        {"uniform": D_KV},
        {"uniform": 3},
        {"uniform": 3, "form": "latent"},
        {"epsilon": 0.5, "method": "paper"},
    ],
)
@classes
def test_a_loaded_model_is_left_as_it_is(dense_t5, model_class, arguments):
    dense = dense_t5(model_class).train()
    before, config = weights_of(dense), dense.config.to_dict()
    model = by_weights(dense, **arguments)
    assert dense.training
    assert dense.config.to_dict() == config
    assert type(dense.config).__name__ == "T5Config"

    storages = {tensor.untyped_storage().data_ptr() for tensor in dense.state_dict().values()}
    assert storages.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_embeddings_stay_tied(dense_t5):
    model = by_weights(dense_t5(), uniform=3)
    assert model.lm_head.weight is model.shared.weight
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.decoder.embed_tokens.weight is model.shared.weight


# Files of every kind


@pytest.mark.parametrize("form", ["per_head", "latent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(tmp_path, dense_t5, dtype, form):
    dense = dense_t5()
    dense.to(dtype).save_pretrained(tmp_path / "dense")
    model = by_weights(tmp_path / "dense", uniform=6, form=form)
    stock = T5ForConditionalGeneration.from_pretrained(tmp_path / "dense")
    assert model.dtype == dtype
    # T5 keeps `wo` in float32 where the rest is float16.
    stock_dtypes = {name: tensor.dtype for name, tensor in stock.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == stock_dtypes.get(name, dtype)
    model.save_pretrained(tmp_path / "compressed")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "compressed")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    # The truncation is computed in float64 from the rounded weights: rounding is all that differs.
    exact = by_weights(stock.float(), uniform=6, form=form)
    assert_same_output(model.float(), exact, tolerance=0.1)


@pytest.mark.parametrize("kind", ["one file", "sharded", "bin"])
def test_files_and_models_give_the_same(tmp_path, dense_t5, kind):
    dense = dense_t5()
    dense.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "sharded" else "5GB")
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(dense.state_dict(), tmp_path / "pytorch_model.bin")
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert (len(files) > 4) == (kind == "sharded")
    from_files = by_weights(tmp_path, uniform=3).state_dict()
    from_model = by_weights(dense, uniform=3).state_dict()
    assert from_files.keys() == from_model.keys()
    assert all(torch.equal(tensor, from_model[name]) for name, tensor in from_files.items())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


@classes
@pytest.mark.parametrize("form", ["per_head", "latent"])
def test_saved_and_loaded_is_bit_equal(tmp_path, dense_t5, model_class, form):
    low_rank_class, auto_class = CLASSES[model_class]
    model = by_weights(dense_t5(model_class), uniform=4, form=form)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is low_rank_class
    assert again.config.compression == model.config.compression
    assert again.config.attention_ranks == model.config.attention_ranks
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert_same_output(again, model, tolerance=0)


@torch.no_grad()
def test_device_maps_and_disk_offload(tmp_path, dense_t5):
    model = by_weights(dense_t5(), uniform=4, form={"cross": "latent"})
    model.save_pretrained(tmp_path / "model")
    inputs = inputs_of(model)
    wanted = model(**inputs).logits
    auto = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", device_map="auto")
    on_device = {name: tensor.to(auto.device) for name, tensor in inputs.items()}
    assert_close(auto(**on_device).logits.cpu(), wanted, rtol=0, atol=1e-4)

    devices = dict.fromkeys(["shared", "lm_head", "encoder.embed_tokens", "decoder.embed_tokens"], "cpu")
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        devices |= {f"{stack}.block.{i}": "cpu" if i else "disk" for i in range(depth)}
        devices |= {f"{stack}.final_layer_norm": "cpu", f"{stack}.dropout": "cpu"}
    offloaded = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=str(tmp_path / "offload")
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert_close(offloaded(**inputs).logits, wanted)


# Chronos


def series() -> torch.Tensor:
    return torch.sin(torch.arange(36.0) / 3) + torch.arange(36.0) / 20


@pytest.mark.parametrize("form", ["per_head", "latent"])
def test_a_compressed_chronos_is_a_chronos(tmp_path, chronos_t5, chronos_calibration, form):
    chronos_t5.save_pretrained(tmp_path / "dense")
    model = compress_pretrained(tmp_path / "dense", uniform=5, form=form, calibration=chronos_calibration)
    assert model.config.chronos_config == chronos_t5.config.chronos_config
    assert model.generation_config.to_diff_dict() == chronos_t5.generation_config.to_diff_dict()
    model.save_pretrained(tmp_path / "compressed")
    assert json.loads((tmp_path / "compressed" / "generation_config.json").read_text())["max_new_tokens"] == 8

    pipeline = BaseChronosPipeline.from_pretrained(tmp_path / "compressed")
    assert type(pipeline) is LowRankChronosPipeline
    assert type(pipeline.model.model) is LowRankT5ForConditionalGeneration
    samples = pipeline.predict([series(), series()[:20]], prediction_length=8, num_samples=3)
    assert samples.shape == (2, 3, 8)
    quantiles, mean = pipeline.predict_quantiles(series(), prediction_length=8, quantile_levels=[0.1, 0.5, 0.9])
    assert quantiles.shape == (1, 8, 3)
    assert mean.shape == (1, 8)
    assert torch.isfinite(quantiles).all()
    assert (quantiles.diff(dim=-1) >= 0).all()
    embeddings, _ = pipeline.embed(series())
    assert embeddings.shape == (1, 37, D_MODEL)
    frame = pd.DataFrame(
        {"item_id": "a", "timestamp": pd.date_range("2020-01-01", periods=36, freq="D"), "target": series().numpy()}
    )
    forecast = pipeline.predict_df(frame, prediction_length=8, quantile_levels=[0.1, 0.9])
    assert len(forecast) == 8
    assert (forecast["0.1"] <= forecast["0.9"]).all()


@pytest.mark.parametrize("arguments", [{"uniform": D_KV}, {"uniform": D_MODEL, "form": "latent"}])
def test_a_full_rank_chronos_draws_the_samples_of_the_dense_one(tmp_path, chronos_t5, chronos_calibration, arguments):
    chronos_t5.save_pretrained(tmp_path / "dense")
    compress_pretrained(tmp_path / "dense", calibration=chronos_calibration, **arguments).save_pretrained(
        tmp_path / "compressed"
    )
    samples, embeddings = [], []
    for name in ("dense", "compressed"):
        pipeline = ChronosPipeline.from_pretrained(tmp_path / name)
        torch.manual_seed(3)
        samples.append(pipeline.predict([series(), series()[:17]], prediction_length=8, num_samples=6))
        embeddings.append(pipeline.embed(series())[0])
    assert_close(samples[1], samples[0])
    assert samples[0].std(dim=1).min() > 0
    assert_close(embeddings[1], embeddings[0], rtol=0, atol=1e-4)


# Calibrated


def text_batches(model_class: type, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Token batches with padding on the right, and with labels that do not count."""
    batches = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(2, 64, (4, 9))}
        batch["attention_mask"] = (torch.arange(9) < torch.tensor([[9], [6], [8], [3]])).long()
        if model_class is not T5EncoderModel:
            batch["labels"] = torch.randint(2, 64, (4, 5)).masked_fill(
                torch.arange(5) >= torch.randint(2, 6, (4, 1)), -100
            )
        batches.append(batch)
    return batches


def assert_bit_equal(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.config.attention_ranks == wanted.config.attention_ranks
    assert found.config.feed_forward_ranks == wanted.config.feed_forward_ranks


def assert_finite(model: torch.nn.Module) -> None:
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_calibrated_full_rank_is_the_dense_model(chronos_t5, chronos_calibration):
    for arguments in (
        {"uniform": D_KV},
        {"ratio": 1.0},
        {"total_ratio": 1.0, "max_cache_ratio": 1.0},
        {"uniform": D_KV, "feed_forward_ratio": 1.0},
    ):
        model = compress_pretrained(chronos_t5, calibration=chronos_calibration, **arguments)
        assert_same_output(model, chronos_t5, tolerance=0)


@pytest.mark.parametrize("sketch", [None, D_MODEL])
def test_a_calibrated_latent_at_d_model_is_the_dense_model(chronos_t5, chronos_calibration, sketch):
    full = every_layer(chronos_t5.config, {"latent": D_MODEL, "query": sketch, "output": sketch})
    model = compress_pretrained(chronos_t5, calibration=chronos_calibration, ranks=full)
    assert_same_output(model, chronos_t5)


@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, T5EncoderModel])
def test_calibrated_heads_of_low_rank_are_compressed_exactly(monkeypatch, dense_t5, model_class):
    """Directions that no activation has are dropped, whatever the gradients are."""
    monkeypatch.setattr("hf_lowrank.compression.calibration.DAMPING", 0.0)
    dense = with_low_rank(dense_t5(model_class), 5)
    for refit in (False, True):
        model = compress_pretrained(dense, uniform=5, calibration=text_batches(model_class), refit=refit)
        assert_same_output(model, dense, tolerance=1e-3)
        # The products of activations are made in float32, which leaves that much where there is nothing.
        assert max(model.config.compression["predicted_loss"].values()) < 1e-7


@pytest.mark.parametrize(
    "budgets",
    [
        {"ratio": 0.4},
        {"total_ratio": 0.5},
        {"max_cache_ratio": 0.3},
        {"ratio": 0.6, "max_cache_ratio": 0.2},
        {"total_ratio": 0.6, "max_cache_ratio": 0.4},
        {"ratio": 0.5, "feed_forward_ratio": 0.5},
        {"ratio": 0.7, "max_cache_ratio": 0.5, "feed_forward_ratio": 0.4},
    ],
    ids=lambda budgets: " ".join(budgets),
)
def test_calibrated_budgets_are_kept_and_files_have_what_is_counted(
    tmp_path, chronos_t5, chronos_calibration, budgets
):
    model = compress_pretrained(chronos_t5, calibration=chronos_calibration, **budgets)
    assert_within_budgets(model.config, budgets)
    model.save_pretrained(tmp_path)
    compressed, full = parameters_of_the_formula(model.config)
    assert unique_parameters(tmp_path) == model.num_parameters() == compressed
    assert chronos_t5.num_parameters() == full
    assert compressed < full
    assert_finite(model)


def test_calibrated_and_refitted_is_saved_and_loaded_bit_equal(tmp_path, chronos_t5, chronos_calibration):
    model = compress_pretrained(
        chronos_t5, ratio=0.6, max_cache_ratio=0.3, feed_forward_ratio=0.5, calibration=chronos_calibration
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is LowRankT5ForConditionalGeneration
    assert_bit_equal(again, model)
    assert again.config.compression == model.config.compression
    assert_same_output(again, model, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_when_calibrated(tmp_path, chronos_t5, dtype):
    chronos_t5.to(dtype).save_pretrained(tmp_path)
    stock = T5ForConditionalGeneration.from_pretrained(tmp_path)
    calibration = calibrate(tmp_path, num_batches=2)
    model = compress_pretrained(
        tmp_path, ratio=0.6, max_cache_ratio=0.5, feed_forward_ratio=0.6, calibration=calibration
    )
    dtypes = {name: tensor.dtype for name, tensor in stock.state_dict().items()}
    for name, tensor in model.state_dict().items():
        thin = name.replace(".down.weight", ".weight").replace(".up.weight", ".weight")  # `wo` may be in float32
        assert tensor.dtype == dtypes.get(thin, dtype), name
    assert model.dtype == dtype
    assert_finite(model)
    # Rounding of the new weights is all that differs from the compression of the same weights in float32.
    exact = compress_pretrained(
        stock.float(), ratio=0.6, max_cache_ratio=0.5, feed_forward_ratio=0.6, calibration=calibration
    )
    assert model.config.attention_ranks == exact.config.attention_ranks
    assert_same_output(model.float(), exact, tolerance=0.1)


def test_a_folder_and_a_loaded_model_and_a_second_run_give_the_same_bits(tmp_path, chronos_t5):
    """With a short calibration made inside: one series, so the seed alone says which windows are drawn."""
    chronos_t5.save_pretrained(tmp_path)
    data = [series().numpy(), series().numpy()[:30] ** 2]
    arguments = {"ratio": 0.5, "calibration": data, "seed": 3}
    model = compress_pretrained(chronos_t5, **arguments)
    assert_bit_equal(compress_pretrained(tmp_path, **arguments), model)
    other = compress_pretrained(chronos_t5, **(arguments | {"seed": 4}))
    assert other.config.compression["predicted_loss"] != model.config.compression["predicted_loss"]
    assert model.config.compression["calibration"]["data"] == "2 series"
    assert model.config.compression["calibration"]["seed"] == model.config.compression["seed"] == 3
    assert json.loads(json.dumps(model.config.compression)) == model.config.compression


def test_calibration_leaves_the_callers_model_as_it_is(chronos_t5):
    dense = chronos_t5.train()
    frozen = dense.encoder.block[0].layer[0].SelfAttention.q.weight.requires_grad_(False)
    before, config = weights_of(dense), dense.config.to_dict()
    batches = [{"input_ids": torch.randint(2, 64, (3, 7)), "labels": torch.randint(2, 64, (3, 4))} for _ in range(2)]
    generator = torch.get_rng_state()
    model = compress_pretrained(dense, ratio=0.5, feed_forward_ratio=0.5, calibration=batches)
    assert torch.equal(torch.get_rng_state(), generator)
    assert dense.training
    assert dense.config.to_dict() == config
    for name, parameter in dense.named_parameters():
        assert parameter.requires_grad == (parameter is not frozen), name
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    for changed in (dense, model):
        for module in changed.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    storages = {tensor.untyped_storage().data_ptr() for tensor in dense.state_dict().values()}
    assert storages.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@classes
def test_token_batches_calibrate_any_t5(dense_t5, model_class):
    dense = dense_t5(model_class, feed_forward_proj="gated-gelu")
    budgets = {"ratio": 0.5, "feed_forward_ratio": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = compress_pretrained(dense, **budgets, calibration=text_batches(model_class))
    assert type(model) is CLASSES[model_class][0]
    assert model.config.compression["calibration"]["data"] == "batches of the user's"
    assert_within_budgets(model.config, budgets)
    assert_finite(model)
    assert torch.isfinite(model(**inputs_of(model))[0]).all()


@pytest.mark.parametrize("refit", [True, False])
def test_every_form_is_calibrated(chronos_t5, chronos_calibration, mixed_ranks, refit):
    ranks = mixed_ranks["attention_ranks"]
    table = {"encoder_self": ranks["decoder_self"], "decoder_self": ranks["encoder_self"], "cross": ranks["cross"][:2]}
    model = compress_pretrained(chronos_t5, ranks=table, calibration=chronos_calibration, refit=refit)
    assert model.config.attention_ranks == table
    assert model.config.compression["calibration"]["refit"] is refit
    assert_finite(model)


def test_a_reused_calibration_gives_the_same_bits(tmp_path, chronos_t5, chronos_calibration):
    chronos_calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    arguments = {"ratio": 0.5, "feed_forward_ratio": 0.6}
    first = compress_pretrained(chronos_t5, calibration=chronos_calibration, **arguments)
    for calibration in (chronos_calibration, loaded, tmp_path / "calibration.safetensors"):
        assert_bit_equal(compress_pretrained(chronos_t5, calibration=calibration, **arguments), first)


def test_a_calibration_of_another_model_is_an_error(chronos_t5, chronos_calibration, dense_t5):
    for other in (dense_t5(num_layers=3, num_decoder_layers=2, d_ff=32), dense_t5(num_layers=2), dense_t5(T5Model)):
        with pytest.raises(
            ValueError, match=r"calibration must be of a model of the same shape: found .*, the model has"
        ):
            compress_pretrained(other, uniform=4, calibration=chronos_calibration)


@pytest.mark.parametrize(
    "data",
    [
        [np.full(60, 3.0), np.arange(9.0)],
        [np.arange(4.0)],
        [np.where(np.arange(80) % 3 == 0, np.nan, np.sin(np.arange(80.0)))],
        [np.full(20, np.nan), np.append(np.full(30, np.nan), [1.0, 5.0, 2.0])],
        torch.tensor([[1e30, -1e30, 1e-30, 4.0] * 10]),
    ],
    ids=["one constant", "short", "every third missing", "one series missing", "huge and tiny"],
)
@pytest.mark.filterwarnings("ignore:series:UserWarning", "ignore:calibration:UserWarning")
def test_degenerate_series_give_finite_forecasts(chronos_t5, data):
    calibration = calibrate(chronos_t5, data, num_batches=1)
    for arguments in (
        {"ratio": 0.4, "max_cache_ratio": 0.5, "feed_forward_ratio": 0.5},
        {"uniform": 3, "form": "latent"},
    ):
        model = compress_pretrained(chronos_t5, calibration=calibration, **arguments)
        assert_finite(model)
        assert all(np.isfinite(loss) for loss in model.config.compression["predicted_loss"].values())
        forecast = as_pipeline(model).predict([series(), torch.ones(10)], prediction_length=8, num_samples=3)
        assert torch.isfinite(forecast).all()


def test_series_without_a_value_or_a_change_are_an_error(chronos_t5):
    with pytest.raises(ValueError, match="calibration: each of 2 series has one value throughout, such as 3"):
        compress_pretrained(chronos_t5, uniform=4, calibration=[np.full(60, 3.0), np.zeros(60)])
    with pytest.raises(ValueError, match="series holds no observed value: all values of all 2 series are missing"):
        compress_pretrained(chronos_t5, uniform=4, calibration=[np.full(40, np.nan), np.full(9, np.nan)])


def test_a_text_t5_without_batches_is_warned_of_and_compressed_by_its_weights(dense_t5):
    dense = dense_t5()
    with pytest.warns(UserWarning, match="is no Chronos checkpoint, so there is nothing to calibrate it on") as caught:
        model = compress_pretrained(dense, uniform=4)
    assert caught[0].filename == __file__
    assert "calibration=None" in str(caught[0].message)
    assert model.config.compression["calibration"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Keeping")
        assert_bit_equal(by_weights(dense, uniform=4), model)


# Policies


def test_a_schedule_is_the_papers_formula(dense_t5):
    dense = dense_t5(num_layers=3, num_decoder_layers=3)
    ranks = by_weights(dense, schedule=(3, 0.5)).config.attention_ranks
    assert all([entry["qk"] for entry in ranks[kind]] == [3, 5, 6] for kind in KINDS)
    assert all(entry["qk"] == entry["vo"] for kind in KINDS for entry in ranks[kind])
    rounded = by_weights(dense, schedule=(3, 0.5, "pow2"), form={"cross": "latent"}).config.attention_ranks
    assert [entry["qk"] for entry in rounded["encoder_self"]] == [4, 4, 4]
    assert [entry["latent"] for entry in rounded["cross"]] == [8, 8, 8]  # cross-attention counts on: i = 3, 4, 5


def test_an_explicit_table_with_every_form(dense_t5, mixed_ranks):
    dense = dense_t5()
    table = mixed_ranks["attention_ranks"]
    model = by_weights(dense, ranks=table)
    assert model.config.attention_ranks == table
    for name, layer in attention_layers(model):
        kind, i = name.split(".")
        assert isinstance(layer, LatentAttention if "latent" in table[kind][int(i)] else PerHeadAttention)
    partial = by_weights(dense, ranks={"cross": table["cross"]})
    assert partial.config.attention_ranks["cross"] == table["cross"]
    assert all(entry == {"qk": D_KV, "vo": D_KV} for entry in partial.config.attention_ranks["encoder_self"])
    for name in ("encoder.block.1.layer.0.SelfAttention.q.weight", "decoder.block.2.layer.0.SelfAttention.o.weight"):
        assert torch.equal(partial.get_parameter(name), dense.get_parameter(name))


def test_each_kind_of_attention_has_its_form(dense_t5):
    model = by_weights(dense_t5(), uniform=4, form={"cross": "latent", "encoder_self": "per_head"})
    for name, layer in attention_layers(model):
        assert isinstance(layer, LatentAttention if name.startswith("cross") else PerHeadAttention)
    assert model.config.compression["form"] == {
        "encoder_self": "per_head",
        "decoder_self": "per_head",
        "cross": "latent",
    }


@given(epsilons=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(max_examples=8)
def test_a_smaller_epsilon_never_keeps_less(dense_t5, epsilons):
    dense = dense_t5(T5EncoderModel)
    many, few = (by_weights(dense, epsilon=epsilon).config.attention_ranks for epsilon in sorted(epsilons))
    for more, less in zip(many["encoder_self"], few["encoder_self"]):
        assert more["qk"] >= less["qk"]
        assert more["vo"] >= less["vo"]


@pytest.mark.parametrize("policy", [{"epsilon": 0.4}, {"ratio": 0.6}, {"energy": 0.1}])
def test_ranks_can_be_multiples(dense_t5, policy):
    ranks = by_weights(dense_t5(), multiple_of=4, **policy).config.attention_ranks
    found = {rank for kind in KINDS for entry in ranks[kind] for rank in entry.values()}
    assert found <= {4, 8, None}  # None: a latent without a sketch


@pytest.mark.parametrize("epsilon", [1e-3, 10**-1.5, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_papers_method_keeps_the_papers_ranks(dense_t5, epsilon, dtype):
    dense = with_low_rank(dense_t5(), 5).to(dtype)
    model = by_weights(dense, epsilon=epsilon, method="paper")
    record = model.config.compression
    wanted, kept = {}, []
    layers = dict(attention_layers(model))
    for name, layer in attention_layers(dense):
        for part in "qkvo":
            weight = getattr(layer, part).weight
            u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
            rank = int((s / s[0] >= epsilon).sum())
            wanted[f"{name}.{part}"] = rank
            kept.append(rank / len(s))
            truncated = ((u[:, :rank] * s[:rank]) @ vh[:rank]).to(dtype)
            atol = 1e-5 if dtype == torch.float32 else 1e-2
            assert_close(getattr(layers[name], part).weight, truncated, rtol=atol, atol=atol)
    assert record["kept_ranks"] == wanted
    assert record["kept_rank_ratio"] == pytest.approx(np.mean(kept))
    assert record["method"] == "paper"
    assert model.config.attention_ranks == LowRankT5Config(**dense.config.to_dict()).attention_ranks
    if epsilon == 1e-3:
        assert set(wanted.values()) != {16}  # something is truncated


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_the_papers_method_at_a_ratio(dense_t5, ratio):
    model = by_weights(dense_t5(), ratio=ratio, method="paper")
    record = model.config.compression
    assert record["kept_rank_ratio"] <= ratio
    assert np.mean([rank / 16 for rank in record["kept_ranks"].values()]) == pytest.approx(record["kept_rank_ratio"])


@pytest.mark.parametrize("method", ["joint", "paper"])
def test_all_zero_attention_is_compressed_without_nan(dense_t5, method):
    dense = dense_t5()
    with torch.no_grad():
        for _, layer in attention_layers(dense):
            for part in "qkvo":
                getattr(layer, part).weight.zero_()
    forms = ["per_head", "latent"] if method == "joint" else ["per_head"]
    for policy in ({"epsilon": 0.1}, {"energy": 0.1}, {"ratio": 0.5}, {"uniform": 3}):
        for form in forms:
            model = by_weights(dense, method=method, form=form, **policy)
            assert_same_output(model, dense, tolerance=0)


# The record


def test_the_record_says_how_it_was_made(tmp_path, dense_t5):
    dense_t5().save_pretrained(tmp_path / "dense")
    config = by_weights(tmp_path / "dense", ratio=0.5, multiple_of=2).config
    record = config.compression
    assert json.loads(json.dumps(record)) == record
    assert {name: record[name] for name in ("method", "policy", "arguments", "source_class", "multiple_of")} == {
        "method": "joint",
        "policy": "ratio",
        "arguments": {"ratio": 0.5},
        "source_class": "T5ForConditionalGeneration",
        "multiple_of": 2,
    }
    assert record["source"] == "dense"
    assert set(record["versions"]) >= {"python", "torch", "transformers", "hf-lowrank"}
    assert record["form"] == dict.fromkeys(KINDS, "auto")
    assert record["calibration"] is None
    assert record["seed"] is None
    parts = {
        f"{kind}.{i}.{part}"
        for kind in KINDS
        for i, entry in enumerate(config.attention_ranks[kind])
        for part in entry
    }
    assert set(record["predicted_loss"]) == parts


def test_arguments_may_be_numpys_and_stay_the_callers(tmp_path, dense_t5, mixed_ranks):
    """They end up in a JSON file, and in a table that the caller may go on to edit."""
    dense = dense_t5()
    for arguments in ({"ratio": np.float32(0.5)}, {"uniform": np.int64(3)}):
        by_weights(dense, **arguments).save_pretrained(tmp_path)
        record = json.loads((tmp_path / "config.json").read_text())["compression"]
        assert record["arguments"] == {name: value.item() for name, value in arguments.items()}
    table = json.loads(json.dumps(mixed_ranks["attention_ranks"]))
    model = by_weights(dense, ranks=table)
    table["cross"][0]["latent"] = 1
    assert model.config.compression["arguments"]["ranks"] == mixed_ranks["attention_ranks"]
    assert model.config.attention_ranks == mixed_ranks["attention_ranks"]


# Warnings


@pytest.mark.parametrize("arguments", [{"ratio": 0.19}, {"ratio": 0.15, "method": "paper"}])
def test_a_small_ratio_is_warned_of(dense_t5, arguments):
    dense = with_low_rank(dense_t5(), 1)
    with pytest.warns(UserWarning, match=r"Keeping 1\d\.\d% of the attention without calibration is expected to drop"):
        model = by_weights(dense, **arguments)
    assert "predicted_loss" in model.config.compression


@pytest.mark.parametrize(
    "arguments", [{"ratio": 0.5, "form": "per_head"}, {"uniform": 2}, {"energy": 0.5}, {"schedule": (2, 0)}]
)
def test_a_flat_spectrum_is_warned_of_with_the_expected_loss(dense_t5, arguments):
    dense = dense_t5(num_heads=1, d_kv=16)
    with torch.no_grad():  # orthogonal: all singular values are equal
        for _, layer in attention_layers(dense):
            for part in (layer.q, layer.k, layer.v, layer.o):
                torch.nn.init.orthogonal_(part.weight)
    with pytest.warns(UserWarning, match="The spectra are flat: this checkpoint has little rank to spare") as caught:
        model = by_weights(dense, **arguments)
    losses = model.config.compression["predicted_loss"].values()
    assert f"expected to drop {sum(losses) / len(losses):.1%} of the squared singular values" in str(caught[0].message)
    assert f"and {max(losses):.1%} in " in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "arguments", [{"ratio": 0.5}, {"ratio": 0.2}, {"uniform": 2}, {"epsilon": 1e-3}, {"energy": 1e-3}]
)
def test_a_model_of_low_rank_is_compressed_in_silence(dense_t5, arguments):
    dense = with_low_rank(dense_t5(num_heads=4), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_weights(dense, **arguments)


def test_full_rank_is_silent(dense_t5):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_weights(dense_t5(), uniform=D_KV)
        by_weights(dense_t5(), ratio=1.0)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"Say how much to keep, as in total_ratio=0\.5"),
        ({"max_cache_ratio": 0.5, "uniform": 4}, "Give one rule for the ranks, found max_cache_ratio and uniform"),
        ({"ratio": 0.5, "total_ratio": 0.5}, "Give either ratio .* or total_ratio .*, not both"),
        (
            {"total_ratio": 0.5, "feed_forward_ratio": 0.5},
            "feed_forward_ratio is part of total_ratio: give one of them",
        ),
        ({"total_ratio": 0}, r"total_ratio must be in \(0, 1\], found 0"),
        ({"max_cache_ratio": 1.2}, r"max_cache_ratio must be in \(0, 1\], found 1.2"),
        ({"uniform": 4, "feed_forward_ratio": True}, r"feed_forward_ratio must be in \(0, 1\], found True"),
        ({"feed_forward_ratio": 0.5}, "Say how much to keep"),
        ({"epsilon": 0.1, "ratio": 0.5}, "Give one rule for the ranks, found epsilon and ratio"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], found 0.0"),
        ({"ratio": -0.1}, r"ratio must be in \(0, 1\], found -0.1"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], found 1.5"),
        ({"ratio": float("nan")}, r"ratio must be in \(0, 1\], found nan"),
        ({"ratio": 1.5, "method": "paper"}, r"ratio must be in \(0, 1\], found 1.5"),
        (
            {"max_cache_ratio": 0.01},
            r"max_cache_ratio=0.01 is too small: the smallest ranks keep 0\.\d{4} of .* cache",
        ),
        ({"uniform": 4, "feed_forward_ratio": 0.01}, r"feed_forward_ratio=0.01 is too small"),
        (
            {"ratio": 0.01},
            r"ratio=0.01 is too small: the smallest ranks keep 0\.\d{4} of the dense model's parameters",
        ),
        ({"epsilon": 1.5}, r"epsilon must be in \[0, 1\], found 1.5"),
        ({"energy": 1}, r"energy must be in \[0, 1\), found 1"),
        ({"uniform": 9}, r"uniform must be an integer in \[1, 8\], the full rank of encoder_self.0.qk, found 9"),
        ({"uniform": 0}, "uniform must be a positive integer, found 0"),
        ({"uniform": True}, "uniform must be a positive integer, found True"),
        ({"uniform": 17, "form": "latent"}, r"uniform must be an integer in \[1, 16\]"),
        ({"ranks": {"cross": [{"qk": 9, "vo": 8}] * 3}}, r"ranks .*\['cross'\]\[0\]\['qk'\] .* in \[1, 8\], found 9"),
        ({"ranks": {"cross": [{"qk": 8, "vo": 8}] * 2}}, r"ranks .*\['cross'\] must be a list of 3 entries, found 2"),
        ({"ranks": {"cross": [{"qk": 8}] * 3}}, r"ranks .*must be a dict with the keys {qk, vo} or"),
        ({"ranks": {"both": []}}, r"ranks .*unknown keys \['both'\]"),
        ({"ranks": [1, 2]}, "ranks is no table for this model"),
        ({"ranks": {}, "form": "latent"}, "ranks has the form of every layer: leave out form"),
        ({"ranks": {}, "multiple_of": 8}, "multiple_of rounds what a policy finds; ranks says the ranks themselves"),
        ({"schedule": (3, 0.2), "multiple_of": 8}, "multiple_of rounds what a policy finds; schedule says"),
        ({"schedule": 3}, r"schedule must be \(base_rank, rank_growth\) or .*, found 3"),
        ({"schedule": (0, 0.2)}, "base_rank must be a positive number, found 0"),
        ({"schedule": (3, 0.2, "up")}, "'ceil' or 'pow2', found 'up'"),
        ({"uniform": 3, "form": "lowrank"}, "form must be 'auto', 'per_head' or 'latent', found 'lowrank'"),
        (
            {"uniform": 3, "form": {"encoder": "latent"}},
            r"form has unknown kinds of attention \['encoder'\]; known are",
        ),
        (
            {"uniform": 3, "form": None},
            "form must be 'auto', 'per_head', 'latent' or a dictionary of them, found None",
        ),
        ({"uniform": 3, "method": "svd"}, "method must be 'joint' or 'paper', found 'svd'"),
        ({"uniform": 3, "multiple_of": 0}, "multiple_of must be a positive integer, found 0"),
        ({"schedule": (3, 0.2), "method": "paper"}, "method='paper' takes epsilon, ratio, uniform or energy"),
        (
            {"epsilon": 0.1, "form": "latent", "method": "paper"},
            "method='paper' takes .* neither form, multiple_of",
        ),
    ],
)
def test_bad_arguments_are_named(dense_t5, arguments, message):
    dense = dense_t5()
    before = weights_of(dense)
    with pytest.raises(ValueError, match=message):
        by_weights(dense, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_a_pipeline_is_its_model(chronos_t5, bolt, chronos2):
    for model in (chronos_t5, bolt, chronos2):
        by_model = compress_pretrained(model, uniform=4, calibration=None)
        by_pipeline = compress_pretrained(as_pipeline(model), uniform=4, calibration=None)
        torch.testing.assert_close(by_pipeline.state_dict(), by_model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"dtype and device are for a checkpoint that is loaded here"):
        compress_pretrained(model, uniform=4, dtype="bfloat16")


@pytest.mark.parametrize(
    "budget",
    [
        {"ratio": 0.3},
        {"total_ratio": 0.3},
        {"ratio": 0.5, "max_cache_ratio": 0.2},
        {"uniform": 3, "feed_forward_ratio": 0.5},
    ],
)
def test_a_compression_stays_within_its_plan(chronos_t5, budget):
    plan, model = plan_compression(chronos_t5, **budget), compress_pretrained(chronos_t5, **budget, calibration=None)
    summary, sizes = summarize(model.config), {size.name: size for size in plan.sizes}
    assert sizes["all parameters"].at_most >= model.num_parameters()
    assert sizes["cached numbers a token"].at_most >= summary.total("cached_numbers")
    assert sizes["parameters of both"].at_most >= summary.total("parameters")
    assert sizes["all parameters"].dense == chronos_t5.num_parameters()


def test_progress_is_shown_where_somebody_watches(chronos_t5, capsys, monkeypatch):
    monkeypatch.setattr("hf_lowrank.progress.LOG_SECONDS", 0.0)  # in a log long work alone says how far it is
    for watched, show in ((False, None), (True, None), (False, True), (True, False)):
        monkeypatch.setenv("FORCE_COLOR", "1") if watched else monkeypatch.delenv("FORCE_COLOR", raising=False)
        compress_pretrained(chronos_t5, uniform=4, calibration=None, show_progress=show)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("Factorizing" in err) == (watched if show is None else show)
