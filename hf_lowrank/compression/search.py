"""Ranks that are found by trying: for the speed that is asked for, and for the loss that is allowed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, T5EncoderModel

from ..checkpoints.rank_table import RankTable
from ..progress import progress_display
from .export_bench import export_bench_of
from .latency import Achieved, measure_forecasts, measure_speed
from .latency_bench import Bench, bench_of
from .loss_bound import (
    FIRST_RATIO,
    FIRST_SPEEDUP,
    STEP,
    Found,
    HeldOut,
    MeasuredLoss,
    smallest_within,
)
from .measured import Measured, built, measure_layers, weighed
from .policies import check_speedup, least_total_ratio
from .record import kept_share
from .settings import CompressionSettings
from .work import Work, calibration_of, with_arguments

__all__ = ["Trials", "as_fast", "within_loss"]

SHORT = 0.03  # what a measured speed-up may be below its aim, as a share
CORRECTIONS = 2  # how often ranks are chosen again because it is


def _bench_for(work: Work) -> Bench:
    """Where the model is: in its dtype on a GPU, in float32 on the CPU, as Chronos forecasts there; or the engine of an export."""
    if work.settings.backend != "torch":
        return export_bench_of(work.config, work.settings.backend)
    weight = next(iter(work.dense.weights.values()))
    return bench_of(
        work.config,
        encoder_only=work.dense.model_class is T5EncoderModel,
        device=weight.device,
        dtype=weight.dtype if weight.device.type == "cuda" else torch.float32,
    )


def as_fast(work: Work) -> PreTrainedModel:
    """The model that forecasts as many times as fast as is asked for, and loses the least."""
    target: Any = work.settings.target_speedup
    bench = _bench_for(work)
    measured = measure_layers(work, calibration_of(work), measure_speed(bench))
    check_speedup(target, measured.largest_speedup(work))
    measured = weighed(work, measured)
    table, achieved = _fast_enough(work, measured, bench)
    return _with_speed(built(work, measured, table), achieved, target)


def _fast_enough(work: Work, measured: Measured, bench: Bench) -> tuple[RankTable, Achieved]:
    """The ranks at which a forecast is as fast as is asked for, and how fast it is.

    Where it is not, ranks are chosen again for an aim that is as much larger as the last one was missed by; of all tried the fastest
    are taken if none is fast enough.
    """
    target: Any = work.settings.target_speedup
    asked, largest = target, measured.largest_speedup(work)
    tried: list[tuple[RankTable, Achieved]] = []
    for _ in range(1 + CORRECTIONS):
        try:
            table = measured.table(with_arguments(work, target_speedup=asked))
        except ValueError:
            if not tried:
                raise
            break  # other budgets leave no more
        achieved = measure_forecasts(bench, table)
        tried.append((table, achieved))
        if achieved.speedup >= (1 - SHORT) * target or asked >= largest:
            break
        asked = min(asked * target / achieved.speedup, largest)
    return max(tried, key=lambda one: one[1].speedup)


def _with_speed(model: PreTrainedModel, achieved: Achieved, target: float | None) -> PreTrainedModel:
    """The model, with how fast it is in its record, and a warning where that is not what was asked for."""
    model.config.compression["speed"] |= achieved.record()
    if target is not None and achieved.speedup < (1 - SHORT) * target:
        warnings.warn(
            f"target_speedup={target}: a forecast is {achieved.speedup:.3g} times as fast as with the dense ranks, as measured on this "
            "machine. Ask for more, or measure again when the machine is less busy.",
            stacklevel=5,
        )
    return model


class Trials:
    """Compressions of one model to several budgets, each measured on series that are held out: all from one calibration.

    A budget is a share, of the parameters of attention and feed-forward or, with `target_speedup`, of the time of a forecast.
    """

    def __init__(self, work: Work) -> None:
        self.work, target = work, work.settings.target_speedup
        calibration = calibration_of(work)
        if calibration is None or not calibration.held_out:
            what = (
                f"there are no data for {work.dense.source}"
                if calibration is None
                else "the calibration given has none"
            )
            raise ValueError(
                f"max_loss needs series that are held out, and {what}; see calibrate(num_held_out_batches=)."
            )
        self.bench = None if target is None else _bench_for(work)
        speed = None if self.bench is None else measure_speed(self.bench)
        measured = measure_layers(work, calibration, speed)
        if speed is None:
            self.least = least_total_ratio(work.settings, work.forms, work.dense, work.config)
            # What a low-rank model has is all that there is to take from.
            self.largest = kept_share(work.config, (name for name, _ in work.dense.all_layers))
            self.first = max(FIRST_RATIO * self.largest, self.least)
        else:
            largest = measured.largest_speedup(work)
            if isinstance(target, (int, float)):
                check_speedup(target, largest)
            first = target if isinstance(target, (int, float)) else FIRST_SPEEDUP
            self.least, self.largest = 1 / largest, 1.0
            self.first = max(1 / first, self.least)
        self.held_out = HeldOut(work.dense, work.dense.float_model(), calibration.held_out, seed=work.settings.seed)
        self.measured = weighed(self.at(self.first), measured)

    def at(self, share: float) -> Work:
        """The work of a budget."""
        budget: dict[str, float] = {"total_ratio": share} if self.bench is None else {"target_speedup": 1 / share}
        work = with_arguments(self.work, **{"max_loss": None} | budget)
        return replace(work, config=copy.deepcopy(self.work.config))

    def build(self, share: float, table: RankTable | None = None) -> PreTrainedModel:
        """The model of a budget, of its ranks or of those given."""
        work = replace(self.at(share), show_progress=False)
        return built(work, self.measured, table or self.measured.table(work))

    def measure(self, model: PreTrainedModel, share: float) -> MeasuredLoss:
        """The loss of a model of a budget."""
        if self.bench is None:
            return self.held_out.measured(model, share)
        kept = kept_share(model.config, RankTable.of(model.config))
        return replace(self.held_out.measured(model, kept), speedup=1 / share)


def within_loss(work: Work) -> PreTrainedModel:
    """The smallest model that is expected to lose at most `max_loss`, the fastest, or one that is as fast as is asked for."""
    settings, trials = work.settings, Trials(work)
    max_loss: Any = settings.max_loss
    with progress_display(show=work.show_progress) as display:
        task = display.add_task("Searching", total=None)

        def build(share: float) -> PreTrainedModel:
            what = f"{share:.3f} of the layers" if trials.bench is None else f"{1 / share:.3f} times as fast"
            display.update(task, description=f"Searching: {what}")
            return trials.build(share)

        def search(least: float, first: float) -> Found[PreTrainedModel]:
            return smallest_within(max_loss, (least, trials.largest), build, trials.measure, first=first)

        if isinstance(settings.target_speedup, (int, float)):
            return _fast_within_loss(trials, max_loss, settings.target_speedup, search)
        found = search(trials.least, trials.first)
    if found.model is None:
        raise ValueError(f"max_loss={max_loss}: {_at_full_rank(settings, found)}.")
    assert found.measured is not None
    model = _with_losses(found.model, settings, found.measured, found.tried)
    if trials.bench is None:
        return model
    return _with_speed(model, measure_forecasts(trials.bench, RankTable.of(model.config)), None)


def _fast_within_loss(
    trials: Trials, max_loss: float, target: float, search: Callable[[float, float], Found[PreTrainedModel]]
) -> PreTrainedModel:
    """The model that is as fast as is asked for, if it loses at most `max_loss`."""
    settings, share = trials.work.settings, trials.first
    assert trials.bench is not None
    table, achieved = _fast_enough(trials.at(share), trials.measured, trials.bench)
    model = trials.build(share, table)
    measured = trials.measure(model, share)
    if measured.bound <= max_loss:
        return _with_speed(_with_losses(model, settings, measured, [measured]), achieved, target)
    found = search(share, min(1.0, STEP * share))
    instead = _at_full_rank(settings, found)
    if found.measured is not None:
        instead = (
            f"the fastest within {max_loss} is predicted to be {found.measured.speedup:.3g} times as fast, and is what "
            "target_speedup='max' makes"
        )
    raise ValueError(
        f"max_loss={max_loss} and target_speedup={target}: a model of that speed loses {measured.loss:.3g} "
        f"(below {measured.bound:.3g} with 95 % confidence); {instead}."
    )


def _at_full_rank(settings: CompressionSettings, found: Found[PreTrainedModel]) -> str:
    """What is lost where nothing keeps the bound."""
    best = found.tried[-1]
    integers = f" and quantize={settings.quantize!r}" if settings.quantize else ""
    return f"not below {best.bound:.3g} (with 95 % confidence; {best.loss:.3g} on average), even with all ranks kept{integers}"


def _with_losses(
    model: PreTrainedModel, settings: CompressionSettings, chosen: MeasuredLoss, tried: Sequence[MeasuredLoss]
) -> PreTrainedModel:
    """The model, with what was measured in its record."""
    model.config.compression |= {
        "policy": "max_loss",
        "arguments": settings.policy_arguments,
        "measured_loss": chosen.to_dict(),
        "tried": [one.to_dict() for one in tried],
    }
    return model
