"""Chronos-Bolt and Chronos-2 as graphs that other runtimes take: context in, quantiles out, nothing that depends on the data.

They compute what the models compute, with fewer and larger products: a norm's weight goes into the matrices behind it, query, key and
value are one product, attention to one key is o(v(x)), and the one query of Chronos-Bolt's decoder looks at the encoder's states
themselves, its keys' and values' matrices being applied on its own side.

Shapes: B series, L values, S patches, P values of a patch, d d_model, n heads, r rank, G groups of M series, Q quantiles, H horizon.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.modeling_lowrank_chronos import (
    LowRankChronos2Model,
    LowRankChronosBoltModelForForecasting,
    TimeAttention,
    rotary_turns,
)
from ..models.modeling_lowrank_layers import (
    LatentAttention,
    LowRankAttention,
    LowRankFeedForward,
    PerHeadAttention,
    RMSNorm,
    Sublayer,
    ThinFactors,
    distances,
    masked,
    relative_position_bias,
)

__all__ = ["Alone", "BoltGraph", "Grouped", "in_bfloat16"]


def in_bfloat16(graph: nn.Module) -> nn.Module:
    """A copy of a graph that computes in bfloat16, but for the scale of the series, sums of squares and the quantiles at the end."""
    return copy.deepcopy(graph).to(torch.bfloat16)


# --- products ----------------------------------------------------------------------------------------------------


def _product(weight: torch.Tensor) -> nn.Linear:
    """x -> weight x, with its own copy of the weight (out, in)."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return linear


def _copied(module: nn.Module, gain: torch.Tensor | None = None) -> nn.Module:
    """A matrix, thin factors, or the identity in their place; behind a norm whose weight is `gain`, (in,), that goes into the first matrix."""
    if isinstance(module, nn.Identity):
        return module
    if isinstance(module, ThinFactors):
        return nn.Sequential(_copied(module.down, gain), _copied(module.up))
    return _product(module.weight if gain is None else module.weight * gain)


def _reg_token(model: PreTrainedModel) -> nn.Parameter:
    """The embedding of the REG token, (1, d); (0, d) of a model that has none."""
    tokens = model.shared.weight.detach()
    first = model.config.reg_token_id if model.chronos_config.use_reg_token else len(tokens)
    return nn.Parameter(tokens[first : first + 1].clone(), requires_grad=False)


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps), without a weight: the matrices behind it have it."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(states.float().square().mean(-1, keepdim=True) + self.eps)
        return (states * scale).to(states.dtype)


class FeedForward(nn.Module):
    """x + feed_forward(norm(x))"""

    def __init__(self, norm: RMSNorm, inner: LowRankFeedForward) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.is_gated = inner.is_gated
        self.act = inner.act
        for name in ("wi_0", "wi_1") if inner.is_gated else ("wi",):
            self.add_module(name, _copied(getattr(inner, name), norm.weight))
        self.wo = _copied(inner.wo)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.norm(states)
        if self.is_gated:
            inner = self.act(self.wi_0(inner)) * self.wi_1(inner)
        else:
            inner = self.act(self.wi(inner))
        return states + self.wo(inner)


