"""Measured losses of single components: the insertion equals the truncation, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import decoder_input
from layer_tools import FORMS, layers_of, only, predictions, ranks_of, truncated
from torch.testing import assert_close
from transformers import PreTrainedModel, T5EncoderModel, T5ForConditionalGeneration, T5Model

from hf_lowrank.checkpoints.dense import load_dense
from hf_lowrank.checkpoints.rank_table import ComponentName, LayerName
from hf_lowrank.compression import sensitivity
from hf_lowrank.compression.calibration import Calibration, calibrate
from hf_lowrank.compression.layers import Layer
from hf_lowrank.compression.sensitivity import inserted, measured_losses, reweighted

Batch = dict[str, torch.Tensor]


def token_batches(model: PreTrainedModel) -> list[Batch]:
    batches = []
    for rows, length in ((6, 9), (4, 13)):
        mask = torch.arange(length).flip(0) < torch.randint(2, length + 1, (rows, 1))
        batch = {"input_ids": torch.randint(2, 64, (rows, length)) * mask, "attention_mask": mask.long()}
        if model.config.is_encoder_decoder:
            known = torch.arange(5) < torch.randint(2, 6, (rows, 1))
            batch["labels"] = torch.where(known, torch.randint(2, 64, (rows, 5)), -100)
        batches.append(batch)
    return batches


def few(calibration: Calibration) -> list[Batch]:
    """The first series of every batch."""
    return [{name: tensor[:6] for name, tensor in batch.items()} for batch in calibration.batches]


def last_of_each_kind(layers: list[Layer]) -> list[Any]:
    return list({layer.name.kind: layer for layer in layers}.values())


@torch.no_grad()
def states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits or last hidden states where they count."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"].bool()
    if "labels" in batch:
        inputs["decoder_input_ids"] = decoder_input(batch["labels"])
        mask = batch["labels"] != -100
    return model(**inputs)[0][mask]


def distance(wanted: torch.Tensor, found: torch.Tensor, model: PreTrainedModel) -> float:
    """A token's KL divergence, or half the squared distance of hidden states."""
    if not hasattr(model, "lm_head"):
        return float((wanted - found).double().square().sum(-1).mean()) / 2
    p, q = (torch.distributions.Categorical(logits=logits.double()) for logits in (wanted, found))
    return float(torch.distributions.kl_divergence(p, q).mean())


MODELS: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "plain": (T5ForConditionalGeneration, {}),
    "one head": (T5ForConditionalGeneration, {"num_heads": 1, "num_layers": 1, "num_decoder_layers": 1}),
    "gated, without a head": (T5Model, {"feed_forward_proj": "gated-gelu", "num_heads": 3}),
    "encoder": (T5EncoderModel, {}),
}
models = pytest.mark.parametrize(("model_class", "changes"), MODELS.values(), ids=MODELS)


def components(layers: list[Layer]) -> Iterator[tuple[Any, str, int]]:
    """(layer, part, full rank) of all."""
    for layer in layers:
        for part, point in layer.points().items():
            yield layer, part, point.basis.left.shape[1]


@models
def test_inserted_is_truncated(dense_t5, model_class, changes):
    model = dense_t5(model_class, **changes)
    batches = token_batches(model)
    dense = load_dense(model)
    layers = last_of_each_kind(layers_of(dense, calibrate(model, batches)))
    probed = dense.float_model()
    original = states(probed, batches[0])
    scale = float(original.abs().max())
    seen = set()
    for layer, part, full in components(layers):
        # Every rank of the heads and every third of the others in the smallest model, the bounds and the middle else.
        for rank in range(1, full + 1, 1 if full == 8 else 3) if model.config.num_heads == 1 else (1, full // 2, full):
            with inserted(probed, layer.points()[part].projection(rank)), torch.no_grad():
                found = states(probed, batches[0])
            wanted = states(truncated(dense, layer, only(layer, part, rank)), batches[0])
            assert_close(
                found, wanted, rtol=0, atol=2e-5 * scale, msg=lambda m, n=(layer.name, part, rank): f"{n}: {m}"
            )
            if rank == full:
                assert_close(found, original, rtol=0, atol=1e-6 * scale)
            elif (found - original).abs().max() > 1e-3 * scale:
                seen.add((layer.name, part))
    assert seen == {(layer.name, part) for layer, part, _ in components(layers)}  # each of them changes something


def test_nothing_is_left_behind(chronos_t5, chronos_calibration):
    dense = load_dense(chronos_t5)
    probed, batch = dense.float_model(), {name: rows[:4] for name, rows in chronos_calibration.batches[0].items()}
    original = states(probed, batch)
    for layer, part, _ in components(layers_of(dense, chronos_calibration)):
        with inserted(probed, layer.points()[part].projection(1)):
            assert any(module._forward_hooks or module._forward_pre_hooks for module in probed.modules())
        with pytest.raises(ZeroDivisionError), inserted(probed, layer.points()[part].projection(1)):  # noqa: PT012
            states(probed, batch)
            raise ZeroDivisionError
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in probed.modules())
    assert torch.equal(states(probed, batch), original)


@models
@pytest.mark.parametrize("form", FORMS)
def test_measured_losses_are_those_of_the_truncated_models(dense_t5, model_class, changes, form):
    model = dense_t5(model_class, **changes)
    batches = token_batches(model)
    dense = load_dense(model)
    layers = last_of_each_kind(layers_of(dense, calibrate(model, batches), (form,)))
    table = {
        layer.name: ranks_of(
            {"width": 24, "wi": 3, "wo": 5}
            if layer.name.is_feed_forward
            else {"qk": 2, "vo": 3}
            if form == "per_head"
            else {"latent": 4, "query": 2, "output": 5}
        )
        for layer in layers
    }
    found = measured_losses(dense, dense.float_model(), layers, table, batches, predictions(layers))
    assert found.keys() == {name for layer in layers for name in layer.components(weight=None)}
    original = torch.cat([states(model, batch) for batch in batches])
    for layer in layers:
        for name, rank in layer.component_ranks(table[layer.name]).items():
            changed = truncated(dense, layer, only(layer, name.part, rank))
            wanted = distance(original, torch.cat([states(changed, batch) for batch in batches]), model)
            assert found[name] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
            assert wanted > 0


