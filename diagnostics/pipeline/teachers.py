"""The command `teachers`: one bank scored with each teacher, and their tables side by side.

    DIR/NAME/              one run directory per teacher, with the same contexts and student
    DIR/tables/teachers*   what `analysis.teachers` makes of them
    DIR/teachers.html      the answer, its figures and these tables

The first teacher's run samples the responses, or takes those of `--rollouts`; every other run holds
a copy of its `contexts.parquet`. Each of them is a run like any other: it can be probed, reported
and repeated by itself. Runs that are there already are compared with `--against`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diagnostics.contexts.prompts import CONTEXT_COLUMNS
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import hash_inside, read_inside, write_atomic
from diagnostics.core.manifest import read_manifest, unchanged
from diagnostics.core.progress import in_stages
from diagnostics.core.schema import read_parquet, read_tokens
from diagnostics.core.tables import read_csv, write_csv, write_json
from diagnostics.pipeline import remembered, stage
from diagnostics.pipeline.flags import read_flags
from diagnostics.pipeline.run import Run, open_run
from diagnostics.pipeline.stages.probe import probe_stage
from diagnostics.pipeline.stages.rollout import rollout_stage
from diagnostics.pipeline.stages.score import score_stage

log = logging.getLogger("diagnostics")
LISTS = (".jsonl", ".parquet")
"""Endings of a file of log-probabilities, which `--teacher` takes in place of a model."""


def compare(parsed: argparse.Namespace) -> dict[str, Any]:
    """Do the command.

    Args:
        parsed: Its flags.

    Returns:
        What it prints: output_dir, sentences, and the text of both.

    Raises:
        DiagnosticsError: Fewer than two teachers are named, or they cannot be compared.
    """
    from diagnostics.analysis.teachers import teachers_sentences
    from diagnostics.report.teachers_page import save_teachers

    named = parsed.against if parsed.against else parsed.teacher or []
    if parsed.against and parsed.teacher:
        raise DiagnosticsError(
            "Got --teacher and --against. Teachers are scored here, or runs that are there are"
            " compared; give one or the other."
        )
    if len(named) < 2:
        raise DiagnosticsError(
            f"Teachers are compared with each other; got {len(named)}. Give --teacher twice or"
            " more, or --against RUN RUN."
        )
    names = teacher_names(named, parsed.names)
    if parsed.against:
        runs = dict(zip(names, map(Path, parsed.against), strict=True))
    else:
        runs = score_each(parsed, dict(zip(names, parsed.teacher, strict=True)))
    tables = write_tables(parsed, runs)
    sentences = teachers_sentences(tables)
    path = str(save_teachers(parsed.output_dir))
    text = "\n".join([*sentences, f"page: {path}", f"output_dir: {parsed.output_dir}"])
    return {
        "output_dir": parsed.output_dir,
        "teachers": sentences,
        "page": path,
        "text": text,
    }


def teacher_names(named: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """A name per teacher, fit for a folder: as given, or the last part of its path or id.

    Raises:
        DiagnosticsError: There are not as many names as teachers, or two are the same.
    """
    if given is not None and len(given) != len(named):
        raise DiagnosticsError(
            f"Got {len(given)} --names for {len(named)} teachers. Give one name each, or none."
        )
    wanted = given or [Path(os.path.abspath(each)).stem for each in named]
    names = [re.sub(r"[^\w.-]", "_", each) for each in wanted]
    unfit = [name for name in names if not name.strip(".") or name in ("tables", "figures")]
    if unfit or len(set(names)) < len(names):
        raise DiagnosticsError(
            f"The teachers would be called {', '.join(names)}. Give each its own name, one that a"
            " folder can have, with --names."
        )
    return names


def score_each(parsed: argparse.Namespace, teachers: Mapping[str, str]) -> dict[str, Path]:
    """Score one bank with each teacher, in a run directory of its own.

    Args:
        parsed: The flags of rollout, score and, with `--probe`, probe.
        teachers: A model or a file of log-probabilities by the teacher's name.

    Returns:
        The run directories by the teacher's name.
    """
    directory = Path(parsed.output_dir)
    with open_run(directory) as run:  # the folder is a run's before it holds others
        write_json(run.manifest_path, run.manifest)
    runs = {name: directory / name for name in teachers}
    first = _frozen(parsed.rollouts)
    for name, teacher in teachers.items():
        steps = ["rollout", "score", *(["probe"] if parsed.probe else [])]
        with in_stages([f"{step} of {name}" for step in steps]) as shown:
            _score_one(parsed, runs[name], teacher, first, shown)
        first = first or runs[name] / "contexts.parquet"
    return runs


def _frozen(path: str | None) -> Path | None:
    """A file of rollouts that is this program's own contexts, which are taken as they are."""
    if path is None or not path.endswith(".parquet") or not os.path.isfile(path):
        return None
    held = read_parquet(path).columns
    return Path(path) if set(CONTEXT_COLUMNS) <= set(held) else None


