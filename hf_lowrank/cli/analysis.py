"""`hf-lowrank analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import CHECKPOINT, check_data, integers, json_option
from .output import plain_messages, write_json


def analyze(
    model: Annotated[str, typer.Argument(help=f"{CHECKPOINT}; any Chronos family, or another transformer.")],
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
    epsilon: Annotated[
        float,
        typer.Option(
            help="The share of the largest singular value below which the verdict takes a direction as dropped."
        ),
    ] = 1e-2,
    seed: Annotated[int, typer.Option(help="Of the series and windows.")] = 0,
    plots: Annotated[Path | None, typer.Option(help="Draw spectra, flow of ranks and heads in this folder.")] = None,
    json_file: Annotated[Path | None, json_option("everything")] = None,
) -> None:
    """The rank structure of a checkpoint: how far it can be compressed, which layers first, what it would cost."""
    with plain_messages(json_file) as console:
        from ..analysis.analyze import analyze as run
        from ..analysis.report import tables

        check_data("--data", data, (".csv", ".parquet", ".txt"))
        if plots is not None:
            from ..files import check_place
            from ..plots import import_pyplot

            import_pyplot()  # what is missing is said before the work
            check_place(plots / "spectra.png", "--plots")
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
        write_json(json_file, result.to_dict() | {"plots": [str(path) for path in drawn]})
        for table in tables(result):
            console.print(table)
        for line in result.verdict:
            console.print(line, highlight=False)
        for path in drawn:
            console.print(f"Drawn in {path}.")
