"""Chronos' own pipelines on low-rank models: found by themselves, equal to the stock ones at full rank, tunable."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chronos.chronos2.pipeline
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline, Chronos2Model, Chronos2Pipeline, ChronosBoltPipeline
from chronos_models import (
    BOLT_RANKS,
    CHRONOS2_RANKS,
    DECILES,
    bolt,
    chronos2,
    dense_bolt,
    dense_chronos2,
    full_rank,
    series,
)
from hub_server import serve_this_process
from torch.testing import assert_close
from transformers import PreTrainedModel, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save

from hf_lowrank import LowRankChronos2Model, LowRankChronos2Pipeline, LowRankChronosBoltPipeline
from hf_lowrank.models.pipeline_lowrank_chronos import chronos_copies_as, is_adapter

STOCK = {"bolt": ChronosBoltPipeline, "chronos2": Chronos2Pipeline}
LOW_RANK = {"bolt": LowRankChronosBoltPipeline, "chronos2": LowRankChronos2Pipeline}
FAMILIES = pytest.mark.parametrize("family", ["bolt", "chronos2"])
TOLERANCE = {"bolt": 0.0, "chronos2": 1e-4}  # group attention is computed in another order
PAIRS = "encoder.block.0.layer.0.self_attention.pairs"

pytestmark = pytest.mark.filterwarnings("ignore:We recommend keeping prediction length")


def mixed(family: str, **changes: Any) -> PreTrainedModel:
    return bolt(**BOLT_RANKS, **changes) if family == "bolt" else chronos2(**CHRONOS2_RANKS, **changes)


def both(family: str) -> tuple[BaseChronosPipeline, BaseChronosPipeline]:
    """The stock pipeline of a dense model, and ours of the same model at full rank."""
    dense = dense_bolt() if family == "bolt" else dense_chronos2()
    return STOCK[family](dense), LOW_RANK[family](full_rank(dense))


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Equal to the last bit, or to a tolerance, through lists, tuples and data frames."""
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=not tolerance, rtol=tolerance, atol=tolerance)
    elif isinstance(expected, torch.Tensor):
        assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected):
            assert_same(one, other, tolerance)


def frame(columns: list[str], length: int, start: str = "2024-01-01") -> pd.DataFrame:
    """Three hourly series in long format."""
    random = np.random.default_rng(len(columns) + length)
    parts = []
    for item in ("a", "b", "c"):
        values = {name: random.normal(size=length).cumsum() for name in columns}
        parts.append(
            pd.DataFrame({"item_id": item, "timestamp": pd.date_range(start, periods=length, freq="h"), **values})
        )
    return pd.concat(parts, ignore_index=True)


# Loading


@FAMILIES
@pytest.mark.parametrize("arguments", [{}, {"device_map": "cpu"}, {"dtype": torch.float32}], ids=str)
def test_each_way_of_loading_gives_the_compressed_model(tmp_path, family, arguments):
    model = mixed(family)
    model.save_pretrained(tmp_path)
    inputs = list(series())
    expected = LOW_RANK[family](model).predict(inputs, prediction_length=8)
    for loader, wanted in (
        (BaseChronosPipeline, LOW_RANK[family]),
        (LOW_RANK[family], LOW_RANK[family]),
        (STOCK[family], STOCK[family]),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline = loader.from_pretrained(tmp_path, **arguments)
        assert type(pipeline) is wanted
        assert type(pipeline.model) is type(model)
        assert pipeline.inner_model is pipeline.model
        tolerance = TOLERANCE[family] if wanted is STOCK[family] else 0.0
        assert_same(pipeline.predict(inputs, prediction_length=8), expected, tolerance)


@FAMILIES
@pytest.mark.parametrize("name", ["bfloat16", torch.bfloat16])
def test_dtype_is_passed_on(tmp_path, family, name):
    mixed(family).save_pretrained(tmp_path)
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path, dtype=name, device_map="auto")
    assert pipeline.model.dtype == torch.bfloat16
    quantiles, mean = pipeline.predict_quantiles(list(series()), prediction_length=8)
    assert all(torch.isfinite(one).all() for one in (*quantiles, *mean))
    assert mean[0].dtype == torch.float32


def test_a_dense_bolt_is_refused_with_the_way_out(tmp_path):
    dense, _ = both("bolt")
    dense.model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"must hold a model of type 'lowrank_chronos_bolt', found 't5'; BaseChronosPipeline"
    ):
        LowRankChronosBoltPipeline.from_pretrained(tmp_path)


