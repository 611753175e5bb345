"""`torch.export` with a dynamic batch and length, at every form of every layer: exact at shapes that were not the example's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chronos_models import BOLT_RANKS, CHRONOS2_RANKS, bolt, chronos2
from conftest import MIXED_RANKS, SHAPE, randomise
from torch.export import Dim, ExportedProgram, export

from hf_lowrank import LowRankT5Config, LowRankT5EncoderModel

BOTH = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
# Batch and length; series come in whole patches of 5, up to a context of 40.
SERIES = [(5, 35), (2, 10), (1, 40), (7, 15)]


def series(batch: int, length: int) -> torch.Tensor:
    context = torch.randn(batch, length).cumsum(dim=-1)
    context[0, : length - 4] = torch.nan  # all but the last patch
    return context


def exported(model: torch.nn.Module, inputs: dict[str, Any], shapes: dict[str, Any]) -> ExportedProgram:
    with torch.no_grad():
        return export(model, (), inputs, dynamic_shapes=shapes, strict=False)


def test_chronos_bolt():
    model = bolt(**BOLT_RANKS)
    program = exported(model, {"context": series(3, 20)}, {"context": BOTH})
    for batch, length in SERIES:
        context = series(batch, length)
        found = program.module()(context=context).quantile_preds
        assert torch.equal(found, model(context=context).quantile_preds)


def test_chronos_2():
    model = chronos2(**CHRONOS2_RANKS)
    horizon = {"num_output_patches": 2}
    inputs = {"context": series(3, 20), "group_ids": torch.tensor([0, 0, 1]), **horizon}
    shapes = {"context": BOTH, "group_ids": {0: Dim.DYNAMIC}, "num_output_patches": None}
    program = exported(model, inputs, shapes)
    for batch, length in SERIES:
        inputs = {"context": series(batch, length), "group_ids": torch.arange(batch) // 2, **horizon}
        found = program.module()(**inputs).quantile_preds
        assert torch.equal(found, model(**inputs).quantile_preds)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_encoder_of_a_t5(implementation):
    config = LowRankT5Config(**SHAPE, **MIXED_RANKS, attn_implementation=implementation)
    model = randomise(LowRankT5EncoderModel(config))

    def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, SHAPE["vocab_size"], (batch, length))
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        return {"input_ids": ids, "attention_mask": mask}

    program = exported(model, tokens(3, 11), {"input_ids": BOTH, "attention_mask": BOTH})
    for batch, length in [(5, 20), (2, 7), (1, 3), (4, 60), (2, 1)]:
        inputs = tokens(batch, length)
        found = program.module()(**inputs).last_hidden_state
        assert torch.equal(found, model(**inputs).last_hidden_state)
