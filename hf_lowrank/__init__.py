"""Chronos time-series foundation models, small and fast: low-rank transformers that load like any other.

Importing the package registers its classes with transformers' Auto classes and does nothing else.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

from .calibration import Calibration, calibrate
from .checkpoint import export_stock_t5, save_compressed
from .compression import compress_pretrained
from .configuration_lowrank_t5 import LowRankT5Config
from .modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model
from .summary import CompressionSummary, summarize

AutoConfig.register("lowrank_t5", LowRankT5Config)
AutoModel.register(LowRankT5Config, (LowRankT5Model, LowRankT5EncoderModel))
AutoModelForSeq2SeqLM.register(LowRankT5Config, LowRankT5ForConditionalGeneration)
AutoModelForTextEncoding.register(LowRankT5Config, LowRankT5EncoderModel)

__all__ = [
    "Calibration",
    "CompressionSummary",
    "LowRankT5Config",
    "LowRankT5EncoderModel",
    "LowRankT5ForConditionalGeneration",
    "LowRankT5Model",
    "calibrate",
    "compress_pretrained",
    "export_stock_t5",
    "save_compressed",
    "summarize",
]
