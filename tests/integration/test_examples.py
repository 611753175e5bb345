"""The examples and the README's code run as they stand."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForSeq2SeqLM

from hf_lowrank.checkpoints.loading import checkpoint_path
from hf_lowrank.cli.app import COMMANDS, app

ROOT = Path(__file__).parents[2]


def run_script(*arguments: object, folder: Path) -> str:
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow  # .ci/run has it all the same
def test_the_readmes_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"## Ten lines\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code + "print(tuple(quantiles.shape), tuple(mean.shape))\n")
    assert run_script(script, folder=tmp_path).strip() == "(1, 24, 9) (1, 24)"


def shell_blocks() -> list[str]:
    """The lines of the README and of examples/README.md that a shell runs."""
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "examples/README.md"))
    return [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]


def test_the_readmes_commands_are_ones() -> None:
    group, parsed = typer.main.get_command(app), set()
    for line in shell_blocks():
        for part in line.split(" && "):
            program, *arguments = shlex.split(part, comments=True) or [""]
            if Path(program).name == "hf-lowrank" and not arguments[0].startswith("-"):
                command = group.commands[arguments[0]]
                command.make_context(arguments[0], arguments[1:])  # raises a usage error
                parsed.add(command.name)
    assert parsed == {command.__name__ for command in COMMANDS}


def test_both_builds_of_torch_are_whole_commands() -> None:
    installs = [line for line in shell_blocks() if line.startswith("python3 -m venv")]
    cpu = ".venv/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu && "
    assert len(installs) == 4
    for with_cpu_build, with_default in zip(installs[::2], installs[1::2]):
        assert with_cpu_build.replace(cpu, "") == with_default != with_cpu_build


def imported(tree: ast.Module) -> set[str]:
    """The modules of this package that a script imports from, here or in a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "hf_lowrank"}


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.stem)
def test_what_is_no_experiment_needs_the_public_names_alone(script: Path) -> None:
    tree = ast.parse(script.read_text())
    is_experiment = ast.get_docstring(tree).startswith(("Experiment on internals: ", "Experiments on internals: "))
    assert (imported(tree) <= {"hf_lowrank"}) != is_experiment


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("bolt", {"encoder_self", "decoder_self", "cross"}),
        ("chronos2", {"time", "group"}),
    ],
)
@pytest.mark.slow
def test_the_references_are_trained_and_measured(tmp_path: Path, family: str, kinds: set[str]) -> None:
    script = ROOT / "examples" / "pretrain_reference.py"
    size = ["--steps", 1, "--batch-tokens", 512, "--no-budgets"]
    run_script(script, "train", family, "--family", family, *size, folder=tmp_path)
    found = json.loads(run_script(script, "measure", family, "--batches", 1, folder=tmp_path))
    assert set(found["added_when_silenced"]) == kinds
    assert all(loss != 0 for loss in found["added_when_silenced"].values())
    if family == "chronos2":
        assert found["relative_loss_alone"] != 1
        assert found["covariate_wql"]["known"] != found["covariate_wql"]["unknown"]


@pytest.mark.slow
def test_a_reference_can_begin_with_an_embedding_without_order(tmp_path: Path) -> None:
    script = ROOT / "examples" / "pretrain_reference.py"
    size = ["--steps", 1, "--batch-tokens", 512, "--no-budgets"]
    run_script(script, "train", "t5", *size, "--random-embedding", folder=tmp_path)
    run_script(script, "train", "smooth", *size, folder=tmp_path)
    spectra = []
    for name in ("t5", "smooth"):
        embedding = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).shared.weight.detach().float()
        spectra.append(torch.linalg.svdvals(embedding))
    assert spectra[0].min() > 0.5 * spectra[0].max()
    assert spectra[1].min() < 0.1 * spectra[1].max()


@pytest.mark.slow
def test_studies_compare_models_of_equal_size(tmp_path: Path) -> None:
    pytest.importorskip("fev")
    script = ROOT / "examples" / "studies.py"
    run_script(script, "schedule", "--steps", 1, "--seeds", 1, folder=tmp_path)
    runs = tmp_path / "runs" / "studies"
    rows = json.loads((runs / "schedule.json").read_text())
    assert len({row["attention"] for row in rows.values()}) == 1  # equal parameters
    assert len(rows) == 3


@pytest.mark.slow
def test_text_and_time_series_are_compared(tmp_path: Path) -> None:
    run_script(ROOT / "examples" / "studies.py", "text", "--steps", 1, "--ratios", 0.5, folder=tmp_path)
    rows = json.loads((tmp_path / "runs" / "studies" / "text.json").read_text())
    assert all(0 <= row["added at 0.5"] < row["attention silenced"] for row in rows.values())


@pytest.mark.slow
def test_alternatives_are_compared(tmp_path: Path, chronos_t5) -> None:
    chronos_t5.save_pretrained(tmp_path / "dense")
    script = ROOT / "examples" / "compare_alternatives.py"
    options = ["--ratios", 0.5, "--feed-forward-ratios", 0.5, "--num-batches", 2, "--json", "figures.json"]
    table = run_script(script, "dense", *options, folder=tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(0 <= row["0.5"] < 10 for rows in figures.values() for row in rows.values())
    assert figures["attention"]["the default"]["0.5"] < figures["attention"]["single matrices, whitened"]["0.5"]
    assert "fewer neurons, refitted" in table


def measured(reference: str, folder: Path) -> dict:
    script = ROOT / "examples" / "pretrain_reference.py"
    return json.loads(run_script(script, "measure", checkpoint_path(reference), folder=folder))


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["reference", "reference-bolt"])
def test_the_references_use_their_attention(tmp_path: Path, reference: str) -> None:
    added = measured(reference, tmp_path)["added_when_silenced"]
    assert added["encoder_self"] >= 0.1
    assert added["cross"] >= 0.4


@pytest.mark.slow
def test_the_chronos_2_reference_uses_its_groups_and_covariates(tmp_path: Path) -> None:
    found = measured("reference-2", tmp_path)
    assert found["added_when_silenced"]["time"] >= 0.1
    assert found["added_when_silenced"]["group"] >= 0.03  # of the quantile loss
    assert found["relative_loss_alone"] >= 1.03
    assert found["covariate_wql"]["known"] <= found["covariate_wql"]["unknown"] / 2


@pytest.mark.slow
def test_compressed_models_are_compared_with_trained_ones(tmp_path: Path) -> None:
    pytest.importorskip("fev")
    script = ROOT / "examples" / "compress_or_train_smaller.py"
    options = ["--steps", 2, "--repeats", 1]
    table = run_script(script, "runs", *options, folder=tmp_path)
    rows = json.loads((tmp_path / "runs" / "results.json").read_text())
    trained = [row for row in rows.values() if row["steps"] is not None]
    work = [row["steps"] * row["parameters"] for row in trained]
    assert len(trained) == 4
    assert max(work) < 1.5 * min(work)  # two steps of the largest are few to divide
    assert all(row["parameters"] < rows["d128"]["parameters"] for name, row in rows.items() if name != "d128")
    assert all(low <= mean <= high for mean, low, high in (row["WQL_of_largest"] for row in rows.values()))
    assert (tmp_path / "runs" / "compress-or-train-smaller.png").stat().st_size > 0
    assert "d128" in table
    assert "d64" in table
