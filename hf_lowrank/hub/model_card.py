"""Model cards: what a compressed checkpoint was made from and how, its ranks, and what was measured of it."""

from __future__ import annotations

import copy
import html
import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ..checkpoints.families import LOWRANK_CLASSES, Family, family_of
from ..checkpoints.loading import HUB_ID, REFERENCES
from ..checkpoints.summary import summarize
from ..compression.settings import CompressionSettings
from ..models.modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration
from .measured import read_scores, read_speed

if TYPE_CHECKING:
    from ..benchmarking.benchmark import Benchmark
    from ..evaluation.result import EvaluationResult

__all__ = ["LOWRANK_NAMES", "check_model", "check_repo_id", "render_card"]

LOWRANK_NAMES = ", ".join(cls.__name__ for cls in LOWRANK_CLASSES)
TEMPLATE = Path(__file__).with_name("model_card_template.md")
# The publishers whose checkpoints of these families are all under one licence.
APACHE = re.compile(r"(amazon|autogluon)/chronos-|google-t5/")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# In `config.compression`, but long and of no use to a reader.
LEFT_OUT = {"predicted_loss", "kept_ranks"}
EARLIER = "source_compression"  # the record of a low-rank model that it was made from
DEFAULTS = {name: field.default for name, field in inspect.signature(CompressionSettings).parameters.items()}


