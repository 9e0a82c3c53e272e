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
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import LayoutEngine
from matplotlib.legend import Legend
from matplotlib.spines import Spine
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Bbox, ScaledTranslation

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report.look import ALWAYS, FONTS, SAVING, WIDE, changed, label_color, quiet
from diagnostics.report.measured_once import MeasuredOnce, XAxisOnce, YAxisOnce, ticks_once

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
    left_out: int = 0
    """Criteria of the table that the figure does not show; the caption says how many."""
    text: str = ""
    """The caption, whether it is written or not."""


OVERVIEW: ContextVar[bool] = ContextVar("overview", default=False)
"""Whether the report chose the criteria of a figure, so that its caption counts the others."""
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
        self.xaxis.__class__, self.yaxis.__class__ = XAxisOnce, YAxisOnce

    def set_title(self, label, fontdict=None, loc=None, **options):
        """`Axes.set_title` with the left as its usual place."""
        look = {} if fontdict else self._title
        return super().set_title(label, fontdict, loc or "left", **look | options)

    def get_title(self, loc=None):
        """`Axes.get_title` with the left as its usual place."""
        return super().get_title(loc=loc or "left")


class Settled(LayoutEngine):
    """A layout that measures what hangs over each panel once, and again only when a text or the
    size has changed.

    From the top: the figure's title, the legend, the grid of equal panels, the caption. Color bars
    are insets of their panels, so they hang over as tick labels do.
    """

    _adjust_compatible = False
    _colorbar_gridspec = False
    _seen: tuple = ()

    def __init__(self, *, w_pad: float = 0.05, h_pad: float = 0.04):
        super().__init__()
        self._params = {"w_pad": w_pad, "h_pad": h_pad}

    def set(self, *, w_pad: float | None = None, h_pad: float | None = None) -> None:
        """Room on each side of what hangs over a panel, in inches."""
        for name, value in (("w_pad", w_pad), ("h_pad", h_pad)):
            self._params[name] = self._params[name] if value is None else value

    def execute(self, figure: Figure) -> None:
        """Lay the figure out where that is due."""
        if _texts_of(figure) == self._seen:
            return
        renderer = figure._get_renderer()
        pad = self._params["h_pad"] * figure.dpi
        top = self._title(figure, renderer, pad)
        for each in figure.legends:
            if isinstance(each, Above):
                each.set_bbox_to_anchor((0, 1 - top / figure.bbox.height))
                top += each.get_window_extent(renderer).height + 3 * pad
        self._place(figure, renderer, top, self._caption(figure, renderer, pad), pad)
        self._seen = _texts_of(figure)

    def _title(self, figure: Figure, renderer, pad: float) -> float:
        """Height of the figure's title with its distance, in pixels; puts it at the top."""
        title = figure._suptitle
        if title is None or not title.get_text():
            return 0.0
        title.set_position((title.get_position()[0], 1 - pad / figure.bbox.height))
        return title.get_window_extent(renderer).height + 2 * pad

    def _caption(self, figure: Figure, renderer, pad: float) -> float:
        """Height of the caption with its distance, in pixels; puts it at the bottom."""
        text = figure._supxlabel
        if text is None or not text.get_text():
            return 0.0
        text.set_position((text.get_position()[0], pad / figure.bbox.height))
        return text.get_window_extent(renderer).height + 2 * pad

    def _place(self, figure: Figure, renderer, top: float, bottom: float, pad: float) -> None:
        """Equal panels in what the strips and all that hangs over leave free.

        They are first put about where they will stand, since ticks depend on their size.
        """
        panels = [ax for ax in figure.axes if ax.get_subplotspec() is not None]
        if not panels:
            return
        rows, columns = panels[0].get_subplotspec().get_gridspec().get_geometry()
        pads = np.zeros((2, max(rows, columns), 2))  # [x or y, column or row, before or after]
        pads[0, :columns] = self._params["w_pad"] * figure.dpi
        pads[1, :rows] = pad
        usual = pads.copy()
        usual[0, :columns] += np.array(USUAL[0]) * figure.dpi
        usual[1, :rows] += np.array(USUAL[1]) * figure.dpi
        _arrange(figure, panels, usual, top, bottom)
        before, over, said = usual, pads, None
        for number in range(3):
            over = pads.copy() if number < 2 else over  # ticks that come and go get room for both
            with ticks_once(panels):
                if said is not None and said == _ticks_of(panels):
                    break
                free = _make_room(panels, renderer, over, pads)
                said = None if free else _ticks_of(panels)
            _arrange(figure, panels, over, top, bottom)
            if np.abs(over - before).max() < 0.005 * figure.dpi:
                break
            before = over


def _make_room(panels: Sequence[Axes], renderer, over: np.ndarray, pads: np.ndarray) -> bool:
    """Widen `over` to what hangs over the panels with its distance; whether anything does whose
    place depends on their size: what is neither a title nor of an axis.
    """
    free = False
    for ax in panels:
        if ax.get_visible():
            column, row = _cell(ax)
            across, up, of_axes = _overhang(ax, renderer)
            over[0, column] = np.maximum(over[0, column], across + pads[0, column])
            over[1, row] = np.maximum(over[1, row], up + pads[1, row])
            free |= not of_axes
    return free


def _ticks_of(panels: Sequence[Axes]) -> list[tuple[float, str]]:
    """Places and labels of all ticks that the panels and what is inset in them show."""
    return [
        (float(tick.get_loc()), tick.label1.get_text())
        for panel in panels
        for ax in (panel, *panel.child_axes)
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis._update_ticks()
    ]


