"""The tasks that `evaluate` scores models on.

`m1_yearly` and the group `packaged` are real series that installed Python packages ship: they need no network.
`chronos_zeroshot` and `chronos_in_domain` are the two benchmarks of the Chronos paper (arXiv 2403.07815) as
its authors define them. `file_task` makes a task of the user's own file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..checkpoints.pipelines import QUANTILE_LEVELS
from ..data.group_columns import GroupColumns
from ..data.tables import LONG_FORMAT
from ..data.times import inferred_frequency
from .sources import GroupsFile, HubDataset, PackagedSeries, SeriesFile, YearlyTsf, seasonality_of, store_parquet

__all__ = ["EvaluationTask", "file_task", "find_tasks", "import_fev", "list_tasks"]


@dataclass(frozen=True)
class EvaluationTask:
    """Forecast `horizon` steps after each of `num_windows` cutoffs of every item of `source`.

    The first cutoff is `initial_cutoff`, an index that is negative from the end, or a time; by default the last window ends where the
    series ends. The cutoffs are `window_step_size` steps apart, by default the horizon. MASE and SQL are scaled by the error
    of the seasonal naive forecast of period `seasonality` on the past.

    An item has one `targets` column or several, whose scores are averaged. A Chronos-2 forecasts them together and reads the covariates of
    the past and those that are known in the future; other models, and Seasonal Naive, forecast each target by itself. Windows begin at
    the earliest where an item has `min_context_length` steps before the cutoff, and hold at most `max_context_length` of them.
    """

    name: str
    horizon: int
    seasonality: int
    source: PackagedSeries | YearlyTsf | SeriesFile | GroupsFile | HubDataset
    num_windows: int = 1
    window_step_size: int | None = None
    initial_cutoff: int | str | None = None
    targets: tuple[str, ...] = ("target",)
    past_covariates: tuple[str, ...] = ()
    known_covariates: tuple[str, ...] = ()
    min_context_length: int = 1
    max_context_length: int | None = None

    @property
    def held_out(self) -> int:
        """The number of steps from the first cutoff to the end of a series."""
        if isinstance(self.initial_cutoff, int):
            return -self.initial_cutoff
        return self.horizon + (self.num_windows - 1) * (self.window_step_size or self.horizon)

    def to_fev(self) -> Any:
        """This task as a `fev.Task` with its dataset loaded.

        Raises:
            ImportError: The package that ships the series is not installed.
            OSError: The dataset is neither in the mirror nor can it be had from the Hub.
            ValueError: No series can be scored.
        """
        if isinstance(self.source, HubDataset):
            return self._fev_task(**_dataset_arguments(self.name, self.source))
        min_length = self.held_out + max(2 * self.horizon, self.seasonality + 1)
        tables = {
            item: values.to_frame("target") if isinstance(values, pd.Series) else values
            for item, values in self.source.read(min_length).items()
        }
        return self._fev_task(dataset_path=str(store_parquet(self.name, _scorable(self, tables))))

    def _fev_task(self, **dataset: Any) -> Any:
        """A `fev.Task` of this dataset, which is loaded."""
        task = import_fev().Task(
            **dataset,
            horizon=self.horizon,
            seasonality=self.seasonality,
            num_windows=self.num_windows,
            window_step_size=self.window_step_size,
            initial_cutoff=self.initial_cutoff,
            target=list(self.targets) if len(self.targets) > 1 else self.targets[0],
            past_dynamic_columns=list(self.past_covariates),
            known_dynamic_columns=list(self.known_covariates),
            min_context_length=self.min_context_length,
            max_context_length=self.max_context_length,
            eval_metric="MASE",
            extra_metrics=["WQL", "SQL"],
            quantile_levels=QUANTILE_LEVELS,
            task_name=self.name,
        )
        try:
            task.load_full_dataset(num_proc=0)
        except RuntimeError as error:
            if task.dataset_config is None:
                raise
            raise OSError(
                f"task {self.name!r} needs the dataset {task.dataset_path} ({task.dataset_config}), which could not be loaded "
                f"({error.__context__}). Connect to the Hugging Face Hub, or set FEV_DATASETS_PREFIX to a folder that has "
                f"{task.dataset_config}/*.parquet; `m1_yearly` and `packaged` need neither."
            ) from error
        return task


def import_fev() -> Any:
    """The module fev, which only an evaluation needs.

    Raises:
        ImportError: It is not installed; the message says what to install.
    """
    try:
        import fev
    except ImportError as error:
        raise ImportError(f'an evaluation needs fev: pip install "hf_lowrank[eval]" ({error}).') from error
    return fev


def _dataset_arguments(name: str, source: HubDataset) -> dict[str, Any]:
    prefix = os.environ.get("FEV_DATASETS_PREFIX")
    if prefix and "://" not in prefix and not any(Path(prefix, source.dataset_config).glob("*.parquet")):
        raise FileNotFoundError(
            f"task {name!r}: FEV_DATASETS_PREFIX is {prefix!r}, but {source.dataset_config}/*.parquet is not in it. "
            f"Put {source.dataset_path} there, or unset the variable to load it from the Hugging Face Hub."
        )
    separate = "__ALL__" if source.all_columns else list(source.columns)
    return {
        "dataset_path": source.dataset_path,
        "dataset_config": source.dataset_config,
        "id_column": source.id_column,
        "timestamp_column": source.timestamp_column,
        **({"generate_univariate_targets_from": separate} if separate else {}),
    }


def _scorable(task: EvaluationTask, series: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The items that have a value and a past before the first cutoff; a warning names the others.

    Three time stamps are the least that fev infers a frequency from.

    Raises:
        ValueError: There are none, or all are too short for a score in units of a seasonal forecast's error.
    """
    name, min_length = task.name, max(task.held_out + 1, 3)
    empty = [item for item, values in series.items() if values[list(task.targets)].isna().all(axis=None)]
    short = [item for item, values in series.items() if len(values) < min_length and item not in empty]
    left_out = {**dict.fromkeys(empty, "no value"), **dict.fromkeys(short, f"less than {min_length} steps")}
    if len(left_out) == len(series):
        raise ValueError(
            f"task {name!r} has no series to score: {len(empty)} of {len(series)} have no value, {len(short)} are shorter than "
            f"the {min_length} steps that the horizon and the number of windows need."
        )
    longest = max(len(values) for item, values in series.items() if item not in left_out)
    if longest <= task.held_out + task.seasonality:
        raise ValueError(
            f"task {name!r} has no series to score: the longest has {longest} steps, of which a horizon of {task.horizon} and "
            f"{task.num_windows} windows leave {longest - task.held_out}; MASE, SQL and RMSSE need more than a season of "
            f"{task.seasonality}. Take a smaller horizon, fewer windows, or seasonality=1 (--seasonality 1)."
        )
    if left_out:
        shown = ", ".join(f"{item} ({reason})" for item, reason in list(left_out.items())[:5])
        warnings.warn(f"task {name!r}: left out {len(left_out)} of {len(series)} series: {shown}.", stacklevel=3)
    return {item: values for item, values in series.items() if item not in left_out}


