"""Reading dense checkpoints and writing low-rank ones: all or nothing."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)

from ..compression.factorization import AttentionWeights, FeedForwardWeights
from ..compression.objectives import Objective, objective_of
from .families import FAMILIES, Family, family_of

__all__ = ["DenseCheckpoint", "as_full_rank", "checkpoint_path", "load_chronos", "load_dense"]

DENSE_CLASSES = {cls.__name__: cls for family in FAMILIES for cls in family.classes}
ASSETS = Path(__file__).parents[1] / "assets"
REFERENCE = ASSETS / "reference"
# Small trained checkpoints that the package ships.
REFERENCES = {"reference": REFERENCE, "reference-bolt": ASSETS / "reference_bolt"}


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense model: its configuration and its weights by name. Nothing writes to the weights."""

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    model_class: type[PreTrainedModel]
    weights: dict[str, torch.Tensor]
    tied_keys: dict[str, str]
    source: str
    is_shared: bool  # the weights belong to a model of the caller's

    @cached_property
    def family(self) -> Family:
        family = family_of(self.model_class)
        assert family is not None
        return family

    @property
    def lowrank_class(self) -> type[PreTrainedModel]:
        return self.family.classes[self.model_class]

    @cached_property
    def objective(self) -> Objective:
        return objective_of(self.config, self.model_class)

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks that the model has."""
        has_decoder = self.family.name != "chronos2" and self.model_class is not T5EncoderModel
        return ("encoder", "decoder") if has_decoder else ("encoder",)

    def stack_of(self, kind: str) -> str:
        """The stack that the layers of this kind are in."""
        return self.family.places[kind][0]

    @property
    def layers(self) -> Iterator[tuple[str, str]]:
        """("cross.3", "decoder.block.3.layer.1.EncDecAttention") for every attention layer that the model has."""
        return self._places(self.family.attention)

    @property
    def feed_forward_layers(self) -> Iterator[tuple[str, str]]:
        """("encoder_feed_forward.3", "encoder.block.3.layer.1.DenseReluDense") for every feed-forward layer."""
        return self._places(self.family.feed_forward)

    def _places(self, kinds: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for kind, (stack, module) in kinds.items():
            if stack in self.stacks:
                depth = self.config.num_decoder_layers if stack == "decoder" else self.config.num_layers
                for i in range(depth):
                    yield f"{kind}.{i}", module.format(i)

    @property
    def inner_names(self) -> tuple[str, ...]:
        """The names of the matrices in front of a feed-forward layer's activation."""
        return ("wi_0", "wi_1") if self.config.is_gated_act else ("wi",)

    def attention(self, module: str) -> AttentionWeights:
        q, k, v, o = (self.weights[f"{module}.{name}.weight"] for name in "qkvo")
        return AttentionWeights.from_linear(q, k, v, o, num_heads=self.config.num_heads)

    def feed_forward(self, module: str) -> FeedForwardWeights:
        inner = torch.stack([self.weights[f"{module}.{name}.weight"].double() for name in self.inner_names])
        return FeedForwardWeights(inner, self.weights[f"{module}.wo.weight"].double())

    def float_model(self) -> PreTrainedModel:
        """The dense model, as one of ours at full rank, in float32 and evaluation mode, without gradients for its weights.

        So whatever looks into a running model looks into our own layers. Weights that are float32 are shared.
        """
        copies = {tensor.data_ptr(): tensor.float() for tensor in self.weights.values()}
        weights = {name: copies[tensor.data_ptr()] for name, tensor in self.weights.items()}
        model = build_model(
            self.lowrank_class,
            self.family.lowrank_config(self.config),
            weights,
            tied_keys=self.tied_keys,
            generation_config=self.generation_config,
        )
        return model.requires_grad_(False)


def checkpoint_path(name: str | os.PathLike) -> str:
    """The folder or Hub id that `name` stands for: `"reference"` and `"reference-bolt"` are in the package."""
    return str(REFERENCES.get(str(name), name))


