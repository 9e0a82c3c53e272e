"""Cells of an intervention and what their steps did: the records that grid and table share.

Axes: N positions of the bank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.core.shown import sizes

MEASURES = ("forward_kl", "reverse_kl", "js")
"""Divergences whose reduction is measured, in the order of `Effect.reduction_N3`."""
FACTS = ("step_size", "update_norm", "gradient_norm", "ambiguous", "idle_steps")
"""Numbers of an effect that belong to the whole cell."""


@dataclass(frozen=True)
class InterventionCell:
    """One criterion at one budget, on the contexts of one fold, after a number of steps."""

    criterion: str
    budget: float
    draw: int
    """Number of the random selection; 0 for criteria that draw none."""
    fold: int
    """The step batch: the fold whose contexts carry the loss."""
    horizon: int
    """Optimizer steps of a trajectory; 0 is the one step along the first direction."""

    @property
    def name(self) -> tuple[str, float]:
        """Criterion and budget."""
        return self.criterion, self.budget


@dataclass(frozen=True)
class Effect:
    """What a cell's steps did to the student and to every position."""

    step_size: float
    """Learning rate (adamw) or update norm (sgd)."""
    update_norm: float
    """Distance of the moved student from theta0."""
    gradient_norm: float
    """Of the cell's first mean loss, at theta0, nats."""
    ambiguous: float
    """Share of the selection that ties decided; over a trajectory the mean of its steps."""
    idle_steps: int
    """Steps that had no position to carry loss."""
    selected_N: np.ndarray
    """bool [N]: the position carried loss, in a trajectory at least once."""
    reduction_N3: np.ndarray
    """Divergence before minus after, in the order of MEASURES, nats, float32."""

    def to_frame(self) -> pd.DataFrame:
        """One row per position; the cell's own numbers are repeated in every row."""
        frame = pd.DataFrame(self.reduction_N3.astype(np.float32), columns=list(MEASURES))
        return frame.assign(
            selected=self.selected_N, **{name: getattr(self, name) for name in FACTS}
        )

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Effect:
        """Inverse of `to_frame`."""
        first = frame.iloc[0]
        return cls(
            **{name: float(first[name]) for name in FACTS[:-1]},
            idle_steps=int(first["idle_steps"]),
            selected_N=frame["selected"].to_numpy(dtype=bool),
            reduction_N3=frame[list(MEASURES)].to_numpy(dtype=np.float32),
        )


@dataclass
class Interventions:
    """Every cell with its effect, on one table of positions."""

    tokens: pd.DataFrame
    """The bank's token table."""
    folds: np.ndarray
    """Fold of each position, int [N]."""
    cells: list[InterventionCell]
    effects: list[Effect]
    """The effect of each cell, in the cells' order."""
    calibration: pd.DataFrame
    """Calibration of the steps on all positions of each fold, as in `probe`."""

    def __repr__(self) -> str:
        held = {"tokens": self.tokens, "cells": self.cells, "calibration": self.calibration}
        return sizes("Interventions (rows)", held)

    @property
    def steps(self) -> int:
        """Number of step batches: folds whose contexts carried loss in turn."""
        return len({cell.fold for cell in self.cells})

    def by_prompt(self) -> pd.DataFrame:
        """Sums over each prompt's positions, from which cells can be compared without a model.

        Returns:
            One row per cell and prompt, with columns criterion, budget, draw, fold (the step
            batch), horizon, prompt_id, held_out (False for the prompts of the step batch),
            positions (finite ones), the summed reductions forward_kl, reverse_kl and js (nats), and
            ambiguous (share of the cell's selection that ties decide). Where the token table has
            `correct`, right and wrong responses of a prompt have rows of their own, marked in a
            column of that name.
        """
        codes_N, keys = _coded(self.tokens[[name for name in GROUPED if name in self.tokens]])
        clusters = PromptClusters(codes_N, draws=0)
        place = pd.Series(self.folds).groupby(codes_N).first().to_numpy()
        frames = []
        for cell, effect in zip(self.cells, self.effects, strict=True):
            finite = np.isfinite(effect.reduction_N3).all(axis=1)
            sums = clusters.sums(np.ones(finite.sum()), *effect.reduction_N3[finite].T, at=finite)
            frame = pd.DataFrame(sums, columns=["positions", *MEASURES]).astype({"positions": int})
            key = {
                "criterion": cell.criterion,
                "budget": cell.budget,
                "draw": cell.draw,
                "fold": cell.fold,
                "horizon": cell.horizon,
                "prompt_id": keys["prompt_id"],
                "held_out": place != cell.fold,
            }
            rest = {"ambiguous": effect.ambiguous} | {name: keys[name] for name in keys.columns[1:]}
            frames.append(pd.concat([pd.DataFrame(key), frame.assign(**rest)], axis=1))
        return pd.concat(frames, ignore_index=True)


GROUPED = ("prompt_id", "correct")
"""Columns of the token table whose values keep sums apart."""


def _coded(groups: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """Number [N] of each row's group, in the order of the groups, and the groups' values."""
    codes = groups.groupby(list(groups), dropna=False, sort=True).ngroup()
    first = groups.assign(code=codes).drop_duplicates("code").sort_values("code")
    return codes.to_numpy(), first.drop(columns="code").reset_index(drop=True)
