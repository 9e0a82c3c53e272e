"""The four quadrants of entropy and divergence, and contrasts inside Q3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import matching as pair_matching
from diagnostics.analysis import rank_correlation
from diagnostics.analysis.bootstrap import Estimate, locations, mean, mean_difference
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.splits import Split, controls, outcomes, row, scores, splits
from diagnostics.core.settings import with_settings
from diagnostics.criteria import relative_position

Q3_SCORES = ("compatibility", "teachability", "incompatible", "divergence")
MATCHED_SCORES = ("compatibility", "teachability", "incompatible")
GROUP_COUNTS = {"tertile": 3, "quartile": 4}
QUADRANT_NAMES = {0: "all", 1: "Q1", 2: "Q2", 3: "Q3", 4: "Q4"}


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
        the split's positions that lie in the quadrant), positions, prompts.
    """
    quadrant = registry.quadrants(tokens)
    rows = []
    for split in splits(tokens, bootstrap=bootstrap):
        for outcome in outcomes(tokens):
            values = split.values(tokens, outcome)
            here = quadrant[split.mask]
            for number, name in QUADRANT_NAMES.items():
                mask = np.ones(len(here), dtype=bool) if name == "all" else here == number
                found = {"mean": mean(values, split.prompts, mask)}
                found |= locations(values, split.prompts, mask, share=share)
                key = {"outcome": outcome, "split": split.name, "quadrant": name}
                rows += [
                    key | {"statistic": s} | row(e, bootstrap.level, share=float(mask.mean()))
                    for s, e in found.items()
                ]
    return pd.DataFrame(rows)


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
        prompts. A bin without positions has no row.
    """
    place = np.minimum((relative_position(tokens) * bins).astype(int), bins - 1)
    rows = []
    for split in splits(tokens, bootstrap=bootstrap):
        for outcome in outcomes(tokens):
            values = split.values(tokens, outcome)
            here = place[split.mask]
            for number in np.unique(here):
                key = {"outcome": outcome, "split": split.name, "position": (number + 0.5) / bins}
                rows.append(
                    key
                    | row(
                        mean(values, split.prompts, here == number), bootstrap.level, named="mean"
                    )
                )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Contrast:
    """Top and bottom group of a score among the Q3 positions of a split.

    Attributes:
        split: The split with its n positions.
        score: Name of the score.
        group: [n] 1 for the lowest group, `groups` for the highest, 0 outside Q3.
        groups: Number of groups.
    """

    split: Split
    score: str
    group: np.ndarray
    groups: int

    @property
    def top(self) -> np.ndarray:
        """Mask of the highest group."""
        return self.group == self.groups

    @property
    def bottom(self) -> np.ndarray:
        """Mask of the lowest group."""
        return self.group == 1

    def difference(self, values: np.ndarray) -> Estimate:
        """Mean of the values [n] in the top minus in the bottom group."""
        return mean_difference(values, self.split.prompts, self.top, self.bottom)


def contrasts(
    scored: dict[str, np.ndarray], in_q3: np.ndarray, split: Split, groups: int
) -> Iterator[Contrast]:
    """Groups of each score [N] within Q3 of the split, cut once over the split's Q3 positions."""
    for name, score in scored.items():
        group = rank_correlation.groups_by_rank(score[split.mask], groups, in_q3[split.mask])
        yield Contrast(split, name, group, groups)


def _contrasts(
    tokens: pd.DataFrame, by: Iterable[str], groups: Iterable[int], bootstrap: Bootstrap
) -> Iterator[Contrast]:
    scored = scores(tokens, by, seed=bootstrap.seed)
    in_q3 = registry.quadrants(tokens) == 3
    for split in splits(tokens, bootstrap=bootstrap):
        for count in groups:
            yield from contrasts(scored, in_q3, split, count)


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
    tertiles and quartiles of the score over all Q3 positions of the split, cut once.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        by: Criteria whose scores form the groups.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, score, groups (tertile, quartile), difference, low, high,
        bottom_mean, top_mean, placebo_difference, positions, prompts; means in the outcome's unit.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a score or a control
            needs.

    Reference:
        arXiv 2605.26844 (the contrast between compatible and incompatible Q3 positions).
    """
    rows = []
    names = {count: name for name, count in GROUP_COUNTS.items()}
    for contrast in _contrasts(tokens, by, GROUP_COUNTS.values(), bootstrap):
        for outcome in outcomes(tokens):
            values, placebo = (
                contrast.split.values(tokens, name) for name in (outcome, f"placebo_{outcome}")
            )
            key = {
                "outcome": outcome,
                "split": contrast.split.name,
                "score": contrast.score,
                "groups": names[contrast.groups],
            }
            rows.append(
                key
                | row(
                    contrast.difference(values),
                    bootstrap.level,
                    named="difference",
                    bottom_mean=_finite_mean(values[contrast.bottom]),
                    top_mean=_finite_mean(values[contrast.top]),
                    placebo_difference=_finite_mean(placebo[contrast.top])
                    - _finite_mean(placebo[contrast.bottom]),
                )
            )
    return pd.DataFrame(rows)


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


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
        Columns outcome, split, score, group (1 is the lowest), mean, low, high, positions, prompts;
        means in the outcome's unit.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a score or a control
            needs.
    """
    rows = []
    for contrast in _contrasts(tokens, by, [3], bootstrap):
        for outcome in outcomes(tokens):
            values = contrast.split.values(tokens, outcome)
            for number in (1, 2, 3):
                key = {
                    "outcome": outcome,
                    "split": contrast.split.name,
                    "score": contrast.score,
                    "group": number,
                }
                estimate = mean(values, contrast.split.prompts, contrast.group == number)
                rows.append(key | row(estimate, bootstrap.level, named="mean"))
    return pd.DataFrame(rows)


