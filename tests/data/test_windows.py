"""Token batches for Trainer: what they hold, that they repeat, and that a model trains on them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chronos_models import bolt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_lowrank import LowRankT5ForConditionalGeneration
from hf_lowrank.data.tokens import SeriesBatches, SyntheticBatches, WindowCollator, tokenize_windows
from hf_lowrank.data.windows import Counts, SeriesWindows, SyntheticWindows, foreseeable, held_out_ends, single_batch

NAN = float("nan")


@pytest.fixture(scope="module")
def batches(tiny_chronos_config) -> SyntheticBatches:
    return SyntheticBatches(tiny_chronos_config, 60, seed=3, max_tokens=400, max_windows=12)


# Windows to tokens


@given(seed=st.integers(0, 10_000), length=st.integers(1, 40), scale=st.floats(1e-3, 1e4))
def test_tokens_decode_to_the_values_they_came_from(seed, length, scale, tiny_chronos_config):
    generator = torch.Generator().manual_seed(seed)
    context, target = (torch.randn(3, n, generator=generator) * scale for n in (length, 8))
    batch = tokenize_windows(tiny_chronos_config, context, target)
    tokenizer = tiny_chronos_config.create_tokenizer()
    size = context.abs().mean(dim=1)  # both windows are scaled by the context's mean absolute value
    width = tokenizer.centers[1] - tokenizer.centers[0]
    for ids, values in ((batch["input_ids"], context), (batch["labels"], target)):
        decoded = tokenizer.output_transform(ids[:, None, :-1], size)[:, 0]
        inside = (values / size[:, None]).abs() < 15
        error = (decoded - values).abs() / size[:, None]
        assert (error[inside] <= 0.501 * width).all()
        assert ((decoded / size[:, None])[~inside].abs() > 14.99).all()


@settings(max_examples=25)
@given(data=st.data(), length=st.integers(1, 40), rows=st.integers(1, 4))
def test_missing_values_are_masked_and_ignored(data, length, rows, tiny_chronos_config):
    def window(size: int) -> torch.Tensor:
        values = st.floats(-9, 9, width=32) | st.just(NAN)
        row = st.lists(values, min_size=size, max_size=size)
        return torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float32)

    context, target = window(length), window(8)
    batch = tokenize_windows(tiny_chronos_config, context, target)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (rows, length + 1)
    assert batch["labels"].shape == (rows, 9)

    eos = tiny_chronos_config.eos_token_id
    assert (batch["input_ids"][:, -1] == eos).all()
    assert (batch["labels"][:, -1] == eos).all()
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert torch.equal(batch["attention_mask"][:, :-1] == 0, context.isnan())
    assert torch.equal(batch["input_ids"][:, :-1] == tiny_chronos_config.pad_token_id, context.isnan())
    assert torch.equal(batch["labels"][:, :-1] == -100, target.isnan())
    values = [batch["input_ids"][:, :-1][~context.isnan()], batch["labels"][:, :-1][~target.isnan()]]
    for ids in values:
        assert ((ids >= 2) & (ids < 64)).all()  # never a special token


def test_the_windows_themselves_are_left_alone(tiny_chronos_config):
    context, target = torch.tensor([[1.0, NAN, 3.0]]), torch.tensor([[2.0] * 7 + [NAN]])
    before = context.clone(), target.clone()
    tokenize_windows(tiny_chronos_config, context, target)
    torch.testing.assert_close((context, target), before, equal_nan=True)


def test_a_context_too_long_loses_its_past_and_not_its_present(tiny_chronos_config):
    context, target = torch.randn(2, 55), torch.randn(2, 8)
    batch = tokenize_windows(tiny_chronos_config, context, target)
    recent = tokenize_windows(tiny_chronos_config, context[:, -40:], target)
    torch.testing.assert_close(batch, recent)


# The dataset


def test_an_item_depends_on_seed_and_index_alone(batches, tiny_chronos_config):
    arguments = {"max_tokens": 400, "max_windows": 12}
    twin = SyntheticBatches(tiny_chronos_config, 1000, seed=3, **arguments)
    other = SyntheticBatches(tiny_chronos_config, 60, seed=4, **arguments)
    for index in (59, 0, 17):
        item = batches[index]
        torch.testing.assert_close(item, batches[index], rtol=0, atol=0)
        torch.testing.assert_close(item, twin[index], rtol=0, atol=0)
        for different in (other[index], batches[(index + 1) % 60]):
            assert not torch.equal(item["labels"][:1], different["labels"][:1])


def test_items_are_whole_batches_within_their_limits(batches):
    lengths, horizons, missing = [], [], 0
    for item in batches:
        input_ids, labels = item["input_ids"], item["labels"]
        count, length = input_ids.shape[0], input_ids.shape[1] - 1
        complete = bool((labels[:, -1] == 1).all())  # a target shorter than the model's horizon has no EOS
        horizon = labels.shape[1] - complete
        lengths.append(length)
        horizons.append(horizon)
        assert 10 <= length <= 40
        assert complete == (horizon == 8)
        assert complete or not (labels == 1).any()
        assert count == len(labels) == min(12, 400 // (length + horizon))
        assert item["attention_mask"].shape == input_ids.shape
        assert input_ids.min() >= 0
        assert labels.min() >= 1
        assert max(input_ids.max(), labels.max()) < 64
        assert (input_ids[:, -1] == 1).all()
        assert (item["attention_mask"][:, -2] == 1).all()  # the last value is known
        missing += bool((item["attention_mask"] == 0).any())
    assert len(lengths) == 60  # iteration ends where the index does
    assert set(horizons) == {6, 7, 8}
    assert np.mean(np.array(horizons) == 8) > 0.5
    assert min(lengths) < 13
    assert max(lengths) > 35
    assert 0 < missing < 55


def test_three_contexts_in_ten_are_long_and_the_others_of_any_length():
    lengths = np.array(
        [SyntheticWindows(512, 64, 1, seed=seed, max_values=1)[0]["context"].shape[1] for seed in range(200)]
    )
    assert np.mean(lengths >= 256) == pytest.approx(0.3 + 0.7 * np.log(2) / np.log(51.2), abs=0.1)
    short = lengths[lengths < 256]  # log-uniformly: as many below the geometric mean of 10 and 256 as above it
    assert np.mean(short < 51) == pytest.approx(0.5, abs=0.12)


def test_contexts_grow_over_the_ramp(tiny_chronos_config):
    chronos_config = replace(tiny_chronos_config, context_length=400, prediction_length=40)
    batches = SyntheticBatches(chronos_config, 200, seed=0, ramp=100, max_tokens=1)
    sizes = [
        (item["input_ids"].shape[1] - 1, item["labels"].shape[1]) for item in map(batches.__getitem__, range(200))
    ]
    for index, (length, horizon) in enumerate(sizes):
        assert 10 <= length <= 50 + 350 * min(1, (index + 1) / 100) + 1
        assert 6 <= horizon <= 41  # 40 and EOS
    assert 30 < max(sizes[:20])[0] < 130
    assert max(sizes[100:])[0] > 370


def test_a_target_far_away_from_a_constant_context_is_not_foreseeable() -> None:
    context = torch.tensor([[1.0, 2.0, 3.0], [0.3, 0.3, 0.3], [0.3, float("nan"), 0.3], [5.0, 5.0, 5.0 + 1e-6]])
    target = torch.tensor([[2.0, 18.0, 19.0], [0.3, 0.3, 0.31], [0.2, 0.3, 0.3], [5.0, 4.0, 6.0]])
    seen = ~foreseeable(context, target)["target"].isnan()
    assert seen.tolist() == [[True, True, False], [True, True, False], [False, True, True], [True, False, False]]


def test_what_is_left_is_within_reach_of_the_deviation() -> None:
    supply = SyntheticWindows(200, 64, 30, seed=5)
    shares = []
    for index in range(30):
        window = supply[index]
        context, target = foreseeable(**window)["context"], foreseeable(**window)["target"]
        assert torch.equal(context.nan_to_num(), window["context"].nan_to_num())
        spread = (context - context.nanmean(1, keepdim=True)).square().nanmean(1, keepdim=True).sqrt()
        distance = (target - context.nanmean(1, keepdim=True)).abs() / spread.clamp_min(1e-6)
        assert distance.nan_to_num().max() <= 20.1
        shares.append(target.isnan().float().mean())
    assert 0 < sum(shares) / 30 < 0.05


def test_a_batch_is_never_empty(tiny_chronos_config):
    tiny = SyntheticBatches(tiny_chronos_config, 5, seed=0, max_tokens=1)
    assert all(len(item["input_ids"]) == 1 for item in tiny)


@pytest.mark.parametrize("index", [-1, 60, 1000])
def test_an_index_outside_is_refused(batches, index):
    assert len(batches) == 60
    with pytest.raises(IndexError, match=rf"index must be in \[0, 60\), found {index}"):
        batches[index]


def test_single_batch_hands_an_item_on_as_it_is(batches):
    item = batches[0]
    assert single_batch([item]) is item
    with pytest.raises(ValueError, match="too many values"):
        single_batch([item, item])
    loaded = next(iter(DataLoader(batches, batch_size=1, collate_fn=single_batch)))
    torch.testing.assert_close(loaded, item, rtol=0, atol=0)


# Windows of the user's own series


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_windows_are_pieces_of_the_series(data, seed, tiny_chronos_config):
    """Every series counts up from its own start, so that a token in place of a value says where it came from."""
    chronos_config = replace(tiny_chronos_config, context_length=12, prediction_length=5)
    lengths = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=4))
    rng = np.random.default_rng(seed)
    series = [
        np.where(rng.random(length) < 0.3, NAN, np.arange(length) + 100.0 * i) for i, length in enumerate(lengths)
    ]
    for values in series:
        values[[0, 1]] = values[0] if values[0] == values[0] else -7.0  # two values that are observed
    seen = []

    def spy(config, context, target):
        seen.append((config, context, target))
        return tokenize_windows(config, context, target)

    batches = SeriesBatches(chronos_config, series, 3, seed=seed, max_tokens=60, max_windows=4, min_length=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lowrank.data.tokens.tokenize_windows", spy)
        items = list(batches)
    for item, (config, context, target) in zip(items, seen):
        count, length = context.shape
        horizon = target.shape[1]
        assert length <= 12
        assert horizon == config.prediction_length <= 5
        assert 1 <= count <= 4
        assert count * (length + horizon) <= 60
        assert item["input_ids"].shape == item["attention_mask"].shape == (count, length + 1)
        assert item["labels"].shape[0] == count
        # Nothing but padding is longer than the longest window.
        for past, future in zip(context.numpy(), target.numpy()):
            assert not np.isnan(past).all()
            assert not np.isnan(future).all()
            joined = np.concatenate([past, future])
            steps = joined[~np.isnan(joined)]
            pieces = [values for values in series if np.isin(steps, values).all()]
            assert any(_is_piece(joined, values) for values in pieces)
        is_observed = ~target.isnan()
        assert torch.equal(item["labels"][:, :horizon] != -100, is_observed)
        if item["labels"].shape[1] == horizon:  # no target is complete, so there is no EOS
            assert not (item["labels"] == 1).any()
        else:
            assert horizon == 5
            has_end = item["labels"][:, -1]
            assert set(has_end.tolist()) <= {1, -100}
            assert (has_end == 1).any()
            assert (has_end[is_observed[:, -1]] == 1).all()


def _is_piece(window: np.ndarray, values: np.ndarray) -> bool:
    """Whether the window is a run of `values`, with NaN before and after it."""
    padded = np.concatenate([np.full(len(window), NAN), values, np.full(len(window), NAN)])
    runs = np.lib.stride_tricks.sliding_window_view(padded, len(window))
    return bool(((runs == window) | (np.isnan(runs) & np.isnan(window))).all(axis=1).any())


def test_items_of_series_depend_on_seed_and_index_alone(tiny_chronos_config):
    series = [np.sin(np.arange(90) / 3), np.arange(30.0)]
    make = (
        SeriesBatches(tiny_chronos_config, series, 20, seed=1),
        SeriesBatches(tiny_chronos_config, series, 9, seed=1),
    )
    other = SeriesBatches(tiny_chronos_config, series, 20, seed=2)
    for index in (8, 0, 3):
        torch.testing.assert_close(make[0][index], make[1][index], rtol=0, atol=0)
        for different in (other[index], make[0][index + 1]):
            assert different["labels"].shape != make[0][index]["labels"].shape or not torch.equal(
                different["labels"], make[0][index]["labels"]
            )


@pytest.mark.parametrize("values", [[3.0, 3.0], [0.0] * 7, [NAN, 1.0, NAN, 2.0, NAN], [-4.0] * 100, [1e30, 1e-30]])
def test_one_short_or_constant_series_is_enough(values, tiny_chronos_config, chronos_t5):
    batches = SeriesBatches(tiny_chronos_config, [np.array(values)], 4, seed=0, max_windows=5)
    for item in batches:
        assert len(item["labels"]) == 5
        assert ((item["labels"] != -100).sum(dim=1) > 0).all()
        assert (item["attention_mask"][:, :-1].sum(dim=1) > 0).all()
        assert chronos_t5(**item).loss.isfinite()


def test_long_series_fill_the_context(tiny_chronos_config):
    batches = SeriesBatches(
        tiny_chronos_config, [np.random.default_rng(0).normal(size=1000)], 60, seed=0, min_length=5
    )
    lengths = [item["input_ids"].shape[1] - 1 for item in batches]
    assert {min(lengths), max(lengths)} <= {5, 6, 39, 40}
    assert 0.3 < sum(length < math.sqrt(5 * 40) for length in lengths) / 60 < 0.7  # drawn log-uniformly


def test_series_are_drawn_alike_however_long(tiny_chronos_config):
    series = [np.full(3000, -1.0), np.full(30, 1.0)]
    batches = SeriesBatches(tiny_chronos_config, series, 40, seed=0)
    signs = torch.cat([item["input_ids"][:, -2] > 32 for item in batches])
    assert 0.4 < signs.float().mean() < 0.6


def test_series_without_a_context_and_a_target_are_refused(tiny_chronos_config):
    alone, apart = np.array([1.0, NAN, NAN]), np.array([1.0, *[NAN] * 60, 2.0])
    with pytest.raises(ValueError, match="series: none of 2 has 2 observed values within 48 steps"):
        SeriesBatches(tiny_chronos_config, [alone, apart], 3, seed=0)
    (item,) = SeriesBatches(tiny_chronos_config, [alone, np.array([5.0, 5.0]), apart], 1, seed=0)
    assert (item["attention_mask"].sum(dim=1) == 2).all()  # only the second series, one value and EOS
    with pytest.raises(IndexError, match=r"index must be in \[0, 3\), found 3"):
        SeriesBatches(tiny_chronos_config, [np.ones(9)], 3, seed=0)[3]


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 10_000), least=st.integers(2, 8))
def test_a_context_has_values_enough_to_be_scaled_by(data, seed, least):
    """Drawn as by hand: a context with so many observed values, which vary where the target changes; else nothing is drawn."""
    rng = np.random.default_rng(seed)
    share, levels = data.draw(st.sampled_from([0.1, 0.5, 1.0])), data.draw(st.sampled_from([1, 2, 50]))
    length = data.draw(st.integers(2, 40))
    values = np.where(rng.random(length) < share, rng.integers(levels, size=length), NAN)
    if data.draw(st.booleans()):
        values[length // 2 :] = 7.0  # a level that changes once
    wanted = {
        origin
        for origin in range(length)
        if _can_be_scaled(values[max(origin - 12, 0) : origin], values[origin : origin + 3], least)
    }
    assert set(Counts.of(values).origins(12, 3, least)) == wanted
    if not wanted:
        with pytest.raises(ValueError, match=f"series: none of 1 has {least + 1} observed values within 15 steps"):
            SeriesWindows(12, 3, [values], 1, seed=0, min_observed=least)
        return
    item = SeriesWindows(12, 3, [values], 1, seed=seed, min_observed=least, max_windows=9)[0]
    assert all(_can_be_scaled(*window, least) for window in zip(item["contexts"], item["targets"]))


def _can_be_scaled(context: np.ndarray, target: np.ndarray, least: int) -> bool:
    context, target = context[~np.isnan(context)], target[~np.isnan(target)]
    if len(context) < least or not len(target):
        return False
    return len(set(context)) > 1 or set(target) == set(context)


def test_no_window_of_a_bolt_outweighs_all_others():
    """A series with one value long before the others had a loss of millions; so has one that was always the same."""
    model = bolt()
    series = [np.append([1000.0, *[NAN] * 30], 5 + np.sin(np.arange(40.0))), np.append(np.zeros(30), np.arange(30.0))]
    collator = WindowCollator(model.config)
    assert collator.min_observed == 3  # of patches of 5
    losses = {}
    for least in (1, collator.min_observed):
        windows = SeriesWindows(40, 6, series, 40, seed=0, max_windows=1, min_length=4, min_observed=least)
        losses[least] = max(model(**collator([windows[i]])).loss.item() for i in range(40))
    assert losses[1] > 1e4
    assert losses[collator.min_observed] < 100
    _, contexts, _ = held_out_ends([np.append([NAN] * 30, np.arange(9.0)), np.arange(20.0)], 4, 6, min_observed=4)
    assert [len(context) for context in contexts] == [4]  # the first has three values before its end


# Trainer


def test_trainer_learns_resumes_and_saves(tmp_path, tiny_config, mixed_ranks, tiny_chronos_config):
    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        return Trainer(
            model=LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks)),
            args=arguments,
            train_dataset=SyntheticBatches(tiny_chronos_config, 20, seed=0, max_tokens=400, max_windows=8),
            data_collator=single_batch,
        )

    two = trainer(2)
    before = {name: tensor.clone() for name, tensor in two.model.state_dict().items()}
    assert math.isfinite(two.train().training_loss)
    for name, tensor in two.model.named_parameters():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor, before[name]), name

    saved = LowRankT5ForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(dict(saved.named_parameters()), dict(two.model.named_parameters()), rtol=0, atol=0)

    resumed = trainer(20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
