"""Figures: a finished table goes in, a matplotlib Figure comes out; nothing is estimated or saved here.

    import diagnostics as dx
    dx.plot.correlations(dx.correlate(tokens))                       # in a notebook: the figure shows itself
    dx.plot.correlations(table, width=dx.plot.SINGLE).savefig("correlations.pdf")

Every function takes `width` in inches (SINGLE = 3.3 for one column, DOUBLE = 6.9 for two) and `dark` for
a dark page; those with intervals take the `level` that the table was made at, for the caption. Panels sit
side by side at DOUBLE and below one another at SINGLE where they would not fit. Intervals are drawn as the
table gives them; the numbers of prompts and positions stand below the figure. Both gains are shown in the
order absolute, relative. Every function raises DiagnosticsError where its table lacks a column or has no
row to show. The style lives in `plates`.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from diagnostics import plates
from diagnostics.criteria import quadrants as quadrant_of
from diagnostics.plates import BLUE, CYCLE, DASHES, DOUBLE, GREEN, MARKERS, ORANGE, PURPLE, SINGLE
from diagnostics.types import SCHEMA

__all__ = [
    "DOUBLE", "SINGLE", "agreement", "calibration", "coefficients", "correlations", "distributions", "entropy_divergence", "evaluations",
    "gain_robustness", "intervention", "kernel_shares", "lift", "linearity", "placebo_excess", "position_gain", "q3_contrast",
    "q3_gain", "quadrants", "residual_curves", "runs", "selection_curves", "selection_overlap", "selection_profile", "selection_summary", "support_robustness",
    "training_curves", "validation", "validation_scatter",
]

BOTH = ("gain", "relative_gain")
METHODS = {"spearman": "Spearman ρ", "pearson": "Pearson r", "kendall": "Kendall τ"}
FLOOR = 1e-3
"""Nats below which the logarithmic axes of the entropy-divergence plane do not look."""


# --- the main job -----------------------------------------------------------------------------------


@plates.plate
def correlations(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] = BOTH,
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Forest of each criterion's correlation with both gains: `dx.plot.correlations(dx.correlate(tokens))`.

    table: columns outcome, criterion, split, method, estimate, low, high, placebo, positions, prompts; the
    partial and within-prompt tables have the same. Filled marks are estimates with their intervals, one
    colour and shape a split; a hollow diamond is what a random step of the same norm shows, so only the
    distance from it speaks for the criterion. Criteria are ordered by the first outcome on held-out contexts.
    """
    return _criteria_forest(table, "figures.correlations", "estimate", method, outcomes, criteria, level, width)


@plates.plate
def placebo_excess(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] = BOTH,
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Forest of correlation minus the placebo's: `dx.plot.placebo_excess(dx.study(tokens)["placebo_excess"])`.

    table: columns outcome, criterion, split, method, excess, low, high, positions, prompts. To the right of
    zero a criterion says more than the mere presence of the divergence on both sides.
    """
    return _criteria_forest(table, "figures.placebo_excess", "excess", method, outcomes, criteria, level, width)


def _criteria_forest(table, what, value, method, outcomes, criteria, level, width) -> Figure:
    needs = ("outcome", "criterion", "split", "method", value, "low", "high")
    where = {"method": method, "outcome": outcomes} | ({"criterion": criteria} if criteria is not None else {})
    table = plates.halves(plates.keep(table, what, needs, where))
    outcomes, splits = plates.present(table.outcome, outcomes), plates.present(table.split, plates.SPLITS)
    names = _forest_order(table, outcomes[0], splits[-1], value)
    figure, axes = plates.canvas(width, 1.15 + 0.2 * len(names), 1, len(outcomes), sharey=True)
    label = METHODS.get(method, method) + (" excess" if value == "excess" else "")
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        _forest(ax, table[table.outcome == outcome], names, splits, value)
        ax.set_title(plates.words(outcome))
        ax.set_xlabel(label)
    plates.names_down(axes[0, 0], names)
    plates.legend(figure, axes[0, 0], 3, *([plates.placebo_key()] if "placebo" in table else []))
    plates.caption(figure, plates.counts(table), plates.bars(level))
    return figure


def _forest_order(table: pd.DataFrame, outcome: str, split: str, value: str) -> list[str]:
    rows = table[(table.outcome == outcome) & (table.split == split)]
    ordered = rows.sort_values(value, ascending=False, kind="stable").criterion.tolist()
    return plates.present(table.criterion, ordered)


def _forest(ax, table: pd.DataFrame, names: list[str], splits: list[str], value: str) -> None:
    plates.zero(ax, "x")
    ax.xaxis.set_major_locator(MaxNLocator(5 if ax.figure.get_figwidth() > 5 else 3))
    for index, (split, offset) in enumerate(zip(splits, plates.offsets(len(splits), 0.38), strict=True)):
        color, marker, words = plates.split_style(split, index)
        rows, y = table[table.split == split].set_index("criterion").reindex(names), np.arange(len(names)) + offset
        plates.lying(ax, y, rows, value, marker=marker, color=color, label=words, zorder=3)
        if "placebo" in rows:
            ax.plot(rows.placebo.to_numpy(float), y, zorder=2, label=f"_placebo {split}", **plates.diamond(color))


@plates.plate
def entropy_divergence(
    tokens: pd.DataFrame,
    *,
    color: Sequence[str] = ("compatibility", "gain"),
    bins: int = 26,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """The plane of student entropy and forward KL: `dx.plot.entropy_divergence(result.tokens)`.

    tokens: a token table. Each hexagon shows the mean of one column over its positions; the lines are the
    medians that split the quadrants, with each quadrant's positions in its corner. Axes are logarithmic in
    nats and start at 1e-3; what lies below is drawn on the edge. The scale of `color` ends at the 2nd and 98th
    percentile of the hexagons; where values of both signs occur it follows their square root.
    """
    needs = ("student_entropy", "forward_kl", "prompt_id", *color)
    tokens = plates.keep(tokens, "figures.entropy_divergence", needs)
    defined = np.isfinite(tokens[list(needs[:2])].to_numpy(float)).all(axis=1)
    tokens = tokens[defined].reset_index(drop=True)
    rows, columns = plates.panels(len(color), width)
    figure, axes = plates.canvas(width, 0.45 + (2.45 if columns == 1 else 2.75) * rows, rows, columns, sharex=True, sharey=True)
    for ax, name in zip(axes.flat, color, strict=True):
        _hexagons(figure, ax, tokens, name, bins)
        _quadrant_lines(ax, tokens)
        ax.set_title(f"mean {plates.words(name)}")
    for ax in axes[-1]:
        ax.set_xlabel("student entropy H(p) (nats)")
    for ax in axes[:, 0]:
        ax.set_ylabel("forward KL(q‖p) (nats)")
    plates.caption(figure, f"{tokens.prompt_id.nunique():,} prompts, {len(tokens):,} positions. Lines: medians. Q3 is confident and wrong.")
    return figure


def _hexagons(figure: Figure, ax, tokens: pd.DataFrame, name: str, bins: int) -> None:
    values = tokens[name].to_numpy(float)
    kept = np.isfinite(values)
    x = np.clip(tokens.student_entropy.to_numpy(float)[kept], FLOOR, None)
    y = np.clip(tokens.forward_kl.to_numpy(float)[kept], FLOOR, None)
    ax.grid(visible=False)
    hexagons = ax.hexbin(x, y, C=values[kept], gridsize=(bins, int(bins * 0.6)), xscale="log", yscale="log",
                         linewidths=0.15, edgecolors="face")
    plates.powers(ax.xaxis, ax.yaxis)
    shown = np.asarray(hexagons.get_array(), float)
    low, high = np.percentile(shown, [2, 98]) if len(shown) else (0.0, 1.0)
    if low < 0:
        reach = max(abs(low), abs(high))
        hexagons.set_cmap(plates.diverging())
        hexagons.set_norm(plates.signed_root(reach))
        _color_bar(figure, ax, hexagons, extend="both").set_ticks([float(f"{share * reach:.1g}") for share in (-1, -0.25, 0, 0.25, 1)])
    else:
        hexagons.set_cmap("cividis")
        hexagons.set_clim(low, high if high > low else low + 1e-12)
        _color_bar(figure, ax, hexagons).ax.yaxis.set_major_locator(MaxNLocator(5))


def _color_bar(figure: Figure, ax, artist, **options):
    bar = figure.colorbar(artist, ax=ax, pad=0.02, aspect=28, **options)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(width=0.5, length=2)
    return bar


def _quadrant_lines(ax, tokens: pd.DataFrame) -> None:
    """Median lines, each quadrant's number of positions and their share, over a haze of paper."""
    ax.axvline(tokens.student_entropy.median(), color=plates.ink(), linewidth=0.8)
    ax.axhline(tokens.forward_kl.median(), color=plates.ink(), linewidth=0.8)
    count = pd.Series(quadrant_of(tokens)).value_counts()
    corners = {1: (0.97, 0.97), 2: (0.97, 0.03), 3: (0.03, 0.97), 4: (0.03, 0.03)}
    haze = {"facecolor": plates.paper(), "edgecolor": "none", "alpha": 0.8, "pad": 1.2}
    for quadrant, (x, y) in corners.items():
        number = count.get(quadrant, 0)
        ax.text(x, y, f"Q{quadrant}: {number:,} ({number / len(tokens):.0%})", transform=ax.transAxes, bbox=haze, gid=f"Q{quadrant}",
                ha="right" if x > 0.5 else "left", va="top" if y > 0.5 else "bottom")


