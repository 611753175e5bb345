"""Watching the ranks of attention while a model trains: does training lower them by itself?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_text
from .activations import ActivationSums
from .attention_layers import find_attention
from .structures import attention_structure

__all__ = ["RankCallback", "measure_ranks"]

PARTS = ("query", "key", "value", "output", "qk", "vo")
PREFIX = "rank/"


def measure_ranks(model: nn.Module, *, epsilon: float = 1e-2, parts: Sequence[str] = ("qk", "vo")) -> dict[str, float]:
    """The epsilon-ranks of every attention layer's weights, by names such as "cross.3.vo", and "mean.vo" over all layers.

    Adapters of peft count as merged.

    Args:
        model: A model with attention whose projections have known names (`attention_layers.PROJECTION_NAMES`), dense or low-rank.
        epsilon: The share of the largest singular value from which on one counts: sigma_j / sigma_1 >= epsilon.
        parts: "qk" and "vo" are the products W_q^T W_k and W_o W_v, the mean over the heads; "query", "key", "value" and "output" the whole
            matrices, the heads stacked.

    Raises:
        ValueError: The model has no such attention, a weight is not finite, or a part is none of these.
    """
    _check_parts(parts)
    layers = find_attention(model)
    nothing_seen = ActivationSums(model, layers)
    structures = [attention_structure(layer, nothing_seen) for layer in layers]
    ranks: dict[str, float] = {}
    for layer in structures:
        for part in parts:
            spectra = layer.heads[part] if part in ("qk", "vo") else (layer.weights[part],)
            ranks[f"{layer.name}.{part}"] = float(np.mean([spectrum.epsilon_rank(epsilon) for spectrum in spectra]))
    for part in parts:
        ranks[f"mean.{part}"] = float(np.mean([ranks[f"{layer.name}.{part}"] for layer in structures]))
    return ranks


def _check_parts(parts: Sequence[str]) -> None:
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"parts must be among {', '.join(PARTS)}, found {', '.join(sorted(unknown))}.")


class RankCallback(TrainerCallback):
    """Logs `measure_ranks`, each name with "rank/" before it, through the Trainer: whatever it reports to gets them.

        trainer.add_callback(RankCallback(trainer, every=100))

    Measured before the first step, every `every` steps, and after the last step that was planned. A run that is resumed goes on
    with the table of its checkpoint. In a distributed run the first process measures; it must hold whole weights (not FSDP).

    Args:
        trainer: The Trainer that the callback is added to: transformers gives its callbacks no way to log.
        every: Optimizer steps from one measurement to the next.
        epsilon: The share of the largest singular value from which on one counts, in (0, 1).
        parts: Which products and matrices to measure, as `measure_ranks` takes them.
        path: A JSON file to keep `history` in, written anew at every measurement.

    Attributes:
        history: The table: a dictionary of step, epoch and ranks for each measurement, in order. `pandas.DataFrame(history)` shows it.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int = 100,
        epsilon: float = 1e-2,
        parts: Sequence[str] = ("qk", "vo"),
        path: str | os.PathLike | None = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, found {every!r}.")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must be in (0, 1), found {epsilon}.")
        _check_parts(parts)
        self.trainer = trainer
        self.every = every
        self.epsilon = epsilon
        self.parts = parts
        self.path = path
        self.history: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Of a run that is resumed the log has the measurements up to its checkpoint, of a new one none.
        self.history = [row for row in state.log_history if any(name.startswith(PREFIX) for name in row)]
        if not self.history:
            self._measure(state, control, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state, control, kwargs["model"])

    def _measure(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        should_log = control.should_log
        ranks = measure_ranks(model, epsilon=self.epsilon, parts=self.parts)
        self.trainer.log({f"{PREFIX}{name}": rank for name, rank in ranks.items()})
        control.should_log = should_log  # logging has taken it for done, and the loss of this step is not logged yet
        self.history.append(state.log_history[-1])
        if self.path is not None:
            write_text(self.path, json.dumps(self.history, indent=1) + "\n")
