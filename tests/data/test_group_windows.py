"""Windows of groups: whole, of the data, counting targets alone, and apart from those that are held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from chronos_models import chronos2

from hf_lowrank.data.group_windows import GroupedSeriesWindows, held_out_group_ends, stack_groups
from hf_lowrank.data.groups import SeriesGroup

NAN = float("nan")
NO_CATEGORIES = np.zeros(4, bool)


def numbered(item: int, length: int) -> np.ndarray:
    """Two targets, a covariate of the past and a known one, whose values tell item, row and step; they vary."""
    return 1000.0 * item + 200.0 * np.arange(4)[:, None] + np.arange(length)


def groups_of(*lengths: int) -> list[SeriesGroup]:
    return [SeriesGroup(numbered(item, length), 2, 1, NO_CATEGORIES) for item, length in enumerate(lengths)]


def test_windows_are_whole_groups_of_the_data_and_repeat():
    groups = groups_of(150, 100, 40)
    size = {"patch_size": 5, "max_values": 2000, "max_windows": 30, "min_length": 8, "min_observed": 3}
    windows = GroupedSeriesWindows(60, 12, groups, 30, seed=3, **size)
    seen = set()
    for item in (windows[i] for i in range(30)):
        context, target, known, ids = (
            item[name].numpy() for name in ("context", "future_target", "future_covariates", "group_ids")
        )
        assert target.shape == known.shape == (len(context), 5 * item["num_output_patches"])
        assert len(context) <= 30
        assert context.size + target.size <= 2000 + 4 * 15
        assert np.array_equal(ids, np.repeat(np.arange(len(context) // 4), 4))
        for first in range(0, len(context), 4):
            rows = slice(first, first + 4)
            last = context[rows, -1]
            number = int(last[0] // 1000)
            origin = int(last[0] % 1000) + 1
            values = groups[number].values
            start = origin - int((~np.isnan(context[first])).sum())
            np.testing.assert_array_equal(context[rows][:, -(origin - start) :], values[:, start:origin])
            horizon = min(12, values.shape[1] - origin)
            np.testing.assert_array_equal(target[first : first + 2, :horizon], values[:2, origin : origin + horizon])
            np.testing.assert_array_equal(known[first + 3, :horizon], values[3, origin : origin + horizon])
            assert np.isnan(target[first + 2 : first + 4]).all()
            assert np.isnan(known[first : first + 3]).all()
            assert np.isnan(target[rows, horizon:]).all()
            seen.add(number)
    assert seen == {0, 1, 2}
    again = GroupedSeriesWindows(60, 12, groups, 9, seed=3, **size)[7]
    torch.testing.assert_close(again, windows[7], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(
        windows[7]["context"], GroupedSeriesWindows(60, 12, groups, 9, seed=4, **size)[7]["context"]
    )


def test_held_out_ends_are_in_no_training_window():
    pasts, ends = held_out_group_ends(groups_of(150, 100, 20), 60, 12, min_observed=3)
    assert [group.num_steps for group in pasts] == [138, 88, 14]
    for window, length in zip(ends, (150, 100, 20)):
        np.testing.assert_array_equal(window.future[0] % 1000, np.arange(length - min(12, length // 3), length))
        assert np.array_equal(window.is_target, [True, True, False, False])
    windows = GroupedSeriesWindows(60, 12, pasts, 20, seed=0, patch_size=5)
    for item in (windows[i] for i in range(20)):
        held_out = np.concatenate([window.future[:2].ravel() for window in ends])
        assert not np.isin(item["context"], held_out).any()
        assert not np.isin(item["future_target"], held_out).any()


def test_a_target_with_too_little_in_its_context_does_not_count():
    values = numbered(0, 60)
    values[1, :50] = NAN
    _, (end,) = held_out_group_ends([SeriesGroup(values, 2, 1, NO_CATEGORIES)], 40, 8, min_observed=3)
    assert np.array_equal(end.is_target, [True, False, False, False])
    values[:2] = NAN
    group = SeriesGroup(values, 2, 1, NO_CATEGORIES)
    with pytest.raises(ValueError, match="none of 1 groups has a target with 3 values to train on"):
        held_out_group_ends([group], 40, 8, min_observed=3)
    with pytest.raises(ValueError, match="no target of 1 groups has 4 observed values within 48 steps"):
        GroupedSeriesWindows(40, 8, [group], 1, seed=0, min_observed=3)


def test_the_loss_of_a_batch_is_that_of_its_targets():
    """What a covariate becomes changes no loss where it is of the past, and is read where it is known."""
    model = chronos2()

    def loss(changed: int | None = None) -> float:
        values = np.random.default_rng(1).normal(size=(4, 60))
        if changed is not None:
            values[changed, 50:] += 3
        _, ends = held_out_group_ends([SeriesGroup(values, 2, 1, NO_CATEGORIES)], 40, 10)
        return model(**stack_groups(ends, 5)).loss.item()

    assert loss(2) == loss()
    assert loss(3) != loss()
    assert loss(1) != loss()
