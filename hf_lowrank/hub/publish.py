"""From a checkpoint to a compressed one on the Hub, in stages: compress, evaluate, bench, push; what is done is not done again.

publish("amazon/chronos-bolt-base", "me/chronos-bolt-base-lowrank", folder="bolt-base", max_loss=0.01)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chronos import BaseChronosPipeline, ForecastType
from huggingface_hub import CommitInfo

from ..benchmarking.benchmark import MEMORY_REPEATS, benchmark
from ..checkpoints.export import save_compressed
from ..checkpoints.pipelines import QUANTILE_LEVELS, fingerprint, load_pipeline, predict_quantiles
from ..compression.calibration import calibrate
from ..compression.compress import compress_pretrained, plan_compression
from ..compression.plan import CompressionPlan
from ..compression.settings import CompressionSettings
from ..evaluation.evaluate import evaluate
from ..evaluation.known_tasks import find_tasks
from ..evaluation.sources import HubDataset
from ..evaluation.tasks import EvaluationTask, import_fev
from ..files import alone, holds_model
from ..text_tables import Table, in_notebook
from ..timing import Case, seconds_of
from ..unfinished import UnfinishedRun
from .model_card import check_repo_id
from .push import push_to_hub

__all__ = ["PlannedStage", "Publication", "PublicationPlan", "plan_publication", "publish"]

RECORD, MODEL, CELLS, EVALUATION, BENCHMARK = (
    "publication.json",
    "model",
    "cells",
    "evaluation.json",
    "benchmark.json",
)
TASKS = ("m1_yearly", "packaged")
TIMED = Case(8, 512, 16, None)  # the forecast that estimates of time come from
BENCHED = Case(8, 512, 64, None)  # what `benchmark` times by default
PROCESS_SECONDS = 10.0  # of one that loads a model, forecasts and says how much memory it took
# The time of a compression in that of calibrating one batch, roughly: with a budget (of t5-base's shape it was 70, small models take more),
# and with a search for one (370 of `reference-bolt`).
BATCHES, BATCHES_OF_A_SEARCH = 110, 400


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a publication: what it does, whether it is done, and about how many seconds it takes, None where nobody knows."""

    name: str
    what: str
    is_done: bool
    seconds: float | None


@dataclass(frozen=True)
class PublicationPlan:
    """What `publish` will do: its stages, and the sizes that the rule for the ranks leaves."""

    stages: tuple[PlannedStage, ...]
    sizes: CompressionPlan

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"stages": [asdict(stage) for stage in self.stages], "sizes": self.sizes.to_dict()}

    def table(self) -> Table:
        """For people: a row a stage."""
        rows = [
            [stage.name, stage.what, "done" if stage.is_done else _duration(stage.seconds)] for stage in self.stages
        ]
        note = "Times are rough estimates, from short measurements on this machine."
        return Table("What will be done", ["stage", "what", "time"], rows, num_texts=2, note=note)

    def _repr_html_(self) -> str:
        return in_notebook(self.table(), self.sizes.table())


@dataclass(frozen=True)
class Publication:
    """What a publication has made: all in its folder, and the commit if it was pushed."""

    folder: Path
    commit: CommitInfo | None

    @property
    def model(self) -> Path:
        """The compressed model."""
        return self.folder / MODEL

    @property
    def evaluation(self) -> Path:
        """The scores: what `EvaluationResult.save` writes."""
        return self.folder / EVALUATION

    @property
    def benchmark(self) -> Path:
        """The times: what `Benchmark.save` writes."""
        return self.folder / BENCHMARK

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        paths = {"model": self.model, "evaluation": self.evaluation, "benchmark": self.benchmark}
        commit = None if self.commit is None else {"oid": self.commit.oid, "url": self.commit.commit_url}
        return {name: str(path) for name, path in paths.items()} | {"commit": commit}


