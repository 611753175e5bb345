"""The sizes of a low-rank model, layer by layer, beside those of the dense model of its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.modeling_lowrank_quantized import QuantizedLinear
from .families import T5, family_of_config
from .rank_table import LayerName, RankTable

__all__ = ["CompressionSummary", "LayerSummary", "layer_bytes", "stored_bytes", "summarize"]


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
    def name(self) -> LayerName:
        return LayerName(self.kind, self.layer)

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


@dataclass(frozen=True, repr=False)
class CompressionSummary:
    """What the formulas of `LowRankT5Config` say of a model, layer by layer."""

    rows: tuple[LayerSummary, ...]

    def total(self, name: str, *kinds: str) -> int:
        """The sum of one of the rows' numbers, over all layers or those of some kinds."""
        return sum(getattr(row, name) for row in self.rows if not kinds or row.kind in kinds)

    def dense_parameters(self, parameters: int) -> int:
        """All parameters of the dense model, where the low-rank one has `parameters` in all."""
        return parameters - self.total("parameters") + self.total("dense_parameters")

    def __repr__(self) -> str:
        kept, had = self.total("parameters"), self.total("dense_parameters")
        cache = f", cache {self.cache_ratio:.1%}" if self.total("dense_cached_numbers") else ""
        return f"CompressionSummary({len(self.rows)} layers: {kept:,} of {had:,} parameters, attention {self.attention_ratio:.1%}{cache})"

    def __str__(self) -> str:
        """A line a layer, and the totals."""
        lines = [
            f"{f'{row.kind} {row.layer}':<24}{row.parameters:>12,} of {row.dense_parameters:>12,} parameters  {row.ranks_text}".rstrip()
            for row in self.rows
        ]
        kept, had = self.total("parameters"), self.total("dense_parameters")
        cache = f", cache {self.cache_ratio:.1%}" if self.total("dense_cached_numbers") else ""
        total = f"{'all layers':<24}{kept:>12,} of {had:>12,} parameters  attention {self.attention_ratio:.1%}{cache}"
        return "\n".join([*lines, total])

    @property
    def attention_ratio(self) -> float:
        """The kept share of the attention parameters."""
        kinds = {row.kind for row in self.rows if not row.name.is_feed_forward}
        return self.total("parameters", *kinds) / self.total("dense_parameters", *kinds)

    @property
    def cache_ratio(self) -> float:
        """The kept share of what one token of context and one of the forecast occupy in the key/value cache."""
        return self.total("cached_numbers") / max(1, self.total("dense_cached_numbers"))

    def to_dict(self, *, bytes_per_number: int, stored: Mapping[LayerName, int] | None = None) -> dict[str, Any]:
        """For programs: the rows with their bytes, and the totals; `stored` says what layers of integers take."""
        rows = [
            asdict(row)
            | {
                "bytes": (stored or {}).get(row.name, row.parameters * bytes_per_number),
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
    family, full = family_of_config(config), RankTable.full(config)
    is_encoder = family is T5 and not config.is_encoder_decoder
    rows = []
    for name, ranks in RankTable.of(config).items():
        if is_encoder and family.places[name.kind][0] != "encoder":
            continue
        token, dense = int(name.kind in family.cached), full[name]
        rows.append(
            LayerSummary(
                kind=name.kind,
                layer=name.index,
                ranks=ranks.to_dict(),
                dense_ranks=dense.to_dict(),
                parameters=ranks.parameters(config),
                dense_parameters=dense.parameters(config),
                cached_numbers=token * ranks.cached_numbers(config),
                dense_cached_numbers=token * dense.cached_numbers(config),
            )
        )
    return CompressionSummary(tuple(rows))


def stored_bytes(model: PreTrainedModel) -> int:
    """The bytes of the tensors of a model that are saved; what is tied counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def layer_bytes(model: PreTrainedModel) -> dict[LayerName, int]:
    """The bytes of the matrices of each layer of a low-rank model, as they are saved."""
    family, sizes = family_of_config(model.config), {}
    for row in summarize(model.config).rows:
        layer = model.get_submodule(family.places[row.kind][1].format(row.layer))
        matrices = (module for module in layer.modules() if isinstance(module, (nn.Linear, QuantizedLinear)))
        sizes[row.name] = sum(tensor.nbytes for matrix in matrices for tensor in matrix.state_dict().values())
    return sizes
