"""What a compression says of itself: the record in the configuration, and a warning where much is likely to be lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.rank_table import ComponentName, LayerName, RankTable
from ..versions import versions
from .settings import CompressionSettings

__all__ = ["kept_share", "record_of", "warn_of_loss"]

# Of the squared singular values; above it a forecast is likely to change visibly.
LOSS_WORTH_A_WARNING = 0.1


def record_of(
    dense: DenseCheckpoint,
    settings: CompressionSettings,
    losses: Mapping[Any, float],
    *,
    seed: int | None,
    **more: Any,
) -> dict[str, Any]:
    """What `config.compression` says of how the model was made.

    Args:
        dense: What it was made of.
        settings: What was asked for.
        losses: The predicted loss of each component.
        seed: Of the calibration; None without one.
        more: Further entries.
    """
    arguments = {
        name: list(value) if isinstance(value, tuple) else value for name, value in settings.policy_arguments.items()
    }
    if dense.lowrank is not None and dense.lowrank.compression:
        more["source_compression"] = dense.lowrank.compression
    if dense.adapter is not None:
        more["adapter"] = dense.adapter.to_dict()
    return {
        "method": settings.method,
        "policy": settings.policy,
        "arguments": arguments,
        **more,
        "source": dense.source,
        "source_class": dense.source_class.__name__,
        "seed": seed,
        "predicted_loss": {str(name): loss for name, loss in losses.items()},
        "versions": versions(),
    }


def kept_share(config: PreTrainedConfig, layers: Iterable[LayerName]) -> float:
    """The share of the parameters of these layers that a low-rank configuration keeps."""
    table, full, names = RankTable.of(config), RankTable.full(config), list(layers)
    return sum(table[name].parameters(config) for name in names) / sum(full[name].parameters(config) for name in names)


def warn_of_loss(
    settings: CompressionSettings, losses: Mapping[ComponentName, float], kept: float, *, stacklevel: int
) -> None:
    """Warn where a compression by weights alone is likely to change forecasts."""
    loss = sum(losses.values()) / max(1, len(losses))
    if loss > LOSS_WORTH_A_WARNING or (settings.ratio or 1) < 0.2:
        worst = max(losses, key=lambda name: losses[name])
        flat = " The spectra are flat: this checkpoint has little rank to spare." if loss > 0.5 * (1 - kept) else ""
        warnings.warn(
            f"Keeping {kept:.1%} of the attention without calibration is expected to drop {loss:.1%} of the squared singular "
            f"values on average and {losses[worst]:.1%} in {worst}; forecasts may change.{flat} "
            "Keep more, or compare the two with `hf-lowrank evaluate`.",
            stacklevel=stacklevel + 1,
        )
