"""The low-rank T5 models: equal to T5 at full rank, to their equations at any rank, and at home in transformers."""

from __future__ import annotations

import copy
import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, exactness, randomise, stock_implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)
from transformers.models.t5.modeling_t5 import T5Attention

import hf_lowrank
from hf_lowrank import LowRankT5Config, LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, LowRankT5Model
from hf_lowrank.models.configuration_lowrank_t5 import attention_parameters, cached_numbers, feed_forward_parameters
from hf_lowrank.models.modeling_lowrank_blocks import LowRankT5Block
from hf_lowrank.models.modeling_lowrank_layers import (
    LatentAttention,
    LowRankAttention,
    LowRankFeedForward,
    PerHeadAttention,
    ThinFactors,
    distances,
    relative_position_bias,
)
from hf_lowrank.models.modeling_lowrank_stack import CACHE_FIELD, LowRankT5Stack

VOCAB, D_MODEL, D_KV, D_FF, HEADS = 64, 16, 8, 24, 2
IMPLEMENTATIONS = ["eager", "sdpa"]
GENERATION = {"min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0}

# One entry of each form; every test of a single layer runs over them.
ENTRIES = {
    "per_head": {"qk": 3, "vo": 5},
    "latent": {"latent": 5, "query": 4, "output": 3},
    "latent, dense query": {"latent": 5, "query": None, "output": 3},
    "latent, dense output": {"latent": 5, "query": 4, "output": None},
    "latent, dense both": {"latent": 5, "query": None, "output": None},
    "rank one": {"latent": 1, "query": 1, "output": 1},
}
# Changes to the tiny shape of conftest.
SHAPES = {
    "plain": {},
    "one head": {"num_heads": 1},
    "many heads, inner size above d_model": {"num_heads": 5},
    "gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "deep encoder": {"num_layers": 3, "num_decoder_layers": 1},
}


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape)


@pytest.fixture
def mixed_config(tiny_config, mixed_ranks) -> LowRankT5Config:
    return tiny_config(**mixed_ranks)


@pytest.fixture
def mixed_model(mixed_config) -> LowRankT5ForConditionalGeneration:
    return randomise(LowRankT5ForConditionalGeneration(mixed_config))


def attention_layers(model: torch.nn.Module) -> list[tuple[str, int, Any]]:
    """(kind, layer, module) of every attention layer of an encoder-decoder."""
    layers = [("encoder_self", i, block.layer[0].SelfAttention) for i, block in enumerate(model.encoder.block)]
    for i, block in enumerate(model.decoder.block):
        layers += [("decoder_self", i, block.layer[0].SelfAttention), ("cross", i, block.layer[1].EncDecAttention)]
    return layers


# Parameters


def sketch(limit: int) -> st.SearchStrategy:
    return st.none() | st.integers(1, limit)


ENTRY = st.fixed_dictionaries({"qk": st.integers(1, D_KV), "vo": st.integers(1, D_KV)}) | st.fixed_dictionaries(
    {"latent": st.integers(1, D_MODEL), "query": sketch(D_MODEL), "output": sketch(D_MODEL)}
)
FEED_FORWARD = st.integers(1, D_FF).flatmap(
    lambda width: st.fixed_dictionaries(
        {"width": st.just(width), "wi": sketch(min(width, D_MODEL)), "wo": sketch(min(width, D_MODEL))}
    )
)


@settings(max_examples=25)
@given(attention=ENTRY, feed_forward=FEED_FORWARD, heads=st.integers(1, 4), gated=st.booleans())
def test_parameter_formulas_count_the_modules(attention, feed_forward, heads, gated, tiny_config):
    config = tiny_config(
        num_heads=heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
        attention_ranks={"encoder_self": [attention] * 2, "decoder_self": [attention] * 3, "cross": [attention] * 3},
        feed_forward_ranks={"encoder": [feed_forward] * 2, "decoder": [feed_forward] * 3},
    )
    with torch.device("meta"):
        model = LowRankT5ForConditionalGeneration(config)
    one_attention = attention_parameters(attention, d_model=D_MODEL, num_heads=heads)
    one_feed_forward = feed_forward_parameters(feed_forward, d_model=D_MODEL, is_gated=gated)
    for _, _, layer in attention_layers(model):
        bias = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("relative_attention_bias"))
        assert sum(p.numel() for p in layer.parameters()) - bias == one_attention
    for module in model.modules():
        if isinstance(module, LowRankFeedForward):
            assert sum(p.numel() for p in module.parameters()) == one_feed_forward
    norms = (2 * 2 + 3 * 3 + 2) * D_MODEL
    biases = 2 * config.relative_attention_num_buckets * heads
    rest = VOCAB * D_MODEL + norms + biases
    assert model.num_parameters() == 8 * one_attention + 5 * one_feed_forward + rest


