"""Figures: a finished table goes in, a matplotlib Figure comes out; nothing is estimated or saved here.

    import diagnostics as dx
    dx.plot.correlations(dx.correlate(tokens))                       # in a notebook: the figure shows itself
    dx.plot.correlations(table, width=dx.plot.SINGLE).savefig("correlations.pdf")

Every function takes `width` in inches (SINGLE = 3.3 for one column, DOUBLE = 6.9 for two) and `dark` for
a dark page; those with intervals take the `level` that the table was made at, for the caption. Panels sit side by side at DOUBLE and below one another at SINGLE where they would not fit.
Intervals are drawn as the table gives them; the numbers of prompts and positions stand below the figure.
Both gains are shown in the order absolute, relative. Colours are Okabe and Ito's, and marker or line
style always repeats what the colour says.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from diagnostics.criteria import quadrants
from diagnostics.types import DiagnosticsError, require_columns

SINGLE, DOUBLE = 3.3, 6.9
"""Inches: one column and two columns of a paper."""

BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER)
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))

LIGHT = {"ink": "#1F2328", "quiet": "#59636E", "rule": "#D1D9E0", "paper": "#FFFFFF"}
DARK = {"ink": "#F0F3F6", "quiet": "#A3ADB8", "rule": "#3D444D", "paper": "#14181D"}
"""Colours that depend on the page; a report exchanges LIGHT for its own variables."""

SPLITS = {"step": (ORANGE, "s", "step contexts"), "held_out": (BLUE, "o", "held-out contexts"), "all": (GREEN, "^", "all contexts")}
"""Colour, marker and words of each split."""

OUTCOMES = {
    "gain": "gain", "relative_gain": "relative gain", "reverse_gain": "reverse gain",
    "relative_gain_released": "relative gain, released form", "first_order_gain": "first-order gain",
}
UNITS = {"gain": "nats", "relative_gain": "fraction of D", "reverse_gain": "nats", "first_order_gain": "nats"}
FLOOR = 1e-3
"""Nats below which the logarithmic axes of the entropy-divergence plane do not look."""


class Plate(Figure):
    """A Figure that shows itself in a notebook even where no pyplot backend was started."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def _style(width: float, dark: bool) -> dict:
    """The one style of all figures: matplotlib settings for a width and a page."""
    page = DARK if dark else LIGHT
    size = 7.0 if width < 5 else 8.0
    return {
        "font.family": "DejaVu Sans", "font.size": size, "axes.titlesize": size + 0.5, "axes.labelsize": size,
        "xtick.labelsize": size - 0.5, "ytick.labelsize": size - 0.5, "legend.fontsize": size - 0.5,
        "figure.facecolor": page["paper"], "axes.facecolor": page["paper"], "savefig.facecolor": page["paper"],
        "text.color": page["ink"], "axes.labelcolor": page["ink"], "axes.titlecolor": page["ink"],
        "xtick.color": page["quiet"], "ytick.color": page["quiet"], "xtick.labelcolor": page["ink"],
        "ytick.labelcolor": page["ink"], "axes.edgecolor": page["quiet"], "grid.color": page["rule"],
        "axes.grid": True, "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.titlepad": 4.0, "axes.prop_cycle": matplotlib.cycler(color=CYCLE), "axes.unicode_minus": True,
        "xtick.major.size": 2.5, "ytick.major.size": 2.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "lines.linewidth": 1.3, "lines.markersize": 3.8, "legend.frameon": False, "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2, "legend.labelcolor": page["ink"], "svg.hashsalt": "opd-diagnostics",
        "figure.autolayout": False, "figure.constrained_layout.use": False, "pdf.fonttype": 42, "savefig.dpi": 200, "figure.dpi": 150, "mathtext.default": "regular",
    }


def _plate(draw: Callable) -> Callable:
    """Draw in the one style, settle the layout once, and leave a figure that can be saved at once."""

    @functools.wraps(draw)
    def drawn(table: pd.DataFrame, *rest, **options) -> Figure:
        width, dark = options.get("width", DOUBLE), options.get("dark", False)
        with matplotlib.rc_context(_style(width, dark)):
            figure = draw(table, *rest, **options)
            figure.draw_without_rendering()
            figure.set_layout_engine(None)  # a later save then draws once, not twice
        return figure

    return drawn


