"""Guarded files: what is no regular file of our own inside the directory is refused, and stays as
it is.
"""

import os
import socket
from pathlib import Path

import pytest

from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import (
    guard,
    hash_inside,
    inside,
    kind,
    read_inside,
    remove_folder,
    remove_inside,
    sha256_file,
    walk,
    write_atomic,
)


def link(place, outside):
    place.symlink_to(outside / "victim")


def dangling(place, outside):
    place.symlink_to(outside / "nothing")


def pipe(place, outside):
    os.mkfifo(place)


def bound(place, outside):
    here = Path.cwd()
    os.chdir(place.parent)  # a socket's path has a hundred characters at most
    try:
        socket.socket(socket.AF_UNIX).bind(place.name)
    finally:
        os.chdir(here)


def folder(place, outside):
    place.mkdir()


ODD = pytest.mark.filterwarnings("ignore:unclosed.*socket:ResourceWarning")
KINDS = pytest.mark.parametrize(
    "make, name",
    [(link, "link"), (dangling, "link"), (pipe, "pipe"), (bound, "socket"), (folder, "folder")],
)


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/victim").write_bytes(b"precious")
    return tmp_path / "outside"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@ODD
@KINDS
def test_what_is_no_file_is_neither_read_nor_written_nor_removed(root, outside, make, name):
    make(root / "x.csv", outside)
    assert kind(root / "x.csv") == name
    for do in (
        lambda: read_inside(root, "x.csv"),
        lambda: hash_inside(root, "x.csv"),
        lambda: write_atomic(root / "x.csv", b"new"),
    ):
        with (
            guard(root),
            pytest.raises(
                DiagnosticsError,
                match=rf"x\.csv is a {name}, where this program keeps a file of its own: nothing was read "
                r"from it or written through it\. Remove it, or put a file in its place",
            ),
        ):
            do()
    assert not remove_inside(root, "x.csv") and kind(root / "x.csv") == name
    assert os.listdir(outside) == ["victim"] and (outside / "victim").read_bytes() == b"precious"


def test_a_folder_that_is_a_link_is_not_walked_through(root, outside):
    (root / "tables").symlink_to(outside)
    for do in (
        lambda: read_inside(root, "tables/victim"),
        lambda: write_atomic(root / "tables/victim", b"new"),
        lambda: write_atomic(root / "tables/more/a", b"x"),
        lambda: remove_inside(root, "tables/victim"),
    ):
        with (
            guard(root),
            pytest.raises(
                DiagnosticsError,
                match=r"tables is a link, where this program keeps a folder of its own",
            ),
        ):
            do()
    assert list(walk(root, "tables")) == [] and not remove_folder(root, "tables")
    assert os.listdir(outside) == ["victim"] and (outside / "victim").read_bytes() == b"precious"


def test_the_directory_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "there").symlink_to(root)
    with guard(tmp_path / "there"):
        write_atomic(tmp_path / "there/a/b", b"x")
    assert read_inside(tmp_path / "there", "a/b") == b"x" and (root / "a/b").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_a_name_stays_inside(root, name):
    with pytest.raises(DiagnosticsError, match="names no file inside the directory"):
        read_inside(root, name) if inside(name) else None


def test_a_link_of_the_user_s_own_is_followed_where_nothing_is_guarded(root, outside):
    (root / "tables").symlink_to(outside)
    write_atomic(root / "tables/page.html", b"x")
    assert (outside / "page.html").read_bytes() == b"x"


def test_a_hard_link_s_other_name_keeps_its_content(root, outside):
    os.link(outside / "victim", root / "a")
    with guard(root):
        write_atomic(root / "a", b"new")
    assert (outside / "victim").read_bytes() == b"precious" and (root / "a").read_bytes() == b"new"
    os.link(outside / "victim", root / "b")
    assert remove_inside(root, "b") and (outside / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_user_s_own_mode(root, umask, mode):
    before = os.umask(umask)
    try:
        write_atomic(root / "a/b", b"x")
    finally:
        os.umask(before)
    assert (root / "a/b").stat().st_mode & 0o777 == mode and (
        root / "a"
    ).stat().st_mode & 0o077 == 0o077 & ~umask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_user_s_file_is_not_removed(root):
    (root / "a").write_bytes(b"x")
    os.chown(root / "a", 12345, 12345)
    assert not remove_inside(root, "a") and (root / "a").read_bytes() == b"x"


def test_what_may_not_be_replaced_is_asked_by_name(root):
    def before(name):
        raise DiagnosticsError(f"not {name}")

    with guard(root, before), pytest.raises(DiagnosticsError, match="^not a/b$"):
        write_atomic(root / "a/b", b"x")
    assert os.listdir(root) == []
    with guard(root, before), guard(root):  # the inner one decides while it lasts
        write_atomic(root / "a/b", b"x")


def test_hashes_and_missing_files(root):
    (root / "a").write_bytes(b"x" * 100_000)
    assert hash_inside(root, "a") == sha256_file(root / "a")
    assert (
        hash_inside(root, "b") is None
        and hash_inside(root, "c/b") is None
        and kind(root / "b") is None
    )
    assert [
        files.TEMPORARY.fullmatch(name) is not None
        for name in (".0123456789abcdef.opd.tmp", ".notes.tmp", ".x.opd.tmp")
    ] == [True, False, False]
