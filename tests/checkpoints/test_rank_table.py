"""Ranks as the code sees them, and the dictionaries of a configuration: the same thing written in two ways."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.checkpoints.rank_table import (
    ComponentName,
    FeedForwardRanks,
    LatentRanks,
    LayerName,
    PerHeadRanks,
    RankTable,
)
from hf_lowrank.models.configuration_lowrank_t5 import (
    attention_parameters,
    cached_numbers,
    feed_forward_parameters,
)


@given(kind=st.sampled_from(["cross", "time", "encoder_feed_forward"]), index=st.integers(0, 99))
def test_names_are_what_they_are_written_as(kind, index):
    name = LayerName(kind, index)
    assert LayerName.parse(str(name)) == name
    assert name.is_feed_forward == (kind == "encoder_feed_forward")
    assert str(ComponentName(name, "qk")) == f"{kind}.{index}.qk"


def test_a_table_is_that_of_its_configuration(tiny_config, mixed_ranks):
    config = tiny_config(**mixed_ranks)
    table = RankTable.of(config)
    assert len(table) == 2 + 3 + 3 + 2 + 3
    assert table[LayerName("encoder_self", 0)] == PerHeadRanks(3, 5)
    assert table[LayerName("encoder_self", 1)] == LatentRanks(4, None, 3)
    assert table[LayerName("decoder_feed_forward", 2)] == FeedForwardRanks(11, None, None)
    full = tiny_config()
    table.write(full)
    assert (full.attention_ranks, full.feed_forward_ranks) == (config.attention_ranks, config.feed_forward_ranks)
    assert RankTable.of(full) == table
    assert RankTable.full(config) == RankTable.of(tiny_config())


def test_a_table_over_another_one(tiny_config, mixed_ranks):
    whole, mixed = RankTable.of(tiny_config()), RankTable.of(tiny_config(**mixed_ranks))
    one = {LayerName("cross", 1): PerHeadRanks(1, 1)}
    assert (whole | one)[LayerName("cross", 1)] == PerHeadRanks(1, 1)
    assert (whole | mixed) == mixed
    assert whole[LayerName("cross", 1)] == PerHeadRanks(8, 8)  # left as it is


def test_what_does_not_fit_the_model_is_refused(tiny_config):
    config = tiny_config()
    before = copy.deepcopy(config.attention_ranks)
    with pytest.raises(ValueError, match=r"attention_ranks\['cross'\]\[0\]\['qk'\] must be"):
        RankTable({LayerName("cross", 0): PerHeadRanks(9, 1)}).write(config)
    assert config.attention_ranks == before


def test_sizes_are_those_of_the_formulas(tiny_config, mixed_ranks):
    config = tiny_config(**mixed_ranks)
    heads = {"num_heads": config.num_heads}
    for name, ranks in RankTable.of(config).items():
        entry = ranks.to_dict()
        if name.is_feed_forward:
            assert ranks.parameters(config) == feed_forward_parameters(entry, d_model=16, is_gated=False)
            assert ranks.cached_numbers(config) == 0
        else:
            assert ranks.parameters(config) == attention_parameters(entry, d_model=16, **heads)
            assert ranks.cached_numbers(config) == cached_numbers(entry, **heads)
