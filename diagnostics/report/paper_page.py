"""The paper, one to one: the final tables of a run in, paper.html and its figures out.

The page is laid out as the paper is: its artefacts by number, each as the released scripts compute
it and controlled, with the reason why the two differ and, where the setting is comparable, what the
paper prints. It is made from files alone and is as self-contained as report.html, whose machinery
it uses.
"""

from __future__ import annotations

import html
import inspect
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.analysis.paper.printed import PRINTED
from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import summary
from diagnostics.report.figures.paper import FIGURES, paper, plain
from diagnostics.report.page import Drawn, shell
from diagnostics.report.page_tables import table_block
from diagnostics.report.provenance import provenance
from diagnostics.report.run_results import RunResults, read_tables
from diagnostics.report.style import DOUBLE, SINGLE
from diagnostics.report.svg import figure_files, inline_svg
from diagnostics.report.written_pages import encoded, write_pages

PREFIX = "paper_"
"""What the names of the paper's tables, and of its figures' files, begin with."""
DIFFERENCES = "paper_differences"
"""The table of one row per artefact, with the page's sentences."""
FIRST_SCREEN = 120
"""Words of the title and the lead together, at most: what a reader sees before scrolling."""


class Artefact(NamedTuple):
    """A numbered figure or table of the paper."""

    kind: str
    """`Figure` or `Table`."""
    number: str

    @property
    def name(self) -> str:
        """As the paper writes it: `Figure 3C`."""
        return f"{self.kind} {self.number}"

    @property
    def table(self) -> str:
        """The name of its final table: `paper_figure_3c`."""
        return f"{PREFIX}{self.kind}_{self.number}".lower()


def _artefacts(*names: str) -> tuple[Artefact, ...]:
    return tuple(Artefact(*name.split()) for name in names)


SECTIONS = {
    "Figure 2: where gains and signals lie": _artefacts("Figure 2A", "Figure 2B", "Figure 2C"),
    "Figure 3: which part carries the gain": _artefacts(
        "Figure 3A", "Table 9", "Figure 3B", "Table 7", "Figure 3C", "Table 1"
    ),
    "Figure 4: which positions to select": _artefacts(
        "Figure 4A", "Figure 4B", "Table 8", "Figure 4C", "Table 6", "Figure 4D"
    ),
    "Figure 5: how robust it is": _artefacts("Figure 5A", "Figure 5B", "Figure 5C"),
    "Trainings on masks": _artefacts("Table 2", "Table 10"),
    "Data": _artefacts("Table 5"),
}
"""The artefacts of the page, in its order; a figure stands beside the table of its numbers."""
LEADING = ("Table 1", "Table 8", "Table 2", "Table 9", "Table 7", "Table 6")
"""Artefacts whose sentences may stand on the first screen, the most telling first."""


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
    directory = Path(directory)
    run = read_tables(
        directory,
        begins=PREFIX,
        remedy=f"Run `python -m diagnostics paper --output-dir {directory}` first.",
    )
    drawn, left_out = draw_all(run)
    pages = {
        f"figures/{file}": content
        for number, figure in drawn.items()
        for file, content in _files(f"{PREFIX}{number.lower()}", figure.wide).items()
    }
    pages["paper.html"] = encoded(page(run, drawn, left_out))
    write_pages(directory, pages)
    return directory / "paper.html"


def draw_all(run: RunResults) -> tuple[dict[str, Drawn], dict[str, str]]:
    """Draw every figure of the paper that the tables allow, at both widths.

    Args:
        run: The run's manifest and the paper's tables.

    Returns:
        The figures by the paper's number, and for each that could not be drawn the reason.
    """
    drawn, left_out = {}, {}
    for number, draw in FIGURES.items():
        level = {"level": run.level} if "level" in inspect.signature(draw).parameters else {}
        try:
            drawn[number] = Drawn(
                *(paper(number, run.tables, width=width, **level) for width in (DOUBLE, SINGLE))
            )
        except DiagnosticsError as error:
            left_out[number] = str(error)
    return drawn, left_out


