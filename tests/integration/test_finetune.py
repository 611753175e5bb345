"""Compressed models in transformers' Trainer: they learn, resume exactly, keep the best; LoRA; and the ranks that the callback logs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chronos import BaseChronosPipeline
from chronos_models import BOLT_RANKS, bolt, chronos2
from conftest import randomise
from transformers import EarlyStoppingCallback, PreTrainedModel, T5Config, Trainer, TrainerCallback, TrainingArguments

import hf_lowrank
from hf_lowrank import LowRankT5ForConditionalGeneration, RankCallback
from hf_lowrank.analysis.attention_layers import find_attention
from hf_lowrank.analysis.rank_callback import measure_ranks
from hf_lowrank.data.tokens import WindowCollator
from hf_lowrank.data.windows import SeriesWindows, held_out_ends

SERIES = [5 + np.sin(np.arange(60) / 2), 3 + np.cos(np.arange(45) / 3) + np.arange(45) / 9, np.full(30, 2.0)]
PARTS = ("query", "key", "value", "output", "qk", "vo")


@pytest.fixture(params=["t5", "bolt"])
def model(request, tiny_config, tiny_chronos_config, mixed_ranks) -> PreTrainedModel:
    """A low-rank Chronos-T5 or Chronos-Bolt with every form of layer: per head, latent with and without sketches, thin factors."""
    if request.param == "bolt":
        return bolt(**BOLT_RANKS)
    config = tiny_config(**mixed_ranks, chronos_config=vars(tiny_chronos_config).copy())
    return randomise(LowRankT5ForConditionalGeneration(config))


@pytest.fixture
def t5(tiny_config, tiny_chronos_config, mixed_ranks) -> PreTrainedModel:
    config = tiny_config(**mixed_ranks, chronos_config=vars(tiny_chronos_config).copy())
    return randomise(LowRankT5ForConditionalGeneration(config))


def trainer_of(model: Any, folder: Path, *, num_windows: int = 100, **changes: Any) -> Trainer:
    """As examples/finetune_with_trainer.py has it, on three short series."""
    collator = WindowCollator(model.config)
    lengths = 40, 6
    pasts, *ends = held_out_ends(SERIES, *lengths)
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "label_names": collator.label_names,
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments | changes),
        train_dataset=SeriesWindows(*lengths, pasts, num_windows, seed=1, max_windows=1, min_length=20),
        eval_dataset=[{"contexts": [context], "targets": [target]} for context, target in zip(*ends)],
        data_collator=collator,
    )


def logged(trainer: Trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def one_batch(model: Any) -> dict[str, torch.Tensor]:
    windows = SeriesWindows(40, 6, SERIES, 1, seed=2, max_windows=5, min_length=20)
    return WindowCollator(model.config)([windows[0]])


# Trainer


def test_the_loss_falls_on_a_batch_that_is_seen_again_and_again(model, tmp_path):
    quick = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
    trainer = trainer_of(model, tmp_path, num_windows=4, max_steps=40, learning_rate=1e-2, **quick)
    trainer.train()
    losses = logged(trainer, "loss")
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_a_run_that_is_resumed_ends_in_the_same_weights_and_the_same_table(model, tmp_path):
    start = copy.deepcopy(model.state_dict())
    whole = trainer_of(model, tmp_path / "run")
    uncut = RankCallback(whole, every=2, path=tmp_path / "ranks.json")
    whole.add_callback(uncut)
    whole.train()
    wanted = copy.deepcopy(model.state_dict())
    assert [row["step"] for row in uncut.history] == [0, 2, 4]
    assert json.loads((tmp_path / "ranks.json").read_text()) == uncut.history

    model.load_state_dict(start)
    resumed = trainer_of(model, tmp_path / "again")
    callback = RankCallback(resumed, every=2)
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(model.state_dict(), wanted, rtol=0, atol=0)
    assert callback.history == uncut.history
    assert not all(torch.equal(start[name], wanted[name]) for name in start)


def test_the_best_weights_are_kept_and_training_stops(model, tmp_path):
    # The learning rate is so high that the loss rises sooner or later.
    changes = {"max_steps": 40, "learning_rate": 0.2, "load_best_model_at_end": True, "save_only_model": True}
    trainer = trainer_of(model, tmp_path, **changes)
    trainer.add_callback(EarlyStoppingCallback(1))
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert len(losses) < 20  # of forty steps
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_bfloat16_is_close_and_the_weights_stay_in_float32(model, tmp_path):
    losses = []
    for bf16 in (False, True):
        learner = copy.deepcopy(model)  # a model keeps the precision of its first Trainer
        trainer = trainer_of(learner, tmp_path, bf16=bf16, save_strategy="no")
        trainer.train()
        losses.append(logged(trainer, "eval_loss")[-1])
        assert {weight.dtype for weight in learner.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(model):
    calls = []
    model.encoder.block[0].layer[0].register_forward_hook(lambda *_: calls.append(1))
    model.train()
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        calls.clear()
        loss = model(**one_batch(model)).loss
        loss.backward()
        assert len(calls) == 1 + enable  # once more on the way back
        found.append((loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_accumulated_batches_count_as_one(model, tmp_path):
    # Trainer takes T5's loss for one that is a mean over all of them, and would add up what should be averaged.
    start, norms, losses = copy.deepcopy(model.state_dict()), [], []
    for size, accumulated in ((4, 1), (2, 2)):
        model.load_state_dict(start)
        trainer = trainer_of(
            model,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
        )
        trainer.train()
        norms.append(logged(trainer, "grad_norm")[0])
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_predictions_have_one_row_a_window(model, tmp_path):
    trainer = trainer_of(model, tmp_path)
    found = trainer.predict(trainer.eval_dataset)
    assert np.isfinite(found.metrics["test_loss"])
    first = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    assert first.shape[0] == len(SERIES)
    assert found.label_ids.shape[0] == len(SERIES)


def test_what_the_trainer_saves_is_a_checkpoint_that_forecasts(model, tmp_path):
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path / "run" / "checkpoint-4")
    torch.testing.assert_close(pipeline.inner_model.state_dict(), model.state_dict(), rtol=0, atol=0)
    quantiles, _ = pipeline.predict_quantiles(torch.tensor(SERIES[0], dtype=torch.float32), 5)
    assert torch.isfinite(quantiles).all()


def test_the_collator_is_for_every_family_and_no_other_model():
    model = chronos2()
    collator = WindowCollator(model.config)
    batch = collator([{"contexts": [np.arange(20.0), np.arange(9.0)], "targets": [np.arange(3.0), np.arange(5.0)]}])
    assert batch["context"].shape == (2, 20)
    assert batch[collator.label_names[0]].shape == (2, 5)
    assert model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="config must be that of a Chronos model, found a T5Config"):
        WindowCollator(T5Config())


# LoRA


def test_lora_trains_adapters_alone_and_merges_to_the_same_outputs(model, tmp_path):
    peft = pytest.importorskip("peft")
    dense_layers = [
        name for name, part in model.named_modules() if type(part) is torch.nn.Linear and ".block." in name
    ]
    assert any("latent" in name for name in dense_layers)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=dense_layers))
    trainer = trainer_of(adapted, tmp_path / "run", learning_rate=3e-2, load_best_model_at_end=True)
    callback = RankCallback(trainer, every=2, epsilon=1e-3)
    trainer.add_callback(callback)
    trainer.train()
    files = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files

    adapted.eval()
    batch, name = one_batch(adapted), "quantile_preds" if "target" in one_batch(adapted) else "logits"
    with torch.no_grad():
        unmerged = adapted(**batch)[name]
        ranks = measure_ranks(adapted, parts=PARTS)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch)[name], unmerged, rtol=1e-3, atol=1e-4)
    assert measure_ranks(merged, parts=PARTS) == ranks  # adapters count before they are merged
    assert type(merged) is type(model)
    changed = {name for name, weight in merged.named_parameters() if not torch.equal(weight, before[name])}
    adapted_weights = {f"{name}.weight" for name in dense_layers}
    # The one token of a Chronos-Bolt's decoder has nowhere else to look: queries and keys get no gradient.
    assert {name for name in adapted_weights if "decoder" not in name} <= changed <= adapted_weights

    merged.save_pretrained(tmp_path / "merged")
    loaded = BaseChronosPipeline.from_pretrained(tmp_path / "merged").inner_model
    torch.testing.assert_close(loaded.state_dict(), merged.state_dict(), rtol=0, atol=0)


# The callback


def by_svd(matrix: np.ndarray, epsilon: float) -> int:
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values >= epsilon * values[0]).sum())


@pytest.mark.parametrize("epsilon", [0.03, 0.2])
def test_the_ranks_are_those_of_numpys_svd(model, epsilon):
    found = measure_ranks(model, epsilon=epsilon, parts=PARTS)
    means: dict[str, list[float]] = {part: [] for part in PARTS}
    for layer in find_attention(model):
        module = layer.module
        heads = module.n_heads
        q, k, v, o = (
            getattr(module, name).weight.detach().double().numpy()
            for name in (("q", "latent", "latent", "o") if hasattr(module, "latent") else ("q", "k", "v", "o"))
        )
        if isinstance(getattr(module, "query_sketch", None), torch.nn.Linear):
            q = q @ module.query_sketch.weight.detach().double().numpy()
        if isinstance(getattr(module, "output_sketch", None), torch.nn.Linear):
            o = module.output_sketch.weight.detach().double().numpy() @ o
        by_head = {"q": np.split(q, heads), "o": np.split(o, heads, axis=1)}
        shared = hasattr(module, "latent")
        by_head |= {name: [w] * heads if shared else np.split(w, heads) for name, w in (("k", k), ("v", v))}
        wanted = {part: by_svd(weight, epsilon) for part, weight in zip(PARTS, (q, k, v, o))}
        wanted["qk"] = np.mean([by_svd(a.T @ b, epsilon) for a, b in zip(by_head["q"], by_head["k"])])
        wanted["vo"] = np.mean([by_svd(a @ b, epsilon) for a, b in zip(by_head["o"], by_head["v"])])
        for part in PARTS:
            assert found[f"{layer.name}.{part}"] == wanted[part], f"{layer.name}.{part}"
            means[part].append(wanted[part])
    for part in PARTS:
        assert found[f"mean.{part}"] == pytest.approx(np.mean(means[part]))
    assert len(found) == len(PARTS) * (1 + len(means["qk"]))


class Listener(TrainerCallback):
    """What any logger sees."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append({"step": state.global_step, **logs})


