"""The run directory as one page to send: tables, figures and manifest in, report.html and figures/* out.

Rebuilt from files alone, without torch or a model. The page is self-contained: style, script and figures
stand inside it, and it asks the network for nothing. Equal files give equal bytes. All text that came from
models, prompts or users is escaped. The figures are inline SVG at two widths (page and phone) whose page
colours are variables, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import html
import inspect
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from diagnostics.report import figures, summary, style, tokenview
from diagnostics.core import files
from diagnostics.report.summary import Material
from diagnostics.pipeline.run import hashes_of, read_manifest, write_pages
from diagnostics.report.tokenview import script_json, show
from diagnostics.core.types import DiagnosticsError, read_bank, read_parquet, validate_tokens

log = logging.getLogger("diagnostics")
STATIC = Path(__file__).parent / "static"
ROWS_WRITTEN = 60
"""Rows up to which a table is written out as HTML; longer ones are packed."""


WARNINGS_OPEN = 4
CONTEXTS = 24
"""Contexts that the page shows token by token."""


TABLES = {
    "verdicts": "Each claim against its interval, for both gains.",
    "warnings": "Where a conclusion would rest on too little.",
    "correlations": "Correlation of each gain with each criterion; estimate with interval, placebo beside it.",
    "placebo_excess": "The same minus the placebo's, paired.",
    "differences": "Paired differences between two criteria's correlations.",
    "partial": "Correlations given entropy, divergence and position.",
    "within_prompt": "Mean of the correlations within a prompt.",
    "quadrants": "Mean, median, trimmed and winsorised gain in each quadrant.",
    "positions": "Mean gain along the response.",
    "q3_contrast": "Within Q3: mean gain of the top group minus that of the bottom group.",
    "q3_groups": "Within Q3: mean gain of each third.",
    "matching": "Within Q3: the contrast between matched positions of one prompt.",
    "balance": "What was matched on, before and after, in standard deviations.",
    "matching_caliper": "The same with no pair further apart than the caliper.",
    "balance_caliper": "What those pairs were matched on, before and after.",
    "regressions": "Standardised coefficients of three models, cluster-robust.",
    "decomposition": "Difference of the coefficients of compatible and incompatible divergence.",
    "residual_curves": "Residual gain along each score.",
    "support_robustness": "The claims' statistics for each proxy and K.",
    "gain_robustness": "The claims' statistics under other forms of the gain.",
    "selection_curves": "Share of the gain captured at each budget.",
    "selection_summary": "Normalised area and enrichment.",
    "selection_overlap": "Jaccard index and rank correlation between criteria.",
    "selection_profile": "What each criterion selects.",
    "intervention": "One step a criterion and budget; drops in nats a position.",
    "offline_agreement": "Kendall's tau between the answers.",
    "offline_answers": "Value and rank of each criterion by every answer.",
    "linearity": "Realised against first-order gain by step size.",
    "kernel_shares": "Sources of the first-order gain by group.",
    "kernel": "Sources of the first-order gain at each sampled position.",
    "lift": "What each group's losses do for held-out prompts.",
    "validation_verdicts": "Claim C5 against each rival, and overall.",
    "validation_outcomes": "Every measure of every training, over seeds and prompts.",
    "validation_agreement": "Kendall's tau between what was foreseen and what was trained.",
    "validation_foreseen": "What was foreseen of each training, by every answer.",
    "validation_cells": "Every single training.",
    "evaluations": "The student on held-out prompts during training.",
    "training_metrics": "What training logged at each step.",
    "saturation": "Quantiles of every measurement and how much is clipped.",
    "coverage": "Prompts, positions and what clustering leaves of them.",
    "calibration": "Every step size that was tried; drops in nats a position of the step's loss.",
    "left_out": "What the columns did not allow.",
    "exactness": "What each measurement is worth with a teacher that is known by top-K lists alone.",
}
"""What each table holds, in the order of the page; others follow by name."""


def build(run_dir: str | Path, *, contexts: int = CONTEXTS) -> Path:
    """Draw the figures and write report.html and report.md from the files of a run directory.

    Reads DIR/manifest.json, DIR/tables/*.csv and, where they are there, DIR/tokens.parquet, DIR/contexts.parquet and
    DIR/tops.parquet; writes DIR/figures/*.png, *.pdf, DIR/report.html and DIR/report.md, each atomically, and their hashes
    into DIR/pages.json. contexts: how many are shown token by token, 0 for none. Returns the page's path. Raises
    DiagnosticsError where the manifest or every table is missing, a file cannot be read, or a page of such a name is not
    as this program wrote it.
    """
    directory = Path(run_dir)
    material = read_run(directory)
    drawn, left_out = draw_all(material)
    pages = {f"figures/{file}": content for name, pair in drawn.items() for file, content in figure_files(name, pair[0]).items()}
    pages["report.md"] = encoded(markdown(material, drawn, left_out))
    pages["report.html"] = encoded(page(material, drawn, left_out, contexts=contexts))
    write_pages(directory, pages)
    return directory / "report.html"


def encoded(text: str) -> bytes:
    """A page as UTF-8; a name that is no Unicode, as file systems allow, stands there escaped."""
    return text.encode("utf-8", "backslashreplace")


def read_run(directory: str | Path) -> Material:
    """A finished run's files, for a notebook or the report: `run = dx.read_run("reports/demo")` shows what it found.

    Returns a Material with the manifest, tables (by name), tokens, bank and likeliest tokens (None where the run has none).
    Needs neither torch nor a model. Raises DiagnosticsError where the manifest or every table is missing, or a file is damaged.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory / "manifest.json")
    reading = _Reading(directory, manifest)
    names = [name for name, kind in files.walk(directory, "tables") if name.endswith(".csv") and kind != "folder"]
    tables = {Path(name).stem: reading.read(name, _read_csv) for name in names if name.count("/") == 1}
    tables = {name: table for name, table in tables.items() if table is not None} | training_tables(directory, reading)
    if not tables:
        said = f" ({' '.join(reading.cautions)})" if reading.cautions else ""
        raise DiagnosticsError(f"{directory / 'tables'} holds no table{said}. Run `python -m diagnostics analyze --output-dir {directory}` first.")
    tokens = reading.read("tokens.parquet", lambda path: validate_tokens(read_parquet(path)))
    bank, tops = reading.read("contexts.parquet", read_bank), reading.read("tops.parquet", read_parquet)
    return Material(manifest, tables, tokens, bank, tops, tuple(reading.cautions))


class _Reading:
    """Files of a run, each compared with the manifest before it is read; what is not as it was written is left out and said."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]):
        self.directory, self.manifest, self.cautions = directory, manifest, []

    def say(self, sentence: str) -> None:
        """Keep a sentence for the page, and log it."""
        self.cautions.append(sentence)
        log.warning("%s: %s", self.directory, sentence)

    def read(self, name: str, reader: Callable[[Path], Any], *, ask: bool = True) -> Any:
        """What `reader` makes of a file; None where there is none, or it was changed. ask: whether a record is looked for."""
        digest, known = files.hash_inside(self.directory, name), hashes_of(self.manifest, name)
        if digest is None:
            return None
        if known and digest not in known:
            self.say(f"{name} is not as it was written and was left out of this page. Run the stage that writes it again.")
            return None
        if ask and not known:
            self.say(f"{name} is in no record of manifest.json, so nothing says what measured it.")
        return reader(self.directory / name)


def training_tables(directory: Path, reading: _Reading | None = None) -> dict[str, pd.DataFrame]:
    """What a training, or a grid of them, leaves beside its tables: evaluations, and the metrics of every step."""
    reading = reading or _Reading(directory, {"stages": {}})
    found = {"evaluations": reading.read("evaluations.csv", _read_csv, ask=False),
             "training_metrics": reading.read("metrics.jsonl", lambda path: _read_lines(path, reading.say), ask=False)}
    curves = []
    for name, kind in files.walk(reading.directory, "cells"):
        if name.endswith(".curve.parquet") and kind == "file":
            cell = _read_cell(reading.directory, name.removesuffix(".curve.parquet") + ".json")
            if cell is None:
                reading.say(f"{name} has no record of its training beside it and was left out.")
            else:
                curve = reading.read(name, read_parquet, ask=False)
                curves += [] if curve is None else [curve.assign(**cell)]
    found |= {"training_metrics": pd.concat(curves, ignore_index=True)} if curves else {}
    return {name: table for name, table in found.items() if table is not None}


def _read_cell(directory: Path, name: str) -> dict[str, Any] | None:
    """Which training a cell is, from its record; None where there is no readable record."""
    try:
        record = json.loads(files.read_inside(directory, name))
    except (OSError, ValueError, RecursionError):
        return None
    cell = record.get("cell") if isinstance(record, dict) else None
    return cell if isinstance(cell, dict) else None


def _read_lines(path: Path, say: Callable[[str], None]) -> pd.DataFrame:
    """Metrics line by line; what a killed process had begun to write, or is no object, is left out and counted."""
    rows, broken = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row, broken = None, broken + 1
        rows += [row] if isinstance(row, dict) else []
    if broken:
        say(f"{path.name} has {broken} {'line' if broken == 1 else 'lines'} cut by a kill or damaged, which were left out.")
    return pd.DataFrame(rows)


def _read_manifest(path: Path) -> dict[str, Any]:
    if (found := files.kind(path)) not in ("file", None):
        raise files.unfit(path, found, "file")
    try:
        return read_manifest(path)
    except DiagnosticsError as error:
        said = str(error).replace("Choose another --output-dir, or remove that file.", "Name the --output-dir of an earlier run.")
        unread = "cannot be read as a manifest" if error.__cause__ is not None else "is not a manifest of this project"
        raise DiagnosticsError(said.replace("is not a manifest of this project", unread)) from error


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (OSError, ValueError) as error:
        raise DiagnosticsError(f"{path} cannot be read as CSV ({str(error).splitlines()[0]}). Run the analyze stage again.") from error


# --- figures ----------------------------------------------------------------------------------------


def draw_all(material: Material) -> tuple[dict[str, tuple[Figure, Figure]], dict[str, str]]:
    """Every figure at page and at phone width, and for each one that could not be drawn the reason."""
    drawn, left_out = {}, {}
    for sheet in figures.FIGURES.values():
        table = material.tokens if sheet.table == "tokens" else material.table(sheet.table)
        reason = _not_drawn(material, sheet, table)
        if reason:
            left_out[sheet.name] = reason
            continue
        try:
            options = {argument: material.table(name) for argument, name in sheet.arguments.items()}
            options |= {"level": material.level} if "level" in inspect.signature(sheet.draw).parameters else {}
            drawn[sheet.name] = tuple(sheet.draw(table, width=width, **options) for width in (figures.DOUBLE, figures.SINGLE))
        except DiagnosticsError as error:
            left_out[sheet.name] = str(error)
    return drawn, left_out


def _not_drawn(material: Material, sheet: figures.FigureSpec, table: pd.DataFrame | None) -> str:
    """Why a figure cannot be drawn; empty where it can."""
    lacking = [sheet.table] if table is None else [name for name in sheet.with_tables if material.table(name) is None]
    if lacking:
        return f"no table {lacking[0]}"
    absent = [name for name in sheet.needs if name not in table]
    return f"no column {absent[0]} in the {sheet.table} table" if absent else ""


def figure_files(name: str, figure: Figure) -> dict[str, bytes]:
    """The figure as PNG (200 dpi) and PDF, without dates, so that equal tables give equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return {f"{name}.pdf": buffer.getvalue(), f"{name}.png": png(figure)}


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG of 256 colours: a third of the size of a full one, and no difference to see."""
    before, buffer = figure.dpi, io.BytesIO()
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    figure.set_dpi(before)
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", dpi=(dpi, dpi))
    return buffer.getvalue()


def _is_mesh(artist) -> bool:
    return isinstance(artist, QuadMesh) or (isinstance(artist, PolyCollection) and len(artist.get_offsets()) > 50)


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element: own ids, page colours as variables, meshes of many cells as a bitmap.

    Text stays text, to be searched and read aloud; the page names its fonts.
    """
    for mesh in figure.findobj(_is_mesh):
        mesh.set_rasterized(True)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", dpi=160, transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in used else "", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r"\n\s*", "\n", text).replace("<g/>\n", "")
    text = re.sub(r"font-family: 'DejaVu Sans'; | transform=\"rotate\(-0 [^\"]*\"", "", text)
    text = re.sub(r"(?<![\d.#])([1-9]\d*\.\d{2})\d+", r"\1", text)
    for variable, color in style.LIGHT.items():
        text = text.replace(color.lower(), f"var(--{variable})")
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', text, count=1)


# --- the page ---------------------------------------------------------------------------------------


def page(
    material: Material, drawn: Mapping[str, tuple[Figure, Figure]], left_out: Mapping[str, str], *, contexts: int = CONTEXTS
) -> str:
    """The whole page as one string of HTML, with the first `contexts` as tokens."""
    sections = [
        ("verdicts", "Verdicts", verdict_cards(material)),
        ("warnings", "Warnings", warning_list(material)),
        ("figures", "Figures", "".join(_figure(sheet, drawn[sheet.name]) for sheet in figures.FIGURES.values() if sheet.name in drawn)),
        ("tokens", "Tokens", token_view(material, contexts)),
        ("tables", "Tables", "".join(table_block(name, material.tables[name]) for name in _table_order(material))),
        ("methods", "Methods", METHODS),
        ("provenance", "Provenance", provenance(material)),
        ("not-run", "What was not run", not_run(material, left_out)),
    ]
    lead = "".join(f"<p><b>{question}</b> {html.escape(text)}</p>" for question, text in summary.answer(material).items())
    return shell(summary.title(material), _over(material), lead, sections, tokens=True)


def shell(title: str, over: str, lead: str, sections: Iterable[tuple[str, str, str]], *, tokens: bool = False) -> str:
    """A self-contained page: title, lead (HTML), links to its sections (id, heading, HTML), of which empty ones are left out."""
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in sections)
    style = _static("report.css") + (tokenview.style() if tokens else "")
    script = _static("report.js") + (tokenview.script() if tokens else "")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="referrer" content="no-referrer"><title>{html.escape(title)}</title>\n<style>\n{style}</style></head>\n<body><main>'
        f'<header>{over}<h1>{html.escape(title)}</h1><div class="answer">{lead}</div><nav>{links}</nav></header>\n{body}</main>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _over(material: Material) -> str:
    names, version = summary.models(material), material.manifest.get("versions", {}).get("opd-diagnostics", "")
    parts = [f"opd-diagnostics {version}".strip()] + [f"{role} {name}" for role, name in names.items() if name not in (role, "custom")]
    return f'<p class="over">{html.escape(" · ".join(parts))}</p>'


def verdict_cards(material: Material) -> str:
    """One card a claim with both gains side by side, then C5 by measure; empty where the run has no verdicts."""
    shown, more = summary.claims(material)
    if shown.empty:
        return ""
    cards = "".join(_card(claim, rows.to_dict("records")) for claim, rows in shown.groupby("claim", sort=False))
    note = '<p class="quiet">The same claims on step and held-out positions apart: table verdicts.</p>' if more else ""
    return f'<ul class="cards">{cards}</ul>{note}'


VERDICTS = ("supported", "refuted", "inconclusive")


def _card(claim: str, rows: list[dict]) -> str:
    statement = rows[0].get("statement")
    heading = f"{claim}: {statement}" if isinstance(statement, str) else str(claim)
    return f'<li class="card {_agreed(rows)}"><h3>{html.escape(heading)}</h3>{"".join(map(_look, rows))}</li>'


def _agreed(rows: list[dict]) -> str:
    """The verdict of all of a card's rows, inconclusive where they differ."""
    verdicts = {str(row["verdict"]) for row in rows}
    only = verdicts.pop() if len(verdicts) == 1 else ""
    return only if only in VERDICTS else "inconclusive"


def _look(row: dict) -> str:
    verdict, outcome, sentence = str(row["verdict"]), row.get("outcome"), row.get("sentence")
    named = f"{style.OUTCOMES.get(outcome) or summary.MEASURES.get(outcome, outcome)}: " if isinstance(outcome, str) else ""
    kind = verdict if verdict in VERDICTS else "inconclusive"
    return (f'<p>{html.escape(named)}<span class="verdict {kind}">{html.escape(verdict)}</span></p>'
            f'<p class="quiet">{html.escape(sentence if isinstance(sentence, str) else "")}</p>')


def warnings(material: Material) -> list[str]:
    """What reading the run and its analysis warn of."""
    table = material.table("warnings")
    return [*material.cautions, *([] if table is None or "message" not in table else table.message.astype(str).tolist())]


def warning_list(material: Material) -> str:
    """The warnings as paragraphs; those beyond a handful folded away."""
    lines = [f'<p class="warning">{html.escape(message)}</p>' for message in warnings(material)]
    first, rest = lines[:WARNINGS_OPEN], lines[WARNINGS_OPEN:]
    return "".join(first) + (f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else "")


def token_view(material: Material, contexts: int) -> str:
    """The first contexts token by token; empty where the run has no contexts, or none are wanted."""
    if material.bank is None or material.tokens is None or not contexts:
        return ""
    color = "gain" if "gain" in material.tokens else "forward_kl"
    shown = range(min(contexts, len(material.bank)))
    return show(material.bank, material.tokens, list(shown), color=color, tops=material.tops).fragment


def _figure(sheet: figures.FigureSpec, plates: tuple[Figure, Figure]) -> str:
    wide, narrow = (inline_svg(plate, f"{sheet.name}-{size}") for plate, size in zip(style, ("wide", "narrow"), strict=True))
    return (f'<figure id="figure-{sheet.name}"><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
            f"<figcaption><b>{html.escape(sheet.title)}</b> {html.escape(sheet.reading)} "
            f"<code>figures/{sheet.name}.pdf</code></figcaption></figure>")


def _table_order(material: Material) -> list[str]:
    names = [name for name in material.tables if material.table(name) is not None]
    return [name for name in TABLES if name in names] + [name for name in names if name not in TABLES]


def table_block(name: str, table: pd.DataFrame) -> str:
    """A folded table; long ones are packed, and built by the page's script when they are opened."""
    head = "".join(f'<th scope="col"><button type="button">{html.escape(str(column))}</button></th>' for column in table.columns)
    if len(table) <= ROWS_WRITTEN:
        rows, packed = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.itertuples(index=False)), ""
    else:
        rows, packed = "", f'<script type="application/json">{_packed(table)}</script>'
    return (f'<details id="table-{html.escape(name)}"><summary><b>{html.escape(name)}</b> {html.escape(TABLES.get(name, ""))} '
            f'<span class="quiet">{len(table):,} rows; tables/{html.escape(name)}.csv</span></summary>'
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
            f'<button type="button" class="copy">Copy as CSV</button>{packed}</details>')


def _cell(value: Any) -> str:
    """A number rounded to four digits, with six beside it for sorting and copying."""
    if isinstance(value, float):
        if pd.isna(value):
            return '<td class="number" data-v=""></td>'
        return f'<td class="number" data-v="{value:.6g}">{summary.number(value, 4) if value != int(value) else f"{value:,.0f}"}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number" data-v="{value}">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _packed(table: pd.DataFrame) -> str:
    """Columns as JSON: numbers with six digits, null where undefined; text as distinct values and an index."""
    columns: list[Any] = []
    for name in table:
        values = table[name]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            columns.append([None if pd.isna(value) else float(f"{value:.6g}") if value != int(value) else int(value) for value in values])
        else:
            codes, texts = pd.factorize(values.astype(str))
            columns.append({"texts": list(texts), "codes": codes.tolist()})
    return script_json(columns)


def provenance(material: Material) -> str:
    """The manifest as tables: versions first, then each stage's settings, facts, inputs and files."""
    parts = [("Versions", material.manifest.get("versions", {}))]
    for name, stage in material.manifest.get("stages", {}).items():
        parts += [(f"Stage {name}: {part}", stage.get(part)) for part in ("settings", "facts", "inputs", "files")]
    other = {key: value for key, value in material.manifest.items() if key not in ("versions", "stages")}
    return "".join(f"<h3>{html.escape(heading)}</h3>{_facts(values)}" for heading, values in [*parts, ("Manifest", other)] if values)


def _facts(values: Mapping[str, Any]) -> str:
    pairs = ((html.escape(key), html.escape(text)) for key, text in _flat(values))
    rows = "".join(f'<tr><th scope="row">{key}</th><td><code>{text}</code></td></tr>' for key, text in pairs)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


PARTS = {
    "verdicts": "verdicts on the claims C1 to C4",
    "regressions": "the decomposition into compatible and incompatible divergence",
    "selection_curves": "captured gain by budget",
    "intervention": "the step with only the selected positions carrying loss, at matched norm",
    "kernel_shares": "the split of each gain into its own position's share and others'",
    "validation_outcomes": "training runs (claim C5); a one-step gain does not stand in for them",
}
"""Parts of the study that a run may lack, by the table that would hold them."""


def missing(material: Material, left_out: Mapping[str, str]) -> list[str]:
    """Sentences on what the reader should not look for here: parts of the study, parts of tables, figures."""
    lines = [text[0].upper() + text[1:] + "." for name, text in PARTS.items() if material.table(name) is None]
    table = material.table("left_out")
    if table is not None:
        lines += [f"{row.table}, {row.what}: {row.why}." for row in table.itertuples()]
    drawable = {sheet.name: sheet for sheet in figures.FIGURES.values() if sheet.table == "tokens" or material.table(sheet.table) is not None}
    lines += [f"Figure “{drawable[name].title}”: {reason.rstrip('.')}." for name, reason in left_out.items() if name in drawable]
    return lines


def not_run(material: Material, left_out: Mapping[str, str]) -> str:
    """`missing` as a list."""
    lines = missing(material, left_out)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if lines else "<p>Nothing: every part of the study has its table.</p>"


# --- markdown ---------------------------------------------------------------------------------------


def markdown(material: Material, drawn: Mapping[str, tuple[Figure, Figure]], left_out: Mapping[str, str]) -> str:
    """The report for a repository's page: answer, verdicts, figures as links, what was not run, provenance in short."""
    blocks = [f"# {_plain(summary.title(material))}", *(f"**{question}** {_plain(text)}" for question, text in summary.answer(material).items()),
              *_verdict_rows(material)]
    blocks += [f"> {_plain(message)}" for message in warnings(material)]
    for sheet in figures.FIGURES.values():
        if sheet.name in drawn:
            blocks += [f"## {sheet.title}", f"![{sheet.title}](figures/{sheet.name}.png)", sheet.reading]
    blocks += ["## What was not run", "\n".join(f"- {_plain(line)}" for line in missing(material, left_out)) or "Nothing."]
    versions = ", ".join(f"{name} {version}" for name, version in material.manifest.get("versions", {}).items())
    blocks += ["## Provenance", _plain(f"{versions}. Settings, models and the sha256 of each file: manifest.json; every number: tables/*.csv.")]
    return "\n\n".join(blocks) + "\n"


def _verdict_rows(material: Material) -> list[str]:
    shown, _ = summary.claims(material)
    if not {"claim", "outcome", "verdict", "sentence"} <= set(shown.columns):
        return []
    cells = shown[["claim", "outcome", "verdict", "sentence"]].astype(str).map(_plain)
    rows = [f"| {' | '.join(row)} |" for row in cells.itertuples(index=False)]
    return ["\n".join(["| claim | by | verdict | why |", "|---|---|---|---|", *rows])]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


# --- methods ----------------------------------------------------------------------------------------

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
