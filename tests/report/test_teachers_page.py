"""The page of several teachers: its sentences by hand, its figures by their artists, its parts."""

import re

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import figures
from diagnostics.report.teachers_page import TeachersPage, gained, save_teachers, where, whose

MEASURES = ("compatible_divergence", "forward_kl", "teachability", "gain")
GROUPS = ("all", "domain code", "domain math", "first quarter")


def difference(one, other, value, verdict, *, group="all", measure="compatible_divergence"):
    """A row of `teachers_differences` whose interval reaches .1 to either side."""
    return {
        "teacher": one,
        "other": other,
        "measure": measure,
        "group": group,
        "difference": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "p_value": 0.01,
        "positions": 300,
        "prompts": 30,
        "exactness": "exact",
        "verdict": verdict,
    }


def means() -> pd.DataFrame:
    rows = [
        {
            "teacher": teacher,
            "measure": measure,
            "group": group,
            "mean": t + m / 10 + g / 100,
            "low": t + m / 10 + g / 100 - 0.05,
            "high": t + m / 10 + g / 100 + 0.02,
            "positions": 300,
            "prompts": 30,
        }
        for t, teacher in enumerate(("A", "B"))
        for m, measure in enumerate(MEASURES)
        for g, group in enumerate(GROUPS)
    ]
    return pd.DataFrame(rows)


def agreement() -> pd.DataFrame:
    rows = [
        ("rank correlation", "forward_kl", np.nan, 0.7, 0.0),
        ("rank correlation", "advantage", np.nan, 0.2, 0.0),
        ("overlap", "top tokens", 5.0, 0.4, np.nan),
        ("Jaccard", "teachability", 0.05, 0.3, 0.0256),
    ]
    names = ["what", "measure", "size", "value", "chance"]
    made = pd.DataFrame(rows, columns=names)
    return made.assign(teacher="A", other="B", positions=300, prompts=30)


def made(rows) -> TeachersPage:
    tables = {
        "teachers": means(),
        "teachers_differences": pd.DataFrame(rows),
        "teachers_best": pd.DataFrame(),
        "teachers_agreement": agreement(),
    }
    manifest = {"versions": {}, "stages": {"teachers": {"settings": {"level": 0.9, "seed": 7}}}}
    return TeachersPage(tables, manifest)


def test_a_teacher_that_leads_every_other_is_named_with_both_intervals():
    rows = [
        difference("A", "B", -0.5, "lower"),
        difference("A", "C", 0.2, "higher"),
        difference("B", "C", 0.7, "higher"),
    ]
    text = whose(pd.DataFrame(rows), ["A", "B", "C"])
    assert text.startswith("B offers the most that this student can follow over all positions")
    assert "D·C 0.50 nats per position more than A (0.40 to 0.60; 30 prompts)" in text
    assert "0.70 nats per position more than C (0.60 to 0.80; 30 prompts)" in text


@pytest.mark.parametrize("verdict", ["not told apart", "too few prompts", "not comparable"])
def test_without_a_leader_nothing_is_identified_and_the_reason_stands_there(verdict):
    text = whose(pd.DataFrame([difference("A", "B", 0.05, verdict)]), ["A", "B"])
    assert text.startswith("Not identified over all positions: A minus B is 0.050 nats")
    assert "(−0.050 to 0.15; 30 prompts)" in text and text.endswith(f"{verdict}.")


def test_leading_one_of_two_others_is_not_leading():
    rows = [
        difference("A", "B", 0.5, "higher"),
        difference("A", "C", 0.01, "not told apart"),
        difference("B", "C", -0.5, "lower"),
    ]
    text = whose(pd.DataFrame(rows), ["A", "B", "C"])
    assert text.startswith("Not identified") and "A is ahead" in text and "C is ahead" in text


