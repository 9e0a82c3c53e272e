"""What a selection captures, shares and does: offline curves, overlaps, profiles and
interventions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from diagnostics.analysis.claims import p_words
from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import naming, style
from diagnostics.report.figures.common import (
    budget_axis,
    forest,
    forest_order,
    one_scale,
    reduction_curves,
    shown_criteria,
    thin_color_bar,
)
from diagnostics.report.figures.options import Intervals, Page, on_page
from diagnostics.report.figures.registry import CORE, figure
from diagnostics.report.style import BLUE, CYCLE, DASHES

CURVE_COLUMNS = (
    "outcome",
    "criterion",
    "split",
    "budget",
    "captured_share",
    "low",
    "high",
    "random_low",
    "random_high",
    "oracle",
)
"""Columns that the curves of a selection need."""
SUMMARY_COLUMNS = (
    "outcome",
    "criterion",
    "split",
    "statistic",
    "budget",
    "estimate",
    "low",
    "high",
    "baseline",
)
"""Columns that the areas under them, and the enrichment, need."""


@figure(
    table="selection_curves",
    title="How much of the gain a selection captures",
    reading=(
        "Share of the total gain in the best positions of each criterion. Above the grey band a "
        "criterion beats random selection at that budget; the dotted line is what choosing by the "
        "gain itself would capture. The other panels show the mean gain of the selected positions "
        "minus that of random ones: clear of zero, a criterion finds more gain than chance does."
    ),
)
@on_page
def selection_curves(
    table: pd.DataFrame,
    *,
    criteria: Sequence[str] | None = None,
    outcomes: Sequence[str] | None = None,
    split: str | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """What a selection captures of the gain at each budget, and how much more than random ones.

    Example: `dx.plot.selection_curves(dx.selection_curves(tokens))`. The gray band holds random
    selections; the dotted line is the oracle, which ranks positions by the gain itself. The panels
    of the shares come first, then those of the mean gain minus random's. An outcome whose shares
    are undefined, since its total is not clear of zero, has no panel of shares where the table has
    its means.

    Args:
        table: One row per (outcome, criterion, split, budget), with the columns captured_share,
            low, high, random_low, random_high, oracle, positions, prompts and, where they are
            known, minus_random, minus_random_low and minus_random_high.
        criteria: Names of the criteria to show; where None all of them, or the usual six where
            there are more than six.
        outcomes: Forms of the gain to show, in this order; where None, gain and context gain, or
            gain and relative gain where the table has no context gain.
        split: The split to show; held-out positions where None and the table has them, otherwise
            all.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    table = style.keep(table, "figures.selection_curves", CURVE_COLUMNS, {"outcome": outcomes})
    where = {"split": split or naming.preferred_split(table)}
    table = style.keep(table, "figures.selection_curves", CURVE_COLUMNS, where)
    names, outcomes = shown_criteria(table, criteria), style.present(table.outcome, outcomes)
    shown = _curve_panels(table, outcomes, names)
    across = {1: 1, 3: 3}.get(len(shown), 2) if page["width"] > 5 else 1
    rows, columns = style.panels(len(shown), page["width"], across)
    figure, axes = style.canvas(page["width"], 0.8 + 2.1 * rows, rows, columns)
    for ax, (draw, outcome) in zip(axes.flat, shown, strict=False):
        draw(ax, table[table.outcome == outcome].sort_values("budget"), names)
        ax.set_xlabel("budget (share of positions)")
    style.hide_rest(axes, len(shown))
    means = [ax for ax, (draw, _) in zip(axes.flat, shown, strict=False) if draw is _over_random]
    units = [naming.UNITS.get(name, name) for draw, name in shown if draw is _over_random]
    scales = one_scale(means, units)
    style.legend(figure, axes[0, 0], 4 if page["width"] > 5 else 2)
    bands = style.bars(page["level"], "Bands", table=table)
    style.caption(figure, style.counts(table), scales, bands, _cut(table, shown, names))
    return figure


