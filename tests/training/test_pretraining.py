"""Pretraining: what is trained and written, runs that are cut off, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chronos import BaseChronosPipeline
from chronos.chronos2 import Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from transformers import T5ForConditionalGeneration, TrainerCallback
from typer.testing import CliRunner

from hf_lowrank import LowRankChronos2Model, LowRankChronosBoltModelForForecasting, LowRankT5ForConditionalGeneration
from hf_lowrank.cli.app import app
from hf_lowrank.files import locked
from hf_lowrank.training.plan import initial_model
from hf_lowrank.training.pretraining import pretrain
from hf_lowrank.training.runs import earlier_run
from hf_lowrank.training.settings import PretrainingSettings

SIZES: dict[str, Any] = {"d_model": 16, "num_heads": 2, "d_kv": 8, "num_layers": 2}
TINY = PretrainingSettings(
    **SIZES,
    base_rank=2,
    rank_growth=0.5,
    steps=4,
    batch_tokens=300,
    save_steps=2,
    averaged=0.75,
    evaluation_batches=2,
    workers=0,
)


class CutOff(TrainerCallback):
    """Fails at a step, as a machine may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("cut off")


def weights_are_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "model_class"),
    [
        ({"base_rank": None, "rank_growth": None}, T5ForConditionalGeneration),
        ({}, LowRankT5ForConditionalGeneration),
        ({"base_rank": None, "rank_growth": None, "family": "bolt"}, ChronosBoltModelForForecasting),
        ({"family": "bolt"}, LowRankChronosBoltModelForForecasting),
        ({"base_rank": None, "rank_growth": None, "family": "chronos2"}, Chronos2Model),
        ({"family": "chronos2"}, LowRankChronos2Model),
    ],
)
def test_a_trained_model_forecasts_and_says_how_it_was_made(
    changes: dict[str, Any], model_class: type, tmp_path: Path
) -> None:
    settings = replace(TINY, **changes)
    model = pretrain(tmp_path / "new", settings)
    assert type(model) is model_class
    assert os.listdir(tmp_path) == ["new"]  # no checkpoint is left behind
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path / "new")
    quantiles, _ = pipeline.predict_quantiles([torch.arange(40.0)], prediction_length=4)
    quantiles = quantiles[0].reshape(1, 4, 9)  # a Chronos-2 has variates
    assert quantiles.isfinite().all()
    record = json.loads((tmp_path / "new" / "pretraining.json").read_text())
    assert record["steps"] == 4
    assert record["seed"] == 0
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in record["history"] if "eval_loss" in entry] == [2, 4]
    assert losses[-1] == record["held_out_loss"]
    if not changes.get("base_rank", TINY.base_rank):
        return
    assert model.config.compression["policy"] == "schedule"
    assert model.config.compression["pretraining"]["held_out_loss"] == record["held_out_loss"]


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    pretrain(tmp_path / "new", replace(TINY, steps=40, save_steps=20, context_length=32, prediction_length=8))
    record = json.loads((tmp_path / "new" / "pretraining.json").read_text())
    first, last = (entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry)
    assert last < first < math.log(4096)


@pytest.mark.parametrize("family", ["t5", "chronos2"])
def test_training_goes_on_from_a_checkpoint(tmp_path: Path, family: str) -> None:
    first = pretrain(tmp_path / "first", replace(TINY, family=family))
    settings = PretrainingSettings(
        start=str(tmp_path / "first"), steps=1, learning_rate=1e-9, batch_tokens=300, workers=0, evaluation_batches=0
    )
    second = pretrain(tmp_path / "second", settings)
    assert type(second) is type(first)
    assert second.config.attention_ranks == first.config.attention_ranks
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=0, atol=1e-6)
    # Folders are the machine's business; their names are enough.
    assert second.config.compression["pretraining"]["start"] == "first"
    assert "held_out_loss" not in second.config.compression["pretraining"]


