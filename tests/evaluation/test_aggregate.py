"""Intervals of the difference of two models: as often right as they say, and none where there is no difference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_lowrank.evaluation.aggregate import Comparison, aggregate_scores
from hf_lowrank.evaluation.row import EvaluationRow

METRIC = "MASE"


def rows(errors: dict[str, np.ndarray]) -> list[EvaluationRow]:
    """Of the errors of models, each (tasks, series)."""
    return [
        EvaluationRow(
            f"task {number}",
            model,
            *[values.mean()] * 4,
            num_series=len(values),
            num_windows=1,
            horizon=1,
            seasonality=1,
            seconds=0.0,
            by_series={METRIC: [values.tolist()], "steps": [[1.0] * len(values)]},
        )
        for model, tasks in errors.items()
        for number, values in enumerate(tasks)
    ]


def coverage(num_tasks: int, num_series: int, task_spread: float, *, repeats: int, seed: int = 0) -> float:
    """How often the interval holds the truth: a model whose errors are 0.9 of the baseline's, but for tasks and series."""
    hits = 0
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        baseline = rng.lognormal(0, 0.5, size=(num_tasks, num_series))
        of_series = rng.lognormal(-0.02, 0.2, size=baseline.shape)  # its mean is 1
        of_task = np.exp(rng.normal(0, task_spread, size=(num_tasks, 1)))
        comparison = Comparison(
            rows({"model": 0.9 * baseline * of_series * of_task, "dense": baseline}), num_bootstrap=300, seed=repeat
        )
        relative = comparison.relative("model", "dense", METRIC)
        hits += relative["low"] <= 0.9 <= relative["high"]
    return hits / repeats


# The noise of the series alone, and tasks that differ much more than that.
CASES = [(1, 40, 0.0), (6, 20, 0.0), (6, 20, 0.2), (20, 10, 0.05)]


def near_95_percent(share: float, repeats: int, bias: float = 0.0) -> bool:
    """Within three standard deviations of the binomial, and what percentiles of few resamples of a skewed ratio are known to lack."""
    return (
        0.95 - bias - 3 * math.sqrt(0.95 * 0.05 / repeats)
        <= share
        <= 0.95 + bias + 3 * math.sqrt(0.95 * 0.05 / repeats)
    )


@pytest.mark.parametrize("case", CASES)
def test_the_interval_holds_the_truth(case: tuple[int, int, float]) -> None:
    assert near_95_percent(coverage(*case, repeats=150), 150)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_interval_holds_the_truth_to_a_percent_or_two(case: tuple[int, int, float]) -> None:
    assert near_95_percent(coverage(*case, repeats=2000), 2000, bias=0.01)


@pytest.mark.parametrize("num_tasks", [1, 7])
def test_a_model_and_itself_differ_by_nothing(num_tasks: int) -> None:
    errors = np.random.default_rng(0).lognormal(size=(num_tasks, 30))
    found = aggregate_scores(
        rows({"seasonal_naive": errors, "model": errors, "dense": errors}), "dense", num_bootstrap=100, seed=0
    )
    for title in ("relative_to_seasonal_naive", "relative_to_dense"):
        assert found["model"][title][METRIC] == {
            "geometric_mean": 1.0,
            "low": 1.0,
            "high": 1.0,
            "num_tasks": num_tasks,
        }


def test_the_interval_is_of_the_difference() -> None:
    """Series may differ a thousandfold: what both models share is no doubt about which one is better."""
    errors = np.random.default_rng(0).lognormal(0, 3, size=(8, 30))
    comparison = Comparison(rows({"model": 0.99 * errors, "dense": errors}), num_bootstrap=100, seed=0)
    relative = comparison.relative("model", "dense", METRIC)
    assert [relative[name] for name in ("geometric_mean", "low", "high")] == pytest.approx([0.99] * 3, rel=1e-12)


def test_a_single_task_has_an_interval_over_its_series_and_a_single_series_none() -> None:
    rng = np.random.default_rng(0)
    for num_series, has_interval in ((2, True), (1, False)):
        errors = {name: rng.lognormal(size=(1, num_series)) for name in ("model", "dense")}
        relative = Comparison(rows(errors), num_bootstrap=100, seed=0).relative("model", "dense", METRIC)
        assert math.isfinite(relative["low"]) == has_interval
