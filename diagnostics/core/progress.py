"""Progress bars, and shards: finished batches that an interrupted stage does not repeat."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.core import distributed, files

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")
SHARD = re.compile(r"[0-9]+-[0-9a-f]{16}\.parquet")
SHARD_SECONDS = 10.0
"""Least work between two writes to DIR/.partial: with a write of some milliseconds, under a
thousandth of the time.
"""
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Set whether progress bars stay hidden even on a terminal."""
    global _quiet
    _quiet = quiet


def progress(
    iterable: Iterable | None = None, *, total: int, description: str, unit: str = " positions"
):
    """A tqdm bar with rate and time left.

    The bar is hidden where the output is not a terminal, as in a log, and after `set_quiet`.

    Args:
        iterable: What the bar counts; None where the caller updates the bar itself.
        total: Number of units at the end.
        description: Text before the bar.
        unit: Name of the unit in the rate, with a leading space.
    """
    from tqdm import tqdm

    hidden = None if distributed.is_main() and not _quiet else True
    return tqdm(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        disable=hidden,
        leave=False,
        dynamic_ncols=True,
    )


class Shards:
    """Results of a pass over batches, kept on disk as they come.

    Without a folder nothing is kept.

    A shard is a parquet file with a column `row` and one column per measurement. Its name ends in
    the hash of its content, so that a damaged shard is recognized and left out. Every process
    writes its own shards and reads all of them.
    """

    def __init__(self, folder: Path | None = None):
        import pandas as pd

        self.folder = folder
        self._pending: list[tuple[Sequence[int], dict[str, Sequence]]] = []
        self._since = time.monotonic()
        whole = list(self._whole())
        found = (
            pd.concat(whole, ignore_index=True).drop_duplicates("row").set_index("row")
            if whole
            else pd.DataFrame()
        )
        self._found: pd.DataFrame = found
        if whole:
            log.info("%s: %d rows of an interrupted run are taken up", folder, len(found))

    def _whole(self) -> Iterator[pd.DataFrame]:
        import pandas as pd

        for path in (
            sorted(self.folder.glob("*.parquet")) if self.folder and self.folder.is_dir() else ()
        ):
            if not SHARD.fullmatch(path.name) or files.kind(path) != "file":
                continue
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.rpartition("-")[2]:
                yield pd.read_parquet(io.BytesIO(content))
            else:
                log.warning("%s is damaged and left out", path)

    def take(self, rows: Sequence[int]) -> pd.DataFrame | None:
        """Measurements of these rows from an earlier run, in the order of `rows`.

        Returns None where any of the rows is missing.
        """
        places = self._found.index.get_indexer(rows)
        return None if (places < 0).any() or not len(places) else self._found.iloc[places]

    def add(self, rows: Sequence[int], columns: dict[str, Sequence]) -> None:
        """Keep the measurements of these rows; they are on disk a few seconds later."""
        if self.folder is not None:
            self._pending.append((rows, columns))
            if time.monotonic() - self._since >= SHARD_SECONDS:
                self._write()

    def _write(self) -> None:
        folder = self.folder
        if folder is None:
            return
        import pandas as pd

        frame = pd.concat(
            [pd.DataFrame({"row": rows, **columns}) for rows, columns in self._pending],
            ignore_index=True,
        )
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        name = f"{distributed.rank()}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.parquet"
        try:
            files.replace(folder / name, buffer.getvalue())
        except OSError as error:  # best effort: the stage does not need this file
            log.warning(
                "%s cannot be written (%s): a killed run would do this part again",
                folder / name,
                error.strerror,
            )
        self._pending, self._since = [], time.monotonic()


def no_shards(name: str) -> Shards:
    """Shards that keep nothing on disk, for a pass outside a run directory."""
    return Shards()
