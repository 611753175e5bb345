"""The decode loop and `generate`: keys once a series, the logits of the model, the distribution of the stock sampler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chronos import BaseChronosPipeline, ChronosConfig, ChronosPipeline
from chronos.chronos import ChronosModel
from conftest import randomise
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, spearmanr
from torch.testing import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_lowrank import LowRankT5ForConditionalGeneration
from hf_lowrank.models import decoding
from hf_lowrank.models.decoding import Decoder, Sampling, encode, latin_hypercube, sample_paths
from hf_lowrank.models.pipeline_lowrank_t5 import LowRankChronosPipeline

BATCH, TOKENS, SAMPLES, STEPS = 3, 9, 4, 6
VOCABULARY = 64
GENERATION = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0, "eos_token_id": 1}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
SMALL = {"num_layers": 3, "num_decoder_layers": 3}  # stock transformers' cache has the encoder's depth


def inputs(padded: bool = True) -> dict[str, torch.Tensor]:
    tokens = torch.randint(2, VOCABULARY, (BATCH, TOKENS))
    mask = torch.ones_like(tokens)
    if padded:
        for i, row in enumerate(mask):
            row[: 2 * i] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


@pytest.fixture
def mixed(tiny_config, mixed_ranks, tiny_chronos_config) -> LowRankT5ForConditionalGeneration:
    """Every form in every place, with the tokenizer of `tiny_chronos_config`."""
    config = tiny_config(**mixed_ranks, chronos_config=vars(tiny_chronos_config).copy(), eos_token_id=1)
    return randomise(LowRankT5ForConditionalGeneration(config))


@pytest.fixture
def gated(tiny_config, mixed_ranks) -> LowRankT5ForConditionalGeneration:
    """The same with T5 v1.1's feed-forward layers and an output layer of its own."""
    config = tiny_config(**mixed_ranks, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return randomise(LowRankT5ForConditionalGeneration(config))


@pytest.fixture
def models(dense_t5, mixed, gated) -> dict[str, T5ForConditionalGeneration]:
    return {"dense": dense_t5(**SMALL), "mixed": mixed, "gated": gated}


# ---- generate: the encoder's keys and values once a series -----------------------------------------------------------


def stock_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat the encoder's output as transformers does."""
    for name in ("_expand_inputs_for_generation", "_reorder_cache"):
        monkeypatch.delattr(LowRankT5ForConditionalGeneration, name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "num_return_sequences": SAMPLES, "top_k": 20},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 3, "top_p": 0.9},
    ],
    ids=["samples", "beams", "sampled beams"],
)
def test_generate_gives_the_tokens_of_repeated_encoder_outputs(
    monkeypatch, mixed, implementation, cache, prompt, settings
):
    mixed.set_attn_implementation(implementation)
    arguments = {**inputs(), **settings, **GENERATION, **CACHES[cache]}
    if prompt > 1:
        arguments["decoder_input_ids"] = torch.randint(2, VOCABULARY, (BATCH, prompt))
    arguments |= {"return_dict_in_generate": True, "output_logits": True}

    def run() -> Any:
        torch.manual_seed(7)
        return mixed.generate(**arguments)

    found = run()
    stock_expansion(monkeypatch)
    assert "_expand_inputs_for_generation" in vars(GenerationMixin)
    expected = run()
    assert torch.equal(found.sequences, expected.sequences)
    assert len({tuple(row) for row in found.sequences.tolist()}) > BATCH
    assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_a_dense_model_at_full_rank_generates_what_the_stock_one_does(dense_t5, tiny_config):
    dense = dense_t5(**SMALL)
    model = LowRankT5ForConditionalGeneration(tiny_config(**SMALL)).eval()
    model.load_state_dict(dense.state_dict())
    arguments = {**inputs(), **GENERATION, "do_sample": True, "num_return_sequences": SAMPLES}
    tokens = []
    for either in (dense, model):
        torch.manual_seed(5)
        tokens.append(either.generate(**arguments))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("settings", [{"do_sample": True, "num_return_sequences": SAMPLES}, {"num_beams": SAMPLES}])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_cache_holds_a_series_once(mixed, settings, cache):
    output = mixed.generate(
        **inputs(), **GENERATION, **settings, **CACHES[cache], return_dict_in_generate=True
    ).past_key_values
    for layer in output.cross_attention_cache.layers:
        assert len(layer.keys) == BATCH
    for layer in output.self_attention_cache.layers:
        assert len(layer.keys) == BATCH * SAMPLES


