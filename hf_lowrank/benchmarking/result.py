"""What a benchmark says: the figures of each side, their ratios, and what makes them less than they should be."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..files import write_json
from ..text_tables import Table, in_notebook
from ..timing import Case
from .measurement import Memory

__all__ = ["Benchmark", "Comparison", "Side"]

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Side:
    """One checkpoint in one case.

    Attributes:
        name: What the checkpoint is called in tables and messages.
        pipeline: The class of the pipeline that forecast.
        parameters: How many numbers all weights of the model have.
        bytes_on_disk: The size of the weight files.
        seconds: The time of one forecast, one value a repeat.
        memory: What one forecast takes in a process of its own, one value a repeat.
        cache_bytes: The key/value cache of one series with all its samples, cross-attention held once; None for models that
            decode in one pass.
        cache_bytes_repeated: That cache with cross-attention held once a sample, as transformers' `generate` does.
        product_flops, floor_seconds, roofline_seconds: What the matrix products alone take: see `matmul_floor.Floor`. None of an
            exported model.
    """

    name: str
    pipeline: str
    parameters: int
    bytes_on_disk: int
    seconds: tuple[float, ...]
    memory: tuple[Memory, ...]
    cache_bytes: int | None
    cache_bytes_repeated: int | None
    product_flops: int | None
    floor_seconds: float | None
    roofline_seconds: float | None

    @property
    def floor_ratio(self) -> list[float]:
        """Measured time over floor: 1.0 is the limit; nothing where no floor is known."""
        floor = self.floor_seconds
        return [] if floor is None else [seconds / floor for seconds in self.seconds]

    def figures(self) -> dict[str, list[float]]:
        """What the table shows, by its heading there."""
        return {
            "seconds": list(self.seconds),
            "peak memory, MiB": [memory.peak / MEBIBYTE for memory in self.memory if memory.peak is not None],
            "time / floor": self.floor_ratio,
            "cache a series, MiB": [] if self.cache_bytes is None else [self.cache_bytes / MEBIBYTE],
        }


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints in one case.

    `against_lean`, of a dense Chronos-T5 or Chronos-2, is the second one once more, uncompressed, in LowRankChronosPipeline or
    LowRankChronos2Pipeline. Ratios are the value of the model, or of `against_lean`, over that of `against`, repeat by repeat. Rounds that
    something else on the machine disturbed are repeated: `repeated_rounds` were, and `disturbed_rounds` of those that count were
    disturbed too.
    """

    case: Case
    model: Side
    against: Side
    against_lean: Side | None = None
    repeated_rounds: int = 0
    disturbed_rounds: int = 0

    @property
    def ratios(self) -> dict[str, list[float]]:
        """`time_ratio`, `memory_ratio` and `floor_ratio` of the model, and with "lean_" before them those of `against_lean`."""
        ratios = self.ratios_of(self.model) | {"floor_ratio": self.model.floor_ratio}
        if self.against_lean is not None:
            ratios |= {f"lean_{name}": values for name, values in self.ratios_of(self.against_lean).items()}
        return ratios

    @property
    def sides(self) -> list[Side]:
        """All that have forecast."""
        return [side for side in (self.model, self.against, self.against_lean) if side is not None]

    def remarks(self) -> list[str]:
        """What makes these figures less than they should be, in words."""
        found = []
        if self.repeated_rounds or self.disturbed_rounds:
            still = (
                f"; {self.disturbed_rounds} of those that count were disturbed too" if self.disturbed_rounds else ""
            )
            found.append(
                f"{self.case}: other work of the machine disturbed {self.repeated_rounds} rounds, which were repeated{still}."
            )
        for side in self.sides:
            if min(side.floor_ratio, default=1.0) < 1:
                found.append(
                    f"{self.case}: {side.name} beats its floor (time / floor {min(side.floor_ratio):.2f}): the machine was busier when "
                    "the products were timed alone."
                )
        return found

    def ratios_of(self, side: Side) -> dict[str, list[float]]:
        """`time_ratio` and `memory_ratio` over `against`."""
        seconds, memory = zip(side.seconds, self.against.seconds), zip(side.memory, self.against.memory)
        return {
            "time_ratio": [ours / theirs for ours, theirs in seconds],
            "memory_ratio": [ours.peak / theirs.peak for ours, theirs in memory if ours.peak and theirs.peak],
        }

    def to_dict(self) -> dict[str, Any]:
        """The ratios' `median`, `min`, `max`, and the absolute figures of all sides."""
        figures = asdict(self)
        for key in ("model", "against", "against_lean"):
            if figures[key] is not None:
                figures[key]["floor_ratio"] = spread(getattr(self, key).floor_ratio)
        return {name: spread(values) for name, values in self.ratios.items()} | figures


