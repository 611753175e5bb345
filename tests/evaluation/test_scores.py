"""Scores of forecasts, and means and intervals of scores over tasks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from hf_lowrank.evaluation.scores import METRICS, relative_score, score_forecasts

pytest.importorskip("fev")


def forecasts(**changed: Any) -> dict[str, Any]:
    """Two series of three steps, all quantiles one too high and the mean two."""
    targets = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    arguments = {
        "targets": targets,
        "contexts": [np.array([0.0, 2.0, 0.0]), np.array([1.0, 5.0])],
        "quantiles": np.repeat(targets[:, :, None] + 1, 9, axis=2),
        "mean": targets + 2,
        "seasonality": 1,
    }
    return arguments | changed


def test_the_median_and_the_mean_have_scores_of_their_own() -> None:
    scores = score_forecasts(**forecasts())
    assert tuple(scores) == METRICS
    assert scores["MASE"] == pytest.approx((1 / 2 + 1 / 4) / 2)  # an error of 1 by the mean step of the past
    assert scores["RMSSE"] == pytest.approx(math.sqrt((2**2 / 2**2 + 2**2 / 4**2) / 2))
    assert scores["WQL"] == pytest.approx(6 / 21)  # 2 (1 - level), 1 on average, at each of six steps
    assert tuple(score_forecasts(**forecasts(mean=None))) == ("WQL", "MASE", "SQL")


@pytest.mark.parametrize("argument", ["quantiles", "mean"])
def test_a_forecast_that_is_no_number_is_refused(argument: str) -> None:
    broken = forecasts()[argument].copy()
    broken[1, 0] = np.nan
    with pytest.raises(ValueError, match="the forecast of series '1' is not finite"):
        score_forecasts(**forecasts(**{argument: broken}))


def test_the_interval_is_that_of_resampled_tasks_widened_as_by_student() -> None:
    """For a normal bootstrap distribution: the mean and Student's quantile times the bootstrap's standard error."""
    scores, baseline_scores = np.random.default_rng(1).lognormal(0, 0.1, size=(2, 30))
    relative = relative_score(scores, baseline_scores, num_bootstrap=20000, seed=3)
    logs = np.log(scores / baseline_scores)
    half = scipy.stats.t.ppf(0.975, 29) * logs.std() / math.sqrt(30)
    low, high = math.exp(logs.mean() - half), math.exp(logs.mean() + half)
    assert relative["geometric_mean"] == pytest.approx(math.exp(logs.mean()), rel=1e-14)
    assert [relative["low"], relative["high"]] == pytest.approx([low, high], abs=0.003)


def test_tasks_on_which_a_score_is_zero_or_undefined_do_not_count() -> None:
    scores, baseline_scores = [1.0, 0.0, 3.0, math.nan, 5.0], [2.0, 1.0, 0.0, 1.0, math.inf]
    relative = relative_score(scores, baseline_scores, num_bootstrap=10, seed=0)
    assert (relative["geometric_mean"], relative["num_tasks"]) == (0.5, 1)
    assert math.isnan(relative["low"])  # one task has no interval
    assert math.isnan(relative["high"])
    nothing = relative_score([0.0], [0.0], num_bootstrap=10, seed=0)
    assert nothing["num_tasks"] == 0
    assert math.isnan(nothing["geometric_mean"])
