"""The optimizer of pretraining: Muon for matrices, AdamW for all else, behind the one face that transformers' Trainer knows.

With AdamW alone a small Chronos model comes to a halt early: its attention turns to single tokens, from where no gradient leads back. T5
leaves the scale d_kv^-1/2 out of the softmax and has it in the initial queries; their updates have it here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

__all__ = ["MuonWithAdamW", "muon_with_adamw"]


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer, with the parameter groups of both.

    Muon makes every update of a matrix nearly orthogonal (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024), here as large as AdamW's are, 0.2 sqrt(max(m, n)) for one of m x n, so that both go by one learning rate (J. Liu et al., "Muon
    is Scalable for LLM Training", arXiv 2502.16982, section 2.2).

    Args:
        matrices: Groups of parameters of two dimensions, for Muon.
        others: The other ones, for AdamW, without weight decay.
        lr: The learning rate of both, where a group has none of its own.
        weight_decay: Of the matrices.
        betas, eps: Of AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
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


def muon_with_adamw(model: PreTrainedModel, *, lr: float, **settings: Any) -> MuonWithAdamW:
    """The optimizer of a Chronos model: its linear layers' weights are Muon's, but for those that are embeddings or a head of tokens.

    `settings` are those of `MuonWithAdamW`.
    """
    spared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and id(module.weight) not in spared
    }
    queries = [weight for name, weight in linear.items() if weight.requires_grad and name.endswith(".q")]
    matrices = [weight for name, weight in linear.items() if weight.requires_grad and not name.endswith(".q")]
    taken = set(map(id, queries + matrices))
    others = [one for one in model.parameters() if one.requires_grad and id(one) not in taken]
    groups = [{"params": matrices}, {"params": queries, "lr": lr * model.config.d_kv**-0.5}]
    return MuonWithAdamW([group for group in groups if group["params"]], others, lr=lr, **settings)
