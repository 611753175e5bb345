"""No command runs the code of a checkpoint, whatever stands on standard input when somebody asks whether it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained
from hf_lowrank.analysis.analyze import load_transformer
from hf_lowrank.benchmarking.measurement import LoadedCheckpoint
from hf_lowrank.cli.app import app
from hf_lowrank.training.loaders import load_forecaster, load_start

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

NAMES = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoTokenizer")
COMMANDS: dict[str, tuple[str, ...]] = {
    "compress": ("compress", "{evil}", "{out}", "--ratio", "0.5", "--calibration", "none"),
    "forecast": ("forecast", "{evil}", "{series}", "{out}.csv", "--horizon", "2"),
    "evaluate": ("evaluate", "{evil}", "--file", "{series}", "--horizon", "2"),
    "bench": ("bench", "{evil}", "--against", "{evil}"),
    "analyze": ("analyze", "{evil}"),
    "push": ("push", "{evil}", "ann/evil"),
    "pretrain": ("pretrain", "{out}", "--start", "{evil}", "--steps", "1", "--workers", "0"),
    "recover": ("recover", "{evil}", "{out}", "--teacher", "{evil}", "--steps", "1"),
}


@pytest.fixture
def evil(tmp_path: Path):
    """Folders with code that leaves a mark: a sound model, one of a type that nobody knows, and one whose class is an Auto class."""
    mark = tmp_path / "ran"

    def made(folder: Path, **changes: Any) -> Path:
        code = f"open({str(mark)!r}, 'w').close()\n"
        for name in ("evil.py", "custom_generate/generate.py", *(path.name for path in folder.glob("*.py"))):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)
        path = folder / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        config |= {"auto_map": {name: f"evil.{name}" for name in NAMES}} | changes
        path.write_text(json.dumps(config))
        return folder

    return made, mark


def run(command: str, folder: Path, tmp_path: Path) -> Any:
    series = tmp_path / "series.csv"
    time = pd.date_range("2024-01-01", periods=60, freq="D")
    pd.DataFrame({"item_id": "a", "timestamp": time, "target": range(60)}).to_csv(series, index=False)
    places = {"evil": folder, "out": tmp_path / "out", "series": series}
    return CliRunner().invoke(app, [part.format(**places) for part in COMMANDS[command]], input="y\n" * 20)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_type_that_nobody_knows_is_refused(command: str, evil, tmp_path: Path, monkeypatch) -> None:
    if command == "evaluate":
        pytest.importorskip("fev")
    made, mark = evil
    (tmp_path / "evil").mkdir()
    folder = made(tmp_path / "evil", model_type="evil", architectures=["Evil"])
    result = run(command, folder, tmp_path)
    assert not mark.exists()
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "transformers knows" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    # What the commands are kept from: who answers "y" here has run it.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(folder)
    assert mark.exists()


@pytest.mark.parametrize("command", ["compress", "forecast", "evaluate", "push"])
def test_a_sound_model_is_used_without_the_code_beside_it(command: str, evil, chronos_t5, tmp_path: Path) -> None:
    if command == "evaluate":
        pytest.importorskip("fev")
    made, mark = evil
    model = compress_pretrained(chronos_t5, uniform=3, calibration=None) if command == "push" else chronos_t5
    model.save_pretrained(tmp_path / "evil")
    result = run(command, made(tmp_path / "evil"), tmp_path)
    assert not mark.exists()
    if command == "push":  # and there is no Hub
        assert "pushing to ann/evil failed" in result.stderr
    else:
        assert result.exit_code == 0, result.stderr


def test_neither_do_the_loaders_of_the_longer_commands(evil, chronos_t5, tmp_path: Path, monkeypatch) -> None:
    made, mark = evil
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    chronos_t5.save_pretrained(tmp_path / "known")
    folder = str(made(tmp_path / "known"))
    load_start(folder)
    load_forecaster(folder, "student")
    load_transformer(folder)
    for lean in (False, True):
        LoadedCheckpoint.load(folder, "evil", dtype="float32", device="cpu", lean=lean)
    folder = str(made(tmp_path / "known", model_type="evil"))
    with pytest.raises(ValueError, match="trust_remote_code"):  # where a benchmark measures memory
        LoadedCheckpoint.load(folder, "evil", dtype="float32", device="cpu")
    assert not mark.exists()


def test_an_auto_class_is_no_architecture(evil, chronos_t5, tmp_path: Path, monkeypatch) -> None:
    made, mark = evil
    chronos_t5.save_pretrained(tmp_path / "evil")
    folder = made(tmp_path / "evil", model_type="gpt2", architectures=["AutoModelForSeq2SeqLM"])
    result = run("analyze", folder, tmp_path)
    assert not mark.exists()
    assert result.exit_code == 1, result.stdout
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(AttributeError):
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert mark.exists()