def load_dense(model: str | os.PathLike | PreTrainedModel) -> DenseCheckpoint:
    """Load a dense checkpoint of one of the families (T5, Chronos-Bolt, Chronos-2), or look at a loaded model.

    Raises:
        ValueError: It is another model, weights are missing, or a tensor holds NaN or infinite values.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    if not isinstance(model, (str, os.PathLike, PreTrainedModel)):
        raise ValueError(f"model must be a Hub id, a folder or a loaded model, found a {type(model).__name__}.")
    if isinstance(model, PreTrainedModel):
        loaded, source, is_shared = model, model.config.name_or_path or type(model).__name__, True
        if type(model) not in DENSE_CLASSES.values():
            raise ValueError(_another_model(source, type(model).__name__))
    else:
        source, is_shared = checkpoint_path(model), False
        # Weights are mapped from the file page by page as they are used. After a look at all of them a second load
        # starts with none in memory, and a compression reads those of the attention alone.
        _check_weights(_load(source).state_dict(), source)
        gc.collect()
        loaded = _load(source)
    check_names(loaded)
    weights = loaded.state_dict()
    if is_shared:
        _check_weights(weights, source)
    return DenseCheckpoint(
        config=loaded.config,
        generation_config=getattr(loaded, "generation_config", None),
        model_class=type(loaded),
        weights=weights,
        tied_keys=dict(loaded.all_tied_weights_keys),
        # A folder's name says what it is; its path is the machine's business and would be published with the model.
        source=Path(source).name if Path(source).is_dir() else source,
        is_shared=is_shared,
    )


def check_names(model: PreTrainedModel) -> None:
    """Check that a dense model has the parameters that this package knows, by name and shape.

    All that is read of a dense model is its configuration and these. They are the names in every saved checkpoint, so upstream cannot
    change them lightly; a version that did would be refused here.

    Raises:
        ValueError: One is missing, unknown or of another shape.
    """
    family = family_of(type(model))
    assert family is not None
    with torch.device("meta"):
        known = family.classes[type(model)](family.lowrank_config(model.config)).state_dict()
    known = {name: tensor.shape for name, tensor in known.items() if not name.endswith(".pairs")}
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) != found.get(name):
            wanted, given = (
                "none" if shape is None else f"{[*shape]}" for shape in (known.get(name), found.get(name))
            )
            raise ValueError(
                f"model: hf_lowrank knows {type(model).__name__} with {name} of shape {wanted}, found {given}; this version of "
                "transformers or chronos-forecasting has another model of that name."
            )


def as_full_rank(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model of one of the families as one of ours at full rank, sharing its weights; any other as it is."""
    family = family_of(type(model))
    if family is None or type(model) not in family.classes:
        return model
    check_names(model)
    return build_model(
        family.classes[type(model)],
        family.lowrank_config(model.config),
        model.state_dict(keep_vars=True),
        tied_keys=dict(model.all_tied_weights_keys),
        generation_config=getattr(model, "generation_config", None),
    )


def _check_weights(weights: dict[str, torch.Tensor], source: str) -> None:
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise ValueError(
                f"model: the weight {name} of {source} is on the meta device; load the model without offload."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"model: the weight {name} of {source} holds NaN or infinite values.")


def _another_model(source: str, found: str) -> str:
    wanted = ", ".join(DENSE_CLASSES)
    return (
        f"model: {source} is a {found}; it must be a dense checkpoint of a T5, a Chronos-Bolt or a Chronos-2 ({wanted}), such as "
        "amazon/chronos-t5-small, amazon/chronos-bolt-small or amazon/chronos-2."
    )


def _load(source: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(f"model: {source} is no folder and no Hub id that can be read ({error}).") from error
    except ValueError as error:
        raise ValueError(f"model: {source} must be a checkpoint with the config.json of a T5 ({error}).") from error
    names = DENSE_CLASSES | {"T5WithLMHeadModel": T5ForConditionalGeneration}  # as Google's first checkpoints call it
    architecture = (getattr(config, "architectures", None) or ["T5ForConditionalGeneration"])[0]
    if type(config) is not T5Config or architecture not in names:
        found = architecture if type(config) is T5Config else f"{config.model_type} checkpoint"
        raise ValueError(_another_model(source, found))
    # All families call themselves T5, and Chronos-2 has a configuration of its own.
    config = names[architecture].config_class.from_pretrained(source)
    try:
        loaded, info = names[architecture].from_pretrained(
            source, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # the formats of weights have no error in common
        raise OSError(
            f"model: the weights of {source} cannot be read; a file is missing, truncated or damaged ({error})."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"model: {source} lacks the weights {', '.join(missing[:5])} ({len(missing)} in all).")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"model: the weight {name} of {source} must have shape {[*wanted]}, found {[*found]}.")
    return loaded


def build_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    *,
    tied_keys: dict[str, str],
    generation_config: GenerationConfig | None,
) -> PreTrainedModel:
    """A model of these weights, in evaluation mode, without a second copy of any of them.

    Buffers may be missing: they get the values that a fresh model has.
    """
    with torch.device("meta"):
        model = model_class(config)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in weights}
    model.load_state_dict(weights | {n: b for n, b in buffers.items() if n in model.state_dict()}, assign=True)
    model.all_tied_weights_keys = dict(tied_keys)
    model.tie_weights(recompute_mapping=False)
    _fill_buffers(model)
    if generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model.eval()


def _fill_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that no checkpoint has (frequencies, quantile levels) their values, as `from_pretrained` does."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # or it would be drawn anew
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            setattr(module, name, torch.empty_like(getattr(module, name), device=model.device))
        if empty:
            model._init_weights(module)


def load_chronos(source: str | os.PathLike) -> PreTrainedModel:
    """A dense Chronos model of any family in float32, ready to forecast.

    Raises:
        ValueError: It is another model, or an incomplete one.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    model = _load(checkpoint_path(source))
    if isinstance(model, (T5Model, T5EncoderModel)) or not hasattr(model.config, "chronos_config"):
        raise ValueError(
            f"source: {source} is a {type(model).__name__} without a chronos_config; it must be a dense Chronos checkpoint."
        )
    return model.float().eval()