def test_a_dense_chronos2_is_forecast_with_by_group(tmp_path):
    stock, _ = both("chronos2")
    stock.model.save_pretrained(tmp_path)
    ours = LowRankChronos2Pipeline.from_pretrained(tmp_path)
    assert type(ours.model) is LowRankChronos2Model
    calls: list[str] = []
    attention = ours.model.encoder.block[0].layer[1].self_attention
    for name in ("q", "v"):
        attention.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    inputs = list(series())
    assert_same(ours.predict(inputs), stock.predict(inputs), TOLERANCE["chronos2"])
    assert set(calls) == {"v"}
    assert not ours.model.encoder.by_group  # whoever looks into the model sees all of it
    ours.embed(inputs)
    assert set(calls) == {"q", "v"}


@FAMILIES
def test_the_other_family_is_refused(tmp_path, family):
    mixed(family).save_pretrained(tmp_path)
    other = {"bolt": "chronos2", "chronos2": "bolt"}[family]
    with pytest.raises(ValueError, match=r"must hold a model of type '\w+', found 'lowrank_chronos"):
        LOW_RANK[other].from_pretrained(tmp_path)


# Forecasts


@FAMILIES
@pytest.mark.parametrize("horizon", [None, 4, 23], ids=["default", "short", "long"])
def test_forecasts_are_the_stock_pipelines(family, horizon):
    stock, ours = both(family)
    inputs = list(series())
    tolerance = TOLERANCE[family]
    assert_same(ours.predict(inputs, horizon), stock.predict(inputs, horizon), tolerance)
    for levels in (DECILES, [0.25, 0.5, 0.85]):
        arguments = {"prediction_length": horizon, "quantile_levels": levels}
        found, expected = (one.predict_quantiles(inputs, **arguments) for one in (ours, stock))
        assert_same(found, expected, tolerance)
    assert_same(ours.embed(inputs), stock.embed(inputs))


def test_bolts_inputs_of_every_shape():
    stock, ours = both("bolt")
    for inputs in (torch.randn(30), torch.randn(3, 47), [torch.randn(5), torch.randn(60)]):
        assert_same(ours.predict(inputs), stock.predict(inputs))


@FAMILIES
def test_a_forecast_longer_than_the_models_can_be_forbidden(family):
    _, ours = both(family)
    with pytest.raises(ValueError, match="limit_prediction_length=False"):
        ours.predict(list(series()), prediction_length=23, limit_prediction_length=True)


@pytest.mark.parametrize("cross_learning", [False, True])
@pytest.mark.parametrize("horizon", [9, 33])
def test_multivariate_and_mixed_groups(cross_learning, horizon):
    stock, ours = both("chronos2")
    # Groups of one, three and two series; a batch of four splits them.
    inputs = [torch.randn(30), torch.randn(3, 44), torch.randn(2, 17)]
    arguments = {"prediction_length": horizon, "cross_learning": cross_learning, "batch_size": 4}
    assert_same(ours.predict(inputs, **arguments), stock.predict(inputs, **arguments), TOLERANCE["chronos2"])
    batch = torch.randn(2, 3, 20)
    assert_same(
        ours.predict(batch, horizon, cross_learning=cross_learning),
        stock.predict(batch, horizon, cross_learning=cross_learning),
        TOLERANCE["chronos2"],
    )


@pytest.mark.parametrize("horizon", [9, 33])
def test_past_and_future_covariates(horizon):
    stock, ours = both("chronos2")
    random = np.random.default_rng(0)
    inputs = [
        {
            "target": random.normal(size=length),
            "past_covariates": {
                "past": random.normal(size=length),
                "known": random.normal(size=length),
                "kind": random.choice(["low", "high"], size=length),
            },
            "future_covariates": {
                "known": random.normal(size=horizon),
                "kind": random.choice(["low", "high"], size=horizon),
            },
        }
        for length in (25, 40, 31)
    ]
    expected = stock.predict(inputs, prediction_length=horizon)
    assert_same(ours.predict(inputs, prediction_length=horizon), expected, 1e-3)
    for entry in inputs:
        entry["future_covariates"]["known"] += 5.0
    assert not torch.equal(ours.predict(inputs, prediction_length=horizon)[0], expected[0])  # they are read


@FAMILIES
def test_data_frames(family):
    stock, ours = both(family)
    past = frame(["target"], 30)
    found, expected = (one.predict_df(past, prediction_length=7) for one in (ours, stock))
    assert_same(found, expected, TOLERANCE[family])


def test_data_frames_with_covariates_and_two_targets():
    stock, ours = both("chronos2")
    past = frame(["one", "two", "past", "known"], 30)
    future = frame(["known"], 7, start="2024-01-02 06:00")
    for targets in ("one", ["one", "two"]):
        arguments = {"future_df": future, "target": targets, "prediction_length": 7, "quantile_levels": [0.1, 0.5]}
        assert_same(ours.predict_df(past, **arguments), stock.predict_df(past, **arguments), TOLERANCE["chronos2"])


