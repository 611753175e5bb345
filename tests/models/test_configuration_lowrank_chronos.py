"""LowRankChronosBoltConfig and LowRankChronos2Config: what is published, what is saved, what is refused."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from chronos.chronos2 import Chronos2CoreConfig
from chronos_models import BOLT, BOLT_RANKS, CHRONOS2, CHRONOS2_RANKS, D_FF, D_KV, D_MODEL, PUBLISHED, shape
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, T5Config
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import hf_lowrank
from hf_lowrank import LowRankChronos2Config, LowRankChronosBoltConfig, LowRankT5Config

PACKAGE = Path(hf_lowrank.__file__).parent / "models"
MODULES = ["configuration_lowrank_chronos", "modeling_lowrank_chronos", "pipeline_lowrank_chronos"]
FAMILIES = pytest.mark.parametrize(
    ("config_class", "family", "ranks"),
    [(LowRankChronosBoltConfig, BOLT, BOLT_RANKS), (LowRankChronos2Config, CHRONOS2, CHRONOS2_RANKS)],
    ids=["bolt", "chronos2"],
)


def config_class_of(name: str) -> type:
    return LowRankChronos2Config if name == "chronos-2" else LowRankChronosBoltConfig


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_accepted_as_it_is(tmp_path, name):
    published = PUBLISHED[name]
    config_class = config_class_of(name)
    (tmp_path / "config.json").write_text(json.dumps(published))
    stock_class = Chronos2CoreConfig if name == "chronos-2" else T5Config
    stock = stock_class.from_pretrained(tmp_path).to_dict()
    for config in (
        config_class.from_pretrained(tmp_path),
        config_class.from_dict(published),
        config_class(**published),
        config_class(**stock),
    ):
        assert config.model_type == config_class.model_type
        assert config.chronos_pipeline_class == f"LowRank{published['chronos_pipeline_class']}"
        for key in set(published) - {"model_type", "chronos_pipeline_class", "torch_dtype", "transformers_version"}:
            assert getattr(config, key) == published[key], key
        assert config.full_ranks() == {
            "attention_ranks": config.attention_ranks,
            "feed_forward_ranks": config.feed_forward_ranks,
        }
        for entries in config.attention_ranks.values():
            assert entries == [{"qk": 64, "vo": 64}] * published["num_layers"]
        for entries in config.feed_forward_ranks.values():
            assert entries == [{"width": published["d_ff"], "wi": None, "wo": None}] * published["num_layers"]


def test_bolts_tables_are_t5s():
    bolt = LowRankChronosBoltConfig(**shape(BOLT, base_rank=2, rank_growth=0.5))
    t5 = LowRankT5Config(**shape(BOLT, base_rank=2, rank_growth=0.5) | {"chronos_config": None})
    assert bolt.attention_ranks == t5.attention_ranks != bolt.full_ranks()["attention_ranks"]
    assert bolt.feed_forward_ranks == t5.feed_forward_ranks
    assert bolt.compression == t5.compression


def test_chronos2s_kinds():
    config = LowRankChronos2Config(**shape(CHRONOS2))
    full = {"width": D_FF, "wi": None, "wo": None}
    assert config.attention_ranks == {kind: [{"qk": D_KV, "vo": D_KV}] * 2 for kind in ("time", "group")}
    assert config.feed_forward_ranks == {"encoder": [full] * 2}
    assert config.compression is None


@pytest.mark.parametrize("rounding", ["ceil", "pow2"])
def test_both_kinds_of_chronos2_follow_a_schedule(rounding):
    """The rank of layer i is d~_0 (1 + i)^alpha, rounded; a head with rotary embeddings has an even one."""
    schedule = {"base_rank": 1.2, "rank_growth": 1.0, "rounding": rounding}
    config = LowRankChronos2Config(
        **CHRONOS2 | {"num_layers": 3}, base_rank=1.2, rank_growth=1.0, rank_rounding=rounding
    )
    ranks = [2, 3, 4] if rounding == "ceil" else [1, 2, 4]
    assert config.attention_ranks["group"] == [{"qk": rank, "vo": rank} for rank in ranks]
    assert config.attention_ranks["time"] == [{"qk": rank + rank % 2, "vo": rank} for rank in ranks]
    assert config.compression == {"policy": "schedule", "arguments": schedule}
    assert not {"base_rank", "rank_growth"} & set(config.to_dict())
    with pytest.raises(ValueError, match="Give either attention_ranks or base_rank, not both"):
        LowRankChronos2Config(**CHRONOS2, attention_ranks=config.attention_ranks, base_rank=2)
    with pytest.raises(ValueError, match="rank_growth and rank_rounding need base_rank"):
        LowRankChronos2Config(**CHRONOS2, rank_growth=1.0)


def test_a_kind_left_out_keeps_full_rank():
    config = LowRankChronos2Config(**shape(CHRONOS2, attention_ranks={"time": [{"qk": 2, "vo": 1}] * 2}))
    assert config.attention_ranks["time"] == [{"qk": 2, "vo": 1}] * 2
    assert config.attention_ranks["group"] == [{"qk": D_KV, "vo": D_KV}] * 2


def sketch(limit: int) -> st.SearchStrategy:
    return st.none() | st.integers(1, limit)


TIME = st.fixed_dictionaries({"qk": st.integers(1, D_KV // 2).map(lambda n: 2 * n), "vo": st.integers(1, D_KV)})
GROUP = st.fixed_dictionaries({"qk": st.integers(1, D_KV), "vo": st.integers(1, D_KV)}) | st.fixed_dictionaries(
    {"latent": st.integers(1, D_MODEL), "query": sketch(D_MODEL), "output": sketch(D_MODEL)}
)
FEED_FORWARD = st.integers(1, D_FF).flatmap(
    lambda width: st.fixed_dictionaries(
        {"width": st.just(width), "wi": sketch(min(width, D_MODEL)), "wo": sketch(min(width, D_MODEL))}
    )
)
TABLES = st.fixed_dictionaries(
    {
        "attention_ranks": st.fixed_dictionaries(
            {},
            optional={
                "time": st.lists(TIME, min_size=2, max_size=2),
                "group": st.lists(GROUP, min_size=2, max_size=2),
            },
        ),
        "feed_forward_ranks": st.fixed_dictionaries(
            {}, optional={"encoder": st.lists(FEED_FORWARD, min_size=2, max_size=2)}
        ),
    }
)


@given(tables=TABLES)
def test_any_valid_tables_survive_dict_and_json(tables):
    config = LowRankChronos2Config(**shape(CHRONOS2, **tables))
    for name, table in tables.items():
        assert getattr(config, name) == getattr(config, name) | table
    for again in (
        LowRankChronos2Config.from_dict(config.to_dict()),
        LowRankChronos2Config.from_dict(json.loads(config.to_json_string())),
        LowRankChronos2Config.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        assert again.to_dict() == config.to_dict()


@FAMILIES
def test_auto_config_loads_what_was_saved(tmp_path, config_class, family, ranks):
    record = {"method": "joint", "arguments": {"epsilon": 1e-2}, "seed": 0}
    config = config_class(**shape(family, **ranks, compression=record))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == config_class.model_type
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is config_class
    assert again.attention_ranks == ranks["attention_ranks"]
    assert again.feed_forward_ranks == ranks["feed_forward_ranks"]
    assert again.compression == record
    assert again.to_diff_dict() == config.to_diff_dict()


@FAMILIES
def test_the_tables_are_the_configs_own(config_class, family, ranks):
    given_tables = copy.deepcopy(ranks)
    record = {"arguments": {"epsilon": 0.01}}
    config = config_class(**{**copy.deepcopy(family), **given_tables, "compression": record})
    twin = copy.deepcopy(config)
    for table in given_tables.values():
        for entries in table.values():
            entries[0].clear()
    record["arguments"]["epsilon"] = 1.0
    next(iter(twin.attention_ranks.values())).clear()
    assert config.attention_ranks == ranks["attention_ranks"]
    assert config.feed_forward_ranks == ranks["feed_forward_ranks"]
    assert config.compression == {"arguments": {"epsilon": 0.01}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_ranks": [1]}, "attention_ranks must be a dict, found list"),
        ({"feed_forward_ranks": "half"}, "feed_forward_ranks must be a dict, found str"),
        (
            {"attention_ranks": {"encoder_self": []}},
            "attention_ranks has unknown keys ['encoder_self']; known are ['group', 'time'].",
        ),
        ({"feed_forward_ranks": {"decoder": []}}, "feed_forward_ranks has unknown keys ['decoder']"),
        (
            {"attention_ranks": {"time": [{"qk": 2, "vo": 1}]}},
            "attention_ranks['time'] must be a list of 2 entries, found 1 entries",
        ),
        (
            {"attention_ranks": {"group": {"qk": 1}}},
            "attention_ranks['group'] must be a list of 2 entries, found dict",
        ),
        (
            {"attention_ranks": {"time": [{"latent": 4, "query": None, "output": None}] * 2}},
            "attention_ranks['time'][0] must be a dict with the keys {qk, vo}, found {'latent': 4",
        ),
        (
            {"attention_ranks": {"group": [{"qk": 1, "vo": 1}, {"qk": 1}]}},
            "attention_ranks['group'][1] must be a dict with the keys {qk, vo} or {latent, output, query}, found",
        ),
        (
            {"attention_ranks": {"time": [{"qk": 4, "vo": 1}, {"qk": 3, "vo": 1}]}},
            "attention_ranks['time'][1]['qk'] must be an even integer in [2, 8], found 3.",
        ),
        (
            {"feed_forward_ranks": {"encoder": [{"qk": 1, "vo": 1}] * 2}},
            "feed_forward_ranks['encoder'][0] must be a dict with the keys {wi, width, wo}, found",
        ),
        (
            {"feed_forward_ranks": {"encoder": [{"width": 5, "wi": 6, "wo": None}] * 2}},
            "feed_forward_ranks['encoder'][0]['wi'] must be an integer in [1, 5], found 6",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LowRankChronos2Config(**shape(CHRONOS2, **arguments))


@given(tables=TABLES, data=st.data())
def test_a_bad_number_anywhere_is_refused_with_its_place(tables, data):
    full = LowRankChronos2Config(**shape(CHRONOS2, **tables))
    name = data.draw(st.sampled_from(["attention_ranks", "feed_forward_ranks"]))
    table = getattr(full, name)
    kind = data.draw(st.sampled_from(sorted(table)))
    layer = data.draw(st.integers(0, 1))
    entry = table[kind][layer]
    key = data.draw(st.sampled_from(sorted(entry)))
    rotary = (kind, key) == ("time", "qk")
    bad = [0, -2, 26, 2.0, True, "2", float("nan")]
    bad += [] if key in ("query", "output", "wi", "wo") else [None]
    bad += [1, 3, 7] if rotary else []
    entry[key] = data.draw(st.sampled_from(bad))
    wanted = "an even integer in [2, 8]" if rotary else "an integer in [1, "
    with pytest.raises(ValueError, match=re.escape(f"{name}[{kind!r}][{layer}][{key!r}] must be {wanted}")):
        LowRankChronos2Config(**shape(CHRONOS2, **{name: table}))


def test_bolt_refuses_as_t5_does():
    with pytest.raises(ValueError, match=re.escape("attention_ranks['cross'][2]['vo'] must be an integer in [1, 8]")):
        LowRankChronosBoltConfig(
            **shape(BOLT, attention_ranks={"cross": [{"qk": 1, "vo": 1}] * 2 + [{"qk": 1, "vo": 9}]})
        )


@FAMILIES
def test_a_broken_table_is_not_saved(tmp_path, config_class, family, ranks):
    config = config_class(**shape(family))
    kind = next(iter(config.attention_ranks))
    config.attention_ranks[kind][1]["vo"] = 9
    with pytest.raises(Exception, match=re.escape(f"attention_ranks[{kind!r}][1]['vo'] must be an integer in [1, 8]")):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# What the Hub carries


@pytest.mark.parametrize("module", MODULES)
def test_without_chronos_the_message_says_what_to_install(monkeypatch, module):
    for name in [name for name in sys.modules if name.split(".")[0] == "chronos"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("hf_lowrank.fresh", PACKAGE / f"{module}.py")
    with pytest.raises(ImportError, match="pip install chronos-forecasting"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("module", MODULES)
def test_the_files_import_nothing_that_the_hub_cannot_bring(module):
    path = PACKAGE / f"{module}.py"
    # Not chronos: what the Hub's loader requires it names by the import, and no such package would help.
    assert set(get_imports(path)) <= {"huggingface_hub", "torch", "transformers"} | sys.stdlib_module_names
    # That scan is by line: a docstring must not look like an import.
    tree = ast.walk(ast.parse(path.read_text()))
    siblings = [node for node in tree if isinstance(node, ast.ImportFrom) and node.level]
    assert set(get_relative_imports(path)) == {node.module for node in siblings}
    assert all((PACKAGE / f"{node.module}.py").exists() for node in siblings)
