"""LowRankT5Config: the tables, where they come from, what is saved, what is refused."""

from __future__ import annotations

import copy
import json
import re
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoConfig, T5Config

from hf_lowrank import LowRankT5Config
from hf_lowrank.models.configuration_lowrank_t5 import scheduled_attention_ranks, scheduled_rank

# The pretrained compressed models of arXiv 2510.03358: d~_0 and alpha.
PAPER = [(3, "0.27"), (5, "0.35"), (7, "0.40")]
D_MODEL, D_KV, D_FF, DEPTHS = 16, 8, 24, {"encoder_self": 2, "decoder_self": 3, "cross": 3}


def exact_ceil(base: Fraction, growth: Fraction, position: int) -> int:
    """The smallest integer r >= base * position ** growth, in integers: r^q >= base^q position^p for growth = p / q."""
    power = base**growth.denominator * Fraction(position) ** growth.numerator
    rank = 1
    while rank**growth.denominator < power:
        rank += 1
    return rank


def exact_power_of_two(base: int, growth: str, position: int) -> int:
    """The nearest power of two on a logarithmic scale, by 50-digit decimal logarithms."""
    with localcontext(prec=50):
        size = Decimal(base).ln() + Decimal(growth) * Decimal(position).ln()
        exponent = (size / Decimal(2).ln()).to_integral_value(ROUND_HALF_EVEN)
    return max(1, 2 ** int(exponent))


@pytest.mark.parametrize(("base", "growth"), PAPER)
def test_ceil_schedule_of_the_paper(base, growth):
    config = LowRankT5Config(num_layers=12, base_rank=base, rank_growth=float(growth))
    expected = [min(exact_ceil(Fraction(base), Fraction(growth), i + 1), 64) for i in range(12)]
    assert expected[0] == base
    assert expected[-1] > base
    for kind in ("encoder_self", "decoder_self", "cross"):
        assert config.attention_ranks[kind] == [{"qk": rank, "vo": rank} for rank in expected]


@pytest.mark.parametrize(("base", "growth"), PAPER)
def test_pow2_schedule_of_the_papers_code(base, growth):
    config = LowRankT5Config(num_layers=12, base_rank=base, rank_growth=float(growth), rank_rounding="pow2")
    for kind, first in (("encoder_self", 0), ("decoder_self", 0), ("cross", 12)):
        expected = [min(exact_power_of_two(base, growth, first + i + 1), 64) for i in range(12)]
        assert config.attention_ranks[kind] == [{"qk": rank, "vo": rank} for rank in expected]


def test_pow2_cross_attention_counts_on_from_an_encoder_of_another_depth():
    table = scheduled_attention_ranks(2, 1.0, num_layers=3, num_decoder_layers=5, d_kv=64, rounding="pow2")
    assert [entry["qk"] for entry in table["cross"]] == [8, 8, 16, 16, 16]  # nearest to 8, 10, 12, 14, 16
    assert [entry["qk"] for entry in table["decoder_self"]] == [2, 4, 8, 8, 8]  # nearest to 2, 4, 6, 8, 10


@given(
    base=st.builds(Fraction, st.integers(1, 24), st.integers(1, 3)),
    growth=st.builds(Fraction, st.integers(-3, 3), st.integers(1, 3)),
    layer=st.integers(0, 23),
)
@example(base=Fraction(1), growth=Fraction(4, 5), layer=31)  # 16.000000000000004 in floating point
@example(base=Fraction(9), growth=Fraction(-1, 3), layer=26)
def test_ceil_is_exact(base, growth, layer):
    assert scheduled_rank(float(base), float(growth), layer) == exact_ceil(base, growth, layer + 1)


@given(base=st.floats(1e-6, 1e4), growth=st.floats(-5, 5), rounding=st.sampled_from(["ceil", "pow2"]))
@example(base=1e-12, growth=0.0, rounding="ceil")
def test_a_schedule_is_monotone_and_always_fits_the_model(base, growth, rounding):
    table = scheduled_attention_ranks(base, growth, num_layers=6, num_decoder_layers=4, d_kv=D_KV, rounding=rounding)
    for entries in table.values():
        ranks = [entry["qk"] for entry in entries]
        assert all(1 <= rank <= D_KV for rank in ranks)
        assert ranks == sorted(ranks, reverse=growth < 0)
        assert all(entry["qk"] == entry["vo"] for entry in entries)


def test_without_arguments_the_tables_are_those_of_the_dense_model(tiny_config):
    config = tiny_config()
    assert config.attention_ranks == {kind: [{"qk": 8, "vo": 8}] * depth for kind, depth in DEPTHS.items()}
    full = {"width": 24, "wi": None, "wo": None}
    assert config.feed_forward_ranks == {"encoder": [full] * 2, "decoder": [full] * 3}
    assert config.compression is None


def test_a_kind_left_out_keeps_full_rank(tiny_config):
    config = tiny_config(attention_ranks={"cross": [{"latent": 4, "query": 3, "output": None}] * 3})
    assert config.attention_ranks["cross"] == [{"latent": 4, "query": 3, "output": None}] * 3
    assert config.attention_ranks["encoder_self"] == [{"qk": 8, "vo": 8}] * 2


