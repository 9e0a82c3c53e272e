"""Rank and linear correlations of clustered positions, over the whole table and within prompts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from diagnostics.analysis.bootstrap import (
    Estimate,
    PromptClusters,
    of_sums,
    ratio_of_sums,
    undefined,
)

LEAST_BLOCK = 128
"""Side of the blocks in `_earlier_and_lower`; the fastest of 32 to 128 at 57,600 positions. Longer
arrays take blocks of half the root of their length, so that the table of blocks grows no faster
than they do."""
SINGULAR = 1e-10
"""Determinant of a correlation matrix under which its columns count as linearly dependent."""
ROUNDING = 1e-26
"""Centred over uncentred sum of squares under which a prompt's values count as constant."""


class Variable:
    """Values [N], with their ranks under a mask worked out once however many partners they meet."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.float64)
        self.finite = np.isfinite(self.values)
        self._ranked: dict[bytes, Ranked] = {}

    def ranked(self, mask: np.ndarray, prompts: PromptClusters | None = None) -> Ranked:
        """Ranks of the values under the mask, among all of them or, with prompts, within each
        prompt.
        """
        key = np.packbits(mask).tobytes() + (b"within" if prompts else b"")
        if key not in self._ranked:
            whole = self.ranked(mask).order if prompts else None
            self._ranked[key] = Ranked(
                self.values[mask], within=prompts and prompts.codes[mask], order=whole
            )
        return self._ranked[key]


class Ranked:
    """For each of n finite values, how many are smaller and how many equal (itself included).

    within: where given, [n] groups, and only values of one's own group are counted; `order` may
    then give the order of the values over all groups."""

    def __init__(
        self,
        values: np.ndarray,
        *,
        within: np.ndarray | None = None,
        order: np.ndarray | None = None,
    ):
        self.order = np.argsort(values) if order is None else order
        if within is not None:
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
        """Ranks within groups as ranks over all, groups laid end to end; start: [n] where each
        one's group begins.
        """
        whole = copy(self)
        whole.below = self.below + start
        return whole

    @property
    def average(self) -> np.ndarray:
        """Ranks from 1, averaged over ties."""
        return self.below + (self.ties + 1) / 2


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of the run of equal columns that each element of a sorted array lies
    in.
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
    """Pearson's correlation of x [N] and y [N], arrays or Variables, where both are finite; NaN for
    a constant.
    """
    x, y, mask = _pair(x, y)
    return _pearson(x.values[mask], y.values[mask], mask, prompts)


def spearman(x, y, prompts: PromptClusters) -> Estimate:
    """Spearman's correlation.

    Positions are ranked once and their ranks resampled, which is not the same as ranking each draw
    anew: see `benchmarks/CALIBRATION.md` for how little the standard errors differ."""
    x, y, mask = _pair(x, y)
    return _pearson(x.ranked(mask).average, y.ranked(mask).average, mask, prompts)


def _pearson(x: np.ndarray, y: np.ndarray, mask: np.ndarray, prompts: PromptClusters) -> Estimate:
    if len(x) < 3:
        return undefined(prompts, mask)
    x, y = standardize(x), standardize(y)
    sums = prompts.sums(np.ones_like(x), x, y, x * x, y * y, x * y, at=mask)
    return of_sums(_pearson_from_sums, sums, prompts, mask, correlation=True)[0]


def _pearson_from_sums(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2))
        return np.where(spread > 1e-12, np.clip((xy / n - x * y / n**2) / spread, -1, 1), np.nan)[
            ..., None
        ]


def standardize(values: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 (divisor n); zeros for a constant."""
    centred = values - values.mean()
    spread = np.sqrt(np.mean(centred**2))
    constant = spread <= 1e-14 * np.abs(values).max()
    return np.zeros_like(centred) if constant else centred / spread


