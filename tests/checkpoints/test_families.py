"""The road from dense to low-rank for Chronos-Bolt and Chronos-2: the same properties as for T5."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from chronos import BaseChronosPipeline
from hypothesis import given
from hypothesis import strategies as st
from layer_tools import layers_of, only, predictions, truncated
from torch.testing import assert_close
from transformers import AutoModel, PreTrainedModel

from hf_lowrank import Calibration, calibrate, compress_pretrained, summarize
from hf_lowrank.checkpoints import published as shapes
from hf_lowrank.checkpoints.dense import load_chronos, load_dense
from hf_lowrank.checkpoints.families import BOLT, CHRONOS2, T5, family_of
from hf_lowrank.checkpoints.objectives import objective_of
from hf_lowrank.checkpoints.pipelines import as_pipeline
from hf_lowrank.checkpoints.published import SHAPES
from hf_lowrank.compression.factorization import balanced_basis, pair_basis
from hf_lowrank.compression.sensitivity import Blocks, inserted, measured_losses, skipped

FAMILIES = ("bolt", "chronos2")
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch):
    """Enough for models as small as these."""
    monkeypatch.setattr("hf_lowrank.compression.sensitivity.TOKENS", (256, 1024))


@pytest.fixture
def model(request, family) -> PreTrainedModel:
    return request.getfixturevalue(family)


@pytest.fixture(scope="module")
def calibrations() -> dict[str, Calibration]:
    return {}


@pytest.fixture
def calibration(model, family, calibrations) -> Calibration:
    """The model, which is the same for every test, on two synthetic batches."""
    if family not in calibrations:
        calibrations[family] = calibrate(model, num_batches=2)
    return calibrations[family]


def quantiles(model: PreTrainedModel, **more: Any) -> torch.Tensor:
    context = torch.randn(5, 45, generator=torch.Generator().manual_seed(1)).cumsum(1)
    context[0, :30] = torch.nan
    context[1, 7] = torch.nan
    if "Chronos2" in type(model).__name__:
        future = torch.full((5, 16), torch.nan)
        future[1] = 1.0
        more |= {"group_ids": torch.tensor([0, 0, 1, 2, 2]), "num_output_patches": 2, "future_covariates": future}
    with torch.no_grad():
        return model(context=context, **more).quantile_preds


@families
def test_a_folder_is_loaded_as_its_family(tmp_path, model, family):
    model.save_pretrained(tmp_path)
    dense = load_dense(tmp_path)
    assert dense.model_class is type(model)
    assert dense.family is {"bolt": BOLT, "chronos2": CHRONOS2}[family]
    assert family_of(dense.lowrank_class) is dense.family
    kinds = [name.kind for name, _ in (*dense.layers, *dense.feed_forward_layers)]
    assert set(kinds) == set(dense.family.places)
    assert len(kinds) == {"bolt": 2 + 2 * 3 + 2 + 3, "chronos2": 3 * 2}[family]
    for loaded in (dense.float_model(), load_chronos(tmp_path)):
        for name, weight in model.state_dict().items():
            assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
        # Kernels round as the weights lie in memory.
        assert_close(quantiles(loaded), quantiles(model), rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("arguments", [{"ratio": 1.0}, {"uniform": 8}, {"epsilon": 0.0}, {"total_ratio": 1.0}])
def test_full_rank_is_the_dense_model(model, calibration, arguments):
    found = compress_pretrained(model, calibration=calibration, **arguments)
    wanted = quantiles(model)
    assert_close(quantiles(found), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), equal_nan=True)


@families
def test_inserted_is_truncated(model, calibration):
    dense = load_dense(model)
    probed, wanted_full = dense.float_model(), quantiles(model)
    scale = float(wanted_full.nan_to_num().abs().max())
    seen = set()
    last = {layer.name.kind: layer for layer in layers_of(dense, calibration)}.values()
    for layer in last:
        for part, point in layer.points().items():
            rank = max(2, point.basis.left.shape[1] // 2 // 2 * 2)
            with inserted(probed, point.projection(rank)):
                found = quantiles(probed)
            wanted = quantiles(truncated(dense, layer, only(layer, part, rank)))
            assert_close(found, wanted, rtol=1e-4, atol=1e-4 * scale, equal_nan=True)
            if (found - wanted_full).nan_to_num().abs().max() > 1e-4 * scale:
                seen.add((layer.name, part))
    everything = {(layer.name, part) for layer in last for part in layer.points()}
    # Bolt's decoder has one token: there is nothing for its queries to choose from.
    single = {(name, part) for name, part in everything if name.kind == "decoder_self" and part in ("qk", "query")}
    assert seen == everything - single


@families
def test_blocks_before_the_change_need_not_run(monkeypatch, model, calibration):
    """Measured from the recorded answers of the dense blocks, and with every block run again."""
    monkeypatch.setattr("hf_lowrank.compression.sensitivity.TOKENS", (10**6, 10**7))  # all of them
    dense = load_dense(model)
    layers = layers_of(dense, calibration)
    table = {layer.name: only(layer, "wo" if layer.name.is_feed_forward else "vo", 2) for layer in layers}
    probed, objective = dense.float_model(), objective_of(dense.config, dense.model_class)
    batches = [objective.cut(batch, 24, short=False) for batch in calibration.batches]
    losses = measured_losses(dense, probed, layers, table, batches, predictions(layers))
    for layer in layers:
        part = "wo" if layer.name.is_feed_forward else "vo"
        total = count = 0.0
        with torch.no_grad():
            for batch in batches:
                wanted = objective.predict(probed, batch)
                with inserted(probed, layer.points()[part].projection(2)):
                    total += objective.divergence(wanted, objective.predict(probed, batch))
                count += len(wanted)
        assert losses[layer.component(part)] == pytest.approx(total / count, rel=1e-3)


@families
def test_skipped_blocks_are_as_before_afterwards(model):
    blocks = Blocks(model, load_dense(model).stacks)
    wanted = quantiles(model)
    with blocks.recorded() as answers:
        quantiles(model)
    with skipped(blocks.modules, answers):
        assert_close(quantiles(model), wanted, rtol=0, atol=0, equal_nan=True)
    assert not any("forward" in vars(block) or block._forward_hooks for block in blocks.modules)
    assert_close(quantiles(model), wanted, rtol=0, atol=0, equal_nan=True)


@families
def test_small_losses_are_predicted(model):
    """The sum of dropped squared singular values says which component costs how much more than another."""
    calibration = calibrate(model, num_batches=6)
    dense = load_dense(model)
    probed, objective = dense.float_model(), objective_of(dense.config, dense.model_class)
    batches = [objective.cut(batch, 40, short=False) for batch in calibration.batches]
    with torch.no_grad():
        wanted = [objective.predict(model, batch) for batch in batches]
    pairs = []
    for layer in layers_of(dense, calibration):
        for part, point in layer.points().items():
            component = layer.components(weight=None)[layer.component(part)]
            rank = point.basis.left.shape[1] - (2 if component.step == 2 else 1)
            predicted = component.loss[rank]
            if predicted < 1e-9 or (part in ("qk", "query") and layer.name.kind == "decoder_self"):
                continue
            total = count = 0.0
            with torch.no_grad(), inserted(probed, point.projection(rank)):
                for batch, reference in zip(batches, wanted):
                    total += objective.divergence(reference, objective.predict(probed, batch))
                    count += len(reference)
            pairs.append((predicted, total / count))
    assert len(pairs) > 15
    # In scale they differ: the gradients of the series that matter most are clipped.
    assert np.corrcoef(np.log(pairs).T)[0, 1] > 0.7
    assert 1 / 4 < np.median([measured / predicted for predicted, measured in pairs]) < 10


@families
def test_budgets_are_kept_and_counted(model, calibration):
    for arguments, kinds in (({"ratio": 0.4}, "attention"), ({"total_ratio": 0.5}, "all")):
        found = compress_pretrained(model, calibration=calibration, **arguments)
        sizes = summarize(found.config)
        chosen = [row for row in sizes.rows if kinds == "all" or not row.kind.endswith("feed_forward")]
        kept = sum(row.parameters for row in chosen) / sum(row.dense_parameters for row in chosen)
        assert 0.8 * next(iter(arguments.values())) < kept <= next(iter(arguments.values()))
        assert sizes.total("cached_numbers") == 0
        saved = sizes.total("dense_parameters") - sizes.total("parameters")
        assert model.num_parameters() - found.num_parameters() == saved
        assert torch.isfinite(quantiles(found)).all()


@families
def test_refit_lowers_the_divergence(model, calibration):
    objective = objective_of(model.config, type(model))
    lost = []
    for refit in (False, True):
        found = compress_pretrained(model, ratio=0.4, calibration=calibration, refit=refit)
        with torch.no_grad():
            pairs = [(objective.predict(model, b), objective.predict(found, b)) for b in calibration.batches]
        lost.append(sum(objective.divergence(*pair) for pair in pairs))
    assert lost[1] < 0.9 * lost[0]


@families
def test_calibration_beats_weights_alone(model, calibration):
    objective = objective_of(model.config, type(model))
    fresh, _ = objective.batches("synthetic", 2, seed=99)
    lost = []
    for data in (None, calibration):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compress_pretrained(model, ratio=0.4, calibration=data)
        with torch.no_grad():
            lost.append(
                sum(objective.divergence(objective.predict(model, b), objective.predict(found, b)) for b in fresh)
            )
    assert lost[1] < 0.7 * lost[0]


@families
@pytest.mark.parametrize(
    "arguments",
    [
        {"uniform": 3},
        {"energy": 0.1},
        {"epsilon": 0.3},
        {"schedule": (3, 0.4)},
        {"schedule": (3, 0.4), "form": "latent"},
        {"ratio": 0.3, "form": "latent", "refit": False},
        {"ratio": 0.6, "multiple_of": 4, "feed_forward_ratio": 0.5},
        {"ratio": 0.5, "method": "paper"},
    ],
    ids=str,
)
def test_every_policy_makes_a_model_that_forecasts_alike_after_a_reload(tmp_path, model, calibration, arguments):
    more = {} if arguments.get("method") else {"calibration": calibration}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compress_pretrained(model, **arguments, **more)
    assert torch.isfinite(quantiles(found)).all()
    found.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, weight in found.state_dict().items():
        assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
    assert_close(quantiles(loaded), quantiles(found), rtol=1e-4, atol=1e-4)
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is type(as_pipeline(found))
    series = [np.sin(np.arange(40.0)), np.arange(30.0)]
    wanted, _ = as_pipeline(found).predict_quantiles([torch.tensor(s) for s in series], 12)
    again, _ = pipeline.predict_quantiles([torch.tensor(s) for s in series], 12)
    for one, other in zip(wanted, again):
        assert_close(one, other, rtol=1e-4, atol=1e-4)
    if "uniform" in arguments and found.config.model_type == "lowrank_chronos2":
        assert {entry["qk"] for entry in found.config.attention_ranks["time"]} == {4}  # whole pairs


@families
def test_calibration_of_series_and_its_file(tmp_path, model, family):
    series = [np.sin(np.arange(90.0) / k) for k in (1, 2, 5)] + [np.full(60, np.nan)]
    with pytest.warns(UserWarning, match="1 of 4 series have no observed value"):
        found = calibrate(model, series, num_batches=2)
    assert found.record["data"] == "3 series"
    found.save(tmp_path / "calibration.safetensors")
    first = compress_pretrained(model, ratio=0.5, calibration=found)
    second = compress_pretrained(model, ratio=0.5, calibration=tmp_path / "calibration.safetensors")
    assert_close(quantiles(first), quantiles(second), rtol=0, atol=0)
    with pytest.raises(ValueError, match="calibration must be of a model of the same shape"):
        compress_pretrained(model, ratio=0.5, calibration=_of_another(found))


def _of_another(calibration: Calibration) -> Calibration:
    shape = {**calibration.record["shape"], "d_model": 99}
    return Calibration(calibration.grams, calibration.batches, {**calibration.record, "shape": shape})


@families
@pytest.mark.parametrize("values", [[1.0] * 40, [3.0, 4.0]], ids=["constant", "short"])
def test_series_that_say_nothing_are_refused(model, values):
    with pytest.raises(ValueError, match=r"has one value throughout|none of 1 has .* observed values"):
        compress_pretrained(model, total_ratio=0.5, calibration=[np.array(values)])


@families
@pytest.mark.filterwarnings("ignore:calibration:UserWarning")
@pytest.mark.parametrize("values", [[1.0] * 39 + [2.0] * 20, [3.0, 4.0] * 4], ids=["nearly constant", "short"])
def test_degenerate_series_leave_finite_weights(model, values):
    found = compress_pretrained(model, total_ratio=0.5, calibration=[np.array(values)])
    assert all(torch.isfinite(weight).all() for weight in found.state_dict().values() if weight.is_floating_point())
    assert torch.isfinite(quantiles(found)).all()


@families
def test_what_this_family_cannot_do_is_said(model, calibration):
    with pytest.raises(ValueError, match="keeps no cache"):
        compress_pretrained(model, max_cache_ratio=0.5, calibration=calibration)
    with pytest.raises(ValueError, match=r"form has unknown kinds of attention \['sideways'\]"):
        compress_pretrained(model, ratio=0.5, form={"sideways": "latent"})


def test_time_attention_is_never_latent(chronos2):
    with pytest.raises(ValueError, match="time attention has rotary embeddings and can only be 'per_head'"):
        compress_pretrained(chronos2, ratio=0.5, form={"time": "latent"})


def test_low_precision_checkpoints_keep_their_dtype(chronos2):
    measured = calibrate(chronos2, num_batches=1)
    found = compress_pretrained(chronos2.to(torch.bfloat16), ratio=0.5, calibration=measured)
    kinds = {weight.dtype for name, weight in found.state_dict().items() if not name.endswith("pairs")}
    assert kinds == {torch.bfloat16}
    assert found.encoder.block[0].layer[0].self_attention.pairs.dtype == torch.int64


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pairs_are_dropped_in_the_order_of_what_they_add(heads, pairs, seed):
    generator = torch.Generator().manual_seed(seed)

    def gram() -> torch.Tensor:
        rows = torch.randn(heads, 2 * pairs, 3 * pairs, generator=generator, dtype=torch.float64)
        return rows @ rows.mT

    gradient, activation = gram(), gram()
    basis = pair_basis(gradient, activation)
    assert (basis.order.sort(dim=1).values == torch.arange(pairs)).all()
    product = gradient * activation
    for rank in range(2, 2 * pairs + 1, 2):
        left, right = basis.truncate(rank)
        assert_close(left, right, rtol=0, atol=0)
        kept = left @ right.mT
        assert_close(kept @ kept, kept, rtol=0, atol=0)
        for head in range(heads):
            dropped = torch.tensor([p for p in range(pairs) if p not in basis.pairs(rank)[head].tolist()])
            rows = torch.cat([dropped, dropped + pairs]).long()
            loss = float(product[head][rows][:, rows].sum())
            tail = float(basis.singular_values[head, rank:].square().sum())
            # Correlated pairs may cancel, which counts as nothing and never as a gain.
            assert tail >= loss - 1e-9 * float(product[head].abs().sum())
    # Where pairs are independent of each other, the tail is the loss.
    blocks = torch.kron(torch.ones(2, 2), torch.eye(pairs)).double()
    independent = pair_basis(gradient * blocks, activation * blocks)
    per_pair = (product * blocks).sum(-1).unflatten(1, (2, pairs)).sum(1).sort(dim=1, descending=True).values
    assert_close(independent.singular_values.square().unflatten(1, (pairs, 2)).sum(-1), per_pair.clamp_min(0))


def test_a_family_is_found_by_its_classes(bolt, chronos2, chronos_t5):
    assert [family_of(type(model)) for model in (bolt, chronos2, chronos_t5)] == [BOLT, CHRONOS2, T5]
    assert family_of(torch.nn.Linear) is None
    assert balanced_basis(torch.eye(2)[None], torch.eye(2)[None]).left.shape == (1, 2, 2)


@pytest.mark.parametrize("shape", [name for name in SHAPES if not name.startswith("t5-")])
def test_published_shapes_are_compressed(tmp_path, shape):
    """Built in the stock class, one layer deep, saved, and compressed from the folder."""
    model_class, config = shapes._dense(shape)
    config.num_layers = 1
    if shape != "chronos-2":
        config.num_decoder_layers = 1
    model_class(config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compress_pretrained(tmp_path, ratio=0.25, calibration=None)
    assert 0.2 < summarize(found.config).attention_ratio <= 0.25
    _, mean = as_pipeline(found).predict_quantiles([torch.arange(300.0)], 64)
    assert torch.isfinite(torch.as_tensor(mean[0])).all()


@pytest.mark.parametrize(
    ("shape", "form"), [("bolt-tiny", "per_head"), ("bolt-tiny", "latent"), ("chronos-2", "latent")]
)
def test_low_rank_shapes_for_measurements_keep_their_share(tmp_path, monkeypatch, shape, form):
    monkeypatch.setitem(SHAPES, "chronos-2", (64, 128, 2, 2))
    shapes.build_checkpoint(tmp_path, shape, ratio=0.25, form=form, feed_forward_ratio=0.5)
    config = AutoModel.from_pretrained(tmp_path).config
    assert 0.1 < summarize(config).attention_ratio < 0.3 + (shape == "chronos-2") * 0.1
    assert all(entry["width"] == config.d_ff // 2 for entry in config.feed_forward_ranks["encoder"])
    attention_kind = "group" if shape == "chronos-2" else "cross"
    assert ("latent" in config.attention_ranks[attention_kind][0]) == (form == "latent")
