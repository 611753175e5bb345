"""Accuracy against compression: one checkpoint compressed by several methods to several sizes, and scored."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from ..checkpoints.dense import load_chronos
from ..checkpoints.pipelines import as_pipeline
from ..checkpoints.summary import summarize
from ..compression.calibration import calibrate
from ..compression.compress import compress_pretrained
from ..compression.settings import CompressionSettings
from ..evaluation.evaluate import evaluate
from ..evaluation.known_tasks import find_tasks
from ..evaluation.tasks import EvaluationTask, import_fev
from ..files import without_nan, write_json
from ..published_figures import TRUNCATED_RATIOS, TRUNCATED_WQL

__all__ = ["DEFAULT_METHODS", "METHODS", "SweepPoint", "SweepResult", "sweep"]

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "per_head": {"form": "per_head"},
    "latent": {"form": "latent"},
    "no_refit": {"refit": False},
    "weights": {"calibration": None},
    "paper": {"method": "paper"},
}
LOOKING_AT_NO_DATA = ("weights", "paper")
DEFAULT_METHODS = ("default", "weights", "paper")


@dataclass(frozen=True)
class SweepPoint:
    """One compressed model; `wql` and `mase` are relative to the dense one: (geometric mean, low, high) over the tasks.

    `kept` is the share of the attention parameters, or of the ranks for the paper's method, which keeps all parameters.
    """

    method: str
    policy: str
    value: float
    kept: float
    attention_ratio: float
    cache_ratio: float
    parameters: int
    wql: tuple[float, float, float]
    mase: tuple[float, float, float]


@dataclass(frozen=True)
class SweepResult:
    """The points of a sweep, and what they were measured on."""

    points: tuple[SweepPoint, ...]
    settings: Mapping[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """One row for each compressed model."""
        return pd.DataFrame([asdict(point) for point in self.points])

    def to_dict(self) -> dict[str, Any]:
        """The `points`, the paper's `published` ones beside them, and the `settings`, as JSON has them."""
        content = {
            "points": [asdict(point) for point in self.points],
            "published": {"ratios": TRUNCATED_RATIOS, **TRUNCATED_WQL},
            "settings": self.settings,
        }
        return without_nan(content)

    def save(self, path: str | Path) -> None:
        """Write `to_dict` to a JSON file; it appears whole or not at all."""
        write_json(path, self.to_dict())


def compressed_models(
    dense: PreTrainedModel,
    methods: Iterable[str],
    policy: str,
    values: Iterable[float],
    *,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[tuple[str, float], PreTrainedModel]:
    """The dense model compressed by every one of the `METHODS` named to every value of a policy; calibrated once for all.

    Args:
        dense: A dense Chronos model, which is left as it is.
        methods: Names of `METHODS`.
        policy: The argument of `compress_pretrained` that the values are of: "ratio" or "epsilon".
        values: The sizes.
        seed: Of the calibration.
        show_progress: Show progress bars.

    Returns:
        The models by method and value.
    """
    methods, values = list(methods), list(values)
    for value in values:  # said before the calibration
        CompressionSettings(**{policy: value})  # type: ignore[arg-type]
    if not set(methods) <= set(LOOKING_AT_NO_DATA):
        calibration = calibrate(dense, seed=seed, show_progress=show_progress)
    models = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the scores show what the warning would say
        for value in values:
            for method in methods:
                arguments: dict[str, Any] = {policy: value, **METHODS[method]}
                if method not in LOOKING_AT_NO_DATA:
                    arguments["calibration"] = calibration
                models[method, value] = compress_pretrained(dense, show_progress=show_progress, **arguments)
    return models


def model_name(method: str, value: float) -> str:
    """What a compressed model is called in tables: "latent 0.25"."""
    return f"{method} {value:.4g}"


def sweep(  # noqa: PLR0913 a public call names all of its options
    source: str,
    *,
    ratios: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    tasks: Iterable[str | EvaluationTask] = ("m1_yearly", "packaged"),
    num_samples: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    show_progress: bool = False,
) -> SweepResult:
    """Compress a Chronos checkpoint by every method to every size and score all of them beside the dense model.

    Args:
        source: A Hub id, a folder, `"reference"`, `"reference-bolt"` or `"reference-2"`.
        ratios, epsilons: The sizes, one of the two; by default the paper's four ratios.
        methods: Of `METHODS`: the default, parts of it, weights alone, and the paper's.
        tasks, num_samples, seed, cache, show_progress: As in `evaluate`.

    Raises:
        ImportError: fev is not installed.
        ValueError: Both ratios and epsilons, an unknown method or task, a size that is none, or `source` is no dense Chronos model.
    """
    if ratios is not None and epsilons is not None:
        raise ValueError("Give either ratios or epsilons, not both.")
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"methods must be of {', '.join(METHODS)}; found {', '.join(sorted(unknown))}.")
    import_fev()
    definitions = find_tasks(tasks)
    policy, values = ("epsilon", epsilons) if epsilons is not None else ("ratio", ratios or TRUNCATED_RATIOS)
    dense = load_chronos(source)
    models = compressed_models(dense, methods, policy, values, seed=seed, show_progress=show_progress)
    pipelines = {model_name(*key): as_pipeline(model) for key, model in models.items()}
    result = evaluate(
        {"dense": as_pipeline(dense), **pipelines},
        definitions,
        against="dense",
        num_samples=num_samples,
        seed=seed,
        cache=cache,
        show_progress=show_progress,
    )

    points = [
        _point(method, policy, value, model, result.aggregate[model_name(method, value)]["relative_to_dense"])
        for (method, value), model in models.items()
    ]
    tasks_scored = sorted({row.task for row in result.results})
    return SweepResult(tuple(points), {"source": source, "tasks": tasks_scored, **result.settings})


def _point(
    method: str, policy: str, value: float, model: PreTrainedModel, relative_scores: Mapping[str, Any]
) -> SweepPoint:
    """A compressed model with its sizes and its scores relative to the dense one, by metric."""
    sizes = summarize(model.config)
    wql, mase = (
        tuple(relative_scores[metric][name] for name in ("geometric_mean", "low", "high"))
        for metric in ("WQL", "MASE")
    )
    return SweepPoint(
        method=method,
        policy=policy,
        value=value,
        kept=model.config.compression.get("kept_rank_ratio", sizes.attention_ratio),
        attention_ratio=sizes.attention_ratio,
        cache_ratio=sizes.cache_ratio,
        parameters=model.num_parameters(),
        wql=wql,
        mase=mase,
    )
