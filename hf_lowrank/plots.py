"""Pictures: one style, readable in print and for the colour-blind (the palette of Okabe and Ito)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Curve",
    "Dots",
    "Forecast",
    "Panel",
    "check_plot",
    "draw_forecasts",
    "import_pyplot",
    "plot_dots",
    "plot_pareto",
]

INK, BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
LINES = ("-", "--", "-.", ":")  # the second cue, for a print without colour
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Forecast:
    """One model's forecast: low, median and high quantile, each of shape (horizon,)."""

    label: str
    low: NDArray[np.floating]
    median: NDArray[np.floating]
    high: NDArray[np.floating]


@dataclass(frozen=True)
class Panel:
    """One series: the end of its past, what is observed of its future, and the forecasts of it, all of the same horizon.

    `times` are those of the past and of the forecasts; without them steps are counted from the end of the past.
    """

    title: str
    past: NDArray[np.floating]
    future: NDArray[np.floating]
    forecasts: tuple[Forecast, ...]
    times: NDArray[np.datetime64] | None = None


@dataclass(frozen=True)
class Curve:
    """Accuracy against size for one method: `kept` share and relative score (`low` to `high`), in the same order."""

    label: str
    kept: Sequence[float]
    score: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Dots:
    """One model's scores, a number for each row of a dot plot, and their mean, each with its interval; NaN is not drawn."""

    label: str
    scores: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    mean: float
    low: float
    high: float


def import_pyplot() -> Any:
    """The module matplotlib.pyplot, which only a picture needs, drawing to files; a notebook goes on to show its pictures."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "hf-lowrank[plots]".') from error
    if "MPLBACKEND" not in os.environ and "matplotlib.pyplot" not in sys.modules:  # nobody has chosen
        matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def check_plot(argument: str, path: Path) -> None:
    """Raise ImportError or ValueError, which names the argument, where no picture can be drawn to `path`; for a check before long work."""
    import_pyplot()
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds or path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(
            f"{argument} must be a picture ({', '.join(f'.{kind}' for kind in sorted(kinds))}) in a folder that exists, found {str(path)!r}."
        )


def draw_forecasts(panels: Sequence[Panel], *, interval: str = "80 % interval") -> Any:
    """The panels in two columns, as a figure of matplotlib that pyplot has forgotten: a notebook shows it once, where it is returned.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot()
    with plt.rc_context(STYLE):
        rows, columns = -(-len(panels) // 2), min(2, len(panels))
        figure, axes = plt.subplots(rows, columns, figsize=(10, 2.6 * rows + 0.4), squeeze=False)
        plt.close(figure)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels):
            _draw_panel(axis, panel, interval)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_panel(axis: Any, panel: Panel, interval: str) -> None:
    past, horizon = len(panel.past), len(panel.forecasts[0].median)
    times: NDArray[Any] = np.arange(-past, horizon) if panel.times is None else panel.times
    observed = np.concatenate([panel.past, panel.future])
    axis.plot(times[: len(observed)], observed, color=INK, linewidth=1, label="observed")
    axis.axvline(times[past - 1] + (times[past] - times[past - 1]) / 2, color=INK, linewidth=0.6, alpha=0.5)
    ahead = times[past:]
    for forecast, colour, line in zip(panel.forecasts, COLOURS, LINES):
        label = f"{forecast.label}: median, {interval}"
        axis.plot(ahead, forecast.median, line, color=colour, linewidth=1.4, label=label)
        axis.fill_between(ahead, forecast.low, forecast.high, color=colour, alpha=0.15, linewidth=0)
        for end in (forecast.low, forecast.high):  # where two intervals lie on each other, their ends tell them apart
            axis.plot(ahead, end, line, color=colour, linewidth=0.7, alpha=0.7)
    axis.set_title(panel.title, parse_math=False)  # a name may hold any sign
    if panel.times is None:
        axis.set_xlabel("steps from the end of the context")


def plot_pareto(measured: Sequence[Curve], published: Sequence[Curve], output: Path, *, title: str) -> None:
    """Relative score against kept share on logarithmic axes; published points hollow and without a line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot()
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, ScalarFormatter

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 4.5))
        axis.axhline(1, color=INK, linewidth=0.8)
        for curve, colour, line, marker in zip(measured, COLOURS, LINES, "osD^"):
            axis.plot(curve.kept, curve.score, line, marker=marker, color=colour, markersize=5, label=curve.label)
            if curve.low is not None and curve.high is not None:
                order = np.argsort(curve.kept)
                band = [np.asarray(values)[order] for values in (curve.kept, curve.low, curve.high)]
                axis.fill_between(*band, color=colour, alpha=0.15, linewidth=0)
        for curve, marker in zip(published, "v<"):
            axis.plot(curve.kept, curve.score, marker, color=INK, fillstyle="none", label=curve.label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        kept = [share for curve in [*measured, *published] for share in curve.kept]
        share_ticks = [0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1]
        share_ticks = [tick for tick in share_ticks if min(kept) <= 1.2 * tick <= 1.5 * max(kept)]
        axis.xaxis.set_major_locator(FixedLocator(share_ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        scores = [score for curve in [*measured, *published] for score in curve.score]
        score_ticks = [0.5, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 5, 7, 10]
        score_ticks = [tick for tick in score_ticks if 0.9 * min(scores) <= tick <= 1.1 * max(scores)]
        axis.yaxis.set_major_locator(FixedLocator(score_ticks))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("share of the attention that is kept")
        axis.set_ylabel("WQL relative to the dense model")
        axis.set_title(title)
        axis.legend()
        figure.savefig(output)
        plt.close(figure)


def plot_dots(rows: Sequence[str], models: Sequence[Dots], output: Path, *, label: str) -> None:
    """Relative scores on a logarithmic axis, a row for each task, those at the top where the first model is best; means as lines with bands.

    Intervals of scores are thin lines.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot()
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 1.5 + 0.17 * len(rows)))
        first = np.nan_to_num(models[0].scores if models else np.zeros(len(rows)), nan=np.inf)
        order = np.argsort(-first, kind="stable")
        axis.axvline(1, color=INK, linewidth=0.8)
        for model, colour, line, marker in zip(models, COLOURS, LINES * 2, "osD^v<"):
            scores, lows, highs = ([values[i] for i in order] for values in (model.scores, model.lows, model.highs))
            axis.hlines(range(len(rows)), lows, highs, color=colour, linewidth=0.8, alpha=0.6)
            axis.plot(scores, range(len(rows)), marker, color=colour, markersize=4, alpha=0.8, label=model.label)
            axis.axvline(model.mean, linestyle=line, color=colour, linewidth=1.2)
            axis.axvspan(model.low, model.high, color=colour, alpha=0.08, linewidth=0)
        axis.set_yticks(range(len(rows)), [rows[i] for i in order], fontsize="small")
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.set_xscale("log")
        shown = [score for model in models for score in model.scores if 0 < score < np.inf] or [1.0]
        least, most = min(*shown, 1) / 1.5, max(*shown, 1) * 1.5  # wherever an interval ends
        axis.set_xlim(least, most)
        ticks = [tick for tick in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if least <= tick <= most]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel(label)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(models))
        figure.savefig(output)
        plt.close(figure)
