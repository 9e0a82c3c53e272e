"""Statistics for positions that come in clusters, one cluster per prompt.

    w ~ Multinomial(G; 1/G, ..., 1/G)        a draw: how often each of the G prompts is taken
    T*(w) = f(sum_g w_g s_g)                 its statistic, a function of per-prompt sums s_g
    T(-g) = f(sum_{h != g} s_h)              the statistic without prompt g
    SE^2  = max( G/(G-1) var h(T*),  (G-1)/G sum_g (h(T(-g)) - h(T))^2 )
    SE_F^2 = (F-1)/F sum_f (h(T(-f)) - mean_f h(T(-f)))^2           the step batches' part
    interval = h^-1( h(T) +- t(nu) sqrt(SE^2 + SE_F^2) )

h is Fisher's arctanh for a correlation and the identity otherwise. Prompts are resampled whole;
positions within a prompt never are, because they are not independent. A statistic of sums costs one
product [draws, G] @ [G, sums] for all draws together.

T(-f) is the statistic without the step on fold f of a table with F steps (`core.folds`): the step
is a random draw too, and an interval for the pair, rather than for these steps, carries both parts.
Degrees of freedom are G-1 for a table of one step, whose interval carries the prompts alone, and
Satterthwaite's from G-1 and F-1 otherwise.

From 2,000 prompts on, a statistic's spread over random groups of prompts takes the place of draws
and jackknife (`prompt_groups`).

`exact` resamples rows and computes everything anew in each draw. Elsewhere means, differences,
Pearson, regressions and medians are exact in every draw. Approximate: Spearman computes ranks once
and resamples them, partial correlations compute residuals once, Kendall and trimmed means resample
their first-order term, and groups and winsorizing limits are cut once.
`benchmarks/CALIBRATION.md` has the measured differences.

Departures: with some tens of prompts the percentile interval is too short (its coverage is 87-93 %
instead of 95 % at 20 prompts) and BCa is shorter still (82-93 %). The interval is therefore a t
interval, and the bootstrap's standard error, which is biased downwards, is replaced by the
jackknife's, which is biased upwards, where the latter is larger (coverage 94-97.5 %).

References: Efron and Stein 1981; Efron and Tibshirani 1993, ch. 11-14; Cameron and Miller 2015;
MacKinnon, Nielsen and Webb 2023 (t(G-1) with the cluster jackknife); Hoeffding 1948 (projection).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import scipy  # its parts are loaded where they are used: a page needs none

from diagnostics.analysis.config import Bootstrap
from diagnostics.core.settings import with_settings

ENOUGH_DRAWS = 0.9
"""Share of draws in which a statistic must be defined for its interval to be."""
EXACT_DRAWS = 200
"""Draws of statistics that are computed anew from resampled rows: their standard error is then
itself uncertain by 5 %."""
CHUNK = 2_000_000
"""Number of elements of a [draws, positions] block that is held in memory at a time."""


class PromptClusters:
    """The prompts of N positions, and how often each draw takes each of them.

    Statistics that share one `PromptClusters` share its draws, so that their differences are
    paired.

    Args:
        ids: [N] prompt of each position.
        bootstrap: Number of draws and their seed; the level is not used here.

    Attributes:
        codes: [N] number of each position's prompt, from 0.
        names: [prompts] ids in the order of their numbers.
        count: Number of prompts.
    """

    @with_settings(bootstrap=Bootstrap)
    def __init__(self, ids, *, bootstrap: Bootstrap = Bootstrap(), **settings: Any):
        self.codes, self.names = pd.factorize(pd.Series(ids), sort=True)
        self.count = len(self.names)
        self.draws = bootstrap.draws
        self.seed = bootstrap.seed

    @cached_property
    def weights(self) -> np.ndarray:
        """[draws, prompts] number of times that each draw takes each prompt, float64."""
        if not self.count:
            return np.zeros((self.draws, 0))
        shares = np.full(self.count, 1 / self.count)
        return (
            np.random.default_rng(self.seed)
            .multinomial(self.count, shares, size=self.draws)
            .astype(np.float64)
        )

    def sums(self, *columns: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """Sum columns over the positions of each prompt.

        It is fastest where the positions of a prompt stand together.

        Args:
            columns: [N] values each, or one value per position that `at` picks.
            at: A mask [N] or row numbers of the positions that count; None means all.

        Returns:
            [prompts, columns] sums, float64.
        """
        codes = self.codes if at is None else self.codes[at]
        # Runs of one prompt are added up first: reduceat is many times faster than a bincount of
        # every position.
        if not len(codes):
            return np.zeros((self.count, len(columns)))
        starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
        runs = (np.add.reduceat(np.asarray(column, dtype=np.float64), starts) for column in columns)
        return np.stack(
            [np.bincount(codes[starts], weights=run, minlength=self.count) for run in runs], axis=1
        )

    def without_draws(self) -> PromptClusters:
        """The same prompts without draws, for statistics that need no interval."""
        return PromptClusters(self.codes, draws=0)

    def present(self, mask: np.ndarray) -> int:
        """Number of prompts that have a position under the mask [N]."""
        return int(np.count_nonzero(np.bincount(self.codes[mask], minlength=self.count)))


@dataclass(frozen=True)
class Estimate:
    """A statistic, what its interval needs, and the data it is computed from.

    Attributes:
        value: The statistic.
        draws: [draws] its bootstrap replicates.
        positions: Number of positions that it is computed from.
        prompts: Number of prompts that these positions belong to.
        correlation: True where the interval is computed on Fisher's scale.
        left_out: [prompts] its value without each prompt; None where the jackknife does not apply.
        without_step: [steps] its value without each step; None for a table of one step.
        groups: Number of groups of prompts whose spread the draws have (`prompt_groups`); None
            where they are draws of prompts.
    """

    value: float
    draws: np.ndarray
    positions: int
    prompts: int
    correlation: bool = False
    left_out: np.ndarray | None = None
    without_step: np.ndarray | None = None
    groups: int | None = None

    @property
    def steps(self) -> int:
        """Number of steps that the interval carries; 1 where it carries the prompts alone."""
        return 1 if self.without_step is None else len(self.without_step)

    def __sub__(self, other: Estimate) -> Estimate:
        """Paired difference; both estimates must come from the same `PromptClusters`."""
        either = self.left_out is None or other.left_out is None
        return Estimate(
            self.value - other.value,
            self.draws - other.draws,
            min(self.positions, other.positions),
            min(self.prompts, other.prompts),
            left_out=None if either else self.left_out - other.left_out,
            without_step=_steps_between(self, other),
            groups=self.groups,
        )

    def times(self, factor: float) -> Estimate:
        """The estimate in another unit: the value, its draws and its ends times a factor."""
        parts = {
            name: None if values is None else values * factor
            for name, values in (("left_out", self.left_out), ("without_step", self.without_step))
        }
        return Estimate(
            self.value * factor,
            self.draws * factor,
            self.positions,
            self.prompts,
            groups=self.groups,
            **parts,
        )

    @cached_property
    def standard_error(self) -> float:
        """The standard error on the interval's scale: the prompts' and the step batches' parts."""
        return float(np.hypot(self.prompt_error, self.step_error))

    @cached_property
    def step_error(self) -> float:
        """The step batches' part of the standard error: the jackknife over steps.

        It is 0 for a table of one step, and NaN where the statistic is undefined without some step.
        """
        if self.without_step is None:
            return 0.0
        values = self._scale(self.without_step)
        count = len(values)
        return float(np.sqrt((count - 1) / count * np.sum((values - values.mean()) ** 2)))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the interval (Satterthwaite 1946)."""
        of_prompts = max((self.groups or self.prompts) - 1, 1)
        if self.steps < 2 or not self.standard_error > 0:
            return float(of_prompts)
        parts = self.prompt_error**4 / of_prompts + self.step_error**4 / (self.steps - 1)
        return float(self.standard_error**4 / parts)

    @cached_property
    def prompt_error(self) -> float:
        """The prompts' part of the standard error, on the interval's scale.

        It is NaN with one prompt, and where too few draws or left-out values are defined.
        """
        # A statistic that a few draws leave undefined, e.g. of a rare group, keeps its interval.
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

    def interval(self, level: float = Bootstrap.level) -> tuple[float, float]:
        """Compute the t interval.

        Args:
            level: Coverage, between 0 and 1.

        Returns:
            Low and high end, in the statistic's unit.
        """
        reach = float(scipy.special.stdtrit(self.freedom, (1 + level) / 2)) * self.standard_error
        middle = self._scale(self.value)
        low = middle - reach
        high = middle + reach
        return (
            (float(np.tanh(low)), float(np.tanh(high)))
            if self.correlation
            else (float(low), float(high))
        )

    @property
    def p_value(self) -> float:
        """Two-sided p value against 0.

        It is at most 1 - level exactly where the interval at that level excludes 0.
        """
        if not self.standard_error > 0:
            return np.nan
        return float(
            2
            * scipy.special.stdtr(self.freedom, -abs(self._scale(self.value)) / self.standard_error)
        )

    def _scale(self, value):
        # arctanh(+-1) is infinite; the clip keeps a perfect correlation finite.
        return np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)) if self.correlation else value


def _steps_between(one: Estimate, other: Estimate) -> np.ndarray | None:
    """The difference of two statistics without each step; one without steps is the same for all."""
    if one.without_step is None and other.without_step is None:
        return None
    first, second = (
        part.value if part.without_step is None else part.without_step for part in (one, other)
    )
    return np.asarray(first - second)


def undefined(prompts: PromptClusters, mask: np.ndarray | None = None) -> Estimate:
    """The estimate of a statistic for which too few values are finite: NaN with its counts."""
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
    """Estimate each component of a function of per-prompt sums.

    Args:
        function: Takes sums [..., S] and returns values [..., P].
        sums: [prompts, S] sums over the positions of each prompt.
        prompts: The prompts with their draws.
        mask: [N] positions that the sums cover; only their number is used.
        options: Further fields of `Estimate`, e.g. correlation=True.

    Returns:
        P estimates.
    """
    total = sums.sum(0)
    value = function(total)
    draws = function(prompts.weights @ sums)
    left_out = function(total - sums)
    counts = int(mask.sum()), prompts.present(mask)
    return [
        Estimate(float(value[i]), draws[:, i], *counts, left_out=left_out[:, i], **options)
        for i in range(value.shape[-1])
    ]


def exact(
    function: Callable[[dict[str, np.ndarray]], np.ndarray],
    columns: Mapping[str, np.ndarray],
    prompts: PromptClusters,
    *,
    draws: int = EXACT_DRAWS,
    **options,
) -> list[Estimate]:
    """Estimate statistics by resampling rows, so that cuts, ranks and masks are made in each draw.

    Args:
        function: Takes columns [n] by name, and returns P values. Its argument also has the column
            `prompt`, whose numbers tell the copies of a prompt apart.
        columns: [N] each, over the positions of `prompts`.
        prompts: The prompts with their draws.
        draws: The first of the prompts' draws that are used.
        options: Further fields of `Estimate`, e.g. correlation=True.

    Returns:
        P estimates; their counts are those of all N positions.
    """
    order = np.argsort(prompts.codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(prompts.codes, minlength=prompts.count))[:-1])

    def value(taken: np.ndarray) -> np.ndarray:
        sizes = [len(rows[prompt]) for prompt in taken]
        at = np.concatenate([rows[prompt] for prompt in taken])
        drawn = {name: values[at] for name, values in columns.items()}
        found = function(drawn | {"prompt": np.repeat(np.arange(len(taken)), sizes)})
        return np.asarray(found, dtype=np.float64)

    estimate = value(np.arange(prompts.count))
    taken = [
        np.repeat(np.arange(prompts.count), weights.astype(int))
        for weights in prompts.weights[:draws]
    ]
    drawn = np.array([value(each) for each in taken]).reshape(len(taken), len(estimate))
    return [
        Estimate(float(estimate[i]), drawn[:, i], len(order), prompts.count, **options)
        for i in range(len(estimate))
    ]


def positive_ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """over / under, NaN where the latter is not positive."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(under > 0, np.divide(over, under), np.nan)


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """[..., 1] second sum over first sum of sums [..., 2], NaN where the first is not positive."""
    return positive_ratio(sums[..., 1:2], sums[..., :1])


