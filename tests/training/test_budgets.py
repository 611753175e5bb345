"""Training within budgets: what is inserted and when, that a run goes on, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_lowrank import PretrainingSettings, calibrate, compress_pretrained, pretrain
from hf_lowrank.checkpoints.objectives import objective_of
from hf_lowrank.compression.compress import projections_within
from hf_lowrank.compression.sensitivity import PROBE_ARITHMETIC, inserted
from hf_lowrank.training.budgets import CALIBRATION, BudgetSteps
from hf_lowrank.training.plan import initial_model

SIZES: dict[str, Any] = {"d_model": 16, "num_heads": 2, "d_kv": 8, "num_layers": 2}
BUDGETS = [0.5, 0.25]
TINY = PretrainingSettings(
    family="bolt",
    **SIZES,
    steps=10,
    batch_tokens=300,
    save_steps=5,
    evaluation_batches=1,
    workers=0,
    bf16=False,
    budgets=BUDGETS,
    budget_steps=6,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CALIBRATION, "num_batches", 1)
    monkeypatch.setitem(CALIBRATION, "arithmetic", 1e6)


def projections(model: torch.nn.Module) -> int:
    """How many hooks are on the model's modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["t5", "bolt", "chronos2"])
def test_the_projections_are_those_that_compression_merges(family: str) -> None:
    model = initial_model(PretrainingSettings(family=family, **SIZES)).eval()
    objective = objective_of(model.config, type(model))
    (batch,), _ = objective.batches("synthetic", 1, 3)
    batch = objective.cut(batch, 4, short=True)
    calibration = calibrate(model, num_batches=1, num_refit_batches=1, seed=5)
    small = compress_pretrained(
        model, total_ratio=0.4, calibration=calibration, multiple_of=2, refit=False, dtype="auto"
    )
    found = projections_within(model, [0.4], num_batches=1, arithmetic=PROBE_ARITHMETIC, multiple_of=2, seed=5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad(), ExitStack() as stack:
        for projection in found[0.4]:
            stack.enter_context(inserted(model, projection))
        torch.testing.assert_close(
            objective.predict(model, batch), objective.predict(small, batch), rtol=1e-3, atol=1e-3
        )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


class Watch(TrainerCallback):
    """Counts the projections that are inserted in each step; it must hear of the step's end before they are taken out."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.counts: list[int] = []
        self.fails_at = fails_at

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.usual = projections(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.fails_at:
            raise RuntimeError("cut off")
        self.counts.append(projections(model) - self.usual)


def test_steps_have_budgets_after_a_fifth_of_them(tmp_path: Path) -> None:
    watch = Watch()
    pretrain(tmp_path / "out", replace(TINY, budget_share=1.0, budget_steps=100), callbacks=[watch])
    assert not any(watch.counts[:2])
    assert all(watch.counts[2:])
    record = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    assert record["budgets"] == BUDGETS
    assert list(record["held_out_loss_within"]) == ["0.5", "0.25"]
    assert len({record["held_out_loss"], *record["held_out_loss_within"].values()}) == 3


def test_each_budget_comes_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model = initial_model(TINY)
    steps = BudgetSteps(model, BUDGETS, share=0.6, start=0, renewal=10**9, seed=4)
    state = type("State", (), {"global_step": 0, "is_world_process_zero": True})()
    control = type("Control", (), {"should_save": False})()
    counts: Counter[int] = Counter()
    for state.global_step in range(400):
        steps.on_step_begin(None, state, control)
        counts[projections(model)] += 1
        steps.on_step_end(None, state, control)
    sizes = [len([module for one in steps.projections[budget] for module in one.modules]) for budget in BUDGETS]
    assert sizes[0] != sizes[1]
    assert counts.keys() == {0, *sizes}
    assert all(abs(counts[size] - share * 400) < 40 for size, share in zip((0, *sizes), (0.4, 0.3, 0.3)))


def test_a_run_with_budgets_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """From a step between two at which the projections are made anew."""
    settings = replace(TINY, save_steps=5)
    whole = pretrain(tmp_path / "whole", settings)
    with pytest.raises(RuntimeError, match="cut off"):
        pretrain(tmp_path / "cut", settings, callbacks=[Watch(7)])
    resumed = pretrain(tmp_path / "cut", settings)
    theirs = resumed.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in whole.state_dict().items())


def test_what_cannot_be_compressed_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budgets: total_ratio=0.0001 is too small: the smallest ranks keep"):
        pretrain(tmp_path / "out", replace(TINY, budgets=[0.5, 0.0001]))
    small = pretrain(tmp_path / "small", replace(TINY, budgets=None, base_rank=2, steps=1, averaged=0.0))
    assert hasattr(small.config, "attention_ranks")
    with pytest.raises(
        ValueError, match="budgets are for a dense model, which is compressed later; start is a LowRank"
    ):
        pretrain(
            tmp_path / "out", PretrainingSettings(start=str(tmp_path / "small"), budgets=[0.5], steps=1, workers=0)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
