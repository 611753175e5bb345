"""What is timed of a model that is to be exported: its layers as graphs of their own, and whole forecasts, in the engine of the export."""

from __future__ import annotations

import copy
from functools import cached_property, partial
from typing import Any

import torch
from chronos import BaseChronosPipeline
from torch import nn
from torch.export import Dim
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.families import family_of_config
from ..checkpoints.rank_table import LayerName, LayerRanks, RankTable
from ..exporting.graphs import Alone, BoltGraph
from ..exporting.onnx_files import as_onnx, parts_of
from ..exporting.quantization import products_of
from ..exporting.writing import example, graphs_of, settings_of, write, write_onnx
from ..files import temporary_folder
from ..runtime.engines import engine_of
from ..runtime.folder import ExportRecord
from ..runtime.forecaster import Forecaster
from ..runtime.pipelines import PIPELINES, ExportedModel
from ..timing import Case
from .latency_bench import Bench, default_workload
from .settings import BACKENDS

__all__ = ["ExportBench", "export_bench_of"]

# The parts of a graph that seldom bear int8, whatever the checkpoint; weights that are random do not say which others do not.
IN_FLOAT = ("embed", "head")
MOST_SCALE = 2.0  # beyond it the differences are those of a busy machine


def export_bench_of(config: PreTrainedConfig, backend: str, workload: Case | None = None) -> ExportBench:
    """The bench of an export.

    Args:
        config: The shape, of a Chronos-Bolt or a Chronos-2; its ranks are not looked at.
        backend: One of `BACKENDS` that is an export.
        workload: What is forecast, in one pass; by default `default_workload(config)`.
    """
    return ExportBench(config, backend, workload or default_workload(config))


