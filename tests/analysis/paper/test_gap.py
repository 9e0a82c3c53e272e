"""The Q3 gap of the released scripts: cuts with ties, draws of contexts and matched pairs."""

import numpy as np
import pytest

from diagnostics.analysis.paper import gap
from diagnostics.analysis.paper.bank import script_table
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens, quantile, script_columns


def made(n=120, contexts=9, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), rng.integers(0, contexts, n), np.round(rng.random(n), 1)


def test_the_cuts_equals_belong_to_both_groups():
    # The third of 1 1 1 2 3 3 is at 1 + 2/3 * 0 = 1, two thirds at 2.333.
    bottom, top = gap.ends(np.array([1.0, 1, 1, 2, 3, 3]), 3)
    assert list(bottom) == [True, True, True, False, False, False]
    assert list(top) == [False, False, False, False, True, True]
    # A constant score puts every position into both.
    bottom, top = gap.ends(np.ones(4), 4)
    assert bottom.all() and top.all()


def test_the_upper_third_begins_at_two_thirds_and_not_a_bit_above():
    # Of 0..3 the two thirds' quantile is 2; 1 - 1/3 is a bit more than 2/3 in float64.
    _, top = gap.ends(np.arange(4.0), 3)
    assert list(top) == [False, False, True, True]


def test_a_gap_is_worked_by_hand():
    y = np.array([1.0, 2.0, 4.0, 10.0])
    groups = np.array([True, True, False, False]), np.array([False, False, False, True])
    found = gap.gap(y, np.zeros(4), groups, rng=np.random.default_rng(0), draws=5)

    assert (found.bottom, found.top, found.bottom_mean, found.top_mean) == (2, 1, 1.5, 10.0)
    # One context gives the same draw again and again.
    assert (found.estimate, found.low, found.high) == (8.5, 8.5, 8.5)


@pytest.mark.parametrize("call", ["choice", "integers"])
def test_its_interval_equals_a_loop_over_draws(call):
    y, context, score = made()
    groups = gap.ends(score, 3)
    names = list(dict.fromkeys(context.tolist()))
    rng, draws = np.random.default_rng(5), []
    for _ in range(60):
        n = len(names)
        taken = rng.choice(np.arange(n), size=n) if call == "choice" else rng.integers(0, n, n)
        rows = np.concatenate([np.flatnonzero(context == names[i]) for i in taken])
        draws.append(y[rows][groups[1][rows]].mean() - y[rows][groups[0][rows]].mean())

    found = gap.gap(y, context, groups, rng=np.random.default_rng(5), draws=60)

    assert [found.low, found.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-12)


def test_draws_without_a_group_do_not_count():
    # The top group lies in one context of two, so a quarter of the draws has none of it.
    y, context = np.array([0.0, 1.0, 5.0]), np.array([0, 0, 1])
    groups = np.array([True, False, False]), np.array([False, False, True])
    found = gap.gap(y, context, groups, rng=np.random.default_rng(0), draws=200)

    assert found.low == found.high == found.estimate == 5.0


def test_a_gap_without_a_group_is_undefined():
    nobody = np.zeros(2, bool)
    found = gap.gap(np.ones(2), np.arange(2), (nobody, ~nobody), rng=np.random.default_rng(0))

    assert np.isnan([found.estimate, found.low, found.high]).all() and found.bottom == 0


def test_a_gap_keeps_the_outcomes_unit_and_forgets_its_origin():
    y, context, score = made()
    groups = gap.ends(score, 4)
    one, other = (
        gap.gap(values, context, groups, rng=np.random.default_rng(1), draws=50)
        for values in (y, 3 * y + 7)
    )

    assert [other.estimate, other.low, other.high] == pytest.approx(
        [3 * one.estimate, 3 * one.low, 3 * one.high]
    )


def test_a_means_interval_equals_a_loop_and_needs_two_contexts():
    y, context, _ = made()
    names = list(dict.fromkeys(context.tolist()))
    rng, draws = np.random.default_rng(5), []
    for _ in range(40):
        taken = rng.choice(np.arange(len(names)), size=len(names))
        draws.append(np.concatenate([y[context == names[i]] for i in taken]).mean())
    found = gap.mean_interval(y, context, rng=np.random.default_rng(5), draws=40)

    assert found == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-12)
    assert np.isnan(
        gap.mean_interval(y, np.zeros(len(y)), rng=np.random.default_rng(5), draws=4)
    ).all()
    assert np.isnan(gap.interval(np.empty(0))).all()


