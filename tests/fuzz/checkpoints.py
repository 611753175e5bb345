"""The whole checkpoints that mutations begin with: tiny models of every family, dense and low-rank, as they are saved."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import chronos_models
import torch
from conftest import SHAPE, TINY_CHRONOS
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_lowrank import compress_pretrained

__all__ = ["FAMILIES", "Draft", "Kind", "save_all"]

FAMILIES = ("t5", "bolt", "chronos2")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is of."""

    family: str
    is_dense: bool

    def __str__(self) -> str:
        return f"{'dense' if self.is_dense else 'low-rank'} {self.family}"


def dense_t5() -> PreTrainedModel:
    # Not the deeper decoder of `SHAPE`: stock transformers makes a cache of the encoder's depth and cannot generate.
    shape = SHAPE | {"num_layers": 3, "num_decoder_layers": 2}
    settings = {"chronos_config": copy.deepcopy(TINY_CHRONOS), "chronos_pipeline_class": "ChronosPipeline"}
    model = T5ForConditionalGeneration(T5Config(**shape, **settings))
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "layer_norm" in name else parameter.normal_(std=0.3)
    return model.eval()


def dense_bolt() -> PreTrainedModel:
    model = chronos_models.dense_bolt()
    model.config.chronos_pipeline_class = "ChronosBoltPipeline"
    return model


def dense_chronos2() -> PreTrainedModel:
    model = chronos_models.dense_chronos2()
    model.config.chronos_pipeline_class = "Chronos2Pipeline"
    return model


DENSE = {"t5": dense_t5, "bolt": dense_bolt, "chronos2": dense_chronos2}
# Of every form that a layer can have; what is left out stays whole.
RANKS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "t5": {
        "encoder_self": [{"qk": 3, "vo": 5}, {"latent": 4, "query": None, "output": 3}, {"qk": 8, "vo": 8}],
        "cross": [{"latent": 6, "query": 3, "output": 4}, {"qk": 4, "vo": 2}],
    },
    "bolt": {
        "encoder_self": [{"qk": 3, "vo": 5}, {"latent": 4, "query": 5, "output": None}],
        "decoder_self": [{"latent": 5, "query": 4, "output": 3}, {"qk": 2, "vo": 8}, {"qk": 8, "vo": 8}],
    },
    "chronos2": {
        "time": [{"qk": 4, "vo": 3}, {"qk": 8, "vo": 8}],
        "group": [{"qk": 3, "vo": 5}, {"latent": 5, "query": 4, "output": None}],
    },
}


def save_all(root: Path) -> dict[Kind, Path]:
    """Save one of each kind, and say where."""
    folders = {}
    for family, make in DENSE.items():
        torch.manual_seed(0)
        dense = make()
        ranks = RANKS[family]
        lowrank = compress_pretrained(dense, ranks=ranks, feed_forward_ratio=0.7, calibration=None)
        for model, is_dense in ((dense, True), (lowrank, False)):
            kind = Kind(family, is_dense)
            folders[kind] = root / f"{'dense' if is_dense else 'lowrank'}-{family}"
            model.save_pretrained(folders[kind])
    return folders


class Draft:
    """A checkpoint that is being changed; `write` puts the changes of tensors and configuration into its files."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.kind = folder, kind

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / WEIGHTS)

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def generation(self) -> dict[str, Any]:
        return json.loads((self.folder / "generation_config.json").read_text())

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    def write(self) -> None:
        for name, path in (("config", "config.json"), ("generation", "generation_config.json")):
            if name in vars(self):
                (self.folder / path).write_text(json.dumps(getattr(self, name)))
        if "tensors" in vars(self):
            tensors = {name: tensor.clone().contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, self.weights, metadata={"format": "pt"})
