"""Time and memory of a Chronos checkpoint against another one, in one run, and the distance to the floor.

Both sides forecast through chronos' own pipeline (`BaseChronosPipeline.from_pretrained`, then `predict_quantiles`), whichever
family they belong to. Published shapes can be measured with random weights, for speed does not depend on the weights.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from itertools import product as cartesian_product
from pathlib import Path
from typing import Any

import torch
from chronos import BaseChronosPipeline
from chronos.base import ForecastType
from rich.table import Table
from transformers import T5Config, T5ForConditionalGeneration

from .floor import Machine, cache_bytes, measure_floor, recorded_products, t5_products
from .shapes import build_checkpoint

__all__ = ["Benchmark", "Case", "Comparison", "Memory", "Side", "benchmark", "benchmark_shape"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_REPEATS = 3  # each is a process of its own on both sides, and memory varies far less than time
MEBIBYTE = 2**20


# ---- What is reported ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One point of the grid: series at once, time steps of past and of future, sample paths (None: a quantile model)."""

    batch_size: int
    context_length: int
    prediction_length: int
    num_samples: int | None


@dataclass(frozen=True)
class Memory:
    """One forecast in a process of its own: bytes above that process before it loads the model, and seconds to load.

    `peak` is the highest level while loading and forecasting, `working` the part of it above the loaded model. On CPU the
    resident set (None on systems other than Linux), on CUDA what the allocator hands out.
    """

    peak: int | None
    working: int | None
    load_seconds: float


@dataclass(frozen=True)
class Side:
    """One checkpoint in one case; `seconds` and `memory` hold one value a repeat.

    `cache_bytes` is the key/value cache of one series with all its samples, cross-attention held once;
    `cache_bytes_repeated` the same with cross-attention held once a sample, as transformers' `generate` does. None for
    models that decode in one pass. For the floor see `hf_lowrank.floor.Floor`.
    """

    name: str
    pipeline: str
    parameters: int
    bytes_on_disk: int
    seconds: tuple[float, ...]
    memory: tuple[Memory, ...]
    cache_bytes: int | None
    cache_bytes_repeated: int | None
    product_flops: int
    floor_seconds: float
    roofline_seconds: float

    @property
    def floor_ratio(self) -> list[float]:
        """Measured time over floor: 1.0 is the limit."""
        return [seconds / self.floor_seconds for seconds in self.seconds]


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints in one case. Ratios are the model's value over the other's, repeat by repeat."""

    case: Case
    model: Side
    against: Side

    @property
    def ratios(self) -> dict[str, list[float]]:
        seconds = zip(self.model.seconds, self.against.seconds)
        memory = zip(self.model.memory, self.against.memory)
        return {
            "time_ratio": [ours / theirs for ours, theirs in seconds],
            "memory_ratio": [ours.peak / theirs.peak for ours, theirs in memory if ours.peak and theirs.peak],
            "floor_ratio": self.model.floor_ratio,
        }

    def to_dict(self) -> dict[str, Any]:
        """The ratios' `median`, `min`, `max`, and the absolute figures of both sides."""
        figures = asdict(self)
        for key, side in (("model", self.model), ("against", self.against)):
            figures[key]["floor_ratio"] = spread(side.floor_ratio)
        return {name: spread(values) for name, values in self.ratios.items()} | figures


