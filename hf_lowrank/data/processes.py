"""Series of simple processes beside the calendar: trends with seasons, growth, regimes, steps, spikes, saw teeth, and counts with gaps.

The trends with seasons are those of "ForecastPFN: Synthetically-Trained Zero-Shot Forecasting" (arXiv 2311.01933, section 4); the others
are kinds of series that "TempoPFN" (arXiv 2510.25502, section 3.2) trains on, drawn in our own way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["growth", "intermittent_counts", "ornstein_uhlenbeck", "pulses", "trend_times_season"]

FloatArray = NDArray[np.float64]
Seed = int | list[int] | np.random.SeedSequence

PERIODS = (4, 7, 12, 24, 52, 30, 48, 96, 168, 288, 365)


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: int | tuple[int, ...]) -> FloatArray:
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _usable(length: int) -> NDArray[np.int64]:
    """The periods that a series of this length shows at least twice; the shortest where it shows none."""
    usable = [period for period in PERIODS if 2 * period <= length]
    return np.array(usable or PERIODS[:1])


def trend_times_season(num_series: int, length: int, *, seed: Seed) -> FloatArray:
    """Trends times seasons times noise (ForecastPFN, equations 1 to 5):

        y_t = trend(t) season(t) z_t,              z_t = 1 + m (w_t - E w),  w_t ~ Weibull(1, k)
        trend(t) = (1 + m_lin t) c_exp^t,          season(t) = prod_p (1 + m_p sum_f [c_f sin(2 pi f t / p) + d_f cos(2 pi f t / p)])

    with c_f, d_f ~ N(0, 1 / f), of which the largest value is scaled to one.

    Returns an array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    column = (num_series, 1)
    time = np.linspace(0.0, 1.0, length)
    series = (1 + rng.uniform(-0.6, 2.0, column) * time) * np.exp(rng.normal(0, 0.7, column) * time)
    step = np.arange(length)
    for row in series:
        for period in rng.choice(_usable(length), size=rng.integers(0, 3)):
            frequency = np.arange(1, min(int(period) // 2, 5) + 1)
            c, d = rng.standard_normal((2, len(frequency))) / np.sqrt(frequency)
            angle = 2 * np.pi * np.outer(frequency, step) / period
            wave = c @ np.sin(angle) + d @ np.cos(angle)
            row *= 1 + rng.uniform(0.05, 0.8) * wave / np.abs(wave).max()
    shape = rng.uniform(1.0, 5.0, column)
    weibull = rng.weibull(np.broadcast_to(shape, series.shape))
    noise = rng.uniform(0.0, 0.4, column) * (weibull - weibull.mean(axis=1, keepdims=True))
    return series * (1 + noise)


def growth(num_series: int, length: int, *, seed: Seed) -> FloatArray:
    """Smooth growth and decline, as populations and economies have them: a rate that wanders slowly, and hardly any noise.

        l_t = l_{t-1} + r_t,        r_t = (g + s a_t) / length,        a_t = phi a_{t-1} + sqrt(1 - phi^2) e_t,

    which is the local linear trend without noise in its level (Harvey, "Forecasting, Structural Time Series Models and the Kalman
    Filter", 1989, section 2.3.6) but for a rate that returns to g, its size drawn for the whole window. A series is exp(l), 1 + l, or in a
    fifth of the cases logistic in l. Its noise is 1e-5 to 0.03 of its own deviation, log-uniformly.

    Returns an array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    column = (num_series, 1)
    whole = rng.choice([-0.6, 1.0, 1.0], column) * _log_uniform(rng, 0.02, 3.0, column)
    wander = whole * np.where(rng.random(column) < 0.3, 0.0, _log_uniform(rng, 0.1, 3.0, column))
    phi = np.exp(-1 / (length * _log_uniform(rng, 0.02, 1.0, num_series)))
    shock = rng.standard_normal((length, num_series)) * np.sqrt(1 - phi**2)
    rate = np.empty((num_series, length))
    value = rng.standard_normal(num_series)
    for t in range(length):
        rate[:, t] = value
        value = phi * value + shock[t]
    level = np.cumsum((whole + wander * rate) / length, axis=1)
    saturating = 1 / (
        1 + np.exp(-_log_uniform(rng, 2, 10, column) * (np.abs(level) - np.abs(whole) * rng.random(column)))
    )
    kind = rng.choice(3, column, p=[0.5, 0.3, 0.2])
    series = np.choose(kind, [np.exp(3.0 * np.tanh(level / 3.0)), 1 + level, saturating])
    deviation = series.std(axis=1, keepdims=True)
    return series + rng.standard_normal(series.shape) * deviation * _log_uniform(rng, 1e-5, 0.03, column)


def ornstein_uhlenbeck(num_series: int, length: int, *, seed: Seed) -> FloatArray:
    """Processes that return to a mean, each with two regimes that alternate (a two-state Markov chain), exactly as sampled:

        x_{t+1} = mu + (x_t - mu) exp(-theta) + sigma sqrt((1 - exp(-2 theta)) / (2 theta)) e_t

    Returns an array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    theta = _log_uniform(rng, 0.003, 1.0, (2, num_series))
    mean = rng.normal(0, 1.5, (2, num_series))
    deviation = _log_uniform(rng, 0.1, 1.0, (2, num_series))  # when it has run for ever
    stays = 1 - 1 / (length * _log_uniform(rng, 0.1, 3.0, (2, num_series)))
    decay = np.exp(-theta)
    shock = deviation * np.sqrt(1 - decay**2)  # sigma = deviation sqrt(2 theta)
    noise, jump = rng.standard_normal((length, num_series)), rng.random((length, num_series))
    columns = np.arange(num_series)
    regime = rng.integers(2, size=num_series)
    value = mean[regime, columns] + deviation[regime, columns] * noise[0]
    series = np.empty((num_series, length))
    for t in range(length):
        series[:, t] = value
        regime = np.where(jump[t] < stays[regime, columns], regime, 1 - regime)
        centre = mean[regime, columns]
        value = centre + (value - centre) * decay[regime, columns] + shock[regime, columns] * noise[t]
    return series + rng.choice([0.0, 3.0], (num_series, 1))


def pulses(num_series: int, length: int, *, seed: Seed) -> FloatArray:
    """Steps between levels, spikes that decay, and saw teeth, at regular times for half of them; with a little noise.

    Returns an array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    shapes: list[Callable[[np.random.Generator, NDArray[np.int64], int], FloatArray]] = [_steps, _spikes, _saw_teeth]
    series = np.empty((num_series, length))
    for row in series:
        if rng.random() < 0.5:
            period = int(rng.choice(_usable(length)))
            times = np.arange(int(rng.integers(period)), length, period)
        else:
            times = np.flatnonzero(rng.random(length) < _log_uniform(rng, 2, 40, 1)[0] / length)
        row[:] = shapes[rng.integers(3)](rng, times, length)
    noise = rng.standard_normal(series.shape) * _log_uniform(rng, 0.001, 0.3, (num_series, 1))
    return rng.choice([0.0, 1.0, 3.0], (num_series, 1)) + series + noise


def _since(times: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many of the times have come at each step, and the steps since the last of them."""
    step = np.arange(length)
    count = np.searchsorted(times, step, side="right")
    return count, step - np.append(0, times)[count]


def _steps(rng: np.random.Generator, times: NDArray[np.int64], length: int) -> FloatArray:
    count, _ = _since(times, length)
    if rng.random() < 0.5:  # the levels come again
        cycle = rng.standard_normal(int(rng.integers(2, 8)))
        return cycle[count % len(cycle)]
    return rng.standard_normal(len(times) + 1)[count]


def _spikes(rng: np.random.Generator, times: NDArray[np.int64], length: int) -> FloatArray:
    count, since = _since(times, length)
    height = rng.uniform(1, 3) * (1 + rng.uniform(0, 0.5) * rng.standard_normal(len(times) + 1))
    height[0] = 0.0  # before the first
    return height[count] * np.exp(-since / _log_uniform(rng, 0.3, 20.0, 1)[0])


def _saw_teeth(rng: np.random.Generator, times: NDArray[np.int64], length: int) -> FloatArray:
    _, since = _since(times, length)
    teeth = (since / max(since.max(), 1)) ** rng.uniform(0.5, 2.0)
    return float(rng.choice([-1.0, 1.0])) * rng.uniform(0.5, 3) * teeth


def intermittent_counts(num_series: int, length: int, *, seed: Seed) -> FloatArray:
    """Demand that is zero most of the time: a size where there is any, more often at some places of a season.

    At each step there is demand with a probability of 0.03 to 0.6, of a size of one plus a negative binomial number, which is the
    model behind Croston's method ("Forecasting and Stock Control for Intermittent Demands", 1972).

    Returns an array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    column = (num_series, 1)
    chance = np.broadcast_to(_log_uniform(rng, 0.03, 0.6, column), (num_series, length)).copy()
    for row in chance:
        if rng.random() < 0.4:
            period = int(rng.choice(_usable(length)))
            row *= (rng.gamma(2.0, 0.5, period))[np.arange(length) % period]
    mean, spread = _log_uniform(rng, 0.2, 20.0, column), _log_uniform(rng, 0.5, 5.0, column)
    size = 1 + rng.poisson(rng.gamma(spread, mean / spread, (num_series, length)))
    series = np.where(rng.random((num_series, length)) < np.minimum(chance, 0.95), size, 0).astype(float)
    series[~series.any(axis=1), -1] = 1.0  # one that is never sold has no scale
    return series
