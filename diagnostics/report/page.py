"""The run directory as one page to send: tables, figures and manifest in, report.html and figures/*
out.

Rebuilt from files alone, without torch or a model. The page is self-contained: style, script and
figures stand inside it, and it asks the network for nothing. Equal files give equal bytes. All text
that came from models, prompts or users is escaped. The figures are inline SVG at two widths (page
and phone) whose page colours are variables, so that one drawing serves light, dark and print."""

from __future__ import annotations

import html
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import figures, style, summary, tokenview
from diagnostics.report.catalogue import TABLES
from diagnostics.report.run_results import read_run
from diagnostics.report.summary import RunResults
from diagnostics.report.svg import figure_files, inline_svg
from diagnostics.report.tokenview import script_json, show
from diagnostics.report.written_pages import write_pages

STATIC = Path(__file__).parent / "static"
ROWS_WRITTEN = 60
"""Rows up to which a table is written out as HTML; longer ones are packed."""
WARNINGS_OPEN = 4
CONTEXTS = 24
"""Contexts that the page shows token by token."""


def build(run_dir: str | Path, *, contexts: int = CONTEXTS) -> Path:
    """Draw the figures and write report.html and report.md from the files of a run directory.

    Reads DIR/manifest.json, DIR/tables/*.csv and, where they are there, DIR/tokens.parquet,
    DIR/contexts.parquet and DIR/tops.parquet; writes DIR/figures/*.png, *.pdf, DIR/report.html and
    DIR/report.md, each atomically, and their hashes into DIR/pages.json. contexts: how many are
    shown token by token, 0 for none. Returns the page's path. Raises DiagnosticsError where the
    manifest or every table is missing, a file cannot be read, or a page of such a name is not as
    this program wrote it."""
    directory = Path(run_dir)
    material = read_run(directory)
    drawn, left_out = draw_all(material)
    pages = {
        f"figures/{file}": content
        for name, pair in drawn.items()
        for file, content in figure_files(name, pair[0]).items()
    }
    pages["report.md"] = encoded(markdown(material, drawn, left_out))
    pages["report.html"] = encoded(page(material, drawn, left_out, contexts=contexts))
    write_pages(directory, pages)
    return directory / "report.html"


def encoded(text: str) -> bytes:
    """A page as UTF-8; a name that is no Unicode, as file systems allow, stands there escaped."""
    return text.encode("utf-8", "backslashreplace")


def draw_all(material: RunResults) -> tuple[dict[str, tuple[Figure, Figure]], dict[str, str]]:
    """Every figure at page and at phone width, and for each one that could not be drawn the
    reason.
    """
    drawn, left_out = {}, {}
    for sheet in figures.FIGURES.values():
        table = material.tokens if sheet.table == "tokens" else material.table(sheet.table)
        reason = _not_drawn(material, sheet, table)
        if reason:
            left_out[sheet.name] = reason
            continue
        try:
            options = {argument: material.table(name) for argument, name in sheet.arguments.items()}
            options |= (
                {"level": material.level}
                if "level" in inspect.signature(sheet.draw).parameters
                else {}
            )
            drawn[sheet.name] = tuple(
                sheet.draw(table, width=width, **options)
                for width in (figures.DOUBLE, figures.SINGLE)
            )
        except DiagnosticsError as error:
            left_out[sheet.name] = str(error)
    return drawn, left_out


def _not_drawn(material: RunResults, sheet: figures.FigureSpec, table: pd.DataFrame | None) -> str:
    """Why a figure cannot be drawn; empty where it can."""
    lacking = (
        [sheet.table]
        if table is None
        else [name for name in sheet.with_tables if material.table(name) is None]
    )
    if lacking:
        return f"no table {lacking[0]}"
    absent = [name for name in sheet.needs if name not in table]
    return f"no column {absent[0]} in the {sheet.table} table" if absent else ""


def page(
    material: RunResults,
    drawn: Mapping[str, tuple[Figure, Figure]],
    left_out: Mapping[str, str],
    *,
    contexts: int = CONTEXTS,
) -> str:
    """The whole page as one string of HTML, with the first `contexts` as tokens."""
    sections = [
        ("verdicts", "Verdicts", verdict_cards(material)),
        ("warnings", "Warnings", warning_list(material)),
        (
            "figures",
            "Figures",
            "".join(
                _figure(sheet, drawn[sheet.name])
                for sheet in figures.FIGURES.values()
                if sheet.name in drawn
            ),
        ),
        ("tokens", "Tokens", token_view(material, contexts)),
        (
            "tables",
            "Tables",
            "".join(table_block(name, material.tables[name]) for name in _table_order(material)),
        ),
        ("methods", "Methods", METHODS),
        ("provenance", "Provenance", provenance(material)),
        ("not-run", "What was not run", not_run(material, left_out)),
    ]
    lead = "".join(
        f"<p><b>{question}</b> {html.escape(text)}</p>"
        for question, text in summary.answer(material).items()
    )
    return shell(summary.title(material), _over(material), lead, sections, tokens=True)