@dataclass(frozen=True)
class Benchmark:
    """All cases of a run, and the machine that the figures came from."""

    machine: dict[str, Any]
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """`time_ratio`, `memory_ratio`, `floor_ratio` over all repeats of all cases; `machine`; the cases as `results`."""
        pooled: dict[str, list[float]] = {}
        for comparison in self.comparisons:
            for name, values in comparison.ratios.items():
                pooled.setdefault(name, []).extend(values)
        results = [comparison.to_dict() for comparison in self.comparisons]
        return {name: spread(values) for name, values in pooled.items()} | {
            "machine": self.machine,
            "results": results,
        }

    def write_json(self, file: Path) -> None:
        """Write `to_dict()`; the file appears whole or not at all."""
        partial = file.with_name(file.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        os.replace(partial, file)

    def tables(self) -> list[Table]:
        """For people: a row for each case, then a row for each checkpoint. "dense" is the checkpoint compared with."""
        model, against = self.comparisons[0].model, self.comparisons[0].against
        cases = Table("batch", "context", "horizon", "samples", "", "model", "against", "ratio (min to max)")
        cases.title = f"{model.name} against {against.name}"
        cases.caption = "{processor}, {threads} threads, {device} {dtype}".format(**self.machine)
        for comparison in self.comparisons:
            sides, ratios = (comparison.model, comparison.against), comparison.ratios
            peaks = [[memory.peak for memory in side.memory if memory.peak is not None] for side in sides]
            point = ["-" if value is None else str(value) for value in astuple(comparison.case)]
            cases.add_row(*point, "seconds", *(text(side.seconds) for side in sides), text(ratios["time_ratio"], True))
            cases.add_row(*[""] * 4, "peak MiB", *(text(peak, unit=MEBIBYTE) for peak in peaks), text(ratios["memory_ratio"], True))
            cases.add_row(*[""] * 4, "time / floor", *(text(side.floor_ratio) for side in sides))
            cases.add_row(*[""] * 4, "cache KiB a series", *(text([side.cache_bytes or 0], unit=1024) for side in sides))
            cases.add_section()
        checkpoints = Table("checkpoint", "pipeline", "parameters", "MiB on disk", "seconds to load")
        for side in (model, against):
            load = text([memory.load_seconds for memory in side.memory])
            disk = text([side.bytes_on_disk], unit=MEBIBYTE)
            checkpoints.add_row(side.name, side.pipeline, f"{side.parameters:,}", disk, load)
        return [cases, checkpoints]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, minimum and maximum; None of nothing."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def text(values: Sequence[float], with_range: bool = False, *, unit: float = 1.0) -> str:
    """The median, if wished with its range, in a unit."""
    if not values:
        return "-"
    median, low, high = (f"{value / unit:.4g}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})" if with_range else median


# ---- The run ---------------------------------------------------------------------------------------------------------


def benchmark(
    model: str,
    against: str,
    *,
    batch_size: Iterable[int] = (8,),
    context_length: Iterable[int] = (512,),
    prediction_length: Iterable[int] = (64,),
    num_samples: Iterable[int] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    names: tuple[str, str] | None = None,
) -> Benchmark:
    """Measure two checkpoints on every combination of the given sizes.

    In every case both sides forecast once to warm up, then `repeats` times each in turn, the order changing from repeat
    to repeat; a repeat's two times make one ratio. Memory is measured in processes of their own, `min(repeats, 3)` on each
    side. The same random walks go into both.

    Args:
        model, against: Folders or Hub ids of checkpoints of any Chronos family, dense or compressed; `"reference"` is the one
            in the package.
        batch_size, context_length, prediction_length: Series at once and time steps.
        num_samples: Sample paths a series of sampling models (Chronos-T5), 20 by default; other models take none.
        dtype: `"float32"` or `"bfloat16"`, of weights and computation.
        device: `"cpu"` or `"cuda"`; by default CUDA where there is one.
        threads: Of PyTorch on the CPU; by default PyTorch's own choice.
        names: What to call the two in the result, in place of the paths.

    Raises:
        ValueError: A size that is not positive or that a model cannot take, an unknown dtype, a device that is not there.
        OSError: A checkpoint that is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be 'cpu' where PyTorch finds no CUDA device; found {device!r}.")
    for name, value in (("repeats", repeats), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, found {value}.")
    sizes = {"batch_size": batch_size, "context_length": context_length, "prediction_length": prediction_length}
    grid = {name: _positive(name, values) for name, values in sizes.items()}
    grid_samples = None if num_samples is None else _positive("num_samples", num_samples)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        paths = [_resolve(name) for name in (model, against)]
        pipelines = [_load(path, dtype, device) for path in paths]
        if any(_samples(pipeline) for pipeline in pipelines):
            grid["num_samples"] = grid_samples or [20]
        elif grid_samples is not None:
            raise ValueError("num_samples is for models that sample; both of these forecast quantiles: leave it out.")
        else:
            grid["num_samples"] = [None]
        for name, pipeline in zip((model, against), pipelines):
            if max(grid["context_length"]) > pipeline.model_context_length:
                raise ValueError(
                    f"context_length must be at most {pipeline.model_context_length}, the context length of {name}; "
                    f"found {max(grid['context_length'])}."
                )
        run = _Run(paths, pipelines, names or (model, against), dtype, device, repeats, seed)
        return Benchmark(run.machine(), tuple(run.compare(Case(*point)) for point in cartesian_product(*grid.values())))
    finally:
        torch.set_num_threads(threads_before)
