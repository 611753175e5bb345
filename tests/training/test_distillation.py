"""Recovery: what it learns, that it resumes exactly, what it writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, TrainerCallback
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained
from hf_lowrank.checkpoints.loading import public_name
from hf_lowrank.checkpoints.pipelines import as_pipeline, predict_quantiles
from hf_lowrank.cli.app import app
from hf_lowrank.training import distillation as room
from hf_lowrank.training.batches import run_data
from hf_lowrank.training.distillation import recover
from hf_lowrank.training.runs import HELD_OUT_SEED

pytestmark = pytest.mark.filterwarnings("ignore:Keeping", "ignore:The training made")

QUANTILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
QUICK: dict[str, Any] = {"steps": 12, "batch_tokens": 300, "evaluation_batches": 3, "learning_rate": 1e-2}
# For a Chronos-Bolt and a Chronos-2 too, which tell less by less than half a patch.
SERIES = [np.sin(np.arange(90) / 3) + 2, np.arange(40.0) ** 1.5, np.cos(np.arange(70))]


@pytest.fixture
def teacher(chronos_t5) -> PreTrainedModel:
    return chronos_t5


@pytest.fixture
def student(teacher) -> PreTrainedModel:
    return compress_pretrained(teacher, uniform=2, calibration=None)


@pytest.fixture
def pair(dense) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and its teacher, of each family."""
    return compress_pretrained(dense, uniform=2, calibration=None), dense


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Interrupted(Exception):
    pass


class _Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interrupted