def _files(name: str, figure: Figure) -> dict[str, bytes]:
    """The figure as PNG, PDF and SVG, without dates, so that equal tables give equal files."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return figure_files(name, figure) | {f"{name}.svg": buffer.getvalue()}


def page(run: RunResults, drawn: Mapping[str, Drawn], left_out: Mapping[str, str]) -> str:
    """The whole page as one string of HTML."""
    lead = "".join(
        f"<p><b>{html.escape(head)}</b> {html.escape(text)}</p>"
        for head, text in first_screen(run).items()
    )
    sections = [
        (
            re.sub(r"\W+", "-", title.split(":")[0].lower()),
            title,
            "".join(_artefact(run, artefact, drawn, left_out) for artefact in artefacts),
        )
        for title, artefacts in SECTIONS.items()
    ]
    rest = _rest(run)
    sections += [
        ("differences", "All differences in one table", rest),
        ("provenance", "Provenance", provenance(run)),
    ]
    notes = "".join(f'<p class="warning">{html.escape(note)}</p>' for note in run.reading_notes)
    return shell(title(run), OVER, lead + notes, sections)


OVER = (
    '<p class="over">arXiv 2605.26844, section 3, on this pair: as its released scripts compute it,'
    " and controlled</p>"
)


def title(run: RunResults) -> str:
    """The page's heading, which names the pair."""
    names = summary.models(run)
    if names.get("pair") not in (None, "custom"):
        return f"The paper, one to one: the {names['pair']} pair"
    if {"student", "teacher"} <= set(names):
        return f"The paper, one to one: {names['teacher']} → {names['student']}"
    return "The paper, one to one"


# --- the first screen


def first_screen(run: RunResults) -> dict[str, str]:
    """What stands before everything else: pair, what holds as released, what a control changes.

    Args:
        run: The manifest and the paper's tables.

    Returns:
        Sentences by their heading. Title and sentences have at most `FIRST_SCREEN` words: sentences
        of an artefact are taken whole, by `LEADING`, as long as there is room.
    """
    told = {"The pair.": _pair(run)}
    rows = _leading(run)
    for count in range(len(rows), 0, -1):
        screen = told | {
            "As released.": _joined(row["released"] for row in rows[:count]),
            "Controlled.": _joined(row["controlled"] for row in rows[:count]),
            "Why.": _joined(row["why"] for row in rows[:count]),
        }
        screen = {head: text for head, text in screen.items() if text}
        if words(title(run), *screen, *screen.values()) <= FIRST_SCREEN:
            return screen
    return told


def words(*texts: str) -> int:
    """How many words texts have together."""
    return sum(len(text.split()) for text in texts)


def _joined(sentences: Iterable[object]) -> str:
    """Sentences one after another, each once; undefined ones are left out."""
    known = [str(text).strip() for text in sentences if isinstance(text, str) and text.strip()]
    return " ".join(dict.fromkeys(known))


def _leading(run: RunResults) -> list[dict]:
    """The rows of `paper_differences` that may stand on the first screen, the first one first."""
    table = run.table(DIFFERENCES)
    if table is None:
        return []
    rows = {plain(row["artefact"]): row for row in table.to_dict("records")}
    wanted = [plain(name) for name in LEADING]
    return [rows[name] for name in wanted if name in rows]


def _pair(run: RunResults) -> str:
    """Student, teacher and checkpoint in a sentence, as far as the manifest has them."""
    names = summary.models(run)
    parts = [f"{role} {names[role]}" for role in ("student", "teacher") if role in names]
    text = f"{', '.join(parts)}; " if parts else ""
    found = checkpoint(run)
    text += f"checkpoint {found}." if found else "the checkpoint is in no record of the manifest."
    return text[:1].upper() + text[1:]


