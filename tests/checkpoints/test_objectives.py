"""What an error costs: the excess quantile loss against its integral, its curvature, and what counts in a batch."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_lowrank import Calibration, GroupedSeries, calibrate
from hf_lowrank.checkpoints.objectives import (
    LEAST_SPACING,
    objective_of,
    quantile_density,
    quantile_excess,
    quantile_loss,
)

LEVELS = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.9])
SEEDS = st.integers(0, 2**32 - 1)


def quantiles(seed: int, *, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(3, len(LEVELS), 4, generator=generator)).sort(dim=1).values


def distribution(knots: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The knots of the distribution function of one step, with its two ends, and its values there."""
    x, p = knots.double().numpy(), LEVELS.double().numpy()
    first = x[0] - p[0] * (x[1] - x[0]) / (p[1] - p[0])
    last = x[-1] + (1 - p[-1]) * (x[-1] - x[-2]) / (p[-1] - p[-2])
    return np.concatenate([[first], x, [last]]), np.concatenate([[0.0], p, [1.0]])


def expected_pinball(x: np.ndarray, p: np.ndarray, forecast: float, level: float) -> float:
    """2 E[pinball] by a fine quadrature over the levels u of y = F^-1(u)."""
    u = (np.arange(200_000) + 0.5) / 200_000
    y = np.interp(u, p, x)
    return float(2 * np.maximum(level * (y - forecast), (level - 1) * (y - forecast)).mean())


@given(SEEDS)
def test_the_excess_is_that_of_the_expected_quantile_loss(seed):
    wanted = quantiles(seed)
    found = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed + 1))
    excess = quantile_excess(wanted, found, LEVELS)
    spread = LEAST_SPACING * torch.arange(len(LEVELS))[:, None]
    x, p = distribution((wanted + spread)[0, :, 0])
    for k, level in enumerate(LEVELS.double().tolist()):
        best = float(x[k + 1])
        moved = best + float(found[0, k, 0] - wanted[0, k, 0])
        difference = expected_pinball(x, p, moved, level) - expected_pinball(x, p, best, level)
        assert excess[0, k, 0] == pytest.approx(difference, abs=1e-4)


@given(SEEDS)
def test_the_loss_that_a_forecast_expects_of_itself(seed):
    wanted = quantiles(seed)
    loss = quantile_loss(wanted, LEVELS)
    assert (loss > 0).all()
    x, p = distribution((wanted + LEAST_SPACING * torch.arange(len(LEVELS))[:, None])[0, :, 0])
    for k, level in enumerate(LEVELS.double().tolist()):
        assert loss[0, k, 0] == pytest.approx(expected_pinball(x, p, float(x[k + 1]), level), abs=1e-4)


def test_what_is_lost_does_not_depend_on_how_precise_a_forecast_is(bolt):
    objective = objective_of(bolt.config, type(bolt))
    wanted = torch.linspace(-1, 1, len(objective.levels))[None, :, None].repeat(1, 1, 64)
    lost = [objective.divergence(scale * wanted, scale * (wanted + 0.1)) for scale in (1.0, 10.0, 1000.0)]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)  # to the least spacing
    assert lost[2] == pytest.approx(lost[1], rel=0.05)


@given(SEEDS, st.sampled_from([1e-8, 0.01, 1.0, 1e4]))
def test_the_excess_is_never_negative_and_zero_for_the_dense_forecast(seed, spread):
    wanted = quantiles(seed, spread=spread)[:, torch.randperm(len(LEVELS))]  # quantiles may cross
    other = quantiles(seed + 1, spread=spread)
    assert (quantile_excess(wanted, wanted, LEVELS) == 0).all()
    excess = quantile_excess(wanted, other, LEVELS)
    assert torch.isfinite(excess).all()
    assert (excess >= 0).all()
    # The quantile loss grows no faster than twice the distance.
    assert (excess <= 2 * (other - wanted).abs().double() + 1e-9 * spread).all()


