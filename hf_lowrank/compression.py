"""The one road from a dense checkpoint to a low-rank one: load, measure, allocate, factorize."""

from __future__ import annotations

import copy
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, T5Config

from .allocation import (
    Component,
    allocate_energy,
    allocate_epsilon,
    allocate_epsilon_at_ratio,
    allocate_ratio,
    allocate_uniform,
    check_argument,
)
from .checkpoint import LOWRANK_CLASSES, DenseCheckpoint, build_model, load_dense
from .configuration_lowrank_t5 import (
    ATTENTION_KINDS,
    LowRankT5Config,
    attention_form,
    attention_parameters,
    scheduled_attention_ranks,
)
from .factorization import (
    AttentionWeights,
    attention_grams,
    joint_singular_values,
    latent_singular_values,
    truncate_latent,
    truncate_matrix,
    truncate_per_head,
)
from .summary import summarize

__all__ = ["compress_pretrained"]

Form = Literal["per_head", "latent"]
Method = Literal["joint", "paper"]
Ranks = dict[str, dict[str, Any]]  # "cross.3" -> the entry of the layer in LowRankT5Config.attention_ranks

# Of the squared singular values; above it a forecast is likely to change visibly.
LOSS_WORTH_A_WARNING = 0.1


# --- measure -----------------------------------------------------------------------------------------------------


def _sketch_rank(rank: int, config: T5Config) -> int | None:
    """The rank of a query or output sketch beside a latent of that rank, or None where a dense matrix is smaller."""
    d, n = config.d_model, config.num_heads
    return rank if rank * (d + n * rank) < n * rank * d else None


def _latent_entry(rank: int, config: T5Config) -> dict[str, int | None]:
    return {"latent": rank, "query": _sketch_rank(rank, config), "output": _sketch_rank(rank, config)}


def _components(name: str, weights: AttentionWeights, form: Form, config: T5Config) -> list[Component]:
    """The components of one attention layer: `qk` and `vo`, or `latent`, whose sketches have the latent's rank."""
    d, n, h = config.d_model, config.num_heads, config.d_kv
    if form == "latent":
        costs = [0] + [attention_parameters(_latent_entry(r, config), d_model=d, num_heads=n) for r in range(1, d + 1)]
        values = latent_singular_values(weights).cpu().numpy()
        return [Component(f"{name}.latent", values, np.array(costs), dense_parameters=4 * d * n * h)]
    costs = 2 * d * n * np.arange(h + 1)
    return [
        Component(f"{name}.{part}", joint_singular_values(*grams).cpu().numpy(), costs, dense_parameters=2 * d * n * h)
        for part, grams in zip(("qk", "vo"), attention_grams(weights))
    ]


