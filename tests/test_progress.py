"""Progress is shown where it is wanted or where somebody watches, and names in it are as they were written."""

from __future__ import annotations

import pytest

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
