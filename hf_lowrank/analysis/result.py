"""What an analysis found: all figures, and five sentences that a practitioner reads first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..published_figures import EPSILONS
from .measured_bounds import Bound
from .spectra import Spectrum
from .structures import AttentionStructure, StateStructure, VariateStructure

__all__ = ["Analysis", "early_and_late", "stacks"]

# Below this the heads of a projection are as good as random subspaces to each other; above the other, one subspace.
SEPARATE, SHARED = 0.1, 0.5
ALIKE = 1.05  # effective ranks whose ratio is below are called equal


@dataclass(frozen=True)
class Analysis:
    """What `analyze` measures.

    Attributes:
        source: What the checkpoint is called: its Hub id, the last part of its folder, or the class of a loaded model.
        family: The title of a Chronos family, as "chronos-t5", or the `model_type` of another model.
        d_model: The size of a hidden state.
        parameters: How many numbers all weights of the model have.
        embedding: The spectra of the "vocabulary", the "embedded data" and the "embedded patches", as far as the model has them.
        states: Hidden states entering every layer and leaving each stack, in order; none without data.
        attention: Every attention layer, in order.
        variates: The group attention of Chronos-2 for every number of variates that was asked for, in every layer.
        bounds: What is proved of ranks and errors beside what was measured; none without data.
        settings: "data" (None, "synthetic" or "given"), "tokens" of the longest stack, "seed", and "epsilon", at which the verdict
            counts ranks.
    """

    source: str
    family: str
    d_model: int
    parameters: int
    embedding: Mapping[str, Spectrum]
    states: tuple[StateStructure, ...]
    attention: tuple[AttentionStructure, ...]
    variates: tuple[VariateStructure, ...]
    bounds: tuple[Bound, ...]
    settings: Mapping[str, Any]

    @property
    def verdict(self) -> tuple[str, ...]:
        """How far the checkpoint can be compressed, which layers first, what it costs: five lines."""
        epsilon = self.settings["epsilon"]
        return (
            _how_far(self, epsilon),
            _which_first(self, epsilon),
            _flow(self, epsilon),
            _decay(self),
            _sharing_of_heads(self),
        )

    @property
    def attention_parameters(self) -> int:
        """How many numbers the projections of all attention layers have."""
        return sum(layer.parameters for layer in self.attention)

    def kept(self, epsilon: float) -> float:
        """The share of the attention parameters at the epsilon-ranks of the heads."""
        return sum(layer.kept(epsilon) for layer in self.attention) / self.attention_parameters

    def latent_kept(self, epsilon: float) -> float | None:
        """The share of the attention parameters in the latent form, per-head form in layers that allow no latent; None where none does."""
        sizes = [layer.latent_kept(epsilon) for layer in self.attention]
        if all(size is None for size in sizes):
            return None
        return (
            sum(layer.kept(epsilon) if size is None else size for layer, size in zip(self.attention, sizes))
            / self.attention_parameters
        )

    def to_dict(self) -> dict[str, Any]:
        """For programs: everything, singular values to six digits."""
        return {
            "source": self.source,
            "family": self.family,
            "d_model": self.d_model,
            "parameters": self.parameters,
            "attention_parameters": self.attention_parameters,
            "settings": dict(self.settings),
            "verdict": list(self.verdict),
            "kept": {
                f"{epsilon:.3g}": {"per_head": self.kept(epsilon), "latent": self.latent_kept(epsilon)}
                for epsilon in EPSILONS
            },
            "embedding": {name: spectrum.to_dict() for name, spectrum in self.embedding.items()},
            "states": [state.to_dict() for state in self.states],
            "attention": [layer.to_dict() for layer in self.attention],
            "variates": [row.to_dict() for row in self.variates],
            "bounds": [{**vars(bound), "details": dict(bound.details)} for bound in self.bounds],
        }


# --- the verdict --------------------------------------------------------------------------------------------------


def _how_far(analysis: Analysis, epsilon: float) -> str:
    total, share = analysis.attention_parameters, analysis.kept(epsilon)
    saved = (1 - share) * total / analysis.parameters
    errors = [layer.error(epsilon) for layer in analysis.attention]
    worst = {part: max(error[part] for error in errors) for part in ("qk", "vo")}
    basis = "spectra on the data" if analysis.states else "spectra of the weights alone"
    text = (
        f"How far: by the {basis}, the heads at epsilon {epsilon:.3g} keep {share:.0%} of {readable_count(total)} attention parameters, "
        f"which takes {saved:.0%} off the model; predicted relative error {worst['qk']:.1%} of the logits and {worst['vo']:.1%} of "
        "the heads' outputs in the worst layer."
    )
    latent = analysis.latent_kept(epsilon)
    if latent is not None:
        text += f" On a latent that keeps the layers' inputs to {epsilon:.3g}: {latent:.0%}."
    return text


def _which_first(analysis: Analysis, epsilon: float) -> str:
    def name(layer: AttentionStructure) -> str:
        ranks = layer.ranks(epsilon)
        parts = ", ".join(f"{part} {rank}/{layer.head_dims[part]}" for part, rank in ranks.items())
        return f"{layer.name} ({parts})"

    order = sorted(analysis.attention, key=lambda layer: layer.kept(epsilon) / layer.parameters)
    shown = min(3, -(-len(order) // 2))
    rest = order[shown:][-shown:]
    text = f"Which first: {'; '.join(map(name, order[:shown]))}"
    return f"{text}. Last: {'; '.join(map(name, rest))}." if rest else f"{text}."


def _flow(analysis: Analysis, epsilon: float) -> str:
    if not analysis.states:
        return "Flow of ranks: not measured without data."
    texts = []
    for stack, states in stacks(analysis).items():
        first, last = (state.spectrum for state in (states[0], states[-1]))
        ranks = first.epsilon_rank(epsilon), last.epsilon_rank(epsilon)
        effective = first.effective_rank, last.effective_rank
        limit = min(analysis.d_model, states[-1].tokens)
        trend = "stays"
        if effective[1] > ALIKE * effective[0]:
            trend = "grows"
        elif effective[0] > ALIKE * effective[1]:
            trend = "falls"
        note = f", of {limit} tokens" if limit < analysis.d_model else f" of {limit}"
        texts.append(
            f"{stack} {ranks[0]} to {ranks[1]}{note} (effective rank {effective[0]:.0f} to {effective[1]:.0f}: {trend})"
        )
    return f"Flow of ranks: epsilon-rank of the states from the first layer to the last: {'; '.join(texts)}."


def _decay(analysis: Analysis) -> str:
    """Whether early spectra decay faster than late ones, said plainly."""
    ranks = early_and_late(analysis)
    if not ranks:
        return "Do early spectra decay faster than late ones: there are too few layers to say."
    faster = [late > ALIKE * early for early, late in ranks.values()]
    answer = "yes" if all(faster) else "no" if not any(faster) else "in part"
    lines = (f"{name} {early:.1f} and {late:.1f}" for name, (early, late) in ranks.items())
    return (
        f"Do early spectra decay faster than late ones: {answer}. Mean effective rank in the first and the last third of the layers: "
        f"{'; '.join(lines)}."
    )


def _sharing_of_heads(analysis: Analysis) -> str:
    means = {}
    for part in ("query", "key", "value", "output"):
        alignments = [layer.alignment[part] for layer in analysis.attention]
        sharing = [alignment.shared for alignment in alignments if alignment is not None]
        if sharing:
            means[part] = float(np.mean(sharing))
    if not means:
        return "Heads: every projection has one head, or one that all share."
    values = ", ".join(f"{part} {value:.2f}" for part, value in means.items())
    reading = max(means.get(part, 0.0) for part in ("key", "value"))
    if reading > SHARED:
        advice = "heads read one subspace, which a latent keeps once for all"
    elif reading < SEPARATE:
        advice = "heads read subspaces of their own, so a latent has to be as wide as all of them and the per-head form fits"
    else:
        advice = "heads share a part of what they read; compare both forms"
    return f"Heads (0: unrelated subspaces, 1: one for all): {values}; {advice}."


def readable_count(number: float) -> str:
    """As "12.3M" or "4.5k"."""
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"


def stacks(analysis: Analysis) -> dict[str, list[StateStructure]]:
    """The states of each stack, in order."""
    by_stack: dict[str, list[StateStructure]] = {}
    current: list[StateStructure] = []
    for state in analysis.states:
        current.append(state)
        if state.name.endswith("_output"):
            by_stack[state.name.removesuffix("_output")], current = current, []
    return by_stack


def early_and_late(analysis: Analysis) -> dict[str, tuple[float, float]]:
    """Mean effective rank in the first and the last third of the layers: of each stack's states, of the heads' two products.

    The embedded data are the first of the states. The products are those that decide the ranks: logits and outputs on data,
    W_q^T W_k and W_o W_v without. Kinds of attention are taken apart, then averaged.
    """

    def thirds(values: Sequence[float]) -> tuple[float, float]:
        size = max(1, len(values) // 3)
        return float(np.mean(values[:size])), float(np.mean(values[-size:]))

    ranks = {}
    for stack, states in stacks(analysis).items():
        ranks[f"{stack} states"] = thirds([state.spectrum.effective_rank for state in states])
        ranks[f"{stack} states about their mean"] = thirds([state.centred.effective_rank for state in states])
    kinds = dict.fromkeys(layer.kind for layer in analysis.attention)
    for part, name in {"qk": "heads' logits", "vo": "heads' outputs"}.items():
        pairs = []
        for kind in kinds:
            layers = [layer for layer in analysis.attention if layer.kind == kind]
            if len(layers) > 1:
                pairs.append(
                    thirds(
                        [float(np.mean([head.effective_rank for head in layer.deciding(part)])) for layer in layers]
                    )
                )
        if pairs:
            early, late = np.mean(pairs, axis=0)
            ranks[name] = float(early), float(late)
    return ranks
