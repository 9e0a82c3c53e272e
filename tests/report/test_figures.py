"""Figures show what the tables hold: read back from the artists, never from pixels."""

import functools
import inspect
import io
import itertools

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from diagnostics.core.errors import DiagnosticsError
from diagnostics.criteria import quadrants
from diagnostics.report import figures, naming, style
from diagnostics.report.figures import ranking, registry
from diagnostics.report.figures.strata import SHARES
from tests import study_tables
from tests.report import made_paper, made_tables

WIDTHS = (figures.SINGLE, figures.DOUBLE)
EVERY = {
    "decision": (figures.decision, made_tables.decision),
    "horizon": (figures.horizon, made_tables.horizon),
    "horizon_criteria": (figures.horizon_criteria, made_tables.intervention),
    "strata": (figures.strata, made_tables.strata),
    "foresight": (figures.foresight, made_tables.foresight_signs),
    "correlations": (figures.correlations, made_tables.correlations),
    "entropy_divergence": (figures.entropy_divergence, study_tables.tokens),
    "probabilities": (figures.probabilities, made_tables.with_probabilities),
    "q3_gain": (figures.q3_gain, study_tables.q3_groups),
    "calibration": (figures.calibration, study_tables.calibration),
    "quadrants": (figures.quadrants, study_tables.quadrants),
    "q3_contrast": (
        functools.partial(figures.q3_contrast, matching=study_tables.matching()),
        study_tables.q3_contrast,
    ),
    "selection_curves": (figures.selection_curves, study_tables.selection_curves),
    "selection_summary": (figures.selection_summary, study_tables.selection_summary),
    "selection_overlap": (figures.selection_overlap, study_tables.selection_overlap),
    "selection_profile": (figures.selection_profile, study_tables.selection_profile),
    "intervention": (figures.intervention, study_tables.intervention),
    "distributions": (figures.distributions, study_tables.tokens),
    "coefficients": (figures.coefficients, study_tables.regressions),
    "support_robustness": (figures.support_robustness, study_tables.support_robustness),
    "gain_robustness": (figures.gain_robustness, study_tables.gain_robustness),
    "residual_curves": (figures.residual_curves, study_tables.residual_curves),
    "linearity": (figures.linearity, study_tables.linearity),
    "kernel_shares": (figures.kernel_shares, study_tables.kernel_shares),
    "lift": (figures.lift, study_tables.lift),
    "agreement": (figures.agreement, study_tables.agreement),
    "validation": (figures.validation, study_tables.validation_outcomes),
    "validation_scatter": (
        functools.partial(figures.validation_scatter, foreseen=study_tables.validation_foreseen()),
        study_tables.validation_outcomes,
    ),
    "evaluations": (figures.evaluations, study_tables.evaluations),
    "training_curves": (figures.training_curves, study_tables.training_metrics),
    "training_positions": (figures.training_positions, study_tables.training_positions),
    "position_gain": (figures.position_gain, study_tables.positions),
    "runs": (figures.runs, study_tables.of_runs),
    **made_paper.figures_with_tables(),
}


@functools.cache
def drawn(name: str, width: float, dark: bool = False) -> Figure:
    draw, table = EVERY[name]
    figure = draw(table(), width=width, dark=dark)
    figure.draw_without_rendering()
    return figure


