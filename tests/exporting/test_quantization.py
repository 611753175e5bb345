"""Which products may be in int8: what each costs, and which are spared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_lowrank.exporting.inductor_files import with_int8_products
from hf_lowrank.exporting.onnx_files import as_onnx, in_int8
from hf_lowrank.exporting.quantization import ProductLoss, products_of, spared_names, spared_products
from hf_lowrank.runtime import engines
from hf_lowrank.runtime.engines import OnnxEngine

LOSSES = st.lists(
    st.builds(ProductLoss, name=st.uuids().map(str), parameters=st.integers(1, 1000), loss=st.floats(0, 1)),
    max_size=12,
)


@given(losses=LOSSES, tolerance=st.floats(1e-6, 3))
def test_the_others_stay_within_the_tolerance_and_none_is_spared_in_vain(losses, tolerance) -> None:
    spared = spared_names(losses, tolerance)
    rest = [one for one in losses if one.name not in spared]
    assert sum(one.loss for one in rest) <= tolerance + 1e-9
    for one in losses:
        assert one.name not in spared or sum(other.loss for other in rest) + one.loss > tolerance - 1e-9


def test_what_costs_most_for_its_size_is_spared() -> None:
    losses = [ProductLoss("large", 1000, 0.4), ProductLoss("small", 10, 0.3), ProductLoss("cheap", 10, 0.01)]
    assert spared_names(losses, 0.45) == ["small"]
    assert spared_names(losses, 0.1) == ["large", "small"]
    assert spared_names(losses, 1.0) == []


class Net(nn.Module):
    """An input of which one value is a thousand times as large as the others, so that its product bears no int8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.weight.data[:, 0] = 0.0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(values)))


def test_losses_are_those_of_rounded_products() -> None:
    net, values = Net().requires_grad_(False), torch.randn(64, 8)
    values[:, 0] *= 1000
    wanted = net(values)
    calls = []

    def loss() -> float:
        calls.append(1)
        return float((net(values) - wanted).square().mean())

    spared, losses = spared_products(net, loss, 1e-4, show_progress=False)
    assert [one.name for one in losses] == ["first", "second"] == list(products_of(net))
    assert losses[0].loss > 100 * losses[1].loss > 0
    assert spared == ["first"]
    assert len(calls) == 2
    assert loss() == 0.0  # nothing is left behind


def test_rounding_is_that_of_compiled_products() -> None:
    """The simulated products against those of integers on the same numbers, zeros among them."""
    net, values = Net().requires_grad_(False), torch.randn(16, 3, 8)
    values[2] = 0.0
    simulated = []
    spared_products(
        net, lambda: float(simulated.append(net(values)) or 0.0), 1.0, format="inductor", show_progress=False
    )
    for spared, wanted in zip(["second", "first"], simulated):
        found = with_int8_products(net, [spared])(values)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert (found - net(values)).abs().max() > 1e-4


@pytest.mark.parametrize("inner", [1, 2, 3, 5, 16, 33])
def test_compiled_products_are_right_at_every_rank(inner) -> None:
    """PyTorch's own product of integers is not, at one."""
    net = nn.Sequential(nn.Linear(inner, 7)).requires_grad_(False)
    values = torch.randn(5, inner)
    spared, losses = spared_products(net, lambda: 0.0, 1.0, format="inductor", show_progress=False)
    assert spared == ([] if losses else ["0"])
    assert (with_int8_products(net, spared)(values) - net(values)).abs().max() < 0.05


@pytest.mark.parametrize("has_vnni", [True, False])
def test_rounding_is_onnx_runtimes(tmp_path, monkeypatch, has_vnni) -> None:
    """The simulated products against ONNX Runtime's own on the same numbers, with weights as they are and made unsigned."""
    pytest.importorskip("onnxruntime")
    if has_vnni and not engines._adds_in_32_bits():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(engines, "_adds_in_32_bits", lambda: has_vnni)
    record = SimpleNamespace(graphs={"net": "net.onnx"})
    net, values = Net().requires_grad_(False).eval(), torch.randn(16, 3, 8)
    model = as_onnx(net, {"values": values}, {"values": {0: torch.export.Dim("rows")}})

    def run(spared: list[str]) -> torch.Tensor:
        (tmp_path / "net.onnx").write_bytes(in_int8(model, spared).SerializeToString())
        engine = OnnxEngine(tmp_path, record, threads=1)
        return torch.from_numpy(engine.run("net", {"values": values.numpy()}))

    simulated = []
    spared_products(net, lambda: float(simulated.append(net(values)) or 0.0), 1.0, show_progress=False)
    exact = net(values)
    for other, wanted in zip(["second", "first"], simulated):
        assert (run([other]) - wanted).abs().max() < 0.05 * (wanted - exact).abs().max()
    torch.testing.assert_close(run(["first", "second"]), exact)
