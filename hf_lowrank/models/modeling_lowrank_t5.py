"""T5 models whose attention and feed-forward layers have ranks of their own.

The whole forward pass is here and in `modeling_lowrank_layers`, over the public surface of transformers alone, so that a saved
checkpoint runs with whatever version the loading machine has. Names of parameters are T5's. Shapes: B batch, S queries,
T keys, d d_model, n heads, r rank.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils import logging

from .configuration_lowrank_t5 import LowRankT5Config
from .modeling_lowrank_layers import (
    LatentAttention,
    LowRankAttention,
    LowRankFeedForward,
    PerHeadAttention,
    RMSNorm,
    Sublayer,
    attention_class,
    distances,
    masked,
    matrix,
    relative_position_bias,
)

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


# --- attention ---------------------------------------------------------------------------------------------------


class SelfAttention(LowRankAttention):
    """Attention within a stack: softmax(q_s . k_t + bias(t - s)), in a decoder over t <= s. A form comes after it among the bases.

    The first layer of a stack holds the position bias of all.
    """

    def __init__(self, config: LowRankT5Config, layer_idx: int, **ranks: int | None) -> None:
        super().__init__(config, **ranks)
        self.layer_idx = layer_idx
        self.is_decoder = config.is_decoder
        self.max_distance = config.relative_attention_max_distance
        if layer_idx == 0:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, self.n_heads)
            self.relative_attention_bias.initial_std = self.d_model**-0.5

    def compute_bias(self, distance: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The position bias, and the lowest number where a query must not look: (1 or B, n, S, T) from distances (S, T).

        `mask` is True where a token is none of padding, (B, T); with four dimensions it is broadcast to (B, n, S, T), boolean or
        added to the logits, and says all, which keys come too early included.
        """
        bias = relative_position_bias(
            self.relative_attention_bias,
            distance,
            bidirectional=not self.is_decoder,
            max_distance=self.max_distance,
        )
        if mask is not None and mask.ndim == 4:
            return masked(bias, mask)
        if self.is_decoder:
            bias = masked(bias, distance <= 0)
        if mask is not None:  # a static cache has room for tokens that are still to come
            mask = nn.functional.pad(mask, (0, distance.shape[1] - mask.shape[1]))[:, None, None]
        return masked(bias, mask)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(B, S, d) -> the output (B, S, d), the bias for the layers that follow, and the weights (B, n, S, T).

        `mask` is that of `compute_bias`, and is not read where the bias of an earlier layer is given.
        """
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        query = self.project_query(hidden_states)
        key, value = self.project_key_value(hidden_states)
        past_length: Any = 0
        if cache is not None:
            past_length = cache.get_seq_length(self.layer_idx)
            if isinstance(past_length, torch.Tensor):
                past_length = past_length.clone()  # a static cache counts in place
            key, value = cache.update(key, value, self.layer_idx)
        if bias is None:
            distance = distances(query.shape[2], key.shape[2], past_length, device=query.device)
            bias = self.compute_bias(distance, mask).to(query.dtype)
        value = self.cached_value(key, value)
        mixed, weights = self.attend(query, key, value, bias, output_attentions=output_attentions)
        return self.project_output(mixed.flatten(2)), bias, weights


class CrossAttention(LowRankAttention):
    """Attention of a decoder to the encoder's output. A form comes after it among the bases.

    The output may have fewer rows than the decoder, B / P: P consecutive rows of the decoder, paths of one series, then attend to
    each, and its keys and values are made and kept once.
    """

    def __init__(self, config: LowRankT5Config, layer_idx: int, **ranks: int | None) -> None:
        super().__init__(config, **ranks)
        self.layer_idx = layer_idx

    def key_value(self, encoder_hidden_states: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(cache, EncoderDecoderCache):
            return self.project_key_value(encoder_hidden_states)
        kept = cache.cross_attention_cache
        if cache.is_updated.get(self.layer_idx):
            return kept.layers[self.layer_idx].keys, kept.layers[self.layer_idx].values
        cache.is_updated[self.layer_idx] = True
        return kept.update(*self.project_key_value(encoder_hidden_states), self.layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        bias: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, d) and (B or B / P, T, d) -> the output (B, S, d) and the weights (B, n, S, T).

        `bias`, (B or B / P, 1, 1, T) or None, is added to the logits.
        """
        query = self.project_query(hidden_states)
        key, value = self.key_value(encoder_hidden_states, cache)
        value = self.cached_value(key, value)
        paths = query.shape[0] // key.shape[0]
        if paths == 1:
            mixed, weights = self.attend(query, key, value, bias, output_attentions=output_attentions)
            return self.project_output(mixed.flatten(2)), weights
        if bias is not None:
            bias = for_each_path(bias, paths, series=key.shape[0], queries=query.shape[2])
        query = query.unflatten(0, (-1, paths)).transpose(1, 2).flatten(2, 3)  # (B / P, n, P S, r)
        mixed, weights = self.attend(query, key, value, bias, output_attentions=output_attentions)
        mixed = mixed.unflatten(1, (paths, -1)).flatten(0, 1)  # (B, S, n, r)
        if weights is not None:
            weights = weights.unflatten(2, (paths, -1)).transpose(1, 2).flatten(0, 1)
        return self.project_output(mixed.flatten(2)), weights


