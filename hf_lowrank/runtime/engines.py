"""What runs the graphs of an exported model: ONNX Runtime, OpenVINO, PyTorch, or the processor itself."""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .folder import ExportRecord

__all__ = ["OPENVINO_GROUP", "Engine", "engine_of", "processor"]

OPENVINO_GROUP = 64  # numbers of a token that OpenVINO rounds together, where matrices are int8

Arrays = dict[str, NDArray[np.float32]]


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"This export needs the package {name}: pip install 'hf-lowrank[export]'") from error


def processor() -> dict[str, str]:
    """What a compiled export is compiled for: the processor, and the PyTorch that calls it."""
    torch = _package("torch")
    return {
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }


def _adds_in_32_bits() -> bool:
    """Whether ONNX Runtime adds products of int8 in numbers that hold the sums, which on x86 takes VNNI, as far as can be told.

    Elsewhere it adds two of them in 16 bits, unless it is told to take unsigned weights, with which a forecast takes half as long again.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:  # no Linux
        return False
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)


class Engine(ABC):
    """The graphs of one export, each loaded when it is first run."""

    def __init__(self, folder: str | os.PathLike, record: ExportRecord, threads: int | None) -> None:
        self.paths = {name: Path(folder, file) for name, file in record.graphs.items()}
        self.record = record
        self.threads = threads
        self.loaded: dict[str, Any] = {}

    def run(self, graph: str, inputs: Arrays) -> NDArray[np.float32]:
        """The quantiles that a graph makes of its inputs, by name."""
        if graph not in self.loaded:
            self.loaded[graph] = self.load(self.paths[graph])
        return self.compute(self.loaded[graph], inputs)

    @abstractmethod
    def load(self, path: Path) -> Any:
        """The graph of a file, ready to run."""

    @abstractmethod
    def compute(self, graph: Any, inputs: Arrays) -> NDArray[np.float32]:
        """The graph on its inputs."""


class OnnxEngine(Engine):
    """ONNX Runtime, on the CPU."""

    def load(self, path: Path) -> Any:
        runtime = _package("onnxruntime")
        options = runtime.SessionOptions()
        if not _adds_in_32_bits():
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.intra_op_num_threads = self.threads or 0
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def compute(self, graph: Any, inputs: Arrays) -> NDArray[np.float32]:
        (quantiles,) = graph.run(None, inputs)
        return quantiles


class OpenVinoEngine(Engine):
    """OpenVINO, on the CPU: in float32, int8 where matrices are, or bfloat16 where that is asked for and the processor has it."""

    def load(self, path: Path) -> Any:
        core = _package("openvino").Core()
        can_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.record.quantize == "bfloat16" and can_bfloat16 else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(OPENVINO_GROUP),
        }
        if self.threads:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        return core.compile_model(path, "CPU", settings)

    def compute(self, graph: Any, inputs: Arrays) -> NDArray[np.float32]:
        return np.array(graph(inputs)[0])


class TorchEngine(Engine):
    """A program of `torch.export`, with as many threads as PyTorch has."""

    def load(self, path: Path) -> Any:
        # Its guards ask for what is contiguous in another way where a size is one, as of a single patch ahead; the numbers are the same.
        return _package("torch").export.load(path).module(check_guards=False)

    def compute(self, graph: Any, inputs: Arrays) -> NDArray[np.float32]:
        torch = _package("torch")
        with torch.inference_mode():
            return graph(*map(torch.from_numpy, inputs.values())).numpy()


class InductorEngine(TorchEngine):
    """What AOTInductor compiled, on the processor that it was compiled for."""

    def load(self, path: Path) -> Any:
        here, there = processor(), self.record.made.get("compiled_for")
        if here != there:
            raise ValueError(
                f"{path} was compiled for {there}, and this is {here}; export the model again on this machine."
            )
        return _package("torch._inductor").aoti_load_package(str(path))


ENGINES: dict[str, type[Engine]] = {
    "onnx": OnnxEngine,
    "openvino": OpenVinoEngine,
    "torch": TorchEngine,
    "inductor": InductorEngine,
}


def engine_of(folder: str | os.PathLike, record: ExportRecord, *, threads: int | None = None) -> Engine:
    """The engine of an exported folder; `threads` are by default as many as the engine chooses."""
    return ENGINES[record.format](folder, record, threads)
