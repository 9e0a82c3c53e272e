"""Token tables from elsewhere, under this project's names.

Read are our own tables and those of the scripts released with arXiv 2605.26844 (CSV, JSONL or parquet):

    sample_index, group_index, tok_pos, token_id          context, prompt, position, sampled token
    Hs_full, Ht_full, KLf_full, KLr_full                  H(p), H(q), KL(q||p), KL(p||q), nats
    Cmass_true, Cmass_topk, Coverlap, CBC, reach_t1       compatibility, its lower bound from both lists, overlap,
                                                          Bhattacharyya coefficient, teacher's first choice in reach
    KLf_union                                             KL(q||p) on the union of the lists, floored at 1e-12
    <name>_base                                           the same before training; without it: after
    G_KLf, G_KLr                                          (before - after) / (before + 1e-12)

In those scripts the plain columns of a table with gains were measured with the *trained* student. Where only the
plain ones exist for a predictor it already contains the outcome: it is read, and said in a warning.
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
    "Cmass_true": "compatibility", "Cmass_topk": "compatibility_intersection", "Coverlap": "topk_overlap", "CBC": "bhattacharyya",
    "reach_t1": "teacher_top1_in_topk", "KLf_union": "union_forward_kl_released", "student_logp_sampled": "student_logprob",
    "teacher_logp_sampled": "teacher_logprob", "sampled_teacher_adv": "advantage",
}
OUTCOMES = {"G_KLf": ("forward_kl", "gain", "relative_gain", "relative_gain_released"), "G_KLr": ("reverse_kl", "reverse_gain", None, None)}


def read_tokens(path: str | Path) -> pd.DataFrame:
    """Open a token table, ours or a released script's, by its columns.

    Returns a table that `types.validate_tokens` accepts; columns with no counterpart are left out and named in
    the log. Raises DiagnosticsError where the file cannot be read or is neither kind of table.
    """
    frame = read_rows(Path(path))
    if "context_id" in frame:
        return validate_tokens(frame)
    if not {"sample_index", "tok_pos"} <= set(frame.columns):
        raise DiagnosticsError(
            f"{path} is no token table: neither context_id nor sample_index and tok_pos are among its columns "
            f"({', '.join(map(str, frame.columns[:12]))}). Give a tokens.parquet, or a token bank of the released scripts."
        )
    return from_released(frame)


def from_released(frame: pd.DataFrame) -> pd.DataFrame:
    """A released token bank under our names; gains in nats are worked out from what was there before."""
    require_columns(frame, ("sample_index", "tok_pos", "token_id"), what="A released token bank")
    trained = any(name in frame for name in OUTCOMES) or any(str(name).endswith("_base") for name in frame)
    columns = _keys(frame) | _before(frame, trained=trained)
    tokens = pd.DataFrame(columns)
    if trained:
        _add_outcomes(tokens, frame)
    used = {*MEASURED, *(f"{name}_base" for name in MEASURED), *OUTCOMES, "sample_index", "group_index", "tok_pos", "pos_norm", "token_id", "resp_len"}
    left_out = [str(name) for name in frame if name not in used]
    if left_out:
        log.info("columns without a counterpart, left out: %s", ", ".join(left_out))
    return validate_tokens(tokens)


def _keys(frame: pd.DataFrame) -> dict[str, pd.Series]:
    context = "sample-" + frame["sample_index"].astype(str)
    prompt = "group-" + frame["group_index"].astype(str) if "group_index" in frame else context
    length = frame["resp_len"] if "resp_len" in frame else frame.groupby("sample_index")["tok_pos"].transform("max") + 1
    token = frame["token"].astype(str) if "token" in frame else frame["token_id"].astype(str)
    return {"context_id": context, "prompt_id": prompt, "position": frame["tok_pos"], "response_length": length,
            "token_id": frame["token_id"], "token": token}


def _before(frame: pd.DataFrame, *, trained: bool) -> dict[str, pd.Series]:
    found, leaking = {}, []
    for theirs, ours in MEASURED.items():
        if f"{theirs}_base" in frame:
            found[ours] = frame[f"{theirs}_base"]
        elif theirs in frame and not (trained and ours in ("forward_kl", "reverse_kl")):
            found[ours] = frame[theirs]
            if trained and ours not in ("teacher_entropy", "teacher_logprob"):
                leaking.append(f"{theirs} ({ours})")
    if leaking:
        log.warning(
            "%s were read after training and are used as predictors all the same: they contain the outcome, so their "
            "correlations with the gain cannot be trusted. Score the bank with the untrained student to mend it.", ", ".join(leaking)
        )
    return {name: pd.to_numeric(values, errors="coerce").replace("", np.nan) for name, values in found.items()}


def _add_outcomes(tokens: pd.DataFrame, frame: pd.DataFrame) -> None:
    for relative, (kl, gain, floored, released) in OUTCOMES.items():
        plain = "KLf_full" if kl == "forward_kl" else "KLr_full"
        after = pd.to_numeric(frame[plain], errors="coerce") if plain in frame else None
        if kl not in tokens and relative in frame and after is not None:
            # G = (b - a)/(b + eps) gives b = (a + G*eps)/(1 - G)
            share = pd.to_numeric(frame[relative], errors="coerce")
            tokens[kl] = (after + share * RELEASED_EPS) / (1 - share).where(share < 1)
        if kl not in tokens:
            continue
        if after is None and relative in frame:
            after = tokens[kl] - pd.to_numeric(frame[relative], errors="coerce") * (tokens[kl] + RELEASED_EPS)
        if after is None:
            continue
        tokens[f"{kl}_after"] = after
        tokens[gain] = tokens[kl] - after
        if floored:
            tokens[floored] = (tokens[gain] / tokens[kl]).where(tokens[kl] >= RELATIVE_GAIN_FLOOR)
            tokens[released] = tokens[gain] / (tokens[kl] + RELEASED_EPS)
