"""Exact, bound or undefined: what each number means with a top-K teacher.

A top-K teacher is known only by lists of its K most likely tokens per position. A token table says
so itself: it has the column `teacher_tail_mass`. Every table made from it then gets a column
`exactness`, and the table `exactness` lists all measurements. For a teacher with full logits these
functions return their input unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from diagnostics import criteria as registry
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import SCHEMA, column, support_column

TAIL_COLUMN = "teacher_tail_mass"
NO_TAIL = 2e-6
"""Tail mass up to which a bound is as good as exact."""
NAMING_COLUMNS = (
    "outcome",
    "measurement",
    "measure",
    "score",
    "criterion",
    "other",
    "proxy",
    "term",
)
"""Columns of result tables whose cells name a measurement, an outcome or a criterion."""
MEANING = {
    "exact": "as with full logits of the teacher",
    "lower bound": "all tokens outside the list count as one: never above the exact value",
    "where listed": "exact where the list holds the tokens it needs, undefined elsewhere",
    "impossible": "not determined by lists of this depth, and left out",
    "change of a bound": "the exact fall of a lower bound, no bound of the exact fall",
}


def is_listed(tokens: pd.DataFrame) -> bool:
    """True where the table's teacher is known by top-K lists alone."""
    return TAIL_COLUMN in tokens


OF_GAINS = dict.fromkeys(("strata", "null_share"), "change of a bound")
"""Exactness of tables of gains whose rows name no measurement."""


def exactness_table(tokens: pd.DataFrame) -> pd.DataFrame:
    """How exact each measurement of a table with a top-K teacher is.

    A lower bound is exact where the tail is empty; compatibility also where the list holds the
    student's whole top K.

    Args:
        tokens: A token table.

    Returns:
        One row per measurement with columns measurement, exactness, defined and exact (shares of
        positions), meaning; empty for a teacher with full logits.
    """
    rows = [_row(tokens, name) for name in _expected(tokens)] if is_listed(tokens) else []
    return pd.DataFrame(rows, columns=["measurement", "exactness", "defined", "exact", "meaning"])


def _expected(tokens: pd.DataFrame) -> Iterator[str]:
    """Measurements and outcomes in schema order: those that the table has, and those that a teacher
    with full logits would have given.
    """
    sizes = [
        size
        for base, _, size in (str(name).rpartition("_k") for name in tokens)
        if base == "compatibility" and size.isdigit()
    ]
    for name, entry in SCHEMA.items():
        if (
            entry.stage in ("before",)
            and not entry.imported
            and not entry.on_request
            and name != TAIL_COLUMN
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
        sure = tokens[TAIL_COLUMN] <= NO_TAIL
        covered = name.replace("compatibility", "bhattacharyya")
        if name.startswith("compatibility") and covered in tokens:
            sure |= tokens[covered].notna()
        exact = float((sure & tokens[name].notna()).mean())
    return name, status, defined, exact, MEANING[status]


def marked(
    tables: Mapping[str, pd.DataFrame], tokens: pd.DataFrame, *, otherwise: str | None = None
) -> dict[str, pd.DataFrame]:
    """Add a column `exactness` to tables made with a top-K teacher.

    Args:
        tables: Tables by name.
        tokens: The token table that they are made from.
        otherwise: Exactness of a table whose rows name no measurement; None leaves it without one.

    Returns:
        The tables; unchanged where the teacher has full logits.
    """
    return (
        {
            name: _marked(frame, tokens, otherwise or OF_GAINS.get(name))
            for name, frame in tables.items()
        }
        if is_listed(tokens)
        else dict(tables)
    )


def _marked(frame: pd.DataFrame, tokens: pd.DataFrame, otherwise: str | None) -> pd.DataFrame:
    names = [
        name
        for name in NAMING_COLUMNS
        if name in frame and frame[name].map(lambda cell: isinstance(cell, str)).any()
    ]
    if not len(frame) or "exactness" in frame or not (names or otherwise):
        return frame
    if not names:
        return frame.assign(exactness=otherwise)
    return frame.assign(
        exactness=[_of_row(cells, tokens) for cells in frame[names].itertuples(index=False)]
    )


def _of_row(cells: tuple, tokens: pd.DataFrame) -> str:
    """Every measurement behind a row that is not exact, with its exactness; `exact` where there is
    none.
    """
    found = {name: column(name).listed for cell in cells for name in _measurements(cell, tokens)}
    said = [f"{name}: {status}" for name, status in found.items() if status != "exact"]
    return "; ".join(said) or "exact"


def _measurements(cell, tokens: pd.DataFrame) -> tuple[str, ...]:
    """The columns that a cell stands for: itself, or those that its criterion reads."""
    if not isinstance(cell, str):
        return ()
    if column(cell) is not None:
        return (cell,)
    try:
        read = registry.find(cell).columns(tokens).values()
        return tuple(name for name in read if column(name) is not None)
    except DiagnosticsError:
        return ()
