"""Dense checkpoints: their weights by name, where their layers are, and models of the same weights.

A low-rank checkpoint is one too: that of the dense model which its factors stand for.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from chronos import BaseChronosPipeline
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
)

from ..models.modeling_lowrank_quantized import quantized_modules
from .adapters import Adapter, has_adapter, load_adapted, load_merged, merged
from .devices import known_device, known_dtype
from .families import DENSE_CLASSES, LOWRANK_CLASSES, Family, family_of
from .loading import check_finite, checkpoint_path, load_model, public_name
from .products import whole_heads, whole_latent, whole_matrices
from .rank_table import FeedForwardRanks, LatentRanks, LayerName, LayerRanks, PerHeadRanks, RankTable

__all__ = ["DenseCheckpoint", "LowRankSource", "as_full_rank", "build_model", "in_float", "load_chronos", "load_dense"]

SOURCE_CLASSES = (*DENSE_CLASSES, *LOWRANK_CLASSES)
DENSE_WANTED = (
    f"a dense checkpoint of a T5, a Chronos-Bolt or a Chronos-2 ({', '.join(cls.__name__ for cls in DENSE_CLASSES)}), such as "
    "amazon/chronos-t5-small, amazon/chronos-bolt-small or amazon/chronos-2"
)
OTHER_VERSION = "this version of transformers or chronos-forecasting has another model of that name"
WANTED = f"{DENSE_WANTED}, or a low-rank one of these ({', '.join(cls.__name__ for cls in LOWRANK_CLASSES)})"


@dataclass(frozen=True)
class LowRankSource:
    """The low-rank model that a dense one was multiplied out from.

    Attributes:
        ranks: Of its layers.
        weights: Its own, by name; matrices of integers as the numbers that they stand for.
        compression: What its configuration records of how it was made.
    """

    ranks: RankTable
    weights: dict[str, torch.Tensor]
    compression: dict[str, Any] | None


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense model: its configuration and its weights by name. Nothing writes to the weights.

    Of a low-rank source the weights are those of the dense layers that compute the same, and `config` has the sizes of the dense model that
    it is of the shape of. Each layer then has heads and a width of its own, by the shapes of its weights.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    model_class: type[PreTrainedModel]
    weights: dict[str, torch.Tensor]
    tied_keys: dict[str, str]
    source: str
    is_shared: bool  # the weights belong to a model of the caller's
    lowrank: LowRankSource | None = None
    adapter: Adapter | None = None  # that was merged into the weights

    @property
    def given_weights(self) -> dict[str, torch.Tensor]:
        """The source's own weights, by their names in a low-rank model of its ranks."""
        return self.weights if self.lowrank is None else self.lowrank.weights

    @cached_property
    def given_ranks(self) -> RankTable:
        """The source's own ranks; full ones of a dense model."""
        if self.lowrank is not None:
            return self.lowrank.ranks
        return RankTable.full(self.family.lowrank_config(self.config))

    @property
    def source_class(self) -> type[PreTrainedModel]:
        """The class of the source."""
        return self.model_class if self.lowrank is None else self.lowrank_class

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

    @property
    def all_layers(self) -> tuple[tuple[LayerName, str], ...]:
        """Attention and feed-forward layers."""
        return (*self.layers, *self.feed_forward_layers)

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
        config = self.family.lowrank_config(self.config)
        if self.lowrank is not None:
            self.whole_ranks.write(config, validate=False)  # the heads of a latent may be larger than dense ones
        model = build_model(
            self.lowrank_class,
            config,
            in_float(self.weights),
            tied_keys=self.tied_keys,
            generation_config=self.generation_config,
        )
        return model.requires_grad_(False)

    @cached_property
    def whole_ranks(self) -> RankTable:
        """The sizes of the layers that the weights are of: heads, and a width; no latents and no factors."""
        heads, ranks = self.config.num_heads, dict[LayerName, LayerRanks]()
        for name, module in self.layers:
            sizes = (len(self.weights[f"{module}.{part}.weight"]) // heads for part in "qv")
            ranks[name] = PerHeadRanks(*sizes)
        for name, module in self.feed_forward_layers:
            ranks[name] = FeedForwardRanks(self.weights[f"{module}.wo.weight"].shape[1], None, None)
        return RankTable(ranks)

    @property
    def has_whole_heads(self) -> bool:
        """Whether all attention is that of a dense model, in the source's own weights."""
        full = RankTable.full(self.family.lowrank_config(self.config))
        return all(
            self.given_ranks[name] == full[name]
            and all(
                self.given_weights[f"{module}.{part}.weight"] is self.weights[f"{module}.{part}.weight"]
                for part in "qkvo"
            )
            for name, module in self.layers
        )

    def largest_heads(self, name: LayerName) -> PerHeadRanks:
        """The largest heads that are any use in an attention layer: those that it has, or, of a latent, none larger than dense ones."""
        given, whole = self.given_ranks[name], self.whole_ranks[name]
        if isinstance(given, PerHeadRanks):
            return given
        assert isinstance(whole, PerHeadRanks)
        return PerHeadRanks(min(self.config.d_kv, whole.qk), min(self.config.d_kv, whole.vo))


def in_float(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in float32, of which those are tied that were; those that are float32 are shared, indices stay what they are."""
    copies = {
        tensor.data_ptr(): tensor.float() if tensor.is_floating_point() else tensor for tensor in weights.values()
    }
    return {name: copies[tensor.data_ptr()] for name, tensor in weights.items()}


def load_dense(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
) -> DenseCheckpoint:
    """Load a checkpoint of one of the families (T5, Chronos-Bolt, Chronos-2), or look at a loaded model or that of a pipeline.

    A low-rank one becomes the dense model that computes the same, with its own weights and ranks in `lowrank`. Adapters of peft, in a loaded
    model or in a folder or Hub repository of their own, are merged into a copy of their model.

    Args:
        model: What to load or look at.
        dtype: Of the weights of what is loaded; by default that of its file.
        device: Where they are; by default on the CPU.

    Raises:
        ValueError: It is another model, weights are missing, or a tensor holds NaN or infinite values; `dtype` or `device` is
            unknown, or given for a model that is loaded already.
        OSError: There is no such checkpoint, or its files cannot be read.
        ImportError: It is an adapter, and peft is not installed.
    """
    if isinstance(model, BaseChronosPipeline):
        model = model.inner_model
    is_adapted = has_adapter(model)
    if not is_adapted and not isinstance(model, (str, os.PathLike, PreTrainedModel)):
        raise ValueError(
            f"model must be a Hub id, a folder, a loaded model or a pipeline, found a {type(model).__name__}."
        )
    dtype, device = known_dtype(dtype), None if device is None else known_device(device)
    if isinstance(model, (str, os.PathLike)):
        name, is_shared = public_name(model), False  # now, for a folder may be gone later
        source = checkpoint_path(model)
        loaded, adapter = _loaded(source, dtype, device)
    else:
        if dtype != "auto" or device is not None:
            raise ValueError(
                "dtype and device are for a checkpoint that is loaded here; use model.to(...) for a model."
            )
        loaded, adapter = merged(model) if is_adapted else (model, None)
        name = f"{adapter.base} with an adapter" if adapter else public_name(model)
        source, is_shared = loaded.config.name_or_path or type(loaded).__name__, adapter is None
        if type(loaded) not in SOURCE_CLASSES:
            raise ValueError(f"model: {source} is a {type(loaded).__name__}; it must be {WANTED}.")
    family, is_lowrank = family_of(type(loaded)), type(loaded) in LOWRANK_CLASSES
    assert family is not None
    check_names(loaded)
    weights = _floating_weights(loaded)
    if is_shared or adapter is not None:
        _check_weights(weights, source)
    checkpoint = DenseCheckpoint(
        config=family.lowrank_config(loaded.config) if is_lowrank else loaded.config,
        generation_config=getattr(loaded, "generation_config", None),
        model_class=family.dense_class(type(loaded)),
        weights=weights,
        tied_keys=dict(loaded.all_tied_weights_keys),
        source=name,
        is_shared=is_shared,
        adapter=adapter,
    )
    if not is_lowrank:
        return checkpoint
    lowrank = LowRankSource(RankTable.of(loaded.config), weights, copy.deepcopy(loaded.config.compression))
    return replace(checkpoint, weights=_multiplied_out(checkpoint, lowrank.ranks), lowrank=lowrank)


def _loaded(source: str, dtype: torch.dtype | str, device: str | None) -> tuple[PreTrainedModel, Adapter | None]:
    """A checkpoint, its values checked; an adapter is merged into the model that it was trained on."""
    # Weights are mapped from the file page by page as they are used. After a look at all of them a second load
    # starts with none in memory, and a compression reads those of the attention alone.
    _, adapter = load_merged(source, SOURCE_CLASSES, WANTED)
    gc.collect()
    if adapter is not None:
        return load_adapted(source, SOURCE_CLASSES, WANTED, dtype=dtype, device=device)
    return load_model(source, SOURCE_CLASSES, WANTED, dtype=dtype, device=device, check_values=False), None


def _floating_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model by name, with the numbers that matrices of integers stand for."""
    weights = model.state_dict()
    for name, module in quantized_modules(model).items():
        for stored in module.stored_names:
            del weights[f"{name}.{stored}"]
        weights[f"{name}.weight"] = module.weight.detach()
    return weights


def _multiplied_out(checkpoint: DenseCheckpoint, ranks: RankTable) -> dict[str, torch.Tensor]:
    """The weights of the dense layers that compute what layers of these ranks with the checkpoint's weights do."""
    weights, config = dict(checkpoint.weights), checkpoint.config

    def take(module: str) -> dict[str, torch.Tensor]:
        """The factors of a layer, which are not in the dense one."""
        names = [name for name in weights if name.startswith(f"{module}.") and "relative_attention_bias" not in name]
        return {name.removeprefix(f"{module}.").removesuffix(".weight"): weights.pop(name) for name in names}

    for name, module in checkpoint.all_layers:
        factors, of_layer = take(module), ranks[name]
        if isinstance(of_layer, FeedForwardRanks):
            whole = whole_matrices(factors, of_layer, checkpoint.inner_names)
        elif isinstance(of_layer, LatentRanks):
            whole = whole_latent(factors, of_layer, num_heads=config.num_heads)
        elif name.kind in checkpoint.family.rotary:
            whole = whole_heads(factors, factors["pairs"], d_kv=config.d_kv)
        else:
            whole = factors
        weights |= {f"{module}.{part}.weight": weight for part, weight in whole.items()}
    return weights


def check_names(model: PreTrainedModel) -> None:
    """Check that a model has the parameters that this package knows, by name and shape.

    All that is read of a dense model is its configuration and these. They are the names in every saved checkpoint, so upstream cannot
    change them lightly; a version that did would be refused here.

    Raises:
        ValueError: One is missing, unknown or of another shape.
    """
    family = family_of(type(model))
    assert family is not None
    is_lowrank = type(model) in LOWRANK_CLASSES
    with torch.device("meta"):
        config = model.config if is_lowrank else family.lowrank_config(model.config)
        known = family.classes[family.dense_class(type(model))](config).state_dict()
    # Stock has all frequencies, and does not say so.
    known = {name: tensor.shape for name, tensor in known.items() if is_lowrank or not name.endswith(".pairs")}
    given = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(known.keys() | given.keys()):
        if known.get(name) != given.get(name):
            wanted, found = (
                "none" if shape is None else f"{[*shape]}" for shape in (known.get(name), given.get(name))
            )
            reason = "it was changed" if is_lowrank else OTHER_VERSION
            raise ValueError(
                f"model: hf_lowrank knows {type(model).__name__} with {name} of shape {wanted}, found {found}; {reason}."
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
    model = load_model(source, DENSE_CLASSES, DENSE_WANTED, argument=argument)
    family = family_of(type(model))
    assert family is not None
    if type(model) not in family.forecasters or not hasattr(model.config, "chronos_config"):
        raise ValueError(
            f"{argument}: {source} is a {type(model).__name__} without a chronos_config; it must be a dense Chronos checkpoint."
        )
    return model.float().eval()
