"""The run directory as one page to send: tables, figures and manifest in, report.html and figures/* out.

Rebuilt from files alone, without torch or a model. The page is self-contained: style, script and figures
stand inside it, and it asks the network for nothing. Equal files give equal bytes. All text that came from
models, prompts or users is escaped. The figures are inline SVG at two widths (page and phone) whose page
colours are variables, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import functools
import html
import inspect
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure

from diagnostics import figures, narrative, plates
from diagnostics.narrative import Material
from diagnostics.runs import write_atomic
from diagnostics.types import DiagnosticsError, read_tokens

STATIC = Path(__file__).parent / "static"
ROWS_SHOWN = 1000
"""Rows of a table that the page shows; the CSV file has them all."""


@dataclass(frozen=True)
class Sheet:
    """One figure of the report."""

    name: str
    title: str
    table: str
    """Table it is drawn from; `tokens` is the token table."""
    draw: Callable[..., Figure]
    reading: str
    """How to read it."""
    needs: tuple[str, ...] = ()
    """Columns without which there is nothing to draw."""


CORE = ("entropy", "divergence", "reverse_divergence", "compatibility", "teachability", "incompatible", "tip", "random")
"""Criteria of the first figure; the table has them all."""

SHEETS = (
    Sheet("correlations", "Which criterion follows the gain?", "correlations", functools.partial(figures.correlations, criteria=CORE),
          "Left the gain in nats, right the gain relative to the divergence before the step. A filled mark is the rank "
          "correlation with its interval, a hollow diamond what a random step of the same norm shows: mechanical coupling "
          "alone. A criterion speaks where its interval clears its own diamond. Held-out contexts carried no loss, so what "
          "they show is spill-over."),
    Sheet("entropy_divergence", "Where compatible signals and gains lie", "tokens", figures.entropy_divergence,
          "Every hexagon is the mean over the positions that fall into it; left the teacher's mass on the student's top K, "
          "right the gain. Upper left is Q3: the student is confident and the teacher disagrees. If teachability is right, "
          "gains there should sit where compatibility is high.", ("compatibility", "gain")),
    Sheet("q3_gain", "Gain within Q3, from the bottom to the top of each score", "q3_groups", figures.q3_gain,
          "Each group of marks runs from the third of Q3 with the lowest score to the third with the highest. A line that rises "
          "with compatibility says that, among confident errors, those within the student's reach gained more."),
    Sheet("calibration", "How linear the step was", "calibration", figures.calibration,
          "Left the drop of the step's own loss, predicted by the slope and realised; right their ratio. The chosen step is the "
          "largest tried that keeps at least four fifths of the prediction. Far to the right the loss rises again, and gains "
          "measured there say nothing about the signal."),
)

TABLES = {
    "verdicts": "Each claim against its interval, for both gains.",
    "warnings": "Where a conclusion would rest on too little.",
    "correlations": "Correlation of each gain with each criterion; estimate with interval, placebo beside it.",
    "differences": "Paired differences between two criteria's correlations.",
    "q3_contrast": "Within Q3: mean gain of the top group minus that of the bottom group.",
    "q3_groups": "Within Q3: mean gain of each group.",
    "calibration": "Every step size that was tried; drops in nats a position of the step's loss.",
}
"""What each table holds, in the order of the page; others follow by name."""


def build(run_dir: str | Path) -> Path:
    """Draw the figures and write report.html from the files of a run directory.

    Reads DIR/manifest.json, DIR/tables/*.csv and, where it is there, DIR/tokens.parquet; writes
    DIR/figures/*.png, *.pdf and DIR/report.html, each atomically. Returns the page's path. Raises
    DiagnosticsError where the manifest or every table is missing, or a file cannot be read.
    """
    directory = Path(run_dir)
    material = read_material(directory)
    drawn, left_out = draw_all(material)
    for name, plates in drawn.items():
        write_files(directory / "figures", name, plates[0])
    return write_atomic(directory / "report.html", page(material, drawn, left_out).encode())


def read_material(directory: Path) -> Material:
    """Everything that the report is made of. Raises DiagnosticsError where it is missing or damaged."""
    manifest = _read_manifest(directory / "manifest.json")
    tables = {path.stem: _read_csv(path) for path in sorted((directory / "tables").glob("*.csv"))}
    if not tables:
        raise DiagnosticsError(f"{directory / 'tables'} holds no table. Run `python -m diagnostics analyze --output-dir {directory}` first.")
    tokens = directory / "tokens.parquet"
    return Material(manifest, tables, read_tokens(tokens) if tokens.exists() else None)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DiagnosticsError(f"{path} cannot be read as a manifest ({reason}). Name the --output-dir of an earlier run.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
        raise DiagnosticsError(f"{path} is not a manifest of this project (no stages). Name the --output-dir of an earlier run.")
    return manifest


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
    for sheet in SHEETS:
        table = material.tokens if sheet.table == "tokens" else material.table(sheet.table)
        missing = [] if table is None else [name for name in sheet.needs if name not in table]
        if table is None or missing:
            left_out[sheet.name] = f"no column {missing[0]} in the {sheet.table} table" if missing else f"no table {sheet.table}"
            continue
        try:
            options = {"level": material.level} if "level" in inspect.signature(sheet.draw).parameters else {}
            drawn[sheet.name] = tuple(sheet.draw(table, width=width, **options) for width in (figures.DOUBLE, figures.SINGLE))
        except DiagnosticsError as error:
            left_out[sheet.name] = str(error)
    return drawn, left_out


def write_files(folder: Path, name: str, figure: Figure) -> None:
    """The figure as PNG (200 dpi) and PDF, without dates, so that equal tables give equal files."""
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
        write_atomic(folder / f"{name}.{kind}", buffer.getvalue())


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element: own ids, page colours as variables, meshes of many cells as a bitmap.

    Glyphs keep their font's ids, which are the same in all figures; `share_glyphs` moves them together.
    """
    for mesh in figure.findobj(lambda artist: isinstance(artist, (PolyCollection, QuadMesh))):
        mesh.set_rasterized(True)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=160, transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in used else "", text)
    text = re.sub(r'\bid="(?!DejaVu)([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#(?!DejaVu)([^"]+)"', rf'href="#{name}-\1"', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r"\n\s*", "\n", text)
    for variable, color in plates.LIGHT.items():
        text = text.replace(color.lower(), f"var(--{variable})")
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', text, count=1)


def share_glyphs(content: str) -> str:
    """The same HTML with every glyph of its SVGs once, in an invisible SVG at its head."""
    glyph = re.compile(r'<path id="(DejaVu[^"]+)"[^>]*/>')
    shapes = {match.group(1): re.sub(r"\s+", " ", match.group(0)) for match in glyph.finditer(content)}
    sheet = "".join(shapes[name] for name in sorted(shapes))
    return f'<svg class="glyphs" width="0" height="0" aria-hidden="true"><defs>{sheet}</defs></svg>{glyph.sub("", content)}'


