"""Hard matrices: what comes out is finite and as good as the best approximation, or an error that names the layer."""

from __future__ import annotations

import copy
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_lowrank import calibrate, compress_pretrained
from hf_lowrank.budget_solver import Options, allocate_budget
from hf_lowrank.compression.allocation import (
    Component,
    allocate_energy,
    allocate_epsilon,
    allocate_epsilon_at_ratio,
    allocate_uniform,
)
from hf_lowrank.compression.factorization import balanced_basis, pair_basis, truncate_matrix

SIZE = 8
LARGEST_HALF = torch.finfo(torch.float16).max


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    )[0]


def with_spectrum(values: list[float], seed: int) -> torch.Tensor:
    return orthogonal(SIZE, seed) * torch.tensor(values, dtype=torch.float64) @ orthogonal(SIZE, seed + 1)


def hard(kind: str, seed: int) -> torch.Tensor:
    """A square matrix of `SIZE`, float64."""
    noise = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return {
        "ordinary": noise,
        "rank one": with_spectrum([3.0] + 7 * [0.0], seed),
        "rank three": with_spectrum([3.0, 2.0, 1.0] + 5 * [0.0], seed),
        "condition 1e18": with_spectrum(np.geomspace(1, 1e-18, SIZE).tolist(), seed),
        "one far above": with_spectrum([1e9] + 7 * [1.0], seed),
        "repeated": with_spectrum(4 * [2.0] + 4 * [1.0], seed),
        "nearly repeated": with_spectrum((1 + 1e-15 * np.arange(SIZE, 0, -1)).tolist(), seed),
        "zeros": torch.zeros(SIZE, SIZE, dtype=torch.float64),
        "constant": torch.full((SIZE, SIZE), 0.7, dtype=torch.float64),
        "one row": noise * (torch.arange(SIZE) == 2)[:, None],
        "one entry": noise * ((torch.arange(SIZE) == 2)[:, None] & (torch.arange(SIZE) == 5)),
        "norm 1e9": 1e9 * noise,  # its Gram matrix has norm 1e18
        "norm 1e30": 1e30 * noise,
        "norm 1e100": 1e100 * noise,
        "norm 1e-30": 1e-30 * noise,
        "norm 1e-150": 1e-150 * noise,  # its Gram matrix has norm 1e-300
        "denormals": 1e-160 * noise,  # its Gram matrix is of denormals
        "half precision's largest": (LARGEST_HALF * noise.clamp(-1, 1)).half().double(),
        "rows of all sizes": torch.logspace(-12, 12, SIZE, dtype=torch.float64)[:, None] * noise,
    }[kind]


KINDS = (
    "ordinary", "rank one", "rank three", "condition 1e18", "one far above", "repeated", "nearly repeated", "zeros", "constant",
    "one row", "one entry", "norm 1e9", "norm 1e30", "norm 1e100", "norm 1e-30", "norm 1e-150", "denormals",
    "half precision's largest", "rows of all sizes",
)  # fmt: skip
QUICK = ("rank three", "norm 1e9", "norm 1e-150")


def scaled(matrix: torch.Tensor) -> torch.Tensor:
    largest = matrix.abs().max()
    return matrix / largest if largest > 0 else matrix


def misses(kinds: tuple[str, str], seed: int) -> list[str]:
    """What is wrong with the balanced truncation for these roots of both Gram matrices, at every rank."""
    x, y = hard(kinds[0], seed), hard(kinds[1], seed + 10)
    basis = balanced_basis((x @ x.T)[None], (y @ y.T)[None])
    if not all(torch.isfinite(part).all() for part in (basis.singular_values, basis.left, basis.right)):
        return ["not finite"]
    a, b = scaled(x), scaled(y)
    values = torch.linalg.svdvals(a.T @ b)
    wrong = []
    relative = basis.singular_values[0] / (basis.singular_values[0, 0] or 1)
    digits = 1e-2 if "denormals" in kinds else 1e-6  # a Gram matrix of denormals has two or three digits
    if not torch.allclose(relative, values / (values[0] or 1), atol=digits):
        wrong.append(f"singular values {relative.tolist()}, not {(values / values[0]).tolist()}")
    for rank in range(1, SIZE):
        left, right = (part[0] for part in basis.truncate(rank))
        lost = torch.linalg.norm(a.T @ b - (a.T @ left) @ (right.T @ b))
        best = torch.linalg.norm(values[rank:])
        if not lost <= best + digits * values[0]:
            wrong.append(
                f"rank {rank} loses {lost / values[0]:.3g} of the largest singular value, not {best / values[0]:.3g}"
            )
    return wrong


