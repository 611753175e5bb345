"""transformers' own common model and configuration tests, run on our classes. Started by `test_upstream.py`, with
transformers' tests on the path as `transformers_tests`.
"""

# ruff: noqa: RUF012, what unittest's classes are made of

from __future__ import annotations

import copy
import unittest
from typing import Any

import torch
from chronos.chronos2 import Chronos2CoreConfig, Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from chronos_models import BOLT, CHRONOS2, CHRONOS2_RANKS
from conftest import SHAPE
from transformers import PreTrainedConfig, T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Model
from transformers.models.auto import modeling_auto
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

import hf_lowrank as lowrank

BATCH, SOURCE, TARGET, SERIES = 13, 7, 9, 40
DEPTH = {"num_layers": 2, "num_decoder_layers": 2}
RANKS = {
    "attention_ranks": {
        "encoder_self": [{"qk": 3, "vo": 5}, {"latent": 4, "query": None, "output": 3}],
        "decoder_self": [{"latent": 5, "query": 4, "output": None}, {"qk": 2, "vo": 8}],
        "cross": [{"qk": 4, "vo": 2}, {"latent": 6, "query": 3, "output": 4}],
    },
    "feed_forward_ranks": {
        "encoder": [{"width": 24, "wi": None, "wo": 3}, {"width": 9, "wi": 4, "wo": None}],
        "decoder": [{"width": 20, "wi": 5, "wo": 4}, {"width": 24, "wi": None, "wo": None}],
    },
}
LATENTS = {
    "attention_ranks": {
        kind: [{"latent": 4, "query": 3, "output": 5}] * 2 for kind in ("encoder_self", "decoder_self", "cross")
    }
}

# What a T5 configuration turns into something else: `scale_decoder_outputs`.
DERIVED = {"tie_word_embeddings"}

# The mixin looks classes up by name to know what a bare model is, and which one takes labels.
modeling_auto.MODEL_MAPPING_NAMES["lowrank_t5"] = ("LowRankT5Model", "LowRankT5EncoderModel")
modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["lowrank_t5"] = "LowRankT5ForConditionalGeneration"