@given(SEEDS)
def test_the_density_is_the_curvature_of_the_excess(seed):
    """On evenly spaced quantiles the pieces on both sides of a knot have one slope, and the curvature there is exact."""
    levels = torch.linspace(0.1, 0.9, 9)
    width = 1 + torch.rand(1, 1, 4, generator=torch.Generator().manual_seed(seed))
    wanted = torch.linspace(-1, 1, 9)[:, None] * width
    step = torch.full_like(wanted, 1e-3)
    curvature = quantile_density(wanted, levels) * step.double().square()
    assert_close(quantile_excess(wanted, wanted + step, levels), curvature, rtol=1e-4, atol=0)


def test_the_surrogate_has_the_curvature_of_the_divergence(bolt):
    """E[(g^T delta)^2] / 2 over the draws is the divergence of a small step delta of the predictions."""
    objective = objective_of(bolt.config, type(bolt))
    generator = torch.Generator().manual_seed(0)
    batch = {"context": torch.randn(2, 64, generator=generator).cumsum(1)}
    with torch.no_grad():
        wanted = objective.predict(bolt, batch)
    delta = 1e-3 * torch.randn(wanted.shape, generator=generator)
    products = []
    for _ in range(4000):
        leaf = wanted.clone().requires_grad_(True)
        objective.surrogate(leaf, generator).backward()
        products.append((leaf.grad * delta).sum(dim=(1, 2)))  # rows are drawn independently
    predicted = torch.stack(products).double().square().mean(0).sum() / 2
    levels = torch.tensor(bolt.config.chronos_config["quantiles"])
    added = (quantile_density(wanted, levels) * delta.double().square()).mean(dim=(1, 2))
    curvature = (added / quantile_loss(wanted, levels).mean(dim=(1, 2))).sum()
    assert float(predicted) == pytest.approx(float(curvature), rel=0.1)


def test_patches_with_a_value_and_the_register_token_count(bolt):
    objective = objective_of(bolt.config, type(bolt))
    context = torch.full((2, 20), torch.nan)
    context[0, 3] = 1.0
    context[1, -1] = 2.0
    masks = objective.masks({"context": context})
    assert masks["encoder"].tolist() == [[True, False, False, True], [False, False, True, True]]
    assert masks["decoder"].tolist() == [[True], [True]]
    # As the model masks them.
    seen = []
    handle = bolt.encoder.register_forward_pre_hook(
        lambda _, __, keywords: seen.append(keywords["attention_mask"]), with_kwargs=True
    )
    bolt(context=context)
    handle.remove()
    assert_close(masks["encoder"].float(), seen[0].float())


def test_groups_share_parts_and_known_futures_are_not_predicted(chronos2):
    objective = objective_of(chronos2.config, type(chronos2))
    batches, record = objective.batches("synthetic", 3, seed=4)
    again, _ = objective.batches("synthetic", 3, seed=4)
    assert record == {"data": "synthetic"}
    for batch, same in zip(batches, again):
        for name, tensor in batch.items():
            assert_close(tensor, same[name], rtol=0, atol=0, equal_nan=True)
        ids, future = batch["group_ids"], batch["future_covariates"]
        known = ~future.isnan().all(dim=1)
        assert known.any()
        assert not known[torch.cat([torch.ones(1, dtype=torch.bool), ids[1:] != ids[:-1]])].any()
        assert future.shape[1] % 8 == 0
        assert len(objective.predict(chronos2, batch)) == int((~known).sum())
    sizes = torch.cat([torch.bincount(batch["group_ids"]) for batch in batches])
    assert {1, 2, 8} <= set(sizes.tolist())


def test_a_probe_of_few_series_is_the_batch_without_the_others(chronos2):
    objective = objective_of(chronos2.config, type(chronos2))
    (batch,), _ = objective.batches("synthetic", 1, seed=0)
    few = objective.cut(batch, 3, short=False)
    assert {len(tensor) for tensor in few.values()} == {3}
    assert objective.num_tokens(few) * len(batch["context"]) == 3 * objective.num_tokens(batch)


