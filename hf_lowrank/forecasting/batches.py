"""Quantile forecasts of series of any length: batched by length, the same however they are batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline, ForecastType
from numpy.typing import NDArray

from ..checkpoints.pipelines import Forecasts, in_lean_pipeline, predict_groups, predict_quantiles, stable_seed
from ..data.group_columns import GroupColumns
from ..data.times import times_after
from .groups import Groups

__all__ = ["Request", "batches_by_length", "forecast_series", "forecasts_jointly"]

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


def forecasts_jointly(pipeline: BaseChronosPipeline, columns: GroupColumns) -> bool:
    """Whether a model sees the series of an item together; otherwise each target is forecast by itself.

    Raises:
        ValueError: There are covariates, and the model has no use for them.
    """
    is_group = len(columns.targets) > 1 or bool(columns.covariates)
    if isinstance(pipeline, Chronos2Pipeline):
        return is_group
    if columns.covariates:
        raise ValueError(
            "past_covariates and known_covariates are for Chronos-2, which forecasts a group of series together; this model forecasts "
            f"each target by itself. Found {', '.join(columns.covariates)}."
        )
    return False


def forecast_series(
    pipeline: BaseChronosPipeline,
    groups: Groups,
    request: Request,
    advance: Callable[[int], object] = lambda count: None,
) -> pd.DataFrame:
    """The table of forecasts of the items, target by target; `advance` is told the number of series after each batch."""
    pipeline = in_lean_pipeline(pipeline)
    columns = groups.columns
    jointly = forecasts_jointly(pipeline, columns)
    forecast, width, num_variates = _each_alone, 1, 1
    if jointly:
        forecast, width = _together, len(columns.targets)
        num_variates = width + len(columns.covariates)
    names = list(groups.past)
    series = [
        (names[row], columns.targets[column])
        for row, column in np.argwhere(groups.are_forecast(request.context_length, jointly=jointly))
    ]
    mean = np.empty((len(series), request.horizon), dtype=np.float32)
    quantiles = np.empty((*mean.shape, len(request.quantiles)), dtype=np.float32)
    lengths = [min(len(groups.past[item]), request.context_length) for item, _ in series[::width]]
    for batch in batches_by_length(lengths, max(1, request.batch_size // num_variates)):
        rows = (batch[:, None] * width + np.arange(width)).ravel()
        quantiles[rows], mean[rows] = forecast(pipeline, groups, request, [series[row] for row in batch * width])
        is_finite = np.isfinite(quantiles[rows]).all(axis=(1, 2)) & np.isfinite(mean[rows]).all(axis=1)
        if not is_finite.all():
            item, _ = series[rows[int(np.argmin(is_finite))]]
            context = groups.past[item][list(columns.targets)].to_numpy()[-request.context_length :]
            raise ValueError(
                f"the forecast of {columns.item} {str(item)!r} is not finite: the model cannot bear its values, which are up to "
                f"{np.nanmax(np.abs(context)):.3g}."
            )
        advance(len(rows))
    return _table(groups, request, series, mean, quantiles)


def _each_alone(
    pipeline: BaseChronosPipeline, groups: Groups, request: Request, series: Sequence[tuple[Any, str]]
) -> Forecasts:
    """Quantiles (N, H, Q) and means (N, H) of N series."""
    options: dict[str, Any] = {}
    if request.num_samples is not None:
        seeds = [stable_seed(request.seed, str(item)) for item, _ in series]
        options = {"num_samples": request.num_samples, "seeds": seeds}
    contexts = [
        torch.tensor(groups.past[item][target].to_numpy()[-request.context_length :]) for item, target in series
    ]
    return predict_quantiles(pipeline, contexts, request.horizon, request.quantiles, **options)


def _together(
    pipeline: BaseChronosPipeline, groups: Groups, request: Request, series: Sequence[tuple[Any, str]]
) -> Forecasts:
    """Quantiles (N, H, Q) and means (N, H) of all targets, one after another, of the items of the series."""
    inputs = groups.prepared([item for item, _ in series], request.context_length, request.horizon)
    quantiles, mean = predict_groups(pipeline, inputs, request.horizon, request.quantiles)
    return np.concatenate(list(quantiles)), np.concatenate(list(mean))


def _table(
    groups: Groups,
    request: Request,
    series: Sequence[tuple[Any, str]],
    mean: NDArray[np.float32],
    quantiles: NDArray[np.float32],
) -> pd.DataFrame:
    columns, items = groups.columns, [item for item, _ in series]
    last = pd.DatetimeIndex([groups.past[item].index[-1] for item in items])
    times = times_after(
        last, range(1, request.horizon + 1), groups.freq, lambda row: f"{columns.item} {str(items[row])!r}"
    )
    targets = np.array([target for _, target in series], dtype=object)
    forecasts = {
        columns.item: pd.Series(items).repeat(request.horizon).to_numpy(),
        columns.time: pd.DatetimeIndex(np.stack(times, axis=1).ravel()),
        "target_name": targets.repeat(request.horizon),
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
