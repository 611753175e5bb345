"""The one road from a dense checkpoint to a low-rank one: load, calibrate, measure, allocate, factorize, refit."""

from __future__ import annotations

import copy
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, T5EncoderModel

from ..checkpoints.dense import DenseCheckpoint, build_model, load_dense
from ..checkpoints.families import Family
from ..checkpoints.summary import summarize
from ..models.configuration_lowrank_t5 import attention_form, scheduled_attention_ranks
from ..progress import progress
from .allocation import (
    Component,
    Options,
    allocate_budget,
    allocate_energy,
    allocate_epsilon,
    allocate_uniform,
    check_argument,
)
from .baseline import truncate_matrices
from .calibration import Calibration, calibrate
from .latency import Speed, measure_speed
from .layers import PARTS, AttentionLayer, FeedForwardLayer, Layer, attention_layer, feed_forward_layer
from .refit import refit as refit_outputs
from .sensitivity import measured_losses, reweighted

__all__ = ["compress_pretrained"]

Form = Literal["auto", "per_head", "latent"]
Method = Literal["joint", "paper"]
Table = dict[str, dict[str, Any]]  # "cross.3" -> the entry of the layer in its table of LowRankT5Config

# Of the squared singular values; above it a forecast is likely to change visibly.
LOSS_WORTH_A_WARNING = 0.1
# The arguments that are budgets, and what they bound.
BUDGETS = {
    "ratio": "parameters",
    "total_ratio": "parameters",
    "max_cache_ratio": "cache",
    "target_speedup": "seconds",
}
RANK_POLICIES = {"epsilon": allocate_epsilon, "uniform": allocate_uniform, "energy": allocate_energy}


@dataclass(frozen=True)
class Policy:
    """How the ranks are chosen: by one rule for each component, by a formula or table, or under budgets."""

    name: str
    arguments: dict[str, Any]

    @classmethod
    def from_arguments(cls, **arguments: Any) -> Policy:
        # Plain numbers and a copy of the table, for they are recorded in the config and saved as JSON.
        given = {
            name: value.item() if isinstance(value, np.generic) else copy.deepcopy(value)
            for name, value in arguments.items()
            if value is not None
        }
        budgets = [name for name in given if name in BUDGETS]
        if not given or (len(given) > 1 and len(budgets) < len(given)):
            found = "none" if not given else " and ".join(sorted(given))
            raise ValueError(
                f"Give exactly one of {', '.join(arguments)} (or several of {', '.join(BUDGETS)}); found {found}."
            )
        if "ratio" in given and "total_ratio" in given:
            raise ValueError(
                "Give either ratio (of the attention) or total_ratio (of attention and feed-forward), not both."
            )
        for name, value in given.items():
            if name not in ("schedule", "ranks"):
                check_argument(name, value)
        return cls(next(iter(given)) if len(given) == 1 else "budgets", given)

    @property
    def has_budgets(self) -> bool:
        return set(self.arguments) <= set(BUDGETS)

    @property
    def covers_feed_forward(self) -> bool:
        """Whether the feed-forward layers are under the budgets too."""
        return not {"total_ratio", "target_speedup"}.isdisjoint(self.arguments)

    @property
    def value(self) -> Any:
        """The argument of a policy that has one."""
        return next(iter(self.arguments.values()))


@dataclass(frozen=True)
class Choice:
    """What the user chose of the ranks: the policy, the form of each kind of attention, and the rest."""

    policy: Policy
    forms: dict[str, str]
    multiple_of: int
    feed_forward_ratio: float | None

    @property
    def has_feed_forward(self) -> bool:
        return self.feed_forward_ratio is not None or self.policy.covers_feed_forward

    @property
    def record(self) -> dict[str, Any]:
        """What the arguments beside the policy's own were."""
        if self.policy.name == "ranks":
            return {}
        record: dict[str, Any] = {"form": self.forms, "multiple_of": self.multiple_of}
        return record if self.feed_forward_ratio is None else record | {"feed_forward_ratio": self.feed_forward_ratio}


# --- allocate ----------------------------------------------------------------------------------------------------


