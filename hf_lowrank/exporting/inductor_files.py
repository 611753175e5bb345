"""Graphs compiled by PyTorch's AOTInductor for the processor of this machine, with products in int8 where that is wanted."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .quantization import products_of, row_scale

__all__ = ["check_compiler", "compile_program", "with_int8_products"]

# Weights laid out for the processor as they are compiled in; as many threads as PyTorch has when it forecasts.
SETTINGS = {"freezing": True, "cpp.dynamic_threads": True}


def check_compiler() -> None:
    """Raise OSError where there is no C++ compiler, which AOTInductor needs."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise OSError(
            f"format='inductor' needs a C++ compiler, and there is no {compiler}: install one or name it in CXX."
        )


class Int8Product(nn.Module):
    """x W^T + b, W rounded a row and x a token: s_x s_w (x_8 W_8^T) + b, the product being one of integers."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = row_scale(weight)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(-1))
        self.bias = linear.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scale = row_scale(values)
        rounded = (values / scale).round().to(torch.int8).flatten(0, -2)
        product = torch._int_mm(rounded, self.weight.T).to(values.dtype) * scale.flatten(0, -2) * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.view(*values.shape[:-1], -1)


def with_int8_products(graph: nn.Module, spared: Collection[str]) -> nn.Module:
    """A copy of a graph with products in int8, but for those of the modules in `spared`."""
    graph = copy.deepcopy(graph)
    for name, linear in products_of(graph).items():
        if name not in spared:
            graph.set_submodule(name, Int8Product(linear))
    return graph


def compile_program(program: Any, path: Path) -> None:
    """Compile a program of `torch.export` to a file. Takes a minute."""
    from torch._inductor import aoti_compile_and_package

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(SETTINGS))
