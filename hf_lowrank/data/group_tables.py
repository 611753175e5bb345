"""Tables whose items are groups of series: targets and covariates as numbers and categories on their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd

from .group_columns import GroupColumns
from .series import RowsByItem, read_values
from .tables import check_columns, check_present

__all__ = ["Categories", "as_text", "categories_of", "group_tables", "is_number", "known_covariates", "no_covariate"]

# Of every covariate the categories that it has, as text and in their order; None where it is a number.
Categories: TypeAlias = Mapping[str, "list[str] | None"]


def is_number(column: pd.Series) -> bool:
    """Whether chronos takes a covariate of this type for a number, not for a category."""
    return bool(pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column))


def as_text(column: pd.Series, what: str) -> pd.Series:
    """A column of text, booleans or other categories as categorical, the categories being text in the order that pandas gives them.

    Chronos reads the order of categories and which of them are the same, not what they are. As text they are the same in files of any kind.

    Raises:
        ValueError: The column holds dates, or lists and the like; or two categories are the same text.
    """
    try:
        column = column.astype("category")
    except TypeError:
        raise no_covariate(column.name, what, "lists") from None
    categories = column.cat.categories
    if categories.dtype.kind in "mM" or isinstance(categories.dtype, (pd.DatetimeTZDtype, pd.PeriodDtype)):
        raise no_covariate(column.name, what, str(categories.dtype))
    text = [str(category) for category in categories]
    if len(set(text)) < len(text):
        twice = next(name for name in text if text.count(name) > 1)
        raise ValueError(f"{column.name} of {what} must have categories that differ as text, found {twice!r} twice.")
    return column.cat.rename_categories(text)


def no_covariate(name: object, what: str, found: str) -> ValueError:
    """The error of a column that cannot be a covariate."""
    return ValueError(
        f"{name} of {what} must be numbers or categories (text, bool, categorical) to be a covariate, found {found}."
    )


def categories_of(frame: pd.DataFrame, what: str, columns: GroupColumns) -> Categories:
    """The categories of the covariates of a table, where its types tell which of them are numbers.

    Raises:
        ValueError: A column is missing, or is no covariate (see `as_text`).
    """
    check_columns(frame.columns, what, columns.all)
    return {
        name: None if is_number(frame[name]) else list(as_text(frame[name], what).cat.categories)
        for name in columns.covariates
    }


def group_tables(
    frame: pd.DataFrame, what: str, columns: GroupColumns, categories: Categories
) -> dict[Any, pd.DataFrame]:
    """The groups of a table in long format by their items, in the order of their first rows.

    Returns:
        Of each item a table on its times, in their order: targets and numbers float64, other covariates categorical with these categories.

    Raises:
        ValueError: A column is missing, twice there or of another type, a row has no item or time, a time comes twice, or a number
            is infinite in float32, which models compute in.
    """
    check_columns(frame.columns, what, columns.all)
    rows = RowsByItem.of(frame, what, columns.long(columns.targets[0]))
    values: dict[str, Any] = {name: read_values(frame, what, columns.long(name)) for name in columns.targets}
    for name, column in _covariates(frame, what, columns, columns.covariates, categories).items():
        known = categories[name]
        values[name] = column if known is None else column.set_categories(known)
    table = _ordered(values, rows)
    return {item: table.iloc[part] for item, part in rows.slices.items()}


def known_covariates(
    frame: pd.DataFrame, what: str, columns: GroupColumns, categories: Categories
) -> tuple[pd.DataFrame, dict[Any, slice]]:
    """The known covariates of a table without targets, item by item on their times, and of each item its rows.

    Numbers are float64, others categorical, with categories of their own.

    Raises:
        ValueError: As `group_tables`, or a covariate is of another type than `categories` say.
    """
    names = columns.known_covariates
    wanted = f"It has the columns {', '.join((columns.item, columns.time, *names))}."
    check_present(frame.columns, what, (columns.item, columns.time, *names), wanted)
    for name in names:
        if categories[name] is not None and is_number(frame[name]):
            raise ValueError(
                f"{name} of {what} must be categories as in the input, found numbers ({frame[name].dtype})."
            )
    rows = RowsByItem.of(frame, what, columns.long(names[0]))
    return _ordered(_covariates(frame, what, columns, names, categories), rows), rows.slices


def _covariates(
    frame: pd.DataFrame, what: str, columns: GroupColumns, names: Sequence[str], categories: Categories
) -> dict[str, Any]:
    """The numbers as arrays, and the others as categorical arrays with their own categories."""
    return {
        name: read_values(frame, what, columns.long(name))
        if categories[name] is None
        else as_text(frame[name], what).array
        for name in names
    }


def _ordered(values: Mapping[str, Any], rows: RowsByItem) -> pd.DataFrame:
    return pd.DataFrame(values).iloc[rows.order].set_axis(rows.times)
