"""Settings that no model can have are refused by name, those of the published models are not."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
from chronos_models import BOLT, CHRONOS2, PUBLISHED, shape
from conftest import TINY_CHRONOS
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import LowRankChronos2Config, LowRankChronosBoltConfig, LowRankT5Config
from hf_lowrank.checkpoints.published import CHRONOS_2, CHRONOS_BOLT, CHRONOS_T5
from hf_lowrank.models.checked_settings import OF_CHRONOS, SHARED, Number, check_chronos_settings, check_settings

CONFIGS = {
    "t5": lambda: LowRankT5Config(vocab_size=64, decoder_start_token_id=0, chronos_config=copy.deepcopy(TINY_CHRONOS)),
    "bolt": lambda: LowRankChronosBoltConfig(**shape(BOLT)),
    "chronos2": lambda: LowRankChronos2Config(**shape(CHRONOS2)),
}
JUNK = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.just({}),
    st.just({"a": 1}),
    st.just(math.nan),
    st.just(math.inf),
    st.just(-1),
    st.just(10**400),
    st.just(-0.5),
)


def test_published_settings_pass():
    for family, settings in (
        ("t5", CHRONOS_T5 | {"context_length": 512}),
        ("bolt", CHRONOS_BOLT),
        ("chronos2", CHRONOS_2),
    ):
        check_chronos_settings(settings, family)
    for name, config in PUBLISHED.items():
        family = "chronos2" if name == "chronos-2" else "bolt"
        check_settings(SimpleNamespace(**config), family)


@pytest.mark.parametrize("family", OF_CHRONOS)
@given(data=st.data())
def test_whatever_is_no_setting_is_refused_by_name(family, data):
    config = CONFIGS[family]()
    of_chronos = data.draw(st.booleans())
    names = OF_CHRONOS[family] if of_chronos else [name for name in SHARED if hasattr(config, name)]
    name, value = data.draw(st.sampled_from(sorted(names))), data.draw(JUNK)
    if value is None and name == "time_encoding_scale":
        return
    settings = config.to_dict()
    (settings["chronos_config"] if of_chronos else settings)[name] = value
    if of_chronos:
        with pytest.raises(ValueError, match=rf"chronos_config\['{name}'\] must be .*, found"):
            check_chronos_settings(settings["chronos_config"], family)
        with pytest.raises(ValueError, match=r"config\.json"):
            type(config).from_dict(settings)
    elif name not in ("is_gated_act", "scale_decoder_outputs"):  # they follow from others
        with pytest.raises(ValueError, match=r"config\.json"):
            type(config).from_dict(settings)


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("t5", {"n_tokens": 65}, r"n_tokens'\] must be at most vocab_size, 64, found 65"),
        ("t5", {"eos_token_id": 2}, r"eos_token_id'\] must be an integer in \[0, 1\], found 2"),
        ("t5", {"tokenizer_class": "ChronosPipeline"}, "must be 'MeanScaleUniformBins', found 'ChronosPipeline'"),
        ("t5", {"tokenizer_kwargs": {"low_limit": 1.0, "high_limit": 1.0}}, "low_limit must be below high_limit"),
        ("t5", {"nonsense": 1}, "settings that chronos does not know: nonsense"),
        ("bolt", {"quantiles": [0.9, 0.1]}, "a list of increasing numbers between 0 and 1"),
        ("chronos2", {"max_output_patches": 0}, r"must be an integer in \[1, 16777216\], found 0"),
    ],
)
def test_settings_that_contradict_each_other(family, changes, wanted):
    settings = CONFIGS[family]().to_dict()
    settings["chronos_config"] |= changes
    with pytest.raises(ValueError, match=wanted):
        type(CONFIGS[family]()).from_dict(settings)


def test_what_a_low_rank_config_says_of_its_pipeline():
    settings = CONFIGS["t5"]().to_dict()
    with pytest.raises(ValueError, match="chronos_pipeline_class must be LowRankChronosPipeline or ChronosPipeline"):
        LowRankT5Config.from_dict(settings | {"chronos_pipeline_class": "Nonsense"})
    with pytest.raises(ValueError, match="chronos_config is missing"):
        LowRankT5Config.from_dict(settings | {"chronos_config": None})
    with pytest.raises(ValueError, match="chronos_config is missing"):
        LowRankChronosBoltConfig.from_dict({"d_model": 16})
    with pytest.raises(ValueError, match="compression must be a table or null, found 5"):
        LowRankT5Config.from_dict(settings | {"compression": 5})


@given(value=st.one_of(st.integers(), st.floats()))
def test_a_rule_allows_what_it_says(value):
    rule = Number(0, 10, is_integer=False, is_open=True)
    assert rule.allows(value) == (0 < value <= 10)
    assert not Number(0).allows(float(1))
    assert not Number(0).allows(True)
