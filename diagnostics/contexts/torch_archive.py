"""Plain data out of a torch archive, read without running anything in it.

A `.pt` file is a zip whose `data.pkl` is a program for a small stack machine. Here only the
instructions that build dicts, lists, tuples, text, numbers, booleans and None are carried out.
Those that name or call code (classes, functions, storages of tensors) leave an `Opaque` mark in
place of a value: nothing is imported or called, so an archive from a stranger can do no more than
be refused.

Nor can it hang the reader or fill its memory: entries, sizes, instructions, nesting and the size of
the value with everything that is shared in it counted as often as it stands there are bounded, each
before the work it would cause. Nothing here recurses."""

from __future__ import annotations

import pickletools
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diagnostics.core.errors import DiagnosticsError

DIRECTORY = 2**26
"""Bytes of the zip's list of entries: half a million of them, as torch names them; zipfile reads
them all at once.
"""
ENTRIES = 500_000
"""Entries of the zip; torch writes one a tensor, and a dump of rollouts has some thousands."""
PROGRAM = 2**29
"""Bytes of the program: what 2^25 instructions with the longest number each, and their texts, come
to.
"""
SMALL = 2**24
"""Bytes up to which a program may be packed as tightly as it likes: it is read within seconds."""
RATIO = 100
"""Times by which a larger program may be packed. torch does not pack at all, and token ids shrink
to a tenth.
"""
INSTRUCTIONS = 2**25
"""Instructions: ids, log-probabilities and masks of ten million tokens, read in about twenty
seconds.
"""
TEXT = 2**26
"""Bytes of one text: ten times a response of a million tokens."""
NESTING = 100
"""Levels of lists, tuples and dicts in each other. Dumps have fewer than ten, and Python's own
printer gives up near 1000.
"""
EXPANDED = 2**27
"""Values, and each 64 characters of text, with what is shared counted everywhere it stands: whoever
walks the value meets so many.
"""
LARGEST_KEY = 2**60
"""Least whole number that is no key: larger ones can be made so that thousands share a hash, and a
dict of them takes for ever.
"""
PIECE = 2**20
"""Bytes that are unpacked at a time."""


class Opaque:
    """A value that only code could build."""

    def __repr__(self) -> str:
        return "a value that needs code to be built"


def read_archive(path: str | Path) -> Any:
    """The value that a torch archive holds, with `Opaque` where it is not plain data.

    Raises DiagnosticsError for a file that is missing, damaged, beyond the bounds above or no
    archive of that kind."""
    path = Path(path)
    try:
        value = _Machine().run(_program(path))
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
"""What damage to a zip, or to the program in it, ends in."""


def _program(path: Path) -> bytes:
    """The bytes of the one data.pkl in the zip, never more than are allowed."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file, zipfile.ZipFile(_Sparing(file)) as archive:
        entries = archive.infolist()
        if len(entries) > ENTRIES:
            raise ValueError(f"{len(entries)} entries, and {ENTRIES} are the most")
        found = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(found) != 1 or found[0].file_size > PROGRAM:
            raise ValueError(f"{len(found)} data.pkl of at most {PROGRAM} bytes in it")
        _require_plainly_packed(found[0])
        return b"".join(_pieces(archive, found[0]))


def _require_plainly_packed(entry: zipfile.ZipInfo) -> None:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("data.pkl is packed in a way that torch does not write")
    if entry.file_size > max(SMALL, RATIO * entry.compress_size):
        raise ValueError(
            f"{entry.compress_size} bytes that unpack to {entry.file_size}, and {RATIO} times is"
            " the most"
        )


def _pieces(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The entry's content. The size that it names is not believed: reading stops one byte beyond
    it.
    """
    left = entry.file_size
    with archive.open(entry) as content:
        while piece := content.read(min(PIECE, left + 1)):
            left -= len(piece)
            if left < 0:
                raise ValueError(
                    f"data.pkl holds more than the {entry.file_size} bytes that it names"
                )
            yield piece
    if left:
        raise ValueError(f"data.pkl ends {left} bytes early")


class _Sparing:
    """A file that refuses to be read in pieces larger than the longest list of entries: zipfile
    asks for whatever a zip names.
    """

    def __init__(self, file) -> None:
        self.file = file
        self.seek, self.tell, self.close, self.seekable = (
            file.seek,
            file.tell,
            file.close,
            file.seekable,
        )

    def read(self, size: int = -1) -> bytes:
        """So many bytes; all that are left for a negative size."""
        if size > DIRECTORY:
            raise ValueError(f"it names a part of {size} bytes, and {DIRECTORY} are the most")
        found = self.file.read(size if size >= 0 else DIRECTORY + 1)
        if len(found) > DIRECTORY:
            raise ValueError(f"it has a part of more than {DIRECTORY} bytes")
        return found


def _require_small(value: Any) -> None:
    """Raise ValueError for a value that holds itself, is nested too deeply or, walked, would never
    end.

    What is shared is looked at once and counted wherever it stands.
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
    if _measured([value], totals)[0] > EXPANDED:
        raise ValueError(_TOO_LARGE)


_TOO_LARGE = f"written out, its value holds more than {EXPANDED} parts"


def _parts(item: dict | list | tuple):
    return item.values() if isinstance(item, dict) else item


def _measured(item: dict | list | tuple, totals: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values in a container, itself among them, and levels. Raises ValueError where either is too
    large.
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
    if deepest >= NESTING:
        raise ValueError(f"its values are nested more than {NESTING} deep")
    if size > EXPANDED:
        raise ValueError(_TOO_LARGE)
    return size, deepest + 1


class _Machine:
    """The stack machine, for instructions that build plain data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
            name = instruction.name
            if count >= INSTRUCTIONS:
                raise ValueError(f"more than {INSTRUCTIONS} instructions")
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
            _require_keys(values[::2])
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


def _require_keys(keys: list[Any]) -> None:
    """Text and whole numbers: the hash of a tuple walks all that is in it, however often, and as
    deep as it goes.
    """
    for key in keys:
        if not isinstance(key, str | int):
            raise ValueError(
                f"a key is a {type(key).__name__}, and text and whole numbers are the only keys"
            )
        if isinstance(key, int) and not -LARGEST_KEY < key < LARGEST_KEY:
            raise ValueError(
                f"a key is a whole number of {key.bit_length()} bits, and 60 are the most"
            )


def _argument(value: Any) -> Any:
    return value


def _text(value: str) -> str:
    if len(value) > TEXT:
        raise ValueError(f"a text of {len(value)} characters, and {TEXT} are the most")
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
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
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
_OPAQUE = {"STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "BUILD": 2, "BINPERSID": 1}
"""Instructions that name or call code, and how many values they take."""
