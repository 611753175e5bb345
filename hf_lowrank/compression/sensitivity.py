"""What a component's truncation costs the whole model, measured by inserting its projection into the dense model alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.objectives import Batch, Objective, objective_of
from ..checkpoints.rank_table import ComponentName, LayerName, LayerRanks
from ..progress import progress
from .allocation import Component
from .layers import Layer, Projection

__all__ = ["Blocks", "Probes", "affordable_tokens", "inserted", "measured_losses", "reweighted", "skipped"]

# The arithmetic that all measurements together may take, in multiplications, and the bounds of the tokens that it buys.
PROBE_ARITHMETIC, TOKENS = 3e12, (1024, 8192)


@contextmanager
def inserted(model: PreTrainedModel, projection: Projection) -> Iterator[None]:
    """The model with the projection of one component inserted, for as long as the block runs."""
    left, right = (factor.to(model.device) for factor in (projection.left, projection.right))

    def project(values: torch.Tensor, group: int | None) -> torch.Tensor:
        if group is not None:
            return values @ right[group] @ left[group].T
        by_group = values.unflatten(-1, (len(left), -1)).unsqueeze(-2)  # (..., n, 1, h)
        return (by_group @ right @ left.mT).squeeze(-2).flatten(-2)

    handles = []
    for i, name in enumerate(projection.modules):
        # One group for all modules, one for each, or all groups in the features of one.
        group = 0 if len(left) == 1 else i if len(projection.modules) > 1 else None
        linear = model.get_submodule(name)
        if projection.side == "input":
            handles.append(
                linear.register_forward_pre_hook(lambda _, inputs, group=group: (project(inputs[0], group),))
            )
        else:
            handles.append(linear.register_forward_hook(lambda _, __, output, group=group: project(output, group)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Blocks:
    """The blocks of a model in the order in which they run, and what each of them answers in one forward pass."""

    def __init__(self, model: PreTrainedModel, stacks: Sequence[str]) -> None:
        self.names = [f"{stack}.block.{i}" for stack in stacks for i in range(len(model.get_submodule(stack).block))]
        self.modules = [model.get_submodule(name) for name in self.names]

    def before(self, module: str) -> int:
        """How many blocks run before the one that the module of this name is in."""
        return next(i for i, name in enumerate(self.names) if module.startswith(f"{name}."))

    @contextmanager
    def recorded(self) -> Iterator[list[Any]]:
        """Collects the answers of all blocks while the block runs."""
        answers: list[Any] = []
        handles = [block.register_forward_hook(lambda _, __, answer: answers.append(answer)) for block in self.modules]
        try:
            yield answers
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def skipped(blocks: Sequence[nn.Module], answers: Sequence[Any]) -> Iterator[None]:
    """The blocks give these answers, without any work, for as long as the block runs."""
    for block, answer in zip(blocks, answers):
        block.forward = lambda *_, answer=answer, **__: answer
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _arithmetic(blocks: Blocks, objective: Objective, batch: Batch, starts: Sequence[int]) -> float:
    """The multiplications of one run of a batch from each of these blocks on, in all."""
    tokens = {stack: mask.numel() for stack, mask in objective.masks(batch).items()}
    each = [
        tokens[name.split(".")[0]] * sum(parameter.numel() for parameter in block.parameters())
        for name, block in zip(blocks.names, blocks.modules)
    ]
    behind = np.append(np.cumsum(each[::-1])[::-1], 0.0)
    return float(behind[list(starts)].sum())


def affordable_tokens(
    blocks: Blocks, objective: Objective, batch: Batch, starts: Sequence[int], arithmetic: float
) -> int:
    """The tokens that the arithmetic buys for one run from each of these blocks on."""
    return int(arithmetic * objective.num_tokens(batch) / max(1.0, _arithmetic(blocks, objective, batch, starts)))


def _probes(objective: Objective, batches: Sequence[Batch], num_tokens: int) -> list[Batch]:
    """The first series of the batches, so many tokens of them; of short contexts where that is less than a batch."""
    tokens, left = objective.num_tokens(batches[0]), int(np.clip(num_tokens, *TOKENS))
    # Many series say more than long ones.
    is_short = left < tokens
    probes: list[Batch] = []
    for batch in batches:
        batch = objective.cut(batch, len(next(iter(batch.values()))), short=is_short)
        size = len(next(iter(batch.values())))
        rows = min(size, max(1, left * size // objective.num_tokens(batch)))
        probes.append(objective.cut(batch, rows, short=False))
        left -= objective.num_tokens(probes[-1])
        if left <= 0:
            break
    return probes


class Probes:
    """Series on which a model is compared with itself as it was: what it predicted, and what its blocks answered.

    Args:
        num_tokens: How many of the batches' tokens are taken, within bounds.
    """

    def __init__(
        self, objective: Objective, blocks: Blocks, model: PreTrainedModel, batches: Sequence[Batch], num_tokens: int
    ) -> None:
        self.objective, self.blocks, self.model = objective, blocks, model
        self.batches = _probes(objective, batches, num_tokens)
        self.answers, self.wanted = [], []
        for batch in self.batches:
            with blocks.recorded() as recorded:
                self.wanted.append(objective.predict(model, batch))
            self.answers.append(recorded)

    def loss(self, before: int) -> float:
        """What the model as it is now adds to the expected loss; its first `before` blocks are as they were, and are not run again."""
        total = 0.0
        for batch, recorded, reference in zip(self.batches, self.answers, self.wanted):
            with skipped(self.blocks.modules[:before], recorded):
                total += self.objective.divergence(reference, self.objective.predict(self.model, batch))
        return total / sum(map(len, self.wanted))


@torch.no_grad()
def measured_losses(
    dense: DenseCheckpoint,
    model: PreTrainedModel,
    layers: Sequence[Layer],
    table: Mapping[LayerName, LayerRanks],
    batches: Sequence[Batch],
    components: Mapping[ComponentName, Component],
    *,
    arithmetic: float = PROBE_ARITHMETIC,
    show_progress: bool | None = None,
) -> dict[ComponentName, float]:
    """The loss of each component at its rank in the table, truncated alone, as `objective` measures it for the family.

    Where there are too many of them for the arithmetic, those of a layer are truncated together, and the loss is divided among them
    as `components` predict. `model` is `dense.float_model()`; blocks before the truncated one are not run again.
    """
    objective, blocks = objective_of(dense.config, dense.model_class), Blocks(model, dense.stacks)
    truncated = {layer.name: list(layer.truncated(table[layer.name]).items()) for layer in layers}
    work = [(layer, [change]) for layer in layers for change in truncated[layer.name]]

    def tokens() -> int:
        starts = [blocks.before(layer.module) for layer, _ in work]
        return affordable_tokens(blocks, objective, batches[0], starts, arithmetic)

    affordable = tokens()
    if affordable < TOKENS[0]:
        work = [(layer, truncated[layer.name]) for layer in layers if truncated[layer.name]]
        affordable = tokens()
    probes = Probes(objective, blocks, model, batches, affordable)
    losses = {}
    for layer, changes in progress(work, "Measuring sensitivity", show_progress):
        with ExitStack() as stack:
            for name, rank in changes:
                stack.enter_context(inserted(model, layer.points()[name.part].projection(rank)))
            total = probes.loss(blocks.before(layer.module))
        predicted = {name: components[name].loss[rank] for name, rank in changes}
        whole = sum(predicted.values())
        for name, loss in predicted.items():
            losses[name] = total * (float(loss / whole) if whole > 0 else 1 / len(predicted))
    return losses


def reweighted(
    components: Mapping[ComponentName, Component],
    ranks: Mapping[ComponentName, int],
    measured: Mapping[ComponentName, float],
) -> dict[ComponentName, Component]:
    """The components, each weighted so that its loss at the rank measured is the measured one.

    What was not measured, or has nothing to lose at that rank, is scaled as the median of the components of its part, or of
    all.
    """
    factors = {
        name: loss / components[name].loss[ranks[name]]
        for name, loss in measured.items()
        if components[name].loss[ranks[name]] > 1e-9 * components[name].weight and loss > 0
    }

    def usual(part: str) -> float:
        alike = [factor for name, factor in factors.items() if name.part == part]
        return float(np.median(alike or list(factors.values()) or [1.0]))

    return {
        name: replace(component, weight=component.weight * factors.get(name, usual(name.part)))
        for name, component in components.items()
    }
