"""Truncations of attention layers: pure functions from weights and Gram matrices to smaller weights.

Everything is computed in float64 on the weights' device. A batch dimension n runs over the heads of a layer; d is d_model,
h the dense head dimension. T5's attention has no bias, no rotation and no scaling, so for a head only the products

    W_q^T W_k  (d, d)       and       W_o W_v  (d, d)

matter. Both are truncated through their small (h, h) Gram matrices: O(d h^2) a head, and no (d, d) product is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "AttentionWeights",
    "LatentWeights",
    "epsilon_rank",
    "joint_singular_values",
    "joint_truncation",
    "latent_singular_values",
    "truncate_latent",
    "truncate_matrix",
    "truncate_per_head",
]


@dataclass(frozen=True)
class AttentionWeights:
    """One attention layer by head, float64: query, key, value (n, h, d) and output (n, d, h).

    After a truncation query and key have qk in place of h, value and output vo.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor

    @classmethod
    def from_linear(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, *, num_heads: int
    ) -> AttentionWeights:
        """From the weights of T5Attention's linear layers: q, k, v (n h, d) and o (d, n h)."""

        def by_head(weight: torch.Tensor) -> torch.Tensor:
            return weight.double().unflatten(0, (num_heads, -1))

        return cls(by_head(q), by_head(k), by_head(v), by_head(o.T).transpose(1, 2))

    def to_linear(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The weights of the linear layers `q`, `k`, `v`, `o`."""
        return {
            "q": self.query.flatten(0, 1).to(dtype),
            "k": self.key.flatten(0, 1).to(dtype),
            "v": self.value.flatten(0, 1).to(dtype),
            "o": self.output.transpose(1, 2).flatten(0, 1).T.contiguous().to(dtype),
        }


@dataclass(frozen=True)
class LatentWeights:
    """One attention layer on a shared latent of rank r, float64.

    latent (r, d); query_sketch (s, d) or None; query (n, r, s or d); output (n, p or d, r);
    output_sketch (d, p) or None.
    """

    latent: torch.Tensor
    query_sketch: torch.Tensor | None
    query: torch.Tensor
    output: torch.Tensor
    output_sketch: torch.Tensor | None

    def to_linear(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The weights of the linear layers `latent`, `query_sketch`, `q`, `o`, `output_sketch`."""
        weights = {
            "latent": self.latent,
            "q": self.query.flatten(0, 1),
            "o": self.output.transpose(1, 2).flatten(0, 1).T,
            "query_sketch": self.query_sketch,
            "output_sketch": self.output_sketch,
        }
        return {name: weight.to(dtype).contiguous() for name, weight in weights.items() if weight is not None}


def epsilon_rank(singular_values: torch.Tensor, epsilon: float) -> int:
    """The number of singular values with sigma_j / sigma_1 >= epsilon (arXiv 2510.03358, section 2), at least 1.

    `singular_values` (h,) is in descending order.
    """
    # Divided, as in the paper's scripts: the product can round differently. 0 / 0 is not counted.
    return max(1, int((singular_values / singular_values[0] >= epsilon).sum()))


def square_root(gram: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of positive semidefinite matrices (..., h, h); rounding below zero is clamped."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return (vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def joint_singular_values(left_gram: torch.Tensor, right_gram: torch.Tensor) -> torch.Tensor:
    """The singular values of G_L^1/2 G_R^1/2, shape (n, h), descending.

    For G_L = L L^T and G_R = R R^T they are those of the product L^T R, whatever its outer size.
    """
    return torch.linalg.svdvals(square_root(left_gram) @ square_root(right_gram))


def joint_truncation(
    left_gram: torch.Tensor, right_gram: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced truncation: A, B of shape (n, h, rank) that minimise || G_L^1/2 (I - A B^T) G_R^1/2 ||_F.

        U S V^T = svd(G_L^1/2 G_R^1/2),    A = G_R^1/2 V_r S_r^-1/2,    B = G_L^1/2 U_r S_r^-1/2

    What is lost is the sum of the dropped S_i^2, by the theorem of Eckart and Young. Rank-deficient Grams are the normal
    case: directions whose singular value is zero to working precision are not inverted but set to zero.
    """
    left, right = square_root(left_gram), square_root(right_gram)
    u, s, vh = torch.linalg.svd(left @ right)
    kept = s[:, :rank]
    # Squares of float64 rounding errors reach 1e-8 of the largest value after the square roots.
    inverse = torch.where(kept > 1e-9 * s[:, :1], kept, torch.inf).rsqrt().unsqueeze(-2)
    return right @ vh.mT[..., :rank] * inverse, left @ u[..., :rank] * inverse


def attention_grams(
    weights: AttentionWeights,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(G_L, G_R) of the query-key and of the output-value product, each (n, h, h), for white inputs.

    QK: W_q W_q^T and W_k W_k^T.   VO: W_o^T W_o and W_v W_v^T.
    """
    query_key = (weights.query @ weights.query.mT, weights.key @ weights.key.mT)
    output_value = (weights.output.mT @ weights.output, weights.value @ weights.value.mT)
    return query_key, output_value


def truncate_per_head(weights: AttentionWeights, *, qk: int, vo: int) -> AttentionWeights:
    """Smaller heads (eq. 21 of arXiv 2510.03358): the best rank-`qk` W_q^T W_k and rank-`vo` W_o W_v of every head.

        W_q' = A^T W_q,   W_k' = B^T W_k            W_o' = W_o A,   W_v' = B^T W_v

    A size equal to the head dimension leaves that pair of matrices as it is.
    """
    query, key, value, output = weights.query, weights.key, weights.value, weights.output
    query_key, output_value = attention_grams(weights)
    if qk < query.shape[1]:
        a, b = joint_truncation(*query_key, qk)
        query, key = a.mT @ query, b.mT @ key
    if vo < value.shape[1]:
        a, b = joint_truncation(*output_value, vo)
        output, value = output @ a, b.mT @ value
    return AttentionWeights(query, key, value, output)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Stack (n, h, d) to (n h, d), scaled to unit Frobenius norm."""
    stacked = rows.flatten(0, 1)
    norm = stacked.norm()
    return stacked / norm if norm > 0 else stacked


def _latent_stack(weights: AttentionWeights) -> torch.Tensor:
    """The rows that the latent has to preserve: G_q^1/2 W_k and G_o^1/2 W_v of all heads, (2 n h, d)."""
    (query_gram, _), (output_gram, _) = attention_grams(weights)
    return torch.cat([_unit(square_root(query_gram) @ weights.key), _unit(square_root(output_gram) @ weights.value)])


def _query_stack(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The rows that the query sketch has to preserve: G_k^1/2 W_q of all heads, (n h, d)."""
    return _unit(square_root(key @ key.mT) @ query)


def latent_singular_values(weights: AttentionWeights) -> torch.Tensor:
    """Singular values, shape (3, d), of what the latent, the query sketch and the output sketch have to preserve.

    Each of the three is scaled to unit Frobenius norm, so a sum of dropped squares is a share of the whole.
    """
    stacks = (
        _latent_stack(weights),
        _query_stack(weights.query, weights.key),
        _unit(_output_by_token(weights.output, weights.value)),
    )
    # Through the (d, d) Gram matrices: several times faster than the SVD of the tall stacks.
    squares = torch.stack([torch.linalg.eigvalsh(stack.mT @ stack).flip(-1).clamp_min(0) for stack in stacks])
    values = squares.sqrt()
    return values / values.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _output_by_token(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(W_o G_v^1/2)^T of every head, (n, h, d): its rows span what the layer can write."""
    return (output @ square_root(value @ value.mT)).mT


def _right_singular_vectors(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank` leading right singular vectors of `rows` (m, d), as columns (d, rank), orthonormal."""
    # The (d, d) Gram matrix gives a complete basis also where there are fewer rows than `rank`.
    _, vectors = torch.linalg.eigh(rows.mT @ rows)
    return vectors.flip(-1)[:, :rank]


def truncate_latent(weights: AttentionWeights, *, latent: int, query: int | None, output: int | None) -> LatentWeights:
    """One latent for all heads' keys and values (eq. 20 of arXiv 2510.03358, absorbed), with optional sketches.

    For white inputs the latent is c = V^T y, with V (d, r) the leading right singular vectors of the rows
    G_q^1/2 W_k and G_o^1/2 W_v stacked over the heads (each of the two stacks scaled to unit norm). Then

        C_h = V^T W_k^T W_q,   W_o W_v V = D_h      (r, d) and (d, r) of head h,

    which the sketches truncate further: C_h U U^T, with U (d, s) the leading right singular vectors of the stacked rows of the C_h, and
    P P^T D_h, with P (d, p) the leading left singular vectors of [D_1 ... D_n].
    """
    basis = _right_singular_vectors(_latent_stack(weights), latent)
    cores_query = (weights.key @ basis).mT @ weights.query  # (n, r, d)
    cores_output = weights.output @ (weights.value @ basis)  # (n, d, r)
    query_sketch = output_sketch = None
    if query is not None:
        directions = _right_singular_vectors(cores_query.flatten(0, 1), query)
        query_sketch, cores_query = directions.mT, cores_query @ directions
    if output is not None:
        output_sketch = _right_singular_vectors(cores_output.mT.flatten(0, 1), output)
        cores_output = output_sketch.mT @ cores_output
    return LatentWeights(basis.mT, query_sketch, cores_query, cores_output, output_sketch)


def truncate_matrix(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The best rank-`rank` approximation of one matrix, of its own shape: what the paper's post-training scripts do."""
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).to(weight.dtype)
