"""Compressed models as sources: the dense model that they stand for, and what becomes of them when they are compressed further."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from chronos_models import BOLT_RANKS, CHRONOS2_RANKS, alive
from layer_tools import layers_of
from torch.testing import assert_close
from transformers import AutoModel, PreTrainedModel, T5EncoderModel

from hf_lowrank import compress_pretrained, plan_compression, render_card, summarize
from hf_lowrank.checkpoints.dense import load_dense
from hf_lowrank.checkpoints.families import DENSE_CLASSES, family_of
from hf_lowrank.checkpoints.loading import load_model
from hf_lowrank.checkpoints.objectives import objective_of
from hf_lowrank.checkpoints.rank_table import RankTable
from hf_lowrank.compression.calibration import Calibration, calibrate
from hf_lowrank.compression.rounding import rounded
from hf_lowrank.models.modeling_lowrank_layers import is_matrix

WIDE = {"latent": 12, "query": None, "output": 11}  # larger than dense heads


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch):
    """Enough for models as small as these."""
    monkeypatch.setattr("hf_lowrank.compression.sensitivity.TOKENS", (256, 1024))


def with_ranks(dense: PreTrainedModel, tables: dict[str, Any]) -> PreTrainedModel:
    """A low-rank model of a dense one's shape with random weights at these ranks, as if it had been trained at them."""
    family = family_of(type(dense))
    model = alive(family.classes[type(dense)](family.lowrank_config(dense.config, **copy.deepcopy(tables))))
    with torch.no_grad():
        for name, weight in model.named_parameters():  # so that no softmax is one-hot
            if weight.ndim == 2 and "block" in name:
                weight.mul_(0.5)
    return model


def mixed(tables: dict[str, Any], kind: str) -> dict[str, Any]:
    tables = copy.deepcopy(tables)
    tables["attention_ranks"][kind][0] = dict(WIDE)
    return tables


@pytest.fixture(params=["chronos_t5", "bolt", "chronos2"])
def lowrank(request, mixed_ranks) -> PreTrainedModel:
    """Of each family a model with layers of every form."""
    dense = request.getfixturevalue(request.param)
    if request.param == "chronos2":
        return with_ranks(dense, mixed(CHRONOS2_RANKS, "group"))
    tables = mixed(BOLT_RANKS if request.param == "bolt" else mixed_ranks, "encoder_self")
    depths = dense.config.num_layers, dense.config.num_decoder_layers
    for columns in tables.values():
        for kind, entries in columns.items():
            depth = depths["encoder" not in kind]
            columns[kind] = (entries * depth)[:depth]
    return with_ranks(dense, tables)


def data_of(model: PreTrainedModel, count: int = 1) -> list:
    """Batches of a few short series."""
    objective = objective_of(model.config, load_dense(model).model_class)
    (batch,), _ = objective.batches("synthetic", 1, seed=3)
    rows = len(next(iter(batch.values()))) // (8 * count)
    pieces = [{name: tensor[i * rows : (i + 1) * rows] for name, tensor in batch.items()} for i in range(count)]
    return [objective.cut(piece, rows, short=False) for piece in pieces]


def measured_on_few(model: PreTrainedModel) -> Calibration:
    return calibrate(model, data_of(model))


def predicted(model: PreTrainedModel, batches: list) -> torch.Tensor:
    objective = objective_of(model.config, load_dense(model).model_class)
    with torch.no_grad():
        return torch.cat([objective.predict(model, batch) for batch in batches])


@pytest.fixture
def batches(lowrank) -> list:
    return data_of(lowrank)


def assert_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.detach().abs().max()))


# --- the dense model that factors stand for ---------------------------------------------------------------------------


def test_what_is_multiplied_out_computes_the_same(lowrank, batches):
    before = {name: tensor.clone() for name, tensor in lowrank.state_dict().items()}
    dense = load_dense(lowrank)
    assert dense.source_class is type(lowrank)
    assert dense.lowrank_class is type(lowrank)
    assert dense.given_ranks == RankTable.of(lowrank.config)
    whole = dense.float_model()
    assert not any("latent" in name or ".down." in name for name in whole.state_dict())
    assert_same(predicted(whole, batches), predicted(lowrank, batches))
    assert all(torch.equal(before[name], tensor) for name, tensor in lowrank.state_dict().items())


def test_so_does_an_encoder_and_one_that_is_gated(dense_t5, mixed_ranks):
    tokens = torch.randint(1, 64, (3, 11))
    for changes in ({}, {"feed_forward_proj": "gated-gelu"}):
        model = with_ranks(dense_t5(T5EncoderModel, **changes), mixed_ranks)
        whole = load_dense(model).float_model()
        assert_same(whole(tokens).last_hidden_state, model(tokens).last_hidden_state)


