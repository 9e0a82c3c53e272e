"""Rows of JSONL, parquet and CSV files, as they are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.limits import parse_json
from diagnostics.core.schema import read_parquet

if TYPE_CHECKING:
    import pandas as pd

EXACT = 2**53
"""Whole numbers from here on are not all told apart by a float."""


def missing(value) -> bool:
    """None, or what stands for a gap in a column: NaN, pandas' NA or NaT."""
    return (
        value is None
        or type(value).__name__ in ("NAType", "NaTType")
        or (isinstance(value, (float, np.floating)) and value != value)
    )


def require_unicode(text: str) -> None:
    """Raise DiagnosticsError for a text that holds half a surrogate pair, as JSON may: no tokenizer
    reads it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DiagnosticsError(
            f"The text {text[:40]!r} holds half a surrogate pair at character {error.start}, which"
            " is no character. Write the file again as UTF-8."
        ) from error


def read_rows(path: Path, *, text: bool = False) -> pd.DataFrame:
    """A JSONL, parquet or CSV file as a table. Raises DiagnosticsError with the line that cannot be
    read.

    text: values stay as they are written; otherwise a CSV's cells become numbers, words such as NA
    gaps, and a column of whole numbers with a gap floats."""
    import pandas as pd

    csv_options = {"dtype": "str", "keep_default_na": False} if text else {}
    readers = {
        ".jsonl": lambda file: pd.DataFrame(_read_jsonl(file), dtype=object if text else None),
        ".parquet": read_parquet,
        ".csv": lambda file: pd.read_csv(file, **csv_options),
    }
    readers |= (
        {
            ".parquet": lambda file: keep_whole_numbers(
                read_parquet(file, to_pandas_kwargs=AS_WRITTEN)
            )
        }
        if text
        else {}
    )
    _require_name(path)
    if path.suffix not in readers:
        raise DiagnosticsError(
            f"{path} ends in {path.suffix!r}; prompt files are .jsonl, .parquet or .csv. Convert it"
            " to one of these."
        )
    try:
        frame = readers[path.suffix](path)
    except DiagnosticsError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise DiagnosticsError(
            f"{path} cannot be read ({reason}). Check the path and the format."
        ) from error
    if not len(frame):
        raise DiagnosticsError(f"{path} holds no rows. Give a file with at least one prompt.")
    return frame


AS_WRITTEN = {"integer_object_nulls": True, "ignore_metadata": True, "maps_as_pydicts": "strict"}
"""How Arrow hands its columns over: whole numbers with gaps exactly, an index as a column, maps as
objects.
"""


def keep_whole_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """A parquet table as its first writer meant it: a float column of whole numbers with gaps was a
    column of whole numbers.
    """
    frame = frame.drop(columns=[name for name in frame if str(name).startswith("__index_level_")])
    for name in frame.columns[[str(kind) in ("float64", "float32") for kind in frame.dtypes]]:
        values = frame[name]
        held = values[values.notna()]
        if len(held) < len(values) and (held % 1 == 0).all() and (held.abs() < EXACT).all():
            frame[name] = np.array(
                [None if missing(value) else int(value) for value in values], dtype=object
            )
    return frame


def _require_name(path: Path) -> None:
    """Raise DiagnosticsError for a name that is no UTF-8: a manifest could not hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DiagnosticsError(
            f"The name of the file {str(path)!a} is not UTF-8, so no record can hold it. Rename the"
            " file."
        ) from error


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"line {number} is nested too deeply") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds a {type(row).__name__}, not an object")
        rows.append(row)
    return rows
