"""The stage `report`: figures and pages, where what they show has changed."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from diagnostics.core import files
from diagnostics.core.fingerprints import code_version
from diagnostics.core.tables import write_json
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import Job

log = logging.getLogger("diagnostics")
MADE_OF = "made of"
"""Entry of pages.json with the hash of what the report was made of, and of the report."""


def do(job: Job) -> dict[str, str]:
    """Do the stage of a command, and name the page."""
    return {"report": str(report_stage(job.run))}


def report_stage(run: Run, *, contexts: int | None = None, pdf: bool = False) -> Path:
    """Draw the figures and write the report, where it is not of the same files already.

    Args:
        run: The open run directory.
        contexts: How many contexts are shown token by token; None is the report's default.
        pdf: Whether every figure is written as PDF too.

    Returns:
        The path of report.html.
    """
    from diagnostics.report.page import CONTEXTS, build

    shown = CONTEXTS if contexts is None else contexts
    of_now = _page_inputs(run, shown, pdf)
    if _pages_are(run, of_now):
        log.info("report: kept, since nothing that it shows has changed")
        return run.path("report.html")
    page = build(run.directory, contexts=shown, pdf=pdf)
    pages = json.loads(files.read_inside(run.directory, "pages.json"))
    made_of = _made_of(of_now, pages["report.html"][-1])
    write_json(run.path("pages.json"), pages | {MADE_OF: [made_of]})
    return page


def _page_inputs(run: Run, contexts: int, pdf: bool) -> str:
    """Hash over the files that a report reads, how much of them it shows, and its code."""
    read = ["manifest.json", "tokens.parquet", "contexts.parquet", "tops.parquet"]
    read += ["metrics.jsonl", "positions.jsonl", "train.json", "timings.jsonl", "evaluations.csv"]
    read += [name for name, kind in files.walk(run.directory, "tables") if kind == "file"]
    content = [(name, files.hash_inside(run.directory, name)) for name in sorted(read)]
    code = code_version("report.page", "report.run_results")
    return hashlib.sha256(json.dumps([content, contexts, pdf, code]).encode()).hexdigest()


def _made_of(inputs: str, page: str) -> str:
    return hashlib.sha256(f"{inputs} {page}".encode()).hexdigest()


def _pages_are(run: Run, inputs: str) -> bool:
    """Whether the directory's pages are whole and were made of these inputs."""
    try:
        pages = json.loads(files.read_inside(run.directory, "pages.json"))
        of, page = pages.pop(MADE_OF)[0], pages["report.html"][-1]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return of == _made_of(inputs, page) and all(
        files.hash_inside(run.directory, name) in hashes for name, hashes in pages.items()
    )
