"""A chat template renders in a process of its own, with bounds on time, memory and length.

A template is a program that came with a tokenizer. The library's sandbox keeps it from files and
from the interpreter; nothing keeps it from looping for ever, or from writing without end. On Linux
a forked process renders, and is ended when it takes longer, needs more or writes more than any real
template does; elsewhere only the length is bounded."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import time
import warnings
import weakref
from multiprocessing.connection import Connection, Pipe
from typing import Any

from diagnostics.core.errors import DiagnosticsError

SECONDS = 10
"""Processor time for one conversation; the largest real templates take milliseconds."""
PATIENCE = 10
"""Seconds on the clock for each of those, on a machine that is busy with other things."""
MEMORY = 2 * 2**30
"""Bytes beyond what the process holds when it starts: room for the compiled template and for a long
conversation.
"""
MEMORY_PER_BYTE = 64
"""Further bytes for each byte of the conversation, which is copied some times at up to four bytes a
character.
"""
LENGTH = 2**20
"""Characters that a template may write of its own."""
LENGTH_PER_CHARACTER = 16
"""Characters that it may write for each that it was given."""


class Template:
    """A tokenizer's chat template, called with messages."""

    def __init__(self, tokenizer):
        self.tokenizer, self._renderer = tokenizer, None

    def __call__(self, messages: list[dict], where: str, **arguments) -> str:
        """The rendered text. Raises DiagnosticsError where the template refuses, fails or goes
        beyond a bound.

        messages and arguments: plain values, as JSON has them. where: the row, for the error.
        """
        try:
            request = json.dumps([messages, arguments])
        except (TypeError, ValueError, RecursionError) as error:
            raise DiagnosticsError(
                f"{where}: {str(error)[:200]}. A chat template takes texts, numbers, lists and"
                " objects. Mend that row."
            ) from error
        answer = self._answer(request)
        if "text" in answer:
            return answer["text"]
        raise DiagnosticsError(
            f"{where}: the chat template does not render this conversation ({answer['refused']})."
            " Mend that row, or choose another template with --chat-template-kwargs"
            " '{\"chat_template\": …}'."
        )

    def _answer(self, request: str) -> dict[str, str]:
        if self._renderer is None and sys.platform == "linux":
            self._renderer = _start(self.tokenizer)
        if self._renderer is None:
            return _rendered(self.tokenizer, request)
        answer = self._renderer.ask(request.encode())
        if answer is None:  # the process was ended, and the next conversation gets another
            answer, self._renderer = {"refused": self._renderer.ended_by}, None
        return answer


def _rendered(tokenizer, request: str) -> dict[str, str]:
    """The text, or why there is none; a template may raise anything."""
    messages, arguments = json.loads(request)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except MemoryError:
        return {"refused": f"it needs more than {MEMORY >> 30} GiB of memory"}
    except Exception as error:
        return {"refused": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
    longest = LENGTH + LENGTH_PER_CHARACTER * len(request)
    if not isinstance(text, str) or len(text) > longest:
        return {
            "refused": (
                "it writes"
                f" {f'{len(text)} characters, and {longest} are the most' if isinstance(text, str) else type(text).__name__}"
            )
        }
    return {"text": text}


# --- the process that renders
# -------------------------------------------------------------------------


class _Renderer:
    """The other end of the process; it is ended with this object."""

    def __init__(self, process: int, pipe: Connection):
        self.pipe, self.ended_by = pipe, ""
        self.close = weakref.finalize(self, _end, process, pipe, os.getpid())

    def ask(self, request: bytes) -> dict[str, str] | None:
        """What the process answers; None where it ended or had to be, and `ended_by` says why."""
        late = False
        try:
            self.pipe.send_bytes(request)
            late = not self.pipe.poll(SECONDS * PATIENCE)
            if not late:
                return json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):  # it ended by itself, or the system ended it
            pass
        ended = self.close()
        if late or ended == signal.SIGXCPU:
            self.ended_by = f"it takes longer than {SECONDS} seconds"
        else:
            self.ended_by = (
                f"its process was ended by {signal.Signals(ended).name}"
                if ended
                else "its process ended"
            )
        return None


def _start(tokenizer) -> _Renderer | None:
    """A renderer, None where the machine has no room for another process."""
    import transformers.utils.chat_template_utils  # noqa: F401  (once here, not in every process)

    ours, its = Pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # other threads wait or compute; the child uses none of them
            process = os.fork()
    except OSError:
        return None
    if process == 0:
        _serve(tokenizer, its)
    its.close()
    return _Renderer(process, ours)


def _end(process: int, pipe: Connection, owner: int) -> int:
    """End the process, and return the signal that ended it before, 0 where none had; a fork of the
    owner leaves it alone.
    """
    if os.getpid() != owner:
        return 0
    pipe.close()
    for _ in range(20):  # it ends when the pipe closes, in a moment
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 0


def _serve(tokenizer, pipe: Connection) -> None:
    """Render what comes through the pipe until it closes; the forked process never leaves this
    function.
    """
    try:
        gc.freeze()  # nothing of the parent's is ever finalised here
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.closerange(3, pipe.fileno())  # locks and devices are the parent's
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        held = _held_bytes()
        while True:
            request = pipe.recv_bytes()
            _bound(held, len(request))
            pipe.send_bytes(json.dumps(_rendered(tokenizer, request.decode())).encode())
    finally:
        os._exit(0)


def _held_bytes() -> int | None:
    """Address space of this process, None where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _bound(held: int | None, length: int) -> None:
    """Set this process's limits for one conversation of so many bytes."""
    import resource

    limits: dict[Any, int] = {
        resource.RLIMIT_CPU: math.ceil(time.process_time()) + SECONDS,
        resource.RLIMIT_CORE: 0,
    }
    if held is not None:
        limits[resource.RLIMIT_AS] = held + MEMORY + MEMORY_PER_BYTE * length
    for kind, wanted in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(
            kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
