"""What a run says, on a terminal and as JSON: which criterion, how surely, and what comes next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.analysis.decision import MEASURE_WORDS, decision_sentence
from diagnostics.core.manifest import read_manifest
from diagnostics.core.tables import read_csv
from diagnostics.report.lead import command, judged_cells, rate, strength
from diagnostics.report.run_tables import RunTables

SHOWN = 4
"""Cells of the ranking that the terminal shows, the best and the worst among them."""
RANKING = (
    "criterion",
    "budget",
    "over_random",
    "over_random_low",
    "over_random_high",
    "verdict",
    "recommended",
)
"""Columns of the ranking."""
QUICK = (
    "Not answered: the interventions were left out. Correlations and captured shares do not stand"
    " in for them."
)
"""What stands in the place of the decision where nothing was intervened on."""


def answer(
    directory: Path,
    program: str,
    *,
    pair: str = "",
    table: pd.DataFrame | None = None,
    page: str | None = None,
) -> dict[str, Any]:
    """The decision of a run, as data.

    Args:
        directory: The run directory.
        program: How this program is called, for the command that comes next.
        pair: Flags that name the pair in another directory.
        table: The decision table; None reads that of the run, where it has one.
        page: Path of the report.

    Returns:
        decision (a sentence), ranking (one entry per judged cell, best first; the fields of
        RANKING), looks (over which verdicts are corrected), measure, strength (a sentence and its
        numbers), learning_rate (value and chosen_by), next (a command) and, where there is one,
        report.
    """
    path = directory / "tables/decision.csv"
    if table is None and path.is_file():
        table = read_csv(path)
    where = f"--output-dir {shlex.quote(str(directory))}"
    found: dict[str, Any] = {"output_dir": str(directory)}
    if table is None:
        found |= {"decision": QUICK, "ranking": [], "next": f"{program} run {where}"}
    else:
        judged = judged_cells(table)
        found |= {
            "decision": decision_sentence(table),
            "measure": str(judged["measure"].iloc[0]) if len(judged) else None,
            "ranking": [_entry(row) for row in judged.to_dict("records")],
            "looks": _looks(judged),
            "strength": strength(judged) if len(judged) else None,
            "learning_rate": _rate(directory),
            "next": command(judged, shlex.quote(str(directory)), program, pair),
        }
    return found | ({"report": page} if page else {})


def _looks(judged: pd.DataFrame) -> int | None:
    """Over how many looks the verdicts are corrected; None where a table does not say."""
    looks = pd.to_numeric(judged.get("looks", pd.Series(dtype=float)), errors="coerce").max()
    return int(looks) if math.isfinite(looks) else None


def _rate(directory: Path) -> dict[str, Any] | None:
    """The learning rate of the steps, and what chose it; None where the run records none."""
    path = directory / "manifest.json"
    found = rate(RunTables(read_manifest(path))) if path.is_file() else None
    return None if found is None else {"value": found[0], "chosen_by": found[1]}


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    entry = {name: row[name] for name in RANKING}
    numbers = ("over_random", "over_random_low", "over_random_high")
    return entry | {
        "budget": float(row["budget"]),
        "recommended": bool(row["recommended"]),
        **{name: float(row[name]) if math.isfinite(row[name]) else None for name in numbers},
    }


def text(found: Mapping[str, Any]) -> str:
    """An answer in ten lines or fewer."""
    lines = [found["decision"]]
    rows: Sequence[Mapping] = found["ranking"]
    if rows:
        unit = f"over random, nats per position{_of_measure(found)}{_at_rate(found)}"
        lines.append(f"{unit}{_after_holm(found)}:")
        shown = [*rows[: SHOWN - 1], rows[-1]] if len(rows) > SHOWN else rows
        lines += [_line(row) for row in shown]
        if len(rows) > SHOWN:
            lines.insert(
                -1, f"  … {len(rows) - SHOWN} more in {found['output_dir']}/tables/decision.csv"
            )
    if found.get("strength"):
        lines.append(f"strength: {found['strength']['sentence']}")
    lines.append(f"next: {found['next']}")
    if "report" in found:
        lines.append(f"report: {found['report']}")
    return "\n".join(lines)


def _of_measure(found: Mapping[str, Any]) -> str:
    measure = found.get("measure")
    return f" of {MEASURE_WORDS[measure]}" if measure in MEASURE_WORDS else ""


def _at_rate(found: Mapping[str, Any]) -> str:
    """At which learning rate; of the default, that effects are small and which flag sets it."""
    chosen = found.get("learning_rate")
    if not chosen:
        return ""
    usual = " (training's default, small as its effects; set yours: --learning-rate)"
    return f", at rate {chosen['value']:g}" + (
        usual if chosen["chosen_by"] == "the default" else ""
    )


def _after_holm(found: Mapping[str, Any]) -> str:
    """That a verdict may be open although its interval excludes zero, and for how many looks."""
    return f"; verdicts after Holm over {found['looks']:g} looks" if found.get("looks") else ""


def _line(row: Mapping[str, Any]) -> str:
    low, high = row["over_random_low"], row["over_random_high"]
    interval = "no interval" if None in (low, high) else f"[{low:+.2g}, {high:+.2g}]"
    value = "–" if row["over_random"] is None else f"{row['over_random']:+.2g}"
    numbers = f"{value:>8}  {interval:<20}".replace("-", "−")
    name = f"  {row['criterion']} at {100 * row['budget']:g} %"
    return f"{name:<30}{numbers} {row['verdict']}"


def claims(directory: Path) -> list[dict[str, Any]]:
    """The controlled verdicts on the claims, each with its sentence; empty without any."""
    path = directory / "tables/verdicts.csv"
    if not path.is_file():
        return []
    table = read_csv(path)
    if not {"claim", "statement", "verdict", "primary", "kind"} <= set(table):
        return []
    rows = table[table["primary"].astype(bool) & (table["kind"] == "controlled")]
    return rows[["claim", "statement", "verdict"]].to_dict("records")
