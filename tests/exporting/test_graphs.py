"""The graphs compute what the models compute, in every form, for any series, groups and known futures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chronos_models import BOLT_RANKS, CHRONOS2_RANKS, bolt, chronos2, dense_bolt, dense_chronos2
from torch import nn

from hf_lowrank.checkpoints.dense import as_full_rank
from hf_lowrank.exporting.graphs import Alone, AttentionToOne, BoltGraph, Grouped, standardize

CONTEXTS = {
    "noise": torch.randn(6, 30),
    "far": 1e6 + torch.randn(6, 30),
    "one patch": torch.randn(6, 5),
    "short": torch.randn(6, 40).masked_fill(torch.arange(40) < 33, torch.nan),
    "constant": torch.full((6, 20), 7.0),
    "gaps": torch.randn(6, 40).masked_fill(torch.arange(40) % 3 == 0, torch.nan),
    "nothing": torch.full((6, 20), torch.nan),
}


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def bolts() -> dict[str, Any]:
    gated = {"feed_forward_proj": "gated-gelu"}
    without_token = {"chronos": {"use_reg_token": False}}
    return {
        "dense": dense_bolt(),
        "gated": dense_bolt(**gated),
        "without REG": dense_bolt(**without_token),
        "low-rank": bolt(**BOLT_RANKS),
    }


@pytest.mark.parametrize("name", ["dense", "gated", "without REG", "low-rank"])
@torch.no_grad()
def test_bolt(name: str) -> None:
    torch.manual_seed(0)
    model = bolts()[name]
    graph = BoltGraph(as_full_rank(model))
    for context in CONTEXTS.values():
        near(graph(context), model(context=context).quantile_preds)


def chronos2s() -> dict[str, Any]:
    return {
        "dense": dense_chronos2(),
        "linear": dense_chronos2(chronos={"use_arcsinh": False}),
        "low-rank": chronos2(**CHRONOS2_RANKS),
    }


@pytest.mark.parametrize("name", ["dense", "linear", "low-rank"])
@torch.no_grad()
def test_chronos2(name: str) -> None:
    torch.manual_seed(0)
    model = chronos2s()[name]
    alone, grouped = Alone(as_full_rank(model)), Grouped(as_full_rank(model))
    future = torch.full((6, 10), torch.nan)
    future[1] = torch.randn(10)
    future[4, :3] = torch.randn(3)
    for context in (values for name, values in CONTEXTS.items() if name != "nothing"):
        inputs = {"context": context, "future_covariates": future, "num_output_patches": 2}
        near(alone(context, future), model(**inputs).quantile_preds)
        for members in (2, 3, 6):
            wanted = model(**inputs, group_ids=torch.arange(6) // members).quantile_preds
            found = grouped(context.unflatten(0, (-1, members)), future.unflatten(0, (-1, members)))
            near(found.flatten(0, 1), wanted)


def test_the_one_query_makes_no_keys_or_values_of_the_states() -> None:
    """Of the decoder's matrices the cross-attention's run on one token a series: no product but the encoder's sees all patches."""
    graph, rows = BoltGraph(as_full_rank(dense_bolt())), []
    for module in graph.decoder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    with torch.no_grad():
        graph(torch.randn(2, 40))
    assert rows
    assert set(rows) == {1}


def test_attention_to_one_takes_the_smaller_of_both_ways() -> None:
    dense, small = dense_chronos2().encoder.block[0], chronos2(**CHRONOS2_RANKS).encoder.block[0]
    del dense
    layer = AttentionToOne(small.layer[1].layer_norm, small.layer[1].self_attention)
    products = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    rank, width = 5 * 2, 16  # vo of two heads, d_model
    assert sum(module.weight.numel() for module in products) == min(2 * rank * width, width**2)


def test_standardize_is_instance_norm() -> None:
    norm = dense_bolt().instance_norm
    for context in CONTEXTS.values():
        wanted, (mean, deviation) = norm(context)
        found = standardize(context, norm.eps)
        torch.testing.assert_close(found[0], wanted.nan_to_num(0.0), rtol=1e-4, atol=1e-5)
        assert torch.equal(found[1], ~context.isnan())
        torch.testing.assert_close(found[2], mean)
        torch.testing.assert_close(found[3], deviation)
