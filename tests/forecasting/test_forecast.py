"""Forecasts of tables and files: those of predict_df, however the work is cut up, interrupted or written; and errors that say what to do."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained, forecast_file, forecast_frame
from hf_lowrank.checkpoints.loading import checkpoint_path
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.cli.app import app
from hf_lowrank.data.times import inferred_frequency
from hf_lowrank.evaluation.sources import seasonality_of
from hf_lowrank.forecasting.batches import SHORT, batches_by_length
from hf_lowrank.forecasting.long_file import LongFile, Seen, whole_series

pa = pytest.importorskip("pyarrow")

PANDAS = tuple(map(int, pd.__version__.split(".")[:2]))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 in batches of other sizes


def long_frame(lengths: list[int], freq: str = "h", seed: int = 0) -> pd.DataFrame:
    """Random walks; every series starts at another time."""
    rng = np.random.default_rng(seed)
    starts = pd.date_range("2024-01-01", periods=len(lengths), freq=freq)
    frames = [
        pd.DataFrame(
            {
                "item_id": f"s{(7 * i) % 100:02}",
                "timestamp": pd.date_range(starts[i], periods=length, freq=freq),
                "target": 10 + rng.normal(size=length).cumsum(),
            }
        )
        for i, length in enumerate(lengths)
    ]
    return pd.concat(frames, ignore_index=True)


def write(frame: pd.DataFrame, path: Path, **options: Any) -> Path:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, **options)
    return path


def assert_same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, wanted.astype({"timestamp": found["timestamp"].dtype}), **CLOSE)


@pytest.fixture(scope="module")
def reference_bolt() -> BaseChronosPipeline:
    return BaseChronosPipeline.from_pretrained(checkpoint_path("reference-bolt"), dtype="float32")


@pytest.fixture
def tiny(bolt) -> BaseChronosPipeline:
    """A tiny random Chronos-Bolt: context 48, horizon 16."""
    return as_pipeline(bolt)


# ---- The same forecasts ----------------------------------------------------------------------------------------------


def test_a_table_is_forecast_as_predict_df_does(reference_bolt) -> None:
    frame = long_frame([3, 60, 1, 600, 17, 2])
    frame.loc[frame.index[10:15], "target"] = np.nan
    shuffled = frame.sample(frac=1, random_state=1)
    for table in (frame, shuffled):
        wanted = reference_bolt.predict_df(table, prediction_length=12, quantile_levels=[0.1, 0.25, 0.5])
        pd.testing.assert_frame_equal(
            forecast_frame(reference_bolt, table, horizon=12, quantiles=[0.1, 0.25, 0.5]), wanted, **CLOSE
        )


@pytest.mark.parametrize("freq", ["D", "B", "MS", "W-WED", "15min", "QE"])
def test_times_go_on_in_every_frequency(tiny, freq: str) -> None:
    frame = long_frame([20, 5, 2], freq)
    pd.testing.assert_frame_equal(
        forecast_frame(tiny, frame, horizon=5), tiny.predict_df(frame, prediction_length=5), **CLOSE
    )


@pytest.mark.parametrize("source", [".csv", ".parquet"])
@pytest.mark.parametrize("result", [".csv", ".parquet"])
def test_a_file_is_forecast_as_predict_df_does(tmp_path: Path, reference_bolt, source: str, result: str) -> None:
    frame = long_frame([40, 80, 5, 33, 60])
    path = write(frame, tmp_path / f"in{source}")
    summary = forecast_file(reference_bolt, path, tmp_path / f"out{result}", horizon=6, chunk_rows=50)
    wanted = reference_bolt.predict_df(frame, prediction_length=6)
    found = (
        pd.read_parquet(tmp_path / "out.parquet")
        if result == ".parquet"
        else pd.read_csv(
            tmp_path / "out.csv", parse_dates=["timestamp"], dtype=dict.fromkeys(wanted.columns[3:], "f4")
        )
    )
    assert_same(found, wanted)
    assert (summary.num_series, summary.num_rows, summary.num_forecast_rows, summary.freq) == (5, len(frame), 30, "h")
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, f"out{result}"])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_of_many_chunks_is_forecast_at_the_defaults_as_its_table(
    tmp_path: Path, reference_bolt, suffix: str
) -> None:
    frame = long_frame([7_000] * 30)
    frame["target"] = np.random.default_rng(0).normal(10, 1, len(frame))
    assert len(frame) > 2 * inspect.signature(forecast_file).parameters["chunk_rows"].default  # three chunks
    path = write(frame, tmp_path / f"in{suffix}")
    result = CliRunner().invoke(app, ["forecast", "reference-bolt", str(path), str(tmp_path / "out.parquet")])
    assert result.exit_code == 0, result.stderr
    assert_same(pd.read_parquet(tmp_path / "out.parquet"), forecast_frame(reference_bolt, frame))


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_file_may_have_times_of_any_precision(tmp_path: Path, tiny, unit: str) -> None:
    """Also where a series is too short to tell its frequency."""
    frame = long_frame([20, 2, 1])
    path = write(frame.astype({"timestamp": f"datetime64[{unit}]"}), tmp_path / "in.parquet")
    assert pd.read_parquet(path)["timestamp"].dtype == f"datetime64[{unit}]"
    for freq in (None, "h"):
        forecast_file(tiny, path, tmp_path / "out.parquet", horizon=3, freq=freq, overwrite=True)
        found = pd.read_parquet(tmp_path / "out.parquet")
        assert found["timestamp"].dtype == f"datetime64[{unit}]"
        assert_same(found, forecast_frame(tiny, frame, horizon=3))


@pytest.mark.skipif(PANDAS < (3,), reason="pandas 2 has no times that nanoseconds cannot hold, the last is in 2262")
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_times_may_go_on_after_2262(tmp_path: Path, tiny, suffix: str) -> None:
    path = write(
        long_frame([300], "YS").assign(timestamp=pd.date_range("1959", periods=300, freq="YS")), tmp_path / "in.csv"
    )
    forecast_file(tiny, path, tmp_path / f"out{suffix}", horizon=10)
    read = pd.read_csv if suffix == ".csv" else pd.read_parquet
    assert list(pd.to_datetime(read(tmp_path / f"out{suffix}")["timestamp"]).dt.year) == list(range(2259, 2269))


def test_nothing_asks_pandas_in_a_way_that_will_end(monkeypatch: pytest.MonkeyPatch) -> None:
    times = pd.date_range("2024-01-01", periods=5, freq="30min")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inferred_frequency(times) == "30min"
        assert seasonality_of("30min") == 48
    # What pandas 3.1 announces in place of the name.
    monkeypatch.setattr(pd, "infer_freq", lambda index: pd.tseries.frequencies.to_offset("30min"))
    assert inferred_frequency(times) == "30min"


@pytest.mark.parametrize(("start", "written"), [("0h", "2024-01-31"), ("6h", "2024-01-31 06:00:00")])
def test_a_csv_is_written_as_pandas_would(tmp_path: Path, tiny, start: str, written: str) -> None:
    """Also where only the last part has a time of day."""
    frame = long_frame([30] * 3, "D")
    frame.loc[60:, "timestamp"] += pd.Timedelta(start)
    path = write(frame, tmp_path / "in.parquet")
    forecast_file(tiny, path, tmp_path / "out.csv", horizon=2, chunk_rows=30, batch_size=1)
    wanted = forecast_frame(tiny, frame, horizon=2, batch_size=1).to_csv(index=False, lineterminator="\n")
    found = (tmp_path / "out.csv").read_bytes().decode()
    assert found == wanted
    assert f"s00,{written.replace('06', '00')},target" in found


def test_a_csv_keeps_parts_of_a_second(tmp_path: Path, tiny) -> None:
    frame = long_frame([30], "250ms")
    forecast_file(tiny, write(frame, tmp_path / "in.csv"), tmp_path / "out.csv", horizon=2)
    times = pd.read_csv(tmp_path / "out.csv", parse_dates=["timestamp"])["timestamp"]
    assert list(times - frame["timestamp"].iloc[-1]) == [pd.Timedelta("250ms"), pd.Timedelta("500ms")]


@pytest.mark.filterwarnings("ignore:Keeping")
@pytest.mark.parametrize("family", ["chronos_t5", "bolt", "chronos2"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_every_family_does_not_depend_on_batches(
    family: str, is_compressed: bool, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    if is_compressed:
        model = compress_pretrained(model, uniform=4, calibration=None)
    pipeline = as_pipeline(model)
    samples = {"num_samples": 3, "seed": 3} if family == "chronos_t5" else {}
    frame = long_frame([70, 12, 33, 5])
    together = forecast_frame(pipeline, frame, horizon=4, quantiles=[0.2, 0.5], batch_size=32, **samples)
    alone = [
        forecast_frame(pipeline, series, horizon=4, quantiles=[0.2, 0.5], batch_size=1, **samples)
        for _, series in frame.groupby("item_id", sort=False)
    ]
    pd.testing.assert_frame_equal(together, pd.concat(alone, ignore_index=True), **CLOSE)
    assert together.notna().all(axis=None)


def test_samples_depend_on_the_seed_and_the_item(chronos_t5) -> None:
    pipeline = as_pipeline(chronos_t5)
    frame = long_frame([30])
    twins = pd.concat([frame.assign(item_id="a"), frame.assign(item_id="b")])
    first = forecast_frame(pipeline, twins, horizon=3, num_samples=4)
    before = torch.get_rng_state()
    pd.testing.assert_frame_equal(forecast_frame(pipeline, twins, horizon=3, num_samples=4), first)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = (first[first["item_id"] == item]["predictions"].to_numpy() for item in "ab")
    assert not np.allclose(a, b)
    assert not np.allclose(
        forecast_frame(pipeline, twins, horizon=3, num_samples=4, seed=1)["predictions"], first["predictions"]
    )


def test_seeds_are_one_a_series(chronos_t5) -> None:
    pipeline = as_pipeline(chronos_t5)
    series = [torch.arange(20.0), torch.arange(9.0)]
    with pytest.raises(ValueError, match=r"seeds must hold one integer for each of the 2 series, found 1"):
        pipeline.predict(series, 4, seeds=[1])
    paths = pipeline.predict(series, 12, num_samples=3, seeds=[1, 2], limit_prediction_length=False)
    assert torch.equal(paths[1:], pipeline.predict(series[1], 12, num_samples=3, seeds=[2]))
    assert pipeline.model.generators is None


def test_the_context_is_what_was_asked_for(tiny) -> None:
    frame = long_frame([48, 30])
    last = frame.groupby("item_id", sort=False).tail(10)
    pd.testing.assert_frame_equal(
        forecast_frame(tiny, frame, context_length=10), forecast_frame(tiny, last, context_length=10)
    )


@pytest.mark.parametrize("family", ["chronos_t5", "bolt", "chronos2"])
def test_no_series_is_spoiled_by_one_beside_it(family: str, request: pytest.FixtureRequest) -> None:
    """In Chronos-2 a series whose squares overflow made its whole batch NaN."""
    pipeline = as_pipeline(request.getfixturevalue(family))
    options = {"horizon": 4, "quantiles": [0.2, 0.5]} | ({"num_samples": 3} if family == "chronos_t5" else {})
    frame = long_frame([40, 40, 40])
    names = list(frame["item_id"].unique())
    is_big = frame["item_id"] == names[1]
    alone = forecast_frame(pipeline, frame, batch_size=1, **options).set_index("item_id")
    for unit in (2.0**120, 2.0**-120):
        sized = frame.assign(target=frame["target"].where(~is_big, frame["target"] * unit))
        found = forecast_frame(pipeline, sized, **options).set_index("item_id")
        pd.testing.assert_frame_equal(found.loc[names[::2]], alone.loc[names[::2]], **CLOSE)
        numbers = ["predictions", "0.2", "0.5"]
        np.testing.assert_allclose(found.loc[names[1], numbers] / unit, alone.loc[names[1], numbers], **CLOSE)


def test_a_forecast_that_is_not_finite_is_an_error_that_names_its_series(tmp_path: Path, chronos2) -> None:
    pipeline = as_pipeline(chronos2)
    frame = long_frame([40, 40, 40])
    with torch.no_grad():
        chronos2.output_patch_embedding.output_layer.bias.add_(10)  # sinh makes ten thousand spreads of it
    names = frame["item_id"].unique()
    frame.loc[frame["item_id"] == names[1], "target"] *= 1e36
    path = write(frame, tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=f"the forecast of item_id '{names[1]}' is not finite: the model cannot bear"):
        forecast_file(pipeline, path, tmp_path / "out.csv", horizon=2)
    assert not (tmp_path / "out.csv").exists()


def test_a_horizon_beyond_the_models_is_forecast_with_a_word(tmp_path: Path, tiny) -> None:
    """As `evaluate` does."""
    frame = long_frame([48, 30])
    with pytest.warns(UserWarning, match="prediction length"):
        found = forecast_frame(tiny, frame, horizon=20)
    with pytest.warns(UserWarning, match="prediction length"):
        pd.testing.assert_frame_equal(found, tiny.predict_df(frame, prediction_length=20), **CLOSE)
    pd.testing.assert_frame_equal(
        found.groupby("item_id", sort=False).head(16).reset_index(drop=True), forecast_frame(tiny, frame), **CLOSE
    )


@pytest.mark.parametrize(
    ("argument", "name"), [("id_column", "predictions"), ("id_column", "0.5"), ("timestamp_column", "target_name")]
)
def test_a_column_of_the_forecasts_is_no_name_for_one_of_the_input(
    tmp_path: Path, tiny, argument: str, name: str
) -> None:
    column = {"id_column": "item_id", "timestamp_column": "timestamp"}[argument]
    frame = long_frame([20]).rename(columns={column: name})
    path = write(frame, tmp_path / "in.csv")
    message = f"{argument} must not be a column that the forecasts have too, found '{name}'"
    with pytest.raises(ValueError, match=message):
        forecast_file(tiny, path, tmp_path / "out.csv", **{argument: name})
    with pytest.raises(ValueError, match=message):
        forecast_frame(tiny, frame, **{argument: name})
    assert os.listdir(tmp_path) == ["in.csv"]


# ---- Cut anywhere ----------------------------------------------------------------------------------------------------


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    chunk_rows=st.integers(1, 150),
    batch_size=st.integers(1, 5),
)
def test_forecasts_do_not_depend_on_chunks_and_batches(
    tmp_path_factory: pytest.TempPathFactory, tiny, lengths: list[int], chunk_rows: int, batch_size: int
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    frame = long_frame([9, *lengths])
    path = write(frame, folder / "in.parquet", row_group_size=13)
    forecast_file(tiny, path, folder / "out.parquet", horizon=4, chunk_rows=chunk_rows, batch_size=batch_size)
    assert_same(pd.read_parquet(folder / "out.parquet"), forecast_frame(tiny, frame, horizon=4, batch_size=len(frame)))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    batch_rows=st.integers(1, 40),
    chunk_rows=st.integers(1, 60),
)
def test_a_reader_yields_whole_series_and_holds_one_chunk(
    lengths: list[int], batch_rows: int, chunk_rows: int
) -> None:
    frame = pd.DataFrame({"item_id": np.repeat(np.arange(len(lengths)), lengths), "row": np.arange(sum(lengths))})
    given_out = 0

    def batches() -> Iterator[pd.DataFrame]:
        nonlocal given_out
        for first in range(0, len(frame), batch_rows):
            given_out += len(frame[first : first + batch_rows])
            yield frame[first : first + batch_rows]

    received, tables = 0, []
    for table in whole_series(batches(), "item_id", chunk_rows):
        assert given_out - received <= chunk_rows + max(lengths) + batch_rows
        received += len(table)
        tables.append(table)
    pd.testing.assert_frame_equal(pd.concat(tables, ignore_index=True), frame)
    seen = [set(table["item_id"]) for table in tables]
    assert sum(map(len, seen)) == len(lengths)
    # Where a table ends depends on the rows alone.
    assert [len(table) for table in whole_series([frame], "item_id", chunk_rows)] == [len(table) for table in tables]
    assert all(len(table) >= chunk_rows for table in tables[:-1])


@pytest.mark.parametrize(("suffix", "rows"), [(".csv", 100_000), (".parquet", 400_000)])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path: Path, suffix: str, rows: int) -> None:
    frame = pd.DataFrame(
        {"item_id": np.repeat(np.arange(rows // 100), 100), "timestamp": "2024-01-01", "target": np.arange(rows) / 7}
    )
    path = write(frame, tmp_path / f"in{suffix}")  # the parquet file is one row group
    arrow = pa.default_memory_pool()
    before = arrow.bytes_allocated()
    tracemalloc.start()
    try:
        count = highest = 0
        for table in LongFile.of(path).tables(2_000):
            count += len(table)
            highest = max(highest, arrow.bytes_allocated() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == rows
    whole = 24 * rows  # bytes, if each value took 8; arrow alone holds pages of a megabyte
    assert peak < 0.6 * whole
    assert highest < 0.6 * whole


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=30), batch_size=st.integers(1, 9))
def test_batches_hold_every_series_once_with_little_padding(lengths: list[int], batch_size: int) -> None:
    batches = list(batches_by_length(lengths, batch_size))
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        found = [lengths[i] for i in batch]
        assert max(found) <= max(2 * min(found), SHORT)
    assert len(list(batches_by_length([50] * len(lengths), batch_size))) == -(-len(lengths) // batch_size)


@given(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=20), max_size=15))
def test_an_item_that_comes_again_is_found(tables: list[list[int]]) -> None:
    seen, known = Seen(), set()
    for table in tables:
        names = np.array([f"item {number}" for number in table], dtype=object)
        first = next((i for i, name in enumerate(table) if name in known or name in table[:i]), None)
        assert seen.add(names) == first
        if first is not None:
            return
        known |= set(table)


# ---- Interrupted -----------------------------------------------------------------------------------------------------


class Interrupted:
    """A pipeline that stops at its n-th batch."""

    def __init__(self, pipeline: BaseChronosPipeline, batches: int, stop: Callable[[], None]) -> None:
        self.predict_quantiles, self.left, self.stop = pipeline.predict_quantiles, batches, stop
        pipeline.predict_quantiles = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            self.stop()
        return self.predict_quantiles(*args, **kwargs)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_interrupted_run_goes_on_to_the_same_file(tmp_path: Path, bolt, suffix: str) -> None:
    path = write(long_frame([30] * 8), tmp_path / "in.csv")
    options = {"horizon": 3, "chunk_rows": 60, "batch_size": 1}
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    forecast_file(as_pipeline(bolt), path, whole, **options)
    stopping = as_pipeline(bolt)
    Interrupted(stopping, 7, interrupt)  # in the fourth of four parts
    with pytest.raises(KeyboardInterrupt):
        forecast_file(stopping, path, cut, **options)
    assert not cut.exists()
    parts = tmp_path / f"cut{suffix}.parts"
    assert sorted(os.listdir(parts)) == ["manifest.json", *(f"part-00000{i}.parquet" for i in range(3))]
    (parts / "part-000001.parquet").write_bytes(b"PAR1 and no more")  # as a loss of power may leave it
    summary = forecast_file(as_pipeline(bolt), path, cut, **options)
    assert summary.num_resumed == 4
    assert summary.num_forecast_rows == 24
    assert cut.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_a_killed_process_leaves_what_can_be_resumed(tmp_path: Path, bolt) -> None:
    bolt.save_pretrained(tmp_path / "model")
    path = write(long_frame([30] * 6), tmp_path / "in.csv")
    options = {"horizon": 3, "chunk_rows": 30, "batch_size": 1}
    script = f"""
