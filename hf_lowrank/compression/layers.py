"""The layers of a dense T5 that can be made smaller: their components, what each can become, and its weights then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from ..checkpoints.dense import DenseCheckpoint
from ..models.configuration_lowrank_t5 import (
    attention_form,
    attention_parameters,
    cached_numbers,
    feed_forward_parameters,
)
from .allocation import Component, Options
from .factorization import (
    AttentionGrams,
    Basis,
    FeedForwardGrams,
    PairBasis,
    latent_bases,
    per_head_bases,
    thin_bases,
    truncate_latent,
    truncate_per_head,
    truncate_thin,
)

__all__ = ["AttentionLayer", "FeedForwardLayer", "Layer", "Point", "attention_layer", "feed_forward_layer"]

PARTS = {"per_head": ("qk", "vo"), "latent": ("latent", "query", "output")}
# How many prices are tried for the sketches beside a latent, and how many ranks at most for the latent itself.
PRICES, LATENT_RANKS = 40, 128

Entry = dict[str, Any]
Seconds = Callable[[str, Entry], float]  # of a layer of this kind with this entry in a whole forecast


@dataclass(frozen=True)
class Point:
    """Where a component's projection is inserted: at the input or the output of linear modules, by dotted name.

    The groups of the basis are the heads that share one linear module's features, or one for each of several modules.
    """

    modules: tuple[str, ...]
    side: str
    basis: Basis


class Layer(Protocol):
    """What the road needs of a layer, be it attention or feed-forward."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def dense_entry(self) -> Entry: ...
    @property
    def dense_names(self) -> list[str]:
        """The names of the dense weights that `factorize` replaces."""

    def components(self, *, weight: float | None) -> dict[str, Component]:
        """By name; a weight of None counts each by its own sum of squared singular values."""

    def ranks(self, entry: Entry) -> dict[str, int]:
        """The rank of every component of the entry's form."""

    def points(self) -> dict[str, Point]:
        """Where each component's projection goes."""

    def options(
        self, losses: Mapping[str, NDArray[np.float64]], *, multiple_of: int, seconds: Seconds | None = None
    ) -> Options:
        """All ways to build the layer that are worth a look; the dense one first. `seconds` adds what they take in a forecast."""

    def factorize(self, entry: Entry) -> dict[str, torch.Tensor]:
        """The new weights in float32, by their names in the low-rank model."""


