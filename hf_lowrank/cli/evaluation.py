"""`hf-lowrank evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .options import CHECKPOINT, Device, check_file, json_option
from .output import messages, plain_messages, write_json

if TYPE_CHECKING:
    from ..evaluation.evaluate import EvaluationResult
    from ..evaluation.tasks import EvaluationTask


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
        list[Path] | None, typer.Option(help="Your own CSV or parquet file: columns item_id, timestamp, target.")
    ] = None,
    horizon: Annotated[int | None, typer.Option(help="Steps to forecast, for --file.")] = None,
    freq: Annotated[
        str | None, typer.Option(help="Put the series of --file on this grid, such as 'h' or 'D'.")
    ] = None,
    seasonality: Annotated[int | None, typer.Option(help="Steps in a season of --file; default by frequency.")] = None,
    num_windows: Annotated[int, typer.Option(help="Evaluation windows of --file.")] = 1,
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
    list_: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
) -> None:
    """Score models on forecasting tasks, relative to Seasonal Naive and to a dense model."""
    with plain_messages(json_file) as console:
        from ..evaluation.evaluate import evaluate as run
        from ..evaluation.tasks import file_task, list_tasks
        from ..files import check_place

        if list_:
            report_tasks(console, list_tasks(), json_file)
            return
        if file and horizon is None:
            raise ValueError("--file needs --horizon, the number of steps to forecast.")
        if csv_file is not None:
            check_file("--csv", csv_file, ".csv")
        if cache is not None:
            check_place(cache / "scores.json", "--cache")
        if not models and against is None:
            raise ValueError(f"MODELS are missing; each is a {CHECKPOINT}.")
        chosen: list[str | EvaluationTask] = [name for entry in tasks or [] for name in entry.split(",")]
        for path in file or []:
            task = file_task(path, horizon=horizon or 0, freq=freq, seasonality=seasonality, num_windows=num_windows)
            by_default = ", that of its frequency; --seasonality says another one" if seasonality is None else ""
            messages.print(
                f"{task.name}: a season has {task.seasonality} steps{by_default}.", soft_wrap=True, highlight=False
            )
            chosen.append(task)
        result = run(
            models or [],
            chosen or ("m1_yearly", "packaged"),
            against=against,
            batch_size=batch_size,
            num_samples=num_samples,
            seed=seed,
            cache=cache,
            device=device,
            dtype=dtype,
            show_progress=True,
        )
        write_json(json_file, result.to_dict())
        if csv_file is not None:
            result.save(csv_file)
        print_evaluation(console, result)


def report_tasks(console: Console, groups: Mapping[str, Sequence[EvaluationTask]], json_file: Path | None) -> None:
    """The known tasks by group."""
    columns = ("name", "horizon", "seasonality", "num_windows")
    rows = {
        group: [{column: getattr(task, column) for column in columns} for task in groups[group]] for group in groups
    }
    write_json(json_file, rows)
    table = Table(title="Tasks")
    for heading in ("group", "task", "horizon", "seasonality", "windows"):
        is_name = heading in ("group", "task")
        table.add_column(heading, justify="left" if is_name else "right", overflow="fold", no_wrap=is_name)
    for group, tasks in rows.items():
        for task in tasks:
            table.add_row(group, *map(str, task.values()))
    console.print(table)


def print_evaluation(console: Console, result: EvaluationResult) -> None:
    """A table of scores by task, and one of the aggregate."""
    table = Table(title="Scores")
    for heading in ("task", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("WQL", "MASE", "SQL", "RMSSE", "series", "season", "seconds"):
        table.add_column(heading, justify="right")
    for row in result.results:
        scores = (f"{value:.4f}" for value in (row.WQL, row.MASE, row.SQL, row.RMSSE))
        table.add_row(row.task, row.model, *scores, str(row.num_series), str(row.seasonality), f"{row.seconds:.1f}")
    console.print(table)
    table = Table(
        title="Geometric means of relative scores (95 % interval over tasks)",
        caption="Below 1 is better than the baseline. Of a single task there is no interval.",
    )
    for heading in ("model", "relative to"):
        table.add_column(heading, overflow="fold")
    for heading in ("WQL", "MASE", "SQL", "RMSSE", "tasks"):
        table.add_column(heading, justify="right")
    baselines = {"relative_to_seasonal_naive": "seasonal_naive", "relative_to_dense": result.settings["against"]}
    for model, aggregate in result.aggregate.items():
        for title, baseline in baselines.items():
            if title in aggregate:
                means = list(aggregate[title].values())
                table.add_row(model, baseline, *map(_mean_with_interval, means), str(means[0]["num_tasks"]))
    console.print(table)


def _mean_with_interval(mean: Mapping[str, Any]) -> str:
    if mean["num_tasks"] == 0:
        return "-"
    interval = f" ({mean['low']:.3f} to {mean['high']:.3f})" if mean["num_tasks"] > 1 else ""
    return f"{mean['geometric_mean']:.3f}{interval}"
