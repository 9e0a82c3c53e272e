"""Kendall's tau between captured gain and the effect of steps on the selected positions.

Cells are criteria x budgets. Offline, a cell's value is its captured sum of an outcome (see
`selection`): over the step positions, or over all positions of a fold table, whose outcomes are
held out. By intervention, it is the mean held-out reduction of a divergence after one step, or
after some optimizer steps, on the cell's positions alone (see `cell_effects`). With x and y two
such answers over the cells,

    tau = sum over pairs of sgn(x_a - x_b) sgn(y_a - y_b)
          / sqrt(pairs untied in x * pairs untied in y)

is Kendall's tau-b over the pairs of a *scope*: all pairs; the pairs of equal budget pooled, which
leaves out the trivial part, that a larger budget captures and teaches more; and each budget alone.

Cells that ties decide to more than `criteria.AMBIGUOUS` are left out, near-duplicate criteria are
one (their mean), and the pooled scope has the p value of a permutation over criteria
(`criterion_labels`), one per pair of answers.

In each draw both answers are computed anew, selections included. Where a split was given, step and
held-out prompts are resampled separately; in a fold table x and y share draws. Without a step batch
both are computed from the others. Cells are ranked by captured sums, which rank them as shares do
where there are shares: a share of a total means nothing where that is not positive.

Reference: Kendall 1945 (tau-b). Departure: tau's interval is on its own scale and ends at -1 and 1.
Over a few cells tau often is exactly 1 in a draw, where Fisher's scale has no end. The interval is
that of these criteria; the permutation asks about others.
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
from diagnostics.analysis.cell_effects import NO_CELLS, CellEffects, read_effects
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.criterion_labels import group_cells, grouping, permutation_p
from diagnostics.analysis.selection import BY_TABLE, cells, is_baseline, outcome_values
from diagnostics.analysis.selection_draws import (
    SELECTION_DRAWS,
    Candidates,
    Rules,
    Sums,
    selection_sums,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import combine, step_count
from diagnostics.core.inputs import several, takes, token_table
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

OFFLINE_OUTCOMES = (
    "context_gain",
    "gain",
    "relative_gain",
    "positive_gain",
    "first_order_gain",
    "lift",
)
RANKED_MEASURES = ("forward_kl", "reverse_kl")
NO_INTERVAL = Bootstrap(draws=0)
"""For tables of values alone."""


@dataclass(frozen=True)
class CellScores:
    """The values that one method gives every cell, with their draws.

    Attributes:
        name: Name of the answer in the tables.
        value_C: [cells] values; NaN where a cell has none.
        draws_DC: [draws, cells] the same in each draw of the prompts.
        prompts: Number of prompts that the values are computed from.
        unit: Divisor for display: for captured sums, the total.
        without_FC: [steps, cells] the values without each step batch; None for one step.
    """

    name: str
    value_C: np.ndarray
    draws_DC: np.ndarray
    prompts: int
    unit: float = 1.0
    without_FC: np.ndarray | None = None

    @cached_property
    def signs(self) -> np.ndarray:
        """[1 + D, C, C] signs of differences between cells; the estimate first, then the draws."""
        both = np.vstack([self.value_C[None], self.draws_DC])
        return np.sign(both[:, :, None] - both[:, None, :])

    def mean_over(self, members: list[np.ndarray]) -> CellScores:
        """Means over groups of cells; `members` has the cells of each group."""

        def grouped(values: np.ndarray) -> np.ndarray:
            return np.stack([values[..., cells].mean(axis=-1) for cells in members], axis=-1)

        without = None if self.without_FC is None else grouped(self.without_FC)
        return replace(
            self,
            value_C=grouped(self.value_C),
            draws_DC=grouped(self.draws_DC),
            without_FC=without,
        )


@dataclass(frozen=True)
class Tau(Estimate):
    """A Kendall's tau, with an interval that ends at -1 and 1."""

    def interval(self, level: float = Bootstrap.level) -> tuple[float, float]:
        """Compute the t interval.

        Args:
            level: Coverage, between 0 and 1.

        Returns:
            Low and high end, within [-1, 1].
        """
        low, high = super().interval(level)
        return float(np.maximum(low, -1.0)), float(np.minimum(high, 1.0))


@dataclass(frozen=True)
class Compared:
    """Cells with every answer about them.

    Attributes:
        cells: [C] columns criterion, budget, ambiguous (the larger share of the offline and the
            intervention's selection that ties decide) and group (of near-duplicates).
        answers: Values of the cells, the captured outcomes first.
    """

    cells: pd.DataFrame
    answers: list[CellScores]