class ExportBench(Bench):
    """In the engine of an export on the CPU, from float32. In Chronos-2 each series is a group of its own."""

    def __init__(self, config: PreTrainedConfig, backend: str, workload: Case) -> None:
        family = family_of_config(config)
        (model_class,) = family.classes.values()
        super().__init__(config, family, model_class, workload, torch.device("cpu"), torch.float32)
        self.backend = backend
        export = BACKENDS[backend]
        assert export is not None
        self.format, self.quantize = export

    # Whole models

    def pipeline(self, model: PreTrainedModel) -> BaseChronosPipeline:
        graphs: dict[str, Any] = graphs_of(model, has_groups=False)
        spared = {
            name: [product for product in products_of(graph) if product.startswith(IN_FLOAT)]
            for name, graph in graphs.items()
        }
        with temporary_folder() as folder:
            files = write(graphs, folder, self.format, self.quantize, spared, show_progress=False)
            record = self.record(files, settings_of(model))
            forecaster = Forecaster(folder, threads=torch.get_num_threads(), record=record)
            pipeline = PIPELINES[self.family.name](ExportedModel(forecaster))
            pipeline.predict([torch.ones(1)])  # an engine reads its files when it first runs
        return pipeline

    def record(self, files: dict[str, str], settings: dict[str, Any] | None = None) -> ExportRecord:
        """What an engine needs to know of these graphs."""
        return ExportRecord(
            family=self.family.name,
            format=self.format,
            quantize=self.quantize,
            graphs=files,
            files={},
            settings=settings or {},
            parity={},
            made={"source": None},
        )

    @cached_property
    def whole_seconds(self) -> tuple[float, float]:
        """Of whole forecasts, of the model of small ranks and of the dense one, in turn."""
        small, dense = self.medians([self.forecast(self.model), self.dense_forecast])
        return small, dense

    def forecast_seconds(self) -> float:
        return self.whole_seconds[0]

    # Layers

    def layer_seconds(self, kind: str) -> list[tuple[LayerRanks, float]]:
        return [(ranks, self.scale * seconds) for ranks, seconds in self.alone[kind]]

    @cached_property
    def scale(self) -> float:
        """What a layer takes in a forecast, as a share of what it takes alone.

        Between the dense model and that of small ranks layers make the whole difference: alone they are also handed over what they
        read, and are not one with what is before and behind them.
        """
        small, dense = self.whole_seconds
        apart = 0.0
        for kind, alone in self.alone.items():
            seconds = dict(alone)
            apart += self.depth(kind) * (seconds[self.dense_ranks(kind)] - seconds[self.small_ranks(kind)])
        return min(max((dense - small) / apart, 1 / MOST_SCALE), MOST_SCALE) if apart > 0 else 1.0

    @cached_property
    def alone(self) -> dict[str, list[tuple[LayerRanks, float]]]:
        """The seconds of layers of each kind in graphs of their own."""
        return {kind: self.seconds_alone(kind) for kind in self.kinds}

    def dense_ranks(self, kind: str) -> LayerRanks:
        return RankTable.full(self.config)[LayerName(kind, 0)]

    def seconds_alone(self, kind: str) -> list[tuple[LayerRanks, float]]:
        """The same of one kind."""
        # The exporter takes its time for each graph: all layers are one, which is taken apart.
        timed = self.timed_ranks(kind)
        layers = self.graph.sublayers(kind)[: len(timed)]
        inputs, others = self.inputs[kind]
        outputs = [f"layer_{i}" for i in range(len(layers))]
        shapes = {"inputs": tuple(map(_dynamic_axes, inputs, others))}
        program = as_onnx(_Each(layers), {f"input_{i}": one for i, one in enumerate(others)}, shapes, outputs)
        feeds = {one.name: tensor.numpy() for one, tensor in zip(program.graph.input, _tensors(inputs))}
        with temporary_folder() as folder:
            files = write_onnx(parts_of(program), folder, self.format, self.quantize, dict.fromkeys(outputs, ()))
            engine = engine_of(folder, self.record(files), threads=torch.get_num_threads())
            medians = self.medians([partial(engine.run, output, feeds) for output in outputs])
        return list(zip(timed, medians))

    @cached_property
    def graph(self) -> BoltGraph | Alone:
        """Of a model that has a layer of each of the timed ranks."""
        timed = {kind: self.timed_ranks(kind) for kind in self.kinds}
        config = copy.deepcopy(self.config)
        config.num_layers = config.num_decoder_layers = depth = max(map(len, timed.values()))
        deep = ExportBench(self.family.lowrank_config(config), self.backend, self.workload)
        ranks = {LayerName(kind, i): (of_kind * depth)[i] for kind, of_kind in timed.items() for i in range(depth)}
        (graph,) = graphs_of(deep.random_model(ranks), has_groups=False).values()
        assert isinstance(graph, (BoltGraph, Alone))
        return graph

    @cached_property
    def inputs(self) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """What the layers of each kind are called with in a forecast of the workload, and in one of other sizes."""
        found: dict[str, list[tuple[Any, ...]]] = {kind: [] for kind in self.kinds}
        hooks = [
            self.graph.sublayers(kind)[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
            for kind, seen in found.items()
        ]
        try:
            self.graph(*self.values())
            self.graph(*example(self.graph)[0].values())
        finally:
            for hook in hooks:
                hook.remove()
        return {kind: (here, there) for kind, (here, there) in found.items()}

    def values(self) -> list[torch.Tensor]:
        """What the graph is called with in a forecast of the workload."""

        def whole(steps: int, patch: int) -> tuple[int, int]:
            return self.workload.batch_size, -(-steps // patch) * patch

        settings = self.config.chronos_config
        context = torch.randn(whole(self.workload.context_length, settings["input_patch_size"])).cumsum(dim=-1)
        if isinstance(self.graph, BoltGraph):
            return [context]
        future = whole(self.workload.prediction_length, settings["output_patch_size"])
        return [context, torch.full(future, torch.nan)]


class _Each(nn.Module):
    """What each of several layers makes of the same inputs."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(layer(*inputs) for layer in self.layers)


def _dynamic_axes(value: Any, other: Any) -> Any:
    """Which axes of a tensor, or of a tuple of them, are not as long in another one."""
    if isinstance(value, tuple):
        return tuple(map(_dynamic_axes, value, other))
    return {axis: Dim.AUTO for axis in range(value.dim()) if value.shape[axis] != other.shape[axis]}


def _tensors(values: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors of nested tuples, in their order."""
    return [one for value in values for one in (_tensors(value) if isinstance(value, tuple) else [value])]
