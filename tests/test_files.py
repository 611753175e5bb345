"""Files and folders appear whole or not at all, and JSON is JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.files import as_json, check_output, new_folder, write_json, write_text

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
    with pytest.raises(ZeroDivisionError), new_folder(output, overwrite=True):
        raise ZeroDivisionError
    assert [path.name for path in output.iterdir()] == ["first"]
    with new_folder(output, overwrite=True) as folder:
        (folder / "second").touch()
    assert [path.name for path in output.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        check_output(output / "second")
