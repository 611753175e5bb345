"""The last matrix of every truncated layer, refitted by least squares on the already compressed model.

Layer after layer, in the order in which they run: with h the hidden states of the dense model, h' those of the compressed one
so far, and z' what the compressed layer's last matrix reads,

    W = argmin E || (h + layer(h)) - (h' + W z') ||^2

so a layer also corrects what the layers before it got wrong. Where the last matrix is a sketch of rank p, W is truncated again in
the metrics of balanced truncation.

Where matrices become integers, those of a layer are rounded before its last matrix is fitted, and that is rounded before the next layer:
each layer corrects the rounding of those before it as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.objectives import Batch, Objective, objective_of
from ..checkpoints.rank_table import LayerName
from ..linear_algebra import product_over_rows
from ..models.modeling_lowrank_blocks import CrossAttentionLayer
from ..models.modeling_lowrank_chronos import GroupSelfAttention, TimeSelfAttention
from ..models.modeling_lowrank_layers import (
    LatentAttention,
    LowRankFeedForward,
    PerHeadAttention,
    ThinFactors,
    distances,
)
from ..progress import progress_display
from .calibration import Calibration
from .factorization import balanced_basis
from .rounding import Rounding, grams_of_inputs
from .sensitivity import skipped

__all__ = ["refit"]

# Of the mean squared feature: how strongly the matrix is held to its closed form.
RIDGE = 1e-5
REFIT_ARITHMETIC = 3e12  # that it may take, in multiplications


class _Caught(Exception):
    """Ends a forward pass at the first block."""


@dataclass
class _Stream:
    """One batch on its way through a stack, in the dense and in the compressed model."""

    dense: torch.Tensor
    lowrank: torch.Tensor
    counted: torch.Tensor  # bool (batch, length)
    arguments: dict[str, Any]  # the others that the stack gives its first block: masks, positions
    encoded: tuple[torch.Tensor, torch.Tensor] | None = None


@torch.no_grad()
def refit(
    checkpoint: DenseCheckpoint,
    dense: PreTrainedModel,
    lowrank: PreTrainedModel,
    calibration: Calibration,
    truncated: Mapping[str, LayerName],
    rounding: Rounding | None = None,
    *,
    show_progress: bool | None = None,
) -> None:
    """Refit `lowrank` in place.

    Args:
        checkpoint: What both models were made of.
        dense, lowrank: In float32 and evaluation mode, on one device; they may share weights.
        truncated: The module and name of every layer that is not dense any more:
            `"decoder.block.3.layer.1.EncDecAttention"` for `cross.3`.
        rounding: Which matrices of `lowrank` become integers; those of the layers in `truncated` are rounded.
    """
    encoded: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    objective = objective_of(checkpoint.config, checkpoint.model_class)
    weights = (one.numel() for name in checkpoint.stacks for one in getattr(dense, name).block.parameters())
    batches = objective.first_batches(calibration.batches, REFIT_ARITHMETIC / (2 * sum(weights)))
    with progress_display(show=show_progress) as display:
        task = display.add_task("Refitting", total=len(truncated))
        for name in checkpoint.stacks:
            streams = [
                _enter(objective, dense, name, batch, None if encoded is None else encoded[i])
                for i, batch in enumerate(batches)
            ]
            stacks = getattr(dense, name), getattr(lowrank, name)
            for path, sublayers in _sublayers(*stacks):
                module = f"{name}.{path}"
                if module in truncated:
                    layer = truncated[module]
                    is_across = layer.kind in checkpoint.family.across_series
                    if rounding is not None:
                        _round_inner(sublayers[1], stacks[1], streams, rounding)
                    _refit_layer(sublayers, stacks, streams, calibration, layer, rounding, is_across_series=is_across)
                    display.advance(task)
                    continue
                for stream in streams:
                    stream.dense = _run(sublayers[0], stacks[0], stream, is_dense=True)
                    stream.lowrank = _run(sublayers[1], stacks[1], stream, is_dense=False)
            encoded = [
                (stacks[0].final_layer_norm(stream.dense), stacks[1].final_layer_norm(stream.lowrank))
                for stream in streams
            ]


def _enter(
    objective: Objective,
    dense: PreTrainedModel,
    name: str,
    batch: Batch,
    encoded: tuple[torch.Tensor, torch.Tensor] | None,
) -> _Stream:
    """The hidden states and masks with which the stack calls its first block."""
    caught: dict[str, Any] = {}
    first = getattr(dense, name).block[0]

    def catch(_: nn.Module, arguments: tuple, keywords: dict) -> None:
        caught.update(inspect.signature(first.forward).bind(*arguments, **keywords).arguments)
        raise _Caught

    with ExitStack() as stack:
        stack.callback(first.register_forward_pre_hook(catch, with_kwargs=True).remove)
        if encoded is not None:  # the encoder is not run again
            blocks = dense.encoder.block
            stack.enter_context(skipped(blocks, [(encoded[0], None, None, None)] * len(blocks)))
        with suppress(_Caught):
            objective.predict(dense, batch)
    hidden = caught.pop("hidden_states")
    caught.pop("encoder_hidden_states", None)
    counted = objective.masks(batch)[name].to(hidden.device)
    return _Stream(dense=hidden, lowrank=hidden, counted=counted, arguments=caught, encoded=encoded)


def _sublayers(dense: nn.Module, lowrank: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, nn.Module]]]:
    """("block.3.layer.1.EncDecAttention", (dense sublayer, low-rank sublayer)) in the order in which they run."""
    for i, blocks in enumerate(zip(dense.block, lowrank.block)):
        for j, sublayers in enumerate(zip(blocks[0].layer, blocks[1].layer)):
            yield f"block.{i}.layer.{j}.{_inner_name(sublayers[0])}", sublayers


def _inner_name(sublayer: nn.Module) -> str:
    names = ("SelfAttention", "EncDecAttention", "DenseReluDense", "self_attention", "mlp")
    return next(name for name in names if hasattr(sublayer, name))


def _run(sublayer: nn.Module, stack: nn.Module, stream: _Stream, *, is_dense: bool) -> torch.Tensor:
    """The hidden states behind a sublayer, of the dense or of the compressed model."""
    hidden, given = (stream.dense if is_dense else stream.lowrank), stream.arguments
    kind = _inner_name(sublayer)
    if kind in ("DenseReluDense", "mlp"):
        return sublayer(hidden)
    if isinstance(sublayer, TimeSelfAttention):
        return sublayer(hidden, given["time_mask"], given["turns"])[0]
    if isinstance(sublayer, GroupSelfAttention):
        return sublayer(hidden, given["groups"])[0]
    if isinstance(sublayer, CrossAttentionLayer):
        assert stream.encoded is not None
        return sublayer(hidden, stream.encoded[0 if is_dense else 1], given["encoder_bias"])[0]
    # The first layer holds the position bias of all.
    distance = distances(hidden.shape[1], hidden.shape[1], device=hidden.device)
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(distance, given["mask"])
    return sublayer(hidden, bias=bias)[0]


def _last_matrices(layer: nn.Module) -> tuple[nn.Linear, nn.Linear | None]:
    """The matrix that is refitted, and the sketch behind it."""
    if isinstance(layer, LowRankFeedForward):
        return (layer.wo.down, layer.wo.up) if isinstance(layer.wo, ThinFactors) else (layer.wo, None)
    assert isinstance(layer, (PerHeadAttention, LatentAttention))
    sketch = getattr(layer, "output_sketch", None)
    return layer.o, sketch if isinstance(sketch, nn.Linear) else None


def _round_inner(sublayer: nn.Module, stack: nn.Module, streams: Sequence[_Stream], rounding: Rounding) -> None:
    """Round the matrices of a layer but for the last, and for a sketch behind it."""
    layer = getattr(sublayer, _inner_name(sublayer))
    inner = [module for module in layer.modules() if module in rounding and module not in _last_matrices(layer)]
    with grams_of_inputs(inner) as grams:
        for stream in streams if inner else ():
            _run(sublayer, stack, stream, is_dense=False)
    for module in inner:
        rounding.round(module, grams[module])


def _refit_layer(
    sublayers: tuple[nn.Module, nn.Module],
    stacks: tuple[nn.Module, nn.Module],
    streams: Sequence[_Stream],
    calibration: Calibration,
    name: LayerName,
    rounding: Rounding | None,
    *,
    is_across_series: bool,
) -> None:
    """Refit one layer, and run all streams through it; attention across series has the series second."""
    layer = getattr(sublayers[1], _inner_name(sublayers[1]))
    matrix, sketch = _last_matrices(layer)
    size, d = matrix.in_features, (sketch or matrix).out_features
    square = torch.zeros(size, size, dtype=torch.float64, device=matrix.weight.device)
    cross = torch.zeros(d, size, dtype=torch.float64, device=matrix.weight.device)
    read: list[torch.Tensor] = []
    features: list[torch.Tensor] = []
    handle = matrix.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        for stream in streams:
            stream.dense = _run(sublayers[0], stacks[0], stream, is_dense=True)
            # What is still wrong behind this layer, as its closed form leaves it.
            error = stream.dense - _run(sublayers[1], stacks[1], stream, is_dense=False)
            features.append(read.pop())
            # Products in float32: their rounding is far below the ridge.
            rows = (features[-1].transpose(0, 1) if is_across_series else features[-1])[stream.counted]
            square += product_over_rows(rows, rows)
            cross += product_over_rows(error[stream.counted], rows)
    finally:
        handle.remove()
    _solve(layer, matrix, sketch, square, cross, calibration, name)
    if rounding is not None:
        if matrix in rounding:
            rounding.round(matrix, square)
        if sketch is not None and sketch in rounding:
            weight = matrix.weight.double()
            rounding.round(sketch, weight @ square @ weight.T)
    for stream, values in zip(streams, features):
        output = matrix(values) if sketch is None else sketch(matrix(values))
        stream.lowrank = stream.lowrank + (output.transpose(0, 1) if is_across_series else output)


def _solve(
    layer: nn.Module,
    matrix: nn.Linear,
    sketch: nn.Linear | None,
    square: torch.Tensor,
    cross: torch.Tensor,
    calibration: Calibration,
    name: LayerName,
) -> None:
    """Set the matrix, and the sketch behind it, from sums of z' z'^T (m, m) and of error z'^T (d, m)."""
    if not float(square.trace()) > 0:
        return  # nothing to read: a layer of zeros
    weight = matrix.weight.double() if sketch is None else sketch.weight.double() @ matrix.weight.double()
    ridge = RIDGE * square.trace() / len(square) * torch.eye(len(square), dtype=square.dtype, device=square.device)
    weight = weight + torch.linalg.solve(square + ridge, cross.T).T
    if sketch is None:
        matrix.weight.copy_(weight)
        return
    grams = calibration.attention(name) if hasattr(layer, "o") else calibration.feed_forward(name)
    written = weight @ (square / square.trace()) @ weight.T
    basis = balanced_basis(grams.output_gradient[None].to(weight.device), written[None])
    left, right = (factor[0] for factor in basis.truncate(sketch.in_features))
    sketch.weight.copy_(left)
    matrix.weight.copy_(right.T @ weight)
