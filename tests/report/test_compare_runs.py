"""Runs side by side: joined, never pooled."""

import json
import re

import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import compare_runs
from tests import study_tables
from tests.report import made_tables


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one = study_tables.write_run(folder / "one", verdicts=study_tables.verdicts())
    two = study_tables.write_run(
        folder / "two",
        correlations=study_tables.correlations(seed=1),
        only_here=study_tables.lift(),
    )
    manifest = study_tables.manifest()
    manifest["stages"]["probe"]["settings"]["loss"] = "forward_kl"
    manifest["stages"]["rollout"]["facts"]["student"]["name"] = "tiny <b>"
    (two / "manifest.json").write_text(json.dumps(manifest))
    return one, two


@pytest.fixture(scope="module")
def comparison(directories):
    return compare_runs.compare_runs(directories)


def test_tables_are_joined_run_by_run(comparison):
    table = comparison.tables["correlations"]
    assert table.columns[0] == "run"
    for name, seed in (("one", 0), ("two", 1)):
        part = table[table.run == name].drop(columns="run").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, study_tables.correlations(seed=seed), check_dtype=False)
    assert "only_here" not in comparison.tables and "verdicts" not in comparison.tables


def test_settings_hold_what_differs(comparison):
    assert comparison.settings.to_dict("index") == {
        "probe: loss": {"one": "reverse_kl", "two": "forward_kl"},
        "model: student": {"one": "small", "two": "tiny <b>"},
    }


def test_verdicts_stand_by_run(comparison):
    assert comparison.verdicts.loc[("C1", "gain")].tolist() == ["not judged", "–"]
    assert comparison.verdicts.index.tolist() == [
        ("C1", "gain"),
        ("C1", "relative_gain"),
        ("C2", "gain"),
        ("C2", "relative_gain"),
    ]


def test_verdicts_of_both_kinds_and_decisions_stand_by_run(tmp_path):
    paths = [made_tables.write_run(tmp_path / name) for name in ("a", "b")]
    comparison = compare_runs.compare_runs(paths)
    assert (
        comparison.verdicts.loc[("C2", "controlled", "context_gain")].tolist()
        == ["not identified"] * 2
    )
    assert comparison.verdicts.loc[("C2", "paper", "gain")].tolist() == ["supported"] * 2
    text = comparison.html
    assert '<span class="verdict not-identified">not identified</span>' in text
    assert text.count("train with teachability at 5 %") == 2
    assert "decision" in comparison.tables


def test_what_differs_names_models_once_and_holds_no_null(tmp_path):
    paths = [study_tables.write_run(tmp_path / name) for name in ("a", "b")]
    for path, pair, rate in zip(paths, ("embedded", None), (None, 1e-4), strict=True):
        manifest = study_tables.manifest()
        for stage in ("rollout", "probe"):
            settings = manifest["stages"][stage]["settings"]
            settings |= {"pair": pair, "student": "s", "learning_rate": rate, "nothing": None}
        manifest["stages"]["rollout"]["settings"]["contexts"] = 4 if pair else 8
        manifest["stages"]["probe"]["settings"]["folds"] = 2
        (path / "manifest.json").write_text(json.dumps(manifest))
    manifest["stages"]["probe"]["settings"]["hash"] = "ab" * 32
    manifest["stages"]["compare"] = {"settings": {"only": 1}, "inputs": {}, "files": {}}
    (paths[1] / "manifest.json").write_text(json.dumps(manifest))
    comparison = compare_runs.compare_runs(paths)
    rows = comparison.settings.to_dict("index")
    assert rows["learning_rate"] == {"a": "–", "b": "0.0001"}
    assert rows["rollout: contexts"] == {"a": "4", "b": "8"}
    assert rows["probe: hash"] == {"a": "–", "b": "abababababab…"}
    assert rows["stages"]["b"].endswith("compare") and not rows["stages"]["a"].endswith("compare")
    assert not {"compare: only", "probe: folds", "rollout: student", "nothing"} & set(rows)
    assert "null" not in comparison.html.partition('id="settings"')[2].partition("</section>")[0]


def test_decisions_stand_side_by_side_with_their_signs(tmp_path):
    paths = [made_tables.write_run(tmp_path / name) for name in ("a", "b")]
    text = compare_runs.compare_runs(paths).html
    grid = text.partition('<section id="decision">')[2].partition("</section>")[0]
    table = made_tables.decision()
    judged = table[table.primary & ~table.criterion.isin(["random", "full", "placebo"])]
    assert grid.count('<th scope="row">') == len(judged)
    assert grid.count("◆") == 1 + 2 * int(judged.recommended.sum())
    assert "▲" in grid and 'class="verdict better"' in grid


def test_page_is_one_escaped_file(comparison, tmp_path):
    path = comparison.save(tmp_path / "compare.html")
    text = path.read_text(encoding="utf-8")
    assert text == comparison.html
    assert "tiny &lt;b&gt;" in text and "tiny <b>" not in text
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert text.count("<figure ") == 2
    assert "<b>one.</b> Not judged: 16 prompts a side, of at least 20." in text


def test_shows_itself_in_a_notebook(comparison):
    text = comparison._repr_html_()
    assert (
        text.startswith("<h4>What differs</h4>")
        and "<h4>Verdicts</h4>" in text
        and "tiny &lt;b&gt;" in text
    )


def test_names_tell_folders_apart(tmp_path):
    paths = [study_tables.write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert list(compare_runs.compare_runs(paths).runs) == ["a/run", "b/run"]
    assert list(compare_runs.compare_runs(paths, names=["x", "y"]).runs) == ["x", "y"]


def test_refusals(directories):
    with pytest.raises(DiagnosticsError) as error:
        compare_runs.compare_runs(directories[:1])
    assert (
        str(error.value)
        == "A comparison needs two or more runs, each with a name of its own; got 1 and the names"
        " one. Name more directories, or pass names=[…]."
    )
    with pytest.raises(DiagnosticsError) as error:
        compare_runs.compare_runs(directories, names=["x", "x"])
    assert "got 2 and the names x, x." in str(error.value)