def file_task(  # noqa: PLR0913 a public call names all of its options
    path: str | Path,
    *,
    horizon: int,
    freq: str | None = None,
    seasonality: int | None = None,
    num_windows: int = 1,
    target: str | Sequence[str] = LONG_FORMAT.value,
    past_covariates: str | Sequence[str] = (),
    known_covariates: str | Sequence[str] = (),
    id_column: str = LONG_FORMAT.item,
    timestamp_column: str = LONG_FORMAT.time,
) -> EvaluationTask:
    """A task of a CSV or parquet file in long format, one row a time of an item.

    Args:
        path: The file; its name without the ending is the task's name.
        horizon: Steps to forecast.
        freq: A pandas frequency to put irregular series on; missing steps become NaN.
        seasonality: Steps in a season. By default that of the frequency: 24 of hours, 7 of days, 5 of business days, 12 of months, ...
        num_windows: Evaluation windows, the last one at the end of the series.
        target: The column that is forecast, or several.
        past_covariates, known_covariates: Columns that Chronos-2 reads, known up to the forecast origin, or in the future as well: numbers,
            or categories (text, bool). What has no target behind the last one that has is left out.
        id_column, timestamp_column: The columns of items and times.

    Raises:
        FileNotFoundError, ValueError: There is no such file; a column is missing or of another type; time stamps are duplicate or irregular.
    """
    path = Path(path)
    for name, value in {"horizon": horizon, "num_windows": num_windows, "seasonality": seasonality or 1}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}.")
    columns = GroupColumns.named(target, past_covariates, known_covariates, id_column, timestamp_column)
    source = SeriesFile(path, freq) if columns == GroupColumns() else GroupsFile(path, columns, freq)
    series = source.read(0).values()
    frequencies = {known for values in series if (known := freq or inferred_frequency(values.index))}
    kinds = {frequency.split("-")[0] for frequency in frequencies}
    if len(kinds) > 1:
        raise ValueError(f"file {path.name!r} must have one frequency, found {', '.join(sorted(kinds))}: split it.")
    season = seasonality or (seasonality_of(frequencies.pop()) if frequencies else 1)
    return EvaluationTask(
        path.stem,
        horizon,
        season,
        source,
        num_windows,
        targets=columns.targets,
        past_covariates=columns.past_covariates,
        known_covariates=columns.known_covariates,
    )


