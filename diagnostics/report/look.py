"""The look of figures: page colors, palette, text sizes, and whose rcParams count.

Our look lies beneath yours. A figure of its own takes it only where rcParams are as matplotlib
ships them: what a style sheet, a matplotlibrc, seaborn's theme or a line of yours has changed stays
as you set it. A few settings belong together and go together: with one of the page's colors all of
them are yours, with one text size all sizes, with one font all fonts. Axes that you bring (`ax=`)
keep your rcParams altogether. `style()` is the look itself, for your own panels beside ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex, to_rgb

SINGLE, DOUBLE = 3.3, 6.9
"""Inches: one column and two columns of a paper."""
WIDE = 5.0
"""Inches from which panels stand side by side and text has the larger size."""

BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER)
"""The colors of Okabe and Ito that can be seen on paper and on a dark page."""
COLORS = (*CYCLE, "#8C5A3C", "#6457C8", "#B8255F", "#86861F", "#1E8C93")
"""Those six and five more, for figures with many criteria; a marker repeats what they say."""

LIGHT = {"ink": "#1F2328", "quiet": "#59636E", "rule": "#D1D9E0", "paper": "#FFFFFF"}
DARK = {"ink": "#F0F3F6", "quiet": "#A3ADB8", "rule": "#3D444D", "paper": "#14181D"}

PAGE_COLORS = {
    "figure.facecolor": "paper",
    "axes.facecolor": "paper",
    "savefig.facecolor": "paper",
    "text.color": "ink",
    "axes.labelcolor": "ink",
    "axes.titlecolor": "ink",
    "xtick.color": "quiet",
    "ytick.color": "quiet",
    "xtick.labelcolor": "ink",
    "ytick.labelcolor": "ink",
    "axes.edgecolor": "quiet",
    "grid.color": "rule",
    "legend.labelcolor": "ink",
}
"""Settings that are colors of the page, with the color's name."""
SIZES = {
    "font.size": 0.0,
    "axes.titlesize": 0.5,
    "axes.labelsize": 0.0,
    "xtick.labelsize": -0.5,
    "ytick.labelsize": -0.5,
    "legend.fontsize": -0.5,
    "figure.titlesize": 1.5,
}
"""Settings that are sizes of text, in points beyond the size of plain text."""
FONTS = ("font.family", "font.sans-serif", "font.serif", "font.monospace")
TOGETHER = (tuple(PAGE_COLORS), tuple(SIZES), FONTS)
"""Settings of which one that you change makes all of them yours."""

LINES = {
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 4.0,
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
    "hatch.linewidth": 0.5,
    "figure.dpi": 150,
}
SAVING = {"pdf.fonttype": 42, "ps.fonttype": 42, "savefig.dpi": 300}
"""Settings of files: TrueType fonts, which journals take, and 300 dots per inch."""
ALWAYS = {
    "text.parse_math": False,
    "svg.hashsalt": "opd-diagnostics",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}
"""Settings that are none of the look. Text is never read as mathematics: names of runs, criteria
and columns come from outside, and may hold `$`."""


def settings(width: float, dark: bool) -> dict[str, Any]:
    """Our look as rcParams, for a width in inches and a light or a dark page."""
    page, size = DARK if dark else LIGHT, 8.0 if width >= WIDE else 7.0
    return {
        "font.family": ["DejaVu Sans"],
        **{name: size + more for name, more in SIZES.items()},
        **{name: page[color] for name, color in PAGE_COLORS.items()},
        **LINES,
        "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
        **SAVING,
    }


class Look(dict):
    """rcParams that also are a context: `with dx.plot.style(): ...`."""

    def __enter__(self) -> Look:
        self._within = matplotlib.rc_context(dict(self))
        self._within.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._within.__exit__(kind, value, trace)


def style(*, dark: bool = False, width: float = DOUBLE) -> Look:
    """The look of our figures, for panels of your own beside ours.

    Example: `with dx.plot.style(): figure, axes = plt.subplots(1, 2)`; for a whole session
    `plt.rcParams.update(dx.plot.style())`. Nothing changes until you do either.

    Args:
        dark: Whether the figures are meant for a dark page.
        width: Width of the figures in inches, on which the size of text depends.

    Returns:
        rcParams by name; also a context manager within which they hold.
    """
    return Look(settings(width, dark))


def changed(name: str) -> bool:
    """Whether a setting is not as matplotlib ships it."""
    return bool(matplotlib.rcParams[name] != matplotlib.rcParamsDefault[name])


def beneath(width: float, dark: bool) -> dict[str, Any]:
    """What of our look applies to a figure of its own: what you have not changed.

    A dark page that is asked for has our colors whatever is set.
    """
    yours = {name for group in TOGETHER if any(map(changed, group)) for name in group}
    ours = {
        name: value
        for name, value in settings(width, dark).items()
        if name not in yours and not changed(name)
    }
    return ours | ALWAYS | (colors(dark) if dark else {})


def colors(dark: bool) -> dict[str, str]:
    """The colors of a page as rcParams."""
    page = DARK if dark else LIGHT
    return {name: page[color] for name, color in PAGE_COLORS.items()}


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """A context in which no setting is the user's, for files that must not depend on them.

    Within another one it changes nothing.
    """
    if _UNTOUCHED.get():
        yield
        return
    token = _UNTOUCHED.set(True)
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            yield
    finally:
        _UNTOUCHED.reset(token)


_UNTOUCHED: ContextVar[bool] = ContextVar("untouched", default=False)


def ink() -> str:
    """Color of text on the current page."""
    return matplotlib.rcParams["text.color"]


def quiet() -> str:
    """Color of secondary text and marks on the current page; between ink and paper where the
    settings know no such color.
    """
    color, text = matplotlib.rcParams["xtick.color"], np.array(to_rgb(ink()))
    if not np.allclose(to_rgb(color), text):
        return color
    return to_hex(0.65 * text + 0.35 * np.array(to_rgb(paper())))


def paper() -> str:
    """Background color of the current page."""
    return matplotlib.rcParams["axes.facecolor"]


def label_color(axis: str) -> str:
    """Color of the numbers of an axis, x or y."""
    color = matplotlib.rcParams[f"{axis}tick.labelcolor"]
    return matplotlib.rcParams[f"{axis}tick.color"] if color == "inherit" else color
