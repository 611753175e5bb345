"""Adapters of peft on dense and on compressed models: merged, compressed, saved and pushed as ordinary checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline
from hub_server import Hub, serve_this_process
from huggingface_hub import HfApi
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, PreTrainedModel
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained, load_pipeline, push_to_hub, render_card
from hf_lowrank.checkpoints.adapters import has_adapter
from hf_lowrank.checkpoints.dense import as_full_rank, load_dense
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.cli.app import app

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Keeping")


def adapted(model: PreTrainedModel) -> Any:
    """The model with a LoRA adapter on every matrix of its blocks, as if it had been trained."""
    model._input_embed_layer = "shared"  # stock Chronos-Bolt does not say, and peft asks
    names = [name for name, part in model.named_modules() if type(part) is nn.Linear and ".block." in name]
    found = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=names))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return found.eval()


def assert_equal(found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    assert type(found) is type(wanted)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def small(model: Any) -> PreTrainedModel:
    return compress_pretrained(model, uniform=4, calibration=None)


def test_a_model_with_an_adapter_is_compressed_as_one(dense, tmp_path):
    """Loaded, in a pipeline, and saved beside its base; and what the caller gave stays as it is."""
    dense.save_pretrained(tmp_path / "base")
    model = adapted(type(dense).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = small(model)
    again = small(tmp_path / "adapter")
    assert has_adapter(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert found.config.compression["adapter"] == {"base": "base", "type": "LORA"}
    assert again.config.compression["source"] == "adapter"
    assert again.config.compression["adapter"] == {"base": "base", "type": "LORA"}
    assert "compress_pretrained('adapter'" in str(render_card(again, "me/small"))
    wanted = small(model.merge_and_unload())
    assert_equal(found, wanted)
    assert_equal(again, wanted)


def test_adapters_put_into_a_model_count_too(bolt):
    bolt._input_embed_layer = "shared"
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=r".*\.block\..*\.(q|wi)")
    peft.inject_adapter_in_model(config, bolt)
    with torch.no_grad():
        for name, weight in bolt.named_parameters():
            if "lora_" in name:
                weight.normal_()
    found = as_full_rank(load_dense(bolt).float_model())
    assert not any("lora" in name or "base_layer" in name for name in found.state_dict())
    assert any("lora" in name for name in bolt.state_dict())
    context = torch.randn(3, 48).cumsum(1)
    with torch.no_grad():
        wanted = bolt(context).quantile_preds
        assert_close(found(context).quantile_preds, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_what_chronos_has_fine_tuned(chronos2, tmp_path):
    chronos2.save_pretrained(tmp_path / "base")
    pipeline = Chronos2Pipeline.from_pretrained(tmp_path / "base")
    tuned = tuned_by(pipeline, tmp_path)
    assert isinstance(tuned.model, peft.PeftModel)
    result = CliRunner().invoke(
        app,
        [
            "compress",
            str(tmp_path / "finetuned-ckpt"),
            str(tmp_path / "small"),
            "--uniform",
            "4",
            "--calibration",
            "none",
        ],
    )
    assert result.exit_code == 0, result.output
    found = AutoModel.from_pretrained(tmp_path / "small")
    assert_equal(found, small(tuned))
    assert found.config.compression["adapter"]["base"] == "base"


def tuned_by(pipeline: Any, folder: Path) -> Any:
    """A few steps of chronos' own fine-tuning."""
    series = [torch.sin(torch.arange(60.0) / size) for size in (3, 5)]
    return pipeline.fit(
        [{"target": values} for values in series],
        prediction_length=8,
        finetune_mode="lora",
        learning_rate=1e-2,
        num_steps=3,
        batch_size=4,
        output_dir=folder,
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_this_process({"hf_ann": "ann"}, tmp_path, monkeypatch) as server:
        yield server


def test_an_adapter_of_a_compressed_model_becomes_an_ordinary_checkpoint(dense, tmp_path, hub):
    repo_id = f"ann/tuned-{type(dense).__name__}"  # libraries remember commits of names
    compress_pretrained(dense, total_ratio=0.5, calibration=None).save_pretrained(tmp_path / "base")
    base = load_pipeline(tmp_path / "base").inner_model
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"model has an adapter.*merge it first"):
        push_to_hub(model, repo_id, token="hf_ann")
    other = peft.PeftModel.from_pretrained(load_pipeline(tmp_path / "base").inner_model, tmp_path / "adapter")
    merged = other.merge_and_unload()
    assert merged.config.compression == base.config.compression
    assert_equal(merged, model.merge_and_unload())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())
    merged.save_pretrained(tmp_path / "merged")
    assert_equal(type(merged).from_pretrained(tmp_path / "merged"), merged)
    push_to_hub(merged, repo_id, token="hf_ann")
    assert_equal(load_pipeline(repo_id).inner_model, merged)
    assert small(tmp_path / "adapter").config.compression["source_class"] == type(merged).__name__


def test_chronos_fine_tunes_a_compressed_model_by_an_adapter(chronos2, tmp_path):
    small(chronos2).save_pretrained(tmp_path / "base")
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path / "base")
    tuned = tuned_by(pipeline, tmp_path)
    merged = tuned.model.merge_and_unload()
    assert_equal(load_pipeline(tmp_path / "finetuned-ckpt").inner_model, merged)
    merged.save_pretrained(tmp_path / "merged")
    again = BaseChronosPipeline.from_pretrained(tmp_path / "merged")
    assert_equal(again.model, merged)
    context = torch.sin(torch.arange(50.0) / 4)[None, None]
    assert_close(again.predict(context, 8)[0], as_pipeline(merged).predict(context, 8)[0], rtol=0, atol=0)


def test_an_adapter_on_the_hub_is_a_source(chronos2, tmp_path, hub):
    small(chronos2).save_pretrained(tmp_path / "base")
    model = adapted(AutoModel.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    api = HfApi(endpoint=hub.url, token="hf_ann")
    api.create_repo("ann/adapter")
    api.upload_folder(repo_id="ann/adapter", folder_path=tmp_path / "adapter")
    found = compress_pretrained("ann/adapter", uniform=2, calibration=None)
    assert found.config.compression["source"] == "ann/adapter"
    assert_equal(found, compress_pretrained(model, uniform=2, calibration=None))


def test_what_is_wrong_with_an_adapter_is_said(bolt, tmp_path, monkeypatch):
    bolt.save_pretrained(tmp_path / "base")
    model = adapted(type(bolt).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"adapter is an adapter and needs .* pip install 'hf-lowrank\[lora\]'"):
            small(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    sound = file.read_text()
    file.write_text(sound.replace('"base_model_name_or_path":', '"no_name":'))
    with pytest.raises(ValueError, match="must name its model in base_model_name_or_path"):
        small(tmp_path / "adapter")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"must have a sound adapter_config\.json"):
        small(tmp_path / "adapter")
    file.write_text(sound.replace("/base", "/elsewhere"))
    with pytest.raises(OSError, match=r"of the adapter .*elsewhere is no folder"):
        small(tmp_path / "adapter")
