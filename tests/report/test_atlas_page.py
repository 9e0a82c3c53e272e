"""The atlas of several pairs: its page, its files and what it refuses."""

import functools
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.shown import by_uncertainty
from diagnostics.pipeline.cli import main
from diagnostics.report.atlas_page import atlas

REPORTS = Path(__file__).parents[2] / "reports"
PAIRS = [REPORTS / name for name in ("embedded-probe", "second-pair", "smollm2")]


@pytest.fixture(scope="module")
def found():
    return atlas(PAIRS)


def test_each_sentence_is_made_from_a_row(found):
    """A number of a sentence stands in the table that it is made from."""
    rows = found.pooled.set_index("conclusion")
    for text in [*found.sentences()["What does not hold"], *found.sentences()["What to do"]]:
        if not (named := re.match(r"(C\d), ", text)):
            continue
        row = rows.loc[[name for name in rows.index if name.startswith(named[1] + ":")]]
        halves = (row["high"] - row["low"]) / 2
        shown = map(functools.partial(by_uncertainty, sign=True), row["mean"], halves)
        numbers = {text.replace("-", "−") for text in shown}
        assert any(number in text for number in numbers), text


def test_no_rival_is_advised(found):
    for text in found.sentences()["What to do"]:
        assert not re.match(r"At \d+%, (random|position matched)", text), text


def test_advice_says_on_how_many_pairs_it_rests_and_what_turns(found):
    said = found.sentences()
    on_pairs = [text for text in said["What to do"] if " random positions on " in text]
    assert on_pairs and all(
        "on 2 of 3 pairs, the ones that have it, in the mean" in text
        or "on every pair, in the mean" in text
        for text in on_pairs
    )
    turning = found.pooled.query("kind == 'over_random' and conclusion == 'teachability'")
    turning = turning.query("budget == 0.1 and horizon == 20 and rollouts == 'all'").verdict
    assert turning.tolist() == ["turns with the pair"]
    named = "Teachability at 10% over random positions: turns with the pair (mean "
    assert sum(text.startswith(named) for text in said["What does not hold"]) == 1


def test_the_page_is_whole_and_offline(found):
    page = found.html
    for section in ("pairs", "figures", "method", "tables"):
        assert f'<section id="{section}">' in page
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", page).replace(
        "http://www.w3.org", ""
    )
    assert page.count("<figure ") == len(list(found.drawings()))


def test_the_command_writes_page_tables_figures_and_what_was_read(tmp_path, capsys):
    code = main(["atlas", *map(str, PAIRS), "--output-dir", str(tmp_path / "atlas")])
    assert code == 0
    assert "What does not hold" in capsys.readouterr().out
    written = json.loads((tmp_path / "atlas" / "pages.json").read_text())
    assert {"atlas.html", "atlas.json", "tables/atlas_pooled.csv"} <= set(written)
    table = pd.read_csv(tmp_path / "atlas" / "tables" / "atlas_pooled.csv")
    assert {"mean", "new_low", "verdict"} <= set(table)
    assert main(["atlas", *map(str, PAIRS), "--output-dir", str(tmp_path / "atlas")]) == 0


def test_a_pair_is_not_counted_twice():
    with pytest.raises(DiagnosticsError, match="same two models"):
        atlas([REPORTS / "embedded-probe", REPORTS / "which-criterion" / "adamw"])


def test_names_belong_to_the_directories():
    with pytest.raises(DiagnosticsError, match="a name of its own"):
        atlas(PAIRS, names=["one", "two"])


def test_open_marks_are_pairs_that_are_not_pooled(found):
    from diagnostics.report import figures

    effects = found.effects.copy()
    rows = (effects["kind"] == "claim") & (effects["pair"] == effects["pair"].iloc[0])
    effects.loc[rows, "judged"] = False
    figure = figures.atlas(effects, found.pooled, kind="claim")
    said = figure.get_supxlabel().replace("\n", " ")
    assert "intervals over prompts and step batches; those of a mean, pairs." in said
    marks = [c for c in figure.axes[0].containers if c.get_label() == "_open"]
    assert sum(len(mark.lines[0].get_xdata()) for mark in marks) == rows.sum()
