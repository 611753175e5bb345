"""Of all ways to build each part of a model one, for budgets to be kept and the least to be lost: pure mathematics."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Options", "allocate_budget"]

Name = TypeVar("Name", bound=Hashable)  # of a layer


@dataclass(frozen=True)
class Options:
    """The ways in which one layer can be built.

    Attributes:
        entries: The ranks of each way.
        loss: Shape (options,): the sum of the components' losses.
        costs: Of each kind (`"parameters"`, `"cache"`, `"seconds"`) an array of shape (options,).
    """

    entries: tuple[Any, ...]
    loss: NDArray[np.float64]
    costs: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class _Choices(Generic[Name]):
    """The options of all layers, costs (budgets, options) in shares of the budgets, so that a price means the same for each."""

    loss: Mapping[Name, NDArray[np.float64]]
    costs: Mapping[Name, NDArray[np.float64]]
    num_budgets: int

    def cheapest(self, prices: NDArray[np.float64]) -> dict[Name, int]:
        """The option of each layer with the least loss + prices . costs."""
        return {name: int(np.argmin(self.loss[name] + prices @ self.costs[name])) for name in self.loss}

    def spent(self, chosen: Mapping[Name, int]) -> NDArray[np.float64]:
        """The share of each budget that these options take."""
        return sum((self.costs[name][:, i] for name, i in chosen.items()), start=np.zeros(self.num_budgets))

    def at_prices(self) -> dict[Name, int]:
        """The options at the lowest prices that keep all budgets, found by bisection, one price after the other."""
        # The lowest price is not zero: of options that lose the same, tails of rounding errors too, the cheapest is taken.
        lowest, highest = 1e-30, 1e30
        prices = np.full(self.num_budgets, lowest)
        for _ in range(20 if self.num_budgets > 1 else 1):
            for k in range(self.num_budgets):
                low, high = prices[k], highest
                for _ in range(120):
                    prices[k] = math.sqrt(low * high)
                    is_kept = self.spent(self.cheapest(prices))[k] <= 1
                    low, high = (low, prices[k]) if is_kept else (prices[k], high)
                prices[k] = high
            if (self.spent(self.cheapest(prices)) <= 1).all():
                break
        return self.cheapest(prices)

    def with_what_is_left(self, chosen: Mapping[Name, int]) -> dict[Name, int]:
        """Better options for as long as the budgets last, in the order of loss saved for the share of the budget that they take."""
        chosen, left = dict(chosen), 1 - self.spent(chosen)
        while True:
            best, most = None, 0.0
            for name in chosen:
                extra = self.costs[name] - self.costs[name][:, [chosen[name]]]
                saved = self.loss[name][chosen[name]] - self.loss[name]
                fits = (extra <= left[:, None]).all(axis=0) & (saved > 0)
                gains = np.where(fits, saved / np.maximum(extra.max(axis=0), 1e-12), 0)
                i = int(np.argmax(gains))
                if gains[i] > most:
                    best, most = (name, i), gains[i]
            if best is None:
                return chosen
            name, i = best
            left = left - (self.costs[name][:, i] - self.costs[name][:, chosen[name]])
            chosen[name] = i


def allocate_budget(layers: Mapping[Name, Options], budgets: Mapping[str, float]) -> dict[Name, Any]:
    """One option a layer that keep all budgets together and lose the least: name of the layer to entry.

    Minimises the sum of losses by one Lagrange price for each kind of cost, the same for all layers: every layer takes the option of
    the least loss + sum_k price_k cost_k. The prices are found by bisection, one after the other until all budgets are kept;
    what is then left is given out in the order of loss saved for the share of the budget that it takes. Optimal where the options of a layer are
    convex, otherwise close to it.

    Raises:
        ValueError: The cheapest options exceed a budget; the message names the budget and the least possible. Or each budget
            could be kept, and no choice was found that keeps all.
    """
    for kind, budget in budgets.items():
        least = sum(float(options.costs[kind].min()) for options in layers.values())
        if least > budget * (1 + 1e-12):
            raise ValueError(f"a budget of {budget:,.6g} {kind} is below {least:,.6g}, what the smallest ranks need.")
    costs = {
        name: np.stack([options.costs[kind] / (budget * (1 + 1e-12)) for kind, budget in budgets.items()])
        for name, options in layers.items()
    }
    # Only their ratios count; a power of two changes no digit.
    scale = np.ldexp(1.0, np.frexp(max(float(options.loss.max()) for options in layers.values()))[1] - 1)
    choices = _Choices({name: options.loss / scale for name, options in layers.items()}, costs, len(budgets))
    chosen = choices.at_prices()
    if (choices.spent(chosen) > 1).any():  # budgets that pull in opposite directions
        chosen = {name: int(np.argmin(costs[name].max(axis=0))) for name in layers}
        if (choices.spent(chosen) > 1).any():
            raise ValueError(f"no choice was found that keeps the budgets of {' and '.join(budgets)} together.")
    return {name: layers[name].entries[i] for name, i in choices.with_what_is_left(chosen).items()}