@dataclass(frozen=True)
class Benchmark:
    """All cases of a run, and the machine that the figures came from.

    Attributes:
        machine: Processor, threads, device, dtype, the rates of large products and of memory, and the versions of libraries.
        comparisons: One for each case, in the order of `measurement.cases`.
    """

    machine: dict[str, Any]
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """For programs: the ratios over all repeats of all cases, the `machine`, the cases as `results`, and `remarks`.

        The ratios are `time_ratio`, `memory_ratio`, `floor_ratio`, and `lean_time_ratio` and `lean_memory_ratio` of the second checkpoint in
        the pipeline of our models.
        """
        pooled: dict[str, list[float]] = {}
        for comparison in self.comparisons:
            for name, values in comparison.ratios.items():
                pooled.setdefault(name, []).extend(values)
        results = [comparison.to_dict() for comparison in self.comparisons]
        return {name: spread(values) for name, values in pooled.items()} | {
            "machine": self.machine,
            "results": results,
            "remarks": self.remarks(),
        }

    def remarks(self) -> list[str]:
        """What makes the figures less than they should be, such as rounds that other work disturbed."""
        return [remark for comparison in self.comparisons for remark in comparison.remarks()]

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_dict()` as JSON; the file appears whole or not at all."""
        write_json(path, self.to_dict())

    def tables(self) -> list[Table]:
        """For people: the figures of each case, then the two checkpoints."""
        model, against, lean = (getattr(self.comparisons[0], name) for name in ("model", "against", "against_lean"))
        headings = ["", "against", "model", "ratio (min to max)"]
        if lean is not None:
            headings += [f"against, in {lean.pipeline}", "ratio (min to max)"]
        figures: list[list[str]] = []
        cases = set()
        for comparison in self.comparisons:
            cases.add((len(figures), 0))
            figures.append([str(comparison.case), *[""] * (len(headings) - 1)])
            theirs = comparison.against.figures()
            rows = {heading: [heading, median_text(values)] for heading, values in theirs.items()}
            for side in filter(None, (comparison.model, comparison.against_lean)):
                ratios = comparison.ratios_of(side)
                shown = {"seconds": ratios["time_ratio"], "peak memory, MiB": ratios["memory_ratio"]}
                for heading, ours in side.figures().items():
                    rows[heading] += [median_text(ours), spread_text(shown.get(heading, []))]
            figures += rows.values()
        checkpoints = [
            [
                side.name,
                side.pipeline,
                f"{side.parameters:,}",
                f"{side.bytes_on_disk / MEBIBYTE:.1f}",
                median_text([memory.load_seconds for memory in side.memory]),
            ]
            for side in (model, against)
        ]
        machine = "{processor}, {threads} threads, {device} {dtype}".format(**self.machine)
        return [
            Table(f"{model.name} against {against.name}", headings, figures, frozenset(cases), note=machine),
            Table(
                "The checkpoints",
                ["checkpoint", "pipeline", "parameters", "MiB on disk", "seconds to load"],
                checkpoints,
                num_texts=2,
            ),
        ]

    def _repr_html_(self) -> str:
        """The tables, in a notebook."""
        return in_notebook(*self.tables())


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, minimum and maximum; None of nothing."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def median_text(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g}" if values else "-"


def spread_text(values: Sequence[float]) -> str:
    return f"{median_text(values)} ({min(values):.4g} to {max(values):.4g})" if values else ""
