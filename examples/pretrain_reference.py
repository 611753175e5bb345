"""Experiment on internals: train the reference checkpoints, one of each family, on synthetic series alone, and see what they have learned.

The T5 and the Chronos-2 in their first run, on a GPU; their cards say how they went on.

    python examples/pretrain_reference.py train runs/bolt --family bolt
    python examples/pretrain_reference.py measure reference-bolt

A run that was cut off goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from chronos import ChronosConfig
from chronos.chronos2 import Chronos2Model
from transformers import PreTrainedModel, T5ForConditionalGeneration

from hf_lowrank import PretrainingSettings, pretrain
from hf_lowrank.checkpoints.dense import load_chronos
from hf_lowrank.checkpoints.objectives import objective_of
from hf_lowrank.data.mixture import synthetic_series
from hf_lowrank.data.tokens import SyntheticBatches
from hf_lowrank.data.windows import GroupedWindows
from hf_lowrank.training.plan import initial_model
from hf_lowrank.training.runs import HELD_OUT_SEED

app = typer.Typer(add_completion=False, help=__doc__)

SHARED: dict[str, Any] = {
    "averaged": 0.05,
    "save_steps": 300,
    "evaluation_batches": 24,
    "trainer": {"adam_beta2": 0.98},
    "dtype": "bfloat16",
}
# On a GPU: large batches, and models that are trained to be compressed.
LARGE: dict[str, Any] = SHARED | {
    "d_model": 192,
    "num_heads": 6,
    "d_kv": 32,
    "learning_rate": 2.5e-3,
    "bf16": False,  # so small a model waits for its kernels to be launched, and casts are more of them
    "budgets": [0.5, 0.25, 0.15],
    "budget_share": 0.7,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": LARGE | {"context_length": 512, "steps": 1500, "batch_tokens": 65_536, "budget_steps": 150, "workers": 4},
    "bolt": SHARED | {"context_length": 2048, "steps": 6600, "learning_rate": 1.5e-3},
    "chronos2": LARGE
    | {
        "num_layers": 6,
        "context_length": 2048,
        "steps": 1600,
        "batch_tokens": 40_960,
        "budget_steps": 160,
        "workers": 7,
    },
}

DESCRIBED = ("family", "d_model", "num_heads", "d_kv", "context_length")  # what a checkpoint to start from brings


@app.command()
def train(
    output: Path,
    family: Annotated[Literal["t5", "bolt", "chronos2"], typer.Option(help="Which of the three.")] = "t5",
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; by default those of the family's reference.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a batch, about; by default those of the family's reference.")
    ] = None,
    budgets: Annotated[bool, typer.Option(help="Of a t5 or chronos2: train it to be compressed.")] = True,
    seed: int = 0,
    random_embedding: Annotated[
        bool,
        typer.Option(
            "--random-embedding", help="Of a t5: its tokens begin as random vectors, which say nothing of their order."
        ),
    ] = False,
) -> None:
    """Train from scratch, or go on where a run to OUTPUT was cut off: `hf-lowrank pretrain` without ranks."""
    given = {"seed": seed, "steps": steps, "batch_tokens": batch_tokens}
    recipe = FAMILIES[family] | {name: value for name, value in given.items() if value is not None}
    if not budgets:
        recipe |= {"budgets": None}
    settings = PretrainingSettings(family=family, **recipe)
    if random_embedding:
        if family != "t5":
            raise typer.BadParameter(f"--random-embedding is for t5, which has tokens; found {family}.")
        start = output.with_name(f"{output.name}.start")
        model = initial_model(settings)
        model.shared.weight.data.normal_(std=float(model.shared.weight.std()))
        model.save_pretrained(start)
        settings = replace(settings, start=str(start), ramp=0.15, **dict.fromkeys(DESCRIBED, None))
    pretrain(output, settings, show_progress=True)


# --- what each kind of attention is worth ------------------------------------------------------------------------


KINDS = {
    "encoder_self": r"encoder\..*SelfAttention\.o",
    "decoder_self": r"decoder\..*SelfAttention\.o",
    "cross": r"decoder\..*EncDecAttention\.o",
}
CHRONOS2_KINDS = {
    "time": r"encoder\.block\.\d+\.layer\.0\.self_attention\.o",
    "group": r"encoder\.block\.\d+\.layer\.1\.self_attention\.o",
}


@contextmanager
def silenced(model: PreTrainedModel, pattern: str) -> Iterator[None]:
    """The model with the output of all attention layers whose last projection has such a name set to zero."""
    hooks = [
        module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name)
    ]
    if not hooks:
        raise ValueError(f"no layer of this {type(model).__name__} is called {pattern}.")
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

    As a share of the loss that the forecasts expect of themselves, mean over series (see `hf_lowrank.checkpoints.objectives`).
    """
    objective = objective_of(model.config, type(model))
    batches, _ = objective.batches("synthetic", num_batches, HELD_OUT_SEED)
    wanted = [objective.predict(model, batch) for batch in batches]

    def measure() -> float:
        lost = sum(objective.divergence(states, objective.predict(model, b)) for states, b in zip(wanted, batches))
        return lost / sum(len(states) for states in wanted)

    return measure


