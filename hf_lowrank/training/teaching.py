"""What a compressed model is taught by the dense one it was made from, and how well it forecasts then, for each family.

The loss of a batch is (1 - w) L + w D: L what the student's forecast loses on the values that came, D what it would lose, on average,
if values followed the teacher's forecast, both beyond what cannot be helped.

- Chronos-T5: the mean over tokens of the cross-entropy of the labels, and of T^2 KL(q || p), where p and q are the softmax of the student's
  and of the teacher's logits / T. T^2 keeps the size of the gradient the same at every T ("Distilling the Knowledge in a Neural Network",
  arXiv 1503.02531, section 2).
- Chronos-Bolt and Chronos-2: the mean over series of the quantile loss as a share of the teacher's, and of the expected excess of the
  quantile loss as `checkpoints.objectives` has it, the measure that compression goes by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..checkpoints.families import T5, family_of
from ..checkpoints.objectives import Batch, PatchObjective, objective_of, quantile_loss
from ..checkpoints.pipelines import QUANTILE_LEVELS, as_pipeline, predict_quantiles, stable_seed
from ..data.tokens import IGNORED_LABEL

__all__ = ["QuantileTeaching", "Teaching", "TokenTeaching", "distillation_loss", "teaching_of"]

# Series whose forecasts a Chronos-T5 is scored by, in windows of this many.
SAMPLED_SERIES, SAMPLED_AT_ONCE = 128, 32
LEAST_SHARE = 1e-3  # of the spread of a context: a teacher is never held to be more certain


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, *, weight: float, temperature: float
) -> torch.Tensor:
    """The mean over tokens of (1 - w) CE(labels, p) + w T^2 KL(q || p), of a Chronos-T5.

    Args:
        student: Logits of shape (tokens, vocabulary).
        teacher: Logits of the same shape.
        labels: int64 of shape (tokens,).
        weight: w, in [0, 1].
        temperature: T, above 0.

    Returns:
        A scalar, in nats a token.
    """
    loss = student.new_zeros(())
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(student, labels)
    if weight > 0:
        p, q = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
        loss = loss + weight * temperature**2 * F.kl_div(p, q, log_target=True, reduction="batchmean")
    return loss


class Teaching:
    """The common part. `teacher` and every student share a configuration but for ranks; the teacher is in evaluation mode."""

    def __init__(self, teacher: PreTrainedModel, *, weight: float, temperature: float) -> None:
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature

    def loss(self, student: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of a batch as the model trains on it, a scalar."""
        raise NotImplementedError

    def wql(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], windows: Iterable[Any]) -> float:
        """The weighted quantile loss of a model's forecasts on held-out batches.

            sum of 2 pinball(y, q) over levels, series and steps / (number of levels * sum of |y|)

        Args:
            model: The student or the teacher.
            batches: As the model reads them.
            windows: What they were made of, `context` and `target` or lists `contexts` and `targets`; of a Chronos-2 not looked at.
        """
        raise NotImplementedError


class TokenTeaching(Teaching):
    """Of a Chronos-T5."""

    def loss(self, student: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        is_labelled = batch["labels"] != IGNORED_LABEL
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": self.teacher.prepare_decoder_input_ids_from_labels(batch["labels"]),
            "use_cache": False,
        }
        with torch.no_grad():
            theirs = self.teacher(**inputs).logits[is_labelled] if self.weight else None
        ours = student(**inputs).logits[is_labelled]
        return distillation_loss(
            ours,
            ours if theirs is None else theirs,
            batch["labels"][is_labelled],
            weight=self.weight,
            temperature=self.temperature,
        )

    def wql(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], windows: Iterable[Any]) -> float:
        """Of the sample paths of its pipeline, on the first `SAMPLED_SERIES` series; their random states are the same for every model."""
        pipeline, total = as_pipeline(model), np.zeros(2)
        pieces = list(islice((pair for window in windows for pair in _pieces(window)), SAMPLED_SERIES))
        horizon = model.config.chronos_config["prediction_length"]
        for first in range(0, len(pieces), SAMPLED_AT_ONCE):
            some = pieces[first : first + SAMPLED_AT_ONCE]
            target = torch.full((len(some), horizon), torch.nan, dtype=torch.float64)
            for row, (_, values) in enumerate(some):
                target[row, : len(values)] = torch.from_numpy(values)[:horizon]
            quantiles, _ = predict_quantiles(
                pipeline,
                [torch.from_numpy(context) for context, _ in some],
                horizon,
                QUANTILE_LEVELS,
                num_samples=model.config.chronos_config["num_samples"],
                seeds=[stable_seed(first + row) for row in range(len(some))],
            )
            found = torch.as_tensor(quantiles, dtype=torch.float64).transpose(1, 2)
            total += _sums(found, target, torch.tensor(QUANTILE_LEVELS, dtype=torch.float64))
        return float(total[0] / total[1])