def test_parameter_formulas_at_full_rank_are_the_dense_models(tiny_shape):
    dense = T5ForConditionalGeneration(T5Config(**tiny_shape))
    attention = sum(p.numel() for p in dense.decoder.block[1].layer[1].EncDecAttention.parameters())
    feed_forward = sum(p.numel() for p in dense.decoder.block[1].layer[2].DenseReluDense.parameters())
    full = {"qk": D_KV, "vo": D_KV}
    assert attention_parameters(full, d_model=D_MODEL, num_heads=HEADS) == attention
    ranks = {"width": D_FF, "wi": None, "wo": None}
    assert feed_forward_parameters(ranks, d_model=D_MODEL, is_gated=False) == feed_forward


def test_the_safetensors_file_holds_exactly_the_models_parameters(tmp_path, mixed_model):
    mixed_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a dict)
    assert saved == mixed_model.num_parameters()


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_cached_numbers_count_the_cache(mixed_model, implementation):
    output = mixed_model.generate(
        tokens(2, 7), return_dict_in_generate=True, cache_implementation=implementation, **GENERATION
    )
    caches = {
        "decoder_self": output.past_key_values.self_attention_cache,
        "cross": output.past_key_values.cross_attention_cache,
    }
    for kind, cache in caches.items():
        entries = mixed_model.config.attention_ranks[kind]
        assert len(cache.layers) == len(entries)
        for layer, ranks in zip(cache.layers, entries):
            batch, _, length, _ = layer.keys.shape
            assert batch == 2
            assert length == (7 if kind == "cross" else 6)
            numbers = layer.keys.numel() + layer.values.numel()
            assert numbers == batch * length * cached_numbers(ranks, num_heads=HEADS)


# Equal to T5 at full rank


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dense_class", "low_rank_class"),
    [
        (T5ForConditionalGeneration, LowRankT5ForConditionalGeneration),
        (T5Model, LowRankT5Model),
        (T5EncoderModel, LowRankT5EncoderModel),
    ],
)
def test_full_rank_is_t5(tiny_shape, dense_class, low_rank_class, changes, implementation):
    shape = {**tiny_shape, **changes}
    dense = randomise(dense_class(T5Config(**shape, attn_implementation=stock_implementation(implementation))))
    model = low_rank_class(LowRankT5Config(**shape, attn_implementation=implementation)).eval()
    model.load_state_dict(dense.state_dict())
    inputs = {"input_ids": tokens(2, 9), "attention_mask": torch.tensor([[1] * 9, [0] * 3 + [1] * 6])}
    if dense_class is not T5EncoderModel:
        inputs["decoder_input_ids"] = tokens(2, 5)
    with torch.no_grad():
        expected, found = dense(**inputs), model(**inputs)
    assert_close(found[0], expected[0], **exactness(implementation))


def absorbed(dense: T5ForConditionalGeneration, sketches: bool) -> LowRankT5ForConditionalGeneration:
    """The dense model in latent form with r = d_model: P and the sketches the identity, the cores the products."""
    shape = {key: value for key, value in dense.config.to_dict().items() if key != "model_type"}
    full = dense.config.d_model if sketches else None
    entry = {"latent": dense.config.d_model, "query": full, "output": full}
    depths = {"encoder_self": dense.config.num_layers, "decoder_self": dense.config.num_decoder_layers}
    depths["cross"] = dense.config.num_decoder_layers
    ranks = {kind: [entry] * depth for kind, depth in depths.items()}
    model = LowRankT5ForConditionalGeneration(LowRankT5Config(**shape, attention_ranks=ranks)).eval()
    attention = re.compile(r"Attention\.[qkvo]\.weight")
    rest = {name: tensor for name, tensor in dense.state_dict().items() if not attention.search(name)}
    model.load_state_dict(rest, strict=False)
    for (_, _, source), (_, _, target) in zip(attention_layers(dense), attention_layers(model)):
        query, key, value = (
            matrix.weight.unflatten(0, (source.n_heads, -1)) for matrix in (source.q, source.k, source.v)
        )
        output = source.o.weight.unflatten(1, (source.n_heads, -1))
        target.latent.weight.copy_(torch.eye(dense.config.d_model))
        target.q.weight.copy_(torch.einsum("hrk,hrd->hkd", key, query).flatten(0, 1))
        target.o.weight.copy_(torch.einsum("dhr,hrk->dhk", output, value).flatten(1))
        if sketches:
            target.query_sketch.weight.copy_(torch.eye(dense.config.d_model))
            target.output_sketch.weight.copy_(torch.eye(dense.config.d_model))
    return model


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_the_absorbed_latent_form_at_full_rank_is_t5(tiny_shape, changes):
    dense = randomise(T5ForConditionalGeneration(T5Config(**{**tiny_shape, **changes})))
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 5)}
    expected = dense(**inputs).logits
    for sketches in (True, False):
        assert_close(absorbed(dense, sketches)(**inputs).logits, expected, rtol=0, atol=1e-4)


# Equal to the equations at any rank


def per_head_reference(layer: PerHeadAttention, x, y, bias):
    """logit(s, t) = x_s^T W_q^T W_k y_t + bias, output = sum over heads of W_o W_v (mixed y)"""
    query, key, value = (matrix.weight.unflatten(0, (layer.n_heads, -1)) for matrix in (layer.q, layer.k, layer.v))
    output = layer.o.weight.unflatten(1, (layer.n_heads, -1))
    weights = torch.softmax(torch.einsum("bsd,hrd,hre,bte->bhst", x, query, key, y) + bias, dim=-1)
    return torch.einsum("dhr,hre,bhst,bte->bsd", output, value, weights, y), weights


