"""Correlations of outcomes with criteria: a token table in, a table with intervals out.

Scores are normalized over the whole table; a population only chooses which positions count. The
outcomes are those of the study, and `gain_permuted` beside them: the gain after a step towards a
permuted teacher, which is the null. A correlation of the gain that the permuted gain shares needs
no teacher that knows the context; `context_gain`, the difference of the two, does. Every interval
resamples prompts and carries the step batches (see `bootstrap` and `step_batches`); every table has
its numbers of positions, prompts and steps.

Spearman's ranks are made anew in every draw. Scores are normalized once.

Departures from the scripts released with arXiv 2605.26844: predictors come from before the step
only, and the cluster is the prompt, not the context.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import prompt_groups, rank_correlation
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.rank_correlation import Controls, Variable
from diagnostics.analysis.splits import (
    NULL_OUTCOME,
    Split,
    controls,
    outcomes_and_null,
    same_positions,
    scores,
    splits,
    table,
)
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.inputs import several, takes, token_table
from diagnostics.core.settings import with_settings

CORRELATION_METHODS = ("spearman", "pearson", "kendall")
LINEAR_OUTCOMES = ("context_gain", "gain", NULL_OUTCOME)
"""Outcomes with Pearson's and Kendall's correlations beside Spearman's."""
KEY = ("outcome", "criterion", "split", "method")
Associations = dict[tuple[str, str, str, str], Estimate]
"""Correlations by (outcome, criterion, population, method)."""


