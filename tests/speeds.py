"""A machine on which every feature of a layer takes a second: predictions that a test can count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_lowrank import LowRankT5Config
from hf_lowrank.compression.latency import Speed
from hf_lowrank.timing import Case

ATTENTION = ("encoder_self", "decoder_self", "cross")
FEED_FORWARD = ("encoder_feed_forward", "decoder_feed_forward")
FEATURES = {"even": 3, "uneven": 3, "latent": 5, "feed_forward": 3}
WORKLOAD = Case(batch_size=2, context_length=10, prediction_length=3, num_samples=2)


def invented(fixed: float = 5.0, **changes: Any) -> Speed:
    """Coefficients of one for everything, of the layers of T5 and Chronos-Bolt."""
    coefficients = {
        kind: {form: (1.0,) * FEATURES[form] for form in ("even", "uneven", "latent")} for kind in ATTENTION
    }
    coefficients |= {kind: {"feed_forward": (1.0,) * 3} for kind in FEED_FORWARD}
    config = LowRankT5Config(d_model=16, num_heads=2)
    return replace(Speed(WORKLOAD, "torch", "cpu", "float32", 1, config, fixed, coefficients), **changes)
