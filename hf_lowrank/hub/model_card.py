"""Model cards: what a compressed checkpoint was made from and how, its ranks, and what was measured of it."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..checkpoints.families import LOWRANK_CLASSES, Family, family_of
from ..checkpoints.loading import REFERENCES
from ..checkpoints.summary import summarize
from ..compression.settings import CompressionSettings
from ..evaluation.naive import SEASONAL_NAIVE
from ..models.modeling_lowrank_t5 import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration
from ..timing import Case

if TYPE_CHECKING:
    from ..benchmarking.benchmark import Benchmark
    from ..evaluation.evaluate import EvaluationResult

__all__ = ["LOWRANK_NAMES", "check_model", "render_card"]

LOWRANK_NAMES = ", ".join(cls.__name__ for cls in LOWRANK_CLASSES)
TEMPLATE = Path(__file__).with_name("model_card_template.md")
SHOWN_METRICS = ("WQL", "MASE")
# The publishers whose checkpoints of these families are all under one licence.
APACHE = re.compile(r"(amazon|autogluon)/chronos-|google-t5/")
# In `config.compression`, but long and of no use to a reader.
LEFT_OUT = {"predicted_loss", "kept_ranks"}
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
        ValueError: The model is no low-rank one, or a file is of something else.
        OSError: A file cannot be read.
    """
    family = check_model(model)
    record = getattr(model.config, "compression", None) or {}
    source = _source(record)
    if license is None and source is not None and (APACHE.match(source) or source in REFERENCES):
        license = "apache-2.0"
    name = repo_id.split("/")[-1]
    is_chronos = hasattr(model.config, "chronos_config")
    scores = None if evaluation is None else _scores(_content(evaluation, "evaluation"))
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="time-series-forecasting" if is_chronos else None,
        tags=["hf_lowrank", "low-rank", "compression", *(["chronos", "time-series"] if is_chronos else ["t5"])],
        base_model=source if source is not None and source.count("/") == 1 else None,
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
        source=source,
        is_reference=source in REFERENCES,
        call=_call(record),
        record=_record(record),
        sizes=_sizes(model),
        rows=summarize(model.config).rows,
        kept_rank_ratio=record.get("kept_rank_ratio"),
        recovery=record.get("recovery"),
        evaluation=scores,
        benchmark=None if benchmark is None else _speed(_content(benchmark, "benchmark")),
        license_name=license,
    )


def check_model(model: PreTrainedModel) -> Family:
    """The family of a low-rank model; a ValueError for anything else."""
    family = family_of(type(model))
    if family is None or type(model) not in family.classes.values():
        raise ValueError(
            f"model must be a low-rank one ({LOWRANK_NAMES}), found {type(model).__name__}; compress_pretrained makes them."
        )
    return family


def _source(record: Mapping[str, Any]) -> str | None:
    """What the model was made from, by the name that loads it."""
    shipped = {folder.name: name for name, folder in REFERENCES.items()}
    source = record.get("source")
    return None if source is None else shipped.get(source, source)


def _auto_class(model: PreTrainedModel) -> str:
    """The class of transformers that loads it."""
    if isinstance(model, LowRankT5EncoderModel):
        return "AutoModelForTextEncoding"
    return "AutoModelForSeq2SeqLM" if isinstance(model, LowRankT5ForConditionalGeneration) else "AutoModel"


# ---- How it was made -------------------------------------------------------------------------------------------------


def _call(record: Mapping[str, Any]) -> str | None:
    """The call of `compress_pretrained` that made it, without what is at its default."""
    if "method" not in record:  # it was not compressed but pretrained at these ranks
        return None
    forms = record.get("form", {})
    calibration = record.get("calibration")
    arguments = {name: value for name, value in record["arguments"].items() if name != "ranks"}
    arguments |= {name: record[name] for name in ("feed_forward_ratio", "method", "multiple_of") if name in record}
    arguments["form"] = next(iter(forms.values())) if len(set(forms.values())) == 1 else forms or "auto"
    if record["method"] != "paper":
        arguments |= {"calibration": None} if calibration is None else {"refit": calibration["refit"]}
    arguments["seed"] = record.get("seed") or 0
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
    shown = copy.deepcopy({name: value for name, value in record.items() if name not in LEFT_OUT})
    shown.get("arguments", {}).pop("ranks", None)
    return json.dumps(shown, indent=2)


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


