"""Rows become the text that a model reads: chat templates, rendered texts, begun replies."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np

from diagnostics.contexts.conversations import (
    CALLS,
    REASONING,
    as_messages,
    parse_messages,
    require_template,
    template_arguments,
)
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing
from diagnostics.models.chat_templates import Template
from diagnostics.models.special_tokens import special_ids

PROBE = "opd-probe"
"""Text that is rendered to see what a template writes around a message."""


class Renderer:
    """Renders text or chat messages to the text that the tokenizer reads.

    Args:
        tokenizer: The pair's tokenizer with its chat template.
        chat: Whether to put the template around plain text, too.
        kwargs: Arguments of the template for every row.
    """

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
        """Texts that the chat template wrote completely: `encode_prompt` adds nothing to them."""

    def __call__(
        self,
        value,
        where: str,
        arguments: dict[str, Any] | None = None,
        *,
        rendered: bool = False,
        count: bool = True,
    ) -> str:
        """Render a prompt.

        Args:
            value: Text or chat messages; a missing value gives "".
            where: Name of the row, for errors.
            arguments: What the row itself passes to the template.
            rendered: Whether a text is known to be rendered already.
            count: Whether to record in `counts` what became of the prompt.

        Returns:
            The rendered text.

        Raises:
            DiagnosticsError: The value is neither text nor messages, or the template refuses
                it.
        """
        if missing(value):
            value = ""
        elif not rendered:
            value = parse_messages(value, where)
        counts = self.counts if count else Counter()
        arguments = self.arguments | (arguments or {})
        if isinstance(value, str) and self._needs_no_template(value, rendered, counts):
            counts["arguments_unused"] += bool(
                value and (arguments.get("tools") or arguments.get("documents"))
            )
            return value
        messages = (
            [{"role": "user", "content": value}]
            if isinstance(value, str)
            else self.messages(value, where)
        )
        return self._render_request(messages, where, arguments, counts)

    def messages(self, value, where: str) -> list[dict]:
        """Return chat messages in the form that this template reads."""
        return as_messages(value, where, blocks=_has_blocks(value) and self.reads_blocks)

    def render(self, messages: list[dict], where: str, arguments: dict[str, Any], **how) -> str:
        """Return what the template writes for these messages. Raises DiagnosticsError where there
        is no template or it refuses them.
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

    def _needs_no_template(self, text: str, rendered: bool, counts: Counter) -> bool:
        """Whether no template is put around a text: there is none, the text is empty, or it is
        rendered already.
        """
        if not self.wraps_text or not text.strip():
            return True
        rendered = rendered or self.is_rendered(text)
        counts["rendered"] += rendered
        # A text that begins as the template begins a prompt is complete: no start token is added.
        if rendered and self.frame[0] and text.startswith(self.frame[0]):
            self.written.add(text)
        counts["start_missing"] += rendered and self._lacks_start(text)
        counts["special_inside"] += not rendered and self.has_special(text)
        return rendered

    def _lacks_start(self, text: str) -> bool:
        """Whether the template begins with a special token, the text as the template goes on after
        it, and the tokenizer puts nothing before the text.
        """
        head = self.frame[0]
        first = next((token for token in self.special if head.startswith(token)), "")
        rest = head.removeprefix(first).strip()
        bare = bool(first and rest) and text.strip().startswith(rest)
        return bare and encode_prompt(self.tokenizer, text) == encode_prompt(
            self.tokenizer, text, rendered=True
        )

    def _render_request(
        self, messages: list[dict], where: str, arguments: dict[str, Any], counts: Counter
    ) -> str:
        """Render messages so that they ask for the reply, or leave a begun reply open."""
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
        unused = [
            name
            for name in given
            if not self._is_written(name, text, messages, where, arguments, how)
        ]
        counts["arguments_unused"] += bool(unused)
        counts["unwritten"] += any(
            self._is_lost(number, text, messages, where, arguments | how)
            for number in range(len(messages))
        )
        return text

    def _is_lost(
        self, number: int, text: str, messages: list[dict], where: str, how: dict[str, Any]
    ) -> bool:
        """Whether the template wrote nothing of the text, the calls or the reasoning of a
        message.
        """
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
        """Whether the last message begins the reply: by the argument `continue_final_message`, or
        by the message's own key `prefix`, as some servers accept it.
        """
        return messages[-1]["role"] == "assistant" and bool(
            arguments.get("continue_final_message") or messages[-1].get("prefix") is True
        )

    def question(self, messages: list[dict]) -> list[dict]:
        """Return the chat without the reply that is asked for."""
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
        """Whether the template writes anything of that argument. The first row that has the
        argument decides for all.
        """
        if name not in self._writes:
            try:
                without = self.render(
                    messages,
                    where,
                    {key: value for key, value in arguments.items() if key != name},
                    **how,
                )
            except DiagnosticsError:  # the template needs this argument
                without = None
            self._writes[name] = text != without
        return self._writes[name]

    def with_hint(
        self, value, hint: str, where: str, arguments: dict[str, Any] | None = None
    ) -> str:
        """Render the prompt with a hint before the text of the last user message, or before a text
        prompt.

        Args:
            value: The prompt, text or chat messages.
            hint: Text that only the teacher reads.
            where: Name of the row, for errors.
            arguments: What the row itself passes to the template.

        Returns:
            The rendered text.

        Raises:
            DiagnosticsError: The prompt is rendered already, or has no user message.
        """
        value = parse_messages(value, where)
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

    # What the template writes around a message is found by rendering one.

    def has_special(self, text: str) -> bool:
        """Whether a special token of the tokenizer occurs in the text."""
        return any(token in text for token in self.special)

    def is_rendered(self, text: str) -> bool:
        """Whether the text begins with a special token, or is framed as the template frames a
        question.
        """
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
        """Whether the text is that of the prompt's ids, and therefore what the tokenizer saw."""
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
        empty where that cannot be determined.
        """
        asked, told = self._probe(PROBE), self._probe(PROBE, add_generation_prompt=False)
        if PROBE not in asked:
            return "", ""
        head, _, tail = asked.partition(PROBE)
        return head, (asked.removeprefix(told) if asked.startswith(told) else "") or tail

    @cached_property
    def reads_blocks(self) -> bool:
        """Whether the template takes content as a list of blocks and writes their text."""
        text = self._probe(PROBE)
        return bool(text) and text == self._probe([{"type": "text", "text": PROBE}])

    def _probe(self, content, **how) -> str:
        """Render one message with this content; "" where the template refuses it."""
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
    """Return the end of a message's text, after its reasoning: templates cut that, and spaces."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else content[-1]["text"] if content else ""
    return text.rpartition("</think>")[2].strip()


def _has_blocks(value) -> bool:
    """Whether any message has its content as a list of blocks."""
    return isinstance(value, (list, tuple, np.ndarray)) and any(
        isinstance(message, dict) and isinstance(message.get("content"), (list, np.ndarray))
        for message in value
    )
