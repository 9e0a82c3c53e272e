"""Matching of positions within prompts, and standardized differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Pairs of a treated and a control position.

    Attributes:
        treated: [pairs] row numbers of the treated positions, each at most once.
        control: [pairs] row numbers of their controls, which may repeat.
        distance: [pairs] distance of the two, in the unit of the features.
    """

    treated: np.ndarray
    control: np.ndarray
    distance: np.ndarray

    def within(self, caliper: float) -> Pairs:
        """The pairs that are no further apart than a caliper."""
        near = self.distance <= caliper
        return Pairs(self.treated[near], self.control[near], self.distance[near])

    def differences(self, values: np.ndarray) -> np.ndarray:
        """[pairs] value [N] at the treated minus value at the control position."""
        return values[self.treated] - values[self.control]

    def difference(self, values: np.ndarray) -> float:
        """Mean difference over the pairs whose two values [N] are finite; NaN without any."""
        found = self.differences(values)
        found = found[np.isfinite(found)]
        return float(found.mean()) if len(found) else np.nan


def match(
    features: np.ndarray, treated: np.ndarray, control: np.ndarray, codes: np.ndarray
) -> Pairs:
    """Pair each treated position with the nearest control position of the same prompt.

    Distance is Euclidean. A control may be taken more than once; of equally near ones the first is
    taken. A treated position without a control in its prompt has no pair.

    Args:
        features: [N, F] coordinates, finite wherever a position is treated or control.
        treated: Mask [N].
        control: Mask [N].
        codes: [N] number of each position's prompt.

    Returns:
        The pairs.

    Reference:
        Rosenbaum and Rubin 1985; Stuart 2010 (matching with replacement).
    """
    t, c = np.flatnonzero(treated), np.flatnonzero(control)
    c = c[np.argsort(codes[c], kind="stable")]
    first, last = (np.searchsorted(codes[c], codes[t], side=side) for side in ("left", "right"))
    t, first, many = t[last > first], first[last > first], (last - first)[last > first]
    if not len(t):
        none = np.empty(0, dtype=int)
        return Pairs(none, none, np.empty(0))
    # Every treated position with every control of its prompt, in runs of one treated position.
    start = np.cumsum(many) - many
    run = np.repeat(np.arange(len(t)), many)
    other = c[np.arange(len(run)) - start[run] + first[run]]
    # Squares are compared: roots may round two distances to one, and then the first would win.
    square = ((features[t[run]] - features[other]) ** 2).sum(axis=1)
    least = np.minimum.reduceat(square, start)
    nearest = np.flatnonzero(square == least[run])
    nearest = nearest[np.unique(run[nearest], return_index=True)[1]]
    return Pairs(t, other[nearest], np.sqrt(least))


def standardized_difference(first: np.ndarray, second: np.ndarray, scale: float) -> float:
    """Difference of means over a given standard deviation; NaN where a side is empty or the scale
    is 0.
    """
    if not len(first) or not len(second) or not scale > 0:
        return np.nan
    return float((first.mean() - second.mean()) / scale)
