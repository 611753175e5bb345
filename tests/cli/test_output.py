"""Whatever goes wrong is one line and an exit status; what others have written is shown as they wrote it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_lowrank import __version__
from hf_lowrank.cli import output
from hf_lowrank.cli.app import app

ERRORS = [
    SafetensorError("Error while deserializing header"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    pickle.UnpicklingError("invalid load key, 'v'."),
    StrictDataclassFieldValidationError(field="d_model", cause=TypeError("no int")),
    AssertionError(),
    RecursionError("maximum recursion depth exceeded"),
    KeyError("weight_map"),
    TypeError("two\nlines"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    ValueError("ratio must be in (0, 1], found 2."),
    OSError(28, "No space left on device"),
]


def run(monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hf_lowrank.checkpoints.summary.summarize", fail)
    monkeypatch.setattr("hf_lowrank.compression.compress.compress_pretrained", fail)
    return CliRunner().invoke(app, ["compress", "reference", "nowhere", "--ratio", "0.5", *options])


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_is_one_line(monkeypatch, tmp_path, error):
    monkeypatch.chdir(tmp_path)
    result = run(monkeypatch, error)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert " ".join(str(error).split()) in line
    assert ("--debug" in line) != isinstance(error, (ValueError, OSError))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["before", "behind"])
def test_debug_shows_where(monkeypatch, place):
    error = RuntimeError("deep inside")
    result = run(monkeypatch, error, *(["--debug"] if place == "behind" else []))
    if place == "before":
        assert not isinstance(result.exception, RuntimeError) or result.exit_code == 1
        result = CliRunner().invoke(app, ["--debug", "compress", "reference", "nowhere", "--ratio", "0.5"])
    assert result.exception is error
    assert output.DEBUG not in __import__("os").environ


def test_an_interruption_is_no_traceback(monkeypatch):
    result = run(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted: ")


@pytest.mark.parametrize("name", ["[/b]", "[red]x", ":smile:", "[bold]", "a[forecast]", "[link=x]y"])
def test_names_of_others_are_shown_as_they_are(monkeypatch, capsys, name):
    output.warn(f"series {name} is left out")
    assert f"series {name} is left out" in capsys.readouterr().err
    assert f'pip install "hf_lowrank{name}"' in run(monkeypatch, ImportError(f'pip install "hf_lowrank{name}"')).stderr


def test_version_and_short_help():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"hf-lowrank {__version__}\n"
    for command in ([], ["compress"], ["forecast"]):
        short, long = (CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help"))
        assert short.exit_code == 0
        assert short.stdout == long.stdout
    assert CliRunner().invoke(app, ["compress", "--no-such-option"]).exit_code == 2


WAYS_IN = {
    "compress": ["compress", "{model}", "{out}", "--ratio", "0.5", "--calibration", "none"],
    "recover": ["recover", "{model}", "{out}", "--teacher", "{model}", "--steps", "1"],
    "pretrain": ["pretrain", "{out}", "--start", "{model}", "--steps", "1"],
    "forecast": ["forecast", "{model}", "{data}", "{out}.csv"],
    "analyze": ["analyze", "{model}", "--data", "none"],
    "bench": ["bench", "{model}", "--against", "{model}"],
    "push": ["push", "{model}", "me/model"],
}
DAMAGE = {
    "truncated": lambda folder: truncate(folder / "model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "config is cut": lambda folder: truncate(folder / "config.json"),
    "odd sizes": lambda folder: change(folder, d_model="many"),
    "no heads": lambda folder: change(folder, num_heads=0),
    "a NaN": lambda folder: poison(folder),
}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.final_layer_norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("way", WAYS_IN)
def test_damaged_checkpoints_are_one_line_in_every_command(chronos_t5, tmp_path, way, damage):
    model, data = tmp_path / "model", tmp_path / "data.csv"
    chronos_t5.save_pretrained(model)
    data.write_text("item_id,timestamp,target\n" + "".join(f"a,2024-01-{day:02d},{day}\n" for day in range(1, 29)))
    DAMAGE[damage](model)
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = [part.format(model=model, data=data, out=tmp_path / "out") for part in WAYS_IN[way]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: "), result.output
    assert "Traceback" not in result.output
    assert len(lines) <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_shell_completes_commands_and_options():
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
    for words, wanted in (("hf-lowrank comp", "compress"), ("hf-lowrank compress --total", "--total-ratio")):
        environment = {
            "_HF_LOWRANK_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        assert wanted in CliRunner().invoke(app, [], env=environment, prog_name="hf-lowrank").stdout.split()
