"""What is known of a compression before its work: the sizes that the rule for the ranks leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..text_tables import Table, in_notebook

__all__ = ["CompressionPlan", "PlannedSize"]


@dataclass(frozen=True)
class PlannedSize:
    """One number of the dense model, and what becomes of it.

    Attributes:
        name: What is counted, such as "attention parameters".
        dense: How much of it the dense model has.
        at_most: How much is kept at most; `dense` where nothing is known.
        is_exact: Whether that is known to be kept.
    """

    name: str
    dense: int
    at_most: int
    is_exact: bool

    @property
    def kept_text(self) -> str:
        """For people."""
        if self.is_exact:
            return f"{self.at_most:,}"
        return f"at most {self.at_most:,}" if self.at_most < self.dense else "known after the work alone"

    @property
    def share_text(self) -> str:
        """The share that is kept, where there is one to tell."""
        return f"{self.at_most / max(1, self.dense):.1%}" if self.is_exact or self.at_most < self.dense else ""


@dataclass(frozen=True)
class CompressionPlan:
    """The sizes that a compression will keep, the last of them all parameters of the model."""

    sizes: tuple[PlannedSize, ...]
    bytes_per_number: int

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        whole = self.sizes[-1]
        return {
            "sizes": [asdict(size) for size in self.sizes],
            "dense_bytes": whole.dense * self.bytes_per_number,
            "bytes_at_most": whole.at_most * self.bytes_per_number,
        }

    def table(self) -> Table:
        """For people: a row a size."""
        rows = [[size.name, f"{size.dense:,}", size.kept_text, size.share_text] for size in self.sizes]
        return Table("The model, as it would be compressed", ["", "dense", "kept", "share"], rows)

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        return in_notebook(self.table())

    def __str__(self) -> str:
        return "\n".join(f"{size.name}: {size.dense:,} -> {size.kept_text}" for size in self.sizes)
