"""What is measured of hidden states and of attention layers: spectra, and what follows from them for a compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..linear_algebra import diagonal_blocks
from ..models.configuration_lowrank_t5 import attention_parameters
from ..published_figures import EPSILONS
from .activations import ActivationSums
from .attention_layers import AttentionLayer
from .spectra import (
    Alignment,
    Spectrum,
    head_alignment,
    joint_tail,
    largest_rank,
    product_spectra,
)

__all__ = ["AttentionStructure", "StateStructure", "VariateStructure", "attention_structure"]


@dataclass(frozen=True)
class StateStructure:
    """Hidden states at one point: singular values of all `tokens` tokens, as they are and about their mean.

    Where one direction is common to all tokens it is the first singular value, which every epsilon-rank is relative to; a
    normalisation and a softmax hardly see it.

    Attributes:
        name: The layer that the states enter ("cross.3", "decoder_feed_forward.3"), or the stack that they leave ("decoder_output").
        tokens: How many tokens there were.
        spectrum: The singular values of the matrix of all tokens.
        centred: The singular values of the tokens' deviations from their mean.
    """

    name: str
    tokens: int
    spectrum: Spectrum
    centred: Spectrum

    def to_dict(self) -> dict[str, Any]:
        """For programs: all singular values, about the mean the ranks alone."""
        centred = self.centred.to_dict(with_values=False)
        return {"name": self.name, "tokens": self.tokens, **self.spectrum.to_dict(), "centred": centred}


@dataclass(frozen=True)
class AttentionStructure:
    """One attention layer.

    Attributes:
        name: Such as "cross.3".
        kind, layer: The two parts of the name.
        d_model: The size of the hidden states that its queries are made of.
        num_heads, num_key_value_heads: How many heads of queries it has, and of keys and values.
        head_dims: The head dimension "qk" of queries and keys and "vo" of values and outputs, as the layer has them.
        parameters: How many numbers its projections have.
        is_rotary: Whether queries and keys are rotated by their positions.
        is_latent: Whether it is in this package's latent form.
        weights: Spectra of the whole matrices "query", "key", "value" and "output", all heads together.
        heads: For each head its spectra of these matrices, of the products "qk" (W_q^T W_k) and "vo" (W_o W_v), and on data of its
            "logits" and "outputs".
        alignment: How far the heads' row spaces (columns for "output") are one; None where a projection has one head.
        inputs: The spectra of the states that queries and keys are made of, "query" and "key"; empty without data.
    """

    name: str
    kind: str
    layer: int
    d_model: int
    num_heads: int
    num_key_value_heads: int
    head_dims: Mapping[str, int]
    parameters: int
    is_rotary: bool
    is_latent: bool
    weights: Mapping[str, Spectrum]
    heads: Mapping[str, tuple[Spectrum, ...]]
    alignment: Mapping[str, Alignment | None]
    inputs: Mapping[str, Spectrum]

    def deciding(self, part: str) -> tuple[Spectrum, ...]:
        """The spectra that decide the rank "qk" or "vo": on the data, where there are data."""
        return self.heads.get({"qk": "logits", "vo": "outputs"}[part], self.heads[part])

    def ranks(self, epsilon: float) -> dict[str, int]:
        """The ranks of the per-head form at this epsilon: the largest of the heads, which share one."""
        return {part: largest_rank(self.deciding(part), epsilon) for part in ("qk", "vo")}

    def kept(self, epsilon: float) -> int:
        """The parameters of the layer in the per-head form at these ranks."""
        entries = self.num_heads + self.num_key_value_heads
        return min(self.parameters, sum(self.ranks(epsilon).values()) * entries * self.d_model)

    def latent_kept(self, epsilon: float) -> int | None:
        """The parameters of the latent form with latent and query sketch at the epsilon-ranks of the inputs; None: no latent is possible.

        The states themselves are kept to epsilon then, whatever the heads read of them.
        """
        if not self.inputs or self.is_rotary or self.is_latent:
            return None
        entry = {
            "latent": self.inputs["key"].epsilon_rank(epsilon),
            "query": self.inputs["query"].epsilon_rank(epsilon),
            "output": None,
        }
        size = attention_parameters(entry, d_model=self.d_model, num_heads=self.num_heads)
        return min(self.parameters, size)

    def error(self, epsilon: float) -> dict[str, float]:
        """The relative error of the logits "qk" and of the heads' outputs "vo" at these ranks, by the spectra."""
        return {part: joint_tail(self.deciding(part), rank) for part, rank in self.ranks(epsilon).items()}

    def to_dict(self) -> dict[str, Any]:
        """For programs: singular values of whole matrices, of heads and inputs their ranks alone."""

        def by_epsilon(measure: Any) -> dict[str, Any]:
            return {f"{epsilon:.3g}": measure(epsilon) for epsilon in EPSILONS}

        return {
            "name": self.name,
            "parameters": self.parameters,
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dims": dict(self.head_dims),
            "is_rotary": self.is_rotary,
            "ranks": by_epsilon(self.ranks),
            "errors": by_epsilon(self.error),
            "kept": by_epsilon(self.kept),
            "latent_kept": by_epsilon(self.latent_kept),
            "weights": {name: spectrum.to_dict() for name, spectrum in self.weights.items()},
            "inputs": {name: spectrum.to_dict(with_values=False) for name, spectrum in self.inputs.items()},
            "heads": {name: ranks_of_heads(spectra) for name, spectra in self.heads.items()},
            "alignment": {
                name: None if alignment is None else {**vars(alignment), "shared": alignment.shared}
                for name, alignment in self.alignment.items()
            },
        }


