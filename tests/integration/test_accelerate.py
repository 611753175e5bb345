"""Wherever the weights are, and however they came there, the outputs are those of the model in one piece, to the last bit."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from chronos import BaseChronosPipeline, ChronosConfig, ChronosPipeline
from chronos.base import PipelineRegistry
from chronos.chronos import ChronosModel
from chronos_models import BOLT_RANKS, CHRONOS2_RANKS, bolt, chronos2, series
from conftest import SHAPE, randomise
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_lowrank import (
    LowRankChronos2Model,
    LowRankChronosBoltModelForForecasting,
    LowRankT5Config,
    LowRankT5EncoderModel,
    LowRankT5ForConditionalGeneration,
    LowRankT5Model,
)
from hf_lowrank.models.pipeline_lowrank_t5 import LowRankChronosPipeline, is_whole

CPU = torch.device("cpu")
KINDS = {"encoder_self": 2, "decoder_self": 3, "cross": 3}
TABLES: dict[str, dict[str, Any]] = {
    "t5 per_head": {kind: [{"qk": 3, "vo": 5}] * depth for kind, depth in KINDS.items()},
    "t5 latent": {kind: [{"latent": 5, "query": 4, "output": 3}] * depth for kind, depth in KINDS.items()},
}
MODELS = ["t5 per_head", "t5 latent", "t5 mixed", "bolt", "chronos2"]
FAMILIES = pytest.mark.parametrize("name", MODELS[2:])
GENERATION = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, "pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="session")
def make(mixed_ranks, tiny_chronos_config) -> Callable[[str], PreTrainedModel]:
    """The model of a name in `MODELS`, the same at every call."""

    def make(name: str) -> PreTrainedModel:
        torch.manual_seed(1)
        if not name.startswith("t5"):
            return bolt(**BOLT_RANKS) if name == "bolt" else chronos2(**CHRONOS2_RANKS)
        ranks = mixed_ranks if name == "t5 mixed" else {"attention_ranks": TABLES[name]}
        chronos = vars(tiny_chronos_config).copy()
        config = LowRankT5Config(**SHAPE, **copy.deepcopy(ranks), chronos_config=chronos, eos_token_id=1)
        return randomise(LowRankT5ForConditionalGeneration(config))

    return make


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """What a user gets of the model itself: logits and sampled tokens, or quantiles."""
    torch.manual_seed(2)
    if not isinstance(model, LowRankT5ForConditionalGeneration):
        return [model(series()).quantile_preds]
    tokens = torch.randint(2, SHAPE["vocab_size"], (3, 9))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    logits = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens[:, :5]).logits
    return [logits, model.generate(tokens, attention_mask=mask, **GENERATION)]


def forecasts(pipeline: BaseChronosPipeline) -> list[torch.Tensor]:
    """Samples of three steps, or quantiles beyond the prediction length, and the embeddings of two series."""
    torch.manual_seed(3)
    inputs = [torch.arange(20.0).sin() + 2, torch.arange(7.0)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="We recommend keeping prediction length")
        length = 3 if isinstance(pipeline, ChronosPipeline) else 17
        return [*pipeline.predict(inputs, prediction_length=length), *pipeline.embed(inputs)[0]]


def tolerance(name: str) -> float:
    """A Chronos-2 whose weights a hook fetches multiplies with two matrices where another one has their product."""
    return 1e-5 if name == "chronos2" else 0.0


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], within: float = 0.0) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.device == CPU
        assert_close(one, other, rtol=within, atol=within)


def auto_class(model: PreTrainedModel) -> Any:
    return AutoModelForSeq2SeqLM if isinstance(model, LowRankT5ForConditionalGeneration) else AutoModel


def halves(model: PreTrainedModel, first: Any, second: Any) -> dict[str, Any]:
    """A device map with the blocks in turn on two places, and all that is not a block on the CPU."""
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parameters += [name for name, _ in model.named_buffers()]
    rest = {name.rpartition(".")[0] for name in parameters if not name.startswith(tuple(blocks))} - {""}
    return dict.fromkeys(rest, "cpu") | {name: (first, second)[i % 2] for i, name in enumerate(blocks)}


def some_memory(model: PreTrainedModel) -> dict[str, int]:
    """Too little for all the model, enough for the largest block."""
    return {"cpu": int(0.6 * model.get_memory_footprint())}


def load(model: PreTrainedModel, folder: Path, **arguments: Any) -> PreTrainedModel:
    model.save_pretrained(folder / "model")
    return auto_class(model).from_pretrained(folder / "model", offload_folder=str(folder / "offload"), **arguments)


def from_empty(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Built on the meta device, filled by accelerate."""
    model.save_pretrained(folder / "model")
    with accelerate.init_empty_weights():
        empty = type(model)(model.config)
    empty.tie_weights()
    blocks = model._no_split_modules
    return accelerate.load_checkpoint_and_dispatch(
        empty, folder / "model", device_map="auto", no_split_module_classes=blocks
    )


