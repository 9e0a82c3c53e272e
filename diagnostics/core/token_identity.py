"""How much the same token gained elsewhere: a rival of every criterion that reads the models.

    token_identity_gain_i = m + n/(n + 5) (mean of gain_jg over the n positions j of i's token - m)

over positions j of other folds and steps g on neither i's fold nor j's, m being the mean over all
such positions whatever their token. So no step that position i took part in, and no measurement of
its own fold, enters its value: it may predict every gain of i that is held out.

Axes: N positions, F folds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.core.folds import fold_columns

SHRINK = 5.0
"""Positions at which a token's own mean and the mean of all tokens count alike."""


def token_identity_gain(tokens: pd.DataFrame) -> np.ndarray | None:
    """Predict each position's gain from the same token's gains in other folds.

    Args:
        tokens: A fold table of N rows with token_id, fold and `gain_fold<f>` (nats). Positions
            whose gains are NaN inform no other.

    Returns:
        Float64 [N] in nats; the mean of all tokens for a token that no other fold has. None for
        fewer than three folds, where no step is on neither of two folds.
    """
    columns = fold_columns(tokens, "gain")
    if len(columns) < 3:
        return None
    fold_N = tokens["fold"].to_numpy()
    gains_NF = tokens[columns].to_numpy(dtype=np.float64)
    codes_N, _ = pd.factorize(tokens["token_id"])
    predicted_N = np.full(len(tokens), np.nan)
    for fold in range(len(columns)):
        mean_N = _mean_apart(gains_NF, fold_N, fold)
        known = np.isfinite(mean_N)
        here = fold_N == fold
        if known.any():
            means = _shrunk_means(codes_N[known], mean_N[known], int(codes_N.max()) + 1)
            predicted_N[here] = means[codes_N[here]]
    return predicted_N


def _mean_apart(gains_NF: np.ndarray, fold_N: np.ndarray, fold: int) -> np.ndarray:
    """Mean gain of each position outside a fold over the steps on neither that fold nor its own.

    NaN [N] at the fold's own positions.
    """
    steps_NF = np.ones_like(gains_NF, dtype=bool)
    steps_NF[:, fold] = False
    steps_NF[np.arange(len(fold_N)), fold_N] = False
    mean_N = np.where(steps_NF, gains_NF, 0.0).sum(axis=1) / steps_NF.sum(axis=1)
    return np.where(fold_N == fold, np.nan, mean_N)


def _shrunk_means(codes: np.ndarray, gains: np.ndarray, count: int) -> np.ndarray:
    """Mean gain of each token, drawn towards the mean of all as its positions are few."""
    n = np.bincount(codes, minlength=count)
    sums = np.bincount(codes, weights=gains, minlength=count)
    overall = gains.mean()
    return (sums + SHRINK * overall) / (n + SHRINK)
