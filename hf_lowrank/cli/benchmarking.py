"""`hf-lowrank bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import CHECKPOINT, integers, json_option
from .output import in_terminal, plain_messages, warn, write_json


def bench(
    model: Annotated[
        str | None, typer.Argument(help=f"{CHECKPOINT}; any Chronos family, dense or compressed.")
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
    total_ratio: Annotated[
        float | None, typer.Option(help="For --shape: the share of attention and feed-forward weights to keep.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="For --shape: export it first, to 'onnx', 'openvino', 'torch' or 'inductor'."),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="With --format, but not torch: products in int8.")] = False,
    batch_size: Annotated[
        list[str] | None, typer.Option(help="Series at once; this and the next three take lists such as 1,8.")
    ] = None,
    context_length: Annotated[list[str] | None, typer.Option(help="Past time steps.")] = None,
    prediction_length: Annotated[list[str] | None, typer.Option(help="Future time steps.")] = None,
    num_samples: Annotated[list[str] | None, typer.Option(help="Sample paths of a Chronos-T5 forecast.")] = None,
    dtype: Annotated[str, typer.Option(help="'float32', 'bfloat16' or 'float16'.")] = "float32",
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; default the GPU if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default PyTorch's choice.")] = None,
    repeats: Annotated[int, typer.Option(help="Forecasts of each side that are timed.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the series, the samples and random weights.")] = 0,
    json_file: Annotated[Path | None, json_option("all figures")] = None,
) -> None:
    """Time and memory of a checkpoint against another one, in one run, and the distance to the floor."""
    with plain_messages(json_file) as console:
        from ..benchmarking.benchmark import benchmark, benchmark_shape

        if model is not None and shape is not None:
            raise ValueError(f"Give either MODEL with --against, or --shape; found {model!r} and --shape {shape!r}.")
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
        options["show_progress"] = True
        only_shape: dict[str, Any] = {
            "ratio": ratio,
            "form": form,
            "feed_forward_ratio": feed_forward_ratio,
            "total_ratio": total_ratio,
            "format": format_,
            "quantize": "int8" if int8 else None,
        }
        only_shape = {name: value for name, value in only_shape.items() if value is not None}
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
        write_json(json_file, result.to_dict())
        for table in result.tables():
            console.print(in_terminal(table))
        for remark in result.remarks():
            warn(remark)
