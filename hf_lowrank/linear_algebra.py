"""Gram matrices: roots of them, and their diagonal blocks."""

from __future__ import annotations

import torch

__all__ = ["diagonal_blocks", "square_root"]


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
