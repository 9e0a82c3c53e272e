"""Figures as parts of others: axes that the user brings, their settings, palettes, names, files."""

import inspect
import io
import re
import zlib
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from diagnostics import criteria
from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import figures, look, palette, style
from tests import study_tables
from tests.report import made_tables
from tests.report.test_figures import EVERY, errorbars


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def panels(figure) -> int:
    """Number of panels of a figure, without color bars."""
    return sum(ax.get_visible() and ax.get_label() != "<colorbar>" for ax in figure.axes)


# --- axes of one's own ---


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [(10, 4), (4, 9)])
def test_every_figure_draws_into_axes_that_are_brought(name, size):
    draw, table = EVERY[name]
    alone = draw(table())
    count = panels(alone)
    wide = size[0] > size[1]
    figure, axes = plt.subplots(*((1, count) if wide else (count, 1)), figsize=size)
    size, drawn = figure.get_size_inches().tolist(), draw(table(), axes=axes)
    assert drawn.size == count and set(drawn.flat) <= set(figure.axes)
    assert figure.get_size_inches().tolist() == size and figure.get_supxlabel() == ""
    assert all(ax.has_data() or ax.texts or ax.patches for ax in drawn.flat)


def test_one_panel_returns_its_axes_and_shows_what_the_figure_shows():
    table = made_tables.correlations()
    _, axes = plt.subplots(1, 2)
    ax = figures.correlations(table, ax=axes[0])
    assert ax is axes[0] and not axes[1].has_data()
    alone = errorbars(figures.correlations(table).axes[0])
    for label, (_, values, ends) in errorbars(ax).items():
        np.testing.assert_array_equal(values, alone[label][1])
        np.testing.assert_array_equal(ends, alone[label][2])
    ax.set_title("mine")
    assert ax.get_title() == "mine" and not ax.get_title(loc="left")
    assert figures.correlations(table, ax=axes[1:])[0] is axes[1]


def test_other_numbers_and_other_things_than_axes_are_refused():
    figure, axes = plt.subplots(1, 3)
    table = study_tables.quadrants()
    with pytest.raises(
        DiagnosticsError, match=r"^This figure has 2 panels; axes= got 3\. Pass axes="
    ):
        figures.quadrants(table, axes=axes)
    with pytest.raises(DiagnosticsError, match=r"has 2 panels; ax= takes 1\."):
        figures.quadrants(table, ax=axes[0])
    with pytest.raises(DiagnosticsError, match=r"^quadrants takes ax= or axes=, not both\.$"):
        figures.quadrants(table, ax=axes[0], axes=axes)
    with pytest.raises(DiagnosticsError, match=r"got Figure\. Make some with plt\.subplots"):
        figures.quadrants(table, ax=figure)
    assert figures.quadrants(table, ax=axes[0], outcomes=["gain"]) is axes[0]


# --- whose settings count ---


def test_our_look_applies_where_nothing_was_changed():
    figure = figures.correlations(study_tables.correlations())
    ax = figure.axes[0]
    assert ax.xaxis.label.get_fontsize() == 8 and not ax.spines["top"].get_visible()
    assert matplotlib.colors.to_hex(ax.xaxis.label.get_color()).upper() == style.LIGHT["ink"]


def test_a_style_sheet_and_a_font_of_the_user_s_are_respected():
    with plt.style.context("ggplot"), matplotlib.rc_context({"font.family": "serif"}):
        rc = dict(matplotlib.rcParams)
        figure = figures.correlations(study_tables.correlations())
        assert dict(matplotlib.rcParams) == rc
    ax, hexed = figure.axes[0], matplotlib.colors.to_hex
    assert hexed(ax.get_facecolor()) == "#e5e5e5"
    assert ax.xaxis.label.get_fontfamily() == ["serif"] and ax.xaxis.label.get_fontsize() == 12
    assert hexed(ax.xaxis.label.get_color()) == "#555555"
    colors = {hexed(bar.lines[0].get_color()) for bar in ax.containers}
    assert colors <= {"#e24a33", "#348abd", "#988ed5", "#777777", "#fbc15e", "#8eba42", "#ffb5b8"}
    assert not ax.spines["top"].get_visible()  # what ggplot leaves alone is ours


