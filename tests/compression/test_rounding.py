"""Rounding to integers: near where numbers are, nearer where it matters, and as few bits as the measured loss allows."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_lowrank import calibrate, compress_pretrained
from hf_lowrank.compression import rounding
from hf_lowrank.compression.rounding import rounded
from hf_lowrank.models.modeling_lowrank_quantized import dequantized, quantized_modules

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 100))


def error(weight: torch.Tensor, gram: torch.Tensor | None, size: torch.Tensor | None, bits: int) -> float:
    """Of the product with inputs of Gram matrix `size`."""
    lost = weight - dequantized(rounded(weight, gram, bits=bits), weight.shape[1])
    return float((lost @ size * lost).sum()) if size is not None else float(lost.square().sum())


@given(SIZES, st.sampled_from([4, 8]), st.floats(-20, 20), st.integers(0, 2**31))
def test_a_number_is_at_most_half_a_step_from_what_it_is_rounded_to(size, bits, scale, seed):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    found = dequantized(rounded(weight, None, bits=bits), size[1])
    # Of 4 bits a group's largest number may be cut for the sake of the others, by up to 0.35 of it.
    step = weight.abs().amax(dim=1, keepdim=True) * (1 / 127 if bits == 8 else 0.7)
    assert ((found - weight).abs() <= step / 2 * (1 + 1e-4)).all()


@given(SIZES, st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_what_is_rounded_stays_what_it_is_when_it_is_rounded_again(size, bits, seed):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    once = dequantized(rounded(weight, None, bits=bits), size[1])
    assert_close(dequantized(rounded(once, None, bits=bits), size[1]), once, rtol=1e-5, atol=0) if bits == 8 else None


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 1e30])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_row_is_kept(value, bits):
    weight = torch.full((2, 40), value)
    assert_close(dequantized(rounded(weight, torch.eye(40), bits=bits), 40), weight, rtol=1e-2, atol=1e-37)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_go_together_make_up_for_each_others_rounding(bits):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 12, generator=generator)
    gram = mixing @ mixing.T + 0.01 * torch.eye(96)
    weight = torch.randn(32, 96, generator=generator)
    assert error(weight, gram, gram, bits) < 0.35 * error(weight, None, gram, bits)


def test_more_bits_are_more_exact():
    weight, gram = torch.randn(16, 64), torch.eye(64)
    assert error(weight, gram, None, 8) < 0.02 * error(weight, gram, None, 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_that_is_too_small_for_float16_becomes_zero(bits):
    weight = torch.stack([torch.full((40,), 1e-12), torch.ones(40)])
    found = dequantized(rounded(weight, torch.eye(40), bits=bits, dtype=torch.float16), 40)
    assert_close(found, torch.stack([torch.zeros(40), torch.ones(40)]).half(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_have_the_dtype_that_is_asked_for_and_numbers_are_rounded_to_their_multiples(dtype):
    weight = torch.randn(8, 33)
    stored = rounded(weight, None, bits=8, dtype=dtype)
    assert stored["scales"].dtype == dtype
    exact = stored["codes"].float() * stored["scales"].float()[:, None] / 127
    assert ((exact - weight).abs() <= 0.51 * stored["scales"].float()[:, None] / 127 + weight.abs() / 100).all()


# --- whole models ------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(dense):
    return calibrate(dense, num_batches=2)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_model_is_near_the_one_of_the_same_ranks(dense, measured, quantize):
    before = copy.deepcopy(dense.state_dict())
    arguments = {"total_ratio": 0.6, "calibration": measured}
    small = compress_pretrained(dense, **arguments)
    quantized = compress_pretrained(dense, quantize=quantize, **arguments)
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, before[name])  # what was given is as it was
    assert quantized.config.attention_ranks == small.config.attention_ranks
    assert quantized.num_parameters() == small.num_parameters()
    bits = quantized.config.weight_bits
    assert set(bits.values()) <= set(rounding.BITS[quantize])
    assert set(bits) == set(quantized_modules(quantized))
    record = quantized.config.compression["quantize"]
    assert record["to"] == quantize
    assert 0 < record["predicted_loss"] <= rounding.TOLERANCE
    assert small.config.weight_bits is None
    assert "quantize" not in small.config.compression


def test_int8_of_everything_changes_the_loss_by_as_much_as_is_said(dense, measured, monkeypatch):
    """All matrices rounded, each measured alone: together they cost about the sum."""
    monkeypatch.setattr(rounding, "TOLERANCE", 1e9)
    quantized = compress_pretrained(dense, total_ratio=1, calibration=measured, quantize="int8")
    whole = compress_pretrained(dense, total_ratio=1, calibration=measured)
    objective = rounding.objective_of(dense.config, type(dense))
    with torch.no_grad():
        pairs = [(objective.predict(whole, one), objective.predict(quantized, one)) for one in measured.batches]
    lost = sum(objective.divergence(*pair) for pair in pairs) / sum(len(pair[0]) for pair in pairs)
    assert 0 < lost < 4 * quantized.config.compression["quantize"]["predicted_loss"]
    free = [name for name, module in whole.named_modules() if type(module) is torch.nn.Linear]
    tied = {name.removesuffix(".weight") for pair in whole.all_tied_weights_keys.items() for name in pair}
    assert set(quantized.config.weight_bits) == set(free) - tied


def test_what_costs_too_much_stays_as_it_is(bolt, monkeypatch):
    measured = calibrate(bolt, num_batches=2)
    monkeypatch.setattr(rounding, "TOLERANCE", 1e-15)
    quantized = compress_pretrained(bolt, total_ratio=0.6, calibration=measured, quantize="int8")
    monkeypatch.setattr(rounding, "TOLERANCE", 1e9)
    everything = compress_pretrained(bolt, total_ratio=0.6, calibration=measured, quantize="int8")
    # The decoder has one token: what its queries are costs nothing.
    idle = {
        name
        for name in everything.config.weight_bits
        if re.match(r"decoder.*\.SelfAttention\.(q|k|query_sketch)$", name)
    }
    assert set(quantized.config.weight_bits) <= idle < set(everything.config.weight_bits)


def test_of_four_bits_some_have_eight(bolt, monkeypatch):
    measured = calibrate(bolt, num_batches=2)
    found = {}
    for tolerance in (1e-6, 1e9):
        monkeypatch.setattr(rounding, "TOLERANCE", tolerance)
        found[tolerance] = compress_pretrained(
            bolt, total_ratio=0.6, calibration=measured, quantize="int4"
        ).config.weight_bits
    assert list(found[1e-6].values()).count(4) < list(found[1e9].values()).count(4)
    outside = {name for name in found[1e9] if "patch_embedding" in name}
    assert outside
    assert all(bits == (8 if name in outside else 4) for name, bits in found[1e9].items())


def test_the_refit_makes_up_for_the_rounding(bolt):
    """A model of 4 bits is nearer to the dense one than the model of the same ranks whose matrices are rounded afterwards."""
    measured = calibrate(bolt, num_batches=4)
    quantized = compress_pretrained(bolt, total_ratio=0.6, calibration=measured, quantize="int4")
    small = compress_pretrained(bolt, total_ratio=0.6, calibration=measured)
    for name, bits in quantized.config.weight_bits.items():
        module = small.get_submodule(name)
        stored = rounded(module.weight, None, bits=bits)
        module.weight.data.copy_(dequantized(stored, module.in_features))
    objective = rounding.objective_of(bolt.config, type(bolt))
    dense = compress_pretrained(bolt, total_ratio=1, calibration=None)
    with torch.no_grad():
        wanted = [objective.predict(dense, one) for one in measured.batches]
        losses = [
            sum(objective.divergence(w, objective.predict(model, one)) for w, one in zip(wanted, measured.batches))
            for model in (quantized, small)
        ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "int2"}, "quantize must be None, 'int8' or 'int4', found 'int2'"),
        ({"quantize": 8}, "quantize must be None, 'int8' or 'int4', found 8"),
        ({"quantize": "int8", "calibration": None}, "quantize needs a calibration and the refit"),
        ({"quantize": "int8", "refit": False}, "quantize needs a calibration and the refit"),
        ({"quantize": "int8", "method": "paper", "calibration": None}, "the paper's method rounds nothing"),
    ],
)
def test_what_cannot_be_is_refused(bolt, arguments, message):
    rule = {"ratio": 0.5} if "method" in arguments else {"total_ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        compress_pretrained(bolt, **rule, **arguments)


def test_a_text_t5_without_data_is_refused(dense_t5):
    with (
        pytest.warns(UserWarning, match="no Chronos checkpoint"),
        pytest.raises(ValueError, match="quantize needs a calibration"),
    ):
        compress_pretrained(dense_t5(), total_ratio=0.5, quantize="int8")
