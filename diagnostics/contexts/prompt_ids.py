"""Stable names of prompts, and table cells as text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from diagnostics.contexts.conversations import to_json_value
from diagnostics.core.rows import EXACT, missing


def source_digest(value, arguments: dict[str, Any], values: dict[str, Any]) -> str:
    """Name what a row asks, before a template renders it: the name does not depend on the day or
    the model's template.

    Args:
        value: The prompt, text or messages.
        arguments: What the row passes to the chat template.
        values: The whole row; its `hint` and `teacher_prompt` are part of what it asks.

    Returns:
        Twelve hexadecimal digits.
    """
    more = arguments | {name: _json_part(values.get(name)) for name in ("teacher_prompt", "hint")}
    parts = {"prompt": _json_part(value)} | {
        name: part for name, part in more.items() if part not in (None, "")
    }
    if set(parts) == {"prompt"} and isinstance(value, str):
        return digest(value)
    return digest(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str))


def _json_part(value):
    """Return a cell as JSON has it, without keys that have no value: Arrow gives every message the
    keys of all messages.
    """
    if isinstance(value, dict):
        return {str(key): _json_part(part) for key, part in value.items() if not missing(part)}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_json_part(part) for part in value]
    return None if missing(value) else value


def digest(text: str) -> str:
    """Return a short stable name of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def cell_text(value, where: str) -> str | None:
    """Return a cell as text, lists and objects as JSON; None where it is missing or empty."""
    if missing(value) or (isinstance(value, str) and not value):
        return None
    held = value.item() if isinstance(value, np.generic) else value
    return (
        json.dumps(to_json_value(held, where))
        if isinstance(held, (list, tuple, dict, np.ndarray))
        else str(held)
    )


def id_text(value, where: str) -> str | None:
    """Return an id as text; None where there is none, or where it is ambiguous.

    The float 3.0 is read as 3: a column of whole numbers becomes one of floats once it has gaps.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not value.is_integer():
        return cell_text(value, where)
    return None if is_ambiguous_id(value) else str(int(value))


def is_ambiguous_id(value) -> bool:
    """Whether a whole number is stored as a float too large to differ from its neighbors: as an id
    it would merge different prompts.
    """
    return isinstance(value, (float, np.floating)) and EXACT <= abs(float(value)) < float("inf")
