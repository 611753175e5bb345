"""The one loader: whatever is wrong with a checkpoint is said by name, in every family, dense or low-rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, T5EncoderModel

from hf_lowrank import compress_pretrained, load_pipeline
from hf_lowrank.checkpoints.families import FAMILIES
from hf_lowrank.checkpoints.loading import load_model
from hf_lowrank.checkpoints.pipelines import CHRONOS_CLASSES, CHRONOS_WANTED
from hf_lowrank.models.weight_files import stored_tensors

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

KINDS = [f"{form} {family}" for form in ("dense", "low-rank") for family in ("chronos_t5", "bolt", "chronos2")]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    form, name = request.param.split(" ")
    dense = request.getfixturevalue(name)
    return dense if form == "dense" else compress_pretrained(dense, uniform=4, calibration=None)


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def mutate(folder: Path, change) -> None:
    """Write the folder's weights once more, as `change` leaves them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def load(folder: Path):
    return load_pipeline(folder, device="cpu", dtype="float32")


def test_what_was_saved_is_loaded(folder, model):
    loaded = load_model(folder, [type(model)], "itself")
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert load(folder).inner_model.state_dict().keys() == model.state_dict().keys()
    stored = stored_tensors(str(folder))
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()
    }


def test_every_missing_weight_is_named(folder):
    """All of them, one at a time, also those that chronos hides from transformers' own report."""
    whole = load_file(folder / "model.safetensors")
    for name in whole:
        save_file(
            {n: t for n, t in whole.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        with pytest.raises(ValueError, match=r"model: .* lacks the weights .*") as caught:
            load(folder)
        assert name in str(caught.value) or "shared" in name


def test_a_weight_too_many_is_named(folder):
    name = "encoder.block.0.layer.7.SelfAttention.q.weight"
    mutate(folder, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    with pytest.raises(ValueError, match=rf"knows nothing of: {name} \(1 in all\)"):
        load(folder)


@pytest.mark.parametrize("depth", [1, 9, 10**12])
def test_fewer_or_more_layers_than_the_configuration_says(model, folder, depth):
    config = json.loads((folder / "config.json").read_text())
    config["num_layers"] = depth
    (folder / "config.json").write_text(json.dumps(config))
    wanted = rf"num_layers is {depth} in config\.json, and the weights have \d of these layers"
    if depth > 10_000:
        wanted = r"num_layers must be an integer in \[1, 10000\], found 1000000000000"
    elif model.config.model_type.startswith("lowrank"):  # whose tables say it too
        wanted = r"attention_ranks\['\w+'\] must be a list of"
    with pytest.raises(ValueError, match=wanted):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_named(folder, value):
    def change(tensors):
        name = next(name for name in sorted(tensors, reverse=True) if tensors[name].is_floating_point())
        tensors[name].view(-1)[-1] = value
        names.append(name)

    names: list[str] = []
    mutate(folder, change)
    with pytest.raises(
        ValueError, match=rf"the weight {names[0]} of .* holds NaN or infinite values".replace(".", r"\.", 0)
    ):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_other_kinds_of_numbers_are_named(folder, dtype):
    name = "encoder.final_layer_norm.weight"
    mutate(folder, lambda tensors: tensors.update({name: torch.ones_like(tensors[name]).to(dtype)}))
    with pytest.raises(ValueError, match=rf"the weight {name} must hold floating-point numbers, found"):
        load(folder)


def test_another_shape_is_named(folder):
    name = "encoder.final_layer_norm.weight"
    mutate(folder, lambda tensors: tensors.update({name: torch.ones(15)}))
    with pytest.raises(ValueError, match=rf"the weight {name} must have shape \[16\], found \[15\]"):
        load(folder)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "header truncated": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("404: Not Found"),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_said_to_be(folder, damage):
    DAMAGE[damage](folder / "model.safetensors")
    wanted = "is a Git LFS pointer" if damage == "pointer" else "a file is missing, truncated or damaged"
    with pytest.raises(OSError, match=wanted):
        load(folder)


def test_a_checkpoint_in_several_files(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load(tmp_path)
    assert stored_tensors(str(tmp_path)).keys() <= model.state_dict().keys()
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(OSError, match="a file is missing, truncated or damaged"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OSError, match="is no index of weight files"):
        load(tmp_path)


def test_weights_of_before_safetensors(chronos_t5, tmp_path):
    chronos_t5.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(chronos_t5.state_dict(), tmp_path / "pytorch_model.bin")
    load(tmp_path)
    # As torch wrote it before 1.6.
    torch.save(chronos_t5.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:300])
    with pytest.raises(OSError, match="a file is missing, truncated or damaged"):
        load(tmp_path)


def test_what_does_not_forecast_is_no_pipeline(dense_t5, chronos_t5, tmp_path):
    dense_t5(T5EncoderModel).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="is a T5EncoderModel; it must be a Chronos checkpoint"):
        load(tmp_path / "encoder")
    dense_t5(num_layers=3, num_decoder_layers=2).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="has no chronos_config"):
        load(tmp_path / "text")
    assert {cls for family in FAMILIES for cls in family.classes} - set(CHRONOS_CLASSES)


@given(content=st.binary(max_size=200))
def test_no_bytes_in_the_place_of_weights_are_loaded(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        stored_tensors(str(folder))


def test_a_configuration_with_code_of_its_own_never_runs_it(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "code.Evil"}, "architectures": ["Evil"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="model: "):
        load_model(tmp_path, CHRONOS_CLASSES, CHRONOS_WANTED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "foo"}, "dtype must be one of auto, float32"),
        ({"dtype": torch.float64}, "dtype must be one of auto, float32, bfloat16, float16, found 'torch.float64'"),
        ({"device": "meta"}, "device must be one that computes, such as 'cpu' or 'cuda', found 'meta'"),
        ({"device": "nonsense"}, "device must be such as 'cpu' or 'cuda', found 'nonsense'"),
        pytest.param(
            {"device": "cuda"},
            "device must be one that this machine has, found 'cuda': ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_other_arguments_are_not_blamed_on_the_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline("reference", **arguments)
