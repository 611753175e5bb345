"""Short fine-tuning that gives a compressed model back what truncation took: distillation from its dense teacher."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer

from ..checkpoints.export import save_compressed
from ..checkpoints.families import LOWRANK_CLASSES
from ..checkpoints.loading import public_name
from ..data.tokens import IGNORED_LABEL
from ..data.windows import single_batch
from ..files import check_output
from .batches import RunData, run_data
from .loaders import load_chronos_t5
from .runs import earlier_run, end, working_folder
from .settings import DistillationSettings, check_count
from .trainer import Diverged, run_trainer, training_arguments

__all__ = ["RecoveryScore", "distillation_loss", "recover"]

# Teacher and student may sample differently, and see less of the past; a token must mean the same to both.
NOT_OF_THE_TOKENIZER = {"context_length", "prediction_length", "num_samples", "temperature", "top_k", "top_p"}


@dataclass(frozen=True)
class RecoveryScore:
    """How far a student is from its teacher on held-out windows: means over the tokens of the targets, in nats."""

    divergence: float  # KL(teacher || student)
    cross_entropy: float
    teacher_cross_entropy: float


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, *, weight: float, temperature: float
) -> torch.Tensor:
    """The mean over tokens of (1 - w) CE(labels, p) + w T^2 KL(q || p).

    p and q are the softmax of the student's and the teacher's logits; in the second term, of logits / T. The factor T^2
    keeps the size of its gradient the same at every T ("Distilling the Knowledge in a Neural Network", arXiv 1503.02531,
    section 2).

    Args:
        student: Logits of shape (tokens, vocabulary).
        teacher: Logits of the same shape.
        labels: int64 of shape (tokens,).
        weight: w, in [0, 1].
        temperature: T, above 0.

    Returns:
        A scalar, in nats a token.
    """
    loss = student.new_zeros(())
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(student, labels)
    if weight > 0:
        p, q = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
        loss = loss + weight * temperature**2 * F.kl_div(p, q, log_target=True, reduction="batchmean")
    return loss


def recover(  # noqa: PLR0913 a public call names all of its options
    student: str | os.PathLike | PreTrainedModel,
    teacher: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    *,
    series: Any = "synthetic",
    steps: int = 500,
    learning_rate: float = 2e-4,
    distillation_weight: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 4096,
    evaluation_batches: int = 16,
    resume: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
) -> PreTrainedModel:
    """Train a compressed Chronos-T5 for a short while to forecast like the dense model it was made from.

    All weights are trained, in float32 and without dropout, by AdamW with a warm-up and a cosine decay, on the loss of
    `distillation_loss`. Until a run is complete its checkpoints are kept in the folder `<output>.recovery`; one that was cut
    off goes on from the last of them when the same call is made again.

    Args:
        student: A compressed Chronos-T5: a folder, a Hub id, or a loaded model, which is left as it is.
        teacher: The dense Chronos-T5, likewise; or `"reference"`.
        output: The folder to write. It appears when it is complete.
        series: What to train on: "synthetic", or your own series in any shape that `read_series` takes. The last horizon of
            each (a third of the series, where that is shorter) is held out for the scores and never trained on.
        steps: Optimizer steps.
        learning_rate: The highest one.
        distillation_weight: w of `distillation_loss`: at 1 all is learned from the teacher, at 0 from the series.
        temperature: T of `distillation_loss`.
        seed: Of the windows.
        batch_tokens: Tokens of context and target in a batch, about.
        evaluation_batches: Batches in the held-out set, at most.
        resume: Whether to go on with an unfinished run. If not, its checkpoints are removed.
        overwrite: Whether to replace `output`.
        show_progress: Whether to draw a progress bar on the standard error stream.

    Returns:
        The recovered model as it was saved, in evaluation mode and in the student's dtype. `config.compression["recovery"]`
        records how it was made and its scores before and after.

    Raises:
        ValueError: An argument is out of range, the models do not share a tokenizer, an unfinished run has other
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
    learner, expert = load_chronos_t5(student, "student"), load_chronos_t5(teacher, "teacher")
    if type(learner) not in LOWRANK_CLASSES:
        raise ValueError(
            f"student: {names['student']} is dense, a {type(learner).__name__}; give the compressed model that is to be recovered."
        )
    if learner.config.weight_bits:
        raise ValueError(
            f"student: {names['student']} has matrices of integers, which are not trained; load it, call dequantize() and give the model."
        )
    _check_same_tokens(learner, expert, names)
    data = run_data(
        learner.config,
        series,
        steps,
        evaluation_batches=evaluation_batches,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    description, series_digest = _description_and_digest(data)
    identity = {"student": _weights_digest(learner), "teacher": _weights_digest(expert), "series": series_digest}
    with working_folder(output, "recovery", asdict(settings) | identity, resume=resume) as folder:
        before, after = _train(learner, expert, data, settings, folder, show_progress)
        record = names | asdict(settings) | {"series": description, "before": asdict(before), "after": asdict(after)}
        learner.config.compression = (getattr(learner.config, "compression", None) or {}) | {"recovery": record}
        end(output, "recovery", overwrite=overwrite)
        save_compressed(learner, output, overwrite=overwrite)
    _warn_if_worse(names["student"], before, after, distillation_weight)
    return learner


def _warn_if_worse(name: str, before: RecoveryScore, after: RecoveryScore, weight: float) -> None:
    was, now = ((1 - weight) * score.cross_entropy + weight * score.divergence for score in (before, after))
    if now > was:
        warnings.warn(
            f"The training made {name} worse on held-out windows, from {was:.4f} to {now:.4f} nats a token: "
            "give a lower learning_rate, or more steps.",
            stacklevel=3,
        )


# --- models ------------------------------------------------------------------------------------------------------


def _check_same_tokens(student: PreTrainedModel, teacher: PreTrainedModel, names: dict[str, str]) -> None:
    ours, theirs = (
        {name: value for name, value in model.config.chronos_config.items() if name not in NOT_OF_THE_TOKENIZER}
        | {name: getattr(model.config, name, None) for name in ("vocab_size", "decoder_start_token_id")}
        for model in (student, teacher)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"student and teacher must have the same vocabulary and tokenizer: {name} is {ours.get(name)!r} in the "
                f"student {names['student']} and {theirs.get(name)!r} in the teacher {names['teacher']}."
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


def _description_and_digest(data: RunData) -> tuple[str | dict[str, int], str]:
    """What is published of the series with the model, and what tells one run from another."""
    if data.series is None:
        return "synthetic", "synthetic"
    description = {
        "series": len(data.series),
        "values": sum(int((~np.isnan(values)).sum()) for values in data.series),
        "held_out_windows": data.num_held_out_windows,
    }
    return description, _digest([np.array([len(values) for values in data.series]), *data.series])


# --- training ----------------------------------------------------------------------------------------------------


def _train(
    learner: PreTrainedModel,
    expert: PreTrainedModel,
    data: RunData,
    settings: DistillationSettings,
    folder: Path,
    show_progress: bool,
) -> tuple[RecoveryScore, RecoveryScore]:
    """Train `learner` in place, in float32, and leave it in its dtype and in evaluation mode; its scores before and after."""
    dtype, use_cache = learner.dtype, learner.config.use_cache
    trainer = _DistillationTrainer(learner.float().eval(), expert.float().eval(), data.batches, settings, folder)
    held_out = list(data.held_out)
    before = _score(learner, expert, held_out)
    if not math.isfinite(before.divergence):
        raise ValueError("student or teacher: the logits of one of them are not finite.")
    run_trainer(trainer, "Recovering", show_progress=show_progress)
    learner.to(dtype).float()  # scored as it is saved
    after = _score(learner, expert, held_out)
    if not math.isfinite(after.divergence):
        raise Diverged(settings.learning_rate, settings.steps)
    learner.config.use_cache = use_cache  # Trainer has set it
    learner.to("cpu", dtype).eval()
    return before, after


class _DistillationTrainer(Trainer):
    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Dataset,
        settings: DistillationSettings,
        folder: Path,
    ) -> None:
        arguments = training_arguments(
            folder,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 10),
            weight_decay=0.0,
            logging_strategy="no",
            save_steps=math.ceil(settings.steps / 10),
            save_total_limit=1,
            seed=settings.seed,
        )
        super().__init__(model=student, args=arguments, train_dataset=batches, data_collator=single_batch)
        self.settings = settings
        self.teacher = teacher.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """`distillation_loss` of a batch; Trainer calls it."""
        model.eval()  # dropout would be noise on the way to an answer that is known
        student, teacher, labels = _logits(model, self.teacher, inputs)
        loss = distillation_loss(
            student,
            teacher,
            labels,
            weight=self.settings.distillation_weight,
            temperature=self.settings.temperature,
        )
        if not torch.isfinite(loss):
            raise Diverged(self.settings.learning_rate, self.state.global_step)
        return loss


def _logits(
    student: Any, teacher: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both models' logits where there is a label, float of shape (tokens, vocabulary), and the labels, (tokens,)."""
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "decoder_input_ids": teacher.prepare_decoder_input_ids_from_labels(batch["labels"]),
        "use_cache": False,
    }
    is_labelled = batch["labels"] != IGNORED_LABEL
    with torch.no_grad():
        theirs = teacher(**inputs).logits[is_labelled]
    return student(**inputs).logits[is_labelled], theirs, batch["labels"][is_labelled]


@torch.no_grad()
def _score(student: Any, teacher: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> RecoveryScore:
    totals, tokens = np.zeros(3), 0
    for batch in batches:
        ours, theirs, labels = _logits(student, teacher, {name: x.to(teacher.device) for name, x in batch.items()})
        losses = (
            F.kl_div(ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1), log_target=True, reduction="sum"),
            F.cross_entropy(ours, labels, reduction="sum"),
            F.cross_entropy(theirs, labels, reduction="sum"),
        )
        totals += [float(loss) for loss in losses]
        tokens += len(labels)
    return RecoveryScore(*(totals / tokens).tolist())
