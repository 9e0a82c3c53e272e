"""A token view as text for a terminal: colors as ANSI escapes, plain where there are none."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

HIGH, LOW = (97, 168, 207), (229, 155, 97)
"""Background at the upper end of a color scale, and at the lower one of a signed scale; black text
can be read on both and on all between them and white.
"""
FAINT = 0.05
"""Share of the scale below which a token keeps the terminal's own colors."""
RESET, DIM = "\x1b[0m", "\x1b[2m"


def in_color() -> bool:
    """Whether what is printed may hold escapes: to a terminal or a notebook, unless NO_COLOR is
    set; FORCE_COLOR asks for them everywhere.
    """
    if os.environ.get("NO_COLOR"):
        return False
    notebook = "ipykernel" in sys.modules
    return bool(os.environ.get("FORCE_COLOR")) or notebook or sys.stdout.isatty()


@dataclass(frozen=True)
class Printed:
    """Contexts with the share of the color scale that each token reaches."""

    title: str = ""
    contexts: tuple[tuple[str, str, int], ...] = ()
    """Id, prompt and number of positions of each."""
    tokens: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    """From -1 (the lower end of a signed scale) over 0 to 1; NaN where undefined."""
    gap: str = ""
    """What stands between tokens that hold no spaces of their own."""

    def text(self, *, color: bool) -> str:
        """The contexts one after the other."""
        return "\n".join([self.title, *self._lines(color)])

    def _lines(self, color: bool) -> Iterator[str]:
        at = 0
        for name, prompt, length in self.contexts:
            part = range(at, at + length)
            at += length
            dim, reset = (DIM, RESET) if color else ("", "")
            yield f"\n{dim}{printable(name)} · {printable(prompt)}{reset}"
            shown = (self._token(i, color) for i in part)
            yield self.gap.join(shown)

    def _token(self, i: int, color: bool) -> str:
        text, share = printable(self.tokens[i]), self.shares[i]
        line = "\n" if "\n" in self.tokens[i] else ""
        if not color or not abs(share) >= FAINT:
            return text + line
        red, green, blue = tint(share)
        return f"\x1b[30;48;2;{red};{green};{blue}m{text}{RESET}{line}"


def tint(share: float) -> tuple[int, int, int]:
    """White mixed with the color of an end of the scale, as far as a share reaches to it."""
    end, reach = (HIGH if share >= 0 else LOW), min(1.0, abs(share))
    red, green, blue = (round(255 + reach * (channel - 255)) for channel in end)
    return red, green, blue


def printable(text: str) -> str:
    """Text without characters that would steer a terminal; a line break gets a sign."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join("·" if unicodedata.category(one)[0] == "C" else one for one in text)