def _components(name: str, bases: Mapping[str, Basis], weight: float | None) -> dict[str, Component]:
    """The components at these bases; a weight of None counts each by its own sum of squared singular values."""
    found = {}
    for part, basis in bases.items():
        spectrum = basis.singular_values.cpu().numpy()
        total = float((spectrum**2).sum()) if weight is None else weight
        step = 2 if isinstance(basis, PairBasis) else 1
        found[f"{name}.{part}"] = Component(f"{name}.{part}", spectrum, total, step)
    return found


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


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer: `bases` has the parts of the forms that may be chosen."""

    name: str
    module: str
    dense: DenseCheckpoint
    bases: dict[str, Basis]

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def config(self) -> PreTrainedConfig:
        return self.dense.config

    @property
    def is_rotary(self) -> bool:
        return self.kind in self.dense.family.rotary

    @property
    def dense_entry(self) -> Entry:
        return {"qk": self.config.d_kv, "vo": self.config.d_kv}

    @property
    def dense_names(self) -> list[str]:
        return [f"{self.module}.{part}.weight" for part in "qkvo"]

    def components(self, *, weight: float | None) -> dict[str, Component]:
        return _components(self.name, self.bases, weight)

    def ranks(self, entry: Entry) -> dict[str, int]:
        # A layer for which only a latent may be chosen has no components for the dense entry, which loses nothing.
        return {
            part: self.config.d_model if rank is None else rank for part, rank in entry.items() if part in self.bases
        }

    def only(self, form: str) -> AttentionLayer:
        """The layer with one form to choose, where it has that form."""
        bases = {part: basis for part, basis in self.bases.items() if part in PARTS[form]}
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

    def entry(self, ranks: Mapping[str, int]) -> Entry:
        """The layer's entry from the ranks of its parts; a sketch is left out where a whole matrix is smaller."""
        if "qk" in ranks:
            return {"qk": ranks["qk"], "vo": ranks["vo"]}
        rank = ranks["latent"]
        return {"latent": rank} | {part: self.sketch(rank, ranks[part]) for part in ("query", "output")}

    def sketch(self, latent: int, rank: int) -> int | None:
        """The rank of a sketch beside a latent, or None where a whole matrix is smaller."""
        d, n = self.config.d_model, self.config.num_heads
        return rank if rank * (d + n * latent) < n * latent * d else None

    def options(
        self, losses: Mapping[str, NDArray[np.float64]], *, multiple_of: int, seconds: Seconds | None = None
    ) -> Options:
        size = {"d_model": self.config.d_model, "num_heads": self.config.num_heads}
        entries, lost = [self.dense_entry], [0.0]
        loss = {part: losses[f"{self.name}.{part}"] for part in self.bases}
        if "qk" in loss:
            step = math.lcm(multiple_of, 2) if self.is_rotary else multiple_of
            for qk in _candidates(self.config.d_kv, step):
                for vo in _candidates(self.config.d_kv, multiple_of):
                    entries.append({"qk": int(qk), "vo": int(vo)})
                    lost.append(loss["qk"][qk] + loss["vo"][vo])
        if "latent" in loss:
            for entry in self._latent_entries(loss, multiple_of):
                entries.append(entry)
                lost.append(sum(float(loss[part][rank]) for part, rank in entry.items() if rank is not None))
        parameters = np.array([attention_parameters(entry, **size) for entry in entries], float)
        cached = np.array([cached_numbers(entry, num_heads=self.config.num_heads) for entry in entries], float)
        if self.kind not in self.dense.family.cached:
            cached = 0 * cached
        keep = parameters <= parameters[0]  # never larger than the dense layer
        costs = {"parameters": parameters[keep], "cache": cached[keep]}
        kept = tuple(entries[i] for i in np.flatnonzero(keep))
        if seconds is not None:
            costs["seconds"] = np.array([seconds(self.kind, entry) for entry in kept])
        return Options(kept, np.array(lost)[keep], costs)

    def _latent_entries(self, loss: Mapping[str, NDArray[np.float64]], multiple_of: int) -> list[Entry]:
        """For every latent rank the sketches that are best at some price of a parameter."""
        limit = self.bases["latent"].left.shape[2]
        limit = limit // multiple_of * multiple_of or limit
        ranks = _candidates(limit, multiple_of)
        if len(ranks) > LATENT_RANKS:
            ranks = ranks[np.unique(np.geomspace(1, len(ranks), LATENT_RANKS).astype(int) - 1)]
        saved = {part: -np.diff(loss[part]) for part in ("query", "output")}
        found: dict[tuple, Entry] = {}
        for rank in map(int, ranks):
            for price in _prices(loss["query"], loss["output"]):
                sketches = {
                    part: self.sketch(rank, _rounded(int((saved[part][:limit] >= price).sum()), limit, multiple_of))
                    for part in saved
                }
                for chosen in [sketches] + [{**sketches, part: None} for part in sketches]:
                    found[rank, chosen["query"], chosen["output"]] = {"latent": rank, **chosen}
        return list(found.values())

    def factorize(self, entry: Entry) -> dict[str, torch.Tensor]:
        truncate: Callable = truncate_latent if attention_form(entry) == "latent" else truncate_per_head
        weights = truncate(self.dense.attention(self.module), self.bases, **entry).to_linear(torch.float32)
        found = {f"{self.module}.{part}.weight": weight for part, weight in weights.items()}
        basis = self.bases.get("qk")
        if isinstance(basis, PairBasis):
            found[f"{self.module}.pairs"] = basis.pairs(entry["qk"])
        return found


