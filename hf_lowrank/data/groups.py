"""The user's own groups of series: targets that are forecast together, with covariates of the past and covariates known in the future.

Chronos-2 reads numbers alone. Categories become numbers as `chronos.chronos2.preprocess` makes them for `predict_df`: beside one target
the mean of what it was with each category, beside several the position of the category among all. A mean is that of what a forecast
would have seen, the target up to the forecast origin, and so differs from window to window.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .group_columns import GroupColumns
from .group_tables import as_text, is_number
from .series import RowsByItem, read_values
from .tables import LONG_FORMAT, LongColumns, check_columns, read_table

__all__ = ["GroupedSeries", "SeriesGroup"]

FloatArray = NDArray[np.float64]
SMOOTHING = 1.0  # observations of the target's mean that are added to those with a category, as in chronos


@dataclass(frozen=True)
class SeriesGroup:
    """One item: its series in the order of time.

    Attributes:
        values: float64 of shape (rows, time), NaN where missing: targets, then covariates of the past, then those known in the future. Of
            a row of categories that are still to be encoded, the codes 0, 1, ...
        num_targets: How many of the rows are targets.
        num_known: How many are known in the future.
        is_category: bool (rows,): its values are such codes.
    """

    values: FloatArray
    num_targets: int
    num_known: int
    is_category: NDArray[np.bool_]

    @property
    def targets(self) -> FloatArray:
        """The rows that are forecast, (num_targets, time)."""
        return self.values[: self.num_targets]

    @property
    def num_steps(self) -> int:
        """How many times there are."""
        return self.values.shape[1]

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Which rows are known in the future, bool (rows,)."""
        return np.arange(len(self.values)) >= len(self.values) - self.num_known

    def window(self, start: int, origin: int, end: int) -> FloatArray:
        """The values from `start` to `end`, (rows, end - start), as a forecast from `origin` on reads them: categories encoded by what came before it."""
        values = self.values[:, start:end].copy()
        for row in np.flatnonzero(self.is_category):
            values[row] = _target_encoded(self.values[row, :end], self.values[0, :origin])[start:]
        return values

    def up_to(self, end: int) -> SeriesGroup:
        """The group without what comes at `end` and later."""
        return replace(self, values=self.values[:, :end])

    def pieces(self, number: int) -> list[SeriesGroup]:
        """So many pieces, one behind the other, but for those in which no target is observed."""
        pieces = (replace(self, values=values) for values in np.array_split(self.values, number, axis=1))
        return [piece for piece in pieces if not np.isnan(piece.targets).all()]


