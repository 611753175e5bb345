"""The one road from a dense checkpoint to a low-rank one: load, calibrate, measure, allocate, factorize, refit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, T5EncoderModel

from ..checkpoints.dense import DenseCheckpoint, load_dense
from ..checkpoints.families import T5
from ..checkpoints.rank_table import FORMS, ComponentName, RankTable
from ..progress import progress
from .allocation import Component
from .assembly import build, factorize, own_weights
from .baseline import truncate_matrices
from .calibration import Calibration, calibrate
from .latency import Speed, measure_speed
from .layers import AttentionLayer, FeedForwardLayer, Layer, attention_layer, feed_forward_layer
from .policies import choose_ranks, component_ranks
from .record import kept_share, record_of, warn_of_loss
from .sensitivity import measured_losses, reweighted
from .settings import CompressionSettings, SettingsArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["compress_pretrained"]


def compress_pretrained(
    model: str | os.PathLike | PreTrainedModel,
    settings: CompressionSettings | None = None,
    *,
    show_progress: bool = False,
    **arguments: Unpack[SettingsArguments],
) -> PreTrainedModel:
    """Turn a dense Chronos checkpoint (T5, Bolt, Chronos-2, or any T5) into one whose layers have the rank they need.

        model = compress_pretrained("amazon/chronos-bolt-small", total_ratio=0.25)

    Args:
        model: A Hub id, a local folder, `"reference"`, or a loaded model, which is left as it is.
        settings: What is asked for.
        show_progress: Show progress bars.
        arguments: The fields of `CompressionSettings`, in place of `settings`; there they are explained. One of these says how ranks
            are chosen: `ratio`, `total_ratio`, `max_cache_ratio`, `target_speedup` (budgets, which may be combined), `epsilon`, `energy`,
            `uniform`, `schedule`, `ranks`. Beside it `feed_forward_ratio`, `form`, `method`, `multiple_of`, `calibration`, `refit`, `seed`.

    Returns:
        A model of the matching `LowRankT5...` class in evaluation mode, in the checkpoint's dtype, on its device, with its
        generation config and `chronos_config`. `config.compression` records how it was made.

    Raises:
        ValueError: An argument is out of range, two policies are given, or the checkpoint is not a sound T5.
        TypeError: An argument is unknown.
        OSError: The checkpoint cannot be read.

    Warns:
        UserWarning: Without calibration: a ratio below 0.2, or a spectrum so flat that much of it is dropped.
    """
    if settings is None:
        settings = CompressionSettings(**arguments)
    elif arguments:
        raise ValueError(f"Give either settings or {', '.join(arguments)}, not both.")
    dense = load_dense(model)
    config = _lowrank_config(dense, settings)
    if settings.method == "paper":
        return _as_the_paper(dense, config, settings, show_progress)
    speed = None if settings.target_speedup is None else _speed(dense, config)
    calibration = _calibration(dense, settings, show_progress)
    attention = _attention_layers(dense, settings, config, calibration, show_progress)
    feed_forward = _feed_forward_layers(dense, settings, calibration, show_progress)
    layers: list[Layer] = [*attention, *feed_forward]
    components = {
        name: component
        for layer in layers
        for name, component in layer.components(weight=1.0 if calibration is None else None).items()
    }
    if calibration is not None and (settings.has_budgets or feed_forward):
        components = _weighed(
            dense, settings, attention, feed_forward, components, config, speed, calibration, show_progress
        )
    table = choose_ranks(settings, attention, feed_forward, components, config, speed)
    table.write(config)
    losses = {name: float(components[name].loss[rank]) for name, rank in component_ranks(layers, table).items()}
    config.compression = _record(dense, settings, layers, table, losses, calibration, speed)
    if calibration is None:
        warn_of_loss(settings, losses, kept_share(config, [layer.name for layer in attention]), stacklevel=2)
    return factorize(
        dense, config, layers, table, calibration if settings.refit else None, show_progress=show_progress
    )


def _lowrank_config(dense: DenseCheckpoint, settings: CompressionSettings) -> PreTrainedConfig:
    """The low-rank configuration at full rank, or with the user's table; what the settings ask for must be possible."""
    settings.forms_for(dense.family)
    if settings.target_speedup is not None and dense.family is not T5:
        raise ValueError(
            f"target_speedup is measured for T5 models; {dense.source} is a {dense.model_class.__name__}."
        )
    try:
        return dense.family.lowrank_config(dense.config, attention_ranks=settings.ranks or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"ranks is no table for this model: {error}") from error


def _speed(dense: DenseCheckpoint, config: PreTrainedConfig) -> Speed:
    """What ranks cost where the model is: in its dtype on a GPU, in float32 on the CPU, as Chronos forecasts there."""
    weight = next(iter(dense.weights.values()))
    return measure_speed(
        config,
        encoder_only=dense.model_class is T5EncoderModel,
        device=weight.device,
        dtype=weight.dtype if weight.device.type == "cuda" else torch.float32,
    )


