"""Chat messages and their template's arguments, from every form in which files hold them.

Frameworks write one conversation in many ways: as JSON text in a CSV; with every key in every
message, as Arrow does (a missing one is None); with content as a list of blocks; with content that
is null where there are tool calls. Here all of them become lists of plain dicts, as the template's
author meant them, or are refused with an error that names the message."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing

MAX_NESTING = 64
"""Levels of lists and objects in a message. Real ones have about ten, and Python's own stack ends
before a thousand.
"""
RESERVED_ARGUMENTS = (
    "conversation",
    "messages",
    "tokenize",
    "add_generation_prompt",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
)
"""Arguments of the template's caller that this program sets itself, or whose result is not text."""
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns that are passed to the template with the messages."""
PYTHON_LITERAL = re.compile(r"\s*\[\s*\{\s*'\w+'\s*:")
"""Beginning of a list of dicts as Python prints it."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message holds the model's reasoning; the library fills the others from any of
them.
"""
CALLS = ("tool_calls", "function_call")
"""Names under which a message holds calls; the second is the older one."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Names under which a message, or a row, holds something other than text."""
UNREAD_COLUMNS = ("system", "history", "input", "functions", *MEDIA)
"""Columns in which files hold more of a conversation, and which are not read."""


def preview(value, length: int = 80) -> str:
    """Return the beginning of a value for an error; a value nested too deeply to print says so."""
    try:
        return repr(str(value)[:length])
    except RecursionError:
        return "a value nested too deeply to show"


