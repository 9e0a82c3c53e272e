import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diagnostics.core import limits
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.limits import check_weights, json_depth, parse_json
from diagnostics.core.rows import read_rows
from diagnostics.core.schema import read_parquet


@pytest.mark.parametrize(
    "text, depth",
    [
        ("[" * 150 + "]" * 150, 150),
        ('{"a":' * 120 + "1" + "}" * 120, 120),
        ("[]" * 200, 1),
        ('"' + "[" * 300 + '"', 0),
        ('["' + "{" * 300 + '\\"' + "[" * 300 + '", {}]', 2),
        ('["\\\\", "' + "[" * 300 + '"]', 1),
    ],
)
def test_the_depth_of_brackets(text, depth):
    assert json_depth(text) == depth


def test_json_that_is_deep_or_long(monkeypatch):
    assert parse_json("[" * 100 + "]" * 100) is not None and parse_json(
        '{"a": "' + "[" * 500 + '"}'
    ) == {"a": "[" * 500}
    with pytest.raises(ValueError, match=r"^its brackets are nested more than 100 deep$"):
        parse_json("[" * 10**6 + "]" * 10**6)
    monkeypatch.setattr(limits, "JSON_LINE", 10)
    with pytest.raises(ValueError, match=r"^11 characters, and 10 are the most$"):
        parse_json('"aaaaaaaaa"')


def test_a_deep_line_of_a_prompt_file_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"p\.jsonl cannot be read \(line 2 is not JSON: its brackets are nested more than 100"
            r" deep\)\."
        ),
    ):
        read_rows(path)


def test_a_small_parquet_file_of_many_rows(tmp_path):
    rows = 2**25
    writer = pq.ParquetWriter(
        tmp_path / "a.parquet", pa.schema([("x", pa.int8())]), compression="zstd"
    )
    part = pa.table({"x": pa.nulls(rows // 8, pa.int8())})
    for _ in range(8):
        writer.write_table(part)
    writer.close()
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"a\.parquet cannot be read as parquet \(\d+ bytes that hold {rows} rows of 1 columns,"
            r" too many"
        ),
    ):
        read_parquet(tmp_path / "a.parquet")


def repeated(tmp_path, *, nested: bool):
    """Half a million rows of one text of 32 KB: sixteen gigabytes out of a few kilobytes."""
    texts = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(500_000, np.int32)), pa.array(["x" * 2**15])
    )
    column = (
        pa.ListArray.from_arrays(np.arange(500_001, dtype=np.int32), texts) if nested else texts
    )
    pq.write_table(
        pa.table({"x": column, "n": np.arange(500_000)}),
        tmp_path / "a.parquet",
        compression="zstd",
        store_schema=False,
    )
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("nested", [False, True])
def test_a_text_that_stands_once_and_is_repeated(tmp_path, nested):
    path = repeated(tmp_path, nested=nested)
    assert os.path.getsize(path) < 5 * 2**20
    with pytest.raises(
        DiagnosticsError, match=r"whose texts, repeated as they are, come to more than \d+ bytes\)"
    ):
        read_parquet(path)


def test_pages_that_unpack_to_a_thousand_times_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SMALL_TABLE", 2**26)
    pq.write_table(
        pa.table({"x": ["y" * 2**26, "z" * 2**26]}),
        tmp_path / "a.parquet",
        compression="zstd",
        use_dictionary=False,
    )
    with pytest.raises(DiagnosticsError, match=r"bytes that unpack to 1\d+, too many"):
        read_parquet(tmp_path / "a.parquet")


def test_honest_tables_are_read(tmp_path):
    """Constant columns, repeated texts, gaps and lists, as our own tables hold them."""
    frame = pd.DataFrame(
        {
            "a": "text" * 500,
            "b": np.zeros(200_000),
            "c": [[1, 2, 3]] * 200_000,
            "d": [None, "x"] * 100_000,
        }
    )
    frame.to_parquet(tmp_path / "a.parquet")
    read = read_parquet(tmp_path / "a.parquet")
    assert (
        len(read) == 200_000 and read["a"][7] == "text" * 500 and read["d"].notna().sum() == 100_000
    )


def test_brackets_in_brackets_in_parquet(tmp_path):
    kind = pa.int8()
    for _ in range(300):
        kind = pa.struct([("a", kind)])
    pq.write_table(pa.table({"x": pa.nulls(1, kind)}), tmp_path / "a.parquet", store_schema=False)
    with pytest.raises(DiagnosticsError, match=r"cannot be read as parquet \(.*too deeply nested"):
        read_parquet(tmp_path / "a.parquet")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(DiagnosticsError, match=r"\(it is not a regular file\)"):
        read_parquet(tmp_path / "a.parquet")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(
        DiagnosticsError, match=r"model\.safetensors cannot be trusted: it is not a regular file\)"
    ):
        check_weights(tmp_path)


