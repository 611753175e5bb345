"""Forecasts of many series: a long table of them, or a file that may be larger than memory, to a table of forecasts.

    summary = forecast_file("my-lowrank", "sales.parquet", "forecasts.parquet", horizon=28)
    frame = forecast_frame(pipeline, sales, horizon=28)      # the same forecasts of a table that is in memory

Both answer with the columns of `pipeline.predict_df`. The forecast of an item depends neither on the items beside it nor on how
the work is cut up, beyond rounding: items are batched by length, and a model that draws samples does so from a random state of each
series' own, made of `seed` and its item.

An item may have several targets. Chronos-2 forecasts them together, and reads covariates beside them: those of the past, and those whose
future is known. Other models forecast each target by itself.

    forecast_frame(pipeline, sales, plans, target=["units", "returns"], past_covariates=["visitors"], known_covariates=["price", "holiday"])
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
from rich.progress import Progress

from ..checkpoints.devices import known_dtype
from ..checkpoints.pipelines import QUANTILE_LEVELS, fingerprint, load_pipeline
from ..data.group_columns import GroupColumns
from ..data.group_tables import categories_of, group_tables
from ..data.tables import check_suffix
from ..data.times import Spacing, known_frequency
from ..files import tidy
from ..interrupts import explained
from ..progress import progress_display
from ..versions import versions
from .batches import Request, forecast_series, forecasts_jointly
from .groups import KnownFuture, Layout, frequency_of
from .long_file import Contents, LongFile, import_pyarrow
from .parts import Parts, run_beside

__all__ = ["ForecastSummary", "forecast_file", "forecast_frame"]


@dataclass(frozen=True)
class ForecastSummary:
    """What `forecast_file` did.

    Attributes:
        num_series, num_rows, freq: Of the input; every target of an item is a series.
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
    future: pd.DataFrame | None = None,
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
    target: str | Sequence[str] = "target",
    past_covariates: str | Sequence[str] = (),
    known_covariates: str | Sequence[str] = (),
) -> pd.DataFrame:
    """Forecast the series of a table in long format, as `pipeline.predict_df` does.

    The arguments are those of `forecast_file`. Rows may come in any order, also those of `future`. Series without a value in their last
    `context_length` steps are left out with a warning; where a model sees the targets of an item together, if that is so of all of them.

    A series of a group that is one value throughout is read as zero. In `predict_df` the rounding of its mean can make ones of it, in one
    batch and not in another.

    Returns:
        `horizon` rows for each series, items in the order of the table and their targets in that of `target`: its item, time, `target_name`,
        `predictions` (the mean of the samples, or the median) and a column for each quantile, such as "0.1"; float32.

    Raises:
        ValueError: An argument, a column or a series is not as it should be.
    """
    request = Request.of(pipeline, horizon, quantiles, batch_size, context_length, num_samples, seed)
    columns, what = _columns(id_column, timestamp_column, target, past_covariates, known_covariates, freq), "frame"
    _check_names(columns, request)
    _check_future(columns, has_future=future is not None)
    jointly = forecasts_jointly(pipeline, columns)
    categories = categories_of(frame, what, columns)
    tables = group_tables(frame, what, columns, categories)
    shared = freq or frequency_of(tables, what, columns) or ("D" if not tables else None)
    if shared is None:
        raise ValueError("freq must be given: no series of frame has the three values that tell its frequency.")
    if freq is not None:
        spacing = Spacing(freq)
        spacing.add(tables)
        spacing.check(what, id_column)
    known = None if future is None else KnownFuture.of(future, "future", columns, categories)
    layout = Layout(what, columns, shared, fill=freq is not None, horizon=request.horizon, known=known)
    groups = layout.groups(tables)
    if known is not None:
        known.check_used(tables)
    forecasts = forecast_series(pipeline, groups, request)
    num_series = groups.are_forecast(request.context_length, jointly=jointly).size
    if left_out := num_series - len(forecasts) // request.horizon:
        warnings.warn(
            f"frame: {left_out} of {num_series} series have no value in their last {request.context_length} steps and are left out.",
            stacklevel=2,
        )
    return forecasts


