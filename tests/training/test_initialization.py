"""Fresh models: weights of the deviation that their rule says, and first forecasts near the mean of the context."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_lowrank.data.windows import GroupedWindows, SyntheticWindows
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
