"""Short fine-tuning that gives a compressed model back what truncation took: distillation from its dense teacher."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer

from ..checkpoints.export import save_compressed
from ..checkpoints.families import LOWRANK_CLASSES, T5, family_of
from ..checkpoints.loading import public_name
from ..data.groups import GroupedSeries
from ..data.tokens import WindowCollator
from ..data.windows import single_batch
from ..files import check_output
from .batches import RunData, run_data
from .loaders import load_forecaster
from .runs import earlier_run, end, working_folder
from .settings import DistillationSettings, check_count
from .teaching import Teaching, teaching_of
from .trainer import Diverged, run_trainer, training_arguments

__all__ = ["RecoveryScore", "recover"]

# Student and teacher may sample differently, and see less of the past; what is read and written must mean the same to both.
NOT_OF_THE_FORMAT = {"context_length", "num_samples", "temperature", "top_k", "top_p"}
# Evaluations in a run, and how many of them in a row may be no better than the best one.
EVALUATIONS, PATIENCE = 10, 3


@dataclass(frozen=True)
class RecoveryScore:
    """A model on held-out windows: the loss that a student is trained on (see `teaching`), and its weighted quantile loss."""

    loss: float
    wql: float


def recover(  # noqa: PLR0913 a public call names all of its options
    student: str | os.PathLike | PreTrainedModel,
    teacher: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    *,
    series: Any = "synthetic",
    steps: int = 1000,
    learning_rate: float = 1e-4,
    distillation_weight: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 4096,
    evaluation_batches: int = 16,
    resume: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
) -> PreTrainedModel:
    """Train a compressed Chronos model for a short while to forecast like the dense one it was made from, or better on your series.

    All weights are trained, in float32 and without dropout, by AdamW with a warm-up and a cosine decay, on the loss of
    `training.teaching`. On held-out windows it is looked up to ten times how the student does: what is saved is the best of these, at the least
    the student as it was, and three in a row that are no better end the training. Until a run is complete its checkpoints are kept in the
    folder `<output>.recovery`; one that was cut off goes on from the last of them when the same call is made again.

    Args:
        student: A compressed Chronos-T5, Chronos-Bolt or Chronos-2: a folder, a Hub id, or a loaded model, which is left as it is.
        teacher: The dense model that it was made from, likewise; or `"reference"`.
        output: The folder to write. It appears when it is complete.
        series: What to train on: "synthetic", or your own series in any shape that `read_series` takes, or a `GroupedSeries`, of which
            other models than a Chronos-2 read the targets alone. The last horizon of each (a third of the series, where that is shorter)
            is held out for the scores and never trained on.
        steps: Optimizer steps, at most.
        learning_rate: The highest one.
        distillation_weight: At 1 all is learned from the teacher, at 0 from the series. Both together are better than either, and of
            your own series make a specialist.
        temperature: Of the distillation of a Chronos-T5.
        seed: Of the windows.
        batch_tokens: Tokens of context and target in a batch, about; of a Bolt or Chronos-2, a quarter of the values.
        evaluation_batches: Batches in the held-out set, at most.
        resume: Whether to go on with an unfinished run. If not, its checkpoints are removed.
        overwrite: Whether to replace `output`.
        show_progress: Whether to draw a progress bar on the standard error stream.

    Returns:
        The recovered model as it was saved, in evaluation mode and in the student's dtype. `config.compression["recovery"]`
        records how it was made and its scores before and after.

    Raises:
        ValueError: An argument is out of range, the models do not read and write alike, an unfinished run has other
            arguments, or the training diverged.
        FileExistsError: `output` exists and is not empty, and `overwrite` is false.
        OSError: A checkpoint or a file of series cannot be read.
    """
    settings = DistillationSettings(
        steps=steps,
        learning_rate=learning_rate,
        distillation_weight=distillation_weight,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    check_count("evaluation_batches", evaluation_batches)
    overwrite = (earlier_run(output, "recovery").is_ending and resume) or overwrite
    check_output(output, overwrite=overwrite)
    names = {"student": public_name(student), "teacher": public_name(teacher)}
    learner, expert = load_forecaster(student, "student"), load_forecaster(teacher, "teacher")
    if type(learner) not in LOWRANK_CLASSES:
        raise ValueError(
            f"student: {names['student']} is dense, a {type(learner).__name__}; give the compressed model that is to be recovered."
        )
    if learner.config.weight_bits:
        raise ValueError(
            f"student: {names['student']} has matrices of integers, which are not trained; load it, call dequantize() and give the model."
        )
    _check_alike(learner, expert, names)
    teaching = teaching_of(expert.float().eval(), weight=distillation_weight, temperature=temperature)
    data = run_data(
        learner.config,
        series,
        steps,
        evaluation_batches=evaluation_batches,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    description, series_digest = _description_and_digest(data, series)
    identity = {"student": _weights_digest(learner), "teacher": _weights_digest(expert), "series": series_digest}
    with working_folder(output, "recovery", asdict(settings) | identity, resume=resume) as folder:
        scores = _train(learner, teaching, data, settings, folder, show_progress)
        record = names | asdict(settings) | {"series": description} | scores
        learner.config.compression = (getattr(learner.config, "compression", None) or {}) | {"recovery": record}
        end(output, "recovery", overwrite=overwrite)
        save_compressed(learner, output, overwrite=overwrite)
    if record["best_step"] == 0:
        warnings.warn(
            f"The training made {names['student']} no better on held-out windows, so it is saved as it was: give a lower learning_rate, "
            "more steps or more series.",
            stacklevel=2,
        )
    return learner


# --- models ------------------------------------------------------------------------------------------------------


def _check_alike(student: PreTrainedModel, teacher: PreTrainedModel, names: dict[str, str]) -> None:
    """Raise ValueError where what one model reads or writes means something else to the other."""
    families = [family_of(type(model)) for model in (student, teacher)]
    if families[0] is not families[1]:
        raise ValueError(
            f"student and teacher must be of one family: the student {names['student']} is a {type(student).__name__}, the teacher "
            f"{names['teacher']} a {type(teacher).__name__}."
        )
    # Tokens of a Chronos-T5 come one by one, however many; the others forecast whole horizons.
    free = NOT_OF_THE_FORMAT | ({"prediction_length"} if families[0] is T5 else set())
    ours, theirs = (
        {name: value for name, value in model.config.chronos_config.items() if name not in free}
        | {name: getattr(model.config, name, None) for name in ("vocab_size", "decoder_start_token_id")}
        for model in (student, teacher)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"student and teacher must read and write alike: {name} is {ours.get(name)!r} in the student {names['student']} and "
                f"{theirs.get(name)!r} in the teacher {names['teacher']}."
            )


def _weights_digest(model: PreTrainedModel) -> str:
    weights = (tensor.detach().cpu().contiguous().flatten() for tensor in model.state_dict().values())
    return _digest(tensor.view(torch.uint8).numpy() for tensor in weights)


def _digest(arrays: Iterable[NDArray]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# --- data --------------------------------------------------------------------------------------------------------


def _description_and_digest(data: RunData, series: Any) -> tuple[str | dict[str, int], str]:
    """What is published of the series with the model, and what tells one run from another."""
    if data.series is None:
        return "synthetic", "synthetic"
    description = {
        "series": len(data.series),
        "values": sum(int((~np.isnan(values)).sum()) for values in data.series),
        "held_out_windows": data.num_held_out_windows,
    }
    roles = repr(series.columns) if isinstance(series, GroupedSeries) else ""
    told = [np.array([len(values) for values in data.series]), np.frombuffer(roles.encode(), np.uint8), *data.series]
    return description, _digest(told)


# --- training ----------------------------------------------------------------------------------------------------


def _train(
    learner: PreTrainedModel,
    teaching: Teaching,
    data: RunData,
    settings: DistillationSettings,
    folder: Path,
    show_progress: bool,
) -> dict[str, Any]:
    """Train `learner` in place, in float32, and leave it in its dtype and in evaluation mode, at its best; its scores, for the record."""
    dtype, use_cache = learner.dtype, getattr(learner.config, "use_cache", None)
    trainer = _DistillationTrainer(learner.float().eval(), teaching, data, settings, folder)
    first = copy.deepcopy(learner.state_dict())
    before = trainer.score()
    if not math.isfinite(before.loss):
        raise ValueError("student or teacher: the predictions of one of them are not finite.")
    run_trainer(trainer, "Recovering", show_progress=show_progress, last=[EarlyStoppingCallback(PATIENCE)])
    learner.to(dtype).float()  # scored as it is saved
    after, best_step = trainer.score(), trainer.state.best_global_step
    if not math.isfinite(after.loss):
        raise Diverged(settings.learning_rate, settings.steps)
    if after.loss >= before.loss:
        learner.load_state_dict(first)
        after, best_step = before, 0
    if use_cache is not None:
        learner.config.use_cache = use_cache  # Trainer has set it
    learner.to("cpu", dtype).eval()
    return {
        "before": asdict(before),
        "after": asdict(after),
        "teacher_wql": trainer.wql(teaching.teacher),
        "best_step": best_step,
    }


class _DistillationTrainer(Trainer):
    def __init__(
        self,
        student: PreTrainedModel,
        teaching: Teaching,
        data: RunData,
        settings: DistillationSettings,
        folder: Path,
    ) -> None:
        # A look takes as long as so many steps.
        between = max(math.ceil(settings.steps / EVALUATIONS), min(len(data.held_out), settings.steps))
        arguments = training_arguments(
            folder,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 10),
            weight_decay=0.0,
            logging_strategy="no",
            eval_strategy="steps",
            eval_steps=between,
            save_steps=between,
            save_total_limit=2,  # the best and the last
            load_best_model_at_end=True,
            prediction_loss_only=True,
            label_names=WindowCollator(student.config).label_names,
            seed=settings.seed,
        )
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=data.batches,
            eval_dataset=data.held_out,
            data_collator=single_batch,
        )
        self.settings = settings
        self.data = data
        self.teaching = teaching
        teaching.teacher.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch; Trainer calls it."""
        model.eval()  # dropout would be noise on the way to an answer that is known
        loss = self.teaching.loss(model, inputs)
        if not torch.isfinite(loss):
            raise Diverged(self.settings.learning_rate, self.state.global_step)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def score(self) -> RecoveryScore:
        """The student, on the held-out batches."""
        losses, windows = 0.0, 0
        for batch in self.held_out():
            size = next(len(of) for of in batch.values() if isinstance(of, torch.Tensor))
            losses += size * float(self.teaching.loss(self.model, batch))
            windows += size
        loss = losses / windows
        return RecoveryScore(loss, self.wql(self.model) if math.isfinite(loss) else math.nan)

    def held_out(self) -> Iterator[dict[str, Any]]:
        """The held-out batches, where the models are."""
        for batch in self.data.held_out:
            yield {name: of.to(self.args.device) if isinstance(of, torch.Tensor) else of for name, of in batch.items()}

    def wql(self, model: PreTrainedModel) -> float:
        """The weighted quantile loss of the student or the teacher on the held-out windows."""
        return self.teaching.wql(model, self.held_out(), self.data.held_out_windows)
