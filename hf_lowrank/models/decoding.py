"""Sample paths from a Chronos-T5, dense or low-rank, doing once whatever can be done once.

transformers' `generate` repeats the encoder's output for every sample path, so that cross-attention projects, keeps and reads
the same keys and values 20 times; it also grows its cache by copying and sorts all the vocabulary. Here cross-attention
keeps them once a series, the paths of a series being query rows over them; the cache is written in place; the position bias
is made once; and only the `top_k` tokens that can be drawn are looked at. The equations and the distribution of each
path are the same; the paths of a series are spread evenly over it. Works on the modules of the model as they are, so nothing is copied or can grow stale.

Shapes: B series, P paths a series, N = B P, T tokens, d d_model, n heads, h heads of keys (n, or 1 for a latent), r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .modeling_lowrank_layers import distances, dtype_of, is_matrix, relative_position_bias

# Tokens that go through the encoder together: on a CPU what its caches hold, elsewhere what keeps a GPU busy.
CPU_TOKENS, GPU_TOKENS = 1024, 65536
# Matrices from this size on are multiplied by oneDNN in float32 on a CPU, where BLAS, which nn.Linear calls, may take a quarter longer
# with a few hundred rows. It is the operator that torch.compile uses; PyTorch has no public name for it.
ONEDNN_WEIGHTS = 2**18
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# PyTorch's fused attention needs equal heads for queries and values, and is at its best at multiples of this size.
HEAD_MULTIPLE = 16
NOT_FINITE = "the {} of the model are not finite: its weights or the values are too large for its numbers, or damaged."


def apply_linear(module: nn.Module, states: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
    """`module(states)`, of a matrix, thin factors, or whatever an adapter or a quantizer has put in their place; with `relu` its positive part."""
    if isinstance(module, nn.Sequential):
        *first, module = module
        for part in first:
            states = apply_linear(part, states)
    is_plain = is_matrix(module) and states.dtype == torch.float32
    is_plain = is_plain and states.device.type == "cpu" and module.weight.numel() >= ONEDNN_WEIGHTS
    if ONEDNN is None or not is_plain or torch.compiler.is_compiling():
        states = module(states)
        return states.relu_() if relu else states
    return ONEDNN(states, module.weight, module.bias, "relu" if relu else "none", [], "")


def rms_norm(states: torch.Tensor, norm: nn.Module, epsilon: float) -> torch.Tensor:
    """T5's norm, w x / sqrt(mean x^2 + eps), in two passes over x."""
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
    return (states * scale).to(norm.weight.dtype).mul_(norm.weight)


