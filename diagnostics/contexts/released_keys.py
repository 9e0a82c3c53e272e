"""The keys of a released token bank: context, prompt, position and token of each row."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import EXACT, missing
from diagnostics.core.schema import require_columns

TRUTH_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
"""Words for true and false; numbers and booleans are read as they are."""
IDS = (
    "sample_index",
    "sample_ordinal",
    "group_index",
    "rollout_id",
    "context_id",
    "prompt_id",
    "dataset",
)
"""Columns of ids, theirs and ours."""
LARGEST_INT = 2**31 - 2
"""Largest position, length and token id that the token table's columns hold."""
NO_TOKEN = -1
"""Id of a token that a table does not tell."""


def to_numbers(values: pd.Series) -> pd.Series:
    """Return values as float64, words for true and false included; NaN for anything else."""
    if not pd.api.types.is_numeric_dtype(values):
        values = values.map(
            lambda value: (
                TRUTH_WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
            )
        )
    try:
        return pd.to_numeric(values, errors="coerce").astype("float64")
    except (OverflowError, TypeError, ValueError):
        # A whole number is beyond float64, or cells hold something other than one value.
        return pd.Series([_number(value) for value in values], index=values.index, dtype="float64")


def _number(value) -> float:
    """Return one value as a float, NaN where it is no number."""
    try:
        return float(str(value))
    except ValueError:
        return np.nan


def key_columns(
    frame: pd.DataFrame, notes: list, *, by_ordinal: bool = False
) -> dict[str, pd.Series]:
    """Return the key columns of the token table for a released bank.

    A table without `token_id` (section3_analysis_tokens) has the id -1 everywhere, which is said.

    Args:
        frame: The bank's rows.
        notes: Warnings are appended here as [code, subject, message].
        by_ordinal: Whether samples are told apart by `sample_ordinal` whatever `sample_index` has.

    Returns:
        `context_id`, `prompt_id`, `position`, `response_length`, `token_id` and `token`; `dataset`
        where the bank has it.

    Raises:
        DiagnosticsError: Samples cannot be told apart, or a position or id is no whole number.
    """
    frame = frame.assign(**_id_columns(frame, notes))
    sample = _samples(frame, notes, by_ordinal=by_ordinal)
    context = _of_dataset(frame, sample, notes)
    if "rollout_id" in frame:
        rollout = _filled(frame["rollout_id"], sample)
        if gaps := int(rollout.isna().sum()):
            notes.append(
                [
                    "gaps",
                    "rollout_id",
                    f"rollout_id is empty in {gaps} of {len(frame)} rows, and the other rows of"
                    " their samples do not tell it: these rows count as a response of their own.",
                ]
            )
        context = ("rollout-" + rollout.astype(object) + "-").where(rollout.notna(), "") + sample
    position = _whole(frame, "tok_pos")
    token_id = _token_ids(frame, notes)
    token = frame["token"].astype(str) if "token" in frame else token_id.astype(str)
    return {
        "context_id": context,
        "prompt_id": _prompts(frame, context, notes),
        "position": position,
        "response_length": _lengths(frame, context, position),
        "token_id": token_id,
        "token": token,
        **({"dataset": frame["dataset"]} if "dataset" in frame else {}),
    }


def _token_ids(frame: pd.DataFrame, notes: list) -> pd.Series:
    """Return the sampled token ids: NO_TOKEN everywhere, with a warning, where there are none."""
    if "token_id" in frame:
        return _whole(frame, "token_id")
    notes.append(
        [
            "no_tokens",
            "token_id",
            f"The table does not say which tokens were sampled, at {len(frame)} positions: their"
            f" kinds are unknown, and token_id is {NO_TOKEN}.",
        ]
    )
    return pd.Series(NO_TOKEN, index=frame.index)


def _of_dataset(frame: pd.DataFrame, sample: pd.Series, notes: list) -> pd.Series:
    """Return the samples with their data set before them, where a table holds several tables."""
    if "dataset" not in frame or frame["dataset"].isna().any():
        return sample
    names = frame["dataset"].unique()
    if len(names) > 1:
        notes.append(
            [
                "datasets",
                "dataset",
                (
                    f"The table holds {len(names)} data sets ({', '.join(map(str, names[:10]))}),"
                    " which may be of several pairs, or the same contexts at several K. Take one"
                    " at a time: tokens[tokens.dataset == ...]."
                ),
            ]
        )
    return frame["dataset"].astype(object) + "-" + sample


