"""Matching within prompts and standardised differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import optimize, spatial

from diagnostics.analysis.bootstrap import (
    Estimate,
    PromptClusters,
    of_sums,
    ratio_of_sums,
    undefined,
)

TOO_FAR = 1e9
"""Cost of a pair outside the caliper, so that an assignment takes it only for want of another."""


def match(
    features: np.ndarray,
    treated: np.ndarray,
    control: np.ndarray,
    codes: np.ndarray,
    *,
    replacement: bool,
    caliper: float = np.inf,
) -> tuple[np.ndarray, np.ndarray]:
    """Pair treated with control positions of the same prompt, nearest in Euclidean distance.

    features: [N, F], all finite where a position is treated or control (masks [N]); codes: [N]
    prompts. With replacement each treated position takes its nearest control; without, the pairs of
    each prompt minimise the summed distance and the larger side keeps some unpaired. Pairs further
    apart than the caliper are dropped. Returns row numbers of both."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    rows = np.flatnonzero(treated | control)
    rows = rows[np.argsort(codes[rows], kind="stable")]
    for group in np.split(rows, np.flatnonzero(np.diff(codes[rows])) + 1):
        t, c = group[treated[group]], group[control[group]]
        if len(t) and len(c):
            distance = spatial.distance.cdist(features[t], features[c])
            cost = np.where(distance > caliper, TOO_FAR, distance)
            i, j = (
                (np.arange(len(t)), distance.argmin(1))
                if replacement
                else optimize.linear_sum_assignment(cost)
            )
            near = distance[i, j] <= caliper
            pairs.append((t[i[near]], c[j[near]]))
    if not pairs:
        return np.empty(0, dtype=int), np.empty(0, dtype=int)
    return tuple(np.concatenate(side) for side in zip(*pairs))


def matched_difference(
    values: np.ndarray, prompts: PromptClusters, pairs: tuple[np.ndarray, np.ndarray]
) -> Estimate:
    """Mean over pairs of values at the treated minus values at the control position; `positions`
    counts pairs.
    """
    treated, control = pairs
    difference = values[treated] - values[control]
    kept = np.isfinite(difference)
    rows = treated[kept]
    if not kept.any():
        return undefined(prompts)
    mask = np.zeros(len(values), dtype=bool)
    mask[rows] = True
    estimate = of_sums(
        ratio_of_sums, prompts.sums(np.ones(len(rows)), difference[kept], at=rows), prompts, mask
    )[0]
    return replace(estimate, positions=len(rows))


def standardized_difference(first: np.ndarray, second: np.ndarray, scale: float) -> float:
    """Difference of means over a given standard deviation; NaN where a side is empty or the scale
    0.
    """
    if not len(first) or not len(second) or not scale > 0:
        return np.nan
    return float((first.mean() - second.mean()) / scale)
