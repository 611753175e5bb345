"""Truncations: pure functions from weights and Gram matrices to smaller weights.

Every reduction of this package inserts an oblique projection A B^T of rank r at some point of the computation, and
merges it into the matrices around it: in front of keys and values (the latent), of queries, of `wi`, behind `o` and
`wo`, inside each head. Which projection is best follows from two Gram matrices at that point: E[a a^T] of the activation a and
E[g g^T] of the gradient g of the loss (`balanced_basis`).

Everything is computed in float64 on the weights' device. A batch dimension n runs over the heads of a layer; d is d_model,
h the dense head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..linear_algebra import diagonal_blocks, square_root, without_scale

__all__ = [
    "AttentionGrams",
    "AttentionWeights",
    "Basis",
    "FeedForwardGrams",
    "FeedForwardWeights",
    "LatentWeights",
    "balanced_basis",
    "computable",
    "latent_bases",
    "per_head_bases",
    "thin_bases",
    "truncate_latent",
    "truncate_matrix",
    "truncate_per_head",
    "truncate_thin",
]

ROUNDING = 1e-6  # of the largest singular value: what products of factors have beyond their rank


# --- weights -----------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class FeedForwardWeights:
    """One feed-forward layer, float64: inner (g, w, d) with g = 2 where it is gated, else 1, and outer (d, w)."""

    inner: torch.Tensor
    outer: torch.Tensor


# --- Gram matrices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionGrams:
    """What balanced truncation has to know of the data in one attention layer, float64.

    With x the input of the queries, y that of keys and values, z = [z_1 ... z_n] the input of `o` (attention-mixed values), and the
    gradients of the loss in the queries, in y through keys and values, and in the output of `o`:

    query_input E[x x^T] (d, d); key_input E[y y^T] (d, d); mixed E[z z^T] (n h, n h);
    query_gradient (n h, n h); key_gradient (d, d); output_gradient (d, d).

    The gradients' matrices are scaled such that the loss of a truncation is the sum of its dropped squared singular values.
    """

    query_input: torch.Tensor
    key_input: torch.Tensor
    mixed: torch.Tensor
    query_gradient: torch.Tensor
    key_gradient: torch.Tensor
    output_gradient: torch.Tensor

    def to(self, device: torch.device) -> AttentionGrams:
        """The same on a device, that of the weights."""
        return AttentionGrams(**{name: gram.to(device) for name, gram in vars(self).items()})

    def within(self, weights: AttentionWeights) -> AttentionGrams:
        """The same, without what damping adds where no gradient comes from: outside of the rows of keys and values."""
        rows = torch.cat([_stacked(weights.key), _stacked(weights.value)])
        return replace(self, key_gradient=_projected(self.key_gradient, rows))

    @classmethod
    def white(cls, weights: AttentionWeights) -> AttentionGrams:
        """Without data: inputs are white, and a product W_q^T W_k or W_o W_v of a head is as good as its entries.

        Then only the products' own spectra count: the query's gradient is W_k W_k^T of its head, and so on. In the latent
        form the two stacks of rows that the latent has to preserve, G_q^1/2 W_k and G_o^1/2 W_v of all heads, are each scaled to unit
        norm.
        """
        query, key, value, output = weights.query, weights.key, weights.value, weights.output
        eye = torch.eye(query.shape[2], dtype=query.dtype, device=query.device)

        def unit(gram: torch.Tensor) -> torch.Tensor:
            trace = gram.trace()
            return gram / trace if trace > 0 else gram

        reading = (key.mT @ (query @ query.mT) @ key).sum(0)
        writing = (value.mT @ (output.mT @ output) @ value).sum(0)
        return cls(
            query_input=eye,
            key_input=eye,
            mixed=torch.block_diag(*(value @ value.mT)),
            query_gradient=torch.block_diag(*(key @ key.mT)),
            key_gradient=unit(reading) + unit(writing),
            output_gradient=eye,
        )


@dataclass(frozen=True)
class FeedForwardGrams:
    """The same of a feed-forward layer: its input (d, d), its output (d, d), and the gradients in both, float64.

    inner_gradient (g, d, d) is that in the input through each of the g inner matrices, output_gradient (d, d).
    """

    inner_input: torch.Tensor
    inner_gradient: torch.Tensor
    output: torch.Tensor
    output_gradient: torch.Tensor

    def to(self, device: torch.device) -> FeedForwardGrams:
        """The same on a device, that of the weights."""
        return FeedForwardGrams(**{name: gram.to(device) for name, gram in vars(self).items()})

    def within(self, weights: FeedForwardWeights) -> FeedForwardGrams:
        """The same, without what damping adds outside of the rows of the inner matrices and the columns of the outer one."""
        inner = torch.stack([_projected(gram, rows) for gram, rows in zip(self.inner_gradient, weights.inner)])
        return replace(self, inner_gradient=inner, output=_projected(self.output, weights.outer.T))

    @classmethod
    def white(cls, weights: FeedForwardWeights) -> FeedForwardGrams:
        """Without data: the spectra of the matrices themselves."""
        eye = torch.eye(len(weights.outer), dtype=weights.outer.dtype, device=weights.outer.device)
        return cls(eye, weights.inner.mT @ weights.inner, weights.outer @ weights.outer.mT, eye)


def _projected(gram: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """P G P for a Gram matrix G (d, d), with P the projection onto the space of these rows (m, d)."""
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    space = directions[values > ROUNDING * values[:1]]
    return space.T @ (space @ gram @ space.T) @ space


# --- balanced truncation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """The projections A_r B_r^T of every rank r at one point of a layer: see `balanced_basis`.

    singular_values (n, h), descending; left A and right B (n, h, m), whose columns are in the same order, for
    ranks up to m <= h.
    """

    singular_values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def truncate(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A_r and B_r, (n, h, rank); at full rank exactly the identity."""
        size = self.left.shape[1]
        if rank >= size:
            eye = torch.eye(size, dtype=self.left.dtype, device=self.left.device).expand(len(self.left), -1, -1)
            return eye, eye
        return self.left[..., :rank], self.right[..., :rank]


