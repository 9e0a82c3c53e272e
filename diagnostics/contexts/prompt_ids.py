"""Stable names of prompts, and cells of a table as text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from diagnostics.contexts.conversations import to_json_value
from diagnostics.core.rows import EXACT, missing


def source_digest(value, arguments: dict[str, Any], values: dict[str, Any]) -> str:
    """Name of what a row asks, before any template wrote it: the same tomorrow, and for another
    model's template.

    values: the row, whose hint and teacher_prompt are asked as well.
    """
    more = arguments | {name: _json_part(values.get(name)) for name in ("teacher_prompt", "hint")}
    parts = {"prompt": _json_part(value)} | {
        name: part for name, part in more.items() if part not in (None, "")
    }
    if set(parts) == {"prompt"} and isinstance(value, str):
        return digest(value)
    return digest(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str))


def _json_part(value):
    """A cell in JSON's terms, keys without a value left out: Arrow gives every message the keys of
    all.
    """
    if isinstance(value, dict):
        return {str(key): _json_part(part) for key, part in value.items() if not missing(part)}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_json_part(part) for part in value]
    return None if missing(value) else value


def digest(text: str) -> str:
    """Short stable name of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def cell_text(value, where: str) -> str | None:
    """A cell as text, lists and objects as JSON; None where it is missing or empty."""
    if missing(value) or (isinstance(value, str) and not value):
        return None
    held = value.item() if isinstance(value, np.generic) else value
    return (
        json.dumps(to_json_value(held, where))
        if isinstance(held, (list, tuple, dict, np.ndarray))
        else str(held)
    )


def id_text(value, where: str) -> str | None:
    """An id as text, None where there is none; 3.0, as a column that once had gaps holds it, is 3,
    and a vague one is none.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not value.is_integer():
        return cell_text(value, where)
    return None if is_ambiguous_id(value) else str(int(value))


def is_ambiguous_id(value) -> bool:
    """A whole number that a float no longer tells from its neighbours: as an id it would join what
    was apart.
    """
    return isinstance(value, (float, np.floating)) and EXACT <= abs(value) < float("inf")
