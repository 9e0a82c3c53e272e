"""The study: every table from one token table.

Neither torch nor a model is needed. The tables themselves live in `tables`.
"""

from __future__ import annotations

import pandas as pd

from diagnostics import tables
from diagnostics.tables import correlate, q3_contrast, q3_groups, scores, splits

__all__ = ["correlate", "q3_contrast", "q3_groups", "scores", "splits", "study"]


def study(tokens: pd.DataFrame, *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Every table that the token table allows, by file name."""
    options = {"draws": draws, "level": level, "seed": seed}
    associations = tables.associate(tokens, draws=draws, seed=seed)
    return {
        "correlations": tables.correlation_table(associations, level=level),
        "placebo_excess": tables.placebo_excess(associations, level=level),
        "differences": tables.correlation_differences(associations, level=level),
        "q3_contrast": tables.q3_contrast(tokens, **options),
        "q3_groups": tables.q3_groups(tokens, **options),
    }
