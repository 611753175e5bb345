"""Whole series, a few at a time, from a long table that may be larger than memory, and a look at all of them before the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..data.group_columns import GroupColumns
from ..data.group_tables import Categories, as_text, group_tables, is_number, no_covariate
from ..data.tables import BATCH_ROWS, check_present, check_table_file, column_names, csv_tables, unreadable
from ..data.times import Spacing, times_after
from .groups import KnownFuture, Layout, frequency_of

__all__ = ["Contents", "LongFile", "import_pyarrow", "whole_series"]

GROUP_FORMAT = GroupColumns()
NAMED = 10  # of the series that are left out, so many are named


def import_pyarrow() -> Any:
    """The module pyarrow, or an ImportError that says how to get it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Forecasting a file needs pyarrow: pip install "hf_lowrank[forecast]".') from error
    return pyarrow


# ---- From tables to series -------------------------------------------------------------------------------------------


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
class TableFile:
    """Columns of a CSV or parquet file in long format, row after row.

    Items and covariates of a CSV file are text, so that 007 stays 007; those of a parquet file are what they are.

    Attributes:
        path: Of the file.
        argument: What errors call it.
        columns: The items, the times and what else is read.
        covariates: Which of them are covariates.

    Raises:
        FileNotFoundError, ValueError: There is no such file, it is empty, a column is missing, or items or covariates are of a type that
            they cannot have.
    """

    path: Path
    argument: str
    columns: tuple[str, ...]
    covariates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_table_file(self.path, self.argument)
        wanted = f"The long format has the columns {', '.join(self.columns)}."
        check_present(self._column_names(), self.what, self.columns, wanted)
        if self.path.suffix == ".parquet":
            self._check_types()

    @property
    def what(self) -> str:
        """What errors call the file."""
        return f"{self.argument}: file {self.path.name!r}"

    @property
    def item(self) -> str:
        """The column of the items."""
        return self.columns[0]

    def identity(self) -> dict[str, Any]:
        """What tells this state of the file from another one."""
        status = self.path.stat()
        return {"path": str(self.path.resolve()), "size": status.st_size, "modified_ns": status.st_mtime_ns}

    def types(self) -> tuple[Any, Any]:
        """The arrow types of item and time in a table of forecasts."""
        pa = import_pyarrow()
        if self.path.suffix == ".csv":
            return pa.string(), pa.timestamp("us")
        schema = self._schema()
        item, time = (schema.field(name).type for name in self.columns[:2])
        item = item.value_type if pa.types.is_dictionary(item) else item
        return item, pa.timestamp(time.unit if pa.types.is_timestamp(time) else "us")

    def batches(self, rows: int) -> Iterator[pd.DataFrame]:
        """Tables of at most so many rows; a ValueError where a row has no item."""
        first = 1
        for frame in self._read_csv(rows) if self.path.suffix == ".csv" else self._read_parquet(rows):
            is_missing = frame[self.item].isna().to_numpy()
            if is_missing.any():
                raise ValueError(
                    f"{self.what} cannot be read: there are rows without {self.item}, the first is row {first + int(is_missing.argmax())}."
                )
            first += len(frame)
            if len(frame):
                yield frame

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
        """Raise a ValueError where an item is a list, a structure or a map, or a covariate one of these, a time or a decimal number."""
        types, schema = import_pyarrow().types, self._schema()
        kind = schema.field(self.item).type
        if types.is_nested(kind):
            raise ValueError(
                f"{self.what} must have text, numbers or dates as {self.item}, found {kind}: make one text or number of it."
            )
        for name in self.covariates:
            kind = schema.field(name).type
            if types.is_nested(kind) or types.is_temporal(kind) or types.is_decimal(kind):
                raise no_covariate(name, self.what, str(kind))

    def _read_csv(self, rows: int) -> Iterator[pd.DataFrame]:
        return csv_tables(self.path, self.what, self.columns, rows, text=self.covariates)

    def _read_parquet(self, rows: int) -> Iterator[pd.DataFrame]:
        parquet = import_pyarrow().parquet
        try:
            # With a buffer, a row group, which may be the whole file, comes in by pages.
            with parquet.ParquetFile(self.path, buffer_size=2**18) as file:
                for batch in file.iter_batches(rows, columns=list(self.columns)):
                    frame = batch.to_pandas(ignore_metadata=True)  # where a column is the index of a saved frame
                    if isinstance(frame[self.item].dtype, pd.CategoricalDtype):
                        frame[self.item] = frame[self.item].astype(object)
                    yield frame
        except (ValueError, OSError) as error:  # arrow's own among them
            raise unreadable(self.what, error) from error


