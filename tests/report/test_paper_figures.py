"""The figures of the paper show what the final tables hold, on both sides, and nothing else."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer

from diagnostics.analysis.paper.printed import PRINTED
from diagnostics.analysis.paper.tables import paper
from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import figures, naming
from diagnostics.report.figures.paper import (
    BUCKETS,
    COEFFICIENTS,
    FIGURES,
    GAPS,
    SIDES,
    TRAINED,
    plain,
    printed_value,
    table_name,
    unit,
)
from tests.analysis.paper import made_studies
from tests.report import made_paper

FORESTS = {
    "3B": TRAINED | {"mean gain": "mean gain"},
    "3C": GAPS,
}
"""Figures of rows, with the series of each quantity."""


def marks(ax) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each labelled series: places, values, and [N, 2] ends of its intervals."""
    found = {}
    for bar in ax.containers:
        assert isinstance(bar, ErrorbarContainer)
        x, y = bar.lines[0].get_data()
        upright = bar.has_yerr
        ends = np.array(
            [
                segment[:, int(upright)] if len(segment) else [np.nan, np.nan]
                for segment in bar.lines[2][0].get_segments()
            ]
        )
        found[bar.get_label()] = (x, y, ends) if upright else (y, x, ends)
    return found


def panels(figure) -> dict[str, matplotlib.axes.Axes]:
    """The panel of each side, by its title."""
    sides = {title: side for side, title in SIDES.items()}
    return {
        sides[ax.get_title(loc="left")]: ax
        for ax in figure.axes
        if ax.get_title(loc="left") in sides
    }


def of(rows: pd.DataFrame, side: str) -> tuple[np.ndarray, np.ndarray]:
    """A side's estimates [N] and the ends [N, 2] of their intervals."""
    return rows[side].to_numpy(float), rows[[f"{side}_low", f"{side}_high"]].to_numpy(float)


@pytest.mark.parametrize("number", FORESTS)
def test_a_forest_shows_each_side_with_its_intervals_and_its_unit(number):
    tables = made_paper.tables()
    table = tables[table_name(number)]
    shown = panels(figures.paper(number, tables))
    for side, ax in shown.items():
        for quantity, label in FORESTS[number].items():
            rows = table[table.quantity == quantity]
            estimates, ends = of(rows, side)
            _places, values, drawn = marks(ax)[label]
            if (side, quantity) == ("released", "mean gain"):
                estimates, ends = estimates * np.nan, ends * np.nan
            np.testing.assert_allclose(values, estimates)
            np.testing.assert_allclose(drawn, ends)
        assert ax.get_xlabel().endswith(f"({unit(table, side)})"), side
    assert {"released", "controlled"} <= set(shown)
    names = [tick.get_text() for tick in shown["released"].get_yticklabels()]
    assert names == [naming.readable(row) for row in dict.fromkeys(table.row)]


@pytest.mark.parametrize(
    ("number", "quantity"), [("4A", "mean gain"), ("4B", "gain per kept share")]
)
def test_selectors_show_one_mark_per_budget(number, quantity):
    table = made_paper.selectors()
    shown = panels(FIGURES[number](table))
    assert list(shown) == list(SIDES)
    for side, ax in shown.items():
        for budget, label in ((0.03, "3%"), (0.05, "5%")):
            rows = table[(table.quantity == quantity) & (table.budget == budget)]
            estimates, ends = of(rows, side)
            _places, values, drawn = marks(ax)[label]
            np.testing.assert_allclose(values, estimates)
            np.testing.assert_allclose(drawn, ends)


def test_proxies_stand_by_k_in_4c_and_over_k_in_5b():
    table = made_paper.proxies((16, 32))
    for side, ax in panels(figures.paper_4c(table)).items():
        for k in (16, 32):
            np.testing.assert_allclose(marks(ax)[f"K = {k}"][1], table[table.k == k][side])
    table = made_paper.proxies()
    for side, ax in panels(figures.paper_5b(table)).items():
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8", "16", "32"]
        for proxy in made_paper.PROXIES:
            places, values, ends = marks(ax)[naming.readable(proxy)]
            rows = table[table.row == proxy].sort_values("k")
            np.testing.assert_array_equal(np.round(places), [0, 1, 2])
            np.testing.assert_allclose(values, rows[side])
            np.testing.assert_allclose(ends, of(rows, side)[1])


def test_coefficients_stand_over_k_and_a_missing_interval_draws_none():
    table = made_paper.coefficients()
    figure = figures.paper_3a(table, level=0.95)
    for side, ax in panels(figure).items():
        for quantity, label in COEFFICIENTS.items():
            rows = table[table.quantity == quantity]
            _places, values, ends = marks(ax)[label]
            np.testing.assert_allclose(values, rows[side])
            if side == "released":
                assert not np.isfinite(ends).any()
            else:
                np.testing.assert_allclose(ends, of(rows, side)[1])
    caption = figure.get_supxlabel().replace("\n", " ")
    assert "as released none; controlled 95% intervals over prompts." in caption


