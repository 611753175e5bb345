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
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from chronos import BaseChronosPipeline

from ..checkpoints.devices import known_device, known_dtype
from ..checkpoints.loading import public_name
from ..checkpoints.pipelines import (
    fingerprint,
    load_pipeline,
    stable_seed,
)
from ..files import write_text
from ..progress import progress_display
from ..versions import versions
from .aggregate import aggregate_scores
from .forecasters import forecaster, targets_of
from .known_tasks import find_tasks
from .naive import SEASONAL_NAIVE
from .result import EvaluationResult
from .row import EvaluationRow
from .scores import METRICS, score_forecasts
from .series_scores import series_parts
from .tasks import EvaluationTask, import_fev

__all__ = ["evaluate"]

CELL = "by_series"  # what a cell of the cache has that those of older versions lack
Model: TypeAlias = "str | Path | BaseChronosPipeline"


def evaluate(  # noqa: PLR0913 a public call names all of its options
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
    show_progress: bool = False,
) -> EvaluationResult:
    """Score models and Seasonal Naive on tasks.

    Args:
        models: Folders, Hub ids, `"reference"` or loaded pipelines of any Chronos family, dense or compressed. The keys of a mapping
            are the names in the result; otherwise a name or path is its own name, and a pipeline has the last part of its. May be
            empty.
        tasks: Names of tasks or groups (see `list_tasks`), or tasks (see `file_task`).
        against: The dense model that scores are also made relative to. It is scored too.
        batch_size: Series in one call of `predict_quantiles`.
        num_samples: Sample paths a series, for Chronos-T5; by default what its checkpoint says.
        seed: Seeds the sampling and the bootstrap.
        cache: A folder for finished (task, model) cells; what is there already, made from the same weights, data
            and settings, is not computed again.
        device: By default the GPU if there is one.
        dtype: Of the models that are loaded here: "float32", "bfloat16", "float16", or "auto" for that of each file.
        num_bootstrap: Resamples of the tasks and of their series.
        show_progress: Show a progress bar.

    Raises:
        ImportError: fev or a package that ships a task's series is not installed.
        OSError: A dataset or a model cannot be had.
        ValueError: An argument, or a series in a file, is not as it should be.
    """
    import_fev()
    for name, value in {"batch_size": batch_size, "num_samples": num_samples, "num_bootstrap": num_bootstrap}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}.")
    definitions = find_tasks([tasks] if isinstance(tasks, str | EvaluationTask) else tasks)
    dense = None if against is None else _name_of(against)
    model_of = _models_by_name(models, against)
    settings = {
        "seed": seed,
        "batch_size": batch_size,
        "num_samples": num_samples,
        "device": known_device(device),
        "dtype": str(known_dtype(dtype)).removeprefix("torch."),
        "versions": versions("fev"),
    }
    pipelines = {
        SEASONAL_NAIVE: None,
        **{
            name: _pipeline(model, settings, "against" if model is against else "models")
            for name, model in model_of.items()
        },
    }
    weights = {name: pipeline and fingerprint(pipeline) for name, pipeline in pipelines.items()}
    rows: list[EvaluationRow] = []
    with progress_display(show=show_progress) as bar:
        step = bar.add_task("", total=len(definitions) * len(pipelines))
        for definition in definitions:
            bar.update(step, description=definition.name)
            task = definition.to_fev()
            identity = _identity(task)
            for name, pipeline in pipelines.items():
                bar.update(step, description=f"{definition.name}: {name}")
                compute = partial(_score_task, task, pipeline, settings)
                scores = _cached(cache, [weights[name], identity, settings, CELL], compute)
                of_task = {"seasonality": task.seasonality, "dataset_fingerprint": identity["content"]}
                rows.append(EvaluationRow(task=definition.name, model=name, **of_task, **scores))
                bar.advance(step)
            _warn_of_undefined(rows[-len(pipelines) :])
    aggregate = aggregate_scores(rows, dense, num_bootstrap=num_bootstrap, seed=seed)
    return EvaluationResult(tuple(rows), aggregate, {"against": dense, **settings})


