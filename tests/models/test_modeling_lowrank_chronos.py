"""The low-rank Chronos models: equal to the stock ones at full rank, to their equations at any rank."""

from __future__ import annotations

import copy
import re
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import init_empty_weights
from chronos.chronos2 import Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from chronos_models import (
    BOLT,
    BOLT_RANKS,
    CHRONOS2,
    CHRONOS2_RANKS,
    D_FF,
    D_KV,
    D_MODEL,
    HEADS,
    PUBLISHED,
    bolt,
    chronos2,
    dense_bolt,
    dense_chronos2,
    full_rank,
    series,
    shape,
)
from conftest import exactness, stock_implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedModel, Trainer, TrainingArguments

from hf_lowrank import (
    LowRankChronos2Config,
    LowRankChronos2Model,
    LowRankChronosBoltConfig,
    LowRankChronosBoltModelForForecasting,
)
from hf_lowrank.models import modeling_lowrank_chronos
from hf_lowrank.models.configuration_lowrank_t5 import attention_parameters, feed_forward_parameters
from hf_lowrank.models.modeling_lowrank_chronos import (
    LatentGroupAttention,
    PerHeadGroupAttention,
    TimeAttention,
    parts_by_group,
    rotary_turns,
)

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
MIXED = pytest.mark.parametrize(
    "make", [lambda: bolt(**BOLT_RANKS), lambda: chronos2(**CHRONOS2_RANKS)], ids=["bolt", "chronos2"]
)
GROUPS = torch.tensor([0, 1, 0, 2, 2, 0])


def chronos2_inputs() -> dict[str, dict[str, Any]]:
    """Calls of Chronos-2 with everything that it takes; two output patches are 10 steps."""
    covariates = torch.full((6, 9), torch.nan)
    covariates[1] = torch.randn(9)
    covariates[4, :5] = torch.randn(5)
    target = torch.randn(6, 9)
    target[2, 3] = torch.nan
    known = ~torch.isnan(covariates)
    two = {"num_output_patches": 2}
    return {
        "alone": {},
        "groups": {"group_ids": GROUPS, **two},
        "one group": {"group_ids": torch.zeros(6, dtype=torch.long), **two},
        "covariates": {"group_ids": GROUPS, "future_covariates": covariates, **two},
        "masks": {
            "context_mask": (torch.rand(6, 43) < 0.8).float(),
            "future_covariates": covariates.nan_to_num(),
            "future_covariates_mask": known.float(),
            **two,
        },
        "target": {"group_ids": GROUPS, "future_target": target, "future_covariates": covariates, **two},
    }


