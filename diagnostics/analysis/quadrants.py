"""The four quadrants of entropy and divergence, and contrasts inside Q3.

Q3, the confident and wrong positions, is h <= median and d >= median (see `criteria.quadrants`).
Medians, quantiles, tertiles, matched pairs and their scale are made anew in every draw (`cuts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis import cuts
from diagnostics.analysis import matching as pair_matching
from diagnostics.analysis.bootstrap import Estimate, mean
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.cuts import Drawn
from diagnostics.analysis.rank_correlation import equal_groups, rank_shares
from diagnostics.analysis.splits import (
    Split,
    outcomes_and_null,
    same_positions,
    splits,
    table,
)
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core.inputs import several, takes, token_table
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings
from diagnostics.criteria import normalize, relative_position

Q3_SCORES = ("compatibility", "teachability", "incompatible", "divergence")
MATCHED_SCORES = ("compatibility", "teachability", "incompatible")
GROUP_COUNTS = {"tertile": 3, "quartile": 4}
QUADRANT_NAMES = {0: "all", 1: "Q1", 2: "Q2", 3: "Q3", 4: "Q4"}
QUADRANT_COLUMNS = ("student_entropy", "forward_kl")
MATCHED_COLUMNS = ("student_entropy", "forward_kl", "position", "response_length")
LOCATIONS = ("mean", "median", "trimmed_mean", "winsorised_mean")
CALIPER = 0.5
"""Distance, in standard deviations within Q3, beyond which two positions do not count as alike."""
CALIPERS = (np.inf, CALIPER)
Means = dict[tuple[str, str, str, int, int], Estimate]
"""Means by (outcome, population, score, number of groups, group)."""


@with_settings(bootstrap=Bootstrap)
def quadrant_means(
    tokens: pd.DataFrame,
    *,
    share: float = 0.05,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Mean, median, trimmed and winsorized mean of every outcome in each quadrant and over all.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        share: Share of the values at each end that is trimmed or winsorized.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, quadrant (all, Q1..Q4), statistic, estimate, low, high, share (of
        the population's positions that lie in the quadrant), positions, prompts, steps.
    """
    names = outcomes_and_null(tokens)

    def statistic(drawn: Drawn) -> np.ndarray:
        quadrant = drawn.quadrants()
        parts = [quadrant == number if number else slice(None) for number in QUADRANT_NAMES]
        return np.array(
            [
                plain_locations(values[part], share)
                for values in drawn.values.values()
                for part in parts
            ]
        ).ravel()

    def make(tokens: pd.DataFrame, settings: Bootstrap) -> dict[tuple, Estimate]:
        found = {}
        for together in same_positions(splits(tokens, bootstrap=settings)):
            drawn = cuts.whole(tokens, together, QUADRANT_COLUMNS, names)
            estimates = iter(cuts.redrawn(statistic, tokens, together, QUADRANT_COLUMNS, names))
            quadrant = drawn.quadrants()
            for (split, outcome), values in drawn.values.items():
                for number, name in QUADRANT_NAMES.items():
                    mask = np.isfinite(values) & ((quadrant == number) | (number == 0))
                    for location in LOCATIONS:
                        found[outcome, split, name, location] = cuts.counted(
                            next(estimates), mask, drawn.prompt
                        )
        return found

    found = over_steps(make, tokens, bootstrap)
    shares = {key: {"share": part} for key, part in _quadrant_shares(tokens, found).items()}
    keys = ("outcome", "split", "quadrant", "statistic")
    return table(_in_order(found, names), keys, bootstrap.level, more=shares)


def _in_order(found: dict[tuple, Estimate], names: list[str]) -> dict[tuple, Estimate]:
    """Estimates whose keys begin with (outcome, population), by population and outcome."""
    places = list(dict.fromkeys(key[1] for key in found))
    return dict(
        sorted(found.items(), key=lambda item: (places.index(item[0][1]), names.index(item[0][0])))
    )


def _quadrant_shares(tokens: pd.DataFrame, keys: Iterable[tuple]) -> dict[tuple, float]:
    numbers = {name: number for number, name in QUADRANT_NAMES.items()}
    quadrant = {
        split.name: cuts.whole(tokens, [split], QUADRANT_COLUMNS, ()).quadrants()
        for split in splits(tokens, draws=0)
    }
    return {
        key: float((quadrant[key[1]] == numbers[key[2]]).mean()) if key[2] != "all" else 1.0
        for key in keys
    }


