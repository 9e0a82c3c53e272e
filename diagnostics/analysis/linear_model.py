"""Least squares with cluster-robust errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics.analysis.bootstrap import Estimate, PromptClusters, of_sums
from diagnostics.analysis.rank_correlation import SINGULAR, standardize


def cross_products(
    columns: Sequence[np.ndarray], prompts: PromptClusters, mask: np.ndarray
) -> np.ndarray:
    """Sum the products of all pairs of [1, *columns] per prompt.

    Args:
        columns: The values [mask.sum()] of each column under the mask.
        prompts: The prompts of the N positions.
        mask: [N] positions that count.

    Returns:
        [prompts, q * q] sums for q = 1 + number of columns.
    """
    columns = [np.ones(int(mask.sum())), *columns]
    q = len(columns)
    upper = [(i, j) for i in range(q) for j in range(i, q)]
    sums = prompts.sums(*(columns[i] * columns[j] for i, j in upper), at=mask)
    full = np.empty((prompts.count, q, q))
    for (i, j), column in zip(upper, sums.T):
        full[:, i, j] = full[:, j, i] = column
    return full.reshape(prompts.count, q * q)


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverses of positive definite matrices [..., p, p]; NaN where the columns are linearly
    dependent.
    """
    # Scaled to a correlation matrix, so that the determinant does not depend on the columns' units.
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
        scaled = matrix / (scale[..., :, None] * scale[..., None, :])
    scaled = np.where(np.isfinite(scaled), scaled, 0.0)
    regular = np.linalg.det(scaled) > SINGULAR
    safe = np.where(regular[..., None, None], scaled, np.eye(matrix.shape[-1]))
    scale = np.where(regular[..., None], scale, np.nan)
    return np.linalg.inv(safe) / (scale[..., :, None] * scale[..., None, :])


@dataclass(frozen=True)
class Regression:
    """A least-squares fit on standardized columns; its intercept is 0 and is left out.

    Attributes:
        coefficients: Standardized coefficient by term, with intervals from the cluster jackknife
            and bootstrap as everywhere.
        robust_error: The usual cluster-robust standard error (statsmodels, CR1), by term.
        inflation: Variance inflation factor by term.
        r_squared: Share of the outcome's variance that the terms explain.
        fitted: [N] fitted values of the standardized outcome, NaN outside the mask.
        spread: Standard deviation by which each term was divided, and the outcome's under
        `outcome`.
    """

    coefficients: dict[str, Estimate]
    robust_error: dict[str, float]
    inflation: dict[str, float]
    r_squared: Estimate
    fitted: np.ndarray
    spread: dict[str, float]


def regress(
    outcome: np.ndarray,
    terms: dict[str, np.ndarray],
    prompts: PromptClusters,
    *,
    robust: bool = True,
) -> Regression | None:
    """Regress an outcome on terms over the positions where all of them are finite.

    All columns are standardized over those positions, once.

    Args:
        outcome: [N] values.
        terms: [N] values by term.
        prompts: The prompts of the N positions, with their draws.
        robust: False leaves the CR1 errors out, as NaN.

    Returns:
        The fit; None where there are too few positions, or a term is constant or a linear
        combination of others.

    Reference:
        Liang and Zeger 1986 (CR1 errors).
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (*terms.values(), outcome)]
    mask = np.all(np.isfinite(columns), axis=0)
    if mask.sum() < len(columns) + 2:
        return None
    spread = dict(zip([*terms, "outcome"], (float(column[mask].std()) for column in columns)))
    scaled = [standardize(column[mask]) for column in columns]
    sums = cross_products(scaled, prompts, mask)
    q = len(columns) + 1
    values = of_sums(lambda s: _coefficients_and_fit(s, q), sums, prompts, mask)
    if not np.isfinite(values[0].value):
        return None
    design = np.stack(scaled[:-1], axis=1)
    fitted = np.full(len(outcome), np.nan)
    fitted[mask] = design @ [estimate.value for estimate in values[:-1]]
    inflation = np.diag(inverse(np.atleast_2d(design.T @ design / len(design))))
    errors = (
        _cluster_robust_errors(scaled[-1], design, prompts.codes[mask])
        if robust
        else [np.nan] * len(terms)
    )
    by_term = (dict(zip(terms, map(float, side))) for side in (errors, inflation))
    return Regression(dict(zip(terms, values)), *by_term, values[-1], fitted, spread)


def _coefficients_and_fit(sums: np.ndarray, q: int) -> np.ndarray:
    """[..., q - 2 coefficients + R^2] from the cross products of [1, terms, outcome]."""
    products = sums.reshape(*sums.shape[:-1], q, q)
    normal = inverse(products[..., :-1, :-1])
    with_outcome = products[..., :-1, -1]
    beta = (normal @ with_outcome[..., None])[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        total = products[..., -1, -1] - products[..., 0, -1] ** 2 / products[..., 0, 0]
        residual = products[..., -1, -1] - (beta * with_outcome).sum(-1)
        fit = np.where(total > 0, 1 - residual / total, np.nan)
    return np.concatenate([beta[..., 1:], fit[..., None]], axis=-1)


def _cluster_robust_errors(
    outcome: np.ndarray, design: np.ndarray, codes: np.ndarray
) -> np.ndarray:
    from statsmodels.regression.linear_model import OLS

    if len(np.unique(codes)) < 2:
        return np.full(design.shape[1], np.nan)
    model = OLS(outcome, np.column_stack([np.ones(len(design)), design]))
    return model.fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True).bse[1:]


def correlation_matrix(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of columns, and their standard deviations.

    Args:
        columns: [q, n] finite values.

    Returns:
        [q, q] Pearson correlations, NaN with a constant column, and [q] standard deviations
        (divisor n), 0 for a constant.
    """
    if not columns.shape[1]:
        return np.full((len(columns),) * 2, np.nan), np.zeros(len(columns))
    centered = columns - columns.mean(axis=1, keepdims=True)
    products = centered @ centered.T / columns.shape[1]
    spread = np.sqrt(np.diag(products))
    # Rounding leaves a constant a spread of its own size times 1e-16.
    constant = spread <= 1e-14 * np.abs(columns).max(axis=1)
    scale = np.where(constant, np.nan, spread)
    return products / (scale[:, None] * scale), np.where(constant, 0.0, spread)


def standardized_fits(
    matrix: np.ndarray, terms: Sequence[int], outcomes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Regress standardized columns on others, from their correlations.

    Args:
        matrix: [q, q] correlations.
        terms: Numbers of the p columns that explain.
        outcomes: Numbers of the m columns that are explained, each by itself.

    Returns:
        [p, m] standardized coefficients and [m] R^2; NaN where a column is constant or the terms
        are linearly dependent.
    """
    inner, targets = matrix[np.ix_(terms, terms)], matrix[np.ix_(terms, outcomes)]
    if not np.isfinite(inner).all():
        return np.full(targets.shape, np.nan), np.full(targets.shape[1], np.nan)
    beta = inverse(inner) @ targets
    return beta, (beta * targets).sum(axis=0)
