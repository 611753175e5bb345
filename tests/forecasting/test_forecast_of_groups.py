"""Forecasts of several targets and covariates: those of predict_df, of a table or a file; and errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from chronos import BaseChronosPipeline, Chronos2Pipeline
from chronos_models import CHRONOS2_RANKS
from chronos_models import chronos2 as low_rank_chronos2
from test_forecast import Interrupted, interrupt, write
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained, forecast_file, forecast_frame
from hf_lowrank.checkpoints.loading import checkpoint_path
from hf_lowrank.checkpoints.pipelines import QUANTILE_LEVELS, as_pipeline
from hf_lowrank.cli.app import app

pytest.importorskip("pyarrow")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NEAR = {"rtol": 1e-4, "atol": 1e-4}  # of a random model, which multiplies rounding
HORIZON = 5
KNOWN = ["price", "promo", "day"]
TARGETS = ["sold", "back"]
COVARIATES: dict[str, Any] = {"past_covariates": ["visits"], "known_covariates": KNOWN}
LENGTHS = [30, 70, 8, 45]


def tables(lengths: list[int] = LENGTHS, horizon: int = HORIZON) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The past and the future of items of these lengths: two targets, a covariate of the past, and known ones of each kind; some are missing."""
    rng = np.random.default_rng(0)
    frames = []
    for number, length in enumerate(lengths):
        steps = length + horizon
        price = rng.normal(size=steps)
        day = rng.choice(["sun", "holiday", "market"], steps).astype(object)
        day[rng.random(steps) < 0.3] = None
        frame = pd.DataFrame(
            {
                "item_id": f"s{(7 * number) % 10}",
                "timestamp": pd.date_range("2024-01-01", periods=steps, freq="h") + pd.Timedelta(hours=number),
                "sold": 10 + rng.normal(size=steps).cumsum() + 3 * price,
                "back": rng.normal(size=steps),
                "visits": rng.normal(size=steps),
                "price": price,
                "promo": rng.random(steps) < 0.3,
                "day": day,
            }
        )
        frame.loc[2:3, "sold"], frame.loc[[4, length], "price"], frame.loc[5, "visits"] = np.nan, np.nan, np.nan
        frame["is_future"] = frame.index >= length
        frames.append(frame)
    together = pd.concat(frames, ignore_index=True)
    is_future = together.pop("is_future")
    future = together.loc[is_future, ["item_id", "timestamp", *KNOWN]]
    return together[~is_future].reset_index(drop=True), future.reset_index(drop=True)


PAST, FUTURE = tables()


def wanted(
    pipeline: BaseChronosPipeline, targets: list[str], past: pd.DataFrame = PAST, **options: Any
) -> pd.DataFrame:
    """What chronos forecasts, which takes every column for a covariate that is no target."""
    others = [name for name in TARGETS if name not in targets]
    options = {"future_df": FUTURE, "prediction_length": HORIZON} | options
    return pipeline.predict_df(past.drop(columns=others), target=targets, **options)


def assert_same(found: pd.DataFrame, expected: pd.DataFrame, tolerance: dict[str, float] = NEAR) -> None:
    pd.testing.assert_frame_equal(found, expected.astype({"timestamp": found["timestamp"].dtype}), **tolerance)


@pytest.fixture(scope="module")
def trained() -> Chronos2Pipeline:
    return BaseChronosPipeline.from_pretrained(checkpoint_path("reference-2"), dtype="float32")


@pytest.fixture
def tiny() -> BaseChronosPipeline:
    """A tiny random low-rank Chronos-2: context 40, horizon 15."""
    return as_pipeline(low_rank_chronos2(**CHRONOS2_RANKS))