def _packaged(
    name: str,
    horizon: int,
    num_windows: int,
    source: PackagedSeries,
    step: int | None = None,
    seasonality: int | None = None,
) -> EvaluationTask:
    return EvaluationTask(name, horizon, seasonality or seasonality_of(source.freq), source, num_windows, step)


def _pbs(target: str) -> PackagedSeries:
    ids = ("Concession", "Type", "ATC2")
    return PackagedSeries("tsdata/fpp3/PBS.csv", "MS", "Month", (target,), ids, "%Y %b")


def _world(target: str) -> PackagedSeries:
    return PackagedSeries("tsdata/fpp3/global_economy.csv", "YS", "Year", (target,), ("Country",), "%Y")


def _single(file: str, freq: str, time: str, target: str, time_format: str | None = None) -> PackagedSeries:
    return PackagedSeries(file, freq, time, (target,), time_format=time_format)


_FPP3, _FPPPY, _STATS = "tsdata/fpp3", "tsdata/fpppy", "statsmodels/datasets"
_BUDGET = ("Debt", "DI", "Expenditure", "Savings", "Wealth", "Unemployment")
_MACRO = (
    "realgdp",
    "realcons",
    "realinv",
    "realgovt",
    "realdpi",
    "cpi",
    "m1",
    "tbilrate",
    "unemp",
    "pop",
    "infl",
    "realint",
)
_PRODUCTION = ("Beer", "Tobacco", "Bricks", "Cement", "Electricity", "Gas")
_PRISON = ("State", "Gender", "Legal", "Indigenous")
_CHANGE = ("Consumption", "Income", "Production", "Savings", "Unemployment")
_GOODS = ("eggs", "chicken", "copper", "nails", "oil", "wheat")
_AIR = ("pm25", "pm10", "o3", "no2", "so2", "co")