def dispatched(model: PreTrainedModel, folder: Path, **arguments: Any) -> PreTrainedModel:
    return accelerate.dispatch_model(model, offload_dir=str(folder / "offload"), **arguments)


WHOLE: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "map auto": functools.partial(load, device_map="auto"),
    "map cpu": functools.partial(load, device_map="cpu"),
    "map of all": functools.partial(load, device_map={"": "cpu"}),
    "low memory": functools.partial(load, low_cpu_mem_usage=True, dtype="auto"),
    "from empty": from_empty,
    "dispatched with hooks": functools.partial(dispatched, device_map={"": "cpu"}, force_hooks=True),
}
# accelerate moves the weights to where they are computed with at the first call.
HOOKED: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "hooked": lambda model, _: accelerate.cpu_offload_with_hook(model, CPU)[0],
}
# Here some or all weights are meta tensors between calls.
OFFLOADED: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "map to disk": functools.partial(load, device_map={"": "disk"}),
    "map by blocks": lambda model, folder: load(model, folder, device_map=halves(model, "cpu", "disk")),
    "map auto, little memory": lambda model, folder: load(
        model, folder, device_map="auto", max_memory=some_memory(model)
    ),
    "dispatched": lambda model, folder: dispatched(model, folder, device_map=halves(model, "disk", "cpu")),
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, CPU) or model,
    "cpu_offload with buffers": lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True) or model,
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder / "offload"), CPU) or model,
}
# Left to `pytest -m slow`, by whether the model is a T5, whose decode loop looks at the hooks.
ALIKE = {True: ["map cpu", "map of all", "low memory", "map to disk", "cpu_offload with buffers"]}
ALIKE[False] = [*ALIKE[True], "dispatched with hooks", "hooked"]


def pipeline_of(model: PreTrainedModel) -> BaseChronosPipeline:
    """The pipeline that a checkpoint of the model names."""
    if not isinstance(model, LowRankT5ForConditionalGeneration):
        return PipelineRegistry.REGISTRY[model.config.chronos_pipeline_class](model)
    config = ChronosConfig(**model.config.chronos_config)
    return LowRankChronosPipeline(config.create_tokenizer(), ChronosModel(config, model))


@pytest.fixture(scope="session")
def in_one_piece(make) -> Callable[..., list[torch.Tensor]]:
    """What the model of a name answers in one piece: its `outputs`, or its pipeline's `forecasts`, "drawn" by it or by "generate"."""

    @functools.cache
    def answers(name: str, what: str) -> list[torch.Tensor]:
        model = make(name)
        if what == "outputs":
            return outputs(model)
        pipeline = pipeline_of(model)
        if what == "generate" and isinstance(pipeline, LowRankChronosPipeline):
            pipeline = ChronosPipeline(pipeline.tokenizer, ChronosModel(pipeline.model.config, model))
        return forecasts(pipeline)

    return answers


@pytest.mark.filterwarnings("ignore:Current model requires")
@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(name, place, marks=[pytest.mark.slow] * (place in ALIKE[name == "t5 mixed"]))
        for name in MODELS[2:]
        for place in (*WHOLE, *HOOKED, *OFFLOADED)
    ]
    + [(name, place) for name in MODELS[:2] for place in ("from empty", "map by blocks")],
)
def test_outputs_and_forecasts_are_those_of_the_model_in_one_piece(tmp_path, make, in_one_piece, name, place):
    placed = (WHOLE | HOOKED | OFFLOADED)[place](make(name), tmp_path)
    assert any(parameter.is_meta for parameter in placed.parameters()) == (place in OFFLOADED)
    assert placed.device == CPU
    # In this order: `generate` leaves a hook of accelerate's on the encoder.
    assert_equal(outputs(placed), in_one_piece(name, "outputs"))
    expected = in_one_piece(name, "drawn" if place in WHOLE else "generate")
    assert_equal(forecasts(pipeline_of(placed)), expected, tolerance(name))


@FAMILIES
def test_shards_are_put_together_again(tmp_path, make, in_one_piece, name):
    model = make(name)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for arguments in ({}, {"device_map": "auto"}, {"device_map": {"": "disk"}, "offload_folder": tmp_path / "disk"}):
        again = auto_class(model).from_pretrained(tmp_path, **arguments)
        assert_equal(outputs(again), in_one_piece(name, "outputs"))


def stock_saves_what_is_offloaded(folder: Path) -> bool:
    """Whether this version of transformers saves a dense T5 that lies on disk; before 5.15 none does."""
    T5ForConditionalGeneration(T5Config(**SHAPE)).save_pretrained(folder)
    stock = T5ForConditionalGeneration.from_pretrained(folder, device_map={"": "disk"}, offload_folder=folder / "disk")
    try:
        stock.save_pretrained(folder / "again")
    except NotImplementedError:
        return False
    return True


