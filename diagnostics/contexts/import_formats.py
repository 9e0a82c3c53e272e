"""Rows of each framework's rollout files, read into one form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.contexts.conversations import from_json, parse_messages, preview, row_arguments
from diagnostics.contexts.prompt_ids import id_text, is_ambiguous_id
from diagnostics.contexts.torch_archive import Opaque, read_archive
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing, read_rows


@dataclass(frozen=True)
class Rollout:
    """One row of such a file: text, or ids, or both."""

    prompt: Any = None
    """Text or chat messages."""
    response: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    response_ids: tuple[int, ...] | None = None
    prompt_id: str | None = None
    context_id: str | None = None
    rendered: bool = False
    """The prompt's text is what the tokenizer saw; no template is put around it."""
    own: tuple[bool, ...] | None = None
    """Response tokens that the student wrote; None where it wrote all."""
    teacher_prompt: Any = None
    """What the teacher reads in the prompt's place, text or messages."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    reply: Any = None
    """The response as chat messages, in place of its text."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the row hands to the chat template beside its messages."""


def read_rows_of_rollouts(path: Path) -> pd.DataFrame:
    if path.suffix != ".pt":
        return read_rows(path, text=True)
    held = read_archive(path)
    samples = held.get("samples") if isinstance(held, dict) else None
    if (
        not isinstance(samples, list)
        or not samples
        or not all(isinstance(sample, dict) for sample in samples)
    ):
        raise DiagnosticsError(
            f"{path} holds no list of samples, so it is no debug rollout of slime. Write its rows"
            " as JSONL with prompt and response."
        )
    return pd.DataFrame(samples, dtype=object)


@dataclass(frozen=True)
class Format:
    """How one framework's rows are told and read."""

    needs: tuple[str, ...]
    """A row of this format has all of these columns."""
    read: Callable[[Row], Rollout]


class Row:
    """A row with typed access to its values; the errors say where.

    counts: where vague ids are counted. asked: gathers the columns that were read.
    """

    def __init__(
        self,
        values: dict[str, Any],
        where: str,
        counts: Counter | None = None,
        asked: set[str] | None = None,
    ):
        self.values, self.where = values, where
        self.counts, self.asked = (
            Counter() if counts is None else counts,
            (set() if asked is None else asked),
        )

    def get(self, name: str) -> Any:
        """A value, None where it is missing."""
        self.asked.add(name)
        value = self.values.get(name)
        return None if missing(value) else value

    def text(self, name: str) -> str | None:
        """A value as text or None. Raises DiagnosticsError for another type."""
        value = self.get(name)
        if value is None or isinstance(value, str):
            return value
        raise DiagnosticsError(
            f"{self.where}: {name} should be text; found {preview(value, 60)}. Mend that row."
        )

    def reply(self, name: str) -> dict[str, Any]:
        """A response as text or as messages, also as JSON text, by the names of `Rollout`."""
        given = self.get(name)
        value = parse_messages(given, f"{self.where}, {name}")
        listed = isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
        if listed and (
            value is given or value[0]["role"] == "assistant"
        ):  # a student may write such JSON itself
            return {"reply": list(value)}
        return {"response": self.text(name)}

    def arguments(self) -> dict[str, Any]:
        """What the row hands to the chat template."""
        return row_arguments(
            {name: self.get(name) for name in ("tools", "documents", "chat_template_kwargs")},
            self.where,
        )

    def name(self, name: str) -> str | None:
        """An id as text, None where it is missing, or a float that several ids would share."""
        value = self.get(name)
        self.counts["prompts_vague_ids"] += is_ambiguous_id(value)
        return id_text(value, self.where)

    def whole(self, name: str) -> int | None:
        """A whole number or None. Raises DiagnosticsError for anything else."""
        value = id_text(self.get(name), self.where)
        if value is None or value.removeprefix("-").isdecimal():
            return None if value is None else int(value[:30])
        raise DiagnosticsError(
            f"{self.where}: {name} should be a whole number; found {value[:60]!r}. Mend that row."
        )

    def ids(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers, also written as JSON, or None. Raises DiagnosticsError for
        anything else.
        """
        value = self._listed(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(i, (int, np.integer)) and not isinstance(i, bool) and 0 <= i < 2**31
            for i in value
        ):
            raise DiagnosticsError(
                f"{self.where}: {name} should be a list of token ids; found"
                f" {preview(self.get(name), 60)}. Mend that row."
            )
        return tuple(int(i) for i in value)

    def mask(self, name: str) -> tuple[bool, ...] | None:
        """A list of 0 and 1, or of truth values, or None. Raises DiagnosticsError for anything
        else.
        """
        value = self._listed(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(i, (bool, int, float, np.generic)) and i in (0, 1) for i in value
        ):
            raise DiagnosticsError(
                f"{self.where}: {name} should be a list of 0 and 1, one a token of the response;"
                f" found {preview(self.get(name), 60)}. Mend that row."
            )
        return tuple(map(bool, value))

    def _listed(self, name: str) -> Any:
        value = self.get(name)
        if isinstance(value, str):
            return from_json(value, f"{self.where}, {name}") if value else None
        return value.tolist() if isinstance(value, np.ndarray) else value


def read_row(kind: Format, row: Row) -> Rollout:
    """One row in this module's terms. Raises DiagnosticsError where it has neither text nor ids of
    both parts.
    """
    rollout = kind.read(row)
    if any(isinstance(part, Opaque) for part in (rollout.prompt, rollout.response)):
        raise DiagnosticsError(
            f"{row.where} holds a value that only code could build. Write the rows as JSONL with"
            " prompt and response."
        )
    without_prompt = missing(rollout.prompt) and rollout.prompt_ids is None
    if without_prompt or (
        rollout.response is None and rollout.response_ids is None and rollout.reply is None
    ):
        raise DiagnosticsError(
            f"{row.where} lacks {'a prompt' if without_prompt else 'a response'}. Mend or remove"
            " that row."
        )
    return rollout


def _read_contexts(row: Row) -> Rollout:
    return Rollout(
        row.text("prompt"),
        row.text("response"),
        row.ids("prompt_ids"),
        row.ids("response_ids"),
        row.name("prompt_id"),
        row.name("context_id"),
        rendered=True,
        teacher_prompt=row.text("teacher_prompt"),
        teacher_prompt_ids=row.ids("teacher_prompt_ids"),
    )


def _read_released(row: Row) -> Rollout:
    """`tokens` is prompt and response in one; samples and groups are named as `interop` names them
    in token banks.
    """
    tokens, length, first = row.ids("tokens"), row.whole("resp_len"), row.whole("prompt_len")
    total = row.whole("total_len")
    if tokens is None or length is None:
        raise DiagnosticsError(
            f"{row.where} lacks {'tokens' if tokens is None else 'resp_len'}. Mend or remove that"
            " row."
        )
    first = len(tokens) - length if first is None else first
    if (
        length < 0
        or first < 1
        or first + length > len(tokens)
        or (total is not None and total != len(tokens))
    ):
        raise DiagnosticsError(
            f"{row.where}: {len(tokens)} tokens cannot be a prompt of {first} and a response of"
            f" {length} (total_len {total}). Mend that row."
        )
    sample, group, rollout = (
        row.name("sample_index"),
        row.name("group_index"),
        row.name("rollout_id"),
    )
    context = (
        None
        if sample is None
        else f"sample-{sample}"
        if rollout is None
        else f"rollout-{rollout}-sample-{sample}"
    )
    return Rollout(
        prompt_ids=tokens[:first],
        response_ids=tokens[first : first + length],
        prompt_id=None if group is None else f"group-{group}",
        context_id=context,
    )


def _read_slime(row: Row) -> Rollout:
    """Of a chat with tools, `loss_mask` tells which response tokens are the student's."""
    tokens, length, mask = row.ids("tokens"), row.whole("response_length"), row.mask("loss_mask")
    if tokens is None or length is None:
        raise DiagnosticsError(
            f"{row.where} lacks {'tokens' if tokens is None else 'response_length'}. Mend or remove"
            " that row."
        )
    if not 0 <= length < len(tokens) or (mask is not None and len(mask) != length):
        raise DiagnosticsError(
            f"{row.where}: {len(tokens)} tokens with a response of"
            f" {length}{'' if mask is None else f' and a loss mask of {len(mask)}'} do not fit"
            " together. Mend that row."
        )
    first, group = len(tokens) - length, row.name("group_index")
    return Rollout(
        row.get("prompt"),
        row.text("response"),
        tokens[:first],
        tokens[first:],
        None if group is None else f"group-{group}",
        rendered=True,
        own=mask,
    )


def _read_verl(row: Row) -> Rollout:
    return Rollout(row.text("input"), row.text("output"), rendered=True)


def _read_trl(row: Row) -> Rollout:
    """Prompts are decoded text, or messages with the reply as messages too; a prompt that ends with
    the reply's beginning is continued.
    """
    return Rollout(
        row.get("prompt"),
        rendered=True,
        arguments={"continue_final_message": True} | row.arguments(),
        **row.reply("completion"),
    )


MASKS = ("loss_mask", "response_mask", "completion_mask")
"""Columns in which a plain row may say which of its response's tokens are the student's."""


def _read_plain(row: Row) -> Rollout:
    prompt, ids = row.get("prompt"), row.ids("response_ids")
    masks = {name: row.mask(name) for name in MASKS}
    name, own = next(
        ((name, mask) for name, mask in masks.items() if mask is not None), (None, None)
    )
    if own is not None and len(own) != len(ids or ()):
        raise DiagnosticsError(
            f"{row.where}: {name} has {len(own)} values for {len(ids or ())} response_ids. Give one"
            " a token, or leave it out."
        )
    return Rollout(
        row.get("messages") if prompt is None else prompt,
        prompt_ids=row.ids("prompt_ids"),
        response_ids=ids,
        prompt_id=row.name("prompt_id"),
        context_id=row.name("context_id"),
        own=own,
        teacher_prompt=row.get("teacher_prompt"),
        arguments=row.arguments(),
        **row.reply("response"),
    )


FORMATS: dict[str, Format] = {
    "contexts": Format(("context_id", "prompt_ids", "response_ids", "finished"), _read_contexts),
    "slime": Format(("tokens", "response_length"), _read_slime),
    "released": Format(("tokens", "resp_len"), _read_released),
    "verl": Format(("input", "output"), _read_verl),
    "trl": Format(("prompt", "completion"), _read_trl),
    "plain": Format((), _read_plain),
}
"""In the order in which they are looked for."""


def find_format(frame: pd.DataFrame, wanted: str, path: Path) -> str:
    fitting = [
        name
        for name, kind in FORMATS.items()
        if kind.needs and set(kind.needs) <= set(frame.columns)
    ]
    if {"prompt", "messages", "prompt_ids"} & set(frame.columns) and {
        "response",
        "response_ids",
    } & set(frame.columns):
        fitting.append("plain")
    if wanted == "auto" and fitting:
        return fitting[0]
    if wanted in fitting:
        return wanted
    if wanted not in ("auto", *FORMATS):
        raise DiagnosticsError(
            f"Unknown format {wanted!r} of rollouts. Known are auto, {', '.join(FORMATS)}."
        )
    known = "; ".join(
        f"{name}: {', '.join(kind.needs) or 'prompt, response'}"
        for name, kind in FORMATS.items()
        if wanted in ("auto", name)
    )
    raise DiagnosticsError(
        f"{path} holds no rollouts{'' if wanted == 'auto' else f' of format {wanted}'}: it has"
        f" {', '.join(map(str, frame.columns[:12]))}, and needed are {known}. Rename its columns."
    )
