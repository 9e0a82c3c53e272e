"""Cells of an intervention and what their steps did: the records that grid and table share.

Axes: N positions of the bank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from diagnostics.analysis.bootstrap import PromptClusters

MEASURES = ("forward_kl", "reverse_kl", "js")
"""Divergences whose reduction is measured, in the order of `Effect.reduction_N3`."""


@dataclass(frozen=True)
class InterventionCell:
    """One selection of step positions, or the placebo."""

    criterion: str
    budget: float
    draw: int
    """Number of the random selection; 0 for everything else."""
    weights_N: np.ndarray
    """1.0 where the position carries loss, else 0.0."""

    @property
    def placebo(self) -> bool:
        """True for the step in a random direction."""
        return self.criterion == "placebo"


@dataclass(frozen=True)
class Effect:
    """What a cell's step did to the student and to every position."""

    step_size: float
    update_norm: float
    gradient_norm: float
    """Of the cell's mean loss at theta0, nats."""
    reduction_N3: np.ndarray
    """Divergence before minus after, in the order of MEASURES, nats."""

    def to_frame(self) -> pd.DataFrame:
        """One row per position; the step's three numbers are repeated in every row."""
        frame = pd.DataFrame(self.reduction_N3.astype(np.float32), columns=list(MEASURES))
        return frame.assign(
            step_size=self.step_size, update_norm=self.update_norm, gradient_norm=self.gradient_norm
        )

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> Effect:
        """Inverse of `to_frame`."""
        first = frame.iloc[0]
        return cls(
            step_size=float(first["step_size"]),
            update_norm=float(first["update_norm"]),
            gradient_norm=float(first["gradient_norm"]),
            reduction_N3=frame[list(MEASURES)].to_numpy(dtype=np.float64),
        )


@dataclass
class Interventions:
    """Every cell with its effect, on one table of positions."""

    tokens: pd.DataFrame
    """The bank's token table."""
    split: np.ndarray
    """`step` or `held_out` for each position [N]."""
    cells: list[InterventionCell]
    effects: list[Effect]
    """The effect of each cell, in the cells' order."""
    calibration: pd.DataFrame
    """Calibration of the step on all positions, as in `probe`."""

    def by_prompt(self) -> pd.DataFrame:
        """Sums over each prompt's positions, from which cells can be compared without a model.

        Returns:
            One row per cell and prompt, with columns criterion, budget, draw, prompt_id, split,
            positions (finite ones) and the summed reductions forward_kl, reverse_kl and js (nats).
        """
        prompts = PromptClusters(self.tokens["prompt_id"].to_numpy(), draws=0)
        place = pd.Series(self.split).groupby(prompts.codes).first().to_numpy()
        frames = []
        for cell, effect in zip(self.cells, self.effects, strict=True):
            finite = np.isfinite(effect.reduction_N3).all(axis=1)
            sums = prompts.sums(np.ones(finite.sum()), *effect.reduction_N3[finite].T, at=finite)
            frame = pd.DataFrame(sums, columns=["positions", *MEASURES]).astype({"positions": int})
            key = {
                "criterion": cell.criterion,
                "budget": cell.budget,
                "draw": cell.draw,
                "prompt_id": prompts.names,
                "split": place,
            }
            frames.append(pd.concat([pd.DataFrame(key), frame], axis=1))
        return pd.concat(frames, ignore_index=True)
