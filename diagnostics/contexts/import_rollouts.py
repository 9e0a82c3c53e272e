"""Rollouts that were sampled elsewhere become frozen contexts.

    format     columns that tell it                    what wrote it
    contexts   context_id, prompt_ids, finished …      this project
    released   tokens, resp_len                        the context bank of the scripts of arXiv 2605.26844
    slime      tokens, response_length                 slime's debug rollouts: the .pt archive, or its samples as JSONL
    verl       input, output                           verl's rollout dumps, JSONL
    trl        prompt, completion                      TRL's logged completions, parquet
    plain      prompt, response                        anything: text, chat messages, or prompt_ids and response_ids

Ids are taken as they stand. Text is encoded by the pair's tokenizer, prompt and response together,
so that the response begins where its first token would have; the prompt goes through the chat
template as a prompt file's does, unless it has been through it or the format stores rendered text.
A response ends where the student stopped: at the first token that it did not write (a tool's, by
the loss mask or the message's role), and with the first end token; filler before or after goes. A
reply in messages is the text of its first message, with tool calls and reasoning as the template
writes them.

Three more things can go wrong without a trace in such files, and are looked for in every context.
*Re-tokenisation drift*: the ids decode to a text that encodes to other ids, so that positions exist
that the student never saw. *Other text*: the ids decode to something else than the file's text.
*Lost special tokens*: dumps that were decoded without them give prompts that no model was asked;
where the prompt file is named as well, its prompts are put back in their place."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from diagnostics.contexts.conversations import (
    CALLS,
    REASONING,
    from_json,
    holds_more,
    read_text,
    row_arguments,
    shown,
)
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.prompts import NOTED, digest, far_longer, is_vague, name_of, say_unused
from diagnostics.contexts.rendering import PROBE, Renderer
from diagnostics.contexts.torch_archive import Opaque, read_archive
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing, read_rows, require_unicode
from diagnostics.core.types import Bank, Context, Prompt

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair

log = logging.getLogger("diagnostics")
FOREIGN_SHARE = 0.5
"""Share of contexts whose ids spell another text than the file's, from which the file is another
tokenizer's.
"""


@dataclass(frozen=True)
class BankConfig:
    """Responses that were sampled elsewhere, in place of sampling."""

    rollouts: str | None = field(
        default=None, metadata={"help": "file of prompts with responses; nothing is sampled then"}
    )
    rollouts_format: str = field(
        default="auto",
        metadata={
            "help": "who wrote it",
            "choices": ("auto", "contexts", "released", "slime", "verl", "trl", "plain"),
        },
    )


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


def read_rollouts(pair: Pair, path: str | Path, **options) -> Bank:
    """Contexts from a file of rollouts; arguments and errors as in `freeze`, what it counts goes to
    the log alone.
    """
    return freeze(pair, path, **options)[0]


def freeze(
    pair: Pair,
    path: str | Path,
    *,
    rollouts_format: str = "auto",
    prompts: Sequence[Prompt] = (),
    contexts: int | None = None,
    chat: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[Bank, dict[str, Any]]:
    """Read a file of rollouts and freeze it with the pair's tokenizer.

    prompts: where the dump lost special tokens, the prompts it came from. contexts: take the first
    so many, all where None. Responses without tokens and contexts longer than the models' windows
    are left out. Returns the bank in file order and what was counted, which is also logged: rows,
    contexts, positions, what COUNTED names, not_needed. Raises DiagnosticsError for a file that
    cannot be read or is of no known format, a row that holds neither text nor ids, ids outside the
    vocabulary, ids that mostly spell another text than the file's, or fewer contexts than asked
    for."""
    path = Path(path)
    frame = _frame(path)
    kind = _format(frame, rollouts_format, path)
    freezer = _Freezer(pair, Renderer(pair.tokenizer, chat, chat_template_kwargs), prompts)
    asked: set[str] = set()
    found = []
    for number, values in enumerate(frame.to_dict("records"), 1):
        row = Row(values, f"{path}, row {number}", freezer.counts, asked)
        found.append(freezer(read_row(FORMATS[kind], row), row.where))
        freezer.counts["prompts_beside"] += kind in ("plain", "trl") and holds_more(values, "")
    kept = [context for context in found if context is not None]
    wanted = len(kept) if contexts is None else contexts
    counts = freezer.counted()
    _require_own_tokenizer(freezer.counts, path)
    if not kept or not 1 <= wanted <= len(kept):
        _say(counts, path)
        raise DiagnosticsError(
            f"{path} holds {len(kept)} usable contexts of {len(frame)}"
            + (f", and {wanted} are asked for" if contexts is not None else "")
            + ". Name a larger file or lower --contexts."
        )
    bank = Bank(tuple(_named(kept[:wanted], path)))
    log.info(
        "%s (%s): %d contexts, %d positions of %d rows",
        path,
        kind,
        len(bank),
        bank.positions,
        len(frame),
    )
    _say(counts, path)
    say_unused(set(map(str, frame.columns)) - asked, path)
    return bank, {
        "format": kind,
        "rows": len(frame),
        "contexts": len(bank),
        "positions": bank.positions,
        **counts,
        "not_needed": len(kept) - wanted,
    }


COUNTED = {
    "from_text": "given as text, so their tokens are those of re-encoding",
    "retokenised": "whose ids decode to a text that encodes to other ids (re-tokenisation drift)",
    "other_text": "whose ids decode to another text than the file's",
    "joined": "whose response would have shared a token with the prompt, and was encoded apart",
    "without_special": (
        "whose prompt has no special token although the chat template writes some: the dump has"
        " lost them. Name the prompt file with --prompts"
    ),
    "restored": "whose prompt's special tokens were put back from --prompts",
    "cut": "cut at the first token that the student did not write",
    "after_end": (
        "cut after their first end token: what the file has beyond it is no part of the response"
    ),
    "padded": "with filler around the prompt or the response, which was taken off",
    "rewritten": "whose tool calls or reasoning the chat template wrote again from their messages",
    "unwritten": (
        "with tool calls or reasoning that the chat template does not write: left out where"
        " reasoning is lost, cut before a lost call"
    ),
    "empty": "without response tokens, left out",
    "over_long": "longer than the models' windows, left out",
    "repeated": "with the tokens of an earlier one",
    "prompts_replies_cut": NOTED["replies_cut"],
    "prompts_continued": NOTED["continued"],
    "prompts_rendered": NOTED["rendered"],
    "prompts_special_inside": NOTED["special_inside"],
    "prompts_vague_ids": NOTED["vague_ids"],
    "prompts_arguments_unused": NOTED["arguments_unused"],
    "prompts_start_missing": NOTED["start_missing"],
    "prompts_unwritten": NOTED["unwritten"],
    "prompts_beside": NOTED["beside"],
}
"""What is counted, in the words of the log."""
HARMLESS = ("from_text", "restored", "rewritten", "prompts_rendered", "prompts_continued")


def _say(counts: dict[str, int], path: Path) -> None:
    for name, words in COUNTED.items():
        if counts[name]:
            noun = "" if name.startswith("prompts_") else "contexts "
            log.log(
                logging.INFO if name in HARMLESS else logging.WARNING,
                "%s: %d %s%s",
                path,
                counts[name],
                noun,
                words,
            )


def _require_own_tokenizer(counts: Counter, path: Path) -> None:
    if counts["spelled"] and counts["other_spelling"] > FOREIGN_SHARE * counts["spelled"]:
        raise DiagnosticsError(
            f"{path}: {counts['other_spelling']} of {counts['spelled']} responses decode to another"
            " text than the file's, so another tokenizer wrote their ids. Use the model that"
            " sampled them as --student, or give the text alone."
        )


# --- files and their rows
# -----------------------------------------------------------------------------


def _frame(path: Path) -> pd.DataFrame:
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
            f"{self.where}: {name} should be text; found {shown(value, 60)}. Mend that row."
        )

    def reply(self, name: str) -> dict[str, Any]:
        """A response as text or as messages, also as JSON text, by the names of `Rollout`."""
        given = self.get(name)
        value = read_text(given, f"{self.where}, {name}")
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
        self.counts["prompts_vague_ids"] += is_vague(value)
        return name_of(value, self.where)

    def whole(self, name: str) -> int | None:
        """A whole number or None. Raises DiagnosticsError for anything else."""
        value = name_of(self.get(name), self.where)
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
                f" {shown(self.get(name), 60)}. Mend that row."
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
                f" found {shown(self.get(name), 60)}. Mend that row."
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


def _contexts(row: Row) -> Rollout:
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


def _released(row: Row) -> Rollout:
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


def _slime(row: Row) -> Rollout:
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


def _verl(row: Row) -> Rollout:
    return Rollout(row.text("input"), row.text("output"), rendered=True)


def _trl(row: Row) -> Rollout:
    """Prompts are decoded text, or messages with the reply as messages too; a prompt that ends with
    the reply's beginning is continued.
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
"""Columns in which a plain row may say which of its response's tokens are the student's: those that
all of them say."""