@takes(tokens=token_table, outcomes=several, measures=several)
@with_settings(bootstrap=Bootstrap)
def agreement(
    tokens: pd.DataFrame,
    effects: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE_OUTCOMES,
    measures: Iterable[str] = RANKED_MEASURES,
    rules: Rules = BY_TABLE,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """Kendall's tau between captured outcomes and interventions, over cells.

    Args:
        tokens: A token table with `split` or `fold`, and outcomes.
        effects: `Interventions.by_prompt()`, or the `interventions.parquet` that the stage writes.
        outcomes: Outcome columns to compare by; those that the table lacks are left out.
        measures: Divergences whose reduction by a step is compared with.
        rules: Ties and scope of the offline selections.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        Columns scope (all, within_budget, or budget_<share>), x (captured_<outcome>), y (another
        captured outcome, held_out_<measure> for the mean reduction after one step, or
        held_out_h<k>_<measure> after k optimizer steps), kendall, low, high, p_permutation (of the
        scope within_budget; NaN in the others), groups (of near-duplicate criteria), cells (after
        grouping), cells_left_out (ambiguous), prompts (of the smaller side) and steps.

    Raises:
        DiagnosticsError: If split or prompts of the two tables do not agree, the table has none of
            the outcomes, or the interventions hold no cell but full and placebo.

    Reference:
        Kendall 1945 (tau-b).
    """
    found = _compared(tokens, effects, outcomes, measures, rules, bootstrap=bootstrap)
    rows: list[dict] = []
    for x, y in _pairings(found.answers):
        rows += _rows(found.cells, x, y, bootstrap)
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = [
    "scope",
    "x",
    "y",
    "kendall",
    "low",
    "high",
    "p_permutation",
    "groups",
    "cells",
    "cells_left_out",
    "prompts",
    "steps",
]


def _rows(frame: pd.DataFrame, x: CellScores, y: CellScores, bootstrap: Bootstrap):
    """The rows of two answers, one per scope."""
    held = np.isfinite(x.value_C) & np.isfinite(y.value_C)
    clear = (frame["ambiguous"] <= registry.AMBIGUOUS).to_numpy()
    used = np.flatnonzero(held & clear)
    at = {
        (row.criterion, row.budget): place
        for place, row in zip(used, frame.iloc[used].itertuples(), strict=True)
    }
    groups = dict(zip(frame["criterion"], frame["group"], strict=True))
    members = group_cells(at, groups)
    places = [np.array([at[cell] for cell in cells]) for cells in members.values()]
    if len(places) < 2:
        return
    grouped = pd.DataFrame(list(members), columns=["criterion", "budget"])
    one, other = x.mean_over(places), y.mean_over(places)
    for scope, pairs in scopes(grouped):
        if not pairs.any():
            continue
        tau = kendall(one, other, pairs)
        low, high = tau.interval(bootstrap.level)
        p = np.nan
        if scope == "within_budget":
            p = permutation_p(grouped, one.value_C, other.value_C, pairs, seed=bootstrap.seed)
        yield {
            "scope": scope,
            "x": x.name,
            "y": y.name,
            "kendall": tau.value,
            "low": low,
            "high": high,
            "p_permutation": p,
            "groups": grouped.loc[pairs.any(axis=1), "criterion"].nunique(),
            "cells": int(pairs.any(axis=1).sum()),
            "cells_left_out": int((held & ~clear).sum()),
            "prompts": tau.prompts,
            "steps": tau.steps,
        }


def answers(
    tokens: pd.DataFrame,
    effects: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE_OUTCOMES,
    measures: Iterable[str] = RANKED_MEASURES,
    rules: Rules = BY_TABLE,
) -> pd.DataFrame:
    """Every cell's value and its rank among the criteria of its budget, by each answer.

    Args:
        tokens: A token table with `split` or `fold`, and outcomes.
        effects: `Interventions.by_prompt()`, or the `interventions.parquet` that the stage writes.
        outcomes: Outcome columns to compare by; those that the table lacks are left out.
        measures: Divergences whose reduction by a step is compared with.
        rules: Ties and scope of the offline selections.

    Returns:
        One row per cell with columns criterion, budget, ambiguous (share of the selection that ties
        decide; above `criteria.AMBIGUOUS` the cell is left out of agreement), group (of
        near-duplicate criteria), then for each answer of `agreement` its value and <answer>_rank, 1
        for the best.

    Raises:
        DiagnosticsError: As `agreement`.
    """
    found = _compared(tokens, effects, outcomes, measures, rules, bootstrap=NO_INTERVAL)
    table = found.cells.copy()
    for answer in found.answers:
        table[answer.name] = answer.value_C / answer.unit if answer.unit > 0 else np.nan
        table[f"{answer.name}_rank"] = (
            pd.Series(answer.value_C).groupby(table["budget"]).rank(ascending=False, method="min")
        )
    return table


@with_settings(bootstrap=Bootstrap)
def offline_values(
    tokens: pd.DataFrame,
    cells: pd.DataFrame,
    *,
    outcomes: Iterable[str] = OFFLINE_OUTCOMES,
    rules: Rules = BY_TABLE,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> list[CellScores]:
    """Captured outcomes that a main job gives to cells of another run, over all positions.

    Args:
        tokens: The main job's token table.
        cells: Columns criterion, budget.
        outcomes: Outcome columns to compare by; those that the table lacks are left out.
        rules: Ties and scope of the selections.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        captured_<outcome> over all positions.

    Raises:
        DiagnosticsError: If the table has no outcome, or lacks a column that a criterion needs.
    """
    everywhere = np.ones(len(tokens), dtype=bool)
    prompts = PromptClusters(tokens["prompt_id"].to_numpy(), bootstrap=_few(bootstrap))
    # A lift is defined on the step half alone, and these values are of all positions.
    wanted = [name for name in outcomes if name != "lift"]
    chosen = _candidates(tokens, everywhere, prompts, cells, rules, bootstrap.seed)
    return _captured(chosen, cells, wanted)


def _few(bootstrap: Bootstrap) -> Bootstrap:
    """As many draws as selections are made anew in."""
    return replace(bootstrap, draws=min(bootstrap.draws, SELECTION_DRAWS))


def _compared(
    tokens: pd.DataFrame,
    effects: pd.DataFrame,
    outcomes: Iterable[str],
    measures: Iterable[str],
    rules: Rules,
    *,
    bootstrap: Bootstrap,
) -> Compared:
    table = read_effects(effects)
    _require_same_halves(tokens, table)
    named = table.loc[~table["criterion"].isin(NO_CELLS), ["criterion", "budget"]]
    frame = named.drop_duplicates().reset_index(drop=True)
    if frame.empty:
        raise DiagnosticsError(
            "The intervention table holds no cell but full and placebo. Intervene on some criteria"
            " first."
        )
    few, folds = _few(bootstrap), step_count(tokens) > 1
    mask = np.ones(len(tokens), dtype=bool) if folds else (tokens["split"] == "step").to_numpy()
    prompts = PromptClusters(tokens["prompt_id"].to_numpy()[mask], bootstrap=few)
    chosen = _candidates(tokens, mask, prompts, frame, rules, bootstrap.seed)
    found = _captured(chosen, frame, outcomes)
    held = CellEffects(table, bootstrap=few if folds else replace(few, seed=few.seed + 1))
    for horizon in sorted({h for _, _, h in held.cells}):
        found += [
            _reduction(held, frame, measure, horizon)
            for measure in measures
            if measure in held.measures
        ]
    names = list(dict.fromkeys(frame["criterion"]))
    labels = grouping(names, tokens)
    facts = {"ambiguous": _ambiguous(chosen, held, frame), "group": frame["criterion"].map(labels)}
    return Compared(frame.assign(**facts), found)


def _require_same_halves(tokens: pd.DataFrame, effects: pd.DataFrame) -> None:
    """Both tables must have the same prompts, in the same split or folds."""
    name = "fold" if step_count(tokens) > 1 else "split"
    require_columns(tokens, ("prompt_id", name, "position"), what="A comparison with interventions")
    ours = tokens.drop_duplicates("prompt_id").set_index("prompt_id")[name]
    on_step = effects[~effects["held_out"].astype(bool)].drop_duplicates("prompt_id")
    if name == "fold":
        theirs = on_step.set_index("prompt_id")["fold"]
    else:
        halves = effects.drop_duplicates("prompt_id").set_index("prompt_id")["held_out"]
        theirs = halves.map({True: "held_out", False: "step"})
    if sorted(ours.items()) != sorted(theirs.items()):
        differ = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        raise DiagnosticsError(
            "Token table and interventions split the prompts differently (the first to differ is"
            f" {differ!r}). Probe and intervene with the same seed and folds."
        )


def _candidates(
    tokens: pd.DataFrame,
    mask: np.ndarray,
    prompts: PromptClusters,
    frame: pd.DataFrame,
    rules: Rules,
    seed: int,
) -> Candidates:
    names = [name for name in dict.fromkeys(frame["criterion"]) if not is_baseline(name)]
    budgets = tuple(sorted(set(frame["budget"])))
    return Candidates(tokens, mask, prompts, tuple(names), budgets, rules, seed)


def _ambiguous(chosen: Candidates, held: CellEffects, frame: pd.DataFrame) -> list[float]:
    """The larger share that ties decide, offline and in the interventions; 0 for random."""
    offline = {key: cell.ambiguous for key, cell in cells(chosen).items()}
    horizons = {h for _, _, h in held.cells}
    shares = []
    for cell in frame.itertuples(index=False, name=None):
        steps = [held.fact((*cell, h), "ambiguous") for h in horizons if (*cell, h) in held]
        shares.append(float(np.fmax.reduce([0.0, offline.get(cell, 0.0), *steps])))
    return shares


def _present(tokens: pd.DataFrame, outcomes: Iterable[str], mask: np.ndarray) -> list[str]:
    sources = {name: "gain" if name == "positive_gain" else name for name in outcomes}
    present = [
        name
        for name, source in sources.items()
        if source in tokens and np.isfinite(outcome_values(tokens, name)[mask]).any()
    ]
    if not present:
        raise DiagnosticsError(
            f"The token table has no outcome, one of {', '.join(sources)}. Run the probe on it"
            " first."
        )
    return present


def _captured(chosen: Candidates, frame: pd.DataFrame, outcomes: Iterable[str]) -> list[CellScores]:
    """Captured sum of each outcome for every cell; for random its expectation."""
    tokens, mask = chosen.tokens, chosen.mask
    present = _present(tokens, outcomes, mask)

    def sums(table: pd.DataFrame, draws: int) -> Sums:
        columns = [np.ones(int(mask.sum()))]
        columns += [np.nan_to_num(outcome_values(table, name)[mask]) for name in present]
        held = np.stack(columns, axis=1)
        return selection_sums(chosen, lambda _: held, draws=draws)

    own = sums(tokens, chosen.prompts.draws)
    steps = step_count(tokens)
    left_out = [sums(combine(tokens, without=f), 0) for f in range(steps)] if steps > 1 else []
    return [
        CellScores(
            f"captured_{outcome}",
            passes[0],
            passes[1:],
            chosen.prompts.count,
            unit=float(own.total[0, m]),
            without_FC=np.array([_of_cells(chosen, frame, part, m)[0] for part in left_out])
            if left_out
            else None,
        )
        for m, outcome in enumerate(present, 1)
        for passes in [_of_cells(chosen, frame, own, m)]
    ]


def _of_cells(chosen: Candidates, frame: pd.DataFrame, sums: Sums, m: int) -> np.ndarray:
    """[P, C] captured sums of one column."""
    found = []
    for criterion, budget in frame[["criterion", "budget"]].itertuples(index=False):
        if is_baseline(criterion):
            rows = sums.total[:, 0]
            kept = np.array([registry.budget_count(int(n), budget) for n in rows])
            found.append(sums.total[:, m] * kept / rows)
        else:
            at = chosen.names.index(criterion), chosen.budgets.index(budget)
            found.append(sums.inside[:, at[0], at[1], m])
    return np.stack(found, axis=1)


def _reduction(held: CellEffects, frame: pd.DataFrame, measure: str, horizon: int) -> CellScores:
    """Mean held-out reduction for every cell; NaN for one without that horizon."""
    prefix = f"held_out_h{horizon}_" if horizon else "held_out_"
    count, steps = len(frame), len(held.folds)
    value, draws = np.full(count, np.nan), np.full((held.prompts.draws, count), np.nan)
    without = np.full((steps, count), np.nan)
    for c, cell in enumerate(frame[["criterion", "budget"]].itertuples(index=False, name=None)):
        if (*cell, horizon) in held:
            own = held.effect((*cell, horizon), measure)
            value[c], draws[:, c] = own.value, own.draws
            if own.without_step is not None:
                without[:, c] = own.without_step
    return CellScores(
        prefix + measure,
        value,
        draws,
        held.prompts.count,
        without_FC=without if steps > 1 else None,
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
    """Tau-b over the pairs [C, C], with its draws and its values without each step batch; NaN where
    an answer ties every pair.
    """
    tau = _tau(x.signs[:, pairs], y.signs[:, pairs])
    without = None
    if x.without_FC is not None or y.without_FC is not None:
        one, other = (
            part.value_C[None] if part.without_FC is None else part.without_FC for part in (x, y)
        )
        without = _tau(
            *(np.sign(part[:, :, None] - part[:, None, :])[:, pairs] for part in (one, other))
        )
    return Tau(
        float(tau[0]),
        tau[1:],
        int(pairs.any(axis=1).sum()),
        min(x.prompts, y.prompts),
        without_step=without,
    )


def _tau(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tau-b from signs [P, pairs] of each side."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
