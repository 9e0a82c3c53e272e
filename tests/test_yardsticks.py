"""What the benchmarks compare with has to be right, or the comparison is not fair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import yardsticks
from diagnostics.measure.divergences import measure
from diagnostics.measure.losses import per_position
from tests.factories import random_logits


def test_plain_statistics_are_the_measured_columns():
    given = random_logits(3, 11, 400)
    plain = yardsticks.in_rows(yardsticks.plain_statistics, 4, *given, ks=(4, 16))
    measured = measure(*given, k=16, sweep=(4,))
    for name, values_N in plain.items():
        column = name.removesuffix("_k16")
        assert torch.allclose(values_N.double(), measured[column], atol=1e-9), name
    kls = yardsticks.in_rows(yardsticks.plain_kls, 4, *given[:2])
    assert all(torch.allclose(values_N, plain[name]) for name, values_N in kls.items())


@pytest.mark.parametrize("loss", yardsticks.LOSSES)
@pytest.mark.parametrize("name", ["full_logits", "trl", "liger"])
def test_the_losses_are_the_measured_ones(name, loss):
    generator = torch.Generator().manual_seed(0)
    student_NH, teacher_NH = (torch.randn(6, h, generator=generator) for h in (8, 12))
    student_VH, teacher_VH = (torch.randn(50, h, generator=generator) for h in (8, 12))
    student_NH.requires_grad_(), student_VH.requires_grad_()
    try:
        found = getattr(yardsticks, name)(student_NH, student_VH, teacher_NH, teacher_VH, loss)
    except yardsticks.Missing as reason:
        pytest.skip(str(reason))
    values_N = per_position(
        F.linear(student_NH, student_VH),
        F.linear(teacher_NH, teacher_VH),
        torch.zeros(6, dtype=torch.long),
        loss=loss,
    )
    gradients = [
        torch.autograd.grad(value, student_NH)[0] for value in (found, values_N.float().mean())
    ]
    assert float(found.detach()) == pytest.approx(float(values_N.detach().mean()), rel=1e-5)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(yardsticks.shutil, "which", lambda _: None)
    with pytest.raises(yardsticks.Missing, match=r"a C\+\+ compiler on the CPU"):
        yardsticks.compiled(len, "cpu")
