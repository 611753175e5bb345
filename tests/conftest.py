"""Shared settings and tiny configurations. Everything runs on a CPU in float32 and offline."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from chronos import ChronosConfig
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from hypothesis import settings
from transformers import GenerationConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_lowrank import LowRankT5Config
from hf_lowrank.compression.calibration import Calibration, calibrate

# Workers of pytest-xdist share the cores.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# The same examples in every run, and no deadline: a busy machine is not a failure.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("tests")

# Uneven on purpose: no two of these numbers can be mixed up without an error of shape.
SHAPE = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
# The files that a saved low-rank T5 carries its code in.
T5_CODE = {
    "checked_loading.py",
    "checked_settings.py",
    "configuration_lowrank_t5.py",
    "modeling_lowrank_blocks.py",
    "modeling_lowrank_layers.py",
    "modeling_lowrank_quantized.py",
    "modeling_lowrank_stack.py",
    "modeling_lowrank_t5.py",
    "pipeline_lowrank_t5.py",
    "decoding.py",
    "weight_files.py",
}


# Tables for this shape with every form: per head, latent with and without each sketch, thin factors.
MIXED_RANKS: dict[str, dict[str, list[dict[str, int | None]]]] = {
    "attention_ranks": {
        "encoder_self": [{"qk": 3, "vo": 5}, {"latent": 4, "query": None, "output": 3}],
        "decoder_self": [
            {"latent": 5, "query": 4, "output": None},
            {"qk": 2, "vo": 8},
            {"latent": 3, "query": 4, "output": 4},
        ],
        "cross": [
            {"latent": 6, "query": 3, "output": 4},
            {"latent": 7, "query": None, "output": None},
            {"qk": 4, "vo": 2},
        ],
    },
    "feed_forward_ranks": {
        "encoder": [{"width": 24, "wi": None, "wo": 3}, {"width": 9, "wi": 4, "wo": None}],
        "decoder": [
            {"width": 20, "wi": 5, "wo": 4},
            {"width": 24, "wi": None, "wo": None},
            {"width": 11, "wi": None, "wo": None},
        ],
    },
}

# A Chronos-T5 tokenizer of 64 tokens, context 40, horizon 8.
TINY_CHRONOS = {
    "tokenizer_class": "MeanScaleUniformBins",
    "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
    "context_length": 40,
    "prediction_length": 8,
    "n_tokens": 64,
    "n_special_tokens": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_eos_token": True,
    "model_type": "seq2seq",
    "num_samples": 4,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the global one as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refit has the batches that are measured alone: tiny models are random, and a hundred tests compress one."""
    monkeypatch.setattr("hf_lowrank.compression.calibration.REFIT_BATCHES", 1)


@pytest.fixture(scope="session")
def tiny_shape() -> dict[str, Any]:
    """The arguments of a tiny `T5Config`: 2 encoder and 3 decoder layers, 2 heads of 8, d_model 16, d_ff 24."""
    return dict(SHAPE)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., LowRankT5Config]:
    """A function that builds a `LowRankT5Config` of `tiny_shape`, with any argument added or replaced."""
    return lambda **changes: LowRankT5Config(**{**SHAPE, **changes})


@pytest.fixture(scope="session")
def mixed_ranks() -> dict[str, dict[str, list[dict[str, int | None]]]]:
    """`MIXED_RANKS`."""
    return copy.deepcopy(MIXED_RANKS)


@pytest.fixture(scope="session")
def tiny_chronos_config() -> ChronosConfig:
    """A tokenizer of 64 tokens, context 40, horizon 8."""
    return ChronosConfig(**copy.deepcopy(TINY_CHRONOS))


def stock_implementation(implementation: str) -> str:
    """The attention implementation of a stock T5: before transformers 5.15 it had but one."""
    return implementation if T5ForConditionalGeneration._supports_sdpa else "eager"


