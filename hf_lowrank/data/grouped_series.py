"""Synthetic groups of series that belong together: targets with common factors, and targets with the covariates that they depend on.

Chronos-2 forecasts the series of a group jointly ("Chronos-2: From Univariate to Universal Forecasting", arXiv 2510.15821, section 4.2,
trains on series that were made multivariate in the same spirit). The series themselves are those of `synthetic_series`.

A model finds out late that it may look at the series beside a target: at first what they say is drowned by what is the target's own. So half
of the groups have covariates, and half of those are plain: their futures are known, and lines in them tell the target almost wholly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .mixture import synthetic_series

__all__ = ["SyntheticGroups", "grouped_series"]

FloatArray = NDArray[np.float64]
KINDS = {"alone": 0.35, "factor": 0.15, "covariates": 0.5}
NUM_COVARIATES = {1: 0.6, 2: 0.25, 3: 0.15}
FURTHEST_LAG = 8  # one in so many steps of the series


@dataclass(frozen=True)
class SyntheticGroups:
    """Series in groups, in their order.

    Attributes:
        values: float32 of shape (num_series, length), without missing values.
        group_ids: int64 of shape (num_series,): 0, 0, 1, ...; series of one group follow each other.
        is_known: bool of shape (num_series,): a covariate whose future is known.
        is_target: bool of shape (num_series,): it is to be forecast. What is neither known nor a target is a covariate of the past.
    """

    values: NDArray[np.float32]
    group_ids: NDArray[np.int64]
    is_known: NDArray[np.bool_]
    is_target: NDArray[np.bool_]


def grouped_series(num_series: int, length: int, *, seed: int | list[int]) -> SyntheticGroups:
    """So many series in groups of one to six.

    In a group with a common factor f, all are targets: y_i = w_i s_i f(t - lag_i) + sqrt(1 - w_i^2) x_i, with own series x_i of unit
    deviation, signs s_i and lags of up to an eighth of the length. In one with covariates, the first is a target that depends on the others,
    y = w sum_j b_j g_j(x_j(t - lag_j)) + sqrt(1 - w^2) x: events, categories, or series, most of them known in the future; 1 - w is
    log-uniform from 0.001 to 0.5. In half of these groups all are known, the g_j of series are lines, there are no lags, and 1 - w is at
    most 0.1.

    Raises:
        ValueError: `num_series` is below 1, or `length` below 2.
    """
    *seeds, own = np.random.SeedSequence(seed).generate_state(2).tolist()
    rng = np.random.default_rng(own)
    lead = length // FURTHEST_LAG
    long = synthetic_series(num_series, length + lead, seed=[*seeds, 1]).astype(np.float64)
    values = long[:, lead:].copy()
    group_ids = np.empty(num_series, np.int64)
    is_known, is_target = np.zeros(num_series, bool), np.ones(num_series, bool)
    first, group = 0, 0
    while first < num_series:
        kind = rng.choice(list(KINDS), p=list(KINDS.values()))
        covariates = int(rng.choice(list(NUM_COVARIATES), p=list(NUM_COVARIATES.values())))
        size = {"alone": 1, "factor": int(rng.integers(2, 7)), "covariates": 1 + covariates}[kind]
        size = min(size, num_series - first)
        rows = slice(first, first + size)
        group_ids[rows] = group
        if size > 1 and kind == "factor":
            values[rows] = _with_factor(rng, long[rows], lead)
        elif size > 1:
            values[rows], is_known[rows] = _with_covariates(rng, long[rows], lead)
            is_target[first + 1 : first + size] = False
        first, group = first + size, group + 1
    return SyntheticGroups(values.astype(np.float32), group_ids, is_known, is_target)


def _standard(values: FloatArray) -> FloatArray:
    return (values - values.mean(axis=-1, keepdims=True)) / (values.std(axis=-1, keepdims=True) + 1e-6)


def _level(rng: np.random.Generator) -> float:
    """What is added to series of unit deviation, so that some are far from zero."""
    return float(rng.choice([0.0, 2.0, 5.0]))


def _with_factor(rng: np.random.Generator, long: FloatArray, lead: int) -> FloatArray:
    own, length = _standard(long), long.shape[1] - lead
    series = np.empty((len(long), length))
    for i, row in enumerate(series):
        weight = 1.0 if i == 0 else rng.uniform(0.3, 0.99)
        lag = int(rng.integers(lead + 1)) if i and rng.random() < 0.4 else 0
        factor = float(rng.choice([1.0, -1.0], p=[0.8, 0.2])) * own[0, lead - lag : lead - lag + length]
        row[:] = weight * factor + np.sqrt(1 - weight**2) * own[i, lead:] + _level(rng)
    return series[rng.permutation(len(series))]


def _with_covariates(rng: np.random.Generator, long: FloatArray, lead: int) -> tuple[FloatArray, NDArray[np.bool_]]:
    """The target and then its covariates, and which of them are known."""
    length = long.shape[1] - lead
    effect = np.zeros(length)
    known = np.zeros(len(long), bool)
    series = long[:, lead:].copy()
    is_plain = rng.random() < 0.5
    for i in range(1, len(long)):
        covariate, response = _covariate(rng, long[i], is_plain=is_plain)
        known[i] = is_plain or rng.random() < 0.7
        lag = int(rng.integers(lead + 1)) if not is_plain and rng.random() < 0.3 else 0
        effect += rng.uniform(0.3, 1.0) * response[lead - lag : lead - lag + length]
        series[i] = covariate[lead:]
    weight = 1 - 10 ** rng.uniform(-3.0, np.log10(0.1 if is_plain else 0.5))
    series[0] = weight * _standard(effect) + np.sqrt(1 - weight**2) * _standard(long[0, lead:]) + _level(rng)
    return series, known


def _covariate(rng: np.random.Generator, values: FloatArray, *, is_plain: bool) -> tuple[FloatArray, FloatArray]:
    """A covariate, and what it adds to its target at the same step, both over the whole length."""
    length = len(values)
    kind = rng.choice(["event", "category", "series"], p=[0.25, 0.15, 0.6])
    sign = float(rng.choice([-1.0, 1.0]))
    if kind == "event":
        event = (rng.random(length) < np.exp(rng.uniform(np.log(0.01), np.log(0.3)))).astype(float)
        event[rng.integers(length)] = 1.0
        return event, sign * _standard(event)
    if kind == "category":
        run = int(rng.integers(1, max(2, length // 8)))
        code = np.repeat(rng.integers(int(rng.integers(2, 8)), size=length // run + 1), run)[:length]
        return code.astype(float), _standard(rng.standard_normal(8)[code])
    standard = _standard(values)
    shape = "line" if is_plain else rng.choice(["line", "saturating", "square"], p=[0.5, 0.3, 0.2])
    response = {"line": standard, "saturating": np.tanh(2 * standard), "square": standard**2}[shape]
    return values, sign * _standard(response)
