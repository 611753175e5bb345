"""Chronos-Bolt and Chronos-2 models whose attention and feed-forward layers have ranks of their own.

Patching, scaling, the REG token, the quantile head and the loss are chronos-forecasting's; the transformers between them are ours.
Shapes: B batch, S patches, d d_model, n heads, r rank, G groups of M series. Group attention has the batch where time attention has
the patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

try:
    from chronos.chronos2 import Chronos2Model
    from chronos.chronos_bolt import (
        ChronosBoltConfig,
        ChronosBoltModelForForecasting,
        InstanceNorm,
        Patch,
        ResidualBlock,
    )
except ImportError as error:
    raise ImportError("Chronos models need the package chronos: pip install chronos-forecasting") from error

from .checked_loading import ChecksItsWeights
from .configuration_lowrank_chronos import LowRankChronos2Config, LowRankChronosBoltConfig
from .modeling_lowrank_layers import (
    LatentAttention,
    LowRankAttention,
    LowRankFeedForward,
    PerHeadAttention,
    RMSNorm,
    Sublayer,
    attention_class,
    is_matrix,
    masked,
)
from .modeling_lowrank_quantized import KeepsIntegers
from .modeling_lowrank_stack import LowRankT5PreTrainedModel, Placed, build_stacks, initialize


class LowRankChronosBoltModelForForecasting(LowRankT5PreTrainedModel, ChronosBoltModelForForecasting):
    """Chronos-Bolt on low-rank T5 stacks; see `chronos.chronos_bolt.ChronosBoltModelForForecasting`."""

    config_class = LowRankChronosBoltConfig  # type: ignore[assignment]
    config: LowRankChronosBoltConfig
    main_input_name = "context"  # stock says `input_ids`, which it does not have
    _input_embed_layer = "shared"  # stock does not say, and peft asks
    _keys_to_ignore_on_load_missing = None  # stock hides its patch embeddings here

    @classmethod
    def is_custom_code(cls) -> bool:
        # Custom code is initialised module by module, and chronos' rules for its residual blocks, which own no parameter
        # directly, would not run. All rules here use `transformers.initialization`, which keeps what was loaded.
        return False

    def __init__(self, config: LowRankChronosBoltConfig) -> None:
        # The stock __init__ makes two dense stacks, which not every version of transformers lets have the attention of ours.
        PreTrainedModel.__init__(self, config)
        self.model_dim = config.d_model
        self.chronos_config = settings = ChronosBoltConfig(**config.chronos_config)
        if settings.use_reg_token:
            config.reg_token_id = 1
        config.vocab_size = 2 if settings.use_reg_token else 1  # the decoder's start, and the REG token
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.input_patch_embedding = self._residual_block(2 * settings.input_patch_size, config.d_model)
        self.patch = Patch(patch_size=settings.input_patch_size, patch_stride=settings.input_patch_stride)
        self.instance_norm = InstanceNorm()
        build_stacks(self, config)
        self.decoder.config.use_cache = False  # it has one token
        self.num_quantiles = len(settings.quantiles)
        self.register_buffer("quantiles", torch.tensor(settings.quantiles, dtype=self.dtype), persistent=False)
        self.output_patch_embedding = self._residual_block(
            config.d_model, self.num_quantiles * settings.prediction_length
        )
        self.quantize_modules()
        self.post_init()

    def _residual_block(self, in_features: int, out_features: int) -> ResidualBlock:
        config = self.config
        sizes = {"in_dim": in_features, "h_dim": config.d_ff, "out_dim": out_features}
        return ResidualBlock(**sizes, act_fn_name=config.dense_act_fn, dropout_p=config.dropout_rate)


# --- Chronos-2 -----------------------------------------------------------------------------------------------------


# The groups of each size, (G, M) indices of series, and what is added to their logits, (G S, 1, 1, M).
Groups = list[tuple[torch.Tensor, torch.Tensor]]

PART_TOKENS = 1280  # that go through the layers together on a CPU: what a layer makes of them stays in its caches


def parts_by_group(group_ids: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """The series of a batch, `group_ids` (B,), in parts of whole groups: of up to `size` series, or of one larger group."""
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    lengths: list[int] = []
    for members in sizes.tolist():
        if lengths and lengths[-1] + members <= size:
            lengths[-1] += members
        else:
            lengths.append(members)
    return group.argsort(stable=True).split(lengths)


def groups_by_size(group_ids: torch.Tensor, attention_mask: torch.Tensor, dtype: torch.dtype) -> Groups:
    """The series of a batch by their groups, `group_ids` (B,), a series in a patch being seen where `attention_mask` (B, S) is true."""
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    together = group.argsort(stable=True)
    size_of = sizes[group[together]]
    groups = []
    for size in sizes.unique().tolist():
        members = together[size_of == size].view(-1, size)
        is_seen = attention_mask[members].transpose(1, 2).flatten(0, 1)  # (G S, M)
        groups.append((members, masked(is_seen.new_zeros((), dtype=dtype), is_seen[:, None, None])))
    return groups


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a matrix whose weight is there to be read: no hook would see the call or fetch the weight."""
    is_hooked = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    return is_matrix(module) and not is_hooked and not module.weight.is_meta


