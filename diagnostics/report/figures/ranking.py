"""Which criterion follows the gain: correlations with the gain, its null and what remains of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.report import naming, style
from diagnostics.report.figures.common import forest, forest_order
from diagnostics.report.figures.options import Intervals, on_page
from diagnostics.report.figures.registry import CORE, figure
from diagnostics.report.style import BLUE, ORANGE

METHODS = {"spearman": "Spearman ρ", "pearson": "Pearson r", "kendall": "Kendall τ"}
NULLED = {
    "gain": (BLUE, "o", True, "gain, the true teacher"),
    "gain_permuted": (BLUE, "o", False, "gain, a permuted teacher (the null)"),
    "context_gain": (ORANGE, "s", True, "context gain, their difference at each position"),
}
"""Color, marker, whether it is filled, and name of each of the three gains of a criterion."""


@figure(
    table="correlations",
    title="Which criterion follows the gain?",
    reading=(
        "Rank correlations on held-out positions, which carried no loss. Filled circles: with the"
        " gain after a step towards the teacher. Hollow circles: the same after a step in which"
        " every position was graded by the teacher of another, so what they show needs no signal"
        " about the position. Squares: with the context gain, the difference of those two gains at"
        " each position; this is what conclusions are about. A correlation orders positions; it"
        " does not say that training on the first of them pays."
    ),
    options={"criteria": CORE},
)
@on_page
def correlations(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] | None = None,
    criteria: Sequence[str] | None = None,
    split: str | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Forest of each criterion's correlation with the gain, its null and the context gain.

    Example: `dx.plot.correlations(dx.correlate(tokens))`. Filled circles are correlations with the
    gain, hollow circles those with the gain after a step towards a permuted teacher, squares those
    with the context gain, the difference of both gains at each position. Criteria are ordered by
    the context gain. A table without a permuted teacher, or a choice of `outcomes`, gets one panel
    per outcome with one mark per split.

    Args:
        table: One row per (outcome, criterion, split, method), with the columns estimate, low,
            high, positions and prompts. The tables `partial` and `within_prompt` of a study have
            the same columns.
        method: The correlation to show: spearman, pearson or kendall.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None and the
            table has the context gain, the three gains side by side in one panel.
        criteria: Names of the criteria to show; all of the table where None.
        split: The split that the one panel shows; held-out positions where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    what, needs = (
        "figures.correlations",
        ("outcome", "criterion", "split", "method", "estimate", "low", "high"),
    )
    where = {"method": method} | ({} if criteria is None else {"criterion": criteria})
    whole, table = table, style.keep(table, what, needs, where)
    style.leaves_out(whole, table)
    if outcomes is not None or not (table.outcome == "context_gain").any():
        shown = naming.shown_outcomes(table, outcomes)
        table = style.halves(style.keep(table, what, needs, {"outcome": shown}))
        return _by_split(table, style.present(table.outcome, shown), method, page)
    table = style.keep(table, what, needs, {"split": split or naming.preferred_split(table)})
    return _against_null(style.keep(table, what, needs, {"outcome": list(NULLED)}), method, page)


def null_style(outcome: str) -> tuple[str, str, bool, str]:
    """Color, marker, whether it is filled, and name of one of the three gains, as asked for."""
    color, marker, filled, words = NULLED[outcome]
    color = style.color_of(outcome, style.tone(color))
    return color, marker, filled, naming.labelled(outcome, words)


def _against_null(table: pd.DataFrame, method: str, page) -> Figure:
    """One panel in which each criterion has its gain, the null's and the context gain."""
    split = table.split.iloc[0]
    names = forest_order(table, "context_gain", split, "estimate")
    figure, axes = style.canvas(page["width"], 1.2 + 0.3 * len(names))
    ax, shown = axes[0, 0], style.present(table.outcome, NULLED)
    style.zero(ax, "x")
    ax.xaxis.set_major_locator(MaxNLocator(7 if page["width"] > 5 else 4))
    for outcome, place in zip(shown, style.offsets(len(shown), 0.21), strict=True):
        color, marker, filled, words = null_style(outcome)
        rows = table[table.outcome == outcome].drop_duplicates("criterion").set_index("criterion")
        face = {} if filled else {"markerfacecolor": style.paper()}
        look = {"marker": marker, "color": color, "label": words} | face
        y = np.arange(len(names)) + place
        style.lying(ax, y, rows.reindex(names), "estimate", zorder=3, **look)
    ax.set_xlabel(f"{METHODS.get(method, method)}, {naming.SPLITS.get(split, split)}")
    style.names_down(ax, names)
    style.legend(figure, ax, 3 if page["width"] > 5 else 1)
    style.caption(figure, style.counts(table), style.bars(page["level"], table=table))
    return figure


def _by_split(table: pd.DataFrame, outcomes: list[str], method: str, page) -> Figure:
    """One panel per outcome in which each criterion has one mark per split."""
    splits = style.present(table.split, style.SPLITS)
    names = forest_order(table, outcomes[0], splits[-1], "estimate")
    figure, axes = style.canvas(
        page["width"], 1.15 + 0.2 * len(names), 1, len(outcomes), sharey=True
    )
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table.outcome == outcome], names, splits, "estimate")
        ax.set_title(naming.readable(outcome))
        ax.set_xlabel(METHODS.get(method, method))
    style.names_down(axes[0, 0], names)
    style.legend(figure, axes[0, 0], 3)
    style.caption(figure, style.counts(table), style.bars(page["level"], table=table))
    return figure
