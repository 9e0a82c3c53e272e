"""Statistics for positions that come in clusters, one cluster a prompt.

    w ~ Multinomial(G; 1/G, ..., 1/G)        a draw: how often each of the G prompts is taken
    T*(w) = f(sum_g w_g s_g)                 its statistic, a function of per-prompt sums s_g
    T(-g) = f(sum_{h != g} s_h)              the statistic without prompt g
    SE^2  = max( G/(G-1) var h(T*),  (G-1)/G sum_g (h(T(-g)) - h(T))^2 )
    interval = h^-1( h(T) +- t(G-1) SE )

h is Fisher's arctanh for a correlation and the identity otherwise. Prompts are resampled whole; positions
within a prompt never are, because they are not independent. A statistic of sums costs one product
[draws, G] @ [G, sums] for all draws together.

Exact in every draw: means, differences, Pearson, regressions, medians. Approximate: Spearman ranks once and
resamples ranks, partial correlations take residuals once, Kendall and trimmed means resample their first-order
term, groups and winsorising limits are cut once. `benchmarks/CALIBRATION.md` has the measured differences.

Departures: with some tens of prompts the percentile interval is too short (it covers 87-93 % for 95 % at 20
prompts) and BCa shorter still (82-93 %), so the interval is a t interval, and the bootstrap's standard error,
biased downwards, is replaced by the jackknife's, biased upwards, where that is larger (94-97.5 %).
References: Efron and Stein 1981; Efron and Tibshirani 1993, ch. 11-14; Cameron and Miller 2015; MacKinnon,
Nielsen and Webb 2023 (t(G-1) with the cluster jackknife); Hoeffding 1948 (projection).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import optimize, spatial, special

LEAST_BLOCK = 128
"""Side of the blocks in `_earlier_and_lower`; the fastest of 32 to 128 at 57,600 positions. Longer arrays take
blocks of half the root of their length, so that the table of blocks grows no faster than they do."""
ENOUGH_DRAWS = 0.9
"""Share of draws in which a statistic must be defined for its interval to be."""
SINGULAR = 1e-10
"""Determinant of a correlation matrix under which its columns count as linearly dependent."""
ROUNDING = 1e-26
"""Centred over uncentred sum of squares under which a prompt's values count as constant."""
TOO_FAR = 1e9
"""Cost of a pair outside the caliper, so that an assignment takes it only for want of another."""
CHUNK = 2_000_000
"""Elements of a [draws, positions] block that are held at a time."""