def test_full_ranks_are_the_dense_weights(dense):
    full = compress_pretrained(dense, ratio=1.0, calibration=None)
    found = load_dense(full)
    assert found.has_whole_heads
    for name, weight in load_dense(dense).weights.items():
        assert torch.equal(found.weights[name], weight)


# --- compressed again -------------------------------------------------------------------------------------------------


def test_what_is_small_enough_stays_as_it_is(lowrank, batches):
    """Its own table, budgets that it keeps already, and rules that ask for more than it has."""
    measured, kinds = measured_on_few(lowrank), lowrank.config.attention_ranks
    for table in ({}, copy.deepcopy(kinds)):
        found = compress_pretrained(lowrank, ranks=table, calibration=measured)
        assert RankTable.of(found.config) == RankTable.of(lowrank.config)
        for name, tensor in lowrank.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)
    latent = {kind: "latent" for kind in kinds if kind != "time"}
    for arguments in (
        {"ratio": 1.0},
        {"uniform": 8},
        {"uniform": 8, "form": latent},
        {"epsilon": 0.0},
        {"schedule": (7, 0.1)},
    ):
        found = compress_pretrained(lowrank, calibration=measured, refit=False, **arguments)
        rows = zip(summarize(found.config).rows, summarize(lowrank.config).rows)
        assert all(row.parameters <= before.parameters for row, before in rows)
        if "ratio" in arguments:
            assert_same(predicted(found, batches), predicted(lowrank, batches), 1e-3)


def test_the_same_ranks_in_another_basis_lose_nothing(lowrank, batches):
    """Every layer is made anew from the whole matrices, at ranks that their products have."""
    dense = load_dense(lowrank)
    measured = measured_on_few(lowrank)
    weights = dict(dense.given_weights)
    for layer in layers_of(dense, measured):
        weights |= layer.factorize(layer.given_ranks)
    model = copy.deepcopy(lowrank)
    model.load_state_dict(weights)
    assert_same(predicted(model, batches), predicted(lowrank, batches), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["reference-bolt", "reference-2"])
def test_compressed_further_it_is_near_what_is_compressed_at_once(reference):
    """On series that no calibration has seen."""
    dense = load_model(reference, DENSE_CLASSES, "")
    objective = objective_of(dense.config, type(dense))
    fresh = [objective.cut(batch, 64, short=False) for batch in objective.batches("synthetic", 2, seed=9)[0]]

    def lost(model: PreTrainedModel) -> float:
        pairs = [(objective.predict(dense, batch), objective.predict(model, batch), batch) for batch in fresh]
        return float(torch.cat([objective.excess(*of) for of in pairs]).mean())

    options = {"calibration": "synthetic", "seed": 1}
    half = compress_pretrained(dense, total_ratio=0.5, **options)
    twice = compress_pretrained(half, total_ratio=0.25, **options)
    once = compress_pretrained(dense, total_ratio=0.25, **options)
    for model in (twice, once):
        sizes = summarize(model.config)
        assert 0.24 < sizes.total("parameters") / sizes.total("dense_parameters") <= 0.25
    with torch.no_grad():
        losses = {name: lost(model) for name, model in (("half", half), ("twice", twice), ("once", once))}
    assert losses["half"] < losses["twice"] < 1.5 * losses["once"] + 1e-3
    rows = zip(summarize(twice.config).rows, summarize(half.config).rows)
    assert all(row.parameters <= before.parameters for row, before in rows)


@pytest.mark.slow
def test_max_loss_is_of_the_model_that_is_given(lowrank):
    rows = summarize(lowrank.config)
    share = rows.total("parameters") / rows.total("dense_parameters")
    measured = calibrate(lowrank, data_of(lowrank, 5), num_held_out_batches=1)
    record = compress_pretrained(lowrank, max_loss=0.5, calibration=measured).config.compression
    assert all(one["total_ratio"] <= share for one in record["tried"])
    assert record["measured_loss"]["bound"] <= 0.5


def test_the_record_is_kept_and_shown(tmp_path, chronos2):
    first = compress_pretrained(chronos2, ratio=0.6, calibration=None)
    first.save_pretrained(tmp_path / "first")
    second = compress_pretrained(tmp_path / "first", total_ratio=0.4, calibration=None)
    second.save_pretrained(tmp_path / "second")
    third = compress_pretrained(tmp_path / "second", uniform=2, calibration=None)
    third.save_pretrained(tmp_path / "third")
    found = AutoModel.from_pretrained(tmp_path / "third").config.compression
    assert found["source"] == "second"
    assert found["source_class"] == "LowRankChronos2Model"
    assert found["source_compression"] == second.config.compression
    assert found["source_compression"]["source_compression"] == first.config.compression
    card = str(render_card(third, "me/third"))
    assert "compress_pretrained('second', uniform=2" in card
    assert '"source_compression"' in card
    assert "predicted_loss" not in card