@dataclass(frozen=True)
class _Request:
    """What a publication is asked for, checked."""

    source: str
    fingerprint: str
    context_length: int
    settings: CompressionSettings
    tasks: Sequence[EvaluationTask]
    dtype: str
    repeats: int
    seed: int

    def record(self) -> dict[str, Any]:
        """What the outcome of the stages before the push depends on."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "settings": self.settings.to_dict(),
            "tasks": [task.name for task in self.tasks],
            "dtype": self.dtype,
            "repeats": self.repeats,
            "seed": self.seed,
        }


def _request(
    source: str | os.PathLike,
    settings: CompressionSettings | None,
    arguments: Mapping[str, Any],
    tasks: str | EvaluationTask | Iterable[str | EvaluationTask],
    *,
    device: str | None,
    **rest: Any,
) -> tuple[_Request, BaseChronosPipeline]:
    """The request, and the dense model, loaded."""
    import_fev()
    if settings is not None and arguments:
        raise ValueError(f"Give either settings or {', '.join(arguments)}, not both.")
    settings = settings or CompressionSettings(**arguments)
    settings.to_dict()  # a calibration in memory has no name to write down
    if settings.method == "paper":
        raise ValueError("method='paper' makes nothing smaller or faster; there is nothing to publish.")
    definitions = find_tasks([tasks] if isinstance(tasks, str | EvaluationTask) else tasks)
    dense = load_pipeline(source, device=device, dtype="float32", argument="source")
    context_length = min(TIMED.context_length, dense.model_context_length)
    return _Request(str(source), fingerprint(dense), context_length, settings, definitions, **rest), dense


def publish(  # noqa: PLR0913 a public call names all of its options
    source: str | os.PathLike,
    repo_id: str | None = None,
    settings: CompressionSettings | None = None,
    *,
    folder: str | os.PathLike,
    tasks: str | EvaluationTask | Iterable[str | EvaluationTask] = TASKS,
    private: bool | None = None,
    token: str | bool | None = None,
    license: str | None = None,
    overwrite_card: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    repeats: int = 5,
    seed: int = 0,
    resume: bool = True,
    show_progress: bool | None = None,
    **arguments: Any,
) -> Publication:
    """Compress a Chronos checkpoint, score and time it against the dense one, and push it to the Hub with a card that says all this.

    Every stage leaves its outcome in `folder`. The same call again goes on where an earlier one was cut off: within the evaluation
    with the task and model that are next, otherwise with the stage.

    Args:
        source: A Hub id, a folder, or `"reference"` and the like.
        repo_id: Where to push to; by default nowhere, and all is made but the commit.
        settings: As in `compress_pretrained`; `arguments` are in their place.
        folder: Where the model and what is measured of it are kept.
        tasks: As in `evaluate`.
        private, token, license, overwrite_card: As in `push_to_hub`.
        dtype: Of the compressed model: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"` as in the file.
        device: Of all of it; by default the CPU for the compression, and for the rest the GPU if there is one.
        repeats: As in `benchmark`.
        seed: Of the scores and times; that of the compression is in the settings.
        resume: Whether to go on with what `folder` holds; if not, it is deleted.
        show_progress: Show progress bars; by default in a terminal or a notebook.

    Raises:
        ValueError: What the stages raise, before the first one where it can be known; or `folder` holds a publication with other arguments.
        FileExistsError: `folder` is a folder of something else.
        OSError: The checkpoint, a dataset or the Hub cannot be reached, or another run works in `folder`.
        ImportError: fev is not installed.
    """
    if repo_id is not None:
        check_repo_id(repo_id)
    # The dense model is not kept: what follows loads its own.
    request = _request(source, settings, arguments, tasks, device=device, dtype=dtype, repeats=repeats, seed=seed)[0]
    made, run, record = Publication(Path(folder), None), UnfinishedRun(Path(folder), RECORD), request.record()
    with alone(made.folder):
        if run.recorded(record, resume=resume) is None:
            plan_compression(request.source, request.settings, dtype=dtype)  # what cannot be is said first
            run.begin(record)
        if not holds_model(made.model):
            model = compress_pretrained(
                request.source, request.settings, dtype=dtype, device=device, show_progress=show_progress
            )
            save_compressed(model, made.model)
            del model
        if not made.evaluation.exists():
            scores = evaluate(
                {"compressed": str(made.model)},
                request.tasks,
                against=request.source,
                seed=seed,
                cache=made.folder / CELLS,
                device=device,
                show_progress=bool(show_progress),
            )
            scores.save(made.evaluation)
        if not made.benchmark.exists():
            times = benchmark(
                str(made.model),
                request.source,
                names=("compressed", request.source),
                context_length=(request.context_length,),
                device=device,
                repeats=repeats,
                seed=seed,
                show_progress=show_progress,
            )
            times.save(made.benchmark)
        if repo_id is None:
            return made
        commit = push_to_hub(
            made.model,
            repo_id,
            private=private,
            token=token,
            evaluation=made.evaluation,
            benchmark=made.benchmark,
            license=license,
            overwrite_card=overwrite_card,
        )
    return Publication(made.folder, commit)


def plan_publication(  # noqa: PLR0913 as publish
    source: str | os.PathLike,
    repo_id: str | None = None,
    settings: CompressionSettings | None = None,
    *,
    folder: str | os.PathLike,
    tasks: str | EvaluationTask | Iterable[str | EvaluationTask] = TASKS,
    dtype: str = "auto",
    device: str | None = None,
    repeats: int = 5,
    seed: int = 0,
    resume: bool = True,
    **arguments: Any,
) -> PublicationPlan:
    """What `publish` would do with these arguments, what of it is done, and about how long the rest takes. Nothing is written.

    Raises:
        ValueError, OSError, ImportError: As `publish` before its first stage.
    """
    if repo_id is not None:
        check_repo_id(repo_id)
    request, dense = _request(
        source, settings, arguments, tasks, device=device, dtype=dtype, repeats=repeats, seed=seed
    )
    made, run = Publication(Path(folder), None), UnfinishedRun(Path(folder), RECORD)
    is_begun = run.recorded(request.record(), resume=resume) is not None
    sizes = plan_compression(request.source, request.settings, dtype=dtype)
    forecast = _forecast_seconds(dense)
    by_task = [_seconds_of_task(task, forecast) for task in request.tasks]
    known = [seconds for seconds in by_task if seconds is not None]
    num_unknown = len(by_task) - len(known)
    unknown = f" ({num_unknown} of them on data that are not here)" if num_unknown else ""
    rule = ", ".join(f"{name}={value}" for name, value in request.settings.policy_arguments.items())
    num_processes = 2 * min(repeats, MEMORY_REPEATS)
    stages = [
        PlannedStage(
            "compress",
            f"{request.source} with {rule}",
            is_begun and holds_model(made.model),
            _compression_seconds(request),
        ),
        PlannedStage(
            "evaluate",
            f"compressed and dense on {len(request.tasks)} tasks{unknown}",
            is_begun and made.evaluation.exists(),
            None if num_unknown else 2 * sum(known),
        ),
        PlannedStage(
            "bench",
            f"{repeats} forecasts of each in turn, and their memory",
            is_begun and made.benchmark.exists(),
            (2 * repeats + num_processes) * forecast.of(BENCHED) + num_processes * PROCESS_SECONDS,
        ),
    ]
    if repo_id is not None:
        stages.append(PlannedStage("push", f"to {repo_id}, with code and a card", is_done=False, seconds=None))
    return PublicationPlan(tuple(stages), sizes)


# ---- How long it takes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ForecastSeconds:
    """Of a forecast of `TIMED`, and so about of others: in proportion to the series, and to steps or passes."""

    timed: float
    steps_a_pass: int  # of a model that samples 1

    def of(self, case: Case) -> float:
        """Of other sizes."""
        passes, timed = (math.ceil(one.prediction_length / self.steps_a_pass) for one in (case, TIMED))
        return self.timed * case.batch_size / TIMED.batch_size * passes / timed


def _forecast_seconds(pipeline: BaseChronosPipeline) -> _ForecastSeconds:
    draw = torch.Generator().manual_seed(0)
    length = min(TIMED.context_length, pipeline.model_context_length)
    series = torch.randn(TIMED.batch_size, length, generator=draw).cumsum(dim=-1)
    pipeline.predict_quantiles(series[:1], prediction_length=1)
    device = next(pipeline.inner_model.parameters()).device
    seconds = seconds_of(
        lambda: predict_quantiles(pipeline, list(series), TIMED.prediction_length, QUANTILE_LEVELS), device
    )
    is_sampling = pipeline.forecast_type == ForecastType.SAMPLES
    return _ForecastSeconds(seconds, 1 if is_sampling else pipeline.model_prediction_length)


def _seconds_of_task(task: EvaluationTask, forecast: _ForecastSeconds) -> float | None:
    """Of one model; None where the data may not be here."""
    if isinstance(task.source, HubDataset):
        return None
    num_series = len(task.source.read(task.held_out + 1)) * len(task.targets) * task.num_windows
    return forecast.of(Case(num_series, TIMED.context_length, task.horizon, None))


def _compression_seconds(request: _Request) -> float:
    one = partial(calibrate, request.source, num_batches=1, num_refit_batches=1, show_progress=False)
    return seconds_of(one, torch.device("cpu")) * (
        BATCHES if request.settings.max_loss is None else BATCHES_OF_A_SEARCH
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
