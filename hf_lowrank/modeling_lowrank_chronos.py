"""Chronos-Bolt and Chronos-2 models whose attention and feed-forward layers have ranks of their own.

Patching, scaling, masks, the REG token, the quantile head and the encoder's blocks are chronos-forecasting's; only the layers that
hold the matrices are replaced. Shapes: B batch, S patches, d d_model, n heads, r rank. Group attention has the batch where time
attention has the patches.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

try:
    from chronos.chronos2 import Chronos2Model
    from chronos.chronos2.layers import MHA, AttentionOutput, Chronos2RotaryEmbedding
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
except ImportError as error:
    raise ImportError("Chronos models need the package chronos: pip install chronos-forecasting") from error

from .configuration_lowrank_chronos import LowRankChronos2Config, LowRankChronosBoltConfig
from .configuration_lowrank_t5 import attention_form
from .modeling_lowrank_t5 import (
    LatentAttention,
    LowRankT5Attention,
    LowRankT5FeedForward,
    LowRankT5PreTrainedModel,
    PerHeadAttention,
    Placed,
    build_stacks,
)


class LowRankChronosBoltModelForForecasting(LowRankT5PreTrainedModel, ChronosBoltModelForForecasting):
    """Chronos-Bolt on low-rank T5 stacks; see `chronos.chronos_bolt.ChronosBoltModelForForecasting`."""

    config_class = LowRankChronosBoltConfig
    config: LowRankChronosBoltConfig
    main_input_name = "context"  # stock says `input_ids`, which it does not have
    _input_embed_layer = "shared"  # stock does not say, and peft asks

    def _init_decoder(self, config: LowRankChronosBoltConfig) -> None:
        # The stock __init__ calls this right after it has built a dense encoder, which is replaced.
        build_stacks(self, config)


class LowRankChronos2Attention(LowRankT5Attention):
    """What the forms share in Chronos-2: no position bias, no cache, and `MHA`'s own contract.

    A form comes before this class among the bases of a layer: its projections, this `forward`.
    """

    def __init__(self, dense: MHA) -> None:
        nn.Module.__init__(self)
        self.config = dense.config
        self.d_model = dense.d_model
        self.n_heads = dense.n_heads
        self.dropout = dense.dropout

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys turned by their positions; here they have none."""
        return query, key

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        *,
        mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> AttentionOutput:
        """`hidden_states` (B, S, d), `mask` broadcast to (B, n, S, S) and added to the logits."""
        key, value = self.project_key_value(hidden_states)
        value = self.cached_value(key, value)
        query, key = self.rotate(self.project_query(hidden_states), key, position_ids)  # (B, n, S, r)
        # A latent is one for all heads, and not every attention kernel broadcasts.
        key, value = (states.expand(-1, self.n_heads, -1, -1) for states in (key, value))
        fused = self.config._attn_implementation == "sdpa" and not output_attentions
        attend = MHA._sdpa_attention if fused else MHA._eager_attention
        mixed, weights = attend(self, query, key, value, mask)
        output = self.project_output(mixed.transpose(1, 2).flatten(2))
        return AttentionOutput(hidden_states=output, attn_weights=weights)


class PerHeadGroupAttention(PerHeadAttention, LowRankChronos2Attention):
    """Attention between the series of a group, with smaller heads."""


class LatentGroupAttention(LatentAttention, LowRankChronos2Attention):
    """Attention between the series of a group, all heads on one latent a token."""


class TimeAttention(PerHeadAttention, LowRankChronos2Attention):
    """Attention between the patches of a series, with smaller heads and rotary embeddings.

    Component i and component i + d_kv / 2 of a dense head turn together, at frequency i. Head h keeps the frequencies
    `pairs[h]` (qk / 2 of them, in any order) and lays its queries and keys out as [first components | second components].
    """

    pairs: torch.Tensor

    def __init__(self, dense: MHA, *, qk: int, vo: int) -> None:
        super().__init__(dense, qk=qk, vo=vo)
        self.rope_embed = dense.rope_embed
        self.register_buffer("pairs", self.default_pairs(qk // 2))

    def default_pairs(self, count: int, device: torch.device | None = None) -> torch.Tensor:
        """(n, count): `count` of the frequencies, evenly spread from the fastest; at full rank all, in order."""
        frequencies = torch.arange(count, device=device) * (self.config.d_kv // 2) // count
        return frequencies.repeat(self.n_heads, 1)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.cat([self.pairs, self.pairs], dim=-1)  # (n, qk)
        # (1 or B, S, d_kv) -> (1 or B, n, S, qk)
        cos, sin = (turn[..., kept].transpose(1, 2) for turn in self.rope_embed(query, position_ids))
        query, key = (states * cos + Chronos2RotaryEmbedding.rotate_half(states) * sin for states in (query, key))
        return query, key

    def init_weights(self, factor: float) -> None:
        super().init_weights(factor)
        init.copy_(self.pairs, self.default_pairs(self.pairs.shape[1], self.pairs.device))


class LowRankChronos2Model(Placed, Chronos2Model):
    """Chronos-2 with the layers that its `LowRankChronos2Config` describes; see `chronos.Chronos2Model`."""

    config_class = LowRankChronos2Config
    config: LowRankChronos2Config
    main_input_name = "context"  # stock says `input_ids`, which it does not have
    _no_split_modules = ["Chronos2EncoderBlock"]  # noqa: RUF012

    @classmethod
    def is_custom_code(cls) -> bool:
        # As for the T5 models: `_init_weights` has rules for modules that own no parameter directly. Stock Chronos-2 loses
        # them this way, and its fresh matrices all have the standard deviation `initializer_factor`.
        return False

    def post_init(self) -> None:
        # The stock __init__ ends here, its dense layers built (without memory when loading: on the meta device).
        attention, feed_forward = self.config.attention_ranks, self.config.feed_forward_ranks["encoder"]
        not_in_dense = []
        for i, block in enumerate(self.encoder.block):
            time, group, outer = block.layer
            time.self_attention = TimeAttention(time.self_attention, **attention["time"][i])
            ranks = attention["group"][i]
            form = LatentGroupAttention if attention_form(ranks) == "latent" else PerHeadGroupAttention
            group.self_attention = form(group.self_attention, **ranks)
            outer.mlp = LowRankT5FeedForward(self.config, **feed_forward[i])
            if attention["time"][i]["qk"] == self.config.d_kv:
                not_in_dense.append(rf"^encoder\.block\.{i}\.layer\.0\.self_attention\.pairs$")
        # A dense checkpoint is a full-rank one: that it names no frequencies, when all are kept, is nothing to warn of.
        self._keys_to_ignore_on_load_missing = not_in_dense
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (LowRankChronos2Attention, LowRankT5FeedForward)):
            module.init_weights(self.config.initializer_factor)
        else:
            super()._init_weights(module)


__all__ = ["LowRankChronos2Model", "LowRankChronosBoltModelForForecasting"]
