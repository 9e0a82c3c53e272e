"""Where the gain lies: the plane of entropy and divergence, its quadrants, Q3, and the place in the
response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.criteria import DEFAULT_BUDGET, select
from diagnostics.criteria import quadrants as quadrant_of
from diagnostics.report import naming, style
from diagnostics.report.figures.common import one_scale, thin_color_bar
from diagnostics.report.figures.options import Intervals, Page, on_page
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import DASHES

FLOOR = 1e-3
"""Nats below which the logarithmic axes of the entropy-divergence plane do not look."""


@figure(
    table="tokens",
    title="Where compatible signals and gains lie",
    reading=(
        "Every hexagon is the mean over the positions that fall into it; left the teacher's mass on"
        " the student's top K, right the gain. Upper left is Q3: the student is confident and the"
        " teacher disagrees. If teachability is right, gains there should sit where compatibility"
        " is high."
    ),
    needs=("compatibility", "gain"),
)
@on_page
def entropy_divergence(
    tokens: pd.DataFrame,
    *,
    color: Sequence[str] = ("compatibility", "gain"),
    bins: int = 26,
    **page: Unpack[Page],
) -> Figure:
    """The plane of student entropy and forward KL, colored by the mean of a column.

    Example: `dx.plot.entropy_divergence(result.tokens)`. Each hexagon shows the mean of one column
    over its positions. The lines are the medians that split the quadrants; each corner names its
    quadrant's positions. Axes are logarithmic in nats and start at 1e-3; smaller values are drawn
    on the edge. A color scale ends at the 2nd and 98th percentile of the hexagons; where values of
    both signs occur, it follows their square root.

    Args:
        tokens: A token table, one row per response position, with the columns student_entropy,
            forward_kl (nats), prompt_id and those of `color`. Positions with an undefined entropy
            or divergence are left out.
        color: Columns to color by, one panel for each.
        bins: Number of hexagons along the horizontal axis.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("student_entropy", "forward_kl", "prompt_id", *color)
    tokens = style.keep(tokens, "figures.entropy_divergence", needs)
    defined = np.isfinite(tokens[list(needs[:2])].to_numpy(float)).all(axis=1)
    tokens = tokens[defined].reset_index(drop=True)
    plane = np.clip(tokens[list(needs[:2])].to_numpy(float), FLOOR, None)
    rows, columns = style.panels(len(color), page["width"])
    figure, axes = style.canvas(
        page["width"],
        0.45 + (2.45 if columns == 1 else 2.75) * rows,
        rows,
        columns,
        sharex=True,
        sharey=True,
    )
    for ax, name in zip(axes.flat, color, strict=True):
        _hexagons(figure, ax, tokens, name, bins, plane)
        _quadrant_lines(ax, tokens)
        ax.set_title(f"mean {naming.readable(name)}")
    for ax in axes[-1]:
        ax.set_xlabel("student entropy H(p) (nats)")
    for ax in axes[:, 0]:
        ax.set_ylabel("forward KL(q‖p) (nats)")
    style.caption(
        figure,
        f"{tokens.prompt_id.nunique():,} prompts, {len(tokens):,} positions. Lines: medians. Q3 is"
        " confident and wrong. Scales with both signs follow the square root.",
    )
    return figure


def _hexagons(
    figure: Figure, ax, tokens: pd.DataFrame, name: str, bins: int, plane: np.ndarray
) -> None:
    """Mean of a column in the hexagons of a logarithmic plane [N, 2]."""
    values = tokens[name].to_numpy(float)
    kept = np.isfinite(values)
    x, y = plane[kept].T
    ax.grid(visible=False)
    hexagons = ax.hexbin(
        x,
        y,
        C=values[kept],
        gridsize=(bins, int(bins * 0.6)),
        xscale="log",
        yscale="log",
        linewidths=0.15,
        edgecolors="face",
    )
    style.powers(ax.xaxis, ax.yaxis)
    shown = np.asarray(hexagons.get_array(), float)
    low, high = np.percentile(shown, [2, 98]) if len(shown) else (0.0, 1.0)
    if low < 0:
        reach = max(abs(low), abs(high))
        hexagons.set_cmap(style.diverging())
        hexagons.set_norm(style.signed_root(reach))
        thin_color_bar(figure, ax, hexagons, extend="both").set_ticks(
            [float(f"{share * reach:.1g}") for share in (-1, -0.25, 0, 0.25, 1)]
        )
    else:
        hexagons.set_cmap(style.sequential())
        hexagons.set_clim(low, high if high > low else low + 1e-12)
        thin_color_bar(figure, ax, hexagons).ax.yaxis.set_major_locator(MaxNLocator(5))


