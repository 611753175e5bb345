"""A Chronos-Bolt or Chronos-2 as graphs, and the files of graphs that an engine reads, in the numbers that are asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel

from ..checkpoints.families import BOLT, CHRONOS2, family_of
from ..progress import progress
from ..runtime.folder import FORMATS
from .graphs import Alone, BoltGraph, Grouped, in_bfloat16
from .inductor_files import check_compiler, compile_program, with_int8_products
from .onnx_files import as_onnx, in_int8, write_graphs
from .openvino_files import write_openvino
from .quantization import ROUNDED

__all__ = [
    "PACKAGES",
    "check_format",
    "check_model",
    "check_packages",
    "example",
    "graphs_of",
    "settings_of",
    "write",
    "write_onnx",
]

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
    "inductor": (),
}
# Other numbers than float32, and the formats that have them.
NUMBERS = {"int8": tuple(ROUNDED), "bfloat16": ("openvino", "torch", "inductor")}
EXAMPLE = {"batch": 3, "patches": 4, "ahead": 3, "groups": 2, "members": 3}


def check_format(format: str, quantize: str | None) -> None:
    """Raise ValueError where there is no such format, or none with these numbers."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {format!r}.")
    if quantize not in (None, *NUMBERS):
        raise ValueError(f"quantize must be None, {' or '.join(map(repr, NUMBERS))}, found {quantize!r}.")
    if quantize and format not in NUMBERS[quantize]:
        formats = " or ".join(map(repr, NUMBERS[quantize]))
        raise ValueError(f"quantize={quantize!r} is for format={formats}, found format={format!r}.")


def check_packages(format: str) -> None:
    """Raise ImportError where a package of a format is missing, or OSError where its compiler is."""
    for name in PACKAGES[format]:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"An export to {format} needs the package {name}: pip install 'hf-lowrank[export]'"
            ) from error
    if format == "inductor":
        check_compiler()


def check_model(model_class: type, config: Any) -> None:
    """Raise ValueError where models of this class and configuration cannot be exported."""
    if family_of(model_class) not in (BOLT, CHRONOS2):
        raise ValueError(
            f"model must be a Chronos-Bolt or a Chronos-2, dense or compressed, found a {model_class.__name__}; "
            "Chronos-T5 draws its forecasts token by token, and is not exported."
        )
    settings = config.chronos_config
    if settings["input_patch_stride"] != settings["input_patch_size"]:
        raise ValueError(
            "model: its patches overlap (input_patch_stride is not input_patch_size); it is not exported."
        )


def graphs_of(model: PreTrainedModel, *, has_groups: bool = True) -> dict[str, BoltGraph | Alone | Grouped]:
    """The graphs of a model of ours by name, for inference; without `has_groups` only that of series that are groups of their own."""
    kinds: dict[str, Any] = {"forecast": BoltGraph}
    if family_of(type(model)) is CHRONOS2:
        kinds = {"alone": Alone, **({"grouped": Grouped} if has_groups else {})}
    return {name: kind(model).eval().requires_grad_(False) for name, kind in kinds.items()}


def settings_of(model: PreTrainedModel) -> dict[str, Any]:
    """What the record of an export says of a model's `chronos_config`."""
    known = vars(model.chronos_config)
    return {key: value for key, value in model.config.chronos_config.items() if key in known}


def write(
    graphs: Mapping[str, nn.Module],
    folder: Path,
    format: str,
    quantize: str | None,
    spared: Mapping[str, Collection[str]],
    show_progress: bool | None,
) -> dict[str, str]:
    """Write graphs by name, batch and context being dynamic; the file of each.

    Args:
        graphs: As `graphs_of` makes them.
        folder: Where to.
        format, quantize: As in `export_model`.
        spared: Of each graph in int8 the products that stay in float.
        show_progress: As in `export_model`.
    """
    programs = {}
    for name, graph in progress(graphs.items(), "Exporting", show_progress):
        inputs, shapes = example(graph)
        if format in ("onnx", "openvino"):
            programs[name] = as_onnx(graph, inputs, shapes)
            continue
        if quantize == "bfloat16":
            graph = in_bfloat16(graph)
        if quantize == "int8":
            graph = with_int8_products(graph, spared[name])
        program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
        save = compile_program if format == "inductor" else torch.export.save
        programs[name] = f"{name}.pt2"
        save(program, folder / programs[name])
    return write_onnx(programs, folder, format, quantize, spared) if format in ("onnx", "openvino") else programs


def write_onnx(
    models: Mapping[str, Any],
    folder: Path,
    format: str,
    quantize: str | None,
    spared: Mapping[str, Collection[str]],
) -> dict[str, str]:
    """The same of graphs of ONNX, for ONNX Runtime or OpenVINO; they are used up."""
    if format == "openvino":
        return write_openvino(models, folder, quantize, spared)
    if quantize == "int8":
        models = {name: in_int8(model, spared[name]) for name, model in models.items()}
    return write_graphs(models, folder)


def example(graph: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs of a graph by name, and which of their sizes are dynamic."""
    rows = ("groups", "members") if isinstance(graph, Grouped) else ("batch",)
    sizes = tuple(EXAMPLE[row] for row in rows)
    leading = {axis: Dim(row) for axis, row in enumerate(rows)}
    last = len(rows)
    if isinstance(graph, BoltGraph):
        steps = {"context": ("patches", graph.patch_size)}
    else:
        assert isinstance(graph, (Alone, Grouped))
        settings = graph.settings
        steps = {
            "context": ("patches", settings.input_patch_size),
            "future": ("ahead", settings.output_patch_size),
        }
    inputs, shapes = {}, {}
    for name, (count, size) in steps.items():
        values = torch.arange(float(np.prod(sizes)) * EXAMPLE[count] * size).sin()
        inputs[name] = values.view(*sizes, EXAMPLE[count] * size)
        shapes[name] = leading | {last: size * Dim(count)}
    return inputs, shapes
