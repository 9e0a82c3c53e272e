"""The one style of all figures, and their parts: canvas, rows, marks, legend, caption, ticks.

Categories take the colors of Okabe and Ito, which color-blind readers can tell apart. A marker or a
line style always repeats what the color says, so that a figure can be read in black and white.
Colors of the page itself (ink, rules, paper) come in a light and a dark set, so that a report can
exchange them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import FuncNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns
from diagnostics.criteria import AMBIGUOUS
from diagnostics.report.naming import readable, steps_of

SINGLE, DOUBLE = 3.3, 6.9
"""Inches: one column and two columns of a paper."""

BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER)
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">")
DASHES = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.2, 1, 1.2)),
    (0, (7, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)

LIGHT = {"ink": "#1F2328", "quiet": "#59636E", "rule": "#D1D9E0", "paper": "#FFFFFF"}
DARK = {"ink": "#F0F3F6", "quiet": "#A3ADB8", "rule": "#3D444D", "paper": "#14181D"}

SPLITS = {
    "step": (ORANGE, "s", "step contexts"),
    "held_out": (BLUE, "o", "held-out contexts"),
    "all": (GREEN, "^", "all contexts"),
}
"""Color, marker and name of each split."""


class NotebookFigure(Figure):
    """A Figure that shows itself in a notebook even where no pyplot backend was started."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def settings(width: float, dark: bool) -> dict[str, Any]:
    """Matplotlib settings for a width in inches and a page.

    Text is never read as mathematics: names of runs, criteria and columns come from outside, and
    may hold `$`.
    """
    page = DARK if dark else LIGHT
    size = 7.0 if width < 5 else 8.0
    return {
        "font.family": "DejaVu Sans",
        "font.size": size,
        "axes.titlesize": size + 0.5,
        "axes.labelsize": size,
        "xtick.labelsize": size - 0.5,
        "ytick.labelsize": size - 0.5,
        "legend.fontsize": size - 0.5,
        "figure.facecolor": page["paper"],
        "axes.facecolor": page["paper"],
        "savefig.facecolor": page["paper"],
        "text.color": page["ink"],
        "axes.labelcolor": page["ink"],
        "axes.titlecolor": page["ink"],
        "xtick.color": page["quiet"],
        "ytick.color": page["quiet"],
        "xtick.labelcolor": page["ink"],
        "ytick.labelcolor": page["ink"],
        "axes.edgecolor": page["quiet"],
        "grid.color": page["rule"],
        "axes.grid": True,
        "grid.linewidth": 0.5,
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.titlepad": 4.0,
        "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
        "axes.unicode_minus": True,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "lines.linewidth": 1.3,
        "lines.markersize": 3.8,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2,
        "legend.labelcolor": page["ink"],
        "svg.hashsalt": "opd-diagnostics",
        "figure.autolayout": False,
        "figure.constrained_layout.use": False,
        "pdf.fonttype": 42,
        "savefig.dpi": 200,
        "figure.dpi": 150,
        "text.parse_math": False,
        "hatch.linewidth": 0.5,
    }


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **options
) -> tuple[NotebookFigure, np.ndarray]:
    """An empty figure with its axes.

    Args:
        width: Inches.
        height: Inches.
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        **options: Further options of `Figure.subplots`, such as `sharex`.

    Returns:
        The figure and its axes [rows, columns]; ticks that are added later keep the style.
    """
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.04, wspace=0.03, hspace=0.04)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.tick_params(
            which="both",
            color=quiet(),
            labelcolor=ink(),
            labelsize=matplotlib.rcParams["xtick.labelsize"],
            width=0.6,
        )
    return figure, axes


def ink() -> str:
    """Color of text on the current page."""
    return matplotlib.rcParams["text.color"]


def quiet() -> str:
    """Color of secondary text and marks on the current page."""
    return matplotlib.rcParams["xtick.color"]


def paper() -> str:
    """Background color of the current page."""
    return matplotlib.rcParams["axes.facecolor"]


def panels(count: int, width: float) -> tuple[int, int]:
    """Rows and columns for panels that need half a page each; a narrow page has one column."""
    return (count, 1) if width < 5 else (1, count)


# --- tables ---


