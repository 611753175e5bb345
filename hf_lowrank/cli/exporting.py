"""`hf-lowrank export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .options import json_option
from .output import plain_messages, write_json


def export(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, 'reference-bolt' or 'reference-2'; dense or compressed.")
    ],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    format_: Annotated[
        str, typer.Option("--format", help="'onnx', 'openvino', 'torch', or 'inductor' (compiled for this machine).")
    ] = "onnx",
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Not of torch: products in int8, but for those that the accuracy needs in float."),
    ] = False,
    bfloat16: Annotated[
        bool,
        typer.Option(
            "--bfloat16", help="Not of onnx: all of it in bfloat16, fast where the processor multiplies in it."
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(help="With --int8: what it may add to the expected loss, as a share. Default: 0.0003."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic series that losses are measured on.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is an export.")] = False,
    json_file: Annotated[Path | None, json_option("what the export says of itself")] = None,
) -> None:
    """Write a Chronos-Bolt or Chronos-2 for ONNX Runtime or OpenVINO, and measure how near its forecasts are to PyTorch's."""
    with plain_messages(json_file) as console:
        from ..exporting.export import TOLERANCE, export_model

        if tolerance is not None and not int8:
            raise ValueError(f"--tolerance goes with --int8, found {tolerance} alone.")
        if int8 and bfloat16:
            raise ValueError("--int8 and --bfloat16 say two things about the numbers; give one of them.")
        record = export_model(
            model,
            output,
            format=format_,
            quantize="int8" if int8 else "bfloat16" if bfloat16 else None,
            tolerance=TOLERANCE if tolerance is None else tolerance,
            seed=seed,
            overwrite=overwrite,
            show_progress=True,
        )
        write_json(json_file, {"output": str(output)} | record.to_dict())
        table = Table("file", "MiB", title=f"{record.made['source']} for {record.format}", box=box.SIMPLE_HEAD)
        for name, file in record.files.items():
            table.add_row(name, f"{file['bytes'] / 2**20:.1f}")
        console.print(table)
        for name, graph in record.made.get("int8", {}).items():
            if isinstance(graph, dict):
                kept = ", ".join(graph["in_float"]) or "none"
                console.print(f"{name}: {len(graph['losses'])} products, in float: {kept}.", soft_wrap=True)
        console.print(
            f"{output}: quantiles at most {record.parity['relative_difference']:.2g} (relative) from PyTorch's, "
            f"{record.parity['added_loss']:.2g} of the expected loss added.",
            soft_wrap=True,
        )
