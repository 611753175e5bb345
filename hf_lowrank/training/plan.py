"""The model that settings describe: its class and configuration, its first weights, and what to expect of it before any training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from chronos.chronos2.config import Chronos2CoreConfig
from transformers import PreTrainedConfig, PreTrainedModel, T5Config

from ..checkpoints.families import BOLT, CHRONOS2, T5, Family, family_of
from ..checkpoints.published import CHRONOS_2, CHRONOS_BOLT, CHRONOS_T5, SHAPES
from ..checkpoints.summary import summarize
from ..models.checked_settings import check_settings
from ..published_figures import PRETRAINED_RATIOS
from .initialization import fresh_model, with_position_buckets
from .loaders import class_and_config, load_start
from .settings import POSITIONS, RANKS, SIZES, PretrainingSettings, check_count

__all__ = ["Plan", "initial_model", "model_of", "plan_of"]

SMALL = {"d_model": 128, "num_heads": 4, "d_kv": 32, "num_layers": 4}  # of the shipped reference-bolt
# Of a fresh model: the family, its published chronos_config, and the pipeline that loads it.
FRESH: dict[str, tuple[Family, dict[str, Any], str]] = {
    "t5": (T5, CHRONOS_T5, "ChronosPipeline"),
    "bolt": (BOLT, CHRONOS_BOLT, "ChronosBoltPipeline"),
    "chronos2": (CHRONOS2, CHRONOS_2, "Chronos2Pipeline"),
}


def model_of(settings: PretrainingSettings) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and configuration of the model that these settings describe.

    Raises:
        ValueError: The ranks do not fit the sizes, or `start` is no Chronos model.
        OSError: There is no checkpoint `start`.
    """
    if settings.start is not None:
        start_class, start_config = class_and_config(settings.start)
        return start_class, _with_positions(start_class, start_config, settings)
    name = settings.family or (settings.shape or "t5").replace("chronos-2", "chronos2").partition("-")[0]
    family, published, pipeline_class = FRESH[name]
    lengths = {"context_length": 512, "prediction_length": 64}
    for length in lengths:
        if getattr(settings, length) is not None:
            check_count(length, getattr(settings, length))
            lengths[length] = getattr(settings, length)
    # What synthetic data never do is repeat: no dropout.
    shared = _sizes(settings, family) | {
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "chronos_pipeline_class": pipeline_class,
    }
    config: PreTrainedConfig
    if family is CHRONOS2:
        chronos_config = published | _patched(lengths, published["output_patch_size"])
        # Upstream's factor of 0.05 begins near zero everywhere, and the first hundreds of steps go by with growing.
        config = Chronos2CoreConfig(**shared, initializer_factor=1.0, chronos_config=chronos_config)
    else:
        config = T5Config(
            **shared,
            vocab_size=CHRONOS_T5["n_tokens"],  # a Bolt has none
            decoder_start_token_id=0,
            eos_token_id=1,
            chronos_config=published | lengths,
        )
    model_class = next(cls for cls in family.classes if cls in family.forecasters)
    config = _with_positions(model_class, config, settings)
    ranks = {name: getattr(settings, name) for name in RANKS if getattr(settings, name) is not None}
    if not ranks:
        return model_class, config
    return family.classes[model_class], family.lowrank_config(config, **ranks)


def _patched(lengths: Mapping[str, int], patch: int) -> dict[str, int]:
    """The lengths of a Chronos-2, whose horizon counts patches."""
    if lengths["prediction_length"] % patch:
        raise ValueError(
            f"prediction_length of a Chronos-2 must be a multiple of {patch}, found {lengths['prediction_length']}."
        )
    return {"context_length": lengths["context_length"], "max_output_patches": lengths["prediction_length"] // patch}


def _with_positions(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, settings: PretrainingSettings
) -> PreTrainedConfig:
    """A configuration with the buckets of relative position that the settings give."""
    given = {name: getattr(settings, name) for name in POSITIONS if getattr(settings, name) is not None}
    if not given:
        return config
    family = family_of(model_class)
    assert family is not None
    if family is CHRONOS2:
        raise ValueError(f"{next(iter(given))}: a {family.title} has rotary positions; leave it out.")
    changed = copy.deepcopy(config)
    for name, value in given.items():
        setattr(changed, name, value)
    check_settings(changed, family.name)
    return changed


def _sizes(settings: PretrainingSettings, family: Family) -> dict[str, int]:
    if not family.has_decoder and settings.num_decoder_layers is not None:
        raise ValueError(f"num_decoder_layers: a {family.title} has no decoder; leave it out.")
    if settings.shape is not None:
        d_model, d_ff, num_layers, num_heads = SHAPES[settings.shape]
        return {"d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": num_layers, "num_heads": num_heads}
    sizes: dict[str, int] = SMALL | {
        name: getattr(settings, name) for name in SIZES if getattr(settings, name) is not None
    }
    for name, value in sizes.items():
        check_count(name, value)
    return {"d_ff": 4 * sizes["d_model"]} | sizes


def initial_model(settings: PretrainingSettings) -> PreTrainedModel:
    """The model in float32, before the first step; see `model_of` for the errors."""
    model_class, config = model_of(settings)
    if settings.start is None:
        return fresh_model(model_class, config, seed=settings.seed)
    model = load_start(settings.start)
    # What a dense Chronos-2 is saved with says T5, and has buckets that the model has not.
    if any(getattr(settings, name) not in (None, getattr(model.config, name, None)) for name in POSITIONS):
        model = with_position_buckets(model, config)
    return model


@dataclass(frozen=True)
class Plan:
    """What a run will train: the model's class, its size, its ranks, and what the paper reports for the same schedule."""

    model: str
    parameters: int
    attention_ranks: dict[str, list[dict[str, Any]]] | None = None
    attention_ratio: float | None = None  # of the dense model's attention parameters
    paper_ratio: float | None = None

    @property
    def text(self) -> str:
        """The plan in some lines for people."""
        lines = [f"{self.model}, {self.parameters:,} parameters"]
        for kind, entries in (self.attention_ranks or {}).items():
            lines.append(f"  {kind}: " + ", ".join(_rank_text(entry) for entry in entries))
        if self.attention_ratio is not None:
            paper = (
                "" if self.paper_ratio is None else f" (the paper reports {self.paper_ratio:.1%} for this schedule)"
            )
            lines.append(f"attention: {self.attention_ratio:.1%} of the dense model's{paper}")
        return "\n".join(lines)


def _rank_text(entry: Mapping[str, Any]) -> str:
    if set(entry) == {"qk", "vo"}:
        return str(entry["qk"]) if entry["qk"] == entry["vo"] else f"{entry['qk']}/{entry['vo']}"
    return f"latent {entry['latent']}"


def plan_of(settings: PretrainingSettings) -> Plan:
    """What these settings will train; see `model_of` for the errors."""
    model_class, config = model_of(settings)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (TypeError, AttributeError, KeyError) as error:  # settings that are checked nowhere
        raise ValueError(f"no {model_class.__name__} can be made of these settings ({error}).") from error
    if not hasattr(config, "attention_ranks"):
        return Plan(model_class.__name__, model.num_parameters())
    schedule = (config.compression or {}).get("arguments") or {}
    return Plan(
        model_class.__name__,
        model.num_parameters(),
        config.attention_ranks,
        summarize(config).attention_ratio,
        PRETRAINED_RATIOS.get((schedule.get("base_rank", 0.0), schedule.get("rank_growth", 0.0))),
    )