def keep(
    table: pd.DataFrame, what: str, needs: Iterable[str], where: dict | None = None
) -> pd.DataFrame:
    """The rows that a figure shows.

    Args:
        table: The finished table.
        what: Name of the figure, for messages.
        needs: Columns that the figure cannot do without.
        where: For each column, the value or the values to keep.

    Returns:
        Those rows with a new index.

    Raises:
        DiagnosticsError: A column is missing, or no row remains.
    """
    require_columns(table, needs, what=what)
    for name, wanted in (where or {}).items():
        allowed = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
        kept = table[table[name].isin(allowed)]
        if kept.empty:
            raise DiagnosticsError(
                f"{what} found no row with {name} in {', '.join(map(repr, allowed))}; the table has"
                f" {', '.join(map(repr, table[name].unique()[:12].tolist())) or 'no rows'}. Pass a"
                " table that holds it."
            )
        table = kept
    if table.empty:
        raise DiagnosticsError(
            f"{what} got a table without rows. Pass the table that the analysis made."
        )
    return table.reset_index(drop=True)


def halves(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the step and held-out splits where the table has both, otherwise all rows.

    Rows over all positions would show the same positions a second time.
    """
    both = {"step", "held_out"} <= set(table.split)
    return table[table.split != "all"].reset_index(drop=True) if both else table


def nearest_budget(table: pd.DataFrame, share: float = 0.05) -> float:
    """The budget of the table that is nearest to `share`, on a logarithmic scale."""
    budgets = np.unique(table.budget.to_numpy(float))
    return float(budgets[np.abs(np.log(budgets / share)).argmin()])


def present(values: pd.Series, order: Iterable[str]) -> list[str]:
    """Distinct values, those of `order` first and in its order."""
    seen = list(dict.fromkeys(values))
    known = [name for name in order if name in seen]
    return known + [name for name in seen if name not in known]


# --- captions and colors ---


def split_style(split: str, index: int = 0) -> tuple[str, str, str]:
    """Color, marker and name of a split."""
    return SPLITS.get(
        split,
        (CYCLE[(index + 2) % len(CYCLE)], MARKERS[(index + 2) % len(MARKERS)], readable(split)),
    )


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def counts(table: pd.DataFrame) -> str:
    """`Step contexts: 16 prompts, 734 positions; held-out …` from the table's own columns."""
    if not {"prompts", "positions"} <= set(table.columns):
        return ""
    groups = (
        [("", table)]
        if "split" not in table
        else [
            (split_style(split)[2] + ": ", table[table.split == split])
            for split in present(table.split, SPLITS)
        ]
    )
    parts = [
        f"{name}{_range(rows.prompts)} prompts, {_range(rows.positions)} positions"
        for name, rows in groups
    ]
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def bars(
    level: float | None,
    what: str = "Bars",
    *,
    over: str = "prompts",
    table: pd.DataFrame | None = None,
) -> str:
    """The caption's sentence on intervals; the table does not record their level, but may say over
    how many step batches they are.
    """
    steps = None if table is None else steps_of(table)
    if steps is not None:
        over = f"{over} and {steps} step batches" if steps > 1 else f"{over} alone (one step batch)"
    return f"{what}: {'' if level is None else f'{level:.0%} '}intervals over {over}."


def ambiguous(table: pd.DataFrame) -> np.ndarray:
    """[N] whether ties decided more of a cell's selection than a conclusion may rest on; nowhere
    where the table does not say.
    """
    if "ambiguous" not in table:
        return np.zeros(len(table), dtype=bool)
    return table["ambiguous"].to_numpy(dtype=float) > AMBIGUOUS


def flagged(table: pd.DataFrame, name: str) -> np.ndarray:
    """[N] a column of true and false; nowhere true where the table lacks it or a row is empty."""
    if name not in table:
        return np.zeros(len(table), dtype=bool)
    return table[name].isin([True, "True"]).to_numpy(dtype=bool)


def tie_words(table: pd.DataFrame, how: str = "Ringed") -> str:
    """The caption's sentence on ambiguous cells; empty where there are none."""
    share = f"{AMBIGUOUS:.0%}"
    return f"{how}: ties decide over {share} of the selection." if ambiguous(table).any() else ""


def caption(figure: Figure, *sentences: str) -> None:
    """Small print below the figure, wrapped to its width."""
    size = matplotlib.rcParams["font.size"] - 1
    lines, room = [""], figure.get_figwidth() * 72 * 0.93
    for word in " ".join(sentence for sentence in sentences if sentence).split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size) > room and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=size, color=quiet())


@functools.cache
def text_width(text: str, size: float) -> float:
    """Width in points of a line in the style's font."""
    font = FontProperties(family=matplotlib.rcParams["font.family"], size=size)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def legend(figure: Figure, ax, columns: int, *extra: Line2D) -> None:
    """One legend for the whole figure, above the panels: the axes' labelled artists, then
    `extra`.
    """
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = [*handles, *extra], [*labels, *(line.get_label() for line in extra)]
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def diverging() -> LinearSegmentedColormap:
    """Orange, grey, blue: the middle can be seen on paper and on a dark page."""
    return LinearSegmentedColormap.from_list(
        "diverging", ["#8A3B00", ORANGE, "#B9BFC6", BLUE, "#003E66"]
    )


