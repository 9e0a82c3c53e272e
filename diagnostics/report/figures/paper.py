"""The figures of section 3 of the paper, each as its scripts compute it and with controls.

    tables = dx.paper(run)
    dx.plot.paper("3C", tables)          # by the paper's number, with what the paper prints
    dx.plot.paper_3c(tables["paper_figure_3c"])

Every figure is drawn from its final table alone: columns `released`, `controlled` and `context`
with their intervals. Each of the three has a panel of its own with its own unit. Panels of one unit
share their scale, except for a context gain in nats, which is that of one step. A number that the
paper prints stands in the caption and is never drawn, because it was measured on other models.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import naming, style
from diagnostics.report.figures.common import mark, thin_color_bar
from diagnostics.report.figures.options import Intervals, Page, on_page

SIDES = {
    "released": "as released",
    "controlled": "controlled",
    "context": "controlled, context gain",
}
"""The columns of a final table that are drawn, with the titles of their panels."""
KEYS = ("row", "quantity", "k", "budget", "unit")
"""The columns that say what a row of a final table is."""
LEARN, INCOMPATIBLE = "Dᴸ", "Dᴵ"
"""The compatible and the incompatible part of the divergence, as the paper writes them."""


class Series(NamedTuple):
    """One series of marks: its name in the legend, its look, and its rows of the final table."""

    label: str
    look: dict
    rows: pd.DataFrame


# --- the sides of a table ---


def _kept(table: pd.DataFrame, number: str, quantities: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of a final table that a figure shows."""
    needs = [*KEYS, *(f"{side}{end}" for side in SIDES for end in ("", "_low", "_high", "_n"))]
    where = {"quantity": list(quantities)} if quantities else None
    return style.keep(table, f"figure {number}", needs, where)


def _shown(table: pd.DataFrame, number: str) -> list[str]:
    """The sides that hold a number; both released and controlled are missed where one is empty."""
    shown = [side for side in SIDES if np.isfinite(table[side].to_numpy(float)).any()]
    if not shown:
        raise DiagnosticsError(
            f"Figure {number} found no number: every cell of {', '.join(SIDES)} is undefined. The"
            " column why of its table says what was lacking."
        )
    return shown


def _of(rows: pd.DataFrame, side: str) -> pd.DataFrame:
    """The rows with one side's numbers as the columns estimate, low and high."""
    return rows.assign(
        estimate=rows[side].astype(float),
        low=rows[f"{side}_low"].astype(float),
        high=rows[f"{side}_high"].astype(float),
    )


def unit(table: pd.DataFrame, side: str) -> str:
    """The unit of a side; `unit` holds `<released>; <controlled>` where the two differ."""
    parts = str(table.unit.iloc[0]).split("; ")
    return parts[0] if side == "released" else parts[-1]


def _axes(table: pd.DataFrame, shown: Sequence[str], width: float, height: float, **share):
    """One panel per side, beside one another on a page and below one another on a phone."""
    rows, columns = style.panels(len(shown), width)
    figure, axes = style.canvas(width, 0.9 + height * rows, rows, columns, **share)
    for ax, side in zip(axes.flat, shown, strict=True):
        ax.set_title(SIDES[side])
    return figure, axes


def _same_scale(axes: Sequence, shown: Sequence[str], table: pd.DataFrame, axis: str) -> None:
    """Panels of one unit get the widest of their limits.

    The context gain in nats keeps its own: it is that of one step, and beside a training's gain in
    nats it would be a point.
    """
    units = [unit(table, side) for side in shown]
    groups = [
        (name, side == "context" and "nats" in name)
        for name, side in zip(units, shown, strict=True)
    ]
    for group in set(groups):
        alike = [ax for ax, own in zip(axes, groups, strict=True) if own == group]
        limits = np.array([getattr(ax, f"get_{axis}lim")() for ax in alike])
        for ax in alike:
            getattr(ax, f"set_{axis}lim")(limits[:, 0].min(), limits[:, 1].max())


def _label(text: str, own: str, width: float) -> str:
    """What an axis shows with its unit, which stands below where three panels leave little room."""
    between = "\n" if width > 5 and len(text) + len(own) > 22 else " "
    return f"{text}{between}({own})"


