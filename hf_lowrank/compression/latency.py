"""What the ranks of a layer cost in a forecast on this machine: a few layers timed, all others predicted, and whole forecasts timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import PreTrainedConfig

from ..checkpoints.rank_table import FeedForwardRanks, LatentRanks, LayerName, LayerRanks, PerHeadRanks, RankTable
from ..timing import Case
from .latency_bench import Bench

__all__ = ["Achieved", "Speed", "measure_forecasts", "measure_speed"]

ALONE = "group"  # the kind of attention whose series are timed as groups of their own


@dataclass(frozen=True)
class Speed:
    """The seconds of a forecast as a sum over its layers.

    A layer of some kind and form takes c^T f seconds, with non-negative coefficients c that were fitted to the times of a few of
    them and features f that grow with every rank. Heads with qk = vo are a form of their own, for the fused attention pads the smaller
    of the two:

        even, uneven   1, n_heads qk, n_heads vo
        latent         1, latent, parameters of the query, parameters of the output, number of sketches
        feed_forward   1, parameters, number of thin factors

    Group attention of a series that is a group of its own is o(v(x)), whatever the queries and keys, and one matrix where that is less:

        even, uneven   1, n_heads vo, min(2 n_heads vo, d_model)
        latent         1, latent, parameters of the output, whether it has a sketch

    Attributes:
        workload: The forecast. A prediction length of 0: the encoder alone.
        backend: What computes, one of `BACKENDS`.
        device: `"cpu"`, or the name of the GPU.
        dtype: Of the models; the name of a backend says where it computes in other numbers.
        threads: Of the backend on the CPU, as many as PyTorch has.
        config: The model's.
        fixed: Seconds of everything but the attention and feed-forward layers.
        coefficients: Seconds for a unit of each feature, by kind of layer and form.
    """

    workload: Case
    backend: str
    device: str
    dtype: str
    threads: int
    config: PreTrainedConfig
    fixed: float
    coefficients: dict[str, dict[str, tuple[float, ...]]]

    def seconds(self, kind: str, ranks: LayerRanks) -> float:
        """Of one layer (`"cross"`, `"encoder_feed_forward"`, ...) in a whole forecast, with these ranks."""
        coefficients = self.coefficients[kind][timed_form(ranks)]
        return float(sum(c * f for c, f in zip(coefficients, features(kind, ranks, self.config))))

    def forecast(self, table: Mapping[LayerName, LayerRanks]) -> float:
        """Of a whole forecast, with the layers of this table."""
        return self.fixed + sum(self.seconds(name.kind, ranks) for name, ranks in table.items())

    def record(self, dense: RankTable, table: RankTable) -> dict[str, Any]:
        """What `config.compression` says of a model with the layers of `table` in place of `dense`."""
        return {
            "seconds_dense": self.forecast(dense),
            "seconds_predicted": self.forecast(table),
            "seconds_fixed": self.fixed,
            "workload": asdict(self.workload),
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class Achieved:
    """The median seconds of whole forecasts, of the dense ranks and of others, timed in turn."""

    seconds_dense: float
    seconds: float

    @property
    def speedup(self) -> float:
        return self.seconds_dense / self.seconds

    def record(self) -> dict[str, float]:
        """What `config.compression` says of it beside what `Speed` predicts."""
        return {
            "seconds_measured_dense": self.seconds_dense,
            "seconds_measured": self.seconds,
            "speedup_measured": self.speedup,
        }


def timed_form(ranks: LayerRanks) -> str:
    """The form whose coefficients say what a layer takes; see `Speed`."""
    if isinstance(ranks, PerHeadRanks):
        return "even" if ranks.qk == ranks.vo else "uneven"
    return ranks.form


def features(kind: str, ranks: LayerRanks, config: PreTrainedConfig) -> tuple[float, ...]:
    """What the time of a layer is linear in; see `Speed`."""
    if isinstance(ranks, FeedForwardRanks):
        num_thin = (ranks.wi is not None) * (2 if config.is_gated_act else 1) + (ranks.wo is not None)
        return 1, ranks.parameters(config), num_thin
    if isinstance(ranks, PerHeadRanks):
        queries, values = config.num_heads * ranks.qk, config.num_heads * ranks.vo
        return (1, values, min(2 * values, config.d_model)) if kind == ALONE else (1, queries, values)
    assert isinstance(ranks, LatentRanks)
    heads, sketches = config.num_heads * ranks.latent, (ranks.query, ranks.output)
    query, output = (heads * config.d_model if rank is None else rank * (config.d_model + heads) for rank in sketches)
    if kind == ALONE:
        return 1, ranks.latent, output, ranks.output is not None
    return 1, ranks.latent, query, output, sum(rank is not None for rank in sketches)


def non_negative_fit(inputs: np.ndarray, values: np.ndarray) -> tuple[float, ...]:
    """The c >= 0 of the least sum of squared relative errors of inputs @ c, shapes (points, features) and (points,)."""
    largest = np.maximum(inputs.max(axis=0), 1e-300)
    coefficients, _ = nnls(inputs / largest / values[:, None], np.ones(len(values)))
    return tuple(float(coefficient) for coefficient in coefficients / largest)


@torch.inference_mode()
def measure_speed(bench: Bench) -> Speed:
    """Time layers of a shape with random weights and fit what their ranks cost. Takes some ten seconds, of an export a minute or so.

    The layers are those of the bench's pipeline, as it runs them. What else there is, a model of small ranks tells: the time of
    its forecast less that of its layers.
    """
    with torch.random.fork_rng():
        coefficients: dict[str, dict[str, tuple[float, ...]]] = {}
        fixed = bench.forecast_seconds()
        for kind in bench.kinds:
            measured = bench.layer_seconds(kind)
            coefficients[kind] = {}
            for form in dict.fromkeys(timed_form(ranks) for ranks, _ in measured):
                alike = [(ranks, value) for ranks, value in measured if timed_form(ranks) == form]
                inputs = np.array([features(kind, ranks, bench.config) for ranks, _ in alike], float)
                coefficients[kind][form] = non_negative_fit(inputs, np.array([value for _, value in alike]))
            small = next(value for ranks, value in measured if ranks == bench.small_ranks(kind))
            fixed -= bench.depth(kind) * small
    device = bench.device
    return Speed(
        bench.workload,
        backend=bench.backend,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(bench.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        config=bench.config,
        fixed=max(0.0, fixed),
        coefficients=coefficients,
    )


@torch.inference_mode()
def measure_forecasts(bench: Bench, table: Mapping[LayerName, LayerRanks]) -> Achieved:
    """Time whole forecasts, of a model with the layers of `table` and of the dense one in the same pipeline, in turn."""
    with torch.random.fork_rng():
        return Achieved(*bench.medians([bench.dense_forecast, bench.forecast(bench.random_model(table))]))