def forecast_file(  # noqa: PLR0913 a public call names all of its options
    model: str | os.PathLike | BaseChronosPipeline,
    input: str | os.PathLike,
    output: str | os.PathLike,
    *,
    future: str | os.PathLike | None = None,
    horizon: int | None = None,
    quantiles: Sequence[float] = QUANTILE_LEVELS,
    batch_size: int = 32,
    context_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    freq: str | None = None,
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    target: str | Sequence[str] = "target",
    past_covariates: str | Sequence[str] = (),
    known_covariates: str | Sequence[str] = (),
    chunk_rows: int = 100_000,
    device: str | None = None,
    dtype: str = "float32",
    resume: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
) -> ForecastSummary:
    """Forecast every series of a file that may be larger than memory, and write the forecasts to another one.

    The input is read once to check it and once to forecast, and before that, where there are covariates, for their categories. Finished
    parts are kept in the folder `OUTPUT.parts`; a run that was interrupted goes on from there when it is called in the same way, and its
    output is the same. At the end they become `output`, all or nothing.

    Args:
        model: A folder, Hub id, `"reference"`, `"reference-bolt"`, `"reference-2"` or loaded pipeline of any Chronos family, dense or compressed.
        input: A CSV or parquet file in long format. The rows of a series must follow each other. Time zones are dropped after a shift to
            UTC.
        output: A .csv or .parquet file, with the columns that `forecast_frame` returns.
        future: A CSV or parquet file (of `forecast_frame` a table) in long format, in any order, with the known covariates of the next
            `horizon` steps of each item of the input, and of no other item or time. These columns are held in memory. Without it the
            last `horizon` rows of each item, which then have no target, tell them.
        horizon: Steps to forecast; by default the model's prediction length. It was not trained for more, which a warning says: what
            comes after goes on from its own forecasts.
        quantiles: Quantile levels.
        batch_size: Series in one call of the model, covariates among them, but a whole item at least.
        context_length: Past steps that the model sees; by default, and at most, the model's.
        num_samples: Sample paths a series, for Chronos-T5; by default what its checkpoint says.
        seed: Of the sample paths. Those of a series depend on this and on its item alone.
        freq: Put the series on this grid, such as "h" or "D", with NaN where nothing was observed. By default all must be regular, with
            the frequency of the first.
        id_column, timestamp_column, target: The columns of the input; others are ignored. There may be several targets, which Chronos-2
            forecasts together.
        past_covariates, known_covariates: For Chronos-2: columns of numbers or categories (text, bool, categorical) that the targets depend
            on, known until now and in the future as well. A column of a CSV file is one of numbers if all of its values are. A
            category is encoded as chronos does: by the mean of the one target where it occurs, or of several targets by its place in the
            order of all categories of the input.
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
    columns = _columns(id_column, timestamp_column, target, past_covariates, known_covariates, freq)
    _check_future(columns, has_future=future is not None)
    file = LongFile.of(Path(input), columns, None if future is None else Path(future))
    _check_file_arguments(file, Path(output), chunk_rows=chunk_rows, dtype=dtype)
    earlier = run_beside(Path(output))
    tidy(earlier.folder)
    check_absent(Path(output), overwrite=overwrite or (resume and earlier.is_ending))
    pipeline = model if isinstance(model, BaseChronosPipeline) else load_pipeline(model, device=device, dtype=dtype)
    request = Request.of(pipeline, horizon, quantiles, batch_size, context_length, num_samples, seed)
    _check_names(columns, request)
    jointly = forecasts_jointly(pipeline, columns)
    parts = Parts(Path(output), _schema(file, request))
    work = _FileForecast(pipeline, file, request, freq, jointly, chunk_rows, parts)
    record = work.record()
    start = time.perf_counter()
    with (
        progress_display(show=show_progress) as display,
        parts.unfinished_run.alone(),
        explained(parts.how_to_go_on),
    ):
        contents, num_forecast_rows, num_resumed = work.run(record, display, resume=resume, overwrite=overwrite)
    seconds = time.perf_counter() - start
    return ForecastSummary(
        output=str(Path(output)),
        num_series=contents.num_series,
        num_rows=contents.num_rows,
        freq=contents.freq,
        num_left_out=contents.num_left_out,
        left_out=contents.left_out,
        num_forecast_rows=num_forecast_rows,
        num_resumed=num_resumed,
        seconds=seconds,
        series_per_second=(num_forecast_rows // request.horizon - num_resumed) / seconds,
    )


@dataclass(frozen=True)
class _FileForecast:
    """A file, what is asked of a model about it, and the parts that are finished; `jointly` as in `forecasts_jointly`."""

    pipeline: BaseChronosPipeline
    file: LongFile
    request: Request
    freq: str | None  # None: that of the first series
    jointly: bool
    chunk_rows: int
    parts: Parts

    def record(self) -> dict[str, Any]:
        """All that the forecasts depend on, as the folder of the parts keeps it."""
        inner = self.pipeline.inner_model
        return {
            **self.file.identity(),
            "columns": asdict(self.file.columns),
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
        for argument, identity in self.file.identity().items():
            if identity != record[argument]:
                raise ValueError(
                    f"{argument}: file {Path(identity['path']).name!r} must stay as it is while it is read, but it has changed: begin anew "
                    "with resume=False (--no-resume)."
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
            jointly=self.jointly,
            chunk_rows=self.chunk_rows,
            advance=lambda count: display.advance(step, count),
        )
        display.remove_task(step)
        return contents

    def _forecast(self, contents: Contents, display: Progress) -> tuple[int, int, int]:
        """Make the parts that are missing: parts, rows of forecasts, and series that were done before."""
        step = display.add_task("Forecasting", total=contents.num_series - contents.num_left_out)
        num_parts = num_rows = num_resumed = 0
        file, categories = self.file, contents.categories
        layout = file.layout(contents.freq, categories, self.request.horizon, fill=self.freq is not None)
        for number, frame in enumerate(file.tables(self.chunk_rows)):
            finished_rows = self.parts.num_rows(number)
            if finished_rows is None:
                groups = layout.groups(group_tables(frame, file.what, file.columns, categories))
                forecasts = forecast_series(
                    self.pipeline, groups, self.request, lambda count: display.advance(step, count)
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
    return pa.schema([*zip(file.input.columns, file.input.types()), ("target_name", pa.string()), *numbers])


def _columns(
    id_column: str,
    timestamp_column: str,
    target: str | Sequence[str],
    past_covariates: str | Sequence[str],
    known_covariates: str | Sequence[str],
    freq: str | None,
) -> GroupColumns:
    if freq is not None:
        known_frequency(freq)
    targets, past, known = (
        (names,) if isinstance(names, str) else tuple(names) for names in (target, past_covariates, known_covariates)
    )
    return GroupColumns(id_column, timestamp_column, targets, past, known)


def _check_future(columns: GroupColumns, *, has_future: bool) -> None:
    """Raise a ValueError where there is a future, and nothing that is known of it."""
    if has_future and not columns.known_covariates:
        raise ValueError("future tells the known covariates; name its columns of them as known_covariates.")


def _check_names(columns: GroupColumns, request: Request) -> None:
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


def _check_file_arguments(file: LongFile, output: Path, *, chunk_rows: int, dtype: str) -> None:
    check_suffix(output, "output")
    if output.is_dir():
        raise FileExistsError(f"output: {output} is a folder; give a file.")
    for table in filter(None, (file.input, file.future)):
        if output.exists() and output.samefile(table.path):
            raise ValueError(f"output must be another file than {table.argument}, found {output} twice.")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, found {chunk_rows}.")
    known_dtype(dtype)
