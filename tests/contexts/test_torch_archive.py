import io
import os
import zipfile

import pytest

from diagnostics.contexts import torch_archive
from diagnostics.contexts.torch_archive import Opaque, read_archive
from diagnostics.core.errors import DiagnosticsError


def saved(tmp_path, value):
    import torch

    torch.save(value, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def zipped(tmp_path, program: bytes, name="archive/data.pkl"):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr(name, program)
    return tmp_path / "a.pt"


@pytest.mark.parametrize(
    "value",
    [
        {
            "a": [1, -2, 300, 70_000, 2**40, -(2**70)],
            "b": {"c": None, "d": (True, False, 1.5), "e": ("x",)},
            "": (),
        },
        [[], {}, "ü\n\u2028", "x" * 300, [[[0]]] * 3, (1, 2, 3, 4, 5), list(range(2000))],
        "text",
        7,
        None,
    ],
)
def test_plain_data_comes_back(tmp_path, value):
    assert read_archive(saved(tmp_path, value)) == value


def test_a_list_that_is_shared_stays_shared(tmp_path):
    inner = [1]
    found = read_archive(saved(tmp_path, [inner, inner]))
    assert found == [[1], [1]] and found[0] is found[1]


def test_what_needs_code_is_left_opaque(tmp_path):
    import torch

    found = read_archive(
        saved(
            tmp_path,
            {"before": 1, "t": torch.zeros(2), "after": [2, torch.float32, torch.Size([3])]},
        )
    )
    assert found["before"] == 1 and found["after"][0] == 2
    assert all(isinstance(value, Opaque) for value in (found["t"], *found["after"][1:]))


def test_nothing_is_called(tmp_path):
    """A program that would write a file when run by an unpickler."""
    target = tmp_path / "written"
    program = (
        b"\x80\x02cbuiltins\nopen\n"
        + b"X"
        + len(str(target)).to_bytes(4, "little")
        + str(target).encode()
        + b"X\x01\x00\x00\x00w\x86R."
    )
    assert isinstance(read_archive(zipped(tmp_path, program)), Opaque) and not target.exists()


@pytest.mark.parametrize(
    "program, reason",
    [
        (b"", "pickle exhausted before seeing STOP"),
        (b"\x80\x02.", "list index out of range"),
        (b"\x80\x02]", "pickle exhausted before seeing STOP"),
        (b"\x80\x02K\x01s.", "an instruction finds too few values"),
        (b"\x80\x02K\x01K\x02a.", "a value is added to something that is no list"),
        (b"\x80\x02K\x01(K\x02K\x03u.", "a key is set on something that is no dict"),
        (b"\x80\x02h\x05.", "5"),
        (b"\x80\x02u.", "pop from empty list"),
        (b"\x80\x02]]]s.", "a key is set on something that is no dict"),
        (b"\x80\x02}]K\x01s.", "a key is a list, and text and whole numbers are the only keys"),
        (b"\x80\x02U\x01a.", "instruction SHORT_BINSTRING is not one that plain data needs"),
    ],
)
def test_programs_that_are_no_plain_data(tmp_path, program, reason):
    with pytest.raises(DiagnosticsError) as error:
        read_archive(zipped(tmp_path, program))
    assert (
        str(error.value)
        == f"{tmp_path / 'a.pt'} cannot be read as a torch archive ({reason}). Check the file, or"
        " write its rows as JSONL."
    )


def test_files_that_are_no_archive(tmp_path):
    (tmp_path / "text.pt").write_text("no zip")
    half = saved(tmp_path, {"a": list(range(500))}).read_bytes()
    (tmp_path / "half.pt").write_bytes(half[: len(half) // 2])
    for name, reason in (
        ("text.pt", "File is not a zip file"),
        ("half.pt", "File is not a zip file"),
        ("none.pt", "No such file or directory"),
    ):
        with pytest.raises(
            DiagnosticsError, match=rf"{name} cannot be read as a torch archive \({reason}\)\."
        ):
            read_archive(tmp_path / name)
    with pytest.raises(DiagnosticsError, match=r"\(0 data\.pkl of at most 536870912 bytes in it\)"):
        read_archive(zipped(tmp_path, b"", name="other"))


def test_a_flipped_bit_is_an_error_or_a_value(tmp_path):
    """Any single wrong byte ends in a DiagnosticsError or in data; zip's checksum finds most of
    them.
    """
    whole = saved(tmp_path, {"samples": [{"tokens": [1, 2, 3], "prompt": "a"}]}).read_bytes()
    refused = 0
    for at in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[at] ^= 0x55
        (tmp_path / "b.pt").write_bytes(broken)
        try:
            read_archive(tmp_path / "b.pt")
        except DiagnosticsError:
            refused += 1
    assert refused > 10


def test_a_program_with_any_byte_wrong_never_escapes(tmp_path):
    """Without a checksum in the way: the machine itself meets every wrong byte."""
    import torch

    buffer = io.BytesIO()
    torch.save(
        {"samples": [{"tokens": [1, 2, 3], "prompt": "a", "x": (1, 2.5, None, True)}]}, buffer
    )
    with zipfile.ZipFile(buffer) as archive:
        program = archive.read(
            next(name for name in archive.namelist() if name.endswith("data.pkl"))
        )
    for at in range(len(program)):
        for flip in (0x01, 0x55, 0xFF):
            broken = bytearray(program)
            broken[at] ^= flip
            try:
                read_archive(zipped(tmp_path, bytes(broken)))
            except DiagnosticsError as error:
                assert "cannot be read as a torch archive" in str(error)


DOUBLED = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))


@pytest.mark.parametrize(
    "program, reason",
    [
        (
            b"\x80\x02}" + b")" + b"\x85" * 3_000_000 + b"Ns.",
            r"a key is a tuple, and text and whole numbers are the only keys",
        ),
        (
            b"\x80\x02})q\x00" + DOUBLED + b"Ns.",
            r"a key is a tuple, and text and whole numbers are the only keys",
        ),
        (
            b"\x80\x02)q\x00" + DOUBLED + b".",
            r"written out, its value holds more than 134217728 parts",
        ),
        (
            b"\x80\x02"
            + b"]q\x00"
            + b"".join(b"]q" + bytes([i + 1]) + 2 * (b"h" + bytes([i]) + b"a") for i in range(60))
            + b".",
            r"written out, its value holds more",
        ),
        (
            b"\x80\x02X"
            + (2**20).to_bytes(4, "little")
            + b"x" * 2**20
            + b"q\x00]("
            + b"h\x00" * 10_000
            + b"e.",
            r"written out, its value holds more",
        ),
        (b"\x80\x02" + b"]" * 101 + b"a" * 100 + b".", r"its values are nested more than 100 deep"),
        (b"\x80\x02)" + b"\x85" * 1_000_000 + b".", r"its values are nested more than 100 deep"),
        (b"\x80\x02]q\x00h\x00a.", r"a value in it holds itself"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", r"a value in it holds itself"),
        (
            b"\x80\x02}(" + b"\x8a\x0a" + (9 * (2**61 - 1)).to_bytes(10, "little") + b"Nu.",
            r"a key is a whole number of 65 bits, and 60 are the most",
        ),
        (b"\x80\x02}G" + bytes(8) + b"Ns.", r"a key is a float"),
        (b"\x80\x02}cos\nsystem\nNs.", r"a key is a Opaque"),
    ],
)
def test_programs_that_would_never_end(tmp_path, program, reason):
    with pytest.raises(DiagnosticsError, match=rf"cannot be read as a torch archive \({reason}"):
        read_archive(zipped(tmp_path, program))


def test_bounds_of_a_zip(tmp_path, monkeypatch):
    def packed(program, how=zipfile.ZIP_DEFLATED, more=0):
        with zipfile.ZipFile(tmp_path / "a.pt", "w", how) as archive:
            archive.writestr("a/data.pkl", program)
            for i in range(more):
                archive.writestr(f"a/{i}", b"")
        return tmp_path / "a.pt"

    with pytest.raises(
        DiagnosticsError, match=r"\(\d+ bytes that unpack to 100000003, and 100 times is the most\)"
    ):
        read_archive(packed(b"\x80\x02" + b"N" * 100_000_000 + b"."))
    with pytest.raises(
        DiagnosticsError, match=r"\(data\.pkl is packed in a way that torch does not write\)"
    ):
        read_archive(packed(b"\x80\x02N.", zipfile.ZIP_LZMA))
    assert read_archive(packed(b"\x80\x02](" + b"N" * 10_000 + b"e.")) == [None] * 10_000
    monkeypatch.setattr(torch_archive, "ENTRIES", 50)
    with pytest.raises(DiagnosticsError, match=r"\(61 entries, and 50 are the most\)"):
        read_archive(packed(b"\x80\x02N.", more=60))
    monkeypatch.setattr(torch_archive, "DIRECTORY", 1000)
    with pytest.raises(
        DiagnosticsError, match=r"\(it names a part of \d+ bytes, and 1000 are the most\)"
    ):
        read_archive(packed(b"\x80\x02N.", more=60))


def test_bounds_of_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_archive, "INSTRUCTIONS", 1000)
    with pytest.raises(DiagnosticsError, match=r"\(more than 1000 instructions\)"):
        read_archive(zipped(tmp_path, b"\x80\x02" + b"N" * 1000 + b"."))
    monkeypatch.setattr(torch_archive, "TEXT", 5)
    with pytest.raises(DiagnosticsError, match=r"\(a text of 6 characters, and 5 are the most\)"):
        read_archive(saved(tmp_path, "abcdef"))


@pytest.mark.parametrize("declared", [5, 2**28])
def test_a_size_that_is_not_the_entrys(tmp_path, declared):
    """The size in the zip's list is what is allowed, not what is believed."""
    path = zipped(tmp_path, b"\x80\x02](" + b"N" * 500 + b"e.")
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\x03\x04") + 22, content.index(b"PK\x01\x02") + 24):
        content[at : at + 4] = declared.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DiagnosticsError, match=r"cannot be read as a torch archive"):
        read_archive(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(DiagnosticsError, match=r"\(it is not a regular file\)"):
        read_archive(tmp_path / "a.pt")