# ---- The same forecasts ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Keeping")
@pytest.mark.parametrize("is_compressed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_trained_model_forecasts_groups_as_predict_df_does(trained, is_compressed: bool) -> None:
    model = compress_pretrained(trained.model, uniform=8, calibration=None) if is_compressed else trained.model
    pipeline = Chronos2Pipeline(model)
    found = forecast_frame(pipeline, PAST, FUTURE, horizon=HORIZON, target=TARGETS, **COVARIATES)
    assert_same(found, wanted(pipeline, TARGETS), CLOSE)


@pytest.mark.parametrize("targets", [["sold"], TARGETS], ids=len)
@pytest.mark.parametrize("is_dense", [False, True])
def test_groups_are_forecast_as_predict_df_does(tiny, chronos2, targets: list[str], is_dense: bool) -> None:
    """However they are batched, and where the context is less than the past that categories are encoded by."""
    for pipeline in (Chronos2Pipeline(chronos2),) if is_dense else (tiny, Chronos2Pipeline(tiny.model)):
        options = {"target": targets, "horizon": HORIZON, **COVARIATES}
        expected = wanted(pipeline, targets)
        assert_same(forecast_frame(pipeline, PAST, FUTURE[::-1], **options, batch_size=1), expected)
        shuffled = PAST.sample(frac=1, random_state=1)
        expected = wanted(pipeline, targets, shuffled, context_length=20)
        assert_same(forecast_frame(pipeline, shuffled, FUTURE, **options, context_length=20), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"past_covariates": ["visits", "day", "promo"]},
        {"known_covariates": ["day"], "quantiles": [0.15, 0.5]},
        {"known_covariates": ["price"], "horizon": 20},  # beyond what the model forecasts at once
        {"target": TARGETS},
    ],
)
@pytest.mark.filterwarnings("ignore:We recommend")
def test_every_kind_of_group_is_forecast_as_predict_df_does(tiny, options: dict[str, Any]) -> None:
    options = {"target": ["sold"], "horizon": HORIZON, "quantiles": [0.1, 0.5]} | options
    past, future = tables(horizon=options["horizon"])
    known = options.get("known_covariates", [])
    expected = tiny.predict_df(
        past[["item_id", "timestamp", *options["target"], *options.get("past_covariates", []), *known]],
        future[["item_id", "timestamp", *known]] if known else None,
        target=options["target"],
        prediction_length=options["horizon"],
        quantile_levels=options["quantiles"],
    )
    assert_same(forecast_frame(tiny, past, future if known else None, **options), expected)


def test_a_covariate_that_does_not_vary_says_nothing(tiny) -> None:
    """Where its mean is rounded, chronos makes a series of ones of it, or minus ones, which depends on the batch."""
    is_seen = PAST["visits"] > 0
    options = {"target": "sold", "horizon": HORIZON, "past_covariates": "visits"}
    expected = tiny.predict_df(
        PAST[["item_id", "timestamp", "sold"]].assign(visits=np.where(is_seen, 0.0, np.nan)),
        prediction_length=HORIZON,
        target="sold",
    )
    for batch_size, value in ((1, 9.7), (32, 0.1)):
        past = PAST.assign(visits=np.where(is_seen, value, np.nan))
        assert_same(forecast_frame(tiny, past, batch_size=batch_size, **options), expected)


def test_the_last_rows_may_tell_what_is_known(tmp_path: Path, tiny) -> None:
    table = pd.concat([PAST, FUTURE]).sort_values(["item_id", "timestamp"], ignore_index=True)
    options = {"target": TARGETS, "horizon": HORIZON, **COVARIATES}
    expected = forecast_frame(tiny, PAST.sort_values(["item_id", "timestamp"]), FUTURE, **options)
    assert_same(forecast_frame(tiny, table, **options), expected)
    forecast_file(tiny, write(table, tmp_path / "in.csv"), tmp_path / "out.parquet", chunk_rows=50, **options)
    assert_same(pd.read_parquet(tmp_path / "out.parquet"), expected)
    new = table[:HORIZON].assign(item_id="new", sold=np.nan, back=np.nan)  # an item without a past
    with pytest.warns(UserWarning, match="2 of 10 series have no value"):
        assert_same(forecast_frame(tiny, pd.concat([table, new]), **options), expected)


