"""Tables and JSON as files: equal content gives equal bytes, and writes are atomic."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd


def write_parquet(path: str | Path, frame: pd.DataFrame) -> Path:
    """Write a table as parquet, atomically; equal tables give equal bytes."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, row_group_size=ROWS_TOGETHER)
    return write_atomic(path, buffer.getbuffer())


ROWS_TOGETHER = 250_000
"""Rows of a group of a parquet file, which a reader can take by itself."""


def write_csv(path: str | Path, frame: pd.DataFrame) -> Path:
    """Write a table as CSV, atomically, with shortest round-trip floats.

    A text that a spreadsheet would calculate, as the token `=1+1`, is written with an apostrophe in
    front, which `read_csv` takes off again."""
    text = _with_texts(frame, _guarded).to_csv(index=False)
    return write_atomic(path, text.encode("utf-8", "backslashreplace"))


def read_csv(path: str | Path) -> pd.DataFrame:
    """A table as `write_csv` was given it. Raises what pandas raises."""
    import pandas as pd

    return _with_texts(pd.read_csv(path), _bare)


FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""How a text begins that a spreadsheet may take for a formula, with apostrophes in front of it."""


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _bare(value: Any) -> Any:
    quoted = isinstance(value, str) and value.startswith("'") and FORMULA.match(value)
    return value[1:] if quoted else value


def _with_texts(frame: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """A table with `change` of each of its texts and names; the same table where none changes."""
    changed = frame
    for place, values in enumerate(frame.items()):
        was = [] if values[1].dtype.kind in "biufcmM" else list(values[1])
        now = [change(value) for value in was]
        if any(new is not old for new, old in zip(now, was, strict=True)):
            changed = frame.copy() if changed is frame else changed
            changed.isetitem(place, now)
    names = [change(name) for name in frame.columns]
    same = all(new is old for new, old in zip(names, frame.columns, strict=True))
    return changed if same else changed.set_axis(names, axis=1)


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, atomically, keys in the order given."""
    return write_atomic(
        path,
        (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(
            "utf-8", "backslashreplace"
        ),
    )
