"""The series to train on: seeded, finite, of the kinds and with the seasons that they are said to have."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowrank.data import calendar_series as calendar
from hf_lowrank.data.calendar_series import FREQUENCIES, calendar_series
from hf_lowrank.data.disturbances import disturbed, with_gaps
from hf_lowrank.data.grouped_series import grouped_series
from hf_lowrank.data.mixture import SHARES, synthetic_series
from hf_lowrank.data.processes import intermittent_counts, ornstein_uhlenbeck, pulses, trend_times_season
from hf_lowrank.data.windows import GroupedWindows

GENERATORS = {
    one.__name__: one
    for one in (calendar_series, trend_times_season, ornstein_uhlenbeck, pulses, intermittent_counts, synthetic_series)
}
PERIODS = sorted({period for one in FREQUENCIES for period in one.periods})


def seasonal_strength(values: np.ndarray, period: int) -> float:
    """The share of the variance around a moving average of one period that a season explains, with its degrees of freedom."""
    trend = np.convolve(values, np.ones(period) / period, "valid")
    rest = (values[period // 2 :][: len(trend)] - trend)[: len(trend) // period * period].reshape(-1, period)
    if len(rest) < 3:
        return 0.0
    unexplained = ((rest - rest.mean(axis=0)) ** 2).sum() / (rest.size - period)
    return max(0.0, 1 - unexplained / ((rest**2).mean() + 1e-12))


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8), length=st.integers(2, 120))
def test_shape_finite_and_seeded(generate, seed, count, length):
    series = generate(count, length, seed=seed)
    assert series.shape == (count, length)
    assert series.dtype == (np.float32 if generate is synthetic_series else np.float64)
    assert np.isfinite(series).all()
    np.testing.assert_array_equal(series, generate(count, length, seed=seed))
    if count * length > 50:
        assert not np.array_equal(series, generate(count, length, seed=seed + 1))


def test_the_shares_are_of_a_whole():
    assert sum(SHARES.values()) == pytest.approx(1)


def test_the_mixture_has_seasons_of_every_length_and_trends():
    """The shares that the card of a reference promises; at 2,048 steps, of 150 series."""
    series = synthetic_series(150, 2048, seed=5).astype(float)
    strongest = [max((seasonal_strength(values, p), -p) for p in PERIODS) for values in series]
    assert np.mean([strength > 0.6 for strength, _ in strongest]) > 0.35
    assert np.mean([strength < 0.3 for strength, _ in strongest]) > 0.2
    seasons = Counter(-period for strength, period in strongest if strength > 0.6)
    assert len(seasons) >= 8
    assert max(seasons.values()) < 0.3 * seasons.total()
    step = np.arange(2048)
    trend = [abs(np.corrcoef(step, values)[0, 1]) if values.std() else 0.0 for values in series]
    assert 0.15 < np.mean([one > 0.7 for one in trend]) < 0.6
    assert np.abs(np.abs(series).mean(axis=1) - 1).mean() < 0.2


@pytest.mark.parametrize("length", [20, 100, 600, 2048])
def test_half_of_the_calendar_series_hold_three_cycles(length):
    rng = np.random.default_rng(0)
    drawn = [calendar._periods(rng, length) for _ in range(400)]
    assert np.mean([bool(periods) and 3 * periods[-1] <= length for periods in drawn]) >= 0.45
    assert all(not periods or periods[0] <= length for periods in drawn)


@pytest.mark.parametrize("periods", [one.periods for one in FREQUENCIES if one.periods], ids=str)
def test_a_season_repeats_after_its_longest_period(periods):
    """But for holidays, of which a fifth of the weekly series have some."""
    repeats = []
    for seed in range(10):
        season = calendar._season(
            np.random.default_rng(seed), periods, 3 * periods[-1] if periods != (7, 365) else 3 * 7 * 365
        )
        cycle = periods[-1] if periods != (7, 365) else 7 * 365
        repeats.append(np.allclose(season[:cycle], season[cycle : 2 * cycle]))
        assert season.std() == pytest.approx(1, abs=1e-3)
    assert np.mean(repeats) >= (0.5 if periods[-1] == 7 * periods[0] else 1)


def test_noise_has_unit_deviation_and_its_own_correlation():
    rng = np.random.default_rng(1)
    noise = np.stack([calendar._noise(rng, 4000) for _ in range(200)])
    assert noise.std() == pytest.approx(1, abs=0.05)
    lagged = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in noise]
    assert np.mean(np.abs(lagged) < 0.1) == pytest.approx(0.5, abs=0.12)
    assert max(lagged) > 0.9


def test_the_process_returns_to_its_means():
    """Its deviation over a long time is that of its regimes, whatever their speed."""
    series = ornstein_uhlenbeck(300, 3000, seed=0)
    assert 0.5 < np.median(series.std(axis=1)) < 2
    assert np.abs(series).max() < 12


def test_counts_are_whole_numbers_with_gaps():
    series = intermittent_counts(200, 400, seed=0)
    np.testing.assert_array_equal(series, np.round(series))
    assert series.min() == 0
    assert 0.5 < (series == 0).mean() < 0.95
    assert series.any(axis=1).all()


def test_disturbances_touch_some_and_gaps_leave_the_last_value():
    rng = np.random.default_rng(0)
    series = rng.standard_normal((2000, 50)).cumsum(axis=1)
    changed = (disturbed(series, rng) != series).any(axis=1)
    assert 0.2 < changed.mean() < 0.4
    gaps = np.isnan(with_gaps(series, rng))
    assert not gaps[:, -1].any()
    assert 0.05 < gaps.any(axis=1).mean() < 0.15
    assert gaps.mean(axis=1).max() < 0.75


def test_the_mixture_is_mean_scaled_and_in_random_order():
    """Mixed series, those smaller than 1, are at most a fifth and spread over the whole array."""
    sizes = np.abs(synthetic_series(600, 30, seed=0)).mean(axis=1)
    assert (sizes <= 1 + 1e-5).all()
    mixed = (sizes < 1 - 1e-4) & (sizes > 0)
    assert all(0.03 < third.mean() < 0.25 for third in np.split(mixed, 3))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40), length=st.integers(2, 60))
def test_no_series_of_the_mixture_is_larger_than_one(seed, count, length):
    """A convex combination of series of size 1 is not larger."""
    assert (np.abs(synthetic_series(count, length, seed=seed)).mean(axis=1) <= 1 + 1e-5).all()


def test_only_a_mixture_of_one_component_repeats_a_series():
    series = synthetic_series(100, 30, seed=0)
    assert len(np.unique(series.round(5), axis=0)) > 100 - 33


def test_different_seeds_give_different_series_and_leave_the_global_random_state_alone():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    seeds = [0, 1, [0, 1], [1, 2], [2, 1], [0, 1, 3]]  # numpy takes [1, 0] for [1]
    drawn = [synthetic_series(9, 40, seed=seed) for seed in seeds]
    for i, series in enumerate(drawn):
        assert not any(np.allclose(series, other) for other in drawn[i + 1 :])
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


# Groups


def test_groups_are_whole_and_their_roles_exclude_each_other():
    groups = grouped_series(1200, 40, seed=0)
    assert groups.values.shape == (1200, 40)
    assert np.isfinite(groups.values).all()
    sizes = np.bincount(groups.group_ids)
    assert (np.diff(groups.group_ids) >= 0).all()
    assert sizes.min() == 1
    assert sizes.max() == 6
    assert 0.28 < np.mean(sizes == 1) < 0.42
    assert not (groups.is_known & groups.is_target).any()
    assert all(groups.is_target[groups.group_ids == group].any() for group in range(len(sizes)))
    assert 0.2 < groups.is_known.mean() < 0.45


def explained(target: np.ndarray, others: np.ndarray) -> float:
    """The share of the target's variance that a line through the others explains."""
    design = np.stack([np.ones(len(target)), *others], axis=1)
    fitted = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    return 1 - np.var(target - fitted) / np.var(target)


