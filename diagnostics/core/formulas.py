"""Formulas that both a measured and an imported token table need, for arrays of any kind.

    relative gain             (D - D') / D                       D before the step, D' after it
    released relative gain    (D - D') / (D + 1e-12)
    gain                      D - D'                             nats
    acceptance                min(1, q(y)/p(y)) = exp(min(0, A))

NumPy arrays, pandas columns and tensors are taken as they are, so this module needs no torch.
"""

from __future__ import annotations

import numpy as np

RELATIVE_GAIN_FLOOR = 1e-3
"""Nats of forward KL under which a relative gain is undefined: there it is mostly rounding."""
RELEASED_EPSILON = 1e-12
"""What the scripts released with arXiv 2605.26844 add to the denominator, in place of a floor."""


def relative_gain(before, after, *, floor: float = RELATIVE_GAIN_FLOOR):
    """Share of a divergence that a step removed.

    Args:
        before: [N] divergence in nats before the step, an array or a column.
        after: [N] divergence in nats after the step.
        floor: Nats of `before` under which the share is undefined.

    Returns:
        [N] fractions, negative where the divergence grew, NaN where `before` is under the floor.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return (before - after) / np.where(before >= floor, before, np.nan)


def released_relative_gain(before, after):
    """`relative_gain` as the scripts released with arXiv 2605.26844 define it, without a floor.

    Args:
        before: [N] divergence in nats before the step.
        after: [N] divergence in nats after the step.

    Returns:
        [N] fractions, of any size where `before` is nearly 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return (before - after) / (before + RELEASED_EPSILON)


def gains(before: tuple, after: tuple) -> dict:
    """Outcome columns of the token table from the divergences before and after one step.

    Args:
        before: Forward KL (teacher first) and reverse KL before the step, float64 [N] each, nats;
            arrays or columns.
        after: The same after the step.

    Returns:
        Float64 [N] for each column: forward_kl_after, reverse_kl_after, gain, relative_gain (NaN
        where the forward KL before is under 1e-3 nats), relative_gain_released (no floor),
        reverse_gain.
    """
    return {
        "forward_kl_after": after[0],
        "reverse_kl_after": after[1],
        "gain": before[0] - after[0],
        "relative_gain": relative_gain(before[0], after[0]),
        "relative_gain_released": released_relative_gain(before[0], after[0]),
        "reverse_gain": before[1] - after[1],
    }


def acceptance(advantage):
    """Probability that speculative decoding would accept the sampled token.

    Args:
        advantage: [N] A = ln q(y) - ln p(y) in nats, an array, a column or a tensor.

    Returns:
        [N] probabilities, of the kind that came in; NaN stays NaN.
    """
    kept = advantage.clip(None, 0)
    return kept.exp() if hasattr(kept, "exp") else np.exp(kept)