def sketch(limit: int) -> st.SearchStrategy:
    return st.none() | st.integers(1, limit)


def feed_forward_entry() -> st.SearchStrategy:
    def entry(width: int) -> st.SearchStrategy:
        thin = sketch(min(D_MODEL, width))
        return st.fixed_dictionaries({"width": st.just(width), "wi": thin, "wo": thin})

    return st.integers(1, D_FF).flatmap(entry)


def column(entry: st.SearchStrategy, depth: int) -> st.SearchStrategy:
    return st.lists(entry, min_size=depth, max_size=depth)


PER_HEAD = st.fixed_dictionaries({"qk": st.integers(1, D_KV), "vo": st.integers(1, D_KV)})
LATENT = st.fixed_dictionaries(
    {"latent": st.integers(1, D_MODEL), "query": sketch(D_MODEL), "output": sketch(D_MODEL)}
)
TABLES = st.fixed_dictionaries(
    {
        "attention_ranks": st.fixed_dictionaries(
            {}, optional={kind: column(PER_HEAD | LATENT, depth) for kind, depth in DEPTHS.items()}
        ),
        "feed_forward_ranks": st.fixed_dictionaries(
            {}, optional={"encoder": column(feed_forward_entry(), 2), "decoder": column(feed_forward_entry(), 3)}
        ),
    }
)


@given(tables=TABLES)
def test_any_valid_tables_survive_dict_and_json(tables, tiny_config):
    config = tiny_config(**tables)
    for name, table in tables.items():
        assert getattr(config, name) == getattr(config, name) | table
    for again in (
        LowRankT5Config.from_dict(config.to_dict()),
        LowRankT5Config.from_dict(json.loads(config.to_json_string())),
        LowRankT5Config.from_dict(json.loads(config.to_json_string(use_diff=False))),
    ):
        assert again.to_dict() == config.to_dict()


def test_auto_config_loads_what_was_saved(tmp_path, tiny_config, mixed_ranks):
    record = {"method": "joint", "arguments": {"epsilon": 1e-2}, "seed": 0}
    config = tiny_config(**mixed_ranks, compression=record)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LowRankT5Config
    assert again.attention_ranks == mixed_ranks["attention_ranks"]
    assert again.feed_forward_ranks == mixed_ranks["feed_forward_ranks"]
    assert again.compression == record
    assert again.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("rounding", [None, "ceil", "pow2"])
def test_only_the_tables_of_a_schedule_are_saved(tmp_path, tiny_config, rounding):
    config = tiny_config(base_rank=2, rank_growth=0.5, rank_rounding=rounding)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"base_rank", "rank_growth", "rank_rounding"} & set(saved)
    assert not hasattr(config, "base_rank")
    assert saved["attention_ranks"] == config.attention_ranks
    assert saved["compression"] == {
        "policy": "schedule",
        "arguments": {"base_rank": 2, "rank_growth": 0.5, "rounding": rounding or "ceil"},
    }
    assert AutoConfig.from_pretrained(tmp_path).attention_ranks == config.attention_ranks


def test_rank_growth_defaults_to_none_at_all(tiny_config):
    assert tiny_config(base_rank=3).attention_ranks["cross"] == [{"qk": 3, "vo": 3}] * 3


@pytest.mark.parametrize("tied", [True, False, None])
def test_scale_decoder_outputs_survives(tmp_path, tiny_shape, tied):
    """T5 v1.1 and Flan-T5 say tie_word_embeddings=False and mean: do not scale the decoder's output."""
    arguments = {} if tied is None else {"tie_word_embeddings": tied}
    stock = T5Config(**tiny_shape, **arguments)
    config = LowRankT5Config(**tiny_shape, **arguments)
    assert config.scale_decoder_outputs == stock.scale_decoder_outputs == (tied is not False)
    config.save_pretrained(tmp_path)
    for again in (
        AutoConfig.from_pretrained(tmp_path),
        LowRankT5Config.from_dict(config.to_dict()),
        LowRankT5Config.from_dict(LowRankT5Config.from_dict(config.to_dict()).to_dict()),
        LowRankT5Config.from_dict(stock.to_dict()),
        copy.deepcopy(config),
    ):
        assert again.scale_decoder_outputs == (tied is not False)
        assert again.tie_word_embeddings is True


def test_the_tables_are_the_configs_own(tiny_config, mixed_ranks):
    given_tables = copy.deepcopy(mixed_ranks)
    record = {"arguments": {"epsilon": 0.01}}
    config = tiny_config(**given_tables, compression=record)
    twin = copy.deepcopy(config)
    given_tables["attention_ranks"]["cross"][0]["latent"] = 1
    given_tables["feed_forward_ranks"]["encoder"].clear()
    record["arguments"]["epsilon"] = 1.0
    twin.attention_ranks["decoder_self"][1]["qk"] = 1
    assert config.attention_ranks == mixed_ranks["attention_ranks"]
    assert config.feed_forward_ranks == mixed_ranks["feed_forward_ranks"]
    assert config.compression == {"arguments": {"epsilon": 0.01}}
    assert tiny_config().attention_ranks["cross"][0] is not tiny_config().attention_ranks["cross"][0]


