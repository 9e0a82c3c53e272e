"""What carries the gain in a regression, and whether that depends on the support or the form of the
gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.report import naming, style
from diagnostics.report.figures.common import forest, mark, one_scale, statistic_forest
from diagnostics.report.figures.options import Intervals, on_page
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import BLUE, DASHES, ORANGE


@figure(
    table="regressions",
    title="Compatible and incompatible divergence in one regression",
    reading=(
        "Standardised coefficients, with entropies and position held fixed. Claim C3, as the paper"
        " has it, says that teachability (d̂ĉ) lies to the right of incompatible (d̂(1−ĉ)); with"
        " controls it is the interaction beside main effects, which no scale turns over."
    ),
)
@on_page
def coefficients(
    table: pd.DataFrame,
    *,
    model: str = "decomposition",
    winsorized: float = 0.0,
    outcomes: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Standardized coefficients of one regression of the gain.

    Example: `dx.plot.coefficients(tables["regressions"])`. In the model `decomposition`, claim C3
    says that teachability lies to the right of incompatible.

    Args:
        table: One row per (outcome, split, winsorised, model, term), with the columns coefficient,
            low, high, positions and prompts.
        model: The regression to show: interaction, compatibility or decomposition.
        winsorized: The share of each tail at which the outcome was winsorized; 0 for the outcome as
            it is.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("outcome", "split", "winsorised", "model", "term", "coefficient", "low", "high")
    where = {"outcome": outcomes, "model": model, "winsorised": winsorized}
    table = style.halves(style.keep(table, "figures.coefficients", needs, where))
    outcomes, splits = (
        style.present(table.outcome, outcomes),
        style.present(table.split, style.SPLITS),
    )
    terms = style.present(table.term, ())
    table = table.rename(columns={"term": "criterion"})
    figure, axes = style.canvas(
        page["width"], 1.25 + 0.24 * len(terms), 1, len(outcomes), sharey=True
    )
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table.outcome == outcome], terms, splits, "coefficient")
        ax.set_title(naming.readable(outcome))
        ax.set_xlabel("standardised β")
    scales = one_scale(list(axes[0]), [""] * len(outcomes), "x")
    style.names_down(axes[0, 0], terms)
    style.legend(figure, axes[0, 0], 3)
    tails = f"Outcome winsorised at {winsorized:.0%}." if winsorized else ""
    bars = style.bars(page["level"], table=table)
    style.caption(figure, style.counts(table), tails, scales, bars)
    return figure


@figure(
    table="support_robustness",
    title="Does it hang on the support?",
    reading=(
        "The statistic of C3, as the axis names it, for every measurement of compatibility and"
        " every K. Claim C4 is tested as equivalence to the K of the table, and only a measurement"
        " that orders Q3 as compatibility does counts as a proxy (table claim_statistics)."
    ),
)
@on_page
def support_robustness(
    table: pd.DataFrame,
    *,
    statistic: str | None = None,
    outcomes: Sequence[str] | None = None,
    split: str | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """A claim's statistic for every compatibility proxy and K.

    Example: `dx.plot.support_robustness(tables["support_robustness"])`. A claim that does not
    depend on the support stays on one side of zero.

    Args:
        table: One row per (proxy, k, outcome, split, statistic), with the columns estimate, low,
            high, positions and prompts.
        statistic: The statistic to show, one of the table's; where None the one of claim C3:
            interaction, or decomposition in tables of earlier versions.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        split: The split to show; held-out positions where None and the table has them, otherwise
            all.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("proxy", "k", "outcome", "split", "statistic", "estimate", "low", "high")
    statistic = statistic or _statistic(table)
    what = "figures.support_robustness"
    table = style.keep(table, what, needs, {"outcome": outcomes, "statistic": statistic})
    table = style.keep(table, what, needs, {"split": split or naming.preferred_split(table)})
    series = [
        (naming.labelled(str(k), f"K = {k}"), *mark(i).values(), table[table.k == k])
        for i, k in enumerate(sorted(table.k.unique()))
    ]
    return statistic_forest(table, "proxy", series, statistic, outcomes, page)


def _statistic(table: pd.DataFrame) -> str:
    """The statistic of claim C3: the interaction, before which it was the decomposition."""
    present = set(table.statistic) if "statistic" in table else set()
    return "interaction" if "interaction" in present else "decomposition"


VARIANTS = {
    "nothing": "as measured",
    "neither": "no special tokens, no first position",
}
"""Words for variants of the gain whose name says too little."""