@pytest.mark.parametrize(("number", "statistic"), [("4D", "mean"), ("5C", "trimmed mean")])
def test_buckets_run_from_the_lowest_to_the_highest_quarter(number, statistic):
    table = made_paper.quarters("mean", "trimmed mean")
    for side, ax in panels(FIGURES[number](table)).items():
        for score in made_paper.SCORES:
            names = [f"{statistic} of bucket {bucket}" for bucket in BUCKETS]
            rows = table[(table.row == score) & table.quantity.isin(names)]
            places, values, ends = marks(ax)[naming.readable(score)]
            np.testing.assert_array_equal(np.round(places), range(len(rows)))
            np.testing.assert_allclose(values, rows[side])
            np.testing.assert_allclose(ends, of(rows, side)[1])


@pytest.mark.parametrize("number", ["2A", "2B", "2C"])
def test_a_plane_shows_every_cell_at_its_place_and_leaves_others_empty(number):
    table = made_paper.plane(number, bins=6)
    figure = FIGURES[number](table)
    shown = panels(figure)
    assert list(shown) == ["released", "controlled"]
    for side, ax in shown.items():
        (mesh,) = (each for each in ax.collections if isinstance(each, QuadMesh))
        values = np.ma.getdata(mesh.get_array()).reshape(6, 6)
        known = ~np.ma.getmaskarray(mesh.get_array()).reshape(6, 6)
        assert known.sum() == len(table) < 36
        for row in table.itertuples():
            assert values[row.y_bin, row.x_bin] == getattr(row, side)
        corner = mesh.get_coordinates()[3, 2]
        np.testing.assert_allclose(corner, [2 / 6, 3 / 6])
        framed = [patch for patch in ax.patches if patch.get_gid() == "Q3"]
        assert len(framed) == (number != "2A")
        if framed:
            assert framed[0].get_bbox().bounds == (0, 0.5, 0.5, 0.5)
    assert "without positions, or with too few, are empty" in figure.get_supxlabel().replace(
        "\n", " "
    )


def test_negative_cells_of_the_plane_are_marked_without_color_too():
    table = made_paper.plane("2A")
    for side, ax in panels(figures.paper_2a(table)).items():
        (line,) = (each for each in ax.lines if each.get_label() == "_negative")
        negative = table[table[side] < 0]
        np.testing.assert_allclose(line.get_xdata(), (negative.x_low + negative.x_high) / 2)
        np.testing.assert_allclose(line.get_ydata(), (negative.y_low + negative.y_high) / 2)


def test_the_heat_map_writes_every_number_and_takes_the_width_from_the_interval():
    table = made_paper.gaps()
    figure = figures.paper_5a(table)
    for side, ax in zip(SIDES, figure.axes, strict=True):
        assert ax.get_title(loc="left") == f"{SIDES[side]} ({unit(table, side)})"
        (image,) = ax.images
        gaps = table[table.quantity == "Q3 gap"]
        matched = table[table.quantity == "matched gap"]
        widths = gaps[f"{side}_high"] - gaps[f"{side}_low"]
        expected = np.column_stack([gaps[side], matched[side], widths])
        np.testing.assert_allclose(np.ma.getdata(image.get_array()), expected)
        texts = [text.get_text() for text in ax.texts]
        assert texts == [f"{value:.3f}".replace("-", "−") for value in expected.ravel()]
    own = table[table.quantity == "Q3 gap"].assign(quantity="interval width", released=7.0)
    given = figures.paper_5a(pd.concat([table, own], ignore_index=True))
    np.testing.assert_allclose(np.ma.getdata(given.axes[0].images[0].get_array())[:, 2], 7.0)


def test_panels_of_one_unit_share_their_scale_and_a_step_in_nats_keeps_its_own():
    shown = panels(figures.paper_3c(made_paper.gaps()))
    assert len({ax.get_xlim() for ax in shown.values()}) == 3
    alike = panels(figures.paper_3c(made_paper.gaps().assign(unit="nats")))
    assert alike["released"].get_xlim() == alike["controlled"].get_xlim()
    assert alike["context"].get_xlim() != alike["controlled"].get_xlim()
    standardized = panels(figures.paper_3a(made_paper.coefficients()))
    assert len({ax.get_ylim() for ax in standardized.values()}) == 1
    shown = panels(figures.paper_4d(made_paper.quarters("mean")))
    assert len({ax.get_ylim() for ax in shown.values()}) == 3


def test_the_context_panel_is_left_out_where_the_run_has_no_context_gain():
    assert list(panels(figures.paper_3c(made_paper.gaps(context=False)))) == [
        "released",
        "controlled",
    ]


@pytest.mark.parametrize("number", FIGURES)
def test_series_differ_by_marker_as_well_as_by_color(number):
    tables = made_paper.tables()
    for ax in figures.paper(number, tables).axes:
        lines = [bar.lines[0] for bar in ax.containers if isinstance(bar, ErrorbarContainer)]
        assert len({line.get_marker() for line in lines}) == len(lines)
        assert len({to_hex(line.get_color()) for line in lines}) == len(lines)