def test_one_changed_color_makes_all_page_colors_the_user_s_and_sizes_stay_ours():
    with matplotlib.rc_context({"axes.facecolor": "#202020", "text.color": "white"}):
        ax = figures.correlations(study_tables.correlations()).axes[0]
    assert matplotlib.colors.to_hex(ax.xaxis.label.get_color()) == "#000000"
    assert ax.xaxis.label.get_fontsize() == 8
    with matplotlib.rc_context({"font.size": 12}):
        ax = figures.correlations(study_tables.correlations()).axes[0]
    assert ax.xaxis.label.get_fontsize() == 12
    assert matplotlib.colors.to_hex(ax.xaxis.label.get_color()).upper() == style.LIGHT["ink"]
    with matplotlib.rc_context({"axes.facecolor": "#202020"}):
        dark = figures.correlations(study_tables.correlations(), dark=True)
    assert matplotlib.colors.to_hex(dark.axes[0].get_facecolor()).upper() == style.DARK["paper"]


def test_larger_text_still_fits_its_page():
    with matplotlib.rc_context({"font.size": 11, "font.family": "serif"}):
        figure = figures.correlations(study_tables.correlations())
        figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_axes_of_one_s_own_keep_one_s_settings_unless_our_look_is_put_around():
    table = study_tables.correlations()
    ax = figures.correlations(table, ax=plt.subplots()[1], outcomes=["gain"])
    assert ax.xaxis.label.get_fontsize() == matplotlib.rcParams["font.size"]
    before = dict(matplotlib.rcParams)
    with figures.style() as rc:
        assert matplotlib.rcParams["font.size"] == rc["font.size"] == 8
        ax = figures.correlations(table, ax=plt.subplots()[1], outcomes=["gain"])
    assert dict(matplotlib.rcParams) == before
    assert ax.xaxis.label.get_fontsize() == 8
    assert figures.style(dark=True)["text.color"] == style.DARK["ink"]


def test_files_of_the_report_do_not_hang_on_the_user_s_settings():
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}), look.untouched():
        assert not look.changed("font.size") and not look.changed("axes.facecolor")


# --- titles afterwards ---


def test_titles_set_afterwards_replace_ours_and_lie_on_nothing():
    figure = figures.correlations(study_tables.correlations())
    before = figure.axes[0].get_position().y1
    figure.suptitle("The whole\nin two lines")
    figure.axes[0].set_title("mine")
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().y1 < before
    renderer = FigureCanvasAgg(figure).get_renderer()
    left, center = figure.axes[0]._left_title, figure.axes[0].title
    assert left.get_text() == "mine" and center.get_text() == ""
    above = [figure._suptitle, figure.legends[0], left]
    boxes = [part.get_window_extent(renderer) for part in above]
    for upper, lower in pairwise(boxes):
        assert upper.y0 >= lower.y1 - 1
    assert boxes[0].y1 <= figure.bbox.y1 + 1
    place = figure.axes[0].get_position().bounds
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().bounds == place


def test_a_title_where_there_was_none_makes_room_for_itself():
    figure = figures.correlations(made_tables.correlations())
    figure.axes[0].set_title("mine")
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    title = figure.axes[0]._left_title.get_window_extent(renderer)
    assert not title.overlaps(figure.legends[0].get_window_extent(renderer))


# --- palette, order, labels, caption, legend ---


def test_a_palette_names_colors_lists_them_or_is_a_colormap():
    table = study_tables.selection_curves()

    def colors(**options):
        ax = figures.selection_curves(
            table, criteria=["divergence", "teachability"], **options
        ).axes[0]
        return [matplotlib.colors.to_hex(line.get_color()) for line in ax.lines[:2]]

    usual = colors()
    assert colors(palette={"divergence": "red", "nowhere": "k"}) == ["#ff0000", usual[1]]
    assert colors(palette=["red", "#00ff00"]) == ["#ff0000", "#00ff00"]
    tab = [matplotlib.colors.to_hex(matplotlib.colormaps["tab10"](i)) for i in (0, 1)]
    assert colors(palette="tab10") == tab
    with pytest.raises(DiagnosticsError, match=r"^palette='tab11' is no colormap.*'tab10'\?"):
        colors(palette="tab11")
    with pytest.raises(DiagnosticsError, match=r"^palette holds 'blurple', which is no color\.$"):
        colors(palette={"tip": "blurple"})


