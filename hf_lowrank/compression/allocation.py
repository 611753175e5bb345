"""Choosing the ranks: pure functions from spectra, losses and a policy to the ranks of every layer.

A component is a point of a layer that has a rank of its own: the queries of a layer's heads, say. The policies that look at one
component at a time take a list of them and answer with a dictionary from component name to rank. Budgets compare all ways to build
every layer: see `hf_lowrank.budget_solver`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Component",
    "allocate_energy",
    "allocate_epsilon",
    "allocate_epsilon_at_ratio",
    "allocate_uniform",
    "check_argument",
]


@dataclass(frozen=True)
class Component:
    """What a policy knows of one component: a point of a layer at which a projection of some rank can be inserted.

    Attributes:
        name: Unique; written as `cross.3.qk`, say.
        singular_values: Shape (groups, full_rank), descending along the ranks. The groups (the heads of a layer) share one
            rank.
        weight: The loss at rank 0, in the unit in which the losses of all components are compared. Without calibration
            that of each component is 1, so that the loss at a rank is the dropped share of the squared singular values.
        step: Its ranks are multiples of this: 2 where they are pairs of a rotary embedding.
    """

    name: Hashable
    singular_values: NDArray[np.float64]
    weight: float = 1.0
    step: int = 1
    loss: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        # Relative to a power of two, which changes no digit: squares overflow above 1e154 and vanish below 1e-162.
        scale = np.ldexp(1.0, np.frexp(self.singular_values.max(initial=0.0))[1] - 1)
        squares = ((self.singular_values / scale) ** 2).sum(axis=0)
        # Summed from the small end, so that small tails keep their digits.
        tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        object.__setattr__(self, "loss", self.weight * (tails / tails[0] if tails[0] > 0 else tails))

    @property
    def full_rank(self) -> int:
        return self.singular_values.shape[1]

    @property
    def relative(self) -> NDArray[np.float64]:
        """sigma_j / sigma_1, with sigma_1 the largest over the groups; zeros for a component that is zero."""
        return self.singular_values / (self.singular_values.max() or 1)

    def round_up(self, rank: int, multiple_of: int) -> int:
        """The smallest multiple that is at least `rank`, or the full rank."""
        multiple_of = math.lcm(multiple_of, self.step)
        return min(self.full_rank, multiple_of * math.ceil(max(rank, 1) / multiple_of))


# Arguments that are a share of the dense model.
SHARES = ("ratio", "total_ratio", "feed_forward_ratio", "max_cache_ratio")


def check_argument(name: str, value: Any) -> None:
    """Raise ValueError where the argument of that name (a policy's, or `multiple_of`) is out of range for any model."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = isinstance(value, int) and number
    valid, wanted = {
        "epsilon": (number and 0 <= value <= 1, "in [0, 1]"),
        "energy": (number and 0 <= value < 1, "in [0, 1)"),
        **dict.fromkeys(SHARES, (number and 0 < value <= 1, "in (0, 1]")),
        "max_loss": (number and 0 < value < math.inf, "a positive number, such as 0.01 for 1 %"),
        "target_speedup": (
            value == "max" or (number and 0 < value < math.inf),
            "a positive number, or 'max' beside max_loss",
        ),
        "uniform": (whole and value >= 1, "a positive integer"),
        "multiple_of": (whole and value >= 1, "a positive integer"),
    }[name]
    if not valid:
        raise ValueError(f"{name} must be {wanted}, found {value!r}.")


def _each(components: Sequence[Component], rank: Callable[[Component], int], multiple_of: int) -> dict[Hashable, int]:
    check_argument("multiple_of", multiple_of)
    return {component.name: component.round_up(rank(component), multiple_of) for component in components}


def allocate_uniform(components: Sequence[Component], rank: int, *, multiple_of: int = 1) -> dict[Hashable, int]:
    """The same rank everywhere.

    Raises:
        ValueError: `rank` is below 1, or above a component's full rank.
    """
    check_argument("uniform", rank)
    for component in components:
        if rank > component.full_rank:
            limit = f"an integer in [1, {component.full_rank}], the full rank of {component.name}"
            raise ValueError(f"uniform must be {limit}, found {rank}.")
    return _each(components, lambda _: rank, multiple_of)


def allocate_epsilon(components: Sequence[Component], epsilon: float, *, multiple_of: int = 1) -> dict[Hashable, int]:
    """The paper's rule: the number of singular values with sigma_j / sigma_1 >= epsilon.

    sigma_1 is the largest over the groups of the component, and the group that needs the most decides.

    Raises:
        ValueError: `epsilon` is outside [0, 1].
    """
    check_argument("epsilon", epsilon)
    return _each(components, lambda component: int((component.relative >= epsilon).sum(axis=1).max()), multiple_of)


def allocate_epsilon_at_ratio(components: Sequence[Component], ratio: float) -> dict[Hashable, int]:
    """The paper's rule at the smallest epsilon that keeps at most `ratio` of the ranks, all components counting alike.

    Raises:
        ValueError: `ratio` is outside (0, 1], or below what epsilon = 1 keeps: rank 1, or more where the largest singular values tie.
    """
    check_argument("ratio", ratio)
    full = sum(component.full_rank for component in components)
    thresholds = np.unique(np.concatenate([component.relative.ravel() for component in components] + [[0.0, 1.0]]))

    def ranks_at(index: int) -> dict[Hashable, int]:
        return allocate_epsilon(components, float(thresholds[index]))

    def share(index: int) -> float:
        return sum(ranks_at(index).values()) / full

    low, high = 0, len(thresholds) - 1
    if share(high) > ratio:
        raise ValueError(f"ratio={ratio} is below {share(high):.4f}, which epsilon=1 keeps.")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= ratio else (middle + 1, high)
    return ranks_at(low)


def allocate_energy(components: Sequence[Component], tolerance: float, *, multiple_of: int = 1) -> dict[Hashable, int]:
    """The smallest rank at which the dropped squared singular values are at most `tolerance` of their sum.

    Raises:
        ValueError: `tolerance` is outside [0, 1).
    """
    check_argument("energy", tolerance)
    return _each(
        components, lambda component: int(np.argmax(component.loss <= tolerance * component.loss[0])), multiple_of
    )
