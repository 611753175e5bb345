"""Chronos' own pipelines on exported models: they prepare, unroll and interpolate as ever, and the engine computes each pass."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from chronos import BaseChronosPipeline, Chronos2Pipeline, ChronosBoltPipeline
from chronos.chronos2.config import Chronos2ForecastingConfig
from chronos.chronos_bolt import ChronosBoltConfig
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..models.pipeline_lowrank_chronos import finite, holds_file
from .folder import RECORD
from .forecaster import Forecaster

__all__ = [
    "PIPELINES",
    "ExportedBoltPipeline",
    "ExportedChronos2Pipeline",
    "ExportedModel",
    "exported_folder",
    "load_exported",
]


class ExportedModel(nn.Module):
    """An exported model in the place of the one that a Chronos pipeline holds; it has no weights here, and cannot be trained.

    Attributes:
        forecaster: What computes.
        chronos_config, config, device, dtype: What pipelines read of a model.
    """

    def __init__(self, forecaster: Forecaster) -> None:
        super().__init__()
        self.forecaster = forecaster
        settings = forecaster.record.settings
        if forecaster.record.family == "bolt":
            self.chronos_config: Any = ChronosBoltConfig(**settings)
        else:
            self.chronos_config = Chronos2ForecastingConfig(**settings)
        self.config = PreTrainedConfig(chronos_config=settings, name_or_path=str(forecaster.record.made["source"]))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(
        self,
        context: torch.Tensor,
        group_ids: torch.Tensor | None = None,
        future_covariates: torch.Tensor | None = None,
        num_output_patches: int = 1,
    ) -> ModelOutput:
        """`context` (B, L), and of Chronos-2 what `Chronos2Model` takes -> `quantile_preds` (B, Q, H)."""
        group_ids, future = (None if one is None else one.cpu().numpy() for one in (group_ids, future_covariates))
        horizon = num_output_patches * self.forecaster.record.output_patch_size
        quantiles = self.forecaster.forecast(context.cpu().numpy(), horizon, group_ids, future)
        return ModelOutput(quantile_preds=torch.from_numpy(quantiles))


def _not_exported(what: str) -> NoReturn:
    raise NotImplementedError(f"An exported model only forecasts: {what} needs the checkpoint that it was made of.")


def _load(folder: str | os.PathLike, threads: int | None = None) -> ExportedModel:
    return ExportedModel(Forecaster(folder, threads=threads or torch.get_num_threads()))


def _load_named(name: str | os.PathLike, family: str, threads: int | None) -> ExportedModel:
    """The exported model of a folder or Hub id; a ValueError where it is of another family."""
    model = _load(exported_folder(name) or name, threads)
    found = model.forecaster.record.family
    if found != family:
        raise ValueError(f"{name} must be an export of family {family!r}, found {found!r}.")
    return model


class ExportedBoltPipeline(ChronosBoltPipeline):
    """[`chronos.ChronosBoltPipeline`] of an exported Chronos-Bolt."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> ExportedBoltPipeline:
        """Load from an exported folder or from the Hub; `threads=` sets those of the engine. `device_map` and `dtype` say nothing here."""
        return cls(_load_named(pretrained_model_name_or_path, "bolt", kwargs.get("threads")))

    def predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As [`chronos.ChronosBoltPipeline.predict`]; a forecast that is NaN or infinite is a ValueError."""
        return finite(super().predict(*args, **kwargs))

    def embed(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError."""
        _not_exported("embed")


class ExportedChronos2Pipeline(Chronos2Pipeline):
    """[`chronos.Chronos2Pipeline`] of an exported Chronos-2."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> ExportedChronos2Pipeline:
        """Load from an exported folder or from the Hub; `threads=` sets those of the engine. `device_map` and `dtype` say nothing here."""
        return cls(_load_named(pretrained_model_name_or_path, "chronos2", kwargs.get("threads")))

    def predict(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """As [`chronos.Chronos2Pipeline.predict`]; a forecast that is NaN or infinite is a ValueError."""
        return finite(super().predict(*args, **kwargs))

    def embed(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError."""
        _not_exported("embed")

    def fit(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError."""
        _not_exported("fit")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError."""
        _not_exported("save_pretrained")


PIPELINES: dict[str, type[BaseChronosPipeline]] = {
    "bolt": ExportedBoltPipeline,
    "chronos2": ExportedChronos2Pipeline,
}


def exported_folder(name: str | os.PathLike) -> str | None:
    """The folder of an exported model, of a Hub id in the cache; None of anything else, and of what cannot be reached."""
    if not holds_file(name, RECORD):
        return None
    if os.path.isdir(name):
        return str(name)
    try:
        return snapshot_download(str(name))
    except (OSError, ValueError):
        return None


def load_exported(folder: str | os.PathLike) -> Any:
    """The pipeline of an exported folder, of whichever family, with as many threads as PyTorch has."""
    model = _load(folder)
    return PIPELINES[model.forecaster.record.family](model)
