"""What a calibration batch is for each family of models, what the model predicts for it, and what an error costs.

Three kinds of prediction are compared between a dense model and a smaller one, each with an expected loss whose minimum is
the dense model's own prediction, so that the loss is quadratic in small errors delta:

- token logits: the Kullback-Leibler divergence in nats a token; its curvature is the Fisher information;
- quantiles (Chronos-Bolt, Chronos-2): the expected excess of the quantile loss, if values follow the distribution that the
  dense model's quantiles describe, as a share of the loss that its series has then at the dense model's quantiles: what
  is forecast precisely is as dear as what is not. Its curvature is that distribution's density at the quantile, so scaled;
- hidden states (a T5 without a head): half the squared distance.

`surrogate` is a random scalar whose gradient g at any activation has E[g g^T] = 2 x the curvature of that loss there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from chronos import ChronosConfig
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, T5EncoderModel, T5ForConditionalGeneration

from ..data.group_windows import GroupedSeriesWindows
from ..data.groups import GroupedSeries, SeriesGroup
from ..data.series import check_calibration, parted, read_series
from ..data.tokens import IGNORED_LABEL, SeriesBatches, SyntheticBatches
from ..data.windows import SeriesWindows, SyntheticWindows, least_observed, stack_pieces
from .families import family_of

__all__ = ["Batch", "Objective", "objective_of", "output_mask"]

Batch = dict[str, torch.Tensor]
# Series in a backward pass: its activations are what takes memory.
BATCH_TOKENS, BATCH_WINDOWS = 2048, 64
PATCH_BATCH_WINDOWS = 256
# Gaussian processes of more values than this take minutes to sample.
LONGEST_SYNTHETIC = 2048
LEAST_TOKENS = 16384  # of `Objective.first_batches`
HELD_OUT_SEED = 2**20  # is added to the seed of the others
GROUP_SIZES = (1, 1, 1, 2, 3, 4, 8)
# Neighbouring quantiles are taken to be this much further apart than they are, on the normalised scale: where a model is
# certain, its density stays finite.
LEAST_SPACING = 5e-3


class Objective:
    """The common part; `config` is that of the dense model."""

    # Contexts of probes are cut to this many of their last values where whole ones are too expensive.
    short_context: int
    patch: int = 1  # values that are one token
    time_axis: tuple[str, ...] = ()  # the tensors that have the context's values

    def __init__(self, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
        self.config = config
        self.model_class = model_class

    @property
    def has_own_data(self) -> bool:
        """Whether series become batches of this model: it is a Chronos model."""
        return getattr(self.config, "chronos_config", None) is not None

    def batches(self, data: Any, num_batches: int, seed: int) -> tuple[list[Batch], dict[str, Any]]:
        """`num_batches` batches of synthetic series or of those in `data`, and a record of what they are."""
        batches, _, record = self.batches_apart(data, num_batches, 0, seed)
        return batches, record

    def batches_apart(
        self, data: Any, num_batches: int, num_held_out: int, seed: int
    ) -> tuple[list[Batch], list[Batch], dict[str, Any]]:
        """As `batches`, and batches of series, or of parts of them, that are in none of the others."""
        series, others, record = None, None, {"data": "synthetic"}
        if not (isinstance(data, str) and data == "synthetic"):
            if isinstance(data, GroupedSeries):
                data = data.separate(self.model_class.__name__)
            series = read_series(data)
            check_calibration(series, self.config.d_model, self.patch)
            record = {"data": f"{len(series)} series"}
            if num_held_out:
                series, others = parted(series)
        held_out = self._drawn(others, num_held_out, seed + HELD_OUT_SEED) if num_held_out else []
        return self._drawn(series, num_batches, seed), held_out, record

    def _drawn(self, series: list[NDArray[np.float64]] | None, num_batches: int, seed: int) -> list[Batch]:
        """Batches of windows of these series, or of synthetic ones where they are None."""
        raise NotImplementedError

    def complete(self, batch: Mapping[str, Any]) -> Batch:
        """The tensors that the model reads, from a batch of the user's.

        Raises:
            ValueError: One is missing.
        """
        raise NotImplementedError

    def masks(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Which positions of each stack count, bool (batch, length)."""
        raise NotImplementedError

    def predict(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """The model's predictions, (rows, size) in float32: what is compared."""
        raise NotImplementedError

    def surrogate(self, predictions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random scalar, summed over the rows of `predictions`, whose gradients have the loss's curvature."""
        raise NotImplementedError

    def divergence(self, reference: torch.Tensor, predicted: torch.Tensor) -> float:
        """The loss of the predictions `predicted` where the dense model's are `reference`, summed over rows."""
        raise NotImplementedError

    def excess(self, reference: torch.Tensor, predicted: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What is added to the expected loss of the forecast of each series of a batch, as a share of it, float64 (series,).

        The loss is the mean quantile loss (of all levels, or of those of the model), if values follow the dense model's forecast.

        Raises:
            ValueError: The model forecasts no values.
        """
        raise NotImplementedError

    def num_tokens(self, batch: Batch) -> int:
        """How many positions all stacks together run on."""
        return sum(mask.numel() for mask in self.masks(batch).values())

    def first_batches(self, batches: Sequence[Batch], num_tokens: float) -> Sequence[Batch]:
        """The first of the batches, with so many tokens or what is enough in any case, if there are as many."""
        tokens = np.cumsum([self.num_tokens(batch) for batch in batches])
        return batches[: 1 + int(np.searchsorted(tokens, max(LEAST_TOKENS, num_tokens)))]

    def cut(self, batch: Batch, rows: int, *, short: bool) -> Batch:
        """The first series of a batch, of short ones the last values."""
        names = self.time_axis if short else ()
        return {
            name: tensor[:rows, -self.short_context :] if name in names else tensor[:rows]
            for name, tensor in batch.items()
        }


# --- T5 ----------------------------------------------------------------------------------------------------------


class TokenObjective(Objective):
    """A T5 of tokens: Chronos-T5, or any other, with or without a head.

    Batches have `input_ids`, `attention_mask` and, but for an encoder, `labels`.
    """

    short_context = 128
    time_axis = ("input_ids", "attention_mask")

    @property
    def is_encoder(self) -> bool:
        return issubclass(self.model_class, T5EncoderModel)

    @property
    def is_logits(self) -> bool:
        return issubclass(self.model_class, T5ForConditionalGeneration)

    def _drawn(self, series: list[NDArray[np.float64]] | None, num_batches: int, seed: int) -> list[Batch]:
        settings = ChronosConfig(**self.config.chronos_config)
        size: dict[str, Any] = {"seed": seed, "max_tokens": BATCH_TOKENS, "max_windows": BATCH_WINDOWS}
        if series is None:
            supply: Any = SyntheticBatches(settings, num_batches, **size)
        else:
            supply = SeriesBatches(settings, series, num_batches, **size)
        return [self.complete(supply[i]) for i in range(num_batches)]

    def complete(self, batch: Mapping[str, Any]) -> Batch:
        ids = torch.as_tensor(batch["input_ids"])
        tensors = {
            "input_ids": ids,
            "attention_mask": torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))),
        }
        if not self.is_encoder:
            if "labels" not in batch:
                raise ValueError("calibration: every batch must have labels, for the decoder; found none.")
            tensors["labels"] = torch.as_tensor(batch["labels"])
        return tensors

    def masks(self, batch: Batch) -> dict[str, torch.Tensor]:
        masks = {"encoder": batch["attention_mask"].bool()}
        return masks if self.is_encoder else masks | {"decoder": output_mask(batch)}

    def predict(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if "labels" in batch:
            inputs["decoder_input_ids"] = self._shifted(batch["labels"])
        output = model(**inputs)
        states = output.logits if "logits" in output else output.last_hidden_state
        return states[output_mask(batch)]

    def _shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """The decoder's input: labels one step late, unknown ones as padding; T5's own rule."""
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        late = labels[:, :-1]
        return torch.cat([start, late.masked_fill(late == IGNORED_LABEL, self.config.pad_token_id)], dim=1)

    def surrogate(self, predictions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.is_logits:  # the cross-entropy of labels drawn from the predictions
            with torch.no_grad():
                labels = torch.multinomial(predictions.softmax(-1).cpu(), 1, generator=generator)[:, 0]
            return nn.functional.cross_entropy(predictions, labels.to(predictions.device), reduction="sum")
        return (predictions * _noise(predictions, generator)).sum()

    def divergence(self, reference: torch.Tensor, predicted: torch.Tensor) -> float:
        if not self.is_logits:
            return float((reference - predicted).double().square().sum()) / 2
        reference, predicted = reference.log_softmax(-1), predicted.log_softmax(-1)
        return float((reference.exp() * (reference - predicted)).sum(dim=-1).double().sum())

    def excess(self, reference: torch.Tensor, predicted: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not (self.is_logits and self.has_own_data):
            raise ValueError(f"a {self.model_class.__name__} without a chronos_config forecasts no values.")
        mask = output_mask(batch).to(reference.device)
        series = mask.nonzero()[:, 0]
        # Of its first tokens, which are no values, chronos makes the lowest one.
        added, own = _crps_excess(reference.softmax(-1), predicted.softmax(-1))
        sums = torch.zeros(2, len(mask), dtype=torch.float64, device=mask.device)
        sums = sums.index_add(1, series, torch.stack([added, own]))[:, mask.any(dim=1)]
        return sums[0] / sums[1]


def _crps_excess(reference: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `predicted` adds to the expected CRPS if values follow `reference`, and the CRPS that `reference` itself has then.

    Of distributions over bins of one width (..., bins), in widths, their values being spread evenly over a bin:

        E CRPS(G, y) - E CRPS(F, y) = integral of (G - F)^2        E CRPS(F, y) = integral of F (1 - F)

    for values y of distribution F (Gneiting and Raftery, 2007, section 4.2); CRPS is the quantile loss over all levels.
    """
    reference, apart = reference.double(), predicted.double() - reference.double()
    below, between = reference.cumsum(-1), apart.cumsum(-1)
    # Both integrands are parabolas inside of a bin.
    added = between.square().sum(-1) - apart.square().sum(-1) / 6
    return added, (below * (1 - below)).clamp_min(0).sum(-1) + reference.square().sum(-1) / 6


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def output_mask(batch: Batch) -> torch.Tensor:
    """Which positions of a T5's output count, bool (batch, length)."""
    return batch["labels"] != IGNORED_LABEL if "labels" in batch else batch["attention_mask"].bool()


# --- quantiles ---------------------------------------------------------------------------------------------------


def _knots(quantiles: torch.Tensor) -> torch.Tensor:
    """The quantiles (..., levels, steps) in order and apart, float64."""
    step = torch.arange(quantiles.shape[-2], dtype=torch.float64, device=quantiles.device)[:, None]
    return quantiles.double().sort(dim=-2).values + LEAST_SPACING * step


def quantile_density(quantiles: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The density at each quantile of the distribution that they describe, float64 (..., levels, steps) as `quantiles`.

    Central differences of the levels over those of the quantiles, one-sided at both ends.
    """
    knots = _knots(quantiles)
    above = torch.cat([knots[..., 1:, :], knots[..., -1:, :]], dim=-2)
    below = torch.cat([knots[..., :1, :], knots[..., :-1, :]], dim=-2)
    share = torch.cat([levels[1:], levels[-1:]]) - torch.cat([levels[:1], levels[:-1]])
    return share.double()[:, None] / (above - below)


class _Distribution:
    """The distribution whose function F is piecewise linear through quantiles (..., levels, steps), its outer pieces extended to 0 and 1."""

    def __init__(self, quantiles: torch.Tensor, levels: torch.Tensor) -> None:
        self.knots, self.levels = _knots(quantiles), levels.double()[:, None]
        slopes = (self.levels[1:] - self.levels[:-1]) / (self.knots[..., 1:, :] - self.knots[..., :-1, :])
        first = self.knots[..., :1, :] - self.levels[0] / slopes[..., :1, :]
        self.last = self.knots[..., -1:, :] + (1 - self.levels[-1]) / slopes[..., -1:, :]
        # Of each linear piece (..., pieces, steps): where it begins, its width, F there and its slope; and the integral of F up to its end.
        self.start = torch.cat([first, self.knots], dim=-2)
        self.width = torch.cat([self.knots, self.last], dim=-2) - self.start
        self.height = torch.cat([torch.zeros_like(self.levels[:1]), self.levels])
        self.slopes = torch.cat([slopes[..., :1, :], slopes, slopes[..., -1:, :]], dim=-2)
        self.areas = (self.height * self.width + self.slopes * self.width.square() / 2).cumsum(dim=-2)

    @property
    def areas_at_knots(self) -> torch.Tensor:
        """The integral of F up to each quantile."""
        return self.areas[..., :-1, :]

    def area(self, values: torch.Tensor) -> torch.Tensor:
        """The integral of F up to the values (..., any number, steps)."""
        pieces = torch.searchsorted(self.start.mT.contiguous(), values.mT.contiguous(), right=True).mT - 1
        before = pieces < 0
        pieces = pieces.clamp_min(0)
        start, width, slope = (of.gather(-2, pieces) for of in (self.start, self.width, self.slopes))
        height = self.height[:, 0][pieces]
        inside = torch.minimum(values - start, width)
        earlier = torch.cat([torch.zeros_like(self.areas[..., :1, :]), self.areas_at_knots], dim=-2).gather(-2, pieces)
        area = earlier + height * inside + slope * inside.square() / 2
        return area.masked_fill(before, 0.0) + (values - self.last).clamp_min(0)


def quantile_excess(reference: torch.Tensor, predicted: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The expected excess of the quantile loss of `predicted` over that of `reference`, if values follow the quantiles `reference`.

    With F the distribution function through `reference`,

        2 E[pinball(y, q')] - 2 E[pinball(y, q)] = 2 * integral of (F(y) - level) dy from q to q',

    never negative, 0 at q' = q, and f(q) (q' - q)^2 close to it. float64 (..., levels, steps) as the quantiles.
    """
    expected = _Distribution(reference, levels)
    moved = expected.knots + (predicted.double() - reference.double())
    added = expected.area(moved) - expected.areas_at_knots - expected.levels * (moved - expected.knots)
    return 2 * added.clamp_min(0)


def quantile_loss(quantiles: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The expected quantile loss of a forecast, if values follow it, float64 (..., levels, steps) as the quantiles.

    2 E[pinball(y, q)] = 2 E[max(q - y, 0)] + 2 level (E[y] - q), where the first is the integral of F up to q. Positive.
    """
    expected = _Distribution(quantiles, levels)
    mean = expected.last - expected.areas[..., -1:, :]
    return 2 * (expected.areas_at_knots + expected.levels * (mean - expected.knots))


class PatchObjective(Objective):
    """Chronos-Bolt. Batches have a `context` (batch, length), NaN where missing.

    A row of the predictions is a series: its quantiles (levels, steps) on the model's own normalised scale. The loss is the mean over
    levels and steps, as a share of what it is expected to be for the dense model's quantiles.
    """

    short_context = 2048
    time_axis = ("context",)

    def __init__(self, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
        super().__init__(config, model_class)
        settings = config.chronos_config
        self.levels = torch.tensor(settings["quantiles"])
        self.patch = settings["input_patch_size"]
        self.stride = settings["input_patch_stride"]
        self.context_length = settings["context_length"]
        self.has_reg_token = settings.get("use_reg_token", False)
        self.prediction_length = settings.get("prediction_length", 64)

    def _drawn(self, series: list[NDArray[np.float64]] | None, num_batches: int, seed: int) -> list[Batch]:
        size = self._size(seed)
        if series is None:
            lengths = min(self.context_length, LONGEST_SYNTHETIC), self.prediction_length
            synthetic = SyntheticWindows(*lengths, num_batches, **size)
            windows = [synthetic[i] for i in range(num_batches)]
        else:
            drawn = SeriesWindows(
                self.context_length,
                self.prediction_length,
                series,
                num_batches,
                **size,
                min_observed=least_observed(self.patch),
            )
            windows = [stack_pieces(**drawn[i]) for i in range(num_batches)]
        rng = np.random.default_rng([seed, 3, 1])
        return [self._from_windows(window, rng) for window in windows]

    def _size(self, seed: int) -> dict[str, Any]:
        """What the batches of a supply of windows have in common."""
        return {"seed": seed, "max_values": BATCH_TOKENS * self.patch, "max_windows": PATCH_BATCH_WINDOWS}

    def _from_windows(self, window: Mapping[str, torch.Tensor], rng: np.random.Generator) -> Batch:
        return {"context": window["context"].float()}

    def complete(self, batch: Mapping[str, Any]) -> Batch:
        context = batch.get("context")
        if context is None or torch.as_tensor(context).ndim != 2:
            raise ValueError("calibration: every batch must have a context of shape (batch, length); found none.")
        return {"context": torch.as_tensor(context).float()}

    def masks(self, batch: Batch) -> dict[str, torch.Tensor]:
        context = self._context_mask(batch)
        return {"encoder": context, "decoder": context.new_ones(len(context), 1)}

    def _context_mask(self, batch: Batch) -> torch.Tensor:
        """Patches with an observed value, and the REG token."""
        observed = ~batch["context"][:, -self.context_length :].isnan()
        observed = nn.functional.pad(observed, (-observed.shape[1] % self.patch, 0))
        mask = observed.unfold(-1, self.patch, self.stride).any(-1)
        return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1) if self.has_reg_token else mask

    def predict(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        return self.quantiles(model, batch)[0]

    def quantiles(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The forecast of every series of a batch (series, levels, steps): on the model's normalised scale, and on that of the values."""
        caught: list[torch.Tensor] = []
        head = model.get_submodule("output_patch_embedding")  # behind it the scale of every series is put back
        handle = head.register_forward_hook(lambda _, __, output: caught.append(output))
        try:
            output = model(**self.inputs({name: tensor.to(model.device) for name, tensor in batch.items()}))
        finally:
            handle.remove()
        # (batch, patches, levels * size) -> (batch, levels, patches * size)
        normalised = caught[0].unflatten(-1, (len(self.levels), -1)).transpose(1, 2).flatten(2)
        return normalised, output.quantile_preds

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return batch

    def surrogate(self, predictions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        levels = self.levels.to(predictions.device)
        with torch.no_grad():
            density = quantile_density(predictions, levels)
            share = density / density[0].numel() / self._expected(predictions)[:, None, None]
            weight = (2 * share).sqrt().to(predictions.dtype) * _noise(predictions, generator)
        return (predictions * weight).sum()

    def divergence(self, reference: torch.Tensor, predicted: torch.Tensor) -> float:
        return float(self.shares(reference, predicted).sum())

    def excess(self, reference: torch.Tensor, predicted: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.shares(reference, predicted)

    def shares(self, reference: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """What the quantiles `predicted` are expected to lose beyond `reference`, as shares of its own loss, float64 (series,)."""
        added = quantile_excess(reference, predicted, self.levels.to(reference.device)).mean(dim=(1, 2))
        return added / self._expected(reference)

    def _expected(self, quantiles: torch.Tensor) -> torch.Tensor:
        """Of each series, float64."""
        return quantile_loss(quantiles, self.levels.to(quantiles.device)).mean(dim=(1, 2))


def _mixed(mixing: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows added up with these weights; what is missing in a row stays missing there."""
    return (mixing @ values.nan_to_num()).masked_fill(values.isnan(), torch.nan)


class GroupObjective(PatchObjective):
    """Chronos-2. Batches also have `group_ids` (batch,) and `future_covariates` (batch, future length), NaN where unknown.

    They may have `is_target` (batch,), bool: the rows that are predicted, which without it are those whose future is not known.
    Groups of the user's are what they are. Other series are put in groups of one to eight; those of a group share parts of each other, and of
    some the future is known.
    """

    def batches_apart(
        self, data: Any, num_batches: int, num_held_out: int, seed: int
    ) -> tuple[list[Batch], list[Batch], dict[str, Any]]:
        if not isinstance(data, GroupedSeries):
            return super().batches_apart(data, num_batches, num_held_out, seed)
        check_calibration(data.targets, self.config.d_model, self.patch)
        groups, others = (data.groups, []) if not num_held_out else parted(data.groups, SeriesGroup.pieces)
        held_out = self._of_groups(others, num_held_out, seed + HELD_OUT_SEED) if num_held_out else []
        return self._of_groups(groups, num_batches, seed), held_out, {"data": data.description}

    def _of_groups(self, groups: list[SeriesGroup], num_batches: int, seed: int) -> list[Batch]:
        windows = GroupedSeriesWindows(
            self.context_length,
            self.prediction_length,
            groups,
            num_batches,
            **self._size(seed),
            patch_size=self.patch,
            min_observed=least_observed(self.patch),
        )
        return [self.complete(windows[i]) for i in range(num_batches)]

    def _from_windows(self, window: Mapping[str, torch.Tensor], rng: np.random.Generator) -> Batch:
        context, target = window["context"].float(), window["target"].float()
        sizes: list[int] = []
        while sum(sizes) < len(context):
            sizes.append(min(int(rng.choice(GROUP_SIZES)), len(context) - sum(sizes)))
        ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        same = ids[:, None] == ids[None, :]
        mixing = torch.from_numpy(rng.normal(0, 0.5, same.shape)).float() * same
        mixing.fill_diagonal_(1.0)
        context, target = _mixed(mixing, context), _mixed(mixing, target)
        known = torch.from_numpy(rng.random(len(ids)) < 0.2)
        known &= torch.cat([same.new_zeros(1), ids[1:] == ids[:-1]])  # never the first of a group
        future = torch.full((len(ids), -(-target.shape[1] // self.patch) * self.patch), torch.nan)
        future[known, : target.shape[1]] = target[known]
        return {"context": context, "group_ids": ids, "future_covariates": future}

    def complete(self, batch: Mapping[str, Any]) -> Batch:
        tensors = super().complete(batch)
        rows = len(tensors["context"])
        future = torch.as_tensor(batch.get("future_covariates", torch.full((rows, self.patch), torch.nan))).float()
        if future.ndim != 2 or len(future) != rows or future.shape[1] % self.patch:
            raise ValueError(
                f"calibration: future_covariates must have shape ({rows}, a multiple of {self.patch}), found {tuple(future.shape)}."
            )
        ids = torch.as_tensor(batch.get("group_ids", torch.arange(rows)))
        return tensors | {"group_ids": ids, "future_covariates": future} | _targets(batch, rows)

    def masks(self, batch: Batch) -> dict[str, torch.Tensor]:
        context = self._context_mask(batch)
        future = context.new_ones(len(context), batch["future_covariates"].shape[1] // self.patch)
        return {"encoder": torch.cat([context, future], dim=1)}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        read = {name: tensor for name, tensor in batch.items() if name != "is_target"}
        return read | {"num_output_patches": batch["future_covariates"].shape[1] // self.patch}

    def predict(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        is_target = batch.get("is_target", batch["future_covariates"].isnan().all(dim=1))
        return super().predict(model, batch)[is_target.to(model.device)]

    def cut(self, batch: Batch, rows: int, *, short: bool) -> Batch:
        if "is_target" in batch:  # a target without its covariates is another forecast
            rows = 1 + int((batch["group_ids"] == batch["group_ids"][rows - 1]).nonzero()[-1])
        return super().cut(batch, rows, short=short)


def _targets(batch: Mapping[str, Any], rows: int) -> Batch:
    """Which rows of a batch of the user's are predicted, if it says so: by `is_target`, or as those that have a `future_target`."""
    if "is_target" in batch:
        is_target = torch.as_tensor(batch["is_target"])
    elif batch.get("future_target") is not None:
        is_target = ~torch.as_tensor(batch["future_target"]).isnan().all(dim=1)
    else:
        return {}
    if is_target.shape != (rows,) or is_target.dtype != torch.bool or not is_target.any():
        raise ValueError(
            f"calibration: is_target must be bool of shape ({rows},) with a True, found {is_target.dtype} of shape "
            f"{tuple(is_target.shape)}."
        )
    return {"is_target": is_target}


OBJECTIVES: dict[str, type[Objective]] = {"t5": TokenObjective, "bolt": PatchObjective, "chronos2": GroupObjective}


def objective_of(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Objective:
    """The objective of a model of this class, of one of the families."""
    family = family_of(model_class)
    assert family is not None
    return OBJECTIVES[family.name](config, model_class)
