"""The four quadrants of entropy and divergence, and contrasts inside Q3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import bootstrap, rank_correlation
from diagnostics.analysis import matching as pair_matching
from diagnostics.analysis.bootstrap import Estimate
from diagnostics.analysis.splits import Split, controls, outcomes, row, scores, splits
from diagnostics.criteria import relative_position

Q3_SCORES = ("compatibility", "teachability", "incompatible", "divergence")
MATCHED_SCORES = ("compatibility", "teachability", "incompatible")
GROUPS = {"tertile": 3, "quartile": 4}
QUADRANTS = {0: "all", 1: "Q1", 2: "Q2", 3: "Q3", 4: "Q4"}


def quadrant_means(
    tokens: pd.DataFrame,
    *,
    share: float = 0.05,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean, median, trimmed and winsorised mean of every outcome in each quadrant and over all.

    Returns columns outcome, split, quadrant (all, Q1..Q4), statistic, estimate, low, high, share
    (of the split's positions), positions, prompts. `share` of each tail is trimmed or winsorised.
    """
    quadrant, rows = registry.quadrants(tokens), []
    for split in splits(tokens, draws=draws, seed=seed):
        for outcome in outcomes(tokens):
            values, here = split.values(tokens, outcome), quadrant[split.mask]
            for number, name in QUADRANTS.items():
                mask = np.ones(len(here), dtype=bool) if name == "all" else here == number
                found = {"mean": bootstrap.mean(values, split.prompts, mask)}
                found |= bootstrap.locations(values, split.prompts, mask, share=share)
                key = {"outcome": outcome, "split": split.name, "quadrant": name}
                rows += [
                    key | {"statistic": s} | row(e, level, share=float(mask.mean()))
                    for s, e in found.items()
                ]
    return pd.DataFrame(rows)


def position_means(
    tokens: pd.DataFrame, *, bins: int = 10, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean of every outcome along the response, in `bins` equal bins of relative position t/(T -
    1).

    Returns columns outcome, split, position (middle of the bin, 0 to 1), mean, low, high,
    positions, prompts. A bin without positions has no row."""
    place, rows = np.minimum((relative_position(tokens) * bins).astype(int), bins - 1), []
    for split in splits(tokens, draws=draws, seed=seed):
        for outcome in outcomes(tokens):
            values, here = split.values(tokens, outcome), place[split.mask]
            for number in np.unique(here):
                key = {"outcome": outcome, "split": split.name, "position": (number + 0.5) / bins}
                rows.append(
                    key
                    | row(
                        bootstrap.mean(values, split.prompts, here == number), level, named="mean"
                    )
                )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Contrast:
    """Top and bottom group of a score among the Q3 positions of a split."""

    split: Split
    score: str
    group: np.ndarray
    """[n] 1 for the lowest group, `groups` for the highest, 0 outside Q3."""
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
        return bootstrap.mean_difference(values, self.split.prompts, self.top, self.bottom)


def contrasts(
    scored: dict[str, np.ndarray], in_q3: np.ndarray, split: Split, groups: int
) -> Iterator[Contrast]:
    """Groups of each score [N] within Q3 of the split, cut once over the split's Q3 positions."""
    for name, score in scored.items():
        group = rank_correlation.groups_by_rank(score[split.mask], groups, in_q3[split.mask])
        yield Contrast(split, name, group, groups)


def _contrasts(
    tokens: pd.DataFrame, by: Iterable[str], groups: Iterable[int], draws: int, seed: int
) -> Iterator[Contrast]:
    scored, in_q3 = scores(tokens, by, seed=seed), registry.quadrants(tokens) == 3
    for split in splits(tokens, draws=draws, seed=seed):
        for count in groups:
            yield from contrasts(scored, in_q3, split, count)


def q3_contrast(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = Q3_SCORES,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Within Q3, mean outcome of the top minus the bottom group of each score.

    Groups are tertiles and quartiles of the score over all Q3 positions of the split, cut once.
    Returns columns outcome, split, score, groups (tertile, quartile), difference, low, high,
    bottom_mean, top_mean, placebo_difference, positions, prompts."""
    rows, names = [], {count: name for name, count in GROUPS.items()}
    for contrast in _contrasts(tokens, by, GROUPS.values(), draws, seed):
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
                    level,
                    named="difference",
                    bottom_mean=_mean(values[contrast.bottom]),
                    top_mean=_mean(values[contrast.top]),
                    placebo_difference=_mean(placebo[contrast.top])
                    - _mean(placebo[contrast.bottom]),
                )
            )
    return pd.DataFrame(rows)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def q3_groups(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = Q3_SCORES,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean outcome of each tertile (group 1 is the lowest) of each score within Q3.

    Returns columns outcome, split, score, group, mean, low, high, positions, prompts.
    """
    rows = []
    for contrast in _contrasts(tokens, by, [3], draws, seed):
        for outcome in outcomes(tokens):
            values = contrast.split.values(tokens, outcome)
            for number in (1, 2, 3):
                key = {
                    "outcome": outcome,
                    "split": contrast.split.name,
                    "score": contrast.score,
                    "group": number,
                }
                mean = bootstrap.mean(values, contrast.split.prompts, contrast.group == number)
                rows.append(key | row(mean, level, named="mean"))
    return pd.DataFrame(rows)


def features(tokens: pd.DataFrame) -> np.ndarray:
    """[N, 3] h, d and relative position, each over its standard deviation within Q3: the space to
    match in.
    """
    columns, in_q3 = controls(tokens).values(), registry.quadrants(tokens) == 3
    spreads = [column[in_q3].std() if in_q3.any() else 0.0 for column in columns]
    return np.stack([column / (spread or 1.0) for column, spread in zip(columns, spreads)], axis=1)


def pair_up(
    contrast: Contrast, space: np.ndarray, *, replacement: bool = True, caliper: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of top with bottom positions of a contrast, within prompts; space: [n, F] features on
    its split.
    """
    defined = np.isfinite(space).all(axis=1)
    top, bottom = contrast.top & defined, contrast.bottom & defined
    return pair_matching.match(
        space, top, bottom, contrast.split.prompts.codes, replacement=replacement, caliper=caliper
    )


def matching(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = MATCHED_SCORES,
    caliper: float = np.inf,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Within Q3 and within a prompt, top minus bottom tertile of each score at like (h, d,
    position).

    caliper: distance, in standard deviations within Q3, beyond which a pair is dropped. Returns
    columns outcome, split, score, replacement, difference, low, high, placebo_difference, matched
    (share of top positions with a partner), positions (pairs), prompts."""
    space, rows = features(tokens), []
    for contrast in _contrasts(tokens, by, [3], draws, seed):
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
                        level,
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
    """Standardised mean differences of what was matched on, top minus bottom tertile, before and
    after.

    The scale is the root mean variance of the two groups before matching, throughout. Returns
    columns split, score, covariate, replacement, before, after, positions (pairs), prompts."""
    columns, space, rows = controls(tokens), features(tokens), []
    for contrast in _contrasts(tokens, by, [3], 2, seed):
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
    top, bottom = values[contrast.top & finite], values[contrast.bottom & finite]
    if not len(top) or not len(bottom):
        return np.nan, np.nan
    scale = np.sqrt((np.var(top) + np.var(bottom)) / 2)
    sides = (top, bottom), (values[pairs[0]], values[pairs[1]])
    return tuple(pair_matching.standardized_difference(*side, scale) for side in sides)
