"""Progress that is seen, and shards: finished batches that an interrupted stage does not repeat.

A command divides its work into stages (`Stages`). On a terminal one line is written anew and says
which stage it is, how much of it is done, about how long it still takes, and what is being done. In
a log the same stands in a line of its own every `LOG_SECONDS`. Either way each stage ends with the
time that it took. Outside a command, `progress` is a bar of its own on a terminal and in a
notebook, and nothing in a log.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from diagnostics.core import distributed, files

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

log = logging.getLogger("diagnostics")
SHARD = re.compile(r"[0-9]+-[0-9a-f]{16}\.parquet")
SHARD_SECONDS = 10.0
"""Least work between two writes to DIR/.partial: with a write of some milliseconds, under a
thousandth of the time.
"""
SHARDS_OPEN = 4
"""Shards that stay in memory after they were read: consecutive batches lie in the same ones."""
LOG_SECONDS = 30.0
"""Time between two lines of progress in a log."""
LINE_SECONDS = 0.2
"""Time between two drawings of the line on a terminal."""
BAR = 14
"""Characters of the bar in the line."""
GUESS_FROM = 0.02
"""Share of a stage from which on the time that it still takes is stated."""
_quiet = False
_stages: Stages | None = None


def set_quiet(quiet: bool) -> None:
    """Set whether progress stays hidden, on a terminal and in a log."""
    global _quiet
    _quiet = quiet


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose output is no terminal but shows bars."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell is not None else None
    return found is not None and type(found).__name__ == "ZMQInteractiveShell"


def progress(
    iterable: Iterable | None = None, *, total: int, description: str, unit: str = " positions"
) -> Any:
    """What counts a pass: part of a command's progress, or else a tqdm bar.

    Args:
        iterable: What is counted; None where the caller calls `update` itself.
        total: Number of units at the end.
        description: What is being done.
        unit: Name of the unit in the rate, with a leading space.

    Returns:
        An iterable context manager with `update(count)` and `refresh()`.
    """
    if _stages is not None:
        return _Pass(_stages, iterable, total, description)
    notebook = in_notebook()
    return _tqdm(notebook)(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        disable=True if _quiet or not distributed.is_main() else False if notebook else None,
        leave=False,
        dynamic_ncols=True,
    )


def _tqdm(notebook: bool) -> type:
    """The widget where a notebook can show it, and else the bar of text, which any notebook can."""
    if notebook and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as bar
    else:
        from tqdm import tqdm as bar
    return bar


def worked(amount: float) -> None:
    """Add to what is done of the present stage; nothing outside a command's stages."""
    if _stages is not None:
        _stages.add(amount)


def expect(amount: float) -> None:
    """State the whole work of the present stage, in the unit of `worked` and of its passes."""
    if _stages is not None:
        _stages.whole = amount


def forecast(amount: float) -> str:
    """About how long so much work takes at the pace of the stages before; empty where unknown."""
    pace = None if _stages is None else _stages.pace
    return duration(amount * pace) if pace else ""


def clear_line() -> None:
    """Remove the line of progress from a terminal, so that another line can be written."""
    if _stages is not None:
        _stages.clear()


class _Pass:
    """A pass within a stage, with the part of a tqdm bar's surface that callers use."""

    def __init__(self, stages: Stages, iterable: Iterable | None, total: int, description: str):
        self.stages, self.iterable, self.total = stages, iterable, total
        stages.begin_pass(total, description)

    def update(self, count: float = 1) -> None:
        """Count units that are done."""
        self.stages.add(count, of_pass=True)

    def refresh(self) -> None:
        """Draw the line now."""
        self.stages.show()

    def close(self) -> None:
        """Nothing is left to do: the line goes on with the next pass."""

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __iter__(self) -> Iterator:
        for item in self.iterable or ():
            yield item
            self.update()


