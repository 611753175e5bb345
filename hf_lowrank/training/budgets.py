"""Training a dense model so that it can be compressed: in many of its steps it is as small as one of several budgets makes it.

A step with a budget inserts the projections A_r B_r^T that `compress_pretrained` would merge into the weights, and the gradient goes through
them. What the directions that are cut off know is so learned by those that stay. One sampled size a step is how slimmable and elastic
networks are trained ("Slimmable Neural Networks", arXiv 1812.08928; "MatFormer", arXiv 2310.07707); here the sizes are nested in bases that
balanced truncation finds, made anew as the model changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback

from ..compression.compress import projections_within
from ..compression.layers import Projection
from ..compression.sensitivity import inserted
from .runs import checkpoint_file

__all__ = ["CALIBRATION", "BudgetSteps"]

FILE = "budgets.safetensors"
# Of each calibration, less than in a compression: in a training many of them even out.
CALIBRATION: dict[str, Any] = {"num_batches": 12, "arithmetic": 1e10, "multiple_of": 2}


class BudgetSteps(TrainerCallback):
    """Has a share of the steps, drawn by `seed`, run with the projections of one of the budgets inserted, each budget as often.

    The projections are made anew every `renewal` steps, and are in the Trainer's checkpoints too. Like `WeightAverage`, it must hear of a
    step after those callbacks that ask for a checkpoint.

    Args:
        model: The dense model that is trained.
        budgets: The `total_ratio` of each.
        share: Of the steps.
        start: The first step that may have a budget.
        renewal: Steps from one calibration to the next.
        seed: Of the draws and of the calibrations' series.
    """

    def __init__(
        self, model: PreTrainedModel, budgets: Sequence[float], *, share: float, start: int, renewal: int, seed: int
    ) -> None:
        self.model = model
        self.budgets = tuple(budgets)
        self.share, self.start, self.renewal, self.seed = share, start, renewal, seed
        self.projections: dict[float, list[Projection]] = {}
        self._inserted = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.start:
            self.projections = _load(checkpoint_file(args, state, FILE), self.model.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        since = state.global_step - self.start
        if since < 0:
            return
        if since % self.renewal == 0:
            self.renew(state.global_step)
        rng = np.random.default_rng([self.seed, 5, state.global_step + 1])
        if rng.random() < self.share:
            self._inserted.enter_context(self.within(self.budgets[rng.integers(len(self.budgets))]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._inserted.close()
        if control.should_save and self.projections and state.is_world_process_zero:
            _save(self.projections, checkpoint_file(args, state, FILE))

    def renew(self, step: int) -> None:
        """Make the projections of the model as it is now."""
        was_training = self.model.training
        self.projections = projections_within(self.model, self.budgets, seed=self.seed + step, **CALIBRATION)
        self.model.train(was_training)

    @contextmanager
    def within(self, budget: float) -> Iterator[None]:
        """The model as small as this budget makes it, for as long as the block runs."""
        with ExitStack() as stack:
            for projection in self.projections[budget]:
                stack.enter_context(inserted(self.model, projection))
            yield


def _save(projections: Mapping[float, Sequence[Projection]], path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    places: list[tuple[float, tuple[str, ...], str]] = []
    for budget, ones in projections.items():
        for one in ones:
            name = str(len(places))
            tensors |= {f"{name}.left": one.left.contiguous(), f"{name}.right": one.right.contiguous()}
            places.append((budget, one.modules, one.side))
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"places": json.dumps(places)})


def _load(path: Path, device: torch.device) -> dict[float, list[Projection]]:
    projections: dict[float, list[Projection]] = {}
    with safe_open(path, "pt", device=str(device)) as file:
        for index, (budget, modules, side) in enumerate(json.loads(file.metadata()["places"])):
            left, right = (file.get_tensor(f"{index}.{name}") for name in ("left", "right"))
            projections.setdefault(budget, []).append(Projection(tuple(modules), side, left, right))
    return projections
