"""The table of an intervention: mean reductions by cell and group of positions, with intervals.

A cell is compared with `random` and with `full` on its own positions. A mean is over positions and
step batches,

    T = sum_f sum_i r_fi / sum_f n_f      f over folds, i over the positions of the group in fold f

and its interval carries prompts, step batches and the draws of random selections as
`analysis.cell_effects` has them. A prompt is in the step batch of one fold, and held out for those
of all others.

Axes: N positions of the bank, F step batches, G prompts.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pandas as pd

from diagnostics.analysis import bootstrap
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, positive_ratio
from diagnostics.analysis.cell_effects import CellEstimate
from diagnostics.analysis.decision import beyond_best
from diagnostics.probing.intervention_cells import FACTS, MEASURES, Interventions

GROUPS = ("selected", "unselected", "step", "held_out")
"""Groups of positions that the table reports for each cell."""
Members = list[list[int]]
"""Numbers of a cell's effects: one list per draw, with one effect per step batch."""


def summarize(
    result: Interventions, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean reductions of each cell by group of positions, with intervals.

    Args:
        result: The cells with their effects.
        draws: Bootstrap draws over prompts.
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        One row per criterion, budget, horizon (0: the one step), group and measure. The rows of a
        criterion that draws random numbers average its draws; a value that is undefined is NaN.
        Columns: criterion, budget, horizon, group (selected and unselected positions of the step
        batches, where selected ones carried loss at least once; step: both; held_out), measure
        (forward_kl = KL(q||p), reverse_kl = KL(p||q), js), reduction (mean of before - after, nats
        per position; positive is better), low, high; minus_random and minus_full with their _low
        and _high (mean over the same positions of this cell's reduction less that of random,
        averaged over its draws at this budget, or of full); spread (standard deviation over the
        draws), selected (positions that carried loss, per step batch), step_size, update_norm,
        gradient_norm, ambiguous (share of the selection that ties decided), idle_steps (steps
        without loss, summed over step batches), overfitted (held-out reduction below an earlier
        horizon's while that of the step batches grew), positions, prompts, steps (step batches).
    """
    table = _Table(
        result, PromptClusters(result.tokens["prompt_id"].to_numpy(), draws=draws, seed=seed)
    )
    rows = [
        {"criterion": criterion, "budget": budget, "horizon": horizon, "group": group}
        | {"measure": measure}
        | table.row((criterion, budget, horizon), group, m, level)
        | table.facts((criterion, budget, horizon))
        for criterion, budget, horizon in table.members
        for group in GROUPS
        if table.present((criterion, budget, horizon), group)
        for m, measure in enumerate(MEASURES)
    ]
    return _with_overfitted(pd.DataFrame(rows))


Key = tuple[str, float, int]
"""Criterion, budget and horizon."""


class _Table:
    """Cells of an intervention by criterion, budget and horizon, as estimates over shared draws."""

    def __init__(self, result: Interventions, prompts: PromptClusters):
        self.result, self.prompts = result, prompts
        self.folds = sorted({cell.fold for cell in result.cells})
        self.members: dict[Key, Members] = {}
        for number, cell in enumerate(result.cells):
            draws = self.members.setdefault((*cell.name, cell.horizon), [])
            if cell.draw == len(draws):
                draws.append([])
            draws[cell.draw].append(number)
        self._finite = [np.isfinite(e.reduction_N3).all(axis=1) for e in result.effects]

    def _mask(self, number: int, group: str) -> np.ndarray:
        """Positions [N] of a group of a cell on one fold, as far as they were measured."""
        effect = self.result.effects[number]
        on_step = self.result.folds == self.result.cells[number].fold
        masks = {
            "selected": effect.selected_N,
            "unselected": on_step & ~effect.selected_N,
            "step": on_step,
            "held_out": ~on_step,
        }
        return masks[group] & self._finite[number]

    def present(self, key: Key, group: str) -> bool:
        """Whether every draw has a position in the group."""
        draws = self.members[key]
        return all(any(self._mask(n, group).any() for n in draw) for draw in draws)

    def row(self, key: Key, group: str, m: int, level: float) -> dict:
        """Own mean, and paired differences to random and to full on the same positions."""
        criterion, budget, horizon = key
        masks = [[self._mask(n, group) for n in draw] for draw in self.members[key]]
        own = self._mean(masks, self.members[key], m)
        rival = full = None
        rivals = self.members.get(("random", budget, horizon))
        if criterion != "random" and criterion != "full" and rivals:
            rival = own - self._rival(masks, rivals, m)
        if criterion != "full":
            full = own - self._mean(masks, self.members["full", 1.0, horizon] * len(masks), m)
        return (
            _ends("reduction", own, level, prefix="")
            | _ends("minus_random", rival, level)
            | _ends("minus_full", full, level)
            | {
                "spread": _spread(self._draw_means(masks, self.members[key], m)),
                "positions": own.positions,
                "prompts": own.prompts,
                "steps": own.steps,
            }
        )

    def _rival(self, masks: list[list[np.ndarray]], rivals: Members, m: int) -> CellEstimate:
        """Random's mean over its draws, on the positions of a cell (of each of its draws)."""
        crossed = [(mask, rival) for mask in masks for rival in rivals]
        return self._mean([a for a, _ in crossed], [b for _, b in crossed], m, draws=len(rivals))

    def _mean(
        self,
        masks: list[list[np.ndarray]],
        members: Members,
        m: int,
        *,
        draws: int | None = None,
    ) -> CellEstimate:
        """Mean over draws of the mean reduction on each draw's masks, one per step batch.

        draws: number of different selections that vary from one list of members to the next; all
        of them by default.
        """
        sums = [self._sums(mask, numbers, m) for mask, numbers in zip(masks, members, strict=True)]
        by_fold = np.concatenate(sums, axis=2)  # [F, G, 2 per draw]

        def mean(sums: np.ndarray) -> np.ndarray:
            ratios = positive_ratio(sums[..., 0::2], sums[..., 1::2])
            return ratios.mean(axis=-1, keepdims=True)

        any_mask = np.logical_or.reduce([mask for fold in masks for mask in fold])
        total = by_fold.sum(axis=0)
        (plain,) = bootstrap.of_sums(mean, total, self.prompts, any_mask)
        parts = {part.name: getattr(plain, part.name) for part in fields(Estimate)}
        if len(self.folds) > 1:
            parts["without_step"] = mean(total.sum(axis=0) - by_fold.sum(axis=1))[:, 0]
        error, freedom = _draw_error(by_fold.sum(axis=1), draws or len(members))
        return CellEstimate(**parts, draw_error=error, draw_freedom=freedom)

    def _sums(self, masks: list[np.ndarray], numbers: list[int], m: int) -> np.ndarray:
        """Sums [F, G, 2] of the reductions and of the positions under the masks of one draw."""
        return np.stack(
            [
                self.prompts.sums(
                    self.result.effects[n].reduction_N3[mask, m], np.ones(mask.sum()), at=mask
                )
                for mask, n in zip(masks, numbers, strict=True)
            ]
        )

    def _draw_means(self, masks: list[list[np.ndarray]], members: Members, m: int) -> list[float]:
        sums = [
            self._sums(mask, numbers, m).sum(axis=(0, 1))
            for mask, numbers in zip(masks, members, strict=True)
        ]
        return [float(positive_ratio(total, count)) for total, count in sums]

    def facts(self, key: Key) -> dict:
        """Number of selected positions and the steps' numbers, averaged over draws and folds."""
        effects = [self.result.effects[n] for draw in self.members[key] for n in draw]
        found = {name: float(np.mean([getattr(e, name) for e in effects])) for name in FACTS}
        found["idle_steps"] = round(found["idle_steps"] * len(self.folds))
        return {"selected": round(np.mean([e.selected_N.sum() for e in effects]))} | found


def _draw_error(sums_FD2: np.ndarray, draws: int) -> tuple[float, float]:
    """Standard error of a mean over independent selections in each step batch, and its degrees of
    freedom; 0 where there is one selection.

    sums_FD2: sums of reductions and of positions, in turn [F, 2 per draw].
    """
    if draws < 2:
        return 0.0, np.inf
    means_FD = positive_ratio(sums_FD2[:, 0::2], sums_FD2[:, 1::2])
    count, folds = means_FD.shape[1], len(means_FD)
    means_FD = means_FD.reshape(folds, count // draws, draws).mean(axis=1)
    error = np.sqrt(np.sum(means_FD.var(axis=1, ddof=1) / draws)) / folds
    return float(error), float(folds * (draws - 1))


def _spread(means: list[float]) -> float:
    return float(np.std(means, ddof=1)) if len(means) > 1 else np.nan


def _ends(name: str, estimate: Estimate | None, level: float, *, prefix: str | None = None) -> dict:
    prefix = f"{name}_" if prefix is None else prefix
    low, high = estimate.interval(level) if estimate else (np.nan, np.nan)
    return {
        name: estimate.value if estimate else np.nan,
        f"{prefix}low": low,
        f"{prefix}high": high,
    }


def _with_overfitted(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column overfitted, which is one for all groups of a cell and a measure."""
    keys = ["criterion", "budget", "measure"]
    marks = set()
    for key, curve in table[table["horizon"] > 0].groupby(keys, sort=False):
        wide = curve.pivot(index="horizon", columns="group", values="reduction").sort_index()
        beyond = beyond_best(list(wide["held_out"]), list(wide["step"]))
        marks |= {(*key, horizon) for horizon, over in zip(wide.index, beyond) if over}
    cells = table[[*keys, "horizon"]].itertuples(index=False, name=None)
    place = list(table.columns).index("positions")
    table.insert(place, "overfitted", [cell in marks for cell in cells])
    return table
