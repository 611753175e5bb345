"""Experiment on internals: train the reference checkpoints: a small Chronos-T5 and a small Chronos-Bolt, on synthetic series alone.

    python examples/pretrain_reference.py train runs/reference
    python examples/pretrain_reference.py train runs/bolt --family bolt
    python examples/pretrain_reference.py measure runs/reference

A run that was cut off goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from chronos import ChronosConfig
from transformers import PreTrainedModel, T5ForConditionalGeneration

from hf_lowrank import PretrainingSettings, pretrain
from hf_lowrank.checkpoints.dense import load_chronos
from hf_lowrank.compression.objectives import objective_of
from hf_lowrank.data.tokens import SyntheticBatches
from hf_lowrank.training.runs import HELD_OUT_SEED

app = typer.Typer(add_completion=False, help=__doc__)

# The published settings of both families, but for Bolt's context, which is 2048 there.
STEPS = {"t5": 8000, "bolt": 10_000}


@app.command()
def train(
    output: Path,
    family: Annotated[Literal["t5", "bolt"], typer.Option(help="Chronos-T5 or Chronos-Bolt.")] = "t5",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default 8000, of a Bolt 10000.")] = None,
    seed: int = 0,
) -> None:
    """Train from scratch, or go on where a run to OUTPUT was cut off: `hf-lowrank pretrain` without ranks."""
    settings = PretrainingSettings(family=family, steps=steps or STEPS[family], dtype="bfloat16", seed=seed)
    pretrain(output, settings, show_progress=True)


@contextmanager
def silenced(model: PreTrainedModel, pattern: str) -> Iterator[None]:
    """The model with the output of all attention modules of these names ("encoder.*SelfAttention", ...) set to zero."""
    hooks = [
        module.register_forward_hook(lambda _, __, output: (torch.zeros_like(output[0]), *output[1:]))
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cross_entropy(model: PreTrainedModel, num_batches: int) -> float:
    """Of a Chronos-T5, in nats a token on held-out synthetic series."""
    batches = SyntheticBatches(ChronosConfig(**model.config.chronos_config), num_batches, seed=HELD_OUT_SEED)
    total, tokens = 0.0, 0
    for index in range(num_batches):
        batch = batches[index]
        count = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


def excess_loss(model: PreTrainedModel, num_batches: int) -> Callable[[], float]:
    """A function that says how much more quantile loss a changed Chronos-Bolt has now, by the forecasts it has here.

    The expected loss on each series' normalised scale, mean over levels and steps (see `hf_lowrank.compression.objectives`).
    """
    objective = objective_of(model.config, type(model))
    batches, _ = objective.batches("synthetic", num_batches, HELD_OUT_SEED)
    wanted = [objective.predict(model, batch) for batch in batches]

    def measure() -> float:
        lost = sum(objective.divergence(states, objective.predict(model, b)) for states, b in zip(wanted, batches))
        return lost / sum(len(states) for states in wanted)

    return measure


@app.command()
@torch.no_grad()
def measure(checkpoint: Path, batches: int = 64) -> None:
    """Print, as JSON, what each kind of attention is worth on held-out synthetic series.

    Of a Chronos-T5 in nats a token, of a Chronos-Bolt in quantile loss on the series' normalised scale.
    """
    model = load_chronos(checkpoint)
    kinds = {
        "encoder_self": r"encoder\..*SelfAttention",
        "decoder_self": r"decoder\..*SelfAttention",
        "cross": r"decoder\..*EncDecAttention",
    }
    found: dict[str, Any] = {}
    if isinstance(model, T5ForConditionalGeneration):
        loss: Callable[[], float] = partial(cross_entropy, model, batches)
        found["cross_entropy"] = dense = loss()
    else:
        loss, dense = excess_loss(model, batches), 0.0
    found["added_when_silenced"] = {}
    for kind, pattern in kinds.items():
        with silenced(model, pattern):
            found["added_when_silenced"][kind] = loss() - dense
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    app()