def shell(
    title: str,
    over: str,
    lead: str,
    sections: Iterable[tuple[str, str, str]],
    *,
    tokens: bool = False,
) -> str:
    """A self-contained page: title, lead (HTML), links to its sections (id, heading, HTML), of
    which empty ones are left out.
    """
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
        for name, heading, content in sections
    )
    style = _static("report.css") + (tokenview.style() if tokens else "")
    script = _static("report.js") + (tokenview.script() if tokens else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1">'
        '<meta name="referrer"'
        f' content="no-referrer"><title>{html.escape(title)}</title>\n<style>\n{style}</style></head>\n<body><main>'
        f"<header>{over}<h1>{html.escape(title)}</h1><div"
        f' class="answer">{lead}</div><nav>{links}</nav></header>\n{body}</main>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _over(material: RunResults) -> str:
    names, version = (
        summary.models(material),
        material.manifest.get("versions", {}).get("opd-diagnostics", ""),
    )
    parts = [f"opd-diagnostics {version}".strip()] + [
        f"{role} {name}" for role, name in names.items() if name not in (role, "custom")
    ]
    return f'<p class="over">{html.escape(" · ".join(parts))}</p>'


def verdict_cards(material: RunResults) -> str:
    """One card a claim with both gains side by side, then C5 by measure; empty where the run has no
    verdicts.
    """
    shown, more = summary.claims(material)
    if shown.empty:
        return ""
    cards = "".join(
        _card(claim, rows.to_dict("records")) for claim, rows in shown.groupby("claim", sort=False)
    )
    note = (
        '<p class="quiet">The same claims on step and held-out positions apart: table verdicts.</p>'
        if more
        else ""
    )
    return f'<ul class="cards">{cards}</ul>{note}'


VERDICTS = ("supported", "refuted", "inconclusive")


def _card(claim: str, rows: list[dict]) -> str:
    statement = rows[0].get("statement")
    heading = f"{claim}: {statement}" if isinstance(statement, str) else str(claim)
    return (
        '<li class="card'
        f' {_agreed(rows)}"><h3>{html.escape(heading)}</h3>{"".join(map(_look, rows))}</li>'
    )


def _agreed(rows: list[dict]) -> str:
    """The verdict of all of a card's rows, inconclusive where they differ."""
    verdicts = {str(row["verdict"]) for row in rows}
    only = verdicts.pop() if len(verdicts) == 1 else ""
    return only if only in VERDICTS else "inconclusive"


def _look(row: dict) -> str:
    verdict, outcome, sentence = str(row["verdict"]), row.get("outcome"), row.get("sentence")
    named = (
        f"{style.OUTCOMES.get(outcome) or summary.MEASURES.get(outcome, outcome)}: "
        if isinstance(outcome, str)
        else ""
    )
    kind = verdict if verdict in VERDICTS else "inconclusive"
    return (
        f'<p>{html.escape(named)}<span class="verdict {kind}">{html.escape(verdict)}</span></p>'
        f'<p class="quiet">{html.escape(sentence if isinstance(sentence, str) else "")}</p>'
    )


def warnings(material: RunResults) -> list[str]:
    """What reading the run and its analysis warn of."""
    table = material.table("warnings")
    return [
        *material.cautions,
        *([] if table is None or "message" not in table else table.message.astype(str).tolist()),
    ]


def warning_list(material: RunResults) -> str:
    """The warnings as paragraphs; those beyond a handful folded away."""
    lines = [f'<p class="warning">{html.escape(message)}</p>' for message in warnings(material)]
    first, rest = lines[:WARNINGS_OPEN], lines[WARNINGS_OPEN:]
    return "".join(first) + (
        f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else ""
    )


def token_view(material: RunResults, contexts: int) -> str:
    """The first contexts token by token; empty where the run has no contexts, or none are
    wanted.
    """
    if material.bank is None or material.tokens is None or not contexts:
        return ""
    color = "gain" if "gain" in material.tokens else "forward_kl"
    shown = range(min(contexts, len(material.bank)))
    return show(
        material.bank, material.tokens, list(shown), color=color, tops=material.tops
    ).fragment


def _figure(sheet: figures.FigureSpec, drawn: tuple[Figure, Figure]) -> str:
    wide, narrow = (
        inline_svg(plate, f"{sheet.name}-{size}")
        for plate, size in zip(drawn, ("wide", "narrow"), strict=True)
    )
    return (
        f'<figure id="figure-{sheet.name}"><div class="wide">{wide}</div><div'
        f' class="narrow">{narrow}</div><figcaption><b>{html.escape(sheet.title)}</b>'
        f" {html.escape(sheet.reading)} <code>figures/{sheet.name}.pdf</code></figcaption></figure>"
    )


def _table_order(material: RunResults) -> list[str]:
    names = [name for name in material.tables if material.table(name) is not None]
    return [name for name in TABLES if name in names] + [
        name for name in names if name not in TABLES
    ]


def table_block(name: str, table: pd.DataFrame) -> str:
    """A folded table; long ones are packed, and built by the page's script when they are opened."""
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(str(column))}</button></th>'
        for column in table.columns
    )
    if len(table) <= ROWS_WRITTEN:
        rows, packed = (
            "".join(
                f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.itertuples(index=False)
            ),
            "",
        )
    else:
        rows, packed = "", f'<script type="application/json">{_packed(table)}</script>'
    return (
        f'<details id="table-{html.escape(name)}"><summary><b>{html.escape(name)}</b>'
        f' {html.escape(TABLES.get(name, ""))} <span class="quiet">{len(table):,} rows;'
        f' tables/{html.escape(name)}.csv</span></summary><div class="scroll"'
        f' tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div><button'
        f' type="button" class="copy">Copy as CSV</button>{packed}</details>'
    )


