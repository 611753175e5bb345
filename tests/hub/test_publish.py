"""publish: every stage once, whatever cuts a run off, and a commit that says what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chronos_models
import numpy as np
import pandas as pd
import pytest
from hub_server import Hub, serve_this_process
from typer.testing import CliRunner

from hf_lowrank import CompressionSettings, file_task, plan_publication, publish
from hf_lowrank.cli.app import app
from hf_lowrank.hub import publish as stages

pytest.importorskip("fev")

REPO = "ann/small"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Keeping", "ignore:We recommend keeping prediction length"),
    pytest.mark.usefixtures("evaluation_caches"),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_this_process({"hf_ann": "ann"}, tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source") / "tiny-bolt"
    model = chronos_models.dense_bolt()
    model.config.chronos_pipeline_class = "ChronosBoltPipeline"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """Of a publication of seconds, all of it in `tmp_path / "made"`."""
    steps = np.arange(60)
    stamps = pd.date_range("2020-01-01", periods=60, freq="h")
    frames = [
        pd.DataFrame({"item_id": item, "timestamp": stamps, "target": np.sin(steps / (2 + item)) + steps / 50})
        for item in range(3)
    ]
    pd.concat(frames).to_csv(tmp_path / "series.csv", index=False)
    task = file_task(tmp_path / "series.csv", horizon=4)
    return {"folder": tmp_path / "made", "total_ratio": 0.5, "calibration": None, "tasks": task, "repeats": 1}


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_stage_is_done_once_and_the_card_says_what_was_measured(
    hub: Hub, source: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no time")

    def done() -> list[bool]:
        return [stage.is_done for stage in plan_publication(source, REPO, **options).stages]

    assert done() == [False, False, False, False]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "benchmark", fail)
        with pytest.raises(OSError, match="no time"):
            publish(source, REPO, token="hf_ann", **options)
    assert done() == [True, True, False, False]
    before = content(options["folder"])
    assert not hub.repositories

    with monkeypatch.context() as patch:  # it goes on where it was cut off
        for stage in ("compress_pretrained", "evaluate"):
            patch.setattr(stages, stage, fail)
        made = publish(source, REPO, token="hf_ann", **options)
    assert made.commit is not None
    after = content(options["folder"])
    assert {path: after[path] for path in before} == before
    (speed,) = json.loads(made.benchmark.read_text())["results"]
    scores = {row["model"]: row for row in json.loads(made.evaluation.read_text())["results"]}
    card = hub.repositories[REPO].files["README.md"].decode()
    for text in (f"{scores['compressed']['WQL']:.4f}", f"{speed['time_ratio']['median']:.3f} (", "total_ratio=0.5"):
        assert text in card

    with monkeypatch.context() as patch:
        patch.setattr(stages, "benchmark", fail)
        again = publish(source, REPO, token="hf_ann", **options)
        assert again.commit is not None
        assert again.commit.oid == made.commit.oid
        other = options | {"total_ratio": 0.4}
        with pytest.raises(ValueError, match=r"settings\.total_ratio was 0\.5, is 0\.4"):
            publish(source, **other)
        assert content(made.folder) == after
        with pytest.raises(OSError, match="no time"):
            publish(source, resume=False, **other)
    config = json.loads((made.model / "config.json").read_text())
    assert config["compression"]["arguments"] == {"total_ratio": 0.4}


def test_a_folder_of_something_else_is_left_alone(source: str, options: dict[str, Any]) -> None:
    options["folder"].mkdir()
    (options["folder"] / "publication.json").write_text("[]")
    before = content(options["folder"])
    with pytest.raises(FileExistsError, match="publication"):
        publish(source, **options)
    assert content(options["folder"]) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "a/b/c"}, "repo_id must be"),
        ({"settings": CompressionSettings(ratio=0.5)}, "Give either settings or total_ratio, calibration"),
        ({"method": "paper", "total_ratio": None, "uniform": 4}, "nothing to publish"),
        ({"tasks": "nothing"}, "tasks must name known tasks"),
        ({"total_ratio": 0.001}, "total_ratio=0.001 is too small"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    source: str, options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        publish(source, **options | arguments)
    assert not options["folder"].exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(source: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    command = ["publish", source, "--folder", str(folder), "--total-ratio", "0.5", "--push", REPO, "--dry-run"]
    result = CliRunner().invoke(app, [*command, "--evaluate", "m1_yearly,ercot", "--json", "-"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert not folder.exists()
    seconds = {stage["name"]: stage["seconds"] for stage in plan["stages"]}
    assert list(seconds) == ["compress", "evaluate", "bench", "push"]
    assert seconds["evaluate"] is None  # the data of one of the tasks are on the Hub
    assert seconds["compress"] > 0
    assert seconds["bench"] > 0
    assert plan["sizes"]["bytes_at_most"] < plan["sizes"]["dense_bytes"]