# --- attention ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """x + attention(norm(x)) within the second last axis: per-head with q, k and v as one product, or on a latent.

    Args:
        turned: Of rotary attention, its module: queries and keys turn.
    """

    def __init__(self, norm: RMSNorm, inner: LowRankAttention, turned: TimeAttention | None = None) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.n_heads = inner.n_heads
        self.turned = turned
        self.is_latent = isinstance(inner, LatentAttention)
        if isinstance(inner, LatentAttention):
            sketch = inner.query_sketch
            has_sketch = isinstance(sketch, nn.Linear)
            first = [sketch.weight if has_sketch else inner.q.weight, inner.latent.weight]
            self.q = _product(inner.q.weight) if has_sketch else nn.Identity()
            self.o = nn.Sequential(_product(inner.o.weight), _copied(inner.output_sketch))
        else:
            assert isinstance(inner, PerHeadAttention)
            first = [inner.q.weight, inner.k.weight, inner.v.weight]
            self.q = nn.Identity()
            self.o = _product(inner.o.weight)
        self.sizes = [len(weight) for weight in first]
        self.first = _product(torch.cat(first) * norm.weight)

    def heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, n r) -> (B, n, S, r)"""
        return states.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def forward(
        self, states: torch.Tensor, bias: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """(B, S, d) and what is added to the logits -> (B, S, d)."""
        parts = self.first(self.norm(states)).split(self.sizes, dim=-1)
        query = self.heads(self.q(parts[0]))
        if self.is_latent:
            key = value = parts[1].unsqueeze(1)
        else:
            key, value = self.heads(parts[1]), self.heads(parts[2])
        if self.turned is not None:
            assert turns is not None
            query, key = (self.turned.rotate(one, *turns) for one in (query, key))
        weights = torch.softmax(query @ key.mT + bias, dim=-1)
        return states + self.o((weights @ value).transpose(1, 2).flatten(2))


class AttentionToOne(nn.Module):
    """x + attention(norm(x)) where a query has one key, its own: softmax is 1, and what is left is o(v(x))."""

    def __init__(self, norm: RMSNorm, inner: LowRankAttention) -> None:
        super().__init__()
        self.norm = Norm(norm)
        if isinstance(inner, LatentAttention):
            # All heads mix the same latent: sum_h D_h is one matrix.
            into, out = inner.latent.weight, inner.o.weight.unflatten(1, (inner.n_heads, -1)).sum(1)
            last = _copied(inner.output_sketch)
        else:
            assert isinstance(inner, PerHeadAttention)
            into, out, last = inner.v.weight, inner.o.weight, nn.Identity()
        into = into * norm.weight
        rank, width = out.shape[1], out.shape[0]
        is_smaller_as_one = width * into.shape[1] <= rank * (width + into.shape[1])
        products = [_product(out @ into)] if is_smaller_as_one else [_product(into), _product(out)]
        self.value = nn.Sequential(*products, last)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.value(self.norm(states))


class AttentionOfOne(nn.Module):
    """x + attention(norm(x), y) of one query a series: logits are (W_k,h^T q_h) . y_t, and values W_v,h of the mixed y.

    So neither the keys nor the values of the S states are made, which is all that cross-attention would cost.
    """

    def __init__(self, norm: RMSNorm, inner: LowRankAttention) -> None:
        super().__init__()
        self.norm = Norm(norm)
        self.n_heads = inner.n_heads
        self.is_latent = isinstance(inner, LatentAttention)
        if isinstance(inner, LatentAttention):
            has_sketch = isinstance(inner.query_sketch, nn.Linear)
            self.query = _copied(inner.q, None if has_sketch else norm.weight)
            if has_sketch:
                self.query = nn.Sequential(_copied(inner.query_sketch, norm.weight), self.query)
            self.latent = _product(inner.latent.weight)
            self.o = nn.Sequential(_product(inner.o.weight), _copied(inner.output_sketch))
        else:
            assert isinstance(inner, PerHeadAttention)
            self.query = _product(inner.q.weight * norm.weight)
            key, value = (one.weight.detach().unflatten(0, (self.n_heads, -1)) for one in (inner.k, inner.v))
            self.key = nn.Parameter(key.clone(), requires_grad=False)  # (n, r, d)
            self.value = nn.Parameter(value.mT.contiguous(), requires_grad=False)  # (n, d, r)
            self.o = _product(inner.o.weight)

    def forward(self, states: torch.Tensor, seen: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(B, 1, d), the encoder's states (B, S, d) and what is added to the logits, (B, 1, S) -> (B, 1, d)."""
        query = self.query(self.norm(states)).unflatten(-1, (self.n_heads, -1)).squeeze(1)  # (B, n, r)
        if self.is_latent:
            seen = self.latent(seen)
        else:
            query = (query.transpose(0, 1) @ self.key).transpose(0, 1)  # (B, n, d)
        weights = torch.softmax(query @ seen.mT + bias, dim=-1)
        mixed = weights @ seen  # (B, n, d), of a latent (B, n, r)
        if not self.is_latent:
            mixed = (mixed.transpose(0, 1) @ self.value).transpose(0, 1)  # (B, n, r)
        return states + self.o(mixed.flatten(1).unsqueeze(1))


# --- values and patches ------------------------------------------------------------------------------------------


def standardize(context: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The context (B, L) less its mean and by its deviation, 0 where it is NaN; which values there are; both numbers, (B, 1).

    As chronos' InstanceNorm, with sums over the values that there are in place of `nanmean`, which not every runtime has.
    """
    is_there = ~torch.isnan(context)
    count = is_there.sum(-1, keepdim=True).to(context.dtype)
    mean = torch.where(is_there, context, 0.0).sum(-1, keepdim=True) / count.clamp_min(1.0)
    deviation = (
        torch.where(is_there, context - mean, 0.0).square().sum(-1, keepdim=True) / count.clamp_min(1.0)
    ).sqrt()
    deviation = torch.where(deviation == 0, eps, deviation)
    deviation = torch.where(count == 0, 1.0, deviation)
    return torch.where(is_there, (context - mean) / deviation, 0.0), is_there, mean, deviation


class BoltGraph(nn.Module):
    """Chronos-Bolt: a context (B, L), NaN where a value is missing, L a multiple of the patch -> quantiles (B, Q, H)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        assert isinstance(model, LowRankChronosBoltModelForForecasting)
        settings = model.chronos_config
        self.patch_size = settings.input_patch_size
        self.eps = model.instance_norm.eps
        self.embed, self.head = model.input_patch_embedding, model.output_patch_embedding
        self.num_quantiles = model.num_quantiles
        encoder, decoder = model.encoder, model.decoder
        attention = encoder.block[0].layer[0].SelfAttention
        self.position_bias, self.max_distance = attention.relative_attention_bias, attention.max_distance
        self.reg = _reg_token(model)
        start = model.shared.weight[model.config.decoder_start_token_id]
        self.start = nn.Parameter(start.detach().clone(), requires_grad=False)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for block in encoder.block:
            self.encoder.append(Attention(block.layer[0].layer_norm, block.layer[0].SelfAttention))
            self.encoder.append(FeedForward(block.layer[1].layer_norm, block.layer[1].DenseReluDense))
        for block in decoder.block:
            self.decoder.append(AttentionToOne(block.layer[0].layer_norm, block.layer[0].SelfAttention))
            self.decoder.append(AttentionOfOne(block.layer[1].layer_norm, block.layer[1].EncDecAttention))
            self.decoder.append(FeedForward(block.layer[2].layer_norm, block.layer[2].DenseReluDense))
        self.encoder_norm, self.decoder_norm = encoder.final_layer_norm, decoder.final_layer_norm

    def sublayers(self, kind: str) -> list[nn.Module]:
        """Those that the layers of a kind have become, in their order."""
        in_encoder, in_decoder = (
            ("encoder_self", "encoder_feed_forward"),
            ("decoder_self", "cross", "decoder_feed_forward"),
        )
        stack, kinds = (self.encoder, in_encoder) if kind in in_encoder else (self.decoder, in_decoder)
        return list(stack)[kinds.index(kind) :: len(kinds)]

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        values, is_there, mean, deviation = standardize(context, self.eps)
        patches = values.unflatten(1, (-1, self.patch_size))
        is_there = is_there.unflatten(1, (-1, self.patch_size))
        states = self.embed(torch.cat([patches, is_there.to(values.dtype)], dim=-1).to(self.reg.dtype))
        is_seen = is_there.any(dim=-1)
        states = torch.cat([states, self.reg.expand(context.shape[0], -1, -1)], dim=1)
        is_seen = torch.cat([is_seen, is_seen.new_ones((context.shape[0], len(self.reg)))], dim=1)

        nothing = states.new_zeros(())
        length = states.shape[1]
        position = relative_position_bias(
            self.position_bias,
            distances(length, length, device=context.device),
            bidirectional=True,
            max_distance=self.max_distance,
        )
        hidden = masked(nothing, is_seen[:, None])  # (B, 1, S)
        bias = position + hidden[:, None]
        for layer in self.encoder:
            states = layer(states, bias) if isinstance(layer, Attention) else layer(states)
        states = self.encoder_norm(states)
        answer = self.start.expand(context.shape[0], 1, -1)
        for layer in self.decoder:
            answer = layer(answer, states, hidden) if isinstance(layer, AttentionOfOne) else layer(answer)
        quantiles = self.head(self.decoder_norm(answer)).unflatten(-1, (self.num_quantiles, -1)).squeeze(1)
        return quantiles.float() * deviation[..., None] + mean[..., None]


# --- Chronos-2 ---------------------------------------------------------------------------------------------------


class Chronos2Graph(nn.Module):
    """What both graphs of a Chronos-2 share."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        assert isinstance(model, LowRankChronos2Model)
        self.settings, self.config = model.chronos_config, model.config
        self.embed, self.head = model.input_patch_embedding, model.output_patch_embedding
        self.eps, self.use_arcsinh = model.instance_norm.eps, model.instance_norm.use_arcsinh
        self.num_quantiles = model.num_quantiles
        self.reg = _reg_token(model)
        self.time, self.group, self.feed_forward = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for block in model.encoder.block:
            time: Sublayer = block.layer[0]
            self.time.append(Attention(time.layer_norm, time.self_attention, time.self_attention))
            self.group.append(self.group_layer(block.layer[1].layer_norm, block.layer[1].self_attention))
            self.feed_forward.append(FeedForward(block.layer[2].layer_norm, block.layer[2].mlp))
        self.norm = model.encoder.final_layer_norm

    def group_layer(self, norm: RMSNorm, inner: LowRankAttention) -> nn.Module:
        """Attention between series, as a layer."""
        raise NotImplementedError

    def sublayers(self, kind: str) -> list[nn.Module]:
        """Those that the layers of a kind have become, in their order."""
        return list({"time": self.time, "group": self.group, "encoder_feed_forward": self.feed_forward}[kind])

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """Standardized values as the model reads them."""
        return torch.asinh(values) if self.use_arcsinh else values

    def patches(self, time: torch.Tensor, values: torch.Tensor, is_there: torch.Tensor, size: int) -> torch.Tensor:
        """The embedded patches (B, S, d) of values (B, L), 0 where there is none, at these times (L,)."""
        time = (time / self.settings.time_encoding_scale).expand(values.shape[0], -1)
        parts = [one.unflatten(1, (-1, size)) for one in (time, values, is_there.to(values.dtype))]
        return self.embed(torch.cat(parts, dim=-1).to(self.reg.dtype))

    def embedded(
        self, context: torch.Tensor, future: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The states (B, S, d) and where a patch has a value, (B, S), of context (B, L) and known future values (B, H); mean, deviation."""
        settings = self.settings
        values, is_there, mean, deviation = standardize(context, self.eps)
        past_time = torch.arange(-context.shape[1], 0, device=context.device, dtype=torch.float32)
        past = self.patches(past_time, self.scaled(values), is_there, settings.input_patch_size)
        is_known = ~torch.isnan(future)
        known = torch.where(is_known, self.scaled((future - mean) / deviation), 0.0)
        future_time = torch.arange(future.shape[1], device=context.device, dtype=torch.float32)
        ahead = self.patches(future_time, known, is_known, settings.output_patch_size)
        states = torch.cat([past, self.reg.expand(context.shape[0], -1, -1), ahead], dim=1)
        is_seen = is_there.unflatten(1, (-1, settings.input_patch_size)).any(dim=-1)
        rest = is_seen.new_ones((context.shape[0], len(self.reg) + ahead.shape[1]))
        return states, torch.cat([is_seen, rest], dim=1), mean, deviation

    def encoded(self, states: torch.Tensor, is_seen: torch.Tensor, *across: torch.Tensor) -> torch.Tensor:
        """The encoder on (B, S, d); `across` is what the group layers read beside the states."""
        turns = rotary_turns(torch.arange(states.shape[1], device=states.device)[None], self.config, states.dtype)
        bias = masked(states.new_zeros(()), is_seen[:, None, None])
        for time, group, feed_forward in zip(self.time, self.group, self.feed_forward):
            states = feed_forward(group(time(states, bias, turns), *across))
        return self.norm(states)

    def quantiles(
        self, states: torch.Tensor, future: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor
    ) -> torch.Tensor:
        """The quantiles (B, Q, H) that the last states, one a patch of the future, stand for."""
        size = self.settings.output_patch_size
        ahead = states[:, -(future.shape[1] // size) :]
        scaled = self.head(ahead).float().unflatten(-1, (self.num_quantiles, size)).transpose(1, 2).flatten(2)
        scaled = torch.sinh(scaled) if self.use_arcsinh else scaled
        return scaled * deviation[..., None] + mean[..., None]


class Alone(Chronos2Graph):
    """Chronos-2 of series that are groups of their own: context (B, L), known future values (B, H), NaN where none -> quantiles (B, Q, H)."""

    def group_layer(self, norm: RMSNorm, inner: LowRankAttention) -> nn.Module:
        return AttentionToOne(norm, inner)

    def forward(self, context: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        states, is_seen, mean, deviation = self.embedded(context, future)
        return self.quantiles(self.encoded(states, is_seen), future, mean, deviation)


class AcrossGroup(nn.Module):
    """Attention between the M series of each group, at every patch."""

    def __init__(self, norm: RMSNorm, inner: LowRankAttention) -> None:
        super().__init__()
        self.attention = Attention(norm, inner)

    def forward(self, states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(G M, S, d) and what is added to the logits, (G S, 1, 1, M) -> (G M, S, d)."""
        members = bias.shape[-1]
        by_patch = states.unflatten(0, (-1, members)).transpose(1, 2)  # (G, S, M, d)
        mixed = self.attention(by_patch.flatten(0, 1), bias)
        return mixed.view_as(by_patch).transpose(1, 2).flatten(0, 1)


class Grouped(Chronos2Graph):
    """Chronos-2 of G groups of M series: context (G, M, L), known future values (G, M, H), NaN where none -> quantiles (G, M, Q, H)."""

    def group_layer(self, norm: RMSNorm, inner: LowRankAttention) -> nn.Module:
        return AcrossGroup(norm, inner)

    def forward(self, context: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        members = context.shape[1]
        flat = future.flatten(0, 1)
        states, is_seen, mean, deviation = self.embedded(context.flatten(0, 1), flat)
        by_patch = is_seen.unflatten(0, (-1, members)).transpose(1, 2).flatten(0, 1)  # (G S, M)
        bias = masked(states.new_zeros(()), by_patch[:, None, None])
        found = self.quantiles(self.encoded(states, is_seen, bias), flat, mean, deviation)
        return found.unflatten(0, (-1, members))
