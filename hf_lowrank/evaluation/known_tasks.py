"""The tasks that are known by name, in groups.

`m1_yearly` and the group `packaged` are real series that installed Python packages ship: they need no network.
`chronos_zeroshot` and `chronos_in_domain` are the two benchmarks of the Chronos paper (arXiv 2403.07815) and `fev_bench` and
`fev_bench_mini` those of fev-bench (arXiv 2509.26468), with several targets and covariates, as their authors define them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml

from .sources import HubDataset, PackagedSeries, YearlyTsf, seasonality_of
from .tasks import EvaluationTask

__all__ = ["find_tasks", "list_tasks"]

FEV_BENCH = resources.files("hf_lowrank") / "assets" / "fev_bench.yaml"


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


def _fev_bench(definition: Mapping[str, Any]) -> EvaluationTask:
    """The task that fev makes of these arguments."""
    config, target = definition["dataset_config"], definition.get("target", "target")
    return EvaluationTask(
        definition.get("task_name", config),
        definition["horizon"],
        definition["seasonality"],
        HubDataset(definition["dataset_path"], config, static_columns=tuple(definition.get("static_columns", ()))),
        definition["num_windows"],
        initial_cutoff=definition.get("initial_cutoff"),
        targets=(target,) if isinstance(target, str) else tuple(target),
        past_covariates=tuple(definition.get("past_dynamic_columns", ())),
        known_covariates=tuple(definition.get("known_dynamic_columns", ())),
        min_context_length=definition.get("min_context_length", 1),
        metrics=(definition["eval_metric"], *definition["extra_metrics"]),
    )


@cache
def _groups() -> dict[str, tuple[EvaluationTask, ...]]:
    definitions = yaml.load(FEV_BENCH.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    fev_bench = {task.name: task for task in map(_fev_bench, definitions["tasks"])}
    return {
        "m1_yearly": (
            EvaluationTask("m1_yearly", 6, 1, YearlyTsf("aeon/datasets/data/m1_yearly_dataset/m1_yearly_dataset.tsf")),
        ),
        "packaged": _PACKAGED,
        "chronos_zeroshot": tuple(_zeroshot(*row) for row in _ZEROSHOT),
        "chronos_in_domain": tuple(_in_domain(*row) for row in _IN_DOMAIN),
        "fev_bench": tuple(fev_bench.values()),
        "fev_bench_mini": tuple(fev_bench[name] for name in definitions["mini"]),
    }


def list_tasks() -> dict[str, tuple[EvaluationTask, ...]]:
    """The known tasks by group. `find_tasks` takes the name of a group or of a task."""
    return dict(_groups())


def find_tasks(names: Iterable[str | EvaluationTask]) -> list[EvaluationTask]:
    """The tasks of the given names, groups and tasks, each once, in the order given.

    Raises:
        ValueError: A name is unknown, or two different tasks have one name.
    """
    groups = _groups()
    known = {task.name: (task,) for group in groups.values() for task in group} | groups
    chosen: dict[str, EvaluationTask] = {}
    for name in names:
        if isinstance(name, str) and name not in known:
            raise ValueError(
                f"tasks must name known tasks, found {name!r}. The groups are {', '.join(groups)}; "
                f"the tasks are {', '.join(sorted(known))}."
            )
        for task in known[name] if isinstance(name, str) else (name,):
            if chosen.setdefault(task.name, task) != task:
                raise ValueError(f"tasks must have different names, found {task.name!r} twice.")
    return list(chosen.values())