def _matrix_components(name: str, weights: dict[str, torch.Tensor]) -> list[Component]:
    """q, k, v and o by themselves, as the paper counts them: the share kept of a matrix is rank / full rank."""
    components = []
    for part, weight in weights.items():
        values = torch.linalg.svdvals(weight.float()).cpu().numpy()[None]
        full = values.shape[1]
        costs = np.arange(full + 1) * (weight.numel() // full)
        components.append(Component(f"{name}.{part}", values, costs, dense_parameters=weight.numel()))
    return components


# --- allocate ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """How the ranks are chosen: the name of a policy and its argument, as given to `compress_pretrained`."""

    name: str
    value: Any

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Policy:
        given = {name: value for name, value in arguments.items() if value is not None}
        if len(given) != 1:
            found = "none" if not given else " and ".join(sorted(given))
            raise ValueError(f"Give exactly one of {', '.join(arguments)}; found {found}.")
        name, value = next(iter(given.items()))
        # Plain numbers and a copy of the table, for they are recorded in the config and saved as JSON.
        value = value.item() if isinstance(value, np.generic) else copy.deepcopy(value)
        if name not in ("schedule", "ranks"):
            check_argument(name, value)
        return cls(name, value)

    def allocate(self, components: list[Component], *, method: Method, multiple_of: int) -> dict[str, int]:
        """The rank of each component, for the policies that need their spectra."""
        if self.name == "ratio" and method == "paper":
            return allocate_epsilon_at_ratio(components, self.value)
        allocate: Callable[..., dict[str, int]] = {
            "epsilon": allocate_epsilon,
            "ratio": allocate_ratio,
            "uniform": allocate_uniform,
            "energy": allocate_energy,
        }[self.name]
        return allocate(components, self.value, multiple_of=multiple_of)


def _scheduled(schedule: Any, forms: Mapping[str, Form], config: T5Config, layers: list[str]) -> Ranks:
    """The entries of all layers that follow from (base_rank, rank_growth[, rounding])."""
    if not isinstance(schedule, (tuple, list)) or len(schedule) not in (2, 3):
        raise ValueError(
            f"schedule must be (base_rank, rank_growth) or (base_rank, rank_growth, rounding), found {schedule!r}."
        )
    base_rank, rank_growth, rounding = (*schedule, "ceil")[:3]
    ranks: Ranks = {}
    for kind, form in forms.items():
        limit = config.d_model if form == "latent" else config.d_kv
        column = scheduled_attention_ranks(
            base_rank,
            rank_growth,
            num_layers=config.num_layers,
            num_decoder_layers=config.num_decoder_layers,
            d_kv=limit,
            rounding=rounding,
        )[kind]
        for i, entry in enumerate(column):
            ranks[f"{kind}.{i}"] = _latent_entry(entry["qk"], config) if form == "latent" else entry
    return {layer: ranks[layer] for layer in layers}


def _forms(form: Form | Mapping[str, Form]) -> dict[str, Form]:
    if not isinstance(form, (str, Mapping)):
        raise ValueError(f"form must be 'per_head', 'latent' or a dictionary of them, found {form!r}.")
    forms = dict.fromkeys(ATTENTION_KINDS, form) if isinstance(form, str) else dict(form)
    if unknown := set(forms) - set(ATTENTION_KINDS):
        raise ValueError(f"form has unknown kinds of attention {sorted(unknown)}; known are {list(ATTENTION_KINDS)}.")
    forms = {kind: forms.get(kind, "per_head") for kind in ATTENTION_KINDS}
    for value in forms.values():
        if value not in ("per_head", "latent"):
            raise ValueError(f"form must be 'per_head' or 'latent', found {value!r}.")
    return forms


# --- factorize ---------------------------------------------------------------------------------------------------


def _factorized(weights: AttentionWeights, ranks: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    truncate = truncate_latent if attention_form(ranks) == "latent" else truncate_per_head
    return truncate(weights, **ranks).to_linear(dtype)


def _own(dense: DenseCheckpoint) -> dict[str, torch.Tensor]:
    """The weights for a new model: the checkpoint's own, or copies where they belong to the caller (ties kept)."""
    if not dense.is_shared:
        return dense.weights
    copies = {tensor.data_ptr(): tensor.clone() for tensor in dense.weights.values()}
    return {name: copies[tensor.data_ptr()] for name, tensor in dense.weights.items()}


def compress_pretrained(
    model: str | os.PathLike | PreTrainedModel,
    *,
    epsilon: float | None = None,
    ratio: float | None = None,
    schedule: tuple | None = None,
    uniform: int | None = None,
    energy: float | None = None,
    ranks: dict[str, list[dict[str, Any]]] | None = None,
    form: Form | Mapping[str, Form] = "per_head",
    method: Method = "joint",
    multiple_of: int = 1,
    show_progress: bool = False,
) -> PreTrainedModel:
    """Turn a dense Chronos-T5 (or any T5) checkpoint into one whose attention layers have the rank they need.

    Args:
        model: A Hub id, a local folder, `"reference"`, or a loaded T5 model, which is left as it is.
        epsilon: Keep the singular values with sigma_j / sigma_1 >= epsilon (the paper's rule).
        ratio: Keep at most this share of the attention parameters, spent where it saves the most.
        schedule: (base_rank, rank_growth[, rounding]): d~_i = ceil(d~_0 (1 + i)^alpha).
        uniform: The same rank everywhere.
        energy: The smallest ranks that drop at most this share of the squared singular values.
        ranks: An explicit table, as `LowRankT5Config.attention_ranks`; kinds left out stay dense.
        form: `"per_head"` (smaller heads) or `"latent"` (one latent a token for all heads), for all attention or, as a
            dictionary, for each of `"encoder_self"`, `"decoder_self"` and `"cross"`.
        method: `"joint"` truncates the products W_q^T W_k and W_o W_v; `"paper"` truncates each of q, k, v and o alone and
            writes the dense product back, as the scripts of arXiv 2510.03358 do, a baseline that saves nothing at
            run time.
        multiple_of: Round ranks up to a multiple (8 is kind to hardware).
        show_progress: Show a progress bar.

    Returns:
        A model of the matching `LowRankT5...` class in evaluation mode, in the checkpoint's dtype, on its device, with its
        generation config and `chronos_config`. `config.compression` records how it was made.

    Raises:
        ValueError: An argument is out of range, two policies are given, or the checkpoint is not a sound T5.
        OSError: The checkpoint cannot be read.

    Warns:
        UserWarning: A ratio below 0.2, or a spectrum so flat that much of it is dropped; with the expected loss.
    """
    policy = Policy.from_arguments(
        epsilon=epsilon, ratio=ratio, schedule=schedule, uniform=uniform, energy=energy, ranks=ranks
    )
    check_argument("multiple_of", multiple_of)
    if method not in ("joint", "paper"):
        raise ValueError(f"method must be 'joint' or 'paper', found {method!r}.")
    if method == "paper" and (policy.name in ("schedule", "ranks") or multiple_of != 1 or form != "per_head"):
        raise ValueError(
            "method='paper' takes epsilon, ratio, uniform or energy, and neither form nor multiple_of: "
            "it keeps the dense shapes."
        )
    if policy.name == "ranks" and form != "per_head":
        raise ValueError("ranks has the form of every layer: leave out form.")
    if policy.name in ("schedule", "ranks") and multiple_of != 1:
        raise ValueError(f"multiple_of rounds what a policy finds; {policy.name} says the ranks themselves.")
    forms = _forms(form)
    dense = load_dense(model)
    compress = _truncate_matrices if method == "paper" else _truncate_products
    return compress(dense, policy, forms, multiple_of, show_progress)


def _truncate_products(
    dense: DenseCheckpoint, policy: Policy, forms: dict[str, Form], multiple_of: int, show_progress: bool
) -> PreTrainedModel:
    layers = dict(dense.layers)
    try:
        config = lowrank_config(dense.config, policy.value if policy.name == "ranks" else {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"ranks is no table for this model: {error}") from error
    if policy.name == "ranks":
        table: Ranks = {layer: _entry(config, layer) for layer in layers}
    elif policy.name == "schedule":
        table = _scheduled(policy.value, forms, dense.config, list(layers))
    components = {
        component.name: component
        for layer, module in _progress(layers.items(), "Measuring", show_progress)
        for component in _components(
            layer, dense.attention(module), _form_of(layer, policy, forms, config), dense.config
        )
    }
    if policy.name not in ("ranks", "schedule"):
        chosen = policy.allocate(list(components.values()), method="joint", multiple_of=multiple_of)
        table = {layer: _layer_entry(layer, chosen, dense.config) for layer in layers}
    for layer, entry in table.items():
        kind, index = layer.split(".")
        config.attention_ranks[kind][int(index)] = entry
    config.validate_ranks()
    losses = _predicted_losses(components, table)
    chosen_by = {} if policy.name == "ranks" else {"form": forms, "multiple_of": multiple_of}
    config.compression = _record(dense, "joint", policy, losses, **chosen_by)
    _warn_of_loss(policy, losses, _kept_share(config, layers))

    weights = _own(dense)
    for layer, module in _progress(layers.items(), "Factorizing", show_progress):
        if _is_full(table[layer], dense.config):
            continue
        dtype = weights[f"{module}.q.weight"].dtype
        attention = dense.attention(module)
        for part in "qkvo":  # dropped as we go, so that the two models are never both whole in memory
            del weights[f"{module}.{part}.weight"]
        for part, weight in _factorized(attention, table[layer], dtype).items():
            weights[f"{module}.{part}.weight"] = weight
    return _build(dense, config, weights)


def _truncate_matrices(
    dense: DenseCheckpoint, policy: Policy, forms: dict[str, Form], multiple_of: int, show_progress: bool
) -> PreTrainedModel:
    """The paper's post-training method: each of q, k, v and o at its own epsilon-rank, written back dense."""
    config = lowrank_config(dense.config, {})
    matrices = {
        layer: {part: dense.weights[f"{module}.{part}.weight"] for part in "qkvo"} for layer, module in dense.layers
    }
    components = {
        component.name: component
        for layer, parts in _progress(matrices.items(), "Measuring", show_progress)
        for component in _matrix_components(layer, parts)
    }
    kept = policy.allocate(list(components.values()), method="paper", multiple_of=1)
    losses = {name: float(component.loss[kept[name]]) for name, component in components.items()}
    kept_parameters = sum(int(components[name].parameters[rank]) for name, rank in kept.items())
    share = kept_parameters / sum(component.dense_parameters for component in components.values())
    config.compression = _record(dense, "paper", policy, losses, kept_ranks=kept, kept_rank_ratio=share)
    _warn_of_loss(policy, losses, share)

    weights = _own(dense)
    for layer, module in _progress(dense.layers, "Factorizing", show_progress):
        for part, weight in matrices[layer].items():
            if kept[f"{layer}.{part}"] < min(weight.shape):
                weights[f"{module}.{part}.weight"] = truncate_matrix(weight, kept[f"{layer}.{part}"])
    return _build(dense, config, weights)


def _build(dense: DenseCheckpoint, config: LowRankT5Config, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    return build_model(
        LOWRANK_CLASSES[dense.model_class],
        config,
        weights,
        tied_keys=dense.tied_keys,
        generation_config=dense.generation_config,
    )


def lowrank_config(config: T5Config, attention_ranks: dict) -> LowRankT5Config:
    """The configuration of a dense T5 as a `LowRankT5Config`, with a table of ranks or, where it is empty, full rank."""
    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        values.pop(name, None)
    return LowRankT5Config(**values, attention_ranks=attention_ranks)


def _entry(config: LowRankT5Config, layer: str) -> dict[str, Any]:
    kind, index = layer.split(".")
    return config.attention_ranks[kind][int(index)]


def _form_of(layer: str, policy: Policy, forms: dict[str, Form], config: LowRankT5Config) -> Form:
    if policy.name == "ranks":
        return attention_form(_entry(config, layer))  # type: ignore[return-value]
    return forms[layer.split(".")[0]]


def _layer_entry(layer: str, chosen: dict[str, int], config: T5Config) -> dict[str, Any]:
    if f"{layer}.latent" in chosen:
        return _latent_entry(chosen[f"{layer}.latent"], config)
    return {"qk": chosen[f"{layer}.qk"], "vo": chosen[f"{layer}.vo"]}


def _is_full(entry: dict[str, Any], config: T5Config) -> bool:
    return entry == {"qk": config.d_kv, "vo": config.d_kv}


def _predicted_losses(components: dict[str, Component], table: Ranks) -> dict[str, float]:
    """The share of the squared singular values that each component drops."""
    losses = {}
    for name, component in components.items():
        layer, part = name.rsplit(".", 1)
        entry = table[layer]
        if part == "latent":
            full = component.full_rank
            losses[name] = component.loss_at(entry["latent"], entry["query"] or full, entry["output"] or full)
        else:
            losses[name] = float(component.loss[entry[part]])
    return losses


def _kept_share(config: LowRankT5Config, layers: Mapping[str, str]) -> float:
    rows = [row for row in summarize(config).rows if f"{row.kind}.{row.layer}" in layers]
    return sum(row.parameters for row in rows) / sum(row.dense_parameters for row in rows)


def _warn_of_loss(policy: Policy, losses: dict[str, float], kept: float) -> None:
    loss = sum(losses.values()) / max(1, len(losses))
    if loss > LOSS_WORTH_A_WARNING or (policy.name == "ratio" and policy.value < 0.2):
        worst = max(losses, key=lambda name: losses[name])
        flat = " The spectra are flat: this checkpoint has little rank to spare." if loss > 0.5 * (1 - kept) else ""
        warnings.warn(
            f"Keeping {kept:.1%} of the attention without calibration is expected to drop {loss:.1%} of the squared singular "
            f"values on average and {losses[worst]:.1%} in {worst}; forecasts may change.{flat} "
            "Keep more, or compare the two with `hf-lowrank evaluate`.",
            stacklevel=4,
        )


def _record(dense: DenseCheckpoint, method: Method, policy: Policy, losses: dict[str, float], **more: Any) -> dict:
    """What `config.compression` says of how the model was made; nothing random happens, so there is no seed."""
    value = list(policy.value) if isinstance(policy.value, tuple) else policy.value
    packages = ("hf-lowrank", "torch", "transformers", "chronos-forecasting")
    return {
        "method": method,
        "policy": policy.name,
        "arguments": {policy.name: value},
        **more,
        "source": dense.source,
        "source_class": dense.model_class.__name__,
        "seed": None,
        "predicted_loss": losses,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def _progress(items: Iterable, description: str, show: bool) -> Iterable:
    return track(list(items), description=description, disable=not show, console=Console(stderr=True))
