"""Texts and ticks that are measured once: renderers and axes of figures that are drawn again and
again.

A figure of the report is measured for its layout and drawn at two resolutions, each twice over for
page and phone. Matplotlib works out the ticks of an axis five times for one drawing, and measures
their labels twice; it reads a font's heights from its file for every text.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.font_manager import FontProperties, fontManager, get_font

from diagnostics.report.look import FONTS


class MeasuredOnce:
    """A renderer that measures each text once in a process: names and ticks recur in every figure.

    Measuring takes a quarter of the time of a report.
    """

    _sizes: ClassVar[dict[tuple, tuple[float, float, float]]] = {}

    def get_text_width_height_descent(self, s, prop, ismath):
        """Width, height and descent of a text, as the renderer measures it."""
        rc = matplotlib.rcParams
        fonts = (*(tuple(rc[name]) for name in FONTS), rc["text.hinting"])
        key = (type(self), self.points_to_pixels(72), s, hash(prop), ismath, fonts)
        if key not in self._sizes:
            if len(self._sizes) > 20_000:
                self._sizes.clear()
            self._sizes[key] = super().get_text_width_height_descent(s, prop, ismath)
        return self._sizes[key]

    def _get_font_height_metrics(self, prop):
        """Ascent, descent and gap between lines in pixels, which matplotlib would read from the
        font's file for each text; None three times where the font does not have them.
        """
        height = prop.get_size_in_points() * self.points_to_pixels(72) / 72
        try:
            return tuple(share * height for share in _heights_of(prop))
        except (AttributeError, TypeError, KeyError):
            return None, None, None


_HEIGHTS: dict[tuple, tuple[float, float, float]] = {}
"""Heights of the fonts that were asked for, by font and the families in force."""


def _heights_of(prop: FontProperties) -> tuple[float, float, float]:
    """Ascent, descent and gap of the font that is found for some properties, as shares of its
    size.
    """
    key = (hash(prop), *(tuple(matplotlib.rcParams[name]) for name in FONTS))
    if key not in _HEIGHTS:
        _HEIGHTS[key] = _heights(tuple(fontManager._find_fonts_by_props(prop)))
    return _HEIGHTS[key]


@functools.cache
def _heights(fonts: tuple) -> tuple[float, float, float]:
    """Ascent, descent and gap of the first of some fonts, as shares of its size."""
    font = get_font(fonts)
    named = {"OS/2": ("sTypoAscender", "sTypoDescender", "sTypoLineGap")}
    named["hhea"] = ("ascent", "descent", "lineGap")
    for table, names in named.items():
        if (held := font.get_sfnt_table(table)) is not None:
            em = font.get_sfnt_table("head")["unitsPerEm"]
            up, down, gap = (held[name] / em for name in names)
            return up, -down, gap
    raise KeyError("no table of heights")


class _Once:
    """An axis that, within `ticks_once`, works out its ticks once per place of its axes, and
    measures their labels once per renderer.
    """

    _known: dict[tuple, Any] | None = None

    def _place(self) -> tuple:
        return tuple(self.axes.bbox.bounds)

    def _update_ticks(self):
        if self._known is None:
            return super()._update_ticks()
        place = self._place()
        if place not in self._known:
            self._known[place] = super()._update_ticks()
        return self._known[place]

    def set_tick_params(self, which="major", reset=False, **kwargs):
        """`Axis.set_tick_params` that makes no minor tick, where there is none, to change it: those
        that are made later look so.
        """
        if which == "both" and not reset and "minorTicks" not in vars(self):
            self._minor_tick_kw.update(self._translate_tick_params(dict(kwargs)))
            which = "major"
        super().set_tick_params(which, reset, **kwargs)

    def _get_ticklabel_bboxes(self, ticks, renderer):
        if self._known is None:
            return super()._get_ticklabel_bboxes(ticks, renderer)
        key = (*self._place(), id(ticks), renderer)
        if key not in self._known:
            self._known[key] = super()._get_ticklabel_bboxes(ticks, renderer)
        return self._known[key]


class XAxisOnce(_Once, XAxis):
    """Matplotlib's x axis, whose ticks can be worked out once."""


class YAxisOnce(_Once, YAxis):
    """Matplotlib's y axis, whose ticks can be worked out once."""


@contextlib.contextmanager
def ticks_once(axes: Iterable[Axes]) -> Iterator[None]:
    """A context in which ticks are worked out once: nothing but sizes and places may change in it.

    Args:
        axes: Axes of a figure; those of other classes than ours are left as they are.
    """
    own = [axis for ax in axes for axis in (ax.xaxis, ax.yaxis) if isinstance(axis, _Once)]
    for axis in own:
        axis._known = {}
    try:
        yield
    finally:
        for axis in own:
            axis._known = None