def for_each_path(bias: torch.Tensor, paths: int, *, series: int, queries: int) -> torch.Tensor:
    """What is added to the logits of S queries, laid out for those of all P paths of B series.

    (B, ..., 1 or S, T), the same for all paths, or (B P, ..., 1 or S, T), with rows of its own for each -> (B, ..., 1 or P S, T)
    """
    if bias.shape[0] == paths * series:
        # of a caller who repeated the mask, but continues from a cache that holds a series once
        bias = bias.expand(-1, -1, queries, -1)
        return bias.unflatten(0, (series, paths)).transpose(1, 2).flatten(2, 3)
    if bias.shape[2] == 1:
        return bias
    return bias.unsqueeze(2).expand(-1, -1, paths, -1, -1).flatten(2, 3)


class PerHeadSelfAttention(SelfAttention, PerHeadAttention):
    """Self-attention with smaller heads."""


class LatentSelfAttention(SelfAttention, LatentAttention):
    """Self-attention, all heads on one latent a token."""


class PerHeadCrossAttention(CrossAttention, PerHeadAttention):
    """Cross-attention with smaller heads."""


class LatentCrossAttention(CrossAttention, LatentAttention):
    """Cross-attention, all heads on one latent a token."""


# --- blocks --------------------------------------------------------------------------------------------------------


class SelfAttentionLayer(Sublayer):
    """x + attention(norm(x))"""

    def __init__(self, config: LowRankT5Config, layer_idx: int, ranks: dict[str, Any]) -> None:
        super().__init__(config)
        form = attention_class(ranks, PerHeadSelfAttention, LatentSelfAttention)
        self.SelfAttention = form(config, layer_idx, **ranks)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        output, bias, weights = self.SelfAttention(
            self.layer_norm(hidden_states), mask=mask, bias=bias, cache=cache, output_attentions=output_attentions
        )
        return hidden_states + self.dropout(output), bias, weights


class CrossAttentionLayer(Sublayer):
    """x + attention(norm(x), encoder's output)"""

    def __init__(self, config: LowRankT5Config, layer_idx: int, ranks: dict[str, Any]) -> None:
        super().__init__(config)
        form = attention_class(ranks, PerHeadCrossAttention, LatentCrossAttention)
        self.EncDecAttention = form(config, layer_idx, **ranks)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        bias: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = self.EncDecAttention(
            self.layer_norm(hidden_states),
            encoder_hidden_states,
            bias=bias,
            cache=cache,
            output_attentions=output_attentions,
        )
        return hidden_states + self.dropout(output), weights


class FeedForwardLayer(Sublayer):
    """x + feed_forward(norm(x))"""

    def __init__(self, config: LowRankT5Config, ranks: dict[str, Any]) -> None:
        super().__init__(config)
        self.DenseReluDense = LowRankFeedForward(config, **ranks)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.dropout(self.DenseReluDense(self.layer_norm(hidden_states)))


def finite(hidden_states: torch.Tensor) -> torch.Tensor:
    """The residual stream, kept finite in float16 as T5 does."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    limit = torch.finfo(torch.float16).max
    limit = torch.where(hidden_states.isinf().any(), limit - 1000, limit)
    return hidden_states.clamp(min=-limit, max=limit)


class LowRankT5Block(GradientCheckpointingLayer):
    """Self-attention, in a decoder cross-attention, feed-forward."""

    def __init__(self, config: LowRankT5Config, layer_idx: int) -> None:
        super().__init__()
        attention, feed_forward = config.attention_ranks, config.feed_forward_ranks
        if config.is_decoder:
            sublayers = [
                SelfAttentionLayer(config, layer_idx, attention["decoder_self"][layer_idx]),
                CrossAttentionLayer(config, layer_idx, attention["cross"][layer_idx]),
                FeedForwardLayer(config, feed_forward["decoder"][layer_idx]),
            ]
        else:
            sublayers = [
                SelfAttentionLayer(config, layer_idx, attention["encoder_self"][layer_idx]),
                FeedForwardLayer(config, feed_forward["encoder"][layer_idx]),
            ]
        self.layer = nn.ModuleList(sublayers)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_bias: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The hidden states (B, S, d), the bias for the blocks that follow, and the weights of self- and of cross-attention."""
        cross_weights = None
        hidden_states, bias, weights = self.layer[0](
            hidden_states, mask=mask, bias=bias, cache=cache, output_attentions=output_attentions
        )
        hidden_states = finite(hidden_states)
        if encoder_hidden_states is not None:
            hidden_states, cross_weights = self.layer[1](
                hidden_states,
                encoder_hidden_states,
                bias=encoder_bias,
                cache=cache,
                output_attentions=output_attentions,
            )
            hidden_states = finite(hidden_states)
        hidden_states = finite(self.layer[-1](hidden_states))
        return hidden_states, bias, weights, cross_weights


# --- models --------------------------------------------------------------------------------------------------------


