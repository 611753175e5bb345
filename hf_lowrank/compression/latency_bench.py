"""Models of a shape with random weights, on which speed does not depend, and their layers alone: what there is to time of a forecast."""

from __future__ import annotations

import copy
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from chronos import BaseChronosPipeline
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from ..checkpoints.families import T5, Family, family_of_config
from ..checkpoints.pipelines import as_pipeline
from ..checkpoints.rank_table import FeedForwardRanks, LatentRanks, LayerName, LayerRanks, PerHeadRanks, RankTable
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
from ..timing import Case, seconds_of

__all__ = ["Bench", "LayerBench", "PassBench", "T5Bench", "bench_of", "default_workload"]

# Of one timed pass: multiply-adds with weights and bytes of weights and caches at most. What a forecast has beyond is scaled.
TIMED_ARITHMETIC, TIMED_BYTES = 2**31, 2**27
# Of each kind of layer, of the rest and of whole forecasts: seconds, and how many rounds at least and at most.
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


def default_workload(config: PreTrainedConfig, *, encoder_only: bool = False) -> Case:
    """Series of a full context of at most 512, how many and how far ahead by the family.

    Four of a Chronos-T5, as its own settings say; of a text T5 four, one path of 64 steps. 32 of Chronos-Bolt and Chronos-2, whose forecast
    is a pass or two, at most 64 steps; in Chronos-2 each is a group of its own.
    """
    chronos = getattr(config, "chronos_config", None) or {}
    context_length = min(512, chronos.get("context_length", 512))
    if encoder_only:
        return Case(4, context_length, 0, None)
    if family_of_config(config) is T5:
        return Case(4, context_length, chronos.get("prediction_length", 64), chronos.get("num_samples", 1))
    patches = chronos.get("output_patch_size", 0) * chronos.get("max_output_patches", 0)
    return Case(32, context_length, min(64, chronos.get("prediction_length", patches)), None)


