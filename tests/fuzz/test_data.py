"""Faults in the user's data, seeded: each gives the forecasts of the data without it, or one line that names file, series and time.

The default suite tries each fault once; `pytest -m fuzz -n 0 -s tests/fuzz/test_data.py` a thousand times in random files, and prints how
many came to which end.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from chronos import BaseChronosPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_lowrank import forecast_file, forecast_frame, read_series
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.evaluation.sources import SeriesFile

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

HORIZON = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 in batches of other sizes
ODD_NAMES = [
    "NA",
    "null",
    "None",
    "nan",
    "007",
    "1e5",
    "True",
    "[/b]",
    "[red]x",
    "a,b",
    'q"q',
    " a ",
    "é",
    "a\0b",
    "a\0c",
    "😀",
    "-",
]


@pytest.fixture(scope="module")
def tiny() -> BaseChronosPipeline:
    import torch
    from chronos_models import bolt

    torch.manual_seed(0)
    return as_pipeline(bolt())


def long_frame(rng: np.random.Generator, freq: str = "D") -> pd.DataFrame:
    """Two to four series of 8 to 40 steps."""
    frames = []
    for number in range(rng.integers(2, 5)):
        length = int(rng.integers(8, 41))
        times = pd.date_range("2024-01-01", periods=length, freq=freq)
        target = (10 + rng.normal(size=length).cumsum()).round(3)
        frames.append(pd.DataFrame({"item_id": f"s{number}", "timestamp": times, "target": target}))
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class Case:
    """A file's table, and what must come of it.

    `table` is what is written, `clean` the same data in plain types, whose forecasts are wanted; None where `message` is. `freq` is
    given to the forecast, and `text` in place of a table is what a CSV file holds.
    """

    table: pd.DataFrame | Any = None
    clean: pd.DataFrame | None = None
    message: str | None = None
    suffixes: tuple[str, ...] = (".csv", ".parquet")
    text: bytes | None = None
    freq: str | None = None
    forecast_only: bool = False  # what else reads series has no quarrel with it


def row_of(rng: np.random.Generator, frame: pd.DataFrame) -> int:
    return int(rng.integers(2, len(frame)))


def of(frame: pd.DataFrame, row: int) -> str:
    """How a message names the series of a row."""
    return rf"item_id '{frame['item_id'][row]}'"


def changed(frame: pd.DataFrame, column: str, row: int, value: Any) -> pd.DataFrame:
    table = frame.astype({column: object})
    table.loc[row, column] = value
    return table


FAULTS: dict[str, Callable[[np.random.Generator, pd.DataFrame], Case]] = {}


def fault(make: Callable[[np.random.Generator, pd.DataFrame], Case]) -> Callable[..., Case]:
    FAULTS[make.__name__] = make
    return make


# ---- Items -----------------------------------------------------------------------------------------------------------


def with_items(frame: pd.DataFrame, items: list[Any]) -> pd.DataFrame:
    names = list(frame["item_id"].unique())
    return frame.assign(item_id=pd.Series([items[names.index(name)] for name in frame["item_id"]], index=frame.index))


@fault
def odd_names(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    table = with_items(frame, list(rng.permutation(ODD_NAMES)))
    return Case(table, table)


def typed_items(name: str, items: Callable[[int], Any], arrow: Any) -> None:
    def make(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
        values = [items(i) for i in range(4)]
        numbers = frame["item_id"].str[1:].astype(int)
        plain = frame.assign(item_id=pd.Series([values[i] for i in numbers], index=frame.index, dtype=object))
        table = pa.Table.from_pandas(frame.drop(columns="item_id"), preserve_index=False)
        table = table.append_column("item_id", pa.array(list(plain["item_id"]), type=arrow))
        if pa.types.is_nested(arrow):
            return Case(table, message=r"must have text, numbers or dates as item_id, found ", suffixes=(".parquet",))
        return Case(table, plain, suffixes=(".parquet",))

    make.__name__ = f"items_{name}"
    FAULTS[make.__name__] = make


typed_items("int8", lambda i: i - 2, pa.int8())
typed_items("uint64", lambda i: 2**63 + i, pa.uint64())
typed_items("float", lambda i: i + 0.5, pa.float32())
typed_items("decimal", lambda i: decimal.Decimal(i) / 4, pa.decimal128(9, 2))
typed_items("date", lambda i: datetime.date(2024, 1, 1 + i), pa.date32())
typed_items("timestamp", lambda i: datetime.datetime(2024, 1, 1, i), pa.timestamp("ms"))
typed_items("zoned", lambda i: pd.Timestamp(2024, 1, 1, i, tz="Europe/Oslo"), pa.timestamp("us", tz="Europe/Oslo"))
typed_items("time", lambda i: datetime.time(i), pa.time64("us"))
typed_items("duration", lambda i: datetime.timedelta(hours=i), pa.duration("s"))
typed_items("binary", lambda i: bytes([0, i]), pa.binary())
typed_items("large_string", lambda i: f"é{i}", pa.large_string())
typed_items("dictionary", lambda i: f"k{i}", pa.dictionary(pa.int8(), pa.string()))
typed_items("list", lambda i: [i, i], pa.list_(pa.int64()))
typed_items("struct", lambda i: {"shop": i}, pa.struct([("shop", pa.int64())]))
typed_items("map", lambda i: [("shop", i)], pa.map_(pa.string(), pa.int64()))


@fault
def items_bool(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    table = frame[frame["item_id"].isin(["s0", "s1"])]
    table = table.assign(item_id=table["item_id"] == "s1")
    return Case(table, table, suffixes=(".parquet",))


@fault
def item_missing(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    row = row_of(rng, frame)
    return Case(changed(frame, "item_id", row, None), message=rf"rows without item_id.* row {row + 1}\.")


@fault
def item_again(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    later = frame[frame["item_id"] == "s0"].assign(timestamp=lambda t: t["timestamp"] + pd.Timedelta("60D"))
    table = pd.concat([frame, later], ignore_index=True)
    return Case(
        table,
        message=rf"found item_id 's0' again in row {len(frame) + 1} |item_id 's0' of .* has irregular timestamps",
        forecast_only=True,
    )


# ---- Times -----------------------------------------------------------------------------------------------------------


@fault
def time_twice(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    row = row_of(rng, frame)
    table = pd.concat([frame[: row + 1], frame[row:]])
    return Case(table, message=rf"{of(frame, row)} of .* has duplicate timestamps \({frame['timestamp'][row]}\)")


@fault
def time_missing(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    row = row_of(rng, frame)
    table = frame.assign(timestamp=frame["timestamp"].where(frame.index != row))
    return Case(table, message=rf"{of(frame, row)} of .* has a row without a timestamp")


@fault
def gap(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    row = int(rng.integers(1, 6))
    return Case(frame.drop(row), message=rf"{of(frame, row)} of .* has irregular timestamps", forecast_only=True)


@fault
def gap_on_a_grid(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    row = int(rng.integers(1, 6))
    clean = frame.assign(target=frame["target"].where(frame.index != row))
    return Case(frame.drop(row), clean, freq="D", forecast_only=True)


@fault
def too_fine_a_grid(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    freq = str(rng.choice(["h", "min", "12h"]))
    return Case(
        frame, message=rf"freq must be the spacing of the values, found '{freq}'.*'s0' come every 'D'", freq=freq
    )


@fault
def one_date_far_off(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    hourly = long_frame(rng, "min")
    table = hourly.assign(timestamp=hourly["timestamp"].where(hourly.index != 0, pd.Timestamp("1970-01-01")))
    return Case(table, message=r"item_id 's0' of .* values from 1970-01-01 .* is one of these times wrong", freq="min")


@fault
def times_in_zones(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    offsets = rng.choice(["+00:00", "Z", "+05:30", "-0800"], len(frame))
    shift = {"+00:00": "0h", "Z": "0h", "+05:30": "5h30min", "-0800": "-8h"}
    text = [
        f"{time + pd.Timedelta(shift[offset]):%Y-%m-%dT%H:%M:%S}{offset}"
        for time, offset in zip(frame["timestamp"], offsets)
    ]
    return Case(frame.assign(timestamp=text), frame)


@fault
def times_in_summer_time(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    hourly = long_frame(rng, "h")
    hourly["timestamp"] += pd.Timestamp("2024-03-30 20:00") - pd.Timestamp("2024-01-01")
    zoned = hourly["timestamp"].dt.tz_localize("UTC").dt.tz_convert("Europe/Oslo")
    return Case(hourly.assign(timestamp=zoned), hourly)


@fault
def some_times_with_a_zone(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    row = row_of(rng, frame)
    text = frame["timestamp"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    text.loc[row] = text[row][:-1]
    return Case(
        frame.assign(timestamp=text),
        message=rf"some with an offset from UTC and some without, such as {text[row]} at {of(frame, row)}",
    )


@fault
def times_day_first(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    style = str(rng.choice(["%d/%m/%Y", "%d.%m.%Y", "%m/%d/%Y", "%d %b %Y", "%Y/%m/%d", "%d-%m-%Y %H:%M"]))
    january = frame.assign(timestamp=frame["timestamp"] + pd.Timedelta("14D"))
    return Case(january.assign(timestamp=january["timestamp"].dt.strftime(style)), january)


@fault
def times_that_are_two(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    short = frame.groupby("item_id").head(8)
    style = str(rng.choice(["%d/%m/%Y", "%m-%d-%Y", "%m/%d/%Y %H:%M"]))
    return Case(
        short.assign(timestamp=short["timestamp"].dt.strftime(style)),
        message=r"found '..[/-]..[/-]2024.*', of which the first number may be the day or the month, at item_id 's0'",
    )


def wrong_time(name: str, value: Any, message: str, *suffixes: str) -> None:
    def make(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
        row = row_of(rng, frame)
        text = frame.assign(timestamp=frame["timestamp"].dt.strftime("%Y-%m-%d").astype(object))
        wanted = rf"must have dates such as .* as timestamp, {message} at {of(frame, row)}"
        return Case(changed(text, "timestamp", row, value), message=wanted, suffixes=suffixes or (".csv", ".parquet"))

    make.__name__ = f"time_{name}"
    FAULTS[make.__name__] = make


wrong_time("word", "yesterday", "found 'yesterday'")
wrong_time("now", "now", "found 'now'")
wrong_time("of_day", "12:30", "found '12:30'")
wrong_time("no_such_day", "2024-02-30", "found '2024-02-30'")
wrong_time("out_of_bounds", "99999-01-01", "found '99999-01-01'")
wrong_time("comma", "2024-01-01,5", "found '2024-01-01,5'")


@fault
def times_as_numbers(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    unit = str(rng.choice(["s", "ms", "ns"]))
    numbers = frame["timestamp"].astype(f"datetime64[{'ns' if unit == 'ns' else unit}]").astype("int64")
    numbers = numbers.astype(rng.choice(["int64", "float64"]))
    return Case(frame.assign(timestamp=numbers), message=r"as timestamp, found the number 1.?704.* at item_id 's0'")


def typed_times(
    name: str, change: Callable[[int, datetime.datetime], Any], arrow: Any, found: str | None = None
) -> None:
    def make(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
        values = [change(row, time.to_pydatetime()) for row, time in enumerate(frame["timestamp"])]
        table = pa.Table.from_pandas(frame.drop(columns="timestamp"), preserve_index=False)
        table = table.append_column("timestamp", pa.array(values, type=arrow))
        message = found and rf"must have dates such as .* as timestamp, found {found}.* at item_id 's0'"
        return Case(table, None if found else frame, message, suffixes=(".parquet",))

    make.__name__ = f"times_{name}"
    FAULTS[make.__name__] = make


typed_times("date", lambda row, time: time.date(), pa.date32())
typed_times("seconds", lambda row, time: time, pa.timestamp("s"))
typed_times("large_string", lambda row, time: str(time), pa.large_string())
typed_times("dictionary", lambda row, time: f"{time:%Y%m%d}", pa.dictionary(pa.int16(), pa.string()))
typed_times("of_day", lambda row, time: datetime.time(row % 24), pa.time64("us"), r"datetime\.time")
typed_times("duration", lambda row, time: datetime.timedelta(row), pa.duration("s"), "Timedelta")
typed_times("list", lambda row, time: [row], pa.list_(pa.int64()), r"array\(\[0\]\)")
typed_times("bool", lambda row, time: True, pa.bool_(), "the number True")
typed_times("binary", lambda row, time: str(time).encode(), pa.binary(), "b'2024-01-01")
typed_times("decimal", lambda row, time: decimal.Decimal(row), pa.decimal128(9, 2), "Decimal")


@fault
def times_near_2262(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    frame = frame[frame["item_id"] == "s0"]
    shift = pd.Timestamp("2262-04-10") - frame["timestamp"].max()
    table = frame.assign(timestamp=(frame["timestamp"] + shift).astype("datetime64[ns]"))
    return Case(
        table,
        message=r"of item_id 's0' would go on for 3 steps of 'D' after 2262-04-10 .* past the last time that can be told in ns",
        suffixes=(".parquet",),
        forecast_only=True,
    )


# ---- Values ----------------------------------------------------------------------------------------------------------


def wrong_value(name: str, value: Any, wanted: str, found: str, *suffixes: str) -> None:
    def make(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
        row = row_of(rng, frame)
        message = (
            rf"target of {of(frame, row)} of .* {wanted}, found {found} at timestamp {frame['timestamp'][row].date()}"
        )
        table = changed(frame, "target", row, value)
        if isinstance(value, str):
            table["target"] = table["target"].astype(str)
        else:
            table["target"] = table["target"].astype(float)
        return Case(table, message=message, suffixes=suffixes or (".csv", ".parquet"))

    make.__name__ = f"value_{name}"
    FAULTS[make.__name__] = make


FINITE = "must be finite in float32.*"
wrong_value("word", "many", "must be a number", "'many'")
wrong_value("decimal_comma", "1,5", "must be a number", "'1,5'")
wrong_value("space", "1 000", "must be a number", "'1 000'")
wrong_value("inf", np.inf, FINITE, "inf")
wrong_value("minus_inf", -np.inf, FINITE, "-inf")
wrong_value("1e39", 1e39, FINITE, r"1e\+39")
wrong_value("minus_1e300", -1e300, FINITE, r"-1e\+300")
wrong_value("1e400", "1e400", "must be (a number|finite in float32.*)", "('1e400'|inf)")


@fault
def values_of_400_digits(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    row = row_of(rng, frame)
    table = frame.assign(target="1")
    table.loc[row, "target"] = "1" * 400
    return Case(table, message=rf"target of {of(frame, row)} of .* must be .*found .*1111")


def typed_values(name: str, change: Callable[[pd.Series], Any], message: str | None = None) -> None:
    def make(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
        table = frame.assign(target=change(frame["target"]))
        clean = None if message else frame.assign(target=frame["target"].where(table["target"].notna()))
        return Case(table, clean, message, suffixes=(".parquet",))

    make.__name__ = f"values_{name}"
    FAULTS[make.__name__] = make


NO_NUMBER = r"target of item_id 's0' of .* must be a number, found "
typed_values("decimal", lambda values: values.map(lambda value: decimal.Decimal(str(value))))
typed_values("text", lambda values: values.astype(str))
typed_values("categorical", lambda values: values.astype("category"))
typed_values("nullable", lambda values: values.astype("Float64").mask(values.index == 3))
typed_values("timestamp", lambda values: pd.to_datetime(values, unit="D"), NO_NUMBER)
typed_values("timedelta", lambda values: pd.to_timedelta(values, unit="D"), NO_NUMBER)
typed_values("list", lambda values: values.map(lambda value: [value]), NO_NUMBER)
typed_values("struct", lambda values: values.map(lambda value: {"a": value}), NO_NUMBER)


@fault
def values_bool(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    table = frame.assign(target=frame["target"] > frame["target"].median())
    return Case(table, table.assign(target=table["target"].astype(float)))


@fault
def values_missing(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    return Case(
        frame.assign(target=np.nan), message=r"must hold values, found . series without any", forecast_only=True
    )


@fault
def one_series_missing(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    table = frame.assign(target=frame["target"].where(frame["item_id"] != "s1"))
    return Case(table, table)


@fault
def values_of_any_size(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    """Of one series; a model is scale-free."""
    unit = 2.0 ** float(rng.choice([-110, -60, 60, 120]))
    table = frame.assign(target=frame["target"].where(frame["item_id"] != "s1", frame["target"] * unit))
    return Case(table, table)


# ---- Columns and files -----------------------------------------------------------------------------------------------


@fault
def column_missing(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    column = str(rng.choice(frame.columns))
    return Case(frame.drop(columns=column), message=rf"has no column {column}; found ")


@fault
def wide(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    table = frame.pivot(index="timestamp", columns="item_id", values="target").reset_index()
    return Case(table, message=r"has no column item_id, target; found timestamp, s0, s1")


@fault
def more_columns(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    table = frame.assign(price=1.0, note="a,b\nc", flag=None)
    return Case(table[rng.permutation(table.columns)], frame)


@fault
def column_twice(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    table = pd.concat([frame, frame[["target"]]], axis=1)
    return Case(table, message="must have each column once, found target", suffixes=(".csv",))


def text_of(name: str, change: Callable[[bytes], bytes], message: str | None = None) -> None:
    def make(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
        frame = with_items(frame, ["é0", "s1", "s2", "s3"])
        text = change(frame.to_csv(index=False).encode())
        return Case(text=text, clean=None if message else frame, message=message, suffixes=(".csv",))

    make.__name__ = f"file_{name}"
    FAULTS[make.__name__] = make


CANNOT = "cannot be read: "
text_of("byte_order_mark", lambda text: b"\xef\xbb\xbf" + text)
text_of("windows_lines", lambda text: text.replace(b"\n", b"\r\n"))
text_of("blank_lines", lambda text: b"\n" + text.replace(b"\n", b"\n\n"))
text_of("latin_1", lambda text: text.decode().encode("latin-1"), CANNOT + "it must be UTF-8 text, found the byte 0xe9")
text_of("utf_16", lambda text: text.decode().encode("utf-16"), CANNOT + "it must be UTF-8 text, found the byte 0xff")
text_of("gzip", gzip.compress, CANNOT + "it must be UTF-8 text, found the byte 0x8b")
text_of("semicolons", lambda text: text.replace(b",", b";"), "must be separated by commas, not ';'")
text_of("tabs", lambda text: text.replace(b",", b"\t"), r"must be separated by commas, not '\\t'")
text_of("decimal_commas", lambda text: text.replace(b".", b","), CANNOT + ".*a decimal comma")
text_of("late_decimal_comma", lambda text: text[:-2].replace(b"\n", b"\n") + b",5\n", CANNOT + ".*a decimal comma")
text_of("empty", lambda text: b"", CANNOT + "it is empty")
text_of(
    "header_alone",
    lambda text: text.split(b"\n")[0] + b"\n",
    "must hold at least one series, found no rows|series is empty",
)
text_of("no_header", lambda text: text.split(b"\n", 1)[1], "has no column item_id, timestamp, target; found é0")
text_of("open_quote", lambda text: text.replace(b"\n", b'\n"', 1), CANNOT)


@fault
def truncated_parquet(rng: np.random.Generator, frame: pd.DataFrame) -> Case:
    whole = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pandas(frame), whole)
    content = whole.getvalue().to_pybytes()
    return Case(text=content[: int(rng.integers(0, len(content)))], message=CANNOT, suffixes=(".parquet",))


# ---- Every way in ----------------------------------------------------------------------------------------------------


def write(case: Case, path: Path) -> None:
    if case.text is not None:
        path.write_bytes(case.text)
    elif isinstance(case.table, pd.DataFrame) and path.suffix == ".csv":
        case.table.to_csv(path, index=False)
    else:
        table = case.table
        table = pa.Table.from_pandas(table, preserve_index=False) if isinstance(table, pd.DataFrame) else table
        pa.parquet.write_table(table, path)


def told(call: Callable[[], Any], case: Case, what: str) -> Any:
    """What the call answers; where it fails, a check of what it says."""
    try:
        return call()
    except (ValueError, OSError) as error:
        text = str(error)
        assert "\n" not in text, text
        assert len(text) < 500, text
        assert case.message is not None, text
        assert re.search(case.message, text), text
        assert what in text or "the forecast of" in text, text
        return None


def ends(tiny: BaseChronosPipeline, case: Case, folder: Path, suffix: str) -> str:
    """Put the case through every way in, and check where it ends: "right" or "error"."""
    path, output = folder / f"in{suffix}", folder / "out.parquet"
    write(case, path)
    before = sorted(folder.iterdir())
    options: dict[str, Any] = {"horizon": HORIZON, "freq": case.freq}
    summary = told(lambda: forecast_file(tiny, path, output, chunk_rows=30, **options), case, "input: file")
    if case.message is not None:
        assert summary is None
        assert sorted(folder.iterdir()) == before
    else:
        check_forecasts(tiny, case.clean, pa.parquet.read_table(output), suffix)
    if isinstance(case.table, pd.DataFrame) and not (case.forecast_only and case.message):
        forecasts = told(lambda: forecast_frame(tiny, case.table, **options), case, "frame")
        assert (forecasts is None) == (case.message is not None)
    if case.forecast_only or (case.freq and case.message):
        return "error" if case.message else "right"
    for read, what in ((lambda: read_series(path), "series"), (lambda: [*SeriesFile(path).read(0).values()], "file")):
        series = told(read, case, what)
        if case.message is None or series is None:
            assert (series is None) == (case.message is not None)
        if series is not None and case.clean is not None:
            wanted = {str(item): values["target"] for item, values in case.clean.groupby("item_id", sort=False)}
            wanted = [
                wanted[item].to_numpy(float) for item in sorted(wanted) if wanted[item].notna().any() or what == "file"
            ]
            assert len(series) == len(wanted)
            for one, other in zip(series, wanted):
                np.testing.assert_allclose(np.asarray(one), other, rtol=1e-14)  # pandas 2 rounds what CSV files hold
    return "error" if case.message else "right"


def check_forecasts(tiny: BaseChronosPipeline, clean: pd.DataFrame, found: Any, suffix: str) -> None:
    """The forecasts of a file are those of upstream's predict_df of the clean table, by the same items."""
    numbers = {item: f"n{i}" for i, item in enumerate(dict.fromkeys(clean["item_id"]))}
    plain = clean.assign(item_id=[numbers[item] for item in clean["item_id"]])
    largest = plain.groupby("item_id")["target"].transform(lambda values: values.abs().max())
    scale = 2.0 ** np.floor(np.log2(largest.where(largest > 0, 1.0)))  # 1 where nothing is observed
    known = plain.assign(target=plain["target"] / scale)
    known = known[known.groupby("item_id")["target"].transform(lambda values: values.notna().any())]
    wanted = tiny.predict_df(known, prediction_length=HORIZON)
    scales = dict(zip(plain["item_id"], scale))
    items = found["item_id"].to_pylist()
    assert [numbers[item] for item in items] == list(wanted["item_id"])
    if suffix == ".csv":
        assert all(isinstance(item, str) for item in items)
    assert list(found["timestamp"].to_pandas()) == list(wanted["timestamp"])
    factor = np.array([scales[item] for item in wanted["item_id"]])
    for column in ("predictions", "0.1", "0.9"):
        values = found[column].to_numpy().astype(float)
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values / factor, wanted[column].to_numpy(float), **CLOSE)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_mended_or_named(name: str, tiny, tmp_path: Path) -> None:
    rng = np.random.default_rng([1, *name.encode()])
    case = FAULTS[name](rng, long_frame(rng))
    suffix = case.suffixes[0]
    ends(tiny, case, tmp_path, suffix)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(10))
