"""The published Chronos architectures with random weights, dense or low-rank: for measuring speed, not for forecasting."""

from __future__ import annotations

import os
from typing import Any

import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from transformers import PreTrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from ..models.configuration_lowrank_t5 import attention_parameters
from .families import family_of
from .rank_table import FORMS

__all__ = ["HUB_IDS", "SHAPES", "build_checkpoint"]

# d_model, d_ff, layers of each stack, heads. The head dimension is always 64.
SHAPES = {
    "t5-tiny": (256, 1024, 4, 4),
    "t5-mini": (384, 1536, 4, 8),
    "t5-small": (512, 2048, 6, 8),
    "t5-base": (768, 3072, 12, 12),
    "t5-large": (1024, 4096, 24, 16),
    "bolt-tiny": (256, 1024, 4, 4),
    "bolt-mini": (384, 1536, 4, 8),
    "bolt-small": (512, 2048, 6, 8),
    "bolt-base": (768, 3072, 12, 12),
    "chronos-2": (768, 3072, 12, 12),
}
# The trained checkpoints of these shapes.
HUB_IDS = tuple(f"amazon/{shape}" if shape.startswith("chronos") else f"amazon/chronos-{shape}" for shape in SHAPES)
CHRONOS_T5 = {
    "tokenizer_class": "MeanScaleUniformBins",
    "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
    "context_length": 512,
    "prediction_length": 64,
    "n_tokens": 4096,
    "n_special_tokens": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_eos_token": True,
    "model_type": "seq2seq",
    "num_samples": 20,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
CHRONOS_BOLT = {
    "context_length": 2048,
    "prediction_length": 64,
    "input_patch_size": 16,
    "input_patch_stride": 16,
    "use_reg_token": True,
    "quantiles": [level / 10 for level in range(1, 10)],
}
CHRONOS_2 = {
    "context_length": 8192,
    "input_patch_size": 16,
    "input_patch_stride": 16,
    "output_patch_size": 16,
    "max_output_patches": 64,
    "use_arcsinh": True,
    "use_reg_token": True,
    "quantiles": [0.01, *(level / 20 for level in range(1, 20)), 0.99],
}


def build_checkpoint(
    folder: str | os.PathLike,
    shape: str,
    *,
    ratio: float | None = None,
    form: str = "per_head",
    feed_forward_ratio: float = 1.0,
    total_ratio: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Save a checkpoint of a published shape; the same arguments give the same files.

    Args:
        shape: A key of `SHAPES`.
        ratio: The share of the attention weights that is kept, in (0, 1]; None for the dense model. `per_head`: head
            dimensions of max(1, round(64 ratio)) in every layer. `latent`: latent, query and output sketch of one rank, the
            largest whose weights fit the share (at least 1). Attention with rotary embeddings has an even head dimension, and no
            latent.
        form: `"per_head"` or `"latent"`.
        feed_forward_ratio: The share of the feed-forward width that is kept, in (0, 1].
        total_ratio: In place of these: the share of attention and feed-forward weights that is kept, in (0, 1): head dimensions as of
            `ratio`, and feed-forward matrices as thin factors, as `compress_pretrained` makes them.
        dtype: Of the saved weights.
        seed: Of the random weights.

    Raises:
        ValueError: An unknown shape or form, a ratio outside (0, 1], or `total_ratio` beside another.
    """
    if total_ratio is not None and (ratio is not None or feed_forward_ratio != 1 or form != "per_head"):
        raise ValueError("total_ratio says all that ratio, feed_forward_ratio and form say: leave those out.")
    model = _random_model(
        shape, ratio if total_ratio is None else total_ratio, form, feed_forward_ratio, total_ratio, seed
    )
    model.to(dtype).save_pretrained(folder)


def _random_model(
    shape: str, ratio: float | None, form: str, feed_forward_ratio: float, total_ratio: float | None, seed: int
) -> PreTrainedModel:
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}; found {shape!r}.")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; found {form!r}.")
    for name, value in (("total_ratio", total_ratio), ("ratio", ratio), ("feed_forward_ratio", feed_forward_ratio)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], found {value}.")
    model_class, config = _dense(shape)
    family = family_of(model_class)
    assert family is not None
    if ratio is not None or feed_forward_ratio != 1:
        model_class, config = family.classes[model_class], family.lowrank_config(config)
        width, thin = max(1, round(feed_forward_ratio * config.d_ff)), None
        if total_ratio is not None:
            thin = max(1, int(total_ratio * config.d_model * config.d_ff / (config.d_model + config.d_ff)))
        config.attention_ranks = {
            kind: [_attention_entry(config, ratio or 1.0, form, is_rotary=kind in family.rotary) for _ in layers]
            for kind, layers in config.attention_ranks.items()
        }
        config.feed_forward_ranks = {
            stack: [{"width": width, "wi": thin, "wo": thin} for _ in layers]
            for stack, layers in config.feed_forward_ranks.items()
        }
        config.validate_ranks()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def _dense(shape: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The stock class and configuration of a published shape."""
    d_model, d_ff, num_layers, num_heads = SHAPES[shape]
    sizes: dict[str, Any] = {"d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": num_layers}
    sizes |= {"num_heads": num_heads, "dropout_rate": 0.0, "pad_token_id": 0}
    if shape == "chronos-2":
        settings = {"chronos_config": dict(CHRONOS_2), "chronos_pipeline_class": "Chronos2Pipeline"}
        return Chronos2Model, Chronos2CoreConfig(**sizes, **settings)
    sizes |= {"eos_token_id": 1, "decoder_start_token_id": 0}
    if shape.startswith("bolt-"):
        settings = {"chronos_config": dict(CHRONOS_BOLT), "chronos_pipeline_class": "ChronosBoltPipeline"}
        return ChronosBoltModelForForecasting, T5Config(**sizes, **settings)
    return T5ForConditionalGeneration, T5Config(
        **sizes, vocab_size=CHRONOS_T5["n_tokens"], chronos_config=dict(CHRONOS_T5)
    )


def _attention_entry(config: PreTrainedConfig, ratio: float, form: str, *, is_rotary: bool) -> dict[str, int]:
    """The ranks of an attention layer with this share of the weights."""
    if form == "per_head" or is_rotary:
        size = max(1, round(ratio * config.d_kv))
        return {"qk": size + size % 2 if is_rotary else size, "vo": size}

    def weights(entry: dict[str, int]) -> int:
        return attention_parameters(entry, d_model=config.d_model, num_heads=config.num_heads)

    budget = ratio * weights({"qk": config.d_kv, "vo": config.d_kv})
    rank = 1
    while rank < config.d_model and weights(dict.fromkeys(("latent", "query", "output"), rank + 1)) <= budget:
        rank += 1
    return dict.fromkeys(("latent", "query", "output"), rank)
