"""Synthetic time series: KernelSynth, structural (innovations state-space) series, and TSMixup.

Everything is numpy, seeded, and made at the length that is asked for, so that a window of 20 points has as much shape in it as
one of 500. `mixture` mixes them with the series of calendars and of other processes.

KernelSynth and TSMixup follow "Chronos: Learning the Language of Time Series" (arXiv 2403.07815),
section 4.1 and 4.2 and appendix A; the structural family is the innovations state-space form of exponential
smoothing (Hyndman et al., "Forecasting with Exponential Smoothing", 2008, chapter 3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["kernel_synth", "mean_scaled", "structural", "ts_mixup"]

FloatArray = NDArray[np.float64]
Seed: TypeAlias = "int | list[int] | np.random.SeedSequence"

# The periods of the usual sampling frequencies, in steps: quarter-hourly to yearly cycles.
PERIODS = (4, 6, 7, 10, 12, 14, 24, 26, 30, 48, 52, 60, 96, 168, 336, 365, 672, 730)
# How often a structural series has each period. The periods of common data come up most.
SEASONS, SEASON_WEIGHTS = (4, 5, 7, 12, 24, 48, 52, 96, 144, 168), (3, 1, 4, 5, 5, 2, 2, 2, 1, 2)


def _toeplitz(lags: FloatArray) -> FloatArray:
    """The symmetric matrix `[lags[|s - t|]]` of shape (n, n), as a view on 2n - 1 numbers."""
    mirrored = np.concatenate([lags[:0:-1], lags])
    step = mirrored.strides[0]
    return np.lib.stride_tricks.as_strided(
        mirrored[len(lags) - 1 :], shape=(len(lags), len(lags)), strides=(-step, step), writeable=False
    )


def _kernel_bank(length: int) -> list[Callable[[], FloatArray]]:
    """Covariance matrices of shape (length, length) over a time axis that runs from 0 to 1."""
    time = np.linspace(0.0, 1.0, length)
    lag = np.arange(length) / max(length - 1, 1)
    bank: list[Callable[[], FloatArray]] = [partial(np.ones, (length, length))]
    bank += [partial(np.multiply, v, np.eye(length)) for v in (0.1, 1.0)]
    bank += [partial(np.add, s**2, np.outer(time, time)) for s in (0.0, 1.0, 10.0)]
    bank += [partial(_toeplitz, np.exp(-0.5 * (lag / s) ** 2)) for s in (0.1, 1.0, 10.0)]
    bank += [partial(_toeplitz, (1 + lag**2 / (2 * a)) ** -a) for a in (0.1, 1.0, 10.0)]
    bank += [partial(_toeplitz, np.exp(-2 * np.sin(np.pi * np.arange(length) / p) ** 2)) for p in PERIODS]
    return bank


def kernel_synth(
    num_series: int, length: int, *, seed: Seed, max_kernels: int = 5, samples_per_kernel: int = 1
) -> FloatArray:
    """Samples of Gaussian processes with random composite kernels (KernelSynth).

    For each series, between one and `max_kernels` kernels are drawn with replacement from a bank
    (constant, white, linear, squared exponential, rational quadratic, periodic), joined by random
    sums and products, and one sample of the process is drawn. With more `samples_per_kernel` so many series in a row share
    their kernel, and with it the work, which grows with the cube of the length.

    Returns an array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    bank = _kernel_bank(length)
    series = np.empty((num_series, length))
    for first in range(0, num_series, samples_per_kernel):
        picks = rng.integers(len(bank), size=rng.integers(1, max_kernels + 1))
        covariance = bank[picks[0]]()
        for pick in picks[1:]:
            covariance = covariance + bank[pick]() if rng.random() < 0.5 else covariance * bank[pick]()
        # A smooth kernel's covariance is singular to machine precision; the jitter is white
        # noise of a thousandth of the series' own deviation.
        jitter = 1e-6 * np.trace(covariance) / length + 1e-12
        factor = np.linalg.cholesky(covariance + jitter * np.eye(length))
        for row in series[first : first + samples_per_kernel]:
            row[:] = factor @ rng.standard_normal(length)
    return series


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int | tuple[int, ...]) -> FloatArray:
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _innovations(rng: np.random.Generator, num_series: int, length: int) -> FloatArray:
    """Noise of shape (num_series, length): Gaussian, or Student-t with 3 degrees of freedom for a third."""
    noise = rng.standard_normal((num_series, length))
    heavy = rng.random(num_series) < 0.33
    noise[heavy] = rng.standard_t(3, (int(heavy.sum()), length)) / np.sqrt(3)
    return noise


