"""Which criterion follows the gain: forests of correlations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.report import naming, style
from diagnostics.report.figures.common import BOTH, forest, forest_order
from diagnostics.report.figures.options import Intervals, on_page
from diagnostics.report.figures.registry import CORE, figure

METHODS = {"spearman": "Spearman ρ", "pearson": "Pearson r", "kendall": "Kendall τ"}


@figure(
    table="correlations",
    title="Which criterion follows the gain?",
    reading=(
        "Left the gain in nats, right the gain relative to the divergence before the step. A filled"
        " mark is the rank correlation with its interval, a hollow diamond what a random step of"
        " the same norm shows: mechanical coupling alone. A criterion speaks where its interval"
        " clears its own diamond. Held-out contexts carried no loss, so what they show is"
        " spill-over."
    ),
    options={"criteria": CORE},
)
@on_page
def correlations(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] = BOTH,
    criteria: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Forest of each criterion's correlation with both gains.

    Example: `dx.plot.correlations(dx.correlate(tokens))`. Filled marks are estimates with their
    intervals, with one color and shape per split. A hollow diamond is the correlation with the gain
    of a random step of the same norm, so only the distance from it speaks for the criterion.
    Criteria are ordered by the first outcome on held-out contexts.

    Args:
        table: One row per (outcome, criterion, split, method), with the columns estimate, low,
            high, positions, prompts and, where it was measured, placebo. The tables `partial` and
            `within_prompt` of a study have the same columns.
        method: The correlation to show: spearman, pearson or kendall.
        outcomes: Forms of the gain to show, one panel for each, in this order.
        criteria: Names of the criteria to show; all of the table where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    return _criteria_forest(
        table, "figures.correlations", "estimate", method, outcomes, criteria, page
    )


@on_page
def placebo_excess(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] = BOTH,
    criteria: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Forest of each criterion's correlation minus the placebo's.

    Example: `dx.plot.placebo_excess(dx.study(tokens)["placebo_excess"])`. To the right of zero, a
    criterion says more than the presence of the divergence in both the criterion and the gain gives
    alone.

    Args:
        table: One row per (outcome, criterion, split, method), with the columns excess, low, high,
            positions and prompts.
        method: The correlation to show: spearman, pearson or kendall.
        outcomes: Forms of the gain to show, one panel for each, in this order.
        criteria: Names of the criteria to show; all of the table where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    return _criteria_forest(
        table, "figures.placebo_excess", "excess", method, outcomes, criteria, page
    )


def _criteria_forest(table, what, value, method, outcomes, criteria, page) -> Figure:
    needs = ("outcome", "criterion", "split", "method", value, "low", "high")
    where = {"method": method, "outcome": outcomes} | (
        {"criterion": criteria} if criteria is not None else {}
    )
    table = style.halves(style.keep(table, what, needs, where))
    outcomes, splits = (
        style.present(table.outcome, outcomes),
        style.present(table.split, style.SPLITS),
    )
    names = forest_order(table, outcomes[0], splits[-1], value)
    figure, axes = style.canvas(
        page["width"], 1.15 + 0.2 * len(names), 1, len(outcomes), sharey=True
    )
    label = METHODS.get(method, method) + (" excess" if value == "excess" else "")
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table.outcome == outcome], names, splits, value)
        ax.set_title(naming.readable(outcome))
        ax.set_xlabel(label)
    style.names_down(axes[0, 0], names)
    style.legend(figure, axes[0, 0], 3, *([style.placebo_key()] if "placebo" in table else []))
    style.caption(figure, style.counts(table), style.bars(page["level"]))
    return figure
