"""Options that every figure takes, with their defaults and their documentation written once."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ParamSpec, TypedDict, get_args, get_type_hints

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import several
from diagnostics.core.inputs import table as finished
from diagnostics.report import look, naming
from diagnostics.report.canvas import Sheet, drawing_on, width_of
from diagnostics.report.look import DOUBLE, SINGLE
from diagnostics.report.palette import check_palette

Arguments = ParamSpec("Arguments")


class Page(TypedDict, total=False):
    """Options of a figure: the page that it is drawn for, and what it is made part of."""

    width: float
    dark: bool
    ax: Axes | None
    axes: Sequence[Axes] | None
    palette: Mapping[str, Any] | Sequence[Any] | str | None
    order: Sequence[str]
    labels: Mapping[str, str] | None
    caption: bool
    legend: bool | str


class Intervals(Page, total=False):
    """Options of a figure with intervals: those of the page, and the intervals' level."""

    level: float | None


@dataclass(frozen=True)
class Option:
    """Type, default and documentation of one of those options."""

    annotation: str
    default: Any
    text: str


OPTIONS = {
    "level": Option(
        "float | None",
        None,
        "Level of the table's intervals, between 0 and 1, for the caption. A table does not record"
        " it; where None, the caption names no level.",
    ),
    "width": Option(
        "float",
        DOUBLE,
        f"Width in inches: `SINGLE` ({SINGLE}) for one column of a paper, `DOUBLE` ({DOUBLE}) for"
        " two. Below 5 inches, panels stand below one another where they would not fit side by"
        " side. Has no effect on axes of yours.",
    ),
    "dark": Option("bool", False, "Whether the figure is meant for a dark page."),
    "ax": Option(
        "Axes | None",
        None,
        "Axes of yours, as `plt.subplots` makes them, to draw a figure of one panel into. They keep"
        " your rcParams and get no caption.",
    ),
    "axes": Option(
        "Sequence[Axes] | None",
        None,
        "The same for several panels: as many axes, row by row.",
    ),
    "palette": Option(
        "Mapping[str, Any] | Sequence[Any] | str | None",
        None,
        "Colors in place of ours: a dict from names to colors, a list, or the name of one of"
        " matplotlib's colormaps.",
    ),
    "order": Option(
        "Sequence[str]",
        (),
        "Names of rows, series or panels that come first, in this order.",
    ),
    "labels": Option(
        "Mapping[str, str] | None",
        None,
        "Other words for names of criteria, columns or splits.",
    ),
    "caption": Option(
        "bool",
        True,
        "Whether counts and intervals are written below the figure; they also are its attribute"
        " `caption`.",
    ),
    "legend": Option(
        "bool | str",
        True,
        "Whether there is a legend, above the panels; or a place inside the first panel, as"
        " matplotlib's `loc` names it.",
    ),
}
SETTLED = ("ax", "axes", "palette", "order", "labels", "caption", "legend")
"""Options that are settled here: the function that draws never sees them."""
LISTED = frozenset({"criteria", "color", "outcomes"})
"""Arguments of several names, for which one name may stand."""
RETURNED = "The figure, which shows itself in a notebook."


def on_page(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Any]:
    """Draw in the look that applies, onto a figure of its own or onto the user's axes, and settle
    the layout.

    The decorated function takes `**page: Unpack[Page]` or `**page: Unpack[Intervals]` and receives
    `width`, `dark` and `level`; the other options are settled here, through the parts of `canvas`
    and `palette` that it draws with. Its signature and its docstring show all of them one by one,
    so that help() and completion in a notebook know them. What is returned is the figure, or the
    axes that the user brought: one for `ax`, an array for `axes`.
    """
    signature = _spelled_out(draw)

    @functools.wraps(draw)
    def drawn(*tables: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*map(finished, tables), **options)
        except TypeError as error:
            raise TypeError(f"{draw.__name__}(): {error}") from None
        for name in LISTED & bound.arguments.keys():
            bound.arguments[name] = several(bound.arguments[name])
        bound.apply_defaults()
        asked = {name: bound.arguments.pop(name) for name in SETTLED}
        sheet, brought = _sheet(draw.__name__, asked), asked["ax"] is not None
        with _in_force(sheet, bound.arguments, asked["labels"]):
            if sheet.axes is not None:
                bound.arguments["width"] = width_of(sheet.axes)
            figure = draw(*bound.args, **bound.kwargs)
            _check_order(draw.__name__, sheet)
            if sheet.axes is None:
                figure.get_layout_engine().execute(figure)
                return figure
        return asked["ax"] if brought and isinstance(asked["ax"], Axes) else sheet.axes

    drawn.__signature__ = signature
    drawn.__doc__ = _documented(
        draw.__doc__, [name for name in OPTIONS if name in signature.parameters]
    )
    return drawn