def test_every_logger_gets_the_ranks_and_still_the_loss(t5, tmp_path):
    trainer, listener = trainer_of(t5, tmp_path, max_steps=5, save_strategy="no"), Listener()
    trainer.callback_handler.callbacks.insert(0, listener)  # before the one that logs
    callback = RankCallback(trainer, every=2)
    trainer.add_callback(callback)
    trainer.train()
    assert [row["step"] for row in listener.seen if "rank/mean.vo" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in listener.seen if "loss" in row] == [2, 4]
    assert [row["step"] for row in callback.history] == [0, 2, 4, 5]
    ranks = {f"rank/{name}": rank for name, rank in measure_ranks(t5).items()}
    assert ranks.items() <= callback.history[-1].items()


def test_the_callback_sees_a_rank_fall(t5, tmp_path):
    trainer = trainer_of(t5, tmp_path, save_strategy="no")
    callback = RankCallback(trainer, every=2)
    trainer.add_callback(callback)
    layer = t5.encoder.block[0].layer[0].SelfAttention

    class Flatten(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                layer.q.weight.view(2, -1, 16)[:, 1:] *= 1e-6

    trainer.add_callback(Flatten())
    trainer.args.learning_rate = 1e-9
    trainer.train()
    assert [row["rank/encoder_self.0.qk"] for row in callback.history] == [3, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be an integer of at least 1, found 0"),
        ({"epsilon": 1.0}, r"epsilon must be in \(0, 1\), found 1.0"),
        ({"parts": ("qk", "ff")}, "parts must be among query, .*, found ff"),
    ],
)
def test_wrong_arguments_are_named_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        RankCallback(None, **arguments)


def test_the_package_has_the_callback_and_no_other_name():
    assert hf_lowrank.RankCallback is RankCallback
    with pytest.raises(AttributeError, match="RankCallBack"):
        _ = hf_lowrank.RankCallBack
