"""A finished run, read from its directory."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.analysis.prompt_groups import is_long, read_studied
from diagnostics.analysis.responses import ALL, SIDES, of_responses, require_known
from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.manifest import hashes_read, read_manifest
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.shown import cut
from diagnostics.core.tables import read_csv
from diagnostics.core.types import Bank, read_bank
from diagnostics.report import summary
from diagnostics.report.run_tables import RunTables

log = logging.getLogger("diagnostics")


@dataclass(frozen=True)
class RunResults(RunTables):
    """What a run directory holds; shows itself in a notebook as findings and verdicts."""

    tokens: pd.DataFrame | None = None
    """The token table, one row per response position; None where the run has none."""
    bank: Bank | None = None
    """The frozen contexts."""
    tops: pd.DataFrame | None = None
    """Both models' most likely tokens at each position, as `score_with_tops` returns them."""
    reading_notes: tuple[str, ...] = ()
    """Sentences on files that were left out, or that the manifest does not record."""
    sides: Mapping[str, Mapping[str, pd.DataFrame]] = field(default_factory=dict)
    """Tables of right and of wrong responses alone, where `by-correctness` made them."""

    def responses(self, which: str) -> RunResults:
        """The run as it is for one kind of responses: tables, token table, contexts.

        Args:
            which: `right` or `wrong`; `all` is the run itself.

        Returns:
            The results of the positions of those responses alone, after steps on all.

        Raises:
            DiagnosticsError: The kind is unknown, or there are no tables of it: nobody asked for
                them, nothing was judged, or too few prompts have such a response.
        """
        require_known(which)
        if which == ALL:
            return self
        if which not in self.sides:
            raise DiagnosticsError(self.why_no(which))
        tokens, bank, tops = self.tokens, self.bank, self.tops
        if tokens is not None:
            tokens = of_responses(tokens, which)
        if bank is not None:
            kept = [one for one in bank if one.correct is not None]
            bank = Bank(tuple(one for one in kept if one.correct == bool(SIDES[which])))
        if tops is not None and bank is not None:
            names = [one.context_id for one in bank]
            tops = tops[tops["context_id"].isin(names)].reset_index(drop=True)
        return replace(
            self, tables=self.sides[which], tokens=tokens, bank=bank, tops=tops, sides={}
        )

    def why_no(self, side: str) -> str:
        """Why the run has no tables of right or of wrong responses alone; how to make them."""
        facts = self.stage(OF_SIDES).get(side)
        if isinstance(facts, Mapping) and facts.get("left_out"):
            return str(facts["left_out"])
        return (
            f"The run holds no tables of {side} responses alone. Make them: `python -m diagnostics"
            f" {OF_SIDES} --output-dir DIR`, of a run whose responses were judged."
        )

    def __repr__(self) -> str:
        return cut(f"<Run {summary.title(self)}: {self._contents()}>")

    def _repr_html_(self) -> str:
        """The findings, the verdicts, and what else there is to look at."""
        shown, _ = summary.claims(self)
        columns = [name for name in ("claim", "outcome", "verdict") if name in shown]
        found = "".join(
            f"<p><b>{question}</b> {html.escape(text)}</p>"
            for question, text in summary.answer(self).items()
        )
        verdicts = shown[columns].to_html(index=False) if len(shown) else ""
        title = html.escape(summary.title(self))
        return f"<h4>{title}</h4>{found}{verdicts}<p>{html.escape(self._contents())}</p>"

    def _contents(self) -> str:
        """The sizes of the token table, the bank and every table in one line."""
        names = ", ".join(f"{name} ({len(table):,})" for name, table in self.tables.items())
        kept = [
            f"{len(self.tokens):,} positions" if self.tokens is not None else "",
            f"{len(self.bank):,} contexts" if self.bank is not None else "",
        ]
        return "; ".join([*filter(None, kept), f"tables (rows): {names}"])


OF_SIDES = "by-correctness"
"""The stage that makes the tables of right and of wrong responses alone."""


