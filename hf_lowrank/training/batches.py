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
        series: The user's; None where they are synthetic.
        num_held_out_windows: In all batches of `held_out`, where the series are the user's.
    """

    batches: Dataset
    held_out: WindowBatches | GroupedWindows
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
        series: `"synthetic"`, or what `read_series` takes: series of which the last horizon (a third, where that is shorter) is
            held out.
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
    arrays = read_series(series)
    collator = WindowCollator(config)
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
    count = min(len(targets), each * evaluation_batches)
    kept = np.linspace(0, len(targets) - 1, count).round().astype(int) if thin_out else np.arange(count)
    held_out = [
        {"contexts": [contexts[i] for i in rows], "targets": [targets[i] for i in rows]}
        for rows in (kept[first : first + each] for first in range(0, count, each))
    ]
    return RunData(WindowBatches(windows, collator.batch), WindowBatches(held_out, collator.batch), arrays, count)


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
