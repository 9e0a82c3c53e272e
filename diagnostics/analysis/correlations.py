"""Correlations of outcomes with criteria: a token table in, a table with intervals out.

Scores are normalized over the whole table; a split only chooses which positions count. The outcomes
are `gain` and `reverse_gain` in nats and `relative_gain` as a fraction. The placebo of an outcome
is the same quantity after a random step of the same norm: D enters both the criterion and the gain,
and the placebo's correlation measures that mechanical coupling. Every interval resamples prompts
(see `bootstrap`); every table carries its numbers of positions and prompts.

Q3, the confident and wrong positions, is h <= median and d >= median (see `criteria.quadrants`).

Departures from the scripts released with arXiv 2605.26844: predictors come from before the step
only; the cluster is the prompt, not the context; matching pairs the top with the bottom tertile of
all Q3 positions (there: above with below the prompt's own median), with replacement as there,
without, and within a caliper.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import rank_correlation
from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.rank_correlation import Controls, Variable
from diagnostics.analysis.splits import controls, outcomes, row, scores, splits
from diagnostics.core.settings import with_settings

CORRELATION_METHODS: dict[str, Callable] = {
    "spearman": rank_correlation.spearman,
    "pearson": rank_correlation.pearson,
    "kendall": rank_correlation.kendall,
}
CALIPER = 0.5
"""Distance, in standard deviations within Q3, beyond which two positions do not count as alike."""


@dataclass(frozen=True)
class Association:
    """The correlation of one outcome with one criterion on one split, and its placebo's.

    Attributes:
        outcome: Column of the outcome.
        criterion: Name of the criterion.
        split: `all`, `step` or `held_out`.
        method: spearman, pearson or kendall.
        estimate: The correlation.
        placebo: The correlation with the outcome's placebo, NaN without one.
    """

    outcome: str
    criterion: str
    split: str
    method: str
    estimate: Estimate
    placebo: Estimate

    @property
    def key(self) -> dict:
        """The columns that name it in a table."""
        return {name: getattr(self, name) for name in ("outcome", "criterion", "split", "method")}


@with_settings(bootstrap=Bootstrap)
def associate(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    methods: Iterable[str] = tuple(CORRELATION_METHODS),
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> list[Association]:
    """Every correlation with its draws, from which `correlate` and its sister tables are made.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        methods: Some of spearman, pearson, kendall.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One association per outcome, criterion, split and method.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a criterion needs.
    """
    scored = scores(tokens, criteria, seed=bootstrap.seed)
    found = []
    methods = tuple(methods)
    for split in splits(tokens, bootstrap=bootstrap):
        variables = {name: Variable(score[split.mask]) for name, score in scored.items()}
        for outcome in outcomes(tokens):
            values, placebo = (
                Variable(split.values(tokens, name)) for name in (outcome, f"placebo_{outcome}")
            )
            found += [
                Association(
                    outcome,
                    name,
                    split.name,
                    method,
                    *(
                        CORRELATION_METHODS[method](score, y, split.prompts)
                        for y in (values, placebo)
                    ),
                )
                for name, score in variables.items()
                for method in methods
            ]
    return found


@with_settings(bootstrap=Bootstrap)
def correlate(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Correlation of every outcome with every criterion, in long form.

    Undefined pairs are left out position by position.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per combination, with columns outcome, criterion, split (all, step, held_out),
        method (spearman, pearson, kendall), estimate, low, high, placebo, positions, prompts.
        `placebo` is the correlation with the outcome's placebo, NaN without one. A constant score
        gives NaN.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a criterion needs.

    Reference:
        arXiv 2605.26844 (the correlations); Cameron and Miller 2015 (clustered intervals).
    """
    return correlation_table(
        associate(tokens, criteria=criteria, bootstrap=bootstrap), level=bootstrap.level
    )


def correlation_table(associations: list[Association], *, level: float) -> pd.DataFrame:
    """The table of `correlate` from associations that are made already."""
    return pd.DataFrame(
        [a.key | row(a.estimate, level, placebo=a.placebo.value) for a in associations]
    )


