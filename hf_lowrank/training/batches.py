"""What a run is trained and scored on: batches of synthetic series or of the user's, and others that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from chronos import ChronosConfig
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from ..data.group_windows import GroupedSeriesWindows, held_out_group_ends, stack_groups
from ..data.groups import GroupedSeries
from ..data.series import read_series
from ..data.tokens import SyntheticBatches, WindowBatches, WindowCollator
from ..data.windows import GroupedWindows, SeriesWindows, SyntheticWindows, foreseeable, held_out_ends
from .runs import HELD_OUT_SEED

__all__ = ["RunData", "run_data"]

# Values that count as one token, and windows in a batch of 4,096 tokens or less at most. The token of a Chronos-Bolt or Chronos-2 is a
# patch of 16 values; four times the values are a quarter of the tokens.
TOKEN_LIMITS, PATCH_LIMITS, USUAL_TOKENS = (1, 64), (4, 128), 4096


@dataclass(frozen=True)
class RunData:
    """Batches as the model reads them; an item of each is a whole batch.

    Attributes:
        batches: To train on, in their order.
        held_out: To score on. Synthetic batches are made anew whenever they are asked for.
        series: The user's, and of groups the covariates behind the targets of each; None where they are synthetic.
        num_held_out_windows: In all batches of `held_out`, where the series are the user's.
    """

    batches: Dataset
    held_out: WindowBatches | GroupedWindows | list[dict[str, Any]]
    series: list[NDArray[np.float64]] | None = None
    num_held_out_windows: int = 0

    @property
    def held_out_windows(self) -> Sequence[dict[str, Any]] | Dataset:
        """What the batches of `held_out` were made of: `context` and `target`, or lists `contexts` and `targets`; empty of groups."""
        return self.held_out.windows if isinstance(self.held_out, WindowBatches) else []


@dataclass(frozen=True)
class _Limits:
    """What a batch of a Chronos model of this configuration may hold."""

    lengths: tuple[int, int]  # of the longest context and target
    max_values: int
    max_windows: int

    @classmethod
    def of(cls, config: PreTrainedConfig, batch_tokens: int) -> _Limits:
        """Those of batches of about so many tokens."""
        collator = WindowCollator(config)
        values_each, max_windows = TOKEN_LIMITS if collator.has_tokens else PATCH_LIMITS
        larger = max(1, batch_tokens // USUAL_TOKENS)
        return cls(collator.lengths, values_each * batch_tokens, max_windows * larger)


def run_data(
    config: PreTrainedConfig,
    series: Any,
    num_batches: int,
    *,
    evaluation_batches: int,
    seed: int,
    batch_tokens: int,
    ramp: float = 0.0,
    thin_out: bool = True,
) -> RunData:
    """The batches of a run.

    Args:
        config: That of a Chronos model.
        series: `"synthetic"`, or what `read_series` takes, or a `GroupedSeries`: series of which the last horizon (a third, where that is
            shorter) is held out. To other models than a Chronos-2 the targets of groups are plain series.
        num_batches: To train on.
        evaluation_batches: To score on, at most.
        seed: Of the training batches.
        batch_tokens: Tokens in a batch, about.
        ramp: The share of the batches in which the longest context grows to its full length, of synthetic series.
        thin_out: Which of too many held-out windows to take: evenly spaced ones, or the first.

    Raises:
        ValueError: `series` is no series, or no window can be drawn or held out.
        OSError: A file of series cannot be read.
    """
    limits = _Limits.of(config, batch_tokens)
    if isinstance(series, str) and series == "synthetic":
        return RunData(
            _synthetic(config, limits, num_batches, seed, int(ramp * num_batches)),
            _synthetic(config, limits, evaluation_batches, HELD_OUT_SEED),
        )
    collator = WindowCollator(config)
    if isinstance(series, GroupedSeries):
        if collator.has_groups:
            return _grouped(config, limits, series, num_batches, evaluation_batches, seed, thin_out=thin_out)
        series = series.separate("Chronos-T5" if collator.has_tokens else "Chronos-Bolt")
    arrays = read_series(series)
    pasts, contexts, targets = held_out_ends(arrays, *limits.lengths, min_observed=collator.min_observed)
    windows = SeriesWindows(
        *limits.lengths,
        pasts,
        num_batches,
        seed=seed,
        max_values=limits.max_values,
        max_windows=limits.max_windows,
        min_observed=collator.min_observed,
    )
    each = max(1, limits.max_values // (max(map(len, contexts)) + max(map(len, targets))))
    batches = _batches(len(targets), each, evaluation_batches, thin_out=thin_out)
    held_out = WindowBatches(
        [{"contexts": [contexts[i] for i in rows], "targets": [targets[i] for i in rows]} for rows in batches],
        collator.batch,
    )
    return RunData(WindowBatches(windows, collator.batch), held_out, arrays, sum(map(len, batches)))


def _batches(num_windows: int, each: int, most: int, *, thin_out: bool) -> list[NDArray[np.int64]]:
    """Which held-out windows are in each batch, of at most so many."""
    count = min(num_windows, each * most)
    kept = np.linspace(0, num_windows - 1, count).round().astype(int) if thin_out else np.arange(count)
    return [kept[first : first + each] for first in range(0, count, each)]


def _grouped(
    config: PreTrainedConfig,
    limits: _Limits,
    series: GroupedSeries,
    num_batches: int,
    evaluation_batches: int,
    seed: int,
    *,
    thin_out: bool,
) -> RunData:
    """The batches of a Chronos-2 on groups of the user's."""
    patch, least = config.chronos_config["output_patch_size"], WindowCollator(config).min_observed
    pasts, ends = held_out_group_ends(series.groups, *limits.lengths, min_observed=least)
    windows = GroupedSeriesWindows(
        *limits.lengths,
        pasts,
        num_batches,
        seed=seed,
        patch_size=patch,
        max_values=limits.max_values,
        max_windows=limits.max_windows,
        min_observed=least,
    )
    each = max(1, limits.max_values // max(window.context.size + window.future.size for window in ends))
    batches = _batches(len(ends), each, evaluation_batches, thin_out=thin_out)
    held_out = [stack_groups([ends[i] for i in rows], patch) for rows in batches]
    rows_of_all = [row for group in series.groups for row in group.values]
    return RunData(windows, held_out, rows_of_all, sum(map(len, batches)))


def _synthetic(
    config: PreTrainedConfig, limits: _Limits, num_batches: int, seed: int, ramp: int = 0
) -> WindowBatches | GroupedWindows:
    shared: dict[str, Any] = {"seed": seed, "ramp": ramp, "max_windows": limits.max_windows}
    collator = WindowCollator(config)
    if collator.has_groups:
        patch = config.chronos_config["output_patch_size"]
        return GroupedWindows(*limits.lengths, num_batches, patch_size=patch, max_values=limits.max_values, **shared)
    if collator.has_tokens:
        chronos_config = ChronosConfig(**config.chronos_config)
        return SyntheticBatches(chronos_config, num_batches, max_tokens=limits.max_values, **shared)
    windows = SyntheticWindows(*limits.lengths, num_batches, max_values=limits.max_values, **shared)
    return WindowBatches(windows, foreseeable)
