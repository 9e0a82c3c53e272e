"""Token tables from elsewhere, under this project's names.

Read are our own tables and those of the scripts released with arXiv 2605.26844 (CSV, JSONL or parquet):

    sample_index, group_index, tok_pos, token_id          context, prompt, position, sampled token
    Hs_full, Ht_full, KLf_full, KLr_full                  H(p), H(q), KL(q||p), KL(p||q), nats
    Cmass_true, Cmass_topk, Coverlap, CBC, reach_t1       compatibility, its lower bound from both lists, overlap,
                                                          Bhattacharyya coefficient, teacher's first choice in reach
    KLf_union                                             KL(q||p) on the union of the lists; in the token bank of
                                                          the training code floored at 1e-12 (`..._released`)
    <name>_base                                           the same before training
    G_KLf, G_KLr                                          (before - after) / (before + 1e-12)

Those scripts score a bank, train, score it again and join: in a table with gains the plain columns belong to
the *trained* student, unless KLf_full equals KLf_full_base everywhere (then the scores of theta0 were joined).
Where a predictor exists from after training only, it contains the outcome already: it is read, because nothing else
is there, and every such column is named in a warning. Warnings also travel in `attrs["warnings"]`, from where
the study takes them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.prompts import read_rows
from diagnostics.types import RELATIVE_GAIN_FLOOR, DiagnosticsError, require_columns, validate_tokens

log = logging.getLogger("diagnostics")
RELEASED_EPS = 1e-12
MEASURED = {
    "Hs_full": "student_entropy", "Ht_full": "teacher_entropy", "KLf_full": "forward_kl", "KLr_full": "reverse_kl",
    "Cmass_true": "compatibility", "Cmass_topk": "compatibility_intersection", "Coverlap": "topk_overlap",
    "topk_jaccard": "topk_jaccard", "shared_student_topk_mass": "shared_student_mass", "CBC": "bhattacharyya",
    "reach_t1": "teacher_top1_in_topk", "target_in_teacher_topk": "sampled_in_teacher_topk", "KLf_union": "union_forward_kl",
    "student_logp_sampled": "student_logprob", "teacher_logp_sampled": "teacher_logprob", "sampled_teacher_adv": "advantage",
}
INDICATORS = ("teacher_top1_in_topk", "sampled_in_teacher_topk")
OF_TEACHER = ("teacher_entropy", "teacher_logprob")
"""What training the student does not change."""
OUTCOMES = {"G_KLf": ("forward_kl", "gain", "relative_gain", "relative_gain_released"), "G_KLr": ("reverse_kl", "reverse_gain", None, None)}
KEYS = ("sample_index", "group_index", "rollout_id", "tok_pos", "pos_norm", "token_id", "token", "resp_len", "loss_mask_original")
TRAINING_BANK = "schema_version"
"""Column of the token bank that the training code writes; the scoring script writes none."""


def read_tokens(path: str | Path) -> pd.DataFrame:
    """Open a token table, ours or a released script's, by its columns.

    Returns a table that `types.validate_tokens` accepts; columns with no counterpart are left out and named in
    the log. What a reader should know about it is logged as a warning and kept in `attrs["warnings"]`, a list of
    [code, subject, message]. Raises DiagnosticsError where the file cannot be read or is neither kind of table.
    """
    path = Path(path)
    frame = read_rows(path)
    if "context_id" in frame:
        return validate_tokens(_text_as_written(frame, path))
    if not {"sample_index", "tok_pos"} <= set(frame.columns):
        raise DiagnosticsError(
            f"{path} is no token table: neither context_id nor sample_index and tok_pos are among its columns "
            f"({', '.join(map(str, frame.columns[:12]))}). Give a tokens.parquet, or a token bank of the released scripts."
        )
    return from_released(frame)


def _text_as_written(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """In a CSV a token may be the word `null` and an id `007`; neither is a number or missing."""
    if path.suffix == ".csv":
        text = [name for name in ("context_id", "prompt_id", "token", "split") if name in frame]
        frame = frame.assign(**pd.read_csv(path, usecols=text, dtype="str", keep_default_na=False))
    return frame


def from_released(frame: pd.DataFrame) -> pd.DataFrame:
    """A released token bank under our names; gains in nats are worked out from what was there before.

    Positions outside `loss_mask_original` are dropped. Raises DiagnosticsError for missing keys.
    """
    require_columns(frame, ("sample_index", "tok_pos", "token_id"), what="A released token bank")
    notes: list[list[str]] = []
    frame = _supervised(frame, notes)
    after = _plain_is_after(frame)
    tokens = pd.DataFrame(_keys(frame, notes) | _before(frame, after, notes))
    _derive(tokens, frame)
    if after or set(OUTCOMES) & set(frame):
        _add_outcomes(tokens, frame, after)
    _say_left_out(frame)
    tokens = validate_tokens(tokens)
    for _, _, message in notes:
        log.warning("%s", message)
    tokens.attrs["warnings"] = notes
    return tokens


def _supervised(frame: pd.DataFrame, notes: list) -> pd.DataFrame:
    if "loss_mask_original" not in frame:
        return frame.reset_index(drop=True)
    kept = _numbers(frame["loss_mask_original"]) != 0
    if not kept.all():
        notes.append(["unsupervised", "loss_mask_original", f"{(~kept).sum()} positions outside the loss mask were dropped."])
    return frame[kept].reset_index(drop=True)


def _numbers(values: pd.Series) -> pd.Series:
    try:
        return pd.to_numeric(values, errors="coerce").astype("float64")
    except OverflowError:  # a whole number beyond float64
        return pd.Series([_number(value) for value in values], index=values.index, dtype="float64")


def _number(value) -> float:
    try:
        return float(str(value))
    except ValueError:
        return np.nan


def _plain_is_after(frame: pd.DataFrame) -> bool:
    """Whether plain columns belong to the trained student."""
    if {"KLf_full", "KLf_full_base"} <= set(frame.columns):
        before, after = (_numbers(frame[name]).to_numpy() for name in ("KLf_full_base", "KLf_full"))
        return not np.array_equal(before, after, equal_nan=True)
    return any(name in frame for name in OUTCOMES) or any(str(name).endswith("_base") for name in frame)


def _keys(frame: pd.DataFrame, notes: list) -> dict[str, pd.Series]:
    context = "sample-" + _ids(frame["sample_index"])
    if "rollout_id" in frame and frame["rollout_id"].notna().all():
        context = "rollout-" + _ids(frame["rollout_id"]) + "-" + context
    if "group_index" in frame and frame["group_index"].notna().all():
        prompt = "group-" + _ids(frame["group_index"])
    else:
        prompt = context
        notes.append(["no_prompts", "group_index", "There is no group_index, so every sample counts as a prompt of its own; "
                      "where a prompt has several samples, intervals are too short."])
    token = frame["token"].astype(str) if "token" in frame else frame["token_id"].astype(str)
    position = _numbers(frame["tok_pos"])
    return {"context_id": context, "prompt_id": prompt, "position": position,
            "response_length": position.groupby(context).transform("max") + 1, "token_id": frame["token_id"], "token": token}


def _ids(values: pd.Series) -> pd.Series:
    """Ids as text; 3.0, as a column that once had gaps holds it, is 3."""
    whole = pd.api.types.is_float_dtype(values) and (values == values.round()).all() and (values.abs() < 2**53).all()
    return (values.astype("int64") if whole else values).astype(str)


def _before(frame: pd.DataFrame, after: bool, notes: list) -> dict[str, pd.Series]:
    found, leaking = {}, []
    for theirs, ours in MEASURED.items():
        if f"{theirs}_base" in frame:
            found[ours] = _numbers(frame[f"{theirs}_base"])
        elif theirs in frame and not (after and ours in ("forward_kl", "reverse_kl")):
            found[ours] = _numbers(frame[theirs])
            if after and ours not in OF_TEACHER:
                leaking.append(f"{theirs} ({ours})")
    if leaking:
        notes.append(["read_after", ", ".join(name.split(" (")[1][:-1] for name in leaking),
                      f"{', '.join(leaking)} were read after training and are used as predictors all the same: they contain the "
                      "outcome, so their correlations with the gain cannot be trusted. Score the bank with the untrained student to mend it."])
    return {name: values for name, values in found.items() if values.notna().any()}


def _derive(tokens: pd.DataFrame, frame: pd.DataFrame) -> None:
    """What follows from other columns, and the names and types that depend on which script wrote the table."""
    if "Cmass" in frame and not {"compatibility", "compatibility_intersection"} & set(tokens):
        exact = "Cmass_exact" in frame and (_numbers(frame["Cmass_exact"]) == 1).all()
        tokens["compatibility" if exact else "compatibility_intersection"] = _numbers(frame["Cmass"])
    if TRAINING_BANK in frame and "union_forward_kl" in tokens:
        tokens["union_forward_kl_released"] = tokens.pop("union_forward_kl")
    if "topk_overlap" in tokens and "topk_jaccard" not in tokens:
        tokens["topk_jaccard"] = tokens["topk_overlap"] / (2 - tokens["topk_overlap"])
    if "advantage" not in tokens and {"student_logprob", "teacher_logprob"} <= set(tokens):
        tokens["advantage"] = tokens["teacher_logprob"] - tokens["student_logprob"]
    if "advantage" in tokens:
        tokens["acceptance"] = np.exp(tokens["advantage"].clip(upper=0.0))
    for name in INDICATORS:
        if name in tokens:
            tokens[name] = tokens[name].fillna(0.0) != 0


def _add_outcomes(tokens: pd.DataFrame, frame: pd.DataFrame, plain_is_after: bool) -> None:
    for relative, (kl, gain, floored, released) in OUTCOMES.items():
        plain = "KLf_full" if kl == "forward_kl" else "KLr_full"
        after = _numbers(frame[plain]) if plain in frame and plain_is_after else None
        if kl not in tokens and relative in frame and after is not None:
            # G = (b - a)/(b + eps) gives b = (a + G*eps)/(1 - G)
            share = _numbers(frame[relative])
            tokens[kl] = (after + share * RELEASED_EPS) / (1 - share).where(share < 1)
        if kl not in tokens:
            continue
        if after is None and relative in frame:
            after = tokens[kl] - _numbers(frame[relative]) * (tokens[kl] + RELEASED_EPS)
        if after is None:
            continue
        tokens[f"{kl}_after"] = after
        tokens[gain] = tokens[kl] - after
        if floored:
            tokens[floored] = (tokens[gain] / tokens[kl]).where(tokens[kl] >= RELATIVE_GAIN_FLOOR)
            tokens[released] = tokens[gain] / (tokens[kl] + RELEASED_EPS)


def _say_left_out(frame: pd.DataFrame) -> None:
    used = {*MEASURED, *(f"{name}_base" for name in MEASURED), *OUTCOMES, *KEYS, "Cmass", "Cmass_exact", TRAINING_BANK}
    left_out = [str(name) for name in frame if name not in used]
    if left_out:
        log.info("columns without a counterpart, left out: %s", ", ".join(left_out))