def add(states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The residual sum, kept finite in float16 as T5 does."""
    states = states + update
    if states.dtype == torch.float16:
        limit = torch.finfo(states.dtype).max - 1000
        states = states.clamp_(-limit, limit)
    return states


def feed_forward(layer: nn.Module, states: torch.Tensor, activation: str) -> torch.Tensor:
    """T5's feed-forward layer of any make, plain or gated; the one large intermediate is worked on in place."""
    first = layer.wi_0 if hasattr(layer, "wi_0") else layer.wi
    if activation == "relu":
        hidden = apply_linear(first, states, relu=True)
    else:
        hidden = ACT2FN[activation](apply_linear(first, states))
    if hasattr(layer, "wi_0"):
        hidden = hidden.mul_(apply_linear(layer.wi_1, states))
    # `wo` stays in float32 when the rest is float16, as in T5.
    return apply_linear(layer.wo, hidden.to(dtype_of(layer.wo, hidden.dtype)))


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where the mask is true, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class LoopAttention:
    """An attention layer of either form: queries of n heads, keys and values of h, the way back to d.

    Queries, keys and values are padded with zeros to the head size of the fused kernel, which changes no sum.
    """

    def __init__(self, layer: nn.Module, num_heads: int) -> None:
        self.layer, self.heads = layer, num_heads
        self.is_latent = hasattr(layer, "latent")
        self.rank = layer.o.in_features // num_heads
        largest = max(layer.q.out_features // num_heads, self.rank)
        self.size = -(-largest // HEAD_MULTIPLE) * HEAD_MULTIPLE

    def query(self, states: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., n, r)"""
        if self.is_latent:
            states = apply_linear(self.layer.query_sketch, states)
        return apply_linear(self.layer.q, states).unflatten(-1, (self.heads, -1))

    def key_value(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., d) -> twice (..., h, r); a latent is both keys and values, one tensor."""
        if self.is_latent:
            latent = apply_linear(self.layer.latent, states).unsqueeze(-2)
            return latent, latent
        heads = (self.heads, -1)
        key, value = apply_linear(self.layer.k, states), apply_linear(self.layer.v, states)
        return key.unflatten(-1, heads), value.unflatten(-1, heads)

    def output(self, mixed: torch.Tensor) -> torch.Tensor:
        """(..., n, r) -> (..., d)"""
        output = apply_linear(self.layer.o, mixed.flatten(-2))
        return apply_linear(self.layer.output_sketch, output) if self.is_latent else output

    def padded(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, h, r) -> (B, h, S, size), as the fused kernel wants it."""
        return F.pad(states, (0, self.size - states.shape[-1])).transpose(1, 2)

    def fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """softmax(q k^T + bias) v, (B, h, S, size) each -> (B, h, S, r)."""
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return mixed[..., : self.rank]


def position_bias(stack: nn.Module, length: int, device: torch.device, *, bidirectional: bool) -> torch.Tensor:
    """The position bias of all tokens to all tokens, (1, n, T, T), which the first layer of a stack holds."""
    return relative_position_bias(
        stack.block[0].layer[0].SelfAttention.relative_attention_bias,
        distances(length, length, device=device),
        bidirectional=bidirectional,
        max_distance=stack.config.relative_attention_max_distance,
    )


def check_names(model: PreTrainedModel) -> None:
    """Raise ValueError where the modules of a T5 do not have the names that this file reads; it reads nothing else but the configuration.

    They are those of its parameters, which every saved checkpoint has.
    """
    modules = {name for name, _ in model.named_modules()}
    stacks = {"encoder": model.config.num_layers, "decoder": model.config.num_decoder_layers}
    names = ["lm_head"]
    for stack, depth in stacks.items():
        names += [f"{stack}.embed_tokens", f"{stack}.final_layer_norm"]
        names.append(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias")
        for block in (f"{stack}.block.{index}" for index in range(depth)):
            attention = (
                {"0": "SelfAttention"} if stack == "encoder" else {"0": "SelfAttention", "1": "EncDecAttention"}
            )
            last = f"{block}.layer.{len(attention)}"
            inner = ("wi_0", "wi_1") if model.config.is_gated_act else ("wi",)
            names += [f"{last}.layer_norm", *(f"{last}.DenseReluDense.{name}" for name in (*inner, "wo"))]
            for index, name in attention.items():
                layer = f"{block}.layer.{index}"
                kept = ("latent",) if f"{layer}.{name}.latent" in modules else ("k", "v")
                names += [f"{layer}.layer_norm", *(f"{layer}.{name}.{part}" for part in ("q", *kept, "o"))]
    if missing := [name for name in names if name not in modules]:
        raise ValueError(
            f"model: this version of {type(model).__name__} has no module {missing[0]}, which hf_lowrank reads "
            f"({len(missing)} in all); use another version of transformers, or forecast with chronos.ChronosPipeline."
        )


# ---- The encoder -----------------------------------------------------------------------------------------------------


def self_attention(attention: LoopAttention, states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """All tokens to all tokens: (B, T, d), bias (1 or B, n, T, T) -> (B, T, d)."""
    query = attention.padded(attention.query(states))
    key, value = (attention.padded(part).expand_as(query) for part in attention.key_value(states))
    return attention.output(attention.fused(query, key, value, bias).transpose(1, 2))


def encode(encoder: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The encoder's output, (B, T) -> (B, T, d), a few series at a time. `mask` is True where a token is none of padding."""
    config, length = encoder.config, tokens.shape[1]
    epsilon, activation = config.layer_norm_epsilon, config.dense_act_fn
    layers = [(block.layer, LoopAttention(block.layer[0].SelfAttention, config.num_heads)) for block in encoder.block]
    bias = position_bias(encoder, length, tokens.device, bidirectional=True).contiguous()
    is_padded = not mask.all()
    together = max(1, (CPU_TOKENS if tokens.device.type == "cpu" else GPU_TOKENS) // length)
    outputs = []
    for some, visible in zip(tokens.split(together), mask.split(together)):
        bias_here = bias
        if is_padded:
            bias_here = bias + additive(visible, bias.dtype)[:, None, None]
        states = encoder.embed_tokens(some)
        for (first, last), attention in layers:
            states = add(states, self_attention(attention, rms_norm(states, first.layer_norm, epsilon), bias_here))
            normed = rms_norm(states, last.layer_norm, epsilon)
            states = add(states, feed_forward(last.DenseReluDense, normed, activation))
        outputs.append(rms_norm(states, encoder.final_layer_norm, epsilon))
    return torch.cat(outputs)


# ---- The decoder -----------------------------------------------------------------------------------------------------


class LoopSelfAttention:
    """Self-attention of a decoder layer, one token at a time; keys and values (N, h, steps, r) are written in place."""

    def __init__(self, layer: nn.Module, num_heads: int, steps: int) -> None:
        self.attention, self.steps = LoopAttention(layer, num_heads), steps
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def __call__(self, states: torch.Tensor, step: int, bias: torch.Tensor) -> torch.Tensor:
        """(N, d), bias (n, step + 1) -> (N, d)"""
        key, value = self.attention.key_value(states)  # (N, h, r)
        if self.keys is None or self.values is None:
            self.keys = key.new_zeros(*key.shape[:2], self.steps, key.shape[2])
            self.values = self.keys if value is key else value.new_zeros(*value.shape[:2], self.steps, value.shape[2])
        self.keys[:, :, step] = key
        if value is not key:
            self.values[:, :, step] = value
        keys, values = (part[:, :, : step + 1].flatten(0, 1) for part in (self.keys, self.values))
        # Products of a few numbers each: here a plain batched product is faster than the fused kernel.
        query = self.attention.query(states)
        scores = torch.bmm(query.reshape(len(keys), -1, query.shape[-1]), keys.mT)  # (N h, n / h, step + 1)
        scores.view(len(states), -1, step + 1).add_(bias)
        mixed = torch.bmm(torch.softmax(scores, dim=-1, out=scores), values)
        return self.attention.output(mixed.view(*query.shape[:2], -1))


class LoopCrossAttention:
    """Cross-attention of a decoder layer to the encoder's output; keys and values (B, h, T, size), once a series."""

    def __init__(self, layer: nn.Module, num_heads: int, states: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.attention, self.bias = LoopAttention(layer, num_heads), bias
        key, value = self.attention.key_value(states)
        self.keys = self.attention.padded(key).contiguous()
        self.values = self.keys if value is key else self.attention.padded(value).contiguous()

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(N, d) -> (N, d)"""
        series, heads = self.keys.shape[:2]
        query = self.attention.query(states)  # (N, n, r)
        rows = self.attention.padded(query.reshape(series, -1, heads, query.shape[-1]))  # (B, h, P n / h, size)
        mixed = self.attention.fused(rows, self.keys, self.values, self.bias)
        return self.attention.output(mixed.transpose(1, 2).reshape(*query.shape[:2], -1))


class Decoder:
    """A T5's decoder over the encoder's output of B series: `step` takes the last token of every path to its logits.

    Args:
        model: A `T5ForConditionalGeneration`, dense or low-rank.
        states: The encoder's output, (B, T, d).
        mask: (B, T), True where a token is none of padding.
        steps: The number of tokens of a path.
    """

    def __init__(self, model: Any, states: torch.Tensor, mask: torch.Tensor, *, steps: int) -> None:
        self.model, self.decoder = model, model.decoder
        heads = model.config.num_heads
        bias = position_bias(self.decoder, steps, states.device, bidirectional=False)
        self.bias = bias[0].unbind(1)  # of each step, (n, steps)
        padding = None if mask.all() else additive(mask, states.dtype)[:, None, None]  # (B, 1, 1, T)
        self.layers = [
            (
                block.layer,
                LoopSelfAttention(block.layer[0].SelfAttention, heads, steps),
                LoopCrossAttention(block.layer[1].EncDecAttention, heads, states, padding),
            )
            for block in self.decoder.block
        ]

    def step(self, tokens: torch.Tensor, step: int) -> torch.Tensor:
        """The logits (N, vocabulary) after token number `step`, `tokens` (N,), of each path. Steps count from 0, in order."""
        config, bias = self.model.config, self.bias[step][:, : step + 1]
        epsilon, activation = config.layer_norm_epsilon, config.dense_act_fn
        states = self.decoder.embed_tokens(tokens)
        for (first, second, last), own, cross in self.layers:
            states = add(states, own(rms_norm(states, first.layer_norm, epsilon), step, bias))
            states = add(states, cross(rms_norm(states, second.layer_norm, epsilon)))
            normed = rms_norm(states, last.layer_norm, epsilon)
            states = add(states, feed_forward(last.DenseReluDense, normed, activation))
        states = rms_norm(states, self.decoder.final_layer_norm, epsilon)
        if config.scale_decoder_outputs:
            states = states * config.d_model**-0.5
        return apply_linear(self.model.lm_head, states)


# ---- Sampling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: transformers' temperature, top-k and top-p, in this order; None leaves one out.

    `forbidden` tokens are never drawn: Chronos forecasts a fixed number of steps, so the end of a sequence is one.

    Raises:
        ValueError: A temperature that is not positive, a negative top_k, a top_p outside [0, 1].
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    forbidden: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be a positive number, found {self.temperature}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be a positive integer, or 0 for all tokens, found {self.top_k}.")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be in [0, 1], found {self.top_p}.")

    def candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, vocabulary) -> the scores, descending, and the tokens that can be drawn, at least (N, k) each.

        A score of -inf is that of none. Logits in float32 are changed: the forbidden ones become -inf.
        """
        logits = self._scores(logits)
        vocabulary = logits.shape[-1]
        kept = min(self.top_k or vocabulary, vocabulary)
        count = min(kept + 1, vocabulary)
        scores, tokens = logits.topk(count)
        # All that equal the last of the k belong to them. In bfloat16 many do.
        while count < vocabulary and (scores[:, -1] == scores[:, kept - 1]).any():
            count = min(2 * count, vocabulary)
            scores, tokens = logits.topk(count)
        scores = scores.masked_fill(scores < scores[:, kept - 1 : kept], -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            tail = scores.softmax(dim=-1).flip(-1).cumsum(dim=-1).flip(-1)  # the probability of a token and all below
            tail[:, 0] = 1 + self.top_p  # the likeliest stays
            scores = scores.masked_fill(tail <= 1 - self.top_p, -torch.inf)
        return scores, tokens

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """What the softmax is taken of, in float32, before any token is left out but the forbidden ones."""
        logits = logits.float()
        for token in self.forbidden:
            logits[:, token] = -torch.inf
        return logits if self.temperature in (None, 1) else logits / self.temperature

    def draw(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """One token a path: (N, vocabulary) -> (N,).

        By the inverse of the distribution function over the tokens in their own order, from one number a path, `uniform` (N, 1) in
        [0, 1): two models that forecast nearly the same draw nearly the same values from the same numbers.
        """
        tokens = None
        if self.top_k or (self.top_p is not None and self.top_p < 1):
            scores, tokens = self.candidates(logits)
            tokens, order = tokens.sort(dim=-1)
            total = scores.softmax(dim=-1).gather(1, order).cumsum(dim=-1)
        else:  # all are there, in their order
            total = self._scores(logits).softmax(dim=-1).cumsum(dim=-1)
        last = total[:, -1:]
        level = torch.minimum(uniform * last, last.nextafter(torch.zeros_like(last)))
        drawn = torch.searchsorted(total, level, right=True)
        # Past the end where the scores are NaN, which `sample_paths` says at the end.
        drawn.clamp_max_(total.shape[1] - 1)
        return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def latin_hypercube(
    num_samples: int, *shape: int, device: torch.device | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the paths of a series, (*shape, num_samples): one in each of `num_samples` equal parts, in random order.

        u_p = (pi(p) + v_p) / P,        pi a random permutation of 0, ..., P - 1,  v_p uniform in [0, 1)

    Every path alone is distributed as with independent numbers, and what is estimated from all of them varies less (McKay, Beckman and
    Conover, "A Comparison of Three Methods for Selecting Values of Input Variables", 1979, section 2).
    """
    order, within = (torch.rand(*shape, num_samples, device=device, generator=generator) for _ in range(2))
    return (order.argsort(dim=-1) + within) / num_samples


@torch.inference_mode()
def sample_paths(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_samples: int,
    steps: int,
    start: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Draw `num_samples` continuations of `steps` tokens of each series: (B, T) -> (B, num_samples, steps).

    At each step the paths of a series draw from equal parts of the distribution (`latin_hypercube`), so that quantiles over 20 of them
    are as good as over 50 independent ones.

    Args:
        tokens, mask: The context and where it is none of padding.
        start: The token that every path starts from; it is not among those returned.
        generators: The random state of each series, on the CPU: its paths do not depend on the other series then. By default
            PyTorch's own, for all.

    Raises:
        ValueError: The logits are NaN or infinite.
    """
    mask = mask.bool()
    decoder = Decoder(model, encode(model.encoder, tokens, mask), mask, steps=steps)
    last = tokens.new_full((len(tokens) * num_samples,), start)
    paths = last.new_empty(len(last), steps)
    if generators is None:
        uniform = latin_hypercube(num_samples, steps, len(tokens), device=tokens.device)
    else:
        drawn = [latin_hypercube(num_samples, steps, generator=generator) for generator in generators]
        uniform = torch.stack(drawn, dim=1).to(tokens.device)
    uniform = uniform.view(steps, -1, 1)  # of each step, (N, 1)
    is_finite = torch.ones((), dtype=torch.bool, device=tokens.device)
    for step in range(steps):
        logits = decoder.step(last, step)
        is_finite &= logits.amax().isfinite()
        last = sampling.draw(logits, uniform[step])
        paths[:, step] = last
    if not is_finite:
        raise ValueError(NOT_FINITE.format("logits"))
    return paths.unflatten(0, (len(tokens), num_samples))
