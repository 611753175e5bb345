"""Seasonal Naive, the baseline that every score is set beside: the last season, repeated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["SEASONAL_NAIVE", "seasonal_naive", "seasonal_naive_quantiles"]

SEASONAL_NAIVE = "seasonal_naive"  # its name in results


def seasonal_naive(values: NDArray[np.floating], horizon: int, seasonality: int) -> NDArray[np.floating]:
    """The last season repeated: shape (T,) to shape (horizon,).

    A missing value of the last season is taken from the latest season that has it; where none has, or where the series is
    shorter than a season, the forecast is the mean of the series, and 0 if nothing was observed at all.
    """
    observed = values[np.isfinite(values)]
    fill = observed.mean() if len(observed) else 0.0
    if len(values) < seasonality:
        return np.full(horizon, fill)
    padding = np.full(-len(values) % seasonality, np.nan)
    seasons = np.concatenate([padding, values]).reshape(-1, seasonality)
    latest = pd.DataFrame(seasons).ffill().to_numpy()[-1]
    return np.resize(np.where(np.isfinite(latest), latest, fill), horizon)


def seasonal_naive_quantiles(
    contexts: Sequence[NDArray[np.floating]], *, horizon: int, seasonality: int, num_levels: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Quantiles of shape (N, H, Q), the same at all levels, and mean forecasts of shape (N, H) for N contexts of any length."""
    mean = np.stack([seasonal_naive(context, horizon, seasonality) for context in contexts])
    return np.repeat(mean[:, :, None], num_levels, axis=2), mean
