"""Rank and linear correlations of clustered positions, over the whole table and within prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np

from diagnostics.analysis.bootstrap import (
    EXACT_DRAWS,
    Estimate,
    PromptClusters,
    of_sums,
    ratio_of_sums,
    undefined,
)

LEAST_BLOCK = 128
"""Smallest side of the blocks in `_earlier_and_lower`; the fastest of 32 to 128 at 57,600
positions. Longer arrays have blocks of half the root of their length, so that the table of blocks
grows no faster than they do."""
LEFT_OUT = 120_000_000
"""Prompts times positions up to which each prompt is left out in turn. Beyond, there are so many
that the bootstrap's standard error is not biased, and ranking once per prompt takes minutes."""
SINGULAR = 1e-10
"""Determinant of a correlation matrix under which its columns count as linearly dependent."""
ROUNDING = 1e-26
"""Centered over uncentered sum of squares under which a prompt's values count as constant."""


class Variable:
    """Values [N] whose ranks under a mask are computed once, for however many partners.

    Args:
        values: [N] values; those that are not finite never count.
    """

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.float64)
        self.finite = np.isfinite(self.values)
        self._ranked: dict[bytes, Ranked] = {}

    def ranked(self, mask: np.ndarray, prompts: PromptClusters | None = None) -> Ranked:
        """Ranks of the values under a mask.

        Args:
            mask: [N] positions that count; their values must be finite.
            prompts: Where given, a value is ranked among those of its own prompt.

        Returns:
            The ranks [mask.sum()].
        """
        key = np.packbits(mask).tobytes() + (b"within" if prompts else b"")
        if key not in self._ranked:
            whole = self.ranked(mask).order if prompts else None
            self._ranked[key] = Ranked(
                self.values[mask], within=prompts and prompts.codes[mask], order=whole
            )
        return self._ranked[key]