def test_matrices_of_integers_are_sources_as_the_numbers_they_stand_for(lowrank, batches):
    names = [name for name, module in lowrank.named_modules() if is_matrix(module) and "block.1" in name]
    stored = {
        name: rounded(lowrank.get_submodule(name).weight, None, bits=4 + 4 * (i % 2)) for i, name in enumerate(names)
    }
    lowrank.config.weight_bits = {name: 4 if "shares" in tensors else 8 for name, tensors in stored.items()}
    lowrank.quantize_modules()
    for name, tensors in stored.items():
        for key, tensor in tensors.items():
            getattr(lowrank.get_submodule(name), key).copy_(tensor)
    floats = copy.deepcopy(lowrank).dequantize()
    assert_same(predicted(load_dense(lowrank).float_model(), batches), predicted(lowrank, batches))
    again = [compress_pretrained(model, ratio=0.3, calibration=None) for model in (lowrank, floats)]
    assert len(lowrank.config.weight_bits) == len(names)
    assert again[0].config.weight_bits is None
    for name, tensor in again[0].state_dict().items():
        assert torch.equal(tensor, again[1].state_dict()[name])


@pytest.mark.slow
def test_what_is_compressed_again_becomes_integers_again(lowrank, monkeypatch):
    monkeypatch.setattr("hf_lowrank.compression.rounding.TOLERANCE", 1.0)
    found = compress_pretrained(lowrank, total_ratio=0.2, quantize="int8", calibration=measured_on_few(lowrank))
    assert set(found.config.weight_bits.values()) == {8}
    again = compress_pretrained(found, total_ratio=1.0, quantize="int4", calibration=measured_on_few(found))
    assert RankTable.of(again.config) == RankTable.of(found.config)
    layers = {name: bits for name, bits in again.config.weight_bits.items() if "block." in name}
    assert set(layers.values()) == {4}  # the matrices outside of the layers, where there are any, have 8


def test_dtypes_are_kept(chronos_t5):
    """Also of `wo`, which stays in float32 where the rest is float16."""
    half = compress_pretrained(chronos_t5, total_ratio=0.6, calibration=None).to(torch.float16)
    for name, parameter in half.named_parameters():
        if ".wo." in name:
            parameter.data = parameter.data.float()
    found = compress_pretrained(half, total_ratio=0.3, calibration=None)
    assert RankTable.of(found.config) != RankTable.of(half.config)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".wo." in name else torch.float16), name


def test_plans_are_of_the_dense_shape(chronos_t5):
    half = compress_pretrained(chronos_t5, total_ratio=0.5, calibration=None)
    rows = summarize(half.config)
    plan = plan_compression(half, total_ratio=0.25)
    layers = next(size for size in plan.sizes if size.name == "parameters of both")
    assert layers.dense == rows.total("dense_parameters")
    assert layers.at_most == int(0.25 * layers.dense)
    assert plan.sizes[-1].dense == chronos_t5.num_parameters()
    slack = plan_compression(half, total_ratio=0.9)
    assert slack.sizes[-1].at_most == half.num_parameters()
    exact = plan_compression(half, uniform=2)
    assert exact.sizes[-1].at_most == compress_pretrained(half, uniform=2, calibration=None).num_parameters()


def test_what_cannot_be_is_said(dense):
    measured = measured_on_few(dense)
    kind = "time" if "time" in family_of(type(dense)).attention else "encoder_self"
    half = compress_pretrained(dense, uniform=4, form="per_head", calibration=None)
    table = copy.deepcopy(half.config.attention_ranks[kind])
    table[1]["vo"] = 5
    with pytest.raises(ValueError, match=rf"ranks: {kind}\.1\.vo must be at most 4, as in LowRank.*, found 5"):
        compress_pretrained(half, ranks={kind: table}, calibration=None)
    with pytest.raises(ValueError, match="method='paper' truncates the matrices of whole heads; LowRank"):
        compress_pretrained(half, method="paper", ratio=0.5)
    with pytest.raises(ValueError, match="calibration must be of a model of the same shape"):
        compress_pretrained(half, ratio=0.2, calibration=measured)
    papers = compress_pretrained(dense, method="paper", ratio=0.8)
    assert (
        compress_pretrained(papers, method="paper", ratio=0.5).config.compression["source_compression"]["method"]
        == "paper"
    )