def kendall(x, y, prompts: PromptClusters) -> Estimate:
    """Kendall's tau-b, exact; its draws and left-out values resample its projection on prompts.

    The projection is the first-order term of the U-statistic: 2/n^2 times the sum over a prompt's
    positions of their signs against all others, less the same for the tie counts in the
    denominator."""
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
    """For each i the sums over j of sgn(xi - xj) sgn(yi - yj), of [xi != xj] and of [yi != yj].

    With P = [xj < xi], E = [xj = xi], and Q, F the same for y, the product of signs is
    (2P + E - 1)(2Q + F - 1). EQ and PF fall out of two lexicographic sorts, and PQ out of counting,
    along the one, the earlier elements that are lower in the other.
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
    """Order by (first, second, index), and for each element: how many share `first` and lie below
    in `second`, how many share both, and how many of those come earlier."""
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
    """For a permutation: how many earlier elements are lower. Whole blocks by a table, the rest
    pairwise.
    """
    n, side = len(level), max(LEAST_BLOCK, int(np.sqrt(len(level)) / 2))
    blocks = -(-n // side)
    levels = np.arange(blocks * side, dtype=np.int32)
    levels[:n] = level
    places = np.empty_like(levels)
    places[levels] = np.arange(blocks * side, dtype=np.int32)
    row, column = np.arange(blocks * side) // side, levels // side
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
    """Mean over prompts of the correlation within each, Spearman's, Pearson's or Kendall's; prompts
    count alike.

    A prompt takes part with at least `least` positions where both are finite and neither is
    constant."""
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
    """[prompts] each: positions, and centred sums of squares and products of values or of ranks
    within the prompt.
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
    """[prompts] each: positions, untied pairs in x, in y, and concordant less discordant pairs, of
    the prompt's own.

    With the prompts' values laid end to end, two positions of different prompts always agree: they
    are taken off."""
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
    """Columns [N] to hold fixed, with the space that they span under a mask worked out once."""

    def __init__(self, columns: Sequence):
        self.columns = [v if isinstance(v, Variable) else Variable(v) for v in columns]
        self.finite = (
            np.logical_and.reduce([v.finite for v in self.columns]) if self.columns else True
        )
        self._bases: dict[tuple[bytes, bool], np.ndarray] = {}

    def residual(self, values: np.ndarray, mask: np.ndarray, *, ranked: bool) -> np.ndarray:
        """What a least-squares fit of values [mask.sum()] on an intercept and the columns leaves;
        zeros for nothing.
        """
        key = np.packbits(mask).tobytes(), ranked
        if key not in self._bases:
            columns = [v.ranked(mask).average if ranked else v.values[mask] for v in self.columns]
            design = np.stack([np.ones(int(mask.sum())), *map(standardize, columns)], axis=1)
            left, size, _ = np.linalg.svd(design, full_matrices=False)
            self._bases[key] = left[:, size > 1e-8 * size[0]]
        basis, centred = self._bases[key], standardize(values)
        rest = centred - basis @ (basis.T @ centred)
        return rest if np.mean(rest**2) > SINGULAR else np.zeros_like(rest)


def partial(x, y, controls: Controls, prompts: PromptClusters, *, ranked: bool = True) -> Estimate:
    """Correlation of x [N] and y [N] given the controls; of ranks (ranked once) or of values.

    The correlation of the two residuals. Residuals are taken once: they are orthogonal to the
    controls, so a draw's own fit would change its value in the second order only. NaN where x or y
    is a linear combination of the controls."""
    x, y, mask = _pair(x, y)
    mask = mask & controls.finite
    if mask.sum() < len(controls.columns) + 3:
        return undefined(prompts, mask)
    columns = (v.ranked(mask).average if ranked else v.values[mask] for v in (x, y))
    return _pearson(
        *(controls.residual(column, mask, ranked=ranked) for column in columns), mask, prompts
    )


def groups_by_rank(score: np.ndarray, groups: int, mask: np.ndarray) -> np.ndarray:
    """Groups 1..groups of equal size by rank of the finite scores under the mask; 0 elsewhere.

    Equal scores stay together, in the group that holds the middle of their ranks, so heavy ties
    leave groups unequal or empty."""
    mask = mask & np.isfinite(score)
    result = np.zeros(len(score), dtype=int)
    if mask.any():
        share = (Ranked(score[mask]).average - 0.5) / mask.sum()
        result[mask] = 1 + np.floor(share * groups).astype(int)
    return result
