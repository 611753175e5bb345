"""Benchmark: what is counted is what the models do; what is reported is whole, labelled and reproducible.

No test asserts a speed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from chronos import BaseChronosPipeline
from chronos_models import dense_chronos2
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from hf_lowrank import LowRankT5ForConditionalGeneration
from hf_lowrank.benchmarking.benchmark import Benchmark, Comparison, Side, benchmark, benchmark_shape
from hf_lowrank.benchmarking.matmul_floor import (
    SQUARE,
    Machine,
    Product,
    cache_bytes,
    measure_floor,
    product_seconds,
    recorded_products,
    t5_products,
    ways_of,
)
from hf_lowrank.benchmarking.measurement import LoadedCheckpoint, Memory, cases
from hf_lowrank.checkpoints.published import SHAPES, build_checkpoint
from hf_lowrank.cli.app import app
from hf_lowrank.cli.options import integers
from hf_lowrank.models import decoding
from hf_lowrank.models.configuration_lowrank_t5 import attention_parameters
from hf_lowrank.timing import Case

CPU = torch.device("cpu")
SIZES = {"context_length": 12, "prediction_length": 5}


@pytest.fixture
def t5_models(tiny_shape, tiny_config, tiny_chronos_config, mixed_ranks) -> dict[str, torch.nn.Module]:
    """A dense Chronos-T5 and a low-rank one with every form in it."""
    chronos = {"chronos_config": asdict(tiny_chronos_config)}
    # Stock generation makes its cache for as many layers as the encoder has.
    dense_shape = {**tiny_shape, "num_decoder_layers": tiny_shape["num_layers"]}
    return {
        "dense": T5ForConditionalGeneration(T5Config(**dense_shape, **chronos)).eval(),
        "mixed": LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks, **chronos)).eval(),
    }


def generate(model: Any, num_samples: int, *, batch_size: int = 3) -> Any:
    """What ChronosPipeline asks of a model for `SIZES`: 12 time steps and EOS, 5 new tokens."""
    tokens = torch.randint(2, 64, (batch_size, SIZES["context_length"] + 1))
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        num_return_sequences=num_samples,
        min_new_tokens=SIZES["prediction_length"],
        max_new_tokens=SIZES["prediction_length"],
        pad_token_id=0,
        eos_token_id=1,
        return_dict_in_generate=True,
    )


def flops(products: list[Product]) -> int:
    return sum(product.count * product.flops for product in products)


def generated_flops(model: Any, num_samples: int) -> int:
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        generate(model, num_samples)
    return counter.get_total_flops()


def decoded_products(model: Any, num_samples: int, monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """The products of the decode loop with `SIZES`, with heads as they are and BLAS in place of oneDNN."""
    monkeypatch.setattr(decoding, "HEAD_MULTIPLE", 1)
    monkeypatch.setattr(decoding, "ONEDNN", None)
    tokens = torch.randint(2, 64, (3, SIZES["context_length"] + 1))
    arguments = {"num_samples": num_samples, "steps": SIZES["prediction_length"], "start": 0}
    return recorded_products(
        lambda: decoding.sample_paths(
            model, tokens, torch.ones_like(tokens), **arguments, sampling=decoding.Sampling()
        )
    )


# ---- Counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_counted_flops_are_those_of_generation_with_one_sample(t5_models, name):
    model = t5_models[name]
    products = t5_products(model.config, batch_size=3, num_samples=1, **SIZES)
    assert flops(products) == generated_flops(model, 1)


def test_cross_attention_keys_are_counted_once_a_series_where_stock_generation_repeats_them(t5_models):
    model = t5_models["dense"]
    counted = flops(t5_products(model.config, batch_size=3, num_samples=4, **SIZES))
    tokens, inner = SIZES["context_length"] + 1, model.config.num_heads * model.config.d_kv
    once = 3 * tokens * model.config.num_decoder_layers * 2 * 2 * model.config.d_model * inner
    assert generated_flops(model, 4) - counted == (4 - 1) * once


@pytest.mark.parametrize("num_samples", [1, 4])
def test_counted_flops_are_those_of_the_low_rank_model_with_any_number_of_samples(t5_models, num_samples):
    model = t5_models["mixed"]
    counted = flops(t5_products(model.config, batch_size=3, num_samples=num_samples, **SIZES))
    assert counted == generated_flops(model, num_samples)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_counted_flops_are_those_of_the_decode_loop(t5_models, monkeypatch, num_samples):
    model = t5_models["dense"]
    counted = flops(t5_products(model.config, batch_size=3, num_samples=num_samples, **SIZES))
    assert counted == flops(decoded_products(model, num_samples, monkeypatch))


def test_a_horizon_beyond_the_models_is_forecast_in_passes(t5_models):
    config = t5_models["mixed"].config
    sizes = {"batch_size": 2, "num_samples": 3}
    whole = flops(t5_products(config, context_length=39, prediction_length=11, **sizes))
    first = flops(t5_products(config, context_length=39, prediction_length=8, **sizes))
    second = flops(t5_products(config, context_length=40, prediction_length=3, **sizes))
    assert whole == first + second


@pytest.mark.parametrize(("name", "num_samples"), [("dense", 1), ("dense", 3), ("mixed", 1), ("mixed", 3)])
def test_cache_bytes_are_those_of_the_cache_after_generation(t5_models, name, num_samples):
    model = t5_models[name]
    cache = generate(model, num_samples, batch_size=2).past_key_values
    held = sum(
        tensor.numel() * tensor.element_size()
        for part in (cache.self_attention_cache, cache.cross_attention_cache)
        for layer in part.layers
        for tensor in (layer.keys, layer.values)
    )
    once, repeated = cache_bytes(model.config, num_samples=num_samples, bytes_per_number=4, **SIZES)
    assert held == 2 * (repeated if name == "dense" else once)
    assert (once < repeated) == (num_samples > 1)


def test_recorded_products_are_those_that_ran():
    layer = torch.nn.Linear(3, 5)
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)

    def forecast() -> None:
        layer(torch.randn(2, 7, 3))
        layer(torch.randn(2, 7, 3))
        torch.randn(6, 1, 2) @ torch.randn(6, 2, 4)
        torch.nn.functional.scaled_dot_product_attention(query, key, value)

    with torch.no_grad():
        products = recorded_products(forecast)
    assert {product.shape: product.count for product in products} == {
        (1, 14, 3, 5): 2,
        (6, 1, 2, 4): 1,
        (8, 7, 8, 9): 1,
        (8, 7, 9, 8): 1,
    }


@pytest.mark.parametrize("shape", ["bolt-tiny", "chronos-2"])
def test_recorded_products_have_the_flops_of_the_family(tmp_path, monkeypatch, shape):
    monkeypatch.setitem(SHAPES, shape, (32, 48, 2, 2))
    build_checkpoint(tmp_path, shape)
    checkpoint = LoadedCheckpoint.load(str(tmp_path), shape, dtype="float32", device="cpu")
    checkpoint.pipeline.inner_model.config._attn_implementation = "eager"
    for module in checkpoint.pipeline.inner_model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    case = Case(batch_size=3, context_length=64, prediction_length=16, num_samples=None)
    with FlopCounterMode(display=False) as counter:
        checkpoint.forecast(case, seed=0)
    eager = recorded_products(lambda: checkpoint.forecast(case, seed=0))
    assert flops(eager) == counter.get_total_flops() > 0


# ---- The floor -------------------------------------------------------------------------------------------------------


def test_the_floor_adds_up_count_times_time():
    machine = Machine(CPU, torch.float32, flops_per_second=100.0, bytes_per_second=10.0)
    compute, memory = Product(1, 50, 2, 3, count=4), Product(2, 1, 5, 2, count=3)
    machine.times.update({compute.shape: 7.0, memory.shape: 0.5})
    floor = measure_floor([compute, memory], machine)
    assert floor.flops == 4 * 600 + 3 * 40
    assert floor.seconds == 4 * 7.0 + 3 * 0.5
    assert floor.roofline_seconds == pytest.approx(4 * 600 / 100 + 3 * 2 * 5 * 2 * 4 / 10)


def test_a_shape_is_timed_once():
    machine = Machine(CPU, torch.float32, flops_per_second=1.0, bytes_per_second=1.0)
    product = Product(2, 3, 4, 5)
    assert 0 < machine.seconds(product) == machine.seconds(product)
    assert list(machine.times) == [product.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_batch_is_timed_in_part(monkeypatch, dtype):
    monkeypatch.setattr("hf_lowrank.benchmarking.matmul_floor.OPERAND_BYTES", 2**12)
    made: list[torch.Tensor] = []
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **options: made.append(draw(*args, **options)) or made[-1])
    assert product_seconds(Product(64, 16, 4, 16, operands=9), device=CPU, dtype=dtype) > 0
    assert len(made) == 2
    assert all(tensor.numel() * tensor.element_size() <= 2**12 for tensor in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_every_way_is_the_same_product(leading, dtype):
    left, rights = torch.randn(*leading, 5, 7).to(dtype), torch.randn(2, *leading, 4, 7).to(dtype)
    ways = list(ways_of(left, rights))
    assert len(ways) == (3 if not leading and dtype == torch.float32 else 2)
    for multiply, operands in ways:
        for right, operand in zip(rights, operands, strict=True):
            torch.testing.assert_close(multiply(operand), left @ right.mT)


# ---- Shapes with random weights --------------------------------------------------------------------------------------


def parameters(folder: Path) -> int:
    model = BaseChronosPipeline.from_pretrained(folder, dtype="float32", device_map="cpu").inner_model
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("shape", "millions"), [("t5-tiny", 8.39), ("t5-mini", 20.5), ("bolt-tiny", 8.65)])
def test_shapes_have_the_published_numbers_of_parameters(tmp_path, shape, millions):
    build_checkpoint(tmp_path, shape)
    assert parameters(tmp_path) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.25}, {"ratio": 0.25, "form": "latent"}])
def test_the_same_arguments_build_the_same_files(tmp_path, monkeypatch, options):
    monkeypatch.setitem(SHAPES, "t5-tiny", (32, 64, 1, 2))
    digests = []
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        state = torch.get_rng_state()
        build_checkpoint(tmp_path / name, "t5-tiny", seed=seed, dtype=torch.bfloat16, **options)
        assert torch.equal(torch.get_rng_state(), state)
        digests.append(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("form", ["per_head", "latent"])
@pytest.mark.parametrize("ratio", [0.001, 0.15, 0.5, 1.0])
def test_ranks_fit_the_ratio(tmp_path, monkeypatch, form, ratio):
    monkeypatch.setitem(SHAPES, "t5-tiny", (32, 64, 1, 2))
    build_checkpoint(tmp_path, "t5-tiny", ratio=ratio, form=form, feed_forward_ratio=0.5)
    config = json.loads((tmp_path / "config.json").read_text())
    (entry,) = config["attention_ranks"]["cross"]
    if form == "per_head":
        assert entry == dict.fromkeys(("qk", "vo"), max(1, round(64 * ratio)))
    else:
        weights = [
            attention_parameters(dict.fromkeys(entry, rank), d_model=32, num_heads=2)
            for rank in (entry["latent"], entry["latent"] + 1)
        ]
        dense = 4 * 32 * 2 * 64
        assert weights[0] <= ratio * dense or entry["latent"] == 1
        assert weights[1] > ratio * dense or entry["latent"] == 32
    assert config["feed_forward_ranks"]["decoder"] == [{"width": 32, "wi": None, "wo": None}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "t5-huge"}, r"shape must be one of t5-tiny, .*; found 't5-huge'"),
        ({"shape": "t5-tiny", "ratio": 0.0}, r"ratio must be in \(0, 1\], found 0.0"),
        ({"shape": "t5-tiny", "ratio": 1.5}, r"ratio must be in \(0, 1\], found 1.5"),
        ({"shape": "t5-tiny", "feed_forward_ratio": -1.0}, r"feed_forward_ratio must be in \(0, 1\], found -1.0"),
        ({"shape": "t5-tiny", "ratio": 0.5, "form": "thin"}, r"form must be one of per_head, latent; found 'thin'"),
    ],
)
def test_shapes_that_cannot_be_built(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


# ---- The run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_shapes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "t5-tiny", (32, 64, 1, 2))
        patch.setitem(SHAPES, "bolt-tiny", (32, 64, 1, 2))
        patch.setitem(SQUARE, "cpu", 256)  # no rate is looked at here
        yield


@pytest.fixture(scope="module")
def t5_run(small_shapes, tmp_path_factory) -> tuple[dict[str, Any], str]:
    """The JSON and the output of one run of the command."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    command = ["bench", "--shape", "t5-tiny", "--ratio", "0.25", "--feed-forward-ratio", "0.5", "--json", str(file)]
    command += ["--context-length", "512", "--prediction-length", "2", "--batch-size", "8", "--num-samples", "20"]
    command += ["--threads", "1", "--repeats", "1", "--device", "cpu"]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"]
    return json.loads(file.read_text()), result.stdout


