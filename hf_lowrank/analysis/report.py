"""An analysis as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from ..checkpoints.rank_table import LayerName
from ..published_figures import EPSILONS
from .result import Analysis
from .spectra import Spectrum, largest_rank

__all__ = ["tables"]


def tables(analysis: Analysis) -> list[Table]:
    """Everything that was measured, as tables for a terminal."""
    all_tables = [_summary_table(analysis), _state_table(analysis), _attention_table(analysis)]
    if analysis.variates:
        all_tables.append(_variate_table(analysis))
    if analysis.bounds:
        all_tables.append(_bound_table(analysis))
    return all_tables


def _table(title: str, *headings: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


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
            " ".join("-" if heads is None else f"{round(heads.shared, 2) + 0.0:.2f}" for heads in sharing),
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
    rows = sorted(analysis.variates, key=lambda row: (LayerName.parse(row.layer).index, row.variates))
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