class Ranked:
    """For each of n finite values, how many are smaller and how many are equal (itself included).

    Args:
        values: [n] values.
        within: [n] groups; where given, only values of the same group are counted.
        order: [n] the order of the values over all groups, if it is known already.
    """

    def __init__(
        self,
        values: np.ndarray,
        *,
        within: np.ndarray | None = None,
        order: np.ndarray | None = None,
    ):
        self.order = np.argsort(values) if order is None else order
        if within is not None:
            # A stable sort of 16-bit integers is a radix sort, which takes linear time.
            small = np.uint16 if within.max(initial=0) < 2**16 else np.int64
            self.order = self.order[np.argsort(within[self.order].astype(small), kind="stable")]
        self.below, self.ties = np.empty((2, len(values)), dtype=np.int64)
        ordered = (
            values[self.order]
            if within is None
            else np.stack([within[self.order], values[self.order]])
        )
        start, self.ties[self.order] = _runs(ordered)
        self.below[self.order] = start if within is None else start - _runs(within[self.order])[0]
        self.untied = bool((self.ties == 1).all())

    def shifted(self, start: np.ndarray) -> Ranked:
        """Ranks within groups as ranks over all, with the groups laid end to end.

        Args:
            start: [n] rank at which each value's group begins.
        """
        whole = copy(self)
        whole.below = self.below + start
        return whole

    @property
    def average(self) -> np.ndarray:
        """Ranks from 1, averaged over ties."""
        return self.below + (self.ties + 1) / 2


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of the run of equal columns that each element of a sorted array
    belongs to.
    """
    ordered = np.atleast_2d(ordered)
    new = np.flatnonzero(
        np.r_[True, (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)][: ordered.shape[1]]
    )
    lengths = np.diff(np.r_[new, ordered.shape[1]])
    return np.repeat(new, lengths), np.repeat(lengths, lengths)


def _pair(x, y) -> tuple[Variable, Variable, np.ndarray]:
    x, y = (v if isinstance(v, Variable) else Variable(v) for v in (x, y))
    return x, y, x.finite & y.finite


def pearson(x, y, prompts: PromptClusters) -> Estimate:
    """Pearson's correlation over the positions where both variables are finite.

    Args:
        x: [N] values, an array or a `Variable`.
        y: [N] values, an array or a `Variable`.
        prompts: The prompts of the N positions, with their draws.

    Returns:
        The correlation; NaN for a constant.
    """
    x, y, mask = _pair(x, y)
    return _pearson(x.values[mask], y.values[mask], mask, prompts)


def spearman(x, y, prompts: PromptClusters) -> Estimate:
    """Spearman's correlation over the positions where both variables are finite.

    Positions are ranked once and their ranks resampled, which is quick and for some variables too
    narrow; `spearman_pairs` ranks anew in every draw.

    Args:
        x: [N] values, an array or a `Variable`.
        y: [N] values, an array or a `Variable`.
        prompts: The prompts of the N positions, with their draws.

    Returns:
        The correlation; NaN for a constant.
    """
    x, y, mask = _pair(x, y)
    return _pearson(x.ranked(mask).average, y.ranked(mask).average, mask, prompts)


def spearman_pairs(
    scores: Mapping[str, Variable], outcomes: Mapping[str, Variable], prompts: PromptClusters
) -> dict[tuple[str, str], Estimate]:
    """Spearman's correlation of every score with every outcome, ranked anew in every draw.

    A draw weighs every position by how often its prompt was taken. The mid-rank of a value is then
    the weight below it plus half the weight at it, so one sort of each variable serves all draws.

    Args:
        scores: [N] values each, by name.
        outcomes: [N] values each, by name.
        prompts: The prompts of the N positions, with their draws, of which the first `EXACT_DRAWS`
            are used. Without draws the values alone are computed.

    Returns:
        Correlations by (outcome, score); NaN for a constant.
    """
    found = {}
    for mask, pairs in _by_mask(scores, outcomes):
        used = [{name: pool[name] for name in dict.fromkeys(side)} for pool, side in pairs]
        grid = _reranked(*(list(side.values()) for side in used), mask, prompts)
        rows, columns = ({name: i for i, name in enumerate(side)} for side in used)
        for score, outcome in zip(*(side for _, side in pairs)):
            found[outcome, score] = grid[rows[score]][columns[outcome]]
    return {(outcome, score): found[outcome, score] for outcome in outcomes for score in scores}


def _by_mask(scores: Mapping[str, Variable], outcomes: Mapping[str, Variable]) -> Iterator[tuple]:
    """(mask, ((scores, names), (outcomes, names))) for the pairs that are defined at the same
    positions.
    """
    groups: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    masks = {}
    for outcome, y in outcomes.items():
        for score, x in scores.items():
            mask = x.finite & y.finite
            key = np.packbits(mask).tobytes()
            masks[key] = mask
            groups[key].append((score, outcome))
    for key, pairs in groups.items():
        first, second = zip(*pairs)
        yield masks[key], ((scores, first), (outcomes, second))


def _reranked(
    x: Sequence[Variable], y: Sequence[Variable], mask: np.ndarray, prompts: PromptClusters
) -> list[list[Estimate]]:
    """Spearman's correlation of each x with each y over the positions of a mask."""
    if mask.sum() < 3:
        return [[undefined(prompts, mask)] * len(y)] * len(x)
    codes = prompts.codes[mask]
    ranks = [_WeightedRanks(v.ranked(mask), codes) for v in (*x, *y)]

    def grid(weights: np.ndarray) -> np.ndarray:
        each = weights[codes]
        half = each.sum() / 2
        moved = np.stack([rank.of(weights) - half for rank in ranks])
        weighed = moved * each
        spread = np.sqrt(np.einsum("ij,ij->i", moved, weighed))
        product = weighed[: len(x)] @ moved[len(x) :].T
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = product / (spread[: len(x), None] * spread[None, len(x) :])
        return np.where(np.isfinite(rho), np.clip(rho, -1, 1), np.nan)

    value = grid(np.ones(prompts.count))
    draws = np.array([grid(w) for w in prompts.weights[:EXACT_DRAWS]]).reshape(-1, *value.shape)
    left_out = None
    if prompts.draws and prompts.count * len(codes) <= LEFT_OUT:
        left_out = np.array([grid(w) for w in _all_but_one(prompts.count)])
    counts = int(mask.sum()), prompts.present(mask)
    return [
        [
            Estimate(
                float(value[i, j]),
                draws[:, i, j],
                *counts,
                correlation=True,
                left_out=None if left_out is None else left_out[:, i, j],
            )
            for j in range(len(y))
        ]
        for i in range(len(x))
    ]


