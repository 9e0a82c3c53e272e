"""Every loss: by hand, against plain loops, against traced derivatives in float64, and what the
reduction promises.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.yardsticks import LOSSES as FUSED
from benchmarks.yardsticks import allocated_on_the_cpu, full_logits
from diagnostics.core.errors import DiagnosticsError
from diagnostics.measure import divergences
from diagnostics.measure.divergences import kl_pair, measure
from diagnostics.measure.losses import LOSSES, check_loss, chunked_loss, per_position, reduce
from tests.factories import message, padded, random_logits
from tests.oracles import best, kl, softmax

INF, LN2 = math.inf, math.log(2)
SETTINGS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("sampled", {}),
    ("topk_reverse", {"k": 4}),
]


def oracle(
    student: list[float], teacher: list[float], y: int, loss: str, *, beta: float = 0.5, k: int = 16
) -> float:
    p, q = softmax(student), softmax(teacher)
    if loss == "forward_kl":
        return kl(q, p)
    if loss == "reverse_kl":
        return kl(p, q)
    if loss == "sampled":
        return -(math.log(q[y]) - math.log(p[y])) * math.log(p[y])
    if loss == "jsd":
        m = [beta * b + (1 - beta) * a for a, b in zip(p, q)]
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    kept = best(p, k)
    return kl(softmax([student[v] for v in kept]), softmax([teacher[v] for v in kept]))


def traced(
    student_NV: Tensor,
    teacher_NV: Tensor,
    sampled_N: Tensor,
    loss: str,
    *,
    beta: float = 0.5,
    k: int = 16,
) -> Tensor:
    """The textbook form, for autograd to differentiate."""
    if loss == "topk_reverse":
        kept_NK = student_NV.detach().topk(k).indices
        return traced(
            student_NV.gather(1, kept_NK), teacher_NV.gather(1, kept_NK), sampled_N, "reverse_kl"
        )
    ln_p_NV, ln_q_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    if loss == "sampled":
        ln_p_N, ln_q_N = (x.gather(1, sampled_N[:, None])[:, 0] for x in (ln_p_NV, ln_q_NV))
        return -(ln_q_N - ln_p_N).detach() * ln_p_N
    if loss == "forward_kl":
        return (ln_q_NV.exp() * (ln_q_NV - ln_p_NV)).sum(-1)
    if loss == "reverse_kl":
        return (ln_p_NV.exp() * (ln_p_NV - ln_q_NV)).sum(-1)
    ln_m_NV = (beta * ln_q_NV.exp() + (1 - beta) * ln_p_NV.exp()).log()
    return beta * (ln_q_NV.exp() * (ln_q_NV - ln_m_NV)).sum(-1) + (1 - beta) * (
        ln_p_NV.exp() * (ln_p_NV - ln_m_NV)
    ).sum(-1)


# ---------------------------------------------------------------- values and derivatives

P, Q = (
    torch.tensor([[1 / 2, 1 / 4, 1 / 4]], dtype=torch.float64).log(),
    torch.tensor([[1 / 8, 1 / 8, 3 / 4]], dtype=torch.float64).log(),
)
FORWARD, REVERSE = 0.75 * math.log(3) - 0.375 * LN2, 1.25 * LN2 - 0.25 * math.log(3)
# m = (5, 3, 8)/16
P_FROM_M = 0.5 * math.log(8 / 5) + 0.25 * math.log(4 / 3) + 0.25 * math.log(1 / 2)
Q_FROM_M = 0.125 * math.log(2 / 5) + 0.125 * math.log(2 / 3) + 0.75 * math.log(3 / 2)
BY_HAND = [
    ("forward_kl", FORWARD, [3 / 8, 1 / 8, -1 / 2]),
    (
        "reverse_kl",
        REVERSE,
        [(2 * LN2 - REVERSE) / 2, (LN2 - REVERSE) / 4, (-math.log(3) - REVERSE) / 4],
    ),
    (
        "jsd",
        (P_FROM_M + Q_FROM_M) / 2,
        [
            (math.log(8 / 5) - P_FROM_M) / 4,
            (math.log(4 / 3) - P_FROM_M) / 8,
            (math.log(1 / 2) - P_FROM_M) / 8,
        ],
    ),
    # y = 2: A = ln 3
    ("sampled", math.log(3) * 2 * LN2, [math.log(3) / 2, math.log(3) / 4, -0.75 * math.log(3)]),
    # S = {0, 1}: p_S = (2, 1)/3, q_S = (1, 1)/2
    (
        "topk_reverse",
        5 / 3 * LN2 - math.log(3),
        [
            2 / 3 * (math.log(4 / 3) - 5 / 3 * LN2 + math.log(3)),
            1 / 3 * (math.log(2 / 3) - 5 / 3 * LN2 + math.log(3)),
            0.0,
        ],
    ),
]


@pytest.mark.parametrize("loss, value, slope", BY_HAND)
def test_three_tokens_by_hand(loss, value, slope):
    student_NV = P.clone().requires_grad_()
    values_N = per_position(student_NV, Q, torch.tensor([2]), loss=loss, beta=0.5, k=2)
    values_N.sum().backward()
    assert float(values_N.detach()) == pytest.approx(value, abs=1e-12)
    assert student_NV.grad[0].tolist() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("loss, options", SETTINGS)
@pytest.mark.parametrize("vocabulary", [5, 70, 300])
def test_values_equal_plain_loops(loss, options, vocabulary):
    student_NV, teacher_NV, sampled_N = random_logits(vocabulary, 6, vocabulary)
    values_N = per_position(student_NV, teacher_NV, sampled_N, loss=loss, **options)
    for row in range(6):
        expected = oracle(
            student_NV[row].tolist(), teacher_NV[row].tolist(), int(sampled_N[row]), loss, **options
        )
        assert float(values_N[row]) == pytest.approx(expected, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize(
    "loss, options", [setting for setting in SETTINGS if setting[0] != "sampled"]
)
def test_derivatives_equal_finite_differences(loss, options):
    student_NV, teacher_NV, sampled_N = random_logits(1, 3, 11)
    assert torch.autograd.gradcheck(
        lambda z: per_position(z, teacher_NV, sampled_N, loss=loss, **options),
        student_NV.requires_grad_(),
    )


def test_the_sampled_derivative_equals_finite_differences_at_a_fixed_advantage():
    student_NV, teacher_NV, sampled_N = random_logits(2, 3, 11)
    advantage_N = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    student_NV.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: per_position(z, teacher_NV, sampled_N, loss="sampled", advantage_N=advantage_N),
        student_NV,
    )


@pytest.mark.parametrize("loss, options", SETTINGS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_derivatives_equal_traced_ones(loss, options, dtype, tolerance):
    student_NV, teacher_NV, sampled_N = random_logits(3, 8, 400, dtype=dtype)
    weights_N = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student_NV.requires_grad_()
    (
        weights_N * per_position(student_NV, teacher_NV, sampled_N, loss=loss, **options)
    ).sum().backward()
    exact_NV = student_NV.detach().double().requires_grad_()
    (weights_N * traced(exact_NV, teacher_NV.double(), sampled_N, loss, **options)).sum().backward()
    assert student_NV.grad.dtype == dtype
    assert (student_NV.grad.double() - exact_NV.grad).norm() <= tolerance * exact_NV.grad.norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_equal_to_the_student_pulls_nowhere(loss):
    student_NV, _, sampled_N = random_logits(4, 5, 100)
    student_NV.requires_grad_()
    values_N = per_position(student_NV, student_NV.detach().clone(), sampled_N, loss=loss)
    values_N.sum().backward()
    assert values_N.detach().abs().max() < 1e-15
    assert student_NV.grad.abs().max() < 1e-15


def test_kls_are_the_measured_ones_bit_for_bit():
    student_NV, teacher_NV, sampled_N = random_logits(5, 9, 500, dtype=torch.float32)
    for loss, expected_N in zip(("forward_kl", "reverse_kl"), kl_pair(student_NV, teacher_NV)):
        assert torch.equal(per_position(student_NV, teacher_NV, sampled_N, loss=loss), expected_N)


def test_jsd_at_one_half_is_the_measured_js_and_its_ends_are_the_kls():
    student_NV, teacher_NV, sampled_N = random_logits(6, 9, 200)
    measured = measure(student_NV, teacher_NV, sampled_N)
    for beta, name in ((0.5, "js"), (0.0, "forward_kl"), (1.0, "reverse_kl")):
        values_N = per_position(student_NV, teacher_NV, sampled_N, loss="jsd", beta=beta)
        assert torch.allclose(values_N, measured[name], atol=1e-12), beta
    for beta in (1e-6, 1 - 1e-6):
        near_N = per_position(student_NV, teacher_NV, sampled_N, loss="jsd", beta=beta)
        assert near_N.max() < 1e-3 < measured["forward_kl"].min()


def test_beta_weighs_the_teacher():
    student_NV, teacher_NV, sampled_N = random_logits(7, 9, 200)
    values_N = per_position(student_NV, teacher_NV, sampled_N, loss="jsd", beta=0.2)
    swapped_N = per_position(teacher_NV, student_NV, sampled_N, loss="jsd", beta=0.8)
    assert torch.allclose(values_N, swapped_N)
    assert not torch.allclose(
        values_N, per_position(student_NV, teacher_NV, sampled_N, loss="jsd", beta=0.8), rtol=1e-3
    )


def test_the_sampled_derivative_averages_to_that_of_the_reverse_kl():
    student_1V, teacher_1V, sampled_1 = random_logits(8, 1, 30)
    p_V = student_1V[0].softmax(-1)
    student_1V.requires_grad_()
    every_V = torch.arange(30)
    (
        p_V
        * per_position(
            student_1V.expand(30, -1), teacher_1V.expand(30, -1), every_V, loss="sampled"
        )
    ).sum().backward()
    exact_1V = student_1V.detach().clone().requires_grad_()
    per_position(exact_1V, teacher_1V, sampled_1, loss="reverse_kl").sum().backward()
    assert torch.allclose(student_1V.grad, exact_1V.grad, atol=1e-14)


def test_a_support_of_the_whole_vocabulary_is_the_reverse_kl():
    student_NV, teacher_NV, sampled_N = random_logits(9, 4, 40)
    whole_N = per_position(student_NV, teacher_NV, sampled_N, loss="topk_reverse", k=1000)
    assert torch.allclose(
        whole_N, per_position(student_NV, teacher_NV, sampled_N, loss="reverse_kl")
    )
    assert not torch.allclose(
        per_position(student_NV, teacher_NV, sampled_N, loss="topk_reverse", k=4),
        whole_N,
        rtol=1e-2,
    )


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, INF])
def test_a_bad_logit_shows_in_its_row_and_no_other(loss, model, bad):
    student_NV, teacher_NV, sampled_N = random_logits(10, 4, 60, dtype=torch.float32)
    clean_N = per_position(student_NV, teacher_NV, sampled_N, loss=loss)
    (student_NV, teacher_NV)[model][1, 3] = bad
    student_NV.requires_grad_()
    values_N = per_position(student_NV, teacher_NV, sampled_N, loss=loss)
    values_N.sum().backward()
    assert values_N.isnan().tolist() == [False, True, False, False]
    assert torch.equal(values_N.detach()[[0, 2, 3]], clean_N[[0, 2, 3]])
    assert student_NV.grad[1].isnan().any() and student_NV.grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("loss, options", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_that_both_models_exclude_contribute_nothing(loss, options, dtype):
    student_NV, teacher_NV, _ = random_logits(11, 4, 60, dtype=dtype)
    kept_V = torch.arange(60) % 3 != 1
    sampled_N = torch.arange(60)[kept_V][:4]
    student_NV[:, ~kept_V] = teacher_NV[:, ~kept_V] = -INF
    whole_NV, part_NV = (
        student_NV.clone().requires_grad_(),
        student_NV[:, kept_V].clone().requires_grad_(),
    )
    whole_N = per_position(whole_NV, teacher_NV, sampled_N, loss=loss, **options)
    part_N = per_position(part_NV, teacher_NV[:, kept_V], torch.arange(4), loss=loss, **options)
    (whole_N.sum() + part_N.sum()).backward()
    assert torch.allclose(whole_N, part_N, atol=1e-6)
    assert torch.allclose(whole_NV.grad[:, kept_V], part_NV.grad, atol=1e-6)
    assert not whole_NV.grad[:, ~kept_V].any()


@pytest.mark.parametrize("loss, options", SETTINGS)
@pytest.mark.parametrize("value", [-INF, torch.finfo(torch.float32).min])
def test_a_padded_vocabulary_costs_no_row_by_row_path_and_no_digit(
    loss, options, value, monkeypatch
):
    monkeypatch.setattr(divergences, "BLOCK_BYTES", 6 * 8 * 700 * 13)
    student_NV, teacher_NV, sampled_N = padded(13, value)
    made, centre = [], divergences.Block._centre
    monkeypatch.setattr(
        divergences.Block,
        "_centre",
        lambda self, *logits, **how: (made.append(len(logits[0])), centre(self, *logits, **how)),
    )
    whole_NV = student_NV.clone().requires_grad_()
    whole_N = per_position(whole_NV, teacher_NV, sampled_N, loss=loss, **options)
    whole_N.sum().backward()
    assert len(made) <= 4 + 7
    for row in range(len(sampled_N) - 1):
        one_1V = student_NV[row : row + 1].double().requires_grad_()
        one_1 = per_position(
            one_1V,
            teacher_NV[row : row + 1].double(),
            sampled_N[row : row + 1],
            loss=loss,
            **options,
        )
        one_1.sum().backward()
        close = {"rtol": 1e-6, "atol": 1e-7, "equal_nan": True}
        assert torch.allclose(whole_N[row : row + 1], one_1, **close) and torch.allclose(
            whole_NV.grad[row].double(), one_1V.grad[0], **close
        ), row


def test_a_kl_is_infinite_where_its_second_distribution_excludes_a_token():
    student_NV, teacher_NV, sampled_N = random_logits(12, 3, 30)
    first_N = student_NV.argmax(-1)
    teacher_NV[1, first_N[1]] = -INF
    for loss in ("reverse_kl", "topk_reverse"):
        assert per_position(student_NV, teacher_NV, sampled_N, loss=loss).isinf().tolist() == [
            False,
            True,
            False,
        ]
    assert per_position(teacher_NV, student_NV, sampled_N, loss="forward_kl").isinf().tolist() == [
        False,
        True,
        False,
    ]
    for loss in ("forward_kl", "jsd"):
        assert per_position(student_NV, teacher_NV, sampled_N, loss=loss).isfinite().all()


# ---------------------------------------------------------------- reduction


def test_reduce_by_hand():
    values_N, weights_N = (
        torch.tensor([2.0, math.nan, 5.0], dtype=torch.float64),
        torch.tensor([1.0, 0.0, 0.5]),
    )
    assert float(reduce(values_N, weights_N, 4.0)) == (2 + 2.5) / 4


N, V, H = 23, 90, 6


class Head:
    """Two models' states and heads. The student's is a slice of an embedding, as with tied weights
    and unequal vocabularies.
    """

    def __init__(self, kind: str, dtype=torch.float64):
        generator = torch.Generator().manual_seed(13)

        def tensor(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.kind = kind
        self.weight_VH, self.bias_V = (
            torch.nn.Parameter(tensor(V + 7, H)),
            torch.nn.Parameter(tensor(V + 7)),
        )
        self.student_NH, self.teacher_NH, self.teacher_VH = (
            tensor(N, H).requires_grad_(),
            tensor(N, H),
            tensor(V, H),
        )
        self.sampled_N = torch.randint(V, (N,), generator=generator)
        self.weights_N = torch.rand(N, generator=generator, dtype=torch.float64)
        self.weights_N[::4] = 0
        self.parameters = [
            self.student_NH,
            self.weight_VH,
            *([self.bias_V] if kind == "bias" else []),
        ]

    def student(self, hidden_nH: Tensor) -> Tensor:
        if self.kind == "matmul":
            return (hidden_nH @ self.weight_VH.T)[:, :V]
        if self.kind == "bias":
            return F.linear(hidden_nH, self.weight_VH[:V], self.bias_V[:V]) * 0.7
        logits_nV = F.linear(hidden_nH, self.weight_VH[:V])
        return torch.tanh(logits_nV / 4) * 4 if self.kind == "softcap" else logits_nV

    def teacher(self, hidden_nH: Tensor) -> Tensor:
        return F.linear(hidden_nH, self.teacher_VH)

    def chunked(
        self, loss: str, *, weights_N: Tensor | None = None, denominator: float = 3.0, **options
    ) -> Tensor:
        weights_N = self.weights_N if weights_N is None else weights_N
        return chunked_loss(
            self.student_NH,
            self.student,
            self.teacher_NH,
            self.teacher,
            self.sampled_N,
            loss=loss,
            weights_N=weights_N,
            denominator=denominator,
            **options,
        )

    def whole(self, loss: str, **options) -> Tensor:
        values_N = traced(
            self.student(self.student_NH),
            self.teacher(self.teacher_NH),
            self.sampled_N,
            loss,
            **options,
        )
        return (values_N * self.weights_N).sum() / 3.0

    def gradients(self, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, self.parameters))


def relative(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("kind", ["linear", "bias", "softcap", "matmul"])
@pytest.mark.parametrize("loss, options", SETTINGS)
def test_chunks_give_the_gradient_of_the_whole(kind, loss, options):
    exact, single = Head(kind), Head(kind, torch.float32)
    expected = exact.whole(loss, **options)
    value = exact.chunked(loss, chunk=5, **options)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    assert relative(exact.gradients(value), exact.gradients(expected)) < 1e-12
    # float32 against traced float64 from the same float32 parameters
    for mine, theirs in zip(
        (exact.weight_VH, exact.bias_V, exact.student_NH, exact.teacher_NH, exact.teacher_VH),
        (single.weight_VH, single.bias_V, single.student_NH, single.teacher_NH, single.teacher_VH),
    ):
        mine.data = theirs.data.double()
    assert (
        relative(
            single.gradients(single.chunked(loss, chunk=5, **options)),
            exact.gradients(exact.whole(loss, **options)),
        )
        < 1e-5
    )


def test_bfloat16_parameters_get_bfloat16_gradients():
    head = Head("linear", torch.bfloat16)
    gradients = head.gradients(head.chunked("reverse_kl", chunk=5))
    assert {x.dtype for x in gradients} == {torch.bfloat16}
    assert relative(gradients, head.gradients(head.whole("reverse_kl"))) < 0.05


@pytest.mark.parametrize("chunk", [1, 7, 100, None])
def test_the_chunk_size_changes_rounding_alone(chunk):
    head = Head("linear")
    assert (
        relative(
            head.gradients(head.chunked("jsd", chunk=chunk)),
            head.gradients(head.chunked("jsd", chunk=N)),
        )
        < 1e-13
    )
    again = head.gradients(head.chunked("jsd", chunk=chunk))
    assert all(
        torch.equal(a, b) for a, b in zip(again, head.gradients(head.chunked("jsd", chunk=chunk)))
    )


def test_the_loss_can_be_scaled_before_its_backward():
    head = Head("linear")
    once, scaled = (
        head.gradients(head.chunked("forward_kl")),
        head.gradients(head.chunked("forward_kl") * 0.25),
    )
    assert relative([x * 4 for x in scaled], once) < 1e-15


@pytest.mark.parametrize("loss", LOSSES)
def test_two_micro_batches_over_a_global_denominator_give_the_gradient_of_one(loss):
    head = Head("linear")
    first_N, second_N = head.weights_N.clone(), head.weights_N.clone()
    first_N[9:], second_N[:9] = 0, 0
    head.chunked(loss, weights_N=first_N, chunk=4).backward()
    head.chunked(loss, weights_N=second_N, chunk=4).backward()
    accumulated = [x.grad for x in head.parameters]
    assert relative(accumulated, head.gradients(head.chunked(loss))) < 1e-13


def test_the_head_and_an_embedding_that_share_a_weight_both_reach_it():
    head = Head("linear")
    embedded_NH = head.weight_VH[head.sampled_N]
    value = chunked_loss(
        embedded_NH,
        head.student,
        head.teacher_NH,
        head.teacher,
        head.sampled_N,
        loss="reverse_kl",
        weights_N=head.weights_N,
        denominator=3.0,
        chunk=5,
    )
    values_N = traced(
        head.student(embedded_NH), head.teacher(head.teacher_NH), head.sampled_N, "reverse_kl"
    )
    expected = (values_N * head.weights_N).sum() / 3.0
    (gradient_VH,), (expected_VH,) = (
        torch.autograd.grad(x, head.weight_VH, retain_graph=True) for x in (value, expected)
    )
    assert relative([gradient_VH], [expected_VH]) < 1e-12


def test_a_frozen_head_passes_the_gradient_to_the_states_alone():
    head = Head("linear")
    expected = head.gradients(head.chunked("forward_kl"))[0]
    head.weight_VH.requires_grad_(False)
    head.chunked("forward_kl").backward()
    assert torch.allclose(head.student_NH.grad, expected) and head.weight_VH.grad is None


def test_frozen_states_pass_the_gradient_to_the_head_alone():
    head = Head("linear")
    expected = head.gradients(head.chunked("forward_kl"))[1]
    head.student_NH = head.student_NH.detach()
    head.chunked("forward_kl").backward()
    assert torch.allclose(head.weight_VH.grad, expected)


def test_logits_kept_as_states_pass_through_a_head_without_parameters():
    # An architecture that cannot be taken apart hands over its logits.
    student_NV, teacher_NV, sampled_N = random_logits(14, 12, 40)
    student_NV.requires_grad_()
    value = chunked_loss(
        student_NV,
        lambda z: z[:, :30],
        teacher_NV,
        lambda z: z[:, :30],
        sampled_N.clamp(max=29),
        loss="reverse_kl",
        weights_N=torch.ones(12),
        denominator=12.0,
        chunk=5,
    )
    expected = traced(student_NV[:, :30], teacher_NV[:, :30], sampled_N, "reverse_kl").mean()
    assert (
        relative(
            [torch.autograd.grad(value, student_NV)[0]],
            [torch.autograd.grad(expected, student_NV)[0]],
        )
        < 1e-12
    )


def test_the_teacher_gets_no_gradient():
    head = Head("linear")
    head.teacher_VH.requires_grad_(), head.teacher_NH.requires_grad_()
    head.chunked("jsd").backward()
    assert head.teacher_VH.grad is None and head.teacher_NH.grad is None


def test_only_selected_positions_are_projected():
    head = Head("linear")
    weights_N = torch.zeros(N)
    weights_N[[3, 20]] = 1
    rows = {"student": [], "teacher": []}

    def counted(name: str):
        def logits(hidden_nH: Tensor) -> Tensor:
            rows[name].append(len(hidden_nH))
            return getattr(head, name)(hidden_nH)

        return logits

    value = chunked_loss(
        head.student_NH,
        counted("student"),
        head.teacher_NH,
        counted("teacher"),
        head.sampled_N,
        loss="reverse_kl",
        weights_N=weights_N,
        denominator=2.0,
    )
    value.backward()
    assert rows == {"student": [0, 2], "teacher": [2]}
    assert head.student_NH.grad.abs().sum(-1).nonzero()[:, 0].tolist() == [3, 20]


def test_no_selected_position_is_a_loss_of_nothing():
    head = Head("linear")
    value = head.chunked("reverse_kl", weights_N=torch.zeros(N))
    value.backward()
    assert float(value.detach()) == 0 and not head.student_NH.grad.any()


def test_without_gradients_the_value_is_the_same():
    head = Head("linear")
    expected = head.chunked("jsd", beta=0.3, chunk=4)
    with torch.no_grad():
        value = head.chunked("jsd", beta=0.3, chunk=4)
    assert not value.requires_grad and torch.equal(value, expected.detach())


def test_a_given_advantage_replaces_the_current_one():
    head = Head("linear")
    advantage_N = torch.linspace(-1, 1, N, dtype=torch.float64)
    value = head.chunked("sampled", advantage_N=advantage_N, chunk=5)
    ln_p_N = head.student(head.student_NH).log_softmax(-1).gather(1, head.sampled_N[:, None])[:, 0]
    expected = -(advantage_N * ln_p_N * head.weights_N).sum() / 3.0
    assert float(value.detach()) == pytest.approx(float(expected.detach()))
    assert relative(head.gradients(value), head.gradients(expected)) < 1e-12


def test_a_second_backward_is_refused():
    value = Head("linear").chunked("reverse_kl")
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError) as raised:
        value.backward()
    assert (
        str(raised.value)
        == "chunked_loss frees its derivative in the first backward; call it again for a second."
    )


@pytest.mark.slow
def test_peak_memory_is_a_quarter_of_the_full_logits():
    bench = Path(__file__).parents[2] / "benchmarks" / "bench.py"
    names = [
        f"loss_memory_{loss}" for loss in ("forward_kl", "reverse_kl")
    ]  # jsd takes the most memory in full, and so passes by most
    done = subprocess.run(
        [sys.executable, bench, "--quick", "--json", "--only", *names],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    for name in names:
        assert rows[name]["value"] <= rows[name]["goal"] == 0.25, name


@pytest.mark.parametrize("loss", FUSED)
def test_loss_and_backward_take_a_third_of_the_full_logits_at_most(loss):
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(4000, 24, generator=generator) for _ in range(2)]
    states = [torch.randn(512, 24, generator=generator) for _ in range(2)]
    heads[0].requires_grad_(), states[0].requires_grad_()

    def ours() -> Tensor:
        return chunked_loss(
            states[0],
            lambda h_nH: F.linear(h_nH, heads[0]),
            states[1],
            lambda h_nH: F.linear(h_nH, heads[1]),
            torch.zeros(512, dtype=torch.long),
            loss=loss,
            weights_N=torch.ones(512),
            denominator=512.0,
            chunk=64,
        )

    def full() -> Tensor:
        return full_logits(states[0], heads[0], states[1], heads[1], loss)

    assert float(ours().detach()) == pytest.approx(float(full().detach()), rel=1e-5)
    taken, whole = (
        allocated_on_the_cpu(lambda f=f: torch.autograd.grad(f(), [states[0], heads[0]]))
        for f in (ours, full)
    )
    assert taken <= whole / 3


def chunk_gradients(head, student_NH: Tensor, teacher_NV: Tensor, loss: str, *, chunk=None):
    """Value and derivative in the states of one chunked loss, weights 1."""
    states_NH = student_NH.clone().requires_grad_()
    value = chunked_loss(
        states_NH,
        head,
        teacher_NV,
        lambda logits_nV: logits_nV,
        torch.zeros(len(states_NH), dtype=torch.long),
        loss=loss,
        weights_N=torch.ones(len(states_NH)),
        denominator=float(len(states_NH)),
        chunk=chunk,
    )
    return value.detach(), torch.autograd.grad(value, states_NH)[0]


def test_a_chunk_holds_no_second_copy_of_its_logits(monkeypatch):
    """Its derivative is written over them, so that a chunk takes both models' logits alone."""
    monkeypatch.setattr(divergences, "BLOCK_BYTES", 2**16)
    weight_VH, states_NH = torch.randn(5000, 4), torch.randn(200, 4)
    teacher_NV = torch.randn(200, 5000)
    one = teacher_NV.nbytes  # the teacher's part of the chunk is a copy
    taken = allocated_on_the_cpu(
        lambda: chunk_gradients(
            lambda h_nH: F.linear(h_nH, weight_VH), states_NH, teacher_NV, "reverse_kl", chunk=200
        )
    )
    assert 2 * one < taken < 2.5 * one


