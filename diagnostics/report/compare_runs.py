"""Several runs side by side: pairs, K, losses or seeds.

    comparison = dx.compare_runs(["reports/demo", "reports/smollm2"])
    comparison.settings                      # what differs between them
    comparison.tables["correlations"]        # one table with a column run
    comparison.save("reports/compare.html")  # one self-contained page

Nothing is pooled and nothing is tested across runs: each keeps its own interval, over its own
prompts."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic
from diagnostics.core.inputs import several
from diagnostics.core.run_lock import hold
from diagnostics.core.shown import sizes
from diagnostics.report import figures, lead, naming, page, run_results, summary, svg
from diagnostics.report.figures.registry import CORE
from diagnostics.report.page_tables import table_block
from diagnostics.report.run_results import RunResults
from diagnostics.report.run_tables import RunTables
from diagnostics.report.written_pages import encoded, write_pages

SHARED = {
    "decision": ("criterion", "budget", "horizon", "measure", "rollouts"),
    "correlations": ("outcome", "criterion", "split", "method"),
    "selection_summary": ("outcome", "criterion", "split", "statistic", "budget"),
    "q3_contrast": ("outcome", "split", "score", "groups"),
    "decomposition": ("outcome", "split", "winsorised", "scale"),
    "verdicts": ("claim", "kind", "outcome", "population"),
    "validation_verdicts": ("claim", "measure", "rival"),
    "validation_outcomes": ("criterion", "budget", "measure"),
}
"""Tables that are set side by side, with the columns that name a row."""


@dataclass(frozen=True)
class RunComparison:
    """Several runs; shows itself in a notebook as what differs and what was found."""

    runs: Mapping[str, RunResults]
    """What each run directory holds, by the name of the run."""
    tables: Mapping[str, pd.DataFrame]
    """Tables that at least two runs have, with a column run in front."""
    settings: pd.DataFrame
    """Settings and models that differ, one column per run."""

    @property
    def verdicts(self) -> pd.DataFrame:
        """Verdict of each claim by the paper's and the controlled statistic and each outcome, one
        column per run.
        """
        names = ["claim", "kind", "outcome", "verdict"]
        found = {name: summary.claims(run)[0] for name, run in self.runs.items()}
        frames = [
            table.reindex(columns=names).assign(run=run)
            for run, table in found.items()
            if {"claim", "outcome", "verdict"} <= set(table)
        ]
        if not frames:
            return pd.DataFrame()
        table = pd.concat([frame.astype(object).fillna("") for frame in frames], ignore_index=True)
        key = ["claim", "kind", "outcome"]
        table = table.drop_duplicates([*key, "run"])
        key = key if (table.kind != "").any() else ["claim", "outcome"]
        wide = table.pivot(index=key, columns="run", values="verdict")
        return wide.reindex(columns=list(self.runs)).astype(object).fillna("–")

    @property
    def html(self) -> str:
        """All of it as one self-contained page."""
        lead = "".join(
            f"<p><b>{html.escape(name)}.</b> {html.escape(_finding(run))}</p>"
            for name, run in self.runs.items()
        )
        lead += "".join(
            f'<p class="warning">{html.escape(f"{name}: {note}")}</p>'
            for name, run in self.runs.items()
            for note in run.reading_notes
        )
        sections = [
            ("verdicts", "Verdicts", _grid(self.verdicts, "verdict")),
            (
                "settings",
                "What differs",
                _grid(self.settings, "setting") or "<p>No setting that the manifests record.</p>",
            ),
            ("figures", "Figures", "".join(_figure(*drawn) for drawn in self.drawings())),
            (
                "tables",
                "Tables",
                "".join(table_block(name, table) for name, table in self.tables.items()),
            ),
        ]
        return page.shell(f"{len(self.runs)} runs side by side", "", lead, sections)

    def drawings(self) -> Iterable[tuple[str, str, Figure, Figure]]:
        """Name, caption, and the figure for a page and for a phone, for each table that can be
        drawn.
        """
        for name, table, options, caption in _drawable(self.tables):
            table = table.assign(
                run=table["run"].str.replace("$", r"\$")
            )  # a folder's name is no formula
            yield (
                name,
                caption,
                *(
                    figures.runs(table, width=width, **options)
                    for width in (figures.DOUBLE, figures.SINGLE)
                ),
            )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, atomically."""
        return write_atomic(path, encoded(self.html))

    def __repr__(self) -> str:
        return sizes(f"Comparison of {', '.join(self.runs)}; tables (rows)", self.tables)

    def _repr_html_(self) -> str:
        blocks = {"What differs": self.settings, "Verdicts": self.verdicts}
        return "".join(
            f"<h4>{title}</h4>{table.to_html()}" for title, table in blocks.items() if len(table)
        )


def compare_runs(
    directories: Sequence[str | Path], *, names: Sequence[str] | None = None
) -> RunComparison:
    """Set finished runs side by side.

    Args:
        directories: Two or more run directories, each with manifest.json and tables/*.csv.
        names: A name for each run; the shortest endings of the paths that tell them apart where
            None.

    Returns:
        The settings that differ, the verdicts, and the tables that at least two runs have, each
        with a column `run` in front. In a notebook it shows itself; `save` writes one
        self-contained page.

    Raises:
        DiagnosticsError: There are fewer than two directories, names repeat, or a directory is not
            a finished run.
    """
    paths = [Path(directory) for directory in several(directories)]
    names = list(names) if names is not None else folder_names(paths)
    if len(paths) < 2 or len(names) != len(paths) or len(set(names)) != len(names):
        raise DiagnosticsError(
            f"A comparison needs two or more runs, each with a name of its own; got {len(paths)}"
            f" and the names {', '.join(map(str, names)) or 'none'}. Name more directories, or pass"
            " names=[…]."
        )
    runs = {str(name): run_results.read_run(path) for name, path in zip(names, paths, strict=True)}
    return RunComparison(runs, dict(_joined(runs)), _differences(runs))


