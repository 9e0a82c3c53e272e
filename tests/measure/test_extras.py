"""Measurements that are made on request: by hand, by a slow loop, and where they are refused."""

from math import exp, inf, log, nan

import numpy as np
import pytest
import torch

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import SCHEMA, column
from diagnostics.measure.divergences import measure_hidden
from diagnostics.measure.extra_names import COLUMNS, extras_of
from diagnostics.measure.extras import (
    asked,
    measure_extras,
    signal_and_noise,
)


def random_logits(positions=40, vocabulary=30, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(
        2, positions, vocabulary, generator=generator, dtype=torch.float64
    )
    sampled = torch.randint(vocabulary, (positions,), generator=generator)
    return student, teacher, sampled


def log_softmax(row):
    top = max(row)
    total = log(sum(exp(v - top) for v in row))
    return [v - top - total for v in row]


def loop(ln_p, ln_q):
    """Signal and noise by sums over a dictionary of tokens, as the formula is written."""
    p = {a: exp(v) for a, v in enumerate(ln_p) if v > -inf}
    rho = {a: min(max(ln_p[a] - ln_q[a], -30.0), 30.0) for a in p}
    weight = {a: (1 - p[a]) / p[a] for a in p}
    mean = sum(p[a] * rho[a] for a in p)
    signal = sum(p[a] * (rho[a] - mean) ** 2 for a in p)
    base = sum(p[a] * rho[a] * weight[a] for a in p) / sum(p[a] * weight[a] for a in p)
    return signal, sum(p[a] * (rho[a] - base) ** 2 * weight[a] for a in p) - signal


def listed(ln_p, ln_q, y, k):
    """Both models over S, T and y, with -12 for what is missing from a model's own list."""

    def best(row):
        return sorted(range(len(row)), key=lambda a: (-row[a], a))[:k]

    s, t = best(ln_p), best(ln_q)
    tokens = sorted({*s, *t, y})
    return [
        log_softmax([row[a] if a in own or a == y else -12.0 for a in tokens])
        for row, own in ((ln_p, s), (ln_q, t))
    ]


def test_three_tokens_by_hand():
    """p = 1/2, 1/3, 1/6 and ln p/q = 0, 1, 2 up to a constant.

    E rho = 2/3 and Var rho = 5/9; b = (2/3 + 2 * 5/6)/2 = 7/6 and E (rho - b)^2 L = 23/18.
    """
    ln_p = torch.tensor([[1 / 2, 1 / 3, 1 / 6]], dtype=torch.float64).log()
    ln_q = (ln_p - torch.tensor([0.0, 1.0, 2.0])).log_softmax(-1)
    signal, noise = signal_and_noise(ln_p, ln_q)
    assert signal.item() == pytest.approx(5 / 9) and noise.item() == pytest.approx(13 / 18)
    found = measure_extras(ln_p, ln_q, torch.tensor([2]), names=["ier"], k=3)
    assert found["ier_signal"].item() == pytest.approx(5 / 9)
    assert found["ier_full_noise"].item() == pytest.approx(13 / 18)


def test_a_token_that_is_missing_from_a_list_has_the_floor_and_the_sampled_one_has_not():
    """K = 1: S is token 0, T is token 1, y is token 2; each model misses the other's first choice.

    Left are the student's ln p(0), -12, ln p(2) and the teacher's -12, ln q(1), ln q(2).
    """
    ln_p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    ln_q = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64).log()
    found = measure_extras(ln_p, ln_q, torch.tensor([2]), names=["ier"], k=1)
    expected = loop(
        log_softmax([log(0.6), -12.0, log(0.1)]), log_softmax([-12.0, log(0.7), log(0.1)])
    )
    assert found["ier_signal"].item() == pytest.approx(expected[0], rel=1e-9)
    assert found["ier_noise"].item() == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_column_equals_its_loop(dtype):
    student, teacher, sampled = random_logits()
    student, teacher = student.to(dtype), teacher.to(dtype)
    names = list(COLUMNS)
    found = measure_extras(student, teacher, sampled, names=names, k=4, sweep=(2,))
    for i in range(len(sampled)):
        ln_p, ln_q = (log_softmax(rows[i].double().tolist()) for rows in (student, teacher))
        signal, noise = loop(ln_p, ln_q)
        assert found["ier_full_signal"][i].item() == pytest.approx(signal, rel=1e-9)
        assert found["ier_full_noise"][i].item() == pytest.approx(noise, rel=1e-9, abs=1e-12)
        for k, suffix in ((4, ""), (2, "_k2")):
            signal, noise = loop(*listed(ln_p, ln_q, int(sampled[i]), k))
            assert found[f"ier_signal{suffix}"][i].item() == pytest.approx(signal, rel=1e-9)
            assert found[f"ier_noise{suffix}"][i].item() == pytest.approx(noise, rel=1e-7, abs=1e-9)
        first = max(range(len(ln_q)), key=lambda a: (ln_q[a], -a))
        gap = exp(ln_q[first]) - exp(ln_p[first])
        assert found["teacher_top1_gap"][i].item() == pytest.approx(gap, abs=1e-12)


