"""The style of the figures: rows that are kept, captions, colors, ticks and readable names."""

from typing import Unpack

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import naming, style
from diagnostics.report.figures.options import Page, on_page

TABLE = pd.DataFrame(
    {
        "split": ["all", "step", "held_out"],
        "budget": [0.01, 0.04, 0.3],
        "prompts": [20, 9, 11],
        "positions": [1500, 700, 800],
    }
)


def test_rows_are_kept_by_value_and_an_empty_answer_names_what_there_is():
    assert style.keep(TABLE, "A figure", ["split"], {"split": ["step", "all"]}).split.tolist() == [
        "all",
        "step",
    ]
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^A figure found no row with split in 'half'; the table has 'all', 'step',"
            r" 'held_out'\. Pass a table that holds it\.$"
        ),
    ):
        style.keep(TABLE, "A figure", ["split"], {"split": "half"})
    with pytest.raises(DiagnosticsError, match=r"^A figure got a table without rows"):
        style.keep(TABLE.iloc[:0], "A figure", ["split"])
    with pytest.raises(DiagnosticsError, match="gain"):
        style.keep(TABLE, "A figure", ["gain"])


def test_splits_and_budgets_that_a_figure_takes():
    assert style.halves(TABLE).split.tolist() == ["step", "held_out"]
    assert style.halves(TABLE.iloc[:2]).split.tolist() == ["all", "step"]
    assert (
        naming.preferred_split(TABLE) == "held_out"
        and naming.preferred_split(TABLE.iloc[:2]) == "all"
        and naming.preferred_split(TABLE.iloc[1:2]) == "step"
    )
    assert (
        style.nearest_budget(TABLE) == 0.04 and style.nearest_budget(TABLE, 0.12) == 0.3
    )  # nearer by ratio, not by difference
    assert style.present(TABLE.split, ["held_out", "nowhere", "all"]) == ["held_out", "all", "step"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("forward_kl", "forward KL"),
        ("tip", "TIP"),
        ("topk_overlap", "top-K overlap"),
        ("q3_gain", "Q3 gain"),
        ("multiple", "multiple"),
    ],
)
def test_names_in_words(name, expected):
    assert naming.readable(name) == expected


def test_counts_and_bars_say_what_the_table_holds():
    assert (
        style.counts(TABLE)
        == "Step contexts: 9 prompts, 700 positions; held-out contexts: 11 prompts, 800 positions;"
        " all contexts: 20 prompts, 1,500 positions."
    )
    assert (
        style.counts(TABLE.drop(columns="split")) == "9–20 prompts, 700–1,500 positions."
        and style.counts(TABLE[["split"]]) == ""
    )
    assert (
        style.bars(0.9) == "Bars: 90% intervals over prompts."
        and style.bars(None, "Bands") == "Bands: intervals over prompts."
    )


def test_bars_say_over_how_many_step_batches_where_the_table_does():
    four, one = TABLE.assign(steps=[4, 1, np.nan]), TABLE.assign(steps=1)
    assert style.bars(0.9, table=four) == "Bars: 90% intervals over prompts and 4 step batches."
    assert style.bars(None, table=one) == "Bars: intervals over prompts alone (one step batch)."
    for unknown in (TABLE, TABLE.assign(steps=np.nan)):
        assert style.bars(None, table=unknown) == "Bars: intervals over prompts."


def test_ties_and_flags_are_read_from_tables_in_memory_and_from_files():
    table = TABLE.assign(ambiguous=[0.1, 0.11, np.nan])
    assert style.ambiguous(table).tolist() == [False, True, False]
    assert style.ambiguous(table.assign(ambiguous=[True, False, True])).tolist() == [1, 0, 1]
    assert not style.ambiguous(TABLE).any()
    assert style.tie_words(table) == "Ringed: ties decide over 10% of the selection."
    assert style.tie_words(TABLE) == ""
    for column in ([True, False, True], ["True", "False", "True"], [1, 0, 1], [True, None, True]):
        assert style.flagged(TABLE.assign(over=column), "over").tolist() == [True, False, True]
    assert not style.flagged(TABLE, "over").any()


