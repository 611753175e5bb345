"""Budgets are kept, no better choice exists, and more budget never means more loss."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.budget_solver import Options, allocate_budget
from hf_lowrank.checkpoints.rank_table import PerHeadRanks


def convex_layer(drops: list[float], steps: list[int], name: str) -> Options:
    """Options on a convex curve: each further unit of cost saves less than the one before."""
    steps = steps[: len(drops)]
    rates = np.sort(np.array(drops[: len(steps)]))[::-1]
    cost = np.cumsum([1, *steps]).astype(float)
    saved = np.cumsum([0.0, *(rates * steps)])
    loss = saved[-1] - saved
    order = np.argsort(-cost)  # the dense one first
    entries = tuple({"layer": name, "option": int(i)} for i in order)
    return Options(entries, loss[order], {"parameters": cost[order], "cache": 2 * cost[order]})


LAYERS = st.lists(
    st.tuples(
        st.lists(st.floats(0, 10), min_size=1, max_size=4), st.lists(st.integers(1, 6), min_size=1, max_size=4)
    ).map(lambda pair: pair if len(pair[0]) <= len(pair[1]) else (pair[0][: len(pair[1])], pair[1])),
    min_size=1,
    max_size=4,
).map(lambda layers: {f"layer.{i}": convex_layer(*layer, f"layer.{i}") for i, layer in enumerate(layers)})

# Options of any kind: what is cheap in one budget may be dear in the other, and losses follow no curve.
NUMBERS = st.integers(1, 20).map(float)
ANY_LAYERS = st.lists(
    st.lists(st.tuples(st.floats(0, 10), NUMBERS, NUMBERS), min_size=1, max_size=5), min_size=1, max_size=4
).map(
    lambda layers: {
        f"layer.{i}": Options(
            tuple({"option": j} for j in range(len(options))),
            np.array([option[0] for option in options]),
            {
                "parameters": np.array([option[1] for option in options]),
                "cache": np.array([option[2] for option in options]),
            },
        )
        for i, options in enumerate(layers)
    }
)


def index(options: Options, entry: dict[str, Any]) -> int:
    return options.entries.index(entry)


def lost(layers: dict[str, Options], chosen: dict[str, dict[str, Any]]) -> float:
    return sum(float(options.loss[index(options, chosen[name])]) for name, options in layers.items())


def spent(layers: dict[str, Options], chosen: dict[str, dict[str, Any]], kind: str) -> float:
    return sum(float(options.costs[kind][index(options, chosen[name])]) for name, options in layers.items())


def all_choices(layers: dict[str, Options]) -> list[dict[str, dict[str, Any]]]:
    return [dict(zip(layers, entries)) for entries in itertools.product(*(o.entries for o in layers.values()))]


def between(layers: dict[str, Options], share: float, kind: str) -> float:
    """A budget between the least and the most that the options can cost."""
    least, most = (sum(float(end(o.costs[kind])) for o in layers.values()) for end in (np.min, np.max))
    return least + share * (most - least)


@given(LAYERS, st.floats(0, 1))
def test_a_budget_is_kept_and_the_loss_is_within_one_option_of_the_least(layers, share):
    """Against all choices there are. The slack is a single step of one layer: what the last piece of the budget cannot buy."""
    budget = between(layers, share, "parameters")
    found = allocate_budget(layers, {"parameters": budget})
    assert spent(layers, found, "parameters") <= budget * (1 + 1e-9)
    affordable = [choice for choice in all_choices(layers) if spent(layers, choice, "parameters") <= budget]
    best = min(lost(layers, choice) for choice in affordable)
    step = max(float(np.diff(options.loss).max(initial=0.0)) for options in layers.values())
    assert lost(layers, found) <= best + step + 1e-9


@given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 16))
def test_steps_of_one_size_are_spent_optimally(rates, budget):
    """As with heads of one shape: every rank costs the same, so there is no slack."""
    layers = {f"layer.{i}": convex_layer(drops, [1] * 4, f"layer.{i}") for i, drops in enumerate(rates)}
    budget = min(budget, 4 * len(layers)) + len(layers)
    found = allocate_budget(layers, {"parameters": budget})
    assert spent(layers, found, "parameters") <= budget
    affordable = [choice for choice in all_choices(layers) if spent(layers, choice, "parameters") <= budget]
    assert lost(layers, found) == pytest.approx(min(lost(layers, c) for c in affordable), rel=1e-9, abs=1e-9)


@given(LAYERS, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_never_loses_more(layers, first, second):
    less, more = (
        lost(layers, allocate_budget(layers, {"parameters": between(layers, share, "parameters")}))
        for share in sorted((first, second))
    )
    assert more <= less + 1e-9


@given(ANY_LAYERS, st.integers(0, 10**6), st.sampled_from([("parameters",), ("cache",), ("parameters", "cache")]))
def test_budgets_of_some_choice_are_kept_together_and_nothing_useful_is_left(layers, seed, kinds):
    """Any options and any budgets that some choice keeps: what is found keeps them, and no one layer could lose less within them."""
    choices = all_choices(layers)
    witness = choices[seed % len(choices)]
    budgets = {kind: spent(layers, witness, kind) for kind in kinds}
    found = allocate_budget(layers, budgets)
    for kind, budget in budgets.items():
        assert spent(layers, found, kind) <= budget * (1 + 1e-9)
    for name, options in layers.items():
        for entry in options.entries:
            other = found | {name: entry}
            if all(spent(layers, other, kind) <= budget for kind, budget in budgets.items()):
                assert lost(layers, other) >= lost(layers, found) - 1e-12


@given(ANY_LAYERS)
def test_the_whole_budget_loses_the_least_there_is(layers):
    budgets = {kind: between(layers, 1.0, kind) for kind in ("parameters", "cache")}
    least = sum(float(options.loss.min()) for options in layers.values())
    assert lost(layers, allocate_budget(layers, budgets)) == pytest.approx(least, rel=1e-12, abs=1e-12)


def test_nothing_is_spent_on_options_that_save_nothing():
    """Of options that lose the same, tails of rounding errors too, the cheapest is taken."""
    options = Options(
        ({"rank": 3}, {"rank": 2}, {"rank": 1}),
        np.array([0.0, 0.0, 1.0]),
        {"parameters": np.array([30.0, 20.0, 10.0])},
    )
    assert allocate_budget({"a": options}, {"parameters": 30}) == {"a": {"rank": 2}}


def test_options_are_not_changed_and_the_answer_is_one_of_them():
    ranks = PerHeadRanks(1, 2)  # frozen
    options = Options((ranks,), np.array([0.5]), {"parameters": np.array([1.0])})
    assert allocate_budget({"a": options}, {"parameters": 1})["a"] is ranks
    assert (options.loss, options.costs["parameters"]) == ([0.5], [1.0])


@pytest.mark.parametrize("rank", range(1, 100))
def test_a_budget_is_not_lost_to_rounding(rank):
    """0.29 * 100 is 28.999999999999996, and rank 29 of 100 is what was asked for."""
    ranks = np.arange(1.0, 101)
    options = Options(tuple({"rank": int(r)} for r in ranks), 1 - ranks / 100, {"parameters": ranks})
    assert allocate_budget({"a": options}, {"parameters": rank / 100 * 100}) == {"a": {"rank": rank}}


@given(ANY_LAYERS, st.floats(0.01, 0.99), st.sampled_from(["parameters", "cache"]))
def test_a_budget_below_the_cheapest_options_is_an_error(layers, share, kind):
    least = between(layers, 0.0, kind)
    with pytest.raises(
        ValueError, match=rf"a budget of .* {kind} is below {least:,.6g}, what the smallest ranks need"
    ):
        allocate_budget(layers, {kind: share * least})