# --- the page ---------------------------------------------------------------------------------------


def page(material: Material, drawn: Mapping[str, tuple[Figure, Figure]], left_out: Mapping[str, str]) -> str:
    """The whole page as one string of HTML."""
    sections = [
        ("verdicts", "Verdicts", verdict_cards(material)),
        ("figures", "Figures", share_glyphs("".join(_figure(sheet, drawn[sheet.name]) for sheet in SHEETS if sheet.name in drawn))),
        ("tables", "Tables", "".join(_table(name, material.tables[name]) for name in _table_order(material))),
        ("methods", "Methods", METHODS),
        ("provenance", "Provenance", provenance(material)),
        ("not-run", "What was not run", not_run(material, left_out)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in sections)
    title, style, script = html.escape(narrative.title(material)), _static("report.css"), _static("report.js")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="referrer" content="no-referrer"><title>{title}</title>\n<style>\n{style}</style></head>\n<body><main>'
        f"<header>{_over(material)}<h1>{title}</h1>"
        f'<div class="answer">{"".join(f"<p>{html.escape(sentence)}</p>" for sentence in narrative.answer(material))}</div>'
        f"<nav>{links}</nav></header>\n{body}</main>\n<script>\n{script}</script></body></html>\n"
    )


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _over(material: Material) -> str:
    names, version = narrative.models(material), material.manifest.get("versions", {}).get("opd-diagnostics", "")
    parts = [f"opd-diagnostics {version}".strip()] + [f"{role} {name}" for role, name in names.items() if name not in (role, "custom")]
    return f'<p class="over">{html.escape(" · ".join(parts))}</p>'


def verdict_cards(material: Material) -> str:
    """One card a claim and gain, with its sentence; empty where the run has no verdicts."""
    table = material.table("verdicts")
    if table is None or not {"claim", "verdict"} <= set(table.columns):
        return ""
    return f'<ul class="cards">{"".join(_card(row) for row in table.to_dict("records"))}</ul>'


