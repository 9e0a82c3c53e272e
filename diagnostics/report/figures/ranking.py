"""Which criterion follows the gain: forests of correlations."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.report import style
from diagnostics.report.figures.common import BOTH, forest, forest_order
from diagnostics.report.figures.registry import CORE, figure
from diagnostics.report.style import DOUBLE

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
@style.plate
def correlations(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] = BOTH,
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Forest of each criterion's correlation with both gains:
    `dx.plot.correlations(dx.correlate(tokens))`.

    table: columns outcome, criterion, split, method, estimate, low, high, placebo, positions,
    prompts; the partial and within-prompt tables have the same. Filled marks are estimates with
    their intervals, one colour and shape a split; a hollow diamond is what a random step of the
    same norm shows, so only the distance from it speaks for the criterion. Criteria are ordered by
    the first outcome on held-out contexts."""
    return _criteria_forest(
        table, "figures.correlations", "estimate", method, outcomes, criteria, level, width
    )


@style.plate
def placebo_excess(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] = BOTH,
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Forest of correlation minus the placebo's:
    `dx.plot.placebo_excess(dx.study(tokens)["placebo_excess"])`.

    table: columns outcome, criterion, split, method, excess, low, high, positions, prompts. To the
    right of zero a criterion says more than the mere presence of the divergence on both sides."""
    return _criteria_forest(
        table, "figures.placebo_excess", "excess", method, outcomes, criteria, level, width
    )


def _criteria_forest(table, what, value, method, outcomes, criteria, level, width) -> Figure:
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
    figure, axes = style.canvas(width, 1.15 + 0.2 * len(names), 1, len(outcomes), sharey=True)
    label = METHODS.get(method, method) + (" excess" if value == "excess" else "")
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table.outcome == outcome], names, splits, value)
        ax.set_title(style.words(outcome))
        ax.set_xlabel(label)
    style.names_down(axes[0, 0], names)
    style.legend(figure, axes[0, 0], 3, *([style.placebo_key()] if "placebo" in table else []))
    style.caption(figure, style.counts(table), style.bars(level))
    return figure
