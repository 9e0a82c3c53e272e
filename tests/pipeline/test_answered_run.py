"""`run` to its end: the decision as text and data, what is kept, what is added, what is refused."""

import contextlib
import io
import json
import shutil

import pandas as pd
import pytest

from diagnostics.core.files import sha256_file
from diagnostics.pipeline import ahead
from diagnostics.pipeline.cli import main
from diagnostics.probing import step
from tests import outlines

GRID = ["--criteria", "teachability", "--budgets", "30%", "--random-draws", "2", "--horizon", "2"]
SIZE = "--contexts 20 --max-new-tokens 6 --draws 20 --sweep 8 --folds 2".split()
MADE = ("interventions.parquet", "tables/decision.csv", "tables/verdicts.csv")


def told(*command):
    """Exit code and standard output of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*command, "--quiet"])
    return code, out.getvalue()


@pytest.fixture(scope="module")
def small(folders):
    """The tiny pair's flags with a small grid."""
    return [*folders[:6], "--device", "cpu", *SIZE, *GRID]


@pytest.fixture(scope="module")
def answered(small, tmp_path_factory):
    """A run, and what it printed as JSON; its interventions with two processes."""
    directory = tmp_path_factory.mktemp("answered") / "out"
    with outlines.instead({(ahead, "cores"): lambda: 2}):
        code, said = told("run", *small, "--json", "--output-dir", str(directory))
    assert code == 0
    return directory, json.loads(said)


def hashes(directory):
    return {
        str(path.relative_to(directory)): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_ends_with_the_decision(answered):
    directory, said = answered
    stages = json.loads((directory / "manifest.json").read_text())["stages"]
    assert list(stages) == ["rollout", "score", "probe", "intervene", "analyze", "compare"]
    assert {row["criterion"] for row in said["ranking"]} == {
        "teachability",
        "random_divergent",
        "position_matched",
    }
    assert said["strength"]["prompts"] == 20 and said["strength"]["folds"] == 2
    assert said["report"] == str(directory / "report.html") and said["decision"] and said["next"]


@pytest.mark.slow
def test_one_process_makes_the_same_bytes_as_two(answered, small, tmp_path):
    assert ahead.cores() == 1
    assert told("run", *small, "--output-dir", str(tmp_path / "alone"))[0] == 0
    for name in MADE:
        assert sha256_file(tmp_path / "alone" / name) == sha256_file(answered[0] / name), name


def test_the_run_goes_on_from_its_manifest_and_changes_nothing(answered):
    directory, said = answered
    before = hashes(directory)
    code, text = told("run", "--output-dir", str(directory))
    assert code == 0 and hashes(directory) == before
    lines = text.splitlines()
    assert len(lines) <= 10 and lines[0] == said["decision"]
    assert lines[-1] == f"report: {directory / 'report.html'}"


def test_a_report_is_drawn_again_where_a_table_or_a_page_has_changed(answered, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(answered[0], directory)
    page = sha256_file(directory / "report.html")
    (directory / "report.html").unlink()
    assert told("report", str(directory))[0] == 0
    assert sha256_file(directory / "report.html") == page
    assert told("report", str(directory), "--contexts", "1")[0] == 0
    assert sha256_file(directory / "report.html") != page


def test_a_budget_is_added_to_the_grid_and_nothing_is_lost(answered, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(answered[0], directory)
    code, _ = told("intervene", "--budgets", "0.5", "--output-dir", str(directory))
    assert code == 0
    table = pd.read_csv(directory / "tables/intervention.csv")
    assert set(table.budget) == {0.3, 0.5, 1.0} and "teachability" in set(table.criterion)
    settings = json.loads((directory / "manifest.json").read_text())["stages"]["intervene"][
        "settings"
    ]
    assert settings["budgets"] == [0.3, 0.5] and settings["horizon"] == [2]


def test_interventions_take_the_size_of_the_probes_steps(answered, small, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(answered[0], directory)
    shutil.rmtree(directory / "cells")
    stages = json.loads((directory / "manifest.json").read_text())["stages"]
    sizes = {stages[name]["facts"]["step_size"] for name in ("probe", "intervene")}
    assert len(sizes) == 1
    calibrations = []

    def calibrated(*given, **named):
        calibrations.append(given)
        raise AssertionError

    with outlines.instead({(step.FoldSteps, "_calibrated"): calibrated}):
        code, _ = told("intervene", *GRID[:-1], "1", "--output-dir", str(directory))
    assert code == 0 and not calibrations


def test_a_narrower_comparison_keeps_the_tables(answered):
    directory, _ = answered
    before = hashes(directory)
    assert told("compare", "--criteria", "teachability", "--output-dir", str(directory))[0] == 0
    assert hashes(directory) == before


def test_other_draws_replace_tables_with_a_warning(answered, tmp_path, capsys):
    directory = tmp_path / "copy"
    shutil.copytree(answered[0], directory)
    assert told("analyze", "--draws", "10", "--output-dir", str(directory))[0] == 0
    assert (
        "analyze: its tables are made again with other settings (setting draws: was 20, now 10)"
        in capsys.readouterr().err
    )


def test_a_flag_that_contradicts_the_probe_is_refused(answered, capsys):
    directory, _ = answered
    before = hashes(directory)
    assert main(["intervene", "--loss", "forward_kl", "--output-dir", str(directory)]) == 2
    assert "loss: 'reverse_kl' there, 'forward_kl' now" in capsys.readouterr().err
    assert hashes(directory) == before


def test_models_that_nobody_knows_the_place_of_are_asked_for(
    answered, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert main(["intervene", "--output-dir", str(answered[0])]) == 2
    assert "Name it: --student PATH/TO/student." in capsys.readouterr().err


@pytest.mark.slow
def test_quick_leaves_the_interventions_out_and_says_so(finished, folders, capsys):
    assert main(["run", *folders, "--json", "--output-dir", str(finished)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["decision"].startswith("Not answered: the interventions were left out")
    assert said["next"].endswith(f" run --output-dir {finished}") and said["ranking"] == []
    assert "intervene" not in json.loads((finished / "manifest.json").read_text())["stages"]
    assert "Not answered: " in (finished / "report.html").read_text(encoding="utf-8")


def test_few_prompts_are_said_before_a_model_is_loaded(folders, tmp_path, monkeypatch, capsys):
    from diagnostics.models import identity

    def loaded(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(identity.Models, "pair", property(loaded))
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1"}\n' * 12)
    command = ["run", *folders[:4], "--prompts", str(tmp_path / "p.jsonl"), "--quiet"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().err
    assert "12 prompts: below 20 on a side nothing is judged" in said
    assert "8 prompts more would allow one" in said