def to_json_value(value, where: str, depth: int = 0):
    """Return a value as JSON has it: arrays as lists, missing keys left out at every level. Raises
    DiagnosticsError for a value nested more than MAX_NESTING levels deep or of another type.
    """
    if depth > MAX_NESTING:
        raise DiagnosticsError(
            f"{where} holds lists or objects more than {MAX_NESTING} levels deep, which no"
            " conversation needs. Fix or remove that row."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {
            str(key): to_json_value(held, where, depth + 1)
            for key, held in value.items()
            if not missing(held)
        }
    if isinstance(value, (list, tuple, np.ndarray)):
        return [to_json_value(held, where, depth + 1) for held in value]
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    raise DiagnosticsError(
        f"{where} holds a {type(value).__name__} ({preview(value, 60)}) in a conversation. Write"
        " texts, numbers, lists and objects."
    )


def from_json(text: str, where: str) -> Any:
    """Return the list or object that a text holds as JSON, or the text itself where it holds none.
    Raises DiagnosticsError for JSON that is nested too deeply.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
    except RecursionError as error:
        raise DiagnosticsError(
            f"{where} holds JSON that is nested too deeply. Fix or remove that row."
        ) from error


def parse_messages(value, where: str):
    """Return the messages that a text holds as JSON, alone or as an object's `messages`; any other
    value stays as it is. Raises DiagnosticsError for messages in Python's notation, which a table
    of dicts becomes in a CSV.
    """
    if not isinstance(value, str):
        return value
    held = from_json(value, where)
    held = held.get("messages") if isinstance(held, dict) else held
    if (
        isinstance(held, list)
        and held
        and all(isinstance(message, dict) and "role" in message for message in held)
    ):
        return held
    if PYTHON_LITERAL.match(value) and re.search(r"'role'\s*:", value):
        raise DiagnosticsError(
            f"{where} holds chat messages in Python's notation: {value[:60]!r}. Write them as JSON,"
            " with json.dumps."
        )
    return value


def as_messages(value, where: str, *, blocks: bool = False) -> list[dict]:
    """Return chat messages, each with a role and with text, tool calls or reasoning.

    Args:
        value: A list of messages.
        where: Name of the row, for errors.
        blocks: Whether the template reads content as blocks. Otherwise the texts of the blocks
            are joined by line breaks.

    Returns:
        The messages as plain dicts; other keys stay as they are.

    Raises:
        DiagnosticsError: The value is no list of messages; the error names the message.
    """
    messages = list(value) if isinstance(value, (list, tuple, np.ndarray)) else None
    if not messages:
        raise DiagnosticsError(
            f"{where}: a prompt is text or a list of {{role, content}} messages; found"
            f" {preview(value)}. Fix that row."
        )
    return [
        _message(message, f"{where}, message {number}", blocks)
        for number, message in enumerate(messages, 1)
    ]


def _message(value, where: str, blocks: bool) -> dict:
    """Return one message as a plain dict. Raises DiagnosticsError where it has no role or no usable
    content.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise DiagnosticsError(
            f"{where}: a message is an object with a role and content; found {preview(value)}. Fix"
            " that row."
        )
    message, where = to_json_value(value, where), f"{where} ({value['role'][:20]})"
    content, media = message.get("content"), [name for name in MEDIA if message.get(name)]
    if media:
        raise DiagnosticsError(
            f"{where} holds {', '.join(media)}. Only text is read; remove that row."
        )
    if isinstance(content, list):
        texts = [_block(block, where) for block in content]
        message["content"] = (
            [{"type": "text", "text": text} for text in texts] if blocks else "\n".join(texts)
        )
    elif content is None and not (any(message.get(name) for name in (*CALLS, *REASONING))):
        raise DiagnosticsError(
            f"{where} has no content (None) and no tool_calls. Give it text, or remove it."
        )
    elif content is not None and not isinstance(content, str):
        raise DiagnosticsError(
            f"{where} has the content {preview(content)}; it should be text, or a list of blocks of"
            " text. Fix that row."
        )
    return message


def _block(block, where: str) -> str:
    """Return the text of one block. Raises DiagnosticsError for an image, audio and so on."""
    if isinstance(block, str):
        return block
    text = block.get("text") if isinstance(block, dict) else None
    if isinstance(text, str) and block.get("type", "text") in ("text", "input_text", "output_text"):
        return text
    raise DiagnosticsError(
        f"{where} holds a block of content that is no text: {preview(block)}. Only text is read;"
        " remove that row."
    )


def holds_more(values: Mapping[str, Any], used: str) -> bool:
    """Whether a row holds more of its conversation in a column that is not read. `used` is the
    column that is.
    """
    held: list[Any] = [values.get(name) for name in UNREAD_COLUMNS if name != used]
    return any(
        not missing(value) and (not hasattr(value, "__len__") or len(value)) for value in held
    )


def row_arguments(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a row passes to the template: its `tools`, `documents` and
    `chat_template_kwargs`, also as JSON text. Empty ones are left out.
    """
    found: dict[str, Any] = {}
    for name in TEMPLATE_COLUMNS:
        value = values.get(name)
        value = from_json(value, where) if isinstance(value, str) else value
        empty = value is None or (hasattr(value, "__len__") and not len(value))
        if not empty and not missing(value):
            found[name] = to_json_value(value, f"{where}, {name}")
    given = found.pop("chat_template_kwargs", {})
    if not isinstance(given, dict):
        raise DiagnosticsError(
            f"{where}: chat_template_kwargs should be an object; found {preview(given)}. Fix that"
            " row."
        )
    return template_arguments(given | found, where)


def template_arguments(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the same arguments after checking them. Raises DiagnosticsError for an argument that
    this program sets itself, or of a type that no template takes.
    """
    taken = [name for name in given if name in RESERVED_ARGUMENTS]
    if taken:
        raise DiagnosticsError(
            f"{where} names {', '.join(taken)}, which this program sets itself when it renders a"
            " prompt. Leave it out."
        )
    for name in ("tools", "documents"):
        value = given.get(name)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, dict) for item in value)
        ):
            raise DiagnosticsError(
                f"{where}: {name} should be a list of objects; found {preview(value)}. Fix or leave"
                " it out."
            )
    template, final = given.get("chat_template"), given.get("continue_final_message")
    if template is not None and not isinstance(template, str):
        raise DiagnosticsError(
            f"{where}: chat_template should be a template's name or text; found"
            f" {preview(template)}. Fix or leave it out."
        )
    if final is not None and not isinstance(final, bool):
        raise DiagnosticsError(
            f"{where}: continue_final_message should be true or false; found {preview(final)}. Fix"
            " or leave it out."
        )
    return given


def require_template(templates, arguments: dict[str, Any], where: str) -> None:
    """Raise DiagnosticsError where it is not clear which of a tokenizer's templates is meant.

    Args:
        templates: A tokenizer's `chat_template`: a text, a dict of named templates, or None.
        arguments: The template's arguments; `chat_template` may name one.
        where: Name of the row, for errors.
    """
    wanted = arguments.get("chat_template")
    names = sorted(templates) if isinstance(templates, dict) else []
    if wanted is not None and wanted not in names and "{" not in wanted:
        raise DiagnosticsError(
            f"{where} asks for the chat template {wanted!r}; the tokenizer has"
            f" {', '.join(names) or 'no named ones'}. Name one of its own, or leave it out."
        )
    if (
        names
        and wanted is None
        and "default" not in names
        and not (arguments.get("tools") and "tool_use" in names)
    ):
        raise DiagnosticsError(
            f"{where}: the tokenizer has the chat templates {', '.join(names)}, and none of them is"
            " the default. "
            f"""Choose one with --chat-template-kwargs '{{"chat_template": "{names[0]}"}}'."""
        )