def _all_but_one(count: int) -> Iterator[np.ndarray]:
    """[count] weights that leave out each prompt in turn."""
    for prompt in range(count):
        weights = np.ones(count)
        weights[prompt] = 0.0
        yield weights


class _WeightedRanks:
    """Mid-ranks, from 0, of n values whose prompts have weights.

    Args:
        ranked: The values' order and ties.
        codes: [n] number of each value's prompt.
    """

    def __init__(self, ranked: Ranked, codes: np.ndarray):
        self.codes = codes[ranked.order]
        self.below, self.upto = ranked.below, ranked.below + ranked.ties

    def of(self, weights: np.ndarray) -> np.ndarray:
        """[n] weight of the lower values and half the weight of the equal ones.

        Args:
            weights: [prompts] how often each prompt counts.
        """
        total = np.empty(len(self.codes) + 1)
        total[0] = 0
        np.cumsum(weights[self.codes], out=total[1:])
        return (total[self.below] + total[self.upto]) / 2


def _pearson(x: np.ndarray, y: np.ndarray, mask: np.ndarray, prompts: PromptClusters) -> Estimate:
    if len(x) < 3:
        return undefined(prompts, mask)
    x = standardize(x)
    y = standardize(y)
    sums = prompts.sums(np.ones_like(x), x, y, x * x, y * y, x * y, at=mask)
    return of_sums(_pearson_from_sums, sums, prompts, mask, correlation=True)[0]


def _pearson_from_sums(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2))
        return np.where(spread > 1e-12, np.clip((xy / n - x * y / n**2) / spread, -1, 1), np.nan)[
            ..., None
        ]


def values_of_pairs(
    scores: Mapping[str, Variable],
    outcomes: Mapping[str, Variable],
    prompts: PromptClusters,
    *,
    ranked: bool,
    controls: Controls | None = None,
) -> dict[tuple[str, str], Estimate]:
    """The values that `pearson`, `spearman` or `partial` has for every score and outcome, without
    draws: each variable is ranked and freed of the controls once, whatever the number of pairs.

    Args:
        scores: [N] values each, by name.
        outcomes: [N] values each, by name.
        prompts: The prompts of the N positions.
        ranked: Whether the correlations are of ranks or of values.
        controls: The columns to hold fixed; None holds none.

    Returns:
        Correlations by (outcome, score), without draws.
    """
    found = {}
    for mask, pairs in _by_mask(scores, outcomes):
        mask = mask if controls is None else mask & controls.finite
        least = 3 if controls is None else len(controls.columns) + 3
        names, others = (list(dict.fromkeys(side)) for _, side in pairs)
        grid = np.full((len(names), len(others)), np.nan)
        if mask.sum() >= least:
            first, second = (
                np.stack([_column(pool[name], mask, ranked, controls) for name in side])
                for pool, side in ((scores, names), (outcomes, others))
            )
            grid = first @ second.T / mask.sum()
            varies = [(side != 0).any(axis=1) for side in (first, second)]
            grid = np.where(np.outer(*varies), np.clip(grid, -1, 1), np.nan)
        counts = int(mask.sum()), prompts.present(mask)
        rows, columns = ({name: i for i, name in enumerate(side)} for side in (names, others))
        for score, outcome in zip(*(side for _, side in pairs)):
            value = float(grid[rows[score], columns[outcome]])
            found[outcome, score] = Estimate(value, np.empty(0), *counts, correlation=True)
    return found


