"""Settings: their ranges, and the files that hold them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.training.settings import PretrainingSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, found 0"),
        ({"workers": -1}, "workers must be an integer of at least 0, found -1"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0, found inf"),
        ({"ramp": 1.5}, r"ramp must be in \[0, 1\], found 1.5"),
        ({"seed": -1}, r"seed must be an integer in \[0, 1000003\), found -1"),
        ({"dtype": "int8"}, "dtype must be 'float32' or 'bfloat16', found 'int8'"),
        ({"family": "chronos-2"}, "family must be 't5', 'bolt' or 'chronos2', found 'chronos-2'"),
        ({"shape": "t5-huge"}, "shape must be one of t5-tiny.*found 't5-huge'"),
        ({"shape": "t5-tiny", "d_model": 8}, "shape='t5-tiny' brings its own sizes: leave out d_model"),
        ({"start": "reference", "base_rank": 3}, "start brings its own model: leave out base_rank"),
        ({"budgets": [1.5]}, r"budgets must be a list of different numbers in \(0, 1\), found \[1.5\]"),
        ({"budgets": [0.5, 0.5]}, r"budgets must be a list of different numbers in \(0, 1\), found \[0.5, 0.5\]"),
        ({"position_rate": 0.0}, r"position_rate must be above 0, found 0.0"),
        ({"position_rate": 20.0, "muon": False}, r"position_rate is for muon, which is false"),
        ({"budgets": [0.5], "budget_share": 0.0}, r"budget_share must be in \(0, 1\], found 0.0"),
        ({"budgets": [0.5], "base_rank": 3}, "budgets are for a dense model, .* leave out base_rank"),
        ({"trainer": {"optim": "sgd"}}, "trainer: optim cannot be given beside muon; set muon to false"),
        ({"trainer": {"max_steps": 3}}, "trainer: max_steps cannot be given here"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainingSettings(**changes)


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "base_rank": st.floats(0.5, 8),
            "steps": st.integers(1, 9),
            "learning_rate": st.floats(1e-9, 1),
            "data": st.just("mine.csv"),
            "trainer": st.just({"gradient_checkpointing": True}),
        },
    )
)
def test_a_file_holds_the_same_settings(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "settings.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    assert PretrainingSettings.from_file(file) == PretrainingSettings(**values)
    assert PretrainingSettings.from_file(file, steps=3).steps == 3


def test_a_file_that_is_no_table_of_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for text, message in (
        ("momentum: 0.9", "unknown settings momentum; known are start"),
        ("[1, 2]", "must hold a table of settings, found a list"),
        ("a: [", "neither YAML nor JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            PretrainingSettings.from_file(file)
