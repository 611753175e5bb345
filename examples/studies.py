"""Experiments on internals: five small studies of rank in time-series transformers.

Each is one command, and model_cards/studies.md says what came out.

    python examples/studies.py schedule      ranks that grow with depth, against the same rank everywhere, against ranks that fall
    python examples/studies.py sketch        a sketch for every head (smaller heads), against one for all heads (a latent)
    python examples/studies.py sensitivity   what d~_0 and alpha do
    python examples/studies.py data          on which series a compressed model loses most
    python examples/studies.py text          a Chronos-T5 against a text T5 of the same shape

Models are trained from scratch on synthetic series, small enough for one CPU core: 64 dimensions, 4 heads of 16, 4 + 4 layers, contexts up to
128. Finished models are kept in the folder of --runs and not trained again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from chronos import ChronosConfig
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments, set_seed

from hf_lowrank import PretrainingSettings, calibrate, compress_pretrained, evaluate, pretrain, summarize
from hf_lowrank.analysis.spectra import StateSum
from hf_lowrank.checkpoints.dense import load_chronos
from hf_lowrank.checkpoints.objectives import Objective, objective_of
from hf_lowrank.data.tokens import tokenize_windows
from hf_lowrank.data.windows import single_batch
from hf_lowrank.models.configuration_lowrank_t5 import attention_parameters
from hf_lowrank.training.runs import HELD_OUT_SEED

app = typer.Typer(add_completion=False, help=__doc__)
console = Console()

Runs = Annotated[Path, typer.Option(help="Trained models and results are kept here.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps of every model.")]
Seeds = Annotated[int, typer.Option(help="Models of each kind.")]
RUNS, STEPS = Path("runs/studies"), 1500
SHAPE = {"d_model": 64, "num_heads": 4, "d_kv": 16, "num_layers": 4}
SMALL = PretrainingSettings(
    **SHAPE,  # type: ignore[arg-type]
    context_length=128,
    prediction_length=32,
    batch_tokens=1024,
    evaluation_batches=64,
    save_steps=10_000,
    workers=0,
    bf16=False,
)
DEPTH = range(SHAPE["num_layers"])
KINDS = ("encoder_self", "decoder_self", "cross")


def table_of(entries: list[dict[str, int]]) -> dict[str, list[dict[str, int]]]:
    """The same ranks, by layer, for each kind of attention."""
    return dict.fromkeys(KINDS, entries)


def per_head(*ranks: int) -> dict[str, list[dict[str, int]]]:
    return table_of([{"qk": rank, "vo": rank} for rank in ranks])


def trained(runs: Path, name: str, settings: PretrainingSettings) -> dict[str, float]:
    """Held-out loss in nats a token, and WQL and MASE on M1-Yearly relative to Seasonal Naive, of a model that is trained if need be."""
    folder = runs / name
    if not folder.is_dir():
        pretrain(folder, settings, show_progress=True)
    record = json.loads((folder / "pretraining.json").read_text())
    if record["steps"] != settings.steps:
        raise ValueError(f"--runs: {folder} was trained for {record['steps']} steps and not {settings.steps}.")
    config = json.loads((folder / "config.json").read_text())
    scores = evaluate([str(folder)], ["m1_yearly"], cache=runs / "cells").aggregate[str(folder)]
    relative = {key: value["geometric_mean"] for key, value in scores["relative_to_seasonal_naive"].items()}
    heads = SHAPE["num_heads"], SHAPE["d_model"]
    attention = sum(
        attention_parameters(entry, d_model=heads[1], num_heads=heads[0])
        for entries in config.get("attention_ranks", per_head(*[SHAPE["d_kv"]] * len(DEPTH))).values()
        for entry in entries
    )
    return {"loss": record["held_out_loss"], "WQL": relative["WQL"], "MASE": relative["MASE"], "attention": attention}


def over_seeds(
    runs: Path, name: str, settings: PretrainingSettings, seeds: int, steps: int
) -> dict[str, float | list[float]]:
    found = [
        trained(runs, f"{name}-seed{seed}-steps{steps}", replace(settings, seed=seed, steps=steps))
        for seed in range(seeds)
    ]
    return {"attention": found[0]["attention"]} | {key: [one[key] for one in found] for key in ("loss", "WQL", "MASE")}


def report(runs: Path, study: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table, means (least to most) of what has several values, and keep the figures."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return f"{mean(value):.4f}" + (f" ({min(value):.4f} to {max(value):.4f})" if len(value) > 1 else "")
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    table = Table(title=study)
    table.add_column("")
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(text(row.get(column, "")) for column in columns))
    console.print(table)
    runs.mkdir(parents=True, exist_ok=True)
    (runs / f"{study}.json").write_text(json.dumps(rows, indent=2) + "\n")


# --- (a), (b), (c): pretrained compressed ------------------------------------------------------------------------


@app.command()
def schedule(runs: Runs = RUNS, steps: Steps = STEPS, seeds: Seeds = 3) -> None:
    """(a) Which layers should have the ranks, of which there are 8 a kind of attention in each of three models."""
    shapes = {
        "grows with depth, 1 2 2 3": per_head(1, 2, 2, 3),  # ceil((1 + i)^0.55)
        "the same everywhere, 2": per_head(2, 2, 2, 2),
        "falls with depth, 3 2 2 1": per_head(3, 2, 2, 1),
    }
    rows = {
        title: over_seeds(
            runs, title.split(",")[0].replace(" ", "-"), replace(SMALL, attention_ranks=ranks), seeds, steps
        )
        for title, ranks in shapes.items()
    }
    report(runs, "schedule", rows)


@app.command()
def sketch(runs: Runs = RUNS, steps: Steps = STEPS, seeds: Seeds = 3) -> None:
    """(b) Smaller heads against one latent, at equal parameters and at equal cache, pretrained and after training."""
    heads = {"num_heads": SHAPE["num_heads"], "d_model": SHAPE["d_model"]}
    smaller = {"qk": 2, "vo": 2}
    budget, cache = attention_parameters(smaller, **heads), 2 * 2 * SHAPE["num_heads"]
    same_parameters = max(
        rank
        for rank in range(1, 64)
        if attention_parameters(dict.fromkeys(("latent", "query", "output"), rank), **heads) <= budget
    )
    shapes = {
        "smaller heads, 2": smaller,
        f"latent, equal parameters, {same_parameters}": dict.fromkeys(("latent", "query", "output"), same_parameters),
        f"latent, equal cache, {cache}": dict.fromkeys(("latent", "query", "output"), cache),
    }
    rows: dict[str, dict[str, Any]] = {}
    for title, entry in shapes.items():
        name = "the-same-everywhere" if "qk" in entry else title.replace(", ", "-").replace(" ", "-")
        settings = replace(SMALL, attention_ranks=table_of([entry] * len(DEPTH)))
        rows[f"pretrained: {title}"] = over_seeds(runs, name, settings, seeds, steps)
    model = load_chronos("reference")
    lost, calibration = held_out(model), calibrate(model)
    for title, budgets in (
        ("equal parameters, 0.15", {"ratio": 0.15}),
        ("equal parameters, 0.075", {"ratio": 0.075}),
        ("equal cache, 0.1", {"max_cache_ratio": 0.1}),
        ("equal cache, 0.05", {"max_cache_ratio": 0.05}),
    ):
        for form in ("per_head", "latent"):
            small = compress_pretrained(model, form=form, calibration=calibration, **budgets)  # type: ignore[arg-type]
            summary = summarize(small.config)
            rows[f"after training: {form}, {title}"] = {
                "attention": summary.attention_ratio,
                "cache": summary.cache_ratio,
                "added": lost(small),
            }
    report(runs, "sketch", rows)


@app.command()
def sensitivity(runs: Runs = RUNS, steps: Steps = STEPS) -> None:
    """(c) The loss by d~_0 and alpha, one model each."""
    rows: dict[str, dict[str, Any]] = {}
    for base in (1, 2, 4):
        for growth in (0.0, 0.5, 1.0):
            settings = replace(SMALL, base_rank=base, rank_growth=growth)
            rows[f"d~_0 = {base}, alpha = {growth}"] = over_seeds(
                runs, f"base{base}-growth{growth}", settings, 1, steps
            )
    rows["dense, 16"] = over_seeds(runs, "dense", SMALL, 1, steps)
    report(runs, "sensitivity", rows)


# --- (d): the data -----------------------------------------------------------------------------------------------


def held_out(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]] | None = None
) -> Callable[[PreTrainedModel], float]:
    """A function from a compressed model to its divergence from this dense one, nats a token; on synthetic series unless told."""
    objective: Objective = objective_of(model.config, type(model))
    if batches is None:
        batches, _ = objective.batches("synthetic", 16, HELD_OUT_SEED)
    with torch.no_grad():
        wanted = [objective.predict(model, batch) for batch in batches]

    @torch.no_grad()
    def measure(found: PreTrainedModel) -> float:
        found = found.float().eval()
        lost = sum(objective.divergence(ours, objective.predict(found, b)) for ours, b in zip(wanted, batches))
        return lost / sum(len(states) for states in wanted)

    return measure


def processes(length: int, seed: int) -> dict[str, np.ndarray]:
    """Thirty-two series of each kind, (32, length); one property changes at a time."""
    rng = np.random.default_rng(seed)
    time = np.arange(length)
    noise = rng.standard_normal((32, length))
    period = rng.choice([7, 12, 24], size=(32, 1))
    season = np.sqrt(2) * np.sin(2 * np.pi * (time / period + rng.uniform(size=(32, 1))))
    found = {}
    for strength in (0.0, 0.5, 0.9, 1.0):  # the share of the variance
        found[f"seasonal strength {strength}"] = np.sqrt(strength) * season + np.sqrt(1 - strength) * noise
    for level in (0.01, 0.1, 1.0):
        found[f"noise {level} of a season and a trend"] = season + 3 * time / length + level * noise
    for root in (0.0, 0.5, 0.9, 1.0):  # AR(1): white noise to a random walk
        series = np.zeros_like(noise)
        for step in range(1, length):
            series[:, step] = root * series[:, step - 1] + noise[:, step]
        found[f"autoregression {root}"] = series
    return {name: 10 + series for name, series in found.items()}


@app.command()
def data(runs: Runs = RUNS, ratios: str = "0.15,0.075") -> None:
    """(d) What the reference loses by compression, on series of other kinds and lengths; calibrated on synthetic series."""
    model = load_chronos("reference")
    calibration = calibrate(model)
    small = {
        ratio: compress_pretrained(model, ratio=float(ratio), calibration=calibration) for ratio in ratios.split(",")
    }
    horizon = model.config.chronos_config["prediction_length"]
    settings = ChronosConfig(**model.config.chronos_config)
    groups = {f"{name}, context 256": series for name, series in processes(256 + horizon, HELD_OUT_SEED).items()}
    for context in (32, 64, 128, 512):
        drawn = processes(context + horizon, HELD_OUT_SEED)["seasonal strength 0.9"]
        groups[f"seasonal strength 0.9, context {context}"] = drawn
    rows: dict[str, dict[str, Any]] = {}
    for name, series in groups.items():
        pieces = torch.from_numpy(series).split([series.shape[1] - horizon, horizon], dim=1)
        batch = tokenize_windows(settings, *pieces)
        with torch.no_grad():
            output = model(**batch)
        states = StateSum()
        states.add(output.encoder_last_hidden_state.flatten(0, 1))
        rows[name] = {"cross-entropy": float(output.loss), "effective rank": float(states.spectrum().effective_rank)}
        rows[name] |= {f"added at {ratio}": held_out(model, [batch])(found) for ratio, found in small.items()}
    report(runs, "data", rows)


# --- (e): text ---------------------------------------------------------------------------------------------------


class TextBatches(torch.utils.data.Dataset):
    """Windows of the Python language reference that `pydoc` ships: tokens, and the tokens that follow."""

    def __init__(self, tokens: torch.Tensor, number: int, *, seed: int, context: int = 96, horizon: int = 16) -> None:
        self.tokens, self.number, self.seed, self.lengths = tokens, number, seed, (context, horizon)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.number:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index + 1])
        starts = rng.integers(len(self.tokens) - sum(self.lengths), size=SMALL.batch_tokens // sum(self.lengths))
        windows = torch.stack([self.tokens[start : start + sum(self.lengths)] for start in starts])
        context, target = windows.split(self.lengths, dim=1)
        return {
            "input_ids": context.contiguous(),
            "attention_mask": torch.ones_like(context),
            "labels": target.contiguous(),
        }


def text_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """The text as tokens of a byte-pair vocabulary of 4,096, learned from it: training part, and the last tenth of the topics."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [topics[name] for name in sorted(topics)]
    cut = len(texts) * 9 // 10
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts[:cut], trainer)
    parts = [[token for text in part for token in tokenizer.encode(text).ids] for part in (texts[:cut], texts[cut:])]
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def train_text(folder: Path, batches: TextBatches) -> T5ForConditionalGeneration:
    if folder.is_dir():
        return T5ForConditionalGeneration.from_pretrained(folder)
    set_seed(0)
    config = T5Config(**SHAPE, d_ff=256, vocab_size=4096, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    arguments = TrainingArguments(
        output_dir=str(folder.with_suffix(".work")),
        max_steps=len(batches),
        per_device_train_batch_size=1,
        learning_rate=SMALL.learning_rate,
        warmup_steps=100,
        lr_scheduler_type="cosine",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        logging_steps=250,
    )
    model = T5ForConditionalGeneration(config)
    Trainer(model=model, args=arguments, train_dataset=batches, data_collator=single_batch).train()
    model.eval().save_pretrained(folder)
    return model


@app.command()
def text(runs: Runs = RUNS, steps: Steps = STEPS, ratios: str = "0.5,0.25,0.15,0.075") -> None:
    """(e) A Chronos-T5 and a text T5 of one shape, each trained equally long, calibrated and scored on its own kind of data."""
    name = f"dense-seed0-steps{steps}"
    if not (runs / name).is_dir():
        pretrain(runs / name, replace(SMALL, steps=steps), show_progress=True)
    series = load_chronos(runs / name)
    objective = objective_of(series.config, type(series))
    train, test = text_tokens()
    words = train_text(runs / f"text-steps{steps}", TextBatches(train, steps, seed=0)).eval()
    sides = {
        "time series": (series, "synthetic", objective.batches("synthetic", 16, HELD_OUT_SEED)[0]),
        "text": (words, list(TextBatches(train, 32, seed=1)), list(TextBatches(test, 16, seed=2))),
    }
    rows: dict[str, dict[str, Any]] = {}
    for title, (model, data, batches) in sides.items():
        lost, calibration = held_out(model, batches), calibrate(model, data)
        with torch.no_grad():
            row = {"cross-entropy": mean(float(model(**batch).loss) for batch in batches)}
        row["attention silenced"] = lost(silenced(model))
        for ratio in ratios.split(","):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                row[f"added at {ratio}"] = lost(
                    compress_pretrained(model, ratio=float(ratio), calibration=calibration)
                )
        rows[title] = row
    report(runs, "text", rows)


def silenced(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose attention says nothing: what it is worth."""
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight_name, weight in copied.named_parameters():
            if weight_name.endswith(("Attention.o.weight",)):
                weight.zero_()
    return copied.eval()


if __name__ == "__main__":
    app()