@dataclass(frozen=True)
class FeedForwardLayer:
    """A feed-forward layer, whose matrices can become thin factors."""

    name: str
    module: str
    dense: DenseCheckpoint
    bases: dict[str, Basis]

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def dense_entry(self) -> Entry:
        return {"width": self.dense.config.d_ff, "wi": None, "wo": None}

    @property
    def dense_names(self) -> list[str]:
        return [f"{self.module}.{name}.weight" for name in (*self.dense.inner_names, "wo")]

    def components(self, *, weight: float | None) -> dict[str, Component]:
        return _components(self.name, self.bases, weight)

    def ranks(self, entry: Entry) -> dict[str, int]:
        return {part: entry[part] or self.dense.config.d_model for part in ("wi", "wo")}

    def points(self) -> dict[str, Point]:
        inner = tuple(f"{self.module}.{name}" for name in self.dense.inner_names)
        return {
            "wi": Point(inner, "input", self.bases["wi"]),
            "wo": Point((f"{self.module}.wo",), "output", self.bases["wo"]),
        }

    def options(
        self, losses: Mapping[str, NDArray[np.float64]], *, multiple_of: int, seconds: Seconds | None = None
    ) -> Options:
        config = self.dense.config
        loss = {part: losses[f"{self.name}.{part}"] for part in ("wi", "wo")}
        # Above it two thin factors are larger than the matrix.
        limit = min(self.bases["wi"].left.shape[2], config.d_model * config.d_ff // (config.d_model + config.d_ff))
        ranks: list[int | None] = [None, *(int(r) for r in _candidates(limit, multiple_of) if r % multiple_of == 0)]
        if len(ranks) > LATENT_RANKS:
            ranks = [None, *(ranks[i] for i in np.unique(np.geomspace(1, len(ranks) - 1, LATENT_RANKS).astype(int)))]
        entries = [{"width": config.d_ff, "wi": wi, "wo": wo} for wi in ranks for wo in ranks]
        lost = [sum(loss[part][entry[part]] for part in loss if entry[part] is not None) for entry in entries]
        costs = {
            "parameters": np.array(
                [
                    feed_forward_parameters(entry, d_model=config.d_model, is_gated=config.is_gated_act)
                    for entry in entries
                ],
                float,
            ),
            "cache": np.zeros(len(entries)),
        }
        if seconds is not None:
            costs["seconds"] = np.array([seconds(self.kind, entry) for entry in entries])
        return Options(tuple(entries), np.array(lost), costs)

    def factorize(self, entry: Entry) -> dict[str, torch.Tensor]:
        weights = self.dense.feed_forward(self.module)
        inner, outer = truncate_thin(weights, self.bases, wi=entry["wi"], wo=entry["wo"])
        found = {}
        for name, factors in (*zip(self.dense.inner_names, inner), ("wo", outer)):
            suffixes = ("weight",) if len(factors) == 1 else ("down.weight", "up.weight")
            for suffix, factor in zip(suffixes, factors):
                found[f"{self.module}.{name}.{suffix}"] = factor.float().contiguous()
        return found


def attention_layer(
    dense: DenseCheckpoint, name: str, grams: AttentionGrams | None, forms: tuple[str, ...], *, max_rank: int | None
) -> AttentionLayer:
    """An attention layer with the bases of the forms that may be chosen; `grams` None: from the weights alone."""
    module = dict(dense.layers)[name]
    weights = dense.attention(module)
    grams = AttentionGrams.white(weights) if grams is None else grams
    bases: dict[str, Basis] = {}
    is_rotary = name.split(".")[0] in dense.family.rotary
    if "per_head" in forms or is_rotary:
        bases |= per_head_bases(weights, grams, rotary=is_rotary)
    if "latent" in forms and not is_rotary:
        bases |= latent_bases(weights, grams, max_rank=max_rank)
    return AttentionLayer(name, module, dense, bases)


def feed_forward_layer(dense: DenseCheckpoint, name: str, grams: FeedForwardGrams | None) -> FeedForwardLayer:
    """A feed-forward layer with its bases; `grams` None: from the weights alone."""
    module = dict(dense.feed_forward_layers)[name]
    grams = FeedForwardGrams.white(dense.feed_forward(module)) if grams is None else grams
    return FeedForwardLayer(name, module, dense, thin_bases(grams))
