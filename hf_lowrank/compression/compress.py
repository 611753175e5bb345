"""The one road from a checkpoint to a smaller one: load, calibrate, measure, allocate, factorize, refit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from chronos import BaseChronosPipeline
from transformers import PreTrainedModel

from ..checkpoints.summary import summarize
from ..progress import progress
from .allocation import check_argument
from .assembly import build, own_weights
from .baseline import truncate_matrices
from .calibration import calibrate
from .layers import Projection
from .loss_bound import MeasuredLoss
from .measured import attention_layers, built, measure_layers, weighed
from .plan import CompressionPlan, PlannedSize
from .policies import choose_ranks
from .record import record_of, warn_of_loss
from .search import Trials, as_fast, within_loss
from .settings import POLICIES, CompressionSettings, SettingsArguments
from .work import Work, begin, calibration_of, with_arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["compress_pretrained", "loss_curve", "plan_compression", "projections_within"]

CURVE = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)  # budgets of `loss_curve`


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
    work = begin(model, settings, arguments, dtype=dtype, device=device, show_progress=show_progress)
    if work.settings.method == "paper":
        return _as_the_paper(work)
    return _jointly(work) if work.settings.max_loss is None else within_loss(work)


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
    work = begin(model, settings, arguments, dtype=dtype, device=device, show_progress=False)
    settings, config = work.settings, work.config
    given = summarize(config)
    is_table = settings.method != "paper" and settings.policy in ("uniform", "schedule", "ranks")
    if is_table:
        attention = attention_layers(work, None)  # their ranks, alone, depend on no data
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
    trials = Trials(begin(model, settings, {}, dtype=dtype, device=device, show_progress=show_progress))
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
    work = begin(model, asked, {}, dtype="auto", device=None, show_progress=False)
    calibration = calibrate(
        work.dense, num_batches=num_batches, num_refit_batches=num_batches, seed=seed, show_progress=False
    )
    measured = weighed(work, measure_layers(work, calibration, None), arithmetic=arithmetic)
    found = {}
    for total_ratio in total_ratios:
        table = measured.table(with_arguments(work, total_ratio=total_ratio))
        found[total_ratio] = [
            layer.points()[name.part].projection(rank)
            for layer in measured.layers
            for name, rank in layer.truncated(table[layer.name]).items()
        ]
    return found


def _jointly(work: Work) -> PreTrainedModel:
    """Queries with keys and values with outputs, each layer at the ranks that it needs, smaller at run time."""
    if work.settings.target_speedup is not None:
        return as_fast(work)
    measured = weighed(work, measure_layers(work, calibration_of(work), None))
    return built(work, measured, measured.table(work))


def _as_the_paper(work: Work) -> PreTrainedModel:
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
