"""Time and memory of a Chronos checkpoint against another one, in one run, and the distance to the floor.

Both sides forecast as a user does (`BaseChronosPipeline.from_pretrained`, then `predict_quantiles`), whichever family they belong
to: a dense Chronos-T5 in chronos' own pipeline, a low-rank one in LowRankChronosPipeline. What that pipeline gains without any
compression is measured beside them. Published shapes can be measured with random weights, for speed does not depend on the weights.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.devices import known_device, known_dtype
from ..checkpoints.pipelines import in_lean_pipeline
from ..checkpoints.published import build_checkpoint
from ..exporting.export import export_model
from ..files import temporary_folder
from ..progress import progress_display
from ..timing import Case
from ..versions import versions
from .matmul_floor import SQUARE, Machine, Product, cache_bytes, measure_floor, recorded_products, t5_products
from .measurement import LoadedCheckpoint, Memory, cases
from .result import Benchmark, Comparison, Side
from .rounds import measure_rounds

__all__ = ["Benchmark", "Comparison", "Side", "benchmark", "benchmark_shape"]

MEMORY_REPEATS = 3  # each is a process of its own on both sides, and memory varies far less than time
DEFAULT_SAMPLES = 20
# What int8 may add to the loss with random weights, whose quantiles say little: about as many products stay in float as of trained ones with
# the usual tolerance.
RANDOM_TOLERANCE = 8e-4
FLOOR_RETRIES = 2  # how often products are timed again whose sum is more than a whole forecast


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
    show_progress: bool | None = None,
) -> Benchmark:
    """Measure two checkpoints on every combination of the given sizes.

    In every case all sides forecast once to warm up, then `repeats` times each in turn, the order changing from repeat
    to repeat; the times of one repeat make its ratios. Memory is measured in processes of their own, `min(repeats, 3)` on each
    side. The same random walks go into all. Rounds in which the machine was busy with something else are repeated, at most
    `repeats` in each case, and the result says how many were.

    Args:
        model, against: Folders or Hub ids of checkpoints of any Chronos family, dense or compressed; `"reference"` is the one
            in the package. Also what `export_model` has written, of which no floor is known.
        batch_size: Numbers of series that are forecast at once.
        context_length, prediction_length: Numbers of time steps of past and of future.
        num_samples: Numbers of sample paths a series of sampling models (Chronos-T5), 20 by default; other models take none.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, of weights and computation.
        device: `"cpu"` or `"cuda"`; by default CUDA where there is one.
        threads: How many threads PyTorch uses on the CPU; by default PyTorch's own choice.
        repeats: How many forecasts of each side are timed in each case.
        seed: The seed of the random numbers that the series are made of and that sampling models draw their paths with.
        names: What to call the two in the result, in place of the paths.
        show_progress: Show a progress bar; by default in a terminal or a notebook.

    Raises:
        ValueError: A size that is not positive or that a model cannot take, an unknown dtype, a device that is not there.
        OSError: A checkpoint that is not there.
    """
    torch_dtype, device = _measurable(dtype, device)
    for name, value in (("repeats", repeats), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, found {value}.")
    points = cases(batch_size, context_length, prediction_length, num_samples)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        sides = [
            LoadedCheckpoint.checked(path, name, argument=argument, dtype=dtype, device=device)
            for path, name, argument in zip((model, against), names or (model, against), ("model", "against"))
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
        # Of each case the least number of forecasts in this process and of processes that forecast.
        steps = len(sides) * (repeats + min(repeats, MEMORY_REPEATS))
        with progress_display(show=show_progress) as display:
            step = display.add_task("", total=steps * len(points))
            comparisons = []
            for i, case in enumerate(points):
                display.update(step, description=f"Forecasting, {case}")
                advance = partial(display.advance, step)
                comparisons.append(_compare(case, sides, machine, repeats=repeats, seed=seed, advance=advance))
                display.update(step, completed=steps * (i + 1))
        return Benchmark(_describe(machine), tuple(comparisons))
    finally:
        torch.set_num_threads(threads_before)


def benchmark_shape(
    shape: str,
    *,
    ratio: float | None = None,
    form: str = "per_head",
    feed_forward_ratio: float = 1.0,
    total_ratio: float | None = None,
    format: str | None = None,
    quantize: str | None = None,
    **options: Any,
) -> Benchmark:
    """Measure a published shape with random weights: low-rank against dense, or, without ratios, dense against itself.

    The arguments are those of `build_checkpoint` and of `benchmark`; with `format`, and `quantize`, the low-rank side is exported first,
    as `export_model` does it, with the tolerance `RANDOM_TOLERANCE`: about as many products stay in float as of a trained model.
    """
    if quantize is not None and format is None:
        raise ValueError(f"quantize is of an export: give format='onnx' too, found quantize={quantize!r} alone.")
    arguments: dict[str, Any] = {
        "dtype": known_dtype(options.get("dtype", "float32"), has_auto=False),
        "seed": options.get("seed", 0),
    }
    with temporary_folder() as folder:
        dense, compressed = f"{folder}/dense", f"{folder}/compressed"
        build_checkpoint(
            compressed,
            shape,
            ratio=ratio,
            form=form,
            feed_forward_ratio=feed_forward_ratio,
            total_ratio=total_ratio,
            **arguments,
        )
        build_checkpoint(dense, shape, **arguments)
        label = shape if ratio is None else f"{shape} {form} {ratio:g}"
        if feed_forward_ratio != 1:
            label += f", feed-forward {feed_forward_ratio:g}"
        if total_ratio is not None:
            label += f" {total_ratio:g}"
        if format is not None:
            exported = f"{folder}/exported"
            progress = options.get("show_progress")
            export_model(
                compressed,
                exported,
                format=format,
                quantize=quantize,
                tolerance=RANDOM_TOLERANCE,
                show_progress=progress,
            )
            compressed, label = exported, f"{label}, {format}{'' if quantize is None else f' {quantize}'}"
        return benchmark(compressed, dense, names=(label, shape), **options)


def _compare(
    case: Case,
    sides: list[LoadedCheckpoint],
    machine: Machine,
    *,
    repeats: int,
    seed: int,
    advance: Callable[[], None],
) -> Comparison:
    products = [_warm_up(side, case, seed) for side in sides]
    rounds = measure_rounds([partial(side.timing, case, seed=seed) for side in sides], repeats, after_each=advance)
    memory: list[list[Memory]] = [[] for _ in sides]
    for _ in range(min(repeats, MEMORY_REPEATS)):
        for side, of_side in zip(sides, memory):
            of_side.append(side.memory(case, seed=seed))
            advance()
    for needed, seconds in zip(products, rounds.seconds):
        for _ in range(FLOOR_RETRIES if needed else 0):
            if measure_floor(needed, machine).seconds > min(seconds):
                machine.time_again(needed)
    model, against, *lean = map(partial(_side, case, machine), sides, products, rounds.seconds, memory)
    return Comparison(case, model, against, lean[0] if lean else None, rounds.num_repeated, rounds.num_disturbed)


def _warm_up(side: LoadedCheckpoint, case: Case, seed: int) -> list[Product]:
    """Forecast once, and say which matrix products that needs; nothing of an exported model, into which nobody looks."""
    forecast = partial(side.forecast, case, seed=seed)
    if side.exported is not None:
        forecast()
        return []
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
    floor = measure_floor(products, machine) if products else None
    cache: tuple[int, int] | tuple[None, None] = (None, None)
    if side.samples:
        sizes = {name: value for name, value in asdict(case).items() if name != "batch_size"}
        cache = cache_bytes(model.config, bytes_per_number=machine.dtype.itemsize, **sizes)
    return Side(
        name=side.name,
        pipeline=type(side.pipeline).__name__,
        parameters=side.parameters(),
        bytes_on_disk=side.bytes_on_disk(),
        seconds=tuple(seconds),
        memory=tuple(memory),
        cache_bytes=cache[0],
        cache_bytes_repeated=cache[1],
        product_flops=None if floor is None else floor.flops,
        floor_seconds=None if floor is None else floor.seconds,
        roofline_seconds=None if floor is None else floor.roofline_seconds,
    )


def _measurable(dtype: str, device: str | None) -> tuple[torch.dtype, str]:
    """The dtype and the device, where one can be measured."""
    device = known_device(device)
    if device not in SQUARE:  # not "cuda:1" either: what the GPU has in use is asked of the first
        raise ValueError(f"device must be one of {', '.join(SQUARE)} to be measured, found {device!r}.")
    found = known_dtype(dtype, has_auto=False)
    assert isinstance(found, torch.dtype)
    return found, device


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
        **versions(),
    }