def plain_locations(values: np.ndarray, share: float) -> list[float]:
    """Mean, median, trimmed and winsorized mean of the finite values; NaN without any.

    Of n values the floor(share * n) at each end are dropped (trimmed) or set to the next value that
    is kept (winsorized).
    """
    ordered = np.sort(values[np.isfinite(values)])
    if not len(ordered):
        return [np.nan] * len(LOCATIONS)
    cut = int(share * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    ends = cut * (kept[0] + kept[-1])
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [ordered.mean(), middle, kept.mean(), (kept.sum() + ends) / len(ordered)]


@with_settings(bootstrap=Bootstrap)
def position_means(
    tokens: pd.DataFrame, *, bins: int = 10, bootstrap: Bootstrap = Bootstrap(), **settings: Any
) -> pd.DataFrame:
    """Mean of every outcome along the response, in equal bins of relative position t/(T - 1).

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        bins: Number of bins.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, position (middle of the bin, 0 to 1), mean, low, high, positions,
        prompts, steps. A bin without positions has no row.
    """

    def before(tokens: pd.DataFrame) -> np.ndarray:
        return np.minimum((relative_position(tokens) * bins).astype(int), bins - 1)

    def make(tokens: pd.DataFrame, settings: Bootstrap, place: np.ndarray) -> dict[tuple, Estimate]:
        return {
            (outcome, split.name, (number + 0.5) / bins): mean(
                split.values(tokens, outcome), split.prompts, place[split.mask] == number
            )
            for split in splits(tokens, bootstrap=settings)
            for outcome in outcomes_and_null(tokens)
            for number in np.unique(place[split.mask])
        }

    found = over_steps(make, tokens, bootstrap, before=before)
    return table(found, ("outcome", "split", "position"), bootstrap.level, named="mean")


# Groups within Q3


def _group_means(
    tokens: pd.DataFrame, by: Iterable[str], counts: Iterable[int], bootstrap: Bootstrap
) -> Means:
    """Mean of every outcome in each group of each score within Q3."""
    by, counts, names = tuple(by), tuple(counts), outcomes_and_null(tokens)
    needs = cuts.needed_columns(tokens, by, QUADRANT_COLUMNS)
    require_columns(tokens, needs, what="A contrast within Q3")

    def grouped(drawn: Drawn, in_q3: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
        for score in by:
            share = rank_shares(drawn.scores(score, seed=bootstrap.seed)[in_q3])
            for count in counts:
                yield score, count, equal_groups(share, count)

    def statistic(drawn: Drawn) -> np.ndarray:
        in_q3 = drawn.quadrants() == 3
        values = np.stack([each[in_q3] for each in drawn.values.values()])
        means = [_means_by_group(values, group, n) for _, n, group in grouped(drawn, in_q3)]
        return np.concatenate([each.ravel() for each in means])

    def make(tokens: pd.DataFrame, settings: Bootstrap) -> Means:
        found: Means = {}
        for together in same_positions(splits(tokens, bootstrap=settings)):
            drawn = cuts.whole(tokens, together, needs, names)
            in_q3 = drawn.quadrants() == 3
            estimates = iter(cuts.redrawn(statistic, tokens, together, needs, names))
            for score, count, group in grouped(drawn, in_q3):
                for (split, outcome), values in drawn.values.items():
                    for number in range(1, count + 1):
                        mask = np.isfinite(values[in_q3]) & (group == number)
                        found[outcome, split, score, count, number] = cuts.counted(
                            next(estimates), mask, drawn.prompt[in_q3]
                        )
        return found

    return _in_order(over_steps(make, tokens, bootstrap), names)


def _means_by_group(values: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """[outcomes, count] mean of the finite values [outcomes, n] in each group [n] from 1, NaN where
    there is none.
    """
    indicator = (group[:, None] == np.arange(1, count + 1)).astype(np.float64)
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite, values, 0.0) @ indicator / (finite.astype(np.float64) @ indicator)


def _top_minus_bottom(means: Means) -> dict[tuple[str, str, str, int], Estimate]:
    """Differences of the outer groups; their positions are those of both."""
    found = {}
    for (outcome, split, score, count, number), bottom in means.items():
        if number == 1:
            top = means[outcome, split, score, count, count]
            found[outcome, split, score, count] = replace(
                top - bottom, positions=top.positions + bottom.positions
            )
    return found


def q3_tables(
    tokens: pd.DataFrame, *, by: Iterable[str] = Q3_SCORES, bootstrap: Bootstrap = Bootstrap()
) -> dict[str, pd.DataFrame]:
    """The tables `q3_contrast` and `q3_groups` from the same draws."""
    means = _group_means(tokens, by, GROUP_COUNTS.values(), bootstrap)
    tertiles = {
        (outcome, split, score, number): estimate
        for (outcome, split, score, count, number), estimate in means.items()
        if count == 3
    }
    keys = ("outcome", "split", "score", "group")
    return {
        "q3_contrast": _contrast_table(means, bootstrap.level),
        "q3_groups": table(tertiles, keys, bootstrap.level, named="mean"),
    }


def _contrast_table(means: Means, level: float) -> pd.DataFrame:
    words = {count: name for name, count in GROUP_COUNTS.items()}
    found, more = {}, {}
    for (outcome, split, score, count), estimate in _top_minus_bottom(means).items():
        key = (outcome, split, score, words[count])
        found[key] = estimate
        more[key] = {
            "bottom_mean": means[outcome, split, score, count, 1].value,
            "top_mean": means[outcome, split, score, count, count].value,
        }
    keys = ("outcome", "split", "score", "groups")
    return table(found, keys, level, named="difference", tested=True, more=more)


@takes(tokens=token_table, by=several)
@with_settings(bootstrap=Bootstrap)
def q3_contrast(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = Q3_SCORES,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Within Q3, mean outcome of the top minus the bottom group of each score.

    Q3 holds the confident and wrong positions: low student entropy, high divergence. Groups are
    tertiles and quartiles of the score over all Q3 positions of the population.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        by: Criteria whose scores form the groups.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, score, groups (tertile, quartile), difference, low, high, p_value,
        bottom_mean, top_mean, positions, prompts, steps; means in the outcome's unit.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a score needs.

    Reference:
        arXiv 2605.26844 (the contrast between compatible and incompatible Q3 positions).
    """
    means = _group_means(tokens, by, GROUP_COUNTS.values(), bootstrap)
    return _contrast_table(means, bootstrap.level)


@takes(tokens=token_table, by=several)
@with_settings(bootstrap=Bootstrap)
def q3_groups(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = Q3_SCORES,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Mean outcome of each tertile of each score within Q3.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        by: Criteria whose scores form the groups.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, score, group (1 is the lowest), mean, low, high, positions, prompts,
        steps; means in the outcome's unit.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a score needs.
    """
    return q3_tables(tokens, by=by, bootstrap=bootstrap)["q3_groups"]


# Matching


def matching_covariates(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """What positions are matched on.

    d is clipped, and cannot tell a D of 8 nats from one of 15; its logarithm can.

    Returns:
        [N] each: normalized student entropy h, natural logarithm of the forward KL in nats (minus
        infinity for 0), and relative position.

    Raises:
        DiagnosticsError: If a column for one of them is missing.
    """
    require_columns(tokens, MATCHED_COLUMNS, what="Matching on entropy, divergence and position")
    with np.errstate(divide="ignore", invalid="ignore"):
        log_divergence = np.log(tokens["forward_kl"].to_numpy(dtype=np.float64))
    return {
        "student_entropy": normalize(tokens["student_entropy"]),
        "log_divergence": log_divergence,
        "position": relative_position(tokens),
    }


def matching_space(covariates: Iterable[np.ndarray], in_q3: np.ndarray) -> np.ndarray:
    """Coordinates [N, 3] to match in: each covariate over its standard deviation within Q3."""
    scaled = []
    for values in covariates:
        inside = values[in_q3 & np.isfinite(values)]
        # Distances inside Q3 are compared, so the spread inside Q3 is the unit.
        spread = inside.std() if len(inside) else 0.0
        scaled.append(values / (spread or 1.0))
    return np.stack(scaled, axis=1)


def matched_pairs(
    drawn: Drawn, by: Iterable[str], *, seed: int = 0
) -> Iterator[tuple[str, np.ndarray, pair_matching.Pairs]]:
    """Pairs of top and bottom tertile within Q3 and within a prompt, for each score.

    Args:
        drawn: The positions.
        by: Criteria whose scores form the tertiles.
        seed: Seed of the criteria that draw random numbers.

    Yields:
        Score, group [n] of each position (0 outside Q3), and the pairs.
    """
    n = len(drawn.prompt)
    in_q3 = drawn.quadrants() == 3
    covariates = [values[:n] for values in matching_covariates(drawn.tokens).values()]
    space = matching_space(covariates, in_q3)
    defined = np.isfinite(space).all(axis=1)
    for score in by:
        group = drawn.groups(score, 3, in_q3, seed=seed)
        top, bottom = (defined & (group == number) for number in (3, 1))
        yield score, group, pair_matching.match(space, top, bottom, drawn.prompt)


@with_settings(bootstrap=Bootstrap)
def matching(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = MATCHED_SCORES,
    calipers: Iterable[float] = CALIPERS,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Within Q3 and within a prompt, top minus bottom tertile of each score at similar (h, ln D,
    position).

    Each top position takes its nearest bottom position, which may be taken again.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        by: Criteria whose scores form the groups.
        calipers: Distances, in standard deviations within Q3, beyond which a pair is dropped.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, score, caliper (infinite: every pair), difference, low, high,
        p_value, matched (share of top positions with a partner within the caliper: how far the two
        groups overlap), positions (pairs), prompts, steps.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a score or a
            covariate needs.
    """
    by, calipers, names = tuple(by), tuple(calipers), outcomes_and_null(tokens)
    needs = cuts.needed_columns(tokens, by, MATCHED_COLUMNS)
    require_columns(tokens, needs, what="Matching within Q3")

    def statistic(drawn: Drawn) -> np.ndarray:
        found = []
        for _, _, pairs in matched_pairs(drawn, by, seed=bootstrap.seed):
            for caliper in calipers:
                near = pairs.within(caliper)
                found += [near.difference(values) for values in drawn.values.values()]
        return np.array(found)

    def make(tokens: pd.DataFrame, settings: Bootstrap) -> dict[tuple, Estimate]:
        found = {}
        for together in same_positions(splits(tokens, bootstrap=settings)):
            drawn = cuts.whole(tokens, together, needs, names)
            estimates = iter(cuts.redrawn(statistic, tokens, together, needs, names))
            for score, _, pairs in matched_pairs(drawn, by, seed=bootstrap.seed):
                for caliper in calipers:
                    near = pairs.within(caliper)
                    for (split, outcome), values in drawn.values.items():
                        rows = near.treated[np.isfinite(near.differences(values))]
                        counts = (len(rows), cuts.different(drawn.prompt[rows]))
                        found[outcome, split, score, caliper] = _counted(next(estimates), *counts)
        return found

    found = _in_order(over_steps(make, tokens, bootstrap), names)
    shares = {
        key: {"matched": share}
        for key, share in _matched_shares(tokens, by, calipers, bootstrap.seed, found).items()
    }
    keys = ("outcome", "split", "score", "caliper")
    return table(found, keys, bootstrap.level, named="difference", tested=True, more=shares)


def _counted(estimate: Estimate, positions: int, prompts: int) -> Estimate:
    return replace(estimate, positions=positions, prompts=prompts)


def _matched_shares(
    tokens: pd.DataFrame, by: tuple, calipers: tuple, seed: int, keys: Iterable[tuple]
) -> dict[tuple, float]:
    shares = {}
    for split, _, score, group, pairs in _whole_pairs(tokens, by, seed):
        for caliper in calipers:
            top = max(int((group == 3).sum()), 1)
            shares[split.name, score, caliper] = len(pairs.within(caliper).treated) / top
    return {key: shares[key[1:]] for key in keys}


def _whole_pairs(
    tokens: pd.DataFrame, by: Iterable[str], seed: int
) -> Iterator[tuple[Split, Drawn, str, np.ndarray, pair_matching.Pairs]]:
    """The pairs of every population, without draws."""
    by = tuple(by)
    needs = cuts.needed_columns(tokens, by, MATCHED_COLUMNS)
    require_columns(tokens, needs, what="Matching within Q3")
    for split in splits(tokens, draws=0):
        drawn = cuts.whole(tokens, [split], needs, ())
        for score, group, pairs in matched_pairs(drawn, by, seed=seed):
            yield split, drawn, score, group, pairs


def balance(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = MATCHED_SCORES,
    calipers: Iterable[float] = CALIPERS,
    seed: int = 0,
) -> pd.DataFrame:
    """Standardized mean differences of the matched covariates, top minus bottom tertile, before
    and after matching.

    The scale is the root mean variance of the two groups before matching, throughout.

    Args:
        tokens: A token table, one row per response position.
        by: Criteria whose scores form the groups.
        calipers: Distances, in standard deviations within Q3, beyond which a pair is dropped.
        seed: Seed of the criterion `random`.

    Returns:
        Columns split, score, covariate, caliper, before, after, positions (pairs), prompts.

    Raises:
        DiagnosticsError: If the table lacks a column that a score or a covariate needs.
    """
    rows = []
    for split, drawn, score, group, pairs in _whole_pairs(tokens, by, seed):
        covariates = matching_covariates(drawn.tokens)
        for caliper in calipers:
            near = pairs.within(caliper)
            prompts = cuts.different(drawn.prompt[near.treated])
            for name, values in covariates.items():
                before, after = _imbalance(values[: len(group)], group, near)
                rows.append(
                    {
                        "split": split.name,
                        "score": score,
                        "covariate": name,
                        "caliper": caliper,
                        "before": before,
                        "after": after,
                        "positions": len(near.treated),
                        "prompts": prompts,
                    }
                )
    return pd.DataFrame(rows)


def _imbalance(
    values: np.ndarray, group: np.ndarray, pairs: pair_matching.Pairs
) -> tuple[float, float]:
    finite = np.isfinite(values)
    top, bottom = (values[finite & (group == number)] for number in (3, 1))
    if not len(top) or not len(bottom):
        return np.nan, np.nan
    scale = np.sqrt((np.var(top) + np.var(bottom)) / 2)
    sides = (top, bottom), (values[pairs.treated], values[pairs.control])
    before, after = (pair_matching.standardized_difference(*side, scale) for side in sides)
    return before, after
