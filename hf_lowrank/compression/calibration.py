"""Calibration: what the data does inside a dense model, as one small Gram matrix for each activation and gradient.

One pass of the dense model over teacher-forced batches, forward and backward, sums E[a a^T] of the activations a at every
point where a projection may be inserted, and E[g g^T] of the loss's gradients g there (see `factorization`). The loss is
the cross-entropy of labels that are drawn from the model's own predictions, whose gradients are those of the Kullback-Leibler
divergence from the dense model to a slightly different one: E[g g^T] is the Fisher information.

That divergence is quadratic in small errors and grows much slower in large ones. Of a thousand series, one whose future is certain
can have three quarters of the sum of squared gradients, and ranks chosen for it are wasted; so at every point the gradient of a series is
clipped to the median norm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chronos import BaseChronosPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.dense import DenseCheckpoint, load_dense
from ..checkpoints.devices import quick_products
from ..checkpoints.objectives import Batch, Objective, objective_of
from ..checkpoints.rank_table import LayerName
from ..files import new_file
from ..linear_algebra import product_over_rows
from ..progress import progress
from .factorization import AttentionGrams, FeedForwardGrams

__all__ = ["Calibration", "calibrate"]

# Directions that the calibration data never used still count this much of an average one, so that a forecast of
# different data is not left to chance.
DAMPING = 1e-3
# The refit has so many batches for each that is measured: its least squares learn a few hundred series by heart, and a batch costs
# it no backward pass.
REFIT_BATCHES = 4
# Batches in a saved file, and the attributes that they are.
BATCH_GROUPS = {"batch": "batches", "held_out": "held_out"}
# The matrix of what all cross-attention reads.
ENCODER_OUTPUT = "encoder_output"


@lru_cache(maxsize=8)
def _triangle(size: int) -> torch.Tensor:
    """The flat indices of the upper triangle of a (size, size) matrix."""
    rows, columns = torch.triu_indices(size, size)
    return rows * size + columns


class GramSum:
    """A running sum of a a^T in float64, of which one triangle is kept.

    The products of a batch are made in the activations' own float32, whose rounding is far below the damping.
    """

    def __init__(self) -> None:
        self.packed: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """`rows` (m, size), or more leading dimensions."""
        rows = rows.detach().flatten(0, -2)
        size = rows.shape[-1]
        packed = product_over_rows(rows, rows).flatten()[_triangle(size).to(rows.device)].cpu()
        self.packed = packed if self.packed is None else self.packed.add_(packed)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of a packed triangle, damped."""
    size = int((8 * packed.numel() + 1) ** 0.5) // 2
    gram = torch.zeros(size * size, dtype=packed.dtype)
    gram[_triangle(size)] = packed
    gram = gram.view(size, size)
    gram = gram + gram.T - torch.diag(gram.diagonal())
    return gram + DAMPING * gram.trace() / size * torch.eye(size, dtype=gram.dtype)


