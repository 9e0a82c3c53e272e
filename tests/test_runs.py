import json
import os

import pandas as pd
import pytest

from diagnostics.runs import Run, open_run, sha256_file, versions, write_atomic, write_csv, write_parquet
from diagnostics.types import DiagnosticsError


def write(run, text):
    return lambda: write_atomic(run.path("a.txt"), text) and {"letters": len(text)}


def test_a_stage_is_done_once(tmp_path):
    with open_run(tmp_path) as run:
        assert run.stage("one", settings={"x": 1}, outputs=["a.txt"], work=write(run, b"hello"))
        assert not run.stage("one", settings={"x": 1}, outputs=["a.txt"], work=write(run, b"other"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stages"]["one"]["facts"] == {"letters": 5}
    assert manifest["stages"]["one"]["files"] == {"a.txt": sha256_file(tmp_path / "a.txt")}


def test_a_damaged_file_is_written_again(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
        (tmp_path / "a.txt").write_bytes(b"hellx")
        assert run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
    assert (tmp_path / "a.txt").read_bytes() == b"hello"


def test_other_settings_are_refused_and_nothing_changes(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={"x": 1, "y": 2}, outputs=["a.txt"], work=write(run, b"hello"))
        with pytest.raises(DiagnosticsError, match=r"holds stage 'one' of another configuration \(setting x: was 1, now 3\)\. Nothing was overwritten"):
            run.stage("one", settings={"x": 3, "y": 2}, outputs=["a.txt"], work=write(run, b"other"))
    assert (tmp_path / "a.txt").read_bytes() == b"hello"


def test_a_derived_stage_follows_its_input(tmp_path):
    with open_run(tmp_path) as run:
        write_atomic(run.path("in.txt"), b"1")
        arguments = dict(settings={}, inputs=["in.txt"], outputs=lambda: ["a.txt"], derived=True)
        assert run.stage("one", work=write(run, b"first"), **arguments)
        write_atomic(run.path("in.txt"), b"2")
        assert run.stage("one", work=write(run, b"second"), **arguments)
    assert (tmp_path / "a.txt").read_bytes() == b"second"


def test_missing_input_names_the_remedy(tmp_path):
    with open_run(tmp_path) as run, pytest.raises(DiagnosticsError, match=r"Stage 'two' reads .*b\.txt, which is not there\. Run the stage"):
        run.stage("two", settings={}, inputs=["b.txt"], outputs=[], work=dict)


def test_one_process_at_a_time(tmp_path):
    with open_run(tmp_path), pytest.raises(DiagnosticsError, match="is in use by another process"):
        with open_run(tmp_path):
            raise AssertionError("the lock was given twice")


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DiagnosticsError, match=r"holds 'thesis\.tex' and no manifest\.json"):
        with open_run(tmp_path):
            raise AssertionError("opened")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticsError, match="cannot be used as output directory"):
        with open_run(tmp_path / "file"):
            raise AssertionError("opened")


def test_a_broken_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(DiagnosticsError, match="is not a manifest of this project"):
        Run(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_equal_tables_give_equal_bytes(tmp_path):
    frame = pd.DataFrame({"x": [0.1, 2.0], "name": ["a", "b"]})
    for write_table in (write_parquet, write_csv):
        first, second = write_table(tmp_path / "1", frame).read_bytes(), write_table(tmp_path / "2", frame.copy()).read_bytes()
        assert first == second


def test_versions_name_what_decides_numbers():
    assert {"python", "opd-diagnostics", "torch", "transformers", "pandas"} <= versions().keys()
