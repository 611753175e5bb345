"""The models that a run begins with: those of checkpoints, for pretraining and for distillation."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from ..checkpoints.dense import checkpoint_path, load_chronos
from ..checkpoints.families import BOLT, FAMILIES, T5, family_of
from .runs import public_name

__all__ = ["class_and_config", "load_chronos_t5", "load_start"]


def class_and_config(path: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and configuration of the checkpoint that a pretraining begins with, a folder or a Hub id.

    Raises:
        ValueError: It is no Chronos-T5 or Chronos-Bolt.
        OSError: There is no such checkpoint.
    """
    config = AutoConfig.from_pretrained(path)
    architecture = (config.architectures or [""])[0]
    for family in (T5, BOLT):
        for pair in family.classes.items():
            for cls in pair:
                if cls.__name__ == architecture and getattr(config, "chronos_config", None):
                    return cls, config
    raise ValueError(
        f"start: {path} is a {architecture or type(config).__name__}; it must be a Chronos-T5 or Chronos-Bolt."
    )


def load_start(start: str, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The model of a checkpoint of this class, in float32."""
    family = family_of(model_class)
    if family is not None and model_class in family.classes:
        return load_chronos(start)
    return model_class.from_pretrained(checkpoint_path(start), dtype=torch.float32)


def load_chronos_t5(model: Any, argument: str) -> PreTrainedModel:
    """A Chronos-T5 of our own, dense or low-rank, in its own dtype, for distillation; `argument` names it in errors.

    A loaded model is copied.

    Raises:
        ValueError: It is no Chronos-T5, or lacks weights.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        loaded, missing = copy.deepcopy(model), set()
    elif isinstance(model, (str, os.PathLike)):
        _check_family(checkpoint_path(model), argument)
        try:
            loaded, info = AutoModelForSeq2SeqLM.from_pretrained(
                checkpoint_path(model), dtype="auto", output_loading_info=True
            )
        except Exception as error:  # the formats of weights have no error in common
            raise OSError(
                f"{argument}: {model} is no checkpoint of a Chronos-T5 that can be read ({error})."
            ) from error
        missing = info["missing_keys"]
    else:
        raise ValueError(f"{argument} must be a folder, a Hub id or a loaded model, found a {type(model).__name__}.")
    name = public_name(model)
    chronos_config = getattr(loaded.config, "chronos_config", None) or {}
    if not loaded.can_generate() or family_of(type(loaded)) is not T5 or "tokenizer_class" not in chronos_config:
        raise ValueError(
            f"{argument}: {name} is a {type(loaded).__name__} without the tokenizer of a Chronos-T5; "
            "it must be a Chronos-T5, dense or compressed."
        )
    if missing:
        raise ValueError(
            f"{argument}: {name} lacks the weights {', '.join(sorted(missing)[:5])} ({len(missing)} in all)."
        )
    return loaded.requires_grad_(True)


def _check_family(source: str, argument: str) -> None:
    """Raise ValueError where the checkpoint is of another family; what cannot be read, its loading reports."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        return
    architecture = (config.architectures or [""])[0]
    pairs = (pair for family in FAMILIES if family is not T5 for pair in family.classes.items())
    if architecture in {cls.__name__ for pair in pairs for cls in pair}:
        raise ValueError(
            f"{argument}: {source} is a {architecture}; recover is for a Chronos-T5. Fine-tune it with transformers' Trainer."
        )