def interrupt_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Make the next training break off when it has done so many steps."""
    init = room._DistillationTrainer.__init__

    def interrupted(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.add_callback(_Interrupt(step))

    patch.setattr(room._DistillationTrainer, "__init__", interrupted)


# What is learned


@pytest.mark.parametrize(("weight", "series"), [(1.0, "synthetic"), (0.0, SERIES)], ids=["synthetic", "own"])
def test_the_held_out_loss_falls(pair, tmp_path, weight, series):
    recovered = recover(*pair, tmp_path / "out", series=series, distillation_weight=weight, **QUICK | {"steps": 20})
    record = recovered.config.compression["recovery"]
    assert record["after"]["loss"] < 0.97 * record["before"]["loss"]
    assert 0 < record["best_step"] <= 20
    assert record["teacher_wql"] > 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn_and_stays_as_it_was(dense, tmp_path):
    student = compress_pretrained(dense, uniform=8, calibration=None)
    with pytest.warns(UserWarning, match="made .* no better on held-out windows, so it is saved as it was"):
        recovered = recover(student, dense, tmp_path / "out", distillation_weight=1.0, **QUICK)
    record = recovered.config.compression["recovery"]
    assert record["before"]["loss"] == pytest.approx(0, abs=1e-5)
    assert record["before"]["wql"] == pytest.approx(record["teacher_wql"], rel=1e-4)
    assert record["best_step"] == 0
    assert record["after"] == record["before"]
    same_weights(recovered, student)


@pytest.mark.parametrize("family", ["bolt", "chronos2"])
def test_the_wql_is_that_of_forecasts_of_the_held_out_ends(request, tmp_path, family):
    """Of the models as they are saved, in the pipelines of users."""
    teacher = request.getfixturevalue(family)
    student = compress_pretrained(teacher, uniform=2, calibration=None)
    recovered = recover(student, teacher, tmp_path / "out", series=SERIES, **QUICK)
    longest = 16 if family == "bolt" else 32
    ends = [min(longest, len(values) // 3) for values in SERIES]
    contexts = [torch.tensor(values[:-end]) for values, end in zip(SERIES, ends)]
    record = recovered.config.compression["recovery"]
    scores = {"before": student, "after": recovered, "teacher": teacher}
    for name, model in scores.items():
        quantiles, _ = predict_quantiles(as_pipeline(model), contexts, longest, QUANTILES)
        apart = [values[-end:, None] - q[:end] for values, end, q in zip(SERIES, ends, quantiles)]
        loss = sum(np.maximum(np.array(QUANTILES) * d, (np.array(QUANTILES) - 1) * d).sum() for d in apart)
        wql = 2 * loss / len(QUANTILES) / sum(np.abs(values[-end:]).sum() for values, end in zip(SERIES, ends))
        found = record["teacher_wql"] if name == "teacher" else record[name]["wql"]
        assert found == pytest.approx(wql, rel=1e-4)


def test_every_weight_is_trained_and_nothing_of_the_callers_changes(student, teacher, tmp_path):
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (student, teacher)]
    modes = student.train().training, teacher.training
    student.requires_grad_(False)
    configs = student.config.to_dict(), teacher.config.to_dict()
    recovered = recover(student, teacher, tmp_path / "out", **QUICK)
    for model, weights in zip((student, teacher), before):
        torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert (student.training, teacher.training) == modes
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert (student.config.to_dict(), teacher.config.to_dict()) == configs
    assert not recovered.training
    for name, tensor in recovered.named_parameters():
        assert not torch.equal(tensor, before[0][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_saved_is_what_is_returned_in_the_students_dtype(student, teacher, tmp_path, dtype):
    student.to(dtype).save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    files = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    recovered = recover(tmp_path / "student", tmp_path / "teacher", tmp_path / "out", **QUICK)
    assert all(path.read_bytes() == before for path, before in files.items())  # weights are mapped from there
    assert {parameter.dtype for parameter in recovered.parameters()} == {dtype}
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in saved.parameters()} == {dtype}
    same_weights(saved, recovered)
    assert saved.config.compression == recovered.config.compression
    assert saved.config.use_cache == student.config.use_cache
    assert saved.generation_config.to_dict() == student.generation_config.to_dict()
    assert content(tmp_path) == {"student", "teacher", "out"}


def test_dropout_is_no_noise(student, teacher, tmp_path):
    outcomes = []
    for rate in (0.0, 0.5):
        student.config.dropout_rate = rate
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
        outcomes.append(recover(student, teacher, tmp_path / str(rate), **QUICK))
    same_weights(*outcomes)
    assert outcomes[1].config.dropout_rate == 0.5


def test_the_seed_and_nothing_else_decides(student, teacher, tmp_path):
    first, again, other = (
        recover(student, teacher, tmp_path / str(i), seed=seed, **QUICK) for i, seed in enumerate((1, 1, 2))
    )
    same_weights(first, again)
    with pytest.raises(AssertionError):
        same_weights(first, other)


# Held-out windows of the user's own series


def test_held_out_steps_are_never_trained_on(student, teacher, tmp_path):
    """The batches are the same whatever the held-out steps hold: a horizon, 8 steps."""
    changed = [values.copy() for values in SERIES]
    for values in changed:
        values[-8:] *= -5
    runs = [
        run_data(teacher.config, series, 5, evaluation_batches=3, seed=0, batch_tokens=300)
        for series in (SERIES, changed)
    ]
    for first, other in zip(*(run.batches for run in runs)):
        torch.testing.assert_close(first, other, rtol=0, atol=0)
    assert not torch.equal(runs[0].held_out[0]["labels"], runs[1].held_out[0]["labels"])
    record = recover(student, teacher, tmp_path / "out", series=SERIES, **QUICK).config.compression["recovery"]
    assert record["series"] == {"series": 3, "values": 200, "held_out_windows": 3}


def test_files_and_frames_are_series(student, teacher, tmp_path):
    frame = pd.DataFrame(
        {
            "item_id": ["a"] * 40,
            "timestamp": pd.date_range("2020-01-01", periods=40),
            "target": np.sin(np.arange(40)),
        }
    )
    frame.to_csv(tmp_path / "my.csv", index=False)
    outcomes = [
        recover(student, teacher, tmp_path / str(i), series=series, **QUICK)
        for i, series in enumerate((tmp_path / "my.csv", frame, [np.sin(np.arange(40))]))
    ]
    same_weights(outcomes[1], outcomes[2])
    assert outcomes[0].config.compression["recovery"]["series"]["values"] == 40


def test_many_held_out_windows_are_thinned_out_evenly(teacher):
    series = [np.full(60, float(i + 1)) for i in range(100)]
    data = run_data(teacher.config, series, 1, evaluation_batches=2, seed=0, batch_tokens=480)
    assert [len(batch["labels"]) for batch in data.held_out] == [10, 10]
    assert data.num_held_out_windows == 20


@pytest.mark.parametrize("series", [[[1.0, 2.0]], [[1.0, 2.0, 3.0, float("nan")]]])
def test_too_little_to_hold_out_is_an_error(student, teacher, tmp_path, series):
    with pytest.raises(ValueError, match="series: none of 1 has values to train on and"):
        recover(student, teacher, tmp_path / "out", series=series, **QUICK)
    assert content(tmp_path) == set()


# Unfinished runs


@pytest.mark.parametrize(
    "step", [pytest.param(4, marks=pytest.mark.slow), 7, pytest.param(11, marks=pytest.mark.slow)]
)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(pair, tmp_path, monkeypatch, step):
    student, teacher = pair
    student.bfloat16()
    whole = recover(student, teacher, tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        with pytest.raises(Interrupted):
            recover(student, teacher, tmp_path / "out", **QUICK)
    assert content(tmp_path) == {"whole", "out.recovery"}
    (tmp_path / "out.recovery" / "checkpoint-99").mkdir()  # cut off while it was written
    resumed = recover(student, teacher, tmp_path / "out", **QUICK)
    same_weights(whole, resumed)
    assert resumed.config.compression == whole.config.compression
    assert content(tmp_path) == {"whole", "out"}


def test_a_run_that_could_not_be_saved_is_not_trained_again(student, teacher, tmp_path, monkeypatch):
    whole = recover(student, teacher, tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(room, "save_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            recover(student, teacher, tmp_path / "out", **QUICK)
    assert content(tmp_path) == {"whole", "out.recovery"}
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)  # not one step is taken
        same_weights(whole, recover(student, teacher, tmp_path / "out", **QUICK))
    assert content(tmp_path) == {"whole", "out"}


def test_other_arguments_do_not_go_on_with_a_run(student, teacher, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(Interrupted):
            recover(student, teacher, tmp_path / "out", **QUICK)
    before = content(tmp_path / "out.recovery")
    for changes, message in (
        ({"learning_rate": 2e-2}, "learning_rate was 0.01, is 0.02"),
        ({"steps": 13, "seed": 4}, "seed was 0, is 4; steps was 12, is 13"),
        ({"series": SERIES}, "series was 'synthetic', is"),
    ):
        with pytest.raises(ValueError, match=f"out.recovery holds an unfinished run that differs: {message}"):
            recover(student, teacher, tmp_path / "out", **QUICK | changes)
    with pytest.raises(ValueError, match="unfinished run that differs: student was"):
        recover(compress_pretrained(teacher, uniform=3), teacher, tmp_path / "out", **QUICK)
    assert content(tmp_path / "out.recovery") == before

    anew = recover(student, teacher, tmp_path / "out", resume=False, **QUICK | {"seed": 4})
    same_weights(anew, recover(student, teacher, tmp_path / "other", **QUICK | {"seed": 4}))
    assert content(tmp_path) == {"out", "other"}


def test_a_folder_of_someone_else_is_left_alone(student, teacher, tmp_path):
    (tmp_path / "out.recovery").mkdir()
    (tmp_path / "out.recovery" / "mine.txt").write_text("precious")
    for resume in (True, False):
        with pytest.raises(FileExistsError, match=r"out.recovery must be the folder of an unfinished run"):
            recover(student, teacher, tmp_path / "out", resume=resume, **QUICK)
    assert content(tmp_path / "out.recovery") == {"mine.txt"}


# Records


def test_the_record_says_how_and_never_where(student, teacher, tmp_path):
    student.save_pretrained(tmp_path / "small")
    teacher.save_pretrained(tmp_path / "dense")
    recovered = recover(tmp_path / "small", tmp_path / "dense", tmp_path / "out", series=SERIES, **QUICK)
    record = recovered.config.compression["recovery"]
    assert record["student"] == "small"
    assert record["teacher"] == "dense"
    assert {name: record[name] for name in ("steps", "learning_rate", "batch_tokens")} == {
        name: QUICK[name] for name in ("steps", "learning_rate", "batch_tokens")
    }
    assert (record["distillation_weight"], record["temperature"], record["seed"]) == (0.5, 1.0, 0)
    assert record["before"].keys() == record["after"].keys() == {"loss", "wql"}
    assert recovered.config.compression["policy"] == "uniform"  # what was there stays
    for file in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in file.read_text()

    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small")
    record = recover(loaded, teacher, tmp_path / "again", **QUICK).config.compression["recovery"]
    assert record["student"] == "small"
    assert record["teacher"] == "T5ForConditionalGeneration"
    assert record["series"] == "synthetic"
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def test_a_hub_id_is_a_public_name(teacher):
    assert public_name("amazon/chronos-t5-small") == "amazon/chronos-t5-small"
    assert public_name("reference") == "reference"
    assert public_name("/home/me/models/small/") == "small"
    teacher.config.name_or_path = "runs/old/gone"
    assert public_name(teacher) == "gone"


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, found 0"),
        ({"steps": 1.5}, "steps must be an integer of at least 1, found 1.5"),
        ({"batch_tokens": 0}, "batch_tokens must be an integer of at least 1"),
        ({"evaluation_batches": 0}, "evaluation_batches must be an integer of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, found 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, found nan"),
        ({"distillation_weight": 1.1}, r"distillation_weight must be in \[0, 1\], found 1.1"),
        ({"temperature": -1.0}, "temperature must be above 0, found -1.0"),
        ({"seed": -1}, r"seed must be an integer in \[0, 1000003\), found -1"),
        ({"seed": HELD_OUT_SEED}, "seed must be an integer"),
        ({"series": []}, "series is empty"),
        ({"series": "my.txt"}, "series must end in .csv or .parquet, found 'my.txt'"),
        ({"learning_rate": 1e12}, r"learning_rate=1000000000000.0 made the training diverge"),
    ],
)
def test_a_bad_argument_says_so_and_leaves_nothing(student, teacher, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recover(student, teacher, tmp_path / "out", **QUICK | changes)
    assert content(tmp_path) == set()


def test_an_output_that_exists_is_kept_unless_told_otherwise(student, teacher, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        recover(student, teacher, tmp_path / "out", **QUICK)
    with pytest.raises(FileExistsError, match="is never replaced"):
        recover(student, teacher, tmp_path / "out", overwrite=True, **QUICK)
    assert content(tmp_path / "out") == {"mine.txt"}
    student.save_pretrained(tmp_path / "out")
    recover(student, teacher, tmp_path / "out", overwrite=True, **QUICK)
    assert "model.safetensors" in content(tmp_path / "out")
    assert "mine.txt" not in content(tmp_path / "out")


def test_models_that_read_or_write_otherwise_are_refused(student, teacher, tmp_path):
    student.config.name_or_path, teacher.config.name_or_path = "me/small", "me/dense"
    teacher.config.chronos_config = teacher.config.chronos_config | {"top_k": 7, "context_length": 99}  # no matter
    for changes, message in (
        (
            {"tokenizer_kwargs": {"low_limit": -9.0, "high_limit": 9.0}},
            "tokenizer_kwargs is .* student small and .* teacher dense",
        ),
        ({"eos_token_id": 2}, "eos_token_id is 1 in the student small and 2 in the teacher dense"),
    ):
        dense = teacher.config.chronos_config
        teacher.config.chronos_config = dense | changes
        with pytest.raises(ValueError, match=message):
            recover(student, teacher, tmp_path / "out", **QUICK)
        teacher.config.chronos_config = dense
    recover(student, teacher, tmp_path / "out", **QUICK | {"steps": 1})


def test_what_is_no_compressed_chronos_model_is_refused(student, teacher, bolt, dense_t5, tmp_path):
    with pytest.raises(
        ValueError, match=r"teacher: .* without the settings of a Chronos model; it must be a Chronos-T5"
    ):
        recover(student, dense_t5(), tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match="student must be a folder, a Hub id or a loaded model, found a dict"):
        recover({}, teacher, tmp_path / "out", **QUICK)
    with pytest.raises(
        ValueError, match=r"student: .* is dense, a T5ForConditionalGeneration; give the compressed model"
    ):
        recover(teacher, teacher, tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match=r"must be of one family: the student .* the teacher .* a ChronosBolt"):
        recover(student, bolt, tmp_path / "out", **QUICK)
    other = compress_pretrained(bolt, uniform=2, calibration=None)
    with pytest.raises(ValueError, match=r"temperature is for a Chronos-T5, .* found 2.0"):
        recover(other, bolt, tmp_path / "out", **QUICK | {"temperature": 2.0})
    other.config.chronos_config["prediction_length"] = 8
    with pytest.raises(ValueError, match="must read and write alike: prediction_length is 8 in the student"):
        recover(other, bolt, tmp_path / "out", **QUICK)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"student: .*empty must be a checkpoint with the config.json"):
        recover(tmp_path / "empty", teacher, tmp_path / "out", **QUICK)
    with torch.no_grad():
        student.shared.weight[3] = float("nan")
    with pytest.raises(ValueError, match="student or teacher: the predictions of one of them are not finite"):
        recover(student, teacher, tmp_path / "out", **QUICK)
    assert content(tmp_path) == {"empty"}


# The command line


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def folders(student, teacher, tmp_path) -> list[Path]:
    student.save_pretrained(tmp_path / "small")
    teacher.save_pretrained(tmp_path / "dense")
    return [tmp_path / "small", tmp_path / "out", "--teacher", tmp_path / "dense", "--steps", 3]


def test_the_command_prints_its_record_and_nothing_else(folders, tmp_path):
    options = ["--learning-rate", "0.01", "--temperature", "2", "--seed", "5", "--json", "-"]
    code, out, err = run("recover", *folders, *options)
    assert code == 0, err
    report = json.loads(out)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert report == {"output": str(tmp_path / "out"), "recovery": model.config.compression["recovery"]}
    assert report["recovery"]["temperature"] == 2
    assert report["recovery"]["seed"] == 5


def test_the_command_takes_a_file_and_prints_a_table(folders, tmp_path):
    times = pd.date_range("2020-01-01", periods=50).astype(str)
    pd.DataFrame({"item_id": "a", "timestamp": times, "target": range(50)}).to_csv(tmp_path / "my.csv", index=False)
    code, out, err = run("recover", *folders, "--data", tmp_path / "my.csv")
    assert code == 0, err
    for word in ("before", "after", "teacher", "WQL"):
        assert word in " ".join(out.split())


def test_the_command_fails_in_one_line(folders, tmp_path):
    code, out, err = run("recover", *folders, "--distillation-weight", "3")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: distillation_weight must be in [0, 1], found 3.0")
    assert content(tmp_path) == {"small", "dense"}
