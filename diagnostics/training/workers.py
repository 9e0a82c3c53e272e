"""Processes that share long tasks, and end with the process that started them.

However the first process ends, by Ctrl-C, SIGTERM or kill -9, no worker outlives it
(`processes.end_with`), and a worker that waits for a task reads the end of its pipe. Workers ignore
Ctrl-C; the first process ends them.

Tasks and results are passed as plain data, errors as their kind and their text.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.processes import end_with

END_SECONDS = 10.0
"""Longest wait for a killed worker, which only has to release its memory."""


def share_out(
    work: Callable[[Any], Any], tasks: Sequence[Any], environments: Sequence[Mapping[str, str]]
) -> Iterator[Any]:
    """Run tasks in several processes, and yield their results as they come.

    Whatever ends this generator ends the workers at once.

    Args:
        work: A function of a module, called with one task.
        tasks: Plain data, handed out in this order.
        environments: Environment variables of each worker; their number is that of the workers.

    Yields:
        The result of each task, in the order of completion.

    Raises:
        DiagnosticsError: A worker died. An error of a task is raised here as well.
    """
    _start_tracker()
    todo = list(reversed(tasks))
    workers: list[_Worker] = []
    try:
        for environment in environments[: len(tasks)]:
            workers.append(_Worker(work, environment))
            workers[-1].give(todo.pop())
        while busy := [worker for worker in workers if worker.task is not None]:
            for worker in _ready(busy):
                result = worker.take()
                if todo:
                    worker.give(todo.pop())
                yield result
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join(END_SECONDS)
            worker.connection.close()


def _start_tracker() -> None:
    """Start Python's resource tracker without its warning about resources of killed workers.

    It releases those resources in any case.
    """
    from multiprocessing import resource_tracker

    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    from multiprocessing.connection import wait

    by_connection = {worker.connection: worker for worker in workers}
    return [by_connection[connection] for connection in wait(list(by_connection))]


class _Worker:
    """A worker process, seen from the first process."""

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
        # a worker that is gone is noticed when its result is asked for
        with contextlib.suppress(OSError):
            self.connection.send(task)

    def take(self) -> Any:
        """Wait for the result of the current task."""
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
    """A worker's error, of its own kind where the command line has a message for that kind."""
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
    """Run in a worker: do one task after the other until the pipe ends.

    Args:
        connection: Pipe to the first process.
        work: A function, called with one task.
        environment: Environment variables of this worker.
        parent: Process id of the first process.
    """
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
        except Exception as error:  # of any kind: the first process reports it
            answer = _described(error)
        with contextlib.suppress(OSError):
            connection.send(answer)
