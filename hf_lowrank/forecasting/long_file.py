"""Whole series, a few at a time, from a long table that may be larger than memory, and a look at all of them before the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..data.series import series_by_item
from ..data.tables import (
    BATCH_ROWS,
    LONG_FORMAT,
    LongColumns,
    check_columns,
    check_table_file,
    column_names,
    csv_tables,
    unreadable,
)
from ..data.times import Spacing, follows, inferred_frequency, regular, times_after

__all__ = ["Contents", "LongFile", "aligned", "frequency_of", "import_pyarrow", "whole_series"]

NAMED = 10  # of the series that are left out, so many are named


def import_pyarrow() -> Any:
    """The module pyarrow, or an ImportError that says how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Forecasting a file needs pyarrow: pip install "hf_lowrank[forecast]".') from error
    return pyarrow


# ---- From tables to series -------------------------------------------------------------------------------------------


def frequency_of(series: Mapping[Any, pd.Series], what: str, columns: LongColumns) -> str | None:
    """The pandas frequency of the first series with three values, which are enough to tell; None where there is none."""
    for item, values in series.items():
        if len(values) > 2:
            regular(values, None, f"{columns.item} {str(item)!r} of {what}")
            return inferred_frequency(values.index)
    return None


def aligned(
    series: Mapping[Any, pd.Series], freq: str, what: str, columns: LongColumns, *, fill: bool
) -> dict[Any, pd.Series]:
    """The series, every one on the grid of `freq`; with `fill`, NaN where a time of the grid is missing.

    Raises:
        ValueError: A series has times off the grid or, without `fill`, lacks some.
    """
    on_grid = {}
    for item, values in series.items():
        name = f"{columns.item} {str(item)!r} of {what}"
        if len(values) < 3 or not follows(values.index, freq).all():
            inferred = inferred_frequency(values.index)
            if fill:
                values = regular(values, freq, name)
            else:
                regular(values, None, name)
                # pandas 2 makes every range in nanoseconds.
                grid = pd.date_range(values.index[0], values.index[-1], freq=freq).as_unit(values.index.unit)
                if not grid.equals(values.index):
                    raise ValueError(
                        f"{name} must have the frequency {freq!r} of the first series, found {inferred or 'other steps'!r} from "
                        f"{values.index[0]} to {values.index[-1]}: forecast it apart, or give freq to put all on one grid."
                    )
        on_grid[item] = values
    return on_grid


def whole_series(batches: Iterable[pd.DataFrame], item_id: str, chunk_rows: int) -> Iterator[pd.DataFrame]:
    """Tables of whole series from tables that are cut anywhere, if the rows of a series follow each other.

    A table ends with the series that fills `chunk_rows` rows, so where it ends does not depend on how `batches` are cut. No more
    is held than `chunk_rows` rows, one series and one batch.
    """
    held: list[pd.DataFrame] = []
    rows, last = 0, None
    for batch in batches:
        items = batch[item_id].to_numpy()
        changes = np.flatnonzero(items[1:] != items[:-1]) + 1
        if last is not None and items[0] != last:
            changes = np.concatenate([[0], changes])
        first = 0
        for change in changes:
            if rows + change - first >= chunk_rows:
                yield pd.concat([*held, batch[first:change]], ignore_index=True)
                held, rows, first = [], 0, int(change)
        held.append(batch[first:])
        rows += len(batch) - first
        last = items[-1]
    if held:
        yield pd.concat(held, ignore_index=True)


# ---- From files to tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What a file holds: series, rows, their pandas frequency, and how many series have nothing to forecast from, with the first of them."""

    num_series: int
    num_rows: int
    freq: str
    num_left_out: int
    left_out: list[str]


