"""Where a gain comes from: first-order prediction, sources of the gain, and whose loss helps
others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diagnostics.report import style
from diagnostics.report.figures.common import interval_of
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import BLUE, CYCLE, DOUBLE, MARKERS


@figure(
    table="linearity",
    title="Is the first-order prediction any good?",
    reading=(
        "Slope and squared correlation of realised on predicted gain, by step size. Attribution"
        " below stands on this prediction."
    ),
)
@style.plate
def linearity(
    table: pd.DataFrame, *, level: float | None = None, width: float = DOUBLE, dark: bool = False
) -> Figure:
    """Realised gain against its first-order prediction, by step size:
    `dx.plot.linearity(tables["linearity"])`.

    table: columns fraction, step_size, split, slope, slope_low, slope_high, r2, r2_low, r2_high,
    positions, prompts. A slope of 1 means that the step is small enough for the prediction; r2
    tells how well it orders positions."""
    needs = ("step_size", "split", "slope", "slope_low", "slope_high", "r2", "r2_low", "r2_high")
    table = style.halves(style.keep(table, "figures.linearity", needs))
    rows, columns = style.panels(2, width)
    figure, axes = style.canvas(width, 0.75 + 1.8 * rows, rows, columns, sharex=True)
    for ax, value, label in zip(
        axes.flat, ("slope", "r2"), ("slope, realised on predicted", "r²"), strict=True
    ):
        style.zero(ax, at=1.0)
        for index, split in enumerate(style.present(table.split, style.SPLITS)):
            color, marker, words = style.split_style(split, index)
            part = interval_of(table[table.split == split].sort_values("step_size"), value)
            style.upright(
                ax,
                part.step_size,
                part,
                value,
                marker=marker,
                linestyle="-",
                color=color,
                label=words,
            )
        ax.set_ylabel(label)
        ax.set_xscale("log")
        style.powers(ax.xaxis)
    for ax in axes[-1]:
        ax.set_xlabel("step size (learning rate)")
    style.legend(figure, axes[0, 0], 3)
    style.caption(figure, style.counts(table), style.bars(level))
    return figure


GROUPED = "Numbers 1 to 3: thirds from the lowest to the highest."
SOURCES = {
    "self": "itself",
    "own_context": "own context",
    "own_prompt": "own prompt's other contexts",
    "other_prompts": "other prompts",
}


@figure(
    table="kernel_shares",
    title="Whose loss moved a position?",
    reading=(
        "The first-order gain split by the position whose loss caused it. If *itself* is small, a "
        "position that gains is not thereby a position worth its own loss."
    ),
)
@style.plate
def kernel_shares(
    table: pd.DataFrame,
    *,
    kernel: str | None = None,
    groups: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Where a position's first-order gain comes from:
    `dx.plot.kernel_shares(tables["kernel_shares"])`.

    table: columns kernel, group, part (self, own_context, own_prompt, other_prompts), share,
    share_low, share_high, positions, prompts. kernel: output_layer or full; the widest that is
    there by default. Shares of a group sum to 1."""
    needs = ("kernel", "group", "part", "share", "share_low", "share_high")
    table = style.keep(
        table,
        "figures.kernel_shares",
        needs,
        {"part": list(SOURCES)} | ({"group": groups} if groups is not None else {}),
    )
    kernel = kernel or ("full" if (table.kernel == "full").any() else str(table.kernel.iloc[0]))
    table = style.keep(table, "figures.kernel_shares", needs, {"kernel": kernel})
    names, parts = style.present(table.group, groups or ()), style.present(table.part, SOURCES)
    figure, axes = style.canvas(width, 1.1 + 0.3 * len(names))
    ax = axes[0, 0]
    style.zero(ax, "x")
    for index, part in enumerate(parts):
        rows = interval_of(table[table.part == part], "share").set_index("group").reindex(names)
        place = np.arange(len(names)) + style.offsets(len(parts), 0.18)[index]
        style.lying(
            ax,
            place,
            rows,
            "share",
            marker=MARKERS[index],
            color=CYCLE[index],
            label=SOURCES[part],
            zorder=3,
        )
    ax.set_xlabel("share of the first-order gain")
    ax.xaxis.set_major_locator(MaxNLocator(7 if width > 5 else 4))
    ax.xaxis.set_major_formatter(FuncFormatter(style.percent))
    style.names_down(ax, names)
    style.legend(figure, ax, 4 if width > 5 else 2)
    style.caption(
        figure, style.counts(table), f"Kernel: {style.words(kernel)}.", GROUPED, style.bars(level)
    )
    return figure


@figure(
    table="lift",
    title="Whose loss helps the others?",
    reading=(
        "Each group's share of what the step does for held-out prompts, over its share of"
        " positions."
    ),
)
@style.plate
def lift(
    table: pd.DataFrame, *, level: float | None = None, width: float = DOUBLE, dark: bool = False
) -> Figure:
    """How much each group's losses do for held-out prompts: `dx.plot.lift(tables["lift"])`.

    table: columns group, enrichment, enrichment_low, enrichment_high, positions, prompts. At 1 a
    group lifts others as much as any position does on average."""
    table = style.keep(
        table, "figures.lift", ("group", "enrichment", "enrichment_low", "enrichment_high")
    )
    rows = interval_of(table, "enrichment")
    figure, axes = style.canvas(width, 0.8 + 0.2 * len(rows))
    style.zero(axes[0, 0], "x", 1.0)
    style.lying(
        axes[0, 0],
        np.arange(len(rows)),
        rows,
        "enrichment",
        marker="o",
        color=BLUE,
        label="enrichment",
    )
    axes[0, 0].set_xlabel("share of the lift / share of positions")
    style.names_down(axes[0, 0], rows.group)
    known = rows[["low", "high"]].notna().all(axis=1).any()
    ends = (
        style.bars(level)
        if known
        else (
            "No intervals: the lift as a whole is not clear of zero, and a share of it means"
            " little."
        )
    )
    style.caption(figure, style.counts(table), GROUPED, ends)
    return figure
