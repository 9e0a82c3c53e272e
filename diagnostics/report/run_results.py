"""A finished run, read from its directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import hashes_of, read_manifest
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.types import read_bank
from diagnostics.report.summary import RunResults

log = logging.getLogger("diagnostics")


def read_run(directory: str | Path) -> RunResults:
    """A finished run's files, for a notebook or the report: `run = dx.read_run("reports/demo")`
    shows what it found.

    Returns a RunResults with the manifest, tables (by name), tokens, bank and likeliest tokens (None
    where the run has none). Needs neither torch nor a model. Raises DiagnosticsError where the
    manifest or every table is missing, or a file is damaged."""
    directory = Path(directory)
    manifest = _read_manifest(directory / "manifest.json")
    reading = _Reading(directory, manifest)
    names = [
        name
        for name, kind in files.walk(directory, "tables")
        if name.endswith(".csv") and kind != "folder"
    ]
    tables = {
        Path(name).stem: reading.read(name, _read_csv) for name in names if name.count("/") == 1
    }
    tables = {name: table for name, table in tables.items() if table is not None} | training_tables(
        directory, reading
    )
    if not tables:
        said = f" ({' '.join(reading.cautions)})" if reading.cautions else ""
        raise DiagnosticsError(
            f"{directory / 'tables'} holds no table{said}. Run `python -m diagnostics analyze"
            f" --output-dir {directory}` first."
        )
    tokens = reading.read("tokens.parquet", lambda path: validate_tokens(read_parquet(path)))
    bank, tops = (
        reading.read("contexts.parquet", read_bank),
        reading.read("tops.parquet", read_parquet),
    )
    return RunResults(manifest, tables, tokens, bank, tops, tuple(reading.cautions))


class _Reading:
    """Files of a run, each compared with the manifest before it is read; what is not as it was
    written is left out and said.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]):
        self.directory, self.manifest, self.cautions = directory, manifest, []

    def say(self, sentence: str) -> None:
        """Keep a sentence for the page, and log it."""
        self.cautions.append(sentence)
        log.warning("%s: %s", self.directory, sentence)

    def read(self, name: str, reader: Callable[[Path], Any], *, ask: bool = True) -> Any:
        """What `reader` makes of a file; None where there is none, or it was changed. ask: whether
        a record is looked for.
        """
        digest, known = files.hash_inside(self.directory, name), hashes_of(self.manifest, name)
        if digest is None:
            return None
        if known and digest not in known:
            self.say(
                f"{name} is not as it was written and was left out of this page. Run the stage that"
                " writes it again."
            )
            return None
        if ask and not known:
            self.say(f"{name} is in no record of manifest.json, so nothing says what measured it.")
        return reader(self.directory / name)


def training_tables(directory: Path, reading: _Reading | None = None) -> dict[str, pd.DataFrame]:
    """What a training, or a grid of them, leaves beside its tables: evaluations, and the metrics of
    every step.
    """
    reading = reading or _Reading(directory, {"stages": {}})
    found = {
        "evaluations": reading.read("evaluations.csv", _read_csv, ask=False),
        "training_metrics": reading.read(
            "metrics.jsonl", lambda path: _read_lines(path, reading.say), ask=False
        ),
    }
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
    """Metrics line by line; what a killed process had begun to write, or is no object, is left out
    and counted.
    """
    rows, broken = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row, broken = None, broken + 1
        rows += [row] if isinstance(row, dict) else []
    if broken:
        say(
            f"{path.name} has {broken} {'line' if broken == 1 else 'lines'} cut by a kill or"
            " damaged, which were left out."
        )
    return pd.DataFrame(rows)


def _read_manifest(path: Path) -> dict[str, Any]:
    if (found := files.kind(path)) not in ("file", None):
        raise files.unfit(path, found, "file")
    try:
        return read_manifest(path)
    except DiagnosticsError as error:
        said = str(error).replace(
            "Choose another --output-dir, or remove that file.",
            "Name the --output-dir of an earlier run.",
        )
        unread = (
            "cannot be read as a manifest"
            if error.__cause__ is not None
            else "is not a manifest of this project"
        )
        raise DiagnosticsError(said.replace("is not a manifest of this project", unread)) from error


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (OSError, ValueError) as error:
        raise DiagnosticsError(
            f"{path} cannot be read as CSV ({str(error).splitlines()[0]}). Run the analyze stage"
            " again."
        ) from error