def _cell(value: Any) -> str:
    """A number rounded to four digits, with six beside it for sorting and copying."""
    if isinstance(value, float):
        if pd.isna(value):
            return '<td class="number" data-v=""></td>'
        return (
            '<td class="number"'
            f' data-v="{value:.6g}">{summary.number(value, 4) if value != int(value) else f"{value:,.0f}"}</td>'
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number" data-v="{value}">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _packed(table: pd.DataFrame) -> str:
    """Columns as JSON: numbers with six digits, null where undefined; text as distinct values and
    an index.
    """
    columns: list[Any] = []
    for name in table:
        values = table[name]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            columns.append(
                [
                    (
                        None
                        if pd.isna(value)
                        else float(f"{value:.6g}")
                        if value != int(value)
                        else int(value)
                    )
                    for value in values
                ]
            )
        else:
            codes, texts = pd.factorize(values.astype(str))
            columns.append({"texts": list(texts), "codes": codes.tolist()})
    return script_json(columns)


def provenance(material: RunResults) -> str:
    """The manifest as tables: versions first, then each stage's settings, facts, inputs and
    files.
    """
    parts = [("Versions", material.manifest.get("versions", {}))]
    for name, stage in material.manifest.get("stages", {}).items():
        parts += [
            (f"Stage {name}: {part}", stage.get(part))
            for part in ("settings", "facts", "inputs", "files")
        ]
    other = {
        key: value for key, value in material.manifest.items() if key not in ("versions", "stages")
    }
    return "".join(
        f"<h3>{html.escape(heading)}</h3>{_facts(values)}"
        for heading, values in [*parts, ("Manifest", other)]
        if values
    )


def _facts(values: Mapping[str, Any]) -> str:
    pairs = ((html.escape(key), html.escape(text)) for key, text in _flat(values))
    rows = "".join(
        f'<tr><th scope="row">{key}</th><td><code>{text}</code></td></tr>' for key, text in pairs
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)),
            )


PARTS = {
    "verdicts": "verdicts on the claims C1 to C4",
    "regressions": "the decomposition into compatible and incompatible divergence",
    "selection_curves": "captured gain by budget",
    "intervention": "the step with only the selected positions carrying loss, at matched norm",
    "kernel_shares": "the split of each gain into its own position's share and others'",
    "validation_outcomes": "training runs (claim C5); a one-step gain does not stand in for them",
}
"""Parts of the study that a run may lack, by the table that would hold them."""