def latent_reference(layer: LatentAttention, x, y, bias):
    """logit(s, t) = (C_h P_q x_s)^T P y_t + bias, output = W_O sum over heads of D_h (mixed P y)"""
    latent = torch.einsum("rd,btd->btr", layer.latent.weight, y)
    query = x
    if isinstance(layer.query_sketch, torch.nn.Linear):
        query = torch.einsum("qd,bsd->bsq", layer.query_sketch.weight, x)
    query_cores = layer.q.weight.unflatten(0, (layer.n_heads, -1))  # C: (h, r, q)
    output_cores = layer.o.weight.unflatten(1, (layer.n_heads, -1))  # D: (o, h, r)
    weights = torch.softmax(torch.einsum("hrq,bsq,btr->bhst", query_cores, query, latent) + bias, dim=-1)
    output = torch.einsum("ohr,bhst,btr->bso", output_cores, weights, latent)
    if isinstance(layer.output_sketch, torch.nn.Linear):
        output = torch.einsum("do,bso->bsd", layer.output_sketch.weight, output)
    return output, weights


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["encoder_self", "decoder_self", "cross"])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@torch.no_grad()
def test_attention_is_its_equation(tiny_config, entry, kind, implementation):
    depth = 2 if kind == "encoder_self" else 3
    config = tiny_config(attention_ranks={kind: [entry] * depth}, attn_implementation=implementation)
    model = randomise(LowRankT5ForConditionalGeneration(config))
    layer = next(layer for found, i, layer in attention_layers(model) if (found, i) == (kind, 0))
    x, y = torch.randn(3, 4, D_MODEL), torch.randn(3, 7, D_MODEL)
    if kind != "cross":
        y = x
    length = y.shape[1]
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, -1] = False  # one token is padding for one series
    lowest = torch.finfo(torch.float32).min
    padding = torch.zeros(3, 1, 1, length).masked_fill(~mask[:, None, None], lowest)
    if kind == "cross":
        bias = padding
        output, weights = layer(x, y, bias=bias)
    else:
        stack = model.encoder if kind == "encoder_self" else model.decoder
        embedding = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bucket = T5Attention._relative_position_bucket(
            torch.arange(length) - torch.arange(length)[:, None], kind == "encoder_self", len(embedding), 20
        )
        position = embedding[bucket].permute(2, 0, 1)
        assert position.std() > 0.1
        if kind == "decoder_self":
            position = position.masked_fill(torch.ones(length, length).triu(1).bool(), lowest)
        output, bias, weights = layer(x, mask=mask)
        assert_close(bias, torch.maximum(position + padding, torch.tensor(lowest)))
        again, passed_on, _ = layer(x, bias=bias)  # as the layers behind the first do
        assert passed_on is bias
        assert torch.equal(again, output)
    reference = latent_reference if "latent" in entry else per_head_reference
    expected, expected_weights = reference(layer, x, y, bias)
    assert_close(output, expected)
    assert (weights is None) == (implementation == "sdpa")
    arguments = {"bias": bias, "output_attentions": True}
    *_, weights = layer(x, y, **arguments) if kind == "cross" else layer(x, **arguments)
    assert_close(weights, expected_weights)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ranks", [(None, None), (3, None), (None, 4), (2, 5)])
@torch.no_grad()
def test_feed_forward_is_its_equation(tiny_config, ranks, gated):
    wi, wo = ranks
    config = tiny_config(feed_forward_proj="gated-relu" if gated else "relu")
    layer = LowRankFeedForward(config, width=11, wi=wi, wo=wo)

    def matrix(module: torch.nn.Module) -> torch.Tensor:
        return module.up.weight @ module.down.weight if isinstance(module, ThinFactors) else module.weight

    x = torch.randn(2, 5, D_MODEL)
    if gated:
        hidden = torch.relu(x @ matrix(layer.wi_0).T) * (x @ matrix(layer.wi_1).T)
    else:
        hidden = torch.relu(x @ matrix(layer.wi).T)
    assert hidden.shape == (2, 5, 11)
    assert_close(layer(x), hidden @ matrix(layer.wo).T)


# What transformers does with a T5


@torch.no_grad()
def test_eager_equals_sdpa(mixed_model):
    inputs = {
        "input_ids": tokens(2, 9),
        "attention_mask": torch.tensor([[1] * 9, [0] * 3 + [1] * 6]),
        "decoder_input_ids": tokens(2, 5),
    }
    logits = {}
    for implementation in IMPLEMENTATIONS:
        mixed_model.set_attn_implementation(implementation)
        assert mixed_model.decoder.config._attn_implementation == implementation
        logits[implementation] = mixed_model(**inputs).logits
    assert_close(logits["eager"], logits["sdpa"])