@pytest.mark.parametrize("last", [torch.tanh, torch.exp, torch.sigmoid])
@pytest.mark.parametrize("loss", LOSSES)
def test_logits_that_their_own_derivative_needs_are_left_alone(last, loss):
    weight_VH = torch.randn(40, 6, dtype=torch.float64) / 2
    states_NH, teacher_NV = (torch.randn(5, n, dtype=torch.float64) for n in (6, 40))

    def head(h_nH: Tensor) -> Tensor:
        return last(F.linear(h_nH, weight_VH))

    _, found_NH = chunk_gradients(head, states_NH, teacher_NV, loss, chunk=2)
    leaf_NH = states_NH.clone().requires_grad_()
    values_N = per_position(head(leaf_NH), teacher_NV, torch.zeros(5, dtype=torch.long), loss=loss)
    (expected_NH,) = torch.autograd.grad(values_N.mean(), leaf_NH)
    assert torch.allclose(found_NH, expected_NH, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_that_are_taken_again_still_have_their_logits(loss):
    """A token that the teacher excludes sends rows 1 and 3 to float64, after the derivative of the
    others has been written over the logits.
    """
    weight_VH, states_NH, teacher_NV = torch.randn(40, 6), torch.randn(5, 6), torch.randn(5, 40)
    weight_VH[7] = torch.tensor([1e38, 0, 0, 0, 0, 0])
    states_NH[:, 0] = torch.tensor([0.0, -1.5, 0.0, -2.0, 0.0])
    teacher_NV[[1, 3], 7] = -INF

    def head(h_nH: Tensor) -> Tensor:
        return F.linear(h_nH, weight_VH.to(h_nH.dtype))

    value, found_NH = chunk_gradients(head, states_NH, teacher_NV, loss)
    leaf_NH = states_NH.double().requires_grad_()
    values_N = per_position(
        head(leaf_NH), teacher_NV.double(), torch.zeros(5, dtype=torch.long), loss=loss
    )
    (expected_NH,) = torch.autograd.grad(values_N.mean(), leaf_NH)
    assert torch.allclose(value, values_N.mean(), rtol=1e-5)
    assert torch.allclose(found_NH.double(), expected_NH, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- refusals


def test_an_unknown_loss_is_refused():
    expected = "Unknown loss 'kl'. Known are forward_kl, reverse_kl, jsd, sampled, topk_reverse."
    assert message(check_loss, "kl") == expected
    assert message(per_position, P, Q, torch.tensor([0]), loss="kl") == expected


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_a_beta_outside_its_range_is_refused(beta):
    assert (
        message(check_loss, "jsd", beta=beta)
        == f"beta is {beta}; it weighs two divergences and must lie in [0, 1]. 0 is forward KL, 1"
        " reverse KL."
    )


def test_a_support_of_no_tokens_is_refused():
    assert (
        message(check_loss, "topk_reverse", k=0)
        == "A support of K = 0 tokens was asked for; K must be at least 1."
    )


@pytest.mark.parametrize("denominator", [0, -1.0, math.nan])
def test_a_denominator_of_nothing_is_refused(denominator):
    expected = f"The denominator of the loss is {denominator}; select at least one position."
    assert message(reduce, torch.ones(2), torch.ones(2), denominator) == expected
    assert message(Head("linear").chunked, "reverse_kl", denominator=denominator) == expected
    assert issubclass(DiagnosticsError, ValueError)
