"""The columns of a trained student, joined to the token table of the untouched one."""

from __future__ import annotations

import pandas as pd

from diagnostics.core.formulas import gains
from diagnostics.core.schema import AFTER

CHECKPOINT_COLUMN = "student_entropy_after"
"""A column that only a checkpoint has: a probe's steps leave divergences alone."""
POSITION_KEYS = ["context_id", "position"]


def has_checkpoint(tokens: pd.DataFrame) -> bool:
    """Whether a token table has the columns of a trained student."""
    return CHECKPOINT_COLUMN in tokens


def join_checkpoint(tokens: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Join the columns of a trained student to a token table.

    They take the place of divergences after a probe's steps, which follow from its gains. A table
    without gains receives those of the trained student.

    Args:
        tokens: Token table of N rows, with forward_kl and reverse_kl in nats.
        after: One row per position with context_id, position, forward_kl_after, reverse_kl_after
            and other columns of the trained student. A position that it lacks is NaN.

    Returns:
        The token table with the columns of `after` and, where it had no `gain`, gain,
        relative_gain, relative_gain_released and reverse_gain.
    """
    known = [name for name in after if name in tokens and name not in POSITION_KEYS]
    joined = tokens.drop(columns=known).merge(
        after, on=POSITION_KEYS, how="left", validate="one_to_one"
    )
    if "gain" in joined:
        return joined
    divergences = ("forward_kl", "reverse_kl")
    return joined.assign(
        **gains(
            tuple(joined[name] for name in divergences),
            tuple(joined[name + AFTER] for name in divergences),
        )
    )
