"""A second process for what a run can do while this one steps through interventions.

The study of the gains and the offline comparison need no model and no intervention; then there are
the trajectories of the interventions themselves, which the second process measures from the last
one on. Either process computes the same numbers from the same files by the same functions, with as
many threads, so that all files have the same bytes with and without it. Where it cannot be started
or ends early, the stages do everything themselves.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diagnostics.core import distributed, files

log = logging.getLogger("diagnostics")
END_SECONDS = 5.0
"""Longest wait for the second process to leave no half-written file behind."""
Tables = dict[str, Any]
"""Tables by name."""
Task = Mapping[str, Any]
"""What to make: files by their use, and `options` of the function that makes it."""


def study_tables(task: Task) -> Tables:
    """The tables of `analysis.study.study` of a token table."""
    from diagnostics.analysis.prompt_groups import read_studied
    from diagnostics.analysis.study import study

    return study(read_studied(task["tokens"], task["options"]["seed"]), **task["options"])


def comparison_tables(task: Task) -> Tables:
    """The tables of `analysis.selection.compare` of a token table, and that by correctness where
    responses were judged.
    """
    from diagnostics.analysis.correctness import by_correctness, is_judged
    from diagnostics.analysis.prompt_groups import read_studied
    from diagnostics.analysis.selection import ALL_OUTCOMES, compare

    tokens, options = read_studied(task["tokens"], task["options"]["seed"]), task["options"]
    tables = compare(tokens, outcomes=ALL_OUTCOMES, **options)
    if is_judged(tokens):
        how = {name: value for name, value in options.items() if name != "budgets"}
        tables["by_correctness"] = by_correctness(tokens, **how)
    return tables


def cells(task: Task) -> Tables:
    """Trajectories of an intervention, into its cache; there is no table of them yet."""
    import torch

    from diagnostics.core.types import read_bank
    from diagnostics.models.identity import Models
    from diagnostics.probing.intervention import help_measuring

    torch.set_num_threads(task["threads"])
    pair, bank = Models(task["pair"]).pair, read_bank(task["contexts"])
    with files.guard(task["directory"]):
        help_measuring(pair, bank, **task["options"])
    return {}


TABLES = {"analyze": study_tables, "compare": comparison_tables}
"""What makes the tables of a stage."""
MAKERS = {**TABLES, "intervene": cells}
"""What does a stage's part."""


LOADED = ("models.pair", "probing.intervention", "analysis.study", "analysis.selection")
"""Modules of this package that a process loads which begins before there is a task for it."""


class Ahead:
    """What another process has made of some stages; without one, what is made when asked for.

    Args:
        tasks: What to make, by stage, in the order in which it is made. Where None, the process
            begins without, loads what it will need, and waits for `give`.
    """

    def __init__(self, tasks: Mapping[str, Task] | None):
        self.tasks: dict[str, Task] = {}
        self.left: list[str] = []
        self.folder: tempfile.TemporaryDirectory | None = None
        self.process = self._begun(tasks is None) if tasks != {} and cores() > 1 else None
        if tasks:
            self.give(tasks)

    def give(self, tasks: Mapping[str, Task]) -> None:
        """Hand the tasks to the process, once, or end it where there are none."""
        self.tasks, self.left = dict(tasks), list(tasks)
        if self.process is None or self.process.stdin is None:
            return
        if not tasks:
            self.end()
            return
        try:
            pickle.dump(list(self.tasks.items()), self.process.stdin)
            self.process.stdin.close()
        except OSError:  # it ended, and its work is done here
            self.end()

    def _begun(self, early: bool) -> subprocess.Popen | None:
        if distributed.world() > 1:
            return None
        home = str(Path(__file__).parents[2])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self.folder = tempfile.TemporaryDirectory(prefix="opd-ahead-")
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    __name__,
                    str(os.getpid()),
                    self.folder.name,
                    *(["early"] if early else []),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except OSError:
            return None

    def take(self, stage: str, task: Task) -> Tables:
        """The tables of a stage, where they are those of this very task; else made here."""
        tables = None
        if self.tasks.get(stage) == task:
            while self.left and tables is None:
                tables = self._next(self.left.pop(0), stage)
        return TABLES[stage](task) if tables is None else tables

    def _next(self, made: str, wanted: str) -> Tables | None:
        """The tables that come next, where these are the wanted ones; None where none come."""
        if self.process is None or self.process.stdout is None or self.folder is None:
            return None
        if self.process.stdout.readline().decode().strip() != made:  # it ended
            self.left = []
            return None
        with open(Path(self.folder.name) / made, "rb") as file:
            tables, records = pickle.load(file)  # of our own process, in a folder of our own
        if made != wanted:
            return None
        for level, message in records:
            log.log(level, "%s", message)
        return tables

    def end(self) -> None:
        """End the process, whatever it does."""
        self.left = []
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(OSError):  # what it never read
                    if pipe is not None:
                        pipe.close()
        if self.folder is not None:
            self.folder.cleanup()


@contextmanager
def beside(tasks: Mapping[str, Task] | None = None) -> Iterator[Ahead]:
    """Let another process work on tasks while the block runs, where a core is free for it.

    Args:
        tasks: What to make, by stage; None where they are given later.

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


def _serve(parent: int, folder: Path, *, early: bool) -> None:
    """Do the tasks that standard input names, and say which is done; an error ends it."""
    from diagnostics.core.processes import end_with, leave_cores_to_others

    def stop(*_: object) -> None:
        raise SystemExit  # so that a file that is being written is removed

    end_with(parent)
    leave_cores_to_others()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    kept = _Kept()
    logging.getLogger().addHandler(kept)
    for name in LOADED if early else ():
        importlib.import_module(f"diagnostics.{name}")
    for stage, task in pickle.load(sys.stdin.buffer):
        with open(folder / stage, "wb") as file:
            pickle.dump((MAKERS[stage](task), kept.records), file)
        kept.records = []
        print(stage, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]), early="early" in sys.argv[3:])
