"""The released training code's token bank: its scores, its quadrants, and what each mask keeps.

Within one rollout (a batch of samples), over all its positions, those without loss included:

    h, d, c = N(H), N(D), N(C)       H: entropy of the student's list, over ln K; D: the floored KL
                                     on the lists' union; C: teacher mass on the student's list
    w       = N(D*C)
    teachability d*c, incompatible d*(1 - c), tip h (+) d, teachability_entropy h (+) w,
    split (1 - h)*w                                        with a (+) b = a + b - a*b
    Q1 h >= m_h, d >= m_d;  Q2 h >= m_h, d < m_d;  Q3 h < m_h, d >= m_d;  Q4 the rest
    budget  = max(1, ceil(share * supervised positions)), best score first
    minimum : every sample without a kept position gets its best by h (+) w, on top of the budget

Differences from the analysis scripts (`bank`): Q3 is *strictly* below the median of h, D is the
floored one, and scores are scaled within a rollout. Differences from `criteria`: the minimum
exceeds the budget and ignores the criterion, teachability_entropy takes N(D*C), and quantiles and
soft-ors are rounded as the code rounds them, which decides ties where a score is 1.

Written from the definition of `tip_compat.py` of the training code released with arXiv 2605.26844.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import ceil

import numpy as np
import pandas as pd

from diagnostics.analysis.paper.bank import NARROW, require_finite, soft_or
from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import HIGH_QUANTILE, LOW_QUANTILE

RANDOM_SEED = 42
SPLIT_SHARE = 0.5
"""Share of a split budget that goes to the entropy."""
ALONE = {
    "entropy": "entropy",
    "divergence": "divergence",
    "tip": "tip",
    "compatibility": "compatibility",
    "teachability": "teachability",
    "incompatible": "incompatible",
    "teachability_entropy": "teachability_entropy",
}
"""Score by mask, over all supervised positions."""
INSIDE_Q3 = {
    "q3": "split",
    "q3_compatibility": "compatibility",
    "q3_compatibility_low": "compatibility",
    "q3_teachability": "teachability",
    "q3_teachability_low": "teachability",
    "q3_incompatible": "incompatible",
}
"""Score by mask, over the supervised positions in Q3; `_low` keeps the lowest."""
MASKS = (*ALONE, *INSIDE_Q3, "random", "split_budget")
SCORE_COLUMNS = (
    "entropy",
    "divergence",
    "compatibility",
    "weighted_divergence",
    "teachability",
    "incompatible",
    "tip",
    "teachability_entropy",
    "split",
)


def _quantile(ordered: np.ndarray, share: float) -> float:
    """A quantile of sorted values [N], linearly interpolated.

    It is rounded as the training code does it, and not as numpy: the last bit decides ties there.
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    weight = place - below
    return ordered[below] * (1 - weight) + ordered[above] * weight


def _scaled(values: np.ndarray) -> np.ndarray:
    """N(z) with that quantile; 0 where the two are less than 1e-12 apart."""
    ordered = np.sort(values)
    low, high = (_quantile(ordered, share) for share in (LOW_QUANTILE, HIGH_QUANTILE))
    if high - low < NARROW:
        return np.zeros(len(values))
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def training_scores(
    entropy: np.ndarray, divergence: np.ndarray, compatibility: np.ndarray, rollout: np.ndarray
) -> pd.DataFrame:
    """Scores and quadrants of a training token bank.

    Args:
        entropy: [N] entropy of the student's list, over ln K.
        divergence: [N] floored KL on the union of the lists, nats (`union_forward_kl_released`).
        compatibility: [N] teacher mass on the student's list.
        rollout: [N] rollout of each position, within which scores are scaled.

    Returns:
        N rows with the columns of `SCORE_COLUMNS` and `quadrant` (1 to 4). All positions of a
        rollout count, those without loss too.

    Raises:
        DiagnosticsError: A value is not finite.
    """
    columns = {"entropy": entropy, "divergence": divergence, "compatibility": compatibility}
    values = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    for name, column in values.items():
        require_finite(name, column)
    rollout = np.asarray(rollout)
    parts = [
        _scores(*(column[at] for column in values.values())).set_index(at)
        for at in (np.flatnonzero(rollout == number) for number in pd.unique(rollout))
    ]
    return pd.concat(parts).sort_index()


def _scores(entropy: np.ndarray, divergence: np.ndarray, compatibility: np.ndarray) -> pd.DataFrame:
    """Scores of one rollout."""
    h, d, c = (_scaled(values) for values in (entropy, divergence, compatibility))
    w = _scaled(divergence * compatibility)
    low_h, high_d = (
        h < _quantile(np.sort(h), 0.5),
        d >= _quantile(np.sort(d), 0.5),
    )
    quadrant = np.select([~low_h & high_d, ~low_h & ~high_d, low_h & high_d], [1, 2, 3], default=4)
    scores = (h, d, c, w, d * c, d * (1 - c), soft_or(h, d), soft_or(h, w), (1 - h) * w)
    return pd.DataFrame(dict(zip(SCORE_COLUMNS, scores, strict=True)) | {"quadrant": quadrant})


