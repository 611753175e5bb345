"""The blocks of a T5 with ranks of their own: self- and cross-attention in both forms, their sublayers, and the block.

Shapes: B batch, S queries, T keys, d d_model, n heads, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_lowrank_t5 import LowRankT5Config
from .modeling_lowrank_layers import (
    LatentAttention,
    LowRankAttention,
    LowRankFeedForward,
    PerHeadAttention,
    Sublayer,
    attention_class,
    distances,
    masked,
    relative_position_bias,
)


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
