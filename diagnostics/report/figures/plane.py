"""Where the gain lies: the plane of entropy and divergence, its quadrants, Q3, and the place in the
response.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.criteria import quadrants as quadrant_of
from diagnostics.report import style
from diagnostics.report.figures.common import BOTH, thin_color_bar
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import DASHES, DOUBLE

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
@style.plate
def entropy_divergence(
    tokens: pd.DataFrame,
    *,
    color: Sequence[str] = ("compatibility", "gain"),
    bins: int = 26,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """The plane of student entropy and forward KL: `dx.plot.entropy_divergence(result.tokens)`.

    tokens: a token table. Each hexagon shows the mean of one column over its positions; the lines
    are the medians that split the quadrants, with each quadrant's positions in its corner. Axes are
    logarithmic in nats and start at 1e-3; what lies below is drawn on the edge. The scale of
    `color` ends at the 2nd and 98th percentile of the hexagons; where values of both signs occur it
    follows their square root."""
    needs = ("student_entropy", "forward_kl", "prompt_id", *color)
    tokens = style.keep(tokens, "figures.entropy_divergence", needs)
    defined = np.isfinite(tokens[list(needs[:2])].to_numpy(float)).all(axis=1)
    tokens = tokens[defined].reset_index(drop=True)
    rows, columns = style.panels(len(color), width)
    figure, axes = style.canvas(
        width,
        0.45 + (2.45 if columns == 1 else 2.75) * rows,
        rows,
        columns,
        sharex=True,
        sharey=True,
    )
    for ax, name in zip(axes.flat, color, strict=True):
        _hexagons(figure, ax, tokens, name, bins)
        _quadrant_lines(ax, tokens)
        ax.set_title(f"mean {style.words(name)}")
    for ax in axes[-1]:
        ax.set_xlabel("student entropy H(p) (nats)")
    for ax in axes[:, 0]:
        ax.set_ylabel("forward KL(q‖p) (nats)")
    style.caption(
        figure,
        f"{tokens.prompt_id.nunique():,} prompts, {len(tokens):,} positions. Lines: medians. Q3 is"
        " confident and wrong.",
    )
    return figure


def _hexagons(figure: Figure, ax, tokens: pd.DataFrame, name: str, bins: int) -> None:
    values = tokens[name].to_numpy(float)
    kept = np.isfinite(values)
    x = np.clip(tokens.student_entropy.to_numpy(float)[kept], FLOOR, None)
    y = np.clip(tokens.forward_kl.to_numpy(float)[kept], FLOOR, None)
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
        hexagons.set_cmap("cividis")
        hexagons.set_clim(low, high if high > low else low + 1e-12)
        thin_color_bar(figure, ax, hexagons).ax.yaxis.set_major_locator(MaxNLocator(5))


def _quadrant_lines(ax, tokens: pd.DataFrame) -> None:
    """Median lines, each quadrant's number of positions and their share, over a haze of paper."""
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


