"""What a run of training depends on: settings that are checked when they are made, and read from files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.published import SHAPES
from .runs import HELD_OUT_SEED
from .trainer import WHOLE_BATCHES

__all__ = ["POSITIONS", "RANKS", "SIZES", "DistillationSettings", "PretrainingSettings", "check_count"]

SIZES = ("d_model", "num_heads", "d_kv", "d_ff", "num_layers", "num_decoder_layers")
POSITIONS = ("relative_attention_num_buckets", "relative_attention_max_distance")
RANKS = ("base_rank", "rank_growth", "rank_rounding", "attention_ranks", "feed_forward_ranks")


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raise a ValueError where the argument `name` is no integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}.")


def _check_ranges(settings: Any, ranges: Iterable[tuple[str, str, bool]]) -> None:
    """Raise a ValueError for the first of (name, what it must be, whether it is)."""
    for name, wanted, is_allowed in ranges:
        if not is_allowed:
            raise ValueError(f"{name} must be {wanted}, found {getattr(settings, name)!r}.")


def _learning_rate_and_seed(settings: Any) -> list[tuple[str, str, bool]]:
    return [
        ("learning_rate", "above 0", 0 < settings.learning_rate < math.inf),
        ("seed", f"an integer in [0, {HELD_OUT_SEED})", settings.seed in range(HELD_OUT_SEED)),
    ]


def _are_shares(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(one, float) and 0 < one < 1 for one in values)
        and len(set(values)) == len(values)
    )


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """The numbers that the outcome of a recovery depends on: see `recover`.

    Raises:
        ValueError: One of them is out of range.
    """

    steps: int
    learning_rate: float
    distillation_weight: float
    temperature: float
    seed: int
    batch_tokens: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens"):
            check_count(name, getattr(self, name))
        _check_ranges(
            self,
            [
                *_learning_rate_and_seed(self),
                ("distillation_weight", "in [0, 1]", 0 <= self.distillation_weight <= 1),
                ("temperature", "above 0", 0 < self.temperature < math.inf),
            ],
        )


@dataclass(frozen=True)
class PretrainingSettings:
    """All that a run depends on; a configuration file has the same names.

    Args:
        start: A checkpoint to go on from, dense or compressed: a folder, a Hub id, or `"reference"`. Instead of a fresh model, which
            the next lines describe.
        family: `"t5"`, `"bolt"` or `"chronos2"`.
        shape: A published shape, such as `"t5-base"`; it brings all sizes.
        d_model, num_heads, d_kv, d_ff, num_layers, num_decoder_layers: The sizes otherwise, as in T5Config; by default those of
            `"reference-bolt"`, with d_ff = 4 d_model and as many layers in both stacks.
        relative_attention_num_buckets, relative_attention_max_distance: Of the position bias of a T5 or Bolt, as in T5Config: by
            default 32 and 128, which tell a distance of 12 steps from one of 11 but not from one of 13; with 256 and 512 each up to 64
            is told from the others. A `start` is given them too, and forecasts as before (see `with_position_buckets`).
        context_length, prediction_length: In values.
        base_rank, rank_growth, rank_rounding, attention_ranks, feed_forward_ranks: As in [`LowRankT5Config`]. Without any of them the
            model is dense.
        data: `"synthetic"` (`synthetic_series`, for a Chronos-2 in groups), or whatever `read_series` takes, or groups of series (a
            `GroupedSeries`); in a configuration file the path of a CSV or parquet file. The last horizon of every series is held out.
        steps: Optimizer steps.
        learning_rate: The highest: 300 steps (at most a tenth) lead up to it, the last quarter down from it.
        muon: Whether matrices are trained by Muon and all else by AdamW (see `MuonWithAdamW`), with one learning rate; otherwise
            everything by the `optim` of `trainer`, AdamW where it names none.
        position_rate: The learning rate of the relative position bias, relative to that of all else, with `muon`. New buckets want 10 or 20.
        batch_tokens: Tokens in a process's batch, about; of a Bolt or Chronos-2, a quarter of the values.
        ramp: The share of the steps in which the longest context grows from an eighth to its full length, of synthetic series. By
            default 0.15, and 0 of a model that has learned already.
        budgets: A dense model is also trained to lose little when it is compressed to each of these, a `total_ratio` of
            `compress_pretrained`: see `hf_lowrank.training.budgets`.
        budget_share: The share of the steps that have a budget, each as often; of a fresh model they begin after a fifth of all.
        budget_steps: After so many steps it is found out anew how the model would be compressed, which takes as long as ten or twenty.
        averaged: The share of the steps, the last ones, whose weights are averaged; 0 for the weights of the last step.
        save_steps: Steps between checkpoints and evaluations.
        evaluation_batches: Batches in the held-out set, at most; 0 for none.
        workers: Processes that make batches, 0 for none.
        bf16: Whether products are computed in bfloat16; by default where the GPU can, or the CPU has matrix units for it (AMX).
        dtype: Of the saved weights, `"float32"` or `"bfloat16"`.
        seed: Of the initial weights and of the data.
        trainer: Further arguments of transformers' `TrainingArguments`.

    Raises:
        ValueError: A setting is out of range, or two of them exclude each other.
    """

    start: str | None = None
    family: str | None = None
    shape: str | None = None
    d_model: int | None = None
    num_heads: int | None = None
    d_kv: int | None = None
    d_ff: int | None = None
    num_layers: int | None = None
    num_decoder_layers: int | None = None
    relative_attention_num_buckets: int | None = None
    relative_attention_max_distance: int | None = None
    context_length: int | None = None
    prediction_length: int | None = None
    base_rank: float | None = None
    rank_growth: float | None = None
    rank_rounding: str | None = None
    attention_ranks: dict[str, Any] | None = None
    feed_forward_ranks: dict[str, Any] | None = None
    data: Any = "synthetic"
    steps: int = 8000
    learning_rate: float = 2e-3
    muon: bool = True
    position_rate: float = 1.0
    batch_tokens: int = 4096
    ramp: float | None = None
    budgets: list[float] | None = None
    budget_share: float = 0.6
    budget_steps: int = 500
    averaged: float = 0.05
    save_steps: int = 500
    evaluation_batches: int = 32
    workers: int = 1
    bf16: bool | None = None
    dtype: str = "float32"
    seed: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "save_steps", "budget_steps"):
            check_count(name, getattr(self, name))
        for name in ("evaluation_batches", "workers"):
            check_count(name, getattr(self, name), least=0)
        _check_ranges(
            self,
            [
                *_learning_rate_and_seed(self),
                ("position_rate", "above 0", 0 < self.position_rate < math.inf),
                ("ramp", "in [0, 1]", self.ramp is None or 0 <= self.ramp <= 1),
                ("averaged", "in [0, 1]", 0 <= self.averaged <= 1),
                (
                    "budgets",
                    "a list of different numbers in (0, 1)",
                    self.budgets is None or _are_shares(self.budgets),
                ),
                ("budget_share", "in (0, 1]", 0 < self.budget_share <= 1),
                ("dtype", "'float32' or 'bfloat16'", self.dtype in ("float32", "bfloat16")),
                ("family", "'t5', 'bolt' or 'chronos2'", self.family in (None, "t5", "bolt", "chronos2")),
                ("shape", f"one of {', '.join(SHAPES)}", self.shape is None or self.shape in SHAPES),
            ],
        )
        described = [name for name in ("family", "shape", *SIZES, *RANKS) if getattr(self, name) is not None]
        lengths = [name for name in ("context_length", "prediction_length") if getattr(self, name) is not None]
        if self.start is not None and described + lengths:
            raise ValueError(f"start brings its own model: leave out {', '.join(described + lengths)}.")
        if self.budgets and (ranks := [name for name in RANKS if name in described]):
            raise ValueError(
                f"budgets are for a dense model, which is compressed later: leave out {', '.join(ranks)}."
            )
        if self.shape is not None and (double := [name for name in ("family", *SIZES) if name in described]):
            raise ValueError(f"shape={self.shape!r} brings its own sizes: leave out {', '.join(double)}.")
        if taken := sorted(set(self.trainer) & set(self.trainer_arguments)):
            raise ValueError(f"trainer: {', '.join(taken)} cannot be given here; they follow from the other settings.")
        if not self.muon and self.position_rate != 1:
            raise ValueError(f"position_rate is for muon, which is false; leave it out, found {self.position_rate}.")
        if self.muon and (other := sorted({"optim", "optim_args", "fsdp", "deepspeed"} & set(self.trainer))):
            raise ValueError(f"trainer: {', '.join(other)} cannot be given beside muon; set muon to false.")
        if secret := [name for name in self.trainer if name.endswith("token")]:
            raise ValueError(
                f"trainer: {secret[0]} cannot be given here, for settings are recorded; set HF_TOKEN instead."
            )

    @property
    def averaged_steps(self) -> int:
        """The steps, the last ones, whose weights are averaged."""
        return round(self.averaged * self.steps)

    @property
    def budget_start(self) -> int:
        """The first step that may have a budget: a model should have learned something before."""
        return self.steps // 5 if self.start is None else 0

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The arguments of Trainer that follow from the other settings, so that `trainer` cannot give them."""
        has_evaluation = self.evaluation_batches > 0
        return WHOLE_BATCHES | {
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "bf16": self.bf16,
            "dataloader_num_workers": self.workers,
            "eval_strategy": "steps" if has_evaluation else "no",
            "eval_steps": self.save_steps if has_evaluation else None,
            "prediction_loss_only": True,
            "save_steps": self.save_steps,
            "seed": self.seed,
        }

    @classmethod
    def from_file(cls, path: str | os.PathLike, **changes: Any) -> PretrainingSettings:
        """The settings in a YAML or JSON file, with those in `changes` in their place.

        Raises:
            ValueError: The file is not a table of known settings, or one of them is out of range.
            OSError: It cannot be read.
        """
        try:
            values = yaml.load(Path(path).read_text(encoding="utf-8"), _SettingsLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is neither YAML nor JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} must hold a table of settings, found a {type(values).__name__}.")
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(map(str, values)) - set(known)):
            raise ValueError(
                f"config: {path} has unknown settings {', '.join(unknown)}; known are {', '.join(known)}."
            )
        return cls(**(values | changes))


class _SettingsLoader(yaml.SafeLoader):
    """YAML in which 2e-3 is a number; to YAML 1.1 it is a word, for it has no point."""


_SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
