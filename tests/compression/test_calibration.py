"""Calibration: the Gram matrices are those of the data, padding has no part in them, and what they predict is what is lost."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos_models import dense_bolt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel, T5EncoderModel, T5ForConditionalGeneration, T5Model

from hf_lowrank.checkpoints.dense import DenseCheckpoint, load_dense
from hf_lowrank.checkpoints.rank_table import LayerName
from hf_lowrank.compression.calibration import Calibration, calibrate
from hf_lowrank.compression.layers import attention_layer, feed_forward_layer

CLASSES = (T5ForConditionalGeneration, T5Model, T5EncoderModel)
Batch = dict[str, torch.Tensor]
NAN = float("nan")


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grams of the data and nothing else."""
    monkeypatch.setattr("hf_lowrank.compression.calibration.DAMPING", 0.0)


def token_batches(model_class: type[PreTrainedModel], *, count: int = 3, seed: int = 0) -> list[Batch]:
    """Padded on the left and on the right, with labels that do not count at the end and in between.

    No series is a single token, whose queries have no gradient but rounding errors.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(2, 64, (5, 9), generator=generator)}
        position = torch.arange(9)
        mask = (position < torch.tensor([[9], [6], [9], [9], [2]])) & (
            position >= torch.tensor([[0], [0], [4], [6], [0]])
        )
        batch["attention_mask"] = mask.long()
        if model_class is not T5EncoderModel:
            labels = torch.randint(2, 64, (5, 6), generator=generator)
            labels[1, 4:] = labels[2, 3:] = labels[3, 2] = -100
            batch["labels"] = labels
        batches.append(batch)
    return batches


# What a calibration should find, with float64 and autograd alone


class Captured:
    """Inputs, outputs and their gradients of every linear layer of a model, batch by batch."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self.tensors: dict[tuple[str, str], list[torch.Tensor]] = {}
        self.masks: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": []}
        self.num_labels = 0
        self.model = copy.deepcopy(model).double()
        generator = torch.Generator().manual_seed(calibration.record["seed"])
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                self._watch(name, module)
        for batch in calibration.batches:
            self._run(batch, generator)
        for tensors in self.tensors.values():
            tensors[:] = [tensor.detach() for tensor in tensors]

    def _watch(self, name: str, module: torch.nn.Linear) -> None:
        def before(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            own = inputs[0].clone()  # the gradient through this layer, not that through its siblings
            own.retain_grad()
            self.tensors.setdefault((name, "input"), []).append(own)
            return (own,)

        def after(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            self.tensors.setdefault((name, "output"), []).append(output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _run(self, batch: Batch, generator: torch.Generator) -> None:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        mask = batch["attention_mask"].bool()
        self.masks["encoder"].append(mask)
        if "labels" in batch:
            inputs["decoder_input_ids"] = self.model._shift_right(batch["labels"])
            mask = batch["labels"] != -100
            self.masks["decoder"].append(mask)
        states = self.model(**inputs)[0][mask]
        if hasattr(self.model, "lm_head"):
            labels = torch.multinomial(states.detach().float().softmax(-1), 1, generator=generator)
            loss = -states.log_softmax(-1).gather(1, labels).sum()
        else:
            loss = (states * torch.randn(states.shape, generator=generator)).sum()
        loss.backward()
        self.num_labels += int(mask.sum())
        for (name, side), tensors in list(self.tensors.items()):
            if not side.endswith("gradient"):
                self.tensors.setdefault((name, f"{side}_gradient"), []).append(tensors[-1].grad)

    def rows(self, name: str, side: str, stack: str) -> torch.Tensor:
        """(tokens that count, size)."""
        return torch.cat([t[mask] for t, mask in zip(self.tensors[name, side], self.masks[stack])])

    def gradients(self, *names: str, side: str, clipped_by: str | None = None) -> torch.Tensor:
        """(all tokens, size), summed over the layers; every series clipped to the median norm of those so far.

        Those of `clipped_by`, the same layer's gradients on the other side, where it is given.
        """
        sums = [sum(parts) for parts in zip(*(self.tensors[name, f"{side}_gradient"] for name in names))]
        measures = sums if clipped_by is None else self.tensors[names[0], f"{clipped_by}_gradient"]
        seen: list[float] = []
        rows = []
        for gradient, measure in zip(sums, measures):
            norms = measure.square().sum((1, 2)).sqrt()
            seen += [float(norm) for norm in norms if norm > 0]
            clip = np.median(seen) / norms.clamp_min(1e-300)
            rows.append((gradient * clip.clamp_max(1)[:, None, None]).flatten(0, 1))
        return torch.cat(rows)

    def mean(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.T @ rows / len(rows)

    def fisher(self, gradients: torch.Tensor) -> torch.Tensor:
        return gradients.T @ gradients / (2 * self.num_labels)


def stacks_of(layer: LayerName) -> tuple[str, str]:
    """The stack of a layer's tokens, and of its keys."""
    stack = "encoder" if layer.kind.startswith("encoder") else "decoder"
    return stack, "encoder" if layer.kind == "cross" else stack


def assert_gram(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    assert_close(found, wanted, rtol=0, atol=1e-4 * max(float(wanted.abs().max()), 1e-12))


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu"}], ids=["plain", "gated"])
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.usefixtures("undamped")
def test_grams_are_those_of_the_data(dense_t5, model_class, changes):
    model = dense_t5(model_class, **changes)
    calibration = calibrate(model, token_batches(model_class), seed=5)
    data, dense = Captured(model, calibration), load_dense(model)
    for name, module in dense.layers:
        grams = calibration.attention(name)
        tokens, keys = stacks_of(name)
        assert_gram(grams.query_input, data.mean(data.rows(f"{module}.q", "input", tokens)))
        assert_gram(grams.key_input, data.mean(data.rows(f"{module}.k", "input", keys)))
        assert_gram(grams.mixed, data.mean(data.rows(f"{module}.o", "input", tokens)))
        assert_gram(grams.query_gradient, data.fisher(data.gradients(f"{module}.q", side="output")))
        assert_gram(grams.key_gradient, data.fisher(data.gradients(f"{module}.k", f"{module}.v", side="input")))
        assert_gram(grams.output_gradient, data.fisher(data.gradients(f"{module}.o", side="output")))
    for name, module in dense.feed_forward_layers:
        grams = calibration.feed_forward(name)
        tokens, _ = stacks_of(name)
        assert_gram(grams.inner_input, data.mean(data.rows(f"{module}.{dense.inner_names[0]}", "input", tokens)))
        assert_gram(grams.output, data.mean(data.rows(f"{module}.wo", "output", tokens)))
        assert_gram(grams.output_gradient, data.fisher(data.gradients(f"{module}.wo", side="output")))
        assert len(grams.inner_gradient) == len(dense.inner_names)
        for gram, inner in zip(grams.inner_gradient, dense.inner_names):
            assert_gram(gram, data.fisher(data.gradients(f"{module}.{inner}", side="input")))


def points(
    data: Captured, dense: DenseCheckpoint, calibration: Calibration
) -> Iterator[tuple[str, Any, torch.Tensor, torch.Tensor]]:
    """The basis of every component, with the activations (groups, tokens, size) and the gradients at its point."""

    def by_group(rows: torch.Tensor, basis: Any) -> torch.Tensor:
        return rows.unflatten(1, (len(basis.left), -1)).transpose(0, 1)

    for name, module in dense.layers:
        bases = attention_layer(dense, name, calibration.attention(name), ("per_head", "latent"), max_rank=None).bases
        tokens, keys = stacks_of(name)
        q, k, v, o = (f"{module}.{part}" for part in "qkvo")
        found = {
            "qk": (data.rows(q, "output", tokens), data.gradients(q, side="output")),
            "vo": (data.rows(o, "input", tokens), data.gradients(o, side="input", clipped_by="output")),
            "latent": (data.rows(k, "input", keys), data.gradients(k, v, side="input")),
            "query": (data.rows(q, "input", tokens), data.gradients(q, side="input", clipped_by="output")),
            "output": (data.rows(o, "output", tokens), data.gradients(o, side="output")),
        }
        for part, (activations, gradients) in found.items():
            yield f"{name}.{part}", bases[part], by_group(activations, bases[part]), by_group(gradients, bases[part])
    for name, module in dense.feed_forward_layers:
        bases = feed_forward_layer(dense, name, calibration.feed_forward(name)).bases
        tokens, _ = stacks_of(name)
        inner = [f"{module}.{part}" for part in dense.inner_names]
        yield (
            f"{name}.wi",
            bases["wi"],
            torch.stack([data.rows(part, "input", tokens) for part in inner]),
            torch.stack([data.gradients(part, side="input") for part in inner]),
        )
        output = data.rows(f"{module}.wo", "output", tokens)
        yield f"{name}.wo", bases["wo"], output[None], data.gradients(f"{module}.wo", side="output")[None]


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.usefixtures("undamped")
def test_the_predicted_loss_is_that_of_all_pairs_of_gradients_and_activations(dense_t5, model_class):
    """Sum of (g_i^T (I - A B^T) a_j)^2 / 2, over labels and tokens, is the sum of the dropped squared singular values."""
    model = dense_t5(model_class, feed_forward_proj="gated-gelu")
    calibration = calibrate(model, token_batches(model_class), seed=5)
    data, dense = Captured(model, calibration), load_dense(model)
    components = 0
    for name, basis, activations, gradients in points(data, dense, calibration):
        size = activations.shape[2]
        assert basis.singular_values.shape == (len(activations), size)
        total = float(basis.singular_values.square().sum())
        for rank in {1, size // 3, size // 2, size - 1}:
            left, right = basis.truncate(rank)
            dropped = gradients - gradients @ left @ right.mT  # g^T (I - A B^T), row by row
            pairs = dropped @ activations.mT  # (groups, gradients, tokens)
            lost = float(pairs.square().sum()) / (2 * data.num_labels * activations.shape[1])
            predicted = float(basis.singular_values[:, rank:].square().sum())
            assert lost == pytest.approx(predicted, rel=1e-3, abs=1e-6 * total), name
        assert total > 0
        components += 1
    depth = {T5EncoderModel: (2, 2)}.get(model_class, (8, 5))
    assert components == 5 * depth[0] + 2 * depth[1]


def test_clipping_keeps_one_series_from_deciding(dense_t5):
    """A hundred times the gradient of the others would be ten thousand times their part of the Gram matrix."""
    model = dense_t5(T5EncoderModel)
    (batch,) = token_batches(T5EncoderModel, count=1)
    calibration = calibrate(model, [batch])
    data = Captured(model, calibration)
    for name, module in load_dense(model).layers:
        gradients = data.tensors[f"{module}.o", "output_gradient"][0]
        norms = gradients.square().sum((1, 2)).sqrt()
        trace = float(calibration.attention(name).output_gradient.trace()) * 2 * data.num_labels
        assert trace <= len(norms) * float(norms.median()) ** 2 * 1.01
        assert trace < float(norms.square().sum())


# Padding


def padded(batch: Batch, left: int, labels: int) -> Batch:
    """The same series with more padding before the context, and more labels that do not count after the target."""
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (left, 0), value=0),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (left, 0), value=0),
    }
    if "labels" in batch:
        wider["labels"] = torch.nn.functional.pad(batch["labels"], (0, labels), value=-100)
    return wider


@given(left=st.integers(0, 12), labels=st.integers(0, 6), model_class=st.sampled_from(CLASSES))
@settings(max_examples=6)
def test_padding_has_no_influence(dense_t5, left, labels, model_class):
    model = dense_t5(model_class)
    batches = token_batches(model_class, count=2)
    if model_class is T5Model:
        labels = 0  # its "labels" are drawn for all positions at once, and so others where there are more
    found = calibrate(model, [padded(batch, left, labels) for batch in batches])
    wanted = calibrate(model, batches)
    assert found.grams.keys() == wanted.grams.keys()
    for name, gram in wanted.grams.items():
        assert_close(found.grams[name], gram, rtol=0, atol=1e-4 * float(gram.abs().max()))
    assert found.record == wanted.record


def test_series_of_unlike_lengths_are_padded_without_influence(chronos_t5):
    """One batch with a long and a short series, against both in batches of their own, each series equally often."""
    long, short = torch.randint(2, 60, (1, 20)), torch.randint(2, 60, (1, 7))
    labels = torch.randint(2, 60, (2, 4))
    together = {
        "input_ids": torch.cat([long, torch.nn.functional.pad(short, (13, 0))]),
        "attention_mask": torch.stack([torch.ones(20), (torch.arange(20) >= 13).float()]).long(),
        "labels": labels,
    }
    apart = [{"input_ids": ids, "labels": labels[[i]]} for i, ids in enumerate((long, short))]
    found, wanted = calibrate(chronos_t5, [together]), calibrate(chronos_t5, apart)
    for name, gram in wanted.grams.items():
        if "gradient" not in name:  # clipping depends on the order
            assert_close(found.grams[name], gram, rtol=0, atol=1e-4 * float(gram.abs().max()))
    assert found.record == wanted.record


# State, seeds, files


def triangle(size: int) -> int:
    return size * (size + 1) // 2


@pytest.mark.parametrize("feed_forward", [True, False])
def test_what_is_kept_does_not_grow_with_the_data(chronos_t5, feed_forward):
    """One triangle for each Gram matrix: 6 of an attention layer less the shared ones, 4 of a feed-forward layer."""
    d, inner, encoder, decoder = 16, 16, 3, 2
    self_attention = 3 * triangle(d) + 2 * triangle(inner)
    wanted = (encoder + 2 * decoder) * self_attention + triangle(d)
    if feed_forward:
        wanted += (encoder + decoder) * 4 * triangle(d)
    for count in (1, 3):
        calibration = calibrate(chronos_t5, num_batches=count, feed_forward=feed_forward)
        assert sum(gram.numel() for gram in calibration.grams.values()) == wanted
        assert len(calibration.batches) == count


def test_the_refit_has_more_of_the_same_data(chronos_t5, monkeypatch):
    """What is measured is the same, and the batches of the refit begin with it."""
    alone, more = (calibrate(chronos_t5, num_batches=2, num_refit_batches=count) for count in (2, 5))
    assert alone.record == more.record
    assert all(torch.equal(alone.grams[name], gram) for name, gram in more.grams.items())
    assert [len(one.batches) for one in (alone, more)] == [2, 5]
    assert torch.equal(alone.batches[1]["input_ids"], more.batches[1]["input_ids"])
    assert not any(torch.equal(more.batches[4]["input_ids"], one["input_ids"]) for one in more.batches[:4])
    monkeypatch.setattr("hf_lowrank.compression.calibration.REFIT_BATCHES", 4)  # the default that tests do not have
    assert len(calibrate(chronos_t5, num_batches=2).batches) == 8


def assert_equal(found: Calibration, wanted: Calibration) -> None:
    assert found.record == wanted.record
    assert found.grams.keys() == wanted.grams.keys()
    assert all(torch.equal(found.grams[name], gram) for name, gram in wanted.grams.items())
    assert len(found.batches) == len(wanted.batches)
    for ours, theirs in zip(found.batches, wanted.batches):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        assert all(ours[name].dtype == tensor.dtype for name, tensor in theirs.items())


def test_the_seed_decides(chronos_t5):
    wanted = calibrate(chronos_t5, num_batches=1, seed=3)
    torch.manual_seed(123)
    assert_equal(calibrate(chronos_t5, num_batches=1, seed=3), wanted)
    other = calibrate(chronos_t5, num_batches=1, seed=4)
    assert not torch.equal(other.batches[0]["input_ids"][:5, :5], wanted.batches[0]["input_ids"][:5, :5])


def test_the_labels_are_drawn_by_the_seed(dense_t5):
    """The same tokens: activations are the same, gradients are not."""
    model, batches = dense_t5(), token_batches(T5ForConditionalGeneration)
    first, second = (calibrate(model, batches, seed=seed) for seed in (0, 1))
    for name, gram in first.grams.items():
        assert torch.equal(second.grams[name], gram) == ("gradient" not in name)


def test_saved_and_loaded_is_bit_equal(tmp_path, chronos_t5, dense_t5):
    for i, calibration in enumerate(
        (
            calibrate(chronos_t5, num_batches=2, seed=7),
            calibrate(dense_t5(T5EncoderModel), token_batches(T5EncoderModel, count=11)),  # batch 10 sorts before 2
        )
    ):
        path = tmp_path / "a folder" / f"{i}.safetensors"
        calibration.save(path)
        assert_equal(Calibration.load(path), calibration)
    assert sorted(file.name for file in path.parent.iterdir()) == ["0.safetensors", "1.safetensors"]
    calibration.save(path)  # again, over the old one
    assert_equal(Calibration.load(path), calibration)


def test_a_failed_save_leaves_nothing_behind(tmp_path, chronos_calibration):
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises(OSError, match="taken"):
        chronos_calibration.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
    assert not list(path.iterdir())


def test_the_record_says_what_the_data_was(chronos_t5, dense_t5):
    synthetic = calibrate(chronos_t5, num_batches=1, seed=9)
    assert synthetic.record["data"] == "synthetic"
    assert synthetic.record["seed"] == 9
    assert synthetic.record["num_series"] == len(synthetic.batches[0]["input_ids"])
    assert synthetic.record["num_tokens"] == int(synthetic.batches[0]["attention_mask"].sum())
    assert json.loads(json.dumps(synthetic.record)) == synthetic.record
    series = calibrate(chronos_t5, [np.sin(np.arange(50.0)), np.arange(30.0)], num_batches=1)
    assert series.record["data"] == "2 series"
    assert calibrate(dense_t5(), token_batches(T5ForConditionalGeneration)).record["data"] == "batches of the user's"


@pytest.mark.parametrize("family", ["chronos_t5", "bolt"])
def test_series_that_say_little_of_a_model_are_said(family: str, request: pytest.FixtureRequest):
    model = request.getfixturevalue("chronos_t5") if family == "chronos_t5" else dense_bolt()
    with pytest.raises(
        ValueError, match="calibration: each of 2 series has one value throughout, such as 3; give series that vary"
    ):
        calibrate(model, [np.full(50, 3.0), np.array([NAN, 0.0, 0.0])], num_batches=1)
    unit = "3 values" if family == "chronos_t5" else "5 patches of 5 values"
    series = np.arange(3.0 if family == "chronos_t5" else 28.0)
    with pytest.warns(UserWarning, match=f"calibration: {unit} in 1 series are less than the model's width, 16"):
        calibrate(model, [series], num_batches=1)


def test_series_come_as_arrays_frames_and_files(tmp_path, chronos_t5):
    generator = np.random.default_rng(0)
    series = [generator.normal(size=length).cumsum() for length in (30, 70, 45)]
    frame = pd.concat(
        pd.DataFrame(
            {"item_id": f"item {i}", "timestamp": pd.date_range("2020-01-01", periods=len(values)), "target": values}
        )
        for i, values in enumerate(series)
    )
    path = tmp_path / "secret folder" / "sales.csv"
    path.parent.mkdir()
    frame.to_csv(path, index=False)
    wanted = calibrate(chronos_t5, series, num_batches=1)
    tensors = [torch.from_numpy(values) for values in series]
    for data in (tensors, frame.sample(frac=1, random_state=0), path, str(path)):
        found = calibrate(chronos_t5, data, num_batches=1)
        assert found.record == wanted.record  # and no path in it
        assert all(torch.equal(found.grams[name], gram) for name, gram in wanted.grams.items())
    assert "secret" not in json.dumps(found.record)
    assert "sales" not in json.dumps(found.record)


def test_a_batch_without_a_mask_counts_every_token(dense_t5):
    (batch,) = token_batches(T5ForConditionalGeneration, count=1)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    model = dense_t5()
    wanted = calibrate(model, [batch])
    del batch["attention_mask"]
    assert_equal(calibrate(model, [batch]), wanted)


# Errors


@pytest.mark.parametrize("count", [1, 2.5, "many"])
def test_a_bad_number_of_batches_for_the_refit(chronos_t5, count):
    with pytest.raises(ValueError, match=f"num_refit_batches must be an integer of at least 2, found {count!r}"):
        calibrate(chronos_t5, num_batches=2, num_refit_batches=count)


@pytest.mark.parametrize("num_batches", [0, -1, 2.5, "many"])
def test_a_bad_number_of_batches(chronos_t5, num_batches):
    with pytest.raises(ValueError, match=f"num_batches must be a positive integer, found {num_batches!r}"):
        calibrate(chronos_t5, num_batches=num_batches)


@pytest.mark.parametrize("data", ["synthetic", [np.arange(30.0)], []])
def test_a_text_t5_needs_token_batches(dense_t5, data):
    with pytest.raises(ValueError, match="calibration of a T5 without a chronos_config needs batches of tokens"):
        calibrate(dense_t5(), data)


def test_a_decoder_needs_labels(dense_t5):
    batches = token_batches(T5ForConditionalGeneration)
    del batches[1]["labels"]
    with pytest.raises(ValueError, match="every batch must have labels, for the decoder; found none"):
        calibrate(dense_t5(), batches)


def test_predictions_must_be_finite(dense_t5):
    model = dense_t5()
    with torch.no_grad():
        layer = model.encoder.block[0].layer[1].DenseReluDense
        for weight in (layer.wi.weight, layer.wo.weight):
            weight.fill_(1.8e19)  # its square is still a number
    with pytest.raises(ValueError, match="the dense model's predictions are not finite on this data"):
        calibrate(model, token_batches(T5ForConditionalGeneration))


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None], ids=["empty", "text", "another file"])
def test_a_broken_file(tmp_path, dense_t5, content):
    path = tmp_path / "calibration.safetensors"
    if content is None:
        dense_t5().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"calibration: .* must be a file that Calibration\.save wrote"):
        Calibration.load(path)


