"""What the columns of a table mean whose items are groups: several targets, and what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .tables import LONG_FORMAT, LongColumns

__all__ = ["GroupColumns"]


@dataclass(frozen=True)
class GroupColumns:
    """The columns of a table in long format in which one row is one time of one item, a group of series.

    Attributes:
        item: Names the group.
        time: The time.
        targets: What is forecast, numbers; at least one.
        past_covariates: Known up to the forecast origin: numbers, or categories (text, bool, categorical).
        known_covariates: Known in the future as well, likewise.

    Raises:
        ValueError: There is no target, or a column has two meanings.
    """

    item: str = LONG_FORMAT.item
    time: str = LONG_FORMAT.time
    targets: tuple[str, ...] = (LONG_FORMAT.value,)
    past_covariates: tuple[str, ...] = ()
    known_covariates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("target must name at least one column, found none.")
        if twice := sorted({name for name in self.all if self.all.count(name) > 1}):
            raise ValueError(
                "id_column, timestamp_column, target, past_covariates and known_covariates must name different columns, found "
                f"{', '.join(twice)} twice."
            )

    @classmethod
    def named(
        cls,
        target: str | Sequence[str],
        past_covariates: str | Sequence[str],
        known_covariates: str | Sequence[str],
        id_column: str,
        timestamp_column: str,
    ) -> GroupColumns:
        """Those of a user's arguments, each the name of a column or a list of names.

        Raises:
            ValueError: One is neither.
        """
        names = {"target": target, "past_covariates": past_covariates, "known_covariates": known_covariates}
        return cls(id_column, timestamp_column, *(_names(argument, given) for argument, given in names.items()))

    @property
    def arguments(self) -> dict[str, Any]:
        """What a user would give for them, see `named`."""
        return {
            "target": self.targets,
            "past_covariates": self.past_covariates,
            "known_covariates": self.known_covariates,
            "id_column": self.item,
            "timestamp_column": self.time,
        }

    @property
    def all(self) -> tuple[str, ...]:
        """Every column, once in this order."""
        return (self.item, self.time, *self.targets, *self.past_covariates, *self.known_covariates)

    @property
    def covariates(self) -> tuple[str, ...]:
        """Those of the past and those that are known."""
        return (*self.past_covariates, *self.known_covariates)

    def long(self, target: str) -> LongColumns:
        """The columns of one target alone."""
        return LongColumns(self.item, self.time, target)


def _names(argument: str, given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument} must be the name of a column or a list of names, found {given!r}.")
    return tuple(names)
