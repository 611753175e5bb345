"""The measures agree with direct ones, every family can be measured, and the words follow from the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chronos.chronos2 import Chronos2CoreConfig, Chronos2Model
from chronos.chronos_bolt import ChronosBoltModelForForecasting
from chronos_models import BOLT, BOLT_RANKS, CHRONOS2, CHRONOS2_RANKS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, T5Config, T5EncoderModel, T5ForConditionalGeneration
from typer.testing import CliRunner

from hf_lowrank import (
    LowRankChronos2Config,
    LowRankChronos2Model,
    LowRankChronosBoltConfig,
    LowRankChronosBoltModelForForecasting,
    LowRankT5Config,
    LowRankT5EncoderModel,
    LowRankT5ForConditionalGeneration,
    summarize,
)
from hf_lowrank.analysis.activations import ActivationSums
from hf_lowrank.analysis.analyze import analyze, load_transformer
from hf_lowrank.analysis.attention_layers import find_attention
from hf_lowrank.analysis.model_inputs import draw_windows, input_batches, mix
from hf_lowrank.analysis.report import tables
from hf_lowrank.analysis.spectra import Spectrum, StateSum, head_alignment, joint_tail, product_spectra
from hf_lowrank.checkpoints.dense import as_full_rank
from hf_lowrank.checkpoints.loading import checkpoint_path
from hf_lowrank.cli.app import app
from hf_lowrank.published_figures import EPSILONS

SEEDS = st.integers(0, 2**32 - 1)
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
LAGGED = {
    "prediction_length": 8,
    "context_length": 32,
    "d_model": 16,
    "num_time_features": 1,
    "lags_sequence": [1, 2, 3],
    **{f"{stack}_layers": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 24 for stack in ("encoder", "decoder")},
}


def tokens(*lengths: int) -> list[dict[str, torch.Tensor]]:
    """One batch of random texts, padded to the longest."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 64, mask.shape, generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids * mask, "attention_mask": mask.long()}]


def build(name: str) -> tuple[PreTrainedModel, Any]:
    """A tiny random model of a family, and data for it."""
    t = transformers
    text = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    makers: dict[str, tuple[Callable[[], PreTrainedModel], Any]] = {
        "chronos-bolt": (lambda: ChronosBoltModelForForecasting(T5Config(**BOLT)), "synthetic"),
        "chronos-2": (lambda: Chronos2Model(Chronos2CoreConfig(**CHRONOS2)), "synthetic"),
        "low-rank bolt": (
            lambda: LowRankChronosBoltModelForForecasting(LowRankChronosBoltConfig(**BOLT, **BOLT_RANKS)),
            "synthetic",
        ),
        "low-rank chronos-2": (
            lambda: LowRankChronos2Model(LowRankChronos2Config(**CHRONOS2, **CHRONOS2_RANKS)),
            "synthetic",
        ),
        "gpt2": (
            lambda: t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_embd=16, n_head=2, **text)),
            tokens(20, 12),
        ),
        "bert": (lambda: t.BertModel(t.BertConfig(**SMALL, vocab_size=64)), tokens(20, 12)),
        "llama": (
            lambda: t.LlamaModel(t.LlamaConfig(**SMALL | {"num_attention_heads": 4}, num_key_value_heads=2, **text)),
            tokens(20, 12),
        ),
        "patchtst": (
            lambda: t.PatchTSTForPrediction(
                t.PatchTSTConfig(
                    num_hidden_layers=2,
                    d_model=16,
                    num_attention_heads=2,
                    ffn_dim=24,
                    context_length=64,
                    patch_length=8,
                    patch_stride=8,
                    num_input_channels=3,
                )
            ),
            "synthetic",
        ),
        "timesfm": (
            lambda: t.TimesFmModelForPrediction(t.TimesFmConfig(**SMALL, head_dim=8, context_length=64)),
            "synthetic",
        ),
        "informer": (lambda: t.InformerForPrediction(t.InformerConfig(**LAGGED)), "synthetic"),
        "autoformer": (lambda: t.AutoformerForPrediction(t.AutoformerConfig(**LAGGED)), "synthetic"),
    }
    make, data = makers[name]
    torch.manual_seed(0)
    return make(), data


FAMILIES = (
    "chronos-bolt",
    "chronos-2",
    "low-rank bolt",
    "low-rank chronos-2",
    "gpt2",
    "bert",
    "llama",
    "patchtst",
    "timesfm",
    "informer",
    "autoformer",
)


