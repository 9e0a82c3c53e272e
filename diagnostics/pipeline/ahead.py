"""Tables that a process of its own makes while this one steps through interventions.

The study of the gains and the offline comparison need no model and no intervention. They are
computed from the same file by the same functions, so that their tables have the same bytes either
way. Where the process cannot be started or ends early, each stage makes its tables itself.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diagnostics.core import distributed
from diagnostics.core.schema import read_parquet, validate_tokens

log = logging.getLogger("diagnostics")
Tables = dict[str, Any]
"""Tables by name."""
Task = Mapping[str, Any]
"""What to make: `tokens`, the path of the token table, and `options` of the function."""


def study_tables(task: Task) -> Tables:
    """The tables of `analysis.study.study` of a token table."""
    from diagnostics.analysis.study import study

    return study(validate_tokens(read_parquet(task["tokens"])), **task["options"])


def comparison_tables(task: Task) -> Tables:
    """The tables of `analysis.selection.compare` of a token table."""
    from diagnostics.analysis.selection import ALL_OUTCOMES, compare

    tokens = validate_tokens(read_parquet(task["tokens"]))
    return compare(tokens, outcomes=ALL_OUTCOMES, **task["options"])


MAKERS = {"analyze": study_tables, "compare": comparison_tables}
"""What makes a stage's tables."""


class Ahead:
    """Tables of some stages, made by another process or, where there is none, when asked for.

    Args:
        tasks: What to make, by stage, in the order in which it is made.
    """

    def __init__(self, tasks: Mapping[str, Task]):
        self.tasks, self.left = dict(tasks), list(tasks)
        self.process = self._begun() if tasks and cores() > 1 else None

    def _begun(self) -> subprocess.Popen | None:
        if distributed.world() > 1:
            return None
        home = str(Path(__file__).parents[2])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "diagnostics.pipeline.ahead", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            assert process.stdin is not None
            pickle.dump(list(self.tasks.items()), process.stdin)
            process.stdin.close()
        except OSError:
            return None
        return process

    def take(self, stage: str, task: Task) -> Tables:
        """The tables of a stage, where they are those of this very task; else made here."""
        tables = None
        if self.tasks.get(stage) == task:
            while self.left and tables is None:
                tables = self._next(self.left.pop(0), stage)
        return MAKERS[stage](task) if tables is None else tables

    def _next(self, made: str, wanted: str) -> Tables | None:
        """The tables that come next, where these are the wanted ones; None where none come."""
        if self.process is None or self.process.stdout is None:
            return None
        try:
            tables, records = pickle.load(self.process.stdout)  # from our own process alone
        except (EOFError, OSError, pickle.UnpicklingError):
            self.left = []
            return None
        if made != wanted:
            return None
        for level, message in records:
            log.log(level, "%s", message)
        return tables

    def end(self) -> None:
        """End the process at once, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@contextmanager
def beside(tasks: Mapping[str, Task]) -> Iterator[Ahead]:
    """Make tables in another process while the block runs, where a core is free for it.

    Args:
        tasks: What to make, by stage.

    Yields:
        Where the stages take their tables from.
    """
    ahead = Ahead(tasks)
    try:
        yield ahead
    finally:
        ahead.end()


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Kept(logging.Handler):
    """Keeps levels and messages, for the process that waits."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.getMessage()))


def _serve(parent: int) -> None:
    """Make the tables that standard input asks for; an error ends it with those before."""
    from diagnostics.training.workers import end_with

    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept, made = _Kept(), []
    logging.getLogger().addHandler(kept)
    try:
        for stage, task in pickle.load(sys.stdin.buffer):
            made.append((MAKERS[stage](task), kept.records))
            kept.records = []
    finally:  # a pipe holds little, so that nothing is written before all is made
        for each in made:
            pickle.dump(each, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
