"""The columns of the scripts released with arXiv 2605.26844, under this project's names.

    Hs_full, Ht_full               H(p), H(q), nats
    KLf_full, KLr_full             KL(q||p), KL(p||q), nats
    Cmass_true, Cmass_topk         compatibility, its lower bound from both lists
    Coverlap, CBC, reach_t1        overlap, Bhattacharyya coefficient, teacher's first choice in
                                   reach
    KLf_union, KLr_union           KL(q||p), KL(p||q) on the union of the lists; in the token bank
                                   of the training code floored at 1e-12, like its CBC
                                   (`..._released`)
    Hs_topk, student_topk_mass     entropy and mass of the student's own list; the teacher's alike
    student_top_ids, ..._logps     the lists themselves: see `released_lists`
    H_norm, D_norm, C_norm         scaled and clipped to [0, 1]; in section3_analysis_tokens called
                                   Hn, Dn, Cn
    quadrant, budget_keep          whether the position was in Q3, and whether training kept it
    loss_mask_original             0 (or a word for no) where the position carried no loss
    <name>_base, G_KLf, G_KLr      before training, and what it gained: see `released_gains`

What a table states itself is kept; lists add what it does not state."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from diagnostics.contexts.released_gains import (
    OUTCOMES,
    Q3,
    add_outcomes,
    before_and_after,
    plain_is_after,
)
from diagnostics.contexts.released_keys import key_columns, to_numbers
from diagnostics.contexts.released_lists import (
    OF_TEACHER,
    ON_UNION,
    Lists,
    measure_lists,
    read_lists,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import (
    acceptance,
)
from diagnostics.core.schema import column, require_columns, validate_tokens

log = logging.getLogger("diagnostics")
MEASURED = {
    "Hs_full": "student_entropy",
    "Ht_full": "teacher_entropy",
    "KLf_full": "forward_kl",
    "KLr_full": "reverse_kl",
    "Cmass_true": "compatibility",
    "Cmass_topk": "compatibility_intersection",
    "Coverlap": "topk_overlap",
    "topk_jaccard": "topk_jaccard",
    "shared_student_topk_mass": "shared_student_mass",
    "CBC": "bhattacharyya",
    "reach_t1": "teacher_top1_in_topk",
    "target_in_teacher_topk": "sampled_in_teacher_topk",
    "target_in_student_topk": "sampled_in_topk",
    "KLf_union": "union_forward_kl",
    "KLr_union": "union_reverse_kl",
    "student_logp_sampled": "student_logprob",
    "teacher_logp_sampled": "teacher_logprob",
    "sampled_teacher_adv": "advantage",
    "Hs_topk": "student_entropy_topk",
    "Ht_topk": "teacher_entropy_topk",
    "student_topk_mass": "student_topk_mass",
    "teacher_topk_mass": "teacher_topk_mass",
}
"""Released column -> our column."""
SCALED = {
    "student_entropy_normalized": ("H_norm", "Hn"),
    "divergence_normalized": ("D_norm", "Dn"),
    "compatibility_normalized": ("C_norm", "Cn"),
}
"""Our column -> the names of what released programs scale and clip."""
FOLLOWS = (
    *("DC_norm", "Dlearn", "Dincompat", "tip_score", "ca_softor_score", "split_ca_score"),
    *("TIP", "H_plus_teach", "G_KLf_winsor01", "G_KLf_winsor05"),
    *("Hs_topk_norm", "Ht_topk_norm", "sampled_reverse_kl"),
)
"""Columns that formulas of others give; they are left out without a word."""
STATED_K = ("k", "top_k", "topk")
"""Columns that may state the K of the table."""
LISTS = ("student_top_ids", "teacher_top_ids", "student_topk_ids", "teacher_topk_ids")
"""Columns of top ids, whose length gives K."""
TEACHER_COLUMNS = ("teacher_entropy", "teacher_logprob", *OF_TEACHER)
"""Columns that training the student does not change."""
KEYS = (
    "sample_index",
    "sample_ordinal",
    "group_index",
    "rollout_id",
    "tok_pos",
    "pos_norm",
    "token_id",
    "token",
    "resp_len",
    "loss_mask_original",
    "dataset",
)
"""Released columns that name a row."""
TRAINING_BANK = ("schema_version", "Cmass_exact", "Cprefix_ema", "budget_method")
"""Columns of the token bank that the training code writes; the scoring script writes none of them.
"""
SAME_TOKENS = 0.5
"""Share of positions with the same tokens in both lists from which what needs that is kept."""


def from_released(
    frame: pd.DataFrame, *, trained: bool = False, by_ordinal: bool = False, k: int | None = None
) -> pd.DataFrame:
    """Convert a released token table to our columns, with gains in nats.

    Args:
        frame: The table as its file has it. Positions outside `loss_mask_original` are dropped.
        trained: Whether the plain columns are known to be the trained student's. Then none of them
            stands in for one from before training.
        by_ordinal: Whether samples are told apart by `sample_ordinal` whatever `sample_index` has.
        k: K as a file beside the table states it; None where none does.

    Returns:
        A table as `read_tokens` returns it.

    Raises:
        DiagnosticsError: A key column is missing, or a column holds values of another type.
    """
    needed = ("tok_pos",) if Q3 in frame else ("tok_pos", "token_id")
    require_columns(frame, needed, what="A released token bank")
    notes: list[list[str]] = []
    frame = frame.reset_index(drop=True)
    # Keys first: a response's length counts the positions outside the loss mask as well.
    keys = pd.DataFrame(key_columns(frame, notes, by_ordinal=by_ordinal))
    kept = _supervised(frame, notes)
    keys = keys[kept].reset_index(drop=True)
    frame = frame[kept].reset_index(drop=True)
    student, teacher = (read_lists(frame, model) for model in ("student", "teacher"))
    k = _stated_k(frame, student, teacher) if k is None else k
    listed = _listed(frame, student, teacher, k, notes)
    after = trained or plain_is_after(frame)
    columns = _columns(frame, listed, notes, after=after, leak=not trained)
    tokens = keys.assign(**_flags_filled(columns, notes))
    if after or set(OUTCOMES) & set(frame):
        add_outcomes(tokens, frame, after, notes)
    _log_left_out(frame)
    tokens = validate_tokens(tokens)
    for _, _, message in notes:
        log.warning("%s", message)
    tokens.attrs["warnings"] = notes
    if k is not None:
        tokens.attrs["k"] = k
    return tokens


def _columns(
    frame: pd.DataFrame,
    listed: dict[str, pd.Series],
    notes: list,
    *,
    after: bool,
    leak: bool,
) -> dict[str, pd.Series]:
    """Return the measurements by our name, from before training and, where the plain columns are
    the trained student's (`after`), from after it.
    """
    measured = _measured(frame, "", notes) | _released_names(frame, notes)
    columns = _complete(measured, listed, frame, notes)
    if not after:
        return columns
    base = _complete(_measured(frame, "_base", notes), {}, frame, notes, ending="_base")
    stated = {theirs: ours for theirs, ours in MEASURED.items() if theirs in frame}
    return before_and_after(base, columns, stated, notes, leak=leak)


def _stated_k(frame: pd.DataFrame, *lists: Lists | None) -> int | None:
    """Return K of the columns that depend on it, where a column states it or lists of one length
    show it.
    """
    for name in STATED_K:
        values = to_numbers(frame[name]).dropna().unique() if name in frame else []
        if len(values) == 1 and values[0] >= 1 and values[0] == round(values[0]):
            return int(values[0])
    for found in lists:
        if found is not None and found.k is not None:
            return found.k
    for name in LISTS:
        rows = frame.get(name, ())
        lengths = {len(row) for row in rows if hasattr(row, "__len__") and not isinstance(row, str)}
        if len(lengths) == 1 and lengths != {0}:
            return lengths.pop()
    return None


def _supervised(frame: pd.DataFrame, notes: list) -> np.ndarray:
    """Return the mask of the rows that carry loss; a gap in the loss mask counts as no loss."""
    if "loss_mask_original" not in frame:
        return np.ones(len(frame), dtype=bool)
    written = frame["loss_mask_original"]
    mask = to_numbers(written)
    odd = written[mask.isna() & written.notna()]
    if len(odd):
        raise DiagnosticsError(
            f"loss_mask_original holds {odd.iloc[0]!r} in {len(odd)} rows, which is no flag. Write"
            " 1 and 0, or true and false."
        )
    kept = (mask.fillna(0) != 0).to_numpy()
    if not kept.all():
        gaps = f", {mask.isna().sum()} of them without a value for it" if mask.isna().any() else ""
        notes.append(
            [
                "unsupervised",
                "loss_mask_original",
                f"{(~kept).sum()} positions outside the loss mask were dropped{gaps}.",
            ]
        )
    if not kept.any():
        raise DiagnosticsError(
            "loss_mask_original is 0 at every position, so none is left. Leave the column out, or"
            " give supervised positions."
        )
    return kept


def _measured(frame: pd.DataFrame, ending: str, notes: list) -> dict[str, pd.Series]:
    """Return the measurements that a table has under released names with an ending."""
    found = {
        ours: _numbers(frame[theirs + ending], notes)
        for theirs, ours in MEASURED.items()
        if theirs + ending in frame
    }
    return {name: values for name, values in found.items() if values.notna().any()}


def _numbers(values: pd.Series, notes: list) -> pd.Series:
    """Return a column of measurements. Cells that are not numbers become NaN and are counted; an
    empty cell is a gap.
    """
    found = to_numbers(values)
    texts = values.astype(str).str.strip().str.lower()
    odd = values[found.isna() & values.notna() & ~texts.isin(("nan", ""))]
    if len(odd):
        notes.append(
            [
                "not_numbers",
                str(values.name),
                (
                    f"{values.name} holds {str(odd.iloc[0])[:40]!r} and the like in {len(odd)}"
                    " rows: no numbers, and undefined."
                ),
            ]
        )
    return found


def _released_names(frame: pd.DataFrame, notes: list) -> dict[str, pd.Series]:
    """Return what only released programs compute: scaled scores, Q3, and what the loss kept."""
    found = {
        ours: _numbers(frame[theirs], notes)
        for ours, names in SCALED.items()
        for theirs in names
        if theirs in frame
    }
    if Q3 in frame:
        found["in_q3_released"] = to_numbers(frame[Q3])
    elif "quadrant" in frame:
        found["in_q3_released"] = (frame["quadrant"].astype(str) == Q3).astype(float)
    if "budget_keep" in frame:
        found["kept_released"] = to_numbers(frame["budget_keep"])
    return {name: values for name, values in found.items() if values.notna().any()}


def _listed(
    frame: pd.DataFrame,
    student: Lists | None,
    teacher: Lists | None,
    k: int | None,
    notes: list,
) -> dict[str, pd.Series]:
    """Return what the lists of likeliest tokens say, and count the positions without them."""
    if student is None or teacher is None:
        return {}
    token_N = to_numbers(frame["token_id"]).to_numpy() if "token_id" in frame else None
    found = {
        name: pd.Series(values)
        for name, values in measure_lists(student, teacher, token_N, k=k).items()
    }
    broken = max(student.unreadable, teacher.unreadable)
    missing = int(found["topk_overlap"].isna().sum())
    if broken or missing:
        notes.append(
            [
                "lists",
                "student_top_ids, teacher_top_ids",
                (
                    f"{missing} of {len(frame)} positions have no list of both models, {broken} of"
                    " them for lists that cannot be read; what the lists say is undefined there."
                ),
            ]
        )
    return {name: values for name, values in found.items() if _known(name, values)}


def _known(name: str, values: pd.Series) -> bool:
    """Whether a measure of lists is defined often enough to be kept. What asks for lists of the
    same tokens is left out under half: a criterion would take the few for all.
    """
    share = float(values.notna().mean())
    return share >= SAME_TOKENS if name in (*ON_UNION, "compatibility") else share > 0


def _complete(
    measured: dict[str, pd.Series],
    listed: dict[str, pd.Series],
    frame: pd.DataFrame,
    notes: list,
    *,
    ending: str = "",
) -> dict[str, pd.Series]:
    """Add what follows from other columns and from lists, and settle names that depend on which
    program wrote the table. What the table states itself is kept.
    """
    if set(TRAINING_BANK) & set(frame) and not ending:
        measured = _floored_apart(measured, notes)
    measured = _with_mass(measured, frame, ending)
    found = {name: values for name, values in listed.items() if name not in measured} | measured
    if "topk_overlap" in found and "topk_jaccard" not in found:
        found["topk_jaccard"] = found["topk_overlap"] / (2 - found["topk_overlap"])
    if "advantage" not in found and {"student_logprob", "teacher_logprob"} <= set(found):
        found["advantage"] = found["teacher_logprob"] - found["student_logprob"]
    if "advantage" in found:
        found["acceptance"] = acceptance(found["advantage"])
    firsts = [f"{model}_top1_id{ending}" for model in ("student", "teacher")]
    if set(firsts) <= set(frame) and not frame[firsts].isna().any(axis=None):
        found["top1_match"] = (frame[firsts[0]] == frame[firsts[1]]).astype(float)
    return found


def _floored_apart(measured: dict[str, pd.Series], notes: list) -> dict[str, pd.Series]:
    """Rename what the training code computes with probabilities outside the lists floored."""
    floored = [name for name in ON_UNION if name in measured]
    if "bhattacharyya" in floored:
        notes.append(
            [
                "floored",
                "bhattacharyya_released",
                (
                    "CBC of a training bank has probabilities outside each model's list floored,"
                    f" at {len(measured['bhattacharyya'])} positions: it is kept as"
                    " bhattacharyya_released and is no stand-in for compatibility."
                ),
            ]
        )
    return {
        f"{name}_released" if name in floored else name: values for name, values in measured.items()
    }


def _with_mass(
    measured: dict[str, pd.Series], frame: pd.DataFrame, ending: str
) -> dict[str, pd.Series]:
    """Add the training bank's `Cmass`: the compatibility where it is exact, and else the mass of
    the tokens in both lists.
    """
    cmass, exactness = f"Cmass{ending}", f"Cmass_exact{ending}"
    if cmass not in frame or {"compatibility", "compatibility_intersection"} & set(measured):
        return measured
    mass = to_numbers(frame[cmass])
    if exactness not in frame or not (exact := to_numbers(frame[exactness]) == 1).any():
        return measured | {"compatibility_intersection": mass}
    return measured | {"compatibility": mass.where(exact)}


def _flags_filled(columns: dict[str, pd.Series], notes: list) -> dict[str, pd.Series]:
    """Return the columns with flags as bool; a gap counts as false and is said."""
    found = dict(columns)
    for name in columns:
        entry = column(name)
        if entry is None or entry.dtype != "bool":
            continue
        if gaps := int(columns[name].isna().sum()):
            notes.append(
                ["gaps", name, f"{name} is empty at {gaps} positions, which count as false."]
            )
        found[name] = columns[name].fillna(0.0) != 0
    return found


def _log_left_out(frame: pd.DataFrame) -> None:
    """Log the columns without a counterpart."""
    used = {
        *MEASURED,
        *(f"{name}_base" for name in MEASURED),
        *OUTCOMES,
        *KEYS,
        *STATED_K,
        *LISTS,
        *FOLLOWS,
        *(name for names in SCALED.values() for name in names),
        "student_top_logps",
        "teacher_top_logps",
        "quadrant",
        "budget_keep",
        Q3,
        "Cmass",
        "Cmass_exact",
        "schema_version",
        "student_top1_id",
        "teacher_top1_id",
    }
    left_out = [str(name) for name in frame if name not in used]
    if left_out:
        log.info("columns without a counterpart, left out: %s", ", ".join(left_out))
