"""What is saved and published names no place of this machine, and as a base model only what came from the Hub."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hub_server import serve_this_process
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

from hf_lowrank import Calibration, calibrate, compress_pretrained, load_pipeline, pretrain, recover, render_card
from hf_lowrank.checkpoints.loading import REFERENCES, public_name
from hf_lowrank.models.pipeline_lowrank_chronos import is_adapter
from hf_lowrank.training.settings import PretrainingSettings

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

SECRET = "projects-of-ann"  # a folder whose name must not be seen
QUICK = {"steps": 1, "batch_tokens": 300, "evaluation_batches": 1}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder `projects-of-ann`."""
    (tmp_path / SECRET).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(model: T5ForConditionalGeneration, folder: str | Path) -> None:
    """With the path in the configuration, as older versions of transformers wrote it."""
    model.save_pretrained(folder)
    path = Path(folder, "config.json")
    config = json.loads(path.read_text()) | {"_name_or_path": str(Path(folder).resolve())}
    path.write_text(json.dumps(config))


def assert_silent(*folders: str | Path) -> None:
    """No file says where anything was."""
    for folder in folders:
        for path in Path(folder).rglob("*"):
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path
                assert str(Path.cwd()).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("is_absolute", [False, True])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_folder_is_named_by_its_last_part_also_when_it_is_gone(home, chronos_t5, is_absolute, is_loaded) -> None:
    """A relative `owner/name` that is gone looks just like a Hub id."""
    folder = Path(SECRET, "small").resolve() if is_absolute else Path(SECRET, "small")
    save(chronos_t5, folder)
    given = AutoModelForSeq2SeqLM.from_pretrained(folder) if is_loaded else str(folder)
    if is_loaded:
        shutil.rmtree(folder)
    model = compress_pretrained(given, uniform=3, calibration=None)
    shutil.rmtree(folder, ignore_errors=True)
    assert model.config.compression["source"] == "small"
    model.save_pretrained("out")
    model.save_pretrained("again")  # the folder that it came from is not there any more
    card = render_card(model, "ann/small")
    assert card.data.base_model is None
    assert "compressed from `small`" in card.text
    Path("out", "README.md").write_text(str(card))
    assert_silent("out", "again")


def test_only_what_came_from_the_hub_is_a_base_model(home, chronos_t5, monkeypatch) -> None:
    save(chronos_t5, home / "base")
    with serve_this_process({}, home, monkeypatch) as hub:
        hub.publish("ann/base", home / "base")
        for given in (
            "ann/base",
            AutoModelForSeq2SeqLM.from_pretrained("ann/base"),
            load_pipeline("ann/base").inner_model,
        ):
            model = compress_pretrained(given, uniform=3, calibration=None)
            card = render_card(model, "ann/small")
            assert model.config.compression["source"] == card.data.base_model == "ann/base"
            assert "[ann/base](https://huggingface.co/ann/base)" in card.text
        asked = hub.count("HEAD", "adapter_config.json")
        load_pipeline("ann/base")
        assert hub.count("HEAD", "adapter_config.json") == asked  # the cache knows that there is none
        Path(home / "base" / "adapter_config.json").write_text("{}")
        hub.publish("ann/base", home / "base")
        with suppress(Exception):  # that adapter is empty
            load_pipeline("ann/base")
        assert is_adapter("ann/base")  # a new commit is asked anew
    # A folder of that name is a folder.
    save(chronos_t5, Path("ann", "base"))
    assert public_name("ann/base") == "base"


def test_what_ships_here_is_told_from_folders_of_the_same_name(home, chronos_t5) -> None:
    for name, folder in REFERENCES.items():
        assert public_name(name) == public_name(folder) == name
    assert public_name(load_pipeline("reference").inner_model) == "reference"
    save(chronos_t5, Path(SECRET, "reference"))
    model = compress_pretrained(f"{SECRET}/reference", uniform=3, calibration=None)
    card = render_card(model, "ann/small")
    assert card.data.license is None  # not that of the package's
    assert "compressed from `another reference`" in card.text


def test_trainings_say_what_and_never_where(home, chronos_t5) -> None:
    compressed = compress_pretrained(chronos_t5, uniform=3, calibration=None)
    compressed.save_pretrained(f"{SECRET}/small")
    save(chronos_t5, f"{SECRET}/dense")
    series = pd.DataFrame({"item_id": "a", "timestamp": pd.date_range("2024-01-01", periods=80), "target": range(80)})
    series.to_csv(f"{SECRET}/sales.csv", index=False)
    recover(f"{SECRET}/small", f"{SECRET}/dense", "recovered", series=f"{SECRET}/sales.csv", **QUICK)
    settings = PretrainingSettings(
        **QUICK,
        start=f"{SECRET}/small",
        data=f"{SECRET}/sales.csv",
        workers=0,
        bf16=False,
        trainer={"accelerator_config": {"use_seedable_sampler": True}, "run_name": str(home / SECRET / "run")},
    )
    pretrain("trained", settings)
    record = json.loads(Path("trained", "pretraining.json").read_text())
    assert (record["start"], record["data"], record["trainer"]["run_name"]) == ("small", "sales.csv", "run")
    calibration = calibrate(f"{SECRET}/dense", f"{SECRET}/sales.csv", num_batches=1)
    calibration.save("calibrated/calibration.safetensors")
    compress_pretrained(f"{SECRET}/dense", uniform=3, calibration=calibration, refit=False).save_pretrained(
        "compressed"
    )
    assert Calibration.load("calibrated/calibration.safetensors").record == calibration.record
    assert_silent("recovered", "trained", "calibrated", "compressed")


def test_a_token_is_no_setting() -> None:
    with pytest.raises(ValueError, match=r"trainer: hub_token cannot be given here.* set HF_TOKEN") as caught:
        replace(PretrainingSettings(), trainer={"hub_token": "hf_secret"})
    assert "hf_secret" not in str(caught.value)