class Stages:
    """How far a command is: the number of its stage, and the share of that stage.

    The share is that of the work that `expect` stated, and else that of the pass under way.

    Args:
        names: The stages in their order.
        out: Where the line goes; standard error where not given.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.names, self.out, self.clock = list(names), out or sys.stderr, clock
        self.terminal = bool(getattr(self.out, "isatty", lambda: False)())
        self.name: str | None = None
        self.pace: float | None = None
        self._lock = threading.RLock()
        self._drawn = 0
        self._new("")

    def _new(self, name: str) -> None:
        self.name = name or None
        self.whole: float | None = None
        self.done, self.doing = 0.0, ""
        self.pass_total, self.pass_done = 0.0, 0.0
        self.began = self.shown = self.clock()
        self.pass_began = self.began

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Surround the work of a stage; at its end the time that it took is logged."""
        with self._lock:
            self._new(name)
        self.show()
        yield
        took = self.clock() - self.began
        if self.whole and self.done:
            self.pace = took / self.done
        self.clear()
        log.info("%s: done in %s", self._which(), duration(took))
        with self._lock:
            self._new("")

    def begin_pass(self, total: float, description: str) -> None:
        """Begin a pass of so many units."""
        with self._lock:
            self.pass_total, self.pass_done, self.doing = float(total), 0.0, description
            self.pass_began = self.clock()
        self.tick()

    def add(self, amount: float, *, of_pass: bool = False) -> None:
        """Add to what is done."""
        with self._lock:
            self.done += amount
            self.pass_done += amount if of_pass else 0.0
        self.tick()

    def share(self) -> float | None:
        """Share of the stage that is done, below 1; None where nothing is known."""
        whole, done = (self.whole, self.done) if self.whole else (self.pass_total, self.pass_done)
        return min(done / whole, 0.99) if whole else None

    def left(self) -> float | None:
        """Seconds that the stage still takes at its rate so far; None where it is too early."""
        share = self.share()
        if share is None or share < GUESS_FROM:
            return None
        return (
            (self.clock() - (self.began if self.whole else self.pass_began)) * (1 - share) / share
        )

    def _which(self) -> str:
        number = self.names.index(self.name) + 1 if self.name in self.names else len(self.names)
        return f"stage {number} of {len(self.names)} ({self.name})"

    def line(self) -> str:
        """The line without a bar: `stage 3 of 6 (probe), 41 %, about 2 min left: step 1`."""
        share, left = self.share(), self.left()
        parts = [self._which()]
        parts += [f"{100 * share:.0f} %"] if share is not None else []
        parts += (
            [f"about {duration(left)} left"]
            if left is not None
            else [f"{duration(self.clock() - self.began)} so far"]
        )
        return ", ".join(parts) + (f": {self.doing}" if self.doing else "")

    def tick(self) -> None:
        """Show the line where it is due."""
        due = LINE_SECONDS if self.terminal else LOG_SECONDS
        if self.clock() - self.shown >= due:
            self.show()

    def show(self) -> None:
        """Draw the line on a terminal; in a log, write it where a stage is under way a while."""
        if _quiet or self.name is None or not distributed.is_main():
            return
        with self._lock:
            begun, self.shown = self.shown > self.began, self.clock()
            if self.terminal:
                self._draw()
            elif begun or self.shown - self.began >= LOG_SECONDS:
                log.info("%s", self.line())

    def _draw(self) -> None:
        share = self.share()
        full = round(BAR * share) if share is not None else 0
        bar = f"{'█' * full}{'░' * (BAR - full)} " if share is not None else ""
        text = (bar + self.line())[: columns(self.out) - 1]
        self.out.write("\r" + text + " " * max(0, self._drawn - len(text)))
        self.out.flush()
        self._drawn = len(text)

    def clear(self) -> None:
        """Remove the line from a terminal."""
        with self._lock:
            if self._drawn:
                self.out.write("\r" + " " * self._drawn + "\r")
                self.out.flush()
                self._drawn = 0


