"""Plain data out of a torch archive, read without running anything in it.

A `.pt` file is a zip archive whose `data.pkl` is a program for a small stack machine. Here only the
instructions that build dicts, lists, tuples, text, numbers, booleans and None are carried out.
Those that name or call code (classes, functions, storages of tensors) leave an `Opaque` mark in
place of a value. Nothing is imported or called, so an untrusted archive cannot execute code.
`torch.load` with weights_only=True does not serve here: it fails at the first class that it does
not know, and real dumps hold such classes beside the plain rows.

Nor can an archive hang the reader or fill its memory. The number of entries, the sizes, the
instructions, the nesting, and the size of the value (with everything that is shared in it counted
as often as it occurs) are bounded, each before the work that it would cause. Nothing here
recurses."""

from __future__ import annotations

import pickletools
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diagnostics.core.errors import DiagnosticsError

MAX_DIRECTORY_BYTES = 2**26
"""Bytes of the zip's list of entries: half a million of them, as torch names them. zipfile reads
the list as a whole.
"""
MAX_ENTRIES = 500_000
"""Entries of the zip. torch writes one per tensor, and a dump of rollouts has a few thousand."""
MAX_PROGRAM_BYTES = 2**29
"""Bytes of the program: enough for 2^25 instructions with the longest numbers, and their texts."""
ALWAYS_ALLOWED_BYTES = 2**24
"""A program up to this size may be compressed to any degree: it is read within seconds."""
MAX_PACKING_RATIO = 100
"""Compression that is allowed for a larger program. torch does not compress at all, and token ids
shrink to a tenth.
"""
MAX_INSTRUCTIONS = 2**25
"""Instructions: ids, log-probabilities and masks of ten million tokens, read in about twenty
seconds.
"""
MAX_TEXT = 2**26
"""Characters of one text: ten times a response of a million tokens."""
MAX_NESTING = 100
"""Levels of lists, tuples and dicts inside each other. Dumps have fewer than ten, and Python's own
printer fails near 1000.
"""
MAX_EXPANDED = 2**27
"""Values, and each 64 characters of text, with what is shared counted wherever it occurs: code that
walks the value visits this many.
"""
KEY_LIMIT = 2**60
"""Smallest whole number that is refused as a key. Larger ones can be chosen so that thousands share
a hash, and building a dict of them would take forever.
"""
PIECE_BYTES = 2**20
"""Bytes that are decompressed at a time."""


class Opaque:
    """Stands for a value that only code could build."""

    def __repr__(self) -> str:
        return "a value that needs code to be built"


def read_archive(path: str | Path) -> Any:
    """Return the value that a torch archive holds, with `Opaque` for what is not plain data.

    Args:
        path: A `.pt` file.

    Returns:
        Dicts, lists, tuples, text, numbers, booleans, None and `Opaque`.

    Raises:
        DiagnosticsError: The file is missing, damaged, exceeds a bound of this module, or is no
            such archive.
    """
    path = Path(path)
    try:
        value = _PickleMachine().run(_program(path))
        _require_small(value)
        return value
    except _REFUSED as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
        raise DiagnosticsError(
            f"{path} cannot be read as a torch archive ({reason}). Check the file, or write its"
            " rows as JSONL."
        ) from error


_REFUSED = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OverflowError,
    RuntimeError,
    MemoryError,
)
"""Errors that damage to a zip, or to the program in it, leads to."""


def _program(path: Path) -> bytes:
    """Return the bytes of the zip's only data.pkl, at most as many as are allowed."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file, zipfile.ZipFile(_BoundedFile(file)) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"{len(entries)} entries, and {MAX_ENTRIES} are the most")
        found = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(found) != 1 or found[0].file_size > MAX_PROGRAM_BYTES:
            raise ValueError(f"{len(found)} data.pkl of at most {MAX_PROGRAM_BYTES} bytes in it")
        _require_plainly_packed(found[0])
        return b"".join(_pieces(archive, found[0]))


def _require_plainly_packed(entry: zipfile.ZipInfo) -> None:
    """Raise ValueError for a compression that torch does not write, or one beyond the bound."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("data.pkl is packed in a way that torch does not write")
    if entry.file_size > max(ALWAYS_ALLOWED_BYTES, MAX_PACKING_RATIO * entry.compress_size):
        raise ValueError(
            f"{entry.compress_size} bytes that unpack to {entry.file_size}, and"
            f" {MAX_PACKING_RATIO} times is the most"
        )


