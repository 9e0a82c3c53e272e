"""Statistics for positions that come in clusters, one cluster a prompt.

    w ~ Multinomial(G; 1/G, ..., 1/G)           a draw: how often each of G prompts is taken
    T*(w) = f(sum_g w_g s_g)                    its statistic, from per-prompt sums s_g
    interval = h^-1(h(T) +- t(G - 1) * sd(h(T*)) * sqrt(G / (G - 1)))

h is Fisher's arctanh for a correlation and the identity otherwise. Prompts are resampled whole; positions
within a prompt never are, because they are not independent. A statistic that is a function of sums costs one
product [draws, G] @ [G, sums] for all draws together.

Exact and approximate: means, Pearson, partial correlations, regressions, medians and trimmed means are
recomputed exactly in each draw. Spearman ranks the positions once and resamples the ranks; Kendall resamples its
projection on prompts. `benchmarks/CALIBRATION.md` has the measured differences and the coverage.

References: Efron and Tibshirani 1993, ch. 6 and 12; Cameron and Miller 2015 (clusters); Hoeffding 1948
(the projection). Departure: the usual percentile interval is too short for some tens of prompts, hence t(G - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

BLOCK = 128
"""Side of the blocks in `_earlier_and_lower`; 128 was fastest of 32 to 128 at 57,600 positions."""
ENOUGH_DRAWS = 0.9
"""Share of draws in which a statistic must be defined for its interval to be."""


class Prompts:
    """The prompts of a set of positions, and how often each draw takes each.

    ids: [N] cluster of each position. Two statistics of one `Prompts` share their draws, so that their
    difference is a paired one.
    """

    def __init__(self, ids, *, draws: int = 1000, seed: int = 0):
        names, self.codes = np.unique(np.asarray(ids), return_inverse=True)
        self.names, self.count, self.draws, self.seed = names, len(names), draws, seed

    @cached_property
    def weights(self) -> np.ndarray:
        """[draws, prompts] times that a draw takes a prompt."""
        if not self.count:
            return np.zeros((self.draws, 0))
        shares = np.full(self.count, 1 / self.count)
        return np.random.default_rng(self.seed).multinomial(self.count, shares, size=self.draws).astype(np.float64)

    def sums(self, *columns: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Sums [prompts, columns] over each prompt's positions; each column holds [N], or [mask.sum()] with a mask."""
        codes = self.codes if mask is None else self.codes[mask]
        totals = [np.bincount(codes, weights=column, minlength=self.count) for column in columns]
        return np.stack(totals, axis=1).astype(np.float64)

    def present(self, mask: np.ndarray) -> int:
        """Number of prompts with a position under the mask [N]."""
        return int(np.count_nonzero(np.bincount(self.codes[mask], minlength=self.count)))


@dataclass(frozen=True)
class Estimate:
    """A statistic, its bootstrap draws, and what it rests on."""

    value: float
    draws: np.ndarray
    positions: int
    prompts: int
    correlation: bool = False
    """True where the interval is taken on Fisher's scale."""

    def __sub__(self, other: Estimate) -> Estimate:
        """Paired difference; both must come from the same `Prompts`."""
        return Estimate(
            self.value - other.value, self.draws - other.draws,
            min(self.positions, other.positions), min(self.prompts, other.prompts),
        )

    @property
    def standard_error(self) -> float:
        """On the interval's scale; NaN with fewer than two prompts or too few defined draws."""
        draws = self._scale(self.draws)
        draws = draws[np.isfinite(draws)]
        if self.prompts < 2 or len(draws) < max(2, ENOUGH_DRAWS * len(self.draws)):
            return np.nan
        return float(np.std(draws, ddof=1) * np.sqrt(self.prompts / (self.prompts - 1)))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Low and high end of the t interval with prompts - 1 degrees of freedom."""
        reach = stats.t.ppf((1 + level) / 2, max(self.prompts - 1, 1)) * self.standard_error
        middle = self._scale(self.value)
        ends = middle - reach, middle + reach
        return tuple(float(np.tanh(end)) if self.correlation else float(end) for end in ends)

    def p_value(self) -> float:
        """Two-sided, against 0; below 1 - level exactly where the interval at that level excludes 0."""
        error = self.standard_error
        if not error > 0:
            return np.nan
        return float(2 * stats.t.sf(abs(self._scale(self.value)) / error, self.prompts - 1))

    def _scale(self, value):
        return np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)) if self.correlation else value


# --- correlations -----------------------------------------------------------------------------------


class Variable:
    """Values [N], with their ranks under a mask worked out once however many partners they meet."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.float64)
        self.finite = np.isfinite(self.values)
        self._ranked: dict[bytes, Ranked] = {}

    def ranked(self, mask: np.ndarray) -> Ranked:
        """Ranks of the values under the mask."""
        key = np.packbits(mask).tobytes()
        if key not in self._ranked:
            self._ranked[key] = Ranked(self.values[mask])
        return self._ranked[key]


