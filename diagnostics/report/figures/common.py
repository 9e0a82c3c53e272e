"""Parts of several figures: forests of estimates, curves over budgets, and the choice of criteria.

Everything here draws onto given axes or prepares a table; none of it estimates anything.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import naming, style
from diagnostics.report.figures.options import Intervals
from diagnostics.report.palette import KNOWN
from diagnostics.report.style import DASHES


def forest_order(table: pd.DataFrame, outcome: str, split: str, value: str) -> list[str]:
    """Criteria from the highest to the lowest `value` of one outcome and split, then the others."""
    rows = table[(table.outcome == outcome) & (table.split == split)]
    ordered = rows.sort_values(value, ascending=False, kind="stable").criterion.tolist()
    return style.present(table.criterion, ordered)


def forest(ax, table: pd.DataFrame, names: list[str], splits: list[str], value: str) -> None:
    """Draw a forest: one row per name, one mark with its interval per split.

    Args:
        ax: The axes to draw onto.
        table: One row per (criterion, split), with `value`, low and high.
        names: Criteria in the order of the rows, from the top.
        splits: Splits in the order of the marks within a row.
        value: The column of the estimates.
    """
    style.zero(ax, "x")
    ax.xaxis.set_major_locator(MaxNLocator(5 if style.is_wide(ax) else 3))
    for index, (split, offset) in enumerate(
        zip(splits, style.offsets(len(splits), 0.38), strict=True)
    ):
        color, marker, words = style.split_style(split, index)
        rows, y = (
            table[table.split == split].set_index("criterion").reindex(names),
            np.arange(len(names)) + offset,
        )
        style.lying(ax, y, rows, value, marker=marker, color=color, label=words, zorder=3)


MOST_APART = 2.5
"""Times the reach of one panel that a scale common to several panels may have."""


def one_scale(axes: Sequence, units: Sequence[str], axis: str = "y") -> str:
    """Give panels of one unit one scale, so that lengths can be compared between them.

    Panels keep scales of their own where the common one would press one of them together.

    Args:
        axes: The panels, drawn.
        units: The unit of each panel.
        axis: x or y.

    Returns:
        A sentence for the caption where panels of one unit have different scales; else empty.
    """
    apart = False
    for unit in dict.fromkeys(units):
        alike = [ax for ax, own in zip(axes, units, strict=True) if own == unit]
        limits = np.array([getattr(ax, f"get_{axis}lim")() for ax in alike])
        low, high = limits[:, 0].min(), limits[:, 1].max()
        if high - low > MOST_APART * np.ptp(limits, axis=1).min():
            apart = True
            continue
        for ax in alike:
            getattr(ax, f"set_{axis}lim")(low, high)
    return "The panels have scales of their own." if apart else ""


def thin_color_bar(figure: Figure, ax, artist, *, above: bool = False, **options):
    """Add a narrow color bar beside the axes, or above it, for an artist with a color map.

    On a figure of its own it is an inset of the axes, which keep their place; beside the user's own
    axes it takes its room from them, as matplotlib's color bars do.
    """
    place = "top" if above else "right"
    if style.sheet().axes is None:
        box = (0.1, 1.04, 0.8, 0.025) if above else (1.02, 0, 0.03, 1)
        inset = {"cax": ax.inset_axes(box), "location": place}
    else:
        inset = {"ax": ax, "location": place, "pad": 0.02, "aspect": 28}
    bar = figure.colorbar(artist, **inset, **options)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(width=0.5, length=2)
    return bar


STATISTICS = {
    "decomposition": "β(d̂ĉ) − β(d̂(1−ĉ))",
    "tertile_difference": "top − bottom",
    "matched_difference": "matched difference",
    "spearman_difference": "ρ(d̂ĉ) − ρ(d̂)",
    "interaction": "coefficient of d̂ĉ (nats)",
    "overlap_contrast": "weighted contrast (nats)",
    "q3_gap": "top − bottom (nats)",
    "within_strata": "mean ρ within strata of D",
}
"""Label of the axis for each statistic of a claim."""


def statistic_forest(
    table: pd.DataFrame,
    key: str,
    series: Sequence[tuple[str, str, str, pd.DataFrame]],
    statistic: str,
    outcomes: Sequence[str],
    page: Intervals,
) -> Figure:
    """Draw a forest with several series, and one panel per outcome.

    Args:
        table: All rows that are shown; its columns prompts and positions go into the caption.
        key: The column that names the rows of the forest.
        series: For each series its name, color, marker and rows; the rows hold `key`, outcome,
            estimate, low and high.
        statistic: What the estimates are: a key of `STATISTICS`, or words for the axis.
        outcomes: Forms of the gain, in the order of the panels.
        page: Width of the figure and level of the intervals.

    Returns:
        The figure.
    """
    names, outcomes = style.present(table[key], ()), style.present(table.outcome, outcomes)
    height = 1.2 + (0.14 * len(series) + 0.06) * len(names)
    long = page["width"] < style.WIDE and max(map(len, map(naming.readable, names))) > LONG_NAME
    down, across = style.panels(len(outcomes), page["width"], 1 if long else len(outcomes))
    figure, axes = style.canvas(page["width"], height * down, down, across, sharey=True)
    has_unit = statistic in ("tertile_difference", "matched_difference") and page["width"] > 5
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        style.zero(ax, "x")
        ax.xaxis.set_major_locator(MaxNLocator(5 if page["width"] > 5 else 3))
        _series_marks(ax, series, key, names, outcome)
        ax.set_title(naming.readable(outcome))
        unit = f" ({naming.UNITS.get(outcome, '')})" if has_unit else ""
        ax.set_xlabel(STATISTICS.get(statistic, naming.readable(statistic)) + unit)
    units = [naming.UNITS.get(outcome, "") for outcome in outcomes]
    scales = one_scale(list(axes.flat), units, "x")
    style.names_down(axes[0, 0], names)
    style.legend(figure, axes[0, 0], 4)
    where = {
        "tertile_difference": "Tertiles of Q3.",
        "matched_difference": "Q3, matched within a prompt.",
    }.get(statistic, "")
    bars = style.bars(page["level"], table=table)
    style.caption(figure, style.counts(table), where, scales, bars)
    return figure


LONG_NAME = 16
"""Letters of a row's name beyond which panels stand below one another on a phone."""