@dataclass(frozen=True)
class VariateStructure:
    """The group attention of Chronos-2 in one layer, when groups have this many variates.

    Attributes:
        variates: How many series attend to one another.
        layer: The name of the layer, as "group.3".
        inputs: The spectrum of the states that queries and keys are made of.
        logits, outputs: For each head the spectrum of its logits, and of its part of the output.
    """

    variates: int
    layer: str
    inputs: Spectrum
    logits: tuple[Spectrum, ...]
    outputs: tuple[Spectrum, ...]

    def to_dict(self) -> dict[str, Any]:
        """For programs: ranks, without singular values."""
        return {
            "variates": self.variates,
            "layer": self.layer,
            "inputs": self.inputs.to_dict(with_values=False),
            "logits": ranks_of_heads(self.logits),
            "outputs": ranks_of_heads(self.outputs),
        }


def ranks_of_heads(spectra: tuple[Spectrum, ...]) -> list[dict[str, Any]]:
    """The figures of each head but for its singular values."""
    return [spectrum.to_dict(with_values=False) for spectrum in spectra]


def attention_structure(layer: AttentionLayer, activations: ActivationSums) -> AttentionStructure:
    """Measure one layer: its weights, and what a activations has seen there."""
    weights = layer.weights()
    n, m = layer.num_heads, layer.num_key_value_heads
    stacked = {"query": weights.query, "key": weights.key, "value": weights.value, "output": weights.output.mT}
    grams, whole, heads, alignment = {}, {}, {}, {}
    for part, matrices in stacked.items():
        rows = matrices.flatten(0, 1)  # (heads size, d)
        gram = rows @ rows.T
        whole[part] = _trimmed(Spectrum.of_gram(gram), min(rows.shape))
        grams[part] = diagonal_blocks(gram, len(matrices))
        limit = min(matrices.shape[1:])
        heads[part] = tuple(_trimmed(Spectrum.of_gram(block), limit) for block in grams[part])
        alignment[part] = head_alignment(
            gram, len(matrices), dimension=rows.shape[1], rank=max(1, matrices.shape[1] // 4)
        )
    shared = torch.arange(n) * m // n  # which head of keys and values a head of queries reads
    heads["qk"] = product_spectra(grams["query"], grams["key"][shared])
    heads["vo"] = product_spectra(grams["output"], grams["value"][shared])
    inputs = {}
    if f"{layer.name}.query" in activations.heads:
        keys = activations.heads[f"{layer.name}.key"]
        heads["logits"] = product_spectra(activations.heads[f"{layer.name}.query"], keys[shared])
        heads["outputs"] = product_spectra(grams["output"], activations.heads[f"{layer.name}.mixed"])
        inputs["query"] = activations.inputs[layer.name].spectrum()
        inputs["key"] = inputs["query"] if not layer.is_cross else activations.key_inputs(layer).spectrum()
    return AttentionStructure(
        name=layer.name,
        kind=layer.kind,
        layer=layer.layer,
        d_model=weights.query.shape[2],
        num_heads=n,
        num_key_value_heads=m,
        head_dims={"qk": weights.query.shape[1], "vo": weights.value.shape[1]},
        parameters=layer.num_parameters,
        is_rotary=layer.is_rotary,
        is_latent=layer.is_latent,
        weights=whole,
        heads=heads,
        alignment=alignment,
        inputs=inputs,
    )


def _trimmed(spectrum: Spectrum, size: int) -> Spectrum:
    """Without the zeros of a Gram matrix that is larger than the rank can be."""
    return replace(spectrum, values=spectrum.values[:size])
