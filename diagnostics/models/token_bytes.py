"""The bytes that each token of a tokenizer stands for.

Two tokenizers agree on nothing but the bytes of a text, so tokens of different vocabularies are
compared by these. Byte-level tokenizers (GPT-2, Llama 3, Qwen) write every byte as one character of
an alphabet of 256; SentencePiece's (Llama 2, Gemma, Mistral) write a space as `▁` and rare bytes as
`<0x0A>`. What a tokenizer does is read from its decoder; others, such as WordPiece, lose spaces and
are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.special_tokens import special_ids

BYTE_LEVEL = "ByteLevel"
SENTENCE_PIECE = ("Metaspace", "ByteFallback")
SPACE = "▁"
ANCHOR = "\n"
"""Text behind which SentencePiece puts no space."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level tokenizers write.

    Printable characters of Latin-1 stand for themselves, and the other bytes, in their order, for
    the characters from U+0100 on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


class TokenBytes:
    """A tokenizer's tokens as bytes.

    Args:
        tokenizer: A tokenizer of transformers with a fast backend.
        what: Whose it is, for errors.

    Raises:
        DiagnosticsError: The bytes of its tokens cannot be told.
    """

    def __init__(self, tokenizer: Any, what: str = "tokenizer"):
        self.tokenizer, self.what = tokenizer, what
        self.special = special_ids(tokenizer)
        self._added = getattr(tokenizer, "added_tokens_decoder", {})
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = BYTE_LEVEL in kinds
        if not self._byte_level and not kinds.intersection(SENTENCE_PIECE):
            raise DiagnosticsError(
                f"The {what} writes its text with {', '.join(sorted(kinds)) or 'no decoder'}, from"
                " which the bytes of a token cannot be told. Coverage needs a byte-level or"
                " SentencePiece tokenizer."
            )
        self._alphabet = byte_alphabet()
        self._known: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def of(self, token_id: int) -> bytes:
        """Return the bytes of one token; of a special token, those of its name."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._bytes_of(token_id)
        return found

    def _bytes_of(self, token_id: int) -> bytes:
        text = self.tokenizer.convert_ids_to_tokens(token_id)
        if text is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        if not self._byte_level:
            byte = BYTE_TOKEN.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()
        if not self._alphabet.keys() >= set(text):  # a token that was added before the alphabet
            return text.encode()
        return bytes(self._alphabet[character] for character in text)

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The id of each ordinary token by its bytes; the lowest where several share them."""
        found: dict[bytes, int] = {}
        for token_id in sorted(self.tokenizer.get_vocab().values(), reverse=True):
            if token_id not in self.special:
                found[self.of(token_id)] = token_id
        found.pop(b"", None)
        return found

    @cached_property
    def special_names(self) -> dict[bytes, int]:
        """The id of each special token by the bytes of its name."""
        return {self.of(token_id): token_id for token_id in sorted(self.special)}

    def encode(self, text: bytes) -> list[tuple[int, bytes]] | None:
        """Tokenize a text as one that goes on behind another.

        SentencePiece puts a space before every text. Behind a prompt there is none, so a text that
        begins otherwise is tokenized behind a line break, and one that begins with a space is given
        without it.

        Args:
            text: The text in UTF-8.

        Returns:
            Each token's id and bytes, which together are the text's. None where the bytes are no
            UTF-8, or the tokenizer does not write them back.
        """
        try:
            whole = text.decode()
        except UnicodeDecodeError:
            return None
        if not self._puts_space:
            return self._written_back(whole, text)
        if whole.startswith(" "):
            return self._written_back(whole[1:], text)
        anchored = self._written_back(f"{ANCHOR}{whole}", f" {ANCHOR}".encode() + text)
        return None if anchored is None else _behind(anchored, len(ANCHOR) + 1)

    @cached_property
    def _puts_space(self) -> bool:
        """Whether the tokenizer puts a space before every text."""
        ids: Iterable[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return b"".join(map(self.of, ids)) == b" a"

    def _written_back(self, given: str, expected: bytes) -> list[tuple[int, bytes]] | None:
        """The tokens of a text, None where their bytes are not as expected."""
        ids: Iterable[int] = self.tokenizer(given, add_special_tokens=False)["input_ids"]
        found = [(token_id, self.of(token_id)) for token_id in ids]
        return found if b"".join(piece for _, piece in found) == expected else None


def _behind(found: list[tuple[int, bytes]], place: int) -> list[tuple[int, bytes]] | None:
    """The tokens behind so many bytes; None where one token holds both sides."""
    while found and place > 0:
        place -= len(found[0][1])
        found = found[1:]
    return found if place == 0 else None


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The types of a fast tokenizer's decoder, and of those that it consists of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    waiting, kinds = [json.loads(backend.to_str()).get("decoder")], set()
    while waiting:
        part = waiting.pop()
        if not part:
            continue
        replaces_space = part.get("type") == "Replace" and part.get("content") == " "
        kinds.add("Metaspace" if replaces_space else part["type"])
        waiting += part.get("decoders", [])
    return kinds
