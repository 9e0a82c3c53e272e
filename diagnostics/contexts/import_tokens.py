"""Token tables from elsewhere, under this project's names.

Read are our own tables and those of the scripts released with arXiv 2605.26844 (CSV, JSONL or
parquet):

    sample_index, group_index, tok_pos, token_id          context, prompt, position, sampled token
    Hs_full, Ht_full, KLf_full, KLr_full                  H(p), H(q), KL(q||p), KL(p||q), nats
    Cmass_true, Cmass_topk, Coverlap, CBC, reach_t1       compatibility, its lower bound from both lists, overlap,
                                                          Bhattacharyya coefficient, teacher's first
                                                          choice in reach
    KLf_union                                             KL(q||p) on the union of the lists; in the token bank of
                                                          the training code floored at 1e-12
                                                          (`..._released`)
    resp_len, pos_norm                                    response length, relative position t/(T - 1)
    loss_mask_original                                    0 (or a word for no) where the position carried no loss
    <name>_base                                           the same before training
    G_KLf, G_KLr                                          (before - after) / (before + 1e-12)

Those scripts score a bank, train, score it again and join: in a table with gains the plain columns
belong to the *trained* student, unless KLf_full equals KLf_full_base everywhere (then the scores of
theta0 were joined). Where a predictor exists from after training only, it contains the outcome
already: it is read, because nothing else is there, and every such column is named in a warning. The
training code's `CBC` is floored like its `KLf_union` and comes in as `bhattacharyya_released`,
which no statistic takes for the exact coefficient. A column `k`, `top_k` or `topk` with one value,
or the length of the lists of top ids, says the K of the table. Warnings also travel in
`attrs["warnings"]`, from where the study takes them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import EXACT, missing, read_rows
from diagnostics.core.schema import require_columns, validate_tokens
from diagnostics.core.types import RELATIVE_GAIN_FLOOR

log = logging.getLogger("diagnostics")
RELEASED_EPS = 1e-12
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
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
"""Flags as words; numbers and true booleans are read as they are."""
IDS = (
    "sample_index",
    "sample_ordinal",
    "group_index",
    "rollout_id",
    "context_id",
    "prompt_id",
)
"""Columns of ids, theirs and ours."""
STATED_K = ("k", "top_k", "topk")
LISTS = ("student_top_ids", "teacher_top_ids", "student_topk_ids", "teacher_topk_ids")
LARGEST = 2**31 - 2
"""Largest position, length and token id that the token table's columns hold."""
INDICATORS = ("teacher_top1_in_topk", "sampled_in_teacher_topk")
OF_TEACHER = ("teacher_entropy", "teacher_logprob")
"""What training the student does not change."""
OUTCOMES = {
    "G_KLf": ("forward_kl", "gain", "relative_gain", "relative_gain_released"),
    "G_KLr": ("reverse_kl", "reverse_gain", None, None),
}
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
TRAINING_BANK = ("schema_version", "Cmass_exact", "Cprefix_ema", "budget_method")
"""Columns of the token bank that the training code writes; the scoring script writes none of
them.
"""


def read_tokens(path: str | Path) -> pd.DataFrame:
    """Open a token table, ours or a released script's, by its columns.

    Returns a table that `types.validate_tokens` accepts; columns with no counterpart are left out
    and named in the log. What a reader should know about it is logged as a warning and kept in
    `attrs["warnings"]`, a list of [code, subject, message]. Raises DiagnosticsError where the file
    cannot be read or is neither kind of table."""
    path = Path(path)
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
    """Columns of ids that came out as floats, as the file has them: one gap does that to whole
    numbers, and large ones are then no longer told apart.
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
    """A CSV's cell: 007 stays, 3.0 is a number."""
    decimal = isinstance(value, str) and not value.strip().removeprefix("-").isdecimal()
    return float(value) if decimal else value


