"""Synthetic series: seeded, finite, and drawn from the processes that the docstrings name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_lowrank.data import synthesis
from hf_lowrank.data.synthesis import kernel_synth, structural, ts_mixup

GENERATORS = {"kernel_synth": kernel_synth, "structural": structural}
SEEDS = st.integers(0, 2**32) | st.lists(st.integers(0, 2**32), min_size=1, max_size=3)


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
@settings(max_examples=25)
@given(seed=SEEDS, count=st.integers(1, 12), length=st.integers(2, 90))
def test_shape_finite_and_seeded(generate, seed, count, length):
    series = generate(count, length, seed=seed)
    assert series.shape == (count, length)
    assert series.dtype == np.float64
    assert np.isfinite(series).all()
    np.testing.assert_array_equal(series, generate(count, length, seed=seed))


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
def test_different_seeds_give_different_series(generate):
    seeds = [0, 1, [0, 1], [1, 2], [2, 1], [0, 1, 3]]  # numpy takes [1, 0] for [1]
    drawn = [generate(9, 40, seed=seed) for seed in seeds]
    for i, series in enumerate(drawn):
        for other in drawn[i + 1 :]:
            assert not np.allclose(series, other)


# KernelSynth


@given(lags=arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6)))
def test_toeplitz_holds_the_lag_of_each_pair(lags):
    row, column = np.indices((len(lags), len(lags)))
    np.testing.assert_array_equal(synthesis._toeplitz(lags), lags[np.abs(row - column)])


def test_a_toeplitz_matrix_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        synthesis._toeplitz(np.arange(3.0))[0, 0] = 1.0


@pytest.mark.parametrize("length", [2, 8, 33])
def test_the_bank_holds_covariances(length):
    bank = synthesis._kernel_bank(length)
    for kernel in bank:
        covariance = kernel()
        assert covariance.shape == (length, length)
        np.testing.assert_allclose(covariance, covariance.T)
        eigenvalues = np.linalg.eigvalsh(covariance)
        assert eigenvalues[0] > -1e-9 * eigenvalues[-1]
        assert eigenvalues[-1] > 0


def test_the_bank_is_the_one_of_the_chronos_paper():
    """Each entry written out from its definition: constant, white, linear, squared exponential, rational, periodic."""
    length = 8
    time = [i / (length - 1) for i in range(length)]

    def matrix(function) -> np.ndarray:
        return np.array([[function(i, j) for j in range(length)] for i in range(length)])

    expected = [matrix(lambda i, j: 1.0)]
    expected += [matrix(lambda i, j, v=v: v * (i == j)) for v in (0.1, 1.0)]
    expected += [matrix(lambda i, j, s=s: s**2 + time[i] * time[j]) for s in (0.0, 1.0, 10.0)]
    for scale in (0.1, 1.0, 10.0):
        expected.append(matrix(lambda i, j, s=scale: np.exp(-((time[i] - time[j]) ** 2) / (2 * s**2))))
        expected.append(matrix(lambda i, j, a=scale: (1 + (time[i] - time[j]) ** 2 / (2 * a)) ** -a))
    for period in (4, 6, 7, 10, 12, 14, 24, 26, 30, 48, 52, 60, 96, 168, 336, 365, 672, 730):
        expected.append(matrix(lambda i, j, p=period: np.exp(-2 * np.sin(np.pi * (i - j) / p) ** 2)))
    bank = [kernel() for kernel in synthesis._kernel_bank(length)]
    assert len(bank) == len(expected)
    for covariance in expected:
        assert any(np.allclose(covariance, found) for found in bank)


def within_sampling_error(series: np.ndarray, covariance: np.ndarray) -> bool:
    """Whether the second moments of zero-mean Gaussian rows agree with `covariance`, to six standard errors."""
    count = len(series)
    moments = series.T @ series / count
    variance = np.diag(covariance)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / count)
    return bool((np.abs(moments - covariance) <= 6 * error + 1e-5 * variance.max()).all())


# One of each family of the bank at length 8: constant, white, linear, squared exponential, rational, periodic.
@pytest.mark.parametrize("index", [0, 1, 4, 6, 9, 13])
def test_a_draw_has_the_covariance_of_its_kernel(monkeypatch, index):
    kernel = synthesis._kernel_bank(8)[index]
    monkeypatch.setattr(synthesis, "_kernel_bank", lambda length: [kernel])
    series = kernel_synth(3000, 8, seed=index, max_kernels=1)
    assert within_sampling_error(series, kernel())
    wrong = kernel() + 0.3 * np.diag(np.diag(kernel()))
    assert not within_sampling_error(series, wrong)


def test_kernels_are_added_and_multiplied(monkeypatch):
    """With one kernel K and two draws of it: K, K + K and K * K with the weights 1/2, 1/4, 1/4."""
    kernel = synthesis._kernel_bank(8)[4]  # 1 + s t
    monkeypatch.setattr(synthesis, "_kernel_bank", lambda length: [kernel])
    series = kernel_synth(6000, 8, seed=0, max_kernels=2)
    mixture = kernel() / 2 + 2 * kernel() / 4 + kernel() ** 2 / 4
    moments = series.T @ series / len(series)
    np.testing.assert_allclose(moments, mixture, rtol=0.1)
    only_sums = kernel() / 2 + 2 * kernel() / 2
    assert np.abs(moments / only_sums - 1).max() > 0.1


# Structural series


def test_seasonal_patterns_repeat_and_have_unit_deviation():
    pattern = synthesis._seasonal(np.random.default_rng(0), 60, 24 * 7 * 3)
    periods = set()
    for row in pattern:
        period = next(p for p in synthesis.SEASONS if np.array_equal(row[p:], row[:-p]))
        periods.add(period)
        assert row[:period].mean() == pytest.approx(0, abs=1e-9)
        assert row[:period].std() == pytest.approx(1, abs=1e-6)
    assert len(periods) >= 6


def test_innovations_are_of_unit_variance_and_some_are_heavy_tailed():
    noise = synthesis._innovations(np.random.default_rng(0), 400, 500)
    kurtosis = (noise**4).mean(axis=1) / (noise**2).mean(axis=1) ** 2
    assert np.median((noise**2).mean(axis=1)) == pytest.approx(1, abs=0.1)
    assert 0.2 < (kurtosis > 4).mean() < 0.45


@pytest.mark.parametrize("length", [20, 320])
def test_short_windows_trend_as_much_as_long_ones(length):
    """A clear trend: time alone explains most of the variance in a good share of the series, at any length."""
    series = structural(400, length, seed=0)
    varying = series[series.std(axis=1) > 1e-9]
    explained = np.array([np.corrcoef(np.arange(length), row)[0, 1] ** 2 for row in varying])
    assert 0.2 < (explained > 0.7).mean() < 0.7


def test_some_series_are_counts_and_some_have_zeros():
    series = structural(400, 60, seed=0)
    whole = (series == np.round(series)).all(axis=1)
    assert 0.03 < whole.mean() < 0.2
    assert ((series == 0).mean(axis=1) > 0.2).any()
    assert (series < 0).any(axis=1).mean() > 0.05


# TSMixup and the mixture


@settings(max_examples=25)
@given(seed=SEEDS, max_components=st.integers(1, 4), alpha=st.floats(0.2, 5))
def test_mixtures_lie_in_the_convex_hull(seed, max_components, alpha):
    series = np.random.default_rng(7).normal(3.0, 2.0, (5, 12))
    scaled = series / np.abs(series).mean(axis=1, keepdims=True)
    mixed = ts_mixup(series, 6, seed=seed, max_components=max_components, alpha=alpha)
    assert mixed.shape == (6, 12)
    system = np.vstack([scaled.T, np.ones(5)])
    for row in mixed:
        weights = np.linalg.lstsq(system, np.append(row, 1.0))[0]  # five series in general position: they are unique
        np.testing.assert_allclose(system @ weights, np.append(row, 1.0), atol=1e-6)
        assert weights.min() > -1e-6
        assert 1 <= (weights > 1e-7).sum() <= max_components


def test_a_single_component_is_the_mean_scaled_series():
    series = np.random.default_rng(7).normal(3.0, 2.0, (5, 12))
    scaled = series / np.abs(series).mean(axis=1, keepdims=True)
    for row in ts_mixup(series, 20, seed=0, max_components=1):
        assert np.isclose(scaled, row, atol=1e-7).all(axis=1).any()


def test_a_series_of_zeros_stays_one():
    assert not ts_mixup(np.zeros((2, 5)), 3, seed=0).any()
