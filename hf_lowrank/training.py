"""Datasets for transformers' Trainer: token batches of a Chronos-T5 model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from chronos import ChronosConfig
from torch.utils.data import Dataset

from .synthesis import synthetic_series

__all__ = ["SyntheticBatches", "single_batch", "tokenize_windows"]

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


class SyntheticBatches(Dataset):
    """A long supply of synthetic Chronos-T5 training batches; item i depends on the arguments and i alone.

    All windows of a batch have the same context length and horizon, drawn log-uniformly, so nothing is spent on
    padding. The longest context and horizon grow with i from `first_lengths` to the model's own over the first `ramp`
    batches: cross-attention in T5 knows no positions, and a model finds out where the end of a context is in short
    ones first. The batch holds about `max_tokens` tokens of context and target, and at most `max_windows` windows. In some
    batches values of the context are missing. A target that is shorter than the model's horizon has no EOS.

    Use it in order (`train_sampling_strategy="sequential"`), with a batch size of 1 and `data_collator=single_batch`: an item
    is a whole batch already.
    """

    def __init__(
        self,
        chronos_config: ChronosConfig,
        num_batches: int,
        *,
        seed: int,
        ramp: int = 0,
        first_lengths: tuple[int, int] = (24, 12),
        min_lengths: tuple[int, int] = (10, 6),
        max_tokens: int = 4096,
        max_windows: int = 64,
    ) -> None:
        self.chronos_config = chronos_config
        self.num_batches = num_batches
        self.seed = seed
        self.ramp = ramp
        self.first_lengths = first_lengths
        self.min_lengths = min_lengths
        self.max_tokens = max_tokens
        self.max_windows = max_windows

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_batches:
            raise IndexError(f"index must be in [0, {self.num_batches}), found {index}.")
        # numpy takes [s, 0] for [s]: no list of seeds ends in zero.
        rng = np.random.default_rng([self.seed, 0, index + 1])
        limits = np.array([self.chronos_config.context_length, self.chronos_config.prediction_length]) + 1
        progress = min(1.0, index / self.ramp) if self.ramp else 1.0
        longest = progress * np.log(limits) + (1 - progress) * np.log(np.minimum(self.first_lengths, limits))
        shortest = np.log(np.minimum(self.min_lengths, limits - 1))
        length, horizon = np.exp(rng.uniform(shortest, longest)).astype(int)
        count = min(self.max_windows, max(1, self.max_tokens // int(length + horizon)))
        series = synthetic_series(count, int(length + horizon), seed=[self.seed, 1, index + 1])
        context, target = torch.from_numpy(series).split([int(length), int(horizon)], dim=1)
        if rng.random() < 0.1:
            missing = torch.from_numpy(rng.random(context.shape) < rng.uniform(0, 0.3))
            missing[:, -1] = False
            context = context.masked_fill(missing, float("nan"))
        batch = tokenize_windows(replace(self.chronos_config, prediction_length=int(horizon)), context, target)
        if horizon < self.chronos_config.prediction_length:
            batch["labels"] = batch["labels"][:, :-1].contiguous()
        return batch


def single_batch(features: list[dict[str, Any]]) -> dict[str, Any]:
    """The collator for datasets whose items are whole batches."""
    (batch,) = features
    return batch