# --- what a Chronos-2 makes of groups ----------------------------------------------------------------------------


def grouped_loss(model: PreTrainedModel, num_batches: int, *, alone: bool = False) -> float:
    """The model's quantile loss on held-out groups of two series and more; `alone`: each forecast as a group of its own."""
    windows = GroupedWindows(512, 64, num_batches, seed=HELD_OUT_SEED, max_values=32_768)
    losses = []
    for index in range(num_batches):
        batch = windows[index]
        ids = batch["group_ids"]
        together = torch.bincount(ids)[ids] > 1
        batch = {name: values[together] if torch.is_tensor(values) else values for name, values in batch.items()}
        if alone:
            batch["group_ids"] = torch.arange(len(batch["group_ids"]))
        losses.append(float(model(**batch).loss))
    return sum(losses) / len(losses)


def covariate_wql(model: PreTrainedModel, *, is_known: bool, num_pairs: int = 200, horizon: int = 64) -> float:
    """The WQL of targets that a covariate determines, its future known or not: y = level + sign x, both standardised."""
    x = torch.from_numpy(synthetic_series(num_pairs, 512 + horizon, seed=HELD_OUT_SEED))
    x = (x - x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True) + 1e-6)
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(2, (num_pairs, 1), generator=generator) * 2 - 1
    pairs = torch.stack([3 * torch.rand(num_pairs, 1, generator=generator) + sign * x, x], dim=1).flatten(0, 1)
    context, future = pairs.split([512, horizon], dim=1)
    covariates = torch.full_like(future, torch.nan)
    if is_known:
        covariates[1::2] = future[1::2]
    output = model(
        context=context,
        group_ids=torch.arange(num_pairs).repeat_interleave(2),
        future_covariates=covariates,
        num_output_patches=horizon // model.chronos_config.output_patch_size,
    )
    quantiles, target = output.quantile_preds[::2, :, :horizon], future[::2, None]
    error = target - quantiles
    levels = model.quantiles[:, None]
    return float(2 * torch.maximum(levels * error, (levels - 1) * error).mean(dim=1).sum() / target.abs().sum())


@app.command()
@torch.no_grad()
def measure(checkpoint: str, batches: int = 64) -> None:
    """Print, as JSON, what each kind of attention is worth on held-out synthetic series.

    Of a Chronos-T5 in nats a token, of a Chronos-Bolt as a share of its quantile loss; of a Chronos-2 relative to
    its loss on groups, and what its groups and covariates known in the future are worth.
    """
    model = load_chronos(checkpoint)
    kinds, found, unit = KINDS, {}, 1.0
    loss: Callable[[], float]
    if isinstance(model, T5ForConditionalGeneration):
        loss = partial(cross_entropy, model, batches)
        found["cross_entropy"] = dense = loss()
    elif isinstance(model, Chronos2Model):
        kinds, loss = CHRONOS2_KINDS, partial(grouped_loss, model, batches)
        dense = unit = loss()
        known, unknown = (covariate_wql(model, is_known=is_known) for is_known in (True, False))
        found |= {
            "loss_on_groups": dense,
            "relative_loss_alone": grouped_loss(model, batches, alone=True) / dense,
            "covariate_wql": {"known": known, "unknown": unknown},
        }
    else:
        loss, dense = excess_loss(model, batches), 0.0
    added = {}
    for kind, pattern in kinds.items():
        with silenced(model, pattern):
            added[kind] = (loss() - dense) / unit
    print(json.dumps(found | {"added_when_silenced": added}, indent=2))


if __name__ == "__main__":
    app()