def _sheet(what: str, asked: Mapping[str, Any]) -> Sheet:
    """The options as the parts of a figure look them up; refuses what cannot be meant."""
    if asked["ax"] is not None and asked["axes"] is not None:
        raise DiagnosticsError(f"{what} takes ax= or axes=, not both.")
    brought = asked["ax"] if asked["ax"] is not None else asked["axes"]
    axes = None if brought is None else np.array(brought, dtype=object, ndmin=1)
    if axes is not None and not (axes.size and all(isinstance(ax, Axes) for ax in axes.flat)):
        raise DiagnosticsError(
            f"{what} takes axes of matplotlib as ax= or axes=; got {type(brought).__name__}. Make"
            " some with plt.subplots(1, 2)[1]."
        )
    check_palette(asked["palette"])
    order = asked["order"]
    order = (order,) if isinstance(order, str) else tuple(order or ())
    return Sheet(axes, asked["caption"], asked["legend"], asked["palette"], order)


def _in_force(sheet: Sheet, page: Mapping[str, Any], labels: Mapping[str, str] | None) -> ExitStack:
    """The contexts in which a figure is drawn: the look, the sheet, and other words for names."""
    stack = ExitStack()
    if sheet.axes is None:
        rc = look.beneath(page["width"], page["dark"])
    else:
        face = matplotlib.colors.to_hex(sheet.axes.flat[0].get_facecolor())
        own = look.colors(dark=True) if page["dark"] else {}
        rc = {**own, "axes.facecolor": face, "text.parse_math": False}
    stack.enter_context(matplotlib.rc_context(rc))
    stack.enter_context(drawing_on(sheet))
    if labels is not None:
        token = naming.LABELS.set(labels)
        stack.callback(naming.LABELS.reset, token)
    return stack


def _check_order(what: str, sheet: Sheet) -> None:
    """Refuse an order that names what the figure does not have."""
    for name in sheet.order:
        if name not in sheet.met:
            near = difflib.get_close_matches(name, sorted(sheet.met), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DiagnosticsError(
                f"{what} got order={list(sheet.order)}, but draws nothing of the name"
                f" {name!r}.{hint} It has: {', '.join(sorted(sheet.met))}."
            )


def _spelled_out(draw: Callable[..., Figure]) -> inspect.Signature:
    """The function's signature with the single options in place of `**page`."""
    signature = inspect.signature(draw)
    (options,) = get_args(get_type_hints(draw)["page"])
    single = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=option.annotation,
        )
        for name, option in OPTIONS.items()
        if name in options.__annotations__ or name in Page.__annotations__
    ]
    own = [each for name, each in signature.parameters.items() if name != "page"]
    return signature.replace(parameters=[*own, *single])


def _documented(text: str | None, names: list[str]) -> str | None:
    """The docstring with an entry for each of the options in place of that of `**page`, and with
    what is returned for axes of the user's.
    """
    entries = [
        textwrap.fill(
            f"{name}: {OPTIONS[name].text}", 100, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        for name in names
    ]
    returned = RETURNED[:-1] + "; with `ax`\n        those axes, with `axes` their array."
    return text and re.sub(
        r"^ *\*\*page: .*$", lambda _: "\n".join(entries), text, flags=re.MULTILINE
    ).replace(RETURNED, returned)
