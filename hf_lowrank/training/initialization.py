"""Chronos models that a short training can teach: where the weights of fresh ones begin, and finer positions for others.

A transformer of this size, trained for minutes rather than days, spends most of its time on what is known beforehand: the order of the
4,096 bins, and that the last values of a context matter most. Both are put into the initial weights.

Those of the dense Chronos-Bolt and Chronos-2 are not what their authors' rules say: transformers 5 draws the linear layers inside a module
before the module's own rule is asked, with a deviation of `initializer_factor` whatever their width, and the rule then finds them done. The
embedding of a Bolt's patches is so eighty times as large as what the layers add to it. Here every layer has the deviation of its rule.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from chronos import ChronosConfig
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, set_seed

from ..checkpoints.families import CHRONOS2, T5, family_of
from ..models.modeling_lowrank_layers import relative_position_bucket

__all__ = ["fresh_model", "local_position_bias", "smooth_embedding", "with_position_buckets"]

QUANTILE_LAYERS = ("output_patch_embedding.output_layer", "output_patch_embedding.residual_layer")


def fresh_model(model_class: type[PreTrainedModel], config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """A Chronos model, dense or low-rank, with the initial weights that `seed` gives, in float32.

    Its family's rules, but for the token embeddings (`smooth_embedding`), the relative position bias (`local_position_bias`), and
    quantiles that begin near the mean of the context.
    """
    set_seed(seed)
    model = model_class(config)
    family = family_of(model_class)
    if family is not T5:
        _scale_by_width(model)
    if family is CHRONOS2:
        return model
    stacks = [model.encoder]
    if family is T5:
        stacks.append(model.decoder)
        chronos_config = ChronosConfig(**config.chronos_config)
        with torch.no_grad():
            model.shared.weight.copy_(smooth_embedding(chronos_config, config.d_model, seed))
        model.generation_config = GenerationConfig(
            decoder_start_token_id=config.decoder_start_token_id,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
        )
    else:  # a Bolt's decoder has one token and nowhere to look
        assert isinstance(model, ChronosBoltModelForForecasting)
    with torch.no_grad():
        for stack in stacks:
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
            furthest = config.relative_attention_max_distance
            buckets, heads = bias.weight.shape
            is_decoder = stack is not model.encoder
            bias.weight.copy_(local_position_bias(buckets, heads, furthest, is_decoder=is_decoder))
    return model


@torch.no_grad()
def _scale_by_width(model: PreTrainedModel) -> None:
    """Give every linear layer of a Chronos-Bolt or Chronos-2 the deviation of its rule, those that make the quantiles a tenth of it.

    For a layer of n inputs that is n^-1/2, for queries also d_kv^-1/2 in place of a scale before the softmax. Low-rank layers have their own.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or hasattr(module, "initial_std"):
            continue
        deviation = module.in_features**-0.5
        if name.endswith(".q"):
            deviation *= model.config.d_kv**-0.5
        if name in QUANTILE_LAYERS:
            deviation *= 0.1
        module.weight.normal_(0.0, deviation)


def smooth_embedding(chronos_config: ChronosConfig, d_model: int, seed: int) -> torch.Tensor:
    """Initial token embeddings, float32 of shape (n_tokens, d_model): nearby bins start out alike.

    Random Fourier features of the bin's centre with frequencies from one cycle over the whole range to one over
    a few bins. The order of the bins is known; a short training run should not have to find it out.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer: Any = chronos_config.create_tokenizer()
    frequency = torch.exp(torch.empty(d_model).uniform_(math.log(0.2), math.log(200.0), generator=generator))
    phase = torch.empty(d_model).uniform_(0, 2 * math.pi, generator=generator)
    embedding = torch.randn(chronos_config.n_tokens, d_model, generator=generator)
    first_bin = chronos_config.n_special_tokens + 1  # tokenizer.output_transform's own offset
    embedding[first_bin:] = math.sqrt(2) * torch.cos(tokenizer.centers[:, None] * frequency + phase)
    return embedding


def local_position_bias(buckets: int, heads: int, furthest: int, *, is_decoder: bool) -> torch.Tensor:
    """An initial relative position bias, float32 of shape (buckets, heads), with which heads begin to look somewhere.

    `furthest` is the distance from which on all have one bucket.

    In turns: the step before, the step after (in the decoder, the step itself), the near past and future, everywhere. Left at T5's
    near-zero start, the bias moves by a learning rate a step, and a short run never learns to read the last value of a context.
    """
    distance = torch.arange(-furthest, 1 if is_decoder else furthest + 1)
    bucket = relative_position_bucket(
        distance, bidirectional=not is_decoder, num_buckets=buckets, max_distance=furthest
    )
    centre = torch.stack([distance[bucket == i].float().mean().nan_to_num(-999.0) for i in range(buckets)])
    ahead = 0 if is_decoder else 1
    shapes = [4.0 * (centre == -1), 4.0 * (centre == ahead), 3.0 - 0.5 * centre.abs().clamp(max=12), 0.0 * centre]
    return torch.stack([shapes[head % len(shapes)] for head in range(heads)], dim=1)


@torch.no_grad()
def with_position_buckets(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A Chronos-T5 or Bolt with the buckets of relative position that `config` has in place of its own, and else the weights it has.

    A new bucket begins with the mean of what the model adds to the logits at its distances. Where those all shared one bucket before, which
    of finer buckets is true of nearly all, nothing changes.

    Returns:
        A new model of the same class, in the dtype of the given one.
    """
    far = 2 * max(config.relative_attention_max_distance, model.config.relative_attention_max_distance)
    weights = model.state_dict()
    for stack in ("encoder", "decoder"):
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        is_encoder = stack == "encoder"
        distance = torch.arange(-far, far + 1 if is_encoder else 1)
        old, new = (
            relative_position_bucket(
                distance,
                bidirectional=is_encoder,
                num_buckets=one.relative_attention_num_buckets,
                max_distance=one.relative_attention_max_distance,
            )
            for one in (model.config, config)
        )
        shares = torch.zeros(config.relative_attention_num_buckets, len(weights[name]))
        shares.index_put_((new, old), torch.ones(()), accumulate=True)
        shares /= shares.sum(dim=1, keepdim=True).clamp_min(1)
        weights[name] = (shares @ weights[name].float()).to(weights[name].dtype)
    changed = type(model)(config).to(model.dtype)
    changed.load_state_dict(weights)
    if model.can_generate():
        changed.generation_config = model.generation_config
    return changed.train(model.training)