@with_settings(bootstrap=Bootstrap)
def associate(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    methods: Iterable[str] = CORRELATION_METHODS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> Associations:
    """Every correlation with its draws, from which `correlate` and its sister tables are made.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        criteria: Names or aliases; None takes all that the table's columns allow.
        methods: Some of spearman, pearson, kendall.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Estimates by outcome, criterion, population and method.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a criterion needs.
    """
    methods = tuple(methods)
    names = outcomes_and_null(tokens)
    criteria = None if criteria is None else list(criteria)

    def scored(table: pd.DataFrame) -> dict[str, np.ndarray]:
        return scores(table, criteria, seed=bootstrap.seed)

    def make(table: pd.DataFrame, settings: Bootstrap, scored: dict) -> Associations:
        found: Associations = {}
        for together in same_positions(splits(table, bootstrap=settings)):
            found |= _associations(table, together, scored, names, methods)
        return found

    found = over_steps(make, tokens, bootstrap, before=scored)
    order, compared = (dict.fromkeys(key[place] for key in found) for place in (2, 1))
    return {
        key: found[key]
        for split in order
        for outcome in names
        for criterion in compared
        for method in methods
        if (key := (outcome, criterion, split, method)) in found
    }


def _associations(
    tokens: pd.DataFrame,
    together: list[Split],
    scored: dict[str, np.ndarray],
    names: list[str],
    methods: tuple[str, ...],
) -> Associations:
    """Correlations on populations of the same positions, so that scores are ranked once for all."""
    mask, prompts = together[0].mask, together[0].prompts
    variables = {name: Variable(score[mask]) for name, score in scored.items()}
    values = {
        (split.name, outcome): Variable(split.values(tokens, outcome))
        for split in together
        for outcome in names
    }
    found: Associations = {}
    if "spearman" in methods:
        ranked = rank_correlation.spearman_pairs(variables, values, prompts)
        for ((split, outcome), score), estimate in ranked.items():
            found[outcome, score, split, "spearman"] = estimate
    linear = {key: y for key, y in values.items() if key[1] in LINEAR_OUTCOMES}
    if "pearson" in methods:
        for ((split, outcome), score), estimate in _pearson(variables, linear, prompts).items():
            found[outcome, score, split, "pearson"] = estimate
    if "kendall" in methods:
        counted = _counted(variables, linear, prompts, prompt_groups.is_group(tokens))
        for (split, outcome), y in counted[1].items():
            for score, x in counted[0].items():
                tau = rank_correlation.kendall(x, y, counted[2])
                found[outcome, score, split, "kendall"] = tau
    return found


def _pearson(
    variables: dict[str, Variable], values: dict, prompts: PromptClusters
) -> dict[tuple, Estimate]:
    """Pearson's correlations by ((population, outcome), criterion)."""
    if not prompts.draws:
        return rank_correlation.values_of_pairs(variables, values, prompts, ranked=False)
    return {
        (key, score): rank_correlation.pearson(x, y, prompts)
        for key, y in values.items()
        for score, x in variables.items()
    }


KENDALL_POSITIONS = 10_000
"""Positions of a group of prompts whose pairs are counted, which takes more than linear time. The
spread over groups is then that of these positions, so the interval knows of it."""


def _counted(
    variables: dict[str, Variable], values: dict, prompts: PromptClusters, group: bool
) -> tuple[dict[str, Variable], dict, PromptClusters]:
    """The variables whose pairs are counted: all, and in a group those of its first prompts."""
    if not group or len(prompts.codes) <= KENDALL_POSITIONS:
        return variables, values, prompts
    first = prompts.codes < max(1, prompts.count * KENDALL_POSITIONS // len(prompts.codes))
    some = PromptClusters(prompts.codes[first], draws=prompts.draws, seed=prompts.seed)
    scores, outcomes = (
        {name: Variable(each.values[first]) for name, each in pool.items()}
        for pool in (variables, values)
    )
    return scores, outcomes, some


@takes(tokens=token_table, criteria=several)
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
        One row per combination, with columns outcome (context_gain, gain, gain_permuted: the null,
        reverse_gain, relative_gain), criterion, split (held_out, step or all), method (spearman;
        for the first three outcomes pearson and kendall too), estimate, low, high, p_value,
        positions, prompts, steps. A constant score gives NaN.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a criterion needs.

    Reference:
        arXiv 2605.26844 (the correlations); Cameron and Miller 2015 (clustered intervals).
    """
    return correlation_table(
        associate(tokens, criteria=criteria, bootstrap=bootstrap), level=bootstrap.level
    )


def correlation_table(found: Associations, *, level: float) -> pd.DataFrame:
    """The table of `correlate` from correlations that are made already."""
    return table(found, KEY, level, tested=True)


def correlation_differences(
    found: Associations, *, level: float, method: str = "spearman"
) -> pd.DataFrame:
    """Correlation of `criterion` minus correlation of `other`, for every pair, paired over prompts
    and steps.

    Args:
        found: As from `associate`.
        level: Coverage of the intervals.
        method: The correlation that is compared.

    Returns:
        Columns outcome, criterion, other, split, method, difference, low, high, p_value (against 0,
        not corrected for the number of pairs), positions, prompts, steps.
    """
    alike: dict[tuple[str, str], dict[str, Estimate]] = defaultdict(dict)
    for (outcome, criterion, split, how), estimate in found.items():
        if how == method:
            alike[outcome, split][criterion] = estimate
    differences = {
        (outcome, first, second, split, method): same[first] - same[second]
        for (outcome, split), same in alike.items()
        for first, second in combinations(same, 2)
    }
    names = ("outcome", "criterion", "other", "split", "method")
    return table(differences, names, level, named="difference", tested=True)


@takes(tokens=token_table, criteria=several)
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

    def values(scores, outcomes, held, prompts, method):
        return rank_correlation.values_of_pairs(
            scores, outcomes, prompts, ranked=method == "spearman", controls=held
        )

    return _correlations_of(
        tokens,
        statistic,
        ("spearman", "pearson"),
        criteria,
        controls,
        bootstrap=bootstrap,
        values=values,
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
        tokens, statistic, CORRELATION_METHODS, criteria, lambda _: {}, bootstrap=bootstrap
    )


def _correlations_of(
    tokens: pd.DataFrame,
    statistic: Callable,
    methods: Iterable[str],
    criteria,
    columns: Callable[[pd.DataFrame], dict[str, np.ndarray]],
    *,
    bootstrap: Bootstrap,
    values: Callable | None = None,
) -> pd.DataFrame:
    """statistic(x, y, what is held fixed, prompts, method) for every outcome, criterion, population
    and method; without draws `values` of all scores and outcomes at once, where it is given.
    """
    criteria = None if criteria is None else list(criteria)

    def before(tokens: pd.DataFrame) -> tuple[dict, dict]:
        return scores(tokens, criteria, seed=bootstrap.seed), columns(tokens)

    def make(tokens: pd.DataFrame, settings: Bootstrap, fixed: tuple[dict, dict]) -> Associations:
        found: Associations = {}
        scored, kept = fixed
        for split in splits(tokens, bootstrap=settings):
            variables = {name: Variable(score[split.mask]) for name, score in scored.items()}
            held = Controls([column[split.mask] for column in kept.values()])
            names = outcomes_and_null(tokens)
            pool = {outcome: Variable(split.values(tokens, outcome)) for outcome in names}
            if values is not None and not settings.draws:
                for method in methods:
                    made = values(variables, pool, held, split.prompts, method)
                    for outcome, name in made:
                        found[outcome, name, split.name, method] = made[outcome, name]
                continue
            for outcome, y in pool.items():
                for name, x in variables.items():
                    for method in methods:
                        found[outcome, name, split.name, method] = statistic(
                            x, y, held, split.prompts, method
                        )
        return found

    found = over_steps(make, tokens, bootstrap, before=before)
    return correlation_table(found, level=bootstrap.level)
