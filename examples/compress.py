"""Make a Chronos checkpoint smaller and forecast with the result.

    python examples/compress.py amazon/chronos-t5-base chronos-lowrank --ratio 0.15 --data sales.csv

Prints the ranks of every layer and a forecast, and writes a folder that any Chronos pipeline loads. Without --data it is calibrated on
synthetic series; --data none looks at the weights alone and takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from chronos import BaseChronosPipeline

from hf_lowrank import compress_pretrained, save_compressed, summarize


def main(
    model: Annotated[str, typer.Argument(help="A dense Chronos-T5, Chronos-Bolt or Chronos-2.")] = "reference",
    output: Annotated[Path, typer.Argument(help="The folder to write.")] = Path("chronos-lowrank"),
    ratio: Annotated[float, typer.Option(help="Keep at most this share of the attention parameters.")] = 0.15,
    data: Annotated[
        str, typer.Option(help="What to calibrate on: a CSV or parquet file of series, or 'none'.")
    ] = "synthetic",
) -> None:
    compressed = compress_pretrained(model, ratio=ratio, calibration=None if data == "none" else data)
    save_compressed(compressed, output)

    summary = summarize(compressed.config)
    for row in summary.rows:
        print(f"{row.kind}.{row.layer}: {row.ranks_text or 'as it was'}")
    print(f"kept: {summary.attention_ratio:.3f} of the attention, {summary.cache_ratio:.3f} of the key/value cache")

    pipeline = BaseChronosPipeline.from_pretrained(output)
    context = 10 + torch.sin(torch.arange(200) / 6)
    _, mean = pipeline.predict_quantiles(context, prediction_length=12)
    print("forecast:", ", ".join(f"{value:.2f}" for value in mean[0]))


if __name__ == "__main__":
    typer.run(main)
