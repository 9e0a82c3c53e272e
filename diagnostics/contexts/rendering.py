"""Rows become the text that a model reads: chat templates, rendered text, begun replies."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np

from diagnostics.contexts.conversations import (
    CALLS,
    REASONING,
    as_messages,
    read_text,
    require_template,
    template_arguments,
)
from diagnostics.contexts.encoding import encode_prompt, special_ids
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing
from diagnostics.models.chat_templates import Template

PROBE = "opd-probe"
"""What is rendered to see what a template writes around a message."""


class Renderer:
    """Text or chat messages as the text that the tokenizer will see."""

    def __init__(self, tokenizer, chat: bool = True, kwargs: dict[str, Any] | None = None):
        self.tokenizer, self.template = tokenizer, Template(tokenizer)
        self.arguments = template_arguments(kwargs or {}, "--chat-template-kwargs")
        self.has_template = (
            bool(getattr(tokenizer, "chat_template", None)) or "chat_template" in self.arguments
        )
        self.wraps_text = chat and self.has_template
        self.special = [
            token
            for token in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
            if token
        ]
        self.counts: Counter = Counter()
        self._writes: dict[str, bool] = {}
        self.written: set[str] = set()
        """Texts that the chat template wrote whole: `encode_prompt` adds nothing to them."""

    def __call__(
        self,
        value,
        where: str,
        arguments: dict[str, Any] | None = None,
        *,
        rendered: bool = False,
        count: bool = True,
    ) -> str:
        """The rendered prompt, "" for a missing one. Raises DiagnosticsError for anything else than
        text or messages.

        arguments: what the row itself hands to the template. rendered: a text is known to be what
        the tokenizer saw. count: note in `counts` what became of it."""
        value = "" if missing(value) else value if rendered else read_text(value, where)
        counts, arguments = self.counts if count else Counter(), self.arguments | (arguments or {})
        if isinstance(value, str) and self._stays(value, rendered, counts):
            counts["arguments_unused"] += bool(
                value and (arguments.get("tools") or arguments.get("documents"))
            )
            return value
        messages = (
            [{"role": "user", "content": value}]
            if isinstance(value, str)
            else self.messages(value, where)
        )
        return self._asked(messages, where, arguments, counts)

    def messages(self, value, where: str) -> list[dict]:
        """Chat messages as this template reads them."""
        return as_messages(value, where, blocks=_has_blocks(value) and self.reads_blocks)

    def render(self, messages: list[dict], where: str, arguments: dict[str, Any], **how) -> str:
        """What the template writes for these messages. Raises DiagnosticsError where there is no
        template, or it does not.
        """
        if not self.has_template:
            raise DiagnosticsError(
                f"{where} holds chat messages, and the tokenizer has no chat template. Give text"
                " prompts, or a chat model."
            )
        require_template(getattr(self.tokenizer, "chat_template", None), arguments, where)
        return self.template(
            messages,
            where,
            **{
                name: value for name, value in arguments.items() if name != "continue_final_message"
            },
            **how,
        )

    def _stays(self, text: str, rendered: bool, counts: Counter) -> bool:
        """A text that no template goes around: there is none, it is empty, or it has been through
        it.
        """
        if not self.wraps_text or not text.strip():
            return True
        rendered = rendered or self.is_rendered(text)
        counts["rendered"] += rendered
        if (
            rendered and self.frame[0] and text.startswith(self.frame[0])
        ):  # as the template begins a prompt, start token or none
            self.written.add(text)
        counts["start_missing"] += rendered and self._lacks_start(text)
        counts["special_inside"] += not rendered and self.has_special(text)
        return rendered

    def _lacks_start(self, text: str) -> bool:
        """The template begins with a special token, the text as it goes on after that, and the
        tokenizer puts nothing before it.
        """
        head = self.frame[0]
        first = next((token for token in self.special if head.startswith(token)), "")
        rest = head.removeprefix(first).strip()
        bare = bool(first and rest) and text.strip().startswith(rest)
        return bare and encode_prompt(self.tokenizer, text) == encode_prompt(
            self.tokenizer, text, rendered=True
        )

    def _asked(
        self, messages: list[dict], where: str, arguments: dict[str, Any], counts: Counter
    ) -> str:
        """Messages with the reply asked for, or with a reply that was begun left open."""
        if self.continues(messages, arguments):
            counts["continued"] += 1
            how = {"continue_final_message": True}
        else:
            asked = self.question(messages)
            counts["replies_cut"] += len(asked) < len(messages)
            messages, how = asked, {"add_generation_prompt": True}
        text = self.render(messages, where, arguments, **how)
        self.written.add(text)
        given = [name for name in ("tools", "documents") if arguments.get(name)]
        counts["arguments_unused"] += any(
            [not self._is_written(name, text, messages, where, arguments, how) for name in given]
        )
        counts["unwritten"] += any(
            self._is_lost(number, text, messages, where, arguments | how)
            for number in range(len(messages))
        )
        return text

    def _is_lost(
        self, number: int, text: str, messages: list[dict], where: str, how: dict[str, Any]
    ) -> bool:
        """Text, calls or reasoning of a message of which nothing is in what the template wrote."""
        message = messages[number]

        def writes(other: dict) -> str | None:
            changed = [*messages[:number], other, *messages[number + 1 :]]
            try:
                return self.render(changed, where, how)
            except DiagnosticsError:  # it cannot do without
                return None

        for held in (CALLS, REASONING):
            bare = {"content": ""} | {k: v for k, v in message.items() if k not in held}
            if any(message.get(name) for name in held) and writes(bare) == text:
                return True
        words = _words(message)
        if not words or words in text:
            return False
        return writes({**message, "content": PROBE}) == text

    def continues(self, messages: list[dict], arguments: dict[str, Any]) -> bool:
        """The last message begins the reply: the caller says so, or the message itself (`prefix`,
        as some servers take it).
        """
        return messages[-1]["role"] == "assistant" and bool(
            arguments.get("continue_final_message") or messages[-1].get("prefix") is True
        )

    def question(self, messages: list[dict]) -> list[dict]:
        """The chat up to the reply that is asked for."""
        answered = messages[-1]["role"] == "assistant" and len(messages) > 1
        return messages[:-1] if answered else messages

    def _is_written(
        self,
        name: str,
        text: str,
        messages: list[dict],
        where: str,
        arguments: dict[str, Any],
        how: dict,
    ) -> bool:
        """The template writes something of that argument, as the first row that has it shows."""
        if name not in self._writes:
            try:
                without = self.render(
                    messages,
                    where,
                    {key: value for key, value in arguments.items() if key != name},
                    **how,
                )
            except DiagnosticsError:  # it cannot do without
                without = None
            self._writes[name] = text != without
        return self._writes[name]

    def with_hint(
        self, value, hint: str, where: str, arguments: dict[str, Any] | None = None
    ) -> str:
        """The prompt with a hint before the last user message's text, or before the text."""
        value = read_text(value, where)
        if isinstance(value, str) and self.wraps_text and self.is_rendered(value):
            raise DiagnosticsError(
                f"{where} has a hint, and its prompt is rendered already, so that the hint has no"
                " place in it. Give a teacher_prompt instead."
            )
        if isinstance(value, str):
            return self(f"{hint}\n\n{value}", where, arguments, count=False)
        messages = self.messages(value, where)
        if not self.continues(messages, self.arguments | (arguments or {})):
            messages = self.question(messages)
        last = max(
            (i for i, message in enumerate(messages) if message["role"] == "user"), default=None
        )
        if last is None:
            raise DiagnosticsError(
                f"{where} has a hint and no user message to put it before. Give a teacher_prompt"
                " instead."
            )
        content = messages[last].get("content") or ""
        hinted = (
            f"{hint}\n\n{content}"
            if isinstance(content, str)
            else [{"type": "text", "text": f"{hint}\n\n"}, *content]
        )
        return self(
            [*messages[:last], {**messages[last], "content": hinted}, *messages[last + 1 :]],
            where,
            arguments,
            count=False,
        )

    # What the template writes around a message, seen from what it makes of one.

    def has_special(self, text: str) -> bool:
        """A special token of the tokenizer is in the text."""
        return any(token in text for token in self.special)

    def is_rendered(self, text: str) -> bool:
        """The text begins with a special token, or is framed as the template frames a question."""
        stripped = text.strip()
        if any(stripped.startswith(token) for token in self.special):
            return True
        head, tail = (part.strip() for part in self.frame)
        bare = head
        for token in self.special:  # a log that was decoded without them
            bare = bare.replace(token, "")
        heads = tuple(part for part in (head, bare.strip()) if part)
        return (
            bool(tail)
            and stripped.endswith(tail)
            and (self.has_special(tail) or (bool(heads) and stripped.startswith(heads)))
        )

    def spells(self, text, ids) -> bool:
        """The text is that of the prompt's ids, so it is what the tokenizer saw."""
        if (
            not isinstance(text, str)
            or not text
            or not isinstance(ids, (list, tuple, np.ndarray))
            or not self.wraps_text
        ):
            return False
        ids = list(ids)
        return (
            list(encode_prompt(self.tokenizer, text)) == ids
            or list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) == ids
        )

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What the template writes before a question and, to ask for the reply, at the very end;
        empty where that cannot be seen.
        """
        asked, told = self._probe(PROBE), self._probe(PROBE, add_generation_prompt=False)
        if PROBE not in asked:
            return "", ""
        head, _, tail = asked.partition(PROBE)
        return head, (asked.removeprefix(told) if asked.startswith(told) else "") or tail

    @cached_property
    def reads_blocks(self) -> bool:
        """The template takes content as a list of blocks, and writes the text in it."""
        text = self._probe(PROBE)
        return bool(text) and text == self._probe([{"type": "text", "text": PROBE}])

    def _probe(self, content, **how) -> str:
        try:
            return self.render(
                [{"role": "user", "content": content}],
                "the chat template",
                self.arguments,
                **{"add_generation_prompt": True} | how,
            )
        except DiagnosticsError:
            return ""


def _words(message: dict) -> str:
    """The end of a message's text, beyond what it thought: templates cut that, and spaces."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else content[-1]["text"] if content else ""
    return text.rpartition("</think>")[2].strip()


def _has_blocks(value) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and any(
        isinstance(message, dict) and isinstance(message.get("content"), (list, np.ndarray))
        for message in value
    )
