"""The models that a run begins with: those of checkpoints, for pretraining and for distillation."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.families import CHRONOS2, FAMILIES, T5, family_of
from ..checkpoints.loading import check_config, load_config, load_model, named_class, public_name

__all__ = ["class_and_config", "load_forecaster", "load_start"]

START_CLASSES = tuple(cls for family in FAMILIES for cls in family.forecasters)
START_WANTED = "a Chronos-T5, Chronos-Bolt or Chronos-2"
FORECASTER_WANTED = f"{START_WANTED}, dense or compressed"


def class_and_config(start: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and configuration of the checkpoint that a pretraining begins with, a folder or a Hub id.

    Raises:
        ValueError: It is no Chronos model.
        OSError: There is no such checkpoint.
    """
    config = load_config(start, argument="start")
    model_class = named_class(config)
    if model_class not in START_CLASSES or not getattr(config, "chronos_config", None):
        name = type(config).__name__ if model_class is None else model_class.__name__
        raise ValueError(f"start: {start} is a {name}; it must be {START_WANTED}.")
    check_config(config, model_class, f"start: {start}")
    if family_of(model_class) is not CHRONOS2 and getattr(config, "decoder_start_token_id", None) is None:
        raise ValueError(
            f"start: {start} must have a decoder_start_token_id in its config.json to be trained, found none."
        )
    if config.output_attentions:
        raise ValueError(
            f"start: {start} must not have output_attentions in its config.json, with which it cannot be saved."
        )
    return model_class, config


def load_start(start: str) -> PreTrainedModel:
    """The model of a checkpoint that a pretraining begins with, in float32.

    Raises:
        ValueError: It is no Chronos model, or lacks weights.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    return load_model(start, START_CLASSES, START_WANTED, argument="start", dtype=torch.float32)


def load_forecaster(model: Any, argument: str) -> PreTrainedModel:
    """A Chronos model of any family, dense or low-rank, in its own dtype, for distillation; `argument` names it in errors.

    A loaded model is copied.

    Raises:
        ValueError: It is no Chronos model, or lacks weights.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        loaded = copy.deepcopy(model)
    elif isinstance(model, (str, os.PathLike)):
        loaded = load_model(model, START_CLASSES, FORECASTER_WANTED, argument=argument)
    else:
        raise ValueError(f"{argument} must be a folder, a Hub id or a loaded model, found a {type(model).__name__}.")
    settings = getattr(loaded.config, "chronos_config", None) or {}
    is_readable = family_of(type(loaded)) is not T5 or "tokenizer_class" in settings
    if type(loaded) not in START_CLASSES or not settings or not is_readable:
        raise ValueError(
            f"{argument}: {public_name(model)} is a {type(loaded).__name__} without the settings of a Chronos model; it must be "
            f"{FORECASTER_WANTED}."
        )
    return loaded.requires_grad_(True)