def _curve_panels(
    table: pd.DataFrame, outcomes: Sequence[str], names: Sequence[str]
) -> list[tuple[Callable, str]]:
    """How each panel is drawn and its outcome: shares, then means minus random's."""
    known = table[table.criterion.isin(names)].groupby("outcome")
    shares = known["captured_share"].apply(lambda values: values.notna().any())
    means = [name for name in outcomes if "minus_random" in table]
    drawn = [name for name in outcomes if shares.get(name, False) or name not in means]
    return [(_budget_curves, name) for name in drawn] + [(_over_random, name) for name in means]


def _over_random(ax, table: pd.DataFrame, names: list[str]) -> None:
    """Mean outcome of the selected positions minus that of random ones, over the budgets."""
    style.zero(ax)
    for name in names:
        rows, line = table[table.criterion == name], style.criterion_style(name, names)
        ends = ("minus_random_low", "minus_random_high")
        style.band(ax, rows.budget, rows, line["color"], *ends)
        ax.plot(rows.budget, rows.minus_random, label=f"_{naming.readable(name)}", **line)
    budget_axis(ax, table.budget)
    outcome = str(table.outcome.iloc[0])
    ax.set_ylabel(f"mean {naming.with_unit(outcome)}\nminus random’s")


WIDEST = 2.5
"""Times the highest curve up to which a panel of shares makes room for the bands."""


def _share_top(table: pd.DataFrame, names: list[str]) -> float:
    """The top of a panel of shares: above every curve, and above every band unless one is so wide
    that it would press the curves together.
    """
    rows = table[table.criterion.isin(names)]
    curves = np.nanmax([1.0, rows.captured_share.max(), rows.oracle.max()])
    bands = np.nanmax([curves, rows.high.max(), rows.random_high.max()])
    return 1.03 * float(bands if bands <= WIDEST * curves else curves)


def _cut(table: pd.DataFrame, shown: list[tuple[Callable, str]], names: list[str]) -> str:
    """A sentence for the caption where a band goes beyond its panel of shares; else empty."""
    for draw, outcome in shown:
        rows = table[(table.outcome == outcome) & table.criterion.isin(names)]
        highest = rows[["high", "random_high"]].max().max()
        if draw is _budget_curves and highest > _share_top(rows, names):
            return "Bands that leave a panel are cut off."
    return ""


def _budget_curves(ax, table: pd.DataFrame, names: list[str]) -> None:
    ax.set_xscale("log")
    common = table.drop_duplicates("budget")
    style.band(
        ax, common.budget, common, style.quiet(), "random_low", "random_high", label="random"
    )
    for name in names:
        rows, line = table[table.criterion == name], style.criterion_style(name, names)
        style.band(ax, rows.budget, rows, line["color"])
        ax.plot(rows.budget, rows.captured_share, label=naming.readable(name), **line)
    ax.plot(
        common.budget,
        common.oracle,
        color=style.ink(),
        linestyle=DASHES[2],
        linewidth=1.0,
        label="oracle",
    )
    style.zero(ax)
    ax.set_ylabel(f"share of total {naming.readable(str(table.outcome.iloc[0]))}")
    top = _share_top(table, names)
    ax.set_ylim(top=min(top, ax.get_ylim()[1]) if np.isfinite(top) else None)
    budget_axis(ax, table.budget)
    ax.yaxis.set_major_formatter(FuncFormatter(style.percent))
    if not table[table.criterion.isin(names)].captured_share.notna().any():
        said = "undefined: the total gain is not clear of zero"
        ax.text(0.5, 0.92, said, ha="center", va="top", transform=ax.transAxes)


