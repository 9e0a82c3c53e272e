"""Before and after training in one released table, and the gains that it states.

    <name>_base      a measurement before training
    G_KLf, G_KLr     (before - after) / (before + 1e-12)

Those scripts score a bank, train, score it again and join the two. In a table with gains the plain
columns therefore belong to the *trained* student, unless KLf_full equals KLf_full_base everywhere
(then the scores of theta0 were joined). They become `<name>_after`. Where a predictor exists only
from after training it also stands under its own name, because there is nothing else, although it
contains the outcome: a warning names every such column, and what mends it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from diagnostics.contexts.released_keys import to_numbers
from diagnostics.contexts.released_lists import OF_TEACHER
from diagnostics.core.formulas import RELEASED_EPSILON, gains, released_relative_gain
from diagnostics.core.schema import AFTER, column

OUTCOMES = {"G_KLf": "forward_kl", "G_KLr": "reverse_kl"}
"""Released relative gain -> our divergence."""
TEACHER_COLUMNS = ("teacher_entropy", "teacher_logprob", *OF_TEACHER)
"""Columns that training the student does not change."""
DERIVED = ("topk_jaccard", "advantage", "acceptance")
"""Columns that follow from others, from after training where those do."""
Q3 = "Q3_lowH_highD"
"""The released name of Q3: a column of section3_analysis_tokens, a value of `quadrant`."""
GAIN_TOLERANCE = 1e-6
"""How far a table's relative gain may lie from the one that its divergences give."""


def plain_is_after(frame: pd.DataFrame) -> bool:
    """Whether the plain columns belong to the trained student."""
    if {"KLf_full", "KLf_full_base"} <= set(frame.columns):
        before, after = (
            to_numbers(frame[name]).to_numpy() for name in ("KLf_full_base", "KLf_full")
        )
        return not np.array_equal(before, after, equal_nan=True)
    if Q3 in frame:  # scores of theta0 beside gains
        return False
    return any(name in frame for name in OUTCOMES) or any(
        str(name).endswith("_base") for name in frame
    )


def same_student(frame: pd.DataFrame) -> bool:
    """Whether a table's plain columns are theta0's although it states gains that are not 0."""
    pair = {"KLf_full", "KLf_full_base"} <= set(frame)
    if not pair or plain_is_after(frame):
        return False
    stated = [to_numbers(frame[name]) for name in OUTCOMES if name in frame]
    return any((values.fillna(0) != 0).any() for values in stated)


def before_and_after(
    base: dict[str, pd.Series],
    plain: dict[str, pd.Series],
    names: Mapping[str, str],
    notes: list,
    *,
    leak: bool,
) -> dict[str, pd.Series]:
    """Return the columns before and after training.

    Args:
        base: Measurements before training by our name, from the columns `_base`.
        plain: Those of the trained student.
        names: Released names of the measurements that the table states -> ours.
        notes: A warning is appended that names what exists only from after training.
        leak: Whether such a measurement is read as a predictor all the same.
    """
    found = base | {
        name: values
        for name, values in plain.items()
        if name in TEACHER_COLUMNS and name not in base
    }
    theirs = {ours: name for name, ours in names.items()}
    leaking = [
        name
        for name in plain
        if name in theirs and name not in (*found, *DERIVED, *OUTCOMES.values())
    ]
    if leak and leaking:
        notes.append(_leak([f"{theirs[name]} ({name})" for name in leaking], leaking))
        found |= {name: plain[name] for name in leaking}
        found = {name: plain[name] for name in DERIVED if name in plain} | found
    after = {
        name + AFTER: values
        for name, values in plain.items()
        if name not in TEACHER_COLUMNS and (entry := column(name)) and entry.stage == "before"
    }
    return found | after


def _leak(columns: list[str], names: list[str]) -> list[str]:
    """The warning of predictors that were read after training."""
    return [
        "read_after",
        ", ".join(names),
        (
            f"{', '.join(columns)} were read after training and are used as predictors all the"
            " same: they contain the outcome, so their correlations with the gain cannot be"
            " trusted. Give the scores of the untrained student as well: --tokens BEFORE"
            " --tokens-after AFTER, or read_tokens(before, after=after)."
        ),
    ]


def add_outcomes(
    tokens: pd.DataFrame, frame: pd.DataFrame, plain_is_after: bool, notes: list
) -> None:
    """Add the divergences after training and the gains."""
    for relative, kl in OUTCOMES.items():
        after = tokens.get(kl + AFTER) if plain_is_after else None
        share = to_numbers(frame[relative]) if relative in frame else None
        if kl not in tokens and share is not None and after is not None:
            # G = (b - a)/(b + eps) gives b = (a + G*eps)/(1 - G)
            tokens[kl] = (after + share * RELEASED_EPSILON) / (1 - share).where(share < 1)
        if kl in tokens and after is None and share is not None:
            after = tokens[kl] - share * (tokens[kl] + RELEASED_EPSILON)
        if kl in tokens and after is not None:
            tokens[kl + AFTER] = after
    _add_gains(tokens)
    if "G_KLf" in frame:
        _state_relative(tokens, to_numbers(frame["G_KLf"]), notes)


def _add_gains(tokens: pd.DataFrame) -> None:
    """Add the gains of each divergence that the table has before and after training."""
    undefined = pd.Series(np.nan, index=tokens.index)
    before, after = (
        tuple(tokens.get(kl + ending, undefined) for kl in OUTCOMES.values())
        for ending in ("", AFTER)
    )
    for name, values in gains(before, after).items():
        if not name.endswith(AFTER) and pd.Series(values).notna().any():
            tokens[name] = values


def _state_relative(tokens: pd.DataFrame, stated: pd.Series, notes: list) -> None:
    """Keep the file's own relative gain to the last bit, and count where it is not the one that
    the file's divergences give.
    """
    if "gain" in tokens:
        given = released_relative_gain(tokens["forward_kl"], tokens["forward_kl" + AFTER])
        apart = (given - stated).abs() > GAIN_TOLERANCE * (1 + stated.abs())
        if apart.any():
            notes.append(
                [
                    "gains_differ",
                    "relative_gain_released",
                    (
                        f"G_KLf differs at {int(apart.sum())} of {len(tokens)} positions from what"
                        " the divergences before and after give, by up to"
                        f" {(given - stated).abs().max():.3g}. Gains in nats are of the"
                        " divergences."
                    ),
                ]
            )
    tokens["relative_gain_released"] = stated