def _forest(
    table: pd.DataFrame,
    number: str,
    series: Sequence[Series],
    label: str,
    width: float,
) -> Figure:
    """Rows down, one mark with its interval per series, and a panel per side."""
    shown, names = _shown(table, number), style.present(table.row, ())
    height = 0.35 + (0.13 * len(series) + 0.1) * len(names)
    figure, axes = _axes(table, shown, width, height, sharey=True)
    for ax, side in zip(axes.flat, shown, strict=True):
        style.zero(ax, "x")
        for shift, (words, look, rows) in zip(
            style.offsets(len(series), 0.6 / max(len(series), 2)), series, strict=True
        ):
            own = _of(_single(rows, number), side).set_index("row").reindex(names)
            y = np.arange(len(names)) + shift
            style.lying(ax, y, own, "estimate", label=words, zorder=3, **look)
        ax.xaxis.set_major_locator(MaxNLocator(4 if width > 5 else 5))
        ax.set_xlabel(_label(label, unit(table, side), width))
    style.names_down(axes[0, 0], names)
    _same_scale(list(axes.flat), shown, table, "x")
    style.legend(figure, axes[0, 0], 4 if width > 5 else 2)
    return figure


def _single(rows: pd.DataFrame, number: str) -> pd.DataFrame:
    """The rows of a series, of which a name has one."""
    twice = rows.row[rows.row.duplicated()]
    if len(twice):
        raise DiagnosticsError(
            f"Figure {number} found two numbers for {twice.iloc[0]!r} in one series. Pass a table"
            " with one row per row, quantity, k and budget, as `dx.paper` returns it."
        )
    return rows


def _columns(
    table: pd.DataFrame,
    number: str,
    series: Sequence[Series],
    place: Callable[[pd.DataFrame], pd.Series],
    ticks: Sequence[str],
    labels: tuple[str, str],
    width: float,
) -> Figure:
    """Marks over a few places from left to right, joined within a series; a panel per side."""
    shown = _shown(table, number)
    figure, axes = _axes(table, shown, width, 1.9)
    for ax, side in zip(axes.flat, shown, strict=True):
        style.zero(ax)
        ax.grid(axis="x", visible=False)
        for shift, (words, look, rows) in zip(style.offsets(len(series), 0.1), series, strict=True):
            own = _of(rows, side)
            x = place(own).to_numpy(float) + shift
            line = {"linestyle": "-", "linewidth": 0.8, "zorder": 3}
            style.upright(ax, x, own, "estimate", label=words, **line, **look)
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set_xlim(-0.5, len(ticks) - 0.5)
        ax.set_xlabel(labels[0])
        ax.set_ylabel(_label(labels[1], unit(table, side), width))
    _same_scale(list(axes.flat), shown, table, "y")
    style.legend(figure, axes[0, 0], 4 if width > 5 else 2)
    return figure


def _count(values: pd.Series) -> str:
    """`480` or `226–472`; empty where nothing was counted."""
    known = values.dropna()
    if known.empty:
        return ""
    low, high = int(known.min()), int(known.max())
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _counts(table: pd.DataFrame, what: str) -> str:
    """The numbers of positions, pairs or trainings behind each side."""
    parts = [f"{SIDES[side]} {count}" for side in SIDES if (count := _count(table[f"{side}_n"]))]
    return f"{what}: {'; '.join(parts)}." if parts else ""


def _printed(text: str) -> str:
    """The caption's sentence on what the paper prints; empty where nothing is comparable."""
    return f"Printed in the paper: {text.rstrip('.')}." if text else ""


OVER_CONTEXTS = "percentile intervals over contexts"
OVER_SELECTED = "percentile intervals over contexts of the selection"
OVER_SEEDS = "the mean ± SD over seeds"


def _bars(table: pd.DataFrame, released: str, level: float | None) -> str:
    """The caption's sentence on the intervals of both sides; a side without any has none."""
    named = f"{'' if level is None else f'{level:.0%} '}intervals over prompts"
    has = {side: table[f"{side}_low"].notna().any() for side in SIDES}
    parts = (
        f"as released {released if has['released'] else 'none'}",
        f"controlled {named if has['controlled'] or has['context'] else 'none'}",
    )
    return f"Bars: {'; '.join(parts)}."


