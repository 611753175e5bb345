"""The picture holds the series and each model's own forecast at its own times; what cannot be drawn is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from hf_lowrank import compress_pretrained, forecast_frame, plot_forecasts
from hf_lowrank.checkpoints.pipelines import as_pipeline

matplotlib = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore:Keeping")

HORIZON = 5


def series(item: str, freq: str, length: int = 60) -> pd.DataFrame:
    times = pd.date_range("2020-01-01", periods=length, freq=freq)
    return pd.DataFrame({"item_id": item, "timestamp": times, "target": 10 + np.sin(np.arange(length) / 3)})


FRAME = pd.concat([series("a $b$ <c>", "D"), series("monthly", "MS"), series("third", "D")], ignore_index=True)


@pytest.fixture
def small(bolt):
    return compress_pretrained(bolt, uniform=2, calibration=None)


def lines(axis: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axis.get_lines()]


def test_each_model_has_its_fan_at_the_times_of_its_forecast(bolt, small) -> None:
    before = matplotlib.get_backend()
    options = {"horizon": HORIZON, "quantiles": (0.2, 0.5, 0.7)}
    figure = plot_forecasts(bolt, small, FRAME, items=2, history=12, names=("large", "little"), **options)
    assert [axis.get_title() for axis in figure.axes] == ["a $b$ <c>", "monthly"]
    for axis, (item, freq) in zip(figure.axes, (("a $b$ <c>", "D"), ("monthly", "MS"))):
        past = FRAME[FRAME["item_id"] == item]
        drawn = lines(axis)
        np.testing.assert_array_equal(drawn[0][0], past["timestamp"].to_numpy()[-12:])
        np.testing.assert_array_equal(drawn[0][1], past["target"].to_numpy()[-12:])
        times = pd.date_range(past["timestamp"].iloc[-1], periods=HORIZON + 1, freq=freq)[1:]
        fans = {}
        for name, model in (("large", bolt), ("little", small)):
            table = forecast_frame(as_pipeline(model), past, **options)
            fans[name] = [table[level].to_numpy() for level in ("0.5", "0.2", "0.7")]
        found = [line for line in drawn if len(line[0]) == HORIZON]
        for (x, y), wanted in zip(found, fans["large"] + fans["little"], strict=True):
            np.testing.assert_array_equal(x, times)
            np.testing.assert_allclose(y, wanted, rtol=1e-4)
        assert not np.allclose(fans["large"][0], fans["little"][0])
        assert len(axis.collections) == 2  # the bands
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["observed", "large: median, 50 % interval", "little: median, 50 % interval"]
    figure.canvas.draw()  # no sign of a name is mathematics
    assert matplotlib.pyplot.get_fignums() == []
    assert matplotlib.get_backend() == before


def test_the_future_is_drawn_where_it_is_given(bolt, small) -> None:
    is_future = FRAME.groupby("item_id").cumcount(ascending=False) < HORIZON
    future = FRAME[is_future & (FRAME["item_id"] == "monthly")].iloc[:3]
    items = ["monthly", "third"]
    figure = plot_forecasts(bolt, small, FRAME[~is_future], future=future, items=items, horizon=HORIZON, history=7)
    known, unknown = (lines(axis)[0] for axis in figure.axes)
    whole = FRAME[FRAME["item_id"] == "monthly"]["target"].to_numpy()[-7 - HORIZON :]
    np.testing.assert_array_equal(known[1], [*whole[:10], np.nan, np.nan])
    assert len(unknown[0]) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": 0}, "items must be at least 1, or the names of series, found 0"),
        ({"items": ["first"]}, "items must be series of frame, found 'first'; it has 'a .b. <c>', 'monthly', 'third'"),
        ({"items": []}, "items must name at least one series"),
        ({"history": 0}, "history must be at least 1, found 0"),
        ({"horizon": 0}, "horizon must be at least 1, found 0"),
        ({"quantiles": (0.9, 0.5, 0.1)}, r"quantiles must be three numbers that grow, .* found \(0.9, 0.5, 0.1\)"),
        ({"names": ("a", "a")}, "names must be two different names"),
        ({"frame": FRAME.assign(target=np.nan)}, "frame has no value of item_id 'a"),
        ({"frame": FRAME.drop(columns="target")}, "frame has no column target"),
        ({"future": FRAME}, "future has no value of item_id 'a .* at the times of its forecast, 2020-03-01"),
        ({"compressed": 3}, "compressed must be a Chronos checkpoint, dense or compressed .*, found a int"),
    ],
)
def test_what_cannot_be_drawn_is_said(bolt, changes: dict[str, Any], message: str) -> None:
    arguments = {"dense": bolt, "compressed": bolt, "frame": FRAME, "horizon": HORIZON} | changes
    with pytest.raises(ValueError, match=message):
        plot_forecasts(**arguments)