def errorbars(ax) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each labelled errorbar: positions, values, and [N, 2] interval ends, whichever way it
    lies.
    """
    found = {}
    for bar in (
        container for container in ax.containers if isinstance(container, ErrorbarContainer)
    ):
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


def texts(figure: Figure) -> list:
    """All text that is drawn: ticks outside the view have labels too, but are not."""
    every_axes = figure.findobj(matplotlib.axes.Axes)
    axes = [axis for ax in every_axes for axis in (ax.xaxis, ax.yaxis)]
    ticks = {
        text
        for axis in axes
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for text in (tick.label1, tick.label2)
    }
    drawn = {
        text
        for axis in axes
        for tick in axis._update_ticks()
        for text in (tick.label1, tick.label2)
    }
    every = figure.findobj(
        lambda artist: (
            isinstance(artist, matplotlib.text.Text)
            and artist.get_visible()
            and artist.get_text().strip()
        )
    )
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
        assert (
            page.x0 - 1 <= box.x0
            and box.x1 <= page.x1 + 1
            and page.y0 - 1 <= box.y0
            and box.y1 <= page.y1 + 1
        ), text.get_text()
        boxes.append((text.get_text(), box.shrunk(0.98, 0.8)))
    clashes = [
        (a, b)
        for i, (a, box) in enumerate(boxes)
        for b, other in boxes[i + 1 :]
        if box.overlaps(other)
    ]
    assert clashes == []


@pytest.mark.parametrize("name", ["correlations", "entropy_divergence"])
def test_one_table_gives_the_same_bytes_twice_and_a_dark_page_others(name):
    draw, table = EVERY[name]
    light, again, dark = (
        rendered(figure)
        for figure in (
            drawn(name, figures.SINGLE),
            draw(table(), width=figures.SINGLE),
            drawn(name, figures.SINGLE, True),
        )
    )
    assert light == again
    assert light != dark


@pytest.mark.parametrize("name", ["correlations", "calibration", "selection_overlap"])
def test_page_colors(name):
    for dark, page in ((False, style.LIGHT), (True, style.DARK)):
        figure = drawn(name, figures.SINGLE, dark)
        assert matplotlib.colors.to_hex(figure.get_facecolor()).upper() == page["paper"]
        label = (
            figure.axes[0].get_xticklabels()[0]
            if name == "selection_overlap"
            else figure.axes[0].yaxis.label
            if name == "calibration"
            else figure.axes[0].xaxis.label
        )
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


def test_correlations_shows_the_gain_its_null_and_the_context_gain_of_held_out_positions():
    table = made_tables.correlations()
    figure = figures.correlations(table)
    (ax,) = figure.axes
    rows = table[(table.split == "held_out") & (table.method == "spearman")]
    order = rows[rows.outcome == "context_gain"].sort_values("estimate", ascending=False)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [naming.readable(name) for name in order.criterion]
    bars = errorbars(ax)
    assert list(bars) == [words for *_, words in ranking.NULLED.values()]
    heights = []
    for outcome, (*_, words) in ranking.NULLED.items():
        shown = rows[rows.outcome == outcome].set_index("criterion").loc[order.criterion]
        place, values, ends = bars[words]
        assert np.round(place).astype(int).tolist() == list(range(len(labels)))
        np.testing.assert_allclose(values, shown.estimate)
        np.testing.assert_allclose(ends, shown[["low", "high"]])
        heights.append(place[0])
    assert len(set(heights)) == 3
    faces = {
        bar.get_label(): bar.lines[0].get_markerfacecolor()
        for bar in ax.containers
        if isinstance(bar, ErrorbarContainer)
    }
    hollow = [label for label, face in faces.items() if face == style.LIGHT["paper"]]
    assert hollow == ["gain, a permuted teacher (the null)"]
    assert ax.get_xlabel() == "Spearman ρ, held-out positions"
    assert figure.get_supxlabel().endswith("Bars: intervals over prompts and 4 step batches.")
    step = figures.correlations(table, split="step")
    assert step.axes[0].get_xlabel() == "Spearman ρ, positions that carried the loss"


def test_correlations_without_a_permuted_teacher_have_a_panel_per_outcome():
    table = study_tables.correlations()
    table = table[table.outcome != "context_gain"]
    figure = figures.correlations(table)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    names = sorted(study_tables.CRITERIA, key=lambda name: labels.index(naming.readable(name)))
    for ax, outcome in zip(figure.axes[:2], ("gain", "relative_gain"), strict=True):
        assert ax.get_title(loc="left") == outcome.replace("_", " ")
        bars = errorbars(ax)
        for split, label in (("step", "step contexts"), ("held_out", "held-out contexts")):
            rows = (
                table[
                    (table.outcome == outcome)
                    & (table.split == split)
                    & (table.method == "spearman")
                ]
                .set_index("criterion")
                .loc[names]
            )
            np.testing.assert_allclose(bars[label][1], rows.estimate)
            np.testing.assert_allclose(bars[label][2], rows[["low", "high"]])
    asked = figures.correlations(made_tables.correlations(), outcomes=["context_gain"])
    assert [ax.get_title(loc="left") for ax in asked.axes] == ["context gain"]


def test_correlations_takes_a_method_and_criteria_and_names_the_sample():
    table = study_tables.correlations()
    figure = figures.correlations(table, method="pearson", criteria=["tip", "entropy"], level=0.9)
    rows = table[
        (table.outcome == "gain")
        & (table.split == "step")
        & (table.method == "pearson")
        & table.criterion.isin(["tip", "entropy"])
    ]
    assert sorted(errorbars(figure.axes[0])["step contexts"][1]) == sorted(rows.estimate)
    assert figure.axes[0].get_xlabel() == "Pearson r"
    caption = figure.get_supxlabel().replace("\n", " ")
    assert (
        caption
        == "Step contexts: 16 prompts, 701–734 positions; held-out contexts: 16 prompts, 701–734"
        " positions. Bars: 90% intervals over prompts."
    )


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
    assert [ax.get_title(loc="left") for ax in (compatibility, gain)] == [
        "mean compatibility",
        "mean gain",
    ]
    counts = pd.Series(quadrants(table)).value_counts()
    for ax, name in ((compatibility, "compatibility"), (gain, "gain")):
        means = np.asarray(ax.collections[0].get_array())
        assert table[name].min() - 1e-12 <= means.min() < means.max() <= table[name].max() + 1e-12
        assert ax.lines[0].get_xdata()[0] == table.student_entropy.median()
        assert ax.lines[1].get_ydata()[0] == table.forward_kl.median()
        assert {text.get_gid(): text.get_text() for text in ax.texts} == {
            f"Q{q}": f"Q{q}: {counts[q]:,} ({counts[q] / len(table):.0%})" for q in (1, 2, 3, 4)
        }
    assert figure.get_supxlabel().startswith(f"8 prompts, {len(table)} positions.")


def test_plane_of_one_hexagon_is_the_mean():
    table = study_tables.tokens().assign(student_entropy=0.5, forward_kl=0.25)
    table.loc[::2, "gain"] = np.nan
    figure = figures.entropy_divergence(table, color=["gain"])
    assert np.asarray(figure.axes[0].collections[0].get_array()).tolist() == pytest.approx(
        [table.gain.mean()]
    )


def test_plane_with_losses_has_a_scale_around_zero():
    table = study_tables.tokens()
    figure = figures.entropy_divergence(table.assign(gain=table.gain - table.gain.mean()))
    low, high = figure.axes[1].collections[0].get_clim()
    assert low == -high < 0


def test_q3_gain_shows_groups_from_bottom_to_top():
    table = study_tables.q3_groups().sample(frac=1, random_state=1)
    figure = figures.q3_gain(table, level=0.95)
    for ax, outcome in zip(figure.axes, ("gain", "relative_gain"), strict=True):
        ticks = ax.get_xticklabels() or figure.axes[-1].get_xticklabels()
        scores = [label.get_text().removesuffix("\nlow → high") for label in ticks]
        drawn = [bar for bar in ax.containers if isinstance(bar, ErrorbarContainer)]
        assert len(drawn) == 6
        for bar, (split, score) in zip(
            drawn, [(s, c) for s in ("step", "held_out") for c in scores], strict=True
        ):
            rows = table[
                (table.outcome == outcome) & (table.split == split) & (table.score == score)
            ].sort_values("group")
            x, y = bar.lines[0].get_data()
            assert np.all(np.diff(x) > 0) and round(float(np.mean(x))) == scores.index(score)
            np.testing.assert_allclose(y, rows["mean"])
            np.testing.assert_allclose(
                [segment[:, 1] for segment in bar.lines[2][0].get_segments()], rows[["low", "high"]]
            )
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
    assert (
        figure.get_supxlabel().replace("\n", " ")
        == "Ringed: the chosen step, size 1.6e-05, relative update norm 4.8e-05, realises 82% of"
        " its first-order prediction. Dashed on the ratio: least accepted, 0.8."
    )


def _bent_fold() -> pd.DataFrame:
    """Fold 0 keeps 95% at the third size, where both folds together keep 75%."""
    sizes, wide = [1e-5, 2e-5, 4e-5], [(1.0, 1.0), (1.2, 0.5), (0.95, 0.15)]
    rows = []
    for fold, predicted in enumerate((3e3, 1e3)):
        for size, ratios in zip(sizes, wide, strict=True):
            drop, ratio = predicted * size, ratios[fold]
            rows.append((fold, size, 3 * size, drop, drop * ratio, ratio, size == 2e-5))
    names = "fold step_size relative_norm predicted_drop realised_drop ratio chosen".split()
    return pd.DataFrame(rows, columns=names)


@pytest.mark.parametrize("width", [3.5, 7.1])
def test_calibration_draws_what_the_size_was_chosen_by(width):
    table = _bent_fold()
    figure = figures.calibration(table.sample(frac=1, random_state=0), width=width)
    drop, share = figure.axes
    np.testing.assert_allclose(share.lines[0].get_ydata(), [1.0, 1.025, 0.75])
    lines = {line.get_label(): line for line in (*drop.lines, *share.lines)}
    np.testing.assert_allclose(lines["predicted (first order)"].get_ydata(), [0.02, 0.04, 0.08])
    np.testing.assert_allclose(lines["realised"].get_ydata(), [0.02, 0.041, 0.06])
    np.testing.assert_allclose(lines["_chosen"].get_ydata(), [1.025])
    diamonds = lines["_folds"]
    assert sorted(zip(*diamonds.get_data(), strict=True)) == sorted(
        zip(table.step_size, table.ratio, strict=True)
    )
    caption = figure.get_supxlabel().replace("\n", " ")
    assert "realises 102% of its first-order prediction, pooled over 2 folds." in caption
    assert caption.endswith("Diamonds: the single folds, 50% to 120% at the ringed size.")


def test_calibration_pools_no_size_that_a_fold_has_not_tried():
    table = _bent_fold()
    share = figures.calibration(table.drop(index=table.index[-1])).axes[1]
    assert share.lines[0].get_xdata().tolist() == [1e-5, 2e-5]
    diamonds = next(line for line in share.lines if line.get_label() == "_folds")
    assert sorted(diamonds.get_xdata()) == [1e-5, 1e-5, 2e-5, 2e-5, 4e-5]


def test_calibration_of_a_single_step():
    figure = figures.calibration(study_tables.calibration().iloc[[2]])
    assert rendered(figure)
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.82]


def test_quadrants_shows_estimates_and_shares():
    table = study_tables.quadrants()
    figure = figures.quadrants(table)
    for ax, outcome in zip(figure.axes, study_tables.BOTH, strict=True):
        for split, label in (("step", "step contexts"), ("held_out", "held-out contexts")):
            rows = table[
                (table.outcome == outcome) & (table.split == split) & (table.statistic == "mean")
            ].sort_values("quadrant")
            _place, values, ends = errorbars(ax)[label]
            np.testing.assert_allclose(values, rows.estimate)
            np.testing.assert_allclose(ends, rows[["low", "high"]])
    held = (
        table[(table.split == "held_out")].drop_duplicates("quadrant").set_index("quadrant").share
    )
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        f"{name}\n{held[name]:.0%}" for name in ("Q1", "Q2", "Q3", "Q4", "all")
    ]


def test_q3_contrast_shows_raw_and_matched():
    table, matching = study_tables.q3_contrast(), study_tables.matching()
    figure = figures.q3_contrast(table, matching)
    scores = ["compatibility", "teachability", "incompatible"]
    bars = errorbars(figure.axes[0])
    for rows, label in (
        (table[table.groups == "tertile"], "held-out contexts"),
        (matching[matching.caliper == 0.5], "held-out contexts, matched"),
    ):
        rows = (
            rows[(rows.outcome == "gain") & (rows.split == "held_out")]
            .set_index("score")
            .loc[scores]
        )
        np.testing.assert_allclose(bars[label][1], rows.difference)
        np.testing.assert_allclose(bars[label][2], rows[["low", "high"]])
    caption = figure.get_supxlabel().replace("\n", " ")
    assert (
        "Hollow: matched within a prompt on entropy, divergence and place, pairs within 0.5"
        " standard deviations; 31% of the top group have a partner." in caption
    )
    assert "matched" not in figures.q3_contrast(table).get_supxlabel()
    earlier = matching.assign(replacement=matching.caliper == 0.5)
    earlier = figures.q3_contrast(table, earlier.drop(columns=["caliper", "matched"]))
    assert "on entropy, divergence and place." in earlier.get_supxlabel().replace("\n", " ")
    same = errorbars(earlier.axes[0])["held-out contexts, matched"][1]
    np.testing.assert_allclose(same, bars["held-out contexts, matched"][1])


def bands(ax) -> list[np.ndarray]:
    """[N, 3] x, low, high of every band, in drawing order."""
    found = []
    for band in (
        collection
        for collection in ax.collections
        if type(collection).__name__ == "FillBetweenPolyCollection"
    ):
        points = (
            pd.DataFrame(band.get_paths()[0].vertices, columns=["x", "y"])
            .groupby("x")
            .y.agg(["min", "max"])
            .reset_index()
        )
        found.append(points.to_numpy())
    return found


def test_selection_curves_show_shares_bands_and_oracle():
    table = study_tables.selection_curves()
    figure = figures.selection_curves(table)
    for ax, outcome in zip(figure.axes, study_tables.BOTH, strict=True):
        rows = table[(table.outcome == outcome) & (table.split == "held_out")]
        lines = {line.get_label(): line for line in ax.lines}
        assert set(lines) >= {"divergence", "teachability", "oracle"} and "random" not in lines
        for name in ("divergence", "teachability"):
            np.testing.assert_allclose(
                lines[name].get_ydata(), rows[rows.criterion == name].captured_share
            )
        np.testing.assert_allclose(
            lines["oracle"].get_ydata(), rows[rows.criterion == "random"].oracle
        )
        random, divergence = bands(ax)[:2]
        np.testing.assert_allclose(
            random[:, 1:], rows[rows.criterion == "random"][["random_low", "random_high"]]
        )
        np.testing.assert_allclose(
            divergence[:, 1:], rows[rows.criterion == "divergence"][["low", "high"]]
        )


def test_lines_keep_to_nine_criteria_own_ones_and_the_best_among_them_unless_asked():
    others = ["early", "jsd", "fire", "mine", "late"]
    table = study_tables.selection_curves(names=[*style.CRITERIA, *others])
    figure = figures.selection_curves(table)
    shown = {line.get_label() for line in figure.axes[0].lines}
    assert {naming.readable(name) for name in style.CRITERIA} | {"mine", "late"} <= shown
    assert "early" not in shown and "jsd" not in shown
    assert "2 further criteria are in the table alone." in figure.caption
    few = figures.selection_curves(table, criteria=["late"])
    labels = [line.get_label() for line in few.axes[0].lines]
    assert "late" in labels and "teachability" not in labels and "further" not in few.caption
    with pytest.raises(DiagnosticsError, match=r"no criterion 'lat'\. Did you mean 'late'\?"):
        figures.selection_curves(table, criteria=["lat"])


def test_selection_summary_shows_area_or_enrichment():
    table = study_tables.selection_summary()
    for budget, statistic, baseline in ((None, "area", 0.0), (0.05, "enrichment", 1.0)):
        figure = figures.selection_summary(table, budget=budget)
        rows = table[
            (table.outcome == "gain") & (table.split == "held_out") & (table.statistic == statistic)
        ]
        rows = rows if budget is None else rows[rows.budget == budget]
        np.testing.assert_allclose(
            errorbars(figure.axes[0])["held-out contexts"][1], sorted(rows.estimate, reverse=True)
        )
        assert baseline in [
            line.get_xdata()[0]
            for line in figure.axes[0].lines
            if line.get_label().startswith("_child")
        ]


def test_selection_curves_show_the_mean_minus_randoms_and_no_share_that_is_undefined():
    table = study_tables.selection_curves().assign(minus_random=lambda rows: rows.budget / 100)
    table = table.assign(minus_random_low=-0.001, minus_random_high=table.budget / 50)
    drawn = figures.selection_curves(table).axes
    assert [ax.get_ylabel() for ax in drawn] == [
        "share of total gain",
        "share of total relative gain",
        "mean gain (nats)\nminus random’s",
        "mean relative gain (of D)\nminus random’s",
    ]
    rows = table[(table.criterion == "teachability") & (table.split == "held_out")]
    rows = rows[rows.outcome == "gain"]
    line = next(each for each in drawn[2].lines if each.get_label() == "_teachability")
    np.testing.assert_allclose(line.get_ydata(), rows.minus_random)
    np.testing.assert_allclose(bands(drawn[2])[1][:, 2], rows.minus_random_high)
    unknown = table.outcome == "relative_gain"
    table.loc[unknown, "captured_share"] = np.nan
    assert len(figures.selection_curves(table).axes[:3]) == 3
    shown = [ax.get_ylabel() for ax in figures.selection_curves(table).axes if ax.get_visible()]
    assert shown == [drawn[place].get_ylabel() for place in (0, 2, 3)]


@pytest.mark.parametrize("width", [3.5, 7.1])
def test_labels_of_many_budgets_keep_apart(width):
    budgets = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    few = study_tables.selection_curves()
    table = pd.concat([few[few.budget == 1].assign(budget=budget) for budget in budgets])
    both = table.assign(minus_random=0.1, minus_random_low=0, minus_random_high=0.2)
    figure = figures.selection_curves(both[both.outcome == "gain"], width=width)
    rendered(figure)
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes:
        boxes = [label.get_window_extent(renderer) for label in ax.get_xticklabels()]
        assert len(boxes) > 3
        assert all(a.x1 + 2 < b.x0 for a, b in itertools.pairwise(boxes))
        assert ax.get_xticks()[-1] == 1.0


def test_a_panel_of_shares_cuts_no_curve_and_says_where_it_cuts_a_band():
    table = study_tables.selection_curves().assign(oracle=1.5)
    table.loc[table.criterion == "teachability", "high"] = 3.1
    figure = figures.selection_curves(table)
    assert 3.1 < figure.axes[0].get_ylim()[1] < 3.3 and "cut off" not in figure.get_supxlabel()
    table.loc[table.criterion == "teachability", "high"] = 31.0
    figure = figures.selection_curves(table)
    assert 1.5 < figure.axes[0].get_ylim()[1] < 1.6
    assert "Bands that leave a panel are cut off." in figure.get_supxlabel().replace("\n", " ")


def test_panels_of_one_unit_share_a_scale_unless_it_would_press_one_together():
    table = study_tables.quadrants()
    table["outcome"] = table.outcome.replace({"relative_gain": "context_gain"})
    same = figures.quadrants(table).axes
    assert same[0].get_ylim() == same[1].get_ylim()
    small = table.assign(**{name: table[name] / 50 for name in ("estimate", "low", "high")})
    apart = pd.concat(
        [table[table.outcome == "gain"], small[small.outcome != "gain"]], ignore_index=True
    )
    figure = figures.quadrants(apart)
    assert figure.axes[0].get_ylim() != figure.axes[1].get_ylim()
    assert "The panels have scales of their own." in figure.caption


def test_rows_with_long_names_stand_below_one_another_on_a_phone():
    table = study_tables.gain_robustness()
    wide, narrow = figures.gain_robustness(table), figures.gain_robustness(table, width=3.3)
    tops = [[round(ax.get_position().y1, 3) for ax in figure.axes] for figure in (wide, narrow)]
    assert len(set(tops[0])) == 1 and len(set(tops[1])) == 2


def test_numbers_on_cells_do_not_take_a_color_of_the_page():
    figure = figures.selection_overlap(study_tables.selection_overlap())
    inks = {text.get_color() for text in figure.axes[0].texts}
    assert inks <= {"#000000", "#FDFDFD"}


def test_selection_overlap_shows_each_pair_once():
    table = study_tables.selection_overlap()
    figure = figures.selection_overlap(table)
    shown = np.asarray(figure.axes[0].images[0].get_array())
    rows = table[(table.statistic == "jaccard") & (table.budget == 0.05)]
    first, second, third = rows.estimate
    nan = np.nan
    expected = [[first, nan], [second, third]]
    np.testing.assert_allclose(np.ma.filled(shown, nan), expected)
    words = [f"{value:.2f}"[1:] for value in (first, second, third)]
    assert [text.get_text() for text in figure.axes[0].texts] == words
    assert figure.axes[0].images[0].get_clim() == (0, max(first, second, third))


def test_selection_profile_stacks_shares():
    table = study_tables.selection_profile()
    figure = figures.selection_profile(table)
    widths = {
        container.get_label(): [bar.get_width() for bar in container]
        for container in figure.axes[0].containers
    }
    for measure in ("q1", "q2", "q3", "q4"):
        rows = table[(table.measure == measure) & (table.budget == 0.05)]
        assert widths[measure.upper()] == pytest.approx([*rows.estimate, rows.full.iloc[0]])


def test_intervention_over_a_horizon_shows_the_matched_step_and_rings_ties():
    table = made_tables.intervention()
    figure = figures.intervention(table, measure="reverse_kl")
    rows = table[(table.group == "held_out") & (table.measure == "reverse_kl")]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for horizon, drawn in ((0, lines), (20, None)):
        if drawn is None:
            later = figures.intervention(table, measure="reverse_kl", horizon=20)
            drawn = {line.get_label(): line for line in later.axes[0].lines}
        shown = rows[(rows.horizon == horizon) & (rows.criterion == "teachability")]
        np.testing.assert_allclose(drawn["teachability"].get_ydata(), shown.reduction)
    tied = rows[(rows.horizon == 0) & (rows.ambiguous > 0.1)]
    np.testing.assert_allclose(lines["_ambiguous"].get_xydata(), tied[["budget", "reduction"]])
    caption = figure.get_supxlabel().replace("\n", " ")
    assert caption.startswith("One matched step.") and "ties decide over 10%" in caption
    assert "ties" not in figures.intervention(study_tables.intervention()).get_supxlabel()


def test_intervention_shows_reductions_with_full_and_placebo_as_levels():
    table = study_tables.intervention()
    figure = figures.intervention(table)
    for ax, group in zip(figure.axes, ("held_out", "step"), strict=True):
        rows = table[(table.group == group) & (table.measure == "forward_kl")]
        lines = {line.get_label(): line for line in ax.lines}
        for name in ("teachability", "random"):
            np.testing.assert_allclose(
                lines[name].get_ydata(), rows[rows.criterion == name].reduction
            )
        for name in ("full", "placebo"):
            assert set(lines[name].get_ydata()) == set(rows[rows.criterion == name].reduction)
        np.testing.assert_allclose(
            bands(ax)[0][:, 1:], rows[rows.criterion == "random"][["low", "high"]]
        )


def test_distributions_count_every_finite_value():
    table = study_tables.tokens()
    figure = figures.distributions(table, columns=["forward_kl", "relative_gain"])
    for ax, name in zip(figure.axes, ("forward_kl", "relative_gain"), strict=True):
        corners = np.diff(
            ax.patches[0].get_xy()[:81], axis=0
        )  # a step outline of 40 bins: across, up or down, across ...
        heights = ax.patches[0].get_xy()[1:81:2, 1]
        assert (
            len(corners) == 80
            and round(heights[heights >= 1].sum()) == np.isfinite(table[name]).sum()
        )
    assert [ax.get_xlabel() for ax in figure.axes[:2]] == [
        "forward KL (nats)",
        "relative gain (fraction)",
    ]


def test_coefficients_show_one_model():
    table = study_tables.regressions()
    figure = figures.coefficients(table, winsorized=0.05)
    rows = table[
        (table.outcome == "relative_gain")
        & (table.split == "step")
        & (table.winsorised == 0.05)
        & (table.model == "decomposition")
    ]
    _place, values, ends = errorbars(figure.axes[1])["step contexts"]
    np.testing.assert_allclose(values, rows.coefficient)
    np.testing.assert_allclose(ends, rows[["low", "high"]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "student entropy",
        "teachability",
        "incompatible",
    ]
    assert "winsorised at 5%" in figure.get_supxlabel().replace("\n", " ")


def test_robustness_shows_every_support_and_variant():
    table = study_tables.support_robustness()
    figure = figures.support_robustness(table, statistic="tertile_difference")
    bars = errorbars(figure.axes[0])
    for k in (4, 16):
        rows = table[
            (table.outcome == "gain")
            & (table.split == "all")
            & (table.k == k)
            & (table.statistic == "tertile_difference")
        ]
        np.testing.assert_allclose(bars[f"K = {k}"][1], rows.estimate)
        np.testing.assert_allclose(bars[f"K = {k}"][2], rows[["low", "high"]])
    table = study_tables.gain_robustness()
    rows = table[
        (table.outcome == "gain")
        & (table.split == "held_out")
        & (table.statistic == "decomposition")
    ]
    np.testing.assert_allclose(
        errorbars(figures.gain_robustness(table).axes[0])["held-out contexts"][1], rows.estimate
    )


def test_robustness_shows_the_interaction_where_the_table_has_it():
    table = study_tables.support_robustness()
    later = table.replace({"statistic": {"decomposition": "interaction"}})
    for draw, made in (
        (figures.support_robustness, later),
        (figures.gain_robustness, study_tables.gain_robustness().assign(statistic="interaction")),
    ):
        assert draw(made).axes[0].get_xlabel() == "coefficient of d̂ĉ (nats)"
    assert figures.support_robustness(table).axes[0].get_xlabel() == "β(d̂ĉ) − β(d̂(1−ĉ))"


def test_residual_curves_show_deciles_and_spline():
    table = study_tables.residual_curves()
    figure = figures.residual_curves(table)
    rows = table[
        (table.outcome == "relative_gain")
        & (table.split == "held_out")
        & (table.score == "teachability")
    ]
    ax = figure.axes[3]
    decile, spline = rows[rows.curve == "decile"], rows[rows.curve == "spline"]
    place, _values, ends = errorbars(ax)["decile"]
    np.testing.assert_allclose(place.astype(float), decile["at"])
    np.testing.assert_allclose(ends, decile[["low", "high"]])
    np.testing.assert_allclose(
        next(line for line in ax.lines if line.get_label() == "spline").get_ydata(), spline.residual
    )
    np.testing.assert_allclose(bands(ax)[0][:, 1:], spline[["low", "high"]])


def test_residual_curves_stand_over_ranks_where_the_table_has_them():
    table = study_tables.residual_curves().assign(rank=lambda rows: rows["at"] ** 2)
    ax = figures.residual_curves(table).axes[3]
    rows = table[(table.outcome == "relative_gain") & (table.split == "held_out")]
    rows = rows[(rows.score == "teachability") & (rows.curve == "decile")]
    np.testing.assert_allclose(errorbars(ax)["decile"][0].astype(float), rows["rank"])
    assert ax.get_xlabel() == "teachability (rank)"
    tall = [ax.get_ylim() for ax in figures.residual_curves(table).axes]
    assert tall[0] == tall[1] and tall[2] == tall[3]


def test_attribution_figures_show_their_tables():
    table = study_tables.linearity()
    rows = table[table.split == "held_out"]
    _place, values, ends = errorbars(figures.linearity(table).axes[1])["held-out contexts"]
    np.testing.assert_allclose(values, rows.r2)
    np.testing.assert_allclose(ends, rows[["r2_low", "r2_high"]])
    table = study_tables.kernel_shares()
    rows = table[(table.kernel == "full") & (table.part == "self")]
    _place, values, ends = errorbars(figures.kernel_shares(table).axes[0])["itself"]
    np.testing.assert_allclose(values, rows.share)
    np.testing.assert_allclose(ends, rows[["share_low", "share_high"]])
    table = study_tables.lift()
    np.testing.assert_allclose(
        errorbars(figures.lift(table).axes[0])["enrichment"][1], table.enrichment
    )


def test_agreement_finds_the_answer_on_either_side():
    figure = figures.agreement(study_tables.agreement())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "captured gain",
        "captured relative gain",
        "step forward KL",
    ]
    np.testing.assert_allclose(errorbars(figure.axes[0])["agreement"][1], [0.55, 0.35, 0.15])
    assert (
        figure.get_supxlabel()
        == "35 cells, compared at equal budgets; 16 prompts. Bars: intervals over prompts."
    )
    everywhere = figures.agreement(study_tables.agreement(), scope="all")
    np.testing.assert_allclose(errorbars(everywhere.axes[0])["agreement"][1], [0.6, 0.4, 0.2])
    assert everywhere.get_supxlabel() == "35 cells; 16 prompts. Bars: intervals over prompts."


def test_every_figure_is_drawn_and_named():
    assert set(EVERY) == set(figures.__all__) - {"DOUBLE", "SINGLE", "style", *OF_TWO_TABLES}


def test_validation_shows_gains_with_full_as_level():
    table = study_tables.validation_outcomes()
    figure = figures.validation(table)
    rows = table[(table.measure == "forward_kl") & (table.criterion == "teachability")]
    _place, values, ends = errorbars(figure.axes[0])["teachability"]
    np.testing.assert_allclose(values, rows.gain)
    np.testing.assert_allclose(ends, rows[["gain_low", "gain_high"]])
    full = next(line for line in figure.axes[0].lines if line.get_label() == "full")
    assert set(full.get_ydata()) == set(
        table[(table.measure == "forward_kl") & (table.criterion == "full")].gain
    )
    assert (
        figure.get_supxlabel()
        == "3 seeds, 24 held-out prompts. Bars: intervals over seeds and prompts."
    )


def test_validation_has_a_panel_for_the_text_that_all_students_share():
    table = study_tables.validation_outcomes()
    shared = table[table.measure == "forward_kl"].assign(measure="bank_forward_kl")
    shared = shared.assign(gain=shared.gain / 2)
    figure = figures.validation(pd.concat([table, shared], ignore_index=True))
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_visible()]
    place = labels.index("gain in forward KL, shared text (nats)")
    assert labels[0] == "gain in forward KL (nats)" and labels.count(labels[place]) == 1
    rows = shared[shared.criterion == "teachability"]
    np.testing.assert_allclose(errorbars(figure.axes[place])["teachability"][1], rows.gain)


def test_figures_of_one_budget_take_the_nearest_to_five_percent():
    budgets = pd.DataFrame({"budget": [0.001, 0.01, 0.04, 0.3]})
    assert (
        style.nearest_budget(budgets) == 0.04
        and style.nearest_budget(budgets[budgets.budget != 0.04]) == 0.01
    )
    table = study_tables.selection_overlap().assign(budget=0.3)
    assert "Budget 30%." in figures.selection_overlap(table)._supxlabel.get_text()


def test_validation_scatter_joins_cells():
    table, foreseen = study_tables.validation_outcomes(), study_tables.validation_foreseen()
    figure = figures.validation_scatter(table, foreseen)
    gains, values = (
        table.set_index(["measure", "criterion", "budget"]),
        foreseen.set_index(["answer", "criterion", "budget"]).value,
    )
    answers = ("captured_gain", "captured_relative_gain", "one_step_gain")
    assert [ax.get_xlabel() for ax in figure.axes[:3]] == [
        "captured gain",
        "captured relative gain",
        "gain of the training’s own first step (nats)",
    ]
    assert not figure.axes[3].get_visible()
    for ax, answer in zip(figure.axes, answers):
        marks = errorbars(ax)
        cells = {
            "random": ("random", 0.05),
            "_random 1": ("random", 0.3),
            "teachability": ("teachability", 0.05),
            "_teachability 1": ("teachability", 0.3),
        }
        if answer == "captured_relative_gain":
            cells = {
                "random": ("random", 0.3),
                "teachability": ("teachability", 0.05),
                "_teachability 1": ("teachability", 0.3),
            }
        assert set(marks) == set(cells)
        for label, cell in cells.items():
            x, y, ends = marks[label]
            trained = gains.loc[("forward_kl", *cell)]
            assert (x[0], y[0], *ends[0]) == pytest.approx(
                (values[(answer, *cell)], trained.gain, trained.gain_low, trained.gain_high)
            )


def test_training_curves_show_the_mean_and_range_of_seeds():
    table = study_tables.training_metrics()
    figure = figures.training_curves(table)
    ax = figure.axes[0]
    assert [line.get_label() for line in ax.lines] == ["full", "teachability 5%"] and figure.axes[
        1
    ].get_ylabel() == "forward KL, all (nats)"
    seeds = table[table.criterion == "teachability"].pivot(
        index="step", columns="seed", values="loss"
    )
    np.testing.assert_allclose(ax.lines[1].get_ydata(), seeds.mean(axis=1))
    band = ax.collections[1].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx(
        (seeds.to_numpy().min(), seeds.to_numpy().max())
    )
    alone = table[(table.criterion == "full") & (table.seed == 0)].drop(
        columns=["criterion", "budget", "seed"]
    )
    smooth = figures.training_curves(alone, window=3).axes[0].lines
    assert len(smooth) == 1 and smooth[0].get_ydata()[4] == pytest.approx(
        alone.loss.to_numpy()[3:6].mean()
    )


def test_training_curves_of_a_wide_grid_show_one_budget_and_full():
    one = study_tables.training_metrics()
    parts = [one[one.criterion == "full"]]
    parts += [
        one[one.criterion != "full"].assign(criterion=name, budget=budget)
        for name in ("tip", "entropy", "mine")
        for budget in (0.04, 0.3)
    ]
    figure = figures.training_curves(pd.concat(parts, ignore_index=True))
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "full",
        "TIP 4%",
        "entropy 4%",
        "mine 4%",
    ]
    assert "Budget 4% and full." in figure._supxlabel.get_text().replace("\n", " ")


def test_a_criterion_looks_alike_in_every_figure():
    names = ["mine", "teachability", "other"]
    assert style.criterion_style("teachability", names) == style.criterion_style(
        "teachability", ["tip", "teachability"]
    )
    styles = [
        style.criterion_style(name, [*style.CRITERIA, *names])
        for name in (*style.CRITERIA, "mine", "other", "random", "full")
    ]
    assert len({str(style) for style in styles}) == len(styles) and len(
        {style["marker"] for style in styles}
    ) == len(styles)


def test_fair_rivals_are_grey_as_random_is_and_take_no_color_of_a_criterion():
    names = [*style.RIVALS, "mine"]
    looks = [style.criterion_style(name, names) for name in ("random", *style.RIVALS)]
    assert len({look["color"] for look in looks}) == 1
    assert len({look["marker"] for look in looks}) == len(looks)
    assert style.criterion_style("mine", names) == style.criterion_style("mine", ["mine"])


def test_evaluations_show_means_and_intervals():
    table = study_tables.evaluations()
    _place, values, ends = errorbars(figures.evaluations(table).axes[0])["forward_kl"]
    rows = table[table.measure == "forward_kl"]
    np.testing.assert_allclose(values, rows["mean"])
    np.testing.assert_allclose(ends, rows[["low", "high"]])


def test_position_gain_shows_means_and_bands():
    table = study_tables.positions()
    ax = figures.position_gain(table).axes[1]
    rows = table[(table.outcome == "relative_gain") & (table.split == "held_out")]
    np.testing.assert_allclose(
        next(line for line in ax.lines if line.get_label() == "held-out contexts").get_ydata(),
        rows["mean"],
    )
    np.testing.assert_allclose(bands(ax)[1][:, 1:], rows[["low", "high"]])


def test_runs_stand_side_by_side():
    table = study_tables.of_runs()
    marks = errorbars(figures.runs(table).axes[0])
    for run in ("one", "two"):
        rows = table[(table.run == run) & (table.outcome == "gain")]
        np.testing.assert_allclose(marks[run][1], rows.estimate)
        np.testing.assert_allclose(marks[run][2], rows[["low", "high"]])


@pytest.mark.parametrize(
    "value, text",
    [(1e-5, "10⁻⁵"), (2e-6, "2×10⁻⁶"), (0.01, "0.01"), (100, "100"), (1e4, "10⁴"), (0, "0")],
)
def test_power(value, text):
    assert style.power(value) == text


def test_missing_column():
    with pytest.raises(DiagnosticsError) as error:
        figures.calibration(pd.DataFrame({"step_size": [1.0], "ratio": [1.0], "chosen": [True]}))
    assert (
        str(error.value)
        == "figures.calibration needs the columns predicted_drop, realised_drop; this one has"
        " step_size, ratio, chosen. Write the missing ones, or run the stage that does."
    )


def test_nothing_to_show():
    with pytest.raises(DiagnosticsError) as error:
        figures.correlations(study_tables.correlations(), method="kendall")
    assert (
        str(error.value)
        == "figures.correlations found no row with method in 'kendall'; the table has 'spearman',"
        " 'pearson'. Pass a table that holds it."
    )
    with pytest.raises(DiagnosticsError) as error:
        figures.q3_gain(study_tables.q3_groups().iloc[:0])
    assert (
        str(error.value)
        == "figures.q3_gain found no row with outcome in 'gain', 'relative_gain'; the table has no"
        " rows. Pass a table that holds it."
    )


def test_runs_are_named_as_their_folders_whatever_these_hold():
    """A dollar is no mathematics, and a leading underscore does not take a run out of the
    legend.
    """
    rows = [
        {
            "run": run,
            "outcome": "gain",
            "criterion": "divergence",
            "split": "all",
            "estimate": 0.1,
            "low": 0.0,
            "high": 0.2,
            "positions": 9,
            "prompts": 3,
        }
        for run in ("lr $$", "_first", "a $x$")
    ]
    figure = figures.runs(pd.DataFrame(rows))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "lr $$",
        " _first",
        "a $x$",
    ]


# --- horizon, decision, strata and foresight ---


def test_horizon_is_dashed_and_hollow_where_the_bank_is_overfitted():
    table = made_tables.horizon().sample(frac=1, random_state=0)
    figure = figures.horizon(table, measure="reverse_kl")
    (ax,) = figure.axes
    bars, lines = errorbars(ax), [line for line in ax.lines if line.get_label() == "_beyond"]
    for population, label in (("held_out", "held-out contexts"), ("step", "step contexts")):
        rows = table[(table.population == population) & (table.measure == "reverse_kl")]
        rows = rows.sort_values("horizon")
        kept, lost = rows[~rows.overfitted], rows[rows.overfitted]
        np.testing.assert_allclose(bars[label][1], kept.reduction)
        np.testing.assert_allclose(bars[label][2], kept[["low", "high"]])
        np.testing.assert_allclose(bars[f"_{label} overfitted"][1], lost.reduction)
        beyond = [line for line in lines if line.get_ydata()[0] == kept.reduction.iloc[-1]]
        np.testing.assert_allclose(beyond[0].get_ydata(), rows.reduction.iloc[-2:])
        assert beyond[0].get_linestyle() != "-"
    np.testing.assert_allclose(bars["_fresh responses overfitted"][1], [0.12])
    assert list(ax.get_xticks()) == [1, 5, 20, 100]
    assert "overfitted" in figure.get_supxlabel()
    fit = table[table.horizon < 100]
    assert "overfitted" not in figures.horizon(fit).get_supxlabel()


def test_fresh_text_far_from_the_frozen_gets_a_panel_of_its_own():
    table = made_tables.horizon()
    assert len(figures.horizon(table).axes) == 1
    wide = (table.population == "fresh").to_numpy()
    table = table.assign(
        low=table.low - np.where(wide, 4.0, 0.0), high=table.high + np.where(wide, 4.0, 0.0)
    )
    figure = figures.horizon(table)
    first, second = figure.axes
    assert max(np.abs(first.get_ylim())) < 1 and max(second.get_ylim()) > 4
    assert "own" in second.get_title(loc="left")
    assert not any("fresh" in name for name in errorbars(first))
    whole, own = plt.subplots()
    figures.horizon(table, ax=own)
    assert len(whole.axes) == 1
    plt.close(whole)


def test_one_budget_shows_its_intervals_as_bars():
    table = made_tables.intervention()
    one = table[(table.criterion == "full") | np.isclose(table.budget, 0.05)]
    figure = figures.intervention(one, measure="reverse_kl")
    rows = one[(one.group == "held_out") & (one.measure == "reverse_kl") & (one.horizon == 0)]
    row = rows[rows.criterion == "teachability"]
    np.testing.assert_allclose(errorbars(figure.axes[0])["teachability"][2], row[["low", "high"]])
    assert "Bars: " in figure.get_supxlabel().replace("\n", " ")


def test_an_overfitted_curve_stays_overfitted_whatever_the_flag_says_later():
    table = made_tables.horizon()
    table["overfitted"] = table.horizon == 5
    bars = errorbars(figures.horizon(table).axes[0])
    assert len(bars["held-out contexts"][1]) == 1
    assert len(bars["_held-out contexts overfitted"][1]) == 3


def test_horizon_of_criteria_has_a_panel_per_population_at_one_budget():
    table = made_tables.intervention()
    figure = figures.horizon_criteria(table, measure="reverse_kl")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["held-out positions", "positions that carried the loss"]
    for ax, group in zip(figure.axes, ("held_out", "step"), strict=True):
        bars = errorbars(ax)
        for name, budget in (("teachability", 0.05), ("full", 1.0), ("random", 0.05)):
            rows = table[
                (table.criterion == name)
                & (table.budget == budget)
                & (table.group == group)
                & (table.measure == "reverse_kl")
                & (table.horizon > 0)
            ]
            np.testing.assert_allclose(bars[name][1], rows.reduction)
            np.testing.assert_allclose(bars[name][2], rows[["low", "high"]])
        assert len(bars["_divergence overfitted"][1]) == 1 and len(bars["divergence"][1]) == 2
        rings = [line for line in ax.lines if line.get_label() == "_ambiguous"]
        assert [len(ring.get_xdata()) for ring in rings] == [3]
    assert figure.get_supxlabel().startswith("Budget 5%.")
    assert "Budget 30%" in figures.horizon_criteria(table, budget=0.3).get_supxlabel()
    with pytest.raises(DiagnosticsError, match="horizon"):
        figures.horizon_criteria(study_tables.intervention())


def cells_of(figure: Figure) -> dict[str, str]:
    return {text.get_gid(): text.get_text() for text in figure.axes[0].texts}


def test_decision_names_every_verdict_by_color_and_sign():
    table = made_tables.decision()
    figure = figures.decision(table, level=0.95)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "teachability",
        "random divergent",
        "TIP",
        "entropy",
        "divergence",
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1%", "5%", "30%"]
    cells = cells_of(figure)
    assert cells["teachability 0.05"] == "▲ +.0396 ±.0090"
    assert cells["tip 0.3"] == "= +.0014 ±.0090" and cells["tip 0.05"][0] == "?"
    assert cells["divergence 0.3"] == "▼ −.0434 ±.0090†"
    boxes = [patch for patch in ax.patches if patch.get_facecolor()[3] > 0 or patch.get_hatch()]
    tints = {
        matplotlib.colors.to_hex(patch.get_facecolor()).upper()
        for patch in ax.patches
        if patch.get_facecolor()[3] > 0
    }
    assert tints == {"#8CC4E8", "#F2A66B", "#C9CED4"} and boxes
    hatched = [patch for patch in ax.patches if patch.get_hatch()]
    assert [(round(p.get_x() + 0.48), round(p.get_y() + 0.46)) for p in hatched] == [(0, 2)]
    framed = [patch for patch in ax.patches if patch.get_linewidth() > 1]
    assert [(round(p.get_x() + 0.48), round(p.get_y() + 0.46)) for p in framed] == [(1, 0)]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "▲ better than random",
        "▼ worse than random",
        "= no difference shown",
        "? cannot tell",
        "ties decide",
    ]
    caption = figure.get_supxlabel().replace("\n", " ")
    assert caption.startswith("Drop of reverse KL over random, in nats per position, 20 steps.")
    assert "95% intervals over prompts and 4 step batches" in caption


def test_decision_takes_a_horizon_leaves_right_and_wrong_rollouts_apart_in_one_unit():
    table = made_tables.decision()
    right = table.assign(rollouts="right", over_random=9.0)
    both = pd.concat([right, table], ignore_index=True)
    assert cells_of(figures.decision(both)) == cells_of(figures.decision(table))
    other = table.assign(measure="forward_kl", primary=False, over_random=9.0)
    judged = pd.concat([other, table], ignore_index=True)
    assert cells_of(figures.decision(judged)) == cells_of(figures.decision(table))
    assert "forward KL" in figures.decision(judged, measure="forward_kl").get_supxlabel()
    small = figures.decision(table[table.horizon == 5], horizon=5)
    assert cells_of(small)["teachability 0.05"] == "▲ +.0099 ±.0090"
    assert "in nats per position, 5 steps." in small.get_supxlabel().replace("\n", " ")
    none = table.assign(over_random=np.nan, verdict="not judged", recommended=False)
    assert set(cells_of(figures.decision(none)).values()) == {"–"}
    rivals = table.assign(criterion="full")
    with pytest.raises(DiagnosticsError, match="without rows"):
        figures.decision(rivals)


def test_decisive_horizon_is_the_primary_one_then_the_longest_that_is_not_overfitted():
    table = made_tables.decision()
    assert naming.decisive_horizon(table) == 20
    assert naming.decisive_horizon(table.assign(primary=table.horizon == 5)) == 5
    later = table.drop(columns="primary").assign(overfitted=table.horizon == 20)
    assert naming.decisive_horizon(later) == 5
    assert naming.decisive_horizon(later.assign(overfitted=True)) == 5
    assert naming.decisive_horizon(later.drop(columns="overfitted")) == 20


def test_strata_show_gain_null_share_and_linearity_and_shade_what_is_not_linear():
    table = made_tables.strata().sample(frac=1, random_state=0)
    figure = figures.strata(table)
    rows = table[table.split == "held_out"].sort_values("stratum")
    gains, shares, ratios = figure.axes
    bars = errorbars(gains)
    for outcome, (*_, words) in ranking.NULLED.items():
        np.testing.assert_allclose(bars[words][1], rows[outcome])
        np.testing.assert_allclose(bars[words][2], rows[[f"{outcome}_low", f"{outcome}_high"]])
    np.testing.assert_allclose(errorbars(shares)["null"][1], rows.null_share)
    np.testing.assert_allclose(errorbars(ratios)["linearity"][1], rows.linearity)
    for ax in figure.axes:
        assert [patch.get_gid() for patch in ax.patches] == ["not linear 1", "not linear 2"]
    assert "end with its axis" not in figure.get_supxlabel()
    wide = figures.strata(table.assign(null_share_high=40.0, null_share_low=-40.0))
    assert wide.axes[1].get_ylim() == SHARES
    assert "Intervals of the share end with its axis." in wide.get_supxlabel().replace("\n", " ")
    assert "Hollow" not in wide.get_supxlabel()
    assert not [each for each in wide.axes[1].lines if each.get_gid() and len(each.get_xdata())]
    first, last = rows.stratum.min(), rows.stratum.max()
    shares = table.null_share.mask(table.stratum == first, -3.0).mask(table.stratum == last, 9.0)
    far = figures.strata(table.assign(null_share=shares))
    assert "Hollow triangles lie beyond it." in far.get_supxlabel().replace("\n", " ")
    marks = [each for each in far.axes[1].lines if each.get_gid() == "beyond the axis"]
    assert [each.get_xdata().tolist() for each in marks] == [[first], [last]]
    assert [each.get_ydata().tolist() for each in marks] == [[SHARES[0]], [SHARES[1]]]
    unknown = figures.strata(table.assign(linear=np.nan, linearity=np.nan))
    assert len(unknown.axes) == 2 and not unknown.axes[0].patches
    plain = rows.drop(columns=["null_share", "linearity", "linear"])
    assert len(figures.strata(plain).axes) == 1 and not figures.strata(plain).axes[0].patches


def test_foresight_shows_both_differences_and_counts_right_signs():
    table = made_tables.foresight_signs()
    figure = figures.foresight(table, marked=20)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["one matched step", "20 steps (the decision’s)"]
    for ax, horizon in zip(figure.axes, (0, 20), strict=True):
        for row in table[(table.horizon == horizon) & (table.budget == 0.05)].itertuples():
            bar = next(
                bar for bar in ax.containers if bar.get_label() == naming.readable(row.criterion)
            )
            x, y = bar.lines[0].get_data()
            assert (x[0], y[0]) == (row.offline_difference, row.trained_difference)
            across, upright = (line.get_segments()[0] for line in bar.lines[2])
            np.testing.assert_allclose(across[:, 0], [row.offline_low, row.offline_high])
            np.testing.assert_allclose(upright[:, 1], [row.trained_low, row.trained_high])
            clear = row.trained_low > 0 or row.trained_high < 0
            paper = style.LIGHT["paper"]
            assert (bar.lines[0].get_markerfacecolor() != paper) == clear
        assert any(patch.get_gid() == "agree" for patch in ax.patches)
        assert [line.get_label() for line in ax.lines].count("_ambiguous") == 1
    caption = figure.get_supxlabel().replace("\n", " ")
    assert "One matched step: sign right in 1 of 3 settled cells." in caption
    assert "20 steps: sign right in 3 of 3 settled cells." in caption
    assert len(figures.foresight(table, horizons=[20]).axes) == 1


def test_agreement_takes_a_divergence_and_prints_the_permutation_p():
    table = study_tables.validation_agreement()
    both = pd.concat([table, table.assign(y="trained_reverse_kl", kendall=0.9)])
    figure = figures.agreement(
        both.assign(p_permutation=[2e-5, 0.03] * 4),
        answer="trained_forward_kl",
        measure="reverse_kl",
    )
    np.testing.assert_allclose(errorbars(figure.axes[0])["agreement"][1], [0.9, 0.9])
    assert [text.get_text() for text in figure.axes[0].texts] == ["p < .0001", "p = .030"]
    alone = figures.agreement(table, answer="trained_forward_kl", measure="reverse_kl")
    np.testing.assert_allclose(errorbars(alone.axes[0])["agreement"][1], [0.6, 0.3])


# --- options and registry ---

FIGURES = [name for name in figures.__all__ if name not in ("SINGLE", "DOUBLE", "style")]
OF_TWO_TABLES = {"atlas", "teachers", "teachers_agreement"}
"""Figures that no run's page has; the tests of their own pages draw them."""


