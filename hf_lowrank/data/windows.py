"""Datasets for transformers' Trainer: windows of series, and token batches of them for a Chronos-T5.

The synthetic ones need no data; the others draw their windows from the user's own series, which `read_series` takes in
whatever shape they come.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from chronos import ChronosConfig
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from ..evaluation.sources import read_frame, series_of_frame
from .synthesis import synthetic_series

__all__ = [
    "SeriesBatches",
    "SeriesWindows",
    "SyntheticBatches",
    "SyntheticWindows",
    "WindowCollator",
    "held_out_ends",
    "read_series",
    "single_batch",
    "stack_pieces",
    "tokenize_pieces",
    "tokenize_windows",
]

IGNORED_LABEL = -100


def tokenize_windows(
    chronos_config: ChronosConfig, context: torch.Tensor, target: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Turn windows of series into a Chronos-T5 training batch.

    Args:
        chronos_config: The tokenizer's settings. Both windows are scaled by the context's mean absolute value.
        context: Past values, float of shape (batch, context_length); NaN is missing or padding.
        target: Future values, float of shape (batch, chronos_config.prediction_length); NaN is missing.

    Returns:
        `input_ids` and `attention_mask` of shape (batch, context_length + 1) and `labels` of shape
        (batch, prediction_length + 1), int64; the last token is EOS, missing targets have the label -100.
    """
    tokenizer = chronos_config.create_tokenizer()
    input_ids, attention_mask, scale = tokenizer.context_input_transform(context)
    labels, observed = tokenizer.label_input_transform(target, scale)
    labels[~observed] = IGNORED_LABEL
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "labels": labels}


def stack_pieces(
    contexts: Sequence[NDArray[np.float64]], targets: Sequence[NDArray[np.float64]]
) -> dict[str, torch.Tensor]:
    """Windows of unlike lengths as `context` (batch, length) and `target` (batch, horizon), float64, as long as the longest.

    Contexts are padded on the left, targets on the right, with NaN.
    """
    context = np.full((len(contexts), max(map(len, contexts))), np.nan)
    target = np.full((len(targets), max(map(len, targets))), np.nan)
    for row, (past, future) in enumerate(zip(contexts, targets)):
        context[row, context.shape[1] - len(past) :] = past
        target[row, : len(future)] = future
    return {"context": torch.from_numpy(context), "target": torch.from_numpy(target)}


def tokenize_pieces(
    chronos_config: ChronosConfig, contexts: Sequence[NDArray[np.float64]], targets: Sequence[NDArray[np.float64]]
) -> dict[str, torch.Tensor]:
    """Turn windows of unlike lengths into a Chronos-T5 training batch, as long as the longest of them.

    Contexts are padded on the left and masked; targets, of at most the model's horizon, are padded on the right with
    the label -100. A target that is shorter than the model's horizon has no EOS: its series did not end there.
    """
    window = stack_pieces(contexts, targets)
    resized = replace(chronos_config, prediction_length=window["target"].shape[1])
    batch = tokenize_windows(resized, **window)
    if chronos_config.use_eos_token:
        complete = torch.tensor([len(future) == chronos_config.prediction_length for future in targets])
        batch["labels"][~complete, -1] = IGNORED_LABEL
        if not complete.any():
            batch["labels"] = batch["labels"][:, :-1].contiguous()
    return batch