# --- numbers -----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, rows=st.integers(1, 12), columns=st.integers(1, 12), rate=st.floats(0.05, 1))
def test_spectra_agree_with_a_direct_svd(seed: int, rows: int, columns: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * rate ** torch.arange(columns)
    spectrum = Spectrum.of_matrix(matrix)
    direct = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum.values, direct, atol=1e-7 * direct[0])
    for epsilon in EPSILONS:
        assert spectrum.epsilon_rank(epsilon) == (direct / direct[0] >= epsilon).sum()


def test_ranks_of_spectra_that_are_known() -> None:
    flat, single, none = Spectrum(np.ones(7)), Spectrum(np.array([2.0, 0.0, 0.0])), Spectrum(np.zeros(3))
    assert flat.stable_rank == pytest.approx(7)
    assert flat.effective_rank == pytest.approx(7)
    assert (flat.epsilon_rank(1e-2), single.epsilon_rank(1e-2), none.epsilon_rank(1e-2)) == (7, 1, 0)
    assert (single.stable_rank, single.effective_rank) == (1, 1)
    assert (none.stable_rank, none.effective_rank, joint_tail([none], 1)) == (0, 0, 0)
    assert Spectrum(np.array([1.0, 1e-2])).epsilon_rank(1e-2) == 2  # the limit itself counts
    assert joint_tail([Spectrum(np.array([3.0, 4.0, 0.0])[::-1].copy())], 3) == 0
    assert joint_tail([Spectrum(np.array([4.0, 3.0]))], 1) == pytest.approx(0.6)


@pytest.mark.parametrize("count", [5, 40])
def test_a_running_sum_is_the_sum_of_all_tokens(count: int) -> None:
    rows = torch.randn(count, 8) + 3
    total = StateSum()
    for part in rows.split([2, 0, count - 2]):
        total.add(part)
    direct, centred = (np.linalg.svd(x.double().numpy(), compute_uv=False) for x in (rows, rows - rows.mean(0)))
    np.testing.assert_allclose(total.spectrum().values, direct, rtol=1e-6)
    found = total.spectrum(is_centred=True).values
    np.testing.assert_allclose(found, centred, atol=1e-5)
    assert (total.count, total.largest) == (count, pytest.approx(float(rows.norm(dim=1).max())))
    basis = total.leading(2)
    left = np.linalg.svd(rows.double().numpy())[2][:2]
    np.testing.assert_allclose(np.abs(left @ basis.numpy()), np.eye(2), atol=1e-6)


@pytest.mark.parametrize("count", [5, 40])
def test_equal_tokens_have_no_deviations_but_rounding_errors(count: int) -> None:
    total = StateSum()
    total.add(torch.randn(1, 8) * (1 + 1e-7 * torch.randn(count, 1)))
    assert total.spectrum(is_centred=True).effective_rank == 0
    assert total.spectrum().epsilon_rank(1e-2) == 1


def test_a_state_that_is_not_finite_is_an_error() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            StateSum().add(torch.tensor([[1.0, value]]))


def test_products_of_heads_have_the_spectra_of_the_large_matrices() -> None:
    left, right = torch.randn(3, 4, 10, dtype=torch.float64), torch.randn(3, 4, 10, dtype=torch.float64)
    found = product_spectra(left @ left.mT, right @ right.mT)
    for spectrum, a, b in zip(found, left, right):
        direct = torch.linalg.svdvals(a.T @ b)[:4].numpy()
        np.testing.assert_allclose(spectrum.values, direct, rtol=1e-6)


def test_alignment_tells_shared_subspaces_from_separate_and_random_ones() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]

    def aligned(rows: torch.Tensor, rank: int = 4) -> Any:
        stacked = rows.flatten(0, 1)
        return head_alignment(stacked @ stacked.T, len(rows), dimension=64, rank=rank)

    mixing = torch.randn(3, 4, 4, dtype=torch.float64)
    shared = aligned(mixing @ basis[:4])
    assert (shared.cosine, shared.shared) == (pytest.approx(1), pytest.approx(1))
    separate = aligned(mixing @ basis[:12].unflatten(0, (3, 4)))
    assert separate.cosine == pytest.approx(0)
    assert separate.shared < 0
    random = aligned(torch.randn(12, 16, 64, dtype=torch.float64), rank=16)
    assert random.random == 0.25
    assert random.cosine == pytest.approx(0.25, abs=0.02)
    lower = aligned(torch.randn(3, 4, 1, dtype=torch.float64) * torch.randn(3, 1, 64, dtype=torch.float64))
    assert lower.rank == 1  # no more than the heads have
    assert aligned(torch.randn(1, 4, 64, dtype=torch.float64)) is None
    assert aligned(torch.zeros(2, 4, 64, dtype=torch.float64)) is None


