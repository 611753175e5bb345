"""What forecasts the windows of a `fev.Task`: a Chronos pipeline of any family, with groups where it reads them, or Seasonal Naive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from chronos.chronos2.preprocess import PreparedInput
from numpy.typing import NDArray

from ..checkpoints.pipelines import QUANTILE_LEVELS, Forecasts, predict_groups, predict_quantiles, prepared_groups
from ..data.group_columns import GroupColumns
from .naive import seasonal_naive_quantiles

__all__ = ["forecaster", "targets_of"]


def targets_of(dataset: Any, task: Any) -> list[NDArray[np.float64]]:
    """The targets of each item of a `datasets.Dataset`, (K, T); what is missing is NaN."""
    columns = dataset.with_format("numpy", dtype=np.float64)
    return [np.stack(targets) for targets in zip(*(columns[name] for name in task.target_columns))]


def forecaster(
    pipeline: BaseChronosPipeline | None,
    task: Any,
    window: Any,
    contexts: Sequence[NDArray[np.floating]],
    num_samples: int | None,
) -> Callable[[slice], Forecasts]:
    """What forecasts some items of a window: quantiles (N, K, H, Q) and mean forecasts (N, K, H) of their K targets.

    A Chronos-2 forecasts several targets, or one with covariates, as groups; all else forecasts each target by itself.
    """
    if isinstance(pipeline, Chronos2Pipeline) and (len(task.target_columns) > 1 or task.dynamic_columns):
        groups = _groups(window, pipeline.model_context_length)
        return lambda some: predict_groups(pipeline, groups[some], task.horizon, QUANTILE_LEVELS)

    def each_by_itself(some: slice) -> Forecasts:
        series = [target for context in contexts[some] for target in context]
        if pipeline is None:
            levels = {"seasonality": task.seasonality, "num_levels": len(QUANTILE_LEVELS)}
            quantiles, mean = seasonal_naive_quantiles(series, horizon=task.horizon, **levels)
        else:
            inputs = [torch.as_tensor(values, dtype=torch.float32) for values in series]
            quantiles, mean = predict_quantiles(
                pipeline, inputs, task.horizon, QUANTILE_LEVELS, num_samples=num_samples
            )
        shape = (-1, len(task.target_columns), task.horizon)
        return quantiles.reshape(*shape, len(QUANTILE_LEVELS)), mean.reshape(shape)

    return each_by_itself


def _groups(window: Any, context_length: int) -> list[PreparedInput]:
    """The items of a window as Chronos-2 is given them by `predict_df`."""
    import fev

    past, future, _ = fev.convert_input_data(window, adapter="pandas")
    # Positions, whose order is that of the items whatever their names are.
    past, future = (
        table.assign(**{window.id_column: pd.factorize(table[window.id_column])[0]}) for table in (past, future)
    )
    columns = GroupColumns(
        window.id_column,
        window.timestamp_column,
        tuple(window.target_columns),
        tuple(window.past_dynamic_columns),
        tuple(window.known_dynamic_columns),
    )
    return prepared_groups(past, future, columns, window.horizon, context_length)
