"""Forecasts of many series: a long table of them, or a file that may be larger than memory, to a table of forecasts.

    summary = forecast_file("my-lowrank", "sales.parquet", "forecasts.parquet", horizon=28)
    frame = forecast_frame(pipeline, sales, horizon=28)      # the same forecasts of a table that is in memory

Both answer with the columns of `pipeline.predict_df`. The forecast of a series depends neither on the series beside it nor on how
the work is cut up, beyond rounding: series are batched by length, and a model that draws samples does so from a random state of each
series' own, made of `seed` and its item.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from chronos import BaseChronosPipeline
from rich.progress import Progress, TimeRemainingColumn

from ..checkpoints.devices import known_dtype
from ..checkpoints.pipelines import QUANTILE_LEVELS, fingerprint, load_pipeline
from ..data.series import series_by_item
from ..data.tables import LongColumns, check_suffix
from ..data.times import Spacing, known_frequency
from ..files import tidy
from ..interrupts import explained
from ..progress import progress_display
from ..versions import versions
from .batches import Request, forecast_series
from .long_file import (
    Contents,
    LongFile,
    aligned,
    frequency_of,
    import_pyarrow,
)
from .parts import Parts, run_beside

__all__ = ["ForecastSummary", "forecast_file", "forecast_frame"]


@dataclass(frozen=True)
class ForecastSummary:
    """What `forecast_file` did.

    Attributes:
        num_series, num_rows, freq: Of the input.
        num_forecast_rows: Of the output.
        num_left_out, left_out: Series without forecasts, because they have no value in the context: their number, and the first ten.
        num_resumed: Series whose forecasts an earlier, interrupted run had finished.
        seconds: For reading, forecasting and writing in this run, without loading the model.
        series_per_second: Series forecast in this run, over these seconds.
    """

    output: str
    num_series: int
    num_rows: int
    freq: str
    num_forecast_rows: int
    num_left_out: int
    left_out: list[str]
    num_resumed: int
    seconds: float
    series_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """What the command line prints as JSON."""
        return asdict(self) | {"left_out_because": "no value in the context" if self.num_left_out else None}


def forecast_frame(  # noqa: PLR0913 a public call names all of its options
    pipeline: BaseChronosPipeline,
    frame: pd.DataFrame,
    *,
    horizon: int | None = None,
    quantiles: Sequence[float] = QUANTILE_LEVELS,
    batch_size: int = 32,
    context_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    freq: str | None = None,
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    target: str = "target",
) -> pd.DataFrame:
    """Forecast the series of a table in long format, as `pipeline.predict_df` does.

    The arguments are those of `forecast_file`. Rows may come in any order. Series without a value in their last `context_length` steps are
    left out with a warning.

    Returns:
        `horizon` rows for each series, series in the order of the table: its item, time, `target_name`, `predictions` (the mean of the
        samples, or the median) and a column for each quantile, such as "0.1"; float32.

    Raises:
        ValueError: An argument, a column or a series is not as it should be.
    """
    request = Request.of(pipeline, horizon, quantiles, batch_size, context_length, num_samples, seed)
    columns, what = _columns(id_column, timestamp_column, target, freq), "frame"
    _check_names(columns, request)
    series = series_by_item(frame, what, columns)
    if not series:
        return forecast_series(pipeline, {}, "D", request, columns)
    shared = freq or frequency_of(series, what, columns)
    if shared is None:
        raise ValueError("freq must be given: no series of frame has the three values that tell its frequency.")
    if freq is not None:
        spacing = Spacing(freq)
        spacing.add(series)
        spacing.check(what, id_column)
    series = aligned(series, shared, what, columns, fill=freq is not None)
    forecasts = forecast_series(pipeline, series, shared, request, columns)
    if left_out := len(series) - len(forecasts) // request.horizon:
        warnings.warn(
            f"frame: {left_out} of {len(series)} series have no value in their last {request.context_length} steps and are left out.",
            stacklevel=2,
        )
    return forecasts


def forecast_file(  # noqa: PLR0913 a public call names all of its options
    model: str | os.PathLike | BaseChronosPipeline,
    input: str | os.PathLike,
    output: str | os.PathLike,
    *,
    horizon: int | None = None,
    quantiles: Sequence[float] = QUANTILE_LEVELS,
    batch_size: int = 32,
    context_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    freq: str | None = None,
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    target: str = "target",
    chunk_rows: int = 100_000,
    device: str | None = None,
    dtype: str = "float32",
    resume: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
) -> ForecastSummary:
    """Forecast every series of a file that may be larger than memory, and write the forecasts to another one.

    The input is read once to check it and once to forecast. Finished parts are kept in the folder `OUTPUT.parts`; a run that was
    interrupted goes on from there when it is called in the same way, and its output is the same. At the end they become `output`, all
    or nothing.

    Args:
        model: A folder, Hub id, `"reference"`, `"reference-bolt"`, `"reference-2"` or loaded pipeline of any Chronos family, dense or compressed.
        input: A CSV or parquet file in long format. The rows of a series must follow each other. Time zones are dropped after a shift to
            UTC.
        output: A .csv or .parquet file, with the columns that `forecast_frame` returns.
        horizon: Steps to forecast; by default the model's prediction length. It was not trained for more, which a warning says: what
            comes after goes on from its own forecasts.
        quantiles: Quantile levels.
        batch_size: Series in one call of the model.
        context_length: Past steps that the model sees; by default, and at most, the model's.
        num_samples: Sample paths a series, for Chronos-T5; by default what its checkpoint says.
        seed: Of the sample paths. Those of a series depend on this and on its item alone.
        freq: Put the series on this grid, such as "h" or "D", with NaN where nothing was observed. By default all must be regular, with
            the frequency of the first.
        id_column, timestamp_column, target: The columns of the input; others are ignored.
        chunk_rows: Rows of the input that are in memory, and lost by an interruption, at once: a whole number of series of about that
            many rows.
        device: By default the GPU if there is one. A loaded pipeline stays where it is.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the file, of a model that is loaded here.
        resume: Go on with an unfinished run, or begin anew.
        overwrite: Replace `output` if it exists.
        show_progress: Whether to show a progress bar.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: The model or the input cannot be had, `output` exists, or `OUTPUT.parts` is something else.
        ValueError: An argument or the input is not as it should be, or `OUTPUT.parts` belongs to a run that differs.
    """
    import_pyarrow()
    file = LongFile(Path(input), _columns(id_column, timestamp_column, target, freq))
    _check_file_arguments(file.path, Path(output), chunk_rows=chunk_rows, dtype=dtype)
    earlier = run_beside(Path(output))
    tidy(earlier.folder)
    check_absent(Path(output), overwrite=overwrite or (resume and earlier.is_ending))
    pipeline = model if isinstance(model, BaseChronosPipeline) else load_pipeline(model, device=device, dtype=dtype)
    request = Request.of(pipeline, horizon, quantiles, batch_size, context_length, num_samples, seed)
    _check_names(file.columns, request)
    parts = Parts(Path(output), _schema(file, request))
    work = _FileForecast(pipeline, file, request, freq, chunk_rows, parts)
    record = work.record()
    start = time.perf_counter()
    with (
        progress_display(TimeRemainingColumn(), show=show_progress) as display,
        parts.unfinished_run.alone(),
        explained(parts.how_to_go_on),
    ):
        contents, num_forecast_rows, num_resumed = work.run(record, display, resume=resume, overwrite=overwrite)
    seconds = time.perf_counter() - start
    return ForecastSummary(
        output=str(Path(output)),
        **asdict(contents),
        num_forecast_rows=num_forecast_rows,
        num_resumed=num_resumed,
        seconds=seconds,
        series_per_second=(num_forecast_rows // request.horizon - num_resumed) / seconds,
    )


@dataclass(frozen=True)
class _FileForecast:
    """A file, what is asked of a model about it, and the parts that are finished."""

    pipeline: BaseChronosPipeline
    file: LongFile
    request: Request
    freq: str | None  # None: that of the first series
    chunk_rows: int
    parts: Parts

    def record(self) -> dict[str, Any]:
        """All that the forecasts depend on, as the folder of the parts keeps it."""
        inner = self.pipeline.inner_model
        return {
            "input": self.file.identity() | dict(zip(("id_column", "timestamp_column", "target"), self.file.columns)),
            "model": {
                "weights": fingerprint(self.pipeline),
                "device": str(inner.device),
                "dtype": str(inner.dtype),
            },
            "options": asdict(self.request) | {"freq": self.freq, "chunk_rows": self.chunk_rows},
            "versions": versions(),
        }

    def run(
        self, record: dict[str, Any], display: Progress, *, resume: bool, overwrite: bool
    ) -> tuple[Contents, int, int]:
        """Do what is not done yet of the run that `record` tells, and write the output.

        Returns:
            What the file holds, the number of rows of forecasts, and that of series that were done before.

        Raises:
            FileExistsError, ValueError: An unfinished run is in the way, or the input is not as it should be.
        """
        contents = self.parts.unfinished(record, resume=resume)
        is_ending = contents is not None and self.parts.unfinished_run.is_ending
        check_absent(self.parts.output, overwrite=overwrite or is_ending)
        if contents is None:
            contents = self._look(display)
            self.parts.begin(record, contents)
        num_parts, num_rows, num_resumed = self._forecast(contents, display)
        if not self.file.identity().items() <= record["input"].items():
            raise ValueError(
                f"{self.file.what} must stay as it is while it is read, but it has changed: begin anew with resume=False (--no-resume)."
            )
        check_absent(self.parts.output, overwrite=overwrite or is_ending)
        self.parts.join(num_parts)
        return contents, num_rows, num_resumed

    def _look(self, display: Progress) -> Contents:
        step = display.add_task("Checking the series", total=None)
        contents = self.file.look(
            freq=self.freq,
            context_length=self.request.context_length,
            horizon=self.request.horizon,
            chunk_rows=self.chunk_rows,
            advance=lambda count: display.advance(step, count),
        )
        display.remove_task(step)
        return contents

    def _forecast(self, contents: Contents, display: Progress) -> tuple[int, int, int]:
        """Make the parts that are missing: parts, rows of forecasts, and series that were done before."""
        step = display.add_task("Forecasting", total=contents.num_series - contents.num_left_out)
        num_parts = num_rows = num_resumed = 0
        for number, frame in enumerate(self.file.tables(self.chunk_rows)):
            finished_rows = self.parts.num_rows(number)
            if finished_rows is None:
                forecasts = forecast_series(
                    self.pipeline,
                    self.file.series(frame, contents.freq, fill=self.freq is not None),
                    contents.freq,
                    self.request,
                    self.file.columns,
                    lambda count: display.advance(step, count),
                )
                self.parts.write(number, forecasts)
                num_rows += len(forecasts)
            else:
                num_rows += finished_rows
                num_resumed += finished_rows // self.request.horizon
                display.advance(step, finished_rows // self.request.horizon)
            num_parts += 1
        return num_parts, num_rows, num_resumed


def _schema(file: LongFile, request: Request) -> Any:
    """The schema of the table of forecasts, in arrow's words."""
    pa = import_pyarrow()
    numbers = [(name, pa.float32()) for name in ("predictions", *map(str, request.quantiles))]
    return pa.schema([*zip(file.columns, file.types()), ("target_name", pa.string()), *numbers])


