"""The tables of a page as HTML: folded away, filtered and sorted by the page's script, and packed
where they are long.

A number has as many digits as its interval allows: two of half the interval's width, which the
value and both ends share; three digits where it has none. The script writes packed rows by the same
rule.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.analysis.claims import p_words
from diagnostics.core.schema import SCHEMA
from diagnostics.core.shown import MOST_DECIMALS, by_uncertainty
from diagnostics.report import naming, summary
from diagnostics.report.catalogue import TABLES, caption
from diagnostics.report.run_tables import RunTables
from diagnostics.report.tokenview import script_json

ROWS_WRITTEN = 60
"""Rows up to which a table is written out as HTML; longer ones are packed."""
DIGITS = 3
"""Significant digits of a number without an interval."""
LONG = 48
"""Characters from which a text gets a column of its own width."""
FILTERED = (
    "claim",
    "criterion",
    "other",
    "rival",
    "budget",
    "horizon",
    "outcome",
    "measure",
    "population",
    "split",
    "group",
    "method",
    "kind",
    "statistic",
    "score",
    "proxy",
    "k",
    "quadrant",
    "model",
    "term",
    "scope",
    "rollouts",
    "verdict",
    "recommended",
)
"""Columns by which a reader can filter where they hold more than one value."""
RESULTS = ("reason", "sentence", "message", "changes_verdict")
"""Texts that say what follows; they stand before the numbers behind it."""
FIRST_NUMBERS = ("over_random", "minus_random")
"""Comparisons that a table is read for; they stand before its other numbers."""
MOST_CHOICES = 80
"""Values of a column up to which it has a filter."""


OF_DECISION = ("decision", "intervention")
"""Tables that open on the rows on which the decision rests."""
NOT_OPENED = ("verdicts",)
"""Tables that open whole, because a reader compares their kinds and outcomes."""


def all_tables(run: RunTables) -> str:
    """Every table of a run that has rows, in the catalogue's order."""
    return "".join(
        table_block(name, run.tables[name], opening=opening(run, name))
        for name in _table_order(run)
    )


def opening(run: RunTables, name: str) -> dict[str, Any]:
    """What a table's filters are set to when it opens, so that it shows what the page rests on.

    Args:
        run: The run's manifest and tables.
        name: The table.

    Returns:
        Column -> value: divergence, horizon and kind of rollouts of the decision for its own
        tables, and the registered outcome and population for the others. Empty where no row is so.
    """
    table, decided = run.tables[name], run.table("decision")
    wanted: dict[str, Any] = {}
    if name in OF_DECISION and decided is not None and {"measure", "horizon"} <= set(decided):
        wanted = {
            "measure": naming.decisive_measure(decided),
            "horizon": naming.decisive_horizon(decided),
            "rollouts": "all",
        }
    elif name not in (*OF_DECISION, *NOT_OPENED):
        choices = (run.manifest.get("primary") or {}).get("choices", {})
        population = choices.get("population")
        wanted = {"outcome": choices.get("outcome"), "split": population, "population": population}
    there = {column: value for column, value in wanted.items() if column in table}
    rows = pd.Series(True, table.index)
    for column, value in there.items():
        rows &= table[column] == value
    return there if rows.any() else {}


def _table_order(run: RunTables) -> list[str]:
    names = [name for name in run.tables if run.table(name) is not None]
    return [name for name in TABLES if name in names] + [
        name for name in names if name not in TABLES
    ]


def table_block(
    name: str,
    table: pd.DataFrame,
    *,
    opening: Mapping[str, Any] | None = None,
    folder: str = "",
) -> str:
    """A folded table; the page's script filters and sorts it, and builds a long one when opened.

    Args:
        name: The table's name; its caption comes from the catalogue.
        table: The table, with at least one row.
        opening: Column -> value that its filters are set to when it opens.
        folder: Folder below tables/ that holds it, where it lies in one.

    Returns:
        HTML of a details element. A table of up to `ROWS_WRITTEN` rows is written out; a longer one
        is packed as JSON, which is a fifth of its size as HTML. What a reader looks for first
        stands in the first columns.
    """
    shown = table[columns_in_order(table)]
    rows = packed = ""
    if len(table) <= ROWS_WRITTEN:
        rows = written_rows(shown)
    else:
        packed = f'<script type="application/json">{_packed(shown)}</script>'
    place = html.escape(f"{folder}/{name}" if folder else name)
    return (
        f'<details id="table-{place.replace("/", "-")}" class="table"><summary>'
        f"<b>{html.escape(name)}</b>"
        f' {html.escape(caption(name))} <span class="quiet">{_rows(len(table))};'
        f' tables/{place}.csv</span></summary><div class="scroll"'
        f' tabindex="0"><table><thead><tr>{_heads(shown, opening or {})}</tr></thead>'
        f'<tbody>\n{rows}</tbody></table></div><button type="button" class="copy">Copy as CSV'
        f"</button>{packed}</details>"
    )


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count != 1 else ''}"