def test_flex_and_flash_attention_are_refused(mixed_config):
    for implementation in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError)):
            LowRankT5ForConditionalGeneration._from_config(
                copy.deepcopy(mixed_config), attn_implementation=implementation
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("changes", [{}, {"num_layers": 3, "num_decoder_layers": 1, "num_heads": 1}])
def test_all_caches_decode_alike(tiny_config, mixed_ranks, changes, implementation):
    if changes:  # the encoder's first entries again, for one more layer
        tables = copy.deepcopy(mixed_ranks["attention_ranks"])
        tables["encoder_self"].append(tables["encoder_self"][0])
        ranks = {"attention_ranks": tables | {"decoder_self": [ENTRIES["latent"]], "cross": tables["cross"][:1]}}
    else:
        ranks = mixed_ranks
    config = tiny_config(**ranks, **changes, attn_implementation=implementation)
    model = randomise(LowRankT5ForConditionalGeneration(config))
    inputs = {"input_ids": tokens(3, 8), "attention_mask": torch.tensor([[0] * i + [1] * (8 - i) for i in (0, 2, 5)])}
    prompt = torch.cat([torch.zeros(3, 1, dtype=torch.long), tokens(3, 3)], dim=1)  # positions unlike each other
    outputs = {}
    for name, arguments in {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
    }.items():
        outputs[name] = model.generate(
            **inputs,
            **arguments,
            **GENERATION,
            decoder_input_ids=prompt,
            return_dict_in_generate=True,
            output_logits=True,
        )
    # Teacher forcing of what was decoded gives the same logits in a single pass.
    decoded = outputs["none"].sequences
    with torch.no_grad():
        at_once = model(**inputs, decoder_input_ids=decoded[:, :-1]).logits[:, 3:]
    assert at_once.std(dim=0).max() > 0.01  # the series matter
    assert at_once.std(dim=1).max() > 0.01  # and so does the position
    for output in outputs.values():
        assert torch.equal(output.sequences, decoded)
        assert_close(torch.stack(output.logits, dim=1), at_once, rtol=1e-4, atol=1e-4)


def test_beam_search_is_the_same_with_every_cache(mixed_model):
    inputs = tokens(2, 8)
    settings = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    cached = mixed_model.generate(inputs, **settings, **GENERATION)
    static = mixed_model.generate(inputs, cache_implementation="static", **settings, **GENERATION)
    recomputed = mixed_model.generate(inputs, use_cache=False, **settings, **GENERATION)
    greedy = mixed_model.generate(inputs, **GENERATION)
    assert cached.sequences.shape == (4, 7)
    for other in (static, recomputed):
        assert torch.equal(cached.sequences, other.sequences)
        assert_close(cached.sequences_scores, other.sequences_scores)

    def log_probability(sequences: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = mixed_model(input_ids=inputs[rows], decoder_input_ids=sequences[:, :-1]).logits
        return logits.log_softmax(-1).gather(2, sequences[:, 1:, None]).sum((1, 2))

    found = log_probability(cached.sequences, torch.tensor([0, 0, 1, 1]))
    assert_close(cached.sequences_scores, found / 6)  # the mean over the generated tokens
    assert (found[::2] >= found[1::2]).all()
    assert (found[::2] >= log_probability(greedy, torch.arange(2)) - 1e-4).all()


def test_sampling_follows_the_seed(mixed_model):
    inputs = tokens(2, 8)
    settings = {"do_sample": True, "num_return_sequences": 5, "top_k": 50, **GENERATION}

    def sample(seed: int, **arguments: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        return mixed_model.generate(inputs, **settings, **arguments)

    samples = sample(1)
    assert samples.shape == (10, 7)
    assert len({tuple(row) for row in samples.tolist()}) > 5
    assert torch.equal(samples, sample(1))
    assert torch.equal(samples, sample(1, use_cache=False))
    assert torch.equal(samples, sample(1, cache_implementation="static"))
    assert not torch.equal(samples, sample(2))


def test_recorded_outputs_have_the_shapes_of_t5(tiny_shape, mixed_config):
    arguments = {"output_attentions": True, "output_hidden_states": True}
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 5), **arguments}
    mixed_config._attn_implementation = "eager"
    found = LowRankT5ForConditionalGeneration(mixed_config)(**inputs)
    dense = T5ForConditionalGeneration(T5Config(**tiny_shape, attn_implementation="eager"))(**inputs)
    for name, count in {
        "encoder_hidden_states": 3,
        "decoder_hidden_states": 4,
        "encoder_attentions": 2,
        "decoder_attentions": 3,
        "cross_attentions": 3,
    }.items():
        assert len(found[name]) == count
        assert [tensor.shape for tensor in found[name]] == [tensor.shape for tensor in dense[name]]
        if "attentions" in name:
            for weights in found[name]:
                assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert torch.equal(found.decoder_attentions[0].triu(1), torch.zeros(2, HEADS, 5, 5))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(mixed_model, side):
    """Position biases depend on distances only, so even padding on the left leaves the rest as it was."""
    context, target, pad = tokens(1, 6), tokens(1, 4), torch.zeros(1, 3, dtype=torch.long)

    def padded(ids: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        return torch.cat([fill, ids] if side == "left" else [ids, fill], dim=1)

    expected = mixed_model(input_ids=context, decoder_input_ids=target)
    found = mixed_model(
        input_ids=padded(context, tokens(1, 3)),  # what is masked may be anything
        attention_mask=padded(torch.ones_like(context), pad),
        decoder_input_ids=padded(target, pad),
        decoder_attention_mask=padded(torch.ones_like(target), pad),
    )
    window = slice(3, None) if side == "left" else slice(None, -3)
    assert_close(found.encoder_last_hidden_state[:, window], expected.encoder_last_hidden_state)
    assert_close(found.logits[:, window], expected.logits)
    unmasked = mixed_model(input_ids=padded(context, tokens(1, 3)), decoder_input_ids=target)
    assert not torch.allclose(unmasked.logits, expected.logits, atol=1e-3)


def gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_loss_reaches_every_parameter(mixed_model):
    found = gradients(mixed_model.train(), {"input_ids": tokens(4, 12), "labels": tokens(4, 10)})
    assert len(found) == len(list(mixed_model.parameters()))
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-7, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(mixed_model, reentrant):
    inputs = {"input_ids": tokens(2, 9), "labels": tokens(2, 6)}
    expected = gradients(mixed_model.train(), inputs)
    mixed_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert mixed_model.is_gradient_checkpointing
    assert_close(gradients(mixed_model, inputs), expected)


@torch.no_grad()
def test_bfloat16_is_close_to_float32_and_saved_as_it_is(tmp_path, mixed_model):
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6)}
    expected = mixed_model(**inputs).logits
    found = mixed_model.to(torch.bfloat16)(**inputs).logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).std() < 0.05 * expected.std()
    mixed_model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert_equal_models(again, mixed_model)