def test_a_group_is_forecast_in_units_that_float32_can_hold(tiny) -> None:
    options = {"target": TARGETS, "horizon": HORIZON, "past_covariates": "visits", "known_covariates": "price"}
    alone = forecast_frame(tiny, PAST, FUTURE, **options)
    unit = 2.0**100
    sizes = {"sold": unit, "visits": unit, "price": 1 / unit}
    past, future = PAST.copy(), FUTURE.copy()
    is_big, is_big_later = past["item_id"] == "s7", future["item_id"] == "s7"
    for name, size in sizes.items():
        past.loc[is_big, name] *= size
    future.loc[is_big_later, "price"] /= unit
    found = forecast_frame(tiny, past, future, **options)
    is_sized = (found["item_id"] == "s7") & (found["target_name"] == "sold")
    found.loc[is_sized, found.columns[3:]] /= unit
    assert_same(found, alone)


@pytest.mark.parametrize("family", ["chronos_t5", "bolt"])
def test_other_models_forecast_each_target_by_itself(
    tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    pipeline = as_pipeline(request.getfixturevalue(family))
    options = {"horizon": HORIZON} | ({"num_samples": 3} if family == "chronos_t5" else {})
    past = PAST.assign(back=PAST["back"].where(PAST["item_id"] != "s7"))
    with pytest.warns(UserWarning, match="1 of 8 series have no value"):
        found = forecast_frame(pipeline, past, target=TARGETS, **options)
    for name in TARGETS:
        one = past if name == "sold" else past[past["item_id"] != "s7"]
        expected = forecast_frame(pipeline, one, target=name, **options)
        assert_same(found[found["target_name"] == name].reset_index(drop=True), expected)
    assert list(found["target_name"][: 2 * HORIZON]) == ["sold"] * HORIZON + ["back"] * HORIZON
    summary = forecast_file(
        pipeline, write(past, tmp_path / "in.csv"), tmp_path / "out.parquet", target=TARGETS, **options
    )
    assert (summary.num_series, summary.left_out) == (8, ["s7, back"])
    assert_same(pd.read_parquet(tmp_path / "out.parquet"), found)
    with pytest.raises(ValueError, match=r"are for Chronos-2, .*Found visits, price, promo, day"):
        forecast_frame(pipeline, PAST, FUTURE, **options, target="sold", **COVARIATES)


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "known", "targets"),
    [(".csv", ".csv", TARGETS), (".parquet", ".parquet", TARGETS), (".csv", ".parquet", ["sold"])],
)
def test_a_file_is_forecast_as_its_table(tmp_path: Path, tiny, source: str, known: str, targets: list[str]) -> None:
    """In chunks that lack some categories."""
    past = PAST.assign(day=PAST["day"].where((PAST["item_id"] != "s0") | (PAST["day"] != "market"), "sun"))
    size = pd.Categorical(np.where(past["price"] > 0, "tall", "low"), ["tall", "mid", "low"])
    past = past.assign(size=size)
    options = {"target": targets, "horizon": HORIZON, "past_covariates": ["visits", "size"], "known_covariates": KNOWN}
    path = write(past, tmp_path / f"in{source}", **({} if source == ".csv" else {"row_group_size": 40}))
    future = write(FUTURE[::-1], tmp_path / f"future{known}")
    forecast_file(tiny, path, tmp_path / "out.parquet", future=future, chunk_rows=20, **options)
    # In a CSV file a category has no order of its own.
    table = past.assign(size=past["size"].astype(str)) if source == ".csv" else past
    assert_same(pd.read_parquet(tmp_path / "out.parquet"), forecast_frame(tiny, table, FUTURE, **options))
    assert_same(forecast_frame(tiny, table, FUTURE, **options), wanted(tiny, targets, table))


def test_categories_may_be_written_as_numbers(tmp_path: Path, tiny) -> None:
    """A column of a CSV file is one of numbers where all are, not those of a chunk or of the future alone."""
    code = pd.Series(np.where(PAST["item_id"] == "s1", "x", np.where(PAST["back"] > 0, "7", "8")))
    past, future = PAST.assign(day=code), FUTURE.assign(day="7")
    options = {"target": "sold", "horizon": HORIZON, "known_covariates": "day"}
    expected = forecast_frame(tiny, past, future, **options)
    paths = write(past, tmp_path / "in.csv"), tmp_path / "out.parquet"
    forecast_file(tiny, *paths, future=write(future, tmp_path / "future.csv"), chunk_rows=20, **options)
    assert_same(pd.read_parquet(paths[1]), expected)


