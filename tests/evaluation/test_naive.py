"""The seasonal naive forecast, with and without gaps."""

from __future__ import annotations

import numpy as np

from hf_lowrank.evaluation.naive import seasonal_naive


def test_seasonal_naive_fills_what_is_missing() -> None:
    nan = float("nan")
    np.testing.assert_array_equal(seasonal_naive(np.array([1.0, 2, 3, 4]), 5, 2), [3, 4, 3, 4, 3])
    np.testing.assert_array_equal(seasonal_naive(np.array([1.0, 2, 3, nan]), 3, 2), [3, 2, 3])
    np.testing.assert_array_equal(seasonal_naive(np.array([0.0, 1, nan, 3, nan]), 2, 2), [3, 0])
    np.testing.assert_array_equal(seasonal_naive(np.array([nan, 2, nan, 4]), 2, 2), [3, 4])
    np.testing.assert_array_equal(seasonal_naive(np.array([1.0, 3]), 2, 4), [2, 2])
    np.testing.assert_array_equal(seasonal_naive(np.array([nan, nan]), 2, 1), [0, 0])
