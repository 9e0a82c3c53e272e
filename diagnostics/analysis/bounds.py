"""What a number is worth when the teacher is known by lists of its likeliest tokens alone: exact, a
bound, or nothing.

A token table says so itself: it has `teacher_tail_mass`. Then every table made of it gets a column
`exactness`, and there is one table that goes through the measurements. With a teacher that was run,
nothing here does anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from diagnostics import criteria as registry
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import SCHEMA, column, support_column

TAIL = "teacher_tail_mass"
NO_TAIL = 2e-6
"""Tail mass up to which a bound is as good as exact."""
NAMES = ("outcome", "measurement", "measure", "score", "criterion", "other", "proxy", "term")
"""Columns of tables whose cells name a measurement, an outcome or a criterion."""
MEANING = {
    "exact": "as with a teacher that was run",
    "lower bound": "what is outside the list counts as one token: never above the exact value",
    "where listed": "exact where the list holds the tokens it needs, undefined elsewhere",
    "impossible": "not determined by lists of this depth, and left out",
    "change of a bound": "the exact fall of a lower bound, no bound of the exact fall",
}


def is_listed(tokens: pd.DataFrame) -> bool:
    """The table's teacher is known by lists alone."""
    return TAIL in tokens


def table(tokens: pd.DataFrame) -> pd.DataFrame:
    """One row a measurement: measurement, exactness, defined and exact (shares of positions),
    meaning. Empty for a teacher that was run.

    A lower bound is exact where the tail is empty; compatibility also where the list holds the
    student's whole top K."""
    rows = [_row(tokens, name) for name in _expected(tokens)] if is_listed(tokens) else []
    return pd.DataFrame(rows, columns=["measurement", "exactness", "defined", "exact", "meaning"])


def _expected(tokens: pd.DataFrame) -> Iterator[str]:
    """Measurements and outcomes in schema order: those that the table has, and those that a teacher
    that was run would have given.
    """
    sizes = [
        name.removeprefix("compatibility_k")
        for name in tokens
        if str(name).startswith("compatibility_k")
    ]
    for name, entry in SCHEMA.items():
        if (
            entry.stage in ("before",)
            and name != TAIL
            and not (name == "student_dropped_mass" and name not in tokens)
        ):
            yield from [
                name,
                *(support_column(name, int(size)) for size in sizes if entry.by_support),
            ]
        elif entry.stage in ("after", "outcome") and name in tokens:
            yield name


def _row(tokens: pd.DataFrame, name: str) -> tuple:
    status = column(name).listed if name in tokens else "impossible"
    defined = float(tokens[name].notna().mean()) if name in tokens else 0.0
    exact = {"exact": defined, "where listed": defined, "impossible": 0.0}.get(status)
    if exact is None:
        sure = tokens[TAIL] <= NO_TAIL
        covered = name.replace("compatibility", "bhattacharyya")
        if name.startswith("compatibility") and covered in tokens:
            sure |= tokens[covered].notna()
        exact = float((sure & tokens[name].notna()).mean())
    return name, status, defined, exact, MEANING[status]


def marked(
    tables: Mapping[str, pd.DataFrame], tokens: pd.DataFrame, *, otherwise: str | None = None
) -> dict[str, pd.DataFrame]:
    """The tables, each with a column `exactness` where the teacher is known by lists and a row
    names what it is about.

    otherwise: what a table says whose rows name nothing.
    """
    return (
        {name: _marked(frame, otherwise) for name, frame in tables.items()}
        if is_listed(tokens)
        else dict(tables)
    )


def _marked(frame: pd.DataFrame, otherwise: str | None) -> pd.DataFrame:
    names = [
        name
        for name in NAMES
        if name in frame and frame[name].map(lambda cell: isinstance(cell, str)).any()
    ]
    if not len(frame) or "exactness" in frame or not (names or otherwise):
        return frame
    if not names:
        return frame.assign(exactness=otherwise)
    return frame.assign(
        exactness=[_of_row(cells) for cells in frame[names].itertuples(index=False)]
    )


def _of_row(cells: tuple) -> str:
    """Every measurement behind a row that is not exact, with what it is; `exact` where there is
    none.
    """
    found = {name: column(name).listed for cell in cells for name in _measurements(cell)}
    said = [f"{name}: {status}" for name, status in found.items() if status != "exact"]
    return "; ".join(said) or "exact"


def _measurements(cell) -> tuple[str, ...]:
    """The columns that a cell stands for: itself, or what a criterion reads."""
    if not isinstance(cell, str):
        return ()
    if column(cell) is not None:
        return (cell,)
    try:
        return tuple(need for need in registry.find(cell).needs if column(need) is not None)
    except DiagnosticsError:
        return ()
