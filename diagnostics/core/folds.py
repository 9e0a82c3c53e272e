"""Folds of prompts: one step per fold, and what the steps say together about each position.

    gain_fold<f>   D_i(theta0) - D_i(after the step on fold f)      of every position, for every f
    gain           mean over the steps on the other folds           held out
    own_gain       gain after the step on the position's own fold   it carried loss
    context_gain   gain - gain_permuted                             the teacher's own, per context

The token table keeps every `_fold<f>` column, and `combine` makes the others from them: with all
steps for the probe, and without one of them for the step batches' part of an interval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diagnostics.core.formulas import relative_gain, released_relative_gain

if TYPE_CHECKING:
    import pandas as pd

OWN = "own_"
NULLS = ("global", "divergence", "token_type")
"""Among which positions the teacher is permuted: all of the fold's, those of the same decile of D,
or those of the same token type."""


def null_suffix(null: str) -> str:
    """What the names of a null's columns end with: nothing for `global`."""
    return "" if null == "global" else f"_{null}"


PERMUTED = tuple(f"gain_permuted{null_suffix(null)}" for null in NULLS)
MEASURED = ("gain", "reverse_gain", *PERMUTED)
"""Outcomes that are measured after every step."""


def fold_columns(tokens: pd.DataFrame, name: str) -> list[str]:
    """Names of an outcome's columns, one per step, in the order of the folds.

    Args:
        tokens: A token table.
        name: Name of the outcome, such as `gain`.

    Returns:
        `<name>_fold0` and so on; empty where the table has one step.
    """
    found: list[str] = []
    while f"{name}_fold{len(found)}" in tokens.columns:
        found.append(f"{name}_fold{len(found)}")
    return found


def step_count(tokens: pd.DataFrame) -> int:
    """Number of steps that the gains of a token table come from; 1 for a table without folds."""
    return max(1, len(fold_columns(tokens, "gain"))) if "fold" in tokens.columns else 1


def combine(tokens: pd.DataFrame, *, without: int | None = None) -> pd.DataFrame:
    """Make the outcomes of a fold table from the columns of its steps.

    Args:
        tokens: A token table of N rows with `fold`, `forward_kl`, `reverse_kl` and `gain_fold<f>`
            for at least two folds; gains in nats.
        without: Number of a step that is left out; None takes all.

    Returns:
        A copy with, in nats, `gain`, `reverse_gain` and `gain_permuted` (mean over the steps on
        other folds; NaN where none is left), `gain_sd` (their standard deviation, NaN for one
        step), the same after the own fold's step with the prefix `own_` (NaN for positions of the
        fold `without`), `context_gain` (gain minus permuted gain), `forward_kl_after` and
        `reverse_kl_after`; and as fractions `relative_gain`, `own_relative_gain` (NaN where D is
        under 1e-3 nats) and `relative_gain_released` (no floor). Other nulls add
        `gain_permuted_<null>` and `context_gain_<null>`.
    """
    fold_N = tokens["fold"].to_numpy()
    made: dict[str, np.ndarray] = {}
    for name in MEASURED:
        columns = fold_columns(tokens, name)
        if not columns:
            continue
        gains_NF = tokens[columns].to_numpy(dtype=np.float64)
        held_NF = np.arange(gains_NF.shape[1]) != fold_N[:, None]
        if without is not None:
            held_NF[:, without] = False
        made[name], spread = _mean_and_spread(gains_NF, held_NF)
        if name == "gain":
            made["gain_sd"] = spread
        own = gains_NF[np.arange(len(fold_N)), fold_N]
        made[OWN + name] = np.where(fold_N == without, np.nan, own)
    return tokens.assign(**made, **_derived(tokens, made))


def _mean_and_spread(gains_NF: np.ndarray, held_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [N] over the steps that the mask picks."""
    count = held_NF.sum(axis=1)
    kept = np.where(held_NF, gains_NF, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = kept.sum(axis=1) / count
        square = np.where(held_NF, (gains_NF - mean[:, None]) ** 2, 0.0).sum(axis=1)
        spread = np.sqrt(square / (count - 1))
    return np.where(count > 0, mean, np.nan), np.where(count > 1, spread, np.nan)


def _derived(tokens: pd.DataFrame, made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outcomes that follow from the means and from the divergences before the step."""
    forward, reverse = (tokens[name].to_numpy(dtype=float) for name in ("forward_kl", "reverse_kl"))
    after = forward - made["gain"]
    derived = {
        "forward_kl_after": after,
        "reverse_kl_after": reverse - made["reverse_gain"] if "reverse_gain" in made else None,
        "relative_gain": relative_gain(forward, after),
        f"{OWN}relative_gain": relative_gain(forward, forward - made[f"{OWN}gain"]),
        "relative_gain_released": released_relative_gain(forward, after),
    }
    for null in NULLS:
        permuted = f"gain_permuted{null_suffix(null)}"
        if permuted in made:
            for prefix in ("", OWN):
                context = f"{prefix}context_gain{null_suffix(null)}"
                derived[context] = made[f"{prefix}gain"] - made[prefix + permuted]
    return {name: values for name, values in derived.items() if values is not None}