def predict(model: PreTrainedModel, **arguments: Any) -> torch.Tensor:
    """(B, Q, H) of `series()`, the same in each call."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        context = series()
        # Chronos-2 leaves NaN where a context mask says that a value is known.
        return model(context.nan_to_num() if "context_mask" in arguments else context, **arguments).quantile_preds


# Equal to the stock models at full rank


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "changes",
    [{}, {"chronos": {"use_reg_token": False}}, {"num_heads": 3}, {"feed_forward_proj": "gated-gelu"}],
    ids=["REG token", "no REG token", "inner size above d_model", "gated"],
)
def test_full_rank_is_bolt(changes, implementation):
    dense = dense_bolt(attn_implementation=stock_implementation(implementation), **changes)
    model = full_rank(dense, implementation)
    assert_close(predict(model), predict(dense), **exactness(implementation))
    target = torch.randn(6, 4)
    target[1, 2] = torch.nan
    for arguments in ({"target": target}, {"target": target, "mask": (torch.rand(6, 43) < 0.8).float()}):
        with torch.no_grad():
            context = series().nan_to_num()
            expected, found = (one(context, **copy.deepcopy(arguments)) for one in (dense, model))
        assert torch.isfinite(expected.loss)
        assert_close(found.loss, expected.loss, **exactness(implementation))
        assert_close(found.quantile_preds, expected.quantile_preds, **exactness(implementation))


@IMPLEMENTATIONS
@pytest.mark.parametrize("changes", [{}, {"num_heads": 3}, {"chronos": {"use_arcsinh": False}}], ids=str)
def test_full_rank_is_chronos2(changes, implementation):
    dense = dense_chronos2(attn_implementation=implementation, **changes)
    model = full_rank(dense)
    for name, arguments in chronos2_inputs().items():
        context = series().nan_to_num() if "context_mask" in arguments else series()
        with torch.no_grad():
            expected, found = (one(context, **arguments) for one in (dense, model))
        assert torch.isfinite(expected.quantile_preds).all(), name
        assert_close(found.quantile_preds, expected.quantile_preds, rtol=0, atol=0)
        if name == "target":
            assert_close(found.loss, expected.loss, rtol=0, atol=0)


def test_full_rank_is_chronos2_without_a_reg_token():
    # The stock `forward` counts on the token; `encode` does not.
    dense = dense_chronos2(chronos={"use_reg_token": False})
    with torch.no_grad():
        context = series()
        expected, found = (one.encode(context, group_ids=GROUPS)[0][0] for one in (dense, full_rank(dense)))
    assert_close(found, expected, rtol=0, atol=0)


def test_groups_and_covariates_matter():
    """Else the equalities above would say little."""
    model = full_rank(dense_chronos2())
    calls = chronos2_inputs()
    results = [predict(model, **calls[name]) for name in ("groups", "one group", "covariates")]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert (one - other).abs().max() > 1e-2


@given(
    group_ids=st.lists(st.integers(-2, 3), min_size=6, max_size=6),
    missing=st.lists(st.integers(0, 43), min_size=6, max_size=6),
    is_latent=st.booleans(),
    implementation=st.sampled_from(["eager", "sdpa"]),
    part_tokens=st.sampled_from([1, 30, 1000]),
)
def test_group_attention_inside_each_group_is_that_of_the_batch(
    group_ids, missing, is_latent, implementation, part_tokens
):
    """Of whatever sizes the groups are, and in whatever order their series come, together or in parts; some series have no value in some
    patches, or none at all."""
    group = [{"latent": 7, "query": 5, "output": 6}] * 2 if is_latent else [{"qk": 3, "vo": 5}] * 2
    model = chronos2(attention_ranks={"group": group}, attn_implementation=implementation)
    context = series()
    for row, count in zip(context, missing):
        row[:count] = torch.nan
    arguments = {"context": context, "group_ids": torch.tensor(group_ids), "num_output_patches": 2}
    with torch.no_grad():
        expected = model(**arguments).quantile_preds
        model.encoder.by_group = True
        with mock.patch.object(modeling_lowrank_chronos, "PART_TOKENS", part_tokens):
            found = model(**arguments).quantile_preds
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@given(group_ids=st.lists(st.integers(-3, 9), min_size=1, max_size=30), size=st.integers(1, 12))
def test_parts_are_whole_groups_and_no_larger_than_they_may(group_ids, size):
    groups = torch.tensor(group_ids)
    parts = parts_by_group(groups, size)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(group_ids)))
    held = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, held)) == len(set(group_ids))
    assert all(len(part) <= size or len(its) == 1 for part, its in zip(parts, held))


def test_a_large_batch_goes_through_in_parts():
    """With its own positions for each series."""
    model = chronos2()
    model.encoder.by_group = True
    sizes = []
    model.encoder.block[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    arguments = {"group_ids": torch.tensor([0, 1, 2, 1]), "position_ids": torch.randint(20, (4, 9))}
    states = torch.randn(4, 9, D_MODEL)
    with torch.no_grad():
        whole = model.encoder(states, **arguments).last_hidden_state
        with mock.patch.object(modeling_lowrank_chronos, "PART_TOKENS", 20):
            in_parts = model.encoder(states, **arguments).last_hidden_state
    assert sizes == [4, 1, 2, 1]
    assert_close(in_parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_group", [False, True])
def test_series_of_their_own_need_no_queries(by_group):
    model = chronos2()
    model.encoder.by_group = by_group
    calls = []
    for block in model.encoder.block:
        block.layer[1].self_attention.q.register_forward_hook(lambda *_: calls.append(1))
    predict(model)
    assert len(calls) == (0 if by_group else 2)


def test_values_and_output_of_large_heads_are_one_matrix():
    """Where that is less work, and nothing but a matrix stands in either place."""
    attention = layers(chronos2(), 1)[0]
    few, many = torch.randn(1, 1, attention.d_model), torch.randn(9, 11, attention.d_model)
    expected = attention.o(attention.v(many))
    with torch.no_grad(), FlopCounterMode(display=False) as one:
        assert torch.equal(attention.alone(few), attention.o(attention.v(few)))
        found = attention.alone(many)
    assert_close(found, expected)
    attention.o.register_forward_hook(lambda *_: None)
    with torch.no_grad(), FlopCounterMode(display=False) as two:
        attention.o(attention.v(few)), attention.o(attention.v(few))
        assert torch.equal(attention.alone(many), expected)
    assert one.get_total_flops() < two.get_total_flops()


@pytest.mark.parametrize("way", ["training", "weights"])
def test_what_needs_the_whole_batch_has_it(way):
    model = chronos2(dropout_rate=0.1)
    model.encoder.by_group = True
    model.train(way == "training")
    context = series()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = model(context, group_ids=GROUPS, output_attentions=way == "weights")
        if way == "weights":
            assert [weights.shape for weights in found.enc_group_self_attn_weights] == [(10, 2, 6, 6)] * 2
        else:
            model.encoder.by_group = False
            torch.manual_seed(0)
            assert torch.equal(model(context, group_ids=GROUPS).quantile_preds, found.quantile_preds)


@IMPLEMENTATIONS
def test_attention_weights_are_chronos2s(implementation):
    dense, context = dense_chronos2(attn_implementation=implementation), series()
    with torch.no_grad():
        expected, found = (one(context, group_ids=GROUPS, output_attentions=True) for one in (dense, full_rank(dense)))
    for kind in ("enc_time_self_attn_weights", "enc_group_self_attn_weights"):
        assert len(found[kind]) == 2
        for one, other in zip(found[kind], expected[kind]):
            assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("make", [dense_bolt, dense_chronos2])
def test_a_dense_checkpoint_loads_with_nothing_missing(tmp_path, make):
    dense = make()
    dense.save_pretrained(tmp_path)
    model_class = type(full_rank(dense))
    implementation = dense.config._attn_implementation
    model, info = model_class.from_pretrained(tmp_path, attn_implementation=implementation, output_loading_info=True)
    assert not any(info.values())
    assert_close(predict(model), predict(dense), rtol=0, atol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_have_the_stock_models_state(name):
    arguments = copy.deepcopy(PUBLISHED[name])
    if name == "chronos-2":
        dense_class, model_class, config_class = Chronos2Model, LowRankChronos2Model, LowRankChronos2Config
        stock_config = Chronos2Model.config_class(**copy.deepcopy(arguments))
    else:
        dense_class, model_class = ChronosBoltModelForForecasting, LowRankChronosBoltModelForForecasting
        config_class = LowRankChronosBoltConfig
        stock_config = ChronosBoltModelForForecasting.config_class(**copy.deepcopy(arguments))
    with torch.device("meta"):
        dense, model = dense_class(stock_config), model_class(config_class(**arguments))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    extra = {key: shapes.pop(key) for key in list(shapes) if key.endswith("pairs")}
    assert shapes == {key: tensor.shape for key, tensor in dense.state_dict().items()}
    assert all(size == (12, 32) for size in extra.values())
    assert len(extra) == (12 if name == "chronos-2" else 0)


# Equal to the dense layer of which they are a part


def layers(model: PreTrainedModel, position: int) -> list[Any]:
    """The time (0) or group (1) attention of each layer of a Chronos-2."""
    return [block.layer[position].self_attention for block in model.encoder.block]


def head_rows(pairs: torch.Tensor) -> torch.Tensor:
    """(n, qk) rows of the dense q: first components, then second components of the kept pairs of each head."""
    start = D_KV * torch.arange(len(pairs))[:, None]
    return torch.cat([start + pairs, start + pairs + D_KV // 2], dim=1)


@IMPLEMENTATIONS
def test_pruned_time_attention_is_the_dense_one_without_the_dropped_frequencies(implementation):
    dense = dense_chronos2(attn_implementation=implementation)
    table = {"time": [{"qk": 4, "vo": 3}, {"qk": 2, "vo": 8}]}
    model = chronos2(attn_implementation=implementation, attention_ranks=table)
    rest = {key: value for key, value in dense.state_dict().items() if ".layer.0.self_attention." not in key}
    model.load_state_dict(rest, strict=False)
    for source, target in zip(layers(dense, 0), layers(model, 0)):
        kept = head_rows(target.pairs)
        assert not torch.equal(target.pairs[0], target.pairs[1])  # each head its own choice
        values = torch.cat([D_KV * h + torch.arange(target.v.out_features // HEADS) for h in range(HEADS)])
        with torch.no_grad():
            target.q.weight.copy_(source.q.weight[kept.flatten()])
            target.k.weight.copy_(source.k.weight[kept.flatten()])
            target.v.weight.copy_(source.v.weight[values])
            target.o.weight.copy_(source.o.weight[:, values])
            dropped = torch.ones(HEADS * D_KV, dtype=torch.bool).index_fill(0, kept.flatten(), False)
            source.q.weight[dropped] = 0.0
            dropped = torch.ones(HEADS * D_KV, dtype=torch.bool).index_fill(0, values, False)
            source.o.weight[:, dropped] = 0.0
    for arguments in chronos2_inputs().values():
        assert_close(predict(model, **arguments), predict(dense, **arguments), rtol=1e-4, atol=1e-4)


def test_the_order_of_the_frequencies_does_not_matter():
    model = full_rank(dense_chronos2())
    expected = predict(model)
    for layer in layers(model, 0):
        before = head_rows(layer.pairs).flatten()
        layer.pairs.copy_(torch.rand(HEADS, D_KV // 2).argsort(dim=-1))
        after = head_rows(layer.pairs).flatten()
        with torch.no_grad():
            for matrix in (layer.q, layer.k):
                matrix.weight[before] = matrix.weight[after]
        assert not torch.equal(before, after)
    assert_close(predict(model), expected, rtol=1e-4, atol=1e-4)


def turns(layer: TimeAttention, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_turns(position_ids, layer.config, torch.float32)


def test_time_attention_knows_distances_only():
    """Logits are a function of position differences: a shift of all positions changes nothing."""
    layer = layers(chronos2(**CHRONOS2_RANKS), 0)[0]
    hidden, mask = torch.randn(3, 7, D_MODEL), torch.zeros(1, 1, 1, 7)
    positions = torch.arange(7)[None]
    with torch.no_grad():
        one, shifted, stretched = (
            layer(hidden, mask, turns(layer, ids))[0] for ids in (positions, positions + 11, positions * 2)
        )
    assert_close(one, shifted, rtol=1e-4, atol=1e-4)
    assert (one - stretched).abs().max() > 1e-3


def test_positions_may_differ_from_series_to_series():
    layer = layers(chronos2(**CHRONOS2_RANKS), 0)[0]
    hidden, mask = torch.randn(3, 7, D_MODEL), torch.zeros(1, 1, 1, 7)
    positions = torch.randint(20, (3, 7))
    with torch.no_grad():
        together = layer(hidden, mask, turns(layer, positions))[0]
        alone = torch.cat([layer(hidden[i : i + 1], mask, turns(layer, positions[i : i + 1]))[0] for i in range(3)])
    assert_close(together, alone, rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
@pytest.mark.parametrize("sketches", [True, False])
def test_latent_group_attention_with_all_of_d_model_is_dense(implementation, sketches):
    """r = d_model: P and the sketches the identity, the cores the products of the dense matrices."""
    dense = dense_chronos2(attn_implementation=implementation)
    full = D_MODEL if sketches else None
    entry = {"latent": D_MODEL, "query": full, "output": full}
    model = chronos2(attn_implementation=implementation, attention_ranks={"group": [entry] * 2})
    part = re.compile(r"layer\.1\.self_attention\.")
    rest = {key: value for key, value in full_rank(dense).state_dict().items() if not part.search(key)}
    model.load_state_dict(rest, strict=False)
    for source, target in zip(layers(dense, 1), layers(model, 1)):
        query, key, value = (matrix.weight.unflatten(0, (HEADS, -1)) for matrix in (source.q, source.k, source.v))
        output = source.o.weight.unflatten(1, (HEADS, -1))
        with torch.no_grad():
            target.latent.weight.copy_(torch.eye(D_MODEL))
            target.q.weight.copy_(torch.einsum("hrk,hrd->hkd", key, query).flatten(0, 1))
            target.o.weight.copy_(torch.einsum("dhr,hrk->dhk", output, value).flatten(1))
            if sketches:
                target.query_sketch.weight.copy_(torch.eye(D_MODEL))
                target.output_sketch.weight.copy_(torch.eye(D_MODEL))
    for arguments in chronos2_inputs().values():
        assert_close(predict(model, **arguments), predict(dense, **arguments), rtol=1e-4, atol=1e-4)


def test_eager_is_sdpa_at_any_rank():
    for make, ranks in ((bolt, BOLT_RANKS), (chronos2, CHRONOS2_RANKS)):
        eager = make(attn_implementation="eager", **ranks)
        fused = make(attn_implementation="sdpa", **ranks)
        fused.load_state_dict(eager.state_dict())
        assert_close(predict(fused), predict(eager), rtol=1e-4, atol=1e-4)


# Parameters


def sketch(limit: int) -> st.SearchStrategy:
    return st.none() | st.integers(1, limit)


PER_HEAD = st.fixed_dictionaries({"qk": st.integers(1, D_KV), "vo": st.integers(1, D_KV)})
LATENT = st.fixed_dictionaries(
    {"latent": st.integers(1, D_MODEL), "query": sketch(D_MODEL), "output": sketch(D_MODEL)}
)
TIME = st.fixed_dictionaries({"qk": st.sampled_from([2, 4, 6, 8]), "vo": st.integers(1, D_KV)})
FEED_FORWARD = st.integers(1, D_FF).flatmap(
    lambda width: st.fixed_dictionaries(
        {"width": st.just(width), "wi": sketch(min(width, D_MODEL)), "wo": sketch(min(width, D_MODEL))}
    )
)


@settings(max_examples=8)
@given(time=TIME, group=PER_HEAD | LATENT, outer=FEED_FORWARD)
def test_parameter_formulas_count_chronos2s_modules(time, group, outer):
    tables = {
        "attention_ranks": {"time": [time] * 2, "group": [group] * 2},
        "feed_forward_ranks": {"encoder": [outer] * 2},
    }
    with init_empty_weights():
        dense = Chronos2Model(Chronos2Model.config_class(**shape(CHRONOS2)))
        model = LowRankChronos2Model(LowRankChronos2Config(**shape(CHRONOS2, **tables)))
    sizes = {"d_model": D_MODEL, "num_heads": HEADS}
    expected = (
        attention_parameters(time, **sizes),
        attention_parameters(group, **sizes),
        feed_forward_parameters(outer, d_model=D_MODEL, is_gated=False),
    )
    for block in model.encoder.block:
        counts = [sum(p.numel() for p in layer.parameters()) - D_MODEL for layer in block.layer]  # less the norm
        assert tuple(counts) == expected
    inner = sum(p.numel() for p in dense.encoder.block.parameters()) - 2 * 3 * D_MODEL
    assert model.num_parameters() == dense.num_parameters() - inner + 2 * sum(expected)


@settings(max_examples=8)
@given(attention=PER_HEAD | LATENT, outer=FEED_FORWARD)
def test_parameter_formulas_count_bolts_modules(attention, outer):
    kinds = {"encoder_self": 2, "decoder_self": 3, "cross": 3}
    tables = {
        "attention_ranks": {kind: [attention] * depth for kind, depth in kinds.items()},
        "feed_forward_ranks": {"encoder": [outer] * 2, "decoder": [outer] * 3},
    }
    with init_empty_weights():
        dense = ChronosBoltModelForForecasting(ChronosBoltModelForForecasting.config_class(**shape(BOLT)))
        model = LowRankChronosBoltModelForForecasting(LowRankChronosBoltConfig(**shape(BOLT, **tables)))
    full = {"qk": D_KV, "vo": D_KV}, {"width": D_FF, "wi": None, "wo": None}
    before, after = (
        8 * attention_parameters(one, d_model=D_MODEL, num_heads=HEADS)
        + 5 * feed_forward_parameters(other, d_model=D_MODEL, is_gated=False)
        for one, other in (full, (attention, outer))
    )
    assert model.num_parameters() == dense.num_parameters() - before + after


@MIXED
def test_the_safetensors_file_holds_exactly_the_models_parameters(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    pairs = [saved.pop(name) for name in list(saved) if name.endswith("pairs")]
    assert sum(tensor.numel() for tensor in saved.values()) == model.num_parameters()
    assert [tuple(tensor.shape) for tensor in pairs] in ([], [(HEADS, 2), (HEADS, 3)])


# Fresh weights


def by_the_rules(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The stock class with all of its own `_init_weights`, which transformers 5 skips in part for classes outside of it."""
    return type(model_class.__name__, (model_class,), {"is_custom_code": classmethod(lambda cls: False)})


