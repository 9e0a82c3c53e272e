"""Rows of files from elsewhere: what is no file of bytes is refused, and not waited for."""

import os
import socket

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import read_rows


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def bound(path):
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have a hundred characters
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(before)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("make", [pipe, folder, bound])
@pytest.mark.parametrize("text", [True, False])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, ending, make, text):
    if (make, ending) == (folder, ".parquet"):
        pytest.skip("a folder of parquet files is a table")
    make(tmp_path / f"rows{ending}")
    with pytest.raises(DiagnosticsError, match="cannot be read"):
        read_rows(tmp_path / f"rows{ending}", text=text)


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "link.jsonl")["prompt"].tolist() == ["a"]