@dataclass(frozen=True)
class PairBasis(Basis):
    """The projections onto rotary frequencies: a rank keeps whole pairs of components, (i, i + h / 2).

    left and right are the identity; `order` (n, h / 2) has the frequencies of each head, the one to keep first first.
    """

    order: torch.Tensor

    def pairs(self, rank: int) -> torch.Tensor:
        """The frequencies that are kept at this rank, which is even: int64 (n, rank / 2), in order."""
        return self.order[:, : rank // 2].sort(dim=1).values

    def truncate(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A selection, (n, h, rank) twice: first components, then second ones."""
        pairs = self.pairs(rank)
        kept = torch.cat([pairs, pairs + self.order.shape[1]], dim=1)
        selection = self.left.gather(2, kept.unsqueeze(1).expand(-1, self.left.shape[1], -1))
        return selection, selection


def pair_basis(gradient_gram: torch.Tensor, activation_gram: torch.Tensor) -> PairBasis:
    """Which frequencies to keep, for Gram matrices (n, h, h) of queries before their rotation.

    A rotation between queries and keys leaves only projections that keep a pair or drop it. Dropping the set D loses

        E[(g_D^T a_D)^2] / 2  ~  sum over i, j in D of G_ij R_ij,

    as in `balanced_basis`. The pair that adds the least to it is dropped first, then the next.
    """
    heads, size = gradient_gram.shape[:2]
    gradient_gram, gradient_scale = without_scale(gradient_gram)
    activation_gram, activation_scale = without_scale(activation_gram)
    # (n, 2, h/2, 2, h/2): sums over the components of both pairs
    both = (gradient_gram * activation_gram).view(heads, 2, size // 2, 2, size // 2).sum(dim=(1, 3))
    added = both.diagonal(dim1=1, dim2=2).clone()  # of each pair, beside those already dropped
    rows = torch.arange(heads, device=both.device)
    order, losses = [], []
    for _ in range(size // 2):
        pair = added.argmin(dim=1)
        losses.append(added[rows, pair].clamp_min(0))
        order.append(pair)
        added = added + 2 * both[rows, pair]
        added[rows, pair] = torch.inf
    # Each component of a pair counts half of it.
    values = torch.stack(losses[::-1], dim=1).repeat_interleave(2, dim=1).div(2).sqrt()
    values = values * gradient_scale.squeeze(-1).square() * activation_scale.squeeze(-1).square()
    eye = torch.eye(size, dtype=both.dtype, device=both.device).expand(heads, -1, -1)
    return PairBasis(values, eye, eye, torch.stack(order[::-1], dim=1))


def balanced_basis(
    gradient_gram: torch.Tensor, activation_gram: torch.Tensor, *, max_rank: int | None = None
) -> Basis:
    """Balanced truncation, for Gram matrices (n, h, h): minimise || G^1/2 (I - A B^T) R^1/2 ||_F over A, B of rank r.

        U S V^T = svd(G^T/2 R^1/2),    A = R^1/2 V_r S_r^-1/2,    B = G^1/2 U_r S_r^-1/2

    With G = E[g g^T] / 2 of the gradient and R = E[a a^T] of the activation, g and a uncorrelated, this is the
    second-order change E[(g^T (I - A B^T) a)^2] / 2 of the loss (Kronecker-factored Fisher, arXiv 1503.05671), and equals the sum of the
    dropped S_i^2, by the theorem of Eckart and Young. For the two factors of a product X^T Y, with G = X X^T and R = Y Y^T, it is
    the best approximation of the product.

    Any roots do: G^1/2 (G^1/2)^T = G, and G^T/2 is the transposed one. S and V come from the eigenvectors of (R^1/2)^T G R^1/2, and
    U = G^T/2 R^1/2 V S^-1: several times faster than the singular value decomposition. Rank-deficient Grams are the normal case: directions whose singular value is zero to working
    precision are not inverted but set to zero. Matrices of any size do, from 1e-300 to 1e300.
    """
    gradient_gram, gradient_scale = without_scale(gradient_gram)
    activation_gram, activation_scale = without_scale(activation_gram)
    root = square_root(activation_gram)
    eigenvalues, vectors = torch.linalg.eigh(root.mT @ gradient_gram @ root)
    values = eigenvalues.flip(-1).clamp_min(0).sqrt()
    vectors = vectors.flip(-1)[..., :max_rank]
    kept = values[..., :max_rank]
    # Rounding errors of 1e-16 are 1e-8 after the square root.
    inverse = torch.where(kept > 1e-8 * values[..., :1], kept, torch.inf).rsqrt().unsqueeze(-2)
    left = root @ vectors * inverse
    right = gradient_gram @ left * inverse.square()
    # Each scale is the fourth power of these numbers.
    ratio = activation_scale / gradient_scale
    values = values * gradient_scale.squeeze(-1).square() * activation_scale.squeeze(-1).square()
    return Basis(values, left * ratio, right / ratio)


def _stacked(weight: torch.Tensor) -> torch.Tensor:
    """The linear layer's matrix of a query, key or value (n, h, d) -> (n h, d)."""
    return weight.flatten(0, 1)


def per_head_bases(weights: AttentionWeights, grams: AttentionGrams, *, rotary: bool = False) -> dict[str, Basis]:
    """The bases of the queries `qk` and of the mixed values `vo` of every head, each (n, h, .)."""
    heads, query = len(weights.query), _stacked(weights.query)
    output = weights.output.transpose(1, 2).flatten(0, 1)  # (n h, d)
    queries = pair_basis if rotary else balanced_basis
    return {
        "qk": queries(
            diagonal_blocks(grams.query_gradient, heads), diagonal_blocks(query @ grams.query_input @ query.T, heads)
        ),
        "vo": balanced_basis(
            diagonal_blocks(output @ grams.output_gradient @ output.T, heads), diagonal_blocks(grams.mixed, heads)
        ),
    }


def latent_bases(weights: AttentionWeights, grams: AttentionGrams, *, max_rank: int | None = None) -> dict[str, Basis]:
    """The bases of the input of keys and values `latent`, of queries `query`, and of the layer's `output`, each (1, d, .)."""
    query = _stacked(weights.query)
    output = weights.output.transpose(1, 2).flatten(0, 1)
    points = {
        "latent": (grams.key_gradient, grams.key_input),
        "query": (query.T @ grams.query_gradient @ query, grams.query_input),
        "output": (grams.output_gradient, output.T @ grams.mixed @ output),
    }
    return {name: balanced_basis(g[None], r[None], max_rank=max_rank) for name, (g, r) in points.items()}


def thin_bases(grams: FeedForwardGrams, *, max_rank: int | None = None) -> dict[str, Basis]:
    """The bases of a feed-forward layer's input `wi` (g, d, .), one for each inner matrix, and of its output `wo` (1, d, .)."""
    inputs = grams.inner_input.expand(len(grams.inner_gradient), -1, -1)
    return {
        "wi": balanced_basis(grams.inner_gradient, inputs, max_rank=max_rank),
        "wo": balanced_basis(grams.output_gradient[None], grams.output[None], max_rank=max_rank),
    }


def truncate_per_head(weights: AttentionWeights, bases: dict[str, Basis], *, qk: int, vo: int) -> AttentionWeights:
    """Smaller heads (eq. 21 of arXiv 2510.03358): q -> A B^T q and z -> A B^T z, merged into the weights.

        W_q' = B^T W_q,   W_k' = A^T W_k            W_v' = B^T W_v,   W_o' = W_o A

    A size equal to the head dimension leaves that pair of matrices as it is.
    """
    query, key, value, output = weights.query, weights.key, weights.value, weights.output
    if qk < query.shape[1]:
        a, b = bases["qk"].truncate(qk)
        query, key = b.mT @ query, a.mT @ key
    if vo < value.shape[1]:
        a, b = bases["vo"].truncate(vo)
        value, output = b.mT @ value, output @ a
    return AttentionWeights(query, key, value, output)


def truncate_latent(
    weights: AttentionWeights, bases: dict[str, Basis], *, latent: int, query: int | None, output: int | None
) -> LatentWeights:
    """One latent for all heads' keys and values (eq. 20 of arXiv 2510.03358, absorbed), with optional sketches.

    y -> A B^T y in front of keys and values: the latent is c = B^T y, and head h has the cores

        C_h = A^T W_k^T W_q,   D_h = W_o W_v A      (r, d) and (d, r)

    The sketches do the same to x in front of the queries, C_h A_q with the sketch B_q^T, and to the layer's output, B_o^T D_h with
    the sketch A_o.
    """
    a, b = (part[0] for part in bases["latent"].truncate(latent))
    cores_query = (weights.key @ a).mT @ weights.query  # (n, r, d)
    cores_output = weights.output @ (weights.value @ a)  # (n, d, r)
    query_sketch = output_sketch = None
    if query is not None:
        a_query, b_query = (part[0] for part in bases["query"].truncate(query))
        query_sketch, cores_query = b_query.mT, cores_query @ a_query
    if output is not None:
        output_sketch, b_output = (part[0] for part in bases["output"].truncate(output))
        cores_output = b_output.mT @ cores_output
    return LatentWeights(b.mT, query_sketch, cores_query, cores_output, output_sketch)


def truncate_thin(
    weights: FeedForwardWeights, bases: dict[str, Basis], *, wi: int | None, wo: int | None
) -> tuple[list[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """Thin factors (down (r, in), up (out, r)) of each inner matrix and of the outer one; a whole matrix (weight,) where None.

    W_i' = (W_i A) B^T,    W_o' = A (B^T W_o)
    """
    inner: list[tuple[torch.Tensor, ...]] = [(weight,) for weight in weights.inner]
    outer: tuple[torch.Tensor, ...] = (weights.outer,)
    if wi is not None:
        a, b = bases["wi"].truncate(wi)
        inner = [(right.mT, weight @ left) for left, right, weight in zip(a, b, weights.inner)]
    if wo is not None:
        left, right = (part[0] for part in bases["wo"].truncate(wo))
        outer = (right.mT @ weights.outer, left)
    return inner, outer


# --- single matrices ---------------------------------------------------------------------------------------------


def computable(weight: torch.Tensor) -> torch.Tensor:
    """The matrix in a dtype that decompositions take: float32, or float64 where it is."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def truncate_matrix(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The best rank-`rank` approximation of one matrix, of its own shape: what the paper's post-training scripts do."""
    u, s, vh = torch.linalg.svd(computable(weight), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).to(weight.dtype)
