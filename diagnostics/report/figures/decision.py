"""Which criterion to train with: the grid of the decision, and whether it foresaw training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from diagnostics.analysis.config import PrimaryChoices
from diagnostics.core.shown import by_uncertainty
from diagnostics.report import naming, style
from diagnostics.report.figures.options import Intervals, on_page
from diagnostics.report.figures.registry import figure

VERDICTS = {
    "better": ("#8CC4E8", "▲", "better than random"),
    "worse": ("#F2A66B", "▼", "worse than random"),
    "no difference shown": ("#C9CED4", "=", "no difference shown"),
    "cannot tell": ("none", "?", "cannot tell"),
    "not judged": ("none", "–", "not judged"),
}
"""Color, sign and words of each verdict on a cell. The sign repeats the color."""
ON_TINT = "#000000"
"""Ink on a tinted cell, the same on a light and on a dark page."""


@figure(
    table="decision",
    title="Which criterion beats random, at which budget?",
    reading=(
        "Each cell is the drop of the held-out divergence with loss on the criterion's positions"
        " alone, minus that with as many random ones, at the horizon below, with half its interval."
        " Hatched: ties decide more than a tenth of the selection, so the cell is no verdict on the"
        " criterion. A frame marks what the decision recommends, a dagger an overfitted cell."
    ),
    measured=True,
)
@on_page
def decision(
    table: pd.DataFrame,
    *,
    measure: str | None = None,
    horizon: int | None = None,
    criteria: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Grid of criteria and budgets: better than random, worse, no different, or open.

    Example: `dx.plot.decision(tables["decision"])`. Colors and signs name the verdict of a cell;
    the number is the difference to random with half its interval. Criteria are ordered by the
    difference at the budget nearest to 5 %.

    Args:
        table: One row per (criterion, budget, horizon, measure), with the columns over_random,
            over_random_low, over_random_high (nats), verdict and, where they are known, ambiguous,
            overfitted, recommended, prompts and steps.
        measure: The divergence whose drop is shown; where None, the one that the table's column
            primary marks, otherwise its first.
        horizon: The number of optimizer steps; where None, the one that the table's column primary
            marks, otherwise the largest that is not overfitted everywhere.
        criteria: Names of the criteria to show; all of the table but random and full where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    what, needs = (
        "figures.decision",
        ("criterion", "budget", "horizon", "measure", *OVER_RANDOM, "verdict"),
    )
    where = {} if criteria is None else {"criterion": criteria}
    table = style.keep(table, what, needs, where)
    measure = measure or naming.decisive_measure(table)
    table = style.keep(table, what, needs, {"measure": measure})
    table = naming.of_all_rollouts(table)
    horizon = naming.decisive_horizon(table) if horizon is None else horizon
    table = style.keep(table, what, needs, {"horizon": horizon})
    table = style.keep(table[~table.criterion.isin(NO_ROW)], what, needs)
    names, budgets = _ordered(table), sorted(table.budget.unique())
    figure, axes = style.canvas(page["width"], 1.15 + 0.36 * len(names))
    _cells(axes[0, 0], table, names, budgets)
    _grid_axes(axes[0, 0], names, budgets)
    _key(figure, axes[0, 0], table, 4 if page["width"] > 5 else 2)
    style.caption(
        figure,
        f"Drop of {naming.readable(measure)} over random, in nats per position,"
        f" {naming.steps(horizon)}.",
        style.counts(table),
        "± is half of an interval; verdicts are after Holm.",
        style.bars(page["level"], "Verdicts", table=table),
        "†: overfitted." if style.flagged(table, "overfitted").any() else "",
    )
    return figure


NO_ROW = ("random", "full", "placebo")
"""Criteria that the others are compared with; they have no row of their own."""
OVER_RANDOM = ("over_random", "over_random_low", "over_random_high")


def _ordered(table: pd.DataFrame) -> list[str]:
    """Criteria by their difference to random at the budget nearest to 5 %, then the others."""
    selected = table[table.budget < 1]
    nearest = style.nearest_budget(selected if len(selected) else table)
    rows = table[np.isclose(table.budget, nearest)]
    ranked = rows.sort_values("over_random", ascending=False, kind="stable").criterion
    return style.present(table.criterion, ranked)


def _cells(ax, table: pd.DataFrame, names: list[str], budgets: list[float]) -> None:
    """A tinted rectangle per cell with its sign and number; hatched where ties decide."""
    table = table.assign(tied=style.ambiguous(table))
    for flag in ("overfitted", "recommended"):
        table[flag] = style.flagged(table, flag)
    narrow = not style.is_wide(ax) and len(budgets) > 2
    for row in table.itertuples():
        x, y = budgets.index(row.budget), names.index(row.criterion)
        tint, sign, _ = VERDICTS.get(row.verdict, VERDICTS["cannot tell"])
        box = {"facecolor": tint, "edgecolor": style.quiet(), "linewidth": 0.4}
        ax.add_patch(
            Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, hatch="////" if row.tied else None, **box)
        )
        if row.recommended:
            frame = {"facecolor": "none", "edgecolor": style.ink(), "linewidth": 1.8}
            ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, zorder=3, **frame))
        ax.text(
            x,
            y,
            _cell_words(row, sign, "\n" if narrow else " "),
            ha="center",
            va="center",
            fontsize=style.text_size(2 if narrow else 1),
            color=style.ink() if tint == "none" else ON_TINT,
            gid=f"{row.criterion} {row.budget:g}",
            zorder=4,
            bbox={"facecolor": tint if tint != "none" else style.paper(), "edgecolor": "none"}
            | {"pad": 0.6}
            if row.tied
            else None,
        )


def _cell_words(row, sign: str, between: str) -> str:
    """`▲ +.033 ±.012`; a sign alone where the difference is undefined."""
    if not np.isfinite(row.over_random):
        return sign
    half = (row.over_random_high - row.over_random_low) / 2
    dagger = "†" if row.overfitted else ""
    spread = f"{between}±{_short(half, half)}" if np.isfinite(half) else ""
    return f"{sign} {_short(row.over_random, half, sign=True)}{spread}{dagger}"


def _short(value: float, half: float, *, sign: bool = False) -> str:
    """A number with the digits that its interval allows, without a leading zero."""
    text = by_uncertainty(value, half, sign=sign)
    return re.sub(r"^([+-]?)0\.", r"\1.", text).replace("-", "−")


def _grid_axes(ax, names: list[str], budgets: list[float]) -> None:
    style.names_down(ax, names)
    ax.set_xlim(-0.55, len(budgets) - 0.45)
    ax.set_xticks(range(len(budgets)), [style.percent(budget) for budget in budgets])
    ax.set_xlabel("budget (share of positions)")
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def _key(figure: Figure, ax, table: pd.DataFrame, columns: int) -> None:
    """A legend of the verdicts that the grid has, and of the hatch."""
    seen = [name for name in VERDICTS if (table.verdict == name).any()]
    edge = {"edgecolor": style.quiet(), "linewidth": 0.4}
    patches = [
        Patch(facecolor=VERDICTS[name][0], label=f"{VERDICTS[name][1]} {VERDICTS[name][2]}", **edge)
        for name in seen
    ]
    if style.ambiguous(table).any():
        patches.append(Patch(facecolor="none", hatch="////", label="ties decide", **edge))
    style.legend(figure, ax, columns, *patches, full=True)


SIDES = ("offline", "trained")
FORESIGHT = (
    "criterion",
    "budget",
    "horizon",
    "measure",
    *(f"{side}_{end}" for side in SIDES for end in ("difference", "low", "high")),
)


@figure(
    table="foresight_signs",
    title="Did the horizon foresee the training?",
    reading=(
        "Each mark is one criterion at one budget: across its difference to random on the frozen"
        " bank, upwards the same difference after training. In the shaded quarters both have one"
        " sign. Filled marks are cells whose trained difference is clear of zero; only those can"
        " be foreseen or missed."
    ),
    measured=True,
)
@on_page
def foresight(
    table: pd.DataFrame,
    *,
    measure: str | None = None,
    horizons: Sequence[int] | None = None,
    marked: int = PrimaryChoices.horizon,
    **page: Unpack[Intervals],
) -> Figure:
    """Difference to random on the frozen bank against the same difference after training.

    Example: `dx.plot.foresight(tables["foresight_signs"])`. One panel per horizon; in the shaded
    quarters the signs agree. Filled marks are cells whose trained interval excludes zero.

    Args:
        table: One row per (criterion, budget, horizon, measure), with the columns
            offline_difference, offline_low, offline_high, trained_difference, trained_low,
            trained_high (nats) and, where they are known, ambiguous and overfitted.
        measure: The divergence; the table's first where None.
        horizons: Horizons to show, one panel for each; all of the table where None.
        marked: The horizon at which the decision is taken, for its panel's title.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    what, needs = "figures.foresight", FORESIGHT
    table = style.keep(table, what, needs)
    measure = measure or str(table.measure.iloc[0])
    table = style.keep(table, what, needs, {"measure": measure})
    if horizons is not None:
        table = style.keep(table, what, needs, {"horizon": list(horizons)})
    shown, names = sorted(table.horizon.unique()), style.present(table.criterion, ())
    down, across = style.panels(len(shown), page["width"], 2 if page["width"] > 5 else 1)
    figure, axes = style.canvas(page["width"], 0.9 + 2.1 * down, down, across, sharey=True)
    for ax, horizon in zip(axes.flat, shown, strict=False):
        _foreseen(ax, table[table.horizon == horizon], names)
        ax.set_title(f"{naming.steps(horizon)}{' (the decision’s)' if horizon == marked else ''}")
        ax.set_xlabel("over random on the frozen bank (nats)")
    for ax in axes[:, 0]:
        ax.set_ylabel("over random after training (nats)")
    style.hide_rest(axes, len(shown))
    style.legend(figure, axes[0, 0], 5 if page["width"] > 5 else 3)
    style.caption(
        figure,
        f"Drop of {naming.readable(measure)}; a larger mark is a larger budget.",
        *(_signs(table[table.horizon == horizon], horizon) for horizon in shown),
        style.tie_words(table),
        style.bars(page["level"], table=table),
    )
    return figure