def columns_in_order(table: pd.DataFrame) -> list[str]:
    """The columns as a reader needs them: what tells rows apart, comparisons, reasons, the rest."""
    names = [str(name) for name in table.columns]
    numbers = [name + end for name in FIRST_NUMBERS for end in ("", "_low", "_high")]
    varying = [name for name in FILTERED if name in names and table[name].nunique() > 1]
    first = [name for name in (*varying, *numbers, *RESULTS) if name in names]
    return [*first, *(name for name in names if name not in first)]


# --- heads ---


def _heads(table: pd.DataFrame, opening: Mapping[str, Any]) -> str:
    return "".join(_head(table, str(name), opening) for name in table.columns)


def _head(table: pd.DataFrame, name: str, opening: Mapping[str, Any]) -> str:
    """A column's head: its name and unit, and for the script how to sort, filter and round it."""
    ends = interval_of(table, name)
    columns = list(table.columns)
    data = {
        "name": name,
        "half": ",".join(str(columns.index(end)) for end in ends) if ends else "",
        "filter": "yes" if _can_filter(table, name) else "",
        "opens": str(opening.get(name, "")) if _can_filter(table, name) else "",
        "first": "up" if _rises(table, name) else "",
    }
    said = "".join(f' data-{key}="{html.escape(text)}"' for key, text in data.items() if text)
    unit = unit_of(table, name)
    unit = f' <span class="unit">{html.escape(unit)}</span>' if unit else ""
    kind = ' class="number"' if _is_number(table[name]) else ""
    return (
        f'<th scope="col"{kind}{said}><button type="button">{html.escape(name)}{unit}</button></th>'
    )


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _can_filter(table: pd.DataFrame, name: str) -> bool:
    return name in FILTERED and 1 < table[name].nunique() <= MOST_CHOICES


def _rises(table: pd.DataFrame, name: str) -> bool:
    """True for a column whose best or first value is its smallest."""
    small = re.match(r"p_|error|prompts_needed|steps_needed|.*_rank$", name)
    return bool(small) or name in FILTERED or not _is_number(table[name])


def interval_of(table: pd.DataFrame, name: str) -> tuple[str, str] | None:
    """The columns with the ends of the interval of a column, which shares its digits with them.

    Args:
        table: The table.
        name: A column; one end of an interval counts as its own.

    Returns:
        The names of the low and the high end; None for a column without an interval.
    """
    if not _is_number(table[name]):
        return None
    base = re.sub(r"_?(low|high)$", "", name)
    if base == name and f"{name}_low" not in table and _before(table, "low") == name:
        base = ""
    ends = (f"{base}_low", f"{base}_high") if base else ("low", "high")
    bounds_a_value = bool(base) or _before(table, "low") is not None
    held = all(end in table and _is_number(table[end]) for end in ends)
    return ends if held and bounds_a_value else None


def _before(table: pd.DataFrame, name: str) -> str | None:
    """The column of numbers just before another one; None where there is none."""
    columns = [str(column) for column in table.columns]
    at = columns.index(name) - 1 if name in columns else -1
    return columns[at] if at >= 0 and _is_number(table[columns[at]]) else None


OF_ROW = ("mean", "residual", "reduction")
"""Columns that have the unit of the outcome or the measure that their row names."""
CONTRASTS = ("groups", "caliper")
"""Columns of tables whose column difference has that unit too."""
NATS = re.compile(
    r"(over_|minus_(random|full)|effect|error_|margin$|smallest_detectable|reduction|gain(_|$)"
    r"|context_gain|drop$|.*_drop$|mean_gain|mean_abs_gain|step_mean|held_out_|bottom_mean|top_mean"
    r"|forward_kl|reverse_kl|divergence$)"
)
"""Names of columns of nats."""
NO_UNIT = re.compile(r".*(_rank|_share|share|_p|coefficient)$")


def unit_of(table: pd.DataFrame, name: str) -> str:
    """The unit of a column, for its head; empty where it has none."""
    if not _is_number(table[name]) or NO_UNIT.match(name):
        return ""
    value = _before(table, "low") if name in ("low", "high") else name
    if value in OF_ROW or (value == "difference" and set(CONTRASTS) & set(table.columns)):
        return _unit_of_rows(table)
    if name in SCHEMA and SCHEMA[name].unit in ("nats", "tokens") and name != "position":
        return SCHEMA[name].unit
    return "nats" if NATS.match(name) else ""


