"""Pictures of an analysis, in the style of `plots.py`: depth runs from dark to light on a scale that the colour-blind can read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import new_file
from ..plots import BLUE, COLOURS, GREEN, INK, LINES, ORANGE, STYLE, VERMILION, import_pyplot
from ..published_figures import EPSILONS
from .result import Analysis, stacks
from .spectra import FloatArray
from .structures import AttentionStructure, StateStructure

__all__ = ["plot_analysis"]

MARKERS = "osD^v<"
DEPTH, RANKS, SHARING = "viridis", "cividis", "RdBu_r"
FLOOR = 3e-4  # where the axis of relative singular values ends
# What layers are called in a picture.
KINDS = {
    "encoder_self": "encoder",
    "decoder_self": "decoder",
    "cross": "cross",
    "time": "time",
    "group": "group",
    "self": "layer",
}


def plot_analysis(analysis: Analysis, folder: str | os.PathLike) -> list[Path]:
    """Draw spectra.png, flow.png, heads.png and, where variates were measured, variates.png; returns their paths."""
    folder = Path(folder)
    pictures = {"spectra": plot_spectra, "flow": plot_flow, "heads": plot_heads}
    if analysis.variates:
        pictures["variates"] = plot_variates
    plt = import_pyplot()
    paths = []
    with plt.rc_context(STYLE):
        for name, draw in pictures.items():
            figure = draw(plt, analysis)
            paths.append(folder / f"{name}.png")
            with new_file(paths[-1]) as part:
                figure.savefig(part)
            plt.close(figure)
    return paths


def plot_spectra(plt: Any, analysis: Analysis) -> Any:
    """Relative singular values: of the hidden states of each stack, and of what the heads do, from the first layer to the last."""
    parts = stacks(analysis)
    columns = max(2, len(parts))
    figure, axes = plt.subplots(
        2 if parts else 1, columns, figsize=(4.4 * columns + 0.8, 6.6 if parts else 3.6), squeeze=False, sharey=True
    )
    tops = axes[0] if parts else []
    for axis in tops[len(parts) :]:
        axis.set_visible(False)
    for axis, (stack, states) in zip(tops, parts.items()):
        _draw_states(plt, axis, states)
        if stack == next(iter(parts)):
            _draw_embeddings(axis, analysis)
        axis.set_title(f"hidden states of the {stack}")
    names = {
        "qk": ("heads' logits", "heads' products $W_q^T W_k$"),
        "vo": ("heads' outputs", "heads' products $W_o W_v$"),
    }
    for axis, part in zip(axes[-1], names):
        _draw_heads(plt, axis, analysis, part)
        axis.set_title(names[part][not parts] + ", mean of the heads")
    for axis in axes[-1][2:]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.set_ylim(FLOOR, 1.5)
        axis.set_xlim(1, max(2.0, axis.get_xlim()[1]))
        axis.set_xlabel("index of the singular value")
        for epsilon in EPSILONS:
            axis.axhline(epsilon, color=INK, linewidth=0.6, linestyle=(0, (1, 3)), zorder=0)
    for row in axes:
        row[0].set_ylabel("relative to the largest")
    scale = plt.cm.ScalarMappable(cmap=_depth_map(plt))
    bar = figure.colorbar(scale, ax=axes, fraction=0.025, pad=0.015, ticks=[0, 1])
    bar.ax.set_yticklabels(["first\nlayer", "last\nlayer"])
    bar.outline.set_visible(False)
    figure.suptitle(f"{analysis.source}: spectra by layer (dotted: the four epsilons)")
    return figure


def _draw_states(plt: Any, axis: Any, states: Sequence[StateStructure]) -> None:
    for state, colour in zip(states, _depth_colours(plt, len(states))):
        axis.plot(*_relative(state.spectrum.values), color=colour, linewidth=1.3)


def _draw_embeddings(axis: Any, analysis: Analysis) -> None:
    for name, line in (("vocabulary", "--"), ("embedded patches", ":")):
        if name in analysis.embedding:
            values = analysis.embedding[name].values
            axis.plot(*_relative(values), line, color=INK, linewidth=1.3, label=name)
            axis.legend(loc="upper right")


def _draw_heads(plt: Any, axis: Any, analysis: Analysis, part: str) -> None:
    kinds = list(dict.fromkeys(layer.kind for layer in analysis.attention))
    for kind, line in zip(kinds, LINES):
        layers = [layer for layer in analysis.attention if layer.kind == kind]
        for layer, colour in zip(layers, _depth_colours(plt, len(layers))):
            heads = np.stack([head.values / max(head.norm, 1e-300) for head in layer.deciding(part)])
            axis.plot(*_relative(heads.mean(0)), line, color=colour, linewidth=1.2)
        axis.plot([], [], line, color=INK, linewidth=1.2, label=KINDS[kind])
    if len(kinds) > 1:
        axis.legend(loc="upper right")


def plot_flow(plt: Any, analysis: Analysis) -> Any:
    """Ranks against depth: of the hidden states, and the largest of each layer's heads."""
    parts = stacks(analysis)
    epsilon = analysis.settings["epsilon"]
    figure, axes = plt.subplots(1, len(parts) + 1, figsize=(3.7 * (len(parts) + 1) + 0.6, 3.9), squeeze=False)
    for axis, (stack, states) in zip(axes[0], parts.items()):
        steps = np.arange(len(states)) / max(1, len(states) - 1)
        for value, colour, line, marker in zip(EPSILONS, COLOURS, LINES, MARKERS):
            ranks = [state.spectrum.epsilon_rank(value) for state in states]
            style = {"marker": marker, "markersize": 3.5, "markevery": max(1, len(states) // 12), "color": colour}
            axis.plot(steps, ranks, line, label=rf"$\epsilon$ = {_power(value)}", **style)
        centred = [state.centred.effective_rank for state in states]
        axis.plot(steps, centred, color=INK, linewidth=2.2, alpha=0.75, label="effective, about the mean")
        axis.set_title(f"hidden states of the {stack}")
        axis.set_xlabel("depth, first layer to output")
        axis.set_xticks([0, 0.5, 1], ["first", "middle", "output"])
        limit = min(analysis.d_model, max(state.tokens for state in states))
        axis.axhline(limit, color=INK, linewidth=0.8)
        axis.set_ylim(0, 1.08 * limit)
        axis.annotate(
            "full rank" if limit == analysis.d_model else f"{limit} tokens",
            (1, limit),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    axes[0, 0].set_ylabel("rank")
    axis = axes[0, -1]
    kinds = list(dict.fromkeys(layer.kind for layer in analysis.attention))
    for kind, colour, marker in zip(kinds, (BLUE, VERMILION, GREEN, ORANGE), MARKERS):
        layers = [layer for layer in analysis.attention if layer.kind == kind]
        for part, line in (("qk", "-"), ("vo", "--")):
            ranks = [layer.ranks(epsilon)[part] for layer in layers]
            label = f"{KINDS[kind]}, {part}"
            axis.plot(range(len(layers)), ranks, line, marker=marker, markersize=4, color=colour, label=label)
    full = max(max(layer.head_dims.values()) for layer in analysis.attention)
    axis.axhline(full, color=INK, linewidth=0.8)
    axis.annotate(
        "head dimension", (0.99, full), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
    )
    axis.set_ylim(0, 1.08 * full)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(rf"largest rank of a head at $\epsilon$ = {_power(epsilon)}")
    axis.set_xlabel("layer")
    figure.suptitle(f"{analysis.source}: rank against depth")
    if parts:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=max(1, len(kinds)))
    return figure


def plot_heads(plt: Any, analysis: Analysis) -> Any:
    """Heat maps, a row a layer: the rank of every head for both products, and how far heads share subspaces."""
    layers = analysis.attention
    epsilon = analysis.settings["epsilon"]
    heads = max(layer.num_heads for layer in layers)
    widths = [max(4, heads), max(4, heads), max(4, heads // 3)]
    height = 1.6 + 0.24 * len(layers)
    figure, axes = plt.subplots(
        1, 3, figsize=(min(13, 3.2 + 0.36 * sum(widths)), height), gridspec_kw={"width_ratios": widths}, sharey=True
    )
    names = [f"{KINDS[layer.kind]} {layer.layer}" for layer in layers]
    on_data = bool(analysis.states)
    titles = ("logits", "outputs") if on_data else ("$W_q^T W_k$", "$W_o W_v$")
    for axis, part, title in zip(axes, ("qk", "vo"), titles):
        ranks = np.full((len(layers), heads), np.nan)
        for i, layer in enumerate(layers):
            ranks[i, : layer.num_heads] = [head.epsilon_rank(epsilon) for head in layer.deciding(part)]
        full = max(layer.head_dims[part] for layer in layers)
        image = axis.imshow(ranks, cmap=RANKS, vmin=0, vmax=full, aspect="auto")
        _write(axis, ranks, full / 2, "{:.0f}")
        axis.set_title(title)
        axis.set_xlabel("head")
        _bar(figure, image, axis, rf"rank at $\epsilon$ = {_power(epsilon)}")
    shared = np.array([_sharing(layer) for layer in layers])
    limit = max(0.5, float(np.nanmax(np.abs(shared), initial=0.0)))
    image = axes[2].imshow(shared, cmap=SHARING, vmin=-limit, vmax=limit, aspect="auto")
    _write(axes[2], shared, None, "{:.2f}", limit=limit)
    axes[2].set_title("sharing")
    axes[2].set_xticks(range(4), ["q", "k", "v", "o"])
    _bar(figure, image, axes[2], "0: unrelated\n1: one subspace")
    axes[0].set_yticks(range(len(names)), names)
    for axis in axes:
        axis.grid(visible=False)
        axis.tick_params(length=0)
        for edge in axis.spines.values():
            edge.set_visible(False)
        # A white line wherever the kind of attention or the block changes hands.
        for i in range(1, len(layers)):
            if layers[i].kind != layers[i - 1].kind and layers[i].kind in ("encoder_self", "decoder_self", "time"):
                axis.axhline(i - 0.5, color="white", linewidth=2)
    figure.suptitle(f"{analysis.source}: heads")
    return figure


def plot_variates(plt: Any, analysis: Analysis) -> Any:
    """The group attention of Chronos-2 for several numbers of variates."""
    epsilon = analysis.settings["epsilon"]
    numbers = sorted({row.variates for row in analysis.variates})
    figure, axes = plt.subplots(1, 3, figsize=(10.6, 3.6))
    titles = ("states that it reads", "logits, largest of the heads", "outputs, largest of the heads")
    for number, colour, line, marker in zip(numbers, COLOURS, LINES * 2, MARKERS):
        rows = [row for row in analysis.variates if row.variates == number]
        values = (
            [row.inputs.epsilon_rank(epsilon) for row in rows],
            [max(head.epsilon_rank(epsilon) for head in row.logits) for row in rows],
            [max(head.epsilon_rank(epsilon) for head in row.outputs) for row in rows],
        )
        for axis, ranks in zip(axes, values):
            label = f"{number} variate{'s' if number > 1 else ''}"
            axis.plot(
                range(len(rows)), ranks, line, marker=marker, markersize=4, color=colour, label=label, clip_on=False
            )
    for axis, title in zip(axes, titles):
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.set_ylim(0, 1.08 * max(1.0, axis.get_ylim()[1]))
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel(rf"rank at $\epsilon$ = {_power(epsilon)}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{analysis.source}: group attention by the number of variates")
    return figure


def _depth_map(plt: Any) -> Any:
    """Without the palest end, which paper swallows."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(plt.get_cmap(DEPTH)(np.linspace(0, 0.92, 256)))


def _depth_colours(plt: Any, count: int) -> Sequence[Any]:
    return _depth_map(plt)(np.linspace(0, 1, count)) if count > 1 else [_depth_map(plt)(0.0)]


def _relative(values: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
    """Index and relative value of the singular values that the axis shows."""
    shares = values / max(float(values[0]), 1e-300)
    shown = shares >= FLOOR / 3
    return np.arange(1, len(values) + 1)[shown], shares[shown]


def _power(value: float) -> str:
    exponent = np.log10(value)
    return f"$10^{{{exponent:.3g}}}$" if abs(2 * exponent - round(2 * exponent)) < 1e-9 else f"{value:g}"


def _sharing(layer: AttentionStructure) -> list[float]:
    alignments = (layer.alignment[part] for part in ("query", "key", "value", "output"))
    return [np.nan if alignment is None else alignment.shared for alignment in alignments]


def _write(axis: Any, values: FloatArray, middle: float | None, form: str, *, limit: float = 1.0) -> None:
    """The numbers in the cells, where there is room, dark on light and light on dark."""
    if values.shape[1] > 16:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        is_dark = abs(value) > 0.6 * limit if middle is None else value < middle
        axis.text(
            column,
            row,
            form.format(round(value, 2) + 0.0),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if is_dark else INK,
        )


def _bar(figure: Any, image: Any, axis: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axis, orientation="horizontal", pad=0.02, fraction=0.05, aspect=14)
    bar.set_label(label, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