@figure(
    table="selection_summary",
    title="Selection in one number",
    reading=(
        "Area between a criterion's curve and that of random selection, as a share of the oracle's:"
        " 0 is random, 1 is the oracle, below 0 it selects positions with less gain than random"
        " ones."
    ),
    options={"criteria": CORE},
)
@on_page
def selection_summary(
    table: pd.DataFrame,
    *,
    budget: float | None = None,
    outcomes: Sequence[str] | None = None,
    criteria: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Normalized area of a selection curve, or enrichment at one budget.

    Example: `dx.plot.selection_summary(tables["selection_summary"], budget=0.05)`. The vertical
    line is the baseline.

    Args:
        table: One row per (outcome, criterion, split, statistic, budget), with the columns
            estimate, low, high, baseline, positions and prompts.
        budget: Where None, the area is shown (0 is random, 1 the oracle); with a budget, how many
            times its own share of the gain a criterion captures there (1 is random).
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        criteria: Names of the criteria to show; all of the table where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    where = {"outcome": outcomes, "statistic": "area" if budget is None else "enrichment"}
    where |= ({} if budget is None else {"budget": budget}) | (
        {} if criteria is None else {"criterion": criteria}
    )
    whole, table = (
        table,
        style.halves(style.keep(table, "figures.selection_summary", SUMMARY_COLUMNS, where)),
    )
    style.leaves_out(whole, table)
    outcomes, splits = (
        style.present(table.outcome, outcomes),
        style.present(table.split, style.SPLITS),
    )
    names = forest_order(table, outcomes[0], splits[-1], "estimate")
    figure, axes = style.canvas(
        page["width"], 1.15 + 0.2 * len(names), 1, len(outcomes), sharey=True
    )
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table.outcome == outcome], names, splits, "estimate")
        style.zero(ax, "x", float(table.baseline.iloc[0]))
        ax.set_title(naming.readable(outcome))
        ax.set_xlabel("normalised area" if budget is None else f"enrichment at {budget:.0%}")
    scales = one_scale(list(axes[0]), [""] * len(outcomes), "x")
    style.names_down(axes[0, 0], names)
    style.legend(figure, axes[0, 0], 3)
    style.caption(figure, style.counts(table), scales, style.bars(page["level"], table=table))
    return figure