class Prompts:
    """The prompts of N positions, and how often each draw takes each.

    ids: [N] prompt of each position. Statistics that share one `Prompts` share its draws, so that their
    differences are paired.
    """

    def __init__(self, ids, *, draws: int = 1000, seed: int = 0):
        self.codes, self.names = pd.factorize(pd.Series(ids), sort=True)
        self.count, self.draws, self.seed = len(self.names), draws, seed

    @cached_property
    def weights(self) -> np.ndarray:
        """[draws, prompts] times that a draw takes a prompt."""
        if not self.count:
            return np.zeros((self.draws, 0))
        shares = np.full(self.count, 1 / self.count)
        return np.random.default_rng(self.seed).multinomial(self.count, shares, size=self.draws).astype(np.float64)

    def sums(self, *columns: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """Sums [prompts, columns] over each prompt's positions.

        columns: [N] each, or one value for each position that `at`, a mask or row numbers, picks. Fastest where a
        prompt's positions stand together.
        """
        codes = self.codes if at is None else self.codes[at]
        if not len(codes):
            return np.zeros((self.count, len(columns)))
        starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
        runs = (np.add.reduceat(np.asarray(column, dtype=np.float64), starts) for column in columns)
        return np.stack([np.bincount(codes[starts], weights=run, minlength=self.count) for run in runs], axis=1)

    def without_draws(self) -> Prompts:
        """The same prompts for statistics whose interval is not wanted."""
        return Prompts(self.codes, draws=0)

    def present(self, mask: np.ndarray) -> int:
        """Number of prompts with a position under the mask [N]."""
        return int(np.count_nonzero(np.bincount(self.codes[mask], minlength=self.count)))


@dataclass(frozen=True)
class Estimate:
    """A statistic with what its interval needs and what it rests on."""

    value: float
    draws: np.ndarray
    """[draws] its bootstrap replicates."""
    positions: int
    prompts: int
    correlation: bool = False
    """True where the interval is taken on Fisher's scale."""
    left_out: np.ndarray | None = None
    """[prompts] its value without each prompt; None where the jackknife does not apply."""

    def __sub__(self, other: Estimate) -> Estimate:
        """Paired difference; both must come from the same `Prompts`."""
        either = self.left_out is None or other.left_out is None
        return Estimate(
            self.value - other.value, self.draws - other.draws,
            min(self.positions, other.positions), min(self.prompts, other.prompts),
            left_out=None if either else self.left_out - other.left_out,
        )

    def times(self, factor: float) -> Estimate:
        """The estimate in another unit."""
        left_out = None if self.left_out is None else self.left_out * factor
        return Estimate(self.value * factor, self.draws * factor, self.positions, self.prompts, left_out=left_out)

    @cached_property
    def standard_error(self) -> float:
        """On the interval's scale; NaN with one prompt, or where too few draws or left-out values are defined."""
        draws = self._scale(self.draws)
        draws = draws[np.isfinite(draws)]
        if self.prompts < 2 or len(draws) < max(2, ENOUGH_DRAWS * len(self.draws)):
            return np.nan
        inflation = self.prompts / (self.prompts - 1)
        bootstrap = np.std(draws, ddof=1) * np.sqrt(inflation)
        if self.left_out is None:
            return float(bootstrap)
        jackknife = np.sqrt(np.sum((self._scale(self.left_out) - self._scale(self.value)) ** 2) / inflation)
        return float(np.maximum(bootstrap, jackknife))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Low and high end of the t interval with prompts - 1 degrees of freedom."""
        reach = float(special.stdtrit(max(self.prompts - 1, 1), (1 + level) / 2)) * self.standard_error
        middle = self._scale(self.value)
        low, high = middle - reach, middle + reach
        return (float(np.tanh(low)), float(np.tanh(high))) if self.correlation else (float(low), float(high))

    @property
    def p_value(self) -> float:
        """Two-sided, against 0; at most 1 - level exactly where the interval at that level excludes 0."""
        if not self.standard_error > 0:
            return np.nan
        return float(2 * special.stdtr(self.prompts - 1, -abs(self._scale(self.value)) / self.standard_error))

    def _scale(self, value):
        return np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)) if self.correlation else value


def undefined(prompts: Prompts, mask: np.ndarray | None = None) -> Estimate:
    """What a statistic is where too little is finite."""
    mask = np.zeros(len(prompts.codes), dtype=bool) if mask is None else mask
    left_out = np.full(prompts.count, np.nan)
    return Estimate(np.nan, np.full(prompts.draws, np.nan), int(mask.sum()), prompts.present(mask), left_out=left_out)


def of_sums(function: Callable, sums: np.ndarray, prompts: Prompts, mask: np.ndarray, **options) -> list[Estimate]:
    """Estimates of a vector-valued function of summed per-prompt sums.

    function: sums [..., S] -> values [..., P]; sums: [prompts, S]; mask: [N] positions that they cover.
    """
    total = sums.sum(0)
    value, draws, left_out = function(total), function(prompts.weights @ sums), function(total - sums)
    counts = int(mask.sum()), prompts.present(mask)
    return [
        Estimate(float(value[i]), draws[:, i], *counts, left_out=left_out[:, i], **options) for i in range(value.shape[-1])
    ]


# --- correlations -----------------------------------------------------------------------------------


class Variable:
    """Values [N], with their ranks under a mask worked out once however many partners they meet."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.float64)
        self.finite = np.isfinite(self.values)
        self._ranked: dict[bytes, Ranked] = {}

    def ranked(self, mask: np.ndarray, prompts: Prompts | None = None) -> Ranked:
        """Ranks of the values under the mask, among all of them or, with prompts, within each prompt."""
        key = np.packbits(mask).tobytes() + (b"within" if prompts else b"")
        if key not in self._ranked:
            whole = self.ranked(mask).order if prompts else None
            self._ranked[key] = Ranked(self.values[mask], within=prompts and prompts.codes[mask], order=whole)
        return self._ranked[key]


class Ranked:
    """For each of n finite values, how many are smaller and how many equal (itself included).

    within: where given, [n] groups, and only values of one's own group are counted; `order` may then
    give the order of the values over all groups.
    """

    def __init__(self, values: np.ndarray, *, within: np.ndarray | None = None, order: np.ndarray | None = None):
        self.order = np.argsort(values) if order is None else order
        if within is not None:
            small = np.uint16 if within.max(initial=0) < 2**16 else np.int64
            self.order = self.order[np.argsort(within[self.order].astype(small), kind="stable")]
        self.below, self.ties = np.empty((2, len(values)), dtype=np.int64)
        ordered = values[self.order] if within is None else np.stack([within[self.order], values[self.order]])
        start, self.ties[self.order] = _runs(ordered)
        self.below[self.order] = start if within is None else start - _runs(within[self.order])[0]
        self.untied = bool((self.ties == 1).all())

    def shifted(self, start: np.ndarray) -> Ranked:
        """Ranks within groups as ranks over all, groups laid end to end; start: [n] where each one's group begins."""
        whole = copy(self)
        whole.below = self.below + start
        return whole

    @property
    def average(self) -> np.ndarray:
        """Ranks from 1, averaged over ties."""
        return self.below + (self.ties + 1) / 2


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of the run of equal columns that each element of a sorted array lies in."""
    ordered = np.atleast_2d(ordered)
    new = np.flatnonzero(np.r_[True, (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)][: ordered.shape[1]])
    lengths = np.diff(np.r_[new, ordered.shape[1]])
    return np.repeat(new, lengths), np.repeat(lengths, lengths)


def _pair(x, y) -> tuple[Variable, Variable, np.ndarray]:
    x, y = (v if isinstance(v, Variable) else Variable(v) for v in (x, y))
    return x, y, x.finite & y.finite


def pearson(x, y, prompts: Prompts) -> Estimate:
    """Pearson's correlation of x [N] and y [N], arrays or Variables, where both are finite; NaN for a constant."""
    x, y, mask = _pair(x, y)
    return _pearson(x.values[mask], y.values[mask], mask, prompts)


def spearman(x, y, prompts: Prompts) -> Estimate:
    """Spearman's correlation.

    Positions are ranked once and their ranks resampled, which is not the same as ranking each draw anew:
    see `benchmarks/CALIBRATION.md` for how little the standard errors differ.
    """
    x, y, mask = _pair(x, y)
    return _pearson(x.ranked(mask).average, y.ranked(mask).average, mask, prompts)


def _pearson(x: np.ndarray, y: np.ndarray, mask: np.ndarray, prompts: Prompts) -> Estimate:
    if len(x) < 3:
        return undefined(prompts, mask)
    x, y = standardise(x), standardise(y)
    sums = prompts.sums(np.ones_like(x), x, y, x * x, y * y, x * y, at=mask)
    return of_sums(_pearson_from_sums, sums, prompts, mask, correlation=True)[0]


def _pearson_from_sums(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2))
        return np.where(spread > 1e-12, np.clip((xy / n - x * y / n**2) / spread, -1, 1), np.nan)[..., None]


