"""The refit of the last matrices: it brings the hidden states closer to the dense ones, and leaves alone what is dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import decoder_input
from torch.testing import assert_close
from transformers import PreTrainedModel, T5EncoderModel, T5ForConditionalGeneration, T5Model

from hf_lowrank import compress_pretrained
from hf_lowrank.checkpoints.dense import load_dense
from hf_lowrank.checkpoints.rank_table import LayerName
from hf_lowrank.compression.calibration import Calibration, calibrate
from hf_lowrank.compression.refit import refit

Batch = dict[str, torch.Tensor]
SUBLAYERS = ("SelfAttention", "EncDecAttention", "DenseReluDense")


def token_batches(model: PreTrainedModel, *, padding: int = 0, filling: int = 0) -> list[Batch]:
    """Contexts of uneven length, padded on the left, and labels that are unknown at the end."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows, length in ((12, 14), (9, 20)):
        mask = torch.arange(length).flip(0) < torch.randint(2, length + 1, (rows, 1), generator=generator)
        ids = torch.where(mask, torch.randint(2, 64, (rows, length), generator=generator), filling)
        ids = torch.cat([torch.full((rows, padding), filling), ids], dim=1)
        mask = torch.cat([torch.zeros(rows, padding, dtype=torch.bool), mask], dim=1)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if model.config.is_encoder_decoder:
            known = torch.arange(7) < torch.randint(2, 8, (rows, 1), generator=generator)
            batch["labels"] = torch.where(known, torch.randint(2, 64, (rows, 7), generator=generator), -100)
        batches.append(batch)
    return batches


def compressed(model: PreTrainedModel, calibration: Calibration, **arguments: Any) -> tuple[PreTrainedModel, ...]:
    """Without and with refit, at the same ranks."""
    plain, refitted = (
        compress_pretrained(model, calibration=calibration, refit=value, **arguments) for value in (False, True)
    )
    assert plain.config.attention_ranks == refitted.config.attention_ranks
    assert plain.config.feed_forward_ranks == refitted.config.feed_forward_ranks
    return plain, refitted


@torch.no_grad()
def run(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last hidden states, those of the encoder and those of the decoder, where they count."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    encoded = model.encoder(**inputs).last_hidden_state
    counted = encoded[batch["attention_mask"].bool()]
    if "labels" not in batch:
        return counted, None
    decoded = model.decoder(
        input_ids=decoder_input(batch["labels"]),
        encoder_hidden_states=encoded,
        encoder_attention_mask=batch["attention_mask"],
    ).last_hidden_state
    return counted, decoded[batch["labels"] != -100]


def error(found: PreTrainedModel, wanted: PreTrainedModel, batches: list[Batch]) -> float:
    """The mean squared error of the hidden states behind the last layer, in the scale of the dense ones."""
    pairs = []
    for batch in batches:
        states, expected = run(found, batch), run(wanted, batch)
        pairs.append((states[0], expected[0]) if states[1] is None else (states[1], expected[1]))
    difference, size = (torch.cat(rows) for rows in zip(*((a - b, b) for a, b in pairs)))
    return float(difference.double().square().mean() / size.double().square().mean())


POLICIES: dict[str, dict[str, Any]] = {
    "heads of 1": {"uniform": 1},
    "heads of 2": {"uniform": 2},
    "heads of 4": {"uniform": 4},
    "latent of 3": {"uniform": 3, "form": "latent"},
    "latent of 6": {"uniform": 6, "form": "latent"},
    "a budget": {"ratio": 0.25},
    "attention and feed-forward": {"total_ratio": 0.4},
    "thin feed-forward": {"uniform": 8, "feed_forward_ratio": 0.4},
}


@pytest.mark.parametrize("arguments", POLICIES.values(), ids=POLICIES)
def test_hidden_states_come_closer(chronos_t5, chronos_calibration, arguments):
    plain, refitted = compressed(chronos_t5, chronos_calibration, **arguments)
    before, after = (error(model, chronos_t5, chronos_calibration.batches) for model in (plain, refitted))
    assert before > 1e-4  # something is lost
    assert after < 0.95 * before


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, T5Model, T5EncoderModel])
def test_hidden_states_of_every_class_come_closer(dense_t5, model_class, rank):
    model = dense_t5(model_class, feed_forward_proj="gated-gelu")
    measured = calibrate(model, token_batches(model))
    plain, refitted = compressed(model, measured, uniform=rank, feed_forward_ratio=0.5)
    assert error(refitted, model, measured.batches) < 0.95 * error(plain, model, measured.batches)


# --- each layer is the least-squares solution --------------------------------------------------------------------


@torch.no_grad()
def residuals(
    found: PreTrainedModel, wanted: PreTrainedModel, batches: list[Batch]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of every layer what is wrong behind it and what its last matrix reads, (tokens, .), in whole forward passes."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []

    def watch(name: str, module: torch.nn.Module, *, reads: bool) -> None:
        def hook(_: torch.nn.Module, inputs: tuple, output: Any) -> None:
            seen.setdefault(name, []).append(
                inputs[0] if reads else output[0] if isinstance(output, tuple) else output
            )

        handles.append(module.register_forward_hook(hook))

    names = []
    for stack in ("encoder", "decoder") if found.config.is_encoder_decoder else ("encoder",):
        for i, blocks in enumerate(zip(getattr(found, stack).block, getattr(wanted, stack).block)):
            for j, sublayers in enumerate(zip(blocks[0].layer, blocks[1].layer)):
                inner = next(getattr(sublayers[0], name) for name in SUBLAYERS if hasattr(sublayers[0], name))
                names.append(name := f"{stack}.{i}.{j}")
                watch(f"{name} found", sublayers[0], reads=False)
                watch(f"{name} wanted", sublayers[1], reads=False)
                watch(f"{name} read", inner.o if hasattr(inner, "o") else inner.wo, reads=True)
    for batch in batches:
        run(found, batch)
        run(wanted, batch)
    for handle in handles:
        handle.remove()

    def counted(name: str) -> torch.Tensor:
        stack = "attention_mask" if name.startswith("encoder") else "labels"
        masks = [batch[stack].bool() if stack == "attention_mask" else batch[stack] != -100 for batch in batches]
        return torch.cat([values[mask] for values, mask in zip(seen[name], masks)]).double()

    return {name: (counted(f"{name} wanted") - counted(f"{name} found"), counted(f"{name} read")) for name in names}


def explained(wrong: torch.Tensor, read: torch.Tensor) -> float:
    """How much of what is wrong a linear function of what is read could still put right."""
    solution = torch.linalg.lstsq(read, wrong, driver="gelsd").solution
    return 1 - float((wrong - read @ solution).square().sum() / wrong.square().sum())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, T5EncoderModel])
