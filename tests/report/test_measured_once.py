"""Texts and ticks that are measured once say the same as matplotlib's own, and are forgotten."""

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import FontProperties, fontManager, get_font
from PIL import Image

from diagnostics.report import canvas, measured_once
from diagnostics.report.canvas import NotebookFigure, Panel
from diagnostics.report.measured_once import ticks_once
from tests import study_tables


def panel(low=0.0, high=1.0):
    figure = NotebookFigure(figsize=(4, 3))
    ax = figure.subplots(subplot_kw={"axes_class": Panel})
    ax.plot([0, 1], [low, high])
    ax.set_title("title")
    ax.set_ylabel("nats")
    return figure, ax


def count_locations(axis, monkeypatch):
    asked, locations = [], axis.get_majorticklocs
    monkeypatch.setattr(axis, "get_majorticklocs", lambda: asked.append(1) or locations())
    return asked


def test_ticks_are_worked_out_once_at_each_place_and_forgotten_afterwards(monkeypatch):
    figure, ax = panel()
    renderer = figure._get_renderer()
    asked = count_locations(ax.yaxis, monkeypatch)
    free = ax.get_tightbbox(renderer)
    often = len(asked)
    with ticks_once([ax]):
        del asked[:]
        held = ax.get_tightbbox(renderer)
        ax.get_tightbbox(renderer)
        assert len(asked) == 1 < often
        np.testing.assert_array_equal(held.extents, free.extents)
        ax.set_position([0.3, 0.3, 0.2, 0.2])  # another place has its own ticks
        moved = ax.get_tightbbox(renderer)
        assert len(asked) == 2
    np.testing.assert_array_equal(ax.get_tightbbox(renderer).extents, moved.extents)
    ax.set_ylim(0, 1000)
    labels = [tick.label1.get_text() for tick in ax.yaxis._update_ticks()]
    assert "1000" in labels and len(asked) > 2


def test_axes_of_other_classes_are_left_alone():
    figure = NotebookFigure()
    ax = figure.subplots()
    with ticks_once([ax]):
        assert len(ax.xaxis._update_ticks())


@pytest.mark.parametrize("dpi", [72, 150])
def test_a_figure_is_drawn_the_same_with_and_without(dpi, monkeypatch):
    def drawn():
        figure, _ = panel(-2e5, 3e5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
        return np.asarray(Image.open(buffer))

    with_it = drawn()
    monkeypatch.setattr(canvas, "ticks_once", lambda axes: matplotlib.rc_context())
    np.testing.assert_array_equal(with_it, drawn())


def heights(prop):
    """Ascent, descent and gap as shares of the size, read from the file of the font."""
    font = get_font(fontManager._find_fonts_by_props(prop))
    table, em = font.get_sfnt_table("OS/2"), font.get_sfnt_table("head")["unitsPerEm"]
    up, down, gap = (table[f"sTypo{name}"] / em for name in ("Ascender", "Descender", "LineGap"))
    return up, -down, gap


def test_heights_of_fonts_are_those_of_their_files_also_after_other_settings():
    for families in (["DejaVu Sans"], ["DejaVu Sans Mono"], ["cmr10"]):
        with matplotlib.rc_context({"font.sans-serif": families}):
            for properties in ({}, {"size": 20}, {"weight": "bold"}, {"family": "monospace"}):
                prop = FontProperties(**properties)
                for _ in range(2):  # the second time it is remembered
                    assert measured_once._heights_of(prop) == heights(prop)


def test_a_layout_that_measures_once_keeps_everything_on_the_paper(monkeypatch):
    """Panels whose ticks stay are not measured again; they lie where a second look puts them."""
    from diagnostics.report.figures import correlations

    table = study_tables.correlations()
    places = []
    for again in (False, True):
        if again:
            monkeypatch.setattr(canvas, "_ticks_of", lambda panels: [object()])
        figure = correlations(table)
        places.append([ax.get_position().extents for ax in figure.axes])
        around = figure.get_tightbbox(figure._get_renderer())
        width, height = figure.get_size_inches()
        assert around.x0 >= -0.01 and around.y0 >= -0.01
        assert around.x1 <= width + 0.01 and around.y1 <= height + 0.01
    np.testing.assert_allclose(*places, atol=0.01)
