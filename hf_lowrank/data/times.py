"""Times of series: read from text, put in order and on a regular grid; frequencies in pandas' words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.tseries.api import guess_datetime_format

from .tables import LongColumns

__all__ = ["Spacing", "follows", "inferred_frequency", "known_frequency", "read_times", "regular", "times_after"]

MAX_GRID = 10**7  # steps of a grid, unless the values themselves are as many
ZONED = r"[T ].*(?:Z|[+-]\d\d(?::?\d\d)?)$"  # ISO 8601 with an offset from UTC


def read_times(frame: pd.DataFrame, what: str, columns: LongColumns) -> pd.DatetimeIndex:
    """The times of a table: ISO 8601 of any precision, or one other format that can be read in one way; in UTC where they have a zone.

    Raises:
        ValueError: A time is none, or is ambiguous; the message names it and its item.
    """
    column = frame[columns.time]
    if not pd.api.types.is_datetime64_any_dtype(column):
        column = _parsed(column.astype(object), frame, what, columns)
    times = pd.DatetimeIndex(column)
    return times if times.tz is None else times.tz_convert("UTC").tz_localize(None)


def _parsed(column: pd.Series, frame: pd.DataFrame, what: str, columns: LongColumns) -> pd.Series:
    def wrong(is_wrong: Any, found: str = "found {value!r}") -> ValueError:
        row = int(np.argmax(is_wrong))
        return ValueError(
            f"{what} must have dates such as 2024-01-31 or 2024-01-31T13:00 as {columns.time}, "
            f"{found.format(value=column.iloc[row])} at {columns.item} {str(frame[columns.item].iloc[row])!r}."
        )

    if pd.api.types.infer_dtype(column, skipna=True) not in ("string", "date", "datetime", "datetime64", "empty"):
        is_number = column.map(lambda value: isinstance(value, (int, float, np.number, np.bool_))) & column.notna()
        if is_number.any():
            raise wrong(is_number, "found the number {value}")
    is_clock = column.isin(["now", "today"])  # which pandas takes for dates
    if is_clock.any():
        raise wrong(is_clock)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # pandas 2 announces that it will not mix zones
        try:
            times = pd.to_datetime(column, format="ISO8601")
            if getattr(times.dtype, "tz", None) is None and times.dtype != object:
                return times
        except (ValueError, TypeError, OverflowError, FutureWarning):
            pass  # zones that differ, another format or no dates
    try:
        times = pd.to_datetime(column, format="ISO8601", utc=True)
    except (ValueError, TypeError, OverflowError):
        return _in_another_format(column, wrong)
    is_zoned = column.astype(str).str.contains(ZONED) | column.isna()
    if not is_zoned.all():
        raise wrong(~is_zoned, "some with an offset from UTC and some without, such as {value}")
    return times


def _in_another_format(column: pd.Series, wrong: Any) -> pd.Series:
    """Dates in the one format of all rows, which pandas guesses from the first; an error where day and month can be swapped."""
    first = column[column.notna()].iloc[0]
    readings: list[pd.Series] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the first row shows which is the day
        formats = (
            {guess_datetime_format(first, dayfirst=flag) for flag in (False, True)} if isinstance(first, str) else ()
        )
    for known in filter(None, formats):
        try:
            readings.append(pd.to_datetime(column, format=known, utc="%z" in known))
        except (ValueError, TypeError):
            continue
    if not readings:
        parsed = [
            pd.to_datetime(column, errors="coerce", utc=True, format=known or "ISO8601")
            for known in formats or ("ISO8601",)
        ]
        missed = min((times.isna() & column.notna() for times in parsed), key=lambda is_wrong: is_wrong.sum())
        raise wrong(missed if missed.any() else column.notna())
    if len(readings) > 1 and not readings[0].equals(readings[1]):
        raise wrong(
            readings[0] != readings[1], "found {value!r}, of which the first number may be the day or the month,"
        )
    return readings[0]


def known_frequency(freq: str) -> Any:
    """The pandas offset of a frequency.

    Raises:
        ValueError: There is none of this name, or it does not go forward.
    """
    try:
        offset = pd.tseries.frequencies.to_offset(freq)
    except (ValueError, TypeError):
        offset = None
    if offset is None or offset.n < 1:
        raise ValueError(
            f"freq must be a pandas frequency such as 'h', '15min', 'D', 'B', 'W-MON' or 'MS', found {freq!r}."
        )
    return offset


def inferred_frequency(index: pd.DatetimeIndex) -> str | None:
    """The pandas frequency of three or more times, such as "h"; None where they are not regular, or fewer."""
    if len(index) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pandas 3.1 announces an offset in place of its name
        freq = pd.infer_freq(index)
    return getattr(freq, "freqstr", freq)


def follows(index: pd.DatetimeIndex, freq: str) -> NDArray[np.bool_]:
    """Of each time but the first whether it is one step of the frequency after the one before it, bool (len(index) - 1,)."""
    offset = known_frequency(freq)
    if isinstance(offset, pd.offsets.Tick):
        return np.diff(index) == pd.Timedelta(offset).to_timedelta64()
    with warnings.catch_warnings():
        # Some offsets are added one by one, and pandas says so.
        warnings.simplefilter("ignore", category=pd.errors.PerformanceWarning)
        return np.asarray(index[:-1] + offset == index[1:])


def times_after(
    last: pd.DatetimeIndex, steps: Sequence[int], freq: str, named: Callable[[int], str]
) -> list[pd.DatetimeIndex]:
    """The times so many steps of `freq` after the last ones, a table of times for each number of steps.

    Raises:
        ValueError: A time is past what can be told; `named` says of which position of `last`.
    """
    offset = known_frequency(freq)
    try:
        with warnings.catch_warnings():
            # Some offsets are added one by one, and pandas says so.
            warnings.simplefilter("ignore", category=pd.errors.PerformanceWarning)
            return [last + step * offset for step in steps]
    except (OverflowError, pd.errors.OutOfBoundsDatetime):
        latest = int(last.argmax())
        end = " (2262-04-11)" if last.unit == "ns" else ""
        raise ValueError(
            f"the forecast of {named(latest)} would go on for {max(steps)} steps of {freq!r} after {last[latest]}, past the last time "
            f"that can be told in {last.unit}{end}: give a smaller horizon, or times in a coarser unit."
        ) from None


@dataclass
class Spacing:
    """Whether values of any series are one step of a frequency apart, as they must be somewhere to be put on its grid.

    Series of less than three values do not tell.
    """

    freq: str
    is_found: bool = False
    odd: tuple[Any, str] | None = None  # the first item without, and the spacing of its values

    def add(self, series: Mapping[Any, pd.Series]) -> None:
        """Look at more series."""
        for item, values in series.items():
            if self.is_found:
                return
            index = values.index
            if len(index) > 2:
                self.is_found = bool(follows(index, self.freq).any())
                self.odd = self.odd or (item, inferred_frequency(index) or str(index.to_series().diff().min()))

    def check(self, what: str, item: str) -> None:
        """Raise a ValueError where none are."""
        if self.odd is not None and not self.is_found:
            name, spacing = self.odd
            raise ValueError(
                f"freq must be the spacing of the values, found {self.freq!r}: no two values of {what} are one step of it apart, "
                f"those of {item} {str(name)!r} come every {spacing!r}."
            )


def regular(values: pd.Series, freq: str | None, what: str) -> pd.Series:
    """A series on the grid of `freq`, or as it is where `freq` is None; then it must be regular already.

    Raises:
        ValueError: It is irregular, has times off the grid, or nearly nothing on a very long one.
    """
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
    _check_length(index, freq, what)
    grid = pd.date_range(index[0], index[-1], freq=freq)
    off_grid = index.difference(grid)
    if len(off_grid):
        raise ValueError(
            f"{what} has {len(off_grid)} timestamps off the grid of freq={freq!r}, such as {off_grid[0]}."
        )
    return values.reindex(grid)


def _check_length(index: pd.DatetimeIndex, freq: str, what: str) -> None:
    """Raise a ValueError where one odd date makes a grid that fills the memory."""
    first = index[0]
    step = pd.Series([first, first + known_frequency(freq)]).diff().iloc[1]
    steps = (index[-1] - first) / step if step.value > 0 else 0
    if steps > max(MAX_GRID, 100 * len(index)):
        raise ValueError(
            f"{what} has {len(index)} values from {first} to {index[-1]}, {steps:.0f} steps of freq={freq!r}: "
            "is one of these times wrong?"
        )
