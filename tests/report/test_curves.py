"""Curves of a grid's trainings in the page: only those that their record and the manifest know."""

import json
from hashlib import sha256

import pandas as pd
import pytest

from diagnostics.pipeline.run import open_run
from diagnostics.report import run_results
from tests import study_tables

NAME = "cells/full-1-seed0"


@pytest.fixture
def run(tmp_path):
    """A run with one cell, as `validate` leaves it."""
    directory = study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())
    (directory / "cells").mkdir()
    curve = directory / f"{NAME}.curve.parquet"
    pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}).to_parquet(curve, index=False)
    record = {
        "cell": {"criterion": "full", "budget": 1.0, "seed": 0},
        "files": {curve.name: sha256(curve.read_bytes()).hexdigest()},
    }
    (directory / f"{NAME}.json").write_text(json.dumps(record))
    with open_run(directory) as run:
        names = [f"{NAME}.curve.parquet", f"{NAME}.json"]
        run.stage("validate", settings={}, inputs=names, outputs=[], work=lambda: None)
    return directory


def read(directory):
    """The curves that the page has, and what it says."""
    results = run_results.read_run(directory)
    return results.table("training_metrics"), " ".join(results.reading_notes)


def change_curve(run):
    path = run / f"{NAME}.curve.parquet"
    pd.DataFrame({"step": [1, 2], "loss": [2.0, 0.0]}).to_parquet(path, index=False)


def change_curve_and_record(run):
    change_curve(run)
    record = json.loads((run / f"{NAME}.json").read_text())
    digest = sha256((run / f"{NAME}.curve.parquet").read_bytes()).hexdigest()
    record["files"] = dict.fromkeys(record["files"], digest)
    (run / f"{NAME}.json").write_text(json.dumps(record))


def change_name(run):
    path = run / f"{NAME}.json"
    path.write_text(path.read_text().replace('"full"', '"FORGED"'))


def forget_the_stage(run):
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["validate"]
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_curve_as_it_was_written_is_shown(run):
    table, said = read(run)
    assert table["loss"].tolist() == [2.0, 1.0] and set(table["criterion"]) == {"full"}
    assert "cells" not in said


@pytest.mark.parametrize("change", [change_curve, change_curve_and_record, change_name])
def test_a_changed_curve_or_record_is_left_out_and_said(run, change):
    change(run)
    table, said = read(run)
    assert table is None and "cells/full-1-seed0" in said and "left out" in said


def test_without_the_manifest_the_record_alone_vouches_for_its_curve(run):
    forget_the_stage(run)
    assert read(run)[0]["loss"].tolist() == [2.0, 1.0]
    change_curve(run)
    table, said = read(run)
    assert table is None and "not as its record has it" in said


@pytest.mark.parametrize(
    "record", ["{", "[]", "{}", '{"cell": 5}', '{"cell": {"a": [1]}}', "[" * 9999]
)
def test_what_is_no_record_vouches_for_nothing(run, record):
    forget_the_stage(run)
    (run / f"{NAME}.json").write_text(record)
    table, said = read(run)
    assert table is None and "no record of its training" in said


def test_without_the_manifest_a_record_is_of_the_training_that_its_file_names(run):
    forget_the_stage(run)
    change_name(run)
    table, said = read(run)
    assert table is None and "record of another training" in said
