"""Reading and writing: sound checkpoints only, every error with its cause, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)

from hf_lowrank import compress_pretrained, export_stock_t5, save_compressed
from hf_lowrank.checkpoints.dense import as_full_rank, load_dense
from hf_lowrank.checkpoints.loading import checkpoint_path
from hf_lowrank.compression.layers import attention_weights
from hf_lowrank.files import check_output, new_folder

# Random weights have flat spectra, and the user is told so; tests/test_compression.py tests that.
pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

QUERY = "decoder.block.2.layer.1.EncDecAttention.q.weight"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """A folder that does not exist is a Hub id to transformers: do not ask for it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path, dense_t5) -> Path:
    """The folder of a sound T5 checkpoint."""
    dense_t5().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


# Loading


@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, T5Model, T5EncoderModel])
def test_a_folder_is_loaded_as_what_it_is(tmp_path, dense_t5, model_class):
    model = dense_t5(model_class)
    model.save_pretrained(tmp_path)
    loaded = load_dense(tmp_path)
    assert loaded.model_class is model_class
    assert loaded.source == tmp_path.name  # not the path, which would be published with the model
    assert {name: tensor.shape for name, tensor in loaded.weights.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in model.state_dict().items())
    names = [str(layer) for layer, _ in loaded.layers]
    assert names[:2] == ["encoder_self.0", "encoder_self.1"]
    assert len(names) == (2 if model_class is T5EncoderModel else 2 + 3 + 3)
    for _, module in loaded.layers:
        assert attention_weights(loaded, module).query.shape == (2, 8, 16)


def test_the_first_name_of_the_class_is_known(folder):
    """google-t5/t5-small was published as a T5WithLMHeadModel."""
    reconfigure(folder, architectures=["T5WithLMHeadModel"])
    assert load_dense(folder).model_class is T5ForConditionalGeneration


def test_the_reference_checkpoint_has_a_name():
    assert Path(checkpoint_path("reference")).name == "reference"
    assert checkpoint_path("amazon/chronos-t5-small") == "amazon/chronos-t5-small"


def poison(value: float) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda weights: weights[QUERY].__setitem__((3, 5), value))


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (shutil.rmtree, OSError, "is no folder and no Hub id that can be read"),
    "empty folder": (
        lambda folder: [file.unlink() for file in folder.iterdir()],
        ValueError,
        "must be a checkpoint with the config.json of a model that transformers knows",
    ),
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        OSError,
        "is no folder and no Hub id that can be read .*not a valid JSON",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        OSError,
        "weights of .* cannot be read; a file is missing, .*there is none of model.safetensors",
    ),
    "weights cut": (
        lambda folder: cut(folder / "model.safetensors", 15000),
        OSError,
        "weights of .* cannot be read; a file is missing, truncated or damaged",
    ),
    "header cut": (
        lambda folder: cut(folder / "model.safetensors", 100),
        OSError,
        "weights of .* cannot be read; a file is missing, truncated or damaged",
    ),
    "weights empty": (
        lambda folder: cut(folder / "model.safetensors", 0),
        OSError,
        "weights of .* cannot be read; a file is missing, truncated or damaged",
    ),
    "a tensor missing": (
        lambda folder: rewrite(folder, lambda weights: weights.pop(QUERY)),
        ValueError,
        rf"lacks the weights {QUERY} \(1 in all\)",
    ),
    "no embedding": (
        lambda folder: rewrite(folder, lambda weights: weights.pop("shared.weight")),
        ValueError,
        "lacks the weights .*shared.weight",
    ),
    "wrong shape": (
        lambda folder: rewrite(folder, lambda weights: weights.update({QUERY: torch.zeros(4, 16)})),
        ValueError,
        rf"the weight {QUERY} must have shape \[16, 16\], found \[4, 16\]",
    ),
    "NaN": (poison(float("nan")), ValueError, f"the weight {QUERY} of .* holds NaN or infinite values"),
    "infinity": (poison(float("-inf")), ValueError, f"the weight {QUERY} of .* holds NaN or infinite values"),
    "a classifier": (
        lambda folder: reconfigure(folder, architectures=["T5ForSequenceClassification"]),
        ValueError,
        "is a T5ForSequenceClassification; it must be a dense checkpoint of a T5, a Chronos-Bolt or a Chronos-2",
    ),
    "GPT-2": (
        lambda folder: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
            folder
        ),
        ValueError,
        "is a gpt2 checkpoint; it must be a dense checkpoint .*such as amazon/chronos-t5-small",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused_with_the_cause(folder, name):
    damage, error, message = BROKEN[name]
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_dense(folder)
    assert str(caught.value).startswith("model: ")
    assert str(folder) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path, dense_t5):
    dense_t5().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(OSError, match=f"model: the weights of .* cannot be read.*{shards[1].name}"):
        load_dense(tmp_path)