def _scheduled(
    schedule: Any, layers: Iterable[AttentionLayer], forms: Mapping[str, str], config: PreTrainedConfig
) -> Table:
    """The entries of all layers that follow from (base_rank, rank_growth[, rounding])."""
    if not isinstance(schedule, (tuple, list)) or len(schedule) not in (2, 3):
        raise ValueError(
            f"schedule must be (base_rank, rank_growth) or (base_rank, rank_growth, rounding), found {schedule!r}."
        )
    base_rank, rank_growth, rounding = (*schedule, "ceil")[:3]
    table: Table = {}
    for layer in layers:
        kind, index = layer.name.split(".")
        columns = scheduled_attention_ranks(
            base_rank,
            rank_growth,
            num_layers=config.num_layers,
            num_decoder_layers=getattr(config, "num_decoder_layers", 0),
            d_kv=config.d_model if forms[kind] == "latent" else config.d_kv,
            rounding=rounding,
        )
        rank = columns.get(kind, columns["encoder_self"])[int(index)]["qk"]
        ranks = dict.fromkeys(PARTS[forms[kind]], rank)
        if layer.is_rotary:
            ranks["qk"] += rank % 2  # two for each frequency; a dense head is even
        table[layer.name] = layer.entry(ranks)
    return table


def _by_component(
    policy: Policy,
    layers: list[AttentionLayer],
    components: Mapping[str, Component],
    forms: Mapping[str, str],
    multiple_of: int,
) -> Table:
    """The entries of all layers by a rule that looks at one component at a time."""
    chosen = RANK_POLICIES[policy.name](
        [components[f"{layer.name}.{part}"] for layer in layers for part in PARTS[forms[layer.kind]]],
        policy.value,
        multiple_of=multiple_of,
    )
    return {
        layer.name: layer.entry({part: chosen[f"{layer.name}.{part}"] for part in PARTS[forms[layer.kind]]})
        for layer in layers
    }


def _within_budgets(
    budgets: Mapping[str, float],
    layers: Iterable[Layer],
    components: Mapping[str, Component],
    multiple_of: int,
    speed: Speed | None = None,
) -> Table:
    """The entries of all layers that keep the budgets and lose the least."""
    losses = {name: component.loss for name, component in components.items()}
    seconds = None if speed is None else speed.seconds
    options = {layer.name: layer.options(losses, multiple_of=multiple_of, seconds=seconds) for layer in layers}
    if "ratio" in budgets:  # of the attention alone
        for name, found in options.items():
            if "feed_forward" in name:
                found.costs["parameters"][:] = 0
    limits = {}
    for name, share in budgets.items():
        if name == "target_speedup" and speed is not None:
            limits["seconds"] = _seconds(share, speed.fixed, options)
            continue
        kind = BUDGETS.get(name, "parameters")
        dense = sum(float(found.costs[kind][0]) for found in options.values())
        if dense == 0:
            raise ValueError(f"{name}: an encoder alone keeps no {kind}; leave it out.")
        least = sum(float(found.costs[kind].min()) for found in options.values()) / max(1.0, dense)
        if least > share * (1 + 1e-12):
            raise ValueError(
                f"{name}={share} is too small: the smallest ranks keep {least:.4f} of the dense model's {kind}."
            )
        limits[kind] = share * dense
    return allocate_budget(options, limits)


def _seconds(target_speedup: float, fixed: float, options: Mapping[str, Options]) -> float:
    """What the layers together may take, beside what is fixed."""
    dense = fixed + sum(float(found.costs["seconds"][0]) for found in options.values())
    least = fixed + sum(float(found.costs["seconds"].min()) for found in options.values())
    if target_speedup * least > dense * (1 + 1e-12):
        raise ValueError(
            f"target_speedup={target_speedup} is too large: the smallest ranks are predicted to reach {dense / least:.4g} on this machine."
        )
    return dense / target_speedup - fixed


def _forms(form: Any, policy: Policy, family: Family) -> dict[str, str]:
    """The form of each kind of attention. Without a budget "auto" is smaller heads."""
    if not isinstance(form, (str, Mapping)):
        raise ValueError(f"form must be 'auto', 'per_head', 'latent' or a dictionary of them, found {form!r}.")
    kinds = list(family.attention)
    forms = dict.fromkeys(kinds, form) if isinstance(form, str) else dict(form)
    if unknown := set(forms) - set(kinds):
        raise ValueError(f"form has unknown kinds of attention {sorted(unknown)}; known are {kinds}.")
    forms = {kind: forms.get(kind, "auto") for kind in kinds}
    for kind, value in forms.items():
        if value not in ("auto", "per_head", "latent"):
            raise ValueError(f"form must be 'auto', 'per_head' or 'latent', found {value!r}.")
        if kind in family.rotary:
            if value == "latent" and not isinstance(form, str):
                raise ValueError(f"form: {kind} attention has rotary embeddings and can only be 'per_head'.")
            forms[kind] = "per_head"
    if not policy.has_budgets:
        forms = {kind: "per_head" if value == "auto" else value for kind, value in forms.items()}
    return forms