def checkpoint(run: RunResults) -> str:
    """The trained student in a few words; empty where the manifest does not record it.

    It is a training of the run itself, or the last two parts of the folder, or the id, of the
    student that was measured.
    """
    own = run.stage("paper").get("checkpoint")
    if isinstance(own, Mapping) and {"criterion", "budget", "seed"} <= set(own):
        return f"after training on {own['criterion']} at {own['budget']:.0%}, seed {own['seed']}"
    named = run.stage("after").get("after")
    return "/".join(PurePath(named).parts[-2:]) if isinstance(named, str) else ""


# --- artefacts


def _artefact(
    run: RunResults, artefact: Artefact, drawn: Mapping[str, Drawn], left_out: Mapping[str, str]
) -> str:
    """One artefact: heading, figure, both sides in a sentence, why, what is printed, its table."""
    said = _said(run, artefact)
    table = run.table(artefact.table)
    missing = _missing(artefact, table, left_out)
    figure = drawn.get(artefact.number) if artefact.kind == "Figure" else None
    parts = [
        f"<h3>{html.escape(_heading(artefact, said))}</h3>",
        _drawing(artefact, figure) if figure else "",
        _sides(said),
        _sentence(said, "why", "Why they differ."),
        _sentence(said, "printed", "Printed in the paper:"),
        f'<p class="quiet">Not here: {html.escape(missing)}</p>' if missing else "",
        table_block(artefact.table, table) if table is not None else "",
    ]
    return f'<section id="{artefact.table}">{"".join(parts)}</section>'


def _said(run: RunResults, artefact: Artefact) -> dict:
    """The row of `paper_differences` of an artefact; empty where it has none."""
    table = run.table(DIFFERENCES)
    rows = [] if table is None else table.to_dict("records")
    wanted = plain(artefact.name)
    return next((row for row in rows if plain(row["artefact"]) == wanted), {})


def _heading(artefact: Artefact, said: Mapping) -> str:
    own = said.get("title")
    title = own if isinstance(own, str) and own else PRINTED[artefact.name].title
    return f"{artefact.name}. {title}"


def _drawing(artefact: Artefact, drawn: Drawn) -> str:
    name = f"{PREFIX}{artefact.number.lower()}"
    wide, narrow = (
        inline_svg(figure, f"{name}-{size}")
        for figure, size in zip(drawn, ("wide", "narrow"), strict=True)
    )
    return (
        f'<figure id="figure-{name}"><div class="wide">{wide}</div><div class="narrow">{narrow}'
        f"</div><figcaption><code>figures/{name}.pdf</code></figcaption></figure>"
    )


SIDES = {"released": "As released", "controlled": "Controlled"}


def _sides(said: Mapping) -> str:
    """What both sides say, beside one another."""
    sides = "".join(
        f'<div><p class="side">{head}</p><p>{html.escape(said[name])}</p></div>'
        for name, head in SIDES.items()
        if isinstance(said.get(name), str) and said[name]
    )
    return (
        f'<ul class="cards"><li class="card wide-card"><div class="sides">{sides}</div></li></ul>'
        if sides
        else ""
    )


def _sentence(said: Mapping, name: str, head: str) -> str:
    text = said.get(name)
    if not isinstance(text, str) or not text:
        return ""
    return f"<p><b>{head}</b> {html.escape(text)}</p>"


def _missing(artefact: Artefact, table: pd.DataFrame | None, left_out: Mapping[str, str]) -> str:
    """Why an artefact has no figure or no table; empty where it is whole."""
    if artefact.kind == "Figure":
        return left_out.get(artefact.number, "")
    if table is not None:
        return ""
    trained = artefact.number in ("2", "7", "10")
    return f"no table {artefact.table}." + (
        " It rests on trainings: `opd-diagnostics paper --train`." if trained else ""
    )


def _rest(run: RunResults) -> str:
    """`paper_differences` and every table that no artefact above shows, folded."""
    above = {artefact.table for artefacts in SECTIONS.values() for artefact in artefacts}
    names = [name for name in run.tables if name not in above and run.table(name) is not None]
    return "".join(table_block(name, run.tables[name]) for name in names)
