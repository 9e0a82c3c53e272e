"""The lock of a run directory, and which folders are refused before anything is written."""

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.run import open_run
from tests.factories import contents


def test_one_process_at_a_time(tmp_path):
    with (
        open_run(tmp_path),
        pytest.raises(DiagnosticsError, match="is in use by another process"),
        open_run(tmp_path),
    ):
        raise AssertionError("the lock was given twice")


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(DiagnosticsError, match=r"holds 'thesis\.tex' and no manifest\.json"),
        open_run(tmp_path),
    ):
        raise AssertionError("opened")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DiagnosticsError, match="cannot be used as output directory"),
        open_run(tmp_path / "file"),
    ):
        raise AssertionError("opened")


def test_a_foreign_folder_keeps_its_lock_and_gets_none(tmp_path, elsewhere):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/a.tex").write_bytes(b"x")
    for folder in (elsewhere, tmp_path / "theirs"):
        before = contents(folder)
        with (
            pytest.raises(
                DiagnosticsError, match=r"and no manifest\.json, so it is not a run of this project"
            ),
            open_run(folder),
        ):
            raise AssertionError("opened")
        assert contents(folder) == before