# Matched pairs


def test_matched_pairs_are_worked_by_hand():
    # Context 0 has the median score 2: 3 and 4 lie above it, and their nearest at 0 and 1 are
    # the positions at .1 and .9. Context 1 has one position, and no pair.
    y = np.array([1.0, 2.0, 10.0, 20.0, 99.0])
    score = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    space = np.array([[0.1], [0.9], [0.0], [1.0], [0.5]])
    found = gap.matched_gap(y, np.array([0, 0, 0, 0, 1]), score, space)

    assert (found.pairs, found.mean, found.median) == (2, 13.5, 13.5)


def test_the_first_of_equally_near_positions_is_taken_again_and_again():
    y, score = np.array([1.0, 5.0, 7.0]), np.array([0.0, 0.0, 1.0])
    found = gap.matched_gap(y, np.zeros(3), score, np.array([[-1.0], [1.0], [0.0]]))

    assert (found.pairs, found.mean) == (1, 6.0)


def test_matched_pairs_equal_a_loop():
    y, context, score = made(seed=3)
    space = np.round(np.random.default_rng(4).random((len(y), 3)), 1)
    differences = []
    for name in set(context.tolist()):
        rows = [i for i in range(len(y)) if context[i] == name]
        middle = quantile([score[i] for i in rows], 0.5)
        low = [i for i in rows if score[i] <= middle]
        for i in (i for i in rows if score[i] > middle):
            distances = [float(((space[i] - space[j]) ** 2).sum()) for j in low]
            differences.append(y[i] - y[low[distances.index(min(distances))]])
    found = gap.matched_gap(y, context, score, space)

    assert found.pairs == len(differences) > 20
    assert found.mean == pytest.approx(np.mean(differences), abs=1e-12)
    assert found.median == pytest.approx(np.median(differences), abs=1e-12)


def test_without_a_pair_the_matched_gap_is_undefined():
    found = gap.matched_gap(np.ones(3), np.zeros(3), np.ones(3), np.zeros((3, 1)))

    assert found.pairs == 0 and np.isnan([found.mean, found.median]).all()


# The gain script


def test_the_gain_script_reads_the_trained_students_entropy_and_compatibility():
    tokens = checkpoint_tokens(seed=2)
    trained = tokens.assign(
        student_entropy=tokens["student_entropy_after"], compatibility=tokens["compatibility_after"]
    )
    slow = script_columns(trained)
    h, d, c, y = (slow[name] for name in ("h", "d", "c", "gain"))
    inside = (h <= np.median(h)) & (d >= np.median(d))
    low, high = (quantile(list(c[inside]), share) for share in (1 / 3, 2 / 3))
    found = gap.gain_statistics(tokens, draws=10)

    assert found.positions == inside.sum() and found.mean == pytest.approx(y.mean())
    assert found.gap.estimate == pytest.approx(
        y[inside & (c >= high)].mean() - y[inside & (c <= low)].mean()
    )
    asked = gap.gain_statistics(trained, entropy="before", compatibility="before", draws=10)
    assert asked.gap == found.gap and asked.matched == found.matched
    before = gap.gain_statistics(tokens, entropy="before", compatibility="before", draws=10)
    assert before.gap.estimate != found.gap.estimate


def test_its_fits_equal_least_squares_on_the_same_columns():
    tokens = checkpoint_tokens(seed=2)
    table = script_table(tokens, entropy="after", compatibility="after")
    h, d, c, y = table.entropy, table.divergence, table.compatibility, table.gain
    base = [h, d, h * d, table.position, table.teacher_entropy]

    def r_squared(columns):
        design = np.column_stack([np.ones(len(y)), *columns])
        rest = y - design @ np.linalg.lstsq(design, y)[0]
        return 1 - rest @ rest / np.sum((y - y.mean()) ** 2)

    found = gap.gain_statistics(tokens, draws=10)
    assert found.r_squared == pytest.approx(r_squared(base))
    assert found.gained_by_compatibility == pytest.approx(r_squared([*base, c]) - r_squared(base))
    split = [h, d * c, d * (1 - c), table.position, table.teacher_entropy]
    assert found.gained_by_split == pytest.approx(r_squared(split) - r_squared(base))


def test_a_constant_has_no_range():
    assert list(gap.unit_range(np.array([2.0, 4.0, 3.0]))) == [0, 1, 0.5]
    assert list(gap.unit_range(np.ones(2))) == [0, 0]