@plates.plate
def calibration(table: pd.DataFrame, *, ratio: float = 0.8, width: float = DOUBLE, dark: bool = False) -> Figure:
    """How linear the step is: `dx.plot.calibration(result.calibration)`.

    table: columns step_size, relative_norm, predicted_drop, realised_drop (nats a position of the step's
    loss), ratio, chosen. The chosen step is ringed; the dashed line in the second panel is `ratio`, the
    least share of the first-order prediction that a step may realise.
    """
    needs = ("step_size", "predicted_drop", "realised_drop", "ratio", "chosen")
    table = plates.keep(table, "figures.calibration", needs).sort_values("step_size", ignore_index=True)
    table = plates.keep(table[table.step_size > 0], "figures.calibration", needs)
    rows, columns = plates.panels(2, width)
    figure, axes = plates.canvas(width, 0.55 + 1.8 * rows, rows, columns, sharex=True)
    drop, share = axes.flat
    _drops(drop, table)
    share.plot(table.step_size, table.ratio, color=BLUE, marker="o")
    share.axhline(ratio, color=ORANGE, linestyle=DASHES[1], linewidth=0.9)
    _ring(share, table, "ratio")
    plates.zero(share)
    share.set_ylim(top=max(1.08, share.get_ylim()[1]))
    share.set_ylabel("realised / predicted")
    for ax in axes[-1]:
        ax.set_xlabel("step size (learning rate)")
        plates.powers(ax.xaxis)
    plates.legend(figure, drop, 4 if width > 5 else 2)
    plates.caption(figure, _calibration_words(table), f"Dashed on the ratio: least accepted, {ratio:g}.")
    return figure


def _drops(ax, table: pd.DataFrame) -> None:
    """Predicted and realised drops on logarithmic axes; a step after which the loss rose gets a cross below."""
    fell = table.realised_drop.where(table.realised_drop > 0)
    ax.plot(table.step_size, table.predicted_drop, color=ORANGE, linestyle=DASHES[1], marker="s", label="predicted (first order)")
    ax.plot(table.step_size, fell, color=BLUE, marker="o", label="realised")
    ax.set(xscale="log", yscale="log")
    _ring(ax, table, "realised_drop", label="chosen")
    rose = table.step_size[table.realised_drop <= 0]
    if len(rose):
        ax.plot(rose, np.full(len(rose), 0.04), "X", color=PURPLE, transform=ax.get_xaxis_transform(), label="loss rose")
    plates.powers(ax.yaxis)
    ax.set_ylabel("drop of the loss (nats)")


def _ring(ax, table: pd.DataFrame, value: str, label: str = "_chosen") -> None:
    chosen = table[table.chosen.astype(bool)]
    ax.plot(chosen.step_size, chosen[value], "o", markersize=9, markerfacecolor="none", markeredgecolor=GREEN,
            markeredgewidth=1.4, zorder=4, label=label)


def _calibration_words(table: pd.DataFrame) -> str:
    chosen = table[table.chosen.astype(bool)]
    if chosen.empty:
        return "No step was chosen."
    row = chosen.iloc[0]
    norm = f", relative update norm {row.relative_norm:.2g}" if "relative_norm" in table else ""
    return f"Ringed: the chosen step, size {row.step_size:.2g}{norm}, realises {row.ratio:.0%} of its first-order prediction."


# --- quadrants and Q3 -------------------------------------------------------------------------------


