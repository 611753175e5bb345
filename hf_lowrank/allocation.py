"""Choosing the ranks: pure functions from spectra and a policy to one rank for each component of a model.

A component is a part of a layer that has a rank of its own: the query-key product of a layer's heads, say. Every policy takes the same
list of components and answers with a dictionary from component name to rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Component",
    "allocate_energy",
    "allocate_epsilon",
    "allocate_epsilon_at_ratio",
    "allocate_ratio",
    "allocate_uniform",
    "check_argument",
]


@dataclass(frozen=True)
class Component:
    """What a policy knows of one component.

    Attributes:
        name: Unique, `"cross.3.qk"` say.
        singular_values: Shape (groups, full_rank), descending along the ranks. The groups (the heads of a layer) share one
            rank.
        parameters: Shape (full_rank + 1,): the number of weights that the component has at each rank.
        dense_parameters: The number of weights that it has in the dense model, which is what a ratio is a share of.
    """

    name: str
    singular_values: NDArray[np.float64]
    parameters: NDArray[np.int64]
    dense_parameters: int
    loss: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        squares = (self.singular_values**2).sum(axis=0)
        # Summed from the small end, so that small tails keep their digits.
        tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
        object.__setattr__(self, "loss", tails / tails[0] if tails[0] > 0 else tails)

    @property
    def full_rank(self) -> int:
        return self.singular_values.shape[1]

    @property
    def relative(self) -> NDArray[np.float64]:
        """sigma_j / sigma_1, with sigma_1 the largest over the groups; zeros for a component that is zero."""
        return self.singular_values / (self.singular_values.max() or 1)

    def loss_at(self, *ranks: int) -> float:
        """The relative loss when each group keeps a rank of its own."""
        squares = self.singular_values**2
        return float(sum(row[rank:].sum() for row, rank in zip(squares, ranks)) / (squares.sum() or 1))

    def candidates(self, multiple_of: int) -> list[int]:
        """The ranks that may be chosen: the multiples, and the full rank."""
        return sorted({*range(multiple_of, self.full_rank + 1, multiple_of), self.full_rank})

    def round_up(self, rank: int, multiple_of: int) -> int:
        """The smallest candidate that is at least `rank`."""
        return min(self.full_rank, multiple_of * math.ceil(max(rank, 1) / multiple_of))


def check_argument(name: str, value: Any) -> None:
    """Raise ValueError where the argument of that name (a policy's, or `multiple_of`) is out of range for any model."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = isinstance(value, int) and number
    valid, wanted = {
        "epsilon": (number and 0 <= value <= 1, "in [0, 1]"),
        "energy": (number and 0 <= value < 1, "in [0, 1)"),
        "ratio": (number and 0 < value <= 1, "in (0, 1]"),
        "uniform": (whole and value >= 1, "a positive integer"),
        "multiple_of": (whole and value >= 1, "a positive integer"),
    }[name]
    if not valid:
        raise ValueError(f"{name} must be {wanted}, found {value!r}.")


def _each(components: Sequence[Component], rank: Callable[[Component], int], multiple_of: int) -> dict[str, int]:
    check_argument("multiple_of", multiple_of)
    return {component.name: component.round_up(rank(component), multiple_of) for component in components}


def allocate_uniform(components: Sequence[Component], rank: int, *, multiple_of: int = 1) -> dict[str, int]:
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


def allocate_epsilon(components: Sequence[Component], epsilon: float, *, multiple_of: int = 1) -> dict[str, int]:
    """The paper's rule: the number of singular values with sigma_j / sigma_1 >= epsilon.

    sigma_1 is the largest over the groups of the component, and the group that needs the most decides.

    Raises:
        ValueError: `epsilon` is outside [0, 1].
    """
    check_argument("epsilon", epsilon)
    return _each(components, lambda component: int((component.relative >= epsilon).sum(axis=1).max()), multiple_of)


def allocate_epsilon_at_ratio(components: Sequence[Component], ratio: float) -> dict[str, int]:
    """The paper's rule at the smallest epsilon that keeps at most `ratio` of the parameters.

    Raises:
        ValueError: `ratio` is outside (0, 1], or below what epsilon = 1 keeps: rank 1, or more where the largest singular values tie.
    """
    check_argument("ratio", ratio)
    dense = sum(component.dense_parameters for component in components)
    thresholds = np.unique(np.concatenate([component.relative.ravel() for component in components] + [[0.0, 1.0]]))

    def ranks_at(index: int) -> dict[str, int]:
        return allocate_epsilon(components, float(thresholds[index]))

    def share(index: int) -> float:
        ranks = ranks_at(index)
        return sum(int(component.parameters[ranks[component.name]]) for component in components) / dense

    low, high = 0, len(thresholds) - 1
    if share(high) > ratio:
        raise ValueError(f"ratio={ratio} is below {share(high):.4f}, which epsilon=1 keeps.")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= ratio else (middle + 1, high)
    return ranks_at(low)


def allocate_energy(components: Sequence[Component], tolerance: float, *, multiple_of: int = 1) -> dict[str, int]:
    """The smallest rank at which the dropped squared singular values are at most `tolerance` of their sum.

    Raises:
        ValueError: `tolerance` is outside [0, 1).
    """
    check_argument("energy", tolerance)
    return _each(components, lambda component: int(np.argmax(component.loss <= tolerance)), multiple_of)


def allocate_ratio(components: Sequence[Component], ratio: float, *, multiple_of: int = 1) -> dict[str, int]:
    """One global budget: at most `ratio` of the dense parameters, spent where it saves the most relative loss.

    Minimises the sum of the components' relative losses under the budget by one Lagrange threshold lambda for all,
    r_c = argmin_r loss_c(r) + lambda parameters_c(r), found by bisection; what is then left of the budget is given out in the
    order of loss saved a parameter. Optimal where all losses are convex in the parameters and a rank costs the same everywhere,
    as with smaller heads; otherwise close to it, and never worse than one rank for all.

    Raises:
        ValueError: `ratio` is outside (0, 1], or below what the smallest ranks need.
    """
    check_argument("ratio", ratio)
    check_argument("multiple_of", multiple_of)
    dense = sum(component.dense_parameters for component in components)
    budget = math.floor(ratio * dense * (1 + 1e-12))  # 0.29 * 100 is 28.999999999999996
    options = {component.name: np.array(component.candidates(multiple_of)) for component in components}
    smallest = sum(int(component.parameters[options[component.name][0]]) for component in components)
    if smallest > budget:
        raise ValueError(
            f"ratio={ratio} keeps {budget:,} attention parameters, but the smallest ranks need {smallest:,}; "
            f"the smallest possible ratio is {smallest / dense:.4f}."
        )

    def at(threshold: float) -> dict[str, int]:
        ranks = {}
        for component in components:
            choices = options[component.name]
            price = component.loss[choices] + threshold * component.parameters[choices] / dense
            ranks[component.name] = int(choices[np.argmin(price)])
        return ranks

    def cost(ranks: dict[str, int]) -> int:
        return sum(int(component.parameters[ranks[component.name]]) for component in components)

    # `at(dear)` fits the budget; `cheap` prices the tails that are no more than rounding, too.
    cheap, dear = 1e-40, 1e12
    for _ in range(100):
        middle = math.sqrt(cheap * dear)
        cheap, dear = (cheap, middle) if cost(at(middle)) <= budget else (middle, dear)
    ranks = at(dear)

    left = budget - cost(ranks)
    while True:
        best, gain = None, 0.0
        for component in components:
            rank, choices = ranks[component.name], options[component.name]
            extra = component.parameters[choices] - component.parameters[rank]
            saved = component.loss[rank] - component.loss[choices]
            gains = np.where((choices > rank) & (extra <= left), saved / np.maximum(extra, 1), 0)
            i = int(np.argmax(gains))
            if gains[i] > gain:
                best, gain = (component.name, int(choices[i]), int(extra[i])), gains[i]
        if best is None:
            break
        name, candidate, extra = best
        ranks[name] = candidate
        left -= extra

    def uniform(rank: int) -> dict[str, int]:
        return {component.name: component.round_up(rank, multiple_of) for component in components}

    largest = max(component.full_rank for component in components)
    alike = max((rank for rank in range(1, largest + 1) if cost(uniform(rank)) <= budget), default=1)
    return min(ranks, uniform(alike), key=lambda table: sum(c.loss[table[c.name]] for c in components))