def test_the_context_gain_stands_beside_the_gain_where_the_table_has_it():
    table = pd.DataFrame({"outcome": ["gain", "relative_gain", "context_gain"]})
    assert naming.shown_outcomes(table) == ["gain", "context_gain"]
    assert naming.shown_outcomes(table.iloc[:2]) == ["gain", "relative_gain"]
    assert naming.shown_outcomes(table, ("reverse_gain",)) == ["reverse_gain"]
    assert [naming.steps(k) for k in (0, 1, 20)] == ["one matched step", "1 step", "20 steps"]


@pytest.mark.parametrize(
    "value, expected",
    [(0.5, "0.5"), (1e-5, "10⁻⁵"), (2.5e4, "2.5×10⁴"), (1000, "10³"), (0, "0"), (-3.0, "-3")],
)
def test_ticks_of_logarithmic_axes(value, expected):
    assert style.power(value) == expected


def test_bars_reach_from_the_value_and_never_backwards():
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0], "low": [0.5, 2.5, np.nan], "high": [2.0, 3.0, 3.5]})
    np.testing.assert_array_equal(style.reach(rows, "x"), [[0.5, 0.0, np.nan], [1.0, 1.0, 0.5]])
    np.testing.assert_array_equal(style.offsets(3, 0.2), [-0.2, 0, 0.2])
    assert style.percent(-0.05) == "−5%"


def test_usual_criteria_look_the_same_whatever_stands_beside_them():
    alone, beside = (
        style.criterion_style("tip", names)
        for names in (["tip"], ["random", "margin", "tip", "early"])
    )
    assert alone == beside
    every = [
        style.criterion_style(name, ["margin", "early", "late"])
        for name in (*style.CRITERIA, "margin", "early", "late")
    ]
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in every}) == len(
        every
    )


def test_captions_stay_within_the_page():
    figure = Figure(figsize=(3.3, 2))
    style.caption(
        figure,
        "A sentence that is much too long for one line of a single column, by any measure.",
        "",
        "Another.",
    )
    lines = figure.get_supxlabel().split("\n")
    assert len(lines) > 1 and " ".join(lines).endswith("measure. Another.")
    assert all(
        style.text_width(line, matplotlib.rcParams["font.size"] - 1) <= 3.3 * 72 * 0.93
        for line in lines
    )


def test_colors_of_either_sign_meet_in_the_middle():
    norm = style.signed_root(4.0)
    np.testing.assert_allclose(
        [float(norm(value)) for value in (-4.0, -1.0, 0.0, 1.0, 4.0)], [0, 0.25, 0.5, 0.75, 1]
    )


@pytest.mark.parametrize("name", ["lr $$", "a $x$ b", "$", "c^{", "$\\frac{", "100 % _x_ \\alpha"])
def test_names_are_never_read_as_mathematics(name):
    """In titles, ticks, legends and captions, on the first drawing and on a later one."""
    import io

    @on_page
    def draw(table, **page: Unpack[Page]):
        figure, axes = style.canvas(page["width"], 2)
        ax = axes[0, 0]
        ax.plot([0, 1], [0, 1], label=name)
        ax.set_title(name), ax.set_xlabel(name), ax.set_ylabel(name)
        ax.text(0.5, 0.5, name), ax.annotate(name, (0, 0))
        ax.set_yticks([0], [name])
        style.legend(figure, ax, 1)
        style.caption(figure, name)
        return figure

    figure = draw(None, width=style.SINGLE)
    for kind in ("svg", "png", "pdf"):
        figure.savefig(io.BytesIO(), format=kind)
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() == name]
    assert len(texts) >= 7 and not any(text.get_parse_math() for text in texts)