def signed_root(reach: float) -> FuncNorm:
    """A color scale by the signed square root, between -reach and reach.

    Small values of either sign stay apart where a few values are large.
    """
    return FuncNorm(
        (
            lambda value: np.sign(value) * np.sqrt(np.abs(value)),
            lambda root: np.sign(root) * root**2,
        ),
        vmin=-reach,
        vmax=reach,
    )


CRITERIA = ("divergence", "teachability", "tip", "entropy", "compatibility", "incompatible")
"""Criteria that have the same color and marker in every figure."""


RIVALS = {"random_divergent": "+", "position_matched": "1", "token_identity": "2"}
"""Markers of the fair rivals of a criterion, which are grey as random is."""


def criterion_style(name: str, names: Iterable[str]) -> dict:
    """Color, marker and line of a criterion.

    The usual six are fixed, and so are random and the other rivals; the others among `names` follow
    in their order.
    """
    if name in RIVALS:
        look = {"color": quiet(), "marker": RIVALS[name], "markersize": 5.5}
        return look | {"linestyle": DASHES[2]}
    if name in ("random", "full"):
        return {
            "color": quiet() if name == "random" else ink(),
            "marker": "x" if name == "random" else "None",
            "markersize": 3.5,
            "linestyle": "-",
        }
    order = [
        *CRITERIA,
        *(
            other
            for other in dict.fromkeys(names)
            if other not in (*CRITERIA, *RIVALS, "random", "full")
        ),
    ]
    index = order.index(name)
    dash = DASHES[(index + index // len(CYCLE)) % len(DASHES)]
    return {
        "color": CYCLE[index % len(CYCLE)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.2,
        "linestyle": dash,
    }


# --- axes and marks ---


def powers(*axes) -> None:
    """Set the ticks of logarithmic axes, after the data have been drawn.

    Labels are written without mathtext, whose layout takes longer than all the rest of a figure.
    """
    for axis in axes:
        low, high = axis.get_view_interval()
        decades = LogLocator(subs=(1.0,) if high > 60 * low else (1.0, 2.0, 5.0), numticks=7)
        axis.set_major_locator(decades if high > 4 * low else MaxNLocator(3))
        axis.set_major_formatter(FuncFormatter(power))
        axis.set_minor_locator(NullLocator())


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float, _=None) -> str:
    """A tick's number; in powers of ten outside [0.001, 1000)."""
    if 0.00099 < value < 1000 or value <= 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    ten = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return ten if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}×{ten}"


def percent(value: float, _=None) -> str:
    """A share as a tick's number."""
    return f"{100 * value:g}%".replace("-", "−")


def zero(ax, axis: str = "y", at: float = 0.0) -> None:
    """The line of no effect."""
    line = ax.axhline if axis == "y" else ax.axvline
    line(at, color=matplotlib.rcParams["axes.edgecolor"], linewidth=0.7, zorder=1.5)


def reach(rows: pd.DataFrame, value: str, low: str = "low", high: str = "high") -> np.ndarray:
    """Lengths [2, N] of the bars below and above each value; a missing end draws none."""
    middle = rows[value].to_numpy(float)
    return np.clip(
        np.vstack([middle - rows[low].to_numpy(float), rows[high].to_numpy(float) - middle]),
        0,
        None,
    )


def upright(ax, x, rows: pd.DataFrame, value: str, **options):
    """Marks at x with their intervals along y."""
    return ax.errorbar(
        x,
        rows[value].to_numpy(float),
        yerr=reach(rows, value),
        elinewidth=1.1,
        capsize=0,
        **options,
    )


def lying(ax, y, rows: pd.DataFrame, value: str, **options):
    """Marks at y with their intervals along x."""
    return ax.errorbar(
        rows[value].to_numpy(float),
        y,
        xerr=reach(rows, value),
        elinewidth=1.1,
        capsize=0,
        linestyle="none",
        **options,
    )


def band(
    ax, x, rows: pd.DataFrame, color: str, low: str = "low", high: str = "high", **options
) -> None:
    """A translucent band between two columns."""
    ax.fill_between(
        x,
        rows[low].to_numpy(float),
        rows[high].to_numpy(float),
        color=color,
        alpha=0.16,
        linewidth=0,
        **options,
    )


def offsets(count: int, step: float) -> np.ndarray:
    """`count` places around 0, `step` apart."""
    return (np.arange(count) - (count - 1) / 2) * step


def names_down(ax, names: Iterable[str]) -> None:
    """Names as the rows of a forest, the first on top."""
    names = list(names)
    ax.set_yticks(range(len(names)), [readable(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