@pytest.mark.parametrize("from_meta", [False, True])
@pytest.mark.parametrize(
    ("dense_class", "model_class", "family"),
    [
        (ChronosBoltModelForForecasting, LowRankChronosBoltModelForForecasting, BOLT),
        (Chronos2Model, LowRankChronos2Model, CHRONOS2),
    ],
    ids=["bolt", "chronos2"],
)
def test_fresh_weights_have_the_dense_classs_spread(dense_class, model_class, family, from_meta):
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "initializer_factor": 0.05}
    dense = by_the_rules(dense_class)(dense_class.config_class(**shape(family, **sizes)))
    model = model_class(model_class.config_class(**shape(family, **sizes)))
    if from_meta:  # all weights missing
        model = model_class.from_pretrained(None, config=model.config, state_dict={})
    found = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        assert_close(found[name].std(), parameter.std(), rtol=0.25, atol=1e-6)
        assert_close(found[name].mean(), parameter.mean(), rtol=1e-6, atol=0.02)


def test_fresh_frequencies_are_spread_over_the_dense_ones():
    table = {"time": [{"qk": 4, "vo": 3}, {"qk": 8, "vo": 8}]}
    model = LowRankChronos2Model(LowRankChronos2Config(**shape(CHRONOS2, attention_ranks=table)))
    assert layers(model, 0)[0].pairs.tolist() == [[0, 2]] * HEADS
    assert layers(model, 0)[1].pairs.tolist() == [[0, 1, 2, 3]] * HEADS


