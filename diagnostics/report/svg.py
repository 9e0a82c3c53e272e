"""A figure as an image and as an SVG element of a page."""

from __future__ import annotations

import io
import re

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from diagnostics.report import style


def figure_files(name: str, figure: Figure) -> dict[str, bytes]:
    """The figure as PNG (200 dpi) and PDF, without dates, so that equal tables give equal files."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None}
    )
    return {f"{name}.pdf": buffer.getvalue(), f"{name}.png": png(figure)}


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG of 256 colours: a third of the size of a full one, and no difference to
    see.
    """
    before, buffer = figure.dpi, io.BytesIO()
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    figure.set_dpi(before)
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", dpi=(dpi, dpi))
    return buffer.getvalue()


def _is_mesh(artist) -> bool:
    return isinstance(artist, QuadMesh) or (
        isinstance(artist, PolyCollection) and len(artist.get_offsets()) > 50
    )


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element: own ids, page colours as variables, meshes of many cells as a
    bitmap.

    Text stays text, to be searched and read aloud; the page names its fonts.
    """
    for mesh in figure.findobj(_is_mesh):
        mesh.set_rasterized(True)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(
            buffer,
            format="svg",
            dpi=160,
            transparent=True,
            metadata={"Date": None, "Creator": None},
        )
    text = buffer.getvalue()
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
