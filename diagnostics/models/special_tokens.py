"""Pairs whose tokenizers agree in every ordinary token and not in every special one.

Checkpoints of one family often share all ordinary tokens, while the same id is `<|im_end|>` for one
and `<|Assistant|>` for the other. What the teacher says of such an id is no judgment of the
student's token. Such a pair is loaded, and the set E of these ids is left out of both
distributions:

    p'(v) = p(v) / (1 - p(E)),    q'(v) = q(v) / (1 - q(E)),    v outside E

p(E) and q(E), the dropped masses, are columns of the token table. A position whose sampled token
lies in E has no p'(y): it is read by both models and is no position of the table, so that it
carries no loss and has no gain. The student samples from p, E included; given that its token lies
outside E, that token is a draw from p'.

E holds the added tokens that differ: an id with two names, and both ids of a name that has two. An
ordinary token that differs is refused, and so is an id that is ordinary for one side alone.

The *stop tokens* of both models stand in one table, since they differ most often: what ends a
response for the student, what ends it for the teacher, and what the chat template writes at the end
of a turn."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Context

log = logging.getLogger("diagnostics")
SHOWN = 3
"""Differing tokens that an error or a warning names."""
STOP_COLUMNS = (
    "token_id",
    "student_token",
    "teacher_token",
    "ends_student",
    "ends_teacher",
    "ends_turn",
    "dropped",
    "note",
)
"""Columns of the table of stop tokens."""


def differing_special_ids(student, teacher) -> tuple[int, ...]:
    """Compare two tokenizers, and return the ids that are special tokens of different names.

    Sizes may differ, as long as the larger tokenizer only adds tokens.

    Args:
        student: Tokenizer of the student.
        teacher: Tokenizer of the teacher.

    Returns:
        The set E of this module in ascending order; empty where the tokenizers agree.

    Raises:
        DiagnosticsError: They differ in an ordinary token: the teacher would grade other words than
            the student wrote.
    """
    if student is teacher:
        return ()
    maps = [tokenizer.get_vocab() for tokenizer in (student, teacher)]
    by_id = [{i: token for token, i in mapping.items()} for mapping in maps]
    two_names = {i for i in by_id[0].keys() & by_id[1].keys() if by_id[0][i] != by_id[1][i]}
    two_ids = {
        token for token in maps[0].keys() & maps[1].keys() if maps[0][token] != maps[1][token]
    }
    different = two_names | {mapping[token] for token in two_ids for mapping in maps}
    added = [added_ids(tokenizer) for tokenizer in (student, teacher)]
    ordinary = {
        i
        for i in different
        for names, special in zip(by_id, added, strict=True)
        if i in names and i not in special
    }
    if ordinary:
        raise DiagnosticsError(_refusal(maps, by_id, ordinary))
    return tuple(sorted(different))


def _refusal(maps: list[dict], by_id: list[dict], ordinary: set[int]) -> str:
    """Say which ordinary tokens differ, by name where both sides know it, else by id."""
    tokens = {side[i] for side in by_id for i in ordinary if i in side}
    first = sorted(tokens, key=lambda token: (maps[0].get(token, -1), token))[:SHOWN]
    shown = ", ".join(
        f"{token!r} is {maps[0].get(token)} for the student and {maps[1].get(token)} for the"
        " teacher"
        for token in first
    )
    return (
        f"The tokenizers differ in {len(tokens)} tokens ({shown}). On-policy scores need one"
        " token-to-id map; choose a teacher with the student's tokenizer."
    )


def added_ids(tokenizer) -> frozenset[int]:
    """Return the ids that were added to a tokenizer's vocabulary, and its named special tokens.

    Not all of them are flagged as special: `<think>` is often added as a plain token.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(added).union(tokenizer.all_special_ids)


