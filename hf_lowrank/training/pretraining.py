"""Pretraining Chronos models, compressed or dense, from scratch or from a checkpoint, with transformers' Trainer.

The model has the ranks of a schedule, d~_i = ceil(d~_0 (1 + i)^alpha) (arXiv 2510.03358, section 5), or of a table; the data are
synthetic series, or the user's own. A run that was cut off goes on from its last checkpoint. Started by `accelerate launch`,
it runs in several processes, each with batches of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from chronos import ChronosConfig
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from ..checkpoints.dense import load_chronos
from ..checkpoints.families import BOLT, FAMILIES, T5, Family
from ..checkpoints.loading import checkpoint_path
from ..checkpoints.published import CHRONOS_BOLT, CHRONOS_T5, SHAPES
from ..checkpoints.summary import summarize
from ..data.series import read_series
from ..data.tokens import SyntheticBatches, tokenize_pieces
from ..data.windows import SeriesWindows, SyntheticWindows, held_out_ends, single_batch, stack_pieces
from ..files import check_output, new_folder, write_text
from ..published_figures import PRETRAINED_RATIOS
from .initialization import fresh_model
from .runs import (
    HELD_OUT_SEED,
    Hopeless,
    check_count,
    last_checkpoint,
    progress_bar,
    public_name,
    working_folder,
)

__all__ = ["Plan", "PretrainingSettings", "model_of", "plan_of", "pretrain"]

RECORD_FILE = "pretraining.json"
SMALL = {"d_model": 128, "num_heads": 4, "d_kv": 32, "num_layers": 4}  # of the shipped reference checkpoints
SIZES = ("d_model", "num_heads", "d_kv", "d_ff", "num_layers", "num_decoder_layers")
RANKS = ("base_rank", "rank_growth", "rank_rounding", "attention_ranks", "feed_forward_ranks")


@dataclass(frozen=True)
class PretrainingSettings:
    """All that a run depends on; a configuration file has the same names.

    Args:
        start: A checkpoint to go on from, dense or compressed: a folder, a Hub id, or `"reference"`. Instead of a fresh model, which
            the next lines describe.
        family: `"t5"` or `"bolt"`.
        shape: A published shape, such as `"t5-base"`; it brings all sizes.
        d_model, num_heads, d_kv, d_ff, num_layers, num_decoder_layers: The sizes otherwise, as in T5Config; by default those of the
            `"reference"` checkpoints, with d_ff = 4 d_model and as many layers in both stacks.
        context_length, prediction_length: In values.
        base_rank, rank_growth, rank_rounding, attention_ranks, feed_forward_ranks: As in [`LowRankT5Config`]. Without any of them the
            model is dense.
        data: `"synthetic"`, or whatever `read_series` takes; in a configuration file the path of a CSV or parquet file. The last
            horizon of every series is held out.
        steps: Optimizer steps.
        learning_rate: The highest: 300 steps (at most a tenth) lead up to it, the last quarter down from it.
        batch_tokens: Tokens in a process's batch, about; of a Bolt, a quarter of the values.
        ramp: The share of the steps in which the longest context grows from 24 to its full length, of synthetic series. By default
            0.6, and 0 of a model that has learned already.
        save_steps: Steps between checkpoints and evaluations.
        evaluation_batches: Batches in the held-out set, at most; 0 for none.
        workers: Processes that make batches, 0 for none.
        bf16: Whether products are computed in bfloat16.
        dtype: Of the saved weights, `"float32"` or `"bfloat16"`.
        seed: Of the initial weights and of the data.
        trainer: Further arguments of transformers' `TrainingArguments`.
    """

    start: str | None = None
    family: str | None = None
    shape: str | None = None
    d_model: int | None = None
    num_heads: int | None = None
    d_kv: int | None = None
    d_ff: int | None = None
    num_layers: int | None = None
    num_decoder_layers: int | None = None
    context_length: int | None = None
    prediction_length: int | None = None
    base_rank: float | None = None
    rank_growth: float | None = None
    rank_rounding: str | None = None
    attention_ranks: dict[str, Any] | None = None
    feed_forward_ranks: dict[str, Any] | None = None
    data: Any = "synthetic"
    steps: int = 8000
    learning_rate: float = 2e-3
    batch_tokens: int = 4096
    ramp: float | None = None
    save_steps: int = 500
    evaluation_batches: int = 32
    workers: int = 1
    bf16: bool = True
    dtype: str = "float32"
    seed: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "save_steps"):
            check_count(name, getattr(self, name))
        for name in ("evaluation_batches", "workers"):
            check_count(name, getattr(self, name), least=0)
        for name, wanted, is_allowed in (
            ("learning_rate", "above 0", 0 < self.learning_rate < math.inf),
            ("ramp", "in [0, 1]", self.ramp is None or 0 <= self.ramp <= 1),
            ("seed", f"an integer in [0, {HELD_OUT_SEED})", self.seed in range(HELD_OUT_SEED)),
            ("dtype", "'float32' or 'bfloat16'", self.dtype in ("float32", "bfloat16")),
            ("family", "'t5' or 'bolt'", self.family in (None, "t5", "bolt")),
            ("shape", f"one of {', '.join(_shapes())}", self.shape is None or self.shape in _shapes()),
        ):
            if not is_allowed:
                raise ValueError(f"{name} must be {wanted}, found {getattr(self, name)!r}.")
        described = [name for name in ("family", "shape", *SIZES, *RANKS) if getattr(self, name) is not None]
        lengths = [name for name in ("context_length", "prediction_length") if getattr(self, name) is not None]
        if self.start is not None and described + lengths:
            raise ValueError(f"start brings its own model: leave out {', '.join(described + lengths)}.")
        if self.shape is not None and (double := [name for name in ("family", *SIZES) if name in described]):
            raise ValueError(f"shape={self.shape!r} brings its own sizes: leave out {', '.join(double)}.")
        if taken := sorted(set(self.trainer) & set(_own_arguments(self))):
            raise ValueError(f"trainer: {', '.join(taken)} cannot be given here; they follow from the other settings.")

    @classmethod
    def from_file(cls, path: str | os.PathLike, **changes: Any) -> PretrainingSettings:
        """The settings in a YAML or JSON file, with those in `changes` in their place.

        Raises:
            ValueError: The file is not a table of known settings, or one of them is out of range.
            OSError: It cannot be read.
        """
        try:
            found = yaml.load(Path(path).read_text(encoding="utf-8"), _SettingsLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is neither YAML nor JSON ({error}).") from error
        if not isinstance(found, dict):
            raise ValueError(f"config: {path} must hold a table of settings, found a {type(found).__name__}.")
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(map(str, found)) - set(known)):
            raise ValueError(
                f"config: {path} has unknown settings {', '.join(unknown)}; known are {', '.join(known)}."
            )
        return cls(**(found | changes))


class _SettingsLoader(yaml.SafeLoader):
    """YAML in which 2e-3 is a number; to YAML 1.1 it is a word, for it has no point."""


_SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _shapes() -> list[str]:
    return [name for name in SHAPES if not name.startswith("chronos-2")]


# --- the model ---------------------------------------------------------------------------------------------------


def model_of(settings: PretrainingSettings) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and configuration of the model that these settings describe.

    Raises:
        ValueError: The ranks do not fit the sizes, or `start` is no Chronos-T5 or Chronos-Bolt.
        OSError: There is no checkpoint `start`.
    """
    if settings.start is not None:
        return _class_and_config(checkpoint_path(settings.start))
    name = (settings.shape or settings.family or "t5").partition("-")[0]
    family = {"t5": T5, "bolt": BOLT}[name]
    chronos_config = dict(CHRONOS_T5 if family is T5 else CHRONOS_BOLT, context_length=512)
    for length in ("context_length", "prediction_length"):
        if getattr(settings, length) is not None:
            check_count(length, getattr(settings, length))
            chronos_config[length] = getattr(settings, length)
    config = T5Config(
        **_sizes(settings),
        vocab_size=CHRONOS_T5["n_tokens"],  # a Bolt has none
        dropout_rate=0.0,  # synthetic data never repeat
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        chronos_config=chronos_config,
        chronos_pipeline_class="ChronosPipeline" if family is T5 else "ChronosBoltPipeline",
    )
    model_class = next(cls for cls in family.classes if cls.__name__ != "T5Model")
    ranks = {name: getattr(settings, name) for name in RANKS if getattr(settings, name) is not None}
    if not ranks:
        return model_class, config
    return family.classes[model_class], family.lowrank_config(config, **ranks)


