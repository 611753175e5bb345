"""Tiny Chronos-Bolt and Chronos-2 models, dense and low-rank, and the shapes of the published ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from chronos.chronos2 import Chronos2CoreConfig, Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from conftest import SHAPE
from transformers import PreTrainedModel, T5Config

from hf_lowrank import (
    LowRankChronos2Config,
    LowRankChronos2Model,
    LowRankChronosBoltConfig,
    LowRankChronosBoltModelForForecasting,
)

DECILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
D_MODEL, D_KV, D_FF, HEADS = (SHAPE[name] for name in ("d_model", "d_kv", "d_ff", "num_heads"))

BOLT = {
    **{name: value for name, value in SHAPE.items() if name != "vocab_size"},  # Chronos-Bolt sets its own
    "tie_word_embeddings": False,
    "chronos_config": {
        "context_length": 40,
        "prediction_length": 6,
        "input_patch_size": 5,
        "input_patch_stride": 5,
        "quantiles": DECILES,
        "use_reg_token": True,
    },
}
CHRONOS2 = {
    "d_model": D_MODEL,
    "d_kv": D_KV,
    "d_ff": D_FF,
    "num_heads": HEADS,
    "num_layers": 2,
    "dropout_rate": 0.0,
    "chronos_config": {
        "context_length": 40,
        "input_patch_size": 5,
        "input_patch_stride": 5,
        "output_patch_size": 5,
        "max_output_patches": 3,
        "quantiles": [0.01, *DECILES, 0.99],
        "use_arcsinh": True,
        "use_reg_token": True,
    },
}
# Every form: per head, latent with and without each sketch, thin factors.
BOLT_RANKS = {
    "attention_ranks": {
        "encoder_self": [{"qk": 3, "vo": 5}, {"latent": 4, "query": None, "output": 3}],
        "decoder_self": [{"latent": 5, "query": 4, "output": None}, {"qk": 2, "vo": 8}, {"qk": 8, "vo": 8}],
        "cross": [{"latent": 6, "query": 3, "output": 4}, {"qk": 4, "vo": 2}, {"qk": 8, "vo": 8}],
    },
    "feed_forward_ranks": {
        "encoder": [{"width": 24, "wi": None, "wo": 3}, {"width": 9, "wi": 4, "wo": None}],
        "decoder": [{"width": 20, "wi": 5, "wo": 4}] + [{"width": 24, "wi": None, "wo": None}] * 2,
    },
}
CHRONOS2_RANKS = {
    "attention_ranks": {
        "time": [{"qk": 4, "vo": 3}, {"qk": 6, "vo": 8}],
        "group": [{"qk": 3, "vo": 5}, {"latent": 5, "query": 4, "output": None}],
    },
    "feed_forward_ranks": {"encoder": [{"width": 24, "wi": None, "wo": 3}, {"width": 9, "wi": 4, "wo": None}]},
}

# config.json of amazon/chronos-bolt-* and amazon/chronos-2, as published.
PUBLISHED = {
    f"chronos-bolt-{name}": {
        "architectures": ["ChronosBoltModelForForecasting"],
        "chronos_config": {
            "context_length": 2048,
            "input_patch_size": 16,
            "input_patch_stride": 16,
            "prediction_length": 64,
            "quantiles": DECILES,
            "use_reg_token": True,
        },
        "chronos_pipeline_class": "ChronosBoltPipeline",
        "classifier_dropout": 0.0,
        "d_ff": d_ff,
        "d_kv": 64,
        "d_model": d_model,
        "decoder_start_token_id": 0,
        "dense_act_fn": "relu",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "relu",
        "initializer_factor": 0.05,
        "is_encoder_decoder": True,
        "is_gated_act": False,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "num_layers": layers,
        "pad_token_id": 0,
        "reg_token_id": 1,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "use_cache": True,
        "vocab_size": 2,
    }
    for name, d_model, d_ff, layers, heads in [
        ("tiny", 256, 1024, 4, 4),
        ("mini", 384, 1536, 4, 8),
        ("small", 512, 2048, 6, 8),
        ("base", 768, 3072, 12, 12),
    ]
} | {
    "chronos-2": {
        "architectures": ["Chronos2Model"],
        "chronos_config": {
            "context_length": 8192,
            "input_patch_size": 16,
            "input_patch_stride": 16,
            "max_output_patches": 64,
            "output_patch_size": 16,
            "quantiles": [0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99],
            "time_encoding_scale": 8192,
            "use_arcsinh": True,
            "use_reg_token": True,
        },
        "chronos_pipeline_class": "Chronos2Pipeline",
        "d_ff": 3072,
        "d_kv": 64,
        "d_model": 768,
        "dense_act_fn": "relu",
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
        "initializer_factor": 0.05,
        "is_gated_act": False,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_heads": 12,
        "num_layers": 12,
        "pad_token_id": 0,
        "reg_token_id": 1,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "transformers_version": "4.53.0",
        "vocab_size": 2,
    },
}


def shape(family: dict[str, Any], chronos: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A copy of `BOLT` or `CHRONOS2` with changes, those of its `chronos_config` in `chronos`."""
    arguments = copy.deepcopy({**family, **changes})
    arguments["chronos_config"] |= chronos or {}
    return arguments


def alive(model: PreTrainedModel) -> PreTrainedModel:
    """Weights like a trained model's: every layer matters, and no head keeps the same rotary frequencies as another."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
        for name, pairs in model.named_buffers():
            if name.endswith("pairs") and pairs.shape[1] < D_KV // 2:
                order = torch.randperm(D_KV // 2)
                pairs.copy_(torch.stack([order.roll(head) for head in range(len(pairs))])[:, : pairs.shape[1]])
    return model.eval()


def dense_bolt(**changes: Any) -> ChronosBoltModelForForecasting:
    return alive(ChronosBoltModelForForecasting(T5Config(**shape(BOLT, **changes))))


def dense_chronos2(**changes: Any) -> Chronos2Model:
    return alive(Chronos2Model(Chronos2CoreConfig(**shape(CHRONOS2, **changes))))


def bolt(**changes: Any) -> LowRankChronosBoltModelForForecasting:
    return alive(LowRankChronosBoltModelForForecasting(LowRankChronosBoltConfig(**shape(BOLT, **changes))))


def chronos2(**changes: Any) -> LowRankChronos2Model:
    return alive(LowRankChronos2Model(LowRankChronos2Config(**shape(CHRONOS2, **changes))))


def full_rank(dense: PreTrainedModel, implementation: str | None = None) -> PreTrainedModel:
    """The low-rank model with the dense one's weights at full rank, and its attention implementation or another."""
    arguments = copy.deepcopy(dense.config.to_dict())
    arguments["attn_implementation"] = implementation or dense.config._attn_implementation
    if isinstance(dense, Chronos2Model):
        model = LowRankChronos2Model(LowRankChronos2Config(**arguments))
        missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
        assert not unexpected
        assert missing == [f"encoder.block.{i}.layer.0.self_attention.pairs" for i in range(len(model.encoder.block))]
    else:
        model = LowRankChronosBoltModelForForecasting(LowRankChronosBoltConfig(**arguments))
        model.load_state_dict(dense.state_dict())
    return model.eval()


def series() -> torch.Tensor:
    """(6, 43) with a late start, gaps, a whole missing patch, an all-missing series and a constant one."""
    context = torch.randn(6, 43).cumsum(dim=-1)
    context[0, :20] = torch.nan
    context[1, torch.rand(43) < 0.3] = torch.nan
    context[2, 13:28] = torch.nan
    context[3] = torch.nan
    context[4] = 7.0
    return context
