"""The sizes of a low-rank model, layer by layer, beside those of the dense model of its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.modeling_lowrank_quantized import QuantizedLinear
from ..text_tables import Table, in_notebook
from .families import T5, family_of_config
from .rank_table import LayerName, RankTable

__all__ = ["CompressionSummary", "LayerSummary", "ModelSize", "summarize"]


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


@dataclass(frozen=True)
class ModelSize:
    """All of a loaded model as it is saved, and the dense one of its shape in the same dtype.

    Attributes:
        dtype: Of the numbers that are no integers.
        parameters, dense_parameters: How many numbers the weights have.
        bytes, dense_bytes: Of their tensors; what is tied counts once.
        layers: The bytes of the matrices of each layer.
    """

    dtype: torch.dtype
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    layers: Mapping[LayerName, int]

    @property
    def dtype_name(self) -> str:
        """Such as "float32"."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, repr=False)
class CompressionSummary:
    """What the formulas of `LowRankT5Config` say of a model, layer by layer; as a table in a notebook.

    Attributes:
        rows: One for each layer.
        compression: How the model was made, as its configuration records it.
        size: Of the whole model, where one was given.
    """

    rows: tuple[LayerSummary, ...]
    compression: Mapping[str, Any] = field(default_factory=dict)
    size: ModelSize | None = None

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
    def totals_text(self) -> str:
        """The sizes of the whole model in words, as far as they are known."""
        cache = f", cache {self.cache_ratio:.1%}" if self.total("dense_cached_numbers") else ""
        if (size := self.size) is None:
            kept, had, stored = self.total("parameters"), self.total("dense_parameters"), ""
        else:
            kept, had = size.parameters, size.dense_parameters
            stored = f", {size.bytes / 2**20:.1f} of {size.dense_bytes / 2**20:.1f} MiB in {size.dtype_name}"
        return (
            f"{kept:,} of {had:,} parameters ({kept / had:.1%}){stored}; attention {self.attention_ratio:.1%}{cache}."
        )

    @property
    def made_text(self) -> str:
        """How the model was made, in words; "" where its configuration does not say."""
        record = self.compression
        if "policy" not in record:
            return ""
        arguments = record.get("arguments") or {}
        rule = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if name != "ranks")
        text = f"Made from {record['source']}" if "source" in record else "Made"
        text += f" by {rule or record['policy']}"
        if calibration := record.get("calibration"):
            text += f", calibrated on {calibration['data']}"
        if loss := record.get("measured_loss"):
            text += f"; adds {loss['loss']:.2%} to the expected loss (below {loss['bound']:.2%} with 95 % confidence)"
        return text + "."

    def table(self) -> Table:
        """For people: a row a layer that has changed, and the totals; the cache is that of one token."""
        size, has_cache = self.size, self.total("dense_cached_numbers") > 0
        itemsize = 1 if size is None else size.dtype.itemsize
        headings = ["layer", "ranks", "parameters", "share"]
        headings += [] if size is None else ["KiB"]
        headings += [f"cache {'numbers' if size is None else 'B'}"] if has_cache else []

        def row(name: str, ranks: str, total: Callable[[str], int], stored: int) -> list[str]:
            had, kept, cached = total("dense_parameters"), total("parameters"), total("dense_cached_numbers")
            cells = [name, ranks, f"{_short(had)} → {_short(kept)}", f"{kept / had:.1%}"]
            cells += [] if size is None else [f"{stored / 1024:,.0f}"]
            cells += [f"{cached * itemsize:,} → {total('cached_numbers') * itemsize:,}" if cached else ""] * has_cache
            return cells

        layers = {} if size is None else size.layers
        changed = [one for one in self.rows if one.ranks != one.dense_ranks]
        rows = [
            row(f"{one.kind} {one.layer}", one.ranks_text, partial(getattr, one), layers.get(one.name, 0))
            for one in changed
        ]
        how_many = f"{len(changed)} of {len(self.rows)} changed"
        rows.append(row("all layers", how_many, self.total, sum(layers.values())))
        totals = frozenset((len(changed), column) for column in range(len(headings)))
        return Table("Each layer, before → after; ranks kept / had", headings, rows, totals, num_texts=2)

    def _repr_html_(self) -> str:
        """The table, in a notebook, and below it the whole model and how it was made."""
        return in_notebook(replace(self.table(), note=f"{self.totals_text} {self.made_text}".rstrip()))

    @property
    def attention_ratio(self) -> float:
        """The kept share of the attention parameters."""
        kinds = {row.kind for row in self.rows if not row.name.is_feed_forward}
        return self.total("parameters", *kinds) / self.total("dense_parameters", *kinds)

    @property
    def cache_ratio(self) -> float:
        """The kept share of what one token of context and one of the forecast occupy in the key/value cache."""
        return self.total("cached_numbers") / max(1, self.total("dense_cached_numbers"))

    def to_dict(self, *, bytes_per_number: int) -> dict[str, Any]:
        """For programs: the rows with their bytes, those of a loaded model as they are saved, and the totals."""
        stored = {} if self.size is None else self.size.layers
        rows = [
            asdict(row)
            | {
                "bytes": stored.get(row.name, row.parameters * bytes_per_number),
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


def summarize(model: PreTrainedModel | PreTrainedConfig) -> CompressionSummary:
    """The sizes of every layer of a low-rank model, or of its configuration, beside those of the dense model of its shape.

    A loaded model says what the whole of it takes too, in its own dtype and integers (`CompressionSummary.size`).
    """
    is_model = isinstance(model, PreTrainedModel)
    config = model.config if is_model else model
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
    summary = CompressionSummary(tuple(rows), config.compression or {})
    return replace(summary, size=_size(model, summary)) if is_model else summary


def _size(model: PreTrainedModel, summary: CompressionSummary) -> ModelSize:
    parameters = model.num_parameters()
    dense_parameters = summary.dense_parameters(parameters)
    return ModelSize(
        dtype=model.dtype,
        parameters=parameters,
        dense_parameters=dense_parameters,
        bytes=sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values()),
        dense_bytes=dense_parameters * model.dtype.itemsize,
        layers={row.name: _layer_bytes(model, row.name) for row in summary.rows},
    )


def _layer_bytes(model: PreTrainedModel, name: LayerName) -> int:
    layer = model.get_submodule(family_of_config(model.config).places[name.kind][1].format(name.index))
    matrices = (module for module in layer.modules() if isinstance(module, (nn.Linear, QuantizedLinear)))
    return sum(tensor.nbytes for matrix in matrices for tensor in matrix.state_dict().values())


def _short(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"
