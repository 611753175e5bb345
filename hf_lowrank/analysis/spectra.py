"""Rank structure in numbers: spectra and their ranks, products of heads, how far heads share their subspaces.

Everything starts from Gram matrices in float64. A Gram matrix squares singular values, so in float64 those above about 1e-7
of the largest are right, four orders of magnitude below the smallest epsilon that is asked for; and one Gram matrix W W^T
of a projection, n heads of a rows each, holds the whole spectrum, every head's own, the angles between heads, and, with
another one, the spectrum of W_q^T W_k, which is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..linear_algebra import diagonal_blocks, square_root
from ..published_figures import EPSILONS

__all__ = ["Alignment", "Spectrum", "StateSum", "head_alignment", "joint_tail", "largest_rank", "product_spectra"]

FloatArray = NDArray[np.float64]
# Directions below this share of the largest eigenvalue of a Gram matrix are rounding errors.
CUTOFF = 1e-13


@dataclass(frozen=True)
class Spectrum:
    """Singular values in descending order, float64."""

    values: FloatArray

    @classmethod
    def of_gram(cls, gram: torch.Tensor) -> Spectrum:
        """The singular values of A, from A A^T or A^T A."""
        eigenvalues = np.linalg.eigvalsh(gram.detach().cpu().double().numpy())
        return cls(np.sqrt(np.clip(eigenvalues[::-1], 0, None)))

    @classmethod
    def of_matrix(cls, matrix: torch.Tensor) -> Spectrum:
        """The singular values of a matrix (m, n), from the smaller of its two Gram matrices."""
        matrix = matrix.detach().double()
        return cls.of_gram(matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix)

    @property
    def norm(self) -> float:
        """sigma_1."""
        return float(self.values[0])

    def epsilon_rank(self, epsilon: float) -> int:
        """The number of singular values with sigma_j / sigma_1 >= epsilon (arXiv 2510.03358, section 2); 0 for a matrix of zeros."""
        if self.norm == 0:
            return 0
        # Divided, as in the paper's scripts: the product can round differently.
        return int((self.values / self.norm >= epsilon).sum())

    @property
    def stable_rank(self) -> float:
        """The sum of sigma_j^2 over sigma_1^2: how many directions carry energy like the first."""
        return float((self.values**2).sum() / self.norm**2) if self.norm > 0 else 0.0

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of sigma_j / sum sigma (Roy and Vetterli, "The effective rank", 2007)."""
        if self.norm == 0:
            return 0.0
        shares = self.values / self.values.sum()
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def to_dict(self, *, with_values: bool = True) -> dict[str, Any]:
        """For programs; singular values to six digits."""
        figures: dict[str, Any] = {
            "size": len(self.values),
            "norm": self.norm,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            "epsilon_ranks": {f"{epsilon:.3g}": self.epsilon_rank(epsilon) for epsilon in EPSILONS},
        }
        if with_values:
            figures["singular_values"] = [float(f"{value:.6g}") for value in self.values]
        return figures


class StateSum:
    """A running sum of x x^T over tokens, float64: memory is bounded by that of one d x d matrix.

    While there are fewer tokens than dimensions the tokens themselves are kept, in float32, which is less.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest = 0.0  # norm of a token
        self._total: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []
        self._gram: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add tokens, the rows of a matrix (tokens, d).

        Raises:
            ValueError: They are not finite numbers.
        """
        rows = rows.detach()
        if not len(rows):
            return
        largest = float(rows.norm(dim=1).max())
        if not np.isfinite(largest):
            raise ValueError("data: a hidden state of the model is not finite on this data.")
        total = rows.sum(0, dtype=torch.float64).cpu()
        self._total = total if self._total is None else self._total + total
        self.count += len(rows)
        self.largest = max(self.largest, largest)
        if self._gram is None:
            self._rows.append(rows.float().cpu().clone())
            if self.count < rows.shape[1]:
                return
            self._gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            rows, self._rows = torch.cat(self._rows), []
        rows = rows.cpu().double()
        self._gram.addmm_(rows.T, rows)

    def gram(self) -> torch.Tensor:
        """The sum of x x^T, (d, d)."""
        if self._gram is not None:
            return self._gram
        rows = torch.cat(self._rows).double()
        return rows.T @ rows

    def spectrum(self, *, is_centred: bool = False) -> Spectrum:
        """The singular values of the matrix of all tokens, or of their deviations from the mean: min(d, tokens) of them.

        Deviations below 1e-6 of the tokens themselves are rounding errors of a model in float32, and zero.
        """
        rows = None if self._gram is not None else torch.cat(self._rows).double()
        if not is_centred:
            return Spectrum.of_matrix(rows) if rows is not None else Spectrum.of_gram(self.gram())
        assert self._total is not None
        mean = self._total / self.count
        if rows is not None:
            size, centred = float(rows.norm()), Spectrum.of_matrix(rows - mean)
        else:
            size = float(self.gram().trace().sqrt())
            centred = Spectrum.of_gram(self.gram() - self.count * torch.outer(mean, mean))
        return Spectrum(np.where(centred.values > 1e-6 * size, centred.values, 0.0))

    def leading(self, rank: int) -> torch.Tensor:
        """An orthonormal basis (d, rank) of the leading directions of the tokens."""
        return torch.linalg.eigh(self.gram())[1].flip(1)[:, :rank]