def _quadrant_lines(ax, tokens: pd.DataFrame) -> None:
    """Median lines, each quadrant's number of positions and their share, in strips of the axes
    that hold no hexagons.
    """
    low, high = np.log(ax.get_ylim())
    room = 0.13 * (high - low)
    ax.set_ylim(np.exp(low - room), np.exp(high + room))
    style.powers(ax.yaxis)
    ax.axvline(tokens.student_entropy.median(), color=style.ink(), linewidth=0.8)
    ax.axhline(tokens.forward_kl.median(), color=style.ink(), linewidth=0.8)
    count = pd.Series(quadrant_of(tokens)).value_counts()
    corners = {1: (0.97, 0.97), 2: (0.97, 0.03), 3: (0.03, 0.97), 4: (0.03, 0.03)}
    haze = {"facecolor": style.paper(), "edgecolor": "none", "alpha": 0.8, "pad": 1.2}
    for quadrant, (x, y) in corners.items():
        number = count.get(quadrant, 0)
        ax.text(
            x,
            y,
            f"Q{quadrant}: {number:,} ({number / len(tokens):.0%})",
            transform=ax.transAxes,
            bbox=haze,
            gid=f"Q{quadrant}",
            ha="right" if x > 0.5 else "left",
            va="top" if y > 0.5 else "bottom",
        )


SMALLEST = 1e-6
"""Probability below which the logarithmic axes of the plane of probabilities do not look."""


