"""The words that a page explains: the glossary folded into it, and links to it from sentences."""

from __future__ import annotations

import functools
import html
import re
from pathlib import Path

STATIC = Path(__file__).parent / "static"


def glossary() -> str:
    """The methods with the folded glossary, whose rows have the ids `term-…`."""
    return (STATIC / "methods.html").read_text(encoding="utf-8")


KEPT = re.compile(
    r"(<code>.*?</code>|<b>.*?</b>|<h3>.*?</h3>|<a\b.*?</a>"
    r"|<span class=\"(?:verdict|tag).*?</span>|<[^>]+>)"
)
"""What is left without links: tags, code, headings, verdicts, and other links."""


@functools.cache
def _terms() -> dict[str, str]:
    """Each explained word with the id of its row."""
    rows = re.findall(r'<tr id="(term-[a-z0-9-]+)" data-words="([^"]+)">', glossary())
    return {html.unescape(word): row for row, words in rows for word in words.split("|")}


@functools.cache
def _pattern() -> re.Pattern[str]:
    longest_first = sorted(_terms(), key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b")


def linked(text: str) -> str:
    """HTML in which the first mention of each explained word links to the glossary.

    Args:
        text: HTML of a paragraph or more, without links.

    Returns:
        The same with links; tags, code and headings are left as they are.
    """
    seen: set[str] = set()

    def link(match: re.Match[str]) -> str:
        row = _terms()[match[1]]
        if row in seen:
            return match[0]
        seen.add(row)
        return f'<a class="term" href="#{row}">{match[0]}</a>'

    return "".join(
        part if part.startswith("<") else _pattern().sub(link, part) for part in KEPT.split(text)
    )
