"""What a result says of itself where it is printed: its parts in short, and a number's digits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 1400
"""Characters of what is printed. A shell shows the whole of it, so it has to stay short."""
MOST_DECIMALS = 7
"""Decimals from which a number is written with an exponent."""


def by_uncertainty(value: float, half: float = math.nan, *, sign: bool = False) -> str:
    """A number with as many digits as its interval allows.

    Args:
        value: The number.
        half: Half the width of its interval, NaN where it has none.
        sign: Whether a positive number gets a plus.

    Returns:
        Two significant digits of the half width decide the decimals; without one, three significant
        digits of the number itself. An undefined value is an en dash, and zero has no sign.
    """
    if not math.isfinite(value):
        return "–"
    plus = "+" if sign else ""
    if not (math.isfinite(half) and half > 0):
        return f"{value:{plus}.3g}"
    decimals = 1 - math.floor(math.log10(half))
    if decimals > MOST_DECIMALS:
        mantissa, power = f"{value:{plus}.1e}".split("e")
        return f"{mantissa}e{int(power)}"
    text = f"{value:{plus},.{max(decimals, 0)}f}"
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def sizes(title: str, parts: Mapping[str, Sized | None]) -> str:
    """A result in a few lines: what it is, then every part with its number of rows.

    Args:
        title: What the result is.
        parts: Its tables by name; those that are None are left out.

    Returns:
        At most `LONGEST` characters.
    """
    listed = ", ".join(
        f"{name} ({len(part):,})" for name, part in parts.items() if part is not None
    )
    return cut(f"{title}: {listed or 'nothing'}")


def cut(text: str, longest: int = LONGEST) -> str:
    """A text, or its beginning and a mark where it is longer."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


class Tables(dict[str, "pd.DataFrame"]):
    """Tables by name. Printed, it says which there are and how many rows each has."""

    def __repr__(self) -> str:
        return sizes(f"{len(self)} tables (rows)", self)

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(name)}</td><td style='text-align:right'>{len(table):,}</td>"
            "<td style='text-align:left'>"
            f"{escape(cut(', '.join(map(str, table.columns)), 90))}</td></tr>"
            for name, table in self.items()
        )
        return f"<table><tr><th>table</th><th>rows</th><th>columns</th></tr>{rows}</table>"
