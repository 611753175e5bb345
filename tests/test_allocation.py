"""Policies: budgets are kept, no better table exists, and more budget never means more loss."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.allocation import (
    Component,
    allocate_energy,
    allocate_epsilon,
    allocate_epsilon_at_ratio,
    allocate_ratio,
    allocate_uniform,
)

FULL_RANK = 5
SPECTRA = st.lists(
    st.lists(
        st.lists(st.floats(0, 100) | st.just(0.0), min_size=FULL_RANK, max_size=FULL_RANK), min_size=1, max_size=3
    ),
    min_size=1,
    max_size=4,
)
RATIOS = st.floats(0.2, 1)  # rank 1 everywhere needs a fifth


def linear_components(spectra: list[list[list[float]]], costs: list[int] | None = None) -> list[Component]:
    """Components whose parameters grow with the rank as those of an attention layer do; by default all equally fast."""
    return [
        Component(
            f"layer.{i}",
            np.sort(np.array(groups))[:, ::-1].copy(),
            np.arange(len(groups[0]) + 1) * (costs[i] if costs else 12),
            dense_parameters=len(groups[0]) * (costs[i] if costs else 12),
        )
        for i, groups in enumerate(spectra)
    ]


def parameters(components: list[Component], ranks: dict[str, int]) -> int:
    return sum(int(component.parameters[ranks[component.name]]) for component in components)


def dense(components: list[Component]) -> int:
    return sum(component.dense_parameters for component in components)


def total_loss(components: list[Component], ranks: dict[str, int]) -> float:
    return sum(float(component.loss[ranks[component.name]]) for component in components)


def tables(components: list[Component]) -> list[dict[str, int]]:
    """All tables that exist."""
    choices = [range(1, component.full_rank + 1) for component in components]
    names = [component.name for component in components]
    return [dict(zip(names, ranks)) for ranks in itertools.product(*choices)]


# Components


@given(SPECTRA, st.data())
def test_loss_is_the_dropped_share_of_the_squares(spectra, data):
    for component in linear_components(spectra):
        squares = component.singular_values**2
        for rank in range(component.full_rank + 1):
            wanted = squares[:, rank:].sum() / squares.sum() if squares.sum() > 0 else 0.0
            assert component.loss[rank] == pytest.approx(wanted, rel=1e-9, abs=1e-300)
            assert component.loss_at(*[rank] * len(squares)) == pytest.approx(wanted, rel=1e-9, abs=1e-300)
        assert component.loss[-1] == 0
        assert (np.diff(component.loss) <= 0).all()


def test_loss_at_a_rank_for_each_group():
    component = Component("latent", np.array([[2.0, 1.0], [2.0, 1.0]]), np.arange(3), dense_parameters=2)
    assert component.loss_at(1, 2) == pytest.approx(0.1)
    assert component.loss_at(0, 2) == pytest.approx(0.5)


# The ratio


@given(SPECTRA, RATIOS)
def test_ratio_is_optimal_for_layers_of_one_shape(spectra, ratio):
    """Against all tables there are: losses are convex in the rank, so the greedy order is the best one."""
    components = linear_components(spectra)
    found = allocate_ratio(components, ratio)
    affordable = [t for t in tables(components) if parameters(components, t) <= ratio * dense(components)]
    best = min(total_loss(components, table) for table in affordable)
    assert parameters(components, found) <= ratio * dense(components)
    assert total_loss(components, found) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(SPECTRA, RATIOS, st.integers(1, 7), st.lists(st.integers(1, 30), min_size=4, max_size=4))
def test_ratio_keeps_its_budget_and_leaves_nothing_useful_of_it(spectra, ratio, multiple_of, costs):
    components = linear_components(spectra, costs)
    smallest = {component.name: component.candidates(multiple_of)[0] for component in components}
    budget = ratio * dense(components)
    if parameters(components, smallest) > int(budget):
        with pytest.raises(ValueError, match="the smallest possible ratio is"):
            allocate_ratio(components, ratio, multiple_of=multiple_of)
        return
    ranks = allocate_ratio(components, ratio, multiple_of=multiple_of)
    used = parameters(components, ranks)
    assert used <= budget
    for component in components:
        rank = ranks[component.name]
        assert rank % multiple_of == 0 or rank == component.full_rank
        for better in component.candidates(multiple_of):
            if component.loss[better] < component.loss[rank]:
                assert used + component.parameters[better] - component.parameters[rank] > int(budget)


@given(SPECTRA, st.integers(1, FULL_RANK), st.lists(st.integers(1, 30), min_size=4, max_size=4))
def test_ratio_is_at_least_as_good_as_uniform(spectra, rank, costs):
    components = linear_components(spectra, costs)
    # Costs that jump, so that the losses are not convex in them: as the latent form's, and a little more.
    dear = [component.parameters + component.parameters**2 // 40 for component in components]
    components = [replace(c, parameters=p, dense_parameters=int(p[-1])) for c, p in zip(components, dear)]
    uniform = allocate_uniform(components, rank)
    found = allocate_ratio(components, parameters(components, uniform) / dense(components))
    assert parameters(components, found) <= parameters(components, uniform)
    assert total_loss(components, found) <= total_loss(components, uniform) + 1e-12


@given(SPECTRA, RATIOS, RATIOS)
def test_a_larger_ratio_never_loses_more(spectra, first, second):
    components = linear_components(spectra)
    less, more = (allocate_ratio(components, ratio) for ratio in sorted((first, second)))
    assert total_loss(components, more) <= total_loss(components, less) + 1e-12


@given(SPECTRA)
def test_the_whole_budget_loses_nothing(spectra):
    components = linear_components(spectra)
    assert total_loss(components, allocate_ratio(components, 1.0)) == 0


def test_ratio_spends_nothing_on_tails_of_zero():
    """A component of exact rank 2 is not given more, and the rest goes where it is of use."""
    low, high = [[3.0, 2.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]
    components = linear_components([low, high])
    assert allocate_ratio(components, 0.75) == {"layer.0": 2, "layer.1": 4}
    assert allocate_ratio(components, 1.0) == {"layer.0": 2, "layer.1": 4}


def test_ratio_of_a_component_with_a_jump_in_its_cost():
    """Not convex: rank 3 costs as much as rank 2 here, so rank 2 is never the answer."""
    values = np.array([[4.0, 2.0, 1.0]])
    component = Component("latent", values, np.array([0, 10, 20, 20]), dense_parameters=20)
    assert allocate_ratio([component], 1.0) == {"latent": 3}
    assert allocate_ratio([component], 0.9) == {"latent": 1}


@pytest.mark.parametrize("rank", range(1, 100))
def test_a_ratio_is_not_lost_to_rounding(rank):
    """0.29 * 100 is 28.999999999999996, and rank 29 of 100 is what was asked for."""
    component = Component("a", np.ones((1, 100)), np.arange(101), dense_parameters=100)
    assert allocate_ratio([component], rank / 100) == {"a": rank}


# The others


@given(SPECTRA, st.floats(0, 1), st.floats(0, 1))
def test_epsilon_counts_and_is_monotone(spectra, first, second):
    components = linear_components(spectra)
    small, large = sorted((first, second))
    many, few = allocate_epsilon(components, small), allocate_epsilon(components, large)
    for component in components:
        values = component.singular_values
        counts = [sum(1 for v in group if values.max() > 0 and v / values.max() >= large) for group in values]
        if values.max() > 0:
            assert few[component.name] == max(1, *counts)
        assert few[component.name] <= many[component.name]


def test_epsilon_gives_a_zero_component_rank_one():
    assert allocate_epsilon(linear_components([[[0.0] * 4]]), 1e-3) == {"layer.0": 1}


@given(SPECTRA, RATIOS)
def test_epsilon_at_ratio_is_the_smallest_epsilon_that_fits(spectra, ratio):
    components = linear_components(spectra)
    if parameters(components, allocate_epsilon(components, 1.0)) > ratio * dense(components):
        with pytest.raises(ValueError, match="which epsilon=1 keeps"):
            allocate_epsilon_at_ratio(components, ratio)
        return
    found = allocate_epsilon_at_ratio(components, ratio)
    assert parameters(components, found) <= ratio * dense(components)
    thresholds = {0.0, 1.0}.union(*(component.relative.ravel().tolist() for component in components))
    fitting = [
        table
        for table in (allocate_epsilon(components, threshold) for threshold in thresholds)
        if parameters(components, table) <= ratio * dense(components)
    ]
    assert found in fitting
    assert parameters(components, found) == max(parameters(components, table) for table in fitting)


@given(SPECTRA, st.floats(0, 0.999), st.floats(0, 0.999))
def test_energy_is_the_smallest_rank_and_monotone(spectra, first, second):
    components = linear_components(spectra)
    small, large = sorted((first, second))
    many, few = allocate_energy(components, small), allocate_energy(components, large)
    for component in components:
        rank = few[component.name]
        assert component.loss[rank] <= large
        assert rank == 1 or component.loss[rank - 1] > large
        assert rank <= many[component.name]


@given(SPECTRA, st.integers(1, FULL_RANK))
def test_uniform_is_uniform(spectra, rank):
    assert set(allocate_uniform(linear_components(spectra), rank).values()) == {rank}


@given(SPECTRA, st.integers(1, 7), st.integers(1, FULL_RANK), st.floats(0, 0.9))
def test_multiple_of_rounds_up(spectra, multiple_of, rank, threshold):
    components = linear_components(spectra)
    for allocate, argument in (
        (allocate_uniform, rank),
        (allocate_epsilon, threshold),
        (allocate_energy, threshold),
    ):
        plain = allocate(components, argument)
        rounded = allocate(components, argument, multiple_of=multiple_of)
        for name, wanted in plain.items():
            candidates = [r for r in range(1, FULL_RANK + 1) if r % multiple_of == 0 or r == FULL_RANK]
            assert rounded[name] == min(r for r in candidates if r >= wanted)


# Errors

COMPONENTS = linear_components([[[3.0, 2.0, 1.0, 0.5]], [[1.0, 1.0, 1.0, 1.0]]])
NAN = float("nan")


@pytest.mark.parametrize(
    ("allocate", "argument", "message"),
    [
        *((allocate_uniform, rank, "uniform must be a positive integer") for rank in (0, -1, 2.0)),
        (allocate_uniform, 5, r"uniform must be an integer in \[1, 4\], the full rank of layer.0, found 5"),
        *((allocate_epsilon, epsilon, r"epsilon must be in \[0, 1\], found") for epsilon in (-0.1, 1.1, NAN)),
        *((allocate_energy, energy, r"energy must be in \[0, 1\), found") for energy in (-0.1, 1.0, NAN)),
        *((allocate_ratio, ratio, r"ratio must be in \(0, 1\], found") for ratio in (0, -0.5, 1.01, NAN)),
        *((allocate_epsilon_at_ratio, ratio, r"ratio must be in \(0, 1\], found") for ratio in (0, -0.5, 1.01, NAN)),
        (allocate_ratio, 0.2, "smallest possible ratio is 0.2500"),
        (allocate_epsilon_at_ratio, 0.2, "is below 0.6250"),
    ],
)
def test_arguments_out_of_range(allocate, argument, message):
    with pytest.raises(ValueError, match=message):
        allocate(COMPONENTS, argument)


@pytest.mark.parametrize("allocate", [allocate_uniform, allocate_epsilon, allocate_energy, allocate_ratio])
@pytest.mark.parametrize("multiple_of", [0, -8, 1.5])
def test_multiple_of_out_of_range(allocate, multiple_of):
    with pytest.raises(ValueError, match=f"multiple_of must be a positive integer, found {multiple_of}"):
        allocate(COMPONENTS, 1 if allocate is allocate_uniform else 0.9, multiple_of=multiple_of)
