"""The bounds of `rank_bounds.py` hold on random inputs that satisfy their assumptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_lowrank.analysis.rank_bounds import (
    attention_norms,
    embedding_rank_bound,
    residual_rank_bound,
    residual_spectrum_bound,
    truncated_attention_bound,
)
from hf_lowrank.analysis.spectra import Spectrum

SEEDS = st.integers(0, 2**32 - 1)
EPSILON = st.floats(1e-4, 2.0)
ACTIVATIONS = (nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Tanh())


def decaying(generator: torch.Generator, rows: int, columns: int, rate: float) -> torch.Tensor:
    """A random matrix with the singular values rate^j."""
    size = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64))[0] for n in (rows, columns)
    )
    return (left * rate ** torch.arange(size, dtype=torch.float64)) @ right.T


def random_attention(generator: torch.Generator, heads: int, length: int, sharpness: float) -> torch.Tensor:
    logits = sharpness * torch.randn(heads, length, length, generator=generator, dtype=torch.float64)
    return logits.softmax(-1)


@given(
    seed=SEEDS,
    patch=st.integers(1, 4),
    dimension=st.integers(2, 24),
    tokens=st.integers(1, 60),
    activation=st.sampled_from(ACTIVATIONS),
    scale=st.floats(0.01, 100),
    has_bias=st.booleans(),
    epsilon=EPSILON,
)
def test_no_residual_mlp_embeds_patches_at_a_higher_rank(
    seed: int,
    patch: int,
    dimension: int,
    tokens: int,
    activation: nn.Module,
    scale: float,
    has_bias: bool,
    epsilon: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    patches = scale * normal(patch, tokens)
    if has_bias:
        patches = torch.cat([patches, torch.ones(1, tokens, dtype=torch.float64)])
    width = len(patches)
    inner, outer, residual = normal(32, width), normal(dimension, 32), normal(dimension, width)
    embedded = residual @ patches + outer @ activation(inner @ patches)
    unit = torch.linalg.matrix_norm(outer, 2) * torch.linalg.matrix_norm(inner @ patches, 2)
    above = int((torch.linalg.svdvals(embedded) > epsilon * unit).sum())
    assert above <= embedding_rank_bound(width, dimension, epsilon)


def test_the_bound_of_the_embedding_grows_with_the_patch_and_not_with_the_dimension() -> None:
    assert embedding_rank_bound(16, 10_000, 1.0) == 32
    assert embedding_rank_bound(16, 10_000, 0.5) == 80
    assert embedding_rank_bound(16, 20, 0.5) == 20


@given(
    seed=SEEDS,
    heads=st.integers(1, 3),
    length=st.integers(1, 12),
    rank=st.integers(0, 5),
    rate=st.floats(0.05, 0.9),
    scale=st.floats(0.05, 5),
    is_causal=st.booleans(),
)
def test_no_sequence_of_a_vocabulary_moves_attention_further_when_its_weights_are_cut(
    seed: int, heads: int, length: int, rank: int, rate: float, scale: float, is_causal: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dimension, size = 6, 3
    vocabulary = scale * decaying(generator, dimension, 20, rate)  # a column a token
    chosen = vocabulary[:, torch.randint(20, (length,), generator=generator)].T  # (length, d)
    q, k, v = (torch.randn(heads, size, dimension, generator=generator, dtype=torch.float64) for _ in range(3))
    o = torch.randn(heads, dimension, size, generator=generator, dtype=torch.float64)
    bias = torch.randn(heads, length, length, generator=generator, dtype=torch.float64)
    if is_causal:
        bias = bias.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = ((chosen @ q.mT) @ (chosen @ k.mT).mT + bias).softmax(-1)
        return (weights @ (chosen @ v.mT) @ o.mT).sum(0)

    left, values, _ = torch.linalg.svd(vocabulary)
    projector = left[:, :rank] @ left[:, :rank].T
    moved = attend(q @ projector, k @ projector, v @ projector) - attend(q, k, v)
    limit = truncated_attention_bound(
        residual=float(values[rank]),
        radius=float(vocabulary.norm(dim=0).max()),
        query_key_norms=torch.linalg.matrix_norm(q.mT @ k, 2).tolist(),
        value_output_norms=torch.linalg.matrix_norm(o @ v, 2).tolist(),
    )
    assert float(moved.norm(dim=1).max()) <= limit * (1 + 1e-9) + 1e-12


def test_the_bound_of_attention_vanishes_with_the_spectrum() -> None:
    sizes = {"radius": 2.0, "query_key_norms": [3.0, 1.0], "value_output_norms": [1.0, 2.0]}
    limits = [truncated_attention_bound(residual=residual, **sizes) for residual in (1e-2, 1e-3, 0.0)]
    assert limits[0] == pytest.approx(10 * limits[1])  # in proportion to sigma
    assert limits[2] == 0.0


@given(
    seed=SEEDS, batch=st.integers(1, 3), queries=st.integers(1, 8), keys=st.integers(1, 8), sharpness=st.floats(0, 9)
)
def test_no_attention_matrix_has_a_larger_norm(
    seed: int, batch: int, queries: int, keys: int, sharpness: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (sharpness * torch.randn(batch, 2, queries, keys, generator=generator)).softmax(-1)
    true = torch.linalg.matrix_norm(weights, 2).amax(0).numpy()
    found = attention_norms(weights)
    assert (true <= found * (1 + 1e-5)).all()
    assert (found <= (1 + 1e-5) * np.sqrt(queries)).all()  # of any matrix whose rows add up to one


@given(
    seed=SEEDS,
    heads=st.integers(1, 4),
    length=st.integers(1, 9),
    sequences=st.integers(1, 3),
    rate=st.floats(0.05, 0.95),
    strength=st.floats(0, 10),
    is_cross=st.booleans(),
    epsilon=EPSILON,
)
def test_no_residual_attention_layer_raises_the_spectrum_further(
    seed: int,
    heads: int,
    length: int,
    sequences: int,
    rate: float,
    strength: float,
    is_cross: bool,
    epsilon: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dimension = 8
    stream = decaying(generator, sequences * length, dimension, rate)  # (tokens, d)
    if is_cross:
        inputs = decaying(generator, sequences * length, dimension, 0.5)
    else:  # as T5 does: tokens scaled to unit mean square, then a weight for each dimension
        weight = torch.rand(dimension, generator=generator, dtype=torch.float64)
        inputs = stream * stream.square().mean(1, keepdim=True).clamp_min(1e-12).rsqrt() * weight
    mixed = torch.zeros_like(stream)
    norms = np.zeros(heads)
    attention = torch.stack([random_attention(generator, heads, length, 3.0) for _ in range(sequences)])
    for head in range(heads):
        product = strength * torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
        mixed += torch.block_diag(*attention[:, head]) @ inputs @ product
        norms[head] = float(torch.linalg.matrix_norm(product, 2))
    norms *= attention_norms(attention)
    before, after, read = (
        Spectrum(torch.linalg.svdvals(states).numpy()) for states in (stream, stream + mixed, inputs)
    )
    bound = residual_spectrum_bound(before, read, norms)
    assert (after.values <= bound * (1 + 1e-9) + 1e-12).all()
    assert after.epsilon_rank(epsilon) <= residual_rank_bound(bound * (1 + 1e-9), after.norm, epsilon)


def test_a_layer_that_only_scales_reaches_the_bound_of_the_largest() -> None:
    values = np.array([4.0, 2.0, 1.0, 0.5])
    bound = residual_spectrum_bound(Spectrum(values), Spectrum(values), np.array([3.0]))
    assert bound[0] == 16.0  # sigma_1 of U + 3 U
    assert (bound >= 4 * values).all()


def test_a_layer_of_h_heads_raises_the_rank_at_most_h_plus_one_fold() -> None:
    values = np.array([1.0, 1.0] + [0.0] * 10)
    for heads in (1, 2, 4):
        bound = residual_spectrum_bound(Spectrum(values), Spectrum(values), np.ones(heads))
        assert int((bound > 0).sum()) == min(12, 2 * (heads + 1))
