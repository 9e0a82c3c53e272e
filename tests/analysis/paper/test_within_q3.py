"""Quartiles inside Q3, with one generator through all of them."""

import numpy as np
import pytest

from diagnostics.analysis.paper.bank import script_table
from diagnostics.analysis.paper.within_q3 import WITHIN_SCORES, within_q3
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens, quantile
from tests.made_tokens import only_row


@pytest.fixture(scope="module")
def tokens():
    return checkpoint_tokens(14, 20)


def loop_ends(statistic, rows, context, rng):
    """Ends of a statistic of row numbers, contexts drawn one by one as the script does."""
    names, draws = list(dict.fromkeys(context[rows])), []
    for _ in range(25):
        taken = [names[i] for i in rng.choice(np.arange(len(names)), size=len(names))]
        drawn = np.concatenate([rows[context[rows] == name] for name in taken])
        draws.append(statistic(drawn))
    return np.quantile([draw for draw in draws if np.isfinite(draw)], [0.025, 0.975])


def difference(y, bottom, top):
    """The gap as a function of row numbers."""

    def of(rows):
        if not (top[rows].any() and bottom[rows].any()):
            return np.nan
        return y[rows][top[rows]].mean() - y[rows][bottom[rows]].mean()

    return of


def mean_of(y):
    """The mean as a function of row numbers."""
    return lambda rows: y[rows].mean()


def test_buckets_and_gaps_equal_a_loop_with_one_generator(tokens):
    found = within_q3(tokens, ks=(8, 16), seed=3, draws=25)
    rng = np.random.default_rng(3)
    for k in (8, 16):
        table = script_table(tokens, compatibility="after", k=k)
        y = np.clip(table.gain, *np.quantile(table.gain, [0.01, 0.99]))
        inside = np.flatnonzero(table.in_q3)
        for name in WITHIN_SCORES:
            score = table.score(name)
            edges = [quantile(list(score[inside]), share) for share in (0.25, 0.5, 0.75)]
            bucket = np.sum([score[inside] > edge for edge in edges], axis=0)
            for number in range(4):
                row = only_row(found["buckets"], k=k, score=name, bucket=number)
                rows = inside[bucket == number]
                assert row["mean"] == pytest.approx(y[rows].mean())
                ends = loop_ends(mean_of(y), rows, table.context, rng)
                assert [row["low"], row["high"]] == pytest.approx(ends)
            row = only_row(found["gaps"], k=k, score=name)
            gap = difference(y, score <= edges[0], score >= edges[2])
            assert row["gap"] == pytest.approx(gap(inside))
            ends = loop_ends(gap, inside, table.context, rng)
            assert [row["low"], row["high"]] == pytest.approx(ends)


def test_a_saturated_score_leaves_one_bucket(tokens):
    half = np.where(np.arange(len(tokens)) % 2, 1.0, 0.3)
    found = within_q3(tokens.assign(compatibility_after=half), ks=[16], draws=3)
    rows = found["buckets"][found["buckets"]["score"] == "compatibility"]

    assert list(rows["buckets"]) == [1] and list(rows["bucket"]) == [0]
    inside = script_table(tokens.assign(compatibility_after=half), compatibility="after").in_q3
    assert rows["positions"].iloc[0] == inside.sum()


def test_estimates_do_not_depend_on_the_generator(tokens):
    one, other = (within_q3(tokens, ks=[16], seed=seed, draws=5)["gaps"] for seed in (0, 1))

    assert (one["gap"] == other["gap"]).all() and (one["low"] != other["low"]).any()
