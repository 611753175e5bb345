"""Accuracy of Chronos models on fev tasks, relative to Seasonal Naive and to a dense model.

    result = evaluate(["my-lowrank"], tasks=["m1_yearly", "packaged"], against="amazon/chronos-t5-tiny")
    result.aggregate["my-lowrank"]["relative_to_dense"]["WQL"]
    result.save("result.json")

Every model sees the same windows, and the sampling models draw from the same random state in each batch, so
a comparison is paired and the same call gives the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from chronos import BaseChronosPipeline
from numpy.typing import NDArray

from ..checkpoints.pipelines import QUANTILE_LEVELS, fingerprint, load_pipeline, predict_quantiles, stable_seed
from ..files import write_text
from ..progress import progress_display
from .tasks import EvaluationTask, find_tasks, import_fev

__all__ = ["METRICS", "SEASONAL_NAIVE", "EvaluationResult", "EvaluationRow", "evaluate", "seasonal_naive"]

METRICS = ("WQL", "MASE", "SQL", "RMSSE")
SEASONAL_NAIVE = "seasonal_naive"

FloatArray: TypeAlias = NDArray[np.floating]
Model: TypeAlias = "str | Path | BaseChronosPipeline"


@dataclass(frozen=True)
class EvaluationRow:
    """The scores of one model on one task: fev's metrics, each the mean over the task's windows.

    WQL, MASE and SQL take quantiles 0.1, ..., 0.9 and the median; RMSSE takes the mean forecast (Chronos-Bolt
    and Chronos-2 forecast quantiles only, and give their median for it). A metric is NaN where it is undefined: series with a
    constant past have no scale and are left out of MASE, SQL and RMSSE. `seconds` is the time of the forecasts.
    """

    task: str
    model: str
    WQL: float
    MASE: float
    SQL: float
    RMSSE: float
    num_series: int
    num_windows: int
    horizon: int
    seconds: float


@dataclass(frozen=True)
class EvaluationResult:
    """The rows, and for each model `{"relative_to_seasonal_naive" | "relative_to_dense": {metric: {...}}}`.

    A relative score is the geometric mean over tasks of the model's score divided by the baseline's, as in the
    Chronos paper; `low` and `high` bound its 95 % bootstrap interval over tasks. Tasks on which either
    score is zero or undefined do not count; `num_tasks` says how many did.
    """

    results: tuple[EvaluationRow, ...]
    aggregate: Mapping[str, Any]
    settings: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One row for each task and model."""
        return pd.DataFrame([asdict(row) for row in self.results])

    def to_json(self) -> str:
        """An object with `results`, `aggregate` and `settings`; an undefined number is null."""
        content = {
            "results": [asdict(row) for row in self.results],
            "aggregate": self.aggregate,
            "settings": self.settings,
        }
        return json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write a .json or .csv file (the rows alone); it appears whole or not at all."""
        path = Path(path)
        if path.suffix not in (".json", ".csv"):
            raise ValueError(f"path must end in .json or .csv, found {path.name!r}.")
        write_text(path, self.to_json() if path.suffix == ".json" else self.to_frame().to_csv(index=False))


def evaluate(
    models: Model | Sequence[Model] | Mapping[str, Model],
    tasks: str | EvaluationTask | Iterable[str | EvaluationTask] = ("m1_yearly", "packaged"),
    *,
    against: Model | None = None,
    batch_size: int = 32,
    num_samples: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | str = "float32",
    num_bootstrap: int = 2000,
    progress: bool = False,
) -> EvaluationResult:
    """Score models and Seasonal Naive on tasks.

    Args:
        models: Folders, Hub ids, `"reference"` or loaded pipelines of any Chronos family, dense or compressed. The keys of a mapping
            are the names in the result; otherwise what is given is its own name. May be empty.
        tasks: Names of tasks or groups (see `list_tasks`), or tasks (see `file_task`).
        against: The dense model that scores are also made relative to. It is scored too.
        batch_size: Series in one call of `predict_quantiles`.
        num_samples: Sample paths a series, for Chronos-T5; by default what its checkpoint says.
        seed: Seeds the sampling and the bootstrap.
        cache: A folder for finished (task, model) cells; what is there already, made from the same weights, data
            and settings, is not computed again.
        device: By default the GPU if there is one.
        dtype: Of the models that are loaded here.
        num_bootstrap: Resamples of the tasks.
        progress: Whether to show a progress bar.

    Raises:
        ImportError: fev or a package that ships a task's series is not installed.
        OSError: A dataset or a model cannot be had.
        ValueError: An argument, or a series in a file, is not as it should be.
    """
    import_fev()
    for name, value in {"batch_size": batch_size, "num_samples": num_samples, "num_bootstrap": num_bootstrap}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}.")
    chosen = find_tasks([tasks] if isinstance(tasks, str | EvaluationTask) else tasks)
    dense = None if against is None else _name(against)
    named = _by_name(models, against)
    settings = {
        "seed": seed,
        "batch_size": batch_size,
        "num_samples": num_samples,
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("chronos-forecasting", "fev", "torch", "transformers")},
    }
    pipelines = {SEASONAL_NAIVE: None, **{name: _load(model, settings) for name, model in named.items()}}
    weights = {name: pipeline and fingerprint(pipeline) for name, pipeline in pipelines.items()}
    rows: list[EvaluationRow] = []
    with progress_display(show=progress) as bar:
        step = bar.add_task("", total=len(chosen) * len(pipelines))
        for definition in chosen:
            bar.update(step, description=definition.name)
            task = definition.to_fev()
            identity = _identity(task)
            for name, pipeline in pipelines.items():
                bar.update(step, description=f"{definition.name}: {name}")
                compute = partial(_score, task, pipeline, settings)
                scores = _cached(cache, [weights[name], identity, settings], compute)
                rows.append(EvaluationRow(task=definition.name, model=name, **scores))
                bar.advance(step)
    return EvaluationResult(tuple(rows), _aggregate(rows, dense, num_bootstrap, seed), {"against": dense, **settings})


def _by_name(models: Any, against: Any) -> dict[str, Any]:
    """The models and the dense one by name; what is given twice counts once."""
    if isinstance(models, Mapping):
        pairs = list(models.items())
    else:
        listed = [models] if isinstance(models, str | os.PathLike | BaseChronosPipeline) else models
        pairs = [(_name(model), model) for model in listed]
    named: dict[str, Any] = {}
    for name, model in pairs if against is None else [*pairs, (_name(against), against)]:
        if name == SEASONAL_NAIVE:
            raise ValueError(f"models: the name {SEASONAL_NAIVE!r} is the baseline's, give another one.")
        if named.setdefault(name, model) is not model and isinstance(model, BaseChronosPipeline):
            raise ValueError(f"models: two pipelines have the name {name!r}; give a mapping from names to models.")
    return named


def _name(model: Any) -> str:
    if isinstance(model, BaseChronosPipeline):
        return model.inner_model.name_or_path or type(model.inner_model).__name__
    if isinstance(model, str | os.PathLike):
        return str(model)
    raise TypeError(f"models must be folders, Hub ids or Chronos pipelines, found {type(model).__name__}.")


def _load(model: Any, settings: Mapping[str, Any]) -> BaseChronosPipeline:
    if isinstance(model, BaseChronosPipeline):
        return model
    return load_pipeline(model, device=settings["device"], dtype=settings["dtype"], argument="models")


def _identity(task: Any) -> dict[str, Any]:
    """What the scores of a `fev.Task` depend on: its definition, and for a dataset from elsewhere its content."""
    import fev

    return {**task.to_dict(), "content": fev.utils.generate_fingerprint(task.load_full_dataset())}


def _cached(folder: str | Path | None, key: list[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if folder is None:
        return compute()
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = Path(folder) / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    scores = compute()
    write_text(path, json.dumps(scores))
    return scores


def _score(task: Any, pipeline: BaseChronosPipeline | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Forecast every window of a `fev.Task` and score it with fev's metrics."""
    import datasets
    import pyarrow as pa
    from fev.metrics import get_metric

    scores: list[dict[str, float]] = []
    seconds, num_series = 0.0, 0
    for number, window in enumerate(task.iter_windows(num_proc=0)):
        past, _ = window.get_input_data()
        contexts = list(past.with_format("numpy", dtype=np.float64)["target"])
        start = time.perf_counter()
        batches = []
        for first in range(0, len(contexts), settings["batch_size"]):
            batch = contexts[first : first + settings["batch_size"]]
            with torch.random.fork_rng():
                torch.manual_seed(stable_seed(settings["seed"], task.task_name, number, first))
                batches.append(_forecast(pipeline, batch, task, settings["num_samples"]))
        seconds += time.perf_counter() - start
        num_series = max(num_series, len(contexts))
        quantiles, mean = (np.concatenate(parts) for parts in zip(*batches))
        columns = {str(level): list(quantiles[..., i]) for i, level in enumerate(QUANTILE_LEVELS)}
        window_scores: dict[str, float] = {}
        for metrics, point in ((("MASE", "WQL", "SQL"), columns["0.5"]), (("RMSSE",), list(mean))):
            table = pa.table({"predictions": point, **columns})
            forecasts = datasets.Dataset(table, fingerprint="forecasts")  # hashing takes longer than scoring
            window_scores |= window.compute_metrics(
                task.clean_and_validate_predictions(forecasts),
                metrics=[get_metric(metric) for metric in metrics],
                seasonality=task.seasonality,
                quantile_levels=QUANTILE_LEVELS,
            )
        scores.append(window_scores)
    means = {metric: float(np.mean([score[metric] for score in scores])) for metric in METRICS}
    return {**means, "num_series": num_series, "num_windows": len(scores), "horizon": task.horizon, "seconds": seconds}


