"""`hf-lowrank forecast`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    CHECKPOINT,
    Device,
    IdColumn,
    KnownCovariates,
    PastCovariates,
    TargetColumns,
    TimestampColumn,
    json_option,
    numbers,
)
from .output import plain_messages, warn, write_json


def forecast(  # as long as its list of options
    model: Annotated[
        str,
        typer.Argument(help=f"{CHECKPOINT}; any family, dense or compressed."),
    ],
    input_: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="Your CSV or parquet file, of any size; a series' rows follow each other."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The CSV or parquet file to write.")],
    horizon: Annotated[
        int | None,
        typer.Option(
            "--horizon", "--prediction-length", help="Steps to forecast. Default: the model's; beyond, with a warning."
        ),
    ] = None,
    quantiles: Annotated[str, typer.Option(help="Quantile levels.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    batch_size: Annotated[int, typer.Option(help="Series in a batch.")] = 32,
    context_length: Annotated[
        int | None, typer.Option(help="Past steps that the model sees. Default: the model's.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Sample paths of a Chronos-T5 forecast.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    freq: Annotated[
        str | None, typer.Option(help="Put the series on this grid, such as 'h' or 'D'; NaN is between their values.")
    ] = None,
    id_column: IdColumn = "item_id",
    timestamp_column: TimestampColumn = "timestamp",
    target: TargetColumns = None,
    past_covariates: PastCovariates = None,
    known_covariates: KnownCovariates = None,
    future: Annotated[
        Path | None,
        typer.Option(
            help="The CSV or parquet file of the known covariates in the steps to forecast. Default: the last rows of INPUT."
        ),
    ] = None,
    chunk_rows: Annotated[int, typer.Option(help="Rows of INPUT in memory at once.")] = 100_000,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="'float32', 'bfloat16', 'float16', or 'auto' as in the file.")
    ] = "float32",
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run, or begin anew.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
    json_file: Annotated[Path | None, json_option("the summary")] = None,
) -> None:
    """Forecast every series of a file that may be larger than memory."""
    with plain_messages(json_file) as console:
        from ..files import check_place
        from ..forecasting.forecast import forecast_file

        check_place(output, "output")
        summary = forecast_file(
            model,
            input_,
            output,
            horizon=horizon,
            quantiles=numbers("--quantiles", quantiles, "0.1,0.5,0.9"),
            batch_size=batch_size,
            context_length=context_length,
            num_samples=num_samples,
            seed=seed,
            freq=freq,
            id_column=id_column,
            timestamp_column=timestamp_column,
            target=target or "target",
            past_covariates=past_covariates or (),
            known_covariates=known_covariates or (),
            future=future,
            chunk_rows=chunk_rows,
            device=device,
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            show_progress=True,
        )
        write_json(json_file, summary.to_dict())
        if summary.num_left_out:
            named = ", ".join(summary.left_out) + (", ..." if summary.num_left_out > len(summary.left_out) else "")
            warn(f"{summary.num_left_out} series have no value in the context and are left out: {named}")
        resumed = f", {summary.num_resumed:,} of them in an earlier run" if summary.num_resumed else ""
        console.print(
            f"{output}: {summary.num_forecast_rows:,} rows, forecasts of {summary.num_series - summary.num_left_out:,} series{resumed}; "
            f"{summary.seconds:.1f} s, {summary.series_per_second:.1f} series/s.",
            soft_wrap=True,
            highlight=False,
        )