def mean(values: np.ndarray, prompts: PromptClusters, mask: np.ndarray | None = None) -> Estimate:
    """Mean of values over the positions of a mask.

    Args:
        values: [N] values; those that are not finite do not count.
        prompts: The prompts of the N positions, with their draws.
        mask: [N] positions that count; None means all.

    Returns:
        The mean; NaN where no value is finite.
    """
    mask = np.isfinite(values) if mask is None else mask & np.isfinite(values)
    if not mask.any():
        return undefined(prompts, mask)
    return of_sums(
        ratio_of_sums, prompts.sums(np.ones(mask.sum()), values[mask], at=mask), prompts, mask
    )[0]


def mean_difference(
    values: np.ndarray, prompts: PromptClusters, top: np.ndarray, bottom: np.ndarray
) -> Estimate:
    """Mean over one group of positions minus the mean over another.

    Args:
        values: [N] values; those that are not finite do not count.
        prompts: The prompts of the N positions, with their draws.
        top: Mask [N] of the first group.
        bottom: Mask [N] of the second group, disjoint from the first.

    Returns:
        The difference; NaN where a group has no finite value.
    """
    used = (top | bottom) & np.isfinite(values)
    if not (used & top).any() or not (used & bottom).any():
        return undefined(prompts, used)
    y = values[used]
    upper = top[used].astype(np.float64)
    lower = bottom[used].astype(np.float64)
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
    """Median, trimmed mean and winsorized mean of the finite values under a mask.

    Of n values the floor(share * n) at each end are dropped (trimmed) or set to the next value that
    is kept (winsorized). Order statistics are exact in every draw. The trimmed mean moves with its
    winsorized values over 1 - 2 share, which is its influence function. The jackknife is wrong for
    order statistics and is used for none of the three.

    Args:
        values: [N] values.
        prompts: The prompts of the N positions, with their draws.
        mask: [N] positions that count.
        share: Share of the values at each end that is trimmed or winsorized.

    Returns:
        Estimates by name: median, trimmed_mean, winsorised_mean.
    """
    mask = mask & np.isfinite(values)
    if not mask.any():
        return dict.fromkeys(
            ("median", "trimmed_mean", "winsorised_mean"), undefined(prompts, mask)
        )
    order = np.argsort(values[mask])
    ordered = values[mask][order]
    codes = prompts.codes[mask][order]
    cut = int(share * len(ordered))
    counts = (len(ordered), prompts.present(mask))
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

    The value is searched for within a twentieth of the ranks on either side of the share `near`,
    and among all ranks if it is not there in some draw.
    """
    n = len(ordered)
    for start, stop in (
        (int(max(near - 0.05, 0) * n), int(np.ceil(min(near + 0.05, 1) * n))),
        (0, n),
    ):
        before, total = (
            prompts.weights @ np.bincount(part, minlength=prompts.count)
            for part in (codes[:start], codes)
        )
        wanted = rank(total)
        within = prompts.weights @ np.bincount(codes[start:stop], minlength=prompts.count)
        if ((before <= wanted) & (wanted < before + within) | (total == 0)).all():
            break
    found = np.full(len(total), np.nan)
    rows = max(1, CHUNK // (stop - start))
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
    """Variance of the mean with clusters over its variance with independent positions; NaN where
    either is undefined.
    """
    estimate = mean(values, prompts)
    finite = values[np.isfinite(values)]
    if len(finite) < 2 or not np.var(finite) > 0:
        return np.nan
    return float(estimate.standard_error**2 / (np.var(finite, ddof=1) / len(finite)))


def effective_clusters(sizes: np.ndarray) -> float:
    """(sum n)^2 / sum n^2: how many clusters of equal size would weigh the same."""
    sizes = np.asarray(sizes, dtype=np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else 0.0


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust p values by Holm's method.

    Args:
        p_values: [tests] p values; NaN marks a test that was not made and is not counted.

    Returns:
        [tests] adjusted p values, which bound the chance of any false rejection; NaN stays NaN.

    Reference:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)
    order = order[np.isfinite(p_values[order])]
    steps = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted
