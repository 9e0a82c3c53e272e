"""The released exact selections: counts, ties on every side, seeds and intervals."""

from itertools import combinations

import numpy as np
import pytest

from diagnostics.analysis.paper import topn
from diagnostics.analysis.paper.bank import script_table
from diagnostics.analysis.paper.gap import mean_interval
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens
from tests.factories import message
from tests.made_tokens import only_row


@pytest.fixture(scope="module")
def table():
    return script_table(checkpoint_tokens(14, 20), compatibility="after")


@pytest.mark.parametrize(
    "positions, budget, count", [(50, 0.05, 2), (70, 0.05, 4), (10, 0.01, 1), (2526, 0.05, 126)]
)
def test_a_budget_is_rounded_half_to_even_and_is_at_least_one(positions, budget, count):
    assert topn.selection_count(positions, budget) == count


@pytest.mark.parametrize("budget", [0.0, 1.5])
def test_a_budget_outside_0_to_1_is_refused(budget):
    assert message(topn.selection_count, 10, budget) == (
        f"A budget is a share of positions in (0, 1]; got {budget}."
    )


def test_what_ties_leave_open_is_worked_by_hand():
    # 3 is taken; of the three positions with score 2 one more is.
    found = topn.under_ties(np.array([3, 2, 2, 2, 1]), np.array([10.0, 1, 2, 6, 99]), 2)

    assert found == topn.UnderTies((10 + 3) / 2, 5.5, 8.0, tied=3, taken=1)


@pytest.mark.parametrize("count", range(1, 9))
def test_what_ties_leave_open_equals_every_choice(count):
    rng = np.random.default_rng(count)
    score, y = rng.integers(0, 3, 8), rng.normal(size=8)
    best = sorted(score)[::-1][:count]
    means = [
        y[list(rows)].mean()
        for rows in combinations(range(8), count)
        if sorted(score[list(rows)])[::-1] == best
    ]
    found = topn.under_ties(score, y, count)

    assert [found.expected, found.least, found.greatest] == pytest.approx(
        [np.mean(means), min(means), max(means)]
    )


@pytest.mark.parametrize("order", ["random", "script"])
def test_the_best_come_first_whatever_the_order_of_equals(order):
    score = np.random.default_rng(0).integers(0, 5, 60).astype(float)
    rows = topn.best(score, 20, order=order)

    assert len(set(rows)) == 20 and list(score[rows]) == sorted(score)[::-1][:20]


def test_equals_are_drawn_at_random_with_a_seed():
    ones = np.ones(50)
    assert list(topn.best(ones, 5, seed=1)) == list(topn.best(ones, 5, seed=1))
    taken = np.array([topn.best(ones, 5, seed=seed) for seed in range(300)])
    # Every position is as likely as any other: 30 times each, give or take.
    assert np.bincount(taken.ravel(), minlength=50).min() > 10


def test_a_seed_is_made_of_k_budget_and_selector():
    assert topn.selector_seed("tip", k=16, budget=0.03, salt=7) == 20260515 + 16000 + 3000 + 7
    # Without the hash of a run of the script a checksum of the name takes its place, in every
    # process the same.
    assert topn.selector_seed("tip", k=8, budget=0.1) == 20260515 + 8000 + 10000 + 948


def test_selections_equal_a_loop(table):
    found = topn.top_gains(table, budgets=[0.1], salts={"divergence": 3, "random": 4}, draws=30)
    y = np.clip(table.gain, *np.quantile(table.gain, [0.01, 0.99]))
    n = round(0.1 * len(y))

    row = only_row(found, selector="teachability")
    d_and_c = table.divergence * table.compatibility
    best = sorted(range(len(y)), key=lambda i: -d_and_c[i])[:n]
    assert (row["positions"], row["tied"]) == (n, 1)
    assert row["mean"] == pytest.approx(np.mean([y[i] for i in best]))
    assert row["mean"] == row["expected"] == row["least"] == pytest.approx(row["greatest"])
    assert row["per_kept_share"] == pytest.approx(row["mean"] * len(y) / n)
    assert row["q3_share"] == pytest.approx(np.mean([table.in_q3[i] for i in best]))

    row = only_row(found, selector="random")
    rng = np.random.default_rng(20260515 + 16000 + 10000 + 4)
    chosen = rng.choice(len(y), size=n, replace=False)
    ends = mean_interval(y[chosen], table.context[chosen], rng=rng, draws=30)
    assert row["mean"] == pytest.approx(y[chosen].mean())
    assert (row["low"], row["high"]) == pytest.approx(ends) and np.isnan(row["expected"])


def test_selectors_that_put_q3_first_take_all_of_it_before_the_rest(table):
    share = table.in_q3.mean()
    found = topn.top_gains(table, budgets=[share / 2, 1.0], draws=2)
    first = found[found["selector"].str.startswith("q3_")]

    assert (first[first["budget"] < 1]["q3_share"] == 1).all()
    assert first[first["budget"] == 1]["q3_share"].to_numpy() == pytest.approx(share)
    whole = found[found["budget"] == 1]["mean"]
    assert whole.to_numpy() == pytest.approx(whole.iloc[0])


def test_a_tied_mean_lies_between_the_least_and_the_greatest(table):
    found = topn.top_gains(table, budgets=[0.01, 0.03], draws=2)
    tied = found[found["tied"] > found["taken"]]

    assert {"divergence", "entropy"} <= set(tied["selector"])
    assert (tied["least"] < tied["greatest"]).all()
    for column in ("mean", "expected"):
        assert (tied[column] >= tied["least"] - 1e-12).all()
        assert (tied[column] <= tied["greatest"] + 1e-12).all()
