"""The tables of the study: a token table in, a DataFrame out.

Scores are normalised over the whole table; a split only chooses which positions are correlated. The
outcomes are `gain` and `reverse_gain` in nats and `relative_gain` as a fraction; the placebo of an outcome is
the same quantity after a random step of the same norm, and shows what having D on both sides gives alone.
Every interval resamples prompts (see `statistics`); every table carries its positions and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics import statistics
from diagnostics.statistics import Estimate, Prompts, Variable
from diagnostics.types import DiagnosticsError, require_columns

OUTCOMES = ("gain", "relative_gain", "reverse_gain")
METHODS: dict[str, Callable] = {
    "spearman": statistics.spearman, "pearson": statistics.pearson, "kendall": statistics.kendall,
}
Q3_SCORES = ("compatibility", "teachability", "incompatible", "divergence")
GROUPS = {"tertile": 3, "quartile": 4}


@dataclass(frozen=True)
class Split:
    """Some positions of a table with their prompts' draws."""

    name: str
    mask: np.ndarray
    prompts: Prompts


def splits(tokens: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> Iterator[Split]:
    """`all`, then `step` and `held_out` where the table has both."""
    require_columns(tokens, ["prompt_id"], what="the analysis")
    names = ["all"]
    if "split" in tokens and {"step", "held_out"} <= set(tokens["split"]):
        names += ["step", "held_out"]
    for name in names:
        mask = np.ones(len(tokens), dtype=bool) if name == "all" else (tokens["split"] == name).to_numpy()
        yield Split(name, mask, Prompts(tokens["prompt_id"].to_numpy()[mask], draws=draws, seed=seed))


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


def correlate(
    tokens: pd.DataFrame,
    *,
    criteria: Iterable[str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation of every outcome with every criterion, in long form.

    criteria: names or aliases; None takes all that the table's columns allow. Returns columns outcome,
    criterion, split (all, step, held_out), method (spearman, pearson, kendall), estimate, low, high, placebo,
    positions, prompts. `placebo` is the correlation with the outcome's placebo, NaN without one. Undefined
    pairs are left out position by position; a constant score gives NaN. Raises DiagnosticsError where the
    table holds no outcome or lacks a criterion's columns.
    """
    scored, rows = scores(tokens, criteria, seed=seed), []
    for split in splits(tokens, draws=draws, seed=seed):
        variables = {name: Variable(score[split.mask]) for name, score in scored.items()}
        for outcome in outcomes(tokens):
            values, placebo = (Variable(_values(tokens, name, split)) for name in (outcome, f"placebo_{outcome}"))
            for name, score in variables.items():
                for method, function in METHODS.items():
                    estimate = function(score, values, split.prompts)
                    control = function(score, placebo, split.prompts).value
                    key = {"outcome": outcome, "criterion": name, "split": split.name, "method": method}
                    rows.append(key | _interval(estimate, level, placebo=control))
    return pd.DataFrame(rows)


def q3_contrast(
    tokens: pd.DataFrame,
    *,
    by: Iterable[str] = Q3_SCORES,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Within Q3, mean outcome of the top minus the bottom group of each score.

    Groups are tertiles and quartiles of the score over all Q3 positions of the split, cut once. Returns
    columns outcome, split, score, groups (tertile, quartile), difference, low, high, bottom_mean, top_mean,
    placebo_difference, positions, prompts.
    """
    rows = []
    for split, score, outcome, values, placebo, in_q3 in _q3(tokens, by, draws, seed):
        for kind, count in GROUPS.items():
            group = statistics.groups_by_rank(score.values, count, in_q3)
            top, bottom = group == count, group == 1
            difference = statistics.mean_difference(values, split.prompts, top, bottom)
            key = {"outcome": outcome, "split": split.name, "score": score.name, "groups": kind}
            row = key | _interval(
                difference, level, named="difference",
                bottom_mean=statistics.mean(values, split.prompts, bottom).value,
                top_mean=statistics.mean(values, split.prompts, top).value,
                placebo_difference=statistics.mean_difference(placebo, split.prompts, top, bottom).value,
            )
            rows.append(row)
    return pd.DataFrame(rows)


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
    for split, score, outcome, values, _, in_q3 in _q3(tokens, by, draws, seed):
        group = statistics.groups_by_rank(score.values, 3, in_q3)
        for number in (1, 2, 3):
            key = {"outcome": outcome, "split": split.name, "score": score.name, "group": number}
            rows.append(key | _interval(statistics.mean(values, split.prompts, group == number), level, named="mean"))
    return pd.DataFrame(rows)


def _q3(tokens: pd.DataFrame, by: Iterable[str], draws: int, seed: int) -> Iterator[tuple]:
    """Split, score on it, outcome, its values and its placebo's, and which positions lie in Q3."""
    scored, in_q3 = scores(tokens, by, seed=seed), registry.quadrants(tokens) == 3
    for split in splits(tokens, draws=draws, seed=seed):
        for outcome in outcomes(tokens):
            values, placebo = _values(tokens, outcome, split), _values(tokens, f"placebo_{outcome}", split)
            for name, score in scored.items():
                yield split, pd.Series(score[split.mask], name=name), outcome, values, placebo, in_q3[split.mask]


def _values(tokens: pd.DataFrame, name: str, split: Split) -> np.ndarray:
    """A column on a split as float64, all NaN where the table lacks it."""
    if name not in tokens:
        return np.full(int(split.mask.sum()), np.nan)
    values = tokens[name].to_numpy(dtype=np.float64)[split.mask]
    return np.where(np.isfinite(values), values, np.nan)


def _interval(estimate: Estimate, level: float, *, named: str = "estimate", **more) -> dict:
    low, high = estimate.interval(level)
    ends = {named: estimate.value, "low": low, "high": high}
    return ends | more | {"positions": estimate.positions, "prompts": estimate.prompts}
