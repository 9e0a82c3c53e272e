"""Colors and markers by name: one look per criterion in every figure, or your palette.

A criterion of the library has a place of its own in `KNOWN` and so always the same color, marker
and dash. One of yours gets its place from its name, whatever stands beside it, and moves on only
where it would look like another that is drawn.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import (
    Colormap,
    LinearSegmentedColormap,
    ListedColormap,
    is_color_like,
    to_hex,
    to_rgb,
)

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report.canvas import sheet
from diagnostics.report.look import (
    BLUE,
    COLORS,
    CYCLE,
    GREEN,
    ORANGE,
    changed,
    ink,
    quiet,
)
from diagnostics.report.naming import labelled, readable

MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">")
DASHES = (
    "-",
    (0, (4, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.2, 1, 1.2)),
    (0, (7, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
SPLITS = {
    "step": (ORANGE, "s", "step contexts"),
    "held_out": (BLUE, "o", "held-out contexts"),
    "all": (GREEN, "^", "all contexts"),
}
"""Color, marker and name of each split."""
CRITERIA = ("divergence", "teachability", "tip", "entropy", "compatibility", "incompatible")
"""The usual six, which have the palette's first six colors."""
KNOWN = (
    *CRITERIA,
    "advantage_abs",
    "margin",
    "reverse_divergence",
    "hellinger",
    "fire",
    "jsd",
    "acceptance",
    "advantage",
    "early",
    "late",
    "iw_prefix",
    "position_weight",
    "projected_gradient",
    "q3_teachability",
    "selectkd",
    "surprise",
    "teachability_entropy",
    "teachability_full",
    "teachability_released",
    "teacher_confidence",
    "tip_paper",
    "q3",
    "q3_teachability_low",
    "split_budget",
    "q3_compatibility_low",
    "q3_incompatible",
    "q3_compatibility",
    "dial",
    "power",
    "gradient_size",
    "sure",
    "tails",
    "ier",
    "ier_full",
    "teacher_top1_gap",
    "bellman",
)
"""The library's criteria in the order of their looks; a new one comes last, so none changes."""
RIVALS = {"random_divergent": "+", "position_matched": "1", "token_identity": "2"}
"""Markers of the fair rivals of a criterion, which are grey as random is."""
GREY = ("random", "full", *RIVALS)
"""What criteria are compared with."""
OWN_PLACES = len(COLORS) * len(MARKERS)
"""Number of looks that differ in color or marker."""


# --- palettes ---


def cycle() -> list[str]:
    """The colors of series in their order: of the palette that was asked for, of your rcParams
    where you changed them, otherwise ours.
    """
    asked = sheet().palette
    if asked is not None and not isinstance(asked, Mapping):
        return _listed(asked)
    colors = matplotlib.rcParams["axes.prop_cycle"].by_key().get("color", [])
    ours = not changed("axes.prop_cycle") or [to_hex(color) for color in colors] == [
        color.lower() for color in CYCLE
    ]
    return list(COLORS) if ours or not colors else [to_hex(color) for color in colors]


def _listed(palette: Any) -> list[str]:
    """The colors of a palette that is a list, or the name of one of matplotlib's colormaps."""
    if not isinstance(palette, str):
        return [to_hex(color) for color in palette]
    colormap = _colormap(palette)
    if isinstance(colormap, ListedColormap) and colormap.N <= 20:
        return [to_hex(color) for color in colormap(np.arange(colormap.N))]
    return [to_hex(color) for color in colormap(np.linspace(0.08, 0.92, len(CYCLE)))]


def _colormap(name: str) -> Colormap:
    if name in matplotlib.colormaps:
        return matplotlib.colormaps[name]
    near = difflib.get_close_matches(name, list(matplotlib.colormaps), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise DiagnosticsError(
        f"palette={name!r} is no colormap of matplotlib.{hint} Pass the name of one, a list of"
        " colors, or a dict from names to colors."
    )


def check_palette(palette: Any) -> None:
    """Refuse a palette in which something is no color.

    Raises:
        DiagnosticsError: A color is unknown, or the palette has none.
    """
    if palette is None or isinstance(palette, str):
        _ = None if palette is None else _colormap(palette)
        return
    colors = list(palette.values() if isinstance(palette, Mapping) else palette)
    wrong = [color for color in colors if not is_color_like(color)]
    if wrong or not colors:
        raise DiagnosticsError(
            f"palette holds {wrong[0]!r}, which is no color." if wrong else "palette has no color."
        )


def tone(color: str) -> str:
    """One of the six colors, in the palette that is in force."""
    return cycle()[CYCLE.index(color) % len(cycle())] if color in CYCLE else color


def color_of(name: str, otherwise: str) -> str:
    """The color that a palette gives a name; `otherwise` where it has none for it."""
    asked = sheet().palette
    return to_hex(asked[name]) if isinstance(asked, Mapping) and name in asked else otherwise


def sequential() -> Colormap:
    """A scale from low to high whose ends can be seen on paper and on a dark page."""
    asked = sheet().palette
    if isinstance(asked, str):
        return _colormap(asked)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.97, 64))
    return LinearSegmentedColormap.from_list("seen", colors)


