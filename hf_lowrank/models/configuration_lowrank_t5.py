"""LowRankT5Config: a T5 configuration in which every layer has dimensions of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import T5Config

from .checked_settings import check_settings

if find_spec("chronos"):  # a T5 on text does without
    # It joins chronos' registry of pipelines, where `BaseChronosPipeline.from_pretrained` looks after it has the configuration.
    from .pipeline_lowrank_t5 import LowRankChronosPipeline  # noqa: F401

ATTENTION_KINDS = ("encoder_self", "decoder_self", "cross")
PER_HEAD_KEYS = {"qk", "vo"}
LATENT_KEYS = {"latent", "query", "output"}
FULL_RANK: dict = {}  # the table that leaves out every kind of layer
FEED_FORWARD_KEYS = {"width", "wi", "wo"}
# The pipelines of a low-rank Chronos-T5: the first is the default.
T5_PIPELINES = ("LowRankChronosPipeline", "ChronosPipeline")


def attention_form(ranks: dict[str, Any]) -> str:
    """`"per_head"` for a layer's entry `{"qk", "vo"}`, `"latent"` for `{"latent", "query", "output"}`."""
    return "latent" if "latent" in ranks else "per_head"


def attention_parameters(ranks: dict[str, Any], *, d_model: int, num_heads: int) -> int:
    """The number of weights of one attention layer with these ranks, without the relative position bias.

    `per_head`: 2 d_model n_heads (qk + vo).   `latent`: d_model r for the latent; for the query and the output each
    d_model s + n_heads r s with a sketch of rank s, or d_model n_heads r without one.
    """
    if attention_form(ranks) == "per_head":
        return 2 * d_model * num_heads * (ranks["qk"] + ranks["vo"])
    rank = ranks["latent"]
    total = d_model * rank
    for sketch in (ranks["query"], ranks["output"]):
        total += num_heads * rank * d_model if sketch is None else sketch * (d_model + num_heads * rank)
    return total


def cached_numbers(ranks: dict[str, Any], *, num_heads: int) -> int:
    """How many numbers a token occupies in the key/value cache of one attention layer."""
    return ranks["latent"] if attention_form(ranks) == "latent" else num_heads * (ranks["qk"] + ranks["vo"])


def feed_forward_parameters(ranks: dict[str, Any], *, d_model: int, is_gated: bool) -> int:
    """The number of weights of one feed-forward layer: d w a matrix, or k (d + w) as thin factors of rank k."""
    width, wi, wo = ranks["width"], ranks["wi"], ranks["wo"]
    matrix = d_model * width
    inner = matrix if wi is None else wi * (d_model + width)
    outer = matrix if wo is None else wo * (d_model + width)
    return (2 if is_gated else 1) * inner + outer


def scheduled_rank(base_rank: float, rank_growth: float, layer: int, *, rounding: str = "ceil") -> int:
    """The rank of layer i, counted from zero: d~_i = ceil(d~_0 (1 + i)^alpha).

    The schedule of arXiv 2510.03358, section 5. `rounding="pow2"` takes the nearest power of two (on a logarithmic
    scale) in place of the ceiling.
    """
    size = base_rank * (1 + layer) ** rank_growth
    if rounding == "ceil":
        # 32 ** 0.8 is 16, and floating point (16.000000000000004) must not make it 17.
        return max(1, math.ceil(size - 1e-9))
    if rounding == "pow2":
        return 2 ** max(0, round(math.log2(size)))
    raise ValueError(f"rank_rounding must be 'ceil' or 'pow2', found {rounding!r}.")


