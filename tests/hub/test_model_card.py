"""render_card: it says what the model is, for every family, and what is in the files it is given."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import chronos_models
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import GenerationConfig, PreTrainedModel

from hf_lowrank import (
    LowRankT5EncoderModel,
    LowRankT5ForConditionalGeneration,
    compress_pretrained,
    render_card,
    summarize,
)
from hf_lowrank.benchmarking.benchmark import Benchmark, Comparison, Side
from hf_lowrank.benchmarking.measurement import Memory
from hf_lowrank.checkpoints.loading import REFERENCES
from hf_lowrank.timing import Case

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")


@pytest.fixture(scope="module")
def compressed(dense_t5, tiny_chronos_config) -> PreTrainedModel:
    dense = dense_t5(num_layers=2, num_decoder_layers=2)
    dense.config.chronos_config = vars(tiny_chronos_config).copy()
    dense.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    model = compress_pretrained(dense, ratio=0.5, form={"cross": "latent"}, multiple_of=2, calibration=None)
    model.config.compression["source"] = "amazon/chronos-t5-tiny"  # as if it had come from the Hub
    return model


def metadata(card: ModelCard) -> dict[str, Any]:
    """The YAML block as the Hub reads it."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])


def tables(card: ModelCard) -> list[list[list[str]]]:
    """Every table of the card: rows of cells, without the ruler."""
    found = re.findall(r"(?:^\|.*\|\n)+", card.text + "\n", re.MULTILINE)
    cut = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    assert all(len(set(map(len, table))) == 1 for table in cut), "a ragged table is no table to the Hub"
    return [[row for row in table if set("".join(row)) != {"-"}] for table in cut]


def evaluation_file(path: Path, model: str = "/home/ann/secret/small", against: str | None = "dense") -> Path:
    def row(model: str, task: str, wql: float, mase: float | None) -> dict[str, Any]:
        return {"task": task, "model": model, "WQL": wql, "MASE": mase, "num_series": 181, "horizon": 6}

    rows = [row("seasonal_naive", task, 0.4, 4.0) for task in ("m1_yearly", "flat")]
    rows += [row(model, "m1_yearly", 0.125, 2.5), row(model, "flat", 0.25, None)]
    rows += [row(against, task, 0.12, 2.4) for task in ("m1_yearly", "flat") if against]
    mean = {"geometric_mean": 1.04, "low": 0.99, "high": 1.09, "num_tasks": 2}
    baselines = ["relative_to_seasonal_naive"] + (["relative_to_dense"] if against else [])
    aggregate = {model: {"seconds": 1.0} | {name: {"WQL": mean, "MASE": mean} for name in baselines}}
    settings = {"against": against, "seed": 7, "num_samples": None, "versions": {"torch": "2.0"}}
    path.write_text(json.dumps({"results": rows, "aggregate": aggregate, "settings": settings}))
    return path


# ---- Every family ----------------------------------------------------------------------------------------------------


def models(tiny_config, mixed_ranks) -> dict[str, PreTrainedModel]:
    return {
        "Chronos-Bolt": chronos_models.bolt(**chronos_models.BOLT_RANKS),
        "Chronos-2": chronos_models.chronos2(**chronos_models.CHRONOS2_RANKS),
        "T5": LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks)),
        "T5 encoder": LowRankT5EncoderModel(tiny_config(**mixed_ranks)),
    }


