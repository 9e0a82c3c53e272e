"""Kendall's tau between captured gain and the effect of a step on the selected positions.

Cells are criteria x budgets. Offline, a cell's value is its captured share of an outcome over the
step positions (see `selection`); by intervention, it is the mean reduction of a divergence after a
step on its positions alone (see `probing.intervention`). With x and y two such answers over the
cells,

    tau = sum over pairs of sgn(x_a - x_b) sgn(y_a - y_b)
          / sqrt(pairs untied in x * pairs untied in y)

is Kendall's tau-b over the pairs of a *scope*: all pairs; the pairs of equal budget pooled, which
leaves out the trivial part, that a larger budget captures and teaches more; and each budget alone.

In each draw both answers are computed anew. Step and held-out prompts are resampled separately,
since the split was given: x and y share draws where they are computed from the same prompts.

A share of a total means nothing where a resampled total is not positive. Cells are therefore ranked
by captured sums, which rank them as shares do where there are shares.

Reference: Kendall 1945 (tau-b). Departure: tau's interval is on its own scale and ends at -1 and 1.
Over a few cells tau often is exactly 1 in a draw, where Fisher's scale has no end. The cells are
fixed, not a sample of criteria.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.selection import SplitSelections, is_baseline, outcome_values
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

OFFLINE_OUTCOMES = ("gain", "relative_gain", "positive_gain", "first_order_gain", "lift")
RANKED_MEASURES = ("forward_kl", "reverse_kl")
EFFECT_MEASURES = (*RANKED_MEASURES, "js")
NO_INTERVAL = Bootstrap(draws=0)
"""For tables of values alone."""


@dataclass(frozen=True)
class CellScores:
    """The values that one method gives every cell, with their draws.

    Attributes:
        name: Name of the answer in the tables.
        value_C: [cells] values.
        draws_DC: [draws, cells] the same in each draw of the prompts.
        prompts: Number of prompts that the values are computed from.
        unit: Divisor for display: for captured sums, the total.
    """

    name: str
    value_C: np.ndarray
    draws_DC: np.ndarray
    prompts: int
    unit: float = 1.0

    @cached_property
    def signs(self) -> np.ndarray:
        """[1 + D, C, C] signs of differences between cells; the estimate first, then the draws."""
        both = np.vstack([self.value_C[None], self.draws_DC])
        return np.sign(both[:, :, None] - both[:, None, :])


@dataclass(frozen=True)
class Tau(Estimate):
    """A Kendall's tau, with an interval that ends at -1 and 1."""

    def interval(self, level: float = Bootstrap.level) -> tuple[float, float]:
        """Compute the t interval with prompts - 1 degrees of freedom.

        Args:
            level: Coverage, between 0 and 1.

        Returns:
            Low and high end, within [-1, 1].
        """
        low, high = super().interval(level)
        return float(np.maximum(low, -1.0)), float(np.minimum(high, 1.0))