def read_run(
    directory: str | Path, *, shown: int | None = None, responses: str = ALL
) -> RunResults:
    """Read the files of a finished run, for a notebook or the report.

    Needs neither torch nor a model. In a notebook `run = dx.read_run("reports/demo")` shows the
    findings and the verdicts. A file whose content is no longer what the manifest recorded is left
    out, and `reading_notes` says so.

    Args:
        directory: A run directory with manifest.json and tables/*.csv, as `python -m diagnostics
            run` and the single stages write it.
        shown: Number of contexts that a page is to show token by token. A token table that is too
            large to be studied whole is then read as the study's sample, with the contexts of its
            prompts, and the likeliest tokens of those that are shown alone.
        responses: `right` or `wrong` for the tables and positions of those responses alone, which
            `by-correctness` makes; the same as `read_run(directory).responses("right")`.

    Returns:
        The manifest, the tables by name, the token table, the bank of contexts and the most likely
        tokens; the last three are None where the run has no such file.

    Raises:
        DiagnosticsError: The manifest or every table is missing, a file is damaged, or a link
            stands where this program keeps a file of its own; or there are no tables of the
            responses that are asked for.
    """
    require_known(responses)
    directory = Path(directory)
    manifest = _read_manifest(directory)
    reading = _Reading(directory, manifest)
    # a page's texts are Python's own: those of some hundred rows are compared in half the time so
    storage = pd.get_option("mode.string_storage") if shown is None else "python"
    with pd.option_context("mode.string_storage", storage):
        tables = _analysis_tables(directory, reading) | training_tables(directory, reading)
    if not tables:
        notes = f" ({' '.join(reading.notes)})" if reading.notes else ""
        raise DiagnosticsError(
            f"{directory / 'tables'} holds no table{notes}. Run `python -m diagnostics analyze"
            f" --output-dir {directory}` first."
        )
    of_page = None if shown is None else _read_shown(manifest, reading, shown)
    tokens, bank, tops = of_page or (
        reading.read("tokens.parquet", lambda path: validate_tokens(read_parquet(path))),
        reading.read("contexts.parquet", read_bank),
        reading.read("tops.parquet", read_parquet),
    )
    sides = _side_tables(manifest, reading)
    whole = RunResults(manifest, tables, tokens, bank, tops, tuple(reading.notes), sides)
    return whole.responses(responses)


def _side_tables(
    manifest: Mapping[str, Any], reading: _Reading
) -> dict[str, dict[str, pd.DataFrame]]:
    """The recorded tables of right and of wrong responses alone, by side and name."""
    recorded = manifest["stages"].get(OF_SIDES, {}).get("files", {})
    found: dict[str, dict[str, pd.DataFrame]] = {}
    for side in SIDES:
        for name in recorded:
            if not name.startswith(f"tables/{side}/"):
                continue
            table = reading.read(name, _read_csv)
            if table is not None:
                found.setdefault(side, {})[Path(name).stem] = table
    return found


def _read_shown(
    manifest: Mapping[str, Any], reading: _Reading, shown: int
) -> tuple[pd.DataFrame | None, Bank | None, pd.DataFrame | None] | None:
    """The sample of a large token table, its contexts, and the likeliest tokens of those to show;
    None where the table is not large.
    """
    from diagnostics.report.tokenview import telling_contexts

    if not is_long(reading.directory / "tokens.parquet"):
        return None
    seed = manifest["stages"].get("analyze", {}).get("settings", {}).get("seed", 0)
    tokens = reading.read("tokens.parquet", lambda path: read_studied(path, seed))
    if tokens is None:
        return None
    of_prompts = [("prompt_id", "in", list(tokens["prompt_id"].unique()))]
    bank = reading.read(
        "contexts.parquet", lambda path: Bank.from_frame(read_parquet(path, filters=of_prompts))
    )
    names = []
    if bank is not None and shown:
        names = [bank[index].context_id for index in telling_contexts(bank, tokens, shown)[0]]
    of_shown = [("context_id", "in", names)]
    tops = reading.read("tops.parquet", lambda path: read_parquet(path, filters=of_shown))
    return tokens, bank, tops


def read_tables(directory: str | Path, *, begins: str, remedy: str) -> RunResults:
    """Read the manifest and some tables of a run alone, without its token table and contexts.

    Args:
        directory: A run directory with manifest.json and tables/*.csv.
        begins: What the names of the tables begin with.
        remedy: The sentence that tells the reader what to do where there is no such table.

    Returns:
        The manifest, those tables by name, and the notes on files that were left out.

    Raises:
        DiagnosticsError: The manifest or every such table is missing, or a file is damaged.
    """
    directory = Path(directory)
    reading = _Reading(directory, _read_manifest(directory))
    tables = _analysis_tables(directory, reading, begins)
    if not tables:
        raise DiagnosticsError(
            f"{directory / 'tables'} holds no table {begins}*.csv"
            f"{f' ({chr(32).join(reading.notes)})' if reading.notes else ''}. {remedy}"
        )
    return RunResults(reading.manifest, tables, reading_notes=tuple(reading.notes))


def _analysis_tables(
    directory: Path, reading: _Reading, begins: str = ""
) -> dict[str, pd.DataFrame]:
    """Every CSV file directly below DIR/tables whose name begins so, by its name without the
    ending.
    """
    names = [
        name
        for name, kind in files.walk(directory, "tables")
        if name.endswith(".csv")
        and name.count("/") == 1
        and kind != "folder"
        and Path(name).name.startswith(begins)
    ]
    found = {Path(name).stem: reading.read(name, _read_csv) for name in names}
    return {name: table for name, table in found.items() if table is not None}


