"""What the ranks of a layer cost in a forecast on this machine: a few layers timed, all others predicted."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from ..checkpoints.rank_table import FeedForwardRanks, LatentRanks, LayerRanks, PerHeadRanks, RankTable
from ..models.configuration_lowrank_t5 import ATTENTION_KINDS, LowRankT5Config
from ..models.decoding import (
    LoopAttention,
    LoopCrossAttention,
    LoopSelfAttention,
    Sampling,
    feed_forward,
    sample_paths,
    self_attention,
)
from ..models.modeling_lowrank_blocks import CrossAttentionLayer, SelfAttentionLayer
from ..models.modeling_lowrank_layers import LowRankFeedForward
from ..models.modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration
from ..timing import Case, seconds_of

__all__ = ["Speed", "default_workload", "measure_speed"]

FEED_FORWARD_KINDS = {"encoder_feed_forward": "encoder", "decoder_feed_forward": "decoder"}
# Of one timed pass: multiply-adds with weights and bytes of weights and caches at most. What a forecast has beyond is scaled.
TIMED_ARITHMETIC, TIMED_BYTES = 2**31, 2**27
# Of each kind of layer, and of the rest: seconds, and how many rounds at least and at most.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 2.0, 3, 31
# Decode steps that are timed, where a forecast has more.
STEPS = 17
# What is timed, in shares of the dense ranks; the first is the dense layer, the last one a small one.
EVEN = tuple((share, share) for share in (1, 3 / 4, 1 / 2, 1 / 4, 1 / 8))
UNEVEN = ((1, 1 / 2), (1 / 2, 1), (1, 1 / 8), (1 / 8, 1), (1 / 4, 1 / 8), (1 / 8, 1 / 4))
LATENT = (
    (1 / 2, 1 / 8, 1 / 8),
    (1 / 4, 1 / 4, 1 / 4),
    (1 / 8, 1 / 4, 1 / 8),
    (1 / 8, 1 / 8, 1 / 4),
    (1 / 16, None, 1 / 8),
    (1 / 16, 1 / 8, None),
    (1 / 16, 1 / 16, 1 / 16),
)
THIN = (
    (None, None),
    (1 / 2, None),
    (None, 1 / 2),
    (1 / 2, 1 / 2),
    (1 / 4, 1 / 4),
    (None, 1 / 8),
    (1 / 8, None),
    (1 / 8, 1 / 8),
)


@dataclass(frozen=True)
class Speed:
    """The seconds of a forecast as a sum over its layers.

    A layer of some kind and form takes c^T f seconds, with non-negative coefficients c that were fitted to the times of a few of
    them and features f that grow with every rank. Heads with qk = vo are a form of their own, for the fused attention pads the smaller
    of the two:

        even, uneven   1, n_heads qk, n_heads vo
        latent         1, latent, parameters of the query, parameters of the output, number of sketches
        feed_forward   1, parameters, number of thin factors

    Attributes:
        workload: The forecast. A prediction length of 0: the encoder alone.
        device: `"cpu"`, or the name of the GPU.
        threads: Of PyTorch on the CPU.
        config: The model's.
        fixed: Seconds of everything but the attention and feed-forward layers.
        coefficients: Seconds for a unit of each feature, by kind of layer and form.
    """

    workload: Case
    device: str
    dtype: str
    threads: int
    config: LowRankT5Config
    fixed: float
    coefficients: dict[str, dict[str, tuple[float, ...]]]

    def seconds(self, kind: str, ranks: LayerRanks) -> float:
        """Of one layer (`"cross"`, `"encoder_feed_forward"`, ...) in a whole forecast, with these ranks."""
        coefficients = self.coefficients[kind][timed_form(ranks)]
        return float(sum(c * f for c, f in zip(coefficients, features(ranks, self.config))))

    def forecast(self, table: RankTable) -> float:
        """Of a whole forecast, with the layers of this table."""
        return self.fixed + sum(self.seconds(name.kind, ranks) for name, ranks in table.items())

    def record(self, dense: RankTable, table: RankTable) -> dict[str, Any]:
        """What `config.compression` says of a model with the layers of `table` in place of `dense`."""
        return {
            "seconds_dense": self.forecast(dense),
            "seconds_predicted": self.forecast(table),
            "seconds_fixed": self.fixed,
            "workload": asdict(self.workload),
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
        }


def timed_form(ranks: LayerRanks) -> str:
    """The form whose coefficients say what a layer takes; see `Speed`."""
    if isinstance(ranks, PerHeadRanks):
        return "even" if ranks.qk == ranks.vo else "uneven"
    return ranks.form


def features(ranks: LayerRanks, config: LowRankT5Config) -> tuple[float, ...]:
    """What the time of a layer is linear in; see `Speed`."""
    if isinstance(ranks, PerHeadRanks):
        return 1, config.num_heads * ranks.qk, config.num_heads * ranks.vo
    if isinstance(ranks, FeedForwardRanks):
        num_thin = (ranks.wi is not None) * (2 if config.is_gated_act else 1) + (ranks.wo is not None)
        return 1, ranks.parameters(config), num_thin
    assert isinstance(ranks, LatentRanks)
    heads, sketches = config.num_heads * ranks.latent, (ranks.query, ranks.output)
    query, output = (heads * config.d_model if rank is None else rank * (config.d_model + heads) for rank in sketches)
    return 1, ranks.latent, query, output, sum(rank is not None for rank in sketches)


def non_negative_fit(inputs: np.ndarray, values: np.ndarray) -> tuple[float, ...]:
    """The c >= 0 of the least sum of squared relative errors of inputs @ c, shapes (points, features) and (points,)."""
    largest = np.maximum(inputs.max(axis=0), 1e-300)
    coefficients, _ = nnls(inputs / largest / values[:, None], np.ones(len(values)))
    return tuple(float(coefficient) for coefficient in coefficients / largest)


# ---- The measurement -------------------------------------------------------------------------------------------------


def default_workload(config: LowRankT5Config, *, encoder_only: bool = False) -> Case:
    """Four series of a full context of at most 512, forecast as the checkpoint's own settings say; one path of 64 steps for a text T5."""
    chronos = getattr(config, "chronos_config", None) or {}
    context_length = min(512, chronos.get("context_length", 512))
    if encoder_only:
        return Case(4, context_length, 0, None)
    return Case(4, context_length, chronos.get("prediction_length", 64), chronos.get("num_samples", 1))


