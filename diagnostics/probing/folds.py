"""Folds of prompts that are alike in what moves a gain, so that each can carry a step of its own.

A fold's step is one draw of a step batch. Folds that differ in how much there is to learn would
differ in their steps for that reason alone, so prompts are assigned in matched blocks: standardized
on three values (mean KL(q||p), mean student entropy, number of response positions), ordered by
their distance from the mean prompt, and cut into blocks of F. Each block gives one prompt to every
fold, in that one of a few seeded orders which leaves the folds' sums nearest to each other. The
most unusual prompts come first, while later blocks can still make up for them.

Axes: N positions, P prompts, F folds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns

BALANCED = ("forward_kl", "student_entropy", "positions")
"""Values of a prompt on which the folds are balanced."""
ORDERS = 64
"""Seeded orders of a block that are tried: with F = 4 nearly all 24 are among them."""


def assign_folds(tokens: pd.DataFrame, count: int, *, seed: int) -> np.ndarray:
    """Divide the prompts among folds that are balanced on `BALANCED`.

    The assignment depends on the prompts' names, values and the seed alone, not on the order of the
    table.

    Args:
        tokens: Token table of N rows with prompt_id, forward_kl and student_entropy (nats); NaN
            measurements are left out of a prompt's mean, and a prompt without any counts as
            average.
        count: Number of folds F, at least 2.
        seed: Seed of the draw, at least 0.

    Returns:
        Fold of every position, int32 [N] in 0 .. F-1. Contexts of one prompt stay together, and the
        folds' numbers of prompts differ by at most 1.

    Raises:
        DiagnosticsError: The seed is negative, or there are fewer than 2 folds or fewer prompts
            than folds.
    """
    require_columns(tokens, ("prompt_id", *BALANCED[:2]), what="An assignment to folds")
    values = prompt_values(tokens)
    _check(count, len(values), seed)
    fold_P = _in_blocks(_standardized(values.to_numpy()), count, np.random.default_rng([seed, 0]))
    return tokens["prompt_id"].map(dict(zip(values.index, fold_P))).to_numpy(dtype=np.int32)


def prompt_values(tokens: pd.DataFrame) -> pd.DataFrame:
    """What folds are balanced on.

    Args:
        tokens: Token table with prompt_id, forward_kl and student_entropy.

    Returns:
        One row per prompt, sorted by name, with the columns of `BALANCED`.
    """
    groups = tokens.groupby("prompt_id", sort=True)
    means = groups[list(BALANCED[:2])].mean()
    return means.assign(positions=groups.size().astype(float))


def folds_of(tokens: pd.DataFrame) -> np.ndarray | None:
    """The folds that a token table records.

    Args:
        tokens: A token table with `fold`, or with the `split` of a single step.

    Returns:
        Int32 [N]: the column `fold`; else 0 for `step` and 1 for `held_out`; None where the table
        has neither.
    """
    if "fold" in tokens:
        return tokens["fold"].to_numpy(dtype=np.int32)
    if "split" in tokens:
        return np.where(tokens["split"] == "step", 0, 1).astype(np.int32)
    return None


def _check(count: int, prompts: int, seed: int) -> None:
    if seed < 0:
        raise DiagnosticsError(f"A seed is a whole number of at least 0; got {seed}.")
    if count < 2:
        raise DiagnosticsError(
            f"folds is {count}, and what is held out for a step are the other folds. Use at least"
            " 2; 4 also show how far the steps differ."
        )
    if prompts < count:
        raise DiagnosticsError(
            f"{prompts} prompts cannot fill {count} folds. Every fold needs one at least; use more"
            " prompts or fewer folds."
        )


def _standardized(values_PX: np.ndarray) -> np.ndarray:
    """Values with mean 0 and standard deviation 1; undefined and constant ones are 0."""
    defined_PX = np.where(np.isfinite(values_PX), values_PX, np.nan)
    known_X = np.isfinite(defined_PX).sum(axis=0).clip(1)
    mean_X = np.nansum(defined_PX, axis=0) / known_X
    spread_X = np.sqrt(np.nansum((defined_PX - mean_X) ** 2, axis=0) / known_X)
    z_PX = (defined_PX - mean_X) / np.where(spread_X > 0, spread_X, 1.0)
    return np.nan_to_num(z_PX)


def _in_blocks(z_PX: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Fold of every prompt [P]: one prompt of each block of F to each fold."""
    shuffled_P = generator.permutation(len(z_PX))  # decides between prompts that are equally far
    order_P = shuffled_P[np.argsort(-np.abs(z_PX[shuffled_P]).sum(axis=1), kind="stable")]
    fold_P = np.zeros(len(z_PX), dtype=np.int32)
    sums_FX = np.zeros((count, z_PX.shape[1]))
    for start in range(0, len(order_P), count):
        block = order_P[start : start + count]
        orders = np.stack([generator.permutation(count)[: len(block)] for _ in range(ORDERS)])
        added_OFX = np.zeros((ORDERS, *sums_FX.shape))
        added_OFX[np.arange(ORDERS)[:, None], orders] = z_PX[block]
        spread_O = ((sums_FX + added_OFX) ** 2).sum(axis=(1, 2))
        best = int(spread_O.argmin())
        fold_P[block] = orders[best]
        sums_FX += added_OFX[best]
    return fold_P
