"""Truncations: what is predicted to be lost is what is lost, and no truncation of that rank loses less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_lowrank.compression.factorization import (
    AttentionGrams,
    AttentionWeights,
    Basis,
    FeedForwardGrams,
    FeedForwardWeights,
    LatentWeights,
    balanced_basis,
    latent_bases,
    per_head_bases,
    thin_bases,
    truncate_latent,
    truncate_matrix,
    truncate_per_head,
    truncate_thin,
)

GRAMS = st.sampled_from(["full", "deficient", "rank one", "zero", "uneven", "one group zero"])
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


# Balanced truncation


def gram(size: int, groups: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Positive semidefinite matrices (groups, size, size); `kind` says in which way they are degenerate."""
    columns = {"deficient": max(1, size // 2), "rank one": 1}.get(kind, size + 3)
    factor = torch.randn(groups, size, columns, generator=generator, dtype=torch.float64)
    if kind == "zero":
        factor = factor * 0
    elif kind == "uneven":
        factor = factor * torch.logspace(3, -3, size, dtype=torch.float64)[:, None]
    elif kind == "one group zero":
        factor[0] = 0
    return factor @ factor.mT


def gram_pair(size: int, groups: int, kinds: tuple[str, str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the gradients and of the activations."""
    generator = torch.Generator().manual_seed(seed)
    return gram(size, groups, kinds[0], generator), gram(size, groups, kinds[1], generator)


def loss(gradient: torch.Tensor, activation: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """|| G^1/2 (I - P) R^1/2 ||_F^2 = tr (I - P)^T G (I - P) R of each group, without the roots."""
    error = torch.eye(len(projection[0]), dtype=torch.float64) - projection
    return (error.mT @ gradient @ error @ activation).diagonal(dim1=1, dim2=2).sum(1)


def size_of(gradient: torch.Tensor, activation: torch.Tensor) -> float:
    """The loss of dropping everything, and what rounding errors are small beside."""
    traces = gradient.diagonal(dim1=1, dim2=2).sum(1) * activation.diagonal(dim1=1, dim2=2).sum(1)
    return float(traces.max())


@given(st.integers(1, 3), st.integers(1, 8), st.tuples(GRAMS, GRAMS), SEEDS)
def test_every_rank_loses_its_dropped_singular_values(groups, size, kinds, seed):
    gradient, activation = gram_pair(size, groups, kinds, seed)
    basis = balanced_basis(gradient, activation)
    assert all_finite(basis)
    assert basis.singular_values.shape == (groups, size)
    assert (basis.singular_values.diff(dim=1) <= 0).all()
    for rank in range(1, size + 1):
        left, right = basis.truncate(rank)
        assert left.shape == right.shape == (groups, size, rank)
        predicted = basis.singular_values[:, rank:].square().sum(1)
        found = loss(gradient, activation, left @ right.mT)
        assert_close(found, predicted, rtol=1e-6, atol=1e-9 * size_of(gradient, activation))


@given(st.integers(1, 3), st.integers(2, 8), st.tuples(GRAMS, GRAMS), SEEDS, st.data())
def test_no_projection_of_that_rank_loses_less(groups, size, kinds, seed, data):
    """Against random matrices of the rank, and against small changes of the one that was found."""
    gradient, activation = gram_pair(size, groups, kinds, seed)
    rank = data.draw(st.integers(1, size - 1), label="rank")
    basis = balanced_basis(gradient, activation)
    left, right = basis.truncate(rank)
    least = loss(gradient, activation, left @ right.mT)
    generator = torch.Generator().manual_seed(seed + 1)
    for distance in (None, 1e-3, 1e-1):
        a, b = (torch.randn(groups, size, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        if distance is None:
            b = b @ torch.linalg.inv(b.mT @ a).mT  # a projection: a^T b = 1
        else:
            a, b = left + distance * a * left.norm() / a.norm(), right + distance * b * right.norm() / b.norm()
        other = loss(gradient, activation, a @ b.mT)
        assert (other >= least - 1e-9 * size_of(gradient, activation)).all()


@given(st.integers(1, 3), st.integers(1, 8), st.tuples(GRAMS, GRAMS), SEEDS, st.data())
def test_both_sides_are_balanced(groups, size, kinds, seed, data):
    """A^T G A = B^T R B = S, and A B^T is a projection."""
    gradient, activation = gram_pair(size, groups, kinds, seed)
    basis = balanced_basis(gradient, activation)
    rank = data.draw(st.integers(1, size), label="rank")
    left, right = basis.left[..., :rank], basis.right[..., :rank]
    values = basis.singular_values[:, :rank]
    largest = float(basis.singular_values.max())
    kept = values > 1e-6 * basis.singular_values[:, :1]  # the others may be rounding errors
    for side, matrix in ((left, gradient), (right, activation)):
        found = side.mT @ matrix @ side
        wanted = torch.diag_embed(values)
        both = kept.unsqueeze(1) & kept.unsqueeze(2)
        assert_close(found[both], wanted[both], rtol=0, atol=1e-5 * largest)
    identity = right.mT @ left
    for group in range(groups):
        count = int(kept[group].sum())
        inner = identity[group, :count, :count]
        assert_close(inner, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-4)


@given(st.integers(1, 3), st.integers(1, 8), st.tuples(GRAMS, GRAMS), SEEDS, st.integers(0, 4))
def test_full_rank_is_exactly_the_identity(groups, size, kinds, seed, more):
    basis = balanced_basis(*gram_pair(size, groups, kinds, seed))
    for side in basis.truncate(size + more):
        assert torch.equal(side, torch.eye(size, dtype=torch.float64).expand(groups, -1, -1))


@given(st.integers(1, 3), st.integers(1, 8), st.tuples(GRAMS, GRAMS), SEEDS, st.data())
def test_a_largest_rank_changes_none_below_it(groups, size, kinds, seed, data):
    pair = gram_pair(size, groups, kinds, seed)
    most = data.draw(st.integers(1, size), label="max_rank")
    whole, part = balanced_basis(*pair), balanced_basis(*pair, max_rank=most)
    assert torch.equal(part.singular_values, whole.singular_values)
    assert part.left.shape == part.right.shape == (groups, size, most)
    for name in ("left", "right"):
        assert_close(
            getattr(part, name),
            getattr(whole, name)[..., :most],
            rtol=1e-9,
            atol=1e-12 * float(getattr(whole, name).abs().max()),
        )


# Grams of a layer


def attention_grams(shape: tuple[int, int, int], kind: str, seed: int) -> AttentionGrams:
    """What data might have done in a layer of that shape."""
    n, h, d = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = {"mixed": n * h, "query_gradient": n * h}
    return AttentionGrams(
        **{name: gram(sizes.get(name, d), 1, kind, generator)[0] for name in AttentionGrams.__dataclass_fields__}
    )


def feed_forward(shape: tuple[int, int, int], seed: int) -> FeedForwardWeights:
    """`shape` (inner matrices, width, d_model)."""
    generator = torch.Generator().manual_seed(seed)
    gates, width, d = shape
    return FeedForwardWeights(
        torch.randn(gates, width, d, generator=generator, dtype=torch.float64),
        torch.randn(d, width, generator=generator, dtype=torch.float64),
    )


FEED_FORWARD_SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(2, 8))
DATA = st.sampled_from(["white", "full", "deficient", "rank one", "zero", "uneven"])


def projection(basis: Basis, rank: int) -> torch.Tensor:
    left, right = basis.truncate(rank)
    return left @ right.mT


def close(found: torch.Tensor, wanted: torch.Tensor, accuracy: float = 1e-8) -> None:
    """Relative to the largest entry."""
    assert_close(found, wanted, rtol=0, atol=accuracy * max(1e-300, float(wanted.abs().max())))


# Per head


@given(SHAPES, KINDS, DATA, SEEDS, st.data())
def test_smaller_heads_are_the_projection_inserted(shape, kind, on, seed, data):
    """q -> P q and z -> P z of every head, whatever the Gram matrices say; with the bases' own singular values as losses."""
    weights = attention(shape, kind, seed)
    grams = AttentionGrams.white(weights) if on == "white" else attention_grams(shape, on, seed)
    bases = per_head_bases(weights, grams)
    sizes = {name: data.draw(st.integers(1, shape[1]), label=name) for name in ("qk", "vo")}
    truncated = truncate_per_head(weights, bases, **sizes)
    assert all_finite(truncated)
    inserted = {name: projection(bases[name], size) for name, size in sizes.items()}
    query_key, output_value = products(truncated)
    close(query_key, (inserted["qk"] @ weights.query).mT @ weights.key)
    close(output_value, weights.output @ inserted["vo"] @ weights.value)


@given(SHAPES, KINDS, SEEDS, st.data())
def test_white_heads_lose_what_the_products_singular_values_say(shape, kind, seed, data):
    weights = attention(shape, kind, seed)
    bases = per_head_bases(weights, AttentionGrams.white(weights))
    sizes = [data.draw(st.integers(1, shape[1]), label=name) for name in ("qk", "vo")]
    truncated = truncate_per_head(weights, bases, qk=sizes[0], vo=sizes[1])
    for name, rank, before, after in zip(("qk", "vo"), sizes, products(weights), products(truncated)):
        predicted = bases[name].singular_values[:, rank:].square().sum(1)
        for head in range(shape[0]):
            accuracy = 1e-8 * float(energy(before[head]))
            measured = float(energy(before[head] - after[head]))
            assert measured == pytest.approx(float(predicted[head]), rel=0, abs=accuracy)
            assert measured == pytest.approx(tail(before[head], rank), rel=0, abs=accuracy)


@given(SHAPES, KINDS, SEEDS)
def test_white_singular_values_are_those_of_the_products(shape, kind, seed):
    weights = attention(shape, kind, seed)
    bases = per_head_bases(weights, AttentionGrams.white(weights))
    for name, product in zip(("qk", "vo"), products(weights)):
        values = bases[name].singular_values
        assert values.shape == shape[:2]
        for found, matrix in zip(values, product):
            wanted = np.zeros(shape[1])
            singular_values = np.linalg.svd(matrix.numpy(), compute_uv=False)[: shape[1]]
            wanted[: len(singular_values)] = singular_values
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-7 * wanted[0])


@given(SHAPES, KINDS, DATA, SEEDS, st.data())
def test_per_head_shapes(shape, kind, on, seed, data):
    n, h, d = shape
    weights = attention(shape, kind, seed)
    grams = AttentionGrams.white(weights) if on == "white" else attention_grams(shape, on, seed)
    qk, vo = data.draw(st.integers(1, h)), data.draw(st.integers(1, h))
    truncated = truncate_per_head(weights, per_head_bases(weights, grams), qk=qk, vo=vo)
    assert truncated.query.shape == truncated.key.shape == (n, qk, d)
    assert truncated.value.shape == (n, vo, d)
    assert truncated.output.shape == (n, d, vo)


@given(SHAPES, KINDS, DATA, SEEDS)
def test_full_head_dimension_leaves_the_weights_alone(shape, kind, on, seed):
    weights = attention(shape, kind, seed)
    grams = AttentionGrams.white(weights) if on == "white" else attention_grams(shape, on, seed)
    truncated = truncate_per_head(weights, per_head_bases(weights, grams), qk=shape[1], vo=shape[1])
    assert all(torch.equal(getattr(truncated, name), tensor) for name, tensor in vars(weights).items())


# Latent


def rebuilt(latent: LatentWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """What every head of the latent form has in place of W_k^T W_q and W_o W_v, (n, d, d)."""
    query, output = latent.query, latent.output
    if latent.query_sketch is not None:
        query = query @ latent.query_sketch
    if latent.output_sketch is not None:
        output = latent.output_sketch @ output
    return latent.latent.T @ query, output @ latent.latent


@given(SHAPES, KINDS, DATA, SEEDS, st.data())
def test_a_latent_is_its_three_projections_inserted(shape, kind, on, seed, data):
    d = shape[2]
    weights = attention(shape, kind, seed)
    grams = AttentionGrams.white(weights) if on == "white" else attention_grams(shape, on, seed)
    bases = latent_bases(weights, grams)
    latent = data.draw(st.integers(1, d), label="latent")
    sketches = {name: data.draw(st.none() | st.integers(1, d), label=name) for name in ("query", "output")}
    truncated = truncate_latent(weights, bases, latent=latent, **sketches)
    assert all_finite(truncated)
    assert truncated.latent.shape == (latent, d)
    before = projection(bases["latent"], latent)[0]
    query, output = (projection(bases[name], rank or d)[0] for name, rank in sketches.items())
    key_query, output_value = rebuilt(truncated)
    close(key_query, before.T @ weights.key.mT @ weights.query @ query)
    close(output_value, output @ weights.output @ weights.value @ before)


@given(SHAPES, KINDS, SEEDS, st.data())
def test_a_white_latent_loses_the_products_relative_losses(shape, kind, seed, data):
    """Without sketches: the dropped squares are the shares of W_q^T W_k and of W_o W_v of all heads, summed."""
    weights = attention(shape, kind, seed)
    rank = data.draw(st.integers(1, shape[2]), label="rank")
    bases = latent_bases(weights, AttentionGrams.white(weights))
    predicted = float(bases["latent"].singular_values[0, rank:].square().sum())
    query_key, output_value = products(weights)
    new_key_query, new_output_value = rebuilt(truncate_latent(weights, bases, latent=rank, query=None, output=None))
    losses = [share_lost(query_key.mT, new_key_query), share_lost(output_value, new_output_value)]
    assert predicted == pytest.approx(sum(losses), rel=0, abs=1e-7)


def share_lost(before: torch.Tensor, after: torch.Tensor) -> float:
    """Of the squared Frobenius norm, summed over the heads; 0 for a product that is zero."""
    total = float(energy(before).sum())
    return float(energy(before - after).sum()) / total if total > 0 else 0.0


@given(SHAPES, KINDS, SEEDS, st.data())
def test_white_sketches_are_the_svd_of_all_heads_products(shape, kind, seed, data):
    """The query's of all W_k^T W_q one above the other, the output's of all W_o W_v side by side."""
    d = shape[2]
    weights = attention(shape, kind, seed)
    rank = data.draw(st.integers(1, d), label="rank")
    bases = latent_bases(weights, AttentionGrams.white(weights))
    key_query, output_value = products(weights)[0].mT, products(weights)[1]
    with_query, unchanged_output = rebuilt(truncate_latent(weights, bases, latent=d, query=rank, output=None))
    unchanged_query, with_output = rebuilt(truncate_latent(weights, bases, latent=d, query=None, output=rank))
    for before, after, stacked, name in (
        (key_query, with_query, torch.cat([*key_query], dim=0), "query"),
        (output_value, with_output, torch.cat([*output_value], dim=1), "output"),
    ):
        lost = float(energy(before - after).sum())
        accuracy = 1e-8 * float(energy(before).sum())
        assert lost == pytest.approx(tail(stacked, rank), rel=0, abs=accuracy)
        dropped = float(bases[name].singular_values[0, rank:].square().sum())
        assert lost == pytest.approx(dropped, rel=0, abs=accuracy)
    assert share_lost(key_query, unchanged_query) < 1e-14
    assert share_lost(output_value, unchanged_output) < 1e-14


@given(SHAPES, KINDS, DATA, SEEDS)
def test_latent_at_full_rank_is_exact(shape, kind, on, seed):
    n, _, d = shape
    weights = attention(shape, kind, seed)
    grams = AttentionGrams.white(weights) if on == "white" else attention_grams(shape, on, seed)
    truncated = truncate_latent(weights, latent_bases(weights, grams), latent=d, query=d, output=d)
    assert truncated.latent.shape == truncated.query_sketch.shape == truncated.output_sketch.shape == (d, d)
    assert truncated.query.shape == truncated.output.shape == (n, d, d)
    query_key, output_value = products(weights)
    for before, after in zip((query_key.mT, output_value), rebuilt(truncated)):
        assert (energy(before - after).sqrt() <= 1e-12 * energy(before).sum().sqrt()).all()


def test_latent_is_shared_by_all_heads():
    """Heads that read the same two directions need a latent of two, however many they are."""
    basis = torch.randn(2, 10, dtype=torch.float64)
    mix = lambda: torch.randn(5, 4, 2, dtype=torch.float64) @ basis  # noqa: E731
    weights = AttentionWeights(torch.randn(5, 4, 10).double(), mix(), mix(), torch.randn(5, 10, 4).double())
    bases = latent_bases(weights, AttentionGrams.white(weights))
    truncated = truncate_latent(weights, bases, latent=2, query=None, output=None)
    assert share_lost(products(weights)[0].mT, rebuilt(truncated)[0]) < 1e-14
    assert share_lost(products(weights)[1], rebuilt(truncated)[1]) < 1e-14


# Thin factors


def product(factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """up @ down, or the whole matrix."""
    return factors[0] if len(factors) == 1 else factors[1] @ factors[0]


@given(FEED_FORWARD_SHAPES, DATA, SEEDS, st.data())
def test_thin_factors_are_the_projections_inserted(shape, on, seed, data):
    gates, width, d = shape
    weights = feed_forward(shape, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    if on == "white":
        grams = FeedForwardGrams.white(weights)
    else:
        grams = FeedForwardGrams(
            gram(d, 1, on, generator)[0],
            gram(d, gates, on, generator),
            gram(d, 1, on, generator)[0],
            gram(d, 1, on, generator)[0],
        )
    bases = thin_bases(grams)
    wi, wo = (data.draw(st.none() | st.integers(1, d), label=name) for name in ("wi", "wo"))
    inner, outer = truncate_thin(weights, bases, wi=wi, wo=wo)
    assert len(inner) == gates
    for i, factors in enumerate(inner):
        if wi is None:
            assert torch.equal(product(factors), weights.inner[i])
            continue
        assert [factor.shape for factor in factors] == [(wi, d), (width, wi)]
        close(product(factors), weights.inner[i] @ projection(bases["wi"], wi)[i])
    if wo is None:
        assert torch.equal(product(outer), weights.outer)
    else:
        assert [factor.shape for factor in outer] == [(wo, width), (d, wo)]
        close(product(outer), projection(bases["wo"], wo)[0] @ weights.outer)


@given(FEED_FORWARD_SHAPES, SEEDS, st.data())
def test_white_thin_factors_are_the_plain_truncations(shape, seed, data):
    """They lose what the matrix's own singular values say, and where these are apart they are its truncated SVD."""
    gates, _, d = shape
    weights = feed_forward(shape, seed)
    bases = thin_bases(FeedForwardGrams.white(weights))
    rank = data.draw(st.integers(1, d), label="rank")
    inner, outer = truncate_thin(weights, bases, wi=rank, wo=rank)
    for matrix, factors in ((weights.outer, outer), *zip(weights.inner, inner)):
        lost = float(energy(matrix - product(factors)))
        assert lost == pytest.approx(tail(matrix, rank), rel=0, abs=1e-8 * float(energy(matrix)))
        u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
        if rank >= len(s) or s[rank - 1] - s[rank] > 0.1 * s[0]:
            wanted = (u[:, :rank] * s[:rank]) @ vh[:rank]
            np.testing.assert_allclose(product(factors).numpy(), wanted, rtol=0, atol=1e-6 * s[0])
    for i in range(gates):
        wanted = np.linalg.svd(weights.inner[i].numpy(), compute_uv=False)
        found = bases["wi"].singular_values[i, : len(wanted)].numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7 * wanted[0])


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
    weights = attention(shape, "full", seed)
    bases = latent_bases(weights, AttentionGrams.white(weights))
    truncated = truncate_latent(weights, bases, latent=rank or d, query=query, output=output)
    linear = truncated.to_linear(torch.float64)
    assert ("query_sketch" in linear, "output_sketch" in linear) == (query is not None, output is not None)
    x, mixed = torch.randn(d).double(), torch.randn(n, rank or d).double()
    sketch = x if query is None else linear["query_sketch"] @ x
    head_queries = (linear["q"] @ sketch).unflatten(0, (n, -1))
    assert_close(head_queries, torch.stack([core @ sketch for core in truncated.query]))
    written = sum(core @ latent for core, latent in zip(truncated.output, mixed))
    assert_close(linear["o"] @ mixed.flatten(), written)


# The paper's own truncation


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
