"""Chronos pipelines of every family, dense or compressed: loaded, told apart by their weights, and called in one way."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline, ChronosConfig, ChronosPipeline, ForecastType
from chronos.chronos import ChronosModel
from chronos.chronos2.preprocess import PreparedInput, from_data_frame
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..data.group_columns import GroupColumns
from ..models.pipeline_lowrank_chronos import LowRankChronos2Pipeline
from ..models.pipeline_lowrank_t5 import LowRankChronosPipeline
from ..runtime.folder import is_export
from ..runtime.pipelines import ExportedModel, exported_folder, load_exported
from .adapters import load_merged
from .connection import from_hub_or_cache
from .dense import as_full_rank
from .devices import known_device, known_dtype
from .families import CHRONOS2, FAMILIES, T5, family_of
from .loading import checkpoint_path

__all__ = [
    "QUANTILE_LEVELS",
    "Forecasts",
    "as_pipeline",
    "fingerprint",
    "in_lean_pipeline",
    "in_stock_pipeline",
    "load_pipeline",
    "pipeline_of",
    "predict_groups",
    "predict_quantiles",
    "prepared_groups",
    "stable_seed",
]

Forecasts: TypeAlias = "tuple[NDArray[np.floating], NDArray[np.floating]]"

CHRONOS_CLASSES = [cls for family in FAMILIES for cls in family.forecasters]
CHRONOS_WANTED = "a Chronos checkpoint, dense or compressed"
# Sizes of values of which the sums of thousands of squares, and parts of them, are normal in float32.
BEARABLE = (1e-12, 1e15)
QUANTILE_LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]  # of forecasts and scores, as in the Chronos papers


def as_pipeline(model: PreTrainedModel) -> BaseChronosPipeline:
    """The pipeline around a loaded Chronos model of any family, dense or low-rank."""
    family = family_of(type(model))
    if family is not T5:
        assert family is not None
        return family.pipelines[type(model) in family.classes.values()](model)
    chronos_config = ChronosConfig(**model.config.chronos_config)
    return LowRankChronosPipeline(
        tokenizer=chronos_config.create_tokenizer(), model=ChronosModel(chronos_config, model)
    )


@from_hub_or_cache
def load_pipeline(
    model: str | os.PathLike,
    *,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    argument: str = "model",
) -> BaseChronosPipeline:
    """The pipeline of a folder, a Hub id or a shipped reference; `argument` is what messages call `model`.

    An adapter of peft is merged into its model. What is on S3, chronos loads by itself. What `export_model` has written is run by its own engine, on the
    CPU and in the numbers that it was exported with, whatever `device` and `dtype`.

    Raises:
        OSError: There is no such checkpoint, or its files cannot be read.
        ValueError: It is no Chronos model, or an incomplete or damaged one (see `load_model`, and `read_export` of exported ones).
        ImportError: The engine of an exported model, or peft for an adapter, is not installed.
    """
    device, dtype = known_device(device), known_dtype(dtype)
    path = checkpoint_path(model)
    if is_export(path):
        return load_exported(path)
    try:
        loaded = _chronos_model(model, argument, dtype=dtype, device=device)
    except (OSError, ValueError):
        if os.path.isdir(path) or (folder := exported_folder(path)) is None:
            raise
        return load_exported(folder)
    if loaded is not None:
        return as_pipeline(loaded.eval())
    pipeline = BaseChronosPipeline.from_pretrained(path, device_map=device, dtype=dtype, trust_remote_code=False)
    return as_pipeline(pipeline.inner_model)


def pipeline_of(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline, argument: str
) -> BaseChronosPipeline:
    """The pipeline of whatever a user has: a name or folder, loaded in float32, a loaded Chronos model, or a pipeline as it is.

    Raises:
        ValueError: It is none of these; `argument` is what messages call it.
        OSError, ImportError: What `load_pipeline` raises.
    """
    if isinstance(model, BaseChronosPipeline):
        return model
    if isinstance(model, str | os.PathLike):
        return load_pipeline(model, dtype="float32", argument=argument)
    if type(model) not in CHRONOS_CLASSES or not getattr(model.config, "chronos_config", None):
        raise ValueError(
            f"{argument} must be {CHRONOS_WANTED} (its name or folder, the loaded model or its pipeline), found a {type(model).__name__}."
        )
    return as_pipeline(model.eval())


def _chronos_model(model: str | os.PathLike, argument: str, **options: Any) -> PreTrainedModel | None:
    """The model, checked; None of what is on S3, which chronos loads by itself."""
    path = checkpoint_path(model)
    if path.startswith("s3://"):
        return None
    loaded, _ = load_merged(model, CHRONOS_CLASSES, CHRONOS_WANTED, argument=argument, **options)
    if not getattr(loaded.config, "chronos_config", None):
        raise ValueError(f"{argument}: {model} has no chronos_config; it must be {CHRONOS_WANTED}.")
    return loaded


def in_lean_pipeline(pipeline: BaseChronosPipeline) -> BaseChronosPipeline:
    """A dense Chronos-T5 or Chronos-2 in chronos' own pipeline in that of our models, sharing its weights; any other as it is.

    So a dense Chronos-T5 draws its samples as compressed models do, and a dense Chronos-2 attends to the series of a group alone.
    """
    if type(pipeline) is ChronosPipeline:
        return LowRankChronosPipeline(pipeline.tokenizer, pipeline.model)
    if type(pipeline) is Chronos2Pipeline and type(pipeline.model) in CHRONOS2.classes:
        return LowRankChronos2Pipeline(as_full_rank(pipeline.model))
    return pipeline


def in_stock_pipeline(pipeline: BaseChronosPipeline) -> BaseChronosPipeline:
    """A dense Chronos-T5 in chronos' own pipeline, as `BaseChronosPipeline.from_pretrained` has it; any other pipeline as it is."""
    is_dense = type(pipeline.inner_model) in T5.classes
    return ChronosPipeline(pipeline.tokenizer, pipeline.model) if is_dense else pipeline


