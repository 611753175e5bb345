"""transformers' own `from_pretrained` of the low-rank classes: what it would warn of is an error that names the weight."""

from __future__ import annotations

import chronos_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from hf_lowrank import LowRankChronos2Model, LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model

FAMILIES = ("t5", "bolt", "chronos2")
NORM = "encoder.final_layer_norm.weight"
PAIRS = "encoder.block.0.layer.0.self_attention.pairs"


@pytest.fixture
def make(tiny_config, mixed_ranks):
    def model(family: str) -> PreTrainedModel:
        if family == "t5":
            return chronos_models.alive(LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks)))
        ranks = {"bolt": chronos_models.BOLT_RANKS, "chronos2": chronos_models.CHRONOS2_RANKS}[family]
        return getattr(chronos_models, family)(**ranks)

    return model


def load(folder, family: str, **arguments):
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModel
    return auto.from_pretrained(folder, **arguments)


def write(folder, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_wrong_with_a_weight_is_an_error_that_names_it(make, tmp_path, family):
    make(family).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    norm = whole[NORM]
    last = next(name for name in whole if name.endswith("output_layer.bias") or name == "shared.weight")
    for changes, wanted in (
        ({NORM: None}, rf"lacks the weights {NORM} \(1 in all\)"),
        ({last: None}, rf"lacks the weights {last if family != 't5' else '.*'}"),
        ({"extra": torch.ones(2)}, r"has weights that its config\.json knows nothing of: extra"),
        ({NORM: torch.ones(15)}, rf"the weight {NORM} must have shape \[16\], found \[15\]"),
        ({NORM: norm.to(torch.int64)}, rf"the weight {NORM} must hold floating-point numbers, found I64"),
        ({NORM: norm.to(torch.float8_e4m3fn)}, rf"the weight {NORM} must hold floating-point numbers, found F8_E4M3"),
        ({NORM: norm * torch.nan}, rf"the weight {NORM} of .* holds NaN or infinite values"),
        ({NORM: norm * 1e30}, rf"the weight {NORM} of .* holds a value of size .*e\+30"),
    ):
        write(tmp_path, **changes)
        with pytest.raises(ValueError, match=wanted) as caught:
            load(tmp_path, family)
        assert str(tmp_path) in str(caught.value)
        save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(OSError, match="a file is missing, truncated or damaged"):
        load(tmp_path, family)


def test_arguments_mean_what_they_mean_to_transformers(make, tmp_path):
    model = make("t5")
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, "t5", output_loading_info=True, revision="main")
    assert type(loaded) is type(model)
    assert not info["missing_keys"]
    write(tmp_path, **{NORM: torch.ones(15)})
    drawn, info = load(tmp_path, "t5", output_loading_info=True, ignore_mismatched_sizes=True)
    assert [name for name, *_ in info["mismatched_keys"]] == [NORM]
    assert torch.equal(drawn.encoder.final_layer_norm.weight, torch.ones(16))
    arguments = {"config": model.config, "state_dict": model.state_dict()}
    state = LowRankT5ForConditionalGeneration.from_pretrained(None, **arguments).state_dict()
    fresh = LowRankT5ForConditionalGeneration.from_pretrained(None, **arguments | {"state_dict": {}})
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_class_that_has_less_takes_its_part(make, tmp_path):
    model = make("t5")
    model.save_pretrained(tmp_path)
    for smaller in (LowRankT5Model, LowRankT5EncoderModel):
        part = smaller.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in part.items())
    LowRankT5EncoderModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="lacks the weights decoder"):
        LowRankT5Model.from_pretrained(tmp_path / "encoder")


def test_a_dense_chronos2_names_no_frequencies_and_is_whole(tmp_path):
    dense = chronos_models.dense_chronos2()
    dense.save_pretrained(tmp_path)
    config = LowRankChronos2Model.config_class.from_dict(dense.config.to_dict())
    loaded = LowRankChronos2Model.from_pretrained(tmp_path, config=config).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("value", [4, -1, 2**40, None])
def test_frequencies_are_different_and_there(make, tmp_path, value):
    make("chronos2").save_pretrained(tmp_path)
    pairs = load_file(tmp_path / "model.safetensors")[PAIRS]
    pairs[1, 0] = pairs[1, 1] if value is None else value
    write(tmp_path, **{PAIRS: pairs})
    with pytest.raises(ValueError, match=r"pairs\[1\] must hold different integers in \[0, 4\), found"):
        load(tmp_path, "chronos2")


@pytest.mark.parametrize("token", [64, -1])
def test_the_first_token_is_one_of_the_vocabulary(make, tmp_path, token):
    model = make("t5")
    model.generation_config = GenerationConfig(decoder_start_token_id=token)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"decoder_start_token_id .* must be an integer in \[0, 64\), found {token}"):
        load(tmp_path, "t5")