def _series_marks(ax, series, key: str, names: list[str], outcome: str) -> None:
    """Draw the marks of every series for one outcome, side by side within a row."""
    places = style.offsets(len(series), 0.7 / max(len(series), 2))
    for offset, (label, color, marker, rows) in zip(places, series, strict=True):
        rows = rows[rows.outcome == outcome].drop_duplicates(key).set_index(key).reindex(names)
        y, look = np.arange(len(names)) + offset, {"marker": marker, "color": color}
        style.lying(ax, y, rows, "estimate", label=label, zorder=3, **look)


class BudgetTicks(FixedLocator):
    """Ticks at the budgets, from the largest down, as many as have room for their labels."""

    GAP = 0.7
    """Least distance of two labels, of the size of their text."""

    def __call__(self):
        """The budgets that have a tick at the present size of the panel."""
        ax, pixels = self.axis.axes, self.axis.axes.get_figure().dpi / 72
        low, high = sorted(self.axis.get_view_interval())
        if not 0 < low < high:  # nothing is drawn yet
            return np.array(self.locs)
        decades = np.log10(high / low)
        size = FontProperties(size=self.axis.get_tick_params()["labelsize"]).get_size_in_points()
        shown: list[float] = []
        for budget in sorted({float(each) for each in self.locs if each > 0}, reverse=True):
            if shown:
                away = np.log10(shown[-1] / budget) / decades * ax.bbox.width / pixels
                halves = (
                    style.text_width(style.percent(each), size) for each in (shown[-1], budget)
                )
                if away < sum(halves) / 2 + self.GAP * size:
                    continue
            shown.append(budget)
        return np.array(shown[::-1])


