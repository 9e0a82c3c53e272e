"""The released exact selections: mean gain of the n best positions by eleven selectors.

    n = max(1, round(budget * N)), Python's round: half to even
    y = G, winsorized by 1 % at each end over all positions
    h and d are the untrained student's, c is the *trained* student's

The scaled columns give a twentieth of all positions the same highest value, so a cut often falls
among equals, and then the script keeps whichever an unstable sort leaves first, which differs from
machine to machine. Here equals are drawn at random with a seed, unless the script's own sort is
asked for; beside each mean stand what random draws give on average, and the least and the greatest
mean that any choice among the equals gives. An interval numbers its contexts in the order in which
the selection meets them, so equals move it even where all of them are taken.

Written from the definition of `matched_fixed_context_topn_20260515.py` of the scripts released with
arXiv 2605.26844: its table 8, figures 4A and 4B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import winsorize
from diagnostics.analysis.paper.bank import SCORES, ScriptTable
from diagnostics.analysis.paper.gap import mean_interval
from diagnostics.analysis.paper.section3 import WINSORIZED
from diagnostics.analysis.robustness import BASE_K
from diagnostics.core.errors import DiagnosticsError

SELECTORS = (*SCORES, "random")
SCALED = ("entropy", "divergence", "compatibility")
"""Scores whose mean over a selection is shown."""
BUDGETS = (0.01, 0.03, 0.05, 0.1)
Order = Literal["random", "script"]
TOP_DRAWS = 500
TOP_SEED = 20260515


@dataclass(frozen=True)
class UnderTies:
    """What a mean over the n best positions can be, whichever of the equals at the cut are taken.

    Attributes:
        expected: The mean where they are drawn at random.
        least: The smallest mean.
        greatest: The largest mean.
        tied: Number of positions whose score equals that of the last one taken.
        taken: Number of those that are taken; the cut divides equals where it is less than `tied`.
    """

    expected: float
    least: float
    greatest: float
    tied: int
    taken: int


def under_ties(score: np.ndarray, values: np.ndarray, count: int) -> UnderTies:
    """Bound the mean of a column over the positions of the highest scores.

    Args:
        score: [N] finite scores.
        values: [N] the column.
        count: Number of positions that are taken, 1 to N.
    """
    cut = np.partition(score, len(score) - count)[len(score) - count]
    sure, equal = values[score > cut], np.sort(values[score == cut])
    taken = count - len(sure)
    sums = taken * equal.mean(), equal[:taken].sum(), equal[len(equal) - taken :].sum()
    return UnderTies(*(float((sure.sum() + each) / count) for each in sums), len(equal), taken)


def selection_count(positions: int, budget: float) -> int:
    """Number of positions that the script keeps: max(1, round(budget * positions)).

    Half goes to the even number. `criteria.budget_count` rounds up, as the paper's equation 13.

    Raises:
        DiagnosticsError: The budget lies outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise DiagnosticsError(f"A budget is a share of positions in (0, 1]; got {budget}.")
    return max(1, round(positions * budget))


def best(score: np.ndarray, count: int, *, order: Order = "random", seed: int = 0) -> np.ndarray:
    """Row numbers [count] of the highest scores [N], the highest first.

    Args:
        score: [N] finite scores.
        count: Number of rows.
        order: How equals follow each other: `random` shuffles them with a seed; `script` leaves
            them to the same unstable sort as the script, whose order is this machine's own.
        seed: Seed of the random order.
    """
    if order == "script":
        return pd.Series(score).sort_values(ascending=False).index[:count].to_numpy()
    # A stream of its own, so that no tie moves the draws of an interval.
    shuffled = np.random.default_rng([seed, 1]).random(len(score))
    return np.lexsort((shuffled, -score))[:count]


def selector_seed(selector: str, *, k: int, budget: float, salt: int | None = None) -> int:
    """Seed of the draws of one selection.

    Args:
        selector: Name of the selector.
        k: The K of C.
        budget: Share of positions.
        salt: 0 to 999. The script takes it from Python's string hash, which every process salts
            anew, so its random row and all its intervals are another's in each run. None takes a
            checksum of the name, which stays.
    """
    salt = crc32(selector.encode()) % 1000 if salt is None else salt
    return TOP_SEED + 1000 * k + int(100_000 * budget) + salt


def top_gains(
    table: ScriptTable,
    *,
    k: int = BASE_K,
    budgets: Iterable[float] = BUDGETS,
    selectors: Iterable[str] = SELECTORS,
    salts: Mapping[str, int] | None = None,
    order: Order = "random",
    draws: int = TOP_DRAWS,
) -> pd.DataFrame:
    """Mean winsorized G of the n best positions of each selector.

    Args:
        table: The positions, with c of the trained student as the script has it.
        k: The K of c, which is part of the seeds.
        budgets: Shares of positions.
        selectors: Names of `SELECTORS`.
        salts: By selector the part of the seed that Python's string hash gave a run of the script.
        order: How equal scores follow each other, as `best`.
        draws: Number of draws of the contexts that hold a selected position.

    Returns:
        Columns selector, budget, positions (n), mean, low, high, per_kept_share (mean over n / N),
        q3_share, entropy, divergence, compatibility (means of h, d, c), tied and taken (positions
        of equal score at the cut, and how many of them are taken), expected, least, greatest (the
        mean whichever of them are taken; NaN for `random`).
    """
    y, selectors = winsorize(table.gain, WINSORIZED), tuple(selectors)
    return pd.DataFrame(
        [
            {
                "selector": name,
                "budget": budget,
                **_selected(
                    table,
                    y,
                    name,
                    selection_count(len(table), budget),
                    seed=selector_seed(name, k=k, budget=budget, salt=(salts or {}).get(name)),
                    order=order,
                    draws=draws,
                ),
            }
            for budget in budgets
            for name in selectors
        ]
    )


def _selected(
    table: ScriptTable,
    y: np.ndarray,
    name: str,
    count: int,
    *,
    seed: int,
    order: Order,
    draws: int,
) -> dict:
    """What one selector's `count` best positions hold of the outcome y [N]."""
    rng = np.random.default_rng(seed)
    if name == "random":
        chosen = rng.choice(len(table), size=count, replace=False)
        ties = UnderTies(np.nan, np.nan, np.nan, 0, 0)
    else:
        chosen = best(table.score(name), count, order=order, seed=seed)
        ties = under_ties(table.score(name), y, count)
    # Contexts are numbered in the order in which the selection meets them.
    low, high = mean_interval(y[chosen], table.context[chosen], rng=rng, draws=draws)
    mean = y[chosen].mean()
    return {
        "positions": count,
        "mean": mean,
        "low": low,
        "high": high,
        "per_kept_share": mean / (count / len(y)),
        "q3_share": table.in_q3[chosen].mean(),
        **{column: table.score(column)[chosen].mean() for column in SCALED},
        **vars(ties),
    }
