"""The command line `hf-lowrank`: a thin layer, one function a command."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..checkpoints.summary import CompressionSummary
    from ..evaluation.evaluate import EvaluationResult

app = typer.Typer(
    name="hf-lowrank",
    help="Make Chronos time-series foundation models small and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
messages = Console(stderr=True)


@contextmanager
def plain_messages() -> Iterator[None]:
    """Errors and warnings as one line for people, and no chatter of the libraries below."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            messages.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error
        finally:
            for warning in caught:
                if issubclass(warning.category, UserWarning):
                    messages.print(f"[bold yellow]warning:[/] {warning.message}", soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


@app.command()
def compress(
    source: Annotated[str, typer.Argument(help="Hub id, folder, 'reference' or 'reference-bolt'.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    ratio: Annotated[float | None, typer.Option(help="Keep at most this share of the attention parameters.")] = None,
    total_ratio: Annotated[
        float | None, typer.Option(help="The same of attention and feed-forward parameters together.")
    ] = None,
    max_cache_ratio: Annotated[
        float | None, typer.Option(help="Keep at most this share of the key/value cache.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Forecast this many times as fast, by what ranks cost on this machine.")
    ] = None,
    feed_forward_ratio: Annotated[
        float | None, typer.Option(help="Keep at most this share of the feed-forward parameters.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Keep singular values with sigma_j / sigma_1 >= epsilon.")
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Drop at most this share of each component's loss.")] = None,
    uniform: Annotated[int | None, typer.Option(help="The same rank everywhere.")] = None,
    base_rank: Annotated[float | None, typer.Option(help="d~_0 of the schedule ceil(d~_0 (1 + i)^alpha).")] = None,
    rank_growth: Annotated[float | None, typer.Option(help="alpha of the schedule; default 0.")] = None,
    rank_rounding: Annotated[str | None, typer.Option(help="'ceil' (default) or 'pow2'.")] = None,
    ranks: Annotated[Path | None, typer.Option(help="A JSON file with an explicit table of ranks.")] = None,
    form: Annotated[
        str, typer.Option(help="'auto', 'per_head', 'latent', or KIND=FORM,... for each kind of attention.")
    ] = "auto",
    method: Annotated[str, typer.Option(help="'joint', or 'paper' for the baseline.")] = "joint",
    multiple_of: Annotated[int, typer.Option(help="Round ranks up to a multiple.")] = 1,
    calibration: Annotated[
        str,
        typer.Option(
            help="'synthetic', 'none' (weights alone), a CSV or parquet file of series, or a file of --save-calibration."
        ),
    ] = "synthetic",
    save_calibration: Annotated[
        Path | None, typer.Option(help="Keep the calibration in this .safetensors file, for other compressions.")
    ] = None,
    refit: Annotated[bool, typer.Option(help="Refit the last matrix of each layer by least squares.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the calibration.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Turn a dense Chronos-T5 (or any T5) checkpoint into a low-rank one."""
    from .. import compress_pretrained, save_compressed, summarize
    from ..compression.calibration import calibrate
    from ..files import check_output

    with plain_messages():
        if base_rank is None and (rank_growth is not None or rank_rounding is not None):
            raise ValueError("--rank-growth and --rank-rounding need --base-rank.")
        schedule = None if base_rank is None else (base_rank, rank_growth or 0.0, rank_rounding or "ceil")
        arguments: dict[str, Any] = {
            "ratio": ratio,
            "total_ratio": total_ratio,
            "max_cache_ratio": max_cache_ratio,
            "target_speedup": target_speedup,
            "feed_forward_ratio": feed_forward_ratio,
            "epsilon": epsilon,
            "energy": energy,
            "uniform": uniform,
            "schedule": schedule,
            "ranks": None if ranks is None else json.loads(ranks.read_text()),
            "form": dict(pair.split("=", 1) for pair in form.split(",")) if "=" in form else form,
            "method": method,
            "multiple_of": multiple_of,
            "refit": refit,
            "seed": seed,
        }
        check_output(output, overwrite=overwrite)
        data: Any = None if calibration == "none" else calibration
        if save_calibration is not None:
            if data is None or method == "paper":
                raise ValueError("--save-calibration needs a calibration; this compression looks at no data.")
            data = calibrate(source, data, seed=seed, show_progress=True)
            data.save(save_calibration)
        model = compress_pretrained(source, **arguments, calibration=data, show_progress=True)
        save_compressed(model, output, overwrite=overwrite)
        summary, width = summarize(model.config), model.dtype.itemsize
        parameters = model.num_parameters()
        dense_parameters = parameters - summary.total("parameters") + summary.total("dense_parameters")
        if as_json:
            print_json(
                {
                    "output": str(output),
                    "parameters": parameters,
                    "dense_parameters": dense_parameters,
                    "bytes": parameters * width,
                    "dense_bytes": dense_parameters * width,
                    "compression": model.config.compression,
                    **summary.to_dict(bytes_per_number=width),
                }
            )
            return
        console.print(compression_table(summary, width))
        if method == "paper":
            console.print(
                f"The paper's method keeps {model.config.compression['kept_rank_ratio']:.1%} of the ranks and all the "
                "dense shapes: nothing is smaller or faster."
            )
        console.print(
            f"{output}: {parameters:,} of {dense_parameters:,} parameters ({parameters / dense_parameters:.1%}), "
            f"{parameters * width / 2**20:.1f} of {dense_parameters * width / 2**20:.1f} MiB; "
            f"attention {summary.attention_ratio:.1%}, cache {summary.cache_ratio:.1%}."
        )


def compression_table(summary: CompressionSummary, width: int) -> Table:
    """A row a layer that has changed, and the totals; `width` is the number of bytes of a number, cache that of a token."""

    def short(number: int) -> str:
        return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"

    table = Table(title="Each layer, before → after; ranks kept / had", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("layer", no_wrap=True)
    table.add_column("ranks", min_width=18)
    for heading in ("parameters", "KiB", "cache B"):
        table.add_column(heading, justify="right", no_wrap=True)
    changed = [row for row in summary.rows if row.ranks != row.dense_ranks]
    for row in changed:
        table.add_row(
            f"{row.kind} {row.layer}",
            row.ranks_text,
            f"{short(row.dense_parameters)} → {short(row.parameters)}",
            f"{row.dense_parameters * width / 1024:,.0f} → {row.parameters * width / 1024:,.0f}",
            f"{row.dense_cached_numbers * width:,} → {row.cached_numbers * width:,}"
            if row.dense_cached_numbers
            else "",
        )
    table.add_section()
    before, now = summary.total("dense_parameters"), summary.total("parameters")
    cached_before, cached = summary.total("dense_cached_numbers"), summary.total("cached_numbers")
    table.add_row(
        "all layers",
        f"{len(changed)} of {len(summary.rows)} changed",
        f"{short(before)} → {short(now)}",
        f"{before * width / 1024:,.0f} → {now * width / 1024:,.0f}",
        f"{cached_before * width:,} → {cached * width:,}",
    )
    return table


@app.command()
def recover(
    compressed: Annotated[str, typer.Argument(help="The compressed Chronos-T5: a folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    teacher: Annotated[str, typer.Option(help="The dense model it was made from: Hub id, folder, or 'reference'.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Your CSV or parquet file: columns item_id, timestamp, target. Default: synthetic series."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-4,
    distillation_weight: Annotated[
        float, typer.Option(help="1: learn from the teacher alone; 0: from the series alone.")
    ] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the training windows.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run, or begin anew.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the run as JSON.")] = False,
) -> None:
    """Fine-tune a compressed model for a short while on what its dense teacher says."""
    with plain_messages():
        from ..training.distillation import recover as run

        model = run(
            compressed,
            teacher,
            output,
            series="synthetic" if data is None else data,
            steps=steps,
            learning_rate=learning_rate,
            distillation_weight=distillation_weight,
            temperature=temperature,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            show_progress=True,
        )
        record = model.config.compression["recovery"]
        if as_json:
            print_json({"output": str(output), "recovery": record})
            return
        before, after = record["before"], record["after"]
        table = Table(
            title=f"{compressed} before and after {steps} steps", caption="On held-out windows, in nats a token."
        )
        for heading in ("", "before", "after", "teacher"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_row("KL from the teacher", f"{before['divergence']:.4f}", f"{after['divergence']:.4f}", "0")
        losses = before["cross_entropy"], after["cross_entropy"], after["teacher_cross_entropy"]
        table.add_row("cross-entropy", *(f"{loss:.4f}" for loss in losses))
        console.print(table)
        console.print(f"The recovered model is in {output}.")


@app.command()
def demo(
    source: Annotated[
        str, typer.Option(help="A Chronos checkpoint: Hub id, folder, 'reference' or 'reference-bolt'.")
    ] = "reference",
    ratios: Annotated[str, typer.Option(help="Shares of the attention to keep.")] = "0.5,0.25,0.15",
    plot: Annotated[Path, typer.Option(help="Where to write the picture of the forecasts.")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Seed of the samples, the same for every model.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compress a checkpoint at a few ratios and forecast real series with all models, side by side."""
    with plain_messages():
        from ..experiments.demo import demo as run

        rows = run(
            source, ratios=[float(ratio) for ratio in ratios.split(",")], plot=plot, seed=seed, console=messages
        )
        if as_json:
            print_json({"source": source, "plot": str(plot), "results": [asdict(row) for row in rows]})
            return
        table = Table(
            title=f"{source} on four real series",
            caption="paper: the published post-training method, which keeps all dense shapes; its share is that of the ranks. "
            "Time is for all forecasts, relative to dense in the same run: median, least and most of three rounds. "
            "WQL and MASE are geometric means relative to Seasonal Naive: below 1 is better.",
        )
        table.add_column("kept", no_wrap=True)
        for heading in ("MiB", "cache B/token", "time", "spread", "WQL", "MASE"):
            table.add_column(heading, justify="right", no_wrap=True)
        base = rows[0].seconds[0]
        for row in rows:
            median, least, most = (value / base for value in row.seconds)
            table.add_row(
                row.name,
                f"{row.bytes / 2**20:.1f}",
                f"{row.cache_bytes:,}",
                f"{median:.2f}",
                f"{least:.2f} to {most:.2f}",
                f"{row.wql:.3f}",
                f"{row.mase:.3f}",
                end_section=row.name == "dense" or row.name.startswith("paper"),
            )
        console.print(table)
        console.print(f"The dense model took {base:.1f} s. Forecasts are drawn in {plot}.")


@app.command()
def evaluate(
    models: Annotated[
        list[str] | None, typer.Argument(help="Hub ids, folders, or 'reference'; any Chronos family.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks or groups, separated by commas; see --list. Default: m1_yearly,packaged."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="The dense model to make scores relative to.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write results and aggregate to this file.")] = None,
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
    device: Annotated[
        str | None, typer.Option(help="Such as 'cpu' or 'cuda'; default the GPU if there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32' or 'bfloat16'.")] = "float32",
    list_: Annotated[bool, typer.Option("--list", help="List the tasks and stop.")] = False,
) -> None:
    """Score models on forecasting tasks, relative to Seasonal Naive and to a dense model."""
    with plain_messages():
        from ..evaluation.evaluate import evaluate as run
        from ..evaluation.tasks import EvaluationTask, file_task, list_tasks

        if list_:
            table = Table(title="Tasks")
            for heading in ("group", "task", "horizon", "seasonality", "windows"):
                table.add_column(heading, justify="left" if heading in ("group", "task") else "right")
            for group, members in list_tasks().items():
                for task in members:
                    table.add_row(group, task.name, *map(str, (task.horizon, task.seasonality, task.num_windows)))
            console.print(table)
            return
        if file and horizon is None:
            raise ValueError("--file needs --horizon, the number of steps to forecast.")
        for name in (json_file, csv_file):
            if name is not None and name.suffix != (".json" if name is json_file else ".csv"):
                raise ValueError(f"--json takes a .json file and --csv a .csv file, found {str(name)!r}.")
        chosen: list[str | EvaluationTask] = [name for entry in tasks or [] for name in entry.split(",")]
        for path in file or []:
            chosen.append(
                file_task(path, horizon=horizon or 0, freq=freq, seasonality=seasonality, num_windows=num_windows)
            )
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
            progress=True,
        )
        for name in (json_file, csv_file):
            if name is not None:
                result.save(name)
        print_evaluation(result)


def print_evaluation(result: EvaluationResult) -> None:
    """A table of scores by task, and one of the aggregate."""
    table = Table(title="Scores")
    for heading in ("task", "model"):
        table.add_column(heading, overflow="fold")
    for heading in ("WQL", "MASE", "SQL", "RMSSE", "series", "seconds"):
        table.add_column(heading, justify="right")
    for row in result.results:
        scores = (f"{value:.4f}" for value in (row.WQL, row.MASE, row.SQL, row.RMSSE))
        table.add_row(row.task, row.model, *scores, str(row.num_series), f"{row.seconds:.1f}")
    console.print(table)
    table = Table(
        title="Geometric means of relative scores (95 % interval over tasks)",
        caption="Below 1 is better than the baseline.",
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
                cells = (f"{m['geometric_mean']:.3f} ({m['low']:.3f} to {m['high']:.3f})" for m in means)
                table.add_row(model, baseline, *cells, str(means[0]["num_tasks"]))
    console.print(table)


@app.command()
def pretrain(
    output: Annotated[Path | None, typer.Argument(help="The folder to write; with --plan, none.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML or JSON file of settings; the options below take their place.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Go on from this checkpoint, dense or compressed, in place of a fresh model.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="'t5' (default) or 'bolt', of the reference's size.")] = None,
    shape: Annotated[str | None, typer.Option(help="A published shape, such as t5-base or bolt-small.")] = None,
    base_rank: Annotated[float | None, typer.Option(help="d~_0 of the schedule ceil(d~_0 (1 + i)^alpha).")] = None,
    rank_growth: Annotated[float | None, typer.Option(help="alpha of the schedule; default 0.")] = None,
    rank_rounding: Annotated[str | None, typer.Option(help="'ceil' (default) or 'pow2'.")] = None,
    ranks: Annotated[Path | None, typer.Option(help="A JSON file with an explicit table of attention ranks.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your CSV or parquet file: columns item_id, timestamp, target. Default: synthetic series."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default 8000.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate; default 2e-3.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, about; default 4096.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that make batches; default 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the initial weights and of the data; default 0.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the model's ranks and size, and stop.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run, or begin anew.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan, or the record of the run, as JSON.")
    ] = False,
) -> None:
    """Pretrain a Chronos-T5 or Chronos-Bolt, low-rank or dense, from scratch or from a checkpoint."""
    with plain_messages():
        from ..training.pretraining import PretrainingSettings, plan_of
        from ..training.pretraining import pretrain as run

        given: dict[str, Any] = {
            "start": start,
            "family": family,
            "shape": shape,
            "base_rank": base_rank,
            "rank_growth": rank_growth,
            "rank_rounding": rank_rounding,
            "attention_ranks": None if ranks is None else json.loads(ranks.read_text()),
            "data": data,
            "steps": steps,
            "learning_rate": learning_rate,
            "batch_tokens": batch_tokens,
            "workers": workers,
            "seed": seed,
        }
        given = {name: value for name, value in given.items() if value is not None}
        settings = PretrainingSettings(**given) if config is None else PretrainingSettings.from_file(config, **given)
        is_main = os.environ.get("RANK", "0") == "0"  # of the processes that `accelerate launch` starts
        planned = plan_of(settings)
        if plan and as_json:
            print_json(asdict(planned))
        elif is_main and not as_json:
            console.print(planned.text, soft_wrap=True, highlight=False)
        if plan:
            return
        if output is None:
            raise ValueError("OUTPUT is missing: the folder to write.")
        run(output, settings, resume=resume, overwrite=overwrite, show_progress=True)
        record = json.loads((output / "pretraining.json").read_text())
        if is_main and as_json:
            print_json(record)
        elif is_main:
            loss = f"; loss {record['held_out_loss']:.3f} on held-out series" if "held_out_loss" in record else ""
            console.print(f"{output}: {record['steps']:,} steps{loss}.", soft_wrap=True, highlight=False)


@app.command()
def forecast(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, 'reference' or 'reference-bolt'; any family, dense or compressed.")
    ],
    input_: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="Your CSV or parquet file, of any size; a series' rows follow each other."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The CSV or parquet file to write.")],
    horizon: Annotated[
        int | None, typer.Option("--horizon", "--prediction-length", help="Steps to forecast. Default: the model's.")
    ] = None,
    quantiles: Annotated[str, typer.Option(help="Quantile levels.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    batch_size: Annotated[int, typer.Option(help="Series in a batch.")] = 32,
    context_length: Annotated[
        int | None, typer.Option(help="Past steps that the model sees. Default: the model's.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Sample paths of a Chronos-T5 forecast.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    freq: Annotated[str | None, typer.Option(help="Put the series on this grid, such as 'h' or 'D'.")] = None,
    id_column: Annotated[str, typer.Option(help="The column that names the series.")] = "item_id",
    timestamp_column: Annotated[str, typer.Option(help="The column of the times.")] = "timestamp",
    target: Annotated[str, typer.Option(help="The column of the values.")] = "target",
    chunk_rows: Annotated[int, typer.Option(help="Rows of INPUT in memory at once.")] = 100_000,
    device: Annotated[
        str | None, typer.Option(help="Such as 'cpu' or 'cuda'; default the GPU if there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="'float32' or 'bfloat16'.")] = "float32",
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run, or begin anew.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Forecast every series of a file that may be larger than memory."""
    with plain_messages():
        from ..forecasting.forecast import forecast_file

        try:
            levels = [float(level) for level in quantiles.split(",")]
        except ValueError:
            raise ValueError(f"--quantiles must be numbers such as 0.1,0.5,0.9, found {quantiles!r}.") from None
        summary = forecast_file(
            model,
            input_,
            output,
            horizon=horizon,
            quantiles=levels,
            batch_size=batch_size,
            context_length=context_length,
            num_samples=num_samples,
            seed=seed,
            freq=freq,
            id_column=id_column,
            timestamp_column=timestamp_column,
            target=target,
            chunk_rows=chunk_rows,
            device=device,
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            show_progress=True,
        )
        if as_json:
            print_json(summary.to_dict())
            return
        if summary.num_left_out:
            named = ", ".join(summary.left_out) + (", ..." if summary.num_left_out > len(summary.left_out) else "")
            messages.print(
                f"[bold yellow]warning:[/] {summary.num_left_out} series have no value in the context and are left out: {named}",
                soft_wrap=True,
                highlight=False,
            )
        resumed = f", {summary.num_resumed:,} of them in an earlier run" if summary.num_resumed else ""
        console.print(
            f"{output}: {summary.num_forecast_rows:,} rows, forecasts of {summary.num_series - summary.num_left_out:,} series{resumed}; "
            f"{summary.seconds:.1f} s, {summary.series_per_second:.1f} series/s.",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder, or 'reference'; any Chronos family, dense or compressed.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The checkpoint to compare MODEL with.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="In place of MODEL: a published shape with random weights, such as t5-base.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="For --shape: the share of the attention to keep.")] = None,
    form: Annotated[str | None, typer.Option(help="For --shape: 'per_head' (default) or 'latent'.")] = None,
    feed_forward_ratio: Annotated[
        float | None, typer.Option(help="For --shape: the share of the feed-forward width to keep.")
    ] = None,
    batch_size: Annotated[
        list[str] | None, typer.Option(help="Series at once; this and the next three take lists such as 1,8.")
    ] = None,
    context_length: Annotated[list[str] | None, typer.Option(help="Past time steps.")] = None,
    prediction_length: Annotated[list[str] | None, typer.Option(help="Future time steps.")] = None,
    num_samples: Annotated[list[str] | None, typer.Option(help="Sample paths of a Chronos-T5 forecast.")] = None,
    dtype: Annotated[str, typer.Option(help="'float32' or 'bfloat16'.")] = "float32",
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; default the GPU if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default PyTorch's choice.")] = None,
    repeats: Annotated[int, typer.Option(help="Forecasts of each side that are timed.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the series, the samples and random weights.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Time and memory of a checkpoint against another one, in one run, and the distance to the floor."""
    with plain_messages():
        from ..benchmarking.benchmark import benchmark, benchmark_shape, integers

        if model is not None and shape is not None:
            raise ValueError(f"Give either MODEL with --against, or --shape; found {model!r} and --shape {shape!r}.")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"--json must be a file in a folder that exists, found {str(json_file)!r}.")
        sizes = {
            "batch_size": batch_size or ["8"],
            "context_length": context_length or ["512"],
            "prediction_length": prediction_length or ["64"],
            "num_samples": num_samples,
        }
        options: dict[str, Any] = {
            name: integers(name, values) for name, values in sizes.items() if values is not None
        }
        options |= {"dtype": dtype, "device": device, "threads": threads, "repeats": repeats, "seed": seed}
        only_shape: dict[str, Any] = {"ratio": ratio, "form": form, "feed_forward_ratio": feed_forward_ratio}
        only_shape = {name: value for name, value in only_shape.items() if value is not None}
        with messages.status("Forecasting with both sides in turn"):
            if shape is not None:
                if against is not None:
                    raise ValueError(f"--against goes with MODEL; --shape has its own dense side. Found {against!r}.")
                result = benchmark_shape(shape, **only_shape, **options)
            elif model is None:
                raise ValueError("Give either MODEL with --against, or --shape; found neither.")
            elif against is None:
                raise ValueError("MODEL needs --against, the checkpoint to compare it with.")
            elif only_shape:
                raise ValueError(f"{', '.join(only_shape)}: only with --shape; MODEL has its own ranks.")
            else:
                result = benchmark(model, against, **options)
        if json_file is not None:
            result.save(json_file)
        for table in result.tables():
            console.print(table)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a compressed model.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub, or NAME in your own namespace.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: your account's setting.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to. Default: main.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="A file of `evaluate --json`, for the scores in the card.")
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="A file of `bench --json`, for the speed in the card.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="The base model's, such as apache-2.0; known for published Chronos."),
    ] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace the card on the Hub even if a person wrote it.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token: Annotated[
        str | None, typer.Option(help="A token that may write. Default: HF_TOKEN, or that of `hf auth login`.")
    ] = None,
) -> None:
    """Push a compressed model to the Hub with its code and a model card, in one commit."""
    with plain_messages():
        from ..hub.push import push_to_hub

        commit = push_to_hub(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            evaluation=evaluation,
            benchmark=benchmark,
            license=license_,
            overwrite_card=overwrite_card,
            commit_message=message,
        )
        console.print(f"Pushed: {commit.commit_url}", soft_wrap=True, highlight=False)


@app.command()
def sweep(
    source: Annotated[
        str, typer.Argument(help="A dense Chronos checkpoint: Hub id, folder, 'reference' or 'reference-bolt'.")
    ],
    ratios: Annotated[
        str | None, typer.Option(help="Shares to keep, 0.5,0.25 say. Default: the paper's four.")
    ] = None,
    epsilons: Annotated[
        str | None, typer.Option(help="In place of ratios: epsilons, or 'paper' for its four.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Of default, per_head, latent, no_refit, weights and paper.")
    ] = "default,weights,paper",
    tasks: Annotated[str, typer.Option(help="Tasks or groups; see evaluate --list.")] = "m1_yearly,packaged",
    num_samples: Annotated[int | None, typer.Option(help="Sample paths of a forecast.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples, the same for every model.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Keep finished cells here and do not repeat them.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the Pareto curves to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the points to this file.")] = None,
) -> None:
    """Accuracy against compression: several methods, several sizes, beside the paper's published points."""
    with plain_messages():
        from ..experiments.sweep import sweep as run
        from ..plots import Curve, plot_pareto
        from ..published_figures import EPSILONS, TRUNCATED_RATIOS, TRUNCATED_WQL

        def numbers(text: str | None) -> list[float] | None:
            return None if text is None else [float(number) for number in text.split(",")]

        result = run(
            source,
            ratios=numbers(ratios),
            epsilons=EPSILONS if epsilons == "paper" else numbers(epsilons),
            methods=methods.split(","),
            tasks=tasks.split(","),
            num_samples=num_samples,
            seed=seed,
            cache=cache,
            progress=True,
        )
        table = Table(
            title=f"{source}: scores relative to dense (95 % interval over {len(result.settings['tasks'])} tasks)",
            caption="kept: share of the attention parameters; of the ranks for the paper's method, which keeps all parameters.",
        )
        table.add_column("method")
        for heading in ("kept", "cache", "parameters", "WQL", "MASE"):
            table.add_column(heading, justify="right")
        for point in result.points:
            scores = (f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (point.wql, point.mase))
            table.add_row(
                point.method, f"{point.kept:.3f}", f"{point.cache_ratio:.3f}", f"{point.parameters:,}", *scores
            )
        console.print(table)
        if json_file is not None:
            result.save(json_file)
        if plot is not None:
            curves = []
            for method in methods.split(","):
                points = [point for point in result.points if point.method == method]
                low, high = ([point.wql[i] for point in points] for i in (1, 2))
                curves.append(Curve(method, [p.kept for p in points], [p.wql[0] for p in points], low, high))
            published = [Curve(label, TRUNCATED_RATIOS, scores) for label, scores in TRUNCATED_WQL.items()]
            plot_pareto(curves, published, plot, title=f"{source}, compressed without training")
            console.print(f"Drawn in {plot}.")


@app.command()
def analyze(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, or 'reference'; any Chronos family, or another transformer.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="'synthetic', 'none' (weights alone), a CSV or parquet file of series; for a text model a .txt file."
        ),
    ] = "synthetic",
    num_series: Annotated[
        int | None, typer.Option(help="Windows, or texts. Default: 4 d_model tokens, at least 4,096.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Time steps of a window. Default: 512, or 1,024 for a model of patches.")
    ] = None,
    variates: Annotated[
        str | None, typer.Option(help="For Chronos-2: measure the group attention for 1,8,64 variates, say.")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="That of the verdict.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Of the series and windows.")] = 0,
    plots: Annotated[Path | None, typer.Option(help="Draw spectra, flow of ranks and heads in this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """The rank structure of a checkpoint: how far it can be compressed, which layers first, what it would cost."""
    with plain_messages():
        from ..analysis.analyze import analyze as run
        from ..analysis.report import tables
        from ..benchmarking.benchmark import integers

        if plots is not None:
            from ..plots import import_pyplot

            import_pyplot()  # what is missing is said before the work
        result = run(
            model,
            None if data == "none" else data,
            num_series=num_series,
            context_length=context_length,
            variates=integers("variates", [variates]) if variates is not None else (),
            epsilon=epsilon,
            seed=seed,
            show_progress=True,
        )
        drawn = []
        if plots is not None:
            from ..analysis.plots import plot_analysis

            drawn = plot_analysis(result, plots)
        if as_json:
            print_json(result.to_dict() | {"plots": [str(path) for path in drawn]})
            return
        for table in tables(result):
            console.print(table)
        for line in result.verdict:
            console.print(line, highlight=False)
        for path in drawn:
            console.print(f"Drawn in {path}.")