class GroupAttention(LowRankAttention):
    """Attention without order, between the series of a group: softmax(q . k). A form comes after it among the bases."""

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(S, B, d) and what is added to the logits, (S, 1, B, B) -> the output (S, B, d) and the weights (S, n, B, B)."""
        key, value = self.project_key_value(hidden_states)
        value = self.cached_value(key, value)
        query = self.project_query(hidden_states)
        mixed, weights = self.attend(query, key, value, mask, output_attentions=output_attentions)
        return self.project_output(mixed.flatten(2)), weights

    def alone(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, d) -> (B, S, d), of series that are groups of their own: softmax over one is 1, whatever the query and the key."""
        raise NotImplementedError

    def within(self, hidden_states: torch.Tensor, groups: Groups) -> torch.Tensor:
        """(B, S, d) -> (B, S, d): what `forward` gives wherever a patch has a value, looking at no pair of series of two groups.

        Time and memory are linear in the number of groups, where the mask over the whole batch makes both quadratic. (Of a patch in which
        no series of the group has a value `forward` makes the mean over the batch. No other patch sees it.)
        """
        if all(members.shape[1] == 1 for members, _ in groups):
            return self.alone(hidden_states)
        output = torch.empty_like(hidden_states)
        for members, mask in groups:
            states = hidden_states[members]  # (G, M, S, d)
            if members.shape[1] == 1:
                found = self.alone(states[:, 0])[:, None]
            else:
                by_patch = states.transpose(1, 2)  # (G, S, M, d)
                found, _ = self(by_patch.flatten(0, 1), mask)
                found = found.view_as(by_patch).transpose(1, 2)
            output[members] = found.to(output.dtype)
        return output


