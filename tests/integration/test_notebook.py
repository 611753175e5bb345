"""The notebook of the examples runs whole, offline, and ends on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_server import serve, serve_this_process

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "own_series.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


def test_without_a_token_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push = code_cells(nbformat.read(NOTEBOOK, as_version=4))[-1].source
    with serve_this_process({}, tmp_path, monkeypatch) as hub:
        exec(push, {})
    assert "log in with `hf auth login`" in capsys.readouterr().out
    assert not hub.requests


@pytest.mark.slow
def test_it_runs_from_a_table_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"HF_TOKEN": "hf_ann", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    settings |= {"TRANSFORMERS_VERBOSITY": "error", "IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with serve({"hf_ann": "ann"}) as hub:
        for name, value in (settings | {"HF_ENDPOINT": hub.url}).items():
            monkeypatch.setenv(name, value)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        repository = hub.repositories["ann/chronos-lowrank"]
    assert repository.private
    assert repository.files["model.safetensors"] == (tmp_path / "chronos-lowrank" / "model.safetensors").read_bytes()

    shown = [{kind for output in cell.outputs for kind in output.get("data", {})} for cell in code_cells(notebook)]
    assert [sum("text/html" in kinds for kinds in shown), sum("image/png" in kinds for kinds in shown)] == [5, 1]
    (picture,) = (cell for cell in code_cells(notebook) if "plot_forecasts" in cell.source)
    assert len(picture.outputs) == 1  # once, and no warning
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    (said,) = (output.text for output in outputs if output.get("name") == "stdout")
    assert f"{hub.url}/ann/chronos-lowrank/commit/" in said
