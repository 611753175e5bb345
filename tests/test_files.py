"""Files and folders appear whole or not at all, and JSON is JSON."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_lowrank import files
from hf_lowrank.files import (
    alone,
    as_json,
    check_output,
    locked,
    new_file,
    new_folder,
    tidy,
    without_folders,
    write_json,
    write_text,
)

TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def undefined_as_none(value):
    if isinstance(value, dict):
        return {key: undefined_as_none(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [undefined_as_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(TREES)
def test_json_has_no_nan(content):
    def never(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(as_json(content), parse_constant=never) == undefined_as_none(content)


def test_a_file_is_what_it_was_or_what_it_will_be(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": (1, float("nan"))})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_complete_or_as_before(tmp_path):
    output = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), new_folder(output) as folder:  # noqa: PT012
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(output) as folder:
        (folder / "first").touch()
    with pytest.raises(FileExistsError, match="is a folder that is not empty"):
        check_output(output)
    with pytest.raises(ZeroDivisionError), new_folder(output, overwrite=True, is_replaceable=lambda _: True):
        raise ZeroDivisionError
    assert [path.name for path in output.iterdir()] == ["first"]
    with new_folder(output, overwrite=True, is_replaceable=lambda _: True) as folder:
        (folder / "second").touch()
    assert [path.name for path in output.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        check_output(output / "second")


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize(
    ("umask", "folders", "others"), [(0o077, 0o700, 0o600), (0o022, 0o755, 0o644), (0o002, 0o775, 0o664)]
)
def test_the_umask_says_who_may_read(tmp_path, umask, folders, others):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "deep" / "model") as folder:
            (folder / "inner").mkdir()
            save_file({"a": torch.zeros(2)}, folder / "inner" / "model.safetensors")
        write_text(tmp_path / "deep" / "text", "x")
        with new_file(tmp_path / "deep" / "tensors") as part:
            save_file({"a": torch.zeros(2)}, part)
    finally:
        os.umask(before)
    for path in (tmp_path / "deep").rglob("*"):
        assert path.stat().st_mode & 0o777 == (folders if path.is_dir() else others), path


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    output = tmp_path / "model"
    with new_folder(output) as folder:
        (folder / "first").touch()
    replace, calls = os.replace, []

    def fail_at_the_second(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise PermissionError("no")
        replace(old, new)

    monkeypatch.setattr(files.os, "replace", fail_at_the_second)
    with pytest.raises(PermissionError), new_folder(output, overwrite=True, is_replaceable=lambda _: True):
        pass
    assert [path.name for path in output.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.skipif(files.fcntl is None, reason="nothing is tidied on this system")
def test_what_a_living_run_is_at_work_in_stays(tmp_path, monkeypatch):
    """Even where its lock is not seen: another user, another cache, another machine."""
    output = tmp_path / "model"
    with new_folder(output) as folder:
        monkeypatch.setattr(files, "HF_HOME", str(tmp_path / "another"))
        tidy(output)
        assert folder.exists()
    assert output.exists()
    left = tmp_path / ".model-unfinished-dead"
    left.mkdir()
    tidy(output)
    assert not left.exists()
    left.mkdir()
    monkeypatch.setattr(files.os, "open", lambda *_: (_ for _ in ()).throw(PermissionError("another user's")))
    files._tidy(output)
    assert left.exists()


def test_a_lock_is_that_of_the_file_and_not_of_its_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    real, link = tmp_path / "real" / "out", tmp_path / "link" / "out"
    with locked(real), pytest.raises(OSError, match="another run is writing to"), locked(link):
        pass
    with locked(tmp_path / "link" / "out"), locked(tmp_path / "real" / "other"):
        pass
    with alone(real), pytest.raises(OSError, match=f"another run is writing to .*{link.name};"), alone(link):
        pass
    with alone(real), new_folder(real):  # the work itself may write
        pass


def test_locks_need_no_cache_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(files, "HF_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with locked(tmp_path / "out"), pytest.raises(OSError, match="another run is writing to"), locked(tmp_path / "out"):
        pass


def test_only_models_are_replaced(tmp_path):
    """Never a folder of documents, and never a folder of models."""
    for name in ("home/docs/letter.txt", "models/one/config.json", "models/one/model.safetensors", "half/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("home", "home/docs", "models", "half"):
        with pytest.raises(FileExistsError, match="is never replaced"):
            check_output(tmp_path / name, overwrite=True)
    check_output(tmp_path / "models" / "one", overwrite=True)


def test_of_a_path_of_this_machine_the_last_part_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run").touch()
    given = {
        "absolute": "/home/ann/run",
        "there": "logs/run",
        "path": tmp_path / "x",
        "deep": [{"a": "/a/b"}, 3, None],
    }
    assert without_folders(given | {"repository": "ann/run", "word": "cosine"}) == {
        "absolute": "run",
        "there": "run",
        "path": "x",
        "deep": [{"a": "b"}, 3, None],
        "repository": "ann/run",
        "word": "cosine",
    }