def _samples(frame: pd.DataFrame, notes: list, *, by_ordinal: bool = False) -> pd.Series:
    """Return the sample of each row, by its index or, where slime left that out, by its ordinal."""
    if by_ordinal or "sample_index" not in frame:
        require_columns(frame, ("sample_ordinal",), what="A table without sample_index")
        if frame["sample_ordinal"].notna().all():
            return "ordinal-" + frame["sample_ordinal"]
        raise DiagnosticsError(
            f"sample_ordinal is empty in {frame['sample_ordinal'].isna().sum()} of {len(frame)}"
            " rows, and there is no sample_index to tell the samples apart. Fill one of the two in."
        )
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
    """Fill gaps from the other rows of the same sample, where those agree."""
    if values.notna().all():
        return values
    known = values.groupby(by).agg(
        lambda found: found.dropna().iloc[0] if found.nunique() == 1 else None
    )
    return values.astype(object).where(values.notna(), by.map(known.astype(object)))


def _prompts(frame: pd.DataFrame, context: pd.Series, notes: list) -> pd.Series:
    """Return the group of each row; a sample without a group counts as a prompt of its own."""
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
    """Return a column of whole numbers from 0. Raises DiagnosticsError that shows what else it
    holds.
    """
    values = to_numbers(frame[name])
    odd = frame[name][~((values >= 0) & (values <= LARGEST_INT)) | (values != values.round())]
    if len(odd):
        raise DiagnosticsError(
            f"{name} should hold whole numbers from 0, and {len(odd)} of {len(frame)} rows hold"
            f" something else ({str(odd.iloc[0])[:60]!r}). Fix them."
        )
    return values.astype("int64")


def _lengths(frame: pd.DataFrame, context: pd.Series, position: pd.Series) -> pd.Series:
    """Return the length T of each response, positions outside the loss mask included: from
    `pos_norm` = t/(T - 1) or `resp_len`, or else from the last position.
    """
    last = position.groupby(context).transform("max")
    length = last + 1
    if "resp_len" in frame:
        stated = to_numbers(frame["resp_len"]).groupby(context).transform("max")
        length = stated.where((stated > last) & (stated <= LARGEST_INT), length)
    if "pos_norm" in frame:
        place = to_numbers(frame["pos_norm"])
        furthest = position.where((place > 0) & (place <= 1)).groupby(context).transform("max")
        stated = (position / place).where((position == furthest) & (place > 0)).groupby(
            context
        ).transform("max").round() + 1
        length = stated.where((stated > last) & (stated <= LARGEST_INT), length)
    return length.astype("int64")


def _id_columns(frame: pd.DataFrame, notes: list) -> dict[str, pd.Series]:
    """Return the columns of ids as text; floats of 2**53 and more are no ids, and are counted."""
    found = {}
    for name in (name for name in IDS if name in frame):
        found[name] = ids_as_text(frame[name])
        if vague := count_ambiguous(frame[name]):
            notes.append(
                [
                    "vague_ids",
                    name,
                    f"{name} holds floats of 2**53 and more in {vague} of {len(frame)} rows, which"
                    " no longer tell whole numbers apart: they count as empty.",
                ]
            )
    return found


def ids_as_text(values: pd.Series) -> pd.Series:
    """Return ids as text, None where there is none; 3.0, as a column that once had gaps holds it,
    is 3.
    """
    texts = [_id(value) for value in values] if is_mixed(values) else values.astype("str")
    return pd.Series(texts, index=values.index, dtype=object)


def is_mixed(values: pd.Series) -> bool:
    """Whether the column may hold floats, or values of several kinds: each is looked at."""
    return values.dtype == object or values.dtype.kind == "f"


def _id(value) -> str | None:
    """Return one id as text, None where it is missing or ambiguous."""
    if missing(value):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not value.is_integer():
        return str(value)
    return str(int(value)) if abs(value) < EXACT else None


def count_ambiguous(values: pd.Series) -> int:
    """Return how many values are ids that a float no longer tells from its neighbors."""
    if not is_mixed(values):
        return 0
    return sum(_id(value) is None and not missing(value) for value in values)
