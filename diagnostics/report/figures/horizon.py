"""What several optimizer steps do: curves over the horizon, and where the bank is overfitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from diagnostics.report import naming, style
from diagnostics.report.figures.common import one_scale, ring, shown_criteria
from diagnostics.report.figures.options import Intervals, on_page
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import DASHES, GREEN

NEEDS = ("criterion", "budget", "horizon", "population", "measure", "reduction", "low", "high")
POPULATIONS = ("held_out", "step", "fresh")


@figure(
    table="horizon",
    title="How far the frozen bank carries",
    reading=(
        "Drop of the divergence after each number of optimizer steps at the training's learning"
        " rate, with loss on all positions of the step contexts. Where the held-out drop falls"
        " below an earlier one while that of the step contexts still grows, the bank is overfitted:"
        " from there on the line is dashed and its marks are hollow, and nothing is concluded."
        " Fresh responses were sampled anew from the moved student."
    ),
    measured=True,
)
@on_page
def horizon(
    table: pd.DataFrame,
    *,
    measure: str | None = None,
    criterion: str | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Drop of the divergence over a short trajectory, by population.

    Example: `dx.plot.horizon(tables["horizon"])`. Lines are held-out contexts, step contexts and,
    where they were sampled, fresh responses. From the first overfitted horizon on a line is dashed
    and its marks are hollow.

    Args:
        table: One row per (criterion, budget, horizon, population, measure), with the columns
            reduction, low, high (nats), overfitted, positions and prompts.
        measure: The divergence whose drop is shown; the table's first where None.
        criterion: The criterion to show; the table's first where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    what, table = "figures.horizon", _with_population(table)
    table = style.keep(table, what, NEEDS)
    measure = measure or str(table.measure.iloc[0])
    criterion = criterion or str(table.criterion.iloc[0])
    table = style.keep(table, what, NEEDS, {"measure": measure, "criterion": criterion})
    table = style.keep(table[table.horizon > 0], what, NEEDS)
    shown = style.present(table.population, POPULATIONS)
    alone = _off_scale(table)
    down, across = style.panels(1 + len(alone), page["width"])
    figure, axes = style.canvas(page["width"], 2.9 * down, down, across)
    for name, shift in zip(shown, style.offsets(len(shown), 0.05), strict=True):
        color, marker, words = _population(name)
        rows = table[table.population == name].sort_values("horizon")
        ax = axes.flat[1 + alone.index(name) if name in alone else 0]
        _curve(ax, rows, {"color": color, "marker": marker}, words, shift)
    _axes(axes, table, measure)
    style.legend(figure, axes[0, 0], 3)
    for ax, name in zip(axes.flat[1:], alone, strict=True):
        ax.set_title(f"{_population(name)[2]} (a scale of its own)")
    style.caption(figure, *_words(table, page["level"]))
    return figure


OFF_SCALE = 4.0
"""How many times as far as the other lines a line may reach before it gets a panel of its own."""


def _off_scale(table: pd.DataFrame) -> list[str]:
    """Populations that would flatten the others to the axis: fresh text, whose interval carries the
    sampling of both texts, beside a step that moved little.
    """
    reach = table[["reduction", "low", "high"]].abs().max(axis=1).groupby(table.population).max()
    others = reach[reach.index != "fresh"].max()
    own = style.sheet().axes
    room = own is None or own.size > 1
    return ["fresh"] if room and reach.get("fresh", 0.0) > OFF_SCALE * others > 0 else []


@figure(
    table="intervention",
    title="Criteria over several steps",
    reading=(
        "The same short trajectory with loss on the selected positions alone, one line per"
        " criterion. One step can order criteria otherwise than training does; ten to twenty steps"
        " on the frozen bank ordered them alike on the embedded pair, and a hundred overfitted it."
        " Dashed lines and hollow marks are beyond that point."
    ),
    needs=("horizon",),
    measured=True,
)
@on_page
def horizon_criteria(
    table: pd.DataFrame,
    *,
    measure: str | None = None,
    budget: float | None = None,
    criteria: Sequence[str] | None = None,
    groups: Sequence[str] = ("held_out", "step"),
    **page: Unpack[Intervals],
) -> Figure:
    """Drop of the divergence over the horizon, one line per criterion.

    Example: `dx.plot.horizon_criteria(dx.intervene(pair, bank, horizon=(1, 5, 20)))`. From the
    first overfitted horizon on a line is dashed and its marks are hollow; a ring means that ties
    decide much of the selection.

    Args:
        table: One row per (criterion, budget, horizon, group, measure), with the columns reduction,
            low, high (nats), overfitted, ambiguous, positions and prompts.
        measure: The divergence whose drop is shown; the table's first where None.
        budget: The budget to show beside full; the table's nearest to 5 % where None.
        criteria: Names of the criteria to show; where None all of them, or the usual six where
            there are more than six.
        groups: Groups of positions to show, one panel for each.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    what, table = "figures.horizon_criteria", _with_population(table)
    table = style.keep(table, what, NEEDS)
    measure = measure or str(table.measure.iloc[0])
    table = style.keep(table, what, NEEDS, {"measure": measure, "population": groups})
    table = style.keep(table[table.horizon > 0], what, NEEDS)
    selected = table[~table.criterion.isin(("full", "placebo"))]
    budget = style.nearest_budget(selected) if budget is None and len(selected) else budget
    table = table[(table.criterion == "full") | np.isclose(table.budget, budget or 1.0)]
    names = [name for name in ("full", "random") if (table.criterion == name).any()]
    names += shown_criteria(table, criteria)
    shown = style.present(table.population, groups)
    rows, columns = style.panels(len(shown), page["width"])
    figure, axes = style.canvas(page["width"], 0.8 + 2.2 * rows, rows, columns, sharex=True)
    for ax, population in zip(axes.flat, shown, strict=True):
        part = table[table.population == population].sort_values("horizon")
        for name, shift in zip(names, style.offsets(len(names), 0.035), strict=True):
            line = style.criterion_style(name, names)
            line |= {"marker": "."} if line["marker"] == "None" else {}
            rows = part[part.criterion == name]
            _curve(ax, rows, line, naming.readable(name), shift)
            ring(ax, rows.horizon * np.exp(shift), rows, "reduction", line["color"])
        ax.set_title(naming.SPLITS.get(population, naming.readable(population)))
    _axes(axes, table, measure)
    scales = one_scale(list(axes.flat), ["nats"] * axes.size)
    style.legend(figure, axes[0, 0], 4 if page["width"] > 5 else 2)
    share = f"Budget {budget:.0%}." if budget is not None else ""
    words = _words(table, page["level"])
    style.caption(figure, share, scales, *words, style.tie_words(table))
    return figure


