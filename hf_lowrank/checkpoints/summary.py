"""The sizes of a low-rank model, layer by layer, beside those of the dense model of its shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..models.configuration_lowrank_t5 import (
    attention_parameters,
    cached_numbers,
    feed_forward_parameters,
)
from .families import FAMILIES, T5

__all__ = ["CompressionSummary", "LayerSummary", "summarize"]


@dataclass(frozen=True)
class LayerSummary:
    """One attention or feed-forward layer, before (`dense_`) and after; cached numbers are those of one token."""

    kind: str
    layer: int
    ranks: dict[str, Any]
    dense_ranks: dict[str, Any]
    parameters: int
    dense_parameters: int
    cached_numbers: int
    dense_cached_numbers: int

    @property
    def ranks_text(self) -> str:
        """Ranks kept / had, such as "qk 3/8, vo 5/8"; a whole matrix has none."""
        if "latent" in self.ranks:
            return ", ".join(f"{name} {rank or 'dense'}" for name, rank in self.ranks.items())
        return ", ".join(
            f"{name} {rank}/{self.dense_ranks[name] or 'dense'}"
            for name, rank in self.ranks.items()
            if rank is not None
        )


@dataclass(frozen=True)
class CompressionSummary:
    """What the formulas of `LowRankT5Config` say of a model, layer by layer."""

    rows: tuple[LayerSummary, ...]

    def total(self, name: str, *kinds: str) -> int:
        """The sum of one of the rows' numbers, over all layers or those of some kinds."""
        return sum(getattr(row, name) for row in self.rows if not kinds or row.kind in kinds)

    @property
    def attention_ratio(self) -> float:
        """The kept share of the attention parameters."""
        kinds = {row.kind for row in self.rows if not row.kind.endswith("feed_forward")}
        return self.total("parameters", *kinds) / self.total("dense_parameters", *kinds)

    @property
    def cache_ratio(self) -> float:
        """The kept share of what one token of context and one of the forecast occupy in the key/value cache."""
        return self.total("cached_numbers") / max(1, self.total("dense_cached_numbers"))

    def to_dict(self, *, bytes_per_number: int) -> dict[str, Any]:
        """For programs: the rows with their bytes, and the totals."""
        rows = [
            asdict(row)
            | {
                "bytes": row.parameters * bytes_per_number,
                "dense_bytes": row.dense_parameters * bytes_per_number,
                "cache_bytes_per_token": row.cached_numbers * bytes_per_number,
                "dense_cache_bytes_per_token": row.dense_cached_numbers * bytes_per_number,
            }
            for row in self.rows
        ]
        totals = {
            name: sum(row[name] for row in rows) for name in rows[0] if name.endswith(("parameters", "bytes", "token"))
        }
        return {
            "attention_ratio": self.attention_ratio,
            "cache_ratio": self.cache_ratio,
            "totals": totals,
            "layers": rows,
        }


def summarize(config: PreTrainedConfig) -> CompressionSummary:
    """The sizes of every layer of a low-rank configuration beside those of the dense model of its shape."""
    full = config.full_ranks()
    size = {"d_model": config.d_model, "num_heads": config.num_heads}
    tables: tuple[dict, ...] = config.attention_ranks, config.feed_forward_ranks
    family = next(family for family in FAMILIES if family.config_class.model_type == config.model_type)
    if family is T5 and not config.is_encoder_decoder:  # an encoder alone
        tables = tuple({key: table[key] for key in table if key.startswith("encoder")} for table in tables)
    rows = []
    for kind, entries in tables[0].items():
        token = int(kind in family.cached)
        for i, (entry, dense) in enumerate(zip(entries, full["attention_ranks"][kind])):
            rows.append(
                LayerSummary(
                    kind=kind,
                    layer=i,
                    ranks=entry,
                    dense_ranks=dense,
                    parameters=attention_parameters(entry, **size),
                    dense_parameters=attention_parameters(dense, **size),
                    cached_numbers=token * cached_numbers(entry, num_heads=config.num_heads),
                    dense_cached_numbers=token * cached_numbers(dense, num_heads=config.num_heads),
                )
            )
    shape = {"d_model": config.d_model, "is_gated": config.is_gated_act}
    for stack, entries in tables[1].items():
        for i, entry in enumerate(entries):
            dense = full["feed_forward_ranks"][stack][i]
            rows.append(
                LayerSummary(
                    kind=f"{stack}_feed_forward",
                    layer=i,
                    ranks=entry,
                    dense_ranks=dense,
                    parameters=feed_forward_parameters(entry, **shape),
                    dense_parameters=feed_forward_parameters(dense, **shape),
                    cached_numbers=0,
                    dense_cached_numbers=0,
                )
            )
    return CompressionSummary(tuple(rows))