def write(directories: Sequence[str | Path], into: Path) -> Path:
    """Write compare.html into a folder, and its hash into pages.json there.

    Args:
        directories: Two or more run directories.
        into: The folder; it may be a run directory or any other.

    Returns:
        The path of compare.html.

    Raises:
        DiagnosticsError: A directory is not a finished run, another process uses the folder, or a
            compare.html stands there that is not as this program wrote it.
    """
    content = encoded(compare_runs(directories).html)
    with hold(into):
        write_pages(into, {"compare.html": content})
    return into / "compare.html"


def folder_names(paths: list[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]


def _joined(runs: Mapping[str, RunResults]) -> Iterable[tuple[str, pd.DataFrame]]:
    for name in SHARED:
        found = {
            label: run.table(name) for label, run in runs.items() if run.table(name) is not None
        }
        if len(found) > 1:
            joined = pd.concat(
                [table.assign(run=label) for label, table in found.items()], ignore_index=True
            )
            yield name, joined[["run", *(column for column in joined if column != "run")]]


def _differences(runs: Mapping[str, RunResults]) -> pd.DataFrame:
    """Settings and model facts whose value is not the same in all runs, a dash where a run has
    none.
    """
    flat = {name: dict(_settings(run.manifest)) for name, run in runs.items()}
    table = pd.DataFrame(flat, dtype=object).fillna("–")
    return table[table.nunique(axis=1) > 1].rename_axis("setting")


def _settings(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for stage, record in manifest.get("stages", {}).items():
        for name, value in record.get("settings", {}).items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield _unicode(f"{stage}: {name}"), _unicode(shown)
    facts = summary.models(RunTables(manifest))
    yield from ((f"model: {role}", name) for role, name in facts.items())


def _unicode(text: str) -> str:
    """Half a surrogate pair, as JSON may hold one, written out: no table takes it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _finding(run: RunResults) -> str:
    """The decision and the paragraphs that compare signals, as far as the run has them."""
    parts = (summary.signals, summary.trained)
    parts = parts if run.table("decision") is None else (lead.decided, *parts)
    return " ".join(text for part in parts if (text := part(run))) or summary.title(run)


def _drawable(
    tables: Mapping[str, pd.DataFrame],
) -> Iterable[tuple[str, pd.DataFrame, dict[str, Any], str]]:
    """Table, options of `figures.runs` and caption for each figure that the tables allow."""
    for name, where, options, caption in (
        (
            "correlations",
            {"method": "spearman", "criterion": CORE},
            {},
            "Rank correlation of each criterion with the gain and the context gain, in each run.",
        ),
        (
            "selection_summary",
            {"statistic": "area", "criterion": CORE},
            {"label": "normalised area"},
            (
                "Area between a criterion's curve of captured gain and random selection's: 0 is"
                " random, 1 the oracle."
            ),
        ),
        (
            "q3_contrast",
            {"groups": "tertile"},
            {"key": "score", "value": "difference", "label": "tertile_difference"},
            "Top minus bottom third of each score within Q3.",
        ),
    ):
        if name not in tables:
            continue
        table = tables[name]
        for column, wanted in where.items():
            table = table[table[column].isin([wanted] if isinstance(wanted, str) else wanted)]
        parts = [
            rows[rows.split == naming.preferred_split(rows)]
            for _, rows in table.groupby("run", sort=False)
        ]
        if len(parts) > 1:
            yield name, pd.concat(parts, ignore_index=True), options, caption


def _figure(name: str, caption: str, wide: Figure, narrow: Figure) -> str:
    widths = {"wide": wide, "narrow": narrow}
    drawings = "".join(
        f'<div class="{size}">{svg.inline_svg(figure, f"{name}-{size}")}</div>'
        for size, figure in widths.items()
    )
    text = html.escape(f"{caption} Every run has its own prompts and its own intervals.")
    return f'<figure id="figure-{name}">{drawings}<figcaption>{text}</figcaption></figure>'


def _grid(table: pd.DataFrame, kind: str) -> str:
    """A small table with one column per run."""
    if table.empty:
        return ""
    buffer = io.StringIO()
    head = "".join(
        f'<th class="plain" scope="col">{html.escape(str(name))}</th>'
        for name in ["", *table.columns]
    )
    for index, row in zip(table.index, table.itertuples(index=False), strict=True):
        title = " · ".join(map(str, index)) if isinstance(index, tuple) else str(index)
        cells = "".join(
            f'<td><span class="{kind}'
            f' {html.escape(str(value).replace(" ", "-"))}">{html.escape(str(value))}</span></td>'
            for value in row
        )
        buffer.write(f'<tr><th scope="row">{html.escape(title)}</th>{cells}</tr>\n')
    return (
        '<div class="scroll"><table class="facts">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{buffer.getvalue()}</tbody></table></div>"
    )
