"""Section 3 of the paper as its builder script computes it: all predictors before training.

    buckets      quartiles of a score within a region, by `pandas.qcut`, equal edges merged
    trimmed      mean of the values between their own 5 % and 95 % quantiles, ends included
    winsorized   mean of the values clipped at their own 1 % and 99 % quantiles
    decompose    G on h, d*c, d*(1 - c), t/(T - 1), ht, all standardized
    residual     winsorized G on h, d, t/(T - 1), ht

Written from the definitions of `build_section3_p0_analysis_20260517.py` of the scripts released
with arXiv 2605.26844: its figures 3A, 4C, 4D, 5B, 5C, tables 5 and 6, and appendix F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import winsorize
from diagnostics.analysis.paper.bank import ScriptTable, column_at, scaled
from diagnostics.analysis.paper.gap import DRAWS, THIRDS, ends, gap, matched_gap
from diagnostics.analysis.paper.least_squares import fit
from diagnostics.analysis.rank_correlation import standardize

TRIMMED, WINSORIZED = 0.05, 0.01
"""Share of the values beyond each limit."""
SUPPORT_SEED = 41717
"""Seed of the draws of every support proxy, anew for each."""
BUCKET_SCORES = (
    "compatibility",
    "teachability",
    "incompatible",
    "divergence",
    "tip",
    "teachability_entropy",
)
RESIDUAL_SCORES = ("compatibility", "teachability", "incompatible", "tip", "teachability_entropy")
BUCKETS, TENTHS = 4, 10
MODELS = {
    "interaction": ("entropy", "divergence", "entropy_x_divergence", "position", "teacher_entropy"),
    "compatibility": (
        "entropy",
        "divergence",
        "entropy_x_divergence",
        "compatibility",
        "position",
        "teacher_entropy",
    ),
    "decomposition": ("entropy", "teachability", "incompatible", "position", "teacher_entropy"),
}
"""Terms by model."""
JACCARD_EPSILON = 1e-12


def trimmed_mean(values: np.ndarray, share: float = TRIMMED) -> float:
    """Mean of the values [N] between two of their own quantiles, ends included.

    Args:
        values: [N] finite values, N > 0.
        share: Share of the values beyond each quantile.

    Returns:
        The mean; NaN where no value lies between them, as of two that differ.
    """
    low, high = np.quantile(values, [share, 1 - share])
    kept = values[(values >= low) & (values <= high)]
    return float(kept.mean()) if len(kept) else np.nan


def winsorized_mean(values: np.ndarray, share: float = WINSORIZED) -> float:
    """Mean of the values [N], clipped at two of their own quantiles.

    Args:
        values: [N] finite values, N > 0.
        share: Share of the values beyond each quantile.
    """
    return float(winsorize(values, share).mean())


def quantile_buckets(score: np.ndarray, count: int) -> np.ndarray:
    """Buckets of equal size by `pandas.qcut`, with equal edges merged.

    Args:
        score: [N] finite scores.
        count: Number of buckets where no edges are equal.

    Returns:
        int [N] bucket from 0, the lowest; -1 everywhere for a constant score.
    """
    if np.ptp(score) == 0:
        return np.full(len(score), -1)
    return pd.qcut(score, count, labels=False, duplicates="drop").astype(int)


def robust_gain(table: ScriptTable) -> pd.DataFrame:
    """Locations of G over all positions.

    Args:
        table: The positions.

    Returns:
        One row: positions, contexts, mean, median, trimmed_mean (5 %), winsorized_mean_1 and
        winsorized_mean_5 (1 and 5 %), low and high (5 % and 95 % quantiles), as fractions.
    """
    y = table.gain
    low, high = np.quantile(y, [TRIMMED, 1 - TRIMMED])
    found = {
        "positions": len(y),
        "contexts": table.contexts,
        "mean": y.mean(),
        "median": np.median(y),
        "trimmed_mean": trimmed_mean(y),
        "winsorized_mean_1": winsorized_mean(y),
        "winsorized_mean_5": winsorized_mean(y, TRIMMED),
        "low": low,
        "high": high,
    }
    return pd.DataFrame([found])


def bucket_gains(table: ScriptTable) -> pd.DataFrame:
    """Locations of G in quartile buckets of six scores, over all positions and inside Q3.

    Args:
        table: The positions.

    Returns:
        Columns region (`all`, `Q3`), score, bucket (from 0), positions, score_mean, mean, median,
        trimmed_mean (5 %), winsorized_mean (1 %). Limits are the bucket's own. A saturated score
        has fewer than four buckets, a constant one none.
    """
    regions = {"all": np.ones(len(table), dtype=bool), "Q3": table.in_q3}
    rows = [
        {"region": region, "score": name, **row}
        for region, mask in regions.items()
        for name in BUCKET_SCORES
        for row in _bucket_rows(table.score(name)[mask], table.gain[mask], BUCKETS, _gains)
    ]
    return pd.DataFrame(rows)


def _bucket_rows(
    score: np.ndarray, values: np.ndarray, count: int, summary: Callable[[np.ndarray], dict]
) -> Iterator[dict]:
    bucket = quantile_buckets(score, count)
    for number in range(bucket.max() + 1):
        at = bucket == number
        if at.any():
            counts = {"positions": int(at.sum()), "score_mean": score[at].mean()}
            yield {"bucket": number, **counts, **summary(values[at])}


def _gains(values: np.ndarray) -> dict:
    return {
        "mean": values.mean(),
        "median": np.median(values),
        "trimmed_mean": trimmed_mean(values),
        "winsorized_mean": winsorized_mean(values),
    }


def terms(table: ScriptTable) -> dict[str, np.ndarray]:
    """Predictors [N] of the regressions by name, not yet standardized."""
    return {
        **{name: table.score(name) for name in ("entropy", "divergence", "compatibility")},
        "entropy_x_divergence": table.entropy * table.divergence,
        **{name: table.score(name) for name in ("teachability", "incompatible")},
        "position": table.position,
        "teacher_entropy": table.teacher_entropy,
    }


def regressions(table: ScriptTable) -> pd.DataFrame:
    """The three models of G, raw and winsorized by 1 and 5 %, with everything standardized.

    Args:
        table: The positions.

    Returns:
        Columns winsorized (share of each tail), model, term, coefficient, r_squared.
    """
    columns = {name: standardize(values) for name, values in terms(table).items()}
    rows = []
    for share in (0.0, WINSORIZED, TRIMMED):
        outcome = standardize(winsorize(table.gain, share))
        for model, names in MODELS.items():
            found = fit(outcome, [columns[name] for name in names])
            rows += [
                (share, model, name, value, found.r_squared)
                for name, value in zip(names, found.coefficients, strict=True)
            ]
    return pd.DataFrame(rows, columns=["winsorized", "model", "term", "coefficient", "r_squared"])


def residual_bins(table: ScriptTable) -> pd.DataFrame:
    """Residual of the winsorized G after h, d, position and ht, along tenths of five scores.

    Args:
        table: The positions.

    Returns:
        Columns score, bucket (from 0), positions, score_mean, residual_mean, residual_median, as
        fractions. Equal edges are merged.
    """
    names = ("entropy", "divergence", "position", "teacher_entropy")
    predictors = terms(table)
    outcome = winsorize(table.gain, WINSORIZED)
    residual = fit(outcome, [predictors[name] for name in names]).residual
    rows = [
        {"score": name, **row}
        for name in RESIDUAL_SCORES
        for row in _bucket_rows(table.score(name), residual, TENTHS, _residuals)
    ]
    return pd.DataFrame(rows)


def _residuals(values: np.ndarray) -> dict:
    return {"residual_mean": values.mean(), "residual_median": np.median(values)}


# Support proxies inside Q3


def support_proxies(tokens: pd.DataFrame, *, k: int | None = None) -> dict[str, np.ndarray]:
    """The support proxies that the builder script knows, with its fall-backs.

    Args:
        tokens: A token table of N rows.
        k: The K of the proxies; None means the table's own.

    Returns:
        [N] values by proxy, those of them whose column the table has. `shared_teacher_mass` is C
        and `shared_student_mass` is 1, because the script never computes either; `topk_jaccard`
        follows from the overlap f as f / (2 - f + 1e-12), so its ranks are the overlap's.
    """
    names = (
        "compatibility",
        "bhattacharyya",
        "topk_overlap",
        "teacher_top1_in_topk",
        "sampled_in_topk",
    )
    columns = {name: column_at(tokens, name, k) for name in names} | {"top1_match": "top1_match"}
    found = {
        name: tokens[column].to_numpy(np.float64)
        for name, column in columns.items()
        if column in tokens
    }
    if "topk_overlap" in found:
        overlap = found["topk_overlap"]
        found["topk_jaccard"] = overlap / (2 - overlap + JACCARD_EPSILON)
    if "compatibility" in found:
        found["shared_teacher_mass"] = found["compatibility"]
    return found | {"shared_student_mass": np.ones(len(tokens))}


def support_gaps(
    table: ScriptTable,
    proxies: dict[str, np.ndarray],
    *,
    seed: int = SUPPORT_SEED,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """The gap of G between the thirds of each proxy inside Q3.

    Args:
        table: The positions.
        proxies: Values by proxy, one for each row of the token table behind `table`. Each is scaled
            by its quantiles *inside Q3*.
        seed: Seed of the draws, anew for each proxy.
        draws: Number of draws.

    Returns:
        Columns proxy, positions (inside Q3, where the proxy is defined; elsewhere it is left out),
        proxy_mean, proxy_sd (population), gap, low, high, pairs, matched_mean, matched_median; gaps
        as fractions, NaN where the proxy is defined nowhere.
    """
    rows = [
        {"proxy": name, **_proxy_gap(table, np.asarray(values, dtype=np.float64), seed, draws)}
        for name, values in proxies.items()
    ]
    return pd.DataFrame(rows, columns=SUPPORT_GAP)


SUPPORT_GAP = [
    "proxy",
    "positions",
    "proxy_mean",
    "proxy_sd",
    "gap",
    "low",
    "high",
    "pairs",
    "matched_mean",
    "matched_median",
]
"""Columns of `support_gaps`."""


def _proxy_gap(table: ScriptTable, proxy: np.ndarray, seed: int, draws: int) -> dict:
    """The gap and the matched gap of one proxy, given for every row of the token table."""
    values = proxy[table.rows]
    at = table.in_q3 & np.isfinite(values)
    raw, y, context = values[at], table.gain[at], table.context[at]
    if not len(raw):
        return {"positions": 0, "pairs": 0}
    score, rng = scaled(raw), np.random.default_rng(seed)
    space = np.stack([table.entropy, table.divergence, table.position], axis=1)[at]
    found = gap(y, context, ends(score, THIRDS), rng=rng, draws=draws)
    pairs = matched_gap(y, context, score, space)
    return {
        "positions": len(raw),
        "proxy_mean": raw.mean(),
        "proxy_sd": raw.std(),
        "gap": found.estimate,
        "low": found.low,
        "high": found.high,
        "pairs": pairs.pairs,
        "matched_mean": pairs.mean,
        "matched_median": pairs.median,
    }
