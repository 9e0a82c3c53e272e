"""A file of a run directory that was changed is refused by whoever opens it by its path."""

import json

import pandas as pd
import pytest

import diagnostics as dx
from diagnostics.core import manifest
from diagnostics.core.errors import DiagnosticsError
from tests import study_tables


@pytest.fixture
def run(tmp_path):
    return study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())


def change(path):
    frame = pd.read_parquet(path)
    number = (
        next(name for name in frame if frame[name].dtype.kind == "f")
        if path.stem == "tokens"
        else None
    )
    (frame.assign(**{number: frame[number] + 1.0}) if number else frame[:-1]).to_parquet(
        path, index=False
    )


@pytest.mark.parametrize(
    "reader, name", [("read_tokens", "tokens.parquet"), ("read_bank", "contexts.parquet")]
)
def test_a_changed_file_of_a_run_is_not_read(run, reader, name):
    read = getattr(dx, reader)
    assert len(read(run / name))
    change(run / name)
    with pytest.raises(DiagnosticsError, match=r"not as it was written.*move the file away"):
        read(run / name)
    (run / name).rename(run.parent / name)
    assert len(read(run.parent / name))


@pytest.mark.parametrize(
    "beside", ['{"stages": 5}', "{", '{"name": "a web page", "icons": []}', None]
)
def test_another_program_s_manifest_says_nothing_of_a_file(run, beside):
    change(run / "tokens.parquet")
    (run / "manifest.json").unlink()
    if beside is not None:
        (run / "manifest.json").write_text(beside)
    assert len(dx.read_tokens(run / "tokens.parquet"))


def test_a_file_without_a_record_is_read(run):
    dx.read_tokens(run / "tokens.parquet").to_parquet(run / "mine.parquet")
    assert len(dx.read_tokens(run / "mine.parquet"))


def test_a_file_that_a_stage_only_read_has_the_hash_that_it_read():
    stages = {"score": {"files": {"scores.parquet": "a"}, "inputs": {"contexts.parquet": "b"}}}
    record = {"stages": stages, "joined": {}}
    assert manifest.hashes_read(record, "contexts.parquet") == ["b"]
    assert manifest.hashes_read(record, "scores.parquet") == ["a"]
    assert manifest.hashes_of(record, "contexts.parquet") == []
    assert json.dumps(manifest.hashes_read(record, "none")) == "[]"


@pytest.mark.parametrize(
    "home, text, said",
    [
        ("/home/alice", "/home/alice", "~"),
        ("/home/alice/", "see /home/alice/x", "see ~/x"),
        ("/home/alice", "/home/alicea", "/home/alicea"),
        ("/", "", ""),
        ("/", "/etc", "/etc"),
    ],
)
def test_the_home_folder_is_written_as_a_tilde(monkeypatch, home, text, said):
    monkeypatch.setenv("HOME", home)
    assert manifest.without_home({"a": [text]}) == {"a": [said]}