# ---- All of an input -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What an input holds.

    Attributes:
        num_series, num_rows, freq: Targets of items, rows, and their pandas frequency.
        num_left_out, left_out: How many series have nothing to forecast from, with the first of them.
        categories: Of its covariates.
    """

    num_series: int
    num_rows: int
    freq: str
    num_left_out: int
    left_out: list[str]
    categories: Categories


@dataclass(frozen=True)
class LongFile:
    """An input in long format, which is never in memory as a whole, and a file with what is known of its future, which is.

    Without `future`, the last rows of each item tell what is known.
    """

    input: TableFile
    columns: GroupColumns
    future: TableFile | None

    @classmethod
    def of(cls, path: Path, columns: GroupColumns = GROUP_FORMAT, future: Path | None = None) -> LongFile:
        """Of the files with these names; columns that are not named are not read.

        Raises:
            FileNotFoundError, ValueError: See `TableFile`.
        """
        known = columns.known_covariates
        return cls(
            TableFile(path, "input", columns.all, columns.covariates),
            columns,
            None if future is None else TableFile(future, "future", (columns.item, columns.time, *known), known),
        )

    @property
    def what(self) -> str:
        """What errors call the input."""
        return self.input.what

    def identity(self) -> dict[str, Any]:
        """What tells this state of the files from another one."""
        return {
            "input": self.input.identity(),
            "future": None if self.future is None else self.future.identity(),
        }

    def tables(self, chunk_rows: int) -> Iterator[pd.DataFrame]:
        """Tables of whole items of about `chunk_rows` rows each, see `whole_series`."""
        return whole_series(self.input.batches(min(BATCH_ROWS, chunk_rows)), self.columns.item, chunk_rows)

    def layout(self, freq: str, categories: Categories, horizon: int, *, fill: bool) -> Layout:
        """What makes groups of the tables; it reads what is known of the future."""
        known = None
        if self.future is not None:
            frames = list(self.future.batches(BATCH_ROWS))
            if not frames:
                raise ValueError(
                    f"{self.future.what} must hold the next {horizon} times of every item, found no rows."
                )
            table = pd.concat(frames, ignore_index=True)
            known = KnownFuture.of(table, self.future.what, self.columns, categories)
        return Layout(self.what, self.columns, freq, fill, horizon, known)

    def look(
        self,
        *,
        freq: str | None,
        context_length: int,
        horizon: int,
        jointly: bool,
        chunk_rows: int,
        advance: Callable[[int], None],
    ) -> Contents:
        """Read everything once and check it: better an error now than after hours of forecasts.

        `advance` is told the number of series after each table.

        Raises:
            ValueError: A value, a time, the order of the rows or what is known of the future is not as it should be.
        """
        categories = categories_of_file(self.input)
        shared = freq or self._frequency(chunk_rows, categories)
        layout = self.layout(shared, categories, horizon, fill=freq is not None)
        seen, spacing = Seen(), Spacing(shared)
        known_items: set[Any] = set()
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
            tables = group_tables(frame, self.what, self.columns, categories)
            spacing.add(tables)
            groups = layout.groups(tables)
            last, name = max((table.index[-1], str(item)) for item, table in groups.past.items())
            latest = f"{self.columns.item} {name!r}"
            times_after(pd.DatetimeIndex([last]), [horizon], shared, lambda _, latest=latest: latest)  # type: ignore[misc]
            are_forecast = groups.are_forecast(context_length, jointly=jointly)
            left_out += groups.names(~are_forecast)[: NAMED - len(left_out)]
            num_left_out += int((~are_forecast).sum())
            num_series += are_forecast.size
            num_rows += len(frame)
            if layout.known is not None:
                known_items.update(tables)
            advance(are_forecast.size)
        if num_series == 0:
            raise ValueError(f"{self.what} must hold at least one series, found no rows.")
        if freq is not None:
            spacing.check(self.what, self.columns.item)
        if layout.known is not None:
            layout.known.check_used(known_items)
        if num_left_out == num_series:
            raise ValueError(
                f"{self.what} must hold values, found {num_series} series without any in their last {context_length} steps."
            )
        return Contents(num_series, num_rows, shared, num_left_out, left_out, categories)

    def _frequency(self, chunk_rows: int, categories: Categories) -> str:
        is_empty = True
        for frame in self.tables(chunk_rows):
            is_empty = False
            tables = group_tables(frame, self.what, self.columns, categories)
            freq = frequency_of(tables, self.what, self.columns)
            if freq is not None:
                return freq
        if is_empty:
            raise ValueError(f"{self.what} must hold at least one series, found no rows.")
        raise ValueError(f"freq must be given: no series of {self.what} has the three values that tell its frequency.")


def categories_of_file(file: TableFile) -> Categories:
    """The categories of the covariates of a file, which is read once more for those that are no numbers.

    A covariate of a CSV file is a number where all of its values are.
    """
    names = _no_numbers(file)
    found: dict[str, dict[str, None]] = {name: {} for name in names}  # in the order in which they come
    declared = set()  # in an order of their own
    for frame in _some_columns(file, names):
        for name in names:
            found[name] |= dict.fromkeys(as_text(frame[name], file.what).cat.categories)
            if isinstance(frame[name].dtype, pd.CategoricalDtype):
                declared.add(name)
    lists = {name: list(text) if name in declared else sorted(text) for name, text in found.items()}
    return {name: lists.get(name) for name in file.covariates}


def _no_numbers(file: TableFile) -> list[str]:
    is_csv = file.path.suffix == ".csv"
    numbers = set(file.covariates)
    for frame in _some_columns(file, file.covariates):
        numbers -= {name for name in numbers if not (_holds_numbers if is_csv else is_number)(frame[name])}
        if not is_csv or not numbers:  # a column of a parquet file has one type
            break
    return [name for name in file.covariates if name not in numbers]


def _some_columns(file: TableFile, names: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Tables of these covariates and the items; none where there are no covariates."""
    part = replace(file, columns=(file.item, *names), covariates=tuple(names))
    yield from part.batches(BATCH_ROWS) if names else ()


def _holds_numbers(column: pd.Series) -> bool:
    try:
        pd.to_numeric(column)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


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