def scheduled_attention_ranks(
    base_rank: float,
    rank_growth: float,
    *,
    num_layers: int,
    num_decoder_layers: int,
    d_kv: int,
    rounding: str = "ceil",
) -> dict[str, list[dict[str, int]]]:
    """The table of head dimensions that follows from d~_0 = `base_rank` and alpha = `rank_growth`.

    With `rounding="ceil"`, as in the paper's text, i is the layer's index in its own stack. With `"pow2"`, as in
    its released code, the index of a cross-attention layer counts on from the encoder. A rank above `d_kv`, the dense
    head dimension, becomes `d_kv`.
    """
    if not base_rank > 0 or not math.isfinite(base_rank):
        raise ValueError(f"base_rank must be a positive number, found {base_rank!r}.")
    if not math.isfinite(rank_growth):
        raise ValueError(f"rank_growth must be a finite number, found {rank_growth!r}.")

    def column(count: int, first: int = 0) -> list[dict[str, int]]:
        ranks = [scheduled_rank(base_rank, rank_growth, first + i, rounding=rounding) for i in range(count)]
        return [{"qk": min(rank, d_kv), "vo": min(rank, d_kv)} for rank in ranks]

    return {
        "encoder_self": column(num_layers),
        "decoder_self": column(num_decoder_layers),
        "cross": column(num_decoder_layers, first=num_layers if rounding == "pow2" else 0),
    }


def from_schedule(
    arguments: dict[str, Any], attention_ranks: dict, compression: dict | None, table: Callable[..., dict]
) -> tuple[dict, dict | None]:
    """The table and the record of a configuration that was given `arguments`: base_rank, rank_growth, rank_rounding; or its own, without.

    `table` makes a table of base_rank, rank_growth and rounding.
    """
    base_rank, rank_growth, rounding = (arguments[name] for name in ("base_rank", "rank_growth", "rank_rounding"))
    if base_rank is None:
        if rank_growth is not None or rounding is not None:
            raise ValueError("rank_growth and rank_rounding need base_rank.")
        return attention_ranks, compression
    if attention_ranks:
        raise ValueError("Give either attention_ranks or base_rank, not both.")
    schedule: dict[str, Any] = {
        "base_rank": base_rank,
        "rank_growth": 0.0 if rank_growth is None else rank_growth,
        "rounding": rounding or "ceil",
    }
    return table(**schedule), compression or {"policy": "schedule", "arguments": schedule}


def completed_table(table: Any, full: dict[str, list[dict]], name: str) -> dict[str, list[dict]]:
    """A deep copy of the table with the entries of `full` for the kinds that it leaves out."""
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a dict, found {type(table).__name__}.")
    if unknown := set(table) - set(full):
        raise ValueError(f"{name} has unknown keys {sorted(unknown)}; known are {sorted(full)}.")
    return full | copy.deepcopy(table)


def validate_table(
    table: dict[str, Any], full: dict[str, list[dict]], name: str, check: Callable[[Any, str], None]
) -> None:
    """Every kind has a list of as many entries as `full`; `check(entry, where)` looks at each."""
    for key, entries in table.items():
        if not isinstance(entries, list) or len(entries) != len(full[key]):
            found = f"{len(entries)} entries" if isinstance(entries, list) else type(entries).__name__
            raise ValueError(f"{name}[{key!r}] must be a list of {len(full[key])} entries, found {found}.")
        for layer, entry in enumerate(entries):
            check(entry, f"{name}[{key!r}][{layer}]")


def validate_bits(weight_bits: Any) -> None:
    """Raise ValueError where this is no table of how many bits the numbers of matrices have."""
    if not isinstance(weight_bits, (dict, type(None))):
        raise ValueError(f"weight_bits must be a table or null, found {weight_bits!r:.80}.")
    for name, bits in (weight_bits or {}).items():
        if type(bits) is not int or bits not in (4, 8):
            raise ValueError(f"weight_bits[{name!r:.80}] must be 4 or 8, found {bits!r:.80}.")