# --- the reference checkpoint ------------------------------------------------------------------------------------


def test_weights_of_the_reference_agree_with_an_svd_of_its_file() -> None:
    saved = load_file(Path(checkpoint_path("reference")) / "model.safetensors")
    analysis = analyze("reference", None)
    assert [layer.name for layer in analysis.attention[:2]] == ["encoder_self.0", "encoder_self.1"]
    paths = {
        layer.name: layer.path
        for layer in find_attention(T5ForConditionalGeneration.from_pretrained(checkpoint_path("reference")))
    }

    def ranks(matrix: np.ndarray) -> list[int]:
        values = np.linalg.svd(matrix, compute_uv=False)
        return [int((values / values[0] >= epsilon).sum()) for epsilon in EPSILONS]

    for layer in analysis.attention:
        q, k, v, o = (saved[f"{paths[layer.name]}.{part}.weight"].double().numpy() for part in "qkvo")
        n = layer.num_heads
        for part, matrix in zip(("query", "key", "value", "output"), (q, k, v, o)):
            assert [layer.weights[part].epsilon_rank(epsilon) for epsilon in EPSILONS] == ranks(matrix)
        for head in range(n):
            rows = slice(head * 32, (head + 1) * 32)
            products = {"query": q[rows], "qk": q[rows].T @ k[rows], "vo": o[:, rows] @ v[rows], "output": o[:, rows]}
            for part, matrix in products.items():
                found = layer.heads[part][head]
                assert [found.epsilon_rank(epsilon) for epsilon in EPSILONS] == ranks(matrix)
    vocabulary = [analysis.embedding["vocabulary"].epsilon_rank(epsilon) for epsilon in EPSILONS]
    assert vocabulary == ranks(saved["shared.weight"].double().numpy())


def test_the_reference_is_answered_plainly() -> None:
    analysis = analyze("reference", num_series=3)
    assert len(analysis.verdict) == 5
    decay = analysis.verdict[3]
    assert decay.startswith("Do early spectra decay faster than late ones: ")
    assert decay.split(": ")[1].startswith(("yes", "no", "in part"))
    assert all(bound.measured <= bound.limit for bound in analysis.bounds)


# --- hidden states, heads ----------------------------------------------------------------------------------------


def test_hidden_states_are_those_that_transformers_returns(chronos_t5: PreTrainedModel) -> None:
    analysis = analyze(chronos_t5, num_series=11)
    settings = {"num_series": 11, "context_length": None, "seed": 0}
    seen: dict[str, list[torch.Tensor]] = {}
    for feed in input_batches(chronos_t5, "synthetic", **settings):
        with torch.no_grad():
            output = chronos_t5(**feed.arguments, output_hidden_states=True, use_cache=False)
        for stack in ("encoder", "decoder"):
            for i, states in enumerate(output[f"{stack}_hidden_states"][:-1]):
                seen.setdefault(f"{stack}_self.{i}", []).append(states.flatten(0, 1))
    found = {state.name: state for state in analysis.states}
    assert set(seen) <= set(found)
    for name, states in seen.items():
        matrix = torch.cat(states).double()
        assert found[name].tokens == len(matrix)
        direct = torch.linalg.svdvals(matrix).numpy()
        np.testing.assert_allclose(found[name].spectrum.values, direct, atol=1e-5 * direct[0])
        for epsilon in EPSILONS:
            assert found[name].spectrum.epsilon_rank(epsilon) == (direct / direct[0] >= epsilon).sum()