# Fine-tuning


def fit(pipeline: Chronos2Pipeline, folder: Path, **arguments: Any) -> Chronos2Pipeline:
    """Three steps on three tasks of two series.

    In groups of one, group attention's q and k have gradients of rounding noise, which Adam makes into steps of full size.
    """
    time = torch.arange(70)
    waves = [torch.stack([torch.sin(time / (3.0 + i)), torch.cos(time / (5.0 + i))]) for i in range(3)]
    settings = {"prediction_length": 7, "num_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True}
    return pipeline.fit(waves, output_dir=folder, **{**settings, **arguments})


class SameAdapters(TrainerCallback):
    """Before training, adapters with the same weights in every model: peft draws them at random."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora" in name:
                    parameter.normal_(std=0.1, generator=generator)
                    self.weights[name] = parameter.clone()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_fit_is_the_stock_one_at_full_rank(tmp_path, mode):
    if mode == "lora":
        pytest.importorskip("peft")
    stock, ours = both("chronos2")
    adapters = SameAdapters()
    expected, found = (
        fit(pipeline, tmp_path / name, finetune_mode=mode, callbacks=[adapters])
        for name, pipeline in (("stock", stock), ("ours", ours))
    )
    assert type(found) is LowRankChronos2Pipeline
    assert found.inner_model is found.model
    state = found.model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)  # gradients are summed in another order
    query = "encoder.block.0.layer.0.self_attention.q.weight"
    before = adapters.weights if mode == "lora" else {query: stock.model.state_dict()[query]}
    assert before
    for name, tensor in before.items():
        assert not torch.equal(state[name], tensor)
    expected.model.eval()  # stock leaves dropout on
    inputs = list(series())
    assert_same(found.predict(inputs), expected.predict(inputs), tolerance=1e-3)


def test_fit_takes_every_argument_of_the_stock_one(tmp_path):
    peft = pytest.importorskip("peft")
    waves = [torch.sin(torch.arange(60) / (3.0 + i)) for i in range(3)]
    arguments = {
        "inputs": waves,
        "prediction_length": 7,
        "validation_inputs": waves[:1],
        "finetune_mode": "lora",
        "lora_config": peft.LoraConfig(r=2, target_modules=["self_attention.q"]),
        "context_length": 20,
        "learning_rate": 1e-3,
        "num_steps": 2,
        "batch_size": 4,
        "output_dir": tmp_path,
        "min_past": 9,
        "finetuned_ckpt_name": "tuned",
        "callbacks": [SameAdapters()],
        "remove_printer_callback": True,
        "disable_data_parallel": False,
    }
    upstream = inspect.signature(Chronos2Pipeline.fit).parameters
    named = {name for name, one in upstream.items() if one.kind is not inspect.Parameter.VAR_KEYWORD} - {"self"}
    assert set(arguments) == named, (
        f"Chronos2Pipeline.fit of chronos-forecasting {chronos.__version__} has other arguments: {set(arguments) ^ named}. "
        "They are passed on; see whether our `fit` still makes of them what the stock one does, and add them here."
    )
    tuned = LowRankChronos2Pipeline(chronos2(**CHRONOS2_RANKS)).fit(**arguments, disable_tqdm=True, seed=3)
    assert tuned.model.peft_config["default"].r == 2
    assert (tmp_path / "tuned" / "adapter_config.json").exists()


# What stands in the body of `Chronos2Pipeline.fit`, by the versions of chronos-forecasting that have it.
STOCK_FITS = {"2057348a57a7e660": "2.3.0 to 2.3.2"}


def test_the_stock_fit_is_one_that_is_known():
    """Our `fit` runs the stock one, so a change of it is one of ours."""
    source = textwrap.dedent(inspect.getsource(Chronos2Pipeline.fit))
    body = ast.parse(source).body[0].body
    code = "\n".join(source.splitlines()[body[1].lineno - 1 :])  # after the docstring
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    assert digest in STOCK_FITS, (
        f"Chronos2Pipeline.fit of chronos-forecasting {chronos.__version__} is not that of {' or '.join(STOCK_FITS.values())}. "
        "LowRankChronos2Pipeline.fit runs it with two expectations: it makes the copy that it trains as Chronos2Model(config), by that global "
        "name of its module and before anything else that builds a model; and it answers with a pipeline whose `model` is the copy, in `train()` "
        f"or not. Read it, run the other tests of fine-tuning, and if both hold, add {digest!r} to STOCK_FITS."
    )


def test_fit_tunes_a_copy_of_a_compressed_model(tmp_path):
    pipeline = LowRankChronos2Pipeline(chronos2(**CHRONOS2_RANKS, dropout_rate=0.1))
    before = {name: tensor.clone() for name, tensor in pipeline.model.state_dict().items()}
    tuned = fit(pipeline, tmp_path, prediction_length=18)
    for name, tensor in pipeline.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    after = tuned.model.state_dict()
    assert torch.equal(after[PAIRS], before[PAIRS])
    assert not torch.equal(
        after["encoder.block.0.layer.0.self_attention.q.weight"],
        before["encoder.block.0.layer.0.self_attention.q.weight"],
    )
    assert tuned.model.config.attention_ranks == CHRONOS2_RANKS["attention_ranks"]
    assert tuned.model.chronos_config.max_output_patches == 4  # 18 steps are four patches of five
    again = BaseChronosPipeline.from_pretrained(tmp_path / "finetuned-ckpt")
    assert type(again) is LowRankChronos2Pipeline
    inputs = list(series())
    assert_same(again.predict(inputs), tuned.predict(inputs))  # and dropout is off


def test_fit_with_validation(tmp_path):
    pipeline = LowRankChronos2Pipeline(chronos2(**CHRONOS2_RANKS))
    tuned = fit(pipeline, tmp_path, validation_inputs=[torch.sin(torch.arange(60) / 3.0)])
    assert type(tuned.model) is LowRankChronos2Model


class Watch(TrainerCallback):
    """Looks at chronos' module while a model trains, and may stop that with an error."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.seen = error, None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seen = dict(vars(chronos.chronos2.pipeline))
        if self.error is not None:
            raise self.error


def test_chronos_is_as_it_was_while_and_after_it_trains(tmp_path):
    before, watch = dict(vars(chronos.chronos2.pipeline)), Watch()
    fit(LowRankChronos2Pipeline(chronos2(**CHRONOS2_RANKS)), tmp_path, num_steps=1, callbacks=[watch])
    for names in (watch.seen, vars(chronos.chronos2.pipeline)):
        assert names.keys() == before.keys()
        assert all(names[name] is value for name, value in before.items())


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"lora_config": {}}),  # before the copy is made
        (ValueError, {"min_past": 100}),  # before it is trained
        (KeyboardInterrupt, {"callbacks": [Watch(KeyboardInterrupt())]}),
        (RuntimeError, {"callbacks": [Watch(RuntimeError("from the callback"))]}),
    ],
    ids=["arguments", "data", "interrupted", "training"],
)
def test_chronos_is_as_it_was_after_an_error(tmp_path, error, arguments):
    before = dict(vars(chronos.chronos2.pipeline))
    pipeline = LowRankChronos2Pipeline(chronos2(**CHRONOS2_RANKS))
    with pytest.raises(error) as raised:
        fit(pipeline, tmp_path, **arguments)
    assert "chronos-forecasting" not in str(raised.value)
    now = vars(chronos.chronos2.pipeline)
    assert all(now[name] is value for name, value in before.items())
    assert isinstance(fit(pipeline, tmp_path, num_steps=1), LowRankChronos2Pipeline)  # nor is anything locked


