"""The one road from a checkpoint to a smaller one: load, calibrate, measure, allocate, factorize, refit."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from chronos import BaseChronosPipeline
from transformers import PreTrainedConfig, PreTrainedModel, T5EncoderModel

from ..checkpoints.dense import DenseCheckpoint, load_dense
from ..checkpoints.rank_table import FORMS, ComponentName, LayerName, LayerRanks, PerHeadRanks, RankTable
from ..checkpoints.summary import summarize
from ..progress import progress, progress_display
from .allocation import Component, check_argument
from .assembly import build, factorize, own_weights
from .baseline import truncate_matrices
from .calibration import Calibration, calibrate
from .latency import Achieved, Speed, measure_forecasts, measure_speed
from .latency_bench import Bench, bench_of
from .layers import AttentionLayer, FeedForwardLayer, Layer, Projection, attention_layer, feed_forward_layer
from .loss_bound import (
    FIRST_RATIO,
    FIRST_SPEEDUP,
    HELD_OUT_BATCHES,
    STEP,
    Found,
    HeldOut,
    MeasuredLoss,
    smallest_within,
)
from .objectives import objective_of
from .plan import CompressionPlan, PlannedSize
from .policies import (
    check_reachable,
    check_speedup,
    choose_ranks,
    component_ranks,
    largest_speedup,
    least_total_ratio,
)
from .record import kept_share, record_of, warn_of_loss
from .sensitivity import PROBE_ARITHMETIC, measured_losses, reweighted
from .settings import POLICIES, CompressionSettings, SettingsArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["compress_pretrained", "loss_curve", "plan_compression", "projections_within"]

CURVE = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)  # budgets of `loss_curve`
SHORT = 0.03  # what a measured speed-up may be below its aim, as a share
CORRECTIONS = 2  # how often ranks are chosen again because it is


def compress_pretrained(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    settings: CompressionSettings | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
    show_progress: bool | None = None,
    **arguments: Unpack[SettingsArguments],
) -> PreTrainedModel:
    """Turn a Chronos checkpoint (T5, Bolt, Chronos-2, or any T5) into one whose layers have the rank they need.

        model = compress_pretrained("amazon/chronos-bolt-small", max_loss=0.01)

    A compressed one, or one that was trained at its ranks, is compressed further. Shares are those of the dense model of its shape here too;
    `max_loss` is what is lost of the model that is given. No layer grows: one that is smaller than its share already stays as it is, in the
    same numbers (those that integers stand for, without `quantize`).

    Args:
        model: A Hub id, a local folder, `"reference"`, or a loaded model or pipeline, dense or low-rank, which is left as it is. An
            adapter of peft (a `PeftModel`, or a folder or Hub id with an adapter_config.json) is merged into a copy of its model first.
        settings: What is asked for.
        dtype: Of a checkpoint that is loaded and of the result: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"` as in the file.
        device: Where a checkpoint is loaded to and compressed, such as `"cuda"`; by default the CPU.
        show_progress: Show progress bars; by default in a terminal or a notebook.
        arguments: The fields of `CompressionSettings`, in place of `settings`; there they are explained. One of these says how ranks
            are chosen, `max_loss=0.01` if none is given: `max_loss`, `ratio`, `total_ratio`, `max_cache_ratio`, `target_speedup` (budgets,
            which may be combined), `epsilon`, `energy`, `uniform`, `schedule`, `ranks`. Beside it `feed_forward_ratio`, `form`, `method`,
            `multiple_of`, `quantize`, `calibration`, `refit`, `seed`.

    Returns:
        A model of the matching `LowRankT5...` class in evaluation mode, in the checkpoint's dtype, on its device, with its
        generation config and `chronos_config`. `config.compression` records how it was made, and in `source_compression` how a low-rank
        model was that it was made from.

    Raises:
        ValueError: An argument is out of range, two policies are given, or the checkpoint is not a sound T5; a table has larger heads than a
            low-rank model, or the paper's method is to truncate one whose attention is low-rank.
        TypeError: An argument is unknown.
        OSError: The checkpoint cannot be read.
        ImportError: It is an adapter, and peft is not installed.

    Warns:
        UserWarning: Without calibration: a ratio below 0.2, or a spectrum so flat that much of it is dropped. A forecast is measured to
            be less fast than `target_speedup`, by more than 3 %.
    """
    work = _begin(model, settings, arguments, dtype=dtype, device=device, show_progress=show_progress)
    if work.settings.method == "paper":
        return _as_the_paper(work)
    return _jointly(work) if work.settings.max_loss is None else _within_loss(work)


def plan_compression(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    settings: CompressionSettings | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
    **arguments: Unpack[SettingsArguments],
) -> CompressionPlan:
    """How small `compress_pretrained` would make a model, as far as the rule says so before any calibration.

    A budget is a bound, `uniform`, `schedule` and `ranks` are exact; what `epsilon`, `energy` and `target_speedup` keep follows from
    the spectra or from this machine. Nothing is written.

    Args:
        model, settings, dtype, device, arguments: As in `compress_pretrained`.

    Raises:
        ValueError, TypeError, OSError: What `compress_pretrained` would raise before its work.
    """
    work = _begin(model, settings, arguments, dtype=dtype, device=device, show_progress=False)
    settings, config = work.settings, work.config
    given = summarize(config)
    is_table = settings.method != "paper" and settings.policy in ("uniform", "schedule", "ranks")
    if is_table:
        attention = _attention_layers(work, None)  # their ranks, alone, depend on no data
        components = {name: part for layer in attention for name, part in layer.components(weight=1.0).items()}
        exact = replace(settings, feed_forward_ratio=None)
        choose_ranks(exact, work.forms, attention, [], components, config, None).write(config)
    summary, itemsize = summarize(config), next(iter(work.dense.weights.values())).dtype.itemsize
    kinds = {row.kind for row in summary.rows}
    attention_kinds = [kind for kind in work.dense.family.attention if kind in kinds]
    feed_forward_kinds = [kind for kind in work.dense.family.feed_forward if kind in kinds]

    def size(name: str, column: str, kinds: list[str], share: float | None, *, is_exact: bool) -> PlannedSize:
        dense, kept = summary.total(f"dense_{column}", *kinds), summary.total(column, *kinds)
        # A paper's truncation keeps all dense shapes.
        bound = kept
        if share is not None and settings.method != "paper":
            bound = min(kept, int(share * dense * (1 + 1e-12)))
        return PlannedSize(name, dense, bound, is_exact)

    no_feed_forward = not settings.has_feed_forward
    is_fixed = is_table or settings.method == "paper"
    sizes = [
        size("attention parameters", "parameters", attention_kinds, settings.ratio, is_exact=is_fixed),
        size(
            "feed-forward parameters",
            "parameters",
            feed_forward_kinds,
            settings.feed_forward_ratio,
            is_exact=no_feed_forward,
        ),
    ]
    layers = size("parameters of both", "parameters", [], settings.total_ratio, is_exact=is_fixed and no_feed_forward)
    layers = replace(layers, at_most=min(layers.at_most, sizes[0].at_most + sizes[1].at_most))
    sizes.append(layers)
    if summary.total("dense_cached_numbers"):
        sizes.append(size("cached numbers a token", "cached_numbers", [], settings.max_cache_ratio, is_exact=is_fixed))
    own = {weight.data_ptr(): weight for weight in work.dense.given_weights.values() if weight.is_floating_point()}
    whole = given.dense_parameters(sum(weight.numel() for weight in own.values()))
    total = PlannedSize("all parameters", whole, whole - layers.dense + layers.at_most, layers.is_exact)
    return CompressionPlan((*sizes, total), itemsize)


def loss_curve(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    total_ratios: Sequence[float] = CURVE,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
    show_progress: bool | None = None,
    **arguments: Unpack[SettingsArguments],
) -> list[MeasuredLoss]:
    """What each of several budgets would cost, measured as for `max_loss`; nothing is kept of the models.

        for one in loss_curve("reference-bolt"):
            print(one.total_ratio, one.loss, one.bound)

    Args:
        model, dtype, device, show_progress: As in `compress_pretrained`.
        total_ratios: The budgets, in (0, 1].
        arguments: Those of `compress_pretrained` beside a rule for the ranks: `form`, `multiple_of`, `quantize`, `calibration`,
            `refit`, `seed`.

    Raises:
        ValueError, TypeError, OSError: As `compress_pretrained`; a budget is below the smallest ranks.
    """
    settings = CompressionSettings(**arguments)
    if given := [name for name in POLICIES if arguments.get(name) is not None]:
        raise ValueError(f"loss_curve tries budgets of its own: leave out {', '.join(given)}.")
    for total_ratio in total_ratios:
        check_argument("total_ratio", total_ratio)
    trials = _Trials(_begin(model, settings, {}, dtype=dtype, device=device, show_progress=show_progress))
    if least := [ratio for ratio in total_ratios if ratio < trials.least]:
        raise ValueError(f"total_ratios: {least[0]} is too small: the smallest ranks keep {trials.least:.4f}.")
    ratios = progress(total_ratios, "Measuring budgets", show_progress)
    return [trials.measure(trials.build(ratio), ratio) for ratio in ratios]


def projections_within(
    model: PreTrainedModel,
    total_ratios: Sequence[float],
    *,
    num_batches: int,
    arithmetic: float,
    multiple_of: int,
    seed: int,
) -> dict[float, list[Projection]]:
    """What makes a dense model as small as each of several budgets would, while it stays what it is: the projections to insert.

    Those that `compress_pretrained(model, total_ratio=...)` merges into the weights, before its refit. One calibration on synthetic series
    serves all budgets, and what each component is worth is measured at the one in the middle.

    Args:
        model: A dense Chronos model in float32, which is left as it is.
        total_ratios: The budgets.
        num_batches, seed: Of the calibration.
        arithmetic: The multiplications that measuring what each component is worth may take, for each form.
        multiple_of: Of the ranks.

    Raises:
        ValueError: A budget is out of reach, or the model is not dense.
    """
    middle = sorted(total_ratios)[len(total_ratios) // 2]
    asked = CompressionSettings(total_ratio=middle, multiple_of=multiple_of, seed=seed)
    work = _begin(model, asked, {}, dtype="auto", device=None, show_progress=False)
    calibration = calibrate(
        work.dense, num_batches=num_batches, num_refit_batches=num_batches, seed=seed, show_progress=False
    )
    measured = _weighed(work, _measured(work, calibration, None), arithmetic=arithmetic)
    found = {}
    for total_ratio in total_ratios:
        table = measured.table(_with(work, total_ratio=total_ratio))
        found[total_ratio] = [
            layer.points()[name.part].projection(rank)
            for layer in measured.layers
            for name, rank in layer.truncated(table[layer.name]).items()
        ]
    return found


@dataclass(frozen=True)
class _Work:
    """What one compression works with: the dense model, what is asked for, and the configuration that it fills in."""

    dense: DenseCheckpoint
    settings: CompressionSettings
    forms: dict[str, str]  # of each kind of attention
    config: PreTrainedConfig
    show_progress: bool | None


def _with(work: _Work, **arguments: Any) -> _Work:
    """The work with some of its settings changed."""
    return replace(work, settings=replace(work.settings, **arguments))


def _begin(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    settings: CompressionSettings | None,
    arguments: SettingsArguments,
    *,
    dtype: torch.dtype | str,
    device: str | None,
    show_progress: bool | None,
) -> _Work:
    """The model loaded, and all checked that can be known before it is looked into."""
    if settings is None:
        settings = CompressionSettings(**arguments)
    elif arguments:
        raise ValueError(f"Give either settings or {', '.join(arguments)}, not both.")
    elif not isinstance(settings, CompressionSettings):
        raise TypeError(
            f"settings must be CompressionSettings, found {settings!r}; give budgets by name, as in ratio=0.5."
        )
    dense = load_dense(model, dtype=dtype, device=device)
    forms, config = settings.forms_for(dense.family), _lowrank_config(dense, settings)
    check_reachable(settings, forms, dense, config)
    return _Work(dense, settings, forms, config, show_progress)


@dataclass(frozen=True)
class _Measured:
    """What the data says of a dense model's layers, once for any budgets."""

    calibration: Calibration | None
    speed: Speed | None
    attention: list[AttentionLayer]
    feed_forward: list[FeedForwardLayer]
    components: dict[ComponentName, Component]

    @property
    def layers(self) -> list[Layer]:
        return [*self.attention, *self.feed_forward]

    def table(self, work: _Work) -> RankTable:
        """The ranks that the settings choose."""
        return choose_ranks(
            work.settings, work.forms, self.attention, self.feed_forward, self.components, work.config, self.speed
        )

    def largest_speedup(self, work: _Work) -> float:
        """What is predicted of the smallest ranks."""
        assert self.speed is not None
        return largest_speedup(self.layers, self.components, work.settings.multiple_of, self.speed)


