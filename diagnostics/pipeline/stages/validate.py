"""The stage `validate`: a grid of short trainings, and what it says of the probe's conclusions."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.fingerprints import code_version
from diagnostics.core.manifest import unchanged
from diagnostics.core.tables import read_csv, write_csv, write_json
from diagnostics.models.identity import Models, file_hash
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import ANALYSIS, ENGINE, EVALUATION, PROMPTS, VALIDATE, Job
from diagnostics.pipeline.stages.settings import merged
from diagnostics.pipeline.stages.train import refuse_shards

if TYPE_CHECKING:
    from diagnostics.analysis.config import AnalysisConfig
    from diagnostics.contexts.prompts import PromptConfig
    from diagnostics.training.config import EngineConfig
    from diagnostics.training.evaluation import EvaluationConfig
    from diagnostics.training.grid import Job as GridJob
    from diagnostics.training.grid import TrainingCell, ValidateConfig

log = logging.getLogger("diagnostics")
LATER = ("prompts_split", "max_prompt_tokens", "teacher_logprobs")
"""Options that were added after the first grids. A cell names them only where they are set, so that
cells of earlier grids keep their names; None is what those grids did."""


def do(job: Job) -> None:
    """Train the grid, cell by cell, and write its tables.

    Finished cells are kept, and a wider grid adds to them.
    """
    from diagnostics.contexts.verifiers import recorded_verifier
    from diagnostics.measure.loss_names import check_loss
    from diagnostics.training import grid

    run, models, offline = job.run, job.models, job.flag("offline")
    names = (PROMPTS, EVALUATION, VALIDATE, ANALYSIS)
    prompts, evaluation, config, analysis = (job.configs[name] for name in names)
    check_loss(config.loss)
    refuse_shards(models)
    options = _engine_of_cells(job.configs[ENGINE])
    judged_by = recorded_verifier(evaluation.verifier)
    cell_job = _grid_job(run, models, (prompts, evaluation, config), options, judged_by)
    cells, made = grid.grid(config), {}
    write_json(run.manifest_path, run.manifest)
    grid.run_grid(cell_job, cells, workers=config.workers)

    def work() -> None:
        made.update(_validation_tables(cell_job.folder, cells, offline, analysis))
        for name, table in made.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    parts = (_settings(prompts), config, evaluation, analysis, {"offline": offline}, options)
    run.stage(
        "validate",
        settings=merged(models.settings, *parts, judged_by),
        inputs=_cell_files(cells),
        outputs=lambda: [f"tables/{name}.csv" for name in made],
        work=work,
        derived=True,
        code=("training.grid", "training.run"),
        models=models.fingerprint,
    )


def _settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration by which a cell of the grid is named, without unused options
    of `LATER`.
    """
    return {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None or key not in LATER
    }


def _grid_job(
    run: Run,
    models: Models,
    configs: tuple[PromptConfig, EvaluationConfig, ValidateConfig],
    options: dict[str, Any],
    judged_by: Mapping[str, str],
) -> GridJob:
    """What the processes that train the cells are told, and what names a finished cell."""
    from diagnostics.training import grid

    prompts, evaluation, _ = configs
    sources = {
        **models.fingerprint(),
        **file_hash("prompts", prompts.prompts),
        **file_hash("eval_prompts", evaluation.eval_prompts),
        **file_hash("trl", options.get("trl")),
        **file_hash("peft", options.get("peft")),
        **{name: judged_by[name] for name in ("verifier_sha256",) if name in judged_by},
    }
    earlier = run.manifest["stages"].get("validate", {}).get("inputs", {})
    return grid.Job(
        run.path("cells"),
        *map(_settings, (models.config, *configs)),
        options,
        sources,
        code_version("training.run", "training.trl_trainer", "training.evaluation"),
        run.accept_code,
        {file.removeprefix("cells/"): digest for file, digest in earlier.items()},
    )


def _cell_files(cells: Sequence[TrainingCell]) -> list[str]:
    """The files of the trainings, as the manifest records them."""
    names = ["untouched", *(cell.name for cell in cells)]
    return [f"cells/{name}.{kind}" for name in names for kind in ("parquet", "json")] + [
        f"cells/{cell.name}.curve.parquet" for cell in cells
    ]


def _validation_tables(
    folder: Path, cells: Sequence[TrainingCell], offline: str | None, analysis: AnalysisConfig
) -> dict[str, pd.DataFrame]:
    """The tables of a finished grid, whose cells lie in `folder`."""
    from diagnostics.analysis import foresight
    from diagnostics.analysis.claims import of_training
    from diagnostics.training import grid

    competing = dict.fromkeys(
        (cell.criterion, cell.budget) for cell in cells if cell.criterion != "full"
    )
    answers = (
        foresight.offline_run(Path(offline), competing, draws=analysis.draws) if offline else None
    )
    rows = grid.read_outcomes(folder, cells)
    made = foresight.tables(rows, answers, **dataclasses.asdict(analysis))
    verdicts = [*_claims_of(offline), of_training(made["validation_verdicts"])]
    return {**made, "verdicts": pd.concat(verdicts, ignore_index=True)}


def _engine_of_cells(engine: EngineConfig | None) -> dict[str, Any]:
    """Return the engine options that differ from their defaults.

    Raises:
        DiagnosticsError: An option was given that a grid decides itself.
    """
    from diagnostics.training.config import EngineConfig

    usual = dataclasses.asdict(EngineConfig())
    given = {
        key: value
        for key, value in dataclasses.asdict(engine or EngineConfig()).items()
        if value != usual[key] and key != "max_new_tokens"
    }
    decided = [
        f"--{key.replace('_', '-')}"
        for key in ("save_every", "probe_every", "resume")
        if key in given
    ]
    if decided:
        raise DiagnosticsError(
            f"A grid of trainings takes no {' or '.join(decided)}: each training is short, kept"
            " when it ends and begun again otherwise. Leave it out."
        )
    if "report_to" in given:
        raise DiagnosticsError(
            "A grid of trainings reports to no tracker: each training's log is kept as"
            " cells/*.curve.parquet. Leave --report-to out."
        )
    return given


def _claims_of(directory: str | None) -> list[pd.DataFrame]:
    """The verdicts of a finished main job, which a validation's table of verdicts begins with."""
    path = Path(directory) / "tables/verdicts.csv" if directory else None
    if path is None or not path.exists():
        return []
    table = read_csv(unchanged(directory, "tables/verdicts.csv"))
    if "population" not in table:
        log.warning(
            "%s was written by an earlier version, whose verdicts had other tests; they are left"
            " out. Run analyze there again",
            path,
        )
        return []
    return [table[table["population"] != "training"]]