def missing(material: RunResults, left_out: Mapping[str, str]) -> list[str]:
    """Sentences on what the reader should not look for here: parts of the study, parts of tables,
    figures.
    """
    lines = [
        text[0].upper() + text[1:] + "."
        for name, text in PARTS.items()
        if material.table(name) is None
    ]
    table = material.table("left_out")
    if table is not None:
        lines += [f"{row.table}, {row.what}: {row.why}." for row in table.itertuples()]
    drawable = {
        sheet.name: sheet
        for sheet in figures.FIGURES.values()
        if sheet.table == "tokens" or material.table(sheet.table) is not None
    }
    lines += [
        f"Figure “{drawable[name].title}”: {reason.rstrip('.')}."
        for name, reason in left_out.items()
        if name in drawable
    ]
    return lines


def not_run(material: RunResults, left_out: Mapping[str, str]) -> str:
    """`missing` as a list."""
    lines = missing(material, left_out)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return (
        f"<ul>{items}</ul>" if lines else "<p>Nothing: every part of the study has its table.</p>"
    )


def markdown(
    material: RunResults, drawn: Mapping[str, tuple[Figure, Figure]], left_out: Mapping[str, str]
) -> str:
    """The report for a repository's page: answer, verdicts, figures as links, what was not run,
    provenance in short.
    """
    blocks = [
        f"# {_plain(summary.title(material))}",
        *(f"**{question}** {_plain(text)}" for question, text in summary.answer(material).items()),
        *_verdict_rows(material),
    ]
    blocks += [f"> {_plain(message)}" for message in warnings(material)]
    for sheet in figures.FIGURES.values():
        if sheet.name in drawn:
            blocks += [
                f"## {sheet.title}",
                f"![{sheet.title}](figures/{sheet.name}.png)",
                sheet.reading,
            ]
    blocks += [
        "## What was not run",
        "\n".join(f"- {_plain(line)}" for line in missing(material, left_out)) or "Nothing.",
    ]
    versions = ", ".join(
        f"{name} {version}" for name, version in material.manifest.get("versions", {}).items()
    )
    blocks += [
        "## Provenance",
        _plain(
            f"{versions}. Settings, models and the sha256 of each file: manifest.json; every"
            " number: tables/*.csv."
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _verdict_rows(material: RunResults) -> list[str]:
    shown, _ = summary.claims(material)
    if not {"claim", "outcome", "verdict", "sentence"} <= set(shown.columns):
        return []
    cells = shown[["claim", "outcome", "verdict", "sentence"]].astype(str).map(_plain)
    rows = [f"| {' | '.join(row)} |" for row in cells.itertuples(index=False)]
    return ["\n".join(["| claim | by | verdict | why |", "|---|---|---|---|", *rows])]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


METHODS = """
<p>A prompt goes to the student, which samples one response; the pair is frozen. At a response position, <i>p</i> is the
student's next-token distribution, <i>q</i> the teacher's, and every sum runs over the whole shared vocabulary. Logarithms are
natural, so entropies and divergences are in nats. All predictors are measured before the step.</p>
<div class="formulas"><table class="facts"><tbody>
<tr><th scope="row">forward KL</th><td>D = KL(q‖p) = Σ q (ln q − ln p), teacher first</td></tr>
<tr><th scope="row">reverse KL</th><td>KL(p‖q) = Σ p (ln p − ln q), student first</td></tr>
<tr><th scope="row">entropy</th><td>H = −Σ p ln p</td></tr>
<tr><th scope="row">compatibility</th><td>C = Σ q(v) over the student's K most likely tokens</td></tr>
<tr><th scope="row">normalisation</th><td>N(z) = clip((z − Q05)/(Q95 − Q05), 0, 1) over all response positions; ĥ, d̂, ĉ are N of H, D, C</td></tr>
<tr><th scope="row">teachability</th><td>d̂·ĉ; incompatible is d̂·(1 − ĉ); TIP is ĥ + d̂ − ĥ·d̂</td></tr>
<tr><th scope="row">Q3</th><td>ĥ at most its median, d̂ at least its median: confident and wrong</td></tr>
<tr><th scope="row">gain</th><td>D before − D after one optimiser step, in nats; relative gain divides by D before and is undefined where that is under 0.001 nats</td></tr>
<tr><th scope="row">placebo</th><td>the same measurement after a step of equal norm in a random direction</td></tr>
<tr><th scope="row">intervals</th><td>bootstrap over prompts, since positions of one prompt are not independent</td></tr>
</tbody></table></div>
<p>Step contexts carried the loss; held-out contexts did not and show what spills over. The student's weights are restored
exactly and checked by hash. Teachability follows arXiv 2605.26844.</p>
"""
