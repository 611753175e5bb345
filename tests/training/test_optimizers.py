"""Muon for matrices and AdamW for the rest: what each has, how large a step is, and that it can be saved and driven as one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from hf_lowrank.training.optimizers import MuonWithAdamW, StackedMuon, muon_with_adamw
from hf_lowrank.training.plan import initial_model
from hf_lowrank.training.settings import PretrainingSettings

SETTINGS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.9, 0.98), "eps": 1e-8}
CASES = [(family, rank) for family in ("t5", "bolt", "chronos2") for rank in (None, 2)]


def fresh(family: str, rank: float | None) -> PreTrainedModel:
    return initial_model(
        PretrainingSettings(family=family, base_rank=rank, d_model=16, num_heads=2, d_kv=8, num_layers=2)
    )


def with_gradients(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(("family", "rank"), CASES)
def test_each_parameter_has_one_optimizer(family: str, rank: float | None) -> None:
    model = fresh(family, rank)
    *matrices, others = muon_with_adamw(model, **SETTINGS).param_groups
    found = [id(parameter) for group in (*matrices, others) for parameter in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_adamw = {names[id(parameter)] for parameter in others["params"]}
    assert {name for name in by_adamw if not name.endswith(("bias", "norm.weight"))} == {
        name
        for name in names.values()
        if "relative_attention_bias" in name or name in ("shared.weight", "lm_head.weight")
    }


@pytest.mark.parametrize(("family", "num_biases"), [("t5", 2), ("bolt", 2), ("chronos2", 0)])
def test_the_position_bias_has_a_rate_of_its_own(family: str, num_biases: int) -> None:
    model = with_gradients(fresh(family, None))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    muon_with_adamw(model, position_rate=20.0, **SETTINGS).step()
    biases = [name for name in before if "relative_attention_bias" in name]
    assert len(biases) == num_biases
    for name in [*biases, *(name for name in before if name.endswith("norm.weight"))]:
        step = (model.get_parameter(name) - before[name]).abs().max().item()
        assert step == pytest.approx((20.0 if name in biases else 1.0) * SETTINGS["lr"], rel=1e-3), name


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_of_tokens_is_no_matrix_of_muons(is_tied: bool) -> None:
    model = fresh("t5", None)
    if not is_tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    *_, others = muon_with_adamw(model, **SETTINGS).param_groups
    assert any(parameter is model.lm_head.weight for parameter in others["params"])


def test_matrices_go_as_torchs_muon_has_them_go() -> None:
    shapes = [(12, 12), (12, 12), (12, 30), (30, 12), (12, 30)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    steps = StackedMuon([{"params": ours}], **settings), Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for one, other in zip(ours, theirs):
            one.grad = other.grad = torch.randn(one.shape, generator=generator)
        for optimizer in steps:
            optimizer.step()
    assert all(not torch.equal(one, torch.ones(one.shape)) for one in ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)  # theirs in bfloat16


def test_frozen_parameters_stay_out() -> None:
    model = fresh("bolt", None)
    model.encoder.requires_grad_(False)
    taken = [one for group in muon_with_adamw(model, **SETTINGS).param_groups for one in group["params"]]
    assert all(one.requires_grad for one in taken)
    assert len(taken) == sum(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("family", ["t5", "bolt", "chronos2"])
def test_a_step_of_a_matrix_is_as_long_in_all_directions(family: str) -> None:
    """The singular values of an update are 0.2 sqrt(max(m, n)) times the learning rate, queries' d_kv^-1/2 of that.

    Muon's five Newton-Schulz steps bring those that are not near zero to between 0.68 and 1.14 of it.
    """
    model = with_gradients(fresh(family, None))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    muon_with_adamw(model, **SETTINGS).step()
    seen = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        values = torch.linalg.svdvals(module.weight.detach() - before[f"{name}.weight"])
        scale = 8**-0.5 if name.endswith(".q") else 1.0
        ratio = values / (SETTINGS["lr"] * 0.2 * max(module.weight.shape) ** 0.5 * scale)
        assert ratio.max() < 1.3
        assert ratio.median() > 0.6
        seen.add(name.endswith(".q"))
    assert seen == {True, False}


def test_it_goes_on_as_it_would_have_gone_on() -> None:
    """Saved and loaded as Trainer does it, under a schedule, to the same bits."""

    def run(steps: range, model: PreTrainedModel, optimizer: MuonWithAdamW, schedule: LambdaLR) -> None:
        for step in steps:
            with_gradients(model, step)
            optimizer.step()
            schedule.step()

    def begin(model: PreTrainedModel) -> tuple[PreTrainedModel, MuonWithAdamW, LambdaLR]:
        optimizer = muon_with_adamw(model, **SETTINGS)
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    whole = begin(fresh("bolt", None))
    run(range(6), *whole)
    first = begin(fresh("bolt", None))
    run(range(3), *first)
    second = begin(fresh("bolt", None))
    for have, take in zip(second, first):
        file = io.BytesIO()
        torch.save(take.state_dict(), file)
        file.seek(0)
        have.load_state_dict(torch.load(file, weights_only=True))
    run(range(3, 6), *second)
    for wanted, found in zip(whole[0].parameters(), second[0].parameters()):
        assert torch.equal(wanted, found)
    assert {group["lr"] for group in second[1].param_groups} == {1e-2 / 7, 1e-2 / 7 * 8**-0.5}


def test_a_closure_is_called_once() -> None:
    model = fresh("bolt", None)
    optimizer = muon_with_adamw(model, **SETTINGS)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(context=torch.arange(32.0)[None], target=torch.arange(64.0)[None]).loss
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