def _score_one(
    parsed: argparse.Namespace, directory: Path, teacher: str, bank: Path | None, shown: Any
) -> None:
    """The run of one teacher; `bank` holds frozen contexts, None where there are none yet."""
    from diagnostics.models.identity import Models

    configs = {name: read_flags(parsed, config) for name, config in parsed.configs.items()}
    listed = teacher.endswith(LISTS) and os.path.isfile(teacher)
    which = {"teacher_logprobs": teacher, "teacher": None} if listed else {"teacher": teacher}
    pair = configs[stage.PAIR] = dataclasses.replace(configs[stage.PAIR], **which)
    models = Models(pair)
    probe, score = configs[stage.PROBE], configs[stage.SCORE]
    with open_run(directory, accept_code=parsed.accept_code) as run:
        with shown.stage(shown.names[0]):
            if bank is None:
                how = [configs[each] for each in (stage.PROMPTS, stage.ROLLOUT, stage.BANK)]
                folds = probe.folds if parsed.probe else None
                rollout_stage(run, models, *how, folds=folds)
            else:
                _take_over(run, bank)
        with shown.stage(shown.names[1]):
            score_stage(run, models, score)
        if parsed.probe:
            with shown.stage(shown.names[2]):
                probe_stage(
                    run,
                    models,
                    probe,
                    configs[stage.CONTROLS],
                    batch_tokens=score.batch_tokens,
                )
        remembered.note_inputs(run.manifest, configs.values())


def _take_over(run: Run, bank: Path) -> None:
    """Copy the first teacher's contexts into the run of another, byte by byte.

    They are not frozen anew: the runs then hold one bank, byte by byte.
    """
    content, file = read_inside(bank.parent, bank.name), run.path("contexts.parquet")
    there = hash_inside(run.directory, file.name)
    if there is None:
        write_json(run.manifest_path, run.manifest)
        write_atomic(file, content)
    elif there != hash_inside(bank.parent, bank.name):
        raise DiagnosticsError(
            f"{file} holds other contexts than {bank}. Nothing was overwritten."
            " Choose another --output-dir."
        )


def write_tables(parsed: argparse.Namespace, runs: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """Compare finished runs, and write the tables into the command's directory.

    Args:
        parsed: The flags of the command.
        runs: Run directories by the teacher's name.

    Returns:
        The tables of `analysis.teachers`.

    Raises:
        DiagnosticsError: A run has no scores, another K, or another bank or student.
    """
    from diagnostics.analysis.teachers import compare_teachers

    _require_one_k(runs)
    options = {"draws": parsed.draws, "level": parsed.level, "seed": parsed.seed}
    made: dict[str, pd.DataFrame] = {}

    def work() -> None:
        tables = {name: read_tokens(path / "tokens.parquet") for name, path in runs.items()}
        found = compare_teachers(tables, tops=_tops(runs), domains=_domains(runs), **options)
        for name, table in found.items():
            write_csv(run.path(f"tables/{name}.csv"), table)
        made.update(found)

    hashes = {
        f"{name}_sha256": hash_inside(path, "tokens.parquet") or "none"
        for name, path in runs.items()
    }
    with open_run(parsed.output_dir, accept_code=parsed.accept_code) as run:
        run.stage(
            "teachers",
            settings={"runs": list(runs), **hashes, **options},
            outputs=lambda: [f"tables/{name}.csv" for name in made],
            work=work,
            derived=True,
            code=("analysis.teachers",),
        )
        if not made:
            made = {name: _table(run.directory, name) for name in TABLES}
    return made


TABLES = ("teachers", "teachers_differences", "teachers_best", "teachers_agreement")
"""What the command writes."""


def _table(directory: Path, name: str) -> pd.DataFrame:
    return read_csv(unchanged(directory, f"tables/{name}.csv"))


def _require_one_k(runs: Mapping[str, Path]) -> None:
    """Refuse runs that were scored at different K, and directories that are no scored runs."""
    sizes = {}
    for name, path in runs.items():
        if not os.path.isfile(path / "tokens.parquet"):
            raise DiagnosticsError(
                f"{path} holds no tokens.parquet. Name the --output-dir of a run that was scored."
            )
        scored = read_manifest(path / "manifest.json")["stages"].get("score", {})
        sizes[name] = scored.get("settings", {}).get("k")
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name}: {k}" for name, k in sizes.items())
        raise DiagnosticsError(
            f"The runs were scored at different K ({shown}), on which C depends. Score them with"
            " one --k."
        )


def _tops(runs: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """The most likely tokens of each run that has them."""
    return {
        name: read_parquet(unchanged(path, "tops.parquet"))
        for name, path in runs.items()
        if os.path.isfile(path / "tops.parquet")
    }


def _domains(runs: Mapping[str, Path]) -> dict[str, str] | None:
    """Domain by prompt, of the first run whose contexts have any."""
    for path in runs.values():
        if not os.path.isfile(path / "contexts.parquet"):
            continue
        contexts = read_parquet(unchanged(path, "contexts.parquet"))
        if "domain" in contexts:
            known = contexts.dropna(subset="domain")
            return dict(zip(known["prompt_id"], known["domain"], strict=True))
    return None
