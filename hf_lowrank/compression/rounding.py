"""Matrices as integers: how their numbers are rounded, and how many bits the numbers of each matrix get.

The numbers of a row are rounded one after the other, and those behind correct what rounding has done so far to the product with the
inputs that the data has: with U the upper root of the inverse of their Gram matrix, the error of number j goes into those behind it as
U_j / U_jj (GPTQ, arXiv 2210.17323). Most matrices bear 8 bits, many 4; which of them do is measured, as for ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..budget_solver import Options, allocate_budget
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.objectives import Batch, objective_of
from ..linear_algebra import product_over_rows
from ..models.modeling_lowrank_layers import is_matrix
from ..models.modeling_lowrank_quantized import GROUP, LARGEST_CODE, LARGEST_SHARE, dequantized, packed
from ..progress import progress
from .sensitivity import Blocks, Probes, affordable_tokens

__all__ = ["BITS", "Rounding", "bits_within", "grams_of_inputs", "rounded"]

BITS = {"int8": (8,), "int4": (4, 8)}  # the widths that a number may have, by what is asked for
TOLERANCE = 3e-4  # what all roundings together may add to the expected loss, as a share of it (of tokens, in nats)
DAMPING = 1e-2  # of the mean squared input: directions that the data hardly uses count this much
FLOAT_BITS = 32
LEAST_STEP = 1e-37  # of a row of zeros, whose codes are any
# The arithmetic that all measurements together may take, in multiplications: losses of roundings are many, and alike.
ARITHMETIC = 1e12
# Sizes of a step that are tried for a group of 4 bits, as shares of the one that reaches its largest number.
SHRINKS = torch.linspace(1.0, 0.65, 8)


# --- how a matrix is rounded -------------------------------------------------------------------------------------


def rounded(
    weight: torch.Tensor, gram: torch.Tensor | None, *, bits: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The tensors of a `QuantizedLinear` for a matrix.

    Args:
        weight: (out, in).
        gram: E[x x^T] of its inputs, (in, in), in any unit; None for white noise, with which every number goes to the nearest.
        bits: 8 or 4.
        dtype: Of the scales.
    """
    weight = weight.detach().float().clone()
    size, largest = weight.shape[1], LARGEST_CODE[bits]
    scales = weight.abs().amax(dim=1).to(dtype)
    root, importance = _inverse_root(gram, weight)
    codes = torch.empty_like(weight)
    shares = torch.ones(len(weight), -(-size // GROUP), device=weight.device)
    row = (scales.float()[:, None] / largest).clamp_min(LEAST_STEP)
    for first in range(0, size, GROUP):
        last = min(first + GROUP, size)
        step = row
        if bits == 4:
            share = _share(weight[:, first:last], row, importance[first:last])
            shares[:, first // GROUP] = share
            step = row * (share[:, None] / LARGEST_SHARE)
        codes[:, first:last], errors = _rounded_columns(
            weight[:, first:last], step, None if root is None else root[first:last, first:last], bits
        )
        if root is not None and last < size:
            weight[:, last:] -= errors @ root[first:last, last:]
    integers = codes.to(torch.int8)
    if bits == 8:
        return {"codes": integers, "scales": scales}
    return {"codes": packed(integers), "scales": scales, "shares": shares.to(torch.uint8)}


def _inverse_root(gram: torch.Tensor | None, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The upper root of the inverse of a damped Gram matrix, and its diagonal before that; of none no root, and ones."""
    size = weight.shape[1]
    if gram is None or not float(gram.trace()) > 0:
        return None, torch.ones(size, device=weight.device)
    gram = gram.to(weight.device).double()
    gram = gram / gram.diagonal().mean() + DAMPING * torch.eye(size, dtype=torch.float64, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float(), gram.diagonal().float()


def _share(weight: torch.Tensor, row: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Of a group (out, size) of 4 bits the scale of each row, in 255ths of that of the whole row, with the least error of those tried."""
    wanted = weight.abs().amax(dim=1, keepdim=True) / (LARGEST_CODE[4] * row)
    tried = (LARGEST_SHARE * wanted * SHRINKS.to(weight.device)).ceil().clamp(1, LARGEST_SHARE)  # (out, tries)
    steps = (row * tried / LARGEST_SHARE)[..., None]
    values = weight[:, None]
    errors = (_codes(values / steps, 4) * steps - values).square() @ importance
    return tried.gather(1, errors.argmin(dim=1, keepdim=True))[:, 0]


def _codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    largest = LARGEST_CODE[bits]
    return values.round().clamp(-largest - (bits == 4), largest)


def _rounded_columns(
    weight: torch.Tensor, step: torch.Tensor, root: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a few columns, and the error of each for those behind them."""
    if root is None:
        return _codes(weight / step, bits), torch.empty(0)
    weight, codes, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        column = weight[:, j : j + 1]
        code = _codes(column / step, bits)
        error = (column - code * step) / root[j, j]
        weight[:, j + 1 :] -= error * root[j, j + 1 :]
        codes[:, j : j + 1], errors[:, j : j + 1] = code, error
    return codes, errors


class Rounding:
    """The matrices of a model on their way to integers: each is rounded once, and stands for what it was rounded to from then on."""

    def __init__(self, model: PreTrainedModel, bits: Mapping[str, int], dtypes: Callable[[str], torch.dtype]) -> None:
        self.bits, self.dtypes = bits, dtypes
        self.modules = {model.get_submodule(name): name for name in bits}
        self.stored: dict[str, torch.Tensor] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return module in self.modules

    @torch.no_grad()
    def round(self, module: nn.Linear, gram: torch.Tensor | None) -> None:
        """Round one of the matrices, whose inputs have this Gram matrix."""
        name = self.modules[module]
        tensors = rounded(module.weight, gram, bits=self.bits[name], dtype=self.dtypes(f"{name}.weight"))
        module.weight.copy_(dequantized(tensors, module.in_features, torch.float32))
        self.stored |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    def round_the_rest(self) -> None:
        """Round the matrices that have not been, to the nearest."""
        for module, name in self.modules.items():
            if f"{name}.codes" not in self.stored:
                self.round(module, None)

    def weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of the model with integers in the place of the matrices."""
        return {
            name: one for name, one in weights.items() if name.removesuffix(".weight") not in self.bits
        } | self.stored


@contextmanager
def grams_of_inputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Sums of x x^T over the inputs of each of these modules, float64, while the block runs; those of padding count too."""
    sums: dict[nn.Module, torch.Tensor] = {}

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2)
        total = product_over_rows(rows, rows)
        sums[module] = sums[module] + total if module in sums else total

    handles = [module.register_forward_pre_hook(add) for module in modules]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


# --- how many bits each gets -------------------------------------------------------------------------------------


@torch.no_grad()
def bits_within(
    dense: DenseCheckpoint,
    model: PreTrainedModel,
    batches: Sequence[Batch],
    quantize: str,
    *,
    arithmetic: float = ARITHMETIC,
    show_progress: bool | None = None,
) -> tuple[dict[str, int], float]:
    """The bits of each matrix that becomes one of integers, by the name of its module: as few as the tolerance allows.

    What each costs is measured on probes, all others being in float; losses of small errors add up. Matrices outside of the layers
    have 8 bits, or stay as they are.

    Args:
        dense: What the model was made of.
        model: The low-rank model, in float32.
        batches: Those of the calibration.
        quantize: `"int8"` or `"int4"`.
        arithmetic: The multiplications that all measurements together may take.

    Returns:
        The bits, and what they all together are expected to add to the loss.
    """
    objective, blocks = objective_of(dense.config, dense.model_class), Blocks(model, dense.stacks)
    places = _matrices_by_place(model, blocks)
    starts = [before for (before, _), matrices in places.items() for _ in matrices for _ in BITS[quantize]]
    affordable = affordable_tokens(blocks, objective, batches[0], starts, arithmetic)
    probes = Probes(objective, blocks, model, batches, affordable)
    options: dict[str, Options] = {}
    for (before, is_inside), matrices in progress(places.items(), "Rounding", show_progress):
        modules = list(matrices.values())
        with grams_of_inputs(modules) as grams:
            probes.loss(before)
        for name, module in matrices.items():
            losses, weight = {FLOAT_BITS: 0.0}, module.weight.detach().clone()
            for bits in BITS[quantize] if is_inside else (8,):
                stored = rounded(weight, grams.get(module), bits=bits)
                module.weight.copy_(dequantized(stored, module.in_features))
                losses[bits] = max(0.0, probes.loss(before))
            module.weight.copy_(weight)
            # The budget is of the loss here, and what is to be small is the size.
            ways = dict(sorted(losses.items()))
            sizes = np.array(list(ways), float) * module.weight.numel()
            options[name] = Options(tuple(ways.items()), sizes, {"loss": np.array(list(ways.values()))})
    chosen = allocate_budget(options, {"loss": TOLERANCE})
    added = sum(loss for _, loss in chosen.values())
    return {name: bits for name, (bits, _) in chosen.items() if bits != FLOAT_BITS}, added


def _matrices_by_place(model: PreTrainedModel, blocks: Blocks) -> dict[tuple[int, bool], dict[str, nn.Linear]]:
    """The matrices that may become integers, by how many blocks run before them and whether they are in one themselves."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    places: dict[tuple[int, bool], dict[str, nn.Linear]] = defaultdict(dict)
    for name, module in model.named_modules():
        if not is_matrix(module) or f"{name}.weight" in tied:
            continue
        assert isinstance(module, nn.Linear)
        is_inside = any(name.startswith(f"{block}.") for block in blocks.names)
        places[blocks.before(name) if is_inside else 0, is_inside][name] = module
    return dict(sorted(places.items()))