def standardise(values: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 (divisor n); zeros for a constant."""
    centred = values - values.mean()
    spread = np.sqrt(np.mean(centred**2))
    constant = spread <= 1e-14 * np.abs(values).max()
    return np.zeros_like(centred) if constant else centred / spread


def kendall(x, y, prompts: Prompts) -> Estimate:
    """Kendall's tau-b, exact; its draws and left-out values resample its projection on prompts.

    The projection is the first-order term of the U-statistic: 2/n^2 times the sum over a prompt's
    positions of their signs against all others, less the same for the tie counts in the denominator.
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
    return Estimate(float(tau), draws, int(n), prompts.present(mask), correlation=True, left_out=left_out)


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
    """Order by (first, second, index), and for each element: how many share `first` and lie below in
    `second`, how many share both, and how many of those come earlier."""
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
    """For a permutation: how many earlier elements are lower. Whole blocks by a table, the rest pairwise."""
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


def within_prompts(x, y, prompts: Prompts, *, method: str = "spearman", least: int = 5) -> Estimate:
    """Mean over prompts of the correlation within each, Spearman's, Pearson's or Kendall's; prompts count alike.

    A prompt takes part with at least `least` positions where both are finite and neither is constant.
    """
    x, y, mask = _pair(x, y)
    if not mask.any():
        return undefined(prompts, mask)
    n, xx, yy, xy = (_concordance_within if method == "kendall" else _moments_within)(x, y, mask, prompts, method)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where((n >= least) & (xx > 0) & (yy > 0), xy / np.sqrt(xx * yy), np.nan)
    used = np.isfinite(each)
    sums = np.stack([used, np.where(used, each, 0.0)], axis=1).astype(np.float64)
    return of_sums(ratio_of_sums, sums, prompts, mask & used[prompts.codes])[0]


def _moments_within(x: Variable, y: Variable, mask: np.ndarray, prompts: Prompts, method: str) -> tuple[np.ndarray, ...]:
    """[prompts] each: positions, and centred sums of squares and products of values or of ranks within the prompt."""
    codes = prompts.codes[mask]
    x, y = (v.ranked(mask, prompts).average if method == "spearman" else v.values[mask] for v in (x, y))
    n, sx, sy, *sizes = prompts.sums(np.ones_like(x), x, y, x * x, y * y, at=mask).T
    x, y = (v - (s / np.maximum(n, 1))[codes] for v, s in ((x, sx), (y, sy)))
    xx, yy, xy = prompts.sums(x * x, y * y, x * y, at=mask).T
    xx, yy = (np.where(v > ROUNDING * size, v, 0) for v, size in zip((xx, yy), sizes, strict=True))
    return n, xx, yy, xy


def _concordance_within(x: Variable, y: Variable, mask: np.ndarray, prompts: Prompts, _: str) -> tuple[np.ndarray, ...]:
    """[prompts] each: positions, untied pairs in x, in y, and concordant less discordant pairs, of the prompt's own.

    With the prompts' values laid end to end, two positions of different prompts always agree: they are taken off.
    """
    codes = prompts.codes[mask]
    size = np.bincount(codes, minlength=prompts.count)
    start = (np.cumsum(size) - size)[codes]
    both, x_untied, y_untied = concordance(*(v.ranked(mask, prompts).shifted(start) for v in (x, y)))
    others = len(codes) - size[codes]
    return tuple(prompts.sums(np.ones(len(codes)), x_untied - others, y_untied - others, both - others, at=mask).T)


class Controls:
    """Columns [N] to hold fixed, with the space that they span under a mask worked out once."""

    def __init__(self, columns: Sequence):
        self.columns = [v if isinstance(v, Variable) else Variable(v) for v in columns]
        self.finite = np.logical_and.reduce([v.finite for v in self.columns]) if self.columns else True
        self._bases: dict[tuple[bytes, bool], np.ndarray] = {}

    def residual(self, values: np.ndarray, mask: np.ndarray, *, ranked: bool) -> np.ndarray:
        """What a least-squares fit of values [mask.sum()] on an intercept and the columns leaves; zeros for nothing."""
        key = np.packbits(mask).tobytes(), ranked
        if key not in self._bases:
            columns = [v.ranked(mask).average if ranked else v.values[mask] for v in self.columns]
            design = np.stack([np.ones(int(mask.sum())), *map(standardise, columns)], axis=1)
            left, size, _ = np.linalg.svd(design, full_matrices=False)
            self._bases[key] = left[:, size > 1e-8 * size[0]]
        basis, centred = self._bases[key], standardise(values)
        rest = centred - basis @ (basis.T @ centred)
        return rest if np.mean(rest**2) > SINGULAR else np.zeros_like(rest)


def partial(x, y, controls: Controls, prompts: Prompts, *, ranked: bool = True) -> Estimate:
    """Correlation of x [N] and y [N] given the controls; of ranks (ranked once) or of values.

    The correlation of the two residuals. Residuals are taken once: they are orthogonal to the controls, so
    a draw's own fit would change its value in the second order only. NaN where x or y is a linear
    combination of the controls.
    """
    x, y, mask = _pair(x, y)
    mask = mask & controls.finite
    if mask.sum() < len(controls.columns) + 3:
        return undefined(prompts, mask)
    columns = (v.ranked(mask).average if ranked else v.values[mask] for v in (x, y))
    return _pearson(*(controls.residual(column, mask, ranked=ranked) for column in columns), mask, prompts)


def cross_products(columns: Sequence[np.ndarray], prompts: Prompts, mask: np.ndarray) -> np.ndarray:
    """Sums [prompts, q * q] of the products of all pairs of [1, *columns], each column [mask.sum()]."""
    columns = [np.ones(int(mask.sum())), *columns]
    q = len(columns)
    upper = [(i, j) for i in range(q) for j in range(i, q)]
    sums = prompts.sums(*(columns[i] * columns[j] for i, j in upper), at=mask)
    full = np.empty((prompts.count, q, q))
    for (i, j), column in zip(upper, sums.T):
        full[:, i, j] = full[:, j, i] = column
    return full.reshape(prompts.count, q * q)


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverses of positive definite matrices [..., p, p]; NaN where the columns are linearly dependent."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(np.diagonal(matrix, axis1=-2, axis2=-1))
        scaled = matrix / (scale[..., :, None] * scale[..., None, :])
    scaled = np.where(np.isfinite(scaled), scaled, 0.0)
    regular = np.linalg.det(scaled) > SINGULAR
    safe = np.where(regular[..., None, None], scaled, np.eye(matrix.shape[-1]))
    scale = np.where(regular[..., None], scale, np.nan)
    return np.linalg.inv(safe) / (scale[..., :, None] * scale[..., None, :])


# --- means ------------------------------------------------------------------------------------------


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., :1] > 0, sums[..., 1:2] / sums[..., :1], np.nan)


