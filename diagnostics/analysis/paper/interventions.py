"""What trainings under a mask did, as the released aggregating scripts compute it.

    gap after training = the gap of G between the thirds of the trained student's c, inside the Q3
                         that the trained student's h chooses (`gap.gain_statistics`)
    gap per kept share = that gap over the share of the positions that the mask kept
    a +- b             = mean and sample standard deviation over seeds

The gap after training is the "G" of the paper's table 2, the "Boot. gain" of its table 7 and the
"Bootstrap gain" of its table 10. It is no reduction of a divergence: a training that lowers the KL
everywhere alike has none. `mean_gain` stands beside it, which the scripts compute and the tables do
not print.

Written from the definitions of `aggregate_p1_p2_tip_baselines_20260513.py` and
`aggregate_within_q3_teachability_20260514.py` of the scripts released with arXiv 2605.26844.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.analysis.paper.cells import KEPT, TRAINING
from diagnostics.analysis.paper.gap import DRAWS, SWEEP_SEED, gain_statistics
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import AFTER, require_columns

POSITION = ["context_id", "position"]
MEASURED = ("forward_kl", "student_entropy", "compatibility")
"""What is read of a trained student."""


def trainings(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    kept: pd.DataFrame,
    *,
    seed: int = SWEEP_SEED,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """The released statistics of every training.

    Args:
        tokens: A token table of the untrained student, N rows.
        cells: One row per training and position: criterion, budget, seed, context_id, position,
            forward_kl_after, student_entropy_after, compatibility_after. Each training has every
            position of `tokens`.
        kept: One row per training: criterion, budget, seed and the columns of `KEPT`, over what its
            own rollouts kept. A training without a row has NaN there.
        seed: Seed of the draws, the same for every training.
        draws: Number of draws.

    Returns:
        One row per training: criterion, budget, seed, gap, low, high, positions (in Q3), matched,
        matched_median, pairs, mean_gain, the columns of `KEPT`, gap_per_kept_share; gains as
        fractions.

    Raises:
        DiagnosticsError: A column is missing, or a training does not have every position once.
    """
    read = [name + AFTER for name in MEASURED]
    require_columns(cells, [*TRAINING, *POSITION, *read], what="A table of trainings")
    require_columns(kept, [*TRAINING, *KEPT], what="A table of what trainings kept")
    # Whatever the table says of another trained student gives way, its gain included.
    gone = [name for name in (*read, "relative_gain_released") if name in tokens]
    before = tokens.drop(columns=gone)
    rows = []
    for names, cell in cells.groupby(list(TRAINING), sort=True):
        found = gain_statistics(
            _joined(before, cell[[*POSITION, *read]], names), seed=seed, draws=draws
        )
        rows.append(
            {
                **dict(zip(TRAINING, names, strict=True)),
                "gap": found.gap.estimate,
                "low": found.gap.low,
                "high": found.gap.high,
                "positions": found.positions,
                "matched": found.matched.mean,
                "matched_median": found.matched.median,
                "pairs": found.matched.pairs,
                "mean_gain": found.mean,
            }
        )
    joined = pd.DataFrame(rows).merge(
        kept[[*TRAINING, *KEPT]], on=list(TRAINING), how="left", validate="one_to_one"
    )
    share = joined["kept_share"].to_numpy(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(share > 0, joined["gap"].to_numpy() / share, np.nan)
    return joined.assign(gap_per_kept_share=ratio)


def _joined(before: pd.DataFrame, cell: pd.DataFrame, names: tuple) -> pd.DataFrame:
    """The token table with one trained student's columns."""
    if cell.duplicated(POSITION).any() or len(cell) != len(before):
        raise DiagnosticsError(
            f"The training {names} has {len(cell)} rows, {int(cell.duplicated(POSITION).sum())} of"
            f" them repeated, for {len(before)} positions. Score every position with it once."
        )
    joined = before.merge(cell, on=POSITION, how="left", validate="one_to_one", indicator=True)
    lost = int((joined["_merge"] != "both").sum())
    if lost:
        raise DiagnosticsError(
            f"The training {names} lacks {lost} of {len(before)} positions. Score the same contexts"
            " with it."
        )
    return joined


def over_seeds(found: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of every statistic over the seeds of a mask and budget.

    Args:
        found: What `trainings` returns.

    Returns:
        Columns criterion, budget, quantity, mean, sd (n - 1; NaN for one seed), seeds.
    """
    quantities = [name for name in found if name not in TRAINING]
    rows = []
    for (criterion, budget), part in found.groupby(["criterion", "budget"], sort=True):
        for name in quantities:
            values = part[name].to_numpy(np.float64)
            spread = values.std(ddof=1) if len(values) > 1 else np.nan
            rows.append((criterion, budget, name, values.mean(), spread, len(values)))
    return pd.DataFrame(rows, columns=["criterion", "budget", "quantity", "mean", "sd", "seeds"])