# --- heads -------------------------------------------------------------------------------------------------------


def product_spectra(left: torch.Tensor, right: torch.Tensor) -> tuple[Spectrum, ...]:
    """The singular values of A^T B of every head from A A^T and B B^T, both (n, a, a).

    With any roots L L^T = A A^T and R R^T = B B^T it has those of L^T R, which is a x a: A^T = U L^T with orthonormal columns in U.
    """
    values = torch.linalg.svdvals(square_root(left.double()).mT @ square_root(right.double()))
    return tuple(Spectrum(head) for head in values.cpu().numpy())


@dataclass(frozen=True)
class Alignment:
    """How far the heads of one projection look at the same subspace.

    Attributes:
        rank: The dimension of the subspaces that are compared: the leading right singular vectors of each head.
        cosine: The mean squared cosine of the principal angles between two heads, 1 where all heads have one subspace.
        random: What independent random subspaces have: rank / d_model.
    """

    rank: int
    cosine: float
    random: float

    @property
    def shared(self) -> float:
        """0 for random subspaces, 1 for a shared one, below 0 where heads avoid each other."""
        return (self.cosine - self.random) / (1 - self.random) if self.random < 1 else 1.0


def head_alignment(gram: torch.Tensor, num_heads: int, *, dimension: int, rank: int) -> Alignment | None:
    """Alignment of the heads' row spaces, from the Gram matrix (n a, n a) of their stacked rows in R^dimension.

    With G_gh = W_g W_h^T and the leading eigenvectors U_h, S_h^2 of G_hh, head h has the basis V_h = W_h^T U_h S_h^-1 and
    V_g^T V_h = S_g^-1 U_g^T G_gh U_h S_h^-1. For random subspaces E ||V_g^T V_h||_F^2 / r = r / d: the expected projector is (r/d) I.

    Returns None for a single head, or where a head has no rows but zeros. The rank is lowered to the smallest of the heads'.
    """
    if num_heads < 2:
        return None
    gram = gram.double()
    values, vectors = torch.linalg.eigh(diagonal_blocks(gram, num_heads))
    values, vectors = values.flip(-1), vectors.flip(-1)
    rank = min(rank, int((values > CUTOFF * values[:, :1]).sum(1).min()))
    if rank == 0:
        return None
    bases = vectors[..., :rank] / values[:, None, :rank].sqrt()  # (n, a, r)
    blocks = gram.unflatten(1, (num_heads, -1)).unflatten(0, (num_heads, -1))
    cosines = torch.einsum("gar,gahb,hbs->ghrs", bases, blocks, bases).square().sum((2, 3)) / rank
    others = ~torch.eye(num_heads, dtype=torch.bool, device=gram.device)
    return Alignment(rank=rank, cosine=float(cosines[others].mean()), random=rank / dimension)


def largest_rank(spectra: Sequence[Spectrum], epsilon: float) -> int:
    """The largest epsilon-rank of some heads, which share one rank when they are compressed; at least 1."""
    return max(1, *(spectrum.epsilon_rank(epsilon) for spectrum in spectra))


def joint_tail(spectra: Sequence[Spectrum], rank: int) -> float:
    """The relative Frobenius error of several matrices together, each at its best approximation of this rank."""
    lost = sum(float((spectrum.values[rank:] ** 2).sum()) for spectrum in spectra)
    total = sum(float((spectrum.values**2).sum()) for spectrum in spectra)
    return (lost / total) ** 0.5 if total > 0 else 0.0
