"""What the spectra of a checkpoint say before you compress it: how far, which layers first.

    python examples/analyse.py amazon/chronos-t5-base --data sales.csv --plots plots

Prints for every attention layer the ranks that its heads need on the data, at two epsilons, and a verdict of five lines; with --plots it
draws spectra, the flow of ranks through the layers, and the heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_lowrank import analyze, plot_analysis


def main(
    model: Annotated[str, typer.Argument(help="A Chronos checkpoint, dense or compressed: a Hub id or a folder.")],
    data: Annotated[str, typer.Option(help="Your series: a CSV or parquet file.")] = "synthetic",
    plots: Annotated[Path | None, typer.Option(help="The folder to draw in.")] = None,
) -> None:
    analysis = analyze(model, data)
    for layer in analysis.attention:
        sizes, fine, coarse = layer.head_dims, layer.ranks(1e-3), layer.ranks(1e-2)
        shown = (f"{part} {fine[part]} or {coarse[part]} of {sizes[part]}" for part in ("qk", "vo"))
        print(f"{layer.name}: {', '.join(shown)}")
    print(f"kept of the attention at 0.01: {analysis.kept(1e-2):.2f}")
    print("\n".join(analysis.verdict))
    if plots is not None:
        for path in plot_analysis(analysis, plots):
            print(path)


if __name__ == "__main__":
    typer.run(main)