def test_the_json_has_ratios_machine_and_absolute_figures(t5_run):
    figures, _ = t5_run
    case = {"batch_size": 8, "context_length": 512, "prediction_length": 2, "num_samples": 20}
    assert [row["case"] for row in figures["results"]] == [case]
    for level in (figures, *figures["results"]):
        for name in ("time_ratio", "memory_ratio", "floor_ratio", "lean_time_ratio", "lean_memory_ratio"):
            assert 0 < level[name]["min"] <= level[name]["median"] <= level[name]["max"]
    row = figures["results"][0]
    ours, theirs, lean = row["model"], row["against"], row["against_lean"]
    assert [side["pipeline"] for side in (ours, theirs, lean)] == [
        "LowRankChronosPipeline",
        "ChronosPipeline",
        "LowRankChronosPipeline",
    ]
    assert row["lean_time_ratio"]["median"] == lean["seconds"][0] / theirs["seconds"][0]
    assert row["lean_memory_ratio"]["median"] == lean["memory"][0]["peak"] / theirs["memory"][0]["peak"] < 1
    assert lean["product_flops"] == theirs["product_flops"]
    assert row["time_ratio"]["median"] == ours["seconds"][0] / theirs["seconds"][0]
    assert row["memory_ratio"]["median"] == ours["memory"][0]["peak"] / theirs["memory"][0]["peak"]
    assert row["floor_ratio"]["median"] == ours["seconds"][0] / ours["floor_seconds"]
    for name in ("parameters", "bytes_on_disk", "cache_bytes", "cache_bytes_repeated", "product_flops"):
        assert 0 < ours[name] < theirs[name]
    assert (ours["name"], theirs["name"]) == ("t5-tiny per_head 0.25, feed-forward 0.5", "t5-tiny")
    assert figures["machine"]["threads"] == 1
    assert figures["machine"]["torch"] == torch.__version__
    assert {"processor", "cores", "device", "dtype", "transformers", "chronos-forecasting"} <= set(figures["machine"])


