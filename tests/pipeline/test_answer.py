"""What the terminal says of a decision: ten lines, how sure, and the command that comes next."""

import json

import pytest

from diagnostics.analysis.decision import decide, decision_sentence
from diagnostics.core.tables import write_csv
from diagnostics.pipeline.answer import answer, text
from diagnostics.report.lead import taken_at
from diagnostics.report.run_tables import RunTables
from tests.effect_tables import made_interventions

PAIR = "--pair embedded"
CLEAR = dict(prompts=128, folds=8, horizons=(20,), prompt=0.01, batch=0.001, both=0.001)


def said(folder, **made):
    table = decide(made_interventions(**made), draws=50)
    return answer(folder, "opd", pair=PAIR, table=table, page="r.html"), table


def test_a_decision_is_ten_lines_or_fewer(tmp_path):
    found, table = said(tmp_path, **CLEAR)
    lines = text(found).split("\n")
    assert len(lines) <= 10 and lines[0] == decision_sentence(table)
    assert "train with teachability at 5 %" in lines[0]
    assert lines[1] == (
        "over random, nats per position of reverse KL; verdicts after Holm over 12 looks; 8 more in"
        f" {tmp_path}/tables/decision.csv:"
    )
    assert lines[2].split()[:3] == ["teachability", "at", "5"] and lines[2].endswith(" better")
    assert len(lines) == 9 and len(found["ranking"]) == 12
    assert lines[-3].startswith("strength: 8 folds, 128 prompts a side: ")
    assert lines[-2] == (
        f"next: opd validate --against {tmp_path} --criteria teachability,random,full"
        f" --budgets 0.05 --output-dir {tmp_path}-training"
    )
    assert lines[-1] == "report: r.html"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "pair, asked, chosen, ends",
    [
        ("custom", None, "the default", "set yours: --learning-rate)"),
        ("custom", 1e-4, "asked for", "at rate 1e-06"),
        ("embedded", None, "the pair’s", "at rate 1e-06"),
    ],
)
def test_the_learning_rate_is_said_and_the_default_names_its_flag(
    tmp_path, pair, asked, chosen, ends
):
    stage = {"inputs": {}, "files": {}}
    stages = {
        "rollout": stage | {"settings": {}, "facts": {"pair": pair}},
        "intervene": stage
        | {"settings": {"learning_rate": asked}, "facts": {"horizon_rate": 1e-6}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "stages": stages}))
    found, _ = said(tmp_path, **CLEAR)
    assert found["learning_rate"] == {"value": 1e-6, "chosen_by": chosen}
    lines = text(found).split("\n")
    (line,) = [line for line in lines if line.startswith("steps: the decision rests on 20 of Ad")]
    assert line.endswith(ends) and len(lines) <= 10
    assert found["steps"]["taken"][0]["learning_rate"] == 1e-6
    json.dumps(found, allow_nan=False)
    page = taken_at(RunTables({"stages": stages}))
    assert page.startswith("Learning rate 1e-06")
    assert "probe's" not in page  # none is recorded
    assert ("`--learning-rate`" in page) == (chosen == "the default")


def test_the_registered_cell_is_among_those_shown(tmp_path):
    choices = {"criterion": "entropy", "budget": 0.3}
    manifest = {"format": 1, "stages": {}, "primary": {"choices": choices}}
    plain, _ = said(tmp_path, **CLEAR)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found, _ = said(tmp_path, **CLEAR)
    marked = [row for row in found["ranking"] if row["registered"]]
    (row,) = marked or [None]
    assert not any(row["registered"] for row in plain["ranking"])
    place = found["ranking"].index(row)
    lines = text(found).split("\n")
    shown = [line for line in lines if line.startswith("  entropy at 30 %")]
    assert len(shown) == 1 and shown[0].endswith(f"{row['verdict']}, registered")
    assert len(lines) <= 10 and 0 <= place < len(found["ranking"])


def test_a_short_file_of_prompts_is_divided_for_the_check_by_training(tmp_path):
    table = decide(made_interventions(**(CLEAR | {"prompts": 32})), draws=50)
    files = "--student S --teacher T --prompts MORE.jsonl"
    assert " --eval-contexts 8 " in answer(tmp_path, "opd", pair=files, table=table)["next"]
    assert "--eval-contexts" not in answer(tmp_path, "opd", pair=PAIR, table=table)["next"]


def test_the_strength_is_that_of_the_recommended_cell(tmp_path):
    found, table = said(tmp_path, **CLEAR)
    row = table[table["recommended"]].iloc[0]
    assert f"{row['smallest_detectable']:.2g} nats on" in found["strength"]["sentence"]
    assert f"effect is {row['margin']:.2g}" in found["strength"]["sentence"]


def test_the_ranking_is_by_the_lower_bound_and_ends_with_the_worst(tmp_path):
    found, _ = said(tmp_path, **CLEAR)
    lows = [row["over_random_low"] for row in found["ranking"]]
    assert lows == sorted(lows, reverse=True)
    assert found["ranking"][0]["recommended"] and not found["ranking"][-1]["recommended"]
    assert all(row["criterion"] not in ("random", "full") for row in found["ranking"])


def test_twelve_prompts_are_not_judged_and_more_are_asked_for(tmp_path):
    found, _ = said(tmp_path, prompts=12, horizons=(20,))
    assert found["strength"]["sentence"] == (
        "4 folds, 12 prompts a side (20 are needed): not judged"
    )
    assert found["decision"].startswith("No decision: 12 held-out prompts of at least 20")
    assert found["next"].startswith("opd run --pair embedded --contexts ")
    assert int(found["next"].split("--contexts ")[1].split()[0]) >= 40


def test_a_design_is_weak_where_it_would_miss_a_quarter_of_what_random_does(tmp_path):
    clear, _ = said(tmp_path, **CLEAR, selection=0.001)
    noisy, _ = said(tmp_path, prompt=0.3, batch=0.1, horizons=(20,))
    assert clear["strength"]["word"] == "sufficient" and noisy["strength"]["word"] == "weak"


def test_without_interventions_it_says_so_and_what_to_run(tmp_path):
    found = answer(tmp_path / "a b", "opd")
    assert found["ranking"] == [] and found["decision"].startswith("Not answered: ")
    assert text(found).split("\n")[1] == f"next: opd run --output-dir '{tmp_path}/a b'"


def test_the_table_of_the_run_is_read_where_none_is_given(tmp_path):
    found, table = said(tmp_path, **CLEAR)
    write_csv(tmp_path / "tables/decision.csv", table)
    read = answer(tmp_path, "opd", pair=PAIR, page="r.html")
    assert text(read) == text(found)


@pytest.mark.parametrize("level, word", [(0.1, "Train with"), (0.0, "No criterion is above")])
def test_every_outcome_fits_on_a_terminal(tmp_path, level, word):
    truths = {("full", 1.0): 0.2, ("random", 0.1): 0.1, ("entropy", 0.1): 0.02 + 2 * level}
    found, _ = said(tmp_path, truths=truths, **CLEAR)
    assert found["decision"].startswith(word) and text(found).count("\n") < 10