def _canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple[Plate, np.ndarray]:
    """A figure with its axes [rows, columns]; ticks added later keep the style."""
    figure = Plate(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.04, wspace=0.03, hspace=0.04)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.tick_params(which="both", color=matplotlib.rcParams["xtick.color"], labelcolor=matplotlib.rcParams["xtick.labelcolor"],
                       labelsize=matplotlib.rcParams["xtick.labelsize"], width=0.6)
    return figure, axes


def _panels(count: int, width: float) -> tuple[int, int]:
    """Rows and columns for panels that need half a page each."""
    return (count, 1) if width < 5 else (1, count)


def _rows(table: pd.DataFrame, what: str, needs: Iterable[str], where: dict | None = None) -> pd.DataFrame:
    """The rows that a figure shows. Raises DiagnosticsError where a column or every row is missing."""
    require_columns(table, needs, what=what)
    for name, wanted in (where or {}).items():
        allowed = [wanted] if isinstance(wanted, str) else list(wanted)
        kept = table[table[name].isin(allowed)]
        if kept.empty:
            raise DiagnosticsError(
                f"{what} found no row with {name} in {', '.join(map(repr, allowed))}; the table has "
                f"{', '.join(map(repr, table[name].unique()[:12])) or 'no rows'}. Pass a table that holds it."
            )
        table = kept
    if table.empty:
        raise DiagnosticsError(f"{what} got a table without rows. Pass the table that the analysis made.")
    return table.reset_index(drop=True)


def _halves(table: pd.DataFrame) -> pd.DataFrame:
    """Step and held-out rows where the table has both; rows over all positions would show them twice."""
    both = {"step", "held_out"} <= set(table.split)
    return table[table.split != "all"].reset_index(drop=True) if both else table


def _present(values: pd.Series, order: Iterable[str]) -> list[str]:
    """Distinct values, those of `order` first and in its order."""
    seen = list(dict.fromkeys(values))
    known = [name for name in order if name in seen]
    return known + [name for name in seen if name not in known]


def _words(name: str) -> str:
    return OUTCOMES.get(name, str(name).replace("_", " "))


def _with_unit(outcome: str) -> str:
    return f"{_words(outcome)} ({UNITS[outcome]})" if outcome in UNITS else _words(outcome)


def _split_style(split: str, index: int = 0) -> tuple[str, str, str]:
    return SPLITS.get(split, (CYCLE[(index + 2) % len(CYCLE)], MARKERS[(index + 2) % len(MARKERS)], _words(split)))


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _counts(table: pd.DataFrame) -> str:
    """`step: 16 prompts, 734 positions; held-out: …` from the table's own columns."""
    if not {"prompts", "positions"} <= set(table.columns):
        return ""
    groups = [("", table)] if "split" not in table else [
        (_split_style(split)[2] + ": ", table[table.split == split]) for split in _present(table.split, SPLITS)
    ]
    parts = [f"{name}{_range(rows.prompts)} prompts, {_range(rows.positions)} positions" for name, rows in groups]
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _bars(level: float | None, what: str = "Bars") -> str:
    """What the bars are; the table does not know the level that it was made at."""
    return f"{what}: {'' if level is None else f'{level:.0%} '}intervals over prompts."


def _caption(figure: Figure, *sentences: str) -> None:
    """Small print below the figure, wrapped to its width."""
    size = matplotlib.rcParams["font.size"] - 1
    characters = int(figure.get_figwidth() * 72 / (size * 0.56))
    text = textwrap.fill(" ".join(sentence for sentence in sentences if sentence), characters)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=size, color=matplotlib.rcParams["xtick.color"])