def _unit_of_rows(table: pd.DataFrame) -> str:
    """The unit of values whose rows name an outcome or a measure."""
    if "outcome" in table:
        units = {naming.UNITS.get(name, "") for name in table["outcome"].unique()}
    elif "measure" in table:
        units = {"" if "accuracy" in str(name) else "nats" for name in table["measure"].unique()}
    else:
        units = {"nats"}
    return units.pop() if len(units) == 1 else "unit by row"


# --- cells ---


def written_rows(table: pd.DataFrame) -> str:
    """The rows of a table as HTML."""
    names = [str(name) for name in table.columns]
    halves = {name: half_widths(table, name) for name in names}
    rows = []
    for at, row in enumerate(table.itertuples(index=False)):
        cells = zip(names, row, strict=True)
        rows.append("".join(_cell(value, name, halves[name][at]) for name, value in cells))
    return "".join(f"<tr>{row}</tr>\n" for row in rows)


def half_widths(table: pd.DataFrame, name: str) -> np.ndarray:
    """Half of the interval of each row of a column, NaN where there is none."""
    ends = interval_of(table, name)
    if ends is None:
        return np.full(len(table), np.nan)
    low, high = (table[end].to_numpy(dtype=float) for end in ends)
    with np.errstate(invalid="ignore"):
        return (high - low) / 2


def small_table(table: pd.DataFrame) -> str:
    """A few rows written out under readable heads, for the text of a page."""
    heads = "".join(
        f'<th class="plain{" number" if _is_number(table[name]) else ""}" scope="col">'
        f"{html.escape(summary.readable(str(name)))}</th>"
        for name in table.columns
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n'
        f"{written_rows(table)}</tbody></table></div>"
    )


def _cell(value: Any, name: str = "", half: float = math.nan) -> str:
    """A table cell; six digits of a number stand beside what is shown, for sorting and copying."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        text = "" if value is None or value is pd.NA else str(value)
        shown_text = summary.minus(text)
        kind = ' class="long"' if len(text) > LONG else ""
        kind += f' data-v="{html.escape(text)}"' if shown_text != text else ""
        return f"<td{kind}>{html.escape(shown_text)}</td>"
    if pd.isna(value):
        return '<td class="number" data-v=""></td>'
    exact = _packed_number(value)
    text = html.escape(shown(float(exact), name, half))
    exact = f"{exact:.6g}" if isinstance(exact, float) else exact
    return f'<td class="number" data-v="{exact}">{text}</td>'


def shown(value: float, name: str = "", half: float = math.nan) -> str:
    """A number as a table shows it.

    Args:
        value: The number.
        name: Its column: a p value is written as in sentences, a budget in per cent.
        half: Half the width of its interval, NaN where it has none.

    Returns:
        Two significant digits of the half width decide the decimals; without one, three significant
        digits of the number itself. Minus signs are minus signs.
    """
    if not math.isfinite(value):
        return "−∞" if value < 0 else "∞"
    if name.startswith("p_"):
        return p_words(value).removeprefix("p ").removeprefix("= ")
    if name == "budget":
        return f"{float(f'{100 * value:.6g}'):g} %"
    if not (math.isfinite(half) and half > 0):
        return (
            f"{value:,.0f}".replace("-", "−") if value == int(value) else summary.number(value, 3)
        )
    if 1 - math.floor(math.log10(half)) > MOST_DECIMALS:
        return summary.number(value, 2)
    return by_uncertainty(value, half).replace("-", "−")


def _packed(table: pd.DataFrame) -> str:
    """Columns as JSON: numbers with six digits, null where undefined, once where all are equal;
    text as distinct values and an index.
    """
    columns: list[Any] = []
    for name in table:
        values = table[name]
        if _is_number(values):
            packed = [_packed_number(value) for value in values]
            one = len(set(packed)) == 1
            columns.append({"value": packed[0], "count": len(packed)} if one else packed)
        else:
            codes, texts = pd.factorize(values.astype(object).where(values.notna(), "").astype(str))
            columns.append({"texts": list(texts), "codes": codes.tolist()})
    return script_json(columns)


def _packed_number(value: float) -> float | int | str | None:
    """A number with six digits, an integer where it is one, None where it is undefined; JSON has no
    infinity, which is its name in the page's script.
    """
    if pd.isna(value):
        return None
    if not math.isfinite(value):
        return "-Infinity" if value < 0 else "Infinity"
    return int(value) if value == int(value) else float(f"{value:.6g}")
