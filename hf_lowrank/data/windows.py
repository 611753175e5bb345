"""Windows of series, a context and the target behind it, as datasets for transformers' Trainer, and a window held out of each.

Synthetic windows need no data; the others are drawn from series as `read_series` makes them. `hf_lowrank.data.tokens` makes of both
what a model reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from .disturbances import with_gaps
from .grouped_series import grouped_series
from .mixture import synthetic_series

__all__ = [
    "Counts",
    "GroupedWindows",
    "SeriesSupply",
    "SeriesWindows",
    "SyntheticWindows",
    "end_of",
    "foreseeable",
    "held_out_ends",
    "least_observed",
    "single_batch",
    "stack_pieces",
]

SHORTEST_CONTEXT, SHORTEST_HORIZON = 10, 6
FURTHEST = 20.0


def least_observed(patch_size: int) -> int:
    """The `min_observed` of windows for a model that reads patches of this size: half a patch.

    Such a model divides by the spread of the context. That of one value, or of two that happen to be near each other, is nearly zero: a
    single window of this kind then has a loss of millions, and is all that a step learns from.
    """
    return max(2, -(-patch_size // 2))


def foreseeable(context: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Windows without the values of the target that are `FURTHEST` deviations of the context and more away from its mean: NaN there.

    Of a model that divides by that deviation a few such values, behind a context that was nearly constant, would be all of the loss.
    Both are float32, (batch, length) and (batch, horizon).
    """
    values = context.double()
    mean = values.nanmean(dim=1, keepdim=True)
    deviation = (values - mean).square().nanmean(dim=1, keepdim=True).sqrt()
    is_far = (target - mean).abs() > FURTHEST * deviation + 1e-7 * mean.abs()  # what is constant has its rounding
    return {"context": context, "target": target.masked_fill(is_far, float("nan"))}


def stack_pieces(
    contexts: Sequence[NDArray[np.float64]], targets: Sequence[NDArray[np.float64]]
) -> dict[str, torch.Tensor]:
    """Windows of unlike lengths as `context` (batch, length) and `target` (batch, horizon), float64, as long as the longest.

    Contexts are padded on the left, targets on the right, with NaN. Both are sequences of 1-D arrays, one a window.
    """
    context = np.full((len(contexts), max(map(len, contexts))), np.nan)
    target = np.full((len(targets), max(map(len, targets))), np.nan)
    for row, (past, future) in enumerate(zip(contexts, targets)):
        context[row, context.shape[1] - len(past) :] = past
        target[row, : len(future)] = future
    return {"context": torch.from_numpy(context), "target": torch.from_numpy(target)}


