"""Time series in any of the usual shapes, as arrays; tables of them in long format, as series on their times; frequencies and grids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

__all__ = [
    "LONG_FORMAT",
    "LongColumns",
    "SeriesByName",
    "check_columns",
    "check_finite_in_float32",
    "in_order",
    "inferred_frequency",
    "read_frame",
    "read_series",
    "regular",
    "series_of_frame",
]

# Float series by name, each on a regular DatetimeIndex; NaN is missing.
SeriesByName: TypeAlias = "dict[str, pd.Series]"


class LongColumns(NamedTuple):
    """The names of the columns of a table in long format: one row a value, with its item and its time."""

    item: str = "item_id"
    time: str = "timestamp"
    value: str = "target"


LONG_FORMAT = LongColumns()


def read_series(data: Any, columns: LongColumns = LONG_FORMAT) -> list[NDArray[np.float64]]:
    """Time series in any of the usual shapes, as a list of 1-D float64 arrays in which NaN is missing.

    Args:
        data: One of

            - a list or tuple of 1-D arrays, tensors or lists of numbers (None and NaN are missing), or of the numbers of one series;
            - one array or tensor of shape (time,) or (batch, time);
            - a `datasets.Dataset`, or any other rows that are dictionaries, with a 1-D `target` in every row;
            - a DataFrame in long format, with the columns item_id, timestamp and target, one row a value;
            - a wide DataFrame: its index are times, and every column is a series of numbers;
            - the path of a CSV or parquet file in long format.

            In long format rows may come in any order and time stamps need not be regular: values are put in the order of
            time and nothing is put between them.
        columns: What the columns of the long format are called.

    Raises:
        ValueError: It is none of these, a value is infinite (in float32, which models compute in), or nothing is observed.
        FileNotFoundError: There is no such file.

    Series without a single observed value are left out, with a warning.
    """
    series = [_one_series(item, i) for i, item in enumerate(_items(data, columns))]
    if not series:
        raise ValueError("series is empty: give at least one time series.")
    observed = [values for values in series if not np.isnan(values).all()]
    if not observed:
        raise ValueError(f"series holds no observed value: all values of all {len(series)} series are missing.")
    if dropped := len(series) - len(observed):
        warnings.warn(
            f"series: {dropped} of {len(series)} series have no observed value and are left out.", stacklevel=2
        )
    return observed


def _items(data: Any, columns: LongColumns) -> Iterable[Any]:
    """The series in `data`, one by one, as they come."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        return [
            values.to_numpy()
            for values in series_of_frame(read_frame(path), f"series: file {path.name!r}", columns).values()
        ]
    if isinstance(data, pd.DataFrame):
        if _is_wide(data, columns):
            return [values for _, values in data.sort_index().items()]
        return [values.to_numpy() for values in series_of_frame(data, "series: the DataFrame", columns).values()]
    if isinstance(data, (torch.Tensor, np.ndarray, pd.Series)) and data.dtype != object:
        if data.ndim not in (1, 2):
            raise ValueError(f"series must have shape (time,) or (batch, time), found {tuple(data.shape)}.")
        return data if data.ndim == 2 else [data]
    if (
        isinstance(data, (list, tuple))
        and data
        and all(value is None or isinstance(value, (int, float, np.number)) for value in data)
    ):
        return [data]
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            "series must be a list of 1-D arrays, an array or tensor, rows with a target, a DataFrame, or the path of "
            f"a CSV or parquet file; found a {type(data).__name__}."
        )
    return data


def _is_wide(frame: pd.DataFrame, columns: LongColumns) -> bool:
    """Whether a table has times as its index and a series in every column: where a column may be anything else, it is in long format."""
    has_times = isinstance(frame.index, (pd.DatetimeIndex, pd.PeriodIndex))
    is_long = any(name in columns for name in frame.columns)
    return has_times and not is_long and all(pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes)


