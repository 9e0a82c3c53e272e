"""Does the offline answer hold? Captured gain against what a step on the selected positions does.

Cells are criteria x budgets. Offline, a cell is its captured share of an outcome over the step
positions (see `comparison`); by intervention, it is the mean reduction of a divergence after a step
on its positions alone (see `intervention`). With x and y two such answers over the cells,

    tau = sum over pairs of sgn(x_a - x_b) sgn(y_a - y_b) / sqrt(pairs untied in x * pairs untied in
    y)

is Kendall's tau-b over the pairs of a *scope*: all pairs; the pairs of equal budget pooled, which
leaves out the trivial part, that a larger budget captures and teaches more; and each budget alone.

In each draw both answers are worked out anew. Step and held-out prompts are resampled apart, since
the split was given: x and y share draws where they rest on the same prompts.

A share of a total says nothing where a resampled total is not positive; cells are therefore ranked
by captured sums, which rank them as shares do where there are shares.

Reference: Kendall 1945 (tau-b). Departure: tau's interval is on its own scale and ends at -1 and 1.
Over a few cells it often is 1 exactly in a draw, where Fisher's scale has no end. The cells are
fixed, not a sample of criteria."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.selection import SplitSelections, is_baseline, outcome_values
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns

OFFLINE = ("gain", "relative_gain", "positive_gain", "first_order_gain", "lift")
MEASURES = ("forward_kl", "reverse_kl")
EFFECTS = (*MEASURES, "js")


@dataclass(frozen=True)
class CellScores:
    """One way of valuing every cell, with its bootstrap."""

    name: str
    value_C: np.ndarray
    draws_DC: np.ndarray
    prompts: int
    unit: float = 1.0
    """What the values are divided by to be shown: for captured sums, the total."""

    @cached_property
    def signs(self) -> np.ndarray:
        """[1 + D, C, C] signs of differences between cells; the estimate first, then the draws."""
        both = np.vstack([self.value_C[None], self.draws_DC])
        return np.sign(both[:, :, None] - both[:, None, :])


@dataclass(frozen=True)
class Tau(Estimate):
    """A Kendall's tau, with an interval that ends at -1 and 1."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Low and high end of the t interval with prompts - 1 degrees of freedom."""
        low, high = super().interval(level)
        return float(np.maximum(low, -1.0)), float(np.minimum(high, 1.0))


def agreement(
    tokens: pd.DataFrame,
    effects: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE,
    measures: Iterable[str] = MEASURES,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Kendall's tau between captured outcomes and interventions, over cells.

    tokens: a token table with `split` and outcomes. effects: `Interventions.by_prompt()`, or the
    file that the stage writes. outcomes: those that the table lacks are left out. Returns columns
    scope (all, within_budget, or budget_<share>), x, y (captured_<outcome>, or <split>_<measure>
    for a mean reduction), kendall, low, high, cells, prompts (of the smaller half). Raises
    DiagnosticsError where split or prompts of the two do not agree, or no outcome is there."""
    cells = _cells(effects)
    answers = _answers(tokens, effects, cells, outcomes, measures, draws=draws, seed=seed)
    rows = []
    for scope, pairs in scopes(cells):
        for x, y in _pairings(answers):
            estimate = kendall(x, y, pairs)
            low, high = estimate.interval(level)
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
    outcomes: Iterable[str] = OFFLINE,
    measures: Iterable[str] = MEASURES,
) -> pd.DataFrame:
    """Every cell's value and its rank among the criteria of its budget, 1 the best, by each answer.

    Returns columns criterion, budget, then for each answer of `agreement` the value and
    <answer>_rank."""
    cells = _cells(effects)
    table = cells.copy()
    for answer in _answers(tokens, effects, cells, outcomes, measures, draws=2, seed=0):
        table[answer.name] = answer.value_C / answer.unit if answer.unit > 0 else np.nan
        table[f"{answer.name}_rank"] = (
            pd.Series(answer.value_C).groupby(table["budget"]).rank(ascending=False, method="min")
        )
    return table


def foreseen(
    tokens: pd.DataFrame,
    effects: pd.DataFrame | None,
    cells: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE,
    draws: int = 1000,
    seed: int = 0,
) -> list[CellScores]:
    """What a main job says of cells that are not its own, for a comparison with something else than
    its interventions.

    effects: as for `agreement`, None where no intervention was made. cells: columns criterion,
    budget. Returns captured_<outcome> over all positions and, at held-out positions,
    intervention_<measure>, NaN in a cell that was not intervened on. Raises DiagnosticsError where
    the table has no outcome, or lacks a column of a criterion."""
    everywhere = np.ones(len(tokens), dtype=bool)
    prompts = PromptClusters(tokens["prompt_id"].to_numpy(), draws=draws, seed=seed)
    present = _present(
        tokens, [name for name in outcomes if name != "lift"], everywhere
    )  # a lift is of the step half alone
    found = [_captured(tokens, everywhere, cells, outcome, prompts, seed) for outcome in present]
    if effects is not None:
        require_columns(
            effects,
            ("criterion", "budget", "draw", "prompt_id", "split", "positions"),
            what="An intervention table",
        )
        held_out = PromptClusters(
            effects.loc[effects["split"] == "held_out", "prompt_id"].unique(),
            draws=draws,
            seed=seed + 1,
        )
        reductions = [
            _reduction(effects, cells, "held_out", measure, held_out)
            for measure in EFFECTS
            if measure in effects
        ]
        found += [
            replace(answer, name=f"intervention_{answer.name.removeprefix('held_out_')}")
            for answer in reductions
        ]
    return found


def _cells(effects: pd.DataFrame) -> pd.DataFrame:
    """Criterion and budget of each cell but full and placebo, which no selection competes with."""
    require_columns(
        effects,
        ("criterion", "budget", "draw", "prompt_id", "split", "positions", *MEASURES),
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
    draws: int,
    seed: int,
) -> list[CellScores]:
    _require_same_split(tokens, effects)
    on_step = (tokens["split"] == "step").to_numpy()
    halves = {
        name: PromptClusters(tokens["prompt_id"].to_numpy()[mask], draws=draws, seed=seed + number)
        for number, (name, mask) in enumerate((("step", on_step), ("held_out", ~on_step)))
    }
    found = [
        _captured(tokens, on_step, cells, outcome, halves["step"], seed)
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
    """Captured sum of the outcome over the step positions, cell by cell; for random its
    expectation.
    """
    names = [name for name in dict.fromkeys(cells["criterion"]) if not is_baseline(name)]
    scored = {name: registry.score_criterion(tokens, name, seed=seed)[on_step] for name in names}
    budgets = tuple(sorted(set(cells["budget"])))
    positions = tokens.loc[on_step, ["position"]].reset_index(drop=True)
    values = outcome_values(tokens, outcome)[on_step]
    part = SplitSelections("step", prompts, positions, budgets, {outcome: values}, scored)
    inside, total = (
        {name: part.inside(choice, values) for name, choice in part.choices.items()},
        part.total(values),
    )
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
    """Mean reduction over the split's positions, cell by cell; for random averaged over its
    draws.
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
    """Tau-b over the pairs, with its draws; NaN where an answer ties every pair."""
    a, b = x.signs[:, pairs], y.signs[:, pairs]
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return Tau(float(tau[0]), tau[1:], int(pairs.any(axis=1).sum()), min(x.prompts, y.prompts))