def _jointly(work: _Work) -> PreTrainedModel:
    """Queries with keys and values with outputs, each layer at the ranks that it needs, smaller at run time."""
    target = work.settings.target_speedup
    if target is None:
        measured = _weighed(work, _measured(work, _calibration(work), None))
        return _built(work, measured, measured.table(work))
    assert not isinstance(target, str)
    bench = _bench(work)
    measured = _measured(work, _calibration(work), measure_speed(bench))
    check_speedup(target, measured.largest_speedup(work))
    measured = _weighed(work, measured)
    table, achieved = _fast_enough(work, measured, bench)
    return _with_speed(_built(work, measured, table), achieved, target)


def _measured(work: _Work, calibration: Calibration | None, speed: Speed | None) -> _Measured:
    """The layers, the losses of their components being those of their spectra."""
    settings = work.settings
    if calibration is None and settings.quantize is not None:
        raise ValueError(f"quantize needs a calibration, and there are no data for {work.dense.source}.")
    attention, feed_forward = _attention_layers(work, calibration), _feed_forward_layers(work, calibration)
    components = {
        name: component
        for layer in (*attention, *feed_forward)
        for name, component in layer.components(weight=1.0 if calibration is None else None).items()
    }
    return _Measured(calibration, speed, attention, feed_forward, components)


