"""What several figures share: forests of estimates, curves over budgets, and the choice of
criteria.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diagnostics.report import style
from diagnostics.report.style import CYCLE, DASHES, MARKERS

BOTH = ("gain", "relative_gain")


def forest_order(table: pd.DataFrame, outcome: str, split: str, value: str) -> list[str]:
    rows = table[(table.outcome == outcome) & (table.split == split)]
    ordered = rows.sort_values(value, ascending=False, kind="stable").criterion.tolist()
    return style.present(table.criterion, ordered)


def forest(ax, table: pd.DataFrame, names: list[str], splits: list[str], value: str) -> None:
    style.zero(ax, "x")
    ax.xaxis.set_major_locator(MaxNLocator(5 if ax.figure.get_figwidth() > 5 else 3))
    for index, (split, offset) in enumerate(
        zip(splits, style.offsets(len(splits), 0.38), strict=True)
    ):
        color, marker, words = style.split_style(split, index)
        rows, y = (
            table[table.split == split].set_index("criterion").reindex(names),
            np.arange(len(names)) + offset,
        )
        style.lying(ax, y, rows, value, marker=marker, color=color, label=words, zorder=3)
        if "placebo" in rows:
            ax.plot(
                rows.placebo.to_numpy(float),
                y,
                zorder=2,
                label=f"_placebo {split}",
                **style.diamond(color),
            )


def thin_color_bar(figure: Figure, ax, artist, **options):
    bar = figure.colorbar(artist, ax=ax, pad=0.02, aspect=28, **options)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(width=0.5, length=2)
    return bar


STATISTICS = {
    "decomposition": "β(d̂ĉ) − β(d̂(1−ĉ))",
    "tertile_difference": "top − bottom",
    "matched_difference": "matched difference",
    "spearman_difference": "ρ(d̂ĉ) − ρ(d̂)",
}


def statistic_forest(table, key, series, statistic, outcomes, level, width) -> Figure:
    """Rows by `key`, one mark for each of the series (words, colour, marker, rows), a panel for
    each outcome.
    """
    names, outcomes = list(dict.fromkeys(table[key])), style.present(table.outcome, outcomes)
    spread = 0.7 / max(len(series), 2)
    figure, axes = style.canvas(
        width, 1.2 + (0.14 * len(series) + 0.06) * len(names), 1, len(outcomes), sharey=True
    )
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        style.zero(ax, "x")
        ax.xaxis.set_major_locator(MaxNLocator(5 if width > 5 else 3))
        for offset, (words, color, marker, rows) in zip(
            style.offsets(len(series), spread), series, strict=True
        ):
            rows = rows[rows.outcome == outcome].drop_duplicates(key).set_index(key).reindex(names)
            style.lying(
                ax,
                np.arange(len(names)) + offset,
                rows,
                "estimate",
                marker=marker,
                color=color,
                label=words,
                zorder=3,
            )
        unit = (
            f" ({style.UNITS.get(outcome, '')})"
            if statistic in ("tertile_difference", "matched_difference")
            else ""
        )
        ax.set_title(style.words(outcome))
        ax.set_xlabel(
            STATISTICS.get(statistic, style.words(statistic)) + (unit if width > 5 else "")
        )
    style.names_down(axes[0, 0], names)
    style.legend(figure, axes[0, 0], 4)
    where = {
        "tertile_difference": "Tertiles of Q3.",
        "matched_difference": "Q3, matched within a prompt.",
    }.get(statistic, "")
    style.caption(figure, style.counts(table), where, style.bars(level))
    return figure


def interval_of(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The table with the ends of that value's interval as low and high."""
    return table.assign(low=table[f"{value}_low"], high=table[f"{value}_high"])


def shown_criteria(table: pd.DataFrame, criteria: Sequence[str] | None) -> list[str]:
    """The named criteria, or all where six lines can hold them, or the usual six."""
    names = [
        name for name in dict.fromkeys(table.criterion) if name not in ("random", "full", "placebo")
    ]
    if criteria is not None:
        return [name for name in criteria if name in names]
    return (
        names
        if len(names) <= len(CYCLE)
        else [name for name in style.CRITERIA if name in names] or names[: len(CYCLE)]
    )


def mark(index: int) -> dict:
    return {"color": CYCLE[index % len(CYCLE)], "marker": MARKERS[index % len(MARKERS)]}


def reduction_curves(ax, table: pd.DataFrame, names: list[str], *, bars: bool = False) -> None:
    """A line a criterion over its budgets, with bands, or with bars side by side where budgets are
    few.
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
                ax, x, rows, "reduction", label=style.words(name), **line | {"linewidth": 0.8}
            )
        elif len(rows):
            style.band(ax, x, rows, line["color"])
            ax.plot(x, rows.reduction, label=style.words(name), **line)
    style.zero(ax)
    style.powers(ax.xaxis)
    ax.xaxis.set_major_formatter(FuncFormatter(style.percent))
