"""The stage `probe`: the steps are taken, and the gains measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diagnostics.analysis.bounds import is_listed
from diagnostics.core.progress import expect
from diagnostics.core.tables import write_csv, write_parquet
from diagnostics.core.types import read_bank
from diagnostics.models.identity import Models
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import CONTROLS, PROBE, SCORE, Job
from diagnostics.pipeline.stages.primary import register_primary
from diagnostics.pipeline.stages.settings import merged
from diagnostics.pipeline.stages.token_table import GAIN_KEYS, join_tokens

if TYPE_CHECKING:
    from diagnostics.probing.config.controls import ControlConfig
    from diagnostics.probing.config.step import ProbeConfig


def do(job: Job) -> None:
    """Do the stage of a command."""
    probe_stage(
        job.run,
        job.models,
        job.configs[PROBE],
        job.configs[CONTROLS],
        batch_tokens=job.configs[SCORE].batch_tokens,
        primary=job.flag("primary"),
    )


def probe_stage(
    run: Run,
    models: Models,
    config: ProbeConfig,
    controls: ControlConfig,
    *,
    batch_tokens: int,
    primary: str | None = None,
) -> None:
    """Take the steps and measure the gains, on batches of at most `batch_tokens` tokens.

    What will be concluded from (`primary`, as `PrimaryChoices.parse` reads it) is recorded first.
    """
    from diagnostics.probing.config.trajectory import require_horizon

    names = ["calibration", "placebo"]
    names += ["horizon"] if require_horizon(controls.horizon) else []
    choices = register_primary(run, primary)
    run.stage(
        "probe",
        settings=merged(
            models.settings, config, controls, {"batch_tokens": batch_tokens, "primary": choices}
        ),
        inputs=["contexts.parquet", "scores.parquet"],
        outputs=["gains.parquet", *(f"tables/{name}.csv" for name in names)],
        work=lambda: _probed(run, models, config, controls, batch_tokens, names),
        code=("probing.one_step",),
        models=models.fingerprint,
    )
    join_tokens(run)


def _probed(
    run: Run,
    models: Models,
    config: ProbeConfig,
    controls: ControlConfig,
    batch_tokens: int,
    tables: Sequence[str],
) -> dict[str, Any]:
    """Probe, write gains and tables, and return the facts for the manifest."""
    from diagnostics.probing.one_step import probe, read_scores

    bank = read_bank(run.path("contexts.parquet"))
    tokens = read_scores(run.path("scores.parquet"))
    expect(_probe_work(len(tokens), len(bank), config, controls))
    result = probe(
        models.pair,
        bank,
        config,
        controls,
        tokens=tokens,
        batch_tokens=batch_tokens,
        shards=run.shards,
    )
    added = [name for name in result.tokens if name not in tokens or name in GAIN_KEYS]
    write_parquet(run.path("gains.parquet"), result.tokens[added])
    listed = {"exactness": "change of a bound"} if is_listed(tokens) else {}
    for name in tables:
        write_csv(run.path(f"tables/{name}.csv"), getattr(result, name).assign(**listed))
    return {
        **dataclasses.asdict(result.step),
        "folds": len(result.steps),
        "horizon_rate": controls.rate(models.pair.name),
    }


def _probe_work(
    positions: int, contexts: int, config: ProbeConfig, controls: ControlConfig
) -> float:
    """About how many positions the student's forward passes of a probe go over."""
    from diagnostics.probing.config.trajectory import MINIBATCH, require_horizon
    from diagnostics.probing.step import CALIBRATION_TRIALS, FORWARD_AND_BACK

    nulls, horizon = len(controls.nulls), require_horizon(controls.horizon)
    passes = 2 + CALIBRATION_TRIALS - 1 + (1 + nulls) * (FORWARD_AND_BACK + config.folds)
    passes += 2 * controls.placebos + len(horizon)
    trained = max(horizon, default=0) * min(MINIBATCH, contexts / config.folds)
    return positions * (passes + FORWARD_AND_BACK * trained / contexts)
