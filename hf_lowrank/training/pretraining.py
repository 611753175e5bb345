"""Pretraining Chronos models, compressed or dense, from scratch or from a checkpoint, with transformers' Trainer.

The model has the ranks of a schedule, d~_i = ceil(d~_0 (1 + i)^alpha) (arXiv 2510.03358, section 5), or of a table; the data are
synthetic series, or the user's own. A run that was cut off goes on from its last checkpoint. Started by `accelerate launch`,
it runs in several processes, each with batches of its own.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..checkpoints.families import DENSE_CLASSES
from ..checkpoints.loading import public_name
from ..compression.compress import plan_compression
from ..data.groups import GroupedSeries
from ..data.tokens import WindowCollator
from ..data.windows import single_batch
from ..files import check_output, new_folder, without_folders, write_json
from .averaging import WeightAverage
from .batches import RunData, run_data
from .budgets import CALIBRATION, BudgetSteps
from .optimizers import MuonWithAdamW, muon_with_adamw
from .plan import initial_model
from .runs import earlier_run, end, working_folder
from .settings import PretrainingSettings
from .trainer import Diverged, run_trainer, training_arguments

__all__ = ["pretrain"]

RECORD_FILE = "pretraining.json"


def pretrain(
    output: str | os.PathLike,
    settings: PretrainingSettings | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> PreTrainedModel:
    """Train a Chronos model of any family, compressed or dense, on windows of series and what follows them.

    Until the run is complete its checkpoints are kept in the folder `<output>.pretraining`; one that was cut off goes on from the last
    of them when the same call is made again, to the same weights.

    Args:
        output: The folder to write. It appears when it is complete, and has, beside the checkpoint, a file `pretraining.json` with
            settings, losses by step and the last loss on held-out series.
        settings: The model, the data and the training; by default a dense Chronos-T5 of the size of `"reference-bolt"`.
        resume: Whether to go on with an unfinished run. If not, its checkpoints are removed.
        overwrite: Whether to replace `output`.
        show_progress: Whether to draw a progress bar on the standard error stream.
        callbacks: More callbacks for the Trainer.

    Returns:
        The trained model as it was saved, in evaluation mode and on the CPU. A compressed one has a record of the run in
        `config.compression["pretraining"]`.

    Raises:
        ValueError: A setting is out of range, an unfinished run has other settings, or the training diverged.
        FileExistsError: `output` exists and is not empty, and `overwrite` is false.
        OSError: A checkpoint or a file of series cannot be read.
    """
    settings = settings or PretrainingSettings()
    overwrite = (earlier_run(output, "pretraining").is_ending and resume) or overwrite
    check_output(output, overwrite=overwrite)
    model = initial_model(settings)
    _arguments(settings, Path(output), model.config)  # before the folder is made
    _check_budgets(model, settings)
    processes = PartialState().num_processes
    described = asdict(settings) | {"data": _named(settings.data)}
    record = _public(settings, described) | {"processes": processes}
    with working_folder(output, "pretraining", described | {"processes": processes}, resume=resume) as folder:
        arguments = _arguments(settings, folder, model.config)
        data = _data(settings, model.config, settings.steps * processes * arguments.gradient_accumulation_steps)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data.batches,
            eval_dataset=data.held_out if settings.evaluation_batches else None,
            data_collator=single_batch,
            optimizers=(_optimizer(model, settings, arguments) if settings.muon else None, None),
            callbacks=[_Finite(settings.learning_rate), *(callbacks or [])],
        )
        trainer.model_accepts_loss_kwargs = False  # its loss is the mean of a batch, whatever is accumulated
        budgets = _budget_steps(model, settings)
        last = [*([budgets] if budgets else []), WeightAverage(model, settings.averaged_steps)]
        run_trainer(trainer, "Pretraining", show_progress=show_progress, last=last)
        history = _history(trainer, settings)
        if settings.evaluation_batches:
            record["held_out_loss"] = history[-1]["eval_loss"]
            if budgets:
                record["held_out_loss_within"] = _losses_within(trainer, budgets)
        model = _finished(trainer, settings, record)
        if PartialState().is_main_process:
            end(output, "pretraining", overwrite=overwrite)
            with new_folder(output, overwrite=overwrite) as target:
                model.save_pretrained(target)
                write_json(target / RECORD_FILE, record | {"history": history})
    return model


def _named(data: Any) -> str:
    """What is said of the data: their name, where they have one."""
    if isinstance(data, GroupedSeries):
        return data.description
    return str(data) if isinstance(data, (str, os.PathLike)) else "the caller's series"


def _is_named(settings: PretrainingSettings) -> bool:
    """Whether the data have a name: that of a file, or "synthetic"."""
    return isinstance(settings.data, (str, os.PathLike))


# --- before the training -----------------------------------------------------------------------------------------


def _data(settings: PretrainingSettings, config: PreTrainedConfig, num_batches: int) -> RunData:
    usual_ramp = 0.15 if settings.start is None else 0.0
    return run_data(
        config,
        settings.data,
        num_batches,
        evaluation_batches=settings.evaluation_batches,
        seed=settings.seed,
        batch_tokens=settings.batch_tokens,
        ramp=usual_ramp if settings.ramp is None else settings.ramp,
        thin_out=False,  # as in earlier runs, so that held-out losses can be compared
    )


def _check_budgets(model: PreTrainedModel, settings: PretrainingSettings) -> None:
    """Raise ValueError where the model cannot be compressed to one of the budgets."""
    if settings.budgets and type(model) not in DENSE_CLASSES:
        raise ValueError(
            f"budgets are for a dense model, which is compressed later; start is a {type(model).__name__}."
        )
    for budget in settings.budgets or ():
        try:
            plan_compression(model, total_ratio=budget, multiple_of=CALIBRATION["multiple_of"])
        except ValueError as error:
            raise ValueError(f"budgets: {error}") from error


def _budget_steps(model: PreTrainedModel, settings: PretrainingSettings) -> BudgetSteps | None:
    if not settings.budgets:
        return None
    return BudgetSteps(
        model,
        settings.budgets,
        share=settings.budget_share,
        start=settings.budget_start,
        renewal=settings.budget_steps,
        seed=settings.seed,
    )


def _arguments(settings: PretrainingSettings, folder: Path, config: PreTrainedConfig) -> TrainingArguments:
    defaults = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": max(1, settings.steps // 4)},
        "warmup_steps": min(300, max(1, settings.steps // 10)),
        "weight_decay": 0.01,
        "logging_steps": min(50, settings.steps),
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,
        "label_names": WindowCollator(config).label_names,
    }
    try:
        return training_arguments(folder, **(defaults | dict(settings.trainer) | settings.trainer_arguments))
    except TypeError as error:
        raise ValueError(f"trainer: {error}.") from error


def _optimizer(model: PreTrainedModel, settings: PretrainingSettings, arguments: TrainingArguments) -> MuonWithAdamW:
    return muon_with_adamw(
        model,
        lr=arguments.learning_rate,
        position_rate=settings.position_rate,
        weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
    )


class _Finite(TrainerCallback):
    """Stops a run whose loss is no number any more."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        losses = [float(value) for name, value in (logs or {}).items() if name in ("loss", "eval_loss")]
        if not all(map(math.isfinite, losses)):
            raise Diverged(self.learning_rate, state.global_step)


