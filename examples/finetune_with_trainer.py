"""Fine-tune a compressed Chronos-T5 or Chronos-Bolt on your own series with transformers' Trainer.

    hf-lowrank compress reference small --ratio 0.15
    python examples/finetune_with_trainer.py small tuned --data sales.csv --horizon 28
    accelerate launch --multi_gpu --num_processes 2 examples/finetune_with_trainer.py small tuned --data sales.csv

Your file is a CSV or parquet file in long format: item_id, timestamp, target. The end of every series, one horizon, is held out: the
loss there is reported during the training, and decides which weights are the best. OUTPUT becomes a compressed checkpoint like the
one that you gave, with those weights; in it are also the Trainer's checkpoints and, in ranks.json, the ranks of the attention at
every evaluation. (--multi_gpu means several processes; without a GPU they run on the CPU.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_lowrank import (
    RankCallback,
    SeriesWindows,
    WindowCollator,
    find_tasks,
    held_out_ends,
    load_pipeline,
    read_series,
)


def load_series(data: str) -> tuple[list, int | None]:
    """The series, and how far to forecast if the data say so. Of a task, what `hf-lowrank evaluate` scores is cut off."""
    if data.endswith((".csv", ".parquet")):
        return read_series(data), None
    tasks = find_tasks([data])
    if len(tasks) != 1 or not hasattr(tasks[0].source, "read"):
        raise typer.BadParameter(f"--data must be a .csv or .parquet file or one packaged task, found {data!r}.")
    (task,) = tasks
    series = task.source.read(3 * task.held_out).values()
    return [values.to_numpy()[: -task.held_out] for values in series], task.horizon


def main(
    model: Annotated[str, typer.Argument(help="A compressed Chronos-T5 or Chronos-Bolt: a folder or a Hub id.")],
    output: Path,
    data: Annotated[
        str, typer.Option(help="Your file, or a packaged task of `hf-lowrank evaluate --list`.")
    ] = "tourism",
    horizon: Annotated[int | None, typer.Option(help="Steps to forecast; by default the task's, the model's.")] = None,
    steps: int = 300,
    batch_size: Annotated[int, typer.Option(help="Windows a step and process.")] = 16,
    learning_rate: float = 2e-4,
    eval_steps: Annotated[int, typer.Option(help="Steps between evaluations, saves and measurements of ranks.")] = 50,
    patience: Annotated[int, typer.Option(help="Evaluations without progress before the training stops.")] = 3,
    lora: Annotated[
        int, typer.Option(help="Train adapters of this rank on the factorized layers; 0: all weights.")
    ] = 0,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16; weights stay in float32.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Save memory, take longer.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUTPUT.")] = False,
    seed: int = 0,
) -> None:
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise FileExistsError(f"OUTPUT: {output} is a folder that is not empty; give a new folder, or --resume.")
    set_seed(seed)
    network = load_pipeline(model, device=None, dtype="auto").inner_model
    dtype, use_cache, settings = network.dtype, network.config.use_cache, network.config.chronos_config
    network.float()
    if gradient_checkpointing:
        network.gradient_checkpointing_enable()
    if lora:
        from peft import LoraConfig, get_peft_model

        layers = [
            name for name, part in network.named_modules() if ".block." in name and type(part) is torch.nn.Linear
        ]
        network = get_peft_model(network, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=layers))

    series, usual = load_series(data)
    lengths = settings["context_length"], min(horizon or usual or 10**9, settings["prediction_length"])
    collator = WindowCollator(network.config)
    enough = {"min_observed": collator.min_observed}  # for one window of a single value outweighs all others
    pasts, *ends = held_out_ends(series, *lengths, **enough)
    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.0,
        bf16=bf16,
        eval_strategy="steps",
        eval_steps=eval_steps,
        eval_on_start=True,
        save_steps=eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        logging_steps=eval_steps,
        label_names=collator.label_names,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        seed=seed,
    )
    num_windows = steps * arguments.train_batch_size * arguments.world_size
    trainer = Trainer(
        model=network,
        args=arguments,
        # An item is one window, drawn at random: none comes twice.
        train_dataset=SeriesWindows(*lengths, pasts, num_windows, seed=seed, max_windows=1, **enough),
        eval_dataset=[{"contexts": [context], "targets": [target]} for context, target in zip(*ends)],
        data_collator=collator,
        callbacks=[EarlyStoppingCallback(patience)],
    )
    trainer.add_callback(RankCallback(trainer, every=eval_steps, path=output / "ranks.json"))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output / "checkpoints") if resume else None)
    if trainer.is_world_process_zero():
        network = network.merge_and_unload() if lora else network
        network.config.use_cache = use_cache  # Trainer has set it
        network.to(dtype).save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
