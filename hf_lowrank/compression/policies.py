"""From what the user asked for to the ranks of every layer: the settings' policy, applied to a model's layers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

from transformers import PreTrainedConfig

from ..budget_solver import Options, allocate_budget
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.families import Family
from ..checkpoints.rank_table import (
    FORMS,
    ComponentName,
    FeedForwardRanks,
    LatentRanks,
    LayerName,
    LayerRanks,
    PerHeadRanks,
    RankTable,
)
from ..models.configuration_lowrank_t5 import scheduled_attention_ranks
from .allocation import (
    Component,
    allocate_energy,
    allocate_epsilon,
    allocate_uniform,
)
from .latency import Speed
from .layers import AttentionLayer, FeedForwardLayer, Layer
from .settings import BUDGETS, CompressionSettings

__all__ = [
    "check_reachable",
    "check_speedup",
    "choose_ranks",
    "component_ranks",
    "largest_speedup",
    "least_total_ratio",
]

# The rules that look at one component at a time.
COMPONENT_POLICIES = {"epsilon": allocate_epsilon, "uniform": allocate_uniform, "energy": allocate_energy}


def choose_ranks(
    settings: CompressionSettings,
    forms: Mapping[str, str],
    attention: Sequence[AttentionLayer],
    feed_forward: Sequence[FeedForwardLayer],
    components: Mapping[ComponentName, Component],
    config: PreTrainedConfig,
    speed: Speed | None,
) -> RankTable:
    """The ranks of every layer.

    Args:
        settings: The policy and what goes with it.
        forms: The form of each kind of attention, as `settings.forms_for` says.
        attention, feed_forward: The layers; feed-forward ones only where they are compressed.
        components: What is lost at every rank of each component.
        config: The low-rank configuration, with the user's table where the policy is a table.
        speed: What ranks cost, for `target_speedup`.

    Raises:
        ValueError: A budget is below what the smallest ranks need.
    """
    table: dict[LayerName, LayerRanks]
    if settings.policy == "ranks":
        given = RankTable.of(config)
        table = {layer.name: given[layer.name] for layer in attention}
    elif settings.policy == "schedule":
        table = _scheduled(settings, forms, attention, config)
    elif settings.has_budgets:
        together: list[Layer] = [*attention, *feed_forward] if settings.covers_feed_forward else [*attention]
        table = _within_budgets(settings.policy_arguments, together, components, settings.multiple_of, speed)
    else:
        table = _by_component(settings, forms, attention, components)
    if settings.feed_forward_ratio is None:
        return RankTable(table)
    budget = {"feed_forward_ratio": settings.feed_forward_ratio}
    return RankTable(table) | _within_budgets(budget, feed_forward, components, settings.multiple_of)


def check_reachable(
    settings: CompressionSettings, forms: Mapping[str, str], dense: DenseCheckpoint, config: PreTrainedConfig
) -> None:
    """Raise ValueError, before any work, where no ranks of this model are what is asked for.

    Args:
        settings: The policy.
        forms: The form of each kind of attention, as `settings.forms_for` says.
        dense: The model.
        config: Its low-rank configuration.
    """
    attention = [name for name, _ in dense.layers]
    feed_forward = [name for name, _ in dense.feed_forward_layers]
    if settings.uniform is not None and settings.uniform > config.d_kv:
        for name in attention:
            if forms[name.kind] == "per_head":
                raise ValueError(
                    f"uniform must be an integer in [1, {config.d_kv}], the full rank of {name}.qk, found {settings.uniform}."
                )
    budgets = {
        "ratio": (settings.ratio, "parameters", attention),
        "total_ratio": (settings.total_ratio, "parameters", [*attention, *feed_forward]),
        "max_cache_ratio": (settings.max_cache_ratio, "cache", attention),
        "feed_forward_ratio": (settings.feed_forward_ratio, "parameters", feed_forward),
    }
    if settings.method == "paper":
        return
    for budget, (share, kind, names) in budgets.items():
        if share is not None:
            _check_share(budget, share, kind, _least_share(kind, names, settings, forms, dense, config))


def least_total_ratio(
    settings: CompressionSettings, forms: Mapping[str, str], dense: DenseCheckpoint, config: PreTrainedConfig
) -> float:
    """The smallest `total_ratio` that a model can be asked for; the arguments are those of `check_reachable`."""
    names = [name for name, _ in (*dense.layers, *dense.feed_forward_layers)]
    return _least_share("parameters", names, settings, forms, dense, config)


def _least_share(
    kind: str,
    names: Iterable[LayerName],
    settings: CompressionSettings,
    forms: Mapping[str, str],
    dense: DenseCheckpoint,
    config: PreTrainedConfig,
) -> float:
    """The share of what the dense layers cost that their smallest ranks do."""
    family, full, least, whole = dense.family, RankTable.full(config), 0, 0
    for name in names:
        ways = _smallest(name, settings, forms, dense)
        least += min(_costs(ranks, kind, name.kind, family, config) for ranks in ways)
        whole += _costs(full[name], kind, name.kind, family, config)
    return least / max(1, whole)


def _costs(ranks: LayerRanks, kind: str, layer: str, family: Family, config: PreTrainedConfig) -> int:
    if kind == "parameters":
        return ranks.parameters(config)
    return ranks.cached_numbers(config) if layer in family.cached else 0


def _smallest(
    name: LayerName, settings: CompressionSettings, forms: Mapping[str, str], dense: DenseCheckpoint
) -> list[LayerRanks]:
    """What no layer of this name is smaller than: as it is, or in each form that it may get."""
    given = dense.given_ranks[name]
    if isinstance(given, FeedForwardRanks):
        return [given, FeedForwardRanks(given.width, 1, 1)]
    smallest = [given]
    if forms[name.kind] in ("auto", "per_head"):
        step, largest = settings.multiple_of, dense.largest_heads(name)
        qk = math.lcm(step, 2) if name.kind in dense.family.rotary else step
        smallest.append(PerHeadRanks(min(qk, largest.qk), min(step, largest.vo)))
    if forms[name.kind] in ("auto", "latent"):
        smallest += [LatentRanks(1, *sketches) for sketches in ((1, 1), (None, 1), (1, None))]
    return smallest


def _check_share(budget: str, share: float, kind: str, least: float) -> None:
    if least > share * (1 + 1e-12):
        raise ValueError(
            f"{budget}={share} is too small: the smallest ranks keep {least:.4f} of the dense model's {kind}."
        )


def component_ranks(layers: Iterable[Layer], table: RankTable) -> dict[ComponentName, int]:
    """The rank of every component that the table has."""
    return {name: rank for layer in layers for name, rank in layer.component_ranks(table[layer.name]).items()}


def _scheduled(
    settings: CompressionSettings,
    forms: Mapping[str, str],
    layers: Iterable[AttentionLayer],
    config: PreTrainedConfig,
) -> dict[LayerName, LayerRanks]:
    """The ranks that follow from (base_rank, rank_growth[, rounding])."""
    base_rank, rank_growth, rounding = (*settings.policy_value, "ceil")[:3]
    table: dict[LayerName, LayerRanks] = {}
    for layer in layers:
        form = forms[layer.name.kind]
        columns = scheduled_attention_ranks(
            base_rank,
            rank_growth,
            num_layers=config.num_layers,
            num_decoder_layers=getattr(config, "num_decoder_layers", 0),
            d_kv=config.d_model if form == "latent" else config.d_kv,
            rounding=rounding,
        )
        rank = columns.get(layer.name.kind, columns["encoder_self"])[layer.name.index]["qk"]
        parts = dict.fromkeys(FORMS[form].parts, rank)
        if layer.is_rotary:
            parts["qk"] += rank % 2  # two for each frequency; a dense head is even
        table[layer.name] = layer.with_parts(form, parts)
    return table


def _by_component(
    settings: CompressionSettings,
    forms: Mapping[str, str],
    layers: Sequence[AttentionLayer],
    components: Mapping[ComponentName, Component],
) -> dict[LayerName, LayerRanks]:
    """The ranks by a rule that looks at one component at a time."""
    parts = {kind: FORMS[form].parts for kind, form in forms.items()}
    names = [layer.component(part) for layer in layers for part in parts[layer.name.kind]]
    chosen, multiple_of = [components[name] for name in names], settings.multiple_of
    ranks: dict[Hashable, int]
    if settings.uniform is not None and any(layer.dense.lowrank for layer in layers):
        ranks = {one.name: one.round_up(settings.uniform, multiple_of) for one in chosen}  # or as many as there are
    else:
        ranks = COMPONENT_POLICIES[settings.policy](chosen, settings.policy_value, multiple_of=multiple_of)
    return {
        layer.name: layer.with_parts(
            forms[layer.name.kind], {part: ranks[layer.component(part)] for part in parts[layer.name.kind]}
        )
        for layer in layers
    }


def _within_budgets(
    budgets: Mapping[str, float],
    layers: Sequence[Layer],
    components: Mapping[ComponentName, Component],
    multiple_of: int,
    speed: Speed | None = None,
) -> dict[LayerName, LayerRanks]:
    """The ranks that keep the budgets and lose the least."""
    losses = {name: component.loss for name, component in components.items()}
    seconds = None if speed is None else speed.seconds
    options = {layer.name: layer.options(losses, multiple_of=multiple_of, seconds=seconds) for layer in layers}
    counted = layers
    if "ratio" in budgets:  # of the attention alone
        counted = [layer for layer in layers if not layer.name.is_feed_forward]
        for name, ways in options.items():
            if name.is_feed_forward:
                ways.costs["parameters"][:] = 0
    limits = {}
    for budget, share in budgets.items():
        if budget == "target_speedup" and speed is not None:
            dense_seconds, least_seconds = _seconds(layers, options, speed)
            check_speedup(share, dense_seconds / least_seconds)
            limits["seconds"] = dense_seconds / share - speed.fixed
            continue
        kind = BUDGETS.get(budget, "parameters")
        dense = sum(layer.cost(kind, layer.dense_ranks) for layer in counted)
        least = sum(float(ways.costs[kind].min()) for ways in options.values()) / max(1.0, dense)
        _check_share(budget, share, kind, least)
        limits[kind] = share * dense
    return allocate_budget(options, limits)


def _seconds(layers: Sequence[Layer], options: Mapping[LayerName, Options], speed: Speed) -> tuple[float, float]:
    """What a forecast takes with the dense layers, and with the cheapest."""
    dense = speed.forecast(RankTable({layer.name: layer.dense_ranks for layer in layers}))
    return dense, speed.fixed + sum(float(ways.costs["seconds"].min()) for ways in options.values())


def largest_speedup(
    layers: Sequence[Layer], components: Mapping[ComponentName, Component], multiple_of: int, speed: Speed
) -> float:
    """How many times as fast as with the dense layers a forecast is predicted to be with the cheapest."""
    losses = {name: component.loss for name, component in components.items()}
    options = {layer.name: layer.options(losses, multiple_of=multiple_of, seconds=speed.seconds) for layer in layers}
    dense, least = _seconds(layers, options, speed)
    return dense / least


def check_speedup(target_speedup: float, largest: float) -> None:
    """Raise ValueError where a speed-up is out of reach."""
    if target_speedup > largest * (1 + 1e-12):
        raise ValueError(
            f"target_speedup={target_speedup} is too large: the smallest ranks are predicted to reach {largest:.4g} on this machine."
        )