def bench_of(
    config: PreTrainedConfig,
    workload: Case | None = None,
    *,
    encoder_only: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Bench:
    """The bench of a model's family.

    Args:
        config: The shape; its ranks are not looked at.
        workload: What is forecast; by default `default_workload(config)`.
        encoder_only: The model is a T5's encoder alone.
        device, dtype: Of weights and computation.
    """
    workload = workload or default_workload(config, encoder_only=encoder_only)
    family, device = family_of_config(config), torch.device(device)
    if family is T5:
        model_class = family.classes[T5EncoderModel if encoder_only else T5ForConditionalGeneration]
        return T5Bench(config, family, model_class, workload, device, dtype)
    (model_class,) = family.classes.values()
    return PassBench(config, family, model_class, workload, device, dtype)


class Bench(ABC):
    """Models of a shape, and what their layers take in a forecast, on the device where they are timed.

    Attributes:
        backend: What computes; one of `BACKENDS`.
    """

    backend = "torch"

    def __init__(
        self,
        config: PreTrainedConfig,
        family: Family,
        model_class: type[PreTrainedModel],
        workload: Case,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.family, self.model_class = config, family, model_class
        self.workload, self.device, self.dtype = workload, device, dtype
        self.kinds = list(family.places)

    def depth(self, kind: str) -> int:
        stack, _ = self.family.places[kind]
        return self.config.num_decoder_layers if stack == "decoder" else self.config.num_layers

    def timed_ranks(self, kind: str) -> list[LayerRanks]:
        """The ranks of the layers that are timed; the last ones are small."""

        def rank(share: float | None, full: int, step: int = 1) -> int | None:
            return None if share is None else max(1, round(share * full / step)) * step

        d_model, d_kv, d_ff = self.config.d_model, self.config.d_kv, self.config.d_ff
        if kind in self.family.feed_forward:
            thin = min(d_model, d_ff)
            return [FeedForwardRanks(d_ff, rank(wi, thin), rank(wo, thin)) for wi, wo in THIN]
        is_rotary = kind in self.family.rotary
        step = 2 if is_rotary else 1
        heads = [PerHeadRanks(rank(qk, d_kv, step), rank(vo, d_kv, step)) for qk, vo in UNEVEN + EVEN]  # type: ignore[arg-type]
        if is_rotary:
            return [*heads]
        latents = [LatentRanks(*(rank(share, d_model) for share in shares)) for shares in LATENT]  # type: ignore[arg-type]
        return [*latents, *heads]

    def small_ranks(self, kind: str) -> LayerRanks:
        return self.timed_ranks(kind)[-1]

    # Whole models

    def random_model(self, table: Mapping[LayerName, LayerRanks]) -> PreTrainedModel:
        """A model of these ranks, dense where the table has none."""
        config = copy.deepcopy(self.config)
        config.weight_bits = None
        (RankTable.full(config) | table).write(config)
        model = self.model_class(config)
        if model.can_generate():
            model.generation_config = GenerationConfig(decoder_start_token_id=0)  # any token does
        return model.to(self.device, self.dtype).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model of small ranks."""
        return self.random_model({name: self.small_ranks(name.kind) for name in RankTable.of(self.config)})

    def pipeline(self, model: PreTrainedModel) -> BaseChronosPipeline:
        """What forecasts with a model."""
        return as_pipeline(model)

    def forecast(self, model: PreTrainedModel, steps: int | None = None) -> Callable[[], Any]:
        """A forecast of the workload, or of that many steps, by the pipeline of a model."""
        workload, pipeline = self.workload, self.pipeline(model)
        series = list(torch.randn(workload.batch_size, workload.context_length).cumsum(dim=-1))
        options = {} if workload.num_samples is None else {"num_samples": workload.num_samples}
        steps = workload.prediction_length if steps is None else steps
        return lambda: pipeline.predict_quantiles(series, prediction_length=steps, **options)

    @cached_property
    def dense_forecast(self) -> Callable[[], Any]:
        """A forecast of the workload by a model of the dense ranks."""
        return self.forecast(self.random_model({}))

    def forecast_seconds(self) -> float:
        """Of a whole forecast of the model of small ranks."""
        return self.medians([self.forecast(self.model)])[0]

    @abstractmethod
    def layer_seconds(self, kind: str) -> list[tuple[LayerRanks, float]]:
        """The seconds of one layer of this kind in a whole forecast, for each of its timed ranks."""

    @torch.inference_mode()
    def medians(self, actions: Sequence[Callable[[], Any]]) -> list[float]:
        """The median seconds of each, timed in turn, so that a busy moment of the machine falls on all of them alike."""
        for action in actions:
            action()
        rounds: list[list[float]] = []
        end = time.perf_counter() + SECONDS
        while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and time.perf_counter() < end):
            rounds.append([seconds_of(action, self.device) for action in actions])
        return [statistics.median(times) for times in zip(*rounds)]


class LayerBench(Bench):
    """In PyTorch: layers are timed as the pipeline calls them."""

    def layer_seconds(self, kind: str) -> list[tuple[LayerRanks, float]]:
        """The seconds of one layer of this kind in a whole forecast, for each of its timed ranks."""
        timed = self.timed_ranks(kind)
        work = [(i, *part) for i, ranks in enumerate(timed) for part in self.work(kind, ranks)]
        medians = self.medians([action for _, action, _ in work])
        seconds = [0.0] * len(timed)
        for (i, _, times), median in zip(work, medians):
            seconds[i] += times * median
        return list(zip(timed, seconds))

    @abstractmethod
    def work(self, kind: str, ranks: LayerRanks) -> Iterator[tuple[Callable[[], Any], float]]:
        """Actions, and how often a forecast does each for one layer."""

    @abstractmethod
    def layer(self, kind: str, entry: dict[str, Any]) -> nn.Module:
        """A layer with this entry in the table of ranks, as `work` calls it."""

    def layers(self, kind: str, ranks: LayerRanks, *, cached: int = 0, most: int | None = None) -> list[nn.Module]:
        """As many layers of these ranks as the model has, for each to find its weights as cold as in a forecast.

        Fewer where that is too much to keep, `cached` being the number of tokens of which each has keys and values, and at most `most`.
        """
        entry: dict[str, Any] = ranks.to_dict()
        layers = [self.layer(kind, entry).to(self.device, self.dtype).eval()]
        numbers = sum(weight.numel() for weight in layers[0].parameters())
        numbers += cached * 2 * self.config.num_heads * self.config.d_kv
        copies = min(most or self.depth(kind), self.depth(kind), TIMED_BYTES // 4 // (self.dtype.itemsize * numbers))
        return layers + [self.layer(kind, entry).to(self.device, self.dtype).eval() for _ in range(copies - 1)]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


class PassBench(LayerBench):
    """Of Chronos-Bolt and Chronos-2, whose forecast is a pass or a few: layers are called as the pipeline's forecast calls the last of them."""

    def place(self, kind: str) -> str:
        """The name of the last sublayer of a kind: norm, layer and residual."""
        _, module = self.family.places[kind]
        return module.format(self.depth(kind) - 1).rpartition(".")[0]

    @cached_property
    def calls(self) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """What a forecast of the model of small ranks calls the last sublayer of each kind with."""
        calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {kind: [] for kind in self.kinds}
        hooks = []
        try:
            for kind, found in calls.items():
                sublayer = self.model.get_submodule(self.place(kind))
                hook = sublayer.register_forward_pre_hook(
                    lambda _, args, kwargs, found=found: found.append((args, kwargs)), with_kwargs=True
                )
                hooks.append(hook)
            self.forecast(self.model)()
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def layer(self, kind: str, entry: dict[str, Any]) -> nn.Module:
        sublayer = type(self.model.get_submodule(self.place(kind)))
        stack = self.model.get_submodule(self.family.places[kind][0])
        if issubclass(sublayer, (SelfAttentionLayer, CrossAttentionLayer)):
            # The first of a stack makes the bias of all, if it is the only one here too.
            return sublayer(stack.config, self.depth(kind) - 1, entry)
        return sublayer(stack.config, entry)

    def work(self, kind: str, ranks: LayerRanks) -> Iterator[tuple[Callable[[], Any], float]]:
        calls = self.calls[kind]
        tokens = sum(states.numel() // self.config.d_model for (states, *_), _ in calls)
        arithmetic = tokens * ranks.parameters(self.config)
        layers = self.layers(kind, ranks, most=max(1, TIMED_ARITHMETIC // arithmetic))
        yield lambda: [layer(*args, **kwargs) for layer in layers for args, kwargs in calls], 1 / len(layers)


class T5Bench(LayerBench):
    """Of Chronos-T5 and other T5 models: layers as they run in the loop of `sample_paths`, or in an encoder alone, called as a model.

    Encoder layers run once a forecast, decoder layers once a step and path, on a cache of the mean length; the keys and values of
    cross-attention are made once a series.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.encoder_only = self.model_class is T5.classes[T5EncoderModel]
        if self.encoder_only:
            self.kinds = [kind for kind in self.kinds if kind.startswith("encoder")]
        self.chronos = getattr(self.config, "chronos_config", None) or {}
        self.tokens = self.workload.context_length + bool(self.chronos.get("use_eos_token", True))
        self.paths = self.workload.batch_size * (self.workload.num_samples or 1)

    def forecast(self, model: PreTrainedModel, steps: int | None = None) -> Callable[[], Any]:
        if self.chronos and not self.encoder_only:
            return super().forecast(model, steps)
        size = (self.workload.batch_size, self.tokens)
        tokens = torch.randint(self.config.vocab_size, size, device=self.device)
        if self.encoder_only:
            return lambda: model(input_ids=tokens)
        mask, steps = torch.ones_like(tokens), self.workload.prediction_length if steps is None else steps
        samples = self.workload.num_samples or 1
        return lambda: sample_paths(
            model, tokens, mask, num_samples=samples, steps=steps, start=0, sampling=Sampling()
        )

    def forecast_seconds(self) -> float:
        if self.encoder_only:
            return super().forecast_seconds()
        timed = min(STEPS, self.workload.prediction_length)
        first, whole = self.medians([self.forecast(self.model, 1), self.forecast(self.model, timed)])
        step = max(0.0, whole - first) / max(1, timed - 1)
        return first + (self.workload.prediction_length - 1) * step

    def work(self, kind: str, ranks: LayerRanks) -> Iterator[tuple[Callable[[], Any], float]]:
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
        layers = self.layers(kind, ranks, cached=sequences * length)
        states = self.random(sequences, each, self.config.d_model)
        times = forecasts * rows / sequences / len(layers)

        if kind in self.family.feed_forward:
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
        layers = self.layers("cross", ranks, cached=series * self.tokens)
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

    def layer(self, kind: str, entry: dict[str, Any]) -> nn.Module:
        if kind in self.family.feed_forward:
            return LowRankFeedForward(self.config, **entry)
        stack = self.model.get_submodule(self.family.places[kind][0])
        if kind == "cross":
            return CrossAttentionLayer(stack.config, 1, entry).EncDecAttention
        return SelfAttentionLayer(stack.config, 1, entry).SelfAttention  # the first holds the bias of all
