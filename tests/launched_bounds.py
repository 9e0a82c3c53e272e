"""Reads crafted and damaged files until a number of cases is done; run in a process of its own,
with little memory.

    python tests/launched_bounds.py FOLDER archives|parquet|weights|json SEED CASES

Every case ends in a value or in one DiagnosticsError; the last line says how many of each.
"""

import io
import json
import random
import resource
import struct
import sys
import zipfile
from pathlib import Path

from diagnostics.contexts.torch_archive import read_archive
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.limits import check_weights
from diagnostics.core.rows import read_rows
from diagnostics.core.schema import read_parquet

MEMORY = 6 * 2**30
SIMPLE = [
    b"N",
    b"\x88",
    b"\x89",
    b"}",
    b"]",
    b")",
    b"(",
    b"0",
    b"\x94",
    b"a",
    b"e",
    b"s",
    b"u",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"\x81",
    b"b",
    b"Q",
    b"\x93",
    b"K\x05",
    b"K\x07",
    b"M\x01\x02",
    b"J\xff\xff\xff\xff",
    b"G" + bytes(8),
    b"\x8a\x08" + b"\x7f" * 8,
    b"\x8a\xff" + b"\x55" * 255,
    b"X\x02\x00\x00\x00ab",
    b"\x8c\x01a",
    b"cbuiltins\nopen\n",
    b".",
]
ODD = [
    b"1",
    b"2",
    b"I9\n",
    b"L9L\n",
    b"\x8b\xff\xff\xff\x7f",
    b"T\xff\xff\xff\x7f",
    b"U\x01a",
    b"V\xe4\n",
    b"S'a'\n",
    b"F1\n",
    b"\x8e" + b"\xff" * 8,
    b"\x8d" + b"\xff" * 8,
    b"X\xff\xff\xff\xff",
    b"i",
    b"o",
    b"\x82\x01",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"\x95" + b"\x01" * 8,
    b"\x96" + b"\xff" * 8,
    b"P1\n",
    b"\xff",
]


