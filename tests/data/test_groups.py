"""Groups of series from tables: whose rows are whose, and categories as a forecast sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chronos.chronos2.preprocess import from_data_frame

from hf_lowrank import GroupedSeries

NAN = float("nan")
HORIZON = 6


@pytest.fixture
def frame() -> pd.DataFrame:
    """Three items of unlike lengths, two targets, covariates of every kind, and gaps; rows of one item follow each other."""
    rng = np.random.default_rng(0)
    parts = []
    for item, length in (("b", 40), ("a", 55), ("c", 31)):
        columns = {
            "shop": item,
            "day": pd.date_range("2024-01-01", periods=length),
            "sold": rng.normal(5, 1, length),
            "returned": rng.normal(size=length),
            "visitors": rng.integers(100, size=length),
            "weather": rng.choice(["sun", "rain", None], size=length),
            "price": rng.normal(size=length),
            "is_holiday": rng.random(length) < 0.3,
        }
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    table.loc[rng.choice(len(table), 12, replace=False), "sold"] = NAN
    table.loc[table.groupby("shop").tail(1).index, "sold"] = 4.0  # the last is observed: nothing is cut off
    table["weather"] = table["weather"].astype(pd.CategoricalDtype(["snow", "sun", "rain"]))
    return table


ROLES = {
    "past_covariates": ["visitors", "weather"],
    "known_covariates": ["price", "is_holiday"],
    "id_column": "shop",
    "timestamp_column": "day",
}


@pytest.mark.parametrize("targets", [["sold"], ["sold", "returned"]])
def test_categories_are_what_predict_df_makes_of_them(frame, targets):
    unused = [name for name in ("returned",) if name not in targets]
    frame = frame.drop(columns=unused)
    groups = GroupedSeries(frame.sample(frac=1, random_state=1), targets, **ROLES).groups
    by_item = {group.num_steps: group for group in groups}
    assert len(by_item) == 3
    ends = frame.groupby("shop").tail(HORIZON).index
    past = frame.drop(ends)
    future = frame.loc[ends].drop(columns=[*targets, *ROLES["past_covariates"]])
    wanted = from_data_frame(past, targets, HORIZON, future, id_column="shop", timestamp_column="day")
    for item in wanted:
        length = item["context"].shape[1]
        group = by_item[length + HORIZON]
        window = group.window(0, length, group.num_steps)
        np.testing.assert_allclose(window[:, :length], item["context"], rtol=1e-5)
        is_known = ~np.isnan(item["future_covariates"].numpy()).all(axis=1)
        assert np.array_equal(is_known, group.is_known)
        np.testing.assert_allclose(window[is_known, length:], item["future_covariates"][is_known], rtol=1e-5)
        np.testing.assert_array_equal(group.window(7, length, group.num_steps), window[:, 7:])


def test_what_comes_later_changes_no_encoding(frame):
    (group,) = GroupedSeries(frame[frame["shop"] == "a"], "sold", **ROLES).groups
    later = frame[frame["shop"] == "a"].copy()
    later.loc[later.index[30:], "sold"] += 100
    (other,) = GroupedSeries(later, "sold", **ROLES).groups
    np.testing.assert_array_equal(group.window(0, 30, 40)[1:], other.window(0, 30, 40)[1:])
    assert not np.array_equal(group.window(0, 31, 40)[2], other.window(0, 31, 40)[2])


def test_a_file_holds_the_same_groups(frame, tmp_path: Path):
    frame = frame.drop(columns="weather").assign(weather=frame["weather"].astype(object))
    whole = GroupedSeries(frame, "sold", **ROLES).groups
    frame.assign(more="x").to_csv(tmp_path / "sales.csv", index=False)
    frame.sample(frac=1, random_state=0).sort_values("shop", key=lambda item: item != "b", kind="stable").to_parquet(
        tmp_path / "sales.parquet"
    )
    for name in ("sales.csv", "sales.parquet"):
        read = GroupedSeries(tmp_path / name, "sold", **ROLES).groups
        for group in whole:
            (same,) = (one for one in read if one.num_steps == group.num_steps)
            np.testing.assert_allclose(same.values, group.values)
            assert np.array_equal(same.is_category, group.is_category)


def test_steps_behind_the_last_target_and_items_without_one_are_left_out(frame):
    frame.loc[frame["shop"] == "c", "sold"] = NAN
    ends = frame[frame["shop"] == "a"].index[-5:]
    frame.loc[ends, "sold"] = NAN
    with pytest.warns(UserWarning, match="1 of 3 items have no observed value of sold and are left out"):
        series = GroupedSeries(frame, "sold", **ROLES)
    assert [group.num_steps for group in series.groups] == [40, 50]
    assert repr(series) == "GroupedSeries(2 groups of 1 target, 2 past covariates, 2 known covariates)"
    with pytest.raises(ValueError, match="holds no observed value of sold in 1 items"):
        GroupedSeries(frame[frame["shop"] == "c"], "sold", **ROLES)


def test_what_a_table_lacks_is_named(frame, tmp_path: Path):
    for arguments, message in (
        ({"target": "revenue"}, "the DataFrame has no column revenue; found shop, day, sold"),
        ({"target": []}, "target must name at least one column"),
        ({"target": 3}, "target must be the name of a column or a list of names, found 3"),
        ({"target": ["sold", "price"]}, "must name different columns, found price twice"),
        (
            {"target": "weather", "past_covariates": ()},
            "weather of shop 'b' of series: the DataFrame must be a number",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            GroupedSeries(frame, **(ROLES | arguments))
    frame.loc[3, "price"] = np.inf
    with pytest.raises(ValueError, match=r"price of shop 'b' .* must be finite in float32"):
        GroupedSeries(frame, "sold", **ROLES)
    with pytest.raises(ValueError, match=r"must be a DataFrame or the path .*, found a list"):
        GroupedSeries([1.0])
    with pytest.raises(FileNotFoundError, match=r"no.csv' does not exist"):
        GroupedSeries(tmp_path / "no.csv")
