"""How small a difference a design can see, and how large a design sees a given one.

    detectable = (t(1 - alpha/2; nu) + t(power; nu)) SE
    SE^2(G', F') = SE_G^2 G/G' + SE_F^2 F/F'

SE_G and SE_F are the parts of the prompts and of the step batches at the G prompts and F batches
that were measured, and nu is Satterthwaite's number for G' and F'. More prompts lower the first
part alone: with the same F batches there may be no number of prompts that suffices. More batches of
the same size lower both. `needed` therefore answers both questions.

Departure: the sum of two t quantiles stands for the quantile of a noncentral t; a simulation in the
tests bounds the difference. The power is that of the effect *seen*, which is itself uncertain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy  # its parts are loaded where they are used: a page needs none

from diagnostics.analysis.cell_effects import CellEstimate

POWER = 0.8
"""Chance of seeing a difference that is there, for which designs are stated."""
LARGEST_DESIGN = 1_000_000
"""Prompts or step batches above which a design is called impossible."""


@dataclass(frozen=True)
class Needed:
    """Designs that see a difference with power POWER; infinite where none does.

    Attributes:
        prompts: Prompts, where step batches of the size measured are added with them.
        steps: Those step batches.
        prompts_alone: Prompts, with the number of step batches that was measured.
    """

    prompts: float
    steps: float
    prompts_alone: float


def smallest_detectable(estimate: CellEstimate, *, level: float, power: float = POWER) -> float:
    """The difference that a test at 1 - level sees with a power.

    Args:
        estimate: A difference.
        level: Coverage of its interval.
        power: Chance of seeing it.

    Returns:
        The difference, in the estimate's unit; NaN where its error is not positive.
    """
    error = estimate.standard_error
    return _quantiles(estimate.freedom, level, power) * error if error > 0 else np.nan


def needed(estimate: CellEstimate, *, level: float, power: float = POWER) -> Needed:
    """The designs that see the difference that was estimated.

    Args:
        estimate: A difference that is not 0.
        level: Coverage of its interval.
        power: Chance of seeing it.

    Returns:
        The designs. All are NaN where the difference's error is not positive, and the joint design
        is NaN with one step batch, whose part is unknown.
    """
    if not estimate.standard_error > 0:
        return Needed(np.nan, np.nan, np.nan)
    steps = estimate.steps

    def seen(prompts: np.ndarray, batches: np.ndarray) -> np.ndarray:
        return _detectable(estimate, prompts, batches, level, power) <= abs(estimate.value)

    alone = _smallest(lambda n: seen(n, np.full(n.shape, float(steps))))
    if steps < 2:
        return Needed(np.nan, np.nan, alone)
    per_step = estimate.prompts / steps
    joint = _smallest(lambda n: seen(n * per_step, n))
    return Needed(np.ceil(joint * per_step), joint, alone)


def _quantiles(freedom, level: float, power: float):
    return scipy.special.stdtrit(freedom, (1 + level) / 2) + scipy.special.stdtrit(freedom, power)


def _detectable(
    estimate: CellEstimate, prompts: np.ndarray, batches: np.ndarray, level: float, power: float
) -> np.ndarray:
    """Smallest detectable difference at each number of prompts and step batches."""
    steps = estimate.steps
    of_prompts = estimate.prompt_error**2 * estimate.prompts / prompts
    of_batches = estimate.batch_error**2 * steps / batches
    grown = (batches - 1) / (steps - 1) if steps > 1 else 1.0
    batch_freedom = estimate.batch_freedom * grown
    variance = of_prompts + of_batches
    freedom = variance**2 / (of_prompts**2 / (prompts - 1) + of_batches**2 / batch_freedom)
    return _quantiles(freedom, level, power) * np.sqrt(variance)


def _smallest(suffices) -> float:
    """The smallest whole number from 2 that suffices; infinite above LARGEST_DESIGN.

    Fewer degrees of freedom can outweigh a smaller error, so that what suffices is searched for
    rather than bisected: on a grid that grows by a hundredth, then within its gap.
    """
    grid = np.unique(np.geomspace(2, LARGEST_DESIGN, 1400).astype(int)).astype(float)
    found = np.flatnonzero(suffices(grid))
    if not len(found):
        return np.inf
    before = grid[found[0] - 1] + 1 if found[0] else grid[0]
    gap = np.arange(before, grid[found[0]] + 1)
    return float(gap[np.flatnonzero(suffices(gap))[0]])