@torch.no_grad()
def test_float16_keeps_wo_in_float32(tmp_path, mixed_model):
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6)}
    expected = mixed_model(**inputs).logits
    mixed_model.save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        is_wo = re.search(r"\.wo\.", name) is not None
        assert parameter.dtype == (torch.float32 if is_wo else torch.float16), name
    assert (model(**inputs).logits - expected).std() < 0.02 * expected.std()


def test_torch_compile_without_graph_breaks(tiny_config):
    config = tiny_config(
        num_layers=1,
        num_decoder_layers=1,
        attention_ranks={
            "encoder_self": [{"latent": 4, "query": 3, "output": None}],
            "decoder_self": [{"qk": 3, "vo": 5}],
            "cross": [{"latent": 4, "query": None, "output": 3}],
        },
        feed_forward_ranks={"encoder": [{"width": 9, "wi": 3, "wo": None}]},
    )
    model = randomise(LowRankT5ForConditionalGeneration(config))
    inputs = {"input_ids": tokens(2, 9), "labels": tokens(2, 6)}
    expected = model(**inputs).logits
    expected_gradients = gradients(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**inputs)
    assert_close(output.logits, expected)
    model.zero_grad()
    output.loss.backward()
    assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected_gradients)
    torch._dynamo.reset()


def test_resize_token_embeddings(mixed_model):
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6)}
    expected = mixed_model(**inputs).logits
    mixed_model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
    found = mixed_model(**inputs).logits
    assert found.shape == (2, 6, VOCAB + 7)
    assert mixed_model.config.vocab_size == VOCAB + 7
    assert_close(found[..., :VOCAB], expected)
    assert mixed_model.lm_head.weight is mixed_model.shared.weight is mixed_model.encoder.embed_tokens.weight


# Fresh weights


def relative_deviation(weight: torch.Tensor, std: float) -> float:
    """How far the weight's root mean square is from `std`, in standard errors of that estimate."""
    return abs(weight.pow(2).mean().sqrt().item() / std - 1) * (2 * weight.numel()) ** 0.5


WIDE = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "relative_attention_num_buckets": 32}


@pytest.mark.parametrize("factor", [1.0, 0.05])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_fresh_weights_at_full_rank_are_drawn_as_t5_draws_them(tiny_shape, feed_forward, factor):
    shape = {**tiny_shape, **WIDE, "feed_forward_proj": feed_forward, "initializer_factor": factor}
    dense = T5ForConditionalGeneration(T5Config(**shape))
    model = LowRankT5ForConditionalGeneration(LowRankT5Config(**shape))
    fresh = dict(model.named_parameters())
    assert fresh.keys() == dict(dense.named_parameters()).keys()
    for name, expected in dense.named_parameters():
        if "layer_norm" in name:
            assert torch.equal(fresh[name], expected), name
        else:
            std = expected.pow(2).mean().sqrt().item()
            assert relative_deviation(fresh[name], std) < 7, name  # both are estimates


