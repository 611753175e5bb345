"""The layers of the low-rank models: norm, attention of both forms, feed-forward, each as its equation.

Only PyTorch and the public surface of transformers: the registry of attention functions, the activations. Shapes: B batch,
S queries, T keys, d d_model, n heads, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class RMSNorm(nn.Module):
    """T5's norm, w x / sqrt(mean(x^2) + eps): no mean is subtracted, no bias added. The mean is taken in float32."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.variance_epsilon = config.layer_norm_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.float().square().mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(self.weight.dtype)


class Sublayer(nn.Module):
    """x + inner(norm(x)): the norm and the dropout around an inner layer, of whatever name."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)


def matrix(in_features: int, out_features: int, *, std: float) -> nn.Linear:
    """A matrix whose fresh weights have this standard deviation, times the model's `initializer_factor`."""
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.initial_std = std
    return linear


def dtype_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a module computes in; `default` of one that a quantizer has made, which takes what comes."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), default)


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear layer as PyTorch has it, no adapter or quantizer having put itself or its weight in the place."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


# --- attention ---------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scaling q k^T + mask) v: (B, n, S, r) each -> (B, S, n, r) and the weights (B, n, S, T)."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LowRankAttention(nn.Module):
    """What all attention layers share: n heads, no scale, and whichever attention function the model was given.

    A form says how the input becomes queries (`project_query`), what of a token is kept for later (`project_key_value`) and
    how the mixed values become the output (`project_output`).
    """

    is_causal = False  # masks are given: the attention function is to add none

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        self.n_heads = config.num_heads
        self.dropout = config.dropout_rate

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, n r) -> (B, n, S, r)"""
        return states.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (B, n, S, r)"""
        raise NotImplementedError

    def project_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, d) -> what a cache holds of keys and of values, (B, n or 1, T, r) each"""
        raise NotImplementedError

    def cached_value(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The values to attend to, from what the cache holds."""
        return values

    def project_output(self, mixed: torch.Tensor) -> torch.Tensor:
        """(B, S, n r) -> (B, S, d)"""
        raise NotImplementedError

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """softmax(q k^T + bias) v: (B, n, S, r), keys and values (B, n or 1, T, r) -> (B, S, n, r) and the weights.

        Only eager attention has weights, and is used where they are wanted.
        """
        attention_forward: Callable = eager_attention_forward
        if not output_attentions:
            attention_forward = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        if key.shape[1] != self.n_heads:  # a latent is one for all heads, and not every attention function broadcasts
            key, value = (states.expand(-1, self.n_heads, -1, -1) for states in (key, value))
        dropout = self.dropout if self.training else 0.0
        return attention_forward(self, query, key, value, bias, scaling=1.0, dropout=dropout)


class PerHeadAttention(LowRankAttention):
    """Attention with smaller heads (eq. 21 of arXiv 2510.03358): q, k of size `qk`, v, o of size `vo` a head.

    Fresh weights have T5's own standard deviations, at this layer's head dimensions.
    """

    def __init__(self, config: Any, *, qk: int, vo: int) -> None:
        super().__init__(config)
        d, n = self.d_model, self.n_heads
        self.q = matrix(d, n * qk, std=(d * qk) ** -0.5)
        self.k = matrix(d, n * qk, std=d**-0.5)
        self.v = matrix(d, n * vo, std=d**-0.5)
        self.o = matrix(n * vo, d, std=(n * vo) ** -0.5)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.split_heads(self.q(hidden_states))

    def project_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split_heads(self.k(hidden_states)), self.split_heads(self.v(hidden_states))

    def project_output(self, mixed: torch.Tensor) -> torch.Tensor:
        return self.o(mixed)


