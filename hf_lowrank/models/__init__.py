"""The low-rank models as transformers and Chronos know them: what is saved beside the weights for `trust_remote_code`.

Importing it registers them with transformers' Auto classes and with the Chronos pipelines, and does nothing else. The files import each
other by `from .x import` alone, because transformers follows that to find the ones to copy.
"""

import chronos
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

from .configuration_lowrank_chronos import LowRankChronos2Config, LowRankChronosBoltConfig
from .configuration_lowrank_t5 import LowRankT5Config
from .modeling_lowrank_chronos import LowRankChronos2Model, LowRankChronosBoltModelForForecasting
from .modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model

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
