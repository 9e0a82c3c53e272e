"""What the tokens that both models list say, by hand and against a loop over tokens."""

import math

import numpy as np
import pytest
import torch

from diagnostics.measure import overlap
from diagnostics.measure.divergences import top_ids
from diagnostics.measure.overlap import measure_overlap

P = [0.5, 0.25, 0.15, 0.1]
Q = [0.1, 0.4, 0.3, 0.2]


def measured(p, q, k):
    logits = (torch.log(torch.tensor([row], dtype=torch.float64)) for row in (p, q))
    found = measure_overlap(*logits, torch.zeros(1, dtype=torch.long), k=k)
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
    found = measure_overlap(*logits, torch.zeros(12, dtype=torch.long), k=k)
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


@pytest.mark.parametrize("small", [0, 4096])
def test_the_lists_are_those_of_the_supports(small, monkeypatch):
    """Equal logits at the end of a list go to the lower id, by either search."""
    monkeypatch.setattr(overlap, "SMALL", small)
    logits = torch.randint(0, 6, (200, 40), generator=torch.Generator().manual_seed(1)).float()
    logits[7] = 0.0
    for k in (1, 5, 16, 60):
        found = overlap._listed(logits, k).sort(-1).values
        assert torch.equal(found, top_ids(logits, k).sort(-1).values)


def test_impossible_and_undefined_tokens():
    """A token of probability 0 adds nothing of its own; a NaN leaves the position undefined."""
    student = torch.tensor([[0.0, 0.0, -torch.inf], [torch.nan, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]])
    found = measure_overlap(student, teacher, torch.zeros(2, dtype=torch.long), k=3)
    for role in ("student", "teacher"):
        assert float(found[f"listed_{role}_mass"][0]) == pytest.approx(1)
    assert found["overlap_advantage_teacher"][0] == pytest.approx(math.log(0.5) / 3)
    assert found["overlap_advantage"][0] == -torch.inf  # p' is on a token that q' excludes
    assert all(values[1].isnan() for values in found.values())
