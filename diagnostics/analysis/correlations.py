"""Correlations and contrasts: a token table in, a DataFrame with intervals out.

Scores are normalised over the whole table; a split only chooses which positions count. The outcomes are
`gain` and `reverse_gain` in nats and `relative_gain` as a fraction. The placebo of an outcome is the same
quantity after a random step of the same norm: what having D on both sides gives alone. Every interval
resamples prompts (see `statistics`); every table carries its positions and prompts.

Q3, the confident and wrong positions, is h <= median and d >= median (see `criteria.quadrants`).

Departures from the scripts released with arXiv 2605.26844: predictors come from before the step only; the
cluster is the prompt, not the context; matching pairs the top with the bottom tertile of all Q3 positions
(there: above with below the prompt's own median), with replacement as there, without, and within a
caliper.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis import bootstrap
from diagnostics.criteria import normalise, relative_position
from diagnostics.analysis.bootstrap import Controls, Estimate, Prompts, Variable
from diagnostics.core.types import DiagnosticsError, require_columns

OUTCOMES = ("gain", "relative_gain", "reverse_gain")
METHODS: dict[str, Callable] = {
    "spearman": bootstrap.spearman, "pearson": bootstrap.pearson, "kendall": bootstrap.kendall,
}
Q3_SCORES = ("compatibility", "teachability", "incompatible", "divergence")
MATCHED_SCORES = ("compatibility", "teachability", "incompatible")
GROUPS = {"tertile": 3, "quartile": 4}
HELD_COLUMNS = ("student_entropy", "forward_kl", "position", "response_length")
CALIPER = 0.5
"""Distance, in standard deviations within Q3, beyond which two positions do not count as alike."""
QUADRANTS = {0: "all", 1: "Q1", 2: "Q2", 3: "Q3", 4: "Q4"}


@dataclass(frozen=True)
class Split:
    """Some positions of a table with their prompts' draws."""

    name: str
    mask: np.ndarray
    prompts: Prompts

    def values(self, tokens: pd.DataFrame, name: str) -> np.ndarray:
        """A column on the split as float64, NaN where it is not finite or the table lacks it."""
        if name not in tokens:
            return np.full(int(self.mask.sum()), np.nan)
        values = tokens[name].to_numpy(dtype=np.float64)[self.mask]
        return np.where(np.isfinite(values), values, np.nan)


