"""Truncations: what is predicted to be lost is what is lost, and no truncation of that rank loses less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_lowrank.factorization import (
    AttentionWeights,
    attention_grams,
    epsilon_rank,
    joint_singular_values,
    joint_truncation,
    latent_singular_values,
    square_root,
    truncate_latent,
    truncate_matrix,
    truncate_per_head,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 12))  # heads, head dimension, d_model
KINDS = st.sampled_from(["full", "deficient", "rank one", "one head zero", "no query", "no value", "zero", "uneven"])
SEEDS = st.integers(0, 2**31)


def attention(shape: tuple[int, int, int], kind: str, seed: int) -> AttentionWeights:
    """Random weights of n heads of h with d_model d; `kind` says in which way they are degenerate."""
    n, h, d = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    query, key, value, output = normal(n, h, d), normal(n, h, d), normal(n, h, d), normal(n, d, h)
    if kind in ("deficient", "rank one"):
        rank = 1 if kind == "rank one" else max(1, h // 2)
        query, value = (normal(n, h, rank) @ normal(n, rank, d) for _ in range(2))
    elif kind == "one head zero":
        query[0] = value[0] = 0
    elif kind == "no query":
        query = query * 0
    elif kind == "no value":
        value = value * 0
    elif kind == "zero":
        query, key, value, output = query * 0, key * 0, value * 0, output * 0
    elif kind == "uneven":  # singular values over six decades, and matrices of very different size
        scale = torch.logspace(3, -3, h, dtype=torch.float64)
        query, output = query * scale[:, None], output * scale * 1e3
    return AttentionWeights(query, key, value, output)


def products(weights: AttentionWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """W_q^T W_k and W_o W_v of every head, (n, d, d): formed here, never in the package."""
    return weights.query.mT @ weights.key, weights.output @ weights.value


def energy(matrices: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius norm of each matrix."""
    return matrices.square().sum((-2, -1))


def tail(matrix: torch.Tensor, rank: int) -> float:
    """What the best approximation of that rank loses, by numpy."""
    return float((np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:] ** 2).sum())


def all_finite(weights: object) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in vars(weights).values() if tensor is not None)


# Per head


@given(SHAPES, KINDS, SEEDS, st.data())
def test_per_head_loses_what_is_predicted_and_no_rank_loses_less(shape, kind, seed, data):
    weights = attention(shape, kind, seed)
    sizes = [data.draw(st.integers(1, shape[1]), label=name) for name in ("qk", "vo")]
    truncated = truncate_per_head(weights, qk=sizes[0], vo=sizes[1])
    assert all_finite(truncated)
    for rank, grams, before, after in zip(sizes, attention_grams(weights), products(weights), products(truncated)):
        predicted = joint_singular_values(*grams)[:, rank:].square().sum(1)
        for head in range(shape[0]):
            accuracy = 1e-8 * float(energy(before[head]))
            measured = float(energy(before[head] - after[head]))
            assert measured == pytest.approx(float(predicted[head]), rel=0, abs=accuracy)
            assert measured == pytest.approx(tail(before[head], rank), rel=0, abs=accuracy)


@given(SHAPES, KINDS, SEEDS, st.data())
def test_per_head_shapes(shape, kind, seed, data):
    n, h, d = shape
    qk, vo = data.draw(st.integers(1, h)), data.draw(st.integers(1, h))
    truncated = truncate_per_head(attention(shape, kind, seed), qk=qk, vo=vo)
    assert truncated.query.shape == truncated.key.shape == (n, qk, d)
    assert truncated.value.shape == (n, vo, d)
    assert truncated.output.shape == (n, d, vo)


@given(SHAPES, KINDS, SEEDS)
def test_full_head_dimension_leaves_the_weights_alone(shape, kind, seed):
    weights = attention(shape, kind, seed)
    truncated = truncate_per_head(weights, qk=shape[1], vo=shape[1])
    assert all(torch.equal(getattr(truncated, name), tensor) for name, tensor in vars(weights).items())


