"""Pages in outline, for tests of what stands around the figures.

Every figure is still made from its table by the function that draws it, so that a table which it
cannot take fails; but it is neither laid out nor turned into an image, which takes most of the time
of a page. `tests/report` draws whole pages, and `tests/pipeline/test_stages.py` that of a run.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from PIL import Image

from diagnostics.pipeline import ahead
from diagnostics.report import canvas, drawing, paper_page, svg

Places = Mapping[tuple[Any, str], Any]
"""What stands at a name of a module or class."""


def _dot() -> bytes:
    """A PNG of one white dot."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(buffer, format="png")
    return buffer.getvalue()


PNG, PDF, SVG = _dot(), b"%PDF-1.4\n%%EOF\n", "<svg></svg>"


def _element(figure, name: str) -> str:
    return f'<svg viewBox="0 0 1 1" role="img" aria-hidden="true" class="{name}"></svg>'


def _of_report(run, spec, pdf: bool) -> drawing.Drawing | str:
    """What `drawing._drawn` returns, from one figure in place of two."""
    try:
        figure = drawing.figure_of(run, spec.name)
    except drawing.DiagnosticsError as error:
        return str(error)
    wide, narrow = (_element(figure, f"{spec.name}-{size}") for size in ("wide", "narrow"))
    return drawing.Drawing(wide, narrow, PNG, PDF if pdf else None)


def _of_paper(name: str, figure) -> dict[str, bytes]:
    return {f"{name}.png": PNG, f"{name}.pdf": PDF, f"{name}.svg": SVG.encode()}


OUTLINES: Places = {
    (canvas.Settled, "execute"): lambda self, figure: None,
    (drawing, "_drawn"): _of_report,
    (paper_page, "_files"): _of_paper,
    (paper_page, "inline_svg"): _element,
    (svg, "inline_svg"): _element,
    (svg, "png"): lambda figure, dpi=0: PNG,
}
WHOLE: Places = {(owner, name): getattr(owner, name) for owner, name in OUTLINES}
"""The same names as the program has them."""
ALONE: Places = {(ahead, "cores"): lambda: 1}
"""A run starts no second process, which takes longer to start than it helps in a test."""


@contextmanager
def instead(places: Places) -> Iterator[None]:
    """Put other things at names while the block runs."""
    before = {(owner, name): getattr(owner, name) for owner, name in places}
    for (owner, name), thing in places.items():
        setattr(owner, name, thing)
    try:
        yield
    finally:
        for (owner, name), thing in before.items():
            setattr(owner, name, thing)
