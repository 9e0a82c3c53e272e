"""Several teachers on one bank: what each offers and gives, by group, and how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.report import naming, style
from diagnostics.report.figures.common import mark, thin_color_bar
from diagnostics.report.figures.options import Intervals, Page, on_page

MEASURES = (
    "compatible_divergence",
    "forward_kl",
    "teachability",
    "reverse_gain",
    "gain",
    "context_gain",
)
"""What is shown where nothing else is asked for, as far as the table has it."""
MEASURE_WORDS = {
    "compatible_divergence": "D·C",
    "forward_kl": "D = KL(q‖p)",
    "reverse_kl": "KL(p‖q)",
}
"""Titles of panels that differ from the measure's readable name."""
NAMES_WIDE = 2.6
"""Inches beside the cells of the heat map: names of rows, and the color bar."""
ACROSS = 3
"""Panels that stand side by side."""
NO_UNIT = ("teachability", "compatibility", "acceptance")
DOMAINS = ("domain ", "no domain")
"""What the groups of a prompt column begin with."""


@on_page
def teachers(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """What each teacher offers and gives on one bank, by group of positions.

    Example: `dx.plot.teachers(dx.compare_teachers(runs)["teachers"])`. One panel per measure, one
    row per group, one mark with its interval per teacher. Intervals of two teachers share their
    prompts, so that they may overlap where the difference, which `teachers_differences` has, is
    clear of 0.

    Args:
        table: The table `teachers` of `dx.compare_teachers`: one row per teacher, measure and group
            with mean, low and high.
        measures: Measures in the order of the panels; D·C, D, teachability and gains where None.
        groups: Groups in the order of the rows; where None, all positions and the domains, or the
            thirds by student entropy where the prompts have no domain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("teacher", "measure", "group", "mean", "low", "high")
    table = style.keep(table, "figures.teachers", needs, {})
    measures = [each for each in measures or MEASURES if (table["measure"] == each).any()]
    groups = list(groups) if groups is not None else _usual_groups(table)
    shown = table[table["measure"].isin(measures) & table["group"].isin(groups)]
    shown = style.keep(shown, "figures.teachers", needs, {})
    names = list(dict.fromkeys(table["teacher"]))
    down, across = style.panels(len(measures), page["width"], min(len(measures), ACROSS))
    height = (1.1 + (0.14 * len(names) + 0.1) * len(groups)) * down
    figure, axes = style.canvas(page["width"], height, down, across, sharey=True)
    for ax, measure in zip(axes.flat, measures, strict=False):
        _marks(ax, shown[shown["measure"] == measure], names, groups)
        ax.set_title(MEASURE_WORDS.get(measure, naming.readable(measure)))
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("mean" if measure in NO_UNIT else "nats per position")
        ax.xaxis.set_major_locator(MaxNLocator(4 if page["width"] > 5 else 3))
    style.hide_rest(axes, len(measures))
    style.names_down(axes[0, 0], [_group_words(group) for group in groups])
    style.legend(figure, axes[0, 0], 4 if page["width"] > 5 else 2)
    style.caption(figure, style.counts(shown), style.bars(page["level"]))
    return figure


def _usual_groups(table: pd.DataFrame) -> list[str]:
    """All positions and the domains; the thirds by entropy where there is no domain."""
    names = list(dict.fromkeys(table["group"]))
    domains = [name for name in names if str(name).startswith(DOMAINS)]
    thirds = [name for name in names if str(name).endswith("student entropy")]
    return [name for name in names if name == "all"] + (domains or thirds)


def _group_words(group: str) -> str:
    return "all positions" if group == "all" else group.removeprefix("domain ")


def _marks(ax, rows: pd.DataFrame, names: list[str], groups: list[str]) -> None:
    """A mark with its interval per teacher, side by side within a group."""
    style.zero(ax, "x")
    places = style.offsets(len(names), 0.7 / max(len(names), 2))
    for index, (name, offset) in enumerate(zip(names, places, strict=True)):
        own = rows[rows["teacher"] == name].drop_duplicates("group").set_index("group")
        y = np.arange(len(groups)) + offset
        style.lying(ax, y, own.reindex(groups), "mean", label=name, zorder=3, **mark(index, name))


WHAT_WORDS = {
    "rank correlation": "ranks of {}",
    "overlap": "top-{} tokens",
    "Jaccard": "selected by {} at {}",
}


@on_page
def teachers_agreement(
    table: pd.DataFrame, *, measures: Sequence[str] | None = None, **page: Unpack[Page]
) -> Figure:
    """How far teachers agree: a heat map of measures and selections by pairs of teachers.

    Example: `dx.plot.teachers_agreement(dx.compare_teachers(runs)["teachers_agreement"])`. A cell
    is a rank correlation over positions, the share of likeliest tokens that both list, or the
    Jaccard index of two selections; what two independent selections share is in the caption.

    Args:
        table: The table `teachers_agreement` of `dx.compare_teachers`.
        measures: Measures whose rank correlations are shown; those of `teachers` where None.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("teacher", "other", "what", "measure", "size", "value")
    table = style.keep(table, "figures.teachers_agreement", needs, {})
    ranked = table["what"] == "rank correlation"
    table = table[~ranked | table["measure"].isin(measures or (*MEASURES, "compatibility"))]
    table = style.keep(table, "figures.teachers_agreement", needs, {})
    matrix = _agreement_matrix(table)
    figure, axes = style.canvas(page["width"], 1.3 + 0.26 * len(matrix))
    _cells(figure, axes[0, 0], matrix)
    style.caption(figure, style.counts(table), _chance(table))
    return figure


def _agreement_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """One row per agreement in words, one column per pair of teachers."""
    rows = [
        (_agreement_words(row.what, row.measure, row.size), f"{row.teacher} and {row.other}")
        for row in table[["what", "measure", "size", "teacher", "other"]].itertuples(index=False)
    ]
    named = pd.DataFrame(rows, columns=["row", "pair"]).assign(value=table["value"].to_numpy())
    wide = named.pivot(index="row", columns="pair", values="value")
    return wide.loc[list(dict.fromkeys(named["row"])), list(dict.fromkeys(named["pair"]))]


def _agreement_words(what: str, measure: str, size: float) -> str:
    if what == "overlap":
        return WHAT_WORDS[what].format(f"{size:g}")
    name = {"compatible_divergence": "D·C"}.get(measure, naming.readable(measure))
    return WHAT_WORDS.get(what, "{}").format(name, style.percent(size))


def _cells(figure: Figure, ax, matrix: pd.DataFrame) -> None:
    """The heat map, from no agreement (or the opposite order, below 0) to the same."""
    values, colors = matrix.to_numpy(float), style.sequential()
    image = ax.imshow(values, cmap=colors, vmin=0, vmax=1, aspect="auto")
    size = style.text_size(0.5)
    pairs = list(matrix.columns)
    room = 72 * (figure.get_figwidth() - NAMES_WIDE) / len(pairs)
    upright = max(style.text_width(pair, size) for pair in pairs) < room
    ax.set_xticks(range(len(pairs)), pairs, fontsize=size, rotation=0 if upright else 90)
    ax.set_yticks(range(len(matrix)), list(matrix.index), fontsize=size)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            ink = style.on(colors(image.norm(value)))
            text = f"{value:.2f}".replace("-", "−")
            ax.text(j, i, text, ha="center", va="center", fontsize=size, color=ink)
    thin_color_bar(figure, ax, image, label="agreement")


def _chance(table: pd.DataFrame) -> str:
    """What two independent selections share, by budget."""
    rows = table[table["what"] == "Jaccard"].dropna(subset=["chance"]) if "chance" in table else ()
    if not len(rows):
        return ""
    found = rows.drop_duplicates("size").sort_values("size")
    pairs = found[["size", "chance"]].itertuples(index=False, name=None)
    said = " and ".join(f"{chance:.2g} at {style.percent(size)}" for size, chance in pairs)
    return f"Two independent selections share {said}."