def mean(values: np.ndarray, prompts: Prompts, mask: np.ndarray | None = None) -> Estimate:
    """Mean over the finite values [N] under the mask."""
    mask = np.isfinite(values) if mask is None else mask & np.isfinite(values)
    if not mask.any():
        return undefined(prompts, mask)
    return of_sums(ratio_of_sums, prompts.sums(np.ones(mask.sum()), values[mask], at=mask), prompts, mask)[0]


def mean_difference(values: np.ndarray, prompts: Prompts, top: np.ndarray, bottom: np.ndarray) -> Estimate:
    """Mean over the positions of `top` minus mean over those of `bottom`, disjoint masks [N]."""
    used = (top | bottom) & np.isfinite(values)
    if not (used & top).any() or not (used & bottom).any():
        return undefined(prompts, used)
    y, upper, lower = values[used], top[used].astype(np.float64), bottom[used].astype(np.float64)
    sums = prompts.sums(upper, upper * y, lower, lower * y, at=used)
    return of_sums(lambda s: ratio_of_sums(s[..., :2]) - ratio_of_sums(s[..., 2:]), sums, prompts, used)[0]


def groups_by_rank(score: np.ndarray, groups: int, mask: np.ndarray) -> np.ndarray:
    """Groups 1..groups of equal size by rank of the finite scores under the mask; 0 elsewhere.

    Equal scores stay together, in the group that holds the middle of their ranks, so heavy ties leave
    groups unequal or empty.
    """
    mask = mask & np.isfinite(score)
    result = np.zeros(len(score), dtype=int)
    if mask.any():
        share = (Ranked(score[mask]).average - 0.5) / mask.sum()
        result[mask] = 1 + np.floor(share * groups).astype(int)
    return result


