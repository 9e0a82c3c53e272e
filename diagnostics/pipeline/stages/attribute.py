"""The stage `attribute`: the gain of a position is divided among its sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diagnostics.analysis.bounds import marked
from diagnostics.core.tables import write_csv, write_parquet
from diagnostics.models.identity import Models
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import ANALYSIS, ATTRIBUTION, PROBE, SCORE, Job
from diagnostics.pipeline.stages.settings import (
    merged,
    refuse_sharded_student,
    require_probe_settings,
)
from diagnostics.pipeline.stages.token_table import GAIN_KEYS, join_tokens, scored_bank

if TYPE_CHECKING:
    from diagnostics.analysis.config import AnalysisConfig
    from diagnostics.probing.config.attribution import AttributionConfig
    from diagnostics.probing.config.step import ProbeConfig
TABLES = ("linearity", "kernel", "kernel_shares", "lift")
"""The tables that it writes."""


def do(job: Job) -> None:
    """Do the stage of a command."""
    attribute_stage(
        job.run,
        job.models,
        job.configs[PROBE],
        job.configs[ATTRIBUTION],
        job.configs[ANALYSIS],
        batch_tokens=job.configs[SCORE].batch_tokens,
    )


def attribute_stage(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: AttributionConfig,
    analysis: AnalysisConfig,
    *,
    batch_tokens: int,
) -> None:
    """Attribute the probe's step to the positions whose loss caused it.

    Args:
        run: A run directory with contexts, scores and gains.
        models: The pair.
        probe: The step, which has to be the probe's.
        config: How many positions are attributed, and whether the whole kernel is written.
        analysis: Draws and level of the intervals.
        batch_tokens: The most tokens of a batch.
    """
    refuse_sharded_student(models, "an attribution")
    require_probe_settings(run, probe, what="An attribution")
    settings = merged(models.settings, probe, config, analysis, {"batch_tokens": batch_tokens})
    run.stage(
        "attribute",
        settings=settings,
        inputs=["contexts.parquet", "scores.parquet", "gains.parquet"],
        outputs=["first_order.parquet", *(f"tables/{name}.csv" for name in TABLES)],
        work=lambda: _attributed(run, models, probe, config, analysis, batch_tokens),
        derived=True,
        code=("probing.attribution",),
        models=models.fingerprint,
    )
    join_tokens(run)


def _attributed(
    run: Run,
    models: Models,
    probe: ProbeConfig,
    config: AttributionConfig,
    analysis: AnalysisConfig,
    batch_tokens: int,
) -> None:
    """Attribute, and write columns and tables."""
    from diagnostics.probing.attribution import attribute

    bank, tokens = scored_bank(run)
    result = attribute(
        models.pair,
        bank,
        probe,
        config,
        analysis,
        tokens=tokens,
        batch_tokens=batch_tokens,
    )
    write_parquet(
        run.path("first_order.parquet"), result.tokens[[*GAIN_KEYS, "first_order_gain", "lift"]]
    )
    made = dict(
        zip(TABLES, (result.linearity, result.kernel, result.shares, result.lift), strict=True)
    )
    for name, table in marked(made, tokens, otherwise="change of a bound").items():
        write_csv(run.path(f"tables/{name}.csv"), table)
