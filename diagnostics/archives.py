"""Plain data out of a torch archive, read without running anything in it.

A `.pt` file is a zip whose `data.pkl` is a program for a small stack machine. Here only the instructions that build
dicts, lists, tuples, text, numbers, booleans and None are carried out. Those that name or call code
(classes, functions, storages of tensors) leave an `Opaque` mark in place of a value: nothing is imported or called,
so an archive from a stranger can do no more than be refused.
"""

from __future__ import annotations

import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diagnostics.types import DiagnosticsError

LARGEST = 2 * 2**30
"""Bytes of the program that are read at most."""


class Opaque:
    """A value that only code could build."""

    def __repr__(self) -> str:
        return "a value that needs code to be built"


def read_archive(path: str | Path) -> Any:
    """The value that a torch archive holds, with `Opaque` where it is not plain data.

    Raises DiagnosticsError for a file that is missing, damaged, too large or no archive of that kind.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > LARGEST:
                raise ValueError(f"{len(names)} data.pkl of at most {LARGEST} bytes in it")
            return _Machine().run(archive.read(names[0]))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error, EOFError, OverflowError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise DiagnosticsError(f"{path} cannot be read as a torch archive ({reason}). Check the file, or write its rows as JSONL.") from error


class _Machine:
    """The stack machine, for instructions that build plain data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for instruction, argument, _ in pickletools.genops(program):
            name = instruction.name
            if name == "STOP":
                return self.stack[-1]
            if name in _PUSHES:
                self.stack.append(_PUSHES[name](argument))
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name in _OPAQUE:
                self.replace(_OPAQUE[name], Opaque())
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"instruction {name} is not one that plain data needs")
        raise ValueError("it ends in the middle")

    def replace(self, count: int, value: Any) -> None:
        """Put a value in place of the uppermost `count`."""
        self.pop(count)
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        return self.pop(len(self.stack) - self.marks.pop())

    def tuple_of(self, count: int) -> None:
        """The uppermost values as one tuple."""
        self.stack.append(tuple(self.pop(count)))

    def extend(self, values: list[Any]) -> None:
        """Add values to the list on top."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], Opaque):
            raise ValueError("a value is added to something that is no list")

    def update(self, values: list[Any]) -> None:
        """Add keys and values, in turn, to the dict on top."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(values[::2], values[1::2], strict=True))
        elif not isinstance(self.stack[-1], Opaque):
            raise ValueError("a key is set on something that is no dict")

    def pop(self, count: int) -> list[Any]:
        """Take the uppermost values."""
        first = len(self.stack) - count
        if first < 0 or count < 0:
            raise ValueError("an instruction finds too few values")
        values = self.stack[first:]
        del self.stack[first:]
        return values


def _argument(value: Any) -> Any:
    return value


_PUSHES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {}, "EMPTY_LIST": lambda _: [], "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _argument),
    "GLOBAL": lambda _: Opaque(),
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.stack.pop() and None,
    "BINPUT": lambda m, at: m.memo.__setitem__(at, m.stack[-1]),
    "LONG_BINPUT": lambda m, at: m.memo.__setitem__(at, m.stack[-1]),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "BINGET": lambda m, at: m.stack.append(m.memo[at]),
    "LONG_BINGET": lambda m, at: m.stack.append(m.memo[at]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1), "TUPLE2": lambda m, _: m.tuple_of(2), "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend(m.pop(1)), "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update(m.pop(2)), "SETITEMS": lambda m, _: m.update(m.since_mark()),
}
_OPAQUE = {"STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "BUILD": 2, "BINPERSID": 1}
"""Instructions that name or call code, and how many values they take."""
