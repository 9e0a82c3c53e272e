"""Figures show what the tables hold: read back from the artists, never from pixels."""

import functools
import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from diagnostics import figures
from diagnostics.criteria import quadrants
from diagnostics.types import DiagnosticsError
from tests import study_tables

WIDTHS = (figures.SINGLE, figures.DOUBLE)
EVERY = {
    "correlations": (figures.correlations, study_tables.correlations),
    "entropy_divergence": (figures.entropy_divergence, study_tables.tokens),
    "q3_gain": (figures.q3_gain, study_tables.q3_groups),
    "calibration": (figures.calibration, study_tables.calibration),
}


@functools.cache
def drawn(name: str, width: float, dark: bool = False) -> Figure:
    draw, table = EVERY[name]
    return draw(table(), width=width, dark=dark)


def errorbars(ax) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each labelled errorbar: positions, values, and [N, 2] interval ends, whichever way it lies."""
    found = {}
    for bar in (container for container in ax.containers if isinstance(container, ErrorbarContainer)):
        x, y = bar.lines[0].get_data()
        upright = bar.has_yerr
        ends = np.array([segment[:, int(upright)] if len(segment) else [np.nan, np.nan] for segment in bar.lines[2][0].get_segments()])
        found[bar.get_label()] = (x, y, ends) if upright else (y, x, ends)
    return found


def texts(figure: Figure) -> list:
    """All text that is drawn: ticks outside the view have labels too, but are not."""
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = {text for axis in axes for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) for text in (tick.label1, tick.label2)}
    drawn = {text for axis in axes for tick in axis._update_ticks() for text in (tick.label1, tick.label2)}
    every = figure.findobj(lambda artist: isinstance(artist, matplotlib.text.Text) and artist.get_visible() and artist.get_text().strip())
    return [text for text in every if text not in ticks or text in drawn]


def rendered(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return buffer.getvalue()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("width", WIDTHS)
def test_fits_its_page_and_no_label_lies_on_another(name, width):
    figure = drawn(name, width)
    assert figure.get_figwidth() == width
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.bbox
    boxes = []
    for text in texts(figure):
        box = text.get_window_extent(renderer)
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, text.get_text()
        boxes.append((text.get_text(), box.shrunk(0.98, 0.8)))
    clashes = [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[i + 1:] if box.overlaps(other)]
    assert clashes == []


@pytest.mark.parametrize("name", EVERY)
def test_one_table_gives_the_same_bytes_twice_and_a_dark_page_others(name):
    draw, table = EVERY[name]
    light, again, dark = (rendered(plate) for plate in (drawn(name, figures.SINGLE), draw(table(), width=figures.SINGLE), drawn(name, figures.SINGLE, True)))
    assert light == again
    assert light != dark


@pytest.mark.parametrize("name", EVERY)
def test_page_colours(name):
    for dark, page in ((False, figures.LIGHT), (True, figures.DARK)):
        figure = drawn(name, figures.SINGLE, dark)
        assert matplotlib.colors.to_hex(figure.get_facecolor()).upper() == page["paper"]
        label = figure.axes[0].xaxis.label if figure.axes[0].get_xlabel() else figure.axes[0].yaxis.label
        assert matplotlib.colors.to_hex(label.get_color()).upper() == page["ink"]


def test_style_does_not_leak():
    before = dict(matplotlib.rcParams)
    figures.correlations(study_tables.correlations(), dark=True)
    assert dict(matplotlib.rcParams) == before


def test_saves_as_png_pdf_and_svg():
    figure = figures.calibration(study_tables.calibration())
    for kind, head in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind)
        assert buffer.getvalue().startswith(head)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_correlations_shows_estimates_intervals_and_placebo():
    table = study_tables.correlations()
    figure = figures.correlations(table)
    names = [label.get_text().replace(" ", "_") for label in figure.axes[0].get_yticklabels()]
    order = table[(table.outcome == "gain") & (table.split == "held_out") & (table.method == "spearman")]
    assert names == order.sort_values("estimate", ascending=False).criterion.tolist()
    for ax, outcome in zip(figure.axes[:2], ("gain", "relative_gain"), strict=True):
        assert ax.get_title(loc="left") == outcome.replace("_", " ")
        bars = errorbars(ax)
        for split, label in (("step", "step contexts"), ("held_out", "held-out contexts")):
            rows = table[(table.outcome == outcome) & (table.split == split) & (table.method == "spearman")].set_index("criterion").loc[names]
            place, values, ends = bars[label]
            assert np.round(place).astype(int).tolist() == list(range(len(names)))
            np.testing.assert_allclose(values, rows.estimate)
            np.testing.assert_allclose(ends, rows[["low", "high"]])
            placebo = next(line for line in ax.lines if line.get_label() == f"_placebo {split}")
            np.testing.assert_allclose(placebo.get_xdata(), rows.placebo)
            np.testing.assert_allclose(placebo.get_ydata(), place)


def test_correlations_takes_a_method_and_criteria_and_names_the_sample():
    table = study_tables.correlations()
    figure = figures.correlations(table, method="pearson", criteria=["tip", "entropy"], level=0.9)
    rows = table[(table.outcome == "gain") & (table.split == "step") & (table.method == "pearson") & table.criterion.isin(["tip", "entropy"])]
    assert sorted(errorbars(figure.axes[0])["step contexts"][1]) == sorted(rows.estimate)
    assert figure.axes[0].get_xlabel() == "Pearson r"
    caption = figure.get_supxlabel().replace("\n", " ")
    assert caption == ("Step contexts: 16 prompts, 701–734 positions; held-out contexts: 16 prompts, 701–734 positions. "
                       "Bars: 90% intervals over prompts.")


def test_correlations_leaves_undefined_estimates_out():
    table = study_tables.correlations()
    table.loc[table.criterion == "random", ["estimate", "low", "high"]] = np.nan
    figure = figures.correlations(table)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[-1] == "random"
    assert np.isnan(errorbars(figure.axes[0])["step contexts"][1][-1])


def test_plane_shows_means_medians_and_quadrant_shares():
    table = study_tables.tokens()
    figure = figures.entropy_divergence(table, bins=8)
    compatibility, gain = figure.axes[:2]
    assert [ax.get_title(loc="left") for ax in (compatibility, gain)] == ["mean compatibility", "mean gain"]
    share = pd.Series(quadrants(table)).value_counts(normalize=True)
    for ax, name in ((compatibility, "compatibility"), (gain, "gain")):
        means = np.asarray(ax.collections[0].get_array())
        assert table[name].min() - 1e-12 <= means.min() < means.max() <= table[name].max() + 1e-12
        assert ax.lines[0].get_xdata()[0] == table.student_entropy.median()
        assert ax.lines[1].get_ydata()[0] == table.forward_kl.median()
        assert {text.get_gid(): text.get_text() for text in ax.texts} == {f"Q{q}": f"Q{q} {share[q]:.0%}" for q in (1, 2, 3, 4)}
    assert figure.get_supxlabel().startswith(f"8 prompts, {len(table)} positions.")


def test_plane_of_one_hexagon_is_the_mean():
    table = study_tables.tokens().assign(student_entropy=0.5, forward_kl=0.25)
    table.loc[::2, "gain"] = np.nan
    figure = figures.entropy_divergence(table, color=["gain"])
    assert np.asarray(figure.axes[0].collections[0].get_array()).tolist() == pytest.approx([table.gain.mean()])


def test_plane_with_losses_has_a_scale_around_zero():
    table = study_tables.tokens()
    figure = figures.entropy_divergence(table.assign(gain=table.gain - table.gain.mean()))
    low, high = figure.axes[1].collections[0].get_clim()
    assert low == -high < 0


def test_q3_gain_shows_groups_from_bottom_to_top():
    table = study_tables.q3_groups().sample(frac=1, random_state=1)
    figure = figures.q3_gain(table, level=0.95)
    for ax, outcome in zip(figure.axes, ("gain", "relative_gain"), strict=True):
        scores = [label.get_text() for label in ax.get_xticklabels()] or [label.get_text() for label in figure.axes[-1].get_xticklabels()]
        drawn = [bar for bar in ax.containers if isinstance(bar, ErrorbarContainer)]
        assert len(drawn) == 6
        for bar, (split, score) in zip(drawn, [(s, c) for s in ("step", "held_out") for c in scores], strict=True):
            rows = table[(table.outcome == outcome) & (table.split == split) & (table.score == score)].sort_values("group")
            x, y = bar.lines[0].get_data()
            assert np.all(np.diff(x) > 0) and round(float(np.mean(x))) == scores.index(score)
            np.testing.assert_allclose(y, rows["mean"])
            np.testing.assert_allclose([segment[:, 1] for segment in bar.lines[2][0].get_segments()], rows[["low", "high"]])
    assert "61 positions" in figure.get_supxlabel()


def test_calibration_marks_the_chosen_step_and_the_one_after_which_the_loss_rose():
    table = study_tables.calibration().iloc[::-1]
    figure = figures.calibration(table)
    drop, share = figure.axes
    lines = {line.get_label(): line for line in drop.lines}
    ordered = table.sort_values("step_size")
    np.testing.assert_allclose(lines["predicted (first order)"].get_ydata(), ordered.predicted_drop)
    np.testing.assert_allclose(lines["realised"].get_ydata(), [*ordered.realised_drop[:3], np.nan])
    assert lines["loss rose"].get_xdata().tolist() == [6.4e-5]
    assert lines["chosen"].get_xdata().tolist() == [1.6e-5]
    np.testing.assert_allclose(share.lines[0].get_ydata(), ordered.ratio)
    assert figure.get_supxlabel().replace("\n", " ") == (
        "Ringed: the chosen step, size 1.6e-05, relative update norm 4.8e-05, realises 82% of its first-order prediction. "
        "Dashed on the ratio: least accepted, 0.8."
    )


def test_calibration_of_a_single_step():
    figure = figures.calibration(study_tables.calibration().iloc[[2]])
    assert rendered(figure)
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.82]


def test_missing_column():
    with pytest.raises(DiagnosticsError) as error:
        figures.calibration(pd.DataFrame({"step_size": [1.0], "ratio": [1.0], "chosen": [True]}))
    assert str(error.value) == (
        "figures.calibration needs the columns predicted_drop, realised_drop; this one has step_size, ratio, chosen. "
        "Write the missing ones, or run the stage that does."
    )


def test_nothing_to_show():
    with pytest.raises(DiagnosticsError) as error:
        figures.correlations(study_tables.correlations(), method="kendall")
    assert str(error.value) == (
        "figures.correlations found no row with method in 'kendall'; the table has 'spearman', 'pearson'. Pass a table that holds it."
    )
    with pytest.raises(DiagnosticsError) as error:
        figures.q3_gain(study_tables.q3_groups().iloc[:0])
    assert str(error.value) == (
        "figures.q3_gain found no row with outcome in 'gain', 'relative_gain'; the table has no rows. Pass a table that holds it."
    )
