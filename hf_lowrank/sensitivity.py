"""What a component's truncation costs the whole model, measured by inserting its projection into the dense model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .allocation import Component
from .calibration import Batch, divergence, predict
from .checkpoint import progress
from .layers import Layer, Point

__all__ = ["inserted", "measured_losses", "reweighted"]

# The arithmetic that all measurements together may take, in multiplications, and the bounds of the tokens that it buys.
ARITHMETIC, TOKENS = 4e12, (1024, 16384)
# Where it buys less than a whole batch, contexts are cut to their last values: many series say more than long ones.
SHORT_CONTEXT = 128


@contextmanager
def inserted(model: PreTrainedModel, point: Point, rank: int) -> Iterator[None]:
    """The model with A_r B_r^T of one component inserted, for as long as the block runs."""
    left, right = (factor.float().to(model.device) for factor in point.basis.truncate(rank))

    def project(values: torch.Tensor, group: int | None) -> torch.Tensor:
        if group is not None:
            return values @ right[group] @ left[group].T
        by_group = values.unflatten(-1, (len(left), -1)).unsqueeze(-2)  # (..., n, 1, h)
        return (by_group @ right @ left.mT).squeeze(-2).flatten(-2)

    handles = []
    for i, name in enumerate(point.modules):
        # One group for all modules, one for each, or all groups in the features of one.
        group = 0 if len(left) == 1 else i if len(point.modules) > 1 else None
        linear = model.get_submodule(name)
        if point.side == "input":
            handles.append(
                linear.register_forward_pre_hook(lambda _, inputs, group=group: (project(inputs[0], group),))
            )
        else:
            handles.append(linear.register_forward_hook(lambda _, __, output, group=group: project(output, group)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probes(model: PreTrainedModel, batches: Sequence[Batch], num_components: int) -> list[Batch]:
    """The first series of the batches, as many as the arithmetic allows."""
    size = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name)
    left = int(np.clip(ARITHMETIC / (max(1, num_components) * size), *TOKENS))
    if left < batches[0]["attention_mask"].sum():
        cut = {"input_ids", "attention_mask"}
        batches = [{k: v[:, -SHORT_CONTEXT:] if k in cut else v for k, v in batch.items()} for batch in batches]
    probes = []
    for batch in batches:
        rows = max(1, left // sum(batch[name].shape[1] for name in batch if name != "attention_mask"))
        probes.append({name: tensor[:rows] for name, tensor in batch.items()})
        left -= sum(probes[-1][name].numel() for name in batch if name != "attention_mask")
        if left <= 0:
            break
    return probes


@torch.no_grad()
def measured_losses(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    table: Mapping[str, dict[str, Any]],
    batches: Sequence[Batch],
    *,
    show_progress: bool = False,
) -> dict[str, float]:
    """The loss of each component at its rank in the table, truncated alone: KL divergence from the dense model, nats a token.

    Models without a head lose half the squared distance of their last hidden states. The encoder is not run again
    for components of the decoder.
    """
    work = [
        (layer, part, rank)
        for layer in layers
        for part, rank in layer.ranks(table[layer.name]).items()
        if rank < layer.points()[part].basis.singular_values.shape[1]
    ]
    probes = _probes(model, batches, len(work))
    is_logits = type(model).__name__.endswith("ConditionalGeneration")
    encoded = [_encoded(model, batch) for batch in probes]
    wanted = [predict(model, batch, states) for batch, states in zip(probes, encoded)]
    tokens = sum(len(states) for states in wanted)
    losses = {}
    for layer, part, rank in progress(work, "Measuring sensitivity", show_progress):
        with inserted(model, layer.points()[part], rank):
            total = 0.0
            for batch, states, reference in zip(probes, encoded, wanted):
                found = predict(model, batch, None if layer.name.startswith("encoder") else states)
                total += divergence(reference, found, is_logits=is_logits)
        losses[f"{layer.name}.{part}"] = total / tokens
    return losses


def _encoded(model: PreTrainedModel, batch: Batch) -> BaseModelOutput | None:
    if "labels" not in batch:
        return None
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return BaseModelOutput(last_hidden_state=model.get_encoder()(**inputs).last_hidden_state)


def reweighted(
    components: Mapping[str, Component], ranks: Mapping[str, int], measured: Mapping[str, float]
) -> dict[str, Component]:
    """The components, each weighted so that its loss at the rank measured is the measured one.

    What was not measured, or has nothing to lose at that rank, is scaled as the median of the components of its part, or of
    all.
    """
    factors = {
        name: loss / components[name].loss[ranks[name]]
        for name, loss in measured.items()
        if components[name].loss[ranks[name]] > 1e-9 * components[name].weight and loss > 0
    }

    def usual(part: str) -> float:
        alike = [factor for name, factor in factors.items() if name.rsplit(".", 1)[1] == part]
        return float(np.median(alike or list(factors.values()) or [1.0]))

    return {
        name: Component(
            name, component.singular_values, component.weight * factors.get(name, usual(name.rsplit(".", 1)[1]))
        )
        for name, component in components.items()
    }
