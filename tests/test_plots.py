"""Pictures are written, hold what they are given, and leave no state behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hf_lowrank.plots import COLOURS, Curve, Forecast, Panel, draw_forecasts, plot_pareto

matplotlib = pytest.importorskip("matplotlib")


def relative_luminance(colour: str) -> float:
    """Of an sRGB colour, as WCAG 2 defines it."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_the_first_colours_differ_in_print_as_well() -> None:
    first, second = (relative_luminance(colour) for colour in COLOURS[:2])
    assert abs(first - second) > 0.05
    assert len(set(COLOURS)) == len(COLOURS)


@pytest.mark.parametrize("count", [1, 3])
def test_forecast_panels(tmp_path: Path, count: int) -> None:
    ahead = np.linspace(0, 1, 5)
    panel = Panel("a series", np.arange(20.0), ahead, (Forecast("dense", ahead - 1, ahead, ahead + 1),))
    draw_forecasts([panel] * count).savefig(tmp_path / "panels.svg")
    drawing = (tmp_path / "panels.svg").read_text()
    assert drawing.count("<!-- a series -->") == count
    assert "dense: median, 80 % interval" in drawing
    assert matplotlib.pyplot.get_fignums() == []


def test_pareto_curves(tmp_path: Path) -> None:
    ratios, scores = (0.4, 0.15), (1.01, 1.9)
    measured = [Curve("ours", ratios, scores, (1.0, 1.7), (1.02, 2.1)), Curve("theirs", ratios, (1.2, 4.0))]
    plot_pareto(measured, [Curve("published", ratios, (1.0, 2.0))], tmp_path / "pareto.svg", title="A sweep")
    drawing = (tmp_path / "pareto.svg").read_text()
    for text in ("ours", "theirs", "published", "A sweep", "40%", "15%"):
        assert f"<!-- {text} -->" in drawing
    assert matplotlib.pyplot.get_fignums() == []
