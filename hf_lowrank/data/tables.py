"""Tables of series in long format: the columns that they have, and the files that they are read from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

__all__ = [
    "BATCH_ROWS",
    "LONG_FORMAT",
    "LongColumns",
    "check_columns",
    "check_present",
    "check_suffix",
    "check_table_file",
    "column_names",
    "csv_tables",
    "read_table",
    "unreadable",
]

BATCH_ROWS = 65_536  # rows read at once
SUFFIXES = (".csv", ".parquet")
# What stands for a missing value or time in a CSV file. An item of any of these names is an item.
MISSING = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "-NaN", "NaT", "NULL", "null", "None"]


class LongColumns(NamedTuple):
    """The names of the columns of a table in long format: one row a value, with its item and its time."""

    item: str = "item_id"
    time: str = "timestamp"
    value: str = "target"


LONG_FORMAT = LongColumns()


def check_columns(names: Iterable[object], what: str, columns: Sequence[str] = LONG_FORMAT) -> None:
    """Raise a ValueError where a table does not have each of the columns once, `LongColumns` or those of groups."""
    wanted = f"The long format has the columns {', '.join(columns[:-1])} and {columns[-1]}"
    wanted += "; a wide DataFrame has times as its index and numbers in every column." if len(columns) == 3 else "."
    check_present(names, what, columns, wanted)


def check_present(names: Iterable[object], what: str, columns: Sequence[str], wanted: str) -> None:
    """Raise a ValueError that ends in `wanted` where a table does not have each of the columns once."""
    present = [str(name) for name in names]
    if missing := [column for column in columns if column not in present]:
        separator = next((mark for mark in (";", "\t", "|") if len(present) == 1 and mark in present[0]), None)
        hint = f" Its columns must be separated by commas, not {separator!r}." if separator else ""
        raise ValueError(f"{what} has no column {', '.join(missing)}; found {', '.join(present)}. {wanted}{hint}")
    if twice := [column for column in columns if present.count(column) > 1]:
        raise ValueError(f"{what} must have each column once, found {', '.join(twice)} more often. {wanted}")


def check_suffix(path: Path, argument: str) -> None:
    """Raise a ValueError where a file is neither CSV nor parquet by its name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{argument} must end in .csv or .parquet, found {path.name!r}.")


def check_table_file(path: Path, argument: str) -> None:
    """Raise where this is no file that ends in .csv or .parquet; `argument` is what the message calls it.

    Raises:
        FileNotFoundError, ValueError: There is no such file; it is a folder, or its name ends otherwise.
    """
    check_suffix(path, argument)
    if path.is_dir():
        raise ValueError(f"{argument} must be a .csv or .parquet file, found the folder {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: file {str(path)!r} does not exist.")


def read_table(path: Path, argument: str, columns: Sequence[str] = LONG_FORMAT) -> pd.DataFrame:
    """The table in long format of a CSV or parquet file; items of a CSV file are text, so that 007 and NA stay what they are.

    Raises:
        FileNotFoundError, ValueError: There is no such file, it cannot be read, or it lacks a column.
    """
    check_table_file(path, argument)
    what = f"{argument}: file {path.name!r}"
    if path.suffix == ".csv":
        check_columns(column_names(path, what), what, columns)
        return pd.concat(csv_tables(path, what, columns, BATCH_ROWS), ignore_index=True)
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise unreadable(what, error) from error


def unreadable(what: str, error: Exception) -> ValueError:
    """The error that a file cannot be read, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return ValueError(
            f"{what} cannot be read: it must be UTF-8 text, found the byte {error.object[error.start]:#04x}."
        )
    if isinstance(error, pd.errors.EmptyDataError):
        return ValueError(f"{what} cannot be read: it is empty.")
    text = " ".join(str(error).split())
    too_many = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", text)
    if too_many or isinstance(error, pd.errors.ParserWarning):
        where = "line {1} has {2} values, not {0}" if too_many else "rows have more values than the first has names"
        return ValueError(
            f"{what} cannot be read: {where.format(*too_many.groups() if too_many else ())}; a decimal comma, or a comma in a text "
            "without quotes?"
        )
    return ValueError(f"{what} cannot be read: {text}")


def column_names(path: Path, what: str) -> list[str]:
    """The columns of a CSV file, as its first row has them."""
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise unreadable(what, error) from error
    return [str(name) for name in header.iloc[0]]


def csv_tables(
    path: Path, what: str, columns: Sequence[str], rows: int, text: Sequence[str] = ()
) -> Iterator[pd.DataFrame]:
    """Columns of a CSV file in tables of so many rows: the first, which is the item, and those of `text` as text.

    Raises:
        ValueError: The file cannot be read, or a row has more values than there are columns, as a decimal comma makes it have.
    """
    names = column_names(path, what)
    places = [names.index(column) for column in columns]
    item = places[0]
    options: dict[str, Any] = {
        "header": 0,
        # All columns: told which to read, pandas drops what is behind the last, and reads 1,5 as 1.
        "names": range(len(names)),
        "index_col": False,
        "dtype": {item: str} | {names.index(column): str for column in text},
        "keep_default_na": False,
        "na_values": {column: [""] if column == item else MISSING for column in range(len(names))},
        "chunksize": rows,
        "low_memory": False,
    }
    try:
        with pd.read_csv(path, **options) as frames:
            while (frame := _next_table(frames)) is not None:
                yield frame[places].set_axis(list(columns), axis=1)
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise unreadable(what, error) from error


def _next_table(frames: Any) -> pd.DataFrame | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # that values are lost
        return next(frames, None)