class _WindowSupply(Dataset):
    """Batches of windows, made when they are asked for; item i depends on the arguments and i alone.

    A batch holds about `max_values` values of context and target, and at most `max_windows` windows.
    """

    def __init__(self, num_batches: int, *, seed: int, max_values: int, max_windows: int) -> None:
        self.num_batches = num_batches
        self.seed = seed
        self.max_values = max_values
        self.max_windows = max_windows

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_batches:
            raise IndexError(f"index must be in [0, {self.num_batches}), found {index}.")
        return self._batch(index)

    def _batch(self, index: int) -> dict[str, Any]:
        """The item of an index that is in range."""
        raise NotImplementedError

    def _num_windows(self, values_each: int) -> int:
        return min(self.max_windows, max(1, self.max_values // values_each))


class _SyntheticSupply(_WindowSupply):
    """Windows of series that are made for them: all of a batch have the same context length and horizon, so nothing is spent on padding.

    Three in ten contexts are uniformly between half of the longest and all of it, the others log-uniformly from `SHORTEST_CONTEXT` on, as
    long as series are in practice. Over the first `ramp` batches the longest grows from an eighth of `context_length` to all of it.
    """

    def __init__(self, context_length: int, num_batches: int, *, ramp: int, **limits: int) -> None:
        super().__init__(num_batches, **limits)
        self.context_length = context_length
        self.ramp = ramp

    def _length(self, rng: np.random.Generator, index: int) -> int:
        progress = min(1.0, (index + 1) / self.ramp) if self.ramp else 1.0
        longest = max(2, round(self.context_length * (1 + 7 * progress) / 8))
        if rng.random() < 0.3:
            return int(rng.integers(-(-longest // 2), longest + 1))
        return int(np.exp(rng.uniform(np.log(min(SHORTEST_CONTEXT, longest)), np.log(longest + 1))))


class SyntheticWindows(_SyntheticSupply):
    """A long supply of batches of synthetic windows; item i depends on the arguments and i alone.

    An item has a `context` (batch, length) and a `target` (batch, horizon), float32; in some contexts values are missing (NaN). Half of
    the horizons are the whole `prediction_length`, the others log-uniformly below. The batch holds about `max_values` values of
    context and target, and at most `max_windows` windows.

    Use it in order (`train_sampling_strategy="sequential"`), with a batch size of 1 and `data_collator=single_batch`: an item
    is a whole batch already.
    """

    def __init__(
        self,
        context_length: int,
        prediction_length: int,
        num_batches: int,
        *,
        seed: int,
        ramp: int = 0,
        max_values: int = 4096,
        max_windows: int = 64,
    ) -> None:
        super().__init__(
            context_length, num_batches, ramp=ramp, seed=seed, max_values=max_values, max_windows=max_windows
        )
        self.prediction_length = prediction_length

    def _batch(self, index: int) -> dict[str, torch.Tensor]:
        # numpy takes [s, 0] for [s]: no list of seeds ends in zero.
        rng = np.random.default_rng([self.seed, 0, index + 1])
        length, horizon = self._length(rng, index), self.prediction_length
        if rng.random() < 0.5:
            horizon = int(np.exp(rng.uniform(np.log(min(SHORTEST_HORIZON, horizon)), np.log(horizon + 1))))
        series = synthetic_series(
            self._num_windows(length + horizon), length + horizon, seed=[self.seed, 1, index + 1]
        )
        context, target = np.split(series, [length], axis=1)
        return {"context": _with_gaps(context, rng), "target": torch.from_numpy(target).contiguous()}


def _with_gaps(context: NDArray[np.float32], rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(with_gaps(context.astype(np.float64), rng)).float()


class GroupedWindows(_SyntheticSupply):
    """A long supply of batches of synthetic windows in groups, as a Chronos-2 reads them; item i depends on the arguments and i alone.

    An item has a `context` (batch, length), a `future_target` and `future_covariates` (batch, horizon), float32, NaN where a value is
    missing or not known; the `group_ids` (batch,) of `grouped_series`; and `num_output_patches`, an integer. Half of the horizons are
    the whole `prediction_length`, the others some patches of it.

    Raises:
        ValueError: `prediction_length` is no multiple of `patch_size`.
    """

    def __init__(
        self,
        context_length: int,
        prediction_length: int,
        num_batches: int,
        *,
        seed: int,
        patch_size: int = 16,
        ramp: int = 0,
        max_values: int = 16_384,
        max_windows: int = 128,
    ) -> None:
        super().__init__(
            context_length, num_batches, ramp=ramp, seed=seed, max_values=max_values, max_windows=max_windows
        )
        if prediction_length < patch_size or prediction_length % patch_size:
            raise ValueError(f"prediction_length must be a multiple of {patch_size}, found {prediction_length}.")
        self.num_patches = prediction_length // patch_size
        self.patch_size = patch_size

    def _batch(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 3, index + 1])  # the other supplies have 0 to 2
        length = self._length(rng, index)
        patches = self.num_patches if rng.random() < 0.5 else int(rng.integers(1, self.num_patches + 1))
        horizon = patches * self.patch_size
        groups = grouped_series(self._num_windows(length + horizon), length + horizon, seed=[self.seed, 4, index + 1])
        context, future = np.split(groups.values, [length], axis=1)
        return {
            "context": _with_gaps(context, rng),
            "future_target": torch.from_numpy(np.where(groups.is_target[:, None], future, np.float32("nan"))),
            "future_covariates": torch.from_numpy(np.where(groups.is_known[:, None], future, np.float32("nan"))),
            "group_ids": torch.from_numpy(groups.group_ids),
            "num_output_patches": patches,
        }


def end_of(num_steps: int, prediction_length: int) -> int:
    """Where the held-out end of a series of so many steps begins: it is the last horizon, or a third where that is shorter."""
    return num_steps - min(prediction_length, num_steps // 3)


def held_out_ends(
    series: list[NDArray[np.float64]], context_length: int, prediction_length: int, *, min_observed: int = 1
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Series up to where their held-out ends begin, and the contexts and targets of one held-out window each.

    The end is that of `end_of`. A series without an observed value in
    its target, or with less than `min_observed` in its context, has no window (see `SeriesWindows`).

    Raises:
        ValueError: None has one.
    """
    pasts, contexts, targets = [], [], []
    for values in series:
        origin = end_of(len(values), prediction_length)
        pasts.append(values[:origin])
        context, target = values[max(origin - context_length, 0) : origin], values[origin:]
        if len(Counts.of(values).origins(context_length, len(values) - origin, min_observed, at=origin)):
            contexts.append(context)
            targets.append(target)
    if not targets:
        enough = f"{min_observed} values that vary" if min_observed > 1 else "values"
        raise ValueError(
            f"series: none of {len(series)} has {enough} to train on and, in its last third or horizon, one to hold out."
        )
    return pasts, contexts, targets


class Counts(NamedTuple):
    """A series, and what is counted in it before each step and at its end, (len(values) + 1,).

    Attributes:
        observed: Values that are observed.
        changes: Observed values that differ from the observed one before.
        first: The first step from here on with an observed value; at the end len(values).
    """

    values: NDArray[np.float64]
    observed: NDArray[np.int64]
    changes: NDArray[np.int64]
    first: NDArray[np.int64]

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Counts:
        steps = np.flatnonzero(~np.isnan(values))
        is_change = np.zeros(len(values), dtype=np.int64)
        is_change[steps[1:]] = values[steps[1:]] != values[steps[:-1]]
        first = np.append(steps, len(values))[np.searchsorted(steps, np.arange(len(values) + 1))]
        return cls(values, _before(~np.isnan(values)), _before(is_change), first)

    @property
    def num_rows(self) -> int:
        """One series."""
        return 1

    @property
    def num_steps(self) -> int:
        """How long it is."""
        return len(self.values)

    def origins(self, length: int, horizon: int, min_observed: int, *, at: int | None = None) -> NDArray[np.int64]:
        """The steps, or of them the one `at`, that can be the first of a target behind a context of `length` steps, see `SeriesWindows`."""
        last = len(self.values)
        steps = np.arange(last + 1) if at is None else np.array([at])
        start, end = np.maximum(steps - length, 0), np.minimum(steps + horizon, last)
        is_window = self.observed[steps] - self.observed[start] >= min_observed
        is_window &= self.observed[end] > self.observed[steps]
        if min_observed > 1:
            known = self.changes[np.minimum(self.first[start] + 1, last)]
            is_window &= (self.changes[steps] > known) | (self.changes[end] <= known)
        return steps[is_window]


def _before(counted: NDArray[Any]) -> NDArray[np.int64]:
    return np.append(0, np.cumsum(counted))


class Lasting(Protocol):
    """What windows are drawn from: a series, or a group of them."""

    @property
    def num_rows(self) -> int:
        """How many series it has; all items of a supply have as many."""

    @property
    def num_steps(self) -> int:
        """How long it lasts."""

    def origins(self, length: int, horizon: int, min_observed: int) -> NDArray[np.int64]:
        """The steps that can be the first of a target, see `Counts`."""


Item = TypeVar("Item", bound=Lasting)


class SeriesSupply(_WindowSupply, Generic[Item]):
    """Windows of series or groups: for each, one of `items` is drawn uniformly, and a forecast origin uniformly among those it may have.

    The longest context of a batch is drawn log-uniformly from `min_length` to `context_length`; contexts and targets are shorter where an
    item begins late or ends early.

    Args:
        series: What items are made of; those without an origin are never drawn.

    Raises:
        ValueError: No window can be drawn.
    """

    none_of: ClassVar[str] = "none of {}"  # what is said of so many where no window can be drawn

    def __init__(  # noqa: PLR0913 a supply names all that its items depend on
        self,
        context_length: int,
        prediction_length: int,
        series: Sequence[Any],
        num_batches: int,
        *,
        seed: int,
        max_values: int = 4096,
        max_windows: int = 64,
        min_length: int = 64,
        min_observed: int = 1,
    ) -> None:
        super().__init__(num_batches, seed=seed, max_values=max_values, max_windows=max_windows)
        self.context_length, self.prediction_length = context_length, prediction_length
        self.min_length, self.min_observed = min(min_length, context_length), min_observed
        self.items = [item for item in map(self._item, series) if len(self._origins(item, self.min_length))]
        if not self.items:
            raise ValueError(
                f"series: {self.none_of.format(len(series))} has {min_observed + 1} observed values within "
                f"{self.min_length + prediction_length} steps, a context of {min_observed} and a target"
                f"{', and varies before it changes' if min_observed > 1 else ''}."
            )

    def _item(self, series: Any) -> Item:
        """A series or group, with what is counted in it."""
        raise NotImplementedError

    def _origins(self, item: Item, length: int) -> NDArray[np.int64]:
        return item.origins(length, self.prediction_length, self.min_observed)

    def _drawn(self, index: int) -> Iterator[tuple[Item, int, int]]:
        """The windows of a batch: of an item, where the context begins, and the target."""
        rng = np.random.default_rng([self.seed, 2, index + 1])  # SyntheticWindows has 0 and 1
        limits = np.array([self.min_length, self.context_length + 1])
        length = max(self.min_length, int(np.exp(rng.uniform(*np.log(limits)))))
        longest, num_rows = max(item.num_steps for item in self.items) - 1, self.items[0].num_rows
        count = self._num_windows(num_rows * (min(length, longest) + min(self.prediction_length, longest)))
        for i in rng.integers(len(self.items), size=min(count, max(1, self.max_windows // num_rows))):
            origin = int(rng.choice(self._origins(self.items[i], length)))
            yield self.items[i], max(origin - length, 0), origin


class SeriesWindows(SeriesSupply[Counts]):
    """A supply of batches of windows of given series; item i depends on the arguments and i alone.

    An item has lists of 1-D arrays, the `contexts` and `targets` of its windows. For each window a series is drawn uniformly, then
    a forecast origin uniformly among those with enough observed values. The longest context of a batch is
    drawn log-uniformly from `min_length` to `context_length`; a target has `prediction_length` values. Both are shorter where the
    series begins late or ends early. The batch holds at most about `max_values` values of context and target, and at most
    `max_windows` windows.

    Args:
        series: 1-D arrays, NaN is missing; `read_series` makes them of anything. Those without enough observed values near
            enough to each other to be context and target of one window are never drawn.
        min_observed: Values that must be observed in a context, beside one in the target. Of a model that divides by the spread of the
            context `WindowCollator.min_observed`: where it is more than 1, a context of one value throughout is drawn only if
            the target has that value too.

    Raises:
        ValueError: No window can be drawn.
    """

    def _item(self, series: NDArray[np.float64]) -> Counts:
        return Counts.of(series)

    def _batch(self, index: int) -> dict[str, list[NDArray[np.float64]]]:
        contexts, targets = [], []
        for counts, start, origin in self._drawn(index):
            contexts.append(counts.values[start:origin])
            targets.append(counts.values[origin : origin + self.prediction_length])
        return {"contexts": contexts, "targets": targets}


def single_batch(features: list[dict[str, Any]]) -> dict[str, Any]:
    """The collator for datasets whose items are whole batches."""
    (batch,) = features
    return batch
