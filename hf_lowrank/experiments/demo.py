"""The demo: one checkpoint, dense and compressed, forecasts real series side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from chronos import BaseChronosPipeline
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from ..checkpoints.dense import load_chronos
from ..checkpoints.families import family_of
from ..checkpoints.pipelines import QUANTILE_LEVELS, as_pipeline
from ..checkpoints.summary import summarize
from ..evaluation.evaluate import seasonal_naive
from ..evaluation.tasks import import_fev
from ..plots import Forecast, Panel, import_pyplot, plot_forecasts
from .sweep import SHOWN, compressed_models, model_name

__all__ = ["DemoRow", "demo", "packaged_series"]

# Of the packaged series: season in steps and forecast horizon.
SETTINGS = {
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
    median, least and most over the rounds for all forecasts; `cache_bytes` those of one token of context and one of
    forecast together.
    """

    name: str
    parameters: int
    bytes: int
    attention_ratio: float
    kept_rank_ratio: float | None
    cache_bytes: int
    seconds: tuple[float, float, float]
    wql: float
    mase: float


@dataclass(frozen=True)
class Windows:
    """Rolling forecasts of one series: contexts of growing length, targets of shape (windows, horizon)."""

    name: str
    season: int
    contexts: list[NDArray[np.float64]]
    targets: NDArray[np.float64]


def packaged_series() -> pd.DataFrame:
    """The public-domain series that ship with the package: columns item_id, timestamp, target."""
    with resources.as_file(resources.files("hf_lowrank") / "assets" / "series.csv") as path:
        return pd.read_csv(path, parse_dates=["timestamp"])


def rolling_windows(series: pd.DataFrame, context_length: int) -> list[Windows]:
    """The last `NUM_WINDOWS` windows of each packaged series, one horizon apart."""
    windows = []
    for name, group in series.groupby("item_id"):
        season, horizon = SETTINGS[str(name)]
        values = group["target"].to_numpy(float)
        ends = [len(values) - horizon * step for step in range(NUM_WINDOWS, 0, -1)]
        windows.append(
            Windows(
                name=str(name),
                season=season,
                contexts=[values[max(0, end - context_length) : end] for end in ends],
                targets=np.stack([values[end : end + horizon] for end in ends]),
            )
        )
    return windows


def naive_quantiles(windows: Windows) -> NDArray[np.float64]:
    """Seasonal Naive's quantiles (windows, horizon, levels): the last season repeated, the same at all levels."""
    horizon = windows.targets.shape[1]
    point = np.stack([seasonal_naive(context, horizon, windows.season) for context in windows.contexts])
    return np.repeat(point[:, :, None], len(QUANTILE_LEVELS), axis=2)


def score(windows: Windows, quantiles: NDArray[np.floating]) -> dict[str, float]:
    """WQL and MASE by fev of quantile forecasts (windows, horizon, levels) of one series."""
    from fev.metrics import get_metric

    arguments = {
        "y_true": windows.targets[:, :, None],
        "y_pred": quantiles[:, :, None, QUANTILE_LEVELS.index(0.5)],
        "y_past": np.concatenate(windows.contexts)[:, None],
        "y_past_lengths": np.array([len(context) for context in windows.contexts]),
        "q_pred": quantiles[:, :, None, :],
        "seasonality": windows.season,
        "quantile_levels": QUANTILE_LEVELS,
    }
    return {name: float(get_metric(name).compute(**arguments)) for name in ("WQL", "MASE")}


def forecast(pipeline: BaseChronosPipeline, windows: Windows, seed: int) -> NDArray[np.float64]:
    """Quantiles of shape (windows, horizon, levels), with the same random numbers for every model."""
    torch.manual_seed(seed)
    contexts = [torch.tensor(context, dtype=torch.float32) for context in windows.contexts]
    quantiles, _ = pipeline.predict_quantiles(contexts, windows.targets.shape[1], quantile_levels=QUANTILE_LEVELS)
    return quantiles.double().numpy()


