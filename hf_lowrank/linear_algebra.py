"""Gram matrices: how they are made, roots of them, and their diagonal blocks."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["diagonal_blocks", "product_over_rows", "square_root", "without_scale"]


def product_over_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left^T right in float64, of rows (m, p) and (m, q) in float32: multiplied in float32, and neither too large nor too small for it."""
    scales = [_power_of_two(rows.abs().max() if len(rows) else rows.new_zeros(())) for rows in (left, right)]
    a, b = (rows / scale.to(rows.dtype) for rows, scale in zip((left, right), scales))
    return (a.T @ b).double() * scales[0] * scales[1]


def _power_of_two(largest: torch.Tensor, root: int = 1) -> torch.Tensor:
    """A power of two just below the `root`-th root of these numbers, float64: division by it changes no digit."""
    exponents = (torch.frexp(largest).exponent - 1).div(root, rounding_mode="floor")
    return torch.as_tensor(np.ldexp(1.0, exponents.cpu().numpy()), device=largest.device)


def without_scale(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices (..., h, h) whose largest entries are near one, and numbers (..., 1, 1) whose fourth powers they were divided by.

    The numbers are powers of two, so no digit changes; products of two such matrices neither overflow nor vanish.
    """
    largest = gram.abs().amax(dim=(-2, -1), keepdim=True)
    root = _power_of_two(largest, 4).to(gram)
    return gram / root.square() / root.square(), root


def square_root(gram: torch.Tensor) -> torch.Tensor:
    """A root L, L L^T = gram, of positive semidefinite matrices (..., h, h).

    Cholesky's where it exists, twenty times faster; otherwise the symmetric one, in which rounding below zero is clamped.
    """
    root, failed = torch.linalg.cholesky_ex(gram)
    # A pivot at rounding level is noise, and the matrix singular to working precision.
    pivots = root.diagonal(dim1=-2, dim2=-1).square()
    if not failed.any() and (pivots.amin(-1) > 1e-10 * pivots.amax(-1)).all():
        return root
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return (vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def diagonal_blocks(gram: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The blocks (n, h, h) on the diagonal of a matrix (n h, n h), n = `num_blocks`: one for each head of a layer."""
    blocks = gram.unflatten(0, (num_blocks, -1)).unflatten(2, (num_blocks, -1))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
