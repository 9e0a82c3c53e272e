"""Progress that is seen, and batches that an interrupted stage does not compute again."""

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
    """Whether progress stays hidden even on a terminal."""
    global _quiet
    _quiet = quiet


def progress(
    iterable: Iterable | None = None, *, total: int, description: str, unit: str = " positions"
):
    """A tqdm bar with rate and time left; there is none where the output is no terminal, as in a
    log, or after `set_quiet`.
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
    """Results of a pass over batches, kept as they come; without a folder nothing is kept.

    A shard is a parquet file with a column `row` and one column a measurement. Its name ends in the
    hash of its content, so that a damaged one is known and left out. Every process keeps its own
    and reads all."""

    def __init__(self, folder: Path | None = None):
        import pandas as pd

        self.folder, self._pending, self._since = folder, [], time.monotonic()
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
        """What was measured at these rows earlier, in their order; None where any is missing."""
        places = self._found.index.get_indexer(rows)
        return None if (places < 0).any() or not len(places) else self._found.iloc[places]

    def add(self, rows: Sequence[int], columns: dict[str, Sequence]) -> None:
        """Keep the measurements of these rows: on disk a few seconds later."""
        if self.folder is not None:
            self._pending.append((rows, columns))
            if time.monotonic() - self._since >= SHARD_SECONDS:
                self._write()

    def _write(self) -> None:
        import pandas as pd

        frame = pd.concat(
            [pd.DataFrame({"row": rows, **columns}) for rows, columns in self._pending],
            ignore_index=True,
        )
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        name = f"{distributed.rank()}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.parquet"
        try:
            files.replace(self.folder / name, buffer.getvalue())
        except OSError as error:  # a luxury: the stage itself may still end well
            log.warning(
                "%s cannot be written (%s): a killed run would do this part again",
                self.folder / name,
                error.strerror,
            )
        self._pending, self._since = [], time.monotonic()


def no_shards(name: str) -> Shards:
    """Shards of a pass that keeps nothing on disk; what a pass has where there is no run
    directory.
    """
    return Shards()