def _fast_enough(work: _Work, measured: _Measured, bench: Bench) -> tuple[RankTable, Achieved]:
    """The ranks at which a forecast is as fast as is asked for, and how fast it is.

    Where it is not, ranks are chosen again for an aim that is as much larger as the last one was missed by; of all tried the fastest
    are taken if none is fast enough.
    """
    target: Any = work.settings.target_speedup
    asked, largest = target, measured.largest_speedup(work)
    tried: list[tuple[RankTable, Achieved]] = []
    for _ in range(1 + CORRECTIONS):
        try:
            table = measured.table(_with(work, target_speedup=asked))
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
            stacklevel=4,
        )
    return model


def _built(work: _Work, measured: _Measured, table: RankTable) -> PreTrainedModel:
    """The model of these ranks."""
    settings, layers, components = work.settings, measured.layers, measured.components
    table.write(work.config)
    losses = {name: float(components[name].loss[rank]) for name, rank in component_ranks(layers, table).items()}
    work.config.compression = _record(work, layers, table, losses, measured.calibration, measured.speed)
    if measured.calibration is None:
        kept = kept_share(work.config, [layer.name for layer in measured.attention])
        warn_of_loss(settings, losses, kept, stacklevel=4)
    data = measured.calibration if settings.refit else None
    return factorize(
        work.dense, work.config, layers, table, data, quantize=settings.quantize, show_progress=work.show_progress
    )