def splits(tokens: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> Iterator[Split]:
    """`all`, then `step` and `held_out` where the table has both."""
    require_columns(tokens, ["prompt_id"], what="the analysis")
    if not len(tokens):
        raise DiagnosticsError("The token table has no rows, so there is nothing to analyse. Score a bank with responses.")
    nameless = int(tokens["prompt_id"].isna().sum())
    if nameless:
        raise DiagnosticsError(f"{nameless} positions have no prompt_id, so their cluster is not known. Fill it in, or drop them.")
    names = ["all"]
    if "split" in tokens and {"step", "held_out"} <= set(tokens["split"]):
        names += ["step", "held_out"]
    for name in names:
        mask = np.ones(len(tokens), dtype=bool) if name == "all" else (tokens["split"] == name).to_numpy(dtype=bool)
        yield Split(name, mask, Prompts(tokens["prompt_id"][mask], draws=draws, seed=seed))


def outcomes(tokens: pd.DataFrame) -> list[str]:
    """The outcomes that the table holds. Raises DiagnosticsError where it holds none."""
    present = [name for name in OUTCOMES if name in tokens]
    if not present:
        raise DiagnosticsError(
            f"The analysis needs an outcome, one of {', '.join(OUTCOMES)}; the table has "
            f"{', '.join(map(str, tokens.columns[:40]))}. Run the probe on it first."
        )
    return present


def scores(tokens: pd.DataFrame, names: Iterable[str] | None = None, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Scores [N] by criterion over the whole table; all that its columns allow where `names` is None.

    `full` is left out then: a constant correlates with nothing.
    """
    if names is None:
        names = [name for name in registry.available(tokens) if registry.find(name).kind != "all"]
    return {name: registry.score_criterion(tokens, name, seed=seed) for name in names}


def controls(tokens: pd.DataFrame) -> dict[str, np.ndarray]:
    """What partial correlations and matching hold fixed: h, d and t/(T - 1), each [N]."""
    require_columns(tokens, HELD_COLUMNS, what="Holding entropy, divergence and position fixed")
    h, d = (normalise(tokens[name]) for name in ("student_entropy", "forward_kl"))
    return {"student_entropy": h, "forward_kl": d, "position": relative_position(tokens)}


def row(estimate: Estimate, level: float, *, named: str = "estimate", **more) -> dict:
    """Value, interval, whatever is in `more`, and counts, as a table's row."""
    low, high = estimate.interval(level)
    return {named: estimate.value, "low": low, "high": high} | more | {
        "positions": estimate.positions, "prompts": estimate.prompts,
    }


# --- correlations -----------------------------------------------------------------------------------


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
    tokens: pd.DataFrame, *, criteria: Iterable[str] | None = None, methods: Iterable[str] = tuple(METHODS),
    draws: int = 1000, seed: int = 0,
) -> list[Association]:
    """Every correlation with its draws: what `correlate` and its sister tables are read from."""
    scored, found = scores(tokens, criteria, seed=seed), []
    methods = tuple(methods)
    for split in splits(tokens, draws=draws, seed=seed):
        variables = {name: Variable(score[split.mask]) for name, score in scored.items()}
        for outcome in outcomes(tokens):
            values, placebo = (Variable(split.values(tokens, name)) for name in (outcome, f"placebo_{outcome}"))
            found += [
                Association(outcome, name, split.name, method, *(METHODS[method](score, y, split.prompts) for y in (values, placebo)))
                for name, score in variables.items() for method in methods
            ]
    return found


def correlate(
    tokens: pd.DataFrame, *, criteria: Iterable[str] | None = None, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Correlation of every outcome with every criterion, in long form.

    criteria: names or aliases; None takes all that the table's columns allow. Returns columns outcome,
    criterion, split (all, step, held_out), method (spearman, pearson, kendall), estimate, low, high, placebo,
    positions, prompts. `placebo` is the correlation with the outcome's placebo, NaN without one. Undefined
    pairs are left out position by position; a constant score gives NaN. Raises DiagnosticsError where the
    table holds no outcome or lacks a criterion's columns.
    """
    return correlation_table(associate(tokens, criteria=criteria, draws=draws, seed=seed), level=level)


def correlation_table(associations: list[Association], *, level: float) -> pd.DataFrame:
    """`correlate` from associations already made."""
    return pd.DataFrame([a.key | row(a.estimate, level, placebo=a.placebo.value) for a in associations])


def placebo_excess(associations: list[Association], *, level: float) -> pd.DataFrame:
    """Each correlation minus its placebo's, paired over prompts; columns as `correlate`, `excess` for estimate."""
    return pd.DataFrame([
        a.key | row(a.estimate - a.placebo, level, named="excess") for a in associations if np.isfinite(a.placebo.value)
    ])


def correlation_differences(associations: list[Association], *, level: float) -> pd.DataFrame:
    """Correlation of `criterion` minus correlation of `other`, for every pair and method, paired over prompts.

    Returns columns outcome, criterion, other, split, method, difference, low, high, p_value (against 0, not
    corrected for the number of pairs), positions, prompts.
    """
    rows, alike = [], defaultdict(list)
    for association in associations:
        alike[association.outcome, association.split, association.method].append(association)
    for (outcome, split, method), same in alike.items():
        for first, second in combinations(same, 2):
            difference = first.estimate - second.estimate
            key = {"outcome": outcome, "criterion": first.criterion, "other": second.criterion, "split": split, "method": method}
            rows.append(key | row(difference, level, named="difference", p_value=difference.p_value))
    return pd.DataFrame(rows)


def partial_correlations(
    tokens: pd.DataFrame, *, criteria: Iterable[str] | None = None, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Correlation of every outcome with every criterion given (h, d, relative position).

    Columns as `correlate`; method is spearman (of ranks) or pearson. NaN where the controls determine the
    criterion, as they do `entropy`.
    """
    def statistic(x, y, held, prompts, method):
        return bootstrap.partial(x, y, held, prompts, ranked=method == "spearman")

    return _each(tokens, statistic, ("spearman", "pearson"), criteria, controls(tokens), draws=draws, level=level, seed=seed)


def within_prompt_correlations(
    tokens: pd.DataFrame, *, criteria: Iterable[str] | None = None, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean over prompts of the correlation within a prompt, so that no difference between prompts enters.

    Columns as `correlate`. Prompts with fewer than five defined positions, or
    with a constant, are left out and not counted.
    """
    def statistic(x, y, held, prompts, method):
        return bootstrap.within_prompts(x, y, prompts, method=method)

    return _each(tokens, statistic, METHODS, criteria, {}, draws=draws, level=level, seed=seed)


def _each(
    tokens: pd.DataFrame, statistic: Callable, methods: Iterable[str], criteria, fixed: dict[str, np.ndarray], *, draws: int, level: float, seed: int
) -> pd.DataFrame:
    """statistic(x, y, what is held fixed, prompts, method) for every outcome, criterion, split and method."""
    scored, rows = scores(tokens, criteria, seed=seed), []
    for split in splits(tokens, draws=draws, seed=seed):
        variables = {name: Variable(score[split.mask]) for name, score in scored.items()}
        held, bare = Controls([column[split.mask] for column in fixed.values()]), split.prompts.without_draws()
        for outcome in outcomes(tokens):
            y, placebo = (Variable(split.values(tokens, name)) for name in (outcome, f"placebo_{outcome}"))
            for name, x in variables.items():
                for method in methods:
                    key = {"outcome": outcome, "criterion": name, "split": split.name, "method": method}
                    control = statistic(x, placebo, held, bare, method).value
                    rows.append(key | row(statistic(x, y, held, split.prompts, method), level, placebo=control))
    return pd.DataFrame(rows)


# --- quadrants and Q3 -------------------------------------------------------------------------------


def quadrant_means(
    tokens: pd.DataFrame, *, share: float = 0.05, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean, median, trimmed and winsorised mean of every outcome in each quadrant and over all.

    Returns columns outcome, split, quadrant (all, Q1..Q4), statistic, estimate, low, high, share (of the
    split's positions), positions, prompts. `share` of each tail is trimmed or winsorised.
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
                rows += [key | {"statistic": s} | row(e, level, share=float(mask.mean())) for s, e in found.items()]
    return pd.DataFrame(rows)


def position_means(
    tokens: pd.DataFrame, *, bins: int = 10, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean of every outcome along the response, in `bins` equal bins of relative position t/(T - 1).

    Returns columns outcome, split, position (middle of the bin, 0 to 1), mean, low, high, positions, prompts. A bin without
    positions has no row.
    """
    place, rows = np.minimum((relative_position(tokens) * bins).astype(int), bins - 1), []
    for split in splits(tokens, draws=draws, seed=seed):
        for outcome in outcomes(tokens):
            values, here = split.values(tokens, outcome), place[split.mask]
            for number in np.unique(here):
                key = {"outcome": outcome, "split": split.name, "position": (number + 0.5) / bins}
                rows.append(key | row(bootstrap.mean(values, split.prompts, here == number), level, named="mean"))
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


def contrasts(scored: dict[str, np.ndarray], in_q3: np.ndarray, split: Split, groups: int) -> Iterator[Contrast]:
    """Groups of each score [N] within Q3 of the split, cut once over the split's Q3 positions."""
    for name, score in scored.items():
        group = bootstrap.groups_by_rank(score[split.mask], groups, in_q3[split.mask])
        yield Contrast(split, name, group, groups)


def _contrasts(tokens: pd.DataFrame, by: Iterable[str], groups: Iterable[int], draws: int, seed: int) -> Iterator[Contrast]:
    scored, in_q3 = scores(tokens, by, seed=seed), registry.quadrants(tokens) == 3
    for split in splits(tokens, draws=draws, seed=seed):
        for count in groups:
            yield from contrasts(scored, in_q3, split, count)


def q3_contrast(
    tokens: pd.DataFrame, *, by: Iterable[str] = Q3_SCORES, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Within Q3, mean outcome of the top minus the bottom group of each score.

    Groups are tertiles and quartiles of the score over all Q3 positions of the split, cut once. Returns
    columns outcome, split, score, groups (tertile, quartile), difference, low, high, bottom_mean, top_mean,
    placebo_difference, positions, prompts.
    """
    rows, names = [], {count: name for name, count in GROUPS.items()}
    for contrast in _contrasts(tokens, by, GROUPS.values(), draws, seed):
        for outcome in outcomes(tokens):
            values, placebo = (contrast.split.values(tokens, name) for name in (outcome, f"placebo_{outcome}"))
            key = {"outcome": outcome, "split": contrast.split.name, "score": contrast.score, "groups": names[contrast.groups]}
            rows.append(key | row(
                contrast.difference(values), level, named="difference",
                bottom_mean=_mean(values[contrast.bottom]), top_mean=_mean(values[contrast.top]),
                placebo_difference=_mean(placebo[contrast.top]) - _mean(placebo[contrast.bottom]),
            ))
    return pd.DataFrame(rows)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def q3_groups(
    tokens: pd.DataFrame, *, by: Iterable[str] = Q3_SCORES, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean outcome of each tertile (group 1 is the lowest) of each score within Q3.

    Returns columns outcome, split, score, group, mean, low, high, positions, prompts.
    """
    rows = []
    for contrast in _contrasts(tokens, by, [3], draws, seed):
        for outcome in outcomes(tokens):
            values = contrast.split.values(tokens, outcome)
            for number in (1, 2, 3):
                key = {"outcome": outcome, "split": contrast.split.name, "score": contrast.score, "group": number}
                mean = bootstrap.mean(values, contrast.split.prompts, contrast.group == number)
                rows.append(key | row(mean, level, named="mean"))
    return pd.DataFrame(rows)


# --- matching ---------------------------------------------------------------------------------------


def features(tokens: pd.DataFrame) -> np.ndarray:
    """[N, 3] h, d and relative position, each over its standard deviation within Q3: the space to match in."""
    columns, in_q3 = controls(tokens).values(), registry.quadrants(tokens) == 3
    spreads = [column[in_q3].std() if in_q3.any() else 0.0 for column in columns]
    return np.stack([column / (spread or 1.0) for column, spread in zip(columns, spreads)], axis=1)


def pair_up(
    contrast: Contrast, space: np.ndarray, *, replacement: bool = True, caliper: float = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of top with bottom positions of a contrast, within prompts; space: [n, F] features on its split."""
    defined = np.isfinite(space).all(axis=1)
    top, bottom = contrast.top & defined, contrast.bottom & defined
    return bootstrap.match(space, top, bottom, contrast.split.prompts.codes, replacement=replacement, caliper=caliper)


def matching(
    tokens: pd.DataFrame, *, by: Iterable[str] = MATCHED_SCORES, caliper: float = np.inf, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Within Q3 and within a prompt, top minus bottom tertile of each score at like (h, d, position).

    caliper: distance, in standard deviations within Q3, beyond which a pair is dropped. Returns columns outcome,
    split, score, replacement, difference, low, high, placebo_difference, matched (share of top positions with a
    partner), positions (pairs), prompts.
    """
    space, rows = features(tokens), []
    for contrast in _contrasts(tokens, by, [3], draws, seed):
        for replacement in (True, False):
            pairs = pair_up(contrast, space[contrast.split.mask], replacement=replacement, caliper=caliper)
            matched = len(pairs[0]) / max(int(contrast.top.sum()), 1)
            for outcome in outcomes(tokens):
                found, placebo = (
                    bootstrap.matched_difference(contrast.split.values(tokens, name), contrast.split.prompts, pairs)
                    for name in (outcome, f"placebo_{outcome}")
                )
                key = {"outcome": outcome, "split": contrast.split.name, "score": contrast.score, "replacement": replacement}
                rows.append(key | row(found, level, named="difference", placebo_difference=placebo.value, matched=matched))
    return pd.DataFrame(rows)


def balance(tokens: pd.DataFrame, *, by: Iterable[str] = MATCHED_SCORES, caliper: float = np.inf, seed: int = 0) -> pd.DataFrame:
    """Standardised mean differences of what was matched on, top minus bottom tertile, before and after.

    The scale is the root mean variance of the two groups before matching, throughout. Returns columns split,
    score, covariate, replacement, before, after, positions (pairs), prompts.
    """
    columns, space, rows = controls(tokens), features(tokens), []
    for contrast in _contrasts(tokens, by, [3], 2, seed):
        split = contrast.split
        for replacement in (True, False):
            pairs = pair_up(contrast, space[split.mask], replacement=replacement, caliper=caliper)
            prompts = len(np.unique(split.prompts.codes[pairs[0]]))
            for name, values in columns.items():
                before, after = _imbalance(values[split.mask], contrast, pairs)
                key = {"split": split.name, "score": contrast.score, "covariate": name, "replacement": replacement}
                rows.append(key | {"before": before, "after": after, "positions": len(pairs[0]), "prompts": prompts})
    return pd.DataFrame(rows)


def _imbalance(values: np.ndarray, contrast: Contrast, pairs: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    finite = np.isfinite(values)
    top, bottom = values[contrast.top & finite], values[contrast.bottom & finite]
    if not len(top) or not len(bottom):
        return np.nan, np.nan
    scale = np.sqrt((np.var(top) + np.var(bottom)) / 2)
    sides = (top, bottom), (values[pairs[0]], values[pairs[1]])
    return tuple(bootstrap.standardised_difference(*side, scale) for side in sides)
