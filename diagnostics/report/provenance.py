"""What a page's numbers rest on, and what the page lacks: manifest, warnings, parts not run."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from diagnostics.core.schema import column
from diagnostics.report.figures.registry import in_page_order
from diagnostics.report.lead import HERE, PROGRAM
from diagnostics.report.naming import readable
from diagnostics.report.run_results import OF_SIDES, RunResults
from diagnostics.report.run_tables import RunTables
from diagnostics.report.summary import chosen_folds

PARTS = {
    "decision": (
        "the decision: which criterion to train with, from steps over a horizon",
        "intervene --horizon 1,5,20",
    ),
    "verdicts": ("verdicts on the claims C1 to C4", "analyze"),
    "regressions": (
        "the decomposition into compatible and incompatible divergence",
        "analyze",
    ),
    "selection_curves": ("captured gain by budget", "compare"),
    "intervention": (
        "the step with only the selected positions carrying loss, at matched norm",
        "intervene",
    ),
    "kernel_shares": (
        "the split of each gain into its own position's share and others'",
        "attribute",
    ),
    "validation_outcomes": (
        "training runs (claim C5); a one-step gain does not stand in for them",
        "validate --against",
    ),
}
"""Parts of the study that a run may lack, by the table that would hold them: what each is, and the
command that makes it.
"""
TOUCHED = {
    "few_prompts": "every interval and verdict",
    "undefined_outcome": "what is said of these outcomes; their other positions stand",
    "saturated": "compatibility and teachability, which cannot rank clipped positions",
    "constant": "these columns, by which nothing can be ranked",
    "rare_quadrant": "contrasts within these quadrants (C2)",
    "collinear": "single coefficients of these terms (C3); their sum stands",
    "unmatched": "the matched contrast, a check of C2",
    "no_signal": "every number that rests on a step",
    "no_null": "every claim with controls",
    "one_step": "every interval, which holds for this step batch alone",
    "exploratory": "all verdicts, none of which confirms",
    "bent_step": "the gains after these steps, which no slope foretells",
    "dropped_mass": "all divergences, which leave that probability out",
    "listed_teacher": "all divergences, which are lower bounds",
}
"""The conclusion that a warning touches where it changes no verdict, by its code."""


def warnings(run: RunResults) -> list[str]:
    """The notes made while the run was read, then the warnings of its analysis, one per cause, the
    ones that change a verdict first.
    """
    found = [f"{text} {changed}." if changed else text for text, changed in causes(run)]
    return [*run.reading_notes, *found]


def causes(run: RunTables) -> list[tuple[str, str]]:
    """Each warning of the analysis with the verdict that it changes; that is empty where it changes
    none, and in tables of earlier versions.
    """
    return [(text, changed) for _, text, changed in _told(run)]


HALF = 0.5
"""Share of its first-order prediction below which a fold's step is warned of."""


def _bent_steps(run: RunTables) -> list[tuple[str, str, str]]:
    """A warning where the step of one fold of several realised less than half of its prediction."""
    folds = chosen_folds(run)
    bent = folds[folds["ratio"] < HALF] if len(folds) > 1 else folds.iloc[:0]
    if bent.empty:
        return []
    named = ", ".join(f"fold {row.fold}: {row.ratio:.0%}" for row in bent.itertuples())
    text = (
        f"In {len(bent)} of {len(folds)} folds the step realised less than half of its first-order"
        f" prediction ({named})."
    )
    return [("bent_step", text, "")]


def _told(run: RunTables) -> list[tuple[str, str, str]]:
    """Code, text and changed verdicts of each warning, those that change one first."""
    table, bent = run.table("warnings"), _bent_steps(run)
    if table is None or "message" not in table:
        return bent
    empty = pd.Series("", table.index)
    columns = [table.get(name, empty) for name in ("code", "message", "changes_verdict")]
    texts = [column.astype(object).fillna("").astype(str) for column in columns]
    return sorted([*zip(*texts, strict=True), *bent], key=lambda warning: not warning[2])


