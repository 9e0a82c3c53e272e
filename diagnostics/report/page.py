"""The run directory as one page to send: tables, figures and manifest in, report.html and figures/*
out.

The page is made from files alone, without torch or a model. It is self-contained: style, script and
figures stand inside it, and it requests nothing from the network. Equal files give equal bytes. All
text that came from models, prompts or users is escaped. The figures are inline SVG at two widths
(page and phone) whose page colors are variables, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from diagnostics.report import (
    glossary,
    markdown,
    naming,
    page_tables,
    provenance,
    sides,
    summary,
    themes,
    tokenview,
)
from diagnostics.report.drawing import Drawing, draw_beside
from diagnostics.report.figures.registry import FigureSpec, in_page_order
from diagnostics.report.run_results import RunResults, read_run
from diagnostics.report.tokenview import show
from diagnostics.report.two_steps import OF, in_words, meaning, two_steps
from diagnostics.report.written_pages import encoded, write_pages

STATIC = Path(__file__).parent / "static"
WARNINGS_LINES = 5
"""Lines that warnings take; those beyond are folded away in the last of them."""
CONTEXTS = 24
"""Contexts that the page shows token by token."""


def build(
    run_dir: str | Path,
    *,
    contexts: int = CONTEXTS,
    pdf: bool = False,
    workers: int | None = None,
) -> Path:
    """Draw the figures and write report.html and report.md from the files of a run directory.

    Reads DIR/manifest.json, DIR/tables/*.csv and, where they are there, DIR/tokens.parquet,
    DIR/contexts.parquet and DIR/tops.parquet. Writes DIR/figures/*.png, DIR/report.html and
    DIR/report.md, each atomically, and their hashes into DIR/pages.json.

    Args:
        run_dir: The run directory.
        contexts: Number of contexts to show token by token, 0 for none.
        pdf: Whether DIR/figures/*.pdf are written too. PDFs of an earlier report are brought up to
            date in any case, so that none is left that shows other numbers.
        workers: Number of processes that draw; the pages do not depend on it. As many as are of use
            where None.

    Returns:
        The path of report.html.

    Raises:
        DiagnosticsError: The manifest or every table is missing, a file cannot be read, or a page
            of such a name is not as this program wrote it.
    """
    directory = Path(run_dir)
    run = read_run(directory, shown=contexts)
    pdf = pdf or any((directory / "figures").glob("*.pdf"))
    long = {name: functools.partial(make, run, contexts) for name, make in LONG.items()}
    drawn, left_out, made = draw_beside(run, long, pdf=pdf, workers=workers)
    pages = {f"figures/{name}.png": drawing.png for name, drawing in drawn.items()}
    pages |= {f"figures/{name}.pdf": each.pdf for name, each in drawn.items() if each.pdf}
    pages["report.md"] = encoded(markdown.markdown(run, drawn, left_out))
    pages["report.html"] = encoded(page(run, drawn, left_out, contexts=contexts, made=made))
    write_pages(directory, pages)
    return directory / "report.html"


def page(
    run: RunResults,
    drawn: Mapping[str, Drawing],
    left_out: Mapping[str, str],
    *,
    contexts: int = CONTEXTS,
    made: Mapping[str, str] | None = None,
) -> str:
    """The whole page as one string of HTML, with the first `contexts` as tokens; `made` holds what
    has been made of `LONG` already.
    """
    made = made or {name: make(run, contexts) for name, make in LONG.items()}
    answer = summary.answer(run)
    cards = verdict_cards(run)
    if cards:
        answer.pop(summary.CLAIMS, None)  # the cards say it with each claim's sentence
    above = [key for key in summary.FIRST if key in answer] or list(answer)[:2]
    lead = _paragraphs(run, {key: answer.pop(key) for key in above})
    first = next((spec for spec in in_page_order() if spec.name == FIRST), None)
    if first and FIRST in drawn:
        lead = f"<div>{lead}</div>{_figure(first, drawn[FIRST])}"
    figures = (
        _figure(spec, drawn[spec.name])
        for spec in in_page_order()
        if spec.name in drawn and spec.name != FIRST
    )
    sections = [
        ("steps", "Steps", steps_beside(run)),
        ("verdicts", "Claims", cards),
        ("warnings", "Warnings", warning_list(run)),
        ("not-run", "What was not run", not_run(run, left_out)),
        ("findings", "Findings", _paragraphs(run, answer)),
        ("figures", "Figures", "".join(figures) + magnitudes(run)),
        ("responses", "Right and wrong responses", by_correctness(run)),
        ("tokens", "Tokens", made["tokens"]),
        ("tables", "Tables", made["tables"]),
        ("methods", "Methods", glossary.glossary()),
        ("provenance", "Provenance", _folded("Versions, settings, hashes", run)),
    ]
    return shell(summary.title(run), _over(run), lead, sections, tokens=True, two=FIRST in drawn)


FIRST = "decision"
"""The figure that stands beside the decision, above everything else."""


def _folded(title: str, run: RunResults) -> str:
    content = provenance.provenance(run)
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def _paragraphs(run: RunResults, answer: Mapping[str, str]) -> str:
    """Questions with their answers, with links to the tables and the words that they name."""
    text = "".join(
        f"<p><b>{question}</b> {with_code(text)}</p>" for question, text in answer.items()
    )
    return glossary.linked(_to_tables(run, re.sub(r"(?<=\d) %", "\u00a0%", text)))


def by_correctness(run: RunResults) -> str:
    """Right and wrong responses side by side, and what is folded below for either; empty where
    nobody asked for their tables.
    """
    if not sides.is_asked(run):
        return ""
    folded = ""
    for side, part in sides.parts(run).items():
        if part is run:
            continue
        said = "".join(
            f"<p><b>{question}</b> {with_code(text)}</p>"
            for question, text in sides.answers(part).items()
        )
        title = f"{side.capitalize()} responses alone: {sides.counted(run, side)}"
        folded += (
            f'<details id="responses-{side}"><summary>{html.escape(title)}</summary>'
            f"{glossary.linked(said)}{sides.tables(run, side)}</details>"
        )
    return sides.overview(run) + folded


def _to_tables(run: RunResults, text: str) -> str:
    """Text in which “table NAME” is a link to that table."""

    def link(match: re.Match[str]) -> str:
        found = run.table(match[1]) is not None
        return f'<a href="#table-{match[1]}">{match[0]}</a>' if found else match[0]

    return re.sub(r"\btable (\w+)", link, text)


def with_code(text: str) -> str:
    """Escaped text with real minus signs, in which what stands between backticks is code."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(
        f"<code>{html.escape(part)}</code>" if at % 2 else html.escape(summary.minus(part))
        for at, part in enumerate(parts)
    )


def magnitudes(run: RunResults) -> str:
    """The placebo as one small table; empty where the run has none."""
    table = run.table("placebo")
    if table is None:
        return ""
    if "rollouts" in table:
        table = table[table["rollouts"] == "all"].drop(columns="rollouts")
    table = table.drop(columns=["low", "high"], errors="ignore").replace(
        {"stratum": {r" to inf$": " and more"}}, regex=True
    )
    return (
        '<section id="magnitude"><h3>How large is a change of this size in no direction?</h3><p'
        ' class="quiet">Gain in nats after steps of the same norm in random directions, with both'
        " signs, beside that of the step itself. It says how far weights that move so much change"
        " a position whatever the loss says; it is no null for a correlation.</p>"
        f"{page_tables.small_table(table)}</section>"
    )


def steps_beside(run: RunResults) -> str:
    """The probe's step and the decision's, side by side, with what rests on each; empty unless both
    are recorded.
    """
    table = two_steps(run)
    if len(table) < 2:
        return ""
    heads = "".join(f'<th class="plain" scope="col">{OF[step]}</th>' for step in table["step"])
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        f"{''.join(f'<td>{with_code(text)}</td>' for text in cells)}</tr>\n"
        for name, cells in in_words(table)
    )
    return glossary.linked(f"<p>{with_code(meaning(table))}</p>") + (
        f'<div class="scroll"><table class="facts"><thead><tr><td></td>{heads}</tr></thead><tbody>'
        f"\n{rows}</tbody></table></div>"
    )


def shell(
    title: str,
    over: str,
    lead: str,
    sections: Iterable[tuple[str, str, str]],
    *,
    tokens: bool = False,
    two: bool = False,
) -> str:
    """A self-contained page: title, lead (HTML), links to its sections (id, heading, HTML), of
    which empty ones are left out; `two` sets the lead's two parts side by side where there is room.
    """
    sections = [section for section in sections if section[2]]
    links = '<a href="#top">↑ Top</a>' + "".join(
        f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections
    )
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
        for name, heading, content in sections
    )
    style = themes.themed(_static("report.css")) + (tokenview.style() if tokens else "")
    script = _static("report.js") + (tokenview.script() if tokens else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1">'
        '<meta name="referrer"'
        f' content="no-referrer"><title>{html.escape(title)}</title>\n'
        f"<style>\n{style}</style></head>\n<body><main>"
        f'<header id="top">{over}<h1>{html.escape(title)}</h1><div class="answer'
        f'{" two" if two else ""}">{lead}</div></header>\n<nav>{links}<button type="button"'
        f' class="theme" title="light or dark"></button></nav>\n{body}</main>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _over(run: RunResults) -> str:
    names, version = (
        summary.models(run),
        run.manifest.get("versions", {}).get("opd-diagnostics", ""),
    )
    parts = [f"opd-diagnostics {version}".strip()] + [
        f"{role} {name}" for role, name in names.items() if name not in (role, "custom")
    ]
    if summary.pair_in_words(run):  # pairs of one kind and size are told apart by their weights
        digests = {role: summary.identity(run, role).get("weights_sha256") for role in names}
        parts += [f"{role}’s weights {str(sha)[:8]}…" for role, sha in digests.items() if sha]
    return f'<p class="over">{html.escape(" · ".join(parts))}</p>'


def verdict_cards(run: RunResults) -> str:
    """One card per claim in words, with its verdicts; the numbers of the paper's statistic and of
    the controlled one are folded into it, side by side.

    Empty where the run has no verdicts.
    """
    shown, more = summary.claims(run)
    if shown.empty:
        return ""
    cards = "".join(
        _card(claim, rows.to_dict("records")) for claim, rows in shown.groupby("claim", sort=False)
    )
    note = "The same claims on other populations and by other outcomes: table verdicts."
    note = f'<p class="quiet">{_to_tables(run, note)}</p>' if more else ""
    registered = summary.registered(run)
    seal = f'<p class="quiet registered">{html.escape(registered)}</p>' if registered else ""
    return seal + glossary.linked(f'<ul class="cards">{cards}</ul>') + note


SIDES = {"paper": "As the paper has it", "controlled": "With controls", "": ""}
"""Kinds of a claim's statistic in the order of a card's columns, with their headings."""


def _card(claim: str, rows: list[dict]) -> str:
    """A claim with its verdicts; the heading is what is tested with controls."""
    controlled = [row for row in rows if row.get("kind") == "controlled"]
    statement = _words((controlled or rows)[0], "statement")
    found = {_words(row, "kind") for row in rows}
    kinds = {
        kind: title
        for kind, title in (SIDES | {kind: kind for kind in found - set(SIDES)}).items()
        if kind in found
    }
    parts = {kind: [row for row in rows if _words(row, "kind") == kind] for kind in kinds}
    brief = "".join(_brief(kinds[kind], part) for kind, part in parts.items())
    sides = "".join(_side(kinds[kind], part, statement) for kind, part in parts.items())
    tag = f'&nbsp;<span class="tag">{html.escape(str(claim))}</span>' if statement else ""
    heading = html.escape(_capital(_typeset(statement or str(claim))))
    return (
        f'<li class="card {_agreed(rows)}"><h3>{heading}{tag}</h3><p class="brief">{brief}</p>'
        f'<details><summary>Why</summary><div class="sides">{sides}</div></details></li>'
    )


def _brief(title: str, rows: list[dict]) -> str:
    """The verdicts of one kind of statistic in a line."""
    said = ", ".join(f"{_verdict(str(row['verdict']))}{_by(row, rows)}" for row in rows)
    return f"<span>{html.escape(title)}{': ' if title else ''}{said}</span>"


def _verdict(verdict: str) -> str:
    kind = summary.verdict_class(verdict)
    return f'<span class="verdict {kind}">{html.escape(verdict)}</span>'


def _by(row: dict, rows: list[dict]) -> str:
    """By which outcome a verdict is, where there are several."""
    return f" by {html.escape(_outcome(row))}" if len(rows) > 1 and _outcome(row) else ""


def _outcome(row: dict) -> str:
    name = row.get("outcome")
    if not isinstance(name, str):
        return ""
    return naming.OUTCOMES.get(name) or naming.MEASURES.get(name, name)


def _typeset(text: str) -> str:
    """A sentence of the analysis as print has it: signs for products and minus, words for names."""
    text = re.sub(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", lambda name: naming.readable(name[0]), text)
    return glossary.typeset(re.sub(r"\b(forward|reverse) kl\b", r"\1 KL", text))


def _side(title: str, rows: list[dict], heading: str) -> str:
    """One kind of a claim's statistic: what it says, where the heading says otherwise, and a line
    for each outcome.
    """
    head = f'<p class="side">{html.escape(title)}</p>' if title else ""
    own = _words(rows[0], "statement")
    if title and own != heading:
        head += f"<p><i>{html.escape(_typeset(own))}</i></p>"
    return f"<div>{head}{''.join(map(_claim_test, rows))}</div>"


def _agreed(rows: list[dict]) -> str:
    """The class of a card: the verdict of its controlled rows, where it has any, and inconclusive
    where they differ.
    """
    controlled = [row for row in rows if row.get("kind") == "controlled"]
    verdicts = {str(row["verdict"]) for row in controlled or rows}
    only = verdicts.pop() if len(verdicts) == 1 else ""
    return summary.verdict_class(only)


def _claim_test(row: dict) -> str:
    verdict, named = str(row["verdict"]), f"{_outcome(row)}: " if _outcome(row) else ""
    found, why = map(_typeset, _found(row))
    exploratory = row.get("exploratory") in naming.TRUE
    tag = f' <span class="tag">exploratory{html.escape(why)}</span>' if exploratory else ""
    return (
        f"<p>{html.escape(named)}{_verdict(verdict)}{tag}</p>"
        f'<p class="quiet">{html.escape(found)}</p>'
    )


def _found(row: dict) -> tuple[str, str]:
    """The reason of a verdict with what was found, and why it is exploratory.

    The card says the verdict and the claim already, so of a sentence that repeats them only what
    follows is kept.
    """
    sentence, reason = _words(row, "sentence"), _words(row, "reason").rstrip(".")
    text, _, why = sentence.partition(" Exploratory: ")
    said, claim, found = text.partition(f"The claim: {_words(row, 'statement')}. ")
    text = found.removeprefix("Found: ") if claim else text
    parts = [text] if reason in (said if not claim else "") else [f"{reason}.", text]
    why = "" if why.startswith(NOT_PRIMARY) else why.rstrip(".")
    return " ".join(map(_capital, filter(None, parts))), f": {why}" if why else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


NOT_PRIMARY = "not the primary"
"""Why a row is exploratory of which the card shows the primary one beside it."""


def _words(row: dict, name: str) -> str:
    """A cell with text; empty where it is undefined."""
    return row[name].strip() if isinstance(row.get(name), str) else ""


def warning_list(run: RunResults) -> str:
    """The warnings, one line per cause with the conclusion that it touches, those that change a
    verdict first; at most `WARNINGS_LINES` lines, the last of which holds the others.
    """
    lines = [f'<p class="warning">{html.escape(note)}</p>' for note in run.reading_notes]
    lines += [_warning(*cause) for cause in provenance.short_causes(run)]
    open_lines = WARNINGS_LINES if len(lines) <= WARNINGS_LINES else WARNINGS_LINES - 1
    first, rest = lines[:open_lines], lines[open_lines:]
    return "".join(first) + (
        f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else ""
    )


def _warning(text: str, touched: str, changed: bool) -> str:
    """A warning; the conclusion that it touches stands behind it."""
    kind = "warning" if changed else "warning minor"
    says = "changes" if changed else "touches"
    tag = f' <span class="tag">{says}: {html.escape(_typeset(touched))}</span>' if touched else ""
    return f'<p class="{kind}">{html.escape(summary.minus(text))}{tag}</p>'


def token_view(run: RunResults, contexts: int) -> str:
    """Some contexts token by token; empty where the run has no contexts, or none are
    wanted.
    """
    if run.bank is None or run.tokens is None or not contexts:
        return ""
    color = "gain" if "gain" in run.tokens else "forward_kl"
    shown, note = tokenview.telling_contexts(run.bank, run.tokens, contexts)
    return show(run.bank, run.tokens, shown, color=color, tops=run.tops, note=note).fragment


LONG: dict[str, Callable[[RunResults, int], str]] = {
    "tables": lambda run, contexts: page_tables.all_tables(run),
    "tokens": token_view,
}
"""Parts of a page that take as long as a figure, by the name of their section."""


def _figure(spec: FigureSpec, drawn: Drawing) -> str:
    files = f"<code>figures/{spec.name}.{'pdf' if drawn.pdf else 'png'}</code>"
    return (
        f'<figure id="figure-{spec.name}"><div class="wide">{drawn.wide}</div><div'
        f' class="narrow">{drawn.narrow}</div><figcaption><b>{html.escape(spec.title)}</b>'
        f" {html.escape(spec.reading)} {files}</figcaption></figure>"
    )


def not_run(run: RunResults, left_out: Mapping[str, str]) -> str:
    """`missing` as a list."""
    lines = provenance.missing(run, left_out)
    items = "".join(f"<li>{with_code(line)}</li>" for line in lines)
    here = '<p class="quiet">DIR is the directory of this page.</p>'
    nothing = "<p>Nothing: every part of the study has its table.</p>"
    return f"<ul>{items}</ul>{here}" if lines else nothing
