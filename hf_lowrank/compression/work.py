"""What one compression works with: the model loaded, the settings checked, the data calibrated on."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from chronos import BaseChronosPipeline
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.dense import DenseCheckpoint, load_dense
from ..checkpoints.objectives import objective_of
from ..checkpoints.rank_table import LayerName, LayerRanks, PerHeadRanks, RankTable
from ..exporting.writing import check_model, check_packages
from .calibration import Calibration, calibrate
from .loss_bound import HELD_OUT_BATCHES
from .policies import check_reachable
from .settings import BACKENDS, CompressionSettings, SettingsArguments

__all__ = ["Work", "begin", "calibration_of", "with_arguments"]


@dataclass(frozen=True)
class Work:
    """What one compression works with: the dense model, what is asked for, and the configuration that it fills in."""

    dense: DenseCheckpoint
    settings: CompressionSettings
    forms: dict[str, str]  # of each kind of attention
    config: PreTrainedConfig
    show_progress: bool | None


def with_arguments(work: Work, **arguments: Any) -> Work:
    """The work with some of its settings changed."""
    return replace(work, settings=replace(work.settings, **arguments))


def begin(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    settings: CompressionSettings | None,
    arguments: SettingsArguments,
    *,
    dtype: torch.dtype | str,
    device: str | None,
    show_progress: bool | None,
) -> Work:
    """The model loaded, and all checked that can be known before it is looked into."""
    if settings is None:
        settings = CompressionSettings(**arguments)
    elif arguments:
        raise ValueError(f"Give either settings or {', '.join(arguments)}, not both.")
    elif not isinstance(settings, CompressionSettings):
        raise TypeError(
            f"settings must be CompressionSettings, found {settings!r}; give budgets by name, as in ratio=0.5."
        )
    dense = load_dense(model, dtype=dtype, device=device)
    if (export := BACKENDS[settings.backend]) is not None:
        check_model(dense.source_class, dense.config)
        check_packages(export[0])
    forms, config = settings.forms_for(dense.family), _lowrank_config(dense, settings)
    check_reachable(settings, forms, dense, config)
    return Work(dense, settings, forms, config, show_progress)


def _lowrank_config(dense: DenseCheckpoint, settings: CompressionSettings) -> PreTrainedConfig:
    """The low-rank configuration with the source's ranks, or with the user's table; what the settings ask for must be possible."""
    if settings.max_cache_ratio is not None and not any(name.kind in dense.family.cached for name, _ in dense.layers):
        raise ValueError(
            f"max_cache_ratio: {dense.source}, a {dense.source_class.__name__}, keeps no cache; leave it out."
        )
    if settings.method == "paper" and not dense.has_whole_heads:
        raise ValueError(
            f"method='paper' truncates the matrices of whole heads; {dense.source} is a {dense.source_class.__name__} with smaller ones."
        )
    tables = dense.given_ranks.to_dicts(dense.family.lowrank_config(dense.config))
    try:
        tables["attention_ranks"] |= settings.ranks or {}
        config = dense.family.lowrank_config(dense.config, **tables)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ranks is no table for this model: {error}") from error
    for name, _ in dense.layers if settings.policy == "ranks" else ():
        _check_heads(dense, name, RankTable.of(config)[name])
    return config


def _check_heads(dense: DenseCheckpoint, name: LayerName, ranks: LayerRanks) -> None:
    """Raise ValueError where a table has larger heads than a low-rank source."""
    if not isinstance(ranks, PerHeadRanks) or ranks == dense.given_ranks[name]:
        return
    largest = dense.largest_heads(name)
    for part, limit in vars(largest).items():
        if getattr(ranks, part) > limit:
            raise ValueError(
                f"ranks: {name}.{part} must be at most {limit}, as in {dense.source}, found {getattr(ranks, part)}."
            )


def calibration_of(work: Work) -> Calibration | None:
    """The calibration that was given, or that of the data that were given; None for weights alone."""
    dense, settings, data = work.dense, work.settings, work.settings.calibration
    if isinstance(data, (str, os.PathLike)) and str(data).endswith(".safetensors"):
        data = Calibration.load(data)
    if isinstance(data, Calibration):
        data.check(dense)
        return data
    if data is None:
        return None
    has_own_data = objective_of(dense.config, dense.model_class).has_own_data
    if isinstance(data, str) and data == "synthetic" and not has_own_data:
        warnings.warn(
            f"{dense.source} is no Chronos checkpoint, so there is nothing to calibrate it on; it is compressed by its weights alone. "
            "Give calibration= batches of tokens, or calibration=None to say that this is meant.",
            stacklevel=4,
        )
        return None
    return calibrate(
        dense,
        data,
        num_held_out_batches=0 if settings.max_loss is None else HELD_OUT_BATCHES,
        feed_forward=settings.has_feed_forward,
        seed=settings.seed,
        show_progress=work.show_progress,
    )