class SyntheticWindows(Dataset):
    """A long supply of batches of synthetic windows; item i depends on the arguments and i alone.

    An item has a `context` (batch, length) and a `target` (batch, horizon), float32. All windows of a batch have the same context
    length and horizon, drawn log-uniformly, so nothing is spent on padding. The longest of both grow with i from
    `first_lengths` to `context_length` and `prediction_length` over the first `ramp` batches: cross-attention in T5 knows no positions,
    and a model finds out where the end of a context is in short ones first. The batch holds about `max_values` values of
    context and target, and at most `max_windows` windows. In some batches values of the context are missing (NaN).

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
        first_lengths: tuple[int, int] = (24, 12),
        min_lengths: tuple[int, int] = (10, 6),
        max_values: int = 4096,
        max_windows: int = 64,
    ) -> None:
        self.limits = context_length, prediction_length
        self.num_batches = num_batches
        self.seed = seed
        self.ramp = ramp
        self.first_lengths = first_lengths
        self.min_lengths = min_lengths
        self.max_values = max_values
        self.max_windows = max_windows

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_batches:
            raise IndexError(f"index must be in [0, {self.num_batches}), found {index}.")
        # numpy takes [s, 0] for [s]: no list of seeds ends in zero.
        rng = np.random.default_rng([self.seed, 0, index + 1])
        limits = np.array(self.limits) + 1
        progress = min(1.0, index / self.ramp) if self.ramp else 1.0
        longest = progress * np.log(limits) + (1 - progress) * np.log(np.minimum(self.first_lengths, limits))
        shortest = np.log(np.minimum(self.min_lengths, limits - 1))
        length, horizon = np.exp(rng.uniform(shortest, longest)).astype(int)
        count = min(self.max_windows, max(1, self.max_values // int(length + horizon)))
        series = synthetic_series(count, int(length + horizon), seed=[self.seed, 1, index + 1])
        context, target = torch.from_numpy(series).split([int(length), int(horizon)], dim=1)
        if rng.random() < 0.1:
            missing = torch.from_numpy(rng.random(context.shape) < rng.uniform(0, 0.3))
            missing[:, -1] = False
            context = context.masked_fill(missing, float("nan"))
        return {"context": context.contiguous(), "target": target.contiguous()}


class SyntheticBatches(Dataset):
    """`SyntheticWindows` as tokens of a Chronos-T5. A target that is shorter than the model's horizon has no EOS.

    Takes the arguments of `SyntheticWindows`; one value is one token.
    """

    def __init__(
        self, chronos_config: ChronosConfig, num_batches: int, *, max_tokens: int = 4096, **more: Any
    ) -> None:
        self.chronos_config = chronos_config
        self.windows = SyntheticWindows(
            chronos_config.context_length,
            chronos_config.prediction_length,
            num_batches,
            max_values=max_tokens,
            **more,
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index]
        horizon = window["target"].shape[1]
        batch = tokenize_windows(replace(self.chronos_config, prediction_length=horizon), **window)
        if horizon < self.chronos_config.prediction_length:
            batch["labels"] = batch["labels"][:, :-1].contiguous()
        return batch


def read_series(data: Any) -> list[NDArray[np.float64]]:
    """Time series in any of the usual shapes, as a list of 1-D float64 arrays in which NaN is missing.

    Args:
        data: One of

            - a list or tuple of 1-D arrays, tensors or lists of numbers (None and NaN are missing);
            - one array or tensor of shape (time,) or (batch, time);
            - a `datasets.Dataset`, or any other rows that are dictionaries, with a 1-D `target` in every row;
            - a DataFrame in long format, with the columns item_id, timestamp and target, one row a value;
            - the path of a CSV or parquet file in long format.

            In long format rows may come in any order and time stamps need not be regular: values are put in the order of
            time and nothing is put between them.

    Raises:
        ValueError: It is none of these, a value is infinite (in float32, which models compute in), or nothing is observed.
        FileNotFoundError: There is no such file.

    Series without a single observed value are left out, with a warning.
    """
    series = [_one_series(item, i) for i, item in enumerate(_items(data))]
    if not series:
        raise ValueError("series is empty: give at least one time series.")
    observed = [values for values in series if not np.isnan(values).all()]
    if not observed:
        raise ValueError(f"series holds no observed value: all values of all {len(series)} series are missing.")
    if dropped := len(series) - len(observed):
        warnings.warn(
            f"series: {dropped} of {len(series)} series have no observed value and are left out.", stacklevel=2
        )
    return observed


def _items(data: Any) -> Iterable[Any]:
    """The series in `data`, one by one, as they come."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        return [
            values.to_numpy() for values in series_of_frame(read_frame(path), f"series: file {path.name!r}").values()
        ]
    if isinstance(data, pd.DataFrame):
        return [values.to_numpy() for values in series_of_frame(data, "series: the DataFrame").values()]
    if isinstance(data, (torch.Tensor, np.ndarray, pd.Series)) and data.dtype != object:
        if data.ndim not in (1, 2):
            raise ValueError(f"series must have shape (time,) or (batch, time), found {tuple(data.shape)}.")
        return data if data.ndim == 2 else [data]
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            "series must be a list of 1-D arrays, an array or tensor, rows with a target, a DataFrame, or the path of "
            f"a CSV or parquet file; found a {type(data).__name__}."
        )
    return data


