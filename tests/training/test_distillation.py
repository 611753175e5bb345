"""Recovery: what it learns, that it resumes exactly, what it writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, TrainerCallback
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained
from hf_lowrank.checkpoints.loading import public_name
from hf_lowrank.cli.app import app
from hf_lowrank.data.tokens import SyntheticBatches
from hf_lowrank.training import distillation as room
from hf_lowrank.training.batches import run_data
from hf_lowrank.training.distillation import distillation_loss, recover
from hf_lowrank.training.runs import HELD_OUT_SEED

pytestmark = pytest.mark.filterwarnings("ignore:Keeping", "ignore:The training made")

QUICK: dict[str, Any] = {"steps": 12, "batch_tokens": 300, "evaluation_batches": 3, "learning_rate": 1e-2}
SERIES = [np.sin(np.arange(90) / 3) + 2, np.arange(30.0), np.full(25, 3.0)]


@pytest.fixture
def teacher(chronos_t5) -> PreTrainedModel:
    return chronos_t5


@pytest.fixture
def student(teacher) -> PreTrainedModel:
    return compress_pretrained(teacher, uniform=2, calibration=None)


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


# The loss


@given(seed=st.integers(0, 1000), weight=st.floats(0, 1), temperature=st.floats(0.5, 4))
def test_the_loss_is_its_formula(seed, weight, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(7, (5,), generator=generator)
    q, p = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    divergence = (q * (q / p).log()).sum(-1).mean()
    cross_entropy = -student.softmax(-1)[torch.arange(5), labels].log().mean()
    found = distillation_loss(student, teacher, labels, weight=weight, temperature=temperature)
    torch.testing.assert_close(found, (1 - weight) * cross_entropy + weight * temperature**2 * divergence)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    logits = torch.randn(5, 7, requires_grad=True)
    loss = distillation_loss(logits, logits.detach(), torch.zeros(5, dtype=torch.long), weight=1.0, temperature=2.0)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0))
    torch.testing.assert_close(logits.grad, torch.zeros(5, 7))


# What is learned


@pytest.mark.parametrize(("weight", "falls"), [(1.0, "divergence"), (0.0, "cross_entropy")])
@pytest.mark.parametrize("series", ["synthetic", SERIES], ids=["synthetic", "own"])
def test_the_held_out_loss_falls(student, teacher, tmp_path, weight, falls, series):
    recovered = recover(
        student, teacher, tmp_path / "out", series=series, distillation_weight=weight, **QUICK | {"steps": 30}
    )
    record = recovered.config.compression["recovery"]
    before, after = record["before"], record["after"]
    assert after[falls] < 0.9 * before[falls]
    assert after["teacher_cross_entropy"] == pytest.approx(before["teacher_cross_entropy"])


def test_the_scores_are_those_of_the_models(student, teacher, tmp_path, tiny_chronos_config):
    recover(student, teacher, tmp_path / "out", **QUICK)
    recovered = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    batches = SyntheticBatches(tiny_chronos_config, 3, seed=HELD_OUT_SEED, max_tokens=300)
    for model, name in ((student, "before"), (recovered, "after")):
        total, tokens = 0.0, 0
        for batch in batches:
            count = int((batch["labels"] != -100).sum())
            total, tokens = total + model(**batch).loss.item() * count, tokens + count
        assert recovered.config.compression["recovery"][name]["cross_entropy"] == pytest.approx(
            total / tokens, rel=1e-4
        )


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
    """The training is the same whatever the held-out steps hold: a horizon (8 steps), or a third of a short series."""
    changed = [values.copy() for values in SERIES]
    for values in (changed[0][-8:], changed[1][-8:], changed[2][-8:]):
        values *= -5
    first = recover(student, teacher, tmp_path / "first", series=SERIES, **QUICK)
    other = recover(student, teacher, tmp_path / "other", series=changed, **QUICK)
    same_weights(first, other)
    scores = [model.config.compression["recovery"]["before"]["cross_entropy"] for model in (first, other)]
    assert scores[0] != scores[1]
    assert first.config.compression["recovery"]["series"] == {"series": 3, "values": 145, "held_out_windows": 3}


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


@pytest.mark.parametrize("step", [2, 7, 11])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(student, teacher, tmp_path, monkeypatch, step):
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
    assert (record["distillation_weight"], record["temperature"], record["seed"]) == (1.0, 1.0, 0)
    assert record["before"].keys() == record["after"].keys()
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


def test_models_that_do_not_share_tokens_are_refused(student, teacher, tmp_path):
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


def test_what_is_no_chronos_t5_is_refused(student, teacher, dense_t5, tmp_path):
    with pytest.raises(ValueError, match=r"teacher: .* without the tokenizer of a Chronos-T5"):
        recover(student, dense_t5(), tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match="student must be a folder, a Hub id or a loaded model, found a dict"):
        recover({}, teacher, tmp_path / "out", **QUICK)
    with pytest.raises(
        ValueError, match=r"student: .* is dense, a T5ForConditionalGeneration; give the compressed model"
    ):
        recover(teacher, teacher, tmp_path / "out", **QUICK)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"student: .*empty must be a checkpoint with the config.json"):
        recover(tmp_path / "empty", teacher, tmp_path / "out", **QUICK)
    with torch.no_grad():
        student.shared.weight[3] = float("nan")
    with pytest.raises(ValueError, match="student or teacher: the logits of one of them are not finite"):
        recover(student, teacher, tmp_path / "out", **QUICK)
    assert content(tmp_path) == {"empty"}


def test_a_training_that_makes_it_worse_warns(student, teacher, tmp_path):
    with pytest.warns(UserWarning, match="made .* worse on held-out windows"):
        recover(
            student,
            teacher,
            tmp_path / "out",
            **QUICK | {"distillation_weight": 1.0, "learning_rate": 1.0, "steps": 3},
        )


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
    for word in ("before", "after", "KL from the teacher", "cross-entropy"):
        assert word in " ".join(out.split())


def test_the_command_fails_in_one_line(folders, tmp_path):
    code, out, err = run("recover", *folders, "--distillation-weight", "3")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: distillation_weight must be in [0, 1], found 3.0")
    assert content(tmp_path) == {"small", "dense"}
