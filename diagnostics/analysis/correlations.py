"""Correlations and contrasts: a token table in, a DataFrame with intervals out.

Scores are normalised over the whole table; a split only chooses which positions count. The outcomes
are `gain` and `reverse_gain` in nats and `relative_gain` as a fraction. The placebo of an outcome
is the same quantity after a random step of the same norm: what having D on both sides gives alone.
Every interval resamples prompts (see `statistics`); every table carries its positions and prompts.

Q3, the confident and wrong positions, is h <= median and d >= median (see `criteria.quadrants`).

Departures from the scripts released with arXiv 2605.26844: predictors come from before the step
only; the cluster is the prompt, not the context; matching pairs the top with the bottom tertile of
all Q3 positions (there: above with below the prompt's own median), with replacement as there,
without, and within a caliper."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from diagnostics.analysis import rank_correlation
from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.rank_correlation import Controls, Variable
from diagnostics.analysis.splits import controls, outcomes, row, scores, splits

METHODS: dict[str, Callable] = {
    "spearman": rank_correlation.spearman,
    "pearson": rank_correlation.pearson,
    "kendall": rank_correlation.kendall,
}
CALIPER = 0.5
"""Distance, in standard deviations within Q3, beyond which two positions do not count as alike."""


@dataclass(frozen=True)
class Association:
    """The correlation of one outcome with one criterion on one split, and its placebo's."""

    outcome: str
    criterion: str
    split: str
    method: str
    estimate: Estimate
    placebo: Estimate

    @property
    def key(self) -> dict:
        """What names it in a table."""
        return {name: getattr(self, name) for name in ("outcome", "criterion", "split", "method")}


def associate(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    methods: Iterable[str] = tuple(METHODS),
    draws: int = 1000,
    seed: int = 0,
) -> list[Association]:
    """Every correlation with its draws: what `correlate` and its sister tables are read from."""
    scored, found = scores(tokens, criteria, seed=seed), []
    methods = tuple(methods)
    for split in splits(tokens, draws=draws, seed=seed):
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
                    *(METHODS[method](score, y, split.prompts) for y in (values, placebo)),
                )
                for name, score in variables.items()
                for method in methods
            ]
    return found


def correlate(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation of every outcome with every criterion, in long form.

    criteria: names or aliases; None takes all that the table's columns allow. Returns columns
    outcome, criterion, split (all, step, held_out), method (spearman, pearson, kendall), estimate,
    low, high, placebo, positions, prompts. `placebo` is the correlation with the outcome's placebo,
    NaN without one. Undefined pairs are left out position by position; a constant score gives NaN.
    Raises DiagnosticsError where the table holds no outcome or lacks a criterion's columns."""
    return correlation_table(
        associate(tokens, criteria=criteria, draws=draws, seed=seed), level=level
    )


def correlation_table(associations: list[Association], *, level: float) -> pd.DataFrame:
    """`correlate` from associations already made."""
    return pd.DataFrame(
        [a.key | row(a.estimate, level, placebo=a.placebo.value) for a in associations]
    )


def placebo_excess(associations: list[Association], *, level: float) -> pd.DataFrame:
    """Each correlation minus its placebo's, paired over prompts; columns as `correlate`, `excess`
    for estimate.
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

    Returns columns outcome, criterion, other, split, method, difference, low, high, p_value
    (against 0, not corrected for the number of pairs), positions, prompts."""
    rows, alike = [], defaultdict(list)
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


def partial_correlations(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation of every outcome with every criterion given (h, d, relative position).

    Columns as `correlate`; method is spearman (of ranks) or pearson. NaN where the controls
    determine the criterion, as they do `entropy`."""

    def statistic(x, y, held, prompts, method):
        return rank_correlation.partial(x, y, held, prompts, ranked=method == "spearman")

    return _each(
        tokens,
        statistic,
        ("spearman", "pearson"),
        criteria,
        controls(tokens),
        draws=draws,
        level=level,
        seed=seed,
    )


def within_prompt_correlations(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean over prompts of the correlation within a prompt, so that no difference between prompts
    enters.

    Columns as `correlate`. Prompts with fewer than five defined positions, or
    with a constant, are left out and not counted.
    """

    def statistic(x, y, held, prompts, method):
        return rank_correlation.within_prompts(x, y, prompts, method=method)

    return _each(tokens, statistic, METHODS, criteria, {}, draws=draws, level=level, seed=seed)


def _each(
    tokens: pd.DataFrame,
    statistic: Callable,
    methods: Iterable[str],
    criteria,
    fixed: dict[str, np.ndarray],
    *,
    draws: int,
    level: float,
    seed: int,
) -> pd.DataFrame:
    """statistic(x, y, what is held fixed, prompts, method) for every outcome, criterion, split and
    method.
    """
    scored, rows = scores(tokens, criteria, seed=seed), []
    for split in splits(tokens, draws=draws, seed=seed):
        variables = {name: Variable(score[split.mask]) for name, score in scored.items()}
        held, bare = (
            Controls([column[split.mask] for column in fixed.values()]),
            split.prompts.without_draws(),
        )
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
                        | row(statistic(x, y, held, split.prompts, method), level, placebo=control)
                    )
    return pd.DataFrame(rows)
