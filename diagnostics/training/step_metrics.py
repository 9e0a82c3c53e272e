"""What a training logs of each step: of all positions, of the selected, and under others' names.

Under names of our own, over the valid response positions of the whole step:

    <column>/all, <column>/selected    mean of a measurement, the second by the loss's weights
    q3/selected, score_<name>/selected share of quadrant Q3, and mean score, of what is kept
    jaccard/<criterion>                overlap with another criterion's selection at this budget

Under the names that other programs log, each a mean over all positions (K of the selection):

    overlap_ratio                      |S & T| / K                                      eq. 6
    overlap_token_advantage            mean over S & T of p' (ln q' - ln p')            eq. 7
    entropy_gap                        |H(q) - H(p)|                                    eq. 8
    overlap_mass_student, _teacher     mass of p, and of q, on S & T                    eq. 9, 10
    distillation/overlap_ratio         as above
    distillation/overlap_token_advantage   mean over S & T of q (ln p - ln q)
    distillation/student_mass, teacher_mass, each also _min and _max    mass of p, q on T

Reference: equations of arXiv 2604.13016; the names with `distillation/` are verl's.

Departures: entropies are those of the whole vocabulary (others have lists alone, renormalized);
positions without a shared token are left out of the advantages, and so is a position without a
finite measurement; a metric without any position is NaN, which metrics.jsonl has as null."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from diagnostics import criteria

COMPARED = ("entropy", "divergence", "compatibility", "teachability", "incompatible", "tip")
"""Criteria whose selection at the same budget is compared with the one in use, step by step."""
SCORED = ("teachability", "incompatible", "compatibility")
"""Criteria whose mean score over the selected positions is logged, scaled within the step: the
paper's D^L, D^I and C of what a mask keeps.
"""
LOGGED = (
    "forward_kl",
    "reverse_kl",
    "compatibility",
    "student_entropy",
    "teacher_entropy",
    "shared_student_mass",
    "compatibility_intersection",
)
MASSES = {"student": "listed_student_mass", "teacher": "listed_teacher_mass"}
"""Column of each model's mass on the teacher's list."""


def counts(weights_N: np.ndarray) -> dict[str, float]:
    """How many positions a step has, and how many of them carry loss.

    Args:
        weights_N: The loss's weights [N]; 0 carries none.
    """
    selected = np.count_nonzero(weights_N)
    return {
        "selected": selected,
        "positions": len(weights_N),
        "selected_share": selected / len(weights_N),
    }


def measured(
    tokens: pd.DataFrame, weights_N: np.ndarray, masks: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """What is logged of a measured step.

    Args:
        tokens: The step's token table, one row per position; without the columns of
            `measure.overlap` the metrics of others are left out.
        weights_N: The loss's weights [N]; 0 carries none.
        masks: Selections bool [N] of other criteria at the same budget.

    Returns:
        Values by name; NaN where there is no position to take a mean over.
    """
    selected_N = weights_N > 0
    found: dict[str, float] = {"not_finite": int((~np.isfinite(tokens["forward_kl"])).sum())}
    for name in LOGGED:
        values = tokens[name].to_numpy()
        found[f"{name}/all"] = np.nanmean(values)
        found[f"{name}/selected"] = np.average(values[selected_N], weights=weights_N[selected_N])
    found |= kept(tokens, weights_N)
    if "overlap_advantage" in tokens:
        found |= of_peers(tokens)
    for name, mask in masks.items():
        found[f"jaccard/{name}"] = (mask & selected_N).sum() / (mask | selected_N).sum()
    return found


def kept(tokens: pd.DataFrame, weights_N: np.ndarray) -> dict[str, float]:
    """What a mask keeps of a step: share of the quadrants' Q3, and mean scores of SCORED.

    Quadrants and scores are those of the step alone. Positions without a score are left out.

    Args:
        tokens: The step's token table.
        weights_N: The loss's weights [N].
    """
    kept_N = weights_N > 0
    found = {"q3/selected": float(np.average(criteria.quadrants(tokens)[kept_N] == 3))}
    for name in SCORED:
        found[f"score_{name}/selected"] = _mean(criteria.score_criterion(tokens, name)[kept_N])
    return found


def of_peers(tokens: pd.DataFrame) -> dict[str, float]:
    """The metrics that other programs log, under their names; see the head of this module.

    Args:
        tokens: The step's token table, with the columns of `measure.overlap`.
    """
    gap_N = (tokens["teacher_entropy"] - tokens["student_entropy"]).abs()
    overlap = _mean(tokens["topk_overlap"])
    found = {
        "overlap_ratio": overlap,
        "overlap_token_advantage": _mean(tokens["overlap_advantage"]),
        "entropy_gap": _mean(gap_N),
        "overlap_mass_student": _mean(tokens["shared_student_mass"]),
        "overlap_mass_teacher": _mean(tokens["compatibility_intersection"]),
        "distillation/overlap_ratio": overlap,
        "distillation/overlap_token_advantage": _mean(tokens["overlap_advantage_teacher"]),
    }
    for role, column in MASSES.items():
        name, mass_N = f"distillation/{role}_mass", _known(tokens[column])
        found |= {name: _mean(mass_N)}
        found |= {f"{name}_{end.__name__}": end(mass_N, default=np.nan) for end in (min, max)}
    return found


def _known(values) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[~np.isnan(values)]


def _mean(values) -> float:
    """The mean of the values that are not NaN; NaN without any."""
    known = _known(values)
    return float(known.mean()) if len(known) else float("nan")