@pytest.mark.parametrize("family", ["t5", "bolt", "chronos2"])
def test_it_trains_on_series_of_ones_own(family: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    series = [10 + rng.standard_normal(length) for length in (30, 80, 200)]
    series[1][10:20] = np.nan
    settings = replace(TINY, family=family, context_length=64, prediction_length=16, data=series)
    model = pretrain(tmp_path / "new", settings)
    record = json.loads((tmp_path / "new" / "pretraining.json").read_text())
    assert math.isfinite(record["held_out_loss"])
    assert record["data"] == "the caller's series"
    assert not weights_are_equal(model, pretrain(tmp_path / "synthetic", replace(settings, data="synthetic")))


def test_trainer_brings_the_optimizer_where_muon_is_off(tmp_path: Path) -> None:
    """Under SGD without a rate to speak of nothing moves; under Muon and AdamW everything does."""
    settings = replace(TINY, steps=3, averaged=0.0, evaluation_batches=0)
    still = replace(settings, muon=False, learning_rate=1e-30, trainer={"optim": "sgd"})
    start = dict(initial_model(still).named_parameters())
    for name, weight in pretrain(tmp_path / "still", still).named_parameters():
        torch.testing.assert_close(weight, start[name], rtol=0, atol=1e-20)
    for name, weight in pretrain(tmp_path / "moved", settings).named_parameters():
        assert not torch.equal(weight, start[name]), name


class Watched(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


@pytest.mark.parametrize(("averaged", "num_steps"), [(0.0, 1), (0.25, 1), (0.75, 3), (1.0, 4)])
def test_the_weights_are_the_mean_of_those_after_the_last_steps(averaged, num_steps, tmp_path: Path) -> None:
    watched = Watched()
    model = pretrain(tmp_path / "new", replace(TINY, averaged=averaged), callbacks=[watched])
    assert len(watched.weights) == 4
    for name, weight in model.named_parameters():
        mean = torch.stack([weights[name] for weights in watched.weights[-num_steps:]]).mean(dim=0)
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-5, atol=1e-7)


# --- runs that are cut off ---------------------------------------------------------------------------------------


def test_a_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = pretrain(tmp_path / "whole", TINY)
    with pytest.raises(RuntimeError, match="cut off"):
        pretrain(tmp_path / "cut", TINY, callbacks=[CutOff(3)])
    assert sorted(os.listdir(tmp_path)) == ["cut.pretraining", "whole"]
    with pytest.raises(ValueError, match=r"unfinished run that differs: seed was 0, is 1.*--no-resume"):
        pretrain(tmp_path / "cut", replace(TINY, seed=1))
    assert weights_are_equal(whole, pretrain(tmp_path / "cut", TINY))
    assert sorted(os.listdir(tmp_path)) == ["cut", "whole"]


def test_a_run_begins_anew_where_that_is_asked(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        pretrain(tmp_path / "cut", TINY, callbacks=[CutOff(3)])
    other = replace(TINY, seed=1)
    begun = pretrain(tmp_path / "cut", other, resume=False)
    assert weights_are_equal(begun, pretrain(tmp_path / "other", other))


def test_a_run_without_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        pretrain(tmp_path / "cut", TINY, callbacks=[CutOff(1)])
    assert os.listdir(tmp_path) == []


def test_a_diverging_run_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rate=1e\+30 made the training diverge by step \d"):
        pretrain(tmp_path / "bad", replace(TINY, learning_rate=1e30, bf16=False, trainer={"max_grad_norm": 0.0}))
    assert os.listdir(tmp_path) == []


def test_a_finished_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        pretrain(tmp_path / "new", TINY)
    assert (tmp_path / "new" / "thesis.txt").read_text() == "mine"


def test_a_foreign_folder_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "new.pretraining").mkdir()
    with pytest.raises(FileExistsError, match="must be the folder of an unfinished run"):
        pretrain(tmp_path / "new", TINY)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_arguments_that_trainer_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer: .*momentum"):
        pretrain(tmp_path / "new", replace(TINY, trainer={"momentum": 0.9}))
    assert os.listdir(tmp_path) == []


def test_only_a_chronos_model_can_go_on(tmp_path: Path, dense_t5) -> None:
    dense_t5().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"start: .* is a T5ForConditionalGeneration; it must be a Chronos-T5"):
        pretrain(tmp_path / "new", PretrainingSettings(start=str(tmp_path / "text"), steps=1))


# --- the command line --------------------------------------------------------------------------------------------


def settings_file(folder: Path) -> Path:
    names = (
        *SIZES,
        "base_rank",
        "rank_growth",
        "steps",
        "batch_tokens",
        "save_steps",
        "averaged",
        "evaluation_batches",
        "workers",
    )
    file = folder / "settings.yaml"
    file.write_text(json.dumps({name: getattr(TINY, name) for name in names}))
    return file


def test_the_command_trains_what_it_plans(tmp_path: Path) -> None:
    config = ["--config", str(settings_file(tmp_path))]
    planned = CliRunner().invoke(app, ["pretrain", *config, "--plan", "--json", "-"])
    assert planned.exit_code == 0
    done = CliRunner().invoke(app, ["pretrain", str(tmp_path / "new"), *config, "--steps", "2"])
    assert done.exit_code == 0, done.stderr
    assert "encoder_self: 2, 3" in done.stdout
    assert "2 steps; loss" in done.stdout
    model = LowRankT5ForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert model.num_parameters() == json.loads(planned.stdout)["parameters"]
    missing = CliRunner().invoke(app, ["pretrain", *config])
    assert missing.exit_code == 1
    assert "OUTPUT is missing" in missing.stderr


def test_only_the_first_process_looks_for_what_a_killed_run_left(tmp_path: Path, monkeypatch) -> None:
    """The others would meet its lock, for they do so at the same moment."""
    with locked(tmp_path / "new"):
        monkeypatch.setenv("RANK", "1")
        assert not earlier_run(tmp_path / "new", "pretraining").is_ending
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(OSError, match="another run is writing"):
            earlier_run(tmp_path / "new", "pretraining")


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    config = settings_file(tmp_path)
    launch = (
        "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "-m", "hf_lowrank", "pretrain"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "both"), "--config", str(config), "--json", "-"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one process prints
    assert record["processes"] == 2
    assert sorted(os.listdir(tmp_path)) == ["both", "settings.yaml"]
    together = LowRankT5ForConditionalGeneration.from_pretrained(tmp_path / "both")
    assert not weights_are_equal(together, pretrain(tmp_path / "alone", TINY))  # twice the data
