"""The paper, one to one: the final tables of a run in, paper.html and its figures out.

The page is laid out as the paper is: its artefacts by number, each as the released scripts compute
it and controlled, with the reason why the two differ and, where the setting is comparable, what the
paper prints. It is made from files alone and is as self-contained as report.html, whose machinery
it uses.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diagnostics.analysis.paper.printed import PRINTED
from diagnostics.analysis.paper.sentences import (
    DESCRIBED,
    excludes_zero,
    masks_disagree,
    turns,
    units,
    with_interval,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import summary
from diagnostics.report.figures.paper import FIGURES, INCOMPATIBLE, LEARN, paper, plain
from diagnostics.report.naming import readable
from diagnostics.report.page import shell, with_code
from diagnostics.report.page_tables import table_block
from diagnostics.report.provenance import provenance
from diagnostics.report.run_results import RunResults, read_tables
from diagnostics.report.style import DOUBLE, SINGLE
from diagnostics.report.svg import inline_svg, png
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
COMPARED = _artefacts("Table 1", "Table 2", *(f"Table {number}" for number in range(6, 11)))
"""Tables whose numbers have both sides; the figures show the same ones."""
MAIN_K = 16
"""The size of the support that the first screen is about: the paper's."""
MAIN_BUDGET = 0.05
"""The budget that the first screen is about."""


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


class Drawn(NamedTuple):
    """One figure at both widths."""

    wide: Figure
    narrow: Figure


def draw_all(run: RunResults) -> tuple[dict[str, Drawn], dict[str, str]]:
    """Draw every figure of the paper that the tables allow, at both widths.

    Args:
        run: The run's manifest and the paper's tables.

    Returns:
        The figures by the paper's number, and for each that could not be drawn the reason.
    """
    drawn, left_out = {}, {}
    # what the paper prints stands below the figure, in the page's own caption
    tables = {name: table for name, table in run.tables.items() if name != DIFFERENCES}
    level = run.stage("paper").get("level", run.level)
    for number in FIGURES:
        try:
            drawn[number] = Drawn(
                *(paper(number, tables, width=width, level=level) for width in (DOUBLE, SINGLE))
            )
        except DiagnosticsError as error:
            left_out[number] = str(error)
    return drawn, left_out


UNDATED = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}
"""What would differ between two files of one figure, for each format."""


def _files(name: str, figure: Figure) -> dict[str, bytes]:
    """The figure as PNG, PDF and SVG, so that equal tables give equal files."""
    found = {f"{name}.png": png(figure)}
    for kind, metadata in UNDATED.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(buffer, format=kind, metadata=metadata)
        found[f"{name}.{kind}"] = buffer.getvalue()
    return found


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
            _section(run, artefacts, drawn, left_out),
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
        pair = summary.pair_in_words(run) or f"{names['teacher']} → {names['student']}"
        return f"The paper, one to one: {pair}"
    return "The paper, one to one"


# --- the first screen


def first_screen(run: RunResults) -> dict[str, str]:
    """What stands before everything else: pair, what holds as released, what a control changes.

    Args:
        run: The manifest and the paper's tables.

    Returns:
        Sentences by their heading, from the tables; what a table does not have is not said. Title
        and sentences have at most `FIRST_SCREEN` words: the last sentences are left out, whole,
        where there is no room for them.
    """
    screen = {"The pair.": _pair(run)}
    for head, text in _findings(run):
        more = screen | {head: f"{screen.get(head, '')} {text}".strip()}
        if text and words(title(run), *more, *more.values()) <= FIRST_SCREEN:
            screen = more
    return screen


def words(*texts: str) -> int:
    """How many words texts have together."""
    return sum(len(text.split()) for text in texts)


def _findings(run: RunResults) -> list[tuple[str, str]]:
    """Headings and sentences of the first screen, the most telling first."""
    gap, best = _gap(run), _best(run)
    return [
        ("As released.", gap.get("released", "")),
        ("Controlled.", gap.get("controlled", "")),
        ("What a control changes.", _changes(run)),
        ("As released.", best.get("released", "")),
        ("Controlled.", best.get("controlled", "")),
        ("Trainings.", _masks(run)),
    ]