# --- figure 2: planes of percentiles


@on_page
def paper_2a(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Page]) -> Figure:
    """Figure 2A: the mean gain over the percentiles of compatible and incompatible divergence.

    Example: `dx.plot.paper_2a(tables["paper_figure_2a"])`. Cells without positions stay empty; the
    color follows the signed square root, so that small gains of either sign stay apart.

    Args:
        table: The final table: one row per cell, with x_low, x_high, y_low, y_high (shares of the
            positions), and released, controlled and context.
        printed: What the paper prints, for the caption.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no cell holds a number.
    """
    labels = (f"percentile of {LEARN} = d·c", f"percentile of {INCOMPATIBLE} = d·(1 − c)")
    return _plane(table, "2A", labels, printed, page["width"], signed=True)


@on_page
def paper_2b(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Page]) -> Figure:
    """Figure 2B: the mean percentile of compatible divergence over entropy and divergence.

    Example: `dx.plot.paper_2b(tables["paper_figure_2b"])`. The framed corner is Q3: low student
    entropy, high forward KL.

    Args:
        table: The final table: one row per cell, with x_low, x_high, y_low, y_high (shares of the
            positions), and released, controlled and context.
        printed: What the paper prints, for the caption.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no cell holds a number.
    """
    return _plane(table, "2B", PLANE, printed, page["width"], signed=False)


@on_page
def paper_2c(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Page]) -> Figure:
    """Figure 2C: the mean percentile of incompatible divergence over entropy and divergence.

    Example: `dx.plot.paper_2c(tables["paper_figure_2c"])`. The framed corner is Q3: low student
    entropy, high forward KL.

    Args:
        table: The final table: one row per cell, with x_low, x_high, y_low, y_high (shares of the
            positions), and released, controlled and context.
        printed: What the paper prints, for the caption.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or no cell holds a number.
    """
    return _plane(table, "2C", PLANE, printed, page["width"], signed=False)


PLANE = ("percentile of student entropy", "percentile of forward KL")
EDGES = ("x_low", "x_high", "y_low", "y_high")


def _plane(
    table: pd.DataFrame,
    number: str,
    labels: tuple[str, str],
    printed: str,
    width: float,
    *,
    signed: bool,
) -> Figure:
    """A plane of percentiles, one panel per side; `signed` values are colored around zero."""
    needs = ("unit", *EDGES, *SIDES, *(f"{side}_n" for side in SIDES))
    table = style.keep(table, f"figure {number}", needs)
    shown = _shown(table, number)
    figure, axes = _axes(table, shown, width, 2.5, sharex=True, sharey=True)
    for ax, side in zip(axes.flat, shown, strict=True):
        mesh = _cells(ax, table, side)
        _colors(mesh, table[side].to_numpy(float), signed)
        bar = thin_color_bar(figure, ax, mesh)
        bar.set_label(unit(table, side))
        if signed:
            _minus_signs(ax, table, side)
        else:
            _frame_q3(ax)
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
    for ax in axes.flat:
        ax.label_outer()
    what = (
        "mean gain" if signed else f"mean percentile of {LEARN if number == '2B' else INCOMPATIBLE}"
    )
    style.caption(
        figure,
        f"Color: {what} of a cell.",
        "Lines mark negative means." if signed else "Framed: Q3, confident and wrong.",
        "Cells without positions, or with too few, are empty.",
        _cell_counts(table),
        _printed(printed),
    )
    return figure


def _frame_q3(ax) -> None:
    ax.add_patch(
        Rectangle((0, 0.5), 0.5, 0.5, fill=False, edgecolor=style.ink(), gid="Q3", zorder=4)
    )
    ax.text(0.03, 0.94, "Q3", va="top", weight="bold", bbox=_haze())


def _minus_signs(ax, table: pd.DataFrame, side: str) -> None:
    """A short line in each cell with a negative mean, for a page without colors."""
    negative = table[table[side].astype(float) < 0]
    x = negative[["x_low", "x_high"]].to_numpy(float).mean(axis=1)
    y = negative[["y_low", "y_high"]].to_numpy(float).mean(axis=1)
    ax.plot(x, y, "_", color=style.paper(), markersize=3, label="_negative")


