"""`hf-lowrank compress`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .options import (
    CHECKPOINT,
    RANKS_WANTED,
    IdColumn,
    KnownCovariates,
    PastCovariates,
    TargetColumns,
    TimestampColumn,
    check_data,
    check_file,
    columns_of,
    json_object,
    json_option,
    with_columns,
)
from .output import in_terminal, plain_messages, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..compression.plan import CompressionPlan
    from ..data.group_columns import GroupColumns


def compress(  # as long as its list of options
    source: Annotated[str, typer.Argument(help=f"{CHECKPOINT}.")],
    output: Annotated[Path | None, typer.Argument(help="The folder to write; with --plan or --curve, none.")] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Lose at most this share, as measured on series that are held out. Default, if no other rule is given: 0.01."
        ),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Keep at most this share of the attention parameters.")] = None,
    total_ratio: Annotated[
        float | None, typer.Option(help="The same of attention and feed-forward parameters together.")
    ] = None,
    max_cache_ratio: Annotated[
        float | None, typer.Option(help="Keep at most this share of the key/value cache.")
    ] = None,
    target_speedup: Annotated[
        str | None,
        typer.Option(
            help="Forecast this many times as fast, by what ranks cost on this machine; beside --max-loss also 'max', as fast as that allows."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Where --target-speedup is timed: 'torch', or what export makes for 'onnx', 'onnx-int8', 'openvino', 'openvino-int8' or 'openvino-bfloat16'."
        ),
    ] = "torch",
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
    quantize: Annotated[
        str | None,
        typer.Option(help="'int8' or 'int4': keep matrices as integers, but for those that would cost too much."),
    ] = None,
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
    id_column: IdColumn = "item_id",
    timestamp_column: TimestampColumn = "timestamp",
    target: TargetColumns = None,
    past_covariates: PastCovariates = None,
    known_covariates: KnownCovariates = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of what is written: 'float32', 'bfloat16', 'float16', or 'auto' as in SOURCE.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compress, such as 'cuda'. Default: the CPU.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the sizes that the rule leaves, as far as they are known, and stop.")
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Show what several sizes would lose, as measured for --max-loss, and stop.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    json_file: Annotated[Path | None, json_option("the summary")] = None,
) -> None:
    """Turn a checkpoint into a low-rank one, or a smaller one: Chronos-T5, Chronos-Bolt, Chronos-2, or any other T5.

    One rule says how much to keep: what may be lost (--max-loss), a budget (--ratio, --total-ratio, --max-cache-ratio, --target-speedup;
    several hold together, the last beside --max-loss too), or --epsilon, --energy, --uniform, --base-rank, --ranks. For example: hf-lowrank compress reference small
    """
    with plain_messages(json_file) as console:
        from ..checkpoints.export import save_compressed
        from ..compression.calibration import calibrate
        from ..compression.compress import compress_pretrained, loss_curve, plan_compression
        from ..compression.loss_bound import HELD_OUT_BATCHES
        from ..compression.settings import CompressionSettings
        from ..files import alone, check_output, tidy

        if base_rank is None and (rank_growth is not None or rank_rounding is not None):
            raise ValueError("--rank-growth and --rank-rounding need --base-rank.")
        schedule = None if base_rank is None else (base_rank, rank_growth or 0.0, rank_rounding or "ceil")
        arguments: dict[str, Any] = {
            "max_loss": max_loss,
            "ratio": ratio,
            "total_ratio": total_ratio,
            "max_cache_ratio": max_cache_ratio,
            "target_speedup": _speedup(target_speedup),
            "feed_forward_ratio": feed_forward_ratio,
            "epsilon": epsilon,
            "energy": energy,
            "uniform": uniform,
            "schedule": schedule,
            "ranks": None if ranks is None else json_object("--ranks", ranks, RANKS_WANTED),
            "form": _forms(form),
            "method": method,
            "multiple_of": multiple_of,
            "quantize": quantize,
            "backend": backend,
            "refit": refit,
            "seed": seed,
        }
        data = calibration_data(
            calibration, columns_of(target, past_covariates, known_covariates, id_column, timestamp_column)
        )
        settings = CompressionSettings(**arguments, calibration=data)
        if save_calibration is not None and (plan or curve):
            raise ValueError("--save-calibration is of a compression: leave out --plan and --curve.")
        if plan:
            report_plan(console, plan_compression(source, settings, dtype=dtype, device=device), source, json_file)
            return
        if curve:
            rest = {name: arguments[name] for name in ("form", "multiple_of", "quantize", "refit", "seed")}
            if settings.policy_arguments.keys() != {"max_loss"} or max_loss is not None:
                raise ValueError("--curve tries sizes of its own: leave out the rule for the ranks.")
            losses = loss_curve(source, dtype=dtype, device=device, show_progress=True, calibration=data, **rest)
            tried = [one.to_dict() for one in losses]
            write_json(json_file, {"source": source, "curve": tried})
            console.print(loss_table(tried, None))
            return
        if output is None:
            raise ValueError("OUTPUT is missing: the folder to write, or --plan or --curve to write none.")
        with alone(output):
            tidy(output)  # of a killed run, whose output may be complete
            check_output(output, overwrite=overwrite)
            if save_calibration is not None:
                check_file("--save-calibration", save_calibration, ".safetensors")
                if data is None or method == "paper":
                    raise ValueError("--save-calibration needs a calibration; this compression looks at no data.")
                plan_compression(
                    source, settings, dtype=dtype, device=device
                )  # what cannot be is said before the calibration
                held_out = 0 if settings.max_loss is None else HELD_OUT_BATCHES
                data = calibrate(source, data, num_held_out_batches=held_out, seed=seed, show_progress=True)
                data.save(save_calibration)
                settings = replace(settings, calibration=data)
            model = compress_pretrained(source, settings, dtype=dtype, device=device, show_progress=True)
            save_compressed(model, output, overwrite=overwrite)
            report_compression(console, model, output, json_file)


def _speedup(target_speedup: str | None) -> float | str | None:
    """What `--target-speedup` says: a number, or a word that the settings look at."""
    try:
        return None if target_speedup is None else float(target_speedup)
    except ValueError:
        return target_speedup


def _forms(form: str) -> str | dict[str, str]:
    """What `--form` says: a form, or that of each kind of attention."""
    if "=" not in form:
        return form
    pairs = [pair.split("=", 1) for pair in form.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"--form must be a form or KIND=FORM,... such as cross=latent, found {form!r}.")
    return dict(pairs)


def calibration_data(calibration: str, columns: GroupColumns) -> Any:
    """What `--calibration` says: the series or groups of a file, read before the work, or what `CompressionSettings` takes."""
    from ..data.series import read_series

    check_data("--calibration", calibration, (".csv", ".parquet", ".safetensors"))
    data = with_columns("--calibration", calibration, columns)
    if isinstance(data, str) and data.endswith((".csv", ".parquet")):
        return read_series(data)
    return None if calibration == "none" else data


def report_plan(console: Console, plan: CompressionPlan, source: str, json_file: Path | None) -> None:
    """What a compression would keep."""
    write_json(json_file, {"source": source} | plan.to_dict())
    console.print(in_terminal(replace(plan.table(), title=f"{source}, as it would be compressed")))
    console.print("Nothing was written.")


def report_compression(console: Console, model: PreTrainedModel, output: Path, json_file: Path | None) -> None:
    """What a compressed model keeps: a table of its layers, the totals in a sentence, and all of it as JSON."""
    from ..checkpoints.summary import summarize

    summary = summarize(model)
    record, size = summary.compression, summary.size
    assert size is not None
    content = {
        "output": str(output),
        "parameters": size.parameters,
        "dense_parameters": size.dense_parameters,
        "bytes": size.bytes,
        "dense_bytes": size.dense_bytes,
        "compression": record,
        **summary.to_dict(bytes_per_number=size.dtype.itemsize),
    }
    write_json(json_file, content)
    if tried := record.get("tried"):
        console.print(loss_table(tried, record["measured_loss"]))
    console.print(in_terminal(summary.table()))
    if record["method"] == "paper":
        console.print(
            f"The paper's method keeps {record['kept_rank_ratio']:.1%} of the ranks and all the dense shapes: nothing is "
            "smaller or faster."
        )
    if speed := record.get("speed"):
        console.print(speed_text(speed, record["arguments"].get("target_speedup")))
    console.print(f"{output}: {summary.totals_text}")


def speed_text(speed: Mapping[str, Any], target: float | str) -> str:
    """How fast a forecast was to be and is, in a sentence."""
    from ..timing import Case

    asked = "as fast as could be" if target == "max" else f"{target:g} times as fast"
    return (
        f"A forecast in {speed['backend']} ({Case(**speed['workload'])}; {speed['device']}, threads: {speed['threads']}) was to be {asked}: predicted "
        f"{speed['seconds_dense'] / speed['seconds_predicted']:.2f}, measured {speed['speedup_measured']:.2f} "
        f"({1000 * speed['seconds_measured_dense']:.1f} ms with the dense ranks, {1000 * speed['seconds_measured']:.1f} ms now)."
    )


def loss_table(tried: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> Table:
    """A row a budget that was measured: what it adds to the expected loss; `chosen` is the one that was taken."""
    number = tried[0]["series"]
    table = Table(title=f"Expected loss added, on {number:,} series that are held out", box=box.SIMPLE_HEAD, padding=0)
    speedups = [one["speedup"] for one in tried if "speedup" in one]
    for heading in (*["times as fast"] * bool(speedups), "of the layers", "mean", "below, with 95 %", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    largest = max(one["bound"] for one in tried)
    for one in tried:
        bar = "█" * max(1, round(24 * one["bound"] / largest)) if largest > 0 else ""
        is_chosen = one == chosen
        row = f"{one['total_ratio']:.3f}", f"{one['loss']:.2%}", f"{one['bound']:.2%}", bar + " (taken)" * is_chosen
        speedup = [f"{one['speedup']:.3f}"] if speedups else []
        table.add_row(*speedup, *row, style="bold" if is_chosen else "")
    return table