@given(SHAPES, KINDS, SEEDS)
def test_joint_truncation_at_full_rank_reproduces_the_products(shape, kind, seed):
    weights = attention(shape, kind, seed)
    query_key, output_value = attention_grams(weights)
    a, b = joint_truncation(*query_key, shape[1])
    c, d = joint_truncation(*output_value, shape[1])
    rebuilt = AttentionWeights(a.mT @ weights.query, b.mT @ weights.key, d.mT @ weights.value, weights.output @ c)
    for before, after in zip(products(weights), products(rebuilt)):
        assert (energy(before - after).sqrt() <= 1e-7 * energy(before).sqrt()).all()


@given(SHAPES, st.sampled_from(["full", "deficient", "zero"]), SEEDS, st.data())
def test_truncation_is_balanced(shape, kind, seed, data):
    """New queries and keys are equally large: their Gram matrices are both diag(S_r), good for half precision."""
    weights = attention(shape, kind, seed)
    rank = data.draw(st.integers(1, max(1, shape[1] - 1)))
    grams, _ = attention_grams(weights)
    a, b = joint_truncation(*grams, rank)
    values = torch.diag_embed(joint_singular_values(*grams)[:, :rank])
    for factor, gram in zip((a, b), grams):
        assert_close(factor.mT @ gram @ factor, values, rtol=0, atol=1e-6 * float(values.max()))


@given(SHAPES, KINDS, SEEDS)
def test_joint_singular_values_are_those_of_the_full_products(shape, kind, seed):
    weights = attention(shape, kind, seed)
    for grams, product in zip(attention_grams(weights), products(weights)):
        values = joint_singular_values(*grams)
        assert values.shape == shape[:2]
        for found, matrix in zip(values, product):
            wanted = np.zeros(shape[1])
            singular_values = np.linalg.svd(matrix.numpy(), compute_uv=False)[: shape[1]]
            wanted[: len(singular_values)] = singular_values
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-7 * wanted[0])