def budget_axis(ax, budgets: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are the budgets themselves, as far as they have room."""
    shown = sorted({float(budget) for budget in budgets})
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(BudgetTicks(shown))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(style.percent))
    if len(shown) == 1:
        ax.set_xlim(shown[0] / 2, shown[0] * 2)


def interval_of(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The table with `value`_low and `value`_high as its columns low and high."""
    return table.assign(low=table[f"{value}_low"], high=table[f"{value}_high"])


MANY = 9
"""Criteria that one panel of lines shows at most."""
GREY = ("random", "full", "placebo")


def shown_criteria(table: pd.DataFrame, criteria: Sequence[str] | None) -> list[str]:
    """The named criteria; without names all of them, or, where there are more than `MANY`, the
    usual six, then those of the user's own, then those with the highest values. What is left out is
    counted in the caption.

    Raises:
        DiagnosticsError: A named criterion is not in the table.
    """
    names = [
        name
        for name in style.present(table.criterion, ())
        if name not in ("random", "full", "placebo")
    ]
    if criteria is not None:
        known = [*names, *GREY]
        if wrong := [name for name in criteria if name not in known]:
            near = difflib.get_close_matches(wrong[0], names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DiagnosticsError(
                f"The table has no criterion {wrong[0]!r}.{hint} It has: {', '.join(names)}."
            )
        return [name for name in criteria if name in names]
    if len(names) <= MANY:
        return names
    value = next((name for name in ("captured_share", "reduction") if name in table), None)
    best = table.groupby("criterion")[value].mean() if value else pd.Series(dtype=float)
    others = [name for name in names if name not in style.CRITERIA]
    others.sort(key=lambda name: (name in KNOWN or name in GREY, -best.get(name, 0.0)))
    usual = [name for name in style.CRITERIA if name in names]
    shown = {*usual, *others[: MANY - len(usual)]}
    style.sheet().left_out = len(names) - len(shown)
    return [name for name in names if name in shown]


def mark(index: int, name: str = "") -> dict[str, str]:
    """Color and marker of a series by its number, or the color that the palette gives its name."""
    return style.series_style(name, index)


def ring(ax, x, rows: pd.DataFrame, value: str, color: str) -> None:
    """A ring around each cell whose selection was decided by ties."""
    tied = style.ambiguous(rows)
    if tied.any():
        look = {"markerfacecolor": "none", "markeredgecolor": color, "markersize": 8.5}
        x, y = np.asarray(x, float)[tied], rows[value].to_numpy(float)[tied]
        ax.plot(x, y, "o", markeredgewidth=0.7, label="_ambiguous", **look)


def reduction_curves(ax, table: pd.DataFrame, names: list[str], *, bars: bool = False) -> None:
    """Draw one line per criterion over its budgets.

    Args:
        ax: The axes to draw onto.
        table: One row per (criterion, budget), with reduction, low and high, sorted by budget. The
            criteria `full` and `placebo` become level lines; cells whose column `ambiguous` is
            above the limit are ringed.
        names: Criteria to draw besides random.
        bars: Whether intervals are bars, set side by side, which suits a few budgets; otherwise
            they are bands.
    """
    ax.set_xscale("log")
    for name, line in (
        ("full", {"color": style.ink(), "linestyle": "-"}),
        ("placebo", {"color": style.quiet(), "linestyle": DASHES[2]}),
    ):
        for row in table[table.criterion == name].head(1).itertuples():
            ax.axhline(row.reduction, linewidth=1.0, label=name, **line)
            ax.axhspan(row.low, row.high, color=line["color"], alpha=0.08, linewidth=0)
    lines = {name: style.criterion_style(name, names) for name in ("random", *names)}
    for (name, line), shift in zip(lines.items(), style.offsets(len(lines), 0.045), strict=True):
        rows = table[table.criterion == name]
        x = rows.budget * np.exp(shift if bars else 0.0)
        if bars and len(rows):
            style.upright(
                ax, x, rows, "reduction", label=naming.readable(name), **line | {"linewidth": 0.8}
            )
        elif len(rows):
            style.band(ax, x, rows, line["color"])
            ax.plot(x, rows.reduction, label=naming.readable(name), **line)
        ring(ax, x, rows, "reduction", line["color"])
    style.zero(ax)
    budget_axis(ax, table.budget[~table.criterion.isin(("full", "placebo"))])
