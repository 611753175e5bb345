"""What can be known at the start is said at the start: one line that names the argument, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from hf_lowrank.checkpoints.loading import REFERENCES
from hf_lowrank.cli.app import app

SALES = "item_id,timestamp,target\n" + "".join(f"a,2024-01-{day:02d},{day}\n" for day in range(1, 29))
UNDER_A_FILE = r"cannot be written, for /.*/file is a file and no folder"
CASES = [
    ("compress reference file/out --ratio 0.5", "output: file/out " + UNDER_A_FILE),
    ("compress reference file --ratio 0.5", "output: file is a file"),
    ("compress reference out --base-rank 3 --rank-rounding pow3", "'ceil' or 'pow2', found 'pow3'"),
    ("compress reference-bolt out --max-cache-ratio 0.5", "max_cache_ratio: .* keeps no cache"),
    (
        "compress reference out --ratio 0.5 --calibration sinthetic",
        "--calibration must be 'synthetic', 'none' or a file",
    ),
    ("compress reference out --ratio 0.5 --calibration no.csv", "'no.csv' does not exist"),
    ("compress reference out --ratio 0.5 --calibration no.safetensors", "calibration: no.safetensors is no file"),
    (
        "compress reference out --ranks sales.csv",
        "--ranks must be a JSON file of ranks, such as .*, found 'sales.csv'",
    ),
    ("compress bert out --ratio 0.5", "model: bert is a bert checkpoint; it must be a dense checkpoint"),
    ("compress strict out --ratio 0.5", "model: strict must have a sound config.json .*'d_ff'"),
    ("analyze reference --plots file/x", "--plots: .* " + UNDER_A_FILE),
    ("analyze reference --data sinthetic", "--data must be 'synthetic', 'none' or a file"),
    ("analyze bert", "data: a bert model reads no time series here"),
    (
        "sweep reference --plot no/such/x.png",
        "--plot must be a picture .* in a folder that exists, found 'no/such/x.png'",
    ),
    ("sweep reference --plot x.foo", "--plot must be a picture"),
    ("sweep reference --methods defalt", "methods must be of .*; found defalt"),
    ("sweep reference --tasks nil", "tasks must name known tasks, found 'nil'"),
    ("sweep reference --ratios 0.5,2", r"ratio must be in \(0, 1\], found 2"),
    ("demo --plot no/such/x.png", "plot must be a picture"),
    ("demo --plot x.png --ratios 0.5,2", r"ratio must be in \(0, 1\], found 2"),
    ("pretrain out --base-rank 3 --rank-rounding pow3", "rank_rounding must be 'ceil' or 'pow2', found 'pow3'"),
    ("pretrain out --base-rank 3 --ranks sales.csv", "--ranks must be a JSON file of ranks"),
    ("pretrain out --config sales.csv", "config: sales.csv must hold a table of settings"),
    ("pretrain file/out", "output: file/out " + UNDER_A_FILE),
    ("recover bert out --teacher reference", "bert is a bert checkpoint; it must be a Chronos-T5"),
    ("recover reference file/out --teacher reference", "output: file/out " + UNDER_A_FILE),
    ("forecast bert sales.csv out.csv", "model: bert is a bert checkpoint; it must be a Chronos checkpoint"),
    ("forecast strict sales.csv out.csv", "model: strict must have a sound config.json"),
    ("forecast reference sales.csv file/out.csv", "output: file/out.csv " + UNDER_A_FILE),
    ("evaluate reference --cache file", "--cache: .* " + UNDER_A_FILE),
    ("bench reference --against bert", "against: bert is a bert checkpoint"),
    ("push bert me/model", "model: bert is a bert checkpoint; it must be a low-rank model"),
]
NEEDS = {"demo": ["fev", "matplotlib"], "sweep": ["fev", "matplotlib"], "analyze": ["matplotlib"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is none of a checkpoint: a BERT, a configuration with a word for a number, a table, a file."""
    place = tmp_path_factory.mktemp("place")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(place / "bert")
    shutil.copytree(REFERENCES["reference"], place / "strict")
    config = json.loads((place / "strict" / "config.json").read_text()) | {"d_ff": "many"}
    (place / "strict" / "config.json").write_text(json.dumps(config))
    (place / "sales.csv").write_text(SALES)
    (place / "file").write_text("mine")
    return place


@pytest.mark.parametrize(("command", "message"), CASES, ids=[command for command, _ in CASES])
def test_what_cannot_be_is_said_before_the_work(command, message, place, monkeypatch) -> None:
    for package in NEEDS.get(command.split()[0], []):
        pytest.importorskip(package)
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert result.stdout == "" or command.startswith("pretrain")  # which says its plan first
    *above, line = result.stderr.splitlines()
    assert not [text for text in above if "warning: " not in text]
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
