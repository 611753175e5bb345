"""Chronos time-series foundation models, small and fast: low-rank transformers that load like any other.

Importing the package registers its classes with transformers' Auto classes and with the Chronos pipelines, and does
nothing else.
"""

from typing import Any

import chronos
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

from .checkpoints.export import export_stock_t5, save_compressed
from .checkpoints.summary import CompressionSummary, summarize
from .compression.calibration import Calibration, calibrate
from .compression.compress import compress_pretrained
from .forecasting.forecast import forecast_file, forecast_frame
from .hub.model_card import render_card
from .hub.push import push_to_hub
from .models.configuration_lowrank_chronos import LowRankChronos2Config, LowRankChronosBoltConfig
from .models.configuration_lowrank_t5 import LowRankT5Config
from .models.modeling_lowrank_chronos import LowRankChronos2Model, LowRankChronosBoltModelForForecasting
from .models.modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model
from .models.pipeline_lowrank_chronos import LowRankChronos2Pipeline, LowRankChronosBoltPipeline
from .models.pipeline_lowrank_t5 import LowRankChronosPipeline

AutoConfig.register("lowrank_t5", LowRankT5Config)
AutoModel.register(LowRankT5Config, (LowRankT5Model, LowRankT5EncoderModel))
AutoModelForSeq2SeqLM.register(LowRankT5Config, LowRankT5ForConditionalGeneration)
AutoModelForTextEncoding.register(LowRankT5Config, LowRankT5EncoderModel)
AutoConfig.register("lowrank_chronos_bolt", LowRankChronosBoltConfig)
AutoModel.register(LowRankChronosBoltConfig, LowRankChronosBoltModelForForecasting)
AutoConfig.register("lowrank_chronos2", LowRankChronos2Config)
AutoModel.register(LowRankChronos2Config, LowRankChronos2Model)
# Every save copies the code beside the weights, so that `trust_remote_code=True` loads a checkpoint where this package is missing.
for config_class in (LowRankT5Config, LowRankChronosBoltConfig, LowRankChronos2Config):
    config_class.register_for_auto_class()
# The stock pipelines look for the class that a checkpoint names in these two modules and nowhere else.
chronos.chronos_bolt.LowRankChronosBoltModelForForecasting = LowRankChronosBoltModelForForecasting
chronos.chronos2.LowRankChronos2Model = LowRankChronos2Model

__all__ = [
    "Calibration",
    "CompressionSummary",
    "LowRankChronos2Config",
    "LowRankChronos2Model",
    "LowRankChronos2Pipeline",
    "LowRankChronosBoltConfig",
    "LowRankChronosBoltModelForForecasting",
    "LowRankChronosBoltPipeline",
    "LowRankChronosPipeline",
    "LowRankT5Config",
    "LowRankT5EncoderModel",
    "LowRankT5ForConditionalGeneration",
    "LowRankT5Model",
    "RankCallback",
    "calibrate",
    "compress_pretrained",
    "export_stock_t5",
    "forecast_file",
    "forecast_frame",
    "push_to_hub",
    "render_card",
    "save_compressed",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name == "RankCallback":  # what it measures with takes long to import
        from .analysis.rank_callback import RankCallback

        return RankCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