class _Trials:
    """Compressions of one model to several budgets, each measured on series that are held out: all from one calibration.

    A budget is a share, of the parameters of attention and feed-forward or, with `target_speedup`, of the time of a forecast.
    """

    def __init__(self, work: _Work) -> None:
        self.work, target = work, work.settings.target_speedup
        calibration = _calibration(work)
        if calibration is None or not calibration.held_out:
            what = (
                f"there are no data for {work.dense.source}"
                if calibration is None
                else "the calibration given has none"
            )
            raise ValueError(
                f"max_loss needs series that are held out, and {what}; see calibrate(num_held_out_batches=)."
            )
        self.bench = None if target is None else _bench(work)
        speed = None if self.bench is None else measure_speed(self.bench)
        measured = _measured(work, calibration, speed)
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
        self.measured = _weighed(self.at(self.first), measured)

    def at(self, share: float) -> _Work:
        """The work of a budget."""
        budget: dict[str, float] = {"total_ratio": share} if self.bench is None else {"target_speedup": 1 / share}
        work = _with(self.work, **{"max_loss": None} | budget)
        return replace(work, config=copy.deepcopy(self.work.config))

    def build(self, share: float, table: RankTable | None = None) -> PreTrainedModel:
        """The model of a budget, of its ranks or of those given."""
        work = replace(self.at(share), show_progress=False)
        return _built(work, self.measured, table or self.measured.table(work))

    def measure(self, model: PreTrainedModel, share: float) -> MeasuredLoss:
        """The loss of a model of a budget."""
        if self.bench is None:
            return self.held_out.measured(model, share)
        kept = kept_share(model.config, RankTable.of(model.config))
        return replace(self.held_out.measured(model, kept), speedup=1 / share)


