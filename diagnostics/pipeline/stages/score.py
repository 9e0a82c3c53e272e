"""The stage `score`: every response position is measured before any step."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import pandas as pd

from diagnostics.analysis.config import SIGNAL
from diagnostics.analysis.warnings import EXPLAINED
from diagnostics.core.tables import write_csv, write_parquet_parts
from diagnostics.core.types import read_bank
from diagnostics.models.identity import Models
from diagnostics.pipeline.run import Run
from diagnostics.pipeline.stage import SCORE, Job
from diagnostics.pipeline.stages.token_table import join_tokens

if TYPE_CHECKING:
    from diagnostics.probing.config.scores import ScoreConfig

log = logging.getLogger("diagnostics")
STOPS = "tables/stop_tokens.csv"
"""The tokens that end a response for either model."""


def do(job: Job) -> None:
    """Do the stage of a command."""
    score_stage(job.run, job.models, job.configs[SCORE])


def score_stage(run: Run, models: Models, config: ScoreConfig) -> None:
    """Measure every response position, and keep the most likely tokens of both models there."""
    from diagnostics.models.pair import stop_tokens
    from diagnostics.models.special_tokens import count_dropped
    from diagnostics.probing.scores import TOP_TYPES, TOPS, chosen_batch_tokens, measure_bank

    def work() -> dict:
        bank = read_bank(run.path("contexts.parquet"))
        size = chosen_batch_tokens(models.pair, config.batch_tokens)
        settings = dataclasses.replace(config, batch_tokens=size)
        measured = measure_bank(models.pair, bank, settings, shards=run.shards("scores"), tops=TOPS)
        write_parquet_parts(run.path("scores.parquet"), measured.tokens())
        write_parquet_parts(run.path("tops.parquet"), measured.tops(), types=TOP_TYPES)
        write_csv(run.path(STOPS), stop_tokens(models.pair))
        dropped = models.pair.dropped
        return {
            **models.pair.facts,
            "not_finite": measured.not_finite,
            "batch_tokens": size,
            **({"dropped_tokens": count_dropped(bank, dropped)} if dropped else {}),
        }

    run.stage(
        "score",
        settings={**models.settings, **dataclasses.asdict(config)},
        inputs=["contexts.parquet"],
        outputs=["scores.parquet", "tops.parquet", STOPS],
        work=work,
        code=("probing.scores", "models.special_tokens"),
        models=models.fingerprint,
    )
    _warn_of_equal_models(run)
    join_tokens(run)


def _warn_of_equal_models(run: Run) -> None:
    """Say before the expensive stages that there is nothing to learn."""
    found = pd.read_parquet(run.path("scores.parquet"), columns=["forward_kl"])
    mean = float(found["forward_kl"].mean())
    if mean < SIGNAL:
        log.warning("%s Mean forward KL: %.1e nats per position.", EXPLAINED["no_signal"], mean)
