"""Prompts as token ids: one encoding for sampling, scoring, training and imports."""

from __future__ import annotations

import weakref
from typing import Any

from diagnostics.contexts.conversations import template_arguments
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import require_unicode
from diagnostics.models.chat_templates import Template


def encode_prompt(tokenizer, text: str, *, rendered: bool = False) -> tuple[int, ...]:
    """Ids of a prompt, the only ones that sampling, scoring, training and imports use.

    rendered: a chat template wrote the text, which then is all there is: the ids are those of
    `apply_chat_template(tokenize=True)`. Other text keeps the tokenizer's start token, which stands
    once where the text brings it as well, unless the text holds special tokens and the chat
    template writes no start token. Nothing is ever put behind a prompt: the student would answer
    after the end of a text."""
    require_unicode(text)
    bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = () if rendered else start_ids(tokenizer)
    if bare[: len(start)] == start or _written_in_template(tokenizer, bare, start):
        return bare
    return start + bare


def start_ids(tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer puts before every text."""
    for text in ("a", "0", "."):  # not every vocabulary has a token for each
        bare, whole = (
            tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
            for special in (False, True)
        )
        places = [
            i
            for i in range(len(whole) - len(bare) + 1)
            if bare and whole[i : i + len(bare)] == bare
        ]
        if places:
            return whole[: places[0]]
    return ()


_BEGINNINGS: weakref.WeakKeyDictionary[Any, tuple[str, tuple[int, ...] | None]] = (
    weakref.WeakKeyDictionary()
)
"""By tokenizer: its chat template, and the ids of what that writes for a question; seen once, as it
takes a process.
"""


def _written_in_template(tokenizer, bare: tuple[int, ...], start: tuple[int, ...]) -> bool:
    """The text has special tokens, and the template that writes such texts begins them without
    `start`.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if not template or not special_ids(tokenizer).intersection(bare):
        return False
    if _BEGINNINGS.get(tokenizer, ("",))[0] != template:
        written = render(tokenizer, [{"role": "user", "content": "a"}])
        _BEGINNINGS[tokenizer] = (
            template,
            written and tuple(tokenizer(written, add_special_tokens=False)["input_ids"]),
        )
    beginning = _BEGINNINGS[tokenizer][1]
    return bool(beginning) and beginning[: len(start)] != start


def special_ids(tokenizer) -> frozenset[int]:
    """Ids of the tokens that `decode(skip_special_tokens=True)` leaves out: those named (start,
    end, ...) and those flagged.
    """
    flagged = {
        i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    return frozenset(flagged.union(tokenizer.all_special_ids))


def render(
    tokenizer, messages: list[dict], *, add_generation_prompt: bool = True, **kwargs
) -> str | None:
    """Messages of our own by the chat template, to learn how it writes; None without one, or where
    it refuses them.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return Template(tokenizer)(
            messages, "the chat template", add_generation_prompt=add_generation_prompt, **kwargs
        )
    except DiagnosticsError:  # what the template does with prompts is seen when they are rendered
        return None


def uses_clock(tokenizer, kwargs: dict[str, Any] | None = None) -> bool:
    """The chat template asks for the time, so that a prompt is another one tomorrow."""
    question, kwargs = (
        [{"role": "user", "content": "a"}],
        template_arguments(kwargs or {}, "--chat-template-kwargs"),
    )
    no_clock = {**kwargs, "strftime_now": "no function"}  # whoever calls it ends in an error
    return (
        render(tokenizer, question, **kwargs) is not None
        and render(tokenizer, question, **no_clock) is None
    )