@given(st.integers(1, 6), st.integers(1, 8), SEEDS)
def test_square_root_of_a_deficient_gram_matrix(size, columns, seed):
    factor = torch.randn(2, size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = factor @ factor.mT
    root = square_root(gram)
    assert_close(root, root.mT)
    assert_close(root @ root, gram)


# Latent


def rebuilt(latent) -> tuple[torch.Tensor, torch.Tensor]:
    """What every head of the latent form has in place of W_k^T W_q and W_o W_v, (n, d, d)."""
    query, output = latent.query, latent.output
    if latent.query_sketch is not None:
        query = query @ latent.query_sketch
    if latent.output_sketch is not None:
        output = latent.output_sketch @ output
    return latent.latent.T @ query, output @ latent.latent


def share_lost(before: torch.Tensor, after: torch.Tensor) -> float:
    """Of the squared Frobenius norm, summed over the heads; 0 for a product that is zero."""
    total = float(energy(before).sum())
    return float(energy(before - after).sum()) / total if total > 0 else 0.0


@given(SHAPES, KINDS, SEEDS, st.data())
def test_latent_loses_what_is_predicted(shape, kind, seed, data):
    """Without sketches: the dropped squares of the stack are the products' relative losses, averaged."""
    weights = attention(shape, kind, seed)
    rank = data.draw(st.integers(1, shape[2]), label="rank")
    truncated = truncate_latent(weights, latent=rank, query=None, output=None)
    assert all_finite(truncated)
    predicted = float(latent_singular_values(weights)[0, rank:].square().sum())
    query_key, output_value = products(weights)
    new_key_query, new_output_value = rebuilt(truncated)
    losses = [share_lost(query_key.mT, new_key_query), share_lost(output_value, new_output_value)]
    nonzero = [loss for loss, product in zip(losses, products(weights)) if product.any()]
    assert predicted == pytest.approx(sum(nonzero) / max(1, len(nonzero)), rel=0, abs=1e-8)


@given(SHAPES, KINDS, SEEDS, st.data())
def test_each_sketch_alone_loses_what_is_predicted(shape, kind, seed, data):
    d = shape[2]
    weights = attention(shape, kind, seed)
    rank = data.draw(st.integers(1, d), label="rank")
    _, query_loss, output_loss = latent_singular_values(weights)[:, rank:].square().sum(1).tolist()
    key_query, output_value = products(weights)[0].mT, products(weights)[1]
    with_query, unchanged_output = rebuilt(truncate_latent(weights, latent=d, query=rank, output=None))
    unchanged_query, with_output = rebuilt(truncate_latent(weights, latent=d, query=None, output=rank))
    assert share_lost(key_query, with_query) == pytest.approx(query_loss, rel=0, abs=1e-8)
    assert share_lost(output_value, with_output) == pytest.approx(output_loss, rel=0, abs=1e-8)
    assert share_lost(key_query, unchanged_query) < 1e-14
    assert share_lost(output_value, unchanged_output) < 1e-14


@given(SHAPES, KINDS, SEEDS, st.data())
def test_sketches_are_optimal_for_the_latent_beneath_them(shape, kind, seed, data):
    n, _, d = shape
    weights = attention(shape, kind, seed)
    rank, query, output = (data.draw(st.integers(1, d), label=name) for name in ("latent", "query", "output"))
    plain = truncate_latent(weights, latent=rank, query=None, output=None)
    sketched = truncate_latent(weights, latent=rank, query=query, output=output)
    assert all_finite(sketched)
    assert torch.equal(sketched.latent, plain.latent)

    lost = float(energy(plain.query - sketched.query @ sketched.query_sketch).sum())
    accuracy = 1e-10 * float(energy(plain.query).sum())
    assert lost == pytest.approx(tail(plain.query.reshape(n * rank, d), query), rel=0, abs=accuracy)

    lost = float(energy(plain.output - sketched.output_sketch @ sketched.output).sum())
    accuracy = 1e-10 * float(energy(plain.output).sum())
    assert lost == pytest.approx(tail(torch.cat([*plain.output], dim=1), output), rel=0, abs=accuracy)


@given(SHAPES, KINDS, SEEDS)
def test_latent_at_full_rank_is_exact(shape, kind, seed):
    n, _, d = shape
    weights = attention(shape, kind, seed)
    truncated = truncate_latent(weights, latent=d, query=d, output=d)
    assert truncated.latent.shape == truncated.query_sketch.shape == truncated.output_sketch.shape == (d, d)
    assert truncated.query.shape == truncated.output.shape == (n, d, d)
    query_key, output_value = products(weights)
    for before, after in zip((query_key.mT, output_value), rebuilt(truncated)):
        assert (energy(before - after).sqrt() <= 1e-12 * energy(before).sum().sqrt()).all()


@given(SHAPES, KINDS, SEEDS)
def test_latent_spectra_are_shares_of_the_whole(shape, kind, seed):
    weights = attention(shape, kind, seed)
    values = latent_singular_values(weights)
    assert values.shape == (3, shape[2])
    assert (values.diff(dim=1) <= 0).all()
    query_key, output_value = (bool(product.any()) for product in products(weights))
    wanted = [query_key or output_value, query_key, output_value]
    assert_close(values.square().sum(1), torch.tensor(wanted, dtype=torch.float64))


def test_latent_is_shared_by_all_heads():
    """Heads that read the same two directions need a latent of two, however many they are."""
    basis = torch.randn(2, 10, dtype=torch.float64)
    mix = lambda: torch.randn(5, 4, 2, dtype=torch.float64) @ basis  # noqa: E731
    weights = AttentionWeights(torch.randn(5, 4, 10).double(), mix(), mix(), torch.randn(5, 10, 4).double())
    truncated = truncate_latent(weights, latent=2, query=None, output=None)
    assert share_lost(products(weights)[0].mT, rebuilt(truncated)[0]) < 1e-14
    assert share_lost(products(weights)[1], rebuilt(truncated)[1]) < 1e-14


# The layout of T5's linear layers


@given(SHAPES, SEEDS)
def test_linear_layers_round_trip(shape, seed):
    n, h, d = shape
    generator = torch.Generator().manual_seed(seed)
    linear = {
        name: torch.randn(*size, generator=generator)
        for name, size in {"q": (n * h, d), "k": (n * h, d), "v": (n * h, d), "o": (d, n * h)}.items()
    }
    weights = AttentionWeights.from_linear(**linear, num_heads=n)
    assert weights.query.dtype == torch.float64
    for head in range(n):  # head i owns rows i h to (i + 1) h of q, k, v and the same columns of o
        rows = slice(head * h, (head + 1) * h)
        assert torch.equal(weights.query[head].float(), linear["q"][rows])
        assert torch.equal(weights.key[head].float(), linear["k"][rows])
        assert torch.equal(weights.value[head].float(), linear["v"][rows])
        assert torch.equal(weights.output[head].float(), linear["o"][:, rows])
    back = weights.to_linear(torch.float32)
    assert {name: weight.shape for name, weight in back.items()} == {name: w.shape for name, w in linear.items()}
    assert all(torch.equal(back[name], weight) for name, weight in linear.items())
    assert all(weight.is_contiguous() for weight in back.values())


@given(SHAPES, SEEDS, st.data())
def test_latent_linear_layers_do_what_the_cores_do(shape, seed, data):
    n, _, d = shape
    rank, query, output = (data.draw(st.none() | st.integers(1, d)) for _ in range(3))
    truncated = truncate_latent(attention(shape, "full", seed), latent=rank or d, query=query, output=output)
    linear = truncated.to_linear(torch.float64)
    assert ("query_sketch" in linear, "output_sketch" in linear) == (query is not None, output is not None)
    x, mixed = torch.randn(d).double(), torch.randn(n, rank or d).double()
    sketch = x if query is None else linear["query_sketch"] @ x
    head_queries = (linear["q"] @ sketch).unflatten(0, (n, -1))
    assert_close(head_queries, torch.stack([core @ sketch for core in truncated.query]))
    written = sum(core @ latent for core, latent in zip(truncated.output, mixed))
    assert_close(linear["o"] @ mixed.flatten(), written)


# The paper's own truncation


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    st.floats(0, 1) | st.sampled_from([0.0, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1.0]),
)
def test_epsilon_rank_counts(values, epsilon):
    values = sorted(values, reverse=True)
    count = sum(1 for value in values if values[0] > 0 and value / values[0] >= epsilon)
    assert epsilon_rank(torch.tensor(values, dtype=torch.float64), epsilon) == max(1, count)


