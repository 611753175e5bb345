"""Experiment on internals: compress a Chronos-Bolt, or train a smaller one?

    python examples/compress_or_train_smaller.py runs/smaller

Three sizes are trained for equal work (steps times parameters) on the same synthetic series; the largest is compressed, without training, to
several sizes; and one of its shape is trained with ranks from the start, ceil(d~_0 (1 + i)^alpha), as the paper does, for equal work too. All
forecast the 42 tasks, and are timed in turn against the largest. The folder gets the models, `results.json`, and a picture. What is there is
not made again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from chronos import BaseChronosPipeline
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from hf_lowrank import (
    PretrainingSettings,
    benchmark,
    calibrate,
    compress_pretrained,
    evaluate,
    pretrain,
    summarize,
)
from hf_lowrank.checkpoints.dense import load_chronos
from hf_lowrank.files import new_folder
from hf_lowrank.plots import STYLE, import_pyplot
from hf_lowrank.training.plan import plan_of

LARGEST = "d128"
# Four layers each; the shape of reference-bolt, and of it about half and a third of the parameters.
SIZES = {
    LARGEST: {"d_model": 128, "num_heads": 4, "d_kv": 32},
    "d96": {"d_model": 96, "num_heads": 4, "d_kv": 24},
    "d64": {"d_model": 64, "num_heads": 4, "d_kv": 16},
}
BOLT = PretrainingSettings(family="bolt", context_length=512, learning_rate=1.5e-3, trainer={"adam_beta2": 0.98})
RATIOS = (0.5, 0.25, 0.15, 0.08)  # of attention and feed-forward layers
KINDS = {"trained": "o-", "compressed": "s--", "trained with ranks": "^", "its attention alone compressed": "v"}


@dataclass(frozen=True)
class Row:
    """One model: how it came to be, and what it scored.

    Attributes:
        kind: One of `KINDS`.
        steps: Of its training; None where there was none.
        parameters: All of them.
        time_ratio: Of its forecasts over those of the largest, the median of rounds in turn.
        WQL, MASE: Relative to Seasonal Naive, geometric means over the tasks.
        WQL_of_largest: Its WQL relative to that of the largest, with the ends of a 95 % interval.
    """

    kind: str
    steps: int | None
    parameters: int
    time_ratio: float
    WQL: float
    MASE: float
    WQL_of_largest: tuple[float, float, float]


def trained(folder: Path, settings: PretrainingSettings, steps: int, work: int | None = None) -> int:
    """Train a model for so many steps, or as many as make so much work, if it is not there; the number of steps."""
    if work is not None:
        steps = round(work / plan_of(settings).parameters)
    settings = replace(settings, steps=steps, save_steps=max(1, steps // 8))
    if not folder.is_dir():
        pretrain(folder, settings, show_progress=True)
    found = json.loads((folder / "pretraining.json").read_text())["steps"]
    if found != steps:
        raise ValueError(f"{folder} was trained for {found} steps and not {steps}; give another folder.")
    return steps


def made(runs: Path, steps: int, base_rank: float, growth: float) -> dict[str, tuple[str, int | None]]:
    """The models, as folders of these names in `runs`, with the kind of each and its steps."""
    models: dict[str, tuple[str, int | None]] = {}
    largest = replace(BOLT, **SIZES[LARGEST])
    work = steps * plan_of(largest).parameters
    for name, size in SIZES.items():
        models[name] = ("trained", trained(runs / name, replace(BOLT, **size), steps, work))
    scheduled = replace(largest, base_rank=base_rank, rank_growth=growth)
    name = f"{LARGEST}-ranks-{base_rank:g}-{growth:g}"
    models[name] = ("trained with ranks", trained(runs / name, scheduled, steps, work))
    same = summarize(AutoConfig.from_pretrained(runs / name)).attention_ratio
    budgets = {f"{LARGEST}-total-{ratio:g}": ("compressed", {"total_ratio": ratio}) for ratio in RATIOS}
    # As much of the attention as the scheduled one has.
    budgets[f"{LARGEST}-attention-{same:.3f}"] = ("its attention alone compressed", {"ratio": same})
    dense = load_chronos(str(runs / LARGEST))
    calibration = None
    for name, (kind, budget) in budgets.items():
        models[name] = (kind, None)
        if not (runs / name).is_dir():
            calibration = calibration or calibrate(dense, show_progress=True)
            with new_folder(runs / name, overwrite=False) as target:
                compress_pretrained(dense, calibration=calibration, **budget).save_pretrained(target)
    return models


def time_ratio(folder: Path, largest: Path, repeats: int) -> float:
    if folder == largest:
        return 1.0
    timed = benchmark(str(folder), str(largest), batch_size=[32], context_length=[512], repeats=repeats)
    return median(timed.comparisons[0].ratios["time_ratio"])


def draw(rows: dict[str, Row], output: Path) -> None:
    """WQL against parameters and against time, a line from size to size."""
    plt = import_pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
        for kind, marker in KINDS.items():
            points = [row for row in rows.values() if row.kind == kind]
            if kind == "compressed":
                points.append(rows[LARGEST])
            points.sort(key=lambda row: row.parameters)
            losses = [row.WQL for row in points]
            axes[0].plot([row.parameters / 1e6 for row in points], losses, marker, label=kind)
            axes[1].plot([row.time_ratio for row in points], losses, marker)
        axes[0].set(xlabel="million parameters", ylabel="WQL, of Seasonal Naive's")
        axes[1].set_xlabel("time of a forecast, of the largest's")
        axes[0].legend()
        figure.savefig(output)
        plt.close(figure)


def main(
    runs: Annotated[Path, typer.Argument(help="The folder of models and results.")],
    steps: Annotated[int, typer.Option(help="Steps of the largest.")] = 2500,
    base_rank: Annotated[float, typer.Option(help="d~_0 of the model that is trained with ranks.")] = 3,
    growth: Annotated[float, typer.Option(help="alpha of it.")] = 0.5,
    tasks: Annotated[str, typer.Option(help="Of `hf-lowrank evaluate`.")] = "m1_yearly,packaged",
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
) -> None:
    """Train, compress, score and time all of them."""
    runs.mkdir(parents=True, exist_ok=True)
    models = made(runs, steps, base_rank, growth)
    folders = {name: str(runs / name) for name in models}
    scores = evaluate(
        folders, tasks.split(","), against=folders[LARGEST], cache=runs / "cells", show_progress=True
    ).aggregate
    rows: dict[str, Row] = {}
    for name, (kind, count) in models.items():
        own = scores[name if name in scores else folders[name]]
        naive = own["relative_to_seasonal_naive"]
        dense = own.get("relative_to_dense", {}).get("WQL", {"geometric_mean": 1.0, "low": 1.0, "high": 1.0})
        rows[name] = Row(
            kind,
            count,
            BaseChronosPipeline.from_pretrained(folders[name]).inner_model.num_parameters(),
            time_ratio(runs / name, runs / LARGEST, repeats),
            naive["WQL"]["geometric_mean"],
            naive["MASE"]["geometric_mean"],
            (dense["geometric_mean"], dense["low"], dense["high"]),
        )
    (runs / "results.json").write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=2) + "\n")
    draw(rows, runs / "compress-or-train-smaller.png")
    table = Table("", "steps", "million", "time", "WQL", "MASE", "WQL, of the largest's")
    for name, row in rows.items():
        mean, low, high = row.WQL_of_largest
        table.add_row(
            name,
            "" if row.steps is None else f"{row.steps:,}",
            f"{row.parameters / 1e6:.2f}",
            f"{row.time_ratio:.3f}",
            f"{row.WQL:.3f}",
            f"{row.MASE:.3f}",
            f"{mean:.3f} ({low:.3f} to {high:.3f})",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
