"""`hf-lowrank pretrain` and `hf-lowrank recover`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .options import (
    RANKS_WANTED,
    IdColumn,
    KnownCovariates,
    PastCovariates,
    TargetColumns,
    TimestampColumn,
    columns_of,
    json_object,
    json_option,
    with_columns,
)
from .output import plain_messages, write_json


def pretrain(  # as long as its list of options
    output: Annotated[Path | None, typer.Argument(help="The folder to write; with --plan, none.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML or JSON file of settings; the options below take their place.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Go on from this checkpoint, dense or compressed, in place of a fresh model.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="'t5' (default), 'bolt' or 'chronos2', of the size of reference-bolt.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="A published shape, such as t5-base, bolt-small or chronos-2.")
    ] = None,
    base_rank: Annotated[float | None, typer.Option(help="d~_0 of the schedule ceil(d~_0 (1 + i)^alpha).")] = None,
    rank_growth: Annotated[float | None, typer.Option(help="alpha of the schedule; default 0.")] = None,
    rank_rounding: Annotated[str | None, typer.Option(help="'ceil' (default) or 'pow2'.")] = None,
    ranks: Annotated[Path | None, typer.Option(help="A JSON file with an explicit table of attention ranks.")] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            help="Train a dense model to lose little when it is compressed to this total ratio; as often as you like."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your CSV or parquet file, columns as named below. Default: synthetic series."),
    ] = None,
    id_column: IdColumn = "item_id",
    timestamp_column: TimestampColumn = "timestamp",
    target: TargetColumns = None,
    past_covariates: PastCovariates = None,
    known_covariates: KnownCovariates = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default 8000.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate; default 2e-3.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, about; default 4096.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that make batches; default 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights and of the data; default 0.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the model's ranks and size, and stop.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run, or begin anew.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    json_file: Annotated[Path | None, json_option("the plan, or the record of the run,")] = None,
) -> None:
    """Pretrain a Chronos model of any family, low-rank or dense, from scratch or from a checkpoint."""
    with plain_messages(json_file) as console:
        from ..training.plan import plan_of
        from ..training.pretraining import pretrain as run
        from ..training.runs import is_main_process
        from ..training.settings import PretrainingSettings

        given: dict[str, Any] = {
            "start": start,
            "family": family,
            "shape": shape,
            "base_rank": base_rank,
            "rank_growth": rank_growth,
            "rank_rounding": rank_rounding,
            "attention_ranks": None if ranks is None else json_object("--ranks", ranks, RANKS_WANTED),
            "budgets": budget or None,
            "data": data,
            "steps": steps,
            "learning_rate": learning_rate,
            "batch_tokens": batch_tokens,
            "workers": workers,
            "seed": seed,
        }
        given = {name: value for name, value in given.items() if value is not None}
        settings = PretrainingSettings(**given) if config is None else PretrainingSettings.from_file(config, **given)
        columns = columns_of(target, past_covariates, known_covariates, id_column, timestamp_column)
        settings = replace(settings, data=with_columns("--data", settings.data, columns))
        is_main = is_main_process()
        planned = plan_of(settings)
        if is_main:
            console.print(planned.text, soft_wrap=True, highlight=False)
        if plan:
            if is_main:
                write_json(json_file, asdict(planned))
            return
        if output is None:
            raise ValueError("OUTPUT is missing: the folder to write.")
        run(output, settings, resume=resume, overwrite=overwrite, show_progress=True)
        record = json.loads((output / "pretraining.json").read_text())
        if is_main:
            write_json(json_file, record)
            loss = f"; loss {record['held_out_loss']:.3f} on held-out series" if "held_out_loss" in record else ""
            for size, within in record.get("held_out_loss_within", {}).items():
                loss += f", {within:.3f} at a total ratio of {size}"
            console.print(f"{output}: {record['steps']:,} steps{loss}.", soft_wrap=True, highlight=False)


def recover(
    compressed: Annotated[str, typer.Argument(help="The compressed Chronos model: a folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    teacher: Annotated[str, typer.Option(help="The dense model it was made from: Hub id, folder, or 'reference'.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Your CSV or parquet file: columns item_id, timestamp, target. Default: synthetic series."),
    ] = None,
    id_column: IdColumn = "item_id",
    timestamp_column: TimestampColumn = "timestamp",
    target: TargetColumns = None,
    past_covariates: PastCovariates = None,
    known_covariates: KnownCovariates = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps, at most.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-4,
    distillation_weight: Annotated[
        float, typer.Option(help="1: learn from the teacher alone; 0: from the series alone.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(help="Of the distillation of a Chronos-T5.")] = 1.0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, about.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the training windows.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run, or begin anew.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    json_file: Annotated[Path | None, json_option("the record of the run")] = None,
) -> None:
    """Fine-tune a compressed model for a short while on what its dense teacher says, or with it on your series."""
    with plain_messages(json_file) as console:
        from ..training.distillation import recover as run

        columns = columns_of(target, past_covariates, known_covariates, id_column, timestamp_column)
        model = run(
            compressed,
            teacher,
            output,
            series=with_columns("--data", "synthetic" if data is None else data, columns),
            steps=steps,
            learning_rate=learning_rate,
            distillation_weight=distillation_weight,
            temperature=temperature,
            batch_tokens=batch_tokens,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            show_progress=True,
        )
        record = model.config.compression["recovery"]
        write_json(json_file, {"output": str(output), "recovery": record})
        before, after = record["before"], record["after"]
        table = Table(
            title=f"{compressed} before and after {record['best_step']} steps", caption="On held-out windows."
        )
        for heading in ("", "before", "after", "teacher"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_row("WQL", *(f"{wql:.4f}" for wql in (before["wql"], after["wql"], record["teacher_wql"])))
        table.add_row("loss of the training", f"{before['loss']:.4f}", f"{after['loss']:.4f}", "")
        console.print(table)
        console.print(f"The recovered model is in {output}.")
