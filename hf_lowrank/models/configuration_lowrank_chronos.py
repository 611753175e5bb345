"""Chronos-Bolt and Chronos-2 configurations in which every layer has dimensions of its own."""

from __future__ import annotations

import copy
from typing import Any

try:
    from chronos import BaseChronosPipeline
    from chronos.chronos2.config import Chronos2CoreConfig
except ImportError as error:
    raise ImportError("Chronos models need the package chronos: pip install chronos-forecasting") from error

from .configuration_lowrank_t5 import (
    FULL_RANK,
    CarriesItsCode,
    LowRankT5Config,
    completed_table,
    from_schedule,
    scheduled_attention_ranks,
    validate_bits,
    validate_entry,
    validate_table,
)

# The classes join the registry of pipelines. With `trust_remote_code` this file is the first that is loaded, and
# `BaseChronosPipeline.from_pretrained` looks for the pipeline right after the configuration.
from .pipeline_lowrank_chronos import LowRankChronos2Pipeline, LowRankChronosBoltPipeline


def of_this_family(arguments: dict[str, Any], pipeline: type[BaseChronosPipeline]) -> dict[str, Any]:
    """A dense configuration's arguments without what names its own family: stock pipeline and `"model_type": "t5"`."""
    rest = {key: value for key, value in arguments.items() if key != "model_type"}
    return rest | {"chronos_pipeline_class": pipeline.__name__}


class LowRankChronosBoltConfig(LowRankT5Config):
    r"""Configuration of a Chronos-Bolt model whose layers have ranks of their own.

    Everything that [`LowRankT5Config`] has, with the same tables, and Chronos-Bolt's `chronos_config`: context length, prediction
    length, patches, quantiles, REG token. A published Chronos-Bolt configuration is accepted as it is and makes a dense model.

    Raises:
        ValueError: As for [`LowRankT5Config`].
    """

    model_type = "lowrank_chronos_bolt"
    chronos_family = "bolt"
    is_always_chronos = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**of_this_family(kwargs, LowRankChronosBoltPipeline))

    def auto_classes(self) -> dict[str, type]:
        from .modeling_lowrank_chronos import LowRankChronosBoltModelForForecasting

        return {"AutoConfig": LowRankChronosBoltConfig, "AutoModel": LowRankChronosBoltModelForForecasting}


class LowRankChronos2Config(CarriesItsCode, Chronos2CoreConfig):
    r"""Configuration of a Chronos-2 model whose layers have ranks of their own.

    Everything that Chronos-2's own configuration has, with its meaning: `d_kv` and `d_ff` remain the dense model's head dimension
    and feed-forward width, and are the largest that a layer can have. A published Chronos-2 configuration is accepted as it is and
    makes a dense model.

    Args:
        attention_ranks: For each kind of attention (`"time"`, `"group"`) a list with one entry a layer:

            - `"time"`: `{"qk": int, "vo": int}`, the head dimension of queries and keys, even and in [2, d_kv], and that of
              values and outputs, in [1, d_kv]. A head keeps qk / 2 of the d_kv / 2 rotary frequencies, each head its own.
            - `"group"`, which has no rotary embedding: the same with any `qk` in [1, d_kv], or
              `{"latent": int, "query": int | None, "output": int | None}`, all in [1, d_model]; see [`LowRankT5Config`].

            A kind left out keeps its full rank.
        feed_forward_ranks: For `"encoder"` a list with one entry a layer,
            `{"width": int, "wi": int | None, "wo": int | None}`; see [`LowRankT5Config`].
        base_rank, rank_growth, rank_rounding: In place of `attention_ranks`, for both kinds: see [`LowRankT5Config`]. The head dimension
            of a rotary layer's queries and keys is the next even number.
        weight_bits: The matrices that are kept as integers, by the names of their modules, and how many bits a number of each has, 8 or 4;
            see `modeling_lowrank_quantized`.
        compression: How the weights were made: method, policy, arguments, source, versions. A record; the model
            does not read it.

    Raises:
        ValueError: A table that does not fit the model, or both a table and `base_rank`.
    """

    model_type = "lowrank_chronos2"
    chronos_family = "chronos2"
    is_always_chronos = True

    def __init__(
        self,
        attention_ranks: dict = FULL_RANK,
        feed_forward_ranks: dict = FULL_RANK,
        base_rank: float | None = None,
        rank_growth: float | None = None,
        rank_rounding: str | None = None,
        weight_bits: dict | None = None,
        compression: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**of_this_family(kwargs, LowRankChronos2Pipeline))
        self.validate_settings()
        attention_ranks, compression = from_schedule(
            {"base_rank": base_rank, "rank_growth": rank_growth, "rank_rounding": rank_rounding},
            attention_ranks,
            compression,
            self._scheduled,
        )
        given = {"attention_ranks": attention_ranks, "feed_forward_ranks": feed_forward_ranks}
        # Deep copies, for a caller may go on to edit its table, and json keys and numbers stay as they are.
        for name, full in self.full_ranks().items():
            setattr(self, name, completed_table(given[name], full, name))
        self.weight_bits = copy.deepcopy(weight_bits)
        self.compression = copy.deepcopy(compression)
        self.validate_ranks()

    def auto_classes(self) -> dict[str, type]:
        from .modeling_lowrank_chronos import LowRankChronos2Model

        return {"AutoConfig": LowRankChronos2Config, "AutoModel": LowRankChronos2Model}

    def full_ranks(self) -> dict[str, dict[str, list[dict]]]:
        """The two tables of the dense model of this shape: `attention_ranks` and `feed_forward_ranks`."""
        layers = range(self.num_layers)
        return {
            "attention_ranks": {
                kind: [{"qk": self.d_kv, "vo": self.d_kv} for _ in layers] for kind in ("time", "group")
            },
            "feed_forward_ranks": {"encoder": [{"width": self.d_ff, "wi": None, "wo": None} for _ in layers]},
        }

    def _scheduled(self, base_rank: float, rank_growth: float, *, rounding: str) -> dict[str, list[dict[str, int]]]:
        """The table of a schedule (see `scheduled_attention_ranks`): both kinds of a layer have its rank."""
        sizes = {"num_layers": self.num_layers, "num_decoder_layers": 0, "d_kv": self.d_kv}
        ranks = scheduled_attention_ranks(base_rank, rank_growth, rounding=rounding, **sizes)["encoder_self"]
        return {"time": [entry | {"qk": entry["qk"] + entry["qk"] % 2} for entry in ranks], "group": ranks}

    def validate_ranks(self) -> None:
        """Raise ValueError where the tables do not fit the model."""
        validate_bits(self.weight_bits)
        for name, full in self.full_ranks().items():
            validate_table(getattr(self, name), full, name, self._validate_entry)

    def _validate_entry(self, entry: Any, where: str) -> None:
        rotary = where.startswith("attention_ranks['time']")
        validate_entry(entry, where, d_model=self.d_model, d_kv=self.d_kv, d_ff=self.d_ff, rotary=rotary)


__all__ = ["LowRankChronos2Config", "LowRankChronosBoltConfig"]
