"""The command line: what it writes, what it prints for programs, and how it fails."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import hf_lowrank
from hf_lowrank import calibrate, loss_curve
from hf_lowrank.cli.app import app
from hf_lowrank.cli.compression import calibration_data
from hf_lowrank.cli.options import columns_of
from hf_lowrank.compression import latency_bench

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def dense_folder(chronos_t5, tmp_path: Path) -> Path:
    chronos_t5.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def stored_parameters(folder: Path) -> int:
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return sum(tensor.numel() for tensor in tensors.values())


def test_compress_writes_what_its_json_says(dense_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        "compress", dense_folder, tmp_path / "small", "--ratio", "0.5", "--form", "cross=latent", "--json", "-"
    )
    assert code == 0
    report = json.loads(out)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small")
    assert isinstance(model, hf_lowrank.LowRankT5ForConditionalGeneration)
    assert stored_parameters(tmp_path / "small") == report["parameters"] == model.num_parameters()
    assert stored_parameters(dense_folder) == report["dense_parameters"]
    assert report["attention_ratio"] <= 0.5
    assert report["compression"] == model.config.compression
    kinds = {row["kind"]: set(row["ranks"]) for row in report["layers"]}
    assert kinds["cross"] == {"latent", "query", "output"}
    assert kinds["encoder_self"] == {"qk", "vo"}
    assert report["totals"]["parameters"] == sum(row["parameters"] for row in report["layers"])


def test_compress_prints_every_changed_layer(dense_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("compress", dense_folder, tmp_path / "small", "--uniform", "3")
    assert code == 0
    for layer in ("encoder_self 0", "encoder_self 1", "decoder_self 1", "cross 1"):
        assert layer in out
    assert "qk 3/8" in out


def test_every_policy_is_an_option(dense_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "ranks.json"
    table.write_text(json.dumps({"cross": [{"qk": 2, "vo": 3}] * 2}))
    policies = {
        "epsilon": ("--epsilon", "0.1"),
        "energy": ("--energy", "0.05"),
        "uniform": ("--uniform", "4"),
        "schedule": ("--base-rank", "2", "--rank-growth", "0.5", "--rank-rounding", "pow2"),
        "ranks": ("--ranks", table),
    }
    for name, options in policies.items():
        code, out, err = run(
            "compress", dense_folder, tmp_path / name, *options, "--calibration", "none", "--json", "-"
        )
        assert code == 0, err
        assert json.loads(out)["compression"]["policy"] == name


def test_the_papers_method_says_that_it_saves_nothing(dense_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("compress", dense_folder, tmp_path / "paper", "--ratio", "0.5", "--method", "paper")
    assert code == 0
    assert "nothing is smaller" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibration", "none"), "Say how much to keep, as in total_ratio=0.5"),
        (("--max-loss", "0"), "max_loss must be a positive number, such as 0.01 for 1 %, found 0.0"),
        (("--max-loss", "0.1", "--ratio", "0.5"), "max_loss finds how small a model can be: leave out ratio"),
        (("--ratio", "0.5", "--quantize", "int3"), "quantize must be None, 'int8' or 'int4', found 'int3'"),
        (("--ratio", "0.5", "--dtype", "int8"), "dtype must be one of auto, float32, bfloat16, float16, found 'int8'"),
        (("--ratio", "0.5", "--device", "abacus"), "device must be"),
        (("--ratio", "0.5", "--form", "cross=latent,time"), "--form must be a form or KIND=FORM,..."),
        (("--ratio", "0.5", "--id-column", "shop"), "are of a file of series; --calibration is 'synthetic'"),
        (("--ratio", "0.5", "--save-calibration", "no/such.safetensors"), "--save-calibration must be a .safetensors"),
        (("--ratio", "0.001"), "ratio=0.001 is too small"),
        (("--ranks", __file__), "--ranks must be a JSON file of ranks, such as {"),
        (("--ratio", "0.5", "--uniform", "2"), "ratio and uniform"),
        (("--ratio", "1.5"), "ratio must be in (0, 1], found 1.5"),
        (("--uniform", "99"), "uniform must be an integer in [1, 8]"),
        (("--rank-growth", "0.3"), "--base-rank"),
        (("--ratio", "0.5", "--form", "dense"), "form must be"),
        (("--ratio", "0.5", "--method", "svd"), "method must be"),
        (("--ranks", "no-such-file.json"), "no-such-file.json"),
    ],
)
def test_a_bad_argument_is_one_line_and_writes_nothing(
    dense_folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, out, err = run("compress", dense_folder, tmp_path / "small", *options)
    assert code == 1
    assert out == ""
    (line,) = err.splitlines()  # before any progress
    assert line.startswith("error: ")
    assert message in line
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_an_existing_output_is_kept_unless_told_otherwise(dense_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    code, _, err = run("compress", dense_folder, output, "--uniform", "3")
    assert code == 1
    assert "--overwrite" in err
    assert (output / "mine.txt").read_text() == "precious"
    code, _, err = run("compress", dense_folder, output, "--uniform", "3", "--overwrite")
    assert code == 1
    assert "is never replaced" in err
    shutil.copytree(dense_folder, output, dirs_exist_ok=True)
    code, _, _ = run("compress", dense_folder, output, "--uniform", "3", "--overwrite")
    assert code == 0
    assert not (output / "mine.txt").exists()
    assert (output / "model.safetensors").exists()


def test_a_loss_worth_a_warning_reaches_the_user(dense_folder: Path, tmp_path: Path) -> None:
    code, _, err = run("compress", dense_folder, tmp_path / "small", "--ratio", "0.15", "--calibration", "none")
    assert code == 0
    assert "warning: " in err
    assert "expected to drop" in err


def test_a_plan_says_the_sizes_and_writes_nothing(dense_folder: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", dense_folder, "--plan", "--ratio", "0.4")
    assert code == 0
    assert "at most" in out
    assert err == ""
    for rule in (("--uniform", "3", "--form", "cross=latent"), ("--base-rank", "2", "--rank-growth", "0.5")):
        _, out, _ = run("compress", dense_folder, "--plan", *rule, "--json", "-")
        planned = {size["name"]: size for size in json.loads(out)["sizes"]}
        assert {path.name for path in tmp_path.iterdir()} == {"dense"}
        _, out, _ = run("compress", dense_folder, tmp_path / "small", *rule, "--calibration", "none", "--json", "-")
        assert planned["all parameters"]["at_most"] == json.loads(out)["parameters"]
        assert planned["all parameters"]["dense"] == json.loads(out)["dense_parameters"]
        assert all(size["is_exact"] for size in planned.values())
        shutil.rmtree(tmp_path / "small")
    code, _, err = run("compress", dense_folder, "--ratio", "0.4")
    assert code == 1
    assert "OUTPUT is missing" in err


def test_a_bound_on_the_loss_and_integers(dense_folder: Path, tmp_path: Path) -> None:
    """One calibration on a file serves the curve, and the search that finds a point of it."""
    saved = tmp_path / "calibration.safetensors"
    calibrate(dense_folder, num_batches=2, num_held_out_batches=2).save(saved)
    measured = ("--calibration", saved)
    code, out, err = run("compress", dense_folder, "--curve", "--no-refit", *measured, "--json", "-")
    assert code == 0, err
    curve = json.loads(out)["curve"]
    assert [one["total_ratio"] for one in curve] == [1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08]
    assert curve[0]["loss"] < 1e-6 < curve[-1]["loss"]
    [half] = loss_curve(dense_folder, [0.5], calibration=saved, refit=False)
    assert curve[2] == pytest.approx(half.to_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"dense", saved.name}
    code, out, err = run("compress", dense_folder, tmp_path / "small", "--max-loss", "0.2", *measured)
    assert code == 0, err
    assert "Expected loss added" in out
    assert out.count("(taken)") == 1
    code, out, err = run(
        "compress",
        dense_folder,
        tmp_path / "int8",
        "--max-loss",
        "0.2",
        "--quantize",
        "int8",
        *measured,
        "--json",
        "-",
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["compression"]["arguments"] == {"max_loss": 0.2}
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    assert report["bytes"] == sum(one.numel() * one.element_size() for one in weights.values())
    assert sum(row["bytes"] for row in report["layers"]) < report["totals"]["parameters"] * 4
    _, _, err = run("compress", dense_folder, "--curve", "--max-loss", "0.1")
    assert "--curve tries sizes of its own" in err
    _, _, err = run("compress", dense_folder, "--curve", "--save-calibration", saved)
    assert "--save-calibration is of a compression: leave out --plan and --curve" in err


def test_the_aim_of_a_speedup_is_said_beside_what_was_achieved(
    dense_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(latency_bench, "SECONDS", 0.0)
    monkeypatch.setattr(latency_bench, "LEAST_ROUNDS", 1)
    code, out, err = run(
        "compress", dense_folder, tmp_path / "fast", "--target-speedup", "0.1", "--calibration", "none"
    )
    assert code == 0, err
    assert re.search(
        r"A forecast in torch \(batch .* was to be 0\.1 times as fast: predicted 1\.00, measured \d\.\d\d \(",
        " ".join(out.split()),
    )
    _, _, err = run("compress", dense_folder, tmp_path / "other", "--target-speedup", "2", "--backend", "onnx")
    assert "model must be a Chronos-Bolt or a Chronos-2" in err
    _, _, err = run("compress", dense_folder, tmp_path / "max", "--target-speedup", "max")
    assert "target_speedup='max' is as fast as max_loss allows" in err


def test_dtype_and_columns_are_options(dense_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "sales.csv"
    days = [f"2024-01-{day:02d},{shop},{day}.5" for shop in ("a", "b") for day in range(1, 30)]
    data.write_text("day,shop,sold\n" + "\n".join(days))
    columns = ("--id-column", "shop", "--timestamp-column", "day", "--target", "sold")
    command = (
        "compress",
        dense_folder,
        tmp_path / "small",
        "--uniform",
        "3",
        "--calibration",
        data,
        "--dtype",
        "bfloat16",
    )
    code, _, err = run(*command)
    assert code == 1
    assert "has no column item_id" in err
    code, out, err = run(*command, *columns, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["compression"]["calibration"]["data"] == "2 series"
    assert {tensor.dtype for tensor in load_file(tmp_path / "small" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads(out)["bytes"] == 2 * stored_parameters(tmp_path / "small")


def test_columns_make_groups_of_a_file(chronos2, tmp_path: Path) -> None:
    chronos2.save_pretrained(tmp_path / "dense")
    data = tmp_path / "sales.csv"
    days = [
        f"2024-{month:02d}-{day:02d},{shop},{day * month % 7},{day}.5,{'rain' if day % 3 else 'sun'}"
        for shop in ("a", "b")
        for month in (1, 2, 3)
        for day in range(1, 29)
    ]
    data.write_text("timestamp,shop,sold,price,weather\n" + "\n".join(days))
    columns = [
        "--id-column",
        "shop",
        "--target",
        "sold",
        "--known-covariates",
        "price",
        "--past-covariates",
        "weather",
    ]
    wanted = "2 groups of 1 target, 1 past covariate, 1 known covariate"
    told = columns_of(["sold"], ["weather"], ["price"], "shop", "timestamp")
    assert calibration_data(str(data), told).description == wanted
    compress = ("compress", tmp_path / "dense", "--uniform", "3", "--calibration", data, *columns)
    code, _, err = run(*compress, "--plan")
    assert code == 0, err
    code, _, err = run(*compress, "--target", "revenue", "--plan")
    assert code == 1
    assert "sales.csv' has no column revenue; found timestamp, shop, sold, price, weather" in err
    training = (*columns, "--steps", 1, "--workers", 0, "--batch-tokens", 64, "--json", "-")
    code, out, err = run("pretrain", tmp_path / "new", "--start", tmp_path / "dense", "--data", data, *training)
    assert code == 0, err
    assert json.loads(out)["data"] == wanted
    code, _, err = run("pretrain", tmp_path / "other", *columns, "--plan")
    assert code == 1
    assert "are of a file of series; --data is 'synthetic'" in err
