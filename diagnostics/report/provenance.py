"""What a page's numbers rest on, and what the page lacks: manifest, warnings, parts not run."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from diagnostics.report.figures.registry import in_page_order
from diagnostics.report.run_results import RunResults
from diagnostics.report.run_tables import RunTables

PARTS = {
    "decision": "the decision: which criterion to train with, from steps over a horizon",
    "verdicts": "verdicts on the claims C1 to C4",
    "regressions": "the decomposition into compatible and incompatible divergence",
    "selection_curves": "captured gain by budget",
    "intervention": "the step with only the selected positions carrying loss, at matched norm",
    "kernel_shares": "the split of each gain into its own position's share and others'",
    "validation_outcomes": "training runs (claim C5); a one-step gain does not stand in for them",
}
"""Parts of the study that a run may lack, by the table that would hold them."""


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
    table = run.table("warnings")
    if table is None or "message" not in table:
        return []
    changed = table.get("changes_verdict", pd.Series("", table.index))
    verdicts = changed.astype(object).fillna("").astype(str)
    found = list(zip(table.message.astype(str), verdicts, strict=True))
    return sorted(found, key=lambda warning: not warning[1])


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


def missing(run: RunTables, left_out: Mapping[str, str]) -> list[str]:
    """Sentences on the parts of the study, of tables, and the figures that this run lacks.

    Args:
        run: The run's tables.
        left_out: For each figure that could not be drawn, the reason.

    Returns:
        One sentence per missing part.
    """
    lines = [
        text[0].upper() + text[1:] + "." for name, text in PARTS.items() if run.table(name) is None
    ]
    table = run.table("left_out")
    if table is not None:
        lines += [f"{row.table}, {row.what}: {row.why}." for row in table.itertuples()]
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