@dataclass(frozen=True)
class Calibration:
    """The Gram matrices of a dense model on data, and the batches they were measured on.

    Attributes:
        grams: By name (`"cross.3.query_input"`), the packed upper triangle of a float64 matrix.
        batches: What the model read (of a T5 `input_ids`, `attention_mask` and, but for an encoder, `labels`): the batches that were
            measured, and behind them others of the same data, which the refit is fitted to as well.
        held_out: Batches of series, or of parts of them, that are in none of these.
        record: What the data was, the seed, and the numbers of series and tokens that were measured; saved in `config.compression`.
    """

    grams: Mapping[str, torch.Tensor]
    batches: tuple[Batch, ...]
    record: Mapping[str, Any]
    held_out: tuple[Batch, ...] = ()

    def attention(self, name: LayerName) -> AttentionGrams:
        """The matrices of an attention layer."""
        parts = {part: f"{name}.{part}" for part in AttentionGrams.__dataclass_fields__}
        if parts["key_input"] not in self.grams:  # self-attention, or one encoder for all cross-attention
            parts["key_input"] = ENCODER_OUTPUT if name.kind == "cross" else f"{name}.query_input"
        return AttentionGrams(**{part: self._gram(name, gram) for part, gram in parts.items()})

    def feed_forward(self, name: LayerName) -> FeedForwardGrams:
        """The matrices of a feed-forward layer."""
        parts = {part: self._gram(name, f"{name}.{part}") for part in ("inner_input", "output", "output_gradient")}
        inner = [gram for i in range(2) if (gram := f"{name}.inner_gradient.{i}") in self.grams]
        return FeedForwardGrams(inner_gradient=torch.stack([self._gram(name, gram) for gram in inner]), **parts)

    def _gram(self, layer: LayerName, name: str) -> torch.Tensor:
        if name not in self.grams:
            raise ValueError(f"calibration has no matrices of {layer}; measure it again with feed_forward=True.")
        return unpacked(self.grams[name])

    def check(self, dense: DenseCheckpoint) -> None:
        """Raise ValueError where this is the calibration of a model of another shape."""
        shape = _shape(dense)
        if self.record["shape"] != shape:
            raise ValueError(
                f"calibration must be of a model of the same shape: found {self.record['shape']}, the model has {shape}."
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        tensors = {f"gram.{name}": gram for name, gram in self.grams.items()}
        for group, attribute in BATCH_GROUPS.items():
            for i, batch in enumerate(getattr(self, attribute)):
                tensors |= {f"{group}.{i}.{name}": tensor.contiguous() for name, tensor in batch.items()}
        with new_file(path) as part:
            save_file(tensors, part, metadata={"calibration": json.dumps(dict(self.record))})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read what `save` wrote.

        Raises:
            OSError: There is no such file.
            ValueError: It is another file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"calibration: {path} is no file.")
        try:
            with safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {})["calibration"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"calibration: {path} must be a file that Calibration.save wrote ({error}).") from error
        batches: dict[str, dict[int, Batch]] = {group: {} for group in BATCH_GROUPS}
        grams = {}
        for name, tensor in tensors.items():
            group, rest = name.split(".", 1)
            if group == "gram":
                grams[rest] = tensor
            else:
                index, key = rest.split(".", 1)
                batches[group].setdefault(int(index), {})[key] = tensor
        found = {BATCH_GROUPS[group]: tuple(of[i] for i in sorted(of)) for group, of in batches.items()}
        return cls(grams, record=record, **found)


def _shape(dense: DenseCheckpoint) -> dict[str, Any]:
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "is_gated_act")
    sizes = {name: getattr(dense.config, name) for name in names if hasattr(dense.config, name)}
    shape: dict[str, Any] = {"class": dense.source_class.__name__, **sizes}
    if dense.lowrank is not None:  # heads have sizes of their own
        shape["ranks"] = {str(name): ranks.to_dict() for name, ranks in dense.whole_ranks.items()}
    return shape


