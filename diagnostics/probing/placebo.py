"""The placebo: how large a gain is that has no teacher in it.

Every coordinate of the update gets a random sign, so the student moves exactly as far, in a
direction that no teacher gave. This is a check of magnitude alone. The gain of such a step is odd
in its direction: both signs together average to what curvature leaves. Its correlation with a score
is therefore a coin flip of the seed and says nothing about the score; only sizes are tabulated, by
stratum of D.

The placebo moves along fold 0's step and is measured at the positions of fold 1, where the step's
own gain is a held-out one.

Axes: N positions of the bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from diagnostics.analysis.responses import ALL, SIDES
from diagnostics.core.progress import Shards
from diagnostics.probing.step import PreparedStep

STEP_FOLD, MEASURED_FOLD = 0, 1
EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, np.inf)
"""Strata of D = KL(q||p) in nats; under 1e-3 a relative gain is undefined."""


def placebo_gains(
    step: PreparedStep,
    *,
    directions: int,
    seed: int,
    shards: Callable[[str], Shards],
) -> Iterator[np.ndarray]:
    """Move the student along random signs of a step, both ways, and measure one fold.

    Args:
        step: The step on `STEP_FOLD`, with the numbers of its update.
        directions: Number of random directions.
        seed: Seed of the signs.
        shards: Where each pass keeps its finished batches.

    Yields:
        Gains float64 [N] in nats for each direction and sign, NaN outside the measured fold.
    """
    bench, size = step.bench, step.step_size
    measured_N = bench.loss_weights(MEASURED_FOLD) > 0
    if not directions:
        return
    folds = [MEASURED_FOLD]
    # on the very batches of the passes after it, so that a step of size 0 gives exactly 0
    before_N = bench.rescore("placebo", shards=shards("placebo-before"), folds=folds)[0]
    for number in range(directions):
        signs = int(np.random.SeedSequence([seed, 5, number]).generate_state(1)[0])
        for way in (1, -1):
            name = f"placebo-{step.direction.name(way * size)}-{signs}"
            with bench.moved(step.direction.update, way * size, placebo_seed=signs):
                after_N = bench.rescore("placebo", shards=shards(name), folds=folds)[0]
            yield np.where(measured_N, before_N - after_N, np.nan)


def placebo_by_rollouts(
    tokens: pd.DataFrame, step_gain_N: np.ndarray, gains: Sequence[np.ndarray]
) -> pd.DataFrame:
    """Size of the placebo's gains on all responses, and on right and on wrong ones alone.

    Args:
        tokens: Token table of N rows, as `placebo_table` takes it; with `correct` (1, 0 or NaN)
            where any response was judged.
        step_gain_N: Gain after the step itself, float64 [N] in nats.
        gains: One float64 [N] for each direction and sign, NaN where it was not measured.

    Returns:
        The columns of `placebo_table`; where there are right and wrong responses, its rows for
        either follow those for all, told apart by a column rollouts (all, right, wrong).
    """
    whole = placebo_table(tokens, step_gain_N, gains)
    if not set(SIDES.values()) <= set(tokens.get("correct", ())):
        return whole
    parts = [whole.assign(rollouts=ALL)]
    for side, value in SIDES.items():
        mask_N = (tokens["correct"] == value).to_numpy()
        own = placebo_table(tokens[mask_N], step_gain_N[mask_N], [each[mask_N] for each in gains])
        parts.append(own.assign(rollouts=side))
    return pd.concat(parts, ignore_index=True)


def placebo_table(
    tokens: pd.DataFrame, step_gain_N: np.ndarray, gains: Sequence[np.ndarray]
) -> pd.DataFrame:
    """Size of the placebo's gains beside the step's own, by stratum of D.

    Args:
        tokens: Token table of N rows with forward_kl (nats) and prompt_id.
        step_gain_N: Gain after the step itself, float64 [N] in nats.
        gains: One float64 [N] for each direction and sign, NaN where it was not measured.

    Returns:
        One row for all positions and one per stratum, with columns stratum, low, high (edges of D
        in nats; the lower one belongs to the stratum), positions, prompts, directions (each was
        taken both ways), mean_gain, sd, mean_abs_gain (of the placebo, over positions, directions
        and signs) and step_mean_gain, step_sd, step_mean_abs_gain (of the step at the same
        positions); nats. An empty stratum has NaN.
    """
    placebo_RN = np.stack(list(gains)) if len(gains) else np.full((1, len(tokens)), np.nan)
    known_N = np.isfinite(placebo_RN).all(axis=0) & np.isfinite(step_gain_N)
    divergence_N = tokens["forward_kl"].to_numpy(dtype=np.float64)
    rows = []
    for low, high in [(EDGES[0], EDGES[-1]), *pairwise(EDGES)]:
        whole = (low, high) == (EDGES[0], EDGES[-1])
        inside = known_N & (whole | ((divergence_N >= low) & (divergence_N < high)))
        row = {
            "stratum": "all" if whole else f"{low:g} to {high:g}",
            "low": low,
            "high": high,
            "positions": int(inside.sum()),
            "prompts": tokens["prompt_id"][inside].nunique(),
            "directions": len(gains) // 2,
        }
        rows.append(row | _sizes(placebo_RN[:, inside], "") | _sizes(step_gain_N[inside], "step_"))
    return pd.DataFrame(rows)


def _sizes(gains: np.ndarray, prefix: str) -> dict[str, float]:
    """Mean, standard deviation and mean size; NaN where there are too few."""
    some, several = gains.size > 0, gains.size > 1
    return {
        f"{prefix}mean_gain": float(gains.mean()) if some else np.nan,
        f"{prefix}sd": float(gains.std(ddof=1)) if several else np.nan,
        f"{prefix}mean_abs_gain": float(np.abs(gains).mean()) if some else np.nan,
    }
