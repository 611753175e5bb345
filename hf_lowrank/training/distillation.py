"""Short fine-tuning that gives a compressed model back what truncation took: distillation from its dense teacher."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from chronos import ChronosConfig
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from ..checkpoints.export import save_compressed
from ..checkpoints.families import FAMILIES, T5, family_of
from ..checkpoints.loading import checkpoint_path
from ..data.series import read_series
from ..data.tokens import IGNORED_LABEL, SeriesBatches, SyntheticBatches, tokenize_pieces
from ..data.windows import held_out_ends, single_batch
from ..files import check_output
from .runs import (
    HELD_OUT_SEED,
    Hopeless,
    check_count,
    last_checkpoint,
    progress_bar,
    public_name,
    working_folder,
)

__all__ = ["RecoveryScore", "distillation_loss", "recover"]

# Teacher and student may sample differently, and see less of the past; a token must mean the same to both.
NOT_OF_THE_TOKENIZER = {"context_length", "prediction_length", "num_samples", "temperature", "top_k", "top_p"}


@dataclass(frozen=True)
class RecoveryScore:
    """How far a student is from its teacher on held-out windows: means over the tokens of the targets, in nats."""

    divergence: float  # KL(teacher || student)
    cross_entropy: float
    teacher_cross_entropy: float


@dataclass(frozen=True)
class _Settings:
    """The numbers that the outcome of a run depends on."""

    steps: int
    learning_rate: float
    distillation_weight: float
    temperature: float
    seed: int
    batch_tokens: int

    def check(self) -> None:
        for name in ("steps", "batch_tokens"):
            check_count(name, getattr(self, name))
        for name, allowed, is_allowed in (
            ("learning_rate", "above 0", 0 < self.learning_rate < math.inf),
            ("distillation_weight", "in [0, 1]", 0 <= self.distillation_weight <= 1),
            ("temperature", "above 0", 0 < self.temperature < math.inf),
            ("seed", f"an integer in [0, {HELD_OUT_SEED})", self.seed in range(HELD_OUT_SEED)),
        ):
            if not is_allowed:
                raise ValueError(f"{name} must be {allowed}, found {getattr(self, name)!r}.")


@dataclass(frozen=True)
class _Data:
    """What a run is trained and scored on. `description` is published with the model, `digest` tells one run from another."""

    description: str | dict[str, int]
    digest: str
    batches: Dataset
    held_out: Sequence[dict[str, torch.Tensor]]


class _Diverged(Hopeless):
    def __init__(self, settings: _Settings) -> None:
        super().__init__(f"learning_rate={settings.learning_rate} made the training diverge; give a lower one.")


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


def recover(
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
    settings = _Settings(steps, learning_rate, distillation_weight, temperature, seed, batch_tokens)
    settings.check()
    check_count("evaluation_batches", evaluation_batches)
    check_output(output, overwrite=overwrite)
    names = {"student": public_name(student), "teacher": public_name(teacher)}
    learner, expert = _load(student, "student"), _load(teacher, "teacher")
    _check_same_tokens(learner, expert, names)
    chronos_config = ChronosConfig(**learner.config.chronos_config)
    if isinstance(series, str) and series == "synthetic":
        data = _synthetic_data(chronos_config, settings, evaluation_batches)
    else:
        data = _own_data(chronos_config, read_series(series), settings, evaluation_batches)
    identity = {"student": _weights_digest(learner), "teacher": _weights_digest(expert), "series": data.digest}
    with working_folder(output, "recovery", asdict(settings) | identity, resume=resume) as folder:
        before, after = _train(learner, expert, data, settings, folder, show_progress)
        record = (
            names | asdict(settings) | {"series": data.description, "before": asdict(before), "after": asdict(after)}
        )
        learner.config.compression = (getattr(learner.config, "compression", None) or {}) | {"recovery": record}
        save_compressed(learner, output, overwrite=overwrite)
    was, now = (
        (1 - distillation_weight) * score.cross_entropy + distillation_weight * score.divergence
        for score in (before, after)
    )
    if now > was:
        warnings.warn(
            f"The training made {names['student']} worse on held-out windows, from {was:.4f} to {now:.4f} nats a token: "
            "give a lower learning_rate, or more steps.",
            stacklevel=2,
        )
    return learner


# --- models ------------------------------------------------------------------------------------------------------


def _check_family(source: str, argument: str) -> None:
    """Raise ValueError where the checkpoint is of another family; what cannot be read, its loading reports."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        return
    architecture = (config.architectures or [""])[0]
    pairs = (pair for family in FAMILIES if family is not T5 for pair in family.classes.items())
    if architecture in {cls.__name__ for pair in pairs for cls in pair}:
        raise ValueError(
            f"{argument}: {source} is a {architecture}; recover is for a Chronos-T5. Fine-tune it with transformers' Trainer."
        )


