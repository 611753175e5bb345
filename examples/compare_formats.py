"""A Chronos-Bolt or Chronos-2 in every format, dense and compressed: time, memory, size on disk, and what is lost, beside stock chronos.

    python examples/compare_formats.py reference-bolt --total-ratio 0.25
    python examples/compare_formats.py --shape bolt-small --total-ratio 0.25 --threads 2

A model is calibrated, compressed, exported and measured; a published shape has random weights, of which only time and size say anything.
All is measured against the dense checkpoint in chronos' own pipeline, in one run for each format, alternately.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_lowrank import benchmark, build_checkpoint, compress_pretrained, export_model

FORMATS: tuple[tuple[str, str | None], ...] = (
    ("checkpoint", None),
    ("torch", None),
    ("onnx", None),
    ("onnx", "int8"),
    ("openvino", None),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
    ("inductor", None),
    ("inductor", "bfloat16"),
    ("inductor", "int8"),
)


def main(
    model: Annotated[str | None, typer.Argument(help="A dense checkpoint; or give --shape.")] = None,
    shape: Annotated[str | None, typer.Option(help="A published shape, with random weights.")] = None,
    total_ratio: Annotated[float, typer.Option(help="What the compressed one keeps of its layers.")] = 0.25,
    batch_size: int = 32,
    context_length: int = 512,
    prediction_length: int = 64,
    threads: int | None = None,
    repeats: int = 5,
    dense: Annotated[bool, typer.Option(help="Measure the dense model in every format too.")] = True,
    only: Annotated[
        list[str] | None, typer.Option(help="A format to measure, in place of all; may be repeated.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Print a row for each format of the dense and of the compressed model."""
    if (model is None) == (shape is None):
        raise typer.BadParameter("give either a model or --shape")
    case: dict[str, Any] = {
        "batch_size": [batch_size],
        "context_length": [context_length],
        "prediction_length": [prediction_length],
        "threads": threads,
        "repeats": repeats,
    }
    known = dict.fromkeys(name for name, _ in FORMATS)
    if unknown := set(only or ()) - set(known):
        raise typer.BadParameter(f"--only must be one of {', '.join(known)}, found {', '.join(unknown)}")
    # Of random weights, whose quantiles say little: about as many products stay in float as of trained ones with the usual tolerance.
    options: dict[str, Any] = {} if shape is None else {"tolerance": 8e-4}
    rows, progress = [], Console(stderr=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stock, small = model or str(folder / "dense"), str(folder / "small")
        if shape is None:
            compress_pretrained(stock, total_ratio=total_ratio).save_pretrained(small)
        else:
            build_checkpoint(stock, shape)
            build_checkpoint(small, shape, total_ratio=total_ratio)
        for name, source in (("dense", stock), (f"{total_ratio:g}", small)):
            for format_, quantize in FORMATS if dense or source == small else ():
                if only and format_ not in only:
                    continue
                progress.log(f"{name}: {format_} {quantize or ''}")
                measured, parity = source, {}
                if format_ != "checkpoint":
                    measured = str(folder / f"{name}-{format_}-{quantize}")
                    parity = export_model(source, measured, format=format_, quantize=quantize, **options).parity
                result = benchmark(measured, stock, **case)
                (comparison,) = result.comparisons
                side = comparison.model
                rows.append(
                    {
                        "model": name,
                        "format": " ".join(filter(None, (format_, quantize))),
                        "bytes_on_disk": side.bytes_on_disk,
                        "milliseconds_a_series": 1000 * statistics.median(side.seconds) / batch_size,
                        **{key: statistics.median(values) for key, values in comparison.ratios.items() if values},
                        "time_ratios": comparison.ratios["time_ratio"],
                        "parity": parity,
                        "machine": result.machine,
                    }
                )
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2))
    table = Table("model", "format", "MiB", "ms a series", "time", "memory", "added loss", title="of stock chronos")
    for row in rows:
        table.add_row(
            row["model"],
            row["format"],
            f"{row['bytes_on_disk'] / 2**20:.1f}",
            f"{row['milliseconds_a_series']:.2f}",
            f"{row['time_ratio']:.3f}",
            f"{row.get('memory_ratio', float('nan')):.2f}",
            f"{row['parity'].get('added_loss', 0.0):.1e}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