class _Reading:
    """Reads files of a run after comparing each with the manifest.

    A file whose hash is not the recorded one is left out, and a note says so.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]):
        self.directory, self.manifest = directory, manifest
        self.notes: list[str] = []

    def say(self, sentence: str) -> None:
        """Keep a sentence for the page, and log it."""
        self.notes.append(sentence)
        log.warning("%s: %s", self.directory, sentence)

    def read(self, name: str, reader: Callable[[Path], Any], *, ask: bool = True) -> Any:
        """Read a file of the run.

        Args:
            name: The file, relative to the run directory.
            reader: Turns the file's path into its content.
            ask: Whether a file that the manifest does not record gets a note.

        Returns:
            What `reader` returned; None where there is no such file, or it was changed.
        """
        digest, known = files.hash_inside(self.directory, name), hashes_read(self.manifest, name)
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
    """Read what a training, or a grid of trainings, writes outside tables/.

    Args:
        directory: The run directory.
        reading: The reader that keeps the notes; a new one without a manifest where None.

    Returns:
        `evaluations`, `training_metrics` and `training_positions`, as far as the run has them. The
        metrics have one row per step; those of a grid name their cell in the columns criterion,
        budget and seed. The positions have one row per step and tenth of the responses.
    """
    reading = reading or _Reading(directory, {"stages": {}})
    found = {
        "evaluations": reading.read("evaluations.csv", _read_csv, ask=False),
        "training_metrics": reading.read(
            "metrics.jsonl", lambda path: _read_lines(path, reading.say), ask=False
        ),
        "training_positions": reading.read(
            "positions.jsonl", lambda path: _read_lines(path, reading.say), ask=False
        ),
    }
    curves = []
    for name, kind in files.walk(reading.directory, "cells"):
        if name.endswith(".curve.parquet") and kind == "file":
            curve = _read_curve(reading, name)
            curves += [] if curve is None else [curve]
    found |= {"training_metrics": pd.concat(curves, ignore_index=True)} if curves else {}
    return {name: table for name, table in found.items() if table is not None}


def _read_curve(reading: _Reading, name: str) -> pd.DataFrame | None:
    """The metrics of one cell of a grid, with the columns that say which it is. None, with a word,
    where its record is lost or was changed, or has another hash of the curve.
    """
    beside = name.removesuffix(".curve.parquet") + ".json"
    said = len(reading.notes)
    record = reading.read(beside, _read_record, ask=False)
    if record is not None and not _is_of(record["cell"], Path(beside).stem):
        reading.say(f"{beside} is the record of another training and was left out of this page.")
        return None
    if record is None:
        if len(reading.notes) == said:
            reading.say(f"{name} has no record of its training beside it and was left out.")
        return None
    known = record["files"].get(name.rpartition("/")[2])
    if known not in (None, files.hash_inside(reading.directory, name)):
        reading.say(f"{name} is not as its record has it and was left out of this page.")
        return None
    curve = reading.read(name, read_parquet, ask=False)
    return None if curve is None else curve.assign(**record["cell"])


def _is_of(cell: Mapping[str, Any], name: str) -> bool:
    """Whether a record's training is the one that its file is named by."""
    begins, ends = f"{cell.get('criterion')}-", f"-seed{cell.get('seed')}"
    return name.startswith(begins) and name.endswith(ends)


def _read_record(path: Path) -> dict[str, Any] | None:
    """A cell's record; None where it cannot be read as one."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    parts = {"files": {}} | record if isinstance(record, dict) else {}
    whole = isinstance(parts.get("cell"), dict) and isinstance(parts["files"], dict)
    plain = whole and all(isinstance(value, str | int | float) for value in parts["cell"].values())
    return parts if plain else None


def _read_lines(path: Path, say: Callable[[str], None]) -> pd.DataFrame:
    """Metrics, one row per line; a line that is cut or damaged is left out and counted."""
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


def _read_manifest(directory: Path) -> dict[str, Any]:
    """The run's manifest, which must be a regular file and not a link to one elsewhere."""
    path = directory / "manifest.json"
    if (found := files.kind(path)) not in ("file", None):
        raise files.unfit(path, found, "file")
    return read_manifest(path, remedy="Name the --output-dir of an earlier run.")


def _read_csv(path: Path) -> pd.DataFrame:
    """A table; one without columns where the file is empty."""
    try:
        return read_csv(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (OSError, ValueError) as error:
        raise DiagnosticsError(
            f"{path} cannot be read as CSV ({str(error).splitlines()[0]}). Run the analyze stage"
            " again."
        ) from error