def _forecast(
    pipeline: BaseChronosPipeline | None, contexts: Sequence[FloatArray], task: Any, num_samples: int | None
) -> tuple[FloatArray, FloatArray]:
    """Quantiles of shape (N, H, Q) and mean forecasts of shape (N, H) for N contexts of any length."""
    if pipeline is None:
        point = np.stack([seasonal_naive(values, task.horizon, task.seasonality) for values in contexts])
        return np.repeat(point[:, :, None], len(QUANTILE_LEVELS), axis=2), point
    inputs = [torch.as_tensor(values, dtype=torch.float32) for values in contexts]
    quantiles, mean = predict_quantiles(pipeline, inputs, task.horizon, QUANTILE_LEVELS, num_samples=num_samples)
    return quantiles.astype(np.float64), mean.astype(np.float64)


def seasonal_naive(values: FloatArray, horizon: int, seasonality: int) -> FloatArray:
    """The last season repeated: shape (T,) to shape (horizon,).

    A missing value of the last season is taken from the latest season that has it; where none has, or where the series is
    shorter than a season, the forecast is the mean of the series, and 0 if nothing was observed at all.
    """
    observed = values[np.isfinite(values)]
    fill = observed.mean() if len(observed) else 0.0
    if len(values) < seasonality:
        return np.full(horizon, fill)
    padding = np.full(-len(values) % seasonality, np.nan)
    seasons = np.concatenate([padding, values]).reshape(-1, seasonality)
    latest = pd.DataFrame(seasons).ffill().to_numpy()[-1]
    return np.resize(np.where(np.isfinite(latest), latest, fill), horizon)


