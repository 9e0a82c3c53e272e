"""The known name that a user probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.6
"""Likeness, as difflib measures it, from which on a known word is suggested."""
SURELY_ALIKE = 0.8
"""Likeness from which on a word is taken for a misspelled one."""
PART = 4
"""Letters from which on the beginning or end of a name is taken for the name."""


def nearest(word: str, known: Iterable[str], *, likeness: float = ALIKE) -> str:
    """The known word that is most like a word; empty where none is."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1, cutoff=likeness)), "")


def meant(word: str, known: Iterable[str]) -> str:
    """The known name that a word surely stands for, misspelled or in part; empty where none is."""
    names = list(known)
    near = nearest(word, names, likeness=SURELY_ALIKE)
    parts = [
        name
        for name in names
        if len(word) >= PART and (name.startswith(word) or name.endswith(f"_{word}"))
    ]
    return near or min(parts, key=len, default="")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The sentence that suggests the nearest known word, with a space before it, or nothing."""
    near = nearest(word, known)
    return f" Did you mean {near!r}?" if near else ""