def test_the_table_has_a_block_a_case(t5_run):
    figures, output = t5_run
    assert len(re.findall("peak memory", output)) == len(figures["results"])
    assert f"{figures['results'][0]['against']['parameters']:,}" in output


def test_memory_holds_at_least_the_cache_and_the_weights(t5_run):
    figures, _ = t5_run
    for key, kept in (("against", "cache_bytes_repeated"), ("against_lean", "cache_bytes")):
        side = figures["results"][0][key]
        (memory,) = side["memory"]
        assert memory["working"] > 8 * side[kept] > 4 * 2**20
        assert memory["peak"] > memory["working"]
        assert memory["load_seconds"] > 0


def test_the_grid_is_every_combination():
    assert cases([1, 2], [16], [4], [3, 5]) == [
        Case(1, 16, 4, 3),
        Case(1, 16, 4, 5),
        Case(2, 16, 4, 3),
        Case(2, 16, 4, 5),
    ]
    assert cases([1], [16, 20], [4]) == [Case(1, 16, 4, None), Case(1, 20, 4, None)]


def test_quantile_models_take_no_samples(small_shapes, tmp_path, monkeypatch):
    build_checkpoint(tmp_path, "bolt-tiny")
    with pytest.raises(ValueError, match="num_samples is for models that sample"):
        benchmark(str(tmp_path), str(tmp_path), num_samples=[20])
    monkeypatch.setattr("hf_lowrank.benchmarking.benchmark.MEMORY_REPEATS", 0)
    result = benchmark_shape(
        "bolt-tiny", batch_size=[2], context_length=[32], prediction_length=[4], repeats=1, threads=1
    )
    (comparison,) = result.comparisons
    assert comparison.case == Case(2, 32, 4, None)
    assert comparison.model.pipeline == "ChronosBoltPipeline"
    assert comparison.against_lean is None
    assert comparison.model.cache_bytes is None
    assert result.to_dict()["memory_ratio"] is None
    assert len(result.tables()) == 2
    assert comparison.model.product_flops == comparison.against.product_flops > 0


