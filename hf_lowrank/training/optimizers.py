"""The optimizer of pretraining: Muon for matrices, AdamW for all else, behind the one face that transformers' Trainer knows.

With AdamW alone a small Chronos model comes to a halt early: its attention turns to single tokens, from where no gradient leads back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonWithAdamW", "muon_with_adamw"]


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer, with the parameter groups of both.

    Muon makes every update of a matrix nearly orthogonal (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024), here as large as AdamW's are, 0.2 sqrt(max(m, n)) for one of m x n, so that both go by one learning rate (J. Liu et al., "Muon
    is Scalable for LLM Training", arXiv 2502.16982, section 2.2).

    Args:
        matrices: Parameters of two dimensions, for Muon.
        others: The other ones, for AdamW, without weight decay.
        lr: The learning rate of both.
        weight_decay: Of the matrices.
        betas, eps: Of AdamW.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=lr, weight_decay=0.0, betas=betas, eps=eps, fused=True),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Have the groups that a scheduler changes be those that the parts read."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; `closure`, where there is one, is called once and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both, in `parts`."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()


def muon_with_adamw(model: nn.Module, **settings: Any) -> MuonWithAdamW:
    """The optimizer of a model: its linear layers' weights are Muon's, but for those that are embeddings or a head of tokens too."""
    modules = dict(model.named_modules())
    spared = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    matrices = {
        id(module.weight) for name, module in modules.items() if isinstance(module, nn.Linear) and name != "lm_head"
    } - spared
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return MuonWithAdamW(
        [parameter for parameter in trained if id(parameter) in matrices],
        [parameter for parameter in trained if id(parameter) not in matrices],
        **settings,
    )
