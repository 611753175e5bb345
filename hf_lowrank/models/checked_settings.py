"""The settings of a configuration that a damaged or hand-written config.json may have wrong: what each must be.

transformers checks some types and no ranges. Whatever passes here either fits the weights, which loading checks, or is as good as any.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers.activations import ACT2FN

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Number:
    """A finite number between two others."""

    low: float
    high: float = math.inf
    is_integer: bool = True
    is_open: bool = False  # `low` itself is not allowed

    def allows(self, value: Any) -> bool:
        """Whether a value is one."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_integer else (int, float)):
            return False
        # An integer may be larger than any float.
        is_above = self.low < value if self.is_open else self.low <= value
        return is_above and value <= min(self.high, sys.float_info.max)

    def __str__(self) -> str:
        kind = "an integer" if self.is_integer else "a number"
        high = "infinity)" if self.high == math.inf else f"{self.high:.15g}]"
        return f"{kind} in {'(' if self.is_open else '['}{self.low:.15g}, {high}"


@dataclass(frozen=True)
class OneOf:
    """One of some values, of the same type."""

    values: tuple[Any, ...]

    def allows(self, value: Any) -> bool:
        """Whether a value is one."""
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)

    def __str__(self) -> str:
        return " or ".join(map(repr, self.values))


class Levels:
    """Quantile levels."""

    def allows(self, value: Any) -> bool:
        """Whether a value is a list of them."""
        level = Number(0, 1, is_integer=False, is_open=True)
        return (
            isinstance(value, (list, tuple))
            and len(value) > 0
            and all(level.allows(entry) and entry < 1 for entry in value)
            and list(value) == sorted(set(value))
        )

    def __str__(self) -> str:
        return "a list of increasing numbers between 0 and 1"


Rule = Number | OneOf | Levels

COUNT, LENGTH = Number(1, 2**24), Number(1, 2**24)
FLAG = OneOf((True, False))
SIZES = ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size")
SHARED: dict[str, Rule] = {
    **dict.fromkeys(SIZES, COUNT),
    "num_layers": Number(1, MOST_LAYERS),  # a damaged file would fill the memory with tables
    "num_decoder_layers": Number(1, MOST_LAYERS),
    "relative_attention_num_buckets": Number(4, 2**24),
    "relative_attention_max_distance": Number(2, 2**24),
    "layer_norm_epsilon": Number(0, 1, is_integer=False),
    "dropout_rate": Number(0, 1, is_integer=False),
    "initializer_factor": Number(0, is_integer=False),
    "rope_theta": Number(0, is_integer=False, is_open=True),
    "is_gated_act": FLAG,
    "scale_decoder_outputs": FLAG,
}
PATCHED: dict[str, Rule] = {
    "context_length": LENGTH,
    "input_patch_size": LENGTH,
    "input_patch_stride": LENGTH,
    "quantiles": Levels(),
    "use_reg_token": FLAG,
}
# Those of `chronos_config`, by family, and which of them chronos has a default for.
OF_CHRONOS: dict[str, dict[str, Rule]] = {
    "t5": {
        "context_length": LENGTH,
        "prediction_length": LENGTH,
        "n_tokens": Number(4, 2**24),
        "n_special_tokens": Number(1, 2**24),
        "pad_token_id": Number(0),
        "eos_token_id": Number(0),
        "use_eos_token": FLAG,
        "model_type": OneOf(("seq2seq",)),
        "num_samples": LENGTH,
        "temperature": Number(0, is_integer=False, is_open=True),
        "top_k": Number(0),
        "top_p": Number(0, 1, is_integer=False),
    },
    "bolt": PATCHED | {"prediction_length": LENGTH},
    "chronos2": PATCHED
    | {
        "output_patch_size": LENGTH,
        "max_output_patches": LENGTH,
        "use_arcsinh": FLAG,
        "time_encoding_scale": Number(0, 2**24, is_open=True),
    },
}
OPTIONAL = {"use_reg_token", "use_arcsinh", "max_output_patches", "time_encoding_scale"}


