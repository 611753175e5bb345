"""The low-rank model from the dense weights and the chosen ranks: factorized, refitted, in the checkpoint's dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.dense import DenseCheckpoint, build_model, in_float
from ..checkpoints.devices import quick_products
from ..checkpoints.rank_table import RankTable
from ..progress import progress
from .calibration import Calibration
from .layers import Layer
from .refit import refit
from .rounding import Rounding, bits_within

__all__ = ["build", "factorize", "own_weights"]


def factorize(
    dense: DenseCheckpoint,
    config: PreTrainedConfig,
    layers: Iterable[Layer],
    table: RankTable,
    calibration: Calibration | None,
    *,
    quantize: str | None = None,
    show_progress: bool | None,
) -> PreTrainedModel:
    """The model of this configuration, its last matrices refitted where there is a calibration.

    With `quantize`, `"int8"` or `"int4"`, matrices become integers; which ones is written into the configuration.
    """
    changed = [layer for layer in layers if table[layer.name] != layer.given_ranks]
    if calibration is None or not (changed or quantize):
        weights = own_weights(dense)
        for layer in progress(changed, "Factorizing", show_progress):
            dtypes = {name: weights.pop(name).dtype for name in layer.given_names}
            # Dropped as we go, so that the two models are never both whole in memory.
            weights |= {name: _cast(name, w, dtypes) for name, w in layer.factorize(table[layer.name]).items()}
        return build(dense, config, weights)

    float_model = dense.float_model()
    weights = dict(float_model.state_dict()) if dense.lowrank is None else in_float(dense.given_weights)
    for layer in progress(changed, "Factorizing", show_progress):
        for name in layer.given_names:
            del weights[name]
        weights |= layer.factorize(table[layer.name])
    places = {layer.module: layer.name for layer in changed}
    if quantize is not None:
        weights = _copies(weights)  # what is rounded is not to be the dense model's
        # Those that keep their ranks correct what was rounded before them.
        places = {module: name for name, module in (*dense.layers, *dense.feed_forward_layers)}
    lowrank = build(dense, config, weights)
    modules = tuple(f"{module}." for module in places)
    dtypes = {
        name: weight.dtype
        for name, weight in dense.given_weights.items()
        if name.startswith(modules) and "relative_attention_bias" not in name
    }
    rounding = None
    if quantize is not None:
        bits, added = bits_within(dense, lowrank, calibration.batches, quantize, show_progress=show_progress)
        own_dtypes = {name: weight.dtype for name, weight in dense.given_weights.items()}
        rounding = Rounding(lowrank, bits, lambda name: own_dtypes.get(name) or _dtype(name, dtypes))
        config.weight_bits = bits
        config.compression["quantize"] = {"to": quantize, "predicted_loss": added}
    with quick_products(float_model):
        refit(dense, float_model, lowrank, calibration, places, rounding, show_progress=show_progress)
    own = {name: weight for name, weight in own_weights(dense).items() if name not in dtypes}
    new = {name: _cast(name, w, dtypes) for name, w in lowrank.state_dict().items() if name not in own}
    weights = own | new
    if rounding is not None:
        rounding.round_the_rest()
        weights = rounding.weights(weights)
    return build(dense, config, weights)


def _cast(name: str, weight: torch.Tensor, given: Mapping[str, torch.dtype]) -> torch.Tensor:
    """A new weight in the dtype of the source's in its place, or beside it. Indices stay what they are."""
    return weight.to(_dtype(name, given)) if weight.is_floating_point() else weight


def _dtype(name: str, given: Mapping[str, torch.dtype]) -> torch.dtype:
    place = next((old for old in given if _matrix(old) == _matrix(name)), None)
    layer = f"{_matrix(name).rpartition('.')[0]}."
    beside = (dtype for old, dtype in given.items() if old.startswith(layer) and dtype.is_floating_point)
    return given[place] if place else next(beside)


def _matrix(name: str) -> str:
    """The name of the module that a weight is of, whole or as thin factors."""
    return name.removesuffix(".weight").removesuffix(".down").removesuffix(".up")


def own_weights(dense: DenseCheckpoint) -> dict[str, torch.Tensor]:
    """The weights for a new model: the source's own, or copies where they belong to the caller (ties kept)."""
    return _copies(dense.given_weights) if dense.is_shared else dict(dense.given_weights)


def _copies(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, of which those are tied that were."""
    copies = {tensor.data_ptr(): tensor.clone() for tensor in weights.values()}
    return {name: copies[tensor.data_ptr()] for name, tensor in weights.items()}


def build(dense: DenseCheckpoint, config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The low-rank model of a configuration with these weights.

    Raises:
        ValueError: One of them is not finite, as a number that float16 cannot hold.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"model: the compressed {name} has values that {dtype} cannot hold; give the model in a wider dtype, such as float32."
            )
    return build_model(
        dense.lowrank_class,
        config,
        weights,
        tied_keys=dense.tied_keys,
        generation_config=dense.generation_config,
    )
