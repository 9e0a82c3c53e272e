"""Processes beside this one: work that is shared out among copies, and an end that is shared too.

A copy sees what this process has in memory, so it costs some milliseconds and nothing is sent to
it; its results come back through a pipe. Where a copy is not safe, this process does everything. No
process outlives the one that started it: Linux kills it too (PR_SET_PDEATHSIG), and on other
systems a thread checks once per second whether the parent still exists.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
_most = 4  # more processes wait for the last piece
_sharing = False
PARENT_SECONDS = 1.0
"""Time between two checks for the parent: the most that an orphan computes in vain."""
PR_SET_PDEATHSIG = 1
"""Option of Linux' prctl: send this process a signal when its parent dies."""
Result = TypeVar("Result")


def end_with(parent: int) -> None:
    """Let this process die with the process `parent`, which started it."""
    if sys.platform == "linux":
        _die_with_the_parent()
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _die_with_the_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def may_fork() -> bool:
    """Whether a copy of this process can work: on Linux, with no thread beside it but such as show
    progress, and with no GPU in use. A copy has no use for the streams that those write to.
    """
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    main = threading.main_thread()
    alone = all(thread is main or thread.daemon for thread in threading.enumerate())
    here = threading.current_thread() is main
    return sys.platform == "linux" and here and alone and not on_gpu


def usable() -> int:
    """Processes that work can be shared out among: as many as this one may use cores, up to four,
    where a copy is safe, otherwise one. While work is shared out already, that is one as well.
    """
    return min(len(os.sched_getaffinity(0)), _most) if may_fork() and not _sharing else 1


def leave_cores_to_others() -> None:
    """From now on this process makes no copies of its own accord: others use the cores."""
    global _most
    _most = 1


def share_out(
    names: Sequence[Name],
    work: Callable[[Name], Result],
    workers: int | None = None,
    *,
    tell: Callable[[int], Any] = lambda count: None,
) -> dict[Name, Result]:
    """Do a piece of work for each name, in this process and in copies of it.

    Every process takes the next name as soon as it is free. What a copy did not finish, because it
    was killed or failed, this process does itself, so nothing is lost and an error is raised here.

    Args:
        names: At most 255 names.
        work: Makes the result of one name; it can be pickled.
        workers: Number of processes; where None, as many as are `usable`.
        tell: Is told in this process how many names have been taken since it was told last.

    Returns:
        The result of every name.
    """
    global _sharing
    workers = workers or usable()
    queue, end = os.pipe()
    os.write(end, bytes(range(len(names))))
    os.close(end)
    copies: list[tuple[int, int]] = []
    done: dict[Name, Result] = {}
    before, _sharing = _sharing, _sharing or workers > 1
    try:
        for _ in range(min(workers, len(names)) - 1):
            copies.append(_copy(queue, names, work))
        done |= _take(queue, names, work, tell)
        for _, answers in copies:
            done |= _answers(answers)
    finally:
        _sharing = before
        os.close(queue)
        for process, _ in copies:
            _end(process)
    return {name: done[name] if name in done else work(name) for name in names}


def _take(
    queue: int,
    names: Sequence[Name],
    work: Callable[[Name], Result],
    tell: Callable[[int], Any] = lambda count: None,
) -> dict[Name, Result]:
    """Results of the names that this process takes from the queue until it is empty."""
    done, taken = {}, 0
    while number := os.read(queue, 1):
        tell(number[0] - taken)
        taken, name = number[0], names[number[0]]
        done[name] = work(name)
    tell(len(names) - taken)
    return done


def _copy(queue: int, names: Sequence[Name], work: Callable[[Name], Result]) -> tuple[int, int]:
    """A copy of this process at work: its number and the pipe that its results come through."""
    answers, end = os.pipe()
    gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # idle threads of numpy's BLAS
        process = os.fork()
    if process:
        gc.unfreeze()
        os.close(end)
        return process, answers
    try:
        _die_with_the_parent()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        logging.disable()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        with os.fdopen(end, "wb") as pipe:
            pickle.dump(_take(queue, names, work), pipe, pickle.HIGHEST_PROTOCOL)
    finally:
        os._exit(0)


def _answers(pipe: int) -> dict[Any, Any]:
    """The results of a copy; none where it did not finish."""
    with os.fdopen(pipe, "rb") as answers:
        content = answers.read()
    try:
        return pickle.loads(content)
    except (EOFError, pickle.UnpicklingError):
        return {}


def _end(process: int) -> None:
    """Wait for a copy; one that is still at work is of no use any more."""
    if os.waitpid(process, os.WNOHANG) == (0, 0):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