def safetensors(tmp_path, header, *, length=None, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )
    return tmp_path


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, length, reason",
    [
        ({"a": WHOLE}, 2**60, r"it names a header of 1152921504606846976 bytes in a file of \d+"),
        (
            {"a": WHOLE | {"data_offsets": [0, 80]}},
            None,
            r"the tensor 'a' lies at 0 to 80 of 8 bytes",
        ),
        (
            {"a": WHOLE | {"data_offsets": [8, 0]}},
            None,
            r"the tensor 'a' lies at 8 to 0 of 8 bytes",
        ),
        (
            {"a": WHOLE | {"shape": [2**40, 2**40]}},
            None,
            r"the tensor 'a' is of 1099511627776 x 1099511627776 numbers",
        ),
        (
            {"a": WHOLE | {"shape": [1] * 100}},
            None,
            r"the tensor 'a' has no shape of at most 8 dimensions",
        ),
        ({"a": 3}, None, r"'int' object is not subscriptable"),
        (b"[" * 5000, None, r"its brackets are nested more than 100 deep"),
        (b"[]", None, r"its header is no object of at most 1048576 tensors"),
        (b"\xff", None, r"'utf-8' codec can't decode"),
    ],
)
def test_safetensors_headers(tmp_path, header, length, reason):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^No model can be loaded from '.*' \(the header of model\.safetensors cannot be"
            rf" trusted: {reason}"
        ),
    ):
        check_weights(safetensors(tmp_path, header, length=length))
    check_weights(safetensors(tmp_path, {"a": WHOLE, "__metadata__": {"format": "pt"}}))


def gguf(tmp_path, *, fields=b"", tensors=b"", counts=(0, 0), magic=b"GGUF", version=3):
    (tmp_path / "m.gguf").write_bytes(
        magic + struct.pack("<IQQ", version, *counts) + fields + tensors
    )
    return tmp_path / "m.gguf"


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


TENSOR = text(b"w") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)


@pytest.mark.parametrize(
    "parts, reason",
    [
        ({"magic": b"GGML"}, r"it begins with b'GGML', version 3"),
        ({"counts": (2**60, 0)}, r"it names 1152921504606846976 tensors and 0 fields"),
        ({"counts": (0, 2**60)}, r"it names 0 tensors and 1152921504606846976 fields"),
        ({"counts": (0, 1)}, r"it ends at 24 bytes"),
        (
            {"counts": (0, 1), "fields": text(b"a") + struct.pack("<IIQ", 9, 8, 2**60)},
            r"it names 1152921504606846976 values of type 8",
        ),
        (
            {"counts": (0, 1), "fields": text(b"a") + struct.pack("<IIQ", 9, 0, 2**60)},
            r"it ends at \d+ bytes, 1152921504606846976 further ones",
        ),
        (
            {
                "counts": (0, 1),
                "fields": text(b"a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1),
            },
            r"it names 1 values of type 9",
        ),
        (
            {"counts": (0, 1), "fields": text(b"a") + struct.pack("<IQ", 8, 2**50)},
            r"it ends at \d+ bytes",
        ),
        (
            {"counts": (0, 1), "fields": text(b"a") + struct.pack("<I", 77)},
            r"it names 1 values of type 77",
        ),
        (
            {"counts": (1, 0), "tensors": text(b"w") + struct.pack("<I", 2**31)},
            r"the tensor 'w' has 2147483648 dimensions",
        ),
        (
            {
                "counts": (1, 0),
                "tensors": text(b"w") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
            },
            r"the tensor 'w' is of 1099511627776 x",
        ),
        (
            {"counts": (1, 0), "tensors": text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 2**40)},
            r"the tensor 'w' lies at 1099511627776 of \d+ bytes",
        ),
    ],
)
def test_gguf_headers(tmp_path, parts, reason):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^No model can be loaded from '.*m\.gguf' \(the header of m\.gguf cannot be trusted:"
            rf" {reason}"
        ),
    ):
        check_weights(gguf(tmp_path, **parts))
    fields = text(b"a") + struct.pack("<IIQ", 9, 8, 2) + text(b"x") + text(b"y")
    check_weights(gguf(tmp_path, counts=(1, 1), fields=fields, tensors=TENSOR))


def test_a_source_that_is_not_here_is_left_alone(tmp_path):
    check_weights("Qwen/Qwen3-1.7B")
    check_weights(tmp_path / "none.gguf")


CASES = int(os.environ.get("FUZZ_CASES", 0)) // 20 or 120


@pytest.mark.parametrize("kind", ["archives", "parquet", "weights", "json"])
def test_crafted_files_end_no_process_and_hold_none(tmp_path, kind):
    """In a process of its own with six gigabytes: neither a crash, nor a hang, nor any error but
    ours.
    """
    script = Path(__file__).parents[1] / "launched_bounds.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), kind, str(len(kind)), str(CASES)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        timeout=60 + CASES,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    read, refused = map(int, done.stdout.splitlines()[-1].split()[1::2])
    assert read + refused == CASES and read and refused
