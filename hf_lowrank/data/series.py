"""Time series in any of the usual shapes, as arrays; tables of them in long format, as series on their times."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from .tables import LONG_FORMAT, LongColumns, check_columns, read_table
from .times import read_times

__all__ = [
    "RowsByItem",
    "SeriesByName",
    "check_calibration",
    "in_order",
    "parted",
    "read_series",
    "read_values",
    "series_by_item",
    "series_of_frame",
]

Item = TypeVar("Item")

LEAST_PARTS = 10  # of series, or of pieces of them, where a fifth is held out

# Float series by name, each on a regular DatetimeIndex; NaN is missing.
SeriesByName: TypeAlias = "dict[str, pd.Series]"


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


def check_calibration(series: Sequence[NDArray[np.float64]], width: int, patch: int) -> None:
    """Say where series say little of a model of this width, which reads so many values as one token; NaN is missing.

    Raises:
        ValueError: None varies: whatever their values, a model that scales its context reads them all as the same.
    """
    if all(np.nanmin(values) == np.nanmax(values) for values in series):
        raise ValueError(
            f"calibration: each of {len(series)} series has one value throughout, such as {np.nanmax(series[0]):g}; give series "
            "that vary, or 'synthetic'."
        )
    num_values = sum(int((~np.isnan(values)).sum()) for values in series)
    if num_values // patch < width:
        found = f"{num_values // patch} patches of {patch} values" if patch > 1 else f"{num_values} values"
        warnings.warn(
            f"calibration: {found} in {len(series)} series are less than the model's width, {width}, and say nothing of most "
            "directions: give more or longer series, or 'synthetic'.",
            stacklevel=3,
        )


def _pieces(values: NDArray[np.float64], number: int) -> list[NDArray[np.float64]]:
    return [piece for piece in np.array_split(values, number) if not np.isnan(piece).all()]


def parted(series: Sequence[Item], cut: Callable[[Any, int], list[Any]] = _pieces) -> tuple[list[Item], list[Item]]:
    """Series, and every fifth of them, which is held out. Where there are fewer than ten, pieces of them, one behind the other.

    `cut` makes so many pieces of one, without those that have no value.
    """
    pieces = [piece for values in series for piece in cut(values, -(-LEAST_PARTS // len(series)))]
    kept, held_out = ([piece for i, piece in enumerate(pieces) if (i % 5 == 4) == out] for out in (False, True))
    if not held_out:
        raise ValueError(
            f"calibration: {len(series)} series with {len(pieces)} pieces that have values are too few to hold some out."
        )
    return kept, held_out


def _items(data: Any, columns: LongColumns) -> Iterable[Any]:
    """The series in `data`, one by one, as they come."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        series = series_of_frame(read_table(path, "series", columns), f"series: file {path.name!r}", columns)
        return [values.to_numpy() for values in series.values()]
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
        elif isinstance(item, np.ma.MaskedArray):
            item = np.ma.filled(item.astype(np.float64), np.nan)
        if getattr(item, "dtype", np.dtype(float)).kind in "mMc":
            raise TypeError(f"found {item.dtype}")
        values = np.asarray(item, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
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


@dataclass(frozen=True)
class RowsByItem:
    """The rows of a table in long format, item by item in the order of their first rows, each in the order of time.

    Attributes:
        order: The positions of the rows in the table.
        times: In this order.
        slices: Of each item its rows in this order.
    """

    order: NDArray[np.intp]
    times: pd.DatetimeIndex
    slices: dict[Any, slice]

    @classmethod
    def of(cls, frame: pd.DataFrame, what: str, columns: LongColumns) -> RowsByItem:
        """Of a table that has the columns of item and time.

        Raises:
            ValueError: A row has no item or time, these are of another type, or a time comes twice.
        """
        items = frame[columns.item]
        try:
            codes, names = pd.factorize(
                items.astype(object) if isinstance(items.dtype, pd.CategoricalDtype) else items
            )
        except TypeError:
            raise ValueError(
                f"{what} must have text, numbers or dates as {columns.item}, found a {type(items.iloc[0]).__name__}."
            ) from None
        if (codes < 0).any():
            raise ValueError(f"{what} has rows without {columns.item}: row {int((codes < 0).argmax()) + 1}.")
        times = read_times(frame, what, columns)
        if times.hasnans:
            raise ValueError(
                f"{columns.item} {str(items[times.isna()].iloc[0])!r} of {what} has a row without a {columns.time}."
            )
        order = np.lexsort((times.asi8, codes))
        times, codes = times[order], codes[order]
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        is_double = (
            np.append(False, (codes[1:] == codes[:-1]) & (times[1:] == times[:-1])) if len(codes) else codes > 0
        )
        if is_double.any():
            first = int(is_double.argmax())
            raise _duplicate(f"{columns.item} {str(names[codes[first]])!r} of {what}", times[first])
        return cls(order, times, dict(zip(names, map(slice, starts, np.append(starts[1:], len(codes))))))


def series_by_item(frame: pd.DataFrame, what: str, columns: LongColumns = LONG_FORMAT) -> dict[Any, pd.Series]:
    """The series of a table in long format by its items as they are, in the order of their first rows, each in the order of time.

    `what` names the table in errors, `columns` are those of item, time and value.

    Raises:
        ValueError: A column is missing, twice there or of another type, a row has no item or time, a time comes twice, or a value
            is infinite in float32, which models compute in.
    """
    check_columns(frame.columns, what, columns)
    rows = RowsByItem.of(frame, what, columns)
    values = read_values(frame, what, columns)[rows.order]
    return {item: pd.Series(values[part], index=rows.times[part]) for item, part in rows.slices.items()}


def series_of_frame(frame: pd.DataFrame, what: str, columns: LongColumns = LONG_FORMAT) -> SeriesByName:
    """`series_by_item` by the items as text, in the order of the names.

    Raises:
        ValueError: What that raises, or two items are the same text.
    """
    series: SeriesByName = {}
    for item, values in series_by_item(frame, what, columns).items():
        if series.setdefault(str(item), values) is not values:
            raise ValueError(
                f"{what} must have items that differ as text, found {columns.item} {str(item)!r} of two types."
            )
    return dict(sorted(series.items()))


def read_values(frame: pd.DataFrame, what: str, columns: LongColumns) -> NDArray[np.float64]:
    """The values of a table; what is no number, or infinite in float32, is an error that names it."""
    column = frame[columns.value]
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    try:
        if column.dtype.kind in "mMc" or isinstance(column.dtype, pd.PeriodDtype):
            raise TypeError
        values = pd.to_numeric(column).to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError, OverflowError):
        is_wrong = ~column.map(_is_number).to_numpy(dtype=bool)
        raise _wrong_value(frame, what, columns, is_wrong, "must be a number") from None
    is_infinite = _infinite_in_float32(values)
    if is_infinite.any():
        raise _wrong_value(frame, what, columns, is_infinite, "must be finite in float32, empty where it is missing")
    return values


