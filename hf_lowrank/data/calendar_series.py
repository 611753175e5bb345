"""Series with the seasons of the calendar: what people measure by the hour, the day or the month.

The periods of one frequency come together, for a clock and a week run through the same series: an hourly series has a day of 24
steps and a week of 168. A level is multiplied by the profile of a day and the factor of a weekday, or they are added, as in the
multiplicative and additive decompositions of Hyndman and Athanasopoulos ("Forecasting: Principles and Practice", 3rd edition, section 3.2):

    y_t = level_t (1 + a_t season_t) + e_t    or    y_t = level_t + a_t season_t + e_t
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

__all__ = ["FREQUENCIES", "Frequency", "calendar_series"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Frequency:
    """How often a series is measured.

    Attributes:
        name: As pandas spells it.
        periods: Of its seasons, in steps: none, one, or a short one and a long one.
        weight: How often it is drawn, relative to the others.
    """

    name: str
    periods: tuple[int, ...]
    weight: float


FREQUENCIES = (
    Frequency("YE", (), 2),
    Frequency("QE", (4,), 3),
    Frequency("ME", (12,), 5),
    Frequency("W", (52,), 3),
    Frequency("D", (7, 365), 6),
    Frequency("h", (24, 168), 6),
    Frequency("30min", (48, 336), 3),
    Frequency("15min", (96, 672), 3),
    Frequency("10min", (144, 1008), 1.5),
    Frequency("5min", (288, 2016), 1.5),
)
DAYS = 7  # of a week, the long season of everything below a day
# Every frequency with each number of its seasons: an hourly series may know no weekdays. The long one is there in six of ten.
CHOICES = tuple(
    (periods, one.weight * share)
    for one in FREQUENCIES
    for periods, share in (
        ((one.periods[:1], 0.4), (one.periods, 0.6)) if len(one.periods) == 2 else ((one.periods, 1.0),)
    )
)


def calendar_series(num_series: int, length: int, *, seed: int | list[int] | np.random.SeedSequence) -> FloatArray:
    """Series with one or two seasons of the calendar, a level that drifts, and noise.

    Half of them hold three cycles or more of their longest season, where `length` allows it for any frequency; of the others each
    holds its shortest season once. The deviation of the season is 0.5 to 20 times that of the noise, log-uniformly.

    Returns:
        An array of shape (num_series, length).
    """
    rng = np.random.default_rng(seed)
    series = np.empty((num_series, length))
    for row in series:
        row[:] = _one(rng, _periods(rng, length), length)
    return series


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _periods(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    """The seasons of a series of this length."""
    whole = [choice for choice in CHOICES if choice[0] and 3 * choice[0][-1] <= length]
    known = [choice for choice in CHOICES if not choice[0] or choice[0][0] <= length]
    choices = whole if whole and rng.random() < 0.5 else known
    weights = np.array([weight for _, weight in choices])
    return choices[rng.choice(len(choices), p=weights / weights.sum())][0]


def _one(rng: np.random.Generator, periods: tuple[int, ...], length: int) -> FloatArray:
    level = _level(rng, length)
    if not periods:
        return level + _noise(rng, length) * _log_uniform(rng, 0.005, 0.2)
    season = _season(rng, periods, length)
    amplitude = _log_uniform(rng, 0.05, 1.0) * np.exp(0.3 * rng.uniform() * _wander(rng, length))
    noise = _noise(rng, length) * np.sqrt(np.mean(amplitude**2)) / _log_uniform(rng, 0.5, 20.0)
    if rng.random() < 0.5:
        return level + amplitude * season + noise
    series = level * (1 + amplitude * season + noise)
    return np.maximum(series, 0.0) if rng.random() < 0.7 else series


# --- the level and the noise -------------------------------------------------------------------------------------


def _wander(rng: np.random.Generator, length: int) -> FloatArray:
    """A slow walk of unit deviation through the window, straight between its turns."""
    turns = int(rng.integers(3, 13))
    walk = np.cumsum(rng.standard_normal(turns))
    path = np.interp(np.linspace(0, turns - 1, length), np.arange(turns), walk)
    return (path - path.mean()) / (path.std() + 1e-9)


def _level(rng: np.random.Generator, length: int) -> FloatArray:
    """Around 1, or around 0 for a fifth: a slow walk, and a trend in six of ten, which is growth in per cent for half of those."""
    level = _log_uniform(rng, 0.01, 0.5) * _wander(rng, length)
    if rng.random() < 0.6:
        slope = float(rng.choice([-0.5, 1.0])) * _log_uniform(rng, 0.05, 3.0)
        level += slope * np.linspace(0, 1, length)
    if rng.random() < 0.5:
        return np.exp(2.0 * np.tanh(level / 2.0))
    return level + float(rng.random() < 0.8)


def _noise(rng: np.random.Generator, length: int) -> FloatArray:
    """Noise of unit deviation: white, or x_t = phi x_{t-1} + e_t; e_t is Gaussian, or Student-t with 4 degrees of freedom for a third."""
    innovations = rng.standard_t(4, length) / np.sqrt(2) if rng.random() < 0.33 else rng.standard_normal(length)
    if rng.random() < 0.5:
        return innovations
    phi = rng.uniform(0.2, 0.98)
    start = innovations[0] * phi / np.sqrt(1 - phi**2)  # as if it had run for ever
    filtered, _ = lfilter([1.0], [1.0, -phi], innovations, zi=[start])
    return filtered * np.sqrt(1 - phi**2)


# --- the seasons -------------------------------------------------------------------------------------------------


def _standard(values: FloatArray) -> FloatArray:
    return (values - values.mean()) / (values.std() + 1e-9)


def _season(rng: np.random.Generator, periods: tuple[int, ...], length: int) -> FloatArray:
    """The seasons together, of unit deviation."""
    short, long = periods[0], periods[-1]
    step = np.arange(length) + rng.integers(long)
    if long == short:
        return _standard(_profile(rng, short)[step % short])
    if long == DAYS * short:
        return _standard(_week(rng, short, step))
    share = rng.uniform(0.1, 0.9)  # a week and a year
    return _standard(share * _profile(rng, short)[step % short] + (1 - share) * _profile(rng, long)[step % long])


def _week(rng: np.random.Generator, day: int, step: NDArray[np.int64]) -> FloatArray:
    """Days of one profile, each weekday with its factor; the weekend with a profile of its own in four of ten, and holidays."""
    weekday = step // day % DAYS
    workday = 1 + rng.uniform(0.2, 1.0) * _profile(rng, day)
    weekend = 1 + rng.uniform(0.2, 1.0) * _profile(rng, day) if rng.random() < 0.4 else workday
    factor = 1 + rng.uniform(0.0, 0.15) * rng.standard_normal(DAYS)
    factor[5:] *= rng.uniform(0.2, 1.4)
    is_free = weekday >= 5
    if rng.random() < 0.2:
        holidays = rng.random(step[-1] // day + 1) < 0.03
        is_free |= holidays[step // day]
        weekday = np.where(is_free & (weekday < 5), DAYS - 1, weekday)  # it goes like a Sunday
    return factor[weekday] * np.where(is_free, weekend[step % day], workday[step % day])


def _profile(rng: np.random.Generator, period: int) -> FloatArray:
    """One cycle of a season, of unit deviation: a few harmonics, bumps, a day that is dark at night, or any values."""
    phase = 2 * np.pi * np.arange(period) / period
    kind = rng.choice(["harmonics", "bumps", "night", "free"], p=[0.35, 0.25, 0.15, 0.25])
    if kind == "free" and period <= 60:
        values = rng.standard_normal(period)
        return _standard(values if rng.random() < 0.6 else np.abs(values) ** rng.uniform(1.5, 4))
    if kind == "bumps":
        return _standard(_bumps(rng, phase))
    if kind == "night":
        day = np.cos(phase - rng.uniform(0, 2 * np.pi)) - rng.uniform(-0.7, 0.6)
        return _standard(np.maximum(day, 0.0) ** rng.uniform(0.5, 2.0))
    harmonics = np.arange(1, min(max(period // 2, 1), int(rng.integers(1, 9))) + 1)
    size = rng.standard_normal((2, len(harmonics))) / harmonics ** rng.uniform(0.5, 1.5)
    angle = np.outer(harmonics, phase)
    return _standard(size[0] @ np.cos(angle) + size[1] @ np.sin(angle))


def _bumps(rng: np.random.Generator, phase: FloatArray) -> FloatArray:
    """One to three peaks or dips of the von Mises shape, each 0.02 to 0.2 of the cycle wide."""
    total = np.zeros(len(phase))
    for _ in range(rng.integers(1, 4)):
        width = 2 * np.pi * max(_log_uniform(rng, 0.02, 0.2), 0.5 / len(phase))
        sign = 1.0 if rng.random() < 0.8 else -1.0
        total += sign * rng.uniform(0.3, 1.0) * np.exp((np.cos(phase - rng.uniform(0, 2 * np.pi)) - 1) / width**2)
    return total