def winsorise(values: np.ndarray, share: float) -> np.ndarray:
    """Values [N] clipped at their quantiles `share` and 1 - share; NaN stays NaN."""
    finite = np.isfinite(values)
    if not finite.any() or share == 0:
        return np.where(finite, values, np.nan)
    return np.where(finite, np.clip(values, *np.quantile(values[finite], [share, 1 - share])), np.nan)


def locations(values: np.ndarray, prompts: Prompts, mask: np.ndarray, *, share: float = 0.05) -> dict[str, Estimate]:
    """Median, trimmed mean and winsorised mean of the finite values [N] under the mask.

    Of n positions the floor(share * n) at each end are dropped (trimmed) or set to the next one kept
    (winsorised). Order statistics are exact in every draw; the trimmed mean moves with its winsorised values
    over 1 - 2 share, its influence function. The jackknife, wrong for order statistics, is used for none.
    """
    mask = mask & np.isfinite(values)
    if not mask.any():
        return dict.fromkeys(("median", "trimmed_mean", "winsorised_mean"), undefined(prompts, mask))
    order = np.argsort(values[mask])
    ordered, codes = values[mask][order], prompts.codes[mask][order]
    cut, counts = int(share * len(ordered)), (len(ordered), prompts.present(mask))
    middle = [_order_statistic(ordered, codes, prompts, 0.5, lambda total, s=s: (total + s) // 2) for s in (-1, 0)]
    low = _order_statistic(ordered, codes, prompts, share, lambda total: np.floor(share * total))
    high = _order_statistic(ordered, codes, prompts, 1 - share, lambda total: total - np.floor(share * total) - 1)
    clipped = mean(np.clip(values, ordered[cut], ordered[-cut - 1]), prompts, mask)
    trimmed = float(ordered[cut : len(ordered) - cut].mean())
    moved = trimmed + (clipped.draws - clipped.value) / (1 - 2 * share)
    ends = (low - ordered[cut]) + (high - ordered[-cut - 1])
    winsorised = clipped.value + (1 - 2 * share) * (moved - trimmed) + share * ends
    return {
        "median": Estimate(float(np.median(ordered)), (middle[0] + middle[1]) / 2, *counts),
        "trimmed_mean": Estimate(trimmed, moved, *counts),
        "winsorised_mean": Estimate(clipped.value, winsorised, *counts),
    }


def _order_statistic(ordered: np.ndarray, codes: np.ndarray, prompts: Prompts, near: float, rank: Callable) -> np.ndarray:
    """[draws] the value of rank(total weight), from 0, among sorted values [n]; NaN for a draw without weight.

    It is looked for within a twentieth of the ranks on either side of the share `near`, and everywhere if that fails.
    """
    n = len(ordered)
    for start, stop in ((int(max(near - 0.05, 0) * n), int(np.ceil(min(near + 0.05, 1) * n))), (0, n)):
        before, total = (prompts.weights @ np.bincount(part, minlength=prompts.count) for part in (codes[:start], codes))
        wanted, within = rank(total), prompts.weights @ np.bincount(codes[start:stop], minlength=prompts.count)
        if ((before <= wanted) & (wanted < before + within) | (total == 0)).all():
            break
    found, rows = np.full(len(total), np.nan), max(1, CHUNK // (stop - start))
    for first in range(0, len(total), rows):
        block = np.arange(first, min(first + rows, len(total)))
        block = block[total[block] > 0]
        upto = np.cumsum(prompts.weights[block][:, codes[start:stop]], axis=1)
        at = [counts.searchsorted(rest, side="right") for counts, rest in zip(upto, (wanted - before)[block])]
        found[block] = ordered[start + np.array(at, dtype=int)]
    return found


def design_effect(values: np.ndarray, prompts: Prompts) -> float:
    """Variance of the mean with clusters over its variance without; NaN where either is undefined."""
    estimate, finite = mean(values, prompts), values[np.isfinite(values)]
    if len(finite) < 2 or not np.var(finite) > 0:
        return np.nan
    return float(estimate.standard_error**2 / (np.var(finite, ddof=1) / len(finite)))


def effective_clusters(sizes: np.ndarray) -> float:
    """(sum n)^2 / sum n^2: how many clusters of equal size would weigh the same."""
    sizes = np.asarray(sizes, dtype=np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else 0.0


# --- matching ---------------------------------------------------------------------------------------


def match(
    features: np.ndarray, treated: np.ndarray, control: np.ndarray, codes: np.ndarray, *, replacement: bool, caliper: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Pair treated with control positions of the same prompt, nearest in Euclidean distance.

    features: [N, F], all finite where a position is treated or control (masks [N]); codes: [N] prompts.
    With replacement each treated position takes its nearest control; without, the pairs of each prompt
    minimise the summed distance and the larger side keeps some unpaired. Pairs further apart than the caliper
    are dropped. Returns row numbers of both.
    """
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    rows = np.flatnonzero(treated | control)
    rows = rows[np.argsort(codes[rows], kind="stable")]
    for group in np.split(rows, np.flatnonzero(np.diff(codes[rows])) + 1):
        t, c = group[treated[group]], group[control[group]]
        if len(t) and len(c):
            distance = spatial.distance.cdist(features[t], features[c])
            cost = np.where(distance > caliper, TOO_FAR, distance)
            i, j = (np.arange(len(t)), distance.argmin(1)) if replacement else optimize.linear_sum_assignment(cost)
            near = distance[i, j] <= caliper
            pairs.append((t[i[near]], c[j[near]]))
    if not pairs:
        return np.empty(0, dtype=int), np.empty(0, dtype=int)
    return tuple(np.concatenate(side) for side in zip(*pairs))


def matched_difference(values: np.ndarray, prompts: Prompts, pairs: tuple[np.ndarray, np.ndarray]) -> Estimate:
    """Mean over pairs of values at the treated minus values at the control position; `positions` counts pairs."""
    treated, control = pairs
    difference = values[treated] - values[control]
    kept = np.isfinite(difference)
    rows = treated[kept]
    if not kept.any():
        return undefined(prompts)
    mask = np.zeros(len(values), dtype=bool)
    mask[rows] = True
    estimate = of_sums(ratio_of_sums, prompts.sums(np.ones(len(rows)), difference[kept], at=rows), prompts, mask)[0]
    return replace(estimate, positions=len(rows))


def standardised_difference(first: np.ndarray, second: np.ndarray, scale: float) -> float:
    """Difference of means over a given standard deviation; NaN where a side is empty or the scale 0."""
    if not len(first) or not len(second) or not scale > 0:
        return np.nan
    return float((first.mean() - second.mean()) / scale)


# --- regression -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regression:
    """Least squares on standardised columns, with an intercept that is 0 and left out."""

    coefficients: dict[str, Estimate]
    """Standardised, by term; intervals from the cluster jackknife and bootstrap as everywhere."""
    robust_error: dict[str, float]
    """The usual cluster-robust standard error (statsmodels, CR1), by term."""
    inflation: dict[str, float]
    """Variance inflation factor by term."""
    r_squared: Estimate
    fitted: np.ndarray
    """[N] fitted values of the standardised outcome, NaN outside the mask."""
    spread: dict[str, float]
    """Standard deviation by which each term, and the outcome under `outcome`, was divided."""


def regress(outcome: np.ndarray, terms: dict[str, np.ndarray], prompts: Prompts, *, robust: bool = True) -> Regression | None:
    """Regress an outcome [N] on terms, each [N], over the positions where all are finite.

    All columns are standardised over those positions, once. `robust=False` leaves the CR1 errors out.
    None where there are too few positions or a term is constant or a combination of others.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (*terms.values(), outcome)]
    mask = np.all(np.isfinite(columns), axis=0)
    if mask.sum() < len(columns) + 2:
        return None
    spread = dict(zip([*terms, "outcome"], (float(column[mask].std()) for column in columns)))
    scaled = [standardise(column[mask]) for column in columns]
    sums, q = cross_products(scaled, prompts, mask), len(columns) + 1
    values = of_sums(lambda s: _coefficients_and_fit(s, q), sums, prompts, mask)
    if not np.isfinite(values[0].value):
        return None
    design = np.stack(scaled[:-1], axis=1)
    fitted = np.full(len(outcome), np.nan)
    fitted[mask] = design @ [estimate.value for estimate in values[:-1]]
    inflation = np.diag(inverse(np.atleast_2d(design.T @ design / len(design))))
    errors = _cluster_robust_errors(scaled[-1], design, prompts.codes[mask]) if robust else [np.nan] * len(terms)
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


def _cluster_robust_errors(outcome: np.ndarray, design: np.ndarray, codes: np.ndarray) -> np.ndarray:
    from statsmodels.regression.linear_model import OLS

    if len(np.unique(codes)) < 2:
        return np.full(design.shape[1], np.nan)
    model = OLS(outcome, np.column_stack([np.ones(len(design)), design]))
    return model.fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True).bse[1:]


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values, which bound the chance of any false rejection; NaN stays NaN and is not counted."""
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)
    order = order[np.isfinite(p_values[order])]
    steps = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted
