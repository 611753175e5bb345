"""What a forecast cannot do without: its matrix products, their time alone on this machine, its key/value cache.

Everything else that a forecast does (norms, softmax, sampling, copies, Python) is what a faster implementation can still
remove; the products can only be made smaller. Time over floor says how far an implementation is from its limit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, T5Config

from ..models.configuration_lowrank_t5 import LowRankT5Config, attention_form, cached_numbers
from ..models.decoding import ONEDNN
from ..timing import seconds_of

__all__ = ["SQUARE", "Floor", "Machine", "Product", "cache_bytes", "measure_floor", "recorded_products", "t5_products"]

SQUARE = {"cpu": 2048, "cuda": 8192}  # the size at which the rate of large products is taken
OPERAND_BYTES = 2**28  # right-hand operands to cycle through: more than a cache holds, less than memory


@dataclass(frozen=True)
class Product:
    """Matrix products of one shape, (batch, rows, inner) with (batch, inner, columns).

    Attributes:
        batch, rows, inner, columns: The shape.
        count: How many such products there are.
        operands: How many different right-hand sides are among them (weights of different layers, keys of different layers).
    """

    batch: int
    rows: int
    inner: int
    columns: int
    count: int = 1
    operands: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.rows, self.inner, self.columns

    @property
    def flops(self) -> int:
        """Floating-point operations of one of them, a multiply-add counted as two."""
        return 2 * math.prod(self.shape)


def merged(products: Iterable[Product]) -> list[Product]:
    """One entry a shape."""
    total: dict[tuple[int, int, int, int], tuple[int, int]] = {}
    for product in products:
        count, operands = total.get(product.shape, (0, 0))
        total[product.shape] = count + product.count, operands + product.operands
    return [Product(*shape, count, operands) for shape, (count, operands) in total.items() if math.prod(shape)]


# ---- Chronos-T5: counted from the configuration ----------------------------------------------------------------------


def rank_tables(config: PretrainedConfig) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """`attention_ranks` and `feed_forward_ranks` of a low-rank T5, or the full ones of a dense T5."""
    if not isinstance(config, LowRankT5Config):
        shape = ("d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
        config = LowRankT5Config(**{name: getattr(config, name) for name in shape})
    return config.attention_ranks, config.feed_forward_ranks


def t5_passes(config: PretrainedConfig, *, context_length: int, prediction_length: int) -> Iterator[tuple[int, int]]:
    """(encoder tokens, decoder steps) of each pass of Chronos-T5's `predict`.

    There is one for every model horizon, the forecast so far appended to the context.
    """
    chronos = config.chronos_config
    while prediction_length > 0:
        context_length = min(context_length, chronos["context_length"])
        steps = min(prediction_length, chronos["prediction_length"])
        yield context_length + bool(chronos["use_eos_token"]), steps
        context_length, prediction_length = context_length + steps, prediction_length - steps


@dataclass(frozen=True)
class LayerProducts:
    """The matrix products inside one layer of a T5, for an entry `ranks` of its rank tables.

    `rows` are the tokens, of all sequences together, that a layer reads at once; `times` is how often it does so.
    """

    d_model: int
    num_heads: int
    is_gated: bool

    def query_and_output(self, ranks: dict[str, Any], rows: int, times: int) -> Iterator[Product]:
        """The projections of an attention layer to its queries and from its mixed values."""
        if attention_form(ranks) == "per_head":
            yield matrix_product(rows, self.d_model, self.num_heads * ranks["qk"], times)
            yield matrix_product(rows, self.num_heads * ranks["vo"], self.d_model, times)
            return
        heads = self.num_heads * ranks["latent"]
        query, output = ranks["query"], ranks["output"]
        if query is not None:
            yield matrix_product(rows, self.d_model, query, times)
        yield matrix_product(rows, self.d_model if query is None else query, heads, times)
        yield matrix_product(rows, heads, self.d_model if output is None else output, times)
        if output is not None:
            yield matrix_product(rows, output, self.d_model, times)

    def key_and_value(self, ranks: dict[str, Any], rows: int, times: int) -> Iterator[Product]:
        """The projections to keys and values, or to the latent that stands for both."""
        is_latent = attention_form(ranks) == "latent"
        widths = [ranks["latent"]] if is_latent else [self.num_heads * ranks["qk"], self.num_heads * ranks["vo"]]
        for width in widths:
            yield matrix_product(rows, self.d_model, width, times)

    def mixing(self, ranks: dict[str, Any], sequences: int, queries: int, keys: int, times: int) -> Iterator[Product]:
        """Queries with keys, and the attention weights with values, in each of `sequences` sequences."""
        if attention_form(ranks) == "latent":  # all heads are query rows over one latent sequence
            score, mix, queries = ranks["latent"], ranks["latent"], self.num_heads * queries
        else:
            score, mix, sequences = ranks["qk"], ranks["vo"], self.num_heads * sequences
        yield Product(sequences, queries, score, keys, times)
        yield Product(sequences, queries, keys, mix, times)

    def feed_forward(self, ranks: dict[str, Any], rows: int, times: int) -> Iterator[Product]:
        """The matrices of a feed-forward layer, each whole or as two thin factors."""
        gates = 2 if self.is_gated else 1
        for rank, first, last, copies in (
            (ranks["wi"], self.d_model, ranks["width"], gates),
            (ranks["wo"], ranks["width"], self.d_model, 1),
        ):
            for inner, columns in [(first, last)] if rank is None else [(first, rank), (rank, last)]:
                yield Product(1, rows, inner, columns, copies * times, copies)


def matrix_product(rows: int, inner: int, columns: int, times: int) -> Product:
    """`times` products of tokens with one matrix of weights."""
    return Product(1, rows, inner, columns, times)


def t5_products(
    config: T5Config, *, batch_size: int, context_length: int, prediction_length: int, num_samples: int
) -> list[Product]:
    """The matrix products that a Chronos-T5 forecast needs, dense or low-rank.

    The encoder and the keys and values of cross-attention once a series; the decoder and the language-model head once
    a step and sample. The samples of a series are query rows over its one set of cross-attention keys. Self-attention at
    step t reads t tokens; its cost is linear in t, so steps are counted at the two integers around the mean of t, which
    leaves the sum unchanged.

    Args:
        config: The configuration of a dense or a low-rank T5, with a `chronos_config`.
        batch_size: How many series are forecast at once.
        context_length, prediction_length: Time steps of past and future.
        num_samples: Sample paths a series.
    """
    attention, feed_forward = rank_tables(config)
    layer = LayerProducts(config.d_model, config.num_heads, config.is_gated_act)

    def forecast() -> Iterator[Product]:
        paths = batch_size * num_samples
        for tokens, steps in t5_passes(config, context_length=context_length, prediction_length=prediction_length):
            for ranks in attention["encoder_self"]:
                yield from layer.query_and_output(ranks, batch_size * tokens, 1)
                yield from layer.key_and_value(ranks, batch_size * tokens, 1)
                yield from layer.mixing(ranks, batch_size, tokens, tokens, 1)
            for ranks in feed_forward["encoder"]:
                yield from layer.feed_forward(ranks, batch_size * tokens, 1)
            for ranks in attention["decoder_self"]:
                yield from layer.query_and_output(ranks, paths, steps)
                yield from layer.key_and_value(ranks, paths, steps)
                if steps % 2:
                    yield from layer.mixing(ranks, paths, 1, (steps + 1) // 2, steps)
                else:
                    yield from layer.mixing(ranks, paths, 1, steps // 2, steps // 2)
                    yield from layer.mixing(ranks, paths, 1, steps // 2 + 1, steps // 2)
            for ranks in attention["cross"]:
                yield from layer.query_and_output(ranks, paths, steps)
                yield from layer.key_and_value(ranks, batch_size * tokens, 1)
                yield from layer.mixing(ranks, batch_size, num_samples, tokens, steps)
            for ranks in feed_forward["decoder"]:
                yield from layer.feed_forward(ranks, paths, steps)
            yield matrix_product(paths, config.d_model, config.vocab_size, steps)

    return merged(forecast())


def cache_bytes(
    config: PretrainedConfig,
    *,
    context_length: int,
    prediction_length: int,
    num_samples: int,
    bytes_per_number: int,
) -> tuple[int, int]:
    """The bytes of the key/value cache of one series at the end of a Chronos-T5 forecast.

    It has decoder self-attention of every sample, and cross-attention once, which is enough, or (the second number) once a sample, as
    transformers' `generate` keeps it.
    """
    attention, _ = rank_tables(config)
    own, cross = (
        sum(cached_numbers(ranks, num_heads=config.num_heads) for ranks in attention[kind])
        for kind in ("decoder_self", "cross")
    )
    passes = list(t5_passes(config, context_length=context_length, prediction_length=prediction_length))
    once, repeated = (
        bytes_per_number * max(num_samples * steps * own + copies * tokens * cross for tokens, steps in passes)
        for copies in (1, num_samples)
    )
    return once, repeated


# ---- Other families: recorded while forecasting ----------------------------------------------------------------------


def recorded_products(forecast: Callable[[], Any]) -> list[Product]:
    """The matrix products that `forecast()` performs; for models that do nothing twice (Chronos-Bolt, Chronos-2)."""
    products: list[Product] = []

    def record(left: torch.Size, right: torch.Size) -> int:
        products.append(Product(math.prod(left[:-2]), left[-2], left[-1], right[-1]))
        return products[-1].flops

    def plain(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
        return record(left, right)

    def added(_: torch.Size, left: torch.Size, right: torch.Size, *__: Any, **___: Any) -> int:
        return record(left, right)

    def attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        scores = torch.Size([*query[:-1], key[-2]])
        return record(query, torch.Size([*key[:-2], key[-1], key[-2]])) + record(scores, value)

    aten = torch.ops.aten
    fused = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    mapping = {aten.mm: plain, aten.bmm: plain, aten.addmm: added, aten.baddbmm: added}
    mapping |= {getattr(aten, f"_scaled_dot_product_{name}"): attention for name in fused}
    with FlopCounterMode(display=False, custom_mapping=mapping):
        forecast()
    return merged(products)


# ---- The machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where products are timed.

    `flops_per_second` is the rate of a large square product, `bytes_per_second` that of reading a matrix larger than any
    cache in a matrix-vector product. `times` keeps the seconds of each shape, so that it is timed once a run.
    """

    device: torch.device
    dtype: torch.dtype
    flops_per_second: float
    bytes_per_second: float
    times: dict[tuple[int, int, int, int], float] = field(default_factory=dict, repr=False)

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        square = Product(1, *[SQUARE[device.type]] * 3)
        matrix = torch.ones(8192, OPERAND_BYTES // 4 // 8192, device=device)
        vector = torch.ones(matrix.shape[1], device=device)
        return cls(
            device,
            dtype,
            flops_per_second=square.flops / product_seconds(square, device=device, dtype=dtype),
            bytes_per_second=OPERAND_BYTES / median_seconds(lambda: torch.mv(matrix, vector), device),
        )

    def seconds(self, product: Product) -> float:
        """The time of one such product."""
        if product.shape not in self.times:
            self.times[product.shape] = product_seconds(product, device=self.device, dtype=self.dtype)
        return self.times[product.shape]

    def time_again(self, products: Iterable[Product]) -> None:
        """Time these products once more, and keep the lesser time of each: what is called a floor cannot be beaten."""
        for product in products:
            seconds = product_seconds(product, device=self.device, dtype=self.dtype)
            self.times[product.shape] = min(seconds, self.seconds(product))

    def roofline_seconds(self, product: Product) -> float:
        """The longer of its operations at the machine's rate and of reading its right-hand operand from memory."""
        operand = product.batch * product.inner * product.columns * self.dtype.itemsize
        return max(product.flops / self.flops_per_second, operand / self.bytes_per_second)


@dataclass(frozen=True)
class Floor:
    """What the matrix products of a forecast take alone.

    Attributes:
        flops: Their floating-point operations, a multiply-add counted as two.
        seconds: The sum over their shapes of count times the median time of the fastest known way at that shape (`ways_of`; on a GPU,
            the launch of a kernel included).
        roofline_seconds: The estimate from two rates of the machine: every product at the rate of large ones, or at the
            memory's bandwidth for its right-hand operand (weights, keys, values) where that takes longer. It leaves out what
            a product loses on narrow shapes, and what it gains when an operand stays in the cache.
    """

    flops: int
    seconds: float
    roofline_seconds: float


def measure_floor(products: Iterable[Product], machine: Machine) -> Floor:
    """Time every shape that was not timed before, and add up."""
    products = list(products)
    return Floor(
        flops=sum(product.count * product.flops for product in products),
        seconds=sum(product.count * machine.seconds(product) for product in products),
        roofline_seconds=sum(product.count * machine.roofline_seconds(product) for product in products),
    )


@torch.inference_mode()
def product_seconds(product: Product, *, device: torch.device, dtype: torch.dtype) -> float:
    """The median time of one product with operands in place, in the fastest of the ways that are known.

    Each pass goes through the different right-hand operands (as many as the forecast has, up to 256 MiB), for that is how a decode
    step finds its weights and caches: not in the processor's cache, unless all of them fit there.
    A batch whose result would be larger than 256 MiB is timed in part and scaled.
    """
    rows, inner, columns = product.rows, product.inner, product.columns
    result_bytes = rows * max(columns, inner) * dtype.itemsize
    batch = min(product.batch, max(1, OPERAND_BYTES // result_bytes))
    copies = min(product.operands, max(1, OPERAND_BYTES // (batch * inner * columns * dtype.itemsize)))
    leading = () if batch == 1 else (batch,)
    left = torch.randn(*leading, rows, inner, device=device, dtype=dtype)
    rights = torch.randn(copies, *leading, columns, inner, device=device, dtype=dtype)

    def one_pass(multiply: Callable[[torch.Tensor], torch.Tensor], operands: Sequence[torch.Tensor]) -> None:
        for right in operands:
            multiply(right)

    fastest = min(median_seconds(partial(one_pass, *way), device) for way in ways_of(left, rights))
    return fastest / copies * (product.batch / batch)


def ways_of(left: torch.Tensor, rights: torch.Tensor) -> Iterator[tuple[Callable, Sequence[torch.Tensor]]]:
    """The ways that are known to multiply `left`, (..., rows, inner), with the transpose of each of `rights`, (copies, ..., columns, inner).

    Each is a function and the operands that it takes: `torch.matmul` with transposed views, as nn.Linear's weights and the keys are; the same
    with operands laid out as they are read; in float32 on a CPU, without a batch, what decoding and torch.compile call of oneDNN.
    """
    matmul = partial(torch.matmul, left, out=left.new_empty(*left.shape[:-1], rights.shape[-2]))
    yield matmul, rights.mT.unbind()
    yield matmul, rights.mT.contiguous().unbind()
    if ONEDNN is not None and left.dim() == 2 and left.dtype == torch.float32 and left.device.type == "cpu":
        yield lambda right: ONEDNN(left, right, None, "none", [], ""), rights.unbind()


def median_seconds(action: Callable[[], Any], device: torch.device, *, passes: int = 5) -> float:
    """The median over `passes` calls, after one to warm up, in seconds."""
    action()
    return statistics.median(seconds_of(action, device) for _ in range(passes))