def render_card(
    model: PreTrainedModel,
    repo_id: str,
    *,
    evaluation: EvaluationResult | str | os.PathLike | None = None,
    benchmark: Benchmark | str | os.PathLike | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a low-rank model of any family; needs no Hub.

    Args:
        model: A model of one of the `LowRank...` classes.
        repo_id: Where it will be, `"owner/name"`: what the card says to load.
        evaluation: What `evaluate` returned, or the .json file it was saved in: the scores, also as `model-index`. Beside Seasonal Naive and
            the dense model it must be of this model alone.
        benchmark: What `benchmark` returned, or its .json file.
        license: The Hub's identifier, such as `"apache-2.0"`. It is that of the base model, and known for the published
            Chronos checkpoints and those in this package; of others the card names none.

    Raises:
        ValueError: The model is no low-rank one, its record is damaged, an argument is none, or a file is of something else.
        OSError: A file cannot be read.
    """
    family = check_model(model)
    check_repo_id(repo_id)
    if license is not None and not LICENCE.fullmatch(license):
        raise ValueError(
            f"license must be an identifier of the Hub, such as apache-2.0 or mit, found {license[:60]!r}."
        )
    try:
        made = _made(getattr(model.config, "compression", None) or {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: `compression` in its config.json is no record of how it was made ({type(error).__name__}: {error})."
        ) from error
    source, root = made.source, made.root
    if license is None and root is not None and (APACHE.match(root) or root in REFERENCES):
        license = "apache-2.0"
    name = repo_id.split("/")[-1]
    is_chronos = hasattr(model.config, "chronos_config")
    scores = None if evaluation is None else read_scores(evaluation)
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="time-series-forecasting" if is_chronos else None,
        tags=["hf_lowrank", "low-rank", "compression", *(["chronos", "time-series"] if is_chronos else ["t5"])],
        base_model=source if made.is_of_hub else root if root is not None and HUB_ID.fullmatch(root) else None,
        model_name=name if scores else None,
        eval_results=scores.results() if scores else None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        family=family.name if is_chronos else "text",
        auto_class=_auto_class(model),
        made=made,
        is_reference=source in REFERENCES,
        sizes=_sizes(model),
        rows=summarize(model.config).rows,
        evaluation=scores,
        benchmark=None if benchmark is None else read_speed(benchmark),
        license_name=license,
        plain=plain,
        code=code,
    )


def check_model(model: PreTrainedModel) -> Family:
    """The family of a low-rank model; a ValueError for anything else."""
    family = family_of(type(model))
    if family is None or type(model) not in family.classes.values():
        raise ValueError(
            f"model must be a low-rank one ({LOWRANK_NAMES}), found {type(model).__name__}; compress_pretrained makes them."
        )
    return family


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError where the Hub can have no repository of this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id must be 'owner/name' or 'name', found {repo_id!r}: {error}") from error


def plain(text: Any) -> str:
    """Text of others, on one line and as it is written: nothing in it is HTML, a link, code or the end of a table's cell."""
    words = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[\\`|\[\]]", lambda found: f"&#{ord(found[0])};", words)


def code(text: Any) -> str:
    """Text of others between two backticks, where nothing but a backtick means anything."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def _auto_class(model: PreTrainedModel) -> str:
    """The class of transformers that loads it."""
    if isinstance(model, LowRankT5EncoderModel):
        return "AutoModelForTextEncoding"
    return "AutoModelForSeq2SeqLM" if isinstance(model, LowRankT5ForConditionalGeneration) else "AutoModel"


# ---- How it was made -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What `config.compression` says of how a model was made; its names and numbers are whatever a file says.

    Attributes:
        source: What it was made from, by the name that loads it; None of what was trained at these ranks.
        root: What that was made from in its turn, and so on, to the first.
        call: The call of `compress_pretrained`.
        record: All of it as JSON, but for the longest entries.
        kept_rank_ratio: Of the paper's method.
        recovery: The steps, the teacher and the series of a distillation.
    """

    source: str | None
    root: str | None
    call: str | None
    record: str | None
    kept_rank_ratio: float | None
    recovery: dict[str, Any] | None

    @property
    def is_of_hub(self) -> bool:
        """Whether the source is a Hub id, the only name with a slash."""
        return self.source is not None and HUB_ID.fullmatch(self.source) is not None


def _made(record: Mapping[str, Any]) -> Made:
    """Raises AttributeError, KeyError, TypeError or ValueError where the record is none."""
    share, recovery = record.get("kept_rank_ratio"), record.get("recovery")
    return Made(
        source=_source(record),
        root=_root(record),
        call=_call(record),
        record=_record(record),
        kept_rank_ratio=None if share is None else float(share),
        recovery=None if recovery is None else _recovery(recovery),
    )


def _source(record: Mapping[str, Any]) -> str | None:
    source = record.get("source")
    if source is None:
        return None
    if not isinstance(source, str):
        raise TypeError(f"source is {source!r}")
    shipped = {folder.name: name for name, folder in REFERENCES.items()}
    return shipped.get(source, source) if HUB_ID.fullmatch(source) else shipped.get(source, Path(source).name)


def _root(record: Mapping[str, Any]) -> str | None:
    """The first source; None where it was trained at its ranks."""
    if "source" not in record:
        return None
    if EARLIER in record and (root := _root(record[EARLIER])) is not None:
        return root
    return str(record["adapter"]["base"]) if "adapter" in record else _source(record)


def _recovery(recovery: Mapping[str, Any]) -> dict[str, Any]:
    series = recovery["series"]
    number = series["series"] if isinstance(series, dict) else series
    return {"steps": int(recovery["steps"]), "teacher": recovery["teacher"], "series": number}


def _call(record: Mapping[str, Any]) -> str | None:
    """The call of `compress_pretrained` that made it, without what is at its default: names and literals alone."""
    if "method" not in record:  # it was not compressed but pretrained at these ranks
        return None
    forms = record.get("form", {})
    calibration = record.get("calibration")
    arguments = {name: value for name, value in record["arguments"].items() if name != "ranks"}
    arguments |= {name: record[name] for name in ("feed_forward_ratio", "method", "multiple_of") if name in record}
    if "quantize" in record:
        arguments["quantize"] = record["quantize"]["to"]
    if "speed" in record:  # earlier versions had one backend, and did not name it
        arguments["backend"] = record["speed"].get("backend", "torch")
    arguments["form"] = next(iter(forms.values())) if len(set(forms.values())) == 1 else forms or "auto"
    if record["method"] != "paper":
        arguments |= {"calibration": None} if calibration is None else {"refit": calibration["refit"]}
    arguments["seed"] = record.get("seed") or 0
    if odd := [name for name in arguments if not name.isidentifier()]:
        raise ValueError(f"{odd[0]!r} is no name of an argument")
    shown = [
        f"{name}={value!r}" for name, value in arguments.items() if name not in DEFAULTS or value != DEFAULTS[name]
    ]
    if "ranks" in record["arguments"]:
        shown.insert(0, "ranks=the_table_below")
    if calibration is not None and calibration.get("data") != "synthetic":
        shown.append("calibration=your_data")
    return f"compress_pretrained({', '.join([repr(_source(record)), *shown])})"


def _record(record: Mapping[str, Any]) -> str | None:
    """`config.compression` as JSON, without its longest entries."""
    if not record:
        return None
    return json.dumps(_shown(record), indent=2)


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, and those of what it was made from, without their longest entries."""
    shown = copy.deepcopy({name: value for name, value in record.items() if name not in LEFT_OUT})
    shown.get("arguments", {}).pop("ranks", None)
    if "source" in shown:  # earlier versions wrote the path of a folder that was gone
        shown["source"] = _source(record)
    if earlier := record.get(EARLIER):
        shown[EARLIER] = _shown(earlier)
    return shown


@dataclass(frozen=True)
class Sizes:
    """A model and the dense one of its shape; `cache` is that of one token of context and one of the forecast, in bytes."""

    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    attention_ratio: float
    cache: int
    dense_cache: int
    dtype: str
    integers: dict[int, int]  # the number of matrices of integers, by their bits


def _sizes(model: PreTrainedModel) -> Sizes:
    """Those of a low-rank model in its own dtype."""
    summary = summarize(model)
    size = summary.size
    assert size is not None
    return Sizes(
        parameters=size.parameters,
        dense_parameters=size.dense_parameters,
        bytes=size.bytes,
        dense_bytes=size.dense_bytes,
        attention_ratio=summary.attention_ratio,
        cache=summary.total("cached_numbers") * size.dtype.itemsize,
        dense_cache=summary.total("dense_cached_numbers") * size.dtype.itemsize,
        dtype=size.dtype_name,
        integers=dict(sorted(Counter((model.config.weight_bits or {}).values()).items(), reverse=True)),
    )
