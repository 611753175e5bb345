"""The one loader: what a name stands for, what its configuration says it is, and its weights, checked."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from ..models.checked_loading import check_finite, load_checked, stored_weights
from ..models.checked_settings import check_settings
from ..models.modeling_lowrank_t5 import LowRankT5EncoderModel
from ..models.weight_files import StoredTensor
from .families import DENSE_CLASSES, FAMILIES, LOWRANK_CLASSES, family_of

__all__ = [
    "REFERENCES",
    "check_config",
    "check_finite",
    "checkpoint_path",
    "load_config",
    "load_model",
    "named_class",
    "public_name",
]

ASSETS = Path(__file__).parents[1] / "assets"
# Small trained checkpoints that the package ships.
REFERENCES = {"reference": ASSETS / "reference", "reference-bolt": ASSETS / "reference_bolt"}
CONFIG_CLASSES = {T5Config, *(family.config_class for family in FAMILIES)}
ENCODERS = (T5EncoderModel, LowRankT5EncoderModel)
# Dense and low-rank classes by name; the last as Google's first checkpoints call it.
CLASSES: dict[str, type[PreTrainedModel]] = {cls.__name__: cls for cls in (*DENSE_CLASSES, *LOWRANK_CLASSES)} | {
    "T5WithLMHeadModel": T5ForConditionalGeneration
}


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
    # A Hub id has an owner; a name that is nearly a reference's would be looked for on the network first.
    is_name = "/" not in path and not Path(path).exists()
    if is_name and (alike := difflib.get_close_matches(path, REFERENCES, n=1, cutoff=0.8)):
        raise OSError(f"{argument}: there is no {path!r}; did you mean {alike[0]!r}?")
    try:
        # No checkpoint runs code of its own here, and none asks whether it may.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise OSError(f"{argument}: {path} is no folder and no Hub id that can be read ({error}).") from error
    except ImportError:
        raise
    except Exception as error:  # whatever a value of a wrong type makes of code that expects another
        raise ValueError(
            f"{argument}: {path} must be a checkpoint with the config.json of a model that transformers knows ({_said(error)})."
        ) from error


def _said(error: Exception) -> str:
    """An error of another package as part of a sentence."""
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:500].rstrip(".")


def named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a configuration says it is of, dense or low-rank, of one of the families; None of any other."""
    if type(config) not in CONFIG_CLASSES:
        return None
    return CLASSES.get(_architecture(config))


def _architecture(config: PreTrainedConfig) -> str:
    """The name of the class; "" where it says none."""
    default = "T5ForConditionalGeneration" if type(config) is T5Config else ""
    names = getattr(config, "architectures", None) or [default]
    return names[0] if isinstance(names, list) and isinstance(names[0], str) else ""


def load_model(
    source: str | os.PathLike,
    classes: Collection[type[PreTrainedModel]],
    wanted: str,
    *,
    argument: str = "model",
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    check_values: bool = True,
) -> PreTrainedModel:
    """A checkpoint of one of the families, with all of its weights and no others, all of them finite numbers.

    Args:
        source: A folder, a Hub id or a shipped reference.
        classes: The model classes that may be loaded.
        wanted: What they are, for messages: "it must be ...".
        argument: The name of the argument that `source` was given for, for messages.
        dtype: Of the loaded weights; `"auto"` for that of the file.
        device: Where they go; by default to the CPU.
        check_values: Whether to look for NaN and infinity, which reads all weights.

    Raises:
        OSError: There is no such checkpoint, or its files cannot be read.
        ValueError: It is another model; a weight is missing, unknown, or of another shape or kind of number than the
            configuration says; or one holds NaN or infinite values.
    """
    path = checkpoint_path(source)
    config = load_config(source, argument=argument)
    model_class = named_class(config)
    if model_class is None or model_class not in classes:
        is_known = type(config) in CONFIG_CLASSES
        kind = _architecture(config) or type(config).__name__ if is_known else f"{config.model_type} checkpoint"
        raise ValueError(f"{argument}: {path} is a {kind}; it must be {wanted}.")
    check_config(config, model_class, f"{argument}: {path}")
    try:
        _check_depths(config, stored_weights(path), path)
        # All dense families call themselves T5, and Chronos-2 has a configuration of its own.
        if type(config) is not model_class.config_class:
            config = model_class.config_class.from_pretrained(path, trust_remote_code=False)
        load = model_class.from_pretrained
        if model_class in DENSE_CLASSES:
            load = partial(load_checked, load, check_values=check_values)
        return load(path, config=config, dtype=dtype, device_map=device)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except (ValueError, OSError) as error:
        is_of_files = isinstance(error, OSError)
        raise (OSError if is_of_files else ValueError)(f"{argument}: {_said(error)}.") from error
    except Exception as error:  # whatever a value of a wrong type makes of code that expects another
        raise ValueError(
            f"{argument}: {path} cannot be loaded; its configuration or its weights are damaged ({_said(error)})."
        ) from error


def check_config(config: PreTrainedConfig, model_class: type[PreTrainedModel], what: str) -> None:
    """Raise ValueError where no model of this class can have a configuration; `what` begins the message."""
    family = family_of(model_class)
    assert family is not None
    try:
        if family.has_decoder and model_class not in ENCODERS and not config.is_encoder_decoder:
            raise ValueError(f"is_encoder_decoder must be true for {model_class.__name__}, found false.")
        check_settings(config, family.name)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _check_depths(config: PreTrainedConfig, stored: Mapping[str, StoredTensor], what: str) -> None:
    """Raise ValueError where the configuration has other layers than the weight files."""
    for stack, name in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        blocks = {match[1] for key in stored if (match := re.match(rf"{stack}\.block\.(\d+)\.", key))}
        depth = getattr(config, name, None)
        if blocks and depth is not None and depth != len(blocks):
            raise ValueError(
                f"{what}: {name} is {depth} in config.json, and the weights have {len(blocks)} of these layers."
            )
