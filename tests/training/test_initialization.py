"""First weights: of the deviation that their rule says, with first forecasts near the mean of the context, and with finer positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hf_lowrank.data.tokens import WindowCollator
from hf_lowrank.data.windows import GroupedWindows, SyntheticWindows
from hf_lowrank.training.plan import initial_model, plan_of
from hf_lowrank.training.settings import PretrainingSettings


@pytest.mark.parametrize("base_rank", [None, 4.0], ids=["dense", "low-rank"])
@pytest.mark.parametrize("family", ["bolt", "chronos2"])
def test_every_layer_has_the_deviation_of_its_width(family: str, base_rank: float | None) -> None:
    model = initial_model(PretrainingSettings(family=family, base_rank=base_rank))
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not (base_rank and "ttention" in name):
            wanted = module.in_features**-0.5
            wanted *= (
                32**-0.5 if name.endswith(".q") else 0.1 if "output_patch" in name and "hidden" not in name else 1
            )
            assert module.weight.std().item() == pytest.approx(wanted, rel=0.06), name
            checked += 1
    assert checked >= 14


@torch.no_grad()
@pytest.mark.parametrize("base_rank", [None, 4.0], ids=["dense", "low-rank"])
@pytest.mark.parametrize(("family", "supply"), [("bolt", SyntheticWindows), ("chronos2", GroupedWindows)])
def test_a_fresh_model_forecasts_nearly_the_mean(family: str, supply: type, base_rank: float | None) -> None:
    """So that it begins with a loss near that of the mean: as initialised upstream, a Bolt begins hundreds of times above it."""
    model = initial_model(PretrainingSettings(family=family, base_rank=base_rank)).eval()
    caught: list[torch.Tensor] = []
    model.output_patch_embedding.register_forward_hook(lambda _, __, output: caught.append(output))
    model(**supply(256, 64, 2, seed=0)[1])
    assert 0 < caught[0].square().mean().sqrt() < 0.3


@torch.no_grad()
@pytest.mark.parametrize("base_rank", [None, 4.0], ids=["dense", "low-rank"])
@pytest.mark.parametrize("family", ["t5", "bolt"])
def test_finer_positions_change_nothing_yet(tmp_path: Path, family: str, base_rank: float | None) -> None:
    """With 512 buckets every distance in the window has one of its own: the logits are the same to the last bit."""
    small = {"d_model": 32, "num_heads": 2, "d_kv": 16, "num_layers": 2}
    before = initial_model(PretrainingSettings(family=family, base_rank=base_rank, **small)).eval()
    before.save_pretrained(tmp_path / "start")
    finer = {"relative_attention_num_buckets": 512, "relative_attention_max_distance": 600}
    settings = PretrainingSettings(start=str(tmp_path / "start"), **finer)
    after = initial_model(settings).eval()
    plan = plan_of(settings)
    stacks = 2
    assert plan.parameters == after.num_parameters() == before.num_parameters() + stacks * (512 - 32) * 2
    assert {name: getattr(after.config, name) for name in finer} == finer
    window = SyntheticWindows(100, 20, 1, seed=0)[0]
    batch = WindowCollator(before.config).batch(
        *(list(window[name].double().numpy()) for name in ("context", "target"))
    )
    changes = []
    for name, weight in after.named_parameters():
        if weight.shape != before.get_parameter(name).shape:
            changes.append(name)
    assert len(changes) == stacks
    assert all("relative_attention_bias" in name for name in changes)
    assert torch.equal(before(**batch)[1], after(**batch)[1])


def test_positions_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        ValueError, match="relative_attention_max_distance: a chronos-2 has rotary positions; leave it"
    ):
        plan_of(PretrainingSettings(family="chronos2", relative_attention_max_distance=512))
    with pytest.raises(ValueError, match=r"relative_attention_max_distance must be above half of .*, 512, found 128"):
        plan_of(PretrainingSettings(relative_attention_num_buckets=512))
    with pytest.raises(ValueError, match=r"relative_attention_num_buckets must be .*, found 2"):
        plan_of(PretrainingSettings(family="bolt", relative_attention_num_buckets=2))