import os, signal, torch
from hf_lowrank import forecast_file
from hf_lowrank.checkpoints.pipelines import load_pipeline
torch.set_num_threads({torch.get_num_threads()})
pipeline = load_pipeline({str(tmp_path / "model")!r}, device="cpu", dtype="float32")
predict, calls = pipeline.predict_quantiles, []
def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(*args, **kwargs)
pipeline.predict_quantiles = killed
forecast_file(pipeline, {str(path)!r}, {str(tmp_path / "out.parquet")!r}, **{options!r})
"""
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    summary = forecast_file(str(tmp_path / "model"), path, tmp_path / "out.parquet", device="cpu", **options)
    assert summary.num_resumed == 3
    forecast_file(str(tmp_path / "model"), path, tmp_path / "whole.parquet", device="cpu", **options)
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.fixture
def unfinished(tmp_path: Path, bolt) -> Path:
    """The output of a run that was cut off after one of four parts."""
    path = write(long_frame([30] * 4), tmp_path / "in.csv")
    stopping = as_pipeline(bolt)
    Interrupted(stopping, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        forecast_file(stopping, path, tmp_path / "out.csv", horizon=3, chunk_rows=30)
    return tmp_path / "out.csv"


def test_another_run_is_told_what_differs(unfinished: Path, bolt) -> None:
    path, pipeline = unfinished.with_name("in.csv"), as_pipeline(bolt)
    with pytest.raises(ValueError, match=r"differs: options.horizon was 3, is 4.*--no-resume"):
        forecast_file(pipeline, path, unfinished, horizon=4, chunk_rows=30)
    with torch.no_grad():
        bolt.shared.weight.add_(1)
    with pytest.raises(ValueError, match=r"differs: model.weights was"):
        forecast_file(pipeline, path, unfinished, horizon=3, chunk_rows=30)
    write(long_frame([30] * 4, seed=1), path)
    with pytest.raises(ValueError, match=r"differs: input.modified_ns was .*model.weights"):
        forecast_file(pipeline, path, unfinished, horizon=3, chunk_rows=30)
    assert (unfinished.with_name("out.csv.parts") / "part-000000.parquet").exists()
    assert forecast_file(pipeline, path, unfinished, horizon=4, chunk_rows=30, resume=False).num_resumed == 0
    assert len(pd.read_csv(unfinished)) == 16


def test_an_input_that_changes_meanwhile_is_an_error(unfinished: Path, bolt) -> None:
    path, pipeline = unfinished.with_name("in.csv"), as_pipeline(bolt)
    Interrupted(pipeline, 1, lambda: os.utime(path, (0, 0)))
    with pytest.raises(ValueError, match="must stay as it is while it is read, but it has changed"):
        forecast_file(pipeline, path, unfinished, horizon=3, chunk_rows=30)
    assert not unfinished.exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, tiny) -> None:
    path = write(long_frame([30]), tmp_path / "in.csv")
    folder = tmp_path / "out.csv.parts"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    for resume in (True, False):
        with pytest.raises(FileExistsError, match=r"out.csv.parts must be the folder of an unfinished run"):
            forecast_file(tiny, path, tmp_path / "out.csv", resume=resume)
    assert (folder / "mine.txt").read_text() == "precious"


# ---- Files as they come ----------------------------------------------------------------------------------------------


def test_items_keep_their_type_and_columns_their_names(tmp_path: Path, tiny) -> None:
    frame = long_frame([20, 30]).assign(item_id=lambda table: table["item_id"].str[1:].astype("int32"), price=1.0)
    frame = frame.rename(columns={"item_id": "shop", "timestamp": "day", "target": "sold"})
    names = {"id_column": "shop", "timestamp_column": "day", "target": "sold"}
    wanted = tiny.predict_df(frame[["shop", "day", "sold"]], prediction_length=3, **names)
    indexed = frame.set_index(["shop", "day"])
    for number, table in enumerate((frame, frame.astype({"shop": "category"}), indexed)):
        path = tmp_path / f"in{number}.parquet"
        table.to_parquet(path)
        forecast_file(tiny, path, tmp_path / f"out{number}.parquet", horizon=3, **names)
        found = pd.read_parquet(tmp_path / f"out{number}.parquet")
        pd.testing.assert_frame_equal(found, wanted.astype({"day": found["day"].dtype}), **CLOSE)
        assert found["shop"].dtype == np.int32
    zeros = write(frame.assign(shop=frame["shop"].map("{:03}".format)), tmp_path / "zeros.csv")
    forecast_file(tiny, zeros, tmp_path / "zeros.parquet", horizon=3, **names)
    assert set(pd.read_parquet(tmp_path / "zeros.parquet")["shop"]) == {"000", "007"}


def test_series_without_a_value_are_left_out_and_said(tmp_path: Path, tiny) -> None:
    frame = long_frame([20, 60, 25])
    items = frame["item_id"].unique()
    frame.loc[frame["item_id"] == items[0], "target"] = np.nan
    old = frame.index[frame["item_id"] == items[1]][:5]
    frame.loc[(frame["item_id"] == items[1]) & ~frame.index.isin(old), "target"] = (
        np.nan
    )  # none within the context of 48
    path = write(frame, tmp_path / "in.csv")
    summary = forecast_file(tiny, path, tmp_path / "out.csv", horizon=2, chunk_rows=10)
    assert (summary.num_left_out, summary.left_out) == (2, list(items[:2]))
    assert summary.to_dict()["left_out_because"] == "no value in the context"
    with pytest.warns(UserWarning, match="2 of 3 series have no value in their last 48 steps and are left out"):
        table = forecast_frame(tiny, frame, horizon=2)
    assert set(table["item_id"]) == {items[2]} == set(pd.read_csv(tmp_path / "out.csv")["item_id"])


def test_an_irregular_series_goes_on_a_grid(tmp_path: Path, tiny) -> None:
    frame = long_frame([30, 20])
    gaps = frame.drop(index=[4, 5, 12, 40])
    missing = frame.copy()
    missing.loc[[4, 5, 12, 40], "target"] = np.nan
    path = write(gaps, tmp_path / "in.csv")
    with pytest.raises(ValueError, match=r"item_id 's00' of input: file 'in.csv' has irregular timestamps.*freq"):
        forecast_file(tiny, path, tmp_path / "out.csv")
    forecast_file(tiny, path, tmp_path / "out.parquet", freq="h")
    assert_same(pd.read_parquet(tmp_path / "out.parquet"), forecast_frame(tiny, missing))


# ---- Errors ----------------------------------------------------------------------------------------------------------

GOOD = long_frame([20, 20])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="target"), "has no column target; found item_id, timestamp"),
        (lambda f: f[:0], "must hold at least one series, found no rows"),
        (
            lambda f: f.assign(target="many"),
            "target of item_id 's00' of .* must be a number, found 'many' at timestamp 2024",
        ),
        (
            lambda f: f.assign(target=np.inf),
            "target of item_id 's00' of .* must be finite in float32, .* found inf at timestamp 2024",
        ),
        (
            lambda f: f.assign(target=1e39),
            "target of item_id 's00' of .* must be finite in float32, .* found 1e.39 at timestamp 2024",
        ),
        (lambda f: f.assign(target=np.nan), "must hold values, found 2 series without any in their last 48 steps"),
        (
            lambda f: f.assign(timestamp=1.5),
            "must have dates such as .* as timestamp, found the number 1.5 at item_id 's00'",
        ),
        (lambda f: pd.concat([f, f[-1:]]), "item_id 's07' of .* has duplicate timestamps"),
        (lambda f: f.drop(index=25), "item_id 's07' of .* has irregular timestamps, such as 2024"),
        (lambda f: pd.concat([f, f[:3]]), "all rows of a series together, found item_id 's00' again in row 41"),
        (lambda f: f.assign(item_id=f["item_id"].where(f.index > 5)), "there are rows without item_id"),
        (
            lambda f: pd.concat([f, long_frame([9], "D").assign(item_id="daily")]),
            "item_id 'daily' of .* must have the frequency 'h' of the first series, found 'D'",
        ),
        (lambda f: f.groupby("item_id").head(2), "freq must be given: no series of input"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(
    tmp_path: Path, tiny, suffix: str, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    path = write(change(GOOD), tmp_path / f"in{suffix}")
    with pytest.raises(ValueError, match=message) as caught:
        forecast_file(tiny, path, tmp_path / "out.csv", chunk_rows=10)
    assert "input: file 'in" in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be at least 1, found 0"),
        ({"freq": "H1"}, "freq must be a pandas frequency such as .*, found 'H1'"),
        ({"freq": "-1h"}, "freq must be a pandas frequency such as .*, found '-1h'"),
        (
            {"freq": "min"},
            "freq must be the spacing of the values, found 'min': no two .* item_id 's00' come every 'h'",
        ),
        ({"input": "folder.csv"}, "input must be a .csv or .parquet file, found the folder"),
        ({"context_length": 49}, r"context_length must be in \[1, 48\] for this model, found 49"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, found 0"),
        ({"num_samples": 5}, "num_samples is for Chronos-T5"),
        ({"quantiles": [0.5, 1.0]}, "quantiles must be different numbers between 0 and 1, found 0.5, 1.0"),
        ({"quantiles": [0.5, 0.5]}, "quantiles must be different"),
        ({"quantiles": []}, "quantiles must be different"),
        ({"quantiles": [0.05, 0.5]}, r"quantiles must be in \[0.1, 0.9\].*found 0.05, 0.5"),
        ({"id_column": "target"}, "must name different columns, found target twice"),
        ({"device": "toaster"}, "device must be such as 'cpu' or 'cuda', found 'toaster'"),
        ({"dtype": "int3"}, "dtype must be one of auto, float32, bfloat16, float16, found 'int3'"),
        ({"output": "out.xlsx"}, "output must end in .csv or .parquet, found 'out.xlsx'"),
        ({"output": "in.csv"}, "output must be another file than input"),
        ({"output": "there.csv"}, r"output: .*there.csv exists; .*--overwrite"),
        ({"output": "folder.csv"}, "is a folder; give a file"),
        ({"input": "in.txt"}, "input must end in .csv or .parquet, found 'in.txt'"),
        ({"input": "none.csv"}, "input: file .*none.csv' does not exist"),
        ({"input": "empty.csv"}, "input: file 'empty.csv' cannot be read: it is empty"),
        ({"input": "broken.parquet"}, "input: file 'broken.parquet' cannot be read"),
        ({"model": "no-such-folder"}, "model: no-such-folder is no folder and no Hub id that can be read"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(
    tmp_path: Path, bolt, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(GOOD, tmp_path / "in.csv")
    (tmp_path / "there.csv").write_text("precious")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    before = sorted(os.listdir())
    model: Any = as_pipeline(bolt)
    if {"device", "dtype"} & set(options):
        bolt.save_pretrained(tmp_path / "model")
        model, before = "model", sorted([*before, "model"])
    arguments = {"model": model, "input": "in.csv", "output": "out.csv"} | options
    with pytest.raises((ValueError, OSError), match=message):
        forecast_file(**arguments)
    assert sorted(os.listdir()) == before
    assert (tmp_path / "there.csv").read_text() == "precious"


def test_a_table_needs_its_columns_and_a_frequency(tiny) -> None:
    with pytest.raises(ValueError, match="frame has no column timestamp"):
        forecast_frame(tiny, GOOD.drop(columns="timestamp"))
    with pytest.raises(ValueError, match="freq must be given: no series of frame"):
        forecast_frame(tiny, GOOD[:2])
    assert len(forecast_frame(tiny, GOOD[:2], freq="h", horizon=4)) == 4
    nothing = forecast_frame(tiny, GOOD[:0], horizon=4)
    assert nothing.empty
    assert list(nothing.columns) == list(forecast_frame(tiny, GOOD).columns)


# ---- The command line ------------------------------------------------------------------------------------------------


def test_the_command_writes_what_its_json_says(tmp_path: Path, reference_bolt) -> None:
    path = write(GOOD, tmp_path / "in.csv")
    output = tmp_path / "new" / "out.parquet"
    command = ["forecast", "reference-bolt", str(path), str(output), "--horizon", "4", "--quantiles", "0.1,0.5"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--json", "-"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["num_series"], report["num_rows"], report["num_forecast_rows"]) == (2, 40, 8)
    assert report["series_per_second"] == pytest.approx(2 / report["seconds"])
    wanted = reference_bolt.predict_df(GOOD, prediction_length=4, quantile_levels=[0.1, 0.5])
    assert_same(pd.read_parquet(output), wanted)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert again.stderr.startswith("error: output: ")
    assert "--overwrite" in again.stderr
    over = CliRunner().invoke(app, [*command, "--device", "cpu", "--overwrite"])
    assert over.exit_code == 0
    assert "8 rows, forecasts of 2 series" in over.stdout
    wrong = CliRunner().invoke(app, [*command[:-1], "median"])
    assert "--quantiles must be numbers such as 0.1,0.5,0.9, found 'median'" in wrong.stderr