def training_mask(
    scores: pd.DataFrame,
    mask: str,
    budget: float,
    *,
    position: np.ndarray,
    sample: np.ndarray,
    rollout: np.ndarray,
    supervised: np.ndarray,
    minimum: int = 1,
    seed: int = RANDOM_SEED,
) -> np.ndarray:
    """What a mask of the released training code keeps.

    Args:
        scores: What `training_scores` returns, N rows.
        mask: One of `MASKS`.
        budget: Share of the supervised positions of each rollout, in (0, 1].
        position: [N] index of each position in its response.
        sample: [N] sample, that is context, of each position.
        rollout: int [N] rollout of each position.
        supervised: Mask [N] of the positions that carry loss.
        minimum: Number of positions that a sample without a kept one gets on top; 0 turns it off.
        seed: Seed of the mask `random`, to which the rollout's number is added.

    Returns:
        Mask [N]. A quadrant with fewer positions than the budget is kept whole.

    Raises:
        DiagnosticsError: The mask is unknown, or the budget lies outside (0, 1].
    """
    if mask not in MASKS:
        raise DiagnosticsError(
            f"The released training code has no mask {mask!r}. Take one of {', '.join(MASKS)}."
        )
    if not 0 < budget <= 1:
        raise DiagnosticsError(f"A budget is a share of positions in (0, 1]; got {budget}.")
    position, sample, rollout, supervised = map(np.asarray, (position, sample, rollout, supervised))
    ranks = _Ranks(scores, position)
    kept = np.zeros(len(scores), dtype=bool)
    for number in pd.unique(rollout):
        valid = np.flatnonzero((rollout == number) & supervised)
        if not len(valid):
            continue
        count = max(1, ceil(budget * len(valid)))
        if mask == "random":
            shuffled = valid.tolist()
            random.Random(seed + int(number)).shuffle(shuffled)
            kept[shuffled[:count]] = True
        else:
            kept[ranks.chosen(mask, valid, count)] = True
        for own in (valid[sample[valid] == name] for name in pd.unique(sample[valid])):
            if minimum and not kept[own].any():
                kept[ranks.best(own, "teachability_entropy", minimum)] = True
    return kept


@dataclass(frozen=True)
class _Ranks:
    """Positions in the order of their scores.

    Attributes:
        scores: What `training_scores` returns, N rows.
        position: [N] index of each position in its response.
    """

    scores: pd.DataFrame
    position: np.ndarray

    def best(self, rows: np.ndarray, score: str, count: int, *, low: bool = False) -> np.ndarray:
        """The best `count` rows; ties go to the earlier position, from the low end to the later."""
        sign = 1 if low else -1
        values = self.scores[score].to_numpy()[rows]
        order = np.lexsort((rows, -sign * self.position[rows], sign * values))
        return rows[order][: max(count, 0)]

    def chosen(self, mask: str, valid: np.ndarray, count: int) -> np.ndarray:
        """Rows that a mask without random numbers keeps of a rollout's supervised ones."""
        if mask == "split_budget":
            first = self.best(valid, "entropy", round(count * SPLIT_SHARE))
            rest = valid[~np.isin(valid, first)]
            return np.r_[first, self.best(rest, "split", count - len(first))]
        if mask in INSIDE_Q3:
            inside = valid[self.scores["quadrant"].to_numpy()[valid] == 3]
            return self.best(inside, INSIDE_Q3[mask], count, low=mask.endswith("_low"))
        return self.best(valid, ALONE[mask], count)


def kept_summary(scores: pd.DataFrame, kept: np.ndarray, supervised: np.ndarray) -> dict:
    """What a mask kept, as the released aggregating scripts count it.

    Args:
        scores: What `training_scores` returns, N rows.
        kept: Mask [N] of the kept positions.
        supervised: Mask [N] of the positions that carry loss.

    Returns:
        kept_share (of the supervised positions), q3_share (of the kept ones), mean_teachability,
        mean_incompatible, mean_compatibility (over the kept ones; NaN where none is kept).
    """
    supervised = np.asarray(supervised, dtype=bool)
    chosen = scores[np.asarray(kept, dtype=bool) & supervised]
    return {
        "kept_share": len(chosen) / supervised.sum() if supervised.any() else np.nan,
        "q3_share": (chosen["quadrant"] == 3).mean(),
        "mean_teachability": chosen["teachability"].mean(),
        "mean_incompatible": chosen["incompatible"].mean(),
        "mean_compatibility": chosen["compatibility"].mean(),
    }