@plates.plate
def quadrants(
    table: pd.DataFrame, *, statistic: str = "mean", outcomes: Sequence[str] = BOTH, level: float | None = None,
    width: float = DOUBLE, dark: bool = False,
) -> Figure:
    """Gain in each quadrant: `dx.plot.quadrants(dx.study(tokens)["quadrants"])`.

    table: columns outcome, split, quadrant, statistic, estimate, low, high, share, positions, prompts. Below each
    quadrant's name stands its share of the positions; `all` is the mean over all of them.
    """
    needs = ("outcome", "split", "quadrant", "statistic", "estimate", "low", "high", "share")
    table = plates.halves(plates.keep(table, "figures.quadrants", needs, {"outcome": outcomes, "statistic": statistic}))
    outcomes, names = plates.present(table.outcome, outcomes), sorted(table.quadrant.unique())
    share = table[table.split == plates.preferred(table)].drop_duplicates("quadrant").set_index("quadrant").share
    rows, columns = plates.panels(len(outcomes), width)
    figure, axes = plates.canvas(width, 0.8 + 1.85 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _beside(ax, table[table.outcome == outcome], "quadrant", names, "estimate")
        ax.set_xticks(range(len(names)), [f"{name}\n{share.get(name, np.nan):.0%}" for name in names])
        ax.set_ylabel(f"{statistic} {plates.with_unit(outcome)}")
    plates.legend(figure, axes[0, 0], 3)
    legend = "Q1 unsure and wrong, Q2 unsure and right, Q3 confident and wrong, Q4 confident and right."
    plates.caption(figure, plates.counts(table), legend, plates.bars(level))
    return figure


def _beside(ax, table: pd.DataFrame, key: str, names: list, value: str) -> None:
    """One mark a category and split, splits side by side."""
    splits = plates.present(table.split, plates.SPLITS)
    plates.zero(ax)
    ax.grid(axis="x", visible=False)
    for index, (split, offset) in enumerate(zip(splits, plates.offsets(len(splits), 0.16), strict=True)):
        color, marker, words = plates.split_style(split, index)
        rows = table[table.split == split].set_index(key).reindex(names)
        plates.upright(ax, np.arange(len(names)) + offset, rows, value, fmt=marker, color=color, label=words, zorder=3)
    ax.set_xlim(-0.5, len(names) - 0.5)


@plates.plate
def q3_gain(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] = BOTH,
    scores: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Mean gain by tertile of each score within Q3: `dx.plot.q3_gain(dx.study(tokens)["q3_groups"])`.

    table: columns outcome, split, score, group (1 is the lowest), mean, low, high, positions,
    prompts. For each score the marks run from its bottom to its top; a rising line means that the gain rises
    with the score among confident, wrong positions.
    """
    needs = ("outcome", "split", "score", "group", "mean", "low", "high")
    where = {"outcome": outcomes} | ({"score": scores} if scores is not None else {})
    table = plates.halves(plates.keep(table, "figures.q3_gain", needs, where))
    outcomes = plates.present(table.outcome, outcomes)
    rows, columns = plates.panels(len(outcomes), width)
    figure, axes = plates.canvas(width, 0.75 + 1.85 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _group_lines(ax, table[table.outcome == outcome], plates.present(table.score, scores or ()))
        ax.set_ylabel(f"mean {plates.with_unit(outcome)}")
    plates.legend(figure, axes[0, 0], 3)
    plates.caption(figure, plates.counts(table), "Each group of marks: bottom to top of the score within Q3.", plates.bars(level))
    return figure


def _group_lines(ax, table: pd.DataFrame, scores: list[str]) -> None:
    groups, splits = sorted(table.group.unique()), plates.present(table.split, plates.SPLITS)
    plates.zero(ax)
    ax.grid(axis="x", visible=False)
    for index, (split, shift) in enumerate(zip(splits, plates.offsets(len(splits), 0.07), strict=True)):
        color, marker, words = plates.split_style(split, index)
        for place, score in enumerate(scores):
            rows = table[(table.split == split) & (table.score == score)].set_index("group").reindex(groups)
            x = place + shift + np.linspace(-0.25, 0.25, len(groups))
            plates.upright(ax, x, rows, "mean", marker=marker, linestyle="-", linewidth=0.9, color=color, zorder=3,
                           label=words if place == 0 else f"_{score}")
    ax.set_xticks(range(len(scores)), [plates.words(score) for score in scores])
    ax.set_xlim(-0.5, len(scores) - 0.5)


@plates.plate
def q3_contrast(
    table: pd.DataFrame,
    matching: pd.DataFrame | None = None,
    *,
    groups: str = "tertile",
    outcomes: Sequence[str] = BOTH,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Top minus bottom group of each score within Q3: `dx.plot.q3_contrast(tables["q3_contrast"], tables["matching"])`.

    table: columns outcome, split, score, groups, difference, low, high, placebo_difference, positions, prompts.
    matching: the same differences between positions of one prompt with like entropy, divergence and place,
    with a column replacement; drawn hollow, with replacement. Diamonds are the placebo's differences.
    """
    needs = ("outcome", "split", "score", "difference", "low", "high", "placebo_difference")
    table = plates.halves(plates.keep(table, "figures.q3_contrast", (*needs, "groups"), {"outcome": outcomes, "groups": groups}))
    outcomes, scores = plates.present(table.outcome, outcomes), list(dict.fromkeys(table.score))
    if matching is not None:
        where = {"outcome": outcomes, "replacement": True}
        matching = plates.halves(plates.keep(matching, "figures.q3_contrast", (*needs, "replacement"), where))
    figure, axes = plates.canvas(width, 1.25 + (0.32 if matching is None else 0.5) * len(scores), 1, len(outcomes), sharey=True)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        pair = None if matching is None else matching[matching.outcome == outcome]
        _contrast_rows(ax, table[table.outcome == outcome], pair, scores)
        ax.set_title(plates.words(outcome))
        ax.set_xlabel(f"top − bottom ({plates.UNITS.get(outcome, '')})")
        ax.xaxis.set_major_locator(MaxNLocator(4 if width > 5 else 3))
    plates.names_down(axes[0, 0], scores)
    plates.legend(figure, axes[0, 0], 3 if width > 5 else 2, plates.placebo_key())
    plates.caption(figure, plates.counts(table), f"Top minus bottom {groups} within Q3.",
                   "" if matching is None else "Hollow: matched within a prompt on entropy, divergence and place.", plates.bars(level))
    return figure


def _contrast_rows(ax, table: pd.DataFrame, matching: pd.DataFrame | None, scores: list[str]) -> None:
    kinds = [(table, None, "")] + ([] if matching is None else [(matching, plates.paper(), ", matched")])
    splits = plates.present(table.split, plates.SPLITS)
    places = iter(plates.offsets(len(kinds) * len(splits), 0.38 if matching is None else 0.2))
    plates.zero(ax, "x")
    for index, split in enumerate(splits):
        color, marker, words = plates.split_style(split, index)
        for rows, face, more in kinds:
            rows, y = rows[rows.split == split].set_index("score").reindex(scores), np.arange(len(scores)) + next(places)
            plates.lying(ax, y, rows, "difference", marker=marker, color=color, markerfacecolor=face or color, label=words + more, zorder=3)
            ax.plot(rows.placebo_difference.to_numpy(float), y, zorder=2, label=f"_placebo {split}{more}", **plates.diamond(color))


# --- regressions and robustness ---------------------------------------------------------------------

STATISTICS = {
    "decomposition": "β(d̂ĉ) − β(d̂(1−ĉ))", "tertile_difference": "top − bottom", "matched_difference": "matched difference",
    "spearman_difference": "ρ(d̂ĉ) − ρ(d̂)",
}


@plates.plate
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

    table: columns outcome, split, winsorised, model, term, coefficient, low, high, r_squared, positions, prompts. model:
    interaction, compatibility or decomposition. In the last, teachability above incompatible is claim C3.
    """
    needs = ("outcome", "split", "winsorised", "model", "term", "coefficient", "low", "high")
    where = {"outcome": outcomes, "model": model, "winsorised": winsorised}
    table = plates.halves(plates.keep(table, "figures.coefficients", needs, where))
    outcomes, splits = plates.present(table.outcome, outcomes), plates.present(table.split, plates.SPLITS)
    terms = list(dict.fromkeys(table.term))
    table = table.rename(columns={"term": "criterion"})
    figure, axes = plates.canvas(width, 1.25 + 0.24 * len(terms), 1, len(outcomes), sharey=True)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        _forest(ax, table[table.outcome == outcome], terms, splits, "coefficient")
        ax.set_title(plates.words(outcome))
        ax.set_xlabel("standardised β")
    plates.names_down(axes[0, 0], terms)
    plates.legend(figure, axes[0, 0], 3)
    tails = f"Outcome winsorised at {winsorised:.0%}." if winsorised else ""
    plates.caption(figure, plates.counts(table), tails, plates.bars(level))
    return figure


@plates.plate
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
    """A claim's statistic for every compatibility proxy and K: `dx.plot.support_robustness(tables["support_robustness"])`.

    table: columns proxy, k, outcome, split, statistic, estimate, low, high, positions, prompts. statistic: decomposition,
    tertile_difference or matched_difference. A claim that does not hang on the support stays on one side of zero.
    """
    needs = ("proxy", "k", "outcome", "split", "statistic", "estimate", "low", "high")
    table = plates.keep(table, "figures.support_robustness", needs, {"outcome": outcomes, "statistic": statistic, "split": split})
    series = [(f"K = {k}", CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)], table[table.k == k]) for i, k in enumerate(sorted(table.k.unique()))]
    return _statistic_forest(table, "proxy", series, statistic, outcomes, level, width)


@plates.plate
def gain_robustness(
    table: pd.DataFrame,
    *,
    statistic: str = "decomposition",
    outcomes: Sequence[str] = BOTH,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """A claim's statistic under other forms of the gain: `dx.plot.gain_robustness(tables["gain_robustness"])`.

    table: columns variant, outcome, split, statistic, estimate, low, high, positions, prompts. The variant `nothing` leaves the
    table as it is; others winsorise the gain, leave out special tokens or first positions, or take another loss.
    """
    needs = ("variant", "outcome", "split", "statistic", "estimate", "low", "high")
    table = plates.halves(plates.keep(table, "figures.gain_robustness", needs, {"outcome": outcomes, "statistic": statistic}))
    series = []
    for split in plates.present(table.split, plates.SPLITS):
        color, marker, words = plates.split_style(split)
        series.append((words, color, marker, table[table.split == split]))
    return _statistic_forest(table, "variant", series, statistic, outcomes, level, width)


def _statistic_forest(table, key, series, statistic, outcomes, level, width) -> Figure:
    """Rows by `key`, one mark for each of the series (words, colour, marker, rows), a panel for each outcome."""
    names, outcomes = list(dict.fromkeys(table[key])), plates.present(table.outcome, outcomes)
    spread = 0.7 / max(len(series), 2)
    figure, axes = plates.canvas(width, 1.2 + (0.14 * len(series) + 0.06) * len(names), 1, len(outcomes), sharey=True)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        plates.zero(ax, "x")
        ax.xaxis.set_major_locator(MaxNLocator(5 if width > 5 else 3))
        for offset, (words, color, marker, rows) in zip(plates.offsets(len(series), spread), series, strict=True):
            rows = rows[rows.outcome == outcome].drop_duplicates(key).set_index(key).reindex(names)
            plates.lying(ax, np.arange(len(names)) + offset, rows, "estimate", marker=marker, color=color, label=words, zorder=3)
        unit = f" ({plates.UNITS.get(outcome, '')})" if statistic in ("tertile_difference", "matched_difference") else ""
        ax.set_title(plates.words(outcome))
        ax.set_xlabel(STATISTICS.get(statistic, plates.words(statistic)) + (unit if width > 5 else ""))
    plates.names_down(axes[0, 0], names)
    plates.legend(figure, axes[0, 0], 4)
    where = {"tertile_difference": "Tertiles of Q3.", "matched_difference": "Q3, matched within a prompt."}.get(statistic, "")
    plates.caption(figure, plates.counts(table), where, plates.bars(level))
    return figure


@plates.plate
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

    table: columns outcome, split, score, curve (decile, spline), at, residual, low, high, positions, prompts: the gain after
    a regression on student entropy, divergence, position and teacher entropy. Marks are deciles, the band a spline.
    """
    needs = ("outcome", "split", "score", "curve", "at", "residual", "low", "high")
    where = {"outcome": outcomes} | ({"score": scores} if scores is not None else {})
    table = plates.keep(table, "figures.residual_curves", needs, where)
    table = plates.keep(table, "figures.residual_curves", needs, {"split": split or plates.preferred(table)})
    outcomes, scores = plates.present(table.outcome, outcomes), plates.present(table.score, scores or ())
    down, across = (len(outcomes), len(scores)) if width > 5 else (len(scores), len(outcomes))
    figure, axes = plates.canvas(width, 0.5 + 1.5 * down, down, across)
    for (i, j), ax in np.ndenumerate(axes):
        outcome, score = (outcomes[i], scores[j]) if width > 5 else (outcomes[j], scores[i])
        _residuals(ax, table[(table.outcome == outcome) & (table.score == score)].sort_values("at"))
        ax.set_xlabel(f"{plates.words(score)} score")
        if j == 0 or width < 5:
            ax.set_ylabel(f"residual\n{plates.with_unit(outcome)}" if width > 5 else "")
        if width < 5:
            ax.set_title(plates.with_unit(outcome) if i == 0 else "")
    plates.caption(figure, plates.counts(table), "Gain after regression on both entropies, divergence and position: deciles and spline.",
                   plates.bars(level, "Bars and band"))
    return figure


def _residuals(ax, table: pd.DataFrame) -> None:
    decile, spline = table[table.curve == "decile"], table[table.curve == "spline"]
    plates.zero(ax)
    plates.band(ax, spline["at"], spline, ORANGE)
    ax.plot(spline["at"], spline.residual, color=ORANGE, linestyle=DASHES[1], label="spline")
    plates.upright(ax, decile["at"], decile, "residual", fmt="o", color=BLUE, label="decile", zorder=3)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(4))


