"""Refit: on the calibration data no layer is further from the dense one than its closed form was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel, T5EncoderModel, T5ForConditionalGeneration, T5Model

from hf_lowrank import compress_pretrained
from hf_lowrank.calibration import Calibration, calibrate, output_mask, predict, shifted
from hf_lowrank.checkpoint import load_dense
from hf_lowrank.refit import refit

CLASSES = (T5ForConditionalGeneration, T5Model, T5EncoderModel)
classes = pytest.mark.parametrize("model_class", CLASSES, ids=lambda cls: cls.__name__)


def token_batches(model_class: type[PreTrainedModel], count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Padded on both sides, with labels that do not count."""
    batches = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(2, 64, (8, 9))}
        first, last = torch.randint(0, 4, (8, 1)), torch.randint(6, 10, (8, 1))
        position = torch.arange(9)
        batch["attention_mask"] = ((position >= first) & (position < last)).long()
        if model_class is not T5EncoderModel:
            batch["labels"] = torch.randint(2, 64, (8, 6)).masked_fill(torch.rand(8, 6) < 0.2, -100)
        batches.append(batch)
    return batches


def places(model: PreTrainedModel) -> dict[str, str]:
    """The module and name of every layer."""
    dense = load_dense(model)
    return {module: name for name, module in (*dense.layers, *dense.feed_forward_layers)}


