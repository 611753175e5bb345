"""The layers of a dense model that can be made smaller: their components, what each can become, and its weights then."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from ..budget_solver import Options
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.rank_table import (
    FORMS,
    AttentionRanks,
    ComponentName,
    FeedForwardRanks,
    LatentRanks,
    LayerName,
    LayerRanks,
    PerHeadRanks,
    Sizes,
)
from .allocation import Component
from .factorization import (
    AttentionGrams,
    AttentionWeights,
    Basis,
    FeedForwardGrams,
    FeedForwardWeights,
    PairBasis,
    latent_bases,
    per_head_bases,
    thin_bases,
    truncate_latent,
    truncate_per_head,
    truncate_thin,
)

__all__ = [
    "AttentionLayer",
    "FeedForwardLayer",
    "Layer",
    "Point",
    "Projection",
    "attention_layer",
    "feed_forward_layer",
]

# How many prices are tried for the sketches beside a latent, and how many ranks at most for the latent itself.
PRICES, LATENT_RANKS = 40, 128

Losses = Mapping[ComponentName, NDArray[np.float64]]  # of each component, at every rank
Seconds = Callable[[str, LayerRanks], float]  # of a layer of this kind with these ranks in a whole forecast


@dataclass(frozen=True)
class Projection:
    """A_r B_r^T of one component and where it is inserted, see `Point`; left and right are (n, h, r), float32."""

    modules: tuple[str, ...]
    side: str
    left: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Point:
    """Where a component's projection is inserted: at the input or the output of linear modules, by dotted name.

    The groups of the basis are the heads that share one linear module's features, or one for each of several modules.
    """

    modules: tuple[str, ...]
    side: str
    basis: Basis

    def projection(self, rank: int) -> Projection:
        """The projection of this rank."""
        return Projection(self.modules, self.side, *(factor.float() for factor in self.basis.truncate(rank)))


@dataclass(frozen=True)
class Layer(ABC):
    """What the road needs of a layer, be it attention or feed-forward.

    Attributes:
        name: Its kind and index.
        module: Its dotted name in the model.
        dense: The model.
        bases: The best projection of every rank, for each part of the forms that may be chosen.
    """

    name: LayerName
    module: str
    dense: DenseCheckpoint
    bases: dict[str, Basis]

    @property
    def config(self) -> PreTrainedConfig:
        return self.dense.config

    @cached_property
    def sizes(self) -> Sizes:
        """Those of the model."""
        return Sizes.of(self.config)

    @property
    @abstractmethod
    def dense_ranks(self) -> LayerRanks:
        """Those of the dense layer, which shares are of."""

    @property
    def given_ranks(self) -> LayerRanks:
        """Those of the layer as it is: smaller ones, where the source is low-rank."""
        return self.dense.given_ranks[self.name]

    @property
    def given_names(self) -> list[str]:
        """The names of the source's weights that `factorize` replaces."""
        inside = (name for name in self.dense.given_weights if name.startswith(f"{self.module}."))
        return [name for name in inside if "relative_attention_bias" not in name]

    def cost(self, kind: str, ranks: LayerRanks, seconds: Seconds | None = None) -> float:
        """What the layer takes at these ranks, of `"parameters"`, `"cache"` or `"seconds"`."""
        if kind == "seconds":
            assert seconds is not None
            return seconds(self.name.kind, ranks)
        if kind == "parameters":
            return ranks.parameters(self.sizes)
        return ranks.cached_numbers(self.sizes) if self.name.kind in self.dense.family.cached else 0

    @abstractmethod
    def points(self) -> dict[str, Point]:
        """Where each part's projection goes."""

    @abstractmethod
    def options(self, losses: Losses, *, multiple_of: int, seconds: Seconds | None = None) -> Options:
        """All ways to build the layer that are worth a look; as it is comes first, and none is larger. `seconds` adds what they take."""

    @abstractmethod
    def factorize(self, ranks: LayerRanks) -> dict[str, torch.Tensor]:
        """The new weights in float32, by their names in the low-rank model."""

    def component(self, part: str) -> ComponentName:
        """The name of the layer's component for this part."""
        return ComponentName(self.name, part)

    def components(self, *, weight: float | None) -> dict[ComponentName, Component]:
        """By name; a weight of None counts each by its own sum of squared singular values."""
        components = {}
        for part, basis in self.bases.items():
            name = self.component(part)
            spectrum = basis.singular_values.cpu().numpy()
            total = float((spectrum**2).sum()) if weight is None else weight
            components[name] = Component(name, spectrum, total, step=2 if isinstance(basis, PairBasis) else 1)
        return components

    def component_ranks(self, ranks: LayerRanks) -> dict[ComponentName, int]:
        """The rank of every component of this form that the layer has; d_model for a whole matrix.

        A layer for which only a latent may be chosen has no components for the dense heads, which lose nothing.
        """
        return {
            self.component(part): self.config.d_model if rank is None else rank
            for part, rank in ranks.to_dict().items()
            if part in ranks.parts and part in self.bases
        }

    def truncated(self, ranks: LayerRanks) -> dict[ComponentName, int]:
        """The rank of every component that loses something at these ranks."""
        if ranks == self.given_ranks:
            return {}
        full = {self.component(part): basis.singular_values.shape[1] for part, basis in self.bases.items()}
        return {name: rank for name, rank in self.component_ranks(ranks).items() if rank < full[name]}

    def loss_of(self, losses: Losses) -> dict[str, NDArray[np.float64]]:
        """The losses of this layer's components, by part."""
        return {part: losses[self.component(part)] for part in self.bases}


