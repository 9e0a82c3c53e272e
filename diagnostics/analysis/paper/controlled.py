"""The paper's statistics with controls: predictors before the step, nats, cuts in the draws.

    table 1    mean y of the top less the bottom third of C inside Q3; of the top third and its
               nearest neighbors (h, ln D, position; scaled) among the bottom third of the prompt
    table 6    the same with another support proxy in the place of C
    table 8    mean y of the ceil(rho N) best positions of each selector, ties by its unclipped form
    table 9    y ~ h + d*c + d*(1 - c) + t + ht, standardized, and its R^2 less that of
               y ~ h + d + h*d + t + ht
    buckets    mean, trimmed and winsorized mean of y in four quarters of a score inside Q3
    planes     mean y over percentiles of d*c and d*(1 - c); mean percentiles over those of H and KL

y is the gain of the checkpoint or the context gain of the probe, both in nats; `sample` says on
which positions. All predictors are the untouched student's. D of d*c and d*(1 - c) is the union's
(the paper's equation 3), and Q3 is cut by the divergence over the whole vocabulary, as in the
released analysis. Intervals are t intervals over prompts, and over step batches where there are
folds; everything that is cut or normalized is so in each draw.

Every table has the long form `row, quantity, k, budget, estimate, low, high, n`, and `prompts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import cuts, linear_model
from diagnostics.analysis import matching as pair_matching
from diagnostics.analysis.bootstrap import Estimate, positive_ratio
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.cuts import Drawn
from diagnostics.analysis.paper.bank import column_at
from diagnostics.analysis.paper.released import (
    BINS,
    BUCKETED,
    BUDGETS_2,
    PLANE,
    PLANES,
    PROXIES,
    SELECTORS,
)
from diagnostics.analysis.paper.sample import (
    COLUMNS,
    LONG,
    Outcome,
    Part,
    Sample,
    estimates,
    fine_order,
    finite,
    long_table,
    mean_of,
    outcomes_of,
    sample,
    supports,
)
from diagnostics.analysis.quadrants import (
    CALIPER,
    MATCHED_COLUMNS,
    QUADRANT_COLUMNS,
    matching_covariates,
    matching_space,
    plain_locations,
)
from diagnostics.analysis.rank_correlation import equal_groups, rank_shares
from diagnostics.analysis.regressions import MODELS, REGRESSION_COLUMNS, terms
from diagnostics.analysis.selection_draws import SELECTION_DRAWS, Candidates, selection_sums
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings
from diagnostics.criteria import Ranked

FIRST_Q3 = {
    "q3_compatibility": "compatibility",
    "q3_teachability_first": "teachability",
    "q3_divergence": "divergence",
}
"""Selectors that take every position of Q3 before any other, and what orders both."""
QUARTERS = 4
TRIMMED = 0.05
"""Share of a bucket at each end that is trimmed or winsorized."""
FEWEST_IN_CELL = 10
"""Positions below which a cell of a plane has no number."""


# --- gaps inside Q3: tables 1 and 6


def gaps(drawn: Drawn, columns: dict[tuple[str, float], str], *, matched: bool) -> Iterator[Part]:
    """Mean outcome of the top less the bottom third of each column inside Q3.

    Args:
        drawn: The positions of a draw.
        columns: By row and K the column that makes the thirds.
        matched: Whether matched pairs and the share of the top third that has a partner follow.

    Yields:
        `Q3 gap` (n: positions of Q3), and `matched gap` (n: pairs) and `overlap` (n: positions of
        the top third).
    """
    in_q3 = drawn.quadrants() == 3
    inside = np.flatnonzero(in_q3)
    space = matched_space(drawn, in_q3) if matched else None
    for (row, k), column in columns.items():
        group = equal_groups(rank_shares(_column(drawn, column)[inside]), 3)
        bottom, top = inside[group == 1], inside[group == 3]
        for name, values in outcomes_of(drawn):
            both = finite(top, values), finite(bottom, values)
            value = mean_of(values[both[0]]) - mean_of(values[both[1]])
            count = len(finite(inside, values))
            yield Part((name, row, "Q3 gap", k, np.nan), value, count, both)
        if space is not None:
            yield from _matched(drawn, space, top, bottom, row, k)


def _column(drawn: Drawn, name: str) -> np.ndarray:
    """[n] a column of the drawn positions as float64."""
    return drawn.tokens[name].to_numpy(dtype=np.float64)[: len(drawn.prompt)]


def matched_space(drawn: Drawn, in_q3: np.ndarray) -> np.ndarray:
    """[n, 3] where the drawn positions lie in what is matched on."""
    covariates = matching_covariates(drawn.tokens).values()
    return matching_space([values[: len(in_q3)] for values in covariates], in_q3)


def near_pairs(
    drawn: Drawn, space: np.ndarray, top: np.ndarray, bottom: np.ndarray
) -> pair_matching.Pairs:
    """Pairs of a top and its nearest bottom position of the prompt, within the caliper."""
    defined = np.isfinite(space).all(axis=1)
    sides = []
    for rows in (top, bottom):
        side = np.zeros(len(space), dtype=bool)
        side[rows] = True
        sides.append(side & defined)
    return pair_matching.match(space, *sides, drawn.prompt).within(CALIPER)


def _matched(
    drawn: Drawn, space: np.ndarray, top: np.ndarray, bottom: np.ndarray, row: str, k: float
) -> Iterator[Part]:
    near = near_pairs(drawn, space, top, bottom)
    share = len(near.treated) / len(top) if len(top) else np.nan
    for name, values in outcomes_of(drawn):
        rows = near.treated[np.isfinite(near.differences(values))]
        value = near.difference(values)
        yield Part((name, row, "matched gap", k, np.nan), value, len(rows), (rows,))
        yield Part((name, row, "overlap", k, np.nan), share, len(top), (top,))


def gap_estimates(
    positions: Sample, ks: Iterable[int] | None, bootstrap: Bootstrap
) -> dict[tuple, Estimate]:
    """The estimates of table 1, for every outcome of a sample."""
    tokens = positions.tokens
    columns = {
        (f"K = {k}", float(k)): column_at(tokens, "compatibility", k) for k in supports(tokens, ks)
    }
    require_columns(tokens, columns.values() or ["compatibility"], what="The Q3 gap")
    needs = [*MATCHED_COLUMNS, *columns.values()]
    return estimates(positions, lambda drawn: gaps(drawn, columns, matched=True), needs, bootstrap)


def proxy_estimates(
    positions: Sample, ks: Iterable[int] | None, bootstrap: Bootstrap
) -> dict[tuple, Estimate]:
    """The estimates of table 6, for every outcome of a sample."""
    tokens = positions.tokens
    columns = {
        (row, float(k)): name
        for k in supports(tokens, ks, PROXIES.values())
        for row, proxy in PROXIES.items()
        if (name := column_at(tokens, proxy, k)) in tokens
    }
    needs = [*QUADRANT_COLUMNS, *columns.values()]
    return estimates(positions, lambda drawn: gaps(drawn, columns, matched=False), needs, bootstrap)


@with_settings(bootstrap=Bootstrap)
def table_1(
    tokens: pd.DataFrame,
    *,
    ks: Iterable[int] | None = None,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 1: inside Q3, mean outcome of the top less the bottom third of compatibility.

    Args:
        tokens: A token table, one row per response position.
        ks: Sizes of the support; None takes all that the table has, and others are left out.
        outcome: `checkpoint` or `context`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form. Row `K = 16` and so on; quantities `Q3 gap` (nats; n positions of Q3),
        `matched gap` (nats; n pairs within the caliper) and `overlap` (share of the top third that
        has such a partner: how far the two thirds can be compared at all).

    Raises:
        DiagnosticsError: If the table lacks the outcome or a column.

    Reference:
        arXiv 2605.26844, table 1 and figure 3C.
    """
    found = gap_estimates(sample(tokens, outcome), ks, bootstrap)
    return long_table(found, bootstrap.level, outcome)


