"""Compression with what else makes a forecaster faster: bfloat16, torch.compile, int8 (torchao).

    python examples/compose.py reference-bolt             time and accuracy on your machine
    python examples/compose.py --shape bolt-base          time alone, at a published size with random weights

Prints, for the dense model and every combination, the time of a forecast relative to the dense one's (median, least and most of --repeats rounds,
in which all take turns), seconds of compilation, and, of a checkpoint, WQL relative to the dense one's. Needs `pip install torchao`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from chronos import BaseChronosPipeline
from rich.console import Console
from rich.table import Table
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from hf_lowrank import build_checkpoint, compress_pretrained, evaluate, load_pipeline


def int8(pipeline: BaseChronosPipeline) -> None:
    """Matrices in int8, inputs of each product rounded to int8 as they come, a scale a row of both.

    Factors of a few columns stay as they are: they have little to save, and torchao cannot do those of one.
    """

    def is_large(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and min(module.weight.shape) >= 16

    quantize_(pipeline.inner_model, Int8DynamicActivationInt8WeightConfig(), is_large)


def compiled(pipeline: BaseChronosPipeline) -> None:
    """The whole forward pass: a Chronos-Bolt or Chronos-2 forecasts in one."""
    pipeline.inner_model.forward = torch.compile(pipeline.inner_model.forward)


SIDES: dict[str, tuple[str, str, list[Callable[[BaseChronosPipeline], None]]]] = {
    "dense": ("dense", "float32", []),
    "dense, int8, compiled": ("dense", "float32", [int8, compiled]),
    "compressed": ("small", "float32", []),
    "compressed, bfloat16": ("small", "bfloat16", []),
    "compressed, compiled": ("small", "float32", [compiled]),
    "compressed, int8": ("small", "float32", [int8]),
    "compressed, int8, compiled": ("small", "float32", [int8, compiled]),
}


def main(
    source: Annotated[str, typer.Argument(help="A dense Chronos-Bolt or Chronos-2.")] = "reference-bolt",
    shape: Annotated[str | None, typer.Option(help="In place of it: a published shape, such as bolt-base.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the attention to keep.")] = 0.15,
    feed_forward_ratio: Annotated[float, typer.Option(help="Share of the feed-forward layers to keep.")] = 0.5,
    context_length: int = 512,
    prediction_length: int = 64,
    batch_size: int = 32,
    repeats: int = 7,
    tasks: Annotated[str, typer.Option(help="Tasks that WQL is measured on.")] = "m1_yearly,packaged",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Print one table."""
    torch.manual_seed(0)
    series = 10 + torch.randn(batch_size, context_length).cumsum(1)
    with tempfile.TemporaryDirectory() as folder:
        pipelines = {
            name: load(Path(folder), *side, source, shape, ratio, feed_forward_ratio) for name, side in SIDES.items()
        }

    def seconds(name: str) -> float:
        begin = time.perf_counter()
        pipelines[name].predict_quantiles(series, prediction_length=prediction_length)
        return time.perf_counter() - begin

    first = {name: seconds(name) for name in pipelines}  # compiles
    rounds = [{name: seconds(name) for name in pipelines} for _ in range(repeats + 1)][1:]
    rows: dict[str, dict[str, Any]] = {}
    for name in pipelines:
        ratios = [one[name] / one["dense"] for one in rounds]
        rows[name] = {
            "seconds": median(one[name] for one in rounds),
            "time_ratio": median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "first_seconds": first[name],
        }
    if shape is None:  # compiled or not, the numbers are the same; every new shape of a batch is compiled anew
        eager = {name: pipelines[name] for name, side in SIDES.items() if compiled not in side[2]}
        scores = evaluate(eager, tasks.split(","), against=pipelines["dense"], show_progress=True)
        for name in eager:
            rows[name] |= {"WQL": scores.aggregate[name]["relative_to_dense"]["WQL"]}
    table = Table(title=f"{shape or source}: {batch_size} series of {context_length}, relative to dense")
    for column in ("", "time", "first call, s", "WQL"):
        table.add_column(column)
    for name, row in rows.items():
        found = row.get("WQL")
        accuracy = f"{found['geometric_mean']:.4f} ({found['low']:.4f} to {found['high']:.4f})" if found else ""
        spread = f"{row['time_ratio']:.3f} ({row['least']:.3f} to {row['most']:.3f})"
        table.add_row(name, spread, f"{row['first_seconds']:.1f}", accuracy)
    Console(markup=False).print(table)  # a path is no markup
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def load(
    folder: Path,
    size: str,
    dtype: str,
    changes: list[Callable[[BaseChronosPipeline], None]],
    source: str,
    shape: str | None,
    ratio: float,
    feed_forward_ratio: float,
) -> BaseChronosPipeline:
    """One side of the comparison; checkpoints are made once, in `folder`."""
    path: Path | str = folder / size
    if shape is not None and not Path(path).is_dir():
        share = {} if size == "dense" else {"ratio": ratio, "feed_forward_ratio": feed_forward_ratio}
        build_checkpoint(path, shape, **share)  # type: ignore[arg-type]
    elif shape is None and size == "dense":
        path = source
    elif not Path(path).is_dir():
        compress_pretrained(source, ratio=ratio, feed_forward_ratio=feed_forward_ratio).save_pretrained(path)
    pipeline = load_pipeline(path, device="cpu", dtype=dtype)
    for change in changes:
        change(pipeline)
    return pipeline


if __name__ == "__main__":
    typer.run(main)