# --- after it ----------------------------------------------------------------------------------------------------


def _history(trainer: Trainer, settings: PretrainingSettings) -> list[dict[str, Any]]:
    """The losses by step; the last one on held-out batches is that of the model as it is saved."""
    history = [
        {name: entry[name] for name in ("step", "loss", "eval_loss") if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    if settings.averaged_steps:  # the last step's loss is that of its weights alone
        history = [entry for entry in history if "loss" in entry or entry["step"] < settings.steps]
    if settings.evaluation_batches and not ("eval_loss" in history[-1] and history[-1]["step"] == settings.steps):
        history.append({"step": settings.steps, "eval_loss": trainer.evaluate()["eval_loss"]})
    return history


def _losses_within(trainer: Trainer, budgets: BudgetSteps) -> dict[str, float]:
    """The loss on held-out batches within each budget, of the model as it is saved."""
    budgets.renew(trainer.state.global_step)
    losses = {}
    for budget in budgets.budgets:
        with budgets.within(budget):
            losses[str(budget)] = trainer.evaluate()["eval_loss"]
    return losses


def _public(settings: PretrainingSettings, described: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, without the folders of this machine; said before the training, when all of them are there."""
    public = {name: value for name, value in described.items() if value not in (None, {})}
    if not settings.budgets:
        public = {name: value for name, value in public.items() if not name.startswith("budget_")}
    if settings.trainer:
        public["trainer"] = without_folders(dict(settings.trainer))
    if settings.start is not None:
        public["start"] = public_name(settings.start)
    if _is_named(settings):
        public["data"] = Path(settings.data).name
    return public


def _finished(trainer: Trainer, settings: PretrainingSettings, record: dict[str, Any]) -> PreTrainedModel:
    """The trained model as it is saved; a compressed one holds the record of its run."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # Trainer has set it
    model = model.to("cpu", getattr(torch, settings.dtype)).eval()
    if hasattr(model.config, "compression"):
        model.config.compression = (model.config.compression or {}) | {"pretraining": record}
    return model
