"""Options that every figure takes, with their defaults and their documentation written once."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypedDict, get_args, get_type_hints

import matplotlib
from matplotlib.figure import Figure

from diagnostics.report.style import DOUBLE, SINGLE, settings

Arguments = ParamSpec("Arguments")


class Page(TypedDict, total=False):
    """Options of a figure: the page that it is drawn for."""

    width: float
    dark: bool


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
        " side.",
    ),
    "dark": Option("bool", False, "Whether the figure is meant for a dark page."),
}


def on_page(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw in the one style, and settle the layout.

    The decorated function takes `**page: Unpack[Page]` or `**page: Unpack[Intervals]` and always
    receives each of those options. Its signature and its docstring show them one by one, so that
    help() and completion in a notebook know them.
    """
    signature = _spelled_out(draw)

    @functools.wraps(draw)
    def drawn(*tables: Any, **options: Any) -> Figure:
        try:
            bound = signature.bind(*tables, **options)
        except TypeError as error:
            raise TypeError(f"{draw.__name__}(): {error}") from None
        bound.apply_defaults()
        page = bound.arguments
        with matplotlib.rc_context(settings(page["width"], page["dark"])):
            figure = draw(*bound.args, **bound.kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine(None)  # a later save then draws once, not twice
        return figure

    drawn.__signature__ = signature
    drawn.__doc__ = _documented(
        draw.__doc__, [name for name in OPTIONS if name in signature.parameters]
    )
    return drawn


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
        if name in options.__annotations__
    ]
    own = [each for name, each in signature.parameters.items() if name != "page"]
    return signature.replace(parameters=[*own, *single])


def _documented(text: str | None, names: list[str]) -> str | None:
    """The docstring with an entry for each of the options in place of that of `**page`."""
    entries = [
        textwrap.fill(
            f"{name}: {OPTIONS[name].text}", 100, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        for name in names
    ]
    return text and re.sub(
        r"^ *\*\*page: .*$", lambda _: "\n".join(entries), text, flags=re.MULTILINE
    )
