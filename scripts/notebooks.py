"""Execute the notebooks and write them, with their outputs, as pages of the documentation.

    python scripts/notebooks.py            # all of notebooks/*.ipynb into docs/notebooks/
    python scripts/notebooks.py 00 04      # those whose names begin so

The pages and their images are no part of the repository: they are made from the notebooks, which
store no outputs, whenever the site is built. Needs the extra `notebook`.
"""

from __future__ import annotations

import base64
import html
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PAGES = ROOT / "docs" / "notebooks"
SECONDS = 1200
"""Longest time for one cell."""
WIDGET = "application/vnd.jupyter.widget-view+json"
"""A bar that showed progress while its cell ran; its text is what it began with."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def executed(path: Path):
    """A notebook with the outputs of its cells, run in its own folder."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, resources={"metadata": {"path": str(path.parent)}}
    )
    return client.execute()


def page(notebook, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its images by file name.

    Args:
        notebook: The notebook, with or without outputs.
        name: The page's name, with which the names of its images begin.

    Returns:
        The text, and the images' bytes.
    """
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", ()):
            parts += _shown(output, name, images)
    return "\n\n".join(parts) + "\n", images


def _shown(output, name: str, images: dict[str, bytes]) -> Iterator[str]:
    """An output as Markdown; its image is added to the others."""
    if output.output_type == "stream":
        if output.name == "stdout":
            yield _plain(output.text)
        return
    data = output.get("data", {})
    if WIDGET in data:
        return
    if "image/png" in data:
        file = f"{name}_{len(images)}.png"
        images[file] = base64.b64decode(data["image/png"])
        yield f"![{name}, figure {len(images)}]({file})"
    elif "text/html" in data:
        yield f'<div class="output">{_without_blank_lines(data["text/html"])}</div>'
    elif "text/plain" in data:
        yield _plain(data["text/plain"])


def _plain(text: str) -> str:
    return f'<pre class="output">{html.escape(ANSI.sub("", text).rstrip())}</pre>'


def _without_blank_lines(text: str) -> str:
    """HTML that Markdown leaves alone: a blank line would end it."""
    return re.sub(r"\n\s*\n", "\n", text.strip())


def main(begins: list[str]) -> int:
    """Write a page for each notebook whose name begins with one of the words; all without any."""
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    PAGES.mkdir(parents=True, exist_ok=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if begins and not path.name.startswith(tuple(begins)):
            continue
        text, images = page(executed(path), path.stem)
        for file, content in images.items():
            (PAGES / file).write_bytes(content)
        (PAGES / f"{path.stem}.md").write_text(text, encoding="utf-8")
        print(f"{path.stem}: {len(images)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