def test_nothing_is_lost_at_full_rank(chronos_t5, chronos_calibration):
    dense = load_dense(chronos_t5)
    for form, entry in (("per_head", {"qk": 8, "vo": 8}), ("latent", {"latent": 16, "query": None, "output": None})):
        layers = layers_of(dense, chronos_calibration, (form,))
        whole = ranks_of(entry)
        table = {layer.name: layer.dense_ranks if layer.name.is_feed_forward else whole for layer in layers}
        losses = measured_losses(
            dense, dense.float_model(), layers, table, few(chronos_calibration), predictions(layers)
        )
        assert not any(losses.values())
        # One component less than whole: that one is measured, and nothing else.
        part = "qk" if form == "per_head" else "query"
        table[LayerName("cross", 1)] = ranks_of({**entry, part: 2})
        losses = measured_losses(
            dense, dense.float_model(), layers, table, few(chronos_calibration), predictions(layers)
        )
        assert [str(name) for name, loss in losses.items() if loss] == [f"cross.1.{part}"]


def test_lower_ranks_lose_more(chronos_t5, chronos_calibration):
    dense = load_dense(chronos_t5)
    layers = layers_of(dense, chronos_calibration, ("per_head",))
    attention = [layer for layer in layers if not layer.name.is_feed_forward]
    lost = []
    for rank in (1, 4, 7):
        table = {layer.name: ranks_of({"qk": rank, "vo": rank}) for layer in attention}
        lost.append(
            measured_losses(
                dense, dense.float_model(), attention, table, few(chronos_calibration), predictions(attention)
            )
        )
        assert all(loss > 0 for loss in lost[-1].values())
    assert sum(lost[0].values()) > 2 * sum(lost[1].values()) > 4 * sum(lost[2].values())


def test_many_components_are_measured_on_fewer_tokens(monkeypatch, chronos_t5, chronos_calibration):
    dense = load_dense(chronos_t5)
    layers = last_of_each_kind(layers_of(dense, chronos_calibration, ("per_head",)))
    table = {layer.name: only(layer, "wi" if layer.name.is_feed_forward else "qk", 2) for layer in layers}

    def measure() -> tuple[int, dict[str, float]]:
        model = dense.float_model()
        tokens = 0

        def count(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            nonlocal tokens
            tokens += inputs[0].numel()

        handle = model.decoder.embed_tokens.register_forward_pre_hook(count)
        losses = measured_losses(dense, model, layers, table, chronos_calibration.batches, predictions(layers))
        handle.remove()
        return tokens, losses

    tokens, losses = measure()
    monkeypatch.setattr(sensitivity, "PROBE_ARITHMETIC", 0)
    monkeypatch.setattr(sensitivity, "TOKENS", (100, 200))
    fewer, estimates = measure()
    assert fewer < tokens / 10
    assert estimates.keys() == losses.keys()
    assert all(np.isfinite(loss) and loss > 0 for loss in estimates.values())


# --- reweighted --------------------------------------------------------------------------------------------------


def test_reweighted_losses_are_the_measured_ones(chronos_t5, chronos_calibration):
    dense = load_dense(chronos_t5)
    layers = layers_of(dense, chronos_calibration, ("per_head",))
    predicted = {name: found for layer in layers for name, found in layer.components(weight=None).items()}
    table = {
        layer.name: only(layer, "wo", 6) if layer.name.is_feed_forward else ranks_of({"qk": 3, "vo": 4})
        for layer in layers
    }
    ranks = {name: r for layer in layers for name, r in layer.component_ranks(table[layer.name]).items()}
    measured = measured_losses(
        dense, dense.float_model(), layers, table, few(chronos_calibration), predictions(layers)
    )
    assert measured.keys() == {name for name in predicted if name.part != "wi"}
    found = reweighted(predicted, ranks, measured)
    assert found.keys() == predicted.keys()
    for name, loss in measured.items():
        assert found[name].loss[ranks[name]] == pytest.approx(loss, rel=1e-9)
    corrections = [loss / predicted[name].loss[ranks[name]] for name, loss in measured.items()]
    assert max(corrections) > 1.01 * min(corrections)
    factors = {name: found[name].weight / predicted[name].weight for name in predicted}
    for name, component in found.items():  # the spectrum is the same
        np.testing.assert_allclose(component.loss, factors[name] * predicted[name].loss, rtol=1e-9)
    # No matrix wi was measured: they count as all components do in the middle.
    median = np.median([factors[name] for name in measured])
    assert all(factors[name] == pytest.approx(median) for name in predicted if name.part == "wi")
    # One layer's query was not measured: it counts as the other queries do.
    query = ComponentName(LayerName("cross", 0), "qk")
    left_out = {name: loss for name, loss in measured.items() if name != query}
    again = reweighted(predicted, ranks, left_out)
    median = np.median([factors[name] for name in left_out if name.part == "qk"])
    assert again[query].weight == pytest.approx(median * predicted[query].weight)
    assert all(again[name].weight == pytest.approx(found[name].weight) for name in left_out)
    # Nothing was measured: nothing changes.
    same = reweighted(predicted, ranks, {})
    assert all(same[name].weight == component.weight for name, component in predicted.items())
