"""A Chronos-Bolt or Chronos-2, dense or compressed, for ONNX Runtime, OpenVINO or as a PyTorch program, with proof of its accuracy."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from chronos import BaseChronosPipeline
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.dense import as_full_rank
from ..checkpoints.families import family_of
from ..checkpoints.loading import public_name
from ..checkpoints.objectives import PatchObjective, objective_of
from ..checkpoints.pipelines import load_pipeline
from ..files import new_folder, without_folders, write_json
from ..runtime.engines import processor
from ..runtime.folder import RECORD, ExportRecord, is_export, read_export
from ..runtime.forecaster import Forecaster
from ..runtime.pipelines import PIPELINES
from ..versions import versions
from .graphs import BoltGraph, Grouped, standardize
from .quantization import spared_products
from .writing import PACKAGES, check_format, check_model, check_packages, graphs_of, settings_of, write

__all__ = ["export_model"]

LARGEST_DIFFERENCE = 1e-4  # of quantiles in float, relative to the largest of a series
LARGEST_EXCESS = 10  # of what int8 is found to add to the loss, over what it may
TOLERANCE = 3e-4
BATCHES = 2  # of windows that decide which products are spared; the next ones measure what all others cost
SERIES, VALUES = 24, 512  # of each
Feeds = list[dict[str, Any]]


def export_model(
    model: str | os.PathLike | PreTrainedModel | BaseChronosPipeline,
    output: str | os.PathLike,
    *,
    format: str = "onnx",
    quantize: str | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    overwrite: bool = False,
    show_progress: bool | None = None,
) -> ExportRecord:
    """Write a Chronos-Bolt or Chronos-2 as a folder that forecasts without PyTorch, and measure how near it is to PyTorch.

    Batch and context are dynamic. `hf_lowrank.load_pipeline` and `BaseChronosPipeline.from_pretrained` (after `import hf_lowrank`) load the
    folder as one of chronos' own pipelines; `hf_lowrank.runtime.forecaster.Forecaster` forecasts with numpy and the runtime alone.

    Args:
        model: A folder, a Hub id, `"reference-bolt"` or `"reference-2"`, a loaded model or a pipeline; dense or compressed.
        output: The folder to write, all or nothing.
        format: `"onnx"` (for ONNX Runtime), `"openvino"`, `"torch"` (a program of `torch.export`), or `"inductor"`: compiled by PyTorch's
            AOTInductor, which takes a minute or more, for the processor and the version of PyTorch that are here, and no other.
        quantize: None for float32; `"int8"`, not of `"torch"`, for products in int8 but for those that the accuracy needs in float;
            `"bfloat16"`, not of `"onnx"`, for all of it in bfloat16, which processors with AMX or the like multiply several times as fast.
        tolerance: What the products in int8 may add to the expected loss all together, as a share of it, on synthetic series. Those that
            cost most for their size are spared until the rest stays within it.
        seed: Of those series.
        overwrite: Replace an export that is there.
        show_progress: Show a progress bar; by default in a terminal or a notebook.

    Returns:
        What the folder says of itself, `parity` among it: `relative_difference`, the largest between its quantiles and PyTorch's in
        float32, relative to the largest of the series; and `added_loss`, what that adds to the expected loss, as a share of it.

    Raises:
        ValueError: An unknown format; the model is none of these families; int8 in a format that has none.
        OSError: There is no such checkpoint; for `"inductor"`, no C++ compiler.
        FileExistsError: `output` exists and is not empty, and `overwrite` is false or it is no export.
        ImportError: A package of the format is missing: `pip install 'hf-lowrank[export]'`.
        RuntimeError: In float32 its forecasts are further than 1e-4 from PyTorch's, or in other numbers they add ten times as much to the
            expected loss as `tolerance` says; nothing is written.
    """
    check_format(format, quantize)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, found {tolerance}.")
    check_packages(format)
    source = public_name(model.inner_model if isinstance(model, BaseChronosPipeline) else model)
    dense = _float_model(model)
    family = family_of(type(dense))
    assert family is not None
    graphs = graphs_of(dense)
    check = _Check(dense)
    windows = check.batches(2 * BATCHES, seed)
    packages = versions(*PACKAGES[format])
    made: dict[str, Any] = {
        "source": source,
        "parameters": dense.num_parameters(),
        "seed": seed,
        **packages,
        **({"compiled_for": processor()} if format == "inductor" else {}),
    }
    with new_folder(output, overwrite=overwrite, is_replaceable=is_export) as folder:
        spared: dict[str, list[str]] = {}
        if quantize == "int8":
            for name, graph in graphs.items():
                loss = check.loss_of(graph, windows[:BATCHES])
                spared[name], losses = spared_products(
                    graph, loss, tolerance, format=format, show_progress=show_progress
                )
                made.setdefault("int8", {"tolerance": tolerance})[name] = {
                    "in_float": spared[name],
                    "losses": [asdict(one) for one in losses],
                }
        files = write(graphs, folder, format, quantize, spared, show_progress)
        record = ExportRecord(
            family=family.name,
            format=format,
            quantize=quantize,
            graphs=files,
            files={path.name: _described(path) for path in sorted(folder.iterdir())},
            settings=settings_of(dense),
            parity={},
            made=without_folders(made),
        )
        write_json(folder / RECORD, record.to_dict())
        parity = check.parity(Forecaster(folder), windows[BATCHES:])
        if not quantize and not parity["relative_difference"] <= LARGEST_DIFFERENCE:
            raise RuntimeError(
                f"The {format} export of {source} forecasts {parity['relative_difference']:.2g} (relative) away from PyTorch, "
                f"more than {LARGEST_DIFFERENCE}; its packages are {packages}."
            )
        if quantize and not parity["added_loss"] <= LARGEST_EXCESS * tolerance:
            raise RuntimeError(
                f"The {format} export of {source} in {quantize} adds {parity['added_loss']:.2g} of the expected loss where {tolerance:g} was "
                f"expected at most; its packages are {packages}."
            )
        write_json(folder / RECORD, record.to_dict() | {"parity": parity})
        # For `BaseChronosPipeline.from_pretrained`, which asks it for the pipeline alone.
        config = {"model_type": "t5", "architectures": ["ExportedModel"], "chronos_config": record.settings}
        write_json(folder / "config.json", config | {"chronos_pipeline_class": PIPELINES[family.name].__name__})
    return read_export(output)


def _float_model(model: Any) -> PreTrainedModel:
    """The model as one of ours, in float32 on the CPU: a copy of one that is given."""
    is_given = not isinstance(model, (str, os.PathLike))
    if not is_given:
        model = load_pipeline(model, device="cpu", dtype="float32")
    if isinstance(model, BaseChronosPipeline):
        model = model.inner_model
    check_model(type(model), getattr(model, "config", None))
    ours = as_full_rank(copy.deepcopy(model) if is_given else model)
    return ours.dequantize().float().cpu().eval()


def _described(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# --- how near it is ----------------------------------------------------------------------------------------------


class _Check:
    """Forecasts of a model and of what was made of it, on the same synthetic windows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        objective = objective_of(model.config, type(model))
        assert isinstance(objective, PatchObjective)
        self.objective = objective

    def batches(self, count: int, seed: int) -> Feeds:
        """Windows: the model's own calibration batches, cut to sizes that are soon computed."""
        drawn, _ = self.objective.batches("synthetic", count, seed)
        return [_cut(batch, self.objective.patch) for batch in drawn]

    @torch.no_grad()
    def quantiles(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of the model, (B, Q, H)."""
        return self.model(**self.objective.inputs(dict(batch))).quantile_preds

    def loss_of(self, graph: nn.Module, batches: Feeds) -> Callable[[], float]:
        """A function that says what a graph in PyTorch adds to the expected loss now, as a share of it."""

        def forecast(batch: Mapping[str, Any]) -> torch.Tensor:
            if isinstance(graph, BoltGraph):
                return graph(batch["context"])
            inputs = [batch["context"], batch["future_covariates"]]
            if isinstance(graph, Grouped):
                return graph(*(one.unflatten(0, (-1, 2)) for one in inputs)).flatten(0, 1)
            return graph(*inputs)

        batches = [self._as_grouped(batch, graph) for batch in batches]
        wanted = list(map(self.quantiles, batches))
        return lambda: self._loss(batches, wanted, list(map(forecast, batches)))

    def _as_grouped(self, batch: Mapping[str, Any], graph: nn.Module) -> dict[str, Any]:
        """The same series in the groups that a graph is tried on: pairs, or each alone."""
        if isinstance(graph, BoltGraph):
            return dict(batch)
        count = len(batch["context"]) // 2 * 2
        ids = torch.arange(count)
        cut = {name: values[:count] for name, values in batch.items()}
        return cut | {"group_ids": ids // 2 if isinstance(graph, Grouped) else ids}

    def _loss(self, batches: Feeds, wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
        """What quantiles add to the expected loss where others are wanted, as a share of it."""
        added = [
            self.objective.divergence(self._scaled(ours, batch), self._scaled(theirs, batch))
            for batch, ours, theirs in zip(batches, wanted, found)
        ]
        return sum(added) / sum(map(len, wanted))

    def _scaled(self, quantiles: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """Quantiles on the model's own scale, on which its loss is."""
        _, _, mean, deviation = standardize(batch["context"], self.model.instance_norm.eps)
        scaled = (quantiles - mean[..., None]) / deviation[..., None]
        return torch.asinh(scaled) if self.model.instance_norm.use_arcsinh else scaled

    def parity(self, forecaster: Forecaster, batches: Feeds) -> dict[str, float]:
        """How far an export is from the model."""

        def forecast(batch: Mapping[str, Any]) -> torch.Tensor:
            ids, future = (batch.get(name) for name in ("group_ids", "future_covariates"))
            horizon = 0 if future is None else future.shape[1]
            arrays: list[NDArray | None] = [None if one is None else one.numpy() for one in (ids, future)]
            return torch.from_numpy(forecaster.forecast(batch["context"].numpy(), horizon, *arrays))

        tried = [*batches, *map(_first, batches)]
        wanted, found = list(map(self.quantiles, tried)), list(map(forecast, tried))
        difference = 0.0
        for ours, theirs in zip(wanted, found):
            relative = (theirs - ours).abs().amax(dim=(1, 2)) / ours.abs().amax(dim=(1, 2)).clamp_min(1e-30)
            difference = max(difference, float(relative.max()))
        return {"relative_difference": difference, "added_loss": self._loss(batches, wanted, found)}


def _cut(batch: Mapping[str, torch.Tensor], patch: int) -> dict[str, torch.Tensor]:
    """The first series of a batch, their last values in whole patches."""
    cut = {name: values[:SERIES] for name, values in batch.items()}
    context = cut["context"][:, -VALUES:]
    return cut | {"context": nn.functional.pad(context, (-context.shape[1] % patch, 0), value=torch.nan)}


def _first(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first series of a batch alone, its context short."""
    cut = {name: values[:1] for name, values in batch.items()}
    return cut | {"context": cut["context"][:, -20:]}
