"""The one loader: what a name stands for, what its configuration says it is, and its weights, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from .families import FAMILIES

__all__ = ["REFERENCES", "checkpoint_path", "load_config", "load_model", "named_class", "public_name"]

ASSETS = Path(__file__).parents[1] / "assets"
# Small trained checkpoints that the package ships.
REFERENCES = {"reference": ASSETS / "reference", "reference-bolt": ASSETS / "reference_bolt"}
CONFIG_CLASSES = {T5Config, *(family.config_class for family in FAMILIES)}
# Dense and low-rank classes by name; the last as Google's first checkpoints call it.
CLASSES: dict[str, type[PreTrainedModel]] = {
    cls.__name__: cls for family in FAMILIES for pair in family.classes.items() for cls in pair
} | {"T5WithLMHeadModel": T5ForConditionalGeneration}


def checkpoint_path(name: str | os.PathLike) -> str:
    """The folder or Hub id that `name` stands for: `"reference"` and `"reference-bolt"` are in the package."""
    return str(REFERENCES.get(str(name), name))


def public_name(source: str | os.PathLike | PreTrainedModel) -> str:
    """What a checkpoint is called where others read it: a Hub id, or the last part of a path, the rest of which is the machine's business."""
    if isinstance(source, PreTrainedModel):
        name = source.config.name_or_path or type(source).__name__
    else:
        name = str(source)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_hub_id else Path(name).name


def load_config(source: str | os.PathLike, *, argument: str = "model") -> PreTrainedConfig:
    """The configuration of a folder, a Hub id or a shipped reference.

    Args:
        source: What the user gave.
        argument: The name of the argument that it was given for, for messages.

    Raises:
        OSError: There is no such checkpoint, or its files cannot be read.
        ValueError: Its configuration is of no model that transformers knows.
    """
    path = checkpoint_path(source)
    try:
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        raise OSError(f"{argument}: {path} is no folder and no Hub id that can be read ({error}).") from error
    except ValueError as error:
        raise ValueError(
            f"{argument}: {path} must be a checkpoint with the config.json of a model that transformers knows ({error})."
        ) from error


def named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a configuration says it is of, dense or low-rank, of one of the families; None of any other."""
    if type(config) not in CONFIG_CLASSES:
        return None
    return CLASSES.get(_architecture(config))


def _architecture(config: PreTrainedConfig) -> str:
    default = "T5ForConditionalGeneration" if type(config) is T5Config else ""
    return (getattr(config, "architectures", None) or [default])[0]


def load_model(
    source: str | os.PathLike,
    classes: Collection[type[PreTrainedModel]],
    wanted: str,
    *,
    argument: str = "model",
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """A checkpoint of one of the families, with all of its weights.

    Args:
        source: A folder, a Hub id or a shipped reference.
        classes: The model classes that may be loaded.
        wanted: What they are, for messages: "it must be ...".
        argument: The name of the argument that `source` was given for, for messages.
        dtype: Of the loaded weights; `"auto"` for that of the file.

    Raises:
        OSError: There is no such checkpoint, or its files cannot be read.
        ValueError: It is another model, or a weight is missing or of another shape than the configuration says.
    """
    path = checkpoint_path(source)
    config = load_config(source, argument=argument)
    model_class = named_class(config)
    if model_class is None or model_class not in classes:
        is_known = type(config) in CONFIG_CLASSES
        kind = _architecture(config) or type(config).__name__ if is_known else f"{config.model_type} checkpoint"
        raise ValueError(f"{argument}: {path} is a {kind}; it must be {wanted}.")
    # All dense families call themselves T5, and Chronos-2 has a configuration of its own.
    config = model_class.config_class.from_pretrained(path)
    try:
        model, info = model_class.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # the formats of weights have no error in common
        raise OSError(
            f"{argument}: the weights of {path} cannot be read; a file is missing, truncated or damaged ({error})."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{argument}: {path} lacks the weights {', '.join(missing[:5])} ({len(missing)} in all).")
    for name, given, needed in sorted(info["mismatched_keys"]):
        raise ValueError(f"{argument}: the weight {name} of {path} must have shape {[*needed]}, found {[*given]}.")
    return model
