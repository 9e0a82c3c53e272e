"""Chat messages and their template's arguments, from every shape in which files hold them.

Frameworks write one conversation in many ways: as JSON text in a CSV, with every key in every
message as Arrow does (a missing one is None), with content as a list of blocks, with content that
is null beside tool calls. Here all become lists of plain dicts, as the template's author meant
them, or are refused in a sentence that names the message."""

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

DEEPEST = 64
"""Levels of lists and objects in a message; real ones have about ten, and Python's own stack ends
before a thousand.
"""
OURS = (
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
"""Arguments of the template's caller that this program sets itself, or whose result is no text."""
ARGUMENTS = ("tools", "documents", "chat_template_kwargs")
"""Columns that go into the template beside the messages."""
PYTHON_TEXT = re.compile(r"\s*\[\s*\{\s*'\w+'\s*:")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message holds what the model thought; the library fills the others from any
of them.
"""
CALLS = ("tool_calls", "function_call")
"""Names under which a message holds calls; the second is the older one."""
SENSES = ("images", "image", "videos", "video", "audios", "audio")
"""Names under which a message, or a row, holds what is no text."""
BESIDE = ("system", "history", "input", "functions", *SENSES)
"""Columns in which files hold more of a conversation, and which are not read."""


def shown(value, length: int = 80) -> str:
    """The beginning of a value for a message; a nest too deep to print says so."""
    try:
        return repr(str(value)[:length])
    except RecursionError:
        return "a value nested too deeply to show"


def plain(value, where: str, depth: int = 0):
    """A value as JSON has it: arrays as lists, keys that are missing left out at every level.

    Raises DiagnosticsError for a nest deeper than DEEPEST or a value of another kind.
    """
    if depth > DEEPEST:
        raise DiagnosticsError(
            f"{where} holds lists or objects more than {DEEPEST} levels deep, which no conversation"
            " needs. Mend or remove that row."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {
            str(key): plain(held, where, depth + 1)
            for key, held in value.items()
            if not missing(held)
        }
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(held, where, depth + 1) for held in value]
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    raise DiagnosticsError(
        f"{where} holds a {type(value).__name__} ({shown(value, 60)}) in a conversation. Write"
        " texts, numbers, lists and objects."
    )


def from_json(text: str, where: str) -> Any:
    """The list or object that a text holds as JSON, the text itself where it is none. Raises
    DiagnosticsError for a nest too deep.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
    except RecursionError as error:
        raise DiagnosticsError(
            f"{where} holds JSON that is nested too deeply. Mend or remove that row."
        ) from error


def read_text(value, where: str):
    """A prompt or reply: text that holds messages as JSON, alone or as an object's `messages`,
    becomes the messages, other text stays.

    Raises DiagnosticsError for messages in Python's notation, as a table of dicts becomes in a CSV.
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
    if PYTHON_TEXT.match(value) and re.search(r"'role'\s*:", value):
        raise DiagnosticsError(
            f"{where} holds chat messages in Python's notation: {value[:60]!r}. Write them as JSON,"
            " with json.dumps."
        )
    return value


def as_messages(value, where: str, *, blocks: bool = False) -> list[dict]:
    """A list of chat messages, each with a role and with text, tool calls or reasoning.

    Content in blocks becomes one text, its blocks on lines of their own; with `blocks`, for a
    template that reads them, they stay. Other keys stay as they are. Raises DiagnosticsError for
    anything else, naming the message."""
    messages = list(value) if isinstance(value, (list, tuple, np.ndarray)) else None
    if not messages:
        raise DiagnosticsError(
            f"{where}: a prompt is text or a list of {{role, content}} messages; found"
            f" {shown(value)}. Mend that row."
        )
    return [
        _message(message, f"{where}, message {number}", blocks)
        for number, message in enumerate(messages, 1)
    ]


def _message(value, where: str, blocks: bool) -> dict:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise DiagnosticsError(
            f"{where}: a message is an object with a role and content; found {shown(value)}. Mend"
            " that row."
        )
    message, where = plain(value, where), f"{where} ({value['role'][:20]})"
    content, senses = message.get("content"), [name for name in SENSES if message.get(name)]
    if senses:
        raise DiagnosticsError(
            f"{where} holds {', '.join(senses)}. Only text is read; remove that row."
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
            f"{where} has the content {shown(content)}; it should be text, or a list of blocks of"
            " text. Mend that row."
        )
    return message


def _block(block, where: str) -> str:
    """The text of one block. Raises DiagnosticsError for an image, a sound or anything else."""
    if isinstance(block, str):
        return block
    text = block.get("text") if isinstance(block, dict) else None
    if isinstance(text, str) and block.get("type", "text") in ("text", "input_text", "output_text"):
        return text
    raise DiagnosticsError(
        f"{where} holds a block of content that is no text: {shown(block)}. Only text is read;"
        " remove that row."
    )


def holds_more(values: Mapping[str, Any], used: str) -> bool:
    """A row holds more of its conversation in a column that is not read. used: the column that
    is.
    """
    held = (values.get(name) for name in BESIDE if name != used)
    return any(
        not missing(value) and (not hasattr(value, "__len__") or len(value)) for value in held
    )


def row_arguments(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row hands to the template: its `tools`, `documents` and `chat_template_kwargs`, also
    as JSON text; empty ones are none.
    """
    found = {}
    for name in ARGUMENTS:
        value = values.get(name)
        value = from_json(value, where) if isinstance(value, str) else value
        if not missing(value) and not (hasattr(value, "__len__") and not len(value)):
            found[name] = plain(value, f"{where}, {name}")
    given = found.pop("chat_template_kwargs", {})
    if not isinstance(given, dict):
        raise DiagnosticsError(
            f"{where}: chat_template_kwargs should be an object; found {shown(given)}. Mend that"
            " row."
        )
    return template_arguments(given | found, where)


def template_arguments(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The same arguments, checked. Raises DiagnosticsError for one that is ours, or of a type that
    no template takes.
    """
    taken = [name for name in given if name in OURS]
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
                f"{where}: {name} should be a list of objects; found {shown(value)}. Mend or leave"
                " it out."
            )
    template, final = given.get("chat_template"), given.get("continue_final_message")
    if template is not None and not isinstance(template, str):
        raise DiagnosticsError(
            f"{where}: chat_template should be a template's name or text; found {shown(template)}."
            " Mend or leave it out."
        )
    if final is not None and not isinstance(final, bool):
        raise DiagnosticsError(
            f"{where}: continue_final_message should be true or false; found {shown(final)}. Mend"
            " or leave it out."
        )
    return given


def require_template(templates, arguments: dict[str, Any], where: str) -> None:
    """Raise DiagnosticsError where a tokenizer's templates leave open which one is meant, or none
    has the name that is given.

    templates: a tokenizer's `chat_template`, a text, a dict of named ones, or None.
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