@dataclass(frozen=True)
class LongFile:
    """A CSV or parquet file in long format, which is never in memory as a whole.

    Items of a CSV file are text, so that 007 stays 007; those of a parquet file are what they are. `columns` are those of item, time and value; others
    are not read.

    Raises:
        FileNotFoundError, ValueError: There is no such file, it is empty, or a column is missing.
    """

    path: Path
    columns: LongColumns = LONG_FORMAT

    def __post_init__(self) -> None:
        check_table_file(self.path, "input")
        check_columns(self._column_names(), self.what, self.columns)
        if self.path.suffix == ".parquet":
            self._check_types()

    @property
    def what(self) -> str:
        """What errors call the file."""
        return f"input: file {self.path.name!r}"

    def identity(self) -> dict[str, Any]:
        """What tells this state of the file from another one."""
        status = self.path.stat()
        return {"path": str(self.path.resolve()), "size": status.st_size, "modified_ns": status.st_mtime_ns}

    def tables(self, chunk_rows: int) -> Iterator[pd.DataFrame]:
        """Tables of whole series of about `chunk_rows` rows each, see `whole_series`."""
        return whole_series(self._batches(min(BATCH_ROWS, chunk_rows)), self.columns.item, chunk_rows)

    def types(self) -> tuple[Any, Any]:
        """The arrow types of item and time in a table of forecasts."""
        pa = import_pyarrow()
        if self.path.suffix == ".csv":
            return pa.string(), pa.timestamp("us")
        schema = self._schema()
        item, time = (schema.field(name).type for name in (self.columns.item, self.columns.time))
        item = item.value_type if pa.types.is_dictionary(item) else item
        return item, pa.timestamp(time.unit if pa.types.is_timestamp(time) else "us")

    def look(
        self, *, freq: str | None, context_length: int, horizon: int, chunk_rows: int, advance: Callable[[int], None]
    ) -> Contents:
        """Read everything once and check it: better an error now than after hours of forecasts.

        `advance` is told the number of series after each table.

        Raises:
            ValueError: A value, a time or the order of the rows is not as it should be.
        """
        shared = freq or self._frequency(chunk_rows)
        seen, spacing = Seen(), Spacing(shared)
        num_series = num_rows = num_left_out = 0
        left_out: list[str] = []
        for frame in self.tables(chunk_rows):
            items = frame[self.columns.item].to_numpy()
            starts = np.concatenate([[0], np.flatnonzero(items[1:] != items[:-1]) + 1])
            again = seen.add(items[starts])
            if again is not None:
                raise ValueError(
                    f"{self.what} must have all rows of a series together, found {self.columns.item} {str(items[starts[again]])!r} again "
                    f"in row {num_rows + starts[again] + 1} after other series: sort it by {self.columns.item}."
                )
            series = self.series(frame, shared, fill=freq is not None, spacing=spacing)
            last, name = max((values.index[-1], str(item)) for item, values in series.items())
            latest = f"{self.columns.item} {name!r}"
            times_after(pd.DatetimeIndex([last]), [horizon], shared, lambda _, latest=latest: latest)  # type: ignore[misc]
            empty = [
                str(item) for item, values in series.items() if np.isnan(values.to_numpy()[-context_length:]).all()
            ]
            left_out += empty[: NAMED - len(left_out)]
            num_left_out += len(empty)
            num_series += len(series)
            num_rows += len(frame)
            advance(len(series))
        if num_series == 0:
            raise ValueError(f"{self.what} must hold at least one series, found no rows.")
        if freq is not None:
            spacing.check(self.what, self.columns.item)
        if num_left_out == num_series:
            raise ValueError(
                f"{self.what} must hold values, found {num_series} series without any in their last {context_length} steps."
            )
        return Contents(num_series, num_rows, shared, num_left_out, left_out)

    def series(
        self, frame: pd.DataFrame, freq: str, *, fill: bool, spacing: Spacing | None = None
    ) -> dict[Any, pd.Series]:
        """The series of one of the `tables`, on the grid of `freq`; `spacing` is shown them as they are."""
        by_item = series_by_item(frame, self.what, self.columns)
        if spacing is not None:
            spacing.add(by_item)
        return aligned(by_item, freq, self.what, self.columns, fill=fill)

    def _frequency(self, chunk_rows: int) -> str:
        is_empty = True
        for frame in self.tables(chunk_rows):
            is_empty = False
            freq = frequency_of(series_by_item(frame, self.what, self.columns), self.what, self.columns)
            if freq is not None:
                return freq
        if is_empty:
            raise ValueError(f"{self.what} must hold at least one series, found no rows.")
        raise ValueError(f"freq must be given: no series of {self.what} has the three values that tell its frequency.")

    def _column_names(self) -> list[str]:
        if self.path.suffix == ".csv":
            return column_names(self.path, self.what)
        return self._schema().names

    def _schema(self) -> Any:
        try:
            return import_pyarrow().parquet.read_schema(self.path)
        except (ValueError, OSError) as error:
            raise unreadable(self.what, error) from error

    def _check_types(self) -> None:
        """Raise a ValueError where an item is a list, a structure or a map."""
        pa, kind = import_pyarrow(), self._schema().field(self.columns.item).type
        if pa.types.is_nested(kind):
            raise ValueError(
                f"{self.what} must have text, numbers or dates as {self.columns.item}, found {kind}: make one text or number of it."
            )

    def _batches(self, rows: int) -> Iterator[pd.DataFrame]:
        first = 1
        for frame in self._read_csv(rows) if self.path.suffix == ".csv" else self._read_parquet(rows):
            is_missing = frame[self.columns.item].isna().to_numpy()
            if is_missing.any():
                raise ValueError(
                    f"{self.what} cannot be read: there are rows without {self.columns.item}, the first is row {first + int(is_missing.argmax())}."
                )
            first += len(frame)
            if len(frame):
                yield frame

    def _read_csv(self, rows: int) -> Iterator[pd.DataFrame]:
        return csv_tables(self.path, self.what, self.columns, rows)

    def _read_parquet(self, rows: int) -> Iterator[pd.DataFrame]:
        parquet = import_pyarrow().parquet
        try:
            # With a buffer, a row group, which may be the whole file, comes in by pages.
            with parquet.ParquetFile(self.path, buffer_size=2**18) as file:
                for batch in file.iter_batches(rows, columns=list(self.columns)):
                    frame = batch.to_pandas(ignore_metadata=True)  # where a column is the index of a saved frame
                    if isinstance(frame[self.columns.item].dtype, pd.CategoricalDtype):
                        frame[self.columns.item] = frame[self.columns.item].astype(object)
                    yield frame
        except (ValueError, OSError) as error:  # arrow's own among them
            raise unreadable(self.what, error) from error


@dataclass
class Seen:
    """Which items have come before, at 8 bytes an item: sorted lists of their hashes, each at least twice as long as the next.

    Two of ten million items have the same hash with a probability of 3e-6.
    """

    hashes: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, items: NDArray[Any]) -> int | None:
        """Add items; the position of the first that has come before, among them or earlier."""
        new = pd.util.hash_array(items)
        is_old = pd.Series(new).duplicated().to_numpy()
        for old in self.hashes:
            places = np.minimum(np.searchsorted(old, new), len(old) - 1)
            is_old = is_old | (old[places] == new)  # not in place: pandas 3 answers with read-only arrays
        if is_old.any():
            return int(is_old.argmax())
        self.hashes.append(np.sort(new))
        while len(self.hashes) > 1 and len(self.hashes[-2]) < 2 * len(self.hashes[-1]):
            self.hashes.append(np.sort(np.concatenate([self.hashes.pop(), self.hashes.pop()])))
        return None