@torch.no_grad()
def test_fresh_weights_at_lower_ranks_follow_the_formulas(tiny_config):
    config = tiny_config(
        **WIDE,
        num_layers=2,
        num_decoder_layers=2,
        attention_ranks={
            "encoder_self": [{"qk": 5, "vo": 9}, {"latent": 12, "query": 7, "output": 10}],
            "cross": [{"latent": 12, "query": None, "output": None}] * 2,
        },
        feed_forward_ranks={"encoder": [{"width": 40, "wi": 8, "wo": None}, {"width": 96, "wi": None, "wo": 16}]},
    )
    model = LowRankT5ForConditionalGeneration(config)
    encoder, decoder = model.encoder.block, model.decoder.block
    per_head, latent = encoder[0].layer[0].SelfAttention, encoder[1].layer[0].SelfAttention
    dense_sides, thin_wi, thin_wo = decoder[0].layer[1].EncDecAttention, encoder[0].layer[1], encoder[1].layer[1]
    expected = {
        per_head.q.weight: (64 * 5) ** -0.5,
        per_head.k.weight: 64**-0.5,
        per_head.v.weight: 64**-0.5,
        per_head.o.weight: (4 * 9) ** -0.5,
        per_head.relative_attention_bias.weight: 64**-0.5,
        latent.latent.weight: 64**-0.5,
        latent.query_sketch.weight: 64**-0.5,
        latent.q.weight: (7 * 12) ** -0.5,
        latent.o.weight: (4 * 12) ** -0.5,
        latent.output_sketch.weight: 10**-0.5,
        dense_sides.q.weight: (64 * 12) ** -0.5,
        dense_sides.o.weight: (4 * 12) ** -0.5,
        thin_wi.DenseReluDense.wi.down.weight: 64**-0.5,
        thin_wi.DenseReluDense.wi.up.weight: 8**-0.5,
        thin_wi.DenseReluDense.wo.weight: 40**-0.5,
        thin_wo.DenseReluDense.wo.down.weight: 96**-0.5,
        thin_wo.DenseReluDense.wo.up.weight: 16**-0.5,
    }
    for weight, std in expected.items():
        assert relative_deviation(weight, std) < 5, (weight.shape, std)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@torch.no_grad()
def test_a_fresh_layer_of_any_rank_answers_as_loudly_as_a_dense_one(tiny_config, entry):
    """Mean squares, over many layers and inputs, of the logits and of the output for a single key: 1 in a fresh T5."""
    config = tiny_config(
        d_model=32, num_heads=8, num_layers=60, num_decoder_layers=1, attention_ranks={"encoder_self": [entry] * 60}
    )
    model = LowRankT5EncoderModel(config)
    logits, outputs = [], []
    for block in model.encoder.block:
        layer = block.layer[0].SelfAttention
        x, y = torch.randn(1, 50, 32), torch.randn(1, 50, 32)  # of its own: the error is that of independent draws
        key, value = layer.project_key_value(y)
        logits.append((layer.project_query(x) @ key.mT).pow(2).mean())
        mixed = layer.cached_value(key, value).expand(-1, layer.n_heads, -1, -1)
        outputs.append(layer.project_output(mixed.transpose(1, 2).flatten(2)).pow(2).mean())
    for measured in (torch.stack(logits), torch.stack(outputs)):
        error = measured.std() / len(measured) ** 0.5
        assert abs(measured.mean() - 1) < 4 * error
        assert error < 0.25


def test_construction_is_seeded_and_leaves_nothing_uninitialised(mixed_config):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(dict(LowRankT5ForConditionalGeneration(copy.deepcopy(mixed_config)).named_parameters()))
    first, same, other = models
    for name, parameter in first.items():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, same[name]), name
        if "layer_norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert not torch.equal(parameter, other[name]), name
            # nn.Linear's and nn.Embedding's own draws, or those of a module without rules of T5's, are near 1
            assert (parameter.std() > 0.8) == (name == "shared.weight"), name


def test_a_tensor_missing_from_a_checkpoint_is_drawn_afresh(mixed_model):
    """Models are built on the meta device when loading: what the file lacks must not stay memory as it was found."""
    state = mixed_model.state_dict()
    missing = {
        "encoder.block.1.layer.0.SelfAttention.latent.weight": D_MODEL**-0.5,
        "decoder.block.0.layer.2.DenseReluDense.wi.up.weight": 5**-0.5,
    }
    kept = {name: tensor for name, tensor in state.items() if name not in missing}
    model, report = LowRankT5ForConditionalGeneration.from_pretrained(
        None, config=mixed_model.config, state_dict=kept, output_loading_info=True
    )
    assert set(report["missing_keys"]) == missing.keys()
    for name, tensor in model.state_dict().items():
        if name in missing:
            assert not torch.equal(tensor, state[name])
            assert relative_deviation(tensor, missing[name]) < 4
        else:
            assert torch.equal(tensor, state[name]), name


# Saving and loading


def assert_equal_models(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert type(found) is type(expected)
    assert found.config.attention_ranks == expected.config.attention_ranks
    assert found.config.feed_forward_ranks == expected.config.feed_forward_ranks
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    [
        (LowRankT5Model, AutoModel),
        (LowRankT5EncoderModel, AutoModel),
        (LowRankT5EncoderModel, AutoModelForTextEncoding),
        (LowRankT5ForConditionalGeneration, AutoModelForSeq2SeqLM),
    ],
)
@pytest.mark.parametrize("max_shard_size", ["5GB", "2KB"])
def test_auto_classes_load_what_was_saved(tmp_path, mixed_config, model_class, auto_class, max_shard_size):
    model = randomise(model_class(mixed_config))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "2KB")
    again = auto_class.from_pretrained(tmp_path)
    assert_equal_models(again, model)
    again.save_pretrained(tmp_path / "again")
    assert_equal_models(auto_class.from_pretrained(tmp_path / "again"), model)
    assert not again.training


