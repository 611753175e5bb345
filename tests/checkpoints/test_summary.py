"""summarize: the numbers of the formulas, summed as they should be."""

from __future__ import annotations

import html
import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

import hf_lowrank
from hf_lowrank import LowRankT5EncoderModel, LowRankT5ForConditionalGeneration, summarize

KINDS = ("encoder_self", "decoder_self", "cross")


def test_full_rank_keeps_everything(tiny_config):
    summary = summarize(tiny_config())
    assert summary.attention_ratio == summary.cache_ratio == 1
    assert all(row.parameters == row.dense_parameters and row.ranks == row.dense_ranks for row in summary.rows)
    # q, k, v, o of 16 x 16 each; two matrices of 16 x 24; 2 + 3 + 3 attention and 2 + 3 feed-forward layers
    assert summary.total("parameters", *KINDS) == 8 * 4 * 16 * 16
    assert summary.total("parameters") == 8 * 4 * 16 * 16 + 5 * 2 * 16 * 24
    # keys and values of 2 heads of 8, in the decoder's 3 + 3 layers
    assert summary.total("cached_numbers") == 6 * 2 * 16


def test_every_row_counts_its_module(tiny_config, mixed_ranks):
    config = tiny_config(**mixed_ranks)
    model = LowRankT5ForConditionalGeneration(config)
    modules = {}
    for i, block in enumerate(model.encoder.block):
        modules["encoder_self", i] = block.layer[0].SelfAttention
        modules["encoder_feed_forward", i] = block.layer[1].DenseReluDense
    for i, block in enumerate(model.decoder.block):
        modules["decoder_self", i] = block.layer[0].SelfAttention
        modules["cross", i] = block.layer[1].EncDecAttention
        modules["decoder_feed_forward", i] = block.layer[2].DenseReluDense
    rows = summarize(config).rows
    assert {(row.kind, row.layer) for row in rows} == set(modules)
    for row in rows:
        named = modules[row.kind, row.layer].named_parameters()
        assert row.parameters == sum(p.numel() for name, p in named if "relative_attention_bias" not in name)


@torch.no_grad()
def test_the_cache_is_as_small_as_it_says(tiny_config, mixed_ranks):
    config = tiny_config(**mixed_ranks)
    model = LowRankT5ForConditionalGeneration(config).eval()
    output = model(input_ids=torch.randint(2, 64, (1, 7)), decoder_input_ids=torch.randint(2, 64, (1, 5)))
    caches = output.past_key_values
    for kind, cache, tokens in (
        ("decoder_self", caches.self_attention_cache, 5),
        ("cross", caches.cross_attention_cache, 7),
    ):
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert summarize(config).total("cached_numbers", kind) * tokens == held
    assert summarize(config).total("cached_numbers", "encoder_self") == 0


def test_totals_are_sums_of_rows(tiny_config, mixed_ranks):
    summary = summarize(tiny_config(**mixed_ranks))
    everything = sum(row.parameters for row in summary.rows)
    assert summary.total("parameters") == everything
    kinds = {row.kind for row in summary.rows}
    assert sum(summary.total("parameters", kind) for kind in kinds) == everything
    kept, dense = (summary.total(name, *KINDS) for name in ("parameters", "dense_parameters"))
    assert summary.attention_ratio == pytest.approx(kept / dense)
    assert 0 < summary.cache_ratio < 1


def test_an_encoder_has_no_decoder_rows(tiny_config):
    config = tiny_config(is_encoder_decoder=False)
    summary = summarize(config)
    assert {row.kind for row in summary.rows} == {"encoder_self", "encoder_feed_forward"}
    assert summary.cache_ratio == 0  # nothing is cached, before or after
    model = LowRankT5EncoderModel(config)
    assert summarize(model.config) == summary


