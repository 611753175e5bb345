"""Checkpoints load where hf_lowrank is missing, with `trust_remote_code=True`: from a folder, from a Hub, and saved again by whatever loaded them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chronos_models
import huggingface_hub
import pytest
import torch
from chronos import BaseChronosPipeline
from conftest import T5_CODE
from hub_server import serve
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel, Trainer, TrainingArguments

from hf_lowrank import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, push_to_hub

CHRONOS_CODE = T5_CODE | {
    "configuration_lowrank_chronos.py",
    "modeling_lowrank_chronos.py",
    "pipeline_lowrank_chronos.py",
}
CONTEXT = torch.arange(30.0).sin() + 3

# Runs without the package. It answers with what it has loaded, by the name it was given.
SCRIPT = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_lowrank":
            raise ModuleNotFoundError("hf_lowrank is blocked")

sys.meta_path.insert(0, Missing())

import torch
import transformers
from chronos import BaseChronosPipeline
from transformers import AutoConfig, Trainer, TrainingArguments

folders, auto_classes, work = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
context = torch.arange(30.0).sin() + 3
found = {}

def look(name, place):
    seen = found[name] = {"config": type(AutoConfig.from_pretrained(place, trust_remote_code=True)).__name__, "models": {}}
    for auto in auto_classes[name]:
        model = getattr(transformers, auto).from_pretrained(place, trust_remote_code=True)
        seen["models"][auto] = type(model).__name__
    if "encoder" not in name:
        pipeline = BaseChronosPipeline.from_pretrained(place, trust_remote_code=True)
        torch.manual_seed(0)
        quantiles, _ = pipeline.predict_quantiles([context], prediction_length=4)
        seen["pipeline"], seen["quantiles"] = type(pipeline).__name__, torch.as_tensor(quantiles[0]).flatten().tolist()
    return model

for name, place in folders.items():
    model = look(name, place)
    if "/" in name:
        continue  # from the Hub: as what is in a folder
    auto_classes[name + " resaved"] = auto_classes[name]
    model.save_pretrained(f"{work}/{name} again")
    look(name + " resaved", f"{work}/{name} again")
    if name in ("t5", "bolt"):
        auto_classes[name + " trainer"] = auto_classes[name]
        arguments = TrainingArguments(f"{work}/run", report_to=[], use_cpu=True)
        Trainer(model, arguments).save_model(f"{work}/{name} trained")
        look(name + " trainer", f"{work}/{name} trained")

assert not any(name.partition(".")[0] == "hf_lowrank" for name in sys.modules)
print(json.dumps(found))
"""

AUTO_CLASSES = {
    "t5": ["AutoModel", "AutoModelForTextEncoding", "AutoModelForSeq2SeqLM"],
    "encoder": ["AutoModel", "AutoModelForTextEncoding"],
    "bolt": ["AutoModel"],
    "chronos2": ["AutoModel"],
}
LOADED = {
    "t5": {
        "config": "LowRankT5Config",
        "models": {
            "AutoModel": "LowRankT5Model",
            "AutoModelForTextEncoding": "LowRankT5EncoderModel",
            "AutoModelForSeq2SeqLM": "LowRankT5ForConditionalGeneration",
        },
        "pipeline": "LowRankChronosPipeline",
    },
    "encoder": {
        "config": "LowRankT5Config",
        "models": dict.fromkeys(["AutoModel", "AutoModelForTextEncoding"], "LowRankT5EncoderModel"),
    },
    "bolt": {
        "config": "LowRankChronosBoltConfig",
        "models": {"AutoModel": "LowRankChronosBoltModelForForecasting"},
        "pipeline": "LowRankChronosBoltPipeline",
    },
    "chronos2": {
        "config": "LowRankChronos2Config",
        "models": {"AutoModel": "LowRankChronos2Model"},
        "pipeline": "LowRankChronos2Pipeline",
    },
}