@pytest.mark.parametrize("family", ["Chronos-Bolt", "Chronos-2", "T5", "T5 encoder"])
def test_the_card_of_every_family(family: str, tiny_config, mixed_ranks) -> None:
    model = models(tiny_config, mixed_ranks)[family]
    card = render_card(model, "ann/small")
    assert f"A {family.split()[0]} whose layers have ranks of their own. It was trained at these ranks" in card.text
    sizes, ranks = tables(card)[0], tables(card)[-1]
    assert sizes[1][1] == f"{model.num_parameters():,}"
    assert len(ranks) - 1 == len(summarize(model.config).rows)
    paper = {"Chronos-2": "2510.15821", "Chronos-Bolt": "2403.07815"}.get(family, "1910.10683")
    assert "arxiv.org/abs/2510.03358" in card.text
    assert f"arxiv.org/abs/{paper}" in card.text
    is_chronos = family.startswith("Chronos")
    assert metadata(card).get("pipeline_tag") == ("time-series-forecasting" if is_chronos else None)
    loader = {"T5": "AutoModelForSeq2SeqLM", "T5 encoder": "AutoModelForTextEncoding"}.get(
        family, "BaseChronosPipeline"
    )
    assert f'{loader}.from_pretrained("ann/small")' in card.text
    assert f'{loader}.from_pretrained("ann/small", trust_remote_code=True)' in card.text
    assert "license" not in metadata(card)  # nobody has said what it is
    assert "licence of the base model applies" in card.text
    for leftover in ("{{", "{%", "None", "Undefined", "\n\n\n"):
        assert leftover not in card.text, leftover


def test_the_examples_in_the_card_are_python(compressed: PreTrainedModel) -> None:
    blocks = re.findall(r"```python\n(.*?)```", render_card(compressed, "ann/small").text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")


# ---- What it was made from -------------------------------------------------------------------------------------------


def test_it_says_how_it_was_made(compressed: PreTrainedModel) -> None:
    card = render_card(compressed, "ann/small")
    assert "compressed from [amazon/chronos-t5-tiny](https://huggingface.co/amazon/chronos-t5-tiny)" in card.text
    assert metadata(card)["base_model"] == "amazon/chronos-t5-tiny"
    assert metadata(card)["license"] == "apache-2.0"
    call = re.search(r"model = (compress_pretrained\(.*\))", card.text)[1]
    given = eval(call, {"compress_pretrained": lambda source, **arguments: {"source": source} | arguments})
    forms = {"encoder_self": "auto", "decoder_self": "auto", "cross": "latent"}
    wanted = {"source": "amazon/chronos-t5-tiny", "ratio": 0.5, "form": forms, "multiple_of": 2, "calibration": None}
    assert given == wanted
    record = json.loads(re.search(r"```json\n(.*?)```", card.text, re.DOTALL)[1])
    assert record == {k: v for k, v in compressed.config.compression.items() if k != "predicted_loss"}


def test_every_layer_has_its_ranks(compressed: PreTrainedModel) -> None:
    table = {row[0]: row[1:] for row in tables(render_card(compressed, "ann/small"))[-1]}
    for row in summarize(compressed.config).rows:
        ranks, parameters, share = table[f"{row.kind} {row.layer}"]
        for name, rank in row.ranks.items():
            if rank is not None:
                assert re.search(rf"\b{name} {rank}\b", ranks)
        assert parameters == f"{row.parameters:,}"
        assert share == f"{row.parameters / row.dense_parameters:.3f}"


def test_the_licence_is_the_users_word(compressed: PreTrainedModel) -> None:
    card = render_card(compressed, "ann/small", license="mit")
    assert metadata(card)["license"] == "mit"
    assert "Licence: mit" in card.text


def test_a_model_that_ships_here_is_no_model_of_the_hub(chronos_t5) -> None:
    chronos_t5.config.name_or_path = str(REFERENCES["reference"])
    card = render_card(compress_pretrained(chronos_t5, uniform=3, method="paper"), "ann/small")
    assert "base_model" not in metadata(card)
    assert metadata(card)["license"] == "apache-2.0"
    assert "`reference`, a small checkpoint that ships with hf_lowrank." in card.text
    assert "nothing is smaller or faster" in card.text
    assert "compress_pretrained('reference', uniform=3, method='paper')" in card.text


# ---- What was measured -----------------------------------------------------------------------------------------------


def test_scores_are_in_the_table_and_in_the_model_index(compressed: PreTrainedModel, tmp_path: Path) -> None:
    card = render_card(compressed, "ann/small", evaluation=evaluation_file(tmp_path / "evaluation.json"))
    index = metadata(card)["model-index"]
    assert index[0]["name"] == "small"
    found = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in index[0]["results"]
        for metric in result["metrics"]
    }
    assert found == {("m1_yearly", "wql"): 0.125, ("m1_yearly", "mase"): 2.5, ("flat", "wql"): 0.25}
    means, scores = tables(card)[1:3]
    assert means[1] == ["relative to the dense model", "1.040 (0.990 to 1.090)", "1.040 (0.990 to 1.090)", "2"]
    assert scores[1] == ["m1_yearly", "181", "6", "0.1250", "0.1200", "0.4000", "2.5000", "2.4000", "4.0000"]
    assert scores[2][6] == "-"
    assert "seed 7, torch 2.0." in card.text
    assert "secret" not in str(card)  # a folder's path is the machine's business
    reread = ModelCard(str(card))
    assert len(reread.data.eval_results) == 3


