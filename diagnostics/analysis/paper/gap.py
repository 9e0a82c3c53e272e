"""The Q3 gap of the released scripts: top minus bottom of a score, resampled by context, matched.

    bottom = {s <= Q(1/g)}, top = {s >= Q((g - 1)/g)}        g = 3 for thirds, 4 for quartiles
    gap    = mean(G | top) - mean(G | bottom)
    draw   = n contexts drawn with replacement of the n that hold a position, pooled;
             the groups stay those of the whole sample
    ends   = 2.5 % and 97.5 % quantiles of the draws' gaps
    match  = within a context, each position above the context's own median of s with the nearest of
             those at or below it, in unscaled coordinates, with replacement

Equal scores at a cut belong to the group, so with many ties the groups grow, and overlap where the
score is saturated. `analysis.quadrants` has the controlled contrast. Written from the definitions
of the scripts released with arXiv 2605.26844.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics.analysis import matching
from diagnostics.analysis.paper.bank import When, script_table
from diagnostics.analysis.paper.least_squares import fit

THIRDS, QUARTILES = 3, 4
DRAWS = 1000
GAIN_SEED = 42
"""Seed of the gain script where its command names none."""
SWEEP_SEED = 20260512
"""Seed of the same script in the released sweeps over trainings."""
TAIL = 0.025
"""Share of the draws beyond each end of an interval."""


def ends(score: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Bottom and top group of a score, cut at its quantiles, the cuts' equals included.

    Args:
        score: [N] finite scores.
        groups: 3 for thirds, 4 for quartiles.

    Returns:
        Two masks [N], which overlap where more than 1 - 2/groups of the scores are equal.
    """
    low, high = np.quantile(score, [1 / groups, (groups - 1) / groups])
    return score <= low, score >= high