def test_auto_classes_build_from_a_configuration(mixed_config):
    for model_class in (LowRankT5Model, LowRankT5EncoderModel):
        named = copy.deepcopy(mixed_config)
        named.architectures = [model_class.__name__]  # as every saved configuration says
        assert type(AutoModel.from_config(named)) is model_class
    assert type(AutoModelForSeq2SeqLM.from_config(mixed_config)) is LowRankT5ForConditionalGeneration
    assert type(AutoModelForTextEncoding.from_config(mixed_config)) is LowRankT5EncoderModel


@torch.no_grad()
def test_a_part_of_a_checkpoint_loads_as_a_smaller_model(tmp_path, mixed_model):
    mixed_model.save_pretrained(tmp_path)
    inputs = tokens(2, 9)
    encoder, report = LowRankT5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    expected = mixed_model.encoder(inputs).last_hidden_state
    assert_close(encoder(inputs).last_hidden_state, expected, rtol=0, atol=0)
    assert_close(AutoModelForTextEncoding.from_pretrained(tmp_path)(inputs)[0], expected, rtol=0, atol=0)
    bare = LowRankT5Model.from_pretrained(tmp_path)
    found = bare(input_ids=inputs, decoder_input_ids=inputs)
    expected = mixed_model(input_ids=inputs, decoder_input_ids=inputs, output_hidden_states=True)
    assert_close(found.last_hidden_state, expected.decoder_hidden_states[-1], rtol=0, atol=0)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_tied_weights_stay_tied(tmp_path, tiny_config, mixed_ranks, tie_word_embeddings):
    config = tiny_config(**mixed_ranks, tie_word_embeddings=tie_word_embeddings)
    model = LowRankT5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
        tied = (each.shared, each.lm_head, each.encoder.embed_tokens, each.decoder.embed_tokens)
        assert len({id(module.weight) for module in tied}) == 1
        assert each.config.scale_decoder_outputs == tie_word_embeddings
    # the decoder's output is scaled by 1 / sqrt(d_model) with tie_word_embeddings, and not otherwise
    inputs = {"input_ids": tokens(1, 5), "decoder_input_ids": tokens(1, 3)}
    output = model(**inputs, output_hidden_states=True)
    scale = D_MODEL**-0.5 if tie_word_embeddings else 1.0
    assert_close(output.logits, scale * output.decoder_hidden_states[-1] @ model.shared.weight.T)


def test_the_generation_config_comes_along(tmp_path, mixed_model):
    mixed_model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, max_new_tokens=3)
    mixed_model.save_pretrained(tmp_path)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 3


def disk_map(where: str) -> dict[str, str | int]:
    """Blocks alternately in memory and on disk; embeddings together in memory."""
    devices: dict[str, str | int] = dict.fromkeys(
        ["shared", "lm_head", "encoder.embed_tokens", "decoder.embed_tokens"], "cpu"
    )
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        devices |= {f"{stack}.block.{i}": where if i % 2 == 0 else "cpu" for i in range(depth)}
        devices |= {f"{stack}.final_layer_norm": "cpu", f"{stack}.dropout": "cpu"}
    return devices


@pytest.mark.parametrize("device_map", ["auto", disk_map("disk"), {"": "disk"}], ids=["auto", "blocks", "all"])
@torch.no_grad()
def test_device_maps_and_disk_offload_change_nothing(tmp_path, mixed_model, device_map):
    mixed_model.save_pretrained(tmp_path / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6)}
    on_device = {name: ids.to(model.device) for name, ids in inputs.items()} if device_map == "auto" else inputs
    assert_close(model(**on_device).logits.cpu(), mixed_model(**inputs).logits)
    if device_map != "auto":
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
        expected = mixed_model.generate(inputs["input_ids"], **GENERATION)
        assert torch.equal(model.generate(inputs["input_ids"], **GENERATION), expected)


def test_blocks_are_not_split_across_devices(mixed_model):
    assert set(mixed_model._no_split_modules) == {"LowRankT5Block"}
    assert type(mixed_model.encoder.block[0]).__name__ == "LowRankT5Block"


# Arguments


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": tokens(2, 9)}
    return inputs if isinstance(model, LowRankT5EncoderModel) else inputs | {"decoder_input_ids": tokens(2, 5)}