def frame_of_groups(num_items: int) -> pd.DataFrame:
    """Items with two targets, a covariate of the past and one that is known."""
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"item_id": i, "timestamp": pd.date_range("2024-01-01", periods=90)}).assign(
            **{name: rng.normal(size=90) for name in ("a", "b", "past", "known")}
        )
        for i in range(num_items)
    ]
    return pd.concat(parts)


@pytest.mark.parametrize("num_items", [3, 12])
def test_groups_of_the_users_are_kept_and_their_targets_predicted(chronos2, tmp_path, num_items):
    series = GroupedSeries(frame_of_groups(num_items), ["a", "b"], past_covariates="past", known_covariates="known")
    calibration = calibrate(chronos2, series, num_batches=1, num_held_out_batches=1)
    assert calibration.record["data"] == f"{num_items} groups of 2 targets, 1 past covariate, 1 known covariate"
    calibration.save(tmp_path / "groups.safetensors")
    loaded = Calibration.load(tmp_path / "groups.safetensors")
    objective = objective_of(chronos2.config, type(chronos2))
    measured, held_out = (
        torch.cat([batch["context"].flatten() for batch in of]) for of in (loaded.batches, loaded.held_out)
    )
    assert not torch.isin(held_out[~held_out.isnan()], measured).any()
    for batch in (*loaded.batches, *loaded.held_out):
        rows = len(batch["context"])
        assert torch.equal(batch["group_ids"], torch.arange(rows) // 4)
        assert batch["is_target"].dtype == torch.bool
        assert not batch["is_target"].view(-1, 4)[:, 2:].any()
        assert batch["is_target"].view(-1, 4)[:, :2].any(dim=1).all()
        assert torch.equal(~batch["future_covariates"].isnan().all(dim=1), torch.arange(rows) % 4 == 3)
        predicted = objective.predict(chronos2, batch)
        assert len(predicted) == int(batch["is_target"].sum())
        few = objective.cut(batch, 6, short=False)
        assert len(few["context"]) == 8  # whole groups
        own = len(objective.predict(chronos2, few))
        assert_close(objective.predict(chronos2, few), predicted[:own], rtol=1e-4, atol=1e-4)


def test_batches_say_which_rows_are_targets(chronos2):
    objective = objective_of(chronos2.config, type(chronos2))
    rows = {"context": torch.randn(3, 24), "future_target": torch.full((3, 8), torch.nan)}
    rows["future_target"][1, 2] = 0.0
    assert torch.equal(objective.complete(rows)["is_target"], torch.tensor([False, True, False]))
    assert len(objective.predict(chronos2, objective.complete(rows | {"is_target": [True, True, False]}))) == 2
    assert "is_target" not in objective.complete({"context": rows["context"]})
    with pytest.raises(
        ValueError, match=r"is_target must be bool of shape \(3,\) with a True, found torch.int64 of shape"
    ):
        objective.complete(rows | {"is_target": [1, 0]})


def test_other_models_read_the_targets_of_groups_alone(bolt):
    series = GroupedSeries(frame_of_groups(3), ["a", "b"], known_covariates="known")
    with pytest.warns(UserWarning, match="each of 6 targets of 3 groups .* is taken as a series of its own"):
        batches, record = objective_of(bolt.config, type(bolt)).batches(series, 2, seed=0)
    alone, same = objective_of(bolt.config, type(bolt)).batches(series.targets, 2, seed=0)
    assert record == same == {"data": "6 series"}
    assert_close(batches, alone, equal_nan=True)


def test_what_a_batch_lacks_is_named(bolt, chronos2):
    with pytest.raises(ValueError, match="every batch must have a context of shape"):
        objective_of(bolt.config, type(bolt)).complete({"target": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"future_covariates must have shape \(2, a multiple of 8\), found \(2, 7\)"):
        objective_of(chronos2.config, type(chronos2)).complete(
            {"context": torch.ones(2, 9), "future_covariates": torch.ones(2, 7)}
        )