# --- attribution ------------------------------------------------------------------------------------


@plates.plate
def linearity(table: pd.DataFrame, *, level: float | None = None, width: float = DOUBLE, dark: bool = False) -> Figure:
    """Realised gain against its first-order prediction, by step size: `dx.plot.linearity(tables["linearity"])`.

    table: columns fraction, step_size, split, slope, slope_low, slope_high, r2, r2_low, r2_high, positions, prompts. A slope of
    1 means that the step is small enough for the prediction; r2 tells how well it orders positions.
    """
    needs = ("step_size", "split", "slope", "slope_low", "slope_high", "r2", "r2_low", "r2_high")
    table = plates.halves(plates.keep(table, "figures.linearity", needs))
    rows, columns = plates.panels(2, width)
    figure, axes = plates.canvas(width, 0.75 + 1.8 * rows, rows, columns, sharex=True)
    for ax, value, label in zip(axes.flat, ("slope", "r2"), ("slope, realised on predicted", "r²"), strict=True):
        plates.zero(ax, at=1.0)
        for index, split in enumerate(plates.present(table.split, plates.SPLITS)):
            color, marker, words = plates.split_style(split, index)
            part = _ends(table[table.split == split].sort_values("step_size"), value)
            plates.upright(ax, part.step_size, part, value, marker=marker, linestyle="-", color=color, label=words)
        ax.set_ylabel(label)
        ax.set_xscale("log")
        plates.powers(ax.xaxis)
    for ax in axes[-1]:
        ax.set_xlabel("step size (learning rate)")
    plates.legend(figure, axes[0, 0], 3)
    plates.caption(figure, plates.counts(table), plates.bars(level))
    return figure