class LatentAttention(LowRankAttention):
    """All heads read keys and values from one latent of rank r a token (eq. 20 of arXiv 2510.03358, absorbed).

    With c_t = P y_t the latent of a token, head h has

        logit(s, t) = (C_h P_q x_s)^T c_t + bias        output = W_O sum_h D_h (mixed c)_h

    `latent` is P, `query_sketch` P_q, `q` the stacked cores C_h, `o` the row of the cores D_h, `output_sketch` W_O. Without a
    query sketch `q` maps from d_model, without an output sketch `o` maps to d_model. Multi-query attention:
    the cache holds r numbers a token. Fresh weights give queries, keys and output the size they have in a fresh dense T5.
    """

    def __init__(self, config: Any, *, latent: int, query: int | None, output: int | None) -> None:
        super().__init__(config)
        d, n = self.d_model, self.n_heads
        read, written = d if query is None else query, d if output is None else output
        self.latent = matrix(d, latent, std=d**-0.5)
        self.query_sketch = nn.Identity() if query is None else matrix(d, query, std=d**-0.5)
        self.q = matrix(read, n * latent, std=(read * latent) ** -0.5)
        self.o = matrix(n * latent, written, std=(n * latent) ** -0.5)
        self.output_sketch = nn.Identity() if output is None else matrix(output, d, std=output**-0.5)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.split_heads(self.q(self.query_sketch(hidden_states)))

    def project_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.latent(hidden_states).unsqueeze(1)  # (B, 1, T, r)
        return latent, latent[..., :0]  # the cache needs a value; this one takes no memory

    def cached_value(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return keys

    def project_output(self, mixed: torch.Tensor) -> torch.Tensor:
        return self.output_sketch(self.o(mixed))


def attention_class(ranks: dict[str, Any], per_head: type, latent: type) -> type:
    """The class of a layer with this entry in the table of ranks."""
    return latent if "latent" in ranks else per_head


# --- masks and the position bias -----------------------------------------------------------------------------------


def masked(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`bias`, the lowest number where a boolean mask is false; a mask of numbers is added. They broadcast."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask.to(bias.dtype)


def relative_position_bucket(
    distance: torch.Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """T5's bucket of a distance t - s from a query s to a key t (section 2.1 of arXiv 1910.10683), int64.

    With b buckets a direction, distances below b / 2 have one each; the others share them by the logarithm of the distance, up to
    `max_distance` and beyond. Without `bidirectional` all keys ahead are in bucket 0.
    """
    ahead = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        ahead = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = num_buckets // 2
    octaves = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    shared = exact + (octaves * (num_buckets - exact)).long()
    return ahead + torch.where(distance < exact, distance, shared.clamp_max(num_buckets - 1))


def distances(
    query_length: int, key_length: int, past_length: int | torch.Tensor = 0, *, device: torch.device | None = None
) -> torch.Tensor:
    """t - s of every key t from every query s, int64 (S, T). Queries come after `past_length` others, keys count from the first."""
    queries = torch.arange(query_length, device=device)[:, None] + past_length
    return torch.arange(key_length, device=device)[None, :] - queries


def relative_position_bias(
    embedding: nn.Module, distance: torch.Tensor, *, bidirectional: bool, max_distance: int
) -> torch.Tensor:
    """What T5 adds to the logits, (1, n, S, T): an embedding (buckets, n) of the distances (S, T)."""
    bucket = relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=embedding.num_embeddings, max_distance=max_distance
    )
    return embedding(bucket).permute(2, 0, 1).unsqueeze(0)


# --- feed-forward --------------------------------------------------------------------------------------------------


class ThinFactors(nn.Sequential):
    """A matrix of rank r as two thin ones: x -> up(down(x)), `down` (r, in) and `up` (out, r).

    Their product is drawn with the standard deviation 1 / sqrt(in_features), as T5's feed-forward matrices are.
    """

    def __init__(self, in_features: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.down = matrix(in_features, rank, std=in_features**-0.5)
        self.up = matrix(rank, out_features, std=rank**-0.5)


def linear(in_features: int, rank: int | None, out_features: int) -> nn.Module:
    """A whole matrix where `rank` is None, thin factors otherwise."""
    if rank is None:
        return matrix(in_features, out_features, std=in_features**-0.5)
    return ThinFactors(in_features, rank, out_features)


class LowRankFeedForward(nn.Module):
    """W_o act(W_i x), or gated W_o (act(W_0 x) * W_1 x), with a width of its own and optional thin factors."""

    def __init__(self, config: Any, *, width: int, wi: int | None, wo: int | None) -> None:
        super().__init__()
        self.is_gated = config.is_gated_act
        for name in ("wi_0", "wi_1") if self.is_gated else ("wi",):
            self.add_module(name, linear(config.d_model, wi, width))
        self.wo = linear(width, wo, config.d_model)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.act = ACT2FN[config.dense_act_fn]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.is_gated:
            hidden_states = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            hidden_states = self.act(self.wi(hidden_states))
        hidden_states = self.dropout(hidden_states)
        # `wo` stays in float32 when the rest is float16, as in T5.
        return self.wo(hidden_states.to(dtype_of(self.wo, hidden_states.dtype)))