def test_series_of_one_group_tell_of_each_other():
    """More than those of other groups, which differ by chance alone."""
    groups = grouped_series(600, 400, seed=2)
    within, across = [], []
    for group in np.unique(groups.group_ids):
        rows = np.flatnonzero(groups.group_ids == group)
        if len(rows) > 1:
            within.append(explained(groups.values[rows[0]], groups.values[rows[1:]]))
            strangers = (rows[1:] + 30) % 600
            across.append(explained(groups.values[rows[0]], groups.values[strangers]))
    assert np.mean(within) > np.mean(across) + 0.2


def test_many_targets_are_what_their_covariates_say():
    """What a line through the covariates leaves is a thousandth in one of ten: lags and squares it does not see."""
    groups = grouped_series(2400, 200, seed=3)
    rows = [np.flatnonzero(groups.group_ids == group) for group in range(groups.group_ids[-1] + 1)]
    told = [
        explained(groups.values[group[0]], groups.values[group[1:]])
        for group in rows
        if len(group) > 1 and groups.is_target[group].sum() == 1
    ]
    assert 0.4 < len(told) / len(rows) < 0.6
    assert np.mean(np.array(told) > 0.95) > 0.15


def test_windows_in_groups_are_what_chronos_2_reads():
    windows = GroupedWindows(256, 64, 20, seed=0, ramp=10, max_values=4000)
    for index in range(20):
        item = windows[index]
        context, target, known = item["context"], item["future_target"], item["future_covariates"]
        assert context.shape[1] <= 256 * (1 + 7 * min(1, (index + 1) / 10)) / 8
        assert target.shape == known.shape == (len(context), 16 * item["num_output_patches"])
        assert not (~target.isnan() & ~known.isnan()).any()
        assert not context[:, -1].isnan().any()
        assert len(item["group_ids"]) == len(context)
    again = GroupedWindows(256, 64, 20, seed=0, ramp=10, max_values=4000)[7]
    assert all(np.array_equal(windows[7][name], again[name], equal_nan=True) for name in ("context", "future_target"))


def test_what_cannot_be_drawn_is_refused():
    for count, length in ((0, 10), (-1, 10), (3, 1), (3, 0)):
        with pytest.raises(
            ValueError, match=f"num_series must be at least 1 and length at least 2, found {count} and {length}"
        ):
            synthetic_series(count, length, seed=0)
    with pytest.raises(ValueError, match="prediction_length must be a multiple of 16, found 24"):
        GroupedWindows(64, 24, 1, seed=0)