def test_a_cut_bin_file_is_refused(folder, dense_t5):
    torch.save(dense_t5().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cut(folder / "pytorch_model.bin", 5000)
    with pytest.raises(OSError, match=r"model: the weights of .* cannot be read"):
        load_dense(folder)


def test_a_model_that_is_not_a_t5_or_not_a_model():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="model: GPT2LMHeadModel is a GPT2LMHeadModel; it must be a dense checkpoint"):
        load_dense(gpt2)
    with pytest.raises(
        ValueError, match="model must be a Hub id, a folder, a loaded model or a pipeline, found a dict"
    ):
        load_dense({"not": "a model"})


@pytest.mark.parametrize("family", ["t5", "bolt", "chronos2"])
def test_a_dense_model_with_other_names_is_refused(request, family):
    """As a later version of transformers or chronos-forecasting may have."""
    model = request.getfixturevalue({"t5": "chronos_t5"}.get(family, family))
    sublayer = model.encoder.block[1].layer[0]
    name = "self_attention" if family == "chronos2" else "SelfAttention"
    attention = getattr(sublayer, name)
    attention.key_proj = attention.k
    del attention.k
    missing = re.escape(f"encoder.block.1.layer.0.{name}.k.weight of shape [16, 16], found none")
    with pytest.raises(ValueError, match=missing):
        load_dense(model)


@torch.no_grad()
def test_a_dense_model_at_full_rank_is_the_same_without_a_copy(dense_t5, bolt, chronos2):
    context = torch.randn(3, 48).cumsum(dim=-1)
    tokens = torch.randint(2, 64, (3, 9))
    cases = [
        (dense_t5(), {"input_ids": tokens, "decoder_input_ids": tokens}, "logits"),
        (dense_t5(T5EncoderModel), {"input_ids": tokens}, "last_hidden_state"),
        (bolt, {"context": context}, "quantile_preds"),
        (chronos2, {"context": context}, "quantile_preds"),
    ]
    for dense, inputs, output in cases:
        model = as_full_rank(dense)
        assert type(model).__name__.startswith("LowRank")
        assert_close(model(**inputs)[output], dense(**inputs)[output], rtol=1e-4, atol=1e-4)
        places = {tensor.data_ptr() for tensor in dense.state_dict().values()}
        assert all(parameter.data_ptr() in places for parameter in model.parameters())
        assert as_full_rank(model) is model


def test_a_loaded_model_with_bad_weights(dense_t5):
    model = dense_t5()
    with torch.no_grad():
        model.get_parameter(QUERY)[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"the weight {QUERY} of .* holds NaN or infinite"):
        load_dense(model)


def test_an_offloaded_model_is_refused(folder, tmp_path):
    devices = dict.fromkeys(["shared", "lm_head", "encoder", "decoder.embed_tokens"], "cpu")
    devices |= {"decoder.block": "disk", "decoder.final_layer_norm": "cpu", "decoder.dropout": "cpu"}
    model = T5ForConditionalGeneration.from_pretrained(
        folder, device_map=devices, offload_folder=str(tmp_path / "offload")
    )
    with pytest.raises(ValueError, match="is on the meta device; load the model without offload"):
        load_dense(model)


