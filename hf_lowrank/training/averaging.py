"""The mean of a model's weights over the last steps of its training, which is better than the last of them alone.

"Averaging Weights Leads to Wider Optima and Better Generalization" (arXiv 1803.05407); here over every step, as the learning rate falls.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from .runs import checkpoint_file

__all__ = ["WeightAverage"]

FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps the mean of the weights after each of the last `num_steps` steps, in the Trainer's checkpoints too.

    It must hear of a step after those callbacks that ask for a checkpoint: the mean goes into the checkpoint's folder before Trainer
    completes it, so that no whole checkpoint lacks it.
    """

    def __init__(self, model: nn.Module, num_steps: int) -> None:
        self.num_steps = num_steps
        self.weights = dict(model.named_parameters())
        self.means: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._count(state) > 0:
            self.means = load_file(checkpoint_file(args, state, FILE), device=str(args.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (count := self._count(state)) < 1:
            return
        for name, weight in self.weights.items():
            mean = self.means.setdefault(name, weight.detach().clone())
            mean.lerp_(weight.detach(), 1 / count)
        if control.should_save and state.is_world_process_zero:
            path = checkpoint_file(args, state, FILE)
            path.parent.mkdir(exist_ok=True)
            save_file(self.means, path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            for name, mean in self.means.items():
                self.weights[name].data.copy_(mean)

    def _count(self, state: Any) -> int:
        """How many steps the mean is of after this one."""
        return int(state.global_step - state.max_steps + self.num_steps)
