"""OpenVINO graphs as files: read from ONNX, their matrices in int8 where that is wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import temporary_folder
from .onnx_files import modules_of, write_graphs

__all__ = ["write_openvino"]


def write_openvino(
    models: Mapping[str, Any], folder: Path, quantize: str | None, spared: Mapping[str, Collection[str]]
) -> dict[str, str]:
    """Write graphs of ONNX by name for OpenVINO; the file of each.

    Args:
        models: As `as_onnx` makes them; they are used up.
        folder: Where to.
        quantize: None, `"int8"` or `"bfloat16"`; of the last the engine is told, and numbers of 16 bits are enough for it.
        spared: Of each graph in int8 the modules whose products stay in float.
    """
    import openvino

    modules = {name: modules_of(model) for name, model in models.items()}
    with temporary_folder() as place:
        for name, file in write_graphs(models, place).items():
            # Not `convert_model`, whose graph does not run where a norm's weights are exactly one (OpenVINO 2026.4).
            graph = openvino.Core().read_model(place / file)
            if quantize == "int8":
                _round_matrices(graph, {node for node, module in modules[name].items() if module not in spared[name]})
            openvino.save_model(graph, folder / f"{name}.xml", compress_to_fp16=quantize == "bfloat16")
    return {name: f"{name}.xml" for name in models}


def _round_matrices(graph: Any, nodes: Collection[str]) -> None:
    """Put int8 and a scale a row in the place of the matrices of these products."""
    import openvino
    from openvino import opset13

    for product in graph.get_ordered_ops():
        if product.get_type_name() != "MatMul" or product.get_friendly_name() not in nodes:
            continue
        constant = product.input(1).get_source_output().get_node()
        if constant.get_type_name() != "Constant":
            raise RuntimeError(f"The matrix of {product.get_friendly_name()} is a {constant.get_type_name()}.")
        matrix = constant.data.astype(np.float32)
        rows = 1 if product.get_attributes()["transpose_b"] else 0  # the axis along which a row lies
        scale = np.maximum(np.abs(matrix).max(axis=rows, keepdims=True), 1e-30) / 127
        rounded = opset13.constant(np.round(matrix / scale).astype(np.int8), openvino.Type.i8)
        product.input(1).replace_source_output(
            opset13.multiply(opset13.convert(rounded, "f32"), opset13.constant(scale)).output(0)
        )
    graph.validate_nodes_and_infer_types()