def diverging() -> Colormap:
    """Orange, grey, blue: the middle can be seen on paper and on a dark page."""
    colors = ["#8A3B00", ORANGE, "#B9BFC6", BLUE, "#003E66"]
    return LinearSegmentedColormap.from_list("diverging", colors)


def on(color: Any) -> str:
    """Black or nearly white, whichever is read better on a color.

    Neither is a color of the page, which a report exchanges for its dark theme's.
    """
    red, green, blue = to_rgb(color)
    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return "#000000" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.18 else "#FDFDFD"


# --- looks by name ---


def look(place: int) -> dict[str, Any]:
    """Color, marker and dash of the look at a place; places below the number of colors times
    markers all differ in one of the two.
    """
    return _look(place, cycle())


def _look(place: int, colors: Sequence[str]) -> dict[str, Any]:
    turn = place // len(colors)
    return {
        "color": colors[place % len(colors)],
        "marker": MARKERS[(place % len(colors) + turn) % len(MARKERS)],
        "linestyle": DASHES[(place + place // OWN_PLACES) % len(DASHES)],
    }


def criterion_style(name: str, names: Iterable[str]) -> dict[str, Any]:
    """Color, marker and line of a criterion.

    Args:
        name: The criterion.
        names: All criteria that the figure draws. Only the look of one that the library does not
            know can depend on them, and only where it would be that of another.

    Returns:
        Options of a line: color, marker, markersize and linestyle.
    """
    if name in RIVALS:
        grey = {"color": quiet(), "marker": RIVALS[name], "markersize": 5.5, "linestyle": DASHES[2]}
        return grey | {"color": color_of(name, quiet())}
    if name in ("random", "full"):
        return {
            "color": color_of(name, quiet() if name == "random" else ink()),
            "marker": "x" if name == "random" else "None",
            "markersize": 3.5,
            "linestyle": "-",
        }
    drawn = [other for other in dict.fromkeys([*names, name]) if other not in GREY]
    listed = sheet().palette is not None and not isinstance(sheet().palette, Mapping)
    place = drawn.index(name) if listed else _places(tuple(drawn), tuple(cycle()))[name]
    shown = look(place) | {"markersize": 3.2}
    return shown | {"color": color_of(name, shown["color"])}


@functools.lru_cache(maxsize=64)
def _places(names: tuple[str, ...], colors: tuple[str, ...]) -> dict[str, int]:
    """The place of every criterion: fixed for those of the library, from the name for others.

    It is kept, since a figure asks for it once per criterion.
    """
    places = {name: KNOWN.index(name) for name in names if name in KNOWN}
    seen = [_visible(place, colors) for place in range(3 * OWN_PLACES)]
    taken = [_visible(place, colors) for place in places.values()]
    for name in sorted(set(names) - set(KNOWN)):
        places[name] = _free(name, taken, seen)
        taken.append(seen[places[name]])
    return places


def _free(name: str, taken: list[tuple], seen: list[tuple]) -> int:
    """The place that a name asks for, or the next with a color and a marker of its own while there
    are any, then with one of the two, then with a look of its own.
    """
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % OWN_PLACES
    colors, marks = {color for color, *_ in taken}, {marker for _, marker, _ in taken}
    tries = [(start + step) % OWN_PLACES for step in range(OWN_PLACES)]

    def fresh(place: int) -> tuple[bool, bool]:
        color, marker, _ = seen[place]
        return color not in colors, marker not in marks

    best = max(map(fresh, tries))
    if any(best):
        return next(place for place in tries if fresh(place) == best)
    free = (place for place in (*tries, *range(OWN_PLACES, 3 * OWN_PLACES)))
    return next((place for place in free if seen[place] not in taken), start)


def _visible(place: int, colors: Sequence[str]) -> tuple:
    """What tells a look from another: color and marker, beyond them also the dash."""
    shown = _look(place, colors)
    dash = shown["linestyle"] if place >= OWN_PLACES else None
    return shown["color"], shown["marker"], dash


def split_style(split: str, index: int = 0) -> tuple[str, str, str]:
    """Color, marker and name of a split."""
    at = (index + 2) % len(CYCLE)
    color, marker, words = SPLITS.get(split, (CYCLE[at], MARKERS[at], readable(split)))
    return color_of(split, tone(color)), marker, labelled(split, words)


def series_style(name: str, index: int) -> dict[str, str]:
    """Color and marker of a series by its number, or the color that the palette gives its name."""
    shown = look(index)
    return {"color": color_of(name, shown["color"]), "marker": shown["marker"]}