@figure(
    table="quadrants",
    title="Gain by quadrant",
    reading=(
        "Below each quadrant stands its share of the positions. A quadrant with a high mean and a "
        "small share can hold less of the whole gain than one with a low mean and a large share."
    ),
)
@style.plate
def quadrants(
    table: pd.DataFrame,
    *,
    statistic: str = "mean",
    outcomes: Sequence[str] = BOTH,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Gain in each quadrant: `dx.plot.quadrants(dx.study(tokens)["quadrants"])`.

    table: columns outcome, split, quadrant, statistic, estimate, low, high, share, positions,
    prompts. Below each quadrant's name stands its share of the positions; `all` is the mean over
    all of them."""
    needs = ("outcome", "split", "quadrant", "statistic", "estimate", "low", "high", "share")
    table = style.halves(
        style.keep(table, "figures.quadrants", needs, {"outcome": outcomes, "statistic": statistic})
    )
    outcomes, names = style.present(table.outcome, outcomes), sorted(table.quadrant.unique())
    share = (
        table[table.split == style.preferred(table)]
        .drop_duplicates("quadrant")
        .set_index("quadrant")
        .share
    )
    rows, columns = style.panels(len(outcomes), width)
    figure, axes = style.canvas(width, 0.8 + 1.85 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _beside(ax, table[table.outcome == outcome], "quadrant", names, "estimate")
        ax.set_xticks(
            range(len(names)), [f"{name}\n{share.get(name, np.nan):.0%}" for name in names]
        )
        ax.set_ylabel(f"{statistic} {style.with_unit(outcome)}")
    style.legend(figure, axes[0, 0], 3)
    legend = (
        "Q1 unsure and wrong, Q2 unsure and right, Q3 confident and wrong, Q4 confident and right."
    )
    style.caption(figure, style.counts(table), legend, style.bars(level))
    return figure


def _beside(ax, table: pd.DataFrame, key: str, names: list, value: str) -> None:
    """One mark a category and split, splits side by side."""
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
        "highest. A line that rises with compatibility says that, among confident errors, those "
        "within the student's reach gained more."
    ),
)
@style.plate
def q3_gain(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] = BOTH,
    scores: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Mean gain by tertile of each score within Q3:
    `dx.plot.q3_gain(dx.study(tokens)["q3_groups"])`.

    table: columns outcome, split, score, group (1 is the lowest), mean, low, high, positions,
    prompts. For each score the marks run from its bottom to its top; a rising line means that the
    gain rises with the score among confident, wrong positions."""
    needs = ("outcome", "split", "score", "group", "mean", "low", "high")
    where = {"outcome": outcomes} | ({"score": scores} if scores is not None else {})
    table = style.halves(style.keep(table, "figures.q3_gain", needs, where))
    outcomes = style.present(table.outcome, outcomes)
    rows, columns = style.panels(len(outcomes), width)
    figure, axes = style.canvas(width, 0.75 + 1.85 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _group_lines(ax, table[table.outcome == outcome], style.present(table.score, scores or ()))
        ax.set_ylabel(f"mean {style.with_unit(outcome)}")
    style.legend(figure, axes[0, 0], 3)
    style.caption(
        figure,
        style.counts(table),
        "Each group of marks: bottom to top of the score within Q3.",
        style.bars(level),
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
                linestyle="-",
                linewidth=0.9,
                color=color,
                zorder=3,
                label=words if place == 0 else f"_{score}",
            )
    ax.set_xticks(range(len(scores)), [style.words(score) for score in scores])
    ax.set_xlim(-0.5, len(scores) - 0.5)


@figure(
    table="q3_contrast",
    title="The contrast within Q3, raw and matched",
    reading=(
        "Top minus bottom third of each score. Hollow marks compare only positions of one prompt"
        " with like entropy, divergence and place, so they answer the objection that the groups"
        " differ in something else. Claim C2 needs both to the right of zero."
    ),
    arguments={"matching": "matching"},
)
@style.plate
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
    """Top minus bottom group of each score within Q3: `dx.plot.q3_contrast(tables["q3_contrast"],
    tables["matching"])`.

    table: columns outcome, split, score, groups, difference, low, high, placebo_difference,
    positions, prompts. matching: the same differences between positions of one prompt with like
    entropy, divergence and place, with a column replacement; drawn hollow, with replacement.
    Diamonds are the placebo's differences."""
    needs = ("outcome", "split", "score", "difference", "low", "high", "placebo_difference")
    table = style.halves(
        style.keep(
            table,
            "figures.q3_contrast",
            (*needs, "groups"),
            {"outcome": outcomes, "groups": groups},
        )
    )
    outcomes, scores = style.present(table.outcome, outcomes), list(dict.fromkeys(table.score))
    if matching is not None:
        where = {"outcome": outcomes, "replacement": True}
        matching = style.halves(
            style.keep(matching, "figures.q3_contrast", (*needs, "replacement"), where)
        )
    figure, axes = style.canvas(
        width,
        1.25 + (0.32 if matching is None else 0.5) * len(scores),
        1,
        len(outcomes),
        sharey=True,
    )
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        pair = None if matching is None else matching[matching.outcome == outcome]
        _contrast_rows(ax, table[table.outcome == outcome], pair, scores)
        ax.set_title(style.words(outcome))
        ax.set_xlabel(f"top − bottom ({style.UNITS.get(outcome, '')})")
        ax.xaxis.set_major_locator(MaxNLocator(4 if width > 5 else 3))
    style.names_down(axes[0, 0], scores)
    style.legend(figure, axes[0, 0], 3 if width > 5 else 2, style.placebo_key())
    style.caption(
        figure,
        style.counts(table),
        f"Top minus bottom {groups} within Q3.",
        (
            ""
            if matching is None
            else "Hollow: matched within a prompt on entropy, divergence and place."
        ),
        style.bars(level),
    )
    return figure


def _contrast_rows(
    ax, table: pd.DataFrame, matching: pd.DataFrame | None, scores: list[str]
) -> None:
    kinds = [(table, None, "")] + (
        [] if matching is None else [(matching, style.paper(), ", matched")]
    )
    splits = style.present(table.split, style.SPLITS)
    places = iter(style.offsets(len(kinds) * len(splits), 0.38 if matching is None else 0.2))
    style.zero(ax, "x")
    for index, split in enumerate(splits):
        color, marker, words = style.split_style(split, index)
        for rows, face, more in kinds:
            rows, y = (
                rows[rows.split == split].set_index("score").reindex(scores),
                np.arange(len(scores)) + next(places),
            )
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
            ax.plot(
                rows.placebo_difference.to_numpy(float),
                y,
                zorder=2,
                label=f"_placebo {split}{more}",
                **style.diamond(color),
            )


@figure(
    table="positions",
    title="Gain along the response",
    reading=(
        "Mean gain by place in the response, 0 its start and 1 its end. A criterion that prefers a "
        "place inherits this curve."
    ),
)
@style.plate
def position_gain(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] = BOTH,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Mean gain along the response: `dx.plot.position_gain(tables["positions"])`.

    table: columns outcome, split, position (middle of a bin of relative positions, 0 to 1), mean,
    low, high, positions, prompts."""
    needs = ("outcome", "split", "position", "mean", "low", "high")
    table = style.halves(style.keep(table, "figures.position_gain", needs, {"outcome": outcomes}))
    outcomes = style.present(table.outcome, outcomes)
    rows, columns = style.panels(len(outcomes), width)
    figure, axes = style.canvas(width, 0.75 + 1.8 * rows, rows, columns, sharex=True)
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
        ax.set_ylabel(f"mean {style.with_unit(outcome)}")
    for ax in axes[-1]:
        ax.set_xlabel("relative position in the response")
    style.legend(figure, axes[0, 0], 3)
    style.caption(figure, style.counts(table), style.bars(level, "Bands"))
    return figure
