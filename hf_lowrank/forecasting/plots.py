"""Forecasts of a dense and a compressed model in one picture, in the style of `plots.py`."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from chronos import BaseChronosPipeline
from transformers import PreTrainedModel

from ..checkpoints.pipelines import pipeline_of
from ..data.series import series_by_item
from ..data.tables import LongColumns
from ..plots import Forecast, Panel, draw_forecasts, import_pyplot
from .forecast import forecast_frame

__all__ = ["plot_forecasts"]

Model: TypeAlias = "str | os.PathLike | PreTrainedModel | BaseChronosPipeline"


def plot_forecasts(  # noqa: PLR0913 a public call names all of its options
    dense: Model,
    compressed: Model,
    frame: pd.DataFrame,
    *,
    future: pd.DataFrame | None = None,
    horizon: int | None = None,
    items: int | Sequence[Hashable] = 4,
    history: int | None = None,
    quantiles: tuple[float, float, float] = (0.1, 0.5, 0.9),
    names: tuple[str, str] = ("dense", "compressed"),
    seed: int = 0,
    freq: str | None = None,
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    target: str = "target",
) -> Any:
    """Draw what two models forecast of a few series: the end of their history, and the median and the interval of each model.

    A notebook shows the picture; `.savefig("forecasts.png")` writes it. Nothing of it stays in `matplotlib.pyplot`.

    Args:
        dense, compressed: Each a folder, a Hub id, the name of a shipped reference, a loaded model or a pipeline, of any Chronos family.
        frame: Series in long format, as `forecast_frame` takes them; they may differ in frequency.
        future: What was observed after `frame`, in the same columns, of any of the series.
        horizon: Steps to forecast; by default the prediction length of `dense`.
        items: The series to draw, by their items, or how many of them, the first ones.
        history: Steps of the past to draw; by default four times the horizon. The models see all that fits into their context.
        quantiles: The low end of the interval, the line, and the high end.
        names: What the two models are called.
        seed: Of the sample paths of a Chronos-T5.
        freq, id_column, timestamp_column, target: As in `forecast_frame`.

    Returns:
        A `matplotlib.figure.Figure`, one panel a series.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An argument, a column or a series is not as it should be, or `future` has no value at the times of a forecast.
        OSError: A model cannot be had.
    """
    import_pyplot()
    columns = LongColumns(id_column, timestamp_column, target)
    interval = _interval(quantiles)
    _check_names(names)
    if history is not None and history < 1:
        raise ValueError(f"history must be at least 1, found {history}.")
    series = series_by_item(frame, "frame", columns)
    observed = {} if future is None else series_by_item(future, "future", columns)
    chosen = _chosen(items, series)
    pipelines = [pipeline_of(dense, "dense"), pipeline_of(compressed, "compressed")]
    horizon = pipelines[0].model_prediction_length if horizon is None else horizon
    options: dict[str, Any] = {"horizon": horizon, "quantiles": quantiles, "seed": seed, "freq": freq}
    options |= {"id_column": id_column, "timestamp_column": timestamp_column, "target": target}
    panels = []
    for item in chosen:
        past = series[item]
        if past.isna().all():
            raise ValueError(f"frame has no value of {id_column} {str(item)!r}.")
        one = pd.DataFrame(dict(zip(columns, (item, past.index, past.to_numpy()))))
        tables = [forecast_frame(pipeline, one, **options) for pipeline in pipelines]
        times = pd.DatetimeIndex(tables[0][timestamp_column])
        fans = [[table[str(float(level))].to_numpy() for level in quantiles] for table in tables]
        shown = past.iloc[-(history or 4 * horizon) :]
        panels.append(
            Panel(
                title=str(item),
                past=shown.to_numpy(),
                future=_future(observed, item, times, id_column),
                forecasts=tuple(Forecast(name, *fan) for name, fan in zip(names, fans)),
                times=shown.index.append(times).to_numpy(),
            )
        )
    return draw_forecasts(panels, interval=interval)


def _interval(quantiles: Sequence[float]) -> str:
    """What the interval is called, such as "80 % interval"."""
    levels = [float(level) for level in quantiles]
    if len(levels) != 3 or not 0 < levels[0] < levels[1] < levels[2] < 1:
        raise ValueError(
            f"quantiles must be three numbers that grow, between 0 and 1, such as (0.1, 0.5, 0.9); found {tuple(levels)}."
        )
    return f"{round(100 * (levels[2] - levels[0]), 6):g} % interval"


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str) or len(names) != 2 or names[0] == names[1]:
        raise ValueError(
            f"names must be two different names, of the dense and of the compressed model; found {names!r}."
        )


def _chosen(items: int | Sequence[Hashable], series: Mapping[Any, pd.Series]) -> list[Any]:
    """The items to draw, in order."""
    if isinstance(items, int):
        if items < 1 or not series:
            what = f"found {items}" if series else "and frame has no series"
            raise ValueError(f"items must be at least 1, or the names of series, {what}.")
        return list(series)[:items]
    chosen = [items] if isinstance(items, str) else list(items)
    if unknown := [item for item in chosen if item not in series]:
        some = ", ".join(repr(str(item)) for item in list(series)[:10])
        raise ValueError(
            f"items must be series of frame, found {str(unknown[0])!r}; it has {some}{', ...' * (len(series) > 10)}."
        )
    if not chosen:
        raise ValueError("items must name at least one series, found none.")
    return chosen


def _future(observed: Mapping[Any, pd.Series], item: Any, times: pd.DatetimeIndex, id_column: str) -> np.ndarray:
    """What was observed at the times of a forecast, NaN where nothing was; empty of a series that has no future."""
    if item not in observed:
        return np.empty(0)
    values = observed[item].reindex(times)
    if values.isna().all():
        raise ValueError(
            f"future has no value of {id_column} {str(item)!r} at the times of its forecast, {times[0]} to {times[-1]}."
        )
    return values.to_numpy()
