"""The one style of all figures, and their parts: canvas, rows, marks, legend, caption, ticks.

Categories take the colors of Okabe and Ito, which color-blind readers can tell apart. A marker or a
line style always repeats what the color says, so that a figure can be read in black and white.
Colors of the page itself (ink, rules, paper) come in a light and a dark set, so that a report can
exchange them.
"""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import FuncNorm
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.schema import require_columns
from diagnostics.criteria import AMBIGUOUS
from diagnostics.report.canvas import (
    OVERVIEW,
    NotebookFigure,
    canvas,
    caption,
    hide_rest,
    is_wide,
    legend,
    panels,
    sheet,
    spread,
    text_size,
    text_width,
)
from diagnostics.report.look import (
    AMBER,
    BLUE,
    CYCLE,
    DARK,
    DOUBLE,
    GREEN,
    LIGHT,
    ORANGE,
    PURPLE,
    SINGLE,
    SKY,
    WIDE,
    ink,
    paper,
    quiet,
    settings,
)
from diagnostics.report.naming import readable, steps_of
from diagnostics.report.palette import (
    CRITERIA,
    DASHES,
    MARKERS,
    RIVALS,
    SPLITS,
    color_of,
    criterion_style,
    diverging,
    on,
    sequential,
    series_style,
    split_style,
    tone,
)

__all__ = [
    "AMBER",
    "BLUE",
    "CRITERIA",
    "CYCLE",
    "DARK",
    "DASHES",
    "DOUBLE",
    "GREEN",
    "LIGHT",
    "MARKERS",
    "ORANGE",
    "PURPLE",
    "RIVALS",
    "SINGLE",
    "SKY",
    "SPLITS",
    "SUPERSCRIPTS",
    "WIDE",
    "NotebookFigure",
    "ambiguous",
    "band",
    "bars",
    "canvas",
    "caption",
    "color_of",
    "counts",
    "criterion_style",
    "diverging",
    "flagged",
    "halves",
    "hide_rest",
    "ink",
    "is_wide",
    "keep",
    "legend",
    "lying",
    "names_down",
    "nearest_budget",
    "offsets",
    "on",
    "panels",
    "paper",
    "percent",
    "power",
    "powers",
    "present",
    "quiet",
    "reach",
    "readable",
    "sequential",
    "series_style",
    "settings",
    "sheet",
    "signed_root",
    "split_style",
    "spread",
    "steps_of",
    "text_size",
    "text_width",
    "tie_words",
    "tone",
    "upright",
    "zero",
]
"""What figures take from here, whichever module it stands in."""

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


def leaves_out(before: pd.DataFrame, after: pd.DataFrame) -> None:
    """Let the caption say how many criteria an overview of the report does not show."""
    if OVERVIEW.get():
        sheet().left_out = before.criterion.nunique() - after.criterion.nunique()


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


def present(values: Iterable[str], order: Iterable[str]) -> list[str]:
    """Distinct values: those that the reader put in order, then those of `order`, then others."""
    seen = list(dict.fromkeys(values))
    sheet().met.update(map(str, seen))
    known = [name for name in dict.fromkeys((*sheet().order, *order)) if name in seen]
    return known + [name for name in seen if name not in known]


# --- captions and colors ---


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
