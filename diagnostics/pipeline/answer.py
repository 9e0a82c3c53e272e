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
from diagnostics.core.shown import by_uncertainty
from diagnostics.core.tables import read_csv
from diagnostics.report.lead import command, judged_cells, rate, registered_cell, strength
from diagnostics.report.other_measures import other_measures
from diagnostics.report.run_tables import RunTables
from diagnostics.report.two_steps import in_short, two_steps

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
    "registered",
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
        RANKING), looks (over which verdicts are corrected), measure, other_measures (a sentence:
        what the recommended or registered cell does by them), strength (a sentence and its
        numbers), learning_rate (value and chosen_by), steps (the probe's and the decision's, as
        `two_steps` has them, and a sentence), next (a command) and, where there is one, report.
    """
    path = directory / "tables/decision.csv"
    if table is None and path.is_file():
        table = read_csv(path)
    where = f"--output-dir {shlex.quote(str(directory))}"
    found: dict[str, Any] = {"output_dir": str(directory)}
    if table is None:
        found |= {"decision": QUICK, "ranking": [], "next": f"{program} run {where}"}
    else:
        judged, run = judged_cells(table), _manifest_with(directory, table)
        registered, chosen = registered_cell(run), _rate(run)
        found |= {
            "decision": decision_sentence(table),
            "measure": str(judged["measure"].iloc[0]) if len(judged) else None,
            "ranking": [_entry(row, registered) for row in judged.to_dict("records")],
            "looks": _looks(judged),
            "other_measures": other_measures(table, registered) or None,
            "strength": strength(judged) if len(judged) else None,
            "learning_rate": chosen,
            "steps": _steps(run, chosen),
            "next": command(judged, shlex.quote(str(directory)), program, pair),
        }
    return found | ({"report": page} if page else {})


def _looks(judged: pd.DataFrame) -> int | None:
    """Over how many looks the verdicts are corrected; None where a table does not say."""
    looks = pd.to_numeric(judged.get("looks", pd.Series(dtype=float)), errors="coerce").max()
    return int(looks) if math.isfinite(looks) else None


def _manifest_with(directory: Path, table: pd.DataFrame) -> RunTables:
    """The run's manifest, empty where there is none, with the decision table."""
    path = directory / "manifest.json"
    return RunTables(read_manifest(path) if path.is_file() else {}, {"decision": table})


def _rate(run: RunTables) -> dict[str, Any] | None:
    """The learning rate of the steps, and what chose it; None where the run records none."""
    found = rate(run)
    return None if found is None else {"value": found[0], "chosen_by": found[1]}


def _steps(run: RunTables, chosen: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The probe's step and the decision's, with a sentence; None where neither is recorded."""
    table = two_steps(run)
    if table.empty:
        return None
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return {"sentence": in_short(table, chosen and chosen["chosen_by"]), "taken": rows}


def _entry(row: Mapping[str, Any], registered: tuple[str, float] | None) -> dict[str, Any]:
    same = registered is not None and row["criterion"] == registered[0]
    same = same and math.isclose(row["budget"], registered[1])
    entry = {name: row[name] for name in RANKING if name != "registered"} | {"registered": same}
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
        unit = f"over random, nats per position{_of_measure(found)}"
        shown = _shown(rows)
        lines.append(f"{unit}{_after_holm(found)}{_more(found, len(rows) - len(shown))}:")
        lines += [_line(row) for row in shown]
    if found.get("steps"):
        lines.append(f"steps: {found['steps']['sentence']}")
    if found.get("strength"):
        beside = f"; {found['other_measures']}" if found.get("other_measures") else ""
        lines.append(f"strength: {found['strength']['sentence']}{beside}")
    lines.append(f"next: {found['next']}")
    if "report" in found:
        lines.append(f"report: {found['report']}")
    return "\n".join(lines)


def _shown(rows: Sequence[Mapping]) -> list[Mapping]:
    """The best cells, the registered one and the worst, in the order of the ranking."""
    if len(rows) <= SHOWN:
        return list(rows)
    first, last = list(rows[: SHOWN - 1]), rows[-1]
    others = [row for row in rows[SHOWN - 1 : -1] if row["registered"]]
    return [*first[: len(first) - len(others)], *others, last]


def _of_measure(found: Mapping[str, Any]) -> str:
    measure = found.get("measure")
    return f" of {MEASURE_WORDS[measure]}" if measure in MEASURE_WORDS else ""


def _after_holm(found: Mapping[str, Any]) -> str:
    """That a verdict may be open although its interval excludes zero, and for how many looks."""
    return f"; verdicts after Holm over {found['looks']:g} looks" if found.get("looks") else ""


def _more(found: Mapping[str, Any], hidden: int) -> str:
    """How many cells are not shown, and where they are."""
    return f"; {hidden} more in {found['output_dir']}/tables/decision.csv" if hidden else ""


def _line(row: Mapping[str, Any]) -> str:
    low, high = row["over_random_low"], row["over_random_high"]
    half = math.nan if None in (low, high) else (high - low) / 2
    ends = (by_uncertainty(end, half, sign=True) for end in (low, high) if end is not None)
    interval = "no interval" if math.isnan(half) else f"[{', '.join(ends)}]"
    own = math.nan if row["over_random"] is None else row["over_random"]
    value = by_uncertainty(own, half, sign=True)
    numbers = f"{value:>8}  {interval:<20}".replace("-", "−")
    name = f"  {row['criterion']} at {100 * row['budget']:g} %"
    mark = ", registered" if row["registered"] else ""
    return f"{name:<30}{numbers} {row['verdict']}{mark}"


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
