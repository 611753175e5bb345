"""The demo: one checkpoint, dense and compressed, forecasts real series side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from chronos import BaseChronosPipeline
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..checkpoints.dense import load_chronos
from ..checkpoints.families import family_of
from ..checkpoints.pipelines import QUANTILE_LEVELS, as_pipeline, predict_quantiles
from ..checkpoints.summary import summarize
from ..evaluation.naive import seasonal_naive_quantiles
from ..evaluation.scores import log_ratios, score_forecasts
from ..evaluation.tasks import import_fev
from ..files import new_file
from ..plots import STYLE, Forecast, Panel, check_plot, draw_forecasts
from ..progress import progress_display
from .sweep import DEFAULT_METHODS, compressed_models, model_name

__all__ = ["DemoRow", "demo", "packaged_series"]

# Of the packaged series, in steps.
SEASON_AND_HORIZON = {
    "el_nino_sst_monthly": (12, 24),
    "mauna_loa_co2_monthly": (12, 24),
    "nile_yearly": (1, 8),
    "sunspots_yearly": (1, 11),
}
NUM_WINDOWS = 4
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class DemoRow:
    """One model: what it takes and what it gives.

    `wql` and `mase` are geometric means over the series, relative to Seasonal Naive (below 1 is better); `seconds` are the
    median, least and most over the rounds for all forecasts; `bytes` those of the weights and `cache_bytes` those of one token of
    context and one of forecast together, in `dtype`, in which the checkpoint is saved.
    """

    name: str
    parameters: int
    bytes: int
    dtype: str
    attention_ratio: float
    kept_rank_ratio: float | None
    cache_bytes: int
    seconds: tuple[float, float, float]
    wql: float
    mase: float


@dataclass(frozen=True)
class RollingWindows:
    """Rolling forecasts of one series: contexts of growing length, targets of shape (windows, horizon)."""

    name: str
    season: int
    contexts: list[NDArray[np.float64]]
    targets: NDArray[np.float64]

    @property
    def horizon(self) -> int:
        """The steps that every window forecasts."""
        return self.targets.shape[1]


def packaged_series() -> pd.DataFrame:
    """The public-domain series that ship with the package: columns item_id, timestamp, target."""
    with resources.as_file(resources.files("hf_lowrank") / "assets" / "series.csv") as path:
        return pd.read_csv(path, parse_dates=["timestamp"])


def rolling_windows(series: pd.DataFrame, context_length: int) -> list[RollingWindows]:
    """The last `NUM_WINDOWS` windows of each packaged series, one horizon apart."""
    rolling = []
    for name, group in series.groupby("item_id"):
        season, horizon = SEASON_AND_HORIZON[str(name)]
        values = group["target"].to_numpy(float)
        ends = [len(values) - horizon * step for step in range(NUM_WINDOWS, 0, -1)]
        rolling.append(
            RollingWindows(
                name=str(name),
                season=season,
                contexts=[values[max(0, end - context_length) : end] for end in ends],
                targets=np.stack([values[end : end + horizon] for end in ends]),
            )
        )
    return rolling


def naive_quantiles(windows: RollingWindows) -> NDArray[np.floating]:
    """Seasonal Naive's quantiles (windows, horizon, levels): the last season repeated, the same at all levels."""
    quantiles, _ = seasonal_naive_quantiles(
        windows.contexts, horizon=windows.horizon, seasonality=windows.season, num_levels=len(QUANTILE_LEVELS)
    )
    return quantiles


def score(windows: RollingWindows, quantiles: NDArray[np.floating]) -> dict[str, float]:
    """WQL, MASE and SQL by fev of quantile forecasts (windows, horizon, levels) of one series, whose windows count as series."""
    return score_forecasts(
        targets=windows.targets,
        contexts=windows.contexts,
        quantiles=quantiles,
        seasonality=windows.season,
    )


def forecast(pipeline: BaseChronosPipeline, windows: RollingWindows, seed: int) -> NDArray[np.float64]:
    """Quantiles of shape (windows, horizon, levels), with the same random numbers for every model."""
    torch.manual_seed(seed)
    contexts = [torch.tensor(context, dtype=torch.float32) for context in windows.contexts]
    quantiles, _ = predict_quantiles(pipeline, contexts, windows.horizon, QUANTILE_LEVELS)
    return quantiles.astype(np.float64)