@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 10), SEEDS)
def test_epsilon_rank_finds_the_rank_of_a_product(rows, columns, rank, seed):
    rank = min(rank, rows, columns)
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(rows, rank)) @ generator.normal(size=(rank, columns))
    values = torch.linalg.svdvals(torch.from_numpy(matrix))
    assert epsilon_rank(values, 1e-12) == max(1, np.linalg.matrix_rank(matrix, tol=1e-12 * float(values[0])))


@given(st.integers(1, 10), st.integers(1, 10), SEEDS, st.data())
def test_truncate_matrix_equals_numpys(rows, columns, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns)), label="rank")
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    u, s, vh = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    truncated = truncate_matrix(torch.from_numpy(weight), rank)
    assert truncated.shape == weight.shape
    # Not entry by entry, for the subspace is not determined where two singular values are close; what is lost is.
    lost = float(((truncated.double().numpy() - weight) ** 2).sum())
    assert lost == pytest.approx(float((s[rank:] ** 2).sum()), rel=1e-4, abs=1e-11 * float(s[0] ** 2))
    assert np.linalg.matrix_rank(truncated.double().numpy(), tol=1e-5 * s[0]) <= rank
    if rank == len(s) or s[rank - 1] - s[rank] > 0.1 * s[0]:
        np.testing.assert_allclose(truncated.numpy(), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-4 * s[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_truncate_matrix_keeps_dtype_and_zeros(dtype):
    truncated = truncate_matrix(torch.zeros(4, 6, dtype=dtype), 2)
    assert truncated.dtype == dtype
    assert torch.equal(truncated, torch.zeros(4, 6, dtype=dtype))