def _sizes(settings: PretrainingSettings) -> dict[str, int]:
    if settings.shape is not None:
        d_model, d_ff, num_layers, num_heads = SHAPES[settings.shape]
        return {"d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": num_layers, "num_heads": num_heads}
    sizes: dict[str, int] = SMALL | {
        name: getattr(settings, name) for name in SIZES if getattr(settings, name) is not None
    }
    for name, value in sizes.items():
        check_count(name, value)
    return {"d_ff": 4 * sizes["d_model"]} | sizes


def _class_and_config(path: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    config = AutoConfig.from_pretrained(path)
    architecture = (config.architectures or [""])[0]
    for family in (T5, BOLT):
        for pair in family.classes.items():
            for cls in pair:
                if cls.__name__ == architecture and getattr(config, "chronos_config", None):
                    return cls, config
    raise ValueError(
        f"start: {path} is a {architecture or type(config).__name__}; it must be a Chronos-T5 or Chronos-Bolt."
    )


def _family(model_class: type[PreTrainedModel]) -> Family:
    return next(family for family in FAMILIES if model_class in {*family.classes, *family.classes.values()})


@dataclass(frozen=True)
class Plan:
    """What a run will train: the model's class, its size, its ranks, and what the paper reports for the same schedule."""

    model: str
    parameters: int
    attention_ranks: dict[str, list[dict[str, Any]]] | None = None
    attention_ratio: float | None = None  # of the dense model's attention parameters
    paper_ratio: float | None = None

    @property
    def text(self) -> str:
        lines = [f"{self.model}, {self.parameters:,} parameters"]
        for kind, entries in (self.attention_ranks or {}).items():
            lines.append(f"  {kind}: " + ", ".join(_rank_text(entry) for entry in entries))
        if self.attention_ratio is not None:
            paper = (
                "" if self.paper_ratio is None else f" (the paper reports {self.paper_ratio:.1%} for this schedule)"
            )
            lines.append(f"attention: {self.attention_ratio:.1%} of the dense model's{paper}")
        return "\n".join(lines)


def _rank_text(entry: Mapping[str, Any]) -> str:
    if set(entry) == {"qk", "vo"}:
        return str(entry["qk"]) if entry["qk"] == entry["vo"] else f"{entry['qk']}/{entry['vo']}"
    return f"latent {entry['latent']}"


def plan_of(settings: PretrainingSettings) -> Plan:
    """What these settings will train; see `model_of` for the errors."""
    model_class, config = model_of(settings)
    with torch.device("meta"):
        model = model_class(config)
    if not hasattr(config, "attention_ranks"):
        return Plan(model_class.__name__, model.num_parameters())
    schedule = (config.compression or {}).get("arguments") or {}
    return Plan(
        model_class.__name__,
        model.num_parameters(),
        config.attention_ranks,
        summarize(config).attention_ratio,
        PRETRAINED_RATIOS.get((schedule.get("base_rank", 0.0), schedule.get("rank_growth", 0.0))),
    )


def _initial(settings: PretrainingSettings) -> PreTrainedModel:
    """The model in float32, before the first step."""
    model_class, config = model_of(settings)
    if settings.start is None:
        return fresh_model(model_class, config, seed=settings.seed)
    if model_class in _family(model_class).classes:
        return load_chronos(settings.start)
    return model_class.from_pretrained(checkpoint_path(settings.start), dtype=torch.float32)


# --- the data ----------------------------------------------------------------------------------------------------


class _Mapped(Dataset):
    """Items of a dataset, each through a function."""

    def __init__(self, items: Dataset, function: Callable[[Any], Any]) -> None:
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


def _data(settings: PretrainingSettings, config: PreTrainedConfig, family: Family, count: int) -> tuple[Dataset, Any]:
    """`count` training batches, and the held-out ones."""
    lengths = config.chronos_config["context_length"], config.chronos_config["prediction_length"]
    # A Bolt's token is a patch of 16 values; four times the values are a quarter of the tokens.
    values, windows = (settings.batch_tokens, 64) if family is T5 else (4 * settings.batch_tokens, 128)
    if isinstance(settings.data, str) and settings.data == "synthetic":
        ramp = (0.6 if settings.start is None else 0.0) if settings.ramp is None else settings.ramp

        def synthetic(number: int, seed: int, ramp: int = 0) -> Dataset:
            if family is T5:
                return SyntheticBatches(
                    ChronosConfig(**config.chronos_config), number, seed=seed, ramp=ramp, max_tokens=values
                )
            return SyntheticWindows(*lengths, number, seed=seed, ramp=ramp, max_values=values, max_windows=windows)

        return synthetic(count, settings.seed, int(ramp * count)), synthetic(
            settings.evaluation_batches, HELD_OUT_SEED
        )

    def batch(pieces: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if family is T5:
            return tokenize_pieces(ChronosConfig(**config.chronos_config), pieces["contexts"], pieces["targets"])
        return {name: part.float() for name, part in stack_pieces(pieces["contexts"], pieces["targets"]).items()}

    pasts, contexts, targets = held_out_ends(read_series(settings.data), *lengths)
    supply = SeriesWindows(*lengths, pasts, count, seed=settings.seed, max_values=values, max_windows=windows)
    each = max(1, values // (max(map(len, contexts)) + max(map(len, targets))))
    held_out = [
        batch({"contexts": contexts[i : i + each], "targets": targets[i : i + each]})
        for i in range(0, len(targets), each)
    ]
    return _Mapped(supply, batch), held_out[: settings.evaluation_batches]


# --- the run -----------------------------------------------------------------------------------------------------


def _own_arguments(settings: PretrainingSettings) -> dict[str, Any]:
    """The arguments of Trainer that follow from the settings."""
    has_evaluation = settings.evaluation_batches > 0
    return {
        "max_steps": settings.steps,
        "per_device_train_batch_size": 1,  # an item of the dataset is a whole batch
        "per_device_eval_batch_size": 1,
        "train_sampling_strategy": "sequential",  # contexts grow in the dataset's own order
        "learning_rate": settings.learning_rate,
        "bf16": settings.bf16,
        "dataloader_num_workers": settings.workers,
        "remove_unused_columns": False,
        "eval_strategy": "steps" if has_evaluation else "no",
        "eval_steps": settings.save_steps if has_evaluation else None,
        "prediction_loss_only": True,
        "save_steps": settings.save_steps,
        "seed": settings.seed,
    }


def _training_arguments(settings: PretrainingSettings, folder: Path, family: Family) -> TrainingArguments:
    defaults = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": max(1, settings.steps // 4)},
        "warmup_steps": min(300, max(1, settings.steps // 10)),
        "weight_decay": 0.01,
        "optim": "adamw_torch_fused",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": min(50, settings.steps),
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "label_names": ["labels"] if family is T5 else ["target"],
    }
    try:
        arguments = TrainingArguments(
            output_dir=str(folder), **(defaults | dict(settings.trainer)), **_own_arguments(settings)
        )
    except TypeError as error:
        raise ValueError(f"trainer: {error}.") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # one batch cannot be spread over several
    return arguments


class _Finite(TrainerCallback):
    """Stops a run whose loss is no number any more."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        losses = [float(value) for name, value in (logs or {}).items() if name in ("loss", "eval_loss")]
        if not all(map(math.isfinite, losses)):
            raise Hopeless(
                f"learning_rate={self.learning_rate} made the training diverge by step {state.global_step}; give a lower one."
            )


def pretrain(
    output: str | os.PathLike,
    settings: PretrainingSettings | None = None,
    *,
    resume: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> PreTrainedModel:
    """Train a Chronos-T5 or Chronos-Bolt, compressed or dense, on teacher-forced windows of series.

    Until the run is complete its checkpoints are kept in the folder `<output>.pretraining`; one that was cut off goes on from the last
    of them when the same call is made again, to the same weights.

    Args:
        output: The folder to write. It appears when it is complete, and has, beside the checkpoint, a file `pretraining.json` with
            settings, losses by step and the last loss on held-out series.
        settings: The model, the data and the training; by default the dense `"reference"` checkpoint's.
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
    check_output(output, overwrite=overwrite)
    model = _initial(settings)
    family = _family(type(model))
    is_named = isinstance(settings.data, (str, os.PathLike))
    described = asdict(settings) | {"data": str(settings.data) if is_named else "the caller's series"}
    _training_arguments(settings, Path(output), family)  # before the folder is made; it also finds the other processes
    processes = PartialState().num_processes
    with working_folder(output, "pretraining", described | {"processes": processes}, resume=resume) as folder:
        arguments = _training_arguments(settings, folder, family)
        count = settings.steps * processes * arguments.gradient_accumulation_steps
        batches, held_out = _data(settings, model.config, family, count)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=batches,
            eval_dataset=held_out if settings.evaluation_batches else None,
            data_collator=single_batch,
            callbacks=[_Finite(settings.learning_rate), *(callbacks or [])],
        )
        trainer.model_accepts_loss_kwargs = False  # its loss is the mean of a batch, whatever is accumulated
        trainer.remove_callback(PrinterCallback)  # it writes to the standard output
        with progress_bar("Pretraining", settings.steps, show=show_progress and PartialState().is_main_process) as bar:
            trainer.add_callback(bar)
            trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        history = [
            {name: entry[name] for name in ("step", "loss", "eval_loss") if name in entry}
            for entry in trainer.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ]
        if settings.evaluation_batches and not ("eval_loss" in history[-1] and history[-1]["step"] == settings.steps):
            history.append({"step": settings.steps, "eval_loss": trainer.evaluate()["eval_loss"]})
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.config.use_cache = True  # Trainer has set it
        model = model.to("cpu", getattr(torch, settings.dtype)).eval()
        given = {name: value for name, value in described.items() if value not in (None, {})}
        if settings.start is not None:
            given["start"] = public_name(settings.start)
        if is_named:
            given["data"] = Path(settings.data).name
        record = given | {"processes": processes}
        if settings.evaluation_batches:
            record["held_out_loss"] = history[-1]["eval_loss"]
        if hasattr(model.config, "compression"):
            model.config.compression = (model.config.compression or {}) | {"pretraining": record}
        if PartialState().is_main_process:
            with new_folder(output, overwrite=overwrite) as target:
                model.save_pretrained(target)
                write_text(target / RECORD_FILE, json.dumps(record | {"history": history}, indent=2))
    return model
