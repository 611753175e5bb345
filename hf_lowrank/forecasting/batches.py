"""Quantile forecasts of series of any length: batched by length, the same however they are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from chronos import BaseChronosPipeline, ForecastType
from numpy.typing import NDArray

from ..checkpoints.pipelines import in_lean_pipeline, predict_quantiles, stable_seed
from ..data.tables import LongColumns
from ..data.times import times_after

__all__ = ["Request", "batches_by_length", "forecast_series"]

SHORT = 32  # time steps: below, padding costs less than a batch more


@dataclass(frozen=True)
class Request:
    """What is asked of a model, with its own values where nothing was said."""

    horizon: int
    quantiles: tuple[float, ...]
    batch_size: int
    context_length: int
    num_samples: int | None  # None: it forecasts quantiles
    seed: int

    @classmethod
    def of(
        cls,
        pipeline: BaseChronosPipeline,
        horizon: int | None,
        quantiles: Sequence[float],
        batch_size: int,
        context_length: int | None,
        num_samples: int | None,
        seed: int,
    ) -> Request:
        """A ValueError where the model cannot do what is asked."""
        longest_context = pipeline.model_context_length
        horizon = pipeline.model_prediction_length if horizon is None else horizon
        context_length = longest_context if context_length is None else context_length
        if not 1 <= context_length <= longest_context:
            raise ValueError(
                f"context_length must be in [1, {longest_context}] for this model, found {context_length}."
            )
        for name, value in (("horizon", horizon), ("batch_size", batch_size), ("num_samples", num_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        levels = tuple(float(level) for level in quantiles)
        if not levels or len(set(levels)) < len(levels) or not all(0 < level < 1 for level in levels):
            raise ValueError(
                f"quantiles must be different numbers between 0 and 1, found {', '.join(map(str, levels))}."
            )
        if pipeline.forecast_type == ForecastType.SAMPLES:
            num_samples = num_samples or pipeline.model.config.num_samples
        elif num_samples is not None:
            raise ValueError(
                f"num_samples is for Chronos-T5, which draws samples; this model forecasts quantiles. Found {num_samples}."
            )
        elif min(levels) < min(pipeline.quantiles) or max(levels) > max(pipeline.quantiles):
            low, high = min(pipeline.quantiles), max(pipeline.quantiles)
            raise ValueError(
                f"quantiles must be in [{low}, {high}], which is what this model was trained for; found {', '.join(map(str, levels))}."
            )
        return cls(horizon, levels, batch_size, context_length, num_samples, seed)


def forecast_series(
    pipeline: BaseChronosPipeline,
    series: Mapping[Any, pd.Series],
    freq: str,
    request: Request,
    columns: LongColumns,
    advance: Callable[[int], object] = lambda count: None,
) -> pd.DataFrame:
    """The table of forecasts of the series, which are on the grid of `freq`; `advance` is told the size of each batch."""
    pipeline = in_lean_pipeline(pipeline)
    contexts = {item: values.to_numpy()[-request.context_length :] for item, values in series.items()}
    items = [item for item, context in contexts.items() if not np.isnan(context).all()]
    mean = np.empty((len(items), request.horizon), dtype=np.float32)
    quantiles = np.empty((*mean.shape, len(request.quantiles)), dtype=np.float32)
    for rows in batches_by_length([len(contexts[item]) for item in items], request.batch_size):
        batch = [items[row] for row in rows]
        options: dict[str, Any] = {}
        if request.num_samples is not None:
            seeds = [stable_seed(request.seed, str(item)) for item in batch]
            options = {"num_samples": request.num_samples, "seeds": seeds}
        quantiles[rows], mean[rows] = predict_quantiles(
            pipeline, [torch.tensor(contexts[item]) for item in batch], request.horizon, request.quantiles, **options
        )
        finite = np.isfinite(quantiles[rows]).all(axis=(1, 2)) & np.isfinite(mean[rows]).all(axis=1)
        if not finite.all():
            item = batch[int(np.argmin(finite))]
            raise ValueError(
                f"the forecast of {columns.item} {str(item)!r} is not finite: the model cannot bear its values, which are up to "
                f"{np.nanmax(np.abs(contexts[item])):.3g}."
            )
        advance(len(batch))
    last = pd.DatetimeIndex([series[item].index[-1] for item in items])
    times = times_after(last, range(1, request.horizon + 1), freq, lambda row: f"{columns.item} {str(items[row])!r}")
    forecasts = {
        columns.item: pd.Series(items).repeat(request.horizon).to_numpy(),
        columns.time: pd.DatetimeIndex(np.stack(times, axis=1).ravel()),
        "target_name": columns.value,
        "predictions": mean.ravel(),
    }
    forecasts |= {str(level): quantiles[..., i].ravel() for i, level in enumerate(request.quantiles)}
    return pd.DataFrame(forecasts)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[NDArray[np.intp]]:
    """Positions in batches, longest first, so that no series is padded to more than twice its length, or `SHORT` steps."""
    order = np.argsort(-np.asarray(lengths, dtype=np.intp), kind="stable")
    first = 0
    while first < len(order):
        fitting = [max(2 * lengths[i], SHORT) >= lengths[order[first]] for i in order[first : first + batch_size]]
        count = fitting.index(False) if False in fitting else len(fitting)
        yield order[first : first + count]
        first += count
