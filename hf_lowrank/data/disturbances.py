"""What happens to series on top of their process: they are turned over or round, modulated, censored, and have gaps.

As the augmentations of "TiRex" (arXiv 2505.23719, section 3.2) and "TempoPFN" (arXiv 2510.25502, section 3.3): of each kind a small share.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["disturbed", "with_gaps"]

FloatArray = NDArray[np.float64]


def disturbed(series: FloatArray, rng: np.random.Generator) -> FloatArray:
    """The series (num_series, length) with each disturbance on some: an array of the same shape.

    A tenth is turned over (y to its mirror image at the middle of its range), a twentieth runs backwards, a tenth has an amplitude that
    changes along straight lines, a twentieth is cut off above or below at a quantile.
    """
    num_series, length = series.shape
    column = (num_series, 1)
    low, high = series.min(axis=1, keepdims=True), series.max(axis=1, keepdims=True)
    series = np.where(rng.random(column) < 0.1, low + high - series, series)
    series = np.where(rng.random(column) < 0.05, series[:, ::-1], series)
    for i in np.flatnonzero(rng.random(num_series) < 0.1):
        series[i] *= np.interp(np.linspace(0, 3, length), np.arange(4), rng.uniform(0.4, 1.6, 4))
    for i in np.flatnonzero(rng.random(num_series) < 0.05):
        below, above = np.quantile(series[i], (rng.uniform(0, 0.4), rng.uniform(0.6, 1)))
        series[i] = np.maximum(series[i], below) if rng.random() < 0.5 else np.minimum(series[i], above)
    return series


def with_gaps(series: FloatArray, rng: np.random.Generator) -> FloatArray:
    """The series (num_series, length) with NaN at missing values: single ones in a twentieth, whole blocks in a twentieth.

    At most six of ten values are missing, and never the last.
    """
    num_series, length = series.shape
    single = rng.random((num_series, 1)) < 0.05
    is_missing = single & (rng.random(series.shape) < rng.uniform(0, 0.4, (num_series, 1)))
    for i in np.flatnonzero(rng.random(num_series) < 0.05):
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(length))
            is_missing[i, start : start + int(rng.integers(1, max(2, length // 5)))] = True
    is_missing[:, -1] = False
    return np.where(is_missing, np.nan, series)