def test_the_spectra_on_data_carry_the_energy_of_logits_and_outputs(chronos_t5: PreTrainedModel) -> None:
    layers = find_attention(chronos_t5)
    batches = input_batches(chronos_t5, "synthetic", num_series=2, context_length=16, seed=0)[:1]
    activations = ActivationSums(chronos_t5, layers)
    layer = next(layer for layer in layers if layer.name == "encoder_self.1")
    seen: dict[str, torch.Tensor] = {}
    handles = [
        getattr(layer, part).register_forward_hook(
            lambda _, inputs, output, part=part: seen.update({part: (inputs[0], output)})
        )
        for part in ("query", "key", "output")
    ]
    activations.run(batches)
    for handle in handles:
        handle.remove()
    from hf_lowrank.analysis.structures import attention_structure

    structure = attention_structure(layer, activations)
    queries, keys = seen["query"][1].double(), seen["key"][1].double()
    keys = (keys - keys.mean(1, keepdim=True)).flatten(0, 1)
    mixed = seen["output"][0].flatten(0, 1).double()
    for head in range(layer.num_heads):
        part = slice(head * 8, (head + 1) * 8)
        logits = queries.flatten(0, 1)[:, part] @ keys[:, part].T
        outputs = mixed[:, part] @ layer.output.weight.double()[:, part].T
        for name, matrix in (("logits", logits), ("outputs", outputs)):
            direct = torch.linalg.svdvals(matrix.detach())[:8].numpy()
            np.testing.assert_allclose(structure.heads[name][head].values, direct, atol=1e-5 * direct[0])


def test_padding_is_left_out(dense_t5: Callable[..., PreTrainedModel]) -> None:
    model, (batch,) = dense_t5(), tokens(20, 7)
    analysis = analyze(model, [batch])
    counts = {state.name: state.tokens for state in analysis.states}
    assert counts["encoder_self.0"] == 27
    assert counts["decoder_self.0"] == 27
    single = [
        {name: value[1:, :7] for name, value in batch.items()},
        {name: value[:1] for name, value in batch.items()},
    ]
    alone = analyze(model, single)
    for padded, other in zip(analysis.states, alone.states):
        np.testing.assert_allclose(
            padded.spectrum.values, other.spectrum.values, rtol=1e-3, atol=1e-3 * other.spectrum.norm
        )
    for padded, other in zip(analysis.attention, alone.attention):
        for one, two in zip(padded.heads["logits"], other.heads["logits"]):
            np.testing.assert_allclose(one.values, two.values, atol=1e-3 * two.norm)


# --- any model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured_and_left_as_it_was(name: str) -> None:
    model, data = build(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    implementations = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    analysis = analyze(model, data, num_series=16)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert after == implementations
    assert len(analysis.verdict) == 5
    assert analysis.states[-1].name.endswith("_output")
    for layer in analysis.attention:
        assert {"logits", "outputs", "qk", "vo"} <= set(layer.heads)
        assert {len(layer.heads[part]) for part in ("qk", "vo", "logits", "outputs")} == {layer.num_heads}
        assert 0 < layer.kept(1e-3) <= layer.parameters
        assert layer.kept(0.5) <= layer.kept(1e-3)
    for bound in analysis.bounds:
        assert bound.measured <= bound.limit
        assert bound.details.get("violation", 0) <= 1 + 1e-6
    kinds = {bound.kind for bound in analysis.bounds}
    assert kinds == {
        "chronos-bolt": {"embedding", "attention", "flow"},
        "chronos-2": {"embedding", "attention", "flow"},
        "low-rank bolt": {"embedding", "attention", "flow"},
        "low-rank chronos-2": {"embedding", "attention", "flow"},
        "timesfm": {"embedding"},
    }.get(name, set())
    assert tables(analysis)
    json.dumps(analysis.to_dict(), allow_nan=False)


def test_projections_compute_what_their_modules_do() -> None:
    """q, k and v of the weights by head are what the modules make of an input, fused or not."""
    for name in ("gpt2", "bert", "llama", "informer"):
        model, _ = build(name)
        for layer in find_attention(model):
            states = torch.randn(3, 16)
            weights = layer.weights()
            for part in ("query", "key", "value"):
                module = getattr(layer, part)
                zero = torch.zeros(1, 16)
                found = layer.split(module(states) - module(zero), part).detach()  # less its bias
                wanted = (states.double() @ getattr(weights, part).flatten(0, 1).T).float()
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_latent_form_is_read_as_the_product_it_computes(
    tiny_config: Callable[..., LowRankT5Config], mixed_ranks: Any
) -> None:
    model = LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks)).eval()
    for layer in find_attention(model):
        if not layer.is_latent:
            continue
        module, weights = layer.module, layer.weights()
        x, y = torch.randn(1, 5, 16), torch.randn(1, 4, 16)
        logits = module.project_query(x) @ module.project_key_value(y)[0].mT  # (1, n, 5, 4)
        wanted = x.double() @ (weights.query.mT @ weights.key) @ y.double().mT
        torch.testing.assert_close(logits[0].double(), wanted.double(), atol=1e-5, rtol=1e-4)
        assert layer.num_parameters == sum(
            weight.numel() for name, weight in module.named_parameters() if "bias" not in name
        )
        assert layer.num_key_value_heads == 1


