"""The models that a run begins with: those of checkpoints, for pretraining and for distillation."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.families import CHRONOS2, FAMILIES, T5, family_of
from ..checkpoints.loading import check_config, load_config, load_model, named_class, public_name

__all__ = ["class_and_config", "load_chronos_t5", "load_start"]

START_CLASSES = tuple(cls for family in FAMILIES for cls in family.forecasters)
START_WANTED = "a Chronos-T5, Chronos-Bolt or Chronos-2"
T5_WANTED = "a Chronos-T5, dense or compressed: recover is for a Chronos-T5 alone; fine-tune other models with transformers' Trainer"


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


def load_chronos_t5(model: Any, argument: str) -> PreTrainedModel:
    """A Chronos-T5 of our own, dense or low-rank, in its own dtype, for distillation; `argument` names it in errors.

    A loaded model is copied.

    Raises:
        ValueError: It is no Chronos-T5, or lacks weights.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        loaded = copy.deepcopy(model)
    elif isinstance(model, (str, os.PathLike)):
        loaded = load_model(model, T5.forecasters, T5_WANTED, argument=argument)
    else:
        raise ValueError(f"{argument} must be a folder, a Hub id or a loaded model, found a {type(model).__name__}.")
    chronos_config = getattr(loaded.config, "chronos_config", None) or {}
    if not loaded.can_generate() or family_of(type(loaded)) is not T5 or "tokenizer_class" not in chronos_config:
        raise ValueError(
            f"{argument}: {public_name(model)} is a {type(loaded).__name__} without the tokenizer of a Chronos-T5; "
            "it must be a Chronos-T5, dense or compressed."
        )
    return loaded.requires_grad_(True)