def attention_weights(dense: DenseCheckpoint, module: str) -> AttentionWeights:
    """The weights of the attention layer of this dotted name, by head, float64."""
    q, k, v, o = (dense.weights[f"{module}.{name}.weight"] for name in "qkvo")
    return AttentionWeights.from_linear(q, k, v, o, num_heads=dense.config.num_heads)


def feed_forward_weights(dense: DenseCheckpoint, module: str) -> FeedForwardWeights:
    """The weights of the feed-forward layer of this dotted name, float64."""
    inner = torch.stack([dense.weights[f"{module}.{name}.weight"].double() for name in dense.inner_names])
    return FeedForwardWeights(inner, dense.weights[f"{module}.wo.weight"].double())


def _candidates(full: int, multiple_of: int) -> NDArray[np.int64]:
    return np.unique(np.append(np.arange(multiple_of, full + 1, multiple_of), full))


def _rounded(rank: int, full: int, multiple_of: int) -> int:
    return min(full, -(-max(rank, 1) // multiple_of) * multiple_of)


def _prices(*losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Losses saved a rank, from the largest to the smallest that count."""
    saved = np.concatenate([-np.diff(loss) for loss in losses])
    largest = saved.max(initial=0.0)
    saved = saved[saved > 1e-12 * largest]
    return np.geomspace(saved.min(), saved.max(), PRICES) if len(saved) else np.ones(1)


class AttentionLayer(Layer):
    """An attention layer."""

    @property
    def is_rotary(self) -> bool:
        """Whether its queries and keys are turned by their positions."""
        return self.name.kind in self.dense.family.rotary

    @property
    def dense_ranks(self) -> PerHeadRanks:
        return PerHeadRanks(self.config.d_kv, self.config.d_kv)

    def only(self, form: str) -> AttentionLayer:
        """The layer with one form to choose, where it has that form."""
        bases = {part: basis for part, basis in self.bases.items() if part in FORMS[form].parts}
        return replace(self, bases=bases or self.bases)

    def points(self) -> dict[str, Point]:
        places = {
            "qk": (("q",), "output"),
            "vo": (("o",), "input"),
            "latent": (("k", "v"), "input"),
            "query": (("q",), "input"),
            "output": (("o",), "output"),
        }
        return {
            part: Point(tuple(f"{self.module}.{name}" for name in places[part][0]), places[part][1], basis)
            for part, basis in self.bases.items()
        }

    def with_parts(self, form: str, ranks: Mapping[str, int]) -> LayerRanks:
        """The layer's ranks from those of its parts, none above what the layer has; a sketch is left out where a whole matrix is smaller.

        A low-rank layer stays as it is where it would grow.
        """
        given = self.dense.largest_heads(self.name) if form == "per_head" else self.given_ranks
        limits = given.to_dict() if given.form == form else {}
        parts = {part: min(rank, limits.get(part) or rank) for part, rank in ranks.items()}
        if form == "per_head":
            return self._no_larger(PerHeadRanks(parts["qk"], parts["vo"]))
        latent = parts["latent"]
        return self._no_larger(
            LatentRanks(latent, *(self.sketch(latent, parts[part]) for part in ("query", "output")))
        )

    def _no_larger(self, ranks: LayerRanks) -> LayerRanks:
        is_dense = self.given_ranks == self.dense_ranks
        is_smaller = ranks.parameters(self.sizes) <= self.given_ranks.parameters(self.sizes)
        return ranks if is_dense or is_smaller else self.given_ranks

    def sketch(self, latent: int, rank: int) -> int | None:
        """The rank of a sketch beside a latent, or None where a whole matrix is smaller."""
        d, n = self.sizes.d_model, self.sizes.num_heads
        return rank if rank * (d + n * latent) < n * latent * d else None

    def options(self, losses: Losses, *, multiple_of: int, seconds: Seconds | None = None) -> Options:
        given = self.given_ranks
        assert isinstance(given, (PerHeadRanks, LatentRanks))
        entries: list[AttentionRanks] = [given]
        lost = [0.0]
        loss = self.loss_of(losses)
        if "qk" in loss:
            step, largest = (
                math.lcm(multiple_of, 2) if self.is_rotary else multiple_of,
                self.dense.largest_heads(self.name),
            )
            for qk in _candidates(largest.qk, step):
                for vo in _candidates(largest.vo, multiple_of):
                    entries.append(PerHeadRanks(int(qk), int(vo)))
                    lost.append(loss["qk"][qk] + loss["vo"][vo])
        if "latent" in loss:
            for ranks in self._latents(loss, multiple_of):
                entries.append(ranks)
                lost.append(sum(float(loss[part][rank]) for part, rank in vars(ranks).items() if rank is not None))
        costs = {
            kind: np.array([self.cost(kind, ranks) for ranks in entries], float) for kind in ("parameters", "cache")
        }
        keep = costs["parameters"] <= costs["parameters"][0]
        costs = {kind: cost[keep] for kind, cost in costs.items()}
        kept = tuple(entries[i] for i in np.flatnonzero(keep))
        if seconds is not None:
            costs["seconds"] = np.array([self.cost("seconds", ranks, seconds) for ranks in kept])
        return Options(kept, np.array(lost)[keep], costs)

    def _latents(self, loss: Mapping[str, NDArray[np.float64]], multiple_of: int) -> list[LatentRanks]:
        """For every latent rank the sketches that are best at some price of a parameter."""
        limit = self.bases["latent"].left.shape[2]
        if isinstance(self.given_ranks, LatentRanks):
            limit = min(limit, self.given_ranks.latent)
        limit = limit // multiple_of * multiple_of or limit
        candidates = _candidates(limit, multiple_of)
        if len(candidates) > LATENT_RANKS:
            candidates = candidates[np.unique(np.geomspace(1, len(candidates), LATENT_RANKS).astype(int) - 1)]
        saved = {part: -np.diff(loss[part]) for part in ("query", "output")}
        latents: dict[LatentRanks, None] = {}  # in order, each once
        for latent in map(int, candidates):
            for price in _prices(loss["query"], loss["output"]):
                query, output = (
                    self.sketch(latent, _rounded(int((saved[part][:limit] >= price).sum()), limit, multiple_of))
                    for part in ("query", "output")
                )
                for sketches in ((query, output), (None, output), (query, None)):
                    latents[LatentRanks(latent, *sketches)] = None
        return list(latents)

    def factorize(self, ranks: LayerRanks) -> dict[str, torch.Tensor]:
        truncate: Callable = truncate_latent if isinstance(ranks, LatentRanks) else truncate_per_head
        weights = truncate(attention_weights(self.dense, self.module), self.bases, **ranks.to_dict())
        factors = {f"{self.module}.{part}.weight": weight for part, weight in weights.to_linear(torch.float32).items()}
        basis = self.bases.get("qk")
        if isinstance(basis, PairBasis) and isinstance(ranks, PerHeadRanks):
            factors[f"{self.module}.pairs"] = basis.pairs(ranks.qk)
        return factors


class FeedForwardLayer(Layer):
    """A feed-forward layer, whose matrices can become thin factors."""

    @property
    def dense_ranks(self) -> FeedForwardRanks:
        return FeedForwardRanks(self.config.d_ff, None, None)

    def points(self) -> dict[str, Point]:
        inner = tuple(f"{self.module}.{name}" for name in self.dense.inner_names)
        return {
            "wi": Point(inner, "input", self.bases["wi"]),
            "wo": Point((f"{self.module}.wo",), "output", self.bases["wo"]),
        }

    def options(self, losses: Losses, *, multiple_of: int, seconds: Seconds | None = None) -> Options:
        given, d_model = self.given_ranks, self.config.d_model
        assert isinstance(given, FeedForwardRanks)
        loss = self.loss_of(losses)
        # Above it two thin factors are larger than the matrix.
        limit = min(self.bases["wi"].left.shape[2], d_model * given.width // (d_model + given.width))
        ranks = [int(r) for r in _candidates(limit, multiple_of) if r % multiple_of == 0]
        if len(ranks) >= LATENT_RANKS:
            ranks = [ranks[i - 1] for i in np.unique(np.geomspace(1, len(ranks), LATENT_RANKS).astype(int))]

        def candidates(rank: int | None) -> list[int | None]:
            """What a matrix of this rank can become; the first is what it is."""
            return [rank, *(other for other in ranks if rank is None or other < rank)]

        entries = [FeedForwardRanks(given.width, wi, wo) for wi in candidates(given.wi) for wo in candidates(given.wo)]
        own = vars(given)  # at which nothing is lost
        lost = [
            sum(loss[part][rank] for part, rank in (("wi", ranks.wi), ("wo", ranks.wo)) if rank != own[part])
            for ranks in entries
        ]
        kinds = ("parameters", "cache") if seconds is None else ("parameters", "cache", "seconds")
        costs = {kind: np.array([self.cost(kind, ranks, seconds) for ranks in entries], float) for kind in kinds}
        return Options(tuple(entries), np.array(lost), costs)

    def factorize(self, ranks: LayerRanks) -> dict[str, torch.Tensor]:
        assert isinstance(ranks, FeedForwardRanks)
        weights = feed_forward_weights(self.dense, self.module)
        inner, outer = truncate_thin(weights, self.bases, wi=ranks.wi, wo=ranks.wo)
        factors = {}
        for name, parts in (*zip(self.dense.inner_names, inner), ("wo", outer)):
            suffixes = ("weight",) if len(parts) == 1 else ("down.weight", "up.weight")
            for suffix, factor in zip(suffixes, parts):
                factors[f"{self.module}.{name}.{suffix}"] = factor.float().contiguous()
        return factors


def attention_layer(
    dense: DenseCheckpoint,
    name: LayerName,
    grams: AttentionGrams | None,
    forms: tuple[str, ...],
    *,
    max_rank: int | None,
) -> AttentionLayer:
    """An attention layer with the bases of the forms that may be chosen; `grams` None: from the weights alone."""
    module = dict(dense.layers)[name]
    weights = attention_weights(dense, module)
    grams = AttentionGrams.white(weights) if grams is None else grams.to(weights.query.device)
    if dense.lowrank is not None:
        grams = grams.within(weights)
    bases: dict[str, Basis] = {}
    is_rotary = name.kind in dense.family.rotary
    if "per_head" in forms or is_rotary:
        bases |= per_head_bases(weights, grams, rotary=is_rotary)
    if "latent" in forms and not is_rotary:
        bases |= latent_bases(weights, grams, max_rank=max_rank)
    return AttentionLayer(name, module, dense, bases)


def feed_forward_layer(dense: DenseCheckpoint, name: LayerName, grams: FeedForwardGrams | None) -> FeedForwardLayer:
    """A feed-forward layer with its bases; `grams` None: from the weights alone."""
    module = dict(dense.feed_forward_layers)[name]
    weights = feed_forward_weights(dense, module)
    grams = FeedForwardGrams.white(weights) if grams is None else grams.to(weights.outer.device)
    if dense.lowrank is not None:
        grams = grams.within(weights)
    return FeedForwardLayer(name, module, dense, thin_bases(grams))