@torch.inference_mode()
def measure_speed(
    config: LowRankT5Config,
    workload: Case | None = None,
    *,
    encoder_only: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Speed:
    """Time layers of this shape with random weights and fit what their ranks cost. Takes some ten seconds.

    The layers are those of LowRankChronosPipeline. Encoder layers run once a forecast, decoder layers once a step and path, on a
    cache of the mean length; the keys and values of cross-attention are made once a series. What else there is, a model of small ranks
    tells: the time of its forecast less that of its layers. An encoder alone runs as `model(...)` does.

    Args:
        config: The shape; its ranks are not looked at.
        workload: What is forecast; by default `default_workload(config)`.
        encoder_only: The model is an encoder alone.
        device, dtype: Of weights and computation.
    """
    workload = workload or default_workload(config, encoder_only=encoder_only)
    device = torch.device(device)
    with torch.random.fork_rng():
        bench = Bench(config, workload, encoder_only, device, dtype)
        coefficients: dict[str, dict[str, tuple[float, ...]]] = {}
        fixed = bench.forecast_seconds()
        for kind in bench.kinds:
            measured = bench.layer_seconds(kind)
            coefficients[kind] = {}
            for form in dict.fromkeys(timed_form(ranks) for ranks, _ in measured):
                alike = [(ranks, value) for ranks, value in measured if timed_form(ranks) == form]
                inputs = np.array([features(ranks, config) for ranks, _ in alike], float)
                coefficients[kind][form] = non_negative_fit(inputs, np.array([value for _, value in alike]))
            small = next(value for ranks, value in measured if ranks == bench.small_ranks(kind))
            fixed -= bench.depth(kind) * small
    return Speed(
        workload,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        config=config,
        fixed=max(0.0, fixed),
        coefficients=coefficients,
    )


class Bench:
    """The model of small ranks, and layers of its shape, on the device where they are timed."""

    def __init__(
        self, config: LowRankT5Config, workload: Case, encoder_only: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.workload, self.device, self.dtype = config, workload, device, dtype
        self.encoder_only = encoder_only
        self.kinds = [
            kind for kind in (*ATTENTION_KINDS, *FEED_FORWARD_KINDS) if kind.startswith("encoder") or not encoder_only
        ]
        chronos = getattr(config, "chronos_config", None) or {}
        self.tokens = workload.context_length + bool(chronos.get("use_eos_token", True))
        self.paths = workload.batch_size * (workload.num_samples or 1)
        self.sampling = Sampling(chronos.get("temperature"), chronos.get("top_k"), chronos.get("top_p"))

        small = copy.deepcopy(config)
        RankTable({name: self.small_ranks(name.kind) for name in RankTable.of(config)}).write(small)
        model_class = LowRankT5EncoderModel if encoder_only else LowRankT5ForConditionalGeneration
        self.model = model_class(small).to(device, dtype).eval()

    def depth(self, kind: str) -> int:
        return self.config.num_layers if kind.startswith("encoder") else self.config.num_decoder_layers

    def timed_ranks(self, kind: str) -> list[LayerRanks]:
        """The ranks of the layers that are timed; the last ones are small."""

        def rank(share: float | None, full: int) -> int | None:
            return None if share is None else max(1, round(share * full))

        d_model, d_kv, d_ff = self.config.d_model, self.config.d_kv, self.config.d_ff
        if kind in FEED_FORWARD_KINDS:
            thin = min(d_model, d_ff)
            return [FeedForwardRanks(d_ff, rank(wi, thin), rank(wo, thin)) for wi, wo in THIN]
        latents = [LatentRanks(*(rank(share, d_model) for share in shares)) for shares in LATENT]  # type: ignore[arg-type]
        heads = [PerHeadRanks(*(rank(share, d_kv) for share in shares)) for shares in UNEVEN + EVEN]  # type: ignore[arg-type]
        return [*latents, *heads]

    def small_ranks(self, kind: str) -> LayerRanks:
        return self.timed_ranks(kind)[-1]

    # Layers

    def layer_seconds(self, kind: str) -> list[tuple[LayerRanks, float]]:
        """The seconds of one layer of this kind in a whole forecast, for each of its timed ranks."""
        timed = self.timed_ranks(kind)
        work = [(i, *part) for i, ranks in enumerate(timed) for part in self.work(kind, ranks)]
        medians = self.medians([action for _, action, _ in work])
        seconds = [0.0] * len(timed)
        for (i, _, times), median in zip(work, medians):
            seconds[i] += times * median
        return list(zip(timed, seconds))

    def work(self, kind: str, ranks: LayerRanks) -> Iterator[tuple[Callable[[], Any], float]]:
        """Actions, and how often a forecast does each for one layer."""
        steps = self.workload.prediction_length
        if kind == "cross":
            yield from self.cross_work(ranks)
            return
        if kind.startswith("encoder"):
            rows, each, forecasts = self.workload.batch_size, self.tokens, 1
        else:
            rows, each, forecasts = self.paths, 1, steps
        length = max(1, steps // 2) if kind == "decoder_self" else 0
        sequences = self.capped(rows, each, length)
        layers = self.layers(kind, ranks, sequences * length)
        states = self.random(sequences, each, self.config.d_model)
        times = forecasts * rows / sequences / len(layers)

        if kind in FEED_FORWARD_KINDS:
            if self.encoder_only:
                yield lambda: [layer(states) for layer in layers], times
            else:
                activation = self.config.dense_act_fn
                yield lambda: [feed_forward(layer, states, activation) for layer in layers], times
        elif kind == "decoder_self":
            own = [LoopSelfAttention(layer, self.config.num_heads, length + 1) for layer in layers]
            bias, token = self.random(self.config.num_heads, length + 1), states[:, 0]
            # The last token that the cache has room for, again and again.
            yield lambda: [layer(token, length, bias) for layer in own], times
        else:
            bias = self.random(1, self.config.num_heads, each, each)
            lean = [LoopAttention(layer, self.config.num_heads) for layer in layers]
            if self.encoder_only:
                yield lambda: [layer(states, bias=bias) for layer in layers], times
            else:
                yield lambda: [self_attention(layer, states, bias) for layer in lean], times

    def cross_work(self, ranks: LayerRanks) -> Iterator[tuple[Callable[[], Any], float]]:
        """Of cross-attention: a step of all paths of some series, and their keys and values."""
        batch, paths = self.workload.batch_size, self.paths // self.workload.batch_size
        series = self.capped(batch, paths, self.tokens)
        layers = self.layers("cross", ranks, series * self.tokens)
        context = self.random(series, self.tokens, self.config.d_model)
        heads = self.config.num_heads
        cross = [LoopCrossAttention(layer, heads, context, None) for layer in layers]
        tokens = self.random(series * paths, self.config.d_model)
        steps = self.workload.prediction_length
        yield lambda: [layer(tokens) for layer in cross], steps * batch / series / len(layers)
        yield lambda: LoopCrossAttention(layers[0], heads, context, None), batch / series

    def capped(self, rows: int, tokens: int, cached: int = 0) -> int:
        """How many of these sequences are timed."""
        weights = self.config.d_model * max(2 * self.config.num_heads * self.config.d_kv, self.config.d_ff)
        numbers = cached * 2 * self.config.num_heads * self.config.d_kv
        limits = TIMED_ARITHMETIC // (tokens * weights), TIMED_BYTES // (self.dtype.itemsize * max(1, numbers))
        return max(1, min(rows, *limits))

    def layers(self, kind: str, ranks: LayerRanks, cached: int) -> list[nn.Module]:
        """As many layers of these ranks as the model has, for each to find its weights as cold as in a forecast."""
        entry: dict[str, Any] = ranks.to_dict()
        if kind in FEED_FORWARD_KINDS:

            def build() -> nn.Module:
                return LowRankFeedForward(self.config, **entry)
        elif kind == "cross":

            def build() -> nn.Module:
                return CrossAttentionLayer(self.model.decoder.config, 1, entry).EncDecAttention
        else:
            stack = self.model.encoder if kind == "encoder_self" else self.model.decoder

            def build() -> nn.Module:
                return SelfAttentionLayer(stack.config, 1, entry).SelfAttention  # the first holds the bias of all

        layers = [build().to(self.device, self.dtype).eval()]
        numbers = sum(weight.numel() for weight in layers[0].parameters())
        numbers += cached * 2 * self.config.num_heads * self.config.d_kv
        copies = min(self.depth(kind), TIMED_BYTES // 4 // (self.dtype.itemsize * numbers))
        return layers + [build().to(self.device, self.dtype).eval() for _ in range(copies - 1)]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    # The rest

    def forecast_seconds(self) -> float:
        """Of a whole forecast of the model of small ranks."""
        size = (self.workload.batch_size, self.tokens)
        tokens = torch.randint(self.config.vocab_size, size, device=self.device)
        if self.workload.prediction_length == 0:
            return self.medians([lambda: self.model(input_ids=tokens)])[0]

        def forecast(steps: int) -> torch.Tensor:
            return sample_paths(
                self.model,
                tokens,
                torch.ones_like(tokens),
                num_samples=self.workload.num_samples or 1,
                steps=steps,
                start=0,
                sampling=self.sampling,
            )

        timed = min(STEPS, self.workload.prediction_length)
        first, whole = self.medians([lambda: forecast(1), lambda: forecast(timed)])
        step = max(0.0, whole - first) / max(1, timed - 1)
        return first + (self.workload.prediction_length - 1) * step

    def medians(self, actions: Sequence[Callable[[], Any]]) -> list[float]:
        """The median seconds of each, timed in turn, so that a busy moment of the machine falls on all of them alike."""
        for action in actions:
            action()
        rounds: list[list[float]] = []
        end = time.perf_counter() + SECONDS
        while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and time.perf_counter() < end):
            rounds.append([seconds_of(action, self.device) for action in actions])
        return [statistics.median(times) for times in zip(*rounds)]