def _ends(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """The table with the ends of that value's interval as low and high."""
    return table.assign(low=table[f"{value}_low"], high=table[f"{value}_high"])


GROUPED = "Numbers 1 to 3: thirds from the lowest to the highest."
SOURCES = {"self": "itself", "own_context": "own context", "own_prompt": "own prompt's other contexts", "other_prompts": "other prompts"}


@plates.plate
def kernel_shares(
    table: pd.DataFrame, *, kernel: str | None = None, groups: Sequence[str] | None = None, level: float | None = None,
    width: float = DOUBLE, dark: bool = False,
) -> Figure:
    """Where a position's first-order gain comes from: `dx.plot.kernel_shares(tables["kernel_shares"])`.

    table: columns kernel, group, part (self, own_context, own_prompt, other_prompts), share, share_low, share_high,
    positions, prompts. kernel: output_layer or full; the widest that is there by default. Shares of a group sum to 1.
    """
    needs = ("kernel", "group", "part", "share", "share_low", "share_high")
    table = plates.keep(table, "figures.kernel_shares", needs, {"part": list(SOURCES)} | ({"group": groups} if groups is not None else {}))
    kernel = kernel or ("full" if (table.kernel == "full").any() else str(table.kernel.iloc[0]))
    table = plates.keep(table, "figures.kernel_shares", needs, {"kernel": kernel})
    names, parts = plates.present(table.group, groups or ()), plates.present(table.part, SOURCES)
    figure, axes = plates.canvas(width, 1.1 + 0.3 * len(names))
    ax = axes[0, 0]
    plates.zero(ax, "x")
    for index, part in enumerate(parts):
        rows = _ends(table[table.part == part], "share").set_index("group").reindex(names)
        place = np.arange(len(names)) + plates.offsets(len(parts), 0.18)[index]
        plates.lying(ax, place, rows, "share", marker=MARKERS[index], color=CYCLE[index], label=SOURCES[part], zorder=3)
    ax.set_xlabel("share of the first-order gain")
    ax.xaxis.set_major_locator(MaxNLocator(7 if width > 5 else 4))
    ax.xaxis.set_major_formatter(FuncFormatter(plates.percent))
    plates.names_down(ax, names)
    plates.legend(figure, ax, 4 if width > 5 else 2)
    plates.caption(figure, plates.counts(table), f"Kernel: {plates.words(kernel)}.", GROUPED, plates.bars(level))
    return figure


@plates.plate
def lift(table: pd.DataFrame, *, level: float | None = None, width: float = DOUBLE, dark: bool = False) -> Figure:
    """How much each group's losses do for held-out prompts: `dx.plot.lift(tables["lift"])`.

    table: columns group, enrichment, enrichment_low, enrichment_high, positions, prompts. At 1 a group lifts others as much as
    any position does on average.
    """
    table = plates.keep(table, "figures.lift", ("group", "enrichment", "enrichment_low", "enrichment_high"))
    rows = _ends(table, "enrichment")
    figure, axes = plates.canvas(width, 0.8 + 0.2 * len(rows))
    plates.zero(axes[0, 0], "x", 1.0)
    plates.lying(axes[0, 0], np.arange(len(rows)), rows, "enrichment", marker="o", color=BLUE, label="enrichment")
    axes[0, 0].set_xlabel("share of the lift / share of positions")
    plates.names_down(axes[0, 0], rows.group)
    known = rows[["low", "high"]].notna().all(axis=1).any()
    ends = plates.bars(level) if known else "No intervals: the lift as a whole is not clear of zero, and a share of it means little."
    plates.caption(figure, plates.counts(table), GROUPED, ends)
    return figure


@plates.plate
def agreement(
    table: pd.DataFrame, *, scope: str = "within_budget", answer: str = "held_out_forward_kl", level: float | None = None,
    width: float = DOUBLE, dark: bool = False,
) -> Figure:
    """How far the offline answers agree with interventions: `dx.plot.agreement(tables["offline_agreement"])`.

    table: columns scope, x, y, kendall, low, high, cells, prompts. Rows are the other answers, each compared with `answer` over
    the cells of `scope`: within_budget, all (which larger budgets, that capture and teach more, raise by themselves), or budget_<share>.
    """
    needs = ("scope", "x", "y", "kendall", "low", "high")
    table = plates.keep(table, "figures.agreement", needs, {"scope": scope})
    sides = [table[table.y == answer].rename(columns={"x": "other"}), table[table.x == answer].rename(columns={"y": "other"})]
    rows = plates.keep(pd.concat(sides, ignore_index=True), "figures.agreement", ("other",))
    figure, axes = plates.canvas(width, 0.85 + 0.2 * len(rows))
    plates.zero(axes[0, 0], "x")
    plates.lying(axes[0, 0], np.arange(len(rows)), rows, "kendall", marker="o", color=BLUE, label="agreement")
    axes[0, 0].set_xlim(-1.05, 1.05)
    axes[0, 0].set_xlabel(f"Kendall τ with {plates.words(answer)}")
    plates.names_down(axes[0, 0], rows.other)
    compared = "cells, compared at equal budgets" if scope == "within_budget" else "cells"
    cells = f"{int(rows.cells.max())} {compared}; {int(rows.prompts.max())} prompts." if {"cells", "prompts"} <= set(rows) else ""
    plates.caption(figure, cells, plates.bars(level))
    return figure


# --- selection --------------------------------------------------------------------------------------


def _some(table: pd.DataFrame, criteria: Sequence[str] | None) -> list[str]:
    """The named criteria, or all where six lines can hold them, or the usual six."""
    names = [name for name in dict.fromkeys(table.criterion) if name not in ("random", "full", "placebo")]
    if criteria is not None:
        return [name for name in criteria if name in names]
    return names if len(names) <= len(CYCLE) else [name for name in plates.CRITERIA if name in names] or names[: len(CYCLE)]


def _mark(index: int) -> dict:
    return {"color": CYCLE[index % len(CYCLE)], "marker": MARKERS[index % len(MARKERS)]}


@plates.plate
def selection_curves(
    table: pd.DataFrame,
    *,
    criteria: Sequence[str] | None = None,
    outcomes: Sequence[str] = BOTH,
    split: str | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Share of the total gain captured at each budget: `dx.plot.selection_curves(dx.selection_curves(tokens))`.

    table: columns outcome, criterion, split, budget, captured_share, low, high, random_low, random_high,
    oracle, positions, prompts. The grey band holds random selections, the dotted line is the oracle, which ranks
    by the gain itself. Shows up to six criteria on one split, held-out where there is one.
    """
    needs = ("outcome", "criterion", "split", "budget", "captured_share", "low", "high", "random_low", "random_high", "oracle")
    table = plates.keep(table, "figures.selection_curves", needs, {"outcome": outcomes})
    table = plates.keep(table, "figures.selection_curves", needs, {"split": split or plates.preferred(table)})
    names, outcomes = _some(table, criteria), plates.present(table.outcome, outcomes)
    rows, columns = plates.panels(len(outcomes), width)
    figure, axes = plates.canvas(width, 0.8 + 2.1 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _budget_curves(ax, table[table.outcome == outcome].sort_values("budget"), names)
        ax.set_ylabel(f"share of total {plates.words(outcome)}")
    for ax in axes[-1]:
        ax.set_xlabel("budget (share of positions)")
    plates.legend(figure, axes[0, 0], 4 if width > 5 else 2)
    plates.caption(figure, plates.counts(table), plates.bars(level, "Bands"))
    return figure


def _budget_curves(ax, table: pd.DataFrame, names: list[str]) -> None:
    ax.set_xscale("log")
    common = table.drop_duplicates("budget")
    plates.band(ax, common.budget, common, plates.quiet(), "random_low", "random_high", label="random")
    for name in names:
        rows, style = table[table.criterion == name], plates.criterion_style(name, names)
        plates.band(ax, rows.budget, rows, style["color"])
        ax.plot(rows.budget, rows.captured_share, label=plates.words(name), **style)
    ax.plot(common.budget, common.oracle, color=plates.ink(), linestyle=DASHES[2], linewidth=1.0, label="oracle")
    plates.zero(ax)
    top = max(1.02, float(table[table.criterion.isin(names)].captured_share.max()) * 1.03)
    ax.set_ylim(top=min(top, ax.get_ylim()[1]) if np.isfinite(top) else None)
    plates.powers(ax.xaxis)
    ax.xaxis.set_major_formatter(FuncFormatter(plates.percent))
    ax.yaxis.set_major_formatter(FuncFormatter(plates.percent))


@plates.plate
def selection_summary(
    table: pd.DataFrame,
    *,
    budget: float | None = None,
    outcomes: Sequence[str] = BOTH,
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Normalised area, or enrichment at a budget: `dx.plot.selection_summary(tables["selection_summary"], budget=0.05)`.

    table: columns outcome, criterion, split, statistic, budget, estimate, low, high, baseline, positions, prompts. Without
    `budget` the area (0 random, 1 oracle); with one, how many times its own share of the gain a criterion captures
    (1 is random). The line is the baseline.
    """
    needs = ("outcome", "criterion", "split", "statistic", "budget", "estimate", "low", "high", "baseline")
    where = {"outcome": outcomes, "statistic": "area" if budget is None else "enrichment"}
    where |= ({} if budget is None else {"budget": budget}) | ({} if criteria is None else {"criterion": criteria})
    table = plates.halves(plates.keep(table, "figures.selection_summary", needs, where))
    outcomes, splits = plates.present(table.outcome, outcomes), plates.present(table.split, plates.SPLITS)
    names = _forest_order(table, outcomes[0], splits[-1], "estimate")
    figure, axes = plates.canvas(width, 1.15 + 0.2 * len(names), 1, len(outcomes), sharey=True)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        _forest(ax, table[table.outcome == outcome], names, splits, "estimate")
        plates.zero(ax, "x", float(table.baseline.iloc[0]))
        ax.set_title(plates.words(outcome))
        ax.set_xlabel("normalised area" if budget is None else f"enrichment at {budget:.0%}")
    plates.names_down(axes[0, 0], names)
    plates.legend(figure, axes[0, 0], 3)
    plates.caption(figure, plates.counts(table), plates.bars(level))
    return figure


@plates.plate
def selection_overlap(
    table: pd.DataFrame, *, budget: float | None = None, criteria: Sequence[str] | None = None, width: float = DOUBLE, dark: bool = False
) -> Figure:
    """Heat map of how many positions two criteria share: `dx.plot.selection_overlap(tables["selection_overlap"])`.

    table: columns criterion, other, statistic, budget, estimate, chance, positions, prompts, each pair once. A cell is
    the Jaccard index of the two selections at `budget`, the table's nearest to 5 % where None.
    """
    needs = ("criterion", "other", "statistic", "budget", "estimate", "chance")
    table = plates.keep(table, "figures.selection_overlap", needs, {"statistic": "jaccard"})
    budget = plates.nearest_budget(table) if budget is None else budget
    table = plates.keep(table, "figures.selection_overlap", needs, {"budget": budget})
    names = list(dict.fromkeys([*table.criterion, *table.other]))
    names = [name for name in criteria if name in names] if criteria is not None else names
    matrix = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for row in table[table.criterion.isin(names) & table.other.isin(names)].itertuples():
        matrix.loc[row.criterion, row.other] = matrix.loc[row.other, row.criterion] = row.estimate
    figure, axes = plates.canvas(width, min(width, 1.0 + 0.4 * len(names)) + 0.9)
    _heat_map(figure, axes[0, 0], matrix, "Jaccard index")
    chance = table.chance.median()
    plates.caption(figure, plates.counts(table), f"Budget {budget:.0%}. Two independent selections of that size share {chance:.2g}.")
    return figure


def _heat_map(figure: Figure, ax, matrix: pd.DataFrame, label: str) -> None:
    """Numbers in the cells while they fit; dark cells take light ink."""
    image = ax.imshow(matrix.to_numpy(float), cmap="cividis", vmin=0, vmax=1, aspect="equal")
    pitch = 72 * (figure.get_figwidth() - 1.2) / len(matrix)
    size = min(matplotlib.rcParams["xtick.labelsize"], 0.8 * pitch)
    ax.set_xticks(range(len(matrix.columns)), [plates.words(name) for name in matrix.columns], rotation=90, fontsize=size)
    ax.set_yticks(range(len(matrix)), [plates.words(name) for name in matrix.index], fontsize=size)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if pitch > 16:
        for (i, j), value in np.ndenumerate(matrix.to_numpy(float)):
            ax.text(j, i, f"{value:.2f}".removeprefix("0") if value < 1 else "1", ha="center", va="center",
                    fontsize=matplotlib.rcParams["font.size"] - 2, color="#FFFFFF" if value < 0.55 else "#000000")
    bar = figure.colorbar(image, ax=ax, location="top", pad=0.02, aspect=40, shrink=0.6, label=label)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(width=0.5, length=2)


PROFILES = {"quadrant": ("q1", "q2", "q3", "q4"), "kind of token": ("word", "number", "punctuation", "unknown", "special")}


@plates.plate
def selection_profile(
    table: pd.DataFrame, *, budget: float | None = None, criteria: Sequence[str] | None = None, width: float = DOUBLE, dark: bool = False
) -> Figure:
    """What each criterion selects, as shares of its selection: `dx.plot.selection_profile(tables["selection_profile"])`.

    table: columns criterion, budget, measure, estimate, full, positions, prompts. budget: the table's nearest to 5 % where
    None. The lowest bar is all positions.
    """
    needs = ("criterion", "budget", "measure", "estimate", "full")
    table = plates.keep(table, "figures.selection_profile", needs)
    budget = plates.nearest_budget(table) if budget is None else budget
    table = plates.keep(table, "figures.selection_profile", needs, {"budget": budget})
    groups = {title: [name for name in measures if (table.measure == name).any()] for title, measures in PROFILES.items()}
    groups = {title: measures for title, measures in groups.items() if measures}
    names = list(dict.fromkeys(table.criterion)) if criteria is None else [n for n in criteria if (table.criterion == n).any()]
    rows, columns = plates.panels(max(len(groups), 1), width)
    figure, axes = plates.canvas(width, 0.5 + rows * (0.55 + 0.17 * (len(names) + 1)), rows, columns, sharey=True)
    for ax, (title, measures) in zip(axes.flat, groups.items(), strict=True):
        _stacks(ax, table[table.measure.isin(measures)], measures, names)
        ax.set_title(title)
        ax.legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=4 if width > 5 else 2, handlelength=0.9, columnspacing=0.8)
    plates.names_down(axes[0, 0], [*names, "all positions"])
    plates.caption(figure, plates.counts(table), f"Shares of the selection at a budget of {budget:.0%}.")
    return figure


HATCHES = ("", "////", "\\\\\\\\", "xxxx")


def _stacks(ax, table: pd.DataFrame, measures: Sequence[str], names: list[str]) -> None:
    wide = table.pivot(index="criterion", columns="measure", values="estimate").reindex(names)
    wide.loc["all positions"] = table.drop_duplicates("measure").set_index("measure").full
    left = np.zeros(len(wide))
    for index, name in enumerate(measures):
        shares = wide[name].to_numpy(float)
        ax.barh(np.arange(len(wide)), shares, left=left, height=0.72, color=CYCLE[index], hatch=HATCHES[index], edgecolor=plates.paper(),
                linewidth=0.4, label=plates.words(name).upper() if name[0] == "q" else plates.words(name))
        left = left + np.nan_to_num(shares)
    ax.set_xlim(0, 1)
    ax.set_ylim(len(wide) - 0.4, -0.6)
    ax.xaxis.set_ticks_position("top")
    ax.set_xticks([0.25, 0.5, 0.75])
    ax.xaxis.set_major_formatter(FuncFormatter(plates.percent))
    ax.grid(visible=False)
    ax.tick_params(axis="y", length=0)


@plates.plate
def intervention(
    table: pd.DataFrame,
    *,
    measure: str = "forward_kl",
    groups: Sequence[str] = ("held_out", "step"),
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """What a step on the selected positions alone does: `dx.plot.intervention(dx.intervene(pair, bank))`.

    table: columns criterion, budget, group, measure, reduction, low, high, positions, prompts. One line a criterion over
    its budgets; the level lines are the step on all positions and the placebo.
    """
    needs = ("criterion", "budget", "group", "measure", "reduction", "low", "high")
    table = plates.keep(table, "figures.intervention", needs, {"measure": measure, "group": groups})
    names, groups = _some(table, criteria), plates.present(table.group, groups)
    rows, columns = plates.panels(len(groups), width)
    figure, axes = plates.canvas(width, 0.8 + 2.1 * rows, rows, columns, sharex=True)
    for ax, group in zip(axes.flat, groups, strict=True):
        _reductions(ax, table[table.group == group].sort_values("budget"), names)
        ax.set_title({"held_out": "held-out positions", "step": "step positions"}.get(group, plates.words(group)))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"drop of {plates.words(measure)} (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("budget (share of step positions)")
    plates.legend(figure, axes[0, 0], 4 if width > 5 else 2)
    plates.caption(figure, plates.counts(table.drop(columns="group")), plates.bars(level, "Bands"))
    return figure


def _reductions(ax, table: pd.DataFrame, names: list[str], *, bars: bool = False) -> None:
    """A line a criterion over its budgets, with bands, or with bars side by side where budgets are few."""
    ax.set_xscale("log")
    for name, line in (("full", {"color": plates.ink(), "linestyle": "-"}), ("placebo", {"color": plates.quiet(), "linestyle": DASHES[2]})):
        for row in table[table.criterion == name].head(1).itertuples():
            ax.axhline(row.reduction, linewidth=1.0, label=name, **line)
            ax.axhspan(row.low, row.high, color=line["color"], alpha=0.08, linewidth=0)
    lines = {name: plates.criterion_style(name, names) for name in ("random", *names)}
    for (name, line), shift in zip(lines.items(), plates.offsets(len(lines), 0.045), strict=True):
        rows = table[table.criterion == name]
        x = rows.budget * np.exp(shift if bars else 0.0)
        if bars and len(rows):
            plates.upright(ax, x, rows, "reduction", label=plates.words(name), **line | {"linewidth": 0.8})
        elif len(rows):
            plates.band(ax, x, rows, line["color"])
            ax.plot(x, rows.reduction, label=plates.words(name), **line)
    plates.zero(ax)
    plates.powers(ax.xaxis)
    ax.xaxis.set_major_formatter(FuncFormatter(plates.percent))


# --- training ---------------------------------------------------------------------------------------

TRAINED = ("forward_kl", "reverse_kl", "accuracy", "accuracy_greedy")
MEASURE_UNITS = {"accuracy": "share", "accuracy_greedy": "share", "finished": "share", "response_length": "tokens"}


def _measured(name: str) -> str:
    """A measure of an evaluation with its unit."""
    return f"{plates.words(name)} ({MEASURE_UNITS.get(name, 'nats')})"


MANY_CELLS = 6
"""Cells of a grid up to which all of their training curves are drawn."""


@plates.plate
def training_curves(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = ("loss", "forward_kl/all"),
    budget: float | None = None,
    window: int | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """What training logged, step by step: `dx.plot.training_curves(result.metrics)`.

    table: a column step, the measures, and where there are several trainings criterion, budget and seed. A line is a criterion
    at a budget, the mean over its seeds of running means of `window` steps (a twentieth of the steps where None); its band
    reaches from the lowest to the highest seed. budget: that one alone, beside full; the nearest to 5 % where None and
    all of them would be more than six lines.
    """
    names = [name for name in measures if name in table] or list(measures)
    table = plates.keep(table, "figures.training_curves", ("step", *names))
    table, share = _some_cells(table, budget)
    window = window or max(1, table.step.nunique() // 20)
    rows, columns = plates.panels(len(names), width)
    figure, axes = plates.canvas(width, 0.9 + 1.7 * rows, rows, columns, sharex=True)
    for ax, name in zip(axes.flat, names, strict=True):
        _seed_bands(ax, table, name, window)
        ax.set_ylabel(_logged(name))
    for ax in axes[-1]:
        ax.set_xlabel("optimiser step")
    plates.legend(figure, axes[0, 0], 4 if width > 5 else 2)
    seeds = f"Bands: lowest to highest of {table.seed.nunique()} seeds." if "seed" in table and table.seed.nunique() > 1 else ""
    smooth = f"Running means of {window} steps." if window > 1 else ""
    budgets = f"Budget {share:.0%} and full." if share else ""
    plates.caption(figure, "Training batches, not held-out prompts.", budgets, smooth, seeds)
    return figure


def _some_cells(table: pd.DataFrame, budget: float | None) -> tuple[pd.DataFrame, float | None]:
    """Every cell, or those of one budget and full, and that budget."""
    if "budget" not in table or (budget is None and len(table[["criterion", "budget"]].drop_duplicates()) <= MANY_CELLS):
        return table, None
    selected = table[table.criterion != "full"]
    share = plates.nearest_budget(selected) if budget is None else budget
    return plates.keep(table[(table.criterion == "full") | np.isclose(table.budget, share)], "figures.training_curves", ("step",)), share


def _seed_bands(ax, table: pd.DataFrame, name: str, window: int) -> None:
    """A line a cell with the range of its seeds."""
    keys = [key for key in ("criterion", "budget") if key in table]
    criteria = table.criterion.unique() if "criterion" in table else []
    for number, (key, cell) in enumerate(table.groupby(keys, sort=False) if keys else [((), table)]):
        seeds = cell.pivot_table(index="step", columns="seed", values=name) if "seed" in cell else cell.set_index("step")[[name]]
        seeds = seeds.rolling(window, min_periods=1, center=True).mean()
        style = plates.criterion_style(key[0], criteria) if key else {"color": BLUE}
        if key and (table[table.criterion == key[0]].budget.nunique() > 1):
            style |= {"linestyle": DASHES[number % len(DASHES)]}
        label = plates.words(key[0]) + (f" {key[1]:.0%}" if len(key) > 1 and key[1] < 1 else "") if key else "training"
        ax.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=style["color"], alpha=0.16, linewidth=0)
        ax.plot(seeds.index, seeds.mean(axis=1), label=label, **style | {"marker": "None", "linewidth": 1.1})


def _logged(name: str) -> str:
    """A logged measure with its unit."""
    units = {"loss": "loss of the selected (nats)", "selected_share": "selected share"}
    what, _, where = name.partition("/")
    return units.get(name, f"{plates.words(what)}, {where} (nats)" if where and "kl" in what else plates.words(name.replace("/", ", ")))


@plates.plate
def evaluations(
    table: pd.DataFrame, *, measures: Sequence[str] = TRAINED, level: float | None = None, width: float = DOUBLE, dark: bool = False
) -> Figure:
    """The student on held-out prompts before, during and after training: `dx.plot.evaluations(result.evaluations)`.

    table: columns step, measure, mean, low, high, count, prompts. The dashed line is the untouched student.
    """
    table = plates.keep(table, "figures.evaluations", ("step", "measure", "mean", "low", "high"), {"measure": measures})
    names = plates.present(table.measure, measures)
    rows, columns = plates.panels(len(names), width)
    figure, axes = plates.canvas(width, 0.6 + 1.6 * rows, rows, columns, sharex=True)
    for ax, name in zip(axes.flat, names, strict=True):
        part = table[table.measure == name].sort_values("step")
        plates.upright(ax, part.step, part, "mean", marker="o", linestyle="-", color=BLUE, label=name)
        ax.axhline(part["mean"].iloc[0], color=plates.quiet(), linestyle=DASHES[1], linewidth=0.9)
        ax.set_ylabel(_measured(name))
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[-1]:
        ax.set_xlabel("optimiser step")
    prompts = f"{int(table.prompts.max()):,} held-out prompts." if "prompts" in table else ""
    plates.caption(figure, prompts, plates.bars(level))
    return figure


@plates.plate
def validation(
    table: pd.DataFrame,
    *,
    measures: Sequence[str] = TRAINED,
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """What trainings gained on held-out prompts, by budget: `dx.plot.validation(tables["validation_outcomes"])`.

    table: columns criterion, budget, measure, gain, gain_low, gain_high (improvement over the untouched student), seeds,
    prompts. The level line is full OPD; bars are intervals over seeds and prompts.
    """
    needs = ("criterion", "budget", "measure", "gain", "gain_low", "gain_high")
    table = _ends(plates.keep(table, "figures.validation", needs, {"measure": measures}), "gain")
    table = table.rename(columns={"gain": "reduction"})
    names, shown = _some(table[table.criterion != "untouched"], criteria), plates.present(table.measure, measures)
    down, across = (-(-len(shown) // 2), min(2, len(shown))) if width > 5 else (len(shown), 1)
    figure, axes = plates.canvas(width, 0.8 + 2.0 * down, down, across)
    for ax, name in zip(axes.flat, shown, strict=False):
        _reductions(ax, table[table.measure == name].sort_values("budget"), names, bars=True)
        ax.set_ylabel(f"gain in {_measured(name)}")
        ax.set_xlabel("budget (share of positions)")
    for ax in axes.flat[len(shown):]:
        ax.set_visible(False)
    plates.legend(figure, axes[0, 0], 4 if width > 5 else 2)
    plates.caption(figure, _trained_counts(table), plates.bars(level, over="seeds and prompts"))
    return figure


FORESEEN = ("captured_gain", "captured_relative_gain", "intervention_forward_kl", "one_step_gain")
"""Answers of the usual scatter: what a criterion captures of each gain, what a step on its selection does, and a training's own first step."""
ANSWERS = {
    "captured_gain": "captured gain", "captured_relative_gain": "captured relative gain", "intervention_forward_kl": "drop after one step (nats)",
    "one_step_gain": "gain after first step (nats)",
}


@plates.plate
def validation_scatter(
    table: pd.DataFrame,
    foreseen: pd.DataFrame,
    *,
    answers: Sequence[str] = FORESEEN,
    measure: str = "forward_kl",
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Foreseen against trained: `dx.plot.validation_scatter(tables["validation_outcomes"], tables["validation_foreseen"])`.

    table: as `validation` has it. foreseen: columns criterion, budget, answer, value, one panel an answer. A mark is one cell of
    the grid; a colour and shape is a criterion, a larger mark a larger budget. Marks that rise to the right were foreseen.
    """
    needs = ("criterion", "budget", "measure", "gain", "gain_low", "gain_high")
    trained = _ends(plates.keep(table, "figures.validation_scatter", needs, {"measure": measure}), "gain")
    foreseen = plates.keep(foreseen, "figures.validation_scatter", ("criterion", "budget", "answer", "value"), {"answer": answers})
    both = trained.merge(foreseen[["criterion", "budget", "answer", "value"]], on=["criterion", "budget"])
    both = plates.keep(both.dropna(subset=["value", "gain"]), "figures.validation_scatter", ("value",))
    shown, names = plates.present(both.answer, answers), list(dict.fromkeys(both.criterion))
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    figure, axes = plates.canvas(width, 0.9 + (1.9 if width > 5 else 1.5) * down, down, across, sharey=True)
    figure.get_layout_engine().set(w_pad=0.13)  # ticks at the very end of an axis hang over
    for ax, answer in zip(axes.flat, shown, strict=False):
        _cells(ax, both[both.answer == answer], names)
        ax.set_xlabel(ANSWERS.get(answer, plates.words(answer)))
    for ax in axes[:, 0]:
        ax.set_ylabel(f"trained gain ({MEASURE_UNITS.get(measure, 'nats')})")
    for ax in axes.flat[len(shown):]:
        ax.set_visible(False)
    plates.legend(figure, axes[0, 0], 5 if width > 5 else 3)
    words = f"{len(both[['criterion', 'budget']].drop_duplicates())} cells; a larger mark is a larger budget."
    plates.caption(figure, f"Trained gain in {plates.words(measure)}.", words, _trained_counts(table), plates.bars(level, over="seeds and prompts"))
    return figure


def _cells(ax, table: pd.DataFrame, names: list[str]) -> None:
    """Every cell of a grid as a mark with its interval, the mark growing with the budget."""
    plates.zero(ax)
    for name in names:
        style = plates.criterion_style(name, names) | {"linestyle": "none"}
        for number, cell in enumerate(table[table.criterion == name].sort_values("budget").to_dict("records")):
            label = plates.words(name) if number == 0 else f"_{name} {number}"
            plates.upright(ax, [cell["value"]], pd.DataFrame([cell]), "gain", label=label, **style | {"markersize": 3.0 + 1.3 * number})
    ax.xaxis.set_major_locator(MaxNLocator(4 if ax.figure.get_figwidth() > 5 else 3))


def _trained_counts(table: pd.DataFrame) -> str:
    """Seeds and held-out prompts of a grid, where its table names them."""
    trained = table[table.criterion != "untouched"]
    if not {"seeds", "prompts"} <= set(table):
        return ""
    return f"{int(trained.seeds.max())} seeds, {int(trained.prompts.max()):,} held-out prompts."


# --- several runs -----------------------------------------------------------------------------------


@plates.plate
def runs(
    table: pd.DataFrame,
    *,
    key: str = "criterion",
    value: str = "estimate",
    label: str = "Spearman ρ",
    outcomes: Sequence[str] = BOTH,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """One statistic of several runs, side by side: `dx.plot.runs(dx.compare_runs([DIR1, DIR2]).tables["correlations"])`.

    table: columns run, outcome, `key` (what the rows are), `value`, low, high; one row a run, outcome and key.
    """
    table = plates.keep(table, "figures.runs", ("run", "outcome", key, value, "low", "high"), {"outcome": outcomes})
    table = table.rename(columns={value: "estimate"})
    names = {name: f" {name}" if str(name).startswith("_") else name for name in table.run}  # matplotlib hides labels that begin so
    series = [(shown, *_mark(i).values(), table[table.run == name]) for i, (name, shown) in enumerate(names.items())]
    return _statistic_forest(table, key, series, label, outcomes, level, width)


# --- the token table --------------------------------------------------------------------------------

MEASURES = (
    "student_entropy", "teacher_entropy", "forward_kl", "reverse_kl", "js", "compatibility", "topk_overlap", "advantage",
    "acceptance", "student_margin", "gain", "relative_gain",
)


@plates.plate
def position_gain(
    table: pd.DataFrame, *, outcomes: Sequence[str] = BOTH, level: float | None = None, width: float = DOUBLE, dark: bool = False
) -> Figure:
    """Mean gain along the response: `dx.plot.position_gain(tables["positions"])`.

    table: columns outcome, split, position (middle of a bin of relative positions, 0 to 1), mean, low, high, positions, prompts.
    """
    needs = ("outcome", "split", "position", "mean", "low", "high")
    table = plates.halves(plates.keep(table, "figures.position_gain", needs, {"outcome": outcomes}))
    outcomes = plates.present(table.outcome, outcomes)
    rows, columns = plates.panels(len(outcomes), width)
    figure, axes = plates.canvas(width, 0.75 + 1.8 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        plates.zero(ax)
        for index, split in enumerate(plates.present(table.split, plates.SPLITS)):
            color, marker, words = plates.split_style(split, index)
            part = table[(table.outcome == outcome) & (table.split == split)].sort_values("position")
            plates.band(ax, part.position, part, color)
            ax.plot(part.position, part["mean"], color=color, marker=marker, markersize=3, linestyle=DASHES[index], label=words)
        ax.set_ylabel(f"mean {plates.with_unit(outcome)}")
    for ax in axes[-1]:
        ax.set_xlabel("relative position in the response")
    plates.legend(figure, axes[0, 0], 3)
    plates.caption(figure, plates.counts(table), plates.bars(level, "Bands"))
    return figure


@plates.plate
def distributions(
    tokens: pd.DataFrame, *, columns: Sequence[str] | None = None, bins: int = 40, width: float = DOUBLE, dark: bool = False
) -> Figure:
    """Histogram of every measurement: `dx.plot.distributions(tokens)`.

    tokens: a token table; `columns` default to those of the usual twelve that it has. Counts are on a logarithmic
    axis, since most mass often sits at one end.
    """
    names = list(columns) if columns is not None else [name for name in MEASURES if name in tokens]
    tokens = plates.keep(tokens, "figures.distributions", ("prompt_id", *(names or MEASURES[:1])))
    across = min(4 if width > 5 else 2, len(names))
    down = -(-len(names) // across)
    figure, axes = plates.canvas(width, 0.35 + 1.15 * down, down, across)
    figure.get_layout_engine().set(w_pad=0.13)  # ticks at the very end of an axis hang over
    for ax, name in zip(axes.flat, names, strict=False):
        values = tokens[name].to_numpy(float)
        values = values[np.isfinite(values)]
        unit = SCHEMA[name].unit if name in SCHEMA else ""
        label = plates.words(name) + (f" ({unit})" if unit else "")
        ax.set_xlabel(label if width > 5 or len(label) < 26 else label.replace(" (", "\n("))
        ax.xaxis.set_major_locator(MaxNLocator(3))
        if len(values):
            ax.hist(values, bins=bins, histtype="stepfilled", color=BLUE, linewidth=0, log=True)
            plates.powers(ax.yaxis)
        else:
            ax.text(0.5, 0.5, "undefined everywhere", ha="center", va="center", transform=ax.transAxes)
            ax.set_yticks([])
    for ax in axes.flat[len(names):]:
        ax.set_visible(False)
    plates.caption(figure, f"Number of positions. {tokens.prompt_id.nunique():,} prompts, {len(tokens):,} positions.")
    return figure
