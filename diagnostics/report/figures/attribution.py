"""Where a gain comes from: first-order prediction, sources of the gain, and whose loss helps
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import naming, style
from diagnostics.report.figures.common import interval_of
from diagnostics.report.figures.options import Intervals, on_page
from diagnostics.report.figures.registry import figure
from diagnostics.report.sources import lift_can_be_read, readable_kernel
from diagnostics.report.style import BLUE


@figure(
    table="linearity",
    title="Is the first-order prediction any good?",
    reading=(
        "Slope and squared correlation of realised on predicted gain, by step size. Attribution"
        " below stands on this prediction."
    ),
)
@on_page
def linearity(
    table: pd.DataFrame,
    **page: Unpack[Intervals],
) -> Figure:
    """Slope and r² of the realized on the predicted gain, by step size.

    Example: `dx.plot.linearity(tables["linearity"])`. A slope of 1 means that the step is small
    enough for the first-order prediction; r² says how well the prediction orders positions.

    Args:
        table: One row per (step_size, split), with the columns slope, slope_low, slope_high, r2,
            r2_low, r2_high, positions and prompts.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("step_size", "split", "slope", "slope_low", "slope_high", "r2", "r2_low", "r2_high")
    table = style.halves(style.keep(table, "figures.linearity", needs))
    rows, columns = style.panels(2, page["width"])
    figure, axes = style.canvas(page["width"], 0.75 + 1.8 * rows, rows, columns, sharex=True)
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
    style.caption(figure, style.counts(table), style.bars(page["level"], table=table))
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
        "The first-order gain split by the position whose loss caused it. If “itself” is small, a "
        "position that gains is not thereby a position worth its own loss."
    ),
)
@on_page
def kernel_shares(
    table: pd.DataFrame,
    *,
    kernel: str | None = None,
    groups: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Shares of a position's first-order gain by where the loss that caused it stood.

    Example: `dx.plot.kernel_shares(tables["kernel_shares"])`. The shares of one group sum to 1.

    Args:
        table: One row per (kernel, group, part), with the columns share, share_low, share_high,
            positions and prompts; part is self, own_context, own_prompt or other_prompts.
        kernel: output_layer or full; where None, the one whose shares can be read, full first.
        groups: Groups of positions to show; all of the table where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, no row remains to be shown, or no kernel is named and
            the intervals of all are wider than the gain itself.
    """
    needs = ("kernel", "group", "part", "share", "share_low", "share_high")
    table = style.keep(
        table,
        "figures.kernel_shares",
        needs,
        {"part": list(SOURCES)} | ({"group": groups} if groups is not None else {}),
    )
    kernel = kernel or readable_kernel(table)
    if kernel is None:
        raise DiagnosticsError(
            "Shares whose intervals are wider than the whole gain are not drawn; the table"
            " kernel_shares has them. Attribute with more prompts, or name a kernel."
        )
    table = style.keep(table, "figures.kernel_shares", needs, {"kernel": kernel})
    names, parts = style.present(table.group, groups or ()), style.present(table.part, SOURCES)
    figure, axes = style.canvas(page["width"], 1.1 + 0.3 * len(names))
    ax = axes[0, 0]
    style.zero(ax, "x")
    _parts(ax, table, parts, names)
    ax.set_xlabel("share of the first-order gain")
    ax.xaxis.set_major_locator(MaxNLocator(7 if page["width"] > 5 else 4))
    ax.xaxis.set_major_formatter(FuncFormatter(style.percent))
    style.names_down(ax, names)
    style.legend(figure, ax, 4 if page["width"] > 5 else 2)
    style.caption(
        figure,
        style.counts(table),
        f"Kernel: {naming.readable(kernel)}.",
        GROUPED,
        style.bars(page["level"], table=table),
    )
    return figure


def _parts(ax, table: pd.DataFrame, parts: Sequence[str], groups: Sequence[str]) -> None:
    """The share of every part, one row of marks per group of positions."""
    for index, part in enumerate(parts):
        rows = interval_of(table[table.part == part], "share").set_index("group").reindex(groups)
        place = np.arange(len(groups)) + style.offsets(len(parts), 0.18)[index]
        style.lying(
            ax,
            place,
            rows,
            "share",
            label=naming.labelled(part, SOURCES[part]),
            **style.series_style(part, index),
            zorder=3,
        )


@figure(
    table="lift",
    title="Whose loss helps the others?",
    reading=(
        "Each group's share of what the step does for held-out prompts, over its share of"
        " positions."
    ),
)
@on_page
def lift(
    table: pd.DataFrame,
    **page: Unpack[Intervals],
) -> Figure:
    """Effect of each group's losses on held-out prompts, per position.

    Example: `dx.plot.lift(tables["lift"])`. At 1, a group lifts held-out prompts as much as any
    position does on average.

    Args:
        table: One row per group, with the columns enrichment, enrichment_low, enrichment_high,
            positions and prompts.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, no row remains to be shown, or the intervals are
            wider than an average position's lift.
    """
    table = style.keep(
        table, "figures.lift", ("group", "enrichment", "enrichment_low", "enrichment_high")
    )
    if not lift_can_be_read(table):
        raise DiagnosticsError(
            "Lifts whose intervals are wider than an average position's lift, or unknown, are not"
            " drawn; the table lift has them. Attribute with more prompts."
        )
    rows = interval_of(table, "enrichment")
    figure, axes = style.canvas(page["width"], 0.8 + 0.2 * len(rows))
    style.zero(axes[0, 0], "x", 1.0)
    style.lying(
        axes[0, 0],
        np.arange(len(rows)),
        rows,
        "enrichment",
        marker="o",
        color=style.tone(BLUE),
        label="enrichment",
    )
    axes[0, 0].set_xlabel("share of the lift / share of positions")
    style.names_down(axes[0, 0], rows.group)
    style.caption(figure, style.counts(table), GROUPED, style.bars(page["level"], table=table))
    return figure
