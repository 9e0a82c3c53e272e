"""Several runs side by side: pairs, K, losses or seeds.

    comparison = dx.compare_runs(["reports/demo", "reports/smollm2"])
    comparison.settings                      # what differs between them
    comparison.tables["correlations"]        # one table with a column run
    comparison.save("reports/compare.html")  # one self-contained page

Nothing is pooled and nothing is tested across runs: each keeps its own interval, over its own
prompts."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from diagnostics.report.figures.decision import VERDICTS
from diagnostics.report.figures.registry import CORE
from diagnostics.report.page_tables import shown, table_block
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
            f"<p><b>{html.escape(name)}.</b> {page.with_code(_finding(run))}</p>"
            for name, run in self.runs.items()
        )
        lead += "".join(
            f'<p class="warning">{html.escape(f"{name}: {note}")}</p>'
            for name, run in self.runs.items()
            for note in run.reading_notes
        )
        sections = [
            ("decision", "Which criterion beats random?", _decisions(self.runs)),
            ("verdicts", "Claims", _verdicts(self.verdicts, _statements(self.runs))),
            ("settings", "What differs", _settings_table(self.settings)),
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
    """Settings and model facts whose value is not the same in all runs that have them.

    A setting that several stages share, with one value in each run, has one row. A dash stands
    where a run has no such setting, or leaves it to the stage. Stages that not all runs have are a
    row of their own, and their settings count only among the runs that have them.
    """
    flat = {name: _settings(run.manifest) for name, run in runs.items()}
    stages = {name: set(run.manifest.get("stages", {})) for name, run in runs.items()}
    rows: dict[str, dict[str, str]] = {}
    for setting in dict.fromkeys(setting for values in flat.values() for setting in values):
        held = {run: values[setting] for run, values in flat.items() if setting in values}
        for label, values in _by_stage(setting, held):
            has = [run for run in flat if run in values or _could_have(label, stages[run])]
            found = {run: values.get(run, NONE) for run in flat}
            if len({found[run] for run in has}) > 1:
                rows[label] = found
    rows |= _stages_row(runs, stages) | _model_rows(runs)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(runs), dtype=object)
    return table.rename_axis("setting")


NONE = "–"
"""What stands for a setting that was not given."""
NAMING = ("pair", "student", "teacher", "student_revision", "teacher_revision", "teacher_logprobs")
"""Settings that name the models; the facts of the models say it better."""


def _settings(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By setting its value as text in each stage that has it."""
    found: dict[str, dict[str, str]] = {}
    for stage, record in manifest.get("stages", {}).items():
        for name, value in record.get("settings", {}).items():
            if name not in NAMING:
                found.setdefault(_unicode(name), {})[stage] = _unicode(_shown(value))
    return found


def _shown(value: Any) -> str:
    """A setting's value as a reader writes it."""
    if value is None:
        return NONE
    if isinstance(value, list) and not any(isinstance(part, (list, dict)) for part in value):
        return ", ".join(map(str, value)) or NONE
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}…"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _by_stage(
    setting: str, held: Mapping[str, Mapping[str, str]]
) -> Iterable[tuple[str, dict[str, str]]]:
    """A setting's rows: one where each run has one value in all of several stages, else one per
    stage.
    """
    stages = list(dict.fromkeys(stage for values in held.values() for stage in values))
    if len(stages) > 1 and all(len(set(values.values())) == 1 for values in held.values()):
        yield setting, {run: next(iter(values.values())) for run, values in held.items()}
        return
    for stage in stages:
        own = {run: values[stage] for run, values in held.items() if stage in values}
        yield f"{stage}: {setting}", own


def _could_have(label: str, stages: set[str]) -> bool:
    """Whether a run has the stage of a row; a row of several stages counts in every run."""
    stage, colon, _ = label.partition(": ")
    return not colon or stage in stages


def _stages_row(
    runs: Mapping[str, RunResults], stages: Mapping[str, set[str]]
) -> dict[str, dict[str, str]]:
    same = len({frozenset(names) for names in stages.values()}) == 1
    held = {name: ", ".join(run.manifest.get("stages", {})) or NONE for name, run in runs.items()}
    return {} if same else {"stages": held}


def _model_rows(runs: Mapping[str, RunResults]) -> dict[str, dict[str, str]]:
    facts = {name: summary.models(RunTables(run.manifest)) for name, run in runs.items()}
    rows = {
        f"model: {role}": {name: found.get(role, NONE) for name, found in facts.items()}
        for role in ("pair", "student", "teacher")
    }
    return {label: values for label, values in rows.items() if len(set(values.values())) > 1}


