"""Items on the grid of one frequency, with what is known of their future: what a model is given to forecast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from chronos.chronos2.preprocess import PreparedInput
from numpy.typing import NDArray

from ..checkpoints.pipelines import prepared_groups
from ..data.group_columns import GroupColumns
from ..data.group_tables import Categories, known_covariates
from ..data.times import follows, inferred_frequency, regular, times_after

__all__ = ["Groups", "KnownFuture", "Layout", "aligned", "frequency_of"]


# ---- On one grid -----------------------------------------------------------------------------------------------------


def frequency_of(series: Mapping[Any, pd.DataFrame], what: str, columns: GroupColumns) -> str | None:
    """The pandas frequency of the first item with three times, which are enough to tell; None where there is none."""
    for item, values in series.items():
        if len(values) > 2:
            regular(values, None, f"{columns.item} {str(item)!r} of {what}")
            return inferred_frequency(values.index)
    return None


def aligned(
    series: Mapping[Any, pd.DataFrame], freq: str, what: str, columns: GroupColumns, *, fill: bool
) -> dict[Any, pd.DataFrame]:
    """The items, every one on the grid of `freq`; with `fill`, NaN where a time of the grid is missing.

    Raises:
        ValueError: An item has times off the grid or, without `fill`, lacks some.
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


# ---- What is known of the future -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownFuture:
    """The known covariates of the steps to forecast, of every item, in memory.

    Attributes:
        what: What errors call the table.
        columns: Of the input.
        table: The known covariates on their times, item by item.
        slices: Of each item its rows.
    """

    what: str
    columns: GroupColumns
    table: pd.DataFrame
    slices: Mapping[Any, slice]

    @classmethod
    def of(cls, frame: pd.DataFrame, what: str, columns: GroupColumns, categories: Categories) -> KnownFuture:
        """Of a table in long format; `categories` are those of the input.

        Raises:
            ValueError: A column is missing or of another type than in the input, a row has no item or time, a time comes twice, or a
                column of numbers holds none.
        """
        table, slices = known_covariates(frame, what, columns, categories)
        for name in columns.known_covariates:
            if categories[name] is None and table[name].isna().all():
                raise ValueError(
                    f"{what} must hold values of {name}, found none in {len(table)} rows: if they are not known, it is one of "
                    "past_covariates."
                )
        return cls(what, columns, table, slices)

    def after(self, past: Mapping[Any, pd.DataFrame], freq: str, horizon: int) -> dict[Any, pd.DataFrame]:
        """The rows of the items whose past this is.

        Raises:
            ValueError: They are not those of the next `horizon` times.
        """
        names = list(past)
        last = pd.DatetimeIndex([past[item].index[-1] for item in names])
        times = np.stack(times_after(last, range(1, horizon + 1), freq, self._named(names)), axis=1)
        known = {}
        for item, wanted in zip(names, times):
            wanted = pd.DatetimeIndex(wanted)
            if item not in self.slices:
                raise self._wrong(item, wanted, f"found none, but of {next(iter(self.slices), 'no item')!r}")
            known[item] = found = self.table.iloc[self.slices[item]]
            if found.index.equals(wanted):
                continue
            if lacking := list(wanted.difference(found.index)[:1]):
                raise self._wrong(item, wanted, f"{lacking[0]} is missing")
            if more := list(found.index.difference(wanted)[:1]):
                raise self._wrong(item, wanted, f"found {more[0]} as well")
        return known

    def check_used(self, items: Iterable[Any]) -> None:
        """Raise a ValueError where there are other items than these, which are all of the input."""
        if unknown := [item for item in self.slices if item not in items]:
            raise ValueError(
                f"{self.what} must have the items of the input, found {self.columns.item} {str(unknown[0])!r}, which has no past."
            )

    def _named(self, names: Sequence[Any]) -> Any:
        return lambda row: f"{self.columns.item} {str(names[row])!r}"

    def _wrong(self, item: Any, wanted: pd.DatetimeIndex, found: str) -> ValueError:
        return ValueError(
            f"{self.what} must have the next {len(wanted)} times of {self.columns.item} {item!r}, from {wanted[0]} to {wanted[-1]}; "
            f"{found}."
        )


