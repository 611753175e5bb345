"""ONNX graphs as files: made of a PyTorch program, in int8 where that is wanted, several of them on one file of weights."""

from __future__ import annotations

import ast
import copy
import hashlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import temporary_folder

__all__ = ["as_onnx", "in_int8", "modules_of", "parts_of", "write_graphs"]

OPSET = 20
WEIGHTS = "weights.bin"
LEAST_BYTES = 1024  # of a tensor that is kept outside the graph's file
ALIGNMENT = 64
SCOPES = "pkg.torch.onnx.name_scopes"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters without their advice, and without what they say of packages that are not needed here."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def as_onnx(
    graph: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    dynamic_shapes: Mapping[str, Any],
    outputs: Sequence[str] = ("quantiles",),
) -> Any:
    """The graph as a `ModelProto` of onnx, with example inputs by name, and the names of its outputs."""
    with _quiet():
        program = torch.onnx.export(
            graph,
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes=dict(dynamic_shapes),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        return program.model_proto


def parts_of(model: Any) -> dict[str, Any]:
    """What each output of a `ModelProto` takes, as one of its own, by the name of the output."""
    from onnx.utils import Extractor

    extractor, inputs = Extractor(model), [one.name for one in model.graph.input]
    return {one.name: extractor.extract_model(inputs, [one.name]) for one in model.graph.output}


def _module_of(node: Any) -> str:
    """The name of the PyTorch module that a node comes from; "" of none."""
    scopes = next((one.value for one in node.metadata_props if one.key == SCOPES), "[]")
    names = ast.literal_eval(scopes)
    return names[-2] if len(names) > 1 else ""


def modules_of(model: Any) -> dict[str, str]:
    """The PyTorch module of each product with a matrix of its own, by the name of its node."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]
    return {node.name: _module_of(node) for node in products}


def in_int8(model: Any, spared: Collection[str]) -> Any:
    """The graph with its products in int8, but for those of the modules in `spared` and those with several matrices."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    modules = modules_of(model)
    rounded = {name for name, module in modules.items() if module not in spared}
    keep = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in rounded]
    with _quiet(), temporary_folder() as folder:
        quantize_dynamic(
            copy.deepcopy(model),  # it changes what it is given
            folder / "int8.onnx",
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=keep,
        )
        return onnx.load(folder / "int8.onnx")


def write_graphs(models: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write graphs by name, whose equal weights are stored once; the file of each, and `WEIGHTS` beside them."""
    from onnx.external_data_helper import set_external_data

    offsets: dict[bytes, int] = {}
    with open(folder / WEIGHTS, "wb") as weights:
        for model in models.values():
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) < LEAST_BYTES:
                    continue
                digest = hashlib.sha256(tensor.raw_data).digest()
                if digest not in offsets:
                    weights.write(b"\0" * (-weights.tell() % ALIGNMENT))
                    offsets[digest] = weights.tell()
                    weights.write(tensor.raw_data)
                set_external_data(tensor, WEIGHTS, offsets[digest], len(tensor.raw_data))
                tensor.ClearField("raw_data")
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    return {name: f"{name}.onnx" for name in models}
