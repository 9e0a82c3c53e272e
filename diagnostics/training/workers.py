"""Processes that share out long tasks, and end with the process that started them.

However the first process goes, by Ctrl-C, SIGTERM or kill -9, no worker goes on without it: Linux
kills them with their parent (PR_SET_PDEATHSIG), elsewhere a thread of each asks once a second
whether the parent is still there, and one that waits for its next task reads the end of its pipe. A
worker takes no Ctrl-C of its own; the first process ends it.

Tasks and results pass as plain data, errors as their kind and their text.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diagnostics.core.errors import DiagnosticsError

PARENT_SECONDS = 1.0
"""Between two looks whether the parent lives, where the system does not say: what an orphan
computes in vain.
"""
END_SECONDS = 10.0
"""For a killed worker to be gone; it only has to give back its memory."""
PR_SET_PDEATHSIG = 1
"""Linux' prctl: a signal to this process when its parent dies."""


def share_out(
    work: Callable[[Any], Any], tasks: Sequence[Any], environments: Sequence[Mapping[str, str]]
) -> Iterator[Any]:
    """Results of `work(task)` as they come, from one worker for each of the environments.

    work: a function of a module. Whatever ends this generator ends the workers, at once. Raises
    DiagnosticsError where a worker dies, and the error of a task that fails."""
    _start_tracker()
    todo, hands = list(reversed(tasks)), []
    try:
        for environment in environments[: len(tasks)]:
            hands.append(_Hand(work, environment))
            hands[-1].give(todo.pop())
        while busy := [hand for hand in hands if hand.task is not None]:
            for hand in _ready(busy):
                result = hand.take()
                if todo:
                    hand.give(todo.pop())
                yield result
    finally:
        for hand in hands:
            hand.process.kill()
        for hand in hands:
            hand.process.join(END_SECONDS)
            hand.connection.close()


def _start_tracker() -> None:
    """Python's own helper of such processes, without its warning of what killed workers did not
    give back: it gives it back.
    """
    from multiprocessing import resource_tracker

    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


def _ready(hands: Sequence[_Hand]) -> list[_Hand]:
    from multiprocessing.connection import wait

    by_connection = {hand.connection: hand for hand in hands}
    return [by_connection[connection] for connection in wait(list(by_connection))]


class _Hand:
    """A worker as the first process sees it."""

    def __init__(self, work: Callable[[Any], Any], environment: Mapping[str, str]) -> None:
        from multiprocessing import get_context

        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, work, dict(environment), os.getpid()), daemon=True
        )
        self.process.start()
        theirs.close()  # so that a worker's death is the end of the pipe
        self.task: Any = None

    def give(self, task: Any) -> None:
        """Hand over the next task."""
        self.task = task
        with contextlib.suppress(
            OSError
        ):  # a worker that is gone is noticed when its result is asked for
            self.connection.send(task)

    def take(self) -> Any:
        """The result of the task under way."""
        task, self.task = self.task, None
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(END_SECONDS)
            raise DiagnosticsError(
                f"A worker ended in the middle of {task} (exit code {self.process.exitcode}); the"
                " system does that where memory runs out. What was finished is kept. Give the same"
                " command again, with fewer --workers."
            ) from error
        if kind == "result":
            return value
        raise _error(kind, value)


def _error(kind: str, value: Any) -> Exception:
    """A worker's error in this process: of its own kind where the command line has a sentence for
    that.
    """
    if kind == "OSError":
        return OSError(*value)
    known = {"DiagnosticsError": DiagnosticsError, "MemoryError": MemoryError}
    return known.get(kind, RuntimeError)(value)


def _described(error: Exception) -> tuple[str, Any]:
    if isinstance(error, DiagnosticsError):
        return "DiagnosticsError", str(error)
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "MemoryError", first
    if isinstance(error, OSError) and error.errno is not None:
        return "OSError", (
            error.errno,
            error.strerror,
            None if error.filename is None else str(error.filename),
        )
    return "RuntimeError", f"{first}\n{''.join(traceback.format_exception(error))}"


def serve(
    connection, work: Callable[[Any], Any], environment: Mapping[str, str], parent: int
) -> None:
    """What a worker does: task after task, until there are no more or the parent is gone."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = "result", work(task)
        except Exception as error:  # whatever it is, the first process says it
            answer = _described(error)
        with contextlib.suppress(OSError):
            connection.send(answer)


def end_with(parent: int) -> None:
    """Let this process die when the process `parent`, which started it, does."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)
