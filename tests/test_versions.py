"""Every record has the same versions, and more where a result depends on more."""

from __future__ import annotations

import platform
from importlib.metadata import version

import pytest

from hf_lowrank import compress_pretrained
from hf_lowrank.versions import versions


@pytest.mark.filterwarnings("ignore:Keeping")
def test_a_record_says_what_ran(chronos_t5) -> None:
    assert versions() == {
        "python": platform.python_version(),
        **{name: version(name) for name in ("hf-lowrank", "torch", "transformers", "chronos-forecasting")},
    }
    assert versions("rich") == versions() | {"rich": version("rich")}
    model = compress_pretrained(chronos_t5, uniform=3, calibration=None)
    assert model.config.compression["versions"] == versions()