def _models_by_name(models: Any, against: Any) -> dict[str, Any]:
    """The models and the dense one by name; what is given twice counts once."""
    if isinstance(models, Mapping):
        pairs = list(models.items())
    else:
        listed = [models] if isinstance(models, str | os.PathLike | BaseChronosPipeline) else models
        pairs = [(_name_of(model), model) for model in listed]
    model_of: dict[str, Any] = {}
    for name, model in pairs if against is None else [*pairs, (_name_of(against), against)]:
        if name == SEASONAL_NAIVE:
            raise ValueError(f"models: the name {SEASONAL_NAIVE!r} is the baseline's, give another one.")
        if model_of.setdefault(name, model) is not model and isinstance(model, BaseChronosPipeline):
            raise ValueError(f"models: two pipelines have the name {name!r}; give a mapping from names to models.")
    return model_of


def _name_of(model: Any) -> str:
    """What a model is called in the result where the caller gives it no name."""
    if isinstance(model, BaseChronosPipeline):
        return public_name(model.inner_model)
    if isinstance(model, str | os.PathLike):
        return str(model)
    raise TypeError(f"models must be folders, Hub ids or Chronos pipelines, found {type(model).__name__}.")


def _pipeline(model: Any, settings: Mapping[str, Any], argument: str) -> BaseChronosPipeline:
    """The pipeline itself, or that of a folder or Hub id."""
    if isinstance(model, BaseChronosPipeline):
        return model
    return load_pipeline(model, device=settings["device"], dtype=settings["dtype"], argument=argument)


def _identity(task: Any) -> dict[str, Any]:
    """What the scores of a `fev.Task` depend on: its definition, and for a dataset from elsewhere its content."""
    import fev

    return {**task.to_dict(), "content": fev.utils.generate_fingerprint(task.load_full_dataset())}


def _cached(folder: str | Path | None, key: list[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` answers, from the file of this key in the folder if it is there, and otherwise kept in it."""
    if folder is None:
        return compute()
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = Path(folder) / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    scores = compute()
    write_text(path, json.dumps(scores))
    return scores


def _score_task(task: Any, pipeline: BaseChronosPipeline | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Forecast every window of a `fev.Task`, by Seasonal Naive without a pipeline, and score it: the fields of a row."""
    scores: list[dict[str, float]] = []
    parts: list[dict[str, list[float]]] = []
    seconds, num_items, num_windows = 0.0, 0, 0
    options = {
        metric["name"]: metric for metric in (task.eval_metric, *task.extra_metrics) if not isinstance(metric, str)
    }
    place_of = {item: i for i, item in enumerate(task.load_full_dataset()[task.id_column])}
    for number, window in enumerate(task.iter_windows(num_proc=0)):
        past, _ = window.get_input_data()
        names = list(past[task.id_column])
        contexts = targets_of(past, task)
        start = time.perf_counter()
        forecast = forecaster(pipeline, task, window, contexts, settings["num_samples"])
        batches = []
        for first in range(0, len(names), settings["batch_size"]):
            with torch.random.fork_rng():
                torch.manual_seed(stable_seed(settings["seed"], task.task_name, number, first))
                batches.append(forecast(slice(first, first + settings["batch_size"])))
        seconds += time.perf_counter() - start
        num_items, num_windows = max(num_items, len(names)), num_windows + 1
        quantiles, mean = (np.concatenate(parts).astype(np.float64) for parts in zip(*batches))
        truths = np.stack(targets_of(window.get_ground_truth(), task))
        for k in range(len(task.target_columns)):  # fev's metrics are means over the targets
            data: dict[str, Any] = {
                "targets": truths[:, k],
                "contexts": [context[k] for context in contexts],
                "quantiles": quantiles[:, k],
                "mean": mean[:, k],
                "seasonality": task.seasonality,
            }
            scores.append(score_forecasts(**data, names=names, options=options))
            parts.append(series_parts(**data, places=[place_of[name] for name in names], num_places=len(place_of)))
    means = {metric: float(np.mean([score[metric] for score in scores])) for metric in METRICS}
    return {
        **means,
        "num_series": num_items * len(task.target_columns),
        "num_windows": num_windows,
        "horizon": task.horizon,
        "seconds": seconds,
        "by_series": {name: [part[name] for part in parts] for name in parts[0]},
    }


def _warn_of_undefined(rows: Sequence[EvaluationRow]) -> None:
    """Say which metrics a task has of no model."""
    undefined = [metric for metric in METRICS if all(np.isnan(getattr(row, metric)) for row in rows)]
    if undefined:
        warnings.warn(
            f"task {rows[0].task!r}: {', '.join(undefined)} undefined: no series varies over a season before what is forecast, or nothing "
            "is observed there.",
            stacklevel=3,
        )