def exactness(implementation: str) -> dict[str, float]:
    """How close a model at full rank comes to stock: to the last bit, or to rounding where stock attends in another way."""
    tolerance = 0.0 if stock_implementation(implementation) == implementation else 1e-4
    return {"rtol": tolerance, "atol": tolerance}


def decoder_input(labels: torch.Tensor) -> torch.Tensor:
    """What a decoder of `SHAPE` reads while it is taught the labels: they start with token 0, which also stands for what is unknown."""
    return labels.roll(1, dims=-1).index_fill(-1, torch.tensor([0]), 0).masked_fill(labels.roll(1, dims=-1) == -100, 0)


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Weights like a trained model's: attention and position bias that matter, no norm left at one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name or name.endswith(".q.weight"):
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="session")
def dense_t5() -> Callable[..., PreTrainedModel]:
    """A function that makes a dense T5 of `tiny_shape` with weights like a trained model's: attention matters."""

    def make(model_class: type[PreTrainedModel] = T5ForConditionalGeneration, **changes: Any) -> PreTrainedModel:
        return randomise(model_class(T5Config(**{**SHAPE, **changes})))

    return make


@pytest.fixture
def chronos_t5(dense_t5, tiny_chronos_config) -> T5ForConditionalGeneration:
    """A dense Chronos-T5 with the tokenizer of `tiny_chronos_config`."""
    # Not the deeper decoder of `tiny_shape`: stock transformers makes a cache of the encoder's depth and cannot generate.
    model = dense_t5(num_layers=3, num_decoder_layers=2)
    model.config.chronos_config = vars(tiny_chronos_config).copy()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, max_new_tokens=8
    )
    return model


QUANTILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.fixture
def bolt() -> ChronosBoltModelForForecasting:
    """A dense Chronos-Bolt: context 48 in patches of 8, horizon 16, 2 encoder and 3 decoder layers, d_model 16, 2 heads of 8."""
    settings = {"context_length": 48, "prediction_length": 16, "input_patch_size": 8, "input_patch_stride": 8}
    changes = {"chronos_config": settings | {"quantiles": QUANTILES, "use_reg_token": True}}
    model = randomise(ChronosBoltModelForForecasting(T5Config(**{**SHAPE, **changes})))
    model.config.chronos_pipeline_class = "ChronosBoltPipeline"
    return model


@pytest.fixture
def chronos2() -> Chronos2Model:
    """A dense Chronos-2: context 48 in patches of 8, horizon up to 32, 2 layers, d_model 16, 2 heads of 8."""
    settings = {"context_length": 48, "input_patch_size": 8, "input_patch_stride": 8, "output_patch_size": 8}
    settings |= {"quantiles": QUANTILES, "use_reg_token": True, "use_arcsinh": True, "max_output_patches": 4}
    shape = {name: SHAPE[name] for name in ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "dropout_rate")}
    config = Chronos2CoreConfig(**shape, chronos_config=settings, chronos_pipeline_class="Chronos2Pipeline")
    config.architectures = ["Chronos2Model"]
    model = Chronos2Model(config)
    with torch.no_grad():  # stock rules leave every matrix at one small deviation
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "shared" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return randomise(model)


@pytest.fixture(params=["chronos_t5", "bolt", "chronos2"])
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A dense Chronos model of each family."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def chronos_calibration(chronos_t5) -> Calibration:
    """`chronos_t5` measured on two synthetic batches."""
    return calibrate(chronos_t5, num_batches=2)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of what became of damaged input, where tests of `tests/fuzz` have recorded it."""
    from fuzz.outcomes import report

    reports = [report for found in terminalreporter.stats.values() for report in found]
    properties = [
        entry for found in reports if getattr(found, "when", "") == "call" for entry in found.user_properties
    ]
    report(properties, terminalreporter.write_line)


@pytest.fixture(scope="session")
def evaluation_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of an evaluation is left in the caches of the person who runs the tests."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf_datasets"))
        yield