def test_the_noise_is_the_gradients_variance_in_the_fisher_metric():
    """The gradient of token a is (rho_a - b)(e_a - p); its covariance is summed token by token."""
    student, teacher, sampled = random_logits(positions=5, vocabulary=6, spread=1.0)
    found = measure_extras(student, teacher, sampled, names=["ier"], k=6)
    for i in range(5):
        ln_p, ln_q = student[i].log_softmax(-1).numpy(), teacher[i].log_softmax(-1).numpy()
        p, rho = np.exp(ln_p), ln_p - ln_q
        inverse = np.linalg.pinv(np.diag(p) - np.outer(p, p))
        directions = np.eye(6) - p

        def spread(base, p=p, rho=rho, inverse=inverse, directions=directions):
            gradients = (rho - base)[:, None] * directions
            middle = gradients - p @ gradients
            return p @ np.einsum("ai,ij,aj->a", middle, inverse, middle)

        mean = p @ (rho[:, None] * directions)
        assert found["ier_full_signal"][i].item() == pytest.approx(mean @ inverse @ mean)
        best = min(spread(base) for base in np.linspace(-5, 5, 4001))
        assert found["ier_full_noise"][i].item() == pytest.approx(best, rel=1e-4)


def test_the_noise_is_never_negative_and_zero_over_two_tokens():
    student, teacher, sampled = random_logits(positions=400, spread=8.0)
    found = measure_extras(student, teacher, sampled, names=["ier"], k=8)
    assert all((values >= 0).all() for values in found.values())
    pair = measure_extras(student[:, :2], teacher[:, :2], sampled % 2, names=["ier"], k=2)
    assert pair["ier_full_noise"].numpy() == pytest.approx(0, abs=1e-9)
    assert (pair["ier_full_signal"] > 0).any()


def test_a_teacher_that_is_the_student_has_neither_signal_nor_noise():
    student, _, sampled = random_logits()
    found = measure_extras(student, student, sampled, names=list(COLUMNS), k=4)
    assert all((values == 0).all() for values in found.values())


def test_a_shift_of_the_logits_changes_nothing():
    student, teacher, sampled = random_logits()
    plain = measure_extras(student, teacher, sampled, names=["ier"], k=4)
    moved = measure_extras(student + 7, teacher - 3, sampled, names=["ier"], k=4)
    for name in plain:
        assert moved[name].numpy() == pytest.approx(plain[name].numpy(), abs=1e-9)


def test_excluded_and_undefined_logits():
    student, teacher, sampled = random_logits(positions=3, vocabulary=4)
    student[0, 1], teacher[0, 2], student[1, 0] = -inf, -inf, nan
    sampled[0] = 0
    found = measure_extras(student, teacher, sampled, names=list(COLUMNS), k=2)
    ln_p, ln_q = (log_softmax([float(v) for v in rows[0]]) for rows in (student, teacher))
    signal, noise = loop(ln_p, ln_q)
    assert found["ier_full_signal"][0].item() == pytest.approx(signal)
    assert found["ier_full_noise"][0].item() == pytest.approx(noise)
    for values in found.values():
        assert torch.isnan(values).tolist() == [False, True, False]


def test_the_table_is_measured_block_by_block_and_joins_the_other_columns():
    student, teacher, sampled = random_logits(positions=21)
    more = asked(("teacher_top1_gap", "ier"), k=4, sweep=(2,))
    whole = measure_hidden(
        student, lambda x: x, teacher, lambda x: x, sampled, k=4, sweep=(2,), chunk=5, more=more
    )
    plain = measure_hidden(student, lambda x: x, teacher, lambda x: x, sampled, k=4, sweep=(2,))
    own = set(whole) - set(plain)
    assert own == {name for names in COLUMNS.values() for name in names} | {
        "ier_signal_k2",
        "ier_noise_k2",
    }
    expected = measure_extras(student, teacher, sampled, names=list(COLUMNS), k=4, sweep=(2,))
    for name in own:
        assert torch.equal(whole[name], expected[name]) and column(name) is not None
    nothing = measure_extras(student[:0], teacher[:0], sampled[:0], names=["ier"], k=4)
    assert all(len(values) == 0 for values in nothing.values())


def test_the_extras_of_columns():
    assert extras_of(["ier_noise_k8", "entropy", "gain"]) == ("ier",)
    assert extras_of(["teacher_top1_gap", "ier_full_signal"]) == ("ier", "teacher_top1_gap")
    assert extras_of(["compatibility"]) == () and asked((), k=4) is None
    assert all(name in SCHEMA for names in COLUMNS.values() for name in names)


def test_an_unknown_extra_is_refused():
    with pytest.raises(DiagnosticsError) as caught:
        asked(("iers",), k=16)
    assert str(caught.value) == (
        "Unknown extra measurement 'iers'. Did you mean 'ier'? Known are ier, teacher_top1_gap."
    )