def special_ids(tokenizer) -> frozenset[int]:
    """Return the ids that `decode(skip_special_tokens=True)` leaves out: named tokens (start, end,
    ...) and tokens flagged as special.
    """
    flagged = {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    return frozenset(flagged.union(tokenizer.all_special_ids))


def warn_of_dropped(student, teacher, dropped: tuple[int, ...]) -> list[dict[str, Any]]:
    """Say which ids are left out, and return them as rows for the manifest.

    Args:
        student: Tokenizer of the student.
        teacher: Tokenizer of the teacher.
        dropped: The ids that differ.

    Returns:
        One dict per id with `id`, `student` and `teacher`, the names there; None where a side has
        no token of that id.
    """
    sides = [{i: token for token, i in side.get_vocab().items()} for side in (student, teacher)]
    rows = [{"id": i, "student": sides[0].get(i), "teacher": sides[1].get(i)} for i in dropped]
    if rows:
        shown = ", ".join(
            f"{row['id']}: {row['student']!r} and {row['teacher']!r}" for row in rows[:SHOWN]
        )
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        log.warning(
            "the tokenizers differ in %d special tokens alone (student and teacher at %s%s). These"
            " ids are left out of both distributions, which are renormalized; a response token of"
            " such an id is no position",
            len(rows),
            shown,
            more,
        )
    return rows


def gradable(bank: Bank, dropped: Iterable[int]) -> Bank:
    """Return the bank without the positions whose sampled token is one of these ids.

    Args:
        bank: Frozen contexts.
        dropped: Ids that stand for other tokens at the teacher's.

    Returns:
        The same contexts in the same order. Both models still read every token; a token of such an
        id is no position any more (`Context.supervised`).
    """
    ids = frozenset(dropped)
    if not ids or not any(ids.intersection(context.sampled_ids) for context in bank):
        return bank
    return Bank(tuple(_gradable(context, ids) for context in bank))


def _gradable(context: Context, ids: frozenset[int]) -> Context:
    own = context.supervised or (True,) * len(context.response_ids)
    kept = tuple(
        mine and token not in ids for mine, token in zip(own, context.response_ids, strict=True)
    )
    return context if all(kept) else dataclasses.replace(context, supervised=kept)


def count_dropped(bank: Bank, dropped: Iterable[int]) -> dict[str, int]:
    """Count what the ids of a pair's differing special tokens touch in a bank.

    Args:
        bank: Frozen contexts.
        dropped: The ids.

    Returns:
        `positions` (response tokens that are no positions for that reason), `responses` (with such
        a token), and `read_otherwise` (tokens of prompts and responses that the teacher reads as
        other tokens; its own prompts are not counted).
    """
    ids = frozenset(dropped)
    lost = [sum(token in ids for token in context.sampled_ids) for context in bank]
    read = sum(
        token in ids
        for context in bank
        for token in (context.ids if context.teacher_prompt_ids is None else context.response_ids)
    )
    return {
        "positions": sum(lost),
        "responses": sum(map(bool, lost)),
        "read_otherwise": read,
    }


def log_dropped(counts: Mapping[str, int], positions: int) -> None:
    """Say what `count_dropped` found among so many sampled tokens."""
    if counts["positions"]:
        log.warning(
            "%d of %d sampled tokens are special tokens that the teacher knows by another name;"
            " they are left out of the token table and of every gain",
            counts["positions"],
            positions,
        )
    if counts["read_otherwise"]:
        log.warning(
            "the teacher reads %d tokens of the contexts as other special tokens than the student."
            " Where its template writes others, give it prompts of its own: messages in a column"
            " teacher_prompt are rendered with the teacher's template",
            counts["read_otherwise"],
        )


# --- stop tokens


def turn_end(tokenizer) -> int | None:
    """Return the special token that the chat template writes after the assistant's text; None where
    there is no template, or none is written.
    """
    from diagnostics.models.chat_templates import Template

    mark = "answer"
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = Template(tokenizer)(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}],
            "the chat template",
            add_generation_prompt=False,
        )
    except DiagnosticsError:  # a fault of the template is reported when prompts are rendered
        return None
    behind = text.rpartition(mark)[2].strip() if mark in text else ""
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in special_ids(tokenizer) else None


def stop_rows(
    student,
    teacher,
    *,
    ends: tuple[Iterable[int], Iterable[int]] = ((), ()),
    turn_end: int | None = None,
    dropped: Iterable[int] = (),
) -> list[dict[str, Any]]:
    """List the tokens that end a response for either model.

    Args:
        student: Tokenizer of the student.
        teacher: Tokenizer of the teacher.
        ends: End ids of the student's and of the teacher's generation settings, beside those of
            their tokenizers.
        turn_end: Id that the chat template writes at the end of the assistant's turn.
        dropped: Ids that are left out of both distributions.

    Returns:
        One dict per id with the keys of STOP_COLUMNS; `note` says what a mismatch touches and is
        empty where both models stop there.
    """
    sides = [{i: token for token, i in side.get_vocab().items()} for side in (student, teacher)]
    stops = [
        {int(i) for i in (*own, tokenizer.eos_token_id) if i is not None}
        for own, tokenizer in zip(ends, (student, teacher), strict=True)
    ]
    left_out = frozenset(dropped)
    listed = sorted(stops[0] | stops[1] | (set() if turn_end is None else {turn_end}))
    rows = []
    for i in listed:
        row = {
            "token_id": i,
            "student_token": sides[0].get(i),
            "teacher_token": sides[1].get(i),
            "ends_student": i in stops[0],
            "ends_teacher": i in stops[1],
            "ends_turn": i == turn_end,
            "dropped": i in left_out,
        }
        rows.append(row | {"note": _note(row)})
    return rows


def _note(row: Mapping[str, Any]) -> str:
    """What a stop token that only one model has means for the measurements."""
    if row["dropped"]:
        return "another token for the teacher: the last position of a finished response is left out"
    if row["ends_student"] and not row["ends_teacher"]:
        return (
            "the student stops here and the teacher does not: a divergence at a response's last"
            " position is one of stop tokens"
        )
    if row["ends_teacher"] and not row["ends_student"]:
        return (
            "the teacher stops here and the student does not: where the teacher would stop, its"
            " mass lies on a token after which the student goes on"
        )
    if row["ends_turn"] and not row["ends_student"]:
        return "the template ends a turn here and no response ends: text goes on behind the turn"
    return ""


def warn_of_stops(rows: list[dict[str, Any]]) -> None:
    """Warn of every stop token that the two models do not share, with what it touches."""
    for row in rows:
        if row["note"]:
            name = row["student_token"] if row["ends_student"] else row["teacher_token"]
            log.warning("stop token %d (%r): %s", row["token_id"], name, row["note"])
