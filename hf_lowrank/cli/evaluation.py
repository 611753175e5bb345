"""`hf-lowrank evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from .options import (
    CHECKPOINT,
    Device,
    IdColumn,
    KnownCovariates,
    PastCovariates,
    TargetColumns,
    TimestampColumn,
    check_file,
    columns_of,
    json_option,
)
from .output import fits, in_terminal, messages, plain_messages, write_json

if TYPE_CHECKING:
    from ..evaluation.published import Standing
    from ..evaluation.result import EvaluationResult
    from ..evaluation.tasks import EvaluationTask

LAYOUTS = {".md": "markdown", ".html": "html", ".csv": "csv"}  # of --tables


def evaluate(  # as long as its list of options
    models: Annotated[list[str] | None, typer.Argument(help=f"Each a {CHECKPOINT}; any Chronos family.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks or groups, separated by commas; see --list. Default: m1_yearly,packaged."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="The dense model to make scores relative to.")] = None,
    json_file: Annotated[Path | None, json_option("results and aggregate, or the list of tasks,")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the results to this file.")] = None,
    file: Annotated[
        list[Path] | None, typer.Option(help="Your own CSV or parquet file, a row a time of a series.")
    ] = None,
    horizon: Annotated[int | None, typer.Option(help="Steps to forecast, for --file.")] = None,
    freq: Annotated[
        str | None, typer.Option(help="Put the series of --file on this grid, such as 'h' or 'D'.")
    ] = None,
    seasonality: Annotated[int | None, typer.Option(help="Steps in a season of --file; default by frequency.")] = None,
    num_windows: Annotated[int, typer.Option(help="Evaluation windows of --file.")] = 1,
    id_column: IdColumn = "item_id",
    timestamp_column: TimestampColumn = "timestamp",
    target: TargetColumns = None,
    past_covariates: PastCovariates = None,
    known_covariates: KnownCovariates = None,
    batch_size: Annotated[int, typer.Option(help="Series in a batch.")] = 32,
    num_samples: Annotated[int | None, typer.Option(help="Sample paths of a Chronos-T5 forecast.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples, the same for every model.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Keep finished cells in this folder and do not repeat them.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="'float32', 'bfloat16', 'float16', or 'auto' as in the file.")
    ] = "float32",
    metric: Annotated[Literal["WQL", "MASE", "SQL", "RMSSE"], typer.Option(help="Of the table of tasks.")] = "WQL",
    layout: Annotated[
        Literal["table", "markdown", "html", "csv"], typer.Option("--format", help="How the tables are printed.")
    ] = "table",
    tables: Annotated[
        Path | None, typer.Option(help="Write the tables to this .md, .html or .csv file as well.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the scores by task, relative to Seasonal Naive's, to this picture.")
    ] = None,
    beside: Annotated[
        Literal["published"] | None,
        typer.Option(
            help="Show where the models stand among published ones, on tasks of chronos_zeroshot or fev_bench."
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
) -> None:
    """Score models on forecasting tasks, relative to Seasonal Naive and to a dense model."""
    with plain_messages(json_file) as console:
        from ..evaluation.evaluate import evaluate as run
        from ..evaluation.known_tasks import find_tasks, list_tasks
        from ..evaluation.published import check_published
        from ..evaluation.tasks import file_task

        if list_:
            report_tasks(console, list_tasks(), json_file)
            return
        if file and horizon is None:
            raise ValueError("--file needs --horizon, the number of steps to forecast.")
        columns = columns_of(target, past_covariates, known_covariates, id_column, timestamp_column)
        if columns != type(columns)() and not file:
            raise ValueError(
                "--id-column, --timestamp-column, --target and covariates are those of --file, which is missing."
            )
        check_outputs(csv_file, tables, plot, cache)
        if not models and against is None:
            raise ValueError(f"MODELS are missing; each is a {CHECKPOINT}.")
        chosen: list[str | EvaluationTask] = [name for entry in tasks or [] for name in entry.split(",")]
        for path in file or []:
            task = file_task(
                path,
                horizon=horizon or 0,
                freq=freq,
                seasonality=seasonality,
                num_windows=num_windows,
                **columns.arguments,
            )
            by_default = ", that of its frequency; --seasonality says another one" if seasonality is None else ""
            messages.print(
                f"{task.name}: a season has {task.seasonality} steps{by_default}.", soft_wrap=True, highlight=False
            )
            chosen.append(task)
        chosen = chosen or ["m1_yearly", "packaged"]
        if beside is not None:
            check_published(task.name for task in find_tasks(chosen))
        result = run(
            models or [],
            chosen,
            against=against,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            cache=cache,
            device=device,
            dtype=dtype,
            show_progress=True,
        )
        standings = [] if beside is None else result.beside_published()
        published = {"beside_published": [standing.to_dict() for standing in standings]} if standings else {}
        write_json(json_file, result.to_dict() | published)
        write_files(result, standings, metric, csv_file=csv_file, tables=tables, plot=plot)
        print_evaluation(console, result, standings, metric=metric, layout=layout)


def check_outputs(csv_file: Path | None, tables: Path | None, plot: Path | None, cache: Path | None) -> None:
    """Raise an error that names the option where something cannot be written; before long work."""
    from ..files import check_place
    from ..plots import check_plot

    if csv_file is not None:
        check_file("--csv", csv_file, ".csv")
    if tables is not None:
        check_file("--tables", tables, *LAYOUTS)
    if plot is not None:
        check_plot("--plot", plot)
    if cache is not None:
        check_place(cache / "scores.json", "--cache")


def report_tasks(console: Console, groups: Mapping[str, Sequence[EvaluationTask]], json_file: Path | None) -> None:
    """The known tasks by group."""
    columns = ("name", "horizon", "seasonality", "num_windows", "main_metric")
    rows = {
        group: [{column: getattr(task, column) for column in columns} for task in groups[group]] for group in groups
    }
    write_json(json_file, rows)
    table = Table(title="Tasks")
    for heading in ("group", "task", "horizon", "seasonality", "windows", "main metric"):
        is_name = heading in ("group", "task", "main metric")
        table.add_column(heading, justify="left" if is_name else "right", overflow="fold", no_wrap=is_name)
    for group, tasks in rows.items():
        for task in tasks:
            table.add_row(group, *map(str, task.values()))
    console.print(table)


def write_files(
    result: EvaluationResult,
    standings: Sequence[Standing],
    metric: str,
    *,
    csv_file: Path | None,
    tables: Path | None,
    plot: Path | None,
) -> None:
    """Write what `--csv`, `--tables` and `--plot` ask for."""
    from ..evaluation.plots import plot_scores
    from ..files import write_text

    if csv_file is not None:
        result.save(csv_file)
    if tables is not None:
        write_text(tables, as_text(result, standings, metric, LAYOUTS[tables.suffix]))
    if plot is not None:
        plot_scores(result, plot, metric)


def print_evaluation(
    console: Console, result: EvaluationResult, standings: Sequence[Standing], *, metric: str, layout: str
) -> None:
    """All tables, as the terminal has room for them, or as text of another layout."""
    if layout != "table":
        console.print(as_text(result, standings, metric, layout), end="", soft_wrap=True, highlight=False)
        return
    for table in [*result.tables(metric, partial(fits, console)), *(standing.table() for standing in standings)]:
        console.print(in_terminal(table))


def as_text(result: EvaluationResult, standings: Sequence[Standing], metric: str, layout: str) -> str:
    """All tables in Markdown, HTML or CSV."""
    from ..text_tables import WRITERS

    return "\n".join(map(WRITERS[layout], [*result.tables(metric), *(standing.table() for standing in standings)]))
