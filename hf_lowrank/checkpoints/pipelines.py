"""Chronos pipelines of every family, dense or compressed: loaded, told apart by their weights, and called in one way."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from chronos import BaseChronosPipeline, ChronosConfig, ChronosPipeline, ForecastType
from chronos.chronos import ChronosModel
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..models.pipeline_lowrank_chronos import is_adapter
from ..models.pipeline_lowrank_t5 import LowRankChronosPipeline
from .connection import from_hub_or_cache
from .families import FAMILIES, T5, family_of
from .loading import checkpoint_path, load_model

__all__ = [
    "QUANTILE_LEVELS",
    "as_pipeline",
    "fingerprint",
    "in_lean_pipeline",
    "in_stock_pipeline",
    "known_device",
    "known_dtype",
    "load_pipeline",
    "predict_quantiles",
    "stable_seed",
]

CHRONOS_CLASSES = [cls for family in FAMILIES for cls in family.forecasters]
CHRONOS_WANTED = "a Chronos checkpoint, dense or compressed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def known_device(device: str | None) -> str:
    """The device, or by default the GPU if there is one.

    Raises:
        ValueError: It is none, or this machine has none.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda', found {device!r}: {error}") from None
    if kind == "meta":
        raise ValueError(f"device must be one that computes, such as 'cpu' or 'cuda', found {device!r}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that this machine has, found {device!r}: {reason}") from None
    return device


def known_dtype(dtype: torch.dtype | str, *, has_auto: bool = True) -> torch.dtype | str:
    """The dtype that a name stands for, or one of `torch`'s itself.

    Args:
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`.
        has_auto: Whether it may be `"auto"`, that of the file, which stays a word.

    Raises:
        ValueError: It is another.
    """
    if dtype in DTYPES.values() or (has_auto and dtype == "auto"):
        return dtype
    if dtype not in DTYPES:
        names = [*(["auto"] if has_auto else []), *DTYPES]
        raise ValueError(f"dtype must be one of {', '.join(names)}, found {str(dtype)!r}.")
    return DTYPES[str(dtype)]


@from_hub_or_cache
def load_pipeline(
    model: str | os.PathLike,
    *,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    argument: str = "model",
) -> BaseChronosPipeline:
    """The pipeline of a folder, a Hub id or a shipped reference; `argument` is what messages call `model`.

    A folder with an adapter, and what is on S3, chronos loads by itself.

    Raises:
        OSError: There is no such checkpoint, or its files cannot be read.
        ValueError: It is no Chronos model, or an incomplete or damaged one (see `load_model`).
    """
    device, dtype = known_device(device), known_dtype(dtype)
    loaded = _chronos_model(model, argument, dtype=dtype, device=device)
    if loaded is not None:
        return as_pipeline(loaded.eval())
    return in_lean_pipeline(
        BaseChronosPipeline.from_pretrained(
            checkpoint_path(model), device_map=device, dtype=dtype, trust_remote_code=False
        )
    )


def _chronos_model(model: str | os.PathLike, argument: str, **options: Any) -> PreTrainedModel | None:
    """The model, checked; None of what chronos loads by itself: an adapter, and what is on S3."""
    path = checkpoint_path(model)
    is_local = os.path.isdir(path)
    if path.startswith("s3://") or (is_local and is_adapter(path)):
        return None
    try:
        loaded = load_model(model, CHRONOS_CLASSES, CHRONOS_WANTED, argument=argument, **options)
    except OSError:
        if is_local or not is_adapter(path):
            raise
        return None
    # What has just been loaded from the Hub has told the cache which commit is the newest, so this asks nobody twice.
    if not is_local and is_adapter(path):
        return None
    if not getattr(loaded.config, "chronos_config", None):
        raise ValueError(f"{argument}: {model} has no chronos_config; it must be {CHRONOS_WANTED}.")
    return loaded


def in_lean_pipeline(pipeline: BaseChronosPipeline) -> BaseChronosPipeline:
    """A dense Chronos-T5 in LowRankChronosPipeline; any other pipeline as it is.

    So dense and compressed models draw their samples in the same way.
    """
    return (
        LowRankChronosPipeline(pipeline.tokenizer, pipeline.model) if type(pipeline) is ChronosPipeline else pipeline
    )


def in_stock_pipeline(pipeline: BaseChronosPipeline) -> BaseChronosPipeline:
    """A dense Chronos-T5 in chronos' own pipeline, as `BaseChronosPipeline.from_pretrained` has it; any other pipeline as it is."""
    is_dense = type(pipeline.inner_model) in T5.classes
    return ChronosPipeline(pipeline.tokenizer, pipeline.model) if is_dense else pipeline


def fingerprint(pipeline: BaseChronosPipeline) -> str:
    """A hash of the configuration and of all weights, wherever they came from."""
    model = pipeline.inner_model
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
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Quantiles (N, H, Q) and mean forecasts (N, H) of N series of any length; models of quantiles ignore `num_samples`.

    A series of a size whose squares float32 cannot hold is forecast in other units, by an exact power of two: a model is scale-free.
    Where a forecast is not finite, it is made again without the other series, which it may have spoiled or been spoiled by (in Chronos-2).
    """
    if pipeline.forecast_type == ForecastType.SAMPLES:
        options["num_samples"] = num_samples
    units = np.array([_unit(values) for values in inputs])
    inputs = [values if unit == 1 else values / unit for values, unit in zip(inputs, units)]

    def forecast(rows: Sequence[int]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        of_series = {name: [options[name][row] for row in rows] for name in ("seeds",) if name in options}
        series = [inputs[row] for row in rows]
        found, mean = pipeline.predict_quantiles(series, horizon, list(quantiles), **{**options, **of_series})
        if isinstance(found, list):  # Chronos-2: one tensor a series, of shape (1, H, Q)
            found, mean = torch.cat(found), torch.cat(mean)
        return found.numpy(), mean.numpy()

    levels, mean = forecast(range(len(inputs)))
    is_finite = np.isfinite(levels).all(axis=(1, 2)) & np.isfinite(mean).all(axis=1)
    for row in np.flatnonzero(~is_finite) if len(inputs) > 1 else ():
        levels[row : row + 1], mean[row : row + 1] = forecast([int(row)])
    if (units != 1).any():
        with np.errstate(over="ignore"):  # the caller says what is not finite
            levels = (levels * units[:, None, None]).astype(levels.dtype)
            mean = (mean * units[:, None]).astype(mean.dtype)
    return levels, mean


def _unit(values: torch.Tensor) -> float:
    """1, or the power of two below the largest absolute value where its square is beyond, or near the end of, what float32 holds."""
    largest = float(values.abs().nan_to_num(0.0, posinf=0.0).max()) if len(values) else 0.0
    if largest == 0 or BEARABLE[0] <= largest <= BEARABLE[1]:
        return 1.0
    return 2.0 ** math.floor(math.log2(largest))
