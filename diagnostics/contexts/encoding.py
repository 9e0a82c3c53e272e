"""Prompts as token ids: one encoding for sampling, scoring, training and imports."""

from __future__ import annotations

import weakref
from typing import Any

from diagnostics.contexts.conversations import template_arguments
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import require_unicode
from diagnostics.models.chat_templates import Template
from diagnostics.models.special_tokens import special_ids


def encode_prompt(tokenizer, text: str, *, rendered: bool = False) -> tuple[int, ...]:
    """Encode a prompt. Sampling, scoring, training and imports all use these ids.

    Other text than a rendered one keeps the tokenizer's start token. It is written once where the
    text brings it as well, and not at all where the text holds special tokens and the chat template
    writes no start token. Nothing is ever added after a prompt: the student would answer after the
    end of a text.

    Args:
        tokenizer: The pair's tokenizer.
        text: The prompt as text.
        rendered: A chat template wrote the text. It is then complete, and the ids are those of
            `apply_chat_template(tokenize=True)`.

    Returns:
        The token ids.
    """
    require_unicode(text)
    bare = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = () if rendered else start_ids(tokenizer)
    if bare[: len(start)] == start or _written_in_template(tokenizer, bare, start):
        return bare
    return start + bare


def start_ids(tokenizer) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before every text."""
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


_BEGINNINGS: weakref.WeakKeyDictionary[Any, tuple[str, tuple[int, ...]]] = (
    weakref.WeakKeyDictionary()
)
"""Per tokenizer: its chat template, and the ids of what that writes for a question. They are kept
because rendering them starts a process.
"""


def _written_in_template(tokenizer, bare: tuple[int, ...], start: tuple[int, ...]) -> bool:
    """Whether the text has special tokens and the template that writes such texts begins them
    without `start`.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if not template or not special_ids(tokenizer).intersection(bare):
        return False
    if _BEGINNINGS.get(tokenizer, ("",))[0] != template:
        written = try_render(tokenizer, [{"role": "user", "content": "a"}])
        ids = tokenizer(written, add_special_tokens=False)["input_ids"] if written else ()
        _BEGINNINGS[tokenizer] = (template, tuple(ids))
    beginning = _BEGINNINGS[tokenizer][1]
    return bool(beginning) and beginning[: len(start)] != start


def try_render(
    tokenizer, messages: list[dict], *, add_generation_prompt: bool = True, **kwargs
) -> str | None:
    """Render our own messages to learn how the chat template writes; None where there is no
    template or it refuses them.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return Template(tokenizer)(
            messages, "the chat template", add_generation_prompt=add_generation_prompt, **kwargs
        )
    except DiagnosticsError:  # a fault of the template is reported when prompts are rendered
        return None


def uses_clock(tokenizer, kwargs: dict[str, Any] | None = None) -> bool:
    """Whether the chat template asks for the time, so that a prompt differs from day to day."""
    question = [{"role": "user", "content": "a"}]
    kwargs = template_arguments(kwargs or {}, "--chat-template-kwargs")
    # A template that calls this in place of the clock ends in an error.
    no_clock = {**kwargs, "strftime_now": "no function"}
    return (
        try_render(tokenizer, question, **kwargs) is not None
        and try_render(tokenizer, question, **no_clock) is None
    )
