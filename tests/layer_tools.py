"""The layers of a dense model as the road sees them, and models in which one of them is truncated."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.checkpoints.dense import DenseCheckpoint, build_model
from hf_lowrank.compression.calibration import Calibration
from hf_lowrank.compression.layers import Layer, attention_layer, feed_forward_layer

FORMS = ("per_head", "latent")


def layers_of(dense: DenseCheckpoint, measured: Calibration, forms: tuple[str, ...] = FORMS) -> list[Layer]:
    layers: list[Layer] = [
        attention_layer(dense, name, measured.attention(name), forms, max_rank=None) for name, _ in dense.layers
    ]
    return layers + [
        feed_forward_layer(dense, name, measured.feed_forward(name)) for name, _ in dense.feed_forward_layers
    ]


def predictions(layers: list[Layer]) -> dict[str, Any]:
    return {name: found for layer in layers for name, found in layer.components(weight=None).items()}


def entry_of(layer: Any, part: str, rank: int) -> dict[str, Any]:
    """The entry in which only this component is truncated."""
    if part in ("latent", "query", "output"):
        return {"latent": layer.config.d_model, "query": None, "output": None, part: rank}
    return {**layer.dense_entry, part: rank}


def truncated(dense: DenseCheckpoint, layer: Layer, entry: dict[str, Any]) -> PreTrainedModel:
    """The low-rank model in which this layer has this entry, and all others are dense."""
    config = dense.family.lowrank_config(dense.config)
    kind, index = layer.name.split(".")
    if "feed_forward" in kind:
        config.feed_forward_ranks[kind.removesuffix("_feed_forward")][int(index)] = entry
    else:
        config.attention_ranks[kind][int(index)] = entry
    config.validate_ranks()
    weights = {name: weight for name, weight in dense.weights.items() if name not in layer.dense_names}
    return build_model(
        dense.lowrank_class,
        config,
        weights | layer.factorize(entry),
        tied_keys=dense.tied_keys,
        generation_config=None,
    )
