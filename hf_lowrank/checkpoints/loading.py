"""The one loader: what a name stands for, what its configuration says it is, and its weights, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from ..models.configuration_lowrank_t5 import validate_depths
from .connection import REFERENCES, checkpoint_path, from_hub_or_cache, is_hub_id, nearly
from .families import DENSE_CLASSES, FAMILIES, LOWRANK_CLASSES
from .weight_files import StoredTensor, stored_tensors

__all__ = [
    "HUB_ID",
    "REFERENCES",
    "check_finite",
    "check_sizes",
    "checkpoint_path",
    "load_config",
    "load_model",
    "named_class",
    "public_name",
]

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SIZES = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "vocab_size")
CONFIG_CLASSES = {T5Config, *(family.config_class for family in FAMILIES)}
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
        raise ValueError(f"{argument}: {path} must have a sound config.json ({error}).") from error
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
    config = load_config(source, argument=argument)
    model_class = named_class(config)
    if model_class is None or model_class not in classes:
        is_known = type(config) in CONFIG_CLASSES
        kind = _architecture(config) or type(config).__name__ if is_known else f"{config.model_type} checkpoint"
        raise ValueError(f"{argument}: {path} is a {kind}; it must be {wanted}.")
    try:
        stored = stored_tensors(path)
    except OSError as error:
        raise OSError(_unreadable(path, argument, error)) from error
    check_sizes(config, f"{argument}: {path}")
    _check_depths(config, stored, f"{argument}: {path}")
    try:
        # All dense families call themselves T5, and Chronos-2 has a configuration of its own.
        if type(config) is not model_class.config_class:
            config = model_class.config_class.from_pretrained(path, trust_remote_code=False)
        model, info = model_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=device,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
        )
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the formats of weights and of configurations have no error in common
        raise OSError(_unreadable(path, argument, error)) from error
    _check_names(model, stored, info, f"{argument}: {path}")
    if check_values:
        check_finite(model.state_dict(), path, argument=argument)
    return model


def _unreadable(path: str, argument: str, error: Exception) -> str:
    return f"{argument}: the weights of {path} cannot be read; a file is missing, truncated or damaged ({error})."


def check_sizes(config: PreTrainedConfig, what: str) -> None:
    """Raise ValueError where no model of the sizes in a configuration can be built; `what` begins the message."""
    for name in SIZES:
        size = getattr(config, name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{what}: {name} must be a positive integer in config.json, found {size!r}.")
    try:
        validate_depths(config)
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


def _check_names(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], info: Mapping[str, Any], what: str
) -> None:
    """Raise ValueError where weights are missing, unknown, or of another shape or kind of number."""
    # Chronos-Bolt keeps its patch embeddings out of what transformers reports as missing.
    hidden = model._keys_to_ignore_on_load_missing or ()
    needed = model.state_dict()
    is_hidden = {name for name in needed for pattern in hidden if re.search(pattern, name) and name not in stored}
    if missing := sorted({*info["missing_keys"], *is_hidden}):
        raise ValueError(f"{what} lacks the weights {', '.join(missing[:5])} ({len(missing)} in all).")
    for name, given, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{what}: the weight {name} must have shape {[*wanted]}, found {[*given]}.")
    if unknown := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"{what} has weights that its config.json knows nothing of: {', '.join(unknown[:5])} ({len(unknown)} in all)."
        )
    for name, tensor in stored.items():
        if name in needed and needed[name].is_floating_point() != tensor.is_float:
            kind = "floating-point numbers" if needed[name].is_floating_point() else "integers"
            raise ValueError(f"{what}: the weight {name} must hold {kind}, found {tensor.dtype}.")


def check_finite(weights: Mapping[str, torch.Tensor], source: str, *, argument: str = "model") -> None:
    """Raise ValueError where a weight that is in memory holds NaN or infinite values."""
    for name, tensor in weights.items():
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"{argument}: the weight {name} of {source} holds NaN or infinite values.")
