"""Chat templates, rendered in a process of their own with bounds on time, memory and length.

A template is a program that came with a tokenizer. The library's sandbox keeps it from files and
from the interpreter; nothing keeps it from looping for ever, or from writing without end. On Linux
a forked process renders. It is ended when it takes longer, needs more memory or writes more than
any real template does. On other systems only the length is bounded."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import weakref
from collections import Counter
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
"""Further bytes for each byte of the conversation, which is copied several times at up to four
bytes per character."""
LENGTH = 2**20
"""Characters that a template may write of its own."""
LENGTH_PER_CHARACTER = 16
"""Further characters that a template may write for each character that it was given."""


GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark at which a template says that the assistant's own text begins."""
SHORT = 4096
"""Bytes of a conversation that no honest template spends seconds on."""
ENOUGH = 2
"""Such conversations after which a template is asked no more: every prompt would take as long."""
TOO_LONG = "it takes longer than"
ENDLESS = f"it did not end for {ENOUGH} short conversations"
_ended: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()
"""How often each template of a tokenizer had to be ended."""


class Template:
    """A tokenizer's chat template, called with messages."""

    def __init__(self, tokenizer):
        self.tokenizer, self._renderer = tokenizer, None

    def __call__(self, messages: list[dict], where: str, **arguments) -> str:
        """Render a conversation.

        Args:
            messages: Plain values, as JSON has them.
            where: The row that holds the conversation, for errors.
            arguments: Further arguments of the template, plain values as well.

        Raises:
            DiagnosticsError: The template refuses, fails or exceeds a bound.
        """
        return self._ask(messages, where, arguments, marked=False)["text"]

    def marks_replies(self, arguments: dict[str, Any]) -> bool:
        """Whether the template says what the assistant writes, by `{% generation %}` marks."""
        return bool(GENERATION.search(self._source(arguments)))

    def marked(
        self, messages: list[dict], where: str, **arguments
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation, and say which of its characters the assistant writes.

        Args:
            messages: As in a call.
            where: As in a call.
            arguments: As in a call.

        Returns:
            The text, and the first and last character (exclusive) of each part between the
            template's generation marks, in order.

        Raises:
            DiagnosticsError: As in a call; and the template has no generation marks.
        """
        if not self.marks_replies(arguments):
            raise DiagnosticsError(
                f"{where} has replies in several messages, and the chat template has no"
                " {% generation %} marks, so which tokens are the student's cannot be told. Name a"
                " template with marks, give response_ids with a loss_mask, or take the first"
                " message alone with --turns first."
            )
        answer = self._ask(messages, where, arguments, marked=True)
        return answer["text"], [(first, last) for first, last in answer["spans"]]

    def _source(self, arguments: dict[str, Any]) -> str:
        """The template's own text."""
        given = arguments.get("chat_template")
        named = self.tokenizer.chat_template
        if isinstance(named, dict):
            default = "tool_use" if arguments.get("tools") and "tool_use" in named else "default"
            return str(named.get(given or default) or given or "")
        return str(given or named)

    def _ask(
        self, messages: list[dict], where: str, arguments: dict[str, Any], *, marked: bool
    ) -> dict[str, Any]:
        try:
            request = json.dumps([messages, arguments, marked])
        except (TypeError, ValueError, RecursionError) as error:
            raise DiagnosticsError(
                f"{where}: {str(error)[:200]}. A chat template takes texts, numbers, lists and"
                " objects. Fix that row."
            ) from error
        template = str(arguments.get("chat_template") or self.tokenizer.chat_template)
        ended = _ended.setdefault(self.tokenizer, Counter())
        answer = self._answer(request) if ended[template] < ENOUGH else {"refused": ENDLESS}
        ended[template] += TOO_LONG in answer.get("refused", "") and len(request) <= SHORT
        if "text" in answer:
            return answer
        raise DiagnosticsError(
            f"{where}: the chat template does not render this conversation ({answer['refused']})."
            " Fix that row, or choose another template with --chat-template-kwargs"
            " '{\"chat_template\": …}'."
        )

    def _answer(self, request: str) -> dict[str, Any]:
        if self._renderer is None and sys.platform == "linux":
            self._renderer = _start(self.tokenizer)
        if self._renderer is None:
            return _rendered(self.tokenizer, request)
        answer = self._renderer.ask(request.encode())
        if answer is None:  # the process was ended, and the next conversation gets another
            answer, self._renderer = {"refused": self._renderer.ended_by}, None
        return answer


def _rendered(tokenizer, request: str) -> dict[str, Any]:
    """The rendered text, or the reason why there is none; a template may raise any error."""
    messages, arguments, marked = json.loads(request)
    spans: list[list[int]] = []
    try:
        if marked:
            text, spans = _with_marks(tokenizer, messages, arguments)
        else:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except MemoryError:
        return {"refused": f"it needs more than {MEMORY >> 30} GiB of memory"}
    except Exception as error:
        return {"refused": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
    longest = LENGTH + LENGTH_PER_CHARACTER * len(request)
    if not isinstance(text, str):
        return {"refused": f"it writes {type(text).__name__}"}
    if len(text) > longest:
        return {"refused": f"it writes {len(text)} characters, and {longest} are the most"}
    return {"text": text, "spans": spans} if marked else {"text": text}


def _with_marks(
    tokenizer, messages: list[dict], arguments: dict[str, Any]
) -> tuple[str, list[list[int]]]:
    """The rendered text and the spans between generation marks, which the library tells only where
    it tokenizes as well.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {name: value for name, value in arguments.items() if name != "chat_template"}
    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(
            arguments.get("chat_template"), arguments.get("tools")
        ),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **given},
    )
    (text,), (spans,) = rendered
    return text, [list(span) for span in spans]


# --- the process that renders


class _Renderer:
    """The parent's end of a rendering process, which ends with this object."""

    def __init__(self, process: int, pipe: Connection):
        self.pipe, self.ended_by = pipe, ""
        self.close = weakref.finalize(self, _end, process, pipe, os.getpid())

    def ask(self, request: bytes) -> dict[str, Any] | None:
        """Answer of the process; None where it ended or was ended, and `ended_by` says why."""
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
            self.ended_by = f"{TOO_LONG} {SECONDS} seconds"
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
    """End the process and return the signal that had ended it, or 0.

    A fork of the owner leaves the process alone.
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
    """Render the requests of the pipe until it closes.

    The forked process never leaves this function.
    """
    try:
        gc.freeze()  # nothing of the parent's is ever finalized here
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