USUAL = ((0.5, 0.05), (0.2, 0.35))
"""Inches that usually hang over a panel: left and right, above and below."""


def _cell(ax: Axes) -> tuple[int, int]:
    """Column and row of a panel."""
    spec = ax.get_subplotspec()
    return spec.colspan.start, spec.rowspan.start


def _arrange(
    figure: Figure, panels: Sequence[Axes], over: np.ndarray, top: float, bottom: float
) -> None:
    """Put panels where what hangs over them, in pixels, and the strips leave room."""
    rows, columns = panels[0].get_subplotspec().get_gridspec().get_geometry()
    size = figure.bbox.size - (0, top + bottom) - over.sum(axis=(1, 2))
    width, height = size / (columns, rows)
    if min(width, height) <= 0:
        return
    for ax in panels:
        column, row = _cell(ax)
        x = column * width + over[0, :column].sum() + over[0, column, 0]
        down = (row + 1) * height + over[1, :row].sum() + over[1, row, 0]
        box = Bbox.from_bounds(x, figure.bbox.height - top - down, width, height)
        ax.set_position(figure.transFigure.inverted().transform_bbox(box))
        ax.set_in_layout(True)


def _overhang(ax: Axes, renderer) -> tuple[np.ndarray, np.ndarray, bool]:
    """Pixels by which labels and titles stand out of an axes: left, right; above, below. And
    whether that is all that stands out.
    """
    own = ax.get_window_extent(renderer)
    around = ax.get_tightbbox(renderer, for_layout_only=True, bbox_extra_artists=[])
    boxes = [own if around is None else around]
    of_axes = True
    for artist in ax.get_default_bbox_extra_artists():
        box = artist.get_tightbbox(renderer)
        if box is not None and np.isfinite(box.extents).all() and (box.width or box.height):
            boxes.append(box)
            of_axes &= isinstance(artist, Spine) or not _sticks_out(box, own)
    around = Bbox.union(boxes)
    across = np.array([own.x0 - around.x0, around.x1 - own.x1])
    up = np.array([around.y1 - own.y1, own.y0 - around.y0])
    return np.clip(across, 0, None), np.clip(up, 0, None), of_axes


def _sticks_out(box: Bbox, own: Bbox) -> bool:
    """Whether a box reaches beyond another one."""
    return box.x0 < own.x0 or box.x1 > own.x1 or box.y0 < own.y0 or box.y1 > own.y1


class Above(Legend):
    """The legend above all panels, for which the layout keeps a strip."""


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


class _Agg(MeasuredOnce, RendererAgg):
    """Matplotlib's renderer of images that measures each text once."""


class _Canvas(FigureCanvasAgg):
    """A canvas that keeps its renderer, so that a layout and an image have one."""

    def get_renderer(self):
        """The renderer of the current size."""
        key = (*self.get_width_height(physical=True), self.figure.dpi)
        if getattr(self, "_own", None) != key:
            self.renderer, self._own = _Agg(*key), key
        return self.renderer


class NotebookFigure(Figure):
    """A Figure that shows itself in a notebook, and in a window when a script calls `show()`."""

    caption: str = ""
    """What stands, or would stand, below the figure: counts, intervals and what marks mean."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        _Canvas(self)

    def savefig(self, fname, **options) -> None:
        """`Figure.savefig` with fonts that journals take and 300 dots per inch, where rcParams do
        not say otherwise.
        """
        ours = {name: value for name, value in SAVING.items() if not changed(name)}
        with matplotlib.rc_context(ours), self.laid_out():
            super().savefig(fname, **options)

    @contextlib.contextmanager
    def laid_out(self) -> Iterator[None]:
        """A context without a layout engine, for whose sake matplotlib would draw twice; the layout
        is settled before.
        """
        engine = self.get_layout_engine()
        if engine is not None:
            engine.execute(self)
        with matplotlib.rc_context(ALWAYS):
            self.set_layout_engine(None)
        try:
            with ticks_once(self.axes):
                yield
        finally:
            self.set_layout_engine(engine)

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
        layout=Settled(),
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
        above = Above(figure, handles, labels, loc="upper left", ncols=columns, borderaxespad=0.4)
        figure.legends.append(above)


def caption(figure: Figure, *sentences: str) -> None:
    """Small print below the figure, wrapped to its width.

    Below axes that the user brought nothing is written, since their figure is not ours.
    """
    missing = sheet().left_out
    are = "criterion is" if missing == 1 else "criteria are"
    more = f"{missing} further {are} in the table alone." if missing else ""
    words = " ".join(sentence for sentence in (*sentences, more) if sentence).split()
    sheet().text = " ".join(words)
    if sheet().axes is not None:
        return
    figure.caption = " ".join(words)
    if not sheet().caption:
        return
    size = text_size(1)
    lines = wrapped(words, size, figure.get_figwidth() * 72 * 0.93)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=size, color=quiet())


def wrapped(words: Sequence[str], size: float, room: float) -> list[str]:
    """Lines of words that are no wider than `room` points; each word is measured once, whatever
    stands beside it.
    """
    lines: list[list[str]] = []
    space, used = text_width("x x", size) - text_width("xx", size), np.inf
    for word in words:
        width = text_width(word, size)
        if used + space + width > room:
            lines.append([])
            used = -space
        lines[-1].append(word)
        used += space + width
    return [" ".join(line) for line in lines]


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
