"""What the tokens that both models list say, by hand and against a loop over tokens."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from diagnostics.measure import divergences
from diagnostics.measure.overlap import measure_overlap

COLUMNS = (
    "listed_student_mass",
    "listed_teacher_mass",
    "overlap_advantage",
    "overlap_advantage_teacher",
)

P = [0.5, 0.25, 0.15, 0.1]
Q = [0.1, 0.4, 0.3, 0.2]


def of_logits(student_NV, teacher_NV, k, **options):
    """The columns of `measure_overlap` beside those of the statistics."""
    found = divergences.measure_hidden(
        student_NV,
        lambda logits: logits,
        teacher_NV,
        lambda logits: logits,
        torch.zeros(len(student_NV), dtype=torch.long),
        k=k,
        of_lists=partial(measure_overlap, k=k),
        **options,
    )
    return {name: found[name] for name in COLUMNS}


def measured(p, q, k):
    logits = (torch.log(torch.tensor([row], dtype=torch.float64)) for row in (p, q))
    found = of_logits(*logits, k)
    return {name: float(values) for name, values in found.items()}


def test_three_tokens_by_hand():
    """K = 3: S = {0, 1, 2}, T = {1, 2, 3}, shared {1, 2}; p' = (5/8, 3/8), q' = (4/7, 3/7)."""
    found = measured(P, Q, 3)
    assert found["listed_student_mass"] == pytest.approx(0.25 + 0.15 + 0.1)
    assert found["listed_teacher_mass"] == pytest.approx(0.4 + 0.3 + 0.2)
    expected = (5 / 8 * math.log(4 / 7 * 8 / 5) + 3 / 8 * math.log(3 / 7 * 8 / 3)) / 2
    assert found["overlap_advantage"] == pytest.approx(expected)
    expected = (0.4 * math.log(0.25 / 0.4) + 0.3 * math.log(0.15 / 0.3)) / 2
    assert found["overlap_advantage_teacher"] == pytest.approx(expected)


def test_without_a_shared_token_there_is_no_advantage():
    found = measured(P, Q, 1)
    assert math.isnan(found["overlap_advantage"])
    assert math.isnan(found["overlap_advantage_teacher"])
    assert found["listed_student_mass"] == pytest.approx(0.25)


def test_equal_models_disagree_nowhere():
    found = measured(P, P, 2)
    assert found["overlap_advantage"] == pytest.approx(0, abs=1e-15)
    assert found["overlap_advantage_teacher"] == pytest.approx(0, abs=1e-15)
    assert found["listed_student_mass"] == found["listed_teacher_mass"] == pytest.approx(0.75)


@pytest.mark.parametrize("k", [1, 4, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_slow_loop_agrees(k, dtype):
    draws = torch.Generator().manual_seed(0)
    logits = [(3 * torch.randn(12, 40, generator=draws)).to(dtype) for _ in range(2)]
    found = of_logits(*logits, k, chunk=5)
    for row in range(12):
        p, q = (np.exp(x[row].double().log_softmax(-1).numpy()) for x in logits)
        best = [sorted(range(40), key=lambda i, x=x: (-float(x[row, i]), i))[:k] for x in logits]
        shared = [i for i in best[1] if i in best[0]]
        mass_p, mass_q = (sum(x[i] for i in shared) for x in (p, q))
        own = [p[i] / mass_p * math.log(q[i] / mass_q / (p[i] / mass_p)) for i in shared]
        theirs = [q[i] * math.log(p[i] / q[i]) for i in shared]
        expected = {
            "listed_student_mass": sum(p[i] for i in best[1]),
            "listed_teacher_mass": sum(q[i] for i in best[1]),
            "overlap_advantage": np.mean(own) if shared else np.nan,
            "overlap_advantage_teacher": np.mean(theirs) if shared else np.nan,
        }
        for name, value in expected.items():
            assert float(found[name][row]) == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True)
    assert (found["overlap_advantage"].nan_to_num() <= 1e-12).all()


def test_no_list_is_searched_a_second_time(monkeypatch):
    """Two searches for a chunk, one per model, whatever is measured of the lists."""
    searched, search = [], divergences.top_ids
    monkeypatch.setattr(
        divergences, "top_ids", lambda *one, **more: searched.append(one) or search(*one, **more)
    )
    of_logits(*torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(2)), 16, chunk=6)
    assert len(searched) == 2


def test_impossible_and_undefined_tokens():
    """A token of probability 0 adds nothing of its own; a NaN leaves the position undefined."""
    student = torch.tensor([[0.0, 0.0, -torch.inf], [torch.nan, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]])
    found = of_logits(student, teacher, 3)
    for role in ("student", "teacher"):
        assert float(found[f"listed_{role}_mass"][0]) == pytest.approx(1)
    assert found["overlap_advantage_teacher"][0] == pytest.approx(math.log(0.5) / 3)
    assert found["overlap_advantage"][0] == -torch.inf  # p' is on a token that q' excludes
    assert all(values[1].isnan() for values in found.values())