def calibrate(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline | DenseCheckpoint,
    data: Any = "synthetic",
    *,
    num_batches: int = 32,
    num_refit_batches: int | None = None,
    num_held_out_batches: int = 0,
    feed_forward: bool = True,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Calibration:
    """Measure a model on data, once for any number of compressions.

    Args:
        model: As in `compress_pretrained`.
        data: `"synthetic"` (the mixture of `data.synthesis`, for Chronos checkpoints); series of the user's, as
            `read_series` takes them (arrays, tensors, a data frame, a dataset, a file), of which those of a Chronos-2 are mixed into
            groups; groups of the user's own, a `GroupedSeries`, of which other models read the targets alone; or batches of tokens: a
            list of dictionaries with `input_ids`, `attention_mask` and, but for an encoder, `labels`, which a text T5 needs.
        num_batches: Batches of about 2,048 tokens that are made from series and measured.
        num_refit_batches: Batches for the refit, at least those that are measured; by default four times as many. Of batches of tokens
            all are measured, and there are no others.
        num_held_out_batches: Batches of other series, for `compress_pretrained(max_loss=)`. Of the user's series or groups every fifth is held out,
            or, where there are fewer than ten, a fifth of their pieces; of batches of tokens every fifth.
        feed_forward: Measure the feed-forward layers too; without them it takes less time and memory.
        seed: Draws the windows, and the labels.
        show_progress: Show a progress bar; by default in a terminal or a notebook.

    Raises:
        ValueError: No data for this kind of model, no observed value, or a prediction that is not finite.
    """
    dense = model if isinstance(model, DenseCheckpoint) else load_dense(model)
    if not isinstance(num_batches, int) or num_batches < 1:
        raise ValueError(f"num_batches must be a positive integer, found {num_batches!r}.")
    if num_refit_batches is None:
        num_refit_batches = REFIT_BATCHES * num_batches
    if not isinstance(num_refit_batches, int) or num_refit_batches < num_batches:
        raise ValueError(
            f"num_refit_batches must be an integer of at least {num_batches}, found {num_refit_batches!r}."
        )
    objective = objective_of(dense.config, dense.model_class)
    if not isinstance(num_held_out_batches, int) or num_held_out_batches < 0:
        raise ValueError(f"num_held_out_batches must be an integer of at least 0, found {num_held_out_batches!r}.")
    batches, held_out, record = _batches(objective, data, num_refit_batches, num_held_out_batches, seed)
    measured = batches if _is_batches(data) else batches[:num_batches]
    collector = Collector(dense, objective, seed, feed_forward=feed_forward)
    # With gradients, whatever the caller has turned off.
    with quick_products(collector.model), torch.inference_mode(False), torch.enable_grad():
        for batch in progress(measured, "Calibrating", show_progress):
            collector.add(batch)
    record |= {
        "seed": seed,
        "num_series": sum(len(next(iter(batch.values()))) for batch in measured),
        "num_tokens": sum(int(objective.masks(batch)["encoder"].sum()) for batch in measured),
        "shape": _shape(dense),
    }
    return Calibration(collector.result(), tuple(batches), record, tuple(held_out))


def _batches(
    objective: Objective, data: Any, num_batches: int, num_held_out: int, seed: int
) -> tuple[list[Batch], list[Batch], dict[str, Any]]:
    if _is_batches(data):
        whole = [objective.complete(batch) for batch in data]
        held_out = whole[4::5] if num_held_out else []
        if num_held_out and not held_out:
            raise ValueError(
                f"calibration: {len(whole)} batches are too few to hold every fifth out; give five or more."
            )
        kept = [batch for i, batch in enumerate(whole) if not (num_held_out and i % 5 == 4)]
        return kept, held_out, {"data": "batches of the user's"}
    if not objective.has_own_data:
        found = repr(data) if isinstance(data, str) else f"a {type(data).__name__}"
        raise ValueError(
            f"calibration of a T5 without a chronos_config needs batches of tokens (a list of dictionaries with input_ids, "
            f"attention_mask and labels), found {found}."
        )
    return objective.batches_apart(data, num_batches, num_held_out, seed)


def _is_batches(data: Any) -> bool:
    """Whether these are batches of what the model reads, and no series with a target."""
    return (
        isinstance(data, (list, tuple))
        and len(data) > 0
        and isinstance(data[0], Mapping)
        and not {"input_ids", "context"}.isdisjoint(data[0])
    )


# --- collecting --------------------------------------------------------------------------------------------------


class Collector:
    """Hooks on a dense model of its own, and the sums."""

    def __init__(self, dense: DenseCheckpoint, objective: Objective, seed: int, *, feed_forward: bool = True) -> None:
        self.dense = dense
        self.objective = objective
        self.model = dense.float_model()
        self.generator = torch.Generator().manual_seed(seed)
        self.sums: dict[str, GramSum] = {}
        self.stacks: dict[str, str] = {}  # whose positions each activation has
        self.norms: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {"encoder": 0, "decoder": 0}
        self.num_rows = 0
        self.masks: dict[str, torch.Tensor] = {}
        for name, module in dense.layers:
            self._watch_attention(name, self.model.get_submodule(module))
        for name, module in dense.feed_forward_layers if feed_forward else ():
            self._watch_feed_forward(name, self.model.get_submodule(module))
        for stack in dense.stacks:  # gradients start here, for no weight has one
            block = self.model.get_submodule(stack).block[0]
            block.register_forward_pre_hook(_with_gradient, with_kwargs=True)

    def add(self, batch: Batch) -> None:
        self.masks = self.objective.masks(batch)
        predictions = self.objective.predict(self.model, batch)
        if not torch.isfinite(predictions).all():
            raise ValueError("calibration: the dense model's predictions are not finite on this data.")
        self.objective.surrogate(predictions, self.generator).backward()
        self.num_rows += len(predictions)
        for stack, mask in self.masks.items():
            self.counts[stack] += int(mask.sum())

    def result(self) -> dict[str, torch.Tensor]:
        """The packed matrices: means over tokens of activations, sums of gradients over twice the number of predictions.

        Raises:
            ValueError: An activation or a gradient is not finite.
        """
        scaled = {}
        for name, total in self.sums.items():
            scale = self.counts[self.stacks[name]] if name in self.stacks else 2 * self.num_rows
            assert total.packed is not None
            scaled[name] = total.packed / max(1, scale)
            if not torch.isfinite(scaled[name]).all():
                raise ValueError(f"calibration: {name} of the dense model is not finite on this data.")
        return scaled

    def _activation(self, layer: LayerName, point: str, values: torch.Tensor) -> None:
        name = point if point == ENCODER_OUTPUT else f"{layer}.{point}"
        self.stacks[name] = "encoder" if point == ENCODER_OUTPUT else self.dense.stack_of(layer.kind)
        values, mask = self._by_series(layer, values), self.masks[self.stacks[name]]
        self.sums.setdefault(name, GramSum()).add(values if mask.all() else values[mask.to(values.device)])

    def _by_series(self, layer: LayerName, values: torch.Tensor) -> torch.Tensor:
        """(batch, length, size): attention across series has the two axes the other way round."""
        return values.transpose(0, 1) if layer.kind in self.dense.family.across_series else values

    def _gradient(self, layer: LayerName, point: str, gradient: torch.Tensor) -> None:
        """`gradient` (batch, length, size), each series clipped to the median norm of all so far."""
        name, gradient = f"{layer}.{point}", self._by_series(layer, gradient)
        norms = gradient.flatten(1).norm(dim=1)
        seen = self.norms.setdefault(name, [])
        # Series that have no part in the loss have a gradient of rounding errors.
        seen.extend(norms[norms > 1e-6 * norms.max()].tolist())
        limit = float(np.median(seen)) if seen else 0.0
        clip = (limit / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)
        self.sums.setdefault(name, GramSum()).add(gradient * clip[:, None, None])

    def _watch(self, linear: nn.Module, layer: LayerName, *, point: str, side: str, gradient: str) -> None:
        """Sum up the activation at one side of a linear layer, and the gradient at its output."""

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self._activation(layer, point, inputs[0] if side == "input" else output)
            output.register_hook(lambda values: self._gradient(layer, gradient, values))

        linear.register_forward_hook(hook)

    def _watch_input(
        self, linears: tuple[nn.Module, ...], layer: LayerName, *, point: str | None, gradient: str
    ) -> None:
        """Sum up the input of linear layers that read the same, and the gradient that reaches it through them alone."""
        alias: list[torch.Tensor] = []

        def hook(linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            if linear is linears[0]:
                if point is not None:
                    self._activation(layer, point, inputs[0])
                alias[:] = [inputs[0].view_as(inputs[0])]
                alias[0].register_hook(lambda values: self._gradient(layer, gradient, values))
            seen = (alias[0],)
            if linear is linears[-1]:
                alias.clear()
            return seen

        for linear in linears:
            linear.register_forward_pre_hook(hook)

    def _watch_attention(self, name: LayerName, layer: Any) -> None:
        self._watch(layer.q, name, point="query_input", side="input", gradient="query_gradient")
        # What cross-attention reads is the same in all layers.
        shared = ENCODER_OUTPUT if name == LayerName("cross", 0) else None
        self._watch_input((layer.k, layer.v), name, point=shared, gradient="key_gradient")
        self._watch(layer.o, name, point="mixed", side="input", gradient="output_gradient")

    def _watch_feed_forward(self, name: LayerName, layer: Any) -> None:
        for i, inner in enumerate(self.dense.inner_names):
            point = "inner_input" if i == 0 else None
            self._watch_input((getattr(layer, inner),), name, point=point, gradient=f"inner_gradient.{i}")
        self._watch(layer.wo, name, point="output", side="output", gradient="output_gradient")


def _with_gradient(_: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
    """The arguments of a stack's first block, its hidden states as the start of a graph."""
    return (inputs[0].detach().requires_grad_(True), *inputs[1:]), keywords
