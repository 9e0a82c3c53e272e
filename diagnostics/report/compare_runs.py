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

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic
from diagnostics.core.run_lock import hold
from diagnostics.report import figures, run_results, summary, svg
from diagnostics.report import page as report_page
from diagnostics.report.summary import RunResults
from diagnostics.report.written_pages import write_pages

SHARED = {
    "correlations": ("outcome", "criterion", "split", "method"),
    "selection_summary": ("outcome", "criterion", "split", "statistic", "budget"),
    "q3_contrast": ("outcome", "split", "score", "groups"),
    "decomposition": ("outcome", "split", "winsorised", "scale"),
    "verdicts": ("claim", "outcome", "split"),
    "validation_verdicts": ("claim", "measure", "rival"),
    "validation_outcomes": ("criterion", "budget", "measure"),
}
"""Tables that are set side by side, with what names a row."""


@dataclass(frozen=True)
class RunComparison:
    """Several runs; shows itself in a notebook as what differs and what was found."""

    materials: Mapping[str, RunResults]
    """By name of the run."""
    tables: Mapping[str, pd.DataFrame]
    """Tables that at least two runs have, with a column run in front."""
    settings: pd.DataFrame
    """Settings and models that differ, one column a run."""

    @property
    def verdicts(self) -> pd.DataFrame:
        """Verdict of each claim and gain, one column a run."""
        names = ["claim", "outcome", "verdict"]
        found = {run: summary.claims(material)[0] for run, material in self.materials.items()}
        frames = [
            table[names].assign(run=run) for run, table in found.items() if set(names) <= set(table)
        ]
        if not frames:
            return pd.DataFrame()
        table = pd.concat(frames, ignore_index=True).drop_duplicates(["claim", "outcome", "run"])
        wide = table.pivot(index=["claim", "outcome"], columns="run", values="verdict")
        return wide.reindex(columns=list(self.materials)).astype(object).fillna("–")

    @property
    def html(self) -> str:
        """All of it as one self-contained page."""
        lead = "".join(
            f"<p><b>{html.escape(name)}.</b> {html.escape(_finding(material))}</p>"
            for name, material in self.materials.items()
        )
        lead += "".join(
            f'<p class="warning">{html.escape(f"{name}: {caution}")}</p>'
            for name, material in self.materials.items()
            for caution in material.cautions
        )
        sections = [
            ("verdicts", "Verdicts", _grid(self.verdicts, "verdict")),
            (
                "settings",
                "What differs",
                _grid(self.settings, "setting") or "<p>No setting that the manifests record.</p>",
            ),
            ("figures", "Figures", "".join(_figure(*drawn) for drawn in self.plates())),
            (
                "tables",
                "Tables",
                "".join(
                    report_page.table_block(name, table) for name, table in self.tables.items()
                ),
            ),
        ]
        return report_page.shell(f"{len(self.materials)} runs side by side", "", lead, sections)

    def plates(self) -> Iterable[tuple]:
        """Name, caption and the figure at both widths, for each table that can be drawn."""
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
        return write_atomic(path, report_page.encoded(self.html))

    def _repr_html_(self) -> str:
        blocks = {"What differs": self.settings, "Verdicts": self.verdicts}
        return "".join(
            f"<h4>{title}</h4>{table.to_html()}" for title, table in blocks.items() if len(table)
        )


def compare_runs(
    directories: Sequence[str | Path], *, names: Sequence[str] | None = None
) -> RunComparison:
    """Set finished runs side by side.

    directories: run directories with a manifest and tables. names: what to call them; their
    folders' names where None. Raises DiagnosticsError for fewer than two, for names that repeat, or
    where a directory is not a finished run."""
    paths = [Path(directory) for directory in directories]
    names = list(names) if names is not None else _folder_names(paths)
    if len(paths) < 2 or len(names) != len(paths) or len(set(names)) != len(names):
        raise DiagnosticsError(
            f"A comparison needs two or more runs, each with a name of its own; got {len(paths)}"
            f" and the names {', '.join(map(str, names)) or 'none'}. Name more directories, or pass"
            " names=[…]."
        )
    materials = {
        str(name): run_results.read_run(path) for name, path in zip(names, paths, strict=True)
    }
    return RunComparison(materials, dict(_joined(materials)), _differences(materials))