def _haze() -> dict:
    return {"facecolor": style.paper(), "edgecolor": "none", "alpha": 0.8, "pad": 1.2}


def _cells(ax, table: pd.DataFrame, side: str):
    """The cells of a plane as a mesh over its edges; a cell without a row or number is empty."""
    table = table.assign(**{name: table[name].astype(float).round(9) for name in EDGES})
    x, y = (np.unique(table[[f"{axis}_low", f"{axis}_high"]].to_numpy()) for axis in ("x", "y"))
    values = np.full((len(y) - 1, len(x) - 1), np.nan)
    column = np.searchsorted(x, table.x_low.to_numpy())
    row = np.searchsorted(y, table.y_low.to_numpy())
    values[row, column] = table[side].to_numpy(float)
    ax.grid(visible=False)
    return ax.pcolormesh(x, y, np.ma.masked_invalid(values), linewidth=0)


def _colors(mesh, values: np.ndarray, signed: bool) -> None:
    """The color scale of a plane: around zero by the signed root, or from 0 to 1."""
    if not signed:
        mesh.set_cmap("cividis")
        mesh.set_clim(0.0, 1.0)
        return
    known = np.abs(values[np.isfinite(values)])
    reach = float(known.max()) if len(known) and known.max() > 0 else 1e-12
    mesh.set_cmap(style.diverging())
    mesh.set_norm(style.signed_root(reach))


def _cell_counts(table: pd.DataFrame) -> str:
    parts = [
        f"{SIDES[side]} {int(table[f'{side}_n'].sum()):,}"
        for side in SIDES
        if table[f"{side}_n"].notna().any()
    ]
    return f"Positions: {'; '.join(parts)}." if parts else ""


# --- figure 3: coefficients, masks inside Q3, and the Q3 gap

COEFFICIENTS = {
    "coefficient of D^L": f"{LEARN} = d·c",
    "coefficient of D^I": f"{INCOMPATIBLE} = d·(1 − c)",
}


