"""What a model of any family reads: windows of series, texts, or tokens.

Windows of one batch have one length and missing values are filled linearly, so that every token of a time series counts. Texts are
padded, and padding is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chronos import ChronosConfig
from numpy.typing import NDArray
from torch import nn

from ..checkpoints.families import BOLT, CHRONOS2, T5, family_of
from ..data.mixture import synthetic_series
from ..data.series import read_series
from ..data.tokens import tokenize_windows

__all__ = ["InputBatch", "draw_windows", "family_title", "input_batches", "mix"]

TIME_STEPS, PATCHED_TIME_STEPS = 512, 1024  # of context, by default
BATCH_SERIES = 8
SMALLEST_SAMPLE = 4096  # tokens
Windows = list[NDArray[np.float32]]


def family_title(model: nn.Module) -> str:
    """The title of the family of a Chronos model, of a class of the user's that derives from one too; else the configuration's model_type."""
    if getattr(model.config, "chronos_config", None) is not None:
        for model_class in type(model).__mro__:
            if (family := family_of(model_class)) is not None:
                return family.title
    return str(getattr(model.config, "model_type", type(model).__name__))


@dataclass(frozen=True)
class InputBatch:
    """One batch of what a model reads.

    Attributes:
        arguments: The arguments of the model's `forward`.
        masks: Which tokens of "encoder" and "decoder" count, bool (batch, tokens); all of them where there is no mask.
        group_size: How many series that follow each other attend to one another, in Chronos-2.
    """

    arguments: dict[str, Any]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    group_size: int = 1


def draw_windows(data: Any, count: int, length: int, *, seed: int) -> Windows:
    """`count` windows of at most `length` steps, float32: `"synthetic"`, or drawn from series of the user's."""
    if isinstance(data, str) and data == "synthetic":
        return list(synthetic_series(count, length, seed=seed))
    series = [_filled(values) for values in read_series(data)]
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(len(series)) for _ in range(-(-count // len(series)))])[:count]
    windows = []
    for i in chosen:
        end = rng.integers(min(length, len(series[i])), len(series[i]) + 1)
        windows.append(series[i][max(0, end - length) : end].astype(np.float32))
    return windows


def _filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The series with straight lines where values are missing."""
    observed = np.flatnonzero(~np.isnan(values))
    return np.interp(np.arange(len(values)), observed, values[observed])


def mix(series: NDArray[np.float32], related: int, *, seed: int) -> NDArray[np.float32]:
    """Series (n, length) of which `related` that follow each other have common causes.

    Half of the variance of each is its own; half is a random mixture of the first few of its group (at most four), standardised.
    """
    rng = np.random.default_rng(seed)
    unit = (series - series.mean(1, keepdims=True)) / (series.std(1, keepdims=True) + 1e-6)
    groups = unit.reshape(-1, related, series.shape[1])
    weights = rng.normal(size=(len(groups), related, min(4, related)))
    weights /= np.linalg.norm(weights, axis=2, keepdims=True)
    common = weights @ groups[:, : weights.shape[2]]
    return ((groups + common) / np.sqrt(2)).reshape(series.shape).astype(np.float32)


def _batches(windows: Windows, size: int) -> Iterator[torch.Tensor]:
    """Batches of windows of one length, that of the shortest: the last values of each."""
    windows = sorted(windows, key=len)
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        yield torch.from_numpy(np.stack([values[-len(batch[0]) :] for values in batch]))


def _chronos_t5(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    """The last steps of every window are the target, and at most half of it."""
    settings = ChronosConfig(**model.config.chronos_config)
    horizon = min(settings.prediction_length, batch.shape[1] // 2)
    context, target = batch.split([batch.shape[1] - horizon, horizon], dim=1)
    tokens = tokenize_windows(replace(settings, prediction_length=horizon), context, target)
    if not model.config.is_encoder_decoder:
        del tokens["labels"]
    return tokens


def _chronos_bolt(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    return {"context": batch}


def _chronos_2(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    return {"context": batch, "num_output_patches": min(4, model.chronos_config.max_output_patches)}


def _patchtst(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    channels = model.config.num_input_channels
    batch = batch.repeat_interleave(-(-channels // len(batch)), 0) if len(batch) < channels else batch
    return {"past_values": batch[: len(batch) // channels * channels].unflatten(0, (-1, channels)).mT}


def _timesfm(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    return {"past_values": list(batch)} | ({"freq": [0] * len(batch)} if model.config.model_type == "timesfm" else {})


def _lagged(model: Any, batch: torch.Tensor) -> dict[str, Any]:
    """Informer and Autoformer: values with time features, here the position in the window, and an observed mask."""
    config = model.config
    channels = getattr(config, "input_size", 1)
    values = batch[:, :, None].expand(-1, -1, channels) if channels > 1 else batch
    time = torch.linspace(-0.5, 0.5, batch.shape[1])[None, :, None].expand(len(batch), -1, config.num_time_features)
    past = batch.shape[1] - config.prediction_length
    arguments: dict[str, Any] = {
        "past_values": values[:, :past],
        "past_time_features": time[:, :past],
        "past_observed_mask": torch.ones_like(values[:, :past]),
        "future_values": values[:, past:],
        "future_time_features": time[:, past:],
    }
    for name, dtype in (("categorical", torch.long), ("real", torch.float32)):
        if count := getattr(config, f"num_static_{name}_features", 0):
            arguments[f"static_{name}_features"] = torch.zeros(len(batch), count, dtype=dtype)
    return arguments


@dataclass(frozen=True)
class SeriesReader:
    """How the models of a family read series.

    Attributes:
        arguments: Makes the arguments of `forward` of a model and of windows (batch, steps).
        steps: Says how many steps a window of a model has at most.
        is_exact: No window may be shorter.
    """

    arguments: Callable[[Any, torch.Tensor], dict[str, Any]]
    steps: Callable[[Any], int]
    is_exact: bool = False


def _chronos_t5_steps(model: Any) -> int:
    settings = model.config.chronos_config
    return min(settings["context_length"], TIME_STEPS) + settings["prediction_length"]


def _patched_steps(model: Any) -> int:
    return min(model.config.chronos_config["context_length"], PATCHED_TIME_STEPS)


def _lagged_steps(model: Any) -> int:
    return model.config.context_length + max(model.config.lags_sequence) + model.config.prediction_length


# For the Chronos families `checkpoints.objectives` says what a batch is, too, and shares with this table what both do with a window:
# `tokenize_windows`. Everything else differs on purpose. A calibration wants training's windows (lengths drawn at random, values
# missing, future covariates, the masks of a loss); a spectrum wants whole windows of one length, in which every token counts.
SERIES_READERS = {
    T5.title: SeriesReader(_chronos_t5, _chronos_t5_steps),
    BOLT.title: SeriesReader(_chronos_bolt, _patched_steps),
    CHRONOS2.title: SeriesReader(_chronos_2, _patched_steps),
    "patchtst": SeriesReader(_patchtst, lambda model: model.config.context_length, is_exact=True),
    "timesfm": SeriesReader(_timesfm, lambda model: min(model.config.context_length, TIME_STEPS)),
    "timesfm2_5": SeriesReader(_timesfm, lambda model: min(model.config.context_length, TIME_STEPS)),
    "informer": SeriesReader(_lagged, _lagged_steps, is_exact=True),
    "autoformer": SeriesReader(_lagged, _lagged_steps, is_exact=True),
}


def input_batches(
    model: nn.Module,
    data: Any,
    *,
    num_series: int | None,
    context_length: int | None,
    seed: int,
    variates: int = 1,
    related: int = 1,
    tokenizer: Callable[[list[str]], Mapping[str, torch.Tensor]] | None = None,
) -> list[InputBatch]:
    """Batches for a model: series for a time-series model, texts or batches of tokens for another.

    Args:
        model: A model of any family; its configuration and its class say what it reads.
        data: `"synthetic"`; series, as `data.series.read_series` takes them; for a text model a .txt file of one text a line, or a list
            of dictionaries with `input_ids` and, where the model has them, `attention_mask` and `labels`.
        num_series: How many windows or texts; by default as many as hold 4 d_model tokens, and 4,096 at least.
        context_length: Time steps of the longest window; by default 512, or 1,024 for a model that reads patches. A model that reads
            windows of one length alone gets that length.
        seed: The seed of the random numbers that synthetic series are made of, or that windows are drawn from given series with.
        variates: How many series that follow each other are one group of Chronos-2.
        related: How many synthetic series that follow each other have common causes; a batch holds as many, in whole groups.
        tokenizer: Makes `input_ids` and `attention_mask` of a list of texts.

    Raises:
        ValueError: The model is of no family that reads this kind of data.
    """
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping) and "input_ids" in data[0]:
        return [_token_batch(model, batch) for batch in data]
    family = family_title(model)
    if family not in SERIES_READERS:
        if tokenizer is not None and isinstance(data, (str, Path)) and Path(data).suffix == ".txt":
            lines = [line for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
            if not lines:
                raise ValueError(f"data: {data} must have a text in a line, found none.")
            lines = lines[: num_series or 256]
            return [
                _token_batch(model, tokenizer(lines[i : i + BATCH_SERIES])) for i in range(0, len(lines), BATCH_SERIES)
            ]
        raise ValueError(
            f"data: a {family} model reads no time series here; give batches of tokens (a list of dictionaries with input_ids), "
            f"for a folder with a tokenizer a .txt file of one text a line, or 'none' for the weights alone."
        )
    reader = SERIES_READERS[family]
    steps = reader.steps(model)
    if context_length is not None and not reader.is_exact:
        steps = context_length + (steps - min(steps, TIME_STEPS) if family == T5.title else 0)
    if num_series is None:
        patch = getattr(getattr(model, "chronos_config", None), "input_patch_size", 0)
        tokens = max(1, steps // (patch or getattr(model.config, "patch_length", 1)))
        num_series = -(-max(SMALLEST_SAMPLE, 4 * model.config.hidden_size) // tokens)
    windows = draw_windows(data, -(-num_series // related) * related, steps, seed=seed)
    if related > 1 and isinstance(data, str) and data == "synthetic":
        windows = list(mix(np.stack(windows), related, seed=seed))
    if reader.is_exact and (shortest := min(map(len, windows))) < steps:
        raise ValueError(f"data: this {family} model needs series of {steps} steps or more, found one of {shortest}.")
    size = related if related > 1 else max(BATCH_SERIES, getattr(model.config, "num_input_channels", 1))
    batches = []
    for batch in _batches(windows, size):
        batch = batch[: len(batch) // variates * variates]
        arguments = reader.arguments(model, batch)
        if family == CHRONOS2.title:
            arguments["group_ids"] = torch.arange(len(batch)) // variates
        batches.append(InputBatch(arguments, group_size=variates))
    return batches


def _token_batch(model: nn.Module, batch: Mapping[str, Any]) -> InputBatch:
    """Tokens of texts, with a mask of those that are no padding; without labels a decoder reads the text itself."""
    arguments = {name: torch.as_tensor(values) for name, values in batch.items() if name != "token_type_ids"}
    ids = arguments["input_ids"]
    mask = arguments.get("attention_mask", torch.ones_like(ids)).bool()
    masks = {"encoder": mask}
    if model.config.is_encoder_decoder:
        labels = arguments.setdefault("labels", ids.masked_fill(~mask, -100))
        masks["decoder"] = labels != -100
        if not hasattr(model, "lm_head"):  # a bare model has no labels to shift
            arguments["decoder_input_ids"] = arguments.pop("labels").clamp_min(0)
    else:
        arguments.pop("labels", None)
    return InputBatch(arguments, masks)