def test_names_come_in_the_order_and_in_the_words_that_were_asked_for():
    table = made_tables.correlations()
    usual = [label.get_text() for label in figures.correlations(table).axes[0].get_yticklabels()]
    figure = figures.correlations(
        table, order=["random", "tip"], labels={"tip": "TIP of mine", "context_gain": "net"}
    )
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[:2] == ["random", "TIP of mine"]
    assert shown[2:] == [name for name in usual if name not in ("random", "TIP")]
    assert "net" in errorbars(figure.axes[0])
    with pytest.raises(
        DiagnosticsError, match=r"nothing of the name 'rndom'\. Did you mean 'random'\?"
    ):
        figures.correlations(table, order=["rndom"])
    again = [label.get_text() for label in figures.correlations(table).axes[0].get_yticklabels()]
    assert again == usual


def test_a_caption_that_is_not_written_is_kept_and_a_legend_goes_where_it_is_sent():
    table = study_tables.correlations()
    usual, bare = figures.correlations(table), figures.correlations(table, caption=False)
    assert bare.get_supxlabel() == "" and bare.caption == usual.caption
    assert usual.get_supxlabel().replace("\n", " ") == usual.caption
    assert figures.correlations(table, legend=False).legends == []
    inside = figures.correlations(table, legend="lower right")
    assert inside.legends == [] and inside.axes[0].get_legend() is not None


@pytest.mark.parametrize("name", EVERY)
def test_the_shared_options_stand_in_every_signature(name):
    parameters = inspect.signature(getattr(figures, name)).parameters
    for option in ("ax", "axes", "palette", "order", "labels", "caption", "legend"):
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
    assert "with `axes` their array." in getattr(figures, name).__doc__


# --- one look per criterion ---


def test_every_criterion_of_the_library_has_a_look_of_its_own_whatever_is_drawn():
    known = [name for name in criteria.names() if name not in palette.GREY]
    assert set(known) <= set(palette.KNOWN)
    every = {name: palette.criterion_style(name, known) for name in known}
    assert len({(look["color"], look["marker"]) for look in every.values()}) == len(known)
    for name in known:
        assert palette.criterion_style(name, [name, "mine"]) == every[name]


def test_own_criteria_never_look_like_another_that_is_drawn_and_keep_their_look():
    own = [f"mine_{number}" for number in range(70)]
    names = [*palette.KNOWN[:20], *own]
    looks = {name: palette.criterion_style(name, names) for name in names}
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(names)
    alone = palette.criterion_style("mine_3", ["mine_3"])
    assert alone == palette.criterion_style("mine_3", ["mine_3", "random", "full"])
    few = [*palette.CRITERIA, "mine_3"]
    colors = [palette.criterion_style(name, few)["color"] for name in few]
    assert len(set(colors)) == len(few)
    many = [f"mine_{number}" for number in range(150)]
    seen = {str(palette.criterion_style(name, many)) for name in many}
    assert len(seen) == len(many)


# --- files and windows ---


def fonts(pdf: bytes) -> bytes:
    """The objects of a PDF, unpacked, in which fonts are declared."""
    streams = re.findall(rb"stream\r?\n(.*?)endstream", pdf, flags=re.DOTALL)
    unpacked = []
    for stream in streams:
        try:
            unpacked.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return pdf + b"".join(unpacked)


@pytest.mark.parametrize("name", ["correlations", "decision", "selection_overlap"])
def test_a_later_pdf_has_truetype_fonts_and_a_later_png_300_dots_per_inch(name, tmp_path):
    draw, table = EVERY[name]
    figure = draw(table())
    figure.savefig(tmp_path / "x.pdf")
    content = fonts((tmp_path / "x.pdf").read_bytes())
    assert b"/Type3" not in content and b"/FontFile2" in content
    figure.savefig(tmp_path / "x.png")
    assert plt.imread(tmp_path / "x.png").shape[1] == round(300 * figures.DOUBLE)
    with matplotlib.rc_context({"savefig.dpi": 50}):
        figure.savefig(tmp_path / "y.png")
    assert plt.imread(tmp_path / "y.png").shape[1] == round(50 * figures.DOUBLE)


def test_a_script_shows_a_figure_and_leaves_nothing_open():
    figure = figures.correlations(study_tables.correlations())
    plt.switch_backend("agg")
    figure.show()
    assert plt.get_fignums() == []
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert buffer.getvalue().startswith(b"\x89PNG")