def test_scores_without_a_dense_model(compressed: PreTrainedModel, tmp_path: Path) -> None:
    card = render_card(compressed, "ann/small", evaluation=evaluation_file(tmp_path / "e.json", against=None))
    assert [row[0] for row in tables(card)[1][1:]] == ["relative to Seasonal Naive"]
    assert tables(card)[2][1] == ["m1_yearly", "181", "6", "0.1250", "0.4000", "2.5000", "4.0000"]


def test_scores_of_several_models_are_refused(compressed: PreTrainedModel, tmp_path: Path) -> None:
    path = evaluation_file(tmp_path / "evaluation.json")
    content = json.loads(path.read_text())
    content["results"].append(content["results"][2] | {"model": "other"})
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"evaluation must be of this model alone .* found /home/ann/secret/small, other"
    ):
        render_card(compressed, "ann/small", evaluation=path)


def side(name: str, seconds: float, peak: int | None) -> Side:
    fixed = {"parameters": 10, "bytes_on_disk": 40, "cache_bytes": None, "cache_bytes_repeated": None}
    limits = {"product_flops": 1, "floor_seconds": 0.5, "roofline_seconds": 0.1}
    memory = (Memory(peak, peak, 0.1),)
    return Side(name=name, pipeline="P", seconds=(seconds,) * 3, memory=memory, **fixed, **limits)


@pytest.mark.parametrize("lean", [None, side("dense", 3.0, 8 * 2**20)])
@pytest.mark.parametrize("peak", [2 * 2**20, None])
def test_speed_is_in_the_card(
    compressed: PreTrainedModel, tmp_path: Path, lean: Side | None, peak: int | None
) -> None:
    case = Case(batch_size=2, context_length=20, prediction_length=6, num_samples=4)
    sides = side("/home/ann/secret/small", 1.0, peak), side("dense", 4.0, 8 * 2**20)
    machine = {"processor": "A 1 GHz", "threads": 3, "device": "CPU", "dtype": "float32"}
    result = Benchmark(machine, (Comparison(case, *sides, against_lean=lean),))
    result.save(tmp_path / "benchmark.json")
    card = render_card(compressed, "ann/small", benchmark=tmp_path / "benchmark.json")
    assert str(card) == str(render_card(compressed, "ann/small", benchmark=result))
    wanted = ["batch 2, context 20, horizon 6, 4 samples", "1", "4", "0.250 (0.250 to 0.250)"]
    wanted += [] if lean is None else ["0.750 (0.750 to 0.750)"]
    wanted += ["-", "8", "-"] if peak is None else ["2", "8", "0.250 (0.250 to 0.250)"]
    assert tables(card)[1][1] == wanted
    assert "A 1 GHz, 3 threads,\nCPU float32." in card.text
    assert "secret" not in str(card)


