"""Statistics for positions that come in clusters, one cluster a prompt.

    w ~ Multinomial(G; 1/G, ..., 1/G)        a draw: how often each of the G prompts is taken
    T*(w) = f(sum_g w_g s_g)                 its statistic, a function of per-prompt sums s_g
    T(-g) = f(sum_{h != g} s_h)              the statistic without prompt g
    SE^2  = max( G/(G-1) var h(T*),  (G-1)/G sum_g (h(T(-g)) - h(T))^2 )
    interval = h^-1( h(T) +- t(G-1) SE )

h is Fisher's arctanh for a correlation and the identity otherwise. Prompts are resampled whole;
positions within a prompt never are, because they are not independent. A statistic of sums costs one
product [draws, G] @ [G, sums] for all draws together.

Exact in every draw: means, differences, Pearson, regressions, medians. Approximate: Spearman ranks
once and resamples ranks, partial correlations take residuals once, Kendall and trimmed means
resample their first-order term, groups and winsorising limits are cut once.
`benchmarks/CALIBRATION.md` has the measured differences.

Departures: with some tens of prompts the percentile interval is too short (it covers 87-93 % for 95
% at 20 prompts) and BCa shorter still (82-93 %), so the interval is a t interval, and the
bootstrap's standard error, biased downwards, is replaced by the jackknife's, biased upwards, where
that is larger (94-97.5 %). References: Efron and Stein 1981; Efron and Tibshirani 1993, ch. 11-14;
Cameron and Miller 2015; MacKinnon, Nielsen and Webb 2023 (t(G-1) with the cluster jackknife);
Hoeffding 1948 (projection)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import special

ENOUGH_DRAWS = 0.9
"""Share of draws in which a statistic must be defined for its interval to be."""
CHUNK = 2_000_000
"""Elements of a [draws, positions] block that are held at a time."""


class PromptClusters:
    """The prompts of N positions, and how often each draw takes each.

    ids: [N] prompt of each position. Statistics that share one `PromptClusters` share its draws, so that
    their differences are paired."""

    def __init__(self, ids, *, draws: int = 1000, seed: int = 0):
        self.codes, self.names = pd.factorize(pd.Series(ids), sort=True)
        self.count, self.draws, self.seed = len(self.names), draws, seed

    @cached_property
    def weights(self) -> np.ndarray:
        """[draws, prompts] times that a draw takes a prompt."""
        if not self.count:
            return np.zeros((self.draws, 0))
        shares = np.full(self.count, 1 / self.count)
        return (
            np.random.default_rng(self.seed)
            .multinomial(self.count, shares, size=self.draws)
            .astype(np.float64)
        )

    def sums(self, *columns: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """Sums [prompts, columns] over each prompt's positions.

        columns: [N] each, or one value for each position that `at`, a mask or row numbers, picks.
        Fastest where a prompt's positions stand together."""
        codes = self.codes if at is None else self.codes[at]
        if not len(codes):
            return np.zeros((self.count, len(columns)))
        starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
        runs = (np.add.reduceat(np.asarray(column, dtype=np.float64), starts) for column in columns)
        return np.stack(
            [np.bincount(codes[starts], weights=run, minlength=self.count) for run in runs], axis=1
        )

    def without_draws(self) -> PromptClusters:
        """The same prompts for statistics whose interval is not wanted."""
        return PromptClusters(self.codes, draws=0)

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
        """Paired difference; both must come from the same `PromptClusters`."""
        either = self.left_out is None or other.left_out is None
        return Estimate(
            self.value - other.value,
            self.draws - other.draws,
            min(self.positions, other.positions),
            min(self.prompts, other.prompts),
            left_out=None if either else self.left_out - other.left_out,
        )

    def times(self, factor: float) -> Estimate:
        """The estimate in another unit."""
        left_out = None if self.left_out is None else self.left_out * factor
        return Estimate(
            self.value * factor,
            self.draws * factor,
            self.positions,
            self.prompts,
            left_out=left_out,
        )

    @cached_property
    def standard_error(self) -> float:
        """On the interval's scale; NaN with one prompt, or where too few draws or left-out values
        are defined.
        """
        draws = self._scale(self.draws)
        draws = draws[np.isfinite(draws)]
        if self.prompts < 2 or len(draws) < max(2, ENOUGH_DRAWS * len(self.draws)):
            return np.nan
        inflation = self.prompts / (self.prompts - 1)
        bootstrap = np.std(draws, ddof=1) * np.sqrt(inflation)
        if self.left_out is None:
            return float(bootstrap)
        jackknife = np.sqrt(
            np.sum((self._scale(self.left_out) - self._scale(self.value)) ** 2) / inflation
        )
        return float(np.maximum(bootstrap, jackknife))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Low and high end of the t interval with prompts - 1 degrees of freedom."""
        reach = (
            float(special.stdtrit(max(self.prompts - 1, 1), (1 + level) / 2)) * self.standard_error
        )
        middle = self._scale(self.value)
        low, high = middle - reach, middle + reach
        return (
            (float(np.tanh(low)), float(np.tanh(high)))
            if self.correlation
            else (float(low), float(high))
        )

    @property
    def p_value(self) -> float:
        """Two-sided, against 0; at most 1 - level exactly where the interval at that level excludes
        0.
        """
        if not self.standard_error > 0:
            return np.nan
        return float(
            2 * special.stdtr(self.prompts - 1, -abs(self._scale(self.value)) / self.standard_error)
        )

    def _scale(self, value):
        return np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)) if self.correlation else value


def undefined(prompts: PromptClusters, mask: np.ndarray | None = None) -> Estimate:
    """What a statistic is where too little is finite."""
    mask = np.zeros(len(prompts.codes), dtype=bool) if mask is None else mask
    left_out = np.full(prompts.count, np.nan)
    return Estimate(
        np.nan,
        np.full(prompts.draws, np.nan),
        int(mask.sum()),
        prompts.present(mask),
        left_out=left_out,
    )


def of_sums(
    function: Callable, sums: np.ndarray, prompts: PromptClusters, mask: np.ndarray, **options
) -> list[Estimate]:
    """Estimates of a vector-valued function of summed per-prompt sums.

    function: sums [..., S] -> values [..., P]; sums: [prompts, S]; mask: [N] positions that they
    cover."""
    total = sums.sum(0)
    value, draws, left_out = (
        function(total),
        function(prompts.weights @ sums),
        function(total - sums),
    )
    counts = int(mask.sum()), prompts.present(mask)
    return [
        Estimate(float(value[i]), draws[:, i], *counts, left_out=left_out[:, i], **options)
        for i in range(value.shape[-1])
    ]


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., :1] > 0, sums[..., 1:2] / sums[..., :1], np.nan)


def mean(values: np.ndarray, prompts: PromptClusters, mask: np.ndarray | None = None) -> Estimate:
    """Mean over the finite values [N] under the mask."""
    mask = np.isfinite(values) if mask is None else mask & np.isfinite(values)
    if not mask.any():
        return undefined(prompts, mask)
    return of_sums(
        ratio_of_sums, prompts.sums(np.ones(mask.sum()), values[mask], at=mask), prompts, mask
    )[0]


def mean_difference(
    values: np.ndarray, prompts: PromptClusters, top: np.ndarray, bottom: np.ndarray
) -> Estimate:
    """Mean over the positions of `top` minus mean over those of `bottom`, disjoint masks [N]."""
    used = (top | bottom) & np.isfinite(values)
    if not (used & top).any() or not (used & bottom).any():
        return undefined(prompts, used)
    y, upper, lower = values[used], top[used].astype(np.float64), bottom[used].astype(np.float64)
    sums = prompts.sums(upper, upper * y, lower, lower * y, at=used)
    return of_sums(
        lambda s: ratio_of_sums(s[..., :2]) - ratio_of_sums(s[..., 2:]), sums, prompts, used
    )[0]


def winsorize(values: np.ndarray, share: float) -> np.ndarray:
    """Values [N] clipped at their quantiles `share` and 1 - share; NaN stays NaN."""
    finite = np.isfinite(values)
    if not finite.any() or share == 0:
        return np.where(finite, values, np.nan)
    return np.where(
        finite, np.clip(values, *np.quantile(values[finite], [share, 1 - share])), np.nan
    )


def locations(
    values: np.ndarray, prompts: PromptClusters, mask: np.ndarray, *, share: float = 0.05
) -> dict[str, Estimate]:
    """Median, trimmed mean and winsorised mean of the finite values [N] under the mask.

    Of n positions the floor(share * n) at each end are dropped (trimmed) or set to the next one
    kept (winsorised). Order statistics are exact in every draw; the trimmed mean moves with its
    winsorised values over 1 - 2 share, its influence function. The jackknife, wrong for order
    statistics, is used for none."""
    mask = mask & np.isfinite(values)
    if not mask.any():
        return dict.fromkeys(
            ("median", "trimmed_mean", "winsorised_mean"), undefined(prompts, mask)
        )
    order = np.argsort(values[mask])
    ordered, codes = values[mask][order], prompts.codes[mask][order]
    cut, counts = int(share * len(ordered)), (len(ordered), prompts.present(mask))
    middle = [
        _order_statistic(ordered, codes, prompts, 0.5, lambda total, s=s: (total + s) // 2)
        for s in (-1, 0)
    ]
    low = _order_statistic(ordered, codes, prompts, share, lambda total: np.floor(share * total))
    high = _order_statistic(
        ordered, codes, prompts, 1 - share, lambda total: total - np.floor(share * total) - 1
    )
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


def _order_statistic(
    ordered: np.ndarray, codes: np.ndarray, prompts: PromptClusters, near: float, rank: Callable
) -> np.ndarray:
    """[draws] the value of rank(total weight), from 0, among sorted values [n]; NaN for a draw
    without weight.

    It is looked for within a twentieth of the ranks on either side of the share `near`, and
    everywhere if that fails."""
    n = len(ordered)
    for start, stop in (
        (int(max(near - 0.05, 0) * n), int(np.ceil(min(near + 0.05, 1) * n))),
        (0, n),
    ):
        before, total = (
            prompts.weights @ np.bincount(part, minlength=prompts.count)
            for part in (codes[:start], codes)
        )
        wanted, within = (
            rank(total),
            prompts.weights @ np.bincount(codes[start:stop], minlength=prompts.count),
        )
        if ((before <= wanted) & (wanted < before + within) | (total == 0)).all():
            break
    found, rows = np.full(len(total), np.nan), max(1, CHUNK // (stop - start))
    for first in range(0, len(total), rows):
        block = np.arange(first, min(first + rows, len(total)))
        block = block[total[block] > 0]
        upto = np.cumsum(prompts.weights[block][:, codes[start:stop]], axis=1)
        at = [
            counts.searchsorted(rest, side="right")
            for counts, rest in zip(upto, (wanted - before)[block])
        ]
        found[block] = ordered[start + np.array(at, dtype=int)]
    return found


def design_effect(values: np.ndarray, prompts: PromptClusters) -> float:
    """Variance of the mean with clusters over its variance without; NaN where either is
    undefined.
    """
    estimate, finite = mean(values, prompts), values[np.isfinite(values)]
    if len(finite) < 2 or not np.var(finite) > 0:
        return np.nan
    return float(estimate.standard_error**2 / (np.var(finite, ddof=1) / len(finite)))


def effective_clusters(sizes: np.ndarray) -> float:
    """(sum n)^2 / sum n^2: how many clusters of equal size would weigh the same."""
    sizes = np.asarray(sizes, dtype=np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else 0.0


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values, which bound the chance of any false rejection; NaN stays NaN and is
    not counted.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)
    order = order[np.isfinite(p_values[order])]
    steps = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted
