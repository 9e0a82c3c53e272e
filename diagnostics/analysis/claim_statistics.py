"""The statistics of the claims C1 to C4: as the paper has them, and controlled.

With H the student entropy, D the forward KL and C the compatibility of a position, h = N(H),
d = N(D), c = N(C), t its relative position, ht the normalized teacher entropy, and y the outcome:

    C1  paper       rho(y, d*c) - rho(y, d), Spearman, d of the paper's D (it has no such table)
        controlled  sum_s n_s/n rho(y, C | D) in s, over the deciles s of D; inside each the ranks
                    of D are held fixed as well, since D still varies there
    C2  paper       mean y, top less bottom tertile of C inside Q3 (h <= median, d >= median)
        controlled  the same difference with overlap weights: 1 - e for the top, e for the bottom,
                    e = P(top | ln D, (ln D)^2, H, t) by logistic regression
    C3  paper       beta(d*c) - beta(d*(1 - c)), standardized, in y ~ h + d*c + d*(1 - c) + t + ht
        controlled  gamma in y ~ d + s(ln D) + s(H) + c + gamma d*c + t + ht, in nats per unit of
                    d*c; s is a restricted cubic spline (five knots for ln D, four for H)
    C4  the statistics of C2 and C3 with another K, or another measurement in the place of C

All cuts, normalizations, ranks and fits are made anew in each draw of prompts. Positions without H,
D, C or a relative position do not count; ln D is taken of D + 1e-6 nats.

References: arXiv 2605.26844 (the claims); Li, Morgan and Zaslavsky 2018 (overlap weights); Harrell
2015, section 2.4.5 (restricted cubic splines and their knots); Frisch and Waugh 1933; Austin 2011
(.2 standard deviations of the logit as a caliper).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import scipy  # its parts are loaded where they are used: a page needs none

from diagnostics.analysis.bootstrap import (
    EXACT_DRAWS,
    Estimate,
    PromptClusters,
    exact,
    winsorize,
)
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.rank_correlation import Ranked, groups_by_rank
from diagnostics.analysis.splits import Split, splits
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.schema import require_columns
from diagnostics.criteria import disagreement_column, normalize, relative_position

NEEDED = ("student_entropy", "forward_kl", "compatibility", "position", "response_length")
"""Columns without which no claim can be tested."""
LN_FLOOR = 1e-6
"""Nats that are added to D before its logarithm."""
STRATA, FEWEST = 10, 5
"""Number of strata of D, and of positions that a correlation inside one needs."""
KNOTS = {"divergence": (0.05, 0.275, 0.5, 0.725, 0.95), "entropy": (0.05, 0.35, 0.65, 0.95)}
"""Quantiles at which the splines of ln D and of H have their knots."""
RIDGE, ITERATIONS = 1e-3, 30
"""Penalty of the logistic regression, so that separated groups have finite coefficients, and the
most Newton steps that it takes."""
COLLINEAR = 1e-8
"""Share of its variance that d*c must keep beside the other terms."""
PAIRS = 50_000_000
"""Pairs of positions that are compared one by one; of more, the nearest are searched for."""
CALIPER = 0.2
"""Standard deviations, of the logit and of ln D, within which a position has a partner."""


def spearman(x: Ranked, y: Ranked) -> float:
    """Rank correlation of two columns; NaN where one is constant or empty."""
    return _correlation(x.average, y.average)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if not len(x):
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    scale = float((x @ x) * (y @ y))
    return float(x @ y) / np.sqrt(scale) if scale > 0 else np.nan


def strata_of(values: np.ndarray, count: int = STRATA) -> np.ndarray:
    """[n] stratum 0 to count - 1 between the quantiles of the values; equal values share one."""
    inner = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    return np.searchsorted(inner, values, side="right")


def by_stratum(
    y: np.ndarray, x: np.ndarray, held: np.ndarray, ranked: Sequence[Ranked] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlation of y and x inside each decile of a column, whose ranks are held fixed too.

    Args:
        y: [n] outcome.
        x: [n] what may order it.
        held: [n] the column; one that is constant in a stratum holds nothing fixed there.
        ranked: The ranks of the three columns, where they are known.

    Returns:
        [10] first-order partial correlations of the ranks inside each stratum, NaN where y or x is
        constant or given by the column, or positions are fewer than `FEWEST`; and [10] numbers of
        positions.
    """
    stratum = strata_of(held)
    sizes = np.bincount(stratum, minlength=STRATA)
    ranked = [Ranked(column) for column in (y, x, held)] if ranked is None else ranked
    inside = []
    for column, whole in zip((y, x, held), ranked, strict=True):
        ranks = Ranked(column, within=stratum, order=whole.order).average
        inside.append(ranks - ((sizes + 1) / 2)[stratum])  # the mean rank of a stratum
    yy, xx, zz, yx, yz, xz = (
        np.bincount(stratum, weights=inside[i] * inside[j], minlength=STRATA)
        for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        both, first, second = yx / np.sqrt(yy * xx), yz / np.sqrt(yy * zz), xz / np.sqrt(xx * zz)
        first, second = (np.where(zz > 0, part, 0.0) for part in (first, second))
        rest = (1 - first**2) * (1 - second**2)
        partial = np.where(rest > 1e-12, (both - first * second) / np.sqrt(rest), np.nan)
    return np.where(sizes >= FEWEST, partial, np.nan), sizes


def within_strata(
    y: np.ndarray, x: np.ndarray, held: np.ndarray, ranked: Sequence[Ranked] | None = None
) -> float:
    """Mean of `by_stratum`, weighted by positions.

    It is NaN where the strata in which it is defined hold less than half of the positions.
    """
    found, sizes = by_stratum(y, x, held, ranked)
    defined = np.isfinite(found)
    if 2 * sizes[defined].sum() < sizes.sum() or not defined.any():
        return np.nan
    return float(np.average(found[defined], weights=sizes[defined]))


def rank_shares(
    y: Ranked, divergence: Ranked, compatibility: Ranked, entropy: Ranked
) -> np.ndarray:
    """Share of the variance of the outcome's ranks that ranks of predictors explain.

    Args:
        y: The ranks of the outcome.
        divergence: Those of D.
        compatibility: Those of C.
        entropy: Those of H.

    Returns:
        [4] R^2 of D alone, and what C, H, and both add to it; NaN where ranks are collinear.
    """
    ranks = np.stack([each.average for each in (divergence, compatibility, entropy, y)])
    if not (ranks.std(axis=1) > 0).all():
        return np.full(4, np.nan)
    matrix = np.corrcoef(ranks)
    alone, with_c, with_h, both = (
        _explained(matrix, chosen) for chosen in ([0], [0, 1], [0, 2], [0, 1, 2])
    )
    return np.array([alone, with_c - alone, with_h - alone, both - alone])


def _explained(matrix: np.ndarray, chosen: list[int]) -> float:
    inner, target = matrix[np.ix_(chosen, chosen)], matrix[chosen, -1]
    if np.linalg.det(inner) < 1e-10:
        return np.nan
    return float(target @ np.linalg.solve(inner, target))


def mean_gap(y: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> float:
    """Mean of y [n] under one mask less its mean under another; NaN where a side is empty."""
    return float(y[top].mean() - y[bottom].mean()) if top.any() and bottom.any() else np.nan


def propensity(features: np.ndarray, treated: np.ndarray) -> np.ndarray:
    """Probability of being treated, by logistic regression.

    Args:
        features: [n, p] columns; each is standardized, and a constant one is left out.
        treated: [n] mask.

    Returns:
        [n] logits of the fit whose coefficients (not the intercept) carry a penalty of RIDGE / 2
        times their squares, found by Newton's method.
    """
    spread = features.std(axis=0)
    kept = spread > 0
    design = np.column_stack(
        [np.ones(len(features)), (features[:, kept] - features[:, kept].mean(0)) / spread[kept]]
    )
    penalty = np.diag(np.r_[1e-12, np.full(kept.sum(), RIDGE)])
    beta = np.zeros(design.shape[1])
    for _ in range(ITERATIONS):
        p = scipy.special.expit(design @ beta)
        slope = design.T @ (treated - p) - penalty @ beta
        curvature = (design * (p * (1 - p))[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, slope)
        # Far from the optimum of separated groups a whole step can overshoot.
        beta = beta + step / max(1.0, np.abs(step).max() / 5)
        if np.abs(step).max() < 1e-9:
            break
    return design @ beta


def overlap_weights(logit: np.ndarray, top: np.ndarray) -> np.ndarray:
    """[n] weights 1 - e at the top, e elsewhere, for propensities e given by their logits."""
    return scipy.special.expit(np.where(top, -logit, logit))


def weighted_gap(y: np.ndarray, weight: np.ndarray, top: np.ndarray) -> float:
    """Weighted mean of y [n] under a mask less the one outside of it; NaN without weight."""
    above, below = weight * top, weight * ~top
    if not above.sum() > 0 or not below.sum() > 0:
        return np.nan
    return float(y @ above / above.sum() - y @ below / below.sum())


def spline(values: np.ndarray, quantiles: Iterable[float]) -> np.ndarray:
    """Restricted cubic spline of a column.

    Args:
        values: [n] values.
        quantiles: Where the knots lie; knots that coincide count once.

    Returns:
        [n, knots - 1] the values, then the terms that bend between the knots and are linear
        outside of them; the values alone where fewer than three knots are distinct.
    """
    knots = np.unique(np.quantile(values, list(quantiles)))
    columns = [values]
    if len(knots) >= 3:
        *inner, before, last = knots
        above = np.maximum(values[:, None] - knots, 0.0)
        cubes = above * above * above
        for j, knot in enumerate(inner):
            bent = (
                cubes[:, j]
                - cubes[:, -2] * (last - knot) / (last - before)
                + cubes[:, -1] * (before - knot) / (last - before)
            )
            columns.append(bent / (last - knots[0]) ** 2)
    return np.stack(columns, axis=1)


def orthonormal(design: np.ndarray) -> np.ndarray:
    """[n, r] orthonormal columns that span the constant and those of a design [n, p]."""
    centered = design - design.mean(axis=0)
    spread = np.sqrt((centered**2).sum(axis=0))
    kept = spread > 1e-10 * np.sqrt(len(design)) * np.maximum(1e-300, np.abs(design).max(axis=0))
    scaled = centered[:, kept] / spread[kept]
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    regular = values > 1e-10
    basis = scaled @ (vectors[:, regular] / np.sqrt(values[regular]))
    return np.column_stack([np.full(len(design), 1 / np.sqrt(len(design))), basis])


def residual(values: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """[n] what a column keeps beside the span of an orthonormal basis [n, r]."""
    return values - basis @ (basis.T @ values)


def interaction(y: np.ndarray, d: np.ndarray, c: np.ndarray, basis: np.ndarray) -> float:
    """Coefficient of d*c beside c and everything in a basis.

    Args:
        y: [n] outcome.
        d: [n] normalized divergence.
        c: [n] normalized compatibility.
        basis: [n, r] orthonormal columns, as from `orthonormal`.

    Returns:
        The least-squares coefficient in y's unit; NaN where d*c is given by the other terms.
    """
    product = d * c
    alone, crossed = residual(c, basis), residual(product, basis)
    if alone @ alone > COLLINEAR * max(float(np.var(c)), 1e-300) * len(c):
        crossed = crossed - alone * (alone @ crossed) / (alone @ alone)
    left = float(crossed @ crossed)
    if not left > COLLINEAR * float(np.var(product)) * len(product):
        return np.nan
    return float(crossed @ residual(y, basis)) / left


def decomposition(
    y: np.ndarray, d: np.ndarray, c: np.ndarray, held: np.ndarray
) -> tuple[float, float]:
    """Coefficient of d*c less that of d*(1 - c).

    Args:
        y: [n] outcome.
        d: [n] normalized divergence.
        c: [n] normalized compatibility.
        held: [n, p] further terms.

    Returns:
        The difference of the standardized coefficients, and of those per unit of d in y's unit;
        NaN where a term is constant or given by the others.
    """
    within, outside = d * c, d * (1 - c)
    design = np.column_stack([within, outside, held])
    design = design[:, np.r_[True, True, held.std(axis=0) > 0]]
    centered, target = design - design.mean(0), y - y.mean()
    spread, size = centered.std(0), target.std()
    if not (spread > 0).all() or not size > 0:
        return np.nan, np.nan
    scaled = centered / spread
    gram = scaled.T @ scaled / len(y)
    if np.linalg.cond(gram) > 1 / COLLINEAR:
        return np.nan, np.nan
    beta = np.linalg.solve(gram, scaled.T @ target / len(y))[:2]
    unit = beta / spread[:2]
    return float((beta[0] - beta[1]) / size), float(unit[0] - unit[1])


@dataclass(frozen=True)
class Support:
    """A column that stands in the place of compatibility.

    Attributes:
        proxy: The measurement.
        k: Number of tokens in its support.
        column: Its column in the token table.
        sign: -1 where it falls as compatibility rises.
    """

    proxy: str
    k: int
    column: str
    sign: int = 1


class Positions:
    """Predictors of some positions, cut and normalized over exactly these.

    Args:
        columns: [n] by name, as from `predictors`; finite.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]):
        self.columns = columns
        self.h = normalize(columns["student_entropy"])
        self.d = normalize(columns["forward_kl"])
        self.paper_d = normalize(columns["paper_divergence"])
        self.log_divergence = np.log(columns["forward_kl"] + LN_FLOOR)
        self.in_q3 = (self.h <= np.median(self.h)) & (self.d >= np.median(self.d))
        self._scores: dict[Support, np.ndarray] = {}
        self._groups: dict[Support, tuple[np.ndarray, np.ndarray]] = {}
        self._weights: dict[Support, np.ndarray] = {}
        self._ranks: dict[str, Ranked] = {}

    def ranks(self, name: str) -> Ranked:
        """Ranks of a column."""
        if name not in self._ranks:
            self._ranks[name] = Ranked(self.columns[name])
        return self._ranks[name]

    @cached_property
    def paper_divergence(self) -> Ranked:
        """Ranks of the paper's normalized D."""
        return Ranked(self.paper_d)

    def teachability(self, base: Support) -> Ranked:
        """Ranks of the paper's normalized D times c."""
        return Ranked(self.paper_d * self.score(base))

    def score(self, support: Support) -> np.ndarray:
        """[n] c, of the support's column with its sign."""
        if support not in self._scores:
            self._scores[support] = normalize(support.sign * self.columns[support.column])
        return self._scores[support]

    def tertiles(self, support: Support) -> tuple[np.ndarray, np.ndarray]:
        """[n] masks of the top and bottom tertile of the support's column inside Q3."""
        if support not in self._groups:
            values = support.sign * self.columns[support.column]
            group = groups_by_rank(values, 3, self.in_q3)
            self._groups[support] = group == 3, group == 1
        return self._groups[support]

    def confounders(self, rows: np.ndarray) -> np.ndarray:
        """[rows, 4] ln D, its square, H and the relative position."""
        log_d, entropy, place = (
            column[rows]
            for column in (
                self.log_divergence,
                self.columns["student_entropy"],
                self.columns["relative_position"],
            )
        )
        return np.column_stack([log_d, (log_d - log_d.mean()) ** 2, entropy, place])

    def weights(self, support: Support) -> np.ndarray:
        """[n] overlap weights of the two tertiles, 0 elsewhere."""
        if support not in self._weights:
            top, bottom = self.tertiles(support)
            rows = np.flatnonzero(top | bottom)
            weight = np.zeros(len(top))
            if top.any() and bottom.any():
                logit = propensity(self.confounders(rows), top[rows])
                weight[rows] = overlap_weights(logit, top[rows])
            self._weights[support] = weight
        return self._weights[support]

    def count(self, statistic: str, support: Support) -> int:
        """Number of positions that a statistic is computed from."""
        if statistic not in ("q3_gap", "overlap_contrast"):
            return len(self.h)
        top, bottom = self.tertiles(support)
        return int((top | bottom).sum())

    @cached_property
    def held(self) -> np.ndarray:
        """[n, p] entropy, position and, where it is known, teacher entropy: the paper's terms."""
        terms = [self.h, self.columns["relative_position"]]
        if "teacher_entropy" in self.columns:
            terms.append(normalize(self.columns["teacher_entropy"]))
        return np.stack(terms, axis=1)

    @cached_property
    def basis(self) -> np.ndarray:
        """[n, r] orthonormal basis of the terms of the controlled C3 beside c and d*c."""
        smooth = [
            spline(self.log_divergence, KNOTS["divergence"]),
            spline(self.columns["student_entropy"], KNOTS["entropy"]),
        ]
        return orthonormal(np.column_stack([self.d, *smooth, self.held[:, 1:]]))


def predictors(
    tokens: pd.DataFrame, split: Split, supports: Iterable[Support]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns that the statistics read, over a population.

    Args:
        tokens: A token table.
        split: The population with its n positions.
        supports: What stands in the place of compatibility.

    Returns:
        [n] columns by name, and the mask [n] of positions where all of them are finite.
    """
    require_columns(tokens, NEEDED, what="A test of the claims")
    names = ["student_entropy", "forward_kl", "teacher_entropy"]
    names += [support.column for support in supports]
    columns = {name: split.values(tokens, name) for name in names if name in tokens}
    columns["paper_divergence"] = split.values(tokens, disagreement_column(tokens))
    columns["relative_position"] = relative_position(tokens)[split.mask]
    return columns, np.all(np.isfinite(list(columns.values())), axis=0)


def paper_statistics(
    at: Positions, outcome: str, base: Support, others: Iterable[Support] = ()
) -> dict[tuple[str, Support], float]:
    """The statistics of the claims as the paper has them.

    Args:
        at: The predictors and outcomes of n positions.
        outcome: Column of the outcome.
        base: Compatibility itself.
        others: Other K and measurements, for which the gap in Q3 is computed too.

    Returns:
        Values by statistic and support: spearman_difference, q3_gap, standardised and per_unit.
    """
    y, ranked = at.columns[outcome], at.ranks(outcome)
    standardised, per_unit = decomposition(y, at.paper_d, at.score(base), at.held)
    difference = spearman(ranked, at.teachability(base)) - spearman(ranked, at.paper_divergence)
    found = {
        ("spearman_difference", base): difference,
        ("standardised", base): standardised,
        ("per_unit", base): per_unit,
    }
    gaps = {("q3_gap", each): mean_gap(y, *at.tertiles(each)) for each in (base, *others)}
    return found | gaps


def controlled_statistics(
    at: Positions, outcome: str, base: Support, others: Iterable[Support] = ()
) -> dict[tuple[str, Support], float]:
    """The controlled statistics of the claims.

    Args:
        at: The predictors and outcomes of n positions.
        outcome: Column of the outcome.
        base: Compatibility itself.
        others: Other K and proxies, for which those of C2 and C3 are computed too.

    Returns:
        Values by statistic and support: within_strata, rank_share_d and what c, h and both add to
        it, overlap_contrast and interaction.
    """
    y = at.columns[outcome]
    names = (outcome, base.column, "forward_kl")
    ranked = [at.ranks(name) for name in names]
    shares = rank_shares(ranked[0], ranked[2], ranked[1], at.ranks("student_entropy"))
    columns = (at.columns[name] for name in names)
    found = {("within_strata", base): within_strata(*columns, ranked)}
    found |= {(name, base): float(share) for name, share in zip(RANK_SHARES, shares, strict=True)}
    for each in (base, *others):
        top, _ = at.tertiles(each)
        found["overlap_contrast", each] = weighted_gap(y, at.weights(each), top)
        found["interaction", each] = interaction(y, at.d, at.score(each), at.basis)
    return found


RANK_SHARES = ("rank_share_d", "rank_share_c_adds", "rank_share_h_adds", "rank_share_both_add")


KINDS = {"paper": paper_statistics, "controlled": controlled_statistics}


@dataclass(frozen=True)
class Statistic:
    """Which number an estimate is of.

    Attributes:
        population: `held_out`, `step` or `all`.
        outcome: Column of the outcome.
        name: Name of the statistic.
        proxy: Measurement in the place of compatibility.
        k: Number of tokens in its support.
    """

    population: str
    outcome: str
    name: str
    proxy: str
    k: int


def estimates(
    tokens: pd.DataFrame,
    kinds: Mapping[str, Sequence[str]],
    base: Support,
    others: Mapping[str, Sequence[Support]],
    *,
    widened: str,
    bootstrap: Bootstrap,
    draws: int = EXACT_DRAWS,
    winsorised: float = 0.0,
    only: str | None = None,
) -> dict[Statistic, Estimate]:
    """Estimate the statistics of some outcomes on every population.

    Args:
        tokens: A token table, one row per response position.
        kinds: By column of the outcome, which of the statistics of `KINDS` are made.
        base: Compatibility itself.
        others: By kind, other K and proxies.
        widened: The population for which the others are computed too.
        bootstrap: How the intervals are made.
        draws: The most draws that are used.
        winsorised: Share of each tail at which the outcomes are clipped, in each draw.
        only: The one population that is wanted; None takes all.

    Returns:
        Estimates by statistic, with the step batches' part. An outcome that is undefined throughout
        a population has none.
    """

    def make(table: pd.DataFrame, how: Bootstrap) -> dict[Statistic, Estimate]:
        found = {}
        for split in splits(table, bootstrap=how):
            if only not in (None, split.name):
                continue
            wide = others if split.name == widened else {}
            supports = {kind: (base, *wide.get(kind, ())) for kind in KINDS}
            found |= _on_population(table, split, kinds, supports, how, draws, winsorised)
        return found

    return over_steps(make, tokens, bootstrap)


def _on_population(
    tokens: pd.DataFrame,
    split: Split,
    kinds: Mapping[str, Sequence[str]],
    supports: Mapping[str, Sequence[Support]],
    bootstrap: Bootstrap,
    draws: int,
    winsorised: float,
) -> dict[Statistic, Estimate]:
    """The statistics of a population, those of outcomes with equal gaps in the same draws."""
    columns, defined = predictors(
        tokens, split, dict.fromkeys(each for some in supports.values() for each in some)
    )
    values = {outcome: split.values(tokens, outcome) for outcome in kinds}
    masks = {outcome: defined & np.isfinite(values[outcome]) for outcome in kinds}
    found: dict[Statistic, Estimate] = {}
    for mask in {used.tobytes(): used for used in masks.values() if used.any()}.values():
        here = [outcome for outcome in kinds if (masks[outcome] == mask).all()]
        taken = columns | {outcome: values[outcome] for outcome in here}
        taken = {name: column[mask] for name, column in taken.items()}
        prompts = PromptClusters(tokens["prompt_id"][split.mask][mask], bootstrap=bootstrap)
        wanted = [(outcome, kind) for outcome in here for kind in kinds[outcome]]
        found |= _together(taken, prompts, wanted, supports, split.name, draws, winsorised)
    return found


def _together(
    columns: Mapping[str, np.ndarray],
    prompts: PromptClusters,
    wanted: Sequence[tuple[str, str]],
    supports: Mapping[str, Sequence[Support]],
    population: str,
    draws: int,
    winsorised: float,
) -> dict[Statistic, Estimate]:
    clipped = dict.fromkeys(outcome for outcome, _ in wanted) if winsorised else {}

    def evaluate(drawn: Mapping[str, np.ndarray]) -> dict[tuple[str, str, Support], float]:
        at = Positions({**drawn, **{name: winsorize(drawn[name], winsorised) for name in clipped}})
        return {
            (outcome, *key): value
            for outcome, kind in wanted
            for key, value in KINDS[kind](
                at, outcome, supports[kind][0], supports[kind][1:]
            ).items()
        }

    whole = evaluate(columns)
    names, found = (
        list(whole),
        [
            Estimate(value, np.empty(0), len(prompts.codes), prompts.count)
            for value in whole.values()
        ],
    )
    if prompts.draws:
        found = exact(
            lambda drawn: np.array(list(evaluate(drawn).values())), columns, prompts, draws=draws
        )
    at = Positions(columns)
    return {
        Statistic(population, outcome, name, support.proxy, support.k): replace(
            estimate, positions=at.count(name, support)
        )
        for (outcome, name, support), estimate in zip(names, found, strict=True)
    }


@dataclass(frozen=True)
class Overlap:
    """Whether the two tertiles of C inside Q3 can be compared at equal divergence and entropy.

    Attributes:
        partners: Share of top positions that have a bottom position within `CALIPER` standard
            deviations of the logit and of ln D at once.
        before: Standardized differences, top less bottom, of ln D, H and relative position.
        after: The same with overlap weights.
        effective: Effective number of positions at the top and at the bottom, (sum w)^2 / sum w^2.
    """

    partners: float
    before: dict[str, float]
    after: dict[str, float]
    effective: tuple[float, float]

    @property
    def imbalance(self) -> float:
        """The largest absolute standardized difference that is left."""
        return max(map(abs, self.after.values()), default=np.nan)


COVARIATES = ("ln_divergence", "student_entropy", "relative_position")


def overlap(tokens: pd.DataFrame, split: Split, base: Support) -> Overlap | None:
    """Diagnose the contrast of C2 on a population; None where a tertile is empty.

    Args:
        tokens: A token table.
        split: The population.
        base: Compatibility itself.
    """
    columns, used = predictors(tokens, split, [base])
    if not used.any():
        return None
    at = Positions({name: column[used] for name, column in columns.items()})
    top, bottom = at.tertiles(base)
    if not top.any() or not bottom.any():
        return None
    rows = np.flatnonzero(top | bottom)
    features, treated = at.confounders(rows), top[rows]
    logit = propensity(features, treated)
    weight = overlap_weights(logit, treated)
    covariates = dict(zip(COVARIATES, features[:, [0, 2, 3]].T, strict=True))
    sides = (weight[treated], weight[~treated])
    return Overlap(
        _partners(np.stack([logit, features[:, 0]], axis=1), treated),
        {name: _standardized(x, np.ones(len(x)), treated) for name, x in covariates.items()},
        {name: _standardized(x, weight, treated) for name, x in covariates.items()},
        tuple(float(side.sum() ** 2 / (side**2).sum()) for side in sides),
    )


def _pooled(values: np.ndarray, treated: np.ndarray) -> float:
    return float(np.sqrt((values[treated].var() + values[~treated].var()) / 2))


def _standardized(values: np.ndarray, weight: np.ndarray, treated: np.ndarray) -> float:
    """Difference of weighted means over the groups' root mean variance; 0 for a constant."""
    scale = _pooled(values, treated)
    gap = weighted_gap(values, weight, treated)
    return gap / scale if scale > 0 else (0.0 if gap == 0 else float(np.copysign(np.inf, gap)))


def _partners(space: np.ndarray, treated: np.ndarray) -> float:
    """Share of treated rows of [n, 2] with another row within the caliper in both columns."""
    scale = np.array([CALIPER * _pooled(column, treated) for column in space.T])
    if treated.sum() * (~treated).sum() > PAIRS and scale.all():
        # The nearest in the larger of the two distances, in units of their calipers.
        others = scipy.spatial.cKDTree(space[~treated] / scale)
        nearest, _ = others.query(space[treated] / scale, p=np.inf, distance_upper_bound=1 + 1e-12)
        return float(np.isfinite(nearest).mean())
    near = np.ones((int(treated.sum()), int((~treated).sum())), dtype=bool)
    for column, reach in zip(space.T, scale, strict=True):
        near &= np.abs(column[treated][:, None] - column[~treated][None, :]) <= reach
    return float(near.any(axis=1).mean())


def resemblance(tokens: pd.DataFrame, split: Split, base: Support, other: Support) -> float:
    """Rank correlation of a column with compatibility inside Q3 of a population.

    Args:
        tokens: A token table.
        split: The population.
        base: Compatibility itself.
        other: The column's support.

    Returns:
        The correlation; NaN where a column is constant there, or undefined somewhere.
    """
    columns, used = predictors(tokens, split, [base])
    column = split.values(tokens, other.column)[used]
    if not used.any() or not np.isfinite(column).all():
        return np.nan
    at = Positions({name: values[used] for name, values in columns.items()})
    return spearman(Ranked(at.columns[base.column][at.in_q3]), Ranked(column[at.in_q3]))
