"""The layers of a dense model as the road sees them, and models in which one of them is truncated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.checkpoints.dense import DenseCheckpoint, build_model
from hf_lowrank.checkpoints.rank_table import (
    FORMS,
    ComponentName,
    FeedForwardRanks,
    LatentRanks,
    LayerRanks,
    RankTable,
)
from hf_lowrank.compression.calibration import Calibration
from hf_lowrank.compression.layers import Layer, attention_layer, feed_forward_layer


def layers_of(dense: DenseCheckpoint, measured: Calibration, forms: tuple[str, ...] = tuple(FORMS)) -> list[Layer]:
    layers: list[Layer] = [
        attention_layer(dense, name, measured.attention(name), forms, max_rank=None) for name, _ in dense.layers
    ]
    return layers + [
        feed_forward_layer(dense, name, measured.feed_forward(name)) for name, _ in dense.feed_forward_layers
    ]


def ranks_of(entry: dict[str, Any]) -> LayerRanks:
    """The ranks that an entry of a configuration's table describes."""
    if "width" in entry:
        return FeedForwardRanks(**entry)
    return FORMS["latent" if "latent" in entry else "per_head"](**entry)


def predictions(layers: list[Layer]) -> dict[ComponentName, Any]:
    return {name: found for layer in layers for name, found in layer.components(weight=None).items()}


def only(layer: Any, part: str, rank: int) -> LayerRanks:
    """The ranks of the layer with only this component truncated."""
    whole = LatentRanks(layer.config.d_model, None, None) if part in LatentRanks.parts else layer.dense_ranks
    return replace(whole, **{part: rank})


def truncated(dense: DenseCheckpoint, layer: Layer, ranks: LayerRanks) -> PreTrainedModel:
    """The low-rank model in which this layer has these ranks, and all others are dense."""
    config = dense.family.lowrank_config(dense.config)
    RankTable({layer.name: ranks}).write(config)
    weights = {name: weight for name, weight in dense.weights.items() if name not in layer.given_names}
    return build_model(
        dense.lowrank_class,
        config,
        weights | layer.factorize(ranks),
        tied_keys=dense.tied_keys,
        generation_config=None,
    )