def _population(name: str) -> tuple[str, str, str]:
    """Color, marker and name of who was measured."""
    if name in style.SPLITS:
        return style.split_style(name)
    words = naming.labelled(name, naming.SPLITS.get(name, name))
    return style.color_of(name, style.tone(GREEN)), "D", words


def _with_population(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the name that both kinds of it share for who was measured."""
    return table if "population" in table else table.rename(columns={"group": "population"})


def _curve(ax, rows: pd.DataFrame, line: dict, label: str, shift: float) -> None:
    """One line over the horizons; dashed with hollow marks from the first overfitted one on."""
    x = rows.horizon.to_numpy(float) * np.exp(shift)
    over = np.maximum.accumulate(style.flagged(rows, "overfitted"))
    look = {name: line[name] for name in ("color", "marker")} | {"markersize": 4}
    kept, lost = rows[~over], rows[over]
    if len(kept) or len(lost):
        style.upright(ax, x[~over], kept, "reduction", linestyle="-", label=label, zorder=3, **look)
    if len(lost):
        hollow = look | {"markerfacecolor": style.paper()}
        options = {"linestyle": "none", "label": f"_{label} overfitted", "zorder": 3}
        style.upright(ax, x[over], lost, "reduction", **options, **hollow)
        first = max(int(over.argmax()) - 1, 0)
        values = rows.reduction.to_numpy(float)[first:]
        ax.plot(x[first:], values, color=line["color"], linestyle=DASHES[2], label="_beyond")


def _axes(axes: np.ndarray, table: pd.DataFrame, measure: str) -> None:
    """Steps across on a logarithmic axis with a tick for each horizon, the drop upwards."""
    ticks = sorted(table.horizon.unique())
    for ax in axes.flat:
        style.zero(ax)
        ax.set_xscale("log")
        if len(ticks) == 1:  # marks that stand aside belong to one horizon, not to a range
            ax.set_xlim(ticks[0] / 2, ticks[0] * 2)
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_major_locator(MaxNLocator(5))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"drop of {naming.readable(measure)} (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("optimizer steps")


def _words(table: pd.DataFrame, level: float | None) -> tuple[str, ...]:
    """Counts, intervals and what is overfitted, for the caption."""
    over = "Dashed and hollow: the frozen contexts are overfitted."
    return (
        style.counts(table.rename(columns={"population": "split"})),
        style.bars(level, table=table),
        over if style.flagged(table, "overfitted").any() else "",
    )