class Ranked:
    """For each of n finite values, how many are smaller and how many equal (itself included)."""

    def __init__(self, values: np.ndarray):
        self.order = np.argsort(values)
        self.below, self.ties = np.empty((2, len(values)), dtype=np.int64)
        self.below[self.order], self.ties[self.order] = _runs(values[self.order])
        self.untied = bool((self.ties == 1).all())

    @property
    def average(self) -> np.ndarray:
        """Ranks from 1, averaged over ties."""
        return self.below + (self.ties + 1) / 2


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of the run of equal values that each element of a sorted array lies in."""
    new = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[new, len(ordered)])
    return np.repeat(new, lengths), np.repeat(lengths, lengths)


def _pair(x, y) -> tuple[Variable, Variable, np.ndarray]:
    x, y = (v if isinstance(v, Variable) else Variable(v) for v in (x, y))
    return x, y, x.finite & y.finite


def undefined(mask: np.ndarray, prompts: Prompts) -> Estimate:
    """What a statistic is where too little is finite."""
    return Estimate(np.nan, np.full(prompts.draws, np.nan), int(mask.sum()), prompts.present(mask))


def pearson(x, y, prompts: Prompts) -> Estimate:
    """Pearson's correlation of x [N] and y [N], arrays or Variables, where both are finite; NaN for a constant."""
    x, y, mask = _pair(x, y)
    return _pearson(x.values[mask], y.values[mask], mask, prompts)


def spearman(x, y, prompts: Prompts) -> Estimate:
    """Spearman's correlation; positions are ranked once and the ranks resampled."""
    x, y, mask = _pair(x, y)
    return _pearson(x.ranked(mask).average, y.ranked(mask).average, mask, prompts)


def _pearson(x: np.ndarray, y: np.ndarray, mask: np.ndarray, prompts: Prompts) -> Estimate:
    if len(x) < 3:
        return undefined(mask, prompts)
    x, y = _standard(x), _standard(y)
    sums = prompts.sums(np.ones_like(x), x, y, x * x, y * y, x * y, mask=mask)
    value, draws = _pearson_from_sums(sums.sum(0)), _pearson_from_sums(prompts.weights @ sums)
    return Estimate(float(value), draws, len(x), int(np.count_nonzero(sums[:, 0])), correlation=True)


def _standard(values: np.ndarray) -> np.ndarray:
    """Centred and scaled, for accuracy; zeros for a constant."""
    centred = values - values.mean()
    spread = np.sqrt(np.mean(centred**2))
    constant = spread <= 1e-14 * np.abs(values).max()
    return np.zeros_like(centred) if constant else centred / spread


def _pearson_from_sums(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2))
        return np.where(spread > 1e-12, np.clip((xy / n - x * y / n**2) / spread, -1, 1), np.nan)


def kendall(x, y, prompts: Prompts) -> Estimate:
    """Kendall's tau-b; draws resample its projection on prompts (the U-statistic's first-order term)."""
    x, y, mask = _pair(x, y)
    if mask.sum() < 3:
        return undefined(mask, prompts)
    sums = prompts.sums(*concordance(x.ranked(mask), y.ranked(mask)), mask=mask)
    both, x_untied, y_untied = sums.sum(0)
    if min(x_untied, y_untied) == 0:
        return undefined(mask, prompts)
    scale = np.sqrt(x_untied * y_untied)
    tau = both / scale
    influence = 2 * sums[:, 0] / scale - tau * (sums[:, 1] / x_untied + sums[:, 2] / y_untied)
    draws = np.clip(tau + prompts.weights @ influence, -1, 1)
    return Estimate(float(tau), draws, int(mask.sum()), prompts.present(mask), correlation=True)


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
    n, blocks = len(level), -(-len(level) // BLOCK)
    levels = np.arange(blocks * BLOCK, dtype=np.int32)
    levels[:n] = level
    places = np.empty_like(levels)
    places[levels] = np.arange(blocks * BLOCK, dtype=np.int32)
    row, column = np.arange(blocks * BLOCK) // BLOCK, levels // BLOCK
    table = np.bincount(row * blocks + column, minlength=blocks**2).reshape(blocks, blocks)
    counts = np.pad(table.cumsum(0).cumsum(1), ((1, 0), (1, 0)))[row, column]
    counts += _earlier_and_lower_in_block(levels)
    counts[places] += _earlier_and_lower_in_block(places // BLOCK)
    return counts[:n]


def _earlier_and_lower_in_block(values: np.ndarray) -> np.ndarray:
    columns = np.ascontiguousarray(values.reshape(-1, BLOCK).T)
    counts = np.zeros(columns.shape, dtype=np.int16)
    for step in range(1, BLOCK):
        counts[step:] += columns[:-step] < columns[step:]
    return counts.T.ravel()


# --- means ------------------------------------------------------------------------------------------


def mean(values: np.ndarray, prompts: Prompts, mask: np.ndarray | None = None) -> Estimate:
    """Mean over the finite values [N] under the mask."""
    mask = np.isfinite(values) if mask is None else mask & np.isfinite(values)
    if not mask.any():
        return undefined(mask, prompts)
    sums = prompts.sums(np.ones(mask.sum()), values[mask], mask=mask)
    count, total = (prompts.weights @ sums).T
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.where(count > 0, total / count, np.nan)
    return Estimate(float(values[mask].mean()), draws, int(mask.sum()), prompts.present(mask))


def mean_difference(values: np.ndarray, prompts: Prompts, top: np.ndarray, bottom: np.ndarray) -> Estimate:
    """Mean over the positions of `top` minus mean over those of `bottom`, both masks [N]."""
    finite = np.isfinite(values)
    difference = mean(values, prompts, top) - mean(values, prompts, bottom)
    used = finite & (top | bottom)
    return Estimate(difference.value, difference.draws, int(used.sum()), prompts.present(used))


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
