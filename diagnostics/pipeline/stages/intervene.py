"""The stage `intervene`: one step, and short trajectories, per criterion, budget and fold."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics.analysis.bounds import marked
from diagnostics.core.progress import expect, forecast
from diagnostics.core.schema import read_parquet, validate_tokens
from diagnostics.core.tables import write_csv, write_parquet
from diagnostics.core.types import read_bank
from diagnostics.models.identity import Models
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import ANALYSIS, INTERVENTION, PROBE, SCORE, Job
from diagnostics.pipeline.stages.settings import (
    merged,
    refuse_sharded_student,
    require_probe_settings,
    scored_k,
    widened,
)
from diagnostics.pipeline.stages.token_table import GAIN_KEYS

if TYPE_CHECKING:
    from diagnostics.analysis.config import AnalysisConfig
    from diagnostics.probing.config.intervention import InterventionConfig
    from diagnostics.probing.config.step import ProbeConfig

log = logging.getLogger("diagnostics")
BEFORE_INTERVENING = ("fold", "split", "token_identity_gain")
"""Columns of the probe's gains that an intervention may see: no outcome of a position itself."""


def do(job: Job) -> None:
    """Do the stage of a command."""
    intervene_stage(job.run, *_grid(job), **_how(job))


def task_of(job: Job) -> dict[str, Any] | None:
    """What another process can measure of the stage meanwhile; None where nothing is."""
    return cells_to_measure(job.run, *_grid(job), **_how(job))


def _grid(job: Job) -> tuple[Any, ...]:
    """The pair and the settings of an intervention."""
    return job.models, *(job.configs[name] for name in (PROBE, INTERVENTION, ANALYSIS))


def _how(job: Job) -> dict[str, Any]:
    """How an intervention is measured."""
    return {
        "batch_tokens": job.configs[SCORE].batch_tokens,
        "drop": "criteria" not in job.given,
    }


def intervene_stage(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    *,
    batch_tokens: int,
    drop: bool = False,
) -> None:
    """Take one step, and short trajectories, per criterion, budget and fold.

    Finished cells are kept in `cells`, so that a wider grid or a longer horizon goes on from there.
    What the directory has intervened on already stays in its tables: criteria, budgets and horizons
    are added to them.

    Args:
        run: A run directory with contexts and scores. Where it has the probe's gains, their folds
            and token_identity_gain are used.
        models: The pair.
        probe: The step and the folds, which have to be the probe's where the run has one.
        config: Criteria, budgets, horizons, and how cells are matched.
        analysis: Draws and level of the intervals.
        batch_tokens: The most tokens of a batch.
        drop: Whether criteria whose columns the scores lack are left out, and not refused.
    """
    refuse_sharded_student(models, "an intervention")
    require_probe_settings(run, probe, what="An intervention")
    config = _whole_grid(run, config, _others(models, probe, analysis, batch_tokens), drop=drop)
    run.stage(
        "intervene",
        **_intervention(run, models, probe, config, analysis, batch_tokens),
        outputs=["interventions.parquet", "tables/intervention.csv"],
        work=lambda: _intervened(run, models, probe, config, analysis, batch_tokens),
        derived=True,
        models=models.fingerprint,
    )


def _intervened(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    batch_tokens: int,
) -> dict[str, Any]:
    """Measure the grid, write its files, and return the facts for the manifest."""
    from diagnostics.probing.config.trajectory import require_horizon
    from diagnostics.probing.intervention import SUPPORT, interventions
    from diagnostics.probing.intervention_table import summarize

    bank, tokens = read_bank(run.path("contexts.parquet")), _before_intervening(run)
    _say_grid(len(tokens), len(bank), probe, config)
    result = interventions(
        models.pair,
        bank,
        probe,
        config,
        tokens=tokens,
        k=scored_k(run) or SUPPORT,
        batch_tokens=batch_tokens,
        cache=run.path("cells"),
        shards=run.shards,
        size=_size_of_probe(run, models),
    )
    write_parquet(run.path("interventions.parquet"), result.by_prompt())
    table = summarize(result, **dataclasses.asdict(analysis), seed=probe.seed)
    shown = marked({"intervention": table}, tokens)["intervention"]
    write_csv(run.path("tables/intervention.csv"), shown)
    chosen = result.calibration[result.calibration["chosen"]].iloc[0]
    return {
        "cells": len(result.cells),
        "steps": result.steps,
        "step_size": float(chosen.step_size),
        "relative_norm": float(chosen.relative_norm),
        "horizon": list(require_horizon(config.horizon)),
        "horizon_rate": config.trajectory(models.pair, probe).rate,
    }


def _size_of_probe(run: Run, models: Models) -> float | None:
    """The size of the probe's steps; None where the run has no probe of this pair."""
    probe = run.manifest["stages"].get("probe", {})
    known = probe.get("models") == models.fingerprint()
    return probe.get("facts", {}).get("step_size") if known else None