@on_page
def paper_3a(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 3A: standardized coefficients of compatible and incompatible divergence, by K.

    Example: `dx.plot.paper_3a(tables["paper_figure_3a"])`.

    Args:
        table: The final table, with the quantities `coefficient of D^L` and `coefficient of D^I`
            per k.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    table = _kept(table, "3A", list(COEFFICIENTS))
    figure = _by_k(table, "3A", _by_quantity(table, COEFFICIENTS), "coefficient", page["width"])
    style.caption(
        figure,
        "Standardized; beside student entropy, position and teacher entropy.",
        _counts(table, "Positions"),
        _bars(table, OVER_CONTEXTS, page["level"]),
        _printed(printed),
    )
    return figure


def _by_quantity(table: pd.DataFrame, names: Mapping[str, str]) -> list[Series]:
    """One series per quantity of the table, in the order of `names`."""
    present = [name for name in names if (table.quantity == name).any()]
    return [
        Series(names[name], mark(index), table[table.quantity == name])
        for index, name in enumerate(present)
    ]


def _by_k(
    table: pd.DataFrame, number: str, series: Sequence[Series], label: str, width: float
) -> Figure:
    """Marks over K, one place for each size of the support that the table has."""
    sizes = sorted(table.k.dropna().unique())

    def place(rows: pd.DataFrame) -> pd.Series:
        return rows.k.map({size: index for index, size in enumerate(sizes)})

    ticks = [f"{int(size)}" for size in sizes]
    labels = ("K, size of the support", label)
    return _columns(table, number, series, place, ticks, labels, width)


TRAINED = {"gap after training": "Q3 gap after training", "matched gap": "matched gap"}


@on_page
def paper_3b(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 3B: what training on masks inside Q3 does to the Q3 gap, raw and matched.

    Example: `dx.plot.paper_3b(tables["paper_figure_3b"])`. The statistic is a difference between
    two groups of Q3 after the training, and no mean reduction: the mean gain in nats beside it is
    that. The mean of the relative gain, which has no lower bound, is left to the table.

    Args:
        table: The final table, one row per mask and quantity.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    names = TRAINED | {"mean gain": "mean gain"}
    table = _by_budget(_kept(table, "3B", list(names)))
    unbounded = ["released", "released_low", "released_high"]
    table.loc[table.quantity == "mean gain", unbounded] = np.nan
    figure = _forest(table, "3B", _by_quantity(table, names), "gain", page["width"])
    style.caption(
        figure,
        "The mean gain is in nats alone: that of the relative gain has no lower bound.",
        _counts(table, "Numbers"),
        _bars(table, OVER_SEEDS, page["level"]),
        _printed(printed),
    )
    return figure


def _by_budget(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the budget in the name of a row, where a name stands for several budgets."""
    if not table.duplicated(["row", "quantity"]).any():
        return table
    budgets = [style.percent(round(budget, 6)) for budget in table.budget]
    return table.assign(row=table.row.map(naming.readable) + ", " + pd.Series(budgets))


GAPS = {"Q3 gap": "Q3 gap", "matched gap": "matched in a prompt"}


@on_page
def paper_3c(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 3C: the Q3 gap, raw and matched, for each setting.

    Example: `dx.plot.paper_3c(tables["paper_figure_3c"])`. The gap is the mean gain of the third of
    Q3 with the highest compatibility minus that of the third with the lowest.

    Args:
        table: The final table, with the quantities `Q3 gap` and `matched gap` per row.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    table = _kept(table, "3C", list(GAPS))
    figure = _forest(table, "3C", _by_quantity(table, GAPS), "top − bottom", page["width"])
    style.caption(
        figure,
        _counts(table, "Positions of Q3 or pairs"),
        _bars(table, OVER_CONTEXTS, page["level"]),
        _printed(printed),
    )
    return figure


# --- figure 4: exact top-N, support proxies and buckets


@on_page
def paper_4a(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 4A: the mean gain of the exact top N of each selector, at each budget.

    Example: `dx.plot.paper_4a(tables["paper_figure_4a"])`.

    Args:
        table: The final table, with the quantity `mean gain` per selector and budget.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    return _top(table, "4A", "mean gain", "mean gain", printed, page)


@on_page
def paper_4b(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 4B: the mean gain of the exact top N per share of positions kept.

    Example: `dx.plot.paper_4b(tables["paper_figure_4b"])`.

    Args:
        table: The final table, with the quantity `gain per kept share` per selector and budget.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    return _top(table, "4B", "gain per kept share", "gain / share kept", printed, page)


def _top(
    table: pd.DataFrame, number: str, quantity: str, label: str, printed: str, page: Intervals
) -> Figure:
    """One row per selector, one mark per budget."""
    table = _kept(table, number, [quantity])
    budgets = sorted(table.budget.dropna().unique())
    series = [
        Series(style.percent(round(budget, 6)), mark(index), table[table.budget == budget])
        for index, budget in enumerate(budgets)
    ]
    figure = _forest(table, number, series, label, page["width"])
    style.caption(
        figure,
        _counts(table, "Positions selected"),
        _bars(table, OVER_SELECTED, page["level"]),
        _printed(printed),
    )
    return figure


@on_page
def paper_4c(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 4C: the Q3 gap when each support proxy takes the place of compatibility, by K.

    Example: `dx.plot.paper_4c(tables["paper_figure_4c"])`.

    Args:
        table: The final table, with the quantity `Q3 gap` per proxy and k.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    table = _kept(table, "4C", ["Q3 gap"])
    series = [
        Series(f"K = {int(size)}", mark(index), table[table.k == size])
        for index, size in enumerate(sorted(table.k.dropna().unique()))
    ]
    figure = _forest(table, "4C", series, "top − bottom", page["width"])
    style.caption(
        figure,
        _counts(table, "Positions of Q3"),
        _bars(table, OVER_CONTEXTS, page["level"]),
        _printed(printed),
    )
    return figure


BUCKETS = tuple(range(4))
SCORES = ("compatibility", "divergence", "incompatible", "teachability")


@on_page
def paper_4d(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 4D: the mean gain of four buckets of each score inside Q3.

    Example: `dx.plot.paper_4d(tables["paper_figure_4d"])`.

    Args:
        table: The final table, with the quantities `mean of bucket 0` to `mean of bucket 3` per
            score.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    return _buckets(table, "4D", "mean", printed, page)


def _buckets(
    table: pd.DataFrame, number: str, statistic: str, printed: str, page: Intervals
) -> Figure:
    """Four places from the lowest to the highest bucket, one line per score."""
    names = [f"{statistic} of bucket {bucket}" for bucket in BUCKETS]
    table = _kept(table, number, names)
    scores = style.present(table.row, SCORES)
    series = [
        Series(naming.readable(score), mark(index), table[table.row == score])
        for index, score in enumerate(scores)
    ]

    def place(rows: pd.DataFrame) -> pd.Series:
        return rows.quantity.map({name: index for index, name in enumerate(names)})

    ticks = ["lowest", "2", "3", "highest"]
    labels = ("quarter of Q3 by the score", f"{statistic} gain")
    figure = _columns(table, number, series, place, ticks, labels, page["width"])
    style.caption(
        figure,
        _counts(table, "Positions per bucket"),
        _bars(table, OVER_CONTEXTS, page["level"]),
        _printed(printed),
    )
    return figure


# --- figure 5: robustness, proxies and trimmed buckets

WIDTH = "interval width"


@on_page
def paper_5a(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Page]) -> Figure:
    """Figure 5A: the robustness table as a heat map: gap, matched gap and width of the interval.

    Example: `dx.plot.paper_5a(tables["paper_figure_5a"])`. Each cell shows its number; the color
    follows the signed square root around zero.

    Args:
        table: The final table, with the quantities `Q3 gap`, `matched gap` and `interval width`
            per row; a width that the table lacks is that of the gap's interval.
        printed: What the paper prints, for the caption.
        **page: `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    table = _with_widths(_kept(table, "5A", [*GAPS, *_own_width(table)]))
    names, shown = style.present(table.row, ()), _shown(table, "5A")
    figure, axes = _axes(table, shown, page["width"], 0.55 + 0.3 * len(names), sharey=True)
    columns = style.present(table.quantity, [*GAPS, WIDTH])
    for ax, side in zip(axes.flat, shown, strict=True):
        _heat(ax, table, side, names, columns)
        ax.set_title(f"{SIDES[side]} ({unit(table, side)})")
    style.caption(figure, _counts(table, "Positions of Q3 or pairs"), _printed(printed))
    return figure


def _own_width(table: pd.DataFrame) -> list[str]:
    return [WIDTH] if "quantity" in table and (table.quantity == WIDTH).any() else []


def _with_widths(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row per width of the gap's interval, where it has none."""
    if (table.quantity == WIDTH).any():
        return table
    widths = table[table.quantity == "Q3 gap"].assign(quantity=WIDTH)
    for side in SIDES:
        widths[side] = widths[f"{side}_high"].astype(float) - widths[f"{side}_low"].astype(float)
    return pd.concat([table, widths], ignore_index=True)


def _heat(ax, table: pd.DataFrame, side: str, names: list[str], columns: list[str]) -> None:
    """A grid of colored cells with their numbers."""
    grid = (
        table.drop_duplicates(["row", "quantity"])
        .pivot(index="row", columns="quantity", values=side)
        .reindex(index=names, columns=columns)
        .to_numpy(float)
    )
    known = np.abs(grid[np.isfinite(grid)])
    reach = float(known.max()) if len(known) and known.max() > 0 else 1e-12
    image = ax.imshow(
        np.ma.masked_invalid(grid),
        cmap=style.diverging(),
        norm=style.signed_root(reach),
        aspect="auto",
    )
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.set_xticks(range(len(columns)), [name.replace(" ", "\n") for name in columns])
    ax.set_yticks(range(len(names)), [naming.readable(name) for name in names])
    for (row, column), value in np.ndenumerate(grid):
        text = "–" if not np.isfinite(value) else f"{value:.3f}".replace("-", "−")
        color = style.on(image.cmap(image.norm(value))) if np.isfinite(value) else style.ink()
        ax.text(column, row, text, ha="center", va="center", color=color)


@on_page
def paper_5b(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 5B: the Q3 gap of each support proxy over the size of the support.

    Example: `dx.plot.paper_5b(tables["paper_figure_5b"])`.

    Args:
        table: The final table, with the quantity `Q3 gap` per proxy and k.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    table = _kept(table, "5B", ["Q3 gap"])
    series = [
        Series(naming.readable(proxy), mark(index), table[table.row == proxy].sort_values("k"))
        for index, proxy in enumerate(style.present(table.row, ()))
    ]
    figure = _by_k(table, "5B", series, "top − bottom", page["width"])
    style.caption(
        figure,
        _counts(table, "Positions of Q3"),
        _bars(table, OVER_CONTEXTS, page["level"]),
        _printed(printed),
    )
    return figure


@on_page
def paper_5c(table: pd.DataFrame, *, printed: str = "", **page: Unpack[Intervals]) -> Figure:
    """Figure 5C: the trimmed mean gain of four buckets of each score inside Q3.

    Example: `dx.plot.paper_5c(tables["paper_figure_5c"])`. As released, the limits of the trimming
    are the bucket's own 5th and 95th percentile.

    Args:
        table: The final table, with the quantities `trimmed mean of bucket 0` to `trimmed mean of
            bucket 3` per score.
        printed: What the paper prints, for the caption.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: A column is missing, or nothing in the table is to be shown.
    """
    return _buckets(table, "5C", "trimmed mean", printed, page)


# --- by number


FIGURES: dict[str, Callable[..., Figure]] = {
    "2A": paper_2a,
    "2B": paper_2b,
    "2C": paper_2c,
    "3A": paper_3a,
    "3B": paper_3b,
    "3C": paper_3c,
    "4A": paper_4a,
    "4B": paper_4b,
    "4C": paper_4c,
    "4D": paper_4d,
    "5A": paper_5a,
    "5B": paper_5b,
    "5C": paper_5c,
}
"""The paper's figures that can be drawn from a token bank and short trainings, by number."""


def table_name(number: str) -> str:
    """The name of the final table that a figure of the paper is drawn from."""
    return f"paper_figure_{number.lower()}"


@on_page
def paper(number: str, tables: Mapping[str, pd.DataFrame], **page: Unpack[Intervals]) -> Figure:
    """A figure of the paper by its number, as released and controlled.

    Example: `dx.plot.paper("3C", dx.paper(run))`. What the paper prints stands in the caption where
    the table `paper_differences` has it.

    Args:
        number: The paper's number: 2A to 2C, 3A to 3C, 4A to 4D or 5A to 5C.
        tables: The final tables by name, as `dx.paper` returns them.
        **page: `level`, `width` and `dark`, as every figure takes them.

    Returns:
        The figure, which shows itself in a notebook.

    Raises:
        DiagnosticsError: There is no figure of that number, its table is not there, or nothing in
            it is to be shown.
    """
    wanted = str(number).upper()
    if wanted not in FIGURES:
        raise DiagnosticsError(
            f"The paper's figure {number!r} is none of those that can be drawn here:"
            f" {', '.join(FIGURES)}. Pass one of these numbers."
        )
    table = tables.get(table_name(wanted))
    if table is None or table.empty:
        raise DiagnosticsError(
            f"There is no table {table_name(wanted)} with rows among {_some(tables)}. Pass what"
            " `dx.paper` returned; figure 3B needs trainings: `opd-diagnostics paper --train`."
        )
    draw = FIGURES[wanted]
    taken = {name: page[name] for name in page if name in inspect.signature(draw).parameters}
    # the page is settled already, for this function
    return inspect.unwrap(draw)(table, printed=printed_value(tables, wanted), **taken)


def _some(tables: Mapping[str, pd.DataFrame]) -> str:
    return ", ".join(sorted(tables)[:20]) or "no tables"


def printed_value(tables: Mapping[str, pd.DataFrame], number: str) -> str:
    """What the paper prints for a figure or table, by `paper_differences`; empty where it has
    none.
    """
    differences = tables.get("paper_differences")
    if differences is None or differences.empty:
        return ""
    rows = differences[differences.artefact.map(plain) == plain(number)]
    text = rows.printed.iloc[0] if len(rows) else ""
    return text if isinstance(text, str) else ""


def plain(artefact: str) -> str:
    """An artefact's name without case, spaces and the word before its number: `3c`, `table1`."""
    text = re.sub(r"[\s_]", "", str(artefact)).lower().removeprefix("paper")
    return text.removeprefix("figure")