def _text_as_written(frame: pd.DataFrame, path: Path, exact: set[str]) -> pd.DataFrame:
    """In a CSV a token may be the word `null` and an id `007`; neither is a number or missing.

    An empty id is missing. exact: columns that are as written already."""
    names = {"context_id", "prompt_id", "token", "split"} - exact
    if path.suffix == ".csv" and (text := [name for name in frame if name in names]):
        written = pd.read_csv(path, usecols=text, dtype="str", keep_default_na=False)
        for name in {"context_id", "prompt_id"} & set(text):
            written[name] = written[name].where(written[name] != "", None)
        frame = frame.assign(**written)
    return frame


def _named_by_text(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Ids as text. Raises DiagnosticsError for ids that are floats of 2**53 and more: as names they
    would join what was apart.
    """
    for name in {"context_id", "prompt_id"} & set(frame):
        vague = _vague(frame[name])
        if vague:
            raise DiagnosticsError(
                f"{path}: {name} holds {vague} floats of 2**53 and more, which no longer tell whole"
                " numbers apart. Write the ids as whole numbers or as text."
            )
        if _is_mixed(frame[name]):
            frame = frame.assign(**{name: _ids(frame[name])})
    return frame


def from_released(frame: pd.DataFrame) -> pd.DataFrame:
    """A released token bank under our names; gains in nats are worked out from what was there
    before.

    Positions outside `loss_mask_original` are dropped. Raises DiagnosticsError for missing keys.
    """
    require_columns(frame, ("sample_index", "tok_pos", "token_id"), what="A released token bank")
    notes: list[list[str]] = []
    frame = frame.reset_index(drop=True)
    frame = frame.assign(**_id_columns(frame, notes))
    keys, kept = pd.DataFrame(_keys(frame, notes)), _supervised(frame, notes)
    frame, keys = frame[kept].reset_index(drop=True), keys[kept].reset_index(drop=True)
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
    _say_left_out(frame)
    tokens = validate_tokens(tokens)
    for _, _, message in notes:
        log.warning("%s", message)
    tokens.attrs["warnings"] = notes
    if (k := _stated_k(frame)) is not None:
        tokens.attrs["k"] = k
    return tokens


def _stated_k(frame: pd.DataFrame) -> int | None:
    """K of the columns that depend on it, where a column says it or lists of one length show it."""
    for name in STATED_K:
        values = _numbers(frame[name]).dropna().unique() if name in frame else []
        if len(values) == 1 and values[0] >= 1 and values[0] == round(values[0]):
            return int(values[0])
    for name in LISTS:
        lengths = (
            {
                len(row)
                for row in frame[name]
                if hasattr(row, "__len__") and not isinstance(row, str)
            }
            if name in frame
            else set()
        )
        if len(lengths) == 1 and (found := lengths.pop()):
            return found
    return None


def _supervised(frame: pd.DataFrame, notes: list) -> np.ndarray:
    """Mask of the rows that carry loss; a gap in the loss mask counts as none."""
    if "loss_mask_original" not in frame:
        return np.ones(len(frame), dtype=bool)
    written = frame["loss_mask_original"]
    mask = _numbers(written)
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


def _numbers(values: pd.Series) -> pd.Series:
    """Values as float64, words for true and false included; NaN for anything else."""
    if not pd.api.types.is_numeric_dtype(values):
        values = values.map(
            lambda value: (
                WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
            )
        )
    try:
        return pd.to_numeric(values, errors="coerce").astype("float64")
    except (
        OverflowError,
        TypeError,
        ValueError,
    ):  # a whole number beyond float64, or cells that hold no single value
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
    return any(name in frame for name in OUTCOMES) or any(
        str(name).endswith("_base") for name in frame
    )


def _keys(frame: pd.DataFrame, notes: list) -> dict[str, pd.Series]:
    sample = _samples(frame, notes)
    context = sample
    if "rollout_id" in frame:
        rollout = _filled(frame["rollout_id"], sample)
        if gaps := int(rollout.isna().sum()):
            notes.append(
                [
                    "gaps",
                    "rollout_id",
                    f"rollout_id is empty in {gaps} of {len(frame)} rows, and the other rows of"
                    " their samples do not tell it: these rows are taken for a response of their"
                    " own.",
                ]
            )
        context = ("rollout-" + rollout.astype(object) + "-").where(rollout.notna(), "") + sample
    position = _whole(frame, "tok_pos")
    token_id = _whole(frame, "token_id")
    token = frame["token"].astype(str) if "token" in frame else token_id.astype(str)
    return {
        "context_id": context,
        "prompt_id": _prompts(frame, context, notes),
        "position": position,
        "response_length": _lengths(frame, context, position),
        "token_id": token_id,
        "token": token,
    }


def _samples(frame: pd.DataFrame, notes: list) -> pd.Series:
    """The sample that each row belongs to, by its index or, where slime left that out, by its
    ordinal.
    """
    gaps = int(frame["sample_index"].isna().sum())
    if not gaps:
        return "sample-" + frame["sample_index"]
    if "sample_ordinal" in frame and frame["sample_ordinal"].notna().all():
        notes.append(
            [
                "sample_ordinal",
                "sample_index",
                (
                    f"sample_index is empty in {gaps} of {len(frame)} rows; samples are told apart"
                    " by sample_ordinal."
                ),
            ]
        )
        return "ordinal-" + frame["sample_ordinal"]
    raise DiagnosticsError(
        f"sample_index is empty in {gaps} of {len(frame)} rows, and there is no sample_ordinal to"
        " tell the samples apart. Fill one of the two in."
    )


def _filled(values: pd.Series, by: pd.Series) -> pd.Series:
    """Gaps filled from the other rows of the same sample, where those agree."""
    if values.notna().all():
        return values
    known = values.groupby(by).agg(
        lambda found: found.dropna().iloc[0] if found.nunique() == 1 else None
    )
    return values.astype(object).where(values.notna(), by.map(known.astype(object)))


def _prompts(frame: pd.DataFrame, context: pd.Series, notes: list) -> pd.Series:
    """The group of each row; a sample without one counts as a prompt of its own."""
    alone = (
        "counts as a prompt of its own; where a prompt has several samples, intervals are too"
        " short."
    )
    if "group_index" not in frame or frame["group_index"].isna().all():
        notes.append(
            ["no_prompts", "group_index", f"There is no group_index, so every sample {alone}"]
        )
        return context
    group = _filled(frame["group_index"], context)
    gaps, lone = int(frame["group_index"].isna().sum()), context[group.isna()].nunique()
    if gaps:
        rest = f"; {lone} samples have none at all, and each {alone}" if lone else "."
        notes.append(
            [
                "no_prompts" if lone else "gaps",
                "group_index",
                (
                    f"group_index is empty in {gaps} of {len(frame)} rows; where other rows of the"
                    f" sample have it, theirs is taken{rest}"
                ),
            ]
        )
    return ("group-" + group.astype(object)).where(group.notna(), context)


def _whole(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column of whole numbers from 0. Raises DiagnosticsError with what else it holds."""
    values = _numbers(frame[name])
    odd = frame[name][~((values >= 0) & (values <= LARGEST)) | (values != values.round())]
    if len(odd):
        raise DiagnosticsError(
            f"{name} should hold whole numbers from 0, and {len(odd)} of {len(frame)} rows hold"
            f" something else ({str(odd.iloc[0])[:60]!r}). Mend them."
        )
    return values.astype("int64")


def _lengths(frame: pd.DataFrame, context: pd.Series, position: pd.Series) -> pd.Series:
    """T of each response, positions outside the loss mask included: as `pos_norm` = t/(T - 1) or
    `resp_len` has it, else by the last position.
    """
    last = position.groupby(context).transform("max")
    length = last + 1
    if "resp_len" in frame:
        stated = _numbers(frame["resp_len"]).groupby(context).transform("max")
        length = stated.where((stated > last) & (stated <= LARGEST), length)
    if "pos_norm" in frame:
        place = _numbers(frame["pos_norm"])
        furthest = position.where((place > 0) & (place <= 1)).groupby(context).transform("max")
        stated = (position / place).where((position == furthest) & (place > 0)).groupby(
            context
        ).transform("max").round() + 1
        length = stated.where((stated > last) & (stated <= LARGEST), length)
    return length.astype("int64")


def _id_columns(frame: pd.DataFrame, notes: list) -> dict[str, pd.Series]:
    """The columns of ids as text; floats of 2**53 and more are no ids, and are counted."""
    found = {}
    for name in (name for name in IDS if name in frame):
        found[name] = _ids(frame[name])
        if vague := _vague(frame[name]):
            notes.append(
                [
                    "vague_ids",
                    name,
                    f"{name} holds floats of 2**53 and more in {vague} of {len(frame)} rows, which"
                    " no longer tell whole numbers apart: they count as empty.",
                ]
            )
    return found


def _ids(values: pd.Series) -> pd.Series:
    """Ids as text, None where there is none; 3.0, as a column that once had gaps holds it, is 3."""
    texts = [_id(value) for value in values] if _is_mixed(values) else values.astype("str")
    return pd.Series(texts, index=values.index, dtype=object)


def _is_mixed(values: pd.Series) -> bool:
    """The column may hold floats, or values of several kinds: each is looked at."""
    return values.dtype == object or values.dtype.kind == "f"


def _id(value) -> str | None:
    if missing(value):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not value.is_integer():
        return str(value)
    return str(int(value)) if abs(value) < EXACT else None


def _vague(values: pd.Series) -> int:
    """How many values are ids that a float no longer tells from its neighbours."""
    if not _is_mixed(values):
        return 0
    return sum(_id(value) is None and not missing(value) for value in values)


def _before(frame: pd.DataFrame, after: bool, notes: list) -> dict[str, pd.Series]:
    found, leaking = {}, []
    for theirs, ours in MEASURED.items():
        if f"{theirs}_base" in frame:
            found[ours] = _measured(frame[f"{theirs}_base"], notes)
        elif theirs in frame and not (after and ours in ("forward_kl", "reverse_kl")):
            found[ours] = _measured(frame[theirs], notes)
            if after and ours not in OF_TEACHER:
                leaking.append(f"{theirs} ({ours})")
    if leaking:
        notes.append(
            [
                "read_after",
                ", ".join(name.split(" (")[1][:-1] for name in leaking),
                (
                    f"{', '.join(leaking)} were read after training and are used as predictors all"
                    " the same: they contain the outcome, so their correlations with the gain"
                    " cannot be trusted. Score the bank with the untrained student to mend it."
                ),
            ]
        )
    return {name: values for name, values in found.items() if values.notna().any()}


def _measured(values: pd.Series, notes: list) -> pd.Series:
    """A column of measurements; what is written there and is no number counts as undefined, and is
    counted.
    """
    found = _numbers(values)
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
    """What follows from other columns, and the names and types that depend on which script wrote
    the table.
    """
    if "Cmass" in frame and not {"compatibility", "compatibility_intersection"} & set(tokens):
        exact = "Cmass_exact" in frame and (_numbers(frame["Cmass_exact"]) == 1).all()
        tokens["compatibility" if exact else "compatibility_intersection"] = _numbers(
            frame["Cmass"]
        )
    if set(TRAINING_BANK) & set(frame):
        _set_floored_apart(tokens, notes)
    if "topk_overlap" in tokens and "topk_jaccard" not in tokens:
        tokens["topk_jaccard"] = tokens["topk_overlap"] / (2 - tokens["topk_overlap"])
    if "advantage" not in tokens and {"student_logprob", "teacher_logprob"} <= set(tokens):
        tokens["advantage"] = tokens["teacher_logprob"] - tokens["student_logprob"]
    if "advantage" in tokens:
        tokens["acceptance"] = np.exp(tokens["advantage"].clip(upper=0.0))
    for name in INDICATORS:
        if name in tokens:
            if gaps := int(tokens[name].isna().sum()):
                notes.append(
                    ["gaps", name, f"{name} is empty at {gaps} positions, which count as false."]
                )
            tokens[name] = tokens[name].fillna(0.0) != 0


def _set_floored_apart(tokens: pd.DataFrame, notes: list) -> None:
    """What the training code works out from both lists with probabilities outside them floored,
    under names of its own.
    """
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
