"""The page of several teachers on one bank: whose signal this student can follow, and where.

    save_teachers("reports/teachers")        # teachers.html and figures/teachers*.png

It is made from the tables and the manifest that `teachers` wrote. Every sentence is a row of
`teachers_differences`, and nothing is said to be more that Holm's correction does not tell apart.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.analysis.teachers import GAINS, LEARNABLE
from diagnostics.core.run_lock import hold
from diagnostics.report import figures, page, provenance, svg
from diagnostics.report.figures.teachers import DOMAINS
from diagnostics.report.page_tables import table_block
from diagnostics.report.run_results import read_tables
from diagnostics.report.run_tables import RunTables
from diagnostics.report.summary import number
from diagnostics.report.written_pages import encoded, write_pages

WHOSE, WHERE, GAINED = "Whose signal can this student follow?", "Where?", "What was gained?"
TOLD = ("higher", "lower")
"""Verdicts of a difference that is told apart."""
METHOD = (
    "One student, the same frozen responses, one token table per teacher. Teachers are compared at"
    " the same positions, so that what differs between positions falls out of a difference. D·C is"
    " the divergence KL(q‖p) times the teacher's mass on the student's top K: what a teacher would"
    " change where the student can follow. Intervals are over prompts; a difference is judged on 20"
    " prompts or more, by Holm's p value over the rows of the table. Gains come from steps towards"
    " different teachers, and say what one step gave, not which teacher is better."
)


@dataclass(frozen=True)
class TeachersPage:
    """The tables of a comparison of teachers, and the page that they make."""

    tables: Mapping[str, pd.DataFrame]
    """What `analysis.teachers.compare_teachers` returns."""
    manifest: Mapping[str, Any]
    """The manifest of the comparison."""

    @property
    def names(self) -> list[str]:
        """The teachers in their order."""
        return list(dict.fromkeys(self.tables["teachers"]["teacher"].astype(str)))

    @property
    def level(self) -> float:
        """Level of the intervals."""
        return RunTables({"stages": {"analyze": self._stage}}).level

    @property
    def _stage(self) -> Mapping[str, Any]:
        return self.manifest.get("stages", {}).get("teachers", {})

    def answers(self) -> dict[str, str]:
        """The answer, a sentence per question; a question without rows is left out."""
        differences = self.tables["teachers_differences"]
        learnable = differences[differences["measure"] == LEARNABLE]
        found = {
            WHOSE: whose(learnable, self.names),
            WHERE: where(learnable),
            GAINED: gained(differences, self.names),
        }
        return {question: text for question, text in found.items() if text}

    def drawings(self) -> Iterable[tuple[str, str, Any]]:
        """Name, caption, and the function of width that draws it."""
        means, agreement = self.tables["teachers"], self.tables["teachers_agreement"]
        yield (
            "teachers",
            "What each teacher offers (divergence within the student's reach, divergence,"
            " teachability) and, where its run was probed, what a step towards it gained.",
            lambda width: figures.teachers(means, width=width, level=self.level),
        )
        if len(agreement):
            yield (
                "teachers_agreement",
                "How far the teachers agree: ranks of positions, likeliest tokens, selections.",
                lambda width: figures.teachers_agreement(agreement, width=width),
            )

    @property
    def html(self) -> str:
        """All of it as one self-contained page."""
        lead = "".join(
            f"<p><b>{html.escape(question)}</b> {page.with_code(text)}</p>"
            for question, text in self.answers().items()
        )
        run = RunTables(self.manifest, self.tables)
        facts = provenance.provenance(run)
        folded = f"<details><summary>Versions, settings, hashes</summary>{facts}</details>"
        blocks = (table_block(name, table) for name, table in self.tables.items() if len(table))
        sections = [
            ("figures", "Figures", "".join(_figure(*drawn) for drawn in self.drawings())),
            ("method", "How teachers are compared", f"<p>{html.escape(METHOD)}</p>"),
            ("tables", "Tables", "".join(blocks)),
            ("provenance", "Provenance", folded if facts else ""),
        ]
        return page.shell(self.title, self._over(), lead, sections)

    @property
    def title(self) -> str:
        """The heading of the page."""
        return f"{len(self.names)} teachers of one student: {', '.join(self.names)}"

    def _over(self) -> str:
        rows = self.tables["teachers"]
        whole = rows[rows["group"] == "all"]
        if whole.empty:
            return ""
        prompts, positions = int(whole["prompts"].max()), int(whole["positions"].max())
        return f'<p class="over">{prompts:,} prompts · {positions:,} positions of one bank</p>'

    def files(self) -> dict[str, bytes]:
        """The page and its figures, by file name."""
        found = {"teachers.html": encoded(self.html)}
        for name, _, draw in self.drawings():
            found[f"figures/{name}.png"] = svg.png(draw(figures.DOUBLE))
        return found


def save_teachers(directory: str | Path) -> Path:
    """Write teachers.html and its figures from the tables of a comparison.

    Args:
        directory: The directory of a finished `teachers`.

    Returns:
        The path of teachers.html.

    Raises:
        DiagnosticsError: The tables are missing, or a page of such a name is not as this program
            wrote it.
    """
    directory = Path(directory)
    run = read_tables(directory, begins="teachers", remedy="Run `teachers` first.")
    made = TeachersPage(run.tables, run.manifest)
    with hold(directory):
        write_pages(directory, made.files())
    return directory / "teachers.html"


# --- sentences


def whose(rows: pd.DataFrame, names: list[str]) -> str:
    """Which teacher offers the most over all positions, or that this is not identified.

    Args:
        rows: Rows of `teachers_differences` of one measure.
        names: The teachers.
    """
    whole = rows[rows["group"] == "all"]
    if whole.empty:
        return ""
    best = [name for name in names if _beats_all(whole, name, names)]
    if best:
        more = "; ".join(_over_other(row, best[0]) for row in _rows_of(whole, best[0]))
        return f"{best[0]} offers the most that this student can follow over all positions: {more}."
    said = "; ".join(map(_open, whole.to_dict("records")))
    return f"Not identified over all positions: {said}."


def _rows_of(rows: pd.DataFrame, name: str) -> list[dict]:
    return rows[(rows["teacher"] == name) | (rows["other"] == name)].to_dict("records")


def _beats_all(rows: pd.DataFrame, name: str, names: list[str]) -> bool:
    found = _rows_of(rows, name)
    return len(found) == len(names) - 1 and all(_winner(row) == name for row in found)


def _winner(row: Mapping) -> str:
    """The teacher of a difference that is told apart; empty where none is."""
    if row["verdict"] not in TOLD:
        return ""
    return str(row["teacher"] if row["verdict"] == "higher" else row["other"])


def _over_other(row: Mapping, name: str) -> str:
    """How much more a teacher offers than another, with the interval."""
    sign = 1 if row["teacher"] == name else -1
    other = row["other"] if sign > 0 else row["teacher"]
    low, high = sorted((sign * row["low"], sign * row["high"]))
    return (
        f"D·C {number(sign * row['difference'])} nats per position more than {other}"
        f" ({number(low)} to {number(high)}; {row['prompts']:,} prompts)"
    )


def _open(row: Mapping) -> str:
    """A difference with its interval and what its verdict is."""
    verdict = f"{_winner(row)} is ahead" if _winner(row) else row["verdict"]
    return (
        f"{row['teacher']} minus {row['other']} is {number(row['difference'])} nats per position of"
        f" D·C ({number(row['low'])} to {number(row['high'])}; {row['prompts']:,} prompts):"
        f" {verdict}"
    )


def where(rows: pd.DataFrame) -> str:
    """In which domains, or at which student entropy, a teacher offers more; empty without groups.

    Args:
        rows: Rows of `teachers_differences` of one measure.
    """
    named = rows["group"].astype(str)
    apart = rows[named.str.startswith(DOMAINS)]
    if apart.empty:
        apart = rows[named.str.endswith("student entropy")]
    if apart.empty:
        return ""
    told = [row for row in apart.to_dict("records") if _winner(row)]
    by = [
        f"{_winner(row)} offers more in {row['group']} than"
        f" {row['other'] if _winner(row) == row['teacher'] else row['teacher']}"
        f" ({number(abs(row['difference']))} nats,"
        f" {' to '.join(map(number, sorted((abs(row['low']), abs(row['high'])))))})"
        for row in told
    ]
    left = len(apart) - len(told)
    why = apart.loc[~apart["verdict"].isin(TOLD), "verdict"].value_counts()
    reasons = ", ".join(f"{reason}: {count}" for reason, count in why.items())
    rest = f"{left} of {len(apart)} comparisons within groups are open ({reasons})"
    if not by:
        return f"Not identified: {rest}."
    return f"{'; '.join(by)}.{f' {rest[0].upper()}{rest[1:]}.' if left else ''}"


def gained(differences: pd.DataFrame, names: list[str]) -> str:
    """What steps towards the teachers gave, beyond a permuted teacher where that was measured.

    Args:
        differences: The table `teachers_differences`.
        names: The teachers.
    """
    held = [gain for gain in reversed(GAINS) if (differences["measure"] == gain).any()]
    if not held:
        return ""
    rows = differences[(differences["measure"] == held[0]) & (differences["group"] == "all")]
    word = held[0].replace("_", " ")
    said = [
        f"{word} of {row['teacher']} minus {row['other']} {number(row['difference'], 2)} nats"
        f" ({number(row['low'])} to {number(row['high'])}): {row['verdict']}"
        for row in rows.to_dict("records")
    ]
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _figure(name: str, caption: str, draw: Any) -> str:
    sizes = (("wide", figures.DOUBLE), ("narrow", figures.SINGLE))
    drawings = "".join(
        f'<div class="{size}">{svg.inline_svg(draw(width), f"{name}-{size}")}</div>'
        for size, width in sizes
    )
    text = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure id="figure-{name}">{drawings}{text}</figure>'