def _columns(id_column: str, timestamp_column: str, target: str, freq: str | None) -> LongColumns:
    columns = LongColumns(id_column, timestamp_column, target)
    if freq is not None:
        known_frequency(freq)
    if len(set(columns)) < 3:
        raise ValueError(
            f"id_column, timestamp_column and target must be three different columns, found {', '.join(columns)}."
        )
    return columns


def _check_names(columns: LongColumns, request: Request) -> None:
    """Raise a ValueError where the table of forecasts would have two columns of one name."""
    taken = {"target_name", "predictions", *map(str, request.quantiles)}
    for argument, name in (("id_column", columns.item), ("timestamp_column", columns.time)):
        if name in taken:
            raise ValueError(
                f"{argument} must not be a column that the forecasts have too, found {name!r}: rename it in the input."
            )


def check_absent(output: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError where the output is there and is not to be replaced."""
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: {output} exists; give another file, or overwrite=True (--overwrite).")


def _check_file_arguments(input: Path, output: Path, *, chunk_rows: int, dtype: str) -> None:
    check_suffix(output, "output")
    if output.is_dir():
        raise FileExistsError(f"output: {output} is a folder; give a file.")
    if output.exists() and output.samefile(input):
        raise ValueError(f"output must be another file than input, found {output} twice.")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, found {chunk_rows}.")
    known_dtype(dtype)
