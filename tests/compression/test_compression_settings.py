"""The settings of a compression: checked when they are made, the same by every way in."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import calibrate, compress_pretrained
from hf_lowrank.checkpoints.families import CHRONOS2, FAMILIES, T5
from hf_lowrank.compression.settings import BUDGETS, POLICIES, CompressionSettings, SettingsArguments

SHARES = st.floats(0.01, 1)
GOOD: list[dict[str, Any]] = [
    {"ratio": 0.25},
    {"total_ratio": 0.5, "max_cache_ratio": 0.25, "multiple_of": 8},
    {"epsilon": 0.01, "form": "latent", "calibration": None},
    {"schedule": (3, 0.27, "pow2")},
    {"ranks": {"cross": [{"qk": 1, "vo": 2}]}, "refit": False},
    {"uniform": 4, "form": {"cross": "latent"}, "feed_forward_ratio": 0.5, "seed": 3},
    {"ratio": 0.5, "method": "paper"},
    {"max_loss": 0.02, "target_speedup": "max", "backend": "openvino-bfloat16"},
]


def test_keywords_and_fields_are_the_same():
    names = [field.name for field in dataclasses.fields(CompressionSettings)]
    assert set(SettingsArguments.__annotations__) == set(names)
    assert set(POLICIES) <= set(names)
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompressionSettings(ratio=0.5).ratio = 1.0


@pytest.mark.parametrize("arguments", GOOD, ids=str)
def test_what_is_saved_is_read_back(tmp_path, arguments):
    settings = CompressionSettings(**arguments)
    settings.save(tmp_path / "settings.json")
    assert CompressionSettings.from_file(tmp_path / "settings.json") == settings
    assert list(tmp_path.iterdir()) == [tmp_path / "settings.json"]
    # What was not asked for is not written: a later default may be a better one.
    written = json.loads((tmp_path / "settings.json").read_text())
    assert written == json.loads(json.dumps(arguments))


@given(
    budgets=st.dictionaries(st.sampled_from(["total_ratio", "max_cache_ratio", "target_speedup"]), SHARES, min_size=1)
)
def test_budgets_go_together(budgets):
    settings = CompressionSettings(**budgets)
    assert settings.policy_arguments == budgets
    assert settings.policy == (next(iter(budgets)) if len(budgets) == 1 else "budgets")
    assert settings.has_budgets
    assert settings.covers_feed_forward == settings.has_feed_forward == (set(budgets) != {"max_cache_ratio"})


@given(first=st.sampled_from(POLICIES), second=st.sampled_from(["epsilon", "energy"]))
def test_rules_do_not(first, second):
    if first == second:
        return
    values = dict.fromkeys(("max_loss", *BUDGETS), 0.5) | {
        "epsilon": 0.1,
        "energy": 0.1,
        "uniform": 2,
        "schedule": (3, 0),
        "ranks": {},
    }
    message = (
        r"Give one rule for the ranks, found .*; only ratio, .* hold together|max_loss finds how small a model can be"
    )
    with pytest.raises(ValueError, match=message):
        CompressionSettings(**{first: values[first], second: values[second]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": None}, "Say how much to keep"),
        ({"ratio": 0.5, "total_ratio": 0.5}, "Give either ratio .* or total_ratio"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], found 1.5"),
        ({"ratio": True}, "ratio must be"),
        ({"schedule": 3}, r"schedule must be \(base_rank, rank_growth\)"),
        ({"schedule": (3, 0, "pow3")}, "the rounding must be 'ceil' or 'pow2', found 'pow3'"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of must be a positive integer"),
        ({"ratio": 0.5, "feed_forward_ratio": 2}, "feed_forward_ratio must be"),
        ({"total_ratio": 0.5, "feed_forward_ratio": 0.5}, "feed_forward_ratio is part of total_ratio"),
        ({"ratio": 0.5, "method": "other"}, "method must be 'joint' or 'paper', found 'other'"),
        ({"schedule": (3, 0), "method": "paper"}, "method='paper' takes epsilon"),
        ({"ranks": {}, "form": "latent"}, "leave out form"),
        ({"schedule": (3, 0), "multiple_of": 2}, "schedule says the ranks themselves"),
        ({"ratio": 0.5, "form": 3}, "form must be 'auto'"),
        ({"ratio": 0.5, "form": "nonsense"}, "form must be 'auto', 'per_head' or 'latent', found 'nonsense'"),
        ({"ratio": 0.5, "form": {"cross": "bad"}}, "found 'bad'"),
        ({"ratio": 0.5, "seed": "x"}, "seed must be an integer"),
        ({"target_speedup": 2, "backend": ["onnx"]}, r"backend must be one of torch, onnx, .*, found \['onnx'\]"),
        ({"ratio": 0.5, "backend": "onnx"}, "backend='onnx' is where target_speedup is timed: give it too"),
        ({"ratio": 0.5, "refit": "maybe"}, "refit must be True or False, found 'maybe'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_when_the_settings_are_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompressionSettings(**arguments)


def test_the_callers_objects_stay_the_callers():
    table = {"cross": [{"qk": 1, "vo": 2}]}
    settings = CompressionSettings(ranks=table)
    table["cross"][0]["qk"] = 9
    assert settings.ranks == {"cross": [{"qk": 1, "vo": 2}]}
    assert type(CompressionSettings(ratio=np.float32(0.5)).ratio) is float
    numbers = CompressionSettings(schedule=(np.int64(3), np.float64(0.25)), seed=np.int64(3))
    assert json.loads(json.dumps(numbers.to_dict())) == {"schedule": [3, 0.25], "seed": 3}


def test_forms_are_those_of_the_family():
    assert CompressionSettings(ratio=0.5).forms_for(T5) == dict.fromkeys(T5.attention, "auto")
    assert CompressionSettings(ratio=0.5).forms_for(CHRONOS2) == {"time": "per_head", "group": "auto"}
    for family in FAMILIES:  # without a budget there is nothing to weigh one form against the other by
        assert set(CompressionSettings(epsilon=0.1).forms_for(family).values()) == {"per_head"}


def test_settings_and_keywords_make_the_same_model(chronos_t5, chronos_calibration):
    settings = CompressionSettings(ratio=0.5, calibration=chronos_calibration)
    model, same = (
        compress_pretrained(chronos_t5, settings),
        compress_pretrained(chronos_t5, ratio=0.5, calibration=chronos_calibration),
    )
    assert model.config.compression == same.config.compression
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])


def test_one_way_in_at_a_time(chronos_t5):
    with pytest.raises(ValueError, match="Give either settings or epsilon, not both"):
        compress_pretrained(chronos_t5, CompressionSettings(ratio=0.5), epsilon=0.1)
    with pytest.raises(TypeError, match="rato"):
        compress_pretrained(chronos_t5, rato=0.5)
    with pytest.raises(TypeError, match=r"settings must be CompressionSettings, found 0\.5"):
        compress_pretrained(chronos_t5, 0.5)


def test_a_calibration_in_memory_has_no_name_to_write(tmp_path, chronos_t5):
    settings = CompressionSettings(ratio=0.5, calibration=calibrate(chronos_t5, num_batches=1))
    with pytest.raises(ValueError, match=r"save it with Calibration\.save and give the file"):
        settings.save(tmp_path / "settings.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "found no table"),
        ('{"rato": 1}', "found rato"),
        ('{"ratio": 2}', "ratio must be"),
    ],
)
def test_files_that_are_no_settings(tmp_path, text, message):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        CompressionSettings.from_file(path)
    with pytest.raises(OSError, match=r"none\.json"):
        CompressionSettings.from_file(tmp_path / "none.json")