def _pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yield the entry's content. The size that it names is not trusted: reading stops one byte
    beyond it.
    """
    left = entry.file_size
    with archive.open(entry) as content:
        while piece := content.read(min(PIECE_BYTES, left + 1)):
            left -= len(piece)
            if left < 0:
                raise ValueError(
                    f"data.pkl holds more than the {entry.file_size} bytes that it names"
                )
            yield piece
    if left:
        raise ValueError(f"data.pkl ends {left} bytes early")


class _BoundedFile:
    """A file that refuses to be read in pieces larger than the longest list of entries: zipfile
    asks for whatever size a zip names.
    """

    def __init__(self, file) -> None:
        self.file = file
        self.seek = file.seek
        self.tell = file.tell
        self.close = file.close
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        """Return that many bytes, or all the rest for a negative size. Raises ValueError beyond the
        bound.
        """
        if size > MAX_DIRECTORY_BYTES:
            raise ValueError(
                f"it names a part of {size} bytes, and {MAX_DIRECTORY_BYTES} are the most"
            )
        found = self.file.read(size if size >= 0 else MAX_DIRECTORY_BYTES + 1)
        if len(found) > MAX_DIRECTORY_BYTES:
            raise ValueError(f"it has a part of more than {MAX_DIRECTORY_BYTES} bytes")
        return found


def _require_small(value: Any) -> None:
    """Raise ValueError for a value that contains itself, is nested too deeply, or would take too
    long to walk. What is shared is visited once and counted wherever it occurs.
    """
    totals: dict[int, tuple[int, int]] = {}
    open_: set[int] = set()
    todo: list[tuple[Any, bool]] = [(value, False)]
    while todo:
        item, seen = todo.pop()
        if not isinstance(item, dict | list | tuple) or id(item) in totals:
            continue
        if seen:
            open_.discard(id(item))
            totals[id(item)] = _measured(item, totals)
        elif id(item) in open_:
            raise ValueError("a value in it holds itself")
        else:
            open_.add(id(item))
            todo.append((item, True))
            todo += [
                (part, False) for part in _parts(item) if isinstance(part, dict | list | tuple)
            ]
    if _measured([value], totals)[0] > MAX_EXPANDED:
        raise ValueError(_TOO_LARGE)


_TOO_LARGE = f"written out, its value holds more than {MAX_EXPANDED} parts"


def _parts(item: dict | list | tuple):
    """Return what a container holds."""
    return item.values() if isinstance(item, dict) else item


def _measured(item: dict | list | tuple, totals: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values in a container, itself included, and its levels. Raises
    ValueError where either is too large.
    """
    size = 1 + (
        sum(1 + len(key) // 64 for key in item if isinstance(key, str))
        if isinstance(item, dict)
        else 0
    )
    deepest = 0
    for part in _parts(item):
        if isinstance(part, dict | list | tuple):
            inner, levels = totals[id(part)]
            size, deepest = size + inner, max(deepest, levels)
        else:
            size += 1 + (len(part) // 64 if isinstance(part, str) else 0)
    if deepest >= MAX_NESTING:
        raise ValueError(f"its values are nested more than {MAX_NESTING} deep")
    if size > MAX_EXPANDED:
        raise ValueError(_TOO_LARGE)
    return size, deepest + 1


class _PickleMachine:
    """The stack machine, limited to instructions that build plain data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Carry out a program and return the value on top of the stack at its end. Raises
        ValueError for an instruction that plain data does not need.
        """
        for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            name = instruction.name
            if count >= MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
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
        """Put a value in place of the uppermost `count` values."""
        self.pop(count)
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take the values that were pushed since the last mark."""
        return self.pop(len(self.stack) - self.marks.pop())

    def tuple_of(self, count: int) -> None:
        """Put the uppermost `count` values into one tuple."""
        self.stack.append(tuple(self.pop(count)))

    def extend(self, values: list[Any]) -> None:
        """Add values to the list on top."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], Opaque):
            raise ValueError("a value is added to something that is no list")

    def update(self, values: list[Any]) -> None:
        """Add keys and values, which alternate, to the dict on top."""
        if isinstance(self.stack[-1], dict):
            _require_keys(values[::2])
            self.stack[-1].update(zip(values[::2], values[1::2], strict=True))
        elif not isinstance(self.stack[-1], Opaque):
            raise ValueError("a key is set on something that is no dict")

    def pop(self, count: int) -> list[Any]:
        """Take the uppermost `count` values."""
        first = len(self.stack) - count
        if first < 0 or count < 0:
            raise ValueError("an instruction finds too few values")
        values = self.stack[first:]
        del self.stack[first:]
        return values


def _require_keys(keys: list[Any]) -> None:
    """Raise ValueError for keys other than text and small whole numbers. The hash of a tuple walks
    everything in it, as often as it occurs and as deep as it goes.
    """
    for key in keys:
        if not isinstance(key, str | int):
            raise ValueError(
                f"a key is a {type(key).__name__}, and text and whole numbers are the only keys"
            )
        if isinstance(key, int) and not -KEY_LIMIT < key < KEY_LIMIT:
            raise ValueError(
                f"a key is a whole number of {key.bit_length()} bits, and 60 are the most"
            )


def _argument(value: Any) -> Any:
    return value


def _text(value: str) -> str:
    if len(value) > MAX_TEXT:
        raise ValueError(f"a text of {len(value)} characters, and {MAX_TEXT} are the most")
    return value


_PUSHES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _argument),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _text),
    "GLOBAL": lambda _: Opaque(),
}
"""Instructions that push one value, and how it is made from their argument."""
_ACTIONS: dict[str, Callable[[_PickleMachine, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.stack.pop() and None,
    "BINPUT": lambda m, at: m.memo.__setitem__(at, m.stack[-1]),
    "LONG_BINPUT": lambda m, at: m.memo.__setitem__(at, m.stack[-1]),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "BINGET": lambda m, at: m.stack.append(m.memo[at]),
    "LONG_BINGET": lambda m, at: m.stack.append(m.memo[at]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend(m.pop(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update(m.pop(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
}
"""Instructions that work on the stack."""
_OPAQUE = {"STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "BUILD": 2, "BINPERSID": 1}
"""Instructions that name or call code, and how many values they take."""