def _plain(row: Row) -> Rollout:
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


def _attended(
    row: Row, prompt_ids: tuple[int, ...] | None, response_ids: tuple[int, ...] | None
) -> tuple[tuple[int, ...] | None, tuple[bool, ...] | None]:
    """The prompt's ids and the response's mask by an attention mask of prompt and response, of the
    prompt alone or of the response alone.
    """
    mask, first = row.mask("attention_mask"), len(prompt_ids or ())
    if mask is None or len(mask) not in (first, first + len(response_ids or ())):
        return prompt_ids, mask
    kept = tuple(i for i, there in zip(prompt_ids or (), mask) if there)
    return (kept or prompt_ids) if prompt_ids else None, mask[first:] or None


FORMATS: dict[str, Format] = {
    "contexts": Format(("context_id", "prompt_ids", "response_ids", "finished"), _contexts),
    "slime": Format(("tokens", "response_length"), _slime),
    "released": Format(("tokens", "resp_len"), _released),
    "verl": Format(("input", "output"), _verl),
    "trl": Format(("prompt", "completion"), _trl),
    "plain": Format((), _plain),
}
"""In the order in which they are looked for."""


def _format(frame: pd.DataFrame, wanted: str, path: Path) -> str:
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


# --- text and ids
# --------------------------------------------------------------------------------------


