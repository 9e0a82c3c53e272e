"""Held-out effects of intervention cells, with the three parts of their intervals.

A cell is a criterion at a budget, after a horizon of optimizer steps. For prompt g and the step
batch of fold f, s_gf is the divergence's summed reduction and n_gf the number of positions; a
prompt is held out for every step batch but its own. A cell's effect is the mean over held-out
positions and step batches,

    T     = sum_g sum_f s_gf / sum_g sum_f n_gf            f over the batches that g is held out for
    SE^2  = SE_G^2 + max(SE_F^2, SE_D^2)                   prompts; step batches; random selections
    SE_D^2 = sum_f (variance of random's draws in f) / draws_f / F^2

with SE_G and SE_F as in `bootstrap`. Cells are paired by prompt and by step batch. Each step batch
has random selections of its own, so that their spread is within the spread between batches: adding
it again would count it twice. It is a floor under that spread, which few batches may show too small
by chance, and it stands alone where there is one batch. What a prompt and a step batch do together
is in both parts, so that an interval is too wide where that is most of the spread.

Axes: D draws of a seeded criterion, F step batches (folds), G prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.analysis.bootstrap import (
    Estimate,
    PromptClusters,
    of_sums,
    positive_ratio,
    ratio_of_sums,
)
from diagnostics.analysis.config import Bootstrap
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

EFFECT_MEASURES = ("forward_kl", "reverse_kl", "js")
"""Divergences whose reduction an intervention records, in nats."""
NO_CELLS = ("full", "placebo")
"""What an intervention compares with, and no selection."""
ROLLOUTS = ("all", "right", "wrong")
"""Rollouts that a cell's effect is about: all, and those that a verifier calls right or wrong."""
_KEYS = ["criterion", "budget", "draw", "fold", "horizon", "prompt_id"]


def read_effects(effects: pd.DataFrame) -> pd.DataFrame:
    """Bring an intervention table into the form of today.

    Args:
        effects: `interventions.parquet`: criterion, budget, draw, fold (of the step batch), horizon
            (optimizer steps; 0 for one step of matched norm), prompt_id, held_out, positions, and
            the summed reductions (nats) of at least one of EFFECT_MEASURES; optionally ambiguous
            and correct. An older table has split in place of fold, horizon and held_out.

    Returns:
        A copy with fold 0 and horizon 0 where the table has none; older tables without a step
        batch's fold have one step.

    Raises:
        DiagnosticsError: A column is missing, a key stands twice, or a number is not finite.
    """
    require_columns(
        effects,
        ("criterion", "budget", "draw", "prompt_id", "positions"),
        what="An intervention table",
    )
    if not {"held_out", "split"} & set(effects):
        raise DiagnosticsError(
            "An intervention table needs the column held_out (or split, in older tables). Read the"
            " interventions.parquet that `intervene` writes."
        )
    found = effects.copy()
    if "held_out" not in found:
        found["held_out"] = found["split"] == "held_out"
    for name in ("fold", "horizon"):
        if name not in found:
            found[name] = 0
    _check(found)
    return found


def _check(effects: pd.DataFrame) -> None:
    measures = [name for name in EFFECT_MEASURES if name in effects]
    if not measures:
        raise DiagnosticsError(
            f"An intervention table needs one of {', '.join(EFFECT_MEASURES)}; got the columns"
            f" {', '.join(map(str, effects.columns))}. Read the interventions.parquet that"
            " `intervene` writes."
        )
    finite = np.isfinite(effects[[*measures, "positions"]].to_numpy(dtype=np.float64)).all(axis=1)
    if not finite.all():
        first = effects.loc[~finite, _KEYS].iloc[0].to_dict()
        raise DiagnosticsError(
            f"{int((~finite).sum())} rows of the intervention table are not finite, the first of"
            f" {first}. A position that is undefined is left out of the sum, not summed as NaN."
        )
    keys = _KEYS + (["correct"] if "correct" in effects else [])
    twice = effects.duplicated(keys)
    if twice.any():
        first = effects.loc[twice, keys].iloc[0].to_dict()
        raise DiagnosticsError(
            f"{int(twice.sum())} rows of the intervention table stand twice, the first of {first}."
            " A prompt has one row per cell, draw, step batch and horizon."
        )


