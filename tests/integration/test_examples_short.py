"""The short examples do what their first lines say, on the reference checkpoints and on small ones."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from chronos import BaseChronosPipeline
from chronos_models import BOLT_RANKS, bolt, dense_bolt
from conftest import randomise
from hub_server import serve
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hf_lowrank import LowRankT5ForConditionalGeneration, compress_pretrained
from hf_lowrank.hub.push import is_generated

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")


def example(name: str) -> Any:
    """An example as a module."""
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> str:
    """What an example prints; its command line is read in this process, which has imported everything already."""
    app = typer.Typer()
    app.command()(example(name).main)
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_script(*command: object, **environment: str) -> str:
    variables = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four series of the user's, 60 months each, in long format."""
    months = pd.date_range("2018-01-01", periods=60, freq="MS")
    parts = [
        pd.DataFrame({"item_id": f"shop {i}", "timestamp": months, "target": 10 + i + np.sin(np.arange(60) / 2 + i)})
        for i in range(4)
    ]
    path = tmp_path_factory.mktemp("data") / "sales.csv"
    pd.concat(parts).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both references, compressed."""
    folders = {}
    for name in ("reference", "reference-bolt"):
        folders[name] = tmp_path_factory.mktemp("small") / name
        compress_pretrained(name, uniform=6, calibration=None).save_pretrained(folders[name])
    return folders


def forecasts(folder: Path) -> None:
    """A compressed checkpoint that a Chronos pipeline loads."""
    pipeline = BaseChronosPipeline.from_pretrained(folder)
    assert type(pipeline).__name__.startswith("LowRank")
    assert torch.isfinite(pipeline.predict_quantiles(torch.arange(30.0), 6)[0]).all()


def test_compress(tmp_path: Path) -> None:
    printed = run("compress", "reference", tmp_path / "small", "--ratio", 0.2, "--data", "none")
    assert "decoder_feed_forward.3: " in printed
    assert re.search(r"kept: 0\.(19\d|200) ", printed)
    assert len(re.findall(r"\d+\.\d\d\b", printed.split("forecast: ")[1])) == 12
    forecasts(tmp_path / "small")


@pytest.mark.slow
def test_compress_on_synthetic_series(tmp_path: Path, sales: Path) -> None:
    run("compress", "reference", tmp_path / "small")
    forecasts(tmp_path / "small")


@pytest.mark.slow
def test_compare_formats(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = dense_bolt(num_layers=1, num_decoder_layers=1)
    # A T5Config that is made with it does not save it.
    model.config.chronos_pipeline_class = "ChronosBoltPipeline"
    model.save_pretrained(tmp_path / "dense")
    sizes = ["--batch-size", 2, "--context-length", 30, "--prediction-length", 4, "--repeats", 1]
    printed = run("compare_formats", tmp_path / "dense", "--no-dense", *sizes, "--json", tmp_path / "all.json")
    rows = json.loads((tmp_path / "all.json").read_text())
    formats = ["checkpoint", "torch", "onnx", "onnx int8", "openvino", "openvino int8", "inductor", "inductor int8"]
    assert [row["format"] for row in rows] == formats
    assert "added loss" in printed


def test_evaluate(tmp_path: Path, small: dict[str, Path], sales: Path) -> None:
    pytest.importorskip("fev")
    output = tmp_path / "evaluation.json"
    printed = run("evaluate", small["reference"], "reference", "--file", sales, "--horizon", 6, "--output", output)
    assert {row["model"] for row in json.loads(output.read_text())["results"]} == {
        "seasonal_naive",
        "reference",
        str(small["reference"]),
    }
    assert "WQL: " in printed
    assert "of the dense model's" in printed


def test_analyse(tmp_path: Path, sales: Path) -> None:
    pytest.importorskip("matplotlib")
    printed = run("analyse", "reference", "--data", sales, "--plots", tmp_path / "plots")
    assert "cross.3: qk " in printed
    assert "How far: " in printed
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"spectra.png", "flow.png", "heads.png"}


def test_push(tmp_path: Path, small: dict[str, Path]) -> None:
    settings = {"HF_TOKEN": "hf_ann", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    with serve({"hf_ann": "ann"}) as hub:
        command = (sys.executable, EXAMPLES / "push.py", small["reference"], "ann/small", "--private")
        printed = run_script(*command, HF_ENDPOINT=hub.url, **settings)
        repository = hub.repositories["ann/small"]
    assert f"{hub.url}/ann/small/commit/" in printed
    assert "LowRankChronosPipeline of " in printed
    assert repository.private
    assert repository.files["model.safetensors"] == (small["reference"] / "model.safetensors").read_bytes()
    assert is_generated(repository.files["README.md"].decode())


# Fine-tuning


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reference", ["--lora", 2, "--bf16"]),
        ("reference-bolt", ["--gradient-checkpointing"]),
        pytest.param("reference", ["--gradient-checkpointing"], marks=pytest.mark.slow),
        pytest.param("reference-bolt", ["--lora", 2, "--gradient-checkpointing"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing", "ignore:`is_gradient_checkpointing")
def test_finetune(tmp_path: Path, small: dict[str, Path], sales: Path, name: str, options: list[Any]) -> None:
    if "--lora" in options:
        pytest.importorskip("peft")
    output = tmp_path / "tuned"
    quick = ["--data", sales, "--horizon", 6, "--steps", 2, "--eval-steps", 1, "--batch-size", 4]
    run("finetune_with_trainer", small[name], output, *quick, *options)
    forecasts(output)
    before, after = (BaseChronosPipeline.from_pretrained(f, dtype="auto").inner_model for f in (small[name], output))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert before.dtype == after.dtype == torch.bfloat16
    assert before.config.use_cache == after.config.use_cache
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    history = json.loads((output / "ranks.json").read_text())
    assert [row["step"] for row in history] == [0, 1, 2]
    with pytest.raises(FileExistsError, match="not empty"):
        run("finetune_with_trainer", small[name], output, *quick)


@pytest.mark.slow
def test_finetune_goes_on_where_it_was_cut_off(tmp_path: Path, small: dict[str, Path], sales: Path) -> None:
    quick = ["--data", sales, "--steps", 2, "--eval-steps", 1, "--batch-size", 2, "--horizon", 6]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output in (whole, cut):
        run("finetune_with_trainer", small["reference-bolt"], output, *quick)
    for path in [*(cut / "checkpoints" / "checkpoint-2").iterdir(), cut / "model.safetensors"]:
        path.unlink()
    (cut / "checkpoints" / "checkpoint-2").rmdir()
    run("finetune_with_trainer", small["reference-bolt"], cut, *quick, "--resume")
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    tables = [json.loads((output / "ranks.json").read_text()) for output in (whole, cut)]
    assert tables[0] == tables[1]


def test_finetune_without_a_file_leaves_out_what_a_task_scores(tmp_path: Path, small: dict[str, Path]) -> None:
    pytest.importorskip("tsdata")
    module = example("finetune_with_trainer")
    (task,) = module.find_tasks(["tourism"])
    series, horizon = module.load_series("tourism")
    assert horizon == task.horizon
    for values, whole in zip(series, task.source.read(24).values(), strict=True):
        np.testing.assert_array_equal(values, whole.to_numpy()[:-horizon])


def tiny(family: str, tiny_config: Any, tiny_chronos_config: Any, mixed_ranks: Any) -> PreTrainedModel:
    if family == "bolt":
        return bolt(**BOLT_RANKS)
    config = tiny_config(**mixed_ranks, chronos_config=vars(tiny_chronos_config).copy())
    return randomise(LowRankT5ForConditionalGeneration(config))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bolt"])
def test_two_processes_do_what_one_does_with_batches_twice_as_large(
    tmp_path: Path, sales: Path, family: str, tiny_config: Any, tiny_chronos_config: Any, mixed_ranks: Any
) -> None:
    tiny(family, tiny_config, tiny_chronos_config, mixed_ranks).save_pretrained(tmp_path / "tiny")
    script, options = EXAMPLES / "finetune_with_trainer.py", ["--data", sales, "--steps", 2, "--eval-steps", 1]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    run_script(sys.executable, *launch, script, tmp_path / "tiny", tmp_path / "two", *options, "--batch-size", 2)
    run("finetune_with_trainer", tmp_path / "tiny", tmp_path / "one", *options, "--batch-size", 4)
    forecasts(tmp_path / "two")
    two, one = (
        BaseChronosPipeline.from_pretrained(tmp_path / name).inner_model.state_dict() for name in ("two", "one")
    )
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    two, one = (
        json.loads((tmp_path / name / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
        for name in ("two", "one")
    )
    compared = set()
    for row, other in zip(two["log_history"], one["log_history"], strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "rank/mean.vo"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-3), name
            compared.add(name)
    assert compared == {"loss", "grad_norm", "eval_loss", "rank/mean.vo"}


def test_tables_are_made_again_in_their_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, document = example("results"), tmp_path / "card.md"
    text = "One\n\n<!-- results: sizes -->\n| | WQL | MASE |\n|---|---|---|\n| a | 1 | 2 |\n| b | 3 | 4 |\n\nTwo | three\n"
    document.write_text(text)
    module.DOCUMENTS = (document,)
    module.TABLES = {"sizes": lambda _: [["", "WQL", "MASE"], ["a", "1", "2.5"], ["c", "3", "4"]]}
    said = "card.md, sizes: a, MASE: 2 -> 2.5\ncard.md, sizes: c: new\ncard.md, sizes: b: gone\n"
    module.main(None, folder=tmp_path / "runs", check=True)
    assert (capsys.readouterr().out, document.read_text()) == (said, text)
    module.main(["sizes"], folder=tmp_path / "runs", check=False)
    assert capsys.readouterr().out == said
    assert document.read_text() == text.replace("| a | 1 | 2 |\n| b | 3 | 4 |", "| a | 1 | 2.5 |\n| c | 3 | 4 |")
    module.main(["sizes"], folder=tmp_path / "runs", check=False)
    assert capsys.readouterr().out == ""


def test_every_table_that_is_made_again_has_one_place() -> None:
    module = example("results")
    marked = [
        name
        for document in module.DOCUMENTS
        for name in re.findall(r"<!-- results: (\S+) -->", document.read_text(encoding="utf-8"))
    ]
    assert sorted(marked) == sorted(module.TABLES)
