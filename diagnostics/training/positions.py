"""What each step of a training saw along its responses, and what it selected there.

    DIR/positions.jsonl   one line per step and tenth of the responses: means of measurements at
                          the positions of the step's batch that lie there, and the share of them
                          that carried loss

A place is relative: t / (T - 1), 0 at the first token of a response and 1 at its last, so that long
and short responses share an axis. Departure from what is drawn in arXiv papers on where on-policy
distillation learns: the tenths are of each response, not of the longest one.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.criteria import position_tenths

TENTHS = 10
MEASURED = (
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "compatibility",
    "topk_overlap",
)
"""Measurements whose mean is kept, of those that the step's table has."""


def by_tenth(tokens: pd.DataFrame, weights: np.ndarray) -> pd.DataFrame:
    """Means of a step's measurements by tenth of the responses.

    Args:
        tokens: The step's token table, one row per position, with position and response_length.
        weights: [N] loss weights; 0 where a position carries no loss.

    Returns:
        One row per tenth that holds a position, with the columns tenth (0 to 9), positions,
        selected_share (positions with loss over positions) and those of `MEASURED` (mean over the
        positions where it is finite, NaN where it is nowhere).
    """
    names = [name for name in MEASURED if name in tokens]
    values = tokens[names].astype(np.float64).where(np.isfinite(tokens[names].astype(np.float64)))
    table = values.assign(tenth=position_tenths(tokens), selected_share=weights > 0)
    groups = table.groupby("tenth")
    found = groups[["selected_share", *names]].mean()
    found.insert(0, "positions", groups.size())
    return found.reset_index()