def _sizes(model: PreTrainedModel) -> Sizes:
    """Those of a low-rank model in its own dtype."""
    summary, width = summarize(model.config), model.dtype.itemsize
    parameters = model.num_parameters()
    dense = summary.dense_parameters(parameters)
    return Sizes(
        parameters=parameters,
        dense_parameters=dense,
        bytes=parameters * width,
        dense_bytes=dense * width,
        attention_ratio=summary.attention_ratio,
        cache=summary.total("cached_numbers") * width,
        dense_cache=summary.total("dense_cached_numbers") * width,
        dtype=str(model.dtype).removeprefix("torch."),
    )


# ---- What was measured -----------------------------------------------------------------------------------------------


def _content(given: Any, argument: str) -> dict[str, Any]:
    """What a result or its file holds."""
    if hasattr(given, "to_dict"):
        return json.loads(json.dumps(given.to_dict()))
    keys = {"evaluation": {"results", "aggregate", "settings"}, "benchmark": {"results", "machine"}}[argument]
    if not isinstance(given, (str, os.PathLike)):
        raise ValueError(f"{argument} must be a result or its .json file, found a {type(given).__name__}.")
    try:
        content = json.loads(Path(given).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{argument}: {given} is no JSON file ({error}).") from error
    if not isinstance(content, dict) or not keys <= set(content):
        command = {"evaluation": "evaluate", "benchmark": "bench"}[argument]
        raise ValueError(
            f"{argument}: {given} must be a file of `hf-lowrank {command} --json`; it lacks {sorted(keys)}."
        )
    return content


@dataclass(frozen=True)
class Scores:
    """The scores of one model: a row a task, and the means relative to the baselines."""

    # task, num_series, horizon; WQL and MASE of "ours", "naive" and, where it is known, "dense"
    rows: tuple[dict[str, Any], ...]
    means: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    has_dense: bool

    def results(self) -> list[EvalResult]:
        """For `model-index`; an undefined score (a constant series has no MASE) is left out."""
        return [
            EvalResult(
                task_type="time-series-forecasting",
                task_name="Time series forecasting",
                dataset_type=row["task"],
                dataset_name=row["task"],
                metric_type=metric.lower(),
                metric_name=metric,
                metric_value=row["ours"][metric],
            )
            for row in self.rows
            for metric in SHOWN_METRICS
            if row["ours"][metric] is not None
        ]


def _scores(content: Mapping[str, Any]) -> Scores:
    """Those of the one model that is neither Seasonal Naive nor the dense one."""
    by_cell = {(row["model"], row["task"]): row for row in content["results"]}
    against = content["settings"].get("against")
    ours = sorted({model for model, _ in by_cell} - {SEASONAL_NAIVE, against})
    if len(ours) != 1:
        raise ValueError(
            "evaluation must be of this model alone beside Seasonal Naive and the `against` model; found "
            f"{', '.join(ours) or 'none'}."
        )
    names = {"ours": ours[0], "naive": SEASONAL_NAIVE, "dense": against}
    rows = []
    for (model, task), row in by_cell.items():
        if model == ours[0]:
            cells = {side: by_cell.get((name, task), {}) for side, name in names.items()}
            scores = {side: {metric: cell.get(metric) for metric in SHOWN_METRICS} for side, cell in cells.items()}
            rows.append({"task": task, "num_series": row["num_series"], "horizon": row["horizon"]} | scores)
    titles = {"relative_to_dense": "the dense model", "relative_to_seasonal_naive": "Seasonal Naive"}
    means = [
        {"baseline": title} | {metric: content["aggregate"][ours[0]][key][metric] for metric in SHOWN_METRICS}
        for key, title in titles.items()
        if key in content["aggregate"].get(ours[0], {})
    ]
    settings = {name: value for name, value in content["settings"].items() if name != "against"}
    return Scores(tuple(rows), tuple(means), settings, against is not None)


def _speed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A row a case, and the machine."""
    rows = []
    for result in content["results"]:
        sides = {"ours": result["model"], "dense": result["against"], "lean": result.get("against_lean")}
        measured = {name: side for name, side in sides.items() if side}
        rows.append(
            {
                "case": str(Case(**result["case"])),
                "seconds": {name: statistics.median(side["seconds"]) for name, side in measured.items()},
                "mebibytes": {name: _peak(side["memory"]) for name, side in measured.items()},
                "time_ratio": result["time_ratio"],
                "memory_ratio": result.get("memory_ratio"),
                "lean_time_ratio": result.get("lean_time_ratio"),
            }
        )
    return {"rows": rows, "machine": content["machine"], "has_lean": any(row["lean_time_ratio"] for row in rows)}


def _peak(memory: Sequence[Mapping[str, Any]]) -> float | None:
    """The median peak of the repeats in MiB; None where none was measured."""
    peaks = [repeat["peak"] for repeat in memory if repeat["peak"] is not None]
    return statistics.median(peaks) / 2**20 if peaks else None
