"""The stage `analyze`: the tables of the study, from the token table."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.core import files
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.manifest import unchanged
from diagnostics.core.schema import read_parquet
from diagnostics.core.tables import read_csv, write_csv
from diagnostics.core.types import SAMPLED
from diagnostics.pipeline.ahead import Ahead
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import ANALYSIS, Job
from diagnostics.pipeline.stages.primary import primary_choices
from diagnostics.pipeline.stages.settings import scored_k

if TYPE_CHECKING:
    from diagnostics.analysis.config import AnalysisConfig

log = logging.getLogger("diagnostics")


def do(job: Job, made: Ahead | None = None) -> None:
    """Do the stage of a command."""
    analyze_stage(
        job.run,
        job.configs[ANALYSIS],
        seed=job.flag("seed"),
        training=job.flag("training"),
        # The --k of `run` is the K of its scores, which the manifest already knows.
        k=job.flag("k") if job.command == "analyze" else None,
        primary=job.flag("primary"),
        made=made,
    )


def task_of(job: Job) -> dict[str, Any] | None:
    """What another process can make of the stage meanwhile; None where its tables are kept."""
    config, primary = job.configs[ANALYSIS], job.flag("primary")
    return analysis_to_make(job.run, config, seed=job.flag("seed"), primary=primary)


def analyze_stage(
    run: Run,
    config: AnalysisConfig,
    *,
    seed: int,
    training: str | None = None,
    k: int | None = None,
    primary: str | None = None,
    made: Ahead | None = None,
) -> None:
    """Write every table that the token table allows.

    Args:
        run: A run directory with `tokens.parquet`.
        config: Draws and level of the intervals.
        seed: Seed of the bootstrap.
        training: Directory of a finished validation, for claim C5.
        k: K of an imported table's columns.
        primary: What is concluded from, as `PrimaryChoices.parse` reads it; None takes what was
            recorded before the probe, or the defaults.
        made: Where another process makes the tables, from `analysis_to_make`.
    """
    stage, task = _analysis(run, config, seed, training, k, primary)
    tables: dict[str, pd.DataFrame] = {}

    def work() -> None:
        tables.update((made or Ahead({})).take("analyze", task()))
        tables.update(_engine_tables(run, tables, {**dataclasses.asdict(config), "seed": seed}))
        for name, table in tables.items():
            write_csv(run.path(f"tables/{name}.csv"), table)

    run.stage(
        "analyze",
        **stage,
        outputs=lambda: [f"tables/{name}.csv" for name in tables],
        work=work,
        derived=True,
    )


def analysis_to_make(
    run: Run, config: AnalysisConfig, *, seed: int, primary: str | None = None
) -> dict[str, Any] | None:
    """The task of `ahead` for the tables of `analyze_stage`; None where they are kept."""
    stage, task = _analysis(run, config, seed, None, None, primary)
    return None if run.has("analyze", **stage) else task()


def _analysis(
    run: Run,
    config: AnalysisConfig,
    seed: int,
    training: str | None,
    k: int | None,
    primary: str | None,
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """What `Run.stage` is asked for in an analysis, and its task for `ahead`."""
    choices, registered = primary_choices(run, primary)
    source = table_path(training, "validation_verdicts", what="validation") if training else None
    settings = {**dataclasses.asdict(config), "seed": seed} | (
        {"training": training, "training_sha256": sha256_file(source)} if source else {}
    )
    settings |= {"k": k, "primary": choices.as_text(), "registered": registered}
    scored = scored_k(run)
    if None not in (k, scored) and k != scored:
        raise DiagnosticsError(
            f"Got --k {k}, and this run was scored with --k {scored}. Leave it out; it is for"
            " imported tables."
        )

    def task() -> dict[str, Any]:
        from diagnostics.analysis.prompt_groups import read_studied

        tokens = read_studied(run.path("tokens.parquet"), seed)
        _require_gains(run, tokens)
        options = {
            **dataclasses.asdict(config),
            "seed": seed,
            "training": read_csv(source) if source else None,
            "base_k": table_k(run, tokens, k),
            "choices": choices,
            "registered": registered,
        }
        return {"tokens": run.path("tokens.parquet"), "options": options}

    stage = {
        "settings": settings,
        "inputs": ["tokens.parquet", *_of_engine(run)],
        "code": ("analysis.study", *(["analysis.engine_check"] if _of_engine(run) else [])),
    }
    return stage, task


def _require_gains(run: Run, tokens: pd.DataFrame) -> None:
    """Refuse a token table without gains."""
    if "gain" not in tokens:
        raise DiagnosticsError(
            f"{run.path('tokens.parquet')} has no gains in nats."
            + (
                " Give the scores of the trained student as well, with --tokens-after."
                if "import" in run.manifest["stages"]
                else " Run the probe stage first."
            )
        )


def _of_engine(run: Run) -> list[str]:
    """Files that a check of the sampling engine reads; none where the bank came without its
    log-probabilities, or the table is not of this run's contexts.
    """
    import pyarrow.parquet as pq

    path = run.path("contexts.parquet")
    if "import" in run.manifest["stages"] or files.kind(path) != "file":
        return []
    try:
        held = SAMPLED in pq.read_schema(path).names
    except (OSError, ValueError):  # a damaged file is named by the stage that reads it
        return []
    return (
        ["contexts.parquet", "tops.parquet"] if held and run.path("tops.parquet").exists() else []
    )


def _engine_tables(
    run: Run, tables: Mapping[str, pd.DataFrame], options: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    """The tables of the engine check, and the warnings with its own."""
    from diagnostics.analysis.engine_check import engine_tables, engine_warning

    if not _of_engine(run):
        return {}
    contexts, tops, tokens = (
        read_parquet(run.path(f"{name}.parquet")) for name in ("contexts", "tops", "tokens")
    )
    made = engine_tables(contexts, tokens, tops=tops, **options)
    found = engine_warning(made["engine_check"], made["engine_causes"])
    known = tables["warnings"]
    if found is not None:
        log.warning("%s", found[4])
        row = pd.DataFrame([found], columns=list(known.columns)).astype(known.dtypes.to_dict())
        known = row if known.empty else pd.concat([known, row], ignore_index=True)
    return {**made, "warnings": known}


def table_k(run: Run, tokens: pd.DataFrame, stated: int | None) -> int | None:
    """Return the K of a token table's columns, as scoring, the table or `stated` says.

    Raises:
        DiagnosticsError: An imported table has columns that depend on K, and nothing states it.
    """
    from diagnostics.analysis.robustness import depends_on_k, known_k, shown_k

    k = known_k(tokens, scored_k(run) or stated)
    shown = shown_k(tokens) if "import" in run.manifest["stages"] else None
    if shown is not None and k != shown:
        raise DiagnosticsError(
            f"K = {k} is said of the imported table, and the values of its topk_overlap are those"
            f" of K = {shown}: none is an odd part. Give the K that the table was made with."
        )
    if k is None and depends_on_k(tokens) and "import" in run.manifest["stages"]:
        raise DiagnosticsError(
            f"The imported table does not say at which K {', '.join(depends_on_k(tokens)[:3])} were"
            " measured. Give it with --k, or in a column `k`."
        )
    return k


def table_path(directory: str, name: str, *, what: str) -> Path:
    """Return the path of another run's table.

    Raises:
        DiagnosticsError: The run has no table of that name, or the table has changed since.
    """
    path = Path(directory) / "tables" / f"{name}.csv"
    if not os.path.isfile(path):
        raise DiagnosticsError(
            f"{path} does not exist. Name the directory of a run whose {what} is finished."
        )
    return unchanged(directory, f"tables/{name}.csv")