def demo(
    source: str = "reference-bolt",
    *,
    ratios: Sequence[float] = (0.5, 0.25, 0.15),
    plot: Path | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> list[DemoRow]:
    """Compress a Chronos model at a few ratios and forecast the packaged series with every model.

    Args:
        source: A dense Chronos checkpoint: a folder, a Hub id, or the name of one that ships here.
        ratios: The shares of the attention to keep.
        plot: Where to write a picture of the forecasts of the dense and of one compressed model, if anywhere.
        seed: The seed of the samples, the same for every model.
        show_progress: Show a progress bar.

    Raises:
        ValueError: `source` is no dense Chronos model.
        ImportError: fev or, with `plot`, matplotlib is not installed.
    """
    import_fev()
    if plot is not None:
        check_plot("plot", plot)
    dense = load_chronos(source)
    compressed = compressed_models(dense, DEFAULT_METHODS, "ratio", ratios, seed=seed)
    models = {"dense": dense, **{model_name(*key): model for key, model in compressed.items()}}
    pipelines = {name: as_pipeline(model) for name, model in models.items()}
    rolling = rolling_windows(packaged_series(), pipelines["dense"].model_context_length)
    forecasts, seconds = _timed_forecasts(pipelines, rolling, seed=seed, show_progress=show_progress)

    naive_scores = [score(windows, naive_quantiles(windows)) for windows in rolling]
    rows = []
    for name, model in models.items():
        scores = [score(windows, quantiles) for windows, quantiles in zip(rolling, forecasts[name])]
        relative = {
            metric: math.exp(log_ratios([s[metric] for s in scores], [s[metric] for s in naive_scores]).mean())
            for metric in ("WQL", "MASE")
        }
        rows.append(_row(name, model, dense.config.dtype or torch.float32, seconds[name], relative))
    if plot is not None:
        chosen = model_name("default", ratios[min(1, len(ratios) - 1)])
        shown = {name: forecasts[name] for name in ("dense", chosen)}
        with new_file(plot) as part:
            figure = draw_forecasts([_panel(windows, i, shown) for i, windows in enumerate(rolling)])
            figure.savefig(part, dpi=STYLE["savefig.dpi"])
    return rows


def _timed_forecasts(
    pipelines: Mapping[str, BaseChronosPipeline], rolling: Sequence[RollingWindows], *, seed: int, show_progress: bool
) -> tuple[dict[str, list[NDArray[np.float64]]], dict[str, list[float]]]:
    """Of each model its forecast of each series, and the seconds that all of them took in each of `TIMED_ROUNDS` rounds."""
    forecasts: dict[str, list[NDArray[np.float64]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    with progress_display(show=show_progress) as display:
        step = display.add_task("Forecasting", total=TIMED_ROUNDS * len(pipelines))
        for _ in range(TIMED_ROUNDS):  # in turns, so that a busy moment hits every model
            for name, pipeline in pipelines.items():
                start = time.perf_counter()
                forecasts[name] = [forecast(pipeline, windows, seed) for windows in rolling]
                seconds[name].append(time.perf_counter() - start)
                display.advance(step)
    return forecasts, seconds


def _row(
    name: str, model: PreTrainedModel, saved: torch.dtype, seconds: list[float], relative: dict[str, float]
) -> DemoRow:
    config = model.config
    family = family_of(type(model))
    if family is not None and type(model) in family.classes:  # a dense model's sizes are those of a table at full rank
        config = family.lowrank_config(config)
    sizes = summarize(config)
    return DemoRow(
        name=name,
        parameters=model.num_parameters(),
        bytes=model.num_parameters() * saved.itemsize,
        dtype=str(saved).removeprefix("torch."),
        attention_ratio=sizes.attention_ratio,
        kept_rank_ratio=(config.compression or {}).get("kept_rank_ratio"),
        cache_bytes=sizes.total("cached_numbers") * saved.itemsize,
        seconds=(float(np.median(seconds)), min(seconds), max(seconds)),
        wql=relative["WQL"],
        mase=relative["MASE"],
    )


def _panel(windows: RollingWindows, index: int, forecasts: Mapping[str, Sequence[NDArray[np.float64]]]) -> Panel:
    """The last window of a series, the one with this index in the forecasts of each model."""

    def last(name: str) -> Forecast:
        quantiles = forecasts[name][index][-1]
        return Forecast(name, *(quantiles[:, QUANTILE_LEVELS.index(level)] for level in (0.1, 0.5, 0.9)))

    return Panel(
        title=windows.name.replace("_", " "),
        past=windows.contexts[-1][-4 * windows.horizon :],
        future=windows.targets[-1],
        forecasts=tuple(last(name) for name in forecasts),
    )