# --- the road ----------------------------------------------------------------------------------------------------


def compress_pretrained(
    model: str | os.PathLike | PreTrainedModel,
    *,
    ratio: float | None = None,
    total_ratio: float | None = None,
    max_cache_ratio: float | None = None,
    target_speedup: float | None = None,
    feed_forward_ratio: float | None = None,
    epsilon: float | None = None,
    energy: float | None = None,
    uniform: int | None = None,
    schedule: tuple | None = None,
    ranks: dict[str, list[dict[str, Any]]] | None = None,
    form: Form | Mapping[str, Form] = "auto",
    method: Method = "joint",
    multiple_of: int = 1,
    calibration: Any = "synthetic",
    refit: bool = True,
    seed: int = 0,
    show_progress: bool = False,
) -> PreTrainedModel:
    """Turn a dense Chronos checkpoint (T5, Bolt, Chronos-2, or any T5) into one whose layers have the rank they need.

    Args:
        model: A Hub id, a local folder, `"reference"`, or a loaded model, which is left as it is.
        ratio: Keep at most this share of the attention parameters, spent where it saves the most.
        total_ratio: The same of attention and feed-forward parameters together; the two share the budget.
        max_cache_ratio: Keep at most this share of the key/value cache of a token; alone or beside a ratio.
        target_speedup: Forecast this many times as fast as the dense model, by what ranks cost in attention and feed-forward
            layers on this machine, timed for some ten seconds (`hf_lowrank.compression.latency`): a prediction, for the workload that
            `config.compression["speed"]` records. Alone or beside the other budgets. Of Chronos-T5 and other T5 models only.
        feed_forward_ratio: Keep at most this share of the feed-forward parameters, beside any rule for the attention.
        epsilon: Keep the singular values with sigma_j / sigma_1 >= epsilon (the paper's rule).
        energy: The smallest ranks that drop at most this share of each component's loss.
        uniform: The same rank everywhere.
        schedule: (base_rank, rank_growth[, rounding]): d~_i = ceil(d~_0 (1 + i)^alpha).
        ranks: An explicit table, as `LowRankT5Config.attention_ranks`; kinds left out stay dense.
        form: `"per_head"` (smaller heads), `"latent"` (one latent a token for all heads), or `"auto"`: for each layer the one
            that loses less under the budget, and smaller heads where there is no budget. For all attention or, as a dictionary, for each
            of `"encoder_self"`, `"decoder_self"` and `"cross"` (in Chronos-2 `"time"` and `"group"`; time attention has rotary
            embeddings and is always `"per_head"`).
        method: `"joint"`, or `"paper"`: each of q, k, v and o alone, its dense product written back, as the scripts of arXiv
            2510.03358 do, a baseline that looks at no data and saves nothing at run time.
        multiple_of: Round ranks up to a multiple (8 is kind to hardware).
        calibration: The data that the loss is measured on: `"synthetic"` (the default of Chronos checkpoints), series or
            token batches as `calibrate` takes them, a `Calibration` or the .safetensors file it was saved in, or None: weights alone, inputs taken as white noise.
            A text T5 needs token batches; without them it is compressed by its weights alone, with a warning.
        refit: Refit the last matrix of every truncated layer by least squares on the calibration data.
        seed: Of the calibration.
        show_progress: Show progress bars.

    Returns:
        A model of the matching `LowRankT5...` class in evaluation mode, in the checkpoint's dtype, on its device, with its
        generation config and `chronos_config`. `config.compression` records how it was made.

    Raises:
        ValueError: An argument is out of range, two policies are given, or the checkpoint is not a sound T5.
        OSError: The checkpoint cannot be read.

    Warns:
        UserWarning: Without calibration: a ratio below 0.2, or a spectrum so flat that much of it is dropped.
    """
    policy = Policy.from_arguments(
        ratio=ratio,
        total_ratio=total_ratio,
        max_cache_ratio=max_cache_ratio,
        target_speedup=target_speedup,
        epsilon=epsilon,
        energy=energy,
        uniform=uniform,
        schedule=schedule,
        ranks=ranks,
    )
    check_argument("multiple_of", multiple_of)
    if feed_forward_ratio is not None:
        check_argument("feed_forward_ratio", feed_forward_ratio)
        if total_ratio is not None:
            raise ValueError("feed_forward_ratio is part of total_ratio: give one of them.")
        if target_speedup is not None:
            raise ValueError("target_speedup chooses the feed-forward ranks: leave out feed_forward_ratio.")
    if method not in ("joint", "paper"):
        raise ValueError(f"method must be 'joint' or 'paper', found {method!r}.")
    if method == "paper" and (
        policy.name not in ("epsilon", "ratio", "uniform", "energy")
        or multiple_of != 1
        or form not in ("auto", "per_head")
        or feed_forward_ratio is not None
    ):
        raise ValueError(
            "method='paper' takes epsilon, ratio, uniform or energy, and neither form, multiple_of nor feed_forward_ratio: "
            "it keeps the dense shapes."
        )
    if policy.name == "ranks" and form != "auto":
        raise ValueError("ranks has the form of every layer: leave out form.")
    if policy.name in ("schedule", "ranks") and multiple_of != 1:
        raise ValueError(f"multiple_of rounds what a policy finds; {policy.name} says the ranks themselves.")
    dense = load_dense(model)
    choice = Choice(policy, _forms(form, policy, dense.family), multiple_of, feed_forward_ratio)
    if target_speedup is not None and dense.family.name != "t5":
        raise ValueError(
            f"target_speedup is measured for T5 models; {dense.source} is a {dense.model_class.__name__}."
        )
    if method == "paper":
        return _paper(dense, policy, show_progress)
    try:
        config = dense.family.lowrank_config(
            dense.config, attention_ranks=policy.value if policy.name == "ranks" else {}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"ranks is no table for this model: {error}") from error

    speed = None if target_speedup is None else _speed(dense, config)
    measured = _calibration(dense, calibration, choice.has_feed_forward, seed, show_progress)
    attention = _attention_layers(dense, choice, config, measured, show_progress)
    feed_forward = _feed_forward_layers(dense, measured, show_progress) if choice.has_feed_forward else []
    layers: list[Layer] = [*attention, *feed_forward]
    components = {
        name: component
        for layer in layers
        for name, component in layer.components(weight=1.0 if measured is None else None).items()
    }
    if measured is None or not (policy.has_budgets or feed_forward):
        table = _allocate(choice, attention, feed_forward, components, config, speed)
    else:
        # The spectra say how a loss falls with the rank; how much it is, a measurement says. Each form is measured at the
        # ranks that it would get alone: a guess for one beside a measurement of the other would often win by being wrong.
        rounds = (
            [[layer.only(form) for layer in attention] for form in PARTS] if "auto" in choice.forms.values() else []
        )
        losses: dict[str, float] = {}
        ranks_measured: dict[str, int] = {}
        float_model = dense.float_model()
        for alone in rounds or [attention]:
            trial = _allocate(choice, alone, feed_forward, components, config, speed)
            new: list[Layer] = [*alone, *(feed_forward if not losses else [])]
            ranks_measured |= _ranks(new, trial)
            losses |= measured_losses(
                dense, float_model, new, trial, measured.batches, components, show_progress=show_progress
            )
        components = reweighted(components, ranks_measured, losses)
        table = _allocate(choice, attention, feed_forward, components, config, speed)
    for name, entry in table.items():
        entries, index = _slot(config, name)
        entries[index] = entry
    config.validate_ranks()

    predicted = {name: float(components[name].loss[rank]) for name, rank in _ranks(layers, table).items()}
    config.compression = _record(
        dense,
        "joint",
        policy,
        predicted,
        seed=None if measured is None else seed,
        calibration=None if measured is None else {**measured.record, "refit": refit},
        **choice.record,
        **(
            {}
            if speed is None
            else {"speed": speed.record({layer.name: layer.dense_entry for layer in layers}, table)}
        ),
    )
    if measured is None:
        _warn_of_loss(policy, predicted, _kept_share(config, [layer.name for layer in attention]))
    return _factorize(dense, config, layers, table, measured if refit else None, show_progress)