@pytest.fixture(scope="module")
def models(tiny_config, mixed_ranks, tiny_chronos_config) -> dict[str, PreTrainedModel]:
    t5 = chronos_models.alive(
        LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks, chronos_config=vars(tiny_chronos_config).copy()))
    )
    t5.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    return {
        "t5": t5,
        "encoder": LowRankT5EncoderModel(tiny_config(**mixed_ranks)),
        "bolt": chronos_models.bolt(**chronos_models.BOLT_RANKS),
        "chronos2": chronos_models.chronos2(**chronos_models.CHRONOS2_RANKS),
    }


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved; saved again by the installed package after a load; saved by its Trainer."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        model.save_pretrained(root / name)
    AutoModelForSeq2SeqLM.from_pretrained(root / "t5").save_pretrained(root / "t5 here")
    arguments = TrainingArguments(str(root / "run"), report_to=[], use_cpu=True)
    Trainer(models["bolt"], arguments).save_model(str(root / "bolt here"))
    return {name: root / name for name in (*models, "t5 here", "bolt here")}


@pytest.fixture(scope="module")
def elsewhere(models, folders: dict[str, Path], tmp_path_factory) -> dict[str, Any]:
    """What a process without the package has loaded, from the folders and from a Hub."""
    work = tmp_path_factory.mktemp("elsewhere")
    with serve({"hf_ann": "ann"}) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for name in ("t5", "bolt", "chronos2"):
            push_to_hub(models[name], f"ann/{name}", private=True, token="hf_ann")
        places = {name: str(folder) for name, folder in folders.items()} | {
            f"ann/{name}": f"ann/{name}" for name in ("t5", "bolt", "chronos2")
        }
        classes = {name: AUTO_CLASSES[family_of(name)] for name in places}
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_ann", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(work / "home"), "PYTHONPATH": "", "TRANSFORMERS_VERBOSITY": "error"}
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(places), json.dumps(classes), str(work)],
            capture_output=True,
            text=True,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


def family_of(name: str) -> str:
    """ "ann/t5", "t5 here resaved" -> "t5" """
    return name.split("/")[-1].split()[0]


def test_every_auto_class_finds_its_class(elsewhere: dict[str, Any]) -> None:
    for name, seen in elsewhere.items():
        assert {key: value for key, value in seen.items() if key != "quantiles"} == LOADED[family_of(name)], name
    names = {"t5", "encoder", "bolt", "chronos2", "t5 here", "bolt here"}
    wanted = names | {f"{name} resaved" for name in names} | {"t5 trainer", "bolt trainer"}
    assert set(elsewhere) == wanted | {"ann/t5", "ann/bolt", "ann/chronos2"}


def test_it_forecasts_the_same(elsewhere: dict[str, Any], folders: dict[str, Path]) -> None:
    for family in ("t5", "bolt", "chronos2"):
        pipeline = BaseChronosPipeline.from_pretrained(folders[family])
        torch.manual_seed(0)
        quantiles, _ = pipeline.predict_quantiles([CONTEXT], prediction_length=4)
        here = torch.as_tensor(quantiles[0]).flatten()
        assert here.isfinite().all()
        seen = [found["quantiles"] for name, found in elsewhere.items() if family_of(name) == family]
        assert len(seen) >= 3
        for there in seen:
            torch.testing.assert_close(torch.tensor(there), here, rtol=1e-4, atol=1e-4)


def test_a_save_holds_the_code_of_its_family_alone(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        wanted = CHRONOS_CODE if family_of(name) in ("bolt", "chronos2") else T5_CODE
        assert {path.name for path in folder.glob("*.py")} == wanted, name
        for path in folder.glob("*.py"):
            assert (
                path.read_bytes()
                == Path(sys.modules[LowRankT5EncoderModel.__module__].__file__).with_name(path.name).read_bytes()
            )


def test_auto_map_is_written_anew_by_every_save(models, tmp_path: Path) -> None:
    config = models["t5"].config
    config.auto_map = {"AutoModel": "somebody/else--modeling_other.Other"}  # as a checkpoint from elsewhere may say
    models["t5"].save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert saved == {
        "AutoConfig": "configuration_lowrank_t5.LowRankT5Config",
        "AutoModel": "modeling_lowrank_t5.LowRankT5Model",
        "AutoModelForSeq2SeqLM": "modeling_lowrank_t5.LowRankT5ForConditionalGeneration",
        "AutoModelForTextEncoding": "modeling_lowrank_t5.LowRankT5EncoderModel",
    }


def test_the_installed_package_comes_first(folders: dict[str, Path]) -> None:
    """Where it is installed, its own classes are used, trusted or not."""
    for trust in (True, None):
        model = AutoModelForSeq2SeqLM.from_pretrained(folders["t5"], trust_remote_code=trust)
        assert type(model) is LowRankT5ForConditionalGeneration
