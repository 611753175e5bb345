"""Fresh models: weights of the deviation that their rule says, and first forecasts near the mean of the context."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lowrank.data.windows import GroupedWindows, SyntheticWindows, foreseeable
from hf_lowrank.training.plan import initial_model
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


def test_a_target_far_away_from_a_constant_context_is_not_foreseeable() -> None:
    context = torch.tensor([[1.0, 2.0, 3.0], [0.3, 0.3, 0.3], [0.3, float("nan"), 0.3], [5.0, 5.0, 5.0 + 1e-6]])
    target = torch.tensor([[2.0, 18.0, 19.0], [0.3, 0.3, 0.31], [0.2, 0.3, 0.3], [5.0, 4.0, 6.0]])
    seen = ~foreseeable(context, target)["target"].isnan()
    assert seen.tolist() == [[True, True, False], [True, True, False], [False, True, True], [True, False, False]]


def test_what_is_left_is_within_reach_of_the_deviation() -> None:
    supply = SyntheticWindows(200, 64, 30, seed=5)
    shares = []
    for index in range(30):
        window = supply[index]
        context, target = foreseeable(**window)["context"], foreseeable(**window)["target"]
        assert torch.equal(context.nan_to_num(), window["context"].nan_to_num())
        spread = (context - context.nanmean(1, keepdim=True)).square().nanmean(1, keepdim=True).sqrt()
        distance = (target - context.nanmean(1, keepdim=True)).abs() / spread.clamp_min(1e-6)
        assert distance.nan_to_num().max() <= 20.1
        shares.append(target.isnan().float().mean())
    assert 0 < sum(shares) / 30 < 0.05