def _speed(dense: DenseCheckpoint, config: PreTrainedConfig) -> Speed:
    """What ranks cost where the model is: in its dtype on a GPU, in float32 on the CPU, as Chronos forecasts there."""
    weight = next(iter(dense.weights.values()))
    return measure_speed(
        config,
        encoder_only=dense.model_class is T5EncoderModel,
        device=weight.device,
        dtype=weight.dtype if weight.device.type == "cuda" else torch.float32,
    )


def _calibration(
    dense: DenseCheckpoint, data: Any, feed_forward: bool, seed: int, show_progress: bool
) -> Calibration | None:
    if isinstance(data, Calibration):
        data.check(dense)
        return data
    if data is None:
        return None
    if isinstance(data, (str, os.PathLike)) and str(data).endswith(".safetensors"):
        return _calibration(dense, Calibration.load(data), feed_forward, seed, show_progress)
    if isinstance(data, str) and data == "synthetic" and not dense.objective.has_own_data:
        warnings.warn(
            f"{dense.source} is no Chronos checkpoint, so there is nothing to calibrate it on; it is compressed by its weights alone. "
            "Give calibration= batches of tokens, or calibration=None to say that this is meant.",
            stacklevel=3,
        )
        return None
    return calibrate(dense, data, feed_forward=feed_forward, seed=seed, show_progress=show_progress)


