"""Loading that looks at what it has loaded: every weight is there, is none too many, and holds numbers that a model can compute with.

transformers warns of most of this and goes on with random weights. Here it is an error that names the weight, in `from_pretrained` itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .weight_files import StoredTensor, stored_tensors

# The arguments of `from_pretrained` that say where the files are.
WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
# Those with which the weights are not what is in the files of usual names.
ELSEWHERE = ("gguf_file", "state_dict", "variant")
LARGEST = 2.0**64  # float32 holds no squares of larger numbers, and every norm takes squares


def load_checked(
    load: Callable[..., Any],
    source: Any,
    *args: Any,
    check_values: bool = True,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """`load(source, *args, **options)`, a `from_pretrained` of transformers, and a look at the model.

    Args:
        load: A bound `from_pretrained`, which does not check by itself.
        source: A folder or a Hub id.
        check_values: Whether to look for NaN and infinity, which reads all weights.
        ignore_mismatched_sizes, output_loading_info, options: As for transformers.

    Raises:
        ValueError: A weight is missing, unknown, of another shape (unless `ignore_mismatched_sizes`) or kind of number, or
            one holds NaN, infinite or absurdly large values.
        OSError: A weight file cannot be read.
    """
    where = {name: options[name] for name in WHERE if options.get(name) is not None}
    formats = {"use_safetensors": options.get("use_safetensors")}
    is_elsewhere = any(options.get(name) is not None for name in ELSEWHERE)
    try:
        model, info = load(source, *args, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except Exception as error:
        if not is_elsewhere:
            # They say it where a file is damaged: the formats of weights have no error in common.
            _stored(source, where | formats)
            _check_generation_file(source, where)
        if isinstance(error, AssertionError):  # so chronos says that settings contradict each other
            raise ValueError(f"{source}: {error}.") from error
        raise
    stored = {} if is_elsewhere or getattr(model, "hf_quantizer", None) else _stored(source, where | formats)
    if options.get("state_dict") is None:  # who has the weights in hand may leave some to be drawn, with a warning
        _check_names(model, stored, info, str(source), any_shape=ignore_mismatched_sizes)
    _check_start(model, str(source))
    if check_values:
        check_finite(model.state_dict(), str(source))
    return (model, info) if output_loading_info else model


def stored_weights(source: Any, **where: Any) -> dict[str, StoredTensor]:
    """`stored_tensors`, with errors that say what they are about.

    Raises:
        FileNotFoundError, OSError: As for that.
    """
    try:
        return stored_tensors(str(source), **where)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(
            f"the weights of {source} cannot be read; a file is missing, truncated or damaged ({error})."
        ) from error


def _stored(source: Any, where: Mapping[str, Any]) -> dict[str, StoredTensor]:
    try:
        return stored_weights(source, **where)
    except FileNotFoundError:  # transformers finds weights in more places, such as below an adapter
        return {}


def _check_generation_file(source: Any, where: Mapping[str, Any]) -> None:
    """Raise ValueError where there is a generation_config.json that is not what it should be."""
    try:
        path = cached_file(str(source), "generation_config.json", **where)
        content = json.loads(Path(path or "").read_text(encoding="utf-8"))
    except OSError:  # there is none
        return
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: generation_config.json is no JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: generation_config.json must hold a table of settings, found {content!r:.80}.")


def _check_names(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], info: Mapping[str, Any], what: str, *, any_shape: bool
) -> None:
    """Raise ValueError where weights are missing, unknown, or of another shape or kind of number."""
    needed = model.state_dict()
    misshapen = {name: (given, wanted) for name, given, wanted in info["mismatched_keys"]}
    if missing := sorted({*info["missing_keys"], *_hidden(model, needed, stored)} - set(misshapen)):
        raise ValueError(f"{what} lacks the weights {', '.join(missing[:5])} ({len(missing)} in all).")
    for name, (given, wanted) in () if any_shape else sorted(misshapen.items()):
        raise ValueError(f"{what}: the weight {name} must have shape {[*wanted]}, found {[*given]}.")
    if unknown := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"{what} has weights that its config.json knows nothing of: {', '.join(unknown[:5])} ({len(unknown)} in all)."
        )
    for name, tensor in stored.items():
        if name in needed and needed[name].is_floating_point() != tensor.is_float:
            kind = "floating-point numbers" if needed[name].is_floating_point() else "integers"
            raise ValueError(f"{what}: the weight {name} must hold {kind}, found {tensor.dtype}.")


def _hidden(model: PreTrainedModel, needed: Mapping[str, Any], stored: Mapping[str, Any]) -> set[str]:
    """The missing weights that a stock class keeps out of what transformers reports: Chronos-Bolt's patch embeddings."""
    if not stored or isinstance(model, ChecksItsWeights):
        return set()
    patterns = model._keys_to_ignore_on_load_missing or ()
    return {name for name in needed if name not in stored and any(re.search(pattern, name) for pattern in patterns)}


def check_finite(weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise ValueError where a weight that is in memory holds NaN, infinite or absurdly large values."""
    for name, tensor in weights.items():
        is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
        if not is_plain or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            continue
        largest = max(abs(float(extreme)) for extreme in tensor.detach().aminmax())
        if not largest < float("inf"):  # NaN is neither
            raise ValueError(f"the weight {name} of {source} holds NaN or infinite values.")
        if largest > LARGEST:
            raise ValueError(
                f"the weight {name} of {source} holds a value of size {largest:.3g}, whose square is infinite in float32."
            )


class ChecksItsWeights:
    """A model whose `from_pretrained` raises an error where transformers' warns."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with its arguments.

        Raises:
            ValueError: A weight is missing, unknown, or of another shape or kind of number than the configuration says, or
                holds NaN, infinite or absurdly large values. With `ignore_mismatched_sizes=True` weights of another shape are drawn anew.
            OSError: A weight file cannot be read.
        """
        loaded = load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            model.validate_weights()
        except ValueError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {error}") from error
        return loaded

    def validate_weights(self) -> None:
        """Raise ValueError where integers among the weights are out of range."""


def _check_start(model: PreTrainedModel, what: str) -> None:
    """Raise ValueError where a model that generates is to start from a token that it does not have."""
    if not model.can_generate():
        return
    token = getattr(model.generation_config, "decoder_start_token_id", None)
    limit = model.config.vocab_size
    if token is not None and (type(token) is not int or not 0 <= token < limit):
        raise ValueError(
            f"{what}: decoder_start_token_id of generation_config.json must be an integer in [0, {limit}), found {token!r:.80}."
        )
