"""Does a support proxy tell, inside Q3, whether the teacher's first choice is within reach?

    P(reach) = sigmoid(b0 + b1 h + b2 d [+ b3 proxy])

is fitted on four of five folds of samples and judged on the fifth, with and without the proxy. The
fit is the released one: columns standardized on the training folds, classes weighted to be equal,
700 steps of gradient descent at rate .08 from 0 with a ridge of 1e-4. It is not converged, so steps
and rate are part of the definition.

Written from the definition of `q3_reachability.py` of the scripts released with arXiv 2605.26844,
in no table of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import mannwhitneyu

from diagnostics.analysis.paper.bank import require_finite
from diagnostics.analysis.paper.section3 import quantile_buckets

STEPS, RATE, RIDGE = 700, 0.08, 1e-4
LARGEST_LOGIT = 40.0
LEAST_SPREAD = 1e-6
"""Standard deviation under which a column is left as it is."""
FOLDS, FOLD_SEED = 5, 42
THIRD_NAMES = {2: ("low", "high"), 3: ("low", "mid", "high")}
"""Names of the groups of a proxy, by how many its quantiles leave."""


def reachability(
    entropy: np.ndarray,
    divergence: np.ndarray,
    reached: np.ndarray,
    sample: np.ndarray,
    proxies: Mapping[str, np.ndarray],
    *,
    seed: int = FOLD_SEED,
) -> pd.DataFrame:
    """AUC and Brier score of h and d, and of h, d and each proxy, inside Q3.

    Args:
        entropy: [N] h of a training bank.
        divergence: [N] d of it.
        reached: bool [N], the teacher's first choice is in the student's list.
        sample: [N] sample of each position; folds are made of them in ascending order.
        proxies: [N] values by proxy.
        seed: Seed of the order of samples before they are divided.

    Returns:
        Columns proxy, positions (in Q3), reach_rate, auc_base, auc, auc_gained, brier_base, brier
        (means over the folds whose two parts hold both classes; NaN where none does), reach_low,
        reach_mid, reach_high (rates in the thirds of the proxy; with two groups there is no middle
        one, with one group none has a name: NaN).

    Raises:
        DiagnosticsError: A value is not finite.
    """
    h, d = (np.asarray(values, dtype=np.float64) for values in (entropy, divergence))
    q3 = (h <= np.median(h)) & (d >= np.median(d))
    y = np.asarray(reached)[q3].astype(np.float64)
    base = np.stack([h, d], axis=1)[q3]
    parts = list(_folds(np.asarray(sample)[q3], y, seed))
    plain = _judged(base, y, parts)
    rows = []
    for name, values in proxies.items():
        proxy = np.asarray(values, dtype=np.float64)[q3]
        require_finite(name, proxy)
        auc, brier = _judged(np.column_stack([base, proxy]), y, parts)
        scores = {"auc_base": plain[0], "auc": auc, "auc_gained": auc - plain[0]}
        briers = {"brier_base": plain[1], "brier": brier}
        counts = {"positions": int(q3.sum()), "reach_rate": y.mean()}
        rows.append({"proxy": name, **counts, **scores, **briers, **_rates(proxy, y)})
    return pd.DataFrame(rows)


def _folds(sample: np.ndarray, y: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Masks [n] of the folds that can be judged: both classes inside, and both outside."""
    names = np.unique(sample)
    np.random.default_rng(seed).shuffle(names)
    for fold in np.array_split(names, min(FOLDS, len(names))):
        test = np.isin(sample, fold)
        if all(len(np.unique(y[part])) == 2 for part in (test, ~test)):
            yield test


def _judged(columns: np.ndarray, y: np.ndarray, folds: list[np.ndarray]) -> tuple[float, float]:
    """Mean AUC and Brier score over folds."""
    if not folds:
        return np.nan, np.nan
    found = []
    for test in folds:
        p = logistic(columns[~test], y[~test], columns[test])
        here = y[test] == 1
        wins = mannwhitneyu(p[here], p[~here]).statistic / (here.sum() * (~here).sum())
        found.append((wins, np.mean((p - y[test]) ** 2)))
    auc, brier = np.mean(found, axis=0)
    return float(auc), float(brier)


def _rates(proxy: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Rate of reach in the thirds of a proxy."""
    third = quantile_buckets(proxy, 3)
    names = THIRD_NAMES.get(third.max() + 1, ())
    rates = {name: float(y[third == number].mean()) for number, name in enumerate(names)}
    return {f"reach_{name}": rates.get(name, np.nan) for name in THIRD_NAMES[3]}


def logistic(columns: np.ndarray, y: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Fit the released logistic regression, and predict.

    Args:
        columns: [n, p] predictors of the training positions.
        y: [n] 0 or 1.
        judged: [m, p] predictors of the positions to judge.

    Returns:
        [m] probabilities.
    """
    mean, spread = columns.mean(axis=0), columns.std(axis=0)
    spread = np.where(spread < LEAST_SPREAD, 1.0, spread)
    train, test = (
        np.column_stack([np.ones(len(part)), (part - mean) / spread]) for part in (columns, judged)
    )
    positive = y.sum()
    weight = len(y) / (2 * np.where(y > 0.5, max(positive, 1), max(len(y) - positive, 1)))
    ridge = RIDGE * np.r_[0.0, np.ones(columns.shape[1])]
    beta = np.zeros(train.shape[1])
    for _ in range(STEPS):
        error = (_probability(train @ beta) - y) * weight
        beta -= RATE * (train.T @ error / len(y) + ridge * beta)
    return _probability(test @ beta)


def _probability(logit: np.ndarray) -> np.ndarray:
    return expit(np.clip(logit, -LARGEST_LOGIT, LARGEST_LOGIT))
