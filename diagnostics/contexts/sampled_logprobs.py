"""Log-probabilities that a bank came with: what the engine that sampled it thought of each token.

They are found under the names that frameworks give them, as one number per response token, as a
pair of number and id, or as vLLM's lists by id. Values that cannot be placed, one to a token, are
left out and counted; nothing else of the context depends on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

NAMES = (
    "sampled_logprobs",
    "rollout_log_probs",
    "rollout_logprobs",
    "response_logprobs",
    "completion_logprobs",
    "output_token_logprobs",
    "logprobs",
)
"""Columns that hold them: this project's own, slime's and verl's, and what others write."""
ROUNDING = 1e-3
"""How far above 0 a log-probability may lie that was rounded."""


def find(get: Callable[[str], Any]) -> Any:
    """The first column of a row that holds log-probabilities; None where there is none.

    Args:
        get: Gives a row's value by the name of its column, None where it has none.
    """
    return next((value for name in NAMES if (value := get(name)) is not None), None)


def read(value: Any, response_ids: Sequence[int]) -> tuple[float, ...] | None:
    """One natural logarithm per response token, NaN where the engine gave none.

    Args:
        value: As the file has it: a list of numbers, of [number, id] or of {id: number}, or an
            object that holds such a list as `token_logprobs` or `content`.
        response_ids: The response's tokens, as the file has them.

    Returns:
        The values; None where they are not one per token, or are no log-probabilities of them.
    """
    if isinstance(value, Mapping):
        value = value.get("token_logprobs", value.get("content"))
    entries = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(entries, list | tuple) or len(entries) != len(response_ids):
        return None
    found: list[float] = []
    for entry, token in zip(entries, response_ids):
        value_of = _one(entry, token)
        if value_of is None or value_of > ROUNDING:
            return None
        found.append(value_of if math.isnan(value_of) else min(value_of, 0.0))
    return None if all(map(math.isnan, found)) else tuple(found)


def _one(entry: Any, token: int) -> float | None:
    """The value of one token; NaN where it has none, None where it belongs to another token."""
    if isinstance(entry, Mapping):
        if "logprob" in entry:
            return _one(entry["logprob"], token)
        key = next((key for key in (str(token), token) if key in entry), None)
        return None if key is None else _one(entry[key], token)
    if isinstance(entry, list | tuple | np.ndarray):
        return _one(entry[0], token) if len(entry) >= 2 and entry[1] == token else None
    if entry is None:
        return math.nan
    if isinstance(entry, bool) or not isinstance(entry, int | float | np.number):
        return None
    return float(entry)


def of_kept(
    values: Sequence[float],
    given: Sequence[int],
    kept: Sequence[int],
    own: Sequence[bool] | None = None,
) -> tuple[float, ...] | None:
    """The values of those response tokens that were kept.

    Args:
        values: A value per given token.
        given: The response's tokens in the file.
        kept: What became of them: a stretch of them without padding.
        own: For each given token, whether the student wrote it; values of others say nothing.

    Returns:
        A value per kept token; None where the kept tokens are no stretch of the given ones.
    """
    places = range(len(given) - len(kept) + 1)
    first = next((o for o in places if tuple(given[o : o + len(kept)]) == tuple(kept)), None)
    if first is None:
        return None
    theirs = own is not None and len(own) == len(values)
    marked = [
        math.nan if theirs and own is not None and not own[place] else value
        for place, value in enumerate(values)
    ]
    found = tuple(marked[first : first + len(kept)])
    return None if all(map(math.isnan, found)) else found