def test_to_dict_hands_out_copies(tiny_config):
    config = tiny_config()
    config.to_dict()["attention_ranks"]["cross"][0]["qk"] = 1
    assert config.attention_ranks["cross"][0] == {"qk": 8, "vo": 8}


def test_each_layer_has_an_entry_of_its_own(tiny_config):
    config = tiny_config(base_rank=3)
    config.attention_ranks["cross"][0]["qk"] = 1
    assert config.attention_ranks["cross"][1]["qk"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_ranks": [1]}, "attention_ranks must be a dict, found list"),
        ({"attention_ranks": []}, "attention_ranks must be a dict, found list"),
        ({"attention_ranks": None}, "attention_ranks must be a dict, found NoneType"),
        ({"feed_forward_ranks": "half"}, "feed_forward_ranks must be a dict, found str"),
        ({"attention_ranks": {"decoder": []}}, "attention_ranks has unknown keys ['decoder']; known are ['cross'"),
        ({"feed_forward_ranks": {"cross": []}}, "feed_forward_ranks has unknown keys ['cross']"),
        (
            {"attention_ranks": {"cross": [{"qk": 1, "vo": 1}] * 2}},
            "attention_ranks['cross'] must be a list of 3 entries, found 2 entries",
        ),
        (
            {"attention_ranks": {"encoder_self": {"qk": 1, "vo": 1}}},
            "attention_ranks['encoder_self'] must be a list of 2 entries, found dict",
        ),
        (
            {"attention_ranks": {"encoder_self": [{"qk": 1, "vo": 1}, {"qk": 1}]}},
            "attention_ranks['encoder_self'][1] must be a dict with the keys {qk, vo} or {latent, output, query}",
        ),
        (
            {"feed_forward_ranks": {"encoder": [{"qk": 1, "vo": 1}] * 2}},
            "feed_forward_ranks['encoder'][0] must be a dict with the keys {wi, width, wo}, found",
        ),
        (
            {"feed_forward_ranks": {"encoder": [{"width": 5, "wi": 6, "wo": None}] * 2}},
            "feed_forward_ranks['encoder'][0]['wi'] must be an integer in [1, 5], found 6",
        ),
        ({"attention_ranks": {"cross": [None] * 3}}, "attention_ranks['cross'][0] must be a dict"),
        (
            {"attention_ranks": {"cross": [{"qk": 1, "vo": 1}] * 3}, "base_rank": 3},
            "either attention_ranks or base_rank, not both",
        ),
        ({"rank_growth": 0.3}, "rank_growth and rank_rounding need base_rank"),
        ({"rank_rounding": "ceil"}, "rank_growth and rank_rounding need base_rank"),
        ({"base_rank": 0}, "base_rank must be a positive number, found 0"),
        ({"base_rank": -2.5}, "base_rank must be a positive number, found -2.5"),
        ({"base_rank": float("inf")}, "base_rank must be a positive number, found inf"),
        ({"base_rank": float("nan")}, "base_rank must be a positive number, found nan"),
        ({"base_rank": 3, "rank_growth": float("nan")}, "rank_growth must be a finite number, found nan"),
        ({"base_rank": 3, "rank_rounding": "floor"}, "rank_rounding must be 'ceil' or 'pow2', found 'floor'"),
    ],
)
def test_bad_arguments_are_refused_by_name(tiny_config, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config(**arguments)


@given(tables=TABLES, data=st.data())
def test_a_bad_number_anywhere_is_refused_with_its_place(tables, data, tiny_config):
    full = tiny_config(**tables)
    name = data.draw(st.sampled_from(["attention_ranks", "feed_forward_ranks"]))
    table = getattr(full, name)
    kind = data.draw(st.sampled_from(sorted(table)))
    layer = data.draw(st.integers(0, len(table[kind]) - 1))
    entry = table[kind][layer]
    key = data.draw(st.sampled_from(sorted(entry)))
    bad = [0, -1, 25, 2.0, True, "3", float("nan")] + ([] if key in ("query", "output", "wi", "wo") else [None])
    entry[key] = data.draw(st.sampled_from(bad))
    with pytest.raises(ValueError, match=re.escape(f"{name}[{kind!r}][{layer}][{key!r}] must be an integer in [1, ")):
        tiny_config(**{name: table})


def test_a_broken_table_is_not_saved(tmp_path, tiny_config):
    config = tiny_config()
    config.attention_ranks["cross"][2]["vo"] = 9
    with pytest.raises(Exception, match=re.escape("attention_ranks['cross'][2]['vo'] must be an integer in [1, 8]")):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_decoders_view_has_the_decoders_depth(tiny_config):
    config = tiny_config()
    assert config.get_text_config(decoder=True).num_hidden_layers == 3
    assert config.get_text_config(encoder=True).num_hidden_layers == 2
    assert config.get_text_config().num_hidden_layers == 2
    assert config.num_layers == 2