def _one_series(item: Any, position: int) -> NDArray[np.float64]:
    what = f"series: item {position}"
    if isinstance(item, Mapping):
        if "target" not in item:
            raise ValueError(f"{what} has no target; found {', '.join(map(str, item))}.")
        item = item["target"]
    try:
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().double().numpy()  # numpy has no bfloat16
        elif isinstance(item, pd.Series):
            item = item.to_numpy(dtype=np.float64, na_value=np.nan)
        values = np.asarray(item, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a 1-D array of numbers ({error}).") from None
    if values.ndim != 1:
        raise ValueError(f"{what} must have one dimension, time; found shape {values.shape}.")
    infinite = _infinite_in_float32(values)
    if infinite.any():
        raise ValueError(
            f"{what} holds the value {values[infinite][0]} at step {infinite.argmax()}, infinite in float32; "
            "mark missing values with NaN."
        )
    return values


def read_frame(path: Path) -> pd.DataFrame:
    """The table of a CSV or parquet file.

    Raises:
        FileNotFoundError, ValueError: There is no such file; its name ends otherwise.
    """
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"file must end in .csv or .parquet, found {path.name!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"file {str(path)!r} does not exist.")
    return readers[path.suffix](path)


def series_of_frame(frame: pd.DataFrame, what: str, columns: LongColumns = LONG_FORMAT) -> SeriesByName:
    """The series of a table in long format, each in the order of time.

    `what` names the table in errors, `columns` are those of item, time and value.

    Raises:
        ValueError: A column is missing or of another type, a row has no item or time, or a time comes twice.
    """
    item_id, timestamp, value = columns
    check_columns(frame.columns, what, columns)
    try:
        stamps = _parse_dates(frame[timestamp])
        target = pd.to_numeric(frame[value]).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} needs dates as {timestamp} and numbers as {value}: {error}") from None
    if frame[item_id].isna().any():
        raise ValueError(f"{what} has rows without an {item_id}.")
    groups = frame.groupby(frame[item_id].astype(str).to_numpy()).indices
    return {
        item: in_order(stamps[rows], target[rows], f"{item_id} {item!r} of {what}") for item, rows in groups.items()
    }


def _infinite_in_float32(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        return np.isinf(values.astype(np.float32))


def check_finite_in_float32(values: pd.Series, what: str) -> None:
    """Raise ValueError where a value is infinite in float32, which models compute in."""
    infinite = _infinite_in_float32(values.to_numpy(dtype=np.float64))
    if infinite.any():
        raise ValueError(
            f"{what} has the value {values.to_numpy()[infinite][0]} at {values.index[infinite][0]}, infinite in float32: leave it empty if "
            "it is missing."
        )


def check_columns(names: Iterable[object], what: str, columns: LongColumns = LONG_FORMAT) -> None:
    """Raise a ValueError where a table does not have the columns of the long format."""
    present = [str(name) for name in names]
    if missing := [column for column in columns if column not in present]:
        raise ValueError(
            f"{what} has no column {', '.join(missing)}; found {', '.join(present)}. "
            f"The long format has the columns {columns.item}, {columns.time} and {columns.value}; a wide DataFrame has times as its "
            "index and numbers in every column."
        )


def _parse_dates(column: pd.Series) -> pd.DatetimeIndex:
    """ISO 8601 of any precision, or what format pandas finds in the first row; the time zone is dropped after a shift to UTC."""
    if pd.api.types.is_numeric_dtype(column) and not column.isna().all():
        raise ValueError(f"found the number {column.dropna().iloc[0]}")
    try:
        stamps = pd.to_datetime(column, format="ISO8601", utc=True)
    except ValueError:
        stamps = pd.to_datetime(column, utc=True)
    return pd.DatetimeIndex(stamps).tz_localize(None)


def in_order(index: pd.DatetimeIndex, target: NDArray[np.float64], what: str) -> pd.Series:
    """A series in the order of time, with every time once."""
    values = pd.Series(target, index=index).sort_index()
    index = values.index
    if index.hasnans:
        raise ValueError(f"{what} has a row without a timestamp.")
    if index.has_duplicates:
        twice = index[index.duplicated()][0]
        raise ValueError(f"{what} has duplicate timestamps ({twice}): there must be one row for each time.")
    return values


def inferred_frequency(index: pd.DatetimeIndex) -> str | None:
    """The pandas frequency of three or more times, such as "h"; None where they are not regular, or fewer."""
    if len(index) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pandas 3.1 announces an offset in place of its name
        freq = pd.infer_freq(index)
    return getattr(freq, "freqstr", freq)


def regular(values: pd.Series, freq: str | None, what: str) -> pd.Series:
    """A series on the grid of `freq`, or as it is where `freq` is None; then it must be regular already."""
    index = values.index
    if freq is None:
        if len(index) > 2 and inferred_frequency(index) is None:
            gaps = index.to_series().diff()
            odd = gaps.index[gaps.notna() & (gaps != gaps.mode()[0])][0]
            raise ValueError(
                f"{what} has irregular timestamps, such as {odd}: resample it, or give freq "
                "(such as 'h', 'D' or 'B') to put it on that grid with NaN where nothing was observed."
            )
        return values
    grid = pd.date_range(index[0], index[-1], freq=freq)
    off_grid = index.difference(grid)
    if len(off_grid):
        raise ValueError(
            f"{what} has {len(off_grid)} timestamps off the grid of freq={freq!r}, such as {off_grid[0]}."
        )
    return values.reindex(grid)