def _seasonal(rng: np.random.Generator, num_series: int, length: int) -> FloatArray:
    """One seasonal pattern a series, of unit deviation: smooth (few harmonics) or a free profile."""
    time = np.arange(length)
    weights = np.array(SEASON_WEIGHTS) / sum(SEASON_WEIGHTS)
    pattern = np.empty((num_series, length))
    for row in pattern:
        period = int(rng.choice(SEASONS, p=weights))
        phase = (time + rng.integers(period)) % period
        if rng.random() < 0.5:
            harmonics = np.arange(1, min(period // 2, 4) + 1)
            angle = 2 * np.pi * np.outer(harmonics, np.arange(period)) / period
            size = rng.standard_normal((2, len(harmonics))) / harmonics
            profile = size[0] @ np.cos(angle) + size[1] @ np.sin(angle)
        else:
            profile = rng.standard_normal(period)
            profile = profile if rng.random() < 0.6 else np.abs(profile) ** rng.uniform(1.5, 4)
        row[:] = ((profile - profile.mean()) / (profile.std() + 1e-9))[phase]
    return pattern


def structural(num_series: int, length: int, *, seed: Seed) -> FloatArray:
    """Series with a drifting level, a trend, seasons and noise, as measured ones have them.

    The level and slope follow the innovations form of Holt's damped method (eq. numbers of the book
    aside, its "AAdN" model), with innovations e_t of deviation sigma:

        y_t = l_{t-1} + phi b_{t-1} + e_t,   l_t = l_{t-1} + phi b_{t-1} + alpha e_t,   b_t = phi b_{t-1} + beta e_t

    Up to two seasonal patterns are added. Half of the series are exponentiated (growth in per cent, seasons
    that grow with the level); of the rest most have a level far from zero. Some become counts, some are cut off
    at zero, some have outliers or a level shift. The trend's size is drawn for the whole window, so
    short windows trend as much as long ones.

    Returns an array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    column = (num_series, 1)
    sigma = _log_uniform(rng, 0.003, 0.5, num_series)
    noise = _innovations(rng, num_series, length) * sigma[:, None]
    alpha = np.where(rng.random(num_series) < 0.35, 0.0, rng.uniform(0, 1.1, num_series))
    beta = np.where(rng.random(num_series) < 0.6, 0.0, alpha * _log_uniform(rng, 0.01, 0.5, num_series))
    phi = np.where(rng.random(num_series) < 0.6, 1.0, rng.uniform(0.85, 1.0, num_series))
    has_trend = rng.random(num_series) < 0.65
    slope = has_trend * rng.choice([-0.6, 1.0], num_series) * _log_uniform(rng, 0.05, 4.0, num_series) / length

    level = np.zeros(num_series)
    series = np.empty((num_series, length))
    for t in range(length):
        expected = level + phi * slope
        series[:, t] = expected + noise[:, t]
        level = expected + alpha * noise[:, t]
        slope = phi * slope + beta * noise[:, t]
    for share in (0.6, 0.2):
        amplitude = (rng.random(column) < share) * _log_uniform(rng, 0.01, 0.8, column)
        series += amplitude * _seasonal(rng, num_series, length)

    shifted = rng.random(num_series) < 0.06
    steps = np.arange(length) >= rng.integers(length, size=column)
    series += shifted[:, None] * steps * rng.normal(0, 0.5, column)

    # A free random walk can leave every scale behind; tanh keeps the window within a factor of exp(+-3).
    centre = series.mean(axis=1, keepdims=True)
    exponentiated = np.exp(3.0 * np.tanh((series - centre) / 3.0))
    offset = rng.choice([1.0, 2.0, 0.0], column, p=[0.6, 0.2, 0.2])
    series = np.where(rng.random(column) < 0.5, exponentiated, offset + series)

    counts = rng.random(num_series) < 0.08
    rate = _log_uniform(rng, 0.2, 50.0, column) * np.abs(series)
    series = np.where(counts[:, None], rng.poisson(np.minimum(rate, 1e6)), series)
    cut = rng.random(column) < 0.08
    series = np.where(cut, np.maximum(series - series.mean(axis=1, keepdims=True), 0.0), series)
    outlier = (rng.random(column) < 0.06) & (rng.random(series.shape) < 0.02)
    return series * np.where(outlier, rng.uniform(-2, 5, series.shape), 1.0)


def mean_scaled(series: FloatArray) -> FloatArray:
    """The series (num_series, length), each divided by its mean absolute value."""
    return series / (np.abs(series).mean(axis=1, keepdims=True) + 1e-9)


def ts_mixup(
    series: FloatArray, num_series: int, *, seed: Seed, max_components: int = 3, alpha: float = 1.5
) -> FloatArray:
    """Convex combinations of mean-scaled series (TSMixup, algorithm 1 of the Chronos paper).

        y = sum_{i=1}^{k} lambda_i x_i / mean|x_i|,   k ~ U{1..max_components},   lambda ~ Dirichlet(alpha, ..., alpha)

    `series` has shape (n, length); the result has shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    scaled = mean_scaled(series)
    mixed = np.empty((num_series, series.shape[1]))
    for row in mixed:
        k = rng.integers(1, max_components + 1)
        row[:] = rng.dirichlet(np.full(k, alpha)) @ scaled[rng.integers(len(scaled), size=k)]
    return mixed
