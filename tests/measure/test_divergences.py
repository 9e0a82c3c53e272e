"""Every measurement against a hand-worked example, an oracle in plain float64 loops, and its
invariants.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.yardsticks import allocated_on_the_cpu
from diagnostics.core.schema import SCHEMA, support_column
from diagnostics.measure import divergences
from diagnostics.measure.divergences import (
    kl_pair,
    kl_pair_hidden,
    kls_and_js,
    mass_outside,
    measure,
    measure_hidden,
    top_ids,
)
from tests.factories import message, padded, random_logits
from tests.oracles import best, kl, softmax, xlog

INF, LN2 = math.inf, math.log(2)
INDICATORS = [
    name
    for name, column in SCHEMA.items()
    if column.dtype == "bool" and column.stage == "before" and not column.imported
]
DROPPED = {"student_dropped_mass", "teacher_dropped_mass"}


# ---------------------------------------------------------------- oracle: plain loops, float64


def oracle(
    student: list[float], teacher: list[float], y: int, k: int, sweep=()
) -> dict[str, float]:
    p, q = softmax(student), softmax(teacher)
    m = [(a + b) / 2 for a, b in zip(p, q)]
    first, second = ([*best(p, 2), None])[:2]
    ln_p, ln_q = math.log(p[y]) if p[y] else -INF, math.log(q[y]) if q[y] else -INF
    out = {
        "student_entropy": -math.fsum(xlog(x, x) for x in p),
        "teacher_entropy": -math.fsum(xlog(x, x) for x in q),
        "forward_kl": kl(q, p),
        "reverse_kl": kl(p, q),
        "js": (kl(p, m) + kl(q, m)) / 2,
        "hellinger": math.sqrt(max(0.0, 1 - math.fsum(math.sqrt(a * b) for a, b in zip(p, q)))),
        "student_logprob": ln_p,
        "teacher_logprob": ln_q,
        "advantage": ln_q - ln_p,
        "acceptance": min(1.0, q[y] / p[y]) if p[y] else 1.0,
        "student_margin": p[first] - (0.0 if second is None else p[second]),
        "top1_match": float(first == best(q, 1)[0]),
        "student_top1_in_teacher_top5": float(first in best(q, 5)),
    }
    for size in (k, *sweep):
        values = oracle_support(p, q, y, size)
        out |= {
            support_column(name, None if size == k else size): value
            for name, value in values.items()
        }
    return out


def oracle_support(p: list[float], q: list[float], y: int, k: int) -> dict[str, float]:
    k = min(k, len(p))
    s, t = set(best(p, k)), set(best(q, k))
    union = sorted(s | t)
    p_u = [p[v] / math.fsum(p[u] for u in union) for v in union]
    q_u = [q[v] / math.fsum(q[u] for u in union) for v in union]
    p_own = [max(1e-12, p[v] / math.fsum(p[u] for u in s) if v in s else 0.0) for v in union]
    q_own = [max(1e-12, q[v] / math.fsum(q[u] for u in t) if v in t else 0.0) for v in union]
    ratio = [math.log(b) - math.log(a) if a else 0.0 for a, b in zip(p_u, q_u)]
    mean = math.fsum(a * r for a, r in zip(p_u, ratio))
    return {
        "compatibility": math.fsum(q[v] for v in s),
        "compatibility_intersection": math.fsum(q[v] for v in s & t),
        "topk_overlap": len(s & t) / k,
        "topk_jaccard": len(s & t) / len(union),
        "shared_student_mass": math.fsum(p[v] for v in s & t),
        "bhattacharyya": math.fsum(math.sqrt(a * b) for a, b in zip(p_u, q_u)),
        "union_forward_kl": kl(q_u, p_u),
        "union_forward_kl_released": kl(q_own, p_own),
        "union_log_ratio_variance": math.fsum(a * (r - mean) ** 2 for a, r in zip(p_u, ratio)),
        "teacher_top1_in_topk": float(best(q, 1)[0] in s),
        "sampled_in_teacher_topk": float(y in t),
    }


def assert_equals_oracle(student_NV, teacher_NV, sampled_N, *, k, sweep=(), tolerance):
    measured = measure(student_NV, teacher_NV, sampled_N, k=k, sweep=sweep)
    for row in range(len(sampled_N)):
        expected = oracle(
            student_NV[row].double().tolist(),
            teacher_NV[row].double().tolist(),
            int(sampled_N[row]),
            k,
            sweep,
        )
        assert set(expected) == set(measured)
        for name, value in expected.items():
            assert measured[name].dtype == torch.float64
            assert float(measured[name][row]) == pytest.approx(
                value, abs=tolerance, rel=tolerance
            ), f"{name} of row {row}"


# ---------------------------------------------------------------- formulas

P, Q = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).log(), torch.tensor([[1 / 8, 1 / 8, 3 / 4]]).log()


def test_three_tokens_by_hand():
    measured = {
        name: float(values) for name, values in measure(P, Q, torch.tensor([2]), k=1).items()
    }
    expected = {
        "student_entropy": 1.5 * LN2,
        "teacher_entropy": 0.75 * LN2 + 0.75 * math.log(4 / 3),
        "forward_kl": 0.75 * math.log(3) - 0.375 * LN2,
        "reverse_kl": 1.25 * LN2 - 0.25 * math.log(3),
        # m = (5, 3, 8)/16, H(m) - (H(p) + H(q))/2
        "js": (
            2.5 * LN2
            - (5 * math.log(5) + 3 * math.log(3)) / 16
            - (1.5 * LN2 + 2.25 * LN2 - 0.75 * math.log(3)) / 2
        ),
        "hellinger": math.sqrt(1 - (1 / 4 + math.sqrt(1 / 32) + math.sqrt(3 / 16))),
        "student_logprob": -2 * LN2,
        "teacher_logprob": math.log(3 / 4),
        "advantage": math.log(3),
        "acceptance": 1.0,
        "student_margin": 1 / 4,
        # S = {0}, T = {2}, U = {0, 2}: p_U = (2, 1)/3, q_U = (1, 6)/7
        "compatibility": 1 / 8,
        "compatibility_intersection": 0.0,
        "topk_overlap": 0.0,
        "topk_jaccard": 0.0,
        "shared_student_mass": 0.0,
        "bhattacharyya": math.sqrt(2 / 21) + math.sqrt(6 / 21),
        "union_forward_kl": math.log(3 / 14) / 7 + 6 * math.log(18 / 7) / 7,
        "union_forward_kl_released": (1 - 1e-12) * 12 * math.log(10),
        "union_log_ratio_variance": 2 / 9 * math.log(12) ** 2,
        "teacher_top1_in_topk": 0.0,
        "sampled_in_teacher_topk": 1.0,
        "top1_match": 0.0,
        "student_top1_in_teacher_top5": 1.0,
    }
    assert measured == pytest.approx(expected, abs=3e-7)


def test_ties_go_to_the_lower_id():
    # S = {0, 1}: tokens 1 and 2 tie for p. T = {2, 0}: tokens 0 and 1 tie for q.
    measured = measure(P, Q, torch.tensor([1]), k=2)
    assert float(measured["compatibility"]) == pytest.approx(1 / 4)
    assert float(measured["compatibility_intersection"]) == pytest.approx(1 / 8)
    assert float(measured["shared_student_mass"]) == pytest.approx(1 / 2)
    assert float(measured["sampled_in_teacher_topk"]) == 0
    assert float(measured["acceptance"]) == pytest.approx(1 / 2)


@pytest.mark.parametrize("vocabulary", [2, 3, 63, 64, 65, 200])
def test_equals_the_oracle(vocabulary):
    student_NV, teacher_NV, sampled_N = random_logits(vocabulary, 6, vocabulary)
    assert_equals_oracle(student_NV, teacher_NV, sampled_N, k=16, sweep=(1, 4, 32), tolerance=1e-11)


def test_equals_the_oracle_on_a_large_vocabulary():
    student_NV, teacher_NV, sampled_N = random_logits(1, 2, 5003)
    assert_equals_oracle(student_NV, teacher_NV, sampled_N, k=16, sweep=(32,), tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_are_measured_as_exactly_as_their_values_allow(dtype):
    # Rounded logits tie often, and the oracle's ties go to the lower id too.
    student_NV, teacher_NV, sampled_N = random_logits(2, 5, 1000, dtype=dtype)
    assert_equals_oracle(student_NV, teacher_NV, sampled_N, k=16, sweep=(4,), tolerance=1e-6)


def test_logits_of_two_dtypes():
    student_NV, teacher_NV, sampled_N = random_logits(3, 4, 100, dtype=torch.float32)
    mixed = measure(student_NV.bfloat16(), teacher_NV, sampled_N)
    upcast = measure(student_NV.bfloat16().float(), teacher_NV, sampled_N)
    assert all(torch.equal(mixed[name], upcast[name]) for name in upcast)


def test_every_column_of_the_schema_and_no_other():
    measured = measure(*random_logits(4, 3, 50), k=16, sweep=(8,))
    before = (
        {
            name
            for name, entry in SCHEMA.items()
            if entry.stage == "before" and not entry.imported and not entry.on_request
        }
        - DROPPED
        - {"teacher_tail_mass", "token_identity_gain"}
    )
    by_support = {f"{name}_k8" for name in before if SCHEMA[name].by_support}
    assert set(measured) == before | by_support


def test_another_k_is_the_same_as_asking_for_it_alone():
    student_NV, teacher_NV, sampled_N = random_logits(5, 8, 300, dtype=torch.float32)
    swept = measure(student_NV, teacher_NV, sampled_N, k=16, sweep=(4, 16, 32))
    for size in (4, 32):
        alone = measure(student_NV, teacher_NV, sampled_N, k=size)
        for name in (name for name in alone if SCHEMA[name].by_support):
            assert torch.equal(swept[f"{name}_k{size}"], alone[name])
    assert "compatibility_k16" not in swept


def test_a_k_beyond_the_vocabulary_counts_as_the_vocabulary():
    student_NV, teacher_NV, sampled_N = random_logits(6, 4, 7)
    measured = measure(student_NV, teacher_NV, sampled_N, k=50)
    whole = measure(student_NV, teacher_NV, sampled_N, k=7)
    assert all(torch.equal(measured[name], whole[name]) for name in whole)
    for name in (
        "compatibility",
        "compatibility_intersection",
        "topk_overlap",
        "topk_jaccard",
        "shared_student_mass",
    ):
        assert torch.allclose(measured[name], torch.ones(4, dtype=torch.float64))
    assert torch.allclose(measured["union_forward_kl"], measured["forward_kl"])


# ---------------------------------------------------------------- invariants


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_teacher_equal_to_the_student_teaches_nothing(dtype):
    student_NV, _, sampled_N = random_logits(7, 20, 500, dtype=dtype)
    measured = measure(student_NV, student_NV.clone(), sampled_N, k=16)
    for name in (
        "forward_kl",
        "reverse_kl",
        "hellinger",
        "advantage",
        "union_forward_kl",
        "union_log_ratio_variance",
    ):
        assert torch.equal(measured[name], torch.zeros(20, dtype=torch.float64)), name
    assert measured["js"].abs().max() < 3e-7
    for name in (
        "acceptance",
        "topk_overlap",
        "topk_jaccard",
        "teacher_top1_in_topk",
        "top1_match",
        "student_top1_in_teacher_top5",
    ):
        assert torch.equal(measured[name], torch.ones(20, dtype=torch.float64)), name
    assert torch.allclose(measured["bhattacharyya"], torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_bounds(scale):
    student_NV, teacher_NV, sampled_N = random_logits(8, 60, 400, scale=scale, dtype=torch.float32)
    measured = measure(student_NV, teacher_NV, sampled_N, k=16)
    unit = [
        "compatibility",
        "compatibility_intersection",
        "topk_overlap",
        "topk_jaccard",
        "shared_student_mass",
        "bhattacharyya",
    ]
    for name in [*unit, "acceptance", "hellinger", "student_margin"]:
        assert measured[name].min() >= 0 and measured[name].max() <= 1 + 1e-6, name
    assert measured["js"].min() > 0 and measured["js"].max() <= LN2 + 1e-6
    assert (measured["compatibility_intersection"] <= measured["compatibility"] + 1e-12).all()
    assert measured["student_entropy"].max() <= math.log(400) + 1e-6
    total_variation_N = (
        0.5 * (student_NV.softmax(-1) - teacher_NV.softmax(-1)).abs().sum(-1).double()
    )
    assert (measured["forward_kl"] >= 2 * total_variation_N**2 - 1e-6).all()  # Pinsker
    assert (measured["reverse_kl"] >= 2 * total_variation_N**2 - 1e-6).all()


def test_swapping_the_models_swaps_the_directions():
    student_NV, teacher_NV, sampled_N = random_logits(9, 10, 200)
    one, other = (
        measure(student_NV, teacher_NV, sampled_N),
        measure(teacher_NV, student_NV, sampled_N),
    )
    assert torch.allclose(one["forward_kl"], other["reverse_kl"])
    assert not torch.allclose(one["forward_kl"], one["reverse_kl"], rtol=0.1)
    for name in ("js", "hellinger", "topk_overlap", "topk_jaccard", "bhattacharyya"):
        assert torch.allclose(one[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_permuting_the_vocabulary_changes_nothing(dtype):
    student_NV, teacher_NV, sampled_N = random_logits(10, 12, 321, dtype=dtype)
    order_V = torch.randperm(321, generator=torch.Generator().manual_seed(0))
    place_V = torch.empty_like(order_V).scatter_(0, order_V, torch.arange(321))
    measured = measure(student_NV, teacher_NV, sampled_N, k=16, sweep=(4,))
    permuted = measure(
        student_NV[:, order_V], teacher_NV[:, order_V], place_V[sampled_N], k=16, sweep=(4,)
    )
    for name, values_N in measured.items():
        exact = torch.zeros(12, dtype=torch.float64) if name in INDICATORS else 1e-6
        assert ((values_N - permuted[name]).abs() <= exact).all(), name


def test_shifting_the_logits_changes_nothing():
    student_NV, teacher_NV, sampled_N = random_logits(11, 5, 100)
    measured, shifted = (
        measure(student_NV, teacher_NV, sampled_N),
        measure(student_NV + 300, teacher_NV - 700, sampled_N),
    )
    assert all(torch.allclose(measured[name], shifted[name], atol=1e-10) for name in measured)


def test_mean_acceptance_under_the_student_is_one_minus_total_variation():
    student_1V, teacher_1V, _ = random_logits(12, 1, 40)
    every_V = torch.arange(40)
    measured = measure(student_1V.expand(40, -1), teacher_1V.expand(40, -1), every_V)
    p_V, q_V = student_1V[0].softmax(-1), teacher_1V[0].softmax(-1)
    assert float(p_V @ measured["acceptance"]) == pytest.approx(
        1 - 0.5 * float((p_V - q_V).abs().sum()), abs=1e-12
    )


def test_the_union_form_approaches_the_whole_as_k_grows():
    student_NV, teacher_NV, sampled_N = random_logits(13, 10, 300)
    measured = measure(student_NV, teacher_NV, sampled_N, k=4, sweep=(64, 250))
    far, near = (
        (measured[f"union_forward_kl_k{k}"] - measured["forward_kl"]).abs().max() for k in (64, 250)
    )
    assert near < 1e-3 < far or near < far / 10


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-7), (torch.float64, 1e-15)])
def test_small_divergences_keep_their_digits(dtype, tolerance):
    # A gain is the difference of two KLs: what cancels must cancel before it is summed, or
    # entropies of
    # several nats leave their rounding behind.
    student_NV, _, sampled_N = random_logits(14, 30, 2000, dtype=dtype)
    noise_NV = (
        torch.randn(30, 2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        * 1e-3
    )
    teacher_NV = (student_NV.double() + noise_NV).to(dtype)
    reference = measure(student_NV.double(), teacher_NV.double(), sampled_N)
    forward_N, reverse_N = kl_pair(student_NV, teacher_NV)
    assert reference["forward_kl"].max() < 2e-6
    assert (forward_N - reference["forward_kl"]).abs().max() < tolerance
    assert (reverse_N - reference["reverse_kl"]).abs().max() < tolerance


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("model", [0, 1])
def test_a_bad_logit_makes_its_row_nan_and_no_other(bad, model):
    student_NV, teacher_NV, sampled_N = random_logits(15, 9, 150, dtype=torch.float32)
    clean = measure(student_NV, teacher_NV, sampled_N, k=16, sweep=(4,))
    (student_NV, teacher_NV)[model][4, 17] = bad
    measured = measure(student_NV, teacher_NV, sampled_N, k=16, sweep=(4,))
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    for name, values_N in measured.items():
        assert values_N[4].isnan(), name
        assert torch.equal(values_N[others], clean[name][others]), name


def test_a_row_without_any_probability_is_nan():
    student_NV, teacher_NV, sampled_N = random_logits(16, 2, 20)
    student_NV[0] = -INF
    assert all(
        values_N[0].isnan() and not values_N[1].isnan()
        for values_N in measure(student_NV, teacher_NV, sampled_N).values()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_that_both_models_exclude_contribute_nothing(dtype):
    student_NV, teacher_NV, _ = random_logits(17, 6, 120, dtype=dtype)
    kept_V = torch.arange(120) % 3 != 1
    sampled_N = torch.arange(120)[kept_V][:6]
    student_NV[:, ~kept_V] = teacher_NV[:, ~kept_V] = -INF
    measured = measure(student_NV, teacher_NV, sampled_N, k=16)
    within = measure(student_NV[:, kept_V], teacher_NV[:, kept_V], torch.arange(6), k=16)
    for name, values_N in measured.items():
        assert torch.allclose(values_N, within[name], atol=1e-6), name
    assert_equals_oracle(student_NV, teacher_NV, sampled_N, k=16, sweep=(100,), tolerance=1e-6)


@pytest.mark.parametrize("value", [-INF, torch.finfo(torch.float32).min])
def test_a_padded_vocabulary_is_measured_as_its_rows_alone(value, monkeypatch):
    """Blocks of some rows, the last of them short: each as exact as a float64 table of that row."""
    monkeypatch.setattr(divergences, "BLOCK_BYTES", 6 * 8 * 700 * 13)
    student_NV, teacher_NV, sampled_N = padded(20, value)
    measured = measure(student_NV, teacher_NV, sampled_N, k=16, sweep=(4,))
    for row in range(len(sampled_N) - 1):
        one = slice(row, row + 1)
        alone = measure(
            student_NV[one].double(), teacher_NV[one].double(), sampled_N[one], k=16, sweep=(4,)
        )
        for name, value_1 in alone.items():
            assert torch.allclose(
                measured[name][one], value_1, rtol=1e-13, atol=1e-13, equal_nan=True
            ), (name, row)


def test_a_padded_vocabulary_takes_no_row_by_row_path(monkeypatch):
    made, centre = [], divergences.Block._centre
    monkeypatch.setattr(
        divergences.Block,
        "_centre",
        lambda self, *logits, **how: (made.append(len(logits[0])), centre(self, *logits, **how)),
    )
    measure(*padded(21, -INF))
    assert sum(made) == 90 + 89 and len(made) == 2


def test_a_token_that_only_the_student_excludes_makes_the_forward_kl_infinite():
    student_NV, teacher_NV, sampled_N = random_logits(18, 3, 30)
    student_NV[1, 5] = -INF
    sampled_N[:] = 6
    measured = measure(student_NV, teacher_NV, sampled_N, k=30)
    assert measured["forward_kl"].isinf().tolist() == [False, True, False]
    assert measured["union_forward_kl"].isinf().tolist() == [False, True, False]
    assert_equals_oracle(student_NV, teacher_NV, sampled_N, k=4, tolerance=1e-11)
    swapped = measure(teacher_NV, student_NV, sampled_N, k=4)
    assert swapped["reverse_kl"].isinf().tolist() == [False, True, False]
    assert swapped["forward_kl"].isfinite().all()


def test_a_sampled_token_without_probability():
    student_NV, teacher_NV, sampled_N = random_logits(19, 2, 30)
    teacher_NV[0, sampled_N[0]] = -INF
    measured = measure(student_NV, teacher_NV, sampled_N)
    assert float(measured["teacher_logprob"][0]) == float(measured["advantage"][0]) == -INF
    assert float(measured["acceptance"][0]) == 0


# ---------------------------------------------------------------- top-K


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 4097])
def test_top_ids_are_a_stable_sort(dtype, vocabulary):
    # Few distinct values: ties inside the list, at its edge and between groups.
    generator = torch.Generator().manual_seed(vocabulary)
    logits_NV = torch.randint(-3, 4, (40, vocabulary), generator=generator).to(dtype)
    logits_NV[logits_NV == 1] = -0.0
    logits_NV[::2] += torch.randn(20, vocabulary, generator=generator).to(dtype)
    expected = logits_NV.double().sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 5, 32, 10_000):
        assert torch.equal(top_ids(logits_NV, k), expected[:, :k])


# ---------------------------------------------------------------- from hidden states


def heads(vocabulary: int, *, dtype=torch.float32):
    """States and heads whose logits have a standard deviation of about 3, and sampled ids."""
    generator = torch.Generator().manual_seed(20)

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    student_VH, teacher_VH, student_NH, teacher_NH = (
        tensor(vocabulary, 8),
        tensor(vocabulary, 12) * 0.8,
        tensor(37, 8),
        tensor(37, 12),
    )
    sampled_N = torch.randint(vocabulary, (37,), generator=generator)
    return (
        student_NH,
        lambda h: h @ student_VH.T,
        teacher_NH,
        lambda h: h @ teacher_VH.T,
    ), sampled_N


@pytest.mark.parametrize("chunk", [1, 5, 37, 100, None])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_hidden_states_give_what_their_logits_give(chunk, dtype, tolerance):
    (student_NH, student, teacher_NH, teacher), sampled_N = heads(300, dtype=dtype)
    whole = measure(student(student_NH), teacher(teacher_NH), sampled_N, k=16, sweep=(4,))
    measured = measure_hidden(
        student_NH, student, teacher_NH, teacher, sampled_N, k=16, sweep=(4,), chunk=chunk
    )
    again = measure_hidden(
        student_NH, student, teacher_NH, teacher, sampled_N, k=16, sweep=(4,), chunk=chunk
    )
    assert set(measured) == set(whole)
    for name in whole:
        assert torch.allclose(measured[name], whole[name], rtol=tolerance, atol=tolerance), name
        assert torch.equal(measured[name], again[name]), name


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cheap_scores_are_the_measured_columns_bit_for_bit(chunk, dtype):
    states, sampled_N = heads(300, dtype=dtype)
    measured = measure_hidden(*states, sampled_N, chunk=chunk)
    expected = [measured[name] for name in ("forward_kl", "reverse_kl", "js")]
    for got, want in zip(kl_pair_hidden(*states, chunk=chunk), expected, strict=False):
        assert torch.equal(got, want)
    for got, want in zip(kl_pair_hidden(*states, chunk=chunk, js=True), expected, strict=True):
        assert torch.equal(got, want)


def test_the_cheap_scores_agree_where_a_row_is_not_finite():
    student_NV, teacher_NV, sampled_N = random_logits(21, 5, 100, dtype=torch.float32)
    student_NV[0, 1] = teacher_NV[0, 1] = student_NV[1, 2] = -INF
    student_NV[2, 3], teacher_NV[3, 4] = math.nan, INF
    measured = measure(student_NV, teacher_NV, sampled_N)
    for name, values_N in zip(
        ("forward_kl", "reverse_kl", "js"), kls_and_js(student_NV, teacher_NV), strict=True
    ):
        assert torch.equal(values_N.nan_to_num(7.0), measured[name].nan_to_num(7.0))
    assert torch.equal(
        kl_pair(student_NV, teacher_NV)[0].nan_to_num(7.0), measured["forward_kl"].nan_to_num(7.0)
    )


def test_no_positions_give_empty_columns():
    (student_NH, student, teacher_NH, teacher), sampled_N = heads(300)
    measured = measure_hidden(student_NH[:0], student, teacher_NH[:0], teacher, sampled_N[:0])
    assert {tuple(values_N.shape) for values_N in measured.values()} == {(0,)}


def test_the_likeliest_tokens_come_along_where_asked_for():
    generator = torch.Generator().manual_seed(3)
    hidden_NH, teacher_NH = (torch.randn(7, 6, generator=generator) for _ in range(2))
    head_HV, sampled_N = torch.randn(6, 40, generator=generator), torch.zeros(7, dtype=torch.long)
    plain = measure_hidden(
        hidden_NH, lambda h: h @ head_HV, teacher_NH, lambda h: h @ head_HV, sampled_N, k=4
    )
    found = measure_hidden(
        hidden_NH,
        lambda h: h @ head_HV,
        teacher_NH,
        lambda h: h @ head_HV,
        sampled_N,
        k=4,
        tops=5,
        chunk=3,
    )
    added = {
        f"{model}_top_{j}{part}"
        for model in ("student", "teacher")
        for j in range(5)
        for part in ("", "_p")
    }
    assert set(found) - set(plain) == added
    for model, states_NH in (("student", hidden_NH), ("teacher", teacher_NH)):
        best = (states_NH @ head_HV).double().softmax(-1).topk(5)
        for j in range(5):
            assert found[f"{model}_top_{j}"].tolist() == best.indices[:, j].tolist()
            torch.testing.assert_close(
                found[f"{model}_top_{j}_p"], best.values[:, j], rtol=1e-6, atol=0
            )


def test_nothing_is_projected_beyond_a_chunk():
    (student_NH, student, teacher_NH, teacher), sampled_N = heads(300)
    rows = []

    def counted(hidden_nH):
        rows.append(len(hidden_nH))
        return student(hidden_nH)

    measure_hidden(student_NH, counted, teacher_NH, teacher, sampled_N, chunk=10)
    assert rows == [0, 10, 10, 10, 7]


def test_logits_that_need_a_gradient_are_measured_without_one():
    student_NV, teacher_NV, sampled_N = random_logits(22, 3, 50)
    measured = measure(student_NV.requires_grad_(), teacher_NV, sampled_N)
    assert not any(values_N.requires_grad for values_N in measured.values())


def test_logits_in_hand_are_left_as_they_were():
    student_NV, teacher_NV, sampled_N = random_logits(23, 3, 50, dtype=torch.float32)
    copies = student_NV.clone(), teacher_NV.clone()
    measure(student_NV, teacher_NV, sampled_N)
    assert torch.equal(student_NV, copies[0]) and torch.equal(teacher_NV, copies[1])


def test_mass_outside_the_shared_vocabulary():
    (student_NH, student, teacher_NH, teacher), sampled_N = heads(300)
    shared, beyond = (lambda h: student(h)[:, :250]), (lambda h: student(h)[:, 250:])
    expected_N = student(student_NH).double().softmax(-1)[:, 250:].sum(-1)
    assert torch.allclose(mass_outside(student_NH, shared, beyond, chunk=10), expected_N, atol=1e-6)
    measured = measure_hidden(
        student_NH,
        shared,
        teacher_NH,
        lambda h: teacher(h)[:, :250],
        sampled_N.clamp(max=249),
        chunk=10,
        student_dropped=beyond,
    )
    assert torch.allclose(measured["student_dropped_mass"], expected_N, atol=1e-6)
    assert "teacher_dropped_mass" not in measured


def test_chunk_sizes():
    assert divergences.chunk_size(151_936) == 160
    assert divergences.chunk_size(10**9) == 1
    assert divergences.chunk_size(151_936, "cuda") > divergences.chunk_size(151_936)


def peak_of_scoring(vocabulary: int, positions: int, **options) -> int:
    """Most bytes that scoring holds at one time, beyond the models and states."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(width, vocabulary, generator=generator) for width in (8, 12)]
    states = [torch.randn(positions, width, generator=generator) for width in (8, 12)]
    sampled_N = torch.zeros(positions, dtype=torch.long)
    return allocated_on_the_cpu(
        lambda: measure_hidden(
            states[0],
            lambda h: h @ heads[0],
            states[1],
            lambda h: h @ heads[1],
            sampled_N,
            k=16,
            sweep=(4, 8, 32),
            **options,
        )
    )


