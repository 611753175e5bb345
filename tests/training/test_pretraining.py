"""Pretraining: the models that settings describe, runs that are cut off, and what is written."""

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
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5ForConditionalGeneration, TrainerCallback
from typer.testing import CliRunner

from hf_lowrank import LowRankChronosBoltModelForForecasting, LowRankT5ForConditionalGeneration
from hf_lowrank.cli.app import app
from hf_lowrank.published_figures import PRETRAINED_RATIOS
from hf_lowrank.training.plan import model_of, plan_of
from hf_lowrank.training.pretraining import pretrain
from hf_lowrank.training.settings import PretrainingSettings

SIZES: dict[str, Any] = {"d_model": 16, "num_heads": 2, "d_kv": 8, "num_layers": 2}
TINY = PretrainingSettings(
    **SIZES, base_rank=2, rank_growth=0.5, steps=4, batch_tokens=300, save_steps=2, evaluation_batches=2, workers=0
)
# Sizes of heads that the paper's schedules give its 12 + 12 layers, worked out by hand from ceil(d~_0 (1 + i)^alpha).
PAPER_HEADS = {
    (3.0, 0.27): [3, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6],
    (5.0, 0.35): [5, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 12],
    (7.0, 0.40): [7, 10, 11, 13, 14, 15, 16, 17, 17, 18, 19, 19],
}
# To the nearest power of two; a cross-attention layer counts on from the encoder.
PAPER_POWERS = {
    (3.0, 0.27): ([4] * 10 + [8] * 2, [8] * 12),
    (5.0, 0.35): ([4] + [8] * 9 + [16] * 2, [16] * 12),
    (7.0, 0.40): ([8] * 3 + [16] * 9, [16] * 6 + [32] * 6),
}


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


# --- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", PRETRAINED_RATIOS)
def test_the_papers_models_have_its_head_dimensions(schedule: tuple[float, float]) -> None:
    base, growth = schedule
    settings = PretrainingSettings(shape="t5-base", base_rank=base, rank_growth=growth)
    plan = plan_of(settings)
    assert plan.attention_ranks is not None
    for entries in plan.attention_ranks.values():
        assert [entry["qk"] for entry in entries] == [entry["vo"] for entry in entries] == PAPER_HEADS[schedule]
    assert plan.attention_ratio == pytest.approx(np.mean(PAPER_HEADS[schedule]) / 64)
    assert f"the paper reports {PRETRAINED_RATIOS[schedule]:.1%}" in plan.text
    own, cross = PAPER_POWERS[schedule]
    plan = plan_of(replace(settings, rank_rounding="pow2"))
    assert plan.attention_ranks is not None
    for kind, entries in plan.attention_ranks.items():
        assert [entry["vo"] for entry in entries] == (cross if kind == "cross" else own)


def test_the_planned_size_is_that_of_the_model() -> None:
    for settings in (TINY, replace(TINY, family="bolt"), replace(TINY, base_rank=None, rank_growth=None)):
        model_class, config = model_of(settings)
        assert plan_of(settings).parameters == model_class(config).num_parameters()


@pytest.mark.parametrize(
    ("changes", "model_class"),
    [
        ({"base_rank": None, "rank_growth": None}, T5ForConditionalGeneration),
        ({}, LowRankT5ForConditionalGeneration),
        ({"base_rank": None, "rank_growth": None, "family": "bolt"}, ChronosBoltModelForForecasting),
        ({"family": "bolt"}, LowRankChronosBoltModelForForecasting),
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
    quantiles, _ = pipeline.predict_quantiles(torch.arange(40.0), prediction_length=4)
    assert quantiles.shape == (1, 4, 9)
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


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first = pretrain(tmp_path / "first", TINY)
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


@pytest.mark.parametrize("family", ["t5", "bolt"])
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


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, found 0"),
        ({"workers": -1}, "workers must be an integer of at least 0, found -1"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0, found inf"),
        ({"ramp": 1.5}, r"ramp must be in \[0, 1\], found 1.5"),
        ({"seed": -1}, r"seed must be an integer in \[0, 1000003\), found -1"),
        ({"dtype": "int8"}, "dtype must be 'float32' or 'bfloat16', found 'int8'"),
        ({"family": "chronos-2"}, "family must be 't5' or 'bolt', found 'chronos-2'"),
        ({"shape": "t5-huge"}, "shape must be one of t5-tiny.*found 't5-huge'"),
        ({"shape": "t5-tiny", "d_model": 8}, "shape='t5-tiny' brings its own sizes: leave out d_model"),
        ({"start": "reference", "base_rank": 3}, "start brings its own model: leave out base_rank"),
        ({"trainer": {"max_steps": 3}}, "trainer: max_steps cannot be given here"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainingSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, found 0"),
        ({"prediction_length": 0}, "prediction_length must be an integer of at least 1"),
        ({"base_rank": -1.0}, "base_rank must be a positive number"),
        ({"base_rank": None}, "rank_growth and rank_rounding need base_rank"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(replace(TINY, **changes))


def test_arguments_that_trainer_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer: .*momentum"):
        pretrain(tmp_path / "new", replace(TINY, trainer={"momentum": 0.9}))
    assert os.listdir(tmp_path) == []


def test_only_a_chronos_model_can_go_on(tmp_path: Path, dense_t5) -> None:
    dense_t5().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"start: .* is a T5ForConditionalGeneration; it must be a Chronos-T5"):
        pretrain(tmp_path / "new", PretrainingSettings(start=str(tmp_path / "text"), steps=1))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "base_rank": st.floats(0.5, 8),
            "steps": st.integers(1, 9),
            "learning_rate": st.floats(1e-9, 1),
            "data": st.just("mine.csv"),
            "trainer": st.just({"gradient_checkpointing": True}),
        },
    )
)
def test_a_file_holds_the_same_settings(tmp_path_factory: pytest.TempPathFactory, found: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "settings.yaml"
    file.write_text(json.dumps(found))  # JSON is YAML
    assert PretrainingSettings.from_file(file) == PretrainingSettings(**found)
    assert PretrainingSettings.from_file(file, steps=3).steps == 3


def test_a_file_that_is_no_table_of_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for text, message in (
        ("momentum: 0.9", "unknown settings momentum; known are start"),
        ("[1, 2]", "must hold a table of settings, found a list"),
        ("a: [", "neither YAML nor JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            PretrainingSettings.from_file(file)


# --- the command line --------------------------------------------------------------------------------------------


def settings_file(folder: Path) -> Path:
    names = (
        *SIZES,
        "base_rank",
        "rank_growth",
        "steps",
        "batch_tokens",
        "save_steps",
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