def _within_loss(work: _Work) -> PreTrainedModel:
    """The smallest model that is expected to lose at most `max_loss`, the fastest, or one that is as fast as is asked for."""
    settings, trials = work.settings, _Trials(work)
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
    trials: _Trials, max_loss: float, target: float, search: Callable[[float, float], Found[PreTrainedModel]]
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


def _lowrank_config(dense: DenseCheckpoint, settings: CompressionSettings) -> PreTrainedConfig:
    """The low-rank configuration with the source's ranks, or with the user's table; what the settings ask for must be possible."""
    if settings.max_cache_ratio is not None and not any(name.kind in dense.family.cached for name, _ in dense.layers):
        raise ValueError(
            f"max_cache_ratio: {dense.source}, a {dense.source_class.__name__}, keeps no cache; leave it out."
        )
    if settings.method == "paper" and not dense.has_whole_heads:
        raise ValueError(
            f"method='paper' truncates the matrices of whole heads; {dense.source} is a {dense.source_class.__name__} with smaller ones."
        )
    tables = dense.given_ranks.to_dicts(dense.family.lowrank_config(dense.config))
    try:
        tables["attention_ranks"] |= settings.ranks or {}
        config = dense.family.lowrank_config(dense.config, **tables)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ranks is no table for this model: {error}") from error
    for name, _ in dense.layers if settings.policy == "ranks" else ():
        _check_heads(dense, name, RankTable.of(config)[name])
    return config


def _check_heads(dense: DenseCheckpoint, name: LayerName, ranks: LayerRanks) -> None:
    """Raise ValueError where a table has larger heads than a low-rank source."""
    if not isinstance(ranks, PerHeadRanks) or ranks == dense.given_ranks[name]:
        return
    largest = dense.largest_heads(name)
    for part, limit in vars(largest).items():
        if getattr(ranks, part) > limit:
            raise ValueError(
                f"ranks: {name}.{part} must be at most {limit}, as in {dense.source}, found {getattr(ranks, part)}."
            )


def _bench(work: _Work) -> Bench:
    """Where the model is: in its dtype on a GPU, in float32 on the CPU, as Chronos forecasts there."""
    weight = next(iter(work.dense.weights.values()))
    return bench_of(
        work.config,
        encoder_only=work.dense.model_class is T5EncoderModel,
        device=weight.device,
        dtype=weight.dtype if weight.device.type == "cuda" else torch.float32,
    )


def _calibration(work: _Work) -> Calibration | None:
    """The calibration that was given, or that of the data that were given; None for weights alone."""
    dense, settings, data = work.dense, work.settings, work.settings.calibration
    if isinstance(data, (str, os.PathLike)) and str(data).endswith(".safetensors"):
        data = Calibration.load(data)
    if isinstance(data, Calibration):
        data.check(dense)
        return data
    if data is None:
        return None
    has_own_data = objective_of(dense.config, dense.model_class).has_own_data
    if isinstance(data, str) and data == "synthetic" and not has_own_data:
        warnings.warn(
            f"{dense.source} is no Chronos checkpoint, so there is nothing to calibrate it on; it is compressed by its weights alone. "
            "Give calibration= batches of tokens, or calibration=None to say that this is meant.",
            stacklevel=4,
        )
        return None
    return calibrate(
        dense,
        data,
        num_held_out_batches=0 if settings.max_loss is None else HELD_OUT_BATCHES,
        feed_forward=settings.has_feed_forward,
        seed=settings.seed,
        show_progress=work.show_progress,
    )