def test_recorded_cross_attention_has_the_shape_and_values_of_stock(monkeypatch, mixed):
    mixed.set_attn_implementation("eager")
    arguments = {**inputs(), **GENERATION, "do_sample": True, "num_return_sequences": SAMPLES}

    def run() -> Any:
        torch.manual_seed(3)
        return mixed.generate(**arguments, return_dict_in_generate=True, output_attentions=True).cross_attentions

    found = run()
    stock_expansion(monkeypatch)
    for ours, theirs in zip(found, run()):
        for layer, expected in zip(ours, theirs):
            assert layer.shape == (BATCH * SAMPLES, 2, 1, TOKENS)
            assert_close(layer, expected)


# ---- The loop: the model's logits ------------------------------------------------------------------------------------


def loop_logits(model: Any, given: dict[str, torch.Tensor], paths: torch.Tensor) -> torch.Tensor:
    """The logits (N, steps, vocabulary) along forced paths (N, steps)."""
    mask = given["attention_mask"].bool()
    with torch.inference_mode():
        states = encode(model.encoder, given["input_ids"], mask)
        decoder = Decoder(model, states, mask, steps=paths.shape[1])
        return torch.stack([decoder.step(paths[:, step], step) for step in range(paths.shape[1])], dim=1)


def model_logits(model: Any, given: dict[str, torch.Tensor], paths: torch.Tensor) -> torch.Tensor:
    repeated = {name: value.repeat_interleave(SAMPLES, 0) for name, value in given.items()}
    with torch.no_grad():
        return model(**repeated, decoder_input_ids=paths).logits