def _aggregate(
    rows: Sequence[EvaluationRow], dense: str | None, num_bootstrap: int, seed: int
) -> dict[str, dict[str, Any]]:
    score = {(row.model, row.task): row for row in rows}
    tasks = list(dict.fromkeys(row.task for row in rows))
    baselines = {"relative_to_seasonal_naive": SEASONAL_NAIVE} | ({"relative_to_dense": dense} if dense else {})
    aggregate: dict[str, dict[str, Any]] = {}
    for model in dict.fromkeys(row.model for row in rows):
        aggregate[model] = {"seconds": sum(row.seconds for row in rows if row.model == model)}
        for title, baseline in baselines.items():
            aggregate[model][title] = {
                metric: _geometric_mean(
                    [getattr(score[model, task], metric) for task in tasks],
                    [getattr(score[baseline, task], metric) for task in tasks],
                    num_bootstrap,
                    seed,
                )
                for metric in METRICS
            }
    return aggregate


def _geometric_mean(
    scores: Sequence[float], baseline: Sequence[float], num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """exp(mean(log(score / baseline))) over the tasks on which both are positive, with its 95 % bootstrap interval."""
    pair = np.array([scores, baseline])
    pair = pair[:, (np.isfinite(pair) & (pair > 0)).all(axis=0)]
    if pair.shape[1] == 0:
        return {"geometric_mean": math.nan, "low": math.nan, "high": math.nan, "num_tasks": 0}
    logs = np.log(pair[0] / pair[1])
    resampled = np.random.default_rng(seed).choice(logs, size=(num_bootstrap, len(logs))).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "geometric_mean": math.exp(logs.mean()),
        "low": math.exp(low),
        "high": math.exp(high),
        "num_tasks": len(logs),
    }


def _without_nan(value: Any) -> Any:
    """The same structure with None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
