"""The token table from the files that hold its columns, some rows at a time.

Every stage writes its columns in the order of the scores, so a part of the scores finds its rows at
the same place in the other files. A file with other rows, as of a sample of positions, is joined by
its keys; that one is in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from diagnostics.core.checkpoint import POSITION_KEYS, join_checkpoint
from diagnostics.core.schema import read_parquet, read_parquet_parts, validate_tokens

UNTRAINED = "_step_0"
"""Ending of columns of a training before its first step, which repeat the scores."""


def joined_parts(
    scores: Path, added: Sequence[Path], *, after: Path | None = None
) -> Iterator[pd.DataFrame]:
    """Join files of columns to the scores.

    Args:
        scores: The token table of the untouched pair.
        added: Files with one row per position at most, with context_id, position and columns that
            the scores do not have.
        after: The columns of a trained student (`checkpoint.join_checkpoint`).

    Yields:
        The token table, validated, in the parts that the scores have in their file. A position
        that a file lacks is NaN in its columns.

    Raises:
        DiagnosticsError: A file is damaged or holds something else.
    """
    rows = pq.read_metadata(scores).num_rows
    others = [_Columns(path, rows) for path in added]
    trained = None if after is None else _Columns(after, rows)
    for part in read_parquet_parts(scores):
        for other in others:
            own = other.of(part)
            own = own.drop(columns=[name for name in own if str(name).endswith(UNTRAINED)])
            part = part.merge(own, on=POSITION_KEYS, how="left", validate="one_to_one")
        if trained is not None:
            part = join_checkpoint(part, trained.of(part))
        yield validate_tokens(part)


class _Columns:
    """A file of columns, read along with the scores as long as it has the same rows."""

    def __init__(self, path: Path, rows: int):
        self.path = path
        self._parts = read_parquet_parts(path)
        self._read: pd.DataFrame | None = None
        self._everything = None if pq.read_metadata(path).num_rows == rows else self._with_gaps()

    def _with_gaps(self) -> pd.DataFrame:
        """The whole table, in dtypes that can hold a gap in every part of the scores."""
        whole = read_parquet(self.path)
        return whole.reindex(range(len(whole) + 1)).iloc[:-1]

    def of(self, part: pd.DataFrame) -> pd.DataFrame:
        """The rows of the next part of the scores, and perhaps others."""
        if self._everything is None:
            found = self._next(len(part))
            if len(found) == len(part) and all(
                (found[key].to_numpy() == part[key].to_numpy()).all() for key in POSITION_KEYS
            ):
                return found
            self._everything = self._with_gaps()
        return self._everything

    def _next(self, count: int) -> pd.DataFrame:
        """The next rows of the file."""
        held = [] if self._read is None else [self._read]
        while sum(map(len, held)) < count and (part := next(self._parts, None)) is not None:
            held.append(part)
        whole = held[0] if len(held) == 1 else pd.concat(held, ignore_index=True)
        self._read = whole.iloc[count:].reset_index(drop=True)
        return whole.iloc[:count].reset_index(drop=True)
