"""The options of layers: their order, costs, losses and validity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5EncoderModel, T5ForConditionalGeneration

from hf_lowrank.budget_solver import Options
from hf_lowrank.checkpoints.dense import DenseCheckpoint, load_dense
from hf_lowrank.checkpoints.families import T5
from hf_lowrank.checkpoints.rank_table import ComponentName, LatentRanks, LayerRanks, PerHeadRanks
from hf_lowrank.compression.layers import (
    LATENT_RANKS,
    AttentionLayer,
    FeedForwardLayer,
    attention_layer,
    feed_forward_layer,
)
from hf_lowrank.models.configuration_lowrank_t5 import attention_parameters, cached_numbers, feed_forward_parameters

FORMS = {"heads": ("per_head",), "latent": ("latent",), "both": ("per_head", "latent")}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (T5ForConditionalGeneration, {}),
    "gated": (T5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu", "num_heads": 3, "d_kv": 4}),
    "encoder": (T5EncoderModel, {"d_ff": 12}),
}
models = pytest.mark.parametrize(("model_class", "changes"), MODELS.values(), ids=MODELS)


def attention_layers(dense: DenseCheckpoint, forms: tuple[str, ...], max_rank: int | None) -> list[AttentionLayer]:
    return [attention_layer(dense, name, None, forms, max_rank=max_rank) for name, _ in dense.layers]


def feed_forward_layers(dense: DenseCheckpoint) -> list[FeedForwardLayer]:
    return [feed_forward_layer(dense, name, None) for name, _ in dense.feed_forward_layers]


def losses_of(layer: AttentionLayer | FeedForwardLayer) -> dict[ComponentName, np.ndarray]:
    """With other weights than ones, so that no two components have the same loss."""
    components = layer.components(weight=None)
    return {name: (3 + i) * component.loss for i, (name, component) in enumerate(components.items())}


def assert_sound(layer: AttentionLayer | FeedForwardLayer, options: Options, multiple_of: int) -> None:
    """What holds for all options of all layers."""
    config = layer.dense.config
    losses = losses_of(layer)
    assert options.entries[0] == layer.dense_ranks
    assert options.loss[0] == 0
    assert len(options.loss) == len(options.entries)
    assert all(len(cost) == len(options.entries) for cost in options.costs.values())
    assert (options.loss >= 0).all()

    def predicted(ranks: dict[ComponentName, int]) -> float:
        return sum(losses[name][rank] for name, rank in ranks.items())

    # None is a whole matrix, at which nothing is lost; the dense ranks have no part of a latent layer.
    wanted = [
        predicted(
            {
                layer.component(part): rank
                for part, rank in ranks.to_dict().items()
                if rank and layer.component(part) in losses
            }
        )
        for ranks in options.entries
    ]
    np.testing.assert_allclose(options.loss, wanted, rtol=1e-12)
    found = [predicted(layer.component_ranks(ranks)) for ranks in options.entries]
    np.testing.assert_allclose(options.loss, found, rtol=1e-12)

    whole = T5.lowrank_config(config)
    name = "feed_forward_ranks" if layer.name.is_feed_forward else "attention_ranks"
    for entry in (ranks.to_dict() for ranks in options.entries):
        whole._validate_entry(entry, name)  # of `validate_ranks`, which looks at all layers
        assert all(type(rank) is int for rank in entry.values() if rank is not None)  # plain numbers, for JSON
    full = {"qk": config.d_kv, "vo": config.d_kv, "width": config.d_ff}
    for ranks in options.entries[1:]:
        for part, rank in ranks.to_dict().items():
            assert rank is None or rank % multiple_of == 0 or rank == full.get(part)


@models
@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("multiple_of", "max_rank"), [(1, None), (3, 8), (4, 8)])
def test_options_of_attention(dense_t5, model_class, changes, forms, multiple_of, max_rank):
    dense = load_dense(dense_t5(model_class, **changes))
    config = dense.config
    # The first of every kind: their options depend on the spectra alone.
    for layer in {layer.name.kind: layer for layer in attention_layers(dense, forms, max_rank)}.values():
        options = layer.options(losses_of(layer), multiple_of=multiple_of)
        assert_sound(layer, options, multiple_of)
        parameters = [
            attention_parameters(ranks.to_dict(), d_model=config.d_model, num_heads=config.num_heads)
            for ranks in options.entries
        ]
        cached = [cached_numbers(ranks.to_dict(), num_heads=config.num_heads) for ranks in options.entries]
        np.testing.assert_array_equal(options.costs["parameters"], parameters)
        np.testing.assert_array_equal(
            options.costs["cache"], np.zeros(len(cached)) if layer.name.kind == "encoder_self" else cached
        )
        assert max(parameters) == parameters[0]
        assert {ranks.form for ranks in options.entries[1:]} == set(forms)
        latents = [ranks.latent for ranks in options.entries if isinstance(ranks, LatentRanks)]
        assert max(latents, default=1) <= (max_rank or config.d_model)
        pairs = {(ranks.qk, ranks.vo) for ranks in options.entries if isinstance(ranks, PerHeadRanks)}
        sizes = {*range(multiple_of, config.d_kv + 1, multiple_of), config.d_kv}
        if "per_head" in forms:
            assert pairs == {(qk, vo) for qk in sizes for vo in sizes}
        assert set(options.costs) == {"parameters", "cache"}


@models
@pytest.mark.parametrize("multiple_of", [1, 3, 4])
def test_options_of_feed_forward(dense_t5, model_class, changes, multiple_of):
    dense = load_dense(dense_t5(model_class, **changes))
    config = dense.config
    for layer in feed_forward_layers(dense):
        options = layer.options(losses_of(layer), multiple_of=multiple_of)
        assert_sound(layer, options, multiple_of)
        parameters = [
            feed_forward_parameters(ranks.to_dict(), d_model=config.d_model, is_gated=config.is_gated_act)
            for ranks in options.entries
        ]
        np.testing.assert_array_equal(options.costs["parameters"], parameters)
        np.testing.assert_array_equal(options.costs["cache"], np.zeros(len(parameters)))
        assert max(parameters) == parameters[0]
        # Every pair of ranks that saves something.
        saving = [
            rank
            for rank in range(multiple_of, config.d_model + 1, multiple_of)
            if rank * (config.d_model + config.d_ff) <= config.d_model * config.d_ff
        ]
        pairs = [(ranks.wi, ranks.wo) for ranks in options.entries]
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == {(wi, wo) for wi in (None, *saving) for wo in (None, *saving)}


@models
def test_costs_are_the_sizes_of_the_weights(dense_t5, model_class, changes):
    """Not by a formula: the numbers in the matrices that `factorize` makes."""
    dense = load_dense(dense_t5(model_class, **changes))
    layers = [*attention_layers(dense, ("per_head", "latent"), 8), *feed_forward_layers(dense)]
    for layer in {layer.name.kind: layer for layer in layers}.values():
        options = layer.options(losses_of(layer), multiple_of=1)
        chosen = np.unique(np.linspace(0, len(options.entries) - 1, 12).astype(int))
        for i in chosen:
            weights = layer.factorize(options.entries[i])
            assert sum(weight.numel() for weight in weights.values()) == options.costs["parameters"][i]
            assert all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights.values())
            assert all(name.startswith(f"{layer.module}.") for name in weights)
        size = sum(dense.weights[name].numel() for name in layer.given_names)
        assert size == options.costs["parameters"][0]


@models
def test_seconds_are_asked_for_every_option(dense_t5, model_class, changes):
    dense = load_dense(dense_t5(model_class, **changes))
    layers = [*attention_layers(dense, ("per_head", "latent"), 8), *feed_forward_layers(dense)]
    for layer in {layer.name.kind: layer for layer in layers}.values():
        asked = []

        def seconds(kind: str, ranks: LayerRanks, asked: list = asked) -> float:
            asked.append((kind, ranks))
            return float(len(asked))

        options = layer.options(losses_of(layer), multiple_of=2, seconds=seconds)
        assert asked == [(layer.name.kind, ranks) for ranks in options.entries]
        np.testing.assert_array_equal(options.costs["seconds"], np.arange(1.0, len(asked) + 1))
        plain = layer.options(losses_of(layer), multiple_of=2)
        assert plain.entries == options.entries


def test_sketches_are_kept_only_where_they_are_smaller(dense_t5):
    dense = load_dense(dense_t5())
    d, n = dense.config.d_model, dense.config.num_heads
    (layer, *_) = attention_layers(dense, ("latent",), None)
    options = layer.options(losses_of(layer), multiple_of=1)
    sketched = 0
    for ranks in options.entries[1:]:
        for sketch in (ranks.query, ranks.output):
            if sketch is not None:
                sketched += 1
                assert sketch * (d + n * ranks.latent) < n * ranks.latent * d
    assert sketched > 10
    assert layer.with_parts("latent", {"latent": 4, "query": 16, "output": 2}) == LatentRanks(4, None, 2)


def test_options_of_wide_layers_are_bounded(dense_t5):
    """Of a thousand ranks at most some hundred are looked at; the smallest and the largest are among them."""
    model = dense_t5(T5EncoderModel, d_model=320, d_ff=512, d_kv=16, num_heads=20, num_layers=1)
    dense = load_dense(model)
    (attention,) = attention_layers(dense, ("latent",), 160)
    latents = {ranks.latent for ranks in attention.options(losses_of(attention), multiple_of=1).entries[1:]}
    assert 20 < len(latents) <= LATENT_RANKS
    assert min(latents) == 1
    (feed_forward,) = feed_forward_layers(dense)
    options = feed_forward.options(losses_of(feed_forward), multiple_of=1)
    inner = {ranks.wi for ranks in options.entries}
    assert 20 < len(inner) <= LATENT_RANKS + 1
    assert {None, 320 * 512 // (320 + 512)} <= inner
    assert_sound(feed_forward, options, 1)


@pytest.mark.parametrize("kind", ["zero", "rank one"])
def test_degenerate_weights_have_sound_options(dense_t5, kind):
    model = dense_t5()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.split(".")[-2] in ("q", "k", "v", "o", "wi", "wo"):
                weight.copy_(torch.outer(weight[:, 0], weight[0]) if kind == "rank one" else 0 * weight)
    dense = load_dense(model)
    layers = [*attention_layers(dense, ("per_head", "latent"), 8), *feed_forward_layers(dense)]
    for layer in {layer.name.kind: layer for layer in layers}.values():
        options = layer.options(losses_of(layer), multiple_of=1)
        assert_sound(layer, options, 1)
        assert all(torch.isfinite(weight).all() for weight in layer.factorize(options.entries[-1]).values())