def write(directories: Sequence[str | Path], into: Path) -> Path:
    """Write compare.html into a folder, a run or any other, and its hash into pages.json there.

    Raises DiagnosticsError as `compare_runs` does, where another process uses the folder, or where
    a compare.html is there that is not as this program wrote it."""
    page = report_page.encoded(compare_runs(directories).html)
    with hold(into):
        write_pages(into, {"compare.html": page})
    return into / "compare.html"


def _folder_names(paths: list[Path]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]


def _joined(materials: Mapping[str, RunResults]) -> Iterable[tuple[str, pd.DataFrame]]:
    for name in SHARED:
        found = {
            run: material.table(name)
            for run, material in materials.items()
            if material.table(name) is not None
        }
        if len(found) > 1:
            joined = pd.concat(
                [table.assign(run=run) for run, table in found.items()], ignore_index=True
            )
            yield name, joined[["run", *(column for column in joined if column != "run")]]


def _differences(materials: Mapping[str, RunResults]) -> pd.DataFrame:
    """Settings and model facts whose value is not the same in all runs, a dash where a run has
    none.
    """
    flat = {run: dict(_settings(material.manifest)) for run, material in materials.items()}
    table = pd.DataFrame(flat, dtype=object).fillna("–")
    return table[table.nunique(axis=1) > 1].rename_axis("setting")


def _settings(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for stage, record in manifest.get("stages", {}).items():
        for name, value in record.get("settings", {}).items():
            yield (
                f"{stage}: {name}",
                (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)),
            )
    facts = summary.models(RunResults(manifest))
    yield from ((f"model: {role}", name) for role, name in facts.items())


def _finding(material: RunResults) -> str:
    """The paragraphs that compare signals, as far as the run has them."""
    return " ".join(
        text for text in (summary.signals(material), summary.trained(material)) if text
    ) or summary.title(material)


def _drawable(
    tables: Mapping[str, pd.DataFrame],
) -> Iterable[tuple[str, pd.DataFrame, dict[str, Any], str]]:
    """Table, options of `figures.runs` and caption for each figure that the tables allow."""
    for name, where, options, caption in (
        (
            "correlations",
            {"method": "spearman", "criterion": figures.CORE},
            {},
            "Rank correlation of each criterion with both gains, in each run.",
        ),
        (
            "selection_summary",
            {"statistic": "area", "criterion": figures.CORE},
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
            rows[rows.split == summary.preferred_split(rows)]
            for _, rows in table.groupby("run", sort=False)
        ]
        if len(parts) > 1:
            yield name, pd.concat(parts, ignore_index=True), options, caption


def _figure(name: str, caption: str, wide, narrow) -> str:
    plates = {"wide": wide, "narrow": narrow}
    drawings = "".join(
        f'<div class="{size}">{svg.inline_svg(plate, f"{name}-{size}")}</div>'
        for size, plate in plates.items()
    )
    text = html.escape(f"{caption} Every run has its own prompts and its own intervals.")
    return f'<figure id="figure-{name}">{drawings}<figcaption>{text}</figcaption></figure>'


def _grid(table: pd.DataFrame, kind: str) -> str:
    """A small table with one column a run."""
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
            f' {html.escape(str(value))}">{html.escape(str(value))}</span></td>'
            for value in row
        )
        buffer.write(f'<tr><th scope="row">{html.escape(title)}</th>{cells}</tr>\n')
    return (
        '<div class="scroll"><table'
        f' class="facts"><thead><tr>{head}</tr></thead><tbody>\n{buffer.getvalue()}</tbody></table></div>'
    )
