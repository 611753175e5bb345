"""The post-training method of arXiv 2510.03358, as its scripts do it: the baseline of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.rank_table import ComponentName
from ..progress import progress
from .allocation import (
    Component,
    allocate_energy,
    allocate_epsilon,
    allocate_epsilon_at_ratio,
    allocate_uniform,
)
from .factorization import computable, truncate_matrix

__all__ = ["MATRIX_POLICIES", "truncate_matrices"]

MATRIX_POLICIES: dict[str, Callable[..., dict[Any, int]]] = {
    "epsilon": allocate_epsilon,
    "ratio": allocate_epsilon_at_ratio,
    "uniform": allocate_uniform,
    "energy": allocate_energy,
}


def truncate_matrices(
    dense: DenseCheckpoint, policy: str, value: Any, *, show_progress: bool | None
) -> tuple[dict[str, torch.Tensor], dict[ComponentName, int], dict[ComponentName, float]]:
    """Each of q, k, v and o at its own rank, written back dense.

    Returns:
        The new weights by name, the kept rank of every matrix (`cross.3.q`), and its loss: the dropped share of the
        squared singular values.
    """
    matrices = {
        ComponentName(layer, part): f"{module}.{part}.weight" for layer, module in dense.layers for part in "qkvo"
    }
    components = []
    for name, weight in progress(matrices.items(), "Measuring", show_progress):
        values = torch.linalg.svdvals(computable(dense.weights[weight])).cpu().numpy()[None]
        components.append(Component(name, values))
    kept = MATRIX_POLICIES[policy](components, value)
    losses = {name: float(component.loss[kept[name]]) for name, component in zip(matrices, components)}
    weights = {
        weight: truncate_matrix(dense.weights[weight], kept[name])
        for name, weight in progress(matrices.items(), "Factorizing", show_progress)
        if kept[name] < min(dense.weights[weight].shape)
    }
    return weights, kept, losses