# Writing


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def compressed(dense_t5):
    return compress_pretrained(dense_t5(), uniform=7)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The system refuses to write larger files, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["new", "in new parents", "empty"])
def test_a_new_folder_is_written(tmp_path, compressed, kind):
    output = {"new": tmp_path / "a", "in new parents": tmp_path / "a" / "b" / "c", "empty": tmp_path / "e"}[kind]
    if kind == "empty":
        output.mkdir()
    save_compressed(compressed, output)
    assert (output / "model.safetensors").is_file()
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]
    assert output.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_is_not_empty_is_kept_unless_told(tmp_path, compressed):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output: .*out is a folder that is not empty; .*overwrite=True"):
        save_compressed(compressed, output)
    with pytest.raises(FileExistsError, match=r"out is a folder of other things than a model, and is never replaced"):
        save_compressed(compressed, output, overwrite=True)
    assert listing(output) == {"notes.txt": b"mine"}
    compressed.save_pretrained(output)
    save_compressed(compressed, output, overwrite=True)
    assert "notes.txt" not in listing(output)
    assert "model.safetensors" in listing(output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, compressed, overwrite):
    output = tmp_path / "out"
    output.write_text("mine")
    with pytest.raises(FileExistsError, match=r"output: .*out is a file; give a folder"):
        save_compressed(compressed, output, overwrite=overwrite)
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(output, overwrite=overwrite)
    assert output.read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("before", ["absent", "empty", "full"])
@pytest.mark.parametrize("write", [save_compressed, export_stock_t5])
def test_a_save_that_fails_midway_leaves_all_as_it_was(tmp_path, compressed, write, before):
    output = tmp_path / "out"
    if before != "absent":
        output.mkdir()
    if before == "full":
        save_compressed(compressed, output, overwrite=True)
    files = listing(tmp_path)
    # The configuration still fits, the weights do not.
    with file_size_limit(8192), pytest.raises(Exception, match=r"(?i)file too large"):
        write(compressed, output, overwrite=True)
    assert listing(tmp_path) == files
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if before == "absent" else ["out"])


def test_an_interrupted_block_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as temporary:
            (temporary / "half").write_text("written")
            assert temporary.parent.parent == tmp_path
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_may_replace_its_own_source(tmp_path, dense_t5):
    """The weights may still be mapped from the files that are replaced."""
    dense_t5().save_pretrained(tmp_path / "model")
    model = compress_pretrained(tmp_path / "model", uniform=3)
    save_compressed(model, tmp_path / "model", overwrite=True)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


# Export to a stock T5

WITHOUT_HF_LOWRANK = """
import json, sys
sys.modules["hf_lowrank"] = None  # an import of it raises ImportError
import torch
import transformers

transformers.logging.disable_progress_bar()
folder, architecture = sys.argv[1:3]
model = getattr(transformers, architecture).from_pretrained(folder).eval()
inputs = torch.load(f"{folder}.inputs.pt")
with torch.no_grad():
    outputs = model(**inputs)
result = {"output": outputs[0], "config_class": type(model.config).__module__}
if hasattr(model.config, "chronos_config"):
    from chronos import BaseChronosPipeline

    pipeline = BaseChronosPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    result["samples"] = pipeline.predict(torch.arange(30.0), 8, num_samples=5)
torch.save(result, f"{folder}.result.pt")
"""


def run_without_hf_lowrank(folder: Path, architecture: str, inputs: dict[str, torch.Tensor]) -> dict:
    torch.save(inputs, f"{folder}.inputs.pt")
    command = [sys.executable, "-c", WITHOUT_HF_LOWRANK, str(folder), architecture]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=folder)
    return torch.load(f"{folder}.result.pt", weights_only=False)