def _unicode(text: str) -> str:
    """Half a surrogate pair, as JSON may hold one, written out: no table takes it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _finding(run: RunResults) -> str:
    """The decision and how sure it is; the paragraphs that compare signals where there is none."""
    if run.table("decision") is not None:
        parts: tuple[Callable, ...] = (lead.decided, lead.sure)
    else:
        parts = (summary.signals, summary.trained)
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


def _decisions(runs: Mapping[str, RunResults]) -> str:
    """The judged cells of every run as one grid; empty where fewer than two runs have a decision.

    Rows are criteria at their budgets, by the first run's difference to random.
    """
    tables = {name: run.table("decision") for name, run in runs.items()}
    judged = {
        name: lead.judged_cells(table)
        for name, table in tables.items()
        if table is not None and {"primary", "over_random_low", "verdict"} <= set(table)
    }
    if len(judged) < 2:
        return ""
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for name, table in judged.items():
        for row in table.to_dict("records"):
            cells.setdefault((row["criterion"], row["budget"]), {})[name] = _cell(row)
    order = list(dict.fromkeys(criterion for criterion, _ in cells))
    ranked = sorted(cells, key=lambda cell: (order.index(cell[0]), cell[1]))
    rows = [
        (
            f"{naming.readable(name)} at {100 * budget:g}\N{NO-BREAK SPACE}%",
            [cells[name, budget].get(run, NONE) for run in judged],
        )
        for name, budget in ranked
    ]
    heads = [(name, _judged_by(table)) for name, table in judged.items()]
    said = (
        "Drop of the held-out divergence over as many random positions, in nats per position, with"
        " half of its interval. ▲ better than random, ▼ worse, = level, ? cannot tell, – not"
        " judged; ◆ is recommended. Every run has its own prompts."
    )
    return f'<p class="quiet">{said}</p>{_table(heads, rows)}'


def _cell(row: Mapping[str, Any]) -> str:
    """The sign of a verdict, the difference to random, and half of its interval."""
    sign = VERDICTS.get(row["verdict"], VERDICTS["cannot tell"])[1]
    kind = html.escape(str(row["verdict"]).replace(" ", "-"))
    half = (row["over_random_high"] - row["over_random_low"]) / 2
    text = sign
    if math.isfinite(row["over_random"]):
        text += f" {shown(row['over_random'], half=half)}"
        text += f" ± {shown(half, half=half)}" if math.isfinite(half) else ""
    mark = " ◆" if row["recommended"] in naming.TRUE else ""
    return f'<span class="verdict {kind}">{text}{mark}</span>'


def _judged_by(table: pd.DataFrame) -> str:
    """The divergence and the horizon by which a run's cells are judged."""
    if table.empty:
        return ""
    row = table.iloc[0]
    return f"{naming.readable(str(row['measure']))}, {naming.steps(row['horizon'])}"


def _statements(runs: Mapping[str, RunResults]) -> dict[str, str]:
    """Each claim in words: what is tested with controls, where a run says it."""
    found: dict[str, str] = {}
    for run in runs.values():
        table = summary.claims(run)[0]
        if {"claim", "statement"} <= set(table):
            first = table.assign(paper=table.get("kind", "") == "paper").sort_values(
                "paper", kind="stable"
            )
            for claim, text in zip(first["claim"], first["statement"], strict=True):
                if isinstance(text, str):
                    found.setdefault(str(claim), text)
    return found


def _verdicts(table: pd.DataFrame, statements: Mapping[str, str]) -> str:
    """The verdicts of every run, the statistics of a claim below its sentence."""
    if table.empty:
        return ""
    rows: list[tuple[str, list[str]]] = []
    before = None
    for index, values in zip(table.index, table.itertuples(index=False), strict=True):
        claim, *which = map(str, index)
        if claim != before:
            said = statements.get(claim, "")
            rows.append((f"{claim} {said[:1].upper()}{said[1:]}".strip(), []))
            before = claim
        kind, outcome = which if len(which) == 2 else ("", *which)
        words = naming.MEASURES.get(outcome) or naming.readable(outcome)
        rows.append((summary.KINDS.get(kind, "by ") + words, [_verdict(value) for value in values]))
    return _table([(str(name), "") for name in table.columns], rows)


def _verdict(value: object) -> str:
    text = html.escape(str(value))
    return f'<span class="verdict {text.replace(" ", "-")}">{text}</span>'


def _settings_table(table: pd.DataFrame) -> str:
    """The settings that differ."""
    if table.empty:
        return "<p>No setting that the manifests record.</p>"
    rows = [
        (str(name), [html.escape(str(value)) for value in values])
        for name, values in zip(table.index, table.itertuples(index=False), strict=True)
    ]
    note = f'<p class="quiet">{NONE}: not given, so that the stage chose, or no such setting.</p>'
    return note + _table([(str(name), "") for name in table.columns], rows)


def _table(heads: Iterable[tuple[str, str]], rows: Iterable[tuple[str, list[str]]]) -> str:
    """A small table with one column per run; a row without cells is a heading."""
    heads = list(heads)
    columns = "".join(
        f'<th class="plain" scope="col">{html.escape(name)}'
        + (f' <span class="unit">{html.escape(unit)}</span>' if unit else "")
        + "</th>"
        for name, unit in [("", ""), *heads]
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(title)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>\n"
        if cells
        else f'<tr><th class="group" scope="rowgroup" colspan="{len(heads) + 1}">'
        f"<span>{html.escape(title)}</span></th></tr>\n"
        for title, cells in rows
    )
    return (
        '<div class="scroll whole"><table class="facts">'
        f"<thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )
