"""What a figure is drawn on: a figure of its own or axes that you bring, with legend and caption.

A figure of its own stands outside pyplot's list: a notebook shows it once, as the result of its
cell, and nothing keeps it alive. Its layout is settled when it is drawn, and settled again only
when a title, a label or its size has changed since.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Bbox, ScaledTranslation

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report.look import FONTS, SAVING, WIDE, changed, label_color, quiet

# --- what was asked for ---


@dataclass
class Sheet:
    """What the figure that is being drawn was asked for, and what it has said so far."""

    axes: np.ndarray | None = None
    """Axes that the user brought, in their own shape; None for a figure of its own."""
    caption: bool = True
    legend: bool | str = True
    palette: Mapping[str, Any] | Sequence[Any] | str | None = None
    order: tuple[str, ...] = ()
    met: set[str] = field(default_factory=set)
    """Names among which `order` was applied."""
    text: str = ""
    """The caption, whether it is written or not."""


_SHEET: ContextVar[Sheet | None] = ContextVar("sheet", default=None)


def sheet() -> Sheet:
    """The sheet of the figure that is being drawn; a plain one outside of any."""
    return _SHEET.get() or Sheet()


@contextlib.contextmanager
def drawing_on(asked: Sheet) -> Iterator[Sheet]:
    """A context in which a sheet is the current one."""
    token = _SHEET.set(asked)
    try:
        yield asked
    finally:
        _SHEET.reset(token)


def width_of(axes: np.ndarray) -> float:
    """Inches from the left end of the leftmost axes to the right end of the rightmost."""
    boxes = [ax.get_position() for ax in axes.flat]
    share = max(box.x1 for box in boxes) - min(box.x0 for box in boxes)
    return float(share * axes.flat[0].get_figure().bbox.width / axes.flat[0].get_figure().dpi)


# --- figures and axes ---


class Panel(Axes):
    """Axes with one title, at the left: one that is set later replaces ours and looks like it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        rc = matplotlib.rcParams
        self._title = {
            "fontsize": rc["axes.titlesize"],
            "fontweight": rc["axes.titleweight"],
            "color": rc["text.color" if rc["axes.titlecolor"] == "auto" else "axes.titlecolor"],
            "pad": rc["axes.titlepad"],
        }

    def set_title(self, label, fontdict=None, loc=None, **options):
        """`Axes.set_title` with the left as its usual place."""
        look = {} if fontdict else self._title
        return super().set_title(label, fontdict, loc or "left", **look | options)

    def get_title(self, loc=None):
        """`Axes.get_title` with the left as its usual place."""
        return super().get_title(loc=loc or "left")


class Settled(ConstrainedLayoutEngine):
    """Constrained layout that runs when a text or the size has changed, not on every drawing.

    A title of the whole figure gets a strip of its own above the legend.
    """

    _seen: tuple = ()

    def execute(self, figure: Figure) -> None:
        """Lay the figure out where that is due."""
        now = _texts_of(figure)
        if now == self._seen:
            return
        title, legends = figure._suptitle, [leg for leg in figure.legends if leg._outside_loc]
        above = title is not None and bool(title.get_text()) and bool(legends)
        strip = self._strip(figure) if above else 0.0
        for each in legends:
            each.set_bbox_to_anchor(None)
        if title is not None:
            title.set_in_layout(not above)
        self.set(rect=(0, 0, 1, 1 - strip))
        super().execute(figure)
        if above:
            title.set_position((title.get_position()[0], 1 - self._params["h_pad"] / 2))
            for each in legends:
                box = Bbox([[0, 0], [1, 1 - strip]])
                each.set_bbox_to_anchor(box, transform=figure.transFigure)
        self._seen = _texts_of(figure)

    def _strip(self, figure: Figure) -> float:
        """Height of the figure's title with its distance, as a share of the figure."""
        box = figure._suptitle.get_window_extent(figure._get_renderer())
        return box.height / figure.bbox.height + 2 * self._params["h_pad"] / figure.get_figheight()


def _texts_of(figure: Figure) -> tuple:
    """What the layout depends on and a user may change afterwards."""
    own = [figure._suptitle, figure._supxlabel, figure._supylabel]
    for ax in figure.axes:
        own += [ax.title, ax._left_title, ax._right_title, ax.xaxis.label, ax.yaxis.label]
    words = tuple((text.get_text(), text.get_fontsize()) for text in own if text is not None)
    places = tuple(
        (id(axis.get_major_locator()), id(axis.get_major_formatter()))
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
    )
    return (*figure.get_size_inches(), len(figure.legends), words, places)


class NotebookFigure(Figure):
    """A Figure that shows itself in a notebook, and in a window when a script calls `show()`."""

    caption: str = ""
    """What stands, or would stand, below the figure: counts, intervals and what marks mean."""

    def savefig(self, fname, **options) -> None:
        """`Figure.savefig` with fonts that journals take and 300 dots per inch, where rcParams do
        not say otherwise.
        """
        ours = {name: value for name, value in SAVING.items() if not changed(name)}
        with matplotlib.rc_context(ours):
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()

    def show(self, warn: bool = True) -> None:
        """Show the figure: in a notebook below the cell, in a script in a window that the script
        waits for.

        Args:
            warn: Whether a backend without windows gets a word of matplotlib's.
        """
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        if shell is not None and hasattr(shell, "kernel"):
            sys.modules["IPython"].display.display(self)
            return
        from matplotlib import pyplot

        if self.canvas.manager is None:
            _adopt(self)
        if pyplot.isinteractive():
            super().show(warn)
        else:
            pyplot.show()
            pyplot.close(self)


def _adopt(figure: Figure) -> None:
    """Give a figure to pyplot, which opens its window."""
    from matplotlib import pyplot

    try:
        pyplot.figure(figure)
    except ValueError as error:
        raise DiagnosticsError(
            f"A window for a figure needs matplotlib 3.11; this is {matplotlib.__version__}. Save"
            ' it with figure.savefig("name.png"), or pass ax= with axes of plt.subplots.'
        ) from error


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **options
) -> tuple[Figure, np.ndarray]:
    """The figure and the axes to draw onto: an empty figure, or the axes that the user brought.

    Args:
        width: Inches.
        height: Inches at the usual size of text; a figure with larger text is higher.
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        **options: Further options of `Figure.subplots`, such as `sharex`.

    Returns:
        The figure and its axes [rows, columns]; ticks that are added later keep the style.

    Raises:
        DiagnosticsError: The user brought another number of axes.
    """
    if sheet().axes is not None:
        return _brought(rows, columns, **options)
    usual = 8.0 if width >= WIDE else 7.0
    height *= max(1.0, matplotlib.rcParams["font.size"] / usual)
    figure = NotebookFigure(
        figsize=(width, height),
        layout=Settled(w_pad=0.05, h_pad=0.04, wspace=0.03, hspace=0.04),
    )
    axes = figure.subplots(
        rows, columns, squeeze=False, subplot_kw={"axes_class": Panel}, **options
    )
    for ax in axes.flat:
        for axis in "xy":
            ax.tick_params(
                axis=axis,
                which="both",
                color=quiet(),
                labelcolor=label_color(axis),
                labelsize=matplotlib.rcParams[f"{axis}tick.labelsize"],
                width=matplotlib.rcParams[f"{axis}tick.major.width"],
            )
    return figure, axes


def _brought(rows: int, columns: int, *, sharex=False, sharey=False) -> tuple[Figure, np.ndarray]:
    """The user's axes as [rows, columns], with the shared axes that the figure relies on."""
    axes = sheet().axes
    if axes.size != rows * columns:
        few = "ax= takes" if axes.size == 1 else "axes= got"
        raise DiagnosticsError(
            f"This figure has {rows * columns} panel{'s' if rows * columns > 1 else ''};"
            f" {few} {axes.size}. Pass axes= with {rows * columns} axes, or choose fewer panels"
            " (for example outcomes=['gain'])."
        )
    axes = axes.reshape(rows, columns)
    for ax in list(axes.flat)[1:]:
        first = axes.flat[0]
        if sharey and not ax.get_shared_y_axes().joined(ax, first):
            ax.sharey(first)
        if sharex and not ax.get_shared_x_axes().joined(ax, first):
            ax.sharex(first)
    return axes.flat[0].get_figure(), axes