@figure(
    table="gain_robustness",
    title="Does it hang on the form of the gain?",
    reading=(
        "The same statistic with the gain winsorised and with special tokens or first positions"
        " left out."
    ),
)
@on_page
def gain_robustness(
    table: pd.DataFrame,
    *,
    statistic: str | None = None,
    outcomes: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """A claim's statistic under other forms of the gain.

    Example: `dx.plot.gain_robustness(tables["gain_robustness"])`. The variant `nothing` leaves the
    table as it is. The others winsorize the gain, leave out special tokens or first positions, or
    take another loss.

    Args:
        table: One row per (variant, outcome, split, statistic), with the columns estimate, low,
            high, positions and prompts.
        statistic: The statistic to show, one of the table's; where None the one of claim C3:
            interaction, or decomposition in tables of earlier versions.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("variant", "outcome", "split", "statistic", "estimate", "low", "high")
    statistic = statistic or _statistic(table)
    table = style.halves(
        style.keep(
            table, "figures.gain_robustness", needs, {"outcome": outcomes, "statistic": statistic}
        )
    )
    series = []
    for split in style.present(table.split, style.SPLITS):
        color, marker, words = style.split_style(split)
        series.append((words, color, marker, table[table.split == split].copy()))
    table["variant"] = table.variant.replace(VARIANTS)
    for _, _, _, rows in series:
        rows["variant"] = rows.variant.replace(VARIANTS)
    return statistic_forest(table, "variant", series, statistic, outcomes, page)


@figure(
    table="residual_curves",
    title="What a score adds",
    reading=(
        "The gain that a regression on both entropies, divergence and position leaves over, along "
        "the rank of each score. A flat curve at zero means that the score adds nothing to them."
    ),
)
@on_page
def residual_curves(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    split: str | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """The part of the gain that a regression leaves over, along each score.

    Example: `dx.plot.residual_curves(tables["residual_curves"])`. The regression holds student
    entropy, divergence, position and teacher entropy. Marks are deciles of the score, the band is a
    spline. Across stands the rank of the score, since most scores crowd at one of their ends; in
    tables of earlier versions, which have no ranks, the score itself.

    Args:
        table: One row per (outcome, split, score, curve, at), with the columns residual, low, high,
            positions, prompts and, where it is known, rank; curve is decile or spline.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        scores: Names of the scores to show; all of the table where None.
        split: The split to show; held-out positions where None and the table has them, otherwise
            all.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("outcome", "split", "score", "curve", "at", "residual", "low", "high")
    where = {"outcome": outcomes} | ({"score": scores} if scores is not None else {})
    table = style.keep(table, "figures.residual_curves", needs, where)
    table = style.keep(
        table, "figures.residual_curves", needs, {"split": split or naming.preferred_split(table)}
    )
    outcomes, scores = (
        style.present(table.outcome, outcomes),
        style.present(table.score, scores or ()),
    )
    down, across = (
        (len(outcomes), len(scores)) if page["width"] > 5 else (len(scores), len(outcomes))
    )
    figure, axes = style.canvas(page["width"], 0.5 + 1.5 * down, down, across)
    across = "rank" if "rank" in table else "at"
    for (i, j), ax in np.ndenumerate(axes):
        outcome, score = (outcomes[i], scores[j]) if page["width"] > 5 else (outcomes[j], scores[i])
        rows = table[(table.outcome == outcome) & (table.score == score)]
        _residuals(ax, rows.sort_values(across).assign(at=lambda rows: rows[across]))
        ax.set_xlabel(f"{naming.readable(score)} {'(rank)' if across == 'rank' else 'score'}")
        _name_panel(ax, naming.with_unit(outcome), (i, j), page["width"])
    style.caption(
        figure,
        style.counts(table),
        "Gain after regression on both entropies, divergence and position: deciles and spline,"
        " which may leave its panel at the ends.",
        _common_scale(axes, outcomes, page["width"]),
        style.bars(page["level"], "Bars and band", table=table),
    )
    return figure


def _name_panel(ax, outcome: str, place: tuple[int, int], width: float) -> None:
    """Name a panel's outcome: beside the first of a row, above the first of a narrow column."""
    row, column = place
    if column == 0 or width < 5:
        ax.set_ylabel(f"residual\n{outcome}" if width > 5 else "")
    if width < 5:
        ax.set_title(outcome if row == 0 else "")


def _common_scale(axes: np.ndarray, outcomes: Sequence[str], width: float) -> str:
    """One scale for the panels of one outcome, which stand in a row or, on a phone, in a column."""
    panels = axes if width > 5 else axes.T
    names = [outcome for outcome, row in zip(outcomes, panels, strict=True) for _ in row]
    return one_scale(list(panels.flat), names)


def _residuals(ax, table: pd.DataFrame) -> None:
    decile, spline = table[table.curve == "decile"], table[table.curve == "spline"]
    style.zero(ax)
    style.band(ax, spline["at"], spline, style.tone(ORANGE))
    ax.plot(
        spline["at"], spline.residual, color=style.tone(ORANGE), linestyle=DASHES[1], label="spline"
    )
    style.upright(
        ax,
        decile["at"],
        decile,
        "residual",
        fmt="o",
        color=style.tone(BLUE),
        label="decile",
        zorder=3,
    )
    if len(decile) > 1:
        low, high = min(decile.low.min(), 0.0), max(decile.high.max(), 0.0)
        room = SPLINE_ROOM * (high - low)
        if np.isfinite(room) and room > 0:
            ax.set_ylim(low - room, high + room)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(4))


SPLINE_ROOM = 0.3
"""Room for a spline beyond the deciles' intervals, as a share of their reach: at the ends of a
score its band is many times as wide as anything else in the panel."""