def test_no_linear_function_does_better(dense_t5, model_class, gated):
    """Behind every truncated layer, with all layers before it as they became; padding has no say."""
    model = dense_t5(model_class, **({"feed_forward_proj": "gated-gelu"} if gated else {}))
    measured = calibrate(model, token_batches(model, padding=3))
    depths = {"encoder_self": 2} | ({"decoder_self": 3, "cross": 3} if model.config.is_encoder_decoder else {})
    entries: dict[str, dict[str, Any]] = {
        "encoder_self": {"qk": 2, "vo": 3},
        "decoder_self": {"latent": 3, "query": None, "output": None},
        "cross": {"latent": 4, "query": 3, "output": None},
    }
    ranks = {kind: [dict(entries[kind]) for _ in range(depth)] for kind, depth in depths.items()}
    plain, refitted = compressed(model, measured, ranks=ranks)
    before, after = (residuals(found, model, list(measured.batches)) for found in (plain, refitted))
    attention = [
        name for name in before if name.split(".")[2] == "0" or (name.startswith("decoder") and name[-1] == "1")
    ]
    assert len(attention) == sum(depths.values())
    for name in attention:
        assert explained(*before[name]) > 0.02, name
        assert explained(*after[name]) < 1e-3, name


def test_padding_has_no_influence(dense_t5):
    model = dense_t5()
    wanted, found = (
        compress_pretrained(model, uniform=2, calibration=calibrate(model, batches))
        for batches in (token_batches(model), token_batches(model, padding=4, filling=17))
    )
    for name, weight in wanted.state_dict().items():
        assert_close(found.state_dict()[name], weight, rtol=0, atol=1e-3 * max(1.0, float(weight.abs().max())))


# --- nothing to refit --------------------------------------------------------------------------------------------


def assert_bit_equal(found: PreTrainedModel, wanted: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], weight) for name, weight in wanted.items())


def test_a_model_with_nothing_truncated_is_left_bit_equal(chronos_t5, chronos_calibration):
    wanted = {name: weight.clone() for name, weight in chronos_t5.state_dict().items()}
    assert_bit_equal(compress_pretrained(chronos_t5, uniform=8, calibration=chronos_calibration), wanted)
    lowrank = compress_pretrained(chronos_t5, uniform=2, calibration=chronos_calibration, refit=False)
    truncated = {name: weight.clone() for name, weight in lowrank.state_dict().items()}
    refit(load_dense(chronos_t5), load_dense(chronos_t5).float_model(), lowrank, chronos_calibration, {})
    assert_bit_equal(lowrank, truncated)
    assert_bit_equal(chronos_t5, wanted)


def test_only_the_last_matrices_of_the_layers_named_change(chronos_t5, chronos_calibration):
    lowrank = compress_pretrained(
        chronos_t5, uniform=2, feed_forward_ratio=0.4, calibration=chronos_calibration, refit=False
    )
    before = {name: weight.clone() for name, weight in lowrank.state_dict().items()}
    places = {
        "encoder.block.1.layer.0.SelfAttention": LayerName("encoder_self", 1),
        "decoder.block.1.layer.1.EncDecAttention": LayerName("cross", 1),
        "decoder.block.0.layer.2.DenseReluDense": LayerName("decoder_feed_forward", 0),
    }
    dense = load_dense(chronos_t5)
    lowrank.requires_grad_(False)
    refit(dense, dense.float_model(), lowrank, chronos_calibration, places)
    changed = {name for name, weight in lowrank.state_dict().items() if not torch.equal(weight, before[name])}
    last = {name for name in before for place in places if name.startswith((f"{place}.o.", f"{place}.wo."))}
    assert changed == last
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lowrank.modules())


def test_a_layer_that_lost_nothing_is_left_as_it_is(chronos_t5, chronos_calibration):
    """At full rank a latent is the dense layer in other matrices: there is nothing to correct."""
    model = compress_pretrained(chronos_t5, uniform=16, form="latent", calibration=chronos_calibration)
    plain = compress_pretrained(chronos_t5, uniform=16, form="latent", calibration=chronos_calibration, refit=False)
    assert error(model, chronos_t5, list(chronos_calibration.batches)) < 1e-10
    for name, weight in plain.state_dict().items():
        assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-4 * float(weight.abs().max()))


def test_layers_of_zeros_stay_finite(chronos_t5):
    with torch.no_grad():
        for block in (*chronos_t5.encoder.block, *chronos_t5.decoder.block):
            block.layer[0].SelfAttention.v.weight.zero_()
    model = compress_pretrained(chronos_t5, uniform=2, calibration=calibrate(chronos_t5, num_batches=1))
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