@figure(
    table="tokens",
    title="What student and teacher thought of the sampled token",
    reading=(
        "Every hexagon holds the positions whose token had this probability under the student and"
        " under the teacher. Left the share of them that the criterion selects at the budget below,"
        " right their mean gain. On the diagonal both agree; below it the teacher thinks less of"
        " the token than the student did."
    ),
    needs=("student_logprob", "teacher_logprob", "gain"),
)
@on_page
def probabilities(
    tokens: pd.DataFrame,
    *,
    criterion: str = "teachability",
    budget: float = DEFAULT_BUDGET,
    value: str = "gain",
    bins: int = 26,
    **page: Unpack[Page],
) -> Figure:
    """The plane of the sampled token's probabilities: where a criterion selects, and what gains.

    Example: `dx.plot.probabilities(result.tokens, criterion="tip")`. Both axes are logarithmic;
    probabilities below 1e-6 are drawn on the edge. The line is p(y) = q(y).

    Args:
        tokens: A token table, one row per response position, with the columns student_logprob and
            teacher_logprob (nats), prompt_id, `value` and those that the criterion reads. Positions
            with an undefined probability are left out.
        criterion: The criterion whose selection is shown.
        budget: The share of positions that it selects.
        value: The column whose mean the second panel shows.
        bins: Number of hexagons along the horizontal axis.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    what, needs = (
        "figures.probabilities",
        ("student_logprob", "teacher_logprob", "prompt_id", value),
    )
    tokens = style.keep(tokens, what, needs)
    tokens = tokens.assign(selected=select(tokens, criterion, budget=budget).astype(float))
    defined = np.isfinite(tokens[list(needs[:2])].to_numpy(float)).all(axis=1)
    tokens = style.keep(tokens[defined], what, needs)
    plane = np.clip(np.exp(tokens[list(needs[:2])].to_numpy(float)), SMALLEST, None)
    rows, columns = style.panels(2, page["width"])
    shape = {"sharex": True, "sharey": True}
    height = 0.45 + (2.45 if columns == 1 else 2.75) * rows
    figure, axes = style.canvas(page["width"], height, rows, columns, **shape)
    titles = {"selected": f"selected by {naming.readable(criterion)}"}
    for ax, name in zip(axes.flat, ("selected", value), strict=True):
        _hexagons(figure, ax, tokens, name, bins, plane)
        ax.plot([SMALLEST, 1], [SMALLEST, 1], color=style.ink(), linewidth=0.8)
        ax.set_title(titles.get(name, f"mean {naming.with_unit(name)}"))
    for ax in axes[-1]:
        ax.set_xlabel("student p(y)")
    for ax in axes[:, 0]:
        ax.set_ylabel("teacher q(y)")
    style.caption(
        figure,
        f"{tokens.prompt_id.nunique():,} prompts, {len(tokens):,} positions; budget {budget:.0%}.",
        "Line: p(y) = q(y). Scales with both signs follow the square root.",
    )
    return figure


@figure(
    table="quadrants",
    title="Gain by quadrant",
    reading=(
        "Below each quadrant stands its share of the positions. A quadrant with a high mean and a "
        "small share can hold less of the whole gain than one with a low mean and a large share."
    ),
)
@on_page
def quadrants(
    table: pd.DataFrame,
    *,
    statistic: str = "mean",
    outcomes: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Gain in each quadrant of entropy and divergence.

    Example: `dx.plot.quadrants(dx.study(tokens)["quadrants"])`. Below each quadrant's name stands
    its share of the positions; `all` is the mean over all of them.

    Args:
        table: One row per (outcome, split, quadrant, statistic), with the columns estimate, low,
            high, share, positions and prompts.
        statistic: The statistic to show: mean, median, or another of the table's.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("outcome", "split", "quadrant", "statistic", "estimate", "low", "high", "share")
    table = style.halves(
        style.keep(table, "figures.quadrants", needs, {"outcome": outcomes, "statistic": statistic})
    )
    outcomes, names = style.present(table.outcome, outcomes), sorted(table.quadrant.unique())
    share = (
        table[table.split == naming.preferred_split(table)]
        .drop_duplicates("quadrant")
        .set_index("quadrant")
        .share
    )
    rows, columns = style.panels(len(outcomes), page["width"])
    figure, axes = style.canvas(page["width"], 0.8 + 1.85 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _marks_by_category(ax, table[table.outcome == outcome], "quadrant", names, "estimate")
        ax.set_xticks(
            range(len(names)), [f"{name}\n{share.get(name, np.nan):.0%}" for name in names]
        )
        ax.set_ylabel(f"{statistic} {naming.with_unit(outcome)}")
    scales = one_scale(list(axes.flat), _units(outcomes))
    style.legend(figure, axes[0, 0], 3)
    legend = (
        "Q1 unsure and wrong, Q2 unsure and right, Q3 confident and wrong, Q4 confident and right."
    )
    bars = style.bars(page["level"], table=table)
    style.caption(figure, style.counts(table), legend, scales, bars)
    return figure


def _units(outcomes: Sequence[str]) -> list[str]:
    """The unit of each panel whose outcome is named."""
    return [naming.UNITS.get(outcome, outcome) for outcome in outcomes]


def _marks_by_category(ax, table: pd.DataFrame, key: str, names: list, value: str) -> None:
    """Draw one mark per category and split, with the splits side by side."""
    splits = style.present(table.split, style.SPLITS)
    style.zero(ax)
    ax.grid(axis="x", visible=False)
    for index, (split, offset) in enumerate(
        zip(splits, style.offsets(len(splits), 0.16), strict=True)
    ):
        color, marker, words = style.split_style(split, index)
        rows = table[table.split == split].set_index(key).reindex(names)
        style.upright(
            ax,
            np.arange(len(names)) + offset,
            rows,
            value,
            fmt=marker,
            color=color,
            label=words,
            zorder=3,
        )
    ax.set_xlim(-0.5, len(names) - 0.5)


@figure(
    table="q3_groups",
    title="Gain within Q3, from the bottom to the top of each score",
    reading=(
        "Each group of marks runs from the third of Q3 with the lowest score to the third with the "
        "highest. Marks that rise with compatibility say that, among confident errors, those "
        "within the student's reach gained more."
    ),
)
@on_page
def q3_gain(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Mean gain within Q3 by groups of each score.

    Example: `dx.plot.q3_gain(dx.study(tokens)["q3_groups"])`. For each score the marks run from its
    lowest to its highest group. Rising marks mean that, among confident and wrong positions, the
    gain rises with the score.

    Args:
        table: One row per (outcome, split, score, group), with the columns mean, low, high,
            positions and prompts; group 1 is the lowest.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        scores: Names of the scores to show, in this order; all of the table where None.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("outcome", "split", "score", "group", "mean", "low", "high")
    where = {"outcome": outcomes} | ({"score": scores} if scores is not None else {})
    table = style.halves(style.keep(table, "figures.q3_gain", needs, where))
    outcomes = style.present(table.outcome, outcomes)
    rows, columns = style.panels(len(outcomes), page["width"])
    figure, axes = style.canvas(page["width"], 0.75 + 1.85 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _group_lines(ax, table[table.outcome == outcome], style.present(table.score, scores or ()))
        ax.set_ylabel(f"mean {naming.with_unit(outcome)}")
    scales = one_scale(list(axes.flat), _units(outcomes))
    style.legend(figure, axes[0, 0], 3)
    style.caption(
        figure,
        style.counts(table),
        "Each group of marks: bottom to top of the score within Q3.",
        scales,
        style.bars(page["level"], table=table),
    )
    return figure


def _group_lines(ax, table: pd.DataFrame, scores: list[str]) -> None:
    groups, splits = sorted(table.group.unique()), style.present(table.split, style.SPLITS)
    style.zero(ax)
    ax.grid(axis="x", visible=False)
    for index, (split, shift) in enumerate(
        zip(splits, style.offsets(len(splits), 0.07), strict=True)
    ):
        color, marker, words = style.split_style(split, index)
        for place, score in enumerate(scores):
            rows = (
                table[(table.split == split) & (table.score == score)]
                .set_index("group")
                .reindex(groups)
            )
            x = place + shift + np.linspace(-0.25, 0.25, len(groups))
            style.upright(
                ax,
                x,
                rows,
                "mean",
                marker=marker,
                linestyle="none",
                color=color,
                zorder=3,
                label=words if place == 0 else f"_{score}",
            )
    ax.set_xticks(range(len(scores)), [f"{naming.readable(score)}\nlow → high" for score in scores])
    ax.set_xlim(-0.5, len(scores) - 0.5)


@figure(
    table="q3_contrast",
    title="The contrast within Q3, raw and matched",
    reading=(
        "Top minus bottom third of each score. Hollow marks compare only positions of one prompt"
        " that were matched on entropy, divergence and place; where the groups hardly overlap, few"
        " pairs are left, and the table balance says how alike they are."
    ),
    arguments={"matching": "matching"},
)
@on_page
def q3_contrast(
    table: pd.DataFrame,
    matching: pd.DataFrame | None = None,
    *,
    groups: str = "tertile",
    outcomes: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Top minus bottom group of each score within Q3, raw and matched.

    Example: `dx.plot.q3_contrast(tables["q3_contrast"], tables["matching"])`. Hollow marks are the
    matched differences.

    Args:
        table: One row per (outcome, split, score, groups), with the columns difference, low, high,
            positions and prompts.
        matching: The same differences between positions of one prompt with similar entropy,
            divergence and place, with a column caliper, of which the narrowest is drawn (in tables
            of earlier versions replacement, of which those with replacement are). Left out where
            None.
        groups: How the top and the bottom group were formed: tertile, or another of the table's.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("outcome", "split", "score", "difference", "low", "high")

    def kept(rows: pd.DataFrame, column: str, value: str | bool | float) -> pd.DataFrame:
        where = {"outcome": outcomes, column: value}
        return style.halves(style.keep(rows, "figures.q3_contrast", (*needs, column), where))

    table = kept(table, "groups", groups)
    outcomes, scores = style.present(table.outcome, outcomes), style.present(table.score, ())
    if matching is not None:
        near = "caliper" if "caliper" in matching else "replacement"
        matching = kept(matching, near, matching.caliper.min() if near == "caliper" else True)
    height = 1.25 + (0.32 if matching is None else 0.5) * len(scores)
    figure, axes = style.canvas(page["width"], height, 1, len(outcomes), sharey=True)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        pair = None if matching is None else matching[matching.outcome == outcome]
        _contrast_rows(ax, table[table.outcome == outcome], pair, scores)
        ax.set_title(naming.readable(outcome))
        ax.set_xlabel(f"top − bottom ({naming.UNITS.get(outcome, '')})")
        ax.xaxis.set_major_locator(MaxNLocator(4 if page["width"] > 5 else 3))
    scales = one_scale(list(axes[0]), _units(outcomes), "x")
    style.names_down(axes[0, 0], scores)
    style.legend(figure, axes[0, 0], 4 if page["width"] > 5 else 1)
    style.caption(
        figure,
        style.counts(table),
        f"Top minus bottom {groups} within Q3.",
        "" if matching is None else _matched_words(matching),
        scales,
        style.bars(page["level"], table=table),
    )
    return figure


def _matched_words(matching: pd.DataFrame) -> str:
    """What the hollow marks are, and how much of the top group has a partner at all."""
    text = "Hollow: matched within a prompt on entropy, divergence and place"
    if "caliper" in matching and np.isfinite(matching.caliper.iloc[0]):
        text += f", pairs within {matching.caliper.iloc[0]:g} standard deviations"
    if "matched" in matching and matching.matched.notna().any():
        low, high = matching.matched.min(), matching.matched.max()
        share = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
        text += f"; {share} of the top group have a partner"
    return text + "."


def _contrast_rows(
    ax, table: pd.DataFrame, matching: pd.DataFrame | None, scores: list[str]
) -> None:
    """Draw one row per score: a mark per split, raw and matched."""
    kinds = [(table, None, "")] + (
        [] if matching is None else [(matching, style.paper(), ", matched")]
    )
    splits = style.present(table.split, style.SPLITS)
    places = iter(style.offsets(len(kinds) * len(splits), 0.38 if matching is None else 0.2))
    style.zero(ax, "x")
    for index, split in enumerate(splits):
        color, marker, words = style.split_style(split, index)
        for rows, face, more in kinds:
            rows = rows[rows.split == split].set_index("score").reindex(scores)
            y = np.arange(len(scores)) + next(places)
            style.lying(
                ax,
                y,
                rows,
                "difference",
                marker=marker,
                color=color,
                markerfacecolor=face or color,
                label=words + more,
                zorder=3,
            )


@figure(
    table="positions",
    title="Gain along the response",
    reading=(
        "Mean gain by place in the response, 0 its start and 1 its end. A criterion that prefers a "
        "place inherits this curve."
    ),
)
@on_page
def position_gain(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """Mean gain along the response.

    Example: `dx.plot.position_gain(tables["positions"])`.

    Args:
        table: One row per (outcome, split, position), with the columns mean, low, high, positions
            and prompts; position is the middle of a bin of relative positions, between 0 and 1.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    needs = ("outcome", "split", "position", "mean", "low", "high")
    table = style.halves(style.keep(table, "figures.position_gain", needs, {"outcome": outcomes}))
    outcomes = style.present(table.outcome, outcomes)
    rows, columns = style.panels(len(outcomes), page["width"])
    figure, axes = style.canvas(page["width"], 0.75 + 1.8 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        style.zero(ax)
        for index, split in enumerate(style.present(table.split, style.SPLITS)):
            color, marker, words = style.split_style(split, index)
            part = table[(table.outcome == outcome) & (table.split == split)].sort_values(
                "position"
            )
            style.band(ax, part.position, part, color)
            ax.plot(
                part.position,
                part["mean"],
                color=color,
                marker=marker,
                markersize=3,
                linestyle=DASHES[index],
                label=words,
            )
        ax.set_ylabel(f"mean {naming.with_unit(outcome)}")
    for ax in axes[-1]:
        ax.set_xlabel("relative position in the response")
    scales = one_scale(list(axes.flat), _units(outcomes))
    style.legend(figure, axes[0, 0], 3)
    bands = style.bars(page["level"], "Bands", table=table)
    style.caption(figure, style.counts(table), scales, bands)
    return figure
