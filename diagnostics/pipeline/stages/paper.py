"""The stage `paper`: one paper's tables and figures from a run with a trained student.

The student after training is a checkpoint that `score --after` measured, or else, with `--train`,
the first of the trainings under teachability at 5 %. Trainings that are finished are kept: the
command without `--train` lays them out again, and with it goes on from them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.analysis.paper.cells import (
    FOLDER,
    STANDS_FOR_A_CHECKPOINT,
    TRAINING,
    read_cells,
    stand_in,
    with_student,
)
from diagnostics.core.checkpoint import CHECKPOINT_COLUMN, has_checkpoint
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import code_version
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.tables import write_csv, write_json
from diagnostics.core.types import read_bank
from diagnostics.pipeline.stage import ANALYSIS, SELECTORS, Job
from diagnostics.pipeline.stages.settings import scored_supports
from diagnostics.pipeline.stages.train import refuse_shards

if TYPE_CHECKING:
    from diagnostics.analysis.config import AnalysisConfig
    from diagnostics.models.identity import Models
    from diagnostics.pipeline.run import Run
    from diagnostics.training.selectors import SelectorConfig

log = logging.getLogger("diagnostics")
SHORT = 1e-9
"""What rounding alone may take from a kept share."""


def do(job: Job) -> dict[str, str]:
    """Do the stage of a command, and name the page."""
    page = paper_stage(
        job.run,
        job.models,
        job.configs[SELECTORS],
        job.configs[ANALYSIS],
        seed=job.flag("seed"),
    )
    return {"output_dir": str(job.run.directory), "paper": str(page)}


def paper_stage(
    run: Run, models: Models, config: SelectorConfig, analysis: AnalysisConfig, *, seed: int
) -> Path:
    """Train under the paper's masks where that is asked for, and write its tables and its page.

    Args:
        run: A run directory with `tokens.parquet`; for trainings also with contexts and scores.
        models: The pair; loaded for trainings only.
        config: The trainings.
        analysis: Draws and level of the intervals.
        seed: Seed of the bootstrap.

    Returns:
        The path of paper.html.

    Raises:
        DiagnosticsError: There is no trained student, and none is to be trained.
    """
    from diagnostics.analysis.paper.tables import paper

    names, settings, identity = _trainings(run, models, config)
    made: dict[str, pd.DataFrame] = {}

    def work() -> dict[str, Any]:
        cells, kept = _cells(run, names)
        tokens, facts = _with_student(run, cells)
        made.update(
            paper(tokens, cells=cells, kept=kept, **dataclasses.asdict(analysis), seed=seed)
        )
        for name, table in made.items():
            write_csv(run.path(f"tables/{name}.csv"), table)
        return facts | {"trainings": 0 if kept is None else len(kept)}

    run.stage(
        "paper",
        settings={**settings, **dataclasses.asdict(analysis), "seed": seed},
        inputs=["tokens.parquet", *_cell_files(names)],
        outputs=lambda: [f"tables/{name}.csv" for name in made],
        work=work,
        derived=True,
        code=("analysis.paper.tables", "analysis.paper.cells"),
        models=lambda: identity,
    )
    from diagnostics.report.paper_page import build

    return build(run.directory)


def _trainings(
    run: Run, models: Models, config: SelectorConfig
) -> tuple[list[str], dict[str, Any], dict[str, str]]:
    """Names of the finished trainings, the settings of the stage, and the models' identity.

    Without `train` these are the trainings that the manifest records.
    """
    from diagnostics.training.selectors import SelectorConfig

    fields = [field.name for field in dataclasses.fields(SelectorConfig)]
    earlier = run.manifest["stages"].get("paper", {})
    if config.train:
        _train(run, models, config)
        settings = {**models.settings, **dataclasses.asdict(config)}
        return [cell.name for cell in config.cells()], settings, models.fingerprint()
    if earlier.get("settings", {}).get("train"):
        asked = {name: earlier["settings"][name] for name in fields if name in earlier["settings"]}
        asked = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in asked.items()
        }
        log.info("the trainings that this run recorded are laid out again")
        analysis = ("draws", "level", "seed")
        settings = {key: value for key, value in earlier["settings"].items() if key not in analysis}
        names = [cell.name for cell in SelectorConfig(**asked).cells()]
        return names, settings, earlier.get("models", {})
    left = len(list(run.path(FOLDER).glob("*-seed*.json")))
    if left:
        log.warning(
            "%s holds %d finished trainings of a command that did not end; they are left out until"
            " paper --train has finished the others",
            run.path(FOLDER),
            left,
        )
    return [], {"train": False}, {}


def _cell_files(names: list[str]) -> list[str]:
    """The files of the trainings, as the manifest records them."""
    if not names:
        return []
    kinds = ("parquet", "curve.parquet", "json")
    files = [f"{name}.{kind}" for name in names for kind in kinds]
    return [f"{FOLDER}/{file}" for file in ("untouched.parquet", "untouched.json", *files)]


def _train(run: Run, models: Models, config: SelectorConfig) -> None:
    """Train every cell that is not finished."""
    from diagnostics.training.selectors import SelectorJob, run_selectors, shared_settings

    refuse_shards(models)
    run.require("contexts.parquet"), run.require("scores.parquet")
    k, sweep = scored_supports(run)
    bank = read_bank(run.path("contexts.parquet"))
    inputs = {
        f"{name}_sha256": run.input_hash("paper", f"{name}.parquet")
        for name in ("contexts", "scores")
    }
    earlier = run.manifest["stages"].get("paper", {}).get("inputs", {})
    job = SelectorJob(
        folder=run.path(FOLDER),
        pair=dataclasses.asdict(models.config),
        prompts={},
        evaluation={},
        grid=shared_settings(config, bank, k=k, sweep=sweep),
        sources={**models.fingerprint(), **inputs},
        code=code_version("training.selectors", "training.run", "training.trl_trainer"),
        accept_code=run.accept_code,
        known={
            file.removeprefix(f"{FOLDER}/"): digest
            for file, digest in earlier.items()
            if file.startswith(f"{FOLDER}/")
        },
        run=run.directory,
    )
    write_json(run.manifest_path, run.manifest)
    run_selectors(job, config)


def _cells(run: Run, names: list[str]) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """The trainings of these names, and what they kept; None where there are none.

    Finished trainings that another command asked for stay in the folder and are not among them.
    """
    if not names:
        return None, None
    cells, kept = read_cells(run.path(FOLDER), names=names)
    for row in kept[kept["kept_share"] < kept["budget"] - SHORT].itertuples():
        log.warning(
            "%s at a budget of %g kept %.3g of its positions (seed %d): there are no more where it"
            " selects",
            row.criterion,
            row.budget,
            row.kept_share,
            row.seed,
        )
    return cells, kept


def _with_student(run: Run, cells: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The token table with the columns of a trained student, and which student that is."""
    tokens = validate_tokens(read_parquet(run.require("tokens.parquet")))
    if has_checkpoint(tokens):
        return tokens, {"checkpoint": "score --after"}
    if cells is None:
        raise DiagnosticsError(_no_student(run))
    chosen = stand_in(cells)
    if chosen is None:
        name, budget = STANDS_FOR_A_CHECKPOINT
        raise DiagnosticsError(
            f"{run.directory} has no checkpoint of its own, and no training under {name} at"
            f" {budget:g}, whose student stands for it. Add {name} to --masks and {budget:g} to"
            " --budgets, or measure a student with `score --after`."
        )
    return with_student(tokens, cells), {"checkpoint": dict(zip(TRAINING, chosen, strict=True))}


def _no_student(run: Run) -> str:
    """What to type for a trained student."""
    pair = _pair_flags(run.manifest["stages"].get("score", {}).get("settings", {}))
    where = f"--output-dir {run.directory}"
    return (
        f"{run.directory} has no trained student: tokens.parquet has no {CHECKPOINT_COLUMN}. Train"
        f" some here with `python -m diagnostics paper {pair} --train {where}`, or measure one"
        f" that you have with `python -m diagnostics score {pair} --after STUDENT {where}`."
    )


def _pair_flags(settings: Mapping[str, Any]) -> str:
    """The flags that name a run's pair; the names of the flags where the run does not say."""
    if settings.get("pair"):
        return f"--pair {settings['pair']}"
    student, teacher = (settings.get(name) or name.upper() for name in ("student", "teacher"))
    return f"--student {student} --teacher {teacher}"