def _legend(figure: Figure, ax, columns: int, *extra: Line2D) -> None:
    """One legend for the whole figure, above the panels: the axes' labelled artists, then `extra`."""
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = [*handles, *extra], [*labels, *(line.get_label() for line in extra)]
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def _powers(*axes) -> None:
    """Ticks on logarithmic axes once the data are drawn, written without mathtext, which costs more than the rest."""
    for axis in axes:
        low, high = axis.get_view_interval()
        decades = LogLocator(subs=(1.0,) if high > 60 * low else (1.0, 2.0, 5.0), numticks=7)
        axis.set_major_locator(decades if high > 4 * low else MaxNLocator(3))
        axis.set_major_formatter(FuncFormatter(_power))
        axis.set_minor_locator(NullLocator())


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(value: float, _=None) -> str:
    if 0.0099 < value < 1000 or value <= 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}×{power}"


def _zero(ax, axis: str = "y") -> None:
    line = ax.axhline if axis == "y" else ax.axvline
    line(0, color=matplotlib.rcParams["axes.edgecolor"], linewidth=0.7, zorder=1.5)


def _interval_y(ax, x, rows: pd.DataFrame, value: str, **options):
    """Points with their intervals, upright; a missing end leaves the point alone."""
    middle = rows[value].to_numpy(float)
    reach = np.vstack([middle - rows["low"].to_numpy(float), rows["high"].to_numpy(float) - middle])
    return ax.errorbar(x, middle, yerr=np.clip(reach, 0, None), elinewidth=1.1, capsize=0, **options)


# --- the main job -----------------------------------------------------------------------------------