def test_what_scoring_allocates_is_bounded():
    vocabulary = 30_000
    positions = divergences.chunk_size(vocabulary) + 1
    logits = 2 * 4 * vocabulary * (positions - 1)
    assert logits < peak_of_scoring(vocabulary, positions) <= 300 * 2**20


def test_what_scoring_allocates_does_not_grow_with_the_positions():
    once, four_times = (peak_of_scoring(20_000, n, chunk=32) for n in (40, 160))
    assert four_times <= 1.1 * once


@pytest.mark.slow
def test_peak_memory_is_bounded_and_flat():
    bench = Path(__file__).parents[2] / "benchmarks" / "bench.py"
    done = subprocess.run(
        [
            sys.executable,
            bench,
            "--quick",
            "--only",
            "scoring_peak_memory",
            "scoring_memory_growth",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["scoring_peak_memory"]["value"] <= rows["scoring_peak_memory"]["goal"] == 300
    assert rows["scoring_memory_growth"]["value"] <= rows["scoring_memory_growth"]["goal"] == 1.1


# ---------------------------------------------------------------- refusals


def test_logits_over_different_vocabularies_are_refused():
    assert (
        message(measure, torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))
        == "Student logits have shape (2, 5) and teacher logits (2, 6); both must be [positions,"
        " vocabulary] over the same ids. Slice both to the shared vocabulary first."
    )


def test_a_sampled_id_outside_the_vocabulary_is_refused():
    assert (
        message(measure, torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([4, 5]))
        == "Sampled token id 5 is outside the vocabulary of 5. The contexts were sampled with"
        " another tokenizer; sample them again."
    )


def test_as_many_sampled_ids_as_positions():
    assert (
        message(measure, torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([4]))
        == "There are 2 positions and sampled tokens of shape (1,); give one id per position."
    )


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 4, "sweep": (8, 0)}])
def test_a_support_of_no_tokens_is_refused(options):
    assert (
        message(
            measure,
            torch.zeros(1, 5),
            torch.zeros(1, 5),
            torch.zeros(1, dtype=torch.long),
            **options,
        )
        == "A support of K = 0 tokens was asked for; K must be at least 1."
    )


def test_a_chunk_of_no_positions_is_refused():
    states, sampled_N = heads(30)
    assert (
        message(measure_hidden, *states, sampled_N, chunk=0)
        == "chunk is 0; give a positive number of positions, or None to have one picked."
    )