@figure(
    table="selection_overlap",
    title="Do two criteria select the same positions?",
    reading=(
        "Jaccard index at the budget below. Criteria with like rank correlations can share few "
        "positions at a small budget."
    ),
    options={"criteria": CORE},
)
@on_page
def selection_overlap(
    table: pd.DataFrame,
    *,
    budget: float | None = None,
    criteria: Sequence[str] | None = None,
    **page: Unpack[Page],
) -> Figure:
    """Heat map of the share of positions that two criteria both select.

    Example: `dx.plot.selection_overlap(tables["selection_overlap"])`. A cell is the Jaccard index
    of two selections at one budget.

    Args:
        table: One row per (criterion, other, statistic, budget), each pair once, with the columns
            estimate, chance, positions and prompts.
        budget: The budget to show; the table's nearest to 5 % where None.
        criteria: Names of the criteria to show; all of the table where None.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("criterion", "other", "statistic", "budget", "estimate", "chance")
    table = style.keep(table, "figures.selection_overlap", needs, {"statistic": "jaccard"})
    budget = style.nearest_budget(table) if budget is None else budget
    table = style.keep(table, "figures.selection_overlap", needs, {"budget": budget})
    names = style.present([*table.criterion, *table.other], ())
    if criteria is not None:
        kept = table[table.criterion.isin(criteria)]
        style.leaves_out(table, kept)
        names = [name for name in criteria if name in names]
    matrix = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for row in table[table.criterion.isin(names) & table.other.isin(names)].itertuples():
        matrix.loc[row.criterion, row.other] = matrix.loc[row.other, row.criterion] = row.estimate
    figure, axes = style.canvas(page["width"], min(page["width"], 1.0 + 0.4 * len(names)) + 0.9)
    _heat_map(figure, axes[0, 0], matrix, "Jaccard index")
    chance = table.chance.median()
    style.caption(
        figure,
        style.counts(table),
        f"Budget {budget:.0%}. Two independent selections of that size share {chance:.2g}.",
    )
    return figure


def _heat_map(figure: Figure, ax, matrix: pd.DataFrame, label: str) -> None:
    """The lower triangle, without the first row and the last column, which have no cells in it.

    Numbers stand in the cells while they fit; dark cells take light ink.
    """
    lower = np.where(np.tri(len(matrix), k=-1, dtype=bool), matrix.to_numpy(float), np.nan)
    if len(matrix) > 1:
        lower, matrix = lower[1:, :-1], matrix.iloc[1:, :-1]
    top = np.nanmax(lower) if np.isfinite(lower).any() else 1.0
    colors = style.sequential()
    image = ax.imshow(lower, cmap=colors, vmin=0, vmax=max(top, 1e-9), aspect="equal")
    pitch = 72 * (figure.get_figwidth() - 1.2) / len(matrix)
    size = min(style.text_size(0.5), 0.8 * pitch)
    ax.set_xticks(
        range(len(matrix.columns)),
        [naming.readable(name) for name in matrix.columns],
        rotation=90,
        fontsize=size,
    )
    ax.set_yticks(
        range(len(matrix)), [naming.readable(name) for name in matrix.index], fontsize=size
    )
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if pitch > 16:
        for (i, j), value in np.ndenumerate(lower):
            if not np.isfinite(value):
                continue
            ax.text(
                j,
                i,
                f"{value:.2f}".removeprefix("0") if value < 1 else "1",
                ha="center",
                va="center",
                fontsize=style.text_size(2),
                color=style.on(colors(image.norm(value))),
            )
    thin_color_bar(figure, ax, image, above=True, label=label)


PROFILES = {
    "quadrant": ("q1", "q2", "q3", "q4"),
    "kind of token": ("word", "number", "punctuation", "unknown", "special"),
}


@figure(
    table="selection_profile",
    title="What each criterion selects",
    reading="Shares of the selection at the budget below, beside those of all positions.",
    options={"criteria": CORE},
)
@on_page
def selection_profile(
    table: pd.DataFrame,
    *,
    budget: float | None = None,
    criteria: Sequence[str] | None = None,
    **page: Unpack[Page],
) -> Figure:
    """Composition of each criterion's selection.

    Example: `dx.plot.selection_profile(tables["selection_profile"])`. Each bar is split by quadrant
    and by kind of token; the lowest bar is all positions.

    Args:
        table: One row per (criterion, budget, measure), with the columns estimate, full, positions
            and prompts; both values are shares between 0 and 1.
        budget: The budget to show; the table's nearest to 5 % where None.
        criteria: Names of the criteria to show; all of the table where None.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("criterion", "budget", "measure", "estimate", "full")
    table = style.keep(table, "figures.selection_profile", needs)
    budget = style.nearest_budget(table) if budget is None else budget
    table = style.keep(table, "figures.selection_profile", needs, {"budget": budget})
    groups = {
        title: [name for name in measures if (table.measure == name).any()]
        for title, measures in PROFILES.items()
    }
    groups = {title: measures for title, measures in groups.items() if measures}
    names = (
        style.present(table.criterion, ())
        if criteria is None
        else [n for n in criteria if (table.criterion == n).any()]
    )
    style.leaves_out(table, table[table.criterion.isin(names)])
    rows, columns = style.panels(max(len(groups), 1), page["width"])
    figure, axes = style.canvas(
        page["width"], 0.5 + rows * (0.55 + 0.17 * (len(names) + 1)), rows, columns, sharey=True
    )
    for ax, (title, measures) in zip(axes.flat, groups.items(), strict=True):
        _stacks(ax, table[table.measure.isin(measures)], measures, names)
        ax.set_title(title)
        _legend_below(ax, 4 if page["width"] > 5 else 2)
    style.names_down(axes[0, 0], [*names, "all positions"])
    style.caption(
        figure, style.counts(table), f"Shares of the selection at a budget of {budget:.0%}."
    )
    return figure


def _legend_below(ax, columns: int) -> None:
    if style.sheet().legend:
        ax.legend(
            loc="upper left",
            bbox_to_anchor=(0, 0),
            ncols=columns,
            handlelength=0.9,
            columnspacing=0.8,
        )


HATCHES = ("", "////", "\\\\\\\\", "xxxx")


