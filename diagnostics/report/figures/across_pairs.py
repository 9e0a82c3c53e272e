"""Several pairs and what they say together: a forest with a mean and a new pair's range per row."""

from __future__ import annotations

from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from diagnostics.report import naming, style
from diagnostics.report.figures.common import mark
from diagnostics.report.figures.options import Intervals, on_page

SIDES = {
    "over_random": "over random (full = 1)",
    "over_random_divergent": "over random divergent (full = 1)",
    "correlation": "Spearman ρ",
    "claim": "the statistic’s own unit",
}
"""What the axis of each kind of conclusion says."""


@on_page
def atlas(
    effects: pd.DataFrame,
    pooled: pd.DataFrame,
    *,
    kind: str = "over_random",
    outcome: str | None = None,
    budget: float | None = None,
    horizon: float | None = None,
    rollouts: str = "all",
    **page: Unpack[Intervals],
) -> Figure:
    """Every pair's estimate of every conclusion, their mean, and the range for a new pair.

    Example: `dx.plot.atlas(found.effects, found.pooled, kind="correlation")`. One row per
    conclusion, the largest mean on top; one colored mark per pair, a black diamond for the mean
    over pairs, and a thin line for where a new pair is expected. Open marks are not pooled.

    Args:
        effects: The table `effects` of `dx.atlas`.
        pooled: Its table `pooled`.
        kind: over_random, over_random_divergent, correlation or claim.
        outcome: Form of the gain, or divergence; where None, the first that the table has.
        budget: Budget of over_random; where None, the one nearest to 5 %.
        horizon: Horizon of over_random; where None, the longest that most pairs have.
        rollouts: all, right or wrong.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    where = chosen(pooled, kind, outcome, budget, horizon, rollouts)
    pooled = style.keep(pooled, "figures.atlas", ("kind", "conclusion", "mean", "pairs"), where)
    effects = style.keep(effects, "figures.atlas", ("pair", "conclusion", "estimate"), where)
    pooled = pooled.sort_values("mean", ascending=False, kind="stable")
    names = style.present(pooled["conclusion"], pooled["conclusion"])
    pairs = list(dict.fromkeys(effects["pair"]))
    height = 1.3 + (0.13 * (len(pairs) + 1) + 0.1) * len(names)
    figure, axes = style.canvas(page["width"], height)
    ax = axes[0, 0]
    style.zero(ax, "x")
    _pairs(ax, effects, names, pairs)
    _means(ax, pooled, names, len(pairs))
    style.names_down(ax, names)
    ax.xaxis.set_major_locator(MaxNLocator(5 if page["width"] > 5 else 3))
    ax.set_xlabel(SIDES.get(kind, naming.readable(kind)))
    style.legend(figure, ax, 4 if page["width"] > 5 else 2, *_key(pooled))
    style.caption(
        figure,
        _said(where),
        f"{len(pairs)} pairs; open marks are not pooled.",
        "Full: what loss on all positions gives." if kind in SIDES else "",
        style.bars(
            page["level"], "Bars of a pair", over="prompts and step batches; those of a mean, pairs"
        ),
    )
    return figure


def chosen(
    pooled: pd.DataFrame,
    kind: str,
    outcome: str | None = None,
    budget: float | None = None,
    horizon: float | None = None,
    rollouts: str = "all",
) -> dict[str, object]:
    """The values of the key's columns that one figure shows: those asked for, or the usual ones."""
    where: dict[str, object] = {"kind": kind, "rollouts": rollouts}
    rows = pooled[(pooled["kind"] == kind) & (pooled["rollouts"] == rollouts)]
    known = [name for name in ("context_gain", "gain") if (rows["outcome"] == name).any()]
    where["outcome"] = outcome or (known or list(rows["outcome"]) or [""])[0]
    rows = rows[rows["outcome"] == where["outcome"]]
    if horizon is not None or rows["horizon"].notna().any():
        usual = rows.groupby("horizon")["pairs"].sum()
        where["horizon"] = horizon or max(usual.index[usual == usual.max()])
    if budget is not None or rows["budget"].notna().any():
        where["budget"] = budget or style.nearest_budget(rows)
    return where


def _said(where: dict[str, object]) -> str:
    """The choice in words, for the caption."""
    parts = [naming.readable(str(where["outcome"]))]
    if "budget" in where:
        parts.append(f"budget {style.percent(float(str(where['budget'])))}")
    if "horizon" in where:
        parts.append(naming.steps(float(str(where["horizon"]))))
    if where["rollouts"] != "all":
        parts.append(f"{where['rollouts']} rollouts")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _pairs(ax, effects: pd.DataFrame, names: list[str], pairs: list[str]) -> None:
    """A mark with its interval per pair and row; open where the pair is not pooled."""
    places = style.offsets(len(pairs) + 1, 0.8 / (len(pairs) + 1))
    for index, (pair, offset) in enumerate(zip(pairs, places, strict=False)):
        look = mark(index, pair)
        rows = effects[effects["pair"] == pair].drop_duplicates("conclusion")
        rows = rows.set_index("conclusion").reindex(names)
        judged = rows["judged"].eq(True).to_numpy()
        y = np.arange(len(names)) + offset
        for part, face in ((judged, look["color"]), (~judged, style.paper())):
            style.lying(
                ax,
                y[part],
                rows[part],
                "estimate",
                label=pair if part is judged else "_open",
                markerfacecolor=face,
                zorder=3,
                **look,
            )


def _means(ax, pooled: pd.DataFrame, names: list[str], pairs: int) -> None:
    """A diamond with its interval, and a thin line for a new pair, below the marks of a row."""
    rows = pooled.drop_duplicates("conclusion").set_index("conclusion").reindex(names)
    y = np.arange(len(names)) + style.offsets(pairs + 1, 0.8 / (pairs + 1))[-1]
    left, right = ax.get_xlim()
    style.lying(ax, y, rows, "mean", marker="D", color=style.ink(), markersize=4, zorder=4)
    ax.hlines(y, rows["new_low"], rows["new_high"], color=style.quiet(), linewidth=0.7, zorder=2)
    ax.set_xlim(*_view(left, right, rows))


def _view(left: float, right: float, rows: pd.DataFrame) -> tuple[float, float]:
    """The pairs' own range and the means'; a new pair's range may run out of it."""
    span = right - left
    low = np.nanmin([left, rows["low"].min()])
    high = np.nanmax([right, rows["high"].max()])
    return max(low, left - span / 2), min(high, right + span / 2)


def _key(pooled: pd.DataFrame) -> list[Line2D]:
    """Entries of the legend for what is pooled."""
    shown = [
        Line2D([], [], marker="D", markersize=4, color=style.ink(), label="mean over pairs"),
    ]
    if pooled["new_low"].notna().any():
        shown.append(Line2D([], [], color=style.quiet(), linewidth=0.7, label="new pair"))
    return shown