def test_domains_come_before_thirds_and_open_groups_are_counted():
    rows = [
        difference("A", "B", 0.5, "higher", group="domain code"),
        difference("A", "B", -0.4, "lower", group="domain math"),
        difference("A", "B", 0.0, "too few prompts", group="no domain"),
        difference("A", "B", 9.0, "higher", group="low student entropy"),
    ]
    text = where(pd.DataFrame(rows))
    assert "A offers more in domain code than B (0.50 nats, 0.40 to 0.60)" in text
    assert "B offers more in domain math than A (0.40 nats, 0.30 to 0.50)" in text
    assert "1 of 3 comparisons within groups are open (too few prompts: 1)" in text
    assert "entropy" not in text
    assert "in low student entropy" in where(pd.DataFrame(rows[3:]))
    assert where(pd.DataFrame([difference("A", "B", 0.5, "higher")])) == ""


def test_gains_are_said_where_they_were_measured_beyond_the_null_first():
    rows = [difference("A", "B", 0.5, "higher", measure=name) for name in ("gain", "context_gain")]
    assert gained(pd.DataFrame(rows), ["A", "B"]).startswith("Context gain of A minus B 0.50 nats")
    assert gained(pd.DataFrame(rows[:1]), ["A", "B"]).startswith("Gain of A minus B")
    assert gained(pd.DataFrame([difference("A", "B", 0.5, "higher")]), ["A", "B"]) == ""


def test_the_marks_of_the_figure_are_the_means_with_their_intervals():
    figure = figures.teachers(means())
    drawn = [ax for ax in figure.axes if ax.containers]
    assert [ax.get_title() for ax in drawn] == ["D·C", "D = KL(q‖p)", "teachability", "gain"]
    assert [text.get_text() for text in drawn[0].get_yticklabels()] == [
        "all positions",
        "code",
        "math",
    ]
    for m, ax in enumerate(drawn):
        for t, container in enumerate(ax.containers):
            line, _, (bars,) = container.lines
            expected = np.array([t + m / 10 + g / 100 for g in range(3)])
            np.testing.assert_allclose(line.get_xdata(), expected)
            ends = np.array([segment[:, 0] for segment in bars.get_segments()])
            np.testing.assert_allclose(ends, np.stack([expected - 0.05, expected + 0.02], 1))
    chosen = figures.teachers(means(), measures=["gain"], groups=["first quarter"])
    (ax,) = [ax for ax in chosen.axes if ax.containers]
    np.testing.assert_allclose(ax.containers[1].lines[0].get_xdata(), [1.33])


def test_the_heat_map_has_a_cell_per_agreement_and_pair():
    figure = figures.teachers_agreement(agreement())
    ax = figure.axes[0]
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()).ravel(), [0.7, 0.4, 0.3])
    rows = [text.get_text() for text in ax.get_yticklabels()]
    assert rows == ["ranks of forward KL", "top-5 tokens", "selected by teachability at 5%"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["A and B"]
    assert [text.get_text() for text in ax.texts] == ["0.70", "0.40", "0.30"]
    only = figures.teachers_agreement(agreement(), measures=["advantage"])
    assert np.asarray(only.axes[0].images[0].get_array()).ravel()[0] == 0.2
    with pytest.raises(DiagnosticsError, match="value"):
        figures.teachers_agreement(agreement().drop(columns="value"))


def test_the_page_is_whole_offline_and_the_same_twice():
    rows = [difference("A", "B", 0.5, "higher")]
    html = made(rows).html
    for section in ("figures", "method", "tables", "provenance"):
        assert f'<section id="{section}">' in html
    assert html.count("<figure ") == 2 and 'id="table-teachers_best"' not in html
    outside = re.sub(r'xmlns(:\w+)?="[^"]+"', "", html).replace("http://www.w3.org", "")
    assert "http://" not in outside and "https://" not in outside
    assert "30 prompts · 300 positions" in html and "90% intervals" in html
    assert made(rows).html == html


def test_names_of_teachers_are_escaped():
    page = made([difference("A", "B", 0.5, "higher")])
    tables = {k: t.replace({"A": "<b>x</b>"}) for k, t in page.tables.items()}
    assert "<b>x</b>" not in TeachersPage(tables, page.manifest).html


def test_a_folder_without_the_tables_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 1, "versions": {}, "stages": {}}')
    with pytest.raises(DiagnosticsError, match="holds no table teachers"):
        save_teachers(tmp_path)
