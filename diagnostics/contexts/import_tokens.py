"""Token tables of other programs, under this project's names.

Read are our own tables and those of the scripts released with arXiv 2605.26844 (CSV, JSONL or
parquet):

    sample_index, group_index,     context, prompt, position and sampled token
    tok_pos, token_id
    Hs_full, Ht_full               H(p), H(q), nats
    KLf_full, KLr_full             KL(q||p), KL(p||q), nats
    Cmass_true, Cmass_topk         compatibility, its lower bound from both lists
    Coverlap, CBC, reach_t1        overlap, Bhattacharyya coefficient, teacher's first choice in
                                   reach
    KLf_union                      KL(q||p) on the union of the lists; in the token bank of the
                                   training code floored at 1e-12 (`..._released`)
    resp_len, pos_norm             response length, relative position t/(T - 1)
    loss_mask_original             0 (or a word for no) where the position carried no loss
    <name>_base                    the same before training
    G_KLf, G_KLr                   (before - after) / (before + 1e-12)

Those scripts score a bank, train, score it again and join the two. In a table with gains the plain
columns therefore belong to the *trained* student, unless KLf_full equals KLf_full_base everywhere
(then the scores of theta0 were joined). Where a predictor exists only from after training, it
already contains the outcome: it is read, because there is nothing else, and a warning names every
such column. The training code's `CBC` is floored like its `KLf_union` and is stored as
`bhattacharyya_released`, which no statistic takes for the exact coefficient. A column `k`, `top_k`
or `topk` with one value, or the length of the lists of top ids, gives the K of the table. Warnings
are also stored in `attrs["warnings"]`, from which the study takes them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.contexts.released_keys import (
    IDS,
    count_ambiguous,
    ids_as_text,
    is_mixed,
    key_columns,
    to_numbers,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.formulas import (
    RELEASED_EPSILON,
    acceptance,
    relative_gain,
    released_relative_gain,
)
from diagnostics.core.manifest import require_as_written
from diagnostics.core.rows import read_rows
from diagnostics.core.schema import require_columns, validate_tokens

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
    "KLf_union": "union_forward_kl",
    "student_logp_sampled": "student_logprob",
    "teacher_logp_sampled": "teacher_logprob",
    "sampled_teacher_adv": "advantage",
}
"""Released column -> our column."""
STATED_K = ("k", "top_k", "topk")
"""Columns that may state the K of the table."""
LISTS = ("student_top_ids", "teacher_top_ids", "student_topk_ids", "teacher_topk_ids")
"""Columns of top ids, whose length gives K."""
INDICATORS = ("teacher_top1_in_topk", "sampled_in_teacher_topk")
"""Columns that hold true or false."""
TEACHER_COLUMNS = ("teacher_entropy", "teacher_logprob")
"""Columns that training the student does not change."""
OUTCOMES = {
    "G_KLf": ("forward_kl", "gain", "relative_gain", "relative_gain_released"),
    "G_KLr": ("reverse_kl", "reverse_gain", None, None),
}
"""Released relative gain -> our divergence, gain, relative gain, and relative gain with
RELEASED_EPS.
"""
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
)
"""Released columns that name a row."""
TRAINING_BANK = ("schema_version", "Cmass_exact", "Cprefix_ema", "budget_method")
"""Columns of the token bank that the training code writes; the scoring script writes none of them.
"""


def read_tokens(path: str | Path) -> pd.DataFrame:
    """Read a token table, ours or a released script's, which its columns tell apart.

    Args:
        path: CSV, JSONL or parquet file with one row per position.

    Returns:
        A table that `validate_tokens` accepts: `context_id`, `prompt_id`, `position`,
        `response_length`, `token_id`, `token`, and those measurements of the schema that the
        file has (divergences and entropies in nats, undefined values NaN). Columns without a
        counterpart are left out and named in the log. `attrs["warnings"]` lists [code, subject,
        message] for every warning, which is also logged; `attrs["k"]` is K where the file
        states it.

    Raises:
        DiagnosticsError: The file cannot be read or is neither kind of table.

    Reference:
        The released columns are those of the scripts of arXiv 2605.26844.
    """
    path = Path(path)
    require_as_written(path)
    frame = read_rows(path)
    exact = _exact_ids(frame, path)
    frame = frame.assign(**exact)
    if "context_id" in frame:
        return validate_tokens(_named_by_text(_text_as_written(frame, path, set(exact)), path))
    if not {"sample_index", "tok_pos"} <= set(frame.columns):
        raise DiagnosticsError(
            f"{path} is no token table: neither context_id nor sample_index and tok_pos are among"
            f" its columns ({', '.join(map(str, frame.columns[:12]))}). Give a tokens.parquet, or a"
            " token bank of the released scripts."
        )
    return from_released(frame)


def _exact_ids(frame: pd.DataFrame, path: Path) -> dict[str, pd.Series]:
    """Return the columns of ids that came out as floats, as the file has them: one gap does that
    to whole numbers, and large ones are then no longer told apart.
    """
    rounded = [name for name in IDS if name in frame and frame[name].dtype.kind == "f"]
    written = read_rows(path, text=True) if rounded else frame
    return {
        name: pd.Series(
            [
                _cell(value) if there else None
                for value, there in zip(written[name], frame[name].notna(), strict=True)
            ],
            index=frame.index,
            dtype=object,
        )
        for name in rounded
    }


def _cell(value):
    """Return a CSV's cell as an id: 007 stays, 3.0 is a number."""
    decimal = isinstance(value, str) and not value.strip().removeprefix("-").isdecimal()
    return float(value) if decimal else value