def test_completion_shows_figures_and_the_two_widths_alone():
    assert dir(figures) == sorted(figures.__all__)
    assert {"SINGLE", "DOUBLE"} < set(figures.__all__) and set(FIGURES) - OF_TWO_TABLES == set(
        EVERY
    )


@pytest.mark.parametrize("name", FIGURES)
def test_every_option_stands_in_the_signature_and_in_the_docstring(name):
    draw = getattr(figures, name)
    parameters = inspect.signature(draw).parameters
    assert (parameters["width"].default, parameters["dark"].default) == (figures.DOUBLE, False)
    assert "page" not in parameters and "**page" not in draw.__doc__
    for option in parameters:
        assert f"\n        {option}: " in draw.__doc__, option
    assert "\n    Returns:\n" in draw.__doc__ and "\n    Raises:\n" in draw.__doc__


def test_an_unknown_option_is_refused():
    with pytest.raises(
        TypeError, match=r"^correlations\(\): got an unexpected keyword argument 'widht'$"
    ):
        figures.correlations(study_tables.correlations(), widht=3.3)
    with pytest.raises(TypeError, match="'level'"):
        figures.distributions(study_tables.tokens(), level=0.9)


def test_the_page_s_order_names_every_figure_once():
    assert sorted(registry.ORDER) == sorted(registry.FIGURES)
    assert [spec.name for spec in registry.in_page_order()] == list(registry.ORDER)
    assert registry.ORDER[0] == "decision"