@with_settings(bootstrap=Bootstrap)
def table_6(
    tokens: pd.DataFrame,
    *,
    ks: Iterable[int] | None = None,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 6: the gap of table 1 with each support proxy in the place of compatibility.

    Args:
        tokens: A token table, one row per response position.
        ks: Sizes of the support; None takes all that the table has, and others are left out.
        outcome: `checkpoint` or `context`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form: rows `mass`, `bhattacharyya`, `jaccard` and `overlap`, as far as the table
        has them; quantity `Q3 gap` (nats; n positions of Q3).

    Raises:
        DiagnosticsError: If the table lacks the outcome.

    Reference:
        arXiv 2605.26844, table 6 and figures 4C and 5B.
    """
    found = proxy_estimates(sample(tokens, outcome), ks, bootstrap)
    return long_table(found, bootstrap.level, outcome)


# --- table 5


@with_settings(bootstrap=Bootstrap)
def table_5(
    tokens: pd.DataFrame,
    *,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 5: how many positions, contexts and prompts have the outcome.

    Args:
        tokens: A token table, one row per response position.
        outcome: `checkpoint` or `context`.
        bootstrap: Not used: a count has no interval.
        settings: Fields of `bootstrap`.

    Returns:
        The long form: rows `positions`, `contexts` and `prompts`, quantity `count`.

    Raises:
        DiagnosticsError: If the table lacks the outcome.

    Reference:
        arXiv 2605.26844, table 5.
    """
    positions = sample(tokens, outcome)
    defined = np.isfinite(positions.tokens[positions.columns[0]].to_numpy(dtype=np.float64))
    kept = positions.tokens[positions.mask & defined]
    counts = {
        "positions": len(kept),
        "contexts": kept["context_id"].nunique(),
        "prompts": kept["prompt_id"].nunique(),
    }
    rows = [
        (name, "count", np.nan, np.nan, float(count), np.nan, np.nan, count, counts["prompts"])
        for name, count in counts.items()
    ]
    return pd.DataFrame(rows, columns=[*LONG, "prompts"])


# --- table 8: the exact top N


class Selectors(Candidates):
    """The selectors of table 8 as candidates whose selections are made anew in every draw."""

    def ranking(self, name: str, *, copies: np.ndarray | None = None, seed: int = 0) -> Ranked:
        """The n positions by a selector; those of `FIRST_Q3` take Q3 before all others."""
        counted = None
        if copies is not None:
            counted = np.ones(len(self.tokens))
            counted[self.mask] = copies
        scores, raw = registry.score_pairs(
            self.tokens, FIRST_Q3.get(name, name), seed=seed, copies=counted
        )
        if name in FIRST_Q3:
            # A score lies in [0, 1], so every position of Q3 comes before all others.
            scores = scores + 2.0 * (registry.quadrants(self.tokens, copies=counted) == 3)
        return self.ranked(scores[self.mask], raw[self.mask])

    @cached_property
    def rankings(self) -> dict[str, list[Ranked]]:
        """By selector its ranking."""
        return {name: [self.ranking(name)] for name in self.names}

    def rankings_of(self, name: str, copies: np.ndarray | None) -> list[Ranked]:
        """The ranking in a draw, whose quantiles and medians are those of the draw's rows."""
        return self.rankings[name] if copies is None else [self.ranking(name, copies=copies)]


@dataclass(frozen=True)
class _Selected:
    """What the selectors hold of each outcome, in every pass [P, C, B]."""

    chosen: Selectors
    outcomes: dict[str, np.ndarray]

    def values(self, copies: np.ndarray | None) -> np.ndarray:
        """[n, 2 + 2 outcomes] ones, Q3, then each outcome and where it is defined."""
        counted = None
        if copies is not None:
            counted = np.ones(len(self.chosen.tokens))
            counted[self.chosen.mask] = copies
        quadrant = registry.quadrants(self.chosen.tokens, copies=counted)[self.chosen.mask]
        columns = [np.ones(len(quadrant)), (quadrant == 3).astype(np.float64)]
        for values in self.outcomes.values():
            columns += [np.nan_to_num(values), np.isfinite(values).astype(np.float64)]
        return np.stack(columns, axis=1)

    def estimates(self) -> dict[tuple, Estimate]:
        """Estimates by outcome's column, selector, quantity, K and budget."""
        draws = min(self.chosen.prompts.draws, SELECTION_DRAWS)
        sums = selection_sums(self.chosen, self.values, draws=draws)
        inside, total = sums.inside[:, :, :-1], sums.total
        rows = inside[..., 0]
        share = rows / total[:, None, None, 0]
        found: dict[tuple, Estimate] = {}
        for place, name in enumerate(self.outcomes):
            over, under = 2 + 2 * place, 3 + 2 * place
            means = positive_ratio(inside[..., over], inside[..., under])
            parts = {
                "mean gain": means,
                "gain per kept share": positive_ratio(means, share),
                "share in Q3": positive_ratio(inside[..., 1], rows),
            }
            alone = positive_ratio(total[:, over], total[:, under])
            whole = {
                "mean gain": alone[:, None],
                "gain per kept share": alone[:, None] / np.array(self._shares),
                "share in Q3": positive_ratio(total[:, 1], total[:, 0])[:, None],
            }
            for b, budget in enumerate(self.chosen.budgets):
                for quantity, passes in parts.items():
                    for c, selector in enumerate(self.chosen.names):
                        key = (name, selector, quantity, np.nan, budget)
                        found[key] = self._estimate(passes[:, c, b], rows[0, c, b])
                    at = min(b, whole[quantity].shape[1] - 1)
                    key = (name, "random", quantity, np.nan, budget)
                    found[key] = self._estimate(whole[quantity][:, at], self._counts[b])
        return found

    @property
    def _counts(self) -> list[int]:
        size = len(self.chosen.groups)
        return [registry.budget_count(size, budget) for budget in self.chosen.budgets]

    @property
    def _shares(self) -> list[float]:
        return [count / len(self.chosen.groups) for count in self._counts]

    def _estimate(self, passes: np.ndarray, positions: float) -> Estimate:
        prompts = self.chosen.prompts.count
        return Estimate(float(passes[0]), passes[1:], round(positions), prompts)

    def ties(self) -> dict[tuple, float]:
        """What ties decide, by outcome's column, selector, quantity, K and budget.

        Of r positions chosen among the m equals at the cut, `expected under ties` takes their mean
        for each, and `least` and `greatest` the r smallest and largest outcomes.
        """
        found: dict[tuple, float] = {}
        for selector in self.chosen.names:
            (ranked,) = self.chosen.rankings[selector]
            for budget in self.chosen.budgets:
                chosen = ranked.best(ranked.counts(budget))
                for name, values in self.outcomes.items():
                    for quantity, value in _tie_range(ranked, chosen, values).items():
                        found[name, selector, quantity, np.nan, budget] = value
        return found


def _tie_range(ranked: Ranked, chosen: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """The share of a selection [M] that ties decide, and what its mean outcome could be."""
    held = values[ranked.rows]
    equal = chosen & np.isin(ranked.block, ranked.block[~chosen][:1])
    cut = np.isin(ranked.block, ranked.block[equal])
    sure, among, r = held[chosen & ~cut], np.sort(held[cut]), int(equal.sum())
    among = among[np.isfinite(among)]
    drawn = np.full(r, among.mean()) if r and len(among) else np.empty(0)
    return {
        "tied share": ranked.ambiguous(chosen),
        "expected under ties": mean_of(np.r_[sure, drawn]),
        "least": mean_of(np.r_[sure, among[:r]]),
        "greatest": mean_of(np.r_[sure, among[len(among) - r :] if r else among[:0]]),
    }


def _selected(
    positions: Sample, tokens: pd.DataFrame, budgets: Iterable[float], bootstrap: Bootstrap
) -> _Selected:
    split = positions.split(tokens, bootstrap)
    names = tuple(
        name
        for name in SELECTORS
        if name != "random" and not registry.missing_columns(tokens, FIRST_Q3.get(name, name))
    )
    chosen = Selectors(
        tokens, split.mask, split.prompts, names, tuple(sorted(set(budgets))), seed=bootstrap.seed
    )
    return _Selected(chosen, {name: split.values(tokens, name) for name in positions.columns})


def selector_table(
    positions: Sample, budgets: Iterable[float], bootstrap: Bootstrap
) -> tuple[dict[tuple, Estimate], dict[tuple, float]]:
    """The estimates of table 8 and what ties decide, for every outcome of a sample."""
    budgets = tuple(budgets)
    found = over_steps(
        lambda tokens, how: _selected(positions, tokens, budgets, how).estimates(),
        positions.tokens,
        bootstrap,
        whole=True,
    )
    return found, _selected(
        positions, positions.tokens, budgets, replace(bootstrap, draws=0)
    ).ties()


def with_ties(
    found: dict[tuple, Estimate], ties: dict[tuple, float], level: float, outcome: str
) -> pd.DataFrame:
    """The long form of table 8: estimates with intervals, and what ties decide without."""
    table = long_table(found, level, outcome)
    n = {(row.row, row.budget): (row.n, row.prompts) for row in table.itertuples()}
    rows = [
        (row, quantity, k, budget, value, np.nan, np.nan, *n[row, budget])
        for (column, row, quantity, k, budget), value in ties.items()
        if column == COLUMNS[outcome]
    ]
    return pd.concat([table, pd.DataFrame(rows, columns=table.columns)], ignore_index=True)


@with_settings(bootstrap=Bootstrap)
def table_8(
    tokens: pd.DataFrame,
    *,
    budgets: Iterable[float] = BUDGETS_2,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 8: the mean outcome of what each selector selects.

    A budget keeps ceil(budget * N) positions; equal scores are ordered by their unclipped form.
    `random` is what a random selection gives on average, the mean over all positions.

    Args:
        tokens: A token table, one row per response position.
        budgets: Shares of the positions, in (0, 1].
        outcome: `checkpoint` or `context`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form: rows as `SELECTORS`, as far as the columns allow; quantities `mean gain`
        (nats), `gain per kept share`, `share in Q3`, and without intervals `tied share` (what
        equals of unclipped score decide), `expected under ties`, `least` and `greatest` (nats); n
        positions selected.

    Raises:
        DiagnosticsError: If the table lacks the outcome, or a budget is outside (0, 1].

    Reference:
        arXiv 2605.26844, table 8 and figures 4A and 4B.
    """
    found, ties = selector_table(sample(tokens, outcome), budgets, bootstrap)
    return with_ties(found, ties, bootstrap.level, outcome)


# --- table 9: the regression on D^L and D^I


def _union(tokens: pd.DataFrame, k: int) -> str | None:
    """The union's divergence at K; None where the table has none, and the full one is read."""
    column = column_at(tokens, "union_forward_kl", k)
    return column if column in tokens else None


def coefficients(drawn: Drawn, substitutes: dict[int, dict[str, str]]) -> Iterator[Part]:
    """Coefficients of D^L and D^I, their difference, and what they add to R^2, for every K.

    Args:
        drawn: The positions of a draw.
        substitutes: By K the columns that are read in the place of those without a suffix.
    """
    n = len(drawn.prompt)
    for k, substitute in substitutes.items():
        found = {
            name: values[:n] for name, values in terms(drawn.tokens, substitute=substitute).items()
        }
        names = list(found)
        design = np.stack(list(found.values()))
        defined = np.isfinite(design).all(axis=0)
        for outcome, values in outcomes_of(drawn):
            rows = np.flatnonzero(defined & np.isfinite(values))
            numbers = _coefficients(names, design[:, rows], values[rows])
            for quantity, value in numbers.items():
                key = (outcome, f"K = {k}", quantity, float(k), np.nan)
                yield Part(key, value, len(rows), (rows,))


def _coefficients(names: list[str], design: np.ndarray, values: np.ndarray) -> dict[str, float]:
    matrix, _ = linear_model.correlation_matrix(np.vstack([design, values]))
    fits = {}
    for model in ("interaction", "decomposition"):
        chosen = [term for term in MODELS[model] if term in names]
        at = [names.index(term) for term in chosen]
        beta, explained = linear_model.standardized_fits(matrix, at, [len(names)])
        enough = design.shape[1] >= len(chosen) + 3
        fits[model] = dict(zip(chosen, beta[:, 0] if enough else np.full(len(chosen), np.nan)))
        fits[model]["R2"] = explained[0] if enough else np.nan
    within, outside = (fits["decomposition"][name] for name in ("teachability", "incompatible"))
    return {
        "coefficient of D^L": float(within),
        "coefficient of D^I": float(outside),
        "difference of coefficients": float(within - outside),
        "R2 gained": float(fits["decomposition"]["R2"] - fits["interaction"]["R2"]),
    }


def coefficient_estimates(
    positions: Sample, ks: Iterable[int] | None, bootstrap: Bootstrap
) -> dict[tuple, Estimate]:
    """The estimates of table 9, for every outcome of a sample."""
    tokens = positions.tokens
    # A K without its own union reads the divergence over the whole vocabulary.
    substitutes = {
        k: {
            "compatibility": column_at(tokens, "compatibility", k),
            "union_forward_kl": _union(tokens, k) or "forward_kl",
        }
        for k in supports(tokens, ks)
    }
    further = ["teacher_entropy"] if "teacher_entropy" in tokens else []
    read = [name for columns in substitutes.values() for name in columns.values()]
    fixed = [name for name in REGRESSION_COLUMNS if name != "compatibility"]
    require_columns(tokens, [*fixed, *read] or ["compatibility"], what="The regression of table 9")
    needs = [*REGRESSION_COLUMNS, *further, *read]
    return estimates(positions, lambda drawn: coefficients(drawn, substitutes), needs, bootstrap)


@with_settings(bootstrap=Bootstrap)
def table_9(
    tokens: pd.DataFrame,
    *,
    ks: Iterable[int] | None = None,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Table 9: standardized coefficients of d*c and d*(1 - c), and what they add to R^2.

    Args:
        tokens: A token table, one row per response position.
        ks: Sizes of the support; None takes all that the table has, and others are left out.
        outcome: `checkpoint` or `context`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form: row `K = 16` and so on; quantities `coefficient of D^L`, `coefficient of
        D^I`, `difference of coefficients` (all standardized) and `R2 gained` (over the model with
        h*d in the place of the two); n positions.

    Raises:
        DiagnosticsError: If the table lacks the outcome or a column.

    Reference:
        arXiv 2605.26844, table 9 and figure 3A.
    """
    found = coefficient_estimates(sample(tokens, outcome), ks, bootstrap)
    return long_table(found, bootstrap.level, outcome)


# --- buckets: figures 4D and 5C

STATISTICS = {"mean": 0, "trimmed mean": 2, "winsorized mean": 3}
"""Statistics of a bucket, and the place of each among `quadrants.plain_locations`."""


def bucket_means(drawn: Drawn, scores: Iterable[str]) -> Iterator[Part]:
    """Means of the outcome in the quarters of each score inside Q3."""
    inside = np.flatnonzero(drawn.quadrants() == 3)
    for score in scores:
        quarter = equal_groups(rank_shares(fine_order(drawn, score)[inside]), QUARTERS)
        for number in range(QUARTERS):
            bucket = inside[quarter == number + 1]
            for outcome, values in outcomes_of(drawn):
                rows = finite(bucket, values)
                found = plain_locations(values[rows], TRIMMED)
                for statistic, place in STATISTICS.items():
                    quantity = f"{statistic} of bucket {number}"
                    key = (outcome, score, quantity, np.nan, np.nan)
                    yield Part(key, found[place], len(rows), (rows,))


def bucket_estimates(positions: Sample, bootstrap: Bootstrap) -> dict[tuple, Estimate]:
    """The estimates of the buckets, for every outcome of a sample."""
    tokens = positions.tokens
    scores = [name for name in BUCKETED if not registry.missing_columns(tokens, name)]
    needs = cuts.needed_columns(tokens, scores, QUADRANT_COLUMNS)
    return estimates(positions, lambda drawn: bucket_means(drawn, scores), needs, bootstrap)


@with_settings(bootstrap=Bootstrap)
def buckets(
    tokens: pd.DataFrame,
    *,
    outcome: Outcome = "checkpoint",
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Figures 4D and 5C: means of the outcome in four quarters of each score inside Q3.

    Quarters are made by rank, and equal scores are ordered by their unclipped form; what is equal
    even then stays together.

    Args:
        tokens: A token table, one row per response position.
        outcome: `checkpoint` or `context`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        The long form: rows as `BUCKETED`, as far as the columns allow; quantities `mean of bucket
        0` (the lowest) to `3`, and the same for `trimmed mean` and `winsorized mean` (5 % at each
        end of the bucket), in nats; n positions.

    Raises:
        DiagnosticsError: If the table lacks the outcome.

    Reference:
        arXiv 2605.26844, figures 4D and 5C.
    """
    found = bucket_estimates(sample(tokens, outcome), bootstrap)
    return long_table(found, bootstrap.level, outcome)


# --- planes: figures 2A to 2C


def bins_for(positions: int) -> int:
    """Bins of each axis that leave a cell twice the fewest positions on average, 2 to `BINS`."""
    return int(np.clip(np.sqrt(positions / (2 * FEWEST_IN_CELL)), 2, BINS))


def planes(
    tokens: pd.DataFrame,
    *,
    bins: int = BINS,
    fewest: int = FEWEST_IN_CELL,
    outcome: Outcome = "checkpoint",
) -> pd.DataFrame:
    """Figures 2A to 2C: means over the percentiles of two scores.

    Args:
        tokens: A token table, one row per response position.
        bins: Bins of each axis, equal in percentiles.
        fewest: Number of positions below which a cell has no number.
        outcome: `checkpoint` or `context`, for figure 2A; 2B and 2C hold no outcome, and are the
            same for both.

    Returns:
        Columns figure, x_bin, y_bin (from 0), x_low, x_high, y_low, y_high (shares of the
        positions), positions, estimate: the mean outcome in nats over the percentiles of d*c (x)
        and d*(1 - c) (y) in 2A, and the mean percentile (0 to 1) of d*c (2B) and d*(1 - c) (2C)
        over those of student entropy (x) and forward KL (y). Cells without a position have no row,
        and those with fewer than `fewest` no estimate.

    Raises:
        DiagnosticsError: If the table lacks the outcome or a column.
    """
    positions = sample(tokens, outcome)
    names = list(dict.fromkeys(name for each in PLANES.values() for name in each if name))
    needs = cuts.needed_columns(positions.tokens, names)
    require_columns(positions.tokens, needs, what="A plane of percentiles")
    split = positions.split(positions.tokens, Bootstrap(draws=0))
    drawn = cuts.whole(positions.tokens, [split], needs, positions.columns)
    percentile = {name: rank_shares(fine_order(drawn, name)) for name in names}
    ((_, gain),) = outcomes_of(drawn)
    parts = [
        _plane(figure, percentile[x], percentile[y], percentile.get(shown or "", gain), bins)
        for figure, (x, y, shown) in PLANES.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(estimate=table["estimate"].where(table["positions"] >= fewest))


def _plane(figure: str, x: np.ndarray, y: np.ndarray, shown: np.ndarray, bins: int) -> pd.DataFrame:
    defined = np.isfinite(x) & np.isfinite(y) & np.isfinite(shown)
    frame = pd.DataFrame(
        {
            "x_bin": equal_groups(x, bins)[defined] - 1,
            "y_bin": equal_groups(y, bins)[defined] - 1,
            "shown": shown[defined],
        }
    )
    cells = frame.groupby(["x_bin", "y_bin"])["shown"].agg(["size", "mean"]).reset_index()
    edges = {
        f"{axis}_{end}": (cells[f"{axis}_bin"] + shift) / bins
        for axis in ("x", "y")
        for end, shift in (("low", 0), ("high", 1))
    }
    return cells.assign(figure=figure, positions=cells["size"], estimate=cells["mean"], **edges)[
        PLANE
    ]
