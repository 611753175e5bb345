"""What every training here asks of transformers' Trainer: batches as the dataset makes them, quiet, resumed from its folder."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from rich.progress import Progress, TextColumn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..checkpoints.devices import has_fast_bfloat16
from ..interrupts import Interrupted, Postpone, held_back, postponed
from ..progress import progress_display
from .runs import Hopeless, last_checkpoint

__all__ = ["WHOLE_BATCHES", "Diverged", "run_trainer", "training_arguments"]

# What a dataset needs whose items are whole batches, in an order of its own: contexts grow in it.
WHOLE_BATCHES: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "train_sampling_strategy": "sequential",
    "remove_unused_columns": False,
}


class Diverged(Hopeless):
    """The loss is no number any more."""

    def __init__(self, learning_rate: float, step: int) -> None:
        super().__init__(f"learning_rate={learning_rate} made the training diverge by step {step}; give a lower one.")


def training_arguments(folder: Path, /, **arguments: Any) -> TrainingArguments:
    """The arguments of a Trainer that keeps its checkpoints in `folder`; `arguments` go before the defaults.

    With `bf16=None` products are in bfloat16 where the machine is faster with it.

    Raises:
        TypeError: Trainer has no such argument.
    """
    defaults = WHOLE_BATCHES | {
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }
    if arguments.get("bf16", False) is None:
        arguments["bf16"] = has_fast_bfloat16()
    complete = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    complete._n_gpu = min(1, complete.n_gpu)  # one batch cannot be spread over several
    return complete


class _StopOnSignal(TrainerCallback):
    """Ends the training after the step in which a signal came to one of the processes, with a checkpoint."""

    has_stopped = False

    def __init__(self, signals: Postpone, release: Callable[[], None], accelerator: Accelerator) -> None:
        self.signals = signals
        self.release = release
        self.accelerator = accelerator

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()  # the workers are there

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_come():
            self.has_stopped = control.should_save = control.should_training_stop = True

    def _has_come(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.signals.received is not None
        if self.signals.received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()  # all must stop at one step


class _ProgressCallback(TrainerCallback):
    def __init__(self, progress: Progress, title: str, steps: int) -> None:
        self.progress = progress
        self.title = title
        self.task = progress.add_task(title, total=steps, loss="")

    def tell_of_signal(self) -> None:
        self.progress.update(self.task, description=f"{self.title}, and stopping after this step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.3f}")


@contextmanager
def _progress_bar(title: str, steps: int, *, show: bool) -> Iterator[_ProgressCallback]:
    """A callback for a Trainer that draws a progress bar on the standard error stream."""
    with progress_display(TextColumn("{task.fields[loss]}"), show=show) as progress:
        yield _ProgressCallback(progress, title, steps)


def run_trainer(trainer: Trainer, title: str, *, show_progress: bool, last: Sequence[TrainerCallback] = ()) -> None:
    """Train to the end, from the last whole checkpoint in the Trainer's folder where there is one.

    The callbacks in `last` hear of a step after all that may ask for a checkpoint. The progress bar, of the main process, is on the standard
    error stream; nothing goes to the standard output.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the step was finished and saved. A second signal raises it at once.
    """
    trainer.remove_callback(PrinterCallback)
    show = show_progress and PartialState().is_main_process
    with (
        _progress_bar(title, trainer.args.max_steps, show=show) as bar,
        postponed(bar.tell_of_signal) as signals,
        held_back() as release,
    ):
        stop = _StopOnSignal(signals, release, trainer.accelerator)
        trainer.add_callback(stop)
        trainer.add_callback(bar)
        for callback in last:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(trainer.args.output_dir)))
    if stop.has_stopped or signals.received is not None:
        raise Interrupted(signals.received or signal.SIGINT)