def program(draw: random.Random) -> bytes:
    """Instructions in any order, in repetition, or one of the shapes that grow beyond all
    bounds.
    """
    kind = draw.randrange(6)
    n = draw.choice([3, 60, 1000, 50_000])
    if kind == 0:
        return b"\x80\x02" + b"".join(draw.choices(SIMPLE + ODD, k=draw.randrange(60)))
    if kind == 1:
        return (
            b"\x80\x02"
            + draw.choice([b"]", b"}", b"("])
            + b"".join(draw.choices(SIMPLE[:23], k=draw.randrange(200)))
            + b"."
        )
    if kind == 2:
        part = b"".join(draw.choices(SIMPLE, k=draw.randrange(1, 4)))
        return b"\x80\x02" + draw.choice(SIMPLE) + part * n + draw.choice([b".", b"Ns.", b""])
    steps = min(n, 200)
    if kind == 3:  # each tuple holds the last one twice
        end = draw.choice([b".", b"Ns.", b"\x85."])
        return (
            b"\x80\x02}"
            + b")q\x00"
            + b"".join(
                b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
                for i in range(min(steps, 250))
            )
            + end
        )
    if kind == 4:  # each list holds the last one twice, or itself
        own = draw.random() < 0.3
        return (
            b"\x80\x02"
            + b"".join(
                b"]q" + bytes([i + 1]) + b"h" + bytes([i + own]) + b"ah" + bytes([i]) + b"a"
                for i in range(min(steps, 250))
                if i or own
            )
            + b"."
        )
    if draw.random() < 0.5:  # as torch writes it
        part = b"}q\x01(X\x06\x00\x00\x00tokens]q\x02(" + b"K\x05" * n + b"eX\x01\x00\x00\x00nNu."
        return b"\x80\x02" + part
    keys = b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(min(n, 20_000))
    )
    return b"\x80\x02}(" + keys + b"u."


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A few bytes changed, a part cut, repeated or put in."""
    content = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(content)) if content else 0
        how = draw.randrange(5)
        if how == 0 and content:
            content[at] = draw.randrange(256)
        elif how == 1 and content:
            content[at : at + 4] = draw.choice(
                [
                    b"\xff\xff\xff\xff",
                    b"\xff\xff\xff\x7f",
                    b"\x00\x00\x00\x00",
                    struct.pack("<I", draw.randrange(2**32)),
                ]
            )
        elif how == 2:
            del content[at : at + draw.choice([1, 8, len(content)])]
        elif how == 3:
            content[at:at] = content[at : at + draw.choice([1, 100])]
        else:
            content[at:at] = draw.randbytes(draw.randrange(9))
    return bytes(content)


def archive(draw: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer,
        "w",
        draw.choice(
            [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
        ),
    ) as made:
        for _ in range(draw.choice([1, 1, 1, 2])):
            made.writestr(
                draw.choice(["a/data.pkl", "a/data.pkl", "b/data.pkl", "a/version"]), program(draw)
            )
    return buffer.getvalue() if draw.random() < 0.7 else damaged(draw, buffer.getvalue())


def table(draw: random.Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, depth = draw.choice([0, 1, 7, 5000, 2**19]), draw.choice([0, 0, 1, 30, 120])
    column = draw.choice(
        [
            lambda: pa.nulls(rows, pa.int8()),
            lambda: pa.array([draw.random() for _ in range(min(rows, 50))]),
            lambda: pa.DictionaryArray.from_arrays(
                pa.array([0] * min(rows, 1000), pa.int32()), pa.array(["x" * 20_000])
            ),
            lambda: pa.array([[1, 2, 3]] * min(rows, 100)),
            lambda: pa.array([{"role": "user", "content": "a"}] * min(rows, 50)),
        ]
    )()
    for _ in range(depth if len(column) <= 100 else 0):
        column = pa.StructArray.from_arrays([column], ["a"])
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({"x": column}),
        buffer,
        compression=draw.choice(["zstd", "snappy", "gzip", "none"]),
        use_dictionary=draw.random() < 0.7,
        store_schema=draw.random() < 0.5,
    )
    return buffer.getvalue() if draw.random() < 0.3 else damaged(draw, buffer.getvalue())


def header(draw: random.Random) -> bytes:
    text = lambda value: struct.pack("<Q", len(value)) + value
    if draw.random() < 0.5:
        fields = (
            text(b"a")
            + struct.pack("<IIQ", 9, 8, 2)
            + text(b"x")
            + text(b"y")
            + text(b"b")
            + struct.pack("<If", 6, 1.0)
        )
        made = (
            b"GGUF"
            + struct.pack("<IQQ", 3, 1, 2)
            + fields
            + text(b"w")
            + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)
            + bytes(64)
        )
    else:
        inner = json.dumps(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "__metadata__": {"format": "pt"},
            }
        ).encode()
        made = struct.pack("<Q", len(inner)) + inner + bytes(8)
    return damaged(draw, made)


def lines(draw: random.Random) -> bytes:
    part = draw.choice(
        ["[", '{"a":', "]", '"', '\\"', "\\", '{"prompt": "a"}', "1e999", "9" * 50, "\n", "\ud800"]
    )
    content = (part * draw.choice([1, 50, 100_000])).encode("utf-8", "surrogatepass")
    return draw.choice([b"", b'{"prompt": ']) + content + draw.choice([b"", b"}", b"\n{}"])


KINDS = {
    "archives": (archive, "a.pt", read_archive),
    "parquet": (table, "a.parquet", read_parquet),
    "json": (lines, "a.jsonl", read_rows),
}


def main(folder: Path, kind: str, seed: int, cases: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    draw, refused = random.Random(seed), 0
    for case in range(cases):
        if kind == "weights":
            content = header(draw)
            path, read = (
                folder / ("m.gguf" if content[:3] == b"GGU" else "model.safetensors"),
                check_weights,
            )
        else:
            make, name, read = KINDS[kind]
            content, path = make(draw), folder / name
        path.write_bytes(content)
        print(f"case {case}", flush=True)
        try:
            read(path if kind != "weights" or path.suffix == ".gguf" else folder)
        except DiagnosticsError as error:
            assert len(str(error)) < 2000
            refused += 1
    print(f"read {cases - refused} refused {refused}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