def test_threads_get_copies_of_their_own_class():
    def copy(number: int) -> int:
        with chronos_copies_as(lambda config: (number, config)):
            time.sleep(0.005)
            return chronos.chronos2.pipeline.Chronos2Model(None)[0]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy, range(32))) == list(range(32))
    assert chronos.chronos2.pipeline.Chronos2Model is Chronos2Model


def loads_dense(self: Chronos2Pipeline) -> Chronos2Pipeline:
    model = chronos.chronos2.Chronos2Model(self.model.config)
    model.load_state_dict(self.model.state_dict())
    return Chronos2Pipeline(model)


def answers_dense(self: Chronos2Pipeline) -> Chronos2Pipeline:
    return Chronos2Pipeline(dense_chronos2())


@pytest.mark.parametrize("changed", [loads_dense, answers_dense])
@pytest.mark.parametrize("module", [chronos.chronos2.pipeline, chronos.utils], ids=["with the name", "without it"])
def test_a_stock_fit_that_copies_in_another_way_is_found_out(monkeypatch, changed, module):
    monkeypatch.setattr(changed, "__module__", module.__name__)
    monkeypatch.setattr(Chronos2Pipeline, "fit", changed)
    pipeline = LowRankChronos2Pipeline(chronos2(**CHRONOS2_RANKS))
    with pytest.raises(RuntimeError, match=r"chronos-forecasting \d.* cannot fine-tune a LowRankChronos2Model"):
        pipeline.fit()
    assert chronos.chronos2.pipeline.Chronos2Model is Chronos2Model


