"""Time and memory of a Chronos checkpoint against another one, in one run, and the distance to the floor.

Both sides forecast as a user does (`BaseChronosPipeline.from_pretrained`, then `predict_quantiles`), whichever family they belong
to: a dense Chronos-T5 in chronos' own pipeline, a low-rank one in LowRankChronosPipeline. What that pipeline gains without any
compression is measured beside them. Published shapes can be measured with random weights, for speed does not depend on the weights.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ..checkpoints.pipelines import check_checkpoint, in_lean_pipeline
from ..checkpoints.published import build_checkpoint
from ..files import temporary_folder, write_json
from ..timing import Case
from .matmul_floor import Machine, Product, cache_bytes, measure_floor, recorded_products, t5_products
from .measurement import LoadedCheckpoint, Memory, cases

__all__ = ["Benchmark", "Comparison", "Side", "benchmark", "benchmark_shape"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_REPEATS = 3  # each is a process of its own on both sides, and memory varies far less than time
DEFAULT_SAMPLES = 20
MEBIBYTE = 2**20


# ---- What is reported ------------------------------------------------------------------------------------------------


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
        product_flops, floor_seconds, roofline_seconds: What the matrix products alone take: see `matmul_floor.Floor`.
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

    `against_lean`, for a Chronos-T5 alone, is the second one once more, uncompressed, in LowRankChronosPipeline. Ratios are the value of the
    model, or of `against_lean`, over that of `against`, repeat by repeat.
    """

    case: Case
    model: Side
    against: Side
    against_lean: Side | None = None

    @property
    def ratios(self) -> dict[str, list[float]]:
        """`time_ratio`, `memory_ratio` and `floor_ratio` of the model, and with "lean_" before them those of `against_lean`."""
        ratios = self.ratios_of(self.model) | {"floor_ratio": self.model.floor_ratio}
        if self.against_lean is not None:
            ratios |= {f"lean_{name}": values for name, values in self.ratios_of(self.against_lean).items()}
        return ratios

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
        """For programs: the ratios over all repeats of all cases, the `machine`, and the cases as `results`.

        The ratios are `time_ratio`, `memory_ratio`, `floor_ratio`, and `lean_time_ratio` and `lean_memory_ratio` of the second checkpoint in
        LowRankChronosPipeline.
        """
        pooled: dict[str, list[float]] = {}
        for comparison in self.comparisons:
            for name, values in comparison.ratios.items():
                pooled.setdefault(name, []).extend(values)
        results = [comparison.to_dict() for comparison in self.comparisons]
        return {name: spread(values) for name, values in pooled.items()} | {
            "machine": self.machine,
            "results": results,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_dict()` as JSON; the file appears whole or not at all."""
        write_json(path, self.to_dict())

    def tables(self) -> list[Table]:
        """For people: the figures of each case, then the two checkpoints."""
        model, against = self.comparisons[0].model, self.comparisons[0].against
        figures = Table("", "against", "model", "ratio (min to max)", title=f"{model.name} against {against.name}")
        if self.comparisons[0].against_lean is not None:
            figures.add_column("against, in LowRankChronosPipeline")
            figures.add_column("ratio (min to max)")
        figures.caption = "{processor}, {threads} threads, {device} {dtype}".format(**self.machine)
        for comparison in self.comparisons:
            figures.add_row(Text(str(comparison.case), style="bold"))
            theirs = comparison.against.figures()
            rows = {heading: [heading, median_text(values)] for heading, values in theirs.items()}
            for side in filter(None, (comparison.model, comparison.against_lean)):
                ratios = comparison.ratios_of(side)
                shown = {"seconds": ratios["time_ratio"], "peak memory, MiB": ratios["memory_ratio"]}
                for heading, ours in side.figures().items():
                    rows[heading] += [median_text(ours), spread_text(shown.get(heading, []))]
            for row in rows.values():
                figures.add_row(*row)
            figures.add_section()
        checkpoints = Table("checkpoint", "pipeline", "parameters", "MiB on disk", "seconds to load")
        for side in (model, against):
            load = median_text([memory.load_seconds for memory in side.memory])
            disk = f"{side.bytes_on_disk / MEBIBYTE:.1f}"
            checkpoints.add_row(side.name, side.pipeline, f"{side.parameters:,}", disk, load)
        return [figures, checkpoints]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, minimum and maximum; None of nothing."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def median_text(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g}" if values else "-"


def spread_text(values: Sequence[float]) -> str:
    return f"{median_text(values)} ({min(values):.4g} to {max(values):.4g})" if values else ""


# ---- The run ---------------------------------------------------------------------------------------------------------


def benchmark(  # noqa: PLR0913 a public call names all of its options
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

    In every case all sides forecast once to warm up, then `repeats` times each in turn, the order changing from repeat
    to repeat; the times of one repeat make its ratios. Memory is measured in processes of their own, `min(repeats, 3)` on each
    side. The same random walks go into all.

    Args:
        model, against: Folders or Hub ids of checkpoints of any Chronos family, dense or compressed; `"reference"` is the one
            in the package.
        batch_size: Numbers of series that are forecast at once.
        context_length, prediction_length: Numbers of time steps of past and of future.
        num_samples: Numbers of sample paths a series of sampling models (Chronos-T5), 20 by default; other models take none.
        dtype: `"float32"` or `"bfloat16"`, of weights and computation.
        device: `"cpu"` or `"cuda"`; by default CUDA where there is one.
        threads: How many threads PyTorch uses on the CPU; by default PyTorch's own choice.
        repeats: How many forecasts of each side are timed in each case.
        seed: The seed of the random numbers that the series are made of and that sampling models draw their paths with.
        names: What to call the two in the result, in place of the paths.

    Raises:
        ValueError: A size that is not positive or that a model cannot take, an unknown dtype, a device that is not there.
        OSError: A checkpoint that is not there.
    """
    torch_dtype = _dtype(dtype)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    device = device or devices[-1]
    if device not in devices:
        raise ValueError(f"device must be one of {', '.join(devices)} on this machine; found {device!r}.")
    for name, value in (("repeats", repeats), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, found {value}.")
    points = cases(batch_size, context_length, prediction_length, num_samples)
    for argument, path in (("model", model), ("against", against)):
        check_checkpoint(path, argument)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        sides = [
            LoadedCheckpoint.load(path, name, dtype=dtype, device=device)
            for path, name in zip((model, against), names or (model, against))
        ]
        if not any(side.samples for side in sides) and num_samples is not None:
            raise ValueError("num_samples is for models that sample; both of these forecast quantiles: leave it out.")
        if any(side.samples for side in sides) and num_samples is None:
            points = [replace(case, num_samples=DEFAULT_SAMPLES) for case in points]
        longest = max(case.context_length for case in points)
        for side in sides:
            if longest > (limit := side.pipeline.model_context_length):
                raise ValueError(
                    f"context_length must be at most {limit}, the context length of {side.name}; found {longest}."
                )
        if (lean := in_lean_pipeline(sides[1].pipeline)) is not sides[1].pipeline:
            sides.append(replace(sides[1], pipeline=lean, lean=True))
        machine = Machine.measure(torch.device(device), torch_dtype)
        comparisons = [_compare(case, sides, machine, repeats=repeats, seed=seed) for case in points]
        return Benchmark(_describe(machine), tuple(comparisons))
    finally:
        torch.set_num_threads(threads_before)


def benchmark_shape(
    shape: str, *, ratio: float | None = None, form: str = "per_head", feed_forward_ratio: float = 1.0, **options: Any
) -> Benchmark:
    """Measure a published shape with random weights: low-rank against dense, or, without ratios, dense against itself.

    The arguments are those of `build_checkpoint` and of `benchmark`.
    """
    arguments: dict[str, Any] = {"dtype": _dtype(options.get("dtype", "float32")), "seed": options.get("seed", 0)}
    with temporary_folder() as folder:
        dense, compressed = f"{folder}/dense", f"{folder}/compressed"
        build_checkpoint(compressed, shape, ratio=ratio, form=form, feed_forward_ratio=feed_forward_ratio, **arguments)
        build_checkpoint(dense, shape, **arguments)
        label = shape if ratio is None else f"{shape} {form} {ratio:g}"
        if feed_forward_ratio != 1:
            label += f", feed-forward {feed_forward_ratio:g}"
        return benchmark(compressed, dense, names=(label, shape), **options)


def _compare(case: Case, sides: list[LoadedCheckpoint], machine: Machine, *, repeats: int, seed: int) -> Comparison:
    products = [_warm_up(side, case, seed) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    memory: list[list[Memory]] = [[] for _ in sides]
    order = list(range(len(sides)))
    for _ in range(repeats):
        for i in order:
            seconds[i].append(sides[i].seconds(case, seed=seed))
        order = order[1:] + order[:1]
    for _ in range(min(repeats, MEMORY_REPEATS)):
        for side, of_side in zip(sides, memory):
            of_side.append(side.memory(case, seed=seed))
    return Comparison(case, *map(partial(_side, case, machine), sides, products, seconds, memory))


def _warm_up(side: LoadedCheckpoint, case: Case, seed: int) -> list[Product]:
    """Forecast once, and say which matrix products that needs."""
    forecast = partial(side.forecast, case, seed=seed)
    if not side.samples:
        return recorded_products(forecast)
    forecast()
    return t5_products(side.pipeline.inner_model.config, **asdict(case))


def _side(
    case: Case,
    machine: Machine,
    side: LoadedCheckpoint,
    products: list[Product],
    seconds: Sequence[float],
    memory: Sequence[Memory],
) -> Side:
    model = side.pipeline.inner_model
    floor = measure_floor(products, machine)
    cache: tuple[int, int] | tuple[None, None] = (None, None)
    if side.samples:
        sizes = {name: value for name, value in asdict(case).items() if name != "batch_size"}
        cache = cache_bytes(model.config, bytes_per_number=machine.dtype.itemsize, **sizes)
    return Side(
        name=side.name,
        pipeline=type(side.pipeline).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_on_disk=side.bytes_on_disk(),
        seconds=tuple(seconds),
        memory=tuple(memory),
        cache_bytes=cache[0],
        cache_bytes_repeated=cache[1],
        product_flops=floor.flops,
        floor_seconds=floor.seconds,
        roofline_seconds=floor.roofline_seconds,
    )


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; found {name!r}.")
    return DTYPES[name]


def _describe(machine: Machine) -> dict[str, Any]:
    """Where the figures come from; rates in operations and bytes a second."""
    cpuinfo = Path("/proc/cpuinfo")
    model_name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = model_name[1] if model_name else platform.processor() or platform.machine()
    is_cuda = machine.device.type == "cuda"
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(machine.device) if is_cuda else "CPU",
        "dtype": str(machine.dtype).removeprefix("torch."),
        "matmul_flops_per_second": machine.flops_per_second,
        "memory_bytes_per_second": machine.bytes_per_second,
        "python": platform.python_version(),
        **{name: version(name) for name in ("hf-lowrank", "torch", "transformers", "chronos-forecasting")},
    }