def validate_entry(entry: Any, where: str, *, d_model: int, d_kv: int, d_ff: int, rotary: bool = False) -> None:
    """One layer's ranks fit a model of this shape; `where` starts with the table's name.

    With rotary embeddings, keys of different positions are not linear in one latent, so the layer is `per_head`, and `qk`
    is even: two for each frequency.
    """
    if where.startswith("feed"):
        forms: tuple[set[str], ...] = (FEED_FORWARD_KEYS,)
    else:
        forms = (PER_HEAD_KEYS,) if rotary else (PER_HEAD_KEYS, LATENT_KEYS)
    if not isinstance(entry, dict) or set(entry) not in forms:
        wanted = " or ".join("{" + ", ".join(sorted(keys)) + "}" for keys in forms)
        raise ValueError(f"{where} must be a dict with the keys {wanted}, found {entry!r}.")
    width = entry.get("width")
    inner = min(d_model, width) if isinstance(width, int) else d_model
    limits = {"qk": d_kv, "vo": d_kv, "width": d_ff, "wi": inner, "wo": inner}
    limits |= {"latent": d_model, "query": d_model, "output": d_model}
    for key, value in entry.items():
        if value is None and key in ("query", "output", "wi", "wo"):
            continue
        step = 2 if rotary and key == "qk" else 1
        if not isinstance(value, int) or isinstance(value, bool) or not step <= value <= limits[key] or value % step:
            wanted = "an integer in [1" if step == 1 else "an even integer in [2"
            raise ValueError(f"{where}[{key!r}] must be {wanted}, {limits[key]}], found {value!r}.")


