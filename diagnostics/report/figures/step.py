"""The step and what was measured: calibration and distributions; several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diagnostics.analysis.step_batches import pooled_drops
from diagnostics.core.schema import SCHEMA
from diagnostics.report import naming, style
from diagnostics.report.figures.common import mark, statistic_forest
from diagnostics.report.figures.options import Intervals, Page, on_page
from diagnostics.report.figures.registry import figure
from diagnostics.report.style import BLUE, DASHES, GREEN, ORANGE, PURPLE


@figure(
    table="calibration",
    title="How linear the step was",
    reading=(
        "The drop of the step's own loss, predicted by the slope and realised, and their ratio. "
        "Lines are all folds together, and the chosen step is the largest tried at which the drops "
        "of all folds add up to at least four fifths of what was predicted: a single fold may keep "
        "less. Where the loss rises, gains say nothing about the signal."
    ),
)
@on_page
def calibration(
    table: pd.DataFrame,
    *,
    ratio: float = 0.8,
    **page: Unpack[Page],
) -> Figure:
    """Linearity of the step at each step size that was tried.

    Example: `dx.plot.calibration(result.calibration)`. The chosen step is ringed.

    Args:
        table: One row per step size, with the columns step_size, predicted_drop, realised_drop
            (nats per position of the step's loss), ratio, chosen and, for the caption,
            relative_norm; with a column fold, one per size and fold. Lines are then the folds
            together, as the size was chosen, and each fold's ratio stands beside them.
        ratio: The least share of the first-order prediction that a step may realize; drawn as a
            dashed line.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    needs = ("step_size", "predicted_drop", "realised_drop", "ratio", "chosen")
    table = style.keep(table, "figures.calibration", needs)
    table = style.keep(table[table.step_size > 0], "figures.calibration", needs)
    pooled = style.keep(pooled_drops(table), "figures.calibration", needs)
    rows, columns = style.panels(2, page["width"])
    figure, axes = style.canvas(page["width"], 0.55 + 1.8 * rows, rows, columns, sharex=True)
    drop, share = axes.flat
    _drops(drop, pooled)
    share.plot(pooled.step_size, pooled.ratio, color=style.tone(BLUE), marker="o")
    share.axhline(ratio, color=style.tone(ORANGE), linestyle=DASHES[1], linewidth=0.9)
    _ring(share, pooled, "ratio")
    apart = pooled.folds.iloc[0] > 1
    if apart:
        hollow = {"markerfacecolor": style.paper(), "markeredgecolor": style.tone(PURPLE)}
        place = {"marker": "D", "markersize": 3.5, "linestyle": "none", "label": "_folds"}
        share.plot(table.step_size, table.ratio, **hollow, **place)
    style.zero(share)
    share.set_ylim(top=max(1.08, share.get_ylim()[1]))
    share.set_ylabel("realised / predicted")
    for ax in axes[-1]:
        ax.set_xlabel("step size (learning rate)")
        style.powers(ax.xaxis)
    style.legend(figure, drop, 4 if page["width"] > 5 else 2)
    style.caption(
        figure,
        _calibration_words(pooled),
        f"Dashed on the ratio: least accepted of the pooled ratio, {ratio:g}."
        if apart
        else f"Dashed on the ratio: least accepted, {ratio:g}.",
        _fold_words(table),
    )
    return figure


def _fold_words(table: pd.DataFrame) -> str:
    """What the diamonds are; empty where there is one fold."""
    if "fold" not in table or table.fold.nunique() < 2:
        return ""
    ringed = table.ratio[table.chosen.astype(bool)]
    reach = f", {ringed.min():.0%} to {ringed.max():.0%} at the ringed size" if len(ringed) else ""
    return f"Diamonds: the single folds{reach}."


def _drops(ax, table: pd.DataFrame) -> None:
    """Predicted and realised drops on logarithmic axes; a step after which the loss rose gets a
    cross below.
    """
    fell = table.realised_drop.where(table.realised_drop > 0)
    ax.plot(
        table.step_size,
        table.predicted_drop,
        color=style.tone(ORANGE),
        linestyle=DASHES[1],
        marker="s",
        label="predicted (first order)",
    )
    ax.plot(table.step_size, fell, color=style.tone(BLUE), marker="o", label="realised")
    ax.set_xscale("log")
    if fell.notna().any() or (table.predicted_drop > 0).any():  # a teacher that is the student
        ax.set_yscale("log")  # moves nothing, and a logarithm has no place for 0
    _ring(ax, table, "realised_drop", label="chosen")
    rose = table.step_size[table.realised_drop <= 0]
    if len(rose):
        ax.plot(
            rose,
            np.full(len(rose), 0.04),
            "X",
            color=style.tone(PURPLE),
            transform=ax.get_xaxis_transform(),
            label="loss rose",
        )
    style.powers(ax.yaxis)
    ax.set_ylabel("drop of the loss (nats)")


def _ring(ax, table: pd.DataFrame, value: str, label: str = "_chosen") -> None:
    chosen = table[table.chosen.astype(bool)]
    ax.plot(
        chosen.step_size,
        chosen[value],
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=style.tone(GREEN),
        markeredgewidth=1.4,
        zorder=4,
        clip_on=False,
        label=label,
    )


def _calibration_words(table: pd.DataFrame) -> str:
    chosen = table[table.chosen.astype(bool)]
    if chosen.empty:
        return "No step was chosen."
    row = chosen.iloc[0]
    norm = f", relative update norm {row.relative_norm:.2g}" if "relative_norm" in table else ""
    pooled = f", pooled over {row.folds} folds" if row.folds > 1 else ""
    return (
        f"Ringed: the chosen step, size {row.step_size:.2g}{norm}, realises {row.ratio:.0%} of its"
        f" first-order prediction{pooled}."
    )


@on_page
def runs(
    table: pd.DataFrame,
    *,
    key: str = "criterion",
    value: str = "estimate",
    label: str = "Spearman ρ",
    outcomes: Sequence[str] | None = None,
    **page: Unpack[Intervals],
) -> Figure:
    """One statistic of several runs, side by side.

    Example: `dx.plot.runs(dx.compare_runs([DIR1, DIR2]).tables["correlations"])`.

    Args:
        table: One row per (run, outcome, `key`), with the columns run, outcome, `key`, `value`, low
            and high.
        key: The column that names the rows.
        value: The column to show.
        label: Name of the value below the axis, or the name of a statistic of `common.STATISTICS`.
        outcomes: Forms of the gain to show, one panel for each, in this order; where None, gain and
            context gain, or gain and relative gain where the table has no context gain.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    outcomes = naming.shown_outcomes(table, outcomes)
    table = style.keep(
        table, "figures.runs", ("run", "outcome", key, value, "low", "high"), {"outcome": outcomes}
    )
    table = table.rename(columns={value: "estimate"})
    names = {
        name: f" {name}" if str(name).startswith("_") else name for name in table.run
    }  # matplotlib hides labels that begin so
    series = [
        (shown, *mark(i, str(name)).values(), table[table.run == name])
        for i, (name, shown) in enumerate(names.items())
    ]
    return statistic_forest(table, key, series, label, outcomes, page)


MEASURES = (
    "student_entropy",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
    "js",
    "compatibility",
    "topk_overlap",
    "advantage",
    "acceptance",
    "student_margin",
    "gain",
    "context_gain",
)


@figure(
    table="tokens",
    title="What was measured",
    reading=(
        "Positions by value, on a logarithmic axis. A compatibility that is one nearly everywhere "
        "leaves a criterion nothing to tell apart."
    ),
)
@on_page
def distributions(
    tokens: pd.DataFrame,
    *,
    columns: Sequence[str] | None = None,
    bins: int = 40,
    **page: Unpack[Page],
) -> Figure:
    """Histogram of every measurement.

    Example: `dx.plot.distributions(tokens)`. Counts are on a logarithmic axis, since most positions
    often lie at one end.

    Args:
        tokens: A token table, one row per response position, with prompt_id and the columns to
            show.
        columns: Columns to show; where None, those of the usual twelve that the table has.
        bins: Number of bins of each histogram.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no row remains to be shown.
    """
    names = list(columns) if columns is not None else [name for name in MEASURES if name in tokens]
    tokens = style.keep(tokens, "figures.distributions", ("prompt_id", *(names or MEASURES[:1])))
    down, across = style.panels(len(names), page["width"], 4 if page["width"] > 5 else 2)
    figure, axes = style.canvas(page["width"], 0.35 + 1.15 * down, down, across)
    style.spread(figure, 0.13)
    for ax, name in zip(axes.flat, names, strict=False):
        values = tokens[name].to_numpy(float)
        values = values[np.isfinite(values)]
        unit = SCHEMA[name].unit if name in SCHEMA else ""
        label = naming.readable(name) + (f" ({unit})" if unit else "")
        ax.set_xlabel(label if page["width"] > 5 or len(label) < 26 else label.replace(" (", "\n("))
        ax.xaxis.set_major_locator(MaxNLocator(3))
        _histogram(ax, values, bins, "positions" if ax in list(axes[:, 0]) else "")
    style.hide_rest(axes, len(names))
    style.caption(
        figure,
        f"Number of positions. {tokens.prompt_id.nunique():,} prompts, {len(tokens):,} positions.",
    )
    return figure


def _histogram(ax, values: np.ndarray, bins: int, label: str) -> None:
    """The histogram of finite values, or a word where there are none."""
    if len(values):
        ax.hist(
            values,
            bins=bins,
            histtype="stepfilled",
            color=style.tone(BLUE),
            linewidth=0,
            log=True,
        )
        style.powers(ax.yaxis)
        ax.set_ylabel(label)
    else:
        ax.text(0.5, 0.5, "undefined everywhere", ha="center", va="center", transform=ax.transAxes)
        ax.set_yticks([])
