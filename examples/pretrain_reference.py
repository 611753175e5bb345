"""Train the reference checkpoints: a small Chronos-T5 and a small Chronos-Bolt, on synthetic series alone.

    python examples/pretrain_reference.py train runs/reference
    python examples/pretrain_reference.py train runs/bolt --family bolt --steps 10000
    python examples/pretrain_reference.py measure runs/reference/final

A run that was cut off goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from chronos import ChronosConfig
from chronos.chronos_bolt import ChronosBoltConfig, ChronosBoltModelForForecasting
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.trainer_utils import get_last_checkpoint

from hf_lowrank.checkpoint import load_chronos
from hf_lowrank.objective import objective_of
from hf_lowrank.training import SyntheticBatches, SyntheticWindows, single_batch

app = typer.Typer(add_completion=False, help=__doc__)

# The published Chronos-T5 settings of tokenizer and sampling.
CHRONOS_CONFIG = ChronosConfig(
    tokenizer_class="MeanScaleUniformBins",
    tokenizer_kwargs={"low_limit": -15.0, "high_limit": 15.0},
    context_length=512,
    prediction_length=64,
    n_tokens=4096,
    n_special_tokens=2,
    pad_token_id=0,
    eos_token_id=1,
    use_eos_token=True,
    model_type="seq2seq",
    num_samples=20,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
)
# The published Chronos-Bolt settings but for the context, which is 2048 there.
BOLT_CONFIG = ChronosBoltConfig(
    context_length=512,
    prediction_length=64,
    input_patch_size=16,
    input_patch_stride=16,
    quantiles=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    use_reg_token=True,
)
HELD_OUT_SEED = 1_000_003  # never a training seed


def smooth_embedding(d_model: int, seed: int) -> torch.Tensor:
    """Initial token embeddings, float32 of shape (n_tokens, d_model): nearby bins start out alike.

    Random Fourier features of the bin's centre with frequencies from one cycle over the whole range to one over
    a few bins. The order of 4,096 bins is known; a short training run should not have to find it out.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = CHRONOS_CONFIG.create_tokenizer()
    frequency = torch.exp(torch.empty(d_model).uniform_(math.log(0.2), math.log(200.0), generator=generator))
    phase = torch.empty(d_model).uniform_(0, 2 * math.pi, generator=generator)
    embedding = torch.randn(CHRONOS_CONFIG.n_tokens, d_model, generator=generator)
    first_bin = CHRONOS_CONFIG.n_special_tokens + 1  # tokenizer.output_transform's own offset
    smooth = math.sqrt(2) * torch.cos(tokenizer.centers[:, None] * frequency + phase)
    embedding[first_bin : first_bin + len(smooth)] = smooth
    return embedding


def local_position_bias(attention: T5Attention) -> torch.Tensor:
    """An initial relative position bias, float32 of shape (buckets, heads), with which heads begin to look somewhere.

    In turns: the step before, the step after (in the decoder, the step itself), the near past and future, everywhere. Left at T5's
    near-zero start, the bias moves by a learning rate a step, and a short run never learns to read the last value of a context.
    """
    buckets, heads = attention.relative_attention_bias.weight.shape
    distance = torch.arange(-128, 1 if attention.is_decoder else 129)
    bucket = attention._relative_position_bucket(
        distance, bidirectional=not attention.is_decoder, num_buckets=buckets, max_distance=128
    )
    centre = torch.stack([distance[bucket == i].float().mean().nan_to_num(-999.0) for i in range(buckets)])
    ahead = 0 if attention.is_decoder else 1
    shapes = [4.0 * (centre == -1), 4.0 * (centre == ahead), 3.0 - 0.5 * centre.abs().clamp(max=12), 0.0 * centre]
    return torch.stack([shapes[head % len(shapes)] for head in range(heads)], dim=1)


def t5_config(d_model: int, num_heads: int, d_kv: int, num_layers: int, **more: Any) -> T5Config:
    return T5Config(
        d_model=d_model,
        d_kv=d_kv,
        d_ff=4 * d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        dropout_rate=0.0,  # the data never repeats
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=1.0,
        **more,
    )


def build_t5(seed: int, **shape: int) -> T5ForConditionalGeneration:
    """A fresh Chronos-T5."""
    set_seed(seed)
    config = t5_config(**shape, vocab_size=CHRONOS_CONFIG.n_tokens, chronos_config=asdict(CHRONOS_CONFIG))
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.shared.weight.copy_(smooth_embedding(config.d_model, seed))
        for stack in (model.encoder, model.decoder):
            attention = stack.block[0].layer[0].SelfAttention
            attention.relative_attention_bias.weight.copy_(local_position_bias(attention))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    )
    return model