def _attention_layers(
    dense: DenseCheckpoint, choice: Choice, config: PreTrainedConfig, measured: Calibration | None, show_progress: bool
) -> list[AttentionLayer]:
    layers = []
    for name, _ in progress(dense.layers, "Measuring attention", show_progress):
        form = choice.forms[name.split(".")[0]]
        if choice.policy.name == "ranks":
            entries, index = _slot(config, name)
            form = attention_form(entries[index])
        layers.append(
            attention_layer(
                dense,
                name,
                None if measured is None else measured.attention(name),
                tuple(PARTS) if form == "auto" else (form,),
                # A latent of more than half of d_model rarely saves anything; the other policies may ask for one.
                max_rank=dense.config.d_model // 2 if choice.policy.has_budgets else None,
            )
        )
    return layers


def _feed_forward_layers(
    dense: DenseCheckpoint, measured: Calibration | None, show_progress: bool
) -> list[FeedForwardLayer]:
    return [
        feed_forward_layer(dense, name, None if measured is None else measured.feed_forward(name))
        for name, _ in progress(dense.feed_forward_layers, "Measuring feed-forward", show_progress)
    ]


def _allocate(
    choice: Choice,
    attention: list[AttentionLayer],
    feed_forward: list[FeedForwardLayer],
    components: Mapping[str, Component],
    config: PreTrainedConfig,
    speed: Speed | None,
) -> Table:
    """The entry of every layer."""
    policy = choice.policy
    if policy.name == "ranks":
        slots = {layer.name: _slot(config, layer.name) for layer in attention}
        table = {name: entries[index] for name, (entries, index) in slots.items()}
    elif policy.name == "schedule":
        table = _scheduled(policy.value, attention, choice.forms, config)
    elif policy.has_budgets:
        together: list[Layer] = [*attention, *feed_forward] if policy.covers_feed_forward else [*attention]
        table = _within_budgets(policy.arguments, together, components, choice.multiple_of, speed)
    else:
        table = _by_component(policy, attention, components, choice.forms, choice.multiple_of)
    if choice.feed_forward_ratio is not None:
        budget = {"feed_forward_ratio": choice.feed_forward_ratio}
        table |= _within_budgets(budget, feed_forward, components, choice.multiple_of)
    return table


def _ranks(layers: Iterable[Layer], table: Table) -> dict[str, int]:
    """The rank of every component that the table has, by the component's name."""
    return {f"{layer.name}.{part}": rank for layer in layers for part, rank in layer.ranks(table[layer.name]).items()}


# --- factorize ---------------------------------------------------------------------------------------------------


def _factorize(
    dense: DenseCheckpoint,
    config: PreTrainedConfig,
    layers: Iterable[Layer],
    table: Table,
    calibration: Calibration | None,
    show_progress: bool,
) -> PreTrainedModel:
    """The model of this configuration, its last matrices refitted where there is a calibration."""
    changed = [layer for layer in layers if table[layer.name] != layer.dense_entry]
    if calibration is None or not changed:
        weights = _own(dense)
        for layer in progress(changed, "Factorizing", show_progress):
            dtypes = {name: weights.pop(name).dtype for name in layer.dense_names}
            # Dropped as we go, so that the two models are never both whole in memory.
            weights |= {name: _cast(name, w, dtypes) for name, w in layer.factorize(table[layer.name]).items()}
        return _build(dense, config, weights)

    float_model = dense.float_model()
    weights = dict(float_model.state_dict())
    for layer in progress(changed, "Factorizing", show_progress):
        for name in layer.dense_names:
            del weights[name]
        weights |= layer.factorize(table[layer.name])
    lowrank = _build(dense, config, weights)
    places = {layer.module: layer.name for layer in changed}
    refit_outputs(dense, float_model, lowrank, calibration, places, show_progress=show_progress)
    dtypes = {name: dense.weights[name].dtype for layer in changed for name in layer.dense_names}
    own = {name: weight for name, weight in _own(dense).items() if name not in dtypes}
    new = {name: _cast(name, w, dtypes) for name, w in lowrank.state_dict().items() if name not in own}
    return _build(dense, config, own | new)


