"""The command `by-correctness`: what it writes, keeps, makes again, says and refuses."""

import json
import re

import numpy as np
import pandas as pd
import pytest

import diagnostics as dx
from diagnostics.core.manifest import read_manifest
from diagnostics.core.tables import write_parquet
from diagnostics.pipeline import ahead
from diagnostics.pipeline.cli import main
from diagnostics.pipeline.reproduce import Inputs, commands
from diagnostics.pipeline.stages import by_correctness
from diagnostics.report.page import page
from tests.effect_tables import made_interventions
from tests.factories import message
from tests.made_tokens import made_tokens

QUICK = ["--draws", "10", "--quiet"]


def judged(right: int, prompts: int, *, unknown: int = 0) -> pd.DataFrame:
    """One response per prompt, of which the first are right and the last are not judged."""
    tokens = made_tokens(prompts, 8, seed=1)
    place = tokens.context_id.str[1:].astype(int)
    correct = np.where(place < right, 1.0, 0.0)
    return tokens.assign(correct=np.where(place >= prompts - unknown, np.nan, correct))


def analyzed(tokens: pd.DataFrame, folder, *, compare: bool = True) -> list[str]:
    """A run of an imported table with the tables of all responses."""
    write_parquet(folder / "t.parquet", tokens)
    out = ["--output-dir", str(folder / "run")]
    tokens_flag = ["--tokens", str(folder / "t.parquet")]
    assert main(["analyze", *tokens_flag, "--k", "16", *QUICK, *out]) == 0
    if compare:
        few = ["--criteria", "teachability,random", "--budgets", "10%,100%"]
        assert main(["compare", *tokens_flag, *few, *QUICK, *out]) == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    tokens = judged(22, 46, unknown=2)
    out = analyzed(tokens, folder)
    assert main(["by-correctness", "--quiet", *out]) == 0
    return folder, tokens


def test_each_side_is_the_analysis_of_a_run_without_the_other(made, tmp_path):
    """To the last bit, draws and selections included."""
    folder, tokens = made
    alone = tokens[tokens.correct == 0].reset_index(drop=True)
    assert alone.prompt_id.nunique() == 22
    analyzed(alone, tmp_path)
    tables = {p.name: p for p in (tmp_path / "run/tables").glob("*.csv")}
    own = {p.name: p for p in (folder / "run/tables/wrong").glob("*.csv")}
    assert set(own) == set(tables) and {"selection_curves.csv", "strata.csv"} <= set(own)
    for name, path in own.items():
        mine, theirs = pd.read_csv(path), pd.read_csv(tables[name])
        if name == "verdicts.csv":
            assert mine.exploratory.all()
            mine, theirs = (one.drop(columns="sentence") for one in (mine, theirs))
        if name == "warnings.csv":
            mine, theirs = (one[one.code != "exploratory"] for one in (mine, theirs))
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True, obj=name)


def test_the_manifest_has_counts_hashes_and_settings(made):
    folder, tokens = made
    record = json.loads((folder / "run/manifest.json").read_text())["stages"]["by-correctness"]
    assert record["facts"]["not_judged"] == 2
    assert record["facts"]["right"]["prompts"] == 22 == record["facts"]["wrong"]["contexts"]
    assert record["facts"]["right"]["positions"] == int((tokens.correct == 1).sum())
    assert list(record["inputs"]) == ["tokens.parquet"]
    settings = record["settings"]
    assert settings["draws"] == 10 and ["budgets", [0.1, 1.0]] in settings["comparison"]
    sides = {name.split("/")[1] for name in record["files"]}
    assert sides == {"right", "wrong"}


@pytest.mark.slow
def test_a_second_call_keeps_it_and_a_damaged_table_is_made_again(made):
    folder, _ = made
    path = folder / "run/tables/right/strata.csv"
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    command = ["by-correctness", "--quiet", "--output-dir", str(folder / "run")]
    assert main(command) == 0 and path.stat().st_mtime_ns == stamp
    path.write_bytes(before[:-20])
    read = dx.read_run(folder / "run", responses="right")
    assert read.table("strata") is None and any("strata" in n for n in read.reading_notes)
    assert main(command) == 0 and path.read_bytes() == before


def test_a_run_is_read_by_side(made):
    folder, tokens = made
    run = dx.read_run(folder / "run")
    right = run.responses("right")
    assert right.table("correlations").positions.max() == (tokens.correct == 1).sum()
    assert (right.tokens.correct == 1).all()
    wrong = dx.read_run(folder / "run", responses="wrong")
    assert set(wrong.tokens.prompt_id) == {f"p{i}" for i in range(22, 44)}
    assert run.responses("all") is run and run.tables["correlations"].positions.max() > 150
    assert "Unknown responses 'rihgt'" in message(run.responses, "rihgt")


