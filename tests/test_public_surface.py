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
    assert {name for names in seen.values() for name in names} | {"__version__"} == set(hf_lowrank.__all__)


def run(code: str) -> list[str]:
    """What a fresh process prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_import_and_the_help_load_nothing_of_the_work() -> None:
    code = (
        "import sys; before = set(sys.modules); import hf_lowrank; print(*set(sys.modules) - before, end=' | ')\n"
        "from typer.testing import CliRunner; from hf_lowrank.cli.app import COMMANDS, app\n"
        "for command in [None, *(one.__name__ for one in COMMANDS)]:\n"
        "    result = CliRunner().invoke(app, [*filter(None, [command]), '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.stdout\n"
        "print(*sys.modules)"
    )
    printed = run(code)
    imported, helped = printed[: printed.index("|")], printed[printed.index("|") + 1 :]
    assert {name for name in imported if name.startswith("hf_lowrank")} == {"hf_lowrank"}
    heavy = {"chronos", "matplotlib", "numpy", "pandas", "scipy", "torch", "transformers"}
    assert not heavy & {*imported, *helped}
    own = {name.split(".")[1] for name in helped if name.startswith("hf_lowrank.")}
    assert own == {"cli", "files", "interrupts"}


CONFIG = "lowrank_t5 lowrank_chronos_bolt lowrank_chronos2"


@pytest.mark.parametrize(
    "code",
    [
        "import hf_lowrank, transformers",
        "import hf_lowrank; from chronos import BaseChronosPipeline",
        "import hf_lowrank.models.modeling_lowrank_t5",
    ],
)
def test_the_classes_are_registered_whatever_is_imported_next(code: str) -> None:
    # What others look for in a module, its file, code and loader, is as ever.
    code += (
        f"; import chronos, transformers, inspect; print(*(transformers.AutoConfig.for_model(name).model_type for name in '{CONFIG}'.split()),"
        "'LowRankChronos2Model' in vars(chronos.chronos2), 'LowRankChronosBoltModelForForecasting' in vars(chronos.chronos_bolt),"
        "'hf_lowrank' in inspect.getsource(chronos), type(chronos.__spec__.loader).__name__)"
    )
    assert run(code) == [*CONFIG.split(), "True", "True", "False", "SourceFileLoader"]