# fmt: off
# The call centre is open on weekdays from 7:00 to 21:05: each of its windows ends at closing time of another day.
_PACKAGED = (
    _packaged("bank_calls", 24, 5, _single(f"{_FPP3}/bank_calls.csv", "5min", "DateTime", "Calls"), step=288),
    _packaged("vic_electricity_demand", 48, 5, _single(f"{_FPP3}/vic_elec.csv", "30min", "Time", "Demand")),
    _packaged("vic_temperature", 48, 5, _single(f"{_FPP3}/vic_elec.csv", "30min", "Time", "Temperature")),
    _packaged("pedestrian", 24, 3, PackagedSeries(f"{_FPP3}/pedestrian.csv", "h", "Date_Time", ("Count",), ("Sensor",))),
    _packaged("epf_price", 24, 3, PackagedSeries(f"{_FPPPY}/EPF_FR_BE.csv", "h", "ds", ("y",), ("unique_id",))),
    _packaged("nord_pool_price", 24, 5, _single(f"{_FPPPY}/electricity_short.csv", "h", "ds", "y")),
    _packaged("gafa_close", 30, 2, PackagedSeries(f"{_FPP3}/gafa_stock.csv", "B", "Date", ("Close",), ("Symbol",))),
    _packaged("gafa_volume", 30, 2, PackagedSeries(f"{_FPP3}/gafa_stock.csv", "B", "Date", ("Volume",), ("Symbol",))),
    _packaged("warsaw_air", 30, 2, PackagedSeries(f"{_FPP3}/warsaw_air_quality.csv", "D", "date", _AIR, (), "%m/%d/%y"), seasonality=1),
    _packaged("ansett", 8, 1, PackagedSeries(f"{_FPP3}/ansett.csv", "W-MON", "Week", ("Passengers",), ("Airports", "Class"), "week")),
    _packaged("us_gasoline", 8, 5, _single(f"{_FPP3}/us_gasoline.csv", "W-MON", "Week", "Barrels", "week")),
    _packaged("mauna_loa_co2", 8, 5, _single(f"{_STATS}/co2/co2.csv", "W-SAT", "date", "co2", "%Y%m%d")),
    _packaged("aus_livestock", 18, 1, PackagedSeries(f"{_FPP3}/aus_livestock.csv", "MS", "Month", ("Count",), ("Animal", "State"), "%Y %b")),
    _packaged("aus_retail", 18, 1, PackagedSeries(f"{_FPP3}/aus_retail.csv", "MS", "Month", ("Turnover",), ("Series ID",), "%Y %b")),
    _packaged("us_employment", 18, 1, PackagedSeries(f"{_FPP3}/us_employment.csv", "MS", "Month", ("Employed",), ("Series_ID",), "%Y %b")),
    _packaged("pbs_scripts", 18, 1, _pbs("Scripts")),
    _packaged("pbs_cost", 18, 1, _pbs("Cost")),
    _packaged("air_passengers", 12, 3, _single(f"{_FPPPY}/AirPassengers.csv", "MS", "ds", "y")),
    _packaged("canadian_gas", 12, 5, _single(f"{_FPP3}/canadian_gas.csv", "MS", "Month", "Volume", "%Y %b")),
    _packaged("us_house_sales", 12, 5, _single(f"{_FPPPY}/hsales.csv", "MS", "ds", "y")),
    _packaged("us_accidental_deaths", 12, 3, _single(f"{_FPPPY}/USAccDeaths.csv", "MS", "ds", "y")),
    _packaged("aus_labour_force", 12, 5, _single(f"{_FPPPY}/labour.csv", "MS", "ds", "y")),
    _packaged("tourism", 8, 1, PackagedSeries(f"{_FPP3}/tourism.csv", "QS", "Quarter", ("Trips",), ("State", "Region", "Purpose"), "quarter")),
    _packaged("aus_prison", 8, 1, PackagedSeries(f"{_FPP3}/prison.csv", "QS", "Quarter", ("Count",), _PRISON, "quarter")),
    _packaged("aus_takings", 8, 1, PackagedSeries(f"{_FPP3}/aus_accommodation.csv", "QS", "Date", ("Takings",), ("State",), "quarter")),
    _packaged("aus_occupancy", 8, 1, PackagedSeries(f"{_FPP3}/aus_accommodation.csv", "QS", "Date", ("Occupancy",), ("State",), "quarter")),
    _packaged("aus_arrivals", 8, 2, PackagedSeries(f"{_FPP3}/aus_arrivals.csv", "QS", "Quarter", ("Arrivals",), ("Origin",), "quarter")),
    _packaged("aus_production", 8, 2, PackagedSeries(f"{_FPP3}/aus_production.csv", "QS", "Quarter", _PRODUCTION, (), "quarter")),
    _packaged("us_change", 8, 2, PackagedSeries(f"{_FPP3}/us_change.csv", "QS", "Quarter", _CHANGE, (), "quarter")),
    _packaged("us_macro", 8, 2, PackagedSeries(f"{_STATS}/macrodata/macrodata.csv", "QS", ("year", "quarter"), _MACRO, (), "quarter")),
    _packaged("world_gdp", 6, 1, _world("GDP")),
    _packaged("world_population", 6, 1, _world("Population")),
    _packaged("world_exports", 6, 1, _world("Exports")),
    _packaged("world_cpi", 6, 1, _world("CPI")),
    _packaged("us_state_gas", 4, 1, PackagedSeries(f"{_FPP3}/us_gas_total.csv", "YS", "year", ("y",), ("state",), "%Y")),
    _packaged("household_budget", 4, 1, PackagedSeries(f"{_FPP3}/hh_budget.csv", "YS", "Year", _BUDGET, ("Country",), "%Y")),
    _packaged("commodity_prices", 6, 2, PackagedSeries(f"{_FPP3}/prices.csv", "YS", "year", _GOODS, (), "%Y")),
    _packaged("pelt", 6, 2, PackagedSeries(f"{_FPP3}/pelt.csv", "YS", "Year", ("Hare", "Lynx"), (), "%Y")),
    _packaged("lake_huron", 6, 3, _single(f"{_FPP3}/LakeHuron.csv", "YS", "index", "value", "%Y")),
    _packaged("sunspots", 6, 5, _single(f"{_STATS}/sunspots/sunspots.csv", "YS", "YEAR", "SUNACTIVITY", "%Y")),
    _packaged("nile", 6, 3, _single(f"{_STATS}/nile/nile.csv", "YS", "year", "volume", "%Y")),
)

