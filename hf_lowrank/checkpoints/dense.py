"""Dense checkpoints: their weights by name, where their layers are, and models of the same weights."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from chronos import BaseChronosPipeline
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
)

from .devices import known_device, known_dtype
from .families import DENSE_CLASSES, Family, family_of
from .loading import check_finite, checkpoint_path, load_model, public_name
from .rank_table import LayerName

__all__ = ["DenseCheckpoint", "as_full_rank", "build_model", "load_chronos", "load_dense"]

WANTED = (
    f"a dense checkpoint of a T5, a Chronos-Bolt or a Chronos-2 ({', '.join(cls.__name__ for cls in DENSE_CLASSES)}), such as "
    "amazon/chronos-t5-small, amazon/chronos-bolt-small or amazon/chronos-2"
)


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

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks that the model has."""
        has_decoder = self.family.has_decoder and self.model_class is not T5EncoderModel
        return ("encoder", "decoder") if has_decoder else ("encoder",)

    def stack_of(self, kind: str) -> str:
        """The stack that the layers of this kind are in."""
        return self.family.places[kind][0]

    @property
    def layers(self) -> Iterator[tuple[LayerName, str]]:
        """(`cross.3`, "decoder.block.3.layer.1.EncDecAttention") for every attention layer that the model has."""
        return self._places(self.family.attention)

    @property
    def feed_forward_layers(self) -> Iterator[tuple[LayerName, str]]:
        """(`encoder_feed_forward.3`, "encoder.block.3.layer.1.DenseReluDense") for every feed-forward layer."""
        return self._places(self.family.feed_forward)

    def _places(self, kinds: Mapping[str, tuple[str, str]]) -> Iterator[tuple[LayerName, str]]:
        for kind, (stack, module) in kinds.items():
            if stack in self.stacks:
                depth = self.config.num_decoder_layers if stack == "decoder" else self.config.num_layers
                for i in range(depth):
                    yield LayerName(kind, i), module.format(i)

    @property
    def inner_names(self) -> tuple[str, ...]:
        """The names of the matrices in front of a feed-forward layer's activation."""
        return ("wi_0", "wi_1") if self.config.is_gated_act else ("wi",)

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


def load_dense(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> DenseCheckpoint:
    """Load a dense checkpoint of one of the families (T5, Chronos-Bolt, Chronos-2), or look at a loaded model or that of a pipeline.

    Args:
        model: What to load or look at.
        dtype: Of the weights of what is loaded; by default that of its file.
        device: Where they are; by default on the CPU.

    Raises:
        ValueError: It is another model, weights are missing, or a tensor holds NaN or infinite values; `dtype` or `device` is
            unknown, or given for a model that is loaded already.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    if isinstance(model, BaseChronosPipeline):
        model = model.inner_model
    if not isinstance(model, (str, os.PathLike, PreTrainedModel)):
        raise ValueError(
            f"model must be a Hub id, a folder, a loaded model or a pipeline, found a {type(model).__name__}."
        )
    dtype, device = known_dtype(dtype), None if device is None else known_device(device)
    name = public_name(model)  # now, for a folder may be gone later
    if isinstance(model, PreTrainedModel):
        if dtype != "auto" or device is not None:
            raise ValueError(
                "dtype and device are for a checkpoint that is loaded here; use model.to(...) for a model."
            )
        loaded, source, is_shared = model, model.config.name_or_path or type(model).__name__, True
        if type(model) not in DENSE_CLASSES:
            raise ValueError(f"model: {source} is a {type(model).__name__}; it must be {WANTED}.")
    else:
        source, is_shared = checkpoint_path(model), False
        # Weights are mapped from the file page by page as they are used. After a look at all of them a second load
        # starts with none in memory, and a compression reads those of the attention alone.
        load_model(source, DENSE_CLASSES, WANTED)
        gc.collect()
        loaded = load_model(source, DENSE_CLASSES, WANTED, dtype=dtype, device=device, check_values=False)
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
        source=name,
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
    given = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(known.keys() | given.keys()):
        if known.get(name) != given.get(name):
            wanted, found = (
                "none" if shape is None else f"{[*shape]}" for shape in (known.get(name), given.get(name))
            )
            raise ValueError(
                f"model: hf_lowrank knows {type(model).__name__} with {name} of shape {wanted}, found {found}; this version of "
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
    try:
        check_finite(weights, source)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


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


def load_chronos(source: str | os.PathLike, *, argument: str = "source") -> PreTrainedModel:
    """A dense Chronos model of any family in float32, ready to forecast.

    Raises:
        ValueError: It is another model, or an incomplete one.
        OSError: There is no such checkpoint, or its files cannot be read.
    """
    model = load_model(source, DENSE_CLASSES, WANTED, argument=argument)
    family = family_of(type(model))
    assert family is not None
    if type(model) not in family.forecasters or not hasattr(model.config, "chronos_config"):
        raise ValueError(
            f"{argument}: {source} is a {type(model).__name__} without a chronos_config; it must be a dense Chronos checkpoint."
        )
    return model.float().eval()