def _gap(run: RunResults) -> dict[str, str]:
    """The Q3 gap at the paper's K, or else at the table's first, in a sentence per side."""
    table = run.table("paper_table_1")
    rows = None if table is None else table[table.quantity == "Q3 gap"]
    if rows is None or rows.empty:
        return {}
    row = rows.iloc[int((rows.k == MAIN_K).to_numpy().argmax())].to_dict()
    released, controlled = units(str(row["unit"]))
    found = {
        "released": f"{with_interval(row, 'released')} in {released}.",
        "controlled": f"{with_interval(row, 'controlled')} in {controlled}",
    }
    known = np.isfinite(float(row["context"]))
    found["controlled"] += f"; context gain {with_interval(row, 'context')}." if known else "."
    return {
        side: f"Inside Q3, most minus least compatible third ({row['row']}): {text}"
        if side == "released"
        else f"The same gap: {text}"
        for side, text in found.items()
        if np.isfinite(float(row[side]))
    }


def _best(run: RunResults) -> dict[str, str]:
    """The selector with the highest mean gain at the main budget, in a sentence per side."""
    table = run.table("paper_table_8")
    if table is None:
        return {}
    rows = table[(table.quantity == "mean gain") & np.isclose(table.budget, MAIN_BUDGET)]
    found = {}
    for side in ("released", "controlled"):
        known = rows[np.isfinite(rows[side].astype(float))]
        if len(known):
            first = known.loc[known[side].astype(float).idxmax()].to_dict()
            found[side] = (
                f"Highest mean gain at {MAIN_BUDGET:.0%}: {readable(first['row'])},"
                f" {with_interval(first, side)}."
            )
    return found


def _changes(run: RunResults) -> str:
    """How many numbers of the tables turn their sign, and how many intervals lose their verdict."""
    tables = [run.tables[each.table] for each in COMPARED if each.table in run.tables]
    if not tables:
        return ""
    rows = pd.concat(tables, ignore_index=True)
    rows = rows[~rows.quantity.isin(DESCRIBED)].to_dict("records")
    signs = [turned for row in rows if (turned := turns(row)) is not None]
    theirs = [row for row in rows if excludes_zero(row, "released")]
    lost = sum(excludes_zero(row, "controlled") is False for row in theirs)
    return (
        f"Of {len(signs)} numbers in the tables, {sum(signs)} turn their sign; of {len(theirs)}"
        f" released intervals that exclude 0, {lost or 'none'} hold 0 when controlled."
    )


def _masks(run: RunResults) -> str:
    """Which mask leads by the released number of table 2, and which by the mean reduction."""
    table = run.table("paper_table_2")
    found = [] if table is None else masks_disagree(table)
    text = "; ".join(found)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _pair(run: RunResults) -> str:
    """The pair, the bank and the checkpoint in a sentence, as far as the run has them."""
    names = summary.models(run)
    models = [f"{role} {names[role]}" for role in ("student", "teacher") if role in names]
    named = names.get("pair") not in (None, "custom")
    parts = [f"the {names['pair']} pair" if named else ", ".join(models), _bank(run)]
    found = checkpoint(run)
    parts.append(f"checkpoint {found}" if found else "the manifest records no checkpoint")
    text = "; ".join(filter(None, parts))
    return f"{text[:1].upper()}{text[1:]}."


def _bank(run: RunResults) -> str:
    """How many positions and contexts the numbers rest on; empty without table 5."""
    table = run.table("paper_table_5")
    counts = {} if table is None else dict(zip(table.row, table.released, strict=True))
    return ", ".join(
        f"{int(counts[name]):,} {name}"
        for name in ("contexts", "positions")
        if np.isfinite(counts.get(name, np.nan))
    )


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


