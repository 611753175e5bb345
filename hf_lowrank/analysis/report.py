"""An analysis in words and in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table

from ..published_figures import EPSILONS
from .spectra import Spectrum, largest_rank

if TYPE_CHECKING:
    from .analyze import Analysis
    from .structures import AttentionStructure, StateStructure

__all__ = ["early_and_late", "tables", "verdict"]

# Below this the heads of a projection are as good as random subspaces to each other; above the other, one subspace.
SEPARATE, SHARED = 0.1, 0.5
ALIKE = 1.05  # effective ranks whose ratio is below are called equal


def verdict(analysis: Analysis, epsilon: float) -> tuple[str, ...]:
    """How far the checkpoint can be compressed, which layers first, and what it costs: five lines for a practitioner."""
    return (
        _how_far(analysis, epsilon),
        _which_first(analysis, epsilon),
        _flow(analysis, epsilon),
        _decay(analysis),
        _heads(analysis),
    )


def _how_far(analysis: Analysis, epsilon: float) -> str:
    total, share = analysis.attention_parameters, analysis.kept(epsilon)
    saved = (1 - share) * total / analysis.parameters
    errors = [layer.error(epsilon) for layer in analysis.attention]
    worst = {part: max(error[part] for error in errors) for part in ("qk", "vo")}
    basis = "spectra on the data" if analysis.states else "spectra of the weights alone"
    text = (
        f"How far: by the {basis}, the heads at epsilon {epsilon:.3g} keep {share:.0%} of {_count(total)} attention parameters, "
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
    found = early_and_late(analysis)
    if not found:
        return "Do early spectra decay faster than late ones: there are too few layers to say."
    faster = [late > ALIKE * early for early, late in found.values()]
    answer = "yes" if all(faster) else "no" if not any(faster) else "in part"
    lines = (f"{name} {early:.1f} and {late:.1f}" for name, (early, late) in found.items())
    return (
        f"Do early spectra decay faster than late ones: {answer}. Mean effective rank in the first and the last third of the layers: "
        f"{'; '.join(lines)}."
    )


def _heads(analysis: Analysis) -> str:
    means = {}
    for part in ("query", "key", "value", "output"):
        found = [layer.alignment[part].shared for layer in analysis.attention if layer.alignment[part] is not None]  # type: ignore[union-attr]
        if found:
            means[part] = float(np.mean(found))
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


def stacks(analysis: Analysis) -> dict[str, list[StateStructure]]:
    """The states of each stack, in order."""
    found: dict[str, list[StateStructure]] = {}
    current: list[StateStructure] = []
    for state in analysis.states:
        current.append(state)
        if state.name.endswith("_output"):
            found[state.name.removesuffix("_output")], current = current, []
    return found


def early_and_late(analysis: Analysis) -> dict[str, tuple[float, float]]:
    """Mean effective rank in the first and the last third of the layers: of each stack's states, of the heads' two products.

    The embedded data are the first of the states. The products are those that decide the ranks: logits and outputs on data,
    W_q^T W_k and W_o W_v without. Kinds of attention are taken apart, then averaged.
    """

    def thirds(values: Sequence[float]) -> tuple[float, float]:
        size = max(1, len(values) // 3)
        return float(np.mean(values[:size])), float(np.mean(values[-size:]))

    found = {}
    for stack, states in stacks(analysis).items():
        found[f"{stack} states"] = thirds([state.spectrum.effective_rank for state in states])
        found[f"{stack} states about their mean"] = thirds([state.centred.effective_rank for state in states])
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
            found[name] = float(early), float(late)
    return found


# --- tables ------------------------------------------------------------------------------------------------------


def tables(analysis: Analysis) -> list[Table]:
    """Everything that was measured, as tables for a terminal."""
    found = [_summary_table(analysis), _state_table(analysis), _attention_table(analysis)]
    if analysis.variates:
        found.append(_variate_table(analysis))
    if analysis.bounds:
        found.append(_bound_table(analysis))
    return found


def _table(title: str, *headings: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _count(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"


def _ranks(spectrum: Spectrum) -> list[str]:
    return [str(spectrum.epsilon_rank(epsilon)) for epsilon in EPSILONS]


def _summary_table(analysis: Analysis) -> Table:
    table = _table(
        f"{analysis.source} ({analysis.family}): what its spectra leave of the attention",
        "epsilon",
        "per head",
        "latent",
        "logits err.",
        "outputs err.",
        caption="Shares of the attention parameters; errors are relative, of the worst layer. Predicted, nothing was compressed.",
    )
    for epsilon in EPSILONS:
        latent = analysis.latent_kept(epsilon)
        errors = [layer.error(epsilon) for layer in analysis.attention]
        table.add_row(
            f"{epsilon:.2g}",
            f"{analysis.kept(epsilon):.1%}",
            "" if latent is None else f"{latent:.1%}",
            *(f"{max(error[part] for error in errors):.2%}" for part in ("qk", "vo")),
        )
    return table


def _state_table(analysis: Analysis) -> Table:
    table = _table(
        "Flow of ranks: embedding, and hidden states entering each layer",
        "",
        *(f"{epsilon:.2g}" for epsilon in EPSILONS),
        "effective",
        "stable",
        "about the mean",
        "tokens",
        caption="epsilon-ranks at four epsilons, effective rank (entropy), stable rank; effective rank of the deviations from the mean token.",
    )
    first = [(name, spectrum) for name, spectrum in analysis.embedding.items() if name != "embedded data"]
    rows = [(name, spectrum, "", "") for name, spectrum in first]
    rows += [
        (state.name, state.spectrum, f"{state.centred.effective_rank:.1f}", f"{state.tokens:,}")
        for state in analysis.states
    ]
    for i, (name, spectrum, centred, tokens) in enumerate(rows):
        table.add_row(
            name,
            *_ranks(spectrum),
            f"{spectrum.effective_rank:.1f}",
            f"{spectrum.stable_rank:.2f}",
            centred,
            tokens,
            end_section=i + 1 == len(first) or name.endswith("_output"),
        )
    return table


def _attention_table(analysis: Analysis) -> Table:
    epsilon = analysis.settings["epsilon"]
    table = _table(
        f"Attention at epsilon {epsilon:.3g}",
        "layer",
        "W_q W_k W_v W_o",
        "qk",
        "vo",
        "kept",
        "logits err.",
        "outputs err.",
        "sharing q k v o",
        caption="epsilon-ranks of the whole matrices; the largest of the heads for the two products; how far heads share subspaces "
        "(0: as random ones, 1: one for all).",
    )
    for layer in analysis.attention:
        ranks, errors = layer.ranks(epsilon), layer.error(epsilon)
        sharing = [layer.alignment[part] for part in ("query", "key", "value", "output")]
        table.add_row(
            layer.name,
            " ".join(f"{layer.weights[part].epsilon_rank(epsilon)}" for part in ("query", "key", "value", "output")),
            *(f"{ranks[part]}/{layer.head_dims[part]}" for part in ("qk", "vo")),
            f"{layer.kept(epsilon) / layer.parameters:.0%}",
            *(f"{errors[part]:.2%}" for part in ("qk", "vo")),
            " ".join("-" if found is None else f"{round(found.shared, 2) + 0.0:.2f}" for found in sharing),
        )
    return table


def _variate_table(analysis: Analysis) -> Table:
    epsilon = analysis.settings["epsilon"]
    table = _table(
        f"Group attention by the number of variates, epsilon {epsilon:.3g}",
        "layer",
        "variates",
        "inputs",
        "effective",
        "logits",
        "outputs",
        caption="epsilon-ranks of the states it reads, and the largest of its heads; with one variate no logit matters.",
    )
    rows = sorted(analysis.variates, key=lambda row: (int(row.layer.split(".")[1]), row.variates))
    for row, following in zip(rows, [*rows[1:], None]):
        table.add_row(
            row.layer,
            str(row.variates),
            str(row.inputs.epsilon_rank(epsilon)),
            f"{row.inputs.effective_rank:.1f}",
            str(max(head.epsilon_rank(epsilon) for head in row.logits)),
            str(largest_rank(row.outputs, epsilon)),
            end_section=following is None or following.layer != row.layer,
        )
    return table


def _bound_table(analysis: Analysis) -> Table:
    table = _table(
        "Proved bounds beside what was measured",
        "bound",
        "where",
        "epsilon",
        "measured",
        "at most",
        "rel. error",
        caption="embedding: singular values of the embedded patches above epsilon ||W_2|| ||W_1 X||. attention: largest error of a token, and relative "
        "error of all, when the layer's inputs are cut to their epsilon-rank. flow: epsilon-rank after the layer, shown at the verdict's epsilon.",
    )
    epsilon = analysis.settings["epsilon"]
    for bound in analysis.bounds:
        if bound.kind == "flow" and bound.epsilon != epsilon:
            continue
        whole = isinstance(bound.measured, int)
        table.add_row(
            bound.kind,
            bound.where,
            f"{bound.epsilon:.2g}",
            *(str(value) if whole else f"{value:.3g}" for value in (bound.measured, bound.limit)),
            f"{bound.details['relative_error']:.2%}" if "relative_error" in bound.details else "",
        )
    return table
