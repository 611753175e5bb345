"""The stack of a T5 with ranks of its own, encoder or decoder, and what all models on it share: initialisation, caches, masks."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
)
from transformers.utils import logging

from .checked_loading import ChecksItsWeights
from .configuration_lowrank_t5 import LowRankT5Config
from .modeling_lowrank_blocks import LowRankT5Block
from .modeling_lowrank_layers import RMSNorm, masked
from .modeling_lowrank_quantized import KeepsIntegers, initialize_quantized

logger = logging.get_logger(__name__)

# transformers 5.24 renamed `past_key_values`, of arguments and of outputs, to `cache`.
CACHE_FIELD = "cache" if "cache" in inspect.signature(Seq2SeqLMOutput).parameters else "past_key_values"


def either_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, by whichever of its two names it was given; the old one with transformers' own warning, where that has the new one."""
    if past_key_values is None:
        return cache
    if cache is not None and cache is not past_key_values:
        warnings.warn("Both `past_key_values` and `cache` are set: `past_key_values` is ignored.", stacklevel=3)
        return cache
    if CACHE_FIELD == "cache":
        warnings.warn("`past_key_values` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=3)
    return past_key_values


def visible(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask (B, T) of whatever type as a boolean one, None where it hides nothing; one with four dimensions as it is."""
    if mask is None or mask.ndim == 4:
        return mask
    mask = mask.bool()
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph must not depend on the data
        return mask
    return None if bool(mask.all()) else mask


class Placed:
    """A model that knows where its inputs belong, offloaded or not."""

    @property
    def device(self) -> torch.device:
        """Of the first weight; of the computation where accelerate keeps that weight elsewhere and leaves a meta tensor."""
        device = super().device  # type: ignore[misc]
        if device.type != "meta":
            return device
        for module in self.modules():  # type: ignore[attr-defined]
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):
                if (place := getattr(part, "execution_device", None)) is not None:
                    return torch.device(place)
        return device


def initialize(model: PreTrainedModel, module: nn.Module) -> bool:
    """Draw a module's fresh weights where it is one of this package's layers, and say whether it is."""
    factor = model.config.initializer_factor
    std = getattr(module, "initial_std", None)
    if std is not None:
        init.normal_(module.weight, std=factor * std)
    elif isinstance(module, RMSNorm):
        init.constant_(module.weight, factor)
    else:
        return initialize_quantized(module)
    return True


class LowRankT5PreTrainedModel(ChecksItsWeights, KeepsIntegers, Placed, PreTrainedModel):
    """Initialisation and loading, shared by the stacks and the models."""

    config_class = LowRankT5Config
    config: LowRankT5Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LowRankT5Block"]  # noqa: RUF012
    _keep_in_fp32_modules = ["wo"]  # noqa: RUF012
    _supports_sdpa = True
    # One score function with different query/key and value sizes is not what these compile.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True
    _can_record_outputs: dict[str, Any] = {}  # noqa: RUF012 states and weights are collected by the stack itself

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(self, module):
            super()._init_weights(module)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for stack in self.children():
            if isinstance(stack, LowRankT5Stack):  # transformers 5.15 leaves them as they were
                stack.config._attn_implementation = self.config._attn_implementation


class LowRankT5Stack(LowRankT5PreTrainedModel):
    """A T5 encoder or decoder with the layers that its `LowRankT5Config` describes."""

    def __init__(self, config: LowRankT5Config) -> None:
        super().__init__(config)
        self.is_decoder = config.is_decoder
        self.embed_tokens = embedding(config)
        self.block = nn.ModuleList([LowRankT5Block(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.embed_tokens = new_embeddings

    def forward(  # noqa: PLR0913 the arguments are transformers'
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """`input_ids` (B, S) or `inputs_embeds` (B, S, d) -> `last_hidden_state` (B, S, d) and what else is asked for.

        Args:
            attention_mask: (B, T), not zero where a token, cached ones included, is none of padding; or (B, 1 or n, S, T), boolean
                or added to the logits.
            encoder_hidden_states, encoder_attention_mask: (B or B / P, T, d) and (B or B / P, T); see `CrossAttention`.
            cache, past_key_values: Two names of the same; in a decoder one is made where `use_cache` is true.

        Raises:
            ValueError: Both or none of `input_ids` and `inputs_embeds`; a cache in an encoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        settings = self.config
        output_attentions = settings.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = settings.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = settings.return_dict if return_dict is None else return_dict
        cache = self._cache(either_cache(cache, past_key_values), use_cache)

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask, bias, encoder_bias = visible(attention_mask), None, None
        encoder_mask = visible(encoder_attention_mask)
        if encoder_hidden_states is not None and encoder_mask is not None:
            if encoder_mask.ndim == 2:
                encoder_mask = encoder_mask[:, None, None]
            encoder_bias = masked(hidden_states.new_zeros(()), encoder_mask)

        states: list[torch.Tensor] = []
        self_weights: list[torch.Tensor] = []
        cross_weights: list[torch.Tensor] = []
        hidden_states = self.dropout(hidden_states)
        for block in self.block:
            if output_hidden_states:
                states.append(hidden_states)
            # In positions, for gradients to be found where blocks run a second time.
            hidden_states, bias, weights, weights_of_encoder = block(
                hidden_states, mask, bias, encoder_hidden_states, encoder_bias, cache, output_attentions
            )
            if output_attentions:
                self_weights.append(weights)
                cross_weights.append(weights_of_encoder)
        hidden_states = self.dropout(self.final_layer_norm(hidden_states))

        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            hidden_states=(*states, hidden_states) if output_hidden_states else None,
            attentions=tuple(self_weights) if output_attentions else None,
            cross_attentions=tuple(cross_weights) if output_attentions and self.is_decoder else None,
            **{CACHE_FIELD: cache},
        )
        return output if return_dict else output.to_tuple()

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to use: none in an encoder, or where blocks run a second time for their gradients."""
        if not self.is_decoder:
            if use_cache or cache is not None:
                raise ValueError("An encoder has no cache: use_cache must be false and cache None.")
            return None
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                logger.warning_once("Gradient checkpointing runs blocks twice: the cache is not used.")
            return None
        if cache is None and use_cache:
            return EncoderDecoderCache(DynamicCache(), DynamicCache())
        return cache


def embedding(config: LowRankT5Config) -> nn.Embedding:
    """The token embeddings, drawn with standard deviation 1."""
    tokens = nn.Embedding(config.vocab_size, config.d_model)
    tokens.initial_std = 1.0
    return tokens


def build_stacks(model: PreTrainedModel, config: LowRankT5Config) -> None:
    """Give an encoder-decoder its two stacks."""
    encoder_config, decoder_config = copy.deepcopy(config), copy.deepcopy(config)
    encoder_config.weight_bits = decoder_config.weight_bits = None  # its names are those of the whole model
    encoder_config.is_decoder, encoder_config.use_cache = False, False
    decoder_config.is_decoder, decoder_config.num_layers = True, config.num_decoder_layers
    model.encoder = LowRankT5Stack(encoder_config)
    model.decoder = LowRankT5Stack(decoder_config)
