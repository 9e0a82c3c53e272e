"""The command `paper`: what it asks for, what it keeps, and that it can be repeated."""

import json
import shutil

import pandas as pd
import pytest

from diagnostics.analysis.paper.cells import read_cells
from diagnostics.core.files import sha256_file
from diagnostics.pipeline.cli import main
from diagnostics.pipeline.registry import BY_NAME
from diagnostics.training import selectors

TRAININGS = (
    "--train --masks teachability,q3,divergence --budgets 0.9 --curve 0.05 --steps 3 --batch 4"
    " --learning-rate 0.001 --workers 1 --draws 20 --seed 1"
).split()


def pair_of(folders):
    return [*folders[:4], "--device", "cpu"]


@pytest.fixture(scope="module")
def laid_out(finished, folders, tmp_path_factory):
    """A run with a probe and trainings, and what the command printed."""
    directory = tmp_path_factory.mktemp("paper") / "out"
    shutil.copytree(finished, directory)
    assert main(["paper", *pair_of(folders), *TRAININGS, "--output-dir", str(directory)]) == 0
    return directory


def stage_of(directory):
    return json.loads((directory / "manifest.json").read_text())["stages"]["paper"]


@pytest.mark.slow
def test_without_a_trained_student_the_command_says_what_to_type(finished, tmp_path, capsys):
    directory = tmp_path / "out"
    shutil.copytree(finished, directory)
    before = (directory / "manifest.json").read_bytes()
    assert main(["paper", "--output-dir", str(directory)]) == 2
    said = capsys.readouterr().err
    assert (
        f"error: {directory} has no trained student: tokens.parquet has no student_entropy_after."
        " Train some here with `python -m diagnostics paper --student student --teacher teacher"
        f" --train --output-dir {directory}`, or measure one that you have with `python -m"
        " diagnostics score --student student --teacher teacher --after STUDENT --output-dir"
        f" {directory}`.\n"
    ) in said
    assert "Traceback" not in said and not (directory / "paper").exists()
    assert (
        json.loads(before)["stages"].keys()
        == json.loads((directory / "manifest.json").read_text())["stages"].keys()
    )


@pytest.mark.slow
def test_the_tables_the_page_and_the_record_are_there(laid_out):
    record = stage_of(laid_out)
    assert record["facts"]["checkpoint"] == {"criterion": "teachability", "budget": 0.05, "seed": 0}
    assert record["facts"]["trainings"] == 8
    tables = {path.name for path in (laid_out / "tables").glob("paper_*.csv")}
    assert {"paper_table_1.csv", "paper_table_2.csv", "paper_differences.csv"} <= tables
    assert {f"tables/{name}" for name in tables} == set(record["files"])
    for file, digest in {**record["files"], **record["inputs"]}.items():
        assert sha256_file(laid_out / file) == digest
    assert "paper/cells/q3-0.9-seed1.json" in record["inputs"]
    assert "<html" in (laid_out / "paper.html").read_text(encoding="utf-8")
    assert "seen" not in pd.read_parquet(laid_out / "tokens.parquet")


@pytest.mark.slow
def test_a_mask_that_kept_less_than_its_budget_is_named(laid_out, folders, capsys, tmp_path):
    _, kept = read_cells(laid_out / "paper/cells")
    short = kept[(kept["criterion"] == "q3") & (kept["budget"] == 0.9)]
    assert (short["kept_share"] < 0.5).all() and (short["q3_share"] == 1).all()
    directory = tmp_path / "out"
    shutil.copytree(laid_out, directory)
    # Another seed of the bootstrap makes the tables again, from the same trainings.
    again = ["paper", "--seed", "2", "--draws", "20", "--quiet", "--output-dir", str(directory)]
    assert main(again) == 0
    said = capsys.readouterr().err
    assert "q3 at a budget of 0.9 kept 0." in said and "divergence at" not in said


@pytest.mark.slow
def test_the_command_without_train_lays_out_what_was_trained(
    laid_out, folders, tmp_path, monkeypatch, capsys
):
    directory = tmp_path / "out"
    shutil.copytree(laid_out, directory)
    monkeypatch.setattr(selectors, "train_cell", lambda *_: pytest.fail("trained again"))
    arguments = ["paper", "--draws", "20", "--seed", "1", "--json", "--output-dir", str(directory)]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["paper"] == str(directory / "paper.html")
    assert stage_of(directory) == stage_of(laid_out)
    (directory / "tables" / "paper_table_2.csv").unlink()
    assert main([*arguments, "--no-train"]) == 0
    assert stage_of(directory)["files"] == stage_of(laid_out)["files"]


@pytest.mark.slow
def test_a_run_with_its_own_checkpoint_needs_no_training(finished, folders, tmp_path):
    directory = tmp_path / "out"
    shutil.copytree(finished, directory)
    pair, where = pair_of(folders), ["--output-dir", str(directory)]
    assert main(["score", *pair, "--after", folders[1], *where]) == 0
    assert main(["paper", "--draws", "20", *where]) == 0
    record = stage_of(directory)
    assert record["facts"] == {"checkpoint": "score --after", "trainings": 0}
    assert "paper_table_1.csv" in {path.name for path in (directory / "tables").iterdir()}
    assert record["settings"]["train"] is False and not (directory / "paper").exists()


@pytest.mark.slow
def test_trainings_of_a_command_that_did_not_end_are_left_out_and_counted(
    laid_out, folders, tmp_path, capsys
):
    directory = tmp_path / "out"
    shutil.copytree(laid_out, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["stages"]["paper"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    for path in (directory / "tables").glob("paper_*"):
        path.unlink()
    assert main(["paper", "--output-dir", str(directory)]) == 2
    said = capsys.readouterr().err
    assert "holds 8 finished trainings of a command that did not end" in said
    assert "has no trained student" in said


@pytest.mark.slow
def test_the_manifest_repeats_the_trainings(laid_out, folders, tmp_path):
    again = tmp_path / "again"
    inputs = [folders[1], folders[3], folders[5]]
    arguments = ["rerun", str(laid_out / "manifest.json"), "--output-dir", str(again)]
    assert main([*arguments, "--device", "cpu", "--inputs", *inputs]) == 0
    assert stage_of(again)["files"] == stage_of(laid_out)["files"]


@pytest.mark.slow
def test_the_stage_is_a_command_of_its_own_that_rerun_repeats():
    stage = BY_NAME["paper"]
    assert stage.command is None and stage.recorded and stage.run is not None
