"""The gain by stratum of the divergence: what a wrong teacher gives too, and how linear it is."""

from __future__ import annotations

from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diagnostics.report import naming, style
from diagnostics.report.figures.options import Intervals, on_page
from diagnostics.report.figures.ranking import NULLED, null_style
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import GREEN, PURPLE

SHARES = (-0.5, 2.0)
"""Ends of the axis of the null's share: where the gain is near zero, its ratio has no size."""


@figure(
    table="strata",
    title="The gain by stratum of the divergence",
    reading=(
        "Positions in ten strata from low to high divergence. First the mean gain, the same with a"
        " permuted teacher, and what is left at each position; then the share of the gain that the"
        " permuted teacher gives too; then, where it was measured, the realised gain over its"
        " first-order prediction. Where that is far from one the step was not linear, and no"
        " relative statement is made of the stratum, which is shaded."
    ),
)
@on_page
def strata(
    table: pd.DataFrame,
    *,
    split: str | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Gain, share of the null and linearity in each stratum of the divergence.

    Example: `dx.plot.strata(dx.study(tokens)["strata"])`. A panel whose columns the table lacks is
    left out; strata in which the step was not linear are shaded.

    Args:
        table: One row per (split, stratum), with the columns stratum (1 is the lowest divergence),
            gain, gain_low and gain_high (nats), the same for gain_permuted and context_gain, for
            null_share and for linearity where they are known, linear, positions and prompts.
        split: The split to show; held-out positions where None and the table has them.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    what, needs = "figures.strata", ("split", "stratum", "gain", "gain_low", "gain_high")
    table = style.keep(table, what, needs)
    table = style.keep(table, what, needs, {"split": split or naming.preferred_split(table)})
    table = table.sort_values("stratum", ignore_index=True)
    more = {"null_share": _shares, "linearity": _ratios}
    draws = [_gains, *(draw for name, draw in more.items() if _known(table, name))]
    wide = page["width"] > 5
    rows, columns = style.panels(len(draws), page["width"])
    figure, axes = style.canvas(page["width"], 0.9 + (2.1 if wide else 1.6 * rows), rows, columns)
    for ax, draw in zip(axes.flat, draws, strict=True):
        draw(ax, table)
        style.zero(ax)
        for number in table.stratum[_bent(table)]:
            shade = {"color": style.quiet(), "alpha": 0.18, "linewidth": 0}
            ax.axvspan(number - 0.5, number + 0.5, zorder=0, gid=f"not linear {number:g}", **shade)
        ax.set_xticks(table.stratum, [f"{number:g}" for number in table.stratum])
        ax.yaxis.set_major_locator(MaxNLocator(5))
    for ax in axes[-1] if not wide else axes[0]:
        ax.set_xlabel("stratum of D (1 lowest)")
    style.legend(figure, axes[0, 0], 3 if wide else 1)
    shaded = "Grey: strata in which the step was not linear." if _bent(table).any() else ""
    style.caption(
        figure, style.counts(table), shaded, _cut(table), style.bars(page["level"], table=table)
    )
    return figure


def _beyond(table: pd.DataFrame, *names: str) -> bool:
    """Whether one of the columns has values beyond the axis of the shares."""
    known = table[[name for name in names if name in table]]
    return bool(((known < SHARES[0]) | (known > SHARES[1])).to_numpy().any())


def _cut(table: pd.DataFrame) -> str:
    """What a caption says of shares beyond their axis."""
    ends = _beyond(table, "null_share_low", "null_share_high")
    return " ".join(
        [
            *(["Intervals of the share end with its axis."] if ends else []),
            *(["Hollow triangles lie beyond it."] if _beyond(table, "null_share") else []),
        ]
    )


def _known(table: pd.DataFrame, name: str) -> bool:
    return name in table and bool(table[name].notna().any())


def _bent(table: pd.DataFrame) -> np.ndarray:
    """[N] whether the step was measured and was not linear in a stratum."""
    known = table["linear"] if "linear" in table else pd.Series(np.nan, table.index)
    return known.isin([False, "False"]).to_numpy(dtype=bool)


def _marks(ax, table: pd.DataFrame, name: str, shift: float, line: dict, label: str) -> None:
    """One mark per stratum with its interval."""
    ends = {end: table.get(f"{name}_{end}", np.nan) for end in ("low", "high")}
    rows = table.assign(**ends)
    style.upright(ax, rows.stratum + shift, rows, name, linestyle="none", label=label, **line)


def _gains(ax, table: pd.DataFrame) -> None:
    known = [name for name in NULLED if _known(table, name)]
    for name, shift in zip(known, style.offsets(len(known), 0.22), strict=True):
        color, marker, filled, words = null_style(name)
        look = {"color": color, "marker": marker}
        look |= {} if filled else {"markerfacecolor": style.paper()}
        _marks(ax, table, name, shift, look, words)
    ax.set_ylabel("mean gain (nats)")


def _shares(ax, table: pd.DataFrame) -> None:
    _marks(ax, table, "null_share", 0.0, {"color": style.tone(PURPLE), "marker": "v"}, "null")
    style.zero(ax, at=1.0)
    low, high = ax.get_ylim()
    ax.set_ylim(max(min(low, -0.05), SHARES[0]), min(high, SHARES[1]))
    look = {"color": style.tone(PURPLE), "markerfacecolor": style.paper(), "linestyle": "none"}
    for edge, marker, side in ((SHARES[0], "v", -1), (SHARES[1], "^", 1)):
        at = table.stratum[side * (table["null_share"] - edge) > 0]
        if len(at):
            ax.plot(
                at, np.full(len(at), edge), marker, gid="beyond the axis", clip_on=False, **look
            )
    ax.set_ylabel("null's share of the gain")
    ax.yaxis.set_major_formatter(FuncFormatter(style.percent))


def _ratios(ax, table: pd.DataFrame) -> None:
    _marks(ax, table, "linearity", 0.0, {"color": style.tone(GREEN), "marker": "^"}, "linearity")
    style.zero(ax, at=1.0)
    ax.set_ylabel("realised / first order")
