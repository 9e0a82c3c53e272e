"""One token table of two: the same positions before and after training."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import gains
from diagnostics.core.schema import AFTER, column, validate_tokens

log = logging.getLogger("diagnostics")
ON = ["context_id", "position"]
"""The keys of a position in both tables."""
SAME = 1e-3
"""How far one measurement of theta0 may lie from another: float32 forwards in batches of other
sizes differ by up to 2e-5 nats, another student by tenths."""
OF_TEACHER = (
    "teacher_entropy",
    "teacher_logprob",
    "teacher_dropped_mass",
    "teacher_tail_mass",
    "teacher_topk_mass",
)
"""Beginnings of the measurements that training the student does not change."""
DIVERGENCES = ("forward_kl", "reverse_kl")
OF_CHECKPOINT = ("seen",)
"""Keys that belong to the trained student."""


def join_after(
    before: pd.DataFrame, after: pd.DataFrame, *, names: tuple[str, str] = ("BEFORE", "AFTER")
) -> pd.DataFrame:
    """Join a token table of the untrained student with one of the trained student.

    Args:
        before: Token table of the untrained student. Its own columns from after training, and its
            gains, give way to those of `after`.
        after: Token table of the trained student on the same positions. Columns `<name>_after` are
            taken as they are, and its other measurements are then of the time before training;
            without any, its measurements become `<name>_after`.
        names: What messages call the two.

    Returns:
        The positions of both in the order of `before`, with gains in nats. `attrs` hold the
        warnings of both tables and of the joining, and `k` where the tables agree on it.

    Raises:
        DiagnosticsError: The tables share no position, differ in tokens or in K, hold no
            divergence both, or are of two students.
    """
    notes = [*before.attrs.get("warnings", ()), *after.attrs.get("warnings", ())]
    fresh: list[list[str]] = []
    plain, measured = _sides(after)
    kept = _before_alone(before, fresh)
    joined = kept[[*ON, "token_id"]].merge(
        after[[*ON, "token_id"]].assign(row=np.arange(len(after))),
        on=ON,
        suffixes=("", "_other"),
        validate="one_to_one",
    )
    _require_match(kept, after, joined, names)
    _count_lost(kept, after, joined, names, fresh)
    kept = kept.merge(joined[ON], on=ON)
    rows = after.iloc[joined["row"].to_numpy()].reset_index(drop=True)
    _compare(kept, rows[plain], names, fresh)
    lacking = {name: name for name in plain if name.startswith(OF_TEACHER) and name not in kept}
    made = kept.assign(**{ours: rows[theirs] for ours, theirs in (measured | lacking).items()})
    made = _with_gains(made, rows, names)
    for _, _, message in fresh:
        log.warning("%s", message)
    made.attrs["warnings"] = [*(note for note in notes if note[0] != "read_after"), *fresh]
    made.attrs |= _same_k(before, after, names)
    return made


def _sides(after: pd.DataFrame) -> tuple[list[str], dict[str, str]]:
    """Columns of the second table from before training, and by our name those from after it."""
    stages = {name: entry.stage for name in after if (entry := column(name)) is not None}
    measured = [name for name, stage in stages.items() if stage == "before"]
    ready = {name: name for name, stage in stages.items() if stage == "after"}
    if ready:
        return measured, ready | {name: name for name in OF_CHECKPOINT if name in after}
    teacher = [name for name in measured if name.startswith(OF_TEACHER)]
    return teacher, {name + AFTER: name for name in measured if name not in teacher}


def _before_alone(before: pd.DataFrame, notes: list) -> pd.DataFrame:
    """The first table without what it says of the time after training."""
    gone = [
        name
        for name in before
        if (entry := column(name)) is not None and entry.stage in ("after", "outcome")
    ]
    if gone:
        notes.append(
            [
                "replaced",
                ", ".join(gone),
                f"{len(gone)} columns after training of the first table ({', '.join(gone[:5])})"
                " give way to those of the second.",
            ]
        )
    return before.drop(columns=gone)


def _require_match(
    before: pd.DataFrame, after: pd.DataFrame, joined: pd.DataFrame, names: tuple[str, str]
) -> None:
    """Refuse tables without a common position, or with other tokens at the same ones."""
    if not len(joined):
        shown = [
            f"{name} has position {table.position.iloc[0]} of {table.context_id.iloc[0]!r}"
            for name, table in zip(names, (before, after), strict=True)
        ]
        raise DiagnosticsError(
            f"No position is in both tables: {' and '.join(shown)}. Give two tables of the same"
            " contexts that name them alike."
        )
    both = (joined["token_id"] >= 0) & (joined["token_id_other"] >= 0)
    other = joined[both & (joined["token_id"] != joined["token_id_other"])]
    if len(other):
        row = other.iloc[0]
        raise DiagnosticsError(
            f"{len(other)} of {len(joined)} positions hold another token in {names[1]}: position"
            f" {row.position} of {row.context_id!r} is {row.token_id} in {names[0]} and"
            f" {row.token_id_other} there. Give two tables of the same responses."
        )


def _count_lost(
    before: pd.DataFrame,
    after: pd.DataFrame,
    joined: pd.DataFrame,
    names: tuple[str, str],
    notes: list,
) -> None:
    """Say how many positions have no counterpart."""
    lost = [len(table) - len(joined) for table in (before, after)]
    if any(lost):
        notes.append(
            [
                "unmatched",
                "context_id, position",
                f"{lost[0]} of {len(before)} positions of {names[0]} and {lost[1]} of {len(after)}"
                f" of {names[1]} have no counterpart in the other and are left out.",
            ]
        )


def _compare(
    before: pd.DataFrame, again: pd.DataFrame, names: tuple[str, str], notes: list
) -> None:
    """Compare what both tables say of the untrained student and of the teacher."""
    apart = {}
    for name in (name for name in again if name in before):
        entry = column(name)
        if entry is None or entry.dtype != "float64":
            continue
        distance = np.abs(before[name].to_numpy() - again[name].to_numpy())
        far = distance > SAME
        if name == "forward_kl" and far.sum() > len(far) / 2:
            raise DiagnosticsError(
                f"forward_kl before training differs by more than {SAME} nats at {far.sum()} of"
                f" {len(far)} positions between {names[0]} and {names[1]}: they are of two"
                " students. Give the scores from which this training began."
            )
        if far.any():
            apart[name] = (int(far.sum()), float(np.nanmax(distance)))
    if apart:
        listed = [
            f"{name} at {count} positions, by up to {worst:.3g}"
            for name, (count, worst) in apart.items()
        ]
        notes.append(
            [
                "base_differs",
                ", ".join(apart),
                f"{names[1]} says otherwise than {names[0]} what was measured before training:"
                f" {'; '.join(listed)}. The values of {names[0]} are used.",
            ]
        )


def _with_gains(made: pd.DataFrame, rows: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """The joined table with its gains. A relative gain that the second file states stays as it is,
    where both have the same divergence before training.
    """
    known = [name for name in DIVERGENCES if {name, name + AFTER} <= set(made)]
    if "forward_kl" not in known:
        raise DiagnosticsError(
            f"Gains need the forward KL before and after training, and {names[0]} or {names[1]}"
            " lacks it. Give tables that have it (forward_kl, or KLf_full of the released scripts)."
        )
    undefined = np.full(len(made), np.nan)
    columns = gains(
        tuple(made[name] if name in known else undefined for name in DIVERGENCES),
        tuple(made[name + AFTER] if name in known else undefined for name in DIVERGENCES),
    )
    made = made.assign(
        **{
            name: values
            for name, values in columns.items()
            if "reverse" not in name or "reverse_kl" in known
        }
    )
    stated = "relative_gain_released"
    if stated in rows and rows["forward_kl"].equals(made["forward_kl"].reset_index(drop=True)):
        made[stated] = rows[stated]
    return validate_tokens(made)


def _same_k(before: pd.DataFrame, after: pd.DataFrame, names: tuple[str, str]) -> dict[str, int]:
    """The K that the tables state, as an attribute; none where neither does."""
    stated = [table.attrs["k"] for table in (before, after) if "k" in table.attrs]
    if len(set(stated)) > 1:
        raise DiagnosticsError(
            f"{names[0]} was measured at K = {stated[0]} and {names[1]} at K = {stated[1]}. Give"
            " two tables of one K."
        )
    return {"k": stated[0]} if stated else {}