def _is_number(value: Any) -> bool:
    """Whether a value can be read as one of float32, or is missing."""
    if isinstance(value, (pd.Timestamp, pd.Timedelta, pd.Period, complex, list, tuple, dict, np.ndarray)):
        return False
    try:
        return bool(pd.isna(value)) or bool(np.isfinite(np.float64(pd.to_numeric(value))))
    except (TypeError, ValueError, OverflowError):
        return False


def _wrong_value(
    frame: pd.DataFrame, what: str, columns: LongColumns, is_wrong: NDArray[np.bool_], wanted: str
) -> ValueError:
    row = frame.iloc[int(is_wrong.argmax())]
    value = row[columns.value]
    found = repr(value) if isinstance(value, (str, bytes)) else str(value)
    found = found if len(found) < 50 else f"{found[:40]}..."
    return ValueError(
        f"{columns.value} of {columns.item} {str(row[columns.item])!r} of {what} {wanted}, found {found} at "
        f"{columns.time} {row[columns.time]}."
    )


def _infinite_in_float32(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    with np.errstate(over="ignore"):
        return np.isinf(values.astype(np.float32))


def _duplicate(what: str, time: pd.Timestamp) -> ValueError:
    return ValueError(f"{what} has duplicate timestamps ({time}): there must be one row for each time.")


def in_order(index: pd.DatetimeIndex, target: NDArray[np.float64], what: str) -> pd.Series:
    """A series in the order of time, with every time once."""
    values = pd.Series(target, index=index).sort_index()
    index = values.index
    if index.hasnans:
        raise ValueError(f"{what} has a row without a timestamp.")
    if index.has_duplicates:
        raise _duplicate(what, index[index.duplicated()][0])
    return values