# ---- Text of others --------------------------------------------------------------------------------------------------

HOSTILE = "a|b`c`<script>alert(1)</script>\n---\n# [x](https://evil.example)\n<!-- &lt; \\"


def test_nothing_of_others_is_more_than_text(compressed: PreTrainedModel, tmp_path: Path) -> None:
    """Names of tasks, settings, versions, machines and checkpoints can be anything that a file holds."""
    path = evaluation_file(tmp_path / "evaluation.json")
    content = json.loads(path.read_text().replace("m1_yearly", "THE_TASK"))
    for row in content["results"]:
        row["task"] = row["task"].replace("THE_TASK", HOSTILE)
    content["settings"] |= {HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}}
    path.write_text(json.dumps(content))
    sides = side("a", 1.0, 2**20), side("b", 4.0, 2**20)
    case = Case(batch_size=2, context_length=20, prediction_length=6, num_samples=4)
    machine = {"processor": HOSTILE, "threads": 3, "device": HOSTILE, "dtype": HOSTILE}
    benchmark = Benchmark(machine, (Comparison(case, *sides),))
    model = copy.deepcopy(compressed)
    for source in (HOSTILE, f"../{HOSTILE}", f"/home/{HOSTILE}"):
        model.config.compression["source"] = source
        model.config.compression["recovery"] = {"steps": 3, "teacher": HOSTILE, "series": HOSTILE}
        card = render_card(model, "ann/small", evaluation=path, benchmark=benchmark)
        assert metadata(card).get("base_model") is None
        assert {result["dataset"]["name"] for result in metadata(card)["model-index"][0]["results"]} == {
            HOSTILE,
            "flat",
        }
        tables(card)  # none is ragged
        # What is left outside of code has no tag, no entity of theirs, no link, no heading and no rule that is not the template's.
        prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", card.text, flags=re.DOTALL | re.MULTILINE)
        assert "<" not in prose
        assert "[x" not in prose
        assert "&#91;x&#93;(https" in prose
        assert "&lt;script&gt;" in prose
        assert set(re.findall(r"^#.*$", prose, re.MULTILINE)) == {
            "# small", "## How to load it", "## How it was made", "## Accuracy", "## Speed and memory",
            "## The rank of every layer", "## Licence and citation",
        }  # fmt: skip
        assert not re.search(r"^\s*---\s*$", prose, re.MULTILINE)
        for block in re.findall(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE):
            compile(block, "card", "exec")
        assert len(ModelCard(str(card)).data.eval_results) == 3


@pytest.mark.parametrize("license", ["MIT License\n---\nCopyright", "---", "<b>", "", "a b", "MIT"])
def test_a_licence_is_an_identifier(compressed: PreTrainedModel, license: str) -> None:
    with pytest.raises(ValueError, match="license must be an identifier of the Hub, such as"):
        render_card(compressed, "ann/small", license=license)


@pytest.mark.parametrize(
    "damage",
    [
        {"source": 3},
        {"source": "a", "arguments": []},
        {"method": "ours"},
        {"recovery": {"steps": "many"}},
        {"recovery": []},
        {"kept_rank_ratio": "half"},
        {"method": "ours", "source": "a", "arguments": {"x); import os; (y": 1}},
    ],
)
def test_a_damaged_record_is_one_error(compressed: PreTrainedModel, damage: dict[str, Any]) -> None:
    model = copy.deepcopy(compressed)
    model.config.compression = damage
    with pytest.raises(ValueError, match=r"model: `compression` in its config.json is no record of how it was made"):
        render_card(model, "ann/small")


