"""Texts of tokens: whether a server's tokenizer is the student's, and which id a text is.

A server writes a token as its text, as its entry in the vocabulary (`Ġthe`, `▁the`), or as the text
that it has behind the tokens before it. Part of a character has no text of its own, so that such
tokens cannot be compared. Spaces at the ends are left out of a comparison: some tokenizers drop
them where a token is decoded alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART = "\ufffd"
"""What stands for part of a character."""
SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"})
"""How vocabularies write spaces."""


class Spelling:
    """The texts of a tokenizer's tokens.

    Args:
        tokenizer: The student's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer: Any = tokenizer
        self._texts: dict[int, tuple[str, ...]] = {}

    def texts(self, token: int) -> tuple[str, ...]:
        """How a token may be written; nothing for an id that the tokenizer does not know."""
        if token not in self._texts:
            entry = self._tokenizer.convert_ids_to_tokens(token) if token in self._known else None
            alone = self._tokenizer.decode([token]) if entry is not None else None
            found = [] if entry is None else [str(entry), str(alone)]
            self._texts[token] = tuple(dict.fromkeys(found))
        return self._texts[token]

    def differs(self, token: int, text: str) -> bool | None:
        """Whether the server's text of a token is another one than here; None where no text tells:
        for part of a character, and for an id that this tokenizer does not know.
        """
        known = self.texts(token)
        if not known or PART in text or any(PART in each for each in known):
            return None
        return bare(text) not in {bare(each) for each in known}

    def ids_of(self, text: str) -> Sequence[int]:
        """The ids that a text may stand for; only one of them is certain."""
        return self._by_text.get(text, ()) or self._by_entry.get(text, ())

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_vocab().values())

    @cached_property
    def _by_text(self) -> dict[str, Sequence[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for token in sorted(self._known):
            found[self._tokenizer.decode([token])].append(token)
        return dict(found)

    @cached_property
    def _by_entry(self) -> dict[str, Sequence[int]]:
        return {entry: [token] for entry, token in self._tokenizer.get_vocab().items()}


def bare(text: str) -> str:
    """A text as it is compared: without the spaces around it, as every vocabulary writes them."""
    return text.translate(SPACES).strip()