def test_faults_by_the_hundred_are_mended_or_named(seed: int, tiny, tmp_path_factory: pytest.TempPathFactory) -> None:
    counts: Counter[str] = Counter()
    for number in range(100):
        rng = np.random.default_rng([2, seed, number])
        name = str(rng.choice(list(FAULTS)))
        case = FAULTS[name](rng, long_frame(rng))
        try:
            counts[ends(tiny, case, tmp_path_factory.mktemp("fault"), str(rng.choice(case.suffixes)))] += 1
        except BaseException:
            print(f"fault {name}, seed {seed}, number {number}")
            raise
    print(f"seed {seed}: {dict(counts)}")


# Text of any kind but what UTF-8 cannot write, and what ends a line alone: CSV files have quotes for the rest.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=6)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True), suffix=st.sampled_from([".csv", ".parquet"]))
def test_names_of_series_come_back_as_they_are(
    names: list[str], suffix: str, tiny, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("names")
    times = pd.date_range("2024-01-01", periods=9, freq="D")
    table = pd.concat(
        [pd.DataFrame({"item_id": name, "timestamp": times, "target": np.arange(9.0)}) for name in names]
    )
    write(Case(table), folder / f"in{suffix}")
    for result in (".csv", ".parquet"):
        output = folder / f"out{result}"
        forecast_file(tiny, folder / f"in{suffix}", output, horizon=1)
        read = (
            pd.read_parquet(output) if result == ".parquet" else pd.read_csv(output, keep_default_na=False, dtype=str)
        )
        assert list(read["item_id"]) == names