def _intervention(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    batch_tokens: int,
) -> dict[str, Any]:
    """What `Run.stage` is asked for in an intervention."""
    inputs = ["contexts.parquet", "scores.parquet"]
    inputs += [name for name in ("gains.parquet",) if run.path(name).exists()]
    settings = merged(models.settings, probe, config, analysis, {"batch_tokens": batch_tokens})
    return {"settings": settings, "inputs": inputs, "code": ("probing.intervention",)}


def _with_columns(run: Run, config: InterventionConfig, *, say: bool) -> InterventionConfig:
    """The grid without the criteria that read a column which the scores lack."""
    from diagnostics import criteria as registry

    tokens = validate_tokens(read_parquet(run.require("scores.parquet")))
    lacking = {name: registry.missing_columns(tokens, name) for name in config.criteria}
    for name, columns in lacking.items():
        if columns and say:
            log.warning("%s is left out: the scores lack %s", name, ", ".join(columns))
    kept = tuple(name for name in config.criteria if not lacking[name])
    return dataclasses.replace(config, criteria=kept)


def _say_grid(
    positions: int, contexts: int, probe: ProbeConfig, config: InterventionConfig
) -> None:
    """Say how many trajectories a grid has, and how much work that is."""
    from diagnostics import criteria as registry
    from diagnostics.probing.config.trajectory import require_horizon
    from diagnostics.probing.intervention import RIVALS
    from diagnostics.probing.step import CALIBRATION_TRIALS, FORWARD_AND_BACK

    names = {*RIVALS, *(registry.find(name).name for name in config.criteria)} - {"full"}
    draws = sum(config.random_draws if registry.is_seeded(name) else 1 for name in names)
    cells, horizon = 1 + len(set(config.budgets)) * draws, require_horizon(config.horizon)
    trained = max(horizon, default=0) * min(config.minibatch, contexts / probe.folds) / contexts
    per_cell = 1 + len(horizon) + FORWARD_AND_BACK / probe.folds + (1 + FORWARD_AND_BACK) * trained
    passes = CALIBRATION_TRIALS + FORWARD_AND_BACK + probe.folds * (1 + cells * per_cell)
    expect(positions * passes)
    takes = forecast(positions * passes)
    log.info(
        "%d selections on each of %d folds, with rivals and draws; each is measured after %s"
        " steps%s. Finished ones are kept",
        cells,
        probe.folds,
        ", ".join(map(str, horizon)) or "1",
        f": about {takes} at the probe's pace" if takes else "",
    )


def _others(
    models: Models, probe: ProbeConfig, analysis: AnalysisConfig, batch_tokens: int
) -> tuple[Any, ...]:
    """Settings of the stage beside those of its grid."""
    return models.settings, probe, analysis, {"batch_tokens": batch_tokens}


def _whole_grid(
    run: Run,
    config: InterventionConfig,
    others: tuple[Any, ...],
    *,
    drop: bool,
    say: bool = True,
) -> InterventionConfig:
    """The grid that is measured: what is asked for and can be, with what is there already."""
    if drop:
        config = _with_columns(run, config, say=say)
    names = ("criteria", "budgets", "horizon")
    return widened(run, "intervene", config, *others, names=names, say=say)


def _before_intervening(run: Run) -> pd.DataFrame:
    """The scores, with what an intervention may see of the gains."""
    tokens = validate_tokens(read_parquet(run.path("scores.parquet")))
    if not run.path("gains.parquet").exists():
        return tokens
    gains = read_parquet(run.path("gains.parquet"))
    known = [name for name in BEFORE_INTERVENING if name in gains]
    return tokens.merge(gains[[*GAIN_KEYS, *known]], on=list(GAIN_KEYS), how="left")


def cells_to_measure(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: InterventionConfig,
    analysis: AnalysisConfig,
    *,
    batch_tokens: int,
    drop: bool,
) -> dict[str, Any] | None:
    """The task of `ahead` for the trajectories of `intervene_stage`.

    None where they are measured already, no core would be free for them, or the models are not on
    the processor: a device that is shared would be no faster, and each process holds both models.
    """
    import torch

    from diagnostics.models.loading import resolve_device
    from diagnostics.pipeline.ahead import cores
    from diagnostics.probing.intervention import SUPPORT

    others = _others(models, probe, analysis, batch_tokens)
    config = _whole_grid(run, config, others, drop=drop, say=False)
    asked = _intervention(run, models, probe, config, analysis, batch_tokens)
    threads = torch.get_num_threads()
    if (
        run.has("intervene", **asked)
        or 2 * threads > cores()
        or resolve_device(models.config.device).type != "cpu"
    ):
        return None
    options = {
        "probe": probe,
        "config": config,
        "tokens": _before_intervening(run),
        "cache": run.path("cells"),
        "k": scored_k(run) or SUPPORT,
        "batch_tokens": batch_tokens,
    }
    return {
        "pair": models.config,
        "directory": run.directory,
        "contexts": run.path("contexts.parquet"),
        "threads": threads,
        "options": options,
    }
