"""What `import hf_lowrank` offers, and what it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import hf_lowrank

SOURCE = ast.parse(Path(hf_lowrank.__file__).read_text())


def test_every_name_resolves_and_is_listed() -> None:
    assert hf_lowrank.__all__ == sorted(hf_lowrank.__all__)
    assert dir(hf_lowrank) == sorted(hf_lowrank.__all__)
    for name in hf_lowrank.__all__:
        assert getattr(hf_lowrank, name) is getattr(hf_lowrank, name)
    assert hf_lowrank.__version__ == version("hf-lowrank")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'hf_lowrank' has no attribute 'compres_pretrained'"):
        _ = hf_lowrank.compres_pretrained
    with pytest.raises(ImportError, match="cannot import name 'compres_pretrained'"):
        exec("from hf_lowrank import compres_pretrained")


def test_type_checkers_see_what_is_imported_lazily() -> None:
    (block,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    seen = {
        f".{node.module}": tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == hf_lowrank._LAZY
    eager = {
        alias.name
        for node in SOURCE.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    lazy = {name for names in seen.values() for name in names}
    assert eager | lazy | {"__version__"} == set(hf_lowrank.__all__)


def test_the_import_loads_the_models_alone() -> None:
    code = (
        "import sys, chronos, transformers; before = set(sys.modules); import hf_lowrank;"
        "print(*{name for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    own = {name for name in loaded if name.startswith("hf_lowrank.")}
    assert {name.split(".")[1] for name in own} == {"models"}
    assert {name.split(".")[0] for name in loaded} <= {"hf_lowrank", "transformers", "chronos", "torch"}