def test_what_is_kept_is_what_a_low_rank_model_of_these_ranks_has(
    dense_t5: Callable[..., PreTrainedModel], tiny_config: Callable[..., LowRankT5Config]
) -> None:
    model = dense_t5()
    with torch.no_grad():  # one layer whose heads have rank one
        for part in ("q", "k", "v"):
            weight = getattr(model.encoder.block[1].layer[0].SelfAttention, part).weight
            weight.copy_(torch.ones(16, 1) @ torch.randn(1, 16))
    analysis = analyze(model, None)
    assert analysis.verdict[1].startswith("Which first: encoder_self.1 (qk 1/8, vo 1/8)")
    table: dict[str, list[dict[str, int]]] = {}
    for layer in analysis.attention:
        table.setdefault(layer.kind, []).append(layer.ranks(0.3))
    sizes = summarize(tiny_config(attention_ranks=table))
    kept = sum(layer.kept(0.3) for layer in analysis.attention)
    assert kept == sizes.total("parameters", "encoder_self", "decoder_self", "cross")
    assert analysis.kept(0.3) == pytest.approx(sizes.attention_ratio)
    again = analyze(LowRankT5ForConditionalGeneration(tiny_config(attention_ranks=table)), None)
    assert again.attention_parameters == kept


def test_an_encoder_alone_reads_series(dense_t5: Callable[..., PreTrainedModel], chronos_t5: PreTrainedModel) -> None:
    model = dense_t5(T5EncoderModel)
    model.config.chronos_config = chronos_t5.config.chronos_config
    names = [state.name for state in analyze(model, num_series=4).states]
    assert names[0] == "encoder_self.0"
    assert names[-1] == "encoder_output"


# --- data --------------------------------------------------------------------------------------------------------


def test_one_variate_has_no_use_for_the_logits_of_a_group() -> None:
    model, _ = build("chronos-2")
    analysis = analyze(model, num_series=8, variates=(1, 3, 8))
    assert {row.variates for row in analysis.variates} == {1, 3, 8}
    for row in analysis.variates:
        # Keys are centred among the variates, and of one nothing is left.
        energy = max(head.norm for head in row.logits)
        assert (energy == 0) == (row.variates == 1)
    assert [table.title for table in tables(analysis) if "variates" in str(table.title)]


def test_mixed_series_have_causes_in_common() -> None:
    series = np.random.default_rng(0).normal(size=(16, 400)).astype(np.float32)
    correlations = [
        np.abs(np.corrcoef(values.reshape(2, 8, -1)[0]) - np.eye(8)).mean()
        for values in (series, mix(series, 8, seed=0))
    ]
    assert correlations[1] > 3 * correlations[0]
    assert mix(series, 8, seed=0).shape == series.shape


def test_series_of_the_user_are_windows_without_gaps() -> None:
    series = [np.arange(50.0), np.where(np.arange(30) % 7 == 3, np.nan, np.arange(30.0))]
    found = draw_windows(series, 9, 20, seed=0)
    assert len(found) == 9
    for values in found:
        assert len(values) == 20
        np.testing.assert_allclose(np.diff(values), 1)


def test_a_series_file_is_data(chronos_t5: PreTrainedModel, tmp_path: Path) -> None:
    rows = ["item_id,timestamp,target"]
    rows += [f"s{i},2024-01-{day:02},{np.sin(day * (i + 1)):.4f}" for i in range(3) for day in range(1, 29)]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    analysis = analyze(chronos_t5, str(tmp_path / "mine.csv"), num_series=6)
    assert analysis.settings["data"] == "given"
    assert analysis.states[0].tokens == 6 * (28 - 8 + 1)  # context and EOS