class CarriesItsCode:
    """A configuration that is saved with the code of its models, so that `trust_remote_code=True` loads it without hf_lowrank."""

    chronos_family = "t5"
    is_always_chronos = False  # a T5 may be one on text

    @classmethod
    def from_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """As transformers', and whatever is wrong in the dictionary of a config.json is a ValueError that says so.

        Raises:
            ValueError: A setting is missing, or of another type or range than it must be.
        """
        try:
            if cls.is_always_chronos and config_dict.get("chronos_config") is None:
                raise ValueError("chronos_config is missing.")
            if not isinstance(record := config_dict.get("compression"), (dict, type(None))):
                raise ValueError(f"compression must be a table or null, found {record!r:.80}.")
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        # What transformers and chronos raise where a value is of a wrong type.
        except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
            kind = "" if isinstance(error, (StrictDataclassError, ValueError)) else f"{type(error).__name__}: "
            raise ValueError(f"config.json: {kind}{' '.join(str(error).split())}") from error

    def validate_settings(self) -> None:
        """Raise ValueError where a setting other than the tables is out of range, or a token or an activation is not there."""
        check_settings(self, self.chronos_family)

    def auto_classes(self) -> dict[str, type]:
        """The class that each of transformers' Auto classes makes of this configuration."""
        raise NotImplementedError

    def validate_ranks(self) -> None:
        """Raise ValueError where the tables do not fit the model."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', with `auto_map` filled for every Auto class and not only for the one that was saved.

        transformers copies the file that defines a configuration and, recursively, all that it imports from its own folder;
        `auto_classes` imports the models, so they are among them.
        """
        self.validate_ranks()  # before any file is written
        self.auto_map = {
            name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in self.auto_classes().items()
        }
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class LowRankT5Config(CarriesItsCode, T5Config):
    r"""Configuration of a T5 model whose layers have ranks of their own.

    Everything that [`~transformers.T5Config`] has, with its meaning: `d_kv` and `d_ff` remain the dense model's head
    dimension and feed-forward width, and are the largest that a layer can have. Without further arguments the model is a dense
    T5.

    Args:
        attention_ranks: For each kind of attention (`"encoder_self"`, `"decoder_self"`, `"cross"`) a list with one entry
            a layer, in one of two forms:

            - `{"qk": int, "vo": int}` (`per_head`, eq. 21 of arXiv 2510.03358): the head dimension of queries and keys and
              that of values and outputs, both in [1, d_kv].
            - `{"latent": int, "query": int | None, "output": int | None}` (`latent`, eq. 20 absorbed): keys and values
              are one latent of that rank a token, shared by all heads; queries are made from a sketch of rank `query`, the
              output through one of rank `output`, or densely where that is None. All in [1, d_model].

            A kind left out keeps its full rank.
        feed_forward_ranks: For `"encoder"` and `"decoder"` a list with one entry a layer,
            `{"width": int, "wi": int | None, "wo": int | None}`: the number of neurons, in [1, d_ff], and the ranks of the two
            matrices as thin factors, or None for a whole matrix.
        base_rank, rank_growth, rank_rounding: In place of `attention_ranks`: d~_0, alpha and `"ceil"` (default) or
            `"pow2"`, from which the table follows (see `scheduled_attention_ranks`). Only the table is saved.
        weight_bits: The matrices that are kept as integers, by the names of their modules, and how many bits a number of each has, 8 or 4;
            see `modeling_lowrank_quantized`.
        compression: How the weights were made: method, policy, arguments, source, versions. A record; the model
            does not read it.

    Raises:
        ValueError: A table that does not fit the model, or both a table and `base_rank`.
    """

    model_type = "lowrank_t5"

    def __init__(
        self,
        attention_ranks: dict = FULL_RANK,
        feed_forward_ranks: dict = FULL_RANK,
        base_rank: float | None = None,
        rank_growth: float | None = None,
        rank_rounding: str | None = None,
        weight_bits: dict | None = None,
        compression: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("chronos_config"):
            kwargs.setdefault("chronos_pipeline_class", T5_PIPELINES[0])
        super().__init__(**kwargs)
        self.validate_settings()
        attention_ranks, compression = from_schedule(
            {"base_rank": base_rank, "rank_growth": rank_growth, "rank_rounding": rank_rounding},
            attention_ranks,
            compression,
            partial(
                scheduled_attention_ranks,
                num_layers=self.num_layers,
                num_decoder_layers=self.num_decoder_layers,
                d_kv=self.d_kv,
            ),
        )
        given = {"attention_ranks": attention_ranks, "feed_forward_ranks": feed_forward_ranks}
        # Deep copies, for a caller may go on to edit its table, and json keys and numbers stay as they are.
        for name, full in self.full_ranks().items():
            setattr(self, name, completed_table(given[name], full, name))
        self.weight_bits = copy.deepcopy(weight_bits)
        self.compression = copy.deepcopy(compression)
        self.validate_ranks()

    def full_ranks(self) -> dict[str, dict[str, list[dict]]]:
        """The two tables of the dense model of this shape: `attention_ranks` and `feed_forward_ranks`."""
        encoder, decoder = self.num_layers, self.num_decoder_layers
        depths = {"encoder_self": encoder, "decoder_self": decoder, "cross": decoder}
        return {
            "attention_ranks": {
                kind: [{"qk": self.d_kv, "vo": self.d_kv} for _ in range(depth)] for kind, depth in depths.items()
            },
            "feed_forward_ranks": {
                stack: [{"width": self.d_ff, "wi": None, "wo": None} for _ in range(depth)]
                for stack, depth in (("encoder", encoder), ("decoder", decoder))
            },
        }

    def validate_settings(self) -> None:
        super().validate_settings()
        pipeline = getattr(self, "chronos_pipeline_class", None)
        if self.chronos_family == "t5" and pipeline is not None and pipeline not in T5_PIPELINES:
            raise ValueError(f"chronos_pipeline_class must be {' or '.join(T5_PIPELINES)}, found {pipeline!r:.80}.")

    def auto_classes(self) -> dict[str, type]:
        from .modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model

        is_encoder = self.architectures == [LowRankT5EncoderModel.__name__]
        return {
            "AutoConfig": LowRankT5Config,
            "AutoModel": LowRankT5EncoderModel if is_encoder else LowRankT5Model,
            "AutoModelForSeq2SeqLM": LowRankT5ForConditionalGeneration,
            "AutoModelForTextEncoding": LowRankT5EncoderModel,
        }

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> LowRankT5Config:
        """As T5's, but the decoder's has the decoder's depth: `generate` makes a cache of that many layers."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if decoder and config is not self:
            config.num_layers = config.num_decoder_layers
        return config

    def validate_ranks(self) -> None:
        """Raise ValueError where the tables do not fit the model."""
        validate_bits(self.weight_bits)
        for name, full in self.full_ranks().items():
            validate_table(getattr(self, name), full, name, self._validate_entry)

    def _validate_entry(self, entry: Any, where: str) -> None:
        validate_entry(entry, where, d_model=self.d_model, d_kv=self.d_kv, d_ff=self.d_ff)


__all__ = ["LowRankT5Config"]