def short_causes(run: RunTables) -> list[tuple[str, str, bool]]:
    """One line per cause, for the page: earlier versions wrote one per contrast.

    Returns:
        The warning without what it lists in brackets, the conclusion that it touches (empty where
        its code is unknown), and whether a verdict changed, those first.
    """
    lines: dict[str, list[tuple[str, str]]] = {}
    for code, text, changed in _told(run):
        short = re.sub(r"\s*\[[^\]]*\](?=\.?$)", "", text)
        cause = code or re.sub(r"[\d.,]+", "#", short)
        lines.setdefault(cause, []).append((short, changed))
    found = []
    for code, told in lines.items():
        changed = "; ".join(dict.fromkeys(change for _, change in told if change))
        times = f" ({len(told)} times, see table warnings)" if len(told) > 1 else ""
        found.append((told[0][0] + times, changed or TOUCHED.get(code, ""), bool(changed)))
    return found


def provenance(run: RunTables) -> str:
    """The manifest as HTML tables: versions, each stage's settings, facts, inputs and files."""
    parts = [("Versions", run.manifest.get("versions", {}))]
    for name, stage in run.manifest.get("stages", {}).items():
        parts += [
            (f"Stage {name}: {part}", stage.get(part))
            for part in ("settings", "facts", "inputs", "files")
        ]
    other = {key: value for key, value in run.manifest.items() if key not in ("versions", "stages")}
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


def _how(command: str) -> str:
    """The command that makes a missing part, in backticks, DIR being this directory."""
    if command.endswith("--against"):
        return f"`{PROGRAM} {command} {HERE} --output-dir {HERE}-training`"
    return f"`{PROGRAM} {command} --output-dir {HERE}`, then `report`"


UNASKED = ("claim C5", "other losses")
"""Parts that the analysis leaves out and no line is spent on: `PARTS` has trainings already, and
steps with other losses are studied only where somebody brings their tables.
"""
LINEARITY = "how linear the step was"
MEASURED_BY = {"before": "score", "outcome": "probe", "after": "score --after CHECKPOINT"}
"""The stage that measures a column, by what the column is for."""


def _left_out(table: str, what: str, why: str) -> str:
    """A sentence on a part that a table lacks, in words; empty where nobody asked for it."""
    if what in UNASKED:
        return ""
    if what == LINEARITY:
        return (
            "How linear the step was in each stratum of the divergence, for which every position's"
            f" first-order gain is needed: `{PROGRAM} attribute --output-dir {HERE}`, then"
            " `analyze` and `report`."
        )
    words = readable(what)
    named = f"{words[:1].upper()}{words[1:]}{'' if table == 'all' else f' (table {table})'}"
    found = re.fullmatch(r"no columns? ([\w, ]+)", why)
    if found is None:
        return f"{named}: {why.rstrip('.')}."
    names = found[1].split(", ")
    by = dict.fromkeys(filter(None, map(_measured_by, names)))
    how = f", which {' and '.join(f'`{stage}`' for stage in by)} would measure" if by else ""
    return f"{named}: the run holds no {', '.join(map(readable, names))}{how}."


def _measured_by(name: str) -> str:
    """The stage that measures a column; empty where none does."""
    known = column(name)
    if known is None:
        return ""
    if known.on_request:
        return f"score --extra {known.on_request}"
    if known.name != name and known.by_support:
        return "score --sweep"
    return MEASURED_BY.get(known.stage, "")


def missing(run: RunTables, left_out: Mapping[str, str]) -> list[str]:
    """Sentences on the parts of the study, of tables, and the figures that this run lacks.

    Args:
        run: The run's tables.
        left_out: For each figure that could not be drawn, the reason.

    Returns:
        One sentence per missing part.
    """
    lines = [
        f"{text[0].upper()}{text[1:]}: {_how(command)}."
        for name, (text, command) in PARTS.items()
        if run.table(name) is None
    ]
    if run.table("by_correctness") is not None and OF_SIDES not in run.manifest.get("stages", {}):
        lines.append(f"The tables for right and for wrong responses alone: {_how(OF_SIDES)}.")
    table = run.table("left_out")
    if table is not None:
        told = [_left_out(row.table, row.what, row.why) for row in table.itertuples()]
        lines += [line for line in dict.fromkeys(told) if line]
    drawable = {
        spec.name: spec
        for spec in in_page_order()
        if spec.table == "tokens" or run.table(spec.table) is not None
    }
    lines += [
        f"Figure “{drawable[name].title}”: {reason.rstrip('.')}."
        for name, reason in left_out.items()
        if name in drawable
    ]
    return lines
