"""Numbers by row that come batch by batch and are read in order: on disk or in memory.

Batches hold contexts of similar length, so their rows are scattered over a table. What a stage
measures is therefore put where its row is, and taken from there some rows at a time once all
batches are through. On disk that is a file without a name: nothing is left of it however the
process ends, and the memory that it takes does not grow with the table. Finished batches are kept
apart from it (`core.progress.Shards`).
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from diagnostics.core import distributed
from diagnostics.core.errors import DiagnosticsError


class RowStore:
    """Float64 numbers by row and column; a row that nobody put is 0 everywhere.

    Every process puts its own rows and reads those of all.

    Args:
        rows: Number of rows.
        folder: A folder on the disk that the numbers go to, which need not be there yet; None
            keeps them in memory.
    """

    def __init__(self, rows: int, folder: Path | None = None):
        self.rows = rows
        self._near = None if folder is None else _existing(folder)
        self._columns: list[str] = []
        self._file: _File | _Memory | None = None
        self._names: list[str] | None = None

    def put(self, rows: Sequence[int] | np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Put the numbers of some rows.

        Args:
            rows: The rows [n], each run of consecutive ones in one piece.
            columns: Numbers [n] by column; the same columns in every call.

        Raises:
            DiagnosticsError: The disk is full.
        """
        if self._file is None:
            self._columns = list(columns)
            shape = (self.rows, len(self._columns))
            self._file = _Memory(shape) if self._near is None else _File(shape, self._near)
        places = np.asarray(rows, dtype=np.int64)
        numbers_nM = np.stack([columns[name] for name in self._columns], axis=1, dtype=np.float64)
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        for run in np.split(np.arange(len(places)), cuts):
            if len(run):
                self._file.write(int(places[run[0]]), numbers_nM[run[0] : run[-1] + 1])

    @property
    def names(self) -> list[str]:
        """The columns of all processes; every process asks for them when all rows are put."""
        if self._names is None:
            whole = distributed.world() > 1
            own = self._columns
            self._names = sorted(distributed.names(own)) if whole else list(own)
        return self._names

    def take(
        self, first: int, last: int, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The numbers of consecutive rows over all processes, which all ask for them.

        Args:
            first: The first row.
            last: The row after the last one.
            names: The columns; None takes all.

        Returns:
            Float64 [last - first] by column.
        """
        asked = self.names if names is None else list(names)
        found_Mn = np.zeros((len(asked), last - first))
        if self._file is not None:
            own_nM = self._file.read(first, last)
            for number, name in enumerate(asked):
                found_Mn[number] = own_nM[:, self._columns.index(name)]
        return dict(zip(asked, distributed.sum_over_processes(found_Mn), strict=True))

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """First row, and row after the last one, of the whole table in parts of some rows."""
        for first in range(0, self.rows, size):
            yield first, min(first + size, self.rows)


class _Memory:
    def __init__(self, shape: tuple[int, int]):
        self.numbers_NM = np.zeros(shape)

    def write(self, first: int, numbers_nM: np.ndarray) -> None:
        self.numbers_NM[first : first + len(numbers_nM)] = numbers_nM

    def read(self, first: int, last: int) -> np.ndarray:
        return self.numbers_NM[first:last]


class _File:
    """The same in a file without a name, which is written and read, not mapped into memory: a disk
    that is full ends a process which writes to mapped memory.
    """

    def __init__(self, shape: tuple[int, int], folder: Path):
        self.width = shape[1]
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(8 * shape[0] * shape[1])
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def write(self, first: int, numbers_nM: np.ndarray) -> None:
        content, place = memoryview(numbers_nM.tobytes()), 8 * self.width * first
        while content:
            try:
                written = os.pwrite(self._descriptor, content, place)
            except OSError as error:
                raise DiagnosticsError(
                    f"Measurements cannot be written beside the run ({error.strerror or error})."
                    " Nothing finished was lost. Make room or choose another --output-dir, and"
                    " give the same command again."
                ) from error
            content, place = content[written:], place + written

    def read(self, first: int, last: int) -> np.ndarray:
        place, end, content = 8 * self.width * first, 8 * self.width * last, []
        while place < end:
            content.append(os.pread(self._descriptor, end - place, place))
            assert content[-1], "the file has the size of the whole table"
            place += len(content[-1])
        return np.frombuffer(b"".join(content)).reshape(-1, self.width)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
