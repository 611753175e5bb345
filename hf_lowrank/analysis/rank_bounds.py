"""Bounds on ranks that follow from the architecture, proved here, to be shown beside what is measured.

They are of the kind of Theorems 2, 3 and 4 of arXiv 2510.03358, with the constants written out: every quantity on the right is
one that the analysis measures, so that a bound can be checked on any checkpoint. Tokens are the columns of X (d, L); sigma_j are
singular values in descending order, counted from 1; sigma_j = 0 beyond the size of a matrix. Two inequalities of Weyl carry all of it:

    sigma_{i+j-1}(A + B) <= sigma_i(A) + sigma_j(B)        sigma_j(A B C) <= ||A|| sigma_j(B) ||C||
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .spectra import FloatArray, Spectrum

__all__ = [
    "attention_norms",
    "embedding_rank_bound",
    "residual_rank_bound",
    "residual_spectrum_bound",
    "truncated_attention_bound",
]


def embedding_rank_bound(input_rank: int, dimension: int, epsilon: float) -> int:
    """The most singular values of a residual MLP embedding above epsilon ||W_2|| ||W_1 X||: min(d, (1 + epsilon^-2) k).

    Phi(X) = W_3 X + W_2 w(W_1 X), X of rank k, and an activation with |w(t)| <= |t| (ReLU, SiLU, GELU, tanh). With biases X has a row of
    ones more.

    Proof. W_3 X has rank at most k, so sigma_{k+j}(Phi) <= sigma_j(W_2 w(W_1 X)) <= ||W_2|| ||w(W_1 X)||_F / sqrt(j), and
    ||w(W_1 X)||_F <= ||W_1 X||_F <= sqrt(k) ||W_1 X||. Above the threshold sqrt(k / j) > epsilon, hence j < k / epsilon^2.

    Args:
        input_rank: k, the rank of the patches; their length at most.
        dimension: d, the size of the embedding.
        epsilon: The threshold.
    """
    return min(dimension, int(np.floor((1 + epsilon**-2) * input_rank)))


def truncated_attention_bound(
    *, residual: float, radius: float, query_key_norms: Sequence[float], value_output_norms: Sequence[float]
) -> float:
    """How far, in Euclidean norm, attention can move any token's output when its inputs are projected to fewer dimensions.

    P is an orthogonal projector and W_q P, W_k P, W_v P take the place of the weights, which have rank(P) then. With P on the leading
    d~ left singular vectors of a vocabulary Xi, every column x of Xi has ||x - P x|| <= sigma_{d~+1}(Xi): a bound that
    holds for every sequence of tokens from Xi at once, in proportion to sigma_{d~+1}.

    Proof, for one head, e = `residual`, R = `radius`, M = W_q^T W_k with the scale of the logits in it. Logits move by
    |x^T M y - x^T P M P y| <= ||(I - P) x|| ||M|| ||y|| + ||P x|| ||M|| ||(I - P) y|| <= 2 e R ||M||; position biases and masks stay as they are.
    The softmax is Lipschitz with constant 1 from the largest change of a logit to the sum of changes of the weights: its derivative takes v to
    p (v - p.v), and E|v - E v| <= max |v|; that sum is at most 2 besides. The output W_o W_v (sum_s a_s y_s) moves by
    ||W_o W_v|| (max ||(I - P) y|| + R sum_s |a_s - a~_s|).

    Args:
        residual: The largest ||x - P x|| of a token.
        radius: The largest ||x|| of a token.
        query_key_norms: ||W_q^T W_k|| of each head, times the scale of the logits.
        value_output_norms: ||W_o W_v|| of each head.
    """
    moved = [min(2.0, 2 * residual * radius * norm) for norm in query_key_norms]
    return sum(norm * (residual + radius * weights) for norm, weights in zip(value_output_norms, moved))


def attention_norms(weights: torch.Tensor) -> FloatArray:
    """An upper bound on ||A||_2 of every head, from attention weights (batch, heads, queries, keys): the worst of the batch.

    ||A||_2 <= min(sqrt(||A||_1 ||A||_inf), ||A||_F).
    """
    weights = weights.detach()
    columns = weights.sum(-2).amax(-1) * weights.sum(-1).amax(-1)
    return torch.minimum(columns, weights.square().sum((-2, -1))).amax(0).double().sqrt().cpu().numpy()


def residual_spectrum_bound(residual: Spectrum, inputs: Spectrum, head_norms: NDArray[np.float64]) -> FloatArray:
    """An upper bound on every sigma_k(Z), Z = U + sum over h heads of W_h X A_h^T, in the order of k.

    sigma_k(Z) <= min over 1 <= j <= k of sigma_{k-j+1}(U) + (sum of c_h) sigma_{floor((j-1)/h)+1}(X),        c_h = ||A_h|| ||W_h||

    Proof. sigma_{m+1}(W_h X A_h^T) <= c_h sigma_{m+1}(X). Weyl's inequality for h summands, each at index m+1, gives
    sigma_{hm+1}(Y) <= (sum of c_h) sigma_{m+1}(X) for their sum Y; take m = floor((j-1)/h), then add U at index k-j+1.

    So a layer of h heads can raise the rank at most (h+1)-fold, if it lowers epsilon by the factor 1 + sum of c_h. Many sequences
    at once are one X with block-diagonal A_h, and ||A_h|| is the largest of their norms.

    Args:
        residual: The singular values of U, the stream that the layer adds to.
        inputs: The singular values of X, what its keys and values read: U after a normalisation, or an encoder's output.
        head_norms: c_h of each head.
    """
    size, heads = len(residual.values), len(head_norms)
    stream = np.append(residual.values, 0.0)
    index = np.minimum(np.arange(size) // heads, len(inputs.values))  # where X has no singular value left: 0
    added = float(np.sum(head_norms)) * np.append(inputs.values, 0.0)[index]  # for j = 1, 2, ...
    bound = np.empty(size)
    for k in range(size):
        bound[k] = (stream[k::-1] + added[: k + 1]).min()
    return np.minimum.accumulate(bound)  # as sigma_k itself descends


def residual_rank_bound(bound: FloatArray, norm: float, epsilon: float) -> int:
    """The largest epsilon-rank that Z can have: how many sigma_k may reach epsilon sigma_1(Z), given sigma_1(Z) = `norm`."""
    return int((bound >= epsilon * norm).sum())