def _calibration(dense: DenseCheckpoint, settings: CompressionSettings, show_progress: bool) -> Calibration | None:
    """The calibration that was given, or that of the data that were given; None for weights alone."""
    data = settings.calibration
    if isinstance(data, (str, os.PathLike)) and str(data).endswith(".safetensors"):
        data = Calibration.load(data)
    if isinstance(data, Calibration):
        data.check(dense)
        return data
    if data is None:
        return None
    is_chronos = getattr(dense.config, "chronos_config", None) is not None
    if isinstance(data, str) and data == "synthetic" and not is_chronos:
        warnings.warn(
            f"{dense.source} is no Chronos checkpoint, so there is nothing to calibrate it on; it is compressed by its weights alone. "
            "Give calibration= batches of tokens, or calibration=None to say that this is meant.",
            stacklevel=3,
        )
        return None
    return calibrate(
        dense, data, feed_forward=settings.has_feed_forward, seed=settings.seed, show_progress=show_progress
    )


def _attention_layers(
    dense: DenseCheckpoint,
    settings: CompressionSettings,
    config: PreTrainedConfig,
    calibration: Calibration | None,
    show_progress: bool,
) -> list[AttentionLayer]:
    """All attention layers, with the bases of the forms that each may get."""
    forms, given = settings.forms_for(dense.family), RankTable.of(config)
    layers = []
    for name, _ in progress(dense.layers, "Measuring attention", show_progress):
        form = given[name].form if settings.policy == "ranks" else forms[name.kind]
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


def _feed_forward_layers(
    dense: DenseCheckpoint, settings: CompressionSettings, calibration: Calibration | None, show_progress: bool
) -> list[FeedForwardLayer]:
    """All feed-forward layers where they are compressed, otherwise none."""
    if not settings.has_feed_forward:
        return []
    return [
        feed_forward_layer(dense, name, None if calibration is None else calibration.feed_forward(name))
        for name, _ in progress(dense.feed_forward_layers, "Measuring feed-forward", show_progress)
    ]


def _weighed(
    dense: DenseCheckpoint,
    settings: CompressionSettings,
    attention: list[AttentionLayer],
    feed_forward: list[FeedForwardLayer],
    components: Mapping[ComponentName, Component],
    config: PreTrainedConfig,
    speed: Speed | None,
    calibration: Calibration,
    show_progress: bool,
) -> dict[ComponentName, Component]:
    """The components with losses as they are measured: their spectra say how a loss falls with the rank, not how much it is.

    Each form is measured at the ranks that it would get alone: a guess for one beside a measurement of the other would often win
    by being wrong.
    """
    has_choice = "auto" in settings.forms_for(dense.family).values()
    rounds = [[layer.only(form) for layer in attention] for form in FORMS] if has_choice else [attention]
    losses: dict[ComponentName, float] = {}
    ranks: dict[ComponentName, int] = {}
    float_model = dense.float_model()
    for alone in rounds:
        trial = choose_ranks(settings, alone, feed_forward, components, config, speed)
        new: list[Layer] = [*alone, *(feed_forward if not losses else [])]
        ranks |= component_ranks(new, trial)
        losses |= measured_losses(
            dense, float_model, new, trial, calibration.batches, components, show_progress=show_progress
        )
    return reweighted(components, ranks, losses)


def _record(
    dense: DenseCheckpoint,
    settings: CompressionSettings,
    layers: list[Layer],
    table: RankTable,
    losses: Mapping[ComponentName, float],
    calibration: Calibration | None,
    speed: Speed | None,
) -> dict[str, Any]:
    more: dict[str, Any] = {
        "calibration": None if calibration is None else {**calibration.record, "refit": settings.refit}
    }
    if settings.policy != "ranks":
        more |= {"form": settings.forms_for(dense.family), "multiple_of": settings.multiple_of}
        if settings.feed_forward_ratio is not None:
            more["feed_forward_ratio"] = settings.feed_forward_ratio
    if speed is not None:
        more["speed"] = speed.record(RankTable({layer.name: layer.dense_ranks for layer in layers}), table)
    return record_of(dense, settings, losses, seed=None if calibration is None else settings.seed, **more)


def _as_the_paper(
    dense: DenseCheckpoint, config: PreTrainedConfig, settings: CompressionSettings, show_progress: bool
) -> PreTrainedModel:
    """The paper's post-training method: each of q, k, v and o at its own rank, written back dense."""
    truncated, kept, losses = truncate_matrices(
        dense, settings.policy, settings.policy_value, show_progress=show_progress
    )
    share = sum(kept.values()) / (len(kept) * min(dense.config.d_model, dense.config.num_heads * dense.config.d_kv))
    kept_ranks = {str(name): rank for name, rank in kept.items()}
    config.compression = record_of(dense, settings, losses, seed=None, kept_ranks=kept_ranks, kept_rank_ratio=share)
    warn_of_loss(settings, losses, share, stacklevel=3)
    return build(dense, config, own_weights(dense) | truncated)