class PerHeadGroupAttention(GroupAttention, PerHeadAttention):
    """Group attention with smaller heads."""

    def alone(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and is_plain(self.v) and is_plain(self.o):
            # Where heads are large, W_o W_v is the smaller matrix, and made sooner than two are multiplied with many tokens.
            inner, tokens = self.o.in_features, hidden_states.numel() // self.d_model
            if tokens * (2 * inner - self.d_model) > self.d_model * inner:
                return nn.functional.linear(hidden_states, self.o.weight @ self.v.weight)
        return self.o(self.v(hidden_states))


class LatentGroupAttention(GroupAttention, LatentAttention):
    """Group attention, all heads on one latent a token."""

    def alone(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.project_output(self.latent(hidden_states).repeat(1, 1, self.n_heads))


class TimeAttention(PerHeadAttention):
    """Attention between the patches of a series, with smaller heads and rotary embeddings.

    Component i and component i + d_kv / 2 of a dense head turn together, at frequency i. Head h keeps the frequencies
    `pairs[h]` (qk / 2 of them, in any order) and lays its queries and keys out as [first components | second components].
    """

    pairs: torch.Tensor

    def __init__(self, config: LowRankChronos2Config, *, qk: int, vo: int) -> None:
        super().__init__(config, qk=qk, vo=vo)
        self.register_buffer("pairs", self.default_pairs(qk // 2))

    def default_pairs(self, count: int, device: torch.device | None = None) -> torch.Tensor:
        """(n, count): `count` of the frequencies, evenly spread from the fastest; at full rank all, in order."""
        frequencies = torch.arange(count, device=device) * (self.config.d_kv // 2) // count
        return frequencies.repeat(self.n_heads, 1)

    def validate_pairs(self, name: str) -> None:
        """Raise ValueError where the frequencies of a head are not different integers in [0, d_kv / 2)."""
        count = self.config.d_kv // 2
        for head, kept in enumerate(self.pairs.tolist()):
            if len(set(kept)) < len(kept) or not all(0 <= pair < count for pair in kept):
                raise ValueError(f"{name}[{head}] must hold different integers in [0, {count}), found {kept!r:.80}.")

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries or keys (B, n, S, qk) turned by the angles of their positions, (1 or B, S, d_kv / 2)."""
        kept = torch.cat([self.pairs, self.pairs], dim=-1)  # (n, qk)
        cos, sin = (turn[..., kept].transpose(1, 2) for turn in (cos, sin))  # (1 or B, n, S, qk)
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-second, first], dim=-1) * sin

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, d), what is added to the logits, (B, 1, 1, S), and `rotary_turns` -> (B, S, d) and the weights (B, n, S, S)."""
        key, value = self.project_key_value(hidden_states)
        query, key = (self.rotate(states, *turns) for states in (self.project_query(hidden_states), key))
        mixed, weights = self.attend(query, key, value, mask, output_attentions=output_attentions)
        return self.project_output(mixed.flatten(2)), weights


def rotary_turns(
    position_ids: torch.Tensor, config: LowRankChronos2Config, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position x theta^(-2 i / d_kv), (1 or B, S, d_kv / 2), computed in float32 (arXiv 2104.09864, section 3.2.2)."""
    exponents = torch.arange(0, config.d_kv, 2, device=position_ids.device).float() / config.d_kv
    angles = position_ids[..., None].float() * (1.0 / config.rope_theta**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class TimeSelfAttention(Sublayer):
    """x + attention(norm(x)) along the patches of a series."""

    def __init__(self, config: LowRankChronos2Config, ranks: dict[str, Any]) -> None:
        super().__init__(config)
        self.self_attention = TimeAttention(config, **ranks)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = self.self_attention(
            self.layer_norm(hidden_states), mask, turns, output_attentions=output_attentions
        )
        return hidden_states + self.dropout(output), weights


class GroupSelfAttention(Sublayer):
    """x + attention(norm(x)) across the series of a group, at every patch."""

    def __init__(self, config: LowRankChronos2Config, ranks: dict[str, Any]) -> None:
        super().__init__(config)
        self.self_attention = attention_class(ranks, PerHeadGroupAttention, LatentGroupAttention)(config, **ranks)

    def forward(
        self, hidden_states: torch.Tensor, groups: torch.Tensor | Groups, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, d), and the groups, or what is added to the logits of the whole batch, (S, 1, B, B) -> (B, S, d) and the weights."""
        if not torch.is_tensor(groups):
            output = self.self_attention.within(self.layer_norm(hidden_states), groups)
            return hidden_states + self.dropout(output), None
        hidden_states = hidden_states.transpose(0, 1)
        output, weights = self.self_attention(
            self.layer_norm(hidden_states), groups, output_attentions=output_attentions
        )
        return (hidden_states + self.dropout(output)).transpose(0, 1), weights


class FeedForward(Sublayer):
    """x + feed_forward(norm(x))"""

    def __init__(self, config: LowRankChronos2Config, ranks: dict[str, Any]) -> None:
        super().__init__(config)
        self.mlp = LowRankFeedForward(config, **ranks)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.dropout(self.mlp(self.layer_norm(hidden_states)))


class LowRankChronos2Block(nn.Module):
    """Time attention, group attention, feed-forward."""

    def __init__(self, config: LowRankChronos2Config, index: int) -> None:
        super().__init__()
        attention, feed_forward = config.attention_ranks, config.feed_forward_ranks
        self.layer = nn.ModuleList(
            [
                TimeSelfAttention(config, attention["time"][index]),
                GroupSelfAttention(config, attention["group"][index]),
                FeedForward(config, feed_forward["encoder"][index]),
            ]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        time_mask: torch.Tensor,
        groups: torch.Tensor | Groups,
        turns: tuple[torch.Tensor, torch.Tensor],
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The hidden states (B, S, d), and the weights of time and of group attention."""
        hidden_states, time_weights = self.layer[0](hidden_states, time_mask, turns, output_attentions)
        hidden_states, group_weights = self.layer[1](hidden_states, groups, output_attentions)
        return self.layer[2](hidden_states), time_weights, group_weights


@dataclass
class LowRankChronos2EncoderOutput(ModelOutput):
    """With the names that chronos reads."""

    last_hidden_state: torch.Tensor | None = None
    all_time_self_attn_weights: tuple[torch.Tensor, ...] | None = None
    all_group_self_attn_weights: tuple[torch.Tensor, ...] | None = None


class LowRankChronos2Encoder(nn.Module):
    """The encoder of Chronos-2 with the layers that its `LowRankChronos2Config` describes.

    Attributes:
        by_group: Whether group attention is computed inside each group alone, for the same forecasts sooner; a series that is a group of
            its own then calls neither `q` nor `k`. `LowRankChronos2Pipeline` sets it while it forecasts. Not in training, nor where weights
            are asked for, or the model is compiled or exported.
    """

    def __init__(self, config: LowRankChronos2Config) -> None:
        super().__init__()
        self.config = config
        self.by_group = False
        self.block = nn.ModuleList([LowRankChronos2Block(config, index) for index in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        *,
        group_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> LowRankChronos2EncoderOutput:
        """`inputs_embeds` (B, S, d), `group_ids` (B,), `attention_mask` (B, S), not zero where a patch has a value."""
        (batch, length), device = inputs_embeds.shape[:2], inputs_embeds.device
        if position_ids is None:
            position_ids = torch.arange(length, device=device)[None]
        if attention_mask is None:
            attention_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        attention_mask = attention_mask.bool()
        by_group = self.by_group and not (self.training or output_attentions or torch.compiler.is_compiling())
        if by_group and device.type == "cpu" and batch * length > PART_TOKENS:
            parts = parts_by_group(group_ids, max(1, PART_TOKENS // length))
            if len(parts) > 1:
                return self._in_parts(parts, inputs_embeds, group_ids, attention_mask, position_ids)
        nothing = inputs_embeds.new_zeros(())
        time_mask = masked(nothing, attention_mask[:, None, None])
        # A series attends to those of its group that have a value in the patch.
        groups: torch.Tensor | Groups
        if by_group:
            groups = groups_by_size(group_ids, attention_mask, inputs_embeds.dtype)
        else:
            same_group = group_ids[:, None] == group_ids[None, :]
            groups = masked(nothing, same_group & attention_mask.T[:, None, None])  # (S, 1, B, B)
        turns = rotary_turns(position_ids, self.config, inputs_embeds.dtype)

        hidden_states = self.dropout(inputs_embeds)
        time_weights, group_weights = [], []
        for block in self.block:
            hidden_states, *weights = block(hidden_states, time_mask, groups, turns, output_attentions)
            time_weights.append(weights[0])
            group_weights.append(weights[1])
        hidden_states = self.dropout(self.final_layer_norm(hidden_states))
        return LowRankChronos2EncoderOutput(
            last_hidden_state=hidden_states,
            all_time_self_attn_weights=tuple(time_weights) if output_attentions else (),
            all_group_self_attn_weights=tuple(group_weights) if output_attentions else (),
        )

    def _in_parts(
        self,
        parts: tuple[torch.Tensor, ...],
        inputs_embeds: torch.Tensor,
        group_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> LowRankChronos2EncoderOutput:
        """The whole batch, one part after the other, each of which is none to be parted further."""
        last = torch.empty_like(inputs_embeds)
        for part in parts:
            last[part] = self.forward(
                inputs_embeds[part],
                group_ids=group_ids[part],
                attention_mask=attention_mask[part],
                position_ids=position_ids if len(position_ids) == 1 else position_ids[part],
            ).last_hidden_state
        return LowRankChronos2EncoderOutput(last, all_time_self_attn_weights=(), all_group_self_attn_weights=())


class LowRankChronos2Model(ChecksItsWeights, KeepsIntegers, Placed, Chronos2Model):
    """Chronos-2 on a low-rank encoder; see `chronos.Chronos2Model`."""

    config_class = LowRankChronos2Config
    config: LowRankChronos2Config
    main_input_name = "context"  # stock says `input_ids`, which it does not have
    _no_split_modules = ["LowRankChronos2Block"]  # noqa: RUF012

    @classmethod
    def is_custom_code(cls) -> bool:
        # As for Chronos-Bolt. Stock Chronos-2 loses its rules this way, and all its fresh matrices have the standard deviation
        # `initializer_factor`.
        return False

    def post_init(self) -> None:
        # The stock __init__ ends here, its dense encoder built (without memory when loading: on the meta device).
        self.encoder = LowRankChronos2Encoder(self.config)
        # A dense checkpoint is a full-rank one: that it names no frequencies, when all are kept, is nothing to warn of.
        self._keys_to_ignore_on_load_missing = [
            rf"^encoder\.block\.{index}\.layer\.0\.self_attention\.pairs$"
            for index, ranks in enumerate(self.config.attention_ranks["time"])
            if ranks["qk"] == self.config.d_kv
        ]
        self.quantize_modules()
        super().post_init()

    def validate_weights(self) -> None:
        """Raise ValueError where a head is to keep a frequency that there is not, or one twice."""
        for name, module in self.named_modules():
            if isinstance(module, TimeAttention) and not module.pairs.is_meta:
                module.validate_pairs(f"{name}.pairs")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TimeAttention):
            init.copy_(module.pairs, module.default_pairs(module.pairs.shape[1], module.pairs.device))
        elif not initialize(self, module):
            super()._init_weights(module)


__all__ = ["LowRankChronos2Model", "LowRankChronosBoltModelForForecasting"]