def placebo_excess(associations: list[Association], *, level: float) -> pd.DataFrame:
    """Each correlation minus its placebo's, paired over prompts.

    The columns are those of `correlate`, with `excess` in place of `estimate`.
    """
    return pd.DataFrame(
        [
            a.key | row(a.estimate - a.placebo, level, named="excess")
            for a in associations
            if np.isfinite(a.placebo.value)
        ]
    )


def correlation_differences(associations: list[Association], *, level: float) -> pd.DataFrame:
    """Correlation of `criterion` minus correlation of `other`, for every pair and method, paired
    over prompts.

    Args:
        associations: As from `associate`.
        level: Coverage of the intervals.

    Returns:
        Columns outcome, criterion, other, split, method, difference, low, high, p_value (against 0,
        not corrected for the number of pairs), positions, prompts.
    """
    rows = []
    alike = defaultdict(list)
    for association in associations:
        alike[association.outcome, association.split, association.method].append(association)
    for (outcome, split, method), same in alike.items():
        for first, second in combinations(same, 2):
            difference = first.estimate - second.estimate
            key = {
                "outcome": outcome,
                "criterion": first.criterion,
                "other": second.criterion,
                "split": split,
                "method": method,
            }
            rows.append(
                key | row(difference, level, named="difference", p_value=difference.p_value)
            )
    return pd.DataFrame(rows)


@with_settings(bootstrap=Bootstrap)
def partial_correlations(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Correlation of every outcome with every criterion given (h, d, relative position).

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns as from `correlate`; method is spearman (of ranks) or pearson. NaN where the
        controls determine the criterion, as they determine `entropy`.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a criterion needs.
    """

    def statistic(x, y, held, prompts, method):
        return rank_correlation.partial(x, y, held, prompts, ranked=method == "spearman")

    return _correlations_of(
        tokens,
        statistic,
        ("spearman", "pearson"),
        criteria,
        controls(tokens),
        bootstrap=bootstrap,
    )


@with_settings(bootstrap=Bootstrap)
def within_prompt_correlations(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Mean over prompts of the correlation within a prompt, which no difference between prompts
    can enter.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns as from `correlate`. Prompts with fewer than five defined positions, or with a
        constant, are left out and not counted.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a criterion needs.
    """

    def statistic(x, y, held, prompts, method):
        return rank_correlation.within_prompts(x, y, prompts, method=method)

    return _correlations_of(
        tokens, statistic, CORRELATION_METHODS, criteria, {}, bootstrap=bootstrap
    )


def _correlations_of(
    tokens: pd.DataFrame,
    statistic: Callable,
    methods: Iterable[str],
    criteria,
    fixed: dict[str, np.ndarray],
    *,
    bootstrap: Bootstrap,
) -> pd.DataFrame:
    """statistic(x, y, what is held fixed, prompts, method) for every outcome, criterion, split and
    method.
    """
    scored = scores(tokens, criteria, seed=bootstrap.seed)
    rows = []
    for split in splits(tokens, bootstrap=bootstrap):
        variables = {name: Variable(score[split.mask]) for name, score in scored.items()}
        held = Controls([column[split.mask] for column in fixed.values()])
        bare = split.prompts.without_draws()
        for outcome in outcomes(tokens):
            y, placebo = (
                Variable(split.values(tokens, name)) for name in (outcome, f"placebo_{outcome}")
            )
            for name, x in variables.items():
                for method in methods:
                    key = {
                        "outcome": outcome,
                        "criterion": name,
                        "split": split.name,
                        "method": method,
                    }
                    control = statistic(x, placebo, held, bare, method).value
                    rows.append(
                        key
                        | row(
                            statistic(x, y, held, split.prompts, method),
                            bootstrap.level,
                            placebo=control,
                        )
                    )
    return pd.DataFrame(rows)
