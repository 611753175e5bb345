"""Skill score and win rate are fev's own, and what their formulas say."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from hf_lowrank.evaluation.leaderboard import leaderboard
from hf_lowrank.evaluation.published import published_figures, published_scores

analysis = pytest.importorskip("fev.analysis")

MODELS = ["seasonal_naive", "chronos-2", "timesfm-2.5", "chronos-bolt-base"]


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    return published_scores("fev_bench", "SQL")[MODELS]


@pytest.fixture(scope="module")
def trained_on(scores: pd.DataFrame) -> dict[str, set[str]]:
    published = published_figures()["fev_bench"]["scores"]
    return {model: {scores.index[i] for i in published[model]["trained_on"]} for model in MODELS}


def test_published_results_have_the_formulas_skill_and_win_rate(scores: pd.DataFrame) -> None:
    board = leaderboard(scores, against="chronos-bolt-base")
    errors = scores.div(scores["seasonal_naive"], axis=0).clip(0.01, 100)
    for model in MODELS:
        wins = {
            other: (errors[model] < errors[other]).mean() + (errors[model] == errors[other]).mean() / 2
            for other in MODELS
        }
        skill = 1 - np.exp(np.log(errors[model]).mean())
        rate = np.mean([wins[other] for other in MODELS if other != model])
        wanted = [skill, rate, wins["chronos-bolt-base"]]
        np.testing.assert_allclose(board.loc[model], wanted, rtol=0, atol=1e-9)


def test_published_results_stand_as_fevs_own_call_says(scores: pd.DataFrame, trained_on: dict[str, set[str]]) -> None:
    """With fev-bench's rule for tasks that a model was trained on."""
    assert any(trained_on.values())
    summaries = [
        {"model_name": model, "dataset_config": task, "test_error": scores.at[task, model], "horizon": 8}
        | {
            "trained_on_this_dataset": task in trained_on[model],
            "fev_version": "0.8.0",
            "quantile_levels": "[0.1, 0.5]",
        }
        for model in MODELS
        for task in scores.index
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = analysis.leaderboard(summaries, leakage_imputation_model="chronos-bolt-base")
    board = leaderboard(scores, trained_on=trained_on, imputed_by="chronos-bolt-base")
    for column in ("skill_score", "win_rate"):
        np.testing.assert_allclose(board[column], wanted.loc[board.index, column], rtol=0, atol=1e-9)


def test_what_has_no_score_counts_as_seasonal_naive() -> None:
    scores = pd.DataFrame({"seasonal_naive": [1.0, 2.0, 0.0, np.nan], "model": [0.5, np.nan, 1.0, 1.0]})
    board = leaderboard(scores)
    assert board.loc["model"].to_list() == pytest.approx([1 - 0.5**0.5, 0.75])
