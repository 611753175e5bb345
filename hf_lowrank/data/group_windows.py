"""Windows of the user's groups of series, as a Chronos-2 reads them, and one held out of each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .groups import SeriesGroup
from .windows import Counts, SeriesSupply, end_of

__all__ = ["GroupWindow", "GroupedSeriesWindows", "held_out_group_ends", "stack_groups"]


class GroupWindow(NamedTuple):
    """A window of a group, with categories as numbers.

    Attributes:
        context: float64 (rows, length), NaN where missing.
        future: What follows, float64 (rows, horizon).
        is_target: bool (rows,): a forecast of it counts. A target with too little in its context is none.
        is_known: bool (rows,): a covariate whose future is known.
    """

    context: NDArray[np.float64]
    future: NDArray[np.float64]
    is_target: NDArray[np.bool_]
    is_known: NDArray[np.bool_]


class _CountedGroup(NamedTuple):
    """A group, and what is counted in each of its targets."""

    group: SeriesGroup
    targets: tuple[Counts, ...]

    @classmethod
    def of(cls, group: SeriesGroup) -> _CountedGroup:
        return cls(group, tuple(map(Counts.of, group.targets)))

    @property
    def num_rows(self) -> int:
        return len(self.group.values)

    @property
    def num_steps(self) -> int:
        return self.group.num_steps

    def origins(self, length: int, horizon: int, min_observed: int) -> NDArray[np.int64]:
        """The steps that can be the first of the target of some row, see `SeriesWindows`."""
        return np.unique(np.concatenate([counts.origins(length, horizon, min_observed) for counts in self.targets]))

    def window(self, start: int, origin: int, horizon: int, min_observed: int) -> GroupWindow:
        """The window of a context from `start` on."""
        group, length = self.group, origin - start
        values = group.window(start, origin, min(origin + horizon, group.num_steps))
        is_target = np.zeros(len(values), bool)
        for row, counts in enumerate(self.targets):
            is_target[row] = len(counts.origins(length, horizon, min_observed, at=origin)) > 0
        return GroupWindow(values[:, :length], values[:, length:], is_target, group.is_known)


def stack_groups(windows: Sequence[GroupWindow], patch_size: int) -> dict[str, Any]:
    """Windows of groups as one batch of a Chronos-2, as long as the longest.

    Returns:
        `context` (batch, length), `future_target` and `future_covariates` (batch, horizon), float32 and NaN where a value is missing, no
        target or not known, padded on the left and on the right; `group_ids` (batch,), int64; and `num_output_patches`, an integer.
    """
    rows, length = sum(len(window.context) for window in windows), max(window.context.shape[1] for window in windows)
    patches = -(-max(window.future.shape[1] for window in windows) // patch_size)
    context = np.full((rows, length), np.nan, np.float32)
    target, known = np.full((2, rows, patches * patch_size), np.nan, np.float32)
    first = 0
    for window in windows:
        own = slice(first, first + len(window.context))
        horizon = window.future.shape[1]
        context[own, length - window.context.shape[1] :] = window.context
        target[own, :horizon] = np.where(window.is_target[:, None], window.future, np.nan)
        known[own, :horizon] = np.where(window.is_known[:, None], window.future, np.nan)
        first = own.stop
    ids = np.repeat(np.arange(len(windows)), [len(window.context) for window in windows])
    return {
        "context": torch.from_numpy(context),
        "future_target": torch.from_numpy(target),
        "future_covariates": torch.from_numpy(known),
        "group_ids": torch.from_numpy(ids),
        "num_output_patches": patches,
    }


class GroupedSeriesWindows(SeriesSupply[_CountedGroup]):
    """A supply of batches of windows of given groups, as a Chronos-2 reads them; item i depends on the arguments and i alone.

    An item is what `stack_groups` makes of windows that are drawn as those of `SeriesWindows`: a group in the place of a series, and an
    origin at which some target has enough observed values. A row has a future target where it is such a target, and future covariates
    where it is known. Groups are whole; a batch holds about `max_values` values of context and target, and at most `max_windows` rows,
    but always one group.

    Args:
        groups: All with the same columns; those of a `GroupedSeries`.
        patch_size: Of the model's output: horizons are padded to whole patches.
        min_observed: As in `SeriesWindows`.

    Raises:
        ValueError: No window can be drawn.
    """

    none_of = "no target of {} groups"

    def __init__(
        self,
        context_length: int,
        prediction_length: int,
        groups: Sequence[SeriesGroup],
        num_batches: int,
        *,
        patch_size: int = 16,
        max_values: int = 16_384,
        max_windows: int = 128,
        **more: int,
    ) -> None:
        limits = {"max_values": max_values, "max_windows": max_windows}
        super().__init__(context_length, prediction_length, groups, num_batches, **limits, **more)
        self.patch_size = patch_size

    def _item(self, series: SeriesGroup) -> _CountedGroup:
        return _CountedGroup.of(series)

    def _batch(self, index: int) -> dict[str, Any]:
        windows = [
            counted.window(start, origin, self.prediction_length, self.min_observed)
            for counted, start, origin in self._drawn(index)
        ]
        return stack_groups(windows, self.patch_size)


def held_out_group_ends(
    groups: Sequence[SeriesGroup], context_length: int, prediction_length: int, *, min_observed: int = 1
) -> tuple[list[SeriesGroup], list[GroupWindow]]:
    """Groups up to where their held-out ends begin, and one held-out window each, as `held_out_ends` has them of series.

    A group has no window where no target has an observed value in its end and enough of them in its context.

    Raises:
        ValueError: None has one.
    """
    pasts, windows = [], []
    for group in groups:
        origin = end_of(group.num_steps, prediction_length)
        pasts.append(group.up_to(origin))
        start, horizon = max(origin - context_length, 0), group.num_steps - origin
        window = _CountedGroup.of(group).window(start, origin, horizon, min_observed)
        if window.is_target.any():
            windows.append(window)
    if not windows:
        raise ValueError(
            f"series: none of {len(groups)} groups has a target with {min_observed} values to train on and, in its last third or "
            "horizon, one to hold out."
        )
    return pasts, windows