def resampled_sums(
    context: np.ndarray, columns: list[np.ndarray], *, rng: np.random.Generator, draws: int
) -> np.ndarray:
    """Sums of columns over the pooled positions of drawn contexts.

    Args:
        context: [N] context of each position. Contexts are numbered in order of appearance, and as
            many as appear are drawn with replacement.
        columns: [N] values each.
        rng: The generator that the draws advance.
        draws: Number of draws.

    Returns:
        [draws, columns] sums.
    """
    codes, names = pd.factorize(context)
    sums = [np.bincount(codes, weights=column, minlength=len(names)) for column in columns]
    # One call consumes the stream as a call per draw does, which is how the scripts make them.
    taken = rng.integers(0, len(names), size=(draws, len(names)))
    return np.stack(sums, axis=1)[taken].sum(axis=1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """2.5 % and 97.5 % quantile of a statistic's draws [D]; NaN without any."""
    if not len(draws):
        return np.nan, np.nan
    low, high = np.quantile(draws, [TAIL, 1 - TAIL])
    return float(low), float(high)


def mean_interval(
    values: np.ndarray, context: np.ndarray, *, rng: np.random.Generator, draws: int
) -> tuple[float, float]:
    """Percentile interval of a mean over contexts; NaN with fewer than two.

    Args:
        values: [N] finite values.
        context: [N] context of each.
        rng: The generator that the draws advance.
        draws: Number of draws.
    """
    if len(np.unique(context)) < 2:
        return np.nan, np.nan
    columns = [values, np.ones(len(values))]
    total, count = resampled_sums(context, columns, rng=rng, draws=draws).T
    return interval(total / count)


@dataclass(frozen=True)
class Gap:
    """Mean of the top minus mean of the bottom group.

    Attributes:
        estimate: The difference, in the outcome's unit; NaN where a group is empty.
        low: Lower end of the 95 % percentile interval.
        high: Upper end.
        bottom: Number of positions of the bottom group.
        top: Number of positions of the top group.
        bottom_mean: Mean outcome of the bottom group.
        top_mean: Mean outcome of the top group.
    """

    estimate: float
    low: float
    high: float
    bottom: int
    top: int
    bottom_mean: float
    top_mean: float


def gap(
    values: np.ndarray,
    context: np.ndarray,
    groups: tuple[np.ndarray, np.ndarray],
    *,
    rng: np.random.Generator,
    draws: int = DRAWS,
) -> Gap:
    """Compare the mean outcome of two groups of positions, with contexts resampled.

    Args:
        values: [N] outcome of the positions of a region.
        context: [N] context of each; those without a position in either group are drawn too.
        groups: Masks [N] of bottom and top.
        rng: The generator that the draws advance.
        draws: Number of draws; those in which a group is empty do not count.

    Returns:
        The gap.
    """
    bottom, top = groups
    columns = [column for group in (top, bottom) for column in (np.where(group, values, 0), group)]
    over, upper, under, lower = resampled_sums(context, columns, rng=rng, draws=draws).T
    both = (upper > 0) & (lower > 0)
    low, high = interval(over[both] / upper[both] - under[both] / lower[both])
    means = [float(values[group].mean()) if group.any() else np.nan for group in groups]
    return Gap(means[1] - means[0], low, high, int(bottom.sum()), int(top.sum()), *means)


@dataclass(frozen=True)
class MatchedGap:
    """Differences of matched pairs.

    Attributes:
        pairs: Number of pairs.
        mean: Mean difference, in the outcome's unit; NaN without a pair.
        median: Median difference.
    """

    pairs: int
    mean: float
    median: float


def matched_gap(
    values: np.ndarray, context: np.ndarray, score: np.ndarray, space: np.ndarray
) -> MatchedGap:
    """Compare positions above their context's median score with the nearest at or below it.

    Args:
        values: [N] outcome of the positions of a region.
        context: [N] number of each position's context.
        score: [N] finite scores.
        space: [N, F] coordinates, whose Euclidean distance is taken as they are.

    Returns:
        The differences of all pairs. A control may serve several positions, and none is too far.
    """
    median = pd.Series(score).groupby(context).transform("median").to_numpy()
    pairs = matching.match(space, score > median, score <= median, context)
    found = pairs.differences(values)
    if not len(found):
        return MatchedGap(0, np.nan, np.nan)
    return MatchedGap(len(found), float(found.mean()), float(np.median(found)))


@dataclass(frozen=True)
class GainStatistics:
    """What the released gain script prints for one trained student.

    Attributes:
        positions: Number of positions in Q3.
        gap: The gap of G between the thirds of c in Q3.
        matched: The same for matched positions.
        r_squared: R^2 of G on h, d, h*d, position and ht.
        gained_by_compatibility: R^2 that c adds to it.
        gained_by_split: R^2 that d*c and d*(1 - c) in place of d and h*d add to it.
        mean: Mean of G over all positions, which the script's table does not print.
    """

    positions: int
    gap: Gap
    matched: MatchedGap
    r_squared: float
    gained_by_compatibility: float
    gained_by_split: float
    mean: float


def gain_statistics(
    tokens: pd.DataFrame,
    *,
    k: int | None = None,
    entropy: When = "after",
    compatibility: When = "after",
    seed: int = GAIN_SEED,
    draws: int = DRAWS,
) -> GainStatistics:
    """The gap of C inside Q3 after training: tables 1, 2, 7 and 10, figures 3C and 5A.

    The script reads H and C of the *trained* student, so the outcome takes part in choosing Q3; D
    is the untrained student's.

    Args:
        tokens: A token table with the columns `_after` of a checkpoint.
        k: The K of C; None means the table's own.
        entropy: Whose H chooses Q3; `after` is the script's.
        compatibility: Whose C forms the thirds; `after` is the script's.
        seed: Seed of the draws. The script's is 42, and 20260512 in the sweeps over trainings.
        draws: Number of draws.

    Returns:
        The statistics, of G as a fraction.

    Raises:
        DiagnosticsError: A column is missing.

    Reference:
        `analyze_fixed_context_gain.py` of the scripts released with arXiv 2605.26844.
    """
    table = script_table(tokens, entropy=entropy, compatibility=compatibility, k=k)
    h, d, c, y = table.entropy, table.divergence, table.compatibility, table.gain
    place = unit_range(table.position)
    q3 = table.in_q3
    base = [h, d, h * d, place, table.teacher_entropy]
    plain = fit(y, base).r_squared
    return GainStatistics(
        positions=int(q3.sum()),
        gap=gap(
            y[q3],
            table.context[q3],
            ends(c[q3], THIRDS),
            rng=np.random.default_rng(seed),
            draws=draws,
        ),
        matched=matched_gap(y[q3], table.context[q3], c[q3], np.stack([h, d, place], axis=1)[q3]),
        r_squared=plain,
        gained_by_compatibility=fit(y, [*base, c]).r_squared - plain,
        gained_by_split=fit(y, [h, d * c, d * (1 - c), place, table.teacher_entropy]).r_squared
        - plain,
        mean=float(y.mean()),
    )


def unit_range(values: np.ndarray) -> np.ndarray:
    """(z - min) / (max - min) of finite values [N]; 0 for a constant."""
    low, span = values.min(), np.ptp(values)
    return (values - low) / span if span > 0 else np.zeros(len(values))
