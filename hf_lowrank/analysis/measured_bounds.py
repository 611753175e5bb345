"""The bounds of `rank_bounds.py` on a model and data, each beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..published_figures import EPSILONS
from .activations import ActivationSums, embedding_parts, evaluating, first_tensor, patch_embedding, stack_of
from .attention_layers import AttentionLayer
from .model_inputs import InputBatch
from .rank_bounds import (
    embedding_rank_bound,
    residual_rank_bound,
    residual_spectrum_bound,
    truncated_attention_bound,
)
from .spectra import Spectrum, product_spectra
from .structures import AttentionStructure, StateStructure

__all__ = ["Bound", "measured_bounds"]

EMBEDDING_EPSILONS = (1.0, 0.5, 0.25, 0.1)  # where the bound of the embedding is below d_model


@dataclass(frozen=True)
class Bound:
    """A proved bound beside the measured value: measured <= limit.

    Attributes:
        kind: "embedding": singular values of embedded patches above epsilon ||W_2|| ||W_1 X||, at most (1 + epsilon^-2) k.
            "attention": the largest error of a token when the inputs are projected to their epsilon-rank. "flow": the epsilon-rank of
            the stream after an attention layer.
        where: The name of the layer, as "encoder_self.0"; "patches" for the embedding.
        epsilon: The share of the largest singular value from which on one counts.
        measured: The number of singular values, or the error, that was measured.
        limit: What is proved to be the largest value of `measured`.
        details: Further figures by name: ranks of the inputs, the singular value that is cut, the size of the output.
    """

    kind: str
    where: str
    epsilon: float
    measured: float
    limit: float
    details: Mapping[str, float]


def measured_bounds(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    structures: Sequence[AttentionStructure],
    states: Sequence[StateStructure],
    activations: ActivationSums,
    batch: InputBatch,
) -> tuple[Bound, ...]:
    """All bounds that hold of a model, on what `activations` has seen of it; part of the model runs again on `batch`, the first of it.

    `structures` are those of `layers`, in the same order; `states` are all states of `activations`, in order.
    """
    with evaluating(model):
        return (
            *embedding_bounds(model, activations),
            *attention_bounds(layers, structures, activations, batch),
            *flow_bounds(layers, structures, states, activations),
        )


def embedding_bounds(model: PreTrainedModel, activations: ActivationSums) -> list[Bound]:
    """Singular values of the embedded patches; none where the model embeds them in another way."""
    block = patch_embedding(model)
    if block is None or "input" not in activations.patches:
        return []
    inner, outer, _ = embedding_parts(block)
    weight = inner.weight.detach().double()
    if activations.patches["input"].gram().shape[0] > weight.shape[1]:
        bias = torch.zeros(len(weight), dtype=weight.dtype) if inner.bias is None else inner.bias.detach().double()
        weight = torch.cat([weight, bias[:, None]], 1)
    patches, embedded = activations.patches["input"], activations.patches["output"].spectrum()
    # ||W_1 X|| from the small Gram matrices of both.
    (hidden,) = product_spectra((weight.T @ weight)[None], patches.gram()[None])
    rank = patches.spectrum().epsilon_rank(1e-7)
    unit = Spectrum.of_matrix(outer.weight).norm * hidden.norm
    return [
        Bound(
            kind="embedding",
            where="patches",
            epsilon=epsilon,
            measured=int((embedded.values > epsilon * unit).sum()),
            limit=embedding_rank_bound(rank, outer.weight.shape[0], epsilon),
            details={"input_rank": rank, "epsilon_rank": embedded.epsilon_rank(epsilon)},
        )
        for epsilon in EMBEDDING_EPSILONS
    ]


def attention_bounds(
    layers: Sequence[AttentionLayer],
    structures: Sequence[AttentionStructure],
    activations: ActivationSums,
    batch: InputBatch,
) -> list[Bound]:
    """The first self-attention of every kind, run again on the first batch with its inputs projected; the model is in evaluation mode."""
    bounds: list[Bound] = []
    for layer, structure in zip(layers, structures):
        if layer.name not in activations.calls:
            continue
        spectrum = structure.inputs["query"]
        basis = activations.inputs[layer.name].leading(len(spectrum.values))
        scale = float(getattr(layer.module, "scaling", 1.0))
        heads = structure.heads
        if layer.is_rotary:  # a rotation stands between the two
            shared = [i * layer.num_key_value_heads // layer.num_heads for i in range(layer.num_heads)]
            norms = [query.norm * heads["key"][i].norm for query, i in zip(heads["query"], shared)]
        else:
            norms = [head.norm for head in heads["qk"]]
        mask = batch.masks.get(stack_of(layer))
        (states, *others), options = activations.calls[layer.name]
        for epsilon in EPSILONS:
            rank = spectrum.epsilon_rank(epsilon)
            if rank == len(spectrum.values):
                continue
            # Singular values are known to 1e-7 of the largest.
            sigma = float(max(spectrum.values[rank], 1e-7 * spectrum.norm))
            limit = truncated_attention_bound(
                residual=sigma,
                radius=activations.inputs[layer.name].largest,
                query_key_norms=[scale * norm for norm in norms],
                value_output_norms=[head.norm for head in heads["vo"]],
            )
            kept = basis[:, :rank].to(states)
            output = first_tensor(layer.module(states, *others, **options))
            moved = first_tensor(layer.module((states @ kept) @ kept.T, *others, **options)) - output
            if mask is not None and mask.shape == output.shape[:2]:
                output, moved = output[mask], moved[mask]
            bounds.append(
                Bound(
                    kind="attention",
                    where=layer.name,
                    epsilon=epsilon,
                    measured=float(moved.norm(dim=-1).max()),
                    limit=limit,
                    details={
                        "rank": rank,
                        "sigma": float(spectrum.values[rank]),
                        "largest_output": float(output.norm(dim=-1).max()),
                        "relative_error": float(moved.norm() / output.norm()),
                    },
                )
            )
    return bounds


def flow_bounds(
    layers: Sequence[AttentionLayer],
    structures: Sequence[AttentionStructure],
    states: Sequence[StateStructure],
    activations: ActivationSums,
) -> list[Bound]:
    """The epsilon-ranks of the stream after every attention layer that returns its weights."""
    positions = {state.name: i for i, state in enumerate(states)}
    bounds = []
    for layer, structure in zip(layers, structures):
        if layer.name not in activations.norms or layer.name not in positions:
            continue
        before, after = states[positions[layer.name]].spectrum, states[positions[layer.name] + 1].spectrum
        norms = activations.norms[layer.name] * [head.norm for head in structure.heads["vo"]]
        limits = residual_spectrum_bound(before, structure.inputs["key"], norms)
        for epsilon in EPSILONS:
            bounds.append(
                Bound(
                    kind="flow",
                    where=layer.name,
                    epsilon=epsilon,
                    measured=after.epsilon_rank(epsilon),
                    limit=residual_rank_bound(limits, after.norm, epsilon),
                    details={
                        "entering": before.epsilon_rank(epsilon),
                        "violation": float((after.values / limits[: len(after.values)].clip(1e-300)).max()),
                    },
                )
            )
    return bounds
