"""Ten numbers of the committed atlas, computed again from the committed tables with scipy alone."""

import csv
import math
from pathlib import Path

import pytest
from scipy import optimize, stats

REPORTS = Path(__file__).parents[1] / "reports"
PAIRS = ("embedded-256", "second-pair-256", "smollm2", "qwen2.5-coder")


def table(pair, name):
    """Rows of a pair's table; none where the pair has no such table."""
    path = REPORTS / pair / "tables" / f"{name}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def one(rows, **where):
    found = [row for row in rows if all(row[name] == value for name, value in where.items())]
    assert len(found) <= 1, where
    return found[0] if found else None


def claims(claim, statistic):
    where = {"claim": claim, "statistic": statistic, "population": "held_out", "k": "16"}
    where |= {"outcome": "context_gain", "proxy": "compatibility"}
    for pair in PAIRS:
        row = one(table(pair, "claim_statistics"), **where)
        yield float(row["estimate"]), float(row["low"]), float(row["high"])


def correlations(criterion):
    where = {"criterion": criterion, "outcome": "context_gain", "split": "held_out"}
    for pair in PAIRS:
        row = one(table(pair, "correlations"), method="spearman", **where)
        yield tuple(math.atanh(float(row[name])) for name in ("estimate", "low", "high"))


def over(rival, budget):
    shared = {"horizon": "20", "measure": "reverse_kl", "rollouts": "all"}
    for pair in PAIRS:
        rows = table(pair, "decision")
        cell = one(rows, criterion="teachability", budget=budget, **shared)
        if cell is None:
            continue
        full = float(one(rows, criterion="full", **shared)["effect"])
        yield tuple(float(cell[f"over_{rival}{end}"]) / full for end in ("", "_low", "_high"))


def pooled(values):
    """Mean and interval of a random-effects model, on the scale of the values."""
    values = list(values)
    y = [value for value, _, _ in values]
    s = [(high - low) / 2 / stats.norm.ppf(0.975) for _, low, high in values]
    k = len(y)

    def squares(tau2):
        w = [1 / (e * e + tau2) for e in s]
        mean = sum(a * b for a, b in zip(w, y, strict=True)) / sum(w)
        return sum(a * (b - mean) ** 2 for a, b in zip(w, y, strict=True))

    top = max(y) - min(y) + max(s)
    tau2 = 0.0
    if squares(0.0) > k - 1:
        tau2 = optimize.brentq(lambda t: squares(t) - (k - 1), 0.0, top * top * k, xtol=1e-16)
    w = [1 / (e * e + tau2) for e in s]
    mean = sum(a * b for a, b in zip(w, y, strict=True)) / sum(w)
    half = stats.t.ppf(0.975, k - 1) * math.sqrt(max(1.0, squares(tau2) / (k - 1)) / sum(w))
    return mean, mean - half, mean + half


NUMBERS = {
    ("claim", "C1: within_strata", "", ""): lambda: pooled(claims("C1", "within_strata")),
    ("claim", "C2: overlap_contrast", "", ""): lambda: pooled(claims("C2", "overlap_contrast")),
    ("claim", "C3: interaction", "", ""): lambda: pooled(claims("C3", "interaction")),
    ("over_random", "teachability", "0.05", "20.0"): lambda: pooled(over("random", "0.05")),
    ("over_random", "teachability", "0.1", "20.0"): lambda: pooled(over("random", "0.1")),
    ("over_random", "teachability", "0.3", "20.0"): lambda: pooled(over("random", "0.3")),
    ("over_random_divergent", "teachability", "0.1", "20.0"): lambda: pooled(
        over("random_divergent", "0.1")
    ),
    ("correlation", "teachability", "", ""): lambda: map(
        math.tanh, pooled(correlations("teachability"))
    ),
    ("correlation", "entropy", "", ""): lambda: map(math.tanh, pooled(correlations("entropy"))),
    ("correlation", "divergence", "", ""): lambda: map(
        math.tanh, pooled(correlations("divergence"))
    ),
}


@pytest.mark.parametrize("key", NUMBERS, ids=" ".join)
def test_the_committed_atlas_is_what_the_committed_tables_give(key):
    names = ("kind", "conclusion", "budget", "horizon")
    rows = [
        row
        for row in table("atlas", "atlas_pooled")
        if tuple(row[name] for name in names) == key
        and row["outcome"] in ("context_gain", "reverse_kl")
        and row["rollouts"] == "all"
    ]
    assert len(rows) == 1
    got = [float(rows[0][name]) for name in ("mean", "low", "high")]
    assert got == pytest.approx(list(NUMBERS[key]()), rel=1e-7, abs=1e-9)


def test_the_page_names_the_pairs_it_was_made_from():
    page = (REPORTS / "atlas" / "atlas.html").read_text()
    assert all(pair in page for pair in PAIRS)