def _load(model: Any, argument: str) -> PreTrainedModel:
    """A Chronos-T5 of our own, dense or low-rank, in its own dtype; `argument` names it in errors."""
    if isinstance(model, PreTrainedModel):
        loaded, missing = copy.deepcopy(model), set()
    elif isinstance(model, (str, os.PathLike)):
        _check_family(checkpoint_path(model), argument)
        try:
            loaded, info = AutoModelForSeq2SeqLM.from_pretrained(
                checkpoint_path(model), dtype="auto", output_loading_info=True
            )
        except Exception as error:  # the formats of weights have no error in common
            raise OSError(
                f"{argument}: {model} is no checkpoint of a Chronos-T5 that can be read ({error})."
            ) from error
        missing = info["missing_keys"]
    else:
        raise ValueError(f"{argument} must be a folder, a Hub id or a loaded model, found a {type(model).__name__}.")
    name = public_name(model)
    chronos_config = getattr(loaded.config, "chronos_config", None) or {}
    if not loaded.can_generate() or family_of(type(loaded)) is not T5 or "tokenizer_class" not in chronos_config:
        raise ValueError(
            f"{argument}: {name} is a {type(loaded).__name__} without the tokenizer of a Chronos-T5; "
            "it must be a Chronos-T5, dense or compressed."
        )
    if missing:
        raise ValueError(
            f"{argument}: {name} lacks the weights {', '.join(sorted(missing)[:5])} ({len(missing)} in all)."
        )
    return loaded.requires_grad_(True)


def _check_same_tokens(student: PreTrainedModel, teacher: PreTrainedModel, names: dict[str, str]) -> None:
    ours, theirs = (
        {name: value for name, value in model.config.chronos_config.items() if name not in NOT_OF_THE_TOKENIZER}
        | {name: getattr(model.config, name) for name in ("vocab_size", "decoder_start_token_id")}
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


def _synthetic_data(chronos_config: ChronosConfig, settings: _Settings, evaluation_batches: int) -> _Data:
    batches, held_out = (
        SyntheticBatches(chronos_config, count, seed=seed, max_tokens=settings.batch_tokens)
        for count, seed in ((settings.steps, settings.seed), (evaluation_batches, HELD_OUT_SEED))
    )
    return _Data("synthetic", "synthetic", batches, list(held_out))


def _own_data(
    chronos_config: ChronosConfig, series: list[NDArray[np.float64]], settings: _Settings, evaluation_batches: int
) -> _Data:
    """The user's series up to where the held-out windows begin, and those windows."""
    pasts, contexts, targets = held_out_ends(series, chronos_config.context_length, chronos_config.prediction_length)
    count = max(1, settings.batch_tokens // (max(map(len, contexts)) + max(map(len, targets))))
    kept = np.linspace(0, len(targets) - 1, min(len(targets), count * evaluation_batches)).round().astype(int)
    held_out = [
        tokenize_pieces(chronos_config, [contexts[i] for i in rows], [targets[i] for i in rows])
        for rows in (kept[start : start + count] for start in range(0, len(kept), count))
    ]
    batches = SeriesBatches(
        chronos_config, pasts, settings.steps, seed=settings.seed, max_tokens=settings.batch_tokens
    )
    description = {
        "series": len(series),
        "values": sum(int((~np.isnan(values)).sum()) for values in series),
        "held_out_windows": len(kept),
    }
    return _Data(description, _digest([np.array([len(values) for values in series]), *series]), batches, held_out)


# --- training ----------------------------------------------------------------------------------------------------


def _train(
    learner: PreTrainedModel,
    expert: PreTrainedModel,
    data: _Data,
    settings: _Settings,
    folder: Path,
    show_progress: bool,
) -> tuple[RecoveryScore, RecoveryScore]:
    """Train `learner` in place, in float32, and leave it in its dtype and in evaluation mode; its scores before and after."""
    dtype, use_cache = learner.dtype, learner.config.use_cache
    trainer = _DistillationTrainer(learner.float().eval(), expert.float().eval(), data.batches, settings, folder)
    before = _score(learner, expert, data.held_out)
    if not math.isfinite(before.divergence):
        raise ValueError("student or teacher: the logits of one of them are not finite.")
    with progress_bar("Recovering", settings.steps, show=show_progress) as bar:
        trainer.add_callback(bar)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    learner.to(dtype).float()  # scored as it is saved
    after = _score(learner, expert, data.held_out)
    if not math.isfinite(after.divergence):
        raise _Diverged(settings)
    learner.config.use_cache = use_cache  # Trainer has set it
    learner.to("cpu", dtype).eval()
    return before, after


class _DistillationTrainer(Trainer):
    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Dataset,
        settings: _Settings,
        folder: Path,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=1,  # an item of the dataset is a whole batch
            train_sampling_strategy="sequential",
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 10),
            weight_decay=0.0,
            optim="adamw_torch_fused",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            logging_strategy="no",
            save_steps=math.ceil(settings.steps / 10),
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            seed=settings.seed,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # one batch cannot be spread over several
        super().__init__(model=student, args=arguments, train_dataset=batches, data_collator=single_batch)
        self.remove_callback(PrinterCallback)  # it writes to the standard output
        self.settings = settings
        self.teacher = teacher.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
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
            raise _Diverged(self.settings)
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
