"""The families of models that can be made smaller: their classes, and where their layers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chronos import BaseChronosPipeline, Chronos2Pipeline, ChronosBoltPipeline
from chronos.chronos2 import Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from transformers import PreTrainedConfig, PreTrainedModel, T5EncoderModel, T5ForConditionalGeneration, T5Model

from ..models.configuration_lowrank_chronos import LowRankChronos2Config, LowRankChronosBoltConfig
from ..models.configuration_lowrank_t5 import LowRankT5Config
from ..models.modeling_lowrank_chronos import LowRankChronos2Model, LowRankChronosBoltModelForForecasting
from ..models.modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model
from ..models.pipeline_lowrank_chronos import LowRankChronos2Pipeline, LowRankChronosBoltPipeline
from ..models.pipeline_lowrank_t5 import LowRankChronosPipeline

__all__ = [
    "BOLT",
    "CHRONOS2",
    "DENSE_CLASSES",
    "FAMILIES",
    "LOWRANK_CLASSES",
    "T5",
    "Family",
    "family_of",
    "family_of_config",
]

# What a configuration says of one model, and not of all of its shape.
OF_THE_CLASS = ("model_type", "architectures", "transformers_version", "auto_map", "chronos_pipeline_class")
OF_THE_WEIGHTS = ("attention_ranks", "feed_forward_ranks", "weight_bits", "compression")

Place = tuple[str, str]  # the stack, and the dotted name of the layer's module with {} for the block


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: `"t5"`, `"bolt"` or `"chronos2"`: in code.
        title: `"chronos-t5"`, `"chronos-bolt"` or `"chronos-2"`: of its Chronos models, for people.
        classes: Dense model classes, and the low-rank class of each.
        config_class: The low-rank configuration.
        attention, feed_forward: Where the layers of each kind are.
        pipelines: That of dense models, and that of low-rank ones.
        rotary: The kinds of attention with rotary embeddings: heads keep whole frequencies, and no latent is possible.
        cached: The kinds of attention whose keys and values are kept during a forecast.
        across_series: The kinds of attention whose positions are series: their tensors have the batch second.
    """

    name: str
    title: str
    classes: Mapping[type[PreTrainedModel], type[PreTrainedModel]]
    config_class: type[PreTrainedConfig]
    attention: Mapping[str, Place]
    feed_forward: Mapping[str, Place]
    pipelines: tuple[type[BaseChronosPipeline], type[BaseChronosPipeline]]
    rotary: frozenset[str] = frozenset()
    cached: frozenset[str] = frozenset()
    across_series: frozenset[str] = frozenset()

    def has(self, model_class: type[PreTrainedModel]) -> bool:
        """Whether a class, dense or low-rank, is of this family."""
        return model_class in self.classes or model_class in self.classes.values()

    def dense_class(self, model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        """The dense class that a class of this family is, or is a low-rank one of."""
        return next(dense for dense, lowrank in self.classes.items() if model_class in (dense, lowrank))

    @property
    def forecasters(self) -> tuple[type[PreTrainedModel], ...]:
        """The classes that forecast, dense and low-rank: a T5 without a head does not."""
        headless = (T5Model, T5EncoderModel)
        return tuple(cls for pair in self.classes.items() if pair[0] not in headless for cls in pair)

    @property
    def has_decoder(self) -> bool:
        """Whether its models have a decoder; of T5 an encoder alone has none."""
        return any(stack == "decoder" for stack, _ in self.places.values())

    @property
    def places(self) -> dict[str, Place]:
        """All kinds of layers."""
        return {**self.attention, **self.feed_forward}

    def lowrank_config(self, config: PreTrainedConfig, **ranks: Any) -> PreTrainedConfig:
        """The configuration of a model of this family as a low-rank one, with the tables or the schedule in `ranks`, or full rank."""
        values = config.to_dict()
        for name in (*OF_THE_CLASS, *OF_THE_WEIGHTS):
            values.pop(name, None)
        return self.config_class(**values, **ranks)


T5_ATTENTION = {
    "encoder_self": ("encoder", "encoder.block.{}.layer.0.SelfAttention"),
    "decoder_self": ("decoder", "decoder.block.{}.layer.0.SelfAttention"),
    "cross": ("decoder", "decoder.block.{}.layer.1.EncDecAttention"),
}
T5_FEED_FORWARD = {
    "encoder_feed_forward": ("encoder", "encoder.block.{}.layer.1.DenseReluDense"),
    "decoder_feed_forward": ("decoder", "decoder.block.{}.layer.2.DenseReluDense"),
}
T5 = Family(
    "t5",
    "chronos-t5",
    {
        T5ForConditionalGeneration: LowRankT5ForConditionalGeneration,
        T5Model: LowRankT5Model,
        T5EncoderModel: LowRankT5EncoderModel,
    },
    LowRankT5Config,
    T5_ATTENTION,
    T5_FEED_FORWARD,
    (LowRankChronosPipeline, LowRankChronosPipeline),
    cached=frozenset({"decoder_self", "cross"}),
)
BOLT = Family(
    "bolt",
    "chronos-bolt",
    {ChronosBoltModelForForecasting: LowRankChronosBoltModelForForecasting},
    LowRankChronosBoltConfig,
    T5_ATTENTION,
    T5_FEED_FORWARD,
    (ChronosBoltPipeline, LowRankChronosBoltPipeline),
)
CHRONOS2 = Family(
    "chronos2",
    "chronos-2",
    {Chronos2Model: LowRankChronos2Model},
    LowRankChronos2Config,
    {
        "time": ("encoder", "encoder.block.{}.layer.0.self_attention"),
        "group": ("encoder", "encoder.block.{}.layer.1.self_attention"),
    },
    {"encoder_feed_forward": ("encoder", "encoder.block.{}.layer.2.mlp")},
    (Chronos2Pipeline, LowRankChronos2Pipeline),
    rotary=frozenset({"time"}),
    across_series=frozenset({"group"}),
)
FAMILIES = (T5, BOLT, CHRONOS2)
DENSE_CLASSES = tuple(cls for family in FAMILIES for cls in family.classes)
LOWRANK_CLASSES = tuple(cls for family in FAMILIES for cls in family.classes.values())


def family_of(model_class: type[PreTrainedModel]) -> Family | None:
    """The family of a dense or low-rank model class; None of any other."""
    return next((family for family in FAMILIES if family.has(model_class)), None)


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family of a low-rank configuration."""
    return next(family for family in FAMILIES if family.config_class.model_type == config.model_type)