def test_a_truncated_file(tmp_path, chronos_calibration):
    path = tmp_path / "calibration.safetensors"
    chronos_calibration.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"must be a file that Calibration\.save wrote"):
        Calibration.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"calibration: .* is no file"):
        Calibration.load(tmp_path / "nothing.safetensors")


def test_feed_forward_must_have_been_measured(chronos_t5):
    calibration = calibrate(chronos_t5, num_batches=1, feed_forward=False)
    calibration.attention(LayerName("cross", 1))
    with pytest.raises(
        ValueError, match=r"no matrices of encoder_feed_forward\.0; measure it again with feed_forward=True"
    ):
        calibration.feed_forward(LayerName("encoder_feed_forward", 0))


@pytest.mark.parametrize(
    "changes", [{"d_model": 32}, {"num_heads": 4}, {"num_layers": 4}, {"feed_forward_proj": "gated-relu"}]
)
def test_check_wants_the_same_shape(dense_t5, chronos_calibration, chronos_t5, changes):
    chronos_calibration.check(load_dense(chronos_t5))
    other = dense_t5(**({"num_layers": 3, "num_decoder_layers": 2} | changes))
    with pytest.raises(ValueError, match="calibration must be of a model of the same shape"):
        chronos_calibration.check(load_dense(other))