@_plate
def correlations(
    table: pd.DataFrame,
    *,
    method: str = "spearman",
    outcomes: Sequence[str] = ("gain", "relative_gain"),
    criteria: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Forest of each criterion's correlation with both gains: `dx.plot.correlations(dx.correlate(tokens))`.

    table: columns outcome, criterion, split, method, estimate, low, high, placebo, positions, prompts.
    Filled marks are estimates with their intervals, one colour and shape a split; a hollow diamond is what
    a random step of the same norm shows, so only the distance from it speaks for the criterion. Criteria
    are ordered by the first outcome's estimate on the held-out split. Raises DiagnosticsError where nothing is left.
    """
    needs = ("outcome", "criterion", "split", "method", "estimate", "low", "high", "placebo")
    where = {"method": method, "outcome": outcomes} | ({"criterion": criteria} if criteria is not None else {})
    table = _halves(_rows(table, "figures.correlations", needs, where))
    outcomes, splits = _present(table.outcome, outcomes), _present(table.split, SPLITS)
    names = _forest_order(table, outcomes[0], splits[-1])
    figure, axes = _canvas(width, 1.15 + 0.2 * len(names), 1, len(outcomes), sharey=True)
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        _forest(ax, table[table.outcome == outcome], names, splits)
        ax.set_title(_words(outcome))
        ax.set_xlabel({"spearman": "Spearman ρ", "pearson": "Pearson r", "kendall": "Kendall τ"}.get(method, method))
    axes[0, 0].set_yticks(range(len(names)), [_words(name) for name in names])
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    placebo = Line2D([], [], linestyle="none", label="placebo step", **_diamond(matplotlib.rcParams["xtick.color"]))
    _legend(figure, axes[0, 0], 3, placebo)
    _caption(figure, _counts(table), _bars(level))
    return figure


def _forest_order(table: pd.DataFrame, outcome: str, split: str) -> list[str]:
    rows = table[(table.outcome == outcome) & (table.split == split)]
    ordered = rows.sort_values("estimate", ascending=False, kind="stable").criterion.tolist()
    return _present(table.criterion, ordered)


def _forest(ax, table: pd.DataFrame, names: list[str], splits: list[str]) -> None:
    offsets = np.linspace(-0.19, 0.19, len(splits)) if len(splits) > 1 else [0.0]
    _zero(ax, "x")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    for index, (split, offset) in enumerate(zip(splits, offsets, strict=True)):
        color, marker, words = _split_style(split, index)
        rows = table[table.split == split].set_index("criterion").reindex(names)
        y, middle = np.arange(len(names)) + offset, rows.estimate.to_numpy(float)
        reach = np.vstack([middle - rows.low.to_numpy(float), rows.high.to_numpy(float) - middle])
        ax.errorbar(middle, y, xerr=np.clip(reach, 0, None), fmt=marker, color=color, elinewidth=1.1, label=words, zorder=3)
        ax.plot(rows.placebo.to_numpy(float), y, linestyle="none", zorder=2, label=f"_placebo {split}", **_diamond(color))


def _diamond(color: str) -> dict:
    return {"marker": "D", "markersize": 3.2, "markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 0.8}


@_plate
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
    medians that split the quadrants, with each quadrant's share of positions in its corner. Axes are
    logarithmic in nats and start at 1e-3; what lies below is drawn on the edge. The scale of `color` ends
    at the 2nd and 98th percentile of the hexagons. Raises DiagnosticsError where a column is missing.
    """
    needs = ("student_entropy", "forward_kl", "prompt_id", *color)
    tokens = _rows(tokens, "figures.entropy_divergence", needs)
    defined = np.isfinite(tokens[list(needs[:2])].to_numpy(float)).all(axis=1)
    tokens = tokens[defined].reset_index(drop=True)
    rows, columns = _panels(len(color), width)
    panel = 2.45 if columns == 1 else 2.75
    figure, axes = _canvas(width, 0.45 + panel * rows, rows, columns, sharex=True, sharey=True)
    for ax, name in zip(axes.flat, color, strict=True):
        _hexagons(figure, ax, tokens, name, bins)
        _quadrant_lines(ax, tokens)
        ax.set_title(f"mean {_words(name)}")
    for ax in axes[-1]:
        ax.set_xlabel("student entropy H(p) (nats)")
    for ax in axes[:, 0]:
        ax.set_ylabel("forward KL(q‖p) (nats)")
    _caption(figure, f"{tokens.prompt_id.nunique():,} prompts, {len(tokens):,} positions. Lines: medians. Q3 is confident and wrong.")
    return figure


def _hexagons(figure: Figure, ax, tokens: pd.DataFrame, name: str, bins: int) -> None:
    values = tokens[name].to_numpy(float)
    kept = np.isfinite(values)
    x = np.clip(tokens.student_entropy.to_numpy(float)[kept], FLOOR, None)
    y = np.clip(tokens.forward_kl.to_numpy(float)[kept], FLOOR, None)
    ax.grid(visible=False)
    hexagons = ax.hexbin(x, y, C=values[kept], gridsize=(bins, int(bins * 0.6)), xscale="log", yscale="log",
                         linewidths=0.15, edgecolors="face")
    _powers(ax.xaxis, ax.yaxis)
    shown = np.asarray(hexagons.get_array(), float)
    low, high = np.percentile(shown, [2, 98]) if len(shown) else (0.0, 1.0)
    signed, reach = low < 0, max(abs(low), abs(high), 1e-12)
    hexagons.set_cmap("PuOr" if signed else "cividis")
    hexagons.set_clim(*((-reach, reach) if signed else (low, high if high > low else low + 1e-12)))
    bar = figure.colorbar(hexagons, ax=ax, pad=0.02, aspect=28, extend="both" if signed else "neither")
    bar.outline.set_linewidth(0.4)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.tick_params(width=0.5, length=2)


def _quadrant_lines(ax, tokens: pd.DataFrame) -> None:
    """Median lines and each quadrant's share, in the page's colours over a haze of paper."""
    ax.axvline(tokens.student_entropy.median(), color=matplotlib.rcParams["text.color"], linewidth=0.8)
    ax.axhline(tokens.forward_kl.median(), color=matplotlib.rcParams["text.color"], linewidth=0.8)
    share = pd.Series(quadrants(tokens)).value_counts(normalize=True)
    corners = {1: (0.97, 0.97), 2: (0.97, 0.03), 3: (0.03, 0.97), 4: (0.03, 0.03)}
    haze = {"facecolor": matplotlib.rcParams["axes.facecolor"], "edgecolor": "none", "alpha": 0.8, "pad": 1.2}
    for quadrant, (x, y) in corners.items():
        ax.text(x, y, f"Q{quadrant} {share.get(quadrant, 0):.0%}", transform=ax.transAxes, bbox=haze, gid=f"Q{quadrant}",
                ha="right" if x > 0.5 else "left", va="top" if y > 0.5 else "bottom")


@_plate
def q3_gain(
    table: pd.DataFrame,
    *,
    outcomes: Sequence[str] = ("gain", "relative_gain"),
    scores: Sequence[str] | None = None,
    level: float | None = None,
    width: float = DOUBLE,
    dark: bool = False,
) -> Figure:
    """Mean gain by tertile of each score within Q3: `dx.plot.q3_gain(dx.analysis.q3_groups(tokens))`.

    table: columns outcome, split, score, group (1 is the lowest), mean, low, high, positions,
    prompts. For each score the marks run from its bottom to its top; a rising line means that the gain rises with the score among confident, wrong positions.
    """
    needs = ("outcome", "split", "score", "group", "mean", "low", "high")
    where = {"outcome": outcomes} | ({"score": scores} if scores is not None else {})
    table = _halves(_rows(table, "figures.q3_gain", needs, where))
    outcomes = _present(table.outcome, outcomes)
    rows, columns = _panels(len(outcomes), width)
    figure, axes = _canvas(width, 0.75 + 1.85 * rows, rows, columns, sharex=True)
    for ax, outcome in zip(axes.flat, outcomes, strict=True):
        _group_lines(ax, table[table.outcome == outcome], _present(table.score, scores or ()))
        ax.set_ylabel(f"mean {_with_unit(outcome)}")
    _legend(figure, axes[0, 0], 3)
    _caption(figure, _counts(table), "Each group of marks: bottom to top of the score within Q3.", _bars(level))
    return figure


def _group_lines(ax, table: pd.DataFrame, scores: list[str]) -> None:
    groups, splits = sorted(table.group.unique()), _present(table.split, SPLITS)
    _zero(ax)
    ax.grid(axis="x", visible=False)
    for index, split in enumerate(splits):
        color, marker, words = _split_style(split, index)
        shift = (index - (len(splits) - 1) / 2) * 0.07
        for place, score in enumerate(scores):
            rows = table[(table.split == split) & (table.score == score)].set_index("group").reindex(groups)
            x = place + shift + np.linspace(-0.25, 0.25, len(groups))
            _interval_y(ax, x, rows, "mean", fmt=marker, linestyle="-", linewidth=0.9, color=color, zorder=3,
                        label=words if place == 0 else f"_{score}")
    ax.set_xticks(range(len(scores)), [_words(score) for score in scores])
    ax.set_xlim(-0.5, len(scores) - 0.5)


@_plate
def calibration(table: pd.DataFrame, *, ratio: float = 0.8, width: float = DOUBLE, dark: bool = False) -> Figure:
    """How linear the step is: `dx.plot.calibration(result.calibration)`.

    table: columns step_size, relative_norm, predicted_drop, realised_drop (nats a position of the step's
    loss), ratio, chosen. The chosen step is ringed; the dashed line in the second panel is `ratio`, the
    least share of the first-order prediction that a step may realise.
    """
    needs = ("step_size", "predicted_drop", "realised_drop", "ratio", "chosen")
    table = _rows(table, "figures.calibration", needs).sort_values("step_size", ignore_index=True)
    table = table[table.step_size > 0]
    rows, columns = _panels(2, width)
    figure, axes = _canvas(width, 0.55 + 1.8 * rows, rows, columns, sharex=True)
    drop, share = axes.flat
    _drops(drop, table)
    share.plot(table.step_size, table.ratio, color=BLUE, marker="o")
    share.axhline(ratio, color=ORANGE, linestyle=DASHES[1], linewidth=0.9)
    _ring(share, table, "ratio")
    _zero(share)
    share.set_ylim(top=max(1.08, share.get_ylim()[1]))
    share.set_ylabel("realised / predicted")
    for ax in axes[-1]:
        ax.set_xlabel("step size (learning rate)")
        _powers(ax.xaxis)
    _legend(figure, drop, 4 if width > 5 else 2)
    _caption(figure, _calibration_words(table), f"Dashed on the ratio: least accepted, {ratio:g}.")
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
    _powers(ax.yaxis)
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