def _clear(table: pd.DataFrame) -> np.ndarray:
    """[N] whether the trained interval excludes zero."""
    return ((table.trained_low > 0) | (table.trained_high < 0)).to_numpy()


def _signs(table: pd.DataFrame, horizon: int) -> str:
    """How many of the cells that training settled have the offline difference's sign."""
    clear = table[_clear(table) & ~style.ambiguous(table)]
    same = np.sign(clear.offline_difference) == np.sign(clear.trained_difference)
    agree = int(same.sum())
    what = naming.steps(horizon)
    return f"{what[0].upper()}{what[1:]}: sign right in {agree} of {len(clear)} settled cells."


def _foreseen(ax, table: pd.DataFrame, names: list[str]) -> None:
    """The cells of one horizon, and the two quarters in which the signs agree."""
    table = table.assign(clear=_clear(table), tied=style.ambiguous(table))
    for name in names:
        line = style.criterion_style(name, names)
        rows = table[table.criterion == name].sort_values("budget").to_dict("records")
        for number, cell in enumerate(rows):
            face = line["color"] if cell["clear"] else style.paper()
            look = {"marker": line["marker"], "color": line["color"], "markerfacecolor": face}
            ax.errorbar(
                [cell["offline_difference"]],
                [cell["trained_difference"]],
                xerr=_reach(cell, "offline"),
                yerr=_reach(cell, "trained"),
                elinewidth=0.8,
                capsize=0,
                linestyle="none",
                markersize=3.2 + 1.2 * number,
                label=naming.readable(name) if number == 0 else f"_{name} {number}",
                **look,
            )
            if cell["tied"]:
                ring = {"markerfacecolor": "none", "markeredgecolor": line["color"]}
                ax.plot(
                    cell["offline_difference"],
                    cell["trained_difference"],
                    "o",
                    markersize=10 + number,
                    label="_ambiguous",
                    **ring,
                )
    _quarters(ax)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def _reach(cell: dict, name: str) -> list[list[float]]:
    value = cell[f"{name}_difference"]
    ends = (value - cell[f"{name}_low"], cell[f"{name}_high"] - value)
    return [[max(end, 0.0)] for end in ends]


def _quarters(ax) -> None:
    """Shade the two quarters of one sign, within the view."""
    style.zero(ax)
    style.zero(ax, "x")
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    shade = {"facecolor": style.quiet(), "alpha": 0.1, "linewidth": 0, "zorder": 0}
    if right > 0 and top > 0:
        ax.add_patch(Rectangle((0, 0), right, top, gid="agree", **shade))
    if left < 0 and bottom < 0:
        ax.add_patch(Rectangle((left, bottom), -left, -bottom, gid="agree", **shade))
    ax.set(xlim=(left, right), ylim=(bottom, top))
