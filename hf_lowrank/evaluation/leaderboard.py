"""The aggregation of fev-bench (arXiv 2509.26468), by fev's own functions."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from .naive import SEASONAL_NAIVE

__all__ = ["leaderboard"]


def leaderboard(
    scores: pd.DataFrame,
    *,
    against: str | None = None,
    trained_on: Mapping[str, Collection[str]] | None = None,
    imputed_by: str | None = None,
) -> pd.DataFrame:
    """Skill score and win rate of models, by `fev.analysis.leaderboard`.

    The skill score is 1 minus the geometric mean over tasks of the error relative to Seasonal Naive's, clipped to [0.01, 100]; the win rate the
    share of comparisons with the other models on all tasks that a model wins, a tie counting half. A score that is missing
    counts as Seasonal Naive's; tasks on which Seasonal Naive's is zero or undefined are left out.

    Args:
        scores: A row a task, a column a model, `SEASONAL_NAIVE` among them.
        against: A model, for a column of the share of tasks won over it.
        trained_on: By model the tasks that it was trained on, where it gets the score of `imputed_by`.
        imputed_by: A model that was trained on none.

    Returns:
        `skill_score`, `win_rate` and, with `against`, `wins_over_` it; the best skill first.
    """
    from fev import __version__
    from fev.analysis import RESULTS_DTYPES, leaderboard, pairwise_comparison

    scores = scores[scores[SEASONAL_NAIVE] > 0]
    seen = trained_on or {}
    summaries = pd.DataFrame(
        [
            {
                "dataset_path": str(task),
                "model_name": model,
                "test_error": scores.at[task, model],
                "trained_on_this_dataset": task in seen.get(str(model), ()),
                "quantile_levels": "[]",
                "fev_version": __version__,
            }
            for task in scores.index
            for model in scores.columns
        ]
    )
    summaries = summaries.reindex(columns=list(RESULTS_DTYPES))
    arguments: dict[str, Any] = {
        "summaries": summaries,
        "missing_strategy": "impute",
        "baseline_model": SEASONAL_NAIVE,
        "leakage_imputation_model": imputed_by,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where a model is alone it has nobody to win over
        board = leaderboard(**arguments)[["skill_score", "win_rate"]]
        if against is not None:
            pairs = pairwise_comparison(**arguments)["win_rate"]
            board[f"wins_over_{against}"] = pairs.xs(against, level="model_2")
    return board.sort_values("skill_score", ascending=False, kind="stable")
