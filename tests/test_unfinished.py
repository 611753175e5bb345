"""Unfinished runs: the same one goes on, another one is told what differs, and a folder of somebody else is left alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hf_lowrank.unfinished import UnfinishedRun

RECORD: dict[str, Any] = {"steps": 3, "data": None, "options": {"freq": "h", "levels": [0.1, 0.5]}}


@pytest.fixture
def run(tmp_path: Path) -> UnfinishedRun:
    return UnfinishedRun.beside(tmp_path / "out", "parts", "run.json")


def test_the_same_run_goes_on_and_its_folder_is_beside_the_output(run: UnfinishedRun, tmp_path: Path) -> None:
    assert run.recorded(RECORD, resume=True) is None
    run.begin(RECORD | {"contents": 7})
    assert os.listdir(tmp_path) == ["out.parts"]
    same = RECORD | {"options": {"levels": (0.1, 0.5), "freq": "h"}}  # as it was before it was written
    assert run.recorded(same, resume=True) == RECORD | {"contents": 7}
    run.remove()
    run.remove()
    assert os.listdir(tmp_path) == []


def test_another_run_is_told_all_that_differs(run: UnfinishedRun) -> None:
    run.begin(RECORD)
    other = RECORD | {"steps": 4, "options": {"freq": "D", "levels": [0.1, 0.5], "seed": 1}}
    with pytest.raises(ValueError, match=r"resume: .*out.parts holds an unfinished run that differs: ") as caught:
        run.recorded(other, resume=True)
    assert "options.freq was 'h', is 'D'; options.seed was None, is 1; steps was 3, is 4. Give" in str(caught.value)


def test_a_run_begins_anew_in_place_of_another(run: UnfinishedRun) -> None:
    run.begin(RECORD)
    (run.folder / "part").touch()
    other = RECORD | {"steps": 4}
    assert run.recorded(other, resume=False) is None
    assert (run.folder / "part").exists()
    run.begin(other)
    assert os.listdir(run.folder) == ["run.json"]
    assert run.recorded(other, resume=True) == other


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), ("{", "Expecting"), ("[]", "it holds a list"), ('{"mine": 1}', "it has none of steps")],
)
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_somebody_else_is_left_alone(
    run: UnfinishedRun, content: str | None, reason: str, resume: bool
) -> None:
    run.folder.mkdir()
    if content is not None:
        (run.folder / "run.json").write_text(content)
    before = os.listdir(run.folder)
    with pytest.raises(FileExistsError, match=f"output: .*must be the folder of an unfinished run.*{reason}"):
        run.recorded(RECORD, resume=resume)
    assert os.listdir(run.folder) == before