def _column(
    variable: Variable, mask: np.ndarray, ranked: bool, controls: Controls | None
) -> np.ndarray:
    """[mask.sum()] values or ranks without what the controls give, standardized."""
    column = variable.ranked(mask).average if ranked else variable.values[mask]
    if controls is not None:
        column = controls.residual(column, mask, ranked=ranked)
    return standardize(column)


def standardize(values: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 (divisor n); zeros for a constant."""
    centered = values - values.mean()
    spread = np.sqrt(np.mean(centered**2))
    constant = spread <= 1e-14 * np.abs(values).max()
    return np.zeros_like(centered) if constant else centered / spread


def kendall(x, y, prompts: PromptClusters) -> Estimate:
    """Kendall's tau-b, exact; its draws and left-out values resample its projection on prompts.

    The projection is the first-order term of the U-statistic: 2/n^2 times the sum over a prompt's
    positions of their signs against all others, minus the same for the tie counts in the
    denominator.

    Args:
        x: [N] values, an array or a `Variable`.
        y: [N] values, an array or a `Variable`.
        prompts: The prompts of the N positions, with their draws.

    Returns:
        The correlation; NaN where a variable ties every pair.

    Reference:
        Kendall 1945 (tau-b); Hoeffding 1948 (projection of a U-statistic).
    """
    x, y, mask = _pair(x, y)
    if mask.sum() < 3:
        return undefined(prompts, mask)
    sums = prompts.sums(*concordance(x.ranked(mask), y.ranked(mask)), np.ones(mask.sum()), at=mask)
    both, x_untied, y_untied, n = sums.sum(0)
    if min(x_untied, y_untied) == 0:
        return undefined(prompts, mask)
    scale = np.sqrt(x_untied * y_untied)
    tau = both / scale
    influence = 2 * sums[:, 0] / scale - tau * (sums[:, 1] / x_untied + sums[:, 2] / y_untied)
    with np.errstate(divide="ignore", invalid="ignore"):
        left_out = tau - influence / (1 - sums[:, 3] / n) ** 2
    draws, left_out = (np.clip(v, -1, 1) for v in (tau + prompts.weights @ influence, left_out))
    return Estimate(
        float(tau), draws, int(n), prompts.present(mask), correlation=True, left_out=left_out
    )


def concordance(x: Ranked, y: Ranked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concordant minus discordant partners of each position, and its untied partners.

    With P = [xj < xi], E = [xj = xi], and Q, F the same for y, the product of signs is
    (2P + E - 1)(2Q + F - 1). EQ and PF follow from two lexicographic sorts, and PQ from counting,
    along the one, the earlier elements that are lower in the other.

    Args:
        x: Ranks of n values.
        y: Ranks of n values.

    Returns:
        For each i the sums over j of sgn(xi - xj) sgn(yi - yj), of [xi != xj] and of [yi != yj].
    """
    n = len(x.order)
    by_x, eq, ef, repeat = _lexicographic(x, y)
    by_y, pf, _, _ = _lexicographic(y, x)
    level = np.empty(n, dtype=np.int32)
    level[by_y] = np.arange(n, dtype=np.int32)
    pq = np.empty(n, dtype=np.int64)
    pq[by_x] = _earlier_and_lower(level[by_x])
    pq -= eq + pf + repeat
    both = 4 * pq + 2 * eq + 2 * pf + ef - 2 * x.below - x.ties - 2 * y.below - y.ties + n
    return both, n - x.ties, n - y.ties


def _lexicographic(first: Ranked, second: Ranked) -> tuple[np.ndarray, ...]:
    """Order by (first, second, index), and for each element: how many have the same `first` and are
    lower in `second`, how many have both the same, and how many of those come earlier.
    """
    if first.untied:
        zeros = np.zeros_like(first.below)
        return first.order, zeros, zeros + 1, zeros
    key = first.below * np.int64(len(first.below)) + second.below
    order = np.argsort(key, kind=None if second.untied else "stable")
    start, length = _runs(key[order])
    below, same, repeat = np.empty((3, len(key)), dtype=np.int64)
    below[order], same[order], repeat[order] = start, length, np.arange(len(key)) - start
    return order, below - first.below, same, repeat


def _earlier_and_lower(level: np.ndarray) -> np.ndarray:
    """For a permutation: how many earlier elements are lower.

    Whole blocks are counted by a table, the elements of the same block pairwise.
    """
    n = len(level)
    side = max(LEAST_BLOCK, int(np.sqrt(len(level)) / 2))
    blocks = -(-n // side)
    levels = np.arange(blocks * side, dtype=np.int32)
    levels[:n] = level
    places = np.empty_like(levels)
    places[levels] = np.arange(blocks * side, dtype=np.int32)
    row = np.arange(blocks * side) // side
    column = levels // side
    table = np.bincount(row * blocks + column, minlength=blocks**2).reshape(blocks, blocks)
    counts = np.pad(table.cumsum(0).cumsum(1), ((1, 0), (1, 0)))[row, column]
    counts += _earlier_and_lower_in_block(levels, side)
    counts[places] += _earlier_and_lower_in_block(places // side, side)
    return counts[:n]


def _earlier_and_lower_in_block(values: np.ndarray, side: int) -> np.ndarray:
    columns = np.ascontiguousarray(values.reshape(-1, side).T)
    counts = np.zeros(columns.shape, dtype=np.int16)
    for step in range(1, side):
        counts[step:] += columns[:-step] < columns[step:]
    return counts.T.ravel()


def within_prompts(
    x, y, prompts: PromptClusters, *, method: str = "spearman", least: int = 5
) -> Estimate:
    """Mean over prompts of the correlation within each prompt, every prompt with the same weight.

    Args:
        x: [N] values, an array or a `Variable`.
        y: [N] values, an array or a `Variable`.
        prompts: The prompts of the N positions, with their draws.
        method: spearman, pearson or kendall.
        least: Number of positions with both values finite that a prompt needs to take part; neither
            of its variables may be constant.

    Returns:
        The mean; its counts are those of the prompts that take part.
    """
    x, y, mask = _pair(x, y)
    if not mask.any():
        return undefined(prompts, mask)
    n, xx, yy, xy = (_concordance_within if method == "kendall" else _moments_within)(
        x, y, mask, prompts, method
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where((n >= least) & (xx > 0) & (yy > 0), xy / np.sqrt(xx * yy), np.nan)
    used = np.isfinite(each)
    sums = np.stack([used, np.where(used, each, 0.0)], axis=1).astype(np.float64)
    return of_sums(ratio_of_sums, sums, prompts, mask & used[prompts.codes])[0]


def _moments_within(
    x: Variable, y: Variable, mask: np.ndarray, prompts: PromptClusters, method: str
) -> tuple[np.ndarray, ...]:
    """[prompts] each: number of positions, and centered sums of squares and products of the values
    or of the ranks within the prompt.
    """
    codes = prompts.codes[mask]
    x, y = (
        v.ranked(mask, prompts).average if method == "spearman" else v.values[mask] for v in (x, y)
    )
    n, sx, sy, *sizes = prompts.sums(np.ones_like(x), x, y, x * x, y * y, at=mask).T
    x, y = (v - (s / np.maximum(n, 1))[codes] for v, s in ((x, sx), (y, sy)))
    xx, yy, xy = prompts.sums(x * x, y * y, x * y, at=mask).T
    xx, yy = (np.where(v > ROUNDING * size, v, 0) for v, size in zip((xx, yy), sizes, strict=True))
    return n, xx, yy, xy


def _concordance_within(
    x: Variable, y: Variable, mask: np.ndarray, prompts: PromptClusters, _: str
) -> tuple[np.ndarray, ...]:
    """[prompts] each: number of positions, untied pairs in x, untied pairs in y, and concordant
    minus discordant pairs among the prompt's own positions.

    With the prompts' values laid end to end, two positions of different prompts always agree: those
    pairs are subtracted.
    """
    codes = prompts.codes[mask]
    size = np.bincount(codes, minlength=prompts.count)
    start = (np.cumsum(size) - size)[codes]
    both, x_untied, y_untied = concordance(
        *(v.ranked(mask, prompts).shifted(start) for v in (x, y))
    )
    others = len(codes) - size[codes]
    return tuple(
        prompts.sums(
            np.ones(len(codes)), x_untied - others, y_untied - others, both - others, at=mask
        ).T
    )


class Controls:
    """Columns to hold fixed, whose span under a mask is computed once.

    Args:
        columns: [N] values each, arrays or Variables.
    """

    def __init__(self, columns: Sequence):
        self.columns = [v if isinstance(v, Variable) else Variable(v) for v in columns]
        self.finite = (
            np.logical_and.reduce([v.finite for v in self.columns]) if self.columns else True
        )
        self._bases: dict[tuple[bytes, bool], np.ndarray] = {}

    def residual(self, values: np.ndarray, mask: np.ndarray, *, ranked: bool) -> np.ndarray:
        """The residual of a least-squares fit on an intercept and the columns.

        Args:
            values: [mask.sum()] values to fit.
            mask: [N] positions that count; all columns must be finite there.
            ranked: Whether the columns enter as ranks.

        Returns:
            [mask.sum()] residual of the standardized values; zeros where the columns determine
            them.
        """
        key = np.packbits(mask).tobytes(), ranked
        if key not in self._bases:
            columns = [v.ranked(mask).average if ranked else v.values[mask] for v in self.columns]
            design = np.stack([np.ones(int(mask.sum())), *map(standardize, columns)], axis=1)
            left, size, _ = np.linalg.svd(design, full_matrices=False)
            self._bases[key] = left[:, size > 1e-8 * size[0]]
        basis = self._bases[key]
        scaled = standardize(values)
        rest = scaled - basis @ (basis.T @ scaled)
        return rest if np.mean(rest**2) > SINGULAR else np.zeros_like(rest)


def partial(x, y, controls: Controls, prompts: PromptClusters, *, ranked: bool = True) -> Estimate:
    """Correlation of x and y given the controls: the correlation of their two residuals.

    Residuals are computed once. They are orthogonal to the controls, so a fit in every draw would
    change its value in the second order only.

    Args:
        x: [N] values, an array or a `Variable`.
        y: [N] values, an array or a `Variable`.
        controls: The columns to hold fixed.
        prompts: The prompts of the N positions, with their draws.
        ranked: Whether the correlation is of ranks (computed once) or of values.

    Returns:
        The correlation; NaN where x or y is a linear combination of the controls.
    """
    x, y, mask = _pair(x, y)
    mask = mask & controls.finite
    if mask.sum() < len(controls.columns) + 3:
        return undefined(prompts, mask)
    columns = (v.ranked(mask).average if ranked else v.values[mask] for v in (x, y))
    return _pearson(
        *(controls.residual(column, mask, ranked=ranked) for column in columns), mask, prompts
    )


def groups_by_rank(score: np.ndarray, groups: int, mask: np.ndarray) -> np.ndarray:
    """Cut the finite scores under a mask into groups of equal size.

    Equal scores stay together, in the group that holds the middle of their ranks, so many ties
    leave groups unequal or empty.

    Args:
        score: [N] scores.
        groups: Number of groups.
        mask: [N] positions that count.

    Returns:
        [N] group from 1 (lowest) to `groups`, 0 for positions that do not count.
    """
    mask = mask & np.isfinite(score)
    result = np.zeros(len(score), dtype=int)
    result[mask] = equal_groups(rank_shares(score[mask]), groups)
    return result


def rank_shares(score: np.ndarray) -> np.ndarray:
    """[n] share of the finite scores that lie below each, half of its equals among them; NaN for a
    score that is not finite.
    """
    finite = np.isfinite(score)
    shares = np.full(len(score), np.nan)
    if finite.any():
        shares[finite] = (Ranked(score[finite]).average - 0.5) / finite.sum()
    return shares


def equal_groups(shares: np.ndarray, groups: int) -> np.ndarray:
    """[n] group from 1 to `groups` by the shares of `rank_shares`; 0 where a share is NaN."""
    return np.where(np.isfinite(shares), 1 + np.floor(np.nan_to_num(shares) * groups), 0).astype(
        int
    )