def _pieces(window: Mapping[str, Any]) -> list[tuple[NDArray[np.floating], NDArray[np.floating]]]:
    """(context, target) of each series, without the padding of a context."""
    names = ("contexts", "targets") if "contexts" in window else ("context", "target")
    return [(np.array(context), np.array(target)) for context, target in zip(*(window[name] for name in names))]


class QuantileTeaching(Teaching):
    """Of a Chronos-Bolt or Chronos-2: series that are no targets are not looked at."""

    def __init__(self, teacher: PreTrainedModel, **options: Any) -> None:
        super().__init__(teacher, **options)
        objective = objective_of(teacher.config, type(teacher))
        assert isinstance(objective, PatchObjective)
        self.objective = objective

    def loss(self, student: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        target, rows = self._targets(batch)
        inputs = self._inputs(batch)
        with torch.no_grad():
            expected, values = (of[rows] for of in self.objective.quantiles(self.teacher, inputs))
        normalised, predicted = (of[rows] for of in self.objective.quantiles(student, inputs))
        loss = normalised.new_zeros(())
        if self.weight > 0:
            loss = loss + self.weight * self.objective.shares(expected, normalised).mean()
        if self.weight < 1:
            levels, spread = self.objective.levels.to(target.device), _spread(batch["context"][rows])
            theirs, ours, came = (of / spread[:, None, None] for of in (values, predicted, target[:, None]))
            least = quantile_loss(theirs, levels).mean(dim=(1, 2)).clamp_min(LEAST_SHARE)
            own = _pinball(theirs, came, levels).nanmean(dim=(1, 2))
            losses = _pinball(ours, came, levels).nanmean(dim=(1, 2))
            loss = loss + (1 - self.weight) * (losses / torch.maximum(own, least)).mean()
        return loss

    def wql(self, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], windows: Iterable[Any]) -> float:
        """Of the quantiles of one pass, at `QUANTILE_LEVELS`, or at the model's own levels where it lacks one of them."""
        levels, total = self.objective.levels.double(), np.zeros(2)
        usual = torch.tensor(QUANTILE_LEVELS, dtype=torch.float64)
        is_usual = torch.isclose(levels[:, None], usual, atol=1e-6).any(dim=1)
        if int(is_usual.sum()) < len(usual):
            is_usual[:] = True
        for batch in batches:
            target, rows = self._targets(batch)
            with torch.no_grad():
                predicted = self.objective.quantiles(model, self._inputs(batch))[1][rows]
            total += _sums(predicted[:, is_usual.to(predicted.device)].double(), target.double(), levels[is_usual])
        return float(total[0] / total[1])

    def _targets(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The values to forecast (series, steps) of the series that have any, and which of the rows these are."""
        target = batch["future_target" if "future_target" in batch else "target"]
        rows = ~target.isnan().all(dim=1)
        return target[rows], rows

    def _inputs(self, batch: Mapping[str, Any]) -> Batch:
        """What the model reads of a batch, for a forecast as long as the targets."""
        if "future_target" in batch and "future_covariates" not in batch:
            rows, steps = batch["future_target"].shape
            unknown = torch.full((rows, -(-steps // self.objective.patch) * self.objective.patch), torch.nan)
            batch = {**batch, "future_covariates": unknown}
        return self.objective.complete(batch)


def teaching_of(teacher: PreTrainedModel, *, weight: float, temperature: float) -> Teaching:
    """That of a Chronos model of this family.

    Raises:
        ValueError: `temperature` is not 1, and the model's forecasts are quantiles, which have none.
    """
    if family_of(type(teacher)) is T5:
        return TokenTeaching(teacher, weight=weight, temperature=temperature)
    if temperature != 1:
        raise ValueError(
            f"temperature is for a Chronos-T5, whose forecasts are probabilities of tokens; leave it out, found {temperature}."
        )
    return QuantileTeaching(teacher, weight=weight, temperature=temperature)


def _pinball(quantiles: torch.Tensor, values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """2 max(level (y - q), (level - 1) (y - q)) of quantiles (series, levels, at least steps) and values (series, 1, steps), NaN where missing."""
    apart = values - quantiles[..., : values.shape[-1]]
    levels = levels.to(apart)[:, None]
    return 2 * torch.maximum(levels * apart, (levels - 1) * apart)


def _sums(quantiles: torch.Tensor, target: torch.Tensor, levels: torch.Tensor) -> NDArray[np.float64]:
    """Of a forecast (series, levels, at least steps) and what came (series, steps): the sums that the weighted quantile loss is a ratio of."""
    losses = _pinball(quantiles, target[:, None], levels)
    return np.array([float(losses.nansum()) / len(levels), float(target.abs().nansum())])


def _spread(context: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each context (series, steps), 1 where it has none."""
    mean = context.nanmean(dim=1, keepdim=True)
    deviation = (context - mean).square().nanmean(dim=1).sqrt()
    return torch.where(deviation > 0, deviation, torch.ones_like(deviation))