def test_the_dictionary_is_json_and_in_bytes(tiny_config, mixed_ranks):
    summary = summarize(tiny_config(**mixed_ranks))
    found = summary.to_dict(bytes_per_number=2)
    assert json.loads(json.dumps(found)) == found
    assert found["totals"]["parameters"] == summary.total("parameters")
    assert found["totals"]["bytes"] == 2 * summary.total("parameters")
    assert found["totals"]["dense_cache_bytes_per_token"] == 2 * summary.total("dense_cached_numbers")
    assert len(found["layers"]) == len(summary.rows)


def test_a_summary_is_printed_as_a_line_a_layer(tiny_config, mixed_ranks):
    summary = summarize(tiny_config(**mixed_ranks))
    *lines, total = str(summary).splitlines()
    assert len(lines) == len(summary.rows)
    for line, row in zip(lines, summary.rows):
        assert line.startswith(f"{row.kind} {row.layer} ")
        assert f"{row.parameters:,} of " in line
        assert line.endswith(row.ranks_text)
    assert f"{summary.total('parameters'):,} of " in total


def test_the_representation_of_a_summary_is_one_line(tiny_config, mixed_ranks):
    text = repr(summarize(tiny_config(**mixed_ranks)))
    assert text.startswith("CompressionSummary(13 layers: ")
    assert "attention " in text
    assert "cache " in text
    assert len(text) < 120


def test_a_notebook_shows_every_changed_layer_and_how_the_model_was_made(tiny_config, mixed_ranks):
    source = "a<b>&c"
    made = {"policy": "ratio", "arguments": {"ratio": 0.5}, "source": source, "calibration": {"data": "3 series"}}
    config = tiny_config(**mixed_ranks, compression=made)
    model = LowRankT5ForConditionalGeneration(config).to(torch.bfloat16)
    summary = summarize(model)
    root = ET.fromstring(f"<div>{summary._repr_html_()}</div>")
    headings, *rows, total = [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]
    assert headings == ["layer", "ranks", "parameters", "share", "KiB", "cache B"]
    changed = [row for row in summary.rows if row.ranks != row.dense_ranks]
    assert [row[:2] for row in rows] == [[f"{row.kind} {row.layer}", row.ranks_text] for row in changed]
    assert [row[3] for row in rows] == [f"{row.parameters / row.dense_parameters:.1%}" for row in changed]
    assert total[:2] == ["all layers", f"{len(changed)} of {len(summary.rows)} changed"]
    (note,) = (part.text for part in root.iter("p"))
    assert f"{model.num_parameters():,} of " in note
    assert "MiB in bfloat16" in note
    assert note.endswith(f"Made from {source} by ratio=0.5, calibrated on 3 series.")
    assert source not in summary._repr_html_()
    assert html.escape(source) in summary._repr_html_()


def test_a_model_says_what_it_takes_and_a_configuration_what_its_layers_have(tiny_config, mixed_ranks):
    model = LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks))
    of_model, of_config = summarize(model), summarize(model.config)
    assert of_model.rows == of_config.rows
    assert of_config.size is None
    assert of_config.table().headings == ["layer", "ranks", "parameters", "share", "cache numbers"]
    size = of_model.size
    assert size.parameters == model.num_parameters()
    assert size.bytes == sum(parameter.nbytes for parameter in model.parameters())
    dense = LowRankT5ForConditionalGeneration(tiny_config())
    assert (size.dense_parameters, size.dense_bytes) == (dense.num_parameters(), 4 * dense.num_parameters())
    assert set(size.layers) == {row.name for row in of_model.rows}


def test_a_notebook_shows_a_model_as_its_table(tiny_config, mixed_ranks):
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactive.InteractiveShell.instance()
    try:
        hf_lowrank._show_as_tables(sys.modules["IPython"])
        model = LowRankT5ForConditionalGeneration(tiny_config(**mixed_ranks))
        shown, _ = shell.display_formatter.format(model)
        assert shown["text/html"] == summarize(model)._repr_html_()
    finally:
        interactive.InteractiveShell.clear_instance()