class _Freezer:
    """Turns rows into contexts and counts what it meets."""

    def __init__(self, pair: Pair, renderer: Renderer, prompts: Sequence[Prompt]):
        self.tokenizer, self.end_ids, self.vocabulary, self.window = (
            pair.tokenizer,
            pair.end_ids,
            pair.vocabulary,
            pair.window,
        )
        self.renderer, self.counts = renderer, Counter()
        renderer.written.update(prompt.prompt for prompt in prompts if prompt.rendered)
        self.stripped = {self._stripped(prompt.prompt): prompt for prompt in prompts}
        self.writes_special = renderer.has_template and renderer.has_special(
            "".join(renderer.frame)
        )
        self.pad = getattr(self.tokenizer, "pad_token_id", None)
        self.fillers = {*self.end_ids} | ({self.pad} - {None})
        self.seen: set[tuple] = set()

    def __call__(self, rollout: Rollout, where: str) -> Context | None:
        """The context, or None for one that is left out."""
        rollout = self._with_reply(rollout, where)
        if rollout is None:
            return None
        rollout = self._with_prompt(rollout, where)
        if self._cannot_fit(rollout):
            self.counts["over_long"] += 1
            return None
        prompt_ids, given_ids = self._ids(rollout)
        rollout = self._with_teacher_ids(rollout, where)
        outside = [
            i
            for i in (*prompt_ids, *given_ids, *(rollout.teacher_prompt_ids or ()))
            if i >= self.vocabulary
        ]
        if outside:
            raise DiagnosticsError(
                f"{where} holds token id {outside[0]}, and the shared vocabulary has"
                f" {self.vocabulary}. Another tokenizer wrote it; give the text alone."
            )
        prompt_ids, response_ids, teacher_ids = self._trimmed(
            prompt_ids, self._own(given_ids, rollout.own), rollout.teacher_prompt_ids
        )
        rollout = replace(rollout, teacher_prompt_ids=teacher_ids)
        usable = self._usable(max(prompt_ids, teacher_ids or (), key=len), response_ids)
        if usable:
            self._inspect(rollout, prompt_ids, response_ids, given_ids)
        return self._context(rollout, prompt_ids, response_ids) if usable else None

    def counted(self) -> dict[str, int]:
        """What was met, by the names of COUNTED."""
        of_prompts = {f"prompts_{name}": count for name, count in self.renderer.counts.items()}
        return {name: self.counts[name] + of_prompts.get(name, 0) for name in COUNTED}

    # --- messages as text

    def _with_reply(self, rollout: Rollout, where: str) -> Rollout | None:
        """A reply in messages as the text of its first one, which the student wrote; None where
        that cannot be told.
        """
        if rollout.reply is None:
            return rollout
        messages = self.renderer.messages(rollout.reply, f"{where}, the reply")
        own = messages[:1] if messages[0]["role"] == "assistant" else []
        self.counts["cut"] += len(messages) > len(own)
        text = self._written(rollout, own[0], where) if own else ""
        return None if text is None else replace(rollout, response=text)

    def _written(self, rollout: Rollout, message: dict, where: str) -> str | None:
        """A message's text with its reasoning and tool calls as the template writes them; None
        where reasoning is lost.
        """
        content = message.get("content") or ""
        content = (
            content if isinstance(content, str) else "\n".join(block["text"] for block in content)
        )
        thought, calls = (
            {name for name in REASONING if message.get(name)},
            {name for name in CALLS if name in message},
        )
        if not thought and not calls:
            return content
        text = self._rewritten(rollout, message, thought, where) if thought else content
        with_calls = (
            self._rewritten(rollout, message, calls, where) if calls and text is not None else text
        )
        lost = text is None or with_calls is None
        self.counts["unwritten" if lost else "rewritten"] += 1
        if with_calls is not None or text is None:
            return with_calls
        bare = {key: value for key, value in message.items() if key not in CALLS}
        return self._rewritten(rollout, bare, thought, where) if thought else content

    def _rewritten(
        self, rollout: Rollout, message: dict, parts: set[str], where: str
    ) -> str | None:
        """What the template writes for a reply after asking for it, None where nothing of the
        `parts` is in it.
        """
        prompt, arguments = (
            read_text(rollout.prompt, where),
            self.renderer.arguments | rollout.arguments,
        )
        if isinstance(prompt, str) or missing(prompt):
            return None
        messages = self.renderer.messages(prompt, where)
        if self.renderer.continues(messages, arguments):
            return None
        asked = self.renderer.question(messages)
        before = self.renderer(asked, where, rollout.arguments, count=False)

        def whole(reply: dict) -> str:
            return self.renderer.render([*asked, reply], where, arguments)

        full, without = (
            whole(message),
            whole(
                {"content": ""} | {key: value for key, value in message.items() if key not in parts}
            ),
        )
        closing = whole({"role": "assistant", "content": PROBE}).rpartition(PROBE)[2]
        return (
            full.removeprefix(before).removesuffix(closing)
            if full != without and full.startswith(before)
            else None
        )

    def _with_prompt(self, rollout: Rollout, where: str) -> Rollout:
        """The prompt as rendered text; one that lost its special tokens is looked up among the
        prompts.
        """
        if missing(rollout.prompt) or rollout.prompt_ids is not None:
            text = rollout.prompt if isinstance(rollout.prompt, str) else None
            return replace(rollout, prompt=text)
        original = (
            self.stripped.get(rollout.prompt.strip())
            if rollout.rendered and isinstance(rollout.prompt, str)
            else None
        )
        if original is not None:
            self.counts["restored"] += 1
            return replace(
                rollout,
                prompt=original.prompt,
                prompt_id=rollout.prompt_id or original.prompt_id,
                teacher_prompt=rollout.teacher_prompt or original.teacher_prompt,
            )
        text = self._rendered(rollout.prompt, rollout, where)
        self.counts["without_special"] += self.writes_special and not self.renderer.has_special(
            text
        )
        return replace(rollout, prompt=text)

    def _rendered(self, value: Any, rollout: Rollout, where: str, *, count: bool = True) -> str:
        value = read_text(value, where)
        if isinstance(value, str) and rollout.rendered:
            return value
        return self.renderer(value, where, rollout.arguments, count=count)

    def _with_teacher_ids(self, rollout: Rollout, where: str) -> Rollout:
        """What the teacher reads in the prompt's place, where the row has it, as text and ids."""
        if rollout.teacher_prompt_ids is None and not missing(rollout.teacher_prompt):
            text = self._rendered(rollout.teacher_prompt, rollout, where, count=False)
            return replace(
                rollout, teacher_prompt=text, teacher_prompt_ids=self._encode_prompt(text)
            )
        return rollout

    # --- text as ids, and which of them are the response

    def _cannot_fit(self, rollout: Rollout) -> bool:
        """A text so much longer than the window that it need not be tokenised whole."""
        texts = [
            rollout.prompt if rollout.prompt_ids is None else None,
            rollout.response if rollout.response_ids is None else None,
        ]
        return self.window is not None and any(
            text is not None and far_longer(text, self.window, self.tokenizer) for text in texts
        )

    def _ids(self, rollout: Rollout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prompt_ids = (
            rollout.prompt_ids
            if rollout.prompt_ids is not None
            else self._encode_prompt(rollout.prompt)
        )
        if rollout.response_ids is not None:
            return prompt_ids, rollout.response_ids
        self.counts["from_text"] += 1
        before = rollout.prompt if rollout.prompt_ids is None else self._text(prompt_ids)
        whole = rollout.prompt_ids is not None or self._is_written(rollout.prompt)
        encode = self._encode if whole else self._encode_prompt
        together = encode(before + rollout.response)
        if together[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, together[len(prompt_ids) :]
        self.counts["joined"] += 1
        return prompt_ids, self._encode(rollout.response)

    def _own(self, response_ids: tuple[int, ...], own: tuple[bool, ...] | None) -> tuple[int, ...]:
        """The response up to the first token that the student did not write; filler is none of it,
        whatever the mask says.
        """
        if own is None or all(own):
            return response_ids
        first = own.index(False)
        self.counts["cut"] += not all(i in self.fillers for i in response_ids[first:])
        self.counts["padded"] += all(i in self.fillers for i in response_ids[first:])
        return response_ids[:first]

    def _trimmed(
        self,
        prompt_ids: tuple[int, ...],
        response_ids: tuple[int, ...],
        teacher_ids: tuple[int, ...] | None,
    ):
        """Both prompts without filler, and the response up to its first end token."""
        bare, bare_teacher = self._unpadded(prompt_ids), teacher_ids and self._unpadded(teacher_ids)
        first = (
            self._run(response_ids)
            if response_ids and response_ids[0] == self.pad and self.pad not in self.end_ids
            else 0
        )
        kept = response_ids[first:]
        end = next((place for place, i in enumerate(kept) if i in self.end_ids), None)
        if end is None:
            beyond = (
                kept[len(kept) - self._run(kept[::-1]) :] if kept and kept[-1] == self.pad else ()
            )
            kept = kept[: len(kept) - len(beyond)]
        else:
            kept, beyond = kept[: end + 1], kept[end + 1 :]
        foreign = any(i not in self.fillers for i in beyond)
        self.counts["after_end"] += foreign
        self.counts["padded"] += (
            (bare, bare_teacher) != (prompt_ids, teacher_ids)
            or first > 0
            or (bool(beyond) and not foreign)
        )
        return bare, kept, bare_teacher

    def _unpadded(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """A prompt without filler at its ends. One end token, or one start token, may be its own;
        the padding token is not.
        """
        for _ in range(2):  # once from each side, turned round in between
            run = self._run(ids)
            own = ids[:1] == (getattr(self.tokenizer, "bos_token_id", None),) or (
                run == 1 and ids[0] in self.end_ids
            )
            ids = ids[run - own :] if run and run < len(ids) and ids[0] in self.fillers else ids
            ids = ids[::-1]
        return ids

    def _run(self, ids: tuple[int, ...]) -> int:
        """How often the first id stands at the beginning."""
        return next((place for place, i in enumerate(ids) if i != ids[0]), len(ids))

    def _usable(self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> bool:
        over_long = self.window is not None and len(prompt_ids) + len(response_ids) > self.window
        self.counts["empty"] += not response_ids
        self.counts["over_long"] += over_long and bool(response_ids)
        return bool(response_ids) and not over_long

    def _inspect(
        self,
        rollout: Rollout,
        prompt_ids: tuple[int, ...],
        response_ids: tuple[int, ...],
        given_ids: tuple[int, ...],
    ) -> None:
        """Count drift, other text and repeats. given_ids: the response before it was cut, which the
        file's text is of.
        """
        ids = prompt_ids + response_ids
        self.counts["retokenised"] += self._encode(self._text(ids)) != ids
        self.counts["repeated"] += (prompt_ids, response_ids) in self.seen
        self.seen.add((prompt_ids, response_ids))
        if rollout.response is not None and (rollout.own is None or all(rollout.own)):
            spelled = any(
                self._spells(prompt_ids, found, rollout.response)
                for found in {response_ids, given_ids}
            )
            self.counts["other_text"] += not spelled
            if rollout.response_ids is not None:
                self.counts["spelled"] += 1
                self.counts["other_spelling"] += not spelled

    def _spells(
        self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...], response: str
    ) -> bool:
        """The ids decode to the text, special tokens written or left out."""
        whole = self._text(prompt_ids + response_ids)
        forms = (
            whole[len(self._text(prompt_ids)) :],
            self._text(response_ids),
            self.tokenizer.decode(response_ids, skip_special_tokens=True),
        )
        return any(form.strip() == response.strip() for form in forms)

    def _context(
        self, rollout: Rollout, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]
    ) -> Context:
        prompt = rollout.prompt if isinstance(rollout.prompt, str) else self._text(prompt_ids)
        return Context(
            context_id=rollout.context_id or "",
            prompt_id=rollout.prompt_id or rollout.context_id or digest(prompt),
            prompt=prompt,
            prompt_ids=prompt_ids,
            response=self.tokenizer.decode(response_ids, skip_special_tokens=True),
            response_ids=response_ids,
            finished=response_ids[-1] in self.end_ids,
            teacher_prompt=rollout.teacher_prompt if rollout.teacher_prompt_ids else None,
            teacher_prompt_ids=rollout.teacher_prompt_ids,
        )

    def _encode_prompt(self, text: str) -> tuple[int, ...]:
        return encode_prompt(self.tokenizer, text, rendered=self._is_written(text))

    def _is_written(self, text: str) -> bool:
        """The chat template wrote the text, here or where the prompts were read."""
        return text in self.renderer.written

    def _encode(self, text: str) -> tuple[int, ...]:
        require_unicode(text)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _stripped(self, text: str) -> str:
        return self.tokenizer.decode(
            encode_prompt(self.tokenizer, text), skip_special_tokens=True
        ).strip()


def _named(contexts: list[Context], path: Path) -> Iterator[Context]:
    """Contexts without a name of their own are numbered within their prompt. Raises
    DiagnosticsError where two have one name.
    """
    samples, taken = Counter(), set()
    for context in contexts:
        name = context.context_id or f"{context.prompt_id}-{samples[context.prompt_id]}"
        samples[context.prompt_id] += not context.context_id
        if name in taken:
            raise DiagnosticsError(
                f"{path}: two contexts are named {name!r}. Give every row its own id, or none."
            )
        taken.add(name)
        yield replace(context, context_id=name)
