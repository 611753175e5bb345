"""T5 models whose attention and feed-forward layers have ranks of their own.

The stacks, blocks, caching, generation and output recording are transformers' T5; only the two layers that hold the
matrices are replaced. Shapes: B batch, S queries, T keys, d d_model, n heads, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import T5EncoderModel, T5ForConditionalGeneration, T5Model, T5PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack, eager_attention_forward

from .configuration_lowrank_t5 import LowRankT5Config, attention_form


class LowRankT5Attention(T5Attention):
    """What the two forms share: the position bias, the cache, the choice of the attention implementation.

    A form says how the input becomes queries (`project_query`), what a token keeps for later (`project_key_value`) and how the
    mixed values become the output (`project_output`).
    """

    num_key_value_groups = 1

    def __init__(self, dense: T5Attention) -> None:
        # T5Attention.__init__ would build four dense matrices to throw them away.
        nn.Module.__init__(self)
        self.config = dense.config
        self.layer_idx = dense.layer_idx
        self.is_decoder = dense.is_decoder
        self.is_causal = dense.is_causal
        self.d_model = dense.d_model
        self.n_heads = dense.n_heads
        self.dropout = dense.dropout
        self.scaling = dense.scaling
        self.gradient_checkpointing = dense.gradient_checkpointing
        self.relative_attention_num_buckets = dense.relative_attention_num_buckets
        self.relative_attention_max_distance = dense.relative_attention_max_distance
        self.has_relative_attention_bias = dense.has_relative_attention_bias
        if self.has_relative_attention_bias:
            self.relative_attention_bias = dense.relative_attention_bias

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, n r) -> (B, n, S, r)"""
        return states.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def project_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def cached_value(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The values to attend to, from what the cache holds."""
        return values

    def project_output(self, mixed: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def cached_key_value(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None, past_key_values: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens so far: projected, taken from the cache, or both."""
        if past_key_values is None:
            return self.project_key_value(hidden_states if key_value_states is None else key_value_states)
        if key_value_states is None:
            if isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = past_key_values.self_attention_cache
            return past_key_values.update(*self.project_key_value(hidden_states), self.layer_idx)
        if not isinstance(past_key_values, EncoderDecoderCache):
            return past_key_values.update(*self.project_key_value(key_value_states), self.layer_idx)
        cache = past_key_values.cross_attention_cache
        if past_key_values.is_updated.get(self.layer_idx):
            return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        past_key_values.is_updated[self.layer_idx] = True
        return cache.update(*self.project_key_value(key_value_states), self.layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`hidden_states` (B, S, d), `key_value_states` (B, T, d) in cross-attention; T5Attention's own contract.

        Cross-attention may have fewer rows of `key_value_states`, B / P: P consecutive rows of `hidden_states`, paths of one
        series, then attend to each.
        """
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        if isinstance(past_length, torch.Tensor):
            past_length = past_length.clone()  # a static cache counts in place

        query = self.project_query(hidden_states)  # (B, n, S, r)
        key, value = self.cached_key_value(hidden_states, key_value_states, past_key_values)
        value = self.cached_value(key, value)

        if position_bias is None:
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(
                    query.shape[2], key.shape[2], device=query.device, past_seen_tokens=past_length
                )
            else:
                position_bias = query.new_zeros(1, self.n_heads, query.shape[2], key.shape[2])
                position_bias.requires_grad_(self.gradient_checkpointing and self.training)

        paths = len(query) // len(key)
        bias = position_bias
        if paths > 1:
            query = query.unflatten(0, (-1, paths)).transpose(1, 2).flatten(2, 3)  # (B / P, n, P S, r)
            bias = for_each_path(bias, paths, len(key))
            mask = None if mask is None else for_each_path(mask, paths, len(key))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=bias,
            **kwargs,
        )
        if paths > 1:
            mixed = mixed.unflatten(1, (paths, -1)).flatten(0, 1)  # (B, S, n, r)
            if weights is not None:
                weights = weights.unflatten(2, (paths, -1)).transpose(1, 2).flatten(0, 1)
        return self.project_output(mixed.flatten(2)), position_bias, weights


def for_each_path(bias: torch.Tensor, paths: int, series: int) -> torch.Tensor:
    """What is added to the logits of S queries, laid out for those of all P paths of B series.

    (1, 1 or n, S, T) and (B, ...), the same for all paths, or (B P, ...), with rows of its own for each -> (..., P S, T)
    """
    if (
        len(bias) == paths * series
    ):  # of a caller who repeated the mask, but continues from a cache that holds a series once
        return bias.unflatten(0, (series, paths)).transpose(1, 2).flatten(2, 3)
    return bias.unsqueeze(2).expand(-1, -1, paths, -1, -1).flatten(2, 3)


class PerHeadAttention(LowRankT5Attention):
    """Attention with smaller heads (eq. 21 of arXiv 2510.03358): q, k of size `qk`, v, o of size `vo` a head."""

    def __init__(self, dense: T5Attention, *, qk: int, vo: int) -> None:
        super().__init__(dense)
        self.q = nn.Linear(self.d_model, self.n_heads * qk, bias=False)
        self.k = nn.Linear(self.d_model, self.n_heads * qk, bias=False)
        self.v = nn.Linear(self.d_model, self.n_heads * vo, bias=False)
        self.o = nn.Linear(self.n_heads * vo, self.d_model, bias=False)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.split_heads(self.q(hidden_states))

    def project_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split_heads(self.k(hidden_states)), self.split_heads(self.v(hidden_states))

    def project_output(self, mixed: torch.Tensor) -> torch.Tensor:
        return self.o(mixed)

    def init_weights(self, factor: float) -> None:
        """T5's own standard deviations, at this layer's head dimensions."""
        qk = self.q.out_features // self.n_heads
        init.normal_(self.q.weight, std=factor * (self.d_model * qk) ** -0.5)
        init.normal_(self.k.weight, std=factor * self.d_model**-0.5)
        init.normal_(self.v.weight, std=factor * self.d_model**-0.5)
        init.normal_(self.o.weight, std=factor * self.o.in_features**-0.5)


class LatentAttention(LowRankT5Attention):
    """All heads read keys and values from one latent of rank r a token (eq. 20 of arXiv 2510.03358, absorbed).

    With c_t = P y_t the latent of a token, head h has

        logit(s, t) = (C_h P_q x_s)^T c_t + bias        output = W_O sum_h D_h (mixed c)_h

    `latent` is P, `query_sketch` P_q, `q` the stacked cores C_h, `o` the row of the cores D_h, `output_sketch` W_O. Without a
    query sketch `q` maps from d_model, without an output sketch `o` maps to d_model. Multi-query attention:
    the cache holds r numbers a token.
    """

    def __init__(self, dense: T5Attention, *, latent: int, query: int | None, output: int | None) -> None:
        super().__init__(dense)
        self.num_key_value_groups = self.n_heads
        self.latent = nn.Linear(self.d_model, latent, bias=False)
        self.query_sketch = nn.Identity() if query is None else nn.Linear(self.d_model, query, bias=False)
        self.q = nn.Linear(self.d_model if query is None else query, self.n_heads * latent, bias=False)
        self.o = nn.Linear(self.n_heads * latent, self.d_model if output is None else output, bias=False)
        self.output_sketch = nn.Identity() if output is None else nn.Linear(output, self.d_model, bias=False)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.split_heads(self.q(self.query_sketch(hidden_states)))

    def project_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.latent(hidden_states).unsqueeze(1)  # (B, 1, T, r)
        return latent, latent[..., :0]  # the cache needs a value; this one takes no memory

    def cached_value(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return keys

    def project_output(self, mixed: torch.Tensor) -> torch.Tensor:
        return self.output_sketch(self.o(mixed))

    def init_weights(self, factor: float) -> None:
        """Standard deviations that give queries, keys and output the size they have in a fresh dense T5."""
        rank = self.latent.out_features
        init.normal_(self.latent.weight, std=factor * self.d_model**-0.5)
        init.normal_(self.q.weight, std=factor * (self.q.in_features * rank) ** -0.5)
        init.normal_(self.o.weight, std=factor * self.o.in_features**-0.5)
        if isinstance(self.query_sketch, nn.Linear):
            init.normal_(self.query_sketch.weight, std=factor * self.d_model**-0.5)
        if isinstance(self.output_sketch, nn.Linear):
            init.normal_(self.output_sketch.weight, std=factor * self.output_sketch.in_features**-0.5)


class ThinFactors(nn.Sequential):
    """A matrix of rank r as two thin ones: x -> up(down(x)), `down` (r, in) and `up` (out, r)."""

    def __init__(self, in_features: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)

    def init_weights(self, factor: float) -> None:
        """The product has the standard deviation factor / sqrt(in_features), as T5's feed-forward matrices have."""
        init.normal_(self.down.weight, std=factor * self.down.in_features**-0.5)
        init.normal_(self.up.weight, std=factor * self.up.in_features**-0.5)


def linear(in_features: int, rank: int | None, out_features: int) -> nn.Module:
    """A whole matrix where `rank` is None, thin factors otherwise."""
    if rank is None:
        return nn.Linear(in_features, out_features, bias=False)
    return ThinFactors(in_features, rank, out_features)


class LowRankT5FeedForward(nn.Module):
    """T5's feed-forward layer, plain or gated, with a width of its own and optional thin factors."""

    def __init__(self, config: LowRankT5Config, *, width: int, wi: int | None, wo: int | None) -> None:
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
        dtype = next(self.wo.parameters()).dtype
        if dtype.is_floating_point:
            hidden_states = hidden_states.to(dtype)
        return self.wo(hidden_states)

    def init_weights(self, factor: float) -> None:
        for matrix in self.children():
            if isinstance(matrix, nn.Linear):
                init.normal_(matrix.weight, std=factor * matrix.in_features**-0.5)
            elif isinstance(matrix, ThinFactors):
                matrix.init_weights(factor)


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


class LowRankT5PreTrainedModel(Placed, T5PreTrainedModel):
    """Initialisation and loading, shared by the stacks and the models."""

    config_class = LowRankT5Config
    config: LowRankT5Config
    # One score function with different query/key and value sizes is not what flex attention compiles.
    _supports_flex_attn = False

    @classmethod
    def is_custom_code(cls) -> bool:
        # Custom code is initialised module by module without T5's own rules; these classes follow the
        # library's initialisation protocol (`transformers.initialization`).
        return False

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for stack in self.children():
            if isinstance(stack, T5Stack):  # transformers 5.15 leaves them as they were
                stack.config._attn_implementation = self.config._attn_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        factor = self.config.initializer_factor
        if isinstance(module, (PerHeadAttention, LatentAttention)):
            module.init_weights(factor)
            if module.has_relative_attention_bias:
                init.normal_(module.relative_attention_bias.weight, std=factor * self.config.d_model**-0.5)
        elif isinstance(module, LowRankT5FeedForward):
            module.init_weights(factor)
        else:
            super()._init_weights(module)


class LowRankT5Stack(LowRankT5PreTrainedModel, T5Stack):
    """A T5 encoder or decoder with the layers that its `LowRankT5Config` describes."""

    def post_init(self) -> None:
        # T5Stack.__init__ ends here, its dense layers built (without memory when loading: on the meta device).
        attention, feed_forward = self.config.attention_ranks, self.config.feed_forward_ranks
        if self.is_decoder:
            kinds = {"SelfAttention": attention["decoder_self"], "EncDecAttention": attention["cross"]}
        else:
            kinds = {"SelfAttention": attention["encoder_self"]}
        widths = feed_forward["decoder" if self.is_decoder else "encoder"]
        for i, block in enumerate(self.block):
            for sublayer, (name, ranks) in zip(block.layer, kinds.items()):
                form = LatentAttention if attention_form(ranks[i]) == "latent" else PerHeadAttention
                setattr(sublayer, name, form(getattr(sublayer, name), **ranks[i]))
            block.layer[-1].DenseReluDense = LowRankT5FeedForward(self.config, **widths[i])
        super().post_init()


def build_stacks(model: T5PreTrainedModel, config: LowRankT5Config) -> None:
    """Give an encoder-decoder its embedding and its two stacks, as T5Model.__init__ does with dense ones."""
    model.shared = nn.Embedding(config.vocab_size, config.d_model)
    encoder_config, decoder_config = copy.deepcopy(config), copy.deepcopy(config)
    encoder_config.is_decoder, encoder_config.use_cache = False, False
    decoder_config.is_decoder, decoder_config.num_layers = True, config.num_decoder_layers
    model.encoder = LowRankT5Stack(encoder_config)
    model.decoder = LowRankT5Stack(decoder_config)


class LowRankT5Model(LowRankT5PreTrainedModel, T5Model):
    """The bare encoder-decoder; see [`~transformers.T5Model`]."""

    def __init__(self, config: LowRankT5Config) -> None:
        T5PreTrainedModel.__init__(self, config)
        build_stacks(self, config)
        self.post_init()


class LowRankT5EncoderModel(LowRankT5PreTrainedModel, T5EncoderModel):
    """The encoder alone; see [`~transformers.T5EncoderModel`]."""

    def __init__(self, config: LowRankT5Config) -> None:
        T5PreTrainedModel.__init__(self, config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        config.use_cache = False
        config.is_encoder_decoder = False
        self.encoder = LowRankT5Stack(config)
        self.post_init()


class LowRankT5ForConditionalGeneration(LowRankT5PreTrainedModel, T5ForConditionalGeneration):
    """The encoder-decoder with a language-model head; see [`~transformers.T5ForConditionalGeneration`]."""

    # T5's loss is a mean over the labels of its own batch. `Trainer` takes it for one over those of all processes and accumulated
    # batches, because `forward` has keyword arguments, and would multiply it by their number.
    accepts_loss_kwargs = False

    def __init__(self, config: LowRankT5Config) -> None:
        T5PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        build_stacks(self, config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Stock `generate` repeats the encoder's output and its mask for every sample or beam. Cross-attention does without.
        once = {name: model_kwargs.pop(name) for name in ("encoder_outputs", "attention_mask") if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=False, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | once

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.Tensor) -> Cache:
        # Beams of one series share its keys and values, and no beam moves to another series.
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values


__all__ = ["LowRankT5EncoderModel", "LowRankT5ForConditionalGeneration", "LowRankT5Model"]