def matching_features(tokens: pd.DataFrame) -> np.ndarray:
    """Coordinates [N, 3] to match in: h, d and relative position, each over its standard deviation
    within Q3.
    """
    columns = controls(tokens).values()
    in_q3 = registry.quadrants(tokens) == 3
    # Distances inside Q3 are compared, so the spread inside Q3 is the unit.
    spreads = [column[in_q3].std() if in_q3.any() else 0.0 for column in columns]
    return np.stack([column / (spread or 1.0) for column, spread in zip(columns, spreads)], axis=1)


def pair_up(
    contrast: Contrast, space: np.ndarray, *, replacement: bool = True, caliper: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Pair top with bottom positions of a contrast, within prompts.

    Args:
        contrast: The two groups among the n positions of a split.
        space: [n, F] coordinates on that split.
        replacement: Whether a bottom position may be taken more than once.
        caliper: Distance beyond which a pair is dropped.

    Returns:
        Row numbers of the top and of the bottom position of each pair.
    """
    defined = np.isfinite(space).all(axis=1)
    top = contrast.top & defined
    bottom = contrast.bottom & defined
    return pair_matching.match(
        space, top, bottom, contrast.split.prompts.codes, replacement=replacement, caliper=caliper
    )


@with_settings(bootstrap=Bootstrap)
def matching(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = MATCHED_SCORES,
    caliper: float = np.inf,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Within Q3 and within a prompt, top minus bottom tertile of each score at similar (h, d,
    position).

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        by: Criteria whose scores form the groups.
        caliper: Distance, in standard deviations within Q3, beyond which a pair is dropped.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns outcome, split, score, replacement, difference, low, high, placebo_difference,
        matched (share of top positions with a partner), positions (pairs), prompts.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a score or a control
            needs.
    """
    space = matching_features(tokens)
    rows = []
    for contrast in _contrasts(tokens, by, [3], bootstrap):
        for replacement in (True, False):
            pairs = pair_up(
                contrast, space[contrast.split.mask], replacement=replacement, caliper=caliper
            )
            matched = len(pairs[0]) / max(int(contrast.top.sum()), 1)
            for outcome in outcomes(tokens):
                found, placebo = (
                    pair_matching.matched_difference(
                        contrast.split.values(tokens, name), contrast.split.prompts, pairs
                    )
                    for name in (outcome, f"placebo_{outcome}")
                )
                key = {
                    "outcome": outcome,
                    "split": contrast.split.name,
                    "score": contrast.score,
                    "replacement": replacement,
                }
                rows.append(
                    key
                    | row(
                        found,
                        bootstrap.level,
                        named="difference",
                        placebo_difference=placebo.value,
                        matched=matched,
                    )
                )
    return pd.DataFrame(rows)


def balance(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = MATCHED_SCORES,
    caliper: float = np.inf,
    seed: int = 0,
) -> pd.DataFrame:
    """Standardized mean differences of the matched covariates, top minus bottom tertile, before
    and after matching.

    The scale is the root mean variance of the two groups before matching, throughout.

    Args:
        tokens: A token table, one row per response position, with at least one outcome.
        by: Criteria whose scores form the groups.
        caliper: Distance, in standard deviations within Q3, beyond which a pair is dropped.
        seed: Seed of the criterion `random`.

    Returns:
        Columns split, score, covariate, replacement, before, after, positions (pairs), prompts.

    Raises:
        DiagnosticsError: If the table holds no outcome, or lacks a column that a score or a control
            needs.
    """
    columns = controls(tokens)
    space = matching_features(tokens)
    rows = []
    for contrast in _contrasts(tokens, by, [3], Bootstrap(draws=0, seed=seed)):
        split = contrast.split
        for replacement in (True, False):
            pairs = pair_up(contrast, space[split.mask], replacement=replacement, caliper=caliper)
            prompts = len(np.unique(split.prompts.codes[pairs[0]]))
            for name, values in columns.items():
                before, after = _imbalance(values[split.mask], contrast, pairs)
                key = {
                    "split": split.name,
                    "score": contrast.score,
                    "covariate": name,
                    "replacement": replacement,
                }
                rows.append(
                    key
                    | {
                        "before": before,
                        "after": after,
                        "positions": len(pairs[0]),
                        "prompts": prompts,
                    }
                )
    return pd.DataFrame(rows)


def _imbalance(
    values: np.ndarray, contrast: Contrast, pairs: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    finite = np.isfinite(values)
    top = values[contrast.top & finite]
    bottom = values[contrast.bottom & finite]
    if not len(top) or not len(bottom):
        return np.nan, np.nan
    scale = np.sqrt((np.var(top) + np.var(bottom)) / 2)
    sides = (top, bottom), (values[pairs[0]], values[pairs[1]])
    return tuple(pair_matching.standardized_difference(*side, scale) for side in sides)