def meshes(figure) -> list[np.ndarray]:
    """[10, columns] values of each heat map, NaN where a cell is empty."""
    found = [ax.collections for ax in figure.axes if ax.collections]
    return [np.ma.filled(each[0].get_array().astype(float), np.nan) for each in found]


def test_heat_maps_of_a_training_show_every_step_and_place():
    table = study_tables.training_positions()
    figure = figures.training_positions(table)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["reverse KL (nats)", "student entropy (nats)", "selected share"]
    expected = [[(1 + tenth) / step for step in range(1, 7)] for tenth in range(10)]
    expected[3][1] = np.nan
    np.testing.assert_allclose(meshes(figure)[0], expected)
    assert np.isnan(meshes(figure)[1][0]).all() and (meshes(figure)[1][1] == 0.5).all()


def test_many_steps_are_averaged_by_their_positions():
    table = study_tables.training_positions(steps=130)
    table["positions"] += table.step
    figure = figures.training_positions(table, measures=["reverse_kl"])
    grid, rows = meshes(figure)[0], table[table.tenth == 7]
    assert grid.shape == (10, 44) and "Means of 3 steps." in figure.caption
    for column in (0, 20, 43):
        few = rows[(rows.step - 1) // 3 == column]
        expected = (few.reverse_kl * few.positions).sum() / few.positions.sum()
        assert grid[7, column] == pytest.approx(expected)