@pytest.mark.parametrize("name", ["dense", "mixed", "gated"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [1, 2 * TOKENS, 1024])
def test_the_logits_are_those_of_the_model(monkeypatch, models, name, padded, chunk):
    monkeypatch.setattr("hf_lowrank.models.decoding.CPU_TOKENS", chunk)
    given, paths = inputs(padded), torch.randint(2, VOCABULARY, (BATCH * SAMPLES, STEPS))
    found, expected = loop_logits(models[name], given, paths), model_logits(models[name], given, paths)
    assert expected.std(dim=0).max() > 0.1
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_long_contexts_and_horizons_share_the_buckets_of_the_position_bias(models, name):
    given = {"input_ids": torch.randint(2, VOCABULARY, (1, 70))}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    paths = torch.randint(2, VOCABULARY, (SAMPLES, 40))
    found, expected = loop_logits(models[name], given, paths), model_logits(models[name], given, paths)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_matrices_of_any_make_are_multiplied_alike(monkeypatch, mixed):
    """oneDNN for large plain ones, the module itself for others, such as an adapter's."""
    given, paths = inputs(), torch.randint(2, VOCABULARY, (BATCH * SAMPLES, STEPS))
    expected = model_logits(mixed, given, paths)
    monkeypatch.setattr("hf_lowrank.models.decoding.ONEDNN_WEIGHTS", 0)
    assert_close(loop_logits(mixed, given, paths), expected, rtol=1e-4, atol=1e-4)

    class Doubled(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(states)

    for module in mixed.modules():
        if type(module) is torch.nn.Linear and module is not mixed.lm_head and len(module.weight) % 2:
            module.__class__ = Doubled
    doubled = model_logits(mixed, given, paths)
    assert not torch.allclose(doubled, expected, atol=0.1)
    assert_close(loop_logits(mixed, given, paths), doubled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixed", "gated"])
def test_half_precision_is_as_close_to_single_as_the_model_is(tmp_path, models, name, dtype):
    given, paths = inputs(), torch.randint(2, VOCABULARY, (BATCH * SAMPLES, STEPS))
    exact = model_logits(models[name], given, paths)
    models[name].save_pretrained(tmp_path)
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype)  # in float16 `wo` stays in float32
    found, expected = loop_logits(half, given, paths), model_logits(half, given, paths)
    assert found.dtype == expected.dtype
    assert 0 < (found - exact).std() < 1.5 * (expected - exact).std()


def test_float16_stays_finite(monkeypatch, mixed):
    given, paths = inputs(), torch.randint(2, VOCABULARY, (BATCH * SAMPLES, STEPS))
    with torch.no_grad():
        for block in (*mixed.encoder.block, *mixed.decoder.block):
            for parameter in block.layer[-1].DenseReluDense.wo.parameters():
                parameter.mul_(1e4)  # float16 ends at 65504
    mixed.half()
    assert model_logits(mixed, given, paths).isfinite().all()
    assert loop_logits(mixed, given, paths).isfinite().all()
    monkeypatch.setattr("hf_lowrank.models.decoding.add", torch.add)
    assert not loop_logits(mixed, given, paths).isfinite().all()


def test_cross_attention_keeps_a_series_once_and_a_latent_once(mixed):
    given = inputs()
    mask = given["attention_mask"].bool()
    decoder = Decoder(mixed, encode(mixed.encoder, given["input_ids"], mask), mask, steps=STEPS)
    decoder.step(torch.zeros(BATCH * SAMPLES, dtype=torch.long), 0)
    for _, own, cross in decoder.layers:
        assert len(cross.keys) == BATCH
        assert own.keys.shape[:3:2] == (BATCH * SAMPLES, STEPS)
        for part in (own, cross):
            assert (part.keys is part.values) == part.attention.is_latent
            assert part.keys.shape[1] == (1 if part.attention.is_latent else 2)


# ---- The distribution of the stock sampler ---------------------------------------------------------------------------


def stock_scores(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What transformers' `generate` hands to softmax with these settings."""
    scores = logits.float()
    scores[:, list(sampling.forbidden)] = -torch.inf
    warpers: list[Callable] = []
    if sampling.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores


def stock_draw(self: Sampling, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """As `generate` draws: from all the vocabulary, with numbers of its own."""
    return torch.multinomial(stock_scores(logits, self).softmax(-1), 1).squeeze(1)


@given(
    temperature=st.none() | st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 2 * VOCABULARY),
    top_p=st.none() | st.floats(0.05, 1.0),
    forbidden=st.sampled_from([(), (1,)]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_candidates_have_the_probabilities_of_stock(temperature, top_k, top_p, forbidden, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, VOCABULARY, generator=generator).to(dtype)
    if seed % 2:
        logits = logits.mul(2).round()  # many are equal
    sampling = Sampling(temperature, top_k, top_p, forbidden)
    expected = stock_scores(logits.clone(), sampling)
    if top_p is not None and seed % 2:
        # Which of several equal tokens top-p leaves out is up to the sort; how many and of what score is not.
        scores, _ = sampling.candidates(logits.clone())
        found = scores.softmax(-1).sort(-1, descending=True).values
        assert_close(found, expected.softmax(-1).sort(-1, descending=True).values[:, : found.shape[1]])
        return
    scores, tokens = sampling.candidates(logits.clone())
    found = torch.zeros(5, VOCABULARY).scatter_(1, tokens, scores.softmax(-1))
    assert_close(found, expected.softmax(-1))


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_all_tokens_are_drawn_from_as_from_the_likeliest_of_all(temperature: float | None) -> None:
    """Without a top-k nothing is sorted; the draws are those of a top-k that holds the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, VOCABULARY, generator=generator)
    uniform = torch.rand(500, 1, generator=generator)
    drawn = [Sampling(temperature, k, None, (1,)).draw(logits.clone(), uniform) for k in (0, None, VOCABULARY)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].unique()) > 20
    assert not (drawn[0] == 1).any()


@pytest.mark.parametrize("sampling", [Sampling(1.0, 8, 1.0, (1,)), Sampling(0.7, 30, 0.8, (1,)), Sampling()])
def test_tokens_are_drawn_with_the_frequencies_of_stock(sampling):
    """Chi-square: with a fixed seed, the chance of a right sampler to fail was one in a thousand when this was written."""
    draws = 40_000
    logits = torch.randn(1, VOCABULARY)
    probabilities = stock_scores(logits.clone(), sampling).softmax(-1)[0].double().numpy()
    counts = sampling.draw(logits.repeat(draws, 1), torch.rand(draws, 1)).bincount(minlength=VOCABULARY).numpy()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = draws * probabilities[possible] / probabilities.sum()
    assert len(expected) > 5
    assert expected.min() > 5
    assert chisquare(counts[possible], expected).pvalue > 1e-3


def test_the_paths_of_a_series_draw_from_all_parts_of_a_distribution() -> None:
    """One in each part at every step; each path's numbers are uniform, and those of two steps have nothing to do with each other."""
    generator = torch.Generator().manual_seed(0)
    numbers = latin_hypercube(20, 3000, 2, generator=generator)
    assert numbers.shape == (3000, 2, 20)
    assert torch.equal((20 * numbers).long().sort(-1).values, torch.arange(20).expand(3000, 2, 20))
    for path in (0, 19):
        assert kstest(numbers[:, 0, path].numpy(), "uniform").pvalue > 1e-3
        assert abs(spearmanr(numbers[:, 0, path], numbers[:, 1, path]).statistic) < 0.06


def test_quantiles_vary_less_than_with_independent_paths(monkeypatch, mixed) -> None:
    """Of the mean over the paths, the variance at every step, relative to that with independent numbers."""
    given = inputs()
    arguments: dict[str, Any] = {"num_samples": SAMPLES, "steps": STEPS, "start": 0, "sampling": Sampling()}

    def variance() -> torch.Tensor:
        torch.manual_seed(0)
        runs = [sample_paths(mixed, given["input_ids"], given["attention_mask"], **arguments) for _ in range(100)]
        return torch.stack(runs).double().mean(dim=2).var(dim=0)

    spread = variance()
    monkeypatch.setattr(decoding, "latin_hypercube", lambda num_samples, *shape, **_: torch.rand(*shape, num_samples))
    assert (spread < 0.5 * variance()).all()


# ---- The pipeline ----------------------------------------------------------------------------------------------------


def pipelines(model: Any) -> tuple[ChronosPipeline, LowRankChronosPipeline]:
    config = ChronosConfig(**model.config.chronos_config)
    stock, ours = (
        cls(config.create_tokenizer(), ChronosModel(config, model))
        for cls in (ChronosPipeline, LowRankChronosPipeline)
    )
    return stock, ours


SERIES = [torch.arange(20.0).sin() + 2, torch.arange(7.0), torch.cat([torch.ones(5), torch.full((3,), torch.nan)])]


@pytest.mark.parametrize("name", ["dense", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prediction_length": 5, "num_samples": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.7},
        {"prediction_length": 19, "num_samples": 3},  # in three passes
    ],
)
def test_forecasts_are_those_of_chronos_when_tokens_are_drawn_alike(monkeypatch, chronos_t5, mixed, name, options):
    """All but the draw: the logits, the processors and their order, the paths of a series side by side, EOS, the passes."""
    stock, ours = pipelines(chronos_t5 if name == "dense" else mixed)
    monkeypatch.setattr(Sampling, "draw", stock_draw)
    monkeypatch.setattr(decoding, "latin_hypercube", lambda num_samples, *shape, **_: torch.zeros(*shape, num_samples))
    forecasts = []
    for pipeline in (stock, ours):
        torch.manual_seed(11)
        forecasts.append(pipeline.predict(SERIES, **options))
    assert torch.equal(*forecasts)
    assert forecasts[1].std() > 0


@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_forecasts_are_distributed_as_those_of_chronos(chronos_t5, mixed, name):
    """Chi-square on the values of the last step, two samples of 3,000 paths with fixed seeds."""
    stock, ours = pipelines(chronos_t5 if name == "dense" else mixed)
    values = []
    for seed, pipeline in enumerate((stock, ours)):
        torch.manual_seed(seed)
        values.append(pipeline.predict(SERIES[0], prediction_length=3, num_samples=3000)[0, :, -1])
    values = [value.contiguous() for value in values]
    edges = torch.cat(values).unique()
    counts = [torch.searchsorted(edges, value).bincount(minlength=len(edges)).numpy() for value in values]
    often = counts[0] + counts[1] >= 20
    table = [np.append(count[often], count[~often].sum()) for count in counts]
    expected = (table[0] + table[1]) / 2
    statistic = sum(((count - expected) ** 2 / expected)[expected > 0].sum() for count in table)
    degrees = (expected > 0).sum() - 1
    assert degrees > 5
    assert statistic < degrees + 3.3 * np.sqrt(2 * degrees)


def test_the_pipeline_of_a_saved_low_rank_model(tmp_path, mixed):
    mixed.save_pretrained(tmp_path)
    pipeline = BaseChronosPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is LowRankChronosPipeline
    assert isinstance(pipeline.inner_model, LowRankT5ForConditionalGeneration)
    quantiles, mean = pipeline.predict_quantiles(SERIES, prediction_length=4, quantile_levels=[0.1, 0.5, 0.9])
    assert quantiles.shape == (3, 4, 3)
    assert (quantiles.diff(dim=-1) >= 0).all()
    assert mean.shape == (3, 4)
    stamps = pd.date_range("2024-01-01", periods=20, freq="h")
    frame = pd.DataFrame({"item_id": "a", "timestamp": stamps, "target": np.sin(np.arange(20.0))})
    assert len(pipeline.predict_df(frame, prediction_length=4)) == 4
    assert_close(pipeline.embed(SERIES)[0], ChronosPipeline.from_pretrained(tmp_path).embed(SERIES)[0])


def test_the_pipeline_of_a_dense_checkpoint(tmp_path, chronos_t5):
    chronos_t5.save_pretrained(tmp_path)
    assert type(BaseChronosPipeline.from_pretrained(tmp_path)) is ChronosPipeline
    pipeline = LowRankChronosPipeline.from_pretrained(tmp_path)
    assert type(pipeline.inner_model) is T5ForConditionalGeneration
    assert pipeline.predict(SERIES, num_samples=2).shape == (3, 2, 8)


def test_a_text_model_has_no_pipeline(tiny_config, tiny_chronos_config):
    assert not hasattr(tiny_config(), "chronos_pipeline_class")
    chronos = vars(tiny_chronos_config).copy()
    assert tiny_config(chronos_config=chronos).chronos_pipeline_class == "LowRankChronosPipeline"
    chosen = tiny_config(chronos_config=chronos, chronos_pipeline_class="ChronosPipeline")
    assert chosen.chronos_pipeline_class == "ChronosPipeline"


def test_the_end_of_a_sequence_is_never_drawn(mixed):
    with torch.no_grad():
        mixed.lm_head.weight[1] = 50 * mixed.lm_head.weight[1]
    given = inputs()
    arguments = {"num_samples": SAMPLES, "steps": STEPS, "start": 0}
    drawn = {}
    for forbidden in ((), (1,)):
        sampling = Sampling(None, None, None, forbidden)
        paths = sample_paths(mixed, given["input_ids"], given["attention_mask"], **arguments, sampling=sampling)
        assert paths.shape == (BATCH, SAMPLES, STEPS)
        drawn[forbidden] = set(paths.flatten().tolist())
    assert 1 in drawn[()]
    assert 1 not in drawn[(1,)]


def test_a_partly_offloaded_model_forecasts_through_generate(tmp_path, mixed):
    mixed.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("shared", "encoder", "decoder.embed_tokens", "decoder.final_layer_norm", "lm_head"), "cpu")
    places |= {f"decoder.block.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    offloaded = BaseChronosPipeline.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert any(parameter.is_meta for parameter in offloaded.inner_model.parameters())
    forecasts = []
    for pipeline in (ChronosPipeline.from_pretrained(tmp_path / "model"), offloaded):
        torch.manual_seed(2)
        forecasts.append(pipeline.predict(SERIES))
    assert torch.equal(*forecasts)


@pytest.mark.parametrize(
    "name", ["decoder.block.1.layer.1.EncDecAttention.k", "encoder.block.0.layer.1.DenseReluDense.wo"]
)
def test_a_t5_with_other_names_is_refused(chronos_t5, tiny_chronos_config, name):
    """As a later version of transformers may have."""
    parent, _, last = name.rpartition(".")
    parent = chronos_t5.get_submodule(parent)
    setattr(parent, f"{last}_proj", getattr(parent, last))
    delattr(parent, last)
    with pytest.raises(ValueError, match=f"has no module {re.escape(name)}, which hf_lowrank reads"):
        LowRankChronosPipeline(None, ChronosModel(tiny_chronos_config, chronos_t5))


def test_other_models_are_refused(tiny_chronos_config):
    with pytest.raises(TypeError, match="model must be a Chronos-T5, dense or low-rank, found Linear"):
        LowRankChronosPipeline(None, ChronosModel(tiny_chronos_config, torch.nn.Linear(1, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive number, found 0.0"),
        ({"top_k": -1}, "top_k must be a positive integer, or 0 for all tokens, found -1"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], found 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(mixed, options, message):
    _, ours = pipelines(mixed)
    with pytest.raises(ValueError, match=message):
        ours.predict(SERIES, **options)


def test_other_ways_to_generate_are_refused(mixed):
    _, ours = pipelines(mixed)
    mixed.generation_config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="generation_config: repetition_penalty is not what LowRankChronosPipeline"):
        ours.predict(SERIES)


def test_models_that_forecast_nearly_alike_draw_nearly_alike():
    logits = 3 * torch.randn(4000, 64)
    sampling = Sampling(top_k=50, forbidden=(1,))
    uniform = torch.rand(len(logits), 1)
    drawn = [
        sampling.draw(other.clone(), uniform)
        for other in (logits, logits + 1e-3 * torch.randn(logits.shape), torch.randn(logits.shape))
    ]
    assert (drawn[0] == drawn[1]).float().mean() > 0.99
    assert (drawn[0] == drawn[2]).float().mean() < 0.3
    assert not any((tokens == 1).any() for tokens in drawn)