def _one_series(item: Any, position: int) -> NDArray[np.float64]:
    what = f"series: item {position}"
    if isinstance(item, Mapping):
        if "target" not in item:
            raise ValueError(f"{what} has no target; found {', '.join(map(str, item))}.")
        item = item["target"]
    try:
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().double().numpy()  # numpy has no bfloat16
        elif isinstance(item, pd.Series):
            item = item.to_numpy(dtype=np.float64, na_value=np.nan)
        values = np.asarray(item, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a 1-D array of numbers ({error}).") from None
    if values.ndim != 1:
        raise ValueError(f"{what} must have one dimension, time; found shape {values.shape}.")
    with np.errstate(over="ignore"):
        infinite = np.isinf(values.astype(np.float32))
    if infinite.any():
        raise ValueError(
            f"{what} holds the value {values[infinite][0]} at step {infinite.argmax()}, infinite in float32; "
            "mark missing values with NaN."
        )
    return values


def held_out_ends(
    series: list[NDArray[np.float64]], context_length: int, prediction_length: int
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Series up to where their held-out ends begin, and the contexts and targets of one held-out window each.

    The end is the last horizon, or a third of the series where that is shorter. A series without an observed value in
    both its context and its target has no window.

    Raises:
        ValueError: None has one.
    """
    pasts, contexts, targets = [], [], []
    for values in series:
        origin = len(values) - min(prediction_length, len(values) // 3)
        pasts.append(values[:origin])
        context, target = values[max(origin - context_length, 0) : origin], values[origin:]
        if not np.isnan(context).all() and not np.isnan(target).all():
            contexts.append(context)
            targets.append(target)
    if not targets:
        raise ValueError(
            f"series: none of {len(series)} has values to train on and, in its last third or horizon, one to hold out."
        )
    return pasts, contexts, targets


class SeriesWindows(Dataset):
    """A supply of batches of windows of given series; item i depends on the arguments and i alone.

    An item has lists of 1-D arrays, the `contexts` and `targets` of its windows. For each window a series is drawn uniformly, then
    a forecast origin uniformly among those with an observed value in both context and target. The longest context of a batch is
    drawn log-uniformly from `min_length` to `context_length`; a target has `prediction_length` values. Both are shorter where the
    series begins late or ends early. The batch holds at most about `max_values` values of context and target, and at most
    `max_windows` windows.

    Args:
        series: 1-D arrays, NaN is missing; `read_series` makes them of anything. Those without two observed values near
            enough to each other to be context and target of one window are never drawn.

    Raises:
        ValueError: No window can be drawn.
    """

    def __init__(
        self,
        context_length: int,
        prediction_length: int,
        series: list[NDArray[np.float64]],
        num_batches: int,
        *,
        seed: int,
        max_values: int = 4096,
        max_windows: int = 64,
        min_length: int = 64,
    ) -> None:
        self.context_length, self.prediction_length = context_length, prediction_length
        self.num_batches = num_batches
        self.seed = seed
        self.max_values = max_values
        self.max_windows = max_windows
        self.min_length = min(min_length, context_length)
        # Beside each series, how many of its values before every step are observed.
        counted = [(values, np.append(0, np.cumsum(~np.isnan(values)))) for values in series]
        self.series = [pair for pair in counted if len(self._origins(pair[1], self.min_length))]
        if not self.series:
            raise ValueError(
                f"series: none of {len(series)} has two observed values within "
                f"{self.min_length + prediction_length} steps, a context and a target."
            )

    def __len__(self) -> int:
        return self.num_batches

    def _origins(self, observed: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The steps that can be the first of a target: a value is observed in the `length` steps before, and in the horizon."""
        last = len(observed) - 1
        steps = np.arange(last + 1)
        before = observed - observed[np.maximum(steps - length, 0)]
        after = observed[np.minimum(steps + self.prediction_length, last)] - observed
        return np.flatnonzero((before > 0) & (after > 0))

    def __getitem__(self, index: int) -> dict[str, list[NDArray[np.float64]]]:
        if not 0 <= index < self.num_batches:
            raise IndexError(f"index must be in [0, {self.num_batches}), found {index}.")
        rng = np.random.default_rng([self.seed, 2, index + 1])  # SyntheticWindows has 0 and 1
        horizon = self.prediction_length
        limits = np.array([self.min_length, self.context_length + 1])
        length = max(self.min_length, int(np.exp(rng.uniform(*np.log(limits)))))
        longest = max(len(values) for values, _ in self.series) - 1
        values_each = min(length, longest) + min(horizon, longest)
        count = min(self.max_windows, max(1, self.max_values // values_each))
        contexts, targets = [], []
        for i in rng.integers(len(self.series), size=count):
            values, observed = self.series[i]
            origin = rng.choice(self._origins(observed, length))
            contexts.append(values[max(origin - length, 0) : origin])
            targets.append(values[origin : origin + horizon])
        return {"contexts": contexts, "targets": targets}


class SeriesBatches(Dataset):
    """`SeriesWindows` as tokens of a Chronos-T5: contexts padded on the left and masked, targets padded with the label -100.

    As in `SyntheticBatches`, a target that is shorter than the model's horizon has no EOS: the series did not end there. Takes the
    arguments of `SeriesWindows`; one value is one token.
    """

    def __init__(
        self,
        chronos_config: ChronosConfig,
        series: list[NDArray[np.float64]],
        num_batches: int,
        *,
        max_tokens: int = 4096,
        **more: Any,
    ) -> None:
        self.chronos_config = chronos_config
        self.windows = SeriesWindows(
            chronos_config.context_length,
            chronos_config.prediction_length,
            series,
            num_batches,
            max_values=max_tokens,
            **more,
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return tokenize_pieces(self.chronos_config, *self.windows[index].values())


def single_batch(features: list[dict[str, Any]]) -> dict[str, Any]:
    """The collator for datasets whose items are whole batches."""
    (batch,) = features
    return batch


@dataclass(frozen=True)
class WindowCollator:
    """The collator that makes of windows what a Chronos-T5 or a Chronos-Bolt trains on.

    A window is an item of `SeriesWindows` with `max_windows=1`, so that the Trainer's batch size counts windows, or any dictionary with
    such lists of `contexts` and `targets`. Give the Trainer `remove_unused_columns=False`, and `label_names` for its evaluation.

    Raises:
        ValueError: It is another model.
    """

    config: PreTrainedConfig

    def __post_init__(self) -> None:
        if "prediction_length" not in (getattr(self.config, "chronos_config", None) or {}):
            raise ValueError(
                f"config must be that of a Chronos-T5 or a Chronos-Bolt, found a {type(self.config).__name__}. A Chronos-2 is "
                "fine-tuned with Chronos2Pipeline.fit."
            )

    @property
    def label_names(self) -> list[str]:
        """What the model calls the targets; the Trainer finds no loss of a Chronos-Bolt by itself."""
        return ["labels"] if "tokenizer_class" in self.config.chronos_config else ["target"]

    def __call__(self, features: list[dict[str, list[NDArray[np.float64]]]]) -> dict[str, torch.Tensor]:
        contexts, targets = (
            [values for item in features for values in item[name]] for name in ("contexts", "targets")
        )
        if self.label_names == ["labels"]:
            return tokenize_pieces(ChronosConfig(**self.config.chronos_config), contexts, targets)
        return {name: values.float() for name, values in stack_pieces(contexts, targets).items()}