@dataclass(frozen=True)
class CellEstimate(Estimate):
    """A cell's effect, or a difference of two, whose interval also carries random selections.

    Attributes:
        draw_error: Standard error of the mean over a seeded criterion's selections; 0 for a
            criterion that chooses by score, NaN for one seeded selection alone.
        draw_freedom: Degrees of freedom of that error.
    """

    draw_error: float = 0.0
    draw_freedom: float = np.inf

    def __sub__(self, other: Estimate) -> CellEstimate:
        """Paired by prompt and by step batch; the selections of two criteria are independent."""
        plain = super().__sub__(other)
        parts = {part.name: getattr(plain, part.name) for part in fields(Estimate)}
        mine = (self.draw_error, self.draw_freedom)
        theirs = (getattr(other, "draw_error", 0.0), getattr(other, "draw_freedom", np.inf))
        error, freedom = satterthwaite(mine, theirs)
        return CellEstimate(**parts, draw_error=error, draw_freedom=freedom)

    @cached_property
    def batch_error(self) -> float:
        """The part that one more step batch would lower: step batches and their selections."""
        if self.steps < 2:
            return self.draw_error
        # Where each step batch has one selection, its spread is within that between batches.
        return float(np.fmax(self.step_error, self.draw_error))

    @property
    def batch_freedom(self) -> float:
        """Degrees of freedom of `batch_error`."""
        between = self.steps > 1 and not self.draw_error > self.step_error
        return float(self.steps - 1 if between else self.draw_freedom)

    @cached_property
    def standard_error(self) -> float:
        """The standard error with its parts: prompts, step batches and random selections."""
        return float(np.hypot(self.prompt_error, self.batch_error))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the interval (Satterthwaite 1946)."""
        of_prompts = float(max(self.prompts - 1, 1))
        parts = (self.prompt_error, of_prompts), (self.batch_error, self.batch_freedom)
        found = satterthwaite(*parts)[1]
        return found if np.isfinite(found) else of_prompts


def satterthwaite(*parts: tuple[float, float]) -> tuple[float, float]:
    """Standard error of a sum of independent parts, and its degrees of freedom.

    Args:
        parts: (standard error, degrees of freedom) of each.

    Returns:
        The root of the summed squares, and (sum v)^2 / sum (v^2 / freedom) over the variances v;
        infinite where no part has a spread that was estimated.

    Reference:
        Satterthwaite 1946.
    """
    variances = np.array([error**2 for error, _ in parts])
    spread = np.sum(variances**2 / np.array([freedom for _, freedom in parts]))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = variances.sum() ** 2 / spread if spread != 0 else np.inf
    return float(np.sqrt(variances.sum())), float(freedom)


@dataclass(frozen=True)
class Sums:
    """Sums of one cell: reductions [M, D, F, G] in nats and positions [D, F, G]."""

    reduction_MDFG: np.ndarray
    positions_DFG: np.ndarray


Cell = tuple[str, float, int]
"""Criterion, budget and horizon."""


class CellEffects:
    """The cells of an intervention table as estimates that share draws of the prompts.

    Args:
        effects: A table as `read_effects` takes it.
        rollouts: One of ROLLOUTS; `right` and `wrong` need the column correct.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Attributes:
        cells: Criterion, budget and horizon of each cell, in the table's order; no placebo.
        measures: The divergences of the table.
        folds: Numbers of the step batches.

    Raises:
        DiagnosticsError: The table is not one of interventions, holds no held-out prompt, or its
            cells do not cover the same prompts and step batches.
    """

    @with_settings(bootstrap=Bootstrap)
    def __init__(
        self,
        effects: pd.DataFrame,
        *,
        rollouts: str = "all",
        bootstrap: Bootstrap = Bootstrap(),
        **settings: Any,
    ):
        effects = read_effects(effects)
        self.rollouts = rollouts
        self.measures = [name for name in EFFECT_MEASURES if name in effects]
        self.level = bootstrap.level
        self.table = of_rollouts(effects[effects["criterion"] != "placebo"], rollouts)
        self.folds = sorted(set(self.table["fold"]))
        held = self.table.loc[self.table["held_out"].astype(bool), "prompt_id"].unique()
        if not len(held):
            raise DiagnosticsError(
                "The intervention table holds no held-out prompt, on which cells are compared."
                " Intervene with a fold or a split that holds prompts out."
            )
        self.prompts = PromptClusters(np.sort(held), bootstrap=bootstrap)
        keys = ["criterion", "budget", "horizon"]
        groups = self.table.groupby(keys, sort=False)
        self.cells: list[Cell] = [(c, float(b), int(h)) for c, b, h in groups.groups]
        self._rows: Mapping[Cell, np.ndarray] = {
            (c, float(b), int(h)): rows for (c, b, h), rows in groups.indices.items()
        }
        self._sums: dict[tuple[Cell, bool], Sums] = {}
        self._effects: dict[tuple[Cell, str], CellEstimate] = {}

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._rows

    def criteria(self, budget: float, horizon: int) -> list[str]:
        """Criteria of a budget and a horizon, in the table's order."""
        return [c for c, b, h in self.cells if (b, h) == (budget, horizon)]

    def effect(self, cell: Cell, measure: str) -> CellEstimate:
        """Mean reduction of a divergence at held-out positions, nats per position."""
        if (cell, measure) not in self._effects:
            self._effects[cell, measure] = self._estimate(cell, measure)
        return self._effects[cell, measure]

    def _estimate(self, cell: Cell, measure: str) -> CellEstimate:
        sums = self.sums(cell)
        mean_FG = sums.reduction_MDFG[self.measures.index(measure)].mean(axis=0)
        count_FG = sums.positions_DFG.mean(axis=0)
        mask = np.ones(self.prompts.count, dtype=bool)
        pairs = np.stack([count_FG.sum(axis=0), mean_FG.sum(axis=0)], axis=1)
        (estimate,) = of_sums(ratio_of_sums, pairs, self.prompts, mask)
        parts = {part.name: getattr(estimate, part.name) for part in fields(Estimate)}
        parts["positions"] = round(count_FG.max(axis=0).sum())
        parts["prompts"] = int((count_FG.sum(axis=0) > 0).sum())
        if len(self.folds) > 1:
            total = pairs.sum(axis=0)
            by_step = np.stack([count_FG.sum(axis=1), mean_FG.sum(axis=1)], axis=1)
            parts["without_step"] = ratio_of_sums(total - by_step)[:, 0]
        error, freedom = self._of_draws(cell, measure)
        return CellEstimate(**parts, draw_error=error, draw_freedom=freedom)

    def on_step(self, cell: Cell, measure: str) -> float:
        """Mean reduction at positions of the step batches themselves, nats; NaN without any."""
        sums = self.sums(cell, held_out=False)
        over = sums.reduction_MDFG[self.measures.index(measure)].sum()
        return float(positive_ratio(over, sums.positions_DFG.sum()))

    def fact(self, cell: Cell, name: str) -> float:
        """Mean of a column over the rows of a cell; NaN where the table lacks it."""
        if name not in self.table:
            return np.nan
        values = self.table[name].to_numpy(dtype=np.float64)[self._rows[cell]]
        return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan

    def sums(self, cell: Cell, *, held_out: bool = True) -> Sums:
        """The cell's sums; prompts of the other side are 0.

        Raises:
            DiagnosticsError: Its draws do not cover every step batch and prompt of the table.
        """
        key = (cell, held_out)
        if key not in self._sums:
            self._sums[key] = self._read(cell, held_out)
        return self._sums[key]

    def _read(self, cell: Cell, held_out: bool) -> Sums:
        rows = self.table.iloc[self._rows[cell]]
        rows = rows[rows["held_out"].astype(bool) == held_out]
        draws, d = np.unique(rows["draw"], return_inverse=True)
        f = np.searchsorted(self.folds, rows["fold"])
        names = self.prompts.names if held_out else np.unique(rows["prompt_id"])
        g = pd.Index(names).get_indexer(rows["prompt_id"])
        shape = (len(draws), len(self.folds), len(names))
        reduction = np.zeros((len(self.measures), *shape))
        positions = np.zeros(shape)
        for m, measure in enumerate(self.measures):
            reduction[m, d, f, g] = rows[measure].to_numpy(dtype=np.float64)
        positions[d, f, g] = rows["positions"].to_numpy(dtype=np.float64)
        if held_out:
            present = np.zeros(shape, dtype=bool)
            present[d, f, g] = True
            self._require_whole(cell, present)
        return Sums(reduction, positions)

    @cached_property
    def _expected(self) -> np.ndarray:
        """[F, G] which prompts some cell holds out for which step batch."""
        held = self.table[self.table["held_out"].astype(bool)]
        expected = np.zeros((len(self.folds), self.prompts.count), dtype=bool)
        at = np.searchsorted(self.folds, held["fold"])
        expected[at, pd.Index(self.prompts.names).get_indexer(held["prompt_id"])] = True
        return expected

    def _require_whole(self, cell: Cell, present: np.ndarray) -> None:
        wrong = np.argwhere(present != self._expected)
        if len(wrong):
            d, f, g = wrong[0]
            raise DiagnosticsError(
                f"{cell[0]} at budget {cell[1]:g} and horizon {cell[2]} lacks {len(wrong)} pairs of"
                f" a step batch and a held-out prompt that other cells have, the first of fold"
                f" {self.folds[f]} and prompt {self.prompts.names[g]!r} (draw {d}). Finish the"
                " interventions, or leave the cell out."
            )

    def _of_draws(self, cell: Cell, measure: str) -> tuple[float, float]:
        """Standard error of the mean over random selections, and its degrees of freedom."""
        sums = self.sums(cell)
        count, folds = sums.positions_DFG.shape[:2]
        if count < 2:
            alone = cell[0] in registry.names() and registry.is_seeded(cell[0])
            return (np.nan, np.nan) if alone else (0.0, np.inf)
        reduction_DF = sums.reduction_MDFG[self.measures.index(measure)].sum(axis=2)
        means_DF = positive_ratio(reduction_DF, sums.positions_DFG.sum(axis=2))
        error = np.sqrt(np.sum(means_DF.var(axis=0, ddof=1) / count)) / folds
        return float(error), float(folds * (count - 1))