@pytest.mark.parametrize(
    "model_class", [LowRankT5ForConditionalGeneration, LowRankT5Model, LowRankT5EncoderModel], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("name", ["head_mask", "past_key_value", "positions", "output_attention"])
def test_a_keyword_that_is_not_used_is_refused(mixed_config, model_class, name):
    model = model_class(mixed_config)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        model(**inputs_of(model), **{name: None})
    for module in model.modules():  # as deep as the layers, whatever upstream may come to pass down
        if isinstance(module, (LowRankT5Stack, LowRankT5Block, LowRankAttention, LowRankFeedForward)):
            assert not any(
                parameter.kind is parameter.VAR_KEYWORD
                for parameter in inspect.signature(module.forward).parameters.values()
            )


def test_generate_refuses_a_keyword_that_the_model_does_not_use(mixed_model):
    with pytest.raises(ValueError, match="head_mask"):
        mixed_model.generate(tokens(2, 9), head_mask=torch.ones(2), **GENERATION)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_a_cache_is_understood_by_both_of_its_names(mixed_model, name):
    """One token at a time gives what all at once do, in every version."""
    context, target = tokens(2, 9), tokens(2, 4)
    expected = mixed_model(input_ids=context, decoder_input_ids=target, use_cache=False)
    cache, logits = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    for step in range(4):
        old = name == "past_key_values" and CACHE_FIELD == "cache"
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated") if old else nullcontext():
            output = mixed_model(input_ids=context, decoder_input_ids=target[:, step : step + 1], **{name: cache})
        assert output[CACHE_FIELD] is cache
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), expected.logits)
    assert cache.get_seq_length() == 4
    with pytest.warns(UserWarning, match="`past_key_values` is ignored"):
        output = mixed_model(
            input_ids=context, decoder_input_ids=target, cache=cache, past_key_values=copy.deepcopy(cache)
        )
    assert output[CACHE_FIELD] is cache


@torch.no_grad()
def test_an_own_mask_of_four_dimensions_says_all(mixed_model):
    """(B, 1, S, T), boolean or added to the logits: here one that hides nothing, from a decoder that would else hide what comes."""
    inputs = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 5)}
    causal = torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5)
    expected = mixed_model(**inputs).logits
    for mask in (causal, torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)):
        assert_close(mixed_model(**inputs, decoder_attention_mask=mask).logits, expected)
    open_mask = torch.ones_like(causal)
    found = mixed_model(**inputs, decoder_attention_mask=open_mask).logits
    assert_close(mixed_model(**inputs, decoder_attention_mask=open_mask.float() - 1).logits, found)
    assert (found - expected)[:, 0].abs().max() > 1e-3


def test_the_stack_says_what_is_wrong(mixed_model):
    embedded = torch.randn(2, 9, D_MODEL)
    for arguments in ({}, {"input_ids": tokens(2, 9), "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            mixed_model.encoder(**arguments)
    for arguments in ({"use_cache": True}, {"cache": DynamicCache()}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="An encoder has no cache"):
            mixed_model.encoder(input_ids=tokens(2, 9), **arguments)
    mixed_model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id must be set"):
        mixed_model(input_ids=tokens(2, 9), labels=tokens(2, 5))


@torch.no_grad()
def test_embeddings_may_be_given_in_place_of_tokens(mixed_model):
    context, target = tokens(2, 9), tokens(2, 5)
    expected = mixed_model(input_ids=context, decoder_input_ids=target).logits
    embed = mixed_model.get_input_embeddings()
    found = mixed_model(inputs_embeds=embed(context), decoder_inputs_embeds=embed(target))
    assert torch.equal(found.logits, expected)
    as_tuple = mixed_model(inputs_embeds=embed(context), decoder_inputs_embeds=embed(target), return_dict=False)
    assert torch.equal(as_tuple[0], expected)
    encoded = mixed_model.encoder(context, return_dict=False)
    assert torch.equal(mixed_model(encoder_outputs=encoded, decoder_input_ids=target).logits, expected)


def test_the_relations_that_libraries_ask_for(mixed_config):
    """peft, accelerate, Trainer and Chronos ask for these, and for no class of transformers' T5 but its configuration."""
    model = LowRankT5ForConditionalGeneration(mixed_config)
    assert isinstance(mixed_config, T5Config)
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, GenerationMixin)
    assert model.can_generate()
    assert model.get_encoder() is model.encoder
    assert model.get_decoder() is model.decoder
    assert model.get_output_embeddings() is model.lm_head
    assert not any(cls.__module__.startswith("transformers.models") for cls in type(model).__mro__)
    private = {
        found.group(1)
        for path in Path(hf_lowrank.__file__).parent.rglob("*.py")
        for found in re.finditer(r"^\s*(?:from|import) (transformers\.models\.[\w.]+)", path.read_text(), re.M)
    }
    assert private == set()


@given(
    buckets=st.sampled_from([4, 8, 32, 64]),
    furthest=st.integers(33, 400),
    bidirectional=st.booleans(),
    past=st.integers(0, 50),
)
def test_the_position_bias_is_t5s_at_every_distance(buckets, furthest, bidirectional, past):
    config = T5Config(
        **{**SHAPE, "relative_attention_num_buckets": buckets, "relative_attention_max_distance": furthest}
    )
    stock = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    stock.is_decoder = not bidirectional
    found = relative_position_bias(
        stock.relative_attention_bias,
        distances(1, 600, past),
        bidirectional=bidirectional,
        max_distance=furthest,
    )
    expected = stock.compute_bias(600, 600)[:, :, past : past + 1]
    assert torch.equal(found, expected)