def test_a_fit_that_copies_any_class_is_fine(monkeypatch):
    monkeypatch.setattr(Chronos2Pipeline, "fit", lambda self: Chronos2Pipeline(type(self.model)(self.model.config)))
    tuned = LowRankChronos2Pipeline(chronos2(**CHRONOS2_RANKS)).fit()
    assert (type(tuned), type(tuned.model)) == (LowRankChronos2Pipeline, LowRankChronos2Model)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = chronos2(**CHRONOS2_RANKS)
    model.save_pretrained(tmp_path / "model")
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in pipeline.model.state_dict().items()}
    tuned = fit(pipeline, tmp_path, finetune_mode="lora")
    assert isinstance(tuned.model, peft.PeftModel)
    assert type(tuned) is LowRankChronos2Pipeline
    trained, total = tuned.model.get_nb_trainable_parameters()
    assert 0 < trained < total / 2
    for name, tensor in pipeline.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    inputs = list(series())
    expected = tuned.predict(inputs)
    assert not torch.equal(expected[0], pipeline.predict(inputs)[0])
    again = LowRankChronos2Pipeline.from_pretrained(tmp_path / "finetuned-ckpt")
    assert type(again.model) is LowRankChronos2Model
    for one, other in zip(again.predict(inputs), expected):
        assert_close(one, other, rtol=1e-3, atol=1e-3)  # merged


def test_an_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        LowRankChronos2Pipeline.from_pretrained(tmp_path)


def test_adapters_are_told_from_models(tmp_path, monkeypatch):
    """In a folder, on a Hub, and offline from what was cached."""
    for name, file in (("base", "config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(str(tmp_path / "base"))
    assert not is_adapter(tmp_path / "nothing")

    with serve_this_process({}, tmp_path, monkeypatch) as hub:
        for name in ("base", "adapter"):
            hub.publish(f"ann/{name}", tmp_path / name)
        for name, wanted in (("ann/adapter", True), ("ann/base", False), ("ann/nothing", False), ("no name", False)):
            assert is_adapter(name) is wanted
        asked = len(hub.requests)
        assert is_adapter("ann/adapter")
        assert not is_adapter("ann/base")
        assert len(hub.requests) == asked  # the cache knows, also of what is not there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, wanted in (("ann/adapter", True), ("ann/base", False), ("ann/nothing", False)):
        assert is_adapter(name) is wanted


# From files that travel with the weights

# What a machine without this package runs: folders to load, and where to put the forecasts of the first argument's series.
ELSEWHERE = """
import sys

import torch
from chronos import BaseChronosPipeline

context, *folders = sys.argv[1:]
for folder in folders:
    pipeline = BaseChronosPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipeline).__module__.startswith("transformers_modules."), type(pipeline)
    assert type(pipeline.model).__module__.startswith("transformers_modules."), type(pipeline.model)
    torch.save(pipeline.predict(list(torch.load(context))), f"{folder}/forecast.pt")
    if hasattr(pipeline, "fit"):
        waves = [torch.sin(torch.arange(70) / 3.0)]
        tuned = pipeline.fit(waves, 7, num_steps=1, batch_size=4, output_dir=f"{folder}/tuned", disable_tqdm=True)
        assert type(tuned.model) is type(pipeline.model)
assert "hf_lowrank" not in sys.modules
"""


def test_the_code_travels_with_the_weights(tmp_path):
    """Without this package, `trust_remote_code=True` is enough: pipeline, model, fine-tuning."""
    context = series()
    torch.save(context, tmp_path / "context.pt")
    expected = {}
    for family, name in (("bolt", "LowRankChronosBolt"), ("chronos2", "LowRankChronos2")):
        source = mixed(family)
        source.config.auto_map = {
            "AutoConfig": f"configuration_lowrank_chronos.{name}Config",
            "AutoModel": f"modeling_lowrank_chronos.{type(source).__name__}",
        }
        source.save_pretrained(tmp_path / family)
        custom_object_save(source, tmp_path / family)
        expected[family] = LOW_RANK[family](source).predict(list(context))
    hub = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            ELSEWHERE,
            str(tmp_path / "context.pt"),
            *(str(tmp_path / family) for family in expected),
        ],
        env=os.environ | hub,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for family, forecast in expected.items():
        # Another process may have another number of threads, and round otherwise.
        assert_same(torch.load(tmp_path / family / "forecast.pt"), forecast, tolerance=1e-4)