class Placed:
    """A model that knows where its inputs belong, offloaded or not."""

    @property
    def device(self) -> torch.device:
        """Of the first weight; of the computation where accelerate keeps that weight elsewhere and leaves a meta tensor."""
        found = super().device  # type: ignore[misc]
        if found.type != "meta":
            return found
        for module in self.modules():  # type: ignore[attr-defined]
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):
                if (place := getattr(part, "execution_device", None)) is not None:
                    return torch.device(place)
        return found


def initialize(model: PreTrainedModel, module: nn.Module) -> bool:
    """Draw a module's fresh weights where it is one of this package's layers, and say whether it is."""
    factor = model.config.initializer_factor
    std = getattr(module, "initial_std", None)
    if std is not None:
        init.normal_(module.weight, std=factor * std)
    elif isinstance(module, RMSNorm):
        init.constant_(module.weight, factor)
    else:
        return False
    return True


class LowRankT5PreTrainedModel(Placed, PreTrainedModel):
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

    def forward(
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
    encoder_config.is_decoder, encoder_config.use_cache = False, False
    decoder_config.is_decoder, decoder_config.num_layers = True, config.num_decoder_layers
    model.encoder = LowRankT5Stack(encoder_config)
    model.decoder = LowRankT5Stack(decoder_config)


class LowRankT5Model(LowRankT5PreTrainedModel):
    """The bare encoder-decoder, with the arguments and outputs of [`~transformers.T5Model`]."""

    _tied_weights_keys = {  # noqa: RUF012
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: LowRankT5Config) -> None:
        super().__init__(config)
        self.shared = embedding(config)
        build_stacks(self, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)
        self.decoder.set_input_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Tokens (B, T) and decoder tokens (B, S) -> `last_hidden_state` (B, S, d); see [`LowRankT5Stack`] for the arguments."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **recorded
            )
        elif isinstance(encoder_outputs, (tuple, list)):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoder_outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            cache=either_cache(cache, past_key_values),
            use_cache=use_cache,
            return_dict=True,
            **recorded,
        )
        output = Seq2SeqModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE_FIELD: decoder_outputs.get(CACHE_FIELD)},
        )
        return output if return_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads while it is taught the labels (B, S): the start token, and every label but the last."""
        if self.config.decoder_start_token_id is None:
            raise ValueError("config.decoder_start_token_id must be set where labels are given, found None.")
        shifted = labels.roll(1, dims=-1)
        shifted[..., 0] = self.config.decoder_start_token_id
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)


class LowRankT5ForConditionalGeneration(LowRankT5Model, GenerationMixin):
    """The encoder-decoder with a language-model head, as [`~transformers.T5ForConditionalGeneration`]."""

    _tied_weights_keys = LowRankT5Model._tied_weights_keys | {"lm_head.weight": "shared.weight"}
    _keys_to_ignore_on_load_unexpected = []  # noqa: RUF012
    # T5's loss is a mean over the labels of its own batch; `Trainer` is not to take it for one over all processes' batches.
    accepts_loss_kwargs = False

    def __init__(self, config: LowRankT5Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.shared = embedding(config)
        build_stacks(self, config)
        self.lm_head = matrix(config.d_model, config.vocab_size, std=1.0)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Tokens (B, T) and decoder tokens (B, S), or labels in their place, -> `logits` (B, S, vocabulary), and the `loss`: the mean
        cross-entropy of the labels (B, S) other than -100. See [`LowRankT5Stack`] for the other arguments."""
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = super().forward(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            cache=either_cache(cache, past_key_values),
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        if self.config.scale_decoder_outputs:
            hidden_states = hidden_states * self.model_dim**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output = Seq2SeqLMOutput(loss=loss, logits=logits, **rest)
        return output if return_dict else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with keys and values of cross-attention once a series; see [`~transformers.GenerationMixin.generate`]."""
        # Up to transformers 5.14 a static cache is kept for the next call, whatever its number of series.
        self.__dict__.pop("_cache", None)
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Stock `generate` repeats the encoder's output and its mask for every sample or beam. Cross-attention does without.
        once = {name: model_kwargs.pop(name) for name in ("encoder_outputs", "attention_mask") if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | once

    def _reorder_cache(self, cache: Cache, beam_idx: torch.Tensor) -> Cache:
        # Beams of one series share its keys and values, and no beam moves to another series.
        cache.self_attention_cache.reorder_cache(beam_idx)
        return cache


class LowRankT5EncoderModel(LowRankT5PreTrainedModel):
    """The encoder alone, with the arguments and outputs of [`~transformers.T5EncoderModel`]."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: LowRankT5Config) -> None:
        config.use_cache = False
        config.is_encoder_decoder = False
        super().__init__(config)
        self.shared = embedding(config)
        self.encoder = LowRankT5Stack(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Tokens (B, S) or embeddings (B, S, d) -> `last_hidden_state` (B, S, d); see [`LowRankT5Stack`] for the arguments."""
        return self.encoder(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


__all__ = ["LowRankT5EncoderModel", "LowRankT5ForConditionalGeneration", "LowRankT5Model"]
