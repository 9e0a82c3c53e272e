"""Least squares of the released scripts: an intercept, columns, and R^2.

Where columns are linearly dependent the shortest solution is taken, as the scripts do;
`analysis.linear_model` leaves such a fit undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """A least-squares fit.

    Attributes:
        coefficients: [terms] coefficients, without the intercept.
        r_squared: Share of the outcome's variance that the terms explain; NaN for a constant.
        residual: [N] outcome minus fitted value.
    """

    coefficients: np.ndarray
    r_squared: float
    residual: np.ndarray


def fit(outcome: np.ndarray, terms: Sequence[np.ndarray]) -> Fit:
    """Regress an outcome on an intercept and terms.

    Args:
        outcome: [N] finite values.
        terms: [N] finite values each.

    Returns:
        The fit; of several solutions the shortest.
    """
    design = np.column_stack([np.ones(len(outcome)), *terms])
    coefficients = np.linalg.lstsq(design, outcome)[0]
    residual = outcome - design @ coefficients
    total = np.sum((outcome - outcome.mean()) ** 2)
    r_squared = float(1 - residual @ residual / total) if total > 0 else np.nan
    return Fit(coefficients[1:], r_squared, residual)