def panels(count: int, width: float, across: int | None = None) -> tuple[int, int]:
    """Rows and columns of a figure's panels.

    Args:
        count: Number of panels.
        width: Inches; panels need half a page each, so a narrow page has one column.
        across: Number of columns that there may be at most; where None, as above.

    Returns:
        Rows and columns; those in which the user's own axes stand, where they were brought.
    """
    own = sheet().axes
    if own is not None and own.size == count:
        if own.ndim == 2:
            return own.shape
        tops = {round(ax.get_position().y0, 2) for ax in own.flat}
        return (1, count) if len(tops) == 1 else (count, 1)
    columns = min(across or (1 if width < WIDE else count), count)
    return -(-count // columns), columns


def hide_rest(axes: np.ndarray, used: int) -> None:
    """Hide the places of a grid of panels that hold none."""
    for ax in list(axes.flat)[used:]:
        ax.set_visible(False)


def spread(figure: Figure, w_pad: float) -> None:
    """More room between panels, in inches, on a figure of its own: a tick at the very end of an
    axis hangs over.
    """
    if sheet().axes is None:
        figure.get_layout_engine().set(w_pad=w_pad)


# --- legend and caption ---


def legend(figure: Figure, ax, columns: int, *extra, full: bool = False) -> None:
    """The legend: above all panels on a figure of its own, inside the user's own axes.

    Args:
        figure: The figure.
        ax: The axes whose labelled artists it lists.
        columns: Number of columns above the panels.
        *extra: Further artists with labels, which come last.
        full: Whether the panel has no free place, so that a legend of the user's own axes stands
            below them.
    """
    handles, labels = ax.get_legend_handles_labels()
    handles, labels = [*handles, *extra], [*labels, *(line.get_label() for line in extra)]
    asked = sheet().legend
    if not handles or asked is False:
        return
    if isinstance(asked, str):
        ax.legend(handles, labels, loc=asked)
    elif sheet().axes is not None and full:
        down = ScaledTranslation(0, -4.2 * text_size() / 72, figure.dpi_scale_trans)
        below = {"bbox_to_anchor": (0, 0), "bbox_transform": ax.transAxes + down}
        ax.legend(handles, labels, loc="upper left", ncols=2, borderaxespad=0, **below)
    elif sheet().axes is not None:
        ax.legend(handles, labels, loc="best")
    else:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def caption(figure: Figure, *sentences: str) -> None:
    """Small print below the figure, wrapped to its width.

    Below axes that the user brought nothing is written, since their figure is not ours.
    """
    words = " ".join(sentence for sentence in sentences if sentence).split()
    sheet().text = " ".join(words)
    if sheet().axes is not None:
        return
    figure.caption = " ".join(words)
    if not sheet().caption:
        return
    size = FontProperties(size=matplotlib.rcParams["font.size"]).get_size_in_points() - 1
    lines, room = [""], figure.get_figwidth() * 72 * 0.93
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size) > room and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=size, color=quiet())


def text_width(text: str, size: float) -> float:
    """Width in points of a line in the current font."""
    families = tuple(tuple(matplotlib.rcParams[name]) for name in FONTS)
    return _text_width(text, size, families)


@functools.cache
def _text_width(text: str, size: float, families: tuple[tuple[str, ...], ...]) -> float:
    font = FontProperties(family=list(families[0]), size=size)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def text_size(less: float = 0.0) -> float:
    """Size in points of plain text, less some."""
    return matplotlib.rcParams["font.size"] - less


def is_wide(ax) -> bool:
    """Whether an axes' panels stand on a wide page."""
    own = sheet().axes
    return (ax.get_figure().get_figwidth() if own is None else width_of(own)) > WIDE