def _cast(name: str, weight: torch.Tensor, dense: Mapping[str, torch.dtype]) -> torch.Tensor:
    """A new weight in the dtype of the dense one in its place, or beside it. Indices stay what they are."""
    return weight.to(_dtype(name, dense)) if weight.is_floating_point() else weight


def _dtype(name: str, dense: Mapping[str, torch.dtype]) -> torch.dtype:
    place = next((old for old in dense if name.startswith(old.removesuffix("weight"))), None)
    module = name.rsplit(".", 2)[0]
    return dense[place] if place else next(dtype for old, dtype in dense.items() if old.startswith(module))


def _paper(dense: DenseCheckpoint, policy: Policy, show_progress: bool) -> PreTrainedModel:
    """The paper's post-training method: each of q, k, v and o at its own rank, written back dense."""
    config = dense.family.lowrank_config(dense.config)
    truncated, kept, losses = truncate_matrices(dense, policy.name, policy.value, show_progress=show_progress)
    share = sum(kept.values()) / (len(kept) * min(dense.config.d_model, dense.config.num_heads * dense.config.d_kv))
    config.compression = _record(dense, "paper", policy, losses, seed=None, kept_ranks=kept, kept_rank_ratio=share)
    _warn_of_loss(policy, losses, share)
    return _build(dense, config, _own(dense) | truncated)


def _own(dense: DenseCheckpoint) -> dict[str, torch.Tensor]:
    """The weights for a new model: the checkpoint's own, or copies where they belong to the caller (ties kept)."""
    if not dense.is_shared:
        return dict(dense.weights)
    copies = {tensor.data_ptr(): tensor.clone() for tensor in dense.weights.values()}
    return {name: copies[tensor.data_ptr()] for name, tensor in dense.weights.items()}


def _build(dense: DenseCheckpoint, config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    return build_model(
        dense.lowrank_class,
        config,
        weights,
        tied_keys=dense.tied_keys,
        generation_config=dense.generation_config,
    )


def _slot(config: PreTrainedConfig, layer: str) -> tuple[list[dict[str, Any]], int]:
    """Where the table of the configuration has the entry of "cross.3" or "encoder_feed_forward.3"."""
    kind, index = layer.split(".")
    if kind.endswith("_feed_forward"):
        return config.feed_forward_ranks[kind.removesuffix("_feed_forward")], int(index)
    return config.attention_ranks[kind], int(index)


def _kept_share(config: PreTrainedConfig, layers: Iterable[str]) -> float:
    layers = set(layers)
    rows = [row for row in summarize(config).rows if f"{row.kind}.{row.layer}" in layers]
    return sum(row.parameters for row in rows) / sum(row.dense_parameters for row in rows)


def _warn_of_loss(policy: Policy, losses: dict[str, float], kept: float) -> None:
    loss = sum(losses.values()) / max(1, len(losses))
    if loss > LOSS_WORTH_A_WARNING or policy.arguments.get("ratio", 1) < 0.2:
        worst = max(losses, key=lambda name: losses[name])
        flat = " The spectra are flat: this checkpoint has little rank to spare." if loss > 0.5 * (1 - kept) else ""
        warnings.warn(
            f"Keeping {kept:.1%} of the attention without calibration is expected to drop {loss:.1%} of the squared singular "
            f"values on average and {losses[worst]:.1%} in {worst}; forecasts may change.{flat} "
            "Keep more, or compare the two with `hf-lowrank evaluate`.",
            stacklevel=3,
        )


def _record(
    dense: DenseCheckpoint, method: Method, policy: Policy, losses: dict[str, float], seed: int | None, **more: Any
) -> dict:
    """What `config.compression` says of how the model was made."""
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in policy.arguments.items()}
    packages = ("hf-lowrank", "torch", "transformers", "chronos-forecasting")
    return {
        "method": method,
        "policy": policy.name,
        "arguments": arguments,
        **more,
        "source": dense.source,
        "source_class": dense.model_class.__name__,
        "seed": seed,
        "predicted_loss": losses,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
