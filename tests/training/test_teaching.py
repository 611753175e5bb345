"""The loss of distillation: its formula for tokens, and that of quantiles as a weighted sum of two expectations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank import compress_pretrained
from hf_lowrank.training.batches import run_data
from hf_lowrank.training.teaching import distillation_loss, teaching_of


@given(seed=st.integers(0, 1000), weight=st.floats(0, 1), temperature=st.floats(0.5, 4))
def test_the_loss_of_tokens_is_its_formula(seed, weight, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(7, (5,), generator=generator)
    q, p = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    divergence = (q * (q / p).log()).sum(-1).mean()
    cross_entropy = -student.softmax(-1)[torch.arange(5), labels].log().mean()
    found = distillation_loss(student, teacher, labels, weight=weight, temperature=temperature)
    torch.testing.assert_close(found, (1 - weight) * cross_entropy + weight * temperature**2 * divergence)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    logits = torch.randn(5, 7, requires_grad=True)
    loss = distillation_loss(logits, logits.detach(), torch.zeros(5, dtype=torch.long), weight=1.0, temperature=2.0)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0))
    torch.testing.assert_close(logits.grad, torch.zeros(5, 7))


def test_the_loss_is_linear_in_the_weight_and_every_weight_learns(dense):
    student = compress_pretrained(dense, uniform=2, calibration=None).requires_grad_(True)
    batch = run_data(student.config, "synthetic", 1, evaluation_batches=1, seed=0, batch_tokens=300).batches[0]
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        loss = teaching_of(dense, weight=weight, temperature=1.0).loss(student, batch)
        student.zero_grad()
        loss.backward()
        assert all(torch.isfinite(each.grad).all() for each in student.parameters() if each.grad is not None)
        losses[weight] = loss.detach()
    torch.testing.assert_close(losses[0.25], 0.75 * losses[0.0] + 0.25 * losses[1.0])
    assert losses[1.0] > 0


@pytest.mark.parametrize("family", ["bolt", "chronos2"])
def test_the_teacher_itself_loses_one_on_what_came(request, family):
    """Its quantile loss is counted as a share of its own, or of what it expects where that is more."""
    teacher = request.getfixturevalue(family)
    batch = run_data(teacher.config, "synthetic", 1, evaluation_batches=1, seed=0, batch_tokens=300).batches[0]
    with torch.no_grad():
        assert 0 < teaching_of(teacher, weight=0.0, temperature=1.0).loss(teacher, batch) <= 1 + 1e-6
