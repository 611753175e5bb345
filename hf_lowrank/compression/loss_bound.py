"""The smallest model that loses at most so much: a search over budgets, each measured on series that are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.objectives import Batch, objective_of

__all__ = [
    "FIRST_RATIO",
    "FIRST_SPEEDUP",
    "HELD_OUT_BATCHES",
    "STEP",
    "Found",
    "HeldOut",
    "MeasuredLoss",
    "smallest_within",
]

# Where a search begins, and where components are measured: the share of what attention and feed-forward have, and how many times as fast.
FIRST_RATIO, FIRST_SPEEDUP = 0.25, 2.0
STEP, CLOSE = 1.7, 1.08  # between budgets until one is too small, and from then on
CONFIDENCE, RESAMPLES = 0.95, 2000
HELD_OUT_BATCHES = 32
ARITHMETIC = 3e12  # of one measurement, in multiplications

Model = TypeVar("Model")


@dataclass(frozen=True)
class MeasuredLoss:
    """What a model of a budget adds to the expected loss of the dense one's forecasts, as a share, on series that are held out.

    Attributes:
        total_ratio: The share of attention and feed-forward parameters: the budget, or what was kept for a speed-up.
        loss: The mean over series.
        bound: What the mean over all series like these is below with 95 % confidence.
        series: How many there were.
        speedup: The budget, where it was one: how many times as fast a forecast was to be.
    """

    total_ratio: float
    loss: float
    bound: float
    series: int
    speedup: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For programs: what there is."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class HeldOut:
    """Series that a model was not calibrated on, and what the dense model predicts of them.

    Args:
        dense: The model.
        model: It in float32, as `dense.float_model()` makes it.
        batches: The series.
        seed: Of the resampling.
    """

    def __init__(self, dense: DenseCheckpoint, model: PreTrainedModel, batches: Sequence[Batch], *, seed: int) -> None:
        self.objective, self.seed = objective_of(dense.config, dense.model_class), seed
        self.batches = self.objective.first_batches(batches, ARITHMETIC / model.num_parameters())
        self.wanted = self._predictions(model)

    @torch.no_grad()
    def _predictions(self, model: PreTrainedModel) -> list[torch.Tensor]:
        return [self.objective.predict(model, batch) for batch in self.batches]

    def measured(self, model: PreTrainedModel, total_ratio: float) -> MeasuredLoss:
        """A model of this budget, in any dtype."""
        found = [one.float() for one in self._predictions(model)]
        losses = torch.cat([self.objective.excess(*of) for of in zip(self.wanted, found, self.batches)]).cpu().numpy()
        return MeasuredLoss(total_ratio, float(losses.mean()), _bound(losses, self.seed), len(losses))


def _bound(losses: NDArray[np.float64], seed: int) -> float:
    """The upper end of a one-sided interval of the mean, by resampling (the percentile method)."""
    rng = np.random.default_rng([seed, len(losses)])
    counts = rng.multinomial(len(losses), np.full(len(losses), 1 / len(losses)), size=RESAMPLES)
    return float(np.quantile(counts @ losses / len(losses), CONFIDENCE))


@dataclass(frozen=True)
class Found(Generic[Model]):
    """The smallest model within a bound, or None, and all that was tried, in the order of budgets."""

    model: Model | None
    measured: MeasuredLoss | None
    tried: tuple[MeasuredLoss, ...]


def smallest_within(
    max_loss: float,
    bounds: tuple[float, float],
    build: Callable[[float], Model],
    measure: Callable[[Model, float], MeasuredLoss],
    *,
    first: float = FIRST_RATIO,
) -> Found[Model]:
    """Search the smallest budget with a bound of at most `max_loss`: from one side until there is one on the other, then between them.

    Losses are taken to fall as budgets grow. A tenth of a budget more or less is not searched for.

    Args:
        max_loss: What a model may add to the expected loss.
        bounds: The smallest and the largest budget that there are.
        build: A model of a budget.
        measure: The loss of a model of a budget.
        first: The budget to begin with.
    """
    tried: dict[float, MeasuredLoss] = {}
    best, chosen = None, None
    good, bad = math.inf, 0.0  # the smallest budget that keeps the bound, the largest that does not
    least, largest = bounds
    budget = max(first, least)
    while True:
        model = build(budget)
        tried[budget] = measure(model, budget)
        if tried[budget].bound <= max_loss:
            best, chosen, good = model, tried[budget], budget
        else:
            bad = budget
        if bad == largest or good <= least or good / max(bad, 1e-9) <= CLOSE:
            break
        if bad == 0:
            budget = max(good / STEP, least)
        elif good == math.inf:
            budget = min(bad * STEP, largest)
        else:
            budget = math.sqrt(good * bad)
    return Found(best, chosen, tuple(tried[budget] for budget in sorted(tried)))
