"""What a machine can do: where products may be quick, and where they must not be."""

from __future__ import annotations

import pytest
import torch

from hf_lowrank import calibrate
from hf_lowrank.checkpoints import devices
from hf_lowrank.checkpoints.devices import quick_products


@pytest.mark.parametrize(
    ("weights", "can", "wanted"), [(0, True, "medium"), (0, False, "highest"), (1e9, True, "highest")]
)
def test_products_are_quick_where_the_machine_can_and_the_model_is_large(
    chronos_t5, monkeypatch, weights, can, wanted
):
    monkeypatch.setattr(devices, "LARGE", weights)
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda: can)
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    with quick_products(chronos_t5):
        assert torch.get_float32_matmul_precision() == wanted
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not devices.has_fast_bfloat16(), reason="no products of bfloat16 here")
def test_a_quick_calibration_is_nearly_an_exact_one(chronos_t5, monkeypatch):
    exact = calibrate(chronos_t5, num_batches=2)
    monkeypatch.setattr(devices, "LARGE", 0)
    quick = calibrate(chronos_t5, num_batches=2)
    for name, gram in exact.grams.items():
        if "gradient" not in name:
            assert (quick.grams[name] - gram).norm() < 0.02 * gram.norm()
