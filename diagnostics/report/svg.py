"""A figure as an image and as an SVG element of a page."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_mixed import MixedModeRenderer
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from diagnostics.report import style
from diagnostics.report.canvas import NotebookFigure
from diagnostics.report.measured_once import MeasuredOnce

DPI = 300
"""Dots per inch of an image file."""


def pdf(figure: Figure) -> bytes:
    """The figure as PDF, without dates, so that equal tables give equal files."""
    buffer = io.BytesIO()
    nothing = {"CreationDate": None, "Producer": None, "Creator": None}
    figure.savefig(buffer, format="pdf", metadata=nothing)
    return buffer.getvalue()


def png(figure: NotebookFigure, dpi: int = DPI) -> bytes:
    """The figure as a PNG of 256 colors, a third of the size without a visible difference."""
    before, buffer = figure.dpi, io.BytesIO()
    figure.set_dpi(dpi)
    with figure.laid_out():
        figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    figure.set_dpi(before)
    few = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette, page = few.getpalette() or [], few.getpixel((0, 0))
    palette[3 * page : 3 * page + 3] = image.getpixel((0, 0))  # the paper exactly
    few.putpalette(palette)
    few.save(buffer, format="png", dpi=(dpi, dpi))
    return buffer.getvalue()


def _is_mesh(artist) -> bool:
    return isinstance(artist, QuadMesh) or (
        isinstance(artist, PolyCollection) and len(artist.get_offsets()) > 50
    )


class _Renderer(MeasuredOnce, RendererSVG):
    """Matplotlib's SVG renderer that measures each text once."""


def _drawn(figure: NotebookFigure) -> str:
    """The figure as matplotlib's SVG, without the paper behind it; meshes at 160 dots per inch."""
    buffer, before, dpi = io.StringIO(), figure.dpi, 160
    with figure.laid_out(), _transparent(figure):
        figure.set_dpi(72)
        width, height = figure.bbox.size
        vector = _Renderer(
            width, height, buffer, image_dpi=dpi, metadata={"Date": None, "Creator": None}
        )
        renderer = MixedModeRenderer(figure, *figure.get_size_inches(), dpi, vector)
        figure.draw(renderer)
        renderer.finalize()
        figure.set_dpi(before)
    return buffer.getvalue()


@contextlib.contextmanager
def _transparent(figure: Figure) -> Iterator[None]:
    """A context in which the figure and its axes have no background."""
    patches = [figure.patch, *(ax.patch for ax in figure.findobj(Axes))]
    before = [patch.get_facecolor() for patch in patches]
    for patch in patches:
        patch.set_facecolor("none")
    try:
        yield
    finally:
        for patch, color in zip(patches, before, strict=True):
            patch.set_facecolor(color)


def inline_svg(figure: NotebookFigure, name: str) -> str:
    """The figure as an SVG element that can stand inside a page.

    Args:
        figure: The figure, drawn for a light page.
        name: A name that no other figure of the page has; it begins every id of the drawing, since
            ids must be unique within a page.

    Returns:
        The element. Page colors are CSS variables, and meshes of many cells are a bitmap, which is
        smaller. Text stays text, so that it can be searched and read aloud.
    """
    for mesh in figure.findobj(_is_mesh):
        mesh.set_rasterized(True)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        text = _drawn(figure)
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(
        r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in used else "", text
    )
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r"\n\s*", "\n", text).replace("<g/>\n", "")
    text = re.sub(r"font-family: 'DejaVu Sans'; | transform=\"rotate\(-0 [^\"]*\"", "", text)
    text = re.sub(r"(?<![\d.#])([1-9]\d*\.\d{2})\d+", r"\1", text)
    for variable, color in style.LIGHT.items():
        text = text.replace(color.lower(), f"var(--{variable})")
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" role="img" aria-hidden="true">',
        text,
        count=1,
    )
