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
from scipy import sparse, stats

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

    @cached_property
    def _membership(self) -> sparse.csr_array:
        ones = np.ones(len(self.codes))
        return sparse.csr_array((ones, (self.codes, np.arange(len(self.codes)))), shape=(self.count, len(self.codes)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums [prompts, ...] over each prompt's positions of values [N, ...]."""
        return self._membership @ np.asarray(values, dtype=np.float64)

    def present(self, mask: np.ndarray) -> int:
        """Number of prompts with a position under the mask [N]."""
        return len(np.unique(self.codes[mask]))


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


def _products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[N, 6] whose sums give Pearson's correlation; centred and scaled first for accuracy."""
    x, y = (_standard(v) for v in (x, y))
    return np.column_stack([np.ones_like(x), x, y, x * x, y * y, x * y])


def _standard(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean()
    spread = np.sqrt(np.mean(centred**2))
    return centred / spread if spread > 1e-14 * max(np.abs(values).max(), 1e-300) else np.zeros_like(centred)


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((xx / n - (x / n) ** 2) * (yy / n - (y / n) ** 2))
        return np.where(spread > 1e-12, np.clip((xy / n - x * y / n**2) / spread, -1, 1), np.nan)


def pearson(x: np.ndarray, y: np.ndarray, prompts: Prompts) -> Estimate:
    """Pearson's correlation of x [N] and y [N] over the positions where both are finite; NaN for a constant."""
    mask = np.isfinite(x) & np.isfinite(y)
    if mask.sum() < 3:
        return undefined(mask, prompts)
    products = np.zeros((len(x), 6))
    products[mask] = _products(x[mask], y[mask])
    sums = prompts.sums(products)
    return Estimate(
        float(_pearson(sums.sum(0))), _pearson(prompts.weights @ sums), int(mask.sum()), prompts.present(mask), True
    )


def undefined(mask: np.ndarray, prompts: Prompts) -> Estimate:
    """What a statistic is where too little is finite."""
    return Estimate(np.nan, np.full(prompts.draws, np.nan), int(mask.sum()), prompts.present(mask))


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of the run of equal values that each element of a sorted array lies in."""
    n = len(ordered)
    new = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[new, n])
    return np.repeat(new, lengths), np.repeat(lengths, lengths)


def below_and_ties(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each finite value, how many are smaller and how many are equal (itself included)."""
    order = np.argsort(values)
    below, ties = np.empty((2, len(values)), dtype=np.int64)
    below[order], ties[order] = _runs(values[order])
    return below, ties


def ranks(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Average ranks [N], from 1, of the values under the mask; NaN elsewhere."""
    result = np.full(len(values), np.nan)
    below, ties = below_and_ties(values[mask])
    result[mask] = below + (ties + 1) / 2
    return result


def spearman(x: np.ndarray, y: np.ndarray, prompts: Prompts) -> Estimate:
    """Spearman's correlation; positions are ranked once and the ranks resampled."""
    mask = np.isfinite(x) & np.isfinite(y)
    return pearson(ranks(x, mask), ranks(y, mask), prompts)


def kendall(x: np.ndarray, y: np.ndarray, prompts: Prompts) -> Estimate:
    """Kendall's tau-b; draws resample its projection on prompts (the U-statistic's first-order term)."""
    mask = np.isfinite(x) & np.isfinite(y)
    if mask.sum() < 3:
        return undefined(mask, prompts)
    signs = np.zeros((len(x), 3))
    signs[mask] = concordance(x[mask], y[mask])
    sums = prompts.sums(signs)
    both, x_untied, y_untied = sums.sum(0)
    if min(x_untied, y_untied) == 0:
        return undefined(mask, prompts)
    scale = np.sqrt(x_untied * y_untied)
    tau = both / scale
    influence = 2 * sums[:, 0] / scale - tau * (sums[:, 1] / x_untied + sums[:, 2] / y_untied)
    draws = np.clip(tau + prompts.weights @ influence, -1, 1)
    return Estimate(float(tau), draws, int(mask.sum()), prompts.present(mask), True)


def concordance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[N, 3]: for each i the sums over j of sgn(xi - xj) sgn(yi - yj), of [xi != xj] and of [yi != yj].

    With P = [xj < xi], E = [xj = xi], and Q, F the same for y, the product of signs is
    (2P + E - 1)(2Q + F - 1). EQ and PF fall out of two lexicographic sorts, and PQ out of counting,
    along the one, the earlier elements that are lower in the other.
    """
    n = len(x)
    (p, e), (q, f) = below_and_ties(x), below_and_ties(y)
    by_x, eq, ef, repeat = _lexicographic(p, q)
    by_y, pf, _, _ = _lexicographic(q, p)
    level = np.empty(n, dtype=np.int32)
    level[by_y] = np.arange(n, dtype=np.int32)
    pq = np.empty(n, dtype=np.int64)
    pq[by_x] = _earlier_and_lower(level[by_x])
    pq -= eq + pf + repeat
    both = 4 * pq + 2 * eq + 2 * pf + ef - 2 * p - e - 2 * q - f + n
    return np.column_stack([both, n - e, n - f]).astype(np.float64)


def _lexicographic(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, ...]:
    """Stable order by (first, second), and for each element: how many share `first` and lie below in
    `second`, how many share both, and how many of those come earlier. `first` counts what lies below."""
    key = first * np.int64(len(first)) + second
    order = np.argsort(key, kind="stable")
    start, length = _runs(key[order])
    below, same, repeat = np.empty((3, len(first)), dtype=np.int64)
    below[order], same[order], repeat[order] = start, length, np.arange(len(first)) - start
    return order, below - first, same, repeat


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
    sums = prompts.sums(np.column_stack([mask, np.where(mask, values, 0.0)]))
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
        share = (ranks(score, mask)[mask] - 0.5) / mask.sum()
        result[mask] = 1 + np.floor(share * groups).astype(int)
    return result
