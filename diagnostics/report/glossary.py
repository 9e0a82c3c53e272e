"""The words that a page explains: the glossary folded into it, and links to it from sentences."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Collection
from pathlib import Path

from diagnostics import criteria as registry
from diagnostics.report.naming import readable
from diagnostics.report.summary import minus

STATIC = Path(__file__).parent / "static"


PLAIN = ("random", "full", "early", "late", "dial", "power", "sure", "tails")
"""Criteria whose names are words of every sentence, which link to nothing."""


@functools.cache
def glossary() -> str:
    """The methods with the folded glossary and the criteria, whose rows have the ids `term-…`."""
    text = (STATIC / "methods.html").read_text(encoding="utf-8")
    known = {word for words in re.findall(WORDS, text) for word in words[1].split("|")}
    return text.replace("<!-- criteria -->", _criteria(known))


WORDS = r'<tr id="(term-[a-z0-9-]+)" data-words="([^"]+)">'


def _criteria(known: Collection[str]) -> str:
    """Every registered criterion with its formula; those that no other row explains are linked."""
    rows = ""
    for name in registry.list_criteria().index:
        rule = registry.find(name)
        if rule.mine:
            continue
        word = readable(name)
        words = "" if word in known or name in PLAIN else f' data-words="{html.escape(word)}"'
        low = "; the smallest first" if rule.direction == "low" else ""
        formula = html.escape(typeset(rule.formula))
        rows += (
            f'<tr id="term-criterion-{name.replace("_", "-")}"{words}><th scope="row">'
            f"{html.escape(word)}</th><td>{formula}{low}</td></tr>\n"
        )
    return (
        '<details id="criteria" class="glossary"><summary><b>Criteria</b> and their'
        f' scores</summary><table class="facts"><tbody>\n{rows}</tbody></table></details>'
    )


def typeset(text: str) -> str:
    """A formula or sentence of the analysis as print has it: signs for products and for minus."""
    text = re.sub(r"(?<=[\w)])\*(?=[\w(])", "·", text).replace("||", "‖")
    text = re.sub(r"(?<=[\w)]) - (?=[\w(])", " − ", text)
    return minus(re.sub(r"^-(?=[A-Z])", "−", text))


KEPT = re.compile(
    r"(<code>.*?</code>|<b>.*?</b>|<h3>.*?</h3>|<a\b.*?</a>"
    r"|<span class=\"(?:verdict|tag).*?</span>|<[^>]+>)"
)
"""What is left without links: tags, code, headings, verdicts, and other links."""


@functools.cache
def _terms() -> dict[str, str]:
    """Each explained word with the id of its row."""
    rows = re.findall(WORDS, glossary())
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
