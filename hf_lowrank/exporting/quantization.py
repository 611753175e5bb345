"""Int8 products: which of a graph's may have them, by what each would cost.

A product x W^T in int8 rounds each row of W to 255 steps between -max and max, and x as it comes (W8A8, dynamic): ONNX Runtime all of it
to 256 steps between its smallest and largest value, OpenVINO each 64 numbers of a token to 255 steps between -max and max, where the
processor has products of int8, and what is compiled each token so. Most products bear that; those that read the values themselves, or write the quantiles, may not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from ..budget_solver import Options, allocate_budget
from ..progress import progress
from ..runtime.engines import OPENVINO_GROUP

__all__ = ["ProductLoss", "products_of", "row_scale", "spared_names", "spared_products"]


@dataclass(frozen=True)
class ProductLoss:
    """What one product in int8 costs: the added expected loss, as a share of the loss, all others being float."""

    name: str
    parameters: int
    loss: float


def products_of(graph: nn.Module) -> dict[str, nn.Linear]:
    """The products of a graph with one matrix each, by name."""
    return {name: module for name, module in graph.named_modules() if isinstance(module, nn.Linear)}


def row_scale(values: torch.Tensor) -> torch.Tensor:
    """What one step of int8 is in each row of (..., n), of which -127 to 127 are used: (..., 1)."""
    return values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127


def _rounded_rows(values: torch.Tensor) -> torch.Tensor:
    scale = row_scale(values)
    return (values / scale).round() * scale


def _rounded_whole(values: torch.Tensor) -> torch.Tensor:
    low, high = values.min().clamp_max(0), values.max().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    zero = (-low / scale).round()
    return ((values / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def _rounded_groups(values: torch.Tensor) -> torch.Tensor:
    size = values.shape[-1]
    padded = nn.functional.pad(values, (0, -size % OPENVINO_GROUP)).unflatten(-1, (-1, OPENVINO_GROUP))
    return _rounded_rows(padded).flatten(-2)[..., :size]


# How each format rounds what comes in.
ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "onnx": _rounded_whole,
    "openvino": _rounded_groups,
    "inductor": _rounded_rows,
}


def _in_int8(
    rounded: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """A forward hook: what the runtime makes of the same input."""
    return nn.functional.linear(rounded(inputs[0]), _rounded_rows(module.weight), module.bias)


@torch.no_grad()
def spared_products(
    graph: nn.Module,
    loss: Callable[[], float],
    tolerance: float,
    *,
    format: str = "onnx",
    show_progress: bool | None = None,
) -> tuple[list[str], list[ProductLoss]]:
    """The names of the products that stay in float, for what all others add together to be at most `tolerance`; and what each costs.

    Losses of small errors add up. Those are spared that cost most for their size.

    Args:
        graph: In float32.
        loss: The added expected loss of the graph as it is, as a share of the loss.
        tolerance: The bound of the sum.
        format: Whose rounding it is: `"onnx"`, `"openvino"` or `"inductor"`.
    """
    found = []
    products = products_of(graph)
    # PyTorch's product of integers is wrong where the inner dimension is one (2.13, on a CPU).
    impossible = [name for name, module in products.items() if format == "inductor" and module.in_features == 1]
    for name in impossible:
        del products[name]
    for name, module in progress(products.items(), "Rounding", show_progress):
        handle = module.register_forward_hook(partial(_in_int8, ROUNDED[format]))
        try:
            found.append(ProductLoss(name, module.weight.numel(), max(loss(), 0.0)))
        finally:
            handle.remove()
    return impossible + spared_names(found, tolerance), found


def spared_names(losses: Sequence[ProductLoss], tolerance: float) -> list[str]:
    """Few weights to spare for the losses of all others to add up to at most `tolerance`, and none in vain."""
    # What is to be small is the number of weights in float; the budget is of the loss.
    options = {
        one.name: Options((False, True), np.array([0.0, one.parameters]), {"loss": np.array([one.loss, 0.0])})
        for one in losses
    }
    is_spared = allocate_budget(options, {"loss": tolerance}) if options else {}
    return [name for name, spared in is_spared.items() if spared]