def _last_rows(
    tables: Mapping[Any, pd.DataFrame], what: str, columns: GroupColumns, horizon: int
) -> tuple[dict[Any, pd.DataFrame], dict[Any, pd.DataFrame]]:
    """The past of items whose last `horizon` rows have no target, and the known covariates of these rows; none of an item without values.

    Raises:
        ValueError: There are more of these rows, or fewer.
    """
    past, known = dict(tables), {}
    for item, table in tables.items():
        observed = np.flatnonzero(np.any([~np.isnan(table[name].to_numpy()) for name in columns.targets], axis=0))
        if not len(observed):
            continue
        count = len(table) - 1 - int(observed[-1])
        if count != horizon:
            raise ValueError(
                f"{columns.item} {str(item)!r} of {what} must end in {horizon} rows, the horizon, that hold {', '.join(columns.known_covariates)} "
                f"but not {', '.join(columns.targets)}, found {count}; or give what is known as future."
            )
        past[item], known[item] = table[:-horizon], table[-horizon:][list(columns.known_covariates)]
    return past, known


# ---- What a model is given -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Items on the grid of one frequency.

    Attributes:
        past: Of each item a table of targets and covariates on its times.
        known: Of each item that is forecast the known covariates of the next steps; nothing where there are none.
    """

    past: Mapping[Any, pd.DataFrame]
    known: Mapping[Any, pd.DataFrame]
    columns: GroupColumns
    freq: str

    def are_forecast(self, context_length: int, *, jointly: bool) -> NDArray[np.bool_]:
        """Which targets have a value in the context, or, jointly, an item with one that has, bool (items, targets)."""
        has_value = np.array(
            [
                [not np.isnan(table[name].to_numpy()[-context_length:]).all() for name in self.columns.targets]
                for table in self.past.values()
            ],
            dtype=bool,
        ).reshape(len(self.past), len(self.columns.targets))
        return has_value | has_value.any(axis=1, keepdims=True) if jointly else has_value

    def names(self, which: NDArray[np.bool_]) -> list[str]:
        """What errors call some series, bool (items, targets): their items, with their targets where there are several."""
        items, targets = list(self.past), self.columns.targets
        return [
            str(items[row]) if len(targets) == 1 else f"{items[row]}, {targets[column]}"
            for row, column in np.argwhere(which)
        ]

    def prepared(self, items: Sequence[Any], context_length: int, horizon: int) -> list[PreparedInput]:
        """The items as Chronos-2 is given them, see `prepared_groups`."""
        known = self._table(self.known, items) if self.columns.known_covariates else None
        return prepared_groups(self._table(self.past, items), known, self.columns, horizon, context_length)

    def _table(self, tables: Mapping[Any, pd.DataFrame], items: Sequence[Any]) -> pd.DataFrame:
        """One table of the items, their positions in place of their names."""
        lengths = [len(tables[item]) for item in items]
        table = pd.concat([tables[item] for item in items], ignore_index=True)
        return table.assign(**{self.columns.item: np.repeat(np.arange(len(items)), lengths)})


@dataclass(frozen=True)
class Layout:
    """What makes groups of the tables of one input.

    Attributes:
        what: What errors call the input.
        fill: Whether times of the grid that are missing are filled with NaN.
        known: What is known of the future; None where the last rows of the tables tell, or there are no known covariates.
    """

    what: str
    columns: GroupColumns
    freq: str
    fill: bool
    horizon: int
    known: KnownFuture | None

    def groups(self, tables: Mapping[Any, pd.DataFrame]) -> Groups:
        """The groups of some items, whose tables are those of `group_tables`.

        Raises:
            ValueError: An item is not on the grid, or its future is not known.
        """
        past = aligned(tables, self.freq, self.what, self.columns, fill=self.fill)
        known: Mapping[Any, pd.DataFrame] = {}
        if self.known is not None:
            known = self.known.after(past, self.freq, self.horizon)
        elif self.columns.known_covariates:
            past, known = _last_rows(past, self.what, self.columns, self.horizon)
        return Groups(past, known, self.columns, self.freq)