class Tester:
    """What the mixin asks of a model: the shape of its outputs, a configuration and inputs."""

    batch_size, is_training = BATCH, True
    hidden_size, num_attention_heads, num_hidden_layers = SHAPE["d_model"], SHAPE["num_heads"], 2

    def __init__(self, config_class: type[PreTrainedConfig], **arguments: Any) -> None:
        self.config_class, self.arguments = config_class, arguments

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**copy.deepcopy(self.arguments))

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        return self.get_config(), self.inputs()

    def inputs(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class TokenTester(Tester):
    seq_length = encoder_seq_length = key_length = SOURCE

    def inputs(self) -> dict[str, torch.Tensor]:
        tokens = torch.randint(2, SHAPE["vocab_size"], (BATCH, SOURCE))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class SequenceTester(TokenTester):
    seq_length = decoder_seq_length = decoder_key_length = TARGET

    def inputs(self) -> dict[str, torch.Tensor]:
        tokens = torch.randint(2, SHAPE["vocab_size"], (BATCH, TARGET))
        return super().inputs() | {"decoder_input_ids": tokens, "decoder_attention_mask": torch.ones_like(tokens)}


class SeriesTester(Tester):
    """Chronos-Bolt and Chronos-2: series in, quantiles out."""

    seq_length = SERIES

    def inputs(self) -> dict[str, torch.Tensor]:
        return {"context": torch.randn(BATCH, SERIES).cumsum(dim=-1)}


class Suite(ModelTesterMixin):
    """The mixin with one tester; `skips` has the tests that are left out, and why. The dense class of the library fails them too."""

    skips: dict[str, str] = {}
    stock: type[Suite] | None = None
    config_class: type[PreTrainedConfig]
    inputs_of: type[Tester]
    arguments: dict[str, Any]
    test_can_init_all_missing_weights_before_2023 = True  # not left out by age
    target = "labels"

    def setUp(self) -> None:
        if reason := self.skips.get(self._testMethodName):
            self.skipTest(reason)
        self.model_tester = self.inputs_of(self.config_class, **self.arguments)

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and "context" in inputs:
            inputs[self.target] = torch.randn(BATCH, 5)  # one output patch of Chronos-2, most of Bolt's horizon
        return inputs

    def test_config(self) -> None:
        arguments = {name: value for name, value in self.arguments.items() if name not in DERIVED}
        ConfigTester(self, config_class=self.config_class, **arguments).run_common_tests()

    def test_skips(self) -> None:
        """A test that the dense class passes is not left out."""
        for name in ("test_determinism", *self.skips):
            result = unittest.TestResult()
            self.stock(name).run(result)
            assert result.wasSuccessful() == (name not in self.skips), f"{name} of {self.stock.__name__}"


NO_VOCABULARY = "its input is series, not tokens: no embedding of a vocabulary to get, set or resize"
SERIES_OUTPUT = (
    "chronos' forward answers with quantiles alone, whatever output_hidden_states and output_attentions say"
)


def dense(low_rank: type[Suite], **attributes: Any) -> type[Suite]:
    """The same tests of the library's own class. Not collected: only what is skipped runs, for `test_skips`."""
    return type(low_rank.__name__.replace("LowRank", ""), (low_rank,), {"skips": {}, "__test__": False, **attributes})


class LowRankT5Test(Suite, unittest.TestCase):
    all_model_classes = (lowrank.LowRankT5Model, lowrank.LowRankT5ForConditionalGeneration)
    is_encoder_decoder = True
    config_class, inputs_of = lowrank.LowRankT5Config, SequenceTester
    arguments = {**SHAPE, **DEPTH, **RANKS}
    skips = {
        "test_generation_tester_mixin_inheritance": "the generation tests are not in the source distribution; "
        "test_modeling_lowrank_t5.py and test_decoding.py have ours",
        "test_model_base_model_prefix": "a T5 holds its two stacks itself, not in a base model",
    }


class LowRankT5GatedTest(LowRankT5Test):
    """T5 v1.1: gated feed-forward layers and an output layer of its own; all attention latent."""

    arguments = {**SHAPE, **DEPTH, **LATENTS, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


class LowRankT5EncoderTest(Suite, unittest.TestCase):
    all_model_classes = (lowrank.LowRankT5EncoderModel,)
    config_class, inputs_of = lowrank.LowRankT5Config, TokenTester
    arguments = {**SHAPE, **DEPTH, **RANKS, "is_encoder_decoder": False}


class LowRankChronosBoltTest(Suite, unittest.TestCase):
    all_model_classes = (lowrank.LowRankChronosBoltModelForForecasting,)
    is_encoder_decoder, has_attentions, test_resize_embeddings = True, False, False
    config_class, inputs_of, target = lowrank.LowRankChronosBoltConfig, SeriesTester, "target"
    arguments = {**BOLT, **DEPTH, **RANKS}
    skips = {
        "test_model_get_set_embeddings": NO_VOCABULARY,
        "test_model_outputs_equivalence": "chronos' forward has no return_dict",
        "test_hidden_states_output": SERIES_OUTPUT,
        "test_retain_grad_hidden_states_attentions": SERIES_OUTPUT,
        "test_capture_outputs_decorator": SERIES_OUTPUT,
        "test_can_capture_specific_layers_hidden_states": SERIES_OUTPUT,
    }


class LowRankChronos2Test(Suite, unittest.TestCase):
    all_model_classes = (lowrank.LowRankChronos2Model,)
    has_attentions, test_resize_embeddings = False, False
    config_class, inputs_of, target = lowrank.LowRankChronos2Config, SeriesTester, "future_target"
    arguments = {**CHRONOS2, **CHRONOS2_RANKS}
    skips = {
        "test_model_get_set_embeddings": NO_VOCABULARY,
        "test_model_outputs_equivalence": "chronos' forward has no return_dict",
        "test_hidden_states_output": SERIES_OUTPUT,
        "test_retain_grad_hidden_states_attentions": SERIES_OUTPUT,
    }


LowRankT5Test.stock = LowRankT5GatedTest.stock = dense(
    LowRankT5Test,
    all_model_classes=(T5Model, T5ForConditionalGeneration),
    config_class=T5Config,
    arguments={**SHAPE, **DEPTH},
)
LowRankT5EncoderTest.stock = dense(
    LowRankT5EncoderTest,
    all_model_classes=(T5EncoderModel,),
    config_class=T5Config,
    arguments={**SHAPE, **DEPTH, "is_encoder_decoder": False},
)
LowRankChronosBoltTest.stock = dense(
    LowRankChronosBoltTest,
    all_model_classes=(ChronosBoltModelForForecasting,),
    config_class=T5Config,
    arguments={**BOLT, **DEPTH},
)
LowRankChronos2Test.stock = dense(
    LowRankChronos2Test, all_model_classes=(Chronos2Model,), config_class=Chronos2CoreConfig, arguments=CHRONOS2
)