def _stacks(ax, table: pd.DataFrame, measures: Sequence[str], names: list[str]) -> None:
    wide = table.pivot(index="criterion", columns="measure", values="estimate").reindex(names)
    wide.loc["all positions"] = table.drop_duplicates("measure").set_index("measure").full
    left = np.zeros(len(wide))
    for index, name in enumerate(measures):
        shares = wide[name].to_numpy(float)
        ax.barh(
            np.arange(len(wide)),
            shares,
            left=left,
            height=0.72,
            color=style.color_of(name, style.tone(CYCLE[index])),
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor=style.paper(),
            linewidth=0.4,
            label=naming.readable(name).upper() if name[0] == "q" else naming.readable(name),
        )
        left = left + np.nan_to_num(shares)
    ax.set_xlim(0, 1)
    ax.set_ylim(len(wide) - 0.4, -0.6)
    ax.xaxis.set_ticks_position("top")
    ax.set_xticks([0.25, 0.5, 0.75])
    ax.xaxis.set_major_formatter(FuncFormatter(style.percent))
    ax.grid(visible=False)
    ax.tick_params(axis="y", length=0)


@figure(
    table="intervention",
    title="A step on the selected positions alone",
    reading=(
        "From the same student, one step per criterion and budget in which only selected positions"
        " carry loss, at the norm of the step on all positions. One step can order criteria"
        " otherwise than training does; the horizon above is what the decision rests on."
    ),
    measured=True,
)
@on_page
def intervention(
    table: pd.DataFrame,
    *,
    measure: str = "forward_kl",
    groups: Sequence[str] = ("held_out", "step"),
    criteria: Sequence[str] | None = None,
    horizon: int = 0,
    **page: Unpack[Intervals],
) -> Figure:
    """Effect of one step in which only the selected positions carry loss.

    Example: `dx.plot.intervention(dx.intervene(pair, bank))`. There is one line per criterion over
    its budgets. The level lines are the step on all positions and, where one was taken, a step in a
    random direction. A ring means that ties decide much of a selection.

    Args:
        table: One row per (criterion, budget, group, measure), with the columns reduction, low,
            high (nats), positions and prompts.
        measure: The divergence whose drop is shown.
        groups: Groups of positions to show, one panel for each.
        criteria: Names of the criteria to show; where None all of them, or the usual six where
            there are more than six.
        horizon: Number of optimizer steps in a table with a horizon; 0 is the one step of matched
            norm, and the table's shortest is shown where it lacks this one.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("criterion", "budget", "group", "measure", "reduction", "low", "high")
    table = style.keep(table, "figures.intervention", needs, {"measure": measure, "group": groups})
    table, steps = _at_horizon(table, horizon)
    names, groups = shown_criteria(table, criteria), style.present(table.group, groups)
    rows, columns = style.panels(len(groups), page["width"])
    figure, axes = style.canvas(page["width"], 0.8 + 2.1 * rows, rows, columns, sharex=True)
    one = table.budget[~table.criterion.isin(("full", "placebo"))].nunique() < 2
    for ax, group in zip(axes.flat, groups, strict=True):
        part = table[table.group == group].sort_values("budget")
        reduction_curves(ax, part, names, bars=one)  # a band over one budget has no width
        ax.set_title(
            {"held_out": "held-out positions", "step": "step positions"}.get(
                group, naming.readable(group)
            )
        )
    for ax in axes[:, 0]:
        ax.set_ylabel(f"drop of {naming.readable(measure)} (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("budget (share of step positions)")
    scales = one_scale(list(axes.flat), ["nats"] * len(groups))
    style.legend(figure, axes[0, 0], 4 if page["width"] > 5 else 2)
    style.caption(
        figure,
        "" if steps is None else f"{naming.steps(steps).capitalize()}.",
        style.counts(table.drop(columns="group")),
        style.tie_words(table),
        scales,
        style.bars(page["level"], "Bars" if one else "Bands", table=table),
    )
    return figure


def _at_horizon(table: pd.DataFrame, horizon: int) -> tuple[pd.DataFrame, int | None]:
    """The rows after so many steps, or after the fewest; None where the table has one step."""
    if "horizon" not in table:
        return table, None
    steps = horizon if (table.horizon == horizon).any() else table.horizon.min()
    return table[table.horizon == steps].reset_index(drop=True), steps


FEW_CELLS = 6
"""Cells below which a rank agreement is not drawn."""


@figure(
    table="offline_agreement",
    title="Do captured gain and intervention agree?",
    reading=(
        "Rank agreement among criteria at equal budgets between each offline answer and the drop of"
        " the divergence on held-out positions."
    ),
    measured=True,
)
@figure(
    "validation_agreement",
    table="validation_agreement",
    title="Which offline answer foresaw training?",
    reading=(
        "Rank agreement among criteria at equal budgets between each answer and the trained gain."
        " Beside it the p value of exchanging the criteria's labels: criteria are few, and"
        " unrelated ones can agree by chance however narrow the interval."
    ),
    options={"answer": "trained_forward_kl"},
    measured=True,
)
@on_page
def agreement(
    table: pd.DataFrame,
    *,
    scope: str = "within_budget",
    answer: str = "held_out_forward_kl",
    measure: str | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Rank agreement of the offline answers with one answer.

    Example: `dx.plot.agreement(tables["offline_agreement"])`. Rows are the other answers.

    Args:
        table: One row per (scope, x, y), with the columns kendall, low, high, cells and prompts.
        scope: The cells that are compared: within_budget, all, or budget_<share>. Over all of them
            larger budgets, which capture and teach more, raise the agreement by themselves.
        answer: The answer that the others are compared with.
        measure: The divergence of that answer, in place of the one in its name, where the table
            has it.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("scope", "x", "y", "kendall", "low", "high")
    table = style.keep(table, "figures.agreement", needs, {"scope": scope})
    rows, answer = _with_answer(table, answer, measure)
    figure, axes = style.canvas(page["width"], 0.85 + 0.2 * len(rows))
    style.zero(axes[0, 0], "x")
    style.lying(
        axes[0, 0],
        np.arange(len(rows)),
        rows,
        "kendall",
        marker="o",
        color=style.tone(BLUE),
        label="agreement",
    )
    axes[0, 0].set_xlim(-1.05, 1.05)
    if "p_permutation" in rows:
        _p_values(axes[0, 0], rows.p_permutation)
    axes[0, 0].set_xlabel(f"Kendall τ with {naming.readable(answer)}")
    style.names_down(axes[0, 0], rows.other)
    compared = "cells, compared at equal budgets" if scope == "within_budget" else "cells"
    cells = (
        f"{int(rows.cells.max())} {compared}; {int(rows.prompts.max())} prompts."
        if {"cells", "prompts"} <= set(rows)
        else ""
    )
    style.caption(figure, cells, style.bars(page["level"], table=table))
    return figure


def _with_answer(table: pd.DataFrame, answer: str, measure: str | None) -> tuple[pd.DataFrame, str]:
    """The rows that compare an answer with another, which `other` names, and the answer's name."""
    same = re.sub(r"(forward_kl|reverse_kl|js)$", measure or r"\1", answer)
    answer = same if same in {*table.x, *table.y} else answer
    sides = [
        table[table.y == answer].rename(columns={"x": "other"}),
        table[table.x == answer].rename(columns={"y": "other"}),
    ]
    rows = style.keep(pd.concat(sides, ignore_index=True), "figures.agreement", ("other",))
    if "cells" in rows and rows.cells.max() < FEW_CELLS:
        raise DiagnosticsError(
            f"The rank agreement of {int(rows.cells.max())} cells takes too few values to be drawn;"
            f" it takes {FEW_CELLS}. Compare more criteria or budgets."
        )
    return rows, answer


def _p_values(ax, values: pd.Series) -> None:
    """The p value of each row to the right of the axes."""
    for place, value in enumerate(values):
        x, y = 1.01, place
        words = p_words(value)
        ax.text(x, y, words, transform=ax.get_yaxis_transform(), va="center", gid=f"p {place}")
