"""Adapters of peft, merged into a copy of the model that they were trained on."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from ..models.pipeline_lowrank_chronos import is_adapter
from .connection import checkpoint_path, from_hub_or_cache
from .loading import load_model, public_name

__all__ = ["Adapter", "has_adapter", "load_adapted", "load_merged", "merged"]


@dataclass(frozen=True)
class Adapter:
    """An adapter: the public name of the model that it was trained on, and its kind, such as `"LORA"`."""

    base: str
    type: str

    def to_dict(self) -> dict[str, str]:
        """For programs."""
        return asdict(self)


def has_adapter(model: Any) -> bool:
    """Whether a loaded model is one of peft, or has adapters in the place of its matrices."""
    peft = sys.modules.get("peft")  # without which there is none
    if peft is None or not isinstance(model, nn.Module):
        return False
    layers = peft.tuners.tuners_utils.BaseTunerLayer
    return isinstance(model, peft.PeftModel) or any(isinstance(module, layers) for module in model.modules())


def merged(model: nn.Module) -> tuple[PreTrainedModel, Adapter]:
    """A copy of a loaded model with its active adapters merged, in the class that they were put into.

    Raises:
        ValueError: It has none that can be merged, such as a prompt.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = _kind(next(iter(model.peft_config.values())))  # which both kinds of model have
    if isinstance(model, PeftModel):
        if not hasattr(model.base_model, "merge_and_unload"):
            raise ValueError(f"model: an adapter of the kind {kind} cannot be merged; give one such as LORA.")
        adapter = Adapter(public_name(model.get_base_model()), kind)
        return copy.deepcopy(model).merge_and_unload(safe_merge=True), adapter
    assert isinstance(model, PreTrainedModel)
    adapter, whole = Adapter(public_name(model), kind), copy.deepcopy(model)
    for name, module in list(whole.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            whole.set_submodule(name, module.get_base_layer())
    whole._hf_peft_config_loaded = False
    return whole, adapter


def load_merged(
    source: str | os.PathLike, classes: Collection[type[PreTrainedModel]], wanted: str, **options: Any
) -> tuple[PreTrainedModel, Adapter | None]:
    """What `load_model` loads, with its arguments; or, of an adapter, what `load_adapted` does."""
    path = checkpoint_path(source)
    is_local = os.path.isdir(path)
    if not (is_local and is_adapter(path)):
        try:
            loaded = load_model(source, classes, wanted, **options)
        except (OSError, ValueError):
            if is_local or not is_adapter(path):
                raise
        else:
            # What has just been loaded from the Hub has told the cache which commit is the newest, so this asks nobody twice.
            if is_local or not is_adapter(path):
                return loaded, None
    options.pop("check_values", None)
    return load_adapted(source, classes, wanted, **options)


@from_hub_or_cache
def load_adapted(
    source: str | os.PathLike,
    classes: Collection[type[PreTrainedModel]],
    wanted: str,
    *,
    argument: str = "model",
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, Adapter]:
    """The model that an adapter was trained on, as `load_model` loads it, with the adapter merged.

    Args:
        source: A folder or a Hub id with an adapter_config.json, which names the model.
        classes, wanted, argument, dtype, device: As of `load_model`; those of the model.

    Raises:
        ImportError: peft is not installed.
        OSError: The adapter or its model cannot be read.
        ValueError: The model is none of these classes, or the adapter does not fit it.
    """
    path = checkpoint_path(source)
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(
            f"{argument}: {path} is an adapter and needs the package peft: pip install 'hf-lowrank[lora]', or pip install peft."
        ) from error
    folder = path if os.path.isdir(path) else _downloaded(path)
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{argument}: {path} must have a sound adapter_config.json ({error}).") from error
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{argument}: adapter_config.json of {path} must name its model in base_model_name_or_path.")
    adapter = Adapter(public_name(base), _kind(config))
    what = f"{argument}: of the adapter {path}"
    loaded = load_model(base, classes, wanted, argument=what, dtype=dtype, device=device)
    if getattr(loaded.config, "weight_bits", None):
        loaded.dequantize()
    loaded._input_embed_layer = "shared"  # stock Chronos does not say, and peft asks
    try:
        whole = PeftModel.from_pretrained(loaded, folder).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"{argument}: the adapter {path} cannot be merged into {adapter.base} ({reason}).") from error
    return whole.eval(), adapter


def _downloaded(name: str) -> str:
    """The folder in the cache with an adapter of the Hub."""
    folder = os.path.dirname(hf_hub_download(name, "adapter_config.json"))
    try:
        hf_hub_download(name, "adapter_model.safetensors")
    except EntryNotFoundError:  # as peft wrote it before
        hf_hub_download(name, "adapter_model.bin")
    return folder


def _kind(config: Any) -> str:
    return getattr(config.peft_type, "value", str(config.peft_type))
