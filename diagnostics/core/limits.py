"""How much a file from elsewhere may ask for, looked at before a library reads it.

A few kilobytes can declare a billion rows, a list of 2^60 values, or brackets in brackets without
end. Each function here reads what a file says about itself, with work that the file's own size
limits, and refuses what no honest file says. Nothing here recurses, and nothing imports torch."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from diagnostics.core.errors import DiagnosticsError

if TYPE_CHECKING:
    import pyarrow as pa

SMALL_CELLS = 2**24
"""Rows times columns that any table may have: read within seconds, however few bytes hold them."""
CELLS_A_BYTE = 200
"""Rows times columns for each byte of a larger table. Constant columns pack well, but a table has
some that are not.
"""
SMALL_TABLE = 2**30
"""Bytes of unpacked or repeated text that any table may have."""
BYTES_A_BYTE = 1000
"""The same for each byte of a larger table: the best that a packer makes of text that is not one
byte repeated.
"""
SHARE = 4
"""A table's cells, at eight bytes each, and its text may each take a quarter of the memory: copies
are made of both.
"""
JSON_LINE = 2**26
"""Characters of one line: a prompt of 50 MB is read, and refused for its tokens."""
JSON_DEPTH = 100
"""Brackets in brackets of one line. Chats with tools have under ten; Python's reader gives up near
1000.
"""
HEADER = 100_000_000
"""Bytes of a safetensors header, the library's own limit."""
TENSORS = 2**20
"""Tensors of a file; the largest mixtures of experts have some ten thousand."""
FIELDS = 2**16
"""Fields of a GGUF header; models have under a hundred."""
DIMENSIONS = 8
"""Dimensions of a tensor; GGUF knows four, and weights have at most five."""
ELEMENTS = 2**48
"""Numbers in one tensor: more than all weights of any model."""


def regular(path: str | Path) -> bool:
    """The path is a file of bytes; a pipe or a device would wait for ever. Links are followed."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def memory() -> int:
    """Bytes of main memory, or what the process may have of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        import resource
    except ImportError:  # not on Windows
        return found
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return found if limit == resource.RLIM_INFINITY else min(found, limit)