def _text_as_written(frame: pd.DataFrame, path: Path, exact: set[str]) -> pd.DataFrame:
    """Read the text columns of a CSV as text: a token may be the word `null` and an id `007`, and
    neither is a number or missing. An empty id is missing. `exact` names columns that are as
    written already.
    """
    names = {"context_id", "prompt_id", "token", "split"} - exact
    if path.suffix == ".csv" and (text := [name for name in frame if name in names]):
        written = pd.read_csv(path, usecols=text, dtype="str", keep_default_na=False)
        for name in {"context_id", "prompt_id"} & set(text):
            written[name] = written[name].where(written[name] != "", None)
        frame = frame.assign(**written)
    return frame


def _named_by_text(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the table with ids as text. Raises DiagnosticsError for ids that are floats of 2**53
    and more: as names they would join what was apart.
    """
    for name in {"context_id", "prompt_id"} & set(frame):
        vague = count_ambiguous(frame[name])
        if vague:
            raise DiagnosticsError(
                f"{path}: {name} holds {vague} floats of 2**53 and more, which no longer tell whole"
                " numbers apart. Write the ids as whole numbers or as text."
            )
        if is_mixed(frame[name]):
            frame = frame.assign(**{name: ids_as_text(frame[name])})
    return frame


def from_released(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert a released token bank to our columns, with gains in nats.

    Args:
        frame: The bank as its file has it. Positions outside `loss_mask_original` are dropped.

    Returns:
        A table as `read_tokens` returns it.

    Raises:
        DiagnosticsError: A key column is missing, or a column holds values of another type.
    """
    require_columns(frame, ("sample_index", "tok_pos", "token_id"), what="A released token bank")
    notes: list[list[str]] = []
    frame = frame.reset_index(drop=True)
    # Keys first: a response's length counts the positions outside the loss mask as well.
    keys = pd.DataFrame(key_columns(frame, notes))
    kept = _supervised(frame, notes)
    keys = keys[kept].reset_index(drop=True)
    frame = frame[kept].reset_index(drop=True)
    after = _plain_is_after(frame)
    tokens = keys.assign(**_before(frame, after, notes))
    _derive(tokens, frame, notes)
    if (
        not after
        and {"student_top1_id", "teacher_top1_id"} <= set(frame)
        and not frame[["student_top1_id", "teacher_top1_id"]].isna().any(axis=None)
    ):
        tokens["top1_match"] = frame["student_top1_id"] == frame["teacher_top1_id"]
    if after or set(OUTCOMES) & set(frame):
        _add_outcomes(tokens, frame, after)
    _log_left_out(frame)
    tokens = validate_tokens(tokens)
    for _, _, message in notes:
        log.warning("%s", message)
    tokens.attrs["warnings"] = notes
    if (k := _stated_k(frame)) is not None:
        tokens.attrs["k"] = k
    return tokens


def _stated_k(frame: pd.DataFrame) -> int | None:
    """Return K of the columns that depend on it, where a column states it or lists of one length
    show it.
    """
    for name in STATED_K:
        values = to_numbers(frame[name]).dropna().unique() if name in frame else []
        if len(values) == 1 and values[0] >= 1 and values[0] == round(values[0]):
            return int(values[0])
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


def _plain_is_after(frame: pd.DataFrame) -> bool:
    """Whether the plain columns belong to the trained student."""
    if {"KLf_full", "KLf_full_base"} <= set(frame.columns):
        before, after = (
            to_numbers(frame[name]).to_numpy() for name in ("KLf_full_base", "KLf_full")
        )
        return not np.array_equal(before, after, equal_nan=True)
    return any(name in frame for name in OUTCOMES) or any(
        str(name).endswith("_base") for name in frame
    )


def _before(frame: pd.DataFrame, after: bool, notes: list) -> dict[str, pd.Series]:
    """Return our measurements from before training. A warning names those that exist only from
    after it.
    """
    found: dict[str, pd.Series] = {}
    leaking: dict[str, str] = {}
    for theirs, ours in MEASURED.items():
        if f"{theirs}_base" in frame:
            found[ours] = _measured(frame[f"{theirs}_base"], notes)
        elif theirs in frame and not (after and ours in ("forward_kl", "reverse_kl")):
            found[ours] = _measured(frame[theirs], notes)
            if after and ours not in TEACHER_COLUMNS:
                leaking[theirs] = ours
    if leaking:
        columns = ", ".join(f"{theirs} ({ours})" for theirs, ours in leaking.items())
        notes.append(
            [
                "read_after",
                ", ".join(leaking.values()),
                (
                    f"{columns} were read after training and are used as predictors all"
                    " the same: they contain the outcome, so their correlations with the gain"
                    " cannot be trusted. Score the bank with the untrained student to avoid that."
                ),
            ]
        )
    return {name: values for name, values in found.items() if values.notna().any()}


def _measured(values: pd.Series, notes: list) -> pd.Series:
    """Return a column of measurements. Cells that are not numbers become NaN and are counted."""
    found = to_numbers(values)
    odd = values[found.isna() & values.notna() & (values.astype(str).str.lower() != "nan")]
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


def _derive(tokens: pd.DataFrame, frame: pd.DataFrame, notes: list) -> None:
    """Add what follows from other columns, and settle names and types that depend on which script
    wrote the table.
    """
    if "Cmass" in frame and not {"compatibility", "compatibility_intersection"} & set(tokens):
        exact = "Cmass_exact" in frame and (to_numbers(frame["Cmass_exact"]) == 1).all()
        tokens["compatibility" if exact else "compatibility_intersection"] = to_numbers(
            frame["Cmass"]
        )
    if set(TRAINING_BANK) & set(frame):
        _set_floored_apart(tokens, notes)
    if "topk_overlap" in tokens and "topk_jaccard" not in tokens:
        tokens["topk_jaccard"] = tokens["topk_overlap"] / (2 - tokens["topk_overlap"])
    if "advantage" not in tokens and {"student_logprob", "teacher_logprob"} <= set(tokens):
        tokens["advantage"] = tokens["teacher_logprob"] - tokens["student_logprob"]
    if "advantage" in tokens:
        tokens["acceptance"] = acceptance(tokens["advantage"])
    for name in INDICATORS:
        if name in tokens:
            if gaps := int(tokens[name].isna().sum()):
                notes.append(
                    ["gaps", name, f"{name} is empty at {gaps} positions, which count as false."]
                )
            tokens[name] = tokens[name].fillna(0.0) != 0


def _set_floored_apart(tokens: pd.DataFrame, notes: list) -> None:
    """Rename what the training code computes with probabilities outside the lists floored."""
    for name in ("union_forward_kl", "bhattacharyya"):
        if name in tokens:
            tokens[f"{name}_released"] = tokens.pop(name)
    if "bhattacharyya_released" in tokens:
        notes.append(
            [
                "floored",
                "bhattacharyya_released",
                (
                    "CBC of a training bank has probabilities outside each model's list floored,"
                    f" at {len(tokens)} positions: it is kept as bhattacharyya_released and is no"
                    " stand-in for compatibility."
                ),
            ]
        )


def _add_outcomes(tokens: pd.DataFrame, frame: pd.DataFrame, plain_is_after: bool) -> None:
    """Add the divergences after training and the gains."""
    for relative, (kl, gain, floored, released) in OUTCOMES.items():
        plain = "KLf_full" if kl == "forward_kl" else "KLr_full"
        after = to_numbers(frame[plain]) if plain in frame and plain_is_after else None
        if kl not in tokens and relative in frame and after is not None:
            # G = (b - a)/(b + eps) gives b = (a + G*eps)/(1 - G)
            share = to_numbers(frame[relative])
            tokens[kl] = (after + share * RELEASED_EPSILON) / (1 - share).where(share < 1)
        if kl not in tokens:
            continue
        if after is None and relative in frame:
            after = tokens[kl] - to_numbers(frame[relative]) * (tokens[kl] + RELEASED_EPSILON)
        if after is None:
            continue
        tokens[f"{kl}_after"] = after
        tokens[gain] = tokens[kl] - after
        if floored:
            tokens[floored] = relative_gain(tokens[kl], after)
            tokens[released] = released_relative_gain(tokens[kl], after)


def _log_left_out(frame: pd.DataFrame) -> None:
    """Log the columns without a counterpart."""
    used = {
        *MEASURED,
        *(f"{name}_base" for name in MEASURED),
        *OUTCOMES,
        *KEYS,
        *STATED_K,
        "Cmass",
        "Cmass_exact",
        "schema_version",
        "student_top1_id",
        "teacher_top1_id",
    }
    left_out = [str(name) for name in frame if name not in used]
    if left_out:
        log.info("columns without a counterpart, left out: %s", ", ".join(left_out))
