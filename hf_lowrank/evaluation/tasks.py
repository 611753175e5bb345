"""The tasks that `evaluate` scores models on; `file_task` makes one of the user's own file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..checkpoints.pipelines import QUANTILE_LEVELS
from ..data.group_columns import GroupColumns
from ..data.tables import LONG_FORMAT
from ..data.times import inferred_frequency
from .sources import GroupsFile, HubDataset, PackagedSeries, SeriesFile, YearlyTsf, seasonality_of, store_parquet

__all__ = ["EvaluationTask", "file_task", "import_fev"]


@dataclass(frozen=True)
class EvaluationTask:
    """Forecast `horizon` steps after each of `num_windows` cutoffs of every item of `source`.

    The first cutoff is `initial_cutoff`, an index that is negative from the end, or a time; by default the last window ends where the
    series ends. The cutoffs are `window_step_size` steps apart, by default the horizon. MASE and SQL are scaled by the error
    of the seasonal naive forecast of period `seasonality` on the past.

    An item has one `targets` column or several, whose scores are averaged. A Chronos-2 forecasts them together and reads the covariates of
    the past and those that are known in the future; other models, and Seasonal Naive, forecast each target by itself. Windows begin at
    the earliest where an item has `min_context_length` steps before the cutoff, and hold at most `max_context_length` of them.

    `metrics` are fev's names, or mappings of a name and its options, that a benchmark asks for, the main one first.
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
    metrics: tuple[str | Mapping[str, Any], ...] = field(default=("MASE", "WQL", "SQL"), hash=False)

    @property
    def main_metric(self) -> str:
        """The name of the metric that a benchmark compares models by."""
        main = self.metrics[0]
        return main if isinstance(main, str) else main["name"]

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
            eval_metric=self.metrics[0],
            extra_metrics=list(self.metrics[1:]),
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
        except AssertionError as error:  # fev's word for a column that is missing or of another type
            raise ValueError(
                f"task {self.name!r}: the dataset {task.dataset_path} is not as fev needs it: {error}"
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
    return {
        "dataset_path": source.dataset_path,
        "dataset_config": source.dataset_config,
        "generate_univariate_targets_from": "__ALL__" if source.all_columns else None,
        "static_columns": list(source.static_columns),
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
