"""The models that settings describe: their sizes, their ranks, and those that cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hf_lowrank.published_figures import PRETRAINED_RATIOS
from hf_lowrank.training.plan import model_of, plan_of
from hf_lowrank.training.settings import PretrainingSettings

SIZES: dict[str, Any] = {"d_model": 16, "num_heads": 2, "d_kv": 8, "num_layers": 2}
TINY = PretrainingSettings(**SIZES, base_rank=2, rank_growth=0.5)
# Sizes of heads that the paper's schedules give its 12 + 12 layers, worked out by hand from ceil(d~_0 (1 + i)^alpha).
PAPER_HEADS = {
    (3.0, 0.27): [3, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6],
    (5.0, 0.35): [5, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 12],
    (7.0, 0.40): [7, 10, 11, 13, 14, 15, 16, 17, 17, 18, 19, 19],
}
# To the nearest power of two; a cross-attention layer counts on from the encoder.
PAPER_POWERS = {
    (3.0, 0.27): ([4] * 10 + [8] * 2, [8] * 12),
    (5.0, 0.35): ([4] + [8] * 9 + [16] * 2, [16] * 12),
    (7.0, 0.40): ([8] * 3 + [16] * 9, [16] * 6 + [32] * 6),
}


@pytest.mark.parametrize("schedule", PRETRAINED_RATIOS)
def test_the_papers_models_have_its_head_dimensions(schedule: tuple[float, float]) -> None:
    base, growth = schedule
    settings = PretrainingSettings(shape="t5-base", base_rank=base, rank_growth=growth)
    plan = plan_of(settings)
    assert plan.attention_ranks is not None
    for entries in plan.attention_ranks.values():
        assert [entry["qk"] for entry in entries] == [entry["vo"] for entry in entries] == PAPER_HEADS[schedule]
    assert plan.attention_ratio == pytest.approx(np.mean(PAPER_HEADS[schedule]) / 64)
    assert f"the paper reports {PRETRAINED_RATIOS[schedule]:.1%}" in plan.text
    own, cross = PAPER_POWERS[schedule]
    plan = plan_of(replace(settings, rank_rounding="pow2"))
    assert plan.attention_ranks is not None
    for kind, entries in plan.attention_ranks.items():
        assert [entry["vo"] for entry in entries] == (cross if kind == "cross" else own)


def test_the_planned_size_is_that_of_the_model() -> None:
    for settings in (TINY, replace(TINY, family="bolt"), replace(TINY, base_rank=None, rank_growth=None)):
        model_class, config = model_of(settings)
        assert plan_of(settings).parameters == model_class(config).num_parameters()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, found 0"),
        ({"prediction_length": 0}, "prediction_length must be an integer of at least 1"),
        ({"base_rank": -1.0}, "base_rank must be a positive number"),
        ({"base_rank": None}, "rank_growth and rank_rounding need base_rank"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(replace(TINY, **changes))
