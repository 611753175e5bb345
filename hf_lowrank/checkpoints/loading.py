"""The one loader: what a name stands for, what its configuration says it is, and its weights, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import StrictDataclassError
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
from ..runtime.folder import is_export
from .connection import REFERENCES, checkpoint_path, from_hub_or_cache, is_hub_id, nearly
from .families import DENSE_CLASSES, FAMILIES, LOWRANK_CLASSES, family_of

__all__ = [
    "HUB_ID",
    "REFERENCES",
    "check_config",
    "check_finite",
    "checkpoint_path",
    "load_config",
    "load_model",
    "named_class",
    "public_name",
]

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
CONFIG_CLASSES = {T5Config, *(family.config_class for family in FAMILIES)}
ENCODERS = (T5EncoderModel, LowRankT5EncoderModel)
# Dense and low-rank classes by name; the last as Google's first checkpoints call it.
CLASSES: dict[str, type[PreTrainedModel]] = {cls.__name__: cls for cls in (*DENSE_CLASSES, *LOWRANK_CLASSES)} | {
    "T5WithLMHeadModel": T5ForConditionalGeneration
}


def public_name(source: str | os.PathLike | PreTrainedModel) -> str:
    """What a checkpoint is called where others read it: the only names with a slash are Hub ids that were loaded from there.

    Of a path the last part is said, for the rest is the machine's business; of what ships here, the name that loads it.

    Args:
        source: What the user gave. Ask before the load or right after it: a folder may be gone later, and look like a Hub id. Of a
            loaded model, which may have lost its folder already, a name is a Hub id if the Hub's cache has it.
    """
    if isinstance(source, PreTrainedModel):
        name = source.config.name_or_path or type(source).__name__
        is_of_hub = _is_cached(name)
    else:
        name, is_of_hub = str(source), True
        if name in REFERENCES:
            return name
    if is_of_hub and HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    place = Path(os.path.abspath(name))
    shipped = {folder: reference for reference, folder in REFERENCES.items()}
    return shipped.get(place) or (f"another {place.name}" if place.name in REFERENCES else place.name)


def _is_cached(name: str) -> bool:
    """Whether the cache has a configuration that came from the Hub under this name, at any revision."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(True for _ in folder.glob("*/config.json"))


@from_hub_or_cache
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
    # A Hub id has an owner; a name that is nearly a known one would be looked for on the network first.
    if "/" not in path and (alike := nearly(path)):
        raise OSError(f"{argument}: there is no {path!r}; did you mean {alike!r}?")
    try:
        # No checkpoint runs code of its own here, and none asks whether it may.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        hint = f"; did you mean {alike!r}?" if (alike := nearly(path)) else "."
        is_cut_off = is_hub_id(path) and is_offline_mode()
        reason = f"it is not in the cache, and {constants.ENDPOINT} cannot be reached" if is_cut_off else error
        raise OSError(f"{argument}: {path} is no folder and no Hub id that can be read ({reason}){hint}") from error
    except StrictDataclassError as error:
        raise ValueError(f"{argument}: {path} must have a sound config.json ({_said(error)}).") from error
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


@from_hub_or_cache
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
    if is_export(path):
        raise ValueError(f"{argument}: {path} is an exported model, which only forecasts; it must be {wanted}.")
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
        return load(path, config=config, dtype=dtype, device_map=device, trust_remote_code=False)
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
