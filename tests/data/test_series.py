"""Series in any shape: what they are read as, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf_lowrank.data.series import read_series

NAN = float("nan")


def long_frame(series: dict[str, list[float]]) -> pd.DataFrame:
    """In long format, the rows in no order."""
    rows = [
        (item, time, value)
        for item, values in series.items()
        for time, value in zip(pd.date_range("2020-01-01", periods=len(values)), values)
    ]
    return pd.DataFrame(rows, columns=["item_id", "timestamp", "target"]).sample(frac=1, random_state=0)


def test_every_shape_of_series_reads_the_same(tmp_path: Path):
    wanted = [np.array([1.0, NAN, 3.0]), np.array([5.0, 6.0, 7.0])]
    lists = [[1.0, None, 3.0], [5, 6, 7]]
    frame = long_frame({"a": [1.0, NAN, 3.0], "b": [5.0, 6.0, 7.0]})
    frame.to_csv(tmp_path / "series.csv", index=False)
    frame.to_parquet(tmp_path / "series.parquet")
    shapes = [
        wanted,
        tuple(wanted),
        lists,
        [torch.tensor(wanted[0], requires_grad=True), torch.tensor(wanted[1]).bfloat16()],
        [pd.Series(wanted[0]), pd.Series([5, 6, 7], dtype="Int64")],
        np.stack(wanted),
        torch.tensor(np.stack(wanted), dtype=torch.float16),
        pd.Series(lists),
        [{"target": values, "id": i} for i, values in enumerate(lists)],
        frame,
        tmp_path / "series.csv",
        str(tmp_path / "series.parquet"),
    ]
    for data in shapes:
        found = read_series(data)
        assert [values.dtype for values in found] == [np.float64] * 2
        np.testing.assert_array_equal(found, wanted)
    for one in (wanted[0], torch.tensor(wanted[0]), pd.Series(wanted[0])):
        np.testing.assert_array_equal(read_series(one), wanted[:1])


@pytest.mark.parametrize("form", [None, "torch"])
def test_a_dataset_reads_as_its_targets(form: str | None):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"target": [[1.0, None, 3.0], [5, 6, 7]], "id": ["a", "b"]}).with_format(form)
    np.testing.assert_array_equal(read_series(rows), [[1.0, NAN, 3.0], [5.0, 6.0, 7.0]])


def test_series_that_are_all_missing_are_left_out_aloud():
    with pytest.warns(UserWarning, match="2 of 3 series have no observed value"):
        found = read_series([[NAN, NAN], [1.0], []])
    assert [[*values] for values in found] == [[1.0]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "series is empty"),
        (torch.zeros(0, 5), "series is empty"),
        (torch.zeros(2, 3, 4), r"\(time,\) or \(batch, time\), found \(2, 3, 4\)"),
        ([1.0, [2.0]], r"item 0 must have one dimension, time; found shape \(\)"),
        ([[1.0], np.zeros((2, 2))], r"item 1 must have one dimension, time; found shape \(2, 2\)"),
        ([[1.0, float("inf")]], "item 0 holds the value inf at step 1"),
        ([np.array([1.0, -1e39])], "item 0 holds the value -1e.39 at step 1, infinite in float32"),
        ([["a", "b"]], "item 0 must be a 1-D array of numbers"),
        ([[NAN], [NAN, NAN]], "all values of all 2 series are missing"),
        ([{"value": [1.0]}], "item 0 has no target; found value"),
        ({"a": [1.0]}, "found a dict"),
        (7, "found a int"),
        (pd.DataFrame({"item_id": [1], "target": [1.0]}), "series: the DataFrame has no column timestamp"),
        (
            long_frame({"a": [1.0, float("inf")]}),
            "target of item_id 'a' of series: the DataFrame must be finite .* found inf at timestamp 2020-01-02",
        ),
        (pd.concat([long_frame({"a": [1.0]})] * 2), "series: the DataFrame has duplicate timestamps"),
        ("series.txt", "series must end in .csv or .parquet, found 'series.txt'"),
    ],
)
def test_what_is_no_series_is_an_error_that_says_so(data, message):
    with pytest.raises(ValueError, match=message):
        read_series(data)


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_series(tmp_path / "none.csv")
    (tmp_path / "odd.csv").write_text("item_id,value\na,1\n")
    with pytest.raises(
        ValueError, match=r"series: file 'odd\.csv' has no column timestamp, target; found item_id, value"
    ):
        read_series(tmp_path / "odd.csv")


def test_reading_series_imports_no_optional_package():
    code = "import sys, hf_lowrank.data.windows; assert not {'fev', 'datasets', 'gluonts'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_series_may_be_a_list_of_numbers() -> None:
    (values,) = read_series([1, None, 2.5, float("nan")])
    np.testing.assert_array_equal(values, [1, np.nan, 2.5, np.nan])


@pytest.mark.parametrize(
    "index", [pd.date_range("2024", periods=3)[::-1], pd.period_range("2024", periods=3, freq="M")[::-1]]
)
def test_a_wide_frame_is_a_series_a_column_in_the_order_of_time(index) -> None:
    series = read_series(pd.DataFrame({"a": [3, 2, 1], 7: [np.nan, 0.5, 4.0]}, index=index))
    np.testing.assert_array_equal(series, [[1, 2, 3], [4, 0.5, np.nan]])


def test_what_may_be_a_long_frame_is_no_wide_one() -> None:
    times = pd.date_range("2024", periods=2)
    for frame in (
        pd.DataFrame({"a": [1, 2]}),
        pd.DataFrame({"a": ["x", "y"]}, index=times),
        pd.DataFrame({"item_id": [1, 1], "b": [1, 2]}, index=times),
    ):
        with pytest.raises(ValueError, match=r"has no column .*; a wide DataFrame has times as its index and numbers"):
            read_series(frame)