def _attention_layers(work: _Work, calibration: Calibration | None) -> list[AttentionLayer]:
    """All attention layers, with the bases of the forms that each may get."""
    dense, settings = work.dense, work.settings
    given = RankTable.of(work.config)
    layers = []
    for name, _ in progress(dense.layers, "Measuring attention", work.show_progress):
        form = given[name].form if settings.policy == "ranks" else work.forms[name.kind]
        layers.append(
            attention_layer(
                dense,
                name,
                None if calibration is None else calibration.attention(name),
                tuple(FORMS) if form == "auto" else (form,),
                # A latent of more than half of d_model rarely saves anything; the other policies may ask for one.
                max_rank=dense.config.d_model // 2 if settings.has_budgets else None,
            )
        )
    return layers


def _feed_forward_layers(work: _Work, calibration: Calibration | None) -> list[FeedForwardLayer]:
    """All feed-forward layers where they are compressed, otherwise none."""
    if not work.settings.has_feed_forward:
        return []
    names = progress(work.dense.feed_forward_layers, "Measuring feed-forward", work.show_progress)
    return [
        feed_forward_layer(work.dense, name, None if calibration is None else calibration.feed_forward(name))
        for name, _ in names
    ]


def _weighed(work: _Work, measured: _Measured, *, arithmetic: float = PROBE_ARITHMETIC) -> _Measured:
    """With losses as they are measured: the spectra of components say how a loss falls with the rank, not how much it is.

    Each form is measured at the ranks that it would get alone, or at the fewest where those are not fast enough: a guess for one beside a
    measurement of the other would often win by being wrong.
    """
    calibration, feed_forward, components = measured.calibration, measured.feed_forward, measured.components
    if calibration is None or not (work.settings.has_budgets or feed_forward):
        return measured
    has_choice = "auto" in work.forms.values()
    forms = (
        [[layer.only(form) for layer in measured.attention] for form in FORMS] if has_choice else [measured.attention]
    )
    losses: dict[ComponentName, float] = {}
    ranks: dict[ComponentName, int] = {}
    float_model = work.dense.float_model()
    for attention in forms:
        alone, within_reach = replace(measured, attention=attention), work
        if measured.speed is not None:
            target: Any = work.settings.target_speedup
            within_reach = _with(work, target_speedup=min(target, alone.largest_speedup(work)))
        trial = alone.table(within_reach)
        new: list[Layer] = [*attention, *(feed_forward if not losses else [])]
        ranks |= component_ranks(new, trial)
        losses |= measured_losses(
            work.dense,
            float_model,
            new,
            trial,
            calibration.batches,
            components,
            arithmetic=arithmetic,
            show_progress=work.show_progress,
        )
    return replace(measured, components=reweighted(components, ranks, losses))


def _record(
    work: _Work,
    layers: list[Layer],
    table: RankTable,
    losses: Mapping[ComponentName, float],
    calibration: Calibration | None,
    speed: Speed | None,
) -> dict[str, Any]:
    dense, settings = work.dense, work.settings
    more: dict[str, Any] = {
        "calibration": None if calibration is None else {**calibration.record, "refit": settings.refit}
    }
    if settings.policy != "ranks":
        more |= {"form": work.forms, "multiple_of": settings.multiple_of}
        if settings.feed_forward_ratio is not None:
            more["feed_forward_ratio"] = settings.feed_forward_ratio
    if speed is not None:
        more["speed"] = speed.record(RankTable({layer.name: layer.dense_ranks for layer in layers}), table)
    return record_of(dense, settings, losses, seed=None if calibration is None else settings.seed, **more)


def _as_the_paper(work: _Work) -> PreTrainedModel:
    """The paper's post-training method: each of q, k, v and o at its own rank, written back dense."""
    dense, settings, config = work.dense, work.settings, work.config
    truncated, kept, losses = truncate_matrices(
        dense, settings.policy, settings.policy_value, show_progress=work.show_progress
    )
    share = sum(kept.values()) / (len(kept) * min(dense.config.d_model, dense.config.num_heads * dense.config.d_kv))
    kept_ranks = {str(name): rank for name, rank in kept.items()}
    config.compression = record_of(dense, settings, losses, seed=None, kept_ranks=kept_ranks, kept_rank_ratio=share)
    warn_of_loss(settings, losses, share, stacklevel=3)
    return build(dense, config, own_weights(dense) | truncated)