def _card(row: dict) -> str:
    verdict = str(row["verdict"])
    kind = verdict if verdict in ("supported", "refuted", "inconclusive") else "inconclusive"
    outcome = f" · {plates.OUTCOMES.get(row['outcome'], row['outcome'])}" if isinstance(row.get("outcome"), str) else ""
    sentence = row.get("sentence") if isinstance(row.get("sentence"), str) else ""
    return (f'<li class="card {kind}"><h3>{html.escape(str(row["claim"]) + outcome)}</h3>'
            f'<span class="verdict">{html.escape(verdict)}</span><p>{html.escape(sentence)}</p></li>')


def _figure(sheet: Sheet, plates: tuple[Figure, Figure]) -> str:
    wide, narrow = (inline_svg(plate, f"{sheet.name}-{size}") for plate, size in zip(plates, ("wide", "narrow"), strict=True))
    return (f'<figure id="figure-{sheet.name}"><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
            f"<figcaption><b>{html.escape(sheet.title)}</b> {html.escape(sheet.reading)} "
            f"<code>figures/{sheet.name}.pdf</code></figcaption></figure>")


def _table_order(material: Material) -> list[str]:
    names = [name for name in material.tables if material.table(name) is not None]
    return [name for name in TABLES if name in names] + [name for name in names if name not in TABLES]


def _table(name: str, table: pd.DataFrame) -> str:
    shown = table.head(ROWS_SHOWN)
    note = f"{len(table):,} rows" + (f", the first {ROWS_SHOWN:,} shown" if len(table) > ROWS_SHOWN else "")
    head = "".join(f'<th scope="col"><button type="button">{html.escape(str(column))}</button></th>' for column in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in shown.itertuples(index=False))
    return (f'<details id="table-{html.escape(name)}"><summary><b>{html.escape(name)}</b> {html.escape(TABLES.get(name, ""))} '
            f'<span class="quiet">{note}; tables/{html.escape(name)}.csv</span></summary>'
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
            f'<button type="button" class="copy">Copy as CSV</button></details>')


def _cell(value: Any) -> str:
    """A number rounded to four digits, with the full value beside it for sorting and copying."""
    if isinstance(value, float):
        if pd.isna(value):
            return '<td class="number" data-v=""></td>'
        text = narrative.number(value, 4) if value != int(value) or abs(value) >= 1e6 else f"{value:.0f}"
        return f'<td class="number" data-v="{value!r}">{text}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number" data-v="{value}">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def provenance(material: Material) -> str:
    """The manifest as tables: versions first, then each stage's settings, facts, inputs and files."""
    parts = [("Versions", material.manifest.get("versions", {}))]
    for name, stage in material.manifest.get("stages", {}).items():
        parts += [(f"Stage {name}: {part}", stage.get(part)) for part in ("settings", "facts", "inputs", "files")]
    other = {key: value for key, value in material.manifest.items() if key not in ("versions", "stages")}
    return "".join(f"<h3>{html.escape(heading)}</h3>{_facts(values)}" for heading, values in [*parts, ("Manifest", other)] if values)


def _facts(values: Mapping[str, Any]) -> str:
    rows = "".join(f'<tr><th scope="row">{html.escape(key)}</th><td><code>{html.escape(text)}</code></td></tr>' for key, text in _flat(values))
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


PARTS = {
    "verdicts": "verdicts on the claims C1 to C4",
    "differences": "paired differences between criteria",
    "regressions": "the decomposition into compatible and incompatible divergence",
    "selection_curves": "captured gain by budget",
    "intervention": "the step with only the selected positions carrying loss, at matched norm",
    "attribution": "the split of each gain into its own token's share and others'",
    "training": "training runs (claim C5); a one-step gain does not stand in for them",
    "validation": "the comparison of the probe's ranking with training",
}
"""Parts of the study that a run may lack, by the table that would hold them."""


def not_run(material: Material, left_out: Mapping[str, str]) -> str:
    """What the reader should not look for here: stages and tables that this run lacks, figures left out and why."""
    absent = [text for name, text in PARTS.items() if material.table(name) is None]
    titles = {sheet.name: sheet.title for sheet in SHEETS}
    lines = [html.escape(text[0].upper() + text[1:] + ".") for text in absent]
    lines += [f"Figure “{html.escape(titles[name])}”: {html.escape(reason)}." for name, reason in left_out.items()]
    return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else "<p>Nothing: every part of the study has its table.</p>"


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
