"""The table of an intervention: mean reductions by cell and group of positions, with intervals.

A cell is compared with `random` and with the full step on its own positions. Intervals resample
prompts; those that involve `random` also carry the spread of its draws.

Axes: N positions of the bank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from diagnostics.analysis import bootstrap
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.probing.intervention_cells import MEASURES, Interventions

GROUPS = ("selected", "unselected", "step", "held_out")
"""Groups of positions that the table reports for each cell."""


def summarize(
    result: Interventions, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean reductions of each cell by group of positions, with prompt-bootstrap intervals.

    Args:
        result: The cells with their effects.
        draws: Bootstrap draws over prompts.
        level: Level of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        One row per criterion, budget, group and measure. The rows of `random` average its draws; a
        value that is undefined is NaN. Columns: criterion, budget, group (selected and unselected
        step positions, step: both, held_out), measure (forward_kl = KL(q||p), reverse_kl =
        KL(p||q), js), reduction (mean of before - after, nats per position; positive is better),
        low, high; minus_random and minus_full with their _low and _high (mean over the same
        positions of this cell's reduction less that of random, averaged over its draws at this
        budget, or of the full step); spread (standard deviation over the draws of random), selected
        (positions that carried loss), step_size, update_norm, gradient_norm, positions, prompts.
    """
    prompts = PromptClusters(result.tokens["prompt_id"].to_numpy(), draws=draws, seed=seed)
    noise = np.random.default_rng([seed, 2]).standard_normal(draws)
    together: dict[tuple[str, float], list[int]] = {}
    for index, cell in enumerate(result.cells):
        together.setdefault((cell.criterion, cell.budget), []).append(index)
    rows = []
    for (criterion, budget), members in together.items():
        rivals = together.get(("random", budget), []) if criterion != "random" else []
        for group in GROUPS:
            masks = [_group(result, index, group) for index in members]
            if not all(mask.any() for mask in masks):
                continue
            for m, measure in enumerate(MEASURES):
                key = {"criterion": criterion, "budget": budget, "group": group, "measure": measure}
                row = _compared(
                    result, prompts, masks, members, rivals, m, level=level, noise=noise
                )
                rows.append(key | row | _facts(result, members))
    return pd.DataFrame(rows)


def _group(result: Interventions, index: int, group: str) -> np.ndarray:
    """Positions [N] of a group of a cell, as far as they were measured."""
    chosen, on_step = result.cells[index].weights_N > 0, result.split == "step"
    masks = {
        "selected": chosen,
        "unselected": on_step & ~chosen,
        "step": on_step,
        "held_out": ~on_step,
    }
    return masks[group] & np.isfinite(result.effects[index].reduction_N3).all(axis=1)


def _compared(
    result: Interventions,
    prompts: PromptClusters,
    masks: list[np.ndarray],
    members: list[int],
    rivals: list[int],
    m: int,
    *,
    level: float,
    noise: np.ndarray,
) -> dict:
    """Own mean, and paired differences to random and to the full step on the same positions."""
    own = _mean_over_draws(result, prompts, masks, [[index] for index in members], m)
    full = _mean_over_draws(result, prompts, masks, [[0]] * len(masks), m)
    spread = _spread(result, masks, members, m)
    if len(members) > 1:
        own = _noisy(own, spread / len(members) ** 0.5, noise)
    row = _ends("reduction", own, level, prefix="")
    rival = (own - _rival(result, prompts, masks[0], rivals, m, noise)) if rivals else None
    against_full = own - full if result.cells[members[0]].criterion != "full" else None
    row |= _ends("minus_random", rival, level) | _ends("minus_full", against_full, level)
    return row | {"spread": spread, "positions": own.positions, "prompts": own.prompts}


def _rival(
    result: Interventions,
    prompts: PromptClusters,
    mask: np.ndarray,
    rivals: list[int],
    m: int,
    noise: np.ndarray,
) -> Estimate:
    """Mean over random's draws of its reduction on the positions of the mask."""
    estimate = _mean_over_draws(result, prompts, [mask], [rivals], m)
    spread = _spread(result, [mask] * len(rivals), rivals, m)
    return _noisy(estimate, spread / len(rivals) ** 0.5, noise) if len(rivals) > 1 else estimate


def _mean_over_draws(
    result: Interventions,
    prompts: PromptClusters,
    masks: list[np.ndarray],
    effects: list[list[int]],
    m: int,
) -> Estimate:
    """Mean over masks of the mean reduction on each mask, averaged over its effects."""
    sums = []
    for mask, indices in zip(masks, effects, strict=True):
        values = np.mean([result.effects[i].reduction_N3[mask, m] for i in indices], axis=0)
        sums.append(prompts.sums(values, np.ones(len(values)), at=mask))

    def mean(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = np.where(sums[..., 1::2] > 0, sums[..., 0::2] / sums[..., 1::2], np.nan)
        return ratios.mean(axis=-1, keepdims=True)

    any_of_them = np.logical_or.reduce(masks)
    return replace(
        bootstrap.of_sums(mean, np.hstack(sums), prompts, any_of_them)[0],
        positions=int(masks[0].sum()),
    )


def _spread(result: Interventions, masks: list[np.ndarray], indices: list[int], m: int) -> float:
    means = [
        result.effects[i].reduction_N3[mask, m].mean()
        for mask, i in zip(masks, indices, strict=True)
    ]
    return float(np.std(means, ddof=1)) if len(means) > 1 else np.nan


def _noisy(estimate: Estimate, error: float, noise: np.ndarray) -> Estimate:
    """The estimate, with the standard error of a mean over few random selections added."""
    return replace(estimate, draws=estimate.draws + error * noise)


def _ends(name: str, estimate: Estimate | None, level: float, *, prefix: str | None = None) -> dict:
    prefix = f"{name}_" if prefix is None else prefix
    low, high = estimate.interval(level) if estimate else (np.nan, np.nan)
    return {
        name: estimate.value if estimate else np.nan,
        f"{prefix}low": low,
        f"{prefix}high": high,
    }


def _facts(result: Interventions, members: list[int]) -> dict:
    """Number of selected positions and the step's numbers, averaged over draws."""
    effects = [result.effects[index] for index in members]
    selected = [int((result.cells[index].weights_N > 0).sum()) for index in members]
    return {"selected": round(float(np.mean(selected)))} | {
        name: float(np.mean([getattr(effect, name) for effect in effects]))
        for name in ("step_size", "update_norm", "gradient_norm")
    }
