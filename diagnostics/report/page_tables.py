"""The tables of a page as HTML: folded away, sortable, and packed where they are long."""

from __future__ import annotations

import html
import math
from typing import Any

import pandas as pd

from diagnostics.analysis.claims import p_words
from diagnostics.report import summary
from diagnostics.report.catalogue import TABLES, caption
from diagnostics.report.run_tables import RunTables
from diagnostics.report.tokenview import script_json

ROWS_WRITTEN = 60
"""Rows up to which a table is written out as HTML; longer ones are packed."""


def all_tables(run: RunTables) -> str:
    """Every table of a run that has rows, in the catalogue's order."""
    return "".join(table_block(name, run.tables[name]) for name in _table_order(run))


def _table_order(run: RunTables) -> list[str]:
    names = [name for name in run.tables if run.table(name) is not None]
    return [name for name in TABLES if name in names] + [
        name for name in names if name not in TABLES
    ]


def table_block(name: str, table: pd.DataFrame) -> str:
    """A folded table; the page's script builds a long one when it is opened.

    Args:
        name: The table's name; its caption comes from the catalogue.
        table: The table, with at least one row.

    Returns:
        HTML of a details element. A table of up to `ROWS_WRITTEN` rows is written out; a longer one
        is packed as JSON, which is a fifth of its size as HTML.
    """
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(str(column))}</button></th>'
        for column in table.columns
    )
    rows = packed = ""
    if len(table) <= ROWS_WRITTEN:
        rows = written_rows(table)
    else:
        packed = f'<script type="application/json">{_packed(table)}</script>'
    return (
        f'<details id="table-{html.escape(name)}"><summary><b>{html.escape(name)}</b>'
        f' {html.escape(caption(name))} <span class="quiet">{len(table):,} rows;'
        f' tables/{html.escape(name)}.csv</span></summary><div class="scroll"'
        f' tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
        f'<button type="button" class="copy">Copy as CSV</button>{packed}</details>'
    )


def written_rows(table: pd.DataFrame) -> str:
    """The rows of a table as HTML."""
    names = [str(name) for name in table.columns]
    cells = (
        "".join(_cell(value, name) for name, value in zip(names, row, strict=True))
        for row in table.itertuples(index=False)
    )
    return "".join(f"<tr>{row}</tr>\n" for row in cells)


def small_table(table: pd.DataFrame) -> str:
    """A few rows written out under readable heads, for the text of a page."""
    heads = "".join(
        f'<th class="plain" scope="col">{html.escape(summary.readable(str(name)))}</th>'
        for name in table.columns
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n'
        f"{written_rows(table)}</tbody></table></div>"
    )


def _cell(value: Any, name: str = "") -> str:
    """A table cell; a number is rounded to four digits, and six stand beside it for sorting and
    copying. A p value is written as in sentences.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"<td>{html.escape(str(value))}</td>"
    if pd.isna(value):
        return '<td class="number" data-v=""></td>'
    if isinstance(value, int):
        return f'<td class="number" data-v="{value}">{value:,}</td>'
    if not math.isfinite(value):
        sign = "−" if value < 0 else ""
        return f'<td class="number" data-v="{_packed_number(value)}">{sign}∞</td>'
    shown = summary.number(value, 4) if value != int(value) else f"{value:,.0f}"
    if name.startswith("p_"):
        shown = html.escape(p_words(value).removeprefix("p ").removeprefix("= "))
    return f'<td class="number" data-v="{value:.6g}">{shown}</td>'


def _packed(table: pd.DataFrame) -> str:
    """Columns as JSON: numbers with six digits, null where undefined; text as distinct values and
    an index.
    """
    columns: list[Any] = []
    for name in table:
        values = table[name]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            columns.append([_packed_number(value) for value in values])
        else:
            codes, texts = pd.factorize(values.astype(str))
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