@torch.no_grad()
def hidden_states(model: PreTrainedModel, batch: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """Behind a layer, its residual connection included, where tokens count."""
    stack = module.split(".")[0]
    found: list[torch.Tensor] = []
    sublayer = model.get_submodule(module.rsplit(".", 1)[0])
    handle = sublayer.register_forward_hook(
        lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    predict(model, batch)
    handle.remove()
    mask = output_mask(batch) if stack == "decoder" else batch["attention_mask"].bool()
    return found[-1][mask].double()


def error(dense: PreTrainedModel, lowrank: PreTrainedModel, calibration: Calibration, module: str) -> float:
    """The sum of squared errors behind a layer."""
    return sum(
        float((hidden_states(dense, batch, module) - hidden_states(lowrank, batch, module)).square().sum())
        for batch in calibration.batches
    )


FORMS: dict[str, dict[str, Any]] = {
    "per head": {"qk": 3, "vo": 2},
    "values alone": {"qk": 8, "vo": 3},
    "latent": {"latent": 4, "query": None, "output": None},
    "latent with a query sketch": {"latent": 4, "query": 3, "output": None},
}


def one_layer_truncated(
    model: PreTrainedModel, calibration: Calibration, name: str, form: str, *, refit: bool
) -> PreTrainedModel:
    kind, index = name.split(".")
    depth = model.config.num_layers if kind == "encoder_self" else model.config.num_decoder_layers
    entries = [{"qk": 8, "vo": 8} for _ in range(depth)]
    entries[int(index)] = FORMS[form]
    return compress_pretrained(model, ranks={kind: entries}, calibration=calibration, refit=refit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["encoder_self.0", "encoder_self.1", "decoder_self.1", "cross.0"])
def test_one_refitted_layer_is_closer_to_the_dense_one(dense_t5, name, form):
    """By least squares it cannot be further away, and an optimum for weights alone is none for the data."""
    model = dense_t5(num_layers=2, num_decoder_layers=2)
    calibration = calibrate(model, token_batches(T5ForConditionalGeneration))
    module = dict(load_dense(model).layers)[name]
    before, after = (
        error(model, one_layer_truncated(model, calibration, name, form, refit=refit), calibration, module)
        for refit in (False, True)
    )
    assert 0 < after < before


@given(
    ranks=st.lists(st.sampled_from([*FORMS.values(), {"qk": 8, "vo": 8}, {"qk": 1, "vo": 1}]), min_size=4, max_size=4),
    model_class=st.sampled_from(CLASSES),
    projection=st.sampled_from(["relu", "gated-gelu"]),
)
@settings(max_examples=10)
def test_every_refitted_layer_is_closer_than_what_it_started_from(dense_t5, ranks, model_class, projection):
    """Layer after layer: with the layers before it refitted, its own refit moves it no further from the dense one."""
    model = dense_t5(model_class, num_layers=2, num_decoder_layers=1, feed_forward_proj=projection)
    calibration = calibrate(model, token_batches(model_class))
    table = {"encoder_self": ranks[:2], "decoder_self": ranks[2:3], "cross": ranks[3:]}
    closed_form = compress_pretrained(model, ranks=table, calibration=calibration, refit=False)
    names = dict(load_dense(model).layers)
    truncated = {
        module: name
        for name, module in names.items()
        if table[name.split(".")[0]][int(name.split(".")[1])] != {"qk": 8, "vo": 8}
    }
    order = [f"{stack}.block.{i}.layer.{j}" for stack in ("encoder", "decoder") for i in range(2) for j in range(3)]
    modules = sorted(truncated, key=lambda module: order.index(module.rsplit(".", 1)[0]))
    for i, module in enumerate(modules):
        first, until = copy.deepcopy(closed_form), copy.deepcopy(closed_form)
        refit(model, first, calibration, {m: truncated[m] for m in modules[:i]})
        refit(model, until, calibration, {m: truncated[m] for m in modules[: i + 1]})
        before, after = (error(model, lowrank, calibration, module) for lowrank in (first, until))
        assert after <= before * (1 + 1e-4) + 1e-9
        changed = {
            name for name, weight in until.state_dict().items() if not torch.equal(weight, first.state_dict()[name])
        }
        assert changed <= {f"{module}.o.weight"}
    whole = copy.deepcopy(closed_form)
    refit(model, whole, calibration, truncated)
    together = compress_pretrained(model, ranks=table, calibration=calibration)
    for name, weight in whole.state_dict().items():
        assert torch.equal(together.state_dict()[name], weight)


@classes
@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_a_refitted_feed_forward_layer_is_closer(dense_t5, model_class, projection):
    """Thin factors of the inner matrices alone: the outer one is whole and is refitted freely."""
    model = dense_t5(model_class, num_layers=1, num_decoder_layers=1, feed_forward_proj=projection)
    calibration, dense = calibrate(model, token_batches(model_class)), load_dense(model)
    thin = compress_pretrained(model, uniform=8, feed_forward_ratio=0.7, calibration=calibration, refit=False)
    fitted = compress_pretrained(model, uniform=8, feed_forward_ratio=0.7, calibration=calibration)
    tables = thin.config.feed_forward_ranks
    assert tables == fitted.config.feed_forward_ranks
    checked = 0
    for name, module in dense.feed_forward_layers:
        (entry,) = tables[name.removesuffix(".0").removesuffix("_feed_forward")]
        if name.startswith("encoder") and entry["wi"] is not None and entry["wo"] is None:
            assert error(model, fitted, calibration, module) < error(model, thin, calibration, module)
        checked += entry["wi"] is not None or entry["wo"] is not None
        assert all(torch.isfinite(weight).all() for weight in fitted.state_dict().values())
    assert checked > 0


@pytest.mark.parametrize("form", ["per_head", "latent"])
@torch.no_grad()
def test_the_forecast_is_closer_to_the_dense_models(chronos_t5, chronos_calibration, form):
    """Final hidden states of the whole model, every layer truncated, on the calibration data."""
    arguments = {"uniform": 4, "form": form, "calibration": chronos_calibration}
    errors = []
    for fitted in (False, True):
        lowrank = compress_pretrained(chronos_t5, refit=fitted, **arguments)
        total = 0.0
        for batch in chronos_calibration.batches:
            states = []
            for model in (chronos_t5, lowrank):
                output = model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    decoder_input_ids=shifted(model, batch["labels"]),
                    output_hidden_states=True,
                )
                states.append(output.decoder_hidden_states[-1][output_mask(batch)])
            total += float((states[0] - states[1]).square().sum())
        errors.append(total)
    assert errors[1] < errors[0]


# Where there is nothing to correct


@classes
def test_no_layer_truncated_changes_nothing(dense_t5, model_class):
    model = dense_t5(model_class)
    calibration = calibrate(model, token_batches(model_class))
    lowrank = compress_pretrained(model, uniform=8, calibration=None)
    before = copy.deepcopy(lowrank.state_dict())
    refit(model, lowrank, calibration, {})
    assert all(torch.equal(weight, before[name]) for name, weight in lowrank.state_dict().items())


@classes
@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_a_layer_at_full_rank_stays_as_it_is(dense_t5, model_class, projection):
    """Refitted all the same, every layer of every kind: its error is rounding, and so is the correction."""
    model = dense_t5(model_class, feed_forward_proj=projection)
    calibration = calibrate(model, token_batches(model_class))
    lowrank = compress_pretrained(model, uniform=8, calibration=None)
    before = copy.deepcopy(lowrank.state_dict())
    dense_before = copy.deepcopy(model.state_dict())
    refit(model, lowrank, calibration, places(model))
    assert all(torch.equal(weight, dense_before[name]) for name, weight in model.state_dict().items())
    for name, weight in lowrank.state_dict().items():
        assert_close(weight, before[name], rtol=0, atol=1e-4 * max(1.0, float(before[name].abs().max())))
        if not name.endswith((".o.weight", ".wo.weight")):
            assert torch.equal(weight, before[name])


def test_a_layer_of_zeros_has_nothing_to_refit(dense_t5):
    model = dense_t5(T5EncoderModel)
    with torch.no_grad():
        model.encoder.block[1].layer[0].SelfAttention.v.weight.zero_()
    calibration = calibrate(model, token_batches(T5EncoderModel))
    for form in ("per_head", "latent"):
        lowrank = compress_pretrained(model, uniform=4, form=form, calibration=calibration)
        for weight in lowrank.state_dict().values():
            assert torch.isfinite(weight).all()


@pytest.mark.parametrize("form", ["per_head", "latent"])
def test_hooks_and_modes_are_as_before(chronos_t5, chronos_calibration, form):
    dense, lowrank = (
        copy.deepcopy(chronos_t5),
        compress_pretrained(chronos_t5, uniform=4, form=form, calibration=None),
    )
    attention = {module: name for module, name in places(chronos_t5).items() if "feed_forward" not in name}
    refit(dense, lowrank, chronos_calibration, attention)
    for model in (dense, lowrank):
        assert not model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, dense.state_dict()[name]) for name, weight in chronos_t5.state_dict().items())
