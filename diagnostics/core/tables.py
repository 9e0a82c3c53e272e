"""Tables and JSON as files: equal content gives equal bytes, and writes are atomic."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def write_parquet(path: str | Path, frame: pd.DataFrame) -> Path:
    """Write a table as parquet, atomically; equal tables give equal bytes."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, row_group_size=ROWS_TOGETHER)
    return write_atomic(path, buffer.getbuffer())


ROWS_TOGETHER = 250_000
"""Rows of a group of a parquet file, which a reader can take by itself."""


def write_parquet_parts(
    path: str | Path,
    parts: Iterable[pd.DataFrame],
    *,
    types: Mapping[str, pa.DataType] | None = None,
) -> Path:
    """Write a table as parquet, atomically, from parts of which one at a time is in memory.

    Every part becomes a row group of its own, so the file's bytes depend on how the table is
    divided; a table in one part has the bytes of `write_parquet`. Every process goes through the
    parts, which may wait for each other's numbers, and the first one writes.

    Args:
        path: The file.
        parts: The table's rows in order, with the same columns and dtypes in every part.
        types: The types of columns which the first part may not tell, since it has nothing but
            gaps or empty lists there.

    Raises:
        DiagnosticsError: There is no part, a part has other columns than the first one, or the
            file cannot be written.
    """
    if distributed.is_main():
        return write_atomic(path, _as_parquet(parts, types or {}))
    for _ in parts:
        pass
    return Path(path)


def _as_parquet(parts: Iterable[pd.DataFrame], types: Mapping[str, pa.DataType]) -> Iterator[bytes]:
    """The bytes of a parquet file, those of a part as soon as it is there."""
    import pyarrow.parquet as pq

    sink, writer = _Drained(), None
    for part in parts:
        if writer is None:
            schema = _schema(part, types)
            writer = pq.ParquetWriter(sink, schema, compression="snappy")
        writer.write_table(_as_arrow(part, schema), row_group_size=ROWS_TOGETHER)
        yield from sink.drained()
    if writer is None:
        raise DiagnosticsError("A table without any part cannot be written. Measure one context.")
    writer.close()
    yield from sink.drained()


def _schema(part: pd.DataFrame, types: Mapping[str, pa.DataType]) -> pa.Schema:
    """The schema of a table's first part, with pandas' notes on it and its attributes."""
    import pyarrow as pa

    schema = pa.Table.from_pandas(part, preserve_index=False).schema
    for number, field in enumerate(schema):
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if field.name in types and pa.types.is_null(kind):
            schema = schema.set(number, pa.field(field.name, types[field.name]))
    if not part.attrs:
        return schema
    return schema.with_metadata({**schema.metadata, "PANDAS_ATTRS": json.dumps(part.attrs)})


def _as_arrow(part: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    if list(part.columns) != schema.names:
        other = sorted(set(part.columns) ^ set(schema.names)) or list(part.columns)
        raise DiagnosticsError(
            f"A part of the table has other columns than its first part: {', '.join(other[:5])}."
            " Give every part the same columns in the same order."
        )
    return pa.Table.from_pandas(part, schema=schema, preserve_index=False)


class _Drained(io.RawIOBase):
    """A file whose bytes are taken as they are written."""

    def __init__(self) -> None:
        super().__init__()
        self._written: list[bytes] = []
        self._place = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written.append(bytes(data))
        self._place += len(self._written[-1])
        return len(self._written[-1])

    def tell(self) -> int:
        return self._place

    def drained(self) -> list[bytes]:
        """The bytes since the last call."""
        written, self._written = self._written, []
        return written


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