def fingerprint(pipeline: BaseChronosPipeline) -> str:
    """A hash of the configuration and of all weights, wherever they came from; of an exported model that of its files."""
    model = pipeline.inner_model
    if isinstance(model, ExportedModel):
        return model.forecaster.record.fingerprint
    changing = {"_name_or_path", "transformers_version", "auto_map", "dtype"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in changing}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _plain(tensor):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a quantized one is made of, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(tensor, name))


def stable_seed(*parts: object) -> int:
    """An integer in [0, 2**64) that depends on what the parts are written as."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def predict_quantiles(
    pipeline: BaseChronosPipeline,
    inputs: Sequence[torch.Tensor],
    horizon: int,
    quantiles: Sequence[float],
    *,
    num_samples: int | None = None,
    **options: Any,
) -> Forecasts:
    """Quantiles (N, H, Q) and mean forecasts (N, H) of N series of any length; models of quantiles ignore `num_samples`.

    A series of a size whose squares float32 cannot hold is forecast in other units, by an exact power of two: a model is scale-free.
    Where a forecast is not finite, it is made again without the other series, which it may have spoiled or been spoiled by (in Chronos-2).
    """
    if pipeline.forecast_type == ForecastType.SAMPLES:
        options["num_samples"] = num_samples
    units = np.array([_unit(values) for values in inputs])
    inputs = [values if unit == 1 else values / unit for values, unit in zip(inputs, units)]

    def forecast(rows: Sequence[int]) -> Forecasts:
        of_series = {name: [options[name][row] for row in rows] for name in ("seeds",) if name in options}
        series = [inputs[row] for row in rows]
        found, mean = pipeline.predict_quantiles(series, horizon, list(quantiles), **{**options, **of_series})
        if isinstance(found, list):  # Chronos-2: one tensor a series, of shape (1, H, Q)
            found, mean = torch.cat(found), torch.cat(mean)
        return found.numpy(), mean.numpy()

    return _in_units(*_finite(forecast, len(inputs)), units)


def prepared_groups(
    past: pd.DataFrame, future: pd.DataFrame | None, columns: GroupColumns, horizon: int, context_length: int
) -> list[PreparedInput]:
    """The groups of two tables in long format as Chronos-2 is given them: chronos encodes their categories, over the whole past, before that is cut.

    Args:
        past: Targets and covariates; items are numbered from 0 on, in their order.
        future: The known covariates of the next `horizon` steps; not looked at where there are none.
        columns: Of both.
        horizon: Steps to forecast.
        context_length: How many of the last steps are kept.
    """
    groups = from_data_frame(
        past,
        list(columns.targets),
        horizon,
        future_df=future if columns.known_covariates else None,
        id_column=columns.item,
        timestamp_column=columns.time,
        validate_inputs=False,
    )
    for group in groups:
        group["context"] = group["context"][:, -context_length:]
    return groups


def predict_groups(
    pipeline: Chronos2Pipeline, groups: Sequence[PreparedInput], horizon: int, quantiles: Sequence[float]
) -> Forecasts:
    """Quantiles (N, K, H, Q) and mean forecasts (N, K, H) of the K targets of N groups of any length, as `predict_quantiles`.

    A series that is one value throughout is given as zero. Chronos divides what its mean leaves of it by the deviation of that, and where
    the mean is rounded, as it is in one batch and not in another, that is 1 in place of 0, and the group reads it.
    """
    shifts = [_constant(group["context"]) for group in groups]
    shifted = [
        [group[name] - shift for name in ("context", "future_covariates")] for group, shift in zip(groups, shifts)
    ]
    units = np.array([[_unit(values) for values in torch.cat(parts, dim=1)] for parts in shifted])
    given: list[PreparedInput] = []
    for group, (context, future), unit in zip(groups, shifted, torch.tensor(units, dtype=torch.float32)[..., None]):
        given.append({**group, "context": context / unit, "future_covariates": future / unit})

    def forecast(rows: Sequence[int]) -> Forecasts:
        batch = [given[row] for row in rows]
        found, mean = pipeline.predict_quantiles(
            batch, horizon, list(quantiles), batch_size=sum(len(group["context"]) for group in batch)
        )
        return torch.stack(found).numpy(), torch.stack(mean).numpy()

    num_targets = groups[0]["n_targets"]
    levels, mean = _in_units(*_finite(forecast, len(groups)), units[:, :num_targets])
    shift = torch.stack(shifts)[:, :num_targets].numpy()  # (N, K, 1)
    return levels + shift[..., None], mean + shift


def _constant(rows: torch.Tensor) -> torch.Tensor:
    """The value of each row (V, T) that has but one, and 0 of others, (V, 1)."""
    low = rows.nan_to_num(torch.inf).amin(dim=1, keepdim=True)
    high = rows.nan_to_num(-torch.inf).amax(dim=1, keepdim=True)
    return torch.where(low == high, low, 0.0)


def _finite(forecast: Callable[[Sequence[int]], Forecasts], count: int) -> Forecasts:
    """The forecasts of so many rows; those that are not finite made again alone."""
    levels, mean = forecast(range(count))
    is_finite = np.isfinite(levels).reshape(count, -1).all(axis=1) & np.isfinite(mean).reshape(count, -1).all(axis=1)
    for row in np.flatnonzero(~is_finite) if count > 1 else ():
        levels[row : row + 1], mean[row : row + 1] = forecast([int(row)])
    return levels, mean


def _in_units(levels: NDArray[np.floating], mean: NDArray[np.floating], units: NDArray[np.float64]) -> Forecasts:
    """The forecasts times the units of their series."""
    if (units == 1).all():
        return levels, mean
    with np.errstate(over="ignore"):  # the caller says what is not finite
        return (levels * units[..., None, None]).astype(levels.dtype), (mean * units[..., None]).astype(mean.dtype)


def _unit(values: torch.Tensor) -> float:
    """1, or the power of two below the largest absolute value where its square is beyond, or near the end of, what float32 holds."""
    largest = float(values.abs().nan_to_num(0.0, posinf=0.0).max()) if len(values) else 0.0
    if largest == 0 or BEARABLE[0] <= largest <= BEARABLE[1]:
        return 1.0
    return 2.0 ** math.floor(math.log2(largest))
