"""Policies that look at one component at a time: what each keeps, and that more is never less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.compression.allocation import (
    Component,
    allocate_energy,
    allocate_epsilon,
    allocate_epsilon_at_ratio,
    allocate_uniform,
    check_argument,
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


def components_of(spectra: list[list[list[float]]], weights: list[float] | None = None) -> list[Component]:
    return [
        Component(f"layer.{i}", np.sort(np.array(groups))[:, ::-1].copy(), *([] if weights is None else [weights[i]]))
        for i, groups in enumerate(spectra)
    ]


# Components


@given(SPECTRA, st.floats(1e-3, 1e3))
def test_loss_is_the_dropped_share_of_the_squares_times_the_weight(spectra, weight):
    for component in components_of(spectra, [weight] * len(spectra)):
        squares = component.relative**2  # of those below 1e-162 alone it would be zero
        for rank in range(component.full_rank + 1):
            wanted = weight * squares[:, rank:].sum() / squares.sum() if squares.sum() > 0 else 0.0
            assert component.loss[rank] == pytest.approx(wanted, rel=1e-9, abs=1e-300)
        assert component.loss[-1] == 0
        assert (np.diff(component.loss) <= 0).all()
        assert component.weight == weight


def test_a_component_weighs_one_where_nothing_is_said():
    assert Component("a", np.array([[2.0, 1.0]])).loss.tolist() == pytest.approx([1.0, 0.2, 0.0])


# Policies


@given(SPECTRA, st.floats(0, 1), st.floats(0, 1))
def test_epsilon_counts_and_is_monotone(spectra, first, second):
    components = components_of(spectra)
    small, large = sorted((first, second))
    many, few = allocate_epsilon(components, small), allocate_epsilon(components, large)
    for component in components:
        values = component.singular_values
        counts = [sum(1 for v in group if values.max() > 0 and v / values.max() >= large) for group in values]
        if values.max() > 0:
            assert few[component.name] == max(1, *counts)
        assert few[component.name] <= many[component.name]


def test_epsilon_gives_a_zero_component_rank_one():
    assert allocate_epsilon(components_of([[[0.0] * 4]]), 1e-3) == {"layer.0": 1}


def kept(components: list[Component], ranks: dict[str, int]) -> float:
    """The share of all ranks."""
    return sum(ranks.values()) / sum(component.full_rank for component in components)


@given(SPECTRA, RATIOS)
def test_epsilon_at_ratio_is_the_smallest_epsilon_that_fits(spectra, ratio):
    components = components_of(spectra)
    if kept(components, allocate_epsilon(components, 1.0)) > ratio:
        with pytest.raises(ValueError, match="which epsilon=1 keeps"):
            allocate_epsilon_at_ratio(components, ratio)
        return
    found = allocate_epsilon_at_ratio(components, ratio)
    thresholds = {0.0, 1.0}.union(*(component.relative.ravel().tolist() for component in components))
    fitting = [
        table
        for table in (allocate_epsilon(components, threshold) for threshold in thresholds)
        if kept(components, table) <= ratio
    ]
    assert found in fitting
    assert kept(components, found) == max(kept(components, table) for table in fitting)


@given(SPECTRA, st.floats(0, 0.999), st.floats(0, 0.999))
def test_energy_is_the_smallest_rank_and_monotone(spectra, first, second):
    components = components_of(spectra, [3.0, 0.25, 100.0, 1.0])
    small, large = sorted((first, second))
    many, few = allocate_energy(components, small), allocate_energy(components, large)
    for component in components:
        rank = few[component.name]
        assert component.loss[rank] <= large * component.weight
        assert rank == 1 or component.loss[rank - 1] > large * component.weight
        assert rank <= many[component.name]


@given(SPECTRA, st.integers(1, FULL_RANK))
def test_uniform_is_uniform(spectra, rank):
    assert set(allocate_uniform(components_of(spectra), rank).values()) == {rank}


@given(SPECTRA, st.integers(1, 7), st.integers(1, FULL_RANK), st.floats(0, 0.9))
def test_multiple_of_rounds_up(spectra, multiple_of, rank, threshold):
    components = components_of(spectra)
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

COMPONENTS = components_of([[[3.0, 2.0, 1.0, 0.5]], [[1.0, 1.0, 1.0, 1.0]]])
NAN = float("nan")


@pytest.mark.parametrize(
    ("allocate", "argument", "message"),
    [
        *((allocate_uniform, rank, "uniform must be a positive integer") for rank in (0, -1, 2.0)),
        (allocate_uniform, 5, r"uniform must be an integer in \[1, 4\], the full rank of layer.0, found 5"),
        *((allocate_epsilon, epsilon, r"epsilon must be in \[0, 1\], found") for epsilon in (-0.1, 1.1, NAN)),
        *((allocate_energy, energy, r"energy must be in \[0, 1\), found") for energy in (-0.1, 1.0, NAN)),
        *((allocate_epsilon_at_ratio, ratio, r"ratio must be in \(0, 1\], found") for ratio in (0, -0.5, 1.01, NAN)),
        (allocate_epsilon_at_ratio, 0.2, "is below 0.6250"),
    ],
)
def test_arguments_out_of_range(allocate, argument, message):
    with pytest.raises(ValueError, match=message):
        allocate(COMPONENTS, argument)


@pytest.mark.parametrize("allocate", [allocate_uniform, allocate_epsilon, allocate_energy])
@pytest.mark.parametrize("multiple_of", [0, -8, 1.5])
def test_multiple_of_out_of_range(allocate, multiple_of):
    with pytest.raises(ValueError, match=f"multiple_of must be a positive integer, found {multiple_of}"):
        allocate(COMPONENTS, 1 if allocate is allocate_uniform else 0.9, multiple_of=multiple_of)


@pytest.mark.parametrize("name", ["ratio", "total_ratio", "feed_forward_ratio", "max_cache_ratio"])
@pytest.mark.parametrize("value", [0, -0.5, 1.01, NAN, True, "half", None])
def test_a_share_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\], found {value!r}"):
        check_argument(name, value)


@given(st.floats(0, 1, exclude_min=True) | st.just(1))
def test_a_share_in_range(value):
    for name in ("ratio", "total_ratio", "feed_forward_ratio", "max_cache_ratio"):
        check_argument(name, value)