# dataset_config, horizon, seasonality: the published definitions of the benchmark, which fev's repository has too.
_ZEROSHOT = (
    ("monash_traffic", 24, 24), ("monash_australian_electricity", 48, 48), ("ercot", 24, 24), ("ETTm", 24, 96),
    ("ETTh", 24, 24), ("exchange_rate", 30, 5), ("nn5", 56, 1), ("monash_nn5_weekly", 8, 1), ("monash_weather", 30, 1),
    ("monash_covid_deaths", 30, 1), ("monash_fred_md", 12, 12), ("m4_quarterly", 8, 4), ("m4_yearly", 6, 1),
    ("dominick", 8, 1), ("m5", 28, 1), ("monash_tourism_monthly", 24, 12), ("monash_tourism_quarterly", 8, 4),
    ("monash_tourism_yearly", 4, 1), ("monash_car_parts", 12, 12), ("monash_hospital", 12, 12), ("monash_cif_2016", 12, 12),
    ("monash_m1_yearly", 6, 1), ("monash_m1_quarterly", 8, 4), ("monash_m1_monthly", 18, 12), ("monash_m3_monthly", 18, 12),
    ("monash_m3_yearly", 6, 1), ("monash_m3_quarterly", 8, 4),
)
# dataset_config, horizon, seasonality, first cutoff: the published definitions of the Chronos repository, which gives no seasonality
# and so takes GluonTS's for the data's frequency. Every column of a dataset is a series there.
_IN_DOMAIN = (
    ("electricity_15min", 24, 96, -5376), ("monash_electricity_hourly", 24, 24, -24), ("monash_electricity_weekly", 8, 1, -8),
    ("monash_kdd_cup_2018", 48, 24, -48), ("m4_daily", 14, 1, -14), ("m4_hourly", 48, 24, -48), ("m4_monthly", 18, 12, -18),
    ("m4_weekly", 13, 1, -13), ("monash_pedestrian_counts", 48, 24, -48), ("taxi_30min", 48, 48, -48),
    ("uber_tlc_hourly", 24, 24, -24), ("uber_tlc_daily", 7, 1, -7), ("monash_rideshare", 24, 24, -24),
    ("monash_temperature_rain", 30, 1, -30), ("monash_london_smart_meters", 48, 48, -48),
)
# fmt: on


def _zeroshot(config: str, horizon: int, seasonality: int) -> EvaluationTask:
    wide = config in ("ETTm", "ETTh")
    path = "autogluon/chronos_datasets_extra" if wide else "autogluon/chronos_datasets"
    return EvaluationTask(config, horizon, seasonality, HubDataset(path, config, all_columns=wide))


def _in_domain(config: str, horizon: int, seasonality: int, cutoff: int) -> EvaluationTask:
    source = HubDataset("autogluon/chronos_datasets", config, all_columns=True)
    return EvaluationTask(config, horizon, seasonality, source, initial_cutoff=cutoff)


_M1_YEARLY = EvaluationTask("m1_yearly", 6, 1, YearlyTsf("aeon/datasets/data/m1_yearly_dataset/m1_yearly_dataset.tsf"))
_GROUPS: dict[str, tuple[EvaluationTask, ...]] = {
    "m1_yearly": (_M1_YEARLY,),
    "packaged": _PACKAGED,
    "chronos_zeroshot": tuple(_zeroshot(*row) for row in _ZEROSHOT),
    "chronos_in_domain": tuple(_in_domain(*row) for row in _IN_DOMAIN),
}


def list_tasks() -> dict[str, tuple[EvaluationTask, ...]]:
    """The known tasks by group. `find_tasks` takes the name of a group or of a task."""
    return dict(_GROUPS)


def find_tasks(names: Iterable[str | EvaluationTask]) -> list[EvaluationTask]:
    """The tasks of the given names, groups and tasks, each once, in the order given.

    Raises:
        ValueError: A name is unknown, or two different tasks have one name.
    """
    known = {task.name: (task,) for group in _GROUPS.values() for task in group} | _GROUPS
    chosen: dict[str, EvaluationTask] = {}
    for name in names:
        if isinstance(name, str) and name not in known:
            raise ValueError(
                f"tasks must name known tasks, found {name!r}. The groups are {', '.join(_GROUPS)}; "
                f"the tasks are {', '.join(sorted(known))}."
            )
        for task in known[name] if isinstance(name, str) else (name,):
            if chosen.setdefault(task.name, task) != task:
                raise ValueError(f"tasks must have different names, found {task.name!r} twice.")
    return list(chosen.values())