def test_an_interrupted_run_with_covariates_goes_on_to_the_same_file(tmp_path: Path, tiny) -> None:
    path, future = write(PAST, tmp_path / "in.csv"), write(FUTURE, tmp_path / "future.csv")
    options = {
        "target": TARGETS,
        "horizon": HORIZON,
        "future": future,
        "chunk_rows": 20,
        "batch_size": 1,
        **COVARIATES,
    }
    forecast_file(as_pipeline(tiny.model), path, tmp_path / "whole.parquet", **options)
    stopping = as_pipeline(tiny.model)
    Interrupted(stopping, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        forecast_file(stopping, path, tmp_path / "cut.parquet", **options)
    with pytest.raises(ValueError, match=r"differs: columns.past_covariates was"):
        forecast_file(as_pipeline(tiny.model), path, tmp_path / "cut.parquet", **options | {"past_covariates": []})
    summary = forecast_file(as_pipeline(tiny.model), path, tmp_path / "cut.parquet", **options)
    assert (summary.num_resumed, summary.num_series) == (4, 8)
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    Interrupted(stopping, 10, interrupt)
    with pytest.raises(KeyboardInterrupt):
        forecast_file(stopping, path, tmp_path / "cut.parquet", overwrite=True, **options)
    os.utime(future, (0, 0))
    with pytest.raises(ValueError, match=r"differs: future.modified_ns was"):
        forecast_file(as_pipeline(tiny.model), path, tmp_path / "cut.parquet", overwrite=True, **options)


def test_a_future_that_changes_meanwhile_is_an_error(tmp_path: Path, tiny) -> None:
    path, future = write(PAST, tmp_path / "in.csv"), write(FUTURE, tmp_path / "future.csv")
    pipeline = as_pipeline(tiny.model)
    Interrupted(pipeline, 0, lambda: os.utime(future, (0, 0)))
    with pytest.raises(ValueError, match=r"future: file 'future.csv' must stay as it is while it is read"):
        forecast_file(
            pipeline, path, tmp_path / "out.csv", future=future, target="sold", horizon=HORIZON, **COVARIATES
        )


# ---- Errors ----------------------------------------------------------------------------------------------------------


def unchanged(frame: pd.DataFrame) -> pd.DataFrame:
    return frame


@pytest.mark.parametrize(
    ("past", "future", "message"),
    [
        (
            lambda f: f.drop(columns="visits"),
            unchanged,
            "has no column visits; found item_id, timestamp, sold, back, price",
        ),
        (lambda f: f.assign(price=np.inf), unchanged, "price of item_id 's0' of .* must be finite in float32"),
        (
            lambda f: f.assign(day=f["timestamp"]),
            unchanged,
            r"day of .* must be numbers or categories .*, found (datetime64|timestamp)",
        ),
        (lambda f: f.assign(back="x"), unchanged, "back of item_id 's0' of .* must be a number, found 'x'"),
        (
            unchanged,
            lambda f: f.drop(columns="day"),
            "future.* has no column day; found item_id, timestamp, price, promo",
        ),
        (unchanged, lambda f: f[:0], r"future.* must hold (the next 5 times of every item|values of price), found no"),
        (
            unchanged,
            lambda f: f[5:],
            "future.* must have the next 5 times of item_id 's0', .*; found none, but of 's7'",
        ),
        (unchanged, lambda f: f.drop(index=7), "times of item_id 's7', from .* to .*; 2024-01-0.* is missing"),
        (
            unchanged,
            lambda f: pd.concat([f, f[:1].assign(timestamp=f["timestamp"].max())]),
            "the next 5 times of item_id 's0', .*; found 2024-01-0.* as well",
        ),
        (
            unchanged,
            lambda f: f.assign(timestamp=f["timestamp"] + pd.Timedelta("30min")),
            "the next 5 times of item_id 's0', .* is missing",
        ),
        (unchanged, lambda f: pd.concat([f, f[:1]]), "item_id 's0' of future.* has duplicate timestamps"),
        (unchanged, lambda f: pd.concat([f, f[:5].assign(item_id="new")]), "found item_id 'new', which has no past"),
        (unchanged, lambda f: f.assign(item_id=f["item_id"].where(f.index > 5)), "future.* rows without item_id"),
        (
            unchanged,
            lambda f: f.assign(timestamp=f["timestamp"].where(f.index > 5)),
            "of future.* has a row without a timestamp",
        ),
        (unchanged, lambda f: f.assign(price=np.nan), "future.* must hold values of price, found none in 20 rows"),
        (
            unchanged,
            lambda f: f.assign(price="dear"),
            "price of item_id 's0' of future.* must be a number, found 'dear'",
        ),
        (unchanged, lambda f: f.assign(day=1.5), "day of future.* must be categories as in the input, found numbers"),
    ],
)
def test_a_bad_table_is_an_error_that_names_it(
    tmp_path: Path,
    tiny,
    past: Callable[[pd.DataFrame], pd.DataFrame],
    future: Callable[[pd.DataFrame], pd.DataFrame],
    message: str,
) -> None:
    before, after = past(PAST), future(FUTURE)
    options = {"target": TARGETS, "horizon": HORIZON, **COVARIATES}
    with pytest.raises(ValueError, match=message):
        forecast_frame(tiny, before, after, **options)
    paths = write(before, tmp_path / "in.parquet"), tmp_path / "out.csv"
    with pytest.raises(ValueError, match=message):
        forecast_file(tiny, *paths, future=write(after, tmp_path / "future.parquet"), chunk_rows=50, **options)
    assert sorted(os.listdir(tmp_path)) == ["future.parquet", "in.parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": []}, "target must name at least one column, found none"),
        ({"past_covariates": ["sold"]}, "must name different columns, found sold twice"),
        ({"known_covariates": []}, "future tells the known covariates; name its columns of them as known_covariates"),
        ({"future": "none.csv"}, "future: file 'none.csv' does not exist"),
        ({"future": "in.txt"}, "future must end in .csv or .parquet, found 'in.txt'"),
        ({"future": None}, "item_id 's0' .* must end in 5 rows, the horizon, that hold price, promo, day .* found 0"),
        ({"output": "future.csv", "overwrite": True}, "output must be another file than future"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(
    tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(PAST, Path("in.csv"))
    write(FUTURE, Path("future.csv"))
    arguments = {"input": "in.csv", "output": "out.csv", "future": "future.csv", "target": TARGETS, "horizon": HORIZON}
    with pytest.raises((ValueError, OSError), match=message):
        forecast_file(tiny, **arguments | COVARIATES | options)
    assert sorted(os.listdir()) == ["future.csv", "in.csv"]


def test_categories_must_differ_as_text(tiny) -> None:
    with pytest.raises(ValueError, match=r"day of frame must have categories that differ as text, found '1' twice"):
        forecast_frame(
            tiny,
            PAST.assign(day=[1, "1"] * (len(PAST) // 2) + [1] * (len(PAST) % 2)),
            target="sold",
            past_covariates="day",
        )


# ---- The command line ------------------------------------------------------------------------------------------------


def test_the_command_takes_each_column_by_an_option(tmp_path: Path, tiny) -> None:
    path, future = write(PAST, tmp_path / "in.csv"), write(FUTURE, tmp_path / "future.parquet")
    tiny.save_pretrained(tmp_path / "model")
    command = [
        "forecast",
        str(tmp_path / "model"),
        str(path),
        str(tmp_path / "out.parquet"),
        "--horizon",
        str(HORIZON),
    ]
    command += ["--future", str(future), "--device", "cpu", "--past-covariates", "visits"]
    for option, names in (("--target", TARGETS), ("--known-covariates", KNOWN)):
        command += [word for name in names for word in (option, name)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert "40 rows, forecasts of 8 series" in result.stdout
    expected = wanted(tiny, TARGETS, quantile_levels=QUANTILE_LEVELS)
    assert_same(pd.read_parquet(tmp_path / "out.parquet"), expected)
