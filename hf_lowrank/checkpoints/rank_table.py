"""The ranks of a model's layers, as the code sees them; the dictionaries of a configuration are their JSON.

A layer has a `LayerName` (`cross.3`), a rank-bearing point of it a `ComponentName` (`cross.3.qk`), and its ranks are one of three
frozen records, by form: `PerHeadRanks`, `LatentRanks`, `FeedForwardRanks`. A `RankTable` has those of all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedConfig

from ..models.configuration_lowrank_t5 import (
    attention_form,
    attention_parameters,
    cached_numbers,
    feed_forward_parameters,
)

__all__ = [
    "FORMS",
    "AttentionRanks",
    "ComponentName",
    "FeedForwardRanks",
    "LatentRanks",
    "LayerName",
    "LayerRanks",
    "PerHeadRanks",
    "RankTable",
    "Sizes",
]

FEED_FORWARD = "_feed_forward"


@dataclass(frozen=True)
class LayerName:
    """A layer: its kind (`"cross"`, `"encoder_feed_forward"`, in Chronos-2 `"time"` and `"group"`) and its index in the stack."""

    kind: str
    index: int

    @classmethod
    def parse(cls, text: str) -> LayerName:
        """`"cross.3"` as a name."""
        kind, index = text.split(".")
        return cls(kind, int(index))

    @property
    def is_feed_forward(self) -> bool:
        return self.kind.endswith(FEED_FORWARD)

    def __str__(self) -> str:
        return f"{self.kind}.{self.index}"


@dataclass(frozen=True)
class ComponentName:
    """A point of a layer that has a rank of its own: `qk` of `cross.3`."""

    layer: LayerName
    part: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.part}"


class Sizes(NamedTuple):
    """What the numbers of weights depend on beside the ranks: of a configuration, and a hundred times faster to read."""

    d_model: int
    num_heads: int
    is_gated_act: bool

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        """Those of a model of this configuration."""
        return cls(*(getattr(config, name) for name in cls._fields))


class LayerRanks:
    """The ranks of one layer, in one of the forms below."""

    form: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]  # the fields that are ranks of components

    def parameters(self, config: PreTrainedConfig | Sizes) -> int:
        """The number of weights of the layer in a model of this configuration, without position bias."""
        raise NotImplementedError

    def cached_numbers(self, config: PreTrainedConfig | Sizes) -> int:
        """How many numbers a token occupies in the layer's key/value cache."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, int | None]:
        """The layer's entry in the tables of a configuration."""
        return dict(vars(self))


class AttentionRanks(LayerRanks):
    """Those of an attention layer."""

    def parameters(self, config: PreTrainedConfig | Sizes) -> int:
        return attention_parameters(vars(self), d_model=config.d_model, num_heads=config.num_heads)

    def cached_numbers(self, config: PreTrainedConfig | Sizes) -> int:
        return cached_numbers(vars(self), num_heads=config.num_heads)


@dataclass(frozen=True)
class PerHeadRanks(AttentionRanks):
    """Smaller heads (eq. 21 of arXiv 2510.03358): the dimension of queries and keys, and that of values and outputs."""

    form = "per_head"
    parts = ("qk", "vo")

    qk: int
    vo: int


@dataclass(frozen=True)
class LatentRanks(AttentionRanks):
    """One latent a token for all heads (eq. 20, absorbed), and the ranks of the sketches of query and output; None: whole matrices."""

    form = "latent"
    parts = ("latent", "query", "output")

    latent: int
    query: int | None
    output: int | None


@dataclass(frozen=True)
class FeedForwardRanks(LayerRanks):
    """The number of neurons, and the ranks of both matrices as thin factors; None: whole matrices."""

    form = "feed_forward"
    parts = ("wi", "wo")

    width: int
    wi: int | None
    wo: int | None

    def parameters(self, config: PreTrainedConfig | Sizes) -> int:
        return feed_forward_parameters(vars(self), d_model=config.d_model, is_gated=config.is_gated_act)

    def cached_numbers(self, config: PreTrainedConfig | Sizes) -> int:
        return 0


# The forms that attention can have.
FORMS: dict[str, type[PerHeadRanks] | type[LatentRanks]] = {"per_head": PerHeadRanks, "latent": LatentRanks}


@dataclass(frozen=True, eq=False)  # equal as mappings are
class RankTable(Mapping[LayerName, LayerRanks]):
    """The ranks of layers by name, in the order in which a configuration has them."""

    ranks: Mapping[LayerName, LayerRanks]

    def __getitem__(self, name: LayerName) -> LayerRanks:
        return self.ranks[name]

    def __iter__(self) -> Iterator[LayerName]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def __or__(self, other: Mapping[LayerName, LayerRanks]) -> RankTable:
        """This table with the layers of another one in place of its own."""
        return RankTable({**self.ranks, **other})

    @classmethod
    def of(cls, config: PreTrainedConfig) -> RankTable:
        """The table of a low-rank configuration."""
        return cls.from_dicts(config.attention_ranks, config.feed_forward_ranks)

    @classmethod
    def full(cls, config: PreTrainedConfig) -> RankTable:
        """The table of the dense model that has the shape of a low-rank configuration."""
        return cls.from_dicts(**config.full_ranks())

    @classmethod
    def from_dicts(
        cls,
        attention_ranks: Mapping[str, list[dict[str, Any]]],
        feed_forward_ranks: Mapping[str, list[dict[str, Any]]],
    ) -> RankTable:
        """The table that two checked tables of a configuration describe."""
        ranks: dict[LayerName, LayerRanks] = {
            LayerName(kind, index): FORMS[attention_form(entry)](**entry)
            for kind, entries in attention_ranks.items()
            for index, entry in enumerate(entries)
        }
        for stack, entries in feed_forward_ranks.items():
            for index, entry in enumerate(entries):
                ranks[LayerName(f"{stack}{FEED_FORWARD}", index)] = FeedForwardRanks(**entry)
        return cls(ranks)

    def to_dicts(self, config: PreTrainedConfig) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """The two tables of a low-rank configuration with these ranks, and its own of the other layers."""
        names = ("attention_ranks", "feed_forward_ranks")
        attention, feed_forward = (copy.deepcopy(getattr(config, name)) for name in names)
        for name, ranks in self.items():
            is_inner = name.is_feed_forward
            column = feed_forward[name.kind.removesuffix(FEED_FORWARD)] if is_inner else attention[name.kind]
            column[name.index] = ranks.to_dict()
        return dict(zip(names, (attention, feed_forward)))

    def write(self, config: PreTrainedConfig, *, validate: bool = True) -> None:
        """Put these ranks into a low-rank configuration, which keeps those of the other layers.

        Raises:
            ValueError: They do not fit the model, and the configuration stays as it is.
        """
        before = {name: getattr(config, name) for name in ("attention_ranks", "feed_forward_ranks")}
        for name, table in self.to_dicts(config).items():
            setattr(config, name, table)
        try:
            if validate:
                config.validate_ranks()
        except ValueError:
            config.attention_ranks, config.feed_forward_ranks = before.values()
            raise