def build_bolt(seed: int, **shape: int) -> ChronosBoltModelForForecasting:
    """A fresh Chronos-Bolt."""
    set_seed(seed)
    settings = {"chronos_config": asdict(BOLT_CONFIG), "chronos_pipeline_class": "ChronosBoltPipeline"}
    model = ChronosBoltModelForForecasting(t5_config(**shape, **settings))
    attention = model.encoder.block[0].layer[0].SelfAttention  # the decoder has one token and nowhere to look
    with torch.no_grad():
        attention.relative_attention_bias.weight.copy_(local_position_bias(attention))
    return model


def supply(family: str, steps: int, *, max_tokens: int, ramp: int, seed: int) -> Dataset:
    """Training batches, whose contexts and horizons grow over the first `ramp` of them."""
    if family == "bolt":  # 16 values a patch: four times the values are a quarter of the tokens
        lengths = BOLT_CONFIG.context_length, BOLT_CONFIG.prediction_length
        return SyntheticWindows(*lengths, steps, seed=seed, ramp=ramp, max_values=4 * max_tokens, max_windows=128)
    return SyntheticBatches(CHRONOS_CONFIG, steps, seed=seed, ramp=ramp, max_tokens=max_tokens)


@app.command()
def train(
    output: Path,
    family: Annotated[Literal["t5", "bolt"], typer.Option(help="Chronos-T5 or Chronos-Bolt.")] = "t5",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 8000,
    learning_rate: float = 2e-3,
    d_model: int = 128,
    num_heads: int = 4,
    d_kv: int = 32,
    num_layers: int = 4,
    max_tokens: int = 4096,
    workers: int = 1,
    save_steps: int = 500,
    seed: int = 0,
) -> None:
    """Train from scratch, or go on from the last checkpoint in OUTPUT."""
    build = {"t5": build_t5, "bolt": build_bolt}[family]
    model: PreTrainedModel = build(seed, d_model=d_model, num_heads=num_heads, d_kv=d_kv, num_layers=num_layers)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        train_sampling_strategy="sequential",  # contexts grow in the dataset's own order
        learning_rate=learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(1, steps // 4)},
        warmup_steps=min(300, max(1, steps // 10)),
        weight_decay=0.01,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        logging_steps=50,
        save_steps=save_steps,
        save_total_limit=2,
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=supply(family, steps, max_tokens=max_tokens, ramp=int(0.6 * steps), seed=seed),
        data_collator=single_batch,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
    trainer.model.to(torch.bfloat16).save_pretrained(output / "final")


@contextmanager
def silenced(model: PreTrainedModel, pattern: str) -> Iterator[None]:
    """The model with the output of all attention modules of these names ("encoder.*SelfAttention", ...) set to zero."""
    hooks = [
        module.register_forward_hook(lambda _, __, output: (torch.zeros_like(output[0]), *output[1:]))
        for name, module in model.named_modules()
        if re.fullmatch(pattern, name)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cross_entropy(model: PreTrainedModel, num_batches: int) -> float:
    """Of a Chronos-T5, in nats a token on held-out synthetic series."""
    batches = SyntheticBatches(CHRONOS_CONFIG, num_batches, seed=HELD_OUT_SEED)
    total, tokens = 0.0, 0
    for index in range(num_batches):
        batch = batches[index]
        count = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


def excess_loss(model: PreTrainedModel, num_batches: int) -> Callable[[], float]:
    """A function that says how much more quantile loss a changed Chronos-Bolt has now, by the forecasts it has here.

    The expected loss on each series' normalised scale, mean over levels and steps (see `hf_lowrank.objective`).
    """
    objective = objective_of(model.config, type(model))
    batches, _ = objective.batches("synthetic", num_batches, HELD_OUT_SEED)
    wanted = [objective.predict(model, batch) for batch in batches]

    def measure() -> float:
        lost = sum(objective.divergence(states, objective.predict(model, b)) for states, b in zip(wanted, batches))
        return lost / sum(len(states) for states in wanted)

    return measure


@app.command()
@torch.no_grad()
def measure(checkpoint: Path, batches: int = 64) -> None:
    """Print, as JSON, what each kind of attention is worth on held-out synthetic series.

    Of a Chronos-T5 in nats a token, of a Chronos-Bolt in quantile loss on the series' normalised scale.
    """
    model = load_chronos(checkpoint)
    kinds = {
        "encoder_self": r"encoder\..*SelfAttention",
        "decoder_self": r"decoder\..*SelfAttention",
        "cross": r"decoder\..*EncDecAttention",
    }
    found: dict[str, Any] = {}
    if isinstance(model, T5ForConditionalGeneration):
        loss: Callable[[], float] = partial(cross_entropy, model, batches)
        found["cross_entropy"] = dense = loss()
    else:
        loss, dense = excess_loss(model, batches), 0.0
    found["added_when_silenced"] = {}
    for kind, pattern in kinds.items():
        with silenced(model, pattern):
            found["added_when_silenced"][kind] = loss() - dense
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    app()
