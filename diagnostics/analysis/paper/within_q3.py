"""Quartiles of d*c, d*(1 - c) and c inside Q3, as the released script draws them.

h and d are the untrained student's, c is the *trained* student's, and the outcome is G winsorized
by 1 %. One generator runs through all K, in each through the three scores, in each through the
buckets and then the gap, so every interval depends on those before it.

Written from the definition of `analyze_within_q3_teachability.py` of the scripts released with
arXiv 2605.26844, behind its figure 4D.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import winsorize
from diagnostics.analysis.paper.bank import ScriptTable, script_table
from diagnostics.analysis.paper.gap import DRAWS, QUARTILES, ends, gap, mean_interval
from diagnostics.analysis.paper.section3 import WINSORIZED, quantile_buckets

WITHIN_SEED = 20260513
WITHIN_SCORES = ("teachability", "incompatible", "compatibility")


def within_q3(
    tokens: pd.DataFrame, *, ks: Iterable[int], seed: int = WITHIN_SEED, draws: int = DRAWS
) -> dict[str, pd.DataFrame]:
    """Mean gain of quartile buckets inside Q3, and the gap between the outer quartiles.

    Args:
        tokens: A token table with `forward_kl_after` and, for every K, C after training.
        ks: The K, in the order in which the generator runs through them.
        seed: Seed of that generator.
        draws: Number of draws of each interval.

    Returns:
        `buckets`: columns k, score, buckets (how many there are: 4, or 1 where a saturated score
        leaves fewer edges), bucket (from 0), positions, mean, low, high. `gaps`: columns k, score,
        bottom, top (numbers of positions), bottom_mean, top_mean, gap, low, high. As fractions.

    Raises:
        DiagnosticsError: A column is missing.
    """
    rng = np.random.default_rng(seed)
    buckets, gaps = [], []
    for k in ks:
        table = script_table(tokens, compatibility="after", k=k)
        for name in WITHIN_SCORES:
            buckets += [{"k": k, "score": name, **row} for row in _buckets(table, name, rng, draws)]
            gaps.append({"k": k, "score": name, **_gap(table, name, rng, draws)})
    return {"buckets": pd.DataFrame(buckets), "gaps": pd.DataFrame(gaps)}


def _in_q3(table: ScriptTable, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, outcome and context of the positions inside Q3."""
    q3 = table.in_q3
    return table.score(name)[q3], winsorize(table.gain, WINSORIZED)[q3], table.context[q3]


def _buckets(table: ScriptTable, name: str, rng: np.random.Generator, draws: int) -> list[dict]:
    score, y, context = _in_q3(table, name)
    bucket = quantile_buckets(score, QUARTILES)
    count = bucket.max() + 1
    # The script has four labels; where edges coincide they do not fit, and it makes one bucket.
    if count < QUARTILES:
        bucket, count = np.zeros(len(score), dtype=int), 1
    rows = []
    for number in range(count):
        at = bucket == number
        if not at.any():
            continue
        low, high = mean_interval(y[at], context[at], rng=rng, draws=draws)
        counts = {"buckets": count, "bucket": number, "positions": int(at.sum())}
        rows.append({**counts, "mean": y[at].mean(), "low": low, "high": high})
    return rows


def _gap(table: ScriptTable, name: str, rng: np.random.Generator, draws: int) -> dict:
    score, y, context = _in_q3(table, name)
    found = gap(y, context, ends(score, QUARTILES), rng=rng, draws=draws)
    return {
        "bottom": found.bottom,
        "top": found.top,
        "bottom_mean": found.bottom_mean,
        "top_mean": found.top_mean,
        "gap": found.estimate,
        "low": found.low,
        "high": found.high,
    }
