"""What carries the gain in a regression, and whether that depends on the support or the form of the
gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.report import style
from diagnostics.report.figures.common import BOTH, forest, statistic_forest
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import BLUE, CYCLE, DASHES, DOUBLE, MARKERS, ORANGE


@figure(
    table="regressions",
    title="Compatible and incompatible divergence in one regression",
    reading=(
        "Standardised coefficients, with entropies and position held fixed. Claim C3 says that "
        "teachability (d̂ĉ) lies to the right of incompatible (d̂(1−ĉ))."
    ),
)
@style.plate
def coefficients(
    table: pd.DataFrame,
    *,
    model: str = "decomposition",
    winsorised: float = 0.0,
    outcomes: Sequence[str] = BOTH,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Standardised coefficients of one regression: `dx.plot.coefficients(tables["regressions"])`.

    table: columns outcome, split, winsorised, model, term, coefficient, low, high, r_squared,
    positions, prompts. model: interaction, compatibility or decomposition. In the last,
    teachability above incompatible is claim C3."""
    needs = ("outcome", "split", "winsorised", "model", "term", "coefficient", "low", "high")
    where = {"outcome": outcomes, "model": model, "winsorised": winsorised}
    table = style.halves(style.keep(table, "figures.coefficients", needs, where))
    outcomes, splits = (
        style.present(table.outcome, outcomes),
        style.present(table.split, style.SPLITS),
    )
    terms = list(dict.fromkeys(table.term))
    table = table.rename(columns={"term": "criterion"})
    figure, axes = style.canvas(width, 1.25 + 0.24 * len(terms), 1, len(outcomes), sharey=True)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        forest(ax, table[table.outcome == outcome], terms, splits, "coefficient")
        ax.set_title(style.words(outcome))
        ax.set_xlabel("standardised β")
    style.names_down(axes[0, 0], terms)
    style.legend(figure, axes[0, 0], 3)
    tails = f"Outcome winsorised at {winsorised:.0%}." if winsorised else ""
    style.caption(figure, style.counts(table), tails, style.bars(level))
    return figure


@figure(
    table="support_robustness",
    title="Does it hang on the support?",
    reading=(
        "The difference of those two coefficients for every proxy of compatibility and every K."
        " Claim C4 asks that it stay on one side of zero."
    ),
)
@style.plate
def support_robustness(
    table: pd.DataFrame,
    *,
    statistic: str = "decomposition",
    outcomes: Sequence[str] = BOTH,
    split: str = "all",
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """A claim's statistic for every compatibility proxy and K:
    `dx.plot.support_robustness(tables["support_robustness"])`.

    table: columns proxy, k, outcome, split, statistic, estimate, low, high, positions, prompts.
    statistic: decomposition, tertile_difference or matched_difference. A claim that does not hang
    on the support stays on one side of zero."""
    needs = ("proxy", "k", "outcome", "split", "statistic", "estimate", "low", "high")
    table = style.keep(
        table,
        "figures.support_robustness",
        needs,
        {"outcome": outcomes, "statistic": statistic, "split": split},
    )
    series = [
        (f"K = {k}", CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)], table[table.k == k])
        for i, k in enumerate(sorted(table.k.unique()))
    ]
    return statistic_forest(table, "proxy", series, statistic, outcomes, level, width)


@figure(
    table="gain_robustness",
    title="Does it hang on the form of the gain?",
    reading=(
        "The same difference with the gain winsorised and with special tokens or first positions"
        " left out."
    ),
)
@style.plate
def gain_robustness(
    table: pd.DataFrame,
    *,
    statistic: str = "decomposition",
    outcomes: Sequence[str] = BOTH,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """A claim's statistic under other forms of the gain:
    `dx.plot.gain_robustness(tables["gain_robustness"])`.

    table: columns variant, outcome, split, statistic, estimate, low, high, positions, prompts. The
    variant `nothing` leaves the table as it is; others winsorise the gain, leave out special tokens
    or first positions, or take another loss."""
    needs = ("variant", "outcome", "split", "statistic", "estimate", "low", "high")
    table = style.halves(
        style.keep(
            table, "figures.gain_robustness", needs, {"outcome": outcomes, "statistic": statistic}
        )
    )
    series = []
    for split in style.present(table.split, style.SPLITS):
        color, marker, words = style.split_style(split)
        series.append((words, color, marker, table[table.split == split]))
    return statistic_forest(table, "variant", series, statistic, outcomes, level, width)


@figure(
    table="residual_curves",
    title="What a score adds",
    reading=(
        "The gain that a regression on both entropies, divergence and position leaves over, along "
        "each score. A flat curve at zero means that the score adds nothing to them."
    ),
)
@style.plate
def residual_curves(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] = BOTH,
    scores: Sequence[str] | None = None,
    split: str | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """What is left of the gain along a score: `dx.plot.residual_curves(tables["residual_curves"])`.

    table: columns outcome, split, score, curve (decile, spline), at, residual, low, high,
    positions, prompts: the gain after a regression on student entropy, divergence, position and
    teacher entropy. Marks are deciles, the band a spline."""
    needs = ("outcome", "split", "score", "curve", "at", "residual", "low", "high")
    where = {"outcome": outcomes} | ({"score": scores} if scores is not None else {})
    table = style.keep(table, "figures.residual_curves", needs, where)
    table = style.keep(
        table, "figures.residual_curves", needs, {"split": split or style.preferred(table)}
    )
    outcomes, scores = (
        style.present(table.outcome, outcomes),
        style.present(table.score, scores or ()),
    )
    down, across = (len(outcomes), len(scores)) if width > 5 else (len(scores), len(outcomes))
    figure, axes = style.canvas(width, 0.5 + 1.5 * down, down, across)
    for (i, j), ax in np.ndenumerate(axes):
        outcome, score = (outcomes[i], scores[j]) if width > 5 else (outcomes[j], scores[i])
        _residuals(ax, table[(table.outcome == outcome) & (table.score == score)].sort_values("at"))
        ax.set_xlabel(f"{style.words(score)} score")
        if j == 0 or width < 5:
            ax.set_ylabel(f"residual\n{style.with_unit(outcome)}" if width > 5 else "")
        if width < 5:
            ax.set_title(style.with_unit(outcome) if i == 0 else "")
    style.caption(
        figure,
        style.counts(table),
        "Gain after regression on both entropies, divergence and position: deciles and spline.",
        style.bars(level, "Bars and band"),
    )
    return figure


def _residuals(ax, table: pd.DataFrame) -> None:
    decile, spline = table[table.curve == "decile"], table[table.curve == "spline"]
    style.zero(ax)
    style.band(ax, spline["at"], spline, ORANGE)
    ax.plot(spline["at"], spline.residual, color=ORANGE, linestyle=DASHES[1], label="spline")
    style.upright(
        ax, decile["at"], decile, "residual", fmt="o", color=BLUE, label="decile", zorder=3
    )
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(4))