@with_settings(bootstrap=Bootstrap)
def agreement(
    tokens: pd.DataFrame,
    effects: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE_OUTCOMES,
    measures: Iterable[str] = RANKED_MEASURES,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Kendall's tau between captured outcomes and interventions, over cells.

    Args:
        tokens: A token table with `split` and outcomes.
        effects: `Interventions.by_prompt()`, or the `interventions.parquet` that the stage writes.
        outcomes: Outcome columns to compare by; those that the table lacks are left out.
        measures: Divergences whose reduction by a step is compared with.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns scope (all, within_budget, or budget_<share>), x, y (captured_<outcome>, or
        <split>_<measure> for a mean reduction), kendall, low, high, cells, prompts (of the smaller
        half).

    Raises:
        DiagnosticsError: If split or prompts of the two tables do not agree, the table has none of
            the outcomes, or the interventions hold no cell but full and placebo.

    Reference:
        Kendall 1945 (tau-b).
    """
    cells = _cells(effects)
    answers = _answers(tokens, effects, cells, outcomes, measures, bootstrap=bootstrap)
    rows = []
    for scope, pairs in scopes(cells):
        for x, y in _pairings(answers):
            estimate = kendall(x, y, pairs)
            low, high = estimate.interval(bootstrap.level)
            rows.append(
                {
                    "scope": scope,
                    "x": x.name,
                    "y": y.name,
                    "kendall": estimate.value,
                    "low": low,
                    "high": high,
                    "cells": int(pairs.any(axis=1).sum()),
                    "prompts": estimate.prompts,
                }
            )
    return pd.DataFrame(rows)


def answers(
    tokens: pd.DataFrame,
    effects: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE_OUTCOMES,
    measures: Iterable[str] = RANKED_MEASURES,
) -> pd.DataFrame:
    """Every cell's value and its rank among the criteria of its budget, by each answer.

    Args:
        tokens: A token table with `split` and outcomes.
        effects: `Interventions.by_prompt()`, or the `interventions.parquet` that the stage writes.
        outcomes: Outcome columns to compare by; those that the table lacks are left out.
        measures: Divergences whose reduction by a step is compared with.

    Returns:
        One row per cell with columns criterion, budget, then for each answer of `agreement` its
        value and <answer>_rank, 1 for the best.

    Raises:
        DiagnosticsError: As `agreement`.
    """
    cells = _cells(effects)
    table = cells.copy()
    for answer in _answers(tokens, effects, cells, outcomes, measures, bootstrap=NO_INTERVAL):
        table[answer.name] = answer.value_C / answer.unit if answer.unit > 0 else np.nan
        table[f"{answer.name}_rank"] = (
            pd.Series(answer.value_C).groupby(table["budget"]).rank(ascending=False, method="min")
        )
    return table


@with_settings(bootstrap=Bootstrap)
def offline_values(
    tokens: pd.DataFrame,
    effects: pd.DataFrame | None,
    cells: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE_OUTCOMES,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> list[CellScores]:
    """Values that a main job gives to cells of another run.

    Args:
        tokens: The main job's token table.
        effects: Its interventions as for `agreement`; None where no intervention was made.
        cells: Columns criterion, budget.
        outcomes: Outcome columns to compare by; those that the table lacks are left out.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        captured_<outcome> over all positions and, at held-out positions, intervention_<measure>,
        which is NaN in a cell without an intervention.

    Raises:
        DiagnosticsError: If the table has no outcome, or lacks a column that a criterion needs.
    """
    everywhere = np.ones(len(tokens), dtype=bool)
    prompts = PromptClusters(tokens["prompt_id"].to_numpy(), bootstrap=bootstrap)
    # A lift is defined on the step half alone, and these values are of all positions.
    present = _present(tokens, [name for name in outcomes if name != "lift"], everywhere)
    found = [
        _captured(tokens, everywhere, cells, outcome, prompts, bootstrap.seed)
        for outcome in present
    ]
    if effects is not None:
        require_columns(
            effects,
            ("criterion", "budget", "draw", "prompt_id", "split", "positions"),
            what="An intervention table",
        )
        held_out = PromptClusters(
            effects.loc[effects["split"] == "held_out", "prompt_id"].unique(),
            bootstrap=bootstrap,
            seed=bootstrap.seed + 1,
        )
        reductions = [
            _reduction(effects, cells, "held_out", measure, held_out)
            for measure in EFFECT_MEASURES
            if measure in effects
        ]
        found += [
            replace(answer, name=f"intervention_{answer.name.removeprefix('held_out_')}")
            for answer in reductions
        ]
    return found


def _cells(effects: pd.DataFrame) -> pd.DataFrame:
    """Criterion and budget of each cell except full and placebo, which are no selections."""
    require_columns(
        effects,
        ("criterion", "budget", "draw", "prompt_id", "split", "positions", *RANKED_MEASURES),
        what="An intervention table",
    )
    cells = effects.loc[~effects["criterion"].isin(["full", "placebo"]), ["criterion", "budget"]]
    cells = cells.drop_duplicates().reset_index(drop=True)
    if cells.empty:
        raise DiagnosticsError(
            "The intervention table holds no cell but full and placebo. Intervene on some criteria"
            " first."
        )
    return cells


def _answers(
    tokens: pd.DataFrame,
    effects: pd.DataFrame,
    cells: pd.DataFrame,
    outcomes: Iterable[str],
    measures: Iterable[str],
    *,
    bootstrap: Bootstrap,
) -> list[CellScores]:
    _require_same_split(tokens, effects)
    on_step = (tokens["split"] == "step").to_numpy()
    halves = {
        name: PromptClusters(
            tokens["prompt_id"].to_numpy()[mask], bootstrap=bootstrap, seed=bootstrap.seed + number
        )
        for number, (name, mask) in enumerate((("step", on_step), ("held_out", ~on_step)))
    }
    found = [
        _captured(tokens, on_step, cells, outcome, halves["step"], bootstrap.seed)
        for outcome in _present(tokens, outcomes, on_step)
    ]
    return found + [
        _reduction(effects, cells, split, measure, prompts)
        for split, prompts in halves.items()
        for measure in measures
    ]


def _require_same_split(tokens: pd.DataFrame, effects: pd.DataFrame) -> None:
    require_columns(
        tokens, ("prompt_id", "split", "position"), what="A comparison with interventions"
    )
    ours = tokens.drop_duplicates("prompt_id").set_index("prompt_id")["split"]
    theirs = effects.drop_duplicates("prompt_id").set_index("prompt_id")["split"]
    if sorted(ours.items()) != sorted(theirs.items()):
        differ = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        raise DiagnosticsError(
            "Token table and interventions split the prompts differently (the first to differ is"
            f" {differ!r}). Probe and intervene with the same seed and held-out share."
        )


def _present(tokens: pd.DataFrame, outcomes: Iterable[str], on_step: np.ndarray) -> list[str]:
    sources = {name: "gain" if name == "positive_gain" else name for name in outcomes}
    present = [
        name
        for name, source in sources.items()
        if source in tokens and np.isfinite(outcome_values(tokens, name)[on_step]).any()
    ]
    if not present:
        raise DiagnosticsError(
            f"The token table has no outcome, one of {', '.join(sources)}. Run the probe on it"
            " first."
        )
    return present


def _captured(
    tokens: pd.DataFrame,
    on_step: np.ndarray,
    cells: pd.DataFrame,
    outcome: str,
    prompts: PromptClusters,
    seed: int,
) -> CellScores:
    """Captured sum of the outcome over the step positions, for every cell; for random its
    expectation.
    """
    names = [name for name in dict.fromkeys(cells["criterion"]) if not is_baseline(name)]
    scored = {name: registry.score_criterion(tokens, name, seed=seed)[on_step] for name in names}
    budgets = tuple(sorted(set(cells["budget"])))
    positions = tokens.loc[on_step, ["position"]].reset_index(drop=True)
    values = outcome_values(tokens, outcome)[on_step]
    part = SplitSelections("step", prompts, positions, budgets, {outcome: values}, scored)
    inside = {name: part.inside(choice, values) for name, choice in part.choices.items()}
    total = part.total(values)
    sums = []
    for criterion, budget in cells.itertuples(index=False):
        expected = total[:, 0] * registry.budget_count(len(positions), budget) / len(positions)
        sums.append(
            expected if is_baseline(criterion) else inside[criterion][:, budgets.index(budget)]
        )
    sums = np.stack(sums, axis=1)
    return CellScores(
        f"captured_{outcome}",
        sums.sum(axis=0),
        prompts.weights @ sums,
        prompts.count,
        unit=float(total.sum()),
    )


def _reduction(
    effects: pd.DataFrame, cells: pd.DataFrame, split: str, measure: str, prompts: PromptClusters
) -> CellScores:
    """Mean reduction over the split's positions, for every cell; for random the mean over its
    selections.
    """
    here = effects[effects["split"] == split]
    keys = ["criterion", "budget", "prompt_id"]
    sums = here.groupby(keys, sort=False)[["positions", measure]].mean().reset_index()
    index = pd.MultiIndex.from_frame(cells)
    over, under = (
        sums.pivot(index=["criterion", "budget"], columns="prompt_id", values=name)
        .reindex(index)[prompts.names]
        .to_numpy(dtype=float)
        for name in (measure, "positions")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (prompts.weights @ over.T) / (prompts.weights @ under.T)
    return CellScores(
        f"{split}_{measure}", over.sum(axis=1) / under.sum(axis=1), draws, prompts.count
    )


def scopes(cells: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pairs [C, C] of each scope."""
    budget = cells["budget"].to_numpy()
    distinct = ~np.eye(len(cells), dtype=bool)
    same = distinct & (budget[:, None] == budget[None, :])
    yield "all", distinct
    yield "within_budget", same
    for share in sorted(set(budget)):
        if (budget == share).sum() > 2:
            yield f"budget_{share:g}", same & (budget == share)[:, None]


def _pairings(found: list[CellScores]) -> Iterator[tuple[CellScores, CellScores]]:
    """Each offline answer with each other and with each intervention."""
    offline = [answer for answer in found if answer.name.startswith("captured_")]
    yield from combinations(offline, 2)
    yield from ((x, y) for x in offline for y in found if y not in offline)


def kendall(x: CellScores, y: CellScores, pairs: np.ndarray) -> Tau:
    """Tau-b over the pairs [C, C], with its draws; NaN where an answer ties every pair."""
    a = x.signs[:, pairs]
    b = y.signs[:, pairs]
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return Tau(float(tau[0]), tau[1:], int(pairs.any(axis=1).sum()), min(x.prompts, y.prompts))