def damaged(content: Any, place: str, value: Any) -> Any:
    """The content with another value at a place such as "results.2.WQL"; without it where the value is `...`."""
    *path, last = (int(part) if part.isdigit() else part for part in place.split("."))
    content = copy.deepcopy(content)
    inner = content
    for part in path:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("results", ..., "it lacks results"),
        ("results", {}, "results must be a list that is not empty, found {}"),
        ("results", [], "results must be a list that is not empty"),
        ("results.1", "x", "results[1] must be a table, found 'x'"),
        ("results.2.WQL", ..., "it lacks results[2].WQL"),
        ("results.2.WQL", "0.1", "results[2].WQL must be a finite number of at least 0, or null, found '0.1'"),
        ("results.2.WQL", float("nan"), "results[2].WQL must be a finite number of at least 0, or null, found nan"),
        ("results.2.MASE", float("inf"), "results[2].MASE must be a finite number of at least 0, or null, found inf"),
        ("results.2.MASE", True, "results[2].MASE must be"),
        ("results.2.task", None, "results[2].task must be text, found None"),
        ("results.2.horizon", 1.5, "results[2].horizon must be an integer of at least 0, found 1.5"),
        ("results.1", {"task": "m1_yearly", "model": "dense", "WQL": 1, "MASE": 1, "num_series": 1, "horizon": 1}, "one row for"),
        ("aggregate", [], "aggregate must be a table"),
        ("aggregate", {}, "aggregate of the model must be a table, found None"),
        ("aggregate./home/ann/secret/small.relative_to_dense", 1, "aggregate of the model.relative_to_dense must be a table"),
        ("aggregate./home/ann/secret/small.relative_to_dense.WQL.low", "x", "relative_to_dense.WQL.low must be a finite"),
        ("settings", ..., "it lacks settings"),
        ("settings.versions", ..., "it lacks settings.versions"),
        ("settings.against", 3, "settings.against must be text, found 3"),
    ],
)  # fmt: skip
def test_a_malformed_evaluation_says_where_it_is_wrong(
    compressed: PreTrainedModel, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    path = evaluation_file(tmp_path / "evaluation.json")
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), place, value)))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        render_card(compressed, "ann/small", evaluation=path)
    assert str(caught.value).startswith(f"evaluation: {path} must be a file of `hf-lowrank evaluate --json`: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", "[]", "null", "3", '"x"'])
@pytest.mark.parametrize(("argument", "command"), [("evaluation", "evaluate"), ("benchmark", "bench")])
def test_what_is_no_result_is_said_with_its_file(
    compressed: PreTrainedModel, tmp_path: Path, text: str, argument: str, command: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=rf"^{argument}: .*broken.json must be a file of `hf-lowrank {command} --json`"
    ):
        render_card(compressed, "ann/small", **{argument: path})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("machine.processor", ..., "it lacks machine.processor"),
        ("machine.threads", "three", "machine.threads must be an integer"),
        ("results.0.case.num_samples", "4", "results[0].case.num_samples must be"),
        ("results.0.model.seconds", [], "results[0].model.seconds must be a list that is not empty"),
        ("results.0.against.seconds.0", -1.0, "results[0].against.seconds[0] must be a finite number"),
        ("results.0.model.memory.0.peak", ..., "it lacks results[0].model.memory[0].peak"),
        ("results.0.time_ratio", None, "results[0].time_ratio must be a table"),
        ("results.0.memory_ratio.max", "x", "results[0].memory_ratio.max must be a finite number"),
    ],
)
def test_a_malformed_benchmark_says_where_it_is_wrong(
    compressed: PreTrainedModel, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    case = Case(batch_size=2, context_length=20, prediction_length=6, num_samples=4)
    machine = {"processor": "A", "threads": 3, "device": "CPU", "dtype": "float32"}
    result = Benchmark(machine, (Comparison(case, side("a", 1.0, 2**20), side("b", 4.0, 2**20)),)).to_dict()
    (tmp_path / "b.json").write_text(json.dumps(damaged(json.loads(json.dumps(result)), place, value)))
    with pytest.raises(ValueError, match=re.escape(message)):
        render_card(compressed, "ann/small", benchmark=tmp_path / "b.json")