def _section(
    run: RunResults,
    artefacts: Sequence[Artefact],
    drawn: Mapping[str, Drawn],
    left_out: Mapping[str, str],
) -> str:
    """Artefacts one after another; a table does not repeat what was said of its figure."""
    parts: list[str] = []
    told: set[tuple[str, str]] = set()
    for artefact in artefacts:
        said = _said(run, artefact)
        fresh = {
            name: text
            for name, text in said.items()
            if name == "title" or (name, str(text)) not in told
        }
        told |= {(name, str(text)) for name, text in said.items()}
        parts.append(_artefact(run, artefact, fresh, drawn, left_out))
    return "".join(parts)


def _artefact(
    run: RunResults,
    artefact: Artefact,
    said: Mapping,
    drawn: Mapping[str, Drawn],
    left_out: Mapping[str, str],
) -> str:
    """One artefact: heading, figure, both sides in a sentence, why, what is printed, its table."""
    table = run.table(artefact.table)
    figure = drawn.get(artefact.number) if artefact.kind == "Figure" else None
    printed = _sentence(said.get("printed"), "Printed in the paper:")
    parts = [
        f"<h3>{html.escape(_heading(artefact, said))}</h3>",
        _drawing(artefact, figure, printed) if figure else "",
        _sides(said),
        _why(said, _missing(artefact, table, left_out)),
        "" if figure else printed,
        table_block(artefact.table, table) if table is not None else "",
    ]
    return f'<section id="{artefact.table}">{"".join(parts)}</section>'


NOT_MADE = "Not made: "
"""How `paper_differences` begins to say why an artefact is missing."""


def _why(said: Mapping, missing: str) -> str:
    """Why both sides differ, or why the artefact is not here."""
    why = said.get("why")
    why = why if isinstance(why, str) else ""
    if not missing:
        return _sentence(why, "Why they differ.")
    text = why.removeprefix(NOT_MADE) or missing
    return _sentence(f"{text[:1].upper()}{text[1:]}", "Not here.")


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


def _drawing(artefact: Artefact, drawn: Drawn, printed: str) -> str:
    """The figure at both widths; its caption has what the paper prints, and the file's name."""
    name = f"{PREFIX}{artefact.number.lower()}"
    wide, narrow = (
        inline_svg(figure, f"{name}-{size}")
        for figure, size in zip(drawn, ("wide", "narrow"), strict=True)
    )
    return (
        f'<figure id="figure-{name}"><div class="wide">{wide}</div><div class="narrow">{narrow}'
        f"</div><figcaption>{printed}<code>figures/{name}.pdf</code></figcaption></figure>"
    )


SIDES = {"released": "As released", "controlled": "Controlled"}


def _sides(said: Mapping) -> str:
    """What both sides say, beside one another."""
    sides = "".join(
        f'<div><p class="side">{head}</p>'
        f"<p>{html.escape(summary.minus(_typeset(said[name])))}</p></div>"
        for name, head in SIDES.items()
        if isinstance(said.get(name), str) and said[name]
    )
    return (
        f'<ul class="cards"><li class="card wide-card"><div class="sides">{sides}</div></li></ul>'
        if sides
        else ""
    )


def _sentence(text: object, head: str) -> str:
    """A paragraph with its heading; empty where there is no text."""
    if not isinstance(text, str) or not text:
        return ""
    return f"<p><b>{head}</b> {with_code(_typeset(text))}</p>"


def _typeset(text: str) -> str:
    """Text with the paper's two scores as its figures write them."""
    return text.replace("D^L", LEARN).replace("D^I", INCOMPATIBLE)


def _missing(artefact: Artefact, table: pd.DataFrame | None, left_out: Mapping[str, str]) -> str:
    """Why an artefact has no figure or no table; empty where it is whole."""
    if artefact.kind == "Figure":
        return left_out.get(artefact.number, "")
    if table is not None:
        return ""
    trained = artefact.number in ("2", "7", "10")
    return f"There is no table {artefact.table}." + (
        " It rests on trainings: `opd-diagnostics paper --train`." if trained else ""
    )


def _rest(run: RunResults) -> str:
    """`paper_differences` and every table that no artefact above shows, folded."""
    above = {artefact.table for artefacts in SECTIONS.values() for artefact in artefacts}
    names = [name for name in run.tables if name not in above and run.table(name) is not None]
    return "".join(table_block(name, run.tables[name]) for name in names)