@pytest.mark.parametrize(
    "first", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.fuzz) for kind in KINDS]
)
def test_balanced_truncation_is_the_best_approximation(first):
    assert {second: wrong for second in KINDS if (wrong := misses((first, second), 0))} == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_truncated_matrix_is_the_best_approximation(dtype):
    """But for what float16 cannot hold, an error of the whole compression."""
    wrong = {}
    for kind, rank in product(KINDS, (1, 3, 7)):
        weight = hard(kind, 3).to(dtype)
        if not torch.isfinite(weight).all():
            continue  # it is refused when it is loaded
        lowrank = truncate_matrix(weight, rank)
        if not torch.isfinite(lowrank).all():
            if not (dtype == torch.float16 and ("norm" in kind or "largest" in kind or "rows" in kind)):
                wrong[kind, rank] = "not finite"
            continue
        size = weight.double().abs().max() or 1
        exact, found = weight.double() / size, lowrank.double() / size
        values = torch.linalg.svdvals(exact)
        tolerance = 100 * max(torch.finfo(dtype).eps, 1e-14) * values[0]
        smallest = SIZE * torch.finfo(dtype).tiny / size  # what the dtype cannot say
        if not torch.linalg.norm(exact - found) <= torch.linalg.norm(values[rank:]) + tolerance + smallest:
            wrong[kind, rank] = float(torch.linalg.norm(exact - found) / values[0])
    assert wrong == {}


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_frequencies_are_all_kept_once(kind):
    x, y = hard(kind, 1), hard("ordinary", 2)
    for gradient, activation in ((x, y), (y, x), (x, x)):
        basis = pair_basis((gradient @ gradient.T)[None], (activation @ activation.T)[None])
        assert torch.isfinite(basis.singular_values).all()
        assert basis.order[0].sort().values.tolist() == list(range(SIZE // 2))


SPECTRA = arrays(np.float64, (2, 6), elements=st.floats(0, 1e300)).map(lambda values: -np.sort(-values, axis=1))


@given(st.lists(SPECTRA, min_size=1, max_size=3), st.floats(0, 1), st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]))
def test_every_rule_gives_ranks_for_every_spectrum(spectra, share, weight):
    components = [Component(i, values, weight) for i, values in enumerate(spectra)]
    for component in components:
        assert np.isfinite(component.loss).all()
        assert (np.diff(component.loss) <= 0).all()
        assert component.loss[-1] == 0
    answers = [allocate_uniform(components, 3), allocate_epsilon(components, share)]
    answers.append(allocate_energy(components, min(share, 0.99)))
    least = allocate_epsilon(components, 1.0)
    if sum(least.values()) <= share * 6 * len(components):
        answers.append(allocate_epsilon_at_ratio(components, share))
    for ranks in answers:
        assert all(1 <= ranks[component.name] <= 6 for component in components)


@given(
    st.lists(st.lists(st.floats(0, 1e300), min_size=2, max_size=5), min_size=1, max_size=4),
    st.floats(0.3, 1),
)
def test_a_budget_is_kept_whatever_the_losses(losses, share):
    layers = {
        i: Options(
            tuple(range(len(loss))),
            np.array(sorted(loss)),
            {"parameters": np.linspace(1, 0.3, len(loss)) * 1000},
        )
        for i, loss in enumerate(losses)
    }
    budget = share * 1000 * len(layers)
    chosen = allocate_budget(layers, {"parameters": budget})
    assert sum(layers[i].costs["parameters"][entry] for i, entry in chosen.items()) <= budget * (1 + 1e-9)
    if share == 1:
        assert all(layers[i].loss[entry] == layers[i].loss[0] for i, entry in chosen.items())


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=2, max_size=4), st.floats(0.4, 1)
)
def test_ranks_depend_on_the_ratios_of_losses_alone(losses, share):
    def chosen(scale: float) -> dict[int, int]:
        costs = {"parameters": np.array([1.0, 0.8, 0.5, 0.3])}
        layers = {
            i: Options((0, 1, 2, 3), scale * np.array(sorted(loss)), dict(costs)) for i, loss in enumerate(losses)
        }
        return allocate_budget(layers, {"parameters": share * len(losses)})

    assert chosen(2.0**130) == chosen(1.0) == chosen(2.0**-130)


# --- whole compressions ------------------------------------------------------------------------------------------

PLACES = {
    "queries and keys": ("decoder.block.0.layer.1.EncDecAttention", "qk"),
    "values and output": ("decoder.block.0.layer.1.EncDecAttention", "vo"),
    "an attention": ("encoder.block.0.layer.0.SelfAttention", "qkvo"),
    "a feed-forward layer": ("encoder.block.0.layer.1.DenseReluDense", ("wi", "wo")),
}
RULES = (
    {"uniform": 2, "form": "per_head", "calibration": None},
    {"uniform": 3, "method": "paper"},
    {"ratio": 0.5, "calibration": None},
    {"uniform": 3, "form": "latent"},
    {"total_ratio": 0.6},
)


def not_sound(dense, kind: str, place: str, dtype: torch.dtype) -> dict[int, str]:
    """The rules by which a model with such a layer becomes one that is not finite, or an error that does not name a layer or weight."""
    module, parts = PLACES[place]
    model, wrong = copy.deepcopy(dense).to(dtype), {}
    for i, part in enumerate(parts):
        weight = model.get_submodule(f"{module}.{part}").weight
        rows, columns = weight.shape
        with torch.no_grad():
            weight.copy_(torch.kron(torch.ones(rows // SIZE, columns // SIZE, dtype=torch.float64), hard(kind, i)))
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        return {}  # it is refused when it is loaded
    measured = []
    for number, rule in enumerate(RULES):
        try:
            if "calibration" not in rule and "method" not in rule:
                measured = measured or [calibrate(model, num_batches=1)]
                rule = rule | {"calibration": measured[0]}
            compressed = compress_pretrained(model, **rule)
            if bad := [name for name, weight in compressed.state_dict().items() if not torch.isfinite(weight).all()]:
                wrong[number] = f"{bad} are not finite"
        except ValueError as error:
            is_clear = re.search(
                r"(compressed|the weight) (en|de)coder\.\S+ .*(has values that|square is infinite)|not finite",
                str(error),
            )
            if not (is_clear and ("norm" in kind or "largest" in kind or "rows" in kind)):
                wrong[number] = str(error)
        except RuntimeError as error:
            wrong[number] = repr(error)
    return wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "rank one" else pytest.mark.fuzz) for kind in KINDS]
)
def test_a_whole_compression_is_finite_or_names_what_is_not(chronos_t5, kind, place):
    torch.set_num_threads(1)
    for dtype in (torch.float16, torch.float32):
        assert not_sound(chronos_t5, kind, place, dtype) == {}, dtype
