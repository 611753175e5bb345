"""Datasets for transformers' Trainer: token batches of a Chronos-T5 model."""

from __future__ import annotations

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
    """An endless supply of synthetic Chronos-T5 training batches; item i depends on `seed` and i alone.

    All windows of a batch have the same context length, drawn log-uniformly from
    `min_context` to the model's context length, so nothing is spent on padding; the batch holds about `max_tokens`
    tokens of context and target, and at most `max_windows` windows. In some batches values of the context
    are missing.

    Use it with a batch size of 1 and `data_collator=single_batch`: an item is a whole batch already.
    """

    def __init__(
        self,
        chronos_config: ChronosConfig,
        num_batches: int,
        *,
        seed: int,
        min_context: int = 10,
        max_tokens: int = 4096,
        max_windows: int = 32,
    ) -> None:
        self.chronos_config = chronos_config
        self.num_batches = num_batches
        self.seed = seed
        self.min_context = min_context
        self.max_tokens = max_tokens
        self.max_windows = max_windows

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_batches:
            raise IndexError(f"index must be in [0, {self.num_batches}), found {index}.")
        rng = np.random.default_rng([self.seed, index])
        horizon = self.chronos_config.prediction_length
        longest = self.chronos_config.context_length
        length = int(np.exp(rng.uniform(np.log(self.min_context), np.log(longest + 1))))
        count = min(self.max_windows, max(1, self.max_tokens // (length + horizon)))
        series = synthetic_series(count, length + horizon, seed=[self.seed, index])
        context, target = torch.from_numpy(series).split([length, horizon], dim=1)
        if rng.random() < 0.1:
            missing = torch.from_numpy(rng.random(context.shape) < rng.uniform(0, 0.3))
            missing[:, -1] = False
            context = context.masked_fill(missing, float("nan"))
        return tokenize_windows(self.chronos_config, context, target)


def single_batch(features: list[dict[str, Any]]) -> dict[str, Any]:
    """The collator for datasets whose items are whole batches."""
    (batch,) = features
    return batch
