"""The optimizer of pretraining: Muon for matrices, AdamW for all else, behind the one face that transformers' Trainer knows.

With AdamW alone a small Chronos model comes to a halt early: its attention turns to single tokens, from where no gradient leads back. T5
leaves the scale d_kv^-1/2 out of the softmax and has it in the initial queries; their updates have it here too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from ..checkpoints.devices import has_fast_bfloat16

__all__ = ["MuonWithAdamW", "StackedMuon", "muon_with_adamw"]

MOMENTUM, NEWTON_SCHULZ, LEAST_NORM = 0.95, ((3.4445, -4.7750, 2.0315),) * 5, 1e-7  # as in torch.optim.Muon


class StackedMuon(Optimizer):
    """What `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")` does, for all matrices of one shape at once.

    It goes matrix by matrix, some thirty kernels each: on a GPU half of the time of a step of a small model.
    """

    def __init__(self, params: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, where there is one, is called once and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            grads = [weight.grad for weight in weights]
            momenta = [self._momentum(weight) for weight in weights]
            torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
            by_shape: dict[torch.Size, list[int]] = defaultdict(list)
            for i, weight in enumerate(weights):
                by_shape[weight.shape].append(i)
            for shape, rows in by_shape.items():
                some = [weights[i] for i in rows]
                updates = torch._foreach_lerp([grads[i] for i in rows], [momenta[i] for i in rows], MOMENTUM)
                steps = _orthogonal(torch.stack(updates)).to(some[0].dtype).unbind()
                torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(some, steps, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])
        return loss

    def _momentum(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly orthogonal matrices (n, p, q) near the given ones: five steps of Newton and Schulz, in bfloat16 where that is fast."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x.bfloat16() if has_fast_bfloat16() else x.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(LEAST_NORM)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonWithAdamW(Optimizer):
    """Muon (`StackedMuon`) and `torch.optim.AdamW` as one optimizer, with the parameter groups of both.

    Muon makes every update of a matrix nearly orthogonal (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024), here as large as AdamW's are, 0.2 sqrt(max(m, n)) for one of m x n, so that both go by one learning rate (J. Liu et al., "Muon
    is Scalable for LLM Training", arXiv 2502.16982, section 2.2).

    Args:
        matrices: Groups of parameters of two dimensions, for Muon.
        others: Groups of the other ones, for AdamW, without weight decay.
        lr: The learning rate of both, where a group has none of its own.
        weight_decay: Of the matrices.
        betas, eps: Of AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._parts: tuple[Optimizer, ...] = (
            StackedMuon(matrices, lr=lr, weight_decay=weight_decay),
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


def muon_with_adamw(
    model: PreTrainedModel, *, lr: float, position_rate: float = 1.0, **settings: Any
) -> MuonWithAdamW:
    """The optimizer of a Chronos model: its linear layers' weights are Muon's, but for those that are embeddings or a head of tokens.

    The relative position bias has `position_rate` times the learning rate of all else. It is added to logits, where a step of AdamW's, a
    learning rate, is little. `settings` are those of `MuonWithAdamW`.
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
    rest = {name: one for name, one in model.named_parameters() if one.requires_grad and id(one) not in taken}
    biases = [one for name, one in rest.items() if "relative_attention_bias" in name and position_rate != 1]
    moved = set(map(id, biases))
    others: list[dict[str, Any]] = [{"params": [one for one in rest.values() if id(one) not in moved]}]
    if biases:
        others.append({"params": biases, "lr": lr * position_rate})
    groups = [{"params": matrices}, {"params": queries, "lr": lr * model.config.d_kv**-0.5}]
    return MuonWithAdamW([group for group in groups if group["params"]], others, lr=lr, **settings)