# At home in transformers


@MIXED
@pytest.mark.parametrize("arguments", [{}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}], ids=str)
def test_save_and_load_change_no_bit(tmp_path, make, arguments):
    model = make()
    model.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True, **arguments)
    assert type(again) is type(model)
    assert not any(info.values())
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for name, buffer in model.named_buffers():  # those that are not in the file too
        assert torch.equal(again.get_buffer(name), buffer), name
    assert torch.equal(predict(again), predict(model))
    assert again.config.attention_ranks == model.config.attention_ranks


@MIXED
def test_layers_on_disk_give_the_same_forecast(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    inner = {f"encoder.{name}": module for name, module in model.encoder.named_children() if name != "block"}
    device_map = dict.fromkeys([*dict(model.named_children()), *inner], "cpu")
    del device_map["encoder"]
    device_map |= {"encoder.block.0": "cpu", "encoder.block.1": "disk"}
    again = AutoModel.from_pretrained(tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert {p.device.type for p in again.encoder.block[1].parameters()} == {"meta"}
    assert torch.equal(predict(again), predict(model))


def test_no_block_is_split():
    assert set(chronos2(**CHRONOS2_RANKS)._no_split_modules) == {"LowRankChronos2Block"}
    assert set(bolt(**BOLT_RANKS)._no_split_modules) == {"LowRankT5Block"}


@MIXED
def test_bfloat16(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, buffer in model.named_buffers():
        if name.endswith("pairs"):
            assert half.get_buffer(name).dtype == torch.int64
            assert torch.equal(half.get_buffer(name), buffer)
    expected, found = predict(model), predict(half).float()
    assert torch.isfinite(found).all()
    # Eight bits of mantissa: the rounding of the weights alone moves a random model's forecast by some per cent.
    assert (found - expected).norm() < 0.1 * expected.norm()
    half.save_pretrained(tmp_path / "half")
    again = AutoModel.from_pretrained(tmp_path / "half")
    assert torch.equal(predict(again), predict(half))


@MIXED
def test_every_parameter_that_can_matter_learns(make):
    model = make().train()
    if isinstance(model, LowRankChronos2Model):
        model(series(), group_ids=GROUPS, future_target=torch.randn(6, 5)).loss.backward()
    else:
        model(series(), target=torch.randn(6, 6)).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Bolt's decoder reads one token: whatever its logits are, all attention is on it.
    one_token = re.compile(
        r"decoder\.block\.\d\.layer\.0\.SelfAttention\.(q|k|query_sketch|relative_attention_bias)\."
    )
    assert without == {name for name, _ in model.named_parameters() if one_token.match(name)}


class Windows(torch.utils.data.Dataset):
    """The same few series again and again, as the Trainer wants them."""

    def __init__(self, label: str, length: int) -> None:
        wave = torch.sin(torch.arange(40 + length) / 3.0)
        self.rows = [{"context": k * wave[:40], label: k * wave[40:]} for k in (1.0, 2.0, -1.0, 0.5)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


@pytest.mark.parametrize(
    ("make", "ranks", "label", "length"),
    [(bolt, BOLT_RANKS, "target", 6), (chronos2, CHRONOS2_RANKS, "future_target", 5)],
    ids=["bolt", "chronos2"],
)
def test_the_trainer_trains_and_evaluates(tmp_path, make, ranks, label, length):
    model = make(**ranks)
    before = {name: pairs.clone() for name, pairs in model.named_buffers()}
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        label_names=[label],
        report_to="none",
        disable_tqdm=True,
        save_steps=3,
        use_cpu=True,
        lr_scheduler_type="constant",
    )
    windows = Windows(label, length)
    trainer = Trainer(model=model, args=arguments, train_dataset=windows, eval_dataset=windows)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    again = AutoModel.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(predict(again), predict(model.eval()))


def test_the_auto_classes_know_both(tmp_path):
    for make, ranks in ((bolt, BOLT_RANKS), (chronos2, CHRONOS2_RANKS)):
        model = make(**ranks)
        assert type(AutoModel.from_config(copy.deepcopy(model.config))) is type(model)
        model.config.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)


def test_the_layers_are_those_of_the_table():
    model = chronos2(**CHRONOS2_RANKS)
    assert [type(layer) for layer in layers(model, 0)] == [TimeAttention] * 2
    assert [type(layer) for layer in layers(model, 1)] == [PerHeadGroupAttention, LatentGroupAttention]


def test_bolt_has_all_that_the_stock_model_has():
    """Its `__init__` is our own, around chronos' parts: what a later stock one adds has to be added there."""
    dense, model = dense_bolt(), full_rank(dense_bolt())
    gone = set(vars(dense)) - set(vars(model)) - {"model_parallel", "device_map"}
    assert gone == set(), f"ChronosBoltModelForForecasting.__init__ now sets {sorted(gone)} too"
    parts = {name: type(part) for name, part in dense.named_children() if name not in ("encoder", "decoder")}
    assert {name: type(getattr(model, name)) for name in parts} == parts
    assert [name for name, _ in model.named_children()] == [name for name, _ in dense.named_children()]
    assert model.num_parameters() == dense.num_parameters()