@contextmanager
def in_stages(names: Sequence[str]) -> Iterator[Stages]:
    """Let the work of the block be shown as stages of these names.

    A thread shows the line when nothing is counted for a while, as in a drawing or a long pass.
    """
    global _stages
    before, _stages = _stages, Stages(names)
    over, mine = threading.Event(), _stages

    def keep_showing() -> None:
        while not over.wait(1.0):
            if mine.clock() - mine.shown >= (1.0 if mine.terminal else LOG_SECONDS):
                mine.show()

    thread = threading.Thread(target=keep_showing, daemon=True)
    thread.start()
    try:
        yield mine
    finally:
        over.set()
        thread.join()
        mine.clear()
        _stages = before


def columns(out: TextIO) -> int:
    """Width of a terminal; 80 where it states none, as a pseudo-terminal of size 0 does."""
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def duration(seconds: float) -> str:
    """A time as people say it: `8 s`, `2 min`, `1.5 h`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


class Shards:
    """Results of a pass over batches, kept on disk as they come.

    Without a folder nothing is kept.

    A shard is a parquet file with a column `row` and one column per measurement. Its name ends in
    the hash of its content, so that a damaged shard is recognized and left out. Every process
    writes its own shards and reads all of them. What earlier runs kept stays on disk until it is
    taken: of every row only the shard that holds it is in memory.
    """

    def __init__(self, folder: Path | None = None):
        import numpy as np

        self.folder = folder
        self._pending: list[tuple[Sequence[int], dict[str, Sequence]]] = []
        self._since = time.monotonic()
        self._paths: list[Path] = []
        self._open: dict[int, pd.DataFrame] = {}
        held = list(self._held())
        # of a row that several shards hold, the first one's measurements count
        rows = np.concatenate(held) if held else np.zeros(0, np.int64)
        self._rows, first = np.unique(rows, return_index=True)
        sizes = [len(each) for each in held]
        self._shard = np.repeat(np.arange(len(held), dtype=np.int32), sizes)[first]
        if held:
            log.info("%s: %d rows of an interrupted run are taken up", folder, len(self._rows))

    @property
    def rows(self) -> int:
        """Number of rows that an earlier run kept."""
        return len(self._rows)

    def _held(self) -> Iterator[np.ndarray]:
        """The rows of every whole shard, whose path is then in `_paths`."""
        import pandas as pd

        for path in (
            sorted(self.folder.glob("*.parquet")) if self.folder and self.folder.is_dir() else ()
        ):
            if not SHARD.fullmatch(path.name) or files.kind(path) != "file":
                continue
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.rpartition("-")[2]:
                self._paths.append(path)
                yield pd.read_parquet(io.BytesIO(content), columns=["row"])["row"].to_numpy()
            else:
                log.warning("%s is damaged and left out", path)

    def take(self, rows: Sequence[int]) -> pd.DataFrame | None:
        """Measurements of these rows from an earlier run, in the order of `rows`.

        Returns None where any of the rows is missing.
        """
        import numpy as np
        import pandas as pd

        asked = np.asarray(rows, dtype=np.int64)
        places = np.searchsorted(self._rows, asked).clip(max=max(len(self._rows) - 1, 0))
        if not len(asked) or not len(self._rows) or (self._rows[places] != asked).any():
            return None
        shards = self._shard[places]
        parts = [
            self._read(number).loc[asked[shards == number]] for number in np.unique(shards).tolist()
        ]
        return parts[0] if len(parts) == 1 else pd.concat(parts).loc[asked]

    def _read(self, number: int) -> pd.DataFrame:
        """A shard by its number; the last few that were read stay in memory."""
        import pandas as pd

        found = self._open.pop(number, None)
        if found is None:
            found = pd.read_parquet(self._paths[number]).drop_duplicates("row").set_index("row")
        self._open[number] = found
        while len(self._open) > SHARDS_OPEN:
            del self._open[next(iter(self._open))]
        return found

    def add(self, rows: Sequence[int], columns: dict[str, Sequence]) -> None:
        """Keep the measurements of these rows; they are on disk a few seconds later."""
        if self.folder is not None:
            self._pending.append((rows, columns))
            if time.monotonic() - self._since >= SHARD_SECONDS:
                self._write()

    def flush(self) -> None:
        """Write what waits now, where it is dear: answers that somebody was paid for."""
        if self._pending:
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