def of_rollouts(effects: pd.DataFrame, rollouts: str) -> pd.DataFrame:
    """The rows of some rollouts, one per cell, draw, step batch, horizon and prompt.

    Args:
        effects: The table of effects.
        rollouts: One of ROLLOUTS; `right` and `wrong` need the column correct.

    Returns:
        The rows in their order; for `all` without the column correct, whose rows are summed.

    Raises:
        DiagnosticsError: The rollouts are unknown, or the table has no column correct.
    """
    if rollouts not in ROLLOUTS:
        raise DiagnosticsError(f"Unknown rollouts {rollouts!r}. Known are {', '.join(ROLLOUTS)}.")
    if "correct" not in effects:
        if rollouts != "all":
            raise DiagnosticsError(
                f"The effects of {rollouts} rollouts were asked for, but the intervention table has"
                " no column correct. Give the contexts one before `score`."
            )
        return effects.reset_index(drop=True)
    if rollouts != "all":
        labelled = effects[effects["correct"].notna()]
        return labelled[labelled["correct"].astype(bool) == (rollouts == "right")].reset_index(
            drop=True
        )
    summed = [name for name in EFFECT_MEASURES if name in effects] + ["positions"]
    kept = [n for n in effects if n not in (*_KEYS, *summed, "correct")]
    how = dict.fromkeys(summed, "sum") | dict.fromkeys(kept, "first")
    return effects.groupby(_KEYS, sort=False, as_index=False).agg(how)