@FAMILIES
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_model_is_saved_whole(tmp_path, make, in_one_piece, name):
    if not stock_saves_what_is_offloaded(tmp_path / "stock"):
        pytest.skip("this transformers cannot save an offloaded model, a dense T5 either")
    offloaded = OFFLOADED["map to disk"](make(name), tmp_path)
    offloaded.save_pretrained(tmp_path / "again", max_shard_size="2KB")
    assert_equal(outputs(auto_class(offloaded).from_pretrained(tmp_path / "again")), in_one_piece(name, "outputs"))


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_auto_is_the_checkpoints(tmp_path, make, name, dtype):
    model = make(name).to(dtype)
    model.save_pretrained(tmp_path)
    # Not of `model`: `to` has rounded the rotary frequencies of Chronos-2, which are in no checkpoint, too.
    expected = outputs(auto_class(model).from_pretrained(tmp_path, dtype=dtype))
    for arguments in ({}, {"device_map": {"": "disk"}, "offload_folder": tmp_path / "disk"}):
        again = auto_class(model).from_pretrained(tmp_path, dtype="auto", **arguments)
        assert again.dtype == dtype
        assert_equal(outputs(again), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "disk"}], ids=str)
@FAMILIES
def test_pipelines_pass_the_device_map_on(tmp_path, make, in_one_piece, name, device_map):
    make(name).save_pretrained(tmp_path / "model")
    pipeline = BaseChronosPipeline.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "disk")
    )
    is_offloaded = device_map == {"": "disk"}
    assert any(parameter.is_meta for parameter in pipeline.inner_model.parameters()) == is_offloaded
    expected = in_one_piece(name, "generate" if is_offloaded else "drawn")
    assert_equal(forecasts(pipeline), expected, tolerance(name))


@pytest.mark.parametrize("name", MODELS)
def test_no_block_is_split(make, name):
    """A block, with its residual sums, is one module of the device map, however little memory there is."""
    model = make(name)
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    stacks = [getattr(model, stack) for stack in ("encoder", "decoder") if hasattr(model, stack)]
    assert len(blocks) == sum(len(stack.block) for stack in stacks) > 1
    largest = max(
        sum(p.numel() * p.element_size() for p in model.get_submodule(block).parameters()) for block in blocks
    )
    placed = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": 3 * largest}, no_split_module_classes=model._no_split_modules
    )
    assert "disk" in placed.values()
    assert not [name for name in placed for block in blocks if name.startswith(f"{block}.")]


def test_all_classes_know_their_blocks():
    blocks = {
        LowRankT5Model: "LowRankT5Block",
        LowRankT5EncoderModel: "LowRankT5Block",
        LowRankT5ForConditionalGeneration: "LowRankT5Block",
        LowRankChronosBoltModelForForecasting: "LowRankT5Block",
        LowRankChronos2Model: "LowRankChronos2Block",
    }
    for model_class, block in blocks.items():
        assert list(model_class._no_split_modules) == [block]


def test_inputs_belong_where_the_first_weight_is(make):
    for name in ("t5 mixed", "bolt", "chronos2"):
        model = make(name)
        assert model.device == CPU
        assert model.to("meta").device == torch.device("meta")  # nobody has it elsewhere
        assert model.main_input_name == ("input_ids" if name == "t5 mixed" else "context")


def test_a_hook_of_the_users_sees_what_it_would_with_generate(make, in_one_piece):
    """The decode loop reads weights itself; a model that somebody looks into, or changes, forecasts with `generate`."""
    model = make("t5 mixed")
    pipeline = pipeline_of(model)
    outputs(model)
    model(input_ids=torch.ones(1, 2, dtype=int), decoder_input_ids=torch.ones(1, 2, dtype=int), output_attentions=True)
    assert is_whole(model)  # transformers' own hooks, which record attention, are in nobody's way
    usual = in_one_piece("t5 mixed", "drawn")
    assert_equal(forecasts(pipeline), usual)
    handle = model.lm_head.register_forward_hook(lambda module, args, logits: logits.roll(1, dims=-1))
    changed = forecasts(ChronosPipeline(pipeline.tokenizer, ChronosModel(pipeline.model.config, model)))
    assert_equal(forecasts(pipeline), changed)
    handle.remove()
    assert_equal(forecasts(pipeline), usual)
    assert not torch.equal(changed[0], usual[0])


@torch.no_grad()
def test_a_cache_that_holds_a_series_once_is_continued_by_all_its_paths(make):
    """A caller repeats the mask for every path, as with stock models; the cache of `generate` has one row a series."""
    model = make("t5 mixed")
    tokens = torch.randint(2, SHAPE["vocab_size"], (3, 9))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    drawn = model.generate(tokens, attention_mask=mask, **GENERATION, return_dict_in_generate=True)
    inputs = {"input_ids": tokens.repeat_interleave(2, 0), "attention_mask": mask.repeat_interleave(2, 0)}
    expected = model(**inputs, decoder_input_ids=drawn.sequences).logits[:, -1]
    last = drawn.sequences[:, -1:]
    found = model(**inputs, decoder_input_ids=last, past_key_values=drawn.past_key_values).logits[:, -1]
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
