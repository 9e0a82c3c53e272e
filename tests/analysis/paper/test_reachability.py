"""Reach of the teacher's first choice inside Q3: folds, the unconverged fit, and both scores."""

import math

import numpy as np
import pytest

from diagnostics.analysis.paper import reachability
from tests.factories import message


def made(n=240, samples=12, seed=0):
    rng = np.random.default_rng(seed)
    h, d, proxy = rng.random((3, n))
    reached = rng.random(n) < 1 / (1 + np.exp(-4 * (proxy - 0.5)))
    return h, d, reached, rng.integers(0, samples, n), {"mass": proxy, "one": np.ones(n)}


def slow_logistic(columns, y, judged):
    """The fit with one number at a time."""
    n, p = columns.shape
    mean, spread = columns.mean(axis=0), columns.std(axis=0)
    rows = [[1.0, *((row - mean) / spread)] for row in columns]
    positive = sum(y)
    beta = [0.0] * (p + 1)
    for _ in range(700):
        slope = [0.0] * (p + 1)
        for row, target in zip(rows, y):
            weight = n / (2 * (positive if target else n - positive))
            error = 1 / (1 + math.exp(-sum(b * x for b, x in zip(beta, row)))) - target
            slope = [s + weight * error * x / n for s, x in zip(slope, row)]
        slope = [slope[0], *(s + 1e-4 * b for s, b in zip(slope[1:], beta[1:]))]
        beta = [b - 0.08 * s for b, s in zip(beta, slope)]
    logits = [sum(b * x for b, x in zip(beta, [1.0, *((row - mean) / spread)])) for row in judged]
    return [1 / (1 + math.exp(-logit)) for logit in logits]


def test_the_fit_equals_a_loop():
    rng = np.random.default_rng(0)
    columns, judged = rng.normal(size=(20, 2)), rng.normal(size=(5, 2))
    y = (columns[:, 0] + rng.normal(size=20) > 0).astype(float)

    assert reachability.logistic(columns, y, judged) == pytest.approx(
        slow_logistic(columns, y, judged), abs=1e-10
    )


def test_a_constant_column_changes_nothing():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(20, 1))
    y = (columns[:, 0] > 0).astype(float)
    wide = np.column_stack([columns, np.full(20, 3.0)])

    assert reachability.logistic(wide, y, wide) == pytest.approx(
        reachability.logistic(columns, y, columns)
    )


def test_scores_equal_a_loop_over_folds():
    h, d, reached, sample, proxies = made()
    rows = reachability.reachability(h, d, reached, sample, proxies).set_index("proxy")
    inside = (h <= np.median(h)) & (d >= np.median(d))
    y, group = reached[inside].astype(float), sample[inside]
    columns = np.column_stack([h, d, proxies["mass"]])[inside]
    names = np.unique(group)
    np.random.default_rng(42).shuffle(names)
    aucs, briers = [], []
    for fold in np.array_split(names, 5):
        test = np.isin(group, fold)
        p = reachability.logistic(columns[~test], y[~test], columns[test])
        wins = [(a > b) + 0.5 * (a == b) for a in p[y[test] == 1] for b in p[y[test] == 0]]
        aucs.append(np.mean(wins))
        briers.append(np.mean((p - y[test]) ** 2))
    row = rows.loc["mass"]

    assert (row["positions"], row["reach_rate"]) == (inside.sum(), y.mean())
    assert (row["auc"], row["brier"]) == pytest.approx((np.mean(aucs), np.mean(briers)))
    assert row["auc_gained"] == row["auc"] - row["auc_base"] > 0.1
    thirds = np.searchsorted(np.quantile(columns[:, 2], [1 / 3, 2 / 3]), columns[:, 2])
    assert row["reach_mid"] == pytest.approx(y[thirds == 1].mean())
    # A constant proxy adds nothing, and has no thirds.
    assert rows.loc["one", "auc_gained"] == pytest.approx(0)
    assert np.isnan(rows.loc["one", ["reach_low", "reach_mid", "reach_high"]].astype(float)).all()


def test_a_proxy_of_two_groups_has_no_middle():
    h, d, reached, sample, _ = made()
    half = (np.arange(len(h)) % 2).astype(float)
    row = reachability.reachability(h, d, reached, sample, {"half": half}).iloc[0]

    # Edges 0 0 1 1 leave one group; with a few in between there are two.
    assert np.isnan(row["reach_low"])
    few = np.where(np.arange(len(h)) % 2, 1.0, np.linspace(0, 0.5, len(h)))
    row = reachability.reachability(h, d, reached, sample, {"few": few}).iloc[0]
    assert np.isfinite([row["reach_low"], row["reach_high"]]).all() and np.isnan(row["reach_mid"])


def test_without_a_fold_of_both_classes_nothing_is_judged():
    h, d, _, sample, proxies = made()
    row = reachability.reachability(h, d, np.ones(len(h)), sample, proxies).iloc[0]

    assert (
        row["reach_rate"] == 1 and np.isnan(row[["auc", "brier", "auc_gained"]].astype(float)).all()
    )


def test_a_proxy_with_gaps_is_refused():
    h, d, reached, sample, _ = made()

    assert message(
        reachability.reachability, h, d, reached, sample, {"mass": np.full(len(h), np.nan)}
    ).startswith("mass is not finite at")