# --- JSON
# ---------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """The value of one JSON text. Raises ValueError, too, for one that is too long or nested too
    deeply.
    """
    if len(text) > JSON_LINE:
        raise ValueError(f"{len(text)} characters, and {JSON_LINE} are the most")
    if json_depth(text) > JSON_DEPTH:
        raise ValueError(f"its brackets are nested more than {JSON_DEPTH} deep")
    return json.loads(text)


def json_depth(text: str) -> int:
    """Brackets that are open at once, those in strings left out; at most what is said of a text
    that is no JSON.
    """
    most = text.count("[") + text.count("{")
    if most <= JSON_DEPTH:
        return most
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", outside):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


# --- parquet
# ------------------------------------------------------------------------------------------


def check_parquet(path: str | Path) -> None:
    """Raise ValueError for a parquet file whose table does not fit the memory, or a small file with
    a huge one.

    A folder of parquet files is looked at file by file. What is no parquet at all is left for the
    reader to say."""
    path = Path(path)
    if path.is_dir():
        for part in sorted(path.rglob("*.parquet")):
            check_parquet(part)
        return
    if path.exists() and not regular(path):
        raise ValueError("it is not a regular file")
    import pyarrow.parquet as pq

    metadata, size, room = pq.read_metadata(path), os.path.getsize(path), memory() // SHARE
    cells = metadata.num_rows * max(1, metadata.num_columns)
    allowed = min(max(SMALL_CELLS, CELLS_A_BYTE * size), room // 8)
    if not metadata.num_rows >= 0 or cells > allowed:
        raise ValueError(
            f"{size} bytes that hold {metadata.num_rows} rows of {metadata.num_columns} columns,"
            " too many for such a file or this machine"
        )
    allowed = min(max(SMALL_TABLE, BYTES_A_BYTE * size), room)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if (
        any(group.total_byte_size < 0 for group in groups)
        or sum(group.total_byte_size for group in groups) > allowed
    ):
        raise ValueError(
            f"{size} bytes that unpack to {sum(group.total_byte_size for group in groups)}, too"
            " many for such a file or this machine"
        )
    repeated = _repeated_text(groups)
    if repeated and _text_bytes(path, repeated, allowed) > allowed:
        raise ValueError(
            f"{size} bytes whose texts, repeated as they are, come to more than {allowed} bytes"
        )


def _repeated_text(groups: list) -> list[str]:
    """Columns of texts that stand once in the file and, by its own numbers, might come to too much
    in the table.
    """
    most: dict[str, int] = {}
    for group in groups:
        for number in range(group.num_columns):
            column = group.column(number)
            if (
                column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
                and column.has_dictionary_page
            ):
                most[column.path_in_schema] = (
                    most.get(column.path_in_schema, 0)
                    + column.num_values * column.total_uncompressed_size
                )
    return [name for name, size in most.items() if size > SMALL_TABLE]


def _text_bytes(path: Path, columns: list[str], enough: int) -> int:
    """Bytes of these columns' texts, each counted wherever it stands; counting ends beyond
    `enough`.
    """
    import pyarrow.parquet as pq

    total = 0
    with pq.ParquetFile(path, read_dictionary=columns) as file:
        for batch in file.iter_batches(columns=columns):
            total += sum(_repeated_bytes(array) for array in _leaves(batch.columns))
            if total > enough:
                break
    return total


def _leaves(arrays: list[pa.Array]) -> Iterator[pa.Array]:
    import pyarrow as pa

    todo = list(arrays)
    while todo:
        array = todo.pop()
        if pa.types.is_struct(array.type) or pa.types.is_nested(array.type):
            parts = array.flatten()
            todo += parts if isinstance(parts, list) else [parts]
        else:
            yield array


def _repeated_bytes(array: pa.Array) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(array.type):
        return array.nbytes
    lengths = pc.binary_length(array.dictionary).cast(pa.int64()) if len(array.dictionary) else None
    return 0 if lengths is None else pc.sum(lengths.take(array.indices.drop_null())).as_py() or 0


# --- weights
# ------------------------------------------------------------------------------------------


def check_weights(source: str | Path) -> None:
    """Look at the headers of a GGUF file, or of every safetensors file in a folder.

    A source that is not here, as a Hugging Face id, is left alone. Raises DiagnosticsError that
    names the file."""
    if not isinstance(source, str | Path):
        return
    source = Path(source)
    files = (
        [source]
        if source.suffix == ".gguf"
        else sorted(source.glob("*.safetensors"))
        if source.is_dir()
        else []
    )
    for file in files:
        if not file.exists():
            continue
        try:
            _check_header(file)
        except (ValueError, TypeError, KeyError, OSError, struct.error) as error:
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
            raise DiagnosticsError(
                f"No model can be loaded from {str(source)!r} (the header of {file.name} cannot be"
                f" trusted: {reason}). Fetch or write the file again."
            ) from error


def _check_header(path: Path) -> None:
    if not regular(path):
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _Gguf(file, size).check() if path.suffix == ".gguf" else _check_safetensors(file, size)


def _check_safetensors(file: BinaryIO, size: int) -> None:
    length = int.from_bytes(_exactly(file, 8, size), "little")
    if length > min(HEADER, size - 8):
        raise ValueError(f"it names a header of {length} bytes in a file of {size}")
    text = _exactly(file, length, size).decode()
    if json_depth(text) > JSON_DEPTH:
        raise ValueError(f"its brackets are nested more than {JSON_DEPTH} deep")
    header = json.loads(text)
    if not isinstance(header, dict) or len(header) > TENSORS:
        raise ValueError(f"its header is no object of at most {TENSORS} tensors")
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length:
                raise ValueError(
                    f"the tensor {name[:60]!r} lies at {first} to {last} of {size - 8 - length}"
                    " bytes"
                )
            _require_shape(entry["shape"], name)


def _require_shape(shape: Any, name: str) -> int:
    """Numbers in a tensor of that shape."""
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > DIMENSIONS
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise ValueError(
            f"the tensor {name[:60]!r} has no shape of at most {DIMENSIONS} dimensions"
        )
    if max(shape, default=0) > ELEMENTS or math.prod(shape) > ELEMENTS:
        raise ValueError(f"the tensor {name[:60]!r} is of {' x '.join(map(str, shape))} numbers")
    return math.prod(shape)


def _exactly(file: BinaryIO, count: int, size: int) -> bytes:
    """The next bytes of a file of that size. Raises ValueError where they are not there, before any
    memory is taken.
    """
    if count > size - file.tell():
        raise ValueError(
            f"it ends at {size} bytes, {count} further ones are named at {file.tell()}"
        )
    return file.read(count)


GGUF_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Size of a value by its type in the header: whole numbers, floats, truth values."""
GGUF_TEXT, GGUF_LIST = 8, 9


class _Gguf:
    """A walk over a GGUF header, every length compared with what is left of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def check(self) -> None:
        """Raise ValueError where the header names more than the file holds."""
        magic, version = _exactly(self.file, 4, self.size), self._number(4)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(
                f"it begins with {magic!r}, version {version}, and GGUF of version 2 or 3 is read"
            )
        tensors, fields = self._number(8), self._number(8)
        if tensors > TENSORS or fields > FIELDS:
            raise ValueError(f"it names {tensors} tensors and {fields} fields")
        for _ in range(fields):
            self._skip(self._number(8))
            self._value(self._number(4))
        for _ in range(tensors):
            self._tensor()

    def _number(self, width: int) -> int:
        return int.from_bytes(_exactly(self.file, width, self.size), "little")

    def _skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError(
                f"it ends at {self.size} bytes, {count} further ones are named at"
                f" {self.file.tell()}"
            )
        self.file.seek(count, os.SEEK_CUR)

    def _value(self, kind: int) -> None:
        """Pass over one value; a list of lists is no value that a model needs."""
        count = 1
        if kind == GGUF_LIST:
            kind, count = self._number(4), self._number(8)
        if kind in GGUF_BYTES:
            self._skip(GGUF_BYTES[kind] * count)
        elif kind == GGUF_TEXT and 8 * count <= self.size:
            for _ in range(count):
                self._skip(self._number(8))
        else:
            raise ValueError(f"it names {count} values of type {kind}")

    def _tensor(self) -> None:
        length = self._number(8)
        name = _exactly(self.file, length, self.size).decode(errors="replace")
        dimensions = self._number(4)
        if dimensions > DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]!r} has {dimensions} dimensions")
        _require_shape([self._number(8) for _ in range(dimensions)], name)
        self._number(4)
        offset = self._number(8)
        if offset > self.size:
            raise ValueError(f"the tensor {name[:60]!r} lies at {offset} of {self.size} bytes")