def demo(
    source: str = "reference",
    *,
    ratios: Sequence[float] = (0.5, 0.25, 0.15),
    plot: Path | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> list[DemoRow]:
    """Compress a Chronos-T5 at a few ratios and forecast the packaged series with every model.

    Args:
        source: A Chronos-T5 checkpoint: `"reference"`, a folder or a Hub id.
        ratios: The shares of the attention to keep.
        plot: Where to write a picture of the forecasts of the dense and of one compressed model, if anywhere.
        seed: The seed of the samples, the same for every model.
        console: Where the progress bar goes.

    Raises:
        ValueError: `source` is no dense Chronos model.
        ImportError: fev or, with `plot`, matplotlib is not installed.
    """
    import_fev()
    if plot is not None:
        import_pyplot()
    dense = load_chronos(source)
    compressed = compressed_models(dense, SHOWN, "ratio", ratios, seed=seed)
    models = {"dense": dense, **{model_name(*key): model for key, model in compressed.items()}}
    pipelines = {name: as_pipeline(model) for name, model in models.items()}
    windows = rolling_windows(packaged_series(), pipelines["dense"].model_context_length)
    naive = [score(window, naive_quantiles(window)) for window in windows]

    seconds: dict[str, list[float]] = {name: [] for name in models}
    forecasts: dict[str, list[NDArray[np.float64]]] = {}
    with Progress(console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Forecasting", total=TIMED_ROUNDS * len(models))
        for _ in range(TIMED_ROUNDS):  # in turns, so that a busy moment hits every model
            for name, pipeline in pipelines.items():
                start = time.perf_counter()
                forecasts[name] = [forecast(pipeline, window, seed) for window in windows]
                seconds[name].append(time.perf_counter() - start)
                progress.advance(task)

    rows = []
    for name, model in models.items():
        scores = [score(window, quantiles) for window, quantiles in zip(windows, forecasts[name])]
        relative = {
            metric: float(np.exp(np.mean([np.log(s[metric] / n[metric]) for s, n in zip(scores, naive)])))
            for metric in ("WQL", "MASE")
        }
        rows.append(_row(name, model, seconds[name], relative))
    if plot is not None:
        chosen = model_name("default", ratios[min(1, len(ratios) - 1)])
        plot_forecasts([_panel(window, i, forecasts, chosen) for i, window in enumerate(windows)], plot)
    return rows


def _row(name: str, model: PreTrainedModel, seconds: list[float], relative: dict[str, float]) -> DemoRow:
    config = model.config
    family = family_of(type(model))
    if family is not None and type(model) in family.classes:  # a dense model's sizes are those of a table at full rank
        config = family.lowrank_config(config)
    sizes = summarize(config)
    width = model.dtype.itemsize
    return DemoRow(
        name=name,
        parameters=model.num_parameters(),
        bytes=model.num_parameters() * width,
        attention_ratio=sizes.attention_ratio,
        kept_rank_ratio=(config.compression or {}).get("kept_rank_ratio"),
        cache_bytes=sizes.total("cached_numbers") * width,
        seconds=(float(np.median(seconds)), min(seconds), max(seconds)),
        wql=relative["WQL"],
        mase=relative["MASE"],
    )


def _panel(window: Windows, index: int, forecasts: dict[str, list[NDArray[np.float64]]], chosen: str) -> Panel:
    def of(name: str) -> Forecast:
        low, median, high = (forecasts[name][index][-1, :, QUANTILE_LEVELS.index(level)] for level in (0.1, 0.5, 0.9))
        return Forecast(name, low, median, high)

    return Panel(
        title=window.name.replace("_", " "),
        past=window.contexts[-1][-4 * window.targets.shape[1] :],
        future=window.targets[-1],
        forecasts=(of("dense"), of(chosen)),
    )