def test_the_page_shows_both_sides_with_their_sizes(made):
    folder, tokens = made
    shown = page(dx.read_run(folder / "run"), {}, {}, contexts=0)
    section = re.search(r'<section id="responses">.*?</section>', shown, re.S)[0]
    for side, value in (("right", 1), ("wrong", 0)):
        size = f"22 prompts, {int((tokens.correct == value).sum())} positions"
        assert f"{side.capitalize()} responses alone: {size}" in section
        for name in ("verdicts", "correlations", "selection_curves"):
            assert f'id="table-{side}-{name}"' in section
            assert f"tables/{side}/{name}.csv" in section
    assert "after a step on both" in section and "2 responses are not judged" in section
    claims = re.findall(r"<span>(C\d): ", section)
    assert {"C1", "C2", "C3", "C4"} == set(claims)


def test_it_is_repeated_after_the_tables_whose_settings_it_shares(made):
    folder, _ = made
    manifest = read_manifest(folder / "run/manifest.json")
    planned = list(commands(manifest, Inputs(folder / "run", [folder / "t.parquet"])))
    names = [command[0] for command in planned]
    assert names == ["analyze", "analyze", "compare", "by-correctness"]
    assert planned[-1] == ["by-correctness"]


@pytest.mark.parametrize("right, have", [(0, "0 prompts have"), (19, "19 prompts have")])
def test_a_side_with_few_prompts_is_not_judged_and_this_is_said(
    right, have, tmp_path, capsys, monkeypatch
):
    small = {"verdicts": pd.DataFrame({"claim": ["C1"], "verdict": ["supported"]})}
    monkeypatch.setitem(ahead.TABLES, "analyze", lambda task: dict(small))
    monkeypatch.setattr(by_correctness, "_tables", lambda run, side, settings: dict(small))
    out = analyzed(judged(right, right + 21), tmp_path, compare=False)
    capsys.readouterr()
    assert main(["by-correctness", "--quiet", *out]) == 0
    said = f"Not judged: {have} a right response, of at least 20."
    assert said in capsys.readouterr().out
    assert not (tmp_path / "run/tables/right").exists()
    assert (tmp_path / "run/tables/wrong/verdicts.csv").is_file()
    run = dx.read_run(tmp_path / "run")
    assert message(run.responses, "right") == said
    assert run.responses("wrong").table("verdicts") is not None
    assert said in page(run, {}, {}, contexts=0)


def test_a_run_that_nobody_judged_is_refused(tmp_path, capsys):
    write_parquet(tmp_path / "t.parquet", made_tokens(8, 6))
    out = ["--output-dir", str(tmp_path / "run")]
    few = ["--criteria", "divergence", "--budgets", "10%"]
    assert main(["compare", "--tokens", str(tmp_path / "t.parquet"), *few, *QUICK, *out]) == 0
    assert main(["by-correctness", *out]) == 2
    assert "None of the 8 responses" in capsys.readouterr().err


def test_all_responses_come_first(tmp_path, capsys):
    write_parquet(tmp_path / "t.parquet", judged(3, 6))
    out = ["--output-dir", str(tmp_path / "run")]
    few = ["--criteria", "divergence", "--budgets", "10%"]
    assert main(["compare", "--tokens", str(tmp_path / "t.parquet"), *few, *QUICK, *out]) == 0
    assert main(["by-correctness", *out]) == 2
    assert "Run `analyze --output-dir" in capsys.readouterr().err


def test_a_decision_of_a_side_has_the_effects_of_its_rows_in_the_whole(tmp_path):
    from diagnostics.analysis.cell_effects import of_rollouts
    from diagnostics.analysis.decision import decide

    effects = made_interventions(prompts=45, horizons=(0, 20), correct=True)
    whole = decide(effects, draws=20)
    own = decide(of_rollouts(effects, "right").drop(columns="correct"), draws=20)
    rows = whole[whole.rollouts == "right"].reset_index(drop=True)
    named = ["criterion", "budget", "horizon", "measure", "effect", "over_random", "p_value"]
    pd.testing.assert_frame_equal(
        own[named].sort_values(named[:4], ignore_index=True),
        rows[named].sort_values(named[:4], ignore_index=True),
    )