def test_texts_are_read_by_the_tokenizer_of_the_folder(
    dense_t5: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "rank": 2, "flows": 3, "upward": 4}
    raw = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    folder = tmp_path / "text"
    dense_t5().save_pretrained(folder)
    (tmp_path / "texts.txt").write_text("rank flows upward\n\nrank\n")
    with pytest.raises(ValueError, match="no tokenizer"):
        analyze(folder, str(tmp_path / "texts.txt"))
    tokenizer.save_pretrained(folder)
    assert analyze(folder, str(tmp_path / "texts.txt")).states[0].tokens == 4
    (tmp_path / "texts.txt").write_text("\n")
    with pytest.raises(ValueError, match="must have a text"):
        analyze(folder, str(tmp_path / "texts.txt"))


def test_a_checkpoint_is_loaded_as_the_class_that_it_names(tmp_path: Path) -> None:
    config = LowRankT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    model = LowRankT5EncoderModel(config)
    model.save_pretrained(tmp_path)
    assert type(load_transformer(tmp_path)[0]) is LowRankT5EncoderModel
    assert analyze(tmp_path, tokens(20, 12)).family == "lowrank_t5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0}, "epsilon must be in"),
        ({"variates": (1, 8)}, "variates needs a Chronos-2"),
        ({"data": [np.full(5, np.nan)]}, "no observed value"),
    ],
)
def test_a_bad_argument_is_named(chronos_t5: PreTrainedModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyze(chronos_t5, **arguments)


def test_what_cannot_be_measured_is_said(dense_t5: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match="reads no time series"):
        analyze(dense_t5())
    with pytest.raises(ValueError, match="known names"):
        find_attention(nn.Linear(2, 2))
    with pytest.raises(OSError, match="no folder and no Hub id"):
        analyze("/no/such/folder", None)
    with pytest.raises(ValueError, match="found a int"):
        analyze(3, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variates must be positive"):
        analyze(build("chronos-2")[0], variates=(0,))
    with pytest.raises(ValueError, match="series of 43 steps"):
        analyze(build("informer")[0], [np.arange(30.0)])
    broken = dense_t5()
    broken.decoder.block[1].layer[1].EncDecAttention.v.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"value weights of decoder\.block\.1\.layer\.1"):
        analyze(broken, None)


def test_a_model_that_fails_keeps_no_hooks(chronos_t5: PreTrainedModel) -> None:
    batches = input_batches(chronos_t5, "synthetic", num_series=1, context_length=16, seed=0)
    batches[0].arguments["input_ids"] = batches[0].arguments["input_ids"] + 10_000
    model = as_full_rank(chronos_t5)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        ActivationSums(model, find_attention(model)).run(batches)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}


# --- the command line --------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["analyze", *(str(argument) for argument in arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_json_and_draws(chronos_t5: PreTrainedModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chronos_t5.save_pretrained(tmp_path / "model")
    code, out, err = run(tmp_path / "model", "--num-series", 5, "--plots", tmp_path / "plots", "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert report["source"] == "model"
    assert [Path(path).name for path in report["plots"]] == ["spectra.png", "flow.png", "heads.png"]
    assert all(Path(path).stat().st_size > 10_000 for path in report["plots"])
    assert len(report["states"][0]["singular_values"]) == 16
    assert report["kept"]["0.01"]["per_head"] == pytest.approx(
        sum(layer["kept"]["0.01"] for layer in report["attention"]) / report["attention_parameters"]
    )


def test_the_command_tells_a_practitioner(chronos_t5: PreTrainedModel, tmp_path: Path) -> None:
    chronos_t5.save_pretrained(tmp_path / "model")
    code, out, err = run(tmp_path / "model", "--data", "none")
    assert code == 0, err
    text = " ".join(out.split())
    for words in ("How far:", "Which first:", "Flow of ranks: not measured", "Do early spectra decay", "Heads ("):
        assert words in text
    code, _, err = run(tmp_path / "model", "--variates", "1,x")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: variates must be integers")


def test_variates_are_drawn(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from hf_lowrank.analysis.plots import plot_analysis

    analysis = analyze(build("chronos-2")[0], num_series=8, variates=(1, 8))
    paths = plot_analysis(analysis, tmp_path)
    assert [path.name for path in paths] == ["spectra.png", "flow.png", "heads.png", "variates.png"]
    weights_alone = plot_analysis(analyze(build("gpt2")[0], None), tmp_path / "weights")
    assert len(weights_alone) == 3
    assert matplotlib.pyplot.get_fignums() == []
