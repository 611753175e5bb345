"""Progress is shown where it is wanted or where somebody watches, and names in it are as they were written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import hf_lowrank.progress as module
from hf_lowrank.progress import progress, progress_display


@pytest.mark.parametrize("name", ["[/b]", "[red]x", "[bold]"])
def test_names_are_no_markup(name, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_display(show=None) as display:
        display.update(display.add_task("", total=1), description=f"{name}: dense")
        display.refresh()
    assert f"{name}: dense" in capsys.readouterr().err


@pytest.mark.parametrize("show", [None, False])
def test_nobody_watches_a_pipe(show, capsys):
    assert list(progress(range(3), "Working", show)) == [0, 1, 2]
    with progress_display(show=show) as display:
        display.advance(display.add_task("Working", total=1))
    assert capsys.readouterr() == ("", "")


def test_a_log_says_how_far_long_work_is_and_what_is_left(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    rich_clock = [100.0]
    with progress_display(show=True) as display:
        display.get_time = lambda: rich_clock[0]
        task = display.add_task("[/b] dense", total=4)
        for _ in range(3):
            rich_clock[0] += 10
            display.advance(task)
    assert capsys.readouterr().err.splitlines() == ["[/b] dense: 2 of 4 after 0:00:20, about 0:00:20 left"]
    assert list(progress(range(3), "Working", True)) == [0, 1, 2]
    assert "Working: " in capsys.readouterr().err


def test_a_notebook_shows_a_bar_that_goes_away() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = "import sys, time\nsys.modules['ipywidgets'] = None\nfrom hf_lowrank.progress import *\n"
    code += "for _ in progress(range(3), 'Working <hard>', None): time.sleep(0.25)\n"
    code += "with progress_display(show=False) as silent: silent.advance(silent.add_task('Never'))"
    shown: list[dict[str, str]] = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, index):
            shown.append(message["content"].get("data", {}))
            return super().process_message(message, cell, index)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    Client(notebook, timeout=120, kernel_name="python3").execute()
    bars = [data["text/plain"] for data in shown if "text/plain" in data]
    assert [f" {step}/3 " in bar for step, bar in enumerate(bars[:-1])] == [True] * 4
    assert all("Working <hard>" in bar for bar in bars[:-1])
    assert all("Working &lt;hard&gt;" in data["text/html"] for data in shown if data.get("text/plain"))
    assert [output["data"] for output in notebook.cells[0].outputs] == [{"text/plain": "", "text/html": ""}]
