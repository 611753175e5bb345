"""Windows of series as what models read: the tokens of a Chronos-T5, the values of the other Chronos models; batches for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from chronos import ChronosConfig
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedConfig

from .windows import SeriesWindows, SyntheticWindows, least_observed, stack_pieces

__all__ = [
    "IGNORED_LABEL",
    "SeriesBatches",
    "SyntheticBatches",
    "WindowBatches",
    "WindowCollator",
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


class WindowBatches(Dataset):
    """Batches of windows as a model reads them: the items of `windows`, each as the arguments of `read`."""

    def __init__(
        self,
        windows: SyntheticWindows | SeriesWindows | Sequence[dict[str, Any]],
        read: Callable[..., dict[str, torch.Tensor]],
    ) -> None:
        self.windows = windows
        self.read = read

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.read(**self.windows[index])


class SyntheticBatches(WindowBatches):
    """`SyntheticWindows` as tokens of a Chronos-T5. A target that is shorter than the model's horizon has no EOS.

    Takes the arguments of `SyntheticWindows`; one value is one token.
    """

    def __init__(
        self, chronos_config: ChronosConfig, num_batches: int, *, max_tokens: int = 4096, **more: Any
    ) -> None:
        lengths = chronos_config.context_length, chronos_config.prediction_length
        windows = SyntheticWindows(*lengths, num_batches, max_values=max_tokens, **more)
        super().__init__(windows, partial(_tokenize_synthetic, chronos_config))


def _tokenize_synthetic(
    chronos_config: ChronosConfig, context: torch.Tensor, target: torch.Tensor
) -> dict[str, torch.Tensor]:
    horizon = target.shape[1]
    batch = tokenize_windows(replace(chronos_config, prediction_length=horizon), context, target)
    if horizon < chronos_config.prediction_length:
        batch["labels"] = batch["labels"][:, :-1].contiguous()
    return batch


class SeriesBatches(WindowBatches):
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
        lengths = chronos_config.context_length, chronos_config.prediction_length
        windows = SeriesWindows(*lengths, series, num_batches, max_values=max_tokens, **more)
        super().__init__(windows, partial(tokenize_pieces, chronos_config))


@dataclass(frozen=True)
class WindowCollator:
    """The collator that makes of windows what a Chronos model trains on; to a Chronos-2 every series is a group of its own.

    A window is an item of `SeriesWindows` with `max_windows=1`, so that the Trainer's batch size counts windows, or any dictionary with
    such lists of `contexts` and `targets`. Give the Trainer `remove_unused_columns=False`, and `label_names` for its evaluation.

    Raises:
        ValueError: It is another model.
    """

    config: PreTrainedConfig

    def __post_init__(self) -> None:
        if not getattr(self.config, "chronos_config", None):
            raise ValueError(f"config must be that of a Chronos model, found a {type(self.config).__name__}.")

    @property
    def has_tokens(self) -> bool:
        """Whether the model is a Chronos-T5, which reads and writes tokens; the others read values."""
        return "tokenizer_class" in self.config.chronos_config

    @property
    def has_groups(self) -> bool:
        """Whether the model is a Chronos-2, which forecasts groups of series."""
        return "output_patch_size" in self.config.chronos_config

    @property
    def min_observed(self) -> int:
        """Values that must be observed in the context of a window: of models that read patches `least_observed` of their size."""
        return 1 if self.has_tokens else least_observed(self.config.chronos_config["input_patch_size"])

    @property
    def lengths(self) -> tuple[int, int]:
        """The longest context, and the horizon of one pass, in values."""
        settings = self.config.chronos_config
        if self.has_groups:
            return settings["context_length"], settings.get("max_output_patches", 1) * settings["output_patch_size"]
        return settings["context_length"], settings["prediction_length"]

    @property
    def label_names(self) -> list[str]:
        """What the model calls the targets; the Trainer finds no loss of a Chronos-Bolt or Chronos-2 by itself."""
        return ["labels"] if self.has_tokens else ["future_target"] if self.has_groups else ["target"]

    def batch(self, contexts: Sequence[NDArray[np.float64]], targets: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
        """Windows of unlike lengths as one batch: of `tokenize_pieces`, or of `stack_pieces` in float32."""
        if self.has_tokens:
            return tokenize_pieces(ChronosConfig(**self.config.chronos_config), contexts, targets)
        batch: dict[str, Any] = {name: values.float() for name, values in stack_pieces(contexts, targets).items()}
        if self.has_groups:
            batch["future_target"] = batch.pop("target")
            patch = self.config.chronos_config["output_patch_size"]
            batch["num_output_patches"] = -(-batch["future_target"].shape[1] // patch)
        return batch

    def __call__(self, features: list[dict[str, list[NDArray[np.float64]]]]) -> dict[str, Any]:
        contexts, targets = (
            [values for item in features for values in item[name]] for name in ("contexts", "targets")
        )
        return self.batch(contexts, targets)