@torch.no_grad()
def test_an_exported_chronos_forecasts_without_hf_lowrank(tmp_path, chronos_t5):
    from chronos import ChronosPipeline

    chronos_t5.save_pretrained(tmp_path / "dense")
    model = compress_pretrained(tmp_path / "dense", uniform=3)
    export_stock_t5(model, tmp_path / "stock")
    save_compressed(model, tmp_path / "compressed")
    ids = torch.randint(2, 64, (2, 9))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    result = run_without_hf_lowrank(tmp_path / "stock", "AutoModelForSeq2SeqLM", inputs)
    assert result["config_class"] == "transformers.models.t5.configuration_t5"
    assert_close(result["output"], model(**inputs).logits, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    pipeline = ChronosPipeline.from_pretrained(tmp_path / "compressed")
    assert_close(result["samples"], pipeline.predict(torch.arange(30.0), 8, num_samples=5))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert (config["model_type"], config["d_kv"]) == ("t5", 3)
    assert not {"attention_ranks", "feed_forward_ranks", "auto_map"} & set(config)


@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, T5Model, T5EncoderModel])
@pytest.mark.parametrize(
    "changes", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}], ids=["t5", "v1.1"]
)
@torch.no_grad()
def test_an_export_equals_the_model(tmp_path, dense_t5, model_class, changes):
    model = compress_pretrained(dense_t5(model_class, **changes), uniform=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_stock_t5(model, tmp_path / "stock")
    exported = model_class.from_pretrained(tmp_path / "stock").eval()
    assert type(exported.config) is T5Config
    inputs = {"input_ids": torch.randint(2, 64, (2, 9))}
    if model_class is not T5EncoderModel:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert exported.num_parameters() == model.num_parameters()
    # T5 takes its squares in float32 whatever the weights are: some 1e-7 of the whole output differs with the order of sums.
    output, expected = exported.double()(**inputs)[0], model.double()(**inputs)[0]
    assert torch.dist(output, expected) < 1e-5 * expected.norm()


def test_the_papers_method_can_be_exported(tmp_path, dense_t5):
    model = compress_pretrained(dense_t5(), epsilon=0.3, method="paper")
    export_stock_t5(model, tmp_path / "stock")
    assert T5ForConditionalGeneration.from_pretrained(tmp_path / "stock").config.d_kv == 8


@pytest.mark.parametrize(
    "arguments",
    [
        {"ranks": {"cross": [{"qk": 8, "vo": 8}, {"qk": 7, "vo": 7}, {"qk": 8, "vo": 8}]}},
        {
            "ranks": {
                kind: [{"qk": 3, "vo": 4}] * n for kind, n in (("encoder_self", 2), ("decoder_self", 3), ("cross", 3))
            }
        },
        {"uniform": 8, "form": "latent"},
        {"uniform": 8, "form": {"cross": "latent"}},
    ],
    ids=["one layer smaller", "qk is not vo", "latent", "latent cross-attention"],
)
def test_what_no_stock_t5_can_hold(tmp_path, dense_t5, arguments):
    model = compress_pretrained(dense_t5(), **arguments)
    with pytest.raises(ValueError, match=r"model: a stock T5 has one head dimension .* compress with uniform=RANK"):
        export_stock_t5(model, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_thin_factors_and_uneven_widths_cannot_be_exported(tmp_path, tiny_config, mixed_ranks):
    from hf_lowrank import LowRankT5ForConditionalGeneration

    full = {"width": 24, "wi": None, "wo": None}
    thin = {"encoder": [full] * 2, "decoder": [{"width": 24, "wi": 3, "wo": None}] * 3}
    for table in (mixed_ranks["feed_forward_ranks"], thin, {"encoder": [thin["decoder"][0]] * 2, **thin}):
        model = LowRankT5ForConditionalGeneration(tiny_config(feed_forward_ranks=table))
        with pytest.raises(ValueError, match="one feed-forward width in all layers and no thin factors"):
            export_stock_t5(model, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_only_low_rank_models_are_exported(tmp_path, dense_t5):
    with pytest.raises(ValueError, match="model must be a low-rank T5, found T5ForConditionalGeneration"):
        export_stock_t5(dense_t5(), tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []
