"""Rows of each framework's rollout files, read into one form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.contexts import sampled_logprobs
from diagnostics.contexts.conversations import from_json, parse_messages, preview, row_arguments
from diagnostics.contexts.prompt_ids import cell_text, id_text, is_ambiguous_id
from diagnostics.contexts.torch_archive import Opaque, read_archive
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing, read_rows


@dataclass(frozen=True)
class Rollout:
    """One row of a rollout file: text, or ids, or both."""

    prompt: Any = None
    """Text or chat messages."""
    response: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    response_ids: tuple[int, ...] | None = None
    prompt_id: str | None = None
    context_id: str | None = None
    rendered: bool = False
    """Whether the prompt's text is what the tokenizer saw, so that no template is put around it."""
    own: tuple[bool, ...] | None = None
    """For each response token, whether the student wrote it; None where it wrote all of them."""
    teacher_prompt: Any = None
    """What the teacher reads in place of the prompt, text or messages."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    reply: Any = None
    """The response as chat messages, in place of its text."""
    exact: bool = False
    """Whether the ids are a frozen context's, to the last one: nothing of them is padding."""
    domain: str | None = None
    """What kind of question the prompt is."""
    logprobs: Any = None
    """The sampling engine's log-probabilities of the response, as the file has them."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the row passes to the chat template in addition to its messages."""


def read_rows_of_rollouts(path: Path) -> pd.DataFrame:
    """Return the rows of a rollout file as a table. Raises DiagnosticsError where it cannot be
    read.
    """
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
    """How the rows of one framework are recognized and read."""

    needs: tuple[str, ...]
    """Columns that a row of this format has, all of them."""
    read: Callable[[Row], Rollout]


class Row:
    """A row with typed access to its values; errors name the row.

    Args:
        values: The row's cells by column.
        where: Name of the row, for errors.
        counts: Counter of ambiguous ids; None counts nothing.
        asked: Collects the names of the columns that were read; None collects nothing.
    """

    def __init__(
        self,
        values: dict[str, Any],
        where: str,
        counts: Counter | None = None,
        asked: set[str] | None = None,
    ):
        self.values = values
        self.where = where
        self.counts: Counter = Counter() if counts is None else counts
        self.asked: set[str] = set() if asked is None else asked

    def get(self, name: str) -> Any:
        """Return a value, or None where it is missing."""
        self.asked.add(name)
        value = self.values.get(name)
        return None if missing(value) else value

    def text(self, name: str) -> str | None:
        """Return a value as text, or None. Raises DiagnosticsError for another type."""
        value = self.get(name)
        if value is None or isinstance(value, str):
            return value
        raise DiagnosticsError(
            f"{self.where}: {name} should be text; found {preview(value, 60)}. Fix that row."
        )

    def reply(self, name: str) -> dict[str, Any]:
        """Return a response that is text or messages (also as JSON text), under the names of
        `Rollout`.
        """
        given = self.get(name)
        value = parse_messages(given, f"{self.where}, {name}")
        listed = isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
        # A student may itself write text that is JSON of messages, but not of its own role.
        if listed and (value is given or value[0]["role"] == "assistant"):
            return {"reply": list(value)}
        return {"response": self.text(name)}

    def arguments(self) -> dict[str, Any]:
        """Return what the row passes to the chat template."""
        return row_arguments(
            {name: self.get(name) for name in ("tools", "documents", "chat_template_kwargs")},
            self.where,
        )

    def name(self, name: str) -> str | None:
        """Return an id as text; None where it is missing or is an ambiguous float."""
        value = self.get(name)
        self.counts["prompts_vague_ids"] += is_ambiguous_id(value)
        return id_text(value, self.where)

    def whole(self, name: str) -> int | None:
        """Return a whole number, or None. Raises DiagnosticsError for anything else."""
        value = id_text(self.get(name), self.where)
        if value is None or value.removeprefix("-").isdecimal():
            return None if value is None else int(value[:30])
        raise DiagnosticsError(
            f"{self.where}: {name} should be a whole number; found {value[:60]!r}. Fix that row."
        )

    def ids(self, name: str) -> tuple[int, ...] | None:
        """Return a list of token ids, also where it is written as JSON, or None. Raises
        DiagnosticsError for anything else.
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
                f" {preview(self.get(name), 60)}. Fix that row."
            )
        return tuple(int(i) for i in value)

    def mask(self, name: str) -> tuple[bool, ...] | None:
        """Return a list of 0 and 1, or of booleans, or None. Raises DiagnosticsError for anything
        else.
        """
        value = self._listed(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(i, (bool, int, float, np.generic)) and i in (0, 1) for i in value
        ):
            raise DiagnosticsError(
                f"{self.where}: {name} should be a list of 0 and 1, one per response token;"
                f" found {preview(self.get(name), 60)}. Fix that row."
            )
        return tuple(map(bool, value))

    def _listed(self, name: str) -> Any:
        """Return a value that is a list, an array, or a list written as JSON."""
        value = self.get(name)
        if isinstance(value, str):
            return from_json(value, f"{self.where}, {name}") if value else None
        return value.tolist() if isinstance(value, np.ndarray) else value


def read_row(kind: Format, row: Row) -> Rollout:
    """Read one row as a `Rollout`. Raises DiagnosticsError where the prompt or the response has
    neither text nor ids.
    """
    rollout = replace(
        kind.read(row),
        logprobs=sampled_logprobs.find(row._listed),
        domain=cell_text(row.get("domain"), row.where),
    )
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
            f"{row.where} lacks {'a prompt' if without_prompt else 'a response'}. Fix or remove"
            " that row."
        )
    return rollout


def _read_contexts(row: Row) -> Rollout:
    """Read a row of this project's own contexts."""
    return Rollout(
        row.text("prompt"),
        row.text("response"),
        row.ids("prompt_ids"),
        row.ids("response_ids"),
        row.name("prompt_id"),
        row.name("context_id"),
        rendered=True,
        own=row.mask("supervised"),
        teacher_prompt=row.text("teacher_prompt"),
        teacher_prompt_ids=row.ids("teacher_prompt_ids"),
        exact=True,
    )


def _read_released(row: Row) -> Rollout:
    """Read a row of a released context bank. `tokens` holds prompt and response together; samples
    and groups get the names that `import_tokens` gives them.
    """
    tokens, length, first = row.ids("tokens"), row.whole("resp_len"), row.whole("prompt_len")
    total = row.whole("total_len")
    if tokens is None or length is None:
        raise DiagnosticsError(
            f"{row.where} lacks {'tokens' if tokens is None else 'resp_len'}. Fix or remove that"
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
            f" {length} (total_len {total}). Fix that row."
        )
    sample = row.name("sample_index")
    group = row.name("group_index")
    rollout = row.name("rollout_id")
    context = None if sample is None else f"sample-{sample}"
    if context is not None and rollout is not None:
        context = f"rollout-{rollout}-{context}"
    return Rollout(
        prompt_ids=tokens[:first],
        response_ids=tokens[first : first + length],
        prompt_id=None if group is None else f"group-{group}",
        context_id=context,
    )


def _read_slime(row: Row) -> Rollout:
    """Read a row of slime's rollouts. For a chat with tools, `loss_mask` says which response tokens
    are the student's.
    """
    tokens, length, mask = row.ids("tokens"), row.whole("response_length"), row.mask("loss_mask")
    if tokens is None or length is None:
        raise DiagnosticsError(
            f"{row.where} lacks {'tokens' if tokens is None else 'response_length'}. Fix or remove"
            " that row."
        )
    if not 0 <= length < len(tokens) or (mask is not None and len(mask) != length):
        raise DiagnosticsError(
            f"{row.where}: {len(tokens)} tokens with a response of"
            f" {length}{'' if mask is None else f' and a loss mask of {len(mask)}'} do not fit"
            " together. Fix that row."
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
    """Read a row of verl's rollout dumps, which holds decoded text."""
    return Rollout(row.text("input"), row.text("output"), rendered=True)


def _read_trl(row: Row) -> Rollout:
    """Read a row of TRL's logged completions: prompts are decoded text, or messages, with the reply
    as messages too. A prompt that ends with the beginning of the reply is continued.
    """
    return Rollout(
        row.get("prompt"),
        rendered=True,
        arguments={"continue_final_message": True} | row.arguments(),
        **row.reply("completion"),
    )


MASKS = (
    "loss_mask",
    "response_mask",
    "completion_mask",
    "action_mask",
    "assistant_masks",
    "tool_mask",
)
"""Columns in which a plain row may say which response tokens are the student's: those that all of
them say.
"""


def _read_plain(row: Row) -> Rollout:
    """Read a row of any other file that has a prompt and a response."""
    prompt, ids, prompt_ids = row.get("prompt"), row.ids("response_ids"), row.ids("prompt_ids")
    masks = {name: row.mask(name) for name in MASKS}
    prompt_ids, masks["attention_mask"] = _attended(row, prompt_ids, ids)
    given = {name: mask for name, mask in masks.items() if mask is not None}
    for name, mask in given.items():
        if len(mask) != len(ids or ()):
            raise DiagnosticsError(
                f"{row.where}: {name} has {len(mask)} values for {len(ids or ())} response_ids."
                " Give one a token, or leave it out."
            )
    ids, given = _seen_alone(ids, given)
    return Rollout(
        row.get("messages") if prompt is None else prompt,
        prompt_ids=prompt_ids,
        response_ids=ids,
        prompt_id=row.name("prompt_id"),
        context_id=row.name("context_id"),
        own=tuple(map(all, zip(*given.values(), strict=True))) if given else None,
        teacher_prompt=row.get("teacher_prompt"),
        arguments=row.arguments(),
        **row.reply("response"),
    )


def _seen_alone(
    ids: tuple[int, ...] | None, masks: dict[str, tuple[bool, ...]]
) -> tuple[tuple[int, ...] | None, dict[str, tuple[bool, ...]]]:
    """Take the tokens that the attention mask hides out of a response that goes on behind them; the
    student never saw them. At the end they are padding, which is counted there.
    """
    seen = masks.get("attention_mask")
    if ids is None or seen is None or not any(seen):
        return ids, masks
    last = len(seen) - seen[::-1].index(True)
    kept = [t for t in range(len(ids)) if seen[t] or t >= last]
    return tuple(ids[t] for t in kept), {
        name: tuple(mask[t] for t in kept) for name, mask in masks.items()
    }


def _attended(
    row: Row, prompt_ids: tuple[int, ...] | None, response_ids: tuple[int, ...] | None
) -> tuple[tuple[int, ...] | None, tuple[bool, ...] | None]:
    """Return the prompt's ids and the response's mask by an attention mask of prompt and response,
    of the prompt alone or of the response alone.
    """
    mask, first = row.mask("attention_mask"), len(prompt_ids or ())
    if mask is None or len(mask) not in (first, first + len(response_ids or ())):
        return prompt_ids, mask
    kept = tuple(i for i, there in zip(prompt_ids or (), mask) if there)
    return (kept or prompt_ids) if prompt_ids else None, mask[first:] or None


FORMATS: dict[str, Format] = {
    "contexts": Format(("context_id", "prompt_ids", "response_ids", "finished"), _read_contexts),
    "slime": Format(("tokens", "response_length"), _read_slime),
    "released": Format(("tokens", "resp_len"), _read_released),
    "verl": Format(("input", "output"), _read_verl),
    "trl": Format(("prompt", "completion"), _read_trl),
    "plain": Format((), _read_plain),
}
"""The known formats, in the order in which they are tried."""


def find_format(frame: pd.DataFrame, wanted: str, path: Path) -> str:
    """Return the name of the format of a file's rows.

    Args:
        frame: The file's rows.
        wanted: `auto`, or the format that the user names.
        path: The file, for errors.

    Returns:
        A key of FORMATS.

    Raises:
        DiagnosticsError: The format is unknown, or the columns do not fit it.
    """
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
