"""Models with matrices of integers: what they compute, and that they load, move, and become ordinary ones again."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from chronos import BaseChronosPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from hf_lowrank import (
    LowRankChronos2Model,
    LowRankT5EncoderModel,
    LowRankT5Model,
    calibrate,
    compress_pretrained,
    load_pipeline,
)
from hf_lowrank.checkpoints.pipelines import as_pipeline, predict_quantiles
from hf_lowrank.compression import rounding
from hf_lowrank.compression.rounding import rounded
from hf_lowrank.models.modeling_lowrank_quantized import QuantizedLinear, packed, quantized_modules, unpacked


@pytest.fixture(scope="module")
def made() -> dict:
    """What `quantized` has made already."""
    return {}


@pytest.fixture(params=["int8", "int4"])
def quantized(request, dense, made, monkeypatch):
    monkeypatch.setattr(rounding, "TOLERANCE", 1.0)
    if (key := (request.param, type(dense))) not in made:
        measured = calibrate(dense, num_batches=1)
        made[key] = compress_pretrained(dense, total_ratio=0.6, calibration=measured, quantize=request.param)
    return copy.deepcopy(made[key])


def module_of(weight: torch.Tensor, bits: int, bias: bool = False) -> QuantizedLinear:
    module = QuantizedLinear(weight.shape[1], weight.shape[0], bits=bits, bias=bias)
    for name, tensor in rounded(weight, None, bits=bits).items():
        getattr(module, name).copy_(tensor)
    return module


def forecast(model) -> torch.Tensor:
    torch.manual_seed(0)
    series = [5 + size * torch.sin(torch.arange(40.0) / 3) for size in (1.0, 3.0)]
    quantiles, _ = predict_quantiles(as_pipeline(model), series, 5, [0.1, 0.5, 0.9])
    return torch.from_numpy(quantiles)


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_what_is_packed_is_unpacked(rows, size, seed):
    codes = torch.randint(-8, 8, (rows, size), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    stored = packed(codes)
    assert stored.dtype == torch.uint8
    assert stored.shape == (rows, (size + 1) // 2)
    assert torch.equal(unpacked(stored, size), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_of_integers_multiplies_with_the_numbers_that_they_stand_for(bits, bias):
    module = module_of(torch.randn(7, 45), bits, bias)
    if bias:
        module.bias.data.normal_()
    states = torch.randn(3, 45)
    assert torch.equal(module(states), nn.functional.linear(states, module.weight, module.bias))
    assert module.weight is module._kept  # made once
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert module._kept is None


def test_the_kept_matrix_follows_what_is_loaded(tmp_path):
    first, second = module_of(torch.randn(4, 6), 8), module_of(torch.randn(4, 6), 8)
    states = torch.randn(2, 6)
    wanted = second(states)
    first(states)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(states), wanted)
    assert pickle.loads(pickle.dumps(first))._kept is None
    assert torch.equal(copy.deepcopy(first)(states), wanted)


def test_a_quantized_model_is_saved_and_loaded_to_the_bit(quantized, tmp_path):
    wanted = forecast(quantized)
    quantized.save_pretrained(tmp_path)
    loaded = type(quantized).from_pretrained(tmp_path)
    assert loaded.config.weight_bits == quantized.config.weight_bits
    assert torch.equal(forecast(loaded), wanted)
    auto = AutoModelForSeq2SeqLM if hasattr(quantized, "lm_head") else AutoModel
    assert torch.equal(forecast(auto.from_pretrained(tmp_path, device_map="cpu")), wanted)
    assert torch.equal(forecast(load_pipeline(tmp_path).inner_model), wanted)
    assert torch.equal(forecast(BaseChronosPipeline.from_pretrained(tmp_path).inner_model), wanted)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors",):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        integers = [name for name in file.keys() if file.get_slice(name).get_dtype() in ("I8", "U8")]  # noqa: SIM118
    assert len([name for name in integers if name.endswith(".codes")]) == len(quantized.config.weight_bits)


def test_an_ordinary_model_again(quantized, tmp_path):
    wanted, count = forecast(quantized), quantized.num_parameters()
    with pytest.raises(ValueError, match=r"are integers, which are not trained; call model.dequantize\(\) first"):
        quantized.train()
    with pytest.raises(ValueError, match="are not trained"):
        Trainer(quantized, TrainingArguments(tmp_path, report_to=[]), train_dataset=[{}]).train()
    assert quantized.dequantize() is quantized
    assert not quantized_modules(quantized)
    assert quantized.config.weight_bits is None
    assert quantized.num_parameters() == count == sum(one.numel() for one in quantized.parameters())
    assert_close(forecast(quantized), wanted, rtol=1e-5, atol=1e-5)
    assert quantized.train().training
    quantized.eval().save_pretrained(tmp_path / "float")
    assert_close(forecast(type(quantized).from_pretrained(tmp_path / "float")), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(quantized, dtype, tmp_path):
    quantized.save_pretrained(tmp_path)
    loaded = type(quantized).from_pretrained(tmp_path, dtype=dtype)
    for name, module in quantized_modules(loaded).items():
        exact = quantized.get_submodule(name)
        assert torch.equal(module.codes, exact.codes)
        is_kept = ".wo" in f".{name}" and dtype == torch.float16 and not isinstance(loaded, LowRankChronos2Model)
        assert module.scales.dtype == (torch.float32 if is_kept else dtype)
        assert_close(module.weight.float(), exact.weight, rtol=0.02, atol=1e-3)
    assert torch.isfinite(forecast(loaded)).all()


def test_an_encoder_alone_has_its_own_matrices_of_integers(tiny_config, mixed_ranks):
    names = {
        "encoder.block.0.layer.0.SelfAttention.q": 8,
        "decoder.block.1.layer.1.EncDecAttention.o": 4,
        "lm_head": 8,
    }
    config = tiny_config(tie_word_embeddings=False, weight_bits=names, **mixed_ranks)
    encoder = LowRankT5EncoderModel(config)
    assert set(quantized_modules(encoder)) == {"encoder.block.0.layer.0.SelfAttention.q"}


@pytest.mark.parametrize(
    ("weight_bits", "message"),
    [
        ([8], r"weight_bits must be a table or null, found \[8\]"),
        ({"a": 3}, r"weight_bits\['a'\] must be 4 or 8, found 3"),
        ({"a": True}, r"weight_bits\['a'\] must be 4 or 8, found True"),
    ],
)
def test_a_wrong_table_of_bits_is_refused(tiny_config, weight_bits, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(weight_bits=weight_bits)


@pytest.mark.parametrize("name", ["encoder.block.9.layer.0.SelfAttention.q", "encoder.block.0", "shared", ""])
def test_bits_of_what_is_no_matrix_are_refused(tiny_config, name):
    with pytest.raises(ValueError, match=r"weight_bits names .* which is no matrix of LowRankT5Model"):
        LowRankT5Model(tiny_config(weight_bits={name: 8}))


def test_a_missing_scale_is_an_error(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith(".scales"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks the weights {name}"):
        type(quantized).from_pretrained(tmp_path)


ELSEWHERE = """
import sys
sys.modules["hf_lowrank"] = None  # an import of it fails
import torch
from chronos import BaseChronosPipeline
pipeline = BaseChronosPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(pipeline.predict(torch.load(sys.argv[2]), prediction_length=5), sys.argv[3])
"""


def test_integers_need_no_hf_lowrank(bolt, tmp_path):
    model = compress_pretrained(
        bolt, total_ratio=0.6, calibration=calibrate(bolt, num_batches=1), quantize="int4", seed=1
    )
    model.save_pretrained(tmp_path / "model")
    context = 5 + torch.sin(torch.arange(40.0) / 3)[None]
    torch.save(context, tmp_path / "context.pt")
    files = [str(tmp_path / name) for name in ("model", "context.pt", "found.pt")]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, *files]
    result = subprocess.run(command, env=os.environ | home, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wanted = as_pipeline(model).predict(context, prediction_length=5)
    assert_close(torch.load(files[2]), wanted, rtol=1e-4, atol=1e-4)