def test_threads_are_put_back(small_shapes, tmp_path):
    build_checkpoint(tmp_path, "t5-tiny")
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"context_length must be at most 512, .*; found 513"):
        benchmark(str(tmp_path), str(tmp_path), context_length=[16, 513], threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, r"dtype must be one of float32, bfloat16, float16, found 'float64'"),
        ({"dtype": "auto"}, r"dtype must be one of float32, bfloat16, float16, found 'auto'"),
        ({"device": "cpu:0"}, r"device must be one of cpu, cuda to be measured, found 'cpu:0'"),
        ({"device": "abacus"}, r"device must be such as 'cpu' or 'cuda', found 'abacus'"),
        ({"repeats": 0}, "repeats must be a positive integer, found 0"),
        ({"threads": 0}, "threads must be a positive integer, found 0"),
        ({"batch_size": [8, 0]}, r"batch_size must be positive integers, found \[8, 0\]"),
        ({"prediction_length": []}, "prediction_length must be positive integers"),
        ({"num_samples": [-1]}, "num_samples must be positive integers"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark("no/model", "no/model", **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either MODEL with --against, or --shape; found neither"),
        (["model", "--shape", "t5-tiny"], "found 'model' and --shape 't5-tiny'"),
        (["model"], "MODEL needs --against"),
        (["model", "--against", "dense", "--ratio", "0.5"], "ratio: only with --shape"),
        (["--shape", "t5-tiny", "--against", "dense"], "--against goes with MODEL"),
        (["--shape", "t5-tiny", "--ratio", "2"], "ratio must be in (0, 1], found 2.0"),
        (
            ["--shape", "t5-tiny", "--batch-size", "1,x"],
            "batch_size must be integers separated by commas, found '1,x'",
        ),
        (["--shape", "t5-tiny", "--json", "no/such/file.json"], "--json must be a .json file in a folder that exists"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert message in result.output


def test_a_dense_chronos2_is_measured_by_group_too(tmp_path, monkeypatch):
    dense_chronos2().save_pretrained(tmp_path)
    monkeypatch.setattr("hf_lowrank.benchmarking.benchmark.MEMORY_REPEATS", 0)
    lengths = {"batch_size": [4], "context_length": [30], "prediction_length": [5]}
    result = benchmark(str(tmp_path), str(tmp_path), **lengths, repeats=1, threads=1)
    (comparison,) = result.comparisons
    assert [side.pipeline for side in comparison.sides] == [*["Chronos2Pipeline"] * 2, "LowRankChronos2Pipeline"]
    assert comparison.against_lean.parameters == comparison.against.parameters
    assert comparison.against_lean.product_flops < comparison.against.product_flops
    assert "against, in LowRankChronos2Pipeline" in result.tables()[0].headings


def test_lists_of_integers_are_joined():
    assert integers("batch_size", ["1,8", "32"]) == [1, 8, 32]


def side(seconds: tuple[float, ...], peaks: tuple[int | None, ...]) -> Side:
    memory = tuple(Memory(peak, peak, 1.0) for peak in peaks)
    return Side("name", "ChronosPipeline", 10, 40, seconds, memory, 2**20, 2**21, 100, 0.5, 0.25)


def test_ratios_are_taken_repeat_by_repeat_and_pooled_over_cases():
    slow, fast = side((4.0, 8.0), (400,)), side((1.0, 4.0), (100,))
    case = Case(1, 2, 3, 4)
    result = Benchmark({"threads": 1}, (Comparison(case, fast, slow), Comparison(case, slow, fast))).to_dict()
    assert result["results"][0]["time_ratio"] == {"median": 0.375, "min": 0.25, "max": 0.5}
    assert result["time_ratio"] == {"median": 1.25, "min": 0.25, "max": 4.0}
    assert result["results"][0]["floor_ratio"] == {"median": 5.0, "min": 2.0, "max": 8.0}
    assert result["memory_ratio"]["max"] == 4.0
    assert "lean_time_ratio" not in result


def test_the_second_checkpoint_is_compared_in_both_pipelines():
    stock, lean = side((4.0, 8.0), (400,)), side((2.0, 2.0), (100,))
    comparison = Comparison(Case(1, 2, 3, 4), side((1.0, 1.0), (40,)), stock, lean)
    result = Benchmark({"processor": "x", "threads": 1, "device": "CPU", "dtype": "float32"}, (comparison,))
    found = result.to_dict()
    assert found["time_ratio"] == {"median": 0.1875, "min": 0.125, "max": 0.25}
    assert found["lean_time_ratio"] == {"median": 0.375, "min": 0.25, "max": 0.5}
    assert found["lean_memory_ratio"]["median"] == 0.25
    assert len(result.tables()[0].headings) == 6
    assert result._repr_html_().count("<table>") == 2


def test_memory_that_the_system_does_not_tell_is_left_out():
    known, unknown = side((1.0,), (100,)), side((1.0,), (None,))
    machine = {"processor": "x", "threads": 1, "device": "CPU", "dtype": "float32"}
    result = Benchmark(machine, (Comparison(Case(1, 2, 3, None), unknown, known),))
    assert result.to_dict()["memory_ratio"] is None
    assert len(result.tables()) == 2


def test_what_disturbed_a_run_is_said() -> None:
    quiet, beaten = side((4.0, 8.0), (400,)), side((0.4, 0.6), (400,))
    case = Case(1, 2, 3, None)
    machine = {"processor": "x", "threads": 1, "device": "CPU", "dtype": "float32"}
    assert Benchmark(machine, (Comparison(case, quiet, quiet),)).to_dict()["remarks"] == []
    result = Benchmark(machine, (Comparison(case, quiet, beaten, None, 3, 1),)).to_dict()
    assert (result["results"][0]["repeated_rounds"], result["results"][0]["disturbed_rounds"]) == (3, 1)
    disturbed, floor = result["remarks"]
    assert "disturbed 3 rounds, which were repeated; 1 of those that count were disturbed too" in disturbed
    assert "beats its floor (time / floor 0.80)" in floor


def test_a_floor_is_timed_again_where_it_was_beaten(monkeypatch) -> None:
    machine, product = Machine(CPU, torch.float32, 1.0, 1.0), Product(1, 4, 4, 4)
    seconds = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr("hf_lowrank.benchmarking.matmul_floor.product_seconds", lambda *_, **__: next(seconds))
    assert machine.seconds(product) == 3
    for _ in range(2):
        machine.time_again([product])
        assert machine.seconds(product) == 1