def check_settings(config: Any, family: str) -> None:
    """Raise ValueError for the first setting of a configuration that no model of its family can have, naming it.

    Args:
        config: Dense or low-rank.
        family: `"t5"`, `"bolt"` or `"chronos2"`.
    """
    for name, rule in SHARED.items():
        if hasattr(config, name):
            check_value(name, getattr(config, name), rule)
    buckets = getattr(config, "relative_attention_num_buckets", 0)
    distance = getattr(config, "relative_attention_max_distance", math.inf)
    if distance <= buckets // 2:
        raise ValueError(
            f"relative_attention_max_distance must be above half of relative_attention_num_buckets, {buckets}, found {distance}."
        )
    if not isinstance(config.dense_act_fn, str) or config.dense_act_fn not in ACT2FN:
        raise ValueError(f"feed_forward_proj must name an activation, found {config.dense_act_fn!r:.80}.")
    if family == "chronos2" and config.is_gated_act:
        raise ValueError(
            f"feed_forward_proj must be no gated one in a Chronos-2, found {config.feed_forward_proj!r:.80}."
        )
    settings = getattr(config, "chronos_config", None)
    if settings is None:
        # A low-rank Bolt or Chronos-2 always names its pipeline, and `from_dict` looks for the settings.
        if family == "t5" and (pipeline := getattr(config, "chronos_pipeline_class", None)) is not None:
            raise ValueError(f"chronos_config is missing, without which there is no {pipeline!r:.80}.")
        return
    check_chronos_settings(settings, family)
    if family == "t5" and settings["n_tokens"] > config.vocab_size:
        raise ValueError(
            f"chronos_config['n_tokens'] must be at most vocab_size, {config.vocab_size}, found {settings['n_tokens']}."
        )
    if family != "chronos2":
        limit = config.vocab_size if family == "t5" else 1 + bool(settings.get("use_reg_token"))
        for name in ("decoder_start_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            if token is not None or (family, name) == ("bolt", "decoder_start_token_id"):
                check_value(name, token, Number(0, limit - 1))


def check_chronos_settings(settings: Any, family: str) -> None:
    """Raise ValueError for the first setting in a `chronos_config` that chronos cannot forecast with, naming it."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"chronos_config must be a table of settings, found {settings!r:.80}.")
    rules = OF_CHRONOS[family]
    if missing := sorted(rules.keys() - settings.keys() - OPTIONAL):
        raise ValueError(f"chronos_config lacks {', '.join(missing)}.")
    if unknown := sorted(map(str, set(settings) - _known(family))):
        raise ValueError(f"chronos_config has settings that chronos does not know: {', '.join(unknown)[:80]}.")
    for name, rule in rules.items():
        is_default = name == "time_encoding_scale" and settings.get(name) is None
        if name in settings and not is_default:
            check_value(f"chronos_config[{name!r}]", settings[name], rule)
    if family == "t5":
        check_tokens(settings)


def _known(family: str) -> set[str]:
    """The settings that the installed chronos reads; without it those that are checked here."""
    try:
        from chronos import ChronosConfig
        from chronos.chronos2.config import Chronos2ForecastingConfig
        from chronos.chronos_bolt import ChronosBoltConfig
    except ImportError:  # a T5 on text does without
        return {*OF_CHRONOS[family], "tokenizer_class", "tokenizer_kwargs"}
    of_family = {"t5": ChronosConfig, "bolt": ChronosBoltConfig, "chronos2": Chronos2ForecastingConfig}[family]
    return {field.name for field in fields(of_family)}


def check_tokens(settings: Mapping[str, Any]) -> None:
    """Raise ValueError where the tokenizer of a Chronos-T5 cannot be made."""
    special = settings["n_special_tokens"]
    for name in ("pad_token_id", "eos_token_id"):
        check_value(f"chronos_config[{name!r}]", settings[name], Number(0, special - 1))
    if special > settings["n_tokens"] - 3:
        raise ValueError(
            f"chronos_config['n_special_tokens'] must leave at least 3 of {settings['n_tokens']} tokens for values, found {special}."
        )
    check_value("chronos_config['tokenizer_class']", settings.get("tokenizer_class"), OneOf(("MeanScaleUniformBins",)))
    limits = settings.get("tokenizer_kwargs")
    if not isinstance(limits, Mapping) or set(limits) != {"low_limit", "high_limit"}:
        raise ValueError(
            f"chronos_config['tokenizer_kwargs'] must be a table of low_limit and high_limit, found {limits!r:.80}."
        )
    for name, value in limits.items():
        check_value(f"chronos_config['tokenizer_kwargs'][{name!r}]", value, Number(-1e19, 1e19, is_integer=False))
    if limits["low_limit"] >= limits["high_limit"]:
        raise ValueError(
            f"chronos_config['tokenizer_kwargs']: low_limit must be below high_limit, found {limits!r:.80}."
        )


def check_value(name: str, value: Any, rule: Rule) -> None:
    """Raise ValueError where a rule does not allow a value."""
    if not rule.allows(value):
        raise ValueError(f"{name} must be {rule}, found {value!r:.80}.")
