"""The mixture of synthetic series that forecasters are trained and calibrated on.

An equal mix of many generators is about as good as the best single one ("Mix, Don't Pick", arXiv 2606.09912), and nobody knows that one
before; but calendars are what forecasters are asked about most.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .calendar_series import calendar_series
from .disturbances import disturbed
from .processes import growth, intermittent_counts, ornstein_uhlenbeck, pulses, trend_times_season
from .synthesis import kernel_synth, mean_scaled, structural, ts_mixup

__all__ = ["SHARES", "synthetic_series"]

LONGEST_KERNEL = 512  # steps; the work of KernelSynth grows with their cube


def _kernel_synth(num_series: int, length: int, *, seed: np.random.SeedSequence) -> NDArray[np.float64]:
    """KernelSynth, four series of each kernel; longer ones are stretched, and their periods with them."""
    short = kernel_synth(num_series, min(length, LONGEST_KERNEL), seed=seed, samples_per_kernel=4)
    if length <= LONGEST_KERNEL:
        return short
    at = np.linspace(0, LONGEST_KERNEL - 1, length)
    return np.stack([np.interp(at, np.arange(LONGEST_KERNEL), row) for row in short])


SHARES: dict[Callable[..., NDArray[np.float64]], float] = {
    calendar_series: 0.42,
    structural: 0.19,
    trend_times_season: 0.10,
    growth: 0.08,
    _kernel_synth: 0.07,
    ornstein_uhlenbeck: 0.05,
    pulses: 0.05,
    intermittent_counts: 0.04,
}
MIXED_UP = 0.15  # of all series: TSMixup of the others


def synthetic_series(num_series: int, length: int, *, seed: int | list[int]) -> NDArray[np.float32]:
    """Synthetic series of every kind, each kind with its share on average, a seventh of all mixed of others (TSMixup).

    Returns:
        A float32 array of shape (num_series, length), mean-scaled, without missing values, in random order.

    Raises:
        ValueError: `num_series` is below 1, or `length` below 2.
    """
    if num_series < 1 or length < 2:
        raise ValueError(f"num_series must be at least 1 and length at least 2, found {num_series} and {length}.")
    root, *seeds = np.random.SeedSequence(seed).spawn(len(SHARES) + 2)
    rng = np.random.default_rng(root)
    num_mixed = int(rng.binomial(num_series - 1, MIXED_UP))
    counts = rng.multinomial(num_series - num_mixed, list(SHARES.values()))
    base = np.concatenate(
        [generate(int(count), length, seed=own) for generate, count, own in zip(SHARES, counts, seeds) if count]
    )
    base = disturbed(base, rng)
    mixed = ts_mixup(base, num_mixed, seed=seeds[-1])
    return rng.permutation(np.concatenate([mean_scaled(base), mixed])).astype(np.float32)
