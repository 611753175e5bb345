"""What each series adds to the scores of a task, so that series can be resampled.

A score is f(sum of numerators / sum of denominators), summed over the series, with f the root for RMSSE and the identity otherwise; the
score of a task is the mean of those of its windows. The denominator of WQL is `ABSOLUTE`, the sum of what came without its sign,
that of the others `STEPS`, the number of steps that came and have a scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.pipelines import QUANTILE_LEVELS

__all__ = ["ABSOLUTE", "MAX_GROUPS", "STEPS", "BySeries", "num_groups", "resampled_scores", "series_parts"]

ABSOLUTE, STEPS = "absolute", "steps"
DENOMINATORS = {"WQL": ABSOLUTE, "MASE": STEPS, "SQL": STEPS, "RMSSE": STEPS}
# Of more series the sums over so many random groups are kept: resampling groups of the same size has the expected variance of
# resampling series, and its estimate from 100 of them is within 14 % (one standard deviation).
MAX_GROUPS = 100

BySeries: TypeAlias = Mapping[
    str, Sequence[Sequence[float]]
]  # numerators by metric, and denominators; each by window and series


def series_parts(
    *,
    targets: NDArray[np.floating],
    contexts: Sequence[NDArray[np.floating]],
    quantiles: NDArray[np.floating],
    mean: NDArray[np.floating] | None = None,
    seasonality: int,
    places: Sequence[int] | None = None,
    num_places: int | None = None,
) -> dict[str, list[float]]:
    """Numerators and denominators of fev's metrics of one window, by series, or by random group of more than `MAX_GROUPS` series.

    Args:
        targets: What came, (N, H); NaN does not count.
        contexts: What came before, N series of any length.
        quantiles: (N, H, Q), at the Q `QUANTILE_LEVELS`.
        mean: (N, H), which RMSSE is of; without it that is left out.
        seasonality: Steps in a season, for the scales.
        places, num_places: Where each series is among all of the task, of which some may have no such window; by default these are all.

    Returns:
        A number a series (or group) for each metric, for `ABSOLUTE` and for `STEPS`; the groups depend on their number alone.
    """
    levels = np.array(QUANTILE_LEVELS)
    actual = targets[:, :, None]
    losses = (2 * np.abs((actual - quantiles) * ((actual <= quantiles) - levels))).mean(axis=-1)
    errors = np.abs(targets - quantiles[:, :, QUANTILE_LEVELS.index(0.5)])
    seasonal = [context[seasonality:] - context[:-seasonality] for context in contexts]
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # a past without two seasons has no scale
        scale = np.array([np.nanmean(np.abs(steps)) for steps in seasonal])[:, None]
        squared_scale = np.array([np.nanmean(steps**2) for steps in seasonal])[:, None]
        parts = {"WQL": losses, "MASE": errors / scale, "SQL": losses / scale}
        if mean is not None:
            parts["RMSSE"] = (targets - mean) ** 2 / squared_scale
    parts |= {ABSOLUTE: np.abs(targets), STEPS: np.isfinite(parts["MASE"])}
    found = {}
    for name, part in parts.items():
        sums = np.zeros(len(targets) if num_places is None else num_places)
        sums[slice(None) if places is None else np.asarray(places)] = np.where(np.isfinite(part), part, 0).sum(axis=1)
        found[name] = _in_groups(sums)
    return found


def _in_groups(values: NDArray[np.floating]) -> list[float]:
    """The values themselves, or the sums over `MAX_GROUPS` random groups of them."""
    if len(values) > MAX_GROUPS:
        groups = np.random.default_rng(0).permutation(len(values)) % MAX_GROUPS
        return np.bincount(groups, weights=values).tolist()
    return [float(value) for value in values]


def num_groups(by_series: BySeries | None) -> int:
    """How many series, or groups of them, there are to draw from."""
    return len(by_series[STEPS][0]) if by_series else 0


def resampled_scores(by_series: BySeries, *, num_bootstrap: int, seed: int) -> dict[str, NDArray[np.floating]]:
    """The scores of one task, and of resamples of its series.

    Args:
        by_series: Of `series_parts`, by window; a series is drawn with all of its windows.
        num_bootstrap: Resamples.
        seed: Two models with the same seed and number of series are resampled alike.

    Returns:
        1 + `num_bootstrap` numbers for each metric, the first one of all series, each once; NaN where a score is undefined.
    """
    parts = {name: np.array(windows) for name, windows in by_series.items()}  # each (windows, series)
    num_series = num_groups(by_series)
    draws = np.random.default_rng(seed).multinomial(
        num_series, np.full(num_series, 1 / num_series), size=num_bootstrap
    )
    counts = np.concatenate([np.ones((1, num_series)), draws])
    sums = {name: counts @ part.T for name, part in parts.items()}  # each (1 + num_bootstrap, windows)
    scores = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for metric, denominator in DENOMINATORS.items():
            if metric in sums:
                means = sums[metric] / sums[denominator]
                scores[metric] = (np.sqrt(means) if metric == "RMSSE" else means).mean(axis=1)
    return scores