class GroupedSeries:
    """Groups of series from a table in long format, one row a time of an item: what a Chronos-2 is calibrated and trained on.

        GroupedSeries("sales.parquet", target="units", past_covariates=["visitors"], known_covariates=["price", "holiday"])

    Covariates are numbers, or categories: text, bool, or pandas' categorical. Times need not be regular: rows are put in the order of
    time and nothing is put between them. Behind the last time at which a target is observed nothing is read.

    Args:
        data: The table, or the path of a CSV or parquet file.
        target: The column that is forecast, or several; numbers, empty or NaN where missing.
        past_covariates: Columns that are known up to the forecast origin.
        known_covariates: Columns that are known in the future as well.
        id_column: The column that names the item.
        timestamp_column: The column of the times.

    Attributes:
        columns: Which column is what.
        groups: One for each item with an observed target, in the order of their first rows.

    Raises:
        ValueError: A column is missing, has two meanings, or holds what it may not; no target is observed.
        FileNotFoundError: There is no such file.
    """

    columns: GroupColumns
    groups: list[SeriesGroup]

    def __init__(
        self,
        data: pd.DataFrame | str | os.PathLike,
        target: str | Sequence[str] = LONG_FORMAT.value,
        *,
        past_covariates: str | Sequence[str] = (),
        known_covariates: str | Sequence[str] = (),
        id_column: str = LONG_FORMAT.item,
        timestamp_column: str = LONG_FORMAT.time,
    ) -> None:
        self.columns = GroupColumns.named(target, past_covariates, known_covariates, id_column, timestamp_column)
        if isinstance(data, pd.DataFrame):
            frame, what = data, "series: the DataFrame"
        elif isinstance(data, (str, os.PathLike)):
            path = Path(data)
            frame, what = read_table(path, "series", self.columns.all), f"series: file {path.name!r}"
        else:
            raise ValueError(
                f"series must be a DataFrame or the path of a CSV or parquet file, found a {type(data).__name__}."
            )
        self.groups = _read(frame, what, self.columns)

    def __repr__(self) -> str:
        return f"GroupedSeries({self.description})"

    @property
    def description(self) -> str:
        """How many groups there are, and of what."""
        roles = ("target", "past covariate", "known covariate")
        counts = map(len, (self.columns.targets, self.columns.past_covariates, self.columns.known_covariates))
        return f"{_counted(len(self.groups), 'group')} of " + ", ".join(
            _counted(count, role) for role, count in zip(roles, counts) if count
        )

    @property
    def targets(self) -> list[FloatArray]:
        """Every target of every group that has an observed value, each a series of its own, (time,)."""
        return [values for group in self.groups for values in group.targets if not np.isnan(values).all()]

    def separate(self, reader: str) -> list[FloatArray]:
        """`targets`, for a model that reads series one by one, with a word where that leaves something out; `reader` names the model."""
        if len(self.columns.targets) > 1 or self.columns.covariates:
            warnings.warn(
                f"series: a {reader} reads every series alone, so each of {len(self.targets)} targets of {self.description} is taken "
                "as a series of its own, without covariates; a Chronos-2 reads groups.",
                stacklevel=3,
            )
        return self.targets


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _read(frame: pd.DataFrame, what: str, columns: GroupColumns) -> list[SeriesGroup]:
    check_columns(frame.columns, what, columns.all)
    rows = RowsByItem.of(frame, what, columns.long(columns.targets[0]))
    values = [read_values(frame, what, columns.long(target)) for target in columns.targets]
    is_category = [False] * len(values)
    for name in columns.covariates:
        covariate, is_text = _covariate(frame, what, columns.long(name))
        values.append(covariate)
        is_category.append(is_text and len(columns.targets) == 1)
    table, layout = np.stack(values)[:, rows.order], np.array(is_category)
    groups = []
    for part in rows.slices.values():
        own = table[:, part]
        observed = np.flatnonzero(~np.isnan(own[: len(columns.targets)]).all(axis=0))
        if len(observed):
            own = own[:, : observed[-1] + 1]
            groups.append(SeriesGroup(own, len(columns.targets), len(columns.known_covariates), layout))
    if not groups:
        raise ValueError(
            f"{what} holds no observed value of {' or '.join(columns.targets)} in {len(rows.slices)} items."
        )
    if dropped := len(rows.slices) - len(groups):
        warnings.warn(
            f"{what}: {dropped} of {len(rows.slices)} items have no observed value of {' or '.join(columns.targets)} and are left out.",
            stacklevel=4,
        )
    return groups


def _covariate(frame: pd.DataFrame, what: str, columns: LongColumns) -> tuple[FloatArray, bool]:
    """The numbers of a covariate, or the codes of its categories, and whether it has categories."""
    column = frame[columns.value]
    if is_number(column):
        return read_values(frame, what, columns), False
    if pd.api.types.is_object_dtype(column):  # a CSV file is read in parts, of which some may look like numbers
        column = column.map(str, na_action="ignore")
    categories = as_text(column, what).cat
    codes = categories.codes.to_numpy(dtype=np.float64)
    return np.where(codes < 0, len(categories.categories), codes), True  # what is missing is a category, as in chronos


def _target_encoded(codes: FloatArray, target: FloatArray) -> FloatArray:
    """The mean of the target with each category, smoothed: (mean of all + sum of those with it) / (1 + number of those with it).

    Args:
        codes: Of the past and the future, (time + horizon,).
        target: Of the past, (time,), NaN where missing.
    """
    slots, observed = codes.astype(np.int64), np.flatnonzero(~np.isnan(target))
    mean = target[observed].mean() if len(observed) else 0.0
    sums = np.bincount(slots[observed], weights=target[observed], minlength=slots.max() + 1)
    counts = np.bincount(slots[observed], minlength=slots.max() + 1)
    return ((SMOOTHING * mean + sums) / (SMOOTHING + counts))[slots]