def test_a_printed_value_stands_in_the_caption_and_is_not_drawn():
    tables = made_paper.tables()
    table = tables["paper_figure_3c"]
    figure = figures.paper("3c", tables)
    caption = figure.get_supxlabel().replace("\n", " ")
    assert caption.endswith("Printed in the paper: .084 [.069, .098].")
    drawn = np.concatenate(
        [values for ax in figure.axes for _places, values, _ends in marks(ax).values()]
    )
    assert set(drawn) == set(table[list(SIDES)].to_numpy(float).ravel())
    assert "Printed" not in figures.paper_3c(table).get_supxlabel()
    assert "Printed" not in figures.paper("4A", tables).get_supxlabel()


def test_the_caption_counts_what_each_side_rests_on():
    table = made_paper.gaps().assign(released_n=472.0, controlled_n=[480.0, 160.0] * 3)
    table["context_n"] = np.nan
    caption = figures.paper_3c(table).get_supxlabel().replace("\n", " ")
    assert "Positions of Q3 or pairs: as released 472; controlled 160–480." in caption


def test_a_figure_is_found_by_the_papers_number_with_the_options_of_a_page():
    tables = made_paper.tables()
    for number in FIGURES:
        figure = figures.paper(number, tables, width=figures.SINGLE, dark=True, level=0.9)
        assert figure.get_figwidth() == figures.SINGLE
        assert len(figure.axes) >= 2


def test_what_is_not_there_is_refused_with_a_remedy():
    tables = made_paper.tables()
    with pytest.raises(DiagnosticsError, match=r"figure '6D' is none of .* 2A, 2B.*Pass one"):
        figures.paper("6D", tables)
    del tables["paper_figure_3b"]
    with pytest.raises(DiagnosticsError, match=r"no table paper_figure_3b .*paper --train"):
        figures.paper("3B", tables)
    empty = made_paper.gaps().assign(released=np.nan, controlled=np.nan, context=np.nan)
    with pytest.raises(DiagnosticsError, match=r"Figure 3C found no number.*column why"):
        figures.paper_3c(empty)
    with pytest.raises(DiagnosticsError, match="controlled_low"):
        figures.paper_3c(made_paper.gaps().drop(columns="controlled_low"))


def test_masks_at_several_budgets_have_a_row_each_and_none_is_dropped():
    table = made_paper.masks()
    both = pd.concat([table.assign(budget=0.03), table.assign(controlled=table.controlled + 1)])
    shown = panels(figures.paper_3b(both.reset_index(drop=True)))
    ax = shown["controlled"]
    names = [tick.get_text() for tick in shown["released"].get_yticklabels()]
    assert names == [
        f"{naming.readable(mask)}, {budget}" for budget in ("3%", "5%") for mask in made_paper.MASKS
    ]
    rows = table[table.quantity == "mean gain"].controlled
    np.testing.assert_allclose(marks(ax)["mean gain"][1], [*rows, *(rows + 1)])
    with pytest.raises(DiagnosticsError, match=r"Figure 3C found two numbers for 'K = 8'"):
        figures.paper_3c(pd.concat([made_paper.gaps(), made_paper.gaps()]))


def test_edges_that_differ_by_rounding_are_one_edge():
    table = made_paper.plane("2B")
    shifted = table.assign(x_high=table.x_high + 1e-16, y_low=np.nextafter(table.y_low, 1))
    for one, other in zip(
        panels(figures.paper_2b(table)).values(),
        panels(figures.paper_2b(shifted)).values(),
        strict=True,
    ):
        first, second = (
            next(each for each in ax.collections if isinstance(each, QuadMesh))
            for ax in (one, other)
        )
        np.testing.assert_allclose(first.get_coordinates(), second.get_coordinates())
        np.testing.assert_array_equal(
            np.ma.filled(first.get_array(), -9), np.ma.filled(second.get_array(), -9)
        )


def test_an_artefact_is_found_however_its_name_is_written():
    names = ("Figure 3C", "figure 3c", "3C", "paper_figure_3c", "figure_3c")
    assert {plain(name) for name in names} == {"3c"}
    assert {plain(name) for name in ("Table 1", "paper_table_1", "table 1")} == {"table1"}
    table = pd.DataFrame({"artefact": ["paper_table_1"], "printed": ["x"]})
    assert printed_value({"paper_differences": table}, "Table 1") == "x"
    assert printed_value({"paper_differences": table}, "1") == ""
    assert printed_value({}, "Table 1") == ""


def test_every_figure_draws_what_the_study_of_the_paper_makes():
    tokens = made_studies.made_study(12, 16)
    gains = {mask: 0.1 * tokens.forward_kl.to_numpy() for mask in ("random", *made_paper.MASKS)}
    cells, kept = made_studies.made_trainings(tokens, gains, noise=0.01)
    tables = paper(tokens, cells=cells, kept=kept, draws=10)
    for number in FIGURES:
        figure = figures.paper(number, tables, width=figures.SINGLE, level=0.95)
        assert {"released", "controlled"} <= set(panels(figure)) or number == "5A"
        caption = figure.get_supxlabel().replace("\n", " ")
        assert ("Printed in the paper:" in caption) == bool(PRINTED[f"Figure {number}"].text)
